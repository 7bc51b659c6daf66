"""What the weights of a model take on the GPU of the rank that has most of them, in bytes.

From ``config.json`` (estimated), or from the headers of safetensors files (exact, but for what vLLM pads). The rules
are vLLM's: tensor parallelism divides the linear layers and the vocabulary (padded to 64), key and value heads until
there is one of them on each rank; norms and routers are on all. Pipeline parallelism gives each stage a run of
layers, the first the embedding, the last the head; where the two are one, both have it (``models/llama.py``).
Experts are divided over tensor × data parallel ranks, each cut (``fused_moe/config.py``) or, with expert parallelism,
whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from sage_reconcile.core.model_config import ModelConfig
from sage_reconcile.core.model_layers import Attention, FeedForward, Latent, Layer, Mamba
from sage_reconcile.core.quantization import Quantization

VOCABULARY_PAD = 64
"""vLLM pads the vocabulary to a multiple of this (``layers/vocab_parallel_embedding.py``)."""


class Parallel(NamedTuple):
    """Over how many ranks a model is divided, and how."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    experts: bool = False
    """Experts are given to ranks whole."""


class Served(NamedTuple):
    """In which types a model is served: bytes of what is not quantised, of numbers in the KV cache; the format."""

    dtype_bytes: int = 2
    cache_bytes: int = 2
    quantization: Quantization | None = None


