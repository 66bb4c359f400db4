"""The command line: ``python -m rl train | eval | plot | record | check``."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from contextlib import closing
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import trustregion

from .. import checkpoint
from ..agent import Agent
from ..algorithms import ALGORITHMS, load
from ..envs.make import describe
from ..options import check_counts
from .callbacks import Every
from .commands import Check, Eval, Plot, Record, Train, Trained, env_keywords, env_source, parse
from .evaluation import evaluate
from .inspection import inspect_env
from .logs import CSVLog, Table, TensorBoardLog, entry, number, read_csv
from .plots import plot_learning_curve, plot_runs
from .video import record

_CHECKPOINT, _LOG, _CURVE = "checkpoint.zip", "progress.csv", "learning_curve.png"


def _train(command: Train[Any]) -> int:
    names = ("total_timesteps", "eval_episodes", "max_episode_steps", "log_every")
    check_counts(**{f"--{n.replace('_', '-')}": getattr(command, n) for n in names})
    if command.tensorboard and find_spec("tensorboard") is None:
        raise ValueError('--tensorboard needs pip install "torch-trustregion[tensorboard]"')
    kwargs = env_keywords(command.env_kwargs)
    env = env_source(command.env_id, kwargs)
    with closing(ALGORITHMS[command.algo](env, **command.config.to_dict())) as agent:
        out = _make_run_folder(command, kwargs)
        print(f"{type(agent).__name__} on {describe(agent.envs)}")
        print(entry("run folder", out))
        finished = _learn(agent, command, out)
    if agent.iterations:
        _summarise(agent, command, out)
    if not finished:
        return 130  # as a shell reports an interrupt
    limit = command.max_episode_steps
    print(entry("evaluation", evaluate(agent, env, command.eval_episodes, max_episode_steps=limit)))
    return 0


def _make_run_folder(command: Train[Any], kwargs: dict[str, Any]) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{command.algo}-seed{command.config.seed}-{stamp}"
    # not every system allows other characters, or dots at the ends
    env = [re.sub(r"[^\w.-]", "-", part).strip(".") for part in command.env_id.split("/")]
    out = command.out or Path("runs", *env, name)
    if out.exists():
        raise ValueError(f"{out} already exists and is kept as it is: choose another --out")
    out.mkdir(parents=True)
    what: dict[str, Any] = {"algorithm": command.algo, "env_id": command.env_id}
    what |= {"env_kwargs": kwargs} if kwargs else {}
    what["total_timesteps"] = command.total_timesteps
    (out / "config.json").write_text(json.dumps(what | command.config.to_dict(), indent=2))
    return out


def _learn(agent: Agent, command: Train[Any], out: Path) -> bool:
    """Train, keep what was learnt, even after a crash, and return False after an interrupt."""
    path, table = out / _CHECKPOINT, Table(command.log_every)
    often = Every(max(1, command.total_timesteps // 20), lambda a, _: a.save(path))
    board = TensorBoardLog(out / "tensorboard") if command.tensorboard else None
    progress = command.progress and sys.stderr.isatty()
    try:
        agent.learn(command.total_timesteps, progress, often, [CSVLog(out / _LOG), board, table])
        return True
    except KeyboardInterrupt:
        print(f"interrupted: what was learnt is kept in {out}", file=sys.stderr)
        return False
    finally:
        agent.save(path)
        table.finish()


def _summarise(agent: Agent, command: Train[Any], out: Path) -> None:
    columns = read_csv(out / _LOG)
    title = f"{type(agent).__name__} on {command.env_id}, seed {command.config.seed}"
    plot_learning_curve(columns, out / _CURVE, title=title)
    speed, seconds = columns["time/fps"][-1], columns["time/time_elapsed"][-1]
    delta = columns.get("trust/delta", [math.inf])[-1]
    largest = max(columns["train/kl_divergence_loss"])
    bound = f" of delta = {delta:g}" if largest <= delta else f", beyond delta = {delta:g}"
    success = columns.get("train/is_line_search_success")
    accepted = f", {int(sum(success))} accepted" if success else ""
    words = f"at most {number(largest)}{bound if delta < math.inf else ''}"
    done = f"{agent.num_timesteps:,} in {seconds:.1f} s"
    print(entry("learning curve", out / _CURVE))
    print(entry("checkpoint", out / _CHECKPOINT))
    print(entry("speed", f"{speed:,.0f} steps per second ({done}), updates included"))
    print(entry("KL", f"{words} in {agent.iterations} updates{accepted}"))


def _trained(command: Trained) -> tuple[Agent, Any, str]:
    """Return the agent of a run, what makes an environment to use it in, and both in words."""
    path = command.run / _CHECKPOINT if command.run.is_dir() else command.run
    own, kwargs = checkpoint.read(path)["env_id"], env_keywords(command.env_kwargs)
    env_id, config = command.env or own, path.parent / "config.json"
    if env_id is None and config.exists():  # a run with --env-kwargs
        options = json.loads(config.read_text())
        env_id, kwargs = options.get("env_id"), kwargs or options.get("env_kwargs", {})
    if env_id is None:
        raise ValueError(f"{path} does not name its environment: pass --env ENV_ID")
    env, agent = env_source(env_id, kwargs), load(path)
    words = f"{path}: {type(agent).__name__} on {env_id} after {agent.num_timesteps:,} steps"
    return agent, env, words


def _eval(command: Eval) -> None:
    agent, env, words = _trained(command)
    print(words)
    options = {name: getattr(command, name) for name in ("episodes", "seed", "max_episode_steps")}
    result = evaluate(agent, env, deterministic=not command.stochastic, **options)
    print(entry("evaluation", result))


def _record(command: Record) -> None:
    agent, env, _ = _trained(command)
    folder = command.run if command.run.is_dir() else command.run.parent
    out = command.out or folder / "recording.gif"
    options = {name: getattr(command, name) for name in ("episodes", "seed", "max_frames")}
    returns = record(agent, env, out, **options)
    print(entry("returns", ", ".join(map(number, returns)) or "no episode ended"))
    print(entry("film", out))


def _plot(command: Plot) -> None:
    for label, count in plot_runs(command.runs, command.out).items():
        print(f"{label}: {count} run{'s' * (count > 1)}")
    print(entry("plot", command.out))


def _check(command: Check[Any]) -> int:
    env = env_source(command.env_id, env_keywords(command.env_kwargs))
    lines, sound = inspect_env(env, ALGORITHMS[command.algo], command.config)
    print("\n".join(lines))
    return 0 if sound else 1


_COMMANDS: dict[str, tuple[Any, Any]] = {
    "train": (Train, _train),
    "eval": (Eval, _eval),
    "plot": (Plot, _plot),
    "record": (Record, _record),
    "check": (Check, _check),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run it; bad input is one line on stderr and exit code 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name = _parser().parse_args(arguments[:1]).command
    kind, run = _COMMANDS[name]
    try:
        return run(parse(kind, f"python -m rl {name}", arguments[1:])) or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    about = "\n".join(f"  {name:<8}{kind.__doc__}" for name, (kind, _) in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m rl",
        usage="%(prog)s COMMAND ...",
        description="Trust-region policy optimization for gymnasium environments.",
        epilog=f"commands:\n{about}\n\nTheir options: python -m rl COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"torch-trustregion {trustregion.__version__}"
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument("command", choices=_COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser
