"""How others compute the products and the update of TRPO, on the problem of ``problem.py``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import gymnasium
import numpy as np
import torch
from sb3_contrib import TRPO
from sb3_contrib.common.utils import conjugate_gradient_solver
from stable_baselines3.common.distributions import kl_divergence as sb3_kl_divergence
from stable_baselines3.common.logger import Logger
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

from benchmarks.problem import (
    ACTIONS,
    BACKTRACK_FACTOR,
    BATCH,
    CG_ITERATIONS,
    DAMPING,
    DELTA,
    HIDDEN,
    MAX_BACKTRACKS,
    OBSERVATIONS,
    Policy,
    Problem,
)


class _Placeholder(gymnasium.Env[np.ndarray, np.ndarray]):
    """Gives sb3-contrib the spaces of the problem; it is never stepped."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBSERVATIONS,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTIONS,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed, options=options)
        return np.zeros(OBSERVATIONS, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        raise NotImplementedError


def sb3_model(problem: Problem) -> TRPO:
    """Return sb3-contrib's TRPO with the problem's weights and its batch in the rollout buffer.

    sb3-contrib averages the KL over the action dimensions where the joint KL is their sum. Radius
    and damping are divided by that many, which makes the ball and the direction the same.
    """
    model = TRPO(
        "MlpPolicy",
        _Placeholder(),
        n_steps=BATCH,
        cg_max_steps=CG_ITERATIONS,
        cg_damping=DAMPING / ACTIONS,
        line_search_shrinking_factor=BACKTRACK_FACTOR,
        line_search_max_iter=MAX_BACKTRACKS + 1,
        n_critic_updates=0,
        normalize_advantage=False,  # the problem's are normalised
        target_kl=DELTA / ACTIONS,
        policy_kwargs={
            "net_arch": {"pi": [HIDDEN, HIDDEN], "vf": [HIDDEN, HIDDEN]},
            "activation_fn": nn.Tanh,
        },
        device="cpu",
    )
    model.set_logger(Logger(folder=None, output_formats=[]))
    restore_sb3_actor(model, problem)
    buffer = model.rollout_buffer
    critic = np.random.default_rng(0).standard_normal((2, BATCH, 1), np.float32)
    buffer.observations[:] = problem.observations.unsqueeze(1).numpy()
    buffer.actions[:] = problem.actions.unsqueeze(1).numpy()
    buffer.log_probs[:] = problem.old_log_prob.unsqueeze(1).numpy()
    buffer.advantages[:] = problem.advantages.unsqueeze(1).numpy()
    buffer.values[:], buffer.returns[:] = critic  # read for a log entry only
    buffer.full = True
    return model


def sb3_actor_parameters(model: TRPO) -> list[nn.Parameter]:
    """Return the actor's parameters, in the order of ``Policy.parameters()``."""
    return [p for name, p in model.policy.named_parameters() if "value" not in name]


@torch.no_grad()
def restore_sb3_actor(model: TRPO, problem: Problem) -> None:
    """Write the problem's weights into the actor, and make its next solve reproducible."""
    ours = problem.policy.parameters()
    for theirs, p in zip(sb3_actor_parameters(model), ours, strict=True):
        theirs.copy_(p)
    torch.manual_seed(0)  # conjugate_gradient_solver starts from noise


@dataclass(frozen=True)
class Sb3System:
    """The linear system of one update: sb3-contrib's gradient, and its product."""

    gradient: Tensor
    product: Callable[[Tensor], Tensor]

    def solve(self) -> Tensor:
        return conjugate_gradient_solver(self.product, self.gradient, max_iter=CG_ITERATIONS)


def sb3_system(model: TRPO, problem: Problem) -> Sb3System:
    """Build the KL's gradient graph with sb3-contrib's own code; its products add the damping."""
    with torch.no_grad():
        old = copy.copy(model.policy.get_distribution(problem.observations))
    new = model.policy.get_distribution(problem.observations)
    ratio = (new.log_prob(problem.actions) - problem.old_log_prob).exp()
    objective = (ratio * problem.advantages).mean()
    kl = sb3_kl_divergence(new, old).mean()
    params, gradient, kl_gradient, _ = model._compute_actor_grad(kl, objective)
    return Sb3System(
        gradient, lambda v: model.hessian_vector_product(params, kl_gradient, v, retain_graph=True)
    )


def _kl_to_itself(policy: Policy, observations: Tensor) -> Tensor:
    new = policy(observations)
    normal = new.base_dist
    old = Independent(Normal(normal.loc.detach(), normal.scale.detach()), 1)
    return kl_divergence(old, new).mean()


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def kept_graph_product(policy: Policy, observations: Tensor) -> Callable[[Tensor], Tensor]:
    """KL double backward; one gradient call for all parameters, whose graph is kept.

    The kinder reading of the way of sb3-contrib, and what tianshou does.
    """
    params = list(policy.parameters())
    kl = _kl_to_itself(policy, observations)
    kl_gradient = _flat(torch.autograd.grad(kl, params, create_graph=True))

    def product(v: Tensor) -> Tensor:
        return _flat(torch.autograd.grad((kl_gradient * v).sum(), params, retain_graph=True))

    return product


def rebuilt_graph_product(policy: Policy, observations: Tensor) -> Callable[[Tensor], Tensor]:
    """KL double backward that starts from the forward pass each time.

    The way of garage and of older PyTorch code; Spinning Up's static graph is run so too.
    """
    params = list(policy.parameters())

    def product(v: Tensor) -> Tensor:
        kl = _kl_to_itself(policy, observations)
        kl_gradient = _flat(torch.autograd.grad(kl, params, create_graph=True))
        return _flat(torch.autograd.grad((kl_gradient * v).sum(), params))

    return product


BuildProduct: TypeAlias = Callable[[Policy, Tensor], Callable[[Tensor], Tensor]]


def script_update(policy: Policy, problem: Problem, build: BuildProduct) -> dict[str, int]:
    """Update a policy as single-file TRPO scripts do, with sb3-contrib's conjugate gradients.

    Gradient, solve, length of the step from one more product, backtracking line search. Returns
    how many products and forward passes it took.
    """
    params = list(policy.parameters())
    counted = {"products": 0, "forwards": 2}  # of the objective and of the product's KL
    before = problem.surrogate(policy(problem.observations))
    g = _flat(torch.autograd.grad(before, params))
    product = build(policy, problem.observations)

    def damped(v: Tensor) -> Tensor:
        counted["products"] += 1
        return product(v) + DAMPING * v

    torch.manual_seed(0)  # conjugate_gradient_solver starts from noise
    x = conjugate_gradient_solver(damped, g, CG_ITERATIONS)
    s = (2 * DELTA / (x @ damped(x))).sqrt() * x
    if build is rebuilt_graph_product:
        counted["forwards"] += counted["products"] - 1
    with torch.no_grad():
        theta, old = _flat(tuple(params)), policy(problem.observations)
        counted["forwards"] += 1
        for j in range(MAX_BACKTRACKS + 1):
            parts = (theta + BACKTRACK_FACTOR**j * s).split([p.numel() for p in params])
            for p, part in zip(params, parts, strict=True):
                p.copy_(part.view_as(p))
            new = policy(problem.observations)
            counted["forwards"] += 1
            kl = kl_divergence(old, new).mean()
            if kl <= DELTA and problem.surrogate(new) > before:
                return counted
    raise AssertionError("the line search failed: the problem should let it succeed")
