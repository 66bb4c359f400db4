"""Kronecker factors: against loops over samples, and as a preconditioner."""

import copy
import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as td
from torch import nn

import oracles
from cases import cases
from strategies import DTYPES
from trustregion import FisherOperator, Identity, Status, cg, to_dense
from trustregion.distributions import Weighted
from trustregion.linearise import linearise
from trustregion.operators import FunctionOperator, check_symmetric
from trustregion.operators.gauss_newton import GaussNewtonOperator
from trustregion.operators.ggn import GGNOperator
from trustregion.operators.sampled import MonteCarloFisherOperator
from trustregion.preconditioners.kfac import KFAC
from trustregion.preconditioners.kronecker import KroneckerBlock, KroneckerInverse
from trustregion.preconditioners.output_noise import cotangents
from trustregion.vector import ParameterVector

each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def normal(y, scale=0.5):
    return td.Normal(y, torch.full_like(y, scale))


def fisher(model, x, family=normal):
    return FisherOperator(family(model(x)), model.parameters())


def solve_dense(F, damping):
    n = F.shape[0]
    return torch.linalg.inv(to_dense(F).double() + damping * torch.eye(n, dtype=torch.float64))


def factors_of(kfac):
    blocks = kfac.state["blocks"]
    return [(blocks[weight]["A"], blocks[weight]["G"]) for weight in sorted(blocks)]


def curvature(M, damping):
    """The approximation that M inverts."""
    inverse = to_dense(M).double()
    return torch.linalg.inv(inverse) - damping * torch.eye(len(inverse), dtype=torch.float64)


