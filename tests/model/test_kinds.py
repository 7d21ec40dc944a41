"""Kinds of norm: initial values, identities between them, names, precision."""

from __future__ import annotations

import copy
import math
from typing import get_args

import pytest
import torch

from nexa.config.schema import ModelConfig, NormConfig, NormKind
from nexa.model.decoder import Decoder, flops_per_token
from nexa.model.init import initialise
from nexa.model.kinds import KINDS, NormBuilder
from nexa.model.layers import Features
from nexa.model.norms import dyt_alpha
from nexa.model.placement import PLACEMENTS

WIDTH, FEED_FORWARD, LAYERS, RANK = 24, 40, 3, 5
MODEL = ModelConfig(
    vocab_size=53,
    hidden_size=WIDTH,
    intermediate_size=FEED_FORWARD,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def decoder(kind: str, placement: str = "pre", seed: int = 0, model: ModelConfig = MODEL, **norm) -> Decoder:
    config = NormConfig(placement=placement, kind=kind, gate_rank=RANK, **norm)  # type: ignore[arg-type]
    made = Decoder(model, config)
    initialise(made, model, config, seed)
    return made


def one(kind: str, size: int = WIDTH, width: int = WIDTH) -> torch.nn.Module:
    """A norm of `kind`, matrices as PyTorch's constructors leave them."""
    return NormBuilder(KINDS[kind], 1e-6, width, RANK)("attention", Features.whole(size))


def test_the_schema_names_the_rows() -> None:
    assert set(get_args(NormKind)) == set(KINDS)


# tensor of a norm of n -> its shape and initial value, from the contract; None: random
TENSORS = {
    "rmsnorm": {"weight": ("n", 1.0)},
    "crmsnorm": {"weight": ("n", 1.0)},
    "layernorm": {"weight": ("n", 1.0), "bias": ("n", 0.0)},
    "scalenorm": {"weight": ("1", "sqrt n")},
    "dyt": {"weight": ("n", 1.0), "alpha": ("1", 1.0)},
    "seednorm": {"weight": ("n", 1.0), "alpha": ("n", 1.0), "beta": ("n", 0.0)},
    "eln": {"weight": ("n", 1.0), "bias": ("n", 0.0), "c": ("1", 1.0)},
    "bhyt": {"weight": ("n", 1.0), "lambda": ("1", "by site")},
    "gatednorm": {"weight": ("n", 1.0), "gate_down.weight": ("rn", None), "gate_up.weight": ("nr", 0.0)},
    "powernorm": {
        "weight": ("n", 1.0),
        "bias": ("n", 0.0),
        "updates": ("1", 0.0),
        "running_square": ("n", 1.0),
        "running_gradient": ("n", 0.0),
    },
}
TENSORS["unifiednorm"] = TENSORS["powernorm"] | {
    "recent_squares": ("4n", 0.0),
    "recent_gradients": ("4n", 0.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_names_shapes_and_initial_values(kind: str) -> None:
    """normformer has a norm of f as well, and the embedding norm stands outside the blocks."""
    state = decoder(kind, "normformer", embedding=True).state_dict()
    sites = {"model.norm": WIDTH, "model.embed_norm": WIDTH}
    for i in range(LAYERS):
        block = f"model.layers.{i}."
        sites |= {block + s: WIDTH for s in ("input_layernorm", "post_attention_layernorm", "attn_norm.output")}
        sites[block + "mlp.mid_norm"] = FEED_FORWARD
    expected = {
        f"{site}.{tensor}": (n, *TENSORS[kind][tensor]) for site, n in sites.items() for tensor in TENSORS[kind]
    }
    known = ("embed_tokens", "_proj", "lm_head", "head_scale", "embed_scale")
    assert {name for name in state if not any(word in name for word in known)} == set(expected)
    for name, (n, shape, value) in expected.items():
        assert (
            tuple(state[name].shape) == {"n": (n,), "1": (1,), "rn": (RANK, n), "nr": (n, RANK), "4n": (4, n)}[shape]
        ), name
        if value is None:
            assert state[name].std().item() == pytest.approx(0.02, rel=0.25), name
        else:
            by_site = 1.0 if ".post_attention" in name or ".mlp." in name else 2.0
            wanted = {"sqrt n": math.sqrt(n), "by site": by_site}.get(value, value)
            torch.testing.assert_close(state[name], torch.full_like(state[name], wanted))
    assert ("model.embed_scale" in state) == (kind in {"dyt", "eln"})


def test_gates_are_drawn_by_name_and_seed() -> None:
    first, again, other = (decoder("gatednorm", seed=seed).state_dict() for seed in (0, 0, 1))
    a, b = "model.layers.0.input_layernorm.gate_down.weight", "model.layers.1.input_layernorm.gate_down.weight"
    assert torch.equal(first[a], again[a])
    assert not torch.equal(first[a], other[a])
    assert not torch.equal(first[a], first[b])


@pytest.mark.parametrize("rule", ["xavier", "tiny_init"])
def test_gates_follow_the_initialisation_rule(rule: str) -> None:
    model = ModelConfig(**{**vars(MODEL), "hidden_size": 256, "initializer": rule})
    found = decoder("gatednorm", model=model).state_dict()["model.norm.gate_down.weight"].std().item()
    wanted = {"xavier": math.sqrt(2 / (256 + RANK)), "tiny_init": math.sqrt(1 / (2 * 256 * LAYERS))}[rule]
    assert found == pytest.approx(wanted, rel=0.1)


# LLaMA 7B, 13B and 34B or 70B of the official code, then the widths of the paper's table and between them
ALPHAS = [
    (4096, 0.8, 0.2),
    (5120, 0.6, 0.15),
    (8192, 0.2, 0.05),
    (1024, 1.0, 1.0),
    (2048, 1.0, 0.5),
    (64, 1.0, 1.0),
    (768, 1.0, 1.0),
    (1536, 1.0, 0.5),
    (3072, 0.8, 0.2),
    (16384, 0.2, 0.05),
]


@pytest.mark.parametrize(("width", "attention", "other"), ALPHAS)
def test_dyt_alpha_by_width(width: int, attention: float, other: float) -> None:
    assert dyt_alpha(width, "attention") == attention
    assert {dyt_alpha(width, part) for part in ("feed_forward", "embedding", "final")} == {other}


def test_dyt_alpha_reaches_its_sites() -> None:
    """By the model's width, also for the norm inside the feed-forward, and by the sublayer of the site."""
    model = ModelConfig(**{**vars(MODEL), "hidden_size": 4096, "intermediate_size": 8, "num_hidden_layers": 1})
    config = NormConfig(placement="normformer", kind="dyt", embedding=True)
    with torch.device("meta"):
        names = [n for n, _ in Decoder(model, config).named_parameters() if n.endswith(".alpha")]
    model.vocab_size = 2
    state = decoder("dyt", "normformer", model=model, embedding=True).state_dict()
    found = {name.removesuffix(".alpha"): round(state[name].item(), 6) for name in names}
    block = "model.layers.0."
    assert found == {
        "model.embed_norm": 0.2,
        f"{block}input_layernorm": 0.8,
        f"{block}attn_norm.output": 0.8,
        f"{block}post_attention_layernorm": 0.2,
        f"{block}mlp.mid_norm": 0.2,
        "model.norm": 0.2,
    }
    assert state["model.embed_scale"].tolist() == [64.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["seednorm", "gatednorm"])
def test_starts_as_rmsnorm(kind: str, placement: str, dtype: torch.dtype) -> None:
    """Bit for bit: tanh(0) adds nothing and twice sigmoid(0) is one."""
    ids = torch.randint(0, 53, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(decoder(kind, placement).to(dtype)(ids), decoder("rmsnorm", placement).to(dtype)(ids))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_scalenorm_starts_as_rmsnorm_without_eps(placement: str) -> None:
    """g = sqrt(n): x sqrt(n) / |x| = x / rms(x). DSSN's gains multiply it as they do a vector of ones."""
    ids = torch.randint(0, 53, (2, 9), generator=torch.Generator().manual_seed(1))
    scale, plain = (decoder(kind, placement, eps=1e-30).double() for kind in ("scalenorm", "rmsnorm"))
    if placement in {"hybrid", "hybrid_star"}:
        assert any("q_norm" in name for name in scale.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(scale(ids), plain(ids), rtol=1e-6, atol=1e-6)


def test_crmsnorm_is_layernorm_of_the_vector_with_its_last_coordinate() -> None:
    norm, x = one("crmsnorm").double(), torch.randn(7, WIDTH, dtype=torch.float64)
    whole = torch.cat((x, -x.sum(-1, keepdim=True)), -1)
    expected = torch.nn.functional.layer_norm(whole, (WIDTH + 1,), eps=1e-6)[:, :-1]
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_input_has_finite_gradients(kind: str) -> None:
    norm, x = one(kind), torch.zeros(2, WIDTH, requires_grad=True)
    norm(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in norm.parameters())


def test_scalenorm_clamps_the_length() -> None:
    x = torch.full((1, WIDTH), 1e-9, dtype=torch.float64)
    torch.testing.assert_close(one("scalenorm").double()(x), x * math.sqrt(WIDTH) / 1e-5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_statistics_are_wider(kind: str) -> None:
    """Squares of 1000 and sums of them are infinite in fp16; only the roundings at the end may remain."""
    torch.manual_seed(0)
    norm = one(kind, size=1000)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5).half())
    exact = copy.deepcopy(norm).double()
    x = (1000 * torch.randn(5, 1000)).half()
    with torch.no_grad():
        y, wanted = norm.half()(x), exact(x.double())
    assert y.dtype == torch.float16
    assert (y.double() - wanted).abs().max() <= 5e-3 * wanted.abs().max()


def test_dssn_gains_multiply_the_kinds_own_initial_weight() -> None:
    gain = 0.283 / math.sqrt(LAYERS)
    name = "model.layers.1.attn_norm.output.weight"
    for kind in KINDS:
        found = decoder(kind, "dssn").state_dict()[name]
        wanted = gain * (math.sqrt(WIDTH) if kind == "scalenorm" else 1.0)
        torch.testing.assert_close(found, torch.full_like(found, wanted))


def test_gates_count_as_matrices_in_the_flops() -> None:
    gates = (2 * LAYERS + 1) * 2 * RANK * WIDTH
    plain, gated = (
        flops_per_token(MODEL, NormConfig(kind=kind, gate_rank=RANK), 8) for kind in ("rmsnorm", "gatednorm")
    )
    assert gated - plain == 6 * gates
