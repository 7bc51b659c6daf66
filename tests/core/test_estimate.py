"""Does it fit, on how many GPUs, and with how long a context?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from sage_reconcile.core.estimate import DRIVER_MIB, Question, estimate
from sage_reconcile.core.gpu_models import MODELS, Declared, read_gpus
from sage_reconcile.core.model_config import read_model_config
from sage_reconcile.core.observed import ModelFacts
from sage_reconcile.core.weights import Parallel
from sage_reconcile.core.workload import Workload
from tests.models import LLAMA_8B as MODEL
from tests.models import LONGEST
from tests.test_examples import schema

LLAMA_8B = MODEL | LONGEST


def facts(**fields: Any) -> ModelFacts:
    return ModelFacts("folder", read_model_config(LLAMA_8B | fields))


def asked(known: ModelFacts | None = None, *, gpu: str = "", name: str = "m", **fields: Any) -> Mapping[str, Any]:
    work = Workload(**{key: fields.pop(key) for key in list(fields) if key in Workload.__dataclass_fields__})
    declared = read_gpus(gpu)[0] if gpu else None
    found = estimate(Question(name, work, declared, **fields), known if known or name != "m" else facts())
    assert found is not None
    jsonschema.validate(found, schema("estimate"), cls=jsonschema.Draft202012Validator)
    assert found["total_mib"] == sum(found["parts"].values())
    return found


def test_it_fits_up_to_the_last_mib() -> None:
    total = asked(gpu="24GiB", context=8192)["total_mib"]
    for more, fits in ((0, True), (-1, False)):
        card = Declared("mine", total + DRIVER_MIB + more, 1)
        found = estimate(Question("m", Workload(context=8192), card), facts())
        assert found is not None
        assert (found["total_mib"], found["gpu"]["fits"]) == (total, fits)
        assert found["gpu"]["smallest_tensor_parallel_size"] == (1 if fits else 2)


def test_what_a_whole_gpu_leaves_to_the_cache() -> None:
    found = asked(gpu="H100-80GB", context=8192)
    rest = found["total_mib"] - found["parts"]["kv_cache_mib"]
    assert found["gpu"]["kv_pool_mib"] == 81559 - DRIVER_MIB - rest
    assert found["gpu"]["kv_tokens"] == found["gpu"]["kv_pool_mib"] * 2**20 // (16 * 2**17) * 16
    assert found["gpu"]["concurrency"] == pytest.approx(found["gpu"]["kv_tokens"] / 8192, abs=0.01)


def test_heads_that_do_not_divide_evenly_are_not_tried() -> None:
    odd = facts(num_attention_heads=36, hidden_size=4608, num_key_value_heads=4)
    assert asked(odd, gpu="8x8GiB", context=512)["gpu"]["smallest_tensor_parallel_size"] in (None, 4)
    assert not asked(odd, gpu="8xH100-80GB", parallel=Parallel(8))["gpu"]["fits"]


def test_of_several_gpus_as_few_as_hold_it_are_taken_and_of_one_kind_as_many_as_are_asked() -> None:
    found = asked(gpu="8xRTX-4090", tensor_told=False)
    assert (found["tensor_parallel_size"], found["gpu"]["count"]) == (2, 8)
    assert asked(gpu="RTX-4090", tensor_told=False)["tensor_parallel_size"] == 1
    assert asked(gpu="2xRTX-4090", tensor_told=False, longest=True)["tensor_parallel_size"] == 2
    assert asked(gpu="8xH100-80GB", tensor_told=False, longest=True)["tensor_parallel_size"] == 8
    both = asked(gpu="8xH100-80GB", tensor_told=False, longest=True, parallel=Parallel(1, 2))
    assert (both["tensor_parallel_size"], both["pipeline_parallel_size"]) == (4, 2)
    assert not asked(gpu="2xH100-80GB", parallel=Parallel(4))["gpu"]["fits"], "there are not so many"
    assert asked(gpu="H100-80GB", parallel=Parallel(4))["gpu"]["count"] == 4
    large = asked(gpu="8x4GiB", tensor_told=False)
    assert (large["tensor_parallel_size"], large["gpu"]["smallest_tensor_parallel_size"]) == (8, None)


def test_the_longest_context_ends_at_the_models_own_or_where_the_pool_does() -> None:
    assert asked(gpu="H100-80GB", longest=True)["gpu"]["longest_context"] == 131072
    untold = asked(facts(max_position_embeddings=None), gpu="H100-80GB", longest=True)
    assert untold["gpu"]["longest_context"] > 131072
    assert asked(gpu="H100-80GB")["gpu"]["longest_context"] is None
    small = asked(gpu="8GiB", longest=True)
    assert (small["gpu"]["longest_context"], small["gpu"]["fits"]) == (0, False)


def test_a_cache_of_a_given_size_takes_the_place_of_what_the_context_needs() -> None:
    found = asked(kv_mib=1024)
    assert (found["parts"]["kv_cache_mib"], found["kv_tokens"]) == (1024, 8192)
    assert found["part_confidence"]["kv_cache"] == "exact"


def test_a_name_is_a_guess_and_no_name_is_nothing() -> None:
    found = asked(name="org/M-8B", gpu="L4")
    assert (found["confidence"], found["total_mib"], found["gpu"]["fits"]) == ("guessed", 20359, True)
    assert (found["gpu"]["kv_tokens"], found["kv_tokens"], found["context"]) == (None, None, None)
    assert estimate(Question("org/mystery", Workload()), None) is None
    assert estimate(Question("org/mystery", Workload()), ModelFacts("f", problem="odd")) is None
    told = asked(replace(facts(), problem="cut short"))
    assert (told["note"], told["confidence"]) == ("cut short", "estimated")


@pytest.mark.parametrize("context", [8192, 131072])
def test_the_smallest_sets_are_those_that_hold_it_and_no_smaller_one_does(context: int) -> None:
    work = Workload(context=context)
    known = facts()
    found = estimate(Question("m", work, tensor_told=False), known)
    assert found is not None
    sets = {item["gpu"]: item["count"] for item in found["smallest"]}
    assert list(sets.values()) == sorted(sets.values()), "the fewest first"
    for model in MODELS:
        fits = {}
        for count in (1, 2, 4, 8):
            ranks = Workload(Parallel(count), context=context)
            told = estimate(Question("m", ranks, Declared(model.name, model.memory_mib, count)), known)
            assert told is not None
            fits[count] = told["gpu"]["fits"]
        assert sets.get(model.name) == next((count for count, fit in fits.items() if fit), None), model.name


def test_a_tensor_size_that_is_given_is_kept_and_stages_multiply() -> None:
    given = estimate(Question("m", Workload(Parallel(2, 2), context=8192), tensor_told=True), facts())
    assert given is not None
    assert {item["count"] for item in given["smallest"]} == {4}
