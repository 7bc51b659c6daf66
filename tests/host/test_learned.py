"""What is kept of starts, over damage, other versions and readers; and that no secret is."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sage_reconcile.core.failure import Failure, FailureKind
from sage_reconcile.core.measured import Measured, counting_marks, find, subject
from sage_reconcile.core.observed import Gpu, GpuProcess
from sage_reconcile.core.resolve import secret_marks
from sage_reconcile.core.spec import Engine
from sage_reconcile.host import learned
from sage_reconcile.host.learned import MOST, Learned, Seen, failure_data, held_mib, read_failure, why_it_failed
from sage_reconcile.host.metrics import EngineMetrics
from sage_reconcile.host.records import Record, Records
from tests.host.world import record
from tests.reading import desired

LOG = """
(APIServer pid=1) INFO 11-25 09:17:02 [api_utils.py:347]  ▄▄ ▄█ █     █     █ ▀▄▀ █  version 0.32.0
(EngineCore pid=2) INFO 11-25 09:17:12 [gpu_model_runner.py:5150] Model loading took 14.99 GiB memory and 9.1 seconds
(EngineCore pid=2) INFO 11-25 09:17:22 [gpu_worker.py:760] Available KV cache memory: 4.0 GiB
(EngineCore pid=2) INFO 11-25 09:17:22 [kv_cache_utils.py:2327] GPU KV cache size: 32,768 tokens, Maximum concurrency
(EngineCore pid=2) INFO 11-25 09:17:32 [gpu_worker.py:1034] Replace gpu_memory_utilization config with \
`--kv-cache-memory=4137680896` (3.85 GiB) to fit into requested memory, or `--kv-cache-memory=9` to fully utilize.
"""
PINNED = LOG[: LOG.index("(EngineCore pid=2) INFO 11-25 09:17:22 [gpu")] + (
    "(EngineCore pid=2) INFO 11-25 09:17:22 [kv_cache_utils.py:2327] GPU KV cache size: 31,744 tokens, Maximum"
)
SPEC = {"model": "org/chat", "runtime": "vllm", "device": "cuda", "args": {}, "env": {}}
KEY = f"0.32.0 {subject(SPEC, 'H100')}"


def gpu(uuid: str = "GPU-a", *held: tuple[str, int | None], name: str = "H100") -> Gpu:
    processes = tuple(GpuProcess(number, mib, launch=launch) for number, (launch, mib) in enumerate(held, 1))
    return Gpu(uuid, 0, name, "", 81920, processes=processes)


class Kept:
    """A store, and launches whose starts it learns from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "measured.json"
        self.store = Learned(self.path)

    def launch(self, launch_id: str = "1a", log: str = LOG, **values: Any) -> Record:
        path = self.folder / f"{launch_id}.log"
        path.write_text(log, encoding="utf-8")
        fields = {"spec": SPEC, "gpus": ["GPU-a"], "memory_mib": 20000, "log_path": str(path)}
        return record(launch_id, **{**fields, **values})

    def ready(self, launch: Record, held: int | None = 19000, **seen: Any) -> None:
        gpus = [gpu("GPU-a", (launch.id, held))] if held is not None else [gpu()]
        self.store.take_in(launch, Seen(**{"now": 1060.0, "gpus": gpus, "ready": True, **seen}))

    def only(self) -> Measured:
        [entry] = Learned(self.path).read().values()
        return entry


@pytest.fixture(name="kept")
def _kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path)


def test_what_a_start_took_is_there_for_whoever_reads_next(kept: Kept) -> None:
    launch = kept.launch()
    kept.ready(launch, metrics=EngineMetrics(cache_configs=({"num_gpu_blocks": "2048", "block_size": "16"},)))
    entry = kept.only()
    assert entry.key == KEY
    assert (entry.promised_mib, entry.held_mib, entry.starts) == (20000, 19000, 1)
    assert (entry.kv_tokens, entry.kv_blocks, entry.block_tokens) == (32768, 2048, 16)
    assert (entry.at, entry.startup_s) == (1060.0, 60.0)
    assert (entry.figures.weights_mib, entry.figures.pin_kv_cache_bytes) == (15350, 4137680896)
    assert launch.kv_tokens == 32768
    assert find(kept.store.read(), SPEC, "H100") == entry


