from __future__ import annotations

import pytest
import torch
from torch import nn

from calguide_fast.calibration import TemperatureScaling, calibration_by_noise_level, measure_calibration
from calguide_fast.models import LoadedClassifier
from calguide_fast.schedule import Schedule

# two classes, told apart by the sign of the images' mean
LABELS = torch.arange(64) % 2
IMAGES = (2 * LABELS[:, None, None, None].float() - 1).expand(64, 1, 4, 4) * 0.8
SCHEDULE = Schedule.linear(100)


def by_mean(x, t=None):
    lead = 10 * x.mean((1, 2, 3))
    return torch.stack([-lead, lead], 1)


class Oracle(nn.Module):
    """ε̂ of a model that knows the clean images by the label; given the other label it draws the other class."""

    class_conditional = True

    def forward(self, x, t, y):
        bar = torch.from_numpy(SCHEDULE.alphas_cumprod).float()[t][:, None, None, None]
        x0 = (2 * y[:, None, None, None].float() - 1) * 0.8
        return (x - bar.sqrt() * x0) / (1 - bar).sqrt()


def test_noise_costs_accuracy_and_leaves_confidence():
    found = calibration_by_noise_level(by_mean, None, IMAGES, LABELS, SCHEDULE, timesteps=10, repeats=4)
    assert found.timesteps.tolist() == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    bar = torch.from_numpy(SCHEDULE.alphas_cumprod)[found.timesteps]
    torch.testing.assert_close(found.sigmas, ((1 - bar) / bar).sqrt())
    assert found.accuracy[0] == 1 and 0.4 < found.accuracy[-1] < 0.7
    assert found.confidence[-1] > found.accuracy[-1] + 0.2
    assert found.smooth_ece[0] < 0.01 and found.smooth_ece[-1] > 0.2
    assert found.cross_entropy[-1] > found.cross_entropy[0]


def test_each_level_is_what_its_own_predictions_give():
    seen = {}

    def classifier(x_t, t):
        seen.setdefault(int(t[0]), []).append((x_t, by_mean(x_t)))
        assert t.dtype == torch.int64 and (t == t[0]).all()
        return by_mean(x_t)

    found = calibration_by_noise_level(
        classifier, None, IMAGES, LABELS, SCHEDULE, timesteps=[90, 3], input="xt", repeats=2, batch_size=50
    )
    assert found.timesteps.tolist() == [3, 90]
    noises = []
    for level, timestep in enumerate((3, 90)):
        x_t, logits = (torch.cat(parts) for parts in zip(*seen[timestep]))
        expected = measure_calibration(logits, LABELS.repeat(2))
        figures = [found.smooth_ece, found.accuracy, found.confidence, found.cross_entropy]
        wanted = [expected.smooth_ece, expected.accuracy, expected.confidence, expected.cross_entropy]
        assert [figure[level].item() for figure in figures] == pytest.approx(wanted)
        bar = SCHEDULE.alphas_cumprod[timestep]
        noises.append((x_t - bar**0.5 * IMAGES.repeat(2, 1, 1, 1)) / (1 - bar) ** 0.5)
    # the same noise at both levels, another one for each image and draw
    torch.testing.assert_close(noises[0], noises[1], rtol=0, atol=1e-4)
    assert abs(noises[1].mean()) < 0.1 and abs(noises[1].std() - 1) < 0.1
    assert len(noises[1][:, 0, 0, 0].unique()) == 128


def test_a_model_that_knows_the_image_lets_the_classifier_see_it():
    found = calibration_by_noise_level(by_mean, Oracle().eval(), IMAGES, LABELS, SCHEDULE, timesteps=5)
    assert (found.accuracy == 1).all()
    # x̂₀ is the image, at every level
    torch.testing.assert_close(found.confidence, found.confidence[:1].expand(5), rtol=0, atol=1e-4)
    # the label that is shown in place of the true one is what the classifier finds
    shown = calibration_by_noise_level(by_mean, Oracle().eval(), IMAGES, LABELS, SCHEDULE, timesteps=5, null_class=1)
    assert (shown.accuracy == 0.5).all()


def test_x0_is_clipped_and_transformed_as_in_sampling():
    seen = []

    def classifier(x):
        seen.append(x)
        return by_mean(x)

    def model(x, t):
        return -3 * torch.ones_like(x)

    settings = {"schedule": SCHEDULE, "timesteps": [50]}
    calibration_by_noise_level(classifier, model, IMAGES, LABELS, **settings, classifier_transform=lambda x: 2 * x)
    calibration_by_noise_level(classifier, model, IMAGES, LABELS, **settings, clip_denoised=False)
    assert seen[0].max() == 2 and seen[1].max() > 2
    torch.testing.assert_close(seen[0], 2 * seen[1].clamp(-1, 1))


def test_neither_batches_nor_random_state_matter_but_the_seed_does():
    def measure(**settings):
        return calibration_by_noise_level(by_mean, None, IMAGES, LABELS, SCHEDULE, timesteps=[70], **settings)

    state = torch.get_rng_state()
    whole, parts, other = measure(), measure(batch_size=7), measure(seed=1000)
    assert torch.equal(torch.get_rng_state(), state)
    assert whole.cross_entropy.item() == pytest.approx(parts.cross_entropy.item(), rel=1e-6)
    assert whole.cross_entropy.item() != pytest.approx(other.cross_entropy.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input": "x"}, "input='x' must be 'x0' or 'xt'"),
        ({"input": "xt", "model": Oracle().eval()}, "needs no model"),
        ({"model": Oracle()}, "the model is in training mode"),
        ({"timesteps": [100]}, r"timesteps=\[100\] must be"),
        ({"timesteps": []}, r"timesteps=\[\] must be"),
        ({"timesteps": 0}, "must be a positive count"),
        ({"repeats": 0}, "repeats=0 must be"),
        ({"batch_size": 0}, "batch_size=0 must be"),
        ({"labels": LABELS[:3]}, r"labels has shape \(3,\)"),
        ({"images": IMAGES[:, 0, 0]}, "images has shape"),
        ({"labels": LABELS + 1}, "is out of range"),
    ],
)
def test_unusable_arguments_are_named(settings, message):
    arguments = {"classifier": by_mean, "model": None, "images": IMAGES, "labels": LABELS, "schedule": SCHEDULE}
    with pytest.raises(ValueError, match=message):
        calibration_by_noise_level(**{**arguments, **settings})


@pytest.mark.parametrize("seen", ["x0", "xt"])
def test_a_loaded_classifier_brings_what_it_looks_at(seen):
    class Mean(nn.Module):
        def forward(self, x, *t):
            assert len(t) == (seen == "xt")
            return by_mean(x)

    loaded = LoadedClassifier(Mean().eval(), seen, None)
    found, expected = (
        calibration_by_noise_level(one, None, IMAGES, LABELS, SCHEDULE, **options)
        for one, options in ((loaded, {}), (loaded.module, {"input": seen}))
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    with pytest.raises(TypeError, match="classifier must be callable, got int"):
        calibration_by_noise_level(3, None, IMAGES, LABELS, SCHEDULE)
    with pytest.raises(TypeError, match="classifier must be callable, got LoadedClassifier; give its .module"):
        TemperatureScaling().wrap(loaded)
