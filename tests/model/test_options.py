"""Options of norms, attention and embedding: identities, initial values, names."""

from __future__ import annotations

import math

import pytest
import torch

from nexa.config.schema import ModelConfig, NormConfig
from nexa.model.decoder import Decoder, flops_per_token
from nexa.model.init import initialise, role_of
from nexa.model.kinds import KINDS, NormBuilder
from nexa.model.layers import unit_rows
from nexa.optim.build import decays
from tests.model.test_kinds import MODEL, WIDTH

IDS = torch.randint(0, 53, (2, 9), generator=torch.Generator().manual_seed(1))


def decoder(norm: NormConfig | None = None, **model) -> Decoder:
    config, norm = ModelConfig(**{**vars(MODEL), **model}), norm or NormConfig()
    made = Decoder(config, norm)
    initialise(made, config, norm, 0)
    return made


WITH_STATISTICS = ["rmsnorm", "layernorm", "crmsnorm", "scalenorm", "seednorm", "gatednorm"]


@pytest.mark.parametrize("kind", WITH_STATISTICS)
def test_pre_affine_starts_as_the_kind_itself(kind: str) -> None:
    plain = decoder(NormConfig(kind=kind, placement="normformer"))  # type: ignore[arg-type]
    affine = decoder(NormConfig(kind=kind, placement="normformer", pre_affine=True))  # type: ignore[arg-type]
    added = affine.state_dict().keys() - plain.state_dict().keys()
    norms = decoder(NormConfig(placement="normformer")).state_dict()
    assert added == {name.replace("weight", "pre_weight") for name in norms if "norm" in name}
    assert all(bool((affine.state_dict()[name] == 1).all()) for name in added)
    with torch.no_grad():
        assert torch.equal(plain(IDS), affine(IDS))


def test_pre_affine_can_take_a_feature_out_of_the_statistics() -> None:
    norm = NormBuilder(KINDS["rmsnorm"], 1e-6, WIDTH, 1, pre_affine=True)("attention")
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    outlier = x.clone()
    outlier[:, 3] = 1e4
    with torch.no_grad():
        norm.pre_weight[3] = 0.0  # type: ignore[index]
        assert torch.equal(norm(x), norm(outlier))


@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
def test_a_gate_of_zero_halves_the_attention(gate: str) -> None:
    plain, gated = decoder(), decoder(attention_gate=gate)
    state = gated.state_dict()
    shapes = {tuple(p.shape) for name, p in state.items() if name.endswith("self_attn.gate_proj.weight")}
    assert shapes == {({"elementwise": WIDTH, "headwise": 4}[gate], WIDTH)}
    with torch.no_grad():
        for name, value in plain.state_dict().items():
            state[name].copy_(value * 2 if name.endswith("o_proj.weight") else value)
            assert role_of(name) != "attn_gate"
        for block in gated.model.layers:
            block.self_attn.gate_proj.weight.zero_()  # type: ignore[union-attr, operator]
        assert torch.equal(plain(IDS), gated(IDS))


def test_a_gate_is_a_matrix_of_its_own_role() -> None:
    name = "model.layers.1.self_attn.gate_proj.weight"
    assert role_of(name) == "attn_gate" and role_of("model.layers.1.mlp.gate_proj.weight") == "gate"
    assert decays(name)
    wide = dict(hidden_size=256, initializer="tiny_init", attention_gate="elementwise")
    found = decoder(**wide).state_dict()[name]
    assert found.std().item() == pytest.approx(math.sqrt(1 / (2 * 256 * MODEL.num_hidden_layers)), rel=0.05)
    # DeepNorm scales values and outputs, not the gate
    deep = decoder(NormConfig(placement="deepnorm"), **wide).state_dict()[name]
    assert torch.equal(deep, found)
    plain, gated = (
        flops_per_token(ModelConfig(**{**vars(MODEL), "attention_gate": g}), NormConfig(), 8)
        for g in ("none", "headwise")
    )
    assert gated - plain == 6 * MODEL.num_hidden_layers * 4 * WIDTH


def test_head_scales_of_one_are_none_wherever_they_stand() -> None:
    heads, output = (decoder(NormConfig(placement="normformer", head_scale=at)) for at in ("heads", "output"))  # type: ignore[arg-type]
    assert heads.state_dict().keys() == output.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(heads(IDS), output(IDS))
        for made in (heads, output):
            for block in made.model.layers:
                block.self_attn.head_scale.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))  # type: ignore[union-attr, operator]
        assert not torch.allclose(heads(IDS), output(IDS))


@pytest.mark.parametrize("tied", [False, True])
def test_fixnorm_looks_at_the_direction_of_a_word_alone(tied: bool) -> None:
    model = decoder(fixnorm=True, tie_word_embeddings=tied).double()
    with torch.no_grad():
        logits = model(IDS)
        model.embedding_weight.mul_(torch.rand(53, 1, dtype=torch.float64) + 0.5)
        torch.testing.assert_close(model(IDS), logits, rtol=1e-10, atol=1e-10)
        first = unit_rows(model.embedding_weight) * math.sqrt(WIDTH)
        torch.testing.assert_close(first.square().mean(-1), torch.ones(53, dtype=torch.float64))
        hidden = model.model(IDS)
        bound = hidden.norm(dim=-1, keepdim=True)
        assert bool((logits.abs() <= bound).all()) or not tied


@pytest.mark.parametrize("rule", ["normal", "tiny_init"])
def test_fixnorm_starts_uniform(rule: str) -> None:
    table = decoder(fixnorm=True, initializer=rule, vocab_size=2000).embedding_weight.detach()
    assert table.abs().max().item() == pytest.approx(0.01, rel=1e-3) and table.abs().max() <= 0.01
    assert table.std().item() == pytest.approx(0.01 / math.sqrt(3), rel=0.01)
    assert table.mean().item() == pytest.approx(0.0, abs=1e-4)


def test_a_row_of_zeros_stays() -> None:
    x = torch.zeros(2, 5, requires_grad=True)
    y = unit_rows(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 5)) and x.grad is not None and torch.isfinite(x.grad).all()
