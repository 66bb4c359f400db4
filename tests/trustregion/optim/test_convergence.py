"""When a step reports convergence, and that a step which changes no loss is never accepted."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as td

from optimizers import natural, newton
from trustregion import Status

FORMS = {
    "gltr": {},
    "classic": {"rule": "classic"},
    "steihaug": {"solver": "steihaug"},
    "damped": {"radius": math.inf, "damping": 1e-2, "damping_factor": 4.0},
    "hessian-free": {"radius": math.inf, "damping": 1e-2, "solver": "cg"},
}
forms = pytest.mark.parametrize("form", FORMS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def leaf(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


@forms
def test_gtol_ends_a_fit_where_no_entry_of_the_gradient_exceeds_it(form):
    x = leaf(1.0, -2.0, 3.0)
    scales = torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)

    def closure():
        return (scales * x).square().sum() + x.cos().sum()

    optimizer = newton([x], **FORMS[form], gtol=1e-3)
    for _ in range(200):
        before = x.detach().clone()
        optimizer.step(closure)
        (g,) = torch.autograd.grad(closure(), x)
        if optimizer.info.status is Status.CONVERGED:
            break
        assert optimizer.info.largest_gradient > 1e-3
    assert optimizer.info.status is Status.CONVERGED
    assert torch.equal(x, before)
    assert g.abs().max() <= 1e-3
    assert optimizer.info.largest_gradient == g.abs().max()
    assert optimizer.info.products == 0
    assert optimizer.info.evaluations == 1
    assert "gtol" in str(optimizer.info)


def test_gtol_compares_the_largest_entry_and_counts_equality():
    x = leaf(0.5, -0.25)
    for gtol, status in [(0.5, Status.CONVERGED), (0.4999, Status.ACCEPTED)]:
        optimizer = newton([x], gtol=gtol)
        optimizer.step(lambda: x.square().sum() / 2)
        assert optimizer.info.status is status


def test_a_gradient_of_zero_is_stationary_whatever_gtol():
    x = leaf(0.0, 0.0)
    optimizer = newton([x], gtol=1.0)
    optimizer.step(lambda: x.square().sum())
    assert optimizer.info.status is Status.STATIONARY
    assert optimizer.info.gradient_norm == optimizer.info.largest_gradient == 0


@forms
@dtypes
def test_a_fit_without_gtol_ends_at_the_rounding_of_its_loss(form, dtype):
    x = leaf(1.0, -2.0, dtype=dtype)
    optimizer = newton([x], **FORMS[form])
    seen = []
    for _ in range(100):
        optimizer.step(lambda: 1 + x.cosh().sum() - x.sin().sum() / 2)
        seen.append(optimizer.info.status)
        if seen[-1] in (Status.CONVERGED, Status.STATIONARY):
            break
    assert seen[-1] in (Status.CONVERGED, Status.STATIONARY)
    # The root of the rounding of the loss, whose second derivative is near one.
    (g,) = torch.autograd.grad(x.cosh().sum() - x.sin().sum() / 2, x)
    assert g.norm() <= 20 * math.sqrt(torch.finfo(dtype).eps)


class Uphill(torch.autograd.Function):
    """The square of the norm, with a gradient of the wrong sign."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx, g):
        return -2 * g * ctx.saved_tensors[0]


@forms
@dtypes
def test_a_wrong_gradient_is_no_convergence_however_far_the_region_shrinks(form, dtype):
    x = leaf(1.0, 2.0, dtype=dtype)
    kept = x.detach().clone()

    def closure():  # Uphill along the negative gradient, and convex as far as autograd can tell.
        return (
            1 + (x - 0.3).square().sum() + 3 * (Uphill.apply(x) - x.square().sum()) + x.exp().sum()
        )

    optimizer = newton([x], **FORMS[form])
    for _ in range(30):
        optimizer.step(closure)
        assert optimizer.info.status is not Status.CONVERGED
        assert not optimizer.info.accepted
    assert torch.equal(x, kept)


@pytest.mark.parametrize("rule", ["gould", "classic"])
def test_steihaugs_method_shrinks_the_region_of_a_fisher_metric(rule):
    x = leaf(-1.2, 1.0)

    def closure():
        return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2, td.Normal(x, 1.0)

    optimizer = newton([x], 5.0, solver="steihaug", metric="fisher", rule=rule)
    retried = 0
    for _ in range(60):
        optimizer.step(closure)
        retried += optimizer.info.backtracks
        if not optimizer.info.accepted:
            break
    assert retried > 0
    torch.testing.assert_close(x.detach(), torch.ones(2, dtype=torch.float64))


@given(
    offset=st.floats(0, 16).map(lambda e: 10.0**e),
    sign=st.sampled_from([-1.0, 1.0]),
    size=st.floats(-12, 3).map(lambda e: 10.0**e),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    maximize=st.booleans(),
    name=st.sampled_from(["natural", *FORMS]),
)
def test_a_step_that_changes_no_loss_is_never_accepted(offset, sign, size, dtype, maximize, name):
    x = leaf(0.3, -0.7, 1.1, dtype=dtype)
    turn = -1.0 if maximize else 1.0

    def loss():
        return turn * (sign * offset + size * (x.square().sum() + x.sin().sum()))

    if name == "natural":
        optimizer = natural([x], maximize=maximize)
        closure = lambda: (loss(), td.Normal(x, 1.0))  # noqa: E731
    else:
        optimizer, closure = newton([x], **FORMS[name], maximize=maximize), loss
    for _ in range(4):
        before, kept = loss().item(), x.detach().clone()
        optimizer.step(closure)
        assert optimizer.info.accepted == (not torch.equal(x, kept))
        after = loss().item()
        assert turn * after < turn * before if optimizer.info.accepted else after == before
        assert optimizer.info.accepted == (optimizer.info.actual_reduction > 0)
