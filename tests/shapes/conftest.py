"""One thread a test process: networks this small lose more by waiting for each other than they gain."""

import logging

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_quiet():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    yield
    torch.set_num_threads(threads)
