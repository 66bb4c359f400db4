"""least_squares: the fit against scipy's, its covariance, units, tolerances and errors."""

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies import costly
from trustregion import Status, least_squares


def decay(n, seed, dtype=torch.float64, noise=0.05):
    """Noisy data of a decay with an offset: residuals, a first guess, and scipy's arguments."""
    draw = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 2, n, dtype=torch.float64)
    a, b, c = (0.5 + 2 * torch.rand(3, generator=draw, dtype=torch.float64)).tolist()
    y = a * torch.exp(-b * t) + c + noise * torch.randn(n, generator=draw, dtype=torch.float64)
    guess = [1.2 * a, 0.8 * b, 1.1 * c]

    def residuals(x):
        return x[0] * torch.exp(-x[1] * t.to(dtype)) + x[2] - y.to(dtype)

    def model(t, a, b, c):
        return a * np.exp(-b * t) + c

    return residuals, guess, (model, t.numpy(), y.numpy(), guess)


@given(n=st.integers(8, 40), seed=st.integers(0, 2**31))
@costly
def test_it_finds_the_fit_and_the_covariance_of_curve_fit(n, seed):
    residuals, guess, peer = decay(n, seed, noise=0.01)
    fit = least_squares(residuals, guess)
    parameters, covariance = scipy.optimize.curve_fit(*peer, ftol=1e-14, xtol=1e-14)
    errors = np.sqrt(np.diag(covariance))
    assert fit.success
    assert np.abs(fit.x.numpy() - parameters).max() <= 1e-5 * errors.max()
    # curve_fit differentiates by finite differences, to about sqrt(eps).
    assert fit.covariance.numpy() == pytest.approx(covariance, rel=1e-4)
    assert fit.rank == 3


def mild(m, n, seed):
    """Residuals that are nearly linear, of m > n, with an exact Jacobian in numpy."""
    draw = np.random.default_rng(seed)
    A, b = draw.normal(size=(m, n)), draw.normal(size=m)
    A_, b_ = torch.tensor(A), torch.tensor(b)
    return (
        lambda x: A_ @ x + 0.1 * torch.tanh(A_ @ x) - b_,
        lambda x: A @ x + 0.1 * np.tanh(A @ x) - b,
        lambda x: (1 + 0.1 / np.cosh(A @ x) ** 2)[:, None] * A,
    )


@given(n=st.integers(1, 6), more=st.integers(1, 20), seed=st.integers(0, 2**31))
@costly
def test_every_field_agrees_with_scipy(n, more, seed):
    ours, numpys, jacobian = mild(n + more, n, seed)
    fit = least_squares(ours, torch.ones(n, dtype=torch.float64))
    peer = scipy.optimize.least_squares(
        numpys, np.ones(n), jacobian, xtol=1e-14, ftol=1e-14, gtol=1e-14
    )
    assert fit.success
    assert fit.cost == pytest.approx(peer.cost, rel=1e-9, abs=1e-20)
    spread = np.linalg.norm(np.linalg.pinv(jacobian(peer.x)), 2)  # of x per unit of residual
    assert np.abs(fit.x.numpy() - peer.x).max() <= 1e-5 * spread
    x = fit.x.numpy()
    J, r = jacobian(x), numpys(x)
    size = np.abs(J).max() * np.abs(r).max()
    assert fit.fun.numpy() == pytest.approx(r, abs=1e-12)
    assert fit.jac.numpy() == pytest.approx(J, rel=1e-9, abs=1e-12)
    assert fit.grad.numpy() == pytest.approx(J.T @ r, abs=1e-12 * (1 + size))
    assert fit.optimality == fit.grad.abs().max().item()
    expected = r @ r / more * np.linalg.inv(J.T @ J)
    # The inverse loses the square of the condition of J, which stays below 1e4 or so.
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert np.abs(fit.covariance.numpy() - expected).max() <= 1e-6 * scale.max()


