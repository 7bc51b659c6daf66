"""vLLM's log: its line format, and its start-up lines in its order and wording.

Lines are written with one ``write`` each, so those of several processes do not run into each other,
and a reader that has gone away is no reason to fail: engines outlive those who read their logs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

from sage_reconcile.simulator.flags import Options

VERSION = "0.32.0"
"""The version of vLLM that is simulated."""
_SHARDS = 4
_MIB_PER_GIB = 1024
_BLOCK_TOKENS = 16
_ACTIVATION_MIB = 256
_GRAPHS_MIB = 512
_BUFFER_MIB = 150
"""vLLM proposes to pin this much less than it has measured."""


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU as a rank finds it: what is free before it takes anything, of how much."""

    free_mib: int
    total_mib: int


class Log:
    """Writes for one process, under the name that vLLM gives it (``APIServer``, ``EngineCore``, ``Worker_TP0``)."""

    def __init__(self, name: str) -> None:
        self.prefix = f"({name} pid={os.getpid()}) "

    def info(self, place: str, *lines: str) -> None:
        """Lines as vLLM's own loggers write them; ``place`` is the source file and line."""
        self._levelled("INFO", place, lines)

    def error(self, place: str, *lines: str) -> None:
        """The same for errors."""
        self._levelled("ERROR", place, lines)

    def raised(self, error: str) -> None:
        """The end of a process by an exception that nobody caught."""
        write(2, f"{self.prefix}Traceback (most recent call last):\n{self.prefix}{error}\n")

    def progress(self, line: str) -> None:
        """A progress bar's line."""
        write(2, f"{self.prefix}{line}\n")

    def _levelled(self, level: str, place: str, lines: tuple[str, ...]) -> None:
        head = f"{self.prefix}{level} {time.strftime('%m-%d %H:%M:%S')} [{place}]"
        write(1, "".join(f"{head} {line}\n" for line in lines))


def uvicorn(line: str) -> None:
    """A line of the HTTP server's own log, which has no time and no process."""
    write(2, f"INFO:     {line}\n")


def write(descriptor: int, text: str) -> None:
    """Write all of it, or give up where nobody reads any more."""
    data = text.encode()
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError:
        return


def banner(lines: Log, options: Options) -> None:
    """The first lines of an API server."""
    lines.info(
        "api_utils.py:347",
        "",
        "       █     █     █▄   ▄█",
        f" ▄▄ ▄█ █     █     █ ▀▄▀ █  version {VERSION}",
        f"  █▄█▀ █     █     █     █  model   {options.model}",
        "   ▀▀  ▀▀▀▀▀ ▀▀▀▀▀ ▀     ▀",
        "",
    )
    lines.info("api_utils.py:286", f"non-default args: {dict(options.given)} (simulated: no model is loaded)")
    lines.info("model.py:733", "Resolved architecture: LlamaForCausalLM")
    lines.info("model.py:2152", f"Using max model len {options.max_model_len}")


def loading(lines: Log, options: Options, held_mib: int) -> Iterator[float]:
    """A rank's lines while it loads; yields the share of the load time to let pass next, 0.8 in all."""
    lines.info("gpu_model_runner.py:5040", f"Starting to load model {options.model}...")
    yield 0.1
    for shard in range(_SHARDS + 1):
        percent = 100 * shard // _SHARDS
        done = f"{shard}/{_SHARDS} [00:00<00:00, 4.00it/s]"
        lines.progress(f"Loading safetensors checkpoint shards: {percent:3d}% Completed | {done}")
        yield 0.1
    lines.info("default_loader.py:502", f"Loading weights took {options.load_s * 0.5:.2f} seconds")
    weights = weights_mib(options, held_mib) / _MIB_PER_GIB
    lines.info(
        "gpu_model_runner.py:5150",
        f"Model loading took {weights:.2f} GiB memory and {options.load_s * 0.6:.6f} seconds",
    )
    yield 0.1
    if not options.enforce_eager:
        lines.info("monitor.py:53", f"torch.compile took {options.load_s * 0.1:.2f} s in total")
        lines.info("gpu_model_runner.py:6369", "Profiling CUDA graph memory: PIECEWISE=35 (largest=512), FULL=35")
        lines.info("gpu_model_runner.py:6475", f"Estimated CUDA graph memory: {_GRAPHS_MIB / 1024:.2f} GiB total")
    yield 0.1
    cache = gib(kv_cache_mib(options, held_mib))
    if not held_mib:
        lines.info("cpu_worker.py:260", f"Explicitly set ({cache}/{cache}) GiB for KV cache on node 0.")
    elif options.kv_cache_memory_bytes:
        reserved = f"reserved {cache} GiB memory for KV Cache as specified by kv_cache_memory_bytes config"
        lines.info("gpu_worker.py:669", f"Initial free memory {gib(held_mib)} GiB, {reserved} and skipped profiling.")
    else:
        lines.info("gpu_worker.py:760", f"Available KV cache memory: {cache} GiB")


