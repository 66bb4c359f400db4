import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as td

import oracles
from trustregion import Family, FisherOperator, mean_kl, register_distribution, to_dense
from trustregion.distributions import joint_of
from trustregion.distributions import registry as module


def pairs():
    """Old and new members of each family, in float64, over a batch of 6."""

    def t(*shape):
        return torch.randn(6, *shape, dtype=torch.float64)

    def tril():
        raw = t(3, 3)
        return raw.tril(-1) + torch.diag_embed(raw.diagonal(dim1=-2, dim2=-1).exp())

    return {
        "Categorical": [td.Categorical(logits=t(4)) for _ in range(2)],
        "Categorical from probs": [td.Categorical(probs=t(4).softmax(-1)) for _ in range(2)],
        "Bernoulli": [td.Bernoulli(logits=t(3)) for _ in range(2)],
        "Normal": [td.Normal(t(2), t(2).exp()) for _ in range(2)],
        "Independent": [td.Independent(td.Normal(t(2, 2), t(2, 2).exp()), 2) for _ in range(2)],
        "MultivariateNormal": [td.MultivariateNormal(t(3), scale_tril=tril()) for _ in range(2)],
        "joint": [{"a": td.Normal(t(), t().exp()), "b": [td.Bernoulli(logits=t(2))]} for _ in "ab"],
    }


