"""The command ``estimate``: how much of each GPU a model takes, before it is ever started."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import typer
from pydantic_core import PydanticCustomError

from sage_reconcile.cli import asking, rendering
from sage_reconcile.core.estimate import Question, estimate
from sage_reconcile.core.gpu_models import Declared
from sage_reconcile.core.plan_text import PART_NAMES
from sage_reconcile.core.units import printable, read_tokens, size_mib
from sage_reconcile.core.ways import Way
from sage_reconcile.core.workload import Workload
from sage_reconcile.errors import UnknownModel

DOES_NOT_FIT = 3
_DTYPES = ("auto", "bfloat16", "float16", "half", "float", "float32")
_WIDTH = 40
_MARKS = {"weights": "#", "kv_cache": "=", "margin": "-"}


def tokens(text: str) -> int:
    """``8192``, or ``32k`` (32 × 1024) tokens."""
    try:
        return read_tokens(text)
    except PydanticCustomError as error:
        raise _bad(error, "--context") from None


def _bad(error: PydanticCustomError, option: str) -> typer.BadParameter:
    told = error.context or {}
    return typer.BadParameter(f"{told['what']}; {told['fix']}", param_hint=option)


def known_dtype(dtype: str) -> str:
    """A type that vLLM's ``--dtype`` takes."""
    if dtype not in _DTYPES:
        raise typer.BadParameter(
            f"{dtype!r} is no type; write auto, bfloat16, float16 or float32", param_hint="--dtype"
        )
    return dtype


def question(
    model: str,
    work: Workload,
    kinds: Sequence[Declared],
    *,
    tensor_told: bool,
    longest: bool,
    kv_cache: str | None,
    device: str = "cuda",
) -> Question:
    """What is asked, put together; ``kinds`` are the GPUs that were given, none or of one kind."""
    if device not in ("cuda", "cpu"):
        raise typer.BadParameter(f"{device!r} is no device; write cuda or cpu", param_hint="--device")
    if kinds and device == "cpu":
        raise typer.BadParameter("`--device cpu` uses none; leave one of the two out", param_hint="--gpu")
    if longest and not kinds:
        raise typer.BadParameter("it asks what fits on a GPU; give one with --gpu", param_hint="--max")
    if len(kinds) > 1:
        raise typer.BadParameter(
            "one replica runs on GPUs of one model; name one, as in 8xH100-80GB", param_hint="--gpu"
        )
    kv_mib = 0
    if kv_cache is not None:
        try:
            kv_mib = size_mib(kv_cache)
        except PydanticCustomError as error:
            raise _bad(error, "--kv-cache") from None
    return Question(
        model, replace(work, kv_mib=kv_mib), kinds[0] if kinds else None, tensor_told, longest, device == "cpu"
    )


def estimate_model(asked: Question, *, as_json: bool, offline: bool = False) -> int:
    """``estimate``. Ends with 0 where it fits or no GPU was given, else with 3.

    Raises:
        UnknownModel: neither a folder, nor the cache, nor a hub, nor the name tells how large the model is.
    """
    facts = asking.facts_of(asked.model, offline=offline)
    document = estimate(asked, facts)
    if document is None:
        found = f" ({': '.join(filter(None, (facts.source, facts.problem)))})" if facts and facts.problem else ""
        raise UnknownModel(
            f"nothing here tells how large {printable(asked.model)} is{found}: give a folder with its config.json, "
            "download it into the Hugging Face cache (HF_HOME), or use a name that tells, such as org/Model-8B"
        )
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        _show(document)
    gpu = document["gpu"]
    return 0 if gpu is None or gpu["fits"] else DOES_NOT_FIT


