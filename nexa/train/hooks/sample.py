"""A sample of text from the model just trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nexa.train.hook import Hook

if TYPE_CHECKING:
    from nexa.train.loop import Trainer


class SampleHook(Hook):
    """Prints a continuation of `log.sample_prompt` and keeps it in reports/sample.txt.

    It reads the last checkpoint back, as `nexa generate` does, so it works for every ZeRO stage.
    """

    def __init__(self, run_dir: Path) -> None:
        self._dir = run_dir

    def end(self, trainer: Trainer) -> None:
        """Generate on the main rank, when the run is over and its last step was saved."""
        log = trainer.config.log
        if not (trainer.topology.is_main and trainer.finished and trainer.config.checkpoint.at_end):
            return
        from nexa.checkpoint.load import find
        from nexa.inference.generate import generate_text

        text = generate_text(find(self._dir), log.sample_prompt, max_new_tokens=log.sample_tokens, seed=0)
        report = self._dir / "reports" / "sample.txt"
        report.parent.mkdir(exist_ok=True)
        report.write_text(text, encoding="utf-8")
        print(f"sample ({report}):\n{text}", flush=True)
