"""The closed form against the definition of the score: φ by φ, with autograd's gradient, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from formulas import NAMES, assert_near, literal, one_hot_divergence, phi

from calguide_fast import guidance_gradient, guidance_score
from calguide_fast.ops.divergences import CODES

SETTINGS = [
    {},
    {"epsilon": 0.0},
    {"epsilon": 0.5, "alpha": 2.5},
    {"alpha": 0.0},
    {"joint_temperature": 2.0, "marginal_temperature": 0.0},
    {"joint_temperature": 0.0, "marginal_temperature": 1.3},
    {"entropy_weight": 0.7},
    {"entropy_weight": -0.7, "adaptive_entropy": True},
    {"entropy_weight": 1.5, "adaptive_entropy": True, "marginal_temperature": 1.0, "alpha": 0.3},
]


def ordinary(batch: int = 7, num_classes: int = 9, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, num_classes, dtype=torch.float64) * spread, torch.randint(num_classes, (batch,))


def assert_is_literal(logits, labels, tolerance=1e-11, **settings):
    found, expected = guidance_gradient(logits, labels, **settings), literal(logits, labels, **settings)
    for name in found._fields:
        assert_near(getattr(found, name), getattr(expected, name), tolerance, name)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("divergence", NAMES)
def test_closed_form_is_the_definition(divergence, settings):
    logits, labels = ordinary()
    assert_is_literal(logits, labels, divergence=divergence, **settings)


@pytest.mark.parametrize("name", [name for name in CODES if name != "alpha"])
def test_every_name_in_the_table_has_a_definition(name):
    assert phi(name)(torch.tensor([0.5], dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("divergence", NAMES)
def test_phi_is_convex_and_zero_at_one(divergence):
    t = torch.linspace(0.05, 4, 80, dtype=torch.float64)
    values = phi(divergence)(t)
    assert phi(divergence)(torch.ones(1, dtype=torch.float64)).abs().item() < 1e-15
    assert (values.diff().diff() >= -1e-12).all()


@pytest.mark.parametrize("divergence", [name for name in NAMES if one_hot_divergence(name) is not None])
def test_one_hot_target_has_its_finite_limit(divergence):
    logits, labels = ordinary()
    assert_is_literal(logits, labels, divergence=divergence, epsilon=1.0)
    # no 0·log 0 either where p itself is one-hot in floating point
    sure = torch.tensor([[800.0, 0.0, -5.0]], dtype=torch.float64)
    found = guidance_gradient(sure, torch.tensor([0]), divergence, epsilon=1.0)
    assert found.divergence.item() == pytest.approx(0.0, abs=1e-15)
    assert_near(found.grad, torch.tensor([[0.5, 0.0, 0.0]], dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("divergence", ["forward_kl", "jeffreys", "chi2", "alpha:1.5", "alpha:2", "alpha:1"])
def test_one_hot_target_is_an_error_where_infinite(divergence):
    with pytest.raises(ValueError, match="infinite at epsilon=1"):
        guidance_gradient(*ordinary(), divergence, epsilon=1.0)


@pytest.mark.parametrize("divergence", NAMES)
def test_score_passes_gradcheck(divergence):
    logits, labels = ordinary(3, 5, 1.0)

    def score(logits):
        return guidance_score(logits, labels, divergence, alpha=0.8, joint_temperature=1.2, entropy_weight=0.4)

    assert torch.autograd.gradcheck(score, logits.requires_grad_())


@pytest.mark.parametrize("divergence", NAMES)
def test_gradient_sums_to_the_difference_of_temperatures(divergence):
    logits, labels = ordinary()
    found = guidance_gradient(
        logits, labels, divergence, joint_temperature=1.7, marginal_temperature=0.4, entropy_weight=0.9
    )
    assert_near(found.grad.sum(1), torch.full((7,), 1.3, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("divergence", NAMES)
def test_divergence_is_not_negative(divergence):
    for spread in (0.01, 1.0, 6.0):
        logits, labels = ordinary(50, 11, spread)
        assert (guidance_gradient(logits, labels, divergence, epsilon=0.7).divergence >= -1e-15).all()


@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 0.9])
def test_divergence_vanishes_at_its_target(divergence, epsilon):
    labels = torch.arange(4)
    target = torch.full((4, 4), (1 - epsilon) / 4, dtype=torch.float64)
    target[range(4), labels] += epsilon
    logits = target.log() + torch.randn(4, 1, dtype=torch.float64)
    found = guidance_gradient(logits, labels, divergence, epsilon=epsilon)
    assert_near(found.divergence, torch.zeros(4, dtype=torch.float64), 1e-14)
    # a minimum: the divergence adds nothing to the gradient
    assert_near(found.grad, guidance_gradient(logits, labels, "none").grad, 1e-14)


def test_js_and_hellinger_are_bounded():
    logits, labels = ordinary(200, 10, 40.0)
    js = guidance_gradient(logits, labels, "js", epsilon=1.0).divergence
    assert (js <= math.log(2) + 1e-15).all()
    assert js.max() > 0.999 * math.log(2)
    assert (guidance_gradient(logits, labels, "hellinger", epsilon=1.0).divergence <= 2 + 1e-15).all()


@pytest.mark.parametrize(("order", "limit"), [(1.0, "forward_kl"), (0.0, "reverse_kl")])
def test_alpha_family_tends_to_the_two_kls(order, limit):
    logits, labels = ordinary()
    expected = guidance_gradient(logits, labels, limit)
    near = guidance_gradient(logits, labels, f"alpha:{order + 1e-6}")
    assert_near(near.grad, expected.grad, 1e-4)
    assert_near(near.divergence, expected.divergence, 1e-4)
    exact = guidance_gradient(logits, labels, f"alpha:{order}")
    assert all(torch.equal(a, b) for a, b in zip(exact, expected))


@pytest.mark.parametrize(
    ("order", "name", "factor"), [(2, "chi2", 0.5), (-1, "neyman_chi2", 0.5), (0.5, "hellinger", 2)]
)
def test_alpha_family_holds_the_others(order, name, factor):
    logits, labels = ordinary()
    member, other = guidance_gradient(logits, labels, f"alpha:{order}"), guidance_gradient(logits, labels, name)
    assert_near(member.divergence, factor * other.divergence, 1e-12)


def test_jeffreys_is_the_sum_of_the_two_kls():
    logits, labels = ordinary()
    parts = [guidance_gradient(logits, labels, name).divergence for name in ("reverse_kl", "forward_kl")]
    assert_near(guidance_gradient(logits, labels, "jeffreys").divergence, sum(parts), 1e-13)


def test_no_divergence_at_unit_temperatures_is_the_log_probability():
    logits, labels = ordinary()
    found = guidance_gradient(logits, labels, "none", marginal_temperature=1.0)
    assert_near(found.score, logits.log_softmax(1)[range(7), labels], 1e-13)
    assert torch.equal(found.score, found.log_prob)


def test_adaptive_entropy_is_constant_in_its_own_weight():
    logits, labels = ordinary()
    entropy = guidance_gradient(logits, labels).entropy
    plain = guidance_gradient(logits, labels).grad
    unit = guidance_gradient(logits, labels, entropy_weight=1.0).grad - plain
    adaptive = guidance_gradient(logits, labels, entropy_weight=2.0, adaptive_entropy=True).grad - plain
    assert_near(adaptive, 2 * (1 - entropy / math.log(9))[:, None] * unit, 1e-12)


def test_saturation_is_what_the_design_says():
    """Where p is one-hot, only the push of the temperatures and reverse KL's pull back from the label are left."""
    logits = torch.zeros(1, 1000, dtype=torch.float64)
    logits[0, 3] = 27.0
    label = torch.tensor([3])
    plain = guidance_gradient(logits, label, "none").grad[0, 3].item()
    assert plain == pytest.approx(0.5, abs=2e-3)
    unit = {"marginal_temperature": 1.0}
    assert abs(guidance_gradient(logits, label, "none", **unit).grad[0, 3].item()) < 1e-8
    assert abs(guidance_gradient(logits, label, "js", **unit).grad[0, 3].item()) < 1e-6
    back = guidance_gradient(logits, label, "reverse_kl", **unit).grad[0, 3].item()
    assert back == pytest.approx(0.9 + 0.1 / 1000 - 1, abs=1e-6)


@pytest.mark.parametrize("divergence", NAMES)
def test_one_class(divergence):
    logits = torch.randn(3, 1, dtype=torch.float64)
    found = guidance_gradient(
        logits, torch.zeros(3, dtype=torch.int64), divergence, entropy_weight=1.0, adaptive_entropy=True
    )
    assert_near(found.grad, torch.full((3, 1), 0.5, dtype=torch.float64), 1e-15)
    for scalar in (found.entropy, found.divergence):
        assert_near(scalar, torch.zeros(3, dtype=torch.float64), 1e-15)
