"""The cotangents that KFAC draws have the metric as their covariance."""

import math

import pytest
import torch
from torch import distributions as td

from cases import cases
from kfac_models import mlp
from trustregion import FisherOperator
from trustregion.linearise import linearise
from trustregion.operators.gauss_newton import GaussNewtonOperator
from trustregion.preconditioners.kfac import KFAC
from trustregion.preconditioners.output_noise import cotangents
from trustregion.vector import ParameterVector

CASES = {case.name: case for case in cases()}


def metric_of(F):
    return torch.stack([F.metric(e) for e in torch.eye(F.jacobian.shape[0], dtype=F.dtype)], dim=1)


def by_sample(F, parts):
    """Rows (sample, output) of tuples shaped like the outputs."""
    samples = F.batch_size
    rows = [p.reshape(samples, -1) if p.shape[:1] == (samples,) else None for p in parts]
    return None if any(row is None for row in rows) else torch.cat(rows, dim=1)


@pytest.mark.parametrize("name", [n for n in CASES if n != "parameters without a network"])
def test_exact_cotangents_have_the_metric_as_their_covariance(name):
    F = FisherOperator(CASES[name].predict(CASES[name].params), CASES[name].params)
    us = [by_sample(F, u) for u in cotangents(F, "exact", torch.Generator())]
    found = sum(torch.einsum("ia,ib->iab", u, u) for u in us)
    samples, C = us[0].shape
    M = metric_of(F)
    index = by_sample(F, unflatten(F, torch.arange(len(M)).to(F.dtype))).long()
    expected = torch.stack([M[i][:, i] for i in index])
    assert found.shape == (samples, C, C)
    torch.testing.assert_close(found, expected)


def unflatten(F, flat):
    parts = flat.split([y.numel() for y in F.outputs])
    return [p.view(y.shape) for p, y in zip(parts, F.outputs, strict=True)]


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.slow
def test_drawn_cotangents_have_the_metric_as_their_covariance(name):
    F = FisherOperator(CASES[name].predict(CASES[name].params), CASES[name].params)
    draws = list(cotangents(F, 4000, torch.Generator().manual_seed(0)))
    U = torch.stack([torch.cat([t.reshape(-1) for t in u]) for u in draws], dim=1)
    M = metric_of(F)
    scale = M.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    gap = (U @ U.T - M) / torch.outer(scale, scale)
    assert gap.abs().max() < 0.11  # seven times the noise of 4000 draws


def test_the_metric_of_a_loss_is_recognised_up_to_weights():
    """Cross-entropy with a weight for each sample: M = w (diag p - pp')."""
    model = mlp(3, 4, 1000)
    y = model(torch.randn(5, 3))
    p, w = y.detach().softmax(-1), torch.tensor([[0.0], [0.5], [1.0], [2.0], [3.0]])

    def metric(d):
        return (w * (p * d[0] - p * (p * d[0]).sum(-1, keepdim=True)),)

    F = GaussNewtonOperator(linearise([y], ParameterVector(model.parameters())), metric, 5)
    calls = []
    F.apply_metric = lambda d: calls.append(1) or metric(d)
    (u,) = list(cotangents(F, "exact", torch.Generator()))[7]
    assert len(calls) == 2  # not one an output
    unit = torch.zeros(1000)
    unit[7] = 1.0
    torch.testing.assert_close(u, (w * p[:, 7:8]).sqrt() * (unit - p))


@pytest.mark.parametrize("samples", [1, "exact"])
def test_the_curvature_of_a_loss_has_the_factors_of_the_fisher(samples):
    """Mean cross-entropy, whose second derivative holds the 1/N itself; one sample is masked."""
    model = mlp(3, 4, 5).double()
    y = model(torch.randn(6, 3, dtype=torch.float64))
    F = FisherOperator(td.Categorical(logits=y), model.parameters())
    vector = ParameterVector(model.parameters())
    part = linearise([y], vector)
    loss = GaussNewtonOperator(part, lambda d: tuple(x / 6 for x in F.apply_metric(d)), 1.0)
    v = torch.randn(vector.numel, dtype=torch.float64)
    expected = KFAC(model, samples=samples).build(F, 0.1) @ v
    torch.testing.assert_close(KFAC(model, samples=samples).build(loss, 0.1) @ v, expected)


def test_a_sample_without_weight_may_have_outputs_that_are_not_finite():
    model = mlp(3, 1000).double()
    y = model(torch.randn(4, 3, dtype=torch.float64))
    y = torch.cat([y[:3], y[3:] * math.nan])
    p = y.detach()[:3].softmax(-1)

    def metric(d):
        Md = torch.zeros_like(d[0])
        Md[:3] = p * d[0][:3] - p * (p * d[0][:3]).sum(-1, keepdim=True)
        return (Md,)

    F = GaussNewtonOperator(linearise([y], ParameterVector(model.parameters())), metric, 3)
    (u,) = next(iter(cotangents(F, 1, torch.Generator())))
    assert u[:3].any(1).all()
    assert not u[3].any()


def test_a_metric_that_is_not_finite_takes_no_blocks():
    """They would be a thousand by thousand for each sample."""
    model, calls = mlp(3, 1000), []
    y = model(torch.randn(4, 3))

    def metric(d):
        calls.append(1)
        return (d[0] * math.nan,)

    F = GaussNewtonOperator(linearise([y], ParameterVector(model.parameters())), metric, 4)
    kfac = KFAC(model)
    assert torch.equal(kfac.build(F, 0.5) @ torch.ones(F.shape[0]), torch.full(F.shape[:1], 2.0))
    assert len(calls) == 3  # one for the samples that count


def test_a_coupling_of_outputs_that_are_no_slices_of_samples_is_refused():
    model = mlp(3, 2)
    y = model(torch.randn(5, 3))
    outputs = [y, y.sum(0)]
    K = torch.randn(12, 12)

    def metric(d):
        flat = K @ K.T @ torch.cat([t.reshape(-1) for t in d])
        return flat[:10].view(5, 2), flat[10:]

    F = GaussNewtonOperator(linearise(outputs, ParameterVector(model.parameters())), metric, 5)
    with pytest.raises(ValueError, match=r"one slice a sample .* \[\(5, 2\), \(2,\)\]"):
        KFAC(model).build(F, 0.1)


def test_a_metric_that_couples_samples_is_refused():
    model = mlp(3, 4)
    y = model(torch.randn(5, 3))
    K = torch.randn(20, 20)

    def metric(d):
        return ((K @ K.T @ d[0].flatten()).view(5, 4),)

    F = GaussNewtonOperator(linearise([y], ParameterVector(model.parameters())), metric, 5)
    with pytest.raises(ValueError, match=r"sample by sample.* contrastive"):
        KFAC(model).build(F, 0.1)
