"""An agent that is loaded is the one that was saved, with or without its environment."""

import copy
import itertools
import resource
import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Text
from gymnasium.vector import SyncVectorEnv
from torch import nn

from agents import MEDIUM, SMALL, TwoNumbers, every_algorithm, same, weights
from rl import (
    NPG,
    PPO,
    TRPO,
    VPG,
    AdamFit,
    CheckpointError,
    EnvCollector,
    LBFGSFit,
    MonteCarlo,
    checkpoint,
    evaluate,
    gae,
    load,
)
from rl.json_tree import to_json
from toys import Clock, Slide


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    agent = TRPO("CartPole-v1", normalise_rewards=True, **MEDIUM).learn(600, progress=False)
    path = tmp_path_factory.mktemp("agent") / "agent.zip"
    agent.save(path)
    return agent, path


def entries(optimizer):
    """Yield (key, value) of all that an optimizer's state holds."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        # tuples come back as lists
        yield from ((k, list(v) if isinstance(v, tuple) else v) for k, v in group.items())
    for i, entry in state["state"].items():
        yield from (((i, k), v) for k, v in entry.items())


def assert_same_optimizers(one, other):
    for name, optimizer in one.optimizers().items():
        pairs = zip(entries(optimizer), entries(other.optimizers()[name]), strict=True)
        for (key, x), (other_key, y) in pairs:
            assert key == other_key
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_a_loaded_agent_is_the_saved_one(trained):
    agent, path = trained
    loaded = TRPO.load(path)
    assert same(weights(agent), weights(loaded))
    assert loaded.config == agent.config
    assert loaded.layout.parts == agent.layout.parts
    assert loaded.action_space == agent.action_space
    assert (loaded.num_timesteps, loaded.iterations) == (agent.num_timesteps, agent.iterations)
    assert_same_optimizers(agent, loaded)
    moments = (a.reward_scale.state_dict().values() for a in (agent, loaded))
    assert same(*map(list, moments))
    obs = np.random.default_rng(0).normal(size=(50, 4))
    assert (loaded.predict(obs, True)[0] == agent.predict(obs, True)[0]).all()
    assert torch.equal(loaded.generator.get_state(), agent.generator.get_state())
    loaded.learn(300, progress=False)
    assert loaded.iterations > agent.iterations


@every_algorithm
@pytest.mark.parametrize(
    "options",
    [
        {"advantages": "monte_carlo", "critic_fit": "lbfgs:steps=3"},
        {"advantages": "n_step:n=3", "critic_fit": "trust_region:steps=2", "td_lambda": 0.5},
        {"normalise_observations": True, "critic_hidden": (4,), "shared_encoder": True},
    ],
)
def test_agents_of_all_options_come_back(algorithm, options, tmp_path):
    agent = algorithm("CartPole-v1", **options, **SMALL).learn(64, progress=False)
    agent.save(tmp_path / "agent.zip")
    loaded = load(tmp_path / "agent.zip")
    assert type(loaded) is algorithm
    assert loaded.config == agent.config
    assert same(weights(agent), weights(loaded))
    assert_same_optimizers(agent, loaded)
    loaded.learn(64, progress=False)


class Composed(Clock):
    """Observes a Dict with a mask, and acts in a Discrete space that starts at two."""

    def __init__(self):
        super().__init__(action_space=Discrete(2, start=2))
        parts = {"x": Box(-1, 99, (2,), np.float32), "action_mask": MultiBinary(2)}
        self.observation_space = Dict(parts)

    def _observation(self):
        return {"x": super()._observation(), "action_mask": np.array([1, 1], np.int8)}


@pytest.mark.parametrize("make", [Clock, Slide, Composed])
def test_an_agent_of_ones_own_environment_predicts_without_it(make, tmp_path):
    agent = TRPO(make, **SMALL).learn(64, progress=False)
    agent.save(tmp_path / "agent.zip")
    loaded = TRPO.load(tmp_path / "agent.zip")
    assert not loaded.has_envs
    observation = agent.layout.space.sample()
    for deterministic in (True, False):
        fresh = TRPO.load(tmp_path / "agent.zip")  # draws start over
        agent._predict_generator.manual_seed(0)
        expected, _ = agent.predict(observation, deterministic)
        assert (fresh.predict(observation, deterministic)[0] == expected).all()
    with pytest.raises(ValueError, match=r"loaded without an environment.*pass env= to load"):
        loaded.learn(64, progress=False)
    assert loaded.num_timesteps == agent.num_timesteps
    TRPO.load(tmp_path / "agent.zip", make).learn(64, progress=False)


def test_evaluating_makes_no_environment_to_train_in(trained, tmp_path):
    TRPO(Clock, **SMALL).save(tmp_path / "agent.zip")
    loaded = TRPO.load(tmp_path / "agent.zip")
    assert evaluate(loaded, Clock, 2).lengths == (3, 3)
    by_id = TRPO.load(trained[1])
    evaluate(by_id, "CartPole-v1", 1)
    assert not by_id.has_envs


def test_predicting_makes_no_environment(trained, monkeypatch):
    _, path = trained
    loaded = TRPO.load(path)
    loaded.predict(np.zeros(4))
    assert not loaded.has_envs
    loaded.close()  # nothing to close
    assert loaded.env_id == "CartPole-v1"
    assert loaded.envs.num_envs == 4
    assert loaded.has_envs


# -- other options


def test_options_can_be_changed_by_loading(trained):
    _, path = trained
    loaded = TRPO.load(path, delta=0.003, damping=0.5, gamma=0.9, device="cpu")
    assert (loaded.config.delta, loaded.config.damping, loaded.config.gamma) == (0.003, 0.5, 0.9)
    (group,) = loaded.policy_optimizer.param_groups
    assert (group["delta"], group["damping"]) == (0.003, 0.5)
    logs = []
    loaded.learn(1, False, lambda _, log: logs.append(log))
    assert 0 < logs[0]["train/kl_divergence_loss"] <= 0.003
    with pytest.raises(ValueError, match="no option 'detla': did you mean 'delta'"):
        TRPO.load(path, detla=0.1)
    with pytest.raises(ValueError, match="cannot compute on device='meta'"):
        TRPO.load(path, device="meta")
    with pytest.raises(CheckpointError, match="does not fit this agent"):
        TRPO.load(path, hidden=(3,))


@pytest.mark.parametrize(("algorithm", "rate"), [(PPO, "lr"), (VPG, "policy_lr")])
def test_a_learning_rate_that_is_changed_by_loading_is_used(algorithm, rate, tmp_path):
    """A rate of nearly zero: nothing moves."""
    agent = algorithm("CartPole-v1", **SMALL).learn(64, progress=False)
    agent.save(tmp_path / "agent.zip")
    loaded = load(tmp_path / "agent.zip", **{rate: 1e-30})
    loaded.learn(64, progress=False)
    assert same(list(agent.policy.parameters()), list(loaded.policy.parameters()))


def test_another_fit_starts_with_an_optimizer_of_its_own(trained):
    agent, path = trained
    for fit in (AdamFit(lr=0.5), LBFGSFit(), "trust_region"):
        loaded = TRPO.load(path, critic_fit=fit)
        state = loaded.critic_optimizer.state_dict()
        fresh = loaded.critic_fit.optimizer(loaded.critic_parameters).state_dict()
        assert state["param_groups"] == fresh["param_groups"]
        assert state["state"].keys() == fresh["state"].keys()
        assert not any("exp_avg" in entry for entry in state["state"].values())
        loaded.learn(1, progress=False)
    assert "exp_avg" in agent.critic_optimizer.state_dict()["state"][0]


def test_parts_of_ones_own_are_asked_for(tmp_path):
    def own(path, values, gamma):
        ends = path.terminated, path.truncated
        return gae(path.rewards, *values, *ends, gamma=gamma, gae_lambda=0.3)

    agent = TRPO(Clock, advantages=own, **SMALL).learn(64, progress=False)
    agent.save(tmp_path / "agent.zip")
    with pytest.raises(ValueError, match=r"advantages was an object.*own, which.*pass advantages="):
        TRPO.load(tmp_path / "agent.zip")
    for advantages in (own, MonteCarlo()):
        loaded = TRPO.load(tmp_path / "agent.zip", Clock, advantages=advantages)
        assert loaded.advantages is advantages
        loaded.learn(64, progress=False)


def test_networks_of_ones_own_are_passed_again(tmp_path):
    class Transposed(TwoNumbers):
        def __init__(self):
            super().__init__(copies=True)
            self.extra = nn.Parameter(torch.arange(8.0).reshape(2, 4).t(), requires_grad=False)

    class Line(nn.Linear):
        def forward(self, rows):
            return super().forward(rows).squeeze(-1)

    agent = TRPO(Slide, policy=Transposed(), critic=Line(2, 1), **SMALL).learn(64, progress=False)
    agent.save(tmp_path / "agent.zip")
    networks = {"policy": Transposed(), "critic": Line(2, 1)}
    again = TRPO.load(tmp_path / "agent.zip", Slide, **networks)
    assert again.policy.extra.tolist() == torch.arange(8.0).reshape(2, 4).t().tolist()
    assert same(weights(agent), weights(again))
    with pytest.raises(CheckpointError, match="does not fit this agent"):
        TRPO.load(tmp_path / "agent.zip", Slide)


def test_a_policy_with_parameters_that_are_never_used_can_be_loaded(tmp_path):
    """Optimizers of torch have no state of them."""

    class Idle(TwoNumbers):
        def __init__(self):
            super().__init__(copies=True)
            self.idle = nn.Parameter(torch.ones(3))

    for algorithm in (PPO, VPG):
        agent = algorithm(Slide, policy=Idle(), **SMALL).learn(64, progress=False)
        agent.save(tmp_path / "agent.zip")
        loaded = load(tmp_path / "agent.zip", Slide, policy=Idle())
        assert same(weights(agent), weights(loaded))
        assert_same_optimizers(agent, loaded)


def test_actions_that_no_file_can_hold_are_those_of_the_environment(tmp_path):
    class Words(Clock):
        def __init__(self):
            super().__init__(action_space=Text(3))

    class Speaker(TwoNumbers):
        def to_env(self, actions):
            return tuple("yes" if action > 0 else "no" for action in actions)

    agent = TRPO(Words, policy=Speaker(copies=True), **SMALL).learn(64, progress=False)
    agent.save(tmp_path / "agent.zip")
    alone = TRPO.load(tmp_path / "agent.zip", policy=Speaker(copies=True))
    assert alone.predict(np.zeros(2), deterministic=True)[0] in ("yes", "no")
    loaded = TRPO.load(tmp_path / "agent.zip", Words, policy=Speaker(copies=True))
    assert loaded.action_space == Text(3)
    assert same(weights(agent), weights(loaded))
    loaded.learn(64, progress=False)


def test_a_collector_of_ones_own_is_passed_again(trained):
    _, path = trained

    class Own(EnvCollector):
        pass

    loaded = TRPO.load(path, collector=Own).learn(1, progress=False)
    assert isinstance(loaded.training.collector, Own)


# -- other environments


@pytest.mark.parametrize("n", [1, 2, 8])
def test_the_number_of_copies_may_be_another(trained, n):
    agent, path = trained
    envs = gymnasium.make_vec("CartPole-v1", n, "sync", max_episode_steps=7)
    loaded = TRPO.load(path, envs)
    assert loaded.envs is envs
    assert loaded.config.n_envs == n
    assert same(weights(agent), weights(loaded))
    loaded.learn(1, progress=False)
    with pytest.raises(ValueError, match="the agent trains in"):
        evaluate(loaded, envs, 4)
    assert TRPO.load(path, n_envs=n).envs.num_envs == n


def test_a_number_of_copies_that_does_not_divide_the_steps_says_how_to_go_on(trained):
    _, path = trained
    envs = gymnasium.make_vec("CartPole-v1", 3, "sync")
    with pytest.raises(ValueError, match="256 does not divide by 3 environments: try 255 or 258"):
        TRPO.load(path, envs)
    assert TRPO.load(path, envs, steps_per_update=255).learn(1, progress=False).iterations
    with pytest.raises(ValueError, match="n_envs=4, but the environment that was passed is 3"):
        TRPO.load(path, envs, n_envs=4)
    assert not envs.closed


class Closable(Clock):
    closed = 0

    def close(self):
        self.closed += 1


def test_environments_with_other_spaces_are_named_and_closed(trained):
    _, path = trained
    for env in ("Acrobot-v1", gymnasium.make_vec("Acrobot-v1", 4, "sync")):
        with pytest.raises(
            ValueError, match=r"the agent has observations of Box\(.*\(4,\).*\(6,\)"
        ):
            TRPO.load(path, env)
    made = []
    with pytest.raises(ValueError, match="the agent has observations of"):
        TRPO.load(path, lambda: made.append(Closable()) or made[-1])
    assert [env.closed for env in made] == [1] * 4


def test_no_environment_is_made_for_an_agent_that_cannot_be_loaded(tmp_path):
    TRPO(Clock, **SMALL).save(tmp_path / "agent.zip")
    for options, words in (({"hidden": (3,)}, "does not fit"), ({"n_envs": 5}, "does not divide")):
        made = []
        with pytest.raises(ValueError, match=words):
            TRPO.load(
                tmp_path / "agent.zip", lambda m=made: m.append(Closable()) or m[-1], **options
            )
        assert not made


def test_other_actions_are_named(tmp_path):
    TRPO(Clock, **SMALL).save(tmp_path / "agent.zip")
    with pytest.raises(ValueError, match=r"actions of Discrete\(2\), the environment of Box"):
        TRPO.load(tmp_path / "agent.zip", Slide)
    assert TRPO.load(tmp_path / "agent.zip", Clock).has_envs


def test_an_id_that_has_other_spaces_by_now_is_named_when_it_is_made(trained, tmp_path):
    _, path = trained
    saved = checkpoint.read(path)
    checkpoint.write(tmp_path / "agent.zip", saved | {"env_id": "Acrobot-v1"})
    loaded = TRPO.load(tmp_path / "agent.zip")
    loaded.predict(np.zeros(4))
    with pytest.raises(ValueError, match="the agent has observations of"):
        loaded.learn(1, progress=False)


def test_an_environment_may_have_a_length_of_zero(trained):
    class Empty(SyncVectorEnv):
        def __len__(self):
            return 0

    _, path = trained
    envs = Empty([lambda: gymnasium.make("CartPole-v1")] * 2)
    assert TRPO.load(path, envs).envs is envs


def test_the_number_of_environments_passed_in_is_the_one_that_is_saved(tmp_path):
    envs = gymnasium.make_vec("CartPole-v1", 3, "sync")
    agent = TRPO(envs, steps_per_update=300)
    assert agent.config.n_envs == 3
    agent.save(tmp_path / "agent.zip")
    loaded = TRPO.load(tmp_path / "agent.zip")
    assert loaded.env_id is None  # its options and wrappers are not those of the id
    assert TRPO.load(tmp_path / "agent.zip", "CartPole-v1").envs.num_envs == 3


# -- resumed runs


def test_every_run_and_every_part_of_a_resumed_run_has_its_own_starts(trained):
    _, path = trained
    seeds = []

    class Spy(EnvCollector):
        def __init__(self, *arguments, seed, generator):
            seeds.append(seed)
            super().__init__(*arguments, seed=seed, generator=generator)

    agents = [TRPO("CartPole-v1", seed=s, collector=Spy, **MEDIUM) for s in (0, 1)]
    for agent in [*agents, TRPO.load(path, collector=Spy)]:
        agent.learn(1, progress=False)
    assert all(abs(a - b) > 100 for a, b in itertools.combinations(seeds, 2))


def test_an_agent_whose_training_is_interrupted_can_be_saved_and_goes_on(tmp_path):
    agent = TRPO(Clock, critic_fit="lbfgs", **SMALL).learn(64, progress=False)
    before, fit_critic = weights(agent), agent.fit_critic

    def interrupted(path, estimates):
        raise KeyboardInterrupt

    agent.fit_critic = interrupted
    with pytest.raises(KeyboardInterrupt):
        agent.learn(64, progress=False)
    assert same(before, weights(agent))  # an update is done wholly, or not at all
    agent.save(tmp_path / "agent.zip")
    assert same(weights(agent), weights(TRPO.load(tmp_path / "agent.zip", Clock)))
    agent.fit_critic = fit_critic
    agent.learn(64, progress=False)


# -- files that do not fit


def test_notes_are_kept_beside_the_agent(tmp_path):
    TRPO("CartPole-v1", **SMALL).save(tmp_path / "agent.zip", notes={"best": 3.5, "why": None})
    assert checkpoint.read(tmp_path / "agent.zip")["notes"] == {"best": 3.5, "why": None}


def changed(path, place, value):
    """Write a copy of a file with an entry changed, or without it for ``...``; return the copy."""
    saved = checkpoint.read(path)
    *outer, last = place
    inner = saved
    for key in outer:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value(inner.get(last)) if callable(value) else value
    copy = path.with_name("changed.zip")
    checkpoint.write(copy, saved)
    return copy


PARTS = ("agent", "parts")
ADAM = (*PARTS, "critic_optimizer", "state", 0)
GROUP = (*PARTS, "policy_optimizer", "param_groups", 0)


def poisoned(x):
    x.view(-1)[1] = torch.nan
    return x


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("agent",), ..., "the file is incomplete: it has no 'agent'"),
        (("config",), ..., "it has no 'config'"),
        (("config",), [1], "'config' of the file must be of type dict, got"),
        (("config", "gamma"), 2, "gamma must lie in"),
        (("config", "hidden"), [-1], "hidden must be widths"),
        (("config", "hidden"), {"a": 1}, "hidden must be a list"),
        (("config", "n_envs"), 3, "256 does not divide by 3"),
        (("config", "seed"), 2**64, "seed must be less than"),
        (("config", "device"), "nothing", "cannot compute on device='nothing'"),
        (("config", "new"), 1, "no option 'new'"),
        (("env_id",), 3, "'env_id' of the file must be of type str or NoneType, got 3"),
        (("layout", "mask"), -1, "an action mask of -1 entries"),
        (("layout", "mask"), 2**40, "an action mask of 1099511627776 entries"),
        (("layout", "mask"), 3, r"mask of shape \(3,\) does not fit CategoricalHead"),
        (("layout", "origin"), torch.zeros(4), "origin of observations is not finite"),
        (("layout", "origin"), torch.full((4,), torch.nan, dtype=torch.float64), "not finite"),
        (("layout", "origin"), torch.zeros(3, dtype=torch.float64), "origin must have shape"),
        (("layout", "space", "kind"), "Graph", "unknown kind of space 'Graph'"),
        (("layout", "space", "shape"), [2**40], "a space of 8,796,093,022,208 bytes"),
        (("layout", "space", "dtype"), "O", "not the JSON of a space"),
        (("layout", "space", "low"), ["nan"], "not the JSON of a space"),
        (("action_space", "n"), 3, r"policy.linear.0.weight is \(2, 16\) .* and \(3, 16\)"),
        (("action_space", "n"), 2**40, "a space of 8,796,093,022,208 bytes"),
        (("action_space",), None, "unsupported action space None"),
        (("agent", "num_timesteps"), ..., "has no 'num_timesteps'"),
        (("agent", "num_timesteps"), True, "'num_timesteps' of 'agent' of the file must be of typ"),
        (("agent", "iterations"), -1, "iterations of the state must not be negative"),
        (("agent", "generator"), ..., "has no 'generator'"),
        (("agent", "generator"), torch.zeros(3), "random state is none of torch's"),
        (("agent", "generator"), lambda x: x * 0 + 255, "random state is none of torch's"),
        (PARTS, ..., "has no 'parts'"),
        ((*PARTS, "policy"), ..., "the state of policy must be of type dict, got None"),
        ((*PARTS, "critic"), [], r"the state of critic must be of type dict, got \[\]"),
        ((*PARTS, "critic", "linear.0.bias"), ..., "critic.linear.0.bias is missing"),
        ((*PARTS, "critic", "linear.0.bias"), 3.0, "critic.linear.0.bias is missing"),
        ((*PARTS, "critic", "linear.0.bias"), torch.zeros(2), r"is \(2,\) of torch.float32 in the"),
        ((*PARTS, "critic", "linear.0.bias"), torch.zeros(1).long(), "torch.int64 in the saved"),
        ((*PARTS, "critic", "more"), torch.zeros(1), "Unexpected key.*more"),
        ((*PARTS, "policy", "linear.0.weight"), poisoned, "0.weight has 1 entries that are nan"),
        (
            (*PARTS, "policy", "linear.0.bias"),
            lambda x: x / 0,
            "bias has .* entries that are -?inf",
        ),
        ((*PARTS, "reward_scale"), ..., "the state of reward_scale must be"),
        ((*PARTS, "reward_scale", "moments.mean"), torch.tensor(torch.nan).double(), "nan"),
        ((*PARTS, "critic_optimizer"), ..., "has no 'critic_optimizer'"),
        (
            (*PARTS, "critic_optimizer", "state"),
            [],
            "'state' of the state of critic_optimizer must",
        ),
        (ADAM, {}, "parameter 0.exp_avg is missing"),
        ((*ADAM, "exp_avg"), torch.zeros(3), r"exp_avg is \(3,\)"),
        ((*ADAM, "exp_avg_sq"), poisoned, "exp_avg_sq has 1 entries that are nan"),
        ((*ADAM, "step"), "many", "'step' of the state of critic_optimizer, parameter 0 must"),
        ((*PARTS, "policy_optimizer", "param_groups"), [], "groups of policy_optimizer are those"),
        ((*GROUP, "params"), [0], "groups of policy_optimizer are those of other parameters"),
        ((*GROUP, "delta"), "wide", "delta of policy_optimizer is 'wide', and 0.01 here"),
        ((*GROUP, "maximize"), 1, "maximize of policy_optimizer is 1, and True here"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name(trained, place, value, words):
    _, path = trained
    forged = changed(path, place, value)
    for load_it in (TRPO.load, load):
        with pytest.raises(CheckpointError, match=words) as caught:
            load_it(forged)
        assert str(caught.value).startswith(str(forged))
        assert "\n" not in str(caught.value)


def test_the_state_of_another_number_of_parameters_is_refused(trained, tmp_path):
    _, path = trained
    state = checkpoint.read(path)["agent"]["parts"]["policy_optimizer"]["state"]
    forged = changed(path, (*PARTS, "policy_optimizer", "state", len(state)), lambda _: state[0])
    with pytest.raises(CheckpointError, match="the state of policy_optimizer is not that of"):
        TRPO.load(forged)


def test_the_algorithm_of_a_file_is_that_of_the_class(trained, tmp_path):
    _, path = trained
    with pytest.raises(CheckpointError, match="holds an agent of 'trpo', not 'npg'"):
        NPG.load(path)
    assert type(load(path)) is TRPO
    checkpoint.write(tmp_path / "other.zip", checkpoint.read(path) | {"algorithm": "sac"})
    with pytest.raises(CheckpointError, match="agent of 'sac', which is none of trpo, npg"):
        load(tmp_path / "other.zip")


def test_a_state_can_be_taken_over_without_a_file():
    agent, other = (TRPO("CartPole-v1", seed=s, **SMALL) for s in (1, 2))
    agent.learn(64, progress=False)
    other.load_state_dict(agent.state_dict())
    assert same(weights(agent), weights(other))
    assert other.num_timesteps == agent.num_timesteps
    with pytest.raises(ValueError, match="the state does not fit this agent"):
        TRPO("CartPole-v1", **SMALL | {"hidden": (5,)}).load_state_dict(agent.state_dict())


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("num_timesteps",), -1),
        (("generator",), torch.zeros(3)),
        (("parts", "critic", "linear.0.bias"), torch.zeros(3)),
        (("parts", "critic", "linear.0.bias"), torch.full((1,), torch.inf)),
        (("parts", "critic", "surplus"), torch.zeros(1)),
        (("parts", "critic_optimizer", "param_groups"), []),
        (("parts", "critic_optimizer", "state", 0, "exp_avg"), torch.zeros(3)),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(place, value):
    agent, other = (TRPO("CartPole-v1", seed=s, **SMALL).learn(64, progress=False) for s in (1, 2))
    state, before = copy.deepcopy(other.state_dict()), copy.deepcopy(agent.state_dict())
    inner = state
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(ValueError, match="state"):
        agent.load_state_dict(state)
    files = [to_json(x) for x in (before, agent.state_dict())]
    assert files[0][0] == files[1][0]
    assert same(*(list(tensors.values()) for _, tensors in files))


def test_an_interrupt_while_a_state_is_taken_over_changes_nothing(monkeypatch):
    agent, other = (TRPO("CartPole-v1", seed=s, **SMALL).learn(64, progress=False) for s in (1, 2))
    before = weights(agent)

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(agent.policy_optimizer, "load_state_dict", interrupted)
    monkeypatch.setattr("rl.undo.copy.deepcopy", lambda x: x)
    with pytest.raises(KeyboardInterrupt):
        agent.load_state_dict(other.state_dict())
    assert same(before, weights(agent))


# -- files that ask for more than they hold


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(
    "options",
    [
        {"hidden": [20_000, 20_000]},
        {"critic_hidden": [10**6, 10**6]},
        {"hidden": [1] * 10**5},
        {"n_envs": 2**29, "steps_per_update": 2**30},
        {"hidden": [20_000, 20_000], "n_envs": 32, "vectorization": "async"},
    ],
)
def test_forged_options_make_no_networks_and_no_processes(trained, options, monkeypatch):
    _, path = trained
    forged = changed(path, ("config",), lambda config: config | options)
    monkeypatch.setattr("rl.build.make_envs", lambda *_: pytest.fail("environments were made"))
    before = peak_memory()
    for arguments in ((forged,), (forged, "CartPole-v1")):
        with pytest.raises(CheckpointError, match=r"does not fit this agent|bytes of networks"):
            load(*arguments)
    assert peak_memory() - before < 2**28


def test_the_global_random_state_is_left_alone_by_loading(trained):
    before = torch.get_rng_state()
    load(trained[1])
    assert torch.equal(before, torch.get_rng_state())


# -- ids that would import a module


@pytest.fixture
def mined(tmp_path, monkeypatch):
    """Return a file whose environment is in a module that says when it is imported."""
    (tmp_path / "mine.py").write_text("import sys\nsys.mine_was_imported = True\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delattr(sys, "mine_was_imported", raising=False)
    TRPO("CartPole-v1", **SMALL).save(tmp_path / "honest.zip")
    path = changed(tmp_path / "honest.zip", ("env_id",), "mine:CartPole-v1")
    yield path
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("how", ["auto", "sync", "async", "vector_entry_point", "envpool"])
def test_a_module_that_a_file_names_is_not_imported(mined, how, tmp_path):
    agent = load(mined, vectorization=how)
    agent.predict(np.zeros(4))
    assert agent.env_id == "mine:CartPole-v1"
    for use in (lambda: agent.learn(1, progress=False), lambda: agent.envs):
        with pytest.raises(ValueError, match=r"'mine', which runs its code.*pass env=mine:CartP"):
            use()
    agent.save(tmp_path / "again.zip")
    assert checkpoint.read(tmp_path / "again.zip")["env_id"] == "mine:CartPole-v1"
    evaluate(agent, "CartPole-v1", 1)
    agent.close()
    assert not hasattr(sys, "mine_was_imported")


def test_a_module_is_imported_on_request(mined):
    assert load(mined, "mine:CartPole-v1").learn(1, progress=False).iterations
    assert sys.mine_was_imported
