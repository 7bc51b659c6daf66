"""The systemd unit of the daemon, as text. Its comments say what each line is for.

What shapes it: the engines are children of the daemon, so they live in its cgroup and keep the sandbox in which they
were started, and they shall outlive it. Nothing may stand here that takes their files away when the daemon ends
(``PrivateTmp``, ``RuntimeDirectory``, ``DynamicUser``, ``RemoveIPC``), and nothing that CUDA, NCCL, torch or what
compiles kernels while a model loads does without.
"""

from __future__ import annotations

from dataclasses import dataclass

UNIT = "sage-reconcile.service"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"


@dataclass(frozen=True, slots=True)
class Service:
    """What is written into a unit. All paths are absolute; ``program`` is a command line that is us.

    ``state_folder`` is empty for the one that systemd makes (``StateDirectory=sage-reconcile``). ``bin_folder`` comes
    first in the ``PATH`` of the engines. ``of_user`` tells that it is for the manager of a user, not of the machine.
    """

    program: tuple[str, ...]
    file: str
    user: str
    state_folder: str = ""
    bin_folder: str = ""
    environment_file: str = "/etc/sage-reconcile/environment"
    of_user: bool = False


def unit_text(service: Service) -> str:
    """The unit, with comments."""
    parts = [_head(service), _running(service), _citizen(service), _INHERITED, _sandbox(service), _install(service)]
    return "\n".join(parts)


def _head(service: Service) -> str:
    mounts = " ".join(_quoted(path) for path in (service.file, service.state_folder) if path)
    system = (
        "# Models are asked for on a hub, and the driver is kept loaded by its daemon where there is one.\n"
        "Wants=network-online.target\n"
        "After=network-online.target nvidia-persistenced.service\n"
    )
    return (
        "# Written by `sage-reconcile systemd install`. Change it with a drop-in, which no later version touches:\n"
        f"# `systemctl {'--user ' if service.of_user else ''}edit {UNIT}`.\n"
        "[Unit]\n"
        "Description=sage-reconcile: the inference engines follow engines.yaml\n"
        f"{'' if service.of_user else system}"
        f"RequiresMountsFor={mounts}\n"
        "# Start it again however often it fails: nothing heals the engines while it is gone.\n"
        "StartLimitIntervalSec=0\n"
    )


def _running(service: Service) -> str:
    program = " ".join(_argument(word) for word in service.program)
    state = f" --state-dir {_argument(service.state_folder)}" if service.state_folder else ""
    own = [service.bin_folder] if service.bin_folder not in ("", *SYSTEM_PATH.split(":")) else []
    path = ":".join([*own, SYSTEM_PATH])
    modprobe = (
        "# Loads the NVIDIA modules and makes /dev/nvidia-uvm, with full rights (+) and where it can (-). Engines\n"
        "# cannot: with NoNewPrivileges the setuid nvidia-modprobe that CUDA calls is powerless.\n"
        "ExecStartPre=+-/bin/sh -c 'if command -v nvidia-modprobe >/dev/null; then nvidia-modprobe -u -c 0; fi'\n"
    )
    folder = "# Its state is /var/lib/sage-reconcile, for its user alone.\nStateDirectory=sage-reconcile\n"
    return (
        "[Service]\n"
        f"{'' if service.of_user else f'User={service.user}' + chr(10)}"
        f"{'' if service.of_user else modprobe}"
        f"ExecStart={program} run --file {_argument(service.file)}{state}\n"
        "# Returns when the pass is over; fails where the file was refused or held back.\n"
        f"ExecReload={program} reload --wait{state}\n"
        f"{'' if service.state_folder else folder + 'StateDirectoryMode=0700' + chr(10)}"
        "# Tools that compile kernels (ninja) stand beside the Python that runs this.\n"
        f"Environment={_quoted('PATH=' + path)}\n"
        "# Variables for engines.yaml, NAME=value: HF_TOKEN, HF_HOME, what ${NAME} stands for. Mode 0600.\n"
        f"EnvironmentFile=-{_escaped(service.environment_file)}\n"
    )


