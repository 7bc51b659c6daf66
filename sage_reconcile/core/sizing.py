"""What an engine takes of each GPU before it was ever started, part by part, in MiB of the rank that takes most.

Weights and KV cache follow from the model; what else vLLM takes was measured for 0.19 on H100 (activation, graphs,
contexts), with margins for what it may take elsewhere. Before the first start nothing is better known.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

from sage_reconcile.core import weights
from sage_reconcile.core.kv_cache import BLOCK_TOKENS, Layout, layout
from sage_reconcile.core.model_config import ModelConfig
from sage_reconcile.core.quantization import named_quantization
from sage_reconcile.core.units import MIB
from sage_reconcile.core.weights import Checkpoint, Parallel, Served, cut
from sage_reconcile.core.workload import Workload

CONTEXT_ONE_RANK_MIB, CONTEXT_MANY_RANKS_MIB, CONTEXT_EXPERTS_MIB = 523, 1588, 2059
"""CUDA context and NCCL, which vLLM does not count: 0.51 GiB; with several ranks 1.43 to 1.55, with experts 2.01."""
GRAPHS_MIB, GRAPHS_BASE_MIB, GRAPHS_LAYER_MIB = 2048, 768, 16
"""See ``graphs_mib``."""
NCCL_MIB = 2253
"""What NCCL and the like take inside vLLM's budget with tensor parallelism: 2.06 to 2.21 GiB."""
WEIGHTS_MARGIN, ACTIVATION_MARGIN, SPARE_MIB = 0.03, 0.2, 512
"""Weights are estimated a little low, nearly always; activation differs by version and kernels. The spare half GiB
holds also what one rank takes outside torch (0.24 to 0.46 GiB)."""


PARTS = ("weights", "kv_cache", "activation", "cuda_graphs", "context", "nccl", "lora", "draft", "processes", "margin")
"""The names of the parts, in this order. ``processes`` is of the host: what the processes take for themselves."""


class Confidence(StrEnum):
    """How sure a number is."""

    EXACT = "exact"
    """Read from the headers of the weights."""
    ESTIMATED = "estimated"
    """Worked out from ``config.json``."""
    GUESSED = "guessed"
    """From the model's name, or from what others like it take."""
    MEASURED = "measured"
    """Seen at a start."""


class Part(NamedTuple):
    """One part of what an engine takes of each GPU."""

    name: str
    mib: int
    confidence: Confidence


class Card(NamedTuple):
    """What vLLM's own defaults depend on: a GPU's name and memory. Nothing known: as on an H100."""

    name: str = ""
    memory_mib: int = 81559


@dataclass(frozen=True, slots=True)
class Sizing:
    """The parts, and what follows for the KV cache. ``context`` is that which was asked for, or the model's own."""

    parts: tuple[Part, ...]
    layout: Layout
    context: int
    in_flight: int
    kv_bytes: int

    @property
    def total_mib(self) -> int:
        """All parts together."""
        return sum(part.mib for part in self.parts)

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.layout.tokens_in(self.kv_bytes)


def batch_defaults(card: Card) -> tuple[int, int]:
    """vLLM's ``--max-num-batched-tokens`` and ``--max-num-seqs`` where they are not set (``engine/arg_utils.py``)."""
    if card.memory_mib >= 160 * 1024:
        return 16384, 1024
    if card.memory_mib >= 70 * 1024 and "a100" not in card.name.lower():
        return 8192, 1024
    return 2048, 256


BYTES_PER_PARAMETER = 2
"""bfloat16, what vLLM serves by default."""
_NAMED_SIZE = re.compile(r"(?<![A-Za-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", re.IGNORECASE)
_NAME_MARGIN, _NAME_BASE_MIB = 1.2, 2048


def parameters_from_name(model: str) -> int | None:
    """Parameters as model names tell them: ``Llama-3.1-8B`` is 8e9, ``8x7B`` 56e9; None where they don't."""
    match = _NAMED_SIZE.search(model.rstrip("/").rsplit("/", 1)[-1])
    if match is None:
        return None
    scale = 1e9 if match[3].lower() == "b" else 1e6
    return round(int(match[1] or 1) * float(match[2]) * scale)


