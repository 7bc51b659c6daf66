"""What a start really took, read from the lines that vLLM (0.6 to 0.33) logs while it starts.

The wording is that of vLLM's own format strings: ``v1/worker/gpu_worker.py``, ``v1/worker/gpu_model_runner.py``,
``v1/worker/cpu_worker.py``, ``v1/core/kv_cache_utils.py`` (0.32), and ``worker/worker.py`` before 0.9. Sizes are
logged in GiB to two decimals, so a figure in MiB is good to about 5; bytes to pin are exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

_GIB = r"(-?\d+(?:\.\d+)?)"
_TOKENS = r"([\d,]+)"


@dataclass(frozen=True, slots=True)
class StartupFigures:
    """The figures of one start, each of the rank that it is worst for; None where the log does not tell.

    Of what is taken (weights, activation, graphs …) that is the largest rank, of what is left for the KV cache the
    smallest. MiB of one GPU, on CPU of host memory.
    """

    vllm_version: str | None = None
    weights_mib: int | None = None
    """The model as loaded: "Model loading took"."""
    activation_mib: int | None = None
    """The peak of a forward pass; from 0.21 on with what CUDA graphs are estimated to take."""
    non_torch_mib: int | None = None
    """What vLLM takes beside PyTorch inside its budget, where that is told apart from the weights."""
    consumed_mib: int | None = None
    """Weights and non-torch memory together."""
    cuda_graphs_mib: int | None = None
    """What capturing really took."""
    cuda_graphs_estimated_mib: int | None = None
    kv_available_mib: int | None = None
    """What was left for the KV cache; below zero where nothing was."""
    kv_tokens: int | None = None
    """What the KV cache holds."""
    context_tokens: int | None = None
    """The longest request, which ``max_concurrency`` is about."""
    max_concurrency: float | None = None
    """How many requests of that length fit at one time."""
    requested_mib: int | None = None
    """vLLM's budget: the CUDA total times the utilisation."""
    free_at_start_mib: int | None = None
    cuda_total_mib: int | None = None
    """All memory of the GPU as CUDA reports it."""
    pin_kv_cache_bytes: int | None = None
    """For ``--kv-cache-memory-bytes``: what fits into the budget, by vLLM's reckoning after the start."""
    cpu_kv_cache_mib: int | None = None
    """The KV cache of an engine on the CPU."""
    cpu_consumed_mib: int | None = None
    """What an engine on the CPU had taken of host memory before its KV cache, where vLLM sized that itself."""
    init_s: float | None = None
    """How long "init engine" took: profiling, KV cache, warm-up."""


def _mib(text: str) -> int:
    return round(float(text) * 1024)


def _whole(text: str) -> int:
    return int(text.replace(",", ""))


_Read = Callable[[str], int] | Callable[[str], float]

