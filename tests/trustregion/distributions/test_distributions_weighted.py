"""Laws of weights: sample weights, counts, and masks over padded batches."""

import math

import pytest
import torch
from torch import distributions as td

import oracles
from trustregion import (
    Family,
    FisherOperator,
    KLHessianOperator,
    NaturalTrustRegion,
    Status,
    mean_kl,
    register_distribution,
    to_dense,
)
from trustregion.distributions import Weighted, joint_of
from trustregion.distributions import registry as module

one = torch.ones(2)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(module, "_FAMILIES", dict(module._FAMILIES))


def policy(x):
    """Two factors with further dimensions, from (N, T, 5)."""
    return {
        "a": td.Independent(td.Normal(x[..., :2], x[..., 2:4].exp()), 1),
        "b": [td.Categorical(logits=torch.stack([x[..., 4], -x[..., 4]], -1))],
    }


WEIGHTS = {
    "mask": torch.tensor([True, False, True, True]),
    "real": torch.tensor([0.5, 0.0, 2.0, 1.0]),
    "counts": torch.tensor([1, 0, 3, 1]),
    "steps": torch.tensor([[True, True, False]] * 2 + [[True, False, False]] * 2),
}


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_weights_make_weighted_means(name):
    weights = WEIGHTS[name]
    x, y = (torch.randn(4, 3, 5, dtype=torch.float64) for _ in range(2))
    expected_kl, expected_F = 0.0, torch.zeros(60, 60, dtype=torch.float64)
    for index in weights.nonzero().tolist():
        i = tuple(slice(k, k + 1) for k in index)
        w = weights[tuple(index)].double()
        expected_kl += (
            w
            * oracles.kl(policy(x[i].flatten(0, -2)), policy(y[i].flatten(0, -2)))
            * x[i].shape[:-1].numel()
        )
        z = x.clone().requires_grad_()
        F = FisherOperator(policy(z[i].flatten(0, -2)), [z])
        expected_F += w * F.batch_size * to_dense(F)
    total = weights.double().sum()
    old, new = Weighted(policy(x), weights), Weighted(policy(y), weights)
    torch.testing.assert_close(mean_kl(old, new), expected_kl / total, rtol=1e-12, atol=0)
    joint = joint_of(old)
    assert joint.total == total.item()
    assert joint.batch_size == 4
    z = x.clone().requires_grad_()
    joint = joint_of(Weighted(policy(z), weights))
    (J,) = torch.autograd.functional.jacobian(
        lambda z: oracles.flatten(joint_of(policy(z)).flat_parameters()), (x,)
    )
    J = J.flatten(1)
    columns = [
        oracles.flatten(joint.fisher()(tuple(oracles.unflatten(c, joint.flat_parameters()))))
        for c in J.T
    ]
    F = J.T @ torch.stack(columns, 1) / joint.total
    torch.testing.assert_close(F, expected_F / total, rtol=1e-12, atol=1e-14)


def test_equal_weights_change_nothing_and_their_scale_does_not_either():
    x, y = torch.randn(2, 4, 3, dtype=torch.float64).unbind()
    plain = mean_kl(td.Normal(x, 1.0), td.Normal(y, 1.0))
    for weights in (torch.ones(4), torch.full((4,), 0.125), torch.ones(4, dtype=torch.bool)):
        value = mean_kl(*(Weighted(td.Normal(t, 1.0), weights) for t in (x, y)))
        torch.testing.assert_close(value, plain, rtol=1e-15, atol=0)
    weights = torch.tensor([0.3, 0.1, 2.0, 0.7])
    one_scale, other = (
        mean_kl(*(Weighted(td.Normal(t, 1.0), scale * weights) for t in (x, y)))
        for scale in (1.0, 2.0**40)
    )
    assert torch.equal(one_scale, other)