def guess(model: str, work: Workload) -> tuple[Part, ...] | None:
    """What a model of this name may take, where nothing but the name is known; None where that tells nothing.

    The field's plain rule: two bytes a parameter, times 1.2 for what comes with the weights, divided over
    the tensor and pipeline ranks, plus 2 GiB on each GPU. How much of that is KV cache nobody knows; one of a given
    size comes on top.
    """
    parameters = parameters_from_name(model)
    if parameters is None:
        return None
    parallel = work.parallel
    held = parameters * BYTES_PER_PARAMETER / (parallel.tensor * parallel.pipeline)
    total = _mib(held * _NAME_MARGIN) + _NAME_BASE_MIB
    context = context_mib(None, parallel)
    margin = total - _mib(held) - context
    sizes = {"weights": _mib(held), "kv_cache": work.kv_mib, "context": context, "margin": margin}
    return tuple(Part(name, sizes.get(name, 0), Confidence.GUESSED) for name in PARTS)


@lru_cache(maxsize=1024)
def size(
    config: ModelConfig,
    work: Workload,
    card: Card,
    checkpoint: Checkpoint | None = None,
    draft: ModelConfig | None = None,
) -> Sizing:
    """What an engine takes, part by part.

    Args:
        config: what its model is built of.
        work: how it is run.
        card: the GPU it runs on.
        checkpoint: what the headers of its weights tell; None where they were not read.
        draft: the model that guesses ahead, where it is one of its own and known.
    """
    tokens, sequences = batch_defaults(card)
    tokens, sequences = work.batched_tokens or tokens, work.sequences or sequences
    types = served(config, work)
    known_weights, sure = _weights(config, work, types, checkpoint)
    kept = max(0, known_weights - work.offload_mib * MIB)
    shape = layout(config, work.parallel, types, work.block_tokens or BLOCK_TOKENS)
    context = work.context or config.context
    kv_bytes = work.kv_mib * MIB or shape.pool_bytes(context, work.concurrency, tokens)
    active = activation_bytes(config, work.parallel, types.dtype_bytes, tokens, min(tokens, sequences))
    drafted, drafted_kv, how = _draft(config, draft, work, types, tokens)
    lora = lora_bytes(config, work, types.dtype_bytes)
    spare = WEIGHTS_MARGIN * kept if sure is not Confidence.EXACT else WEIGHTS_MARGIN / 3 * kept
    guessed, estimated = Confidence.GUESSED, Confidence.ESTIMATED
    parts = (
        Part("weights", _mib(kept), sure),
        Part("kv_cache", _mib(kv_bytes), Confidence.EXACT if work.kv_mib else estimated),
        Part("activation", _mib(active), estimated),
        Part("cuda_graphs", 0 if work.eager else graphs_mib(config, work.parallel), guessed),
        Part("context", context_mib(config, work.parallel), guessed),
        Part("nccl", NCCL_MIB if work.parallel.tensor > 1 else 0, guessed),
        Part("lora", _mib(lora), estimated),
        Part("draft", _mib(drafted + drafted_kv), how),
        Part("processes", 0, estimated),
        Part("margin", _mib(spare + ACTIVATION_MARGIN * active) + SPARE_MIB, guessed),
    )
    return Sizing(parts, shape, context, tokens, kv_bytes)


def _mib(size: float) -> int:
    return math.ceil(size / MIB)


def served(config: ModelConfig, work: Workload) -> Served:
    """In which types a model is served: the checkpoint's own quantisation, or what ``--quantization`` makes of it."""
    dtype = work.dtype_bytes or config.dtype_bytes
    return Served(dtype, work.cache_bytes or dtype, config.quantization or named_quantization(work.quantization))


def _weights(
    config: ModelConfig, work: Workload, types: Served, checkpoint: Checkpoint | None
) -> tuple[int, Confidence]:
    """Bytes on the largest rank. Headers tell nothing of what is quantised only while it is loaded."""
    if checkpoint and types.quantization == config.quantization:
        found = weights.stage_bytes_of(checkpoint, config, work.parallel, types.dtype_bytes)
        return max(found), Confidence.EXACT
    return max(weights.stage_bytes(config, work.parallel, types)), Confidence.ESTIMATED


def activation_bytes(config: ModelConfig, parallel: Parallel, dtype_bytes: int, tokens: int, sequences: int) -> int:
    """The peak of a forward pass of ``tokens``, with the logits of ``sequences``, as measured for 0.19.

    Either the head and the sampler decide, ``14.9 B × sequences × vocabulary + 2.2 B × tokens × hidden``, or the
    layers, ``tokens × (3 × intermediate / tp + 4.25 × hidden) × 2 B``. Experts' two workspaces come on top of the
    first: tokens × experts of each × the wider of their width and the hidden size, and once more with gate and up
    together (``fused_moe/experts/triton_moe.py``). The head is on the last pipeline stage, the largest rank counts.
    """
    head = 14.9 * sequences * config.vocabulary + 1.1 * dtype_bytes * tokens * config.hidden
    layers = tokens * (3 * cut(config.widest, parallel.tensor) + 4.25 * config.hidden) * dtype_bytes
    return math.ceil(max(head + expert_workspace_bytes(config, parallel, dtype_bytes, tokens), layers))


