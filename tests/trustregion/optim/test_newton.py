"""NewtonTrustRegion step by step: dense oracles, the rules of the radius, what a step costs."""

import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as td
from torch import nn

import oracles
from optimizers import newton
from trustregion import Status
from trustregion.operators import HessianOperator

EXACT = {"rtol": 1e-13}


@dataclass
class Quadratic:
    """``g'x + x'Ax / 2`` with a log of where it was evaluated, and lies about chosen calls."""

    A: torch.Tensor
    g: torch.Tensor
    lies: dict = field(default_factory=dict)  # call -> what is added to the loss
    points: list = field(default_factory=list)

    def __post_init__(self):
        self.x = torch.zeros_like(self.g).requires_grad_()

    def __call__(self):
        self.points.append(self.x.detach().clone())
        return self.value(self.x) + self.lies.get(len(self.points), 0.0)

    def value(self, x):
        return self.g @ x + 0.5 * x @ (self.A @ x)


def quadratic(n, seed, *, definite=False, dtype=torch.float64, **given):
    draw = torch.Generator().manual_seed(seed)
    B = torch.randn(n, n, generator=draw, dtype=torch.float64)
    A = B @ B.T / n + 0.1 * torch.eye(n, dtype=torch.float64) if definite else B + B.T
    return Quadratic(A.to(dtype), torch.randn(n, generator=draw, dtype=dtype), **given)


def metric(n, seed):
    """A positive definite matrix ``M`` and a root ``L`` with ``M = L L'``."""
    B = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    L = torch.linalg.cholesky(B @ B.T / n + 0.3 * torch.eye(n, dtype=torch.float64))
    return L @ L.T, L


def best(A, g, radius, L):
    """The exact step where the norm is that of ``inv(L L')``."""
    return L @ oracles.trust_region(L.T @ A @ L, L.T @ g, radius)


def damped(A, damping):
    return A + damping * torch.eye(len(A), dtype=A.dtype)


# -- the step against dense oracles


@given(
    st.integers(0, 2**20),
    st.integers(1, 8),
    st.floats(-3, 2),
    st.booleans(),
    st.sampled_from([0.0, 0.5]),
)
def test_a_step_is_the_dense_trust_region_step(seed, n, log_radius, with_metric, damping):
    f, radius = quadratic(n, seed), 10**log_radius
    M, L = metric(n, seed + 1) if with_metric else (None, torch.eye(n, dtype=torch.float64))
    optimizer = newton([f.x], radius, damping=damping, preconditioner=M, **EXACT)
    optimizer.step(f)
    info, s = optimizer.info, f.x.detach()
    A, model = damped(f.A, damping), lambda s: f.g @ s + 0.5 * s @ A @ s
    exact = best(A, f.g, radius, L)
    if f.value(exact) >= 0:  # the damping's optimum may not lower the loss itself
        return
    assert info.status is Status.ACCEPTED
    assert torch.linalg.solve(L, s).norm() <= radius * (1 + 1e-9)
    assert model(s).item() == pytest.approx(model(exact).item(), rel=1e-8)
    # the model of the loss has no damping in it: it is the loss itself here
    assert info.predicted_reduction == pytest.approx(-f.value(s).item(), rel=1e-9)
    assert info.actual_reduction == pytest.approx(info.predicted_reduction, rel=1e-9)
    assert info.rho == pytest.approx(1, rel=1e-9)
    assert info.products <= n + 1  # one measures a residual that is in doubt


@given(st.integers(0, 2**20), st.integers(1, 8), st.floats(-3, 1), st.booleans())
def test_steihaug_ends_where_the_path_of_conjugate_gradients_leaves_the_ball(
    seed, n, log_radius, with_metric
):
    f, radius = quadratic(n, seed, definite=True), 10**log_radius
    M, L = metric(n, seed + 1) if with_metric else (None, torch.eye(n, dtype=torch.float64))
    newton([f.x], radius, solver="steihaug", preconditioner=M, **EXACT).step(f)
    path = [torch.zeros_like(f.g), *oracles.textbook_cg(L.T @ f.A @ L, -L.T @ f.g, n)]
    expected = path[-1]
    for a, b in itertools.pairwise(path):
        if b.norm() > radius:  # |a + t (b - a)| = radius
            d = b - a
            half, square = a @ d, d @ d
            t = (-half + (half**2 + square * (radius**2 - a @ a)).sqrt()) / square
            expected = a + t * d
            break
    # the oracle solves with explicit Krylov bases, which lose digits with the condition
    torch.testing.assert_close(f.x.detach(), L @ expected, rtol=1e-6, atol=1e-8 * radius)