@given(ks=st.tuples(*[st.integers(-30, 30)] * 3), k=st.integers(-30, 30), seed=st.integers(0, 99))
@costly
def test_units_of_parameters_and_residuals_do_not_change_the_fit(ks, k, seed):
    residuals, guess, _ = decay(20, seed)
    units, unit = torch.tensor([2.0**i for i in ks], dtype=torch.float64), 2.0**k
    plain = least_squares(residuals, guess, gtol=0)
    x0 = units * torch.tensor(guess, dtype=torch.float64)
    scaled = least_squares(lambda x: unit * residuals(x / units), x0, gtol=0)
    assert torch.equal(scaled.x, units * plain.x)
    assert torch.equal(scaled.covariance, units[:, None] * units * plain.covariance)
    assert scaled.cost == unit**2 * plain.cost
    assert (scaled.nit, scaled.nfev, scaled.products) == (plain.nit, plain.nfev, plain.products)


@given(m=st.integers(4, 12), seed=st.integers(0, 2**31))
@costly
def test_a_parameter_counted_twice_lowers_the_rank(m, seed):
    draw = torch.Generator().manual_seed(seed)
    B = torch.randn(m, 2, generator=draw, dtype=torch.float64)
    b = torch.randn(m, generator=draw, dtype=torch.float64)
    units = torch.tensor([1.0, 1e8, 1e8], dtype=torch.float64)  # not the cause of a low rank
    J = torch.stack([B[:, 0], B[:, 1], B[:, 1]], 1) / units
    fit = least_squares(lambda x: J @ x - b, units)
    assert fit.success
    assert fit.rank == 2
    assert bool(fit.covariance.isfinite().all())
    S = (J * units).numpy()
    r = fit.fun.numpy()
    expected = r @ r / (m - 3) * np.linalg.pinv(S.T @ S, rcond=1e-10)
    shown = (fit.covariance / units / units[:, None]).numpy()
    assert np.abs(shown - expected).max() <= 1e-6 * np.abs(expected).max()
    assert "determine 2 of 3" in str(fit)


def test_float32_fits_to_a_hundredth_of_a_standard_error():
    for seed in range(10):
        residuals, guess, _ = decay(30, seed, torch.float32)
        narrow = least_squares(residuals, torch.tensor(guess, dtype=torch.float32))
        wide = least_squares(decay(30, seed)[0], guess)
        assert narrow.success
        assert narrow.x.dtype == torch.float32
        assert narrow.covariance.dtype == torch.float64
        errors = wide.covariance.diagonal().sqrt()
        assert bool(((narrow.x - wide.x).abs() <= 0.01 * errors).all())
        assert torch.allclose(narrow.covariance, wide.covariance, rtol=1e-2)


@pytest.mark.parametrize("shape", [(-1,), (4, 5), (20, 1), (2, 2, 5)])
def test_residuals_and_parameters_of_any_shape(shape):
    residuals, guess, _ = decay(20, 3)
    plain = least_squares(residuals, guess)
    named = least_squares(
        lambda x: residuals([*x["a"], x["b"][0], x["c"]]).reshape(shape),
        {"a": [guess[0]], "b": (torch.tensor(guess[1]).double(),), "c": guess[2]},
    )
    assert list(named.x) == ["a", "b", "c"]
    assert type(named.x["b"]) is tuple
    assert named.x["a"].shape == (1,)
    assert named.x["c"].shape == ()
    flat = torch.stack([named.x["a"][0], named.x["b"][0], named.x["c"]])
    assert flat.allclose(plain.x, rtol=1e-8)
    assert named.jac.shape == (20, 3)
    assert named.fun.numel() == 20
    assert named.covariance.allclose(plain.covariance, rtol=1e-6)
    assert named.grad["b"][0].shape == ()


def test_calls_are_counted_and_x0_is_not_modified():
    residuals, guess, _ = decay(20, 5)
    calls, x0 = [], torch.tensor(guess, dtype=torch.float64)

    def fun(x):
        calls.append(x)
        return residuals(x)

    fit = least_squares(fun, x0)
    assert fit.nfev == len(calls)
    assert x0.tolist() == guess
    assert (
        0 < fit.products <= 3 * (fit.nit + 1)
    )  # a step solves exactly in the space of 3 parameters


