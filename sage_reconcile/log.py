"""What happened, one line an event: JSON where machines read it, words and colours on a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import structlog
from structlog.typing import EventDict

_JSON = structlog.processors.JSONRenderer()
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "exception": 3, "critical": 2}


def configure() -> Any:  # noqa: ANN401 - structlog's loggers are typed by their wrapper at run time
    """The logger of this process; it writes to standard error."""
    machine = _for_journal if goes_to_journal(os.environ) else _JSON
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            _with_engine,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else machine,
        ],
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    return structlog.get_logger()


def goes_to_journal(environ: Mapping[str, str]) -> bool:
    """Whether standard error is the very stream that the journal reads (``man systemd.exec``, ``JOURNAL_STREAM``)."""
    try:
        stream = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"


def _with_engine(_: object, __: str, event: EventDict) -> EventDict:
    """Names the engine of a replica as well, for queries by engine."""
    if "replica" in event:
        event.setdefault("engine", str(event["replica"]).partition("/")[0])
    return event


def _for_journal(logger: object, level: str, event: EventDict) -> str:
    """JSON after the level as the journal wants it, which takes it off again: ``journalctl -p err`` works."""
    return f"<{_PRIORITIES.get(level, 6)}>{_JSON(logger, level, event)!s}"
