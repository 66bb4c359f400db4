import itertools
import json
import zipfile

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

from rl import (
    TRPO,
    CheckpointError,
    Collector,
    TRPOConfig,
    evaluate,
)
from rl import checkpoint
from toys import Bandit, Clock, vector

SMALL = {"n_envs": 4, "steps_per_update": 256, "hidden": (16,)}


def weights(agent):
    return [p.detach().clone() for m in agent.modules().values() for p in m.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def test_it_learns_a_bandit():
    agent = TRPO(vector(Bandit, 4), delta=0.1, **SMALL)
    logs = []
    agent.learn(2000, progress=False, callback=lambda _, log: logs.append(log))
    assert evaluate(agent, vector(Bandit, 4), 8).mean == 1.0
    assert logs[-1]["rollout/ep_rew_mean"] > 0.9 > logs[0]["rollout/ep_rew_mean"]


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_every_update_stays_within_delta_and_improves(env):
    logs = []
    agent = TRPO(env, delta=0.02, **SMALL)
    agent.learn(1500, progress=False, callback=lambda _, log: logs.append(log))
    for log in logs:
        assert log["trust/status"] == "accepted"
        assert 0 < log["train/kl_divergence_loss"] <= 0.02
        assert log["trust/actual_reduction"] > 0
    assert logs[-1]["time/iterations"] == len(logs) == agent.iterations
    assert agent.num_timesteps == logs[-1]["time/total_timesteps"] >= 1500


def test_dummy_transitions_are_not_counted_as_steps():
    agent = TRPO(vector(lambda: Clock(length=3), 4), **SMALL).learn(1, progress=False)
    assert agent.num_timesteps == 4 * 48  # three of every four rows


def test_dummy_transitions_reach_no_update():
    """Whatever stands in masked rows, the update is the same bit for bit."""
    agents = [TRPO(vector(lambda: Clock(length=3), 4), **SMALL) for _ in range(2)]
    for agent, garbage in zip(agents, (0.0, 1e6), strict=True):
        agent.learn(1, progress=False)
        rollout = agent._collector.collect(agent.policy, 32)
        rollout.rewards[~rollout.valid] = garbage
        rollout.actions[~rollout.valid] = int(garbage > 0)
        agent.update(rollout)
    assert same(*agents)


def test_seeds_decide_everything_and_the_global_state_nothing():
    agents = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        agents.append(TRPO("CartPole-v1", seed=3, **SMALL).learn(600, progress=False))
        assert torch.equal(torch.get_rng_state(), state)
    other = TRPO("CartPole-v1", seed=4, **SMALL).learn(600, progress=False)
    assert same(agents[0], agents[1])
    assert not same(agents[0], other)


def test_a_callback_can_stop():
    agent = TRPO("CartPole-v1", **SMALL)
    agent.learn(10_000, progress=False, callback=lambda agent, _: agent.iterations < 2)
    assert agent.iterations == 2


def test_learning_continues():
    agent = TRPO("CartPole-v1", **SMALL).learn(300, progress=False).learn(300, progress=False)
    straight = TRPO("CartPole-v1", **SMALL)
    straight.learn(agent.num_timesteps, progress=False)
    assert same(agent, straight)


def test_the_progress_bar_shows(capsys):
    TRPO("CartPole-v1", **SMALL).learn(300)
    assert "step/s" in capsys.readouterr().err


def test_predict_takes_one_observation_or_many():
    agent = TRPO("Pendulum-v1", **SMALL)
    action, state = agent.predict(np.zeros(3))
    assert action.shape == (1,)
    assert state is None
    actions, _ = agent.predict(np.zeros((5, 3)), deterministic=True)
    assert actions.shape == (5, 1)
    assert np.ptp(actions) == 0
    assert np.ptp(agent.predict(np.zeros((5, 3)))[0]) > 0
    with pytest.raises(ValueError, match="obs must have shape"):
        agent.predict(np.zeros(4))


def test_evaluation_plays_whole_episodes_fairly():
    agent = TRPO(vector(lambda: Clock(length=3), 4), **SMALL)
    lengths = iter([2, 5, 9])
    envs = gymnasium.vector.SyncVectorEnv([lambda: Clock(length=next(lengths))] * 3)
    result = evaluate(agent, envs, episodes=7)
    # three, two and two episodes of the three environments
    assert sorted(result.lengths) == [2, 2, 2, 5, 5, 9, 9]
    assert sorted(result.returns) == [2, 2, 2, 5, 5, 9, 9]
    assert result.mean == pytest.approx(34 / 7)
    with pytest.raises(ValueError, match="episodes"):
        evaluate(agent, envs, episodes=0)


class Generous(gymnasium.vector.SyncVectorEnv):
    """Pays for the dummy step too, which the interface does not forbid."""

    def step(self, actions):
        resetting = self._autoreset_envs.copy()
        observation, reward, *rest = super().step(actions)
        return observation, reward + 100 * resetting, *rest


def test_rewards_of_dummy_steps_are_in_no_return():
    envs = Generous([lambda: Clock(length=3)] * 4)
    agent = TRPO(envs, **SMALL).learn(1, progress=False)
    assert set(agent._collector.returns) == {3.0}
    assert evaluate(agent, Generous([lambda: Clock(length=3)] * 2), 6).returns == (3.0,) * 6


# -- checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    agent = TRPO("CartPole-v1", **SMALL).learn(600, progress=False)
    path = tmp_path_factory.mktemp("agent") / "agent.zip"
    agent.save(path)
    return agent, path


def test_a_loaded_agent_is_the_saved_one(trained):
    agent, path = trained
    loaded = TRPO.load(path)
    assert same(agent, loaded)
    assert loaded.config == agent.config
    assert (loaded.num_timesteps, loaded.iterations) == (agent.num_timesteps, agent.iterations)
    for name, optimizer in agent.optimizers().items():
        state, other = optimizer.state_dict(), loaded.optimizers()[name].state_dict()
        assert [json.loads(json.dumps(group)) for group in state["param_groups"]] == [
            json.loads(json.dumps(group)) for group in other["param_groups"]
        ]
        for i, entry in state["state"].items():
            assert all(torch.equal(t, other["state"][i][key]) for key, t in entry.items())
    obs = np.random.default_rng(0).normal(size=(50, 4))
    assert (loaded.predict(obs, True)[0] == agent.predict(obs, True)[0]).all()
    assert torch.equal(loaded.generator.get_state(), agent.generator.get_state())
    loaded.learn(300, progress=False)
    assert loaded.iterations > agent.iterations


def test_every_run_and_every_part_of_a_resumed_run_has_its_own_starts(trained, monkeypatch):
    _, path = trained
    seeds = []

    class Spy(Collector):
        def __init__(self, *arguments, seed, generator):
            seeds.append(seed)
            super().__init__(*arguments, seed=seed, generator=generator)

    monkeypatch.setattr("rl.agent.Collector", Spy)
    agents = [TRPO("CartPole-v1", seed=s, **SMALL) for s in (0, 1)]
    for agent in [*agents, TRPO.load(path)]:
        agent.learn(1, progress=False)
    assert all(abs(a - b) > 100 for a, b in itertools.combinations(seeds, 2))


def test_lacking_optimizer_state_is_refused(trained, tmp_path):
    _, path = trained
    manifest, tensors = checkpoint.read(path)
    kept = {k: t for k, t in tensors.items() if not k.startswith("critic_optimizer.3.")}
    checkpoint.write(tmp_path / "lacking.zip", manifest, kept)
    with pytest.raises(CheckpointError, match="critic_optimizer"):
        TRPO.load(tmp_path / "lacking.zip")


def test_checkpoints_are_as_readable_as_other_files(trained, tmp_path):
    _, path = trained
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_drawing_actions_elsewhere_does_not_change_training():
    plain = TRPO("CartPole-v1", **SMALL).learn(300, progress=False)
    watched = TRPO("CartPole-v1", **SMALL)
    evaluate(watched, "CartPole-v1", 3, deterministic=False)
    watched.learn(300, progress=False)
    assert same(plain, watched)


def test_the_number_of_environments_passed_in_is_the_one_that_is_saved(tmp_path):
    envs = gymnasium.make_vec("CartPole-v1", 3, "sync")
    agent = TRPO(envs, steps_per_update=300)
    assert agent.config.n_envs == 3
    agent.save(tmp_path / "agent.zip")
    with pytest.raises(ValueError, match="does not name its environment: pass env="):
        TRPO.load(tmp_path / "agent.zip")  # its options and wrappers are not those of the id
    assert TRPO.load(tmp_path / "agent.zip", "CartPole-v1").envs.num_envs == 3


def test_a_critic_that_diverges_is_named():
    agent = TRPO("CartPole-v1", critic_lr=1e30, **SMALL)
    with pytest.raises(ValueError, match=r"the critic's loss is .* Lower critic_lr"):
        agent.learn(2000, progress=False)
    assert all(p.isfinite().all() for p in agent.policy.parameters())


def test_loading_into_another_environment(trained):
    _, path = trained
    with pytest.raises(CheckpointError, match="does not fit this agent"):
        TRPO.load(path, env="Acrobot-v1")
    envs = gymnasium.make_vec("CartPole-v1", 4, "sync", max_episode_steps=7)
    loaded = TRPO.load(path, env=envs)
    assert loaded.envs is envs
    with pytest.raises(ValueError, match="the agent trains in"):
        evaluate(loaded, envs, 4)


def test_an_agent_of_a_custom_environment_asks_for_it(tmp_path):
    agent = TRPO(vector(Clock, 4), **SMALL)
    agent.save(tmp_path / "agent.zip")
    with pytest.raises(ValueError, match="pass env="):
        TRPO.load(tmp_path / "agent.zip")
    assert same(agent, TRPO.load(tmp_path / "agent.zip", env=vector(Clock, 4)))


def test_every_truncation_is_refused(trained, tmp_path):
    _, path = trained
    whole, cut = path.read_bytes(), tmp_path / "cut.zip"
    for size in [0, 1, 100, *range(500, len(whole), 997), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.zip is not a complete"):
            TRPO.load(cut)


def test_bit_flips_are_refused_or_harmless(trained, tmp_path):
    """Flips in names or dates of the zip change nothing that is read; all others are refused."""
    agent, path = trained
    whole, flipped = bytearray(path.read_bytes()), tmp_path / "flipped.zip"
    rng, refused = np.random.default_rng(0), 0
    for position in rng.integers(0, len(whole), 200):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        flipped.write_bytes(damaged)
        try:
            assert same(agent, TRPO.load(flipped))
        except CheckpointError:
            refused += 1
    assert refused >= 190


def test_flips_of_the_headers_are_refused_or_harmless(trained, tmp_path):
    agent, path = trained
    whole, flipped = bytearray(path.read_bytes()), tmp_path / "flipped.zip"
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("tensors.safetensors").header_offset
    headers = [*range(45), *range(start, start + 50), *range(len(whole) - 150, len(whole))]
    for position in headers:
        for bit in range(0, 8, 3):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            flipped.write_bytes(damaged)
            try:
                assert same(agent, TRPO.load(flipped))
            except CheckpointError:
                continue


def test_contents_that_do_not_match_their_checksum_are_refused(trained, tmp_path):
    _, path = trained
    with zipfile.ZipFile(path) as archive:
        manifest, tensors = (archive.read(name) for name in archive.namelist())
    changed = tmp_path / "changed.zip"
    with zipfile.ZipFile(changed, "w") as archive:  # a valid zip, with valid CRCs
        archive.writestr("manifest.json", manifest)
        archive.writestr("tensors.safetensors", tensors[:-1] + bytes([tensors[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="do not match its checksum"):
        TRPO.load(changed)
    with zipfile.ZipFile(changed, "w") as archive:
        lacking = {k: v for k, v in json.loads(manifest).items() if k != "num_timesteps"}
        archive.writestr("manifest.json", json.dumps(lacking))
        archive.writestr("tensors.safetensors", tensors)
    with pytest.raises(CheckpointError, match="incomplete: no 'num_timesteps'"):
        TRPO.load(changed)
    for key, value, words in (("version", 99, "version 99"), ("format", "x", "another program")):
        with zipfile.ZipFile(changed, "w") as archive:
            archive.writestr("manifest.json", json.dumps({**json.loads(manifest), key: value}))
            archive.writestr("tensors.safetensors", tensors)
        with pytest.raises(CheckpointError, match=words):
            TRPO.load(changed)


def test_files_of_other_programs_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "theirs.zip")
    (tmp_path / "words.txt").write_text("hello")
    for name in ("theirs.zip", "words.txt"):
        with pytest.raises(CheckpointError, match="another program"):
            TRPO.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        TRPO.load(tmp_path / "absent.zip")


def test_a_failed_save_keeps_the_previous_file(trained, tmp_path, monkeypatch):
    agent, _ = trained
    path = tmp_path / "agent.zip"
    agent.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        agent.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["agent.zip"]


# -- options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"delta": 0.0}, "delta must be a positive"),
        ({"damping": -1.0}, "damping"),
        ({"n_envs": 0}, "n_envs"),
        ({"n_envs": 7}, "does not divide by 7 environments: try 2044 or 2051"),
        ({"steps_per_update": 0}, "steps_per_update"),
        ({"steps_per_update": 8}, "too few for 8 environments: at least 16"),
        ({"steps_per_update": 3}, "try 16"),
        ({"gamma": 1.1}, "gamma"),
        ({"critic_lr": 0.0}, "critic_lr"),
        ({"seed": -1}, "seed"),
        ({"hidden": (0,)}, "hidden"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        TRPO("CartPole-v1", **options)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="no option 'detla': did you mean 'delta'"):
        TRPO("CartPole-v1", detla=0.1)
    with pytest.raises(ValueError, match="no option 'detla': did you mean 'delta'"):
        TRPOConfig.from_dict({"detla": 0.1, "hidden": [4]})
    with pytest.raises(ValueError, match="total_timesteps"):
        TRPO("CartPole-v1", **SMALL).learn(0)


def test_an_environment_that_goes_bad_leaves_the_agent_intact():
    agent = TRPO(vector(lambda: Clock(length=5, poison=np.nan), 4), **SMALL)
    kept = weights(agent)
    with pytest.raises(ValueError, match="nothing was updated"):
        agent.learn(100, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(kept, weights(agent), strict=True))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(10))
def test_cartpole_is_solved_within_thirty_thousand_steps(seed):
    agent = TRPO("CartPole-v1", seed=seed).learn(27_000, progress=False)
    assert agent.num_timesteps <= 30_000
    assert evaluate(agent, "CartPole-v1", 20).mean >= 475
