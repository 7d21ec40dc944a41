"""ELN and BHyT: bounds, slopes and initial values, and the variance that BHyT's second norm is given."""

from __future__ import annotations

import math

import pytest
import torch

from nexa.config.schema import ModelConfig, NormConfig
from nexa.model.bounded import ELN, BHyT
from nexa.model.decoder import Decoder
from nexa.model.layers import Features
from nexa.model.norms import DyT, RMSNorm, dyt_alpha

N = 24
SHAPE = dict(
    vocab_size=31,
    hidden_size=N,
    intermediate_size=40,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=50,
)


def inputs(scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(7, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def eln(c: float, eps: float = 0.0) -> ELN:
    return ELN(Features.whole(N), c, eps).double()


def bhyt(scale: float, eps: float = 0.0) -> BHyT:
    return BHyT(Features.whole(N), eps, scale).double()


def attention(kv_heads: int = 2):
    decoder = Decoder(ModelConfig(**SHAPE, num_key_value_heads=kv_heads), NormConfig(kind="bhyt")).double()
    return decoder.model.layers[0].self_attn


def explicit_gain(module) -> torch.Tensor:
    """Each query head's own product, one after the other."""
    product = torch.zeros(N, N, dtype=torch.float64)
    for head in range(module.heads):
        kv, size = head * module.kv_heads // module.heads, module.head_dim
        o, v = module.o_proj.weight, module.v_proj.weight
        product += o[:, head * size : (head + 1) * size] @ v[kv * size : (kv + 1) * size]
    return (product**2).sum()


def test_eln_is_linear_for_small_elements_and_a_sign_for_large_ones() -> None:
    norm = eln(3.0)
    torch.testing.assert_close(norm(inputs(1e-5)), inputs(1e-5) / 3, rtol=1e-9, atol=0)
    torch.testing.assert_close(norm(inputs(1e8)), inputs().sign(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(eln(1e-9)(inputs()), inputs().sign(), rtol=1e-9, atol=1e-9)


def test_eln_sees_one_element_at_a_time() -> None:
    x = inputs()
    changed = x.clone()
    changed[:, 0] = 1e3
    assert torch.equal(eln(2.0)(x)[:, 1:], eln(2.0)(changed)[:, 1:])


def test_eln_with_the_rest_of_a_vector_as_its_constant_is_rmsnorm() -> None:
    """The derivation: x_i sqrt(n) / sqrt(x_i^2 + sum of the other squares) is RMSNorm."""
    x = inputs()[0]
    for i in range(N):
        rest = (x.square().sum() - x[i] ** 2).sqrt().item()
        found = math.sqrt(N) * eln(rest)(x)[i]
        torch.testing.assert_close(found, RMSNorm(Features.whole(N), 0.0).double()(x)[i])


def test_eln_stays_positive_when_c_crosses_zero() -> None:
    norm = eln(0.0, eps=1e-6)
    norm(torch.zeros(1, N, dtype=torch.float64)).sum().backward()
    assert norm.c.grad is not None and torch.isfinite(norm.c.grad).all()
    assert torch.equal(eln(-2.0)(inputs()), eln(2.0)(inputs()))


@pytest.mark.parametrize("width", [1024, 4096, 8192])
def test_eln_starts_with_the_slope_of_dyt(width: int) -> None:
    model = ModelConfig(**{**SHAPE, "hidden_size": width, "intermediate_size": 2, "vocab_size": 2})
    norms = {kind: Decoder(model, NormConfig(kind=kind)).model.layers[0] for kind in ("eln", "dyt")}
    for site, part in (("input_layernorm", "attention"), ("post_attention_layernorm", "feed_forward")):
        a, b = (getattr(norms[kind], site) for kind in ("eln", "dyt"))
        assert isinstance(a, ELN) and isinstance(b, DyT)
        assert 1 / a.c.item() == pytest.approx(b.alpha.item()) == dyt_alpha(width, part)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1.0, 0.01, 100.0])
def test_bhyt_of_a_small_lambda_is_rmsnorm_times_lambda_over_kappa(scale: float) -> None:
    """Whatever the length of x: only its direction counts."""
    x, slope = inputs(scale), 1e-4
    rms = RMSNorm(Features.whole(N), 0.0).double()
    torch.testing.assert_close(bhyt(10 * slope)(x), slope * rms(x), rtol=1e-6, atol=0)


def test_bhyt_is_bounded_and_keeps_usual_elements_from_saturating() -> None:
    """kappa: the tanh of an element kappa times as large as the root mean square is tanh(lambda)."""
    x = torch.ones(1, 10_000, dtype=torch.float64)
    x[0, 0] = 10 * math.sqrt((10_000 - 1) / (10_000 - 100))
    norm = BHyT(Features.whole(10_000), 0.0, 1.0).double()
    assert norm(x)[0, 0].item() == pytest.approx(math.tanh(1.0), rel=1e-9)
    assert (norm(1e6 * inputs(1).flatten().repeat(60)[:10_000])).abs().max() < 1.0


def test_lambda_is_in_the_state_under_its_name() -> None:
    assert {name: tuple(p.shape) for name, p in bhyt(2.0).state_dict().items()} == {"weight": (N,), "lambda": (1,)}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_value_gain(kv_heads: int) -> None:
    module = attention(kv_heads)
    found = module.value_gain()
    torch.testing.assert_close(found, explicit_gain(module))
    assert not found.requires_grad


def test_value_gain_is_remembered_in_eval_mode_until_a_weight_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    module, made = attention().eval(), []
    compute = module._value_gain
    monkeypatch.setattr(module, "_value_gain", lambda v, o: made.append(1) or compute(v, o))
    assert module.value_gain() is module.value_gain()
    assert len(made) == 1
    with torch.no_grad():
        module.v_proj.weight.mul_(2)
    torch.testing.assert_close(module.value_gain(), explicit_gain(module))
    module.load_state_dict({name: 3 * p for name, p in module.state_dict().items()})
    torch.testing.assert_close(module.value_gain(), explicit_gain(module))
    module.float().double().o_proj.weight.data *= 2  # unseen, as optimizers' writes are, but followed by `eval`
    torch.testing.assert_close(module.eval().value_gain(), explicit_gain(module))
    assert len(made) == 4
    module.train()
    module.value_gain()
    module.value_gain()
    assert len(made) == 6


def test_the_second_variance_is_that_of_an_average_of_independent_tokens() -> None:
    """T independent vectors of mean square (s lambda / kappa)^2, averaged, through W_O W_V."""
    module, tokens, scale, lam = attention(), 20, 0.5, 3.0
    first = torch.full((4000, 1), 2.0, dtype=torch.float64)
    claimed = bhyt(lam).second_variance(first, module.value_gain(), tokens, scale)
    torch.manual_seed(0)
    read = scale * lam / 10 * torch.randn(4000, tokens, N, dtype=torch.float64)
    values = module.v_proj(read.mean(1)).view(-1, module.kv_heads, module.head_dim)
    repeated = values.repeat_interleave(module.heads // module.kv_heads, 1).flatten(1)
    with torch.no_grad():
        added = module.o_proj(repeated).square().mean()
    assert (claimed - first).mean().item() == pytest.approx(added.item(), rel=0.03)


def test_the_approximation_does_not_depend_on_what_is_read() -> None:
    """T is a number of the model, so what a token gets does not change with the tokens behind it."""
    shape = ModelConfig(**SHAPE, num_key_value_heads=2)
    plain, same, other = (
        Decoder(shape, NormConfig(kind="bhyt", bhyt_tokens=tokens)).double() for tokens in (None, 50, 5)
    )
    for decoder in (same, other):
        decoder.load_state_dict(plain.state_dict())
    ids = torch.randint(0, 31, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(plain(ids), same(ids))
        assert not torch.equal(plain(ids), other(ids))
        torch.testing.assert_close(plain(ids[:, :5]), plain(ids)[:, :5], rtol=1e-12, atol=1e-12)
