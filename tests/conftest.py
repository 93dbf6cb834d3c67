"""For every test: no network, and few enough threads for tiny models."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
