"""The loop and what surrounds it."""

from __future__ import annotations

from nexa.config.schema import Config


def run(cfg: Config) -> int:
    """Train as `cfg` says and return the exit code (see `nexa.train.launch.run`)."""
    from nexa.train.launch import run as launch

    return launch(cfg)
