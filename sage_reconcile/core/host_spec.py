"""What ``engines.yaml`` may say of the machine as a whole, under ``host:``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    Tag,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

from sage_reconcile.core.fields import host_gpus_kind, read_bind, read_declared_gpu, read_gpu_list, read_host_gpus
from sage_reconcile.core.gpu_models import MOST, Declared
from sage_reconcile.core.units import PortRange, SizeMib, Switch, Text, WholeNumber, described, fault, read_whole_number

_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")


class Strict(BaseModel):
    """A part of the file: what is not known is refused, and nothing changes once it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class DeclaredGpu(Strict):
    """GPUs that are not there: the simulator runs on them, and plans can be tried for them."""

    name: Text = Field(description="What the GPU is called, such as H100-80GB.")
    memory: SizeMib = Field(default=0, gt=0, description="Memory of one of them; of a known GPU it may be left out.")
    count: WholeNumber = Field(default=1, ge=1, le=MOST, description="How many of them.")

    @model_validator(mode="before")
    @classmethod
    def _in_words(cls, value: object) -> object:
        return read_declared_gpu(value)

    @property
    def declared(self) -> Declared:
        """The same as plain data."""
        return Declared(self.name, self.memory, self.count)


@dataclass(frozen=True, slots=True)
class Guard:
    """How many of the running replicas a new content of the file may stop at once: a share, a count, or any."""

    kind: Literal["percent", "count", "off"]
    amount: float = 0

    def __str__(self) -> str:
        if self.kind == "off":
            return "off"
        return f"{self.amount:g}%" if self.kind == "percent" else f"{self.amount:g}"

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, object]:
        """How editors should see it. YAML 1.1 reads a plain ``off`` as false."""
        share = {"type": "string", "pattern": r"^(off|\d+(\.\d+)?\s*%)$", "examples": ["50%", "off"]}
        return {"anyOf": [share, {"type": "integer", "minimum": 0}, {"const": False}]}


def read_guard(value: object) -> Guard:
    """``50%``, ``3`` or ``off``.

    Raises:
        PydanticCustomError: it is none of these, or out of range.
    """
    if isinstance(value, Guard):
        return value
    if value is False or value == "off":
        return Guard("off")
    fix = "write a share such as 50%, a number of replicas, or off"
    if isinstance(value, str) and (match := _PERCENT.fullmatch(value.strip())):
        percent = float(match[1])
        if percent > 100:
            raise fault(f"{value.strip()} of the running replicas is impossible", "write at most 100%, or off")
        return Guard("percent", percent)
    try:
        count = read_whole_number(value)
    except PydanticCustomError:
        raise fault(f"expected a share, a number or off, got {described(value)}", fix) from None
    if count < 0:
        raise fault(f"{count} replicas is impossible", fix)
    return Guard("count", count)


GuardSetting = Annotated[Guard, BeforeValidator(read_guard), PlainSerializer(str, return_type=str)]


class HostSpec(Strict):
    """What the file says about the machine as a whole."""

    gpus: Annotated[
        Annotated[Literal["auto", "none"], Tag("[word]")] | Annotated[tuple[DeclaredGpu, ...], Tag("[list]")],
        Discriminator(host_gpus_kind),
        BeforeValidator(read_host_gpus),
    ] = Field(
        default="auto",
        description="auto: the GPUs that NVML shows; none: use no GPU; else GPUs that are not there, such as "
        "8xH100-80GB: engines are planned for them, and the simulator runs on them.",
    )
    headroom: SizeMib = Field(default=0, description="Memory of each GPU that is never given to an engine.")
    exclude: Annotated[tuple[int | str, ...], BeforeValidator(read_gpu_list)] = Field(
        default=(), description="GPUs (index or UUID) on which nothing new is started."
    )
    ports: PortRange = Field(default="8000-8999", description="Where `port: auto` takes its ports from.")
    inner_ports: PortRange = Field(
        default="20000-29999", description="Where vLLM's own ports come from, those between its processes."
    )
    bind: Annotated[str, BeforeValidator(read_bind)] = Field(
        default="127.0.0.1", description="The address engines listen on."
    )
    concurrent_starts: WholeNumber = Field(default=8, ge=1, le=10000, description="How many start at one time.")
    guard: GuardSetting = Field(
        default=Guard("percent", 50),
        validate_default=True,
        description="How many of the running replicas an edit may stop for good at once before the daemon wants it "
        "confirmed: a share, a number, or off.",
    )
    offline: Switch = Field(default=False, description="true: no hub of models is asked how large a model is.")

    @property
    def declared(self) -> tuple[Declared, ...]:
        """The GPUs that exist only by declaration; none where those of the machine are meant."""
        return tuple(gpu.declared for gpu in self.gpus if not isinstance(gpu, str))

    @model_validator(mode="after")
    def _ranges_are_apart(self) -> HostSpec:
        """Only where both were chosen: the default gives way (blocks keep clear of ``ports``)."""
        (low, high), (inner_low, inner_high) = (map(int, text.split("-")) for text in (self.ports, self.inner_ports))
        if "inner_ports" in self.model_fields_set and inner_low <= high and low <= inner_high:
            raise fault(
                f"{self.inner_ports} overlaps `ports` ({self.ports}), where engines listen",
                "choose a range apart from it",
                field="inner_ports",
            )
        return self
