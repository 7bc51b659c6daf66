"""What folders of models, and the cache of Hugging Face, tell without loading anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sage_reconcile.core.sizing import Card, size
from sage_reconcile.core.workload import Workload
from sage_reconcile.host.models import INDEX, ModelReader, hub_cache
from tests.reading import desired

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 320,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}
TENSORS = {"model.embed_tokens.weight": [320, 64], "lm_head.weight": [320, 64]} | {
    f"model.layers.{layer}.mlp.up_proj.weight": [128, 64] for layer in range(2)
}


def write(path: Path, tensors: dict[str, list[int]], *, cut: int = 0) -> None:
    """A safetensors file in bfloat16 whose weights are a hole; ``cut`` bytes of them are missing."""
    at = 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, shape in tensors.items():
        end = at + 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at - cut)


def odd(header: str) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(CONFIG))
    return made


def reader(folder: Path, **environ: str) -> ModelReader:
    return ModelReader(folder.parent, {"HOME": str(folder.parent / "home")} | environ)


def numbers(folder: Path) -> int:
    """How many numbers the headers tell of."""
    found = reader(folder).facts("model")
    assert found is not None
    assert found.problem == ""
    assert found.checkpoint is not None
    return sum(piece.numbers for piece in found.checkpoint.pieces)


ALL = 2 * 320 * 64 + 2 * 128 * 64


def test_a_folder_with_nothing_but_a_config_tells_what_it_describes(folder: Path) -> None:
    found = reader(folder).facts("model")
    assert found is not None
    assert found.config is not None
    assert (found.config.hidden, len(found.config.layers)) == (64, 2)
    assert (found.checkpoint, found.problem, found.source) == (None, "", str(folder))


def test_headers_are_read_of_one_file_of_several_and_by_the_index(folder: Path) -> None:
    write(folder / "model.safetensors", TENSORS)
    assert numbers(folder) == ALL
    (folder / "model.safetensors").unlink()
    names = list(TENSORS)
    write(folder / "part-1.safetensors", {name: TENSORS[name] for name in names[:2]})
    write(folder / "part-2.safetensors", {name: TENSORS[name] for name in names[2:]})
    write(folder / "consolidated.safetensors", TENSORS)
    assert numbers(folder) == ALL
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "part-1.safetensors")}))
    assert numbers(folder) == 2 * 320 * 64, "what the index does not name is not loaded"


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (b"", "is not a safetensors file"),
        (b"\x00" * 8, "is not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is not a safetensors file"),
        ((1000).to_bytes(8, "little") + b'{"a"', "or cut short"),
        ((2).to_bytes(8, "little") + b"[]", "or cut short"),
        ((8).to_bytes(8, "little") + b'{"a": 1}', "or cut short"),
        ((4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc", "or cut short"),
        (odd('{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 0]}}'), "odd shapes"),
        (odd('{"a": {"dtype": [], "shape": [1, 1], "data_offsets": [0, 0]}}'), "odd shapes"),
    ],
)
def test_an_odd_file_is_told_and_the_config_still_counts(folder: Path, broken: bytes, told: str) -> None:
    (folder / "model.safetensors").write_bytes(broken)
    found = reader(folder).facts("model")
    assert found is not None
    assert found.config is not None
    assert found.checkpoint is None
    assert "safetensors" in found.problem
    assert told in found.problem


def test_a_file_without_its_last_byte_is_told(folder: Path) -> None:
    write(folder / "model.safetensors", TENSORS, cut=1)
    found = reader(folder).facts("model")
    assert found is not None
    assert found.checkpoint is None
    assert f"cut short: {2 * ALL - 1} bytes of weights of {2 * ALL} are there" in found.problem


def test_a_shard_that_is_not_there_is_told(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "part-1.safetensors"}}))
    found = reader(folder).facts("model")
    assert found is not None
    assert found.problem == "part-1.safetensors cannot be read: No such file or directory"
    for odd in ("[]", "{", '{"weight_map": 3}'):
        (folder / INDEX).write_text(odd)
        found = reader(folder).facts("model")
        assert found is not None
        assert found.problem == f"its {INDEX} cannot be read"


@pytest.mark.parametrize("broken", ["{", "[]", "3", "{}", "[" * 100_000, '{"hidden_size": "x"}'])
def test_a_config_that_cannot_be_used_is_told(folder: Path, broken: str) -> None:
    (folder / "config.json").write_text(broken)
    found = reader(folder).facts("model")
    assert found is not None
    assert found.config is None
    assert found.problem.startswith("its config.json")


@pytest.mark.parametrize("model", ["no/such", "", "a\0b", "x" * 5000, "..", "\ud800"])
def test_of_a_name_without_anything_nothing_is_known(folder: Path, model: str) -> None:
    assert reader(folder).facts(model) is None


def cached(hub: Path, revision: str = "abc", *, main: bool = True) -> Path:
    entry = hub / "models--org--name"
    snapshot = entry / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(CONFIG))
    if main:
        (entry / "refs").mkdir(exist_ok=True)
        (entry / "refs/main").write_text(revision + "\n")
    return snapshot


def test_the_cache_tells_of_what_was_downloaded(folder: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    snapshot = cached(hub)
    found = reader(folder, HF_HUB_CACHE=str(hub)).facts("org/name")
    assert found is not None
    assert found.source == str(snapshot)
    newer = cached(hub, "def")
    found = reader(folder, HF_HUB_CACHE=str(hub)).facts("org/name")
    assert found is not None
    assert found.source == str(newer), "refs/main names the revision"
    (hub / "models--org--name/refs/main").write_text("gone")
    assert reader(folder, HF_HUB_CACHE=str(hub)).facts("org/name") is None
    (hub / "models--org--name/refs/main").unlink()
    assert reader(folder, HF_HUB_CACHE=str(hub)).facts("org/name") is None, "which of the two is not told"


def test_the_cache_holds_revisions_apart(folder: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    cached(hub)
    older = cached(hub, "def", main=False)
    (hub / "models--org--name/refs/v1").write_text("def")
    one = reader(folder, HF_HUB_CACHE=str(hub))
    sources = {name: found.source for name in ("v1", "def") if (found := one.facts("org/name", revision=name))}
    assert sources == {"v1": str(older), "def": str(older)}
    assert one.facts("org/name", revision="v2") is None
    wanted = desired(
        "version: 1\nengines: {a: {model: org/name, args: {revision: v1}}, b: {model: org/name, args: {revision: v2}},"
        " c: {model: org/name}}"
    )
    assert set(one.read(wanted)) == {"org/name@v1", "org/name"}


def test_one_snapshot_without_a_name_is_the_one(folder: Path, tmp_path: Path) -> None:
    cached(tmp_path / "hub", main=False)
    assert reader(folder, HF_HUB_CACHE=str(tmp_path / "hub")).facts("org/name") is not None


def test_an_engine_may_have_a_cache_of_its_own(folder: Path, tmp_path: Path) -> None:
    cached(tmp_path / "own/hub")
    wanted = desired(
        f"version: 1\nengines: {{a: {{model: org/name, memory: auto, env: {{HF_HOME: {tmp_path / 'own'}}}}},"
        " b: {model: model, memory: 1GiB}, c: {model: no/such}, d: {runtime: command, command: serve, model: model}}"
    )
    assert set(reader(folder).read(wanted)) == {"org/name", "model"}
    only_a_command = [engine for engine in wanted.engines if engine.name == "d"]
    assert not reader(folder).read(replace(wanted, engines=tuple(only_a_command))), "what it does with it is its own"


@pytest.mark.parametrize(
    ("environ", "where"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b", "HOME": "/h"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/a", "HOME": "/h"}, "/a"),
        ({"HF_HOME": "/b", "HOME": "/h"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c", "HOME": "/h"}, "/c/huggingface/hub"),
        ({"HOME": "/h"}, "/h/.cache/huggingface/hub"),
    ],
)
def test_where_the_cache_is(environ: dict[str, str], where: str) -> None:
    assert hub_cache(environ) == Path(where)


def test_what_has_not_changed_is_not_read_again(folder: Path) -> None:
    write(folder / "model.safetensors", TENSORS)
    one = reader(folder)
    first = one.facts("model")
    assert one.facts("model") is first
    write(folder / "model.safetensors", dict(list(TENSORS.items())[:2]))
    os.utime(folder / "model.safetensors", ns=(5, 5))
    second = one.facts("model")
    assert second is not first
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 3}))
    third = one.facts("model")
    assert third is not None
    assert third.config is not None
    assert len(third.config.layers) == 3


def test_an_estimate_takes_few_milliseconds(folder: Path) -> None:
    """As large as Llama-3.1-70B: 723 tensors in 30 files."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "ln1", "ln2")
    tensors = {f"model.layers.{layer}.{name}.weight": [8, 8] for layer in range(80) for name in names}
    every = list(tensors.items())
    for part in range(30):
        write(folder / f"part-{part}.safetensors", dict(every[part::30]))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 80}))
    best = 1.0
    for _ in range(5):
        begun = time.perf_counter()
        found = reader(folder).facts("model")
        assert found is not None
        assert found.config is not None
        size(found.config, Workload(), Card(), found.checkpoint)
        best = min(best, time.perf_counter() - begun)
    assert best < 0.03


def test_nothing_heavy_is_imported(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sage_reconcile.host.models import ModelReader;"
        f"assert ModelReader(Path({str(folder.parent)!r}), {{}}).facts('model');"
        "print([name for name in ('torch', 'transformers', 'huggingface_hub', 'safetensors', 'numpy')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
