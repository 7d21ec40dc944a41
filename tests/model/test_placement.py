"""Every placement against the independent reference: logits and all gradients, random gains."""

from __future__ import annotations

import pytest
import torch

from nexa.config.norm_checks import BHYT_PLACEMENTS
from nexa.config.schema import ModelConfig, NormConfig
from nexa.model.decoder import Decoder
from nexa.model.kinds import KINDS
from nexa.model.placement import PLACEMENTS, block_plans, post_layers
from tests.model.reference import Reference

LAYERS = 4
SHAPE = dict(
    vocab_size=53,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def random_decoder(norm: NormConfig, seed: int = 0, **model) -> Decoder:
    """Float64, every parameter random: no gain is one, no bias zero. In evaluation mode: `test_running` is about
    the training mode of the kinds that have one."""
    decoder = Decoder(ModelConfig(**{**SHAPE, **model}), norm).double()
    generator = torch.Generator().manual_seed(seed)
    scale = 0.1 if norm.placement == "none" else 0.3  # without norms the stream grows like a tower of powers
    with torch.no_grad():
        for parameter in decoder.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * scale + (1.0 if parameter.dim() == 1 else 0.0))
        for buffer in decoder.buffers():
            # large, so that norms shrink what statistics of random numbers know nothing of
            buffer.copy_(40 * (0.5 + torch.rand(buffer.shape, generator=generator, dtype=torch.float64)))
    return decoder.eval()


def compare(norm: NormConfig, documents=None, **model) -> None:
    decoder = random_decoder(norm, **model)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 53, (2, 11), generator=generator)
    labels = torch.randint(0, 53, (2, 11), generator=generator)
    state = {name: p.detach().clone().requires_grad_() for name, p in decoder.named_parameters()}
    state |= dict(decoder.named_buffers())
    options = {
        k: getattr(norm, k)
        for k in (
            "qk",
            "embedding",
            "residual_gain",
            "mix_alpha",
            "mix_post_layers",
            "deepnorm_alpha",
            "pre_affine",
            "head_scale",
            "depth_scaling",
            "branch_scale",
            "branch_scale_value",
        )
    }
    options |= {k: model[k] for k in ("attention_gate", "fixnorm") if k in model}
    options["tokens"] = norm.bhyt_tokens or 1024
    if norm.final is not None:
        options["final"] = norm.final
    reference = Reference(
        state,
        heads=4,
        kv_heads=2,
        layers=LAYERS,
        placement=norm.placement,
        kind=norm.kind,
        eps=norm.eps or 1e-6,
        **options,
    )
    expected = reference.logits(ids, documents)
    actual = decoder(ids, document_ids=documents)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)

    torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    decoder(ids, labels, documents).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert state[name].grad is not None, f"{name} is not used by the reference"
        torch.testing.assert_close(
            parameter.grad, state[name].grad, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


PAIRS = [(p, k) for p in sorted(PLACEMENTS) for k in KINDS if k != "bhyt" or p in BHYT_PLACEMENTS]


@pytest.mark.parametrize(("placement", "kind"), PAIRS)
def test_logits_and_gradients_equal_the_reference(placement: str, kind: str) -> None:
    compare(NormConfig(placement=placement, kind=kind))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("placement", "options"),
    [
        ("peri", {"depth_scaling": True}),
        ("peri", {"depth_scaling": True, "branch_scale": "fixed"}),
        ("post", {"branch_scale": "fixed", "branch_scale_value": 0.3}),
        ("peri", {"branch_scale": "skip_init"}),
        ("post", {"branch_scale": "layer_scale"}),
    ],
)
def test_scales_on_what_sublayers_read_and_give(placement: str, options: dict) -> None:
    compare(NormConfig(placement=placement, **options))  # type: ignore[arg-type]


def test_depth_scaling_of_pre_is_lns() -> None:
    combined = block_plans(NormConfig(placement="pre", depth_scaling=True), 5)
    assert combined == block_plans(NormConfig(placement="lns"), 5)


