"""Which GPUs a replica gets, and why it gets none."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest

from sage_reconcile.core.observed import Gpu, GpuProcess, Launch, Life, Link, Links, Observed
from sage_reconcile.core.placement import Placement, Refusal, Request, place
from sage_reconcile.core.reasons import strangers
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


def islands(*groups: tuple[int, ...], link: Link = Link.NVLINK, between: Link | None = None) -> Links:
    """The links of GPUs: ``link`` inside a group, ``between`` elsewhere; None where they are not known."""
    inside = {frozenset((f"GPU-{a}", f"GPU-{b}")): link for group in groups for a, b in combinations(group, 2)}
    everything = sorted(index for group in groups for index in group)
    other = {frozenset((f"GPU-{a}", f"GPU-{b}")): between for a, b in combinations(everything, 2) if between}
    return other | inside


def placed(engines: str, *gpus: Gpu, host: str = "{}", links: Links | None = None) -> dict[str, list[int] | str]:
    """For each replica the indexes of its GPUs, or why it has none."""
    wanted = desired(f"version: 1\nhost: {host}\nengines: {{{engines}}}\n")
    results = place(wanted, Observed(gpus, links=links or {}), requests(wanted), frozenset())
    return {
        replica: [gpu.index for gpu in result.gpus] if isinstance(result, Placement) else result.reason
        for replica, result in results.items()
    }


def where(engines: str, *gpus: Gpu, host: str = "{}", links: Links | None = None) -> dict[str, list[int] | None]:
    found = placed(engines, *gpus, host=host, links=links)
    return {replica: None if isinstance(gpus, str) else gpus for replica, gpus in found.items()}


def test_each_goes_where_it_leaves_least() -> None:
    assert where("a: {model: a, memory: 20GiB}", gpu(0), gpu(1, used=50), gpu(2, used=55)) == {"a/0": [2]}
    assert where("a: {model: a, memory: 20GiB}", gpu(0), gpu(1, 40, "A100")) == {"a/0": [1]}


def test_ties_go_to_the_lowest_pci_address_not_to_the_first_told() -> None:
    assert where("a: {model: a, memory: 20GiB}", gpu(0, pci=9), gpu(1, pci=3)) == {"a/0": [1]}


def test_all_are_placed_where_all_fit() -> None:
    engines = "small: {model: a, memory: 30GiB}, large: {model: b, memory: 60GiB}, mid: {model: c, memory: 50GiB}"
    assert where(engines, gpu(0), gpu(1)) == {"large/0": [0], "mid/0": [1], "small/0": [1]}


def test_the_order_of_the_file_decides_who_gets_in_and_size_does_not() -> None:
    engines = "one: {model: a, memory: 50GiB}, two: {model: b, memory: 40GiB, tensor_parallel_size: 2}"
    assert where(engines, gpu(0), gpu(1)) == {"one/0": [0], "two/0": None}


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


def test_what_best_fit_would_refuse_is_arranged_so_that_it_fits() -> None:
    """In file order a and b go on one GPU, and neither leaves room for the last."""
    engines = ", ".join(
        f"{name}: {{model: m, memory: {size}GiB}}" for name, size in zip("abcd", (30, 30, 50, 50), strict=True)
    )
    assert where(engines, gpu(0), gpu(1)) == {"a/0": [0], "b/0": [1], "c/0": [0], "d/0": [1]}
    sizes = (26, 26, 40, 40, 27, 27, 27, 27)  # 80 = 40 + 40 = 26 + 27 + 27
    engines = ", ".join(
        f"{name}: {{model: m, memory: {size}GiB}}" for name, size in zip("abcdefgh", sizes, strict=True)
    )
    found = where(engines, gpu(0), gpu(1), gpu(2))
    assert found["c/0"] == found["d/0"]
    assert None not in found.values()


def test_whole_gpus_are_left_free_where_they_can_be() -> None:
    engines = "a: {model: m, memory: 20GiB}, b: {model: m, memory: 30GiB}, c: {model: m, memory: 30GiB}"
    assert where(engines, gpu(0), gpu(1), gpu(2)) == {"a/0": [0], "b/0": [0], "c/0": [0]}
    assert where("a: {model: m, memory: 10GiB}", gpu(0), gpu(1, 24, "L4"), gpu(2, used=5)) == {"a/0": [2]}


def test_replicas_that_are_spread_share_no_gpu() -> None:
    three = "a: {model: m, memory: 10GiB, replicas: 3, spread: gpu}, b: {model: m, memory: 10GiB, replicas: 2}"
    found = where(three, gpu(0), gpu(1))
    assert (found["a/0"], found["a/1"], found["a/2"]) == ([0], [1], None)
    assert found["b/0"] == found["b/1"]
    assert placed(three, gpu(0), gpu(1))["a/2"] == (
        "needs 10.0GiB on 1 GPU without another replica of it (`spread: gpu`); none has that free"
        " (short of GPUs that it may use): GPU 0 has a/0 "
        "already; GPU 1 has a/1 already; exact: no other arrangement of what is started makes room"
    )


def test_an_exclusive_engine_takes_gpus_that_nothing_is_on_and_keeps_them() -> None:
    engines = "a: {model: m, memory: 10GiB, exclusive: true}, b: {model: m, memory: 10GiB}, c: {model: m, memory: 1GiB}"
    assert where(engines, gpu(0, used=5), gpu(1)) == {"a/0": [1], "b/0": [0], "c/0": [0]}
    assert where(engines, gpu(0)) == {"a/0": [0], "b/0": None, "c/0": None}
    assert placed(engines, gpu(0, used=5))["a/0"] == (
        "needs 10.0GiB on 1 GPU with nothing else on it (`exclusive: true`); none has that free"
        " (short of GPUs that it may use): GPU 0 is not free of "
        "others (b/0 10.0GiB, c/0 1.0GiB, unmanaged 5.0GiB); exact: no other arrangement of what is started makes room"
    )
    assert placed(engines, gpu(0))["b/0"] == (
        "needs 10.0GiB on 1 GPU; none has that free (short of GPUs that it may use): GPU 0 is for a/0 alone "
        "(`exclusive: true`); exact: no other arrangement of what is started makes room"
    )


def test_nothing_comes_to_a_gpu_on_which_an_exclusive_replica_runs() -> None:
    wanted = desired("version: 1\nengines: {a: {model: m, memory: 1GiB}, b: {model: m, memory: 1GiB}}\n")
    runs = Launch("x", "a", 0, {"exclusive": True}, {}, ("GPU-0",), GIB, 8000, "127.0.0.1", Life.ALIVE, 0.0)
    for spec, expected in (({"exclusive": True}, Refusal), ({}, Placement)):
        machine = Observed((gpu(0),), (replace(runs, spec=spec),))
        assert isinstance(place(wanted, machine, requests(wanted)[1:], frozenset())["b/0"], expected)
        assert isinstance(place(wanted, machine, requests(wanted)[1:], frozenset({"x"}))["b/0"], Placement)


def test_ranks_go_where_they_are_linked_best_and_islands_stay_whole() -> None:
    box = tuple(gpu(index) for index in range(4))
    two = "a: {model: m, memory: 50GiB, tensor_parallel_size: 2}"
    assert where(two, *box, links=islands((0, 2), (1, 3), between=Link.SYS)) == {"a/0": [0, 2]}
    assert where(two, gpu(0, used=40), *box[1:], links=islands((0, 2), (1, 3), between=Link.SYS)) == {"a/0": [1, 3]}
    apart = islands((0, 1), (2, 3), between=Link.SYS)
    assert where(f"one: {{model: m, memory: 10GiB}}, {two}", *box, links=apart) == {"one/0": [0], "a/0": [0, 1]}
    singles = "x: {model: m, memory: 50GiB}, y: {model: m, memory: 50GiB}"
    assert where(singles, gpu(0), gpu(1), gpu(2, used=1), gpu(3), links=apart) == {"x/0": [2], "y/0": [3]}


def test_a_link_that_is_required_is_kept_to() -> None:
    box = (gpu(0), gpu(1), gpu(2), gpu(3))
    nvlink = "a: {model: m, memory: 50GiB, tensor_parallel_size: 2, link: nvlink}"
    numa = nvlink.replace("nvlink", "numa")
    assert where(nvlink, *box, links=islands((1, 3))) == {"a/0": [1, 3]}
    assert where(numa, *box, links=islands((1, 3), link=Link.NODE)) == {"a/0": [1, 3]}
    assert where(nvlink, *box, links=islands((1, 3), link=Link.PIX)) == {"a/0": None}
    assert where("a: {model: m, memory: 50GiB, link: nvlink}", *box) == {"a/0": [0]}, "one rank needs no link"
    need = "needs 50.0GiB on 2 GPUs of one model joined by NVLink (`link: nvlink`); "
    free = "GPU 0 has 80.0GiB of 80GiB free; GPU 1 has 80.0GiB of 80GiB free"
    assert (
        placed(nvlink, *box[:2])["a/0"]
        == f"{need}2 have that free, and no two of them are known to be so linked (short of linked GPUs): {free}; exact"
    )
    four = nvlink.replace("size: 2", "size: 4")
    reason = placed(four, *box, links=islands((0, 1), (2, 3), between=Link.NODE))["a/0"]
    assert "4 have that free, 2 of them so linked (short of linked GPUs)" in reason


def test_of_many_gpus_the_best_are_told() -> None:
    box = tuple(gpu(index, used=70 if index < 20 else 60) for index in range(30))
    reason = placed("a: {model: m, memory: 30GiB}", *box)["a/0"]
    assert isinstance(reason, str)
    assert reason.count(" free (un") == 16
    assert "GPU 29 has 20.0GiB" in reason
    assert reason.endswith("; 14 more have no more than these; exact")


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
            (
                "needs 81.0GiB on 1 GPU; none has that free (short of memory: the best is 80.0GiB on GPU 0): GPU 0 has "
                "80.0GiB of 80GiB free; exact"
            ),
        ),
        (
            "a: {model: a, memory: 40GiB, tensor_parallel_size: 2}",
            (gpu(0), gpu(1, used=50)),
            "{}",
            (
                "needs 40.0GiB on 2 GPUs of one model; 1 has that free (short of memory: the best is 2 with at "
                "least 30.0GiB): GPU 0 has 80.0GiB of 80GiB free; "
                "GPU 1 has 30.0GiB of 80GiB free (unmanaged 50.0GiB); exact"
            ),
        ),
        (
            "a: {model: a, memory: 40GiB}",
            (gpu(0, problem="ECC errors"),),
            "{headroom: 1GiB}",
            (
                "needs 40.0GiB on 1 GPU; none has that free (short of GPUs that it may use): GPU 0 takes nothing new "
                "(ECC errors); exact"
            ),
        ),
        (
            "a: {model: a, memory: 40GiB, gpus: [0]}",
            (gpu(0, used=70), gpu(1)),
            "{headroom: 1GiB}",
            (
                "needs 40.0GiB on 1 GPU (`gpus: [0]`); none has that free (short of memory: the best is 9.0GiB on "
                "GPU 0): GPU 0 has 9.0GiB of 80GiB free "
                "(unmanaged 70.0GiB, reserve and headroom 1.0GiB); exact"
            ),
        ),
        (
            "a: {model: a, memory: 30721MiB}",
            (gpu(0, used=50),),
            "{}",
            (
                "needs 30721MiB on 1 GPU; none has that free (short of memory: the best is 30720MiB on GPU 0): GPU 0 "
                "has 30720MiB of 80GiB free (unmanaged 50.0GiB); exact"
            ),
        ),
        (
            "a: {model: a-7b}",
            (gpu(0, used=70),),
            "{}",
            (
                "needs auto = 17.6GiB on 1 GPU; none has that free (short of memory: the best is 10.0GiB on GPU 0): "
                "GPU 0 has 10.0GiB of 80GiB free (unmanaged 70.0GiB); exact"
            ),
        ),
    ],
)
def test_every_refusal_has_its_numbers(engines: str, gpus: tuple[Gpu, ...], host: str, reason: str) -> None:
    assert placed(engines, *gpus, host=host) == {"a/0": reason}


def test_strangers_are_named_largest_first_and_not_all_of_them() -> None:
    found = [GpuProcess(pid, mib, "alice", "python") for pid, mib in ((4, None), (3, 5), (2, 9), (1, 5), (5, 1))]
    machine = Gpu("GPU-0", 0, "H100", "0", 80 * GIB, processes=(*found, GpuProcess(9, 99, launch="ours")))
    assert strangers(machine) == (
        "unmanaged (pid 2 alice python 9MiB, pid 1 alice python 5MiB, pid 3 alice python 5MiB and 2 more)"
    )
    assert strangers(gpu(0)) == "unmanaged"
