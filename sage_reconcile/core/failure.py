"""Why a start failed: its class, what the log said, and what to do. ``diagnosis`` reads it from a log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class FailureKind(StrEnum):
    """What it failed for."""

    WRONG_FLAG = "wrong flag"
    MODEL_NOT_FOUND = "model not found"
    NO_ACCESS = "no access to the model"
    NO_VLLM = "vLLM not found"
    TOO_LITTLE_FREE = "too little memory free"
    KV_CACHE_TOO_SMALL = "KV cache too small"
    NO_KV_CACHE = "no memory left for the KV cache"
    OUT_OF_MEMORY = "CUDA out of memory"
    DISTURBED = "memory changed while it was measured"
    PORT_TAKEN = "port taken"
    GPU_ERROR = "CUDA or driver error"
    OOM_KILLED = "killed for want of host memory"
    KILLED = "killed"
    UNKNOWN = "unknown"


LASTING = frozenset(
    {
        *(FailureKind.WRONG_FLAG, FailureKind.MODEL_NOT_FOUND, FailureKind.NO_ACCESS, FailureKind.NO_VLLM),
        *(FailureKind.KV_CACHE_TOO_SMALL, FailureKind.NO_KV_CACHE),
    }
)
"""What stays as it is until somebody changes something."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a launch failed. ``line`` is the line of its log that tells, ``fix`` what to do, in the fields of the file.

    ``memory_mib`` is the promise of each GPU that would do, ``kv_cache_mib`` the KV cache, ``context_tokens`` the
    ``max-model-len`` that would fit without either; None where the log does not tell. ``can_recover``: it may get
    better by itself.
    """

    kind: FailureKind
    line: str = ""
    fix: str = ""
    memory_mib: int | None = None
    kv_cache_mib: int | None = None
    context_tokens: int | None = None
    can_recover: bool = False

    def document(self) -> dict[str, object]:
        """What ``status -o json`` tells of it."""
        return {
            "class": self.kind.value,
            "line": self.line,
            "fix": self.fix,
            "memory_mib": self.memory_mib,
            "kv_cache_mib": self.kv_cache_mib,
            "context_tokens": self.context_tokens,
            "can_recover": self.can_recover,
        }

    def summary(self) -> str:
        """``KV cache too small: write `memory: 21504MiB` …``: the class and the fix; the line where it has none.

        Without the class where that says no more than the exit status beside it.
        """
        told = self.fix or self.line
        if self.kind in (FailureKind.UNKNOWN, FailureKind.KILLED):
            return told
        return f"{self.kind}: {told}" if told else str(self.kind)


@dataclass(frozen=True, slots=True)
class Started:
    """What was started: the record of its entry, the promise of each GPU (0 where there is none), and its port."""

    spec: Mapping[str, object] = field(default_factory=dict)
    memory_mib: int = 0
    port: int = 0

    @property
    def args(self) -> Mapping[str, object]:
        """vLLM's flags, as written."""
        args = self.spec.get("args")
        return args if isinstance(args, Mapping) else {}

    @property
    def manual(self) -> bool:
        """Whether its flags say what memory it takes."""
        return self.spec.get("memory") == "manual"

    @property
    def sized(self) -> bool:
        """Whether its entry says how large the KV cache is."""
        return self.spec.get("kv_cache") is not None

    @property
    def on_cpu(self) -> bool:
        """Whether it sees no GPU."""
        return self.spec.get("device") == "cpu"

    @property
    def where_flags_are(self) -> str:
        """The field that holds its flags."""
        return "command" if self.spec.get("runtime") == "command" else "args"
