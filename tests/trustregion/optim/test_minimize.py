"""minimize: the minimum against scipy's, the structure of x, counts, ends and errors."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies import costly
from trustregion import OptimizeResult, Status, StepInfo, least_squares, minimize


def rosenbrock(x):
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def convex(n, seed, dtype=torch.float64):
    """A log-sum-exp with a quadratic: strictly convex, so that it has one minimum."""
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(3 * n, n, generator=draw, dtype=torch.float64).to(dtype)
    b = torch.randn(3 * n, generator=draw, dtype=torch.float64).to(dtype)
    return lambda x: torch.logsumexp(A @ x + b, 0) + 0.05 * x.square().sum()


def scipy_value(fun):
    """Return scipy's form of a function: (value, gradient) of an array."""

    def both(x):
        x = torch.tensor(x, requires_grad=True)
        value = fun(x)
        return value.item(), torch.autograd.grad(value, x)[0].numpy()

    return both


@given(n=st.integers(1, 8), seed=st.integers(0, 2**31))
@costly
def test_it_finds_the_minimum_that_scipy_finds(n, seed):
    fun = convex(n, seed)
    result = minimize(fun, torch.ones(n, dtype=torch.float64), gtol=1e-9)
    peer = scipy.optimize.minimize(scipy_value(fun), np.ones(n), jac=True, options={"gtol": 1e-9})
    assert result.success
    assert result.optimality <= 1e-9
    assert result.x.numpy() == pytest.approx(peer.x, abs=1e-6)  # BFGS ends at about its gtol
    assert result.fun.item() == pytest.approx(peer.fun, rel=1e-12)
    value, gradient = scipy_value(fun)(result.x.numpy())
    assert result.fun.item() == value
    assert np.array_equal(result.jac.numpy(), gradient)
    assert torch.equal(result.jac, result.grad)
    assert result.optimality == np.abs(gradient).max()


@given(k=st.integers(-20, 20), seed=st.integers(0, 2**31))
@costly
def test_units_of_x_and_of_the_value_do_not_change_the_search(k, seed):
    fun, unit = convex(4, seed), 2.0**k
    x0 = torch.ones(4, dtype=torch.float64)
    plain = minimize(fun, x0, gtol=1e-8)
    # The gradient stays as it is, on which the tolerance of a solve depends.
    scaled = minimize(lambda x: unit * fun(x / unit), unit * x0, gtol=1e-8, radius=unit)
    assert torch.equal(scaled.x, unit * plain.x)
    assert (scaled.nit, scaled.nfev, scaled.products) == (plain.nit, plain.nfev, plain.products)


def test_it_leaves_a_saddle_and_a_maximum_behind():
    result = minimize(lambda x: (x[0] ** 2 - 1) ** 2 + (x[1] ** 2 - 4) ** 2, [0.01, -0.01])
    assert result.success
    assert result.x.abs().tolist() == pytest.approx([1.0, 2.0])


def apply(structure, f):
    if isinstance(structure, dict):
        return {key: apply(part, f) for key, part in structure.items()}
    if isinstance(structure, (list, tuple)):
        return type(structure)(apply(part, f) for part in structure)
    return f(structure)


def flatten(structure):
    if isinstance(structure, torch.Tensor):
        return [structure]
    parts = structure.values() if isinstance(structure, dict) else structure
    return [leaf for part in parts for leaf in flatten(part)]


leaf = st.lists(st.integers(1, 3), max_size=2).map(lambda shape: torch.ones(shape).double())
structures = st.recursive(
    leaf,
    lambda inner: (
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=2)
        | st.lists(inner, min_size=1, max_size=2)
        | st.lists(inner, min_size=1, max_size=2).map(tuple)
    ),
    max_leaves=4,
)


@given(structures)
@costly
def test_x_keeps_the_structure_of_x0_which_is_not_modified(x0):
    seen = []

    def fun(x):
        seen.append(apply(x, lambda t: tuple(t.shape)))
        return sum((i - leaf).square().sum() for i, leaf in enumerate(flatten(x)))

    shapes = apply(x0, lambda t: tuple(t.shape))
    result = minimize(fun, x0)
    assert result.success
    assert apply(result.x, lambda t: tuple(t.shape)) == shapes
    assert apply(result.jac, lambda t: tuple(t.shape)) == shapes
    assert all(shape == shapes for shape in seen)
    assert len(seen) == result.nfev
    for i, found in enumerate(flatten(result.x)):
        assert found.allclose(torch.full_like(found, i))
        assert not found.requires_grad
    assert all(bool((t == 1).all()) and not t.requires_grad for t in flatten(x0))


