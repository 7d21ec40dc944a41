"""Being asked to stop: signals set a flag, and all ranks agree on the step at which they obey."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from nexa.parallel.topology import Topology

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """`asked` is the same on every rank after `agree`; `signal_number` is the highest signal received."""

    def __init__(self) -> None:
        self.signal_number = 0
        self._received = 0
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether the run is to end after this step."""
        return self.signal_number > 0

    @property
    def name(self) -> str:
        """Name of the signal."""
        return signal.Signals(self.signal_number).name

    def install(self) -> None:
        """Catch SIGINT, SIGTERM and SIGUSR1; a second SIGINT ends the process at once."""
        for number in SIGNALS:
            self._before.setdefault(number, signal.signal(number, self._receive))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == number:
            raise KeyboardInterrupt
        self._received = number

    def agree(self, topology: Topology) -> None:
        """Share the flag. Over gloo, on the host: no device waits for it."""
        if topology.world_size == 1:
            self.signal_number = self._received
            return
        flag = torch.tensor([self._received])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=topology.control_group)
        self.signal_number = int(flag)

    def release(self) -> None:
        """Give the signals back. One that was ignored before is ignored again: a launcher that asks twice does not end
        a run that has saved and is about to end."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()
