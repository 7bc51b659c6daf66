"""The commands as a person uses them, with real processes of the simulator."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.e2e.box import REPOSITORY, Box

SIMULATED = "runtime: simulator, model: a/b-7B, memory: 20GiB"


def chat(port: int, model: str) -> str:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}]}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def test_the_quickstart_ends_with_a_table_a_curl_that_works_and_how_to_stop(box: Box) -> None:
    example = (REPOSITORY / "examples/quickstart/engines.yaml").read_text(encoding="utf-8")
    box.file.write_text(re.sub(r"ports: \d+-\d+", f"ports: {box.ports}", example), encoding="utf-8")
    text = box.run("apply", "--yes")
    assert all(f"{name} " in text for name in ("chat/0", "code/0", "embed/0", "embed/1"))
    curl = next(line.strip() for line in text.splitlines() if line.strip().startswith("curl"))
    answer = json.loads(subprocess.run(["/bin/sh", "-c", curl], capture_output=True, check=True, timeout=20).stdout)
    assert answer["choices"][0]["message"]["content"]
    status = box.status()
    assert status["converged"]
    assert {engine["name"]: engine["ready"] for engine in status["engines"]} == {"chat": 1, "code": 1, "embed": 2}
    stop = next(line.strip() for line in text.splitlines() if "sage_reconcile down" in line)
    subprocess.run(["/bin/sh", "-c", stop], check=True, capture_output=True, env=box.environ, cwd=box.folder)
    assert not box.processes()


def test_a_second_apply_does_nothing_and_diff_says_in_sync(box: Box) -> None:
    box.write(f"chat: {{{SIMULATED}}}")
    plan = box.json("diff", expect=2)
    assert [(action["kind"], action["replica"]) for action in plan["actions"]] == [("spawn", "chat/0")]
    box.run("apply", "--yes")
    before = box.ready()
    assert box.json("diff")["in_sync"]
    box.run("apply", "--yes")
    assert box.ready() == before


def test_what_the_plan_said_is_what_runs(box: Box) -> None:
    box.write(f"chat: {{{SIMULATED}, tensor_parallel_size: 2}}\ncode: {{{SIMULATED}, replicas: 2}}")
    planned = {
        action["replica"]: (action["gpus"], action["memory_mib"], action["port"])
        for action in box.json("diff", expect=2)["actions"]
    }
    box.run("apply", "--yes")
    assert {n: (r["gpus"], r["memory_mib"], r["port"]) for n, r in box.replicas().items()} == planned
    gpus = box.status()["gpus"]
    assert [gpu["memory_promised_mib"] for gpu in gpus] == [61440, 20480]
    assert [gpu["unmanaged_mib"] for gpu in gpus] == [0, 0]
    assert [round(gpu["memory_used_mib"] / 1024) for gpu in gpus] == [60, 20]


@pytest.mark.parametrize("surge", [0, 1])
def test_a_changed_argument_replaces_that_engine_only(box: Box, surge: int) -> None:
    """Stopped first it keeps its port; started beside its old process it gets another."""
    box.write(f"chat: {{{SIMULATED}}}\ncode: {{{SIMULATED}}}")
    box.run("apply", "--yes")
    before, ports = box.ready(), {name: row["port"] for name, row in box.replicas().items()}
    changed = f"{SIMULATED}, max_surge: {surge}, args: {{max-model-len: 4096}}"
    box.write(f"chat: {{{changed}}}\ncode: {{{SIMULATED}}}")
    text = box.run("diff", expect=2)
    assert "args.max-model-len: (not set) -> 4096" in text
    box.run("apply", "--yes")
    after = box.ready()
    assert after["code/0"] == before["code/0"]
    assert after["chat/0"] != before["chat/0"]
    now = {name: row["port"] for name, row in box.replicas().items()}
    assert (now["code/0"], now["chat/0"] == ports["chat/0"]) == (ports["code/0"], not surge)
    assert "4096" in Path(f"/proc/{after['chat/0']}/cmdline").read_text(encoding="utf-8").split("\0")


def test_what_the_file_no_longer_names_is_stopped_with_all_its_processes(box: Box) -> None:
    box.write(f"chat: {{{SIMULATED}, tensor_parallel_size: 2}}")
    box.run("apply", "--yes")
    assert len(box.processes()) >= 4  # shell, server, core, workers
    box.write("")
    box.run("apply", "--yes")
    assert not box.processes()
    assert all(gpu["memory_used_mib"] == 0 for gpu in box.status()["gpus"])


def test_what_has_no_place_is_refused_in_numbers_and_the_rest_runs(box: Box) -> None:
    box.write(f"big: {{{SIMULATED}, memory: 81GiB}}\nchat: {{{SIMULATED}}}".replace("memory: 20GiB, memory", "memory"))
    assert "needs 81.0GiB on 1 GPU" in box.run("diff", expect=3)
    text = box.run("apply", "--yes", expect=3)
    assert "1 cannot be placed" in text
    assert set(box.ready()) == {"chat/0"}


def test_an_engine_that_cannot_start_ends_apply_with_its_log(box: Box) -> None:
    box.write(f"bad: {{{SIMULATED}, args: {{simulate-fail: load}}}}\nchat: {{{SIMULATED}}}")
    text = box.run("apply", "--yes", expect=1)
    assert "bad/0 is Stalled" in text
    assert "Engine core initialization failed" in text
    assert set(box.ready()) == {"chat/0"}
    assert not box.json("diff", expect=2)["in_sync"]


def test_leftovers_of_a_killed_server_are_reaped_before_it_is_started_again(box: Box) -> None:
    box.write(f"chat: {{{SIMULATED}, tensor_parallel_size: 2, memory: 60GiB}}".replace("memory: 20GiB, ", ""))
    box.run("apply", "--yes")
    old = set(box.processes())
    os.kill(box.ready()["chat/0"], signal.SIGKILL)
    box.until("the leader is gone", lambda: "chat/0" not in box.ready())
    assert set(box.processes()) & old, "the core and its workers outlive a killed server"
    box.run("apply", "--yes")
    assert not set(box.processes()) & old
    assert set(box.ready()) == {"chat/0"}


def test_without_a_terminal_apply_wants_yes_and_does_nothing(box: Box) -> None:
    box.write(f"chat: {{{SIMULATED}}}")
    assert "--yes" in box.run("apply", expect=1)
    assert not box.processes()


def test_a_bad_file_changes_nothing_and_names_line_and_column(box: Box) -> None:
    box.write(f"chat: {{{SIMULATED}}}")
    box.run("apply", "--yes")
    before = box.ready()
    box.write(f"chat: {{{SIMULATED}, tensor_paralell_size: 2}}\nother: 3")
    for command in (["validate"], ["diff"], ["apply", "--yes"]):
        text = box.run(*command, expect=1)
        assert "unknown field `tensor_paralell_size`; did you mean `tensor_parallel_size`?" in text
        assert re.search(r"engines\.yaml:\d+:\d+: engines\.other: expected a map", text)
    assert box.ready() == before


def test_secrets_are_nowhere_to_be_seen_but_reach_the_engine(box: Box) -> None:
    (box.folder / "more.env").write_text("FROM_FILE=file-s3cret\n", encoding="utf-8")
    box.write(f"chat: {{{SIMULATED}, env: {{TOKEN: '${{TOKEN}}', OTHER: literal-s3cret}}, env_file: more.env}}")
    seen = [box.run("diff", expect=2, TOKEN="env-s3cret"), box.run("diff", "-o", "json", expect=2, TOKEN="env-s3cret")]
    seen += [box.run("apply", "--yes", TOKEN="env-s3cret"), box.run("status", "-o", "json", TOKEN="env-s3cret")]
    pid = box.ready_with(TOKEN="env-s3cret")["chat/0"]
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert {b"TOKEN=env-s3cret", b"OTHER=literal-s3cret", b"FROM_FILE=file-s3cret"} <= set(environment)
    seen += [path.read_text(encoding="utf-8") for path in (box.state / "launches").iterdir()]
    seen += [path.read_text(encoding="utf-8") for path in (box.state / "logs").rglob("*.log")]
    seen += [Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")]
    assert not [text for text in seen if re.search("(env|literal|file)-s3cret", text)]
    text = box.run("diff", expect=2, TOKEN="env-another")
    assert "env.TOKEN: (hidden) -> (hidden), another value" in text
    assert "another\n" not in text


def test_a_port_that_a_stranger_has_bound_and_does_not_listen_on_is_passed_over(box: Box) -> None:
    """As another vLLM does while it loads: both could bind it, and the second would fail minutes later."""
    low = int(box.ports.split("-")[0])
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", low))
        box.write(f"chat: {{{SIMULATED}}}")
        box.run("apply", "--yes")
        assert box.replicas()["chat/0"]["port"] == low + 1
        box.write(f"chat: {{{SIMULATED}}}\nfixed: {{{SIMULATED}, port: {low}}}")
        text = box.run("apply", "--yes", expect=None)
        assert f"port {low} " in text
        assert "taken by" in text
        assert set(box.ready()) == {"chat/0"}
    box.run("apply", "--yes")
    assert box.replicas()["fixed/0"]["port"] == low
    assert set(box.ready()) == {"chat/0", "fixed/0"}


def test_a_stranger_on_the_port_is_passed_over_and_named(box: Box) -> None:
    low = int(box.ports.split("-")[0])
    server = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(low), "--bind", "127.0.0.1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        box.write(f"chat: {{{SIMULATED}}}\nfixed: {{{SIMULATED}, port: {low}}}")
        box.until("the stranger listens", lambda: f"port {low} is taken by" in box.run("diff", expect=None))
        plan = box.json("diff", expect=3)
        assert f"pid {server.pid}" in plan["unplaced"][0]["reason"]
        assert [action["port"] for action in plan["actions"]] == [low + 1]
    finally:
        server.kill()
        server.wait()


def test_logs_and_their_follow(box: Box) -> None:
    box.write(f"chat: {{{SIMULATED}}}")
    box.run("apply", "--yes")
    assert "Application startup complete" in box.run("logs", "chat")
    assert box.run("logs", "chat/0", "-n", "1").count("\n") == 1
    text = box.run("logs", "nobody", expect=1)
    assert "nobody has no log" in text
    assert "the file names chat" in text


@pytest.mark.parametrize("words", [["diff", "--nonsense"], ["nonsense"], ["diff", "-o", "xml"], ["logs"]])
def test_wrong_usage_exits_64(box: Box, words: list[str]) -> None:
    box.write("")
    box.run(*words, expect=64)


def test_simulated_gpus_run_no_real_engine(box: Box) -> None:
    box.write("real: {model: a/b-7B}")
    text = box.run("apply", "--yes", expect=3)
    assert "only `runtime: simulator` runs on them" in text


def test_init_writes_a_file_that_works_here(box: Box) -> None:
    text = box.run("init")
    assert "Wrote" in text
    assert "is valid: 1 engine" in box.run("validate")
    assert "is there already" in box.run("init", expect=1)
    content = box.file.read_text(encoding="utf-8")
    box.file.write_text(content.replace("host:\n", f"host:\n  ports: {box.ports}\n", 1), encoding="utf-8")
    box.run("apply", "--yes")
    assert box.status()["converged"]
    assert chat(next(iter(box.replicas().values()))["port"], "chat")


def on_a_terminal(box: Box, answer: str) -> tuple[int, str]:
    """``apply`` on a terminal where a person types an answer to its question."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "sage_reconcile", "apply"]
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen(command, cwd=box.folder, env=box.environ, **streams) as asked:
        os.close(theirs)
        text, answered = "", False
        with contextlib.suppress(OSError):  # what a terminal says when its last user is gone
            while chunk := os.read(ours, 65536).decode():
                text += chunk
                if "[y/N]" in text and not answered:
                    answered = True
                    os.write(ours, f"{answer}\n".encode())
        os.close(ours)
    return asked.returncode, text


