"""Checkpoints open in transformers with the logits of our decoder."""

import subprocess
import sys

import pytest
import torch

import nexa
from nexa.inference.generate import generate_batch
from nexa.inference.sampling import Sampling
from nexa.interop.huggingface import config_json
from nexa.model.kinds import KINDS
from nexa.model.placement import PLACEMENTS
from tests.cli.common import read_json, tiny_model, write_checkpoint
from tests.conftest import REPOSITORY

ORDERS = {
    "nexa first": "import nexa\nfrom transformers import AutoModelForCausalLM",
    "transformers first": "from transformers import AutoModelForCausalLM\nimport nexa",
    "transformers first, auto classes later": "import transformers\nimport nexa\n"
    "from transformers import AutoModelForCausalLM",
    "generation first": "import nexa\nfrom transformers import GenerationMixin, AutoModelForCausalLM",
    "without nexa": "from transformers import AutoModelForCausalLM",
}
OPEN = """
import sys, torch
from pathlib import Path
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.load(Path(folder).parent / "ids.pt", weights_only=True)
    with torch.no_grad():
        torch.save(model(ids).logits, Path(folder).parent / "logits.pt")
    print(type(model).__name__, "nexa" in sys.modules)
"""


def open_elsewhere(order, folders):
    code = ORDERS[order] + OPEN
    environment = {
        "PYTHONPATH": str(REPOSITORY),
        "PATH": "/usr/bin:/bin",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, folders)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def checkpoint_with_logits(folder, placement, **model):
    decoder = tiny_model(placement, **model)
    path = write_checkpoint(decoder, folder)
    ids = torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(1))
    torch.save(ids, path.parent / "ids.pt")
    with torch.no_grad():
        return path, decoder(ids)


def check(path, expected):
    found = torch.load(path.parent / "logits.pt", weights_only=True)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_pre_opens_without_nexa(tmp_path):
    made = [checkpoint_with_logits(tmp_path / str(tied), "pre", tie_word_embeddings=tied) for tied in (False, True)]
    lines = open_elsewhere("without nexa", [path for path, _ in made])
    assert lines == ["LlamaForCausalLM False"] * 2
    for path, expected in made:
        check(path, expected)


def test_every_placement_opens_with_nexa(tmp_path):
    made = [checkpoint_with_logits(tmp_path / name, name, tie_word_embeddings=name == "mix") for name in PLACEMENTS]
    lines = open_elsewhere("nexa first", [path for path, _ in made])
    assert lines == ["LlamaForCausalLM True" if name == "pre" else "NexaForCausalLM True" for name in PLACEMENTS]
    for path, expected in made:
        check(path, expected)


@pytest.mark.parametrize("placement", ["pre", "peri"])
def test_every_kind_opens_with_nexa(tmp_path, placement):
    made = [
        checkpoint_with_logits(tmp_path / kind, placement, kind=kind, tie_word_embeddings=kind == "dyt")
        for kind in KINDS
    ]
    lines = open_elsewhere("nexa first", [path for path, _ in made])
    llama = {"rmsnorm"} if placement == "pre" else set()
    assert lines == [f"{'Llama' if kind in llama else 'Nexa'}ForCausalLM True" for kind in KINDS]
    for path, expected in made:
        check(path, expected)
        assert torch.equal(nexa.load_model(path)(torch.load(path.parent / "ids.pt", weights_only=True)), expected)


