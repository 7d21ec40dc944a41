"""`nexa plan --simulate` from words to exit code."""

import json

import pytest

from tests.cli.test_plan import plan

SMALL = ["+exp=quickstart", "train.precision=bf16", "--gpu", "H100"]


def test_the_table_has_a_line_for_each_count(capsys):
    code, out, _ = plan(capsys, *SMALL, "--simulate", "1,2,3", "--price-per-hour", "2")
    assert code == 0
    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.lstrip().startswith("GPUs"))
    assert [line.split()[0] for line in lines[head + 1 : head + 4]] == ["1", "2", "3"]
    assert "not a multiple" in lines[head + 3] or "tok/s" not in lines[head + 3]
    assert lines[head + 1].rstrip().endswith("fits") and "100.0%" in lines[head + 1]
    assert "cost: " in out and "shares of Hopper" in out


def test_the_object_adds_up_and_weak_scaling_grows_the_batch(capsys):
    code, out, err = plan(
        capsys, *SMALL, "--gpus", "1", "--simulate", "1,4", "--scaling", "weak", "--node-failure-hours", "10", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    one, four = found["rows"]
    assert four["global_batch_size"] == 4 * one["global_batch_size"]
    for row in found["rows"]:
        assert row["step"] == pytest.approx(sum(row["parts"].values()))
        assert row["between_failures"] == 36_000  # one node of eight
        assert row["gpu_hours"] == pytest.approx(row["run"] / 3600 * row["gpus"])
        assert row["run"] * row["goodput"] * row["tokens_per_second_per_gpu"] * row["gpus"] == pytest.approx(
            found["run"]["tokens"]
        )
    assert one["parts"]["straggler"] == one["parts"]["reduce"] == 0 < four["parts"]["straggler"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+exp=quickstart", "--simulate", "8"], "--simulate needs --gpu"),
        (["+exp=quickstart", "--simulate", "8,x", "--gpu", "H100"], "must be numbers of GPUs"),
        (["+exp=quickstart", "--simulate", "7", "--gpu", "H100"], "--simulate 7: "),
        (["+exp=quickstart", "--simulate", "8", "--gpu", "H100", "--suggest"], "ask one at a time"),
        (["+exp=quickstart", "train.precision=fp32", "--simulate", "2", "--gpu", "L40S"], "depends on the machine"),
    ],
)
def test_mistakes_are_one_message(capsys, words, message):
    code, _, err = plan(capsys, *words)
    assert code == 2
    assert message in err and "Traceback" not in err
