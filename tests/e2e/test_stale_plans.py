"""A plan that was shown is carried out only if file and machine are as they were; else it is shown anew."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.box import Box

SIMULATED = "runtime: simulator, model: a/b-7B, device: cpu"
HOST = "gpus: none"


def engines(*names: str) -> str:
    return "\n".join(f"{name}: {{{SIMULATED}}}" for name in names)


def answered(box: Box, *words: str, at_question: list[Callable[[], Any]], **environ: str) -> tuple[int, str]:
    """A command on a terminal: at each question something happens first, then a person says yes."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "sage_reconcile", *words]
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen(command, cwd=box.folder, env={**box.environ, **environ}, **streams) as asked:
        os.close(theirs)
        text, questions = "", 0
        with contextlib.suppress(OSError):  # what a terminal says when its last user is gone
            while chunk := os.read(ours, 65536).decode():
                text += chunk
                if text.count("[y/N]") > questions:
                    (at_question[questions] if questions < len(at_question) else lambda: None)()
                    questions += 1
                    os.write(ours, b"y\n")
        os.close(ours)
    assert "Traceback" not in text, text
    return asked.returncode, text


def asked(box: Box) -> int:
    return int(json.loads((box.state / "status.json").read_text(encoding="utf-8"))["asked"])


def test_a_file_edited_while_the_question_is_open_is_shown_anew(box: Box) -> None:
    box.write(engines("chat"), HOST)
    code, text = answered(box, "apply", at_question=[lambda: box.write(engines("code"), HOST)])
    assert code == 0, text
    assert "The file has changed since the plan was shown; this is the plan now:" in text
    assert text.count("[y/N]") == 2
    assert set(box.ready()) == {"code/0"}
    assert len(box.records()) == 1, "nothing of the plan that was shown first was done"


def test_a_file_that_is_broken_while_the_question_is_open_changes_nothing(box: Box) -> None:
    box.write(engines("chat"), HOST)
    code, text = answered(box, "apply", at_question=[lambda: box.file.write_text("{", encoding="utf-8")])
    assert (code, "engines.yaml:2:" in text) == (1, True), text
    assert not box.records()


def test_a_machine_that_changed_while_the_question_is_open_is_shown_anew(box: Box) -> None:
    box.write(engines("chat"), HOST)
    box.run("apply", "--yes")
    pid = box.ready()["chat/0"]
    box.write(engines("chat", "code"), HOST)

    def died() -> None:
        os.kill(pid, signal.SIGKILL)
        box.until("its end is seen", lambda: box.replicas()["chat/0"]["phase"] in ("Stopping", "Pending"))

    code, text = answered(box, "apply", at_question=[died])
    assert code == 0, text
    assert "The machine has changed since the plan was shown; this is the plan now:" in text
    assert "= chat/0" in text.partition("[y/N]")[0]
    assert "= chat/0" not in text.partition("this is the plan now")[2].partition("[y/N]")[0]
    assert text.count("[y/N]") == 2
    assert set(box.ready()) == {"chat/0", "code/0"}


def test_down_too_asks_again_where_more_runs_than_was_shown(box: Box) -> None:
    box.write(engines("chat"), HOST)
    box.run("apply", "--yes")

    def more() -> None:
        box.write(engines("chat", "code"), HOST)
        box.run("apply", "--yes")

    code, text = answered(box, "down", at_question=[more])
    assert code == 0, text
    assert text.count("Stop them?") == 2
    assert not box.processes()


def test_a_plan_that_never_stays_the_same_is_given_up_with_nothing_done(box: Box) -> None:
    box.write(engines("chat"), HOST)
    edits = [lambda n=number: box.write(engines(f"chat-{n}"), HOST) for number in range(9)]
    code, text = answered(box, "apply", at_question=edits)
    assert code == 1
    assert "the plan was another one each of 5 times" in text
    assert not box.records()


def test_a_value_from_the_environment_is_part_of_the_file(box: Box) -> None:
    """An env_file has another content when the question is answered."""
    (box.folder / "chat.env").write_text("TOKEN=one\n", encoding="utf-8")
    box.write(f"chat: {{{SIMULATED}, env_file: chat.env}}", HOST)
    edit = [lambda: (box.folder / "chat.env").write_text("TOKEN=two\n", encoding="utf-8")]
    code, text = answered(box, "apply", at_question=edit)
    assert code == 0, text
    assert text.count("[y/N]") == 2