def test_a_linear_fit_takes_one_undamped_step():
    A = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    y = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    fit = least_squares(lambda x: A @ x - y, [1.0, 1.0])
    assert fit.x.tolist() == pytest.approx([5 / 6, 1.5])
    # By hand: (A'A)^-1 = [[5, -3], [-3, 3]] / 6, and the squared residuals sum to 1/6.
    assert fit.covariance.flatten().tolist() == pytest.approx([5 / 36, -3 / 36, -3 / 36, 3 / 36])


@pytest.mark.parametrize("name", ["ftol", "xtol", "gtol"])
def test_each_tolerance_ends_a_fit_at_the_first_step_that_meets_it(name):
    residuals, guess, _ = decay(20, 5, noise=0.3)
    off, seen = {"ftol": 0.0, "xtol": 0.0, "gtol": 0.0}, []
    least_squares(residuals, guess, **off, callback=lambda *step: seen.append(step))
    D = 1 / torch.tensor(guess, dtype=torch.float64)
    points, infos = [1 / D, *(x for x, _ in seen)], [info for _, info in seen]
    numbers = {
        "ftol": [i.actual_reduction / i.loss if i.rho > 0.25 else math.inf for i in infos],
        "xtol": [
            smallest((D * (new - old)).norm().item(), (D * old).norm().item())
            for old, new in itertools.pairwise(points)
        ],
        "gtol": [gradient(residuals, x).abs().max().item() for x in points[1:]],
    }[name]
    for k in range(1, 8):
        lowest = min(numbers[:k])
        if 1e-9 < numbers[k] < lowest / 1.1:
            fit = least_squares(residuals, guess, **{**off, name: 1.01 * numbers[k]})
            assert fit.nit == k + 1
            assert fit.success
            assert fit.status is Status.CONVERGED
            assert fit.message.startswith("Converged: ")
            assert f"and {name} is" in fit.message
            assert least_squares(residuals, guess, **{**off, name: 0.99 * numbers[k]}).nit > k + 1


def smallest(length, size):
    """Return the least xtol that a step meets: length = xtol (xtol + size)."""
    return 2 * length / (size + math.sqrt(size**2 + 4 * length))


def gradient(residuals, x):
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(0.5 * residuals(x).square().sum(), x)
    return g


def test_a_fit_that_rounding_ends_is_no_failure():
    residuals, guess, _ = decay(20, 5)

    def rounded(x):  # Every trial costs more than its exact cost, by far less than a digit.
        return residuals(x) * (1.0 if torch.is_grad_enabled() else 1.0 + 1e-9)

    fit = least_squares(rounded, guess)
    assert fit.success
    assert fit.status is Status.CONVERGED
    assert "no step reduces the cost" in fit.message
    assert fit.x.allclose(least_squares(residuals, guess).x, rtol=1e-4)


def test_a_wrong_derivative_is_a_failure():
    residuals, guess, _ = decay(20, 5)

    def wrong(x):
        r = residuals(x)
        return 2 * r.detach() - r  # the right values, and the derivative with the wrong sign

    fit = least_squares(wrong, guess)
    assert (fit.success, fit.status) == (False, Status.REJECTED_RATIO)
    assert fit.x.tolist() == guess


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_residuals_that_are_not_finite_at_the_start(value):
    fit = least_squares(lambda x: value * torch.cat([x, x]), [1.0, 2.0])
    assert (fit.success, fit.status, fit.nit) == (False, Status.NONFINITE_LOSS, 0)
    assert fit.x.tolist() == [1.0, 2.0]
    assert "NaN or infinite" in fit.message
    with pytest.raises(ValueError, match="contain a NaN or an infinity at x"):
        _ = fit.covariance
    assert "nonfinite_loss" in str(fit)


