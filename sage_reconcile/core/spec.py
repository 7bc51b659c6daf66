"""What ``engines.yaml`` may say, version 1, and what a change of each field does to a running engine."""

from __future__ import annotations

import re
import shlex
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from sage_reconcile.core.units import (
    Memory,
    MemoryRequest,
    PortRange,
    Seconds,
    SizeMib,
    Text,
    WholeNumber,
    described,
    fault,
    read_text,
    read_whole_number,
)

PLACEHOLDERS = ("model", "host", "port", "name")
ENGINE_NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"

OWN_FLAGS: Mapping[str, str] = {
    "model": "the field `model`",
    "host": "`bind` under `host:`",
    "port": "the field `port`",
    "uds": "the field `port`",
    "served-model-name": "the field `served_model_name`",
    "tensor-parallel-size": "the field `tensor_parallel_size`",
    "pipeline-parallel-size": "the field `pipeline_parallel_size`",
    "data-parallel-size": "the field `data_parallel_size`",
    "gpu-memory-utilization": "the field `memory`",
    "shutdown-timeout": "the field `stop_timeout`",
    "api-key": "`env:` with VLLM_API_KEY, since everyone on the machine can read a command line",
    "hf-token": "`env:` with HF_TOKEN, since everyone on the machine can read a command line",
}
"""vLLM flags that we set, or that must not be on a command line, and what to use in their place."""

_FLAG_ALIASES = {"tp": "tensor-parallel-size", "pp": "pipeline-parallel-size", "dp": "data-parallel-size"}
_FLAG = re.compile(r"[A-Za-z][A-Za-z0-9.-]*")
_SECRET_FLAG = re.compile(r"(^|-)(api-key|password|secret|(hf|auth|access)-token)(-|$)")
OWN_ENV: Mapping[str, str] = {
    "CUDA_VISIBLE_DEVICES": "the field `gpus`",
    "NVIDIA_VISIBLE_DEVICES": "the field `gpus`",
    "CUDA_DEVICE_ORDER": "the field `gpus`, with UUIDs if the order matters",
    "VLLM_PORT": "the field `port`",
    "SPT_NOENV": "nothing: it is how the processes of an engine are recognised",
}
"""Environment variables that we set, and what to use in their place."""


class Effect(StrEnum):
    """What a change of a field does to a replica that runs."""

    RESTART = "restart"
    """The replica is replaced."""
    PLACE = "place"
    """The replica is replaced only where what it runs on does not satisfy the new value."""
    NOTHING = "nothing"
    """The new value is used from the next decision on; the replica keeps running."""


def _read_flags(value: object) -> object:
    if not isinstance(value, dict):
        return value
    flags: dict[str, object] = {}
    for key, setting in ((str(key), setting) for key, setting in value.items()):
        flag = key.lstrip("-").replace("_", "-")
        if not _FLAG.fullmatch(flag):
            raise fault(f"`{key}` is not a flag's name", "write vLLM's name for it, such as max-model-len", key=key)
        owned = _FLAG_ALIASES.get(flag) or next((own for own in OWN_FLAGS if _means(flag, own)), None)
        if owned:
            raise fault(f"`{key}` is set by sage-reconcile", f"use {OWN_FLAGS[owned]}", key=key)
        if _SECRET_FLAG.search(flag):
            raise fault(
                f"`{key}` would put a secret on the command line, where everyone on the machine can read it",
                "pass it through `env:`",
                key=key,
            )
        if flag in flags:
            raise fault(f"`{key}` is given twice, spelled differently", "keep one of them", key=key)
        flags[flag] = setting
    return flags


def _means(flag: str, owned: str) -> bool:
    """Whether argparse would take ``flag`` for ``owned``: the name itself, or an abbreviation of it."""
    return flag == owned or (len(flag) >= 4 and owned.startswith(flag))


def _read_env(value: object) -> object:
    if not isinstance(value, dict):
        return value
    env: dict[str, str] = {}
    for key, setting in ((str(key), setting) for key, setting in value.items()):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise fault(f"`{key}` is not the name of an environment variable", key=key)
        if key in OWN_ENV or key.startswith("SAGE_RECONCILE_"):
            raise fault(f"`{key}` is set by sage-reconcile", f"use {OWN_ENV.get(key, 'another name')}", key=key)
        if isinstance(setting, bool) or not isinstance(setting, str | int | float):
            raise fault(f"`{key}`: expected text, got {described(setting)}", "put it in quotes", key=key)
        if "\0" in str(setting):
            raise fault(f"`{key}` holds a NUL character", key=key)
        env[key] = str(setting)
    return env


