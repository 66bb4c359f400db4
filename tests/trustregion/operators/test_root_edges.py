"""The root of the Fisher matrix at its limits: rounding, rank, scales, shapes, errors."""

import math

import pytest
import torch
from torch import distributions as td

from cases import N
from root_cases import check_root, columns, each_dtype
from trustregion import Family, FisherOperator, Status, register_distribution, to_dense
from trustregion.distributions import registry as module
from trustregion.solvers.least_squares import lsqr


@each_dtype
def test_a_sample_whose_metric_is_far_from_the_others(dtype):
    """Scales of one sample that differ beyond rounding: each output keeps its own digits."""
    scale = torch.tensor([[1e-10, 1.0, 1e10], [1.0, 1e12, 1e-12]], dtype=dtype)
    mean = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=dtype, requires_grad=True)
    joint = {"a": td.Normal(mean, scale), "b": td.Categorical(logits=logits)}
    F = FisherOperator(joint, [mean, logits])
    R = columns(F.root()).double()
    exact = to_dense(F).double()
    size = exact.diagonal().sqrt()
    gap = (R.T @ R - exact) / size.outer(size)
    assert gap.abs().max() < 20 * torch.finfo(dtype).eps


def test_a_saturated_categorical_in_float32_keeps_the_digits_of_its_root():
    """1 - p in float32 is 0 or 6e-8; the root of the block is of the size 1e-5 all the same."""
    raw = torch.tensor([[0.0, -23.0], [25.0, 0.0]], requires_grad=True)
    R = columns(FisherOperator(td.Categorical(logits=raw), [raw]).root()).double()
    p = torch.softmax(raw.detach().double(), -1)
    exact = torch.block_diag(*(torch.diag(q) - q.outer(q) for q in p)) / 2
    gap = (R.T @ R - exact) / exact.diagonal().outer(exact.diagonal()).sqrt()
    assert gap.abs().max() < 1e-5


def test_a_saturated_categorical_in_float64():
    """Its p (1 - p) is exactly zero where p is not."""
    raw = torch.tensor([[0.0, -40.0, -42.0]], dtype=torch.float64, requires_grad=True)
    R = columns(FisherOperator(td.Categorical(logits=raw), [raw]).root())
    p = torch.softmax(raw.detach(), -1)[0]
    exact = torch.stack([p[1:].sum(), *p[1:]])
    # the rounding of the block is 1e-16 of its entries with unit diagonal
    torch.testing.assert_close((R.T @ R).diagonal(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_nearly_dependent_outputs_keep_their_small_eigenvalue(size):
    """Variances 1 and size^2 along (1, 1) and across: M stretches (1, 1) to one, others by far."""
    mean = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    tril = torch.tensor([[1.0, 0.0], [1.0, size]], dtype=torch.float64)
    R = FisherOperator(td.MultivariateNormal(mean, scale_tril=tril), [mean]).root()
    y = R.mv(torch.ones(6, dtype=torch.float64))
    # rounding over the smallest eigenvalue of the block with unit diagonal
    assert (y @ y).item() == pytest.approx(1.0, rel=1e-15 / size**2)


@pytest.mark.parametrize("C", [3, 30])
def test_rows_of_deficient_rank_are_exact_zeros(C):
    logits = torch.randn(6, C, requires_grad=True)
    R = FisherOperator(td.Categorical(logits=logits), [logits]).root()
    zeros = (R.rows().view(6, C, -1) == 0).all(2)
    assert torch.equal(zeros.sum(1), torch.ones(6, dtype=torch.long))


@each_dtype
@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e30, 1e37])
def test_scales_whose_squares_are_out_of_range(scale, dtype):
    """F over- or underflows in float32 where its root does not."""
    mean = torch.zeros(3, dtype=dtype, requires_grad=True)
    s = torch.full((3,), scale, dtype=dtype)
    R = FisherOperator(td.Normal(mean, s), [mean]).root()
    v = torch.ones(3, dtype=dtype)
    size = (1 / s.double() / math.sqrt(3)).to(dtype)
    torch.testing.assert_close(R.mv(v).view(3, 2).abs().sum(1), size)
    u = torch.cat([1 / s, 0 * s])
    torch.testing.assert_close(R.rmv(R.lift(u)), 1 / s)