@pytest.mark.parametrize("name", list(pairs()))
def test_mean_kl_agrees_with_torch(name):
    old, new = pairs()[name]
    torch.testing.assert_close(mean_kl(old, new), oracles.kl(old, new), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", list(pairs()))
def test_kl_of_a_distribution_to_itself_is_exactly_zero(name):
    old, _ = pairs()[name]
    assert mean_kl(old, old).item() == 0.0


@given(st.floats(-7, 0), st.integers(0, 2**31))
def test_tiny_kls_of_float32_distributions_are_accurate(log_size, seed):
    """Against the quadratic form d'Md/2, which a KL equals to third order."""
    g = torch.Generator().manual_seed(seed)
    size = 10**log_size
    mu, sigma = torch.randn(50, generator=g), torch.rand(50, generator=g) + 0.5
    new_mu, new_sigma = mu + size * 0.1, sigma * (1 + size * 0.1)
    d_mu, d_sigma = (new_mu.double() - mu.double()), (new_sigma.double() - sigma.double())
    quadratic = (d_mu**2 / 2 + d_sigma**2) / sigma.double() ** 2
    kl = mean_kl(td.Normal(mu, sigma), td.Normal(new_mu, new_sigma)).item()
    # 0.5 * size: the cubic term; float32 arithmetic would be off by far more below 1e-3
    assert kl == pytest.approx(quadratic.mean().item(), rel=0.5 * size + 1e-9)


def test_kl_of_float32_logits_is_never_negative():
    for size in (1e-3, 1e-5, 1e-7):
        logits = torch.randn(500, 6)
        old = td.Categorical(logits=logits)
        new = td.Categorical(logits=logits + size * torch.randn(500, 6))
        assert mean_kl(old, new) >= 0


def test_masked_actions_contribute_nothing_and_stay_differentiable():
    logits = torch.tensor([[0.0, 1.0, -math.inf]], requires_grad=True)
    old = td.Categorical(logits=torch.tensor([[1.0, 0.0, -math.inf]]), validate_args=False)
    kl = mean_kl(old, td.Categorical(logits=logits, validate_args=False))
    reference = mean_kl(
        td.Categorical(logits=torch.tensor([[1.0, 0.0]])),
        td.Categorical(logits=torch.tensor([[0.0, 1.0]])),
    )
    torch.testing.assert_close(kl, reference)
    (grad,) = torch.autograd.grad(kl, logits)
    assert grad.isfinite().all()
    reverse = mean_kl(td.Categorical(logits=logits, validate_args=False), old)
    (grad,) = torch.autograd.grad(reverse, logits)
    assert grad.isfinite().all()


def test_support_that_vanishes_gives_an_infinite_kl():
    old = td.Categorical(logits=torch.zeros(1, 2))
    new = td.Categorical(logits=torch.tensor([[0.0, -math.inf]]), validate_args=False)
    assert mean_kl(old, new).item() == math.inf


def test_a_scale_that_is_not_positive_is_infinitely_far():
    old = td.Normal(torch.zeros(2), torch.ones(2))
    for scale in (-1.0, 0.0):
        new = td.Normal(torch.zeros(2), torch.tensor([1.0, scale]), validate_args=False)
        assert mean_kl(old, new).item() == math.inf
    tril = torch.eye(2).expand(3, 2, 2)
    old = td.MultivariateNormal(torch.zeros(3, 2), scale_tril=tril)
    new = td.MultivariateNormal(torch.zeros(3, 2), scale_tril=-tril, validate_args=False)
    assert mean_kl(old, new).item() == math.inf


def test_dimensions_are_summed_and_the_batch_is_averaged():
    def normal(shift):
        return td.Normal(torch.full((5, 3), shift), torch.ones(5, 3))

    plain = mean_kl(normal(0.0), normal(0.2))
    grouped = mean_kl(td.Independent(normal(0.0), 1), td.Independent(normal(0.2), 1))
    assert plain.item() == grouped.item() == pytest.approx(3 * 0.02)


def test_an_unbatched_distribution_is_a_batch_of_one():
    old = td.Independent(td.Normal(torch.zeros(3), torch.ones(3)), 1)
    new = td.Independent(td.Normal(torch.full((3,), 0.2), torch.ones(3)), 1)
    assert mean_kl(old, new).item() == pytest.approx(3 * 0.02)


one = torch.ones(2)
mixture = td.MixtureSameFamily(
    td.Categorical(logits=torch.ones(2, 3)), td.Normal(torch.ones(2, 3), 1.0)
)
NO_KL = [
    td.Laplace(one, one),
    td.Independent(td.Laplace(one, one), 1),
    td.ContinuousBernoulli(logits=one),
    td.FisherSnedecor(one, one),
    td.Kumaraswamy(one, one),
    td.LKJCholesky(3, one),
    mixture,
    td.RelaxedBernoulli(one[0], logits=one),
    td.RelaxedOneHotCategorical(one[0], logits=one),
    td.StudentT(one),
    td.VonMises(one, one),
    td.Wishart(one + 3, torch.eye(2).expand(2, 2, 2)),
    td.TransformedDistribution(td.StudentT(one), [td.TanhTransform()]),
]
NO_FISHER = [
    td.Uniform(0 * one, one),
    td.Pareto(one, one),
    td.GeneralizedPareto(one, one, one),
]


@pytest.mark.parametrize("distribution", NO_KL + NO_FISHER, ids=lambda d: type(d).__name__)
def test_what_has_no_right_metric_is_refused_with_the_reason_and_the_way_out(distribution):
    with pytest.raises(TypeError, match=r"refused.*: .*register_distribution") as caught:
        mean_kl(distribution, distribution)
    works = "MonteCarloFisherOperator and EmpiricalFisherOperator" in str(caught.value)
    assert works == (distribution not in NO_FISHER)


class Own(td.Distribution):
    """Not a family that the package knows."""

    def __init__(self):
        super().__init__(torch.Size([2]), validate_args=False)


class OwnTransformed(td.TransformedDistribution):
    """Could have parameters in what it overrides."""


def test_an_unknown_family_is_refused_by_name():
    with pytest.raises(TypeError, match=r"Own has no registered KL.*register_distribution"):
        mean_kl(Own(), Own())
    distribution = OwnTransformed(td.Normal(one, one), [td.TanhTransform()])
    with pytest.raises(TypeError, match=r"OwnTransformed is refused.*invisible to the KL"):
        mean_kl(distribution, distribution)


def transformed(*transforms, base=None):
    base = td.Normal(torch.zeros(2), torch.ones(2)) if base is None else base
    return td.TransformedDistribution(base, list(transforms))


def affine(scale):
    return td.AffineTransform(torch.zeros(2), scale)


trained = torch.ones(2, requires_grad=True)


class OwnTransform(td.TanhTransform):
    """Could do anything."""


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (affine(trained), "through AffineTransform whose scale requires a gradient"),
        (td.ComposeTransform([affine(trained), td.TanhTransform()]), "scale requires a gradient"),
        (affine(trained).inv, r"through AffineTransform.inv whose scale requires a gradient"),
        (td.PowerTransform(trained), "exponent requires a gradient"),
        (td.AbsTransform(), "through AbsTransform is refused.*one to one.*MonteCarloFisher"),
        (td.SoftmaxTransform(), "through SoftmaxTransform is refused"),
        (td.CumulativeDistributionTransform(td.Normal(0.0, 1.0)), "CumulativeDistribution"),
        (td.StackTransform([td.TanhTransform()] * 2), "StackTransform"),
        (td.IndependentTransform(td.AbsTransform(), 1), "AbsTransform"),
        (OwnTransform(), "through OwnTransform is refused"),
        (OwnTransform().inv, "is refused.*one to one"),
    ],
)
def test_transforms_that_may_carry_parameters_are_refused(transform, words):
    distribution = transformed(transform)
    with pytest.raises(TypeError, match=words):
        mean_kl(distribution, distribution)


