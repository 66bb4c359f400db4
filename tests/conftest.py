"""One thread and one profile of Hypothesis, so that runs repeat."""

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("fast", max_examples=40, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))
torch.set_num_threads(1)  # small tensors; threads only contend


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
