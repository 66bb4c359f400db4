"""Options: what they may be, what is said of others, and how they are kept."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import rl
from agents import ALGORITHMS, every_algorithm
from rl import (
    GAE,
    TRPO,
    AdamFit,
    Config,
    KLPenaltyConfig,
    LBFGSFit,
    MonteCarlo,
    NPGConfig,
    NStep,
    PPOConfig,
    TRPOConfig,
    TrustRegionFit,
    VPGConfig,
)
from rl.config import _ELSEWHERE


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (PPOConfig, {"clip": 0}, "clip must be a positive"),
        (PPOConfig, {"epochs": 0}, "epochs must be at least 1"),
        (PPOConfig, {"final_lr": -1.0}, "final_lr must be finite and not negative"),
        (PPOConfig, {"value_coef": -1.0}, "value_coef must be finite and not negative"),
        (PPOConfig, {"kl_limit": -1.0}, "kl_limit must be a positive"),
        (VPGConfig, {"policy_lr": 0.0}, "policy_lr must be a positive"),
        (NPGConfig, {"step_size": -1.0}, "step_size must be a positive"),
        (NPGConfig, {"delta": 0.0}, "delta must be a positive"),
        (NPGConfig, {"damping": -1.0}, "damping must be finite and not negative"),
        (NPGConfig, {"cg_max_iter": 0}, "cg_max_iter must be at least 1"),
        (KLPenaltyConfig, {"penalty": math.inf}, "penalty must be a positive"),
        (KLPenaltyConfig, {"damping": math.nan}, "damping must be finite"),
        (TRPOConfig, {"delta": 0.0}, "delta must be a positive"),
        (
            TRPOConfig,
            {"delta": torch.tensor(0.01)},
            r"delta must be a number, got tensor",
        ),
        (TRPOConfig, {"final_delta": 0.0}, "final_delta must be a positive"),
        (TRPOConfig, {"curvature_fraction": 0.0}, "curvature_fraction must lie in"),
        (TRPOConfig, {"steps_per_update": 64.5}, "steps_per_update must be a whole number"),
        (TRPOConfig, {"steps_per_update": 0}, "steps_per_update must be at least 1"),
        (TRPOConfig, {"n_envs": 0}, "n_envs must be at least 1"),
        (TRPOConfig, {"gamma": 1.1}, r"gamma must lie in \[0, 1\], got 1.1"),
        (TRPOConfig, {"td_lambda": 2.0}, r"td_lambda must lie in \[0, 1\], got 2.0"),
        (TRPOConfig, {"seed": -1}, "seed must be finite and not negative"),
        (TRPOConfig, {"seed": "3"}, "seed must be a whole number or None, got '3'"),
        (TRPOConfig, {"hidden": 64}, "hidden must be a list, each item a whole number, got 64"),
        (TRPOConfig, {"hidden": (0,)}, r"hidden must be widths of at least 1.*got \(0,\)"),
        (TRPOConfig, {"critic_hidden": (8, -1)}, "critic_hidden must be widths of at least 1"),
        (TRPOConfig, {"activation": "sine"}, "activation must be one of tanh, relu"),
        (TRPOConfig, {"vectorization": "threads"}, "vectorization must be one of auto, sync"),
        (TRPOConfig, {"normalise_rewards": 1}, "normalise_rewards must be true or false, got 1"),
        (TRPOConfig, {"advantages": "gea"}, "advantages must be one of gae, n_step"),
        (TRPOConfig, {"advantages": NStep}, r"advantages must be .*an object such as GAE\(\)"),
        (TRPOConfig, {"advantages": None}, "advantages must be .*or a callable of your own"),
        (TRPOConfig, {"critic_fit": "sgd"}, "critic_fit must be one of adam, lbfgs"),
        (TRPOConfig, {"critic_fit": AdamFit}, r"critic_fit must be .*such as AdamFit\(\)"),
        (TRPOConfig, {"critic_fit": 3}, "critic_fit must be .*got 3"),
    ],
)
def test_options_that_would_train_wrongly_are_refused(config, options, words):
    with pytest.raises(ValueError, match=words):
        config(**options)


def test_options_may_be_numpys_and_torchs():
    config = TRPOConfig(
        n_envs=np.int64(4),
        steps_per_update=256.0,
        hidden=np.array([32, 16]),
        delta=np.float32(0.5),
        normalise_observations=np.bool_(True),
        device=torch.device("cpu"),
    )
    assert config == TRPOConfig(
        n_envs=4,
        steps_per_update=256,
        hidden=(32, 16),
        delta=0.5,
        normalise_observations=True,
        device="cpu",
    )
    assert json.dumps(config.to_dict())  # they are plain values


def test_no_seed_draws_one_and_keeps_it():
    one, other = TRPOConfig(seed=None), TRPOConfig(seed=None)
    assert isinstance(one.seed, int)
    assert one.seed != other.seed
    assert replace(one, delta=0.5).seed == one.seed
    agents = [TRPO("CartPole-v1", seed=s, steps_per_update=64) for s in (None, None)]
    assert agents[0].config.seed != agents[1].config.seed
    assert TRPOConfig().seed == 0


@pytest.mark.parametrize(("found", "expected"), [(None, "cpu"), (torch.device("cuda"), "cuda")])
def test_a_device_may_be_found(found, expected, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: found)
    assert TRPOConfig(device="auto").device == expected


# -- names


@pytest.mark.parametrize("name", _ELSEWHERE)
def test_names_of_other_libraries_are_answered_with_ours(name):
    answers = 0
    for algorithm in ALGORITHMS:
        config = algorithm.config_class
        if name in config.__dataclass_fields__:
            continue  # PPO has an option of that name
        answers += 1
        with pytest.raises(ValueError, match=f"{config.__name__} has no option '{name}'") as caught:
            config.from_dict({name: 1})
        assert str(caught.value).endswith(f": here it is {_ELSEWHERE[name]}")
    assert answers


def test_what_the_answers_name_is_there():
    """Each names options of some algorithm, or parts of the package."""
    options = {f for a in ALGORITHMS for f in a.config_class.__dataclass_fields__}
    known = options | set(rl.__all__)
    for name, answer in _ELSEWHERE.items():
        named = set(re.findall(r"\w+", answer)) - {name}
        assert named & (known | {"nothing"}), name
        assert {word for word in named if "_" in word} <= known, name


@pytest.mark.parametrize(
    ("config", "name", "hint"),
    [
        (TRPOConfig, "detla", r"did you mean 'delta'\?"),
        (TRPOConfig, "steps_per_updates", r"did you mean 'steps_per_update'\?"),
        (TRPOConfig, "xyz", "There are seed, n_envs,"),
    ],
)
def test_unknown_names_get_the_nearest(config, name, hint):
    with pytest.raises(ValueError, match=f"{config.__name__} has no option '{name}'.*{hint}"):
        config.from_dict({name: 0.1, "hidden": [4]})


# -- as a dict


@every_algorithm
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"advantages": GAE(0.5), "critic_fit": AdamFit(lr=0.1, epochs=2)},
        {"advantages": NStep(7), "critic_fit": LBFGSFit(3), "td_lambda": 0.25},
        {"advantages": MonteCarlo(), "critic_fit": TrustRegionFit(delta=0.3)},
        {"hidden": (), "critic_hidden": (3, 4), "device": "cpu:0", "seed": 2**40},
    ],
)
def test_options_come_back_from_json(algorithm, options):
    config = algorithm.config_class(**options)
    text = json.dumps(config.to_dict())
    again = algorithm.config_class.from_dict(json.loads(text))
    assert again == config
    assert again.to_dict() == config.to_dict()


def own_advantages(path, values, gamma):
    raise NotImplementedError


class OwnFit:
    def __call__(self, *arguments):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("option", "own", "named"),
    [
        ("advantages", own_advantages, "own_advantages"),
        ("critic_fit", OwnFit(), "OwnFit"),
        ("critic_fit", type("Steeper", (AdamFit,), {})(), "Steeper"),
    ],
)
def test_objects_of_ones_own_are_named_and_asked_for(option, own, named):
    config = TRPOConfig(**{option: own})
    assert getattr(config, option) is own
    kept = json.loads(json.dumps(config.to_dict()))
    with pytest.raises(ValueError, match=f"{option} was an object of your own, {named}.*{option}="):
        TRPOConfig.from_dict(kept)
    assert getattr(TRPOConfig.from_dict(kept | {option: own}), option) is own


def test_configs_are_frozen_and_have_no_positional_options():
    with pytest.raises(AttributeError):
        TRPOConfig().delta = 3.0
    with pytest.raises(TypeError):
        Config(3)
