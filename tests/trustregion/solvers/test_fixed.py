"""The form of cg for vmap and compile: the same numbers, one system or many."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call, jvp, vjp, vmap

from strategies import DTYPES, POSITIVE, systems
from trustregion import Status, cg
from trustregion.solvers import fixed_cg

# torch 2.13 uses its own deprecated torch.jit.script when it first needs a jvp, and to compile
script_is_deprecated = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")


KINDS = [*POSITIVE, "sign-mixed", "rank-deficient"]


@given(systems(kinds=KINDS, max_n=20, max_log_condition=2), st.integers(1, 8))
def test_the_numbers_are_those_of_cg(system, k):
    rtol = 1e-3
    plain = cg(system.A, system.b, rtol=rtol, max_iter=k)
    fixed = fixed_cg(system.A, system.b, k, rtol=rtol)
    if plain.products > plain.iterations + (plain.direction is not None):
        return  # cg has measured its residual and gone on
    assert fixed.iterations == plain.iterations
    # sums of products in another order, amplified over the iterations by the condition at most
    rounding = 100 * system.eps * system.condition
    assert (fixed.x - plain.x).norm() <= rounding * plain.x.norm()
    assert fixed.curvature.item() == pytest.approx(plain.curvature, rel=rounding)
    assert fixed.model_value.item() == pytest.approx(plain.model_value, rel=rounding)
    assert bool(fixed.failed) == (plain.direction is not None)
    assert bool(fixed.converged) == (plain.status is Status.CONVERGED)


@given(systems(max_log_condition=2, max_n=12), st.integers(1, 5))
def test_warm_starts_and_preconditioners(system, k):
    M = torch.diag(1 / system.A.diagonal())
    x0 = system.b / system.scale
    plain = cg(system.A, system.b, x0, M=M, rtol=0.0, max_iter=k)
    fixed = fixed_cg(system.A, system.b, k, x0=x0, M=M)
    if plain.products == plain.iterations + 1:
        gap = (fixed.x - plain.x).norm()
        assert gap <= 1e3 * system.eps * system.condition * plain.x.norm()


def test_each_of_many_systems_stops_by_itself():
    conditions = [0, 1, 2, 3]
    A = torch.stack([torch.diag(torch.logspace(0, c, 30, dtype=torch.float64)) for c in conditions])
    b = torch.ones(4, 30, dtype=torch.float64) * torch.tensor([[1.0], [1e-6], [1e6], [0.0]])
    many = vmap(lambda A, b: fixed_cg(A, b, 60, rtol=1e-8))(A, b)
    for i in range(4):
        alone = cg(A[i], b[i], rtol=1e-8)
        gap = (many.x[i] - alone.x).norm()
        assert gap <= 2e-8 * 10 ** conditions[i] * alone.x.norm()  # rtol times the condition
        assert many.iterations[i] == alone.iterations
    assert many.converged.all()
    assert not many.failed.any()


def test_a_failing_system_does_not_touch_its_neighbours():
    A = torch.stack([torch.eye(3), torch.diag(torch.tensor([1.0, -1.0, 2.0])), torch.eye(3)])
    b = torch.ones(3, 3)
    A[2, 0, 0] = math.nan
    many = vmap(lambda A, b: fixed_cg(A, b, 5, rtol=1e-6))(A, b)
    assert many.x.isfinite().all()
    assert many.failed.tolist() == [False, True, True]
    torch.testing.assert_close(many.x[0], torch.ones(3))


@script_is_deprecated
def test_natural_gradients_of_an_ensemble_at_once():
    """Eight stacked networks, one vmap: each direction is the one its own network gets from cg."""
    torch.manual_seed(0)
    nets = [torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
            for _ in range(8)]  # fmt: skip
    params, _ = torch.func.stack_module_state(nets)
    x, y = torch.randn(32, 3), torch.randint(4, (32,))
    names, shapes = list(params), [p.shape[1:] for p in params.values()]
    sizes = [shape.numel() for shape in shapes]

    def logits(theta):
        parts = zip(names, theta.split(sizes), shapes, strict=True)
        return functional_call(nets[0], {n: t.view(s) for n, t, s in parts}, (x,))

    def system(theta):
        out, pullback = vjp(logits, theta)
        p = out.softmax(-1)
        (g,) = pullback((p - torch.nn.functional.one_hot(y, 4)) / len(x))

        def damped_fisher(v):
            _, u = jvp(logits, (theta,), (v,))
            (Fv,) = pullback((p * u - p * (p * u).sum(-1, keepdim=True)) / len(x))
            return Fv + 1e-2 * v

        return damped_fisher, g

    stacked = torch.cat([p.detach().flatten(1) for p in params.values()], dim=1)
    many = vmap(lambda theta: fixed_cg(*system(theta), 10))(stacked)
    assert many.x.shape == stacked.shape
    for i, theta in enumerate(stacked):
        alone = cg(*system(theta), rtol=0.0, max_iter=10)
        # float32 products in another order, over ten iterations at a condition of 100
        torch.testing.assert_close(many.x[i], alone.x, rtol=1e-3, atol=1e-4 * alone.x.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_as_one_graph(dtype):
    """``backend="eager"``: the capture is what can fail; the slow test generates code too."""
    A, b = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=dtype)), torch.ones(3, dtype=dtype)
    compiled = torch.compile(lambda A, b: fixed_cg(A, b, 3), fullgraph=True, backend="eager")
    assert torch.equal(compiled(A, b).x, fixed_cg(A, b, 3).x)


@script_is_deprecated
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_compiled_to_code():
    A, b = torch.diag(torch.tensor([1.0, 2.0, 4.0])), torch.ones(3)
    compiled = torch.compile(lambda A, b: fixed_cg(A, b, 3), fullgraph=True)
    torch.testing.assert_close(compiled(A, b).x, fixed_cg(A, b, 3).x)


def test_failures_are_those_of_cg():
    ones = torch.ones(2)
    below_rounding = fixed_cg(torch.diag(torch.tensor([1.0, 1e-9])), ones, 5)
    assert below_rounding.failed
    assert below_rounding.x.abs().max() < 3
    assert fixed_cg(torch.eye(2), ones, 5, M=-torch.eye(2)).failed
    assert not fixed_cg(torch.eye(2), ones, 5, rtol=1e-6).failed


@pytest.mark.parametrize("power", [-1000, -600, 600, 1000])
def test_no_scale_of_the_right_hand_side_is_out_of_reach(power):
    A = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    b = torch.full((3,), 2.0**power, dtype=torch.float64)
    solution = fixed_cg(A, b, 4, rtol=1e-12)
    assert solution.converged
    torch.testing.assert_close(solution.x, b / A.diagonal(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_inputs_and_results_fail_in_numbers(bad):
    b = torch.tensor([1.0, bad])
    for solution in (
        fixed_cg(torch.eye(2), b, 3),
        fixed_cg(torch.eye(2), torch.ones(2), 3, x0=b),
        fixed_cg(1e-30 * torch.eye(2), torch.full((2,), 1e30), 3),
    ):
        assert solution.failed
        assert not solution.converged
        assert not solution.x.any()
        assert not solution.curvature.isnan()
        assert not solution.model_value.isnan()
    assert fixed_cg(torch.zeros(0, 0), torch.zeros(0), 2).x.shape == (0,)


def test_gradients_flow_through_it():
    A = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64)).requires_grad_()
    b = torch.ones(2, dtype=torch.float64)
    fixed_cg(A, b, 2).x.sum().backward()
    exact = -torch.outer(1 / A.detach().diagonal(), 1 / A.detach().diagonal())
    torch.testing.assert_close(A.grad.diagonal(), exact.diagonal())  # -x y' with A y = 1


@pytest.mark.parametrize("power", [-40, -7, 3, 40])
@given(system=systems(max_n=10))
def test_scaling_by_powers_of_two_is_exact(system, power):
    factor = 2.0**power
    x = fixed_cg(system.A, system.b, 4, rtol=1e-6).x
    assert torch.equal(fixed_cg(system.A, system.b * factor, 4, rtol=1e-6).x, x * factor)
    assert torch.equal(fixed_cg(system.A * factor, system.b, 4, rtol=1e-6).x, x / factor)


@given(
    st.lists(st.floats(width=32), min_size=9, max_size=9),
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=3),
    st.sampled_from(DTYPES),
)
def test_no_operator_gives_a_nan(entries, b, dtype):
    A = torch.tensor(entries, dtype=dtype).view(3, 3)
    solution = fixed_cg(A, torch.tensor(b, dtype=dtype), 4)
    assert not solution.x.isnan().any()
    assert not solution.residual_norm.isnan()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fixed_cg(torch.eye(2), torch.ones(2), -1), ValueError, "iterations"),
        (lambda: fixed_cg(torch.eye(2), torch.ones(2), 1, rtol=-1.0), ValueError, "rtol"),
        (lambda: fixed_cg(torch.eye(3), torch.ones(2), 1), ValueError, "does not fit"),
        (lambda: fixed_cg(torch.eye(2), torch.ones(2, 2), 1), ValueError, "vector of shape"),
        (lambda: fixed_cg(torch.eye(2), [1.0, 2.0], 1), TypeError, "got list"),
    ],
)
def test_wrong_arguments_are_refused_in_words(call, error, words):
    with pytest.raises(error, match=words):
        call()