_FORMS: tuple[tuple[str, tuple[tuple[str, _Read], ...]], ...] = (
    # 0.8 and later; before that "Loading model weights took 8.5107 GB", in GiB all the same
    (rf"(?:Model loading|Loading model weights) took {_GIB} Gi?B", (("weights_mib", _mib),)),
    (rf"Available KV cache memory: {_GIB} GiB", (("kv_available_mib", _mib),)),
    (rf"[CGX]PU(?: \+ host)? KV cache size: {_TOKENS} tokens", (("kv_tokens", _whole),)),
    (
        rf"Maximum concurrency for {_TOKENS} tokens per request: {_GIB}x",
        (("context_tokens", _whole), ("max_concurrency", float)),
    ),
    (rf"Estimated CUDA graph memory: {_GIB} GiB total", (("cuda_graphs_estimated_mib", _mib),)),
    (rf"Graph capturing finished in [\d.]+ secs, took {_GIB} GiB", (("cuda_graphs_mib", _mib),)),
    (
        rf"CUDA graph pool memory: {_GIB} GiB \(actual\), {_GIB} GiB \(estimated\)",
        (("cuda_graphs_mib", _mib), ("cuda_graphs_estimated_mib", _mib)),
    ),
    (
        (
            rf"Free memory on device [^(]*\({_GIB}/{_GIB} GiB\) on startup\. "
            rf"Desired GPU memory utilization is \([\d.]+, {_GIB} GiB\)"
        ),
        (("free_at_start_mib", _mib), ("cuda_total_mib", _mib), ("requested_mib", _mib)),
    ),
    (rf"{_GIB} GiB for consumed memory", (("consumed_mib", _mib),)),
    (rf"{_GIB} GiB for peak activation", (("activation_mib", _mib),)),
    (rf"{_GIB} GiB for non-torch memory", (("non_torch_mib", _mib),)),
    (rf"{_GIB} GiB for CUDAGraph memory", (("cuda_graphs_mib", _mib),)),
    (r"`--kv-cache-memory(?:-bytes)?=(\d+)`(?: \([^)]*\))? to fit into requested", (("pin_kv_cache_bytes", int),)),
    # before 0.9
    (
        rf"total_gpu_memory \({_GIB}GiB\) x gpu_memory_utilization \([\d.]+\) = {_GIB}GiB",
        (("cuda_total_mib", _mib), ("requested_mib", _mib)),
    ),
    (rf"non_torch_memory takes {_GIB}GiB", (("non_torch_mib", _mib),)),
    (rf"PyTorch activation peak memory takes {_GIB}GiB", (("activation_mib", _mib),)),
    (rf"memory reserved for KV Cache is {_GIB}GiB", (("kv_available_mib", _mib),)),
    # on the CPU
    (rf"(?:Explicitly|Auto) set \({_GIB}/{_GIB}\) GiB for KV cache", (("cpu_kv_cache_mib", _mib),)),
    (rf"{_GIB} GiB memory was consumed by non-kv usages", (("cpu_consumed_mib", _mib),)),
    (r"init engine \(.*\) took (\d+(?:\.\d+)?) s", (("init_s", float),)),
)
_SMALLEST = {
    *("kv_available_mib", "kv_tokens", "max_concurrency", "pin_kv_cache_bytes"),
    *("free_at_start_mib", "cuda_total_mib", "cpu_kv_cache_mib"),
}
_VERSION = re.compile(r"vLLM API server version (\d\S*)|█\s+version (\d\S*)|V1 LLM engine \(v(\d[^)\s]*)\)")
_BLOCKS = re.compile(r"# (?:GPU|CUDA|cuda) blocks: (\d+)")
_TELLING = re.compile(r"GiB|GB |tokens|took|version|engine \(v|blocks")
"""What every line with a figure has, so that the other thousands cost little."""


@cache
def _readers() -> tuple[tuple[re.Pattern[str], tuple[tuple[str, _Read], ...]], ...]:
    """Compiled when first wanted: every command imports this room, and few read a log."""
    return tuple((re.compile(pattern), fields) for pattern, fields in _FORMS)


def startup_figures(lines: Iterable[str]) -> StartupFigures:
    """The figures that the lines of a log tell, each of the rank that it is worst for."""
    found: dict[str, int | float] = {}
    version: str | None = None
    blocks: int | None = None
    for line in lines:
        if not _TELLING.search(line):
            continue
        if version is None and (match := _VERSION.search(line)):
            version = next(group for group in match.groups() if group)
        if match := _BLOCKS.search(line):
            blocks = int(match[1])
        for pattern, fields in _readers():
            if match := pattern.search(line):
                for (name, read), text in zip(fields, match.groups(), strict=False):
                    _keep(found, name, read(text))
    if blocks is not None and "kv_tokens" not in found:
        _count_blocks(found, blocks)
    return StartupFigures(vllm_version=version, **found)  # type: ignore[arg-type]  # each reader knows its kind


def _keep(found: dict[str, int | float], name: str, value: float) -> None:
    worst = min if name in _SMALLEST else max
    found[name] = worst(found[name], value) if name in found else value


def _count_blocks(found: dict[str, int | float], blocks: int) -> None:
    """Before 0.9 blocks are told and not tokens; the size of a block follows from the concurrency."""
    tokens = found.get("max_concurrency", 0) * found.get("context_tokens", 0)
    if blocks and tokens:
        found["kv_tokens"] = blocks * max(1, round(tokens / blocks))
