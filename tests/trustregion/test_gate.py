"""A preconditioner is used where it pays, and the optimizer says so."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counting import Counting
from problems import badly_scaled_problem, closure_of
from strategies import DTYPES, systems
from trustregion import (
    KFAC,
    FisherOperator,
    Identity,
    Jacobi,
    NaturalTrustRegion,
    Nystrom,
    Status,
    cg,
)
from trustregion.operators import DenseOperator, FunctionOperator
from trustregion.preconditioners import Gated, Preconditioner, Recycled

N = 40


def spread(high=4.0, seed=0, n=N):
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
    A = (Q * torch.logspace(0, high, n, dtype=torch.float64)) @ Q.T
    return (A + A.T) / 2


class Given(Preconditioner):
    """A matrix of one's choice, at a declared cost."""

    def __init__(self, matrix, work=0.0, products=0, overhead=0.0, every=1):
        super().__init__()
        self.matrix, self.declared, self.cost = matrix, work, (products, overhead)
        self.every, self.builds, self.told = every, 0, []

    def build(self, A, damping):
        fresh = self.builds % self.every == 0
        self.products, self.overhead = self.cost if fresh else (0, 0.0)
        for _ in range(self.products):
            A.mv(torch.ones(A.shape[0], dtype=A.dtype))
        self.builds += 1
        return DenseOperator(self.matrix)

    def work(self, A):
        return self.declared

    def observe(self, solve):
        self.told.append(solve)


B = torch.ones(N, dtype=torch.float64)


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
        spread(6.0, seed=1),
        torch.linalg.inv(spread(4.0, seed=2)),  # of the wrong matrix
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
    A = DenseOperator(spread(1.0))
    plain = cg(A, B, max_iter=100)
    gated, _ = gate(Given(torch.linalg.inv(spread(1.0)), work=0.5, overhead=2.0), A, max_iter=100)
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


# -- tests, and what goes on between them


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
    on, _ = gate(Nystrom(30, every=1000), DenseOperator(spread(8.0)), max_iter=5)
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


