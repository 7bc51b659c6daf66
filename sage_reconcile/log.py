"""What happened, one line an event: JSON where machines read it, words and colours on a terminal."""

from __future__ import annotations

import sys
from typing import Any

import structlog


def configure() -> Any:  # noqa: ANN401 - structlog's loggers are typed by their wrapper at run time
    """The logger of this process; it writes to standard error."""
    terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    return structlog.get_logger()
