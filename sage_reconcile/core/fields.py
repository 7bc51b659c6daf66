"""How the fields of the file are read, one by one: what is taken, what is refused, and what would be right.

Every reader raises ``PydanticCustomError`` of type ``fault``.
"""

from __future__ import annotations

import re
import shlex
import string
from collections.abc import Mapping
from contextlib import suppress

from pydantic_core import PydanticCustomError

from sage_reconcile.core import gpu_models
from sage_reconcile.core.units import all_of, described, fault, read_text, read_whole_number

PLACEHOLDERS = ("model", "host", "port", "name")
ENGINE_NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"

OWN_FLAGS: Mapping[str, str] = {
    "model": "the field `model`",
    "host": "`bind` under `host:`",
    "port": "the field `port`",
    "uds": "the field `port`",
    "served-model-name": "the field `served_model_name`",
    "tensor-parallel-size": "the field `tensor_parallel_size`",
    "pipeline-parallel-size": "the field `pipeline_parallel_size`",
    "data-parallel-size": "the field `data_parallel_size`",
    "shutdown-timeout": "the field `stop_timeout`",
    "api-key": "`env:` with VLLM_API_KEY, since everyone on the machine can read a command line",
    "hf-token": "`env:` with HF_TOKEN, since everyone on the machine can read a command line",
}
"""vLLM flags that we set, or that must not be on a command line, and what to use in their place."""

MANUAL_FLAGS = ("gpu-memory-utilization", "kv-cache-memory-bytes")
"""vLLM flags that we set too, unless the entry says ``memory: manual``."""
_FLAG_ALIASES = {"tp": "tensor-parallel-size", "pp": "pipeline-parallel-size", "dp": "data-parallel-size"}
_FLAG = re.compile(r"[A-Za-z][A-Za-z0-9.-]*")
_SECRET_FLAG = re.compile(r"(^|-)(api-key|password|secret|(hf|auth|access)-token)(-|$)")
OWN_ENV: Mapping[str, str] = {
    "CUDA_VISIBLE_DEVICES": "the field `gpus`",
    "NVIDIA_VISIBLE_DEVICES": "the field `gpus`",
    "CUDA_DEVICE_ORDER": "the field `gpus`, with UUIDs if the order matters",
    "VLLM_PORT": "the field `port`, or `inner_ports` under `host:`",
    "SPT_NOENV": "nothing: it is how the processes of an engine are recognised",
}
"""Environment variables that we set, and what to use in their place."""

CPU_KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"
"""Tells vLLM on the CPU the KV cache of each rank in whole GiB: ours to set, but with ``memory: manual``."""
CPU_KV_SPACE_FAULT = (
    f"`{CPU_KV_SPACE}` is set by sage-reconcile",
    "use the field `kv_cache`, or write `memory: manual`",
)


def read_flags(value: object) -> object:
    """vLLM's flags by their plain names (no dashes in front, none for underscores)."""
    if not isinstance(value, dict):
        return value
    flags: dict[str, object] = {}
    found = []
    for key, setting in ((str(key), setting) for key, setting in value.items()):
        flag = key.lstrip("-").replace("_", "-")
        wrong = _flag_fault(key, flag)
        if wrong is None and flag in flags:
            wrong = fault(f"`{key}` is given twice, spelled differently", "keep one of them", key=key)
        if wrong is not None:
            found.append(wrong)
        flags[flag] = setting
    if found:
        raise all_of(found)
    return flags


def _flag_fault(key: str, flag: str) -> PydanticCustomError | None:
    if not _FLAG.fullmatch(flag):
        return fault(f"`{key}` is not a flag's name", "write vLLM's name for it, such as max-model-len", key=key)
    owned = _FLAG_ALIASES.get(flag) or next((own for own in OWN_FLAGS if _means(flag, own)), None)
    if owned:
        return fault(f"`{key}` is set by sage-reconcile", f"use {OWN_FLAGS[owned]}", key=key)
    if _SECRET_FLAG.search(flag):
        what = f"`{key}` would put a secret on the command line, where everyone on the machine can read it"
        return fault(what, "pass it through `env:`", key=key)
    return None


def sizes_memory(flag: str) -> bool:
    """Whether a flag tells vLLM how much memory to take, which is ours to say but with ``memory: manual``."""
    return any(_means(flag, own) for own in MANUAL_FLAGS)


def _means(flag: str, owned: str) -> bool:
    """Whether argparse would take ``flag`` for ``owned``: the name itself, or an abbreviation of it."""
    return flag == owned or (len(flag) >= 4 and owned.startswith(flag))


def read_env(value: object) -> object:
    """Environment variables, every value as text."""
    if not isinstance(value, dict):
        return value
    env = {str(key): setting for key, setting in value.items()}
    found = [wrong for key, setting in env.items() if (wrong := _env_fault(key, setting)) is not None]
    if found:
        raise all_of(found)
    return {key: str(setting) for key, setting in env.items()}


def _env_fault(key: str, setting: object) -> PydanticCustomError | None:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
        return fault(f"`{key}` is not the name of an environment variable", key=key)
    if key in OWN_ENV or key.startswith("SAGE_RECONCILE_"):
        return fault(f"`{key}` is set by sage-reconcile", f"use {OWN_ENV.get(key, 'another name')}", key=key)
    if isinstance(setting, bool) or not isinstance(setting, str | int | float):
        return fault(f"`{key}`: expected text, got {described(setting)}", "put it in quotes", key=key)
    if "\0" in str(setting):
        return fault(f"`{key}` holds a NUL character", key=key)
    return None


