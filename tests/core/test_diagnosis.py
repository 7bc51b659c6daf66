"""Why a start failed: from logs of real starts of vLLM 0.32, and from what others reported of other versions."""

# ruff: noqa: E501 - what vLLM logs stands as it does there

from __future__ import annotations

from pathlib import Path

import pytest

from sage_reconcile.core.diagnosis import diagnose
from sage_reconcile.core.failure import Failure, FailureKind, Started

LOGS = Path(__file__).parent / "data"
ON_CPU = Started({"model": "/models/tiny", "device": "cpu", "args": {}}, 0, 8000)
ON_GPU = Started({"model": "org/model", "device": "cuda", "args": {}}, 20000, 8000)
MANUAL = Started({"device": "cuda", "memory": "manual", "args": {"kv-cache-memory-bytes": "3G"}}, 20000, 8000)

KV_TOO_SMALL = (
    "(EngineCore_DP0 pid=1094) ERROR 02-08 10:00:00 [core.py:946] ValueError: To serve at least one request with the "
    "models's max seq len (262144), (24.0 GiB KV cache is needed, which is larger than the available KV cache memory "
    "(3.18 GiB). Based on the available memory, the estimated maximum model length is 34736. Try increasing "
    "`gpu_memory_utilization` or decreasing `max_model_len` when initializing the engine. See "
    "https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."
)
TOO_LITTLE_FREE = (
    "(Worker_TP1 pid=9) ERROR 11-25 09:18:31 [multiproc_executor.py:953] ValueError: Free memory on device cuda:1 "
    "(67.24/79.25 GiB) on startup is less than desired GPU memory utilization (0.9, 71.33 GiB). Decrease GPU memory "
    "utilization or reduce GPU memory used by other processes."
)
OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.96 GiB. GPU 0 has a total capacity of 23.53 GiB of "
    "which 1.10 GiB is free. Process 77 has 3.00 GiB memory in use. Including non-PyTorch memory, this process has "
    "22.42 GiB memory in use. Of the allocated memory 21.70 GiB is allocated by PyTorch, and 12.71 MiB is reserved."
)
AFTER = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}"


def real(name: str, code: int, started: Started = ON_CPU) -> Failure:
    return diagnose(code, (LOGS / f"{name}.log").read_text(encoding="utf-8").splitlines(), started)


def said(*lines: str, code: int = 1, started: Started = ON_GPU) -> Failure:
    return diagnose(code, [*lines, AFTER], started)


@pytest.mark.parametrize(
    ("name", "code", "kind", "line", "fix"),
    [
        (
            "vllm_bad_flag",
            2,
            FailureKind.WRONG_FLAG,
            "unrecognized arguments: --max-modellen",
            "this vLLM has no flag `max-modellen` (in `args`); did you mean `max-model-len`?",
        ),
        ("vllm_bad_parallel_size", 1, FailureKind.WRONG_FLAG,
         "Total number of attention heads (2) must be divisible by tensor parallel size (3).",
         "correct `tensor_parallel_size`"),
        ("vllm_context_too_long", 1, FailureKind.WRONG_FLAG, "User-specified max_model_len (999999) is greater than",
         "write `context: 512` or less"),
        ("vllm_missing_model", 1, FailureKind.MODEL_NOT_FOUND, "huggingface_hub.errors.HFValidationError: Repo id must be",
         "`model: /models/tiny` is neither a folder here nor a name"),
        ("vllm_model_not_cached", 1, FailureKind.MODEL_NOT_FOUND, "huggingface_hub.errors.LocalEntryNotFoundError: Cannot",
         "`model: /models/tiny` is neither a folder here nor a name"),
        ("vllm_port_taken", 1, FailureKind.PORT_TAKEN, "OSError: [Errno 98] Address already in use", "port 8000"),
        ("vllm_no_kv_cache", 1, FailureKind.NO_KV_CACHE, "No available memory for the cache blocks",
         "write a larger `kv_cache`"),
        ("vllm_cpu_too_little_free", 1, FailureKind.TOO_LITTLE_FREE,
         "Available memory on node 0 (6.64/8.09 GiB) on startup is less than desired CPU memory utilization (0.99, 8.01 GiB)",
         "write the size of the KV cache (`kv_cache`)"),
        ("vllm_cpu_kv_cache_too_large", 1, FailureKind.TOO_LITTLE_FREE, "Available memory on node 0 (6.66/8.09 GiB) on kv",
         "write `kv_cache: 6814MiB` or less"),
    ],
)  # fmt: skip
def test_a_real_failed_start_is_told_by_class_line_and_fix(
    name: str, code: int, kind: FailureKind, line: str, fix: str
) -> None:
    failure = real(name, code)
    assert failure.kind is kind
    assert failure.line.startswith(line)
    assert failure.fix.startswith(fix)
    assert failure.can_recover == (kind in (FailureKind.PORT_TAKEN, FailureKind.TOO_LITTLE_FREE))