class Twice(nn.Module):
    """A layer that runs twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Gaussian(nn.Module):
    """A policy with scales that do not depend on the state."""

    def __init__(self, *sizes):
        super().__init__()
        self.log_std = nn.Parameter(torch.linspace(-1, 1, sizes[-1]))
        self.net = mlp(*sizes)

    def forward(self, x):
        return td.Independent(td.Normal(self.net(x), self.log_std.exp()), 1)


def mlp(*sizes, activation=nn.Tanh):
    layers = []
    for i in range(len(sizes) - 1):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), activation()]
    return nn.Sequential(*layers[:-1])


EXACT = {
    "linear": (lambda: nn.Linear(3, 2), (20, 3)),
    "without a bias": (lambda: nn.Linear(3, 2, bias=False), (20, 3)),
    "one input a sample": (lambda: nn.Linear(3, 2), (1, 3)),
    "positions": (lambda: nn.Linear(3, 2), (20, 5, 3)),
    "positions without a bias": (lambda: nn.Linear(3, 2, bias=False), (20, 5, 3)),
    "four dimensions": (lambda: nn.Linear(3, 2), (6, 2, 2, 3)),
    "convolution": (lambda: nn.Conv2d(2, 3, 2), (10, 2, 4, 4)),
    "convolution without a bias": (lambda: nn.Conv2d(2, 3, 2, bias=False), (10, 2, 4, 4)),
    "convolution with a stride": (
        lambda: nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=1, dilation=(1, 2)),
        (10, 2, 5, 6),
    ),
    "circular convolution": (
        lambda: nn.Conv2d(1, 2, 3, padding="same", padding_mode="circular"),
        (10, 1, 4, 4),
    ),
}


@each_dtype
@pytest.mark.parametrize("name", list(EXACT))
def test_it_is_the_inverse_for_one_layer_with_a_constant_metric(name, dtype):
    make, shape = EXACT[name]
    model, x = make().to(dtype), torch.randn(shape, dtype=dtype)
    F = fisher(model, x)
    M = KFAC(model, samples="exact").build(F, 0.1)
    exact = solve_dense(F, 0.1)
    # condition of F + 0.1 I times the rounding of products and factors
    rtol = 1000 * torch.finfo(dtype).eps
    torch.testing.assert_close(to_dense(M).double(), exact, rtol=rtol, atol=rtol * exact.max())
    b = torch.randn(F.shape[0], dtype=dtype)
    solution = cg(F + 0.1 * Identity(len(b), dtype), b, M=M, rtol=1e-5)
    assert (solution.status, solution.iterations) == (Status.CONVERGED, 1)


def test_inputs_that_are_not_contiguous_keep_their_bias():
    model = nn.Linear(3, 2).double()
    x = torch.randn(4, 20, 3, dtype=torch.float64).transpose(0, 1)
    F = fisher(model, x)
    M = KFAC(model, samples="exact").build(F, 0.1)
    torch.testing.assert_close(to_dense(M), solve_dense(F, 0.1))


FAMILIES = {
    "normal": normal,
    "normal with a learned scale": lambda y: td.Normal(y[..., :2], y[..., 2:].exp()),
    "categorical": lambda y: td.Categorical(logits=y),
    "bernoulli": lambda y: td.Bernoulli(logits=y),
    "multivariate normal": lambda y: td.MultivariateNormal(
        y[..., :2], scale_tril=torch.diag_embed(y[..., 2:].exp()) + torch.ones(2, 2).tril(-1).to(y)
    ),
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_factors_are_those_of_a_loop_over_samples(family):
    model = mlp(3, 5, 4, 4).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    kfac = KFAC(model, samples="exact")
    kfac.build(fisher(model, x, FAMILIES[family]), 0.1)
    expected = oracles.kronecker_factors(model, FAMILIES[family], x)
    for found, wanted in zip(factors_of(kfac), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_factors_at_several_positions_are_those_of_a_loop():
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(5, 3, 2, dtype=torch.float64)
    kfac = KFAC(model, samples="exact")
    kfac.build(fisher(model, x, FAMILIES["categorical"]), 0.1)
    expected = oracles.kronecker_factors(model, FAMILIES["categorical"], x)
    for found, wanted in zip(factors_of(kfac), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_drawn_factors_are_right_on_average(family):
    model = mlp(3, 4, 4).double()
    x = torch.randn(3, 3, dtype=torch.float64)
    kfac = KFAC(model, samples=1000, seed=1)
    kfac.build(fisher(model, x, FAMILIES[family]), 0.1)
    expected = oracles.kronecker_factors(model, FAMILIES[family], x)
    for (A, G), (wanted_A, wanted_G) in zip(factors_of(kfac), expected, strict=True):
        torch.testing.assert_close(A, wanted_A)
        # the noise of 3000 signs is about two percent
        torch.testing.assert_close(G, wanted_G, rtol=0, atol=0.1 * wanted_G.abs().max().item())


def test_factors_of_a_convolution_are_those_of_its_patches():
    torch.manual_seed(3)
    conv = nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2)).double()
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(3 * 3 * 5, 2).double())
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    kfac = KFAC(model, samples="exact")
    kfac.build(fisher(model, x), 0.1)
    padded = nn.functional.pad(x, (2, 2, 1, 1))
    y = conv(x)
    A, rows = 0.0, 0
    for image in padded:
        for i in range(y.shape[2]):
            for j in range(y.shape[3]):
                patch = image[:, 2 * i : 2 * i + 2, j : j + 5 : 2].reshape(-1)
                a = torch.cat([patch, patch.new_ones(1)])
                A, rows = A + torch.outer(a, a), rows + 1
    G = 0.0
    for image in x:

        def head(shift, image=image):
            return model[1:]((conv(image) + shift).unsqueeze(0)).squeeze(0)

        J = torch.autograd.functional.jacobian(head, torch.zeros_like(y[0])).flatten(2)
        G = G + torch.einsum("ajt,akt->jk", J, J) / 0.5**2
    found_A, found_G = factors_of(kfac)[0]
    torch.testing.assert_close(found_A, A / rows)
    torch.testing.assert_close(found_G, G / len(x))


def test_large_images_are_unfolded_in_parts(monkeypatch):
    conv = nn.Conv2d(2, 3, 3).double()
    F = fisher(conv, torch.randn(7, 2, 6, 6, dtype=torch.float64))
    whole, parts = KFAC(conv), KFAC(conv)
    whole.build(F, 0.1)
    monkeypatch.setattr("trustregion.preconditioners.kfac_layers._CHUNK", 1500)
    parts.build(F, 0.1)
    torch.testing.assert_close(factors_of(parts), factors_of(whole))


def test_a_layer_that_runs_twice_sums_over_its_rows():
    model = Twice().double()
    x = torch.randn(6, 3, dtype=torch.float64)
    kfac = KFAC(model, samples="exact")
    kfac.build(fisher(model, x), 0.1)
    first, second = copy.deepcopy(model.layer), copy.deepcopy(model.layer)
    apart = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), model.head)
    (A1, G1), (A2, G2), _ = oracles.kronecker_factors(apart, normal, x)
    A, G = factors_of(kfac)[0]
    torch.testing.assert_close(A, (A1 + A2) / 2)
    torch.testing.assert_close(G, G1 + G2)


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


@each_dtype
def test_state_independent_scales_have_their_exact_curvature(dtype):
    policy = Gaussian(3, 4, 2).to(dtype)
    F = FisherOperator(policy(torch.randn(50, 3, dtype=dtype)), policy.parameters())
    M = KFAC(policy).build(F, 0.5)
    assert (M @ torch.ones(F.shape[0], dtype=dtype))[:2].tolist() == pytest.approx([0.4, 0.4])


class Other(nn.Module):
    """Layers without Kronecker factors around two that have them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.hidden, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.turned = nn.ConvTranspose2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        h = self.norm(torch.tanh(self.hidden(self.embed(tokens))))
        h = self.turned(self.grouped(h[..., None, None])).flatten(1)
        return self.head(h)


