"""What is put into a text is there and alone; what is not touched is the same to the byte."""

from __future__ import annotations

import difflib
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_reconcile.core.changes import Change, changed
from sage_reconcile.errors import EditRefused
from sage_reconcile.host import documents, splice
from sage_reconcile.host.yaml_text import in_brackets, on_a_line, read_value

FILE = """\
# the head
version: 1

host: {gpus: 8xH100-80GB}   # eight

defaults:
  args: &common
    seed: 1   # lucky

engines:
  # the chat
  chat:
    model: "a/b-7B"   # the model
    memory: '24GiB' # measured
    args: *common
    # port: 8000

  code: {model: q/c-7B, replicas: 2}  # flow

  embed:
    model: e/e-1B
    gpus:
      - 0   # first
      - 1
    args:
      max_model_len: 8192
    text: |
      two
      lines
    # the end of embed

  # small: {}
"""


CODE = "  code: {model: q/c-7B, replicas: 2"


def data(text: str) -> dict[str, Any]:
    return documents.parse(text.encode(), "f").data


def difference(before: str, after: str) -> str:
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))
    return "\n".join(line for line in lines[2:] if not line.startswith("@@"))


def put(path: str, value: object, text: str = FILE, remark: str = "") -> str:
    after = splice.put(text, tuple(path.split(".")), value, remark)
    assert data(after) == changed(data(text), Change(tuple(path.split(".")), value))
    return difference(text, after)


def take(path: str, text: str = FILE) -> str:
    after = splice.take(text, tuple(path.split(".")))
    assert data(after) == changed(data(text), Change(tuple(path.split("."))))
    return difference(text, after)


@pytest.mark.parametrize(
    ("path", "value", "lines"),
    [
        ("engines.chat.memory", "30GiB", "-    memory: '24GiB' # measured\n+    memory: '30GiB' # measured"),
        ("engines.chat.model", 'a"b', '-    model: "a/b-7B"   # the model\n+    model: "a\\"b"   # the model'),
        ("engines.chat.memory", "it's", "-    memory: '24GiB' # measured\n+    memory: 'it''s' # measured"),
        ("engines.chat.port", 8001, "+    port: 8001"),
        ("engines.chat.args.x", True, "-    args: *common\n+    args: {<<: *common, x: true}"),
        ("engines.chat.args", {"x": 1}, "-    args: *common\n+    args:\n+      x: 1"),
        (
            "engines.code.replicas",
            0,
            "-  code: {model: q/c-7B, replicas: 2}  # flow\n+  code: {model: q/c-7B, replicas: 0}  # flow",
        ),
        (
            "engines.code.args.x",
            [1, "a, b"],
            f'-{CODE}}}  # flow\n+{CODE}, args: {{x: [1, "a, b"]}}}}  # flow',
        ),
        ("engines.embed.gpus", "auto", "-    gpus:\n-      - 0   # first\n-      - 1\n+    gpus: auto"),
        ("engines.embed.gpus", [2, 1], "-      - 0   # first\n+      - 2"),
        ("engines.embed.args.max_model_len", 1, "-      max_model_len: 8192\n+      max_model_len: 1"),
        ("engines.embed.args.seed", 1, "+      seed: 1"),
        ("engines.embed.port", 1, "+    port: 1"),
        ("engines.embed.text", "one", "-    text: |\n-      two\n-      lines\n+    text: one"),
        ("engines.new", {"model": "m", "args": {"a": 1.5}}, "+  new:\n+    model: m\n+    args:\n+      a: 1.5\n+"),
        (
            "host.headroom",
            "1GiB",
            "-host: {gpus: 8xH100-80GB}   # eight\n+host: {gpus: 8xH100-80GB, headroom: 1GiB}   # eight",
        ),
        ("reservations.x.memory", "1GiB", "+reservations:\n+  x:\n+    memory: 1GiB\n+"),
    ],
)
def test_only_what_is_asked_changes(path: str, value: object, lines: str) -> None:
    assert put(path, value) == lines


def test_what_is_new_stands_behind_what_belongs_to_the_last_entry() -> None:
    after = splice.put(FILE, ("engines", "new"), {"model": "m"})
    assert "    # the end of embed\n\n  new:\n    model: m\n\n  # small: {}\n" in after


@pytest.mark.parametrize(
    ("path", "lines"),
    [
        ("engines.chat.memory", "-    memory: '24GiB' # measured"),
        ("engines.chat.args", "-    args: *common"),
        ("engines.code", "-  code: {model: q/c-7B, replicas: 2}  # flow\n-"),
        ("engines.code.model", "-  code: {model: q/c-7B, replicas: 2}  # flow\n+  code: {replicas: 2}  # flow"),
        ("engines.code.replicas", "-  code: {model: q/c-7B, replicas: 2}  # flow\n+  code: {model: q/c-7B}  # flow"),
        ("engines.embed.args.max_model_len", "-    args:\n-      max_model_len: 8192"),
        ("engines.embed.gpus", "-    gpus:\n-      - 0   # first\n-      - 1"),
    ],
)
def test_only_what_is_asked_goes(path: str, lines: str) -> None:
    assert take(path) == lines


