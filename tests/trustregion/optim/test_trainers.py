"""The examples under trainers: on the real packages where they are installed, and on stand-ins."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributions import Categorical

import stand_ins
from trustregion import NaturalTrustRegion, NewtonTrustRegion

FOLDER = Path(__file__).parents[3] / "docs" / "examples"

# lightning and accelerate warn of torch's deprecations and of files that they do not need here
pytestmark = pytest.mark.filterwarnings("ignore")


def installed(name, request, monkeypatch):
    """The package of a trainer, or a stand-in in its place."""
    if request.param == "real":
        return pytest.importorskip(name)
    package = getattr(stand_ins, name)()
    monkeypatch.setitem(sys.modules, name, package)
    return package


@pytest.fixture(params=["real", "stand-in"])
def lightning(request, monkeypatch):
    return installed("lightning", request, monkeypatch)


@pytest.fixture(params=["real", "stand-in"])
def accelerate(request, monkeypatch):
    package = installed("accelerate", request, monkeypatch)
    yield package
    if request.param == "real":  # one state a process, which knows one precision
        package.state.AcceleratorState._reset_state(reset_partial_state=True)


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def falls_within_the_ball(rows, epochs):
    losses, kls = [row[0] for row in rows], [row[1] for row in rows]
    assert len(rows) == 2 * epochs
    assert losses[-1] < 0.5 * losses[0]
    assert all(0 < kl <= 0.1 for kl in kls)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_loss_falls_under_lightning(lightning, precision, capfd):
    example = load("lightning_manual")
    falls_within_the_ball(example.main(epochs=5, precision=precision, quiet=True), 5)
    assert "10 steps, loss" in capfd.readouterr().out


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_loss_falls_under_accelerate(accelerate, precision, capfd):
    example = load("accelerate_loop")
    falls_within_the_ball(example.main(epochs=5, precision=precision), 5)
    assert "10 steps, loss" in capfd.readouterr().out


def test_lightning_calls_its_hook_after_every_call_of_the_closure_and_shows_info(lightning):
    example, seen = load("lightning_manual"), []

    class Watched(example.Classifier):
        def on_before_optimizer_step(self, optimizer):
            seen.append(optimizer)

        def training_step(self, batch, index):
            super().training_step(batch, index)
            wrapped = self.optimizers()
            assert isinstance(wrapped, NaturalTrustRegion)
            assert len(seen) == wrapped.info.evaluations
            assert all(optimizer is wrapped.optimizer for optimizer in seen)
            seen.clear()

    loader = torch.utils.data.DataLoader(example.rings(64), batch_size=32)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=2, precision="32-true", **options)
    trainer.fit(Watched(), loader)


@pytest.mark.parametrize("kind", [NaturalTrustRegion, NewtonTrustRegion])
def test_accelerates_scaler_is_refused_in_words_and_moves_nothing(accelerate, kind):
    accelerate.Accelerator(cpu=True)  # accelerate's optimizer needs its state
    model, x = nn.Linear(3, 2), torch.randn(8, 3)
    kept = [p.detach().clone() for p in model.parameters()]
    optimizer, scaler = kind(model.parameters()), torch.amp.GradScaler("cpu")
    wrapped = accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=scaler)

    def closure():
        distribution = Categorical(logits=model(x))
        loss = -distribution.log_prob(torch.zeros(8)).mean()
        return (loss, distribution) if kind is NaturalTrustRegion else loss

    loss = closure()
    scaler.scale(loss[0] if isinstance(loss, tuple) else loss).backward()
    with pytest.raises(RuntimeError, match=r"GradScaler.*bfloat16"):
        wrapped.step(closure)
    assert all(map(torch.equal, model.parameters(), kept))
