"""The networks of an agent, from its environments' spaces and its options."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from gymnasium import Space
from gymnasium.vector import VectorEnv
from torch import nn

from .config import Config
from .envs.layout import MASK, ObservationLayout
from .envs.make import EnvSource, make_envs
from .envs.stepper import Stepper
from .networks.critic import Critic
from .networks.encoders import Encoder
from .networks.heads import make_head
from .networks.moments import ObservationNorm
from .networks.policy import HeadPolicy, Policy


def training_envs(source: EnvSource, config: Config) -> VectorEnv:
    """Return the environments of an agent."""
    return make_envs(
        source,
        config.n_envs,
        config.vectorization,
        env_timeout=config.env_timeout,
        on_env_error=config.on_env_error,
    )


def observation_layout(envs: VectorEnv, config: Config, seed: int) -> ObservationLayout:
    """Return the layout of rows; action masks in the infos of a reset are part of it.

    Where observations are to be normalised, those that float32 would round are measured from the
    first one.

    Args:
        envs: the environments; they are reset.
        config: options of the agent.
        seed: seed of the reset. Pass that of the first path, so that there is only one.

    Raises:
        ValueError: an unsupported observation space.

    """
    stepper = Stepper(envs)
    observations, _ = stepper.reset(seed)
    layout = ObservationLayout(envs.single_observation_space, mask=stepper.choices or 0)
    return layout.with_origin(observations) if config.normalise_observations else layout


def observation_norm(layout: ObservationLayout, config: Config) -> ObservationNorm | None:
    """Return the normalisation of observations, or None if there is none."""
    columns = layout.vector_columns
    return ObservationNorm(len(columns)) if config.normalise_observations and columns else None


def make_networks(
    layout: ObservationLayout,
    action_space: Space[Any],
    norm: ObservationNorm | None,
    config: Config,
    policy: Policy | None = None,
    critic: nn.Module | None = None,
) -> tuple[Policy, nn.Module]:
    """Return a policy and a critic; with ``shared_encoder`` they share all layers but the last.

    A network that is given is used as it is.

    Raises:
        ValueError: an unsupported action space, or a mask that does not fit it.

    """
    if policy is None:
        head = make_head(
            action_space,
            squash=config.squash_actions,
            state_dependent_std=config.state_dependent_std,
        )
        mask = next(iter(layout.of_kind("mask")), None)
        encoder = Encoder(layout, config.hidden, norm, config.activation)
        policy = HeadPolicy(encoder, head, mask)
    if critic is None:
        if config.shared_encoder and isinstance(policy, HeadPolicy):
            encoder = policy.encoder
        else:
            hidden = config.hidden if config.critic_hidden is None else config.critic_hidden
            encoder = Encoder(layout, hidden, norm, config.activation)
        critic = Critic(encoder)
    return policy, critic


def with_copies(config: Config, options: dict[str, Any], envs: VectorEnv) -> Any:
    """Return the config of an agent of these environments."""
    n = envs.num_envs
    if options.get("n_envs", n) != n:
        raise ValueError(
            f"n_envs={options['n_envs']}, but the environment that was passed is {n}: pass an id,"
            " or a function that makes one environment"
        )
    return replace(config, n_envs=n)


def environment_seed(config: Config, num_timesteps: int) -> int:
    """Return a seed that is unrelated between runs, and between the parts of a resumed run."""
    entropy = config.seed or 0, num_timesteps
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def check_spaces(
    layout: ObservationLayout, action_space: Space[Any] | None, envs: VectorEnv
) -> None:
    """Raise a ValueError where environments have other spaces than an agent; None for any."""
    for name, mine, other in (
        ("observations", layout.space, envs.single_observation_space),
        ("actions", action_space, envs.single_action_space),
    ):
        if mine is not None and mine != other:
            raise ValueError(f"the agent has {name} of {mine}, the environment of {other}")


def masks_as_infos(layout: ObservationLayout, masks: Any) -> dict[str, Any] | None:
    """Return action masks as the infos of an environment have them.

    Raises:
        ValueError: there are masks, and none were there in training.

    """
    if masks is None:
        return None
    if layout.info_mask is None:
        raise ValueError(
            "action_masks are for environments that give them in their infos, and this one does"
            " not: forbidden actions could not be told apart in training"
        )
    return {MASK: masks}


def refuse_positional(agent: Any, *arguments: Any) -> None:
    """Raise a TypeError for more than one argument without a name, as stable-baselines3 has."""
    if len(arguments) > 1:
        raise TypeError(
            f"{type(agent).__name__} takes the environment as its only positional argument, and"
            f" options by name; got {arguments!r}. There is no policy name: networks follow from"
            " the spaces, or pass policy= a module of your own"
        )
