"""For every test: no network, and few enough threads for tiny models; for some, what is traced but once."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What imports make stays, so that it is not searched for garbage: neither meanwhile nor by any test."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)  # a test makes many objects, and few that hold much memory
        gc.enable()


@pytest.fixture(scope="session")
def traced_once(tmp_path_factory):
    """From now on each ONNX file is traced once, for all workers: most of what an export of a tiny network takes."""
    from tests.exporters import traced

    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with pytest.MonkeyPatch.context() as patch:
        traced.once(patch, shared / "traced")
        yield


@pytest.fixture(scope="module")
def looked_at_once():
    """From now on plans and runs look once at meta-device twins of equal shapes."""
    from tests import looks

    with pytest.MonkeyPatch.context() as patch:
        looks.once(patch)
        yield
