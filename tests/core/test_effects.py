"""Every field of an entry is classified by what its change does, and does that."""

from __future__ import annotations

from typing import Any

import pytest

from sage_reconcile.core.drift import Change, changes
from sage_reconcile.core.observed import Gpu, Launch, Life, Link, Links
from sage_reconcile.core.resolve import secret_marks
from sage_reconcile.core.spec import EFFECTS, Desired, Effect, EngineSpec
from tests.reading import desired, read

FAR = {frozenset(("GPU-0", "GPU-1")): Link.SYS}
NEAR = {frozenset(("GPU-0", "GPU-1")): Link.NVLINK}
GPUS = tuple(Gpu(f"GPU-{index}", index, "H100", f"0000:0{index}:00.0", 81920) for index in range(2))

CHANGED: dict[str, tuple[str, str]] = {
    "model": ("model: m", "model: n"),
    "runtime": ("model: m", "model: m, runtime: simulator"),
    "command": ("runtime: command, command: a", "runtime: command, command: b"),
    "python": ("model: m", "model: m, python: /opt/python"),
    "replicas": ("model: m", "model: m, replicas: 3"),
    "device": ("model: m", "model: m, device: cpu"),
    "tensor_parallel_size": ("model: m", "model: m, tensor_parallel_size: 2"),
    "pipeline_parallel_size": ("model: m", "model: m, pipeline_parallel_size: 2"),
    "data_parallel_size": ("model: m", "model: m, data_parallel_size: 2"),
    "gpus": ("model: m", "model: m, gpus: [1]"),
    "memory": ("model: m", "model: m, memory: 1GiB"),
    "context": ("model: m", "model: m, context: 8k"),
    "concurrency": ("model: m", "model: m, concurrency: 2"),
    "kv_cache": ("model: m", "model: m, kv_cache: 8GiB"),
    "spread": ("model: m", "model: m, spread: gpu"),
    "link": ("model: m, tensor_parallel_size: 2", "model: m, tensor_parallel_size: 2, link: nvlink"),
    "exclusive": ("model: m", "model: m, exclusive: true"),
    "port": ("model: m", "model: m, port: 9999"),
    "served_model_name": ("model: m", "model: m, served_model_name: x"),
    "args": ("model: m", "model: m, args: {seed: 1}"),
    "env": ("model: m", "model: m, env: {A: b}"),
    "env_file": ("model: m, env_file: a.env", "model: m, env_file: b.env"),
    "priority": ("model: m", "model: m, priority: 1"),
    "preemption": ("model: m", "model: m, preemption: lower"),
    "movable": ("model: m", "model: m, movable: true"),
    "max_unavailable": ("model: m", "model: m, max_unavailable: 2"),
    "max_surge": ("model: m", "model: m, max_surge: 0"),
    "rollback": ("model: m", "model: m, rollback: off"),
    "startup_timeout": ("model: m", "model: m, startup_timeout: 1s"),
    "stop_timeout": ("model: m", "model: m, stop_timeout: 1s"),
    "restarted": ("model: m", "model: m, restarted: {all: now}"),
}
"""For each field an entry, and the same with that field changed."""


def resolved(entry: str) -> Desired:
    wanted, faults = read(
        f"version: 1\nengines:\n  chat: {{{entry}}}\n", {}, {"a.env": {"A": "1"}, "b.env": {"A": "1"}}
    )
    assert faults == []
    return wanted


def launch(ran: Desired, **values: Any) -> Launch:
    engine = ran.engines[0]
    fields: dict[str, Any] = {
        "id": "abc",
        "engine_name": engine.name,
        "index": 0,
        "spec": engine.record,
        "secret_marks": secret_marks(engine.secrets, "abc"),
        "gpus": ("GPU-0",),
        "memory_mib": 1024,
        "port": 8000,
        "bind": "127.0.0.1",
        "life": Life.ALIVE,
        "created_at": 0.0,
    }
    return Launch(**fields | values)


def found(ran: str, wanted: str, links: Links = FAR, **values: Any) -> tuple[Change, ...]:
    new = resolved(wanted)
    return changes(new, new.engines[0], launch(resolved(ran), **values), GPUS, links)


def test_every_field_is_classified_and_tried_here() -> None:
    assert set(EFFECTS) == set(EngineSpec.model_fields)
    assert set(CHANGED) == set(EngineSpec.model_fields)


@pytest.mark.parametrize("field", EngineSpec.model_fields)
def test_a_change_of_a_field_does_what_its_class_says(field: str) -> None:
    old, new = CHANGED[field]
    on = ("GPU-0", "GPU-1") if field == "link" else ("GPU-0",)
    named = {change.field.split(".")[0] for change in found(old, new, gpus=on)}
    assert named == (set() if EFFECTS[field] is Effect.NOTHING else {field})


@pytest.mark.parametrize("field", EngineSpec.model_fields)
def test_no_change_is_found_where_there_is_none(field: str) -> None:
    for entry in CHANGED[field]:
        port = 9999 if "9999" in entry else 8000
        gpus = ("GPU-1",) if "gpus" in entry else ("GPU-0",)
        assert found(entry, entry, port=port, gpus=gpus) == ()


def test_old_and_new_are_told_as_people_write_them() -> None:
    assert found("model: m, memory: 24GiB", "model: m, memory: 24500MiB") == (Change("memory", "24GiB", "24500MiB"),)
    assert found("model: m, args: {a: true}", "model: m, args: {a: [1, x]}") == (Change("args.a", "true", "[1, x]"),)
    assert found("model: m, args: {a: }", "model: m, args: {a: {b: 1}}") == (Change("args.a", "none", "{b: 1}"),)
    assert found("model: m", "model: m, python: p") == (Change("python", "none", "p"),)


