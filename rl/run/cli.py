"""The command line: ``python -m rl train | eval | plot | record | check``."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import trustregion

from ..agent import Agent
from ..algorithms import ALGORITHMS, load
from ..checkpoint import CheckpointError, read
from ..envs.faults import EnvironmentFault
from ..envs.make import describe
from ..options import check_counts, check_positive
from ..saving import refuse_module
from .callbacks import KeepCheckpoint, SaveBest
from .commands import Check, Eval, Plot, Record, Train, Trained, env_keywords, env_source, parse
from .evaluation import evaluate
from .folder import (
    BEFORE,
    BEST,
    CHECKPOINT,
    CONFIG,
    CURVE,
    LOG,
    load_newest,
    locked,
    new_folder,
    read_config,
    write_config,
)
from .inspection import inspect_env
from .logs import CSVLog, Table, TensorBoardLog, entry, number, read_csv
from .plots import plot_learning_curve, plot_runs
from .signals import stop_request
from .video import record

_STOPPED = 130  # as a shell reports an interrupt


def _train(command: Train[Any]) -> int:
    names = ("total_timesteps", "eval_episodes", "max_episode_steps", "log_every")
    check_counts(**{f"--{n.replace('_', '-')}": getattr(command, n) for n in names})
    check_positive(**{"--save-every": command.save_every})
    if command.tensorboard and find_spec("tensorboard") is None:
        raise ValueError('--tensorboard needs pip install "torch-trustregion[tensorboard]"')
    kwargs = env_keywords(command.env_kwargs)
    env = env_source(command.env_id, kwargs)
    with ExitStack() as stack:
        stack.enter_context(_notes_of_warnings())
        if command.resume is None:
            agent = stack.enter_context(ALGORITHMS[command.algo](env, **command.config.to_dict()))
            out = _make_run_folder(command, kwargs)
            stack.enter_context(locked(out))
        else:
            out = command.resume
            stack.enter_context(locked(out))
            agent = stack.enter_context(_resumed(command, env, out))
        print(f"{type(agent).__name__} on {describe(agent.envs)}")
        print(entry("run folder", out))
        code = _learn(agent, command, out)
    if agent.iterations:
        _summarise(agent, command, out)
    if code:
        return code
    limit = command.max_episode_steps
    print(entry("evaluation", evaluate(agent, env, command.eval_episodes, max_episode_steps=limit)))
    return 0


def _make_run_folder(command: Train[Any], kwargs: dict[str, Any]) -> Path:
    out = command.out
    if out is None:
        out = new_folder(command.env_id, f"{command.algo}-seed{command.config.seed}")
    elif out.exists():
        raise ValueError(f"{out} already exists and is kept as it is: choose another --out")
    else:
        out.mkdir(parents=True)
    what: dict[str, Any] = {"algorithm": command.algo, "env_id": command.env_id}
    what |= {"env_kwargs": kwargs} if kwargs else {}
    what["total_timesteps"] = command.total_timesteps
    write_config(out, what | command.config.to_dict())
    return out


def _resumed(command: Train[Any], env: Any, out: Path) -> Agent:
    """Return the agent of a run's newest good checkpoint; the run keeps what is changed.

    Raises:
        ValueError: the run is finished.

    """
    saved, total = read_config(out), command.total_timesteps
    options = json.loads(json.dumps(command.config.to_dict()))
    options["env_kwargs"] = env_keywords(command.env_kwargs)
    changed = {k: v for k, v in options.items() if saved.get(k, {}) != v}

    def load_with_options(path: Path) -> Agent:
        own = read(path)["config"]  # which is older than the run's, where that was changed before
        other = {k: v for k, v in options.items() if k in own and own[k] != v}
        return ALGORITHMS[command.algo].load(path, env, **other)

    agent, path, faults = load_newest(out, load_with_options)
    for fault in faults:
        _note(fault)
    if path.name == BEFORE and (out / CHECKPOINT).exists():  # it shall not replace the good one
        os.replace(out / CHECKPOINT, out / "checkpoint-damaged.zip")
    steps, call = agent.num_timesteps, agent.training.call
    if steps >= total:
        raise ValueError(
            f"{out} has made its {total:,} steps: pass a larger --total-timesteps to go on"
        )
    if call is not None:
        call.total = total - call.first
    print(f"goes on after {steps:,} steps, from {path}")
    record = {"after": steps, "total_timesteps": total, "changed": changed}
    write_config(
        out,
        saved
        | changed
        | {"total_timesteps": total, "resumed": [*saved.get("resumed", []), record]},
    )
    return agent


def _note(message: object) -> None:
    print(f"note: {message}", file=sys.stderr)


@contextmanager
def _notes_of_warnings() -> Iterator[None]:
    """Show warnings as one line each, and each of them once."""
    shown = set[str]()

    def show(message: object, *_: object) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            _note(message)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield


def _learn(agent: Agent, command: Train[Any], out: Path) -> int:
    """Train, keep what was learnt, even after a crash; return the exit code of a signal, or 0."""
    table = Table(command.log_every)
    keep = KeepCheckpoint(out / CHECKPOINT, out / BEFORE, 60 * command.save_every)
    board = TensorBoardLog(out / "tensorboard") if command.tensorboard else None
    loggers, best = [CSVLog(out / LOG, strict=False), board, table, keep], _best(out / BEST)
    goes_on = command.resume is not None and agent.training.call is not None
    progress = command.progress and sys.stderr.isatty()
    interrupted = False
    with stop_request(_note) as stop:
        try:
            total = None if goes_on else command.total_timesteps
            agent.learn(total, progress, [best, stop], loggers)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            keep.save(agent)
            table.finish()
    if interrupted:
        print(f"interrupted: what was learnt is kept in {out}", file=sys.stderr)
        return _STOPPED
    if stop.number is None:
        return 0
    if agent.progress < 1:
        named = f"{command.env_id} " if ":" in command.env_id else ""
        print(f"stopped: python -m rl train {named}--resume {out} goes on", file=sys.stderr)
    return 128 + stop.number


def _best(path: Path) -> SaveBest:
    """Return what keeps the best agent; a file that is damaged is put aside."""
    try:
        return SaveBest(path)
    except CheckpointError as error:
        _note(error)
        os.replace(path, path.with_name("best-damaged.zip"))
        return SaveBest(path)


def _summarise(agent: Agent, command: Train[Any], out: Path) -> None:
    columns = read_csv(out / LOG)
    if not columns:  # the disk was full
        return
    title = f"{type(agent).__name__} on {command.env_id}, seed {command.config.seed}"
    plot_learning_curve(columns, out / CURVE, title=title)
    speed, seconds = columns["time/fps"][-1], columns["time/time_elapsed"][-1]
    delta = columns.get("trust/delta", [math.inf])[-1]
    largest = max(columns["train/kl_divergence_loss"])
    bound = f" of delta = {delta:g}" if largest <= delta else f", beyond delta = {delta:g}"
    success = columns.get("train/is_line_search_success")
    accepted = f", {int(sum(success))} accepted" if success else ""
    words = f"at most {number(largest)}{bound if delta < math.inf else ''}"
    done = f"{agent.num_timesteps:,} in {seconds:.1f} s"
    print(entry("learning curve", out / CURVE))
    print(entry("checkpoint", out / CHECKPOINT))
    print(entry("speed", f"{speed:,.0f} steps per second ({done}), updates included"))
    print(entry("KL", f"{words} in {agent.iterations} updates{accepted}"))


def _trained(command: Trained) -> tuple[Agent, Any, str]:
    """Return the agent of a run, what makes an environment to use it in, and both in words."""
    if command.run.is_dir():
        agent, path, faults = load_newest(command.run, load)
        for fault in faults:
            _note(fault)
    else:
        agent, path = load(command.run), command.run
    env_id, kwargs = command.env or agent.env_id, env_keywords(command.env_kwargs)
    if env_id is None and (path.parent / CONFIG).exists():  # a run with --env-kwargs
        options = read_config(path.parent)
        env_id, kwargs = options["env_id"], kwargs or options.get("env_kwargs", {})
    if env_id is None:
        raise ValueError(f"{path} does not name its environment: pass --env ENV_ID")
    if command.env is None:
        refuse_module(env_id, "--env ")
    env = env_source(env_id, kwargs)
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
        if isinstance(error, EnvironmentFault):
            print(error.trace, end="", file=sys.stderr)
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
