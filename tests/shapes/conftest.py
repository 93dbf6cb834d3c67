"""One thread a test process: networks this small lose more by waiting for each other than they gain."""

import logging
from typing import Any

import pytest
import torch

from compressor.shapes import evaluate


@pytest.fixture(autouse=True)
def _one_thread_and_quiet():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def _drawn_in_two_steps(monkeypatch):
    """The pictures that quality is measured of, where it does not matter how good they are."""
    quality: Any = evaluate.quality
    monkeypatch.setitem(quality.__kwdefaults__, "steps", 2)
