"""Interrupts, divergence, odd environments and odd parts: what is kept, and what is said."""

import pickle
import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, Tuple
from gymnasium.vector import AutoresetMode
from torch import nn
from torch.distributions import Independent, Normal

from rl import (
    NPG,
    PPO,
    TRPO,
    VPG,
    EvaluateBest,
    Every,
    KLPenalty,
    KLPenaltyConfig,
    NPGConfig,
    ObservationLayout,
    Policy,
    PPOConfig,
    StopOnReward,
    TRPOConfig,
    evaluate,
    load,
)
from rl.fits import FITS
from rl.networks.moments import ObservationNorm
from rl.run.plots import plot_learning_curve, plot_runs
from rl.run.video import record
from toys import Bandit, Clock, vector

ALGORITHMS = (TRPO, NPG, KLPenalty, PPO, VPG)
SMALL = {"n_envs": 4, "steps_per_update": 64, "hidden": (8,)}


def weights(agent):
    return [p.detach().clone() for m in agent.modules().values() for p in m.parameters()]


def same(one, other):
    return all(map(torch.equal, one, other))


class Paid(Clock):
    """A clock whose hands pay differently, times a factor."""

    def __init__(self, factor=1.0):
        super().__init__(length=5)
        self.factor = factor

    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, self.factor * (1.0 + self.time * float(action)), *rest


def test_the_scale_of_rewards_does_not_matter_from_the_first_update_on():
    """A power of two, so that not a bit differs."""
    options = SMALL | {"normalise_rewards": True}
    one, other = (TRPO(lambda f=f: Paid(f), **options) for f in (1.0, 1024.0))
    for agent in (one, other):
        agent.learn(128, progress=False)
    assert same(weights(one), weights(other))
    assert not same(weights(one), weights(TRPO(Paid, **options)))


def test_an_interrupted_fit_of_the_critic_is_undone_and_the_agent_can_be_saved(tmp_path):
    agent = TRPO(Paid, critic_fit="lbfgs", **SMALL)
    before, calls = weights(agent), 0
    batch = torch.randn(32, 2), torch.randn(32)

    class Stopping(nn.Module):
        def forward(self, rows):
            nonlocal calls
            calls += 1
            if calls == 4:
                raise KeyboardInterrupt
            return agent.critic(rows)

    agent.critic_fit.critic = Stopping()
    with pytest.raises(KeyboardInterrupt):
        agent.critic_fit.fit(*batch, agent.generator)
    assert calls == 4
    assert same(before, weights(agent))
    agent.save(tmp_path / "agent.zip")
    assert same(before, weights(TRPO.load(tmp_path / "agent.zip", Paid)))


@pytest.mark.parametrize("name", FITS)
def test_targets_that_overflow_change_nothing(name):
    agent = TRPO(Paid, critic_fit=name, **SMALL)
    before = weights(agent)
    with pytest.raises(ValueError, match="the critic's loss is"):
        agent.critic_fit.fit(torch.randn(8, 2), torch.full((8,), 1e25), agent.generator)
    assert same(before, weights(agent))


def test_a_ppo_that_diverges_is_undone():
    agent = PPO(Paid, lr=1e20, batch_size=8, **SMALL | {"steps_per_update": 256})
    before = weights(agent)
    with pytest.raises(ValueError, match="PPO diverged"):
        agent.learn(
            2_000,
            progress=False,
            callback=lambda a, _: before.clear() or before.extend(weights(a)),
        )
    assert same(before, weights(agent))
    assert all(p.isfinite().all() for p in before)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_values_that_are_not_finite_update_nothing(algorithm):
    agent = algorithm(Paid, **SMALL)
    with torch.no_grad():
        agent.critic.linear[0].bias.fill_(torch.nan)
    before = [p.clone() for p in agent.policy.parameters()]
    with pytest.raises(ValueError, match="advantages or returns are not finite"):
        agent.learn(64, progress=False)
    assert same(before, list(agent.policy.parameters()))


