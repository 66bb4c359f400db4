import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Text, Tuple
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rl import TRPO, Collector, Stepper, TRPOConfig, evaluate, make_envs
from rl.envs.layout import ObservationLayout
from rl.envs.make import describe
from rl.build import make_networks, observation_norm
from rl.networks.policy import Policy
from toys import Clock, vector


def collector(envs, seed=0):
    layout = ObservationLayout(envs.single_observation_space)
    generator = torch.Generator().manual_seed(seed)
    return Collector(Stepper(envs), layout, seed=seed, generator=generator)


def make_policy(space, **options):
    layout = ObservationLayout(Box(-np.inf, np.inf, (2,), np.float32))
    return make_networks(layout, space, None, TRPOConfig(hidden=(4,), **options))[0]


def make_policy_of(envs):
    layout = ObservationLayout(envs.single_observation_space)
    return make_networks(layout, envs.single_action_space, None, TRPOConfig(hidden=(4,)))[0]


def policy_for(envs):
    return make_policy(envs.single_action_space)


def test_dummy_transitions_are_masked_and_final_observations_are_true():
    envs = vector(lambda: Clock(length=3))
    rollout = collector(envs).collect(policy_for(envs), 9)
    episode, time = rollout.observations[:, 0].T.tolist()
    # three steps, the dummy step that resets, three steps, ...
    assert rollout.valid[:, 0].tolist() == [1, 1, 1, 0, 1, 1, 1, 0, 1]
    assert rollout.terminated[:, 0].tolist() == [0, 0, 1, 0, 0, 0, 1, 0, 0]
    assert time == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert episode == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert rollout.rewards[rollout.valid].eq(1).all()


def test_masked_steps_reach_no_environment():
    envs = vector(lambda: Clock(length=3))
    collector(envs).collect(policy_for(envs), 9)
    assert len(envs.envs[0].unwrapped.actions) == 7


def test_rollouts_continue_where_the_last_one_stopped():
    whole = vector(lambda: Clock(length=3), 2)
    parts = vector(lambda: Clock(length=3), 2)
    policy = policy_for(whole)
    one, two = collector(whole), collector(parts)
    long = one.collect(policy, 11)
    pieces = [two.collect(policy, k) for k in (3, 4, 4)]
    for name in ("rewards", "terminated", "truncated", "valid", "actions"):
        joined = torch.cat([getattr(piece, name) for piece in pieces])
        assert torch.equal(joined, getattr(long, name))
    joined = torch.cat([piece.observations[:-1] for piece in pieces])
    assert torch.equal(joined, long.observations[:-1])
    assert one.returns == two.returns


def test_an_interrupted_rollout_is_followed_by_new_episodes():
    envs = vector(lambda: Clock(length=5), 2)
    keeper, policy = collector(envs), policy_for(envs)
    keeper.collect(policy, 3)

    calls = []

    def actor(noise):
        def interrupted(t, rows):
            calls.append(t)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return type(policy).actor(policy, noise)(t, rows)

        return interrupted

    policy.actor = actor
    with pytest.raises(KeyboardInterrupt):
        keeper.collect(policy, 3)
    del policy.actor
    rollout = keeper.collect(policy, 6)
    assert rollout.observations[:, 0, 1].tolist() == [0, 1, 2, 3, 4, 5, 0]
    assert list(keeper.lengths) == [5, 5]


def test_episode_returns_and_lengths_do_not_count_resets():
    envs = vector(lambda: Clock(length=4, truncate=True), 2)
    keeper = collector(envs)
    keeper.collect(policy_for(envs), 15)
    assert list(keeper.returns) == [4.0] * 6
    assert list(keeper.lengths) == [4] * 6


def test_box_actions_are_clipped_on_their_way_only():
    space = Box(-0.1, 0.2, (1,), np.float32)
    envs = vector(lambda: Clock(action_space=space))
    rollout = collector(envs).collect(policy_for(envs), 40)
    assert rollout.actions.abs().max() > 0.5
    seen = np.array(envs.envs[0].unwrapped.actions)
    assert seen.min() >= np.float32(-0.1)
    assert seen.max() <= np.float32(0.2)
    assert seen.dtype == np.float32


def test_discrete_actions_start_where_the_space_does():
    envs = vector(lambda: Clock(action_space=Discrete(2, start=5)))
    collector(envs).collect(policy_for(envs), 40)
    assert set(envs.envs[0].unwrapped.actions) == {5, 6}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_rewards_are_named(bad):
    envs = vector(lambda: Clock(poison=bad), 2)
    with pytest.raises(
        ValueError, match=r"environment 0 gave a reward.*at step 1, on action [01],"
    ):
        collector(envs).collect(policy_for(envs), 3)


