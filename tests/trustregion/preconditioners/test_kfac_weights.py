"""Kronecker factors of weighted and padded samples."""

import math

import pytest
import torch
from torch import distributions as td
from torch import nn

from kfac_models import each_dtype, factors_of, mlp, normal, solve_dense
from trustregion import FisherOperator, to_dense
from trustregion.distributions import Weighted
from trustregion.operators.ggn import GGNOperator
from trustregion.operators.sampled import MonteCarloFisherOperator
from trustregion.preconditioners.kfac import KFAC

WEIGHTS = {
    "samples": torch.tensor([1.0, 0.0, 2.0, 0.5]),
    "a mask": torch.tensor([True, True, False, True]),
    "far from one": torch.tensor([1e-40, 3e-40, 0.0, 0.0], dtype=torch.float64),
    "steps": torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [0.5, 1.0, 1.0], [1.0, 1.0, 0.0]]),
}


@each_dtype
@pytest.mark.parametrize("name", list(WEIGHTS))
@pytest.mark.parametrize("kind", ["linear", "convolution", "convolution in parts"])
def test_it_is_the_inverse_for_one_layer_with_weights(kind, name, dtype, monkeypatch):
    w = WEIGHTS[name]
    if kind == "linear":
        model, x = nn.Linear(3, 2).to(dtype), torch.randn(4, 3, 3, dtype=dtype)
        y = model(x)
    else:
        model, x = nn.Conv2d(2, 3, 2).to(dtype), torch.randn(4, 2, 2, 4, dtype=dtype)
        y = model(x).flatten(2).mT  # samples, three positions, channels
        if kind == "convolution in parts":
            monkeypatch.setattr("trustregion.preconditioners.kfac_layers._CHUNK", 64)
    F = FisherOperator(Weighted(normal(y), w), model.parameters())
    M = KFAC(model, samples="exact").build(F, 0.1)
    exact = solve_dense(F, 0.1)
    # condition of F + 0.1 I times the rounding of products and factors
    rtol = 1000 * torch.finfo(dtype).eps
    torch.testing.assert_close(to_dense(M).double(), exact, rtol=rtol, atol=rtol * exact.max())


def test_the_scale_of_the_weights_does_not_change_the_inputs_factor():
    model, x, w = mlp(3, 4, 2), torch.randn(4, 3), torch.tensor([0.3, 0.0, 2.0, 1.0]).double()
    found = []
    for scale in (1.0, 2.0**-300):
        kfac = KFAC(model)
        kfac.build(FisherOperator(Weighted(normal(model(x)), scale * w), model.parameters()), 0.1)
        found.append([A for A, _ in factors_of(kfac)])
    assert all(map(torch.equal, *found))


def categorical(logits):
    return td.Categorical(logits=logits, validate_args=False)


def operators_of_padding(kind, model, x, mask):
    """An operator of the samples of ``mask``, and the one of a batch without the others."""
    params, targets = model.parameters, torch.arange(len(x)) % 4
    if kind == "fisher":
        masked = FisherOperator(Weighted(categorical(model(x)), mask), params())
        return masked, FisherOperator(categorical(model(x[mask])), params())
    if kind == "weights":
        w = torch.rand(len(x)) * mask
        masked, few = (
            FisherOperator(Weighted(categorical(model(x[k])), w[k]), params())
            for k in (slice(None), mask)
        )
        return masked, few
    if kind == "monte carlo":
        d = Weighted(normal(model(x)), mask)
        return MonteCarloFisherOperator(d, params()), FisherOperator(
            normal(model(x[mask])), params()
        )
    y, z = model(x), model(x[mask])
    ignored = torch.where(mask, targets, -100)
    loss, other = (
        nn.functional.cross_entropy(*pair) for pair in ((y, ignored), (z, targets[mask]))
    )
    return GGNOperator(loss, y, params()), GGNOperator(other, z, params())


PADDED = [(kind, 1e100) for kind in ("fisher", "weights", "monte carlo", "ggn")]


@pytest.mark.parametrize(
    ("kind", "padding"), [*PADDED, ("fisher", math.nan), ("weights", math.nan)]
)
def test_padding_has_no_part_in_the_factors(kind, padding):
    model = mlp(3, 5, 4).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, False, True, True])
    x[~mask] = padding
    masked, few = operators_of_padding(kind, model, x, mask)
    kfac, other = KFAC(model, samples="exact"), KFAC(model, samples="exact")
    kfac.build(masked, 0.1)
    other.build(few, 0.1)
    assert len(factors_of(kfac)) == 2
    for (A, G), (wanted_A, wanted_G) in zip(factors_of(kfac), factors_of(other), strict=True):
        torch.testing.assert_close(A, wanted_A)
        if kind != "monte carlo":  # whose draws are its own
            torch.testing.assert_close(G, wanted_G)


def test_layers_before_and_behind_a_pool_take_the_weights_of_steps_and_of_samples():
    first, last = nn.Linear(2, 3).double(), nn.Linear(3, 2).double()
    model = nn.Sequential(first, nn.Tanh(), last)
    x, w = torch.randn(5, 4, 2, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)
    h = torch.tanh(first(x))
    y = last(h) + last(h.mean(1)).unsqueeze(1)
    kfac = KFAC(model)
    kfac.build(FisherOperator(Weighted(normal(y), w), model.parameters()), 0.1)
    (A, _), (B, _) = factors_of(kfac)
    a, b, c = (torch.cat([t, torch.ones_like(t[..., :1])], -1).detach() for t in (x, h, h.mean(1)))
    torch.testing.assert_close(A, torch.einsum("nt,nti,ntj->ij", w, a, a) / w.sum())
    rows = torch.einsum("nt,nti,ntj->ij", w, b, b) + torch.einsum("nt,ni,nj->ij", w, c, c)
    torch.testing.assert_close(B, rows / (2 * w.sum()))


def test_rows_in_another_order_than_the_samples_count_equally():
    """A network that runs over steps first: which row belongs to which sample is not known."""
    model = mlp(3, 4, 2).double()
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([[2], [3], [4], [5], [6]])
    F = FisherOperator(Weighted(normal(model(x).transpose(0, 1)), mask), model.parameters())
    plain = FisherOperator(normal(model(x).transpose(0, 1)), model.parameters())
    kfac, other = KFAC(model, samples="exact"), KFAC(model, samples="exact")
    kfac.build(F, 0.1)
    other.build(plain, 0.1)
    for (A, G), (wanted_A, _) in zip(factors_of(kfac), factors_of(other), strict=True):
        assert torch.equal(A, wanted_A)
        assert G.isfinite().all()
        assert G.trace() > 0
    # of the last layer, where it is known: M = 4 I for each row that counts
    torch.testing.assert_close(factors_of(kfac)[1][1], 4 * torch.eye(2).double())
