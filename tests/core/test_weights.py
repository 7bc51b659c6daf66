"""What the weights of a model take on each rank, from its configuration and from the headers of its files."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_reconcile.core.model_config import ModelConfig, read_model_config
from sage_reconcile.core.quantization import read_quantization
from sage_reconcile.core.sizing import Card
from sage_reconcile.core.sizing import size as size_of
from sage_reconcile.core.weights import (
    Parallel,
    Served,
    Tensor,
    read_checkpoint,
    stage_bytes,
    stage_bytes_of,
    stages,
)
from sage_reconcile.core.workload import Workload

H, WIDE, L, V = 1024, 4096, 4, 32000
PLAIN: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": H,
    "num_hidden_layers": L,
    "vocab_size": V,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": WIDE,
}
EMBEDDING = V * H
LAYER = 2 * H * H + 2 * H * 256 + 3 * H * WIDE
NORMS = 2 * H


def model(**fields: Any) -> ModelConfig:
    found = read_model_config(PLAIN | fields)
    assert found is not None
    return found


def largest(config: ModelConfig, parallel: Parallel | None = None) -> int:
    served = Served(config.dtype_bytes, config.dtype_bytes, config.quantization)
    return max(stage_bytes(config, parallel or Parallel(), served))


def test_a_plain_model_is_layers_embedding_and_head() -> None:
    assert largest(model()) == 2 * (L * (LAYER + NORMS) + 2 * EMBEDDING)
    assert largest(model(tie_word_embeddings=True)) == 2 * (L * (LAYER + NORMS) + EMBEDDING)
    assert largest(model(torch_dtype="float32")) == largest(model()), "vLLM loads float32 as bfloat16"


def test_the_vocabulary_is_padded_to_64() -> None:
    assert largest(model(vocab_size=V + 1)) - largest(model()) == 2 * 2 * 64 * H


def test_tensor_parallelism_divides_all_but_the_norms() -> None:
    assert largest(model(), Parallel(4)) == 2 * (L * (LAYER // 4 + NORMS) + 2 * EMBEDDING // 4)


def test_key_and_value_heads_are_divided_until_each_rank_has_one() -> None:
    eight, four = largest(model(), Parallel(8)), largest(model(), Parallel(4))
    shared = 2 * H * 64  # one head of keys and one of values
    assert eight == 2 * (L * ((LAYER - 2 * H * 256) // 8 + shared + NORMS) + 2 * EMBEDDING // 8)
    assert eight > four / 2


def test_the_first_stage_has_the_embedding_and_the_last_the_head() -> None:
    parts = stage_bytes(model(), Parallel(1, 2), Served())
    assert parts == [2 * (2 * (LAYER + NORMS) + EMBEDDING)] * 2
    tied = stage_bytes(model(tie_word_embeddings=True), Parallel(1, 2), Served())
    assert tied == parts, "one matrix, but both stages need it"
    assert stage_bytes(model(), Parallel(1, 4), Served())[1] == 2 * (LAYER + NORMS)


@pytest.mark.parametrize(
    ("layers", "pipeline", "sizes"),
    [(32, 1, [32]), (32, 4, [8] * 4), (30, 4, [7, 8, 8, 7]), (5, 4, [1, 1, 2, 1]), (7, 2, [4, 3]), (27, 2, [14, 13])],
)
def test_layers_that_are_left_over_go_before_the_last_stage(layers: int, pipeline: int, sizes: list[int]) -> None:
    found = stages(layers, pipeline)
    assert [len(part) for part in found] == sizes
    assert [index for part in found for index in part] == list(range(layers))


EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}


def test_experts_are_cut_over_all_ranks_or_given_to_them_whole() -> None:
    expert, router = 3 * H * 512, H * 8
    rest = 2 * H * H + 2 * H * 256 + NORMS
    assert largest(model(**EXPERTS)) == 2 * (L * (rest + 8 * expert + router) + 2 * EMBEDDING)
    halves = 2 * (L * ((rest - NORMS) // 2 + NORMS + 8 * expert // 4 + router) + EMBEDDING)
    assert largest(model(**EXPERTS), Parallel(2, 1, 2)) == halves
    assert largest(model(**EXPERTS), Parallel(2, 1, 2, experts=True)) == halves
    odd = EXPERTS | {"num_local_experts": 6}
    whole, cut = (largest(model(**odd), Parallel(4, experts=each)) for each in (True, False))
    assert whole - cut == 2 * L * (2 * expert - 6 * expert // 4), "two of six are on the fullest of four ranks"


def test_some_layers_are_dense_and_shared_experts_are_on_top() -> None:
    fields = EXPERTS | {"n_shared_experts": 2, "first_k_dense_replace": 1}
    expert, router = 3 * H * 512, H * 8
    attention = 2 * H * H + 2 * H * 256 + NORMS
    expected = L * attention + 3 * H * WIDE + 3 * (8 * expert + 2 * expert + router) + 2 * EMBEDDING
    assert largest(model(**fields)) == 2 * expected


def test_latent_attention_keeps_what_makes_the_vectors_on_every_rank() -> None:
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
    small = H * (512 + 64)
    divided = H * 16 * 192 + 512 * 16 * 256 + 16 * 128 * H
    feed = 3 * H * WIDE
    for tensor in (1, 2):
        expected = L * ((divided + feed) // tensor + small + NORMS) + 2 * EMBEDDING // tensor
        assert largest(model(**latent), Parallel(tensor)) == 2 * expected
    low = latent | {"q_lora_rank": 256}
    assert largest(model(**low)) - largest(model(**latent)) == 2 * L * (H * 256 + 256 * 16 * 192 - H * 16 * 192)


def group(**weights: Any) -> dict[str, Any]:
    activations = weights.pop("activations", None)
    return {
        "quant_method": "compressed-tensors",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
    }


MATRIX = 4096 * 1024


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"quant_method": "fp8"}, MATRIX + 4),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, MATRIX + 32 * 8 * 4),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, MATRIX // 2 + 32 * 1024 * 5 // 2),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, MATRIX // 2 + 32 * 1024 * 2),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": False}, MATRIX + 1024 * 3),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}, MATRIX // 2 + 65536 * 2 + 4096 * 4),
        (group(num_bits=4, type="int", strategy="group", group_size=128), MATRIX // 2 + 32 * 1024 * 2),
        (group(num_bits=8, type="int", strategy="channel", activations={"num_bits": 8}), MATRIX + 1024 * 4),
        (group(num_bits=8, type="float", strategy="channel", activations={"num_bits": 8}), MATRIX + 1024 * 4),
        (group(num_bits=8, type="float", strategy="tensor", activations={"num_bits": 8}), MATRIX + 4),
        (group(num_bits=4, type="float", strategy="tensor_group", group_size=16), MATRIX // 2 + MATRIX // 16),
        ({"quant_method": "mxfp4"}, MATRIX // 2 + MATRIX // 32),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, MATRIX // 2 + MATRIX // 64 * 4),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, MATRIX + 1024 * 4),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, MATRIX // 2 + MATRIX // 16),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, MATRIX + 4),
    ],
)
def test_what_a_quantised_matrix_takes(config: dict[str, Any], size: int) -> None:
    found = read_quantization(config)
    assert found is not None
    assert found.matrix_bytes(4096, 1024) == size


@pytest.mark.parametrize(
    "config", [None, {}, [], "fp8", {"quant_method": "new"}, {"quant_method": "compressed-tensors"}]
)
def test_what_is_not_known_counts_as_not_quantised(config: object) -> None:
    assert read_quantization(config) is None


def test_embedding_head_norms_and_routers_are_not_quantised() -> None:
    fp8 = {"quantization_config": {"quant_method": "fp8"}}
    assert largest(model(**fp8)) == pytest.approx(L * LAYER + 2 * (L * NORMS + 2 * EMBEDDING), abs=4 * 7 * L)
    assert largest(model(**fp8, **EXPERTS)) > largest(model(**fp8, **EXPERTS, vocab_size=V // 2))
    head = {"quantization_config": {"quant_method": "gptq", "bits": 4, "lm_head": True}}
    left = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    assert largest(model(**left)) - largest(model(**head)) == 2 * EMBEDDING - (EMBEDDING // 2 + 8 * V * 2)


@pytest.mark.parametrize(
    ("ignore", "left"),
    [
        (["lm_head"], 0),
        (["model.layers.0.mlp.down_proj"], 1),
        (["model.layers.0.mlp"], 3),
        (["model.layers.1"], 7),
        (["re:.*self_attn.*"], 4 * L),
        (["re:.*down_proj$", "re:.*("], L),
        (["down_proj"], L),
        (["language_model.model.layers.0.mlp.down_proj"], 1),
        (["model.layers.10"], 0),
        (["down", "proj"], 0),
    ],
)
def test_modules_can_be_left_out(ignore: list[str], left: int) -> None:
    found = read_quantization({"quant_method": "fp8", "ignored_layers": ignore})
    assert found is not None
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    modules = [*attention, *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
    skipped = [x for i in range(L) for x in modules if found.skips(f"model.layers.{i}.{x}")]
    assert len(skipped) == left
    config = model(quantization_config={"quant_method": "fp8", "ignored_layers": ignore})
    fewer = largest(config) > largest(model(quantization_config={"quant_method": "fp8"}))
    assert fewer is bool(left)


def test_mxfp4_is_of_experts_alone_and_padded() -> None:
    quantised = {"quantization_config": {"quant_method": "mxfp4"}, **EXPERTS, "moe_intermediate_size": 500}
    expert = 3 * H * 512 * 17 // 32
    assert (
        largest(model(**quantised)) == L * (8 * expert + 2 * (2 * H * H + 2 * H * 256 + NORMS + H * 8)) + 4 * EMBEDDING
    )


def test_a_tower_for_images_is_on_the_first_stage() -> None:
    vision = {"hidden_size": 512, "num_hidden_layers": 2, "intermediate_size": 2048, "patch_size": 16}
    found = read_model_config({"text_config": PLAIN, "vision_config": vision})
    assert found is not None
    tower = 2 * (4 * 512 * 512 + 2 * 512 * 2048) + 3 * 16 * 16 * 512 + 512 * H
    assert largest(found) - largest(model()) == 2 * tower


def test_towers_with_gates_have_a_matrix_more() -> None:
    vision = {"hidden_size": 512, "num_hidden_layers": 2, "intermediate_size": 2048, "patch_size": 16}
    plain, gated = (
        read_model_config({"text_config": PLAIN, "vision_config": vision | {"model_type": kind}})
        for kind in ("siglip2", "qwen2_5_vl")
    )
    assert plain is not None
    assert gated is not None
    assert largest(gated) - largest(plain) == 2 * 2 * 512 * 2048


def test_biases_and_gates_of_attention_count() -> None:
    assert largest(model(attention_bias=True)) - largest(model()) == 2 * L * (H + 2 * 256)
    assert largest(model(model_type="qwen2"), Parallel(2)) - largest(model(), Parallel(2)) == 2 * L * (H + 512) // 2
    assert largest(model(attn_output_gate=True)) - largest(model()) == 2 * L * H * H


def test_layers_of_states_have_two_projections_and_a_convolution() -> None:
    attention = 2 * H * H + 2 * H * 256
    two = {"mamba_n_heads": 32, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 2, "mamba_expand": 2}
    mixed = 2048 + 2 * 2 * 128
    mamba = H * (mixed + 2048 + 32) + mixed * 4 + 2048 * H
    kinds = {"layer_types": ["mamba", "attention", "mamba", "attention"]}
    assert largest(model(**two, **kinds)) - largest(model()) == 2 * 2 * (mamba - attention)
    net = {
        "linear_num_value_heads": 8,
        "linear_num_key_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    }
    mixed = 2 * 256 + 512
    delta = H * (mixed + 512 + 2 * 8) + mixed * 4 + 512 * H
    assert largest(model(**net, full_attention_interval=2)) - largest(model()) == 2 * 2 * (delta - attention)


def test_the_table_of_rotary_embeddings_is_on_every_rank() -> None:
    long = model(max_position_embeddings=131072)
    assert largest(long, Parallel(4)) - largest(model(), Parallel(4)) == 131072 * 64 * 2


NUMBERS = st.one_of(st.integers(-3, 70), st.none(), st.booleans(), st.floats(), st.text(max_size=3))
ODD = st.one_of(NUMBERS, st.lists(NUMBERS, max_size=3), st.dictionaries(st.sampled_from(["factor", "type"]), NUMBERS))
FIELDS = sorted(
    {
        *("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *(
            "intermediate_size",
            "sliding_window",
            "sliding_window_pattern",
            "layer_types",
            "rope_scaling",
            "torch_dtype",
        ),
        *("num_local_experts", "moe_intermediate_size", "first_k_dense_replace", "decoder_sparse_step", "n_groups"),
        *("kv_lora_rank", "hybrid_override_pattern", "mamba_d_state", "mamba_n_heads", "linear_num_value_heads"),
        *("max_position_embeddings", "vision_config", "text_config", "quantization_config", "tie_word_embeddings"),
        *("num_kv_shared_layers", "full_attention_interval", "attn_layer_period", "conv_L_cache", "model_type"),
    }
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), ODD), st.integers(1, 9), st.integers(1, 9))
def test_whatever_a_configuration_says_it_is_read_or_refused(odd: dict[str, Any], tensor: int, pipeline: int) -> None:
    found = read_model_config(PLAIN | odd)
    if found is not None:
        work = Workload(Parallel(tensor, pipeline), context=1000, loras=1)
        assert size_of(found, work, Card()).total_mib > 0


def test_layers_whose_state_is_empty_keep_nothing() -> None:
    found = read_model_config(PLAIN | {"conv_L_cache": 1, "attn_layer_period": 2})
    assert found is not None
    assert size_of(found, Workload(context=1000), Card()).kv_tokens >= 1000


def test_as_many_layers_as_no_model_has_are_refused() -> None:
    assert read_model_config(PLAIN | {"num_hidden_layers": 10**12}) is None


# --- headers


def tensors(**extra: tuple[int, ...]) -> list[Tensor]:
    found = {"model.embed_tokens.weight": (V, H), "lm_head.weight": (V, H), "model.norm.weight": (H,)}
    for layer in range(L):
        at = f"model.layers.{layer}"
        found |= {f"{at}.input_layernorm.weight": (H,), f"{at}.post_attention_layernorm.weight": (H,)}
        found |= {f"{at}.self_attn.{name}_proj.weight": (H, H) for name in "qo"}
        found |= {f"{at}.self_attn.{name}_proj.weight": (256, H) for name in "kv"}
        found |= {f"{at}.mlp.{name}_proj.weight": (WIDE, H) for name in ("gate", "up")}
        found |= {f"{at}.mlp.down_proj.weight": (H, WIDE)}
    return [Tensor(name, "BF16", shape) for name, shape in (found | extra).items()]


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(2), Parallel(8), Parallel(1, 2), Parallel(2, 4)])
@pytest.mark.parametrize("tied", [False, True])
def test_headers_tell_the_same_as_the_configuration(parallel: Parallel, tied: bool) -> None:
    config = model(tie_word_embeddings=tied)
    found = stage_bytes_of(read_checkpoint(tensors(), config), config, parallel, 2)
    expected = stage_bytes(config, parallel, Served())
    assert found == pytest.approx(expected, abs=2 * H), "but for the last norm"


def test_headers_of_experts_are_divided_as_experts_are() -> None:
    config = model(**EXPERTS)
    found = [x for x in tensors() if ".mlp." not in x.name]
    for layer in range(L):
        at = f"model.layers.{layer}.mlp"
        found.append(Tensor(f"{at}.gate.weight", "BF16", (8, H)))
        found += [
            Tensor(f"{at}.experts.{number}.{name}.weight", "BF16", (512, H))
            for number in range(8)
            for name in ("w1", "w2", "w3")
        ]
    checkpoint = read_checkpoint(found, config)
    for parallel in (Parallel(), Parallel(2, 1, 2), Parallel(4, experts=True)):
        expected = stage_bytes(config, parallel, Served())
        assert stage_bytes_of(checkpoint, config, parallel, 2) == pytest.approx(expected, abs=2 * H)


def test_float_tensors_take_the_type_that_is_served_and_packed_ones_their_own() -> None:
    config = model()
    wide = [Tensor(x.name, "F32", x.shape) for x in tensors()]
    assert stage_bytes_of(read_checkpoint(wide, config), config, Parallel(), 2) == stage_bytes_of(
        read_checkpoint(tensors(), config), config, Parallel(), 2
    )
    packed = [Tensor("model.layers.0.mlp.up_proj.qweight", "I32", (H // 8, WIDE))]
    scales = [Tensor("model.layers.0.mlp.up_proj.weight_scale", "F32", (WIDE, 1))]
    fp8 = [Tensor("model.layers.0.mlp.up_proj.weight", "F8_E4M3", (WIDE, H))]
    for found, size in ((packed, H * WIDE // 2), (scales, 4 * WIDE), (fp8, H * WIDE)):
        assert stage_bytes_of(read_checkpoint(found, config), config, Parallel(), 2) == [size]


def test_layers_for_speculation_are_not_loaded() -> None:
    more = tensors(**{f"model.layers.{L}.mlp.up_proj.weight": (WIDE, H)})
    config = model()
    assert stage_bytes_of(read_checkpoint(more, config), config, Parallel(), 2) == stage_bytes_of(
        read_checkpoint(tensors(), config), config, Parallel(), 2
    )


def test_a_tower_in_the_headers_is_on_the_first_stage_whatever_its_layers_are_called() -> None:
    config = model()
    name = "vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight"
    found = stage_bytes_of(read_checkpoint([Tensor(name, "BF16", (WIDE, H))], config), config, Parallel(1, 2), 2)
    assert found == [2 * WIDE * H, 0]