def test_transforms_without_parameters_leave_the_kl_alone():
    new = td.Normal(torch.ones(2), torch.full((2,), 2.0))
    base = mean_kl(td.Normal(torch.zeros(2), one), new)
    transforms = [
        [td.TanhTransform()],
        [td.TanhTransform(), affine(torch.full((2,), 2.0))],
        [td.ExpTransform().inv, td.SoftplusTransform()],
        [affine(one).inv],
        [],
    ]
    for parts in transforms:
        assert torch.equal(mean_kl(transformed(*parts), transformed(*parts, base=new)), base)
    event = [
        [td.IndependentTransform(td.SigmoidTransform(), 1)],
        [affine(one), td.ReshapeTransform((2,), (1, 2))],
    ]
    for parts in event:  # the two are one sample then
        kl = mean_kl(transformed(*parts), transformed(*parts, base=new))
        assert torch.equal(kl, 2 * base)
    nested = [
        transformed(td.ExpTransform(), base=transformed(td.TanhTransform(), base=d))
        for d in (td.Normal(torch.zeros(2), one), new)
    ]
    assert torch.equal(mean_kl(*nested), base)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ([td.TanhTransform()], [td.SigmoidTransform()], "structure.*TanhTransform.*against"),
        ([td.TanhTransform()], [td.TanhTransform().inv], "structure"),
        ([td.TanhTransform()], [td.TanhTransform()] * 2, "structure"),
        ([affine(one)], [affine(2 * one)], "constants of the transforms of Transformed"),
        ([affine(one)], [td.AffineTransform(0.0, 1.0)], "constants"),
        ([td.PowerTransform(one)], [td.PowerTransform(2 * one)], "constants"),
    ],
)
def test_different_transforms_are_refused(old, new, words):
    with pytest.raises(ValueError, match=words):
        mean_kl(transformed(*old), transformed(*new))


def test_constants_of_transforms_are_kept_as_they_were():
    scale = torch.ones(2, dtype=torch.float64)
    old = joint_of(transformed(affine(scale))).frozen()
    scale.fill_(3.0)
    with pytest.raises(ValueError, match="constants"):
        old.mean_kl(joint_of(transformed(affine(scale))))


