"""The command ``estimate``, as a person uses it."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from tests.e2e.box import Box
from tests.models import LLAMA_8B as MODEL
from tests.models import LONGEST
from tests.test_examples import schema

LLAMA_8B = MODEL | LONGEST


@pytest.fixture
def model(box: Box) -> str:
    (box.folder / "llama").mkdir()
    (box.folder / "llama/config.json").write_text(json.dumps(LLAMA_8B))
    return "llama"


def asked(box: Box, *words: str, expect: int = 0) -> Any:
    document = box.json("estimate", *words, expect=expect)
    jsonschema.validate(document, schema("estimate"), cls=jsonschema.Draft202012Validator)
    parts = document["parts"]
    assert document["total_mib"] == sum(parts.values())
    return document


def test_a_folder_with_a_config_tells_parts_total_and_tokens(box: Box, model: str) -> None:
    document = asked(box, model, "--context", "32k", "--concurrency", "4")
    assert document["parts"]["kv_cache_mib"] == 4 * 32 * 128 + 2
    assert document["parts"]["weights_mib"] == pytest.approx(15 * 1024, rel=0.01)
    assert document["kv_tokens"] == 4 * 32768 + 16
    assert (document["confidence"], document["gpu"], document["context"]) == ("estimated", None, 32768)
    halved = asked(box, model, "--context", "32k", "--concurrency", "4", "-tp", "2")
    assert halved["parts"]["kv_cache_mib"] == document["parts"]["kv_cache_mib"] // 2
    text = box.run("estimate", model, "--context", "32k", "--concurrency", "4")
    assert text.startswith("llama, 4 x 32,768 tokens: MiB of each GPU\n\nPART ")
    assert "The KV cache holds 131,088 tokens." in text
    assert "weights " in text
    assert "guess" not in text.splitlines()[-1]


def test_the_context_is_the_models_own_where_none_is_given(box: Box, model: str) -> None:
    assert asked(box, model)["context"] == 131072
    (box.folder / "llama/config.json").write_text(json.dumps(LLAMA_8B | {"max_position_embeddings": None}))
    assert asked(box, model)["context_assumed"] is True
    assert "tells no longest context" in box.run("estimate", model)


def test_it_exits_3_where_it_does_not_fit_and_says_what_would(box: Box, model: str) -> None:
    small = asked(box, model, "--gpu", "RTX-4090", expect=3)
    assert (small["gpu"]["fits"], small["gpu"]["smallest_tensor_parallel_size"]) == (False, 2)
    text = box.run("estimate", model, "--gpu", "RTX-4090", expect=3)
    assert "It does not fit on RTX-4090" in text
    assert [(way["field"], way["value"]) for way in small["gpu"]["ways"]] == [
        ("context", 41984),
        ("tensor_parallel_size", 2),
    ]
    assert "  With --context 41984: 23.4GiB.\n  With --tensor-parallel-size 2: 21.8GiB." in text
    shorter = asked(box, model, "--gpu", "RTX-4090", "--context", "41984")
    assert (shorter["gpu"]["fits"], shorter["gpu"]["ways"]) == (True, [])
    large = asked(box, model, "--gpu", "H100-80GB")
    assert large["gpu"]["fits"]
    assert large["gpu"]["smallest_tensor_parallel_size"] == 1
    assert large["gpu"]["kv_tokens"] > 400_000
    assert "alone makes it fit there" in box.run("estimate", model, "--gpu", "4GiB", expect=3)


def test_without_a_gpu_given_it_tells_the_smallest_sets_that_hold_it(box: Box, model: str) -> None:
    found = {item["gpu"]: item["count"] for item in asked(box, model, "--context", "32k")["smallest"]}
    assert (found["H100-80GB"], found["L4"], found["T4"]) == (1, 2, 4)
    text = box.run("estimate", model, "--context", "32k")
    assert "\nIt fits on 1 x " in text
    assert "\n        or 2 x A10, A10G, L4\n        or 4 x " in text


def test_of_several_gpus_as_few_as_hold_it_are_taken(box: Box, model: str) -> None:
    assert asked(box, model, "--gpu", "8xRTX-4090")["tensor_parallel_size"] == 2
    assert asked(box, model, "--gpu", "8xRTX-4090", "-tp", "4")["tensor_parallel_size"] == 4
    assert asked(box, model, "--gpu", "2xH100-80GB", "-tp", "4", expect=3)["gpu"]["fits"] is False


def test_max_is_the_longest_context_that_fits(box: Box, model: str) -> None:
    document = asked(box, model, "--gpu", "RTX-4090", "--max")
    longest = document["gpu"]["longest_context"]
    assert 30_000 < longest < 131_072
    assert asked(box, model, "--gpu", "RTX-4090", "--context", str(longest))["gpu"]["fits"]
    asked(box, model, "--gpu", "RTX-4090", "--context", str(longest + 16), expect=3)
    assert asked(box, model, "--gpu", "H100-80GB", "--max")["gpu"]["longest_context"] == 131_072, "its own limit"
    four = asked(box, model, "--gpu", "RTX-4090", "--max", "--concurrency", "4")["gpu"]["longest_context"]
    assert four == pytest.approx(longest / 4, abs=32)
    asked(box, model, "--gpu", "8GiB", "--max", expect=3)


def test_a_cache_of_a_given_size_holds_so_many_tokens(box: Box, model: str) -> None:
    document = asked(box, model, "--kv-cache", "16GiB")
    assert document["kv_tokens"] == 16 * 1024 * 8
    assert document["parts"]["kv_cache_mib"] == 16 * 1024
    assert asked(box, model, "--kv-cache", "16GiB", "--kv-cache-dtype", "fp8")["kv_tokens"] == 16 * 1024 * 16


def test_a_name_without_anything_is_a_guess_and_says_so(box: Box) -> None:
    document = asked(box, "org/Model-8B", "--gpu", "L4")
    assert (document["confidence"], document["total_mib"], document["kv_tokens"]) == ("guessed", 20359, None)
    assert set(document["part_confidence"].values()) == {"guessed"}
    assert "A guess from the name" in box.run("estimate", "org/Model-8B")
    text = box.run("estimate", "org/mystery", expect=1)
    assert text.startswith("error: nothing here tells how large org/mystery is: give a folder with its config.json")
    (box.folder / "odd").mkdir()
    (box.folder / "odd/config.json").write_text("{}")
    assert "its config.json does not describe a decoder" in box.run("estimate", "odd", expect=1)


def test_a_file_of_weights_that_is_cut_short_is_noted(box: Box, model: str) -> None:
    (box.folder / "llama/model.safetensors").write_bytes(b"oops")
    document = asked(box, model)
    assert document["note"] == "model.safetensors is not a safetensors file"
    assert document["confidence"] == "estimated"
    assert "note: model.safetensors is not a safetensors file" in box.run("estimate", model)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max"], "--max: it asks what fits on a GPU; give one with --gpu"),
        (["--context", "long"], "expected a number of tokens, got the text 'long'; write it as 8192 or 32k"),
        (["--context", "0"], "expected a number of tokens, got the text '0'"),
        (["--gpu", "2xH100-80GB,4xL4"], "one replica runs on GPUs of one model"),
        (["--gpu", "Foo"], "'Foo' names no known GPU"),
        (["--kv-cache", "8"], "expected a size"),
        (["--dtype", "int3"], "'int3' is no type"),
    ],
)
def test_what_is_not_understood_is_wrong_usage(box: Box, model: str, words: list[str], said: str) -> None:
    assert said in " ".join(box.run("estimate", model, *words, expect=64, COLUMNS="400").split())


def test_an_estimate_for_the_cpu_is_what_a_plan_promises(box: Box, model: str) -> None:
    document = asked(box, model, "--device", "cpu", "--context", "4k", "-tp", "2")
    assert (document["device"], document["kv_space_gib"], document["gpu"], document["smallest"]) == ("cpu", 1, None, [])
    assert document["parts"]["processes_mib"] == 4 * 512
    assert document["total_mib"] == sum(document["parts"].values())
    text = box.run("estimate", model, "--device", "cpu", "--context", "4k")
    assert text.startswith("llama, 1 x 4,096 tokens: MiB of the host, all processes together\n")
    assert "VLLM_CPU_KVCACHE_SPACE=1" in text
    box.write("real: {model: llama, device: cpu, context: 4k, tensor_parallel_size: 2, memory: auto}", "gpus: none")
    assert box.json("explain", "real", expect=None)["replicas"][0]["host_memory"]["need_mib"] == document["total_mib"]
    assert "--gpu" in box.run("estimate", model, "--device", "cpu", "--gpu", "L4", expect=64)
    guess = asked(box, "a/b-7B", "--device", "cpu", "--offline")
    assert (guess["confidence"], guess["kv_space_gib"], guess["context"]) == ("guessed", 4, None)
    assert "nothing here tells how large" in box.run("estimate", "mystery", "--device", "cpu", "--offline", expect=1)
