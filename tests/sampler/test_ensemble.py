"""Several classifiers: the mean of their scores guides."""

from __future__ import annotations

import pytest
import torch
from formulas import assert_near, literal_score
from literal import ddpm, double, gradient_at
from toys import ToyClassifier, classifier, unet

from calguide_fast import FDivSampler, Guidance

LABELS = torch.tensor([0, 3, 4, 1])
TIMESTEPS = [0, 250, 500, 749, 999]


def another(timed: bool = False) -> ToyClassifier:
    torch.manual_seed(3)
    return ToyClassifier(timed, sharpness=9.0).eval()


def of_ten() -> ToyClassifier:
    guide = classifier()
    guide.num_classes = 10
    return guide


def sample(sampler, method="ddpm", noise=None, **options):
    return sampler.sample(LABELS, range(4), 5, method, noise=noise, progress=False, **options)


@pytest.mark.parametrize("method", ["ddpm", "ddim", "heun", "dpmpp"])
@pytest.mark.parametrize("timed", [False, True])
def test_twins_are_the_single_one(timed, method):
    options = {
        "guidance": Guidance(scale=3.0, tilt=-0.4, entropy_scaling=4.0),
        "classifier_input": "xt" if timed else "x0",
    }
    guide = classifier(timed=timed)
    single = sample(FDivSampler(unet(), guide, **options), method)
    for weights in (None, [1, 1], [3, 1]):
        twins = sample(FDivSampler(unet(), [guide, guide], classifier_weights=weights, **options), method)
        assert torch.allclose(twins.images, single.images, atol=1e-5)
        for table in ("gradient_norm", "entropy", "label_log_prob", "tilt_weight"):
            found, expected = (getattr(samples.diagnostics, table) for samples in (twins, single))
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weights", [None, [1.0, 3.0], [0.0, 2.0]])
def test_the_mean_of_the_scores_guides(weights, backend):
    guides, noise = [classifier(), another()], torch.randn(6, 4, 3, 6, 6)
    found = sample(FDivSampler(unet(), guides, Guidance(scale=3.0), classifier_weights=weights), noise=noise).images
    wide = [double(guide) for guide in guides]
    first, second = weights or (1.0, 1.0)

    def push(x, x0, t, k):
        def score(x0):
            scores = [literal_score(guide(x0), LABELS)[0] for guide in wide]
            return (first * scores[0] + second * scores[1]) / (first + second)

        return 3.0 * gradient_at(score, x0)

    assert_near(found, ddpm(double(unet()), noise.double(), TIMESTEPS, push), 1e-4)


@pytest.mark.parametrize("options", [{}, {"guidance": Guidance(tilt=-0.4, entropy_scaling=4.0)}])
def test_a_classifier_without_weight_is_not_run(options):
    """Whatever it would say: 0 times NaN is NaN."""

    def never(x):
        pytest.fail("it is run")

    guides = [never, classifier(), never]
    found = sample(FDivSampler(unet(), guides, classifier_weights=[0, 2, 0], num_classes=5, **options))
    expected = sample(FDivSampler(unet(), classifier(), **options))
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.diagnostics.values, expected.diagnostics.values)


def test_members_of_different_kinds(backend):
    """In dtype and layout, and one that is a plain function; none is changed."""
    channels_last = another().to(memory_format=torch.channels_last)
    half = classifier().bfloat16()
    found = sample(FDivSampler(unet(), [half, channels_last.forward, channels_last], num_classes=5, scale=3.0)).images
    expected = sample(FDivSampler(unet(), [classifier(), another()], classifier_weights=[1, 2], scale=3.0)).images
    assert torch.allclose(found, expected, atol=0.05) and half.head.weight.dtype == torch.bfloat16
    assert next(half.parameters()).requires_grad


def test_any_member_tells_the_number_of_classes():
    assert FDivSampler(unet(), [another().forward, classifier()]).num_classes == 5


@pytest.mark.parametrize(
    ("classifiers", "options", "error", "message"),
    [
        ([], {}, ValueError, r"classifier=\[\] must hold at least one"),
        ([classifier()] * 2, {"classifier_weights": [1]}, ValueError, "classifier_weights has 1 entries for 2 clas"),
        ([classifier()] * 2, {"classifier_weights": [0, 0]}, ValueError, "must not all be 0"),
        ([classifier()] * 2, {"classifier_weights": [-1, 2]}, ValueError, r"classifier_weights\[0\]=-1 must be finite"),
        ([classifier()] * 2, {"classifier_weights": ["a", 2]}, TypeError, r"classifier_weights\[0\] must be a number"),
        ([classifier(), another().train()], {}, ValueError, "the classifier is in training mode"),
        ([of_ten(), classifier()], {}, ValueError, r"must have the same classes; their num_classes are \[5, 10\]"),
        (classifier(), {"classifier_weights": [1, 2]}, ValueError, "classifier_weights has 2 entries for 1 class"),
    ],
)
def test_wrong_ensembles(classifiers, options, error, message):
    with pytest.raises(error, match=message):
        FDivSampler(unet(), classifiers, **options)
