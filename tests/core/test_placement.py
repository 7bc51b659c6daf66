"""Which GPUs a replica gets, and why it gets none."""

from __future__ import annotations

import pytest

from sage_reconcile.core.observed import Gpu, GpuProcess, Observed
from sage_reconcile.core.placement import Placement, Refusal, Request, place, strangers
from sage_reconcile.core.spec import Desired
from tests.reading import desired

GIB = 1024


def gpu(
    index: int, gib: int = 80, name: str = "H100", *, used: int = 0, pci: int | None = None, problem: str = ""
) -> Gpu:
    order = index if pci is None else pci
    return Gpu(
        f"GPU-{index}", index, name, f"0000:{order:02x}:00.0", gib * GIB, memory_used_mib=used * GIB, problem=problem
    )


def requests(wanted: Desired) -> list[Request]:
    return [
        Request(engine, index, position)
        for position, engine in enumerate(wanted.engines)
        for index in range(engine.spec.replicas)
    ]


def placed(engines: str, *gpus: Gpu, host: str = "{}") -> dict[str, list[int] | str]:
    """For each replica the indexes of its GPUs, or why it has none."""
    wanted = desired(f"version: 1\nhost: {host}\nengines: {{{engines}}}\n")
    results = place(wanted, Observed(gpus), requests(wanted), frozenset())
    return {
        replica: [gpu.index for gpu in result.gpus] if isinstance(result, Placement) else result.reason
        for replica, result in results.items()
    }


def where(engines: str, *gpus: Gpu, host: str = "{}") -> dict[str, list[int] | None]:
    found = placed(engines, *gpus, host=host)
    return {replica: None if isinstance(gpus, str) else gpus for replica, gpus in found.items()}


def test_each_goes_where_it_leaves_least() -> None:
    assert where("a: {model: a, memory: 20GiB}", gpu(0), gpu(1, used=50), gpu(2, used=55)) == {"a/0": [2]}
    assert where("a: {model: a, memory: 20GiB}", gpu(0), gpu(1, 40, "A100")) == {"a/0": [1]}


def test_ties_go_to_the_lowest_pci_address_not_to_the_first_told() -> None:
    assert where("a: {model: a, memory: 20GiB}", gpu(0, pci=9), gpu(1, pci=3)) == {"a/0": [1]}


def test_the_largest_is_placed_first() -> None:
    engines = "small: {model: a, memory: 30GiB}, large: {model: b, memory: 60GiB}, mid: {model: c, memory: 50GiB}"
    assert where(engines, gpu(0), gpu(1)) == {"large/0": [0], "mid/0": [1], "small/0": [1]}


def test_largest_means_gpus_times_memory() -> None:
    engines = "one: {model: a, memory: 50GiB}, two: {model: b, memory: 40GiB, tensor_parallel_size: 2}"
    assert where(engines, gpu(0), gpu(1)) == {"two/0": [0, 1], "one/0": None}


def test_priority_beats_size() -> None:
    engines = "large: {model: a, memory: 60GiB}, dear: {model: b, memory: 30GiB, priority: 1}"
    assert where(engines, gpu(0)) == {"dear/0": [0], "large/0": None}


def test_equals_go_in_file_order() -> None:
    engines = "b: {model: a, memory: 50GiB}, a: {model: b, memory: 50GiB}"
    assert where(engines, gpu(0)) == {"b/0": [0], "a/0": None}


def test_what_gives_up_a_place_comes_before_what_has_none() -> None:
    wanted = desired(
        "version: 1\nengines: {new: {model: a, memory: 60GiB, priority: 9}, old: {model: b, memory: 40GiB}}\n"
    )
    new, old = requests(wanted)
    results = place(wanted, Observed((gpu(0),)), [new, Request(old.engine, 0, 1, returning=True)], frozenset())
    assert isinstance(results["old/0"], Placement)
    assert isinstance(results["new/0"], Refusal)


def test_gpus_of_one_replica_are_of_one_model_and_in_pci_order() -> None:
    two = "a: {model: a, memory: 30GiB, tensor_parallel_size: 2}"
    assert where(two, gpu(0, pci=5), gpu(1, name="A100"), gpu(2, pci=1)) == {"a/0": [2, 0]}
    assert where(two, gpu(0), gpu(1, name="A100")) == {"a/0": None}


def test_pins_and_exclusions_hold() -> None:
    engines = "a: {model: a, memory: 30GiB, gpus: [1]}, b: {model: b, memory: 30GiB, gpus: [GPU-2]}"
    assert where(engines, gpu(0), gpu(1), gpu(2)) == {"a/0": [1], "b/0": [2]}
    assert where(engines, gpu(0), gpu(1), gpu(2), host="{exclude: [1, GPU-2]}") == {"a/0": None, "b/0": None}


