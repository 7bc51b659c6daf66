"""Reading YAML: the data and where it is written, and every fault of a bad file at once."""

import contextlib
import hashlib
import os
import random
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from sage_reconcile.errors import FileFaults
from sage_reconcile.host import documents, yaml_nodes
from sage_reconcile.host.documents import MAX_BYTES, Place, parse, read, read_env_file

SAMPLE = """\
# two engines
version: 1
defaults: &base
  memory: 24GiB
  args: {max-model-len: 8192, enforce-eager: yes}
engines:
  chat:
    <<: *base
    model: "org/chat"  # the main one
    memory: 0.5
    gpus: [0, 1]
    ports: 8000:8000
  embed:
    model: 'org/é'
    env:
      TOKEN: |
        two
        lines
    seed:
    since: 2024-01-01
"""


@pytest.fixture(params=["c", "python"])
def loader(request, monkeypatch):
    """Both parsers: the fast one, and the one that is always there."""
    chosen = yaml.SafeLoader if request.param == "python" else yaml.CSafeLoader
    monkeypatch.setattr(documents, "_LOADER", chosen)
    return request.param


def faults_of(content: str | bytes) -> list[str]:
    with pytest.raises(FileFaults) as caught:
        parse(content.encode() if isinstance(content, str) else content, "f")
    assert all(fault.message and "\n" not in fault.text("f") for fault in caught.value.faults)
    return [fault.text("f") for fault in caught.value.faults]


def refusal(path: Path) -> str:
    with pytest.raises(FileFaults) as caught:
        read(path)
    assert [caught.value.file_name, len(caught.value.faults)] == [str(path), 1]
    return str(caught.value).removeprefix(f"{path}: ")


def data_of(text: str) -> dict[str, object]:
    return parse(text.encode(), "f").data


@pytest.mark.usefixtures("loader")
def test_a_good_file_is_plain_data_with_the_place_of_every_value_and_key():
    document = parse(SAMPLE.encode(), "f")
    assert document.data == {
        "version": 1,
        "defaults": {"memory": "24GiB", "args": {"max-model-len": 8192, "enforce-eager": True}},
        "engines": {
            "chat": {
                "memory": 0.5,
                "args": {"max-model-len": 8192, "enforce-eager": True},
                "model": "org/chat",
                "gpus": [0, 1],
                "ports": "8000:8000",
            },
            "embed": {
                "model": "org/é",
                "env": {"TOKEN": "two\nlines\n"},
                "seed": None,
                "since": "2024-01-01",
            },
        },
    }
    chat = ("engines", "chat")
    assert document.places[()] == Place(2, 1)
    assert document.places[chat] == Place(8, 5)
    assert document.places[*chat, "model"] == Place(9, 12)
    assert document.key_places[*chat, "model"] == Place(9, 5)
    assert document.places[*chat, "gpus", 1] == Place(11, 15)
    assert document.places["engines", "embed", "seed"] == Place(19, 10)
    assert (*chat, "gpus", 1) not in document.key_places
    assert document.digest == hashlib.sha256(SAMPLE.encode()).hexdigest()
    assert document.text == SAMPLE


@pytest.mark.usefixtures("loader")
def test_merged_values_stand_where_they_are_written_and_own_values_where_they_override():
    document = parse(SAMPLE.encode(), "f")
    chat = ("engines", "chat")
    assert document.key_places[*chat, "args"] == Place(5, 3)
    assert document.places[*chat, "args", "max-model-len"] == Place(5, 25)
    assert document.places[*chat, "memory"] == Place(10, 13)
    assert (*chat, "<<") not in document.key_places


@pytest.mark.usefixtures("loader")
def test_the_original_text_of_unquoted_scalars_that_are_not_text_is_kept():
    assert parse(SAMPLE.encode(), "f").written == {
        ("version",): "1",
        ("defaults", "args", "max-model-len"): "8192",
        ("defaults", "args", "enforce-eager"): "yes",
        ("engines", "chat", "args", "max-model-len"): "8192",
        ("engines", "chat", "args", "enforce-eager"): "yes",
        ("engines", "chat", "memory"): "0.5",
        ("engines", "chat", "gpus", 0): "0",
        ("engines", "chat", "gpus", 1): "1",
        ("engines", "embed", "seed"): "",
    }
    assert parse(b'a: "1"\nb: off\n', "f").written == {("b",): "off"}
    assert parse(b"a: !!int '1'\nb: !!int 1\n", "f").written == {("b",): "1"}


