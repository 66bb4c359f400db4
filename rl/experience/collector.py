"""Experience from vector environments."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import Space
from gymnasium.vector import AutoresetMode

from ..envs.layout import ObservationLayout
from ..envs.masks import forbidden_rows
from ..envs.stepper import Stepper, Transition
from ..networks.modes import evaluating
from ..networks.numpy_twin import actor, distribution_function
from ..networks.policy import Policy
from .path import Path


class Episodes:
    """Returns and lengths of the last hundred finished episodes, across paths.

    Args:
        n_envs: number of environments.

    """

    def __init__(self, n_envs: int) -> None:
        self.returns: deque[float] = deque(maxlen=100)
        self.lengths: deque[int] = deque(maxlen=100)
        self._return, self._length = np.zeros(n_envs), np.zeros(n_envs, dtype=np.int64)

    def add(self, rewards: np.ndarray, done: np.ndarray, mask: np.ndarray) -> None:
        """Add steps, all ``(T, N)``; episodes are kept in the order of their ends."""
        totals = np.where(mask, rewards, 0.0).cumsum(0) + self._return
        steps = mask.cumsum(0) + self._length
        spent, counted = np.zeros_like(self._return), np.zeros_like(self._length)
        for t, i in np.argwhere(done):
            self.returns.append(float(totals[t, i] - spent[i]))
            self.lengths.append(int(steps[t, i] - counted[i]))
            spent[i], counted[i] = totals[t, i], steps[t, i]
        self._return, self._length = totals[-1] - spent, steps[-1] - counted

    @property
    def mean_return(self) -> float:
        """Mean of the returns; NaN before the first."""
        return float(np.mean(self.returns)) if self.returns else float("nan")

    @property
    def mean_length(self) -> float:
        """Mean of the lengths; NaN before the first."""
        return float(np.mean(self.lengths)) if self.lengths else float("nan")

    def restart(self) -> None:
        """Forget the episodes that have not ended."""
        self._return[:], self._length[:] = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the returns and lengths, also of the episodes that have not ended."""
        whole = {"returns": list(self.returns), "lengths": list(self.lengths)}
        begun = torch.from_numpy(self._return.copy()), torch.from_numpy(self._length.copy())
        return whole | {"begun": list(begun)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.returns.extend(state["returns"])
        self.lengths.extend(state["lengths"])
        for x, saved in zip((self._return, self._length), state["begun"], strict=True):
            x[:] = saved if len(saved) == len(x) else 0


class Collector(Protocol):
    """Whatever turns a policy into paths; pass another one as ``TRPO(env, collector=...)``.

    Called with ``(stepper, layout, seed=, generator=)``, as :class:`EnvCollector` is.
    """

    episodes: Episodes

    def collect(self, policy: Policy, steps: int, *, version: int = 0) -> Path:
        """Return the next ``steps`` steps of every environment."""
        ...


class EnvCollector:
    """Steps a vector environment in this process.

    A path that was interrupted leaves the environments in an unknown state: the next one starts new
    episodes. To record more than the reward, override :meth:`signals`.

    Args:
        stepper: the environments.
        layout: of their observations.
        seed: environment ``i`` starts its first episode from ``seed + i``.
        generator: source of the actions' noise.

    """

    def __init__(
        self, stepper: Stepper, layout: ObservationLayout, *, seed: int, generator: torch.Generator
    ) -> None:
        self.stepper, self.layout = stepper, layout
        self.generator = generator
        self.episodes = Episodes(stepper.envs.num_envs)
        self._seed: int | None = seed
        self._row: np.ndarray | None = None  # None: reset before the next step
        self._starts = np.ones(stepper.envs.num_envs, np.bool_)

    def signals(self, step: Transition) -> Mapping[str, np.ndarray]:
        """Return what a path keeps of a step, by name, each ``(N,)``."""
        return {"reward": step.rewards}

    def _reset(self) -> np.ndarray:
        self.episodes.restart()
        self._starts[:] = True
        observations, infos = self.stepper.reset(self._seed)  # None after the first time
        self._seed = None
        return self.layout.flat(observations, infos)

    def state_dict(self) -> dict[str, Any]:
        """Return where the next path starts; no ``environments`` if it starts with a reset."""
        row, environments = self._row, None
        if row is not None:
            environments = self.stepper.state_dict()
            if environments is None:
                warnings.warn(
                    "the environments hide their state: all episodes restart at this checkpoint,"
                    " here and in a run that is resumed from it",
                    stacklevel=6,
                )
            else:
                environments["row"] = torch.from_numpy(row)
                environments["starts"] = torch.from_numpy(self._starts.copy())
        return {"episodes": self.episodes.state_dict(), "environments": environments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another collector stopped.

        Raises:
            ValueError: it has other environments.

        """
        environments = state["environments"]
        if environments is not None:
            self.stepper.load_state_dict(environments)
            self._row = environments["row"].numpy().copy()
            self._starts = environments["starts"].numpy().copy()
            self._seed = None
        self.episodes.load_state_dict(state["episodes"])

    def collect(self, policy: Policy, steps: int, *, version: int = 0) -> Path:
        """Step every environment ``steps`` times, from where the last call stopped.

        Modules are in evaluation mode while the policy acts: no dropout, no moving statistics.

        Args:
            policy: who acts.
            steps: T.
            version: how many updates the policy has seen.

        Raises:
            ValueError: an observation or reward is NaN or infinite, a mask allows no action, or
                the policy does not return one log-probability per action.

        """
        n, layout = self.stepper.envs.num_envs, self.layout
        rows = np.empty((steps + 1, n, layout.width), layout.dtype)
        rows[0] = self._reset() if self._row is None else self._row
        self._row = None  # until the path is whole
        actions: list[np.ndarray] = []
        signals: dict[str, np.ndarray] = {}
        terminated, truncated, mask = (np.empty((steps, n), np.bool_) for _ in range(3))
        finals, final_at = [np.empty((0, layout.width), layout.dtype)], [np.empty((0, 2), int)]
        with evaluating(policy):
            act = actor(policy, policy.noise(steps, n, self.generator))
            for t in range(steps):
                actions.append(act(t, rows[t]))
                step = self._step(policy.to_env(actions[t]), t)
                given = self.signals(step)
                if "reward" not in given:
                    raise ValueError(f"signals() must return 'reward', got {', '.join(given)}")
                for name, x in given.items():
                    if name not in signals:
                        signals[name] = np.full((steps, n), np.nan)
                    signals[name][t] = x
                terminated[t], truncated[t], mask[t] = step.terminated, step.truncated, step.valid
                layout.write(step.observations, rows[t + 1], step.infos, step.ended)
                if step.finals is not None:
                    finals.append(layout.flat(step.finals, ended=True))
                    ended = np.flatnonzero(step.terminated | step.truncated)
                    final_at.append(np.column_stack([np.full_like(ended, t), ended]))
            path = Path(
                observations=torch.from_numpy(rows),
                actions=torch.from_numpy(np.stack(actions)),
                log_prob=torch.zeros(steps, n, dtype=torch.float32),
                signals={k: torch.from_numpy(x.astype(np.float32)) for k, x in signals.items()},
                terminated=torch.from_numpy(terminated),
                truncated=torch.from_numpy(truncated),
                starts=torch.from_numpy(self._starts_of(terminated | truncated, mask)),
                mask=torch.from_numpy(mask),
                finals=torch.from_numpy(np.concatenate(finals)),
                final_at=torch.from_numpy(np.concatenate(final_at)),
                version=version,
            )
            _check(path, layout, self.stepper.envs.single_action_space)
            path = _with_log_prob(path, policy)
        self.episodes.add(signals["reward"], terminated | truncated, mask)
        self._row = rows[steps].copy()
        return path

    def _step(self, actions: np.ndarray, t: int) -> Transition:
        try:
            return self.stepper.step(actions)
        except Exception as error:
            error.add_note(
                f"This was at step {t} of a rollout. Nothing was updated, and the next rollout"
                " starts new episodes."
            )
            raise

    def _starts_of(self, done: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return where episodes start, and remember those that start with the next path."""
        resets_next = self.stepper.mode is AutoresetMode.NEXT_STEP  # by a dummy transition
        after = ~mask if resets_next else done
        starts = np.concatenate([self._starts[None], after[:-1]])
        self._starts = after[-1]
        return starts & mask


@torch.no_grad()
def _with_log_prob(path: Path, policy: Policy) -> Path:
    """Return a path on the policy's device with the log-probabilities of its actions."""
    path = path.to(next((p.device for p in policy.parameters()), torch.device("cpu")))
    log_prob = distribution_function(policy)(path.rows).log_prob(path.flat(path.actions))
    if log_prob.shape != (path.steps,):
        raise ValueError(
            f"the policy's log_prob must have shape ({path.steps},), one per action, got"
            f" {tuple(log_prob.shape)}: wrap a distribution over the entries of an action in"
            " torch.distributions.Independent(..., 1)"
        )
    everywhere = log_prob.new_zeros(path.mask.shape)
    everywhere[path.mask] = log_prob
    return replace(path, log_prob=everywhere)


def _check(path: Path, layout: ObservationLayout, action_space: Space[Any]) -> None:
    """Raise a ValueError where the environments gave what nothing can be learnt from."""
    # row t + 1 of the observations is what step t led to; row 0 was checked unless it is a reset's
    for name, x, first in (
        ("observation", path.observations, -1),
        *((name, x, 0) for name, x in path.signals.items()),
    ):
        if bool(x.isfinite().all()):
            continue
        finite = x.isfinite().reshape(*x.shape[:2], -1).all(-1)
        t, i = (~finite).nonzero()[0].tolist()
        t += first
        action = path.actions[t, i].tolist() if t >= 0 else None
        when = "at its reset, before" if t < 0 else f"at step {t}, on action {action}, of"
        raise ValueError(
            f"environment {i} gave a {name} that is NaN, infinite or too large for float32 {when}"
            " this rollout: nothing was updated"
        )
    if not bool(path.finals.isfinite().all()):
        raise ValueError(
            "the last observation of an episode is NaN, infinite or too large for float32:"
            " nothing was updated"
        )
    for part in layout.of_kind("mask"):
        masks = path.observations[:-1, :, part.columns].numpy()
        stuck = forbidden_rows(masks, action_space) & path.mask.numpy()[..., None]
        if stuck.any():
            t, i, component = np.argwhere(stuck)[0].tolist()
            where = f" in component {component}" if stuck.shape[-1] > 1 else ""
            raise ValueError(
                f"environment {i} allowed no action at step {t} of this rollout{where}: its action"
                " mask is all zeros there. Nothing was updated"
            )
