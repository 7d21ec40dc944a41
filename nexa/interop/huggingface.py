"""`config.json` of a Hugging Face model directory, written and read.

A plain LLaMA (Pre-LN, RMSNorm, nothing extra) is written as `model_type: llama`, so that transformers opens it
as it stands. Everything else is `model_type: nexa`, which `nexa.interop.transformers_model` serves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nexa.config import from_mapping
from nexa.config.schema import ModelConfig, NormConfig
from nexa.errors import ConfigError, UserError

LLAMA, NEXA = "llama", "nexa"
_ARCHITECTURES = {LLAMA: "LlamaForCausalLM", NEXA: "NexaForCausalLM"}
_NOT_OF_THE_MODEL = frozenset({"attention"})
"""Fields of ModelConfig about the machine, not the function."""
_OURS = {
    name: f"nexa_{name}" for name in ("initializer", "initializer_shape", "input_bias", "attention_gate", "fixnorm")
}
"""Our fields that mean nothing to transformers, under a name that cannot collide with one of its own."""
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_LLAMA_DEFAULTS = {"max_position_embeddings": 2048}
"""Where LlamaConfig's default differs from ours."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, 0.0, None),
    "partial_rotary_factor": (1, 1.0, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "sliding_window": (None,),
}
"""Keys of a LLaMA configuration of which we compute these values alone."""


def is_llama(model: ModelConfig, norm: NormConfig) -> bool:
    """Whether transformers' LlamaForCausalLM computes the same function."""
    return (
        norm.placement == "pre"
        and norm.kind == "rmsnorm"
        and norm.qk == "none"
        and not norm.embedding
        and not norm.depth_scaling
        and norm.branch_scale == "none"
        and norm.final is not False
        and not norm.pre_affine
        and model.attention_gate == "none"
        and not model.fixnorm
        and norm.removal.start is None
        # transformers' attention_bias and mlp_bias put them on the output projections too, and the head has none
        and not model.input_bias
        # LlamaConfig refuses other widths, even with a head_dim
        and model.hidden_size % model.num_attention_heads == 0
    )


def config_json(model: ModelConfig, norm: NormConfig, *, eos_token_id: int | None) -> dict[str, Any]:
    """Content of `config.json` for a model, fp32, in JSON types.

    eos_token_id: the token that ends a document, which is also the one before its first token (bos).
    """
    kind = LLAMA if is_llama(model, norm) else NEXA
    config: dict[str, Any] = {"model_type": kind, "architectures": [_ARCHITECTURES[kind]]}
    for field in dataclasses.fields(model):
        if field.name not in _NOT_OF_THE_MODEL:
            config[_OURS.get(field.name, field.name)] = getattr(model, field.name)
    config["num_key_value_heads"] = model.num_key_value_heads or model.num_attention_heads
    config["head_dim"] = model.head_dim or model.hidden_size // model.num_attention_heads
    config |= {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id, "torch_dtype": "float32"}
    if kind == NEXA:
        return config | {"nexa_norm": dataclasses.asdict(norm)}
    # transformers 5 reads rope_parameters, 4 reads rope_theta
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    exact = {"rms_norm_eps": model.rms_norm_eps if norm.eps is None else norm.eps, "rope_parameters": rope}
    fixed = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}
    return config | exact | fixed


def from_config_json(config: Mapping[str, Any], where: str = "config.json") -> tuple[ModelConfig, NormConfig]:
    """The inverse of `config_json`, for LLaMA folders from elsewhere too. `where` names the file in messages.

    `head_dim` and `num_key_value_heads` come back as numbers, and the epsilon of a LLaMA as `rms_norm_eps`.
    Raises UserError naming the key for what is missing, of a wrong type, or cannot be represented.
    """
    kind = config.get("model_type")
    if kind not in _ARCHITECTURES:
        raise UserError(f"{where}: model_type={kind!r}: must be one of {', '.join(_ARCHITECTURES)}")
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        raise UserError(f"{where}: without {', '.join(missing)}; a configuration of a {kind} model has it")
    model: dict[str, Any] = dict(_LLAMA_DEFAULTS) if kind == LLAMA else {}
    for field in dataclasses.fields(ModelConfig):
        key = _OURS.get(field.name, field.name)
        if field.name not in _NOT_OF_THE_MODEL and config.get(key) is not None:
            model[field.name] = config[key]
    norm: Any = config.get("nexa_norm", {})
    if kind == LLAMA:
        norm = {}
        _refuse_what_differs(config, where)
        model["rope_theta"] = _rope_theta(config, where)
    try:
        whole = from_mapping({"model": model, "norm": norm})
    except ConfigError as error:
        raise UserError(f"{where}: " + "; ".join(error.problems)) from None
    return whole.model, whole.norm


def _refuse_what_differs(config: Mapping[str, Any], where: str) -> None:
    for key, values in _ONLY.items():
        if config.get(key) not in values:
            raise UserError(f"{where}: {key}={config[key]!r} cannot be represented; nexa computes {key}={values[0]}")


def _rope_theta(config: Mapping[str, Any], where: str) -> float:
    """Base of the rotary embedding, from either generation of keys; only the unscaled kind is known."""
    theta = None
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else None
        if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(f"{where}: {key}={config[key]!r} cannot be represented; nexa computes rope_type=default")
        theta = theta or rope.get("rope_theta")
    return theta or config.get("rope_theta") or 10000.0
