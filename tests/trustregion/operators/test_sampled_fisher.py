import math

import pytest
import torch
from torch import distributions as td
from torch import nn
from torch.nn import functional as nnf

import oracles
from cases import N, cases
from laws import check_operator
from trustregion import FisherOperator, to_dense
from trustregion.distributions import Weighted
from trustregion.operators import ParameterVector
from trustregion.operators.sampled import EmpiricalFisherOperator, MonteCarloFisherOperator

F64 = torch.float64
CASES = {case.name: case for case in cases()}
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
LABELS = torch.tensor([0, 3, 1, 1, 2, 0, 3])


def linear(W):
    return td.Categorical(logits=X.to(W.dtype) @ W)


def weights(dtype=F64):
    g = torch.Generator().manual_seed(3)
    return torch.randn(3, 4, generator=g, dtype=F64).to(dtype).requires_grad_()


def test_empirical_fisher_is_the_mean_of_outer_products_of_gradients():
    W = weights()
    E = EmpiricalFisherOperator(linear(W).log_prob(LABELS), [W])
    check_operator(E, oracles.score_outer(lambda p: linear(p[0]).log_prob(LABELS), [W]))
    assert torch.linalg.eigvalsh(to_dense(E))[0] >= -1e-12 * to_dense(E).abs().max()
    assert E.batch_size == N
    assert torch.linalg.matrix_rank(to_dense(E)) <= N


def test_empirical_fisher_does_not_know_the_sign():
    W = weights()
    losses = nnf.cross_entropy(X @ W, LABELS, reduction="none")
    of_losses = EmpiricalFisherOperator(losses, ParameterVector([W]))
    check_operator(of_losses, to_dense(EmpiricalFisherOperator(linear(W).log_prob(LABELS), [W])))


def test_empirical_fisher_of_a_deep_model_with_a_frozen_part():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 4)).double()
    module[0].bias.requires_grad_(False)
    names, params = zip(*module.named_parameters(), strict=True)

    def log_probs(p):
        y = torch.func.functional_call(module, dict(zip(names, p, strict=True)), X)
        return td.Categorical(logits=y).log_prob(LABELS)

    exact = oracles.score_outer(log_probs, params)
    exact[15:20], exact[:, 15:20] = 0.0, 0.0
    E = EmpiricalFisherOperator(log_probs(params), params)
    check_operator(E, exact)
    assert not to_dense(E)[15:20].any()


def test_empirical_fisher_refuses_what_is_not_one_number_a_sample():
    W = weights()
    for wrong in (linear(W).log_prob(LABELS).mean(), X @ W, (X @ W)[:0, 0]):
        with pytest.raises(ValueError, match=r"shape \(N,\) with N > 0, got shape"):
            EmpiricalFisherOperator(wrong, [W])
    with pytest.raises(TypeError, match="got list"):
        EmpiricalFisherOperator([1.0], [W])
    with pytest.raises(ValueError, match="carry no graph"):
        EmpiricalFisherOperator(linear(W.detach()).log_prob(LABELS), [W])


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", list(CASES))
def test_monte_carlo_fisher_is_the_mean_of_outer_products_at_its_draws(name, samples):
    case = CASES[name]
    F = MonteCarloFisherOperator(case.predict(case.params), case.params, samples=samples, seed=5)
    parts = oracles.factors(case.predict(case.params))
    torch.manual_seed(5)
    draws = [d.sample((samples,)) for d in parts]

    def log_probs(p):
        factors = oracles.factors(case.predict(p))
        terms = [d.log_prob(y) for d, y in zip(factors, draws, strict=True)]
        return sum(t.flatten(2).sum(2) if t.ndim > 2 else t for t in terms)

    check_operator(F, oracles.score_outer(log_probs, case.params))
    assert F.batch_size == parts[0].batch_shape[0]


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.slow
def test_monte_carlo_fisher_is_unbiased(name):
    case = CASES[name]
    exact = to_dense(FisherOperator(case.predict(case.params), case.params))
    draws = torch.stack(
        [
            to_dense(
                MonteCarloFisherOperator(
                    case.predict(case.params), case.params, samples=2000, seed=seed
                )
            )
            for seed in range(10)
        ]
    )
    # Twelve standard errors of each entry, estimated from ten means: a chance below 1e-6 each.
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() <= 12 * error + 1e-12 * exact.abs().max()).all()
    # and it is not the exact one
    assert error.max() > 1e-4 * exact.abs().max()


