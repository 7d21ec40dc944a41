"""Configuration: YAML and command-line values in, one checked `Config` out.

Importing this package costs nothing (no Hydra, no YAML library); the functions load what they need.
"""

from __future__ import annotations

from nexa.config.build import from_mapping
from nexa.config.checks import check
from nexa.config.files import compose, fingerprint, load, to_yaml

__all__ = ["check", "compose", "fingerprint", "from_mapping", "load", "to_yaml"]
