"""The algorithms by name, and agents from files of any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import checkpoint
from .agent import Agent
from .envs.make import EnvSource
from .kl_penalty import KLPenalty
from .npg import NPG
from .ppo import PPO
from .trpo import TRPO
from .vpg import VPG

ALGORITHMS: dict[str, type[Agent]] = {a.name: a for a in (TRPO, NPG, KLPenalty, PPO, VPG)}


def load(path: str | Path, env: EnvSource | None = None, **options: Any) -> Agent:
    """Return the agent of a file, whichever algorithm wrote it: see :meth:`Agent.load`.

    Raises:
        CheckpointError: the file is truncated, damaged, of another format or algorithm.

    """
    name = checkpoint.read(Path(path)).get("algorithm")
    if not isinstance(name, str) or name not in ALGORITHMS:
        raise checkpoint.CheckpointError(
            f"{path} holds an agent of {str(name)[:40]!r}, which is none of {', '.join(ALGORITHMS)}"
        )
    return ALGORITHMS[name].load(path, env, **options)
