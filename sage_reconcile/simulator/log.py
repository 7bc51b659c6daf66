"""vLLM's log: its line format, and its start-up lines in its order and wording.

Lines are written with one ``write`` each, so those of several processes do not run into each other,
and a reader that has gone away is no reason to fail: engines outlive those who read their logs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from sage_reconcile.simulator.flags import Options

VERSION = "0.32.0"
"""The version of vLLM that is simulated."""
_SHARDS = 4
_MIB_PER_GIB = 1024


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
    weights = weights_mib(held_mib) / _MIB_PER_GIB
    lines.info(
        "gpu_model_runner.py:5150",
        f"Model loading took {weights:.2f} GiB memory and {options.load_s * 0.6:.6f} seconds",
    )
    yield 0.1
    if not options.enforce_eager:
        lines.info("monitor.py:53", f"torch.compile took {options.load_s * 0.1:.2f} s in total")
        lines.info("gpu_model_runner.py:6369", "Profiling CUDA graph memory: PIECEWISE=35 (largest=512), FULL=35")
    yield 0.1
    available = kv_cache_mib(options, held_mib) / _MIB_PER_GIB
    lines.info("gpu_worker.py:760", f"Available KV cache memory: {available:.2f} GiB")


def capturing(lines: Log, options: Options, held_mib: int) -> Iterator[float]:
    """An engine core's lines once its ranks are loaded; yields as :func:`loading` does, the rest."""
    tokens = kv_cache_tokens(options, held_mib)
    device = "GPU" if held_mib else "CPU"
    each = f"Maximum concurrency for {options.max_model_len:,} tokens per request"
    lines.info(
        "kv_cache_utils.py:2327",
        f"{device} KV cache size: {tokens:,} tokens, {each}: {tokens / options.max_model_len:.2f}x",
    )
    if options.enforce_eager:
        yield 0.2
    else:
        for percent in (0, 50, 100):
            bar = f"{percent * 35 // 100}/35 [00:00<00:00, 35.00it/s]"
            lines.progress(f"Capturing CUDA graphs (mixed prefill-decode, PIECEWISE): {percent:3d}%| {bar}")
            yield 0.2 / 3
        took = f"{options.load_s * 0.2:.0f} secs"
        lines.info("gpu_model_runner.py:6582", f"Graph capturing finished in {took}, took 0.50 GiB")
    took = f"{options.load_s:.2f} s"
    lines.info("core.py:402", f"init engine (profile, create kv cache, warmup model) took {took}")


def weights_mib(held_mib: int) -> int:
    """What the pretended weights take of a rank's memory."""
    return held_mib * 2 // 5


def kv_cache_mib(options: Options, held_mib: int) -> int:
    """What the pretended KV cache of a rank takes; without a GPU 1 GiB, as vLLM's test set-up on CPU does."""
    if options.kv_cache_memory_bytes:
        return options.kv_cache_memory_bytes >> 20
    return held_mib // 2 if held_mib else _MIB_PER_GIB


def kv_cache_tokens(options: Options, held_mib: int) -> int:
    """The tokens that fit, at 8 to the MiB and in blocks of 16; at least one block."""
    return max(16, kv_cache_mib(options, held_mib) * 8 // 16 * 16)
