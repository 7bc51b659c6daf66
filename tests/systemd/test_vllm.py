"""A real vLLM in the confinement of the unit: it loads, answers, and outlives the daemon with the files it uses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e import vllm_cpu
from tests.systemd.machine import FILE, UNIT, machine

pytestmark = [pytest.mark.vllm, pytest.mark.xdist_group("vllm"), pytest.mark.usefixtures("bootable")]

_START_S = 300.0
_ASK = "import sys, urllib.request as u; print(u.urlopen(u.Request(sys.argv[1], sys.argv[2].encode(), {'Content-Type': "
_ASK += "'application/json'})).read().decode())"


def test_a_real_engine_lives_in_the_confinement_and_outlives_the_daemon(tmp_path: Path) -> None:
    python = vllm_cpu.python_with_vllm()
    model = vllm_cpu.tiny_model(tmp_path / "model")
    flags = "load-format: dummy, max-model-len: 256, enforce-eager: true, kv-cache-memory-bytes: 16777216"
    entry = f"model: {model}, device: cpu, python: {python}, memory: manual, startup_timeout: 5m, args: {{{flags}}}"
    environ = "env: {HF_HUB_OFFLINE: '1', VLLM_NO_USAGE_STATS: '1'}"
    question = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4})
    with machine(python.parents[1], tmp_path) as booted:

        def complete() -> int:
            answer = booted.run("python3", "-c", _ASK, "http://127.0.0.1:8000/v1/chat/completions", question)
            return int(json.loads(answer)["usage"]["completion_tokens"])

        booted.write(FILE, f"version: 1\nhost: {{gpus: none}}\nengines:\n  tiny: {{{entry}, {environ}}}\n")
        booted.install()
        before = booted.all_ready(1, _START_S)
        status = booted.run("cat", f"/proc/{before['tiny/0']}/status")
        assert "CapBnd:\t0000000000000000" in status
        assert "Seccomp:\t2" in status
        assert complete() > 0
        booted.run("systemctl", "restart", UNIT)
        assert booted.all_ready(1) == before
        assert complete() > 0
