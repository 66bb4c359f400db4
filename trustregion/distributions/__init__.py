r"""What a trust region needs of a distribution family: its parameters, its KL, its Fisher.

For a family :math:`p(y | \phi)` with parameter tensors :math:`\phi` (the network's outputs), the
KL of a small change is :math:`\mathrm{KL}(\phi \| \phi + d) = \frac12 d' M(\phi) d + O(d^3)` with
:math:`M` the Fisher information of the family. A :class:`Family` holds both in closed form. Where
the Hessian of a KL is *not* the Fisher, or the KL does not exist, the family is refused by name.

KLs are evaluated in float64 from the parameter tensors, in forms without cancellation: in float32
a KL of 1e-8 is wrong by 10 to 50 % and can be negative, and in float64 the textbook form of one of
1e-12 is wrong in its fourth digit.
"""

from .family import Family
from .family import Tensors as Tensors
from .joint import Joint as Joint
from .prediction import Prediction, Weighted, mean_kl
from .prediction import joint_of as joint_of
from .registry import register_distribution

__all__ = [
    "Family",
    "Prediction",
    "Weighted",
    "mean_kl",
    "register_distribution",
]
