from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from synthetic import predictions
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from calguide_fast.calibration import HuberECELoss, SmoothECELoss, fine_tune, measure_calibration
from calguide_fast.schedule import Schedule

# inputs are the true logits: the identity is calibrated, four times it is overconfident
INPUTS, LABELS = (part.float() if part.is_floating_point() else part for part in predictions(3000, 4))
HELD_OUT, HELD_OUT_LABELS = (
    part.float() if part.is_floating_point() else part for part in predictions(3000, 4, seed=1)
)


def overconfident() -> nn.Sequential:
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        linear.weight.copy_(4 * torch.eye(4))
        linear.bias.zero_()
    return nn.Sequential(linear)


def loader(batch_size: int = 500, **settings) -> DataLoader:
    return DataLoader(TensorDataset(INPUTS, LABELS), batch_size, **settings)


def measured(classifier):
    with torch.no_grad():
        return measure_calibration(classifier(HELD_OUT), HELD_OUT_LABELS)


@pytest.mark.parametrize("loss", ["smooth_ece", SmoothECELoss(bandwidth=0.05)], ids=str)
def test_it_repairs_an_overconfident_classifier(loss):
    classifier = overconfident()
    before = measured(classifier)
    history = fine_tune(classifier, loader(), loss, loss_weight=5.0, epochs=12, lr=0.02)
    after = measured(classifier)
    assert before.smooth_ece > 0.2 and after.smooth_ece < 0.65 * before.smooth_ece
    assert after.accuracy > before.accuracy - 0.01 and after.cross_entropy < before.cross_entropy
    assert len(history) == 12
    assert history[-1].smooth_ece < history[0].smooth_ece and history[-1].calibration < history[0].calibration
    assert history[0].confidence > history[0].accuracy + 0.1


def test_held_out_the_smooth_loss_helps_cross_entropy_and_the_improper_one_hinders_it():
    results = {}
    for loss in ("smooth_ece", None, "huber_ece"):
        classifier = overconfident()
        fine_tune(classifier, loader(), loss, loss_weight=5.0, epochs=12, lr=0.02)
        results[loss] = measured(classifier).smooth_ece
    assert results["smooth_ece"] < 0.85 * results[None] < 0.7 * results["huber_ece"]


