"""Makes transformers' auto classes know nexa's models, without importing transformers.

`install` puts a finder on `sys.meta_path` that watches for a few of transformers' modules. When an auto class
and everything that ours needs are there, it registers; when transformers was imported before nexa, it
registers at once.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType


@dataclass
class _Registration:
    """`ours.register()` is due once `auto` is loaded and none of `needs` is in the middle of its import.

    Who imports whom differs between transformers' releases, and a class cannot inherit from half a module.
    """

    auto: str
    ours: str
    needs: tuple[str, ...]
    done: bool = False

    def watches(self, name: str) -> bool:
        """Whether the end of that module's import matters."""
        return name in {self.auto, self.ours, *self.needs}

    def attempt(self) -> None:
        """Register if it is due."""
        if self.done or self.auto not in sys.modules or any(map(_initialising, (self.auto, self.ours, *self.needs))):
            return
        self.done = True
        importlib.import_module(self.ours).register()


_REGISTRATIONS = (
    _Registration(
        "transformers.models.auto.configuration_auto",
        "nexa.interop.transformers_config",
        ("transformers.configuration_utils",),
    ),
    _Registration(
        "transformers.models.auto.modeling_auto",
        "nexa.interop.transformers_model",
        ("nexa.interop.transformers_config", "transformers.modeling_utils", "transformers.generation.utils"),
    ),
)


def install() -> None:
    """Register now if transformers' auto classes are loaded, else as soon as they are."""
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
    _attempt()


def _attempt() -> None:
    for registration in _REGISTRATIONS:
        registration.attempt()


def _initialising(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds nothing itself; wraps the loaders of the watched modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, with a loader that reports the end of the import."""
        if not any(one.watches(fullname) and not one.done for one in _REGISTRATIONS):
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _Watcher):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Another loader, with a call at the end. Everything else is the other's."""

    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the other loader does."""
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module with its own loader in place, then see whether all is there."""
        spec = module.__spec__
        assert spec is not None
        spec.loader = module.__loader__ = self._inner
        self._inner.exec_module(module)
        # the module's code has run; only the import system's own flag is still set
        spec._initializing = False  # type: ignore[attr-defined]
        _attempt()