def test_the_daemon_takes_a_yes_for_the_very_content_that_was_shown(box: Box) -> None:
    """Held back is one content; it is edited to a worse one while the question is open."""
    box.write(engines("a", "b", "c", "d"), HOST)
    box.start_daemon()
    box.until("all are ready", lambda: len(box.ready()) == 4)
    box.write(engines("a"), HOST)
    box.until("it is held back", lambda: box.status()["held_back"])
    running: list[set[str]] = []

    def worse() -> None:
        box.write("", HOST)
        box.until("the other one is held back", lambda: len(box.status()["held_back"]["replicas"]) == 4)

    def look() -> None:
        running.append(set(box.ready()))
        box.write(engines("a", "b"), HOST)
        box.until("this one needs no word", lambda: set(box.replicas()) == {"a/0", "b/0"})

    code, text = answered(box, "apply", at_question=[worse, look])
    assert code == 0, text
    assert running == [{"a/0", "b/0", "c/0", "d/0"}], "the yes was for another content"
    assert "The daemon has read another content of the file since the plan was shown" in text
    assert set(box.ready()) == {"a/0", "b/0"}


def test_the_daemon_takes_a_yes_for_the_very_plan_that_was_shown(box: Box) -> None:
    """An engine that the confirmed content keeps has died meanwhile, and could not be started again yet."""
    box.write(engines("a", "b", "c", "d"), HOST)
    box.start_daemon()
    box.until("all are ready", lambda: len(box.ready()) == 4)
    box.write(engines("a"), HOST)
    box.until("it is held back", lambda: box.status()["held_back"])
    before = box.ready()

    def died() -> None:
        os.kill(before["a/0"], signal.SIGKILL)
        box.until("it is healed", lambda: len(box.ready()) == 4 and box.ready() != before)

    code, text = answered(box, "apply", at_question=[died])
    assert code == 0, text
    assert "The machine has changed since the plan was shown; this is the plan now:" in text
    assert text.count("[y/N]") == 2
    assert set(box.ready()) == {"a/0"}


@pytest.mark.parametrize("wrong", ["digest", "plan", "values"])
def test_a_word_that_is_not_of_this_file_plan_and_values_confirms_nothing(box: Box, wrong: str) -> None:
    box.write(engines("a", "b", "c"), HOST)
    daemon = box.start_daemon()
    box.until("all are ready", lambda: len(box.ready()) == 3)
    box.write("", HOST)
    box.until("it is held back", lambda: box.status()["held_back"])
    code = (
        "import json, os, signal, sys\nfrom pathlib import Path\nfrom sage_reconcile.host import files\n"
        "from sage_reconcile.core.resolve import values_mark\nfrom sage_reconcile.host.local import LocalHost\n"
        "from sage_reconcile.host.state import StateFolder, Word\nfrom sage_reconcile.reconcile import look\n"
        "file, state, pid, wrong = Path(sys.argv[1]), StateFolder(Path(sys.argv[2])), sys.argv[3], sys.argv[4]\n"
        "desired = files.load(file, os.environ).desired\n"
        "seen = look(LocalHost(state, file.parent, os.environ), desired, tried=frozenset())\n"
        "word = {'digest': desired.digest, 'values': values_mark(desired, pid), 'plan': seen.plan.mark()}\n"
        "word |= {wrong: 'another'} if wrong else {}\n"
        "state.leave_word(Word(**word))\nos.kill(int(pid), signal.SIGHUP)\n"
    )

    def say(wrong: str) -> None:
        before = asked(box)
        subprocess.run(
            [sys.executable, "-c", code, str(box.file), str(box.state), str(daemon.pid), wrong],
            env=box.environ,
            check=True,
            timeout=60,
        )
        box.until("it is heard", lambda: asked(box) > before)

    say(wrong)
    assert box.status()["held_back"]
    assert len(box.ready()) == 3
    os.kill(daemon.pid, signal.SIGHUP)  # a bare request to look again confirms nothing either
    box.until("it is heard", lambda: asked(box) > 1)
    assert len(box.ready()) == 3
    say("")
    box.until("all are gone", lambda: not box.replicas())
