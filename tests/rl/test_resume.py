"""A run that is saved, loaded and resumed is the run that was never stopped, bit for bit."""

import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv

from agents import SMALL, every_algorithm, same, weights
from rl import PPO, TRPO, VPG, KLPenalty, load, make_envs
from rl.envs.snapshot import snapshot
from rl.envs.state import HiddenStateError, give, state_of
from rl.run.callbacks import Every, StopOnReward
from toys import Clock, Slide

TIMES = ("time/time_elapsed", "time/fps")


def flat(state):
    """Yield the leaves of a state, tensors as lists."""
    if isinstance(state, dict):
        for key in state:
            yield key
            yield from flat(state[key])
    elif isinstance(state, list | tuple):
        for item in state:
            yield from flat(item)
    else:
        yield state.tolist() if isinstance(state, torch.Tensor) else state


class Log(list):
    """A logger that keeps what does not depend on the clock."""

    def __call__(self, agent, log):
        self.append({k: v for k, v in log.items() if k not in TIMES})


def assert_exact(kind, env, path, steps=6 * 64, after=3, **options):
    """Save after some updates, go on, and compare with an agent that is loaded from there."""
    logs, resumed = Log(), Log()

    def save(agent, log):
        if agent.iterations == after:
            agent.save(path)

    agent = kind(env, **(SMALL | options)).learn(steps, False, logger=[logs, save])
    other = load(path, None if isinstance(env, str) else env).learn(progress=False, logger=resumed)
    assert repr([*flat(agent.state_dict())]) == repr([*flat(other.state_dict())])
    assert repr(logs[after:]) == repr(resumed)  # NaN is NaN
    assert agent.num_timesteps == other.num_timesteps
    return agent, other


ENVIRONMENTS = [
    "CartPole-v1",
    "Acrobot-v1",
    "Pendulum-v1",
    "MountainCarContinuous-v0",
    "Hopper-v5",
    "HalfCheetah-v5",
    "Humanoid-v5",
    "LunarLander-v3",
]


def needed(env_id):
    """Skip where a simulator is missing."""
    try:
        with warnings.catch_warnings(action="ignore"):  # what SWIG warns of at import
            gymnasium.make(env_id).close()
    except gymnasium.error.DependencyNotInstalled as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_a_resumed_run_is_the_run_that_was_not_stopped(env_id, tmp_path):
    needed(env_id)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the environments hide their state")
        assert_exact(TRPO, env_id, tmp_path / "agent.zip")


@every_algorithm
def test_whatever_the_algorithm(algorithm, tmp_path):
    assert_exact(algorithm, "CartPole-v1", tmp_path / "agent.zip")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (TRPO, {"normalise_observations": True, "normalise_rewards": True, "final_delta": 1e-3}),
        (TRPO, {"critic_fit": "lbfgs:steps=3", "advantages": "n_step:n=3", "td_lambda": 0.9}),
        (TRPO, {"critic_fit": "trust_region:steps=2", "shared_encoder": True}),
        (KLPenalty, {"kl_target": 0.01}),
        (PPO, {"final_lr": 0.0, "normalise_rewards": True}),
        (VPG, {"state_dependent_std": True}),
    ],
)
def test_whatever_the_options(kind, options, tmp_path):
    assert_exact(kind, "Pendulum-v1", tmp_path / "agent.zip", **options)


@pytest.mark.parametrize("env", [Clock, Slide])
@pytest.mark.parametrize("after", [1, 4])
def test_whatever_the_environment_of_ones_own(env, after, tmp_path):
    assert_exact(TRPO, env, tmp_path / "agent.zip", after=after)


class Hidden(Slide):
    """Keeps something that no file can hold."""

    def __init__(self):
        super().__init__()
        self.hook = lambda: None


def test_where_the_state_is_hidden_both_runs_start_new_episodes(tmp_path):
    with pytest.warns(UserWarning, match="hide their state: all episodes restart"):
        assert_exact(TRPO, Hidden, tmp_path / "agent.zip")