@pytest.mark.parametrize("name", ["smooth_ece", "huber_ece", "custom", None])
def test_one_step_is_the_gradient_of_the_sum(name):
    parts = {"smooth_ece": SmoothECELoss(), "huber_ece": HuberECELoss(), None: lambda f, y: 0.0}
    calibration = parts.get(name, lambda f, y: f.square().mean())
    classifier = overconfident()
    expected = copy.deepcopy(classifier)
    logits = expected(INPUTS)
    (F.cross_entropy(logits, LABELS) + 2.5 * calibration(logits, LABELS)).backward()
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1)
    loss = calibration if name == "custom" else name
    (epoch,) = fine_tune(classifier, [(INPUTS, LABELS)], loss, 2.5, epochs=1, optimizer=optimizer)
    for p, q in zip(classifier.parameters(), expected.parameters()):
        torch.testing.assert_close(p, q - 0.1 * q.grad)
        assert p.grad is None
    assert epoch.cross_entropy == pytest.approx(F.cross_entropy(logits, LABELS).item())
    assert epoch.calibration == pytest.approx(float(calibration(logits.detach(), LABELS)))
    assert epoch.smooth_ece == pytest.approx(measure_calibration(logits, LABELS).smooth_ece)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_callers_random_state():
    def run(seed):
        classifier = nn.Sequential(nn.Dropout(0.3), overconfident()[0])
        state = torch.get_rng_state()
        history = fine_tune(classifier, loader(shuffle=True), "huber_ece", epochs=2, lr=0.01, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return classifier[1].weight.detach(), history

    weight, history = run(3)
    torch.manual_seed(99)
    again, history_again = run(3)
    assert torch.equal(weight, again) and history == history_again
    assert not torch.equal(weight, run(4)[0])


class TimedClassifier(nn.Module):
    """Of (x_t, t), and it remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 4)
        self.seen = []

    def forward(self, x, t):
        self.seen.append((x.detach(), t))
        return self.linear(x.flatten(1)) + t[:, None] / 1000


def test_a_schedule_noises_the_inputs():
    schedule = Schedule.cosine(50)
    classifier = TimedClassifier()
    images = torch.randn(4000, 3, 2, 2).sign()
    fine_tune(classifier, [(images, LABELS[:1].expand(4000))], None, epochs=2, schedule=schedule)
    (x_t, t), (_, t_again) = classifier.seen
    assert t.dtype == torch.int64 and set(t.tolist()) == set(range(50)) and not torch.equal(t, t_again)
    bar = torch.from_numpy(schedule.alphas_cumprod).float()[t][:, None, None, None]
    noise = (x_t - bar.sqrt() * images) / (1 - bar).sqrt()
    assert x_t.dtype == torch.float32 and abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    # independent of the images, at every timestep
    assert abs((noise * images).mean()) < 0.02 and abs(noise[t < 5].std() - 1) < 0.05


def test_modes_and_running_statistics_are_left_as_they_were():
    norm, dropout = nn.BatchNorm1d(4), nn.Dropout(0.5)
    classifier = nn.Sequential(norm, overconfident()[0], dropout).eval()
    norm.train()  # an odd state, and its owner's business
    seen = []
    dropout.register_forward_pre_hook(lambda *_: seen.append((norm.training, dropout.training)))
    before = copy.deepcopy(norm.state_dict())
    fine_tune(classifier, loader(1500), epochs=1, lr=0.01)
    assert seen == [(False, True)] * 2
    assert torch.equal(norm.running_mean, before["running_mean"]) and norm.num_batches_tracked == 0
    assert not torch.equal(norm.weight, before["weight"])
    assert [module.training for module in classifier.modules()] == [False, True, False, False]

    fine_tune(classifier, loader(1500), epochs=1, freeze_batch_norm=False)
    assert seen[-1] == (True, True) and norm.num_batches_tracked == 2


@pytest.mark.parametrize("loss", ["smooth_ece", "huber_ece", None])
def test_modes_are_restored_after_an_error_and_the_weights_are_sound(loss):
    classifier = overconfident().eval()
    bad = [(INPUTS, LABELS), (torch.full_like(INPUTS, torch.nan), LABELS)]
    with pytest.raises(ArithmeticError, match="the cross-entropy is nan in epoch 1"):
        fine_tune(classifier, bad, loss, epochs=1)
    assert not classifier.training and classifier[0].weight.isfinite().all()


def test_a_calibration_loss_that_is_not_finite_is_named():
    with pytest.raises(ArithmeticError, match="the calibration loss is inf in epoch 1"):
        fine_tune(overconfident(), loader(), lambda logits, labels: logits.sum() * torch.inf)


def test_only_what_requires_a_gradient_is_trained_even_where_gradients_are_off():
    classifier = nn.Sequential(nn.Linear(4, 4), overconfident()[0])
    classifier[0].requires_grad_(False)
    before = copy.deepcopy(classifier.state_dict())
    with torch.no_grad():
        fine_tune(classifier, loader(), epochs=1, lr=0.01)
    assert torch.equal(classifier[0].weight, before["0.weight"])
    assert not torch.equal(classifier[1].weight, before["1.weight"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "ece"}, "loss='ece' must be 'smooth_ece', 'huber_ece', a callable or None"),
        ({"loss": 3}, "loss must be a name, a callable"),
        ({"loss_weight": -1.0}, "loss_weight=-1.0"),
        ({"epochs": 0}, "epochs=0 must be"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": 0.1, "optimizer": torch.optim.SGD([torch.zeros(1)])}, "give lr or an optimizer"),
        ({"loader": []}, "the loader gave no batch in epoch 1"),
        ({"loader": iter([(INPUTS, LABELS)]), "epochs": 2}, "the loader gave no batch in epoch 2"),
        ({"loader": [(INPUTS, LABELS + 1)]}, "is out of range"),
        ({"classifier": overconfident().requires_grad_(False)}, "nothing to train"),
        ({"schedule": "quadratic"}, "schedule='quadratic'"),
    ],
)
def test_unusable_arguments_are_named(settings, message):
    arguments = {"classifier": overconfident(), "loader": [(INPUTS, LABELS)], **settings}
    with pytest.raises((TypeError, ValueError), match=message):
        fine_tune(**arguments)
