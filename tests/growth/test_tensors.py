"""What each tensor of the result is: exact copies, depth-dependent parts, optimizer state."""

from __future__ import annotations

import math

import pytest
import torch

from nexa.errors import UserError
from nexa.growth.operators import OPERATORS, Growth
from nexa.growth.target import plan
from nexa.model.decoder import Decoder
from nexa.model.init import initialise
from nexa.model.kinds import KINDS
from nexa.model.placement import PLACEMENTS, block_plans
from tests.growth.common import grown_tensors, moments_of, weights_of
from tests.interop.common import allowed, random_ids, random_model


def block(tensors: dict[str, torch.Tensor], index: int, prefix: str = "") -> dict[str, torch.Tensor]:
    start = f"{prefix}model.layers.{index}."
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}


def assert_copy(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


ORDERS = {
    "stack": lambda j: j % 4,
    "direct": lambda j: j % 4,
    "interleave": lambda j: j // 3,
}


@pytest.mark.parametrize(
    ("operator", "placement"),
    [("stack", name) for name in PLACEMENTS if name not in {"mix", "hybrid_star"}]
    + [("interleave", "pre"), ("direct", "lns")],
)
def test_each_block_is_a_copy(operator, placement):
    """Of weights and moments; embedding, final norm and head come along."""
    decoder = random_model({"placement": placement})
    moments = moments_of(decoder)
    target, tensors = grown_tensors(decoder, moments, operator=operator, factor=3, moments="copy")
    weights, source = {k: t for k, t in tensors.items() if "/" not in k}, weights_of(decoder)
    assert target.model.num_hidden_layers == 12
    for index in range(12):
        assert_copy(block(weights, index), block(source, ORDERS[operator](index)))
        for state in ("exp_avg/", "exp_avg_sq/"):
            assert_copy(block(tensors, index, state), block(moments, ORDERS[operator](index), state))
    outside = {name for name in source if not name.startswith("model.layers.")}
    assert outside >= {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(torch.equal(tensors[name], source[name]) for name in outside)
    assert all(torch.equal(tensors[f"exp_avg/{name}"], moments[f"exp_avg/{name}"]) for name in outside)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_tensor_of_every_kind_has_a_rule(kind):
    decoder = random_model({"kind": kind})
    _, tensors = grown_tensors(decoder, operator="stack", layers=(3, 0, 0))
    for index, source in enumerate((3, 0, 0)):
        assert_copy(block(tensors, index), block(weights_of(decoder), source))


def test_mix_is_derived_again_or_kept():
    """4 blocks with one Post-LN, times 2: two of 8, or one. What a block has no norm for starts at 1."""
    decoder = random_model({"placement": "mix"})
    source = weights_of(decoder)
    for scales, post in (("recompute", 2), ("keep", 1)):
        target, tensors = grown_tensors(decoder, operator="stack", factor=2, fixed_scales=scales)
        plans = block_plans(target.norm, 8)
        assert [one.attn.residual for one in plans] == [index < post for index in range(8)]
        assert torch.equal(
            tensors["model.layers.0.attn_norm.residual.weight"], source["model.layers.0.attn_norm.residual.weight"]
        )
        # block 4 copies block 0, which is Post-LN, and is Pre-LN
        assert torch.equal(tensors["model.layers.4.input_layernorm.weight"], torch.ones(32))
        assert torch.equal(
            tensors["model.layers.4.self_attn.q_proj.weight"], source["model.layers.0.self_attn.q_proj.weight"]
        )
    target, tensors = grown_tensors(decoder, operator="stack", factor=2)
    assert torch.equal(tensors["model.layers.1.mlp_norm.residual.weight"], torch.ones(32))  # of block 1, Pre-LN
    given = plan(
        decoder.config, random_model({"placement": "mix", "mix_post_layers": 3}).norm_config, Growth("stack", 2)
    )
    assert given.norm.mix_post_layers == 6


def test_the_first_block_of_hybrid_star():
    decoder = random_model({"placement": "hybrid_star"})
    moments = moments_of(decoder)
    _, tensors = grown_tensors(decoder, moments, operator="stack", factor=2, moments="copy")
    assert "model.layers.4.input_layernorm.weight" not in tensors
    assert torch.equal(tensors["model.layers.4.attn_norm.residual.weight"], torch.ones(32))
    assert not tensors["exp_avg/model.layers.4.attn_norm.residual.weight"].any()
    assert torch.equal(
        tensors["model.layers.4.self_attn.v_norm.weight"], weights_of(decoder)["model.layers.0.self_attn.v_norm.weight"]
    )
    assert torch.equal(
        tensors["model.layers.5.attn_norm.residual.weight"],
        weights_of(decoder)["model.layers.1.attn_norm.residual.weight"],
    )


def scales(norm, layers: int) -> list[tuple[float, float, float]]:
    return [(one.attn.input_scale, one.attn.skip_scale, one.attn.branch_scale) for one in block_plans(norm, layers)]


@pytest.mark.parametrize(
    ("norm", "at", "new"),
    [
        ({"placement": "lns"}, 0, lambda index: 1 / math.sqrt(index + 1)),
        ({"placement": "peri", "depth_scaling": True}, 0, lambda index: 1 / math.sqrt(index + 1)),
        ({"placement": "deepnorm"}, 1, lambda index: 16**0.25),
        ({"branch_scale": "fixed"}, 2, lambda index: 16**-0.5),
    ],
)
def test_fixed_scales(norm, at, new):
    decoder = random_model(norm)
    was = scales(decoder.norm_config, 4)
    for operator, order in (("stack", [0, 1, 2, 3] * 2), ("interleave", [0, 0, 1, 1, 2, 2, 3, 3])):
        kept = plan(decoder.config, decoder.norm_config, Growth(operator, 2, fixed_scales="keep"))
        again = plan(decoder.config, decoder.norm_config, Growth(operator, 2))
        assert scales(kept.norm, 8) == [was[source] for source in order]
        assert [one[at] for one in scales(again.norm, 8)] == pytest.approx([new(index) for index in range(8)])
        # grown again, kept numbers go along, and recomputed ones do not remember them
        twice = plan(kept.model, kept.norm, Growth("stack", 2, fixed_scales="keep"))
        assert scales(twice.norm, 16) == scales(kept.norm, 8) * 2
        if at == 0:
            fresh = plan(kept.model, kept.norm, Growth("stack", 2))
            assert fresh.norm == again.norm


def test_values_that_were_given_stay():
    for norm in (
        {"placement": "deepnorm", "deepnorm_alpha": 3.0},
        {"branch_scale": "fixed", "branch_scale_value": 0.2},
    ):
        decoder = random_model(norm)
        assert plan(decoder.config, decoder.norm_config, Growth("stack", 2)).norm == decoder.norm_config


@pytest.mark.parametrize(
    ("norm", "model", "name", "ratio"),
    [
        ({}, {"initializer": "scaled"}, "self_attn.o_proj.weight", 0.5),
        ({}, {"initializer": "scaled"}, "self_attn.q_proj.weight", 1.0),
        ({}, {"initializer": "tinyllama"}, "mlp.down_proj.weight", 0.25),
        ({"placement": "deepnorm"}, {"initializer": "xavier"}, "mlp.up_proj.weight", 2**-0.5),
        ({"placement": "dssn"}, {}, "mlp_norm.output.weight", 0.5),
        ({"placement": "dssn"}, {}, "input_layernorm.weight", 1.0),
        ({"placement": "peri"}, {}, "mlp_norm.output.weight", 1.0),
        ({"branch_scale": "skip_init"}, {}, "attn_scale", 0.5),
        ({"branch_scale": "skip_init", "branch_scale_value": 0.0}, {}, "attn_scale", 1.0),
    ],
)
def test_trained_scales(norm, model, name, ratio):
    """Depth 4 to 16: as trained, or in proportion to what the initialisation says."""
    decoder = random_model(norm, **model)
    wanted = weights_of(decoder)[f"model.layers.1.{name}"]
    _, kept = grown_tensors(decoder, operator="stack", factor=4)
    _, rescaled = grown_tensors(decoder, operator="stack", factor=4, trained_scales="rescale")
    for index in (1, 13):
        assert torch.equal(kept[f"model.layers.{index}.{name}"], wanted)
        torch.testing.assert_close(rescaled[f"model.layers.{index}.{name}"], ratio * wanted)


def test_rescaled_depth_rule_is_that_of_the_place():
    """`scaled_depth` divides outputs of block l by sqrt(2 l): block 5 copies block 1."""
    decoder = random_model(initializer="scaled_depth")
    _, tensors = grown_tensors(decoder, operator="stack", factor=2, trained_scales="rescale")
    wanted = weights_of(decoder)["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(tensors["model.layers.5.mlp.down_proj.weight"], wanted * math.sqrt(2 / 6))


def test_noise_is_small_repeatable_and_on_later_copies_only():
    decoder = random_model()
    source = weights_of(decoder)
    _, first = grown_tensors(decoder, operator="noise", factor=2)
    _, again = grown_tensors(decoder, operator="noise", factor=2)
    _, other = grown_tensors(decoder, operator="noise", factor=2, seed=1)
    for index in range(4):
        assert_copy(block(first, index), block(source, index))
    name = "model.layers.5.mlp.up_proj.weight"
    wanted = source["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
    relative = (first[name] - wanted).norm() / wanted.norm()
    assert 0.008 < relative < 0.012
    assert torch.equal(first["model.layers.5.input_layernorm.weight"], source["model.layers.1.input_layernorm.weight"])


def test_scaled_moments_of_copies():
    """Copies share the source's gradient: halves of the first, quarters of the second moment."""
    decoder = random_model()
    moments = moments_of(decoder)
    _, tensors = grown_tensors(decoder, moments, operator="stack", layers=(0, 1, 2, 3, 3), moments="scale")
    for index, source, share in ((0, 0, 1.0), (3, 3, 0.5), (4, 3, 0.5)):
        for state, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            for name, tensor in block(tensors, index, f"{state}/").items():
                torch.testing.assert_close(tensor, moments[f"{state}/model.layers.{source}.{name}"] * share**power)
    _, zero = grown_tensors(decoder, moments, operator="zero", factor=2, moments="scale")
    assert_copy(block(zero, 1, "exp_avg/"), block(moments, 1, "exp_avg/"))
    assert not any(tensor.any() for tensor in block(zero, 5, "exp_avg_sq/").values())


def gradients(decoder: Decoder) -> dict[str, torch.Tensor]:
    ids = random_ids()
    decoder.zero_grad()
    decoder(ids, ids.roll(1)).backward()
    return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("norm", "model"),
    [
        ({"placement": "normformer", "kind": "gatednorm"}, {}),
        ({"placement": "peri", "qk": "rms_full", "kind": "seednorm"}, {"input_bias": True}),
        ({"kind": "scalenorm", "placement": "post"}, {"attention_gate": "headwise"}),
    ],
)
def test_scaled_moments_of_duplicated_units_are_what_gradients_become(norm, model):
    """With the gradient in the place of the first moment: the grown model's own."""
    decoder = random_model(norm, **model)
    old = gradients(decoder)
    moments = {f"exp_avg/{name}": gradient for name, gradient in old.items()}
    growth = {"operator": "widen", "hidden_size": 64, "intermediate_size": 132, "num_attention_heads": 8, "noise": 0.0}
    target, tensors = grown_tensors(decoder, moments, moments="scale", **growth)
    grown = Decoder(target.model, target.norm)
    with torch.no_grad():
        for name, parameter in grown.named_parameters():
            parameter.copy_(tensors[name])
    for name, gradient in gradients(grown.eval()).items():
        found = tensors[f"exp_avg/{name}"]
        assert (found - gradient).abs().max() <= 1e-3 * gradient.abs().max() + 1e-6, name


def test_what_the_source_lacks_is_drawn_as_in_a_new_model():
    """GatedNorm's first matrix is random: that of the new model of this seed."""
    decoder = random_model({"placement": "mix", "kind": "gatednorm"})
    target, tensors = grown_tensors(decoder, operator="stack", factor=2, seed=9)
    new = Decoder(target.model, target.norm)
    initialise(new, target.model, target.norm, 9)
    for part in ("weight", "gate_down.weight", "gate_up.weight"):
        name = f"model.layers.4.input_layernorm.{part}"
        assert torch.equal(tensors[name], new.state_dict()[name])


@pytest.mark.parametrize(
    ("growth", "message"),
    [
        ({"operator": "stack", "factor": 0}, "factor=0: must be a whole number of at least 1"),
        ({"operator": "stack", "factor": -2}, "factor=-2"),
        ({"operator": "stack", "factor": 10**9}, "factor=1000000000: .* at most 100000 blocks of the 4"),
        ({"operator": "stack", "factor": 1}, "factor=1: the model would not grow"),
        ({"operator": "stack"}, "operator=stack: nothing would grow"),
        ({"operator": "stack", "factor": 2, "layers": (0,)}, "factor=2, layers=0: both say how deep"),
        ({"operator": "stack", "layers": (0, 4)}, "layers=0,4: must list blocks of the source, 0 to 3; 4 is none"),
        ({"operator": "stack", "layers": ()}, "layers=: must list blocks"),
        ({"operator": "magic", "factor": 2}, "operator=magic: must be one of stack, interleave"),
        ({"operator": "stack", "factor": 2, "hidden_size": 64}, r"operator=stack: does not widen \(hidden_size=64\)"),
        ({"operator": "widen", "factor": 2}, "operator=widen: leaves the number of blocks"),
        ({"operator": "widen", "num_attention_heads": 6}, "num_attention_heads=6: must be a multiple of the 4"),
        ({"operator": "widen", "num_key_value_heads": 3}, "num_key_value_heads=3: must be a multiple of the 2"),
        (
            {"operator": "widen", "num_attention_heads": 8, "num_key_value_heads": 6},
            "num_attention_heads=8, num_key_value_heads=6: 2 and 3 times",
        ),
        ({"operator": "direct", "hidden_size": 16}, "hidden_size=16: must be at least the 32"),
        ({"operator": "widen", "intermediate_size": 0}, "intermediate_size=0: must be at least the 44"),
        ({"operator": "noise", "factor": 2, "noise": -1.0}, "noise=-1.0: must be a number of at least 0"),
        ({"operator": "zero", "factor": 2, "noise": 0.1}, "noise=0.1: operator=zero keeps the function"),
        (
            {"operator": "zero", "factor": 2, "trained_scales": "rescale"},
            "trained_scales=rescale: changes the function",
        ),
    ],
)
def test_bad_requests(growth, message):
    decoder = random_model()
    with pytest.raises(UserError, match=message):
        plan(decoder.config, decoder.norm_config, Growth(**growth))


def test_every_combination_grows_or_is_refused():
    """No placement and kind ends in another exception, and what does not keep the function refuses nothing."""
    refused, count = [], 0
    for placement in PLACEMENTS:
        for kind in ("rmsnorm", "crmsnorm", "scalenorm"):
            if not allowed(placement=placement, kind=kind):
                continue
            decoder = random_model({"placement": placement, "kind": kind}, num_hidden_layers=2)
            for name, row in OPERATORS.items():
                growth = {"factor": 2} if row.order else {"intermediate_size": 88, "hidden_size": 64}
                try:
                    _, tensors = grown_tensors(decoder, operator=name, **growth)
                except UserError:
                    refused.append((placement, kind, name))
                    continue
                assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
                count += 1
    assert count > 100
    assert {name for _, _, name in refused} == {"zero", "widen"}
    assert {kind for _, kind, name in refused if name == "widen"} == {"crmsnorm"}
