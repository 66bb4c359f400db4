"""The networks of an agent, from its environments' spaces and its options."""

from __future__ import annotations

from typing import Any

from gymnasium import Space
from gymnasium.vector import VectorEnv
from torch import nn

from .config import Config
from .envs.layout import ObservationLayout
from .envs.stepper import Stepper
from .networks.critic import Critic
from .networks.encoders import Encoder
from .networks.heads import make_head
from .networks.moments import ObservationNorm
from .networks.policy import HeadPolicy, Policy


def observation_layout(envs: VectorEnv, config: Config, seed: int) -> ObservationLayout:
    """Return the layout of rows; action masks in the infos of a reset are part of it.

    Where observations are to be normalised, those that float32 would round are measured from the
    first one.

    Args:
        envs: the environments; they are reset.
        config: options of the agent.
        seed: of the reset: that of the first path, so that the environments see no other.

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
