"""One whole update, policy and critic, against sb3-contrib's ``train()`` on the same batch.

sb3-contrib's own agent is trained. At some of its updates, before it learns from a rollout, both
sides start from its weights and learn from its rollout: the same states, actions, advantages and
returns, networks of 64-64 tanh, joint KL of 0.01. They take turns, so that a slow moment of the
machine falls on both. Time is of ``train()`` there and of ``update`` here, without the estimates,
which ``train()`` finds in its buffer, too; the value loss is the mean squared error over the whole
rollout after it.
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
from typing import Any, TypeAlias

import torch
from gymnasium import spaces
from sb3_contrib import TRPO as Sb3TRPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from threadpoolctl import threadpool_limits
from torch import nn

from benchmarks.allocator import keep_freed_memory
from rl import TRPO, AdamFit, Critic, Estimates, HeadPolicy, LBFGSFit, Path
from rl.networks.heads import GaussianHead

N_ENVS, STEPS, DELTA = 8, 2048, 0.01
AT = (1, 4, 8)  # updates that are timed
SAME: dict[str, Any] = {"critic_fit": AdamFit(lr=1e-3, epochs=10), "curvature_fraction": 1.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "as sb3-contrib's: critic by 10 passes, all states": SAME,
    "the defaults: 5 passes, a quarter of the states": {},
    "critic by 5 iterations of L-BFGS, a tenth": {
        "critic_fit": LBFGSFit(steps=5),
        "curvature_fraction": 0.1,
    },
}


class Fed(TRPO):
    """TRPO that is given its estimates."""

    given: Estimates

    def estimate(self, path: Path) -> Estimates:  # noqa: ARG002 # those of another library
        return self.given


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


def pairs(model: Sb3TRPO, agent: Fed) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Return our parameters beside theirs."""
    theirs, policy, critic = model.policy, agent.policy, agent.critic
    assert isinstance(policy, HeadPolicy)
    assert isinstance(critic, Critic)
    modules = [
        (policy.encoder.body, theirs.mlp_extractor.policy_net),
        (policy.linear, theirs.action_net),
        (critic.encoder.body, theirs.mlp_extractor.value_net),
        (critic.linear, theirs.value_net),
    ]
    if isinstance(policy.head, GaussianHead):
        modules.append(
            (nn.ParameterList([policy.head.log_std]), nn.ParameterList([theirs.log_std]))
        )
    return [
        (mine, other)
        for a, b in modules
        for mine, other in zip(a.parameters(), b.parameters(), strict=True)
    ]


def start_alike(model: Sb3TRPO, agent: Fed) -> None:
    """Give ours the weights of theirs, and its critic's Adam the moments of theirs."""
    agent.setup()
    theirs = {}
    for mine, other in pairs(model, agent):
        with torch.no_grad():
            mine.copy_(other)
        theirs[mine] = model.policy.optimizer.state.get(other)
    moments = [theirs[p] for p in agent.critic_parameters]
    if isinstance(agent.critic_fit, AdamFit) and all(moments):
        (x,) = agent.critic_optimizer.param_groups[0]["params"]  # one flat copy
        agent.critic_optimizer.state[x] = {"step": moments[0]["step"].clone()} | {
            key: torch.cat([m[key].flatten() for m in moments]) for key in ("exp_avg", "exp_avg_sq")
        }


def path_of(model: Sb3TRPO) -> tuple[Path, Estimates]:
    """Return their rollout as a path of ours, and their estimates."""
    buffer = model.rollout_buffer
    names = ("observations", "actions", "log_probs", "rewards", "advantages", "returns", "values")
    x = {name: torch.from_numpy(getattr(buffer, name)).float() for name in names}
    discrete = isinstance(model.action_space, spaces.Discrete)
    no = torch.zeros(x["rewards"].shape, dtype=torch.bool)
    path = Path(
        observations=torch.cat([x["observations"], x["observations"][:1]]),  # the last is not used
        actions=x["actions"].long().squeeze(-1) if discrete else x["actions"],
        log_prob=x["log_probs"],
        signals={"reward": x["rewards"]},
        terminated=no,
        truncated=no,
        starts=torch.from_numpy(buffer.episode_starts > 0),
        mask=~no,
        finals=x["observations"][:0, 0],
        final_at=torch.zeros(0, 2, dtype=torch.long),
    )
    return path, Estimates(x["advantages"], x["returns"], x["values"])


Case: TypeAlias = "Callable[[], tuple[Callable[[], object], Callable[[], float]]]"


@dataclass
class Timed:
    seconds: list[float] = field(default_factory=list)
    value_loss: float = float("nan")


def timed(turns: int, cases: dict[str, Case]) -> dict[str, Timed]:
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
    threadpool_limits(1)
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
    path, estimates = path_of(model)
    returns = path.flat(estimates.returns)
    kept = (
        copy.deepcopy(model.policy.state_dict()),
        copy.deepcopy(model.policy.optimizer.state_dict()),
    )

    def restore() -> None:
        model.policy.load_state_dict(kept[0])
        model.policy.optimizer.load_state_dict(copy.deepcopy(kept[1]))

    @torch.no_grad()
    def their_error() -> float:
        values = model.policy.predict_values(path.rows).flatten()
        return (values - returns).square().mean().item()

    def theirs() -> tuple[Callable[[], None], Callable[[], float]]:
        restore()
        buffer = copy.deepcopy(model.rollout_buffer)

        def error() -> float:
            model.rollout_buffer = buffer
            return their_error()

        return model.train, error

    def ours(options: dict[str, Any]) -> Case:
        agent = Fed(env, n_envs=N_ENVS, steps_per_update=STEPS, delta=DELTA, **options)
        agent.given = estimates

        def prepare() -> tuple[Callable[[], object], Callable[[], float]]:
            restore()
            start_alike(model, agent)

            @torch.no_grad()
            def error() -> float:
                return (agent.critic(path.rows) - returns).square().mean().item()

            return lambda: agent.update(path), error

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