def test_other_parameters_get_an_estimate_of_their_diagonal():
    model = Other().double()
    tokens = torch.arange(40) % 5
    F = fisher(model, tokens, FAMILIES["categorical"])
    kfac = KFAC(model, samples=800)
    M = kfac.build(F, 0.1)
    names = [name for name, _ in model.named_parameters()]
    assert sorted(kfac.state["blocks"]) == [
        names.index("hidden.weight"),
        names.index("head.weight"),
    ]
    exact, found = to_dense(F).diagonal(), kfac.state["diagonal"]
    size = 0
    for name, p in model.named_parameters():
        part = slice(size, size + p.numel())
        size += p.numel()
        if name.split(".")[0] in ("hidden", "head"):
            assert not found[part].any()
            continue
        assert exact[part].any()
        noise = 5 * exact.max().item() / math.sqrt(800)  # of a mean of 800 signs
        torch.testing.assert_close(found[part], exact[part], rtol=0, atol=noise)
        e = torch.zeros(F.shape[0], dtype=torch.float64)
        e[part] = 1.0
        torch.testing.assert_close((M @ e)[part], 1 / (found[part] + 0.1))


@pytest.mark.parametrize("sampled", [1, "exact"])
def test_the_order_of_the_parameters_is_that_of_the_operator(sampled):
    policy = Gaussian(3, 4, 2).double()
    params = list(policy.parameters())
    order = [3, 0, 4, 2, 1]
    x = torch.randn(20, 3, dtype=torch.float64)
    vector = ParameterVector([params[i] for i in order])
    M = KFAC(policy, samples=sampled).build(FisherOperator(policy(x), params), 0.1)
    shuffled = KFAC(policy, samples=sampled).build(FisherOperator(policy(x), vector), 0.1)
    v = [torch.randn_like(p) for p in params]
    Mv = ParameterVector(params).unravel(M @ ParameterVector(params).ravel(v))
    expected = vector.ravel([Mv[i] for i in order])
    torch.testing.assert_close(shuffled @ vector.ravel([v[i] for i in order]), expected)


def test_frozen_and_unused_layers_are_left_out():
    model = mlp(3, 4, 4, 2).double()
    spare = nn.Linear(3, 3).double()
    model[0].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    whole = nn.ModuleList([model, spare])
    y = model(torch.randn(20, 3, dtype=torch.float64))
    F = FisherOperator(normal(y), whole.parameters())
    kfac = KFAC(whole, samples="exact")
    M = kfac.build(F, 0.25)
    assert {w: b["bias"] for w, b in kfac.state["blocks"].items()} == {2: 3, 4: None}
    dense = to_dense(M)
    unused = torch.cat([p.new_full((p.numel(),), i) for i, p in enumerate(whole.parameters())])
    for i in (0, 5, 6, 7):
        part = dense[unused == i][:, unused == i]
        torch.testing.assert_close(part, 4 * torch.eye(len(part), dtype=torch.float64))
    first = dense[unused == 1][:, unused == 1]  # a bias alone: a diagonal
    torch.testing.assert_close(first, first.diagonal().diag())
    assert (first.diagonal() < 4).all()


