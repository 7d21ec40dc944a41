"""`nexa plan` from words to exit code."""

import json
import re

import pytest

from nexa.cli.main import main
from nexa.cli.plan import GIB
from nexa.config.files import CONF
from tests.conftest import REPOSITORY

EXPERIMENTS = sorted(path.stem for path in (CONF / "exp").glob("*.yaml"))
SOME = ["quickstart", "mixln_71m", "normformer_71m", "deepnorm_7b"]


def plan(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["plan", *words])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def found(capsys, *words, code=0):
    got, out, err = plan(capsys, *words, "--json")
    assert got == code, err
    return json.loads(out)


def test_the_object_has_everything(capsys):
    got = found(capsys, "+exp=pre_1b", "--gpus", "2", "--gpu", "H100", "--price-per-hour", "2")
    assert got["run"]["parameters"] == 1_339_082_752
    assert got["run"]["tokens"] == 100_000 * 512 * 256
    assert got["layout"] == {
        "tensor": 1,
        "data": 2,
        "sequence": False,
        "zero_stage": 1,
        "zero_stage_used": 2,  # several micro-batches in bf16
        "micro_batch_size": 16,
        "accumulation": 16,
        "activation_checkpointing": "none",
    }
    memory, time = got["memory"], got["time"]
    assert abs(sum(memory["parts"].values()) - memory["peak"]) <= len(memory["parts"])
    assert memory["parts"]["weights"] == 2 * 1_339_082_752
    assert memory["parts"]["optimizer"] == 12 * 1_339_082_752 // 2
    assert memory["fits"] is True
    assert time["run"] == pytest.approx(time["step"] * 100_000)
    assert time["cost"] == pytest.approx(time["run"] / 3600 * 2 * 2)
    assert time["step"] == pytest.approx(sum(time["parts"].values()))
    assert got["quickest"]["fits"] is True
    assert got["changes"] == []


def test_a_run_that_grows_shows_base_cost_and_saving(capsys):
    got = found(capsys, "+exp=gstack_7b", "--gpus", "64")
    growth = got["growth"]
    small, large = growth["sizes"]
    assert (small["blocks"], large["blocks"], large["from_step"]) == (8, 32, 5000)
    assert small["tokens"] == 5000 * 1024 * 2048
    assert small["tokens"] + large["tokens"] == got["run"]["tokens"]
    assert got["run"]["parameters"] == large["parameters"] == 6_738_415_616
    assert growth["flops"] == small["flops"] + large["flops"]
    per_token = [size["flops"] / size["tokens"] for size in (small, large)]
    assert growth["flops_saved"] == pytest.approx(
        small["tokens"] * (per_token[1] - per_token[0]) / (per_token[1] * got["run"]["tokens"])
    )
    share = small["tokens"] / got["run"]["tokens"]
    assert growth["average_parameters"] == pytest.approx(
        share * small["parameters"] + (1 - share) * large["parameters"]
    )
    assert growth["guideline"]["published"] and growth["guideline"]["tokens"] == pytest.approx(20.1e9, rel=0.02)
    _, out, _ = plan(capsys, "+exp=gstack_7b", "--gpus", "64")
    assert "  from step 5,000: 32 blocks, 6,738.4M parameters, 300B tokens" in out and "54.6% (7B, 194B)" in out


def test_below_the_law_a_tenth_is_said_and_no_saving_promised(capsys):
    code, out, _ = plan(capsys, "+exp=gstack_progressive_small")
    assert code == 0 and "guideline" not in out and "not known, nothing like it was published" in out
    code, out, _ = plan(capsys, "+exp=quickstart", "growth=stack")
    assert code == 0 and "  from step 28: 16 blocks" in out and "10% of the tokens by rule of thumb: C = " in out
    got = found(capsys, "+exp=quickstart", "growth=stack", "--gpu", "H100")
    share = 1 - got["growth"]["flops_saved"]
    assert 0.9 < share < 1 and got["time"]["run"] == pytest.approx(got["time"]["step"] * 280 * share)
    code, _, err = plan(capsys, "+exp=quickstart", "growth=stack", "growth.stages.0.factor=0")
    assert code == 2 and "growth.stages[0]: factor=0: must be" in err


def test_what_does_not_fit_names_keys_and_what_they_give(capsys):
    words = ("+exp=pre_1b", "train.micro_batch_size=512", "--gpu", "A100-80GB")
    code, out, _ = plan(capsys, *words)
    assert code == 1
    assert "DOES NOT FIT" in out
    assert re.search(r"train\.micro_batch_size=\d+: +[\d.]+ GiB, fits", out)
    assert re.search(r"train\.activation_checkpointing=full: +[\d.]+ GiB, fits", out)
    got = found(capsys, *words, code=1)
    assert got["memory"]["fits"] is False
    assert all(option["peak"] < got["memory"]["peak"] for option in got["changes"])
    quickest = got["quickest"]
    assert quickest["fits"]
    # what is advised is what the same command then says
    overrides = [f"{key}={str(value).lower()}" for key, value in quickest["set"].items()]
    again = found(capsys, "+exp=pre_1b", *overrides, "--gpu", "A100-80GB")
    assert again["memory"]["peak"] == quickest["peak"]
    assert again["time"]["step"] == quickest["step"]


