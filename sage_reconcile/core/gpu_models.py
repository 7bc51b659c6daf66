"""GPUs that are declared in words, ``8xH100-80GB`` or ``4x24GiB``, and what is known of GPUs by their names.

Memory is NVML's total in MiB as ``nvidia-smi`` prints it, taken from listings of real machines that are public (issues
and pages of GitHub, drivers 535 to 610; B200: NVIDIA/TensorRT-LLM#10278, A100-40GB: bottlerocket-core-kit#834, A10:
mayooot/detect-gpu#3). Nominal, since no listing was found: the PCIe forms of A100-40GB and of V100, which are given
what their SXM forms have. Cards on which ECC can be turned on or off are given what they have as they are sold: RTX
A6000 and RTX 6000 Ada off (on: 46068), A40, L20, L40 and L40S on (off: 49140).

What joins the GPUs of a box follows NVIDIA's data sheets: SXM boards have NVLink between all of them (V100's mesh
counts as that: every GPU is reached over NVLink), NVL cards are sold with a bridge over each pair, and so are most
H100 and A100 of the PCIe form. Where a bridge can be bought but seldom is (A30, A40, RTX A6000, RTX 3090), and where
there is no connector for one, it is PCIe alone: a plan should not promise a link that may not be there.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from sage_reconcile.core.units import fault, mib_text, size_mib

MOST = 1024
"""How many GPUs one declaration may name."""
_HOW = "write GPUs as 8xH100-80GB, 2xA100-80GB,4xL4, 4x24GiB or 4xMyCard:48GiB"
_BY_SIZE = "give its memory, as in 4xMyCard:48GiB or 4x48GiB"


class Joined(StrEnum):
    """How the GPUs of one model are joined in a box."""

    SWITCH = "NVLink"
    """All to all, or nearly: through switches, or a mesh."""
    PAIRS = "NVLink in pairs"
    """A bridge over two at a time."""
    PCIE = "PCIe"


@dataclass(frozen=True, slots=True)
class Declared:
    """``count`` GPUs of one name, with the memory of each in MiB."""

    name: str
    memory_mib: int
    count: int


@dataclass(frozen=True, slots=True)
class GpuModel:
    """A known GPU. ``sizes`` are the GB that may stand in its name, the first as it is sold."""

    name: str
    base: str
    form: str
    sizes: tuple[int, ...]
    memory_mib: int
    joined: Joined


_SXM, _PCIE, _NVL = "sxm", "pcie", "nvl"
MODELS: tuple[GpuModel, ...] = tuple(
    GpuModel(*row)
    for row in (
        ("GB200", "gb200", _SXM, (186, 189, 192), 189471, Joined.SWITCH),
        ("B300", "b300", _SXM, (270, 288), 275040, Joined.SWITCH),
        ("B200", "b200", _SXM, (180, 192), 183359, Joined.SWITCH),
        ("H200", "h200", _SXM, (141,), 143771, Joined.SWITCH),
        ("H200-NVL", "h200", _NVL, (141,), 143771, Joined.PAIRS),
        ("GH200", "gh200", "", (96, 120, 480), 97871, Joined.PCIE),  # the larger numbers are its CPU's memory
        ("H100-80GB", "h100", _SXM, (80,), 81559, Joined.SWITCH),
        ("H100-PCIe", "h100", _PCIE, (80,), 81559, Joined.PAIRS),
        ("H100-NVL", "h100", _NVL, (94,), 95830, Joined.PAIRS),
        ("H20", "h20", _SXM, (96,), 97871, Joined.SWITCH),
        ("A100-80GB", "a100", _SXM, (80,), 81920, Joined.SWITCH),
        ("A100-40GB", "a100", _SXM, (40,), 40960, Joined.SWITCH),
        ("A100-PCIe-80GB", "a100", _PCIE, (80,), 81920, Joined.PAIRS),
        ("A100-PCIe-40GB", "a100", _PCIE, (40,), 40960, Joined.PAIRS),
        ("A30", "a30", "", (24,), 24576, Joined.PCIE),
        ("A40", "a40", "", (48,), 46068, Joined.PCIE),
        ("A10", "a10", "", (24,), 23028, Joined.PCIE),
        ("A10G", "a10g", "", (24,), 23028, Joined.PCIE),
        ("L4", "l4", "", (24,), 23034, Joined.PCIE),
        ("L20", "l20", "", (48,), 46068, Joined.PCIE),
        ("L40", "l40", "", (48,), 46068, Joined.PCIE),
        ("L40S", "l40s", "", (48,), 46068, Joined.PCIE),
        ("T4", "t4", "", (16, 15), 15360, Joined.PCIE),
        ("V100-16GB", "v100", _SXM, (16,), 16384, Joined.SWITCH),
        ("V100-32GB", "v100", _SXM, (32,), 32768, Joined.SWITCH),
        ("V100-PCIe-16GB", "v100", _PCIE, (16,), 16384, Joined.PCIE),
        ("V100-PCIe-32GB", "v100", _PCIE, (32,), 32768, Joined.PCIE),
        ("RTX-PRO-6000", "pro6000", "", (96,), 97887, Joined.PCIE),
        ("RTX-6000-Ada", "6000ada", "", (48,), 49140, Joined.PCIE),
        ("RTX-A6000", "a6000", "", (48,), 49140, Joined.PCIE),
        ("RTX-5090", "5090", "", (32,), 32607, Joined.PCIE),
        ("RTX-4090", "4090", "", (24,), 24564, Joined.PCIE),
        ("RTX-3090-Ti", "3090ti", "", (24,), 24564, Joined.PCIE),
        ("RTX-3090", "3090", "", (24,), 24576, Joined.PCIE),
        ("RTX-3060", "3060", "", (12,), 12288, Joined.PCIE),
    )
)
"""Of the forms of one GPU that first which is meant where a name tells none."""

_MANY = re.compile(r"(\d{1,6})\s*[x×*]\s*(.+)", re.IGNORECASE | re.DOTALL)
_SIZE = re.compile(r"\d+(?:\.\d+)?\s*[kmgt](?:i?b|i)?", re.IGNORECASE)
_SAID_SIZE = re.compile(r"(\d+)g(?:i?b)?")
_FORM = re.compile(r"sxm\d?|hgx|dgx|pcie|nvl")
_FORMS = {"hgx": _SXM, "dgx": _SXM, "pcie": _PCIE, "nvl": _NVL}
_NOISE = frozenset(
    (
        *(
            "nvidia",
            "geforce",
            "tesla",
            "generation",
            "edition",
            "server",
            "workstation",
            "blackwell",
            "max",
            "q",
            "ac",
        ),
        *("hbm2", "hbm2e", "hbm3", "hbm3e", "gddr6"),
    )
)
"""Words of names, as the driver gives them or people write them, that tell no two GPUs of the table apart."""


def read_gpus(text: str) -> tuple[Declared, ...]:
    """GPUs declared in words, separated by commas: ``8xH100-80GB``, ``H100``, ``4x24GiB``, ``4xMyCard:48GiB``.

    A GPU that is given by its size alone is called by that; one whose memory comes from the table is called as it is
    there, so that two spellings are one model.

    Raises:
        PydanticCustomError: some word is not understood, names no known GPU or several, or counts none or too many.
    """
    return tuple(_read_one(word.strip()) for word in text.split(","))


def _read_one(word: str) -> Declared:
    many = _MANY.fullmatch(word)
    count, what = (int(many[1]), many[2].strip()) if many else (1, word)
    if not what:
        raise fault("a declaration of GPUs is empty", _HOW)
    if not 1 <= count <= MOST:
        raise fault(f"{count} GPUs are impossible", f"write a number from 1 to {MOST}")
    if _SIZE.fullmatch(what):
        return Declared(what, _memory(what), count)
    name, colon, size = (part.strip() for part in what.rpartition(":"))
    if colon and name:
        return Declared(name, _memory(size), count)
    if re.fullmatch(r".+[x×*]\s*\d{1,4}", what, re.IGNORECASE) and not _candidates(what):
        raise fault(f"{what[:60]!r} names no known GPU", "write the number first, as in 8xH100-80GB")
    model = find(what)
    return Declared(model.name, model.memory_mib, count)


def _memory(text: str) -> int:
    mib = size_mib(text)
    if mib == 0:
        raise fault("a GPU without memory is impossible", "write its memory, such as 24GiB")
    return mib


def find(name: str) -> GpuModel:
    """The known GPU of that name, however it is spelled: ``h100-sxm``, ``NVIDIA H100 80GB HBM3``, ``4090``.

    Raises:
        PydanticCustomError: there is none, or several of different memory.
    """
    found = _candidates(name)
    sizes = {model.memory_mib for model in found}
    if len(sizes) == 1:
        return found[0]
    if found:
        raise fault(f"{name[:60]!r} may be {_listed(found)}", "write which")
    base, _, _ = _parts(name)
    like = [model for model in MODELS if model.base == base]
    if like:
        raise fault(f"{name[:60]!r} names no known GPU", f"write {_listed(like)}, or {_BY_SIZE}")
    close = difflib.get_close_matches(base[:60], [model.base for model in MODELS], n=1, cutoff=0.6)
    meant = next((f"did you mean {model.name}? or " for model in MODELS if model.base in close), "")
    raise fault(f"{name[:60]!r} names no known GPU", f"{meant}{_BY_SIZE}")


def joined(name: str) -> Joined:
    """How GPUs of that name are joined in a box; by PCIe where it is not known."""
    found = _candidates(name)
    return found[0].joined if found else Joined.PCIE


def size_text(memory_mib: int) -> str:
    """A GPU's memory in the unit in which it is sold: ``80GiB``, and ``79.6GiB`` where that is not whole."""
    return mib_text(memory_mib) if memory_mib % 1024 == 0 else f"{memory_mib / 1024:.1f}GiB"


def _candidates(name: str) -> list[GpuModel]:
    """The known GPUs that a name may mean: of the form that it tells, or else of the first that fits."""
    base, form, size = _parts(name)
    found = [
        model
        for model in MODELS
        if model.base == base and form in ("", model.form) and (size is None or size in model.sizes)
    ]
    return [model for model in found if model.form == found[0].form]


def _parts(name: str) -> tuple[str, str, int | None]:
    """The words of a name sorted into which GPU, which form, and how many GB; empty and None where it tells not."""
    form, size, rest = "", None, []
    for word in re.findall(r"[a-z0-9]+", name.lower()):
        if match := _SAID_SIZE.fullmatch(word):
            size = int(match[1])
        elif _FORM.fullmatch(word):
            form = _FORMS.get(word, _SXM)
        elif word not in _NOISE:
            rest.append(word)
    return "".join(rest).removeprefix("rtx"), form, size


def _listed(models: Sequence[GpuModel]) -> str:
    *most, last = [model.name for model in models]
    return f"{', '.join(most)} or {last}" if most else last
