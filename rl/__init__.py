"""Trust-region policy optimization for gymnasium environments, on top of ``trustregion``.

>>> from rl import TRPO, evaluate
>>> agent = TRPO("CartPole-v1", steps_per_update=256).learn(256, progress=False)
>>> evaluate(agent, "CartPole-v1", episodes=2).mean > 0
True

"""

import importlib.util as _util

if _util.find_spec("gymnasium") is None:
    raise ModuleNotFoundError(
        'rl needs more packages than trustregion: pip install "torch-trustregion[rl]"',
        name="gymnasium",
    )

from .advantages import gae as gae
from .advantages import n_step as n_step
from .advantages import td_lambda as td_lambda
from .agent import Agent as Agent
from .algorithms import load as load
from .callbacks import EvaluateBest as EvaluateBest
from .callbacks import Every as Every
from .callbacks import SaveCheckpoint as SaveCheckpoint
from .callbacks import StopOnReward as StopOnReward
from .checkpoint import CheckpointError as CheckpointError
from .config import Config as Config
from .environments import Stepper as Stepper
from .environments import make_envs as make_envs
from .evaluation import Evaluation as Evaluation
from .evaluation import evaluate as evaluate
from .kl_penalty import KLPenalty as KLPenalty
from .kl_penalty import KLPenaltyConfig as KLPenaltyConfig
from .npg import NPG as NPG
from .npg import NPGConfig as NPGConfig
from .objectives import clipped_surrogate as clipped_surrogate
from .objectives import surrogate as surrogate
from .policies import HeadPolicy as HeadPolicy
from .policies import Policy as Policy
from .ppo import PPO as PPO
from .ppo import PPOConfig as PPOConfig
from .presets import Preset as Preset
from .presets import load_preset as load_preset
from .reporting import CSVLog as CSVLog
from .reporting import Table as Table
from .reporting import TensorBoardLog as TensorBoardLog
from .rollout import Collector as Collector
from .rollout import Rollout as Rollout
from .spaces import ObservationLayout as ObservationLayout
from .trpo import TRPO as TRPO
from .trpo import TRPOConfig as TRPOConfig
from .value import Critic as Critic
from .vpg import VPG as VPG
from .vpg import VPGConfig as VPGConfig

__all__ = [
    # algorithms
    "Agent",
    "load",
    "TRPO",
    "NPG",
    "KLPenalty",
    "PPO",
    "VPG",
    "Config",
    "TRPOConfig",
    "NPGConfig",
    "KLPenaltyConfig",
    "PPOConfig",
    "VPGConfig",
    "Preset",
    "load_preset",
    # running
    "evaluate",
    "Evaluation",
    "CheckpointError",
    # callbacks and loggers
    "Every",
    "EvaluateBest",
    "SaveCheckpoint",
    "StopOnReward",
    "Table",
    "CSVLog",
    "TensorBoardLog",
    # parts
    "gae",
    "n_step",
    "td_lambda",
    "surrogate",
    "clipped_surrogate",
    "make_envs",
    "Collector",
    "Rollout",
    "Policy",
    "HeadPolicy",
    "ObservationLayout",
    "Stepper",
    "Critic",
]