def expert_workspace_bytes(config: ModelConfig, parallel: Parallel, dtype_bytes: int, tokens: int) -> int:
    """The two workspaces of fused experts; see ``activation_bytes``."""
    part = config.mixture
    if part is None:
        return 0
    width = part.expert_width if parallel.experts else cut(part.expert_width, parallel.tensor * parallel.data)
    wide = max(width, config.hidden) + max((part.matrices - 1) * width, config.hidden)
    return tokens * part.per_token * wide * dtype_bytes


def context_mib(config: ModelConfig | None, parallel: Parallel) -> int:
    """CUDA context and NCCL's own, outside what vLLM counts."""
    if parallel.tensor * parallel.pipeline * parallel.data == 1:
        return CONTEXT_ONE_RANK_MIB
    return CONTEXT_EXPERTS_MIB if config and config.mixture else CONTEXT_MANY_RANKS_MIB


def graphs_mib(config: ModelConfig, parallel: Parallel) -> int:
    """What captured CUDA graphs take: at most 2 GiB; less where a stage has few layers that are all dense.

    Every layer keeps something of its own in the graph of every batch size. Seen were 0.51 GiB with 8 layers, 0.65
    with 16, 0.91 with 32, 1.79 with 80; with experts 0.93 to 1.84, whatever the layers.
    """
    if config.mixture or any(layer.mamba for layer in config.layers):
        return GRAPHS_MIB
    return min(GRAPHS_MIB, GRAPHS_BASE_MIB + GRAPHS_LAYER_MIB * cut(len(config.layers), parallel.pipeline))


def lora_bytes(config: ModelConfig, work: Workload, dtype_bytes: int) -> int:
    """Room for adapters: for each linear layer two matrices of the largest rank, as many times as ``--max-loras``.

    vLLM keeps it from the start, whether adapters are there or not (``lora/layers/``). The first matrix of a divided
    layer is whole on each rank, the second divided.
    """
    if not work.loras:
        return 0
    parts = weights.stages(len(config.layers), work.parallel.pipeline)
    known: dict[int, int] = {}
    for layer in config.layers:
        if id(layer) not in known:
            found = weights.matrices(config, layer, work.parallel)
            known[id(layer)] = sum((x.inputs + x.outputs) * x.number for x in found if not x.plain)
    each = [known[id(layer)] for layer in config.layers]
    return max(sum(each[index] for index in part) for part in parts) * work.lora_rank * work.loras * dtype_bytes


_LAYERS_ONLY = re.compile(r"eagle|mtp|medusa|next_n|nextn|mlp_speculator")


def _draft(
    config: ModelConfig, draft: ModelConfig | None, work: Workload, types: Served, tokens: int
) -> tuple[int, int, Confidence]:
    """Weights and KV cache of what guesses ahead, on each tensor-parallel rank, in bytes.

    A model of its own is divided like the large one, and shares the last stage; of one that was not read, the name
    tells the size. MTP, EAGLE and Medusa are taken for one layer more, and a matrix that joins two hidden states;
    embedding and head are shared.
    """
    if work.speculation is None:
        return 0, 0, Confidence.ESTIMATED
    parallel = work.parallel._replace(pipeline=1)
    context = work.context or config.context
    if draft:
        own = Served(draft.dtype_bytes, types.cache_bytes, draft.quantization)
        kept = layout(draft, parallel, own).pool_bytes(context, work.concurrency, tokens)
        return max(weights.stage_bytes(draft, parallel, own)), kept, Confidence.ESTIMATED
    named = parameters_from_name(work.speculation.model)
    if named and not _LAYERS_ONLY.search(f"{work.speculation.method} {work.speculation.model}".lower()):
        return named * BYTES_PER_PARAMETER // parallel.tensor, 0, Confidence.GUESSED
    layers = len(config.layers)
    ends = 2 * config.hidden * cut(config.vocabulary, parallel.tensor) * types.dtype_bytes
    plain = max(0, weights.stage_bytes(config, parallel, types)[0] - ends) // layers
    joining = 2 * config.hidden * config.hidden * types.dtype_bytes
    kept = layout(config, parallel, types).pool_bytes(context, work.concurrency, tokens) // layers
    return plain + joining, kept, Confidence.GUESSED
