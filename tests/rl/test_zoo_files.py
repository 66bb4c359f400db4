"""Hyperparameter files of the RL zoo, translated entry by entry."""

import tracemalloc
from itertools import pairwise

import gymnasium
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl import PPO, AdamFit, Preset, load_preset
from rl.options import convert
from rl.presets.zoo import parse_literal

ZOO = """
atari:
  policy: 'CnnPolicy'
  frame_stack: 4
default:
  n_timesteps: !!float 1e6
  policy: 'MlpPolicy'
MountainCarContinuous-v0: &mujoco
  normalize: true
  n_envs: 2
  n_timesteps: !!float 1e6
  policy: 'MlpPolicy'
  batch_size: 128
  n_steps: 1024
  gamma: 0.99
  gae_lambda: 0.95
  sub_sampling_factor: 1
  cg_max_steps: 25
  cg_damping: 0.1
  n_critic_updates: 20
  learning_rate: !!float 1e-3
Pendulum-v1:
  <<: *mujoco
  target_kl: 0.04
  gamma: 0.9
  policy_kwargs: "dict(activation_fn=nn.Tanh, ortho_init=True,
                       net_arch=dict(pi=[256, 128], vf=[256, 128])
                       )"
"""


def test_a_zoo_file_for_trpo_by_hand(tmp_path):
    file = tmp_path / "trpo.yml"
    file.write_text(ZOO)
    ant = {
        "normalise_observations": True,
        "normalise_rewards": True,
        "n_envs": 2,
        "steps_per_update": 2048,
        "critic_fit": AdamFit(lr=0.001, epochs=20, batch_size=128),
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "cg_max_iter": 25,
        "damping": 0.1,
    }
    assert load_preset("trpo", "MountainCarContinuous-v0", file) == Preset(ant, 1_000_000)
    pendulum = ant | {"gamma": 0.9, "delta": 0.04, "hidden": (256, 128), "activation": "tanh"}
    assert load_preset("trpo", "Pendulum-v1", str(file)) == Preset(pendulum, 1_000_000)
    assert load_preset("trpo", "CartPole-v1", file) == Preset({}, 1_000_000)  # the default


def test_a_zoo_file_for_ppo_by_hand(load):
    preset = load(
        """
CartPole-v1:
  n_envs: 8
  n_timesteps: !!float 1e5
  policy: 'MlpPolicy'
  n_steps: 32
  batch_size: 256
  gae_lambda: 0.8
  gamma: 0.98
  n_epochs: 20
  ent_coef: 0.01
  vf_coef: 0.25
  max_grad_norm: 2
  learning_rate: lin_0.001
  clip_range: 0.1
  target_kl: 0.02
""",
        "ppo",
    )
    options = {
        "n_envs": 8,
        "steps_per_update": 256,
        "batch_size": 256,
        "gae_lambda": 0.8,
        "gamma": 0.98,
        "epochs": 20,
        "entropy_coef": 0.01,
        "value_coef": 0.25,
        "max_grad_norm": 2.0,
        "lr": 0.001,
        "final_lr": 0.0,
        "clip": 0.1,
        "kl_limit": pytest.approx(0.03),
    }
    assert preset == Preset(options, 100_000)
    PPO("CartPole-v1", **preset.options).envs.close()


@pytest.mark.parametrize(
    ("algorithm", "entry", "options"),
    [
        ("trpo", {"n_steps": 512}, {"n_envs": 1, "steps_per_update": 512}),  # the zoo's default
        ("trpo", {"n_steps": 512, "steps_per_update": 64}, {"n_envs": 1, "steps_per_update": 64}),
        ("ppo", {"learning_rate": "lin_3e-4"}, {"lr": 3e-4, "final_lr": 0.0}),
        ("ppo", {"learning_rate": 3e-4}, {"lr": 3e-4}),
        ("ppo", {"target_kl": None}, {"kl_limit": None}),
        ("kl_penalty", {"target_kl": 0.01}, {"kl_target": 0.01}),
        (
            "trpo",
            {"normalize": False},
            {"normalise_observations": False, "normalise_rewards": False},
        ),
        (
            "trpo",
            {"normalize": "{'norm_obs': False, 'norm_reward': True}"},
            {"normalise_observations": False, "normalise_rewards": True},
        ),
        (
            "trpo",
            {"normalize": {"norm_reward": False}},
            {"normalise_observations": True, "normalise_rewards": False},
        ),
        ("trpo", {"policy_kwargs": {"net_arch": [32]}}, {"hidden": (32,)}),
        ("trpo", {"policy_kwargs": "dict(net_arch=[])"}, {"hidden": ()}),
        ("trpo", {"policy_kwargs": "dict(net_arch=[dict(pi=[8], vf=[8])])"}, {"hidden": (8,)}),
        ("trpo", {"policy_kwargs": {"activation_fn": "torch.nn.ReLU"}}, {"activation": "relu"}),
        (
            "trpo",
            {"policy_kwargs": "dict(net_arch=dict(pi=[1], vf=[2]))"},
            {"hidden": (1,), "critic_hidden": (2,)},
        ),
        ("trpo", {"use_sde": False, "sde_sample_freq": -1, "frame_stack": 1}, {}),
        ("trpo", {"env_wrapper": None}, {}),
        ("trpo", {"delta": "1e-3", "n_envs": "4", "td_lambda": "9e-1"}, None),
    ],
)
def test_single_keys(load, algorithm, entry, options):
    options = options if options is not None else {"delta": 1e-3, "n_envs": 4, "td_lambda": 0.9}
    assert load(entry, algorithm).options == options