def stages(layers: int, pipeline: int) -> list[range]:
    """The layers of each pipeline stage: ``get_pp_indices`` in vLLM's ``distributed/utils.py``.

    What is left over goes to the stages before the last one, from the back.
    """
    sizes = [layers // pipeline] * pipeline
    for back in range(2, layers % pipeline + 2):
        sizes[-back] += 1
    starts = [sum(sizes[:stage]) for stage in range(pipeline)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def cut(size: int, ranks: int) -> int:
    """The largest of the parts into which a dimension is divided."""
    return -(-size // ranks)


def padded(size: int, multiple: int) -> int:
    """Rounded up to a multiple."""
    return cut(size, multiple) * multiple


class _Matrix(NamedTuple):
    """A linear layer on one rank: its module's name, its inputs and outputs there, how many there are of it."""

    module: str
    inputs: int
    outputs: int
    number: int = 1
    bias: bool = False
    plain: bool = False
    """Never quantised."""


def stage_bytes(config: ModelConfig, parallel: Parallel, served: Served) -> list[int]:
    """Bytes of the weights of each pipeline stage, on one of its ranks, from the configuration alone."""
    known: dict[int, int] = {}
    each = []
    quantization, dtype_bytes = served.quantization, served.dtype_bytes
    for index, layer in enumerate(config.layers):
        if quantization and quantization.skipped:
            each.append(_layer_bytes(config, index, layer, parallel, served))
            continue
        if id(layer) not in known:  # equal layers are one object
            known[id(layer)] = _layer_bytes(config, index, layer, parallel, served)
        each.append(known[id(layer)])
    rope = rope_bytes(config, dtype_bytes)
    found = [sum(each[index] for index in stage) + rope for stage in stages(len(each), parallel.pipeline)]
    rows = cut(padded(config.vocabulary, VOCABULARY_PAD), parallel.tensor)
    found[0] += (rows * config.hidden + cut(config.layer_embeddings, parallel.tensor)) * dtype_bytes
    if config.vision:
        found[0] += cut(config.vision.parameters, parallel.tensor) * dtype_bytes
    if not config.tied or parallel.pipeline > 1:
        in_full = quantization is None or not quantization.head
        plain = rows * config.hidden * dtype_bytes
        found[-1] += plain if quantization is None or in_full else quantization.matrix_bytes(config.hidden, rows)
    return found


def rope_bytes(config: ModelConfig, dtype_bytes: int) -> int:
    """The table of rotary embeddings, of which every rank has one: a row for each position of the longest context."""
    attention = next((layer.attention for layer in config.layers if layer.attention), None)
    if attention is None or not config.context_told:
        return 0
    width = attention.latent.rope if attention.latent else attention.head_dim
    return config.context * width * dtype_bytes


def _layer_bytes(config: ModelConfig, index: int, layer: Layer, parallel: Parallel, served: Served) -> int:
    quantization, dtype_bytes = served.quantization, served.dtype_bytes
    total = 2 * config.hidden * dtype_bytes  # its norms
    if layer.mamba:
        total += cut(layer.mamba.extra, parallel.tensor) * dtype_bytes
    for matrix in matrices(config, layer, parallel):
        name = f"model.layers.{index}.{matrix.module}"
        inputs, outputs = matrix.inputs, matrix.outputs
        expert = ".experts." in matrix.module
        if quantization and expert and quantization.pad_inner > 1:
            inner, outer = quantization.pad_inner, quantization.pad_outer
            down = matrix.module.endswith("down_proj")
            inputs, outputs = padded(inputs, inner if down else outer), padded(outputs, outer if down else inner)
        plain = quantization is None or matrix.plain or (quantization.experts_only and not expert)
        if quantization is None or plain or quantization.skips(name):
            size = inputs * outputs * dtype_bytes
        else:
            size = quantization.matrix_bytes(inputs, outputs)
        total += matrix.number * (size + (outputs * dtype_bytes if matrix.bias else 0))
    return total


def matrices(config: ModelConfig, layer: Layer, parallel: Parallel) -> Iterator[_Matrix]:
    """The linear layers of a layer, as they are on one rank."""
    if layer.attention:
        parts = _latent if layer.attention.latent else _attention
        yield from parts(config.hidden, layer.attention, parallel.tensor)
    if layer.mamba:
        yield from _mamba(config.hidden, layer.mamba, parallel.tensor)
    if layer.feed_forward:
        yield from _feed_forward(config.hidden, layer.feed_forward, parallel)


def _attention(hidden: int, attention: Attention, tensor: int) -> Iterator[_Matrix]:
    query = cut(attention.heads, tensor) * attention.head_dim
    key = max(1, attention.kv_heads // tensor) * attention.head_dim
    wide = 2 * query if attention.gated else query
    yield _Matrix("self_attn.q_proj", hidden, wide, bias=attention.bias)
    if attention.cached:
        yield _Matrix("self_attn.k_proj", hidden, key, bias=attention.bias)
        if attention.values:
            yield _Matrix("self_attn.v_proj", hidden, key, bias=attention.bias)
    yield _Matrix("self_attn.o_proj", query, hidden)


def _latent(hidden: int, attention: Attention, tensor: int) -> Iterator[_Matrix]:
    """Multi-head latent attention: what makes the small vectors is on every rank, what unfolds them divided."""
    latent = attention.latent or Latent(0, 0, 0, 0, 0)
    heads = cut(attention.heads, tensor)
    query = heads * (latent.nope + latent.rope)
    if latent.query_rank:
        yield _Matrix("self_attn.q_a_proj", hidden, latent.query_rank)
        yield _Matrix("self_attn.q_b_proj", latent.query_rank, query)
    else:
        yield _Matrix("self_attn.q_proj", hidden, query)
    yield _Matrix("self_attn.kv_a_proj_with_mqa", hidden, latent.kv_rank + latent.rope)
    yield _Matrix("self_attn.kv_b_proj", latent.kv_rank, heads * (latent.nope + latent.value))
    yield _Matrix("self_attn.o_proj", heads * latent.value, hidden)


def _mamba(hidden: int, mamba: Mamba, tensor: int) -> Iterator[_Matrix]:
    yield _Matrix("mamba.in_proj", hidden, cut(mamba.inputs, tensor))
    yield _Matrix("mamba.out_proj", cut(mamba.outputs, tensor), hidden)


def _feed_forward(hidden: int, part: FeedForward, parallel: Parallel) -> Iterator[_Matrix]:
    for module, width in (("mlp", part.width), ("mlp.shared_experts", part.shared_width)):
        if width:
            mine = cut(width, parallel.tensor)
            yield _Matrix(f"{module}.up_proj", hidden, mine, part.matrices - 1, bias=part.bias)
            yield _Matrix(f"{module}.down_proj", mine, hidden, bias=part.bias)
    if part.experts:
        ranks = parallel.tensor * parallel.data
        count = cut(part.experts, ranks) if parallel.experts else part.experts
        mine = part.expert_width if parallel.experts else cut(part.expert_width, ranks)
        yield _Matrix("mlp.gate", hidden, part.experts, plain=True)
        yield _Matrix("mlp.experts.0.up_proj", hidden, mine * (part.matrices - 1), count, bias=part.bias)
        yield _Matrix("mlp.experts.0.down_proj", mine, hidden, count, bias=part.bias)


class Share(Enum):
    """Over which ranks a tensor is divided."""

    NONE = "none"
    TENSOR = "tensor"
    KEYS = "keys"
    EXPERTS = "experts"
    EMBEDDING = "embedding"
    HEAD = "head"


class Tensor(NamedTuple):
    """A tensor as the header of a safetensors file tells it."""

    name: str
    dtype: str
    shape: Sequence[int]


class Piece(NamedTuple):
    """Tensors of a checkpoint that are divided in one way, on one layer (-1: before the first).

    ``numbers`` are those kept in floating point of 16 bits or more, which take the type in which the model is served;
    ``packed_bytes`` what is kept as it is: quantised weights.
    """

    layer: int
    share: Share
    numbers: int
    packed_bytes: int


@dataclass(frozen=True, eq=False, slots=True)
class Checkpoint:
    """What the headers of a model's weights tell. Compared by identity, as ``ModelConfig`` is."""

    pieces: tuple[Piece, ...]


_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_OUTSIDE = re.compile(r"vision|visual|image|multi_modal|mm_projector|audio|patch_embed|merger")
_ALL_HAVE_IT = re.compile(r"\.(gate|router|shared_expert_gate|q_a_proj|kv_a_proj_with_mqa)(\.|$)")
_FLOATS = ("F64", "F32", "F16", "BF16")
_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


def read_checkpoint(tensors: Iterable[Tensor], config: ModelConfig) -> Checkpoint:
    """The tensors of a checkpoint, added up by layer and by how vLLM divides them.

    Left out are layers past the last one (of prediction of several tokens, loaded only for speculation) and, where
    head and embedding are one, a head of its own.
    """
    sums: dict[tuple[int, Share], list[int]] = {}
    cells: dict[str, list[int] | None] = {}  # by name; of experts, which may be ten thousands, by where they are
    for tensor in tensors:
        name = tensor.name
        start = name.find(".experts.")
        key = name if start < 0 else name[:start]
        if key not in cells:
            layer, share = _where(tensor, config)
            unused = layer >= len(config.layers) or (share is Share.HEAD and config.tied)
            cells[key] = None if unused else sums.setdefault((layer, share), [0, 0])
        cell = cells[key]
        if cell is None:
            continue
        # A scale stands beside packed weights, in its own type
        if tensor.dtype in _FLOATS and "scale" not in name:
            cell[0] += math.prod(tensor.shape)
        else:
            cell[1] += math.prod(tensor.shape) * _SIZES.get(tensor.dtype, 1)
    found = (Piece(layer, share, numbers, packed) for (layer, share), (numbers, packed) in sums.items())
    return Checkpoint(tuple(found))


def _where(tensor: Tensor, config: ModelConfig) -> tuple[int, Share]:
    name = tensor.name
    if _OUTSIDE.search(name):
        return -1, Share.TENSOR if len(tensor.shape) > 1 else Share.NONE
    found = _LAYER.search(name)
    layer = int(found[1]) if found else -1
    if layer < 0 and "lm_head" in name:
        return len(config.layers) - 1, Share.HEAD
    if layer < 0 and len(tensor.shape) == 2 and config.vocabulary in tensor.shape:
        return layer, Share.EMBEDDING
    if ".experts." in name:
        return layer, Share.EXPERTS
    if len(tensor.shape) < 2 or _ALL_HAVE_IT.search(name):
        return layer, Share.NONE
    return layer, Share.KEYS if ".k_proj" in name or ".v_proj" in name else Share.TENSOR


def stage_bytes_of(checkpoint: Checkpoint, config: ModelConfig, parallel: Parallel, dtype_bytes: int) -> list[int]:
    """Bytes of the weights of each pipeline stage, on one of its ranks, from what is in the checkpoint."""
    parts = stages(len(config.layers), parallel.pipeline)
    stage_of = {layer: stage for stage, layers in enumerate(parts) for layer in layers}
    kv_heads = next((x.attention.kv_heads for x in config.layers if x.attention), 1)
    experts = config.mixture.experts if config.mixture else 1
    ranks = parallel.tensor * parallel.data
    rows = padded(config.vocabulary, VOCABULARY_PAD) / config.vocabulary
    totals = [rope_bytes(config, dtype_bytes)] * parallel.pipeline
    for piece in checkpoint.pieces:
        size = piece.numbers * dtype_bytes + piece.packed_bytes
        match piece.share:
            case Share.TENSOR:
                size = cut(size, parallel.tensor)
            case Share.KEYS:
                size = cut(size, min(parallel.tensor, kv_heads))
            case Share.EXPERTS:
                size = size * cut(experts, ranks) // experts if parallel.experts else cut(size, ranks)
            case Share.EMBEDDING | Share.HEAD:
                size = cut(round(size * rows), parallel.tensor)
            case Share.NONE:
                pass
        totals[stage_of.get(piece.layer, 0)] += size
        if piece.share is Share.EMBEDDING and config.tied and parallel.pipeline > 1:
            totals[-1] += size
    return totals
