"""The recycled directions as a preconditioner."""

import math

import pytest
import torch

from counting import Counting
from preconditioner_rules import damped, learn, spread
from strategies import DTYPES
from trustregion import (
    Identity,
    cg,
    to_dense,
)
from trustregion.operators import DenseOperator, FunctionOperator
from trustregion.preconditioners import Recycled


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_repeated_system_takes_fewer_iterations_at_no_product(dtype):
    A, b, rule = Counting(spread(dtype=dtype)), torch.ones(40, dtype=dtype), Recycled(10)
    iterations = []
    for _ in range(3):
        M = rule.build(A, 0.1)
        assert rule.products == 0
        solve = cg(damped(rule.watch(A), 0.1), b, M=M, rtol=1e-3)
        rule.observe(solve)
        iterations.append(solve.iterations)
        assert A.products == solve.products
        A.products = 0
    assert iterations[1] < 0.8 * iterations[0]


def test_a_slowly_changing_system_takes_fewer_iterations():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(60, 60, generator=g, dtype=torch.float64)
    rule, plain, recycled = Recycled(10), 0, 0
    d = torch.cat([torch.logspace(2, 4, 8), torch.linspace(1, 2, 52)]).double()
    for t in range(6):
        Q = torch.linalg.qr(X + 0.001 * t * torch.eye(60)).Q
        A, b = DenseOperator((Q * d) @ Q.T), torch.randn(60, generator=g, dtype=torch.float64)
        plain += cg(A, b).iterations
        solve = cg(rule.watch(A), b, M=rule.build(A, 0.0))
        rule.observe(solve)
        recycled += solve.iterations
    assert recycled < 0.8 * plain


def test_the_first_solve_has_nothing_to_recycle():
    rule = Recycled()
    assert isinstance(rule.build(DenseOperator(spread(5)), 0.0), Identity)
    assert (rule.products, rule.overhead) == (0, 0.0)


@pytest.mark.parametrize("damping", [0.0, 3.0])
def test_on_the_span_all_eigenvalues_are_the_smallest_ritz_value(damping):
    A, b = DenseOperator(spread(12, 2.0)), torch.ones(12).double()
    rule = Recycled(4)
    learn(rule, A, 1.0, b)
    assert rule.state["directions"].shape == (12, 4)
    P = rule.state["directions"]
    torch.testing.assert_close(A.matrix @ P, rule.state["images"])
    H = A.matrix + damping * torch.eye(12, dtype=torch.float64)
    M = to_dense(rule.build(A, damping))
    theta = torch.linalg.eigvalsh(P.T @ H @ P)[0]
    torch.testing.assert_close(M @ H @ P, theta * P)
    X = torch.randn(12, 3, dtype=torch.float64)
    X -= P @ torch.linalg.solve(P.T @ H @ P, P.T @ H @ X)  # conjugate to the directions
    # and nothing else changes: up to directions, M is the inverse's own on what is left
    torch.testing.assert_close(P.T @ H @ M @ H @ X, torch.zeros(4, 3).double(), atol=1e-8, rtol=0)
    assert rule.overhead > 0


@pytest.mark.parametrize("rank", [1, 3, 50])
def test_no_more_directions_are_kept_than_asked(rank):
    A, rule = DenseOperator(spread(8)), Recycled(rank)
    learn(rule, A, 0.1, torch.ones(8).double(), max_iter=6)
    assert rule.state["directions"].shape == (8, min(rank, 6))


def test_a_watched_operator_keeps_copies_and_says_the_same():
    A, rule = DenseOperator(spread(6)), Recycled(2)
    eye, buffer = rule.watch(A), torch.ones(6, dtype=torch.float64)
    assert torch.equal(eye @ buffer, A @ buffer)
    buffer.zero_()
    eye.mv(buffer)  # a zero vector is not a direction
    rule.observe(cg(A, torch.ones(6).double()))
    direction = rule.state["directions"]
    torch.testing.assert_close(direction.abs(), torch.full((6, 1), 6**-0.5).double())
    rule.observe(cg(A, torch.ones(6).double()))  # nothing was watched: nothing changes
    assert rule.state["directions"] is direction


def test_images_near_overflow_stay_in_range():
    d = torch.tensor([1.5e308, 1e308, 1.0], dtype=torch.float64)
    A, rule = DenseOperator(torch.diag(d)), Recycled(2)
    watched = rule.watch(A)
    for v in torch.eye(3).double()[:2]:
        watched.mv(v)
    rule.observe(cg(A, torch.ones(3).double()))
    expected = torch.diag(torch.tensor([2 / 3, 1.0, 1.0]).double())
    torch.testing.assert_close(to_dense(rule.build(A, 0.0)), expected)


def test_directions_that_repeat_are_kept_once():
    A, rule, v = DenseOperator(spread(6)), Recycled(5), torch.ones(6).double()
    watched = rule.watch(A)
    w = torch.arange(6.0).double()
    for direction in (v, 2 * v, w, v + 1e-12 * w):
        watched.mv(direction)
    rule.observe(cg(A, v))
    P = rule.state["directions"]
    assert P.shape == (6, 2)
    torch.testing.assert_close(A.matrix @ P, rule.state["images"])


def test_directions_of_negative_curvature_are_left_out():
    A = DenseOperator(torch.diag(torch.tensor([-5.0, 3.0, 2.0]).double()))
    rule, eye = Recycled(3), torch.eye(3).double()
    watched = rule.watch(A)
    for v in eye:
        watched.mv(v)
    rule.observe(cg(A, eye[1]))
    M = to_dense(rule.build(A, 0.0))
    torch.testing.assert_close(M, torch.diag(torch.tensor([1.0, 2 / 3, 1.0]).double()))


def test_a_solve_that_fails_leaves_what_was_known():
    A, b, rule = DenseOperator(spread(6)), torch.ones(6).double(), Recycled(3)
    learn(rule, A, 0.1, b)
    known = rule.state["directions"]
    bad = FunctionOperator(lambda v: v * math.nan, 6, torch.float64)
    learn(rule, bad, 0.1, b)
    assert rule.state["directions"] is known
