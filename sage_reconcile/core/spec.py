"""What ``engines.yaml`` may say, version 1, and what a change of each field does to a running engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from sage_reconcile.core.fields import (
    CPU_KV_SPACE,
    CPU_KV_SPACE_FAULT,
    read_command,
    read_env,
    read_flags,
    read_gpus,
    read_model,
    read_names,
    read_port,
    read_restarted,
    sizes_memory,
)
from sage_reconcile.core.host_spec import HostSpec, Strict
from sage_reconcile.core.units import (
    Memory,
    MemoryRequest,
    Seconds,
    SizeMib,
    Switch,
    Text,
    Tokens,
    WholeNumber,
    fault,
)


class Effect(StrEnum):
    """What a change of a field does to a replica that runs."""

    RESTART = "restart"
    """The replica is replaced."""
    PLACE = "place"
    """The replica is replaced only where what it runs on does not satisfy the new value."""
    NOTHING = "nothing"
    """The new value is used from the next decision on; the replica keeps running."""


class EngineSpec(Strict):
    """One entry of ``engines:``: an inference engine and how many replicas of it shall run."""

    model: Annotated[str | None, BeforeValidator(read_model)] = Field(
        default=None, description="A model's name on the Hugging Face hub, or a folder."
    )
    runtime: Literal["vllm", "simulator", "command"] = Field(
        default="vllm",
        description="vllm: vLLM's OpenAI server; simulator: the bundled look-alike; command: yours.",
    )
    command: Annotated[tuple[str, ...] | None, BeforeValidator(read_command)] = Field(
        default=None, description="For runtime: command. {model} {host} {port} {name} are filled in."
    )
    python: Text | None = Field(default=None, description="The Python that has vLLM; default: our own.")
    replicas: WholeNumber = Field(default=1, ge=0, le=10000, description="How many run; 0 keeps the entry only.")
    device: Literal["cuda", "cpu"] = Field(default="cuda", description="cpu: the engine sees no GPU.")
    tensor_parallel_size: WholeNumber = Field(default=1, ge=1, le=1024, description="GPUs that share each layer.")
    pipeline_parallel_size: WholeNumber = Field(default=1, ge=1, le=1024, description="Stages the layers are cut into.")
    data_parallel_size: WholeNumber = Field(default=1, ge=1, le=1024, description="Copies inside one server.")
    gpus: Annotated[Literal["auto"] | tuple[int | str, ...], BeforeValidator(read_gpus)] = Field(
        default="auto", description="auto, or the only GPUs (index or UUID) that may be used."
    )
    memory: MemoryRequest = Field(
        default=Memory("auto"),
        validate_default=True,
        description="Memory on each GPU: auto, 24GiB, 30%, all (a GPU alone), or manual (as its `args` say). "
        "With device: cpu: of the host, all of a replica together.",
    )
    context: Tokens | None = Field(
        default=None, description="The longest request, prompt and answer, in tokens: 8192 or 32k."
    )
    concurrency: WholeNumber | None = Field(
        default=None, ge=1, le=100000, description="With memory: auto: room for so many requests of full length."
    )
    kv_cache: SizeMib | None = Field(
        default=None,
        gt=0,
        description="With memory: auto: the size of the KV cache on each GPU, whatever fits in it "
        "(on the CPU of each rank, in whole GiB).",
    )
    spread: Literal["gpu", "none"] = Field(default="none", description="gpu: no GPU has two replicas of it.")
    link: Literal["nvlink", "numa", "any"] = Field(default="any", description="What must link the GPUs of a replica.")
    exclusive: Switch = Field(default=False, description="true: nothing else is placed on its GPUs.")
    port: Annotated[Literal["auto"] | int, BeforeValidator(read_port)] = Field(
        default="auto", description="auto, or the port of replica 0; replica 1 takes the next one, and so on."
    )
    served_model_name: Annotated[
        tuple[Annotated[str, BeforeValidator(read_model)], ...], BeforeValidator(read_names)
    ] = Field(
        default=(),
        description="The name, or names, by which clients ask for the model; default: the engine's name.",
    )
    args: Annotated[dict[str, Any], BeforeValidator(read_flags)] = Field(
        default_factory=dict,
        description="vLLM's own flags: true is --flag, false is --no-flag, a list is many words.",
    )
    env: Annotated[dict[str, str], BeforeValidator(read_env)] = Field(
        default_factory=dict, description="Environment variables; values are never shown."
    )
    env_file: Text | None = Field(default=None, description="A file of NAME=value lines, relative to engines.yaml.")
    priority: WholeNumber = Field(default=0, ge=-1000000, le=1000000, description="Higher is placed first.")
    preemption: Literal["lower", "never"] = Field(
        default="never", description="lower: running replicas of lower priority give way where it has no place."
    )
    movable: Switch = Field(default=False, description="true: it may be moved to other GPUs to make room.")
    max_unavailable: WholeNumber = Field(
        default=1, ge=0, le=10000, description="How many of its replicas may be down at once for an update."
    )
    max_surge: WholeNumber = Field(
        default=1, ge=0, le=10000, description="How many may be started before the old ones end; 0: stop first."
    )
    rollback: Annotated[Literal["auto", "off"], BeforeValidator(lambda value: "off" if value is False else value)] = (
        Field(
            default="auto", description="auto: a revision that fails to start gives way to the last one that was ready."
        )
    )
    startup_timeout: Seconds = Field(default=1800.0, gt=0, description="How long it may take to become ready.")
    stop_timeout: Seconds = Field(default=30.0, ge=0, description="How long it may take to end after SIGTERM.")
    restarted: Annotated[dict[str, str], BeforeValidator(read_restarted)] = Field(
        default_factory=dict,
        description="Another value starts replicas anew: under `all` every one, under an index in quotes that one.",
    )

    @property
    def model_at(self) -> str:
        """The model, and the revision of it where ``args`` name one: by this it is known what was read of it."""
        revision = self.args.get("revision")
        return f"{self.model or ''}@{revision}" if revision else self.model or ""

    @property
    def gpu_count(self) -> int:
        """GPUs that one replica takes: tensor × pipeline × data parallel; 0 on CPU."""
        ranks = self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size
        return ranks if self.device == "cuda" else 0

    @property
    def sizes_cpu_cache(self) -> bool:
        """Whether it is vLLM on the CPU, and the size of its KV cache is ours to say."""
        return self.device == "cpu" and self.runtime == "vllm" and self.memory.kind != "manual"

    @model_validator(mode="after")
    def _an_update_can_begin(self) -> EngineSpec:
        if not self.max_unavailable and not self.max_surge:
            raise fault(
                "`max_unavailable` and `max_surge` are both 0, so that no update could ever begin",
                "let one of them be 1",
                field="max_surge",
            )
        return self

    @model_validator(mode="after")
    def _fields_fit_together(self) -> EngineSpec:
        if self.command and self.runtime != "command":
            raise fault(
                "`command` needs `runtime: command`",
                "add `runtime: command`, or remove `command`",
                field="command",
            )
        if self.runtime == "command" and not self.command:
            raise fault(
                "`runtime: command` needs `command`",
                "write the command that starts the server",
                field="runtime",
            )
        if self.runtime == "command" and self.args:
            raise fault("`args` are vLLM's flags; they mean nothing here", "write them into `command`", field="args")
        if self.model is None and (self.runtime != "command" or any("{model}" in word for word in self.command or ())):
            raise fault("field `model` is missing", "name the model on the hub, or its folder")
        self._memory_is_asked_for_once()
        if self.sizes_cpu_cache and CPU_KV_SPACE in self.env:
            raise fault(*CPU_KV_SPACE_FAULT, field="env", key=CPU_KV_SPACE)
        if self.device == "cpu" and self.gpus != "auto":
            raise fault("`gpus` are listed, but `device: cpu` uses none", "remove one of the two", field="gpus")
        if self.device == "cpu" and self.memory.kind in ("percent", "all"):
            what = "a share of a GPU" if self.memory.kind == "percent" else "a GPU alone"
            raise fault(f"{what} means nothing with `device: cpu`", "write a size, or auto", field="memory")
        if self.gpus != "auto" and len(self.gpus) < self.gpu_count:
            raise fault(
                f"`gpus` lists {len(self.gpus)}, but one replica takes {self.gpu_count} (all parallel sizes)",
                "list more GPUs, or lower the parallel sizes",
                field="gpus",
            )
        if self.port != "auto" and self.port + max(self.replicas, 1) - 1 > 65535:
            raise fault(
                f"{self.replicas} replicas from port {self.port} on go past 65535",
                "start at a lower port",
                field="port",
            )
        return self

    def _memory_is_asked_for_once(self) -> None:
        """What memory follows from, and what decides it, must not contradict each other."""
        if self.runtime == "command":
            for name in ("context", "concurrency", "kv_cache"):
                if getattr(self, name) is not None:
                    raise fault(f"`{name}` means nothing to a command", "say its `memory`", field=name)
            if self.memory.kind == "manual":
                what = "`memory: manual` is about vLLM's flags"
                raise fault(what, "write what the command takes, such as 24GiB", field="memory")
        if self.context is not None and "max-model-len" in self.args:
            raise fault(
                "`context` and `max-model-len` in `args` are the same", "remove one of the two", field="context"
            )
        for name in ("concurrency", "kv_cache"):
            if getattr(self, name) is not None and self.memory.kind != "auto":
                raise fault(
                    f"`{name}` says what `memory: auto` shall hold, but `memory` is {self.memory}",
                    "remove one of the two",
                    field=name,
                )
        if self.kv_cache is not None and self.concurrency is not None:
            what = "`kv_cache` and `concurrency` both size the KV cache"
            raise fault(what, "remove one of the two", field="kv_cache")
        sized = [flag for flag in self.args if sizes_memory(flag)]
        if sized and self.memory.kind != "manual":
            raise fault(
                f"`{sized[0]}` is set by sage-reconcile",
                "use the fields `memory`, `kv_cache`, `context` and `concurrency`, or write `memory: manual`",
                field="args",
                key=sized[0],
            )


EFFECTS: Mapping[str, Effect] = {
    "model": Effect.RESTART,
    "runtime": Effect.RESTART,
    "command": Effect.RESTART,
    "python": Effect.RESTART,
    "replicas": Effect.NOTHING,
    "device": Effect.RESTART,
    "tensor_parallel_size": Effect.RESTART,
    "pipeline_parallel_size": Effect.RESTART,
    "data_parallel_size": Effect.RESTART,
    "gpus": Effect.PLACE,
    "memory": Effect.RESTART,
    "context": Effect.RESTART,
    "concurrency": Effect.RESTART,
    "kv_cache": Effect.RESTART,
    "spread": Effect.NOTHING,  # and so for `exclusive`: who would have to give way, the file does not say
    "link": Effect.PLACE,
    "exclusive": Effect.NOTHING,
    "port": Effect.PLACE,
    "served_model_name": Effect.RESTART,
    "args": Effect.RESTART,
    "env": Effect.RESTART,
    "env_file": Effect.NOTHING,  # its contents count, through their marks, not its name
    "priority": Effect.NOTHING,
    "preemption": Effect.NOTHING,
    "movable": Effect.NOTHING,
    "max_unavailable": Effect.NOTHING,
    "max_surge": Effect.NOTHING,
    "rollback": Effect.NOTHING,
    "startup_timeout": Effect.NOTHING,
    "stop_timeout": Effect.NOTHING,
    "restarted": Effect.RESTART,  # of those that it names, where it has another value for them
}
"""What a change of each field does. A test fails when a field is missing here."""


class FileSpec(Strict):
    """The whole of ``engines.yaml``."""

    version: Literal[1] = Field(description="The version of this format: 1.")
    host: HostSpec = Field(default_factory=HostSpec, description="The machine.")
    defaults: dict[str, Any] = Field(default_factory=dict, description="Any field of an engine, for all of them.")
    engines: dict[str, EngineSpec] = Field(description="The engines by name.")


@dataclass(frozen=True)
class Engine:
    """An entry of the file, resolved.

    ``spec`` holds the real values and must not be shown; ``shown`` is the same with what came from
    the environment as its ``${NAME}`` and every ``env`` value hidden; ``record`` is ``shown`` as JSON,
    the form in which it is kept beside a running replica. ``secrets`` are the hidden values by field
    path, ``env`` the overlay of the environment (``env_file`` first, then ``env``).
    """

    name: str
    spec: EngineSpec = field(repr=False)
    shown: EngineSpec
    record: Mapping[str, object]
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)

    def replicas(self) -> tuple[str, ...]:
        """The names of the replicas that shall run: ``chat/0``, ``chat/1`` …."""
        return tuple(f"{self.name}/{index}" for index in range(self.spec.replicas))


@dataclass(frozen=True)
class Desired:
    """What shall run.

    ``digest`` names the content of the file it was read from; ``unwanted`` says why an engine that is not
    named is not wanted.
    """

    host: HostSpec
    engines: tuple[Engine, ...]
    digest: str = ""
    unwanted: str = "its engine is not in the file"

    def replicas(self) -> tuple[str, ...]:
        """The names of all replicas that shall run, in the order of the file."""
        return tuple(replica for engine in self.engines for replica in engine.replicas())

    def engine(self, name: str) -> Engine | None:
        """The engine of that name, or None."""
        return next((engine for engine in self.engines if engine.name == name), None)