@pytest.mark.usefixtures("loader")
def test_an_aliased_value_stands_at_its_alias_and_what_is_in_it_where_it_is_written():
    document = parse(b"a: &a\n  x: on\nb: *a\n", "f")
    assert document.data == {"a": {"x": True}, "b": {"x": True}}
    assert document.places["b",] == Place(3, 4)
    assert document.places["b", "x"] == document.places["a", "x"] == Place(2, 6)
    assert document.written["b", "x"] == "on"


@pytest.mark.usefixtures("loader")
def test_merging_several_maps_gives_earlier_ones_and_own_keys_precedence():
    text = "a: &a {x: 1, y: 1}\nb: &b {x: 2, z: 2}\nc: &c {<<: [*a, *b], y: 3}\nd: {w: 0, <<: *c}\n"
    assert data_of(text)["c"] == {"x": 1, "z": 2, "y": 3}
    assert data_of(text)["d"] == {"x": 1, "z": 2, "y": 3, "w": 0}
    assert data_of('a: {"<<": 1}') == {"a": {"<<": 1}}


@pytest.mark.usefixtures("loader")
def test_an_alias_may_be_a_key_and_an_anchor_may_be_given_again():
    assert data_of("a: &k name\n*k : 1\nb: &k other\nc: *k\n") == {
        "a": "name",
        "name": 1,
        "b": "other",
        "c": "other",
    }


@pytest.mark.usefixtures("loader")
def test_what_old_yaml_takes_for_dates_and_sexagesimal_numbers_stays_text():
    text = "{a: 22:22, b: 8000:8000, c: 2024-01-01, d: 1:30.5, e: =, f: <<, g: 2024-01-01 10:00:00Z}"
    assert data_of(text) == {
        "a": "22:22",
        "b": "8000:8000",
        "c": "2024-01-01",
        "d": "1:30.5",
        "e": "=",
        "f": "<<",
        "g": "2024-01-01 10:00:00Z",
    }
    assert parse(text.encode(), "f").written == {}


@pytest.mark.usefixtures("loader")
def test_other_scalars_are_read_as_yaml_has_them():
    text = "a: [0x10, 010, 1_000, -1.5, yes, Off, ~, null, 1e3, !!str 1, ! 2, !!float 3, !!bool no]"
    assert data_of(text)["a"] == [16, 8, 1000, -1.5, True, False, None, None, "1e3", "1", 2, 3.0, False]
    assert isinstance(data_of("a: !!float 3")["a"], float)
    assert data_of("a: !!map {}\nb: !!seq []\n") == {"a": {}, "b": []}


SYNTAX = {
    "a:\n\tb: 1\n": "f:2:1: this line begins with a tab; indent with spaces",
    "a:\n  b: 1\n\tc: 2\n  \td: 3\n": "f:3:1: this line begins with a tab (and so do 1 below); indent with spaces",
    "- \t- b\n": "f:1:3: a tab cannot stand here; write a space",
    "a: 1\nb:2\nc: 3\n": "f:2:1: there is no space after the colon; write `b: …`",
    "a: 1\nbcd\nc: 3\n": "f:2:1: this line is not `key: value`; write a colon and a space after the key",
    "a: b: c\n": "f:1:5: a second `: ` in one line; put the value in quotes",
    "a: b\n  c: d\n": "f:2:4: this is indented below a line that has a value; correct its indentation",
    "a:\n  b: 1\n c: 2\n": "f:3:2: this line fits no line above it; correct its indentation",
    'a: 1\nb: "x\nc: 1\n': "f:2:4: the quote opened here is never closed; close it",
    "a: 'x": "f:1:4: the quote opened here is never closed; close it",
    'a: "x\nb: "y"\n': "f:1:4: the quote opened here is closed only in line 2; close it where it should end",
    'a: "x" y\n': "f:1:8: text follows the closing quote; put all of it in quotes",
    "a: [1, 2\nb: 3\n": "f:1:4: the `[` opened here is not closed, or lacks a comma; close it with `]`",
    "a:\n  b: {x: 1\nc: 3\n": "f:2:6: the `{` opened here is not closed, or lacks a comma; close it with `}`",
    "a: @x\n": "f:1:4: a value cannot begin with `@`; put it in quotes",
    "a: *\n": "f:1:4: a `*` here needs a name after it; put it in quotes if text is meant",
    "a: [1,,2]\n": "f:1:7: `,` does not belong here; remove it, or put it in quotes",
    "a: - b\n": "f:1:4: a list cannot begin here; begin it on the next line",
    "a: |x\n": "f:1:5: after `|` or `>` the text begins on the next line; or put it in quotes",
    "a: !e!x 1\n": "f:1:4: tags are not supported; remove the tag, or quote the value if it is text",
    "%YAML 2.0\n---\na: 1\n": "f:1:1: this `%` line is not known; remove it",
    "a: 1\n...\nb: [\n": "f:3:1: this stands beside the top-level keys; write `key: value` lines only",
}


