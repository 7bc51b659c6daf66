"""vLLM's flags as a program gives them, as values of the field ``args``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sage_reconcile.errors import EditRefused


def literal(value: str) -> str:
    """Text that comes from a program means itself: nothing in it is taken from the environment."""
    return value.replace("$", "$$")


def flags(
    extra_args: Sequence[str] | Mapping[str, object] | None, read: Callable[[str], object]
) -> list[tuple[str, object]]:
    """vLLM's flags as paths and values: from a map, or from words as on a command line.

    Raises:
        EditRefused: a word belongs to no flag.
    """
    if isinstance(extra_args, Mapping):
        return [(f"args.{name}", _literal_of(value)) for name, value in extra_args.items()]
    found: dict[str, list[str]] = {}
    flag = ""
    for word in extra_args or ():
        if word.startswith("--") and len(word) > 2:
            flag, equals, value = word[2:].partition("=")
            found.setdefault(flag, []).extend([value] if equals else [])
        elif flag:
            found[flag].append(word)
        else:
            raise EditRefused(f"{word!r} of `extra_args` belongs to no flag; write it as --flag, or --flag value")
    return [(f"args.{flag}", _words(words, read)) for flag, words in found.items()]


def _words(words: Sequence[str], read: Callable[[str], object]) -> object:
    values = [_literal_of(read(word)) for word in words]
    return True if not values else values[0] if len(values) == 1 else values


def _literal_of(value: object) -> object:
    match value:
        case str():
            return literal(value)
        case Mapping():
            return {str(key): _literal_of(item) for key, item in value.items()}
        case list() | tuple():
            return [_literal_of(item) for item in value]
    return value