@pytest.mark.parametrize(
    ("space", "factor"),
    [
        (gymnasium.spaces.Box(-1, 1, (2, 3)), 6),
        (gymnasium.spaces.MultiBinary(4), 4),
        (gymnasium.spaces.MultiDiscrete([2, 3, 4]), 1),
        (gymnasium.spaces.Discrete(5), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_target_kl_is_of_each_component_in_trpo(load, monkeypatch, space, factor):
    made = []

    class Envs:
        single_action_space = space

        def close(self):
            made.append(self)

    monkeypatch.setattr("rl.presets.zoo.make_envs", lambda *_: Envs())
    assert load({"target_kl": 0.01}).options["delta"] == pytest.approx(0.01 * factor)
    assert len(made) == 1  # and closed
    assert load({"target_kl": 0.01}, "ppo").options["kl_limit"] == pytest.approx(0.015)
    assert len(made) == 1
    assert load({"cg_damping": 0.1}).options["damping"] == pytest.approx(0.1 * factor)


def test_numbers_without_a_point_are_numbers(load):
    preset = load("CartPole-v1: {damping: 1e-3, n_envs: 1e0, total_timesteps: 1e5, delta: 1e-2}")
    assert preset == Preset({"damping": 0.001, "n_envs": 1, "delta": 0.01}, 100_000)
    assert type(preset.options["n_envs"]) is int


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_and_its_string_are_the_same(x):
    if abs(x) < 1e300:
        assert convert("x", float, str(x), text=True) == convert("x", float, x) == float(x)
    if isinstance(x, int):
        assert convert("x", int, str(x), text=True) == convert("x", int, x) == x
    elif not x.is_integer():
        with pytest.raises(ValueError, match="x must be a whole number, got"):
            convert("x", int, str(x), text=True)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


NESTED = st.recursive(
    SCALARS.filter(lambda x: abs(x) != float("inf") if isinstance(x, float) else True),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(NESTED)
def test_literals_come_back(value):
    assert parse_literal("x", repr(value)) == value


@pytest.mark.parametrize(
    "text",
    [
        "f(1)",
        "dict([1])",
        "dict(**a)",
        "{**a}",
        "[i for i in a]",
        "1 + 1",
        "",
        "a b",
        "-x",
        "-" * 10**5 + "1",
        "(" * 10**4 + "1" + ")" * 10**4,
        "a" + ".b" * 10**5,
    ],
)
def test_what_is_no_literal_is_refused_and_never_run(text):
    with pytest.raises(ValueError, match="x must be a mapping, or a string such as"):
        parse_literal("x", text)


@pytest.mark.parametrize(
    ("algorithm", "entry", "words"),
    [
        ("trpo", {"n_envs": "eight"}, "n_envs must be a whole number, got 'eight'"),
        ("trpo", {"n_envs": True}, "n_envs must be a whole number, got True"),
        ("trpo", {"n_envs": 2.5}, "n_envs must be a whole number, got 2.5"),
        ("trpo", {"n_envs": float("inf")}, "n_envs must be a whole number, got inf"),
        ("trpo", {"gamma": None}, "gamma must be a number, got None"),
        ("trpo", {"gamma": 2}, "gamma must lie in [0, 1], got 2"),
        ("trpo", {"hidden": 64}, "hidden must be a list, each item a whole number, got 64"),
        ("trpo", {"hidden": [64, "x"]}, "got [64, 'x']"),
        ("trpo", {"td_lambda": "x"}, "td_lambda must be a number or None, got 'x'"),
        ("trpo", {"squash_actions": "true"}, "squash_actions must be true or false, got 'true'"),
        ("trpo", {"critic_fit": "sgd"}, "critic_fit must be one of adam, lbfgs, trust_region, got"),
        ("trpo", {"n_timesteps": 0}, "total_timesteps must be at least 1, got 0"),
        ("trpo", {"n_steps": "x"}, "n_steps must be a whole number, got 'x'"),
        ("trpo", {"cg_dampign": 1}, "no option 'cg_dampign': did you mean 'cg_damping'?"),
        ("trpo", {"gama": 1}, "no option 'gama': did you mean 'gamma'?"),
        ("trpo", {"qqqqqq": 1}, "trpo has no option 'qqqqqq': there are seed, n_envs"),
        ("trpo", {3: 1}, "trpo has no option 3"),
        ("trpo", {"clip_range": 0.2}, "trpo has no option 'clip_range'"),
        ("ppo", {"cg_damping": 0.1}, "ppo has no option 'cg_damping'"),
        ("vpg", {"target_kl": 0.1}, "vpg has no option 'target_kl'"),
        ("trpo", {"learning_rate": "lin_1e-3"}, "critic_fit.lr of trpo has none: give a number"),
        ("ppo", {"clip_range": "lin_0.2"}, "clip of ppo has none: give a number"),
        ("ppo", {"learning_rate": "lin_x"}, "learning_rate must be a number, got 'x'"),
        ("trpo", {"use_sde": True}, "use_sde=True asks for what is not there: deleting the line"),
        ("trpo", {"sde_sample_freq": 4}, "sde_sample_freq=4 asks"),
        ("trpo", {"sub_sampling_factor": 2}, "sub_sampling_factor=2 asks"),
        ("trpo", {"frame_stack": 4}, "frame_stack=4 asks"),
        ("trpo", {"env_wrapper": ["a.B"]}, "env_wrapper=['a.B'] asks"),
        ("trpo", {"policy": "CnnPolicy"}, "policy must be MlpPolicy, got 'CnnPolicy': deleting"),
        ("trpo", {"normalize": "yes please"}, "normalize must be a mapping, or a string such as"),
        ("trpo", {"normalize": {"clip_obs": 5}}, "a mapping of norm_obs and norm_reward, got"),
        ("trpo", {"normalize": {"norm_obs": 1}}, "norm_obs must be true or false, got 1"),
        ("trpo", {"policy_kwargs": "f(x)"}, "policy_kwargs must be a mapping, or a string"),
        ("trpo", {"policy_kwargs": [1]}, "policy_kwargs must be a mapping, got [1]"),
        (
            "trpo",
            {"policy_kwargs": {"activation_fn": "nn.Mish"}},
            "one of tanh, relu, elu, gelu, silu, got",
        ),
        (
            "trpo",
            {"policy_kwargs": "dict(ortho_init=False)"},
            "ortho_init of policy_kwargs must be",
        ),
        (
            "trpo",
            {"policy_kwargs": "dict(log_std_init=-2)"},
            "log_std_init of policy_kwargs is not",
        ),
        (
            "trpo",
            {"policy_kwargs": "dict(net_arch=dict(pi=[1]))"},
            "widths of policy (pi) and critic (vf)",
        ),
        ("trpo", {"critic_fit": "adam:epoch=3"}, "no field 'epoch=3': did you mean epochs=?"),
        ("trpo", {"critic_fit": 3}, "critic_fit must be one of adam, lbfgs, trust_region, an"),
        (
            "trpo",
            {"policy_kwargs": "dict(net_arch=64)"},
            "net_arch of policy_kwargs must be a list",
        ),
    ],
)
def test_a_bad_entry_is_named_with_file_and_environment(load, algorithm, entry, words):
    with pytest.raises(ValueError, match=r"my\.yml, CartPole-v1: ") as caught:
        load(entry, algorithm)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_target_kl_needs_an_environment_that_can_be_made(load):
    with pytest.raises(ValueError, match=r"my\.yml, NoSuch-v1: cannot make environment"):
        load({"target_kl": 0.1}, env_id="NoSuch-v1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "my.yml is not YAML: while parsing"),
        ("a: !!python/name:os.system", "my.yml is not YAML: could not determine a constructor"),
        ("- CartPole-v1", "my.yml must map environment ids to options, got list"),
        ("", "my.yml must map environment ids to options, got NoneType"),
        ("{}", "my.yml: no entry for 'CartPole-v1'; the nearest are none"),
        ("CartPole-v1:", "CartPole-v1: an entry must map options to values, got None"),
        ("CartPole-v0: {}", "no entry for 'CartPole-v1'; the nearest are CartPole-v0"),
    ],
)
def test_a_bad_file_says_what_is_wrong(load, text, words):
    with pytest.raises(ValueError, match=r"my\.yml") as caught:
        load(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


NINE = ", ".join(["*{0}"] * 9)
LAUGHS = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{new}: &{new} {{k: [{NINE.format(old)}]}}\n" for old, new in pairwise("abcdefghij")
)
MERGED = LAUGHS.replace("k:", "<<:")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "my.yml refers to its own entries until it has over 262,144 bytes"),
        (MERGED, "my.yml refers to its own entries until it has over 262,144 bytes"),
        ("CartPole-v1: &a {hidden: [*a]}", "my.yml refers to its own entries until"),
        ("a: &a [" + "x" * 2000 + "]\nb: [" + "*a, " * 1000 + "]", "my.yml refers to its own"),
        ("CartPole-v1: " + "[" * 500 + "]" * 500, "my.yml is nested too deeply"),
        ("CartPole-v1: " + "{a: " * 500 + "}" * 500, "my.yml is nested too deeply"),
        ("#" * 2**18 + "#", "my.yml has 262,145 bytes, and presets of 262,144 are read"),
    ],
    ids=["sequences", "merges", "itself", "a long scalar", "lists", "mappings", "comment"],
)
def test_a_file_that_is_endless_is_refused_in_little_memory(load, text, words):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=words):
            load(text)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such file.*absent\.yml"):
        load_preset("trpo", "CartPole-v1", tmp_path / "absent.yml")
    (tmp_path / "binary").write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match="binary is not YAML"):
        load_preset("trpo", "CartPole-v1", tmp_path / "binary")
