"""Simulated GPUs: memory is claimed by living processes, and never more than there is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sage_reconcile.core.diagnosis import diagnose
from sage_reconcile.core.failure import Failure, FailureKind, Started
from sage_reconcile.core.startup_figures import StartupFigures, startup_figures
from sage_reconcile.simulator import gpus
from tests.simulator.running import ROOT, TOTAL_MIB, A, B, Fleet, eventually, on, stat


def test_each_rank_claims_its_gpu(fleet: Fleet, folder: Path) -> None:
    fleet.start("-tp", "2", "--gpu-memory-utilization", "0.29", **on(folder, B, A)).ready()
    assert {uuid: [mib for _, mib in held] for uuid, held in gpus.usage(folder).items()} == {
        A: [TOTAL_MIB * 29 // 100],
        B: [TOTAL_MIB * 29 // 100],
    }


def test_overcommit_is_refused_in_vllms_words(fleet: Fleet, folder: Path) -> None:
    first = fleet.start("--gpu-memory-utilization", "0.6", **on(folder, A)).ready()
    second = fleet.start("--gpu-memory-utilization", "0.6", **on(folder, A))
    assert second.ended() == 1
    words = (
        "ValueError: Free memory on device cuda:0 (31.86/79.65 GiB) on startup is less than desired "
        "GPU memory utilization (0.6, 47.79 GiB). Decrease GPU memory utilization"
    )
    assert words in second.text()
    assert second.text().index(words) < second.text().index("Engine core initialization failed. See root cause above.")
    assert [pid for pid, _ in gpus.usage(folder)[A]] == first.named("VLLM::EngineCor")
    fleet.start("--gpu-memory-utilization", "0.6", **on(folder, B)).ready()
    fleet.start("--gpu-memory-utilization", "0.4", **on(folder, A)).ready()  # to the last MiB


def test_of_many_starts_at_once_only_those_that_fit_go_through(fleet: Fleet, folder: Path) -> None:
    started = [fleet.start("--gpu-memory-utilization", "0.3", **on(folder, A)) for _ in range(6)]
    eventually(lambda: all(one.process.poll() is not None or one.health() == 200 for one in started))
    assert sorted(one.process.poll() is None for one in started) == [False] * 3 + [True] * 3
    assert [mib for _, mib in gpus.usage(folder)[A]] == [int(TOTAL_MIB * 0.3)] * 3


@pytest.mark.parametrize(
    ("seen", "told"),
    [((), "No CUDA GPUs are available"), ((A,), "invalid device ordinal"), ((A, "GPU-c"), "invalid device ordinal")],
)
def test_too_few_gpus_end_the_start(fleet: Fleet, folder: Path, seen: tuple[str, ...], told: str) -> None:
    simulated = fleet.start("-tp", "2", **on(folder, *seen))
    assert simulated.ended() == 1
    assert told in simulated.text()
    assert gpus.usage(folder) == {A: [], B: []}


class Claimant:
    """A process that claims, and then stays until it is killed."""

    CODE = """