def test_a_flag_without_a_value_is_not_the_same_as_no_flag() -> None:
    assert found("model: m", "model: m, args: {a: }") == (Change("args.a", "", "none"),)
    assert found("model: m, args: {a: }", "model: m") == (Change("args.a", "none", ""),)


def test_the_contents_of_an_env_file_count_and_are_not_shown() -> None:
    text = "version: 1\nengines:\n  chat: {model: m, env_file: a.env}\n"
    old, _ = read(text, {}, {"a.env": {"A": "old-secret", "B": "gone-secret"}})
    new, _ = read(text, {}, {"a.env": {"A": "new-secret", "C": "come-secret"}})
    told = changes(new, new.engines[0], launch(old), GPUS, {})
    assert told == (
        Change("env_file.A", "(hidden)", "(hidden), another value"),
        Change("env_file.C", "", "(hidden)"),
        Change("env_file.B", "(hidden)", ""),
    )


def test_a_secret_that_changes_counts_although_its_reference_stays() -> None:
    text = "version: 1\nengines:\n  chat: {model: m, args: {x: '${S}'}, env: {A: '${S}'}}\n"
    old, new = desired(text, {"S": "one"}), desired(text, {"S": "two"})
    told = changes(new, new.engines[0], launch(old), GPUS, {})
    assert [change.field for change in told] == ["args.x", "env.A"]
    assert "one" not in str(told)
    assert "two" not in str(told)
    assert changes(old, old.engines[0], launch(old), GPUS, {}) == ()


def test_a_record_without_marks_restarts_nobody() -> None:
    text = "version: 1\nengines:\n  chat: {model: m, env: {A: '${S}'}}\n"
    wanted = desired(text, {"S": "one"})
    assert changes(wanted, wanted.engines[0], launch(wanted, secret_marks={}), GPUS, {}) == ()


def test_pins_are_satisfied_by_index_or_uuid() -> None:
    entry = "model: m, gpus: [0, GPU-1]"
    assert found("model: m", entry, gpus=("GPU-0",)) == ()
    assert found("model: m", entry, gpus=("GPU-1",)) == ()
    assert found("model: m", "model: m, gpus: [0]", gpus=("GPU-0", "GPU-1")) == (Change("gpus", "[0, 1]", "[0]"),)
    assert found("model: m", "model: m, gpus: [0]", gpus=("GPU-9",)) == (), "not shown: it may be GPU 0"
    both = found("model: m", "model: m, gpus: [0, 7]", gpus=("GPU-9", "GPU-1"))
    assert both == (Change("gpus", "[GPU-9, 1]", "[0, 7]"),)


def test_links_that_are_good_enough_or_not_known_restart_nobody() -> None:
    pair, on = "model: m, tensor_parallel_size: 2", ("GPU-0", "GPU-1")
    assert found(pair, f"{pair}, link: nvlink", FAR, gpus=on) == (Change("link", "any", "nvlink"),)
    assert found(pair, f"{pair}, link: numa", FAR, gpus=on) == (Change("link", "any", "numa"),)
    assert found(f"{pair}, link: numa", f"{pair}, link: nvlink", FAR, gpus=on) == (Change("link", "numa", "nvlink"),)
    assert found(f"{pair}, link: nvlink", f"{pair}, link: any", FAR, gpus=on) == ()
    assert found(pair, f"{pair}, link: nvlink", NEAR, gpus=on) == ()
    assert found(pair, f"{pair}, link: nvlink", {}, gpus=on) == ()
    assert found(f"{pair}, link: nvlink", f"{pair}, link: nvlink", FAR, gpus=on) == (), "its entry did not change"


def test_a_restart_is_asked_for_by_another_value_for_this_replica() -> None:
    none, every, one = "model: m", "model: m, restarted: {all: a}", 'model: m, restarted: {all: a, "1": b}'
    assert found(none, every) == (Change("restarted.all", "", "a"),)
    assert found(every, every.replace("all: a", "all: b")) == (Change("restarted.all", "a", "b"),)
    assert found(every, one, index=1) == (Change("restarted.1", "", "b"),)
    assert found(every, one, index=0) == ()
    assert found(one, every, index=1) == found(every, none) == (), "what is taken away asks for nothing"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ('{"01": a}', 'restarted.01: `01` names no replica; write all, or the index of one in quotes, such as "0"'),
        ("{All: a}", "restarted.All: `All` names no replica"),
        ("{all: 5}", "restarted.all: `all`: expected text, got the number 5"),
        ("now", "restarted: expected a map, got the text 'now'"),
    ],
)
def test_a_restart_that_cannot_be_meant_is_refused(value: str, told: str) -> None:
    _, faults = read(f"version: 1\nengines:\n  chat: {{model: m, restarted: {value}}}\n", {})
    assert told in faults[0].text("f")


def test_replica_one_takes_the_next_port() -> None:
    assert found("model: m", "model: m, port: 9000", index=1, port=9001) == ()
    assert found("model: m", "model: m, port: 9000", index=1, port=9000) == (Change("port", "9000", "9001"),)


def test_another_address_replaces_every_replica() -> None:
    assert found("model: m", "model: m", bind="0.0.0.0") == (Change("host.bind", "0.0.0.0", "127.0.0.1"),)
