"""What a start took, from lines that vLLM logs: real logs, and public reports in the words of several versions."""

# ruff: noqa: E501 - what vLLM logs stands as it does there

from __future__ import annotations

from pathlib import Path

import pytest

from sage_reconcile.core.startup_figures import StartupFigures, startup_figures

LOGS = Path(__file__).parent / "data"

# vLLM 0.27 or so, one of two ranks on H200s, and the other with a little less left: gpu_worker.py's message with
# `--kv-cache-memory-bytes`, "consumed memory (weights + non-torch)", CUDA graphs estimated and measured.
TWO_RANKS = """
(APIServer pid=1) INFO 08-22 04:16:11 [api_utils.py:339]  ▄▄ ▄█ █     █     █ ▀▄▀ █  version 0.27.1
(Worker_TP0 pid=400) INFO 08-22 04:17:09 [model_runner.py:411] Model loading took 81.02 GiB memory and 36.194514 seconds
(Worker_TP1 pid=401) INFO 08-22 04:17:09 [model_runner.py:411] Model loading took 81.31 GiB memory and 36.194514 seconds
(Worker_TP1 pid=401) INFO 08-22 04:19:20 [gpu_model_runner.py:6475] Estimated CUDA graph memory: 0.64 GiB total
(Worker_TP0 pid=400) INFO 08-22 04:19:27 [gpu_worker.py:563] Available KV cache memory: 8.31 GiB
(Worker_TP1 pid=401) INFO 08-22 04:19:27 [gpu_worker.py:563] Available KV cache memory: 8.28 GiB
(EngineCore pid=374) INFO 08-22 04:19:27 [kv_cache_utils.py:2235] GPU KV cache size: 1,629,520 tokens
(EngineCore pid=374) INFO 08-22 04:19:27 [kv_cache_utils.py:2240] Maximum concurrency for 32,768 tokens per request: 49.73x
(Worker_TP1 pid=401) INFO 08-22 04:19:58 [model_runner.py:1371] Graph capturing finished in 18 secs, took 0.19 GiB
(Worker_TP1 pid=401) INFO 08-22 04:19:58 [gpu_worker.py:844] CUDA graph pool memory: 0.19 GiB (actual), 0.64 GiB (estimated), difference: 0.45 GiB (244.2%).
(Worker_TP0 pid=400) INFO 08-22 04:19:58 [gpu_worker.py:907] Free memory on device (93.90/95.01 GiB) on startup. Desired GPU memory utilization is (0.975, 92.63 GiB). Actual usage is 82.60 GiB for consumed memory (weights + non-torch), 1.60 GiB for peak activation, and 0.19 GiB for CUDAGraph memory. Replace gpu_memory_utilization config with `--kv-cache-memory-bytes=8638253005` (8.05 GiB) to fit into requested memory, or `--kv-cache-memory-bytes=9920551680` (9.24 GiB) to fully utilize gpu memory. Current kv cache memory in use is 8.31 GiB.
(Worker_TP1 pid=401) INFO 08-22 04:19:58 [gpu_worker.py:907] Free memory on device (93.83/95.01 GiB) on startup. Desired GPU memory utilization is (0.975, 92.63 GiB). Actual usage is 82.69 GiB for consumed memory (weights + non-torch), 1.66 GiB for peak activation, and 0.19 GiB for CUDAGraph memory. Replace gpu_memory_utilization config with `--kv-cache-memory-bytes=8538253005` (7.95 GiB) to fit into requested memory, or `--kv-cache-memory-bytes=9820551680` (9.15 GiB) to fully utilize gpu memory. Current kv cache memory in use is 8.28 GiB.
(EngineCore pid=374) INFO 08-22 04:20:12 [core.py:349] init engine (profile, create kv cache, warmup model) took 212.68 s (compilation: 13.01 s)
"""
# vLLM 0.11, H200: weights and non-torch memory apart, bytes without GiB behind them
ELEVEN = """
(APIServer pid=1806101) INFO 10-23 15:12:02 [api_server.py:1839] vLLM API server version 0.11.0
(Worker_TP1 pid=1806414) INFO 10-23 15:14:56 [gpu_model_runner.py:3118] Graph capturing finished in 25 secs, took 2.37 GiB
(Worker_TP1 pid=1806414) INFO 10-23 15:14:56 [gpu_worker.py:391] Free memory on device (139.21/139.81 GiB) on startup. Desired GPU memory utilization is (0.9, 125.83 GiB). Actual usage is 74.28 GiB for weight, 5.58 GiB for peak activation, 1.38 GiB for non-torch memory, and 2.37 GiB for CUDAGraph memory. Replace gpu_memory_utilization config with `--kv-cache-memory=45175492096` to fit into requested memory, or `--kv-cache-memory=59540753920` to fully utilize gpu memory. Current kv cache memory in use is 47878721024 bytes.
"""
# vLLM 0.6 (worker/worker.py, executor/gpu_executor.py): no tokens are told, but blocks and the concurrency
SIX = """
INFO 12-22 10:55:34 model_runner.py:1097] Loading model weights took 8.5107 GB
INFO 12-22 10:55:34 worker.py:241] Memory profiling takes 0.69 seconds
INFO 12-22 10:55:34 worker.py:241] the current vLLM instance can use total_gpu_memory (79.25GiB) x gpu_memory_utilization (0.15) = 11.89GiB
INFO 12-22 10:55:34 worker.py:241] model weights take 8.51GiB; non_torch_memory takes 0.26GiB; PyTorch activation peak memory takes 0.94GiB; the rest of the memory reserved for KV Cache is 2.18GiB.
INFO 12-22 10:55:35 gpu_executor.py:76] # GPU blocks: 715, # CPU blocks: 1310
INFO 12-22 10:55:35 gpu_executor.py:80] Maximum concurrency for 2048 tokens per request: 5.59x
"""


