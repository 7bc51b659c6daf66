"""What a model's ``config.json`` says, for tests that need one."""

from __future__ import annotations

from typing import Any

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
}
"""Llama 3.1 8B, without its longest context."""
LONGEST = {"max_position_embeddings": 131072}
