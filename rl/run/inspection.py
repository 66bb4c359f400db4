"""What an environment is, and what would be made of it."""

from __future__ import annotations

import re
import warnings

import gymnasium
from gymnasium.utils.env_checker import check_env

from ..build import make_networks, observation_layout
from ..config import Config
from ..envs.make import describe, make_envs
from ..envs.pool import PoolVectorEnv

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # gymnasium's warnings are yellow


def inspect_env(env_id: str, config: Config) -> tuple[list[str], bool]:
    """Run gymnasium's checker where the environment is gymnasium's, and say what would be used.

    Args:
        env_id: the environment.
        config: options of an agent.

    Returns:
        Lines to read, and whether the environment can be learnt in and passes the checker if that
        can be run.

    Raises:
        ValueError: there is no such environment.

    """
    envs = make_envs(env_id, config.n_envs, config.vectorization)
    lines = [
        f"environments    {describe(envs)}, autoreset {envs.metadata['autoreset_mode'].value}",
        f"observations    {envs.single_observation_space}",
        f"actions         {envs.single_action_space}",
    ]
    sound = True
    try:
        layout = observation_layout(envs, config, seed=0)
        policy, critic = make_networks(layout, envs.single_action_space, None, config)
        parts = ", ".join(
            f"{part.name or 'all'}: {part.kind} {part.shape}" for part in layout.parts
        )
        sizes = [sum(p.numel() for p in m.parameters()) for m in (policy, critic)]
        lines += [
            f"rows            {layout.width} columns of {layout.dtype}; {parts}",
            f"policy          {type(policy.head).__name__}, {sizes[0]:,} parameters",
            f"critic          {sizes[1]:,} parameters",
        ]
    except ValueError as error:
        lines.append(f"no agent        {error}")
        sound = False
    finally:
        envs.close()
    if isinstance(envs, PoolVectorEnv):
        lines.append("gymnasium       its checker cannot be run on environments by envpool")
        return lines, sound
    passed, remarks = _gymnasium_check(env_id)
    lines.append(f"gymnasium       its checker {'passes' if passed else 'fails'}")
    lines += [f"                {remark}" for remark in remarks]
    return lines, sound and passed


def _gymnasium_check(env_id: str) -> tuple[bool, list[str]]:
    """Run the checker on a single environment; return whether it passed, and its words."""
    env = gymnasium.make(env_id)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check_env(env.unwrapped, skip_render_check=True)
            failure = []
        except Exception as error:  # the environment's own, or an assertion of the checker
            failure = [f"{type(error).__name__}: {' '.join(str(error).split())}"]
        finally:
            env.close()
    remarks = [" ".join(_COLOUR.sub("", str(w.message)).split()) for w in caught]
    return not failure, failure + sorted(set(remarks))
