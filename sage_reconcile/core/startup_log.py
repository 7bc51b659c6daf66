"""How far a start has come, read from the lines that vLLM logs (0.6 to 0.33) while it starts."""

from __future__ import annotations

import re
from collections.abc import Sequence

_STAGES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), stage)
    for pattern, stage in (
        (r"Initializing a V1 LLM engine", "starting the engine"),  # first: it tells all settings, compile's too
        (r"Application startup complete", "starting the server"),
        (r"Starting vLLM (API )?server", "starting the server"),
        (r"init engine .*took", "engine ready"),
        (r"Graph capturing finished", "graphs captured"),
        (r"Capturing (?:CUDA|cudagraph).*?(?P<percent>\d+)%", "capturing graphs"),
        (r"[CG]PU KV cache size|Available KV cache memory", "sizing the KV cache"),
        (r"Profiling CUDA graph memory", "profiling memory"),
        (r"torch\.compile (takes|took)|Dynamo bytecode transform|Compiling a graph", "compiling"),
        (r"Model loading took|Loading weights took", "weights loaded"),
        (r"Loading safetensors checkpoint shards:\s*(?P<percent>\d+)%", "loading weights"),
        (r"Starting to load model", "loading weights"),
        (r"Resolved architecture", "reading the model"),
        (r"vLLM (API server )?version|█\s+version \d", "starting vLLM"),
    )
)


def stage(lines: Sequence[str]) -> str:
    """The stage that the last telling line names, with its percentage where it has one; empty if none does."""
    for line in reversed(lines):
        for pattern, name in _STAGES:
            match = pattern.search(line)
            if match:
                percent = match.groupdict().get("percent")
                return f"{name} {percent}%" if percent else name
    return ""
