"""Options that commands have in common, and how a command ends."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

File = Annotated[
    Path | None,
    typer.Option(
        "-f",
        "--file",
        envvar="SAGE_RECONCILE_FILE",
        help="The file; default ./engines.yaml, else /etc/sage-reconcile/engines.yaml.",
        show_default=False,
    ),
]
State = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        envvar="SAGE_RECONCILE_STATE_DIR",
        help="Where is kept what was started; default $STATE_DIRECTORY, /var/lib/sage-reconcile for root, "
        "else ~/.local/state/sage-reconcile.",
        show_default=False,
    ),
]
Output = Annotated[str, typer.Option("-o", "--output", help="text or json.", metavar="text|json")]
AllowMoves = Annotated[
    bool,
    typer.Option("--allow-moves", help="Move any running replica where that lets in one that has no place."),
]
Yes = Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")]


class Finished(Exception):
    """A command has come to its end."""

    def __init__(self, code: int) -> None:
        self.code = code


def json_wanted(output: str) -> bool:
    """Whether JSON is asked for."""
    if output not in ("text", "json"):
        raise typer.BadParameter(f"{output!r} is not an output format; write text or json", param_hint="-o")
    return output == "json"