class TwoNumbers(Policy):
    """Its distribution holds its parameters themselves, or copies of them."""

    def __init__(self, copies):
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))
        self.copies = copies

    def forward(self, rows):
        mean, std = (self.mean * 1, self.std * 1) if self.copies else (self.mean, self.std)
        return Independent(Normal(mean.expand(len(rows), 1), std, validate_args=False), 1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_kl_is_that_of_a_policy_whose_distribution_holds_its_parameters(algorithm):
    class Slide(Clock):
        def step(self, action):
            observation, _, *rest = super().step(action)
            return observation, float(action[0]), *rest

    kls = []
    for copies in (True, False):
        make = lambda: Slide(action_space=Box(-1, 1, (1,), np.float32))  # noqa: E731 # a factory
        agent = algorithm(make, policy=TwoNumbers(copies), **SMALL)
        agent.learn(1, False, lambda _, log: kls.append(log["train/kl_divergence_loss"]))
    assert kls[0] > 1e-5
    assert kls[1] == pytest.approx(kls[0], rel=1e-4)  # float32 in another order


def test_what_is_frozen_stays():
    for algorithm in ALGORITHMS[:-1]:
        for fit in FITS:
            agent = algorithm(Paid, critic_fit=fit, **SMALL)
            layers = [agent.policy.encoder, agent.critic.encoder]
            if algorithm is PPO:
                layers = layers[1:]
            for layer in layers:
                layer.requires_grad_(requires_grad=False)
            frozen = {p: p.clone() for layer in layers for p in layer.parameters()}
            before = weights(agent)
            agent.learn(64, progress=False)
            assert all(torch.equal(p, old) for p, old in frozen.items())
            assert not same(before, weights(agent))


def test_evaluating_in_the_environment_that_is_learnt_in_is_refused():
    env = Clock(length=4)
    agent = TRPO(env, **SMALL)
    for source in (env, gymnasium.Wrapper(env), agent.envs):
        with pytest.raises(ValueError, match="environments the agent trains in"):
            evaluate(agent, source, 1)
        with pytest.raises(ValueError, match="environments the agent trains in"):
            agent.learn(64, False, EvaluateBest(source, episodes=1))
    assert evaluate(agent, Clock(length=4), 1).lengths == (4,)


def test_a_function_must_make_new_environments():
    env = Clock()
    with pytest.raises(ValueError, match="the same environment twice"):
        TRPO(lambda: env, **SMALL)


def test_an_id_may_name_the_module_that_registers_it(tmp_path, monkeypatch):
    (tmp_path / "clocks_of_mine.py").write_text(
        "import gymnasium\nfrom toys import Clock\n"
        "gymnasium.register('MyClock-v0', entry_point=Clock, max_episode_steps=9)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    agent = TRPO("clocks_of_mine:MyClock-v0", **SMALL).learn(64, progress=False)
    agent.save(tmp_path / "agent.zip")
    assert load(tmp_path / "agent.zip").env_id == "clocks_of_mine:MyClock-v0"
    assert evaluate(agent, agent.env_id, 2).lengths == (3, 3)
    with pytest.raises(ValueError, match="cannot make environment 'no_such_module:X-v0'"):
        TRPO("no_such_module:X-v0")
    del sys.modules["clocks_of_mine"]


class Masked(Clock):
    """Allows only the action that is the parity of its time."""

    def _info(self):
        return {"action_mask": [int(self.time % 2 == 0), int(self.time % 2 == 1)]}

    def reset(self, **kwargs):
        observation, _ = super().reset(**kwargs)
        return observation, self._info()

    def step(self, action):
        assert action == self.time % 2
        *step, _ = super().step(action)
        return *step, self._info()


@pytest.mark.parametrize("mode", AutoresetMode)
def test_masks_in_infos_hold_in_every_autoreset_mode(mode):
    lengths = iter((3, 4, 5))
    envs = vector(lambda: Masked(next(lengths)), 3, mode)
    agent = TRPO(envs, steps_per_update=60, hidden=(4,)).learn(120, progress=False)
    assert evaluate(agent, lambda: Masked(4), 2).lengths == (4, 4)


def test_a_mask_that_training_would_not_see_is_refused():
    agent = TRPO(Clock, **SMALL)
    with pytest.raises(ValueError, match="action_masks are for environments that give them"):
        agent.predict(np.zeros(2, np.float32), action_masks=np.array([1, 0]))


def test_bytes_that_are_not_brightness_are_no_image():
    board, screen = Box(0, 4, (10, 10), np.uint8), Box(0, 255, (10, 10), np.uint8)
    assert [part.kind for part in ObservationLayout(board).parts] == ["vector"]
    assert [part.kind for part in ObservationLayout(screen).parts] == ["image"]


def test_a_custom_policy_may_have_any_actions():
    class Pair(Clock):
        def __init__(self):
            super().__init__(action_space=Tuple([Discrete(2), Discrete(2)]))

        def step(self, action):
            assert self.action_space.contains(tuple(action))
            return super().step(action)

    class Halves(TwoNumbers):
        def to_env(self, actions):
            return tuple(np.stack([actions[:, 0] > 0, actions[:, 0] > 1], 0).astype(np.int64))

    TRPO(Pair, policy=Halves(copies=True), **SMALL).learn(64, progress=False)
    with pytest.raises(ValueError, match="unsupported action space"):
        TRPO(Pair, **SMALL)


def test_a_critic_of_another_shape_is_named():
    class Column(nn.Linear):
        def __init__(self):
            super().__init__(2, 1)

    with pytest.raises(ValueError, match="the critic must return one value a row"):
        TRPO(Clock, critic=Column(), **SMALL).learn(64, progress=False)
    with pytest.raises(ValueError, match="the critic has no parameters"):
        TRPO(Clock, critic=nn.Flatten(0), **SMALL)


def test_an_environment_may_differentiate():
    class Learner(Clock):
        def step(self, action):
            (torch.ones(1, requires_grad=True) ** 2).sum().backward()
            return super().step(action)

    TRPO(Learner, **SMALL).learn(64, progress=False)


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (PPOConfig, {"final_lr": -1.0}, "final_lr must be finite and not negative"),
        (PPOConfig, {"value_coef": -1.0}, "value_coef must be finite and not negative"),
        (PPOConfig, {"kl_limit": -1.0}, "kl_limit must be a positive"),
        (NPGConfig, {"damping": -1.0}, "damping must be finite and not negative"),
        (NPGConfig, {"cg_max_iter": 0}, "cg_max_iter must be at least 1"),
        (KLPenaltyConfig, {"damping": float("nan")}, "damping must be finite"),
        (TRPOConfig, {"curvature_fraction": 0.0}, "curvature_fraction must lie in"),
        (TRPOConfig, {"steps_per_update": 64.0}, "steps_per_update must be a whole number"),
        (TRPOConfig, {"seed": None}, "seed must be a whole number, got None"),
        (TRPOConfig, {"hidden": 64}, "hidden must be widths"),
    ],
)
def test_options_that_would_train_wrongly_are_refused(config, options, words):
    with pytest.raises(ValueError, match=words):
        config(**options)


