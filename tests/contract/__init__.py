"""The contract of torch.optim for optimizers that take a closure, in forty checks.

Checks 1 to 30 follow the tests that torch runs its own optimizers through (test/test_optim.py and
``torch.testing._internal.common_optimizers``); 31 to 40 are what trainers, checkpoints and long
runs ask for besides. A check is a function of a :class:`Subject`. It raises ``AssertionError``
where the contract is broken and ``NotApplicable`` where the optimizer does not offer what is
checked and says so. Any other exception breaks the contract too.
"""

from . import construction, hooks, running, saving, stepping
from .construction import construction_errors
from .ours import OURS
from .problem import Check, NotApplicable, Subject
from .schedulers import SCHEDULERS

CHECKS: dict[int, Check] = {
    int(name.removeprefix("check_")): check
    for theme in (construction, saving, hooks, stepping, running)
    for name, check in vars(theme).items()
    if name.startswith("check_")
}

__all__ = ["CHECKS", "OURS", "SCHEDULERS", "Check", "NotApplicable", "Subject"]
__all__ += ["construction_errors"]