def capturing(lines: Log, options: Options, held_mib: int, device: Device | None = None) -> Iterator[float]:
    """An engine core's lines once its ranks are loaded; yields as :func:`loading` does, the rest."""
    tokens = kv_cache_tokens(options, held_mib)
    kind = "GPU" if held_mib else "CPU"
    each = f"Maximum concurrency for {options.max_model_len:,} tokens per request"
    lines.info(
        "kv_cache_utils.py:2327",
        f"{kind} KV cache size: {tokens:,} tokens, {each}: {tokens / options.max_model_len:.2f}x",
    )
    if options.enforce_eager:
        yield 0.2
    else:
        for percent in (0, 50, 100):
            bar = f"{percent * 35 // 100}/35 [00:00<00:00, 35.00it/s]"
            lines.progress(f"Capturing CUDA graphs (mixed prefill-decode, PIECEWISE): {percent:3d}%| {bar}")
            yield 0.2 / 3
        took = f"{options.load_s * 0.2:.0f} secs"
        graphs = f"{_GRAPHS_MIB / 1024:.2f} GiB"
        lines.info("gpu_model_runner.py:6582", f"Graph capturing finished in {took}, took {graphs}")
        difference = "difference: 0.0 GiB (0.0%)."
        lines.info(
            "gpu_worker.py:971", f"CUDA graph pool memory: {graphs} (actual), {graphs} (estimated), {difference}"
        )
    if device is not None and not options.kv_cache_memory_bytes:
        lines.info("gpu_worker.py:1034", _usage(options, held_mib, device))
    took = f"{options.load_s:.2f} s"
    lines.info("core.py:402", f"init engine (profile, create kv cache, warmup model) took {took}")


def _usage(options: Options, held_mib: int, device: Device) -> str:
    """What a worker says of its memory once it is ready, with the KV cache to pin next time."""
    graphs = 0 if options.enforce_eager else _GRAPHS_MIB
    pin_mib = kv_cache_mib(options, held_mib) - _BUFFER_MIB
    all_mib = pin_mib + device.free_mib - held_mib
    return (
        f"Free memory on device ({gib(device.free_mib)}/{gib(device.total_mib)} GiB) on startup. Desired GPU memory "
        f"utilization is ({options.gpu_memory_utilization}, {gib(held_mib)} GiB). Actual usage is "
        f"{gib(weights_mib(options, held_mib))} GiB for consumed memory (weights + non-torch), {gib(_ACTIVATION_MIB)} "
        f"GiB for peak activation, and {gib(graphs)} GiB for CUDAGraph memory. Replace gpu_memory_utilization config "
        f"with `--kv-cache-memory={pin_mib << 20}` ({gib(pin_mib)} GiB) to fit into requested memory, or "
        f"`--kv-cache-memory={all_mib << 20}` ({gib(all_mib)} GiB) to fully utilize gpu memory. Current kv cache "
        f"memory in use is {gib(kv_cache_mib(options, held_mib))} GiB."
    )


def gib(mib: float) -> str:
    """GiB as vLLM writes them."""
    return f"{round(mib / _MIB_PER_GIB, 2)}"


def weights_mib(options: Options, held_mib: int) -> int:
    """What the pretended weights take of a rank's memory."""
    return options.weights_mib or held_mib * 2 // 5


def kv_cache_mib(options: Options, held_mib: int) -> int:
    """What the pretended KV cache of a rank takes; without a GPU 1 GiB, or what vLLM's variable for the CPU says.

    Of weights that are given it is what they leave, which may be below nothing.
    """
    if options.kv_cache_memory_bytes:
        return options.kv_cache_memory_bytes >> 20
    if not held_mib:
        space = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "")
        return (int(space) if space.isdecimal() and int(space) else 1) * _MIB_PER_GIB
    if options.weights_mib:
        graphs = 0 if options.enforce_eager else _GRAPHS_MIB
        return held_mib - options.weights_mib - _ACTIVATION_MIB - graphs
    return held_mib // 2


def kv_cache_tokens(options: Options, held_mib: int) -> int:
    """The tokens that fit, at 8 to the MiB and in blocks of 16; at least one block."""
    return max(_BLOCK_TOKENS, kv_cache_mib(options, held_mib) * 8 // _BLOCK_TOKENS * _BLOCK_TOKENS)


def footprint_mib(options: Options, held_mib: int) -> int:
    """What a rank really takes: the share it is told, or, with weights and KV cache given, their sum."""
    if not (options.weights_mib and options.kv_cache_memory_bytes and held_mib):
        return held_mib
    graphs = 0 if options.enforce_eager else _GRAPHS_MIB
    return options.weights_mib + _ACTIVATION_MIB + graphs + kv_cache_mib(options, held_mib)


def kv_cache_fault(options: Options, held_mib: int) -> str:
    """Why the KV cache will not do, as vLLM says it; empty where it does, or where no weights are given."""
    if not options.weights_mib or not held_mib:
        return ""
    cache_mib = kv_cache_mib(options, held_mib)
    if cache_mib <= 0:
        return (
            "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
            "initializing the engine (this flag also controls CPU memory reservation on the CPU backend, despite its "
            "name). See https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."
        )
    need_mib = -(-options.max_model_len // _BLOCK_TOKENS) * _BLOCK_TOKENS // 8
    if need_mib <= cache_mib or "max_model_len" not in dict(options.given):
        return ""
    return (
        f"ValueError: To serve at least one request with the model's max seq len ({options.max_model_len}), "
        f"({gib(need_mib)} GiB KV cache is needed, which is larger than the available KV cache memory "
        f"({gib(cache_mib)} GiB). Based on the available memory, the estimated maximum model length is "
        f"{kv_cache_tokens(options, held_mib)}. Try increasing `gpu_memory_utilization` (which also controls CPU "
        "memory on the CPU backend) or decreasing `max_model_len` when initializing the engine. See "
        "https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."
    )
