"""What the verbs have to change in a file, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from sage_reconcile.core import changes
from sage_reconcile.core.changes import Change, Present, Wish
from sage_reconcile.errors import EditRefused, NotFound
from tests.reading import desired, source

FILE = """\
version: 1
defaults: {memory: 1GiB, args: {seed: 1}, replicas: 1}
engines:
  chat: {model: a/b-7B, replicas: 3, memory: 24GiB, args: {max_model_len: 8192}}
  code: {model: q/c-7B}
  idle: {model: o/o-1B, replicas: 0}
"""
CHAT = ("engines", "chat")


def present(text: str = FILE, remark: str = "") -> Present:
    return Present(source(text).data, desired(text), lambda route: remark if route[-1] == "replicas" else "")


def start(model: str, now: Present | None = None, **options: Any) -> tuple[str, list[Change]]:
    return changes.start(Wish(model, **options), now or present())


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b-instruct"),
        ("/srv/models/My Model (v2)/", "my-model-v2"),
        ("C:\\models\\x", "x"),
        ("a/" + "x" * 80, "x" * 63),
        ("a/" + "x" * 62 + "-y", "x" * 62),
        ("org/_.-a", "a"),
    ],
)
def test_a_name_is_made_of_the_model(model: str, name: str) -> None:
    assert changes.name_for(model) == name


@pytest.mark.parametrize("model", ["...", "a/---", "模型/模型"])
def test_where_no_name_can_be_made_one_is_asked_for(model: str) -> None:
    with pytest.raises(EditRefused, match="give one with --name"):
        changes.name_for(model)


def test_start_writes_a_new_entry_in_the_order_of_the_fields() -> None:
    fields = [("args.max-model-len", 8192), ("memory", "24GiB"), ("args.x", True), ("tensor_parallel_size", 2)]
    name, found = start("org/New-1B", replicas=2, fields=fields)
    assert name == "new-1b"
    entry: Any = found[0].value
    assert list(entry.items()) == [
        ("model", "org/New-1B"),
        ("replicas", 2),
        ("tensor_parallel_size", 2),
        ("memory", "24GiB"),
        ("args", {"max-model-len": 8192, "x": True}),
    ]
    assert found == [Change(("engines", "new-1b"), entry)]


def test_the_same_start_twice_is_one_engine() -> None:
    assert start("a/b-7B", name="chat") == ("chat", [])
    assert start("chat") == ("chat", [])
    assert start("chat", replicas=3, fields=[("memory", "24GiB")]) == ("chat", [])
    assert start("chat", replicas=4, fields=[("memory", "9GiB")]) == (
        "chat",
        [Change((*CHAT, "replicas"), 4), Change((*CHAT, "memory"), "9GiB")],
    )


def test_a_name_that_has_another_model_is_not_taken() -> None:
    with pytest.raises(EditRefused, match=r"chat is in the file, with the model a/b-7B; choose another --name"):
        start("x/y-1B", name="chat")
    with pytest.raises(EditRefused, match=r"chat is in the file"):
        start("x/chat")


def test_a_stopped_engine_comes_back_with_as_many_as_it_had() -> None:
    assert changes.stop(present(), "chat", remove=False) == [Change((*CHAT, "replicas"), 0, "was 3")]
    assert changes.stop(present(), "code", remove=False) == [Change(("engines", "code", "replicas"), 0)]
    assert changes.stop(present(), "idle", remove=False) == []
    assert changes.stop(present(), "idle", remove=True) == [Change(("engines", "idle"))]
    back = ("engines", "idle", "replicas")
    assert start("idle", present(remark="was 3")) == ("idle", [Change(back, 3)])
    assert start("idle") == ("idle", [Change(back, 1)])
    assert start("idle", present(remark="was 0")) == ("idle", [Change(back, 1)])
    assert start("idle", present(remark="was many")) == ("idle", [Change(back, 1)])
    assert start("idle", present(remark="was 3"), replicas=2) == ("idle", [Change(back, 2)])


def test_scale() -> None:
    assert changes.scale(present(), "chat", 3) == []
    assert changes.scale(present(), "chat", 5) == [Change((*CHAT, "replicas"), 5)]
    assert changes.scale(present(remark="was 3"), "idle", 0) == [Change(("engines", "idle", "replicas"), 0)], (
        "who asks for none means it: the note goes"
    )


def test_fields_are_set_where_they_differ() -> None:
    now = present()
    assert changes.assign(now, "chat", [("memory", "24GiB"), ("args.max-model-len", 8192)]) == []
    assert changes.assign(now, "chat", [("args.max-model-len", 1)]) == [Change((*CHAT, "args", "max_model_len"), 1)]
    assert changes.assign(now, "chat", [("args.a.b", 1)]) == [Change((*CHAT, "args", "a.b"), 1)]
    assert changes.assign(now, "code", [("env.A_B", "x")]) == [Change(("engines", "code", "env", "A_B"), "x")]
    assert changes.assign(now, "code", [("tensor-parallel-size", 2)])[0].route[-1] == "tensor_parallel_size"
    assert changes.assign(now, "chat", [("replicas", True)]) == [Change((*CHAT, "replicas"), True)]
    one = present(FILE.replace("replicas: 3", "replicas: 1"))
    assert changes.assign(one, "chat", [("replicas", True)]) == [Change((*CHAT, "replicas"), True)], "1 is not true"


def test_fields_are_taken_out() -> None:
    now = present()
    assert changes.assign(now, "chat", [("memory", None)]) == [Change((*CHAT, "memory"))]
    assert changes.assign(now, "chat", [("args.max-model-len", None)]) == [Change((*CHAT, "args", "max_model_len"))]
    assert changes.assign(now, "chat", [("port", None), ("args.other", None)]) == [], "it is not there"
    for name, path in (("code", "memory"), ("code", "args.seed"), ("chat", "args.seed")):
        with pytest.raises(EditRefused, match=rf"{path} of {name} comes from `defaults:`"):
            changes.assign(now, name, [(path, None)])
    with pytest.raises(EditRefused, match="only `args` and `env` have parts"):
        changes.assign(now, "chat", [("memory.x", 1)])


def test_restart_writes_when() -> None:
    assert changes.restart(present(), "chat", None, "T") == [Change((*CHAT, "restarted"), {"all": "T"})]
    assert changes.restart(present(), "chat", 2, "T") == [Change((*CHAT, "restarted", "2"), "T")]
    with pytest.raises(NotFound, match="chat has no replica 3; it has 0 to 2"):
        changes.restart(present(), "chat", 3, "T")
    with pytest.raises(NotFound, match="code has no replica 1; it has only 0"):
        changes.restart(present(), "code", 1, "T")
    with pytest.raises(EditRefused, match="idle is stopped"):
        changes.restart(present(), "idle", None, "T")


def test_an_engine_that_is_not_there_is_named_with_those_that_are() -> None:
    for verb in (
        lambda now: changes.stop(now, "chta", remove=False),
        lambda now: changes.scale(now, "chta", 1),
        lambda now: changes.assign(now, "chta", []),
        lambda now: changes.restart(now, "chta", None, "T"),
    ):
        with pytest.raises(NotFound, match="no engine 'chta'; did you mean chat"):
            verb(present())
    with pytest.raises(NotFound, match="it names chat, code, idle"):
        changes.stop(present(), "zzz", remove=True)


def test_the_data_after_a_change() -> None:
    data = source(FILE).data
    engines: Any = changes.changed(data, Change((*CHAT, "args", "max_model_len")))["engines"]
    assert "args" not in engines["chat"], "with the last flag the map goes"
    engines = changes.changed(data, Change((*CHAT, "args", "x"), 1))["engines"]
    assert engines["chat"]["args"] == {"max_model_len": 8192, "x": 1}
    assert list(engines) == ["chat", "code", "idle"], "the order stays"
    assert list(changes.changed(data, Change(CHAT))["engines"]) == ["code", "idle"]
    assert source(FILE).data == data, "what was read is not touched"