@pytest.mark.parametrize(
    "x0",
    [
        [-1.2, 1],
        (-1.2, 1),
        np.array([-1.2, 1.0]),
        np.array([-1.2, 1.0], dtype=np.float32),
        [np.float64(-1.2), 1.0],
        torch.tensor([-1.2, 1.0], requires_grad=True),
        torch.nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64)),
    ],
    ids=["list", "tuple", "array", "float32 array", "numpy numbers", "leaf", "parameter"],
)
def test_x0_may_be_numbers_an_array_or_a_leaf(x0):
    result = minimize(rosenbrock, x0)
    assert type(result.x) is torch.Tensor
    assert result.x.shape == (2,)
    assert result.x.dtype == (x0.dtype if isinstance(x0, torch.Tensor) else torch.float64)
    assert result.x.tolist() == pytest.approx([1.0, 1.0], abs=1e-4)  # float32 once
    if isinstance(x0, np.ndarray):
        assert x0.tolist() == pytest.approx([-1.2, 1.0])
        assert x0.dtype in (np.float32, np.float64)


def test_a_parameter_that_the_function_ignores_stays():
    result = minimize(lambda x: (x["a"] - 3).square().sum(), {"a": [0.0], "b": [7.0]})
    assert result.success
    assert (result.x["a"].item(), result.x["b"].item()) == (pytest.approx(3.0), 7.0)


@given(st.integers(0, 2**31))
@costly
def test_float32_ends_within_rounding(seed):
    result = minimize(convex(4, seed, torch.float32), torch.ones(4), gtol=0)
    wide = minimize(convex(4, seed), torch.ones(4).double())
    assert result.success
    assert result.x.dtype == torch.float32
    # The value is flat within its rounding over a distance of the square root of it.
    assert result.x.tolist() == pytest.approx(wide.x.tolist(), abs=1e-2)


def test_a_gradient_that_the_precision_does_not_allow_is_no_success():
    result = minimize(rosenbrock, torch.tensor([-1.2, 1.0]), gtol=1e-9)
    assert result.x.tolist() == pytest.approx([1.0, 1.0], abs=1e-3)
    if not result.success:  # as on x86
        assert result.status is Status.REJECTED_RATIO
        assert f"gradient is {result.optimality:.3g}, and gtol is 1e-09" in result.message


def test_random_numbers_and_grad_mode_stay():
    state = torch.get_rng_state()
    with torch.no_grad():
        result = minimize(rosenbrock, [-1.2, 1.0])
        assert result.success
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("find", [minimize, least_squares])
def test_inference_mode_is_refused(find):
    with torch.inference_mode(), pytest.raises(RuntimeError, match="outside of it"):
        find(lambda x: x, [1.0])


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_the_limit_on_steps_is_no_success(limit):
    result = minimize(rosenbrock, [-1.2, 1.0], max_iter=limit)
    assert (result.success, result.status, result.nit) == (False, Status.MAX_ITER, limit)
    assert result.message == str(Status.MAX_ITER)
    assert result.fun.item() == rosenbrock(result.x).item()


def test_the_last_step_of_the_limit_may_converge():
    def bowl(x):
        return x.square().sum()

    result = minimize(bowl, [0.5, 0.5], max_iter=1)
    assert result.success
    assert result.nit == 1
    assert result.x.tolist() == pytest.approx([0.0, 0.0], abs=1e-15)