@pytest.mark.parametrize("padding", [math.nan, math.inf, -1.0, 0.0])
def test_padding_adds_exactly_nothing(padding):
    mask = torch.tensor([1.0, 0.0, 1.0])

    def build(x, mask):
        return Weighted(td.Gamma(x, x + 1, validate_args=False), mask)

    x = torch.tensor([1.0, padding, 2.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1.5, padding, 3.0], dtype=torch.float64)
    some = torch.tensor([0, 2])
    kl = mean_kl(build(y, mask), build(x, mask))
    reference = mean_kl(build(y[some], mask[some]), build(x[some], mask[some]))
    assert kl.item() == reference.item()
    (grad,) = torch.autograd.grad(kl, x)
    assert grad[1] == 0
    assert grad.isfinite().all()
    out = joint_of(build(x, mask)).fisher()((torch.full((3,), math.nan),) * 2)
    assert all(t[1] == 0 for t in out)
    out = joint_of(build(x, mask)).fisher()((torch.ones(3).double(), torch.ones(3).double()))
    few = joint_of(build(x[some], mask[some])).fisher()((torch.ones(2).double(),) * 2)
    for t, u in zip(out, few, strict=True):
        assert torch.equal(t[some], u)
        assert t[1] == 0


def test_finite_padding_is_no_part_of_a_product_and_its_outputs_may_overflow():
    """Zero times a finite derivative: an output of 1e30 squares to infinity in the metric."""
    x = torch.tensor([1.0, 2.0, 1e30])
    w = torch.ones(1, requires_grad=True)
    mask = torch.tensor([True, True, False])
    padded = FisherOperator(Weighted(td.Normal(x * w, (x * w).abs()), mask), [w], backend="tape")
    few = FisherOperator(td.Normal(x[:2] * w, (x[:2] * w).abs()), [w])
    assert torch.equal(padded @ torch.ones(1), few @ torch.ones(1))


def test_weights_are_constants_and_copied():
    weights = torch.ones(2, dtype=torch.float64, requires_grad=True)
    joint = joint_of(Weighted(td.Normal(torch.zeros(2), 1.0), weights))
    assert not joint.weights.requires_grad
    with torch.no_grad():
        weights.fill_(3.0)
    assert joint.weights.tolist() == [1.0, 1.0]
    assert joint.frozen().weights.tolist() == [1.0, 1.0]
    assert joint.weights.dtype == torch.float64


def test_the_weighted_fisher_keeps_the_dtype():
    joint = joint_of(Weighted(td.Normal(torch.zeros(2), 1.0), torch.tensor([0.0, 3.0])))
    (loc, scale) = joint.fisher()((torch.ones(2), torch.ones(2)))
    assert loc.tolist() == [0.0, 3.0]
    assert scale.tolist() == [0.0, 6.0]
    assert loc.dtype == scale.dtype == torch.float32


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (torch.tensor([1.0, math.nan, 1.0]), "finite, got NaN or infinity"),
        (torch.tensor([1.0, math.inf, 1.0]), "finite, got NaN or infinity"),
        (torch.tensor([1.0, -0.5, 1.0]), "not be negative, got -0.5"),
        (torch.zeros(3), "sum of weights must be positive and finite, got 0.0"),
        (torch.zeros(3, dtype=torch.bool), "skip a batch that is all padding"),
        (torch.full((3,), 1e308, dtype=torch.float64), "positive and finite, got inf"),
        (torch.ones(4), r"got weights of shape \(4,\) for Normal with batch shape \(3, 2\)"),
        (torch.ones(3, 1), r"shape \(3, 1\)"),
        (torch.ones(3, 2, 1), r"shape \(3, 2, 1\)"),
        (torch.tensor(1.0), r"shape \(\)"),
        (torch.ones(3, dtype=torch.complex64), "real or bool tensor, got torch.complex64"),
        ([1.0, 1.0, 1.0], "real or bool tensor, got list"),
    ],
)
def test_wrong_weights_are_refused_in_words(weights, words):
    with pytest.raises(ValueError, match=words):
        joint_of(Weighted(td.Normal(torch.zeros(3, 2), 1.0), weights))


def test_weights_must_fit_every_factor():
    parts = {"a": td.Normal(torch.zeros(3, 2), 1.0), "b": td.Bernoulli(logits=torch.zeros(3))}
    joint_of(Weighted(parts, torch.ones(3)))
    with pytest.raises(ValueError, match=r"shape \(3, 2\) for \['b'\]Bernoulli"):
        joint_of(Weighted(parts, torch.ones(3, 2)))
    unbatched = td.Independent(td.Normal(torch.zeros(3), 1.0), 1)
    with pytest.raises(ValueError, match=r"batch shape \(\)"):
        joint_of(Weighted(unbatched, torch.ones(3)))


