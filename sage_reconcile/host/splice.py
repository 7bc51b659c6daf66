"""One value put into, or taken out of, the text of a YAML file; not a character of the rest is touched.

The text is not written anew from its data. ruamel.yaml tells where everything stands, and only what changes is cut
out or let in: so comments, order, quotes, anchors, blank lines, indentation and line ends are as they were. Whether the
text then means what was asked is for ``edits`` to see: it has it read by the ordinary reader.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode

from sage_reconcile.core.changes import PRUNED
from sage_reconcile.core.source import Route
from sage_reconcile.errors import EditRefused
from sage_reconcile.host.yaml_text import in_brackets, in_lines, in_quotes, on_a_line

_MERGE = "tag:yaml.org,2002:merge"
_ANCHOR = re.compile(r"&[^\s,\[\]{}]+\s+")


def put(text: str, route: Route, value: object, remark: str = "") -> str:
    """The text with a value at a route; maps on the way that are not there are made.

    ``remark`` is a comment for the line of the value. One that an earlier call left there is taken away.

    Raises:
        EditRefused: the place cannot be found in the text.
    """
    before = _Layout(text)
    old = "" if before.find(route) is None else before.remark(route)
    text = before.put(route, value)
    if remark != old:
        text = _Layout(text).remarked(route, old, remark)
    return text


def take(text: str, route: Route) -> str:
    """The text without the key at a route; what is inside it goes with it, comments included.

    Raises:
        EditRefused: the place cannot be found in the text.
    """
    return _Layout(text).take(route)


def remark(text: str, route: Route) -> str:
    """What ``put`` was given as a remark for this value; empty where there is none."""
    layout = _Layout(text)
    return layout.remark(route) if layout.find(route) else ""


def without(text: str, routes: Sequence[Route], hidden: str) -> str:
    """The text with the values at these routes hidden, to be shown; routes that are not there are passed over."""
    layout = _Layout(text)
    spans = sorted({span for route in routes if (span := layout.span(route))}, reverse=True)
    for begin, end in spans:
        text = f"{text[:begin]}{hidden}{text[end:]}"
    return text


class _Pair:
    """A key of a map with its value, and the map that it is in."""

    def __init__(self, parent: MappingNode, key: Node, value: Node) -> None:
        self.parent, self.key, self.value = parent, key, value
        self.after: int = key.end_mark.index

    @property
    def is_alias(self) -> bool:
        """Whether ``*name`` stands there; the parser puts the node that it names in its place."""
        return bool(self.value.start_mark.index < self.after)


class _Layout:
    """A text and where everything in it stands."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.line_end = "\r\n" if "\r\n" in text else "\n"
        try:
            root = YAML(typ="safe", pure=True).compose(text)
        except YAMLError as error:
            raise EditRefused(f"the file cannot be taken apart for the edit ({error}); edit it by hand") from None
        if not isinstance(root, MappingNode):
            raise EditRefused("the file is no map; edit it by hand")
        self.root = root

    # Looking

    def find(self, route: Route) -> _Pair | None:
        """The key at a route, where it is written there itself: not through an alias or a merge."""
        node: Node = self.root
        pair: _Pair | None = None
        for step in route:
            if not isinstance(node, MappingNode) or (pair and pair.is_alias):
                return None
            pair = _own(node, str(step))
            if pair is None:
                return None
            node = pair.value
        return pair

    def span(self, route: Route) -> tuple[int, int] | None:
        """Where the value at a route is written, without an anchor before it."""
        pair = self.find(route)
        return (self._begin(pair), self._end(pair.value, pair.after)) if pair else None

    def remark(self, route: Route) -> str:
        pair = self.find(route)
        place = self._remark_place(pair) if pair else None
        found = re.search(r"# (was \d+)[ \t]*$", self.text[place[0] : place[1]]) if place else None
        return found[1] if found else ""

    def _begin(self, pair: _Pair) -> int:
        if pair.is_alias:
            return self._alias_end(pair.value, pair.after) - len(pair.value.anchor) - 1
        begin: int = pair.value.start_mark.index
        anchor = _ANCHOR.match(self.text, begin) if pair.value.anchor else None
        return anchor.end() if anchor else begin

    def _end(self, node: Node, after: int) -> int:
        """Where the text of a node ends. The parser's mark of a block is behind the comments that follow it."""
        begin, end = int(node.start_mark.index), int(node.end_mark.index)
        if begin < after:
            return self._alias_end(node, after)
        if isinstance(node, ScalarNode):
            return begin + len(self.text[begin:end].rstrip()) if node.style in ("|", ">") else end
        if not _is_block(node) or not node.value:
            return end
        if isinstance(node, MappingNode):
            key, value = node.value[-1]
            return self._end(value, key.end_mark.index)
        before = begin if len(node.value) == 1 else self._end(node.value[-2], begin)
        return self._end(node.value[-1], before)

    def _alias_end(self, node: Node, after: int) -> int:
        found = re.compile(rf"\*{re.escape(node.anchor or '')}").search(self.text, after)
        if found is None:
            raise EditRefused(f"the alias of `&{node.anchor}` cannot be found; edit the file by hand")
        return found.end()

    def _line(self, at: int) -> tuple[int, int]:
        """Where the line around a place begins and ends, without its line end."""
        end = self.text.find("\n", at)
        end = len(self.text) if end < 0 else end
        end -= self.text[end - 1 : end] == "\r"
        return self.text.rfind("\n", 0, at) + 1, max(at, end)

    def _block_end(self, at: int, column: int) -> int:
        """The end of the line, and of lines below it that are only comments and belong further in."""
        _, end = self._line(at)
        while (following := re.compile(r"\r?\n([ \t]*)#").match(self.text, end)) and len(following[1]) > column:
            _, end = self._line(following.end())
        return end

    # Putting in

    def put(self, route: Route, value: object) -> str:
        node = self.root
        for depth, step in enumerate(route):
            pair = _own(node, str(step))
            rest = route[depth + 1 :]
            if pair is None:
                return self._insert(node, str(step), _nested(rest, value))
            if not rest:
                return self._replace(pair, value)
            if pair.is_alias and isinstance(pair.value, MappingNode):
                begin, end = self._begin(pair), self._end(pair.value, pair.after)
                more = "".join(
                    f", {in_brackets(key)}: {in_brackets(item)}" for key, item in _nested(rest, value).items()
                )
                return f"{self.text[:begin]}{{<<: {self.text[begin:end]}{more}}}{self.text[end:]}"
            if not isinstance(pair.value, MappingNode) or not pair.value.value:
                return self._replace(pair, _nested(rest, value))
            node = pair.value
        raise EditRefused("the file itself cannot be replaced")

    def _replace(self, pair: _Pair, value: object) -> str:
        begin, end = self._begin(pair), self._end(pair.value, pair.after)
        in_block = not pair.parent.flow_style
        was_block = not pair.is_alias and _is_block(pair.value)
        gap = self.text[pair.after : begin]
        if in_block and isinstance(value, Mapping) and value and not was_block:
            head = self.text[:begin].rstrip(" ")
            _, line_end = self._line(end)
            column = pair.key.start_mark.column
            lines = self._block(value, column + self._step(pair.parent), pair.parent)
            rest = self.text[end:line_end].rstrip()
            return f"{head}{rest}{self.line_end}{lines}{self.text[line_end:]}"
        if was_block and isinstance(value, list | tuple) and value and not isinstance(pair.value, MappingNode):
            indent = self.line_end + " " * pair.value.start_mark.column
            written = indent.join(f"- {in_brackets(item)}" for item in value)
        elif was_block and isinstance(value, Mapping) and value and isinstance(pair.value, MappingNode):
            written = self._block(value, self._column(pair.value), pair.parent).lstrip(" ")
        else:
            written = self._inline(value, pair, in_block=in_block)
            if was_block and "#" not in gap:
                begin = pair.after + gap.index(":") + 1
                written = f" {written}"
        return f"{self.text[:begin]}{written}{self.text[end:]}"

    def _inline(self, value: object, pair: _Pair, *, in_block: bool) -> str:
        style = None if pair.is_alias else getattr(pair.value, "style", None)
        if isinstance(value, str) and style in ("'", '"'):
            return in_quotes(value, style)
        return on_a_line(value) if in_block else in_brackets(value, _quoted(pair.parent))

    def _block(self, value: Mapping[str, object], column: int, near: MappingNode) -> str:
        return self.line_end.join(in_lines(value, column, self._step(near)))

    def _insert(self, node: MappingNode, name: str, value: object) -> str:
        key, last = node.value[-1]
        end = self._end(last, key.end_mark.index)
        if node.flow_style:
            quoted = _quoted(node)
            written = f", {in_brackets(name, quoted)}: {in_brackets(value, quoted)}"
            return f"{self.text[:end]}{written}{self.text[end:]}"
        column = self._column(node)
        at = self._block_end(end, column)
        blank = self.line_end if isinstance(value, Mapping) and self._is_spaced(node) else ""
        lines = self._block({name: value}, column, node)
        return f"{self.text[:at]}{self.line_end}{blank}{lines}{self.text[at:]}"

    def _is_spaced(self, node: MappingNode) -> bool:
        """Whether the last entry of a map has an empty line before it, or before its comments."""
        if len(node.value) < 2:
            return False
        begin, _ = self._line(node.value[-1][0].start_mark.index)
        above = re.search(r"((?:^|\n)[ \t]*\r?\n)(?:[ \t]*#[^\n]*\n)*\Z", self.text[:begin])
        return above is not None

    def _column(self, node: MappingNode) -> int:
        return int(node.value[0][0].start_mark.column)

    def _step(self, near: MappingNode) -> int:
        """How far the file indents: as below a key of this map, else as anywhere."""
        for node in (near, *self._maps(self.root)):
            for pair in _pairs(node):
                inner = pair.value
                if isinstance(inner, MappingNode) and not (inner.flow_style or node.flow_style or pair.is_alias):
                    return self._column(inner) - self._column(node)
        return 2

    def _maps(self, node: MappingNode) -> Iterator[MappingNode]:
        yield node
        for pair in _pairs(node):
            if isinstance(pair.value, MappingNode) and not pair.is_alias:
                yield from self._maps(pair.value)

    # Taking out

    def take(self, route: Route) -> str:
        pair = self.find(route)
        if pair is None:
            name = ".".join(map(str, route))
            raise EditRefused(f"{name} is not written in the place itself (an alias or a merge); edit it by hand")
        if len(pair.parent.value) == 1:
            return self.take(route[:-1]) if len(route) > PRUNED else self._empty(route, pair)
        end = self._end(pair.value, pair.after)
        if pair.parent.flow_style:
            return self._take_from_flow(pair, end)
        column = pair.key.start_mark.column
        begin, _ = self._line(pair.key.start_mark.index)
        if self.text[begin : pair.key.start_mark.index].strip(" "):
            raise EditRefused(f"{'.'.join(map(str, route))} does not begin its line; edit the file by hand")
        return self._without_lines(begin, self._block_end(end, column))

    def _without_lines(self, begin: int, end: int) -> str:
        """The text without whole lines; of empty lines before and after them one is left."""
        following = re.compile(r"\r?\n").match(self.text, end)
        head, tail = self.text[:begin], self.text[following.end() :] if following else ""
        if re.search(r"\n[ \t]*\r?\n\Z", head) and (not tail or re.match(r"[ \t]*\r?\n", tail)):
            head = re.sub(r"[ \t]*\r?\n\Z", "", head)
        if following is None and not tail:
            head = re.sub(r"\r?\n\Z", "", head)  # it had no line end at its end, and has none now
        return head + tail

    def _take_from_flow(self, pair: _Pair, end: int) -> str:
        pairs = list(_pairs(pair.parent))
        at = next(index for index, other in enumerate(pairs) if other.key is pair.key)
        if at:
            before = pairs[at - 1]
            return self.text[: self._end(before.value, before.after)] + self.text[end:]
        return self.text[: pair.key.start_mark.index] + self.text[pairs[1].key.start_mark.index :]

    def _empty(self, route: Route, pair: _Pair) -> str:
        """The text with ``{}`` in place of a map whose only key goes."""
        above = self.find(route[:-1])
        if above is None:
            raise EditRefused("nothing would be left of the file")
        end = self._end(pair.value, pair.after)
        if pair.parent.flow_style:
            return f"{self.text[: pair.key.start_mark.index]}{self.text[end:]}"
        begin, _ = self._line(pair.key.start_mark.index)
        colon = self.text.index(":", above.after) + 1
        rest = self._without_lines(begin, self._block_end(end, pair.key.start_mark.column))
        return f"{rest[:colon]} {{}}{rest[colon:]}"

    # Remarks

    def _remark_place(self, pair: _Pair) -> tuple[int, int] | None:
        """From the end of what stands in the line of a value to the line's end; None where others stand there too."""
        end = self._end(pair.value, pair.after)
        _, line_end = self._line(end)
        if pair.parent.flow_style:
            begin, map_end = pair.parent.start_mark.index, pair.parent.end_mark.index
            if "\n" in self.text[begin:map_end]:
                return None
            end = map_end
        rest = self.text[end:line_end].strip(" \t")
        return (end, line_end) if not rest or rest.startswith("#") else None

    def remarked(self, route: Route, old: str, new: str) -> str:
        pair = self.find(route)
        place = self._remark_place(pair) if pair else None
        if place is None:
            return self.text
        rest = self.text[place[0] : place[1]]
        if old:
            rest = re.sub(rf"[ \t]*# {re.escape(old)}[ \t]*$", "", rest)
        if new:
            rest = f"{rest.rstrip()}  # {new}"
        return self.text[: place[0]] + rest + self.text[place[1] :]


def _is_block(node: Node) -> bool:
    """Whether it is a map or a list without brackets."""
    return isinstance(node, CollectionNode) and not node.flow_style


def _pairs(node: MappingNode) -> Iterator[_Pair]:
    yield from (_Pair(node, key, value) for key, value in node.value)


def _own(node: MappingNode, name: str) -> _Pair | None:
    return next((pair for pair in _pairs(node) if pair.key.value == name and str(pair.key.tag) != _MERGE), None)


def _nested(route: Route, value: object) -> Any:  # noqa: ANN401 - the data of a file is anything
    for step in reversed(route):
        value = {str(step): value}
    return value


def _quoted(node: MappingNode) -> bool:
    """Whether a map is written as JSON."""
    return bool(node.value) and node.value[-1][0].style == '"'
