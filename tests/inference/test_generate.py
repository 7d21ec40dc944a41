"""Sampling."""

import pytest
import torch

from nexa.errors import UserError
from nexa.inference.generate import generate, generate_text
from nexa.inference.sampling import Sampling, nucleus
from tests.cli.common import tiny_model, write_checkpoint


@pytest.fixture(scope="module")
def model():
    return tiny_model("pre")


def test_greedy_is_the_argmax_of_the_whole_sequence(model):
    ids = [256, 100, 101]
    for _ in range(5):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert generate(model, ids[:3], Sampling(5, greedy=True)) == ids[3:]


def test_a_seed_is_a_text_and_the_global_state_stays(model):
    before = torch.get_rng_state()
    first = generate(model, [256], Sampling(20, seed=3))
    assert generate(model, [256], Sampling(20, seed=3)) == first
    assert generate(model, [256], Sampling(20, seed=4)) != first
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_follow_the_tempered_distribution(model):
    with torch.no_grad():
        logits = model(torch.tensor([[256]]))[0, -1, :10]
    wanted = (logits.double() / 2.0).softmax(-1)
    count = 1000
    drawn = [
        generate(model, [256], Sampling(1, temperature=2.0, top_p=1.0, seed=seed), vocabulary=10)[0]
        for seed in range(count)
    ]
    found = torch.bincount(torch.tensor(drawn), minlength=10) / count
    # six standard deviations of a binomial share
    assert ((found - wanted).abs() < 6 * (wanted * (1 - wanted) / count).sqrt() + 1e-9).all()


def test_nucleus_keeps_the_smallest_sufficient_set():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    assert nucleus(logits, 0.6).isfinite().tolist() == [False, True, False, True]
    assert nucleus(logits, 0.76).isfinite().tolist() == [False, True, True, True]
    assert nucleus(logits, 1e-9).isfinite().tolist() == [False, True, False, False]
    assert nucleus(logits, 1.0).isfinite().all()


def test_stop_and_mode(model):
    ids = generate(model, [256], Sampling(50, greedy=True))
    stop = ids[3]
    model.train()
    assert generate(model, [256], Sampling(50, greedy=True), stop_id=stop) == ids[: ids.index(stop) + 1]
    assert model.training
    model.eval()


def test_a_sequence_longer_than_the_positions_keeps_its_newest_part(model):
    prompt = torch.randint(0, 257, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    assert generate(model, prompt, Sampling(1, greedy=True)) == generate(model, prompt[-64:], Sampling(1, greedy=True))


def test_text_from_a_checkpoint(tmp_path):
    model = tiny_model("peri")
    write_checkpoint(model, tmp_path)
    text = generate_text(tmp_path, "h\u00e9", max_new_tokens=8, greedy=True)
    ids = generate(model, [256, *"h\u00e9".encode()], Sampling(8, greedy=True), vocabulary=257, stop_id=256)
    assert text == ("h\u00e9".encode() + bytes(i for i in ids if i < 256)).decode(errors="replace")


def test_text_with_a_tokenizer_file(tmp_path):
    from data_pipeline.tokenizer import train_bpe

    tokenizer = train_bpe(iter(["one two three four " * 50]), 260)
    file = tokenizer.save(tmp_path)
    model = tiny_model("pre")
    path = write_checkpoint(model, tmp_path / "run", tokenizer=file, eod_id=tokenizer.eod_id)
    assert generate_text(path, "one two", max_new_tokens=4, greedy=True).startswith("one two")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"temperature": 0.0}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_p": 1.5}, "--top-p"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(UserError, match=name):
        Sampling(**({"max_new_tokens": 1} | options))


def test_weights_that_are_not_finite(model):
    broken = tiny_model()
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        generate(broken, [1], Sampling(1))
