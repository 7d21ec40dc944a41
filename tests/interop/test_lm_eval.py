"""lm-evaluation-harness on checkpoint folders, offline, with a task file of its own.

What the harness asks of a folder (AutoTokenizer, AutoModelForCausalLM, log-likelihoods) is tested in any case in
test_export.py and test_training.py; this runs the harness itself where it is installed: pip install 'lm_eval[hf]'.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from data_pipeline.tokenizer import train_bpe
from nexa.inference.checkpoint import open_checkpoint
from nexa.inference.score import TextFile, score_file
from nexa.interop.export import export
from tests.cli.common import write_checkpoint
from tests.conftest import REPOSITORY, run_command
from tests.interop.common import random_model

harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed"
)
WITHOUT = 'import sys; sys.modules["lm_eval"] = None; from nexa.interop.lm_eval import main; main()'
QUESTIONS = [
    {"q": "the cat sat on", "a": [" the mat", " a of", " if"], "gold": 0},
    {"q": "two and two", "a": [" are four", " red"], "gold": 1},
    {"q": "def f(x):", "a": [" return x", " x", " the cat sat"], "gold": 2},
]
TEXTS = ["the cat sat on the mat. " * 6, "def f(x):\n    return two and four"]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: a
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: rolling.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "choice.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    (folder / "rolling.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in TEXTS))
    (folder / "choice.yaml").write_text(CHOICE)
    (folder / "rolling.yaml").write_text(ROLLING)
    return folder


@pytest.fixture(scope="module", params=["pre", "mix"])
def checkpoint(request, tmp_path_factory):
    """A checkpoint as a run writes it, with the tokenizer's two files."""
    root = tmp_path_factory.mktemp("run")
    tokenizer = train_bpe(iter([*TEXTS, *(one["q"] for one in QUESTIONS)]), 280)
    tokenizer.save(root)
    model = random_model({"placement": request.param}, vocab_size=tokenizer.vocab_size + 3)
    return write_checkpoint(model, root, tokenizer=root / "tokenizer.json", eod_id=tokenizer.eod_id)


def evaluate(module, arguments, tasks, out):
    """{task: its metrics} from a run of the harness's own command line."""
    command = [sys.executable, "-m", module, "run", "--model", "hf", "--model_args", arguments, "--device", "cpu"]
    command += ["--tasks", "tiny_choice,tiny_rolling", "--include_path", str(tasks), "--batch_size", "2"]
    command += ["--output_path", str(out)]
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "hf")}
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tasks, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = out.rglob("results_*.json")
    return json.loads(file.read_text())["results"]


def expected(checkpoint, tasks):
    """The same two numbers from nexa's own decoder and scorer."""
    opened = open_checkpoint(checkpoint, "cpu")
    right = 0
    for one in QUESTIONS:
        sums = []
        for answer in one["a"]:
            context = opened.tokenizer.encode(one["q"])
            ids = context + opened.tokenizer.encode(answer)
            assert ids == opened.tokenizer.encode(one["q"] + answer)
            with torch.no_grad():
                log_p = opened.model(torch.tensor([ids])).double().log_softmax(-1)[0]
            sums.append(sum(float(log_p[t - 1, ids[t]]) for t in range(len(context), len(ids))))
        right += sums.index(max(sums)) == one["gold"]
    score = score_file(opened, TextFile(tasks / "rolling.jsonl", "text"), sequence_length=64)
    return right / len(QUESTIONS), score.nll / math.log(2) / score.text_bytes


def check(results, wanted):
    assert results["tiny_choice"]["acc,none"] == pytest.approx(wanted[0])
    assert results["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(wanted[1], rel=1e-5)


@harness
def test_a_checkpoint_as_it_stands(checkpoint, tasks, tmp_path):
    llama = json.loads((checkpoint / "config.json").read_text())["model_type"] == "llama"
    module = "lm_eval" if llama else "nexa.interop.lm_eval"
    check(evaluate(module, f"pretrained={checkpoint},dtype=float32", tasks, tmp_path), expected(checkpoint, tasks))


@harness
def test_an_exported_folder(checkpoint, tasks, tmp_path):
    export(checkpoint, tmp_path / "hf")
    arguments = f"pretrained={tmp_path}/hf,dtype=float32,trust_remote_code=True"
    (tmp_path / "out").mkdir()
    check(evaluate("lm_eval", arguments, tasks, tmp_path / "out"), expected(checkpoint, tasks))


def test_a_missing_harness_is_said():
    done = run_command("-c", WITHOUT)
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install 'lm_eval[hf]'" in done.stderr
    assert "Traceback" not in done.stderr