MU = torch.zeros(4000, dtype=F64)
FAMILIES = {
    "student": (lambda p: td.StudentT(3.0, p + MU), 4 / 6),
    "laplace": (lambda p: td.Laplace(p + MU, 0.5), 4.0),
    "negative binomial": (
        lambda p: td.NegativeBinomial(4.0, logits=p + MU),
        4.0 * 0.5,  # r p, at p = 1/2
    ),
    "mixture of one": (
        lambda p: td.MixtureSameFamily(
            td.Categorical(logits=torch.zeros(4000, 2, dtype=F64)),
            td.Normal((p + MU).unsqueeze(1).expand(4000, 2), 0.5),
        ),
        4.0,
    ),
    "log-normal by a transform": (
        lambda p: td.TransformedDistribution(td.Normal(p + MU, 0.5), td.ExpTransform()),
        4.0,
    ),
    "von Mises": (lambda p: td.VonMises(p + MU, torch.tensor(2.0, dtype=F64)), 2.0 * 0.6977747),
}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_families_without_a_closed_form(name):
    predict, exact = FAMILIES[name]
    p = torch.zeros(1, dtype=F64, requires_grad=True)
    F = MonteCarloFisherOperator(predict(p), [p], samples=5)
    value = (F @ torch.ones(1, dtype=F64)).item()
    # 20,000 draws; the square of a score varies by about twice its mean
    assert abs(value - exact) < 4 * 2 * exact / math.sqrt(20_000)


def test_the_error_falls_with_the_number_of_samples():
    W = weights()
    exact = to_dense(FisherOperator(linear(W), [W]))

    def error(samples):
        errors = [
            (to_dense(MonteCarloFisherOperator(linear(W), [W], samples=samples, seed=k)) - exact)
            .norm()
            .item()
            for k in range(20)
        ]
        return sum(errors) / 20

    ratio = error(4) / error(400)
    assert 7 < ratio < 14  # ten


@pytest.mark.parametrize("shape", [(N,), (N, 2)])
def test_weights_weigh_the_outer_products(shape):
    W = weights()
    w = torch.rand(shape, dtype=F64) * (torch.arange(N) != 3).view(-1, *[1] * (len(shape) - 1))
    logits = (X @ W).view(N, 2, 2)  # two choices of two each
    F = MonteCarloFisherOperator(Weighted(td.Categorical(logits=logits), w), [W], samples=3)
    torch.manual_seed(0)
    y = td.Categorical(logits=logits.detach()).sample((3,))
    J = oracles.batch_jacobian(
        lambda p: (
            td.Categorical(logits=(X @ p[0]).view(N, 2, 2))
            .log_prob(y)
            .reshape(3, *shape, -1)
            .sum(-1)
        ),
        [W],
    )
    exact = (J.T * w.flatten().repeat(3)) @ J / (3 * w.sum())
    check_operator(F, exact)
    assert F.total == w.sum().item()
    ones = Weighted(td.Categorical(logits=logits), torch.ones(N, dtype=torch.bool))
    plain = MonteCarloFisherOperator(td.Categorical(logits=logits), [W])
    check_operator(MonteCarloFisherOperator(ones, [W]), to_dense(plain), 1e-14)


def test_wrong_weights_are_named():
    W = weights()
    for wrong in (torch.ones(()), torch.ones(N + 1), torch.ones(N, 2)):
        with pytest.raises(ValueError, match="leading part of the batch shape"):
            MonteCarloFisherOperator(Weighted(linear(W), wrong), [W])
    for value, words in [
        (-1.0, "not be negative, got -1.0"),
        (math.nan, "must be finite"),
        (math.inf, "must be finite"),
        (0.0, "sum of weights must be positive"),
    ]:
        with pytest.raises(ValueError, match=words):
            MonteCarloFisherOperator(Weighted(linear(W), torch.full((N,), value)), [W])
    for wrong, given in (([1.0] * N, "list"), (torch.ones(N, dtype=torch.complex64), "complex64")):
        with pytest.raises(ValueError, match=f"real or bool tensor, got .*{given}"):
            MonteCarloFisherOperator(Weighted(linear(W), wrong), [W])


def test_an_outcome_from_the_cache_of_a_transform_keeps_its_derivative():
    def build(cache_size):
        loc, scale = (torch.full((1,), x, dtype=F64, requires_grad=True) for x in (0.0, 1.0))
        shift = td.AffineTransform(loc.expand(9), scale.expand(9), cache_size=cache_size)
        d = td.TransformedDistribution(td.Normal(torch.zeros(9, dtype=F64), 1.0), [shift])
        return to_dense(MonteCarloFisherOperator(d, [loc, scale], samples=2))

    assert torch.equal(build(1), build(0))
    assert build(1)[0, 0] > 0.9  # 1 / scale^2 at each outcome