def test_on_a_terminal_apply_asks_and_takes_no_for_an_answer(box: Box) -> None:
    box.write(f"chat: {{{SIMULATED}}}")
    code, text = on_a_terminal(box, "n")
    assert (code, "Do this? [y/N]" in text) == (1, True)
    assert not box.processes()
    code, text = on_a_terminal(box, "y")
    assert code == 0, text
    assert set(box.ready()) == {"chat/0"}
    code, text = on_a_terminal(box, "must not be asked")
    assert (code, "[y/N]" in text) == (0, False)


def test_ctrl_c_ends_apply_in_the_middle_of_its_work(box: Box) -> None:
    """Sent while passes are busy: Python 3.11 can lose it there."""
    on_cpu = "runtime: simulator, model: a/b-7B, device: cpu, replicas: 12"
    box.write(f"chat: {{{on_cpu}}}", "gpus: none")
    box.run("apply", "--yes")
    for seconds, after_s in ((3.1, 0.5), (3.2, 0.9), (3.3, 1.3)):
        args = f"args: {{simulate-load-seconds: {seconds}}}"
        box.write(f"chat: {{{on_cpu}, {args}}}", "gpus: none")
        command = [sys.executable, "-m", "sage_reconcile", "apply", "--yes"]
        restored = (
            "import signal, os, sys; signal.signal(2, signal.default_int_handler); os.execv(sys.argv[1], sys.argv[1:])"
        )
        with subprocess.Popen(
            [sys.executable, "-c", restored, *command], cwd=box.folder, env=box.environ, stdout=subprocess.PIPE
        ) as process:
            time.sleep(after_s)  # when it comes is the point; that it is seen is what is checked
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
        assert process.returncode in (130, -2), seconds


def test_what_stands_in_place_of_the_state_folder_is_told(box: Box) -> None:
    box.write("")
    (box.folder / "file").write_text("", encoding="utf-8")
    for command in (["diff"], ["status"], ["apply", "--yes"]):
        assert "is not a folder" in box.run(*command, "--state-dir", str(box.folder / "file"), expect=1)


def test_status_says_that_nobody_does_what_is_left_to_do(box: Box) -> None:
    told = "nobody reconciles now"
    box.write(f"chat: {{{SIMULATED}}}")
    assert told in box.run("status")
    box.run("apply", "--yes")
    assert told not in box.run("status")