@pytest.mark.parametrize("order", ["transformers first", "transformers first, auto classes later", "generation first"])
def test_registration_in_other_orders(tmp_path, order):
    path, expected = checkpoint_with_logits(tmp_path, "mix")
    assert open_elsewhere(order, [path]) == ["NexaForCausalLM True"]
    check(path, expected)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(decoder, the same opened by transformers)."""
    from transformers import AutoModelForCausalLM

    decoder = tiny_model("peri")
    path = write_checkpoint(decoder, tmp_path_factory.mktemp("run"))
    return decoder, AutoModelForCausalLM.from_pretrained(path).eval()


IDS = torch.randint(0, 257, (2, 12), generator=torch.Generator().manual_seed(2))


def test_labels_are_shifted_and_averaged_as_in_transformers(pair):
    decoder, model = pair
    labels = IDS.clone()
    labels[0, 5:] = -100
    with torch.no_grad():
        logits = decoder(IDS).double()
        loss = model(IDS, labels=labels).loss
    log_p = logits.log_softmax(-1)
    wanted = [-log_p[b, t, IDS[b, t + 1]] for b in range(2) for t in range(11) if labels[b, t + 1] != -100]
    assert abs(float(loss) - float(sum(wanted) / len(wanted))) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_seen(pair, side):
    decoder, model = pair
    mask, own = torch.ones_like(IDS), slice(3, None) if side == "left" else slice(None, -3)
    mask[0] = 0
    mask[0, own] = 1
    with torch.no_grad():
        found = model(IDS, attention_mask=mask).logits[0, own]
        assert (found - decoder(IDS[:1, own])[0]).abs().max() < 1e-5


def test_generate_is_greedy_decoding_of_our_decoder(pair):
    decoder, model = pair
    found = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    ids = IDS
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat((ids, decoder(ids)[:, -1:].argmax(-1)), 1)
    assert torch.equal(found, ids)


def wrapped(decoder):
    """The transformers model of a decoder, without a checkpoint between them."""
    from nexa.interop.transformers_config import NexaConfig
    from nexa.interop.transformers_model import NexaForCausalLM

    model = NexaForCausalLM(NexaConfig(**config_json(decoder.config, decoder.norm_config, eos_token_id=None)))
    model.load_state_dict(decoder.state_dict())
    return model.eval()


PROMPTS = [[256, 100, 101, 7, 7, 9, 200], [256], [256, 3, 3]]
WIDTH = max(map(len, PROMPTS))
PADDED = torch.tensor([[0] * (WIDTH - len(prompt)) + prompt for prompt in PROMPTS])
MASK = torch.tensor([[0] * (WIDTH - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
OPTIONS = dict(attention_mask=MASK, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
MODELS = {
    **{name: dict(placement=name) for name in PLACEMENTS},
    **{kind: dict(placement="post", kind=kind, tie_word_embeddings=kind == "layernorm") for kind in KINDS},
    "bhyt": dict(kind="bhyt"),
    "gates and fixnorm": dict(attention_gate="elementwise", fixnorm=True, tie_word_embeddings=True),
}


@pytest.mark.parametrize("case", MODELS)
def test_generate_with_a_cache_is_generate_without_and_our_own(case):
    decoder = tiny_model(**MODELS[case])
    model, read = wrapped(decoder), []
    model.model.register_forward_hook(lambda module, args, out: read.append(args[0].shape[1]))
    with_cache = model.generate(PADDED, do_sample=False, **OPTIONS)
    assert read == [WIDTH] + [1] * 7
    without = model.generate(PADDED, do_sample=False, use_cache=False, **OPTIONS)
    assert read[8:] == list(range(WIDTH, WIDTH + 8))
    assert torch.equal(with_cache, without)
    assert with_cache[:, WIDTH:].tolist() == generate_batch(decoder, PROMPTS, Sampling(8, greedy=True))


def test_beams_with_a_cache_are_beams_without(pair):
    found = [pair[1].generate(PADDED, num_beams=3, do_sample=False, use_cache=use, **OPTIONS) for use in (True, False)]
    assert torch.equal(*found)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_pieces_are_those_of_the_whole(pair, side):
    from transformers import DynamicCache

    model = pair[1]
    mask = torch.ones_like(IDS)
    mask[0, slice(0, 3) if side == "left" else slice(9, 12)] = 0
    with torch.no_grad():
        whole = model(IDS, attention_mask=mask)
        assert whole.past_key_values is None
        cache = DynamicCache()
        for start, stop in ((0, 5), (5, 6), (6, 12)):
            found = model(IDS[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
            assert found.past_key_values is cache
            seen = mask[:, start:stop].bool()
            assert (found.logits - whole.logits[:, start:stop])[seen].abs().max() < 1e-5
        first = model(IDS[:, :5], use_cache=True)
        assert first.past_key_values.get_seq_length() == 5
        last = model(IDS, attention_mask=mask, logits_to_keep=2).logits
        assert (last - whole.logits[:, -2:]).abs().max() < 1e-6


def test_unsupported_inputs_are_refused(pair):
    from transformers import DynamicCache, StaticCache

    model = pair[1]
    with pytest.raises(ValueError, match="past_key_values: nexa models do not support static caches"):
        model(IDS, past_key_values=StaticCache(config=model.config, max_batch_size=2, max_cache_len=20))
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(IDS, inputs_embeds=torch.zeros(2, 12, 32))
    cache = DynamicCache()
    model(IDS, past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask: must have the shape \[2, 13\], has \[2, 1\]"):
        model(IDS[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)


def test_saved_by_transformers_and_opened_again(pair, tmp_path):
    from transformers import AutoModelForCausalLM

    from nexa.interop.huggingface import from_config_json

    decoder, model = pair
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    _, norm = from_config_json(read_json(tmp_path / "config.json"))
    assert norm == decoder.norm_config


def test_parameter_names_are_the_decoders(pair):
    decoder, model = pair
    assert list(model.state_dict()) == list(decoder.state_dict())
