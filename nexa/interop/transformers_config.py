"""The configuration of nexa's architecture as transformers sees it. Needs transformers, not torch.

Works with transformers 4.50 and later, 5 included.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import PretrainedConfig

from nexa.config.schema import ModelConfig, NormConfig
from nexa.interop.huggingface import NEXA, config_json, from_config_json

_DEFAULTS: dict[str, Any] = {
    key: value
    for key, value in config_json(ModelConfig(), NormConfig(placement="mix"), eos_token_id=None).items()
    if key not in {"model_type", "architectures", "torch_dtype", "bos_token_id", "eos_token_id", "tie_word_embeddings"}
} | {"num_key_value_heads": None, "head_dim": None}


class NexaConfig(PretrainedConfig):
    """What `nexa.interop.huggingface.config_json` writes with `model_type: nexa`."""

    model_type = NEXA

    def __init__(self, **kwargs: Any) -> None:
        """`kwargs`: keys of such a `config.json`, and any of transformers' own."""
        for key, default in _DEFAULTS.items():
            setattr(self, key, copy.deepcopy(kwargs.pop(key, default)))
        kwargs = {"tie_word_embeddings": False} | kwargs
        super().__init__(**kwargs)

    def parts(self) -> tuple[ModelConfig, NormConfig]:
        """The same in nexa's own types. Raises UserError for values that nexa does not know."""
        keys = [*_DEFAULTS, "tie_word_embeddings"]
        return from_config_json({"model_type": NEXA, **{key: getattr(self, key) for key in keys}})


def register() -> None:
    """Tell transformers' auto classes; a second call changes nothing."""
    from transformers import AutoConfig

    AutoConfig.register(NEXA, NexaConfig, exist_ok=True)
