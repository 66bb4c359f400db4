"""The gate keeps a preconditioner only where it pays."""

import math

import pytest
import torch
from hypothesis import given

from counting import Counting
from gate_cases import B, Given, N
from preconditioner_rules import spread
from strategies import systems
from trustregion import (
    Identity,
    Jacobi,
    Nystrom,
    Status,
    cg,
)
from trustregion.operators import DenseOperator, FunctionOperator
from trustregion.preconditioners import Gated, Recycled


def gate(rule, A=None, times=1, b=B, retest=50, max_iter=10, rtol=1e-5):
    gated = Gated(rule, retest=retest)
    A = DenseOperator(spread()) if A is None else A
    solves = [gated.solve(A, b, 0.0, rtol=rtol, max_iter=max_iter) for _ in range(times)]
    return gated, solves


# -- what is kept and what is not


def test_the_true_inverse_is_kept():
    gated, (first, second) = gate(Given(torch.linalg.inv(spread())), times=2)
    assert gated.enabled is True
    assert gated.gain > 1
    assert first.status is second.status is Status.CONVERGED
    assert first.iterations == second.iterations == 1
    assert str(gated) == f"Given on: gain {gated.gain:.2g}"


@pytest.mark.parametrize(
    "matrix",
    [
        spread(high=6.0, seed=1),
        torch.linalg.inv(spread(high=4.0, seed=2)),  # of the wrong matrix
        spread(),  # the operator instead of its inverse
    ],
)
def test_a_harmful_one_is_switched_off(matrix):
    gated, solves = gate(Given(matrix), times=3)
    plain = cg(spread(), B, max_iter=10)
    assert gated.enabled is False
    assert 0 <= gated.gain < 1
    assert str(gated) == f"Given off: gain {gated.gain:.2g}"
    assert gated.preconditioner.builds == 1
    for solve in solves:  # the better of the two, also in the test
        assert torch.equal(solve.x, plain.x)
        assert solve.model_value == plain.model_value


@pytest.mark.parametrize("matrix", [-torch.eye(N), torch.zeros(N, N), torch.full((N, N), math.nan)])
def test_one_that_is_not_positive_definite_is_switched_off(matrix):
    gated, (solve,) = gate(Given(matrix.double()))
    assert (gated.enabled, gated.gain) == (False, 0.0)
    assert torch.equal(solve.x, cg(spread(), B, max_iter=10).x)


def test_one_that_breaks_down_is_tested_at_once():
    rule = Given(torch.linalg.inv(spread()))
    gated, _ = gate(rule, times=2)
    assert gated.enabled
    rule.matrix = rule.matrix * math.nan
    solve = gated.solve(DenseOperator(spread()), B, 0.0, max_iter=10)
    assert gated.enabled is False
    assert torch.equal(solve.x, cg(spread(), B, max_iter=10).x)


# Takes off what is above 2000: some gain at the same number of iterations.
HELP = torch.linalg.matrix_power(torch.eye(N, dtype=torch.float64) + 0.0005 * spread(), -1)


def test_the_declared_cost_of_an_application_decides():
    free, _ = gate(Given(HELP))
    assert free.enabled
    dear, _ = gate(Given(HELP, work=4.0))
    assert not dear.enabled
    assert dear.gain < free.gain


def test_the_declared_cost_of_a_build_decides():
    for cost in ({"products": 8}, {"overhead": 8.0}):
        dear, _ = gate(Given(HELP, **cost))
        assert not dear.enabled
        shared, _ = gate(Given(HELP, every=8, **cost))
        assert shared.enabled
        for more in ({"products": 10}, {"overhead": 10.0}):
            none, _ = gate(Given(torch.linalg.inv(spread()), **more))
            assert (none.enabled, none.gain) == (False, 0.0)


