"""Operators that keep the function: logits before and after, for every placement and kind that allows it."""

from __future__ import annotations

import pytest
import torch

from nexa.config.schema import NormConfig
from nexa.errors import UserError
from nexa.growth.operators import Growth
from nexa.growth.target import plan
from nexa.model.kinds import KINDS
from nexa.model.placement import PLACEMENTS
from tests.growth.common import grown_model
from tests.interop.common import allowed, random_ids, random_model

WIDER = {"hidden_size": 64, "intermediate_size": 88, "num_attention_heads": 8}
FORBIDDEN = {"post", "deepnorm", "hybrid", "hybrid_star"}
"""Every block, or every later one, normalises the residual stream itself."""


def same(decoder, grown) -> None:
    ids = random_ids()
    with torch.no_grad():
        wanted, found = decoder(ids), grown(ids)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def changed(decoder, grown) -> None:
    ids = random_ids()
    with torch.no_grad():
        wanted, found = decoder(ids), grown(ids)
    assert (found - wanted).abs().max() > 1e-2 * wanted.abs().max()


@pytest.mark.parametrize("placement", sorted(set(PLACEMENTS) - FORBIDDEN))
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm", "seednorm"])
def test_depth(placement, kind):
    if not allowed(placement=placement, kind=kind):
        pytest.skip("these do not go together")
    decoder = random_model({"placement": placement, "kind": kind, "residual_gain": placement == "normformer"})
    same(decoder, grown_model(decoder, operator="zero", factor=2, fixed_scales="keep"))


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("placement", ["pre", "lns"])
def test_depth_every_kind(placement, kind):
    decoder = random_model({"placement": placement, "kind": kind})
    same(decoder, grown_model(decoder, operator="zero", factor=2))


@pytest.mark.parametrize("placement", sorted(FORBIDDEN))
def test_depth_that_mathematics_forbids(placement):
    decoder = random_model({"placement": placement})
    with pytest.raises(UserError, match=f"norm.placement={placement}: block 4 normalises the residual stream itself"):
        grown_model(decoder, operator="zero", factor=2, fixed_scales="keep")


def test_depth_between_the_blocks():
    """A list with each block and its copies, whose scales and pattern are kept."""
    for norm in ({"placement": "lns"}, {"branch_scale": "fixed"}, {"placement": "peri", "depth_scaling": True}):
        decoder = random_model(norm)
        listed = {"operator": "zero", "layers": (0, 0, 1, 2, 2, 3)}
        same(decoder, grown_model(decoder, **listed, fixed_scales="keep"))
        with pytest.raises(UserError, match=r"fixed_scales=recompute: block \d, a copy of \d, would compute something"):
            grown_model(decoder, **listed)
    with pytest.raises(UserError, match="first copies in their order; found 1,0,2,3"):
        grown_model(decoder, operator="zero", layers=(1, 0, 2, 3))


@pytest.mark.parametrize("scale", ["skip_init", "layer_scale"])
def test_depth_with_learned_branch_scales(scale):
    decoder = random_model({"branch_scale": scale})
    same(decoder, grown_model(decoder, operator="zero", factor=3))


def test_new_blocks_learn():
    """The first gradient reaches what keeps a later copy silent, in a size like that of its source's."""
    for placement in ("pre", "peri", "normformer"):
        decoder = random_model({"placement": placement})
        grown = grown_model(decoder, operator="zero", factor=2)
        ids = random_ids()
        grown(ids, ids.roll(1)).backward()
        last = "attn_norm.output.weight" if placement != "pre" else "self_attn.o_proj.weight"
        for index in range(4, 8):
            parameter = grown.get_parameter(f"model.layers.{index}.{last}")
            assert not parameter.detach().any()
            source = grown.get_parameter(f"model.layers.{index - 4}.{last}")
            assert 0.05 < parameter.grad.norm() / source.grad.norm() < 20


WIDTH_CASES = [({"placement": placement}, {}) for placement in sorted(PLACEMENTS) if placement != "normformer"] + [
    ({"placement": "normformer", "residual_gain": True}, {}),
    ({"kind": "layernorm"}, {"input_bias": True}),
    ({"kind": "scalenorm", "placement": "peri"}, {"tie_word_embeddings": True}),
    ({"kind": "scalenorm", "placement": "normformer"}, {}),
    ({"kind": "dyt"}, {"tie_word_embeddings": True}),
    ({"kind": "eln", "placement": "post"}, {}),
    ({"kind": "seednorm", "placement": "mix"}, {"tie_word_embeddings": True}),
    ({"kind": "gatednorm", "placement": "normformer"}, {"tie_word_embeddings": True}),
    ({"kind": "powernorm"}, {"tie_word_embeddings": True}),
    ({"kind": "unifiednorm", "placement": "sandwich"}, {}),
    ({"qk": "rms_full"}, {"num_key_value_heads": 4}),
    ({"qk": "rms"}, {"attention_gate": "elementwise"}),
    ({"qk": "cosine", "embedding": True}, {"attention_gate": "headwise", "fixnorm": True}),
    ({"pre_affine": True}, {"tie_word_embeddings": True, "fixnorm": True}),
    ({"branch_scale": "layer_scale"}, {"num_key_value_heads": 1}),
]


