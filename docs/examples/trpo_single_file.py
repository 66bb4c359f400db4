"""Trust Region Policy Optimization, complete in one file, with public names of trustregion only.

Schulman et al., Trust Region Policy Optimization, 2015, with the advantages of Schulman et al.,
High-Dimensional Continuous Control Using Generalized Advantage Estimation, 2016. Read it from the
bottom up: ``main`` is the algorithm. ``rl.TRPO`` also has every space, checkpoints, callbacks and a
command line.

Run ``python docs/examples/trpo_single_file.py``; CartPole takes about ten seconds. ``--env`` takes
other environments with Discrete or Box actions.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections import deque
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from trustregion import NaturalTrustRegion

GAMMA, LAMBDA = 0.99, 0.98  # the discount, and the trace decay of the advantages
ENVS, STEPS = 8, 256  # environments, and steps in each of them between two updates
EPOCHS, BATCH = 10, 128  # passes over a rollout to fit the critic, and the size of minibatches


def mlp(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    """Return a tanh network; a small gain starts a policy close to uniform."""
    layers = [
        nn.Linear(inputs, 64),
        nn.Tanh(),
        nn.Linear(64, 64),
        nn.Tanh(),
        nn.Linear(64, outputs),
    ]
    nn.init.orthogonal_(layers[-1].weight, gain)  # pyright: ignore[reportArgumentType] # a Linear's
    return nn.Sequential(*layers)


class Policy(nn.Module):
    """A Categorical over Discrete actions, or independent normals over actions in a Box."""

    def __init__(self, inputs: int, space: gymnasium.Space[Any]) -> None:
        super().__init__()
        if isinstance(space, gymnasium.spaces.Discrete):
            self.net, self.log_std = mlp(inputs, int(space.n), 0.01), None
        elif isinstance(space, gymnasium.spaces.Box):
            size = int(np.prod(space.shape))
            self.net, self.log_std = mlp(inputs, size, 0.01), nn.Parameter(torch.zeros(size))
        else:
            raise ValueError(f"actions must be Discrete or Box, got {space}")
        self.space = space

    def forward(self, observations: Tensor) -> Distribution:
        """Return the distribution of one action per row."""
        outputs = self.net(observations)
        if self.log_std is None:
            return Categorical(logits=outputs)
        return Independent(Normal(outputs, self.log_std.exp()), 1)

    def to_env(self, actions: Tensor) -> np.ndarray:
        """Clip actions to the box; the distribution is over the unclipped actions."""
        if isinstance(self.space, gymnasium.spaces.Box):
            shaped = actions.numpy().reshape(-1, *self.space.shape)
            return np.clip(shaped, self.space.low, self.space.high)
        return actions.numpy() + int(self.space.start)  # pyright: ignore[reportAttributeAccessIssue] # Discrete


class Rollout(NamedTuple):
    """T steps of N environments; the observations have one more row."""

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor  # False for the step after the end of an episode, in which gymnasium resets


class Sampler:
    """Steps the environments, and keeps the returns of the last hundred episodes."""

    def __init__(self, env_id: str, seed: int) -> None:
        self.envs = gymnasium.make_vec(env_id, ENVS, vectorization_mode="sync")
        observation, _ = self.envs.reset(seed=seed)
        self.observation = torch.as_tensor(observation, dtype=torch.float32).flatten(1)
        self.done = np.zeros(ENVS, np.bool_)
        self.total, self.returns = np.zeros(ENVS), deque[float](maxlen=100)

    @torch.no_grad()
    def rollout(self, policy: Policy) -> Rollout:
        """Take ``STEPS`` steps in each environment."""
        observations, rows = [self.observation], []
        for _ in range(STEPS):
            action = policy(self.observation).sample()
            valid = ~self.done
            observation, reward, terminated, truncated, _ = self.envs.step(policy.to_env(action))
            self.observation = torch.as_tensor(observation, dtype=torch.float32).flatten(1)
            self.done = terminated | truncated
            self.total += np.where(valid, reward, 0.0)
            self.returns.extend(self.total[self.done])
            self.total[self.done] = 0.0
            observations.append(self.observation)
            numbers = torch.tensor(reward, dtype=torch.float32)
            rows.append((action, numbers, *map(torch.tensor, (terminated, truncated, valid))))
        return Rollout(torch.stack(observations), *map(torch.stack, zip(*rows, strict=True)))


def advantages_of(rollout: Rollout, values: Tensor) -> Tensor:
    """Return the generalized advantages of eq. 16, summed backwards in time.

    A terminal state has a value of zero; a state at which an episode was cut off keeps its value.
    """
    ends = rollout.terminated | rollout.truncated
    following = torch.where(rollout.terminated, 0.0, values[1:])
    errors = rollout.rewards + GAMMA * following - values[:-1]
    advantages, running = torch.empty_like(errors), torch.zeros(ENVS)
    for t in reversed(range(STEPS)):
        running = errors[t] + GAMMA * LAMBDA * torch.where(ends[t], 0.0, running)
        advantages[t] = running
    return advantages


def improve(
    policy: Policy, optimizer: NaturalTrustRegion, observations: Tensor, actions: Tensor, A: Tensor
) -> None:
    """Take one step to maximize E[pi(a|s) / pi_old(a|s) A] in KL(pi_old || pi) <= delta (14)."""
    A = (A - A.mean()) / A.std()
    with torch.no_grad():
        old = policy(observations).log_prob(actions)

    def closure() -> tuple[Tensor, Distribution]:
        distribution = policy(observations)
        ratio = (distribution.log_prob(actions) - old).exp()
        return (ratio * A).mean(), distribution

    optimizer.step(closure)


def fit(
    critic: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor
) -> None:
    """Fit the critic to the lambda-returns by regression."""
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(targets)).split(BATCH):
            error = (critic(inputs[batch]).squeeze(-1) - targets[batch]).square().mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()


def main(
    env: str = "CartPole-v1", updates: int = 25, delta: float = 0.01, seed: int = 0
) -> list[float]:
    """Train, print a line per update; return the mean return after each update."""
    torch.manual_seed(seed)
    sampler = Sampler(env, seed)
    inputs = sampler.observation.shape[1]
    policy = Policy(inputs, sampler.envs.single_action_space)
    critic = mlp(inputs, 1, 1.0)
    trust_region = NaturalTrustRegion(policy.parameters(), delta, damping=0.1, maximize=True)
    adam = torch.optim.Adam(critic.parameters(), lr=1e-3)
    steps, means = 0, []
    print("   steps   return   step")
    for _ in range(updates):
        rollout = sampler.rollout(policy)
        with torch.no_grad():
            values = critic(rollout.observations).squeeze(-1)
        A, valid = advantages_of(rollout, values), rollout.valid
        observations, actions = rollout.observations[:-1][valid], rollout.actions[valid]
        improve(policy, trust_region, observations, actions, A[valid])
        fit(critic, adam, observations, (A + values[:-1])[valid])
        steps += int(valid.sum())
        means.append(float(np.mean(sampler.returns)) if sampler.returns else float("nan"))
        print(f"{steps:8,}{means[-1]:9.1f}   {trust_region.info}")
    sampler.envs.close()
    return means


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--env", default="CartPole-v1", help="environment id")
    parser.add_argument("--updates", type=int, default=25, help="number of updates")
    parser.add_argument("--delta", type=float, default=0.01, help="KL radius in nats")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    torch.set_num_threads(1)  # Such small networks gain nothing from more.
    main(**vars(parser.parse_args()))