@pytest.mark.usefixtures("loader")
@pytest.mark.parametrize("text", SYNTAX)
def test_a_syntax_error_is_told_in_plain_words_where_it_is_to_be_corrected(text):
    assert faults_of(text)[-1] == SYNTAX[text]


def test_syntax_errors_that_only_the_fast_parser_places_so():
    assert faults_of('a: "C:\\path"\n') == [
        "f:1:7: this backslash means nothing in double quotes; use single quotes, or write `\\\\`"
    ]
    assert faults_of("- a\nb: 1\n") == ["f:2:1: this is in a list, and is not an item; correct its indentation"]


LEAST = "the least file is the two lines `version: 1` and `engines: {}`"
MEANING = {
    "a: 1\nb: 2\na: 3\n": ["3:1: a: the key `a` is given twice, first in line 1, column 1; keep one"],
    "e:\n  c:\n    g:\n    - 1\n    - {a: 1, 'a': 2}\n": [
        "5:14: e.c.g.1.a: the key `a` is given twice, first in line 5, column 8; keep one"
    ],
    "a: &a {x: 1}\nb:\n  <<: *a\n  <<: *a\n": [
        "4:3: b: the key `<<` is given twice, first in line 3, column 3; merge as `<<: [*a, *b]`"
    ],
    "a: &a 1\nb:\n  <<: [*a]\n": ["3:7: b: `<<` merges only a map or a list of maps; name an anchor of a map"],
    "on: 1\nNo: 2\n": [
        '1:1: YAML reads the key `on` as true; quote it: "on"',
        '2:1: YAML reads the key `No` as false; quote it: "No"',
    ],
    "a:\n  8000: 1\n  0x1: 2\n": [
        '2:3: a: YAML reads the key `8000` as a number; quote it: "8000"',
        '3:3: a: YAML reads the key `0x1` as a number; quote it: "0x1"',
    ],
    "~: 1\n": ["1:1: a key is empty or null; write a name before the colon"],
    "a: {{ x }}\n": ["1:5: a: a map or a list cannot be a key; quote it if text such as `{{ }}` is meant"],
    "? [a]\n: 1\n": ["1:3: a map or a list cannot be a key; quote it if text such as `{{ }}` is meant"],
    "a: .nan\nb: -.INF\nc: 1.0e+999\n": [
        "1:4: a: .nan is not a number that can be used; correct it, or quote it if text is meant",
        "2:4: b: -.INF is not a number that can be used; correct it, or quote it if text is meant",
        "3:4: c: 1.0e+999 is not a number that can be used; correct it, or quote it if text is meant",
    ],
    "a: 0b_\n": ["1:4: a: 0b_ is not a number that can be used; correct it, or quote it if text is meant"],
    "a: !!python/object:os.system x\nb: !custom {}\nc: !!binary aGk=\nd: !!int x\ne: !!str []\n": [
        f"{place}: the tag `{tag}` does not fit here; remove it, or quote the value if it is text"
        for place, tag in [
            ("1:4: a", "!!python/object:os.system"),
            ("2:4: b", "!custom"),
            ("3:4: c", "!!binary"),
            ("4:4: d", "!!int"),
            ("5:4: e", "!!str"),
        ]
    ],
    "a:\n  - *x\n": [
        "2:5: a.0: the alias `*x` names nothing above it; write `&x` before the value that is meant, or quote the `*`"
    ],
    "a: &a\n  b: [*a]\n": ["2:7: a.b.0: the alias `*a` is inside what it names; write the value out"],
    'a: "\\0"\n"\\0": 1\n': [
        "1:4: a: a NUL or half a character in the text; remove the escape",
        "2:1: a NUL or half a character in the text; remove the escape",
    ],
    "- 1\n": [
        f"1:1: the file is not made of `key: value` lines; {LEAST}",
    ],
    "engines:{}\n": ["1:1: the file is not made of `key: value` lines; write a space after the colon"],
    "a: 1\n---\nb: 1\n---\nc: 1\n": ["2:1: a second document begins here; keep one, without `---` between"],
}