def test_a_weight_that_is_also_used_in_another_way_has_no_factors():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.head = nn.Linear(3, 4, bias=False), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(torch.tanh(self.encode(x)) @ self.encode.weight)

    model = Tied()
    kfac = KFAC(model)
    kfac.build(fisher(model, torch.randn(5, 3)), 0.1)
    assert list(kfac.state["blocks"]) == [1]


def test_a_bias_that_is_also_used_in_another_way_has_a_diagonal():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return torch.tanh(self.layer(x)) + self.layer.bias

    model = Shared()
    kfac = KFAC(model)
    kfac.build(fisher(model, torch.randn(5, 3)), 0.1)
    assert kfac.state["blocks"][0]["bias"] is None
    assert kfac.state["diagonal"][9:].min() > 0


def test_two_modules_with_one_weight_make_one_block():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    kfac = KFAC(model)
    F = fisher(model, torch.randn(5, 3))
    check_symmetric(kfac.build(F, 0.1))
    alone = KFAC(model[0])
    alone.build(F, 0.1)
    assert len(factors_of(kfac)) == 1
    torch.testing.assert_close(factors_of(kfac), factors_of(alone))


def test_layers_are_found_under_autocast():
    model = mlp(3, 8, 8, 2)
    x = torch.randn(50, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    F = FisherOperator(normal(y.float()), model.parameters())
    half, full = KFAC(model), KFAC(model)
    half.build(F, 0.1)
    full.build(fisher(model, x), 0.1)
    for (A, G), (wanted_A, wanted_G) in zip(factors_of(half), factors_of(full), strict=True):
        # bfloat16 has eight bits
        torch.testing.assert_close(A, wanted_A, rtol=0, atol=0.02)
        torch.testing.assert_close(G, wanted_G, rtol=0, atol=0.02 * wanted_G.max().item())


@st.composite
def networks(draw):
    """A network, its operator and a damping; dead units, huge and tiny scales, one sample."""
    dtype = draw(st.sampled_from(DTYPES))
    sizes = draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    model = mlp(*sizes, activation=draw(st.sampled_from([nn.Tanh, nn.ReLU]))).to(dtype)
    with torch.no_grad():
        model[0].weight.mul_(10.0 ** draw(st.integers(-20, 4)))
        if draw(st.booleans()):
            model[0].bias.fill_(-1e3)
        if draw(st.booleans()):
            model[-1].weight.zero_()
    shape = (draw(st.integers(1, 5)), sizes[0])
    x = torch.randn(shape, dtype=dtype) * 10.0 ** draw(st.integers(-18, 2))
    family = draw(st.sampled_from([normal, FAMILIES["categorical"], FAMILIES["bernoulli"]]))
    F = fisher(model, x, family)
    damping = draw(st.sampled_from([0.0, 1e-300, 1e-12, 1e-3, 1.0, 1e12]))
    return model, F, damping


@given(networks(), st.sampled_from([1, "exact"]))
def test_it_is_symmetric_and_positive_definite(drawn, samples):
    model, F, damping = drawn
    M = KFAC(model, samples=samples).build(F, damping)
    assert (M.shape, M.dtype) == (F.shape, F.dtype)
    dense = to_dense(M)
    assert dense.isfinite().all()
    eps, size = torch.finfo(F.dtype).eps, dense.abs().max()
    assert (dense - dense.T).abs().max() <= 50 * eps * size
    # as cg sees it, also where the inverse is nearly singular
    for r in [*torch.randn(5, F.shape[0], dtype=F.dtype), *torch.eye(F.shape[0], dtype=F.dtype)]:
        assert (r.double() @ (M @ r).double()) > 0
    for v in torch.linalg.eigh(dense.double())[1].T.to(F.dtype):
        assert (v.double() @ (M @ v).double()) > 0


@given(networks())
def test_a_solve_with_it_never_ends_for_its_sake(drawn):
    model, F, damping = drawn
    b = F @ torch.randn(F.shape[0], dtype=F.dtype)
    A = F + damping * Identity(len(b), F.dtype)
    solution = cg(A, b, M=KFAC(model).build(F, damping), rtol=1e-2)
    assert solution.status not in (Status.INDEFINITE_PRECONDITIONER, Status.NONFINITE_OPERATOR)
    assert solution.x.isfinite().all()


@given(networks())
def test_at_a_large_damping_it_is_the_identity_over_the_damping(drawn):
    model, F, _ = drawn
    kfac = KFAC(model, every=2)
    kfac.build(F, 1.0)
    blocks = kfac.state["blocks"].values()
    damping = 1e6 * max([1.0, *(block["curvature"].max().item() for block in blocks)])
    v = torch.randn(F.shape[0], dtype=F.dtype)
    found = damping * (kfac.build(F, damping) @ v)
    torch.testing.assert_close(found, v, rtol=0, atol=1e-5 * v.norm().item())


@each_dtype
@pytest.mark.parametrize("power", [-30, -7, 9, 30])
@pytest.mark.parametrize("damping", [0.0, 0.25])
def test_it_scales_by_powers_of_two_exactly(dtype, power, damping):
    model, x = mlp(3, 5, 2).to(dtype), torch.randn(20, 3, dtype=dtype)
    y = model(x)
    one = FisherOperator(normal(y, 1.0), model.parameters())
    scaled = FisherOperator(normal(y, 2.0**power), model.parameters())
    v = torch.randn(one.shape[0], dtype=dtype)
    expected = KFAC(model).build(one, damping) @ v
    found = KFAC(model).build(scaled, damping * 4.0**-power) @ v
    assert torch.equal(found, expected * 4.0**power)


@each_dtype
def test_inputs_of_any_scale_keep_their_factors(dtype):
    """Squares of the inputs leave the range of float32; those of float64 do not."""
    for scale in (2.0**-70, 2.0**70):
        layer = nn.Linear(3, 2, bias=False).to(dtype)
        x = torch.randn(20, 3, dtype=dtype)
        kfac, plain = KFAC(layer, samples="exact"), KFAC(layer, samples="exact")
        plain.build(fisher(layer, x), 1.0)
        kfac.build(fisher(layer, scale * x), 1.0)
        (A, _), (wanted, _) = factors_of(kfac)[0], factors_of(plain)[0]
        torch.testing.assert_close(A, scale * (scale * wanted))


def test_an_inverse_beyond_the_range_of_float32_is_right_up_to_a_factor():
    like, diagonal = Identity(3), torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    for e in (-1000, -140, 140, 1000):
        M = KroneckerInverse(like, [], diagonal * 2.0**e, 0.0)
        assert (M @ torch.ones(3)).tolist() in ([8.0, 4.0, 2.0], [4.0, 2.0, 1.0])
    M = KroneckerInverse(like, [], torch.tensor([2.0, 3.0, 5.0]).double(), 3.0)
    torch.testing.assert_close(M @ torch.ones(3), torch.tensor([1 / 5, 1 / 6, 1 / 8]))


def test_curvature_below_rounding_is_raised_and_none_at_all_takes_the_largest():
    eps = torch.finfo(torch.float32).eps
    eye = torch.eye(2, dtype=torch.float64)
    zero = KroneckerBlock(2, None, eye, eye, torch.zeros(2, 2, dtype=torch.float64))
    diagonal = torch.tensor([4.0, 0.0, 9.0, 9.0, 9.0, 9.0], dtype=torch.float64)
    M = KroneckerInverse(Identity(6), [zero], diagonal, 0.0)
    expected = torch.tensor([0.25, 0.25 / eps, 0.25, 0.25, 0.25, 0.25])
    assert torch.equal(M @ torch.ones(6), expected)
    nothing = KroneckerInverse(Identity(6), [zero], torch.zeros(6).double(), 0.0)
    assert torch.equal(nothing @ torch.ones(6), torch.ones(6))


class Overflowing(nn.Module):
    """The gradient at the first layer's output is not finite, that at the second's is."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.log_std = (
            mlp(3, 4),
            nn.Linear(3, 2),
            nn.Parameter(torch.ones(2)),
        )

    def forward(self, x):
        hidden = self.first(x)
        infinite = (hidden - hidden.detach()).abs().sqrt().sum(-1, keepdim=True)
        return td.Normal(self.second(x) + infinite, self.log_std.exp(), validate_args=False)


def test_a_layer_whose_gradients_are_not_finite_is_damped_only():
    model = Overflowing().double()
    x = torch.randn(10, 3, dtype=torch.float64)
    F = FisherOperator(model(x), model.parameters())
    kfac = KFAC(model)
    M = kfac.build(F, 0.5)
    assert list(kfac.state["blocks"]) == [3]
    v = torch.randn(F.shape[0], dtype=torch.float64)
    assert torch.equal((M @ v)[2:18], 2 * v[2:18])
    assert (M @ v)[18:].isfinite().all()


def nan_batch(model, samples=9):
    y = model(torch.full((samples, 3), math.nan))
    return FisherOperator(td.Normal(y, 1.0, validate_args=False), model.parameters())


def test_a_batch_of_nan_is_damped_only_and_the_solve_tells():
    model = mlp(3, 4, 2)
    kfac = KFAC(model)
    M = kfac.build(nan_batch(model), 0.5)
    assert kfac.state["blocks"] == {}
    v = torch.randn(26)
    assert torch.equal(M @ v, 2 * v)
    solution = cg(nan_batch(model), v, M=M)
    assert solution.status is Status.NONFINITE_OPERATOR


def test_an_estimate_that_is_not_finite_is_none():
    policy = Gaussian(3, 4, 2)
    kfac = KFAC(policy)
    with torch.no_grad():
        policy.log_std[0] = -60.0  # the square of the scale underflows
    distribution = policy(torch.randn(9, 3))
    M = kfac.build(FisherOperator(distribution, policy.parameters()), 0.5)
    assert (M @ torch.ones(28)).isfinite().all()
    assert kfac.state["diagonal"].isfinite().all()


@pytest.mark.parametrize("every", [1, 3])
def test_factors_are_shared_by_every_few_solves(every):
    model = mlp(3, 4, 2)
    kfac = KFAC(model, every=every)
    F = fisher(model, torch.randn(30, 3))
    seen = []
    for _ in range(6):
        kfac.build(F, 0.1)
        seen.append(factors_of(kfac)[0][1])
        assert kfac.products == 0
        assert (kfac.overhead > 0) == ((len(seen) - 1) % every == 0)
    for i, factor in enumerate(seen[1:], start=1):
        assert torch.equal(factor, seen[i - 1]) == (i % every != 0)


def test_the_damping_is_that_of_the_solve():
    model = mlp(3, 4, 2).double()
    F = fisher(model, torch.randn(30, 3, dtype=torch.float64))
    kfac = KFAC(model, every=5)
    first = curvature(kfac.build(F, 0.1), 0.1)
    torch.testing.assert_close(curvature(kfac.build(F, 2.0), 2.0), first)


def test_the_average_is_a_mean_at_first_and_then_forgets():
    model = nn.Sequential(nn.LayerNorm(3), *mlp(3, 4, 2)).double()
    apart, together = KFAC(model), KFAC(model, decay=0.6)
    wanted = []
    for k, weight in enumerate([0.0, 1 / 2, 0.6, 0.6]):
        F = fisher(model, torch.randn(9, 3, dtype=torch.float64))
        M = together.build(F, 0.1)
        apart.build(F, 0.1)
        new = [*factors_of(apart)[0], *factors_of(apart)[1], apart.state["diagonal"]]
        old = wanted if k else new
        wanted = [weight * a + (1 - weight) * b for a, b in zip(old, new, strict=True)]
        found = [*factors_of(together)[0], *factors_of(together)[1], together.state["diagonal"]]
        torch.testing.assert_close(found, wanted)
    A, G, diagonal = wanted[0], wanted[1], wanted[-1]  # and the average is what is inverted
    found = curvature(M, 0.1)
    torch.testing.assert_close(found[6:18, 6:18], torch.kron(G, A[:3, :3].contiguous()))
    torch.testing.assert_close(found.diagonal()[:6], diagonal[:6])
    assert diagonal[:6].any()


def test_a_batch_that_is_not_finite_leaves_the_average():
    model = mlp(3, 4, 2)
    kfac = KFAC(model, decay=0.5)
    F, v = fisher(model, torch.randn(9, 3)), torch.randn(26)
    before = kfac.build(F, 0.1) @ v
    assert torch.equal(kfac.build(nan_batch(model), 0.1) @ v, before)
    policy = Gaussian(3, 4, 2)
    kfac = KFAC(policy, decay=0.5)
    kfac.build(FisherOperator(policy(torch.randn(9, 3)), policy.parameters()), 0.1)
    before = kfac.state["diagonal"]
    with torch.no_grad():
        policy.log_std[0] = -60.0  # the square of the scale underflows
    kfac.build(FisherOperator(policy(torch.randn(9, 3)), policy.parameters()), 0.1)
    assert torch.equal(kfac.state["diagonal"], before)


def test_draws_repeat_with_the_seed_and_leave_the_global_generator():
    model, x = mlp(3, 4, 2), torch.randn(30, 3)
    F, v = fisher(model, x), torch.randn(26)
    before = torch.get_rng_state()
    first, again, other = (KFAC(model, seed=seed) for seed in (5, 5, 6))
    a, b = first.build(F, 0.1) @ v, again.build(F, 0.1) @ v
    assert torch.equal(a, b)
    assert not torch.equal(a, other.build(F, 0.1) @ v)
    assert not torch.equal(a, first.build(F, 0.1) @ v)  # a draw of its own for each build
    assert torch.equal(torch.get_rng_state(), before)


def test_a_saved_state_goes_on_as_if_it_had_not_stopped(tmp_path):
    model, x = mlp(3, 4, 2), torch.randn(30, 3)
    F, v = fisher(model, x), torch.randn(26)
    options = {"every": 2, "decay": 0.5}
    kfac, resumed = KFAC(model, **options), KFAC(model, **options)
    for _ in range(3):
        kfac.build(F, 0.1)
    torch.save(kfac.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(4):
        assert torch.equal(resumed.build(F, 0.1) @ v, kfac.build(F, 0.1) @ v)


def test_another_set_of_parameters_starts_anew():
    model, x = mlp(3, 4, 2), torch.randn(30, 3)
    kfac = KFAC(model, every=10)
    kfac.build(fisher(model, x), 0.1)
    F = FisherOperator(normal(model(x)), list(model.parameters())[2:])
    assert kfac.build(F, 0.1).shape == F.shape
    assert list(kfac.state["blocks"]) == [0]


def test_nothing_of_the_graph_is_kept():
    model, saved = mlp(3, 4, 2), []
    model[1].register_forward_hook(lambda *args: saved.append(weakref.ref(args[-1])))
    kfac = KFAC(model)
    F = fisher(model, torch.randn(10, 3))
    M = kfac.build(F, 0.1)
    assert saved[0]() is not None  # the second layer's node holds its input
    del F
    assert saved[0]() is None
    assert (M @ torch.ones(26)).isfinite().all()
    assert not any(p.grad is not None for p in model.parameters())


def test_a_graph_that_lies_elsewhere_is_read():
    """As torch.autograd.graph.save_on_cpu does it."""
    model, x = mlp(3, 4, 2), torch.randn(10, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy):
        y = model(x)
    v = torch.randn(26)
    there = KFAC(model).build(FisherOperator(normal(y), model.parameters()), 0.1)
    assert torch.equal(there @ v, KFAC(model).build(fisher(model, x), 0.1) @ v)


def qualities(F, g, damping, M, iterations):
    """The linear improvement in the ball of the damped curvature, to the largest, by iteration."""
    A = F + damping * Identity(len(g), F.dtype)
    exact = to_dense(F).double() + damping * torch.eye(len(g), dtype=torch.float64)
    g64, found = g.double(), []
    best = (g64 @ torch.linalg.solve(exact, g64)).sqrt()

    def note(x):
        x = x.double()
        found.append((g64 @ x / (x @ exact @ x).sqrt() / best).item())

    cg(A, g, M=M, rtol=0.0, max_iter=iterations, callback=note)
    return found


class Normed(nn.Module):
    """Embeddings and a norm, which have a diagonal only."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(20, 8), nn.LayerNorm(16)
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, tokens):
        return self.head(self.norm(torch.tanh(self.hidden(self.embed(tokens)))))


