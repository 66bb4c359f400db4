"""What is timed: for each group, who does it and how. The tests and the report share it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from unittest import mock

import torch
from sb3_contrib.common.utils import conjugate_gradient_solver
from torch import Tensor
from torch.distributions import Independent
from torch.nn.functional import cosine_similarity

import trustregion
from benchmarks.peers import (
    BuildProduct,
    kept_graph_product,
    rebuilt_graph_product,
    restore_sb3_actor,
    sb3_model,
    sb3_system,
    script_update,
)
from benchmarks.problem import (
    ACTIONS,
    BACKTRACK_FACTOR,
    CG_ITERATIONS,
    DAMPING,
    DELTA,
    MAX_BACKTRACKS,
    Policy,
    Problem,
)


@dataclass(frozen=True)
class Case:
    """One way of doing one thing."""

    run: Callable[[], object]
    restore: Callable[[], None] = lambda: None
    """Called before each run, outside the timing."""
    counts: dict[str, int] = field(default_factory=dict)
    """What one run costs: Fisher products and forward passes, counted where they vary."""


Maker = Callable[[Problem], Case]


def _gradient(problem: Problem, policy: Policy) -> Tensor:
    loss = problem.surrogate(policy(problem.observations))
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(policy.parameters()))])


def _our_product(problem: Problem) -> Case:
    policy = problem.own_policy()
    F = trustregion.FisherOperator(policy(problem.observations), policy.parameters())
    return Case(lambda: F.mv(problem.vector), counts={"products": 1, "forwards": 0})


def _our_hessian_product(problem: Problem) -> Case:
    policy = problem.own_policy()
    H = trustregion.KLHessianOperator(policy(problem.observations), policy.parameters())
    return Case(lambda: H.mv(problem.vector), counts={"products": 1, "forwards": 0})


def _sb3_product(problem: Problem) -> Case:
    system = sb3_system(sb3_model(problem), problem)
    return Case(lambda: system.product(problem.vector), counts={"products": 1, "forwards": 0})


def _kept_product(problem: Problem) -> Case:
    product = kept_graph_product(problem.own_policy(), problem.observations)
    return Case(lambda: product(problem.vector), counts={"products": 1, "forwards": 0})


def _rebuilt_product(problem: Problem) -> Case:
    product = rebuilt_graph_product(problem.own_policy(), problem.observations)
    return Case(lambda: product(problem.vector), counts={"products": 1, "forwards": 1})


def _our_solve(problem: Problem) -> Case:
    policy = problem.own_policy()
    g = _gradient(problem, policy)
    F = trustregion.FisherOperator(policy(problem.observations), policy.parameters())
    A = F + DAMPING * trustregion.Identity(g.numel())

    def solve() -> trustregion.LinearSolution:
        return trustregion.cg(A, g, rtol=0.0, max_iter=CG_ITERATIONS)

    return Case(solve, counts={"products": solve().products, "forwards": 0})


def _sb3_solve(problem: Problem) -> Case:
    model = sb3_model(problem)
    system = sb3_system(model, problem)
    with mock.patch.object(
        model, "hessian_vector_product", wraps=model.hessian_vector_product
    ) as counted:
        system.solve()
    return Case(system.solve, counts={"products": counted.call_count, "forwards": 0})


def _peer_solve(build: BuildProduct, *, forwards_per_product: int) -> Maker:
    """Return sb3-contrib's solver on another way to the product."""

    def make(problem: Problem) -> Case:
        g = _gradient(problem, problem.own_policy())
        product = build(problem.own_policy(), problem.observations)
        counted = mock.Mock(wraps=product)

        def solve(product: Callable[[Tensor], Tensor]) -> Tensor:
            return conjugate_gradient_solver(lambda v: product(v) + DAMPING * v, g, CG_ITERATIONS)

        solve(counted)
        products = counted.call_count
        counts = {"products": products, "forwards": forwards_per_product * products}
        return Case(lambda: solve(product), counts=counts)

    return make