def test_a_real_kv_cache_that_is_too_small_tells_what_would_do() -> None:
    failure = real("vllm_kv_cache_too_small", 1)
    assert failure.kind is FailureKind.KV_CACHE_TOO_SMALL
    # 65536 tokens of 512 bytes are 32 MiB, which vLLM rounds to 0.03 GiB: what is told must be enough all the same
    assert (failure.memory_mib, failure.kv_cache_mib, failure.context_tokens) == (None, 36, 32640)
    assert failure.fix == "write `kv_cache: 36MiB`, or `context: 32640`"
    told = real("vllm_kv_cache_too_small", 1, MANUAL)
    assert told.fix == "write `kv-cache-memory-bytes: 36M` in `args`, or `context: 32640`"


def test_a_kv_cache_that_is_too_small_tells_the_promise_that_would_do() -> None:
    failure = said(KV_TOO_SMALL)
    # 24.0 and 3.18 are rounded, each by 0.005 GiB at the most, and the utilisation by less than 1 MiB
    assert failure.memory_mib == 20000 + 21330 + 1
    assert failure.context_tokens == 34736
    assert failure.fix == "write `memory: 41331MiB`, or `context: 34736`"
    in_args = Started({"device": "cuda", "args": {"max-model-len": 262144}}, 20000, 8000)
    assert said(KV_TOO_SMALL, started=in_args).fix == "write `memory: 41331MiB`, or `max-model-len: 34736` in `args`"
    assert not failure.can_recover
    assert failure.line.startswith("To serve at least one request with the models's max seq len (262144), (24.0 GiB")
    assert failure.summary() == f"KV cache too small: {failure.fix}"


def test_the_rank_that_lacks_most_decides() -> None:
    other = KV_TOO_SMALL.replace("3.18 GiB", "2.10 GiB").replace("34736", "20000")
    for lines in ((KV_TOO_SMALL, other), (other, KV_TOO_SMALL)):
        failure = said(*lines)
        assert (failure.memory_mib, failure.context_tokens) == (20000 + 22436 + 1, 20000)


def test_a_kv_cache_whose_size_is_said_is_to_be_larger_and_not_the_promise() -> None:
    sized = Started({"device": "cuda", "memory": "auto", "kv_cache": 3072, "args": {}}, 20000, 8000)
    for started, fix in ((sized, "`kv_cache: 24582MiB`"), (MANUAL, "`kv-cache-memory-bytes: 24582M` in `args`")):
        failure = said(KV_TOO_SMALL, started=started)
        assert (failure.memory_mib, failure.kv_cache_mib) == (None, 24582)
        assert failure.fix == f"write {fix}, or `context: 34736`"


def test_where_the_flags_size_it_no_promise_is_told() -> None:
    assert said(TOO_LITTLE_FREE, started=MANUAL).memory_mib is None
    assert "less `gpu-memory-utilization` in `args`" in said(TOO_LITTLE_FREE, started=MANUAL).fix
    assert said(OOM, started=MANUAL).memory_mib is None
    nothing = (
        "INFO [x.py:1] Available KV cache memory: -1.0 GiB",
        "ValueError: No available memory for the cache blocks",
    )
    assert said(*nothing, started=MANUAL).fix.startswith("write a larger `kv-cache-memory-bytes` or")
    assert said(*nothing).memory_mib == 20000 + 1030 + 1


