"""config.json in both directions."""

import dataclasses
import json

import pytest

from nexa.config.schema import ModelConfig, NormConfig
from nexa.errors import UserError
from nexa.interop.huggingface import config_json, from_config_json
from nexa.model.kinds import KINDS
from nexa.model.placement import PLACEMENTS
from tests.cli.common import tiny_model

LLAMA_FROM_ELSEWHERE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 32003,
    "use_cache": True,
}


def through_json(model: ModelConfig, norm: NormConfig) -> tuple[ModelConfig, NormConfig]:
    return from_config_json(json.loads(json.dumps(config_json(model, norm, eos_token_id=3))))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_inverse_gives_the_same_model_back(placement):
    model = dataclasses.replace(
        tiny_model(placement).config, head_dim=8, tie_word_embeddings=True, initializer="scaled", initializer_range=0.01
    )
    norm = NormConfig(placement=placement, mix_post_layers=2, eps=3e-5)
    back_model, back_norm = through_json(model, norm)
    if placement == "pre":
        assert back_norm == NormConfig()
        assert back_model == dataclasses.replace(model, rms_norm_eps=3e-5)
    else:
        assert (back_model, back_norm) == (model, norm)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "rmsnorm"])
def test_kinds_come_back(kind):
    model, norm = tiny_model(kind=kind).config, NormConfig(kind=kind, gate_rank=3, eps=2e-5)
    model = dataclasses.replace(model, head_dim=8)
    assert through_json(model, norm) == (model, norm)


def test_a_configuration_from_before_the_gates_takes_the_default():
    config = config_json(tiny_model().config, NormConfig(placement="peri", gate_rank=3), eos_token_id=1)
    del config["nexa_norm"]["gate_rank"]
    assert from_config_json(config)[1] == NormConfig(placement="peri", gate_rank=16)


@pytest.mark.parametrize(
    "norm",
    [
        NormConfig(placement="peri"),
        NormConfig(qk="rms"),
        NormConfig(embedding=True),
        NormConfig(final=False),
        NormConfig(pre_affine=True),
        *(NormConfig(kind=kind) for kind in KINDS if kind != "rmsnorm"),
    ],
)
def test_what_transformers_llama_does_not_compute_is_not_called_llama(norm):
    model = tiny_model().config
    assert config_json(model, NormConfig(), eos_token_id=1)["model_type"] == "llama"
    config = config_json(model, norm, eos_token_id=1)
    assert (config["model_type"], config["architectures"]) == ("nexa", ["NexaForCausalLM"])


@pytest.mark.parametrize("option", [{"attention_gate": "headwise"}, {"fixnorm": True}], ids=str)
def test_options_of_the_model_come_back_and_are_no_llama(option):
    model = dataclasses.replace(tiny_model().config, head_dim=8, **option)
    assert config_json(model, NormConfig(), eos_token_id=1)["model_type"] == "nexa"
    assert through_json(model, NormConfig()) == (model, NormConfig())


def test_a_width_that_llama_config_refuses_is_not_called_llama():
    model = ModelConfig(hidden_size=30, num_attention_heads=4, head_dim=8)
    assert config_json(model, NormConfig(), eos_token_id=1)["model_type"] == "nexa"


def test_a_llama_from_elsewhere():
    model, norm = from_config_json(LLAMA_FROM_ELSEWHERE)
    assert norm == NormConfig()
    assert model == ModelConfig(
        vocab_size=32003,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )


def test_absent_keys_take_llamas_defaults_and_not_ours():
    kept = {"model_type", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"}
    model, _ = from_config_json({key: value for key, value in LLAMA_FROM_ELSEWHERE.items() if key in kept})
    assert (model.max_position_embeddings, model.rope_theta, model.rms_norm_eps) == (2048, 10000.0, 1e-6)


def test_both_generations_of_the_rotary_keys():
    new = LLAMA_FROM_ELSEWHERE | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_theta": None}
    assert from_config_json(new)[0].rope_theta == 7.0
    assert from_config_json(LLAMA_FROM_ELSEWHERE)[0].rope_theta == 500000.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("attention_dropout", 0.1),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}),
        ("quantization_config", {"bits": 4}),
        ("model_type", "mistral"),
        ("model_type", None),
        ("hidden_size", "wide"),
        ("vocab_size", None),
        ("num_hidden_layers", 2.5),
    ],
)
def test_what_cannot_be_represented_is_named(key, value):
    with pytest.raises(UserError, match=key) as caught:
        from_config_json(LLAMA_FROM_ELSEWHERE | {key: value}, where="some/config.json")
    assert str(caught.value).startswith("some/config.json")
