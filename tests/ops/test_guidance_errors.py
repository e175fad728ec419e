"""Every wrong argument of the guidance op is an error that names it, before any work."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from calguide_fast import Guidance, guidance_gradient, guidance_score

LOGITS, LABELS = torch.randn(4, 10), torch.tensor([1, 2, 3, 9])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"divergence": "kl"}, ValueError, "divergence='kl' is not known; choose one of 'none', 'reverse_kl'"),
        ({"divergence": "alpha"}, ValueError, "divergence='alpha' is not known.*'alpha:a'"),
        ({"divergence": "alpha:"}, ValueError, "order after 'alpha:' must be a finite number, got ''"),
        ({"divergence": "alpha:two"}, ValueError, "must be a finite number, got 'two'"),
        ({"divergence": "alpha:inf"}, ValueError, "must be a finite number, got 'inf'"),
        ({"divergence": "alpha:nan"}, ValueError, "must be a finite number, got 'nan'"),
        ({"divergence": None}, TypeError, "divergence must be a name, such as 'js', got NoneType"),
        ({"divergence": Guidance("js")}, TypeError, "got Guidance; .* the fields one by one .* its image_gradient"),
        ({"alpha": -0.1}, ValueError, "alpha=-0.1 must be finite and at least 0"),
        ({"alpha": math.inf}, ValueError, "alpha=inf must be finite"),
        ({"alpha": "1"}, TypeError, "alpha must be a number, got '1' of type str"),
        ({"alpha": True}, TypeError, "alpha must be a number, got True of type bool"),
        ({"alpha": torch.tensor(1.0)}, TypeError, "alpha must be a number, got tensor"),
        ({"alpha": None}, TypeError, "alpha must be a number, got None"),
        ({"alpha": 1j}, TypeError, "alpha must be a number"),
        ({"epsilon": -0.01}, ValueError, "epsilon=-0.01 must be between 0 and 1"),
        ({"epsilon": 1.01}, ValueError, "epsilon=1.01 must be between 0 and 1"),
        ({"epsilon": math.nan}, ValueError, "epsilon=nan must be between 0 and 1"),
        ({"joint_temperature": -1.0}, ValueError, "joint_temperature=-1.0 must be between 0 and 1e.30"),
        ({"marginal_temperature": math.nan}, ValueError, "marginal_temperature=nan must be between 0 and 1e.30"),
        ({"entropy_weight": math.inf}, ValueError, "entropy_weight=inf must be finite"),
        ({"adaptive_entropy": 1}, TypeError, "adaptive_entropy must be True or False, got 1"),
        ({"adaptive_entropy": "yes"}, TypeError, "adaptive_entropy must be True or False, got 'yes'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", [guidance_gradient, guidance_score])
def test_wrong_settings(op, settings, error, message):
    with pytest.raises(error, match=message):
        op(LOGITS, LABELS, **settings)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        ([[1.0]], LABELS, TypeError, "logits must be a torch.Tensor, got list"),
        (LOGITS.long(), LABELS, TypeError, "logits has dtype torch.int64; it must be float32"),
        (LOGITS.to(torch.complex64), LABELS, TypeError, "logits has dtype torch.complex64"),
        (LOGITS[0], LABELS, ValueError, r"logits has shape \(10,\); it must be \(B, C\)"),
        (LOGITS[None], LABELS, ValueError, r"logits has shape \(1, 4, 10\)"),
        (LOGITS[:, :0], LABELS, ValueError, r"logits has shape \(4, 0\).*at least one class"),
        (LOGITS, [1, 2, 3, 9], TypeError, "labels must be a torch.Tensor, got list"),
        (LOGITS, LABELS.float(), TypeError, "labels has dtype torch.float32; it must be an integer type"),
        (LOGITS, LABELS > 1, TypeError, "labels has dtype torch.bool"),
        (LOGITS, LABELS[:3], ValueError, r"labels has shape \(3,\); it must be \(4,\)"),
        (LOGITS, LABELS[:, None], ValueError, r"labels has shape \(4, 1\)"),
        (LOGITS, torch.tensor(3), ValueError, r"labels has shape \(\)"),
        (LOGITS, LABELS.to("meta"), ValueError, "labels is on meta but logits is on cpu"),
        (LOGITS, LABELS + 1, ValueError, r"labels\[3\]=10 is out of range: labels must lie in 0\.\.9"),
    ],
)
@pytest.mark.parametrize("op", [guidance_gradient, guidance_score])
def test_wrong_tensors(op, logits, labels, error, message):
    with pytest.raises(error, match=message):
        op(logits, labels)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (torch.zeros(4, 9), ValueError, r"out has shape \(4, 9\); it must be \(4, 10\)"),
        (torch.zeros(4, 10).double(), ValueError, "out must be contiguous and of dtype torch.float32"),
        (torch.zeros(10, 4).t(), ValueError, "out must be contiguous"),
        (torch.zeros(4, 10, device="meta"), ValueError, "out is on meta but logits is on cpu"),
        ([0.0], TypeError, "out must be a torch.Tensor, got list"),
    ],
    ids=["shape", "dtype", "strides", "device", "type"],
)
def test_wrong_out(out, error, message):
    with pytest.raises(error, match=message):
        guidance_gradient(LOGITS, LABELS, out=out)


@pytest.mark.parametrize("one", [1, np.float32(1.0), np.int64(1), np.float64(1.0)], ids=lambda one: type(one).__name__)
def test_numbers_of_other_types_are_numbers(one):
    expected = guidance_gradient(LOGITS, LABELS, alpha=1.0, entropy_weight=1.0)
    found = guidance_gradient(LOGITS, LABELS, alpha=one, entropy_weight=one)
    assert torch.equal(found.grad, expected.grad)


def test_result_unpacks_and_names_its_fields():
    found = guidance_gradient(LOGITS, LABELS)
    grad, score, log_prob, entropy, divergence = found
    assert len(found) == 5 and found[0] is found.grad and grad is found.grad
    for name, value in zip(("score", "log_prob", "entropy", "divergence"), (score, log_prob, entropy, divergence)):
        assert torch.equal(getattr(found, name), value) and value.shape == (4,)
    assert "log_prob=" in repr(found)