def test_it_is_read_again_only_when_it_has_changed(kept: Kept) -> None:
    kept.ready(kept.launch())
    reader = Learned(kept.path)
    first = reader.read()
    assert reader.read() is first
    second = kept.launch("2b", memory_mib=30000)
    kept.ready(second)
    assert reader.read()[KEY].promised_mib == 30000
    kept.path.unlink()
    assert reader.read() == {}


def test_a_replica_that_grows_is_followed_and_small_steps_are_not_written(kept: Kept) -> None:
    launch = kept.launch()
    kept.ready(launch)
    launch.ready_at = 1060.0
    before = kept.path.stat().st_ino
    kept.ready(launch, 19015)
    assert kept.path.stat().st_ino == before
    kept.ready(launch, 19016)
    assert kept.only().held_mib == 19016
    kept.ready(launch, 18000)
    assert kept.only().held_mib == 19016
    assert kept.only().starts == 1


def test_replicas_with_one_promise_count_with_the_most(kept: Kept) -> None:
    kept.ready(kept.launch("1a"), 19000)
    kept.ready(kept.launch("2b"), 18000)
    assert (kept.only().held_mib, kept.only().starts) == (19000, 2)
    kept.ready(kept.launch("3c"), None)
    assert (kept.only().held_mib, kept.only().starts) == (19000, 3)
    kept.ready(kept.launch("4d", memory_mib=16000), 15500)
    assert (kept.only().held_mib, kept.only().promised_mib) == (15500, 16000)


def test_a_start_that_measures_less_forgets_nothing_that_still_holds(kept: Kept) -> None:
    kept.ready(kept.launch("1a"))
    kept.ready(kept.launch("2b", PINNED))
    figures = kept.only().figures
    assert (figures.kv_tokens, figures.pin_kv_cache_bytes, figures.kv_available_mib) == (31744, 4137680896, 4096)
    kept.ready(kept.launch("3c", PINNED, memory_mib=30000))
    figures = kept.only().figures
    assert (figures.weights_mib, figures.pin_kv_cache_bytes, figures.kv_available_mib) == (15350, None, None)


def test_the_tokens_come_from_the_metrics_where_the_log_has_none(kept: Kept) -> None:
    launch = kept.launch(log="nothing")
    kept.ready(launch, metrics=EngineMetrics(cache_configs=({"num_gpu_blocks": "10", "block_size": "16"},)))
    assert kept.only().kv_tokens == launch.kv_tokens == 160
    assert kept.only().vllm_version == ""


def test_of_what_is_not_vllm_or_on_a_gpu_that_is_gone_nothing_is_learned(kept: Kept) -> None:
    kept.ready(kept.launch(spec={**SPEC, "runtime": "command"}))
    kept.ready(kept.launch(gpus=["GPU-lost"]))
    assert not kept.path.exists()
    kept.ready(kept.launch(gpus=[], spec={**SPEC, "device": "cpu"}), None)
    assert kept.only().held_mib is None


def test_a_start_that_wanted_more_leaves_the_number_until_one_gets_ready(kept: Kept) -> None:
    wanted = Failure(FailureKind.KV_CACHE_TOO_SMALL, memory_mib=23000)
    launch = kept.launch("1a")
    kept.store.take_in(launch, Seen(1010.0, [gpu()], failure=wanted))
    assert (kept.only().needed_mib, kept.only().starts, kept.only().promised_mib) == (23000, 0, 20000)
    kept.ready(kept.launch("2b", memory_mib=23000))
    assert (kept.only().needed_mib, kept.only().starts) == (None, 1)
    kept.store.take_in(kept.launch("3c"), Seen(1099.0, [gpu()], failure=wanted))
    assert (kept.only().needed_mib, kept.only().promised_mib, kept.only().starts) == (23000, 23000, 1)


@pytest.mark.parametrize("memory_mib", [None, 19000, 20000])
def test_a_failure_that_more_would_not_cure_leaves_none(kept: Kept, memory_mib: int | None) -> None:
    kept.store.take_in(
        kept.launch(), Seen(1.0, [gpu()], failure=Failure(FailureKind.TOO_LITTLE_FREE, memory_mib=memory_mib))
    )
    assert not kept.path.exists()


