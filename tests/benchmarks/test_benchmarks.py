"""The benchmarks run and yield numbers. How large those are is for their table to show, not for a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.benchmarks import cold_diff, core_pass, edit_to_exec, idle, moves, openb, placement, sizing
from tests.benchmarks.figures import Figure, p99, table


@pytest.mark.parametrize(
    "measure",
    [
        lambda: core_pass.measure(counts=(3,), rounds=2),
        lambda: edit_to_exec.measure(edits=1, count=1, beside=False),
        lambda: cold_diff.measure(rounds=1, count=1, beside=False),
        lambda: placement.measure(boxes=2, checked=0, count=5),
        lambda: moves.measure(boxes=30),
        lambda: idle.measure(seconds=0.2, count=1, beside=False, quiet_s=0),
    ],
    ids=["core_pass", "edit_to_exec", "cold_diff", "placement", "moves", "idle"],
)
def test_a_benchmark_yields_numbers(measure: Callable[[], list[Figure]]) -> None:
    figures = measure()
    assert figures
    assert all(figure.measured > 0 for figure in figures), table(figures)


def test_the_table_says_what_misses_its_target() -> None:
    text = table(
        [Figure("one", 5.0, "ms", 10.0), Figure("two", 15.0, "ms", 10.0, "other 3 ms"), Figure("three", 1, "/s")]
    )
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["one", "5", "ms", "<", "10", "ok"],
        ["two", "15", "ms", "<", "10", "MISSED", "other", "3", "ms"],
        ["three", "1", "/s"],
    ]


def test_p99_of_few_values_is_the_largest() -> None:
    assert p99([3.0, 1.0, 2.0]) == 3.0
    assert p99(list(range(1, 201))) == 198


def test_a_full_box_is_full_and_a_crowded_one_asks_for_more_than_there_is() -> None:
    for seed in range(5):
        assert placement.full(seed, 8).share(range(len(placement.full(seed, 8).items))) == 100
        assert placement.crowded(seed, 8).share(range(len(placement.crowded(seed, 8).items))) >= 120


def test_what_is_measured_of_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "solver", lambda: None)
    names = [figure.what for figure in placement.measure(boxes=1, checked=1, count=3)]
    assert "full box, 8 GPUs: gap to the best known" in names
    assert "crowded box, 8 GPUs: gap to the best known" not in names, "that takes the solver"
    assert [name for name in names if name.startswith("3 replicas")] == [
        "3 replicas on 3 GPUs, all fit",
        "3 replicas on 2 GPUs, crowded",
    ]


def test_the_replay_of_a_small_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two nodes of two GPUs, and tasks that ask for half a GPU, a whole one, and two."""
    (tmp_path / "openb_node_list_gpu_node.csv").write_text(
        "sn,cpu_milli,memory_mib,gpu,model\na,64000,262144,2,T4\nb,64000,262144,2,P100\n"
    )
    tasks = [("0", 1, 500, ""), ("1", 1, 1000, "T4"), ("2", 2, 1000, "P100|T4"), ("3", 1, 500, "")]
    lines = [f"pod-{name},4000,8192,{gpus},{milli},{models}" for name, gpus, milli, models in tasks]
    (tmp_path / "openb_pod_list_default.csv").write_text(
        "\n".join(["name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec", *lines]) + "\n"
    )
    (tmp_path / "expected_unallocated_percent.csv").write_text("trace,policy,at100\ndefault,FGD,4.77\nother,FGD,1\n")
    openb.run(tmp_path, "default", [1, 2])
    heading, *told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert heading[0] == "default:"
    assert [words[0] for words in told] == ["ours", "best", "random", "authors'"]
    for words in told[:3]:
        assert words[-1] == "decisions/s"
        mean, *each = [float(word.strip("()")) for word in words if "." in word]
        assert mean == pytest.approx(sum(each) / 2, abs=0.01)
        assert all(0 <= share < 100 for share in each)
    assert told[3] == ["authors'", "FGD", "4.77"]


def test_openb_wastes_what_each_task_cannot_use() -> None:
    half, whole = (openb.Task(4000, 0, 1, milli, frozenset()) for milli in (500, 1000))
    wide = openb.Task(8000, 0, 2, 1000, frozenset({"T4"}))
    waste = openb.Waste([half, whole, wide, openb.Task(1000, 0, 0, 1000, frozenset())])
    assert waste.total == 3
    assert waste.of("T4", 8000, [1000, 1000]) == 0
    assert waste.of("P100", 8000, [1000, 1000]) == 2000  # the model is not one of the wide task's
    assert waste.of("T4", 7999, [1000, 1000]) == 2000  # too little CPU for the wide one
    assert waste.of("T4", 3999, [1000, 1000]) == 6000  # and for any
    assert waste.of("T4", 8000, [1000, 600]) == 600 + 1600  # the whole one cannot use a part, the wide one nothing
    assert waste.of("T4", 8000, [400, 0]) == 1200


def test_openb_opens_no_second_node_while_the_first_serves() -> None:
    tasks = [openb.Task(4000, 8192, 1, milli, frozenset()) for milli in (500, 1000)]
    nodes = [openb.Node("T4", 64000, 262144, [1000]), openb.Node("T4", 64000, 262144, [500, 1000])]
    score = openb.by_waste(openb.Waste(tasks))
    scored = [score(node, tasks[0]) for node in nodes]
    assert all(scored)
    assert [found[1] for found in scored if found] == [(0,), (0,)]  # inside a node: the GPU that is begun
    scores = openb.Scores(nodes, score, fixed=True)
    assert scores.best(0, tasks[0]) == 1
    roomy, tight = (openb.Node("T4", 64000, memory, [1000]) for memory in (262144, 131072))
    assert openb.Scores([roomy, tight], score, fixed=True).best(0, tasks[0]) == 1  # equal waste: the one less left of


def test_what_is_said_of_measured_starts(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(__file__).parents[1] / "core/measured"
    assert sizing.main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["3", "Llama-3.3-70B-Instruct-fp8-dynamic"] for line in lines)
    assert any(line.startswith("weights: mean 0.") for line in lines)
    assert any(line.startswith("KV tokens within 0.1%: 16 of 17; of one stage: 16 of 16") for line in lines)
    assert sizing.main([]) == 64
