"""``engine …``: every verb edits the file and nothing else; what follows the file does the rest."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from referencing import Registry, Resource

from tests.e2e.box import REPOSITORY, Box

SIMULATED = "runtime: simulator, model: a/b-7B, memory: 20GiB"
DEFAULTS = "defaults: {runtime: simulator, memory: 20GiB}"


def checked(document: Any, name: str) -> Any:
    schemas = {path.name: json.loads(path.read_text()) for path in (REPOSITORY / "schemas").glob("*.json")}
    registry: Any = Registry().with_resources((key, Resource.from_contents(text)) for key, text in schemas.items())
    schema = schemas[f"{name}.schema.json"]
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema, registry=registry).validate(document)
    return document


def write(box: Box, *engines: str) -> str:
    """A file with comments that nobody wants to lose."""
    lines = [
        "# ours, by hand",
        "version: 1",
        f"host: {{gpus: 2xH100-80GB, ports: {box.ports}}}  # simulated",
        f"{DEFAULTS}  # for all",
        "engines:" + ("" if engines else " {}"),
        *(f"  {line}" for line in engines),
        "# the end",
        "",
    ]
    box.file.write_text("\n".join(lines))
    return box.file.read_text()


def edit(box: Box, *words: str, expect: int = 0) -> Any:
    return checked(box.json("engine", *words, expect=expect), "engine-edit")


def comments(text: str) -> list[str]:
    return re.findall(r"#[^\n]*", text)


def test_an_engine_from_start_to_removal_with_the_daemon(box: Box) -> None:
    """start, list, show, scale, restart of one replica, set, stop, start again, remove: each done when it returns."""
    before = write(box)
    daemon = box.start_daemon()
    box.until("the daemon is up", lambda: box.status()["daemon"])
    started = edit(box, "start", "Qwen/Qwen3-8B", "--replicas", "2", "--arg", "max-model-len=4096", "--wait")
    assert (started["engine"], started["added"], started["daemon"]["pid"]) == ("qwen3-8b", True, daemon.pid)
    assert started["status"]["ready"] == 2
    first = box.ready()
    assert set(first) == {"qwen3-8b/0", "qwen3-8b/1"}

    listed = checked(box.json("engine", "list"), "engine-list")
    assert [(row["name"], row["ready"]) for row in listed["engines"]] == [("qwen3-8b", 2)]
    assert "Qwen/Qwen3-8B" in box.run("engine", "list")
    shown = checked(box.json("engine", "show", "qwen3-8b"), "engine-show")
    assert (shown["spec"]["memory"], shown["spec"]["args"]) == ("20GiB", {"max-model-len": 4096})
    assert "max-model-len" in box.run("engine", "show", "qwen3-8b")

    edit(box, "restart", "qwen3-8b", "--replica", "1", "--wait")
    second = box.ready()
    assert second["qwen3-8b/0"] == first["qwen3-8b/0"]
    assert second["qwen3-8b/1"] != first["qwen3-8b/1"]
    edit(box, "scale", "qwen3-8b", "3", "--wait")
    third = box.ready()
    assert {name: third[name] for name in second} == second, "none was restarted for it"
    edit(box, "restart", "qwen3-8b", "--wait")
    assert not set(box.ready().values()) & set(third.values())
    assert len(box.ready()) == 3

    changed = edit(box, "set", "qwen3-8b", "memory=24GiB", "args.max-model-len=", "--wait")
    assert {"field": "memory", "old": "20GiB", "new": "24GiB"} in changed["changes"]
    assert {"field": "args.max-model-len", "old": "4096", "new": ""} in changed["changes"]
    assert box.replicas()["qwen3-8b/0"]["memory_mib"] == 24 * 1024

    held = box.run("engine", "stop", "qwen3-8b", "--wait", expect=1)
    assert "the daemon holds it back: it would stop 3 of the 3 running replicas" in held
    assert len(box.ready()) == 3
    box.run("apply", "--yes")
    stopped = edit(box, "stop", "qwen3-8b", "--wait")
    assert stopped["status"]["replicas"] == []
    assert not box.processes()
    assert "    replicas: 0  # was 3\n" in box.file.read_text()
    assert edit(box, "start", "qwen3-8b", "--wait")["status"]["ready"] == 3
    box.run("engine", "stop", "qwen3-8b")
    box.run("apply", "--yes")
    removed = edit(box, "stop", "qwen3-8b", "--remove", "--wait")
    assert (removed["removed"], removed["status"]) == (True, None)
    assert box.file.read_text() == before, "not a trace is left in the file"
    assert not box.processes()


def test_what_fails_or_has_no_place_ends_the_waiting(box: Box) -> None:
    write(box, f"chat: {{{SIMULATED}}}")
    box.start_daemon()
    box.until("ready", box.ready)
    text = box.run("engine", "start", "x/bad-1B", "--arg", "simulate-fail=load", "--wait", expect=1)
    assert "bad-1b/0 is Stalled" in text
    assert "Engine core initialization failed" in text
    document = edit(box, "start", "x/large-1B", "--memory", "75GiB", "--replicas", "2", "--wait", expect=3)
    assert [row["unplaced"] for row in document["status"]["replicas"]] == [False, True]
    edit(box, "stop", "bad-1b", "--remove", "--wait")
    assert set(box.ready()) == {"chat/0", "large-1b/0"}


def test_without_a_daemon_the_edit_is_made_and_said_to_wait_for_apply(box: Box) -> None:
    before = write(box, f"chat: {{{SIMULATED}}}  # mine")
    refused = box.run("engine", "scale", "chat", "2", "--wait", expect=1)
    assert "nothing was written: no daemon follows engines.yaml" in refused
    assert "`sage-reconcile apply`" in refused
    assert box.file.read_text() == before
    said = box.run("engine", "scale", "chat", "2")
    assert said == (
        "note: no daemon follows engines.yaml; nothing changes on the machine until `sage-reconcile apply`, or "
        "`sage-reconcile run`\n"
    ), "and nothing on standard output"
    assert box.file.read_text() == before.replace("20GiB}  # mine", "20GiB, replicas: 2}  # mine")
    assert box.run("engine", "scale", "chat", "2") == "", "it is so already: nothing to say"
    box.run("apply", "--yes")
    assert set(box.ready()) == {"chat/0", "chat/1"}
    other = box.folder / "other.yaml"
    other.write_text(before)
    daemon = box.start_daemon()
    box.until("the daemon is up", lambda: box.status()["daemon"])
    said = box.run("engine", "stop", "chat", "-f", str(other))
    assert f"the daemon (pid {daemon.pid}) follows {box.file}, not other.yaml" in said
    assert set(box.ready()) == {"chat/0", "chat/1"}


def test_a_try_shows_the_change_and_the_plan_and_writes_nothing(box: Box) -> None:
    before = write(box, f"chat: {{{SIMULATED}}}")
    text = box.run("engine", "start", "x/y-1B", "--memory", "30GiB", "--dry-run")
    assert "--- engines.yaml (now)\n+++ engines.yaml\n" in text
    assert "\n+  y-1b:\n+    model: x/y-1B\n+    memory: 30GiB\n" in text
    assert re.search(r"^\+ y-1b/0 +start +GPU \d", text, re.MULTILINE)
    document = edit(box, "scale", "chat", "9", "--dry-run", expect=3)
    assert document["plan"]["unplaced"]
    assert document["changed"]
    assert box.run("engine", "scale", "chat", "1", "--dry-run").startswith("chat: the file says so already.\n")
    assert box.file.read_text() == before
    assert not box.state.exists() or not (box.state / "generation.json").exists()
    assert "nothing would come" in box.run("engine", "stop", "chat", "--dry-run", "--wait", expect=64)


def test_secrets_are_not_shown(box: Box) -> None:
    write(box, "chat:", "  model: a/b-7B", "  env:", "    HF_TOKEN: hf_Literal", "    OTHER: ${OTHER:-}")
    for words in (("env.HF_TOKEN=hf_Another",), ("memory=2GiB", "env.NEW=hf_Another"), ("env.HF_TOKEN=",)):
        for form in (("--dry-run",), ("--dry-run", "-o", "json"), ("-o", "json"), ()):
            said = box.run("engine", "set", "chat", *words, *form)
            assert "hf_" not in said
        assert "hf_" not in box.run("engine", "show", "chat") + box.run("engine", "show", "chat", "-o", "json")
    text = box.file.read_text()
    assert "hf_Literal" not in text
    assert "NEW: hf_Another" in text
    write(box, "chat: {model: a/b-7B, env: {T: hf_Literal, U: '${U:-hf_Default}'}}")
    said = box.run("engine", "set", "chat", "env.T=hf_2", "env.B=true", "--dry-run")
    assert "T: (hidden, another value), U: (hidden), B: (hidden)" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["start", "x/y", "--name", "../../etc/x"], "cannot be the name of an engine"),
        (["start", "x/y", "--name", "a: {model: m}\n  b"], "cannot be the name of an engine"),
        (["start", "x/y", "--name", "a/0"], "cannot be the name of an engine"),
        (["start", "--", "--trust-remote-code"], "would be taken for a flag"),
        (["start", "x/y", "--arg", "api-key=s3cret"], "use `env:` with VLLM_API_KEY"),
        (["start", "x/y", "--arg", "port=1"], "use the field `port`"),
        (["start", "x/y", "--port", "http"], "expected a port"),
        (["start", "x/y", "--gpus", "0,0"], "GPU 0 is listed twice"),
        (["start", "..."], "give one with --name"),
        (["set", "chat", "env.LD PRELOAD=x"], "is not the name of an environment variable"),
        (["set", "chat", "memory.x=1"], "only `args` and `env` have parts"),
        (["set", "chat", "modell=x"], "did you mean `model`?"),
        (["set", "chat", "model="], "field `model` is missing"),
        (["set", "chat", "model=null"], None),
        (["set", "chat", "args.x=*alias"], None),
        (["set", "chat", "model=a\nengines: {}"], None),
        (["stop", "chta"], "did you mean chat?"),
        (["restart", "chat", "--replica", "4"], "chat has no replica 4; it has only 0"),
    ],
)
def test_what_makes_no_sense_is_refused_and_what_does_arrives_as_it_is(
    box: Box, words: list[str], told: str | None
) -> None:
    before = write(box, f"chat: {{{SIMULATED}}}")
    if told is None:
        box.run("engine", *words)
        path, _, value = words[2].partition("=")
        entry = yaml.safe_load(box.file.read_text())["engines"]["chat"]
        assert (entry["args"]["x"] if path == "args.x" else entry["model"]) == value
    else:
        assert told in box.run("engine", *words, expect=1)
        assert box.file.read_text() == before


def test_many_commands_at_once_all_count_and_comments_stay(box: Box) -> None:
    """Commands, and a person who saves by rename between them."""
    before = write(box, f"chat: {{{SIMULATED}}}  # mine")
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "sage_reconcile", "engine", *words],
            cwd=box.folder,
            env=box.environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for words in [["start", f"x/m{number}-1B"] for number in range(6)]
        + [["set", "chat", f"args.a{number}={number}"] for number in range(6)]
    ]
    assert [process.wait(120) for process in running] == [0] * 12
    text = box.file.read_text()
    data = yaml.safe_load(text)
    assert set(data["engines"]) == {"chat", *(f"m{number}-1b" for number in range(6))}
    assert data["engines"]["chat"]["args"] == {f"a{number}": number for number in range(6)}
    assert comments(text) == comments(before)


def in_a_terminal(box: Box, *words: str, **environ: str) -> str:
    """What a command prints on a terminal."""
    parent, child = pty.openpty()
    environment = {key: value for key, value in box.environ.items() if key != "NO_COLOR"} | environ
    done = subprocess.Popen(
        [sys.executable, "-m", "sage_reconcile", *words], cwd=box.folder, env=environment, stdout=child, stderr=child
    )
    os.close(child)
    text = b""
    try:
        while piece := os.read(parent, 65536):
            text += piece
    except OSError:  # the other end is closed
        pass
    os.close(parent)
    assert done.wait(60) == 0
    return text.decode().replace("\r\n", "\n")


def test_colours_and_words_are_for_terminals_only(box: Box) -> None:
    write(box, f"chat: {{{SIMULATED}}}")
    words = ("engine", "scale", "chat", "2", "--dry-run")
    assert "\033[32m" in in_a_terminal(box, *words, TERM="xterm")
    assert "\033[" not in in_a_terminal(box, *words, TERM="xterm", NO_COLOR="1")
    assert "\033[" not in box.run(*words, NO_COLOR="")
    assert "chat: replicas: 1 -> 2\n" in in_a_terminal(box, "engine", "scale", "chat", "2", NO_COLOR="1")
    assert "chat: the file says so already\n" in in_a_terminal(box, "engine", "scale", "chat", "2", NO_COLOR="1")
    assert box.run("engine", "start", "x/New-1B").startswith("new-1b\n"), "a script wants the name"


def completed(box: Box, line: str) -> list[str]:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("sage-reconcile"))],
        cwd=box.folder,
        env={
            **box.environ,
            "_SAGE_RECONCILE_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_a_shell_completes_names_and_fields(box: Box) -> None:
    write(box, f"chat: {{{SIMULATED}, args: {{max-model-len: 1}}}}", f"code: {{{SIMULATED}}}")
    assert completed(box, "sage-reconcile engine stop c") == ["chat", "code"]
    assert completed(box, "sage-reconcile engine set ch") == ["chat"]
    assert completed(box, "sage-reconcile engine set chat memo") == ["memory="]
    assert completed(box, "sage-reconcile engine set chat args.m") == ["args.max-model-len="]
    box.file.write_text("version: [")
    assert completed(box, "sage-reconcile engine stop c") == [], "and no error in the middle of typing"
