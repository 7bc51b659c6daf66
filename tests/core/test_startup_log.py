"""The stage of a start, from lines that vLLM really logged."""

from __future__ import annotations

from pathlib import Path

import pytest

from sage_reconcile.core.startup_log import stage

LOGS = Path(__file__).parent / "data"


def stages(name: str) -> list[str]:
    """What a person who follows a start is shown, each stage once."""
    lines = (LOGS / name).read_text(encoding="utf-8").splitlines()
    shown = [stage(lines[: count + 1]) for count in range(len(lines))]
    return [now for before, now in zip(["", *shown], shown, strict=False) if now != before]


def test_a_real_start_goes_through_its_stages_in_order() -> None:
    assert stages("vllm_startup.log") == [
        "starting vLLM",
        "reading the model",
        "starting the engine",
        "loading weights",
        "sizing the KV cache",
        "engine ready",
        "starting the server",
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Loading safetensors checkpoint shards:  75% Completed | 3/4 [00:03<00:01]", "loading weights 75%"),
        ("Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  51%|#####  | 26/51", "capturing graphs 51%"),
        ("INFO 11-23 [gpu_model_runner.py:1] Model loading took 14.99 GiB and 3.2 seconds", "weights loaded"),
        ("INFO [backends.py:1] torch.compile takes 12.3 s in total", "compiling"),
        ("INFO [kv_cache_utils.py:1] GPU KV cache size: 126,256 tokens", "sizing the KV cache"),
        ("nothing of interest", ""),
    ],
)
def test_a_line_tells_the_stage(line: str, expected: str) -> None:
    assert stage([line]) == expected


def test_the_last_telling_line_counts() -> None:
    assert stage(["Starting to load model x", "chatter", "more chatter"]) == "loading weights"
    assert stage([]) == ""
