"""The commands ``engine …``: options and help. They only edit the file; what they do is in ``editing``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sage_reconcile.cli.options import File, Finished, Output, State, json_wanted

if TYPE_CHECKING:
    from sage_reconcile.core.changes import Change, Present

app = typer.Typer(
    help="Change the file by command, one engine at a time: start, stop, restart, scale, set; and list, show.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def _names(context: typer.Context, incomplete: str) -> list[str]:
    from sage_reconcile.cli.completing import engine_names

    return engine_names(context.params.get("file"), incomplete)


def _fields(context: typer.Context, incomplete: str) -> list[str]:
    from sage_reconcile.cli.completing import assignments

    return assignments(context.params.get("file"), context.params.get("name"), incomplete)


Name = Annotated[str, typer.Argument(help="An engine.", autocompletion=_names)]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Write nothing; show the change to the file, and the plan that follows from it."),
]
Wait = Annotated[
    bool, typer.Option("--wait", help="Wait until the daemon has done it. Fails at once where no daemon follows.")
]


@app.command()
def start(
    model: Annotated[
        str, typer.Argument(help="A model on the hub or a folder; or an engine of the file.", autocompletion=_names)
    ],
    *,
    name: Annotated[str, typer.Option("--name", help="Default: made of the model's name.", show_default=False)] = "",
    replicas: Annotated[int | None, typer.Option("--replicas", min=1, show_default=False)] = None,
    tensor: Annotated[int | None, typer.Option("-tp", "--tensor-parallel-size", min=1, show_default=False)] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Of each GPU: auto, 24GiB, 30%.", show_default=False)
    ] = None,
    port: Annotated[str | None, typer.Option("--port", help="auto, or a port.", show_default=False)] = None,
    gpus: Annotated[
        str | None, typer.Option("--gpus", help="auto, or the only ones to use: 0,1.", show_default=False)
    ] = None,
    arg: Annotated[
        list[str] | None,
        typer.Option("--arg", help="A flag of vLLM's: max-model-len=8192. Repeatable.", show_default=False),
    ] = None,
    field: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other field, as in `engine set`.", autocompletion=_fields, show_default=False),
    ] = None,
    wait: Wait = False,
    dry_run: DryRun = False,
    output: Output = "text",
    file: File = None,
    state_dir: State = None,
) -> None:
    """Add an engine for a model, or bring a stopped one back. Prints its name. Twice is once.

    `start NAME`, with the name of an engine that `stop` has stopped, gives it the replicas that it had.
    """
    from sage_reconcile.core import changes

    given: dict[str, Any] = {"tensor_parallel_size": tensor, "memory": memory}
    if port is not None:
        given["port"] = int(port) if port.isdecimal() else port
    if gpus is not None:
        given["gpus"] = [int(one) if one.isdecimal() else one for one in gpus.split(",")] if gpus != "auto" else gpus
    fields = [(path, value) for path, value in given.items() if value is not None]
    fields += [_assignment(f"args.{one}" if "=" in one else f"args.{one}=true", "--arg") for one in arg or ()]
    fields += [_assignment(one, "--set") for one in field or ()]
    wish = changes.Wish(model, name, replicas, fields)
    how = _How(wait, dry_run, output, file, state_dir)
    raise Finished(_edit("start", lambda now: changes.start(wish, now), how))


@app.command()
def stop(
    name: Name,
    *,
    remove: Annotated[bool, typer.Option("--remove", help="Take the entry out of the file.")] = False,
    wait: Wait = False,
    dry_run: DryRun = False,
    output: Output = "text",
    file: File = None,
    state_dir: State = None,
) -> None:
    """Stop an engine; its entry stays, with `replicas: 0` and a note of how many there were."""
    from sage_reconcile.core import changes

    how = _How(wait, dry_run, output, file, state_dir)
    raise Finished(_edit("stop", lambda now: (name, changes.stop(now, name, remove=remove)), how))


@app.command()
def restart(
    name: Name,
    *,
    replica: Annotated[
        int | None, typer.Option("--replica", min=0, help="Only this one, by its index.", show_default=False)
    ] = None,
    wait: Wait = False,
    dry_run: DryRun = False,
    output: Output = "text",
    file: File = None,
    state_dir: State = None,
) -> None:
    """Start the replicas of an engine anew: writes the time into its field `restarted`."""
    from datetime import UTC, datetime

    from sage_reconcile.core import changes

    stamp = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    how = _How(wait, dry_run, output, file, state_dir)
    raise Finished(_edit("restart", lambda now: (name, changes.restart(now, name, replica, stamp)), how))


@app.command()
def scale(
    name: Name,
    replicas: Annotated[int, typer.Argument(min=0, help="How many shall run.")],
    *,
    wait: Wait = False,
    dry_run: DryRun = False,
    output: Output = "text",
    file: File = None,
    state_dir: State = None,
) -> None:
    """Say how many replicas of an engine shall run. What runs already is not restarted."""
    from sage_reconcile.core import changes

    how = _How(wait, dry_run, output, file, state_dir)
    raise Finished(_edit("scale", lambda now: (name, changes.scale(now, name, replicas)), how))


@app.command("set")
def set_fields(
    name: Name,
    fields: Annotated[
        list[str],
        typer.Argument(
            help="memory=30GiB, gpus=[0,1], args.max-model-len=8192, 'env.HF_TOKEN=${HF_TOKEN}'; nothing behind the = "
            "takes the field out.",
            metavar="FIELD=VALUE...",
            autocompletion=_fields,
        ),
    ],
    *,
    wait: Wait = False,
    dry_run: DryRun = False,
    output: Output = "text",
    file: File = None,
    state_dir: State = None,
) -> None:
    """Set fields of an engine, or take them out. All of them are written at once, or none."""
    from sage_reconcile.core import changes

    values = [_assignment(one, "FIELD=VALUE") for one in fields]
    how = _How(wait, dry_run, output, file, state_dir)
    raise Finished(_edit("set", lambda now: (name, changes.assign(now, name, values)), how))


@app.command("list")
def list_engines(file: File = None, state_dir: State = None, output: Output = "text") -> None:
    """List the engines of the file, and what still runs without being in it."""
    from sage_reconcile.cli import listing

    raise Finished(listing.list_engines(file, state_dir, as_json=json_wanted(output)))


@app.command()
def show(name: Name, file: File = None, state_dir: State = None, output: Output = "text") -> None:
    """Show an engine: what the file says of it, defaults applied, and its replicas."""
    from sage_reconcile.cli import listing

    raise Finished(listing.show_engine(file, state_dir, name, as_json=json_wanted(output)))


@dataclass(frozen=True, slots=True)
class _How:
    """How a verb shall go, as its options say."""

    wait: bool
    dry_run: bool
    output: str
    file: Path | None
    state_dir: Path | None


def _edit(verb: str, decide: Callable[[Present], tuple[str, Sequence[Change]]], how: _How) -> int:
    from sage_reconcile.cli import editing

    if how.wait and how.dry_run:
        raise typer.BadParameter("with --dry-run nothing is written, so nothing would come", param_hint="--wait")
    asked = editing.Asked(verb, decide, wait=how.wait, dry_run=how.dry_run, as_json=json_wanted(how.output))
    return editing.edit_file(asked, how.file, how.state_dir)


def _assignment(text: str, option: str) -> tuple[str, object]:
    """``args.max-model-len=8192`` as a path and a value; None for nothing behind the ``=``."""
    from sage_reconcile.host.yaml_text import read_value

    path, equals, value = text.partition("=")
    if not equals or not path:
        raise typer.BadParameter(f"{text!r} is not FIELD=VALUE", param_hint=option)
    if not value:
        return path, None
    return path, value if path.startswith("env.") else read_value(value)