def test_a_share_is_of_the_gpu_it_lands_on() -> None:
    wanted = desired("version: 1\nengines: {a: {model: a, memory: 50%}}\n")
    result = place(wanted, Observed((gpu(0, 24, "L4"),)), requests(wanted), frozenset())["a/0"]
    assert isinstance(result, Placement)
    assert result.memory_mib == 12 * GIB


def test_a_share_over_gpus_of_unequal_size_is_promised_the_largest() -> None:
    wanted = desired("version: 1\nengines: {a: {model: a, memory: 50%, tensor_parallel_size: 2}}\n")
    machine = Observed((gpu(0, 24, "X"), gpu(1, 48, "X")))
    result = place(wanted, machine, requests(wanted), frozenset())["a/0"]
    assert isinstance(result, Placement)
    assert result.memory_mib == 24 * GIB


def test_engines_on_cpu_need_no_place() -> None:
    assert where("a: {model: a, device: cpu}") == {"a/0": []}


@pytest.mark.parametrize(
    ("engines", "gpus", "host", "reason"),
    [
        ("a: {model: a}", (), "{}", "needs 1 GPU, but this machine has none; `device: cpu` runs it without"),
        (
            "a: {model: a, tensor_parallel_size: 2}",
            (),
            "{}",
            "needs 2 GPUs of one model, but this machine has none; `device: cpu` runs it without",
        ),
        ("a: {model: a}", (gpu(0),), "{}", "`memory: auto` cannot tell what a takes; say it with `memory: 24GiB`"),
        (
            "a: {model: a, gpus: [0, 3], memory: 1GiB}",
            (gpu(0), gpu(1)),
            "{}",
            "its `gpus` name 3, which this machine does not have; it has 0, 1",
        ),
        (
            "a: {model: a, memory: 81GiB}",
            (gpu(0),),
            "{}",
            "needs 81.0GiB on 1 GPU; none has that free: GPU 0 has 80.0GiB of 80GiB free",
        ),
        (
            "a: {model: a, memory: 40GiB, tensor_parallel_size: 2}",
            (gpu(0), gpu(1, used=50)),
            "{}",
            (
                "needs 40.0GiB on 2 GPUs of one model; 1 has that free: GPU 0 has 80.0GiB of 80GiB free; "
                "GPU 1 has 30.0GiB of 80GiB free (unmanaged 50.0GiB)"
            ),
        ),
        (
            "a: {model: a, memory: 40GiB}",
            (gpu(0, problem="ECC errors"),),
            "{headroom: 1GiB}",
            "needs 40.0GiB on 1 GPU; none has that free: GPU 0 takes nothing new (ECC errors)",
        ),
        (
            "a: {model: a, memory: 40GiB, gpus: [0]}",
            (gpu(0, used=70), gpu(1)),
            "{headroom: 1GiB}",
            (
                "needs 40.0GiB on 1 GPU (`gpus: [0]`); none has that free: GPU 0 has 9.0GiB of 80GiB free "
                "(unmanaged 70.0GiB, reserve and headroom 1.0GiB)"
            ),
        ),
        (
            "a: {model: a, memory: 30721MiB}",
            (gpu(0, used=50),),
            "{}",
            "needs 30721MiB on 1 GPU; none has that free: GPU 0 has 30720MiB of 80GiB free (unmanaged 50.0GiB)",
        ),
        (
            "a: {model: a-7b}",
            (gpu(0, used=70),),
            "{}",
            "needs auto = 17.6GiB on 1 GPU; none has that free: GPU 0 has 10.0GiB of 80GiB free (unmanaged 70.0GiB)",
        ),
    ],
)
def test_every_refusal_has_its_numbers(engines: str, gpus: tuple[Gpu, ...], host: str, reason: str) -> None:
    assert placed(engines, *gpus, host=host) == {"a/0": reason}


def test_strangers_are_named_largest_first_and_not_all_of_them() -> None:
    found = [GpuProcess(pid, mib, "alice", "python") for pid, mib in ((4, None), (3, 5), (2, 9), (1, 5), (5, 1))]
    machine = Gpu("GPU-0", 0, "H100", "0", 80 * GIB, processes=(*found, GpuProcess(9, 99, launch="ours")))
    assert strangers(machine) == "unmanaged (pid 2 alice python, pid 1 alice python, pid 3 alice python and 2 more)"
    assert strangers(gpu(0)) == "unmanaged"
