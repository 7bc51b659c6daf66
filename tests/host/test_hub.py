"""What a hub tells of models that are not here: asked over HTTP, remembered, and never waited for in a pass."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sage_reconcile.core.observed import ModelFacts
from sage_reconcile.host import hub_fetch
from sage_reconcile.host.hub import AGAIN_S, FRESH_S, MISSING, Hub, Sought, cache_folder, sought
from sage_reconcile.host.models import ModelReader, unread
from tests.reading import desired
from tests.stand_in_hub import COMMIT, CONFIG, INDEX, NUMBERS, TENSORS, StandInHub, plain, stand_in_hub, weights

LONG_S = 60.0
NAME = "org/name"
SERVED_AT_MOST = 20 << 20
"""What sockets may have taken up before a hub that sends all of a file hears that it is not wanted."""


@pytest.fixture(name="hub")
def _hub() -> Iterator[StandInHub]:
    with stand_in_hub() as made:
        yield made


class Here:
    """A machine with an empty cache, from which a hub is asked."""

    def __init__(self, folder: Path, hub: StandInHub) -> None:
        self.folder = folder
        self.environ = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))},
            "HOME": str(folder / "home"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "HF_ENDPOINT": hub.url,
        }

    def sought(self, name: str = NAME, revision: str = "", **environ: str) -> Sought:
        found = sought(name, revision, self.environ, environ)
        assert found is not None
        return found

    def learn(self, name: str = NAME, revision: str = "", **environ: str) -> ModelFacts | None:
        """What one command learns that waits for it."""
        asking = Hub(self.environ, asks=True)
        wanted = self.sought(name, revision, **environ)
        assert asking.wait([wanted], LONG_S) == []
        return ModelReader(self.folder, self.environ, asking).told(wanted)

    def problem(self, name: str = NAME, revision: str = "", **environ: str) -> str:
        found = self.learn(name, revision, **environ)
        assert found is not None
        assert found.config is None
        return found.problem

    @property
    def kept(self) -> Path:
        (path,) = cache_folder(self.environ).glob("*.json")
        return path

    def age(self, seconds: float) -> None:
        """Makes what is kept older."""
        document = json.loads(self.kept.read_text())
        document["tried_at"] -= seconds
        self.kept.write_text(json.dumps(document))


@pytest.fixture(name="here")
def _here(tmp_path: Path, hub: StandInHub) -> Here:
    return Here(tmp_path, hub)


def numbers(facts: ModelFacts | None) -> int:
    assert facts is not None
    assert facts.problem == ""
    assert facts.config is not None
    assert facts.checkpoint is not None
    return sum(piece.numbers for piece in facts.checkpoint.pieces)


def test_a_model_is_described_by_its_config_and_the_headers_of_its_weights(here: Here, hub: StandInHub) -> None:
    hub.add(NAME)
    facts = here.learn()
    assert numbers(facts) == NUMBERS
    assert facts is not None
    assert facts.config is not None
    assert facts.config.hidden == 64
    assert facts.source == f"http://127.0.0.1/org/name@{COMMIT[:12]}"
    assert hub.paths() == [
        "/api/models/org/name/revision/main",
        f"/org/name/resolve/{COMMIT}/config.json",
        f"/org/name/resolve/{COMMIT}/model.safetensors",
    ]
    assert hub.served < 1 << 20
    assert all("sage-reconcile" in asked.agent for asked in hub.asked)


def test_what_was_told_once_is_not_asked_again(here: Here, hub: StandInHub) -> None:
    hub.add(NAME)
    here.learn()
    hub.forget()
    assert numbers(here.learn()) == NUMBERS
    assert hub.asked == []
    only_looks = ModelReader(here.folder, here.environ)
    assert numbers(only_looks.told(here.sought())) == NUMBERS
    assert only_looks.told(here.sought()) is only_looks.told(here.sought())


def test_shards_are_read_by_the_index_alone(here: Here, hub: StandInHub) -> None:
    names = list(TENSORS)
    files = {f"part-{n}.safetensors": weights({name: TENSORS[name]}) for n, name in enumerate(names)}
    index = {"weight_map": {name: f"part-{n}.safetensors" for n, name in enumerate(names)}}
    more = {"consolidated.safetensors": weights(TENSORS), "config.json": plain(CONFIG), INDEX: plain(index)}
    hub.add(NAME, files=files | more)
    assert numbers(here.learn()) == NUMBERS
    assert sorted(path.rpartition("/")[2] for path in hub.paths()[3:]) == sorted(files)
    assert hub.served < 4 << 20


def test_without_an_index_all_files_are_read_but_not_those_of_another_format(here: Here, hub: StandInHub) -> None:
    files = {f"{n}.safetensors": weights({name: shape}) for n, (name, shape) in enumerate(TENSORS.items())}
    others = {"consolidated.00.safetensors": weights(TENSORS), "original/a.safetensors": weights(TENSORS)}
    hub.add(NAME, files=files | others | {"config.json": plain(CONFIG)})
    assert numbers(here.learn()) == NUMBERS


def test_a_long_header_takes_a_second_request_for_the_rest_of_it(here: Here, hub: StandInHub) -> None:
    file = weights(TENSORS, padding=500_000)
    hub.add(NAME, files={"config.json": plain(CONFIG), "model.safetensors": file})
    assert numbers(here.learn()) == NUMBERS
    assert [asked.range for asked in hub.asked[2:]] == ["bytes=0-131071", f"bytes=131072-{len(file.start) - 1}"]
    assert hub.served < 1 << 20


@pytest.mark.parametrize("padding", [0, 500_000])
def test_a_hub_that_knows_no_ranges_is_stopped_after_the_header(here: Here, hub: StandInHub, padding: int) -> None:
    hub.add(NAME, files={"config.json": plain(CONFIG), "model.safetensors": weights(TENSORS, padding=padding)})
    hub.ranges = False
    assert numbers(here.learn()) == NUMBERS
    assert hub.served < SERVED_AT_MOST


def test_without_safetensors_the_config_alone_counts(here: Here, hub: StandInHub) -> None:
    hub.add(NAME, files={"config.json": plain(CONFIG), "pytorch_model.bin": weights(TENSORS)})
    facts = here.learn()
    assert facts is not None
    assert facts.config is not None
    assert (facts.checkpoint, facts.problem) == (None, "")
    assert len(hub.asked) == 2
    hub.forget()
    here.learn()
    assert hub.asked == []


def test_a_revision_is_asked_for_and_kept_apart(here: Here, hub: StandInHub) -> None:
    hub.add(NAME, revisions=("main", "refs/pr/1"))
    here.learn(revision="refs/pr/1")
    assert hub.paths()[0] == "/api/models/org/name/revision/refs/pr/1"
    assert Hub(here.environ).told(here.sought()) is None
    assert here.problem(revision="v2") == "it has no such revision on the hub"


@pytest.mark.parametrize(
    ("made", "token", "told"),
    [
        ({"token": "t", "gated": True}, "", "it is gated: accept its licence on the hub and set HF_TOKEN"),
        ({"token": "t", "gated": True}, "u", "it is gated: HF_TOKEN does not open it"),
        ({"token": "t"}, "", "it does not exist on the hub, or it is private: then set HF_TOKEN"),
        ({"token": "t"}, "u", "it does not exist on the hub, or HF_TOKEN does not open it"),
        ({}, "wrong", "the hub does not accept HF_TOKEN (HTTP 401)"),
        ({"files": {"model.gguf": weights({})}}, "", "it has no config.json on the hub"),
    ],
)
def test_why_it_is_not_told_is_told(here: Here, hub: StandInHub, made: dict[str, Any], token: str, told: str) -> None:
    hub.add(NAME, **made)
    assert told in here.problem(HF_TOKEN=token)


def test_a_token_opens_what_is_gated(here: Here, hub: StandInHub) -> None:
    hub.add(NAME, token="t", gated=True)
    assert "gated" in here.problem()
    assert numbers(here.learn(HF_TOKEN="t")) == NUMBERS, "it is asked again at once, now that there is a token"
    assert {asked.token for asked in hub.asked} == {"", "t"}


def test_a_token_goes_to_the_hub_only_and_is_kept_nowhere(here: Here, hub: StandInHub) -> None:
    hub.add(NAME, token="hf_secret")
    with stand_in_hub() as other:
        other.add(NAME)
        hub.elsewhere = other.url
        assert numbers(here.learn(HF_TOKEN="hf_secret")) == NUMBERS
        assert {asked.token for asked in hub.asked} == {"hf_secret"}
        assert [asked.token for asked in other.asked] == [""]
    assert "hf_secret" not in here.kept.read_text()
    assert "org/name" not in here.kept.read_text()
    assert "hf_secret" not in repr(here.sought(HF_TOKEN="hf_secret"))
    assert stat.S_IMODE(here.kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(here.kept.parent.stat().st_mode) == 0o700


def test_a_token_file_of_another_program_is_left_alone(here: Here, hub: StandInHub) -> None:
    hub.add(NAME)
    (here.folder / "hf").mkdir()
    (here.folder / "hf/token").write_text("hf_other")
    here.learn(HF_HOME=str(here.folder / "hf"))
    assert {asked.token for asked in hub.asked} == {""}


@pytest.mark.parametrize("status", [429, 500, 503, 403])
def test_a_hub_in_trouble_is_told_and_asked_once(here: Here, hub: StandInHub, status: int) -> None:
    hub.add(NAME)
    hub.status = status
    assert f"HTTP {status}" in here.problem()
    assert len(hub.asked) == 1


def test_a_hub_that_is_not_there_is_told(here: Here) -> None:
    assert here.problem(HF_ENDPOINT="http://127.0.0.1:9").startswith("the hub cannot be reached (ConnectError")
    assert "HF_ENDPOINT is no address" in here.problem(HF_ENDPOINT="hub.example.com")


def test_a_hub_that_never_answers_is_given_up(here: Here, hub: StandInHub) -> None:
    hub.speaks.clear()
    assert "the hub cannot be reached (ReadTimeout" in here.problem(HF_HUB_DOWNLOAD_TIMEOUT="1")


def test_a_hub_that_goes_on_and_on_is_ended_by_the_clock(here: Here, hub: StandInHub) -> None:
    hub.add(NAME)
    hub.speaks.clear()
    path = here.folder / "kept/models/x.json"
    job = {"repo": NAME, "revision": "main", "path": str(path), "within_s": 1}
    environ = here.environ | {"HF_HUB_DOWNLOAD_TIMEOUT": "300", "HF_HUB_DISABLE_TELEMETRY": "1"}
    run = [sys.executable, "-P", hub_fetch.__file__]
    subprocess.run(run, input=json.dumps(job), text=True, env=environ, check=True, timeout=LONG_S)
    assert hub_fetch.read(path)["problem"] == "the hub has not told all of it in time"


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        (None, b"<html>", "no JSON where it should (what it tells of the model)"),
        (None, [], "no JSON where it should (what it tells of the model)"),
        (None, {"siblings": []}, "no JSON where it should (what it tells of the model)"),
        (None, {"sha": COMMIT, "siblings": 3}, "no JSON where it should (the names of its files)"),
        (None, {"sha": COMMIT, "siblings": [{}]}, "no JSON where it should (the names of its files)"),
        ("config.json", b"{", "no JSON where it should (config.json)"),
        ("config.json", [1], "no JSON where it should (config.json)"),
        ("config.json", b"[" * 100_000, "no JSON where it should (config.json)"),
        ("config.json", {"model_type": "odd"}, "its config.json does not describe a decoder"),
    ],
)
def test_garbage_is_told(here: Here, hub: StandInHub, file: str | None, content: Any, told: str) -> None:
    repo = hub.add(NAME)
    if file is None:
        repo.info = content
    else:
        repo.files[file] = plain(content)
    assert told in here.problem()


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("model.safetensors", b"", "model.safetensors on the hub is not a safetensors file"),
        ("model.safetensors", b"version https://git-lfs", "is not a safetensors file"),
        ("model.safetensors", (2 << 30).to_bytes(8, "little") + b"{}", "is not a safetensors file"),
        ("model.safetensors", (10**6).to_bytes(8, "little") + b'{"a": ', "is cut short"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"[]", "no JSON where it should (model.safetensors)"),
        ("model.safetensors", (8).to_bytes(8, "little") + b'{"a": 1}', "is not a safetensors file"),
        (INDEX, b"{", "no JSON where it should (model.safetensors.index.json)"),
        (INDEX, {"weight_map": 3}, "its model.safetensors.index.json on the hub cannot be read"),
        (INDEX, {"weight_map": {"a": "b.safetensors"}}, "names 1 files that are not there"),
    ],
)
def test_with_garbage_for_weights_the_config_still_counts(
    here: Here, hub: StandInHub, file: str, content: Any, told: str
) -> None:
    hub.add(NAME).files[file] = plain(content)
    facts = here.learn()
    assert facts is not None
    assert facts.config is not None
    assert facts.checkpoint is None
    assert told in facts.problem


def test_where_the_weights_cannot_be_reached_the_config_still_counts(here: Here, hub: StandInHub) -> None:
    hub.add(NAME)
    hub.elsewhere = "http://127.0.0.1:9"
    facts = here.learn()
    assert facts is not None
    assert facts.config is not None
    assert facts.checkpoint is None
    assert facts.problem.startswith("the hub cannot be reached")
    hub.elsewhere = ""
    here.age(AGAIN_S)
    again(here, hub)
    assert numbers(here.learn()) == NUMBERS


def test_names_that_lead_elsewhere_are_not_asked_for(here: Here, hub: StandInHub) -> None:
    files = {"config.json": plain(CONFIG), "../../x.safetensors": weights(TENSORS)}
    hub.add(NAME, files=files | {INDEX: plain({"weight_map": {"a": "../../x.safetensors"}})})
    facts = here.learn()
    assert facts is not None
    assert facts.problem == "its files of weights on the hub have odd names"


def test_an_endless_answer_is_cut(here: Here, hub: StandInHub) -> None:
    hub.add(NAME).files["config.json"] = weights({}, size=1 << 30)
    assert here.problem() == "the hub answers with more than it should"
    assert hub.served < (64 << 20) + SERVED_AT_MOST


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "./foo", "/models/x", "a/b/c", "a b/c", "a/", "/a", "", ".", "..", "a\0b", "a/b:Q4", "org/x..y"),
        *("org/x--y", "org/.x", "-org/x", "org/x-", "org./x", "x.git", "ä/b", "a" * 97, "a\n", "http://h/a"),
    ],
)
def test_what_can_be_no_name_on_a_hub_is_never_asked_for(here: Here, name: str) -> None:
    assert sought(name, "", here.environ, {}) is None


@pytest.mark.parametrize("name", ["gpt2", "org/Model-8B", "a/b_c.d-e", "0/1", "_a/_b", "a" * 96])
def test_what_can_be_a_name_on_a_hub_is(here: Here, name: str) -> None:
    assert sought(name, "", here.environ, {}) is not None


def test_what_vllm_loads_from_elsewhere_is_not_asked_for(here: Here) -> None:
    assert sought(NAME, "", here.environ, {"VLLM_USE_MODELSCOPE": "True"}) is None
    assert sought(NAME, "", here.environ | {"VLLM_USE_MODELSCOPE": "true"}, {}) is None
    assert sought(NAME, "", here.environ, {"VLLM_USE_MODELSCOPE": "False"}) is not None


def test_what_is_here_is_not_asked_for(here: Here, hub: StandInHub) -> None:
    hub.add(NAME)
    asking = ModelReader(here.folder, here.environ, Hub(here.environ, asks=True))
    assert asking.sought(NAME) == here.sought()
    (here.folder / NAME).mkdir(parents=True)
    assert asking.sought(NAME) is None, "a folder, of which vLLM will say what is missing"


def test_a_failure_is_remembered_for_a_while(here: Here, hub: StandInHub) -> None:
    told = here.problem()
    hub.forget()
    assert here.problem() == told
    assert hub.asked == []
    hub.add(NAME)
    here.age(AGAIN_S - 60)
    assert here.problem() == told
    here.age(61)
    assert numbers(here.learn()) == NUMBERS


def test_what_a_branch_is_described_by_is_refreshed_seldom(here: Here, hub: StandInHub) -> None:
    repo = hub.add(NAME)
    here.learn()
    asking = Hub(here.environ, asks=True)
    here.age(FRESH_S - 60)
    asking.ask([here.sought()])
    assert asking._running == {}
    assert len(hub.asked) == 3
    here.age(61)
    again(here, hub)
    assert hub.paths()[3:] == ["/api/models/org/name/revision/main"], "the same commit tells the same"
    hub.status = 503
    here.age(FRESH_S)
    again(here, hub)
    assert numbers(here.learn()) == NUMBERS, "what is known stays"
    hub.status, repo.commit = 0, "f" * 40
    repo.files["config.json"] = plain(CONFIG | {"num_hidden_layers": 3})
    here.age(FRESH_S)
    again(here, hub)
    newer = here.learn()
    assert newer is not None
    assert newer.config is not None
    assert len(newer.config.layers) == 3


def again(here: Here, hub: StandInHub) -> None:
    """Asks once more, in the background, and comes back when that is done; nobody has to wait for it."""
    done = threading.Event()
    before = json.loads(here.kept.read_text())["tried_at"]
    asking = Hub(here.environ, asks=True, changed=done.set)
    assert asking.wait([here.sought()], 0.0) == [], "what is known is not waited for"
    assert done.wait(LONG_S)
    assert json.loads(here.kept.read_text())["tried_at"] > before
    hub.reached.clear()


def test_a_commit_is_never_asked_for_again(here: Here, hub: StandInHub) -> None:
    hub.add(NAME)
    here.learn(revision=COMMIT)
    here.age(1000 * FRESH_S)
    asking = Hub(here.environ, asks=True)
    asking.ask([here.sought(revision=COMMIT)])
    assert asking._running == {}


def test_a_clock_that_was_set_back_does_not_end_the_asking(here: Here, hub: StandInHub) -> None:
    here.problem()
    here.age(-1000 * FRESH_S)
    hub.add(NAME)
    assert numbers(here.learn()) == NUMBERS


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"version": 0}', "[" * 100_000])
def test_a_file_that_was_spoilt_counts_for_nothing(here: Here, hub: StandInHub, broken: str) -> None:
    hub.add(NAME)
    here.learn()
    here.kept.write_text(broken)
    assert Hub(here.environ).told(here.sought()) is None
    assert numbers(here.learn()) == NUMBERS


def test_what_cannot_be_kept_is_told(here: Here, hub: StandInHub) -> None:
    hub.add(NAME)
    (here.folder / "cache").mkdir()
    (here.folder / "cache/sage-reconcile").write_text("in the way")
    assert here.problem().startswith("what the hub tells cannot be kept: ")


def test_a_pass_begins_to_ask_and_never_waits(here: Here, hub: StandInHub) -> None:
    hub.add(NAME)
    hub.speaks.clear()
    woken = threading.Event()
    asking = Hub(here.environ, asks=True, patience_s=LONG_S, changed=woken.set)
    reader = ModelReader(here.folder, here.environ, asking)
    wanted = desired(f"version: 1\nengines: {{a: {{model: {NAME}, memory: auto}}, b: {{model: x/y, memory: 1GiB}}}}")
    assert reader.read(wanted) == {NAME: ModelFacts("", pending=True)}
    assert hub.reached.wait(LONG_S)
    assert reader.read(wanted)[NAME].pending
    assert not woken.is_set()
    hub.speaks.set()
    assert woken.wait(LONG_S)
    assert numbers(reader.read(wanted)[NAME]) == NUMBERS
    assert len(hub.asked) == 3, "it was asked once"


def test_patience_ends_and_whoever_has_it_is_woken(here: Here, hub: StandInHub) -> None:
    hub.add(NAME)
    hub.speaks.clear()
    woken = threading.Event()
    asking = Hub(here.environ, asks=True, patience_s=0.2, changed=woken.set)
    asking.ask([here.sought()])
    assert woken.wait(LONG_S)
    assert asking.told(here.sought()) is None, "a guess is as good as anything now"
    asking.close()


def test_who_closes_ends_the_asking(here: Here, hub: StandInHub) -> None:
    hub.speaks.clear()
    ended = threading.Event()
    asking = Hub(here.environ, asks=True, changed=ended.set)
    asking.ask([here.sought()])
    assert hub.reached.wait(LONG_S)
    asking.close()
    assert ended.wait(LONG_S)


def test_many_are_asked_for_a_few_at_one_time(here: Here, hub: StandInHub) -> None:
    names = [f"org/m{number}" for number in range(9)]
    for name in names:
        hub.add(name)
    asking = Hub(here.environ, asks=True)
    assert asking.wait([here.sought(name) for name in names], LONG_S) == []
    assert all(told and told.config for told in (asking.told(here.sought(name)) for name in names))
    silent = Hub(here.environ, asks=True)
    hub.speaks.clear()
    more = [here.sought(f"org/n{number}") for number in range(9)]
    assert len(silent.wait(more, 0.3)) == 9
    assert len(silent._running) == 4
    silent.close()


@pytest.mark.parametrize("environ", [{"HF_HUB_OFFLINE": "1"}, {"TRANSFORMERS_OFFLINE": "yes"}])
def test_offline_nothing_is_asked_and_what_is_known_counts(
    here: Here, hub: StandInHub, environ: dict[str, str]
) -> None:
    hub.add(NAME)
    assert here.learn(**environ) is None
    assert hub.asked == []
    here.learn()
    assert numbers(here.learn(**environ)) == NUMBERS


def test_the_file_may_forbid_it_and_only_vllm_needs_it(here: Here) -> None:
    asking = Hub(here.environ, asks=True)
    reader = ModelReader(here.folder, here.environ, asking)
    text = "version: 1\nhost: {offline: true}\nengines: {a: {model: org/name, memory: auto}}"
    assert reader.read(desired(text)) == {}
    others = (
        "version: 1\nengines: {a: {model: org/a, memory: 1GiB}, b: {model: org/b, runtime: simulator},"
        " c: {model: org/c, runtime: command, command: 'x {model}'}}"
    )
    assert reader.read(desired(others)) == {}
    assert asking._running == {}


def test_an_engine_may_have_a_hub_and_a_token_of_its_own(here: Here, hub: StandInHub) -> None:
    hub.add(NAME, token="t")
    reader = ModelReader(here.folder, here.environ, Hub(here.environ, asks=True))
    env = "{HF_ENDPOINT: 'http://127.0.0.1:9', HF_TOKEN: t, PYTHONPATH: /x}"
    text = f"version: 1\nengines: {{a: {{model: {NAME}, env: {env}}}, b: {{model: {NAME}, env: {{HF_TOKEN: t}}}}}}"
    wanted = desired(text)
    (one, _), (other, _) = reader.away(wanted)
    assert (one.endpoint, other.endpoint) == ("http://127.0.0.1:9", hub.url)
    assert one.environ.get("PYTHONPATH") != "/x"
    assert one.key != other.key
    Hub(here.environ, asks=True).wait([one, other], LONG_S)
    assert numbers(reader.read(wanted)[NAME]) == NUMBERS, "what one of two tells counts for the model"


def test_why_memory_goes_by_a_name_is_said_of_each_engine_without_the_name() -> None:
    wanted = desired(f"version: 1\nengines: {{a: {{model: {NAME}}}, b: {{model: {NAME}, memory: 1GiB}}}}")
    told = unread(wanted, {NAME: ModelFacts("", problem="it is gated")})
    assert told == ["a: its memory goes by the name of its model: it is gated"]
    assert unread(wanted, {NAME: ModelFacts("", pending=True)}) == []


def test_where_the_library_is_missing_it_is_said_how_to_get_it(here: Here, hub: StandInHub) -> None:
    code = (
        "import os, sys; from pathlib import Path; sys.modules['huggingface_hub'] = None\n"
        "from sage_reconcile.cli.asking import facts_of; print(facts_of('org/name', offline=False).problem)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=here.environ, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == MISSING
    assert hub.asked == []


def test_a_library_that_is_too_old_is_said_to_be(here: Here) -> None:
    (here.folder / "old/huggingface_hub").mkdir(parents=True)
    (here.folder / "old/huggingface_hub/__init__.py").write_text("__version__ = '0.20'\n")
    here.environ["PYTHONPATH"] = str(here.folder / "old")
    assert here.problem().endswith("it has to be 1.0 or later")


def test_settings_that_cannot_be_used_are_not_quoted(here: Here) -> None:
    assert "cannot be used" in here.problem(HF_HUB_DOWNLOAD_TIMEOUT="soon")
    told = here.problem("org/other", HTTP_PROXY="gopher://user:pass@127.0.0.1:9")
    assert "cannot be used" in told
    assert "pass" not in told


def test_only_whoever_asks_carries_the_library(here: Here, hub: StandInHub) -> None:
    hub.add(NAME)
    code = (
        "import sys; from sage_reconcile.cli.asking import facts_of\n"
        "assert facts_of('org/name', offline=False).checkpoint\n"
        "print([name for name in ('huggingface_hub', 'httpx', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=here.environ, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_to_estimate_a_folder_asks_nobody_and_carries_nothing(here: Here, hub: StandInHub) -> None:
    (here.folder / "org/name").mkdir(parents=True)
    (here.folder / "org/name/config.json").write_text(json.dumps(CONFIG))
    code = (
        "import sys; from sage_reconcile.cli.estimating import estimate_model, question\n"
        "from sage_reconcile.core.workload import Workload\n"
        "asked = question('org/name', Workload(), (), tensor_told=True, longest=False, kv_cache=None)\n"
        "assert estimate_model(asked, as_json=False) == 0\n"
        "print([name for name in ('huggingface_hub', 'httpx', 'torch', 'transformers') if name in sys.modules])"
    )
    run = {"env": here.environ, "cwd": here.folder, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], check=True, **run)
    assert done.stdout.splitlines()[-1] == "[]"
    assert hub.asked == []


def test_where_it_is_kept() -> None:
    assert cache_folder({"XDG_CACHE_HOME": "/c", "HOME": "/h"}) == Path("/c/sage-reconcile/models")
    assert cache_folder({"HOME": "/h"}) == Path("/h/.cache/sage-reconcile/models")
    assert cache_folder({}).parts[-3:] == (".cache", "sage-reconcile", "models")
