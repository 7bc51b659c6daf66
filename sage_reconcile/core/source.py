"""A file as it was read, and the words in which its faults are told."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sage_reconcile.core.units import described
from sage_reconcile.errors import Fault

Route = tuple[str | int, ...]
"""The way to a value in the file: ``("engines", "chat", "memory")``."""


@dataclass(frozen=True)
class Source:
    """A file as it was read: plain data, where each value stands (line, column), and its digest.

    ``written`` holds the original text of scalars that YAML read as something else than text.
    """

    data: Mapping[str, object]
    places: Mapping[Route, tuple[int, int]]
    key_places: Mapping[Route, tuple[int, int]]
    written: Mapping[Route, str] = field(default_factory=dict)
    digest: str = ""

    def fault(self, route: Route, message: str, fix: str = "", *, key: bool = False) -> Fault:
        """A fault at a route; where nothing was written there, at the nearest thing above it."""
        line, column = 0, 0
        for places in (self.key_places, self.places) if key else (self.places, self.key_places):
            if route in places:
                line, column = places[route]
                break
        else:
            for end in range(len(route) - 1, -1, -1):
                above = self.key_places.get(route[:end]) or self.places.get(route[:end])
                if above:
                    line, column = above
                    break
        return Fault(line, column, ".".join(str(step) for step in route), message, fix)


def steps_in_file(loc: tuple[int | str, ...]) -> Route:
    """pydantic's place without the names of union branches, which are nothing a user wrote."""
    return tuple(
        step
        for step in loc
        if isinstance(step, int) or not re.search(r"[\[(]|^(int|str|literal|tuple|auto|dict)$", step)
    )


def words(item: Any, written: str | None) -> tuple[str, str]:  # noqa: ANN401 - pydantic's error details
    """What is wrong and what would be right, in the words of the file rather than of the validator."""
    context, given = item.get("ctx") or {}, item.get("input")
    match item["type"]:
        case "fault":
            what = str(context["what"])
            if written is not None and isinstance(given, bool):
                what = what.replace(described(given), f"`{written}`, which YAML reads as {str(given).lower()}")
            return what, str(context["fix"])
        case "missing":
            return f"field `{item['loc'][-1]}` is missing", "add it"
        case "literal_error":
            wanted = str(context.get("expected", "")).replace("'", "")
            close = difflib.get_close_matches(str(given), re.findall(r"[\w.-]+", wanted), n=1)
            return (
                f"expected {wanted}, got {described(given)}",
                f"did you mean `{close[0]}`?" if close else "",
            )
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            word = item["type"].replace("_", " ").replace("than equal", "than or equal to")
            bound = context.get("gt", context.get("ge", context.get("lt", context.get("le"))))
            shown, limit = (f"{number:g}" if isinstance(number, float) else number for number in (given, bound))
            return f"{shown} is impossible", f"write a value {word} {limit}"
        case "dict_type" | "model_type" | "model_attributes_type":
            return f"expected a map, got {described(given)}", ""
        case "tuple_type" | "list_type":
            return f"expected a list, got {described(given)}", ""
    return f"{item['msg']}, got {described(given)}", ""
