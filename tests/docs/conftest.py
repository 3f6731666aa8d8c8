"""The running backend that the documentation's commands talk to."""

from tests.e2e.conftest import backend

__all__ = ["backend"]