# -- learning rates


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.01, 0.5]))
def test_scaled_systems_are_those_of_a_dense_solve(dtype, seed, zero):
    n, g = 12, torch.Generator().manual_seed(seed)
    X = torch.randn(n, n, generator=g, dtype=torch.float64)
    A = (X @ X.T + n * torch.eye(n, dtype=torch.float64)).to(dtype)
    d = torch.rand(n, generator=g, dtype=torch.float64).clamp(min=0.05)
    d[: n // 3] = zero
    b = torch.randn(n, generator=g, dtype=torch.float64)
    dense = d.unsqueeze(1) * A.double() * d + 0.5 * torch.eye(n, dtype=torch.float64)
    exact = torch.linalg.solve(dense, b)
    for rule in (Given(torch.linalg.inv(A.double()).to(dtype)), Jacobi(), Nystrom(3)):
        gated = Gated(rule)
        for enabled in (None, True):  # used in any case
            gated.enabled, gated.gain = enabled, 7.0
            solve = gated.solve(
                DenseOperator(A), b.to(dtype), 0.5, rtol=1e-4, max_iter=100, scale=d.to(dtype)
            )
            assert solve.status is Status.CONVERGED
            # the condition of the dense system is below 1e3
            torch.testing.assert_close(solve.x.double(), exact, rtol=0, atol=0.05 * exact.norm())
            residual = (dense @ solve.x.double() - b).norm()
            assert residual <= 1.1e-4 * b.norm()
            assert (gated.gain == 7.0) == (enabled is True)  # the second time it did not break down


def test_the_inverse_of_a_scaled_system_is_scaled():
    A, d = spread(), torch.linspace(0.1, 1.0, N, dtype=torch.float64)
    gated = Gated(Given(torch.linalg.inv(A)))
    for _ in range(2):
        solve = gated.solve(DenseOperator(A), B, 0.0, max_iter=10, scale=d)
        assert gated.enabled
        assert (solve.status, solve.iterations) == (Status.CONVERGED, 1)


# -- arguments


@pytest.mark.parametrize("given", [None, torch.eye(2), Identity(2), lambda v: v])
def test_what_is_not_a_preconditioner_is_refused(given):
    with pytest.raises(TypeError, match=r"a Preconditioner is needed, got .*: pass an operator"):
        Gated(given)


@pytest.mark.parametrize("retest", [0, -1, 1.5])
def test_retest_is_a_positive_integer(retest):
    with pytest.raises(ValueError, match="retest must be"):
        Gated(Jacobi(), retest=retest)


# -- the optimizer


OURS = {
    "KFAC": KFAC,
    "Jacobi": lambda _: Jacobi(),
    "Nystrom": lambda _: Nystrom(5),
    "Recycled": lambda _: Recycled(),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OURS)
def test_the_optimizer_takes_steps_with_it(name, dtype):
    model, closure = badly_scaled_problem(dtype)
    optimizer = NaturalTrustRegion(model.parameters(), preconditioner=OURS[name](model))
    losses = []
    for _ in range(6):
        losses.append(optimizer.step(closure).item())
        info = optimizer.info
        assert info.accepted
        assert info.kl <= 0.01
        assert info.preconditioner == str(optimizer.preconditioner)
        assert info.preconditioner.startswith(name)
        assert info.products >= info.cg_iterations
    assert losses == sorted(losses, reverse=True)
    assert "not tested" not in info.preconditioner


@pytest.mark.parametrize("name", OURS)
def test_the_products_of_a_step_are_those_of_its_operator(name, monkeypatch):
    model, closure = badly_scaled_problem()
    optimizer = NaturalTrustRegion(model.parameters(), preconditioner=OURS[name](model))
    spent, multiply = [], FisherOperator.mv
    monkeypatch.setattr(FisherOperator, "mv", lambda F, v: spent.append(v) or multiply(F, v))
    for _ in range(3):
        spent.clear()
        optimizer.step(closure)
        assert optimizer.info.products == len(spent) > 0


def test_a_harmful_one_is_switched_off_in_the_optimizer():
    model, closure = badly_scaled_problem()
    n = sum(p.numel() for p in model.parameters())
    plain, other = badly_scaled_problem()
    optimizer = NaturalTrustRegion(
        model.parameters(), preconditioner=Given(spread(6.0, seed=5, n=n))
    )
    for opt, close in ((optimizer, closure), (NaturalTrustRegion(plain.parameters()), other)):
        for _ in range(3):
            opt.step(close)
    assert optimizer.info.preconditioner.startswith("Given off: gain 0")
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("rate", [0.1, 0.0])
@pytest.mark.parametrize("name", OURS)
def test_groups_with_their_own_rates(name, rate):
    model, closure = badly_scaled_problem()
    groups = [
        {"params": list(model[0].parameters()), "lr": rate},
        {"params": list(model[2].parameters()), "lr": 1.0},
    ]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = NaturalTrustRegion(groups, preconditioner=OURS[name](model))
    for _ in range(3):
        optimizer.step(closure)
        assert optimizer.info.accepted
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [rate > 0] * 2 + [True] * 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("name", OURS)
def test_copies_of_model_and_optimizer_take_the_same_step(name, duplicate):
    model, closure = badly_scaled_problem()
    optimizer = NaturalTrustRegion(model.parameters(), preconditioner=OURS[name](model))
    for _ in range(3):
        optimizer.step(closure)
    twin, other = duplicate((model, optimizer))
    x = torch.randn(50, 6, dtype=torch.float64)
    y = x.argmax(1) % 4
    for _ in range(2):
        optimizer.step(closure_of(model, x, y))
        other.step(closure_of(twin, x, y))
        assert other.info == optimizer.info
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p is not q
        assert torch.equal(p, q)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_the_optimizer_alone_has_a_module_of_its_own(duplicate):
    model, closure = badly_scaled_problem()
    optimizer = NaturalTrustRegion(model.parameters(), preconditioner=KFAC(model))
    optimizer.step(closure)
    twin, kept = duplicate(optimizer), [p.detach().clone() for p in model.parameters()]
    params = twin.param_groups[0]["params"]
    module = twin.preconditioner.preconditioner.module
    assert all(p is q for p, q in zip(module.parameters(), params, strict=True))
    twin.step(closure)  # of the old model: no parameter of the copy has a gradient
    assert twin.info.status is Status.STATIONARY
    x = torch.randn(50, 6, dtype=torch.float64)
    twin.step(closure_of(module, x, torch.zeros(50)))
    assert twin.info.accepted
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), kept, strict=True))


def test_kfac_of_another_module_is_an_error_in_words():
    model, _ = badly_scaled_problem()
    other, closure = badly_scaled_problem(seed=1)
    wrong = NaturalTrustRegion(other.parameters(), preconditioner=KFAC(model))
    with pytest.raises(ValueError, match="give KFAC the module whose parameters are trained"):
        wrong.step(closure)


STATEFUL = {
    "KFAC": lambda model: KFAC(model, every=3, decay=0.5),
    "Jacobi": lambda _: Jacobi(),
    "Nystrom": lambda _: Nystrom(5, every=4),
    "Recycled": lambda _: Recycled(),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_saved_optimizer_goes_on_bit_for_bit(name, tmp_path):
    """Saved after two of five steps, loaded into a new optimizer of a new model."""
    model, closure = badly_scaled_problem()
    optimizer = NaturalTrustRegion(model.parameters(), preconditioner=STATEFUL[name](model))
    for _ in range(2):
        optimizer.step(closure)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "saved.pt")
    weights, state = torch.load(tmp_path / "saved.pt", weights_only=True)
    twin, on_twin = badly_scaled_problem()
    twin.load_state_dict(weights)
    resumed = NaturalTrustRegion(twin.parameters(), preconditioner=STATEFUL[name](twin))
    resumed.load_state_dict(state)
    for _ in range(3):
        optimizer.step(closure)
        resumed.step(on_twin)
        assert resumed.info == optimizer.info
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_state_without_a_preconditioner_lets_it_start_anew():
    model, closure = badly_scaled_problem()
    plain = NaturalTrustRegion(model.parameters())
    plain.step(closure)
    assert set(plain.state_dict()) == {"state", "param_groups"}
    optimizer = NaturalTrustRegion(model.parameters(), preconditioner=Jacobi())
    optimizer.load_state_dict(plain.state_dict())
    assert "not tested yet" in str(optimizer.preconditioner)
    optimizer.step(closure)
    assert optimizer.info.accepted