def figures(text: str) -> StartupFigures:
    return startup_figures(text.split("\n"))


def test_of_several_ranks_each_figure_is_the_worst_ones() -> None:
    assert figures(TWO_RANKS) == StartupFigures(
        vllm_version="0.27.1",
        weights_mib=83261,  # 81.31 GiB
        activation_mib=1700,
        consumed_mib=84675,
        cuda_graphs_mib=195,
        cuda_graphs_estimated_mib=655,
        kv_available_mib=8479,  # 8.28 GiB
        kv_tokens=1629520,
        context_tokens=32768,
        max_concurrency=49.73,
        requested_mib=94853,
        free_at_start_mib=96082,
        cuda_total_mib=97290,
        pin_kv_cache_bytes=8538253005,
        init_s=212.68,
    )


def test_where_the_words_were_others_the_figures_are_the_same() -> None:
    told = figures(ELEVEN)
    assert (told.vllm_version, told.cuda_graphs_mib, told.activation_mib) == ("0.11.0", 2427, 5714)
    assert (told.non_torch_mib, told.consumed_mib) == (1413, None)
    assert told.pin_kv_cache_bytes == 45175492096
    assert told.cuda_total_mib == 143165


def test_before_tokens_were_told_they_follow_from_blocks_and_concurrency() -> None:
    told = figures(SIX)
    assert told.kv_tokens == 715 * 16
    assert (told.weights_mib, told.non_torch_mib, told.activation_mib) == (8715, 266, 963)
    assert (told.kv_available_mib, told.requested_mib, told.cuda_total_mib) == (2232, 12175, 81152)
    assert figures(SIX.replace("5.59x", "11.17x")).kv_tokens == 715 * 32
    assert figures("INFO 12-22 10:55:35 gpu_executor.py:76] # GPU blocks: 715, # CPU blocks: 1310").kv_tokens is None


def test_a_real_start_on_the_cpu_tells_its_kv_cache() -> None:
    told = startup_figures((LOGS / "vllm_startup.log").read_text(encoding="utf-8").splitlines())
    assert told == StartupFigures(
        vllm_version="0.32.0",
        kv_tokens=32768,
        context_tokens=256,
        max_concurrency=128.0,
        cpu_kv_cache_mib=20,  # 0.02 GiB: 16 MiB, rounded
        init_s=0.11,
    )


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("INFO [gpu_worker.py:1] Available KV cache memory: -3.21 GiB", "kv_available_mib", -3287),
        ("INFO [model_runner.py:1115] Model loading took 6.5935 GiB and 7.243515 seconds", "weights_mib", 6752),
        ("INFO [kv_cache_utils.py:1] GPU + host KV cache size: 1,024 tokens, Maximum", "kv_tokens", 1024),
        ("INFO [kv_cache_utils.py:1] XPU KV cache size: 96 tokens", "kv_tokens", 96),
        ("INFO [executor_base.py:113] # cuda blocks: 190100, # CPU blocks: 0", "kv_tokens", None),
        (
            ("INFO [cpu_worker.py:1] Auto set (4.5/8.09) GiB for KV cache on node 0, with 7.44 GiB requested memory for "
            "the worker. 2.94 GiB memory was consumed by non-kv usages."),
            "cpu_consumed_mib",
            3011,
        ),
        ("Free memory on device cuda:1 (21.83/22.06 GiB) on startup. Desired GPU memory utilization is (0.8, 17.65 GiB).",
         "cuda_total_mib", 22589),
        ("a prompt: Available KV cache memory: much GiB", "kv_available_mib", None),
    ],
)  # fmt: skip
def test_a_line_tells_a_figure(line: str, field: str, value: int | None) -> None:
    assert getattr(figures(line), field) == value


def test_a_log_that_tells_nothing_gives_nothing() -> None:
    assert figures("INFO:     Started server process [1]\nhello") == StartupFigures()
    assert startup_figures([]) == StartupFigures()


def test_the_data_of_a_message_that_was_cut_off_is_left_out() -> None:
    cut = ELEVEN[: ELEVEN.index(" for peak activation")]
    assert figures(cut).activation_mib is None
    assert figures(cut).cuda_total_mib == 143165
