"""Why a replica is where it is, or nowhere, on machines written down as the golden cases write them."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from sage_reconcile.core.explain import Explanation, explain
from sage_reconcile.core.observed import Observed
from sage_reconcile.core.planner import make_plan
from sage_reconcile.core.spec import Desired
from tests.plans.world import NOW, world
from tests.reading import desired

STAYS = "what runs stays where it is: neither its entry nor the user asks for a change"
H100 = "H100 80GiB"
PAIR = """
a: {model: a, memory: 30GiB}
b: {model: b, memory: 30GiB}
new: {model: w, memory: 40GiB, tensor_parallel_size: 2}
"""


def wanted(engines: str, host: str = "{}") -> Desired:
    inner = "\n".join(f"  {line}" for line in engines.strip().splitlines())
    return desired(f"version: 1\nhost: {host}\nengines:\n{inner}\n")


def machine(ran: Desired, gpus: list[Any], launches: str = "[]", **more: Any) -> Observed:
    return world({"gpus": gpus, "launches": yaml.safe_load(launches), **more}, ran, NOW)


def told(file: Desired, seen: Observed, name: str, *, allow_moves: bool = False) -> Explanation:
    plan = make_plan(file, seen, NOW, allow_moves=allow_moves)
    found = explain(file, seen, plan, name)
    assert len(found) == 1
    return found[0]


def verdicts(item: Explanation) -> dict[int, tuple[int, int | None, bool, str]]:
    return {row.gpu.index: (row.free_mib, row.need_mib, row.chosen, row.text) for row in item.verdicts}


def texts(item: Explanation) -> dict[int, str]:
    return {row.gpu.index: row.text for row in item.verdicts}


def test_an_engine_tells_of_each_of_its_replicas_and_a_replica_of_itself() -> None:
    file = wanted("chat: {model: a, memory: 10GiB, replicas: 2}\nother: {model: b, memory: 1GiB, replicas: 2}")
    seen = machine(file, [H100])
    plan = make_plan(file, seen, NOW)
    assert [item.replica for item in explain(file, seen, plan, "chat")] == ["chat/0", "chat/1"]
    assert [item.replica for item in explain(file, seen, plan, "other/1")] == ["other/1"]
    assert [explain(file, seen, plan, name) for name in ("cha", "chat/2", "nobody", "")] == [[]] * 4


def test_what_runs_stays_and_every_gpu_is_told_as_if_it_were_nowhere() -> None:
    file = wanted("chat: {model: a, memory: 30GiB}\nnext: {model: b, memory: 20GiB}", "{headroom: 1GiB, exclude: [2]}")
    seen = machine(
        file,
        [{"gpu": H100, "reserve": "500MiB"}, H100, H100],
        "[{run: chat/0, gpu: 0, port: 8000}, {run: next/0, gpu: 1, port: 8001}]",
    )
    item = told(file, seen, "chat")
    assert (item.outcome, item.why, item.proposal) == ("runs on GPU 0", (STAYS,), None)
    assert verdicts(item) == {
        0: (79 * 1024 - 500, 30 * 1024, True, "chosen, 48.5GiB left beside it"),
        1: (59 * 1024, 30 * 1024, False, "fits, 29.0GiB left beside it"),
        2: (79 * 1024, 30 * 1024, False, "takes nothing new (excluded by `host.exclude`)"),
    }


CHOICES = {
    "a GPU that is begun spares one that is whole": (
        "first: {model: a, memory: 20GiB}\nnew: {model: b, memory: 30GiB}",
        [H100, H100],
        "[{run: first/0, gpu: 1, port: 8000}]",
        {},
        "starts on GPU 1",
        (
            "GPUs on which nothing is yet are left whole for what needs them",
            "of those that would do it leaves least free",
        ),
    ),
    "of two that are begun the tighter": (
        "big: {model: a, memory: 50GiB}\nold: {model: o, memory: 10GiB}\nnew: {model: b, memory: 20GiB}",
        [H100, H100],
        "[{run: big/0, gpu: 1, port: 8000}, {run: old/0, gpu: 0, port: 8001}]",
        {},
        "starts on GPU 1",
        ("of those that would do it leaves least free",),
    ),
    "of equals the first on the bus": (
        "new: {model: b, memory: 20GiB}",
        [{"gpu": H100, "pci": "0000:99"}, {"gpu": H100, "pci": "0000:11"}],
        "[]",
        {},
        "starts on GPU 1",
        ("others would do as well: the order of PCI ids decided",),
    ),
    "its pin": (
        "new: {model: b, memory: 20GiB, gpus: [1]}",
        [H100, H100],
        "[]",
        {},
        "starts on GPU 1",
        ("no other GPU would do",),
    ),
    "linked ranks, though another pair is tighter": (
        PAIR,
        [H100] * 4,
        "[{run: a/0, gpu: 0, port: 8000}, {run: b/0, gpu: 2, port: 8001}]",
        {"links": {"nvlink": [[0, 1], [2, 3]], "sys": [[0, 1, 2, 3]]}},
        "starts on GPUs 0,1",
        (
            "its ranks are joined by NVLINK",
            "others would do too: this arrangement of all that starts links best, or touches fewest GPUs",
        ),
    ),
    "the worst of its links": (
        "new: {model: w, memory: 40GiB, tensor_parallel_size: 3}",
        [H100] * 3,
        "[]",
        {"links": {"nvlink": [[0, 1]], "node": [[0, 1, 2]]}},
        "starts on GPUs 0,1,2",
        ("its ranks are joined by NODE or better", "no other GPU would do for one of its ranks"),
    ),
    "links that are not known": (
        "new: {model: w, memory: 40GiB, tensor_parallel_size: 3}",
        [H100] * 3,
        "[]",
        {"links": {"nvlink": [[0, 1]]}},
        "starts on GPUs 0,1,2",
        ("its ranks are joined by links of which not all are known", "no other GPU would do for one of its ranks"),
    ),
}


@pytest.mark.parametrize("case", CHOICES)
def test_what_starts_tells_the_rule_that_chose(case: str) -> None:
    engines, gpus, launches, more, outcome, rules = CHOICES[case]
    file = wanted(engines)
    item = told(file, machine(file, gpus, launches, **more), "new")
    assert (item.outcome, item.why) == (outcome, ("wanted, and not running", *rules))
    assert [row.gpu.index for row in item.verdicts] == list(range(len(gpus)))


def test_a_start_comes_after_what_is_before_it_and_waits_for_what_is_under_way() -> None:
    file = wanted("chat: {model: a, memory: 10GiB, replicas: 2}\nlate: {model: b, memory: 10GiB}")
    item = told(file, machine(file, [H100]), "chat/1")
    assert item.why[:2] == ("wanted, and not running", "comes after: spawn chat/0")
    seen = machine(file, [H100], "[{run: late/0, gpu: 0, port: 8000, state: loading, age: 9s}]")
    assert "waits for late/0 to be ready" in told(file, seen, "chat/0").why


def test_each_gpu_says_what_keeps_it_off() -> None:
    file = wanted(
        "x: {model: x, memory: 10GiB, exclusive: true}\ns: {model: s, memory: 10GiB, spread: gpu, replicas: 2}\n"
        "t: {model: t, memory: 10GiB, exclusive: true}\np: {model: p, memory: 71GiB, gpus: [0, 1]}\n"
        "m: {model: mystery, memory: auto}"
    )
    seen = machine(
        file,
        [H100, {"gpu": H100, "strangers": ["812 bob train 70GiB"]}, H100],
        "[{run: x/0, gpu: 0, port: 8000}, {run: s/0, gpu: 2, port: 8001}]",
    )
    assert verdicts(told(file, seen, "s/1")) == {
        0: (70 * 1024, 10 * 1024, False, "is for x/0 alone (`exclusive: true`)"),
        1: (10 * 1024, 10 * 1024, True, "chosen, 0.0GiB left beside it"),
        2: (70 * 1024, 10 * 1024, False, "has s/0 already"),
    }
    assert told(file, seen, "s/1").why == ("wanted, and not running", "no other GPU would do")
    item = told(file, seen, "t")
    assert item.outcome == "has no place"
    assert item.why[0].startswith("needs 10.0GiB on 1 GPU with nothing else on it")
    assert texts(item) == {
        0: "is for x/0 alone (`exclusive: true`)",
        1: "is not free of others (s/1 10.0GiB, unmanaged (pid 812 bob train) 70.0GiB)",
        2: "is not free of others (s/0 10.0GiB)",
    }
    assert texts(told(file, seen, "p")) == {
        0: "is for x/0 alone (`exclusive: true`)",
        1: "71.0GiB too little",
        2: "not among its `gpus`",
    }
    item = told(file, seen, "m")
    assert item.why == ("`memory: auto` cannot tell what mystery takes; say it with `memory: 24GiB`",)
    assert verdicts(item)[2] == (70 * 1024, None, False, "its need cannot be told (`memory: auto`)")
    alone = told(file, seen, "x")
    assert texts(alone)[0] == "chosen, 70.0GiB left beside it"


def test_what_starts_alone_keeps_its_gpu_from_the_others_from_the_start() -> None:
    file = wanted("x: {model: x, memory: 10GiB, exclusive: true}\nnew: {model: b, memory: 10GiB}")
    assert texts(told(file, machine(file, [H100, H100]), "new"))[0] == "is for x/0 alone (`exclusive: true`)"


def test_without_a_gpu_there_is_no_gpu_to_tell_of() -> None:
    file = wanted("cpu: {model: c, device: cpu}")
    item = told(file, machine(file, [H100]), "cpu")
    assert (item.outcome, item.why, item.verdicts) == ("starts on the CPU", ("wanted, and not running",), ())
    item = told(file, machine(file, [H100], "[{run: cpu/0, port: 8000}]"), "cpu")
    assert (item.outcome, item.why, item.verdicts) == ("runs on the CPU", (STAYS,), ())


def test_what_runs_on_a_gpu_at_fault_or_with_too_little_room_is_said_to_be_there() -> None:
    file = wanted(
        "wide: {model: w, memory: 40GiB, tensor_parallel_size: 2}\nsmall: {model: s, memory: 30GiB}",
        "{exclude: [2]}",
    )
    lost = {"gpu": H100, "lost": "the GPU is lost"}
    crowded = {"gpu": H100, "strangers": ["812 bob train 60GiB"]}
    item = told(file, machine(file, [lost, crowded], "[{run: wide/0, gpu: [0, 1], port: 8000}]"), "wide")
    assert (item.outcome, item.why) == (
        "runs on GPUs 0,1",
        (STAYS, "it runs on a GPU at fault: GPU 0: the GPU is lost"),
    )
    assert texts(item) == {
        0: "takes nothing new (the GPU is lost), and it is here",
        1: "20.0GiB too little, and it is here",
    }
    item = told(file, machine(file, [H100], "[{run: wide/0, gpu: [0, 9], port: 8000}]"), "wide")
    assert item.outcome == "runs on GPU 0 and GPU-9 (not seen)"
    assert item.why[1:] == ("it runs on a GPU at fault: GPU-9 is not listed any more",)
    item = told(file, machine(file, [H100] * 3, "[{run: small/0, gpu: 2, port: 8000}]"), "small")
    assert texts(item)[2] == "takes nothing new (excluded by `host.exclude`), and it is here"


def test_a_replacement_tells_what_changed_and_one_without_a_place_that_the_old_one_stays() -> None:
    ran = wanted("chat: {model: a, memory: 30GiB}")
    seen = machine(ran, [H100], "[{run: chat/0, gpu: 0, port: 8000}]")
    item = told(wanted("chat: {model: a, memory: 60GiB}"), seen, "chat")
    assert (item.outcome, item.why) == (
        "starts on GPU 0",
        ("changed: memory", "memory: 30GiB -> 60GiB", "comes after: stop chat/0", "no other GPU would do"),
    )
    assert verdicts(item) == {0: (80 * 1024, 60 * 1024, True, "chosen, 20.0GiB left beside it")}
    item = told(wanted("chat: {model: a, memory: 90GiB}"), seen, "chat")
    assert item.outcome == "runs on GPU 0"
    reason = "its entry changed, but its new revision has no place, so what runs stays: needs 90.0GiB on 1 GPU;"
    assert [line.startswith(reason) for line in item.why] == [True]
    assert texts(item) == {0: "10.0GiB too little, and it is here"}


def test_a_place_on_a_declared_gpu_is_no_start() -> None:
    file = wanted("chat: {model: a, memory: 30GiB}\nnext: {model: a, memory: 60GiB}")
    item = told(file, machine(file, [{"gpu": H100, "simulated": True}]), "chat")
    assert (item.outcome, item.why[0]) == ("would be on GPU 0", "wanted, and not running")
    assert item.why[1].startswith("cannot start here: the GPUs of this file are declared, not there")


ONE_TWO_LARGE = (
    "one: {model: a, memory: 30GiB}\ntwo: {model: b, memory: 30GiB}\nlarge: {model: c, memory: 60GiB}\n"
    "huge: {model: d, memory: 79GiB}"
)
OLD = "{run: one/0, gpu: 0, port: 8000, id: old}, {run: two/0, gpu: 1, port: 8001}"
NEW = "run: one/0, gpu: 1, port: 8002, id: new, predecessor: old"


def test_who_would_get_in_by_a_move_has_the_proposal() -> None:
    file = wanted(ONE_TWO_LARGE)
    item = told(file, machine(file, [H100, H100], f"[{OLD}]"), "large")
    assert item.outcome == "has no place"
    assert texts(item) == {0: "10.0GiB too little", 1: "10.0GiB too little"}
    assert item.proposal is not None
    assert (item.proposal.replica, len(item.proposal.moves)) == ("large/0", 1)
    assert told(file, machine(file, [H100, H100], f"[{OLD}]"), "one").proposal is None


def test_who_moves_says_so_before_while_and_after_it_does() -> None:
    file = wanted(ONE_TWO_LARGE)
    item = told(file, machine(file, [H100, H100], f"[{OLD}]"), "one", allow_moves=True)
    first = "starts there first, and ends where it is when it is ready: no downtime"
    assert (item.outcome, item.why[:2]) == ("moves to GPU 1", ("makes room for large/0", first))
    assert verdicts(item)[1] == (50 * 1024, 30 * 1024, True, "chosen, 20.0GiB left beside it")
    item = told(file, machine(file, [H100, H100], f"[{OLD}]"), "large", allow_moves=True)
    assert item.why[1] == "comes after: stop one/0"
    fixed = wanted(ONE_TWO_LARGE.replace("30GiB}", "30GiB, port: 8000}", 1).replace("two: {", "two: {gpus: [1], ", 1))
    item = told(fixed, machine(fixed, [H100, H100], f"[{OLD}]"), "one", allow_moves=True)
    assert item.why[:2] == ("makes room for large/0", "stops where it is, then starts there: downtime")
    item = told(file, machine(file, [H100, H100], f"[{OLD}, {{{NEW}, state: loading, age: 9s}}]"), "one")
    assert (item.outcome, item.why) == (
        "runs on GPU 1",
        ("it is just being moved here: the one before serves there until it is ready here",),
    )
    assert verdicts(item)[0] == (20 * 1024, 30 * 1024, False, "10.0GiB too little")
    item = told(file, machine(file, [H100, H100], f"[{OLD}, {{{NEW}, ready: 1s}}]"), "one")
    assert item.why == ("it is just being moved here: the one before ends now",)
    item = told(file, machine(file, [H100, H100], f"[{OLD.replace('0, port', '1, port').replace('old', 'o')}]"), "one")
    assert item.why == (STAYS,)


def test_who_gives_way_says_to_whom() -> None:
    file = wanted("low: {model: a, memory: 60GiB}\ntop: {model: b, memory: 60GiB, priority: 1, preemption: lower}")
    item = told(file, machine(file, [H100], "[{run: low/0, gpu: 0, port: 8000}]"), "low")
    assert item.outcome == "has no place"
    assert item.why[0] == "what runs of it stops: gives way to top/0 (priority 1, `preemption: lower`)"
    assert item.why[1].startswith("needs 60.0GiB on 1 GPU; none has that free")
    assert verdicts(item) == {0: (20 * 1024, 60 * 1024, False, "40.0GiB too little")}
    item = told(file, machine(file, [H100], "[{run: low/0, gpu: 0, port: 8000}]"), "top")
    assert verdicts(item) == {0: (80 * 1024, 60 * 1024, True, "chosen, 20.0GiB left beside it")}


def test_what_is_stopping_counts_as_gone() -> None:
    file = wanted("new: {model: b, memory: 30GiB}\nold: {model: o, memory: 60GiB, replicas: 0}")
    launches = "[{run: old/0, gpu: 0, port: 8000, stopping: 1s, why: REMOVED}]"
    item = told(file, machine(file, [H100], launches), "new")
    assert item.why[1:] == ("waits for old/0 to end", "no other GPU would do")
    assert verdicts(item) == {0: (80 * 1024, 30 * 1024, True, "chosen, 50.0GiB left beside it")}