@each_dtype
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["deep", "normed"])
def test_three_iterations_with_it_beat_eight_without(name, seed, dtype):
    torch.manual_seed(seed)
    if name == "deep":
        model, family = mlp(8, 16, 16, 16, 4).to(dtype), normal
        x = torch.randn(400, 8, dtype=dtype) * torch.logspace(0, -2, 8, dtype=dtype)
    else:
        model, family = Normed().to(dtype), FAMILIES["categorical"]
        x = (20 * torch.rand(400) ** 2).long()
    distribution = family(model(x))
    log_prob = distribution.log_prob(distribution.sample()).reshape(400, -1).sum(1)
    loss, params = -(torch.randn(400, dtype=dtype) * log_prob).mean(), list(model.parameters())
    g = ParameterVector(params).ravel(torch.autograd.grad(loss, params, retain_graph=True))
    F = FisherOperator(distribution, params)
    plain = qualities(F, g, 1e-3, None, 8)
    quick = qualities(F, g, 1e-3, KFAC(model).build(F, 1e-3), 8)
    assert quick[2] > plain[7]
    assert quick[7] > 0.95


def test_the_work_it_declares_follows_the_layers():
    policy = mlp(17, 64, 64, 6)
    F = fisher(policy, torch.randn(2048, 17))
    kfac = KFAC(policy)
    assert kfac.work(F) == 0.0
    kfac.build(F, 0.1)
    assert 0.03 < kfac.work(F) < 0.15
    assert 2 < kfac.overhead < 5