def test_no_layout_fits(capsys):
    code, out, _ = plan(capsys, "+exp=pre_7b", "--gpu", "L4")
    assert code == 1
    assert "no layout on 1 GPU(s) fits" in out


def test_an_unknown_gpu_has_no_figures_of_another(capsys):
    got = found(capsys, "+exp=pre_71m", "--gpu", "MI300X")
    assert (got["gpu"]["memory"], got["memory"]["fits"], got["time"]["step"]) == (None, None, None)
    assert "H100" in got["gpu"]["note"]
    with_memory = found(capsys, "+exp=pre_71m", "--gpu", "MI300X", "--memory-gib", "192")
    assert with_memory["memory"]["fits"] is True
    assert with_memory["gpu"]["memory"] == 192 * GIB
    assert with_memory["time"]["step"] is None
    assert with_memory["quickest"]["step"] is None


def test_without_a_gpu_nothing_is_compared(capsys):
    code, out, _ = plan(capsys, "+exp=quickstart")
    assert code == 0
    assert "give --gpu or --memory-gib" in out
    assert "step time n/a" in out


def test_a_gpu_run_is_planned_without_a_gpu(capsys):
    assert found(capsys, "+exp=pre_71m", "train.device=cuda")["memory"]["fits"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("+exp=pre_71m", "--gpus", "0"), "--gpus: 0: must be an integer of at least 1"),
        (("+exp=pre_71m", "--memory-gib", "-3"), "must be a number greater than 0"),
        (("+exp=pre_71m", "--mfu", "40"), "40: must be in (0, 1]"),
        (("+exp=pre_71m", "--mfu", "0"), "0: must be a number greater than 0"),
        (("+exp=pre_71m", "--margin", "1"), "1: must be in [0, 1)"),
        (("+exp=pre_71m", "--gpus", "3"), "train.global_batch_size=512: not a multiple"),
        (("+exp=pre_71m", "train.micro_batch=4"), "train.micro_batch"),
        ((), "train.steps=null"),
    ],
)
def test_mistakes_are_one_message(capsys, words, message):
    code, _, err = plan(capsys, *words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", SOME)
def test_experiments(capsys, name):
    assert found(capsys, f"+exp={name}")["memory"]["peak"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in SOME])
def test_all_experiments(capsys, name):
    assert found(capsys, f"+exp={name}")["memory"]["peak"] > 0


def test_the_page_shows_what_is_printed(capsys):
    page = (REPOSITORY / "docs" / "plan.md").read_text()
    command = re.search(r"```bash\n(nexa plan .*)\n```", page)
    shown = re.search(r"```text\n(.*?)```", page, re.S)
    assert command and shown
    _, out, _ = plan(capsys, *command[1].split()[2:])
    assert out == shown[1]


def test_help_says_how(capsys):
    code, out, _ = plan(capsys, "--help")
    assert code == 0
    assert "nexa plan +exp=mixln_1b --gpus 8 --gpu H100" in re.sub(r" +", " ", out)
    assert "does not fit" in out


def test_suggestions_of_published_laws(capsys):
    rows = found(capsys, "+exp=pre_130m", "--suggest", "--proxy-width", "192")["suggestions"]
    by_key = {row["key"]: row for row in rows}
    # 84.95M parameters without embeddings and norms, 2.62B tokens: the published worked value
    assert by_key["optim.lr"]["value"] == pytest.approx(3.10e-3, rel=5e-3)
    assert by_key["optim.lr"]["current"] == 1e-3
    assert by_key["optim.weight_decay"]["value"] == pytest.approx(0.221, rel=0.02)
    assert by_key["lr of matrices"]["value"] == pytest.approx(2.5e-4)
    assert all(row["source"] and row["outside"] == [] for row in rows)
    assert "suggestions" not in found(capsys, "+exp=pre_130m")


def test_suggestions_say_where_they_hold(capsys):
    _, out, _ = plan(capsys, "+exp=pre_7b", "--suggest")
    assert "Step Law, arXiv 2503.04715" in out
    assert "60M to 1B parameters without embeddings" in out
    assert re.search(r"OUTSIDE ITS RANGE: 6\.48B parameters without embeddings", out)


def test_suggestions_for_a_run_that_grows_are_of_its_last_size(capsys):
    words = ["+exp=gstack_7b", "--gpus", "64", "--suggest"]
    got = found(capsys, *words)
    rate = next(row for row in got["suggestions"] if row["key"] == "optim.lr")
    whole = got["growth"]["sizes"][-1]["parameters"]
    assert 1.79 * whole**-0.713 * got["run"]["tokens"] ** 0.307 == pytest.approx(rate["value"], rel=0.05)
    _, out, _ = plan(capsys, *words)
    assert f"of the last size, {whole / 1e6:,.1f}M parameters, as if it were trained on all tokens" in out
