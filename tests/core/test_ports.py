"""Leases of ports: whose they are, who gets which, and what is said where there are none left."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sage_reconcile.core.observed import Launch, Life, Observed, Port
from sage_reconcile.core.placement import Refusal
from sage_reconcile.core.ports import Lease, Ports
from sage_reconcile.core.spec import Desired
from tests.reading import desired

NONE: frozenset[str] = frozenset()


def file(engines: str, host: str = "") -> Desired:
    return desired(f"version: 1\nhost: {{gpus: none, {host}}}\ndefaults: {{device: cpu}}\nengines: {{{engines}}}\n")


def launch(replica: str, port: int, inner: range = range(0), life: Life = Life.ALIVE) -> Launch:
    name, _, index = replica.rpartition("/")
    return Launch(replica, name, int(index), {}, {}, (), 0, port, "127.0.0.1", life, 0.0, inner_ports=inner)


def leases(wanted: Desired, *found: Launch, leaving: frozenset[str] = NONE, strangers: tuple[int, ...] = ()) -> list:
    """What every replica of the file that does not stay is given, in the order of the file."""
    ports = Ports(wanted, Observed(launches=found, ports=tuple(Port(port) for port in strangers)), leaving)
    stay = {item.replica for item in found if item.holds and item.id not in leaving}
    before = {item.replica: item for item in found}
    return [
        ports.lease(engine, index, before.get(replica))
        for engine in wanted.engines
        for index, replica in enumerate(engine.replicas())
        if replica not in stay
    ]


def inner(*args: object, **more: object) -> list[range]:
    found = leases(*args, **more)
    assert all(isinstance(item, Lease) for item in found), found
    return [item.inner_ports for item in found]


def test_every_vllm_has_a_block_and_no_other_engine_has_one() -> None:
    wanted = file(
        "a: {model: m, replicas: 2}, s: {model: m, runtime: simulator}, c: {runtime: command, command: x}, "
        "d: {model: m, data_parallel_size: 2}"
    )
    assert inner(wanted) == [range(20000, 20008), range(20008, 20016), range(0), range(0), range(20016, 20018)]


def test_a_lease_is_its_port_and_its_block() -> None:
    found = leases(file("a: {model: m}", "inner_ports: 9500-9600"))
    assert found == [Lease(8000, range(9500, 9508))]
    assert found[0].ports == (8000, *range(9500, 9508))


def test_blocks_that_are_held_are_passed_over_whatever_becomes_of_the_file() -> None:
    """Of an engine that is no longer named, of one that is stopping, and of one that cannot be proven ours."""
    wanted = file("a: {model: m}")
    for life in (Life.ALIVE, Life.INTENT, Life.LEFTOVER, Life.UNPROVEN):
        assert inner(wanted, launch("gone/0", 8000, range(20003, 20011), life)) == [range(20011, 20019)]
    assert inner(wanted, launch("gone/0", 8000, range(20003, 20011), Life.EXITED)) == [range(20000, 20008)]


@pytest.mark.parametrize("stranger", [20000, 20003, 20007])
def test_a_strangers_port_anywhere_in_a_block_moves_it(stranger: int) -> None:
    assert inner(file("a: {model: m}"), strangers=(stranger,)) == [range(stranger + 1, stranger + 9)]
    assert inner(file("a: {model: m}"), strangers=(20008, 19999)) == [range(20000, 20008)]


def test_what_listens_in_a_block_of_ours_is_ours() -> None:
    running = launch("a/0", 8000, range(20000, 20008))
    assert inner(file("a: {model: m}"), running, leaving=frozenset({"a/0"}), strangers=(20000,)) == [
        range(20000, 20008)
    ]


def test_ports_that_entries_name_are_in_no_block() -> None:
    """Also where the entry stands later, or the port is that of a later replica."""
    wanted = file("a: {model: m}, b: {model: m, port: 20004, replicas: 2}")
    assert leases(wanted) == [
        Lease(8000, range(20006, 20014)),
        Lease(20004, range(20014, 20022)),
        Lease(20005, range(20022, 20030)),
    ]


def test_a_port_inside_a_block_that_is_held_is_refused_by_its_holders_name() -> None:
    wanted = file("a: {model: m}, b: {model: m, port: 20004}")
    found = leases(wanted, launch("a/0", 8000, range(20000, 20008)))
    assert found == [Refusal("port 20004 is taken by a/0; choose another, or write `port: auto`")]


def test_the_default_range_gives_way_to_the_ports_engines_listen_on() -> None:
    assert inner(file("a: {model: m}", "ports: 19990-20009")) == [range(20010, 20018)]
    assert inner(file("a: {model: m}", "ports: 20004-20009")) == [range(20010, 20018)]


def test_a_replica_gets_back_the_block_it_had() -> None:
    """As the same start over, or after it ended; though others come before it."""
    wanted = file("b: {model: m}, a: {model: m}")
    for life, leaving in ((Life.ALIVE, frozenset({"a/0"})), (Life.EXITED, NONE)):
        had = launch("a/0", 8005, range(20050, 20058), life)
        assert leases(wanted, had, leaving=leaving)[1] == Lease(8005, range(20050, 20058))
    low = launch("a/0", 8000, range(20000, 20008))
    assert inner(wanted, low, leaving=frozenset({"a/0"})) == [range(20008, 20016), range(20000, 20008)]


@pytest.mark.parametrize(
    ("host", "strangers", "entry"),
    [
        ("", (20053,), "model: m"),
        ("inner_ports: 20000-20055", (), "model: m"),
        ("inner_ports: 20051-29000", (), "model: m"),
        ("", (), "model: m, data_parallel_size: 2"),
    ],
    ids=["a stranger is in it", "the range ends in it", "the range begins in it", "of another size"],
)
def test_a_block_that_does_not_fit_any_more_is_given_up(host: str, strangers: tuple[int, ...], entry: str) -> None:
    wanted = file(f"a: {{{entry}}}", host)
    had = launch("a/0", 8000, range(20050, 20058), Life.EXITED)
    [found] = inner(wanted, had, strangers=strangers)
    assert found.start != 20050
    assert len(found) == (2 if "data" in entry else 8)


def test_the_block_of_one_that_ends_goes_to_another_only_where_there_is_no_other() -> None:
    wanted = file("b: {model: m, replicas: 2}", "inner_ports: 20000-20015")
    ending = launch("a/0", 8000, range(20000, 20008))
    assert inner(wanted, ending, leaving=frozenset({"a/0"})) == [range(20008, 20016), range(20000, 20008)]


def test_with_no_block_left_the_refusal_counts_who_has_the_ports() -> None:
    wanted = file("a: {model: m, replicas: 2}, b: {model: m, port: 20019}", "inner_ports: 20000-20019")
    found = leases(wanted, launch("gone/0", 8000, range(20000, 20004)), strangers=(20012, 9000))
    assert found[0] == Lease(8001, range(20004, 20012))
    assert found[1] == Refusal(
        "no 8 ports in a row are free in 20000-20019 (`host.inner_ports`), which vLLM needs inside: 12 ours, "
        "1 of other programs, 1 kept for `host.ports` and entries that name them; make the range larger"
    )


def test_a_refused_replica_keeps_no_port() -> None:
    wanted = file("a: {model: m}, s: {model: m, runtime: simulator}", "ports: 8000-8000, inner_ports: 9000-9003")
    refused, given = leases(wanted)
    assert isinstance(refused, Refusal)
    assert given == Lease(8000, range(0))


def test_a_smaller_block_still_fits_where_a_larger_one_does_not() -> None:
    wanted = file(
        "a: {model: m}, b: {model: m, data_parallel_size: 2, replicas: 3}, c: {model: m}", "inner_ports: 20000-20011"
    )
    found = leases(wanted, strangers=(20001,))
    assert [item.inner_ports for item in found[:2]] == [range(20002, 20010), range(20010, 20012)]
    assert all(isinstance(item, Refusal) for item in found[2:])


def test_a_thousand_replicas_fill_the_range_without_a_gap() -> None:
    wanted = file("a: {model: m, replicas: 1000}")
    found = inner(wanted)
    assert [item.start for item in found] == list(range(20000, 28000, 8))


def test_unknown_ports_of_an_old_record_are_no_block() -> None:
    old = replace(launch("a/0", 8000, range(0), Life.EXITED))
    assert inner(file("a: {model: m}"), old) == [range(20000, 20008)]