@pytest.mark.usefixtures("loader")
@pytest.mark.parametrize("text", MEANING)
def test_a_fault_of_the_content_is_told_with_its_place_and_field(text):
    assert faults_of(text) == [f"f:{fault}" for fault in MEANING[text]]


@pytest.mark.usefixtures("loader")
def test_everything_wrong_is_told_at_once_up_to_where_the_syntax_breaks():
    text = "on: 1\na: 1\na: .inf\nb: !x 1\nc: *no\nd:\n\te: 1\n"
    assert [fault.split(": ")[0] for fault in faults_of(text)] == [
        "f:1:1",
        "f:3:1",
        "f:3:4",
        "f:4:4",
        "f:5:4",
        "f:7:1",
    ]


@pytest.mark.usefixtures("loader")
@pytest.mark.parametrize("text", ["", " \n\t\n", "# only this\n", "---\n", "~\n", "\ufeff"])
def test_an_empty_file_is_told_what_the_least_file_is(text):
    assert faults_of(text) == [f"f: the file is empty; {LEAST}"]


def test_no_more_faults_are_listed_than_anyone_reads():
    found = faults_of("a: 1\n" * 5000)
    assert len(found) == yaml_nodes.MAX_FAULTS + 1
    assert found[-1] == "f:202:1: there are more faults from here on; correct those above"


def test_what_is_shown_of_the_file_is_one_short_printable_line():
    found = faults_of('"\\e[2J\\n": 1\n"\\e[2J\\n": 2\n' + f"{'k' * 500}: 1\n" * 2)
    assert found[0].startswith(r"f:2:1: \x1b[2J\n: the key `\x1b[2J\n` is given twice")
    assert f"the key `{'k' * 64}…` is given twice" in found[1]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"a: 1\nb: caf\xe9\n", "f:2:7: the byte 0xE9 is not UTF-8 text; save the file as UTF-8"),
        ("é: x\r\né: \x07\n".encode(), "f:2:4: the invisible character U+0007; remove it"),
        (b"\xef\xbb\xbfa: \xff", "f:1:4: the byte 0xFF is not UTF-8 text; save the file as UTF-8"),
        (b"a: x\x00y\n", "f:1:5: the invisible character U+0000; remove it"),
        ("a: x\u2028b: 1\n".encode(), "f:1:5: the invisible character U+2028; remove it"),
        ("a: \ufeffb\n".encode(), "f:1:4: the invisible character U+FEFF; remove it"),
        ("a: 1\n".encode("utf-16"), "f: the file is UTF-16 or UTF-32; save it as UTF-8"),
        ("a: 1\n".encode("utf-16-be"), "f: the file is UTF-16 or UTF-32; save it as UTF-8"),
        ("a: 1\n".encode("utf-16-le"), "f: the file is UTF-16 or UTF-32; save it as UTF-8"),
    ],
)
def test_bytes_that_are_no_text_are_told_with_the_first_place(content, fault):
    assert faults_of(content) == [fault]


def test_all_invisible_characters_are_told_at_once():
    assert [fault[:6] for fault in faults_of("a: \x01\nb: \x7f \x02\n")] == ["f:1:4:", "f:2:4:", "f:2:6:"]


@pytest.mark.usefixtures("loader")
def test_a_byte_order_mark_is_accepted_and_shifts_nothing():
    document = parse(b"\xef\xbb\xbfa: 1\n", "f")
    assert document.places["a",] == Place(1, 4)
    assert document.text == "a: 1\n"
    assert document.digest == hashlib.sha256(b"\xef\xbb\xbfa: 1\n").hexdigest()


