"""The loop that every algorithm shares: collect, update, report."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from .config import Config
from .envs.layout import MASK, as_batch
from .envs.make import EnvSource, make_envs
from .envs.stepper import Stepper
from .experience.collector import Collector, Rollout
from .experience.path import Batch, make_batch
from .experience.reward_scale import RewardScale
from .fits import FITS, explained_variance
from .networks.build import make_networks, observation_layout, observation_norm
from .networks.critic import Critic
from .networks.policy import Policy
from .run import checkpoint
from .threads import few_threads

Log: TypeAlias = dict[str, Any]
Callback: TypeAlias = "Callable[[Agent, Log], bool | None]"


class Agent(abc.ABC):
    """A policy and a critic trained by rollouts; an algorithm is a way to :meth:`improve` them.

    Args:
        env: an environment id, a function that makes an environment, an environment, or a gymnasium
            vector environment.
        policy: a policy of your own, from rows of :attr:`layout` to a distribution.
        critic: a critic of your own, from rows to values.
        options: fields of the algorithm's config, by name.

    Attributes:
        layout: what lies where in a row of observations.

    Raises:
        ValueError: an option that is unknown or out of range, an unknown environment, an
            unsupported space.

    """

    config_class: ClassVar[type[Config]]
    name: ClassVar[str]

    def __init__(
        self,
        env: EnvSource,
        *,
        policy: Policy | None = None,
        critic: nn.Module | None = None,
        **options: Any,
    ) -> None:
        config = self.config_class.from_dict(options)
        self.envs = make_envs(env, config.n_envs, config.vectorization)
        self.env_id = env if isinstance(env, str) else None
        try:
            self._build(config, policy, critic)
        except Exception:
            if not isinstance(env, VectorEnv):
                self.envs.close()
            raise

    def _build(self, config: Config, policy: Policy | None, critic: nn.Module | None) -> None:
        self.config = config = replace(config, n_envs=self.envs.num_envs)
        config.check_batch()
        config.check_device()
        self.num_timesteps = 0
        self.iterations = 0
        self._progress_made = 0.0  # of the call of learn()
        self.generator = torch.Generator().manual_seed(config.seed)
        self._predict_generator = torch.Generator().manual_seed(config.seed)
        self._stepper = Stepper(self.envs)
        self._collector: Collector | None = None
        self.layout = observation_layout(self.envs)
        self.observation_norm = observation_norm(self.layout, config)
        self.reward_scale = (
            RewardScale(config.n_envs, config.gamma) if config.normalise_rewards else None
        )
        with torch.random.fork_rng(devices=[]):  # leave the user's random state alone
            torch.manual_seed(config.seed)
            networks = make_networks(
                self.layout,
                self.envs.single_action_space,
                self.observation_norm,
                config,
                policy,
                critic,
            )
        self.policy, self.critic = networks[0].to(config.device), networks[1].to(config.device)
        self.setup()

    def setup(self) -> None:
        """Make the optimizers: here the critic's, of what the policy does not share with it."""
        learnt = {id(p) for p in self.policy.parameters()}
        own = [p for p in self.critic.parameters() if id(p) not in learnt]
        if not own:
            raise ValueError("the critic has no parameters of its own to fit")
        self.critic_fit = FITS[self.config.critic_fit](self.critic, own, self.config)

    @abc.abstractmethod
    def improve(self, batch: Batch) -> Log:
        """Improve the policy; return what to log."""

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers, whose state a checkpoint keeps."""
        return {"critic_optimizer": self.critic_fit.optimizer}

    def fit_critic(self, batch: Batch) -> Log:
        """Regress the critic on the returns; return what to log."""
        value_loss = self.critic_fit.fit(batch.observations, batch.returns, self.generator)
        return {"train/value_loss": value_loss}

    def update(self, rollout: Rollout) -> Log:
        """Improve policy and critic from one rollout; return what to log.

        The moments of observations move afterwards, so that the surrogate sees those that the
        actions were chosen from. Those of rewards move first: the critic is to know their scale
        from its first fit on.
        """
        scaled = rollout
        if self.reward_scale is not None:
            self.reward_scale.update(rollout.rewards, rollout.done, rollout.valid)
            scaled = replace(rollout, rewards=self.reward_scale(rollout.rewards))
        critic = self.critic.function() if isinstance(self.critic, Critic) else self.critic
        batch = make_batch(scaled.to(self.config.device), self.policy, critic, self.config)
        log = self.improve(batch) | self.fit_critic(batch)
        if self.observation_norm is not None:
            self.observation_norm.update(batch.observations[:, self.layout.vector_columns])
        return log | {
            "train/explained_variance": explained_variance(batch.values, batch.returns),
        }

    def learn(
        self,
        total_timesteps: int,
        progress: bool = True,
        callback: Callback | Sequence[Callback] = (),
    ) -> Self:
        """Train until ``total_timesteps`` more environment steps are done.

        Whole rollouts are collected, so the count may end up to one rollout above.

        Args:
            total_timesteps: environment steps to add; resets do not count.
            progress: show a progress bar.
            callback: called with the agent and the log after each update; False stops. Of several,
                all are called: see :mod:`rl.callbacks`.

        Returns:
            The agent itself.

        Raises:
            ValueError: ``total_timesteps`` is not positive, or an environment gave a NaN.

        """
        from tqdm import tqdm

        if total_timesteps <= 0:
            raise ValueError(f"total_timesteps must be positive, got {total_timesteps}")
        callbacks = [callback] if callable(callback) else callback
        if self._collector is None:
            seed = _environment_seed(self.config.seed, self.num_timesteps)
            self._collector = Collector(
                self._stepper, self.layout, seed=seed, generator=self.generator
            )
        first, started = self.num_timesteps, time.perf_counter()
        self._progress_made = 0.0
        with tqdm(total=total_timesteps, unit="step", disable=not progress, leave=False) as bar:
            while self.num_timesteps < first + total_timesteps:
                rows = self.config.steps_per_update // self.envs.num_envs
                with few_threads(self.policy, self.critic):
                    rollout = self._collector.collect(self.policy, rows)
                    log = self.update(rollout)
                steps = int(rollout.valid.sum())
                self.num_timesteps += steps
                self.iterations += 1
                self._progress_made = min((self.num_timesteps - first) / total_timesteps, 1.0)
                bar.update(min(steps, total_timesteps - bar.n))
                elapsed = time.perf_counter() - started
                log = self._progress(self.num_timesteps - first, elapsed) | log
                answers = [call(self, log) for call in callbacks]
                if any(isinstance(answer, bool | np.bool_) and not answer for answer in answers):
                    break
        return self

    def scheduled(self, start: float, end: float | None) -> float:
        """Return an option that moves linearly over :meth:`learn`; its start where it does not."""
        return start if end is None else start + (end - start) * self._progress_made

    def _progress(self, steps: int, elapsed: float) -> Log:
        assert self._collector is not None
        returns, lengths = self._collector.returns, self._collector.lengths
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
            action_masks: The allowed actions, if the environment gives them in its infos.

        Returns:
            The action or actions, and None: there is no recurrent state.

        Raises:
            ValueError: the shape is not that of the observation space, or a mask lacks.

        """
        batch, single = as_batch(self.envs.single_observation_space, obs)
        if action_masks is not None and self.layout.info_mask is None:
            raise ValueError(
                "action_masks are for environments that give them in their infos, and this one does"
                " not: forbidden actions could not be told apart in training"
            )
        masks = [action_masks] if single else action_masks
        infos = None if action_masks is None else {MASK: masks}
        rows = self.layout.flat(batch, infos)
        if deterministic:
            actions = self.policy.mode(torch.from_numpy(rows).to(self.config.device)).cpu().numpy()
        else:
            noise = self.policy.noise(1, len(rows), self._predict_generator)
            actions = self.policy.actor(noise)(0, rows)
        chosen = self.policy.to_env(actions)
        return (chosen[0] if single else chosen), None

    def modules(self) -> dict[str, nn.Module]:
        """Return the modules whose weights a checkpoint keeps."""
        modules: dict[str, nn.Module] = {"policy": self.policy, "critic": self.critic}
        return modules | ({"reward_scale": self.reward_scale} if self.reward_scale else {})

    def save(self, path: str | Path, notes: dict[str, float] | None = None) -> None:
        """Write weights, optimizers, counters and random state to one file, atomically.

        Args:
            path: the file.
            notes: numbers to keep with them, such as what the agent reached.

        """
        tensors: dict[str, Tensor] = {"generator": self.generator.get_state()}
        scalars: dict[str, Any] = {}
        for name, module in self.modules().items():
            tensors |= {f"{name}.{key}": t for key, t in module.state_dict().items()}
        for name, optimizer in self.optimizers().items():
            state, groups = checkpoint.flatten_optimizer(optimizer)
            tensors |= {f"{name}.{key}": t for key, t in state.items()}
            scalars[name] = groups
        manifest = {
            "algorithm": self.name,
            "env_id": self.env_id,
            "config": self.config.to_dict(),
            "num_timesteps": self.num_timesteps,
            "iterations": self.iterations,
            "optimizers": scalars,
            "notes": notes or {},
        }
        checkpoint.write(Path(path), manifest, tensors)

    @classmethod
    def load(
        cls,
        path: str | Path,
        env: EnvSource | None = None,
        *,
        device: str | None = None,
        **networks: Any,
    ) -> Self:
        """Return the agent of a file written by :meth:`save`.

        The environments start new episodes, and draws of ``predict`` start over; everything else
        continues where it was.

        Args:
            path: the file.
            env: environments to use instead of those of the saved id.
            device: one to use instead of the agent's.
            networks: ``policy`` and ``critic``, where the agent was made with its own.

        Raises:
            CheckpointError: the file is truncated, damaged, of another format or algorithm.
            FileNotFoundError: there is no such file.
            ValueError: no ``env`` for an agent that was not made from an id.

        """
        manifest, tensors = checkpoint.read(Path(path))
        try:
            if device is not None:
                manifest["config"]["device"] = device
            return cls._from_checkpoint(path, env, manifest, tensors, networks)
        except KeyError as error:
            raise checkpoint.CheckpointError(f"{path} is incomplete: no {error}") from error

    @classmethod
    def _from_checkpoint(
        cls,
        path: str | Path,
        env: EnvSource | None,
        manifest: dict[str, Any],
        tensors: dict[str, Tensor],
        networks: dict[str, Any],
    ) -> Self:
        if manifest["algorithm"] != cls.name:
            raise checkpoint.CheckpointError(
                f"{path} holds an agent of {manifest['algorithm']!r}, not {cls.name!r}"
            )
        env = env if env is not None else manifest["env_id"]
        if env is None:
            raise ValueError(f"{path} does not name its environment: pass env=")
        agent = cls(env, **networks, **cls.config_class.from_dict(manifest["config"]).to_dict())
        checkpoint.restore(path, agent.modules(), agent.optimizers(), manifest, tensors)
        agent.generator.set_state(tensors["generator"])
        agent.num_timesteps = manifest["num_timesteps"]
        agent.iterations = manifest["iterations"]
        return agent


def _environment_seed(*entropy: int) -> int:
    """Return a seed that is unrelated between runs, and between the parts of a resumed run."""
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])
