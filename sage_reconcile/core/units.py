"""Sizes, durations and port ranges as people write them, read exactly.

Every reader raises ``PydanticCustomError`` of type ``fault`` with a ``fix``, so that a wrong value is
reported together with all other faults of the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, GetJsonSchemaHandler, PlainSerializer
from pydantic_core import CoreSchema, PydanticCustomError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")
_TOKENS = re.compile(r"(\d{1,12})([kKmM]?)")
MOST_TOKENS = 1 << 40
_BINARY = {"k": 1, "m": 2, "g": 3, "t": 4}
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
MIB = 1 << 20


def fault(what: str, fix: str = "", *, field: str = "", key: str = "") -> PydanticCustomError:
    """The error every reader of the file raises: what is wrong, and what would be right.

    ``field`` names the field to point at where a rule is about several fields, ``key`` the key inside
    the value where only that one is wrong.
    """
    return PydanticCustomError("fault", "{what}", {"what": what, "fix": fix, "field": field, "key": key})


def all_of(found: Sequence[PydanticCustomError]) -> PydanticCustomError:
    """One error that tells several faults of one value, each at its own key."""
    first, *others = (error.context or {} for error in found)
    return PydanticCustomError("fault", "{what}", {**first, "others": others})


def described(value: object) -> str:
    """A value named for an error message, with its kind: ``the number 7``, ``a list``."""
    match value:
        case None:
            return "nothing"
        case bool():
            return f"{str(value).lower()} (a yes/no value)"
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the text {value[:60]!r}"
        case list():
            return "a list" if value else "an empty list"
        case dict():
            return "a map"
    return type(value).__name__


def size_mib(value: object) -> int:
    """A size in MiB, rounded up. ``KiB MiB GiB TiB`` (also ``Gi``, ``G``) are powers of 1024, ``GB`` of 1000.

    Raises:
        PydanticCustomError: it is not a size, has no unit, or is zero.
    """
    example = "write a size with its unit, such as 24GiB"
    if not isinstance(value, str):
        raise fault(f"expected a size, got {described(value)}", example)
    match = _SIZE.fullmatch(value.strip())
    unit = match[2].lower() if match else ""
    if match is None or unit[0] not in _BINARY or unit[1:] not in ("", "i", "ib", "b"):
        raise fault(f"expected a size, got {described(value)}", example)
    power = _BINARY[unit[0]]
    scale: int = 1000**power if unit.endswith("b") and not unit.endswith("ib") else 1024**power
    return math.ceil(round(float(match[1]) * scale / MIB, 6))


def mib_text(mib: int) -> str:
    """MiB as people write it: ``24GiB`` where that is exact, else ``24500MiB``."""
    return f"{mib // 1024}GiB" if mib and mib % 1024 == 0 else f"{mib}MiB"


@dataclass(frozen=True, slots=True)
class Memory:
    """How much of each GPU an engine asks for: an amount, a share of the GPU, or a word.

    ``auto``: what it takes; ``all``: a GPU alone, with all that can be given of it; ``manual``: what the flags say that
    its entry has for vLLM.
    """

    kind: Literal["auto", "all", "manual", "mib", "percent"]
    amount: float = 0

    def __str__(self) -> str:
        if self.kind not in ("mib", "percent"):
            return self.kind
        return mib_text(int(self.amount)) if self.kind == "mib" else f"{self.amount:g}%"

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, object]:
        """How editors should see it: text."""
        return {
            "type": "string",
            "pattern": r"^(auto|all|manual|\d+(\.\d+)?\s*%|\d+(\.\d+)?\s*[KMGTkmgt](i|iB|B|b)?)$",
            "examples": ["auto", "24GiB", "30%", "all"],
        }


_MEMORY_FIX = "write auto, a size such as 24GiB, a share such as 30%, all, or manual"


def read_memory(value: object) -> Memory:
    """``auto``, ``24GiB``, ``30%``, ``all`` or ``manual``.

    Raises:
        PydanticCustomError: it is none of these, or out of range.
    """
    if isinstance(value, Memory):
        return value
    if value in ("auto", "all", "manual"):
        return Memory(value)
    if isinstance(value, str) and (match := _PERCENT.fullmatch(value.strip())):
        percent = float(match[1])
        if not 0 < percent <= 100:
            raise fault(f"{value.strip()} of a GPU is impossible", "write more than 0% and at most 100%")
        return Memory("percent", percent)
    try:
        mib = size_mib(value)
    except PydanticCustomError as error:
        raise fault(str((error.context or {})["what"]), _MEMORY_FIX) from None
    if mib == 0:
        raise fault("no memory at all is impossible", _MEMORY_FIX)
    return Memory("mib", mib)


def read_tokens(value: object) -> int:
    """A number of tokens: ``8192``, or ``32k`` for 32 × 1024, as people name contexts.

    Raises:
        PydanticCustomError: it is none, or out of range.
    """
    match = _TOKENS.fullmatch(str(value).strip()) if isinstance(value, int | str) else None
    count = int(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2].lower()] if match else 0
    if isinstance(value, bool) or not 0 < count < MOST_TOKENS:
        raise fault(f"expected a number of tokens, got {described(value)}", "write it as 8192 or 32k")
    return count


def read_seconds(value: object) -> float:
    """A duration in seconds: ``90s``, ``5m``, ``1h30m``; a plain number counts seconds.

    Raises:
        PydanticCustomError: it is not a duration.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return float(value)
    if isinstance(value, str):
        text = value.strip().replace(" ", "")
        if text.isdecimal():
            return float(text)
        parts = list(_DURATION.finditer(text))
        if parts and "".join(part[0] for part in parts) == text:
            return sum(float(part[1]) * _SECONDS[part[2]] for part in parts)
    raise fault(f"expected a duration, got {described(value)}", "write it as 90s, 5m or 1h30m")


