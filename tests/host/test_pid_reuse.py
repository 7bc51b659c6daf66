"""A pid that is used again by a stranger, forced: no signal ever reaches it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.host.world import ROOT


def test_a_pid_that_a_stranger_has_by_now_is_never_signalled() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a pid namespace")
    words = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-m", "tests.host.pid_reuse"]
    done = subprocess.run([*words, "20"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "120 identities, all of strangers by then, and none signalled\n"
