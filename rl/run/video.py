"""Films of a trained agent."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import gymnasium
import numpy as np

from ..agent import Agent

_FPS = 30


def record(
    agent: Agent,
    env_id: str,
    path: Path,
    *,
    episodes: int = 1,
    seed: int = 0,
    max_frames: int = 1000,
    deterministic: bool = True,
) -> list[float]:
    """Play episodes and write them as an animated GIF.

    Args:
        agent: who plays.
        env_id: the environment; it must render ``rgb_array``.
        path: file to write, ``.gif``.
        episodes: how many.
        seed: of the first episode; the others follow from it.
        max_frames: of the film; it ends there, and with it the episode.
        deterministic: take the most likely action instead of drawing one.

    Returns:
        The return of each episode.

    Raises:
        ValueError: another kind of file, no episodes, or an environment that does not render.

    """
    if path.suffix != ".gif":
        raise ValueError(f"films are written as .gif, got {path}")
    if episodes < 1 or max_frames < 1:
        raise ValueError(
            f"episodes and max_frames must be at least 1, got {episodes}, {max_frames}"
        )
    try:
        env = gymnasium.make(env_id, render_mode="rgb_array")
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(f"cannot render {env_id!r}: {' '.join(str(error).split())}") from error
    frames: list[np.ndarray] = []
    returns: list[float] = []
    mask = agent.layout.info_mask
    with closing(env):
        for episode in range(episodes):
            if len(frames) >= max_frames:
                break
            obs, info = env.reset(seed=seed if episode == 0 else None)
            total, done = 0.0, False
            while not done and len(frames) < max_frames:
                frames.append(np.asarray(env.render()))
                masks = {"action_masks": info[mask.name]} if mask is not None else {}
                action, _ = agent.predict(obs, deterministic=deterministic, **masks)
                obs, reward, terminated, truncated, info = env.step(action)
                total, done = total + float(reward), terminated or truncated
            if done:  # and not cut off
                returns.append(total)
    _write(frames, path, env.metadata.get("render_fps") or _FPS)
    return returns


def _write(frames: list[np.ndarray], path: Path, fps: float) -> None:
    from PIL import Image  # late: only films need it; matplotlib has it installed

    images = [Image.fromarray(frame).quantize() for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    # a GIF counts hundredths of a second, and viewers slow down what is below two
    duration = max(20, 10 * round(100 / fps))
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0)