def _script_update(build: BuildProduct) -> Maker:
    """Return the update as single-file scripts write it, on one way to the product."""

    def make(problem: Problem) -> Case:
        policy = problem.own_policy()
        counts = script_update(policy, problem, build)
        return Case(
            lambda: script_update(policy, problem, build),
            lambda: _restore(policy, problem),
            counts,
        )

    return make


@torch.no_grad()
def _restore(policy: Policy, problem: Problem) -> None:
    for p, start in zip(policy.parameters(), problem.policy.parameters(), strict=True):
        p.copy_(start)


def _our_update(problem: Problem) -> Case:
    policy = problem.own_policy()
    optimizer = trustregion.NaturalTrustRegion(
        policy.parameters(),
        DELTA,
        damping=DAMPING,
        cg_max_iter=CG_ITERATIONS,
        cg_rtol=0.0,
        maximize=True,
        search=trustregion.optim.Search(
            backtrack_factor=BACKTRACK_FACTOR, max_backtracks=MAX_BACKTRACKS
        ),
    )

    def closure() -> tuple[Tensor, Independent]:
        distribution = policy(problem.observations)
        return problem.surrogate(distribution), distribution

    optimizer.step(closure)
    info = optimizer.info
    assert info is not None
    assert info.accepted, info
    counts = {"products": info.products, "forwards": info.evaluations}
    return Case(lambda: optimizer.step(closure), lambda: _restore(policy, problem), counts)


def _sb3_update(problem: Problem) -> Case:
    model = sb3_model(problem)

    def restore() -> None:
        restore_sb3_actor(model, problem)

    with (
        mock.patch.object(
            model, "hessian_vector_product", wraps=model.hessian_vector_product
        ) as products,
        mock.patch.object(
            model.policy, "get_distribution", wraps=model.policy.get_distribution
        ) as forwards,
    ):
        model.train()
    assert model.logger.name_to_value["train/is_line_search_success"] == 1.0
    counts = {"products": products.call_count, "forwards": forwards.call_count}
    return Case(model.train, restore, counts)


GROUPS: dict[str, dict[str, Maker]] = {
    "fisher product": {
        "ours": _our_product,
        "sb3-contrib": _sb3_product,
        "kl graph kept": _kept_product,
        "kl graph rebuilt": _rebuilt_product,
        "our KLHessianOperator": _our_hessian_product,
    },
    "conjugate gradients": {
        "ours": _our_solve,
        "sb3-contrib": _sb3_solve,
        "kl graph kept": _peer_solve(kept_graph_product, forwards_per_product=0),
        "kl graph rebuilt": _peer_solve(rebuilt_graph_product, forwards_per_product=1),
    },
    "policy update": {
        "ours": _our_update,
        "sb3-contrib": _sb3_update,
        "kl graph kept": _script_update(kept_graph_product),
        "kl graph rebuilt": _script_update(rebuilt_graph_product),
    },
}


def check(problem: Problem) -> None:
    """Assert that everybody computes the same: gradient, product and direction of the step."""
    policy = problem.own_policy()
    model = sb3_model(problem)
    system = sb3_system(model, problem)
    g = _gradient(problem, policy)
    torch.testing.assert_close(system.gradient, g, rtol=1e-3, atol=1e-6)
    assert cosine_similarity(system.gradient, g, dim=0) > 0.999

    v = problem.vector
    F = trustregion.FisherOperator(policy(problem.observations), policy.parameters())
    Fv = F @ v
    theirs = ACTIONS * (system.product(v) - model.cg_damping * v)
    for product in (
        theirs,
        trustregion.KLHessianOperator(policy(problem.observations), policy.parameters()) @ v,
        kept_graph_product(policy, problem.observations)(v),
        rebuilt_graph_product(policy, problem.observations)(v),
    ):
        assert (product - Fv).norm() < 1e-3 * Fv.norm()

    x, y = _our_solve(problem).run(), _sb3_solve(problem).run()
    assert isinstance(x, trustregion.LinearSolution)
    assert isinstance(y, Tensor)
    assert cosine_similarity(x.x, y, dim=0) > 0.999