def test_a_failure_that_is_on_record_is_not_learned_twice(kept: Kept) -> None:
    seen = Seen(1.0, [gpu()], failure=Failure(FailureKind.KV_CACHE_TOO_SMALL, memory_mib=23000))
    kept.store.take_in(kept.launch(ended=True), seen)
    assert not kept.path.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        '{"entries": 3}',
        '{"entries": [3, null, {}]}',
        "[" * 100000,
        '{"entries": [{"subject": 7}]}',
    ],
)
def test_a_damaged_file_is_empty_and_is_written_anew(kept: Kept, text: str) -> None:
    kept.path.write_text(text)
    assert Learned(kept.path).read() == {}
    kept.ready(kept.launch())
    assert kept.only().starts == 1


def test_bytes_that_are_no_text_are_empty(kept: Kept) -> None:
    kept.path.write_bytes(b"\xff\xfe\x00")
    assert kept.store.read() == {}


def test_of_another_version_what_can_be_understood_is(kept: Kept) -> None:
    kept.ready(kept.launch())
    data = json.loads(kept.path.read_text())
    [entry] = data["entries"]
    newer = {**entry, "new": {"a": 1}, "figures": {**entry["figures"], "new": 1}}
    strange = {**entry, "subject": "x", "held_mib": "much"}
    older = {"subject": "y"}
    odd = {**entry, "subject": "z", "figures": {**entry["figures"], "weights_mib": True}}
    kept.path.write_text(json.dumps({"version": 9, "entries": [newer, strange, older, odd]}))
    read = {item.subject: item for item in Learned(kept.path).read().values()}
    assert read.keys() == {subject(SPEC, "H100"), "y", "z"}
    assert read[subject(SPEC, "H100")].figures.weights_mib == 15350
    assert read["z"].figures.weights_mib is None


def test_only_the_latest_kinds_are_kept(kept: Kept) -> None:
    kept.ready(kept.launch())
    [entry] = json.loads(kept.path.read_text())["entries"]
    many = [{**entry, "subject": str(number), "at": float(number)} for number in range(MOST + 3)]
    kept.path.write_text(json.dumps({"version": 1, "entries": many}))
    kept.ready(kept.launch("2b"), now=1e6)
    read = Learned(kept.path).read()
    assert len(read) == MOST
    assert KEY in read
    assert "0.32.0 4" in read
    assert "0.32.0 3" not in read


def test_a_reader_sees_the_old_or_the_new_and_nothing_else(kept: Kept) -> None:
    kept.ready(kept.launch())
    stop, seen = threading.Event(), set()

    def read() -> None:
        while not stop.is_set():
            entry = Learned(kept.path).read().get(KEY)
            seen.add(entry.starts if entry else None)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(60):
        kept.ready(kept.launch(f"{number:x}"))
    stop.set()
    reader.join()
    assert None not in seen
    assert kept.only().starts == 61
    assert kept.path.stat().st_mode & 0o777 == 0o600


def test_a_full_disk_stops_nobody(kept: Kept, tmp_path: Path) -> None:
    store = Learned(tmp_path / "missing" / "measured.json")
    launch = kept.launch()
    store.take_in(launch, Seen(1060.0, [gpu()], ready=True))
    assert not (tmp_path / "missing").exists()


def test_the_most_held_on_one_gpu_counts() -> None:
    gpus = [
        gpu("GPU-a", ("1a", 5), ("1a", 6), ("2b", 100)),
        gpu("GPU-b", ("1a", 12)),
        gpu("GPU-c", ("2b", None), ("2b", 9)),
    ]
    assert held_mib("1a", gpus) == 12
    assert held_mib("2b", gpus) == 100  # of a GPU where one is not told, nothing is known
    assert held_mib("3c", gpus) is None
    assert held_mib("4d", [gpu("GPU-a", ("4d", None), ("4d", 9))]) is None


def engine(more: str, **environ: str) -> Engine:
    text = f"version: 1\nhost: {{gpus: none}}\nengines:\n  chat:\n    model: org/chat\n{more}"
    [entry] = desired(text, environ).engines
    return entry


HIDING = "    args: {max-num-seqs: '${SEQS}', quantization: '${QUANT}'}\n    env: {HF_TOKEN: '${TOKEN}', FLAG: '1'}\n"
HIDDEN = {"SEQS": "64", "QUANT": "wonder-quant", "TOKEN": "hf_abcdef123456"}