@pytest.mark.parametrize(("norm", "model"), WIDTH_CASES)
def test_width(norm, model):
    """With much noise, which cancels over the copies of a unit."""
    decoder = random_model(norm, **model)
    same(decoder, grown_model(decoder, operator="widen", noise=0.3, **WIDER))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "new_heads", "new_kv_heads"),
    [(4, 2, 8, 2), (4, 2, 8, 4), (4, 2, 16, 4), (4, 1, 4, 4), (4, 2, 8, 8), (2, 1, 4, 4), (4, 4, 12, 12)],
)
@pytest.mark.parametrize("qk", ["none", "rms_full"])
def test_heads_look_at_what_their_sources_do(heads, kv_heads, new_heads, new_kv_heads, qk):
    decoder = random_model({"qk": qk}, num_attention_heads=heads, num_key_value_heads=kv_heads)
    grown = grown_model(
        decoder, operator="widen", num_attention_heads=new_heads, num_key_value_heads=new_kv_heads, noise=0.1
    )
    assert grown.config.head_dim == 32 // heads
    same(decoder, grown)


def test_each_width_alone_and_with_depth():
    for placement in ("pre", "normformer"):
        decoder = random_model({"placement": placement})
        same(decoder, grown_model(decoder, operator="widen", hidden_size=96))
        same(decoder, grown_model(decoder, operator="widen", intermediate_size=88))
        same(decoder, grown_model(decoder, operator="zero", factor=2, **WIDER))
        same(decoder, grown_model(decoder, operator="direct", **WIDER))
    decoder = random_model()
    same(decoder, grown_model(decoder, operator="widen", intermediate_size=50))  # no norm sees these units


def test_noise_tells_duplicates_apart():
    """Without it two copies of a unit have one gradient for ever."""
    decoder, ids = random_model(), random_ids()
    for noise, equal in ((0.0, True), (0.01, False)):
        grown = grown_model(decoder, operator="widen", intermediate_size=88, noise=noise)
        grown(ids, ids.roll(1)).backward()
        gradient = grown.get_parameter("model.layers.1.mlp.up_proj.weight").grad
        assert torch.allclose(gradient[:44], gradient[44:], rtol=1e-4, atol=1e-6) == equal


@pytest.mark.parametrize(
    ("norm", "model", "growth", "message"),
    [
        ({}, {}, {"hidden_size": 48}, "hidden_size=48: must be a multiple of 32"),
        ({"kind": "crmsnorm"}, {}, {"hidden_size": 64}, "norm.kind=crmsnorm counts one coordinate more"),
        ({"kind": "bhyt"}, {}, {"hidden_size": 64}, r"norm.kind=bhyt takes \|W_O W_V\|"),
        ({"placement": "normformer"}, {}, {"intermediate_size": 50}, "intermediate_size=50: must be a multiple of 44"),
        (
            {"placement": "normformer", "head_scale": "output"},
            {},
            {"hidden_size": 64, "num_attention_heads": 8},
            "norm.head_scale=output",
        ),
        ({"placement": "deepnorm"}, {"tie_word_embeddings": True}, {"hidden_size": 64}, "no final norm"),
    ],
)
def test_width_that_mathematics_forbids(norm, model, growth, message):
    with pytest.raises(UserError, match=message):
        grown_model(random_model(norm, **model), operator="widen", **growth)


def test_uneven_widths_change_the_function_but_not_by_much():
    decoder, ids = random_model(), random_ids()
    grown = grown_model(decoder, operator="direct", hidden_size=48)
    with torch.no_grad():
        wanted, found = decoder(ids), grown(ids)
    assert 1e-3 < (found - wanted).norm() / wanted.norm() < 0.8


@pytest.mark.parametrize("operator", ["stack", "interleave", "noise"])
def test_copies_change_the_function(operator):
    decoder = random_model()
    changed(decoder, grown_model(decoder, operator=operator, factor=2))


def test_bhyt_keeps_its_variance_when_heads_grow():
    decoder = random_model({"kind": "bhyt"})
    same(decoder, grown_model(decoder, operator="widen", num_attention_heads=8, noise=0.0))


def test_removal_first():
    from nexa.config.schema import RemovalConfig

    with pytest.raises(UserError, match=r"norm.removal.start=5: its norms are being removed"):
        plan(random_model().config, NormConfig(removal=RemovalConfig(start=5)), Growth("stack", factor=2))
