"""The unit of the daemon: what keeps the engines alive stands in it, and what would take things from them does not."""

from __future__ import annotations

import configparser
import shlex
from dataclasses import replace

import pytest

from sage_reconcile.core.service_unit import Service, unit_text

MACHINE = Service(("/opt/x/bin/sage-reconcile",), "/etc/sage-reconcile/engines.yaml", "alice", bin_folder="/opt/x/bin")
USER = replace(MACHINE, of_user=True, state_folder="/s", environment_file="/u/environment")


def read(service: Service) -> dict[str, dict[str, str]]:
    parser = configparser.ConfigParser(interpolation=None, comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(unit_text(service))  # a key that stands there twice is an error
    return {name: dict(parser[name]) for name in parser.sections()}


@pytest.mark.parametrize("service", [MACHINE, USER], ids=["machine", "user"])
def test_engines_outlive_the_daemon_with_all_they_use(service: Service) -> None:
    unit = read(service)["Service"]
    kept = {"KillMode": "process", "Delegate": "yes", "OOMPolicy": "continue", "Type": "notify"}
    assert kept.items() <= unit.items()
    taken = {"PrivateTmp", "RuntimeDirectory", "DynamicUser", "RemoveIPC", "PrivateIPC", "PrivateUsers", "ExecStopPost"}
    hidden = {
        "PrivateDevices",
        "DevicePolicy",
        "DeviceAllow",
        "ProtectClock",
        "ProtectHome",
        "ProtectProc",
        "ProcSubset",
    }
    broken = {"MemoryDenyWriteExecute", "PrivateNetwork", "IPAddressDeny", "ReadOnlyPaths", "MemoryMax", "LimitAS"}
    assert not (taken | hidden | broken) & set(unit)
    assert unit["LimitMEMLOCK"] == unit["TasksMax"] == "infinity"


def test_it_is_started_again_after_a_failure_but_not_when_it_was_ended() -> None:
    unit = read(MACHINE)
    assert unit["Service"]["Restart"] == "on-failure"
    assert unit["Service"]["WatchdogSec"] == "2min"
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"


def test_a_units_lines_are_the_machines_or_the_users() -> None:
    machine, user = read(MACHINE), read(USER)
    assert machine["Service"]["User"] == "alice"
    assert machine["Service"]["StateDirectory"] == "sage-reconcile"
    assert machine["Service"]["ExecStart"] == "/opt/x/bin/sage-reconcile run --file /etc/sage-reconcile/engines.yaml"
    assert machine["Service"]["ExecReload"] == "/opt/x/bin/sage-reconcile reload --wait"
    assert machine["Install"]["WantedBy"] == "multi-user.target"
    assert user["Service"]["ExecStart"].endswith(" run --file /etc/sage-reconcile/engines.yaml --state-dir /s")
    assert user["Service"]["ExecReload"].endswith(" reload --wait --state-dir /s")
    assert user["Install"]["WantedBy"] == "default.target"
    refused = {"User", "CapabilityBoundingSet", "ExecStartPre", "StateDirectory", "ProtectSystem", "ProtectKernelLogs"}
    assert not refused & set(user["Service"]), "what a user's manager may not do fails the start"
    assert refused <= set(machine["Service"])
    assert user["Unit"].keys() == {"Description", "RequiresMountsFor", "StartLimitIntervalSec"}


def test_odd_paths_reach_the_daemon_as_they_are() -> None:
    odd = replace(MACHINE, file='/a b/50%/$x/"q"/engines.yaml', state_folder="/s t", bin_folder="/b n")
    unit = read(odd)
    words = shlex.split(unit["Service"]["ExecStart"])
    assert [word.replace("%%", "%").replace("$$", "$") for word in words[1:]] == [
        *("run", "--file", '/a b/50%/$x/"q"/engines.yaml', "--state-dir", "/s t")
    ]
    assert words[3].count("%%") == words[3].count("$$") == 1
    assert shlex.split(unit["Service"]["Environment"])[0].startswith("PATH=/b n:")
    mounts = shlex.split(unit["Unit"]["RequiresMountsFor"])
    assert mounts == ['/a b/50%%/$x/"q"/engines.yaml', "/s t"], "nothing reads variables there"


def test_a_folder_of_the_system_stands_in_the_path_once() -> None:
    path = read(replace(MACHINE, bin_folder="/usr/bin"))["Service"]["Environment"]
    assert path.split(":").count("/usr/bin") == 1


def test_comments_tell_what_each_part_is_for_within_the_width_of_a_page() -> None:
    for service in (MACHINE, USER):
        lines = unit_text(service).splitlines()
        assert max(map(len, lines)) <= 120
        assert not [n for n, line in enumerate(lines[1:], 1) if not line and not lines[n - 1]], "two empty lines"
