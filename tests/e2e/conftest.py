"""Fixtures of the end-to-end tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.box import Box, box


@pytest.fixture(name="box")
def _box() -> Iterator[Box]:
    """A box in a folder with a short path: sockets must fit into it."""
    with tempfile.TemporaryDirectory(prefix="sr-") as folder, box(Path(folder)) as made:
        yield made
