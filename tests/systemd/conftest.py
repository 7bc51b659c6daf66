"""A machine for each story, where this one can boot it; where it cannot, pytest's summary says why."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.systemd.machine import Machine, machine, why_not


@pytest.fixture(scope="session", name="bootable")
def _bootable() -> None:
    if reason := why_not():
        pytest.skip(f"NOT TESTED under a booted systemd: {reason}")


@pytest.fixture(name="machine")
def _machine(bootable: None) -> Iterator[Machine]:  # noqa: ARG001 - it has to come first
    with machine() as made:
        yield made
