"""What all tests of workers need."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def hears_ctrl_c() -> Iterator[None]:
    """A shell starts background jobs deaf to SIGINT, and so would be these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
