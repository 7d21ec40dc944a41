"""A checkpoint as a Hugging Face folder."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data_pipeline.tokenizer import train_bpe
from nexa.api import load_model
from nexa.checkpoint import files
from nexa.errors import UserError
from nexa.interop.export import MODULES, export
from nexa.interop.import_ import import_folder
from tests.cli.common import read_json, write_checkpoint
from tests.interop.common import WITHOUT_NEXA, python, random_ids, random_model

PLAIN = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
OPEN = """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
for argument in sys.argv[1:]:
    how, folder = argument.split("=", 1)
    trust = {"trust_remote_code": True} if how == "trust" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **trust).eval()
    ids = load_file(folder + ".ids")["ids"]
    with torch.no_grad():
        logits = model(ids).logits
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    save_file({"logits": logits.float(), "new": new}, folder + ".logits")
    text = AutoTokenizer.from_pretrained(folder, **trust).decode([72, 105])
    print(type(model).__name__, type(model).__module__.split(".")[0], text)
"""


def exported(root: Path, name: str, norm: dict | None = None, **options):
    """(folder, expected logits) of an exported model; `name.ids` lies beside it."""
    model = {key: options.pop(key) for key in ("tie_word_embeddings", "vocab_size") if key in options}
    decoder = random_model(norm, **model)
    checkpoint = write_checkpoint(decoder, root / f"{name}-run")
    ids = random_ids()
    save_file({"ids": ids}, root / f"{name}.ids")
    done = export(checkpoint, root / name, **options)
    with torch.no_grad():
        return done, decoder(ids)


def check(done, expected, tolerance=1e-5):
    found = load_file(f"{done.path}.logits")
    assert (found["logits"] - expected).abs().max() <= tolerance * expected.abs().max()
    # position 0 of what was generated is the greedy choice after the ids
    assert torch.equal(found["new"][:, 20], found["logits"][:, -1].argmax(-1))


def test_opens_without_nexa(tmp_path):
    plain = [
        exported(tmp_path, "untied"),
        exported(tmp_path, "tied", tie_word_embeddings=True),
        exported(tmp_path, "shards", shard_bytes=20_000),
    ]
    trust = [
        exported(tmp_path, "mix", {"placement": "mix", "mix_post_layers": 2}),
        exported(tmp_path, "hybrid", {"placement": "hybrid_star"}, tie_word_embeddings=True),
        exported(tmp_path, "dyt", {"placement": "normformer", "kind": "dyt", "residual_gain": True}),
        exported(tmp_path, "gated", {"placement": "deepnorm", "kind": "gatednorm"}, shard_bytes=30_000),
        exported(tmp_path, "cosine", {"qk": "cosine"}),
        exported(tmp_path, "scales", {"placement": "peri", "depth_scaling": True, "branch_scale": "layer_scale"}),
        exported(tmp_path, "fixed", {"branch_scale": "fixed"}),
    ]
    assert {path.name for path in plain[0][0].path.iterdir()} == PLAIN
    assert {path.name for path in trust[0][0].path.iterdir()} == PLAIN | set(MODULES)
    with safe_open(tmp_path / "tied" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    ways = [f"plain={done.path}" for done, _ in plain] + [f"trust={done.path}" for done, _ in trust]
    lines = python(WITHOUT_NEXA + OPEN, *ways, home=tmp_path).splitlines()
    assert lines == ["LlamaForCausalLM transformers Hi"] * 3 + ["NexaForCausalLM transformers_modules Hi"] * 7
    for done, expected in plain + trust:
        check(done, expected)


def test_shards_and_index(tmp_path):
    done, _ = exported(tmp_path, "shards", shard_bytes=20_000)
    index = read_json(done.path / "model.safetensors.index.json")
    names = sorted(set(index["weight_map"].values()))
    assert names == sorted(path.name for path in done.path.glob("*.safetensors"))
    assert names == [f"model-{n + 1:05d}-of-{len(names):05d}.safetensors" for n in range(len(names))]
    assert done.weight_files == len(names) > 4
    total = 0
    for name in names:
        tensors = load_file(done.path / name)
        assert {key for key, file in index["weight_map"].items() if file == name} == set(tensors)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        # only a tensor that is too large by itself (the embedding, 33408 bytes) exceeds the limit
        assert size <= 20_000 or len(tensors) == 1
        total += size
    assert index["metadata"]["total_size"] == total == done.weight_bytes


def test_other_models_open_after_importing_nexa_without_trust(tmp_path):
    made = [exported(tmp_path, "peri", {"placement": "peri"}), exported(tmp_path, "seed", {"kind": "seednorm"})]
    root = str(Path(__file__).resolve().parents[2])
    ways = [f"plain={done.path}" for done, _ in made]
    lines = python("import sys, nexa" + OPEN, *ways, home=tmp_path, PYTHONPATH=root).splitlines()
    assert lines == ["NexaForCausalLM nexa Hi"] * 2
    for done, expected in made:
        check(done, expected)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_is_the_rounded_master(tmp_path, name, dtype):
    done, _ = exported(tmp_path, "half", {"placement": "peri"}, dtype=name)
    found = load_file(done.path / "model.safetensors")
    for key, parameter in random_model({"placement": "peri"}).named_parameters():
        assert torch.equal(found[key], parameter.detach().to(dtype)), key
    assert read_json(done.path / "config.json")["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_statistics_stay_fp32(tmp_path):
    """Exported as bf16 and imported again: weights are rounded, statistics are not."""
    done, _ = exported(tmp_path, "running", {"kind": "unifiednorm"}, dtype="bf16")
    found, decoder = load_file(done.path / "model.safetensors"), random_model({"kind": "unifiednorm"})
    assert sum(tensor.nbytes for tensor in found.values()) == done.weight_bytes
    again = load_model(import_folder(done.path, tmp_path / "imported").path)
    for key, statistic in decoder.named_buffers():
        assert torch.equal(found[key], statistic), key
        assert torch.equal(again.get_buffer(key), statistic), key
    assert again.model.norm.weight.equal(decoder.model.norm.weight.bfloat16().float())


def test_what_fp16_cannot_hold_is_named(tmp_path):
    decoder = random_model()
    with torch.no_grad():
        decoder.model.norm.weight[3] = 70000.0
    path = write_checkpoint(decoder, tmp_path / "run")
    with pytest.raises(UserError, match=r"model\.safetensors: model\.norm\.weight holds 7e\+04.*use bf16 or fp32"):
        export(path, tmp_path / "out", dtype="fp16")
    assert [one.name for one in tmp_path.iterdir()] == ["run"]
    export(path, tmp_path / "out", dtype="bf16")


def test_a_trained_tokenizer_encodes_as_in_training(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = train_bpe(iter(["some text, and more text.\n\tdef f(x):\n    return x"] * 20), 290)
    tokenizer.save(tmp_path)
    path = write_checkpoint(
        random_model(vocab_size=291), tmp_path / "run", tokenizer=tmp_path / "tokenizer.json", eod_id=0
    )
    export(path, tmp_path / "out")
    opened = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("some more", "  two  spaces\n\n and\ttabs ", "naïve — 漢字 🙂", "I'm not .  A b ,"):
        ids = opened(text)["input_ids"]
        assert ids == tokenizer.encode(text)
        assert opened.decode(ids) == text
    assert (opened.bos_token_id, opened.eos_token_id) == (0, 0)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    assert read_json(tmp_path / "out/generation_config.json") == ids
    assert read_json(tmp_path / "out/config.json").items() >= ids.items()


def test_nothing_is_overwritten(tmp_path):
    path = write_checkpoint(random_model(), tmp_path / "run")
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    file.write_text("mine")
    empty.mkdir()
    for taken, what in ((full, "exists and is not empty"), (file, "exists and is not a directory"), (path, "exists")):
        before = sorted(taken.iterdir()) if taken.is_dir() else taken.read_text()
        with pytest.raises(UserError, match=f"{taken}: {what}"):
            export(path, taken)
        assert (sorted(taken.iterdir()) if taken.is_dir() else taken.read_text()) == before
    export(tmp_path / "run", empty)
    assert {one.name for one in empty.iterdir()} == PLAIN


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_damaged_checkpoint_is_named_and_nothing_written(tmp_path, file):
    path = write_checkpoint(random_model(), tmp_path / "run")
    content = bytearray((path / file).read_bytes())
    content[-30] ^= 1
    (path / file).write_bytes(content)
    with pytest.raises(UserError, match=rf"{path} is damaged: {file} "):
        export(path, tmp_path / "out")
    (path / file).unlink()
    with pytest.raises(UserError, match=rf"{path} is damaged: {file} cannot be read"):
        export(path, tmp_path / "out")
    assert [one.name for one in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch, failure):
    path = write_checkpoint(random_model(), tmp_path / "run")
    write_json = files.write_json

    def failing(file: Path, value: object) -> files.FileRecord:
        if file.name == "config.json":
            assert (file.parent / "model.safetensors").is_file()
            raise failure
        return write_json(file, value)

    monkeypatch.setattr(files, "write_json", failing)
    with pytest.raises(UserError if isinstance(failure, OSError) else KeyboardInterrupt) as caught:
        export(path, tmp_path / "out")
    if isinstance(failure, OSError):
        assert "out: cannot be written (No space left on device); free space" in str(caught.value)
    assert [one.name for one in tmp_path.iterdir()] == ["run"]


def test_a_checkpoint_without_a_tokenizer(tmp_path):
    path = write_checkpoint(random_model(), tmp_path / "run")
    config, manifest = read_json(path / "config.json"), read_json(path / "manifest.json")
    del config["nexa_tokenizer"]
    for name, value in (("config.json", config), ("manifest.json", manifest)):
        if name == "manifest.json":
            manifest["files"]["config.json"]["sha256"] = files.hash_file(path / "config.json")
        (path / name).write_text(json.dumps(value))
    marker = {"manifest_sha256": files.hash_file(path / "manifest.json")}
    (path / "COMPLETE").write_text(json.dumps(marker))
    assert not export(path, tmp_path / "out").tokenizer
    assert not list((tmp_path / "out").glob("tokenizer*"))
