"""A first ``engines.yaml`` that fits the machine it is written for."""

from __future__ import annotations

from collections.abc import Sequence

from sage_reconcile.core.observed import Gpu

_MODELS = (
    (70 * 1024, "Qwen/Qwen2.5-14B-Instruct"),
    (20 * 1024, "Qwen/Qwen2.5-7B-Instruct"),
    (10 * 1024, "Qwen/Qwen2.5-3B-Instruct"),
    (0, "Qwen/Qwen2.5-0.5B-Instruct"),
)

_HEAD = """\
# engines.yaml: which inference engines shall run on this machine.
#
#   sage-reconcile diff     what would change, and why
#   sage-reconcile apply    change it
#   sage-reconcile run      keep it so: follow this file, start again what dies
#
# Every field: sage-reconcile schema
version: 1
"""

_REAL = """
host:
  gpus: auto            # {found}
  # headroom: 1GiB      # of each GPU, never given to an engine
  # exclude: [0]        # GPUs (index or UUID) on which nothing is started
  # ports: 8000-8999    # where `port: auto` takes its ports from
  # bind: 127.0.0.1     # the address engines listen on

engines:
  chat:
    model: {model}
    memory: auto        # on each GPU: auto, 24GiB, or 30%
    # replicas: 2
    # tensor_parallel_size: 2
    # port: 8000        # auto takes the first that is free
    # python: /opt/vllm/bin/python   # the Python that has vLLM, if it is not our own
    # args:             # vLLM's own flags
    #   max-model-len: 8192
    # env:
    #   HF_TOKEN: ${{HF_TOKEN}}
"""

_SIMULATED = """
# {why}
# So two GPUs are simulated here, and the engine is the bundled simulator: it answers like vLLM's server, with
# canned text. On a machine with GPUs write `gpus: auto` and `runtime: vllm`.
host:
  gpus:
    - {{name: H100-80GB, memory: 80GiB, count: 2}}

engines:
  chat:
    model: Qwen/Qwen2.5-7B-Instruct
    runtime: simulator
    memory: 24GiB       # on each GPU: auto, 24GiB, or 30%
    # replicas: 2
    # tensor_parallel_size: 2

  # vLLM on the CPU needs no GPU:
  # small:
  #   model: Qwen/Qwen2.5-0.5B-Instruct
  #   device: cpu
  #   python: /opt/vllm/bin/python   # the Python that has vLLM, if it is not our own
  #   kv_cache: 4GiB    # of the host's memory, as is all else that it takes
"""


def starter(gpus: Sequence[Gpu], note: str) -> str:
    """The text of a commented file for a machine with these GPUs; ``note`` says why there are none."""
    usable = [gpu for gpu in gpus if not gpu.problem]
    if not usable:
        why = note or "No GPU was found here."
        return _HEAD + _SIMULATED.format(why=why.strip().rstrip(".") + ".")
    smallest = min(gpu.memory_total_mib for gpu in usable)
    names = ", ".join(
        f"{sum(gpu.name == name for gpu in usable)} x {name}" for name in dict.fromkeys(g.name for g in usable)
    )
    model = next(name for least, name in _MODELS if smallest >= least)
    return _HEAD + _REAL.format(found=f"found: {names}", model=model)