def _show(document: Mapping[str, Any]) -> None:
    sizes = {name: document[f"{name}_parallel_size"] for name in ("tensor", "pipeline", "data")}
    used = [f"{name[0]}p {size}" for name, size in sizes.items() if size > 1]
    asked = "" if document["context"] is None else f", {document['concurrency']} x {document['context']:,} tokens"
    named = printable(document["model"])
    of = "each GPU" if document["device"] == "cuda" else "the host, all processes together"
    print(f"{', '.join([named + asked, *used])}: MiB of {of}\n")
    parts = {name: document["parts"][f"{name}_mib"] for name in PART_NAMES}
    shown = {name: mib for name, mib in parts.items() if mib}
    total = document["total_mib"]
    rows = [
        (PART_NAMES[name], f"{mib:>8}", rendering.gib(mib), document["part_confidence"][name], _bar(mib, total, name))
        for name, mib in shown.items()
    ]
    rendering.table(
        ("PART", "     MIB", "", "HOW SURE", ""), [*rows, ("total", f"{total:>8}", rendering.gib(total), "", "")]
    )
    print()
    if document["kv_tokens"] is not None:
        print(f"The KV cache holds {document['kv_tokens']:,} tokens.")
    if document["kv_space_gib"] is not None:
        print(f"vLLM would be told so much of each rank: VLLM_CPU_KVCACHE_SPACE={document['kv_space_gib']}")
    if document["context_assumed"]:
        print("Its config.json tells no longest context: that is vLLM's default. Say it with --context.")
    if document["gpu"]:
        _show_gpu(document, document["gpu"])
    _show_smallest(document["smallest"])
    if not document["source"]:
        print("A guess from the name: nothing of the model is here. A folder with its config.json would do.")
    if document["note"]:
        rendering.note(document["note"] + ("; worked out from what else is known" if document["source"] else ""))


def _show_smallest(smallest: Sequence[Mapping[str, Any]]) -> None:
    """The GPUs on which it fits, one line for each number of them."""
    for number, count in enumerate(dict.fromkeys(item["count"] for item in smallest)):
        names = ", ".join(item["gpu"] for item in smallest if item["count"] == count)
        print(f"{'It fits on' if number == 0 else '        or'} {count} x {names}")


def _bar(mib: int, total: int, name: str) -> str:
    return _MARKS.get(name, "+") * max(1, round(_WIDTH * mib / max(1, total)))


def _show_gpu(document: Mapping[str, Any], gpu: Mapping[str, Any]) -> None:
    where = f"{gpu['count']} x {gpu['name']}" if gpu["count"] > 1 else gpu["name"]
    usable, total = rendering.gib(gpu["usable_mib"]), rendering.gib(document["total_mib"])
    if gpu["longest_context"] is not None:
        each = f" of {document['concurrency']} requests at one time" if document["concurrency"] > 1 else ""
        print(f"The longest context{each} on {where}: {gpu['longest_context']:,} tokens.")
    verdict = "It fits" if gpu["fits"] else "It does not fit"
    print(f"{verdict} on {where}: {total} of {usable} that can be used of each.")
    if gpu["kv_tokens"]:
        many = f"{gpu['concurrency']:.1f} requests of {document['context']:,}"
        print(f"With a whole GPU for itself its KV cache holds {gpu['kv_tokens']:,} tokens: {many}.")
    smallest = gpu["smallest_tensor_parallel_size"]
    if gpu["fits"] and smallest not in (None, document["tensor_parallel_size"]):
        print(f"The smallest tensor parallel size that holds it there: {smallest}.")
    if not gpu["fits"]:
        ways = [Way(**way) for way in gpu["ways"]]
        for way in ways:
            print(f"  With {_option(way)}: {rendering.gib(way.total_mib)}.")
        if not ways:
            print("No shorter context, smaller cache, tensor parallel size or quantisation alone makes it fit there.")


def _option(way: Way) -> str:
    """The change in the words of this command."""
    if way.field == "weights":
        return f"a checkpoint quantised to {way.value}"
    return f"--{way.field.replace('_', '-')} {way.value}"
