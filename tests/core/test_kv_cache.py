"""How vLLM lays out its KV cache, and what a request takes of it."""

from __future__ import annotations

from typing import Any

import pytest

from sage_reconcile.core.kv_cache import Group, Layout, layout
from sage_reconcile.core.model_config import ModelConfig, read_model_config
from sage_reconcile.core.weights import Parallel, Served

PLAIN: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "vocab_size": 32000,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 4096,
}
TOKEN = 4 * 2 * 64 * 2
"""Bytes of a token in one layer: 4 heads, keys and values, 64 wide, 2 bytes."""
PAGE = 16 * TOKEN
FULL = Group(16, 0, state=False)


def model(**fields: Any) -> ModelConfig:
    found = read_model_config(PLAIN | fields)
    assert found is not None
    return found


def laid(parallel: Parallel | None = None, served: Served | None = None, **fields: Any) -> Layout:
    return layout(model(**fields), parallel or Parallel(), served or Served())


def types(*kinds: tuple[str, int]) -> list[str]:
    return [name for name, count in kinds for _ in range(count)]


def test_grouped_heads_are_kept_and_one_head_for_all_is_one() -> None:
    assert laid() == Layout(12 * PAGE, (FULL,))
    assert laid(num_key_value_heads=None).block_bytes == 4 * 12 * PAGE
    assert laid(num_key_value_heads=1).block_bytes == 12 * PAGE // 4
    assert laid(num_key_value_heads=None, multi_query=True).block_bytes == 12 * PAGE // 4
    assert laid(head_dim=128).block_bytes == 2 * 12 * PAGE


def test_heads_are_divided_over_the_ranks_until_each_has_one() -> None:
    assert [laid(Parallel(tensor)).block_bytes for tensor in (1, 2, 4, 8)] == [
        12 * PAGE,
        6 * PAGE,
        3 * PAGE,
        3 * PAGE,
    ]


def test_fp8_halves_it_and_float32_doubles_it() -> None:
    assert laid(served=Served(2, 1)).block_bytes == 6 * PAGE
    assert laid(served=Served(4, 4)).block_bytes == 24 * PAGE


def test_latent_attention_keeps_one_vector_that_is_not_divided() -> None:
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
    assert laid(**latent).block_bytes == laid(Parallel(4), **latent).block_bytes == 12 * 16 * 576 * 2


def test_the_stage_with_most_layers_decides() -> None:
    assert laid(Parallel(1, 4)).block_bytes == 3 * PAGE
    assert laid(Parallel(1, 5)).block_bytes == 3 * PAGE, "2 2 3 3 2"


def sliding(window: int = 512) -> Group:
    return Group(16, window, state=False, extra=1)


@pytest.mark.parametrize(
    ("kinds", "layers", "groups"),
    [
        ((("sliding_attention", 6), ("full_attention", 6)), 6, [sliding(), FULL]),
        ((("sliding_attention", 8), ("full_attention", 4)), 4, [sliding(), sliding(), FULL]),
        ((("sliding_attention", 10), ("full_attention", 2)), 2, [*[sliding()] * 5, FULL]),
        ((("sliding_attention", 7), ("full_attention", 5)), 7, [sliding(), FULL]),  # 7 < 1.5 × 5
        ((("sliding_attention", 9), ("full_attention", 3)), 3, [*[sliding()] * 3, FULL]),
        ((("sliding_attention", 12),), 12, [sliding()]),
        ((("full_attention", 12),), 12, [FULL]),
    ],
)
def test_layers_of_several_kinds_make_groups_of_equally_many(
    kinds: tuple[tuple[str, int], ...], layers: int, groups: list[Group]
) -> None:
    found = laid(layer_types=types(*kinds), sliding_window=512)
    assert found.block_bytes == layers * PAGE
    assert list(found.groups) == groups


@pytest.mark.parametrize(
    ("fields", "groups"),
    [
        ({"model_type": "gemma2"}, [sliding(), FULL]),
        ({"model_type": "gpt_oss"}, [sliding(), FULL]),
        ({"model_type": "gemma3_text"}, [*[sliding()] * 5, FULL]),
        ({"model_type": "cohere2"}, [*[sliding(513)] * 3, FULL]),
        ({"model_type": "exaone4", "sliding_window_pattern": "LLLG"}, [*[sliding()] * 3, FULL]),
        ({"model_type": "mistral"}, [sliding()]),
        ({"model_type": "mistral", "sliding_window": None}, [FULL]),
        ({"model_type": "qwen2"}, [FULL]),
        ({"model_type": "qwen2", "use_sliding_window": False}, [FULL]),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 6}, [FULL, sliding()]),
        ({"model_type": "llama4_text", "attention_chunk_size": 512}, [*[Group(16, 512, state=False)] * 3, FULL]),
    ],
)
def test_which_layers_slide_is_a_habit_of_the_architecture(fields: dict[str, Any], groups: list[Group]) -> None:
    assert list(laid(**{"sliding_window": 512} | fields).groups) == groups


