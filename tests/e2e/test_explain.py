"""The command ``explain``, as a user runs it."""

from __future__ import annotations

import jsonschema

from tests.e2e.box import Box
from tests.test_examples import schema

SIMULATED = "runtime: simulator, model: a/b-7B"
FILE = (
    f"one: {{{SIMULATED}, memory: 30GiB, replicas: 2, spread: gpu}}\n"
    f"large: {{{SIMULATED}, memory: 60GiB}}\nidle: {{{SIMULATED}, replicas: 0}}\ncpu: {{{SIMULATED}, device: cpu}}"
)


def test_explain_tells_of_an_engine_and_of_a_replica_why_and_every_gpu(box: Box) -> None:
    box.write(FILE)
    text = box.run("explain", "one")
    rows = [line.split() for line in text.splitlines()]
    assert text.startswith("one/0 starts on GPU 0\n  wanted, and not running\n")
    assert "\n\none/1 starts on GPU 1\n" in text
    assert ["GPU", "FREE", "NEEDS", "VERDICT"] in rows
    assert ["0", "H100-80GB", "80.0GiB", "30.0GiB", "->", "chosen,", "50.0GiB", "left", "beside", "it"] in rows
    assert ["1", "H100-80GB", "50.0GiB", "30.0GiB", "has", "one/1", "already"] in rows
    box.run("apply", "--yes", expect=3)
    assert box.run("explain", "one/1").startswith("one/1 runs on GPU 1\n")
    assert box.run("explain", "cpu") == (
        "cpu/0 runs on the CPU\n  what runs stays where it is: neither its entry nor the user asks for a change\n"
    )


def test_explain_exits_with_3_where_something_has_no_place_and_shows_what_would_help(box: Box) -> None:
    apart = f"one: {{{SIMULATED}, memory: 30GiB, gpus: [0]}}\ntwo: {{{SIMULATED}, memory: 30GiB, gpus: [1]}}"
    box.write(apart)
    box.run("apply", "--yes")
    box.write(f"{apart.replace(', gpus: [0]', '')}\nlarge: {{{SIMULATED}, memory: 60GiB, replicas: 2}}")
    text = box.run("explain", "large", expect=3)
    assert text.startswith("large/0 has no place\n  needs 60.0GiB on 1 GPU")
    assert "Proposal: large/0 gets in if 1 replica moves:\n  one/0  GPU 0 -> GPU 1  no downtime" in text
    box.run("explain", "one")
    document = box.json("explain", "large", expect=3)
    jsonschema.validate(document, schema("explain"), cls=jsonschema.Draft202012Validator)
    first, second = document["replicas"]
    assert (first["replica"], first["placed"], first["outcome"]) == ("large/0", False, "has no place")
    assert [gpu["verdict"] for gpu in first["gpus"]] == ["10.0GiB too little"] * 2
    assert [(gpu["free_mib"], gpu["need_mib"]) for gpu in first["gpus"]] == [(50 * 1024, 60 * 1024)] * 2
    assert [move["replica"] for move in first["proposal"]["moves"]] == ["one/0"]
    assert (second["replica"], second["proposal"]) == ("large/1", None)


def test_what_explain_prints_as_json_keeps_to_its_schema(box: Box) -> None:
    box.write(FILE)
    jsonschema.Draft202012Validator.check_schema(schema("explain"))
    assert schema("explain")["$defs"]["proposal"] == schema("plan")["properties"]["proposals"]["items"]
    for name in ("one", "cpu/0"):
        document = box.json("explain", name)
        jsonschema.validate(document, schema("explain"), cls=jsonschema.Draft202012Validator)
        assert all(row["placed"] for row in document["replicas"])


def test_a_name_that_is_not_there_is_told_with_those_that_are(box: Box) -> None:
    box.write(FILE)
    text = box.run("explain", "ones", expect=1)
    assert text == "error: there is no engine 'ones'; the file names one, large, idle, cpu\n"
    text = box.run("explain", "one/2", expect=1)
    assert text == "error: there is no replica 'one/2'; it has one/0 to one/1\n"
    assert box.run("explain", "idle", expect=1) == "error: there is no replica 'idle'; its `replicas` is 0\n"
    box.run("explain", "one/", expect=1)
    box.run("explain", "one", "-o", "yaml", expect=64)
    box.run("explain", expect=64)
