"""Moments of every initialisation rule against its formula; weights depend on seed and name only."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from nexa.config.schema import ModelConfig, NormConfig
from nexa.model.decoder import Decoder, flops_per_token, parameter_count
from nexa.model.init import RULES, bias_role, initialise, layer_index, role_of
from nexa.optim.build import decays

D, F, L, V = 128, 192, 3, 512


def build(
    rule: str = "normal", placement: str = "pre", layers: int = L, seed: int = 0, **model_keys
) -> dict[str, torch.Tensor]:
    model = ModelConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=layers,
        num_attention_heads=4,
        initializer=rule,
        **model_keys,
    )
    norm = NormConfig(placement=placement)  # type: ignore[arg-type]
    decoder = Decoder(model, norm)
    initialise(decoder, model, norm, seed)
    return decoder.state_dict()


# standard deviation of: embedding, head, q, o of block 2, up of block 2, down of block 2
FORMULAS = {
    "normal": (0.02,) * 6,
    "truncated": (0.02,) * 6,
    "scaled_depth": (0.02, 0.02, 0.02, 0.02 / math.sqrt(6), 0.02, 0.02 / math.sqrt(6)),
    "llama": (1.0, D**-0.5, 0.02, *(0.02 / math.sqrt(2 * L),) * 3),
    "fan_in": (1.0, *(D**-0.5,) * 4, F**-0.5),
    "mitchell": (*(D**-0.5,) * 3, (6 * D) ** -0.5, D**-0.5, (6 * F) ** -0.5),
    "tinyllama": (*(math.sqrt(0.4 / D),) * 3, D**-0.5 / L, math.sqrt(0.4 / D), F**-0.5 / L),
    "transformers_without_tears": (*(math.sqrt(0.4 / D),) * 4, *(math.sqrt(2 / (D + F)),) * 2),
    "scaled": (0.02, 0.02, 0.02, 0.02 / math.sqrt(2 * L), 0.02, 0.02 / math.sqrt(2 * L)),
    "llama_depth": (1.0, D**-0.5, 0.02, 0.02 / math.sqrt(6), 0.02 / math.sqrt(6), 0.02 / math.sqrt(6)),
    "small_init": (*(math.sqrt(0.4 / D),) * 3, 2 / (L * math.sqrt(D)), math.sqrt(0.4 / D), 2 / (L * math.sqrt(D))),
    "tiny_init": (0.5, *(math.sqrt(1 / (2 * D * L)),) * 5),
    "full_megatron": (
        math.sqrt(0.4 / D), D**-0.5, math.sqrt(0.4 / D),
        math.sqrt(0.4 / D / (2 * L)), math.sqrt(0.4 / D), math.sqrt(0.4 / D / (2 * L)),
    ),
    "xavier": (0.02, 0.02, math.sqrt(1 / D), math.sqrt(1 / D), math.sqrt(2 / (D + F)), math.sqrt(2 / (D + F))),
}  # fmt: skip
TRUNCATED = {"truncated", "llama", "llama_depth", "fan_in", "mitchell", "full_megatron"}
UNIT_EMBEDDING = {"llama", "llama_depth", "fan_in"}
NAMES = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.2.self_attn.o_proj.weight",
    "model.layers.2.mlp.up_proj.weight",
    "model.layers.2.mlp.down_proj.weight",
)


def test_every_rule_has_a_formula_here() -> None:
    assert set(FORMULAS) == set(RULES)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_moments(rule: str) -> None:
    state = build(rule)
    # a normal distribution cut at 3 sigma has 0.9866 of its standard deviation
    cut = 0.98658 if rule in TRUNCATED else 1.0
    for name, std in zip(NAMES, FORMULAS[rule], strict=True):
        expected = std * (1.0 if rule in UNIT_EMBEDDING and "embed" in name else cut)
        assert state[name].std().item() == pytest.approx(expected, rel=0.02), name
        assert abs(state[name].mean().item()) < 5 * expected / math.sqrt(state[name].numel())
        if rule in TRUNCATED and not (rule in UNIT_EMBEDDING and "embed" in name):
            assert state[name].abs().max() <= 3 * std * 1.0001


@pytest.mark.parametrize("shape", [0.7, 1.0, 4.0])
def test_generalised_gaussian_has_the_rule_s_deviation_and_its_own_tails(shape: float) -> None:
    state = build(initializer_shape=shape)
    values = torch.cat([state[name].flatten() for name in NAMES]).double() / 0.02
    gamma = math.gamma
    fourth = gamma(5 / shape) * gamma(1 / shape) / gamma(3 / shape) ** 2
    sixth = gamma(7 / shape) * gamma(1 / shape) ** 2 / gamma(3 / shape) ** 3
    count = values.numel()
    for moment, expected, noise in ((2, 1.0, math.sqrt(fourth - 1)), (4, fourth, math.sqrt(sixth * 4 * fourth))):
        assert abs(values.pow(moment).mean().item() - expected) < 5 * noise / math.sqrt(count) + 0.02 * expected
    assert abs(values.mean().item()) < 5 / math.sqrt(count)
    # P(|x| < median) is 1/2 where the regularised incomplete gamma function says
    median = float(scipy.stats.gennorm(shape, scale=math.sqrt(gamma(1 / shape) / gamma(3 / shape))).ppf(0.75))
    assert (values.abs() < median).double().mean().item() == pytest.approx(0.5, abs=0.005)


def test_generalised_gaussian_obeys_the_cut_and_the_seed() -> None:
    cut = build("truncated", initializer_shape=1.0)
    assert 0.95 * 0.06 < cut[NAMES[0]].abs().max() <= 0.06
    assert torch.equal(cut[NAMES[0]], build("truncated", initializer_shape=1.0)[NAMES[0]])
    assert not torch.equal(cut[NAMES[0]], build("truncated", initializer_shape=1.0, seed=1)[NAMES[0]])


def test_deepnorm_gain_is_beta_on_value_output_and_feed_forward() -> None:
    plain, deep = build(), build(placement="deepnorm")
    beta = (8 * L) ** -0.25
    for name in NAMES:
        factor = 1.0 if "embed" in name or "head" in name or "q_proj" in name else beta
        torch.testing.assert_close(deep[name], plain[name] * factor)
    value = "model.layers.1.self_attn.v_proj.weight"
    torch.testing.assert_close(deep[value], plain[value] * beta)


def test_dssn_output_gains() -> None:
    state = build(placement="dssn")
    for block in range(L):
        assert state[f"model.layers.{block}.attn_norm.output.weight"].unique().item() == pytest.approx(
            0.283 / math.sqrt(L)
        )
        assert state[f"model.layers.{block}.mlp_norm.output.weight"].unique().item() == pytest.approx(
            0.432 / math.sqrt(L)
        )


def test_weights_depend_on_seed_and_name_only() -> None:
    shallow, deep, other = build(layers=2), build(layers=4), build(layers=2, seed=1)
    for name in shallow:
        assert torch.equal(shallow[name], deep[name])
    assert not torch.equal(shallow[NAMES[0]], other[NAMES[0]])
    assert not torch.equal(
        shallow["model.layers.0.self_attn.q_proj.weight"], shallow["model.layers.1.self_attn.q_proj.weight"]
    )


def test_biases_start_at_zero_and_move_no_other_weight() -> None:
    plain, state = build(), build(input_bias=True)
    biases = {name for name in state if bias_role(name) is not None}
    layers = [f"self_attn.{n}_proj" for n in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
    wanted = {f"model.layers.{i}.{layer}.bias" for i in range(L) for layer in layers} | {"lm_head.bias"}
    assert biases == wanted == set(state) - set(plain)
    assert all(not state[name].any() and not decays(name, decay_norms=True) for name in biases)
    assert all(torch.equal(state[name], plain[name]) for name in plain)
    assert bias_role("model.norm.bias") is None


def test_roles_and_layers_from_names() -> None:
    assert role_of("model.layers.11.self_attn.q_proj.weight") == "q"
    assert role_of("model.layers.0.self_attn.q_norm.weight") is None
    assert role_of("model.layers.0.self_attn.head_scale") is None
    assert layer_index("model.layers.11.mlp.up_proj.weight") == 11
    assert layer_index("lm_head.weight") is None


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ((512, 1376, 8, 8), 58.07),
        ((768, 2048, 12, 12), 134.11),
        ((1024, 2736, 24, 16), 367.97),
        ((2048, 5461, 24, 32), 1339.08),
    ],
)
def test_parameter_counts_of_the_c4_sizes(size: tuple[int, int, int, int], count: float) -> None:
    hidden, intermediate, layers, heads = size
    model = ModelConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads
    )
    assert parameter_count(model, NormConfig(placement="mix")) / 1e6 == pytest.approx(count, abs=0.005)


def test_flops_per_token_by_hand() -> None:
    model = ModelConfig(vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=4)
    matrices = L * (4 * D * D + 3 * D * F) + V * D
    assert flops_per_token(model, NormConfig(), 100) == 6 * matrices + 12 * L * D * 100
