"""`systemd show` and `systemd install`: the unit for this machine, on disk only where nobody's edits are lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.e2e.box import REPOSITORY, Box

EXAMPLE = REPOSITORY / "examples/systemd/sage-reconcile.service"
STANDARD = ("-f", "/etc/sage-reconcile/engines.yaml", "--state-dir", "/var/lib/sage-reconcile", "--run-as", "root")


def test_the_example_is_what_show_prints_for_the_standard_paths(box: Box) -> None:
    beside = Path(sys.executable).parent
    command = [str(beside / "sage-reconcile"), "systemd", "show", *STANDARD]
    shown = subprocess.run(command, cwd=box.folder, env=box.environ, capture_output=True, text=True, check=True).stdout
    assert shown.replace(str(beside), "/opt/sage-reconcile/bin") == EXAMPLE.read_text(encoding="utf-8")


def test_called_as_a_module_it_starts_as_one(box: Box) -> None:
    shown = box.run("systemd", "show")
    assert f"ExecStart={sys.executable} -m sage_reconcile run --file {box.file} --state-dir {box.state}\n" in shown
    assert f"ExecReload={sys.executable} -m sage_reconcile reload --wait --state-dir {box.state}\n" in shown


def test_nothing_is_lost_of_a_unit_that_was_edited(box: Box) -> None:
    environ = {"XDG_CONFIG_HOME": str(box.folder / "config"), "PATH": str(box.folder)}
    unit = box.folder / "config/systemd/user/sage-reconcile.service"
    shown = box.run("systemd", "show", "--user", **environ)
    assert not unit.exists()
    told = box.run("systemd", "install", "--user", **environ)
    assert unit.read_text(encoding="utf-8") == shown
    assert unit.stat().st_mode & 0o777 == 0o644
    assert shown in told
    assert "is not there yet: sage-reconcile init" in told
    assert "systemctl --user enable --now sage-reconcile.service" in told
    assert "loginctl enable-linger" in told
    assert f"EnvironmentFile=-{box.folder}/config/sage-reconcile/environment" in shown
    edited = shown.replace("WatchdogSec=2min", "WatchdogSec=9min")
    unit.write_text(edited, encoding="utf-8")
    told = box.run("systemd", "install", "--user", "--now", expect=1, **environ)
    assert "-WatchdogSec=9min\n+WatchdogSec=2min\n" in told
    assert "nothing was written" in told
    assert unit.read_text(encoding="utf-8") == edited
    box.run("systemd", "install", "--user", "--force", **environ)
    assert unit.read_text(encoding="utf-8") == shown
    assert "says this already" in box.run("systemd", "install", "--user", **environ)
    assert "there is no systemctl" in box.run("systemd", "install", "--user", "--now", expect=1, **environ)
    assert [path.name for path in unit.parent.iterdir()] == [unit.name]


def test_what_systemctl_is_told_and_that_its_failure_is_ours(box: Box) -> None:
    environ = {"XDG_CONFIG_HOME": str(box.folder / "config"), "PATH": f"{box.folder}:{os.environ['PATH']}"}
    stand_in = box.folder / "systemctl"
    stand_in.write_text(f'#!/bin/sh\necho "$*" >>{box.folder}/told\n[ "$2" != restart ]\n', encoding="utf-8")
    stand_in.chmod(0o755)
    told = box.run("systemd", "install", "--user", "--now", expect=1, **environ)
    assert "systemctl --user restart sage-reconcile.service failed (exit 1)" in told
    unit = "sage-reconcile.service"
    assert (box.folder / "told").read_text(encoding="utf-8").splitlines() == [
        *("--user daemon-reload", f"--user enable {unit}", f"--user restart {unit}")
    ]


def test_a_user_that_is_not_there_and_one_too_many_are_refused(box: Box) -> None:
    assert "there is no user nobody-at-all" in box.run("systemd", "show", "--run-as", "nobody-at-all", expect=1)
    assert "leave out --run-as" in box.run("systemd", "show", "--user", "--run-as", "root", expect=1)
