"""The plan: seeds, labels and batches from the command line's texts."""

from __future__ import annotations

import itertools

import pytest
import torch

from calguide_fast.generation.plan import Plan, format_integers, parse_integers
from calguide_fast.noise import draw_labels


def plan(num_samples=7, batch_size=3, seeds=None, labels="balanced", num_classes=5, default=4) -> Plan:
    return Plan.of(num_samples, batch_size, seeds, labels, num_classes, default)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_batches_are_consecutive_and_all_there(batch_size):
    whole = plan(batch_size=batch_size)
    batches = [list(range(7))[whole.images(batch)] for batch in range(whole.num_batches)]
    assert list(itertools.chain(*batches)) == list(range(7))
    assert all(len(batch) == min(batch_size, 7) for batch in batches[:-1]) and 0 < len(batches[-1]) <= batch_size


@pytest.mark.parametrize(
    ("settings", "labels", "seeds"),
    [
        ({}, [0, 1, 2, 3, 4, 0, 1], list(range(7))),
        ({"labels": "3,0-1"}, [3, 0, 1, 3, 0, 1, 3], list(range(7))),
        ({"seeds": "9,100-105"}, [0, 1, 2, 3, 4, 0, 1], [9, *range(100, 106)]),
        ({"num_samples": None, "seeds": "2-3"}, [0, 1], [2, 3]),
        ({"num_samples": None}, [0, 1, 2, 3], [0, 1, 2, 3]),
        # the bit pattern of an unsigned seed
        ({"num_samples": 1, "seeds": str(2**64 - 1)}, [0], [-1]),
    ],
    ids=str,
)
def test_labels_and_seeds(settings, labels, seeds):
    found = plan(**settings)
    assert found.labels.tolist() == labels and found.seeds.tolist() == seeds


def test_random_labels_are_the_seeds_own():
    few, many = plan(labels="random", seeds="10-16"), plan(20, labels="random", seeds="0-19", num_classes=5)
    assert torch.equal(few.labels, many.labels[10:17])
    assert torch.equal(few.labels, draw_labels(torch.arange(10, 17), 5)) and len(set(many.labels.tolist())) > 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num-samples must be at least 1, got 0"),
        ({"batch_size": 0}, "batch-size must be at least 1, got 0"),
        ({"seeds": "0-3"}, "seeds 0-3 are 4 and num-samples is 7"),
        ({"seeds": "0-999999999999999"}, "are 1000000000000000 and num-samples is 7"),
        ({"seeds": "0..6"}, "seeds must be numbers and ranges like"),
        ({"seeds": "6-0"}, "seeds: the range 6-0 runs backwards"),
        ({"num_samples": 1, "seeds": str(2**64)}, "does not fit 64 bits"),
        ({"labels": "all"}, "labels must be numbers and ranges .* got 'all'; or 'balanced' or 'random'"),
        ({"labels": "5"}, "5"),
    ],
    ids=str,
)
def test_texts_that_make_no_plan(settings, message):
    with pytest.raises(ValueError, match=message):
        plan(**settings)


@pytest.mark.parametrize("text", ["0", "0-49999", "1-2,8-15,3,1"])
def test_integers_read_as_they_are_written(text):
    assert format_integers(itertools.chain(*parse_integers("seeds", text))) == text