def test_families_inside_wrappers_must_agree():
    normal = td.Independent(td.Normal(torch.zeros(3, 2), 1.0), 1)
    for other in (td.Cauchy, td.LogNormal):
        with pytest.raises(ValueError, match=r"structure: \(Independent\(Normal\)"):
            mean_kl(normal, td.Independent(other(torch.zeros(3, 2), torch.ones(3, 2)), 1))


class MyNormal(td.Normal):
    """A subclass, which could have changed log_prob."""


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(module, "_FAMILIES", dict(module._FAMILIES))


@pytest.mark.usefixtures("registry")
def test_a_subclass_must_be_declared_and_can_be():
    distribution = MyNormal(torch.zeros(2), torch.ones(2))
    with pytest.raises(TypeError, match="like=Normal"):
        mean_kl(distribution, distribution)
    register_distribution(MyNormal, like=td.Normal)
    assert mean_kl(distribution, MyNormal(one, one)).item() == 0.5


@pytest.mark.usefixtures("registry")
def test_a_registered_family_works_in_the_operator():
    """Poisson by its log-rate: M = rate; KL = r0 (log r0 - log r1) - r0 + r1."""
    family = Family(
        lambda d: (d.rate.log(),),
        lambda old, new: old[0].exp() * (old[0] - new[0]) - old[0].exp() + new[0].exp(),
        lambda p: lambda d: (p[0].exp() * d[0],),
    )
    register_distribution(td.Poisson, family)
    log_rate = torch.tensor([0.3, 1.0], dtype=torch.float64, requires_grad=True)
    new = td.Poisson(torch.tensor([2.0, 1.0], dtype=torch.float64))
    old = td.Poisson(log_rate.exp())
    torch.testing.assert_close(mean_kl(old, new), oracles.kl(old, new))
    product = FisherOperator(old, [log_rate]) @ torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(product, log_rate.exp() / 2)


def test_parameters_that_depend_on_other_tensors_are_held_fixed():
    """Gamma couples its two parameters in M; only the first one moves with the model here."""
    w = torch.tensor([0.3, 0.5], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([1.5, 2.5], dtype=torch.float64, requires_grad=True)
    F = FisherOperator(td.Gamma(w.exp(), other * 2), [w])
    expected = oracles.kl_hessian(lambda p: td.Gamma(p[0].exp(), other.detach() * 2), [w])
    # 1e-8: torch's trigamma is exact to 1e-9 only
    torch.testing.assert_close(to_dense(F), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((int, Family), TypeError),
        ((td.Poisson, "no family"), TypeError),
        ((td.Poisson,), ValueError),
    ],
)
def test_wrong_registrations_are_refused(arguments, error):
    with pytest.raises(error):
        register_distribution(*arguments)
    with pytest.raises(ValueError, match="not a registered family"):
        register_distribution(td.Poisson, like=td.StudentT)


@pytest.mark.parametrize(
    ("old", "new", "error", "words"),
    [
        (torch.ones(3), torch.ones(3), TypeError, "got a tensor"),
        ({"a": 3}, {"a": 3}, TypeError, r"int at \['a'\]"),
        ({}, {}, ValueError, "empty"),
        (
            td.Normal(torch.ones(0), torch.ones(0)),
            td.Normal(torch.ones(0), torch.ones(0)),
            ValueError,
            "empty batch",
        ),
        (td.Normal(one, one), td.Bernoulli(logits=one), ValueError, "differ in structure"),
        (
            td.Normal(torch.ones(3), 1.0),
            td.Normal(torch.ones(4), 1.0),
            ValueError,
            "differ in structure",
        ),
        (
            [td.Bernoulli(logits=torch.ones(3)), td.Bernoulli(logits=torch.ones(4))],
            [td.Bernoulli(logits=torch.ones(3)), td.Bernoulli(logits=torch.ones(4))],
            ValueError,
            "one batch",
        ),
    ],
)
def test_wrong_predictions_are_refused_in_words(old, new, error, words):
    with pytest.raises(error, match=words):
        mean_kl(old, new)