def _read_command(value: object) -> object:
    """A list is taken as it is; text is split as a shell would, but no shell ever sees it."""
    if isinstance(value, str):
        try:
            value = shlex.split(value)
        except ValueError as error:
            raise fault(f"cannot be split into words: {error}", "close the quote, or write a list of words") from None
    if not isinstance(value, list) or not value or not all(isinstance(word, str) and word for word in value):
        raise fault("expected a command", "write it as text or as a list of words, all of them text")
    for word in value:
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(word) if name is not None]
        except ValueError:
            names = [word]
        for name in names:
            if name not in PLACEHOLDERS:
                known = " ".join(f"{{{placeholder}}}" for placeholder in PLACEHOLDERS)
                raise fault(f"unknown placeholder {{{name}}}", f"use {known}, or {{{{ and }}}} for plain braces")
    return tuple(value)


def _read_gpus(value: object) -> object:
    if value == "auto":
        return value
    if not isinstance(value, list | tuple) or not value:
        raise fault(f"expected GPUs, got {described(value)}", "write auto, or a list such as [0, 1] (index or UUID)")
    return _gpu_list(value)


def _gpu_list(value: object) -> object:
    if not isinstance(value, list | tuple):
        raise fault(f"expected a list of GPUs, got {described(value)}", "write a list such as [0, 1] (index or UUID)")
    pins: list[int | str] = []
    for entry in value:
        pin = int(entry) if isinstance(entry, str) and entry.isdecimal() else entry
        if isinstance(pin, bool) or not isinstance(pin, int | str) or (isinstance(pin, int) and pin < 0) or pin == "":
            raise fault(
                f"{described(entry)} does not name a GPU",
                "use its index or its UUID, as `nvidia-smi -L` shows",
            )
        if pin in pins:
            raise fault(f"GPU {pin} is listed twice", "list each GPU once")
        pins.append(pin)
    return tuple(pins)


def _read_port(value: object) -> object:
    if value == "auto":
        return value
    try:
        port = read_whole_number(value)
    except ValueError:
        raise fault(f"expected a port, got {described(value)}", "write auto or a number from 1 to 65535") from None
    if not 1 <= port <= 65535:
        raise fault(f"{port} is not a port", "write auto or a number from 1 to 65535")
    return port


def _read_host_gpus(value: object) -> object:
    if isinstance(value, list | tuple) and not value:
        raise fault("declares no GPU", "write none, or list at least one GPU")
    if not isinstance(value, list | tuple) and value not in ("auto", "none"):
        raise fault(f"expected GPUs, got {described(value)}", "write auto, none, or a list of {name, memory, count}")
    return value


def _host_gpus_kind(value: object) -> str:
    return "[list]" if isinstance(value, list | tuple) else "[word]"


def _read_model(value: object) -> str:
    text = read_text(value)
    if text.startswith("-"):
        raise fault(f"{text[:60]!r} would be taken for a flag", "begin it with something else than `-`")
    return text


def _read_names(value: object) -> object:
    return (_read_model(value),) if isinstance(value, str) else value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class DeclaredGpu(_Strict):
    """GPUs that are not there: the simulator runs on them, and plans can be tried for them."""

    name: Text = Field(description="What the GPU is called, such as H100-80GB.")
    memory: SizeMib = Field(gt=0, description="Memory of one of them.")
    count: WholeNumber = Field(default=1, ge=1, le=1024, description="How many of them.")


class HostSpec(_Strict):
    """What the file says about the machine as a whole."""

    gpus: Annotated[
        Annotated[Literal["auto", "none"], Tag("[word]")] | Annotated[tuple[DeclaredGpu, ...], Tag("[list]")],
        Discriminator(_host_gpus_kind),
        BeforeValidator(_read_host_gpus),
    ] = Field(
        default="auto",
        description="auto: the GPUs that NVML shows; none: use no GPU; a list: simulated GPUs.",
    )
    headroom: SizeMib = Field(default=0, description="Memory of each GPU that is never given to an engine.")
    exclude: Annotated[tuple[int | str, ...], BeforeValidator(_gpu_list)] = Field(
        default=(), description="GPUs (index or UUID) on which nothing new is started."
    )
    ports: PortRange = Field(default="8000-8999", description="Where `port: auto` takes its ports from.")
    bind: Text = Field(default="127.0.0.1", description="The address engines listen on.")


