"""Signals that ask a run to stop, and what they do before and after it listens."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest

from nexa.train.stop import SIGNALS, StopFlag


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL])
def test_signals_are_given_back(before: signal.Handlers) -> None:
    """A launcher may ask again while the run ends: what was ignored before is ignored again."""
    kept = {number: signal.signal(number, before) for number in SIGNALS}
    try:
        flag = StopFlag()
        flag.install()
        flag.install()  # for every size of a run that grows
        os.kill(os.getpid(), signal.SIGUSR1)
        flag.agree(SimpleNamespace(world_size=1))
        assert (flag.asked, flag.name) == (True, "SIGUSR1")
        flag.release()
        assert {signal.getsignal(number) for number in SIGNALS} == {before}
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