@pytest.mark.usefixtures("loader")
def test_lines_may_end_as_on_windows():
    document = parse(SAMPLE.replace("\n", "\r\n").encode(), "f")
    assert (document.data, document.places) == (
        data_of(SAMPLE),
        parse(SAMPLE.encode(), "f").places,
    )


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.usefixtures("loader")
def test_an_alias_bomb_is_refused_where_it_gets_too_large_before_it_is_expanded():
    assert faults_of(BOMB) == ["f:5:29: e.7: more than 100,000 values, those of aliases included; use fewer"]
    merges = "a: &a {x: 1}\n" + "".join(
        f"{new}: &{new} {{<<: [{','.join([f'*{old}'] * 10)}]}}\n"
        for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert "more than 100,000 values" in faults_of(merges)[0]


@pytest.mark.parametrize("item", ["1", "[]", "{}"])
def test_the_limit_of_values_counts_every_kind_of_them(item):
    most = yaml_nodes.MAX_NODES - 3  # the map, its key and the list
    assert len(data_of(f"a: [{f'{item},' * most}]")["a"]) == most
    assert "more than 100,000 values" in faults_of(f"a: [{f'{item},' * (most + 1)}]")[0]


@pytest.mark.usefixtures("loader")
def test_a_number_has_as_many_digits_as_anyone_writes():
    assert data_of(f"a: {'9' * 64}\nb: '{'9' * 65}'\n") == {"a": int("9" * 64), "b": "9" * 65}
    problem = f"{'9' * 64}… is not a number that can be used; correct it, or quote it if text is meant"
    assert faults_of(f"a: {'9' * 65}\n") == [f"f:1:4: a: {problem}"]


@pytest.mark.usefixtures("loader")
def test_deep_nesting_is_refused_without_recursion():
    assert faults_of("a: " + "[" * 39 + "]" * 39 + "\nb: " + "[" * 40)[-1].startswith("f:2:43: b.0.0")
    for text in ("[" * 100_000, "{" * 100_000, "- " * 100_000, "? " * 100_000, "a: " + "[" * 100_000):
        assert "more than 40 levels deep; make it flatter" in faults_of(text)[0]


@pytest.mark.usefixtures("loader")
def test_aliases_do_not_get_around_the_limit_of_depth():
    links = "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 50))
    found = faults_of("a0: &a0 []\n" + links)
    assert found == ["f:40:12: a39.0: aliases make it more than 40 levels deep; make it flatter"]
    assert data_of("a0: &a0 []\n" + "".join(links.splitlines(keepends=True)[:38]))


def test_many_directives_cannot_make_the_parser_slow():
    text = "".join(f"%TAG !a{i}! x\n" for i in range(60_000)) + "---\na: 1\n"
    assert faults_of(text) == ["f: more than 20 lines begin with `%`; indent or remove them"]
    assert data_of("%YAML 1.1\n%TAG !a! x\n---\na: 1\n") == {"a": 1}


@pytest.mark.parametrize(
    "text",
    [
        "[" + "a," * 500_000,
        "".join(f"k{i}:\n" for i in range(100_000)),
        "a: &a 1\nb: [" + "*a," * 99_000 + "]\n",
        "a:\n" * 300_000,
        "a: " + "9" * 1_000_000,
        'a: "' + "\n" * 1_000_000 + '" x',
        "a:\n" + "\t\n" * 500_000,
        "\x07" * 1_000_000,
        "a: " + "1:1" * 300_000,
        "%" * 1_000_000,
    ],
    ids=range(10),
)
def test_what_is_large_in_one_way_comes_to_an_end(text):
    """One of them took minutes once; what they take now is measured in the benchmarks."""
    with contextlib.suppress(FileFaults):
        parse(text.encode(), "f")


def mutated(content: bytes, dice: random.Random) -> bytes:
    for _ in range(dice.randint(1, 4)):
        at, end = sorted(dice.randrange(len(content) + 1) for _ in range(2))
        pieces = (b"\t", b": ", b"- ", b"[", b"}", b'"', b"'", b"&a ", b"*a", b"<<: *base", b"!x ", b"#", b"\n")
        pieces += (b"\\U", b"\xff", b"\0", b"|", b"%", b"?", b"---\n", b"!<%ED%A0%80> ", b'"\\UFFFFFFFF"', b"{{", b"1e")
        insert = dice.choice(pieces) if dice.random() < 0.8 else content[at:end][:40]
        cut = dice.choice((0, 0, 1, 1, 5, end - at))
        content = content[:at] + insert + content[at + cut :]
    return content


def read_or_refused(content: bytes) -> bool:
    try:
        document = parse(content, "f")
    except FileFaults as error:
        lines = documents._BREAK.split(content.removeprefix(b"\xef\xbb\xbf").decode(errors="replace"))
        for fault in error.faults:
            assert fault.message, content
            assert fault.text("f").isprintable(), content
            assert 0 <= fault.line <= len(lines) + 1, content
            assert fault.line == 0 or 1 <= fault.column <= len([*lines, ""][fault.line - 1]) + 1, content
        return False
    assert document.data == yaml.load(content, Loader=Reference), content  # noqa: S506 - it is a safe one
    assert len(document.places) == 1 + len(document.key_places) + sum(
        isinstance(path[-1], int) for path in document.places if path
    )
    return True


class Reference(yaml.CSafeLoader):
    """PyYAML itself, but that dates, `22:22`, and a `<<` that is a value stay text."""

    def construct_yaml_int(self, node):
        return node.value if ":" in node.value else super().construct_yaml_int(node)


Reference.add_constructor("tag:yaml.org,2002:timestamp", Reference.construct_yaml_str)
Reference.add_constructor("tag:yaml.org,2002:merge", Reference.construct_yaml_str)
Reference.add_constructor("tag:yaml.org,2002:int", Reference.construct_yaml_int)


def test_any_mutation_is_read_as_the_reference_reads_it_or_refused_with_faults(loader):
    dice = random.Random(20240901)
    outcomes = [read_or_refused(mutated(SAMPLE.encode(), dice)) for _ in range(2000 if loader == "c" else 300)]
    assert 0.02 < sum(outcomes) / len(outcomes) < 0.9


@pytest.mark.usefixtures("loader")
def test_a_file_cut_off_at_any_byte_is_read_or_refused_with_faults():
    content = SAMPLE.encode()
    assert sum(read_or_refused(content[:end]) for end in range(len(content))) > 20


def test_both_parsers_read_the_same():
    outcomes = []
    dice = random.Random(7)
    for _ in range(300):
        content = mutated(SAMPLE.encode(), dice)
        results = []
        for chosen in (yaml.CSafeLoader, yaml.SafeLoader):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(documents, "_LOADER", chosen)
                try:
                    results.append(parse(content, "f"))
                except FileFaults:
                    results.append(None)
        assert None in results or results[0] == results[1], content
        outcomes.append(None in results and results != [None, None])
    assert sum(outcomes) < 15  # only the fast parser takes a tab after a colon


def test_a_missing_file_names_the_command_that_writes_one(tmp_path):
    missing = "the file does not exist, or is a link to nothing; `sage-reconcile init` writes one"
    assert refusal(tmp_path / "engines.yaml") == missing
    (tmp_path / "link.yaml").symlink_to("nowhere")
    assert refusal(tmp_path / "link.yaml") == missing


def test_a_file_and_a_link_to_it_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text(SAMPLE)
    (tmp_path / "b.yaml").symlink_to("a.yaml")
    assert read(tmp_path / "b.yaml") == parse(SAMPLE.encode(), "f")


def test_a_folder_a_strange_path_and_a_nul_are_refused(tmp_path):
    (tmp_path / "file").write_text("a: 1\n")
    (tmp_path / "loop").symlink_to("loop")
    assert refusal(tmp_path) == "this is a folder; name a file in it"
    assert refusal(tmp_path / "file" / "x") == "it cannot be read: Not a directory; check its path"
    assert refusal(tmp_path / "loop").startswith("it cannot be read: Too many levels of symbolic links")
    assert refusal(Path("a\0b")) == "its name holds a NUL character; correct the name"


def test_pipes_sockets_and_devices_are_refused_at_once(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path)
        listener.bind("socket")
        for path in (tmp_path / "pipe", tmp_path / "socket", Path("/dev/zero"), Path("/dev/tty")):
            assert refusal(path) == "this is a pipe, socket or device; name a file"


def test_a_pipe_put_in_the_place_of_a_file_does_not_make_it_wait(tmp_path, monkeypatch):
    path = tmp_path / "engines.yaml"
    os.mkfifo(path)
    ordinary = Path(__file__).stat()
    monkeypatch.setattr(Path, "stat", lambda _self: ordinary)
    assert refusal(path) == "this is a pipe, socket or device; name a file"


def test_a_file_that_may_not_be_read_says_for_whom():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "f").write_text("a: 1\n")
        (folder / "f").chmod(0)
        code = f"""
import os, pathlib
from sage_reconcile.host import documents
from sage_reconcile.errors import FileFaults
if os.geteuid() == 0:
    os.seteuid(65534)
try:
    documents.read(pathlib.Path({str(folder / "f")!r}))
except FileFaults as error:
    print(os.geteuid(), error)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    user, said = done.stdout.strip().split(" ", 1)
    assert said == f"{folder / 'f'}: user {user} may not read it; allow that for the file and its folders"


def test_too_large_a_file_is_refused_by_its_size_and_not_read(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(b"a: 1\n" + b"#" * (MAX_BYTES - 5))
    assert read(path).data == {"a": 1}
    with path.open("ab") as stream:
        stream.write(b"#")
    message = "the file has 1,048,577 bytes, and the limit is 1,048,576 (1 MiB); check that it is the right file"
    assert refusal(path) == message
    assert faults_of(path.read_bytes()) == [f"f: {message}"]
    os.truncate(path, 1 << 40)
    monkeypatch.setattr(documents.os, "open", lambda *_args: pytest.fail("a file of 1 TiB was opened"))
    assert "1,099,511,627,776 bytes" in refusal(path)


def test_a_file_that_grows_while_it_is_read_is_not_cut_off_silently(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(b"a: 1\n" + b"#" * (MAX_BYTES - 4))
    small = Path(__file__).stat()
    monkeypatch.setattr(Path, "stat", lambda _self: small)
    monkeypatch.setattr(documents.os, "fstat", lambda _descriptor: small)
    assert refusal(path).startswith("the file has 1,048,577 bytes")


def test_an_env_file_is_read_as_docker_and_systemd_do(tmp_path):
    (tmp_path / "env").write_bytes(
        b"\xef\xbb\xbf# a comment\r\n; another\n\n  A=1\nexport  B=two words \n"
        b'C=\'single $x \\n # in\' # out\nD="a \\"b\\" \\\\ \\$x \\n"\nE=\nF=a#b=\'c\'\nG=""\n'
        b"H= padded\nA=last\nI=''\nexport=1\nJ={\"x\": 1}"
    )
    assert read_env_file(tmp_path / "env") == {
        "A": "last",
        "B": "two words",
        "C": "single $x \\n # in",
        "D": 'a "b" \\ $x \\n',
        "E": "",
        "F": "a#b='c'",
        "G": "",
        "H": "padded",
        "I": "",
        "export": "1",
        "J": '{"x": 1}',
    }


def test_every_bad_line_of_an_env_file_is_told_without_its_content(tmp_path):
    path = tmp_path / "env"
    lines = ("s3cret", "  1A=s3cret", "A = s3cret", "B='s3cret", 'C="s3cret" x', "D=s3cret # x", "E= # x")
    path.write_text("\n".join((*lines, "export ", "=s3cret")))
    with pytest.raises(FileFaults) as caught:
        read_env_file(path)
    assert "s3cret" not in str(caught.value)
    assert [(fault.line, fault.column, fault.message) for fault in caught.value.faults] == [
        (1, 1, "this line has no `=`"),
        (2, 3, "no name before `=`"),
        (3, 1, "no name before `=`"),
        (4, 1, "the quoted value does not end with the line"),
        (5, 1, "the quoted value does not end with the line"),
        (6, 1, "` #` in an unquoted value"),
        (7, 1, "` #` in an unquoted value"),
        (8, 1, "this line has no `=`"),
        (9, 1, "no name before `=`"),
    ]


def test_an_env_file_is_refused_like_any_other_file(tmp_path):
    cases = ((b"A=\xff", "0xFF is not"), (b"A=\0", "invisible"), (b"#" * (MAX_BYTES + 1), "1 MiB"))
    for content, message in cases:
        (tmp_path / "env").write_bytes(content)
        with pytest.raises(FileFaults, match=message):
            read_env_file(tmp_path / "env")
    with pytest.raises(FileFaults, match="write it, or correct its name"):
        read_env_file(tmp_path / "none")


@pytest.mark.parametrize(
    "line",
    ["A= " + " " * 500_000 + "x #", "A=" + "a " * 500_000 + "#", 'A="' + "\\" * 999_999, "A=" + " " * 900_000],
    ids=range(4),
)
def test_every_line_of_an_env_file_comes_to_an_end(line, tmp_path):
    (tmp_path / "env").write_text(line)

    def work():
        with contextlib.suppress(FileFaults):
            read_env_file(tmp_path / "env")

    work()
