"""The gate of a preconditioner inside the optimizers."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gate_cases import B, Given, N
from preconditioner_rules import spread
from problems import badly_scaled_problem, closure_of
from strategies import DTYPES
from trustregion import (
    KFAC,
    FisherOperator,
    Jacobi,
    NaturalTrustRegion,
    Nystrom,
    Status,
)
from trustregion.operators import DenseOperator
from trustregion.preconditioners import Gated, Recycled

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
        model.parameters(), preconditioner=Given(spread(high=6.0, seed=5, n=n))
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
    with pytest.raises(ValueError, match="leads to none of the 4 parameters given"):
        twin.step(closure)  # the closure of the old model
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
def test_a_saved_optimizer_continues_bit_for_bit(name, tmp_path):
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


def test_a_state_without_a_preconditioner_lets_it_start_over():
    model, closure = badly_scaled_problem()
    plain = NaturalTrustRegion(model.parameters())
    plain.step(closure)
    assert set(plain.state_dict()) == {"state", "param_groups"}
    optimizer = NaturalTrustRegion(model.parameters(), preconditioner=Jacobi())
    optimizer.load_state_dict(plain.state_dict())
    assert "not tested yet" in str(optimizer.preconditioner)
    optimizer.step(closure)
    assert optimizer.info.accepted