@pytest.mark.parametrize("solver", ["gltr", "cg"])
@pytest.mark.parametrize("with_metric", [False, True])
@pytest.mark.parametrize("damping", [1e-2, 1.0, 100.0])
def test_an_infinite_radius_leaves_the_step_to_the_damping(solver, with_metric, damping):
    f = quadratic(6, 1, definite=True)
    M = metric(6, 2)[0] if with_metric else None
    newton([f.x], math.inf, damping=damping, solver=solver, preconditioner=M, **EXACT).step(
        optimised := f
    )
    # "cg" takes the metric as a preconditioner only
    D = torch.linalg.inv(M) if with_metric and solver == "gltr" else torch.eye(6).double()
    expected = torch.linalg.solve(f.A + damping * D, -f.g)
    torch.testing.assert_close(optimised.x.detach(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("with_metric", [False, True])
def test_the_prediction_of_a_damped_step_is_that_of_the_loss(with_metric):
    f = quadratic(6, 1, definite=True)
    M = metric(6, 2)[0] if with_metric else None
    optimizer = newton([f.x], math.inf, damping=2.0, preconditioner=M, **EXACT)
    optimizer.step(f)
    assert optimizer.info.rho == pytest.approx(1, rel=1e-12)


def functional_classifier(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(32, 3).double(), torch.randint(3, (32,))
    params = list(model.parameters())

    def predict(ps):
        names = [name for name, _ in model.named_parameters()]
        return torch.func.functional_call(model, dict(zip(names, ps, strict=True)), (x,))

    def loss(ps):
        return nn.functional.cross_entropy(predict(ps), y)

    return params, predict, loss, y


def returns(kind, params, predict, y):
    def closure():
        logits = predict(params)
        loss = nn.functional.cross_entropy(logits, y)
        second = {"outputs": logits, "distribution": td.Categorical(logits=logits)}
        return (loss, second[kind]) if kind in second else loss

    return closure


@pytest.mark.parametrize(
    ("curvature", "kind", "norm"),
    [
        ("hessian", "loss", "euclidean"),
        ("hessian", "distribution", "fisher"),
        ("ggn", "outputs", "euclidean"),
        ("ggn", "distribution", "euclidean"),
        ("ggn", "distribution", "fisher"),
    ],
)
@pytest.mark.parametrize("radius", [1e-3, 0.05])
def test_a_step_of_a_network_is_the_dense_one(curvature, kind, norm, radius):
    params, predict, loss, y = functional_classifier()
    theta = oracles.flatten([p.detach() for p in params])
    g = oracles.flatten(torch.autograd.grad(loss(params), params))
    F = oracles.gauss_newton(predict, lambda z: nn.functional.cross_entropy(z, y), params)
    A = oracles.loss_hessian(loss, params) if curvature == "hessian" else F
    root = torch.eye(len(g)).double()
    if norm == "fisher":
        root = torch.linalg.inv(torch.linalg.cholesky(damped(F, 0.01))).T
    expected = best(A, g, radius, root)
    optimizer = newton(
        params, radius, curvature=curvature, metric=norm, metric_damping=0.01, rtol=1e-10
    )
    optimizer.step(returns(kind, params, predict, y))
    assert optimizer.info.accepted
    assert optimizer.info.backtracks == 0
    s = oracles.flatten([p.detach() for p in params]) - theta
    # the Fisher metric is solved with to 1e-6
    torch.testing.assert_close(s, expected, rtol=1e-4, atol=1e-5 * radius)


@pytest.mark.parametrize("delta", [1e-8, 1e-7])
def test_in_the_fisher_metric_a_radius_is_a_kl(delta):
    params, predict, _, y = functional_classifier()
    theta = oracles.flatten([p.detach() for p in params])
    F = oracles.gauss_newton(predict, lambda z: nn.functional.cross_entropy(z, y), params)
    optimizer = newton(params, math.sqrt(2 * delta), curvature="ggn", metric="fisher")
    optimizer.step(returns("distribution", params, predict, y))
    s = oracles.flatten([p.detach() for p in params]) - theta
    assert optimizer.info.accepted
    assert (s @ damped(F, 1e-3) @ s).item() / 2 == pytest.approx(delta, rel=1e-5)  # INNER
    # of second order in the step, and the damping of the metric is no KL
    assert optimizer.info.kl == pytest.approx((s @ F @ s).item() / 2, rel=0.01)
    assert 0.8 < optimizer.info.kl / delta < 1


# -- rules of the radius


def rosenbrock(x):
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def by_hand(rule, radius, rho, length, at_edge):
    if rule == "gould":  # Gould, Orban, Sartenaer and Toint, 2005
        if rho < 0.01:
            return length / 4
        return max(3.5 * length, radius) if rho >= 0.99 else radius
    if rho < 0.25:  # Nocedal and Wright, algorithm 4.1
        return radius / 4
    return 2 * radius if rho > 0.75 and at_edge else radius


@pytest.mark.parametrize("rule", ["gould", "classic"])
@pytest.mark.parametrize("solver", ["gltr", "steihaug"])
def test_the_radius_moves_as_published(rule, solver):
    x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    optimizer = newton([x], 1.0, rule=rule, solver=solver)
    radius, seen, radius_known = 1.0, set(), False
    for _ in range(25):
        points = []

        def closure(points=points):
            points.append(x.detach().clone())
            return rosenbrock(x)

        optimizer.step(closure)
        start, *trials = points if radius_known else points[:-1]  # the first step checks it
        radius_known = True
        g = torch.autograd.functional.jacobian(rosenbrock, start)
        H = torch.autograd.functional.hessian(rosenbrock, start)
        for i, trial in enumerate(trials):
            s, last = trial - start, i == len(trials) - 1
            predicted = -(g @ s + 0.5 * s @ H @ s)
            rho = ((rosenbrock(start) - rosenbrock(trial)) / predicted).item()
            assert (rho > 0.01) == last  # the first good one is taken
            if last:
                assert optimizer.info.radius == pytest.approx(radius, rel=1e-6)
            length = s.norm().item()
            at_edge = length > radius * (1 - 1e-9)
            after = by_hand(rule, radius, rho, length, at_edge)
            seen.add(math.copysign(1, after - radius) if after != radius else 0.0)
            radius = after
        assert optimizer.param_groups[0]["radius"] == pytest.approx(radius, rel=1e-6)
        radius = optimizer.param_groups[0]["radius"]
    assert seen == {-1.0, 0.0, 1.0}


# -- negative curvature


@pytest.mark.parametrize("solver", ["gltr", "steihaug"])
def test_a_saddle_is_left_along_negative_curvature_and_info_says_so(solver):
    x = torch.tensor([0.0, 1e-9], dtype=torch.float64, requires_grad=True)
    optimizer = newton([x], 0.5, solver=solver)
    optimizer.step(lambda: x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4)
    info = optimizer.info
    assert info.accepted
    assert info.cg_status is Status.NEGATIVE_CURVATURE
    assert x[1].item() == pytest.approx(0.5)  # the edge, however small the gradient
    assert info.products <= 2


@pytest.mark.parametrize("adapt", [False, True])
@pytest.mark.parametrize("off", [0.0, 0.3])
def test_a_damping_below_the_negative_curvature_is_raised_for_no_product(adapt, off):
    x = torch.tensor([off, 1e-3], dtype=torch.float64, requires_grad=True)
    factor = 2.0 if adapt else None
    optimizer = newton([x], math.inf, damping=0.5, damping_factor=factor, rtol=1e-12)
    optimizer.step(lambda: x[0] ** 2 - x[1] ** 2 + x[1] ** 4)
    info = optimizer.info
    assert info.accepted
    assert info.products <= 2
    # 0.5, 1 and 2 are not above 2, the negative curvature; nor is 0.5 times 1.5 cubed
    damping = 4.0 if adapt else 0.5 * 1.5**4
    assert info.damping == damping
    g, h = -2e-3 + 4e-9, -2 + 12e-6  # the derivatives there
    assert x[1].item() == pytest.approx(1e-3 - g / (damping + h), rel=1e-9)
    after = 2.0 if adapt else 0.5  # the last trial was good
    assert optimizer.param_groups[0]["damping"] == after


# -- what a step costs


SETTINGS = [
    {},
    {"rtol": 1e-17},  # in doubt: the first solve measures its residual
    {"solver": "steihaug"},
    {"rule": "classic"},
    {"radius": math.inf, "damping": 0.1},
    {"radius": math.inf, "damping": 0.1, "solver": "cg"},
    {"preconditioner": torch.diag(torch.arange(1.0, 7.0, dtype=torch.float64))},
]


@pytest.mark.parametrize("options", SETTINGS)
def test_rejected_trials_cost_a_forward_pass_and_no_product(options, monkeypatch):
    products = []
    mv = HessianOperator.mv

    def counted(self, v):
        products.append(v)
        return mv(self, v)

    monkeypatch.setattr(HessianOperator, "mv", counted)
    spent = []
    for failures in range(6):
        # the step's first call and then as many trials as should fail; damping can be low at first
        f = quadratic(6, 3, definite=True, lies=dict.fromkeys(range(2, 2 + failures), 1e6))
        products.clear()
        optimizer = newton([f.x], **(EXACT | {"radius": 0.5} | options))
        optimizer.step(f)
        info = optimizer.info
        assert info.accepted
        assert info.backtracks == failures
        assert info.evaluations == len(f.points) == failures + 3
        assert info.products == len(products)
        spent.append(len(products))
    assert len(set(spent)) == 1
    assert 1 <= spent[0] <= 6 + 1


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("limit", [0, 1, 7])
def test_after_the_last_rejection_every_bit_is_as_before(options, limit):
    f = quadratic(6, 3, definite=True, lies=dict.fromkeys(range(2, 3 + limit), 1e6))
    with torch.no_grad():
        f.x.copy_(torch.randn(6))
    before, last = f.x.detach().clone(), None
    optimizer = newton([f.x], max_rejections=limit, **({"radius": 0.5} | options))
    optimizer.step(f)
    info = optimizer.info
    assert torch.equal(f.x, before)
    assert info.status is Status.REJECTED_RATIO
    assert "rho -" in info.detail
    assert info.evaluations == 2 + limit + 1  # the last where it started, to see that it repeats
    assert (info.new_loss, info.actual_reduction, info.rho) == (info.loss, 0.0, 0.0)
    lengths = [(p - before).norm().item() for p in f.points[1:-1]]
    for length in lengths:  # every trial is nearer than the one before
        assert last is None or length < last
        last = length


@pytest.mark.parametrize("options", SETTINGS)
def test_a_trial_that_gains_less_than_a_hundredth_of_the_promise_is_rejected(options):
    for part, rejected in ((0.009, 1), (0.011, 0)):
        f, points = quadratic(6, 3, definite=True), []

        def closure(f=f, points=points, part=part):
            points.append(f.x.detach().clone())
            first_trial = len(points) > 1 and torch.equal(points[-1], points[1])
            return f() * (part if first_trial else 1.0)

        optimizer = newton([f.x], **(EXACT | {"radius": 0.5} | options))
        optimizer.step(closure)
        assert optimizer.info.accepted
        assert optimizer.info.backtracks == rejected


@pytest.mark.parametrize("options", SETTINGS)
def test_the_residual_of_an_early_end_is_reported(options):
    f = quadratic(6, 3, definite=True)
    optimizer = newton([f.x], **({"radius": 1e3} | options), max_iter=2)
    optimizer.step(f)
    D = damped(f.A, options.get("damping", 0.0))
    residual = (D @ f.x.detach() + f.g).norm() / f.g.norm()
    assert residual > 0.01
    assert optimizer.info.cg_residual == pytest.approx(residual.item(), rel=1e-9)