def test_parameters_without_an_outcome_are_named_also_at_weight_zero():
    W = weights()
    logits = torch.cat([X @ W, torch.full((1, 4), math.nan, dtype=F64)])
    d = td.Categorical(logits=logits, validate_args=False)
    with pytest.raises(ValueError, match=r"drawn from a Categorical.*weight 0.*finite inputs"):
        MonteCarloFisherOperator(Weighted(d, torch.arange(N + 1) < N), [W])


def test_weights_of_each_sample_are_kept():
    W, w = weights(), torch.rand(N)
    assert torch.equal(
        MonteCarloFisherOperator(linear(W), [W]).sample_weights, torch.ones(N).double()
    )
    F = MonteCarloFisherOperator(Weighted(linear(W), w), [W])
    assert torch.equal(F.sample_weights, w.double())


def test_rank_is_at_most_the_number_of_scores():
    W = torch.randn(30, 4, dtype=F64, requires_grad=True)
    x = torch.randn(3, 30, dtype=F64)
    F = MonteCarloFisherOperator(td.Categorical(logits=x @ W), [W], samples=2)
    assert torch.linalg.matrix_rank(to_dense(F)) <= 6


def test_draws_are_those_of_the_seed_and_no_global_number_is_drawn():
    W = weights()
    v = torch.randn(12, dtype=F64)
    state = torch.get_rng_state()
    one, same, other = (MonteCarloFisherOperator(linear(W), [W], seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one @ v, same @ v)
    assert not torch.equal(one @ v, other @ v)


def test_a_prediction_of_one_sample_without_a_batch_shape():
    W = weights()
    F = MonteCarloFisherOperator(td.Categorical(logits=X[0] @ W), [W], samples=3)
    assert F.batch_size == 1
    assert F.shape == (12, 12)


@pytest.mark.parametrize("name", list(CASES))
def test_float32_agrees_with_float64(name):
    small = next(c for c in cases(torch.float32) if c.name == name)
    F = EmpiricalFisherOperator(scores(small), small.params)
    exact = to_dense(EmpiricalFisherOperator(scores(CASES[name]), CASES[name].params))
    # 1e-5 of the largest entry: rounding of chained float32 passes
    atol = 1e-5 * exact.abs().max().item()
    torch.testing.assert_close(to_dense(F).double(), exact, rtol=0, atol=atol)


def scores(case):
    """Log-probabilities of one outcome of each factor, the same in both dtypes."""
    exact = CASES[case.name]
    torch.manual_seed(0)
    drawn = [d.sample() for d in oracles.factors(exact.predict(exact.params))]
    parts = oracles.factors(case.predict(case.params))
    terms = [d.log_prob(y.to(case.params[0].dtype)) for d, y in zip(parts, drawn, strict=True)]
    return sum(t.reshape(len(t), -1).sum(1) for t in terms)


def test_wrong_arguments_are_named():
    W = weights()
    with pytest.raises(
        TypeError, match=r"list or tuple of independent ones, got a tensor at \[1\]"
    ):
        MonteCarloFisherOperator([linear(W), X @ W], [W])
    with pytest.raises(TypeError, match=r"got float at \['a'\]"):
        MonteCarloFisherOperator({"a": 1.0}, [W])
    with pytest.raises(ValueError, match="prediction is empty"):
        MonteCarloFisherOperator([], [W])
    with pytest.raises(ValueError, match=r"share one batch, got {'\[0\]Categorical': 7, "):
        MonteCarloFisherOperator([linear(W), td.Categorical(logits=X[:2] @ W)], [W])
    with pytest.raises(ValueError, match="empty batch"):
        MonteCarloFisherOperator(td.Normal(X[:0] @ W, 1.0), [W])
    for samples in (0, 1.5, True):
        with pytest.raises(ValueError, match="samples must be a positive integer"):
            MonteCarloFisherOperator(linear(W), [W], samples=samples)
    with pytest.raises(TypeError, match="Weighted goes around a whole prediction"):
        MonteCarloFisherOperator([Weighted(linear(W), torch.ones(N))], [W])
    with pytest.raises(ValueError, match="carry no graph"):
        MonteCarloFisherOperator(linear(W.detach()), [W])
    with pytest.raises(ValueError, match="all of them are frozen"):
        MonteCarloFisherOperator(linear(W), [W.detach()])
