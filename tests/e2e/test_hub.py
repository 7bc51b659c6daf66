"""Models that are not on the machine: described by a hub on loopback, for the commands and for the daemon."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.box import Box
from tests.e2e.test_estimate import asked
from tests.e2e.test_nvml import HOST, Gpus, _gpus, _library
from tests.models import LLAMA_8B, LONGEST
from tests.stand_in_hub import StandInHub, plain, stand_in_hub, weights

__all__ = ["_gpus", "_library"]  # fixtures
NAME = "org/Model-8B"
GUESSED_MIB = 20359
ENTRY = f"chat: {{model: {NAME}, memory: auto, args: {{max-model-len: 4096}}}}"
TENSORS = {"model.embed_tokens.weight": [128256, 4096], "model.layers.0.mlp.up_proj.weight": [4096, 14336]}


@pytest.fixture(name="hub")
def _hub(box: Box) -> Iterator[StandInHub]:
    """A hub that has a model by the name of one of 8 billion parameters; its weights are far smaller."""
    with stand_in_hub() as made:
        made.add(NAME, files={"config.json": plain(LLAMA_8B | LONGEST), "model.safetensors": weights(TENSORS)})
        box.environ |= {"HF_ENDPOINT": made.url, "HF_HUB_OFFLINE": "0", "XDG_CACHE_HOME": str(box.folder / "cache")}
        yield made


def test_estimate_asks_the_hub_once(box: Box, hub: StandInHub) -> None:
    document = asked(box, NAME, "--context", "4k")
    assert (document["confidence"], document["note"]) == ("exact", "")
    assert document["source"].startswith("http://127.0.0.1/org/Model-8B@")
    assert document["parts"]["weights_mib"] < 2000
    hub.forget()
    assert asked(box, NAME, "--context", "4k") == document
    assert "guess" not in box.run("estimate", NAME).splitlines()[-1]
    assert hub.asked == []


def test_estimate_may_be_told_not_to_ask(box: Box, hub: StandInHub) -> None:
    assert asked(box, NAME, "--offline")["confidence"] == "guessed"
    assert "A guess from the name" in box.run("estimate", NAME, HF_HUB_OFFLINE="1")
    assert hub.asked == []


def test_estimate_says_why_the_hub_does_not_tell(box: Box, hub: StandInHub) -> None:
    hub.repos[NAME].token, hub.repos[NAME].gated = "hf_secret", True
    document = asked(box, NAME)
    assert (document["confidence"], document["source"]) == ("guessed", "")
    assert document["note"] == "it is gated: accept its licence on the hub and set HF_TOKEN"
    assert "note: it is gated: accept its licence" in box.run("estimate", NAME)
    text = box.run("estimate", "org/mystery", expect=1)
    assert "how large org/mystery is (it does not exist on the hub, or it is private: then set HF_TOKEN)" in text
    text = box.run("estimate", NAME, HF_TOKEN="hf_secret")
    assert "guess from" not in text
    assert "hf_secret" not in text


def spawned(plan: Any) -> dict[str, int]:
    return {action["replica"]: action["memory_mib"] for action in plan["actions"]}


def known(box: Box, *more: str) -> Any:
    """The plan as soon as the hub has told; a busy machine may need longer for it than a plan waits."""

    def told() -> Any:
        plan = box.json("diff", *more, expect=None)
        return plan if spawned(plan)["chat/0"] < GUESSED_MIB / 2 else None

    return box.until("the hub has told of the model", told)


@pytest.mark.parametrize("more", [[], ["--gpus", "2xL4"]], ids=["here", "elsewhere"])
def test_a_plan_knows_what_the_hub_tells(box: Box, hub: StandInHub, more: list[str]) -> None:
    box.write(ENTRY)
    plan = known(box, *more)
    assert spawned(plan)["chat/0"] > 0
    assert plan["notes"] == []
    hub.forget()
    assert box.json("diff", *more, expect=None) == plan
    assert hub.asked == []


def test_a_plan_says_why_memory_goes_by_the_name(box: Box, hub: StandInHub) -> None:
    del hub.repos[NAME]
    box.write(ENTRY)
    box.until("it is told why", lambda: box.json("diff", expect=None)["notes"])
    plan = box.json("diff", expect=None)
    assert spawned(plan) == {"chat/0": GUESSED_MIB}
    why = "chat: its memory goes by the name of its model: it does not exist on the hub, or it is private"
    assert [note.partition(":")[0] for note in plan["notes"]] == ["chat"]
    for words in (["diff"], ["diff", "--gpus", "H100-80GB"], ["explain", "chat"], ["status"]):
        assert why in box.run(*words, expect=None), words
    assert len(hub.asked) == 1, "the failure is remembered by all of them"


def test_the_name_of_a_model_that_is_a_secret_is_not_told(box: Box, hub: StandInHub) -> None:
    box.write("chat: {model: '${SECRET}', memory: auto}")
    why = "its memory goes by the name of its model"
    box.until("it is told why", lambda: why in box.run("diff", expect=None, SECRET="org/hidden-8B"))
    assert "hidden" not in box.run("diff", expect=None, SECRET="org/hidden-8B")
    assert "hidden" in hub.paths()[0]


@pytest.mark.parametrize(
    ("engines", "host", "environ"),
    [
        (ENTRY, "offline: true", {}),
        (ENTRY, "gpus: none", {"HF_HUB_OFFLINE": "1"}),
        ("chat: {model: org/Model-8B, memory: 9GiB}", "gpus: none", {}),
        ("chat: {model: org/Model-8B, memory: auto, runtime: simulator}", "gpus: none", {}),
        ("chat: {model: ./Model-8B, memory: auto}\nb: {model: /srv/Model-8B, memory: auto}", "gpus: none", {}),
    ],
)
def test_the_hub_is_asked_only_where_it_may_and_must(
    box: Box, hub: StandInHub, engines: str, host: str, environ: dict[str, str]
) -> None:
    box.write(engines, host)
    box.environ |= environ
    for words in (["diff"], ["explain", "chat"], ["status"], ["gpu"], ["apply", "--yes"]):
        box.run(*words, expect=None)
    assert hub.asked == []


def test_status_and_gpu_never_ask(box: Box, hub: StandInHub) -> None:
    box.write(ENTRY)
    for command in ("status", "gpu", "validate"):
        box.run(command)
    assert hub.asked == []


def test_a_plan_waits_for_a_slow_hub_a_little_and_says_so(box: Box, hub: StandInHub) -> None:
    hub.speaks.clear()
    box.write(ENTRY)
    text = box.run("diff", expect=None)
    assert "note: chat: the hub has not described the model within 5 s, so the memory goes by its name" in text
    assert "19.9GiB" in text
    hub.speaks.set()
    kept = box.folder / "cache/sage-reconcile/models"
    box.until("it went on by itself", lambda: list(kept.glob("[!.]*.json")))
    assert spawned(box.json("diff", expect=None))["chat/0"] < GUESSED_MIB / 2


PATIENT = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background ignores it
    "import sage_reconcile.host.hub as hub; hub.PATIENCE_S = 300.0\n"
    "import sage_reconcile.cli.asking as asking; asking.PLAN_S = asking.ESTIMATE_S = 300.0\n"
    "from sage_reconcile.cli.main import main; main()"
)
"""The program with more patience for a hub, however busy the machine is."""


@pytest.mark.parametrize("words", [["estimate", NAME], ["diff"]], ids=["estimate", "diff"])
def test_ctrl_c_ends_the_waiting_and_the_asking(box: Box, hub: StandInHub, words: list[str]) -> None:
    hub.speaks.clear()
    box.write(ENTRY)
    environ = box.environ | {"HF_HUB_DOWNLOAD_TIMEOUT": "300"}
    command = [sys.executable, "-c", PATIENT, *words]
    with subprocess.Popen(
        command, env=environ, cwd=box.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as run:
        assert hub.reached.wait(60)
        run.send_signal(signal.SIGINT)
        text, _ = run.communicate(timeout=60)
    assert run.returncode == 130
    assert b"Traceback" not in text
    box.until("nobody asks any more", lambda: not askers(box))


def askers(box: Box) -> list[int]:
    """The processes that ask the hub of this box."""
    mark = f"HF_ENDPOINT={box.environ['HF_ENDPOINT']}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                environ, words = (entry / "environ").read_bytes(), (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if mark in environ.split(b"\0") and b"hub_fetch" in words:
                assert NAME.encode() not in words
                found.append(int(entry.name))
    return found


def entry(model: str, memory: str) -> str:
    return f"{{model: {model}, python: ./fake-python, memory: {memory}, args: {{max-model-len: 4096}}}}"


def test_the_daemon_starts_with_what_the_hub_tells(box: Box, hub: StandInHub, gpus: Gpus) -> None:
    del gpus
    hub.repos[NAME].token = "hf_secret"
    secret = f"chat: {entry(NAME, 'auto')[:-1]}, env: {{HF_TOKEN: '${{MINE}}'}}}}"
    box.write(secret, HOST)
    with (box.folder / "daemon.log").open("wb") as log:
        environ = box.environ | {"MINE": "hf_secret"}
        command = [sys.executable, "-c", PATIENT, "run"]
        box.daemons.append(subprocess.Popen(command, cwd=box.folder, env=environ, stdout=log, stderr=log))
    box.until("it is ready", lambda: "chat/0" in box.ready_with(MINE="hf_secret"))
    (record,) = box.records()
    assert 0 < record["memory_mib"] < GUESSED_MIB / 2
    assert {asked.token for asked in hub.asked} == {"hf_secret"}
    assert len(hub.asked) == 3
    told = [path for path in box.folder.rglob("*") if path.is_file() and not path.name.startswith(("seen", "machine"))]
    assert not [path for path in told if b"hf_secret" in path.read_bytes()]


def test_a_silent_hub_delays_nobody_else_and_nobody_for_long(box: Box, hub: StandInHub, gpus: Gpus) -> None:
    del gpus
    hub.speaks.clear()
    box.write(f"chat: {entry(NAME, 'auto')}\nmore: {entry('a/b', '9GiB')}", HOST)
    daemon = box.start_daemon()
    seen: set[str] = set()

    def waits() -> bool:
        """Only the daemon that asks knows that it waits."""
        with contextlib.suppress(FileNotFoundError):
            told = json.loads((box.state / "status.json").read_text(encoding="utf-8"))
            rows = [row for engine in told.get("engines", ()) for row in engine["replicas"]]
            seen.update(row["name"] for row in rows if "what the hub tells of its model" in row["reason"])
        return bool(seen)

    box.until("chat waits", waits)
    assert seen == {"chat/0"}
    box.until("both are ready", lambda: set(box.ready()) == {"chat/0", "more/0"})
    records = sorted(box.records(), key=lambda record: record["created_at"])
    assert [(record["engine_name"], record["memory_mib"]) for record in records] == [
        ("more", 9 * 1024),
        ("chat", GUESSED_MIB),
    ]
    box.write(f"more: {entry('a/b', '9GiB')}", HOST)
    box.until("chat is gone", lambda: set(box.ready()) == {"more/0"})
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(60) == 0
    box.until("nobody asks any more", lambda: not askers(box))
