r"""Distribution families: their parameters, their KL divergence and their Fisher matrix.

For a family :math:`p(y | \phi)` with parameter tensors :math:`\phi` (the network's outputs), the
KL of a small change is :math:`\mathrm{KL}(\phi \| \phi + d) = \frac12 d' M(\phi) d + O(d^3)`, where
:math:`M` is the Fisher matrix of the family. A :class:`Family` holds both in closed form. A family
is refused by name if the Hessian of its KL is *not* the Fisher matrix, or if its KL does not exist.

KLs are evaluated in float64 from the parameter tensors, in forms without cancellation. In float32
a KL of 1e-8 has an error of 10 to 50 % and can be negative; in float64 the textbook form of a KL of
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
