"""Films of a trained agent."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from ..envs.stepper import Stepper
from ..options import check_counts
from .evaluation import Predictor, transitions
from .logs import writable


def record(
    agent: Predictor,
    env: str | Callable[..., gymnasium.Env[Any, Any]],
    path: str | Path,
    *,
    episodes: int = 1,
    seed: int = 0,
    max_frames: int = 1000,
    deterministic: bool = True,
) -> list[float]:
    """Play episodes, write them as an animated GIF or as MP4, and return what those earned.

    The agent is anything that :func:`evaluate` takes. The environment is an id, or a function that
    makes one; it is called with ``render_mode="rgb_array"`` if it has such a parameter. MP4 needs
    the package imageio-ffmpeg. After ``max_frames`` the film ends, and an episode that goes on has
    no return.

    Raises:
        ValueError: another kind of file, or an environment that gives no pictures.

    """
    path = writable(path)
    if path.suffix.lower() not in (".gif", ".mp4"):
        raise ValueError(f"films are written as .gif or .mp4, got {path}")
    write = _write_gif if path.suffix.lower() == ".gif" else partial(_write_mp4, _ffmpeg())
    check_counts(episodes=episodes, max_frames=max_frames)
    envs, frames, returns, total = _make(env), [], [], 0.0
    photograph = lambda: frames.append(_picture(envs.envs[0]))  # noqa: E731 # used once
    with closing(envs):
        for step in transitions(agent, Stepper(envs), seed, deterministic, before=photograph):
            total += float(step.rewards[0])
            if step.terminated[0] or step.truncated[0]:
                returns.append(total)
                total = 0.0
            if len(returns) == episodes or len(frames) >= max_frames:
                break
    write(frames, path, envs.metadata.get("render_fps") or 30)
    return returns


def _make(env: str | Callable[..., gymnasium.Env[Any, Any]]) -> SyncVectorEnv:
    """Return one copy that renders; it starts over at once, so that no step is a mere reset."""
    make = partial(gymnasium.make, env) if isinstance(env, str) else env
    if not callable(make):
        raise TypeError(f"env must be an id or a function that makes an environment, got {env!r}")
    parameters = inspect.signature(make).parameters.values()
    if any(p.name == "render_mode" or p.kind is p.VAR_KEYWORD for p in parameters):
        make = partial(make, render_mode="rgb_array")
    vector = partial(SyncVectorEnv, [make], copy=False, autoreset_mode=AutoresetMode.DISABLED)
    return _quietly(vector, f"cannot make {_name(env)} with render_mode='rgb_array'")


def _picture(env: gymnasium.Env[Any, Any]) -> np.ndarray:
    """Return what an environment shows, checked."""
    picture = _quietly(env.render, f"cannot render {_name(env)}")
    shape, dtype = getattr(picture, "shape", ()), getattr(picture, "dtype", None)
    if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3:
        what = type(picture).__name__ if dtype is None else f"{dtype} of shape {shape}"
        rule = "its render() must return pictures, uint8 arrays of shape (height, width, 3)"
        raise ValueError(f"cannot film {_name(env)}: {rule}, and returned {what}")
    return np.array(picture, order="C")  # environments may draw the next one into it


def _quietly(call: Callable[[], Any], failure: str) -> Any:
    """Call without gymnasium's warnings, which are of what becomes a ValueError here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    except Exception as error:  # any: environments refuse a render mode in their own ways
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{failure}: {reason}") from error


def _name(env: Any) -> str:
    spec = getattr(env, "spec", None)
    return repr(env if isinstance(env, str) else spec.id if spec is not None else env)


def _write_gif(frames: list[np.ndarray], path: Path, fps: float) -> None:
    from PIL import Image  # late: only films need it; matplotlib has it installed

    first, *others = [Image.fromarray(frame).quantize() for frame in frames]
    # a GIF counts hundredths of a second, and viewers slow down what is below two
    duration = max(20, 10 * round(100 / fps))
    first.save(path, save_all=True, append_images=others, duration=duration, loop=0)


def _ffmpeg() -> ModuleType:
    try:
        return importlib.import_module("imageio_ffmpeg")
    except ModuleNotFoundError as error:
        hint = "pip install imageio-ffmpeg, or write a .gif"
        raise ValueError(f"an .mp4 file needs one more package: {hint}") from error


def _write_mp4(ffmpeg: ModuleType, frames: list[np.ndarray], path: Path, fps: float) -> None:
    height, width, _ = frames[0].shape
    film = ffmpeg.write_frames(str(path), (width, height), fps=fps, macro_block_size=2)
    with closing(film) as writer:
        for frame in [None, *frames]:  # None starts it
            writer.send(frame)
