"""The state of vector environments: that of each copy, or their own where they hold all copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import SyncVectorEnv, VectorEnv

from ..json_tree import to_json
from .copies import Copies
from .state import HiddenStateError, assign, give, state_of, values_of

_MOST = 2**18  # bytes of JSON for one environment


def snapshot(envs: VectorEnv) -> list[Any] | None:
    """Return the state of environments as plain values and tensors; None if some of it is hidden.

    What is outside the attributes, as global variables are, is not found; nor are changes of a
    MuJoCo model.
    """
    if isinstance(envs, Copies):
        states = envs.apply(_state_or_none)
    elif isinstance(envs, SyncVectorEnv):
        states = [_state_or_none(env) for env in envs.envs]
    else:
        try:
            return [_storable(values_of(envs, []))]
        except HiddenStateError:
            return None
    return None if None in states else states


def restore(envs: VectorEnv, states: Sequence[Any], ended: np.ndarray) -> None:
    """Give environments the state of others like them, of which the next step resets ``ended``.

    Raises:
        ValueError: the state is that of other environments.

    """
    if isinstance(envs, Copies):
        envs.apply(give, states)
        envs.autoreset = ended.copy()
    elif isinstance(envs, SyncVectorEnv):
        for env, state in zip(envs.envs, states, strict=True):
            give(env, state)
        envs._autoreset_envs = ended.copy()
    else:
        assign(envs, *states)


def _state_or_none(env: gymnasium.Env[Any, Any]) -> Any:
    try:
        return _storable(state_of(env))
    except HiddenStateError:
        return None


def _storable(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state that a checkpoint can hold, and that leaves room for others."""
    try:
        tree, _ = to_json(state)
    except (TypeError, ValueError) as error:
        raise HiddenStateError(str(error)) from error
    if len(tree) > _MOST:
        raise HiddenStateError(f"the state is {len(tree):,} bytes of JSON")
    return state