class Counting(Slide):
    """Keeps something."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept


@pytest.mark.parametrize(
    "kept",
    [{(1, 2): 3}, {np.int64(3): 1}, np.longdouble(1) * np.ones(2), ["x" * 100] * 10_000, Slide()],
    ids=["pairs", "numpy's keys", "128 bits", "long", "an environment"],
)
def test_what_a_file_cannot_hold_is_hidden(kept):
    env = Counting(kept)
    assert snapshot(make_envs(lambda: Counting(kept), 1)) is None
    env.kept = None
    assert snapshot(SyncVectorEnv([lambda: env])) is not None


def test_an_environment_within_an_environment_is_hidden():
    class Adapter(Slide):
        def __init__(self):
            super().__init__()
            self.env = Slide()

    assert snapshot(SyncVectorEnv([Adapter])) is None
    inner = SyncVectorEnv([Slide])
    assert snapshot(gymnasium.vector.VectorWrapper(inner)) is None


def test_numbers_of_numpy_stay_what_they_are():
    env, other = Slide(), Slide()
    env.kept = (np.float64(1.5), np.float32(2.5), np.int64(3), True, None, "x", (1, 2.0), ())
    give(other, state_of(env))
    assert other.kept == env.kept
    assert [type(x) for x in other.kept] == [type(x) for x in env.kept]


def test_what_two_layers_share_is_hidden():
    """Given back, each would have its own."""
    env = gymnasium.Wrapper(Slide())
    env.reset(seed=0)
    env.random = env.unwrapped.np_random
    with pytest.raises(HiddenStateError, match="is held twice"):
        state_of(env)


def test_environments_that_were_passed_in_are_reset_alike(tmp_path):
    def hidden():
        env = gymnasium.make("Pendulum-v1")
        env.unwrapped.hook = lambda: None
        return env

    envs = [SyncVectorEnv([hidden] * 4) for _ in range(2)]
    agent = TRPO(envs[0], **SMALL).learn(64, progress=False)
    with pytest.warns(UserWarning, match="hide their state: all episodes restart"):
        agent.save(tmp_path / "agent.zip")
    other = TRPO.load(tmp_path / "agent.zip", envs[1])
    assert same(*(weights(a.learn(64, progress=False)) for a in (agent, other)))


def test_episodes_in_progress_are_in_the_statistics(tmp_path):
    agent, other = assert_exact(TRPO, "Pendulum-v1", tmp_path / "agent.zip", steps=64 * 30, after=7)
    returns, others = (a.training.collector.episodes.returns for a in (agent, other))
    assert len(returns) == len(others) > 0
    assert list(returns) == list(others)


def test_other_arguments_of_the_environment_start_new_episodes(tmp_path):
    """What the file says of the episodes would undo them."""

    def of(gravity):
        return lambda: gymnasium.make("Pendulum-v1", g=gravity)

    TRPO(of(10.0), **SMALL).learn(64, progress=False).save(tmp_path / "agent.zip")
    agent = TRPO.load(tmp_path / "agent.zip", of(5.0))
    with pytest.warns(UserWarning, match="all episodes restart: .* other arguments"):
        agent.learn(64, progress=False)
    assert {env.unwrapped.g for env in agent.envs.envs} == {5.0}


def test_rewards_need_not_be_normalised_any_more(tmp_path):
    agent = TRPO("CartPole-v1", normalise_rewards=True, **SMALL).learn(64, progress=False)
    agent.save(tmp_path / "agent.zip")
    other = TRPO.load(tmp_path / "agent.zip", normalise_rewards=False)
    assert other.learn(64, progress=False).reward_scale is None


def test_another_number_of_copies_starts_new_episodes(tmp_path):
    TRPO("CartPole-v1", **SMALL).learn(64, progress=False).save(tmp_path / "agent.zip")
    agent = TRPO.load(tmp_path / "agent.zip", n_envs=4).learn(64, progress=False)
    assert agent.envs.num_envs == 4


def test_options_that_are_changed_hold_from_there_on(tmp_path):
    TRPO("CartPole-v1", **SMALL).learn(128, False, lambda *_: False).save(tmp_path / "a.zip")
    logs = Log()
    TRPO.load(tmp_path / "a.zip", delta=0.002).learn(progress=False, logger=logs)
    assert [log["trust/delta"] for log in logs] == [0.002] * len(logs)


def test_without_an_unfinished_call_there_is_nothing_to_go_on_with(tmp_path):
    agent = TRPO("CartPole-v1", **SMALL)
    with pytest.raises(ValueError, match=r"no call of learn\(\) was left unfinished"):
        agent.learn(progress=False)
    agent.learn(64, progress=False).save(tmp_path / "agent.zip")
    for each in (agent, TRPO.load(tmp_path / "agent.zip")):
        with pytest.raises(ValueError, match="pass total_timesteps"):
            each.learn(progress=False)


def test_a_file_without_the_run_starts_new_episodes(tmp_path):
    agent = TRPO(Hidden, **SMALL).learn(64, progress=False)
    collector = agent.training.collector
    agent.save(tmp_path / "agent.zip", run=False)  # no warning
    assert agent.training.collector is collector
    TRPO.load(tmp_path / "agent.zip", Hidden).learn(64, progress=False)


def test_callbacks_go_on_where_they_were(tmp_path):
    seen, later = [], []

    def every(found):
        return Every(150, lambda agent, _: found.append(agent.num_timesteps))

    def save(agent, log):
        if agent.iterations == 2:
            agent.save(tmp_path / "agent.zip")

    agent = TRPO("CartPole-v1", **SMALL)
    agent.learn(1000, False, [every(seen), StopOnReward(1e9)], save)
    resumed = TRPO.load(tmp_path / "agent.zip")
    resumed.learn(None, False, [StopOnReward(1e9), every(later)])
    assert later == [step for step in seen if step > 2 * 64]


# -- an update is done wholly, or not at all


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, torch.OutOfMemoryError])
@pytest.mark.parametrize("place", ["estimate", "objective", "fit_critic"])
@pytest.mark.parametrize("normalise", [False, True])
def test_an_update_that_fails_leaves_the_agent_before_it(error, place, normalise):
    options = dict.fromkeys(("normalise_rewards", "normalise_observations"), normalise)
    agent = TRPO("CartPole-v1", **options, **SMALL).learn(64, progress=False)
    whole, before = getattr(agent, place), repr([*flat(agent.state_dict()["parts"])])

    def fails(*arguments):
        whole(*arguments)
        raise error

    counts = agent.iterations, agent.num_timesteps
    setattr(agent, place, fails)
    with pytest.raises(error):
        agent.learn(64, progress=False)
    assert repr([*flat(agent.state_dict()["parts"])]) == before
    assert (agent.iterations, agent.num_timesteps) == counts
    setattr(agent, place, whole)
    agent.learn(progress=False)  # what was left
    assert agent.num_timesteps >= counts[1] + 64


def test_the_agent_is_saved_by_the_thread_that_trains_it(tmp_path):
    import threading

    agent, said = TRPO("CartPole-v1", **SMALL), []

    def save():
        with pytest.raises(RuntimeError, match="another thread is training this agent"):
            agent.save(tmp_path / "agent.zip")
        said.append(True)

    def callback(agent, log):
        thread = threading.Thread(target=save)
        thread.start()
        thread.join()
        agent.save(tmp_path / "agent.zip")

    agent.learn(64, False, callback)
    agent.save(tmp_path / "agent.zip")
    assert said


def test_agents_made_in_several_threads_are_those_of_their_seeds():
    from concurrent.futures import ThreadPoolExecutor

    state = torch.get_rng_state()
    expected = [weights(TRPO("CartPole-v1", **SMALL, seed=seed)) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        made = pool.map(lambda seed: TRPO("CartPole-v1", **SMALL, seed=seed), range(8))
    assert all(same(weights(agent), x) for agent, x in zip(made, expected, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_a_closed_agent_makes_new_environments():
    with TRPO("CartPole-v1", **SMALL) as agent:
        agent.learn(64, progress=False)
    assert not agent.has_envs
    agent.learn(64, progress=False)
    agent.close()