def test_a_start_that_is_stationary_is_a_success():
    result = minimize(lambda x: x.square().sum(), [0.0])
    assert (result.success, result.status, result.nit) == (True, Status.STATIONARY, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_at_the_start(value):
    result = minimize(lambda x: value * x.sum(), [1.0, 2.0])
    assert (result.success, result.status) == (False, Status.NONFINITE_LOSS)
    assert result.x.tolist() == [1.0, 2.0]
    assert result.nit == 0
    assert "NaN or infinite" in result.message


def test_values_that_are_not_finite_further_on_are_avoided():
    result = minimize(lambda x: (x - x.log()).sum(), [0.05], radius=10.0)
    assert result.success
    assert result.x.item() == pytest.approx(1.0)


def test_a_function_that_does_not_repeat_is_a_failure():
    calls = iter(range(1000))
    with pytest.warns(UserWarning, match="does not repeat"):
        result = minimize(lambda x: (x - 1).square().sum() + 10 * next(calls), [3.0])
    assert (result.success, result.status) == (False, Status.NOT_REPRODUCIBLE)
    assert result.x.item() == 3.0


def test_the_callback_sees_every_step_and_may_end_the_search():
    seen = []
    whole = minimize(rosenbrock, [-1.2, 1.0], callback=lambda *s: seen.append(s))
    assert len(seen) == whole.nit
    assert torch.equal(seen[-1][0], whole.x)
    assert all(isinstance(info, StepInfo) and info.accepted for _, info in seen)
    assert not any(x.requires_grad for x, _ in seen)

    def stop(x, info):
        if info.new_loss < 1:
            raise StopIteration

    part = minimize(rosenbrock, [-1.2, 1.0], callback=stop)
    assert 0 < part.nit < whole.nit
    assert 0 < part.fun.item() < 1
    assert (part.success, part.message) == (False, "The callback ended the search.")


def test_an_error_in_the_function_is_raised_as_it_is():
    with pytest.raises(ZeroDivisionError):
        minimize(lambda x: x.sum() * (1 // 0), [1.0])


@pytest.mark.parametrize(
    ("x0", "error", "words"),
    [
        (torch.tensor([1, 2]), TypeError, "x0 must be float32 or float64, got torch.int64"),
        (torch.ones(2, dtype=torch.cfloat), TypeError, "got torch.complex64"),
        ({"w": torch.ones(2).half()}, TypeError, r"x0\['w'\] must be float32 or float64"),
        ("12", TypeError, "x0 must be a tensor, numbers or an array.* got a str"),
        ([{"a": None}], TypeError, r"x0\[0\]\['a'\] must be .* got a NoneType"),
        ([], ValueError, "at least one number"),
        ({}, ValueError, "at least one number"),
        ([1.0, math.nan], ValueError, "x0 must be finite"),
        ([torch.ones(1), torch.ones(1).double()], ValueError, "share one dtype"),
    ],
)
def test_a_wrong_x0_is_refused(x0, error, words):
    with pytest.raises(error, match=words):
        minimize(lambda x: x.sum(), x0)


@pytest.mark.parametrize(
    ("fun", "error", "words"),
    [
        (lambda x: x.sum().item(), TypeError, "fun must return a real tensor.* got a float"),
        (lambda x: x.detach().numpy().sum(), TypeError, "got a float"),
        (lambda x: (x.sum(), x), TypeError, "got a tuple"),
        (lambda x: (x > 0).sum(), TypeError, "got a tensor of torch.int64"),
        (lambda x: x, ValueError, r"one number, got a tensor of shape \(2,\).*least_squares"),
        (lambda _: torch.zeros(()), ValueError, "does not depend on x"),
        (lambda x: x.detach().sum(), ValueError, "does not depend on x"),
        (lambda _: torch.ones(1, requires_grad=True).sum(), ValueError, "does not depend on"),
    ],
)
def test_a_wrong_function_is_refused(fun, error, words):
    with pytest.raises(error, match=words):
        minimize(fun, [1.0, 2.0])


@pytest.mark.parametrize("options", [{"gtol": -1.0}, {"radius": 0.0}, {"max_iter": -1}])
@pytest.mark.parametrize("bad", [None, "1"])
def test_wrong_options_are_refused_by_name(options, bad):
    (name, value), *_ = options.items()
    with pytest.raises((ValueError, TypeError), match=name):
        minimize(rosenbrock, [0.0, 0.0], **{name: value if bad is None else bad})


def test_the_result_is_a_frozen_record_that_prints():
    result = minimize(rosenbrock, [-1.2, 1.0])
    assert isinstance(result, OptimizeResult)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.success = False
    lines = str(result).splitlines()
    assert lines[0].startswith("   message: Converged: the largest entry of the gradient is")
    assert "   success: True" in lines
    assert f"      nfev: {result.nfev}" in lines
    assert not any("+-" in line for line in lines)
    assert "... and 40 more" in str(minimize(lambda x: x.square().sum(), torch.ones(50)))
    with pytest.raises(ValueError, match="call least_squares"):
        _ = result.covariance
