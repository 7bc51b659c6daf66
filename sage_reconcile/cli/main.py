"""The command line: options and help. What the commands do is in ``commands``; it is imported when needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from sage_reconcile import __version__
from sage_reconcile.cli import engine, systemd
from sage_reconcile.cli.options import AllowMoves, File, Finished, Output, State, Yes, json_wanted

if TYPE_CHECKING:
    from sage_reconcile.core.gpu_models import Declared

USAGE = 64
"""Exit code for wrong usage (EX_USAGE); 2 means that there are changes."""

app = typer.Typer(
    name="sage-reconcile",
    help="Edit engines.yaml, and the inference engines on this machine follow.",
    epilog="Exit codes: 0 in sync, 1 error, 2 changes (diff), 3 something cannot be placed, 64 wrong usage, "
    "75 someone else reconciles with this state folder, 124 the time of wait is over.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)
app.add_typer(engine.app, name="engine")
app.add_typer(systemd.app, name="systemd")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"sage-reconcile {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


@app.command()
def init(
    file: File = None, force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False
) -> None:
    """Write a commented engines.yaml that fits this machine."""
    from sage_reconcile.cli import commands

    raise Finished(commands.init(file, force=force))


@app.command()
def validate(file: File = None, output: Output = "text") -> None:
    """Check the file; tell every fault with its place and what would be right."""
    from sage_reconcile.cli import commands

    raise Finished(commands.validate(file, json_wanted(output)))


@app.command()
def diff(
    file: File = None,
    state_dir: State = None,
    output: Output = "text",
    allow_moves: AllowMoves = False,
    gpus: Annotated[
        str | None,
        typer.Option(
            "--gpus",
            help="Would the whole file fit on these GPUs, were they here and empty? 8xH100-80GB, 2xA100-80GB,4xL4, "
            "4x24GiB, 4xMyCard:48GiB. Looks at nothing of this machine; exits 0 if all fits, else 3.",
            metavar="GPUS",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show what apply would do, and why. Exits 0 in sync, 2 changes, 3 something cannot be placed."""
    from sage_reconcile.cli import commands

    if gpus is not None:
        from sage_reconcile.cli.fitting import would_it_fit

        raise Finished(would_it_fit(commands.file_path(file), _declared(gpus), as_json=json_wanted(output)))
    raise Finished(commands.diff(file, state_dir, json_wanted(output), allow_moves=allow_moves))


@app.command()
def apply(file: File = None, state_dir: State = None, yes: Yes = False, allow_moves: AllowMoves = False) -> None:
    """Make the machine follow the file, and wait until it does."""
    from sage_reconcile.cli import applying

    raise Finished(applying.apply(file, state_dir, yes=yes, allow_moves=allow_moves))


@app.command()
def down(file: File = None, state_dir: State = None, yes: Yes = False) -> None:
    """Stop all engines of this state folder; the file stays as it is."""
    from sage_reconcile.cli import applying

    raise Finished(applying.down(file, state_dir, yes=yes))


@app.command()
def run(file: File = None, state_dir: State = None) -> None:
    """Run the daemon: follow the file, start again what dies. Its end stops no engine."""
    from sage_reconcile.cli import commands

    raise Finished(commands.run(file, state_dir))


@app.command()
def reload(
    state_dir: State = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Return when the pass is over; exit 1 if the file was refused or held back.")
    ] = False,
) -> None:
    """Have the daemon read the file again now, and retry what waits for another try."""
    from sage_reconcile.cli import commands

    raise Finished(commands.reload(state_dir, wait=wait))


@app.command()
def status(
    file: File = None,
    state_dir: State = None,
    output: Output = "text",
    watch: Annotated[bool, typer.Option("-w", "--watch", help="Show it again every second.")] = False,
) -> None:
    """Show engines, replicas and GPUs as they are, whether the daemon runs or not."""
    from sage_reconcile.cli import commands

    raise Finished(commands.status(file, state_dir, json_wanted(output), watch=watch))


