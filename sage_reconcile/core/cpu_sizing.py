"""What vLLM takes of the host's memory when it runs on the CPU, part by part, all its processes together.

Weights and KV cache are those of a GPU, and so is activation as far as that is known; there are no CUDA graphs and no
CUDA context. Read in vLLM 0.32: ``v1/worker/cpu_worker.py``, ``platforms/cpu.py``, ``engine/arg_utils.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sage_reconcile.core.kv_cache import Layout
from sage_reconcile.core.observed import ModelFacts
from sage_reconcile.core.sizing import PARTS, Card, Confidence, Part, guess, size
from sage_reconcile.core.units import MIB
from sage_reconcile.core.workload import Workload

GIB_MIB = 1024
PROCESS_MIB = 512
"""What each process takes for itself, Python and torch: measured were 426 MiB of the server, 411 of EngineCore and of
each worker, without what they share."""
KV_SPACE_GIB = 4
"""The KV cache of a rank where nothing tells how large it should be: what vLLM took before 0.32."""
_TOKENS, _SEQUENCES = 2048, 128
"""vLLM's ``--max-num-batched-tokens`` and ``--max-num-seqs`` on the CPU, for each rank of a data-parallel copy."""
_BLOCK_TOKENS = 128
_ON_GPUS_ONLY = ("cuda_graphs", "context", "nccl")


@dataclass(frozen=True, slots=True)
class CpuSizing:
    """The parts but for the KV cache, and what that should be: ``kv_mib`` for each of ``ranks``.

    ``layout`` is None where the model was not read; ``weights_known`` is False where not even its name tells a size.
    """

    others: tuple[Part, ...]
    ranks: int
    kv_mib: int
    kv_sure: Confidence
    layout: Layout | None = None
    context: int = 0
    in_flight: int = 0
    weights_known: bool = True

    @property
    def others_mib(self) -> int:
        """All but the KV cache."""
        return sum(part.mib for part in self.others)

    @property
    def kv_gib(self) -> int:
        """The KV cache of a rank in whole GiB: vLLM is told it in these (``VLLM_CPU_KVCACHE_SPACE``)."""
        return max(1, -(-self.kv_mib // GIB_MIB))

    @property
    def total_mib(self) -> int:
        """Everything, with a KV cache of whole GiB."""
        return self.others_mib + self.ranks * self.kv_gib * GIB_MIB

    def parts(self, kv_mib: int, within_mib: int = 0) -> tuple[Part, ...]:
        """All parts with a KV cache of so many MiB on each rank; the margin takes what is left of ``within_mib``."""
        sizes = {part.name: part for part in self.others}
        sizes["kv_cache"] = Part("kv_cache", self.ranks * kv_mib, self.kv_sure)
        if within_mib:
            rest = sum(part.mib for part in sizes.values() if part.name != "margin")
            sizes["margin"] = sizes["margin"]._replace(mib=max(0, within_mib - rest))
        return tuple(sizes[name] for name in PARTS)


def process_count(work: Workload) -> int:
    """The server, an EngineCore for each data-parallel copy, and a worker for each rank."""
    parallel = work.parallel
    return 1 + parallel.data + parallel.data * parallel.tensor * parallel.pipeline


def cpu_sizing(model: str, work: Workload, facts: ModelFacts | None) -> CpuSizing:
    """What an engine takes: worked out from its model, or else from its name, or else what is known without either."""
    parallel = work.parallel
    ranks = parallel.tensor * parallel.pipeline * parallel.data
    processes = Part("processes", PROCESS_MIB * process_count(work), Confidence.ESTIMATED)
    if not (facts and facts.config):
        return _guessed(model, work, ranks, processes)
    world = parallel.tensor * parallel.pipeline
    there = replace(
        work,
        batched_tokens=work.batched_tokens or _TOKENS * world,
        sequences=work.sequences or _SEQUENCES * world,
        block_tokens=work.block_tokens or _BLOCK_TOKENS,
        offload_mib=0,
    )
    sized = size(facts.config, there, Card(), facts.checkpoint)
    others = tuple(_of_the_host(part, ranks) for part in sized.parts if part.name not in ("kv_cache", "processes"))
    sure = Confidence.EXACT if work.kv_mib else Confidence.ESTIMATED
    return CpuSizing(
        others=(*others, processes),
        ranks=ranks,
        kv_mib=-(-sized.kv_bytes // MIB),
        kv_sure=sure,
        layout=sized.layout,
        context=sized.context,
        in_flight=sized.in_flight,
    )


def _of_the_host(part: Part, ranks: int) -> Part:
    """The part of all ranks: the largest counts for each."""
    mib = 0 if part.name in _ON_GPUS_ONLY else part.mib * ranks
    return Part(part.name, mib, Confidence.GUESSED if part.name == "activation" else part.confidence)


def _guessed(model: str, work: Workload, ranks: int, processes: Part) -> CpuSizing:
    """Weights as the name tells them and a fifth more, as on GPUs; the KV cache as asked for, or vLLM's former one."""
    named = {part.name: part.mib for part in guess(model, work) or ()}
    weights = named.get("weights", 0) * ranks
    sizes = {"weights": weights, "margin": weights // 5}
    others = [Part(name, sizes.get(name, 0), Confidence.GUESSED) for name in PARTS if name != "kv_cache"]
    return CpuSizing(
        others=tuple(processes if part.name == "processes" else part for part in others),
        ranks=ranks,
        kv_mib=work.kv_mib or KV_SPACE_GIB * GIB_MIB,
        kv_sure=Confidence.EXACT if work.kv_mib else Confidence.GUESSED,
        weights_known=bool(named),
    )
