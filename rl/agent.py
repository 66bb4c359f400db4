"""The loop that every algorithm shares: collect, update, report."""

from __future__ import annotations

import abc
import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any, ClassVar, NamedTuple, Self, cast

import numpy as np
import torch
from gymnasium import Space
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from . import checkpoint
from .build import make_networks, observation_layout, observation_norm
from .config import Config
from .envs.batches import as_batch
from .envs.layout import MASK, ObservationLayout
from .envs.make import EnvSource, make_envs
from .envs.spaces_json import space_from_json, space_to_json
from .envs.stepper import Stepper
from .experience.advantages import Advantages, td_lambda
from .experience.collector import Collector, EnvCollector
from .experience.path import Path
from .experience.reward_scale import RewardScale
from .experience.surrogate import Objective, surrogate_closure
from .fits import CriticFit, explained_variance
from .networks.modes import evaluating
from .networks.numpy_twin import actor, value_function
from .networks.policy import Policy
from .reports import Callback, Log, as_callbacks, stops
from .threads import few_threads


class Estimates(NamedTuple):
    """What an update learns from, each ``(T, N)``.

    Attributes:
        advantages: not normalised.
        returns: what the critic is to predict.
        values: by the critic before its update.

    """

    advantages: Tensor
    returns: Tensor
    values: Tensor


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
        layout: what lies where in a row of observations.
        action_space: of one environment.

    Raises:
        ValueError: an option that is unknown or out of range, an unknown environment, an
            unsupported space.

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
        if others:
            raise TypeError(
                f"{type(self).__name__} takes the environment as its only positional argument, and"
                f" options by name; got {(env, *others)!r}. There is no policy name: networks"
                " follow from the spaces, or pass policy= a module of your own"
            )
        config = self.config_class.from_dict(options)
        envs = make_envs(env, config.n_envs, config.vectorization)
        try:
            config = _with_copies(config, options, envs)
            layout = observation_layout(envs, config, _environment_seed(config, 0))
            self._build(config, layout, envs.single_action_space, policy, critic)
        except Exception:
            if not isinstance(env, VectorEnv):
                envs.close()
            raise
        self._source, self._make_collector = env, collector
        vars(self)["envs"] = envs  # otherwise made when first asked for

    def _build(
        self,
        config: Config,
        layout: ObservationLayout,
        action_space: Space[Any],
        policy: Policy | None,
        critic: nn.Module | None,
    ) -> None:
        config.check_batch()
        config.check_device()
        self.config, self.layout, self.action_space = config, layout, action_space
        self.advantages = cast("Advantages", config.advantages)  # the config made them objects
        self.critic_fit = cast("CriticFit", config.critic_fit)
        self.num_timesteps = self.iterations = 0
        self._progress_made = 0.0  # of the call of learn()
        self.generator = torch.Generator().manual_seed(config.seed or 0)
        self._predict_generator = torch.Generator().manual_seed(config.seed or 0)
        self._collector: Collector | None = None
        norm = self.observation_norm = observation_norm(layout, config)
        with torch.random.fork_rng(devices=[]):  # leave the user's random state alone
            torch.manual_seed(config.seed or 0)
            networks = make_networks(layout, action_space, norm, config, policy, critic)
        self.policy, self.critic = networks[0].to(config.device), networks[1].to(config.device)
        self.reward_scale = (
            RewardScale(config.n_envs, config.gamma).to(config.device)
            if config.normalise_rewards
            else None
        )
        self.setup()

    @cached_property
    def envs(self) -> VectorEnv:
        """The environments; those of an agent that was loaded are made when first asked for."""
        if self._source is None:
            raise ValueError(
                "this agent was loaded without an environment, which predict does not need: pass"
                " env= to load"
            )
        envs = make_envs(self._source, self.config.n_envs, self.config.vectorization)
        for name, mine, other in (
            ("observations", self.layout.space, envs.single_observation_space),
            ("actions", self.action_space, envs.single_action_space),
        ):
            if mine != other:
                if not isinstance(self._source, VectorEnv):
                    envs.close()
                raise ValueError(f"the agent has {name} of {mine}, the environment of {other}")
        return envs

    @property
    def has_envs(self) -> bool:
        """Whether the environments were made."""
        return "envs" in self.__dict__

    @property
    def env_id(self) -> str | None:
        """The id that the environments are made from, or None."""
        return self._source if isinstance(self._source, str) else None

    def close(self) -> None:
        """Close the environments, unless a vector environment was passed in."""
        if self.has_envs and not isinstance(self._source, VectorEnv):
            self.envs.close()

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
        """Estimate advantages and returns with the critic, by the option ``advantages``.

        Raises:
            ValueError: they are not finite, or not one per step.

        """
        c = self.config
        with torch.no_grad(), evaluating(self.critic):
            values = path.values(value_function(self.critic))
            advantages, returns = self.advantages(path, values, c.gamma)
            if c.td_lambda is not None:
                ends = path.terminated, path.truncated
                decay = {"gamma": c.gamma, "trace": c.td_lambda}
                returns = td_lambda(path.rewards, values.following, *ends, **decay)
        for name, x in (("advantages", advantages), ("returns", returns)):
            if x.shape != path.mask.shape:
                raise ValueError(
                    f"{name} must be one per step, shape {tuple(path.mask.shape)}, got"
                    f" {tuple(x.shape)}"
                )
            if not bool(x.isfinite().all()):
                raise ValueError(
                    f"{name} are not finite, as the critic's values are: nothing was updated"
                )
        return Estimates(advantages, returns, values.now)

    def objective(self, path: Path, advantages: Tensor) -> Objective:
        """Return the closure of what the policy maximises, and of its distribution.

        Args:
            path: T steps of N environments.
            advantages: normalised, ``(T, N)``.

        """
        return surrogate_closure(self.policy, path, advantages)

    def fit_critic(self, path: Path, estimates: Estimates) -> Log:
        """Regress the critic on the returns, by the option ``critic_fit``; return what to log."""
        returns = path.flat(estimates.returns)
        value_loss = self.critic_fit(
            self.critic,
            self.critic_parameters,
            self.critic_optimizer,
            path.rows,
            returns,
            self.generator,
        )
        return {
            "train/value_loss": value_loss,
            "train/explained_variance": explained_variance(path.flat(estimates.values), returns),
        }

    def learn(
        self,
        total_timesteps: int,
        progress: bool = True,
        callback: Callback | Iterable[Callback | None] | None = None,
        logger: Callback | Iterable[Callback | None] | None = None,
    ) -> Self:
        """Train until ``total_timesteps`` more environment steps are done.

        Whole rollouts are collected, so the count may end up to one rollout above.

        Args:
            total_timesteps: environment steps to add; resets do not count.
            progress: show a progress bar.
            callback: called with the agent and the log after each update, and may add to the log;
                False stops. Of several, all are called: see :mod:`rl.run.callbacks`.
            logger: called likewise after all callbacks, with what they added: see
                :mod:`rl.run.logs`.

        Returns:
            The agent itself.

        Raises:
            ValueError: ``total_timesteps`` is not positive, or an environment gave a NaN.
            TypeError: a callback or logger cannot be called.

        """
        from tqdm import tqdm

        if total_timesteps <= 0:
            raise ValueError(f"total_timesteps must be positive, got {total_timesteps}")
        callbacks, loggers = as_callbacks(callback), as_callbacks(logger)
        collector = self._collector = self._collector or self._new_collector()
        rows = self.config.steps_per_update // self.config.n_envs
        first, started = self.num_timesteps, time.perf_counter()
        self._progress_made = 0.0
        with tqdm(total=total_timesteps, unit="step", disable=not progress, leave=False) as bar:
            while self.num_timesteps < first + total_timesteps:
                with few_threads(self.policy, self.critic):
                    path = collector.collect(self.policy, rows, version=self.iterations)
                    log = self._learn_from(path)
                self.num_timesteps += path.steps
                self.iterations += 1
                self._progress_made = min((self.num_timesteps - first) / total_timesteps, 1.0)
                bar.update(min(path.steps, total_timesteps - bar.n))
                elapsed = time.perf_counter() - started
                log = self._progress(collector, self.num_timesteps - first, elapsed) | log
                answers = [call(self, log) for call in callbacks]
                for write in loggers:
                    write(self, log)
                if stops(answers):
                    break
        return self

    def _new_collector(self) -> Collector:
        return self._make_collector(
            Stepper(self.envs),
            self.layout,
            seed=_environment_seed(self.config, self.num_timesteps),
            generator=self.generator,
        )

    def _learn_from(self, path: Path) -> Log:
        """Update, with the scale of rewards and the moments of observations.

        The moments of observations move afterwards, so that the surrogate sees those that the
        actions were chosen from. The scale of rewards moves first: the critic is to know it from
        its first fit on.
        """
        kept = copy.deepcopy(self.reward_scale)
        try:
            scaled = path
            if self.reward_scale is not None:
                self.reward_scale.update(path)
                scaled = self.reward_scale(path)
            log = self.update(scaled)
        except BaseException:
            self.reward_scale = kept
            raise
        if self.observation_norm is not None:
            self.observation_norm.update(path.rows[:, self.layout.vector_columns])
        return log

    def scheduled(self, start: float, end: float | None) -> float:
        """Return an option that moves linearly over :meth:`learn`; its start where it does not."""
        return start if end is None else start + (end - start) * self._progress_made

    def _progress(self, collector: Collector, steps: int, elapsed: float) -> Log:
        returns, lengths = collector.episodes.returns, collector.episodes.lengths
        return {
            "time/steps": steps,  # of this call of learn()
            "time/progress": self._progress_made,  # of this call: 1 at its end
            "time/iterations": self.iterations,
            "time/total_timesteps": self.num_timesteps,
            "time/time_elapsed": elapsed,
            "time/fps": steps / elapsed,
            "rollout/ep_rew_mean": float(np.mean(returns)) if returns else float("nan"),
            "rollout/ep_len_mean": float(np.mean(lengths)) if lengths else float("nan"),
        }

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
            The action or actions, and None: there is no recurrent state.

        Raises:
            ValueError: the shape is not that of the observation space, or the mask is missing.

        """
        batch, single = as_batch(self.layout.space, obs)
        if action_masks is not None and self.layout.info_mask is None:
            raise ValueError(
                "action_masks are for environments that give them in their infos, and this one does"
                " not: forbidden actions could not be told apart in training"
            )
        masks = [action_masks] if single else action_masks
        rows = self.layout.flat(batch, None if action_masks is None else {MASK: masks})
        with evaluating(self.policy):
            if deterministic:
                on_device = torch.from_numpy(rows).to(self.config.device)
                actions = self.policy.mode(on_device).cpu().numpy()
            else:
                noise = self.policy.noise(1, len(rows), self._predict_generator)
                actions = actor(self.policy, noise)(0, rows)
        chosen = self.policy.to_env(actions)
        return (chosen[0] if single else chosen), None

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers, whose state a checkpoint keeps."""
        return {"critic_optimizer": self.critic_optimizer}

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
        """Take over what :meth:`state_dict` returned.

        Raises:
            ValueError: names or shapes do not fit.

        """
        try:
            for name, part in self._parts().items():
                if isinstance(part, torch.optim.Optimizer):
                    _check_optimizer(name, part, state["parts"][name])
                part.load_state_dict(state["parts"][name])
        except (RuntimeError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"the state does not fit this agent: {reason}") from error
        self.generator.set_state(state["generator"])
        self.num_timesteps, self.iterations = state["num_timesteps"], state["iterations"]

    def save(self, path: str | FilePath, notes: dict[str, Any] | None = None) -> None:
        """Write weights, optimizers, counters and random state to one file, atomically.

        Args:
            path: the file.
            notes: plain values to keep with them.

        """
        origin = self.layout.origin
        description = {
            "algorithm": self.name,
            "env_id": self.env_id,
            "config": self.config.to_dict(),
            "layout": {
                "space": space_to_json(self.layout.space),
                "mask": 0 if self.layout.info_mask is None else self.layout.info_mask.shape[0],
                "origin": None if origin is None else torch.from_numpy(origin),
            },
            "action_space": space_to_json(self.action_space),
            "notes": notes or {},
        }
        checkpoint.write(FilePath(path), description | {"agent": self.state_dict()})

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

        The environments start new episodes, and draws of ``predict`` start over; everything else
        continues where it was. Environments are made by the first call that needs them, which
        ``predict`` does not.

        Args:
            path: the file.
            env: environments to use instead of those of the saved id.
            policy: the policy, where the agent was made with one of its own; likewise ``critic``.
            critic: see there.
            collector: as for the agent.
            options: options to change, for example ``device`` or ``delta``.

        Raises:
            CheckpointError: the file is truncated, damaged, of another format or algorithm.
            FileNotFoundError: there is no such file.
            ValueError: an unknown option, or environments with other spaces.

        """
        saved = checkpoint.read(FilePath(path))
        agent = cls.__new__(cls)
        agent._source, agent._make_collector = env, collector
        try:
            if saved["algorithm"] != cls.name:
                raise checkpoint.CheckpointError(
                    f"{path} holds an agent of {saved['algorithm']!r}, not {cls.name!r}"
                )
            agent._restore(path, saved, options, policy, critic)
        except BaseException as error:
            agent.close()
            if isinstance(error, KeyError):
                raise checkpoint.CheckpointError(f"{path} is incomplete: no {error}") from error
            raise
        return agent

    def _restore(
        self,
        path: str | FilePath,
        saved: dict[str, Any],
        options: dict[str, Any],
        policy: Policy | None,
        critic: nn.Module | None,
    ) -> None:
        self.config = self.config_class.from_dict({**saved["config"], **options})
        space = space_from_json(saved["layout"]["space"])
        mask, origin = saved["layout"]["mask"], saved["layout"]["origin"]
        self.layout = ObservationLayout(space, mask, None if origin is None else origin.numpy())
        self.action_space = space_from_json(saved["action_space"])
        if self._source is None:
            self._source = saved["env_id"]
        else:
            self.config = _with_copies(self.config, options, self.envs)
        self._build(self.config, self.layout, self.action_space, policy, critic)
        state = saved["agent"]
        if "critic_fit" in options and "critic_optimizer" in state["parts"]:
            state["parts"]["critic_optimizer"] = self.critic_optimizer.state_dict()
        try:
            self.load_state_dict(state)
        except ValueError as error:
            raise checkpoint.CheckpointError(f"{path}: {error}") from error
        optimizers = [o for k, o in self.optimizers().items() if k != "critic_optimizer"]
        for group in (group for o in optimizers for group in o.param_groups):
            group.update({name: getattr(self.config, name) for name in options if name in group})


def _with_copies(config: Config, options: dict[str, Any], envs: VectorEnv) -> Any:
    """Return the config of an agent of these environments."""
    n = envs.num_envs
    if options.get("n_envs", n) != n:
        raise ValueError(
            f"n_envs={options['n_envs']}, but the environment that was passed is {n}: pass an id,"
            " or a function that makes one environment"
        )
    return replace(config, n_envs=n)


def _check_optimizer(name: str, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if not set(saved["state"]) <= set(range(count)):  # frozen parameters have none
        raise KeyError(f"the state of {name} is not that of {count} parameters")


def _environment_seed(config: Config, num_timesteps: int) -> int:
    """Return a seed that is unrelated between runs, and between the parts of a resumed run."""
    entropy = config.seed or 0, num_timesteps
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])
