from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

from calguide_fast.demo.data import augment, few_labels, load_split


def test_the_split_is_whole_stratified_and_always_the_same():
    train, test = load_split()
    assert train.images.shape == (1297, 1, 8, 8) and test.images.shape == (500, 1, 8, 8)
    assert train.images.min() == -1 and train.images.max() == 1
    assert torch.bincount(test.labels).sub(50).abs().max() <= 2
    # by their places in the data set, no digit is on both sides
    from sklearn.datasets import load_digits

    everything = torch.from_numpy(load_digits().data).float() / 8 - 1
    found = torch.cat([train.images, test.images]).flatten(1)
    assert torch.equal(found.sum(0), everything.sum(0))
    assert len(torch.cat([train.labels, test.labels])) == len(everything)
    again_train, again_test = load_split()
    assert torch.equal(again_train.images, train.images) and torch.equal(again_test.labels, test.labels)
    # the split that the shipped networks were trained on, by its first labels
    assert train.labels[:10].tolist() == [5, 5, 4, 8, 1, 0, 9, 3, 9, 1]


def test_few_labels_are_balanced():
    train, _ = load_split()
    assert torch.bincount(few_labels(train, 300).labels).tolist() == [30] * 10


def test_augmentation_moves_digits_a_little_and_repeats_itself():
    train, _ = load_split()
    images = train.images[:200]
    moved = augment(images, torch.Generator().manual_seed(0))
    assert torch.equal(moved, augment(images, torch.Generator().manual_seed(0)))
    assert not torch.equal(moved, images)
    assert moved.min() >= -1 - 1e-5 and moved.max() <= 1 + 1e-5
    assert 0.05 < (moved - images).square().mean() < 0.3 < images.var()
    # ink is moved, and little of it out of the picture
    assert (moved + 1).mean() == pytest.approx((images + 1).mean().item(), rel=0.1)
    noisy = augment(images, torch.Generator().manual_seed(0), noise=0.5)
    level = (noisy - moved).flatten(1).std(1)
    assert level.max() > 0.4 and level.min() < 0.1
