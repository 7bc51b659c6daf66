"""The layers of a model, one by one: attention of which kind, Mamba, feed-forward or experts.

Which layer is what is told by ``layer_types``, by a pattern, or by the habit of the architecture; each rule is that
of the model's file in vLLM 0.32, ``vllm/model_executor/models/``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

FULL, SLIDING, CHUNKED, MAMBA = "full", "sliding", "chunked", "mamba"


class Fields:
    """The fields of a configuration by any of the names they go by; 0 is also what is not there."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self.config = config
        self.kind = str(config.get("model_type") or "")

    def number(self, *names: str) -> int:
        """The first whole number of these names that is not zero."""
        for name in names:
            value = self.config.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return 0

    def says(self, name: str) -> bool:
        """Whether a field is true."""
        return self.config.get(name) is True

    def sequence(self, name: str) -> tuple[object, ...]:
        """A list; empty where there is none."""
        value = self.config.get(name)
        return tuple(value) if isinstance(value, list | tuple) else ()


class Latent(NamedTuple):
    """Multi-head latent attention (DeepSeek): what is kept of a token is one vector of ``kv_rank + rope``."""

    query_rank: int
    kv_rank: int
    nope: int
    rope: int
    value: int


class Attention(NamedTuple):
    """Attention with heads of one width.

    ``window`` is of sliding attention, or the chunk of chunked; 0 of full. ``values`` tells whether values are
    projected apart from keys, ``cached`` whether the layer keeps keys of its own.
    """

    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    window: int = 0
    bias: bool = False
    gated: bool = False
    latent: Latent | None = None
    values: bool = True
    cached: bool = True


class Mamba(NamedTuple):
    """A layer whose state does not grow: Mamba 1 and 2, gated delta nets, short convolutions.

    ``convolution`` numbers are kept in the model's type, ``state`` ones in that of states; ``inputs`` and
    ``outputs`` are the widths of its two projections, ``extra`` are its other weights.
    """

    convolution: int
    state: int
    inputs: int
    outputs: int
    extra: int


class FeedForward(NamedTuple):
    """``width`` is of the dense part, ``expert_width`` of one expert; ``matrices`` are 3 where there is a gate."""

    width: int
    matrices: int = 3
    bias: bool = False
    experts: int = 0
    per_token: int = 0
    expert_width: int = 0
    shared_width: int = 0


class Layer(NamedTuple):
    """What one layer is made of; Falcon-H1's have attention and Mamba side by side."""

    attention: Attention | None
    mamba: Mamba | None
    feed_forward: FeedForward | None


def count(read: Fields) -> int:
    """How many layers there are."""
    pattern = read.config.get("hybrid_override_pattern")
    return len(pattern) if isinstance(pattern, str) else read.number("num_hidden_layers", "n_layer", "n_layers")


def read_layers(read: Fields, hidden: int, layers: int) -> tuple[Layer, ...] | None:
    """Every layer in order; None where the heads of attention are not told."""
    heads = read.number("num_attention_heads", "n_head", "n_heads")
    if not heads:
        return None
    kinds = [_kind(read, index, layers) for index in range(layers)]
    mamba = _mamba(read, hidden)
    attentions = {kind: _attention(read, hidden, heads, kind) for kind in (FULL, SLIDING, CHUNKED)}
    shared = read.number("num_kv_shared_layers")
    known: dict[Layer, Layer] = {}
    result = []
    for index, kind in enumerate(kinds):
        attention = attentions.get(kind)
        if attention and shared and index >= layers - shared:
            attention = attention._replace(cached=False)
        if read.kind == "falcon_h1":
            attention = attentions[FULL]
        layer = Layer(
            attention,
            mamba if kind == MAMBA or read.kind == "falcon_h1" else None,
            _feed_forward(read, hidden, index, kind),
        )
        result.append(known.setdefault(layer, layer))
    return tuple(result)