@pytest.mark.parametrize("answer", [None, 0, np.zeros(3), "", []])
def test_only_false_stops(answer):
    agent = TRPO(Clock, **SMALL).learn(128, False, lambda *_: answer)
    assert agent.iterations > 1


@pytest.mark.parametrize("answer", [False, np.False_])
def test_false_stops(answer):
    assert TRPO(Clock, **SMALL).learn(128, False, lambda *_: answer).iterations == 1


def test_training_returns_do_not_stop_what_is_evaluated():
    """The agent is evaluated where nothing is paid, and trained where the threshold is passed."""
    poor = Every(150, EvaluateBest(lambda: Paid(0.0), episodes=1))
    for key, stops in (("eval/mean_reward", False), ("rollout/ep_rew_mean", True)):
        agent = TRPO(Paid, **SMALL).learn(400, False, [poor, StopOnReward(1.0, key)])
        assert (agent.num_timesteps < 400) is stops


def test_the_interval_of_a_callback_starts_over_with_another_agent():
    calls = []
    every = Every(100, lambda agent, _: calls.append(agent))
    agents = [TRPO(Clock, **SMALL).learn(300, False, every) for _ in range(2)]
    assert [calls.count(agent) for agent in agents] == [3, 3]


def test_a_video_that_is_full_reports_the_episodes_that_ended(tmp_path, monkeypatch):
    env = Clock(length=4)
    env.render = lambda: np.zeros((8, 8, 3), np.uint8)
    monkeypatch.setattr("rl.run.video.gymnasium.make", lambda *_, **__: env)
    returns = record(TRPO(Clock, **SMALL), "x", tmp_path / "x.gif", episodes=5, max_frames=10)
    assert returns == [4.0, 4.0]
    assert env.episode == 2