def test_bad_arguments_are_refused_in_words():
    model = mlp(3, 4, 2)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got list"):
        KFAC(list(model.parameters()))
    with pytest.raises(ValueError, match="no Linear or Conv2d layer"):
        KFAC(nn.LayerNorm(3))
    for options, words in [
        ({"samples": 0}, "samples must be a positive integer"),
        ({"samples": "all"}, "samples must be"),
        ({"every": 0}, "every must be a positive integer"),
        ({"seed": 0.5}, "seed must be an integer and not negative, got 0.5"),
        ({"decay": 1.0}, "decay must be a number from 0 up to but not 1, got 1.0"),
        ({"decay": -0.1}, "decay must be"),
        ({"decay": None}, "decay must be .* NoneType"),
    ]:
        with pytest.raises(ValueError, match=words):
            KFAC(model, **options)
    kfac = KFAC(model)
    F = fisher(model, torch.randn(5, 3))
    for damping in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="damping"):
            kfac.build(F, damping)
    with pytest.raises(TypeError, match="GaussNewtonOperator, got FunctionOperator"):
        kfac.build(FunctionOperator(F.mv, 26), 0.1)


def test_another_module_is_refused_in_words():
    model = mlp(3, 4, 2)
    F = fisher(model, torch.randn(5, 3))
    with pytest.raises(ValueError, match="none of the weights of the module's"):
        KFAC(copy.deepcopy(model)).build(F, 0.1)


@pytest.mark.parametrize("backend", ["auto", "functional"])
def test_an_operator_from_a_function_is_refused_in_words(backend):
    model, x = mlp(3, 4, 2), torch.randn(5, 3)

    def predict(p):
        return normal(torch.func.functional_call(model, p, (x,)))

    F = FisherOperator.from_function(predict, dict(model.named_parameters()), backend=backend)
    with pytest.raises(ValueError, match=r"from_function .*from the outputs of the module"):
        KFAC(model).build(F, 0.1)


def test_a_graph_without_the_layers_is_refused_in_words():
    layer = nn.Linear(3, 2)
    y = (torch.randn(5, 1, 3) * layer.weight).sum(-1) + layer.bias
    F = FisherOperator(normal(y), layer.parameters())
    with pytest.raises(ValueError, match="no product with the weight of a Linear"):
        KFAC(layer).build(F, 0.1)
