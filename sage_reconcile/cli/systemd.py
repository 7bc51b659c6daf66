"""The commands ``systemd show`` and ``systemd install``: their options. What they do is in ``installing``."""

from __future__ import annotations

from typing import Annotated

import typer

from sage_reconcile.cli.options import File, Finished, State

app = typer.Typer(help="Run the daemon as a service of systemd.", no_args_is_help=True, rich_markup_mode=None)

OfUser = Annotated[
    bool, typer.Option("--user", help="A service of your own systemd (systemctl --user), not of the machine's.")
]
RunAs = Annotated[
    str | None,
    typer.Option(
        "--run-as", help="The user that daemon and engines run as; default you.", metavar="USER", show_default=False
    ),
]


@app.command()
def show(file: File = None, state_dir: State = None, of_user: OfUser = False, run_as: RunAs = None) -> None:
    """Print the unit for this machine, with comments. Writes nothing."""
    from sage_reconcile.cli import installing

    raise Finished(installing.show(file, state_dir, of_user=of_user, run_as=run_as))


@app.command()
def install(
    *,
    file: File = None,
    state_dir: State = None,
    of_user: OfUser = False,
    run_as: RunAs = None,
    now: Annotated[bool, typer.Option("--now", help="Enable it for each boot, and start it.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a unit that is there and says something else.")
    ] = False,
) -> None:
    """Write the unit for this machine, show it, and tell what to do next. Stops no engine."""
    from sage_reconcile.cli import installing

    raise Finished(installing.install(file, state_dir, of_user=of_user, run_as=run_as, now=now, force=force))
