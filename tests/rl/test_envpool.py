"""The adapter of envpool: its laws on the real package, its arguments on a stand-in."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete

from rl import TRPO, EnvCollector, ObservationLayout, Stepper, evaluate, load, make_envs
from rl.envs.make import describe
from rl.envs.pool import PoolVectorEnv
from rl.run.cli import main
from toys import Clock

SMALL = {"n_envs": 4, "steps_per_update": 512, "hidden": (8,), "vectorization": "envpool"}


@pytest.fixture
def real():
    return pytest.importorskip("envpool")


class Always:
    """Takes one action, or what a function of the observations says."""

    def __init__(self, choose):
        self.choose = choose

    def predict(self, obs, deterministic=False):
        return np.array([self.choose(row) for row in obs]), None


def balance(row):
    return int(row[2] + row[3] > 0)  # the pole's angle and its speed


# -- the real package


def test_spaces_are_those_of_gymnasium(real):
    for name in ("CartPole-v1", "Pendulum-v1"):
        ours, theirs = make_envs(name, 3, "envpool"), make_envs(name, 3, "sync")
        for space in ("single_action_space", "action_space"):
            assert getattr(ours, space) == getattr(theirs, space)
        for space in ("single_observation_space", "observation_space"):
            one, other = getattr(ours, space), getattr(theirs, space)
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            finite = np.isfinite(one.high)  # envpool leaves out what is the largest float
            assert (other.high[~finite] > 1e38).all()
            np.testing.assert_allclose(one.high[finite], other.high[finite], rtol=1e-6)
        observations, _ = ours.reset(seed=0)
        assert ours.observation_space.contains(observations)


def test_it_says_what_it_is(real):
    envs = make_envs("Pendulum-v1", 2, "envpool")
    assert describe(envs) == "2 x Pendulum-v1, by envpool"
    assert envs.spec.id == "Pendulum-v1"
    envs.close()
    assert envs.closed


def test_seeds_decide_the_episodes(real):
    envs = make_envs("CartPole-v1", 4, "envpool")
    first, again, on = (envs.reset(seed=seed)[0] for seed in (2**32 - 5, 2**32 - 5, None))
    assert np.array_equal(first, again)
    assert not np.isin(on, first).any()
    assert len(np.unique(first)) == first.size  # the copies differ
    assert np.array_equal(envs.reset(seed=7)[0][1:], envs.reset(seed=8)[0][:3])
    unseeded = [make_envs("CartPole-v1", 4, "envpool").reset()[0] for _ in range(2)]
    assert not np.isin(*unseeded).any()


def test_what_a_step_gave_is_not_overwritten(real):
    envs = make_envs("Pendulum-v1", 2, "envpool")
    envs.reset(seed=0)
    actions = np.ones((2, 1), np.float32)
    steps = [envs.step(actions)[:4] for _ in range(50)]
    copies = [[np.copy(x) for x in step] for step in steps]
    for _ in range(200):
        envs.step(actions)
    for step, copy in zip(steps, copies, strict=True):
        assert all(map(np.array_equal, step, copy))


def test_the_step_after_a_done_is_a_reset_that_ignores_the_action(real):
    """Two pools of one seed, which differ in the actions of those steps alone."""
    envs = [make_envs("CartPole-v1", 3, "envpool") for _ in range(2)]
    steppers = [Stepper(e) for e in envs]
    for stepper in steppers:
        stepper.reset(5)
    resets = 0
    for _ in range(60):
        valid = ~steppers[0]._ended
        one, other = (
            stepper.step(np.where(valid, 1, action))
            for stepper, action in zip(steppers, (0, 1), strict=True)
        )
        assert np.array_equal(one.observations, other.observations)
        assert (one.rewards == valid).all()  # a step of CartPole pays one, a reset nothing
        assert not (one.terminated | one.truncated)[~valid].any()
        assert (np.abs(one.observations[~valid]) <= 0.05).all()
        resets += (~valid).sum()
    assert resets > 9


def test_a_time_limit_truncates_and_a_fall_terminates(real):
    for choose, length, truncates in ((balance, 500, True), (lambda _: 1, None, False)):
        stepper = Stepper(make_envs("CartPole-v1", 4, "envpool"))
        observations, _ = stepper.reset(1)
        done, steps = np.zeros(4, np.bool_), 0
        while not done.any():
            step = stepper.step(Always(choose).predict(observations)[0])
            observations, steps = step.observations, steps + 1
            done = step.terminated | step.truncated
        assert length in (steps, None)
        assert step.truncated[done].all() == truncates
        assert step.terminated[done].all() != truncates
        assert (step.rewards == 1).all()


def test_episodes_are_as_long_as_in_gymnasium(real):
    episodes = 960
    counts = []
    for vectorization in ("envpool", "sync"):
        envs = make_envs("CartPole-v1", 32, vectorization)
        result = evaluate(Always(lambda _: 1), envs, episodes)
        assert result.returns == result.lengths
        counts.append(np.bincount(result.lengths, minlength=20) / episodes)
    assert counts[1].max() < 0.9
    # five standard errors of the difference of two frequencies
    assert np.abs(counts[0] - counts[1]).max() < 5 * 0.5 * (2 / episodes) ** 0.5


def test_pendulum_is_truncated_after_200_steps_that_count(real):
    envs = make_envs("Pendulum-v1", 3, "envpool")
    agent = TRPO(envs, steps_per_update=3 * 603, hidden=(4,))
    layout = ObservationLayout(envs.single_observation_space)
    keeper = EnvCollector(Stepper(envs), layout, seed=0, generator=agent.generator)
    rollout = keeper.collect(agent.policy, 603)
    expected = np.arange(603) % 201
    assert (rollout.truncated.numpy() == (expected == 199)[:, None]).all()
    assert (rollout.mask.numpy() == (expected != 200)[:, None]).all()
    assert not rollout.terminated.any()
    assert not rollout.rewards[~rollout.mask].any()
    assert set(keeper.episodes.lengths) == {200}
    assert max(keeper.episodes.returns) < 0


def test_a_checkpoint_finds_its_environments_again(real, tmp_path):
    agent = TRPO("CartPole-v1", **SMALL).learn(512, progress=False)
    agent.save(tmp_path / "agent.zip")
    again = load(tmp_path / "agent.zip")
    assert describe(again.envs) == "4 x CartPole-v1, by envpool"
    again.learn(512, progress=False)


def test_an_agent_is_evaluated_in_what_it_learnt_in(real):
    agent = TRPO("AcrobotSwingup-v1", **SMALL)  # gymnasium has none
    assert evaluate(agent, "AcrobotSwingup-v1", 2).lengths == (1000, 1000)
    with pytest.raises(ValueError, match="cannot make environment 'AcrobotSwingup-v2'"):
        evaluate(agent, "AcrobotSwingup-v2", 2)
    with pytest.raises(ValueError, match="cannot make environment 'HopperHop-v1'"):
        evaluate(agent, "HopperHop-v1", 2)


def test_check_on_the_command_line(real, capsys):
    assert main(["check", "Hopper-v4", "--vectorization", "envpool"]) == 0
    printed = capsys.readouterr().out
    assert "8 x Hopper-v4, by envpool, autoreset NextStep" in printed
    assert "cannot be run on environments by envpool" in printed
    assert main(["check", "Hoper-v4", "--vectorization", "envpool"]) == 1
    assert "the nearest are Hopper-v4" in capsys.readouterr().err


# -- a stand-in, and none


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(ValueError, match=r"pip install 'torch-trustregion\[envpool\]'"):
        make_envs("CartPole-v1", 2, "envpool")


def test_envpool_is_for_ids():
    with pytest.raises(ValueError, match="vectorization='envpool' is for ids"):
        make_envs(Clock, 2, "envpool")


class StandIn:
    """What the adapter uses of envpool, with the arguments of each pool."""

    def __init__(self, players=1, **spaces):
        self.made = []
        self.observation_space = spaces.get("observations", Box(-1, 1, (2,)))
        self.action_space = spaces.get("actions", Discrete(2))
        self.config = SimpleNamespace(max_num_players=players)

    def list_all_envs(self):
        return ["Hopper-v4", "Hopper-v5", "Taxi-v3"]

    def make_spec(self, task_id):
        return SimpleNamespace(
            config=self.config,
            gymnasium_observation_space=self.observation_space,
            gymnasium_action_space=self.action_space,
        )

    def make(self, task_id, **arguments):
        self.made.append((task_id, arguments))
        return SimpleNamespace(
            reset=lambda: (np.zeros((arguments["num_envs"], 2)), {}),
            observation_space=self.observation_space,
            action_space=self.action_space,
        )


@pytest.fixture
def stand_in(monkeypatch):
    def install(**arguments):
        module = StandIn(**arguments)
        monkeypatch.setitem(sys.modules, "envpool", module)
        return module

    return install


def test_unknown_ids_come_with_the_nearest(stand_in):
    stand_in()
    with pytest.raises(ValueError, match=r"'Hopper-v9': .* are Hopper-v\d, Hopper-v\d$"):
        make_envs("Hopper-v9", 2, "envpool")
    with pytest.raises(ValueError, match="envpool has no such id, see envpool"):
        make_envs("///", 2, "envpool")


def test_tasks_that_do_not_fit_are_refused(stand_in, monkeypatch):
    stand_in(players=2)
    with pytest.raises(ValueError, match="'Taxi-v3': it has several players"):
        make_envs("Taxi-v3", 2, "envpool")
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        PoolVectorEnv("Taxi-v3", 2, threads=0)

    def lacks(task_id):
        raise ImportError("needs\nQt")

    monkeypatch.setattr(stand_in(), "make_spec", lacks)
    with pytest.raises(ValueError, match="cannot make environment 'Taxi-v3': needs Qt"):
        make_envs("Taxi-v3", 2, "envpool")


def test_pools_are_made_when_they_are_seeded(stand_in):
    module = stand_in()
    envs = PoolVectorEnv("Taxi-v3", 2, threads=3)
    assert module.made == []
    for seed in (None, None, 4, None, 2**32 - 1):
        envs.reset(seed=seed)
    seeds = [arguments["seed"] for _, arguments in module.made]
    assert len(seeds) == 3
    assert seeds[1] == 4
    assert all(0 <= seed < 2**31 - 2 for seed in seeds)
    assert {arguments["num_threads"] for _, arguments in module.made} == {3}
    with pytest.raises(ValueError, match="no options of reset"):
        envs.reset(options={"reset_mask": np.ones(2, np.bool_)})


def test_threads_are_bounded_by_copies_and_cores(stand_in, monkeypatch):
    stand_in()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(4), raising=False)
    assert [PoolVectorEnv("Taxi-v3", n).threads for n in (1, 3, 64)] == [1, 3, 4]


def test_boxes_without_bounds_are_unbounded(stand_in):
    limits = np.finfo(np.float64)
    low, high = np.array([limits.tiny, -1.0]), np.array([limits.max, 1.0])
    box = Box(low, high, dtype=np.float64)
    stand_in(actions=box, observations=Dict(inner=box, flag=Discrete(2)))
    envs = PoolVectorEnv("Taxi-v3", 3)
    expected = Box(np.array([-np.inf, -1]), np.array([np.inf, 1]), dtype=np.float64)
    assert envs.single_action_space == expected
    assert envs.single_observation_space == Dict(inner=expected, flag=Discrete(2))
    assert envs.action_space.shape == (3, 2)
