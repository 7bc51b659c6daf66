"""The daemon as a service of a really booted systemd: whatever becomes of the daemon, the engines keep their pids."""

from __future__ import annotations

import subprocess
import sys

from tests.systemd.machine import BOOT, FILE, STATE, UNIT, Machine

INSTALLED = f"/etc/systemd/system/{UNIT}"
WATCHED = "WatchdogSec=4\nRestartSec=100ms"


def main_pid(machine: Machine) -> str:
    return machine.show("MainPID")


def another_is_ready(machine: Machine, before: str) -> bool:
    """Whether another daemon than before runs, and has made its first pass."""
    return main_pid(machine) not in ("0", before) and machine.show("ActiveState") == "active"


def environ(machine: Machine, pid: int) -> set[str]:
    text = machine.run("cat", f"/proc/{pid}/environ")
    return {entry.partition("=")[0] for entry in text.split("\0")}


def test_the_harness_refuses_to_boot_where_the_machine_could_be_harmed() -> None:
    done = subprocess.run([BOOT, "check"], capture_output=True, text=True, check=False)
    assert done.returncode == 97
    assert "refusing to go on" in done.stderr


def test_from_install_to_ready(machine: Machine) -> None:
    machine.engines("chat", "code")
    shown = machine.ours("systemd", "show", "-f", FILE)
    assert machine.run("ls", "/etc/systemd/system") == "", "show writes nothing"
    told = machine.ours("systemd", "install", "-f", FILE)
    assert shown in told
    assert f"systemctl daemon-reload && systemctl enable --now {UNIT}" in told
    assert machine.run("cat", INSTALLED) == shown
    assert machine.run("systemd-analyze", "verify", "--man=no", INSTALLED) == "", "it exits with 0 on unknown keys"
    machine.run("systemd-analyze", "security", "--offline=true", "--threshold=30", "--no-pager", INSTALLED)
    machine.run("systemctl", "daemon-reload")
    assert machine.show("ActiveState") == "inactive", "nothing was started that was not asked for"
    machine.run("systemctl", "enable", "--now", UNIT)
    assert len(machine.run("sh", "-c", f"ls {STATE}/launches/*.json").split()) == 2, "ready is after the first pass"
    assert machine.run("stat", "-c", "%a", STATE).strip() == "700"
    machine.all_ready(2)
    assert machine.show("StatusText") == "2 of 2 replicas ready; generation 1"
    assert machine.run("systemctl", "is-enabled", UNIT).strip() == "enabled"
    assert "says this already" in machine.ours("systemd", "install", "-f", FILE)


def test_a_restart_and_a_crash_of_the_daemon_stop_no_engine(machine: Machine) -> None:
    machine.engines("chat", "code")
    machine.install("RestartSec=100ms")
    before = machine.all_ready(2)
    first = main_pid(machine)
    machine.run("systemctl", "restart", UNIT)
    second = main_pid(machine)
    assert second != first
    assert machine.all_ready(2) == before
    machine.run("kill", "-KILL", second)
    machine.until("another daemon is there", lambda: another_is_ready(machine, second))
    assert machine.all_ready(2) == before
    assert machine.show("NRestarts") == "1"
    assert len(machine.events("spawn")) == 2, "those of the beginning"
    machine.write("/tmp/of-the-machine", "")
    for pid in before.values():
        machine.run("ls", f"/proc/{pid}/root/tmp/of-the-machine")
        assert not environ(machine, pid) & {"NOTIFY_SOCKET", "WATCHDOG_USEC", "INVOCATION_ID", "JOURNAL_STREAM"}
    machine.run("kill", "-KILL", str(before["code/0"]))
    machine.until("what was adopted is healed", lambda: len(machine.events("spawn")) == 3)
    assert machine.all_ready(2)["chat/0"] == before["chat/0"]


