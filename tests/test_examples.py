"""Every example is valid, fits its schema, and can be planned; every schema says what is true."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from sage_reconcile.core.check import check_plan
from sage_reconcile.core.declared import declared_gpus, declared_links
from sage_reconcile.core.gpu_report import gpu_document
from sage_reconcile.core.host_spec import HostSpec
from sage_reconcile.core.observed import Gpu, Observed
from sage_reconcile.core.planner import make_plan
from sage_reconcile.core.report import plan_document, status_document
from sage_reconcile.core.resolve import resolve
from sage_reconcile.core.schema import file_schema
from sage_reconcile.core.source import Source
from sage_reconcile.core.spec import EngineSpec
from sage_reconcile.core.starter import starter
from sage_reconcile.host import files

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((REPOSITORY / "examples").rglob("engines.yaml"))
BOX = tuple(Gpu(f"GPU-{i}", i, "H100-80GB", f"0000:{i:02x}", 81559, 528) for i in range(8))


def schema(name: str) -> Any:
    return json.loads((REPOSITORY / "schemas" / f"{name}.schema.json").read_text(encoding="utf-8"))


def checked(data: Any, name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(schema(name))
    jsonschema.validate(data, schema(name), cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_an_example_is_valid_and_everything_in_it_finds_a_place(path: Path) -> None:
    desired = files.load(path, {}).desired
    declared = desired.host.declared
    gpus = BOX if desired.host.gpus == "auto" else declared_gpus(declared, simulated=True)
    observed = Observed(gpus=gpus, links=declared_links(declared, gpus) if declared else {})
    plan = make_plan(desired, observed, 0.0)
    assert check_plan(desired, observed, plan) == []
    assert [item.reason for item in plan.unplaced] == []
    assert len(plan.actions) == sum(engine.spec.replicas for engine in desired.engines) > 0
    checked(plan_document(plan), "plan")
    own = {"file": "f", "file_error": "", "held_back": None, "generation": 1}
    own |= {"observed_generation": 1, "daemon": None}
    checked({**own, **status_document(desired, observed, plan, 0.0)}, "status")
    checked({"file": "f", "file_error": "", **gpu_document(desired.host, observed)}, "gpu")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_an_example_fits_the_schema_it_names(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / named).resolve() == REPOSITORY / "schemas/engines.schema.json"
    checked(yaml.safe_load(text), "engines")


def test_a_gpu_is_told_in_the_same_way_by_status_and_gpu() -> None:
    assert schema("gpu")["$defs"]["gpu"] == schema("status")["$defs"]["gpu"]


def test_the_schema_of_the_file_is_the_one_that_is_printed() -> None:
    assert schema("engines") == json.loads(json.dumps(file_schema()))


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"modell": "x"}, "modell"),
        ({"model": "x", "replicas": "two"}, "two"),
        ({"model": "x", "args": {"port": 1}}, "port"),
        ({"model": "x", "memory": 24}, "24"),
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(wrong: dict[str, object], where: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match=where):
        checked({"version": 1, "engines": {"a": wrong}}, "engines")
    _, faults = resolve(Source({"version": 1, "engines": {"a": wrong}}, {}, {}), {}, {})
    assert faults


@pytest.mark.parametrize(
    ("gpus", "fits"),
    [
        ("8xH100-80GB", True),
        ("4x24GiB", True),
        ([{"name": "H100"}, "2xL4", {"name": "Mine", "memory": "8GiB", "count": 2}], True),
        ("all", False),
        ([], False),
        (["all"], False),
        ([{"memory": "8GiB"}], False),
        ([{"name": "H100", "memory": 80}], False),
    ],
)
def test_the_schema_knows_how_gpus_are_declared(gpus: object, fits: bool) -> None:
    data = {"version": 1, "host": {"gpus": gpus}, "engines": {}}
    _, faults = resolve(Source(data, {}, {}), {}, {})
    assert (faults == []) is fits
    with contextlib.nullcontext() if fits else pytest.raises(jsonschema.ValidationError):
        checked(data, "engines")


def test_the_complete_example_and_the_readme_show_every_field() -> None:
    shown = (REPOSITORY / "examples/vllm/engines.yaml").read_text(encoding="utf-8")
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    rare = {"pipeline_parallel_size", "data_parallel_size", "env_file"}
    for name in {*EngineSpec.model_fields, *HostSpec.model_fields}:
        assert name in rare or f"{name}:" in shown, name
        assert name in readme, name


@pytest.mark.parametrize("gpus", [(), BOX[:1], BOX], ids=["none", "one", "eight"])
def test_what_init_writes_is_valid_and_can_be_planned(gpus: tuple[Gpu, ...], tmp_path: Path) -> None:
    path = tmp_path / "engines.yaml"
    path.write_text(starter(gpus, "no NVIDIA driver here"), encoding="utf-8")
    desired = files.load(path, {}).desired
    gpus = declared_gpus(desired.host.declared, simulated=True) or gpus
    plan = make_plan(desired, Observed(gpus=gpus), 0.0)
    assert not plan.unplaced
    checked(yaml.safe_load(path.read_text(encoding="utf-8")), "engines")