def _citizen(service: Service) -> str:
    oomd = (
        "# Nor does systemd-oomd, which takes whole cgroups: all engines at once.\nManagedOOMPreference=omit\n"
        if not service.of_user
        else ""
    )
    return (
        "# Ready after the first pass; `systemctl status` shows the counts. A pass ends each 30 s at the latest\n"
        "# (sooner where WatchdogSec is shorter), and only the end of a pass feeds the watchdog. Its SIGABRT leaves\n"
        "# in the journal where it hung.\n"
        "Type=notify\n"
        "NotifyAccess=main\n"
        "WatchdogSec=2min\n"
        "# After a crash or the watchdog, also while somebody else holds the lock (75), but not for wrong usage (64).\n"
        "Restart=on-failure\n"
        "RestartSec=2s\n"
        "RestartPreventExitStatus=64\n"
        "TimeoutStopSec=30s\n"
        "\n# The end of the daemon is not the end of the engines: only the daemon is signalled, whatever ends it, and\n"
        '# the next one adopts them. (Hence the "left-over process" of the journal at each start; it is meant.) To\n'
        "# end the engines: `systemctl stop`, then `sage-reconcile down`.\n"
        "KillMode=process\n"
        "# systemd leaves their cgroup alone.\n"
        "Delegate=yes\n"
        "# One engine that the kernel kills for want of memory does not stop the unit.\n"
        "OOMPolicy=continue\n"
        f"{oomd}"
    )


_INHERITED = """\
# Limits that engines inherit: threads of CUDA and NCCL, connections, and pinned memory.
TasksMax=infinity
LimitNOFILE=524288
LimitMEMLOCK=infinity
"""


def _sandbox(service: Service) -> str:
    if service.of_user:
        return _HEAD_OF_SANDBOX + _SECCOMP
    return _HEAD_OF_SANDBOX + _SECCOMP + _MACHINE


_HEAD_OF_SANDBOX = """\
# Confined as far as the engines, which inherit all of this, allow. What is not here, and why:
#   PrivateTmp, DynamicUser, RuntimeDirectory, RemoveIPC: take /tmp and /dev/shm from engines when the daemon ends
#   PrivateDevices           hides GPUs and InfiniBand; so does DeviceAllow=char-nvidia* what is loaded only later
#   ProtectClock             implies a DeviceAllow, and with it hides the GPUs; the clock is out of reach all the same
#   MemoryDenyWriteExecute   breaks torch.compile, Triton and all else that compiles at run time
#   ProtectHome              hides the caches of models and kernels
#   ProtectProc, ProcSubset  hide who else holds GPU memory, ports, and the boot id
#   PrivateUsers             keeps files and devices from groups; PrivateNetwork, IPAddressDeny: engines are servers
"""
_SECCOMP = """\
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
# A `command:` that starts containers of its own (rootless Podman, Apptainer) needs RestrictNamespaces=no.
RestrictNamespaces=yes
# NETLINK: NCCL and Gloo list the network interfaces with it.
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
SystemCallArchitectures=native
# Has pidfd_*, memfd_create, process_vm_readv (NCCL), io_uring_*, mlock, mbind (NUMA). Profilers and debuggers, and
# torch's expandable segments shared between processes, need more: SystemCallFilter=@debug.
SystemCallFilter=@system-service @pkey
SystemCallErrorNumber=EPERM
"""
_MACHINE = """\
# No capability: signals, pidfds and /proc are for the user's own processes, GPUs are open to all (mode 0666).
CapabilityBoundingSet=
# /usr, /boot and /etc are read-only; caches may be anywhere else.
ProtectSystem=full
PrivateMounts=yes
ProtectHostname=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
# What the kernel says of processes that it killed for want of memory is taken from the cgroup's count instead.
ProtectKernelLogs=yes
ProtectControlGroups=yes
"""


def _install(service: Service) -> str:
    return f"[Install]\nWantedBy={'default' if service.of_user else 'multi-user'}.target\n"


def _escaped(text: str) -> str:
    """As a value in which systemd reads specifiers."""
    return text.replace("%", "%%")


def _quoted(text: str) -> str:
    """As one word of a list."""
    text = _escaped(text)
    if not any(character in text for character in " \t\"'\\;#"):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _argument(text: str) -> str:
    """As one word of a command line, in which systemd reads variables too."""
    return _quoted(text.replace("$", "$$"))