import sys, time
from pathlib import Path
from sage_reconcile.simulator import gpus
gpus.claim(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
print("claimed", flush=True)
time.sleep(600)
"""

    def __init__(self, folder: Path, mib: int) -> None:
        words = [sys.executable, "-c", self.CODE, str(folder), A, str(mib)]
        self.process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self.pid = self.process.pid

    def said(self) -> bytes:
        return self.process.stdout.readline()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def test_claims_of_the_dead_do_not_count(folder: Path) -> None:
    with contextlib.closing(Claimant(folder, 60_000)) as claimant:
        assert claimant.said() == b"claimed\n"
        assert gpus.usage(folder) == {A: [(claimant.pid, 60_000)], B: []}
        with pytest.raises(gpus.TooLittleFree) as refused:
            gpus.claim(folder, A, 21_560)
        assert (refused.value.free_mib, refused.value.total_mib) == (21_559, TOTAL_MIB)
        os.kill(claimant.pid, signal.SIGKILL)
        eventually(lambda: stat(claimant.pid)[0] == "Z")  # not waited for yet
        assert gpus.usage(folder) == {A: [], B: []}
    [left] = (folder / A).iterdir()
    gpus.claim(folder, A, TOTAL_MIB)
    assert gpus.usage(folder) == {A: [(os.getpid(), TOTAL_MIB)], B: []}
    assert not left.exists()


def test_claims_are_made_one_after_the_other(folder: Path) -> None:
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with contextlib.closing(Claimant(folder, 1)) as claimant:
        waiting = re.compile(rf"-> FLOCK +ADVISORY +WRITE {claimant.pid} ")
        eventually(lambda: waiting.search(Path("/proc/locks").read_text()))
        assert gpus.usage(folder)[A] == []  # whoever only reads is not held up
        os.close(held)
        assert claimant.said() == b"claimed\n"


def test_claim_of_an_earlier_process_with_the_same_id_does_not_count(folder: Path) -> None:
    (folder / A).mkdir()
    ticks = int(stat(os.getpid())[19])
    (folder / A / f"{os.getpid()}-{ticks - 1}").write_text("70000")
    assert gpus.usage(folder)[A] == []
    (folder / A / f"{os.getpid()}-{ticks}").write_text("7")
    assert gpus.usage(folder)[A] == [(os.getpid(), 7)]


def test_usage_without_an_inventory_is_empty(tmp_path: Path) -> None:
    assert gpus.usage(tmp_path / "nowhere") == {}


def test_unknown_gpu_is_not_claimed(folder: Path) -> None:
    with pytest.raises(gpus.UnknownGpu):
        gpus.claim(folder, "GPU-cccc", 1)


@pytest.mark.parametrize(
    ("devices", "seen"),
    [(None, [A, B]), ("", []), (f"{B},{A}", [B, A]), ("1", [B]), ("GPU-b", [B]), (f"{A},x,{B}", [A]), ("GPU-", [])],
)
def test_visible_devices_are_read_as_cuda_reads_them(folder: Path, devices: str | None, seen: list[str]) -> None:
    assert gpus.visible(folder, devices) == seen


def figures(fleet: Fleet) -> StartupFigures:
    return startup_figures(fleet.all[-1].text().splitlines())


def why(fleet: Fleet, promised_mib: int) -> Failure:
    code = fleet.all[-1].ended()
    return diagnose(code, fleet.all[-1].text().splitlines(), Started({"device": "cuda"}, promised_mib, 1))


def test_a_start_tells_its_figures_in_vllms_words(fleet: Fleet, folder: Path) -> None:
    weights = ("--simulate-weights-mib", "10000")
    budget = TOTAL_MIB * 25 // 100
    fleet.start("--gpu-memory-utilization", "0.25", *weights, "-tp", "2", **on(folder, A, B)).ready()
    cache = budget - 10000 - 256 - 512
    told = figures(fleet)
    near = {"kv_available_mib": cache, "weights_mib": 10000, "consumed_mib": 10000, "requested_mib": budget}
    near |= {"free_at_start_mib": TOTAL_MIB, "cuda_total_mib": TOTAL_MIB, "activation_mib": 256}
    near |= {"cuda_graphs_mib": 512, "cuda_graphs_estimated_mib": 512}
    assert {name: abs(getattr(told, name) - value) <= 5 for name, value in near.items()} == dict.fromkeys(near, True)
    assert told.pin_kv_cache_bytes == (cache - 150) << 20
    assert told.kv_tokens == cache * 8 // 16 * 16

    fleet.start("--gpu-memory-utilization", "0.25", *weights, "--enforce-eager", **on(folder, A)).ready()
    told = figures(fleet)
    assert (told.cuda_graphs_mib, told.cuda_graphs_estimated_mib) == (0, None)
    assert told.kv_tokens == (cache + 512) * 8 // 16 * 16
    assert abs((told.free_at_start_mib or 0) - (TOTAL_MIB - budget)) <= 5

    pinned = ("--kv-cache-memory-bytes", "1G")
    fleet.start("--gpu-memory-utilization", "0.25", *weights, *pinned, **on(folder, B)).ready()
    told = figures(fleet)
    assert (told.kv_tokens, told.kv_available_mib, told.pin_kv_cache_bytes) == (8192, None, None)
    assert [mib for _, mib in gpus.usage(folder)[B]] == [budget, 10000 + 256 + 512 + 1024]


def test_on_the_cpu_the_kv_cache_is_what_vllms_variable_says(fleet: Fleet) -> None:
    fleet.start(VLLM_CPU_KVCACHE_SPACE="3").ready()
    assert (figures(fleet).cpu_kv_cache_mib, figures(fleet).kv_tokens) == (3072, 3072 * 8)
    assert fleet.all[-1].metric("cache_config_info") == 1
    assert f'kv_cache_size_tokens="{3072 * 8}"' in fleet.all[-1].get("/metrics")[1]
    fleet.start().ready()
    assert (figures(fleet).cpu_kv_cache_mib, figures(fleet).kv_available_mib) == (1024, None)


def test_a_kv_cache_that_does_not_hold_one_request_ends_the_start_with_the_number_that_would_do(
    fleet: Fleet, folder: Path
) -> None:
    words = ("--simulate-weights-mib", "10000", "--max-model-len", "16384")
    promised = TOTAL_MIB * 15 // 100
    fleet.start("--gpu-memory-utilization", "0.15", *words, **on(folder, A))
    failure = why(fleet, promised)
    assert failure.kind is FailureKind.KV_CACHE_TOO_SMALL
    need = 10000 + 256 + 512 + 2048
    assert need <= (failure.memory_mib or 0) <= need + 20
    assert failure.context_tokens == (promised - 10768) * 8 // 16 * 16
    share = (failure.memory_mib or 0) / TOTAL_MIB
    fleet.start("--gpu-memory-utilization", f"{share:.6f}", *words, **on(folder, A)).ready()
    less = (need - 1) / TOTAL_MIB
    fleet.start("--gpu-memory-utilization", f"{less:.6f}", *words, **on(folder, B))
    assert why(fleet, need - 1).kind is FailureKind.KV_CACHE_TOO_SMALL
    fits = (*words[:-1], str(failure.context_tokens))
    fleet.start("--gpu-memory-utilization", "0.15", *fits, **on(folder, B)).ready()


def test_weights_that_leave_nothing_end_the_start(fleet: Fleet, folder: Path) -> None:
    fleet.start("--gpu-memory-utilization", "0.1", "--simulate-weights-mib", "10000", **on(folder, A))
    failure = why(fleet, TOTAL_MIB // 10)
    assert failure.kind is FailureKind.NO_KV_CACHE
    assert 10768 <= (failure.memory_mib or 0) <= 10788


def test_of_what_is_free_the_number_that_fits_is_told_and_it_does(fleet: Fleet, folder: Path) -> None:
    fleet.start("--gpu-memory-utilization", "0.6", **on(folder, A)).ready()
    fleet.start("--gpu-memory-utilization", "0.6", **on(folder, A))
    failure = why(fleet, TOTAL_MIB * 6 // 10)
    assert failure.kind is FailureKind.TOO_LITTLE_FREE
    free = TOTAL_MIB - TOTAL_MIB * 6 // 10
    assert free - 20 <= (failure.memory_mib or 0) <= free
    share = (failure.memory_mib or 0) / TOTAL_MIB
    fleet.start("--gpu-memory-utilization", f"{share:.6f}", **on(folder, A)).ready()
