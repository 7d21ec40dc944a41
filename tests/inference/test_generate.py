"""Sampling."""

import pytest
import torch

from nexa.errors import UserError
from nexa.inference.checkpoint import open_checkpoint
from nexa.inference.generate import continue_texts, generate, generate_batch, generate_text
from nexa.inference.sampling import Sampling, likeliest, nucleus
from nexa.model.kinds import KINDS
from nexa.model.placement import PLACEMENTS
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
    sampling = Sampling(1, temperature=2.0, top_p=1.0)
    drawn = [row[0] for row in generate_batch(model, [[256]] * count, sampling, vocabulary=10)]
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


def test_the_top_k_tokens_stay():
    logits = torch.tensor([0.3, 2.0, -1.0, 1.0])
    assert likeliest(logits, 2).tolist() == [float("-inf"), 2.0, float("-inf"), 1.0]
    for everything in (0, 4, 9):
        assert torch.equal(likeliest(logits, everything), logits)


def test_top_k_limits_the_draws(model):
    with torch.no_grad():
        wanted = set(model(torch.tensor([[256]]))[0, -1].topk(3).indices.tolist())
    options = dict(temperature=5.0, top_p=1.0, top_k=3)
    assert {row[0] for row in generate_batch(model, [[256]] * 60, Sampling(1, **options))} == wanted
    greedy = generate(model, [256], Sampling(9, greedy=True))
    assert generate(model, [256], Sampling(9, temperature=5.0, top_k=1)) == greedy


RAGGED = [[256, 100, 101, 7, 7, 9, 200], [256], list(range(30)), [256, 3, 3]]


@torch.no_grad()
def is_greedy(model, prompt, new, window=64):
    """Whether each new id is the argmax of a plain forward pass over its context, by the documented rule."""
    ids, start, told = list(prompt), max(0, len(prompt) - window), {}
    for token in new:
        if len(ids) - start > window:
            start = len(ids) - max(window // 2, 1)
        if start not in told:  # one pass tells all that have this start
            told[start] = model(torch.tensor([[*prompt, *new][start : start + window]]))[0].argmax(-1).tolist()
        if told[start][len(ids) - start - 1] != token:
            return False
        ids.append(token)
    return True


MODELS = {
    **{name: dict(placement=name) for name in PLACEMENTS},
    **{kind: dict(placement="peri", kind=kind, tie_word_embeddings=kind == "layernorm") for kind in KINDS},
}


@pytest.mark.parametrize("case", MODELS)
def test_a_batch_gives_each_prompt_what_it_gets_alone(case):
    model = tiny_model(**MODELS[case])
    found = generate_batch(model, RAGGED, Sampling(8, greedy=True))
    assert len({token for row in found for token in row}) > 3
    assert all(len(new) == 8 and is_greedy(model, prompt, new) for prompt, new in zip(RAGGED, found, strict=True))
    assert generate_batch(model, RAGGED, Sampling(8, greedy=True), cache=False) == found


@pytest.mark.parametrize("cache", [True, False])
def test_draws_of_a_prompt_do_not_depend_on_the_others(model, cache):
    together = generate_batch(model, RAGGED, Sampling(6, seed=5), cache=cache)
    alone = [generate(model, prompt, Sampling(6, seed=5 + number)) for number, prompt in enumerate(RAGGED)]
    assert together == alone
    last = Sampling(3, seed=2**63 - 1)
    assert generate_batch(model, [[256], [256]], last)[1] == generate(model, [256], Sampling(3, seed=0))


def test_a_prompt_that_ends_leaves_the_batch(model):
    whole = generate_batch(model, RAGGED, Sampling(10, greedy=True))
    stop = whole[2][4]
    wanted = [row[: row.index(stop) + 1] if stop in row else row for row in whole]
    assert len({len(row) for row in wanted}) > 1
    rows = []
    handle = model.model.embed_tokens.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    assert generate_batch(model, RAGGED, Sampling(10, greedy=True), stop_id=stop) == wanted
    handle.remove()
    assert rows == [sum(len(row) > step for row in wanted) for step in range(max(map(len, wanted)))]


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("window", [1, 7, 16])
def test_beyond_the_positions_the_newer_half_goes_on(window, cache):
    model = tiny_model(max_position_embeddings=window)
    long = torch.randint(0, 257, (25,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [long, long[:13], long[:5], [256]]
    found = generate_batch(model, prompts, Sampling(24, greedy=True), cache=cache)
    for prompt, new in zip(prompts, found, strict=True):
        assert len(new) == 24 and is_greedy(model, prompt, new, window)


def test_the_cache_spares_the_model_what_it_has_read(model):
    read = {True: [], False: []}
    for cache, lengths in read.items():
        handle = model.model.embed_tokens.register_forward_hook(
            lambda module, args, out, lengths=lengths: lengths.append(args[0].shape[1])
        )
        generate(model, [256] * 60, Sampling(10, greedy=True), cache=cache)
        handle.remove()
    assert read[True] == [60, 1, 1, 1, 1, 32, 1, 1, 1, 1]
    assert read[False] == [60, 61, 62, 63, 64, 32, 33, 34, 35, 36]


def test_texts_do_not_depend_on_the_batch_size(tmp_path):
    opened = open_checkpoint(write_checkpoint(tiny_model("mix"), tmp_path))
    prompts = ["one", "", "a longer prompt", "h\u00e9", "two"]
    found = [list(continue_texts(opened, prompts, Sampling(6, seed=1), batch_size=size)) for size in (1, 2, 8)]
    assert found[0] == found[1] == found[2]
    assert [one.prompt for one in found[0]] == prompts
    assert all(one.text.startswith(one.prompt) and one.new_tokens == 6 and not one.ended for one in found[0])
    with pytest.raises(UserError, match="--batch-size 0"):
        next(continue_texts(opened, prompts, Sampling(6), batch_size=0))


def test_the_end_of_a_document_is_no_part_of_the_text(tmp_path):
    model = tiny_model("pre")
    with torch.no_grad():
        model.lm_head.weight[256] = model.lm_head.weight[:256].mean(0)  # neither never drawn nor always
    opened = open_checkpoint(write_checkpoint(model, tmp_path))
    found = list(continue_texts(opened, ["x"] * 40, Sampling(30, temperature=3.0), batch_size=40))
    ended = [one for one in found if one.ended]
    assert 0 < len(ended) < len(found)
    assert all(one.new_tokens == 30 for one in found if not one.ended)
    for one in ended:
        assert len(one.text) <= len("x") + one.new_tokens - 1


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
        ({"top_k": -1}, "--top-k"),
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
