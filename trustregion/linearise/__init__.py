"""Jacobian products of a model at its current parameters, from the graph of its outputs."""

from .base import Linearisation as Linearisation
from .choose import linearise as linearise
from .graph import GraphLinearisation as GraphLinearisation
from .onednn import prefer_onednn as prefer_onednn
from .tape import TapeLinearisation as TapeLinearisation
