"""Laws of every family: its KL and its Fisher matrix against definitions of both."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as td

import oracles
from trustregion import FisherOperator, mean_kl, to_dense
from trustregion.distributions import joint_of
from trustregion.distributions.catalogue import FAMILIES, REFUSED


def split(x):
    return x[..., 0], x[..., 1]


def located(cls):
    return lambda x: cls(x[..., 0], x[..., 1].exp())


def shaped(cls):
    return lambda x: cls(*split(x.exp()))


def tril(x):
    """A factor (..., 2, 2) from three numbers."""
    zero = torch.zeros_like(x[..., 0])
    rows = [x[..., 0].exp(), zero, x[..., 1], x[..., 2].exp()]
    return torch.stack(rows, -1).unflatten(-1, (2, 2))


def through(*transforms):
    return lambda x: td.TransformedDistribution(located(td.Normal)(x), list(transforms))


def squashed(x):
    base = td.Independent(td.Normal(x[..., :2], x[..., 2:].exp()), 1)
    return td.TransformedDistribution(base, [td.TanhTransform(), td.AffineTransform(1.0, 2.0)])


# name: (how many numbers a sample, distribution from them, how expectations are summed)
CASES = {
    "Categorical": (4, lambda x: td.Categorical(logits=x), "finite"),
    "Categorical from probs": (3, lambda x: td.Categorical(probs=x.exp()), "finite"),
    "OneHotCategorical": (3, lambda x: td.OneHotCategorical(logits=x), "finite"),
    "OneHotCategoricalStraightThrough": (
        3,
        lambda x: td.OneHotCategoricalStraightThrough(logits=x),
        "finite",
    ),
    "Multinomial": (3, lambda x: td.Multinomial(4, logits=x), "sum"),
    "Bernoulli": (1, lambda x: td.Bernoulli(logits=x[..., 0]), "finite"),
    "Binomial": (1, lambda x: td.Binomial(7, logits=x[..., 0]), "finite"),
    "Geometric": (1, lambda x: td.Geometric(logits=x[..., 0]), "count"),
    "Geometric from probs": (1, lambda x: td.Geometric(probs=x[..., 0].sigmoid()), "count"),
    "NegativeBinomial": (1, lambda x: td.NegativeBinomial(2.5, logits=x[..., 0]), "count"),
    "Poisson": (1, lambda x: td.Poisson(x[..., 0].exp()), "count"),
    "Normal": (2, located(td.Normal), "gaussian"),
    "LogNormal": (2, located(td.LogNormal), "gaussian"),
    "LogisticNormal": (4, lambda x: td.LogisticNormal(x[..., :2], x[..., 2:].exp()), "gaussian"),
    "HalfNormal": (1, lambda x: td.HalfNormal(x[..., 0].exp()), "positive"),
    "MultivariateNormal": (
        5,
        lambda x: td.MultivariateNormal(x[..., :2], scale_tril=tril(x[..., 2:])),
        "gaussian",
    ),
    "LowRankMultivariateNormal": (
        6,
        lambda x: td.LowRankMultivariateNormal(
            x[..., :2], x[..., 2:4].unsqueeze(-1), x[..., 4:].exp()
        ),
        "gaussian",
    ),
    "Exponential": (1, lambda x: td.Exponential(x[..., 0].exp()), "positive"),
    "Gamma": (2, shaped(td.Gamma), "positive"),
    "InverseGamma": (2, shaped(td.InverseGamma), "positive"),
    "Chi2": (1, lambda x: td.Chi2(3 * x[..., 0].exp()), "positive"),
    "Dirichlet": (3, lambda x: td.Dirichlet(3 * x.exp()), "simplex"),
    "Beta": (2, lambda x: td.Beta(*split(3 * x.exp())), "unit"),
    "Cauchy": (2, located(td.Cauchy), "real"),
    "HalfCauchy": (1, lambda x: td.HalfCauchy(x[..., 0].exp()), "positive"),
    "Gumbel": (2, located(td.Gumbel), "real"),
    "Weibull": (2, shaped(td.Weibull), "positive"),
    "tanh": (2, through(td.TanhTransform()), "gaussian"),
    "sigmoid": (2, through(td.SigmoidTransform()), "gaussian"),
    "softplus": (2, through(td.SoftplusTransform()), "gaussian"),
    "exp of affine": (
        2,
        through(
            td.ComposeTransform([td.AffineTransform(0.5, torch.tensor(2.0)), td.ExpTransform()])
        ),
        "gaussian",
    ),
    "squashed": (4, squashed, "gaussian"),
}
# torch has no KL, or not of this family but of its transforms
WITHOUT = {"Multinomial", "NegativeBinomial", "HalfCauchy", "Weibull"}
COUNTED = {"Multinomial", "Binomial", "NegativeBinomial"}
every = pytest.mark.parametrize("name", list(CASES))


@pytest.fixture(autouse=True)
def unvalidated():
    """Outcomes at the rim of a support and parameters under vmap are not validated."""
    td.Distribution.set_default_validate_args(False)
    yield
    td.Distribution.set_default_validate_args(__debug__)


def points(name, *shape, scale=0.5):
    return scale * torch.randn(*shape, CASES[name][0], dtype=torch.float64)


def parts(name, x):
    """The family and its parameter tensors at ``x``, each with memory of its own."""
    joint = joint_of(CASES[name][1](x))
    return joint.families[0], tuple(t.detach().contiguous() for t in joint.parameters[0])


def matrix(family, params):
    """The dense Fisher matrix in the flattened parameters."""
    metric = family.fisher(params)
    eye = torch.eye(len(oracles.flatten(params)), dtype=params[0].dtype)
    return torch.stack([oracles.flatten(metric(tuple(oracles.unflatten(e, params)))) for e in eye])


def test_every_public_distribution_is_a_family_or_refused_with_a_reason():
    wrappers = {td.Distribution, td.ExponentialFamily, td.Independent}
    public = [getattr(td, name) for name in td.__all__]
    classes = {c for c in public if isinstance(c, type) and issubclass(c, td.Distribution)}
    assert classes - wrappers == set(FAMILIES) | set(REFUSED)
    assert not set(FAMILIES) & set(REFUSED)
    tested = {type(build(points(name, 2))) for name, (_, build, _) in CASES.items()}
    assert set(FAMILIES) <= tested


@pytest.mark.parametrize("name", [name for name in CASES if name not in WITHOUT])
def test_kl_agrees_with_torch(name):
    build = CASES[name][1]
    old, new = build(points(name, 6)), build(points(name, 6))
    expected = td.kl_divergence(old, new).sum() / 6
    torch.testing.assert_close(mean_kl(old, new), expected, rtol=1e-9, atol=0)


@every
def test_kl_is_the_expected_log_ratio(name):
    _, build, kind = CASES[name]
    old, new = build(points(name, 1)), build(points(name, 1))
    expected = oracles.expected_kl(old, new, kind)
    # 1e-7: the quadrature over a simplex, and log_prob where a transform is inverted
    assert mean_kl(old, new).item() == pytest.approx(expected, rel=1e-7)


@every
def test_fisher_is_the_covariance_of_the_score(name):
    _, build, kind = CASES[name]
    x = points(name, 1).requires_grad_()
    expected = oracles.expected_score_covariance(build, x.detach()[0], kind)
    F = to_dense(FisherOperator(build(x), [x]))
    # 1e-6: as above; torch's digamma in the score is exact to 1e-9 only
    torch.testing.assert_close(F, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


@every
def test_fisher_is_the_hessian_of_the_kl(name):
    family, params = parts(name, points(name, 3))

    def kl(flat):
        return family.kl(params, tuple(oracles.unflatten(flat, params))).sum()

    flat = oracles.flatten(params)
    hessian, F = torch.autograd.functional.hessian(kl, flat), matrix(family, params)
    torch.testing.assert_close(hessian, F, rtol=1e-9, atol=1e-9 * F.abs().max().item())
    assert kl(flat).item() == 0.0
    assert not torch.func.grad(kl)(flat).abs().max() > 1e-14 * F.abs().max()


@every
@pytest.mark.parametrize("bits", [10, 20, 27])
def test_small_kls_have_all_their_digits(name, bits):
    """The sum of both KLs is d'Md in the middle, to a relative error of the size squared."""
    family, middle = parts(name, points(name, 4))
    middle = tuple(t.float().double() for t in middle)
    size = 2.0**-bits
    step = tuple(size * t.abs() * torch.randint(-3, 4, t.shape) for t in middle)
    if name in COUNTED:
        step = (step[0], torch.zeros_like(step[1]))
    # 24 bits and 2^-27 of them: the ends are exact
    old = tuple(t - d for t, d in zip(middle, step, strict=True))
    new = tuple(t + d for t, d in zip(middle, step, strict=True))
    there, back = family.kl(old, new).sum().item(), family.kl(new, old).sum().item()
    d = oracles.flatten(step)
    exact = (2 * d @ matrix(family, middle) @ (2 * d)).item()
    assert there + back == pytest.approx(exact, rel=100 * size**2 + 1e-12, abs=0)
    assert there == pytest.approx(exact / 2, rel=20 * size, abs=0)


