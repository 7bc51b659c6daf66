"""GPUs that are not here: ``diff --gpus``, and declared ones in the file, as a person uses them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import jsonschema
import pytest

from tests.e2e.box import REPOSITORY, Box
from tests.test_examples import schema

SIMULATED = "runtime: simulator, model: a/b-7B, memory: 20GiB"
LARGE = "large: {model: m/l, memory: 90%, tensor_parallel_size: 8, link: nvlink}"


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_diff_with_gpus_says_that_it_fits_and_touches_nothing(box: Box) -> None:
    box.write(
        f"{LARGE}\ncpu: {{model: m/c, device: cpu}}\nfake: {{model: m, runtime: simulator, memory: 4GiB}}",
        host="gpus: none",
    )
    before = everything(box.folder)
    text = box.run("diff", "--gpus", "8xH100-80GB")
    assert text.startswith("Would it fit on 8 x H100-80GB (79.6GiB, NVLink)?\n")
    assert "+ large/0  start      GPUs 0,1,2,3,4,5,6,7 (H100-80GB)  71.7GiB each" in text
    assert text.endswith("Yes: all 3 have a place.\n")
    assert "cannot start" not in text
    assert everything(box.folder) == before


def test_diff_with_gpus_exits_3_where_something_does_not_fit_and_says_why(box: Box) -> None:
    box.write(f"{LARGE}\nsmall: {{model: m/s, memory: 20GiB}}")
    text = box.run("diff", "--gpus", "8xL40S,H100-NVL", expect=3)
    assert text.startswith("Would it fit on 8 x L40S (45.0GiB, PCIe) and 1 x H100-NVL (93.6GiB)?\n")
    assert "! large/0  unplaced   needs 90% = 84.2GiB on 8 GPUs of one model joined by NVLink" in text
    assert "+ small/0  start" in text
    assert text.endswith("No: 1 of 2 have no place.\n")


def test_diff_with_gpus_as_json_is_the_document_of_every_plan(box: Box) -> None:
    box.write(LARGE)
    plan = box.json("diff", "--gpus", "8xH100")
    jsonschema.validate(plan, schema("plan"), cls=jsonschema.Draft202012Validator)
    assert [(a["replica"], [gpu["index"] for gpu in a["gpus"]], a["blocked"]) for a in plan["actions"]] == [
        ("large/0", list(range(8)), "")
    ]
    assert plan["summary"]["start"] == 1
    assert box.json("diff", "--gpus", "4xH100", expect=3)["summary"]["unplaced"] == 1


def test_diff_with_gpus_keeps_to_headroom_exclusions_pins_and_models_of_the_file(box: Box) -> None:
    (box.folder / "tiny").mkdir()
    (box.folder / "tiny/config.json").write_text(
        '{"hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 32000, "num_attention_heads": 32,'
        ' "intermediate_size": 11008}'
    )
    engines = (
        "auto: {model: tiny, gpus: [2]}\nmore: {model: m, memory: 22GiB}\nfull: {model: m, memory: 24GiB}\n"
        "pinned: {model: m, memory: 1GiB, gpus: [GPU-00000000]}\nfar: {model: m, memory: 1GiB, gpus: [7]}"
    )
    box.write(engines, host="headroom: 1GiB\nexclude: [0]")
    plan = box.json("diff", "--gpus", "3x24GiB", expect=3)
    assert {a["replica"]: ([gpu["index"] for gpu in a["gpus"]], a["memory_mib"]) for a in plan["actions"]} == {
        "auto/0": ([2], 16822),
        "more/0": ([1], 22528),
    }
    reasons = {item["replica"]: item["reason"] for item in plan["unplaced"]}
    assert "GPU 0 takes nothing new (excluded by `host.exclude`)" in reasons["full/0"]
    assert "reserve and headroom 1.0GiB" in reasons["full/0"]
    assert reasons["pinned/0"] == (
        "its `gpus` name GPU-00000000, which this machine does not have; it has 0, 1, 2; GPUs that are only declared "
        "have no UUIDs to go by: name them by index"
    )
    assert reasons["far/0"] == "its `gpus` name 7, which this machine does not have; it has 0, 1, 2"


def test_diff_with_gpus_looks_at_nothing_that_runs_here(box: Box) -> None:
    box.write(f"chat: {{{SIMULATED}, port: {box.ports.split('-')[0]}}}")
    box.run("apply", "--yes")
    plan = box.json("diff", "--gpus", "1x24GiB")
    assert [(a["kind"], a["replica"]) for a in plan["actions"]] == [("spawn", "chat/0")]
    assert plan["gpus"][0]["promised_before_mib"] == 0
    box.run("down", "--yes")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "4xA100"], "'A100' may be A100-80GB or A100-40GB; write which"),
        (["--gpus", "4xFoo"], "'Foo' names no known GPU; give its memory, as in 4xMyCard:48GiB or 4x48GiB"),
        (["--gpus", ""], "a declaration of GPUs is empty"),
    ],
)
def test_gpus_that_are_not_understood_are_wrong_usage(box: Box, words: list[str], said: str) -> None:
    box.write(LARGE)
    text = " ".join(box.run("diff", *words, expect=64, COLUMNS="400").split())
    assert said in text


def test_apply_starts_what_it_can_on_declared_gpus_and_says_why_not_the_rest(box: Box) -> None:
    box.write(
        f"first: {{model: m/f, memory: 10GiB, gpus: [0], priority: 5}}\nfake: {{{SIMULATED}, gpus: [0]}}",
        host="gpus: 2xH100-80GB",
    )
    text = box.run("diff", expect=2)
    assert "+ first/0  placed     GPU 0 (H100-80GB)  10.0GiB" in text
    assert "cannot start here: the GPUs of this file are declared, not there" in text
    begun = time.monotonic()
    text = box.run("apply", "--yes", expect=3)
    assert time.monotonic() - begun < 20
    assert "1 cannot be placed or started" in text
    assert "first/0: the GPUs of this file are declared, not there; only `runtime: simulator` runs on them" in text
    assert set(box.ready()) == {"fake/0"}
    before = box.ready()
    again = box.run("apply", expect=3)
    assert "Do this?" not in again, "there is nothing to agree to"
    assert "there is no terminal" not in again
    assert box.ready() == before
    row = box.replicas()["first/0"]
    assert (row["phase"], row["unplaced"], row["launch"]) == ("Pending", True, None)
    assert not box.status()["converged"]


def test_a_daemon_follows_declared_gpus_and_apply_through_it_ends(box: Box) -> None:
    box.write(f"first: {{model: m/f, memory: 10GiB}}\nfake: {{{SIMULATED}}}", host="gpus: [2xH100-80GB]")
    box.start_daemon()
    box.until("the simulator is ready", lambda: set(box.ready()) == {"fake/0"})
    assert "1 cannot be placed or started" in box.run("apply", "--yes", expect=3)
    before = box.ready()
    box.write("fake: {model: m/f, memory: 10GiB}", host="gpus: [2xH100-80GB]")
    text = box.run("apply", "--yes", expect=3)
    assert "what runs of it now stays as it is" in text
    assert box.ready() == before
    errors = [line for line in box.daemon_log().splitlines() if '"level": "error"' in line]
    assert {json.loads(line)["event"] for line in errors} == {"unplaced"}, "that is said, and nothing goes wrong"


def test_the_example_says_what_it_does(box: Box) -> None:
    example = REPOSITORY / "examples/would-it-fit/engines.yaml"
    assert "Yes: all 5 have a place." in box.run("diff", "-f", str(example), "--gpus", "8xA100-80GB")
    assert "5 that cannot start here." in box.run("diff", "-f", str(example), expect=2)