def hiding(kept: Kept, log: str, launch_id: str = "1a", **environ: str) -> tuple[Record, Engine]:
    entry = engine(HIDING, **{**HIDDEN, **environ})
    marks = secret_marks(entry.secrets, launch_id)
    return kept.launch(launch_id, log, spec=dict(entry.record), secret_marks=marks), entry


def test_hidden_values_are_marked_and_a_changed_one_makes_another(kept: Kept) -> None:
    first, entry = hiding(kept, LOG)
    kept.ready(first, engine=entry)
    again, entry = hiding(kept, LOG, "2b")
    kept.ready(again, engine=entry)
    assert kept.only().starts == 2
    assert kept.only().marks == counting_marks(secret_marks(entry.secrets, "2b"))
    other, entry = hiding(kept, LOG, "3c", SEQS="65")
    kept.ready(other, engine=entry)
    assert kept.only().starts == 1
    gone, _ = hiding(kept, LOG, "4d", SEQS="65")
    kept.ready(gone, engine=None)
    assert kept.only().starts == 1
    text = kept.path.read_text()
    assert not [value for value in HIDDEN.values() if f'"{value}"' in text or f" {value} " in text]


def test_no_secret_is_told_with_a_failure(kept: Kept) -> None:
    log = (
        "ValueError: Unknown quantization method: wonder-quant, token=hf_abcdef123456x, for 64 of 640 and inherited0123"
    )
    launch, entry = hiding(kept, log)
    failure = why_it_failed(launch, 1, set(), entry, {"MY_API_KEY": "inherited0123", "MY_KEY": "of"})
    assert failure.line == "ValueError: Unknown quantization method: ***, token=***x, for *** of 640 and ***"


def test_where_hidden_values_are_not_known_any_more_nothing_is_quoted(kept: Kept) -> None:
    launch, _ = hiding(kept, "api_server.py: error: unrecognized arguments: --wonder-quant")
    changed = engine(HIDING, **{**HIDDEN, "QUANT": "other"})
    for entry in (changed, None):
        failure = why_it_failed(launch, 2, set(), entry, {})
        assert (failure.kind, failure.line, failure.fix) == (FailureKind.WRONG_FLAG, "", "correct `args`")


def test_a_failure_is_kept_and_read_again(kept: Kept, tmp_path: Path) -> None:
    failure = Failure(FailureKind.KV_CACHE_TOO_SMALL, "line", "fix", 1, 2, 3, can_recover=True)
    records = Records(tmp_path)
    records.save(kept.launch(failure=failure_data(failure)))
    [read], problems = records.load()
    assert not problems
    assert read_failure(read.failure) == failure
    assert read_failure({}) is None
    assert read_failure({"kind": "another version's"}) is None
    assert read_failure({"kind": "unknown", "memory_mib": "much"}) is None


def test_the_kernel_is_asked_about_the_processes_of_the_launch(
    kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kmsg = tmp_path / "kmsg"
    kmsg.write_text("3,1,1,-;Out of memory: Killed process 42 (VLLM::Worker) total-vm:1kB\n")
    monkeypatch.setattr(learned.oom.killed, "__defaults__", (0.0, kmsg))
    launch = kept.launch(created_at=time.time() - 5)
    assert why_it_failed(launch, 0, {42}, None, {}).kind is FailureKind.UNKNOWN, "that was long before"
    kmsg.write_text(f"3,1,{int(time.monotonic() * 1e6)},-;Out of memory: Killed process 42 (python3) total-vm:1kB\n")
    assert why_it_failed(launch, 0, {41, 42}, None, {}).kind is FailureKind.OOM_KILLED
    assert why_it_failed(launch, 0, {41}, None, {}).kind is FailureKind.UNKNOWN
    monkeypatch.setattr(learned.oom.kills, "__defaults__", (_cgroup(tmp_path, 3), tmp_path))
    launch.oom_kills = 2
    assert why_it_failed(launch, 0, set(), None, {}).kind is FailureKind.OOM_KILLED
    assert why_it_failed(launch, 137, set(), None, {}).kind is FailureKind.OOM_KILLED
    launch.oom_kills = 3
    assert why_it_failed(launch, 137, set(), None, {}).kind is FailureKind.KILLED


def _cgroup(folder: Path, kills: int) -> Path:
    (folder / "memory.events").write_text(f"oom_kill {kills}\n")
    path = folder / "cgroup"
    path.write_text(f"0::/{os.sep}\n")
    return path
