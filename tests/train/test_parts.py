"""Small parts of the loop: metrics file, console, schedule of saves, stop flag."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from nexa.train.hooks.console import ConsoleHook, duration, quantity, train_line, validation_lines
from nexa.train.hooks.figures import plot_loss
from nexa.train.metrics_file import MetricsFile
from nexa.train.state import RunState


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, last_step=0)
    for step in range(1, 8):
        first.write({"step": step, "loss": 1.0})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # a line cut by kill -9
    again = MetricsFile(path, last_step=5)
    again.write({"step": 6, "loss": 2.0})
    again.close()
    assert steps(path) == [1, 2, 3, 4, 5, 6]
    assert json.loads(path.read_text().splitlines()[-1])["loss"] == 2.0


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    MetricsFile(path, last_step=0).close()
    assert path.read_text() == ""


def test_metrics_stay_json_when_a_value_is_not_finite(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl", 0)
    file.write({"step": 1, "grad_norm": math.inf, "loss": math.nan})
    file.close()
    strict = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert strict == {"step": 1, "grad_norm": None, "loss": None}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.4, "4 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (273600, "3 d 04 h"), (59.6, "1 min 00 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_quantities() -> None:
    assert [quantity(v) for v in (812, 12_345, 4.56e6, 1.2e9)] == ["812", "12.35k", "4.56M", "1.20G"]


ROW = {
    "step": 3, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.5, "tokens": 300.0, "tokens_per_second": 1000.0,
    "step_seconds": 2.0, "memory_gib": 1.5,
}  # fmt: skip


def test_console_line() -> None:
    line = train_line(ROW, 10)
    for part in ("step  3/10", "loss 2.5000", "1.00k tok/s", "mfu n/a", "1.50 GiB", "eta 14 s"):
        assert part in line
    assert "mfu 41.5%" in train_line({**ROW, "mfu": 0.415}, 10)
    assert validation_lines({**ROW, "val/en/loss": math.log(7)}) == ["step 3  val/en  loss 1.9459  perplexity 7.00"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_overwrites_and_log_file_does_not_flood() -> None:
    trainer = SimpleNamespace(last_step=10, leaving=False)
    live, log = Terminal(), io.StringIO()
    for stream in (live, log):
        hook = ConsoleHook(stream)
        for step in range(1, 6):
            hook.on_row(trainer, {**ROW, "step": step})  # type: ignore[arg-type]
        hook.close()
    assert live.getvalue().count("\n") == 1
    assert live.getvalue().count("\r") == 5
    assert log.getvalue().count("\n") == 1, "one line in ten seconds"
    assert "\r" not in log.getvalue()


def test_state_round_trip_ignores_other_keys() -> None:
    state = RunState(step=3, samples=24, tokens=768, skipped=1)
    assert RunState.from_dict({**state.to_dict(), "other": 1}) == state


def test_plot_is_a_png(tmp_path: Path) -> None:
    rows = [{"step": s, "tokens": 10 * s, "loss": 5 - s / 10} for s in range(1, 20)]
    rows[9]["val/en/loss"] = 4.0
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_loss(tmp_path / "m.jsonl", tmp_path / "f" / "loss.png", vocab_size=100)
    assert (tmp_path / "f" / "loss.png").read_bytes().startswith(b"\x89PNG")
