"""What every algorithm shares: networks, optimizers, and an update of both from a path."""

from __future__ import annotations

import abc
import threading
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from . import checkpoint, saving
from .build import (
    check_spaces,
    environment_seed,
    make_networks,
    masks_as_infos,
    observation_layout,
    observation_norm,
    refuse_positional,
    training_envs,
    with_copies,
)
from .config import Config
from .envs.batches import as_batch
from .envs.layout import ObservationLayout
from .envs.make import EnvSource
from .experience.advantages import Advantages
from .experience.collector import Collector, EnvCollector
from .experience.estimates import Estimates, estimate
from .experience.path import Path
from .experience.reward_scale import RewardScale
from .experience.surrogate import Objective, surrogate_closure
from .fits import CriticFit, Regression, explained_variance
from .networks.modes import evaluating
from .networks.numpy_twin import actor
from .networks.policy import Policy
from .reports import Callback, Log, as_callbacks
from .training import Training

_building = threading.Lock()  # two threads would take turns with torch's one generator


class Agent(abc.ABC):
    """A policy and a critic trained on paths of experience; an algorithm is an :meth:`update`.

    Args:
        env: an environment id, a function that makes an environment, an environment, or a gymnasium
            vector environment.
        policy: a policy of your own, from rows of :attr:`layout` to a distribution.
        critic: a critic of your own, from rows to values.
        collector: what makes paths of a policy's steps, instead of :class:`rl.EnvCollector`.
        options: fields of the algorithm's config, by name.

    Attributes:
        layout: where things are in a row of observations.

    """

    config_class: ClassVar[type[Config]]
    name: ClassVar[str]

    def __init__(
        self,
        env: EnvSource,
        *others: Any,
        policy: Policy | None = None,
        critic: nn.Module | None = None,
        collector: Callable[..., Collector] = EnvCollector,
        **options: Any,
    ) -> None:
        refuse_positional(self, env, *others)
        config = self.config_class.from_dict(options)
        self.source, self.training = env, Training(self, collector)
        envs = training_envs(env, config)
        try:
            config = with_copies(config, options, envs)
            layout = observation_layout(envs, config, environment_seed(config, 0))
            self.build(config, layout, envs.single_action_space, policy, critic)
        except Exception:
            self._close(envs)
            raise
        vars(self)["envs"] = envs  # otherwise made when first asked for

    def build(
        self,
        config: Config,
        layout: ObservationLayout,
        action_space: Any,
        policy: Policy | None,
        critic: nn.Module | None,
    ) -> None:
        """Make new networks and optimizers."""
        config.check_batch()
        config.check_device()
        self.config, self.layout, self.action_space = config, layout, action_space
        self.advantages = cast("Advantages", config.advantages)  # the config made them objects
        self.critic_fit = cast("CriticFit", config.critic_fit)
        self.num_timesteps = self.iterations = 0
        self.generator = torch.Generator().manual_seed(config.seed or 0)
        self._predict_generator = torch.Generator().manual_seed(config.seed or 0)
        norm = self.observation_norm = observation_norm(layout, config)
        with _building, torch.random.fork_rng(devices=[]):  # leave the user's random state alone
            torch.manual_seed(config.seed or 0)
            networks = make_networks(layout, action_space, norm, config, policy, critic)
        self.policy, self.critic = networks[0].to(config.device), networks[1].to(config.device)
        scale = RewardScale(config.n_envs, config.gamma).to(config.device)
        self.reward_scale = scale if config.normalise_rewards else None
        self.setup()

    @cached_property
    def envs(self) -> VectorEnv:
        """The environments; those of an agent that was loaded are made when first asked for."""
        saving.check_source(self.source)
        envs = training_envs(self.source, self.config)
        try:
            check_spaces(self.layout, self.action_space, envs)
        except ValueError:
            self._close(envs)
            raise
        self.action_space = envs.single_action_space
        return envs

    @property
    def has_envs(self) -> bool:
        """Whether the environments were made."""
        return "envs" in self.__dict__

    @property
    def env_id(self) -> str | None:
        """The id that the environments are made from, or None."""
        source = self.source
        named = source.env_id if isinstance(source, saving.NamedByFile) else source
        return named if isinstance(named, str) else None

    def close(self) -> None:
        """Close the environments, unless a vector environment was passed in.

        ``learn`` recreates them.
        """
        if self.has_envs and not isinstance(self.source, VectorEnv):
            self.training.collector = None
            vars(self).pop("envs").close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close(self, envs: VectorEnv) -> None:
        if not isinstance(self.source, VectorEnv):
            envs.close()

    def setup(self) -> None:
        """Make the optimizers: here the critic's, of what the policy does not share with it."""
        learnt = {id(p) for p in self.policy.parameters()}
        self.critic_parameters = [
            p for p in self.critic.parameters() if id(p) not in learnt and p.requires_grad
        ]
        if not self.critic_parameters:
            raise ValueError("the critic has no parameters of its own to fit")
        self.critic_optimizer = self.critic_fit.optimizer(self.critic_parameters)

    @abc.abstractmethod
    def update(self, path: Path) -> Log:
        """Improve policy and critic from one path; return what to log."""

    def estimate(self, path: Path) -> Estimates:
        """Estimate advantages and returns, by the options ``advantages`` and ``td_lambda``."""
        c = self.config
        return estimate(path, self.critic, self.advantages, c.gamma, c.td_lambda)

    def objective(self, path: Path, advantages: Tensor) -> Objective:
        """Return the closure of what the policy maximises, for normalised advantages ``(T, N)``."""
        return surrogate_closure(self.policy, path, advantages)

    def fit_critic(self, path: Path, estimates: Estimates) -> Log:
        """Regress the critic on the returns, by the option ``critic_fit``; return what to log."""
        returns = path.flat(estimates.returns)
        task = Regression(self.critic, self.critic_parameters, path.rows, returns, self.generator)
        value_loss = self.critic_fit(task, self.critic_optimizer)
        return {
            "train/value_loss": value_loss,
            "train/explained_variance": explained_variance(path.flat(estimates.values), returns),
        }

    def learn(
        self,
        total_timesteps: int | None = None,
        progress: bool = True,
        callback: Callback | Iterable[Callback | None] | None = None,
        logger: Callback | Iterable[Callback | None] | None = None,
    ) -> Self:
        """Train for ``total_timesteps`` more environment steps, rounded up to whole rollouts.

        If this raises or is interrupted, the agent is as its last whole update left it, and
        ``learn()`` makes the steps that were left.

        Args:
            total_timesteps: environment steps to add; resets do not count. None for those that the
                last call left, also if the agent was saved meanwhile and loaded: the training goes
                on as if it had not stopped, schedules and callbacks too.
            progress: show a progress bar.
            callback: called with the agent and the log after each update, and may add to the log;
                False stops. Of several, all are called: see :mod:`rl.run.callbacks`.
            logger: called after all callbacks, with what they added: see :mod:`rl.run.logs`.

        """
        self.training.learn(total_timesteps, progress, as_callbacks(callback), as_callbacks(logger))
        return self

    @property
    def progress(self) -> float:
        """The share of the steps of :meth:`learn` that are made: 1 at its end."""
        return self.training.progress

    def scheduled(self, start: float, end: float | None) -> float:
        """Return an option that moves linearly over :meth:`learn`; its start where it does not."""
        return start if end is None else start + (end - start) * self.progress

    @torch.no_grad()
    def predict(
        self, obs: Any, deterministic: bool = False, action_masks: np.ndarray | None = None
    ) -> tuple[np.ndarray, None]:
        """Choose actions; drawing them does not disturb training.

        Args:
            obs: one observation, or a batch of them.
            deterministic: take the most likely action instead of drawing one.
            action_masks: the allowed actions, if the environment gives them in its infos.

        Returns:
            The action or actions, and None as the recurrent state.

        """
        batch, single = as_batch(self.layout.space, obs)
        masks = [action_masks] if single and action_masks is not None else action_masks
        rows = torch.from_numpy(self.layout.flat(batch, masks_as_infos(self.layout, masks)))
        with evaluating(self.policy):
            if deterministic:
                actions = self.policy.mode(rows.to(self.config.device)).cpu().numpy()
            else:
                noise = self.policy.noise(1, len(rows), self._predict_generator)
                actions = actor(self.policy, noise)(0, rows.numpy())
        chosen = self.policy.to_env(actions)
        return (chosen[0] if single else chosen), None

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers among the attributes, whose state a checkpoint keeps."""
        return {k: x for k, x in vars(self).items() if isinstance(x, torch.optim.Optimizer)}

    def _parts(self) -> dict[str, Any]:
        """Return what has a ``state_dict``."""
        modules = {"policy": self.policy, "critic": self.critic, "reward_scale": self.reward_scale}
        return {k: m for k, m in modules.items() if m is not None} | self.optimizers()

    def state_dict(self) -> dict[str, Any]:
        """Return weights, optimizers, counters and random state, as plain values and tensors."""
        return {
            "parts": {name: part.state_dict() for name, part in self._parts().items()},
            "generator": self.generator.get_state(),
            "num_timesteps": self.num_timesteps,
            "iterations": self.iterations,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, or nothing and raise a ValueError."""
        saving.check_state(state)
        saving.load_parts(self._parts(), state["parts"])
        self.generator.set_state(state["generator"])
        self.num_timesteps, self.iterations = state["num_timesteps"], state["iterations"]

    def save(
        self, path: str | FilePath, notes: dict[str, Any] | None = None, *, run: bool = True
    ) -> None:
        """Write weights, optimizers, counters and random state to one file, atomically.

        Args:
            path: the file.
            notes: plain values to keep with them.
            run: also what ``learn()`` needs to go on: episodes, schedules, callbacks. Environments
                whose state cannot be read are recreated, with a warning.

        Raises:
            RuntimeError: another thread is in :meth:`learn`.

        """
        self.training.check_thread()
        state: dict[str, Any] = {"notes": notes or {}, "agent": self.state_dict()}
        state["run"] = self.training.state_dict() if run else None
        checkpoint.write(FilePath(path), saving.describe(self) | state)

    @classmethod
    def load(
        cls,
        path: str | FilePath,
        env: EnvSource | None = None,
        *,
        policy: Policy | None = None,
        critic: nn.Module | None = None,
        collector: Callable[..., Collector] = EnvCollector,
        **options: Any,
    ) -> Self:
        """Return the agent of a file written by :meth:`save`.

        ``learn()`` goes on bit for bit as the agent that was saved: on the same machine, with the
        same versions and number of threads. Only draws of ``predict`` start over. Environments are
        made when they are first needed, which is not by ``predict``.

        Args:
            path: the file.
            env: environments to use instead of those of the saved id.
            policy: your own policy, if the agent had one; likewise ``critic`` and ``collector``.
            critic: see there.
            collector: see there.
            options: options to change, as ``delta``; ``critic_fit`` starts its optimizer over.

        Raises:
            CheckpointError: the file is truncated, damaged, of another format or algorithm.

        """
        agent = cls.__new__(cls)
        agent.source, agent.training = env, Training(agent, collector)
        try:
            saving.load_into(agent, FilePath(path), options, policy, critic)
        except BaseException:
            agent.close()
            raise
        return agent
