"""One thread for each process and one profile of Hypothesis, so that runs repeat."""

# ruff: noqa: E402 # the environment is set before torch is imported

import os

# Small tensors gain nothing from threads, and parallel workers contend for the cores. The libraries
# read these variables when they are loaded, and subprocesses inherit them.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"

import gc
import signal

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("fast", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=400, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


def pytest_configure(config):
    """Let a worker of pytest-xdist take Ctrl-C, which tests send to themselves and to children."""
    if hasattr(config, "workerinput"):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session):
    """Keep what is imported out of all later garbage collections, which are then quick."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