def test_the_limit_and_the_callback_end_a_fit_without_success():
    residuals, guess, _ = decay(20, 5)
    short = least_squares(residuals, guess, max_iter=1)
    assert (short.success, short.status, short.nit) == (False, Status.MAX_ITER, 1)

    def stop(x, info):
        raise StopIteration

    ended = least_squares(residuals, guess, callback=stop)
    assert (ended.success, ended.nit, ended.status) == (False, 1, Status.ACCEPTED)
    assert torch.equal(short.x, ended.x)


def test_a_guess_of_zero_and_given_sizes():
    residuals, guess, _ = decay(30, 1)
    best = least_squares(residuals, guess).x
    for x0, scale in [
        ([0.0, 0.0, 0.0], None),
        (guess, 1.0),
        (guess, [1.0, 2.0, 3.0]),
        (guess, torch.tensor(guess)),
    ]:
        fit = least_squares(residuals, x0, x_scale=scale)
        assert fit.success
        assert fit.x.allclose(best, rtol=1e-6)


def test_a_first_damping_is_never_too_large_to_move():
    far = least_squares(lambda x: torch.cat([x - 1e9, 0.5 * x - 5e8]), [1.0])
    assert far.x.item() == pytest.approx(1e9)

    def brown(x):
        return torch.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])

    assert least_squares(brown, [1.0, 1.0]).x.tolist() == pytest.approx([1e6, 2e-6])


def test_covariance_needs_more_residuals_than_parameters():
    fit = least_squares(lambda x: x**2 - 2, [1.0, 1.0])
    assert fit.success
    assert fit.rank == 2
    with pytest.raises(ValueError, match=r"more residuals than parameters.* m = 2 and n = 2"):
        _ = fit.covariance
    assert "+-" not in str(fit)


def test_a_jacobian_that_is_too_large_is_left_out():
    fit = least_squares(lambda x: torch.cat([x, x]) - 1, torch.zeros(1001))
    assert fit.success
    assert fit.jac is None
    with pytest.raises(ValueError, match="1,000 columns"):
        _ = fit.covariance
    assert "... and 991 more" in str(fit)


@pytest.mark.parametrize(
    ("fun", "error", "words"),
    [
        (lambda x: x.square().sum(), ValueError, r"shape \(\).*not the sum of their squares"),
        (lambda x: x[:0], ValueError, r"residuals, got a tensor of shape \(0,\)"),
        (lambda x: x.detach().numpy(), TypeError, "real tensor that torch computes, got a ndarray"),
        (lambda x: x.tolist(), TypeError, "got a list"),
        (lambda x: x.to(torch.cfloat), TypeError, "got a tensor of torch.complex64"),
        (lambda _: torch.ones(3), ValueError, "does not depend on x"),
        (lambda _: torch.ones(3, requires_grad=True), ValueError, "does not depend on x"),
    ],
)
def test_wrong_residuals_are_refused(fun, error, words):
    with pytest.raises(error, match=words):
        least_squares(fun, [1.0, 2.0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ftol": -1e-8}, "ftol must be finite and not negative, got -1e-08"),
        ({"xtol": math.nan}, "xtol must be finite"),
        ({"gtol": None}, "gtol must be a number, got None"),
        ({"max_iter": 1.5}, "max_iter must be an integer"),
        ({"x_scale": 0.0}, "x_scale must hold positive finite numbers"),
        ({"x_scale": [1.0, 2.0, 3.0]}, r"the shapes \[\(2,\)\] of x0, got \[\(3,\)\]"),
    ],
)
def test_wrong_options_are_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        least_squares(lambda x: torch.cat([x, x]) - 1, [1.0, 2.0], **options)


def test_the_result_prints_standard_errors():
    residuals, guess, _ = decay(20, 5)
    fit = least_squares(residuals, guess)
    error = fit.covariance[0, 0].sqrt().item()
    assert f"         x: {fit.x[0].item():.10g} +- {error:.2g}" in str(fit)
    assert "      cost: " in str(fit)