@each_dtype
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_block_that_is_not_finite_or_zero(bad, dtype):
    mean = torch.zeros(3, 4, dtype=dtype, requires_grad=True)
    s = torch.tensor([1.0, bad, 2.0], dtype=dtype).unsqueeze(1).expand(3, 4)
    R = FisherOperator(td.Normal(mean, s, validate_args=False), [mean]).root()
    y = R.mv(torch.ones(12, dtype=dtype)).view(3, 8)
    assert y[[0, 2]].isfinite().all()
    lifted = R.lift(torch.ones(24, dtype=dtype))
    assert lifted.isfinite().all()
    solution = lsqr(R, torch.ones(24, dtype=dtype), damping=0.1)
    assert solution.x.isfinite().all()
    if bad == math.inf:  # M = 0: known nothing of
        assert torch.equal(y[1], torch.zeros(8, dtype=dtype))
        assert solution.status is Status.CONVERGED
    else:
        assert y[1].isnan().all()
        assert solution.status is Status.NONFINITE_OPERATOR


@each_dtype
@pytest.mark.parametrize("shape", [(), (3,), (3, 2)])
def test_a_distribution_without_a_batch_is_one_sample(shape, dtype):
    mean = torch.randn(shape, dtype=dtype, requires_grad=True)
    log_scale = torch.randn(shape, dtype=dtype, requires_grad=True)
    d = td.Independent(td.Normal(mean, log_scale.exp()), len(shape))
    F = FisherOperator(d, [mean, log_scale])
    assert F.batch_size == 1
    check_root(F)


@each_dtype
def test_more_batch_dimensions_and_several_factors(dtype):
    W = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    x = torch.randn(N, 2, 3, dtype=dtype)
    out = x @ W
    tril = torch.tensor([[2.0, 0.0], [1.0, 0.5]], dtype=dtype)
    prediction = [
        td.Categorical(logits=out),
        td.Independent(td.Normal(out[..., :2], 1.0), 2),
        td.MultivariateNormal(out[:, 0, 2:], scale_tril=tril),
        td.Bernoulli(logits=out[:, 0, 0]),
    ]
    R = check_root(FisherOperator(prediction, [W]))
    assert R.shape == (N * (8 + 4 + 4 + 2 + 4 + 1), 12)


@pytest.mark.parametrize("other", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_outputs_in_another_dtype(other):
    dtype, inner = other
    W = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    out = torch.randn(5, 3, dtype=inner) @ W.to(inner)
    F = FisherOperator(td.Categorical(logits=out), [W])
    R = F.root()
    v = torch.randn(12, dtype=dtype)
    assert R.mv(v).dtype == R.rmv(R.mv(v)).dtype == dtype
    torch.testing.assert_close(R.rmv(R.mv(v)), F @ v, rtol=1e-4, atol=1e-5)


def shared_scale(expand):
    """A Gaussian whose family has one scale tensor for all samples, and M adds over them."""

    def fisher_of(params):
        mean, scale = params
        count = len(mean)
        if expand:
            return lambda d: (d[0] / scale**2, 2 * d[1] / scale**2)
        # with a made-up effect of the mean on the scale, as a skewed family has
        return lambda d: (
            d[0] / scale[0] ** 2 + 0.1 * d[1].sum(),
            2 * count * d[1] / scale**2 + 0.1 * d[0].sum(),
        )

    def parameters(d):
        return (d.concentration, d.rate)

    def kl(old, new):
        return old[0] - new[0]

    return Family(parameters, kl, fisher_of)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(module, "_FAMILIES", dict(module._FAMILIES))


class Tied(td.Gamma):
    """Keeps its tensors as given, without one slice a sample."""

    def __init__(self, concentration, rate):
        super().__init__(concentration, rate, validate_args=False)
        self.concentration, self.rate = concentration, rate


@pytest.mark.usefixtures("registry")
def test_a_parameter_that_samples_share_is_refused_in_words():
    register_distribution(Tied, shared_scale(expand=False))
    mean = torch.rand(4, requires_grad=True)
    for shared in (torch.ones(1), torch.ones(())):
        F = FisherOperator({"a": Tied(mean, shared)}, [mean])
        with pytest.raises(ValueError, match=r"of the 4 samples.*\['a'\]Tied: expand"):
            F.root()
    F = FisherOperator(Tied(mean, torch.ones(4)), [mean])  # of the right shape by chance
    with pytest.raises(ValueError, match="effect on others"):
        F.root()
    register_distribution(Tied, shared_scale(expand=True))
    check_root(FisherOperator(Tied(mean, torch.ones(4)), [mean]))


@pytest.mark.parametrize("u", [torch.ones(7), torch.ones(8).double(), torch.ones(2, 4)])
def test_a_derivative_that_does_not_fit_is_refused_in_words(u):
    W = torch.zeros(4, requires_grad=True)
    R = FisherOperator(td.Categorical(logits=W.expand(2, 4)), [W]).root()
    with pytest.raises(ValueError, match=r"u must be a vector of shape \(8,\) and dtype .*got"):
        R.lift(u)