def at_same_work(k, build=0.0, work=0.0, M=HELP):
    """The definition, worked out by hand."""
    plain = cg(spread(), B, max_iter=k, rtol=0.0)
    afforded = int((k - build) / (1 + work))
    return cg(spread(), B, M=M, max_iter=afforded, rtol=0.0).model_value / plain.model_value


@pytest.mark.parametrize("k", [5, 9, 10])
def test_the_gain_is_that_of_the_definition(k):
    cases = [
        ({}, {}),
        ({"work": 0.5}, {"work": 0.5}),
        ({"overhead": 1.5}, {"build": 1.5}),
        ({"products": 3, "overhead": 1.0, "every": 4, "work": 0.25}, {"build": 1.0, "work": 0.25}),
        ({"products": 2, "work": 1.0}, {"build": 2.0, "work": 1.0}),
    ]
    for declared, expected in cases:
        gated, _ = gate(Given(HELP, **declared), max_iter=k, rtol=0.0)
        assert gated.gain == pytest.approx(at_same_work(k, **expected), rel=1e-12)


def test_where_both_solve_the_gain_is_that_of_work():
    A = DenseOperator(spread(high=1.0))
    plain = cg(A, B, max_iter=100)
    gated, _ = gate(
        Given(torch.linalg.inv(spread(high=1.0)), work=0.5, overhead=2.0), A, max_iter=100
    )
    assert plain.status is Status.CONVERGED
    assert gated.gain == pytest.approx(plain.products / (2.0 + 1.5))
    identity, _ = gate(Given(torch.eye(N).double()), A, max_iter=100)
    assert (identity.gain, identity.enabled) == (1.0, False)  # what brings nothing is not used


def test_a_reused_build_is_not_free():
    rule = Given(HELP, products=24, every=3)
    gated, _ = gate(rule, retest=4, times=5)  # the second test reuses a build
    assert gated.enabled is False
    rule = Given(torch.linalg.inv(spread()), products=15, every=3)
    gated, _ = gate(rule, retest=4, times=1)
    first = gated.gain
    A = DenseOperator(spread())
    for _ in range(4):
        gated.solve(A, B, 0.0, max_iter=10)
    assert rule.products == 0
    assert gated.gain == first


# -- tests of a preconditioner, and the solves between them


def test_every_product_is_counted():
    A = Counting(spread())
    gated = Gated(Given(HELP, products=1, work=0.2), retest=3)
    for _ in range(7):
        before = A.products
        assert gated.solve(A, B, 0.0, max_iter=10).products == A.products - before
    assert gated.enabled
    A.products = 0
    gated = Gated(Given(spread(), products=3), retest=3)
    spent = [gated.solve(A, B, 0.0, max_iter=10).products for _ in range(4)]
    assert A.products == sum(spent)
    assert spent[1:3] == [10, 10]
    assert spent[0] == spent[3] == 3 + 10 + 10 + 7


