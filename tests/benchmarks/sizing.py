"""What engines were measured to take, beside what we, and two plain rules, say before they start.

``python -m tests.benchmarks.sizing FOLDER``: a folder with ``ground_truth.csv`` (what vLLM logged, GiB per GPU) and
``configs/ORG--NAME/config.json``. The plain rules: weights × 1.2 + 2 GiB (GPUStack's), and 2 GB for each billion
parameters that the name tells. The total is what an engine takes without its KV cache, which fills what is left.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sage_reconcile.core.model_config import ModelConfig, read_model_config
from sage_reconcile.core.sizing import Card, Sizing, parameters_from_name, size
from sage_reconcile.core.weights import Parallel
from sage_reconcile.core.workload import Workload, cache_bytes, dtype_bytes

SWEEP = "0.19.0"
_GIB = 1 << 30
_TOTAL = ("weights_gib", "activation_gib", "non_torch_gib", "cudagraph_actual_gib", "pre_snapshot_gib")
_NOT_USABLE = ("race", "at once", "oom")


@dataclass(frozen=True)
class Row:
    """A measured start, and what is said of it. Errors are shares, above zero where too much is said."""

    data: dict[str, str]
    sizing: Sizing

    @property
    def name(self) -> str:
        parallel = f"tp{self.data['tp']} pp{self.data['pp']}"
        return f"{self.data['id']:>3} {self.data['model'].rsplit('/', 1)[-1][:36]:36} {parallel}"

    @property
    def whole(self) -> bool:
        """Whether one stage has all: else the pool that is logged is the first's, and the last decides the tokens."""
        return self.data["pp"] == "1"

    def part(self, name: str) -> float:
        return next(part.mib for part in self.sizing.parts if part.name == name) / 1024

    def measured(self, *names: str) -> float | None:
        """A sum in GiB; None where a number is missing."""
        values = [self.data[name] for name in names]
        return sum(map(float, values)) if all(values) else None

    @property
    def weights_error(self) -> float | None:
        truth = self.measured("weights_gib")
        return self.part("weights") / truth - 1 if truth else None

    @property
    def tokens_error(self) -> float | None:
        pool, tokens = self.measured("kv_pool_gib"), self.data["kv_tokens"]
        if not pool or pool <= 0 or not tokens:
            return None
        return self.sizing.layout.tokens_in(int(pool * _GIB)) / int(tokens) - 1

    def _total_error(self, said_gib: float) -> float | None:
        truth = self.measured(*_TOTAL)
        return said_gib / truth - 1 if truth and self.data["vllm_version"] == SWEEP else None

    @property
    def total_error(self) -> float | None:
        return self._total_error(self.sizing.total_mib / 1024 - self.part("kv_cache"))

    @property
    def plain_error(self) -> float | None:
        return self._total_error((self.measured("weights_gib") or 0) * 1.2 + 2)

    @property
    def named_error(self) -> float | None:
        parameters = parameters_from_name(self.data["model"])
        ranks = int(self.data["tp"]) * int(self.data["pp"])
        return self._total_error(2 * parameters / 1e9 * 1e9 / _GIB / ranks) if parameters else None


def rows(folder: Path) -> Iterator[Row]:
    """The rows of a folder that can be used: a ``config.json`` is there, and it was a plain start."""
    with (folder / "ground_truth.csv").open(encoding="utf-8", newline="") as file:
        for data in csv.DictReader(file):
            config = _config(folder, data["model"])
            if config is None or any(word in data["note"].lower() for word in _NOT_USABLE) or not data["weights_gib"]:
                continue
            yield Row(data, size(config, work_of(data), Card(data["gpu"])))


_KNOWN: dict[Path, ModelConfig | None] = {}


def _config(folder: Path, model: str) -> ModelConfig | None:
    path = folder / "configs" / model.replace("/", "--") / "config.json"
    if path not in _KNOWN:
        _KNOWN[path] = read_model_config(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
    return _KNOWN[path]


def work_of(data: dict[str, str]) -> Workload:
    """How the engine of a row was run."""
    return Workload(
        parallel=Parallel(int(data["tp"] or 1), int(data["pp"] or 1)),
        context=int(data["max_model_len"] or 0),
        batched_tokens=int(data["mbt"] or 0),
        sequences=int(data["max_num_seqs"] or 0),
        dtype_bytes=dtype_bytes(data["dtype"]),
        cache_bytes=cache_bytes(data["kv_dtype"]),
        quantization=data["quant"],
    )


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value * 100:+.{digits}f}%"


def show(found: list[Row]) -> None:
    """Prints the table and what it comes to."""
    print(f"{'':49}  {'weights':>8} {'KV tokens':>10} {'total':>8}   w x 1.2 + 2   name")
    for row in found:
        cells = (_percent(row.weights_error), _percent(row.tokens_error, 3), _percent(row.total_error))
        note = "" if row.whole else "  pool: first stage"
        print(
            f"{row.name:49}  {cells[0]:>8} {cells[1]:>10} {cells[2]:>8} "
            f"{_percent(row.plain_error):>13} {_percent(row.named_error):>6}{note}"
        )
    weights = [row.weights_error for row in found if row.weights_error is not None]
    told = [(row.tokens_error, row.whole) for row in found if row.tokens_error is not None]
    near = [abs(error) <= 0.001 for error, _ in told]
    whole = [abs(error) <= 0.001 for error, one in told if one]
    print(f"\nweights: mean {statistics.mean(map(abs, weights)):.2%}, worst {max(map(abs, weights)):.2%}")
    print(f"KV tokens within 0.1%: {sum(near)} of {len(near)}; of one stage: {sum(whole)} of {len(whole)}")
    for what, errors in (
        ("total", [row.total_error for row in found]),
        ("weights x 1.2 + 2 GiB", [row.plain_error for row in found]),
        ("2 GB a billion of the name", [row.named_error for row in found]),
    ):
        known = [error for error in errors if error is not None]
        low = sum(error < 0 for error in known)
        mean = statistics.mean(known)
        print(f"{what}: mean {mean:+.1%}, {min(known):+.1%} to {max(known):+.1%}, {low} of {len(known)} too low")


def main(words: list[str]) -> int:
    if len(words) != 1 or not (Path(words[0]) / "ground_truth.csv").is_file():
        print("usage: python -m tests.benchmarks.sizing FOLDER  (with ground_truth.csv and configs/)", file=sys.stderr)
        return 64
    show(list(rows(Path(words[0]))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