def test_before_bytes_were_told_the_context_that_fits_is() -> None:
    failure = said(
        "ValueError: The model's max seq len (163840) is larger than the maximum number of tokens that can be stored in "
        "KV cache (13360). Try increasing `gpu_memory_utilization` or decreasing `max_model_len` when initializing."
    )
    assert (failure.kind, failure.context_tokens) == (FailureKind.KV_CACHE_TOO_SMALL, 13360)
    assert failure.fix == "write more `memory`, or `context: 13360`"


def test_too_little_free_tells_what_would_fit_now() -> None:
    started = Started({"device": "cuda"}, 74000, 8000)
    failure = said(TOO_LITTLE_FREE, started=started)
    assert failure.kind is FailureKind.TOO_LITTLE_FREE
    assert failure.memory_mib == 74000 - 4199  # 4.09 GiB too much, each number rounded
    assert (
        failure.fix
        == "67.24GiB of the GPU were free and 71.33GiB asked for: free memory there, or write `memory: 69801MiB`"
    )
    assert failure.can_recover
    older = TOO_LITTLE_FREE.replace(" cuda:1", "")
    assert said(older, started=started).memory_mib == failure.memory_mib
    assert said(TOO_LITTLE_FREE, started=Started({}, 0, 1)).memory_mib is None


def test_nothing_left_for_the_kv_cache_tells_what_the_rest_wants() -> None:
    failure = said(
        "(EngineCore pid=2) INFO 11-25 09:17:56 [gpu_worker.py:760] Available KV cache memory: -3.21 GiB",
        "(EngineCore pid=2) ERROR 11-25 09:17:56 [core.py:1510] ValueError: No available memory for the cache blocks. Try",
    )
    assert failure.kind is FailureKind.NO_KV_CACHE
    assert failure.memory_mib == 20000 + 3293 + 1
    assert failure.fix.startswith("write more than `memory: 23294MiB`")
    old = said(
        "INFO 12-22 10:55:34 worker.py:241] model weights take 6.59GiB; the rest of the memory reserved for KV Cache is "
        "-7.83GiB.",
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
    )
    assert old.memory_mib == 20000 + 8024 + 1
    assert said("ValueError: No available memory for the cache blocks.").fix == "write more `memory`"


def test_out_of_memory_tells_the_least_that_would_do() -> None:
    failure = said(OOM)
    assert failure.kind is FailureKind.OUT_OF_MEMORY
    assert failure.memory_mib == 24966  # 1.96 + 22.42 GiB
    assert failure.fix.startswith("write `memory: 24966MiB` or more, or a smaller `max-num-seqs`")
    assert failure.can_recover
    enough = said(OOM, started=Started({}, 30000, 8000))
    assert enough.memory_mib is None
    assert enough.fix.startswith("free memory of the GPU")


