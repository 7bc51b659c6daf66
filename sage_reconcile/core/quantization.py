"""How the weights of a model are quantised: bytes of a matrix, by ``quantization_config`` or vLLM's ``--quantization``.

Read in vLLM 0.32, ``vllm/model_executor/layers/quantization/``. Embedding, head, norms and the routers of experts stay
as they are unless a format says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

FP32 = 4


@dataclass(frozen=True)
class Quantization:
    """A format, and what it leaves out.

    ``bits`` are of one weight. ``group`` weights share a scale of ``scale_bytes``, along the input; 0 means one for
    each output, -1 one for the whole matrix; ``block`` is the side of square blocks that share one, 0 where there
    are none. ``zero_bits`` are of the zero point of a group, ``index_bytes`` of what is kept for each input.
    ``experts_only`` is what mxfp4 checkpoints are. ``skipped`` are names of modules, or ``re:`` patterns.
    """

    method: str
    bits: int
    group: int = 0
    scale_bytes: int = 2
    zero_bits: int = 0
    index_bytes: int = 0
    block: int = 0
    experts_only: bool = False
    head: bool = False
    skipped: tuple[str, ...] = ()
    pad_inner: int = 1
    pad_outer: int = 1

    def matrix_bytes(self, inputs: int, outputs: int) -> int:
        """Bytes of a matrix with its scales and zero points."""
        weights = inputs * outputs
        if self.block:
            scales = -(-inputs // self.block) * -(-outputs // self.block)
        else:
            scales = 1 if self.group < 0 else outputs * (-(-inputs // self.group) if self.group else 1)
        kept = weights * self.bits // 8 + scales * self.scale_bytes
        return kept + scales * self.zero_bits // 8 + inputs * self.index_bytes

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], ...]:
        found = []
        for name in self.skipped:
            if name.startswith("re:"):
                try:
                    found.append(re.compile(name[3:]))
                except re.error:
                    continue
        return tuple(found)

    @cached_property
    def _plain(self) -> frozenset[str]:
        return frozenset(_bare(name) for name in self.skipped if not name.startswith("re:"))

    @cached_property
    def _parts(self) -> tuple[str, ...]:
        return tuple(name for name in self._plain if not re.search(r"\.\d+\.|^layers\.\d", name))

    def skips(self, module: str) -> bool:
        """Whether a module, named as in a checkpoint (``model.layers.3.mlp.down_proj``), is left as it is.

        A name skips what is inside it too; one without a layer's number skips wherever it is a part.
        """
        bare = _bare(module)
        steps = bare.split(".")
        if any(".".join(steps[:end]) in self._plain for end in range(1, len(steps) + 1)):
            return True
        around = f".{bare}."
        return any(f".{part}." in around for part in self._parts) or any(p.match(module) for p in self._patterns)


def _bare(name: str) -> str:
    """A module's name without the wrappers that differ from one checkpoint to the next."""
    for wrapper in ("model.language_model.", "language_model.model.", "language_model.", "model."):
        if name.startswith(wrapper):
            return name.removeprefix(wrapper)
    return name


