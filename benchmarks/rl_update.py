"""One whole update, policy and critic, against sb3-contrib's ``train()`` on the same batch.

sb3-contrib's own agent is trained. At some of its updates, before it learns from a rollout, both
sides start from its weights and learn from its rollout: the same states, actions, advantages and
returns, networks of 64-64 tanh, joint KL of 0.01. They take turns, so that a slow moment of the
machine falls on both. Time is of ``train()`` there and of ``improve`` and ``fit_critic`` here; the
value loss is the mean squared error over the whole batch after it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from gymnasium import spaces
from sb3_contrib import TRPO as Sb3TRPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from torch import Tensor

from benchmarks.allocator import keep_freed_memory
from rl import TRPO
from rl.batch import Batch

N_ENVS, STEPS, DELTA = 8, 2048, 0.01
AT = (1, 4, 8)  # updates that are timed
SETTINGS: dict[str, dict[str, Any]] = {
    "Adam, as sb3-contrib": {"critic_fit": "adam"},
    "L-BFGS, 10 iterations": {"critic_fit": "lbfgs", "critic_steps": 10},
}


def make_sb3(env: str) -> Sb3TRPO:
    envs = make_vec_env(env, N_ENVS, seed=0)
    space = envs.action_space
    dims = space.shape[0] if isinstance(space, spaces.Box) else 1  # it averages the KL over them
    model = Sb3TRPO(
        "MlpPolicy",
        envs,
        n_steps=STEPS // N_ENVS,
        batch_size=128,
        n_critic_updates=10,
        cg_max_steps=10,
        target_kl=DELTA / dims,
        device="cpu",
        seed=0,
    )
    model.set_logger(Logger(None, []))
    return model


def copy_weights(model: Sb3TRPO, agent: TRPO) -> None:
    """Give our networks the weights of theirs."""
    theirs = model.policy
    pairs = [
        (agent.policy.encoder.body, theirs.mlp_extractor.policy_net),  # pyright: ignore[reportAttributeAccessIssue]
        (agent.policy.linear, [theirs.action_net]),  # pyright: ignore[reportAttributeAccessIssue]
        (agent.critic.encoder.body, theirs.mlp_extractor.value_net),  # pyright: ignore[reportAttributeAccessIssue]
        (agent.critic.linear, [theirs.value_net]),  # pyright: ignore[reportAttributeAccessIssue]
    ]
    with torch.no_grad():
        for ours, other in pairs:
            for mine, its in zip(ours, other, strict=True):
                for p, q in zip(mine.parameters(), its.parameters(), strict=True):
                    p.copy_(q)
        log_std = getattr(agent.policy.head, "log_std", None)
        if log_std is not None:
            log_std.copy_(theirs.log_std)


def batch_of(model: Sb3TRPO) -> Batch:
    data = next(iter(copy.deepcopy(model.rollout_buffer).get(batch_size=None)))
    discrete = isinstance(model.action_space, spaces.Discrete)
    return Batch(
        data.observations.float(),
        data.actions.long().flatten() if discrete else data.actions,
        data.old_log_prob,
        data.old_values,
        data.advantages,
        data.returns,
    )


@dataclass
class Timed:
    seconds: list[float] = field(default_factory=list)
    value_loss: float = float("nan")
    kl: float = float("nan")


def timed(turns: int, cases: dict[str, Callable[[], Callable[[], Tensor]]]) -> dict[str, Timed]:
    """Run each case in turn; a case sets itself up and returns what is timed, then the loss."""
    results = {name: Timed() for name in cases}
    for turn in range(turns + 1):  # the first warms up
        for name, prepare in cases.items():
            run, error = prepare()
            begin = time.perf_counter()
            run()
            if turn:
                results[name].seconds.append(time.perf_counter() - begin)
            results[name].value_loss = error()
    return results


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--envs", nargs="+", default=["CartPole-v1", "Hopper-v5"])
    parser.add_argument("--turns", type=int, default=10)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # MuJoCo's of its own models
    torch.set_num_threads(1)
    keep_freed_memory()
    print("| environment, update | what | ms | times faster | value loss | of sb3-contrib's |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for env in args.envs:
            compare(env, args.turns)


def compare(env: str, turns: int) -> None:
    model = make_sb3(env)
    _, callback = model._setup_learn(STEPS * max(AT))
    for update in range(1, max(AT) + 1):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, STEPS // N_ENVS)
        if update in AT:
            report(env, update, model, turns)
        model.train()


def report(env: str, update: int, model: Sb3TRPO, turns: int) -> None:
    batch = batch_of(model)
    kept = (
        copy.deepcopy(model.policy.state_dict()),
        copy.deepcopy(model.policy.optimizer.state_dict()),
    )

    def restore() -> None:
        model.policy.load_state_dict(kept[0])
        model.policy.optimizer.load_state_dict(copy.deepcopy(kept[1]))

    @torch.no_grad()
    def their_error() -> float:
        values = model.policy.predict_values(batch.observations).flatten()
        return (values - batch.returns).square().mean().item()

    def theirs() -> Any:
        restore()
        buffer = copy.deepcopy(model.rollout_buffer)

        def error() -> float:
            model.rollout_buffer = buffer
            return their_error()

        return model.train, error

    def ours(options: dict[str, Any]) -> Callable[[], Any]:
        agent = TRPO(env, n_envs=N_ENVS, steps_per_update=STEPS, delta=DELTA, **options)

        def prepare() -> Any:
            restore()
            copy_weights(model, agent)
            agent.setup()

            def run() -> None:
                agent.improve(batch)
                agent.fit_critic(batch)

            @torch.no_grad()
            def error() -> float:
                return agent.critic_fit.error(batch.observations, batch.returns).item()

            return run, error

        return prepare

    cases = {"sb3-contrib": theirs} | {name: ours(o) for name, o in SETTINGS.items()}
    results = timed(turns, cases)
    restore()
    base = results["sb3-contrib"]
    for name, r in results.items():
        ratio = median(b / s for b, s in zip(base.seconds, r.seconds, strict=True))
        print(
            f"| {env}, {update} | {name} | {1e3 * median(r.seconds):.0f} | {ratio:.2f} |"
            f" {r.value_loss:.4g} | {r.value_loss / base.value_loss:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