def test_tests_come_at_the_first_solve_and_every_so_often():
    rule = Given(spread())  # switched off, so that each build is a test
    gated, builds = Gated(rule, retest=4), []
    for _ in range(9):
        gated.solve(DenseOperator(spread()), B, 0.0, max_iter=10)
        builds.append(rule.builds)
    assert builds == [1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_it_flips_back_when_the_curvature_changes():
    one, other = spread(seed=3), spread(seed=4)
    gated = Gated(Given(torch.linalg.inv(one)), retest=3)
    states = []
    for matrix in [one, one, other, other, other, one, one, one, other, one]:
        gated.solve(DenseOperator(matrix), B, 0.0, max_iter=10)
        states.append(gated.enabled)
    assert states == [True] * 3 + [False] * 3 + [True] * 3 + [True]


def test_a_state_that_is_switched_off_is_forgotten():
    rule = Jacobi(0.75, probes=1, every=100)  # one probe tells little here
    gated, _ = gate(rule, retest=2)
    assert gated.enabled is False
    assert rule.state == {}
    on, _ = gate(Nystrom(30, every=1000), DenseOperator(spread(high=8.0)), max_iter=5)
    assert on.enabled
    assert "vectors" in on.preconditioner.state


def test_observations_are_those_of_the_solves_with_it_and_before_a_test():
    rule = Given(spread())
    gate(rule, times=5, retest=4)
    assert len(rule.told) == 3  # the test, the solve before the next, and that
    rule = Given(torch.linalg.inv(spread()))
    gate(rule, times=5, retest=4)
    assert len(rule.told) == 5


def test_recycled_directions_are_tested_once_there_are_some():
    d = torch.cat([torch.logspace(3, 4, 4), torch.linspace(1, 3, 296)]).double()
    A, b = DenseOperator(torch.diag(d)), torch.ones(300).double()
    gated, solves = gate(Recycled(4), A, times=1, b=b, max_iter=6)
    assert gated.enabled is None
    assert str(gated) == "Recycled: not tested yet"
    assert solves[0].products == 6
    for _ in range(2):
        solve = gated.solve(A, b, 0.0, max_iter=6)
    assert gated.enabled is True
    assert solve.products == 6
    assert solve.model_value < solves[0].model_value < 0


def test_a_system_without_an_iteration_is_no_test():
    nothing = torch.zeros(N, dtype=torch.float64)
    bad = FunctionOperator(lambda v: v * math.nan, N, torch.float64)
    A = DenseOperator(torch.diag(torch.logspace(0, 4, N, dtype=torch.float64)))
    gated = Gated(Jacobi(1.0, probes="exact", every=100))
    assert gated.solve(A, nothing, 0.0, max_iter=10).iterations == 0
    assert gated.enabled is None
    assert gated.solve(bad, B, 0.0, max_iter=10).status is Status.NONFINITE_OPERATOR
    assert gated.enabled is None
    gated.solve(A, B, 0.0, max_iter=10)
    assert gated.enabled is True


def test_the_answer_repeats_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    runs = [gate(Jacobi(every=5), times=4) for _ in range(2)]
    assert runs[0][0].gain == runs[1][0].gain
    for one, two in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.equal(one.x, two.x)
        assert one.products == two.products
    assert torch.equal(torch.get_rng_state(), state)


@given(systems(kinds=["log-uniform", "rank-deficient", "sign-mixed"], max_n=20))
def test_it_is_never_worse_than_without(system):
    A, damping = DenseOperator(system.A), 1e-3 * system.scale
    for rule in (Jacobi(), Nystrom(3), Recycled(3)):
        gated = Gated(rule)
        for _ in range(2):
            solve = gated.solve(A, system.b, damping, rtol=1e-3, max_iter=5)
            assert solve.x.isfinite().all()
            assert math.isfinite(gated.gain)
        first = Gated(rule).solve(A, system.b, damping, rtol=1e-3, max_iter=5)
        damped = A + damping * Identity(*system.b.shape, system.b.dtype)
        plain = cg(damped, system.b, rtol=1e-3, max_iter=5)
        assert first.model_value <= plain.model_value
        if first.status is Status.CONVERGED:
            dense = system.exact + damping * torch.eye(len(system.b), dtype=torch.float64)
            residual = (dense @ first.x.double() - system.b.double()).norm()
            noise = 8 * system.eps * system.scale * first.x.double().norm()
            assert residual <= 1e-3 * system.b.double().norm() + noise


# -- arguments


@pytest.mark.parametrize("given", [None, torch.eye(2), Identity(2), lambda v: v])
def test_what_is_not_a_preconditioner_is_refused(given):
    with pytest.raises(TypeError, match=r"a Preconditioner is needed, got .*: pass an operator"):
        Gated(given)


@pytest.mark.parametrize("retest", [0, -1, 1.5])
def test_retest_is_a_positive_integer(retest):
    with pytest.raises(ValueError, match="retest must be"):
        Gated(Jacobi(), retest=retest)