def columns(**changes):
    return {
        "time/total_timesteps": [1.0, 2.0],
        "rollout/ep_rew_mean": [1.0, 2.0],
        "train/kl_divergence_loss": [0.1, 0.2],
    } | changes


@pytest.mark.parametrize("kl", [[float("inf"), 0.1], [float("nan")] * 2])
def test_a_kl_that_is_not_finite_can_be_plotted(kl, tmp_path):
    out = tmp_path / "curve.png"
    plot_learning_curve(columns(**{"train/kl_divergence_loss": kl}), out, title="x")
    assert out.stat().st_size > 1000


def test_runs_without_an_episode_or_a_log_can_be_told(tmp_path):
    for name, text in (("a", "nan"), ("b", "nan")):
        (tmp_path / name).mkdir()
        keys = ",".join(columns())
        (tmp_path / name / "progress.csv").write_text(f"{keys}\n1,{text},0.1\n")
    monkey = plot_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "plot.png")
    assert sum(monkey.values()) == 2
    (tmp_path / "b" / "progress.csv").write_text("loss\n1\n")
    with pytest.raises(ValueError, match="has no time/total_timesteps"):
        plot_runs([tmp_path / "b"], tmp_path / "plot.png")


def test_parameters_in_any_layout_are_saved(tmp_path):
    class Transposed(TwoNumbers):
        def __init__(self):
            super().__init__(copies=True)
            self.extra = nn.Parameter(torch.arange(8.0).reshape(2, 4).t(), requires_grad=False)

    make = lambda: Clock(action_space=Box(-1, 1, (1,), np.float32))  # noqa: E731 # a factory
    TRPO(make, policy=Transposed(), **SMALL).save(tmp_path / "agent.zip")
    again = TRPO.load(tmp_path / "agent.zip", make, policy=Transposed())
    assert again.policy.extra.tolist() == torch.arange(8.0).reshape(2, 4).t().tolist()


def test_a_normalisation_goes_back_to_its_start_and_can_be_pickled():
    norm = ObservationNorm(2)
    fresh = {key: x.clone() for key, x in norm.state_dict().items()}
    norm.update(5 + 3 * torch.randn(10, 2))
    norm.load_state_dict(fresh)
    x = torch.randn(3, 2)
    assert torch.equal(norm(x), x)
    assert torch.equal(pickle.loads(pickle.dumps(norm))(x), x)


def test_ppo_takes_a_family_without_entropy_unless_it_is_asked_for():
    class Squashed(TwoNumbers):
        def forward(self, rows):
            base = super().forward(rows).base_dist
            tanh = torch.distributions.TanhTransform(cache_size=1)
            return Independent(torch.distributions.TransformedDistribution(base, [tanh]), 1)

    make = lambda: Clock(action_space=Box(-1, 1, (1,), np.float32))  # noqa: E731 # a factory
    PPO(make, policy=Squashed(copies=True), **SMALL).learn(64, progress=False)
    with pytest.raises(ValueError, match="has no entropy: set entropy_coef to 0"):
        PPO(make, policy=Squashed(copies=True), entropy_coef=0.1, **SMALL).learn(64, False)


def test_one_step_episodes_are_fine_for_all():
    for algorithm in ALGORITHMS:
        algorithm(Bandit, **SMALL).learn(64, progress=False)
