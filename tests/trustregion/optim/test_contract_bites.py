"""Each of the forty checks fails for an optimizer that is broken in what the check is about."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import distributions as td
from torch.optim import Optimizer

from contract import CHECKS, OURS, NotApplicable, Subject
from trustregion import NaturalTrustRegion

NaturalTrustRegion([torch.zeros(1, requires_grad=True)])  # the first one gives step its hooks
RAW = inspect.unwrap(NaturalTrustRegion.step)  # without hooks, which a subclass would fire twice


def broken(**members):
    """NaturalTrustRegion with other methods."""
    return type("Broken", (NaturalTrustRegion,), members)


def stepping(step):
    return broken(step=torch.no_grad()(step))


def after(action):
    """NaturalTrustRegion that does something more at the end of a step."""

    def step(self, closure=None):
        loss = RAW(self, closure)
        for p in params(self):
            action(self, p)
        return loss

    return stepping(step)


def params(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def nudge(_, p):
    p.add_(1e-3)


def moves_what_is_frozen(self, closure=None):
    if any(p.requires_grad for p in params(self)):
        return RAW(self, closure)
    for p in params(self):
        p.add_(1.0)
    return None


def numbers_its_groups(self):
    state = NaturalTrustRegion.state_dict(self)
    groups = [{**group, "position": i} for i, group in enumerate(state["param_groups"])]
    return {**state, "param_groups": groups}


def forgets_names(self, state):
    NaturalTrustRegion.load_state_dict(self, state)
    for group in self.param_groups:
        group.pop("param_names", None)


def writes_into_what_it_loads(self, state):
    state["param_groups"][0]["lr"] = 0.7
    NaturalTrustRegion.load_state_dict(self, state)


def halves_its_counts(self, state):
    NaturalTrustRegion.load_state_dict(self, state)
    for entry in self.state.values():
        entry["step"] = entry["step"].half()


def drifts(self, p):
    self._hidden = getattr(self, "_hidden", 0) + 1  # not in its state_dict
    p.add_(1e-3 * self._hidden)


def changes_type(self, closure=None):
    loss = RAW(self, closure)
    return loss if self.info.accepted else loss.item()


def forms_a_matrix(self, closure=None):
    n = sum(p.numel() for p in params(self))
    torch.empty(n, n)
    return RAW(self, closure)


def does_nothing_compiled(self, closure=None):
    return None if torch.compiler.is_compiling() else RAW(self, closure)


def moves_the_frozen(_, p):
    if not p.requires_grad:
        p.add_(1e-3)


def moves_without_closure(self, closure=None):
    if closure is None:
        for p in params(self):
            p.add_(1.0)
    return RAW(self, closure)


def leaves_inference_mode(self, closure=None):
    with torch.inference_mode(False):
        return RAW(self, closure)


def leaves_the_trial(self, closure=None):
    try:
        return RAW(self, closure)
    except BaseException:
        for p in params(self):
            p.add_(1e-3)
        raise


def keeps_a_graph(self, closure=None):
    with torch.enable_grad():
        loss, _ = closure()
    self._kept = [*getattr(self, "_kept", []), loss]
    return RAW(self, closure)


def keeps_copies(self, p):
    self._kept = [*getattr(self, "_kept", []), p.repeat(2)]


def refuses_without_a_word(params, **options):
    params = list(params)
    if len({p.dtype for p in params}) > 1 or any(p.is_complex() for p in params):
        raise TypeError("no")
    return NaturalTrustRegion(params, **options)


def no_handle(self, hook, *, prepend=False):
    return SimpleNamespace(remove=lambda: None)


def appends(self, hook, prepend=False):
    return NaturalTrustRegion.register_load_state_dict_pre_hook(self, hook)


BASE = {"__getstate__": Optimizer.__getstate__}
TWICE = broken(step=lambda self, closure=None: NaturalTrustRegion.step(self, closure))

BROKEN = {
    1: lambda p, **o: NaturalTrustRegion([p] if isinstance(p, torch.Tensor) else p, **o),
    2: after(lambda _, p: p.mul_(1.5)),
    3: after(nudge),
    4: lambda p, lr=1.0, **o: NaturalTrustRegion(p, lr=float(lr), **o),
    5: refuses_without_a_word,
    6: refuses_without_a_word,
    7: stepping(moves_what_is_frozen),
    8: after(nudge),
    9: broken(__repr__=lambda _: "an optimizer"),
    10: after(drifts),
    11: broken(state_dict=numbers_its_groups),
    12: broken(__setstate__=Optimizer.__setstate__),
    13: broken(load_state_dict=forgets_names),
    14: broken(state_dict=lambda self: {**NaturalTrustRegion.state_dict(self), "own": Subject}),
    15: after(lambda self, p: self.state[p]["step"].add(0)),
    16: broken(load_state_dict=writes_into_what_it_loads),
    17: TWICE,
    18: broken(register_step_pre_hook=no_handle),
    19: TWICE,
    20: broken(register_state_dict_post_hook=no_handle),
    21: broken(register_load_state_dict_pre_hook=appends),
    22: broken(register_load_state_dict_post_hook=no_handle),
    23: broken(**BASE),
    24: stepping(changes_type),
    25: refuses_without_a_word,
    26: after(lambda self, p: self.state[p].clear()),
    27: stepping(forms_a_matrix),
    28: stepping(does_nothing_compiled),
    29: after(lambda self, _: self.param_groups[0].update(lr=0.5)),
    30: after(moves_the_frozen),
    31: broken(**BASE),
    32: stepping(moves_without_closure),
    33: broken(load_state_dict=halves_its_counts),
    34: broken(_refuse_scaler=lambda _: None),
    35: stepping(leaves_inference_mode),
    36: stepping(leaves_the_trial),
    37: after(lambda *_: torch.rand(1)),
    38: after(lambda _, p: setattr(p, "grad", torch.zeros_like(p))),
    39: after(keeps_copies),
    40: stepping(keeps_a_graph),
}


@pytest.fixture(autouse=True)
def validation():
    """Torch's default, which torch.compile turns off for the rest of the process."""
    before = td.Distribution._validate_args
    yield
    td.Distribution.set_default_validate_args(before)


def test_every_check_is_tried():
    assert list(BROKEN) == list(CHECKS)


@pytest.mark.parametrize("number", BROKEN)
def test_it_bites(number):
    ours = OURS["NaturalTrustRegion"]
    with pytest.raises(Exception) as caught:  # noqa: PT011 # which one is the check's own matter
        CHECKS[number](Subject(BROKEN[number], ours.closure))
    assert not isinstance(caught.value, NotApplicable)
