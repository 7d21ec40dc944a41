"""Training goes on from an imported model in any layout, with the loss that transformers computes."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from data_pipeline.batches import TrainBatches
from data_pipeline.embedded import embedded_store
from data_pipeline.store import open_store
from data_pipeline.tokenizer import load_tokenizer
from nexa.interop.import_ import import_folder
from tests.conftest import run_command
from tests.interop.common import WITHOUT_NEXA, python
from tests.interop.test_import import llama

RUN = [
    "+exp=quickstart",
    "data.sequence_length=32",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.steps=1",
    "train.precision=fp32",
    "train.compile=false",
    "train.grad_clip=0",
    "optim.lr=1e-3",
    "schedule.warmup_steps=0",
    "checkpoint.every=0",
    "eval.every=0",
    "eval.at_end=false",
    "log.every=1",
    "log.plot=false",
    "log.sample_tokens=0",
]
TOKENIZE = """
import json
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[2])["input_ids"]
print(json.dumps([ids, tokenizer.decode(ids), tokenizer.eos_token_id]))
"""


def reference_loss(model: torch.nn.Module, store_path: Path) -> float:
    """Mean loss of the first global batch under a model of transformers."""
    batches = TrainBatches(
        [open_store(store_path)], [1.0], sequence_length=32, global_batch_size=4, seed=0, document_mask=False
    )
    rows = batches.rows(0, 0, 4)
    with torch.no_grad():
        logits = model(torch.from_numpy(rows.input_ids)).logits.double()
    return float(F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(rows.labels).flatten()))


@pytest.mark.parametrize(("processes", "stage", "tied"), [(0, 1, True), (2, 3, False)])
def test_the_first_loss_is_that_of_transformers(tmp_path, embedded_cache, processes, stage, tied):
    model = llama(vocab_size=300, tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 5e3})
    model.save_pretrained(tmp_path / "hf", max_shard_size="30KB")
    done = import_folder(tmp_path / "hf", tmp_path / "imported")
    run = tmp_path / "run"
    places = [f"data.cache_dir={embedded_cache}", f"run.dir={run}", f"parallel.zero_stage={stage}"]
    words = ["train.py", *RUN, "data.tokenizer_vocab_size=290", *done.overrides(), *places]
    ended = run_command(*words, processes=processes, timeout=400)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
    (row,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    store = embedded_store(str(embedded_cache), 290)
    assert row["loss"] == pytest.approx(reference_loss(model, store), rel=1e-5)
    if processes:
        return
    # the folder of this run's last checkpoint is a tokenizer for transformers, as it stands
    (checkpoint,) = (run / "checkpoints").iterdir()
    text = "def f(x):\n    return  x  # naïve"
    found = python(WITHOUT_NEXA + TOKENIZE, checkpoint, text, home=tmp_path)
    ids, back, eos = json.loads(found)
    tokenizer = load_tokenizer(store)
    assert (ids, back, eos) == (tokenizer.encode(text), text, tokenizer.eod_id)
