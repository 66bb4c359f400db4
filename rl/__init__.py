"""Trust-region policy optimization for gymnasium environments, on top of ``trustregion``.

>>> from rl import TRPO, evaluate
>>> agent = TRPO("CartPole-v1", steps_per_update=256).learn(256, progress=False)
>>> evaluate(agent, "CartPole-v1", episodes=2).mean > 0
True

"""

import importlib.util as _util
import inspect as _inspect

if _util.find_spec("gymnasium") is None:
    raise ModuleNotFoundError(
        'rl needs more packages than trustregion: pip install "torch-trustregion[rl]"',
        name="gymnasium",
    )

from .agent import Agent as Agent
from .algorithms import load as load
from .checkpoint import CheckpointError as CheckpointError
from .config import Config as Config
from .envs.faults import EnvironmentFault as EnvironmentFault
from .envs.layout import ObservationLayout as ObservationLayout
from .envs.make import make_envs as make_envs
from .envs.stepper import Stepper as Stepper
from .envs.stepper import Transition as Transition
from .experience.advantages import GAE as GAE
from .experience.advantages import Advantages as Advantages
from .experience.advantages import MonteCarlo as MonteCarlo
from .experience.advantages import NStep as NStep
from .experience.advantages import gae as gae
from .experience.advantages import n_step as n_step
from .experience.advantages import td_lambda as td_lambda
from .experience.collector import Collector as Collector
from .experience.collector import EnvCollector as EnvCollector
from .experience.collector import Episodes as Episodes
from .experience.estimates import Estimates as Estimates
from .experience.path import Path as Path
from .experience.path import Values as Values
from .experience.surrogate import Objective as Objective
from .experience.surrogate import clipped_surrogate as clipped_surrogate
from .experience.surrogate import normalise as normalise
from .experience.surrogate import surrogate as surrogate
from .export import export_policy as export_policy
from .export import export_weights as export_weights
from .fits import AdamFit as AdamFit
from .fits import CriticFit as CriticFit
from .fits import LBFGSFit as LBFGSFit
from .fits import Regression as Regression
from .fits import TrustRegionFit as TrustRegionFit
from .kl_penalty import KLPenalty as KLPenalty
from .kl_penalty import KLPenaltyConfig as KLPenaltyConfig
from .networks.critic import Critic as Critic
from .networks.encoders import Encoder as Encoder
from .networks.heads import ActionHead as ActionHead
from .networks.heads import make_head as make_head
from .networks.policy import HeadPolicy as HeadPolicy
from .networks.policy import Policy as Policy
from .npg import NPG as NPG
from .npg import NPGConfig as NPGConfig
from .ppo import PPO as PPO
from .ppo import PPOConfig as PPOConfig
from .presets import Preset as Preset
from .presets import load_preset as load_preset
from .reports import Callback as Callback
from .reports import Log as Log
from .run.callbacks import EvaluateBest as EvaluateBest
from .run.callbacks import Every as Every
from .run.callbacks import SaveBest as SaveBest
from .run.callbacks import SaveCheckpoint as SaveCheckpoint
from .run.callbacks import StopOnReward as StopOnReward
from .run.evaluation import Evaluation as Evaluation
from .run.evaluation import evaluate as evaluate
from .run.logs import CSVLog as CSVLog
from .run.logs import Table as Table
from .run.logs import TensorBoardLog as TensorBoardLog
from .run.plots import plot_learning_curve as plot_learning_curve
from .run.video import record as record
from .trpo import TRPO as TRPO
from .trpo import TRPOConfig as TRPOConfig
from .vpg import VPG as VPG
from .vpg import VPGConfig as VPGConfig

__all__ = [name for name, x in globals().items() if name[0] != "_" and not _inspect.ismodule(x)]  # pyright: ignore[reportUnsupportedDunderAll] # all of the above
