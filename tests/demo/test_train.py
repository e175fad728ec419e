from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

from calguide_fast.cli import main
from calguide_fast.demo import checkpoints
from calguide_fast.demo import train as training
from calguide_fast.demo.data import load_split
from calguide_fast.demo.train import (
    ClassifierRecipe,
    DiffusionRecipe,
    HybridLoss,
    measure_all,
    measure_classifier,
    train_classifier,
    train_demo,
    train_diffusion,
)
from calguide_fast.schedule import Schedule

TINY = ClassifierRecipe(labels=100, epochs=2, learning_rate=5e-3, weight_decay=0.0, augment=True, noise=0.2, width=8)


def gaussian_kl(mean_a, log_variance_a, mean_b, log_variance_b):
    a = torch.distributions.Normal(mean_a, math.exp(log_variance_a / 2))
    b = torch.distributions.Normal(mean_b, math.exp(log_variance_b / 2))
    return torch.distributions.kl_divergence(a, b)


class Constant(torch.nn.Module):
    """Says the same ε and v of every pixel."""

    def __init__(self, eps: float, v: float):
        super().__init__()
        self.output = torch.nn.Parameter(torch.tensor([eps, v]))

    def forward(self, x, t, y):
        return self.output[None, :, None, None].expand(len(x), 2, *x.shape[2:])


def test_the_hybrid_loss_is_that_of_its_definition():
    x0, noise = torch.full((1, 1, 1, 1), 0.25), torch.full((1, 1, 1, 1), -0.7)
    t, eps, v = 300, 0.4, 0.2
    found = HybridLoss(Schedule.linear())(Constant(eps, v), x0, torch.tensor([0]), torch.tensor([t]), noise)

    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = (1 - betas).cumprod(0)
    now, before = bar[t].item(), bar[t - 1].item()
    beta = betas[t].item()
    x_t = math.sqrt(now) * 0.25 + math.sqrt(1 - now) * -0.7
    low, high = math.log(beta * (1 - before) / (1 - now)), math.log(beta)

    def posterior_mean(x0):
        return (beta * math.sqrt(before) * x0 + (1 - before) * math.sqrt(1 - beta) * x_t) / (1 - now)

    predicted = (x_t - math.sqrt(1 - now) * eps) / math.sqrt(now)
    log_variance = low + (v + 1) / 2 * (high - low)
    kl = gaussian_kl(torch.tensor(posterior_mean(0.25)), low, posterior_mean(predicted), log_variance) / math.log(2)
    assert found.item() == pytest.approx((eps + 0.7) ** 2 + kl.item(), rel=1e-4)


def test_the_last_step_counts_the_mass_of_one_grey_level():
    levels = torch.linspace(-1, 1, 17)[:, None, None, None]
    loss_of = HybridLoss(Schedule.linear())
    bits = []
    for level in levels:
        # the noise is said rightly, so that the bound is all that is left
        zero = torch.tensor([0])
        bits.append(loss_of(Constant(0.0, 0.0), level[None], zero, zero, torch.zeros(1, 1, 1, 1)))
    # at the smallest noise level a right mean puts all but all mass into the right one of 17 bins
    assert torch.stack(bits).abs().max() < 1e-4


def test_the_bound_trains_the_variance_alone():
    model = Constant(0.3, 0.1)
    noise = torch.full((4, 1, 2, 2), 0.3)
    t = torch.ones(4).long()  # where the range of the variance is wide
    HybridLoss(Schedule.linear())(model, torch.zeros(4, 1, 2, 2), torch.zeros(4).long(), t, noise).backward()
    assert model.output.grad[0].abs() < 1e-6
    assert model.output.grad[1].abs() > 1e-4


def test_training_lowers_the_loss_and_repeats_itself():
    train, _ = load_split()
    recipe = DiffusionRecipe(steps=30, batch_size=16, learning_rate=3e-3)
    losses: list[float] = []
    model = train_diffusion(train, recipe, progress=False, losses=losses)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert not model.training
    again: list[float] = []
    train_diffusion(train, DiffusionRecipe(steps=3, batch_size=16, learning_rate=3e-3), progress=False, losses=again)
    assert again[0] == pytest.approx(losses[0], rel=1e-5)


def test_a_classifier_learns_from_few_labels():
    train, test = load_split()
    recipe = ClassifierRecipe(100, epochs=40, learning_rate=1e-2, weight_decay=0.0, augment=True, noise=0.2)
    classifier = train_classifier(train, recipe, "classifier", progress=False)
    assert measure_classifier(classifier, test)["accuracy"] > 0.7


@pytest.mark.parametrize("beta, kind", [(None, torch.nn.ReLU), (3.0, torch.nn.Softplus)])
def test_a_classifier_is_trained_with_the_activation_of_its_recipe(beta, kind):
    classifier = train_classifier(load_split()[0], replace(TINY, epochs=1, softplus_beta=beta), "", progress=False)
    assert sum(isinstance(module, kind) for module in classifier.modules()) == 4


def test_all_four_checkpoints_are_written_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "JUDGE_WIDTH", 24)
    whole = ClassifierRecipe(**{**TINY.__dict__, "width": 24})
    folder = train_demo(
        tmp_path,
        DiffusionRecipe(steps=1, batch_size=4),
        {name: whole for name in (checkpoints.GUIDE, checkpoints.OVERCONFIDENT, checkpoints.JUDGE)},
        progress=False,
    )
    card = json.loads((folder / checkpoints.CARD).read_text())
    assert set(card["recipes"]) == {"unet", "guide", "overconfident", "judge"} == set(card["seconds"])
    measured = measure_all(folder)
    for name, figures in card["measured_on_test_digits"].items():
        assert measured[name] == pytest.approx(figures, abs=1e-4)


@pytest.mark.parametrize(("arguments", "folder"), [([], "out/train-demo"), (["--out", "mine"], "mine")])
def test_the_command_leaves_the_packages_own_networks_alone(arguments, folder, monkeypatch):
    folders = []
    monkeypatch.setattr(training, "train_demo", folders.append)
    assert main(["train-demo", *arguments]) == 0 and folders == [Path(folder)]


def test_the_shipped_checkpoints_reach_what_their_card_says():
    card = json.loads((checkpoints.ASSETS / checkpoints.CARD).read_text())
    recorded = card["measured_on_test_digits"]
    for name, figures in measure_all(checkpoints.ASSETS).items():
        assert figures == pytest.approx(recorded[name], abs=2e-3), name
    assert recorded["judge"]["accuracy"] > 0.99
    # the twin errs more, yet is the surer of the two
    assert recorded["overconfident"]["accuracy"] < recorded["guide"]["accuracy"]
    assert recorded["overconfident"]["confidence"] > recorded["guide"]["confidence"]
    size = sum(path.stat().st_size for path in checkpoints.ASSETS.glob("*.safetensors"))
    assert size < 2e6
    assert card["recipes"]["guide"]["seed"] == 0 and card["versions"]["torch"]
