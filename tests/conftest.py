"""What holds for all tests."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test, and nothing that a test starts, asks the real hub