@pytest.mark.parametrize(
    ("kind", "code", "line", "recovers", "fix"),
    [
        (FailureKind.NO_ACCESS, 1, "OSError: You are trying to access a gated repo.", False, "HF_TOKEN"),
        (FailureKind.NO_ACCESS, 1,
         "Access to model google/gemma-2-2b-it is restricted. You must have access to it and be authenticated to access it.",
         False, "(org/model)"),
        (FailureKind.NO_ACCESS, 1, "requests.exceptions.HTTPError: 403 Client Error: Forbidden for url: https://x", False, ""),
        (FailureKind.MODEL_NOT_FOUND, 1,
         "huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error. (Request ID: Root=1-69)", False, "private"),
        (FailureKind.MODEL_NOT_FOUND, 1,
         "OSError: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cache.",
         True, "network"),
        (FailureKind.MODEL_NOT_FOUND, 1,
         ("OSError: org/model is not a local folder and is not a valid model identifier listed on "
         "'https://huggingface.co/models'"), False, "`model: org/model`"),
        (FailureKind.NO_VLLM, 1, "/usr/bin/python3: No module named vllm", False, "`python:`"),
        (FailureKind.NO_VLLM, 1, "ModuleNotFoundError: No module named 'vllm'", False, "`python:`"),
        (FailureKind.PORT_TAKEN, 1, "zmq.error.ZMQError: Address already in use (addr='tcp://127.0.0.1:20000')", True, ""),
        (FailureKind.GPU_ERROR, 1, "RuntimeError: No CUDA GPUs are available", True, "nvidia-smi"),
        (FailureKind.GPU_ERROR, 1, "torch.AcceleratorError: CUDA error: an illegal memory access was encountered", True, ""),
        (FailureKind.GPU_ERROR, 1, "RuntimeError: NCCL error: unhandled system error", True, ""),
        (FailureKind.DISTURBED, 1,
         "AssertionError: Error in memory profiling. Initial free memory 20.1 GiB, current free memory 22.3 GiB.", True,
         "next try"),
        (FailureKind.UNKNOWN, 1, "KeyError: 'layers.0.mlp.weight'", True, ""),
        (FailureKind.WRONG_FLAG, 2,
         "api_server.py: error: argument --max-model-len: invalid human_readable_int_or_auto value: 'banana'", False,
         "correct `max-model-len` in `args`"),
        (FailureKind.WRONG_FLAG, 2,
         "api_server.py: error: argument --tensor-parallel-size/-tp: invalid int value: 'x'", False,
         "correct `tensor_parallel_size`"),
    ],
)  # fmt: skip
def test_a_line_tells_the_class(kind: FailureKind, code: int, line: str, recovers: bool, fix: str) -> None:
    failure = said("INFO 11-25 09:17:29 [core.py:1] chatter", line, code=code)
    assert (failure.kind, failure.can_recover) == (kind, recovers)
    assert failure.line.startswith(line.removeprefix("api_server.py: error: ")[:80])
    assert fix in failure.fix


def test_the_root_cause_stands_above_what_only_follows_from_it() -> None:
    failure = diagnose(
        1,
        [
            "(EngineCore pid=1) ERROR 11-25 09:17:29 [core.py:1510] KeyError: 'layers.0.mlp.weight'",
            (
                "(EngineCore pid=1) RuntimeError: Worker failed with error 'x', please check the stack trace above for the "
                "root cause. See stack trace"
            ),
            AFTER,
        ],
        ON_GPU,
    )
    assert failure.line == "KeyError: 'layers.0.mlp.weight'"
    assert failure.summary() == failure.line
    assert diagnose(1, [AFTER], ON_GPU).line == AFTER
    assert diagnose(1, ["some words", ""], ON_GPU).line == "some words"
    assert diagnose(None, [], ON_GPU) == Failure(FailureKind.UNKNOWN, can_recover=True)


def test_who_was_killed_is_told_by_the_signal_and_why_by_the_kernel() -> None:
    killed = diagnose(137, ["INFO loading"], ON_GPU)
    assert (killed.kind, killed.line) == (FailureKind.KILLED, "")
    assert killed.summary() == killed.fix, "the signal is told beside it"
    evidence = "Out of memory: Killed process 12 (VLLM::EngineCor) total-vm:9kB"
    found = diagnose(0, [OOM], ON_GPU, oom_kill=evidence)
    assert (found.kind, found.line, found.can_recover) == (FailureKind.OOM_KILLED, evidence, True)


def test_what_could_not_be_executed_is_not_there() -> None:
    failure = diagnose(127, ["sh: 1: exec: /opt/none/python: not found"], ON_GPU)
    assert (failure.kind, failure.line) == (FailureKind.NO_VLLM, "sh: 1: exec: /opt/none/python: not found")
    assert failure.fix == "name a Python that has vLLM (`python`)"
    command = diagnose(126, ["sh: 1: server: Permission denied"], Started({"runtime": "command"}, 0, 1))
    assert command.fix == "correct `command`"


def test_source_lines_of_a_traceback_tell_nothing() -> None:
    failure = said(
        "    raise RepositoryNotFoundError(", '  File "errors.py", line 1, in GatedRepoError', "KeyError: 'x'"
    )
    assert failure.line == "KeyError: 'x'"


def test_the_flags_of_a_command_are_in_the_command() -> None:
    command = Started({"runtime": "command", "command": ["server", "--x"]}, 0, 8000)
    assert (
        said("server: error: unrecognized arguments: --x", code=2, started=command).fix
        == "correct the flags in `command`"
    )


def test_a_line_without_end_is_cut() -> None:
    assert len(said("KeyError: " + "x" * 10000).line) == 400