def _kind(read: Fields, index: int, layers: int) -> str:
    """What mixes the tokens in a layer; empty where nothing does (Nemotron-H's feed-forwards are layers)."""
    pattern = read.config.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        return {"M": MAMBA, "*": FULL}.get(pattern[index], "")
    types = read.sequence("layer_types") or read.sequence("layers_block_type")
    if len(types) == layers:
        return _named_kind(str(types[index]), read)
    if period := read.number("full_attention_interval"):  # Qwen3-Next
        return FULL if (index + 1) % period == 0 else MAMBA
    if period := read.number("attn_layer_period"):  # Jamba
        return FULL if index % period == read.number("attn_layer_offset") else MAMBA
    if attention_at := read.sequence("attn_layer_indices") or read.sequence("full_attn_idxs"):
        return FULL if index in attention_at else MAMBA
    if read.kind.startswith("llama4") and (chunk := read.number("attention_chunk_size")) and chunk:
        rope = read.sequence("no_rope_layers")
        uses_rope = bool(rope[index]) if len(rope) == layers else (index + 1) % 4 != 0
        return CHUNKED if uses_rope else FULL
    return SLIDING if _slides(read, index) else FULL


def _named_kind(name: str, read: Fields) -> str:
    if name in ("mamba", "mamba2", "linear_attention", "conv", "recurrent"):
        return MAMBA
    if name == "chunked_attention":
        return CHUNKED
    slides = "sliding" in name and read.number("sliding_window") > 0
    return SLIDING if slides else FULL


def _slides(read: Fields, index: int) -> bool:
    """Whether a layer slides where no list says so: every layer, or as the architecture alternates."""
    if not read.number("sliding_window") or read.config.get("use_sliding_window") is False:
        return False
    if read.kind.startswith("qwen"):
        return read.says("use_sliding_window") and index >= read.number("max_window_layers")
    habit = {
        "gemma2": 2,
        "gpt_oss": 2,
        "gemma3": 6,
        "gemma3_text": 6,
        "gemma3n_text": 5,
        "cohere2": 4,
        "gemma4_text": 6,
    }
    period = read.number("sliding_window_pattern", "_sliding_window_pattern") or habit.get(read.kind)
    if period:
        return (index + 1) % period != 0
    pattern = read.config.get("sliding_window_pattern")
    if isinstance(pattern, str) and pattern:  # Exaone 4: LLLG
        return pattern[index % len(pattern)] == "L"
    return True


def _attention(read: Fields, hidden: int, heads: int, kind: str) -> Attention:
    kv_heads = read.number("num_key_value_heads", "num_kv_heads", "n_head_kv")
    if not kv_heads:
        kv_heads = 1 if read.says("multi_query") else heads
    head_dim = read.number("head_dim", "attention_head_dim") or hidden // heads
    values = True
    if kind == FULL and (wider := read.number("global_head_dim")):  # Gemma 4
        head_dim = wider
        kv_heads = read.number("num_global_key_value_heads") or kv_heads
        values = not read.says("attention_k_eq_v")
    window = {SLIDING: read.number("sliding_window"), CHUNKED: read.number("attention_chunk_size")}.get(kind, 0)
    if read.kind == "cohere2" and kind == SLIDING:
        window += 1
    bias = (
        read.says("attention_bias")
        or read.says("qkv_bias")
        or read.kind in ("qwen2", "qwen2_moe", "gpt_oss", "gpt2", "opt")
    )
    gated = read.says("attn_output_gate") or read.kind.startswith(("qwen3_next", "qwen3_5"))
    return Attention(kind, heads, kv_heads, head_dim, window, bias, gated, _latent(read), values)


def _latent(read: Fields) -> Latent | None:
    rank = read.number("kv_lora_rank")
    if not rank:
        return None
    nope, rope = read.number("qk_nope_head_dim"), read.number("qk_rope_head_dim")
    return Latent(read.number("q_lora_rank"), rank, nope, rope, read.number("v_head_dim") or nope)


