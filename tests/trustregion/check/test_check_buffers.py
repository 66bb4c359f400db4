"""The self-test of closures whose modules move their buffers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import spectral_norm as hooked
from torch.nn.utils.parametrizations import spectral_norm as parametrized

from problems import closure_of
from trustregion import check_closure

EXTRA = {
    "batch": lambda: nn.BatchNorm1d(8),
    "instance": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()
    ),
    "parametrized": lambda: parametrized(nn.Linear(8, 8)),
    "hooked": lambda: hooked(nn.Linear(8, 8)),
}


def case(name):
    model = nn.Sequential(nn.Linear(4, 8), nn.Softplus(), EXTRA[name](), nn.Linear(8, 3)).double()
    x, y = torch.randn(32, 4, dtype=torch.float64), torch.randint(3, (32,))
    with torch.no_grad():  # The power iterations of a spectral norm converge.
        for _ in range(300):
            model(x)
    return model, x, closure_of(model, x, y)


@pytest.mark.parametrize("name", EXTRA)
def test_moving_buffers_pass_and_are_left_as_one_call_leaves_them(name):
    model, x, closure = case(name)
    twin = copy.deepcopy(model)
    report = check_closure(closure, model.named_parameters())
    assert report.ok, str(report)
    assert len(report.checks) == 13
    twin(x)
    for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
