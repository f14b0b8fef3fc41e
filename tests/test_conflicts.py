from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gradalign import conflicts
from gradalign._errors import DataError
from gradalign.config import TrainConfig
from gradalign.report import Run


def make_views(count=4):
    generator = torch.Generator().manual_seed(0)
    views = []
    for _ in range(count):
        clean = torch.randn(6, 5, generator=generator)
        views.append(
            (clean, clean + torch.randn(6, 5, generator=generator), torch.randint(0, 2, (6,), generator=generator))
        )
    return views


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def flat(model, view, labels, layer=None):
    module = model if layer is None else model.get_submodule(layer)
    loss = nn.functional.cross_entropy(model(view), labels)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))]).double()


def test_cosines_are_those_of_the_flattened_gradients(model):
    views = make_views()
    found = conflicts.layer_cosines(model, views, nn.functional.cross_entropy)
    assert found.names == ["0", "2", "4"]
    assert found.sizes == [24, 15, 8]
    for step, (clean, augmented, labels) in enumerate(views):
        for column, layer in enumerate([*found.names, None]):
            a, b = (flat(model, view, labels, layer) for view in (clean, augmented))
            value = found.whole[step] if layer is None else found.layers[step, column]
            assert value == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-6)


def test_measuring_leaves_weights_and_grads_alone(model):
    before = [p.clone() for p in model.parameters()]
    conflicts.layer_cosines(model, make_views(), nn.functional.cross_entropy)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))


def test_with_an_optimizer_it_trains_on_the_mean_loss(model):
    twin = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    twin.load_state_dict(model.state_dict())
    views = make_views()
    conflicts.layer_cosines(
        model, views, nn.functional.cross_entropy, optimizer=torch.optim.SGD(model.parameters(), lr=0.5)
    )
    plain = torch.optim.SGD(twin.parameters(), lr=0.5)
    for clean, augmented, labels in views:
        plain.zero_grad()
        sum(nn.functional.cross_entropy(twin(view), labels) / 2 for view in (clean, augmented)).backward()
        plain.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_unused_and_frozen_layers(model):
    model[0].requires_grad_(False)

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = model, nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    found = conflicts.layer_cosines(Padded(), make_views(), nn.functional.cross_entropy)
    assert found.names == ["used.2", "used.4", "spare"]
    assert np.isnan(found.layers[:, 2]).all()
    assert np.isnan(found.shares()[2])
    assert np.isfinite(found.layers[:, :2]).all()
    assert np.isfinite(found.whole).all()


def test_no_conflict_is_said_to_be_none():
    def found(*shares):
        cosines = np.where(np.arange(10)[:, None] < 10 * np.array(shares), -0.5, 0.5)
        return conflicts.LayerCosines(["in", "out"], [1, 1], cosines, np.full(10, 0.5))

    calm = conflicts.summary(conflicts.Analysis([], {"calm": found(0.0, 0.0)}))
    assert calm.splitlines()[1:] == ["  no step in conflict in any of its layers"]
    some = conflicts.summary(conflicts.Analysis([], {"some": found(0.0, 0.1)}))
    assert some.splitlines()[1] == "  most in conflict:  out 10.0%, in 0.0%"


def test_the_summary_tells_early_from_late_and_most_from_least():
    whole = np.array([-1, -1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    layers = np.stack([np.where(np.arange(8) < share, -0.5, 0.5) for share in (1, 4)] + [np.full(8, np.nan)], 1)
    measured = {
        "long": conflicts.LayerCosines(["a", "b", "unused"], [1, 1, 1], layers, whole),
        "short": conflicts.LayerCosines(["a"], [1], np.full((1, 1), 0.5), np.array([-0.5])),
    }
    run = Run("none-seed0", Path(), "none", 0, "unfinished", "0 epochs so far")
    assert conflicts.summary(conflicts.Analysis([run], measured), top=1).splitlines() == [
        "none-seed0: no steps recorded (unfinished, 0 epochs so far)",
        "long: 25.0% of 8 steps in conflict (first quarter 100.0%, last 0.0%); mean cosine +0.125",
        "  most in conflict:  b 50.0%",
        "  least in conflict: a 12.5%",
        "short: 100.0% of 1 steps in conflict (first quarter 100.0%, last 100.0%); mean cosine -0.500",
        "  no step in conflict in any of its layers",
    ]
    with pytest.raises(DataError, match="expected at least one recorded or measured step; found none"):
        conflicts.draw(conflicts.Analysis([run]))


def test_so_many_steps_are_measured_epoch_after_epoch(monkeypatch):
    seen = []

    def views(config, epoch):
        seen.append(epoch)
        yield torch.randn(2, 2000), torch.randn(2, 2000), torch.tensor([0, 1])

    monkeypatch.setattr(conflicts, "training_views", views)
    found = conflicts.measure(TrainConfig(detector="light", epochs=3, device="cpu"), 2, progress=False)
    assert (len(found.whole), seen) == (2, [0, 1])


def test_no_step_is_an_error(model):
    with pytest.raises(ValueError, match="expected at least one step"):
        conflicts.layer_cosines(model, [], nn.functional.cross_entropy)
