"""NewtonTrustRegion as Levenberg-Marquardt's method and as Hessian-free optimisation."""

import math

import pytest
import scipy.optimize
import torch
from torch.nn.functional import mse_loss

import oracles
from optimizers import newton
from trustregion import Status


def least_squares(dtype=torch.float64):
    """A sum of exponentials to fit; its residuals for scipy too."""
    t = torch.linspace(0, 2, 30, dtype=dtype)
    target = 2 * (-0.7 * t).exp() - (-3 * t).exp() + 0.01 * (9 * t).sin()
    a = torch.tensor([1.0, -1.0, 0.3, -2.0], dtype=dtype, requires_grad=True)

    def predict(a):
        return a[0] * (a[1] * t).exp() + a[2] * (a[3] * t).exp()

    def closure():
        y = predict(a)
        return mse_loss(y, target), y

    return a, predict, target, closure


LM = {"radius": math.inf, "curvature": "ggn", "damping": 1e-2, "damping_factor": 1.5}


def test_levenberg_marquardt_finds_scipys_minimum():
    a, predict, target, closure = least_squares()
    optimizer = newton([a], rtol=1e-10, **(LM | {"damping_factor": 4.0}))
    for _ in range(80):
        optimizer.step(closure)

    def residuals(values):
        return (predict(torch.from_numpy(values)) - target).numpy()

    peer = scipy.optimize.least_squares(
        residuals, [1.0, -1.0, 0.3, -2.0], xtol=1e-15, ftol=1e-15, gtol=1e-15
    )
    terms = [sorted(torch.as_tensor(v).reshape(2, 2).tolist()) for v in (a.detach(), peer.x)]
    assert closure()[0].item() == pytest.approx(2 * peer.cost / len(target), rel=1e-9)
    torch.testing.assert_close(torch.tensor(terms[0]), torch.tensor(terms[1]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("factor", [1.5, 4.0])
@pytest.mark.parametrize("hessian_free", [False, True])
def test_the_steps_and_dampings_are_those_of_marquardt_by_hand(factor, hessian_free):
    a, predict, target, closure = least_squares()
    options = LM | ({"solver": "cg"} if hessian_free else {})
    optimizer = newton([a], rtol=1e-14, **(options | {"damping_factor": factor}))
    x, damping, rejected = a.detach().clone(), LM["damping"], 0
    for _ in range(60):
        J = torch.autograd.functional.jacobian(predict, x)
        r, n = predict(x) - target, len(target)
        g, A = 2 * J.T @ r / n, 2 * J.T @ J / n
        while True:
            s = torch.linalg.solve(A + damping * torch.eye(4).double(), -g)
            scale = 1.0
            actual = (r @ r - (predict(x + s) - target).square().sum()) / n
            rho = (actual / -(g @ s + 0.5 * s @ A @ s)).item()
            good, tried = rho > 0.01, damping
            if rho > 0.75:
                damping = damping / factor
            elif rho < 0.25:
                damping = damping * factor
            if good or hessian_free:
                break
            rejected += 1
        while hessian_free:  # shortened until the loss falls
            d = scale * s
            actual = (r @ r - (predict(x + d) - target).square().sum()) / n
            if actual / -(g @ d + 0.5 * d @ A @ d) > 0.01:
                break
            scale, rejected = 0.8 * scale, rejected + 1
        x = x + scale * s
        optimizer.step(closure)
        info = optimizer.info
        assert info.damping == pytest.approx(tried, rel=1e-12)
        assert info.scale == pytest.approx(scale)
        assert optimizer.param_groups[0]["damping"] == pytest.approx(damping, rel=1e-12)
        # Krylov spaces on a condition of up to 1e6
        torch.testing.assert_close(a.detach(), x, rtol=1e-5, atol=1e-7)
        x = a.detach().clone()  # so that errors do not add up
        if info.predicted_reduction < 1e-11 * info.loss:
            break  # rho is rounding from here on
    assert rejected > 0
    assert info.new_loss < 1e-4


def test_a_warm_start_continues_from_a_part_of_the_last_solution():
    draw = torch.Generator().manual_seed(0)
    B = torch.randn(8, 8, generator=draw, dtype=torch.float64)
    A, g = B @ B.T / 8, torch.randn(8, generator=draw, dtype=torch.float64)
    x = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    optimizer = newton(
        [x], math.inf, damping=0.1, solver="cg", warm_start=0.7, max_iter=3, rtol=0.0
    )
    D, last = A + 0.1 * torch.eye(8).double(), torch.zeros(8).double()
    for _ in range(3):
        before = x.detach().clone()
        b = -(g + A @ before)
        start = 0.7 * last
        last = start + oracles.textbook_cg(D, b - D @ start, 3)[-1]
        optimizer.step(lambda: g @ x + 0.5 * x @ A @ x)
        assert optimizer.info.accepted
        torch.testing.assert_close(x - before, last, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(optimizer.state[x]["direction"], last, rtol=1e-8, atol=1e-10)


def test_hessian_free_solves_end_by_the_rule_of_relative_progress():
    n, draw = 60, torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64))
    A = (Q * torch.logspace(0, -2, n, dtype=torch.float64)) @ Q.T
    g = torch.randn(n, generator=draw, dtype=torch.float64)
    x = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    optimizer = newton([x], math.inf, damping=1e-2, solver="cg", rtol=0.0)
    optimizer.step(lambda: g @ x + 0.5 * x @ A @ x)
    D = A + 1e-2 * torch.eye(n).double()
    path = [torch.zeros(n).double(), *oracles.textbook_cg(D, -g, n)]
    phi = [(g @ s + 0.5 * s @ D @ s).item() for s in path]

    def ends(i):  # Martens, 2010, section 4.4
        k = max(10, math.ceil(i / 10))
        return i > k and phi[i] < 0 and (phi[i] - phi[i - k]) / phi[i] < k * 5e-4

    assert optimizer.info.cg_status is Status.PROGRESS_BELOW_TOLERANCE
    assert optimizer.info.cg_iterations == next(i for i in range(1, n) if ends(i))


def test_within_a_radius_too_the_damping_follows_rho():
    x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    optimizer = newton([x], 0.5, damping=1.0, damping_factor=1.5)
    moves = set()
    for _ in range(12):
        damping = optimizer.param_groups[0]["damping"]
        optimizer.step(lambda: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2)
        rho = optimizer.info.rho
        move = 1.5 if rho < 0.25 else 1 / 1.5 if rho > 0.75 else 1.0
        assert optimizer.param_groups[0]["damping"] == pytest.approx(move * damping)
        moves.add(move)
    assert len(moves) >= 2


def test_a_warm_start_that_leads_uphill_is_not_followed():
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = newton(
        [x], math.inf, damping=0.1, damping_factor=1.5, solver="cg", warm_start=1.0, max_iter=1
    )
    optimizer.state[x]["direction"] = torch.full((2,), 100.0, dtype=torch.float64)
    optimizer.step(lambda: x[0] + (x * x) @ torch.tensor([0.5, 500.0], dtype=torch.float64))
    info = optimizer.info
    assert info.status is Status.NOT_A_DESCENT
    assert info.evaluations == 1
    assert not x.any()
    assert optimizer.param_groups[0]["damping"] == pytest.approx(0.15)  # a failure raises it


def test_hessian_free_steps_that_change_nothing_visible_are_not_taken():
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = newton([x], math.inf, damping=0.1, solver="cg", max_rejections=3)
    optimizer.step(lambda: 1e12 + 1e-9 * x.square().sum())
    assert optimizer.info.status is Status.CONVERGED
    assert optimizer.info.evaluations == 2 + 3
    assert torch.equal(x, torch.ones(2, dtype=torch.float64))
