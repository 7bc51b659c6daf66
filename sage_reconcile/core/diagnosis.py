"""From the exit status and the end of a log to why a start failed.

vLLM's root cause stands above "Engine core initialization failed. See root cause above."; of several ranks the one
that lacks most counts. The wording is that of vLLM 0.32 (``v1/worker/utils.py``, ``v1/worker/cpu_worker.py``,
``v1/core/kv_cache_utils.py``), of ``huggingface_hub`` and PyTorch, with the older forms beside it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence

from sage_reconcile.core.failure import LASTING, Failure, FailureKind, Started

_PREFIX = re.compile(
    r"^(?:\([^)]*pid=\d+\)\s+)?(?:\[rank\d+\]:\s*)?"
    r"(?:(?:ERROR|INFO|WARNING|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d \[?[^\]]*\] ?)?"
)
_SOURCE = ("raise ", "File ")
"""Lines of a traceback that show source."""
_LINE_LIMIT = 400
_ROUNDED_GIB = 0.005
"""vLLM rounds to two decimals: the truth may be this much further off."""
_FLAG = re.compile(r"--([a-zA-Z0-9][\w.-]*)")
_FIELDS = {"tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size", "served-model-name", "model"}
"""Flags that have a field of their own."""

_Tell = Callable[[re.Match[str], Started, Sequence[str]], Failure]


def diagnose(code: int | None, lines: Sequence[str], started: Started, *, oom_kill: str = "") -> Failure:
    """Why a launch failed.

    ``code`` is as shells give it (128 + signal; None is unknown), ``lines`` the end of the log, at best all of it.
    ``oom_kill`` is what shows that the kernel killed one of its processes for want of memory.
    """
    plain = [_PREFIX.sub("", line, count=1).rstrip() for line in lines]
    failure = _oom_killed(oom_kill) or _by_rule(plain, started) or _refused_value(plain, started)
    failure = failure or _by_exit(code, _last_error(plain), started)
    line = " ".join(failure.line.split())
    return dataclasses.replace(
        failure,
        line=line if len(line) <= _LINE_LIMIT else f"{line[: _LINE_LIMIT - 1]}…",
        can_recover=failure.can_recover or failure.kind not in LASTING,
    )


def _oom_killed(evidence: str) -> Failure | None:
    fix = "free host memory, or start fewer engines or smaller ones at one time"
    return Failure(FailureKind.OOM_KILLED, evidence, fix) if evidence else None


def _by_rule(lines: Sequence[str], started: Started) -> Failure | None:
    for pattern, tell in _RULES:
        if found := [tell(match, started, lines) for match in _matches(pattern, lines)]:
            return max(found, key=lambda failure: failure.memory_mib or failure.kv_cache_mib or 0)
    return None


def _by_exit(code: int | None, line: str, started: Started) -> Failure:
    if code in (126, 127):
        fix = "correct `command`" if started.where_flags_are == "command" else "name a Python that has vLLM (`python`)"
        return Failure(FailureKind.NO_VLLM, line, fix)
    if code == 137:
        fix = "somebody ended it, or the kernel did for want of host memory (see the kernel's log)"
        return Failure(FailureKind.KILLED, fix=fix)
    return Failure(FailureKind.UNKNOWN, line)


def _matches(pattern: str, lines: Sequence[str]) -> Iterator[re.Match[str]]:
    compiled = re.compile(pattern)
    return (match for line in lines if (match := compiled.search(line)) and not line.lstrip().startswith(_SOURCE))


def _up_mib(gib: float) -> int:
    """GiB as vLLM rounds them, in MiB rounded up, so that it certainly does."""
    return math.ceil((gib + _ROUNDED_GIB) * 1024)


def _in_mib(amount: str, unit: str) -> float:
    return float(amount) * {"GiB": 1024.0, "MiB": 1.0, "KiB": 1 / 1024}.get(unit, 0.0)


def _wrong_flag(match: re.Match[str], started: Started, lines: Sequence[str]) -> Failure:
    """What argparse refuses. Its usage, in the log above, has all flags that there are."""
    unknown = "unrecognized arguments" in match[1]
    if started.where_flags_are == "command":
        return Failure(FailureKind.WRONG_FLAG, match[1], "correct the flags in `command`")
    names = _FLAG.findall(match[1].partition(": ")[2] if unknown else match[1])[: 5 if unknown else 1]
    fixes = [_unknown_flag(name, lines) if unknown else f"correct {_where(name)}" for name in names]
    return Failure(FailureKind.WRONG_FLAG, match[1], "; ".join(fixes) or "correct `args`")


def _unknown_flag(name: str, lines: Sequence[str]) -> str:
    import difflib  # noqa: PLC0415 - 5 ms, and wanted only here

    usage = dict.fromkeys(flag for line in lines if line.startswith(("usage:", " ")) for flag in _FLAG.findall(line))
    close = difflib.get_close_matches(name, usage, n=1, cutoff=0.7)
    return f"this vLLM has no flag `{name}` (in `args`)" + (f"; did you mean `{close[0]}`?" if close else "")


def _where(flag: str) -> str:
    name = flag.replace("_", "-")
    return f"`{name.replace('-', '_')}`" if name in _FIELDS else f"`{name}` in `args`"


def _refused_value(lines: Sequence[str], started: Started) -> Failure | None:
    """A setting that vLLM's configuration refuses: pydantic's error, and below it what it is about."""
    for number, line in enumerate(lines):
        if not re.search(r"validation errors? for \w+", line):
            continue
        below = next((text for text in lines[number + 1 : number + 6] if text.startswith("  ")), "")
        told = below.strip().removeprefix("Value error, ").partition(" [type=")[0]
        if match := re.search(r"derived max_model_len \(max_position_embeddings=(\d+)", told):
            most = int(match[1])
            return Failure(
                FailureKind.WRONG_FLAG, told, f"write {_context(started, most)} or less", context_tokens=most
            )
        where = re.search(r"(tensor|pipeline|data)[ _]parallel[ _]size", told)
        field_name = f"`{where[1]}_parallel_size`" if where else f"the entry: `{started.where_flags_are}`"
        return Failure(FailureKind.WRONG_FLAG, told or line, f"correct {field_name}")
    return None


def _too_little_free(match: re.Match[str], started: Started, _lines: Sequence[str]) -> Failure:
    free, desired = float(match["free"]), float(match["desired"])
    if started.on_cpu or match[0].startswith("Available"):
        size = "`kv-cache-memory-bytes` in `args`" if started.manual else "`kv_cache`"
        fix = f"write the size of the KV cache ({size}), or end what else uses host memory"
        return Failure(FailureKind.TOO_LITTLE_FREE, match[0], fix)
    fits = 0 if started.manual else started.memory_mib - _up_mib(desired - free + _ROUNDED_GIB)
    told = f"{free:g}GiB of the GPU were free and {desired:g}GiB asked for"
    less = "less `gpu-memory-utilization` in `args`" if started.manual else f"`memory: {fits}MiB`"
    fix = f"{told}: free memory there" + (f", or write {less}" if fits > 0 or started.manual else "")
    return Failure(FailureKind.TOO_LITTLE_FREE, match[0], fix, memory_mib=fits if fits > 0 else None)


def _kv_cache_too_small(match: re.Match[str], started: Started, _lines: Sequence[str]) -> Failure:
    need, available = float(match["need"]), float(match["available"])
    estimate = re.search(r"estimated maximum model length is (\d+)", match.string)
    context = int(estimate[1]) if estimate else None
    kv_mib = _up_mib(need)
    # both numbers are rounded, and the share that vLLM is told is rounded down: 1 MiB for that
    more = started.memory_mib + _up_mib(need - available + _ROUNDED_GIB) + 1
    promised = None if started.manual or started.sized or not started.memory_mib else more
    fix = f"write {_more_kv(started, kv_mib, promised)}, or "
    fix += _context(started, context) if context else "a shorter context"
    return Failure(FailureKind.KV_CACHE_TOO_SMALL, match[0], fix, promised, kv_mib, context)


def _more_kv(started: Started, kv_mib: int, memory_mib: int | None) -> str:
    if memory_mib is not None:
        return f"`memory: {memory_mib}MiB`"
    return f"`kv-cache-memory-bytes: {kv_mib}M` in `args`" if started.manual else f"`kv_cache: {kv_mib}MiB`"


def _context(started: Started, tokens: int) -> str:
    in_args = "max-model-len" in started.args
    return f"`max-model-len: {tokens}` in `args`" if in_args else f"`context: {tokens}`"


def _no_kv_cache(match: re.Match[str], started: Started, lines: Sequence[str]) -> Failure:
    """The weights and the rest leave nothing; how far below nothing, the line before it tells."""
    told = [
        float(found[1]) for line in lines if (found := re.search(r"KV [Cc]ache(?: memory: | is )(-[\d.]+) ?GiB", line))
    ]
    least = None
    if told and started.memory_mib and not started.manual:
        least = started.memory_mib + _up_mib(-min(told)) + 1
    if least is not None:
        fix = f"write more than `memory: {least}MiB`: with that the model fits, and the KV cache comes on top"
    elif started.manual:
        fix = "write a larger `kv-cache-memory-bytes` or `gpu-memory-utilization` in `args`"
    else:
        fix = "write a larger `kv_cache`" if started.on_cpu or started.sized else "write more `memory`"
    return Failure(FailureKind.NO_KV_CACHE, match[0], fix, least)


def _short_kv_cache(match: re.Match[str], started: Started, _lines: Sequence[str]) -> Failure:
    """Before 0.9: tokens are told, and no bytes."""
    fits = int(match["fits"])
    fix = f"write more `memory`, or {_context(started, fits)}"
    return Failure(FailureKind.KV_CACHE_TOO_SMALL, match[0], fix, context_tokens=fits)


def _cpu_kv_cache(match: re.Match[str], started: Started, _lines: Sequence[str]) -> Failure:
    fits = math.floor((float(match["free"]) - _ROUNDED_GIB) * 1024)
    fix = f"write {_more_kv(started, fits, None)} or less, or end what else uses host memory"
    return Failure(FailureKind.TOO_LITTLE_FREE, match[0], fix, kv_cache_mib=fits)


def _out_of_memory(match: re.Match[str], started: Started, _lines: Sequence[str]) -> Failure:
    """What PyTorch had when it asked for more is the least that would do, where that is more than was promised."""
    told = re.search(r"Tried to allocate ([\d.]+) (\w+)\b.*this process has ([\d.]+) (\w+) memory in use", match.string)
    least = math.ceil(_in_mib(told[1], told[2]) + _in_mib(told[3], told[4])) if told else None
    smaller = "a smaller `max-num-seqs` or `max-num-batched-tokens`, or `enforce-eager: true`, in `args`"
    if least is not None and started.memory_mib and least > started.memory_mib and not started.manual:
        return Failure(FailureKind.OUT_OF_MEMORY, match[0], f"write `memory: {least}MiB` or more, or {smaller}", least)
    return Failure(FailureKind.OUT_OF_MEMORY, match[0], f"free memory of the GPU, or write {smaller}")


def _fixed(kind: FailureKind, fix: str, *, can_recover: bool = False) -> Callable[..., Failure]:
    """The same words for every one; ``{model}`` and ``{port}`` are filled in."""

    def tell(match: re.Match[str], started: Started, _lines: Sequence[str]) -> Failure:
        text = fix.replace("{model}", str(started.spec.get("model"))).replace("{port}", str(started.port))
        return Failure(kind, match.string, text, can_recover=can_recover)

    return tell


_N = r"(-?\d+(?:\.\d+)?)"
_NOT_FOUND = "`model: {model}` is neither a folder here nor a name that the hub (or its cache here) has: correct it"
_NO_REPOSITORY = (
    "the hub has no model `{model}`, or it is private: correct `model`, or give a token with access in "
    "`env: {HF_TOKEN: ${HF_TOKEN}}`"
)
_ASK = "ask for access on the model's page ({model}), and give its token in `env: {HF_TOKEN: ${HF_TOKEN}}`"
_UNREACHED = "the hub could not be reached for `model: {model}`: see to the network, or name a folder"
_PORT_FIX = "port {port}, or one between its processes, is taken: end who has it, or change `port`"
_GPU_FIX = "see `nvidia-smi` and the kernel's log (dmesg) for what is wrong with the GPU or its driver"
_DISTURBED_FIX = "another program gave memory of the GPU back meanwhile; the next try may do"
_RULES: tuple[tuple[str, _Tell], ...] = (
    (r"^\S+: error: (.+)$", _wrong_flag),
    (
        (rf"(?:Free memory on device|Available memory on node).*?\((?P<free>{_N})/{_N} GiB\) on startup is less than "
        rf"(?:desired|the engine's budget).*?(?: memory utilization| weights) \([\d.]+, (?P<desired>{_N}) GiB\)"),
        _too_little_free,
    ),
    (
        (rf"To serve at least one request with the models?'s max seq len \(\d+\), \(?(?P<need>{_N}) GiB KV cache is "
        rf"needed, which is larger than the available KV cache memory \((?P<available>{_N}) GiB\)"),
        _kv_cache_too_small,
    ),
    (
        (r"max seq len \(\d+\) is larger than the maximum number of tokens that can be stored in KV cache "
        r"\((?P<fits>\d+)\)"),
        _short_kv_cache,
    ),
    (
        rf"Available memory on node .*?\((?P<free>{_N})/{_N} GiB\) on kv cache allocation is less than[^(]*\([^)]*\)",
        _cpu_kv_cache,
    ),
    (r"No available memory for the cache blocks", _no_kv_cache),
    (r"(?:CUDA|HIP) out of memory.*?(?:\. |$)", _out_of_memory),
    (
        r"Error in memory profiling",
        _fixed(FailureKind.DISTURBED, _DISTURBED_FIX),
    ),
    (
        r"[Ee]rrno 98\b|[Aa]ddress already in use|EADDRINUSE",
        _fixed(FailureKind.PORT_TAKEN, _PORT_FIX),
    ),
    (
        (r"gated repo|GatedRepoError|Access to model .* is restricted|Invalid user token"
        r"|Invalid (?:username or password|credentials)"),
        _fixed(FailureKind.NO_ACCESS, _ASK),
    ),
    (  # of a repository that is private the hub says the same, and 401 in both cases
        r"RepositoryNotFoundError|Repository Not Found",
        _fixed(FailureKind.MODEL_NOT_FOUND, _NO_REPOSITORY),
    ),
    (r"\b40[13] Client Error", _fixed(FailureKind.NO_ACCESS, _ASK)),
    (
        (r"couldn't connect to 'https://huggingface\.co'|Max retries exceeded with url"
        r"|Temporary failure in name resolution"),
        _fixed(FailureKind.MODEL_NOT_FOUND, _UNREACHED, can_recover=True),
    ),
    (
        (r"HFValidationError|LocalEntryNotFoundError|OfflineModeIsEnabled"
        r"|is not a local folder and is not a valid model identifier|Invalid repository ID or local directory"
        r"|Can't load the (?:configuration|model)|does not appear to have|Cannot find any model weights"
        r"|RevisionNotFoundError|Incorrect path_or_model_id"),
        _fixed(FailureKind.MODEL_NOT_FOUND, _NOT_FOUND),
    ),
    (
        r"No module named '?vllm",
        _fixed(FailureKind.NO_VLLM, "install vLLM, or name a Python that has it under `python:`"),
    ),
    (
        (r"CUDA error|CUDA driver|no CUDA-capable device|No CUDA GPUs are available|NCCL error|ncclUnhandledCudaError"
        r"|Found no NVIDIA driver|Failed to infer device type|CUDA unknown error|cudaErrorE?\w+"),
        _fixed(FailureKind.GPU_ERROR, _GPU_FIX),
    ),
)  # fmt: skip
_ERROR = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt|Exit)\b.*")
_FOLLOWS = re.compile(r"Engine core initialization failed|See stack trace|see the stack trace|Failed core proc")
"""What only says that something failed further up."""


def _last_error(lines: Sequence[str]) -> str:
    """The last exception that is not the consequence of another, else the last line that is not empty."""
    errors = [line for line in lines if _ERROR.match(line)]
    causes = [line for line in errors if not _FOLLOWS.search(line)]
    return next(reversed(causes or errors or [line for line in lines if line.strip()]), "")
