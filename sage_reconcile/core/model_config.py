"""A model's ``config.json`` as a description of what it is built of: what its memory follows from.

The names of the fields are those of Hugging Face's configurations; how each architecture uses them is read in
vLLM 0.32, ``vllm/model_executor/models/``. What vLLM cannot serve is not described.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sage_reconcile.core import model_layers
from sage_reconcile.core.model_layers import FeedForward, Fields, Layer
from sage_reconcile.core.quantization import Quantization, read_quantization

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}
MOST_LAYERS = 4096
"""More than ten times as many as any model has."""
DEFAULT_CONTEXT = 2048
"""What vLLM takes for the longest context of a model whose configuration tells none (``config/model.py``)."""
_CONTEXT_FIELDS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions"),
    *("max_sequence_length", "max_seq_length", "seq_len"),
)
_MOST_SCALED = 1e6
_SCALED_ALREADY = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling", "default")


class Vision(NamedTuple):
    """What a multimodal model has beside its language model: parameters, all kept in the model's own type."""

    parameters: int


@dataclass(frozen=True, eq=False, slots=True)
class ModelConfig:
    """What a model is built of. Compared by identity, so that what is worked out for it can be remembered.

    ``context`` is the longest it is made for; ``context_told`` whether its configuration says so. ``dtype_bytes``
    is that of a weight that is not quantised: vLLM loads float32 checkpoints as bfloat16.
    """

    name: str
    hidden: int
    vocabulary: int
    tied: bool
    dtype_bytes: int
    layers: tuple[Layer, ...]
    quantization: Quantization | None
    vision: Vision | None
    context: int
    context_told: bool
    state_bytes: int
    """Bytes of a number in the state of a Mamba layer."""
    layer_embeddings: int = 0
    """Parameters of the embeddings that each layer has for itself (Gemma 3n and 4)."""

    @property
    def mixture(self) -> FeedForward | None:
        """The first layer with experts; None where there is none."""
        return next((x.feed_forward for x in self.layers if x.feed_forward and x.feed_forward.experts), None)

    @property
    def widest(self) -> int:
        """The width of the widest feed-forward that every token goes through."""
        return max(
            (x.feed_forward.width + x.feed_forward.shared_width for x in self.layers if x.feed_forward), default=0
        )


def read_model_config(config: Mapping[str, object]) -> ModelConfig | None:
    """The description of a model; None where the configuration lacks what every decoder has."""
    text = _text_config(config)
    read = Fields(text)
    hidden, layers = read.number("hidden_size", "n_embd", "d_model"), model_layers.count(read)
    vocabulary = read.number("vocab_size") or Fields(config).number("vocab_size")
    if not (hidden and layers and vocabulary and layers <= MOST_LAYERS):
        return None
    described = model_layers.read_layers(read, hidden, layers)
    if described is None:
        return None
    context = _context(text)
    dtype = _dtype_bytes(
        text.get("torch_dtype") or text.get("dtype") or config.get("torch_dtype") or config.get("dtype")
    )
    ssm = text.get("mamba_ssm_cache_dtype") or text.get("mamba_ssm_dtype")
    return ModelConfig(
        name=str(text.get("model_type") or config.get("model_type") or ""),
        hidden=hidden,
        vocabulary=vocabulary,
        tied=_tied(config, text),
        dtype_bytes=dtype,
        layers=described,
        quantization=read_quantization(
            config.get("quantization_config") or text.get("quantization_config") or config.get("compression_config")
        ),
        vision=_vision(config, hidden),
        context=context or DEFAULT_CONTEXT,
        context_told=context is not None,
        state_bytes=DTYPE_BYTES.get(str(ssm).removeprefix("torch."), dtype),
        layer_embeddings=read.number("vocab_size_per_layer_input")
        * read.number("hidden_size_per_layer_input")
        * layers,
    )


def _text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """The part that describes the language model, where a multimodal model has one of its own."""
    for name in ("text_config", "llm_config", "language_config", "thinker_config"):
        part = config.get(name)
        if isinstance(part, Mapping):
            return _text_config(part)
    return config


_TIED_BY_DEFAULT = ("gemma", "cohere", "gpt2", "opt", "falcon", "bloom", "starcoder2", "lfm2", "t5")


def _tied(config: Mapping[str, object], text: Mapping[str, object]) -> bool:
    """Whether head and embedding are one; where it is not said, as the model's own class has it."""
    for part in (config, text):
        said = part.get("tie_word_embeddings")
        if isinstance(said, bool):
            return said
    return str(text.get("model_type") or "").startswith(_TIED_BY_DEFAULT)


def _dtype_bytes(named: object) -> int:
    """As vLLM's ``--dtype auto``: float32 becomes 16 bits wide; so does what is not told."""
    return min(2, DTYPE_BYTES.get(str(named).removeprefix("torch."), 2))


def _context(text: Mapping[str, object]) -> int | None:
    """The longest context, as ``_get_and_verify_max_len`` in vLLM's ``config/model.py`` has it; None if not told."""
    read = Fields(text)
    told = [value for name in _CONTEXT_FIELDS if (value := read.number(name))]
    if not told:
        return None
    longest = read.number("model_max_length") or min(told)
    scaling = text.get("rope_scaling") or text.get("rope_parameters")
    if not isinstance(scaling, Mapping):
        return longest
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    if kind == "longrope":
        return read.number("original_max_position_embeddings") or longest
    factor = scaling.get("factor")
    if kind in _SCALED_ALREADY or "gemma3" in str(text.get("model_type")) or not isinstance(factor, int | float):
        return longest
    return int(longest * factor) if 1 <= factor < _MOST_SCALED else longest


def _vision(config: Mapping[str, object], hidden: int) -> Vision | None:
    """The tower that reads images, as a plain ViT, with a projection of two matrices to the language model.

    Two matrices in each feed-forward; three in those of Pixtral and of Qwen from 2.5 on, which have gates.
    """
    part = config.get("vision_config") or config.get("vision_tower_config")
    if not isinstance(part, Mapping):
        thinker = config.get("thinker_config")
        return _vision(thinker, hidden) if isinstance(thinker, Mapping) else None
    read = Fields(part)
    width = read.number("hidden_size", "embed_dim", "width")
    depth = read.number("num_hidden_layers", "depth", "layers")
    inner = read.number("intermediate_size") or 4 * width
    kind = str(part.get("model_type") or config.get("model_type") or "")
    matrices = 3 if any(word in kind for word in ("pixtral", "qwen2_5_vl", "llama4")) else 2
    patch = read.number("patch_size") or 14
    pixels = (
        patch * patch * (read.number("num_channels", "in_channels") or 3) * (read.number("temporal_patch_size") or 1)
    )
    positions = (
        (read.number("image_size") // patch) ** 2 if patch and kind.startswith(("siglip", "clip", "gemma")) else 0
    )
    merge = read.number("spatial_merge_size") or Fields(config).number("spatial_merge_size") or 1
    merged = width * merge * merge
    if kind == "pixtral" or str(config.get("model_type")) == "mistral3":
        projection = merged * width + width * hidden + hidden * hidden
    elif merge > 1:
        projection = merged * merged + merged * hidden
    else:
        projection = width * hidden
    blocks = depth * (4 * width * width + matrices * width * inner)
    return Vision(blocks + (pixels + positions) * width + projection) if width and depth else None