def test_an_entry_goes_with_the_comments_in_it_and_no_others() -> None:
    after = splice.take(FILE, ("engines", "embed"))
    assert after == FILE[: FILE.index("  embed:")] + "  # small: {}\n"


def test_what_comes_from_a_merge_or_an_alias_is_not_taken_out_elsewhere() -> None:
    text = "version: 1\nengines:\n  a: &a {model: m, port: 1}\n  b: {<<: *a}\n  c: *a\n"
    for route in (("engines", "b", "port"), ("engines", "c", "port")):
        with pytest.raises(EditRefused, match=r"is not written in the place itself"):
            splice.take(text, route)


def test_an_alias_is_made_a_merge_where_something_is_added() -> None:
    text = "engines:\n  a: &a {model: m}\n  b: *a  # like a\n  c: {x: *a, y: 1}\n"
    assert put("engines.b.port", 1, text) == "-  b: *a  # like a\n+  b: {<<: *a, port: 1}  # like a"
    assert put("engines.c.x.port", 1, text) == "-  c: {x: *a, y: 1}\n+  c: {x: {<<: *a, port: 1}, y: 1}"
    assert put("engines.b", 7, text) == "-  b: *a  # like a\n+  b: 7  # like a"
    assert take("engines.b", text) == "-  b: *a  # like a"


def test_an_anchor_stays() -> None:
    text = "engines:\n  a: {memory: &m 1GiB, args: &x {}}\n"
    assert "memory: &m 2GiB" in put("engines.a.memory", "2GiB", text)
    assert "args: &x {k: 1}" in put("engines.a.args.k", 1, text)


def test_json_stays_json() -> None:
    text = '{"version": 1, "engines": {"a": {"model": "m"}}}'
    after = splice.put(text, ("engines", "b"), {"model": "n", "args": {"x": [True, 1.5, "t"]}})
    assert after == text[:-2] + ', "b": {"model": "n", "args": {"x": [true, 1.5, "t"]}}}}'


def test_an_empty_map_is_filled_and_emptied_again() -> None:
    text = "version: 1\nengines: {}  # none yet\n# the end\n"
    filled = splice.put(text, ("engines", "a"), {"model": "m"})
    assert filled == "version: 1\nengines:  # none yet\n  a:\n    model: m\n# the end\n"
    assert splice.take(filled, ("engines", "a")) == text


def test_the_indentation_of_the_file_is_kept() -> None:
    text = "engines:\n    a:\n        model: m\n        args:\n            x: 1\n"
    assert splice.put(text, ("engines", "b"), {"model": "n", "args": {"y": 1}}) == (
        text + "    b:\n        model: n\n        args:\n            y: 1\n"
    )


def test_a_remark_is_written_read_and_taken_away() -> None:
    route = ("engines", "a", "replicas")
    for text in (
        "engines:\n  a:\n    replicas: 3\n",
        "engines:\n  a:\n    replicas: 3  # why\n",
        "engines:\n  a: {replicas: 3, x: 1}  # why\n",
        "engines:\r\n  a: {replicas: 3}",
    ):
        stopped = splice.put(text, route, 0, "was 3")
        assert splice.remark(stopped, route) == "was 3"
        assert "why" not in text or "# why  # was 3" in stopped
        assert splice.put(stopped, route, 3) == text
    shared = "engines: {a: {replicas: 3}, b: {replicas: 2}}\n"
    assert splice.put(shared, route, 0, "was 3") == shared.replace("3", "0"), "a remark there would be anyone's"
    assert splice.remark("engines: {}\n", route) == ""