@app.command()
def gpu(
    file: File = None,
    state_dir: State = None,
    output: Output = "text",
    topology: Annotated[bool, typer.Option("--topology", help="Show also how the GPUs are joined.")] = False,
) -> None:
    """Show every GPU: its memory, who is on it, its load, and what keeps new engines off it."""
    from sage_reconcile.cli import gpus

    raise Finished(gpus.gpu(file, state_dir, json_wanted(output), topology=topology))


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(help="A folder (a config.json in it is enough), or a name on the hub.")],
    *,
    tensor: Annotated[int | None, typer.Option("-tp", "--tensor-parallel-size", min=1, show_default=False)] = None,
    pipeline: Annotated[int, typer.Option("-pp", "--pipeline-parallel-size", min=1)] = 1,
    data: Annotated[int, typer.Option("-dp", "--data-parallel-size", min=1)] = 1,
    experts: Annotated[bool, typer.Option("--enable-expert-parallel", help="Whole experts on each rank.")] = False,
    context: Annotated[
        str | None,
        typer.Option(
            "--context",
            help="Tokens of the longest request, 8192 or 32k (32768); default: what the model is made for.",
            show_default=False,
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Full-length requests at one time.")] = 1,
    kv_cache: Annotated[
        str | None, typer.Option("--kv-cache", help="A KV cache of this size instead, 8GiB.", show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, bfloat16, float16 or float32.")] = "auto",
    kv_cache_dtype: Annotated[str, typer.Option("--kv-cache-dtype", help="auto, or fp8.")] = "auto",
    quantization: Annotated[
        str, typer.Option("--quantization", help="What vLLM shall make of it, fp8.", show_default=False)
    ] = "",
    batched: Annotated[int, typer.Option("--max-num-batched-tokens", min=0, show_default=False)] = 0,
    sequences: Annotated[int, typer.Option("--max-num-seqs", min=0, show_default=False)] = 0,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="Does it fit on this GPU? H100-80GB, 24GiB, 8xH100-80GB.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cuda; or cpu: what it takes of the host.")] = "cuda",
    longest: Annotated[bool, typer.Option("--max", help="The longest context that fits there.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Ask no hub; so does HF_HUB_OFFLINE=1.")] = False,
    output: Output = "text",
) -> None:
    """Show how much of each GPU a model takes, part by part, before it is ever started.

    Of a model that is not here a hub is asked for what describes it, never for weights. Exits 3 where it does not
    fit on the GPU that is given.
    """
    from sage_reconcile.cli import estimating
    from sage_reconcile.core.weights import Parallel
    from sage_reconcile.core.workload import Workload, cache_bytes, dtype_bytes

    work = Workload(
        parallel=Parallel(tensor or 1, pipeline, data, experts),
        context=estimating.tokens(context) if context else 0,
        concurrency=concurrency,
        batched_tokens=batched,
        sequences=sequences,
        dtype_bytes=dtype_bytes(estimating.known_dtype(dtype)),
        cache_bytes=cache_bytes(kv_cache_dtype),
        quantization=quantization,
    )
    kinds = _declared(gpu, "--gpu") if gpu is not None else ()
    asked = estimating.question(
        model, work, kinds, tensor_told=tensor is not None, longest=longest, kv_cache=kv_cache, device=device
    )
    raise Finished(estimating.estimate_model(asked, as_json=json_wanted(output), offline=offline))


@app.command()
def logs(
    name: Annotated[str, typer.Argument(help="An engine, or one of its replicas such as chat/0.")],
    file: Annotated[
        Path | None, typer.Option("--file", envvar="SAGE_RECONCILE_FILE", help="The file.", show_default=False)
    ] = None,
    state_dir: State = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as it grows.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many of the last lines.")] = 100,
) -> None:
    """Show the log of an engine's latest launch."""
    from sage_reconcile.cli import commands

    raise Finished(commands.logs(name, file, state_dir, lines=lines, follow=follow))


@app.command()
def events(
    name: Annotated[str, typer.Argument(help="Only those of this engine or replica.", show_default=False)] = "",
    *,
    state_dir: State = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as more come.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many of the last.")] = 100,
    since: Annotated[
        str | None, typer.Option("--since", help="Only those of the last 10m, 2h.", show_default=False)
    ] = None,
    output: Annotated[
        str, typer.Option("-o", "--output", help="text, or json: one a line.", metavar="text|json")
    ] = "text",
) -> None:
    """Show what happened, to whom, and why: starts, failures, stops, files taken in or refused."""
    from sage_reconcile.cli import events as what_happened

    since_s = None if since is None else _seconds(since, "--since")
    as_json = json_wanted(output)
    raise Finished(what_happened.events(name, state_dir, since_s, lines=lines, follow=follow, as_json=as_json))


@app.command()
def wait(
    name: Annotated[str, typer.Argument(help="An engine, or one of its replicas.", show_default=False)] = "",
    *,
    goal: Annotated[
        str, typer.Option("--for", help="ready, stopped or deleted.", metavar="ready|stopped|deleted")
    ] = "ready",
    everything: Annotated[bool, typer.Option("--all", help="All engines.")] = False,
    timeout: Annotated[str, typer.Option("--timeout", help="At most so long.")] = "10m",
    file: File = None,
    state_dir: State = None,
) -> None:
    """Wait until an engine is ready, or gone. Exits 0 then, 1 where it cannot become so, 124 when the time is over."""
    from sage_reconcile.cli import awaiting
    from sage_reconcile.core.awaiting import Goal

    if bool(name) == everything:
        raise typer.BadParameter("name one engine or replica, or give --all", param_hint="NAME")
    if goal not in list(Goal):
        raise typer.BadParameter(f"{goal!r} is none of ready, stopped, deleted", param_hint="--for")
    raise Finished(awaiting.wait(file, state_dir, name, Goal(goal), _seconds(timeout, "--timeout")))


@app.command()
def explain(
    name: Annotated[str, typer.Argument(help="An engine, or one of its replicas such as chat/0.")],
    file: File = None,
    state_dir: State = None,
    output: Output = "text",
) -> None:
    """Show why an engine is where it is, or nowhere: every GPU and its verdict. Exits 3 where it has no place."""
    from sage_reconcile.cli.explaining import explain_name

    raise Finished(explain_name(file, state_dir, name, as_json=json_wanted(output)))


@app.command()
def schema() -> None:
    """Print the JSON Schema of engines.yaml."""
    from sage_reconcile.cli import commands

    raise Finished(commands.schema())


def _seconds(text: str, option: str) -> float:
    """The duration that is meant."""
    from pydantic_core import PydanticCustomError

    from sage_reconcile.core.units import read_seconds

    try:
        return read_seconds(text)
    except PydanticCustomError as error:
        told = error.context or {}
        raise typer.BadParameter(f"{told['what']}; {told['fix']}", param_hint=option) from None


def _declared(text: str, option: str = "--gpus") -> Sequence[Declared]:
    """The GPUs that are meant."""
    from pydantic_core import PydanticCustomError

    from sage_reconcile.core.gpu_models import read_gpus

    try:
        return read_gpus(text)
    except PydanticCustomError as error:
        told = error.context or {}
        raise typer.BadParameter(f"{told['what']}; {told['fix']}", param_hint=option) from None


def main() -> NoReturn:
    """The entry point. Usage errors exit with 64, since 2 means something else here."""
    from sage_reconcile.errors import SageReconcileError

    try:
        app()
    except Finished as finished:
        sys.exit(finished.code)
    except SageReconcileError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:  # of printing: a full disk behind standard output, say
        print(f"error: {error.strerror}: {error.filename or 'standard output'}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as end:
        sys.exit(USAGE if end.code == 2 else end.code)
    sys.exit(0)
