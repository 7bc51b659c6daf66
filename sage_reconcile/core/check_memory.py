"""The judge's sums of memory: what every GPU, and the host, would hold after each start."""

from __future__ import annotations

from collections.abc import Iterator

from sage_reconcile.core.observed import Gpu, Launch, Life, Observed
from sage_reconcile.core.plan import Action, Plan
from sage_reconcile.core.spec import Desired


def gpu_memory(desired: Desired, observed: Observed, plan: Plan) -> Iterator[str]:
    """Adds up, for each GPU and each start on it, what is there then and what comes.

    Only what the plan ends before a start may be left out of it, and what is stopping, for which it has to wait.
    """
    stopping = {launch.id for launch in observed.launches if is_stopping(launch)}
    gpus = {gpu.uuid: gpu for gpu in observed.gpus}
    actions = {action.id: action for action in plan.actions}
    spawns = [action for action in plan.actions if action.kind == "spawn"]
    touched = {gpu.uuid for action in spawns for gpu in action.gpus}
    for uuid in sorted(touched - gpus.keys()):
        yield f"a replica would start on {uuid}, which is not there"
    for uuid in sorted(touched & gpus.keys()):
        gpu = gpus[uuid]
        new = [action for action in spawns if uuid in {used.uuid for used in action.gpus}]
        started = gpu.memory_reserved_mib + desired.host.headroom
        for action in new:
            started += action.memory_mib
            gone = {actions[step].launch for step in all_before(action, actions) if step in actions}
            total = started + taken(gpu, observed.launches, gone | stopping)
            if action.waits_for:
                total -= _not_back(gpu, observed.launches)
            if total > gpu.memory_total_mib:
                yield f"GPU {gpu.index} would hold {total} MiB of {gpu.memory_total_mib} MiB after {action.id}"
        if gpu.problem or gpu.index in desired.host.exclude or uuid in desired.host.exclude:
            yield f"GPU {gpu.index} takes nothing new, but {new[0].id} is placed there"


def _not_back(gpu: Gpu, launches: tuple[Launch, ...]) -> int:
    """MiB that no process is named for, as far as launches that ended on this GPU had been promised it."""
    if any(process.memory_mib is None for process in gpu.processes):
        return 0
    unnamed = gpu.memory_used_mib - sum(process.memory_mib or 0 for process in gpu.processes)
    ended = (launch for launch in launches if launch.life is Life.EXITED and gpu.uuid in launch.gpus)
    return min(max(0, unnamed), sum(launch.memory_mib for launch in ended))


def taken(gpu: Gpu, launches: tuple[Launch, ...], gone: set[str]) -> int:
    """MiB on a GPU that the plan does not end: our promises or holdings, whichever is larger, and strangers'."""
    ours = seen = 0
    for launch in (one for one in launches if one.life is not Life.EXITED):
        told = [process.memory_mib for process in gpu.processes if process.launch == launch.id]
        promise = launch.memory_mib if gpu.uuid in launch.gpus else 0
        held = sum(mib or 0 for mib in told)
        seen += max(held, promise) if None in told else held
        settled = launch.spec.get("memory") == "manual" and launch.ready_at and held and None not in told
        ours += 0 if launch.id in gone else max(held, 0 if settled else promise)
    return ours + max(0, gpu.memory_used_mib - seen)


def host_memory(desired: Desired, observed: Observed, plan: Plan) -> Iterator[str]:
    """Adds up the same for the host's own memory, of which a tenth, 2 GiB at the most, belongs to nobody.

    The starts are taken in the plan's order: each has to have room together with all before it. What is stopping
    counts as gone only for a start that waits.
    """
    yield from _on_the_cpu(desired, plan)
    host = observed.host_memory
    if host is None:
        return
    actions = {action.id: action for action in plan.actions}
    stopping = {launch.id for launch in observed.launches if is_stopping(launch)}
    there = [launch for launch in observed.launches if launch.life is not Life.EXITED]
    others = max(0, host.total_mib - host.available_mib - sum(launch.host_held_mib for launch in there))
    started = min(2048, host.total_mib // 10) + others
    for action in plan.actions:
        if action.kind != "spawn" or not action.host_memory_mib:
            continue
        started += action.host_memory_mib
        gone = {actions[step].launch for step in all_before(action, actions) if step in actions}
        gone |= stopping if action.waits_for else set()
        total = started + sum(_has_of_host(launch) for launch in there if launch.id not in gone)
        if total > host.total_mib:
            yield f"the host would hold {total} MiB of {host.total_mib} MiB after {action.id}"


def _has_of_host(launch: Launch) -> int:
    """The larger of promised and held; of one that sizes itself, once it was ready, what it holds if that is told."""
    if launch.spec.get("memory") == "manual" and launch.ready_at is not None and launch.host_held_mib:
        return launch.host_held_mib
    return max(launch.host_memory_mib, launch.host_held_mib)


def _on_the_cpu(desired: Desired, plan: Plan) -> Iterator[str]:
    """Whether what starts there is promised what its entry says, and vLLM told a KV cache that is inside it."""
    specs = {engine.name: engine.spec for engine in desired.engines}
    for action in plan.actions:
        spec = specs.get(action.replica.rpartition("/")[0])
        if action.kind != "spawn" or spec is None or spec.device != "cpu":
            continue
        if spec.memory.kind == "mib" and action.host_memory_mib != int(spec.memory.amount):
            yield f"{action.id} is promised {action.host_memory_mib} MiB of the host, and its entry says {spec.memory}"
        told = spec.runtime == "vllm" and spec.memory.kind != "manual"
        if told != (action.kv_space_gib > 0):
            yield f"{action.id} is told a KV cache of {action.kv_space_gib} GiB"
        ranks = spec.tensor_parallel_size * spec.pipeline_parallel_size * spec.data_parallel_size
        if told and spec.memory.kind == "auto" and action.kv_space_gib * ranks * 1024 >= action.host_memory_mib:
            yield f"{action.id} is told a KV cache as large as all that it is promised"


def is_stopping(launch: Launch) -> bool:
    """Whether it will be gone; of what cannot be proven ours nobody knows, whatever it was asked before."""
    return launch.life is Life.ALIVE and launch.stopping_since is not None


def all_before(action: Action, actions: dict[str, Action]) -> set[str]:
    """The ids of the actions that have come to their end before this one."""
    before: set[str] = set()
    todo = list(action.after)
    while todo:
        step = todo.pop()
        if step not in before:
            before.add(step)
            todo += actions[step].after if step in actions else ()
    return before