def read_quantization(config: object) -> Quantization | None:
    """The format of a checkpoint; None where it is not quantised, or in a way that is not known."""
    if not isinstance(config, Mapping):
        return None
    method = str(config.get("quant_method") or config.get("quant_algo") or "").lower()
    skipped = tuple(
        name
        for field in ("ignore", "modules_to_not_convert", "ignored_layers", "llm_int8_skip_modules", "exclude_modules")
        for name in _names(config.get(field))
    )
    match method:
        case "fp8" | "fbgemm_fp8":
            block = _first(config.get("weight_block_size"))
            return Quantization("fp8", 8, 0 if "fbgemm" in method else -1, FP32, block=block, skipped=skipped)
        case "awq" | "awq_marlin":
            group, bits = (
                _whole(config, "group_size", "q_group_size", default=128),
                _whole(config, "bits", "w_bit", default=4),
            )
            zero = bits if config.get("zero_point", True) else 0
            return Quantization("awq", bits, max(group, 0), 2, zero, skipped=skipped)
        case "gptq" | "gptq_marlin":
            bits = _whole(config, "bits", default=4)
            zero = 0 if config.get("sym", True) else bits
            index = FP32 if config.get("desc_act") else 0
            group, head = max(_whole(config, "group_size", default=128), 0), bool(config.get("lm_head"))
            return Quantization("gptq", bits, group, 2, zero, index, head=head, skipped=skipped)
        case "bitsandbytes":
            if config.get("load_in_8bit"):
                return Quantization("bitsandbytes", 8, 0, FP32, skipped=skipped)
            return named_quantization("bitsandbytes", skipped)
        case "mxfp4" | "gpt_oss_mxfp4":
            return named_quantization("mxfp4", skipped)
        case "compressed-tensors":
            return _compressed(config, skipped)
        case "modelopt" | "nvfp4" | "fp8_kv" | "modelopt_fp4":
            algorithm = str(
                config.get("quant_algo") or _inner(config, "quantization").get("quant_algo") or method
            ).upper()
            skipped += tuple(_names(_inner(config, "quantization").get("exclude_modules")))
            return Quantization("nvfp4", 4, 16, 1, skipped=skipped) if "FP4" in algorithm else _fp8(skipped)
    return None


def named_quantization(method: str, skipped: tuple[str, ...] = ()) -> Quantization | None:
    """What ``--quantization`` makes of a checkpoint that is not quantised; None where it makes nothing of it.

    fp8: one scale for each matrix. bitsandbytes: 4 bits (nf4), a 32-bit scale for 64 weights. mxfp4: 4 bits, an
    8-bit scale for 32 weights, the experts alone; Marlin's kernels pad the width to 128, the hidden size to 256
    (``fused_moe/oracle/mxfp4.py``).
    """
    match method:
        case "fp8" | "fp8_per_tensor" | "fp8_per_channel":
            return _fp8(skipped)
        case "bitsandbytes":
            return Quantization("bitsandbytes", 4, 64, FP32, skipped=skipped)
        case "mxfp4":
            return Quantization("mxfp4", 4, 32, 1, experts_only=True, skipped=skipped, pad_inner=128, pad_outer=256)
    return None


def _fp8(skipped: tuple[str, ...]) -> Quantization:
    return Quantization("fp8", 8, -1, FP32, skipped=skipped)


def _compressed(config: Mapping[str, object], skipped: tuple[str, ...]) -> Quantization | None:
    """compressed-tensors: the weights of its first group of layers tell the format (w4a16, w8a8, fp8, nvfp4 …).

    Integers that go with 16-bit activations are packed, with 16-bit scales; with 8-bit ones, and fp8, the scales
    have 32 bits.
    """
    groups = [group for group in _inner(config, "config_groups").values() if isinstance(group, Mapping)]
    weights = next((_inner(group, "weights") for group in groups if group.get("weights")), None)
    if weights is None:
        return None
    bits = _whole(weights, "num_bits", default=8)
    strategy, group = str(weights.get("strategy") or ""), _whole(weights, "group_size", default=0)
    share = {"tensor": -1, "channel": 0}.get(strategy, max(group, 0))
    activations = next((one.get("input_activations") for one in groups if one.get("weights")), None)
    block = _first(weights.get("block_structure")) if strategy == "block" else 0
    if weights.get("type") == "float" and bits == 4:
        return Quantization("nvfp4", 4, group or 16, 1, skipped=skipped)
    scale = FP32 if activations or weights.get("type") == "float" else 2
    zero = 0 if weights.get("symmetric", True) else bits
    index = FP32 if weights.get("actorder") == "group" else 0
    return Quantization("compressed-tensors", bits, share, scale, zero, index, block, skipped=skipped)


def _names(value: object) -> Iterable[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list | tuple) else []


def _inner(config: Mapping[str, object], name: str) -> Mapping[str, object]:
    value = config.get(name)
    return value if isinstance(value, Mapping) else {}


def _whole(config: Mapping[str, object], *names: str, default: int) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return default


def _first(value: object) -> int:
    return value[0] if isinstance(value, list | tuple) and value and isinstance(value[0], int) else 0