def read_restarted(value: object) -> object:
    """When replicas were last asked to start anew: text under ``all``, or under the index of one."""
    if not isinstance(value, dict):
        return value
    for key, moment in ((str(key), moment) for key, moment in value.items()):
        if key != "all" and not re.fullmatch(r"0|[1-9]\d{0,3}", key):
            raise fault(f"`{key}` names no replica", 'write all, or the index of one in quotes, such as "0"', key=key)
        if not isinstance(moment, str) or not moment.strip() or "\0" in moment:
            raise fault(f"`{key}`: expected text, got {described(moment)}", "write the time, in quotes", key=key)
    return value


def read_command(value: object) -> object:
    """A list is taken as it is; text is split as a shell would, but no shell ever sees it."""
    if isinstance(value, str):
        try:
            value = shlex.split(value)
        except ValueError as error:
            raise fault(f"cannot be split into words: {error}", "close the quote, or write a list of words") from None
    if not isinstance(value, list) or not value or not all(isinstance(word, str) and word for word in value):
        raise fault("expected a command", "write it as text or as a list of words, all of them text")
    for word in value:
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(word) if name is not None]
        except ValueError:
            names = [word]
        for name in names:
            if name not in PLACEHOLDERS:
                known = " ".join(f"{{{placeholder}}}" for placeholder in PLACEHOLDERS)
                raise fault(f"unknown placeholder {{{name}}}", f"use {known}, or {{{{ and }}}} for plain braces")
    return tuple(value)


def read_gpus(value: object) -> object:
    """``auto``, or GPUs by index or UUID."""
    if value == "auto":
        return value
    if not isinstance(value, list | tuple) or not value:
        raise fault(f"expected GPUs, got {described(value)}", "write auto, or a list such as [0, 1] (index or UUID)")
    return read_gpu_list(value)


def read_gpu_list(value: object) -> object:
    """GPUs by index or UUID, each once."""
    if not isinstance(value, list | tuple):
        raise fault(f"expected a list of GPUs, got {described(value)}", "write a list such as [0, 1] (index or UUID)")
    pins: list[int | str] = []
    for entry in value:
        pin = int(entry) if isinstance(entry, str) and entry.isdecimal() else entry
        if isinstance(pin, bool) or not isinstance(pin, int | str) or (isinstance(pin, int) and pin < 0) or pin == "":
            raise fault(
                f"{described(entry)} does not name a GPU",
                "use its index or its UUID, as `nvidia-smi -L` shows",
            )
        if pin in pins:
            raise fault(f"GPU {pin} is listed twice", "list each GPU once")
        pins.append(pin)
    return tuple(pins)


def read_port(value: object) -> object:
    """``auto``, or a TCP port."""
    if value == "auto":
        return value
    try:
        port = read_whole_number(value)
    except ValueError:
        raise fault(f"expected a port, got {described(value)}", "write auto or a number from 1 to 65535") from None
    if not 1 <= port <= 65535:
        raise fault(f"{port} is not a port", "write auto or a number from 1 to 65535")
    return port


def read_host_gpus(value: object) -> object:
    """``auto``, ``none``, GPUs in words, or a list to be read further."""
    if isinstance(value, list | tuple) and not value:
        raise fault("declares no GPU", "write none, or list at least one GPU")
    if isinstance(value, list | tuple) or value in ("auto", "none"):
        return value
    if isinstance(value, str) and any(letter.isdecimal() for letter in value):
        return [_as_map(group) for group in gpu_models.read_gpus(value)]
    raise fault(
        f"expected GPUs, got {described(value)}",
        "write auto, none, GPUs such as 8xH100-80GB or 4x24GiB, or a list of {name, memory, count}",
    )


def read_declared_gpu(value: object) -> object:
    """GPUs of one kind, in words or as a map; memory that is not given is looked up by the name."""
    if isinstance(value, str):
        groups = gpu_models.read_gpus(value)
        if len(groups) > 1:
            raise fault("several kinds of GPUs in one item", "write each as an item of its own")
        return _as_map(groups[0])
    if isinstance(value, int):
        raise fault(f"expected GPUs, got {described(value)}", "put it in quotes if it is a name")
    if not isinstance(value, dict) or "memory" in value or not isinstance(value.get("name"), str):
        return value
    model = gpu_models.find(value["name"])
    return {**value, "name": model.name, "memory": f"{model.memory_mib}MiB"}


def _as_map(group: gpu_models.Declared) -> dict[str, object]:
    return {"name": group.name, "memory": f"{group.memory_mib}MiB", "count": group.count}


def host_gpus_kind(value: object) -> str:
    """Which of the two forms of ``host.gpus`` this is."""
    return "[list]" if isinstance(value, list | tuple) else "[word]"


def read_model(value: object) -> str:
    """Text that cannot be taken for a flag."""
    text = read_text(value)
    if text.startswith("-"):
        raise fault(f"{text[:60]!r} would be taken for a flag", "begin it with something else than `-`")
    return text


def read_names(value: object) -> object:
    """One name or several."""
    if value in ([], ()):
        raise fault("an empty list names nothing", "name the model, or leave the field out")
    return (read_model(value),) if isinstance(value, str) else value


_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")


def read_bind(value: object) -> object:
    """An address or a name to listen on, without a port."""
    text = read_text(value)
    if not isinstance(text, str) or _HOST_NAME.fullmatch(text):
        return text
    from ipaddress import ip_address  # noqa: PLC0415 - names and IPv4 addresses do without

    with suppress(ValueError):
        return str(ip_address(text))
    raise fault(f"{text[:60]!r} is not an address", "write one such as 127.0.0.1, ::1 or 0.0.0.0, without a port")
