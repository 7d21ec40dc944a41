"""nexa: one trainer for people who study and run LLM pre-training.

The names below load on first use: `import nexa` itself costs milliseconds and brings neither torch nor
transformers in. It does register nexa's architectures with transformers' auto classes, whichever of the two
is imported first (see `nexa.interop.registration`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nexa.interop import registration

if TYPE_CHECKING:
    from nexa.api import build_model, load_model
    from nexa.model.decoder import Decoder, load_state

__version__ = "0.1.0"
__all__ = ["Decoder", "__version__", "build_model", "load_model", "load_state"]

_HOMES = {
    "Decoder": "nexa.model.decoder",
    "build_model": "nexa.api",
    "load_model": "nexa.api",
    "load_state": "nexa.model.decoder",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'nexa' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


registration.install()
