"""How NVIDIA's management library (NVML) is asked: any question may fail, and costs no more than its answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

_LASTING = {2, 3, 4, 13, 25}
"""NVML error codes after which asking again will not help: it has no such thing (a link, say), does not support that,
no permission, no such function or version."""

_FATAL = {
    1: "the driver was unloaded while in use",
    9: "the driver was unloaded while in use",
    15: "the GPU is lost (it has fallen off the bus): see dmesg for its Xid error, and reboot",
    16: "the GPU needs a reset: stop what runs on it, then: nvidia-smi --gpu-reset -i <its index>",
    18: "the driver was exchanged while in use: reboot",
}
"""NVML error codes after which no other answer about that GPU is to be had."""


class Ask:
    """Asks NVML, most often about one card. What cannot be answered is None.

    ``fatal`` says why no more can be known of the card. ``passing`` is set when a failure may be
    gone next time, ``renew`` when NVML has to be let go: for a reset, or to see the GPU come back.
    """

    def __init__(self, nvml: ModuleType) -> None:
        self.nvml = nvml
        self.fatal = ""
        self.passing = False
        self.renew = False
        self._reasons: dict[str, str] = {}

    def __call__(self, function: str, *arguments: object) -> Any:  # noqa: ANN401 - pynvml has no types
        """What the function answers, or None."""
        if self.fatal:
            return None
        try:
            if hasattr(self.nvml, function):  # an older pynvml lacks what an older driver lacks
                return getattr(self.nvml, function)(*arguments)
        except self.nvml.NVMLError as error:
            self._reasons[function] = str(error)
            self.fatal = _FATAL.get(error.value, "")
            self.passing |= error.value not in _LASTING
        except UnicodeDecodeError:
            self._reasons[function] = "not a text"
        return None

    def first(self, functions: Sequence[str], *arguments: object) -> Any:  # noqa: ANN401
        """The answer of the first of these functions that has one."""
        answers = (self(function, *arguments) for function in functions)
        return next((answer for answer in answers if answer is not None), None)

    def why(self, function: str) -> str:
        """In NVML's words, why the function had no answer."""
        return self._reasons.get(function, "Function Not Found")
