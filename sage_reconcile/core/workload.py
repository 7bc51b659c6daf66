"""How an engine will be run, as far as its memory depends on it: from its fields and from vLLM's flags in ``args``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sage_reconcile.core.model_config import DTYPE_BYTES
from sage_reconcile.core.spec import EngineSpec
from sage_reconcile.core.units import MIB
from sage_reconcile.core.weights import Parallel

_HUMAN = re.compile(r"(\d+(?:\.\d+)?)([kKmMgG]?)")
_SCALES = {"": 1, "k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}
_TRUE = (True, "true", "True")


class Speculation(NamedTuple):
    """Tokens guessed ahead, and what guesses them: a model by name, or else layers that the model itself brings."""

    method: str
    model: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of an engine. None and 0 stand for what vLLM does by itself.

    ``context`` in tokens, ``concurrency`` full-length requests at one time, for which the KV cache has room; or
    ``kv_mib``, whatever fits in it. ``batched_tokens`` and ``sequences`` are
    vLLM's ``--max-num-batched-tokens`` and ``--max-num-seqs``. ``dtype_bytes`` is of what is not quantised,
    ``cache_bytes`` of a number in the KV cache. ``offload_mib`` of the weights of a rank stay in host memory.
    """

    parallel: Parallel = field(default_factory=Parallel)
    context: int = 0
    concurrency: int = 1
    kv_mib: int = 0
    batched_tokens: int = 0
    sequences: int = 0
    dtype_bytes: int = 0
    cache_bytes: int = 0
    quantization: str = ""
    block_tokens: int = 0
    loras: int = 0
    lora_rank: int = 16
    offload_mib: int = 0
    eager: bool = False
    speculation: Speculation | None = None


def workload(spec: EngineSpec) -> Workload:
    """What the entry of an engine asks for; a flag that is not understood is left to vLLM."""
    args = spec.args
    return Workload(
        parallel=Parallel(
            spec.tensor_parallel_size,
            spec.pipeline_parallel_size,
            spec.data_parallel_size,
            args.get("enable-expert-parallel") in _TRUE,
        ),
        context=spec.context or _whole(args, "max-model-len"),
        concurrency=spec.concurrency or 1,
        kv_mib=spec.kv_cache or -(-_whole(args, "kv-cache-memory-bytes") // MIB),
        batched_tokens=_whole(args, "max-num-batched-tokens"),
        sequences=_whole(args, "max-num-seqs"),
        dtype_bytes=dtype_bytes(str(args.get("dtype") or "")),
        cache_bytes=cache_bytes(str(args.get("kv-cache-dtype") or "")),
        quantization=str(args.get("quantization") or ""),
        block_tokens=_whole(args, "block-size"),
        loras=(_whole(args, "max-loras") or 1) if args.get("enable-lora") in _TRUE else 0,
        lora_rank=_whole(args, "max-lora-rank") or 16,
        offload_mib=_whole(args, "cpu-offload-gb") * 1024,
        eager=args.get("enforce-eager") in _TRUE,
        speculation=speculation(args.get("speculative-config")),
    )


def dtype_bytes(dtype: str) -> int:
    """Bytes of a number of this ``--dtype``; 0 where it is the model's own."""
    return DTYPE_BYTES.get(dtype, 0)


def cache_bytes(dtype: str) -> int:
    """Bytes of a number in a KV cache of this ``--kv-cache-dtype``; 0 where it is the model's own."""
    if dtype.startswith(("fp8", "int8")):
        return 1
    return DTYPE_BYTES.get(dtype, 0)


def speculation(value: object) -> Speculation | None:
    """vLLM's ``--speculative-config``, a map or JSON; None where nothing is guessed by a model."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if not isinstance(value, Mapping):
        return None
    method, model = str(value.get("method") or ""), str(value.get("model") or "")
    if method in ("ngram", "ngram_gpu", "suffix") or not (method or model):
        return None
    tokens = value.get("num_speculative_tokens")
    return Speculation(method, model, tokens if isinstance(tokens, int) else 1)


def _whole(args: Mapping[str, object], flag: str) -> int:
    """A whole number as vLLM reads it: ``32k`` is 32,000, ``32K`` 32,768; 0 where it is none, or vLLM's to choose."""
    value = args.get(flag)
    if isinstance(value, bool) or value is None:
        return 0
    match = _HUMAN.fullmatch(str(value).strip())
    return int(float(match[1]) * _SCALES[match[2]]) if match else 0
