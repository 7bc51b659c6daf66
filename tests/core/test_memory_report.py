"""What status tells of memory: promised and held, estimated beside measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sage_reconcile.core.measured import Measured, subject
from sage_reconcile.core.memory_report import memory_document, outgrown
from sage_reconcile.core.model_config import read_model_config
from sage_reconcile.core.observed import Gpu, Launch, Life, ModelFacts, Observed
from sage_reconcile.core.startup_figures import StartupFigures
from tests.models import LLAMA_8B
from tests.reading import desired

GIB = 1024
CARD = Gpu("GPU-0", 0, "H100", "0000:00:00.0", 80 * GIB)
ENGINE = desired("version: 1\nengines: {chat: {model: ./m, memory: 30GiB}}\n").engines[0]
FACTS = ModelFacts("./m", read_model_config(LLAMA_8B | {"max_position_embeddings": 8192}))
SEEN = Measured(
    subject(ENGINE.record, "H100"),
    promised_mib=30 * GIB,
    held_mib=29 * GIB,
    beside_kv_mib=17 * GIB,
    figures=StartupFigures(weights_mib=15360),
    starts=1,
)


def launch(**fields: Any) -> Launch:
    known: dict[str, Any] = {
        "id": "a",
        "engine_name": "chat",
        "index": 0,
        "spec": ENGINE.record,
        "secret_marks": {},
        "gpus": ("GPU-0",),
        "memory_mib": 30 * GIB,
        "port": 8000,
        "bind": "127.0.0.1",
        "life": Life.ALIVE,
        "created_at": 0.0,
        "held_mib": 29 * GIB,
        "kv_tokens": 98304,
    }
    return Launch(**known | fields)


def test_estimated_and_measured_tell_the_same_of_one_promise() -> None:
    observed = Observed((CARD,), models={"./m": FACTS}, measured={SEEN.key: SEEN})
    told = memory_document(ENGINE, launch(), observed)
    assert (told["promised_mib"], told["held_mib"]) == (30 * GIB, 29 * GIB)
    assert told["measured"] == {"weights_mib": 15360, "beside_kv_mib": 17 * GIB, "kv_tokens": 98304}
    assert told["estimated"] == {"weights_mib": 15319, "beside_kv_mib": 20418, "kv_tokens": (30 * GIB - 20418) * 8}


def test_what_is_not_known_is_null() -> None:
    assert memory_document(ENGINE, launch(), Observed((CARD,)))["estimated"] is None
    assert memory_document(ENGINE, launch(), Observed((CARD,)))["measured"] is None
    failed = replace(SEEN, starts=0, needed_mib=GIB)
    told = memory_document(ENGINE, launch(), Observed((CARD,), measured={failed.key: failed}))
    assert told["measured"] is None, "none has got ready yet"
    gone = memory_document(None, launch(), Observed((), models={"./m": FACTS}, measured={SEEN.key: SEEN}))
    assert (gone["estimated"], gone["measured"], gone["promised_mib"]) == (None, None, 30 * GIB)


def test_who_holds_more_than_promised_is_told() -> None:
    assert outgrown(launch(held_mib=31 * GIB)) == (
        "chat/0: holds 31.0GiB of a GPU and was promised 30.0GiB; what it holds counts, and its next start is planned "
        "by what was measured"
    )
    assert outgrown(launch(held_mib=30 * GIB + 64)) == "", "within what the driver rounds"
    assert outgrown(launch(held_mib=None)) == ""
    assert outgrown(launch(gpus=())) == ""
