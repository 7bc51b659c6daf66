"""How vLLM's children look in ``/proc``: their title stands where command line and environment were.

vLLM names its processes with ``setproctitle``, which writes the title over the memory in which the kernel
left the arguments and the environment. Whoever looks for a marker there finds nothing.
``SPT_NOENV`` makes it use the room of the arguments only, and so the environment stays.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_PR_SET_NAME = 15
_ARGUMENTS_AND_ENVIRONMENT = slice(44, 48)
"""Where ``/proc/PID/stat`` has the start and end of each, counted from the field after the state."""


def set_title(name: str) -> None:
    """Take a title such as ``VLLM::EngineCore`` for this process, in place of its arguments."""
    stat = Path("/proc/self/stat").read_bytes()
    fields = [int(field) for field in stat[stat.rindex(b")") + 4 :].split()]
    start, end, env_start, env_end = fields[_ARGUMENTS_AND_ENVIRONMENT]
    if "SPT_NOENV" not in os.environ and env_start == end:
        end = env_end
    title = name.encode()
    ctypes.memset(start, 0, end - start)
    # A last byte that is not zero would make the kernel read on beyond the arguments.
    ctypes.memmove(start, title, min(len(title), end - start - 1))
    # Names longer than 15 bytes are cut by the kernel: hence `VLLM::EngineCor`.
    ctypes.CDLL(None).prctl(_PR_SET_NAME, title, 0, 0, 0)
