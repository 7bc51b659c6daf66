"""The life of a replica, told as stories."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sage_reconcile.core.failure import Failure, FailureKind
from sage_reconcile.core.lifecycle import (
    Phase,
    Retry,
    StopCause,
    after,
    delay_s,
    failed,
    failures,
    fault_note,
    gpu_faults,
    how_it_failed,
    next_try,
    phase,
    stalled,
    stop_deadline,
)
from sage_reconcile.core.observed import Exit, Gpu, Launch, Life, Observed

NOW = 10_000.0
BORN = Launch(
    id="a",
    engine_name="chat",
    index=0,
    spec={},
    secret_marks={},
    gpus=("GPU-0",),
    memory_mib=1024,
    port=8000,
    bind="127.0.0.1",
    life=Life.INTENT,
    created_at=NOW,
)
LOADING = replace(BORN, life=Life.ALIVE)
READY = replace(LOADING, ready=True, ready_at=NOW + 60)


def ended(launch: Launch, at: float | None, code: int | None = 1, **fields: object) -> Launch:
    return replace(launch, life=Life.EXITED, ready=False, exit=Exit(code, at), **fields)  # type: ignore[arg-type]


def test_from_wanted_to_serving_and_away() -> None:
    assert phase(None, wanted=True, now=NOW) is Phase.PENDING
    assert phase(BORN, wanted=True, now=NOW) is Phase.STARTING
    assert phase(LOADING, wanted=True, now=NOW) is Phase.STARTING
    assert phase(READY, wanted=True, now=NOW) is Phase.READY
    assert phase(replace(READY, ready=False), wanted=True, now=NOW) is Phase.DEGRADED
    stopping = replace(READY, stopping_since=NOW + 90, stop_cause=StopCause.REMOVED)
    assert phase(stopping, wanted=False, now=NOW + 90) is Phase.STOPPING
    assert phase(replace(stopping, life=Life.LEFTOVER), wanted=False, now=NOW + 95) is Phase.STOPPING
    assert phase(ended(stopping, NOW + 99, 0), wanted=False, now=NOW + 99) is None
    assert phase(None, wanted=False, now=NOW) is None


def test_a_ready_replica_on_a_gpu_at_fault_is_degraded_and_no_other_phase_changes() -> None:
    assert phase(READY, wanted=True, now=NOW, faults="GPU 0: lost") is Phase.DEGRADED
    assert phase(READY, wanted=False, now=NOW, faults="GPU 0: lost") is Phase.DEGRADED
    assert phase(LOADING, wanted=True, now=NOW, faults="GPU 0: lost") is Phase.STARTING
    assert phase(replace(READY, stopping_since=NOW), wanted=True, now=NOW, faults="GPU 0: lost") is Phase.STOPPING
    assert phase(None, wanted=True, now=NOW, faults="GPU 0: lost") is Phase.PENDING


def test_the_faults_of_every_gpu_of_a_launch_are_told_and_of_no_other() -> None:
    gpus = (
        Gpu("GPU-0", 4, "H100", "", 1, problem="lost", faulty=True),
        Gpu("GPU-1", 1, "H100", "", 1, problem="prohibited"),
        Gpu("GPU-2", 2, "H100", "", 1, problem="2 errors", faulty=True),
    )
    on = replace(READY, gpus=("GPU-0", "GPU-1", "GPU-9"))
    told = "GPU 4: lost; GPU-9 is not listed any more"
    assert gpu_faults(on, Observed(gpus)) == told
    assert gpu_faults(on, Observed((), gpu_note="no driver")) == "; ".join(
        f"{uuid} is not listed any more (no driver)" for uuid in on.gpus
    )
    nameless = Gpu("unknown-7", 7, "unknown GPU", "", 0, problem="lost too", faulty=True)
    gone = replace(READY, gpus=("GPU-9",))
    assert gpu_faults(gone, Observed((*gpus, nameless))) == "GPU-9 is not listed any more (GPU 7: lost too)"
    assert gpu_faults(replace(READY, gpus=("GPU-1",)), Observed(gpus)) == ""
    assert gpu_faults(replace(READY, gpus=()), Observed(gpus)) == ""
    assert fault_note(on, Observed(gpus)) == f"chat/0: runs on a GPU at fault: {told}"
    assert fault_note(ended(on, NOW), Observed(gpus)) == ""


def test_a_replica_that_cannot_be_proven_ours_is_unknown_wanted_or_not() -> None:
    for wanted in (True, False):
        assert phase(replace(READY, life=Life.UNPROVEN), wanted=wanted, now=NOW) is Phase.UNKNOWN


def test_a_start_that_fails_is_in_back_off_until_its_next_try() -> None:
    launch = ended(LOADING, NOW + 30)
    assert phase(launch, wanted=True, now=NOW + 37.9) is Phase.BACKOFF
    assert phase(launch, wanted=True, now=NOW + 40) is Phase.PENDING
    assert phase(launch, wanted=False, now=NOW + 31) is None


def test_what_was_asked_to_stop_did_not_fail() -> None:
    launch = ended(READY, NOW + 99, 0, stop_cause=StopCause.CHANGED)
    assert not failed(launch)
    assert failures(replace(launch, failures=7)) == 0
    assert phase(launch, wanted=True, now=NOW + 99) is Phase.PENDING


@pytest.mark.parametrize("code", [0, 1, 137, None])
def test_every_end_that_nobody_asked_for_is_a_failure(code: int | None) -> None:
    launch = ended(READY, NOW + 99, code)
    assert failed(launch)
    assert failures(launch) == 1


def test_a_start_that_takes_too_long_is_a_failure_although_we_ended_it() -> None:
    assert failed(ended(LOADING, NOW + 99, 137, stop_cause=StopCause.STARTUP_TIMEOUT))


def test_starts_that_fail_again_and_again_wait_ten_seconds_doubling_to_five_minutes() -> None:
    waits = [delay_s(count, was_ready=False) for count in range(1, 9)]
    assert waits == [10, 20, 40, 80, 160, 300, 300, 300]
    assert delay_s(10_000, was_ready=False) == 300


def test_a_replica_that_served_is_tried_at_once_the_first_time() -> None:
    assert [delay_s(count, was_ready=True) for count in range(1, 8)] == [0, 10, 20, 40, 80, 160, 300]


def test_the_story_of_a_replica_that_never_starts() -> None:
    """Each launch is started with the failures before it, as the planner does."""
    before, waits, now = 0, [], NOW
    for _ in range(7):
        launch = ended(replace(LOADING, created_at=now, failures=before), now + 5)
        waits.append(next_try(launch, now + 5) - (now + 5))
        before, now = failures(launch), next_try(launch, now + 5)
    for wait, longest in zip(waits, (10, 20, 40, 80, 160, 300, 300), strict=True):
        assert 0.8 * longest <= wait <= longest


def test_what_failed_together_is_not_tried_again_together_and_each_look_says_the_same() -> None:
    launches = [ended(replace(LOADING, id=f"{number:x}"), NOW) for number in range(200)]
    times = [next_try(launch, NOW) for launch in launches]
    assert times == [next_try(launch, NOW + 3) for launch in launches]
    assert len(set(times)) == 200
    assert min(times) < NOW + 8.1
    assert NOW + 9.9 < max(times) <= NOW + 10
    again = replace(launches[0], created_at=NOW - 1)
    assert next_try(again, NOW) != times[0], "its place among the others is not for ever"


def test_ten_steady_minutes_forget_the_failures_before() -> None:
    launch = replace(READY, failures=5)
    assert failures(ended(launch, NOW + 60 + 599.9)) == 6
    assert failures(ended(launch, NOW + 60 + 600)) == 1
    assert next_try(ended(launch, NOW + 60 + 600), NOW + 660) == NOW + 660


def test_the_wait_counts_from_the_end_not_from_when_it_was_seen() -> None:
    launch = ended(LOADING, NOW + 30)
    assert NOW + 38 <= next_try(launch, NOW + 31) == next_try(launch, NOW + 39) <= NOW + 40


def test_an_end_nobody_saw_counts_from_the_start() -> None:
    assert NOW + 8 <= next_try(ended(LOADING, None, None), NOW + 3600) <= NOW + 10
    assert NOW + 8 <= next_try(replace(LOADING, life=Life.EXITED), NOW + 3600) <= NOW + 10


def test_what_has_not_ended_yet_waits_from_now_on() -> None:
    assert NOW + 3608 <= next_try(LOADING, NOW + 3600) <= NOW + 3610


def test_a_clock_set_back_by_years_does_not_put_the_next_try_off() -> None:
    launch = ended(LOADING, NOW)
    for now in (NOW - 3600, NOW - 3e7):
        assert next_try(launch, now) <= now
        assert phase(launch, wanted=True, now=now) is Phase.PENDING


def test_a_clock_set_back_a_little_still_waits_but_never_twice_its_delay() -> None:
    launch = ended(LOADING, NOW)
    assert NOW + 8 <= next_try(launch, NOW - 5) <= NOW + 10
    assert next_try(launch, NOW - 11) == NOW - 11


def test_a_stopping_replica_has_its_full_time_if_it_ever_served() -> None:
    assert stop_deadline(replace(READY, stopping_since=NOW + 60), 30) == NOW + 90
    assert stop_deadline(replace(READY, ready=False, stopping_since=NOW + 70), 30) == NOW + 100


def test_a_replica_that_loads_loses_sigterm_and_gets_five_seconds() -> None:
    loading = replace(LOADING, stopping_since=NOW)
    assert stop_deadline(loading, 30) == NOW + 5
    assert stop_deadline(loading, 2) == NOW + 2
    got_ready_all_the_same = replace(READY, stopping_since=NOW + 59)
    assert stop_deadline(got_ready_all_the_same, 30) == NOW + 64


def test_how_it_failed_names_the_class_where_it_is_known() -> None:
    for kind, text in ((FailureKind.WRONG_FLAG, "exit 1, wrong flag"), (FailureKind.UNKNOWN, "exit 1")):
        assert how_it_failed(ended(LOADING, NOW, failure=Failure(kind))) == text
    assert how_it_failed(ended(LOADING, NOW)) == "exit 1"
    killed = ended(LOADING, NOW, 137, failure=Failure(FailureKind.KILLED))
    assert how_it_failed(killed) == "killed by signal 9"


FLAG = Failure(FailureKind.WRONG_FLAG, "unrecognized arguments: --x", "this vLLM has no flag `x`")
GPUS = (Gpu("GPU-0", 0, "H100", "", 1),)
OTHERS = (Gpu("GPU-1", 1, "H100", "", 1),)


def what_follows(
    last: Launch, gpus: tuple[Gpu, ...] = GPUS, mib: int = 1024, *, edited: bool = False, asked: bool = False
) -> Retry:
    return after(last, gpus, mib, NOW, edited=edited, asked=asked)


def test_what_cannot_get_better_by_itself_stalls_at_once_for_ever_and_on_every_gpu() -> None:
    bad = ended(LOADING, NOW, 2, failure=FLAG)
    for now in (NOW, NOW + 1e6):
        assert phase(bad, wanted=True, now=now) is Phase.STALLED
    for gpus in (GPUS, OTHERS, ()):
        assert what_follows(bad, gpus) == Retry("it failed (exit 2, wrong flag)", None, 1, 1, stalled=True)


def test_an_edit_of_anything_in_its_entry_or_a_person_releases_what_stalled() -> None:
    bad = ended(LOADING, NOW, 2, failure=FLAG)
    assert what_follows(bad, edited=True) == Retry("it failed (exit 2, wrong flag)", None, 1)
    assert what_follows(bad, asked=True) == Retry("it failed (exit 2, wrong flag)", None, 1, 1)
    released = replace(bad, released=True)
    assert what_follows(released) == Retry("it failed (exit 2, wrong flag)", None, 1, 1)
    assert phase(released, wanted=True, now=NOW) is Phase.PENDING


def test_what_may_get_better_or_has_been_ready_or_was_asked_to_end_does_not_stall() -> None:
    may = replace(FLAG, can_recover=True)
    assert not stalled(ended(LOADING, NOW, failure=may))
    assert not stalled(ended(LOADING, NOW))
    assert not stalled(ended(READY, NOW, failure=FLAG))
    assert not stalled(ended(LOADING, NOW, failure=FLAG, stop_cause=StopCause.REMOVED))
    assert not stalled(replace(LOADING, failure=FLAG))
    assert what_follows(ended(LOADING, NOW, failures=40, failure=may)).not_before


def test_back_off_belongs_to_its_gpus() -> None:
    late = ended(LOADING, NOW, failures=4, restarts=4)
    assert what_follows(late).failures == 5
    assert what_follows(late).not_before == next_try(late, NOW)
    assert what_follows(late, OTHERS) == Retry("it failed (exit 1)", None, 5)
    assert what_follows(late, (*GPUS, *OTHERS)).not_before is None
    assert what_follows(late, asked=True) == Retry("it failed (exit 1)", None, 5, 5)


def test_what_wanted_memory_is_tried_again_with_more_and_a_wrong_flag_is_not() -> None:
    small = ended(LOADING, NOW, failure=Failure(FailureKind.KV_CACHE_TOO_SMALL))
    assert what_follows(small).stalled
    assert what_follows(small, mib=1023).stalled
    assert what_follows(small, mib=1025) == Retry("it failed (exit 1, KV cache too small)", None, 1)
    assert what_follows(ended(LOADING, NOW, failure=FLAG), mib=1025).stalled


def test_ends_are_told_as_shells_tell_them() -> None:
    assert [Exit(code, None).text() for code in (0, 1, 137, None)] == [
        *("exit 0", "exit 1", "killed by signal 9", "exit status unknown")
    ]