def test_a_small_page_is_made_equal_by_more_tokens() -> None:
    """Gemma 4: full attention has fewer and wider heads."""
    found = laid(
        layer_types=types(("sliding_attention", 8), ("full_attention", 4)),
        sliding_window=512,
        global_head_dim=512,
        num_global_key_value_heads=2,
    )
    narrow, wide = PAGE, 16 * 2 * 2 * 512 * 2
    assert found.block_bytes == 4 * wide
    assert wide == 4 * narrow
    assert [(group.window, group.tokens) for group in found.groups] == [(512, 64), (512, 64), (0, 16)]


MAMBA = {
    "model_type": "granitemoehybrid",
    "mamba_n_heads": 32,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}
STATE = ((2048 + 2 * 128) * 3 + 32 * 64 * 128) * 2


def test_beside_mamba_a_block_is_as_large_as_a_state() -> None:
    found = laid(layer_types=types(("mamba", 9), ("attention", 3)), **MAMBA)
    tokens = -(-STATE // TOKEN // 16) * 16
    assert tokens * TOKEN >= STATE > (tokens - 16) * TOKEN
    assert found.block_bytes == 3 * tokens * TOKEN
    assert found.groups == (*[Group(0, 0, state=True)] * 3, Group(tokens, 0, state=False))
    assert found.block_tokens == tokens


def test_beside_latent_attention_a_block_is_of_128_tokens_or_a_multiple() -> None:
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
    found = laid(layer_types=types(("mamba", 9), ("attention", 3)), **MAMBA, **latent)
    assert found.block_tokens == -(-STATE // (576 * 2) // 128) * 128


def test_states_may_be_kept_in_a_type_of_their_own() -> None:
    one = laid(layer_types=types(("mamba", 9), ("attention", 3)), **MAMBA)
    two = laid(layer_types=types(("mamba", 9), ("attention", 3)), **MAMBA, mamba_ssm_dtype="float32")
    assert two.block_bytes == pytest.approx(2 * one.block_bytes, rel=0.05)


def test_a_model_of_states_alone_keeps_one_block_a_request() -> None:
    found = laid(layer_types=types(("mamba", 12)), **MAMBA)
    assert found == Layout(12 * STATE, (Group(0, 0, state=True),))
    assert found.blocks_of_request(100_000, 8192) == 1


def test_a_gated_delta_net_has_a_state_for_each_head_of_values() -> None:
    fields = {
        "linear_num_value_heads": 8,
        "linear_num_key_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
    }
    found = laid(**fields)
    state = ((2 * 256 + 512) * 3 + 512 * 64) * 2
    tokens = -(-state // TOKEN // 16) * 16
    assert len(found.groups) == 4
    assert found.block_bytes == 3 * tokens * TOKEN


def test_a_nemotron_pattern_names_each_layer() -> None:
    fields = MAMBA | {"model_type": "nemotron_h", "mamba_n_heads": None, "mamba_num_heads": 32, "mamba_head_dim": 64}
    config = model(**fields, hybrid_override_pattern="M-M*-M-M*-")
    assert [bool(x.mamba) for x in config.layers] == [c == "M" for c in "M-M*-M-M*-"]
    assert [bool(x.attention) for x in config.layers] == [c == "*" for c in "M-M*-M-M*-"]
    assert [bool(x.feed_forward) for x in config.layers] == [c == "-" for c in "M-M*-M-M*-"]


def test_layers_that_share_keys_keep_none() -> None:
    assert laid(num_kv_shared_layers=4).block_bytes == 8 * PAGE


def test_what_a_request_takes() -> None:
    groups = (FULL, sliding(512), Group(0, 0, state=True), Group(16, 512, state=False))
    whole = Layout(PAGE, groups)
    assert whole.blocks_of_request(16, 8192) == 1 + 2 + 1 + 1
    assert whole.blocks_of_request(17, 8192) == 2 + 3 + 1 + 2
    assert whole.blocks_of_request(100_000, 1024) == 6250 + (-(-(511 + 1024) // 16) + 1) + 1 + 96
    assert Layout(PAGE, (sliding(512),)).blocks_of_request(100_000, 1025) == 1536 // 16 + 1
    assert whole.pool_bytes(16, 10, 8192) == (50 + 1) * PAGE, "one block is never used"


def test_what_a_pool_holds() -> None:
    found = Layout(PAGE, (FULL, sliding(512)))
    assert found.tokens_in(1000 * PAGE + PAGE - 1) == 500 * 16
    assert found.tokens_in(-1) == 0
    assert found.requests_in(1000 * PAGE, 160, 8192) == pytest.approx(1000 / (10 + 11))
    assert Layout(1, ()).tokens_in(1 << 30) == 0
    assert Layout(1, ()).pool_bytes(100, 1, 1) == 0


@pytest.mark.parametrize("requests", [1, 3])
def test_the_longest_context_is_one_that_fits_when_one_token_more_does_not(requests: int) -> None:
    found = laid(layer_types=types(("sliding_attention", 8), ("full_attention", 4)), sliding_window=512)
    pool = 12345 * found.block_bytes
    longest = found.longest_in(pool, requests, 2048, 1 << 20)
    assert found.pool_bytes(longest, requests, 2048) <= pool < found.pool_bytes(longest + 1, requests, 2048)
    assert found.longest_in(pool, requests, 2048, 100) == 100
    assert found.longest_in(0, requests, 2048, 100) == 0