def read_port_range(value: object) -> str:
    """``8000-8999``, normalised.

    Raises:
        PydanticCustomError: it is not a range of TCP ports.
    """
    match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", value) if isinstance(value, str) else None
    if match is None:
        raise fault(f"expected a range of ports, got {described(value)}", "write it as 8000-8999")
    low, high = int(match[1]), int(match[2])
    if not 1 <= low <= high <= 65535:
        raise fault(f"{low}-{high} is not a range of ports", "write two numbers from 1 to 65535, the lower one first")
    return f"{low}-{high}"


def read_whole_number(value: object) -> int:
    """A whole number; digits as text are taken too, since that is what ``${VAR}`` gives.

    Raises:
        PydanticCustomError: it is anything else, ``true`` and ``2.0`` included.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,18}", value.strip()):
        return int(value)
    raise fault(f"expected a whole number, got {described(value)}")


def read_switch(value: object) -> bool:
    """Yes or no; the words as text are taken too, since that is what ``${VAR}`` gives.

    Raises:
        PydanticCustomError: it is anything else.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    raise fault(f"expected true or false, got {described(value)}")


def read_text(value: object) -> str:
    """Text. Numbers and yes/no are refused, since YAML may have changed what was written.

    Raises:
        PydanticCustomError: it is not text, is empty, or holds a NUL.
    """
    if not isinstance(value, str):
        fix = "put it in quotes" if isinstance(value, int | float) else ""
        raise fault(f"expected text, got {described(value)}", fix)
    if not value.strip() or "\0" in value:
        raise fault("expected text, got none", "remove the line or give it a value")
    return value


def _seconds_text(seconds: float) -> str:
    return f"{seconds:g}s"


_DURATION_SCHEMA = {"type": ["string", "number"], "examples": ["90s", "5m", "1h30m"]}


class _Schema:
    """Puts what people may write into the JSON Schema, in place of what it is read into."""

    def __init__(self, schema: dict[str, object]) -> None:
        self.schema = schema

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, object]:
        return dict(self.schema)


SizeMib = Annotated[
    int,
    BeforeValidator(size_mib),
    PlainSerializer(mib_text, return_type=str),
    _Schema(
        {
            "type": "string",
            "pattern": r"^\d+(\.\d+)?\s*[KMGTkmgt](i|iB|B|b)?$",
            "examples": ["24GiB", "500MiB"],
        }
    ),
]
Seconds = Annotated[
    float,
    BeforeValidator(read_seconds),
    PlainSerializer(_seconds_text, return_type=str),
    _Schema(_DURATION_SCHEMA),
]
PortRange = Annotated[
    str,
    BeforeValidator(read_port_range),
    _Schema({"type": "string", "pattern": r"^\d+-\d+$", "examples": ["8000-8999"]}),
]
WholeNumber = Annotated[int, BeforeValidator(read_whole_number)]
Tokens = Annotated[
    int,
    BeforeValidator(read_tokens),
    _Schema({"type": ["integer", "string"], "pattern": r"^\d+[kKmM]?$", "examples": [8192, "32k"]}),
]
Switch = Annotated[bool, BeforeValidator(read_switch)]
Text = Annotated[str, BeforeValidator(read_text)]
MemoryRequest = Annotated[Memory, BeforeValidator(read_memory), PlainSerializer(str, return_type=str)]


def printable(text: str) -> str:
    """A text with everything escaped that a terminal would act on instead of showing it, line ends included."""
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text)