def _mamba(read: Fields, hidden: int) -> Mamba | None:
    """State and weights of a layer, by ``MambaStateShapeCalculator`` (``layers/mamba/mamba_utils.py``)."""
    if values := read.number("linear_num_value_heads"):  # gated delta net
        keys = read.number("linear_num_key_heads") * read.number("linear_key_head_dim")
        wide = values * read.number("linear_value_head_dim")
        kernel = read.number("linear_conv_kernel_dim") or 4
        mixed = 2 * keys + wide
        state = wide * read.number("linear_key_head_dim")
        return Mamba(mixed * (kernel - 1), state, mixed + wide + 2 * values, wide, mixed * kernel)
    if kernel := read.number("conv_L_cache"):  # short convolution, LFM2
        return Mamba(hidden * (kernel - 1), 0, 3 * hidden, hidden, hidden * kernel)
    size = read.number("mamba_d_state", "ssm_state_size", "state_size")
    if not size:
        return None
    kernel = read.number("mamba_d_conv", "conv_kernel") or 4
    heads, head = read.number("mamba_n_heads", "mamba_num_heads"), read.number("mamba_d_head", "mamba_head_dim")
    wide = read.number("mamba_d_ssm") or (read.number("mamba_expand", "expand") or 2) * hidden
    if not heads:  # Mamba 1, Jamba
        rank = read.number("mamba_dt_rank", "time_step_rank") or -(-hidden // 16)
        extra = wide * (kernel + rank + 2 * size + rank + size)
        return Mamba(wide * (kernel - 1), wide * size, 2 * wide, wide, extra)
    if read.number("mamba_num_heads"):  # Nemotron-H
        wide = heads * head
    mixed = wide + 2 * (read.number("mamba_n_groups", "n_groups") or 1) * size
    return Mamba(
        mixed * (kernel - 1), heads * (head or wide // heads) * size, mixed + wide + heads, wide, mixed * kernel
    )


_TWO_MATRICES = ("gpt2", "gpt_neox", "opt", "bloom", "falcon", "starcoder2", "nemotron", "phi", "gptj", "gpt_bigcode")


def _feed_forward(read: Fields, hidden: int, index: int, kind: str) -> FeedForward | None:
    """What follows the mixing of tokens: dense, experts, or both side by side."""
    width = read.number("intermediate_size", "ffn_hidden_size", "n_inner") or 4 * hidden
    matrices = 2 if read.kind in _TWO_MATRICES or read.kind == "nemotron_h" else 3
    bias = read.says("mlp_bias")
    pattern = read.config.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        if kind or pattern[index] not in "-E":
            return None
        if pattern[index] == "-":
            return FeedForward(width, matrices, bias)
    elif not _has_experts(read, index):
        if read.kind.startswith("llama4"):
            width = read.number("intermediate_size_mlp") or width
        if read.kind == "granitemoehybrid":
            width = read.number("shared_intermediate_size") or width
        return FeedForward(width, matrices, bias)
    experts = _experts(read)
    expert_width = read.number("moe_intermediate_size", "expert_ffn_hidden_size") or width
    shared = read.number(
        *("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size")
    )
    copies = read.number("n_shared_experts", "num_shared_experts")
    if copies:
        shared = copies * (shared or expert_width)
    if read.kind.startswith("llama4"):
        shared = expert_width
    if read.kind.startswith("gemma4"):
        shared = width
    bias = bias or read.kind == "gpt_oss"
    per_token = read.number("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts") or 1
    return FeedForward(0, matrices, bias, experts, per_token, expert_width, shared)


def _experts(read: Fields) -> int:
    return read.number("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def _has_experts(read: Fields, index: int) -> bool:
    """Whether a layer has experts: all but the first few, or every second, say (each rule: one architecture's)."""
    if not _experts(read):
        return False
    if index in read.sequence("mlp_only_layers") or index < read.number("first_k_dense_replace"):
        return False
    if step := read.number("decoder_sparse_step"):
        return (index + 1) % step == 0
    if step := read.number("interleave_moe_layer_step"):
        return (index + 1) % step == 0
    if period := read.number("expert_layer_period"):
        return index % period == read.number("expert_layer_offset")
    if freq := read.number("moe_layer_freq"):
        return index % freq == 0
    return True