def test_initial_branch_scales() -> None:
    def first(layers: int, **options) -> float:
        return block_plans(NormConfig(**options), layers)[0].mlp.branch_scale

    assert first(8, branch_scale="fixed") == 0.25
    assert first(16, branch_scale="skip_init") == 0.25
    assert [first(n, branch_scale="layer_scale") for n in (18, 24, 32)] == [0.1, 1e-5, 1e-6]
    assert first(8, branch_scale="skip_init", branch_scale_value=0.01) == 0.01
    assert first(8, branch_scale="skip_init", branch_scale_value=0.0) == 0.0
    with torch.device("meta"):
        decoder = Decoder(ModelConfig(**SHAPE), NormConfig(branch_scale="layer_scale"))
    shapes = {name: tuple(p.shape) for name, p in decoder.named_parameters() if name.endswith("_scale")}
    assert shapes["model.layers.3.attn_scale"] == shapes["model.layers.0.mlp_scale"] == (24,)
    assert len(shapes) == 2 * LAYERS


@pytest.mark.parametrize("placement", sorted(PLACEMENTS))
def test_tied_head(placement: str) -> None:
    compare(NormConfig(placement=placement), tie_word_embeddings=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_with_a_tied_head_and_an_embedding_norm(kind: str) -> None:
    placement = "lns" if kind == "bhyt" else "peri"
    compare(NormConfig(placement=placement, kind=kind, embedding=True, qk="rms"), tie_word_embeddings=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "norm",
    [
        NormConfig(qk="rms"),
        NormConfig(qk="rms_full"),
        NormConfig(qk="cosine"),
        NormConfig(placement="peri", embedding=True),
        NormConfig(placement="post", final=False),
        NormConfig(placement="deepnorm", final=True, deepnorm_alpha=1.7),
        NormConfig(placement="normformer", residual_gain=True),
        NormConfig(placement="mix", mix_post_layers=3),
        NormConfig(placement="lns", eps=1e-2),
        NormConfig(placement="reordered", qk="rms_full"),
        NormConfig(kind="gatednorm", gate_rank=3),
        NormConfig(placement="normformer", kind="seednorm", residual_gain=True, eps=1e-2),
        NormConfig(placement="normformer", head_scale="output", qk="rms"),
        NormConfig(placement="normformer", kind="layernorm", head_scale="output", residual_gain=True),
        NormConfig(kind="bhyt", bhyt_tokens=3, eps=1e-2),
        NormConfig(kind="eln", placement="mix", eps=0.3),
    ],
    ids=str,
)
def test_options(norm: NormConfig) -> None:
    compare(norm)


WITH_STATISTICS = [kind for kind in KINDS if kind not in {"bhyt", "dyt", "eln", "powernorm", "unifiednorm"}]


@pytest.mark.parametrize("kind", WITH_STATISTICS)
def test_a_weight_before_the_statistics(kind: str) -> None:
    compare(NormConfig(placement="normformer", kind=kind, pre_affine=True, embedding=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("placement", ["pre", "hybrid", "normformer", "reordered"])
@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
def test_gated_attention(gate: str, placement: str) -> None:
    compare(NormConfig(placement=placement, qk="none"), attention_gate=gate)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["rmsnorm", "scalenorm", "bhyt"])
def test_fixnorm(kind: str, tied: bool) -> None:
    compare(NormConfig(kind=kind, embedding=kind == "rmsnorm"), fixnorm=True, tie_word_embeddings=tied)  # type: ignore[arg-type]


def test_bhyt_needs_the_norms_of_a_block_in_pairs() -> None:
    """What the configuration check refuses is what the block cannot pair."""
    paired = {p for p in PLACEMENTS if all(plan.pairs_inputs for plan in block_plans(NormConfig(placement=p), LAYERS))}  # type: ignore[arg-type]
    assert paired == set(BHYT_PLACEMENTS)


@pytest.mark.parametrize(("norm", "tied"), [(NormConfig(), False), (NormConfig("normformer", qk="rms_full"), True)])
def test_input_biases(norm: NormConfig, tied: bool) -> None:
    compare(norm, input_bias=True, tie_word_embeddings=tied)


def test_documents_do_not_see_each_other() -> None:
    documents = torch.tensor([[0] * 4 + [1] * 7, [0] * 1 + [1] * 5 + [2] * 5])
    compare(NormConfig(), documents=documents)
    decoder, ids = random_decoder(NormConfig()), torch.randint(0, 53, (1, 8))
    boundary = torch.tensor([[0] * 3 + [1] * 5])
    changed = ids.clone()
    changed[0, :3] = (ids[0, :3] + 1) % 53
    first, second = decoder(ids, document_ids=boundary), decoder(changed, document_ids=boundary)
    torch.testing.assert_close(first[0, 3:], second[0, 3:])
    assert not torch.allclose(first[0, :3], second[0, :3])


def _copy_matrices(source: Decoder, target: Decoder, rename) -> None:
    state = source.state_dict()
    target.load_state_dict({name: state[rename(name)] for name in target.state_dict()})


@pytest.mark.parametrize(("post", "other"), [(0, "pre"), (LAYERS, "post")])
def test_mix_ends_are_pre_and_post(post: int, other: str) -> None:
    mixed, plain = NormConfig(placement="mix", mix_post_layers=post), NormConfig(placement=other)  # type: ignore[arg-type]
    a, b = random_decoder(mixed), random_decoder(plain, seed=5)
    _copy_matrices(a, b, lambda name: name)
    ids = torch.randint(0, 53, (2, 9))
    assert torch.equal(a(ids), b(ids))


def test_mix_rounds_down_and_survives_binary_fractions() -> None:
    for layers, alpha, expected in [
        (12, 0.25, 3),
        (24, 0.25, 6),
        (10, 0.25, 2),
        (32, 0.0625, 2),
        (10, 0.3, 3),
        (7, 1.0, 7),
    ]:
        assert post_layers(NormConfig(placement="mix", mix_alpha=alpha), layers) == expected


def test_lns_scales_are_global_and_start_at_one() -> None:
    plans = block_plans(NormConfig(placement="lns"), 9)
    assert [plan.attn.input_scale for plan in plans] == [plan.mlp.input_scale for plan in plans]
    assert plans[0].attn.input_scale == 1.0
    assert plans[8].attn.input_scale == pytest.approx(1 / 3)


def test_numbers_of_blocks_may_be_given() -> None:
    plans = block_plans(NormConfig(placement="lns", depth_numbers=[1, 4, 1]), 3)
    assert [plan.mlp.input_scale for plan in plans] == [1.0, 0.5, 1.0]


def test_deepnorm_with_alpha_one_is_post_without_final_norm() -> None:
    a = random_decoder(NormConfig(placement="deepnorm", deepnorm_alpha=1.0))
    b = random_decoder(NormConfig(placement="post", final=False), seed=3)
    _copy_matrices(a, b, lambda name: name)
    ids = torch.randint(0, 53, (2, 9))
    assert torch.equal(a(ids), b(ids))


EXPECTED_NORMS = {
    # block parameters beside the matrices, by the contract's table; block 0 then block 1
    "pre": (["input_layernorm.weight", "post_attention_layernorm.weight"],) * 2,
    "post": (["attn_norm.residual.weight", "mlp_norm.residual.weight"],) * 2,
    "peri": (
        [
            "attn_norm.output.weight",
            "input_layernorm.weight",
            "mlp_norm.output.weight",
            "post_attention_layernorm.weight",
        ],
    )
    * 2,
    "reordered": (["attn_norm.output.weight", "mlp_norm.output.weight"],) * 2,
    "hybrid": (["attn_norm.residual.weight", *(f"self_attn.{n}_norm.weight" for n in "kqv")],) * 2,
    "hybrid_star": (
        ["input_layernorm.weight", "post_attention_layernorm.weight", *(f"self_attn.{n}_norm.weight" for n in "kqv")],
        ["attn_norm.residual.weight", *(f"self_attn.{n}_norm.weight" for n in "kqv")],
    ),
    "normformer": (
        [
            "attn_norm.output.weight",
            "input_layernorm.weight",
            "mlp.mid_norm.weight",
            "post_attention_layernorm.weight",
            "self_attn.head_scale",
        ],
    )
    * 2,
}


@pytest.mark.parametrize("placement", sorted(EXPECTED_NORMS))
def test_parameter_names_follow_the_contract(placement: str) -> None:
    decoder = random_decoder(NormConfig(placement=placement))  # type: ignore[arg-type]
    for block, expected in enumerate(EXPECTED_NORMS[placement]):
        prefix = f"model.layers.{block}."
        found = [n.removeprefix(prefix) for n in decoder.state_dict() if n.startswith(prefix) and "_proj" not in n]
        assert sorted(found) == expected