class EngineSpec(_Strict):
    """One entry of ``engines:``: an inference engine and how many replicas of it shall run."""

    model: Annotated[str | None, BeforeValidator(_read_model)] = Field(
        default=None, description="A model's name on the Hugging Face hub, or a folder."
    )
    runtime: Literal["vllm", "simulator", "command"] = Field(
        default="vllm",
        description="vllm: vLLM's OpenAI server; simulator: the bundled look-alike; command: yours.",
    )
    command: Annotated[tuple[str, ...] | None, BeforeValidator(_read_command)] = Field(
        default=None, description="For runtime: command. {model} {host} {port} {name} are filled in."
    )
    python: Text | None = Field(default=None, description="The Python that has vLLM; default: our own.")
    replicas: WholeNumber = Field(default=1, ge=0, le=10000, description="How many run; 0 keeps the entry only.")
    device: Literal["cuda", "cpu"] = Field(default="cuda", description="cpu: the engine sees no GPU.")
    tensor_parallel_size: WholeNumber = Field(default=1, ge=1, le=1024, description="GPUs that share each layer.")
    pipeline_parallel_size: WholeNumber = Field(default=1, ge=1, le=1024, description="Stages the layers are cut into.")
    data_parallel_size: WholeNumber = Field(default=1, ge=1, le=1024, description="Copies inside one server.")
    gpus: Annotated[Literal["auto"] | tuple[int | str, ...], BeforeValidator(_read_gpus)] = Field(
        default="auto", description="auto, or the only GPUs (index or UUID) that may be used."
    )
    memory: MemoryRequest = Field(
        default=Memory("auto"), validate_default=True, description="Memory on each GPU: auto, 24GiB or 30%."
    )
    port: Annotated[Literal["auto"] | int, BeforeValidator(_read_port)] = Field(
        default="auto", description="auto, or the port of replica 0; replica 1 takes the next one, and so on."
    )
    served_model_name: Annotated[
        tuple[Annotated[str, BeforeValidator(_read_model)], ...], BeforeValidator(_read_names)
    ] = Field(
        default=(),
        description="The name, or names, by which clients ask for the model; default: the engine's name.",
    )
    args: Annotated[dict[str, Any], BeforeValidator(_read_flags)] = Field(
        default_factory=dict,
        description="vLLM's own flags: true is --flag, false is --no-flag, a list is many words.",
    )
    env: Annotated[dict[str, str], BeforeValidator(_read_env)] = Field(
        default_factory=dict, description="Environment variables; values are never shown."
    )
    env_file: Text | None = Field(default=None, description="A file of NAME=value lines, relative to engines.yaml.")
    priority: WholeNumber = Field(default=0, ge=-1000000, le=1000000, description="Higher is placed first.")
    startup_timeout: Seconds = Field(default=1800.0, gt=0, description="How long it may take to become ready.")
    stop_timeout: Seconds = Field(default=30.0, ge=0, description="How long it may take to end after SIGTERM.")

    @property
    def gpu_count(self) -> int:
        """GPUs that one replica takes: tensor × pipeline × data parallel; 0 on CPU."""
        ranks = self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size
        return ranks if self.device == "cuda" else 0

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
        if self.device == "cpu" and self.gpus != "auto":
            raise fault("`gpus` are listed, but `device: cpu` uses none", "remove one of the two", field="gpus")
        if self.device == "cpu" and self.memory.kind == "percent":
            raise fault("a share of a GPU means nothing with `device: cpu`", "write a size, or auto", field="memory")
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
    "port": Effect.PLACE,
    "served_model_name": Effect.RESTART,
    "args": Effect.RESTART,
    "env": Effect.RESTART,
    "env_file": Effect.NOTHING,  # its contents count, through their marks, not its name
    "priority": Effect.NOTHING,
    "startup_timeout": Effect.NOTHING,
    "stop_timeout": Effect.NOTHING,
}
"""What a change of each field does. A test fails when a field is missing here."""


class FileSpec(_Strict):
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

    def engine(self, name: str) -> Engine | None:
        """The engine of that name, or None."""
        return next((engine for engine in self.engines if engine.name == name), None)
