"""How vLLM keeps keys, values and states: the blocks of its KV cache, and what of it a request takes, in bytes.

Read in vLLM 0.32: ``v1/core/kv_cache_utils.py`` (grouping), ``v1/kv_cache_interface.py`` (pages),
``platforms/interface.py`` (pages of Mamba), ``layers/mamba/mamba_utils.py`` (states).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from sage_reconcile.core.model_config import ModelConfig
from sage_reconcile.core.model_layers import MAMBA, SLIDING, Attention, Layer, Mamba
from sage_reconcile.core.weights import Parallel, Served, cut, padded, stages

BLOCK_TOKENS = 16
"""Tokens of a block, unless ``--block-size`` says otherwise; hybrids with Mamba get larger ones."""


class Group(NamedTuple):
    """Layers that share a table of blocks: what a block of it holds of a request.

    ``tokens`` of a block, ``window`` of sliding or chunked attention (0: all tokens are kept), ``state`` where a
    request needs one block however long it is. ``extra`` blocks are for a window that begins inside a block.
    """

    tokens: int
    window: int
    state: bool
    extra: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """The KV cache of the rank that has most of it. A block of each group takes ``block_bytes``."""

    block_bytes: int
    groups: tuple[Group, ...]

    @property
    def block_tokens(self) -> int:
        """Tokens of the smallest block."""
        return min((group.tokens for group in self.groups if not group.state), default=BLOCK_TOKENS)

    def blocks_of_request(self, length: int, in_flight: int) -> int:
        """Blocks that a request of this length takes at the most, ``in_flight`` tokens being worked on at one time.

        Of a sliding window are kept ``min(window - 1 + in flight, length)`` tokens, and a block more since the window
        may begin inside one.
        """
        total = 0
        for group in self.groups:
            if group.state:
                total += 1
            elif group.window:
                before = group.window - 1 if group.extra else group.window
                total += cut(min(before + in_flight, length), group.tokens) + group.extra
            else:
                total += cut(length, group.tokens)
        return total

    def pool_bytes(self, length: int, requests: int, in_flight: int) -> int:
        """A pool in which so many requests of this length fit; one block of it is never used."""
        if not self.groups:
            return 0
        return (self.blocks_of_request(length, in_flight) * requests + 1) * self.block_bytes

    def tokens_in(self, pool_bytes: int) -> int:
        """Tokens that a pool holds, as vLLM logs it ("GPU KV cache size", 0.19): blocks over groups."""
        if not self.groups:
            return 0
        return max(0, pool_bytes) // self.block_bytes // len(self.groups) * self.block_tokens

    def requests_in(self, pool_bytes: int, length: int, in_flight: int) -> float:
        """How many requests of this length a pool holds ("Maximum concurrency")."""
        if not self.groups:
            return 0.0
        return max(0, pool_bytes) // self.block_bytes / self.blocks_of_request(length, in_flight)

    def longest_in(self, pool_bytes: int, requests: int, in_flight: int, most: int) -> int:
        """The longest context, at most ``most``, of which so many requests fit; 0 where not one token does."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.pool_bytes(middle, requests, in_flight) <= pool_bytes:
                low = middle
            else:
                high = middle - 1
        return low


class _Cached(NamedTuple):
    """What one layer keeps: its kind, the bytes of its page, the tokens of a page (0: a state)."""

    kind: tuple[str, int]
    page: int
    tokens: int


@dataclass(frozen=True, slots=True)
class _Pages:
    """What the layers of a model keep on one rank, in blocks of so many tokens."""

    config: ModelConfig
    tensor: int
    served: Served
    tokens: int

    def of_token(self, attention: Attention) -> int:
        """Bytes of a token in one layer.

        ``max(1, kv_heads // tp) × (head_dim of keys + of values) × bytes``; of latent attention
        ``(kv_lora_rank + qk_rope_head_dim) × bytes``, which is not divided.
        """
        if attention.latent:
            return (attention.latent.kv_rank + attention.latent.rope) * self.served.cache_bytes
        return max(1, attention.kv_heads // self.tensor) * 2 * attention.head_dim * self.served.cache_bytes

    def of_state(self, mamba: Mamba) -> int:
        """Bytes of the state of one request in one layer."""
        convolution = cut(mamba.convolution, self.tensor) * self.served.dtype_bytes
        return convolution + cut(mamba.state, self.tensor) * self.config.state_bytes

    def of_layer(self, layer: Layer) -> Iterator[_Cached]:
        """What a layer keeps."""
        if layer.attention and layer.attention.cached:
            page = self.of_token(layer.attention) * self.tokens
            yield _Cached((layer.attention.kind, layer.attention.window), page, self.tokens)
        if layer.mamba and (state := self.of_state(layer.mamba)):  # a convolution over one token keeps nothing
            yield _Cached((MAMBA, 0), state, 0)

    def aligned(self) -> _Pages:
        """Beside Mamba a block has so many tokens, by 16 (MLA: by 128), that a page of attention holds a state.

        ``_align_hybrid_block_size`` in ``platforms/interface.py``.
        """
        states = [self.of_state(x.mamba) for x in self.config.layers if x.mamba]
        attention = [x.attention for x in self.config.layers if x.attention]
        if not states or not attention:
            return self
        step = max(128 if attention[0].latent else BLOCK_TOKENS, self.tokens)
        needed = cut(max(states), max(map(self.of_token, attention)))
        return replace(self, tokens=max(self.tokens, padded(needed, step)))


def layout(config: ModelConfig, parallel: Parallel, served: Served, block_tokens: int = BLOCK_TOKENS) -> Layout:
    """How the cache of a model is laid out.

    Layers that keep the same are one group; of several kinds, groups of equally many layers are made: as many as
    the rarest kind has, or the commonest if that has less than half as many again. Pages of different sizes are made
    equal by more tokens a page, or padded. Of the pipeline stages the one with most layers in a group decides.
    """
    pages = _Pages(config, parallel.tensor, served, block_tokens).aligned()
    cached = [(index, found) for index, layer in enumerate(config.layers) for found in pages.of_layer(layer)]
    parts = stages(len(config.layers), parallel.pipeline)
    if not cached:
        return Layout(1, ())
    if len({one.kind for _, one in cached}) == 1:
        heaviest = max(sum(one.page for index, one in cached if index in part) for part in parts)
        return Layout(max(1, heaviest), (_group(cached[0][1], cached[0][1].tokens),))
    page = max(one.page for _, one in cached)
    by_kind: dict[_Cached, list[int]] = {}
    for index, one in cached:
        by_kind.setdefault(one, []).append(index)
    counts = [len(members) for members in by_kind.values()]
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    groups: list[Group] = []
    most = 0
    for one, members in by_kind.items():
        number = cut(len(members), size)
        groups += [_group(one, one.tokens * (page // one.page) if page % one.page == 0 else one.tokens)] * number
        for position in range(number):
            most = max(most, *(sum(index in part for index in members[position::number]) for part in parts), 0)
    return Layout(max(1, most * page), tuple(groups))


def _group(one: _Cached, tokens: int) -> Group:
    kind, window = one.kind
    return Group(tokens, window, kind == MAMBA, 1 if kind == SLIDING else 0)