def test_sampling_uses_its_own_generator():
    envs = vector(lambda: Clock())
    state = torch.get_rng_state()
    a = collector(envs, 1).collect(policy_for(envs), 30).actions
    assert not torch.equal(torch.get_rng_state(), state)  # policy_for draws weights
    policy, state = policy_for(envs), torch.get_rng_state()
    a = collector(envs, 1).collect(policy, 30).actions
    b = collector(envs, 1).collect(policy, 30).actions
    c = collector(envs, 2).collect(policy, 30).actions
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_samples_follow_the_distribution():
    g = torch.Generator().manual_seed(0)
    observation = torch.randn(1, 2).expand(20_000, 2)
    discrete = make_policy(Discrete(3))
    with torch.no_grad():
        discrete.linear[-1].bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
        noise = discrete.noise(1, 20_000, g)
        counts = discrete.act(observation, noise[0]).bincount(minlength=3) / 20_000
        expected = discrete(observation[:1]).probs[0]
    # five standard errors of a frequency over 20,000 draws
    torch.testing.assert_close(counts, expected, rtol=0, atol=5 * 0.5 / 20_000**0.5)
    box = make_policy(Box(-1, 1, (2,), np.float32))
    with torch.no_grad():
        box.head.log_std.copy_(torch.tensor([0.0, -1.0]))
        noise = box.noise(1, 20_000, g)
        samples, distribution = box.act(observation, noise[0]), box(observation[:1])
    standard_error = distribution.stddev[0] / 20_000**0.5
    assert ((samples.mean(0) - distribution.mean[0]).abs() < 5 * standard_error).all()
    torch.testing.assert_close(samples.std(0), distribution.stddev[0], rtol=0.03, atol=0)
    assert distribution.batch_shape == (1,)


class Wrong(Clock):
    def __init__(self, **spaces):
        super().__init__()
        self.__dict__.update(spaces)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ("GymV21Environment-v0", "cannot make environment 'GymV21Environment-v0'"),
        ("NoSuch-v1", "cannot make environment 'NoSuch-v1'"),
        ("nomodule:NoSuch-v1", "cannot make environment"),
        (lambda: Wrong(observation_space=Text(3)), "unsupported observation space Text"),
        (lambda: Wrong(action_space=Dict(a=Discrete(2))), "unsupported action space Dict"),
        (lambda: Wrong(action_space=Box(0, 5, (2,), np.int64)), "must be of real numbers"),
        (lambda: Wrong(action_space=Box(0, 5, (0,), np.float32)), "it has no entries"),
    ],
)
def test_unsupported_environments_are_refused_in_words(env, words):
    with pytest.raises(ValueError, match=words):
        TRPO(env, n_envs=2)


def test_what_makes_environments():
    assert make_envs("Acrobot-v1", 3).num_envs == 3
    assert make_envs(Clock, 2).num_envs == 2
    assert make_envs(Clock(), 8).num_envs == 1
    envs = vector(Clock, 4)
    assert make_envs(envs, 2) is envs
    with pytest.raises(TypeError, match="an id such as"):
        make_envs(3, 2)
    with pytest.raises(ValueError, match="n_envs"):
        make_envs("CartPole-v1", 0)
    with pytest.raises(ValueError, match="vectorization must be one of"):
        make_envs("CartPole-v1", 2, "threads")
    with pytest.raises(ValueError, match="is for ids"):
        make_envs(Clock, 2, "vector_entry_point")


def test_how_copies_are_stepped_is_chosen_and_said():
    own, sync = make_envs("CartPole-v1", 2), make_envs("Acrobot-v1", 2)
    assert "vectorised CartPoleVectorEnv" in describe(own)
    assert describe(sync) == "2 x Acrobot-v1, stepped in turn in this process"
    assert "in turn" in describe(make_envs("CartPole-v1", 2, "sync"))
    processes = make_envs("CartPole-v1", 2, "async")
    assert "each in a process of its own" in describe(processes)
    processes.close()
    with pytest.raises(ValueError, match="cannot make environment 'Acrobot-v1'"):
        make_envs("Acrobot-v1", 2, "vector_entry_point")


