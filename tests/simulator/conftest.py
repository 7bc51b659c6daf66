from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sage_reconcile.simulator import gpus
from tests.simulator import running
from tests.simulator.running import TOTAL_MIB, A, B, Fleet


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    yield from running.fleet(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "gpus"
    gpus.write_inventory(made, [{"uuid": uuid, "name": "H100", "memory_total_mib": TOTAL_MIB} for uuid in (A, B)])
    return made
