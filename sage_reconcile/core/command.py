"""The command line and the environment of an engine. The only room that knows vLLM's flags."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence

from sage_reconcile.core.fields import CPU_KV_SPACE
from sage_reconcile.core.observed import Gpu
from sage_reconcile.core.promise import utilization
from sage_reconcile.core.spec import EngineSpec

DRAIN_MARGIN_S = 5
"""vLLM is given this much less time to drain than we wait before SIGKILL, so that it ends by itself."""
SCRUBBED = (
    *("VLLM_PORT", "VLLM_DP_MASTER_PORT", "VLLM_HOST_IP", "HOST_IP", CPU_KV_SPACE),
    *("SAGE_RECONCILE_FILE", "SAGE_RECONCILE_STATE_DIR", "STATE_DIRECTORY"),
    *("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "FDSTORE"),
    *("INVOCATION_ID", "JOURNAL_STREAM", "SYSTEMD_EXEC_PID", "CREDENTIALS_DIRECTORY"),
)
"""Inherited variables that would mislead an engine: vLLM takes VLLM_PORT for a base of its inner ports."""
_GROUP_PORTS = ("master-port", "data-parallel-rpc-port")
"""Flags with the ports at which data-parallel ranks meet, in the order of the block; vLLM 0.18 has both."""
_FAR_RANKS = {
    *("nnodes", "node-rank", "master-addr", "data-parallel-address", "data-parallel-size-local"),
    *("data-parallel-rank", "data-parallel-start-rank"),
}
"""Flags of a group with ranks on other machines, which must agree on its ports: there we set none."""


def command_line(
    spec: EngineSpec,
    engine_name: str,
    *,
    python: str,
    bind: str,
    port: int,
    gpus: Sequence[Gpu],
    memory_mib: int,
    kv_bytes: int = 0,
    inner_ports: Sequence[int] = (),
) -> tuple[str, ...]:
    """The exact words with which a replica is started.

    ``python`` is used where the entry names none. Of several GPUs the smallest decides the utilisation. ``kv_bytes``
    fix the size of the KV cache; 0 leaves it to vLLM, which takes what is left.
    """
    if spec.runtime == "command":
        fields = {"model": spec.model or "", "host": bind, "port": str(port), "name": engine_name}
        return tuple(word.format(**fields) for word in spec.command or ())
    module = "vllm.entrypoints.openai.api_server" if spec.runtime == "vllm" else "sage_reconcile.simulator"
    words = [spec.python or python, "-m", module, "--model", spec.model or "", "--host", bind, "--port", str(port)]
    words += ["--served-model-name", *spec.served_model_name]
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if getattr(spec, name) > 1:
            words += [f"--{name.replace('_', '-')}", str(getattr(spec, name))]
    if gpus and spec.memory.kind != "manual":
        share = min(utilization(spec, memory_mib, gpu) for gpu in gpus)
        words += ["--gpu-memory-utilization", f"{share:.6f}".rstrip("0").rstrip(".")]
    if kv_bytes:
        words += ["--kv-cache-memory-bytes", str(kv_bytes)]
    if spec.context is not None:
        words += ["--max-model-len", str(spec.context)]
    words += ["--shutdown-timeout", str(max(0, math.floor(spec.stop_timeout) - DRAIN_MARGIN_S))]
    if inner_ports and spec.data_parallel_size > 1 and not _FAR_RANKS & spec.args.keys():
        for flag, inner in zip(_GROUP_PORTS, inner_ports, strict=True):
            words += () if flag in spec.args else (f"--{flag}", str(inner))
    for flag, value in spec.args.items():
        words += _flag(flag, value)
    return tuple(words)


def inner_port_count(spec: EngineSpec) -> int:
    """How many ports vLLM is given beside the one it listens on, for what its processes open between them.

    Read in vLLM 0.32: ``utils/network_utils.py``, ``config/parallel.py``, ``v1/executor``, ``v1/engine/utils.py``.

    One data-parallel rank: 8. From ``VLLM_PORT`` upwards it takes the first port that it can bind, and up to 0.31 it
    does so once, for the workers' rendezvous (later ones meet in a file). A port is passed over for a minute after
    its connections were closed (TIME_WAIT), so a few more starts in that minute find one too.

    Several: 2, for ``--master-port`` and ``--data-parallel-rpc-port``. ``VLLM_PORT`` is not for them: every rank
    would take the first free port from the same base, at the same moment (vllm#43206), and asking for a list of
    ports went round for ever (vllm#36191).
    """
    if spec.runtime != "vllm":
        return 0
    return 8 if spec.data_parallel_size == 1 else len(_GROUP_PORTS)


def inner_base(spec: EngineSpec, inner_ports: Sequence[int]) -> int | None:
    """What ``VLLM_PORT`` shall be; None where it must not be set.

    Connectors that hand the KV cache over may ask for several ports before they bind one (MoRI-IO does), and with
    ``VLLM_PORT`` would be told the same one each time.
    """
    if not inner_ports or spec.data_parallel_size > 1 or any(x.startswith("kv-transfer-config") for x in spec.args):
        return None
    return inner_ports[0]


def _flag(flag: str, value: object) -> Iterator[str]:
    """``true`` is ``--flag``, ``false`` ``--no-flag``, a list several words, a map JSON; nothing is nothing."""
    match value:
        case None:
            return
        case True:
            yield f"--{flag}"
        case False:
            yield f"--no-{flag}"
        case list() | tuple():
            yield f"--{flag}"
            yield from (item if isinstance(item, str) else json.dumps(item) for item in value)
        case Mapping():
            yield from (f"--{flag}", json.dumps(value))
        case str() if value.startswith("-"):
            yield f"--{flag}={value}"  # as a word of its own it would be taken for a flag
        case _:
            yield from (f"--{flag}", str(value))


def environment(
    inherited: Mapping[str, str],
    overlay: Mapping[str, str],
    gpus: Sequence[Gpu],
    inner_base: int | None = None,
    kv_space_gib: int = 0,
) -> dict[str, str]:
    """The environment of an engine: what is inherited, then its own, then what makes it see its GPUs only.

    GPUs are named by UUID, since NVML and CUDA may count them differently. ``SPT_NOENV`` keeps vLLM's
    processes from overwriting the environment by which we recognise them. ``inner_base`` is where vLLM looks for
    inner ports, unless its ``env_file`` says otherwise. ``kv_space_gib`` is the KV cache of each rank on the CPU, where
    that is ours to say: this variable is older than the flags for it, and goes before them.
    """
    result = {key: value for key, value in inherited.items() if key not in SCRUBBED} | dict(overlay)
    if inner_base is not None:
        result.setdefault("VLLM_PORT", str(inner_base))
    if kv_space_gib:
        result[CPU_KV_SPACE] = str(kv_space_gib)
    result["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    result["CUDA_VISIBLE_DEVICES"] = ",".join(gpu.uuid for gpu in gpus)
    result["SPT_NOENV"] = "1"
    return result
