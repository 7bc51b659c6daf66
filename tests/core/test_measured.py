"""Under which name a measured start is looked up again, and when it is not the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sage_reconcile.core.measured import (
    Measured,
    beside_kv_mib,
    counting_marks,
    cuda_totals,
    find,
    newest,
    subject,
)
from sage_reconcile.core.resolve import secret_marks
from sage_reconcile.core.spec import Engine
from sage_reconcile.core.startup_figures import StartupFigures
from tests.reading import desired

CHAT = "version: 1\nhost: {gpus: none}\nengines:\n  chat:\n    model: org/chat\n"


def engine(more: str = "", **environ: str) -> Engine:
    [entry] = desired(CHAT + "".join(f"    {line}\n" for line in more.splitlines()), environ).engines
    return entry


def known(entry: Engine, gpu: str = "H100", salt: str = "s", **values: object) -> Measured:
    marks = counting_marks(secret_marks(entry.secrets, salt))
    return Measured(subject(entry.record, gpu), "0.32.0", at=1.0, salt=salt, marks=marks, **values)  # type: ignore[arg-type]


def look_up(entry: Engine, *items: Measured, gpu: str = "H100", version: str | None = None) -> Measured | None:
    by_key = {item.key: item for item in items}
    return find(by_key, entry.record, gpu, lambda salt: secret_marks(entry.secrets, salt), version)


@pytest.mark.parametrize(
    "more",
    [
        "port: 9000",
        "replicas: 3",
        "priority: 5",
        "memory: 30GiB",
        "kv_cache: 4GiB",
        "concurrency: 4",
        "served_model_name: other",
        "startup_timeout: 1h",
        "args: {seed: 3, uvicorn-log-level: debug, disable-log-requests: true}",
        "args: {simulate-load-seconds: 2, simulate-token-ms: 5}",
        "env: {HF_TOKEN: abc, VLLM_API_KEY: def}",
    ],
)
def test_what_memory_does_not_depend_on_does_not_matter(more: str) -> None:
    item = known(engine())
    assert look_up(engine(more), item) is item


@pytest.mark.parametrize(
    "more",
    [
        "tensor_parallel_size: 2",
        "pipeline_parallel_size: 2",
        "data_parallel_size: 2",
        "runtime: simulator",
        "device: cpu",
        "context: 4096",
        "args: {max-num-seqs: 8}",
        "args: {never-heard-of: 1}",
        "args: {simulate-weights-mib: 100}",
        "args: {enforce-eager: true}",
        "env: {VLLM_ATTENTION_BACKEND: FLASHINFER}",
    ],
)
def test_what_memory_depends_on_makes_another(more: str) -> None:
    item = known(engine())
    assert look_up(engine(more), item) is None
    assert look_up(engine(more), item, known(engine(more))) is not None


def test_another_gpu_is_another() -> None:
    item = known(engine())
    assert look_up(engine(), item, gpu="H200") is None


def test_another_model_is_another() -> None:
    item = known(engine())
    [other] = desired(CHAT.replace("org/chat", "org/other")).engines
    assert look_up(other, item) is None


def test_a_hidden_value_counts_and_is_not_kept() -> None:
    more = "args: {max-num-seqs: '${SEQS}', chat-template: '${TEMPLATE}'}\nenv: {VLLM_ATTENTION_BACKEND: '${BACKEND}'}"
    values = {"SEQS": "12345", "TEMPLATE": "t9999", "BACKEND": "secret-backend"}
    item = known(engine(more, **values))
    assert not [value for value in values.values() if value in repr(item)]
    assert item.marks.keys() == {"args.max-num-seqs", "env.VLLM_ATTENTION_BACKEND"}
    assert look_up(engine(more, **values), item) is item
    assert look_up(engine(more, **{**values, "TEMPLATE": "other"}), item) is item
    assert look_up(engine(more, **{**values, "SEQS": "54321"}), item) is None
    assert look_up(engine(more, **{**values, "BACKEND": "other"}), item) is None


def test_of_several_versions_the_one_asked_for_or_the_latest_start_is_found() -> None:
    old = known(engine())
    new = replace(old, vllm_version="0.33.0", at=2.0)
    assert old.key != new.key
    assert look_up(engine(), old, new) is new
    assert look_up(engine(), old, new, version="0.32.0") is old
    assert look_up(engine(), old, new, version="0.31.0") is None


def test_the_latest_are_kept() -> None:
    items = [replace(known(engine()), subject=str(number), at=float(number)) for number in (3, 1, 2)]
    assert [item.subject for item in newest(items, 2).values()] == ["2", "3"]


def test_who_holds_more_than_promised_outgrew_it() -> None:
    item = known(engine(), promised_mib=100)
    assert not item.outgrew
    assert not replace(item, held_mib=100).outgrew
    assert replace(item, held_mib=101).outgrew
    assert not replace(item, promised_mib=0, held_mib=101).outgrew


@pytest.mark.parametrize(
    ("figures", "held", "kv_bytes", "expected"),
    [
        ({"kv_available_mib": 4000}, 20000, 0, 16000),
        ({"kv_available_mib": 4000}, 20000, 3000 << 20, 17000),
        ({}, 20000, 3000 << 20, 17000),
        ({}, 20000, 0, None),
        ({"kv_available_mib": 4000, "requested_mib": 19000}, None, 0, 15614),
        ({"kv_available_mib": 4000}, None, 0, None),
        ({"kv_available_mib": 4000, "requested_mib": 19000}, None, 3000 << 20, None),
        ({"kv_available_mib": -10}, 20000, 0, None),
        ({"kv_available_mib": 21000}, 20000, 0, None),
    ],
)
def test_what_a_start_took_beside_its_kv_cache(
    figures: dict[str, int], held: int | None, kv_bytes: int, expected: int | None
) -> None:
    assert beside_kv_mib(StartupFigures(**figures), held, kv_bytes, 614) == expected


def test_cudas_total_is_the_smallest_that_was_told_of_such_a_gpu() -> None:
    def item(gpu: str, total: int | None, **fields: object) -> Measured:
        return Measured(subject({"model": "m", **fields}, gpu), figures=StartupFigures(cuda_total_mib=total))

    told = [item("H100", 81091), item("H100", 81090, runtime="x"), item("L4", None), item("A100", 81050)]
    assert cuda_totals({str(number): one for number, one in enumerate(told)}) == {"H100": 81090, "A100": 81050}
