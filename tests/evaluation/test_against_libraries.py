"""Every figure against what others compute from the same features, to 1e-6."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fidelity import import_torch_fidelity
from torch import nn

from calguide_fast.evaluation import (
    feature_statistics,
    frechet_distance,
    frechet_distance_from_statistics,
    inception_score,
    precision_recall,
)


def features(count: int, width: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Skewed and correlated, with spectra that fall 1000-fold, as a network's features have them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    table = (
        torch.randn(count, width, generator=generator, dtype=torch.float64) * torch.logspace(0, -1.5, width).double()
    )
    return (table @ mix + shift).exp()


REAL, FAKE = features(700, 48, seed=1), features(600, 48, seed=2, shift=0.1)
LOGITS = 3 * torch.randn(1000, 20, generator=torch.Generator().manual_seed(3))


def test_scipys_root_of_the_product():
    linalg = pytest.importorskip("scipy.linalg", reason="scipy is not installed (scikit-learn of the demo brings it)")
    a, b = feature_statistics(REAL), feature_statistics(FAKE)
    root = linalg.sqrtm(a.sigma.numpy() @ b.sigma.numpy()).real
    difference = (a.mu - b.mu).numpy()
    expected = difference @ difference + np.trace(a.sigma.numpy() + b.sigma.numpy() - 2 * root)
    assert frechet_distance_from_statistics(*a, *b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("count_a", "count_b"), [(5, 9), (20, 400), (300, 300)])
def test_singular_covariances_have_the_distance_of_the_samples_own_products(count_a, count_b):
    # with centred tables X and Y, the roots of sigma_a sigma_b's eigenvalues are the singular values of X Yᵀ, N×M
    a, b = features(count_a, 64, seed=4).numpy(), features(count_b, 64, seed=5).numpy()
    centred_a, centred_b = a - a.mean(0), b - b.mean(0)
    roots = np.linalg.svd(centred_a @ centred_b.T, compute_uv=False) / np.sqrt((count_a - 1) * (count_b - 1))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.var(a, axis=0, ddof=1).sum() + np.var(b, axis=0, ddof=1).sum()
    assert frechet_distance(a, b) == pytest.approx(expected - 2 * roots.sum(), rel=1e-9)


class Given(nn.Module):
    """Features that are the images."""

    num_features = 48

    def forward(self, table: torch.Tensor) -> torch.Tensor:
        return table


def test_torchmetrics_frechet_distance():
    module = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics cannot be imported (the bench extra)")
    metric = module.FrechetInceptionDistance(feature=Given(), normalize=True, input_img_size=(48,)).double()
    metric.set_dtype(torch.float64)
    metric.update(REAL, real=True)
    metric.update(FAKE, real=False)
    assert frechet_distance(REAL, FAKE) == pytest.approx(metric.compute().item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save all", "ignore:.*degrees of freedom is <= 0")
def test_torchmetrics_inception_score():
    module = pytest.importorskip("torchmetrics.image.inception", reason="torchmetrics cannot be imported")
    # one split, because theirs are shuffled
    metric = module.InceptionScore(feature=Given(), splits=1)
    metric.update(LOGITS.double())
    assert inception_score(LOGITS) == pytest.approx(metric.compute()[0].item(), rel=1e-6)


def test_torch_fidelity():
    import_torch_fidelity()
    from torch_fidelity import metric_fid, metric_isc

    statistics = [metric_fid.fid_features_to_statistics(table) for table in (REAL, FAKE)]
    expected = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)[metric_fid.KEY_METRIC_FID]
    assert frechet_distance(REAL, FAKE) == pytest.approx(expected, rel=1e-6)
    expected = metric_isc.isc_features_to_metric(LOGITS, splits=4, shuffle=False)[metric_isc.KEY_METRIC_ISC_MEAN]
    assert inception_score(LOGITS, split_size=250) == pytest.approx(expected, rel=1e-6)


def test_torch_fidelitys_precision_and_recall():
    import_torch_fidelity()
    metric_prc = pytest.importorskip("torch_fidelity.metric_prc", reason="this torch-fidelity has no precision, recall")
    expected = metric_prc.calculate_precision_recall_full(FAKE, REAL, neighborhood=3)
    assert precision_recall(REAL, FAKE) == pytest.approx(expected, rel=1e-6)


def adm_precision_recall(reference: np.ndarray, samples: np.ndarray) -> tuple[float, float]:
    """What guided-diffusion's evaluator defines, sentence by sentence, with exact distances instead of half precision.

    Radii are the squared distances at place 3 of each sorted row, whose place 0 is the sample itself; a feature is in
    the other manifold if its distance to any feature there is at most that feature's radius.
    """

    def distances(u, v):
        return np.maximum(((u[:, None] - v[None]) ** 2).sum(-1), 0)

    reference_radii = np.partition(distances(reference, reference), np.arange(4), axis=1)[:, 3]
    sample_radii = np.partition(distances(samples, samples), np.arange(4), axis=1)[:, 3]
    between = distances(reference, samples)
    reference_in = (between <= sample_radii[None, :]).any(1)
    samples_in = (between <= reference_radii[:, None]).any(0)
    return samples_in.mean(), reference_in.mean()


@pytest.mark.parametrize(("references", "samples"), [(200, 600), (300, 150)])
def test_adms_precision_and_recall(references, samples):
    # evaluators of ADM take all images of both files, as many as they are: 10,000 and 50,000
    found = precision_recall(REAL[:references], FAKE[:samples])
    assert found == pytest.approx(adm_precision_recall(REAL[:references].numpy(), FAKE[:samples].numpy()), rel=1e-12)
    assert 0 < found.precision < 1 and 0 < found.recall < 1
