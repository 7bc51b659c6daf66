"""What starts were measured to take, and under which name it is looked up again.

The name (:func:`subject`) is made of what the memory of an engine depends on: the GPU's model, the entry's model, its
parallel sizes, and those of its flags and variables that matter. Hidden values (what came from the environment)
are never in it; whether they are still the same is told by their marks (``resolve.secret_marks``).
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from sage_reconcile.core.startup_figures import StartupFigures

_FIELDS = (
    *("runtime", "device", "model", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"),
    "context",
)
_IDLE_FLAGS = {
    *("access-log", "allow-credentials", "allowed-headers", "allowed-media-domains", "allowed-methods"),
    *("allowed-origins", "chat-template", "chat-template-content-format", "default-chat-template-kwargs"),
    *("disable-access-log-for-endpoints", "disable-fastapi-docs", "disable-log-requests", "disable-log-stats"),
    *("disable-uvicorn-access-log", "download-dir", "enable-auto-tool-choice", "enable-force-include-usage"),
    *("enable-log-deltas", "enable-log-outputs", "enable-log-requests", "enable-prompt-tokens-details"),
    *("enable-request-id-headers", "enable-server-load-tracking", "enable-ssl-refresh", "generation-config"),
    *("log-config-file", "log-error-stack", "log-level", "max-log-len", "otlp-traces-endpoint"),
    *("override-generation-config", "reasoning-parser", "response-role", "return-tokens-as-token-ids", "root-path"),
    *("seed", "tool-call-parser", "tool-parser-plugin", "tool-server", "trust-request-chat-template"),
    *("use-tqdm-on-load", "uvicorn-log-level"),
}
"""Flags on which no memory depends; any other counts, those not known too."""
_COUNTING_VARIABLES = ("VLLM_", "PYTORCH_", "TORCH", "CUDA_", "NCCL_")
_IDLE_VARIABLES = {"VLLM_API_KEY", "VLLM_NO_USAGE_STATS", "VLLM_LOGGING_LEVEL", "VLLM_DO_NOT_TRACK"}


@dataclass(frozen=True, slots=True)
class Measured:
    """What the starts of one kind took.

    ``held_mib`` is the most that the driver showed its processes to hold on one GPU, when it was ready and since, with
    ``promised_mib`` of each; None where the driver does not tell, or none has got ready yet. ``beside_kv_mib`` is the
    most that any of them took of a GPU beside its KV cache; None where that could not be told apart. ``kv_tokens`` and
    the blocks are of the KV cache with that promise. ``starts`` is how many got ready, ``at`` when the last one did
    (seconds since the epoch), ``startup_s`` how long that one took. ``needed_mib`` is the promise that would do for
    one that failed for want of memory, until one gets ready. ``marks`` are keyed digests, by ``salt``, of the hidden
    values that count.
    """

    subject: str
    vllm_version: str = ""
    promised_mib: int = 0
    held_mib: int | None = None
    beside_kv_mib: int | None = None
    kv_tokens: int | None = None
    kv_blocks: int | None = None
    block_tokens: int | None = None
    figures: StartupFigures = field(default_factory=StartupFigures)
    at: float = 0.0
    startup_s: float | None = None
    starts: int = 0
    needed_mib: int | None = None
    salt: str = ""
    marks: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Under what it is kept: one for each version of vLLM."""
        return f"{self.vllm_version} {self.subject}"

    @property
    def gpu_name(self) -> str:
        """The model of the GPUs that it was on; empty where it was on none."""
        return str(json.loads(self.subject)[0])

    @property
    def outgrew(self) -> bool:
        """Whether it held more than it was promised."""
        return self.held_mib is not None and self.held_mib > self.promised_mib > 0


def subject(record: Mapping[str, object], gpu_name: str) -> str:
    """What two starts must have in common to take the same.

    ``record`` is the entry as ``Engine.record`` and ``Launch.spec`` have it, ``gpu_name`` the model of its GPUs, empty
    without any.
    """
    args, env = _map(record.get("args")), _map(record.get("env"))
    flags = {flag: value for flag, value in args.items() if _flag_counts(flag)}
    told = [record.get(name) for name in _FIELDS]
    variables = sorted(name for name in env if _variable_counts(name))
    return json.dumps([gpu_name, *told, flags, variables], sort_keys=True, separators=(",", ":"))


def _map(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _flag_counts(flag: str) -> bool:
    idle = flag.startswith("simulate-") and flag != "simulate-weights-mib"
    return not idle and flag.removeprefix("no-") not in _IDLE_FLAGS


def _variable_counts(name: str) -> bool:
    return name.startswith(_COUNTING_VARIABLES) and name not in _IDLE_VARIABLES


def counting_marks(marks: Mapping[str, str]) -> dict[str, str]:
    """Of the marks of hidden values, by their path, those of values that count."""
    return {path: mark for path, mark in marks.items() if _path_counts(path)}


def _path_counts(path: str) -> bool:
    head, _, rest = path.partition(".")
    if head == "args":
        return _flag_counts(rest.partition(".")[0])
    if head in ("env", "env_file"):
        return _variable_counts(rest)
    return head in _FIELDS


def find(
    measured: Mapping[str, Measured],
    record: Mapping[str, object],
    gpu_name: str,
    marks: Callable[[str], Mapping[str, str]] = lambda _salt: {},
    vllm_version: str | None = None,
) -> Measured | None:
    """What is known of such an engine on such a GPU: of this version of vLLM, or of the one that last got ready.

    ``marks`` gives the marks of the entry's hidden values for a salt: ``lambda salt: secret_marks(engine.secrets,
    salt)``.
    """
    wanted = subject(record, gpu_name)
    fitting = [
        item
        for item in measured.values()
        if item.subject == wanted
        and vllm_version in (None, item.vllm_version)
        and _same(item.marks, counting_marks(marks(item.salt)))
    ]
    return max(fitting, key=lambda item: (item.at, item.vllm_version), default=None)


def _same(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    return one.keys() == other.keys() and all(hmac.compare_digest(one[path], other[path]) for path in one)


def newest(items: Iterable[Measured], most: int) -> dict[str, Measured]:
    """So many of them, those of the latest starts, by their key."""
    kept = sorted(items, key=lambda item: (item.at, item.key))[-most:]
    return {item.key: item for item in kept}


def beside_kv_mib(figures: StartupFigures, held_mib: int | None, kv_bytes: int, outside_mib: int) -> int | None:
    """What a start took of a GPU beside its KV cache, in MiB; None where that cannot be told apart.

    What the driver shows its processes to hold, less the cache: ``kv_bytes`` where its size was given (0: it was not),
    else what vLLM found to be left for it. Where the driver does not tell (in a container, the pids are others), vLLM's
    own budget stands for it, with ``outside_mib`` that it does not count.
    """
    cache = kv_bytes >> 20 if kv_bytes else figures.kv_available_mib
    if held_mib is None and not kv_bytes and figures.requested_mib is not None:
        held_mib = figures.requested_mib + outside_mib
    if held_mib is None or cache is None or not 0 < cache < held_mib:
        return None
    return held_mib - cache


def cuda_totals(measured: Mapping[str, Measured]) -> dict[str, int]:
    """The total of each model of GPU as CUDA told it at past starts, in MiB; of several the smallest."""
    totals: dict[str, int] = {}
    for item in measured.values():
        if item.figures.cuda_total_mib:
            totals[item.gpu_name] = min(item.figures.cuda_total_mib, totals.get(item.gpu_name, 1 << 40))
    return totals