@pytest.mark.parametrize("hidden", ["a", "'b c'", "|\n        d\n        e", "&x f"])
def test_a_value_is_hidden(hidden: str) -> None:
    text = f"engines:\n  a:\n    env:\n      T: {hidden}\n      U: u # why\n"
    shown = splice.without(text, [("engines", "a", "env", "T"), ("engines", "a", "env", "U"), ("x", "y")], "(hidden)")
    kept = "&x " if hidden.startswith("&") else ""
    assert shown == f"engines:\n  a:\n    env:\n      T: {kept}(hidden)\n      U: (hidden) # why\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("true", True),
        ("0.9", 0.9),
        ("[0, 1]", [0, 1]),
        ("{a: 1}", {"a": 1}),
        ("24GiB", "24GiB"),
        ("30%", "30%"),
        ("a #b", "a #b"),
        ("a: b", "a: b"),
        ("'quoted'", "'quoted'"),
        ("null", "null"),
        ("${X}", "${X}"),
        ("x\nversion: 2", "x\nversion: 2"),
        ("*a", "*a"),
        ("\udcff", "\udcff"),
    ],
)
def test_a_word_is_read_as_it_would_be_in_the_file(text: str, value: object) -> None:
    found = read_value(text)
    assert (found, type(found)) == (value, type(value))


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
AWKWARD = st.sampled_from(
    [
        *("yes", "null", "~", "1", "1e3", "0x1", "*a", "&a", "- x", "a: b", "a #b", "#", "{", "]", "a, b", "'", '"'),
        *("!x", "%x", "@", "`", "2026-01-01", "2026-01-01T00:00:00Z", "1:30", "<<", "", " x ", "x\ny", "\t", "a:"),
        *("---", "...", "}\nengines: {}", "x\n    port: 1", "${A}", "=", "\u2028", "\x7f", "\x85", "on"),
    ]
)
VALUES = st.recursive(
    st.booleans() | st.integers(-10, 10**12) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS | AWKWARD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | AWKWARD, inner, max_size=3),
    max_leaves=6,
)
ROUTES = st.sampled_from(
    [("engines", name, *rest) for name in ("chat", "code", "embed", "new") for rest in ((), ("f",), ("args", "f"))]
    + [("engines", "embed", "gpus"), ("engines", "embed", "text"), ("engines", "chat", "memory"), ("host",)]
)


def usable(value: object) -> bool:
    """The reader takes no control characters and no key that is ``<<``."""
    try:
        documents.parse(yaml.safe_dump({"x": value}, allow_unicode=True).encode(), "f")
    except documents.FileFaults:
        return False
    return True


@settings(deadline=None)
@given(route=ROUTES, value=VALUES, windows=st.booleans(), open_end=st.booleans())
def test_any_value_arrives_as_it_is_and_the_rest_stays(
    route: tuple[str, ...], value: Any, windows: bool, open_end: bool
) -> None:
    text = FILE.rstrip("\n") if open_end else FILE
    text = text.replace("\n", "\r\n") if windows else text
    after = splice.put(text, route, value)
    wanted = changed(data(text), Change(route, value))
    try:
        found = data(after)
    except documents.FileFaults:
        assert not usable(value)
        return
    assert repr(found) == repr(wanted)
    assert after.endswith("\n") is not open_end
    assert ("\r\n" in after) is windows
    assert after.count("\n") == after.count("\r\n") or not windows
    kept = ("# the head", "# eight", "# lucky", "# the chat", "# the model", "# measured", "# flow", "# small: {}")
    if len(route) > 2 and route != ("engines", "embed", "gpus"):
        assert all(comment in after for comment in (*kept, "# first", "# the end of embed"))


@settings(deadline=None)
@given(route=ROUTES, windows=st.booleans(), open_end=st.booleans(), value=st.sampled_from([1, "x", {"a": {"b": 1}}]))
def test_what_was_put_in_anew_and_taken_out_again_leaves_no_trace(
    route: tuple[str, ...], windows: bool, open_end: bool, value: object
) -> None:
    text = FILE.rstrip("\n") if open_end else FILE
    text = text.replace("\n", "\r\n") if windows else text
    inner: Any = data(text)
    for step in route:
        inner = inner.get(step) if isinstance(inner, dict) else None
    if inner is not None or "chat" in route or (route == ("engines", "new") and not isinstance(value, dict)):
        return
    new = route if route[:2] != ("engines", "new") else route[:2]
    assert splice.take(splice.put(text, route, value), new) == text


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("2026-01-01", '"2026-01-01"'),
        ("2026-01-01T00:00:00.5Z", '"2026-01-01T00:00:00.5Z"'),
        ("1:30", '"1:30"'),
        ("<<", '"<<"'),
        ("8000-8999", "8000-8999"),
        ("org/Model-8B", "org/Model-8B"),
        ("yes", '"yes"'),
        ("12", '"12"'),
        ("a\x7f\u2028", '"a\\U0000007f\\U00002028"'),
        ("模型 é", "模型 é"),
        (1e-5, "1.0e-05"),
        (True, "true"),
    ],
)
def test_a_value_is_written_so_that_all_readers_agree_on_it(value: object, written: str) -> None:
    assert on_a_line(value) == in_brackets(value) == written
    assert data(f"version: {written}\n") == {"version": value}
    assert isinstance(value, float) or yaml.safe_load(written) == value
    assert value == "<<" or list(yaml.safe_load(f"{{{in_brackets(str(value))}: 1}}")) == [str(value)]