@every
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own jvp
def test_kl_and_fisher_product_can_be_batched_and_differentiated_forward(name):
    family, old = parts(name, points(name, 5))
    _, new = parts(name, points(name, 5))
    d = tuple(torch.randn_like(t) for t in old)
    torch.testing.assert_close(
        torch.func.vmap(family.kl)(old, new), family.kl(old, new), rtol=1e-13, atol=0
    )

    def product(params, d):
        return family.fisher(params)(d)

    batched = torch.func.vmap(product)(old, d)
    for one, other in zip(batched, product(old, d), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    columns = torch.func.vmap(family.fisher(old))(tuple(torch.stack([t, 2 * t]) for t in d))
    for one, other in zip(columns, family.fisher(old)(d), strict=True):
        torch.testing.assert_close(one[1], 2 * other, rtol=1e-12, atol=1e-14)
    (_, forward) = torch.func.jvp(lambda *p: family.kl(old, p).sum(), new, d)
    grads = torch.func.grad(lambda p: family.kl(old, p).sum())(new)
    backward = sum((g * t).sum() for g, t in zip(grads, d, strict=True))
    torch.testing.assert_close(forward, backward, rtol=1e-10, atol=1e-12)


@given(st.sampled_from(list(CASES)), st.floats(0, 3), st.integers(0, 2**31), st.booleans())
def test_fisher_is_symmetric_and_semidefinite(name, scale, seed, single):
    torch.manual_seed(seed)
    x = points(name, 2, scale=scale)
    family, params = parts(name, x)
    F = matrix(family, params)
    largest = F.abs().max()
    torch.testing.assert_close(F, F.T, rtol=1e-11, atol=1e-13 * largest.item())
    D = F.diagonal().clamp(min=1e-300).rsqrt()  # a scale of its own for each parameter
    # Correlations of concentrations near 1 leave less than rounding of a variance.
    assert torch.linalg.eigvalsh((F + F.T) / 2 * D * D.unsqueeze(1))[0] >= -1e-12
    if single:
        low = tuple(t.float() for t in params)
        exact = matrix(family, tuple(t.double() for t in low))
        product = matrix(family, low)
        assert product.dtype == torch.float32
        room = 1e-5 * exact.abs().max().item()
        torch.testing.assert_close(product.double(), exact, rtol=1e-5, atol=room)


@given(st.sampled_from(list(CASES)), st.floats(-8, 1), st.integers(0, 2**31), st.booleans())
def test_kl_is_never_negative_and_zero_between_equals(name, log_size, seed, single):
    torch.manual_seed(seed)
    build = CASES[name][1]
    x = points(name, 3, scale=2.0)
    y = x + 10**log_size * points(name, 3)
    if single:
        x, y = x.float(), y.float()
    assert mean_kl(build(x), build(x)).item() == 0.0
    assert mean_kl(build(x), build(y)).item() >= 0.0


@every
def test_the_operator_and_its_root_have_one_slice_a_sample(name):
    build = CASES[name][1]
    x = points(name, 3).requires_grad_()
    F = FisherOperator(build(x), [x])
    R = F.root()
    v = torch.randn(x.numel(), dtype=torch.float64)
    torch.testing.assert_close(R.rmv(R.mv(v)), F @ v, rtol=1e-9, atol=1e-11)


def value(family, old, new):
    """KL of numbers."""

    def tensors(numbers):
        return tuple(torch.tensor([n], dtype=torch.float64) for n in numbers)

    return FAMILIES[family].kl(tensors(old), tensors(new)).item()


@pytest.mark.parametrize("far", [1e-10, 1e10])
@pytest.mark.parametrize("family", [td.Normal, td.Cauchy, td.Gumbel])
def test_scales_of_any_size(family, far):
    """A KL does not see the unit."""
    near = value(family, (0.0, 1.0), (1e-3, 1.001))
    assert value(family, (0.0, far), (1e-3 * far, 1.001 * far)) == pytest.approx(
        near, rel=1e-9, abs=0
    )
    small, large = min(far, 1.0), max(far, 1.0)
    assert value(family, (0.0, small), (0.0, large)) >= 20  # the log of the ratio, about
    assert not math.isnan(value(family, (0.0, large), (0.0, small)))


@pytest.mark.parametrize("family", [td.Beta, td.Gamma])
def test_large_concentrations_of_float32_leave_digits(family):
    """What all concentrations growing together change is a millionth of the entries of M."""
    params = torch.tensor([[1234567.1], [2345678.3]]).unbind()
    d = tuple(t * 1e-6 for t in params)
    exact = FAMILIES[family].fisher(tuple(t.double() for t in params))(tuple(t.double() for t in d))
    for one, other in zip(FAMILIES[family].fisher(params)(d), exact, strict=True):
        assert one.item() == pytest.approx(other.item(), rel=1e-6, abs=0)


def test_concentrations_of_any_size():
    # Leading terms: the log of a small one is exponential, a large one normal.
    assert value(td.Chi2, (1e-3,), (1.001e-3,)) == pytest.approx(1e-3 - math.log1p(1e-3), rel=1e-2)
    assert value(td.Chi2, (1e6,), (1e6 + 1,)) == pytest.approx(0.5e-6, rel=1e-5, abs=0)
    assert value(td.Beta, (1e-3, 1e6), (1e6, 1e-3)) > 1e6
    # with one mean, concentrated as a and as a (1 + e): e^2 / 4, that is the log of the spread
    assert value(td.Beta, (1e6, 1e6), (1.001e6, 1.001e6)) == pytest.approx(2.5e-7, rel=2e-3, abs=0)
    assert value(td.Gamma, (1e6, 1e6), (1.001e6, 1.001e6)) == pytest.approx(2.5e-7, rel=2e-3, abs=0)


@pytest.mark.parametrize("family", [td.Bernoulli, td.Geometric, td.Categorical])
def test_logits_of_any_size(family):
    for old, new in [(1e4, -1e4), (-1e4, 1e4), (1e4, 1e4 - 3), (-1e4, 3.0), (0.0, 1e4)]:
        pair = ((old, 0.0), (new, 0.0)) if family is td.Categorical else ((old,), (new,))
        kl = FAMILIES[family].kl(*[(torch.tensor(v, dtype=torch.float64),) for v in pair])
        assert not kl.isnan().any()
        assert (kl >= 0).all()


def test_certain_and_rare_outcomes_are_the_same():
    for size in (2.0**-20, 0.25, 3.0):
        rare = value(td.Bernoulli, (-40.0,), (-40.0 - size,))
        assert value(td.Bernoulli, (40.0,), (40.0 + size,)) == pytest.approx(rare, rel=1e-13, abs=0)


def test_logits_of_any_size_exactly():
    wide = [(torch.tensor(v, dtype=torch.float64),) for v in ([[1e4, 0.0]], [[-1e4, 0.0]])]
    assert FAMILIES[td.Categorical].kl(*wide).item() == 1e4
    assert value(td.Bernoulli, (1e4,), (-1e4,)) == 1e4
    assert value(td.Bernoulli, (0.0,), (1e4,)) == pytest.approx(5e3 - math.log(2))
    assert value(td.Bernoulli, (math.inf,), (0.0,)) == pytest.approx(math.log(2))
    assert value(td.Bernoulli, (math.inf,), (math.inf,)) == 0.0
    assert value(td.Bernoulli, (0.0,), (math.inf,)) == math.inf
    # successes so rare that the number of failures is exponential
    assert value(td.Geometric, (-1e4,), (-1e4 + 2,)) == pytest.approx(math.exp(2) - 3)
    assert value(td.NegativeBinomial, (1e4, 2.0), (1e4 - 2, 2.0)) == pytest.approx(
        2 * (math.exp(2) - 3)
    )


IMPOSSIBLE = {
    td.Normal: [(0.0, -1.0), (0.0, 0.0), (0.0, math.nan), (0.0, math.inf)],
    td.Cauchy: [(0.0, -1.0), (0.0, 0.0)],
    td.Gumbel: [(0.0, -1.0), (0.0, 0.0)],
    td.HalfNormal: [(-1.0,), (0.0,)],
    td.HalfCauchy: [(-1.0,), (0.0,)],
    td.Exponential: [(-1.0,), (0.0,), (math.inf,)],
    td.Poisson: [(-1.0,), (math.inf,), (math.nan,)],
    td.Gamma: [(-1.0, 1.0), (1.0, 0.0)],
    td.InverseGamma: [(-1.0, 1.0), (1.0, 0.0)],
    td.Weibull: [(-1.0, 1.0), (1.0, 0.0), (math.nan, 1.0)],
    td.Chi2: [(-1.0,), (0.0,)],
    td.Beta: [(-1.0, 1.0), (1.0, 0.0)],
    td.Binomial: [(0.0, 3.0)],
    td.NegativeBinomial: [(0.0, 3.0)],
}


@pytest.mark.parametrize("family", list(IMPOSSIBLE))
def test_impossible_parameters_are_infinitely_far(family):
    possible = {1: (1.0,), 2: (1.0, 1.0)}[len(IMPOSSIBLE[family][0])]
    for new in IMPOSSIBLE[family]:
        assert value(family, possible, new) == math.inf
        assert value(family, new, possible) == math.inf
    assert value(family, possible, possible) == 0.0


def test_no_kl_is_nan_at_the_limits_of_float64():
    assert value(td.Normal, (0.0, 1e200), (0.0, 1e-200)) == math.inf
    assert value(td.Gumbel, (0.0, 1.0), (1e300, 1e-300)) == math.inf
    assert value(td.Exponential, (1e-200,), (1e200,)) == math.inf
    assert value(td.Gamma, (1.0, 1e-200), (1.0, 1e200)) == math.inf


def test_what_is_above_the_diagonal_of_a_scale_tril_is_not_read():
    params = [(torch.zeros(1, 3).double(), torch.rand(1, 3, 3).double() + 1) for _ in "ab"]
    lower = [(mean, root.tril()) for mean, root in params]
    kl = FAMILIES[td.MultivariateNormal].kl
    assert torch.equal(kl(*params), kl(*lower))


def test_impossible_matrices_are_infinitely_far():
    old = (torch.zeros(1, 2), torch.ones(1, 2, 1), torch.ones(1, 2))
    old = tuple(t.double() for t in old)
    for diagonal in ([1.0, -1.0], [1.0, 0.0], [-9.0, math.nan]):
        new = (*old[:2], torch.tensor([diagonal], dtype=torch.float64))
        assert FAMILIES[td.LowRankMultivariateNormal].kl(old, new).item() == math.inf
    for factor in (1e200, math.nan):
        new = (old[0], torch.full_like(old[1], factor), old[2])
        assert FAMILIES[td.LowRankMultivariateNormal].kl(old, new).item() == math.inf
    concentration = (torch.tensor([[1.0, -1.0, 2.0]], dtype=torch.float64),)
    assert FAMILIES[td.Dirichlet].kl((concentration[0].abs(),), concentration).item() == math.inf


def test_a_poisson_that_is_almost_surely_zero():
    assert value(td.Poisson, (0.0,), (0.0,)) == 0.0
    assert value(td.Poisson, (0.0,), (2.0,)) == 2.0
    assert value(td.Poisson, (2.0,), (0.0,)) == math.inf


def test_no_trial_and_no_count_say_nothing():
    assert value(td.Binomial, (0.0, 0.0), (math.inf, 0.0)) == 0.0


@pytest.mark.parametrize("cls", [td.Binomial, td.NegativeBinomial])
def test_a_trained_count_is_refused(cls):
    count = torch.tensor([3.0], requires_grad=True)
    with pytest.raises(TypeError, match=r"total_count requires a gradient.*MonteCarloFisher"):
        mean_kl(cls(count, logits=torch.zeros(1)), cls(count, logits=torch.zeros(1)))


def test_masked_actions_of_a_joint_of_categoricals():
    masked = torch.tensor([[0.5, -math.inf, 0.0]], dtype=torch.float64)
    free = torch.tensor([[0.5, 1.0]], dtype=torch.float64)

    def policy(first, second):
        return td.Categorical(logits=first), td.Categorical(logits=second)

    old, new = policy(masked, free), policy(masked * 2, free + torch.tensor([[1.0, 0.0]]))
    split_kl = mean_kl(old[0], new[0]) + mean_kl(old[1], new[1])
    torch.testing.assert_close(mean_kl(old, new), split_kl, rtol=1e-14, atol=0)
    unmasked = torch.tensor([[0.5, -3.0, 0.0]], dtype=torch.float64)
    kl = mean_kl(td.Categorical(logits=masked), td.Categorical(logits=unmasked)).item()
    rest = math.exp(0.5) + 1
    assert kl == pytest.approx(math.log((rest + math.exp(-3)) / rest), rel=1e-13)
