"""What an engine takes before its first start: against what was measured, and rule by rule."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from sage_reconcile.core.model_config import ModelConfig, read_model_config
from sage_reconcile.core.sizing import (
    PARTS,
    Card,
    Confidence,
    Sizing,
    batch_defaults,
    guess,
    parameters_from_name,
    size,
)
from sage_reconcile.core.spec import EngineSpec
from sage_reconcile.core.weights import Checkpoint, Parallel, Piece, Share
from sage_reconcile.core.workload import Speculation, Workload, speculation, workload
from tests.benchmarks.sizing import Row, rows
from tests.models import LLAMA_8B

MEASURED = list(rows(Path(__file__).parent / "measured"))
GIB = 1 << 30


def model(**fields: Any) -> ModelConfig:
    found = read_model_config(LLAMA_8B | fields)
    assert found is not None
    return found


def mib(found: Sizing, name: str) -> int:
    return next(part.mib for part in found.parts if part.name == name)


def test_there_are_rows_of_every_kind() -> None:
    assert len(MEASURED) >= 16
    assert {row.data["tp"] for row in MEASURED} == {"1", "2", "4"}
    assert {row.data["kv_dtype"] for row in MEASURED} == {"auto", "fp8"}
    assert len({row.data["model"] for row in MEASURED}) >= 10


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row.data["id"])
def test_the_weights_are_what_was_loaded(row: Row) -> None:
    assert row.weights_error is not None
    assert abs(row.weights_error) < 0.015


def test_on_average_the_weights_are_nearer_still() -> None:
    assert mean(abs(row.weights_error or 0) for row in MEASURED) < 0.005


@pytest.mark.parametrize("row", [row for row in MEASURED if row.whole], ids=lambda row: row.data["id"])
def test_a_pool_holds_the_tokens_that_vllm_counted(row: Row) -> None:
    assert row.tokens_error is not None
    assert abs(row.tokens_error) < 0.0005


def test_the_total_is_never_too_low_and_seldom_much_too_high() -> None:
    errors = [row.total_error for row in MEASURED if row.total_error is not None]
    assert min(errors) > 0
    assert mean(errors) < 0.11


@pytest.mark.parametrize("row", [row for row in MEASURED if row.whole], ids=lambda row: row.data["id"])
def test_the_activation_is_what_was_seen(row: Row) -> None:
    seen = row.measured("activation_gib")
    assert seen is not None
    assert -0.12 < row.part("activation") / seen - 1 < 0.2


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row.data["id"])
def test_graphs_and_context_are_not_below_what_was_seen(row: Row) -> None:
    assert row.part("cuda_graphs") >= (row.measured("cudagraph_actual_gib") or 0)
    assert row.part("context") >= (row.measured("pre_snapshot_gib") or 0) - 0.001


def test_the_parts_are_always_the_same_and_add_up() -> None:
    found = size(model(), Workload(), Card())
    assert tuple(part.name for part in found.parts) == PARTS
    assert found.total_mib == sum(part.mib for part in found.parts)
    assert all(part.mib >= 0 for part in found.parts)


def test_how_sure_each_number_is() -> None:
    found = {part.name: part.confidence for part in size(model(), Workload(), Card()).parts}
    assert found["weights"] is found["kv_cache"] is Confidence.ESTIMATED
    assert found["margin"] is found["cuda_graphs"] is Confidence.GUESSED
    checkpoint = Checkpoint((Piece(0, Share.TENSOR, 10 * GIB // 2, 0),))
    made_of = size(model(), Workload(offload_mib=mib(size(model(), Workload(), Card()), "weights") - 10240), Card())
    read = size(model(), Workload(), Card(), checkpoint)
    assert read.parts[0].confidence is Confidence.EXACT
    assert read.parts[0].mib == 10 * 1024
    assert mib(made_of, "margin") - mib(read, "margin") == pytest.approx(0.02 * 10240, abs=2), "less is left to chance"
    made = size(model(), Workload(quantization="fp8"), Card(), checkpoint)
    assert made.parts[0].confidence is Confidence.ESTIMATED, "headers do not tell what is quantised while it is loaded"
    guessed = guess("org/M-8B", Workload())
    assert guessed
    assert {part.confidence for part in guessed} == {Confidence.GUESSED}


@pytest.mark.parametrize(
    ("card", "defaults"),
    [
        (Card(), (8192, 1024)),
        (Card("B200", 183359), (16384, 1024)),
        (Card("H200", 143771), (8192, 1024)),
        (Card("A100-80GB", 81920), (2048, 256)),
        (Card("NVIDIA A100-SXM4-80GB", 81920), (2048, 256)),
        (Card("L40S", 46068), (2048, 256)),
    ],
)
def test_vllms_own_defaults_by_card(card: Card, defaults: tuple[int, int]) -> None:
    assert batch_defaults(card) == defaults


def test_what_is_offloaded_is_not_on_the_gpu() -> None:
    whole, part = size(model(), Workload(), Card()), size(model(), Workload(offload_mib=4096), Card())
    assert mib(whole, "weights") - mib(part, "weights") == 4096
    assert mib(size(model(), Workload(offload_mib=1 << 20), Card()), "weights") == 0


def test_adapters_take_room_for_as_many_as_may_be_loaded_at_their_largest_rank() -> None:
    one = mib(size(model(), Workload(loras=1, lora_rank=16), Card()), "lora")
    # q 4096+4096, k and v 4096+1024 each, o 4096+4096, gate and up 4096+14336 each, down 14336+4096
    pairs = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    assert one == -(-32 * pairs * 16 * 2 // 2**20)
    assert mib(size(model(), Workload(loras=4, lora_rank=64), Card()), "lora") == pytest.approx(16 * one, abs=16)
    assert mib(size(model(), Workload(), Card()), "lora") == 0


def test_what_guesses_ahead_is_counted() -> None:
    assert mib(size(model(), Workload(), Card()), "draft") == 0
    one_layer = Speculation("eagle3", "org/EAGLE3-LLaMA3.1-Instruct-8B", 3)
    added = mib(size(model(), Workload(speculation=one_layer, context=4096), Card()), "draft")
    layer = (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) * 2
    joined = 2 * 4096 * 4096 * 2
    kept = 4097 * 2 * 8 * 128 * 2
    assert added == pytest.approx((layer + joined + kept) / 2**20, abs=2)
    named = Speculation("draft_model", "org/Llama-1B", 3)
    assert mib(size(model(), Workload(speculation=named), Card()), "draft") == -(-2 * 10**9 // 2**20)
    small = model(num_hidden_layers=2)
    known = size(model(), Workload(speculation=named, context=4096), Card(), draft=small)
    assert mib(known, "draft") == pytest.approx(
        mib(size(small, Workload(context=4096), Card()), "weights") + 4112 * 2 * 4096 / 2**20, abs=2
    )


def test_experts_need_their_workspace_only_once() -> None:
    moe = {"num_local_experts": 8, "num_experts_per_tok": 2}
    without = mib(size(model(), Workload(), Card()), "activation")
    with_experts = mib(size(model(**moe), Workload(), Card()), "activation")
    assert with_experts - without == pytest.approx(8192 * 2 * (14336 + 28672) * 2 / 2**20, abs=1)


def test_no_more_requests_can_be_worked_on_than_tokens() -> None:
    few = mib(size(model(), Workload(batched_tokens=256), Card()), "activation")
    assert few == pytest.approx((14.9 * 256 * 128256 + 2.2 * 256 * 4096) / 2**20, abs=1)


def test_graphs_are_given_two_gib_but_for_few_dense_layers() -> None:
    assert mib(size(model(), Workload(), Card()), "cuda_graphs") == 768 + 16 * 32
    assert mib(size(model(), Workload(Parallel(1, 2)), Card()), "cuda_graphs") == 768 + 16 * 16
    assert mib(size(model(num_hidden_layers=126), Workload(), Card()), "cuda_graphs") == 2048
    assert mib(size(model(num_local_experts=8), Workload(), Card()), "cuda_graphs") == 2048
    states = {"mamba_d_state": 16, "mamba_n_heads": 8, "mamba_d_head": 64, "layer_types": ["mamba"] * 32}
    assert mib(size(model(**states), Workload(), Card()), "cuda_graphs") == 2048


def test_a_longer_context_and_more_requests_take_more_cache() -> None:
    per_token = 32 * 2 * 8 * 128 * 2
    assert mib(size(model(), Workload(context=16384, concurrency=3), Card()), "kv_cache") == -(
        -(3 * 16384 + 16) * per_token // 2**20
    )


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Llama-3.1-8B", 8e9),
        ("Qwen/Qwen2.5-0.5B-Instruct", 0.5e9),
        ("Qwen/Qwen3-30B-A3B", 30e9),
        ("mistralai/Mixtral-8x7B-v0.1", 56e9),
        ("facebook/opt-125m", 125e6),
        ("/models/llama-70b/", 70e9),
        ("google/gemma-2-9b-it", 9e9),
        ("BAAI/bge-m3", None),
        ("gpt2", None),
        ("org-7b/mystery", None),
        ("deepseek-ai/DeepSeek-V3", None),
        ("model-v1.5beta", None),
        ("", None),
    ],
)
def test_names_tell_parameters(name: str, parameters: float | None) -> None:
    assert parameters_from_name(name) == parameters


def test_flags_tell_how_an_engine_is_run() -> None:
    args = {
        "max-model-len": "32k",
        "max-num-batched-tokens": 4096,
        "max-num-seqs": "64",
        "dtype": "float32",
        "kv-cache-dtype": "fp8_e5m2",
        "enable-expert-parallel": True,
        "enable-lora": True,
        "max-lora-rank": 64,
        "cpu-offload-gb": 4,
        "enforce-eager": True,
        "block-size": 32,
        "speculative-config": '{"method": "mtp", "num_speculative_tokens": 1}',
    }
    spec = EngineSpec.model_validate({"model": "m", "tensor_parallel_size": 2, "data_parallel_size": 4, "args": args})
    assert workload(spec) == Workload(
        parallel=Parallel(2, 1, 4, experts=True),
        context=32000,
        batched_tokens=4096,
        sequences=64,
        dtype_bytes=4,
        cache_bytes=1,
        block_tokens=32,
        loras=1,
        lora_rank=64,
        offload_mib=4096,
        eager=True,
        speculation=Speculation("mtp", "", 1),
    )
    assert workload(EngineSpec.model_validate({"model": "m"})) == Workload()


@pytest.mark.parametrize("value", [None, "", "{", "[]", 3, {}, {"method": "ngram", "num_speculative_tokens": 4}])
def test_what_no_model_guesses_takes_nothing(value: object) -> None:
    assert speculation(value) is None


@pytest.mark.parametrize("words", ["auto", "-1", "many", True, None, [], 1.5])
def test_a_length_that_is_not_told_is_vllms_to_choose(words: object) -> None:
    spec = EngineSpec.model_validate({"model": "m", "args": {"max-model-len": words}})
    assert workload(spec).context in (0, 1)


@pytest.mark.parametrize(
    ("fields", "context"),
    [
        ({}, None),
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 4096, "n_positions": 1024}, 1024),
        ({"max_position_embeddings": 4096, "model_max_length": 131072}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 16384),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 2}}, 8192),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131072),
        ({"max_position_embeddings": 163840, "rope_scaling": {"type": "yarn", "factor": 40}}, 163840),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": float("nan")}}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": float("inf")}}, 4096),
        (
            {
                "max_position_embeddings": 131072,
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "longrope"},
            },
            4096,
        ),
    ],
)
def test_the_longest_context_is_what_vllm_takes_for_it(fields: dict[str, Any], context: int | None) -> None:
    found = model(**fields)
    assert found.context == (context or 2048)
    assert found.context_told is (context is not None)


def test_the_language_model_of_a_model_of_several_is_described() -> None:
    nested = read_model_config({"thinker_config": {"text_config": LLAMA_8B}, "tie_word_embeddings": True})
    assert nested is not None
    assert (nested.hidden, nested.tied) == (4096, True)
    assert model(model_type="gemma2").tied, "as its own class has it"
    assert not model(model_type="gemma2", tie_word_embeddings=False).tied
