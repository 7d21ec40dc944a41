"""Configuration of a nexa model: a LLaMA whose norms stand elsewhere or are of another kind.

Part of an exported model folder; needs transformers (4.50 and later, 5 included) and nothing else.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

_SIZES: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1368,
    "num_hidden_layers": 0,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "nexa_input_bias": False,
}


class NexaConfig(PretrainedConfig):
    """Sizes as in LlamaConfig, and three keys of its own.

    `nexa_norm`: `kind` of the norms and their options. `nexa_plan`: `blocks`, which norms and fixed scales each
    block has, and `final_norm`, whether there is one before the head. `nexa_input_bias`: biases on the query, key,
    value, gate and up projections and on the head.
    """

    model_type = "nexa"

    def __init__(self, **kwargs: Any) -> None:
        """`kwargs`: keys of such a `config.json`, and any of transformers' own."""
        for key, default in _SIZES.items():
            setattr(self, key, kwargs.pop(key, default))
        self.nexa_norm: dict[str, Any] = kwargs.pop("nexa_norm", None) or {"kind": "rmsnorm"}
        self.nexa_plan: dict[str, Any] = kwargs.pop("nexa_plan", None) or {"blocks": [], "final_norm": True}
        super().__init__(**{"tie_word_embeddings": False, **kwargs})