def test_a_hung_daemon_is_ended_by_the_watchdog_and_no_engine(machine: Machine) -> None:
    machine.engines("chat")
    machine.install(WATCHED)
    before = machine.all_ready(1)
    fed = {machine.show("WatchdogTimestampMonotonic")}

    def seen_idle() -> bool:
        fed.add(machine.show("WatchdogTimestampMonotonic"))
        return len(fed) > 4

    machine.until("an idle one feeds it", seen_idle)
    first = main_pid(machine)
    assert machine.show("NRestarts") == "0"
    machine.run("kill", "-STOP", first)
    machine.until("another daemon is there", lambda: another_is_ready(machine, first))
    log = machine.run("journalctl", "-u", UNIT, "--no-pager")
    assert "Watchdog timeout" in log
    assert "Fatal Python error: Aborted" in log, "it tells where it hung"
    assert machine.all_ready(1) == before


def test_a_reload_is_over_when_the_file_is_in_force_and_fails_where_it_is_not(machine: Machine) -> None:
    machine.engines("chat")
    machine.install()
    before = machine.all_ready(1)
    machine.engines("chat", "code")
    machine.run("systemctl", "reload", UNIT)
    assert len(machine.run("sh", "-c", f"ls {STATE}/launches/*.json").split()) == 2
    assert machine.show("StatusText").endswith("generation 2")
    assert machine.show("SubState") == "running"
    both = machine.all_ready(2)
    assert both["chat/0"] == before["chat/0"]
    machine.write(FILE, "version: 1\nengines: {chat: {replicas: many}}\n")
    machine.run("systemctl", "reload", UNIT, expect=1)
    assert "file refused: " in machine.show("StatusText")
    assert machine.show("ActiveState") == "active"
    assert machine.ready() == both
    errors = machine.journal("-p", "err")
    assert {(line["event"], line["priority"]) for line in errors} == {("file refused", "3")}
    lines = machine.journal()
    assert {line["engine"] for line in lines if "replica" in line} == {"chat", "code"}
    assert {"started", "file accepted", "spawn", "ready"} <= {line["event"] for line in lines}


def test_stop_leaves_the_engines_and_down_ends_them(machine: Machine) -> None:
    """Meanwhile a daemon runs by hand: the service waits for the lock, and takes over once that one is ended."""
    machine.engines("chat", "code")
    machine.install("RestartSec=100ms")
    before = machine.all_ready(2)
    assert f"systemctl stop {UNIT}" in machine.ours("down", "--yes", "-f", FILE, expect=75)
    machine.run("systemctl", "stop", UNIT)
    assert (machine.show("ActiveState"), machine.show("Result")) == ("inactive", "success")
    assert machine.ready() == before
    by_hand = [sys.executable, "-m", "sage_reconcile", "run", "-f", FILE, "--state-dir", STATE]
    machine.run("sh", "-c", 'setsid -f "$@" >/tmp/by-hand.log 2>&1', "sh", *by_hand)
    machine.until("it is there", lambda: "started" in machine.run("cat", "/tmp/by-hand.log"))
    told = machine.ours("systemd", "install", "-f", FILE)
    assert "runs outside of systemd" in told
    pid = told.partition("(kill ")[2].partition(")")[0]
    assert f"(kill {pid})" in machine.ours("down", "--yes", "-f", FILE, expect=75)
    machine.run("systemctl", "start", "--no-block", UNIT)
    machine.until("it tries again", lambda: int(machine.show("NRestarts")) > 1)
    machine.run("kill", pid)
    machine.until("the service took over", lambda: machine.show("ActiveState") == "active")
    assert machine.all_ready(2) == before
    machine.run("systemctl", "stop", UNIT)
    machine.ours("down", "--yes", "-f", FILE)
    assert machine.ready() == {}
    left = machine.run("cat", f"/sys/fs/cgroup/system.slice/{UNIT}/cgroup.procs", expect=None)
    assert left == "" or "No such file" in left