@pytest.mark.parametrize(
    ("space", "options"),
    [
        (Discrete(3), {}),
        (Box(-1, 1, (2,), np.float32), {}),
        (Box(-1, 1, (2,), np.float32), {"state_dependent_std": True}),
        (Discrete(3), {"normalise_observations": True}),
    ],
)
def test_the_fast_way_to_act_is_the_plain_one(space, options):
    config = TRPOConfig(hidden=(16, 8), **options)
    layout = ObservationLayout(Box(-np.inf, np.inf, (3,), np.float32))
    norm = observation_norm(layout, config)
    if norm is not None:
        norm.update(5 + 3 * torch.randn(100, 3))
    policy, _ = make_networks(layout, space, norm, config)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert policy.encoder.dense(policy.linear) is not None
    rows = 20 * torch.randn(2, 64, 3)
    noise = policy.noise(2, 64, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        fast, plain = policy.actor(noise), Policy.actor(policy, noise)
        for t in range(2):
            np.testing.assert_allclose(
                fast(t, rows[t].numpy()), plain(t, rows[t].numpy()), rtol=1e-5, atol=1e-5
            )  # float32, of numbers near 20


@pytest.mark.parametrize(
    ("observations", "options"),
    [
        (Box(0, 255, (8, 8), np.uint8), {}),
        (Dict(x=Box(-1, 1, (2,)), action_mask=MultiBinary(2)), {}),
    ],
)
def test_other_networks_act_as_they_are(observations, options):
    layout, generator = ObservationLayout(observations), torch.Generator().manual_seed(0)
    policy, _ = make_networks(layout, Discrete(2), None, TRPOConfig(hidden=(4,)))
    noise = policy.noise(1, 3, generator)
    rows = np.ones((3, layout.width), layout.dtype)
    with torch.inference_mode():
        expected = policy.act(torch.from_numpy(rows), noise[0])
        assert policy.actor(noise)(0, rows).tolist() == expected.tolist()


# -- the three ways to reset


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("truncate", [False, True])
def test_every_autoreset_mode_gives_the_same_experience(mode, truncate):
    """Episodes of 3, 4 steps: what counts is the same whoever resets, and finals are true."""
    lengths = iter((3, 4))
    envs = SyncVectorEnv(
        [lambda: Clock(length=next(lengths), truncate=truncate)] * 2, autoreset_mode=mode
    )
    keeper = collector(envs)
    rollout = keeper.collect(policy_for(envs), 20)
    before, after = rollout.values(lambda rows: rows[..., 1])  # the value of a state: its time
    for i, length in enumerate((3, 4)):
        kept = rollout.valid[:, i]
        assert (after[kept, i] == before[kept, i] + 1).all()  # also where an episode ended
        assert before[kept, i].tolist() == [t % length for t in range(int(kept.sum()))]
        ends = (rollout.truncated if truncate else rollout.terminated)[:, i]
        assert (after[ends, i] == length).all()
    whole = mode is not AutoresetMode.NEXT_STEP
    assert rollout.valid.all() == whole
    assert len(rollout.finals) == (int(rollout.done.sum()) if whole else 0)
    assert set(keeper.returns) == {3.0, 4.0}


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_final_observations_of_composed_spaces(mode):
    class Composed(Clock):
        def __init__(self):
            super().__init__()
            inner = Tuple((Box(0, 99, (1,), np.float32), Discrete(9)))
            self.observation_space = Dict(pair=inner, time=Discrete(9))

        def _observation(self):
            return {"pair": (np.float32([self.episode]), self.time), "time": self.time}

    envs = SyncVectorEnv([Composed] * 2, autoreset_mode=mode)
    rollout = collector(envs).collect(make_policy_of(envs), 7)
    layout = ObservationLayout(envs.single_observation_space)
    expected = layout.flat(
        {"pair": (np.float32([[0], [0], [1], [1]]), np.full(4, 3)), "time": np.full(4, 3)}
    )
    assert torch.equal(rollout.finals, torch.from_numpy(expected))


def test_an_environment_that_does_not_say_how_it_resets_is_refused():
    envs = vector(Clock)
    envs.metadata = {}
    with pytest.raises(ValueError, match="does not say how it resets"):
        Stepper(envs)


def test_an_error_of_an_environment_is_kept():
    class Broken(Clock):
        def step(self, action):
            if self.time == 2:
                raise ZeroDivisionError("in the simulator")
            return super().step(action)

    agent = TRPO(Broken, n_envs=2, steps_per_update=64, hidden=(4,))
    before = [p.clone() for p in agent.policy.parameters()]
    with pytest.raises(ZeroDivisionError, match="in the simulator") as caught:
        agent.learn(64, progress=False)
    assert "at step 2 of a rollout: nothing was updated" in caught.value.__notes__[0]
    assert all(map(torch.equal, before, agent.policy.parameters()))
    assert agent.num_timesteps == 0


# -- action masks


class Picky(Clock):
    """Allows action ``time % 3`` alone, in its infos, and complains about any other."""

    def __init__(self):
        super().__init__(length=7, action_space=Discrete(3))

    def reset(self, **arguments):
        return super().reset(**arguments)[0], self.info()

    def info(self):
        return {"action_mask": (np.arange(3) == self.time % 3).astype(np.int8)}

    def step(self, action):
        assert self.info()["action_mask"][action] or not self.info()["action_mask"].any()
        return *super().step(action)[:-1], self.info()


def test_forbidden_actions_are_never_taken():
    agent = TRPO(Picky, n_envs=2, steps_per_update=64, hidden=(4,)).learn(200, progress=False)
    assert agent.layout.info_mask.shape == (3,)
    assert evaluate(agent, Picky, 4).lengths == (7,) * 4
    action, _ = agent.predict(np.zeros(2), action_masks=np.array([0, 0, 1]))
    assert action == 2
    with pytest.raises(ValueError, match="action_mask"):
        agent.predict(np.zeros(2))


class Stuck(Picky):
    """Allows nothing from its third step on."""

    def info(self):
        return {"action_mask": super().info()["action_mask"] * (self.time < 2)}


def test_a_state_without_an_action_is_named():
    agent = TRPO(Stuck, n_envs=2, steps_per_update=64, hidden=(4,))
    with pytest.raises(ValueError, match="environment 0 allowed no action at step 2"):
        agent.learn(64, progress=False)
