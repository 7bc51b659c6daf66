from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import PydanticCustomError

from sage_reconcile.core.units import (
    Memory,
    described,
    mib_text,
    read_memory,
    read_port_range,
    read_seconds,
    read_text,
    read_whole_number,
    size_mib,
)


def refused(read: Callable[[object], object], value: object) -> tuple[str, str]:
    with pytest.raises(PydanticCustomError) as caught:
        read(value)
    context = caught.value.context or {}
    return context["what"], context["fix"]


@pytest.mark.parametrize(
    ("written", "mib"),
    [
        ("24GiB", 24 * 1024),
        ("24Gi", 24 * 1024),
        ("24G", 24 * 1024),
        ("24gib", 24 * 1024),
        (" 24 GiB ", 24 * 1024),
        ("1TiB", 1024 * 1024),
        ("500MiB", 500),
        ("1KiB", 1),
        ("1024KiB", 1),
        ("1025KiB", 2),
        ("0GiB", 0),
        ("1GB", 954),  # 1000³ bytes, rounded up
        ("24GB", 22889),
        ("39.9GiB", 40858),
        ("40.1GiB", 41063),
        ("0.1GiB", 103),
    ],
)
def test_sizes_are_read_exactly_and_rounded_up(written: str, mib: int) -> None:
    assert size_mib(written) == mib


@pytest.mark.parametrize(
    "written", ["24", 24, 24.5, True, None, [], "24 bananas", "GiB", "-1GiB", "24GiBs", "1e3GiB", ""]
)
def test_what_is_no_size_is_refused_with_an_example(written: object) -> None:
    what, fix = refused(size_mib, written)
    assert what == f"expected a size, got {described(written)}"
    assert fix == "write a size with its unit, such as 24GiB"


@given(st.integers(min_value=1, max_value=1 << 30))
def test_a_size_that_is_shown_reads_as_itself(mib: int) -> None:
    assert size_mib(mib_text(mib)) == mib


def test_memory_is_auto_a_size_or_a_share() -> None:
    assert read_memory("auto") == Memory("auto")
    assert read_memory("24GiB") == Memory("mib", 24 * 1024)
    assert read_memory("30%") == Memory("percent", 30)
    assert read_memory("12.5 %") == Memory("percent", 12.5)
    assert read_memory("100%") == Memory("percent", 100)
    assert [str(read_memory(text)) for text in ("auto", "24GiB", "24500MiB", "12.5%")] == [
        *("auto", "24GiB", "24500MiB", "12.5%")
    ]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("0%", "0% of a GPU is impossible"),
        ("100.1%", "100.1% of a GPU is impossible"),
        ("0GiB", "no memory at all is impossible"),
        ("24", "expected a size, got the text '24'"),
        (0.9, "expected a size, got the number 0.9"),
        ("automatic", "expected a size, got the text 'automatic'"),
    ],
)
def test_impossible_memory_is_refused(written: object, message: str) -> None:
    assert refused(read_memory, written)[0] == message


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("90s", 90),
        ("5m", 300),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("2d", 172800),
        ("500ms", 0.5),
        (7, 7),
        ("7", 7),
        (0, 0),
    ],
)
def test_durations(written: object, seconds: float) -> None:
    assert read_seconds(written) == seconds


@pytest.mark.parametrize("written", ["soon", "5 minutes", "-5s", -1, True, None, "", "s", "1h30"])
def test_what_is_no_duration_is_refused(written: object) -> None:
    assert refused(read_seconds, written) == (
        f"expected a duration, got {described(written)}",
        "write it as 90s, 5m or 1h30m",
    )


def test_port_ranges() -> None:
    assert read_port_range(" 8000 - 8999 ") == "8000-8999"
    assert read_port_range("1-65535") == "1-65535"
    assert refused(read_port_range, "8000")[0] == "expected a range of ports, got the text '8000'"
    for wrong in ("9-1", "0-10", "1-65536"):
        assert refused(read_port_range, wrong)[0] == f"{wrong} is not a range of ports"


def test_whole_numbers_may_come_as_text_but_not_as_anything_else() -> None:
    assert [read_whole_number(value) for value in (3, "3", " 3 ", "-3", "+3")] == [3, 3, 3, -3, 3]
    for wrong in (True, 2.0, "2.0", "", None, "0x10", "9" * 19):
        assert refused(read_whole_number, wrong)[0] == f"expected a whole number, got {described(wrong)}"


def test_text_is_text() -> None:
    assert read_text("a") == "a"
    assert refused(read_text, 3) == ("expected text, got the number 3", "put it in quotes")
    for nothing in ("", "  ", "a\0b"):
        assert refused(read_text, nothing)[0] == "expected text, got none"


def test_values_are_named_with_their_kind() -> None:
    values = [None, True, 3, "x", [], [1], {}, object()]
    assert [described(value) for value in values] == [
        *(
            "nothing",
            "true (a yes/no value)",
            "the number 3",
            "the text 'x'",
            "an empty list",
            "a list",
            "a map",
            "object",
        )
    ]
    assert len(described("x" * 1000)) < 80
