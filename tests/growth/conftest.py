"""The store that the tests of layouts train on."""

from tests.dist.conftest import store

__all__ = ["store"]