@pytest.mark.usefixtures("registry")
def test_weights_need_parameters_for_each_sample():
    family = Family(
        lambda d: (d.rate[:1],), lambda old, new: old[0] - new[0], lambda _: lambda d: d
    )
    register_distribution(td.Poisson, family)
    with pytest.raises(ValueError, match=r"batch shape in front, got the shapes \[\(1,\)\]"):
        joint_of(Weighted(td.Poisson(torch.ones(3)), torch.ones(3)))


def test_both_predictions_carry_the_same_weights():
    normal = td.Normal(torch.zeros(3), 1.0)
    mask = torch.tensor([True, True, False])
    for pair in [(Weighted(normal, mask), normal), (normal, Weighted(normal, mask))]:
        with pytest.raises(ValueError, match="is Weighted and the other is not"):
            mean_kl(*pair)
    with pytest.raises(ValueError, match="differ in their weights"):
        mean_kl(Weighted(normal, mask), Weighted(normal, ~mask))
    assert mean_kl(Weighted(normal, mask), Weighted(normal, mask.double())).item() == 0.0


def test_weights_go_around_the_whole_prediction():
    normal = td.Normal(torch.zeros(3), 1.0)
    for inner in ({"a": Weighted(normal, one)}, Weighted(Weighted(normal, one), one)):
        with pytest.raises(TypeError, match="Weighted goes around a whole prediction"):
            joint_of(inner)


def test_the_operator_its_root_and_the_kl_hessian_take_weights():
    weights = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 1.0]])
    x = torch.randn(3, 3, 2, dtype=torch.float64)
    W = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    F = FisherOperator(Weighted(td.Categorical(logits=x @ W), weights), [W])
    rows = weights.nonzero(as_tuple=True)
    parts = [FisherOperator(td.Categorical(logits=y @ W), [W]) for y in x[rows].unsqueeze(1)]
    pairs = zip(weights[rows].double(), parts, strict=True)
    expected = sum(w * to_dense(part) for w, part in pairs) / weights.sum().double()
    torch.testing.assert_close(to_dense(F), expected, rtol=1e-12, atol=1e-14)
    R = F.root()
    v = torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(R.rmv(R.mv(v)), F @ v, rtol=1e-10, atol=1e-12)
    H = KLHessianOperator(Weighted(td.Categorical(logits=x @ W), weights), [W])
    torch.testing.assert_close(to_dense(H), expected, rtol=1e-9, atol=1e-12)


def test_weights_under_vmap():
    weights = torch.tensor([1.0, 0.0, 3.0])

    def kl_and_product(x, y, d):
        old, new = (joint_of(Weighted(td.Normal(t, 1.0, False), weights)) for t in (x, y))
        return old.mean_kl(new), old.fisher()((d, d))[0]

    x, y, d = torch.randn(3, 4, 3, dtype=torch.float64).unbind()
    batched = torch.func.vmap(kl_and_product)(x, y, d)
    looped = [kl_and_product(*row) for row in zip(x, y, d, strict=True)]
    for one, other in zip(batched, map(torch.stack, zip(*looped, strict=True)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=0)


def test_a_step_on_a_padded_batch_is_the_step_on_the_batch():
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(0, 2, (6,))
    mask = torch.tensor([True, True, False, True, False, True])
    infos, weights = [], []
    for padded in (True, False):
        W = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
        optimizer = NaturalTrustRegion([W], delta=0.01)
        inputs, labels = (x, y) if padded else (x[mask], y[mask])

        def closure(W=W, inputs=inputs, labels=labels, padded=padded):
            prediction = td.Categorical(logits=inputs @ W)
            losses = -prediction.log_prob(labels)
            if padded:
                return losses[mask].mean(), Weighted(prediction, mask)
            return losses.mean(), prediction

        optimizer.step(closure)
        infos.append(optimizer.info)
        weights.append(W.detach())
    assert infos[0].status is Status.ACCEPTED
    assert infos[0].kl == pytest.approx(infos[1].kl, rel=1e-9)
    torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-12)
