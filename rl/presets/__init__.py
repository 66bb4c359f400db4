"""Options to train an algorithm with in an environment, by environment id."""

from .loading import Preset as Preset
from .loading import load_preset as load_preset
