"""guidance_gradient and guidance_score: what pulls a classifier's logits toward a label."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from calguide_fast import backends
from calguide_fast.ops import checks
from calguide_fast.ops._library import LIBRARY, applied, dispatched, is_direct, leading, once, plain_calls
from calguide_fast.ops.divergences import infinite_on_zeros, parse_divergence

# beyond it floats cannot hold what a temperature multiplies
MOST_TEMPERATURE = 1e30

LIBRARY.define(
    "guidance_gradient(Tensor logits, Tensor labels, int divergence, float order, float alpha, float epsilon, "
    "float joint_temperature, float marginal_temperature, float entropy_weight, bool adaptive_entropy) "
    "-> (Tensor grad, Tensor stats)"
)


class GuidanceGradient:
    """The result of :func:`guidance_gradient`; unpacks like the tuple (grad, score, log_prob, entropy, divergence).

    The scalars are views of one table, made when they are asked for, and the table may be NumPy's: a small call would
    spend half of its time on tensors that its caller may not look at. They are float32 (float64 for float64 logits).

    Attributes:
        grad: (B, C), of the logits' dtype.
        score: (B,), S.
        log_prob: (B,), τ₁ f_y − logsumexp(τ₂ f).
        entropy: (B,), H(p) in nats.
        divergence: (B,), D(q‖p), in nats for the KL family and JS.
    """

    __slots__ = ("grad", "_table")
    _fields = ("grad", "score", "log_prob", "entropy", "divergence")

    def __init__(self, grad: Tensor, table: Tensor | np.ndarray) -> None:
        self.grad = grad
        self._table = table

    @property
    def _stats(self) -> Tensor:
        """(5, B); vmap puts its dimension in front, so rows are counted from the back."""
        return torch.from_numpy(self._table) if isinstance(self._table, np.ndarray) else self._table

    def _row(self, row: int) -> Tensor:
        # NumPy's views take a tenth of the time of torch's
        table = self._table
        return torch.from_numpy(table[row]) if isinstance(table, np.ndarray) else table.select(-2, row)

    @property
    def score(self) -> Tensor:
        return self._row(0)

    @property
    def log_prob(self) -> Tensor:
        return self._row(1)

    @property
    def entropy(self) -> Tensor:
        return self._row(2)

    @property
    def divergence(self) -> Tensor:
        return self._row(3)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.grad, *self._stats.unbind(-2)[:4]))

    def __getitem__(self, index: int) -> Tensor:
        return tuple(self)[index]

    def __len__(self) -> int:
        return len(self._fields)

    def _asdict(self) -> dict[str, Tensor]:
        return dict(zip(self._fields, self))

    def __repr__(self) -> str:
        return f"GuidanceGradient({', '.join(f'{name}={value}' for name, value in self._asdict().items())})"


# lets the result cross the boundary of a compiled or transformed function
register_pytree_node(
    GuidanceGradient,
    lambda result: ([result.grad, result._stats], None),
    lambda leaves, _: GuidanceGradient(*leaves),
    serialized_type_name="calguide_fast.GuidanceGradient",
)


class GuidanceStats(NamedTuple):
    """Rows of the op's second output, (5, B)."""

    score: Tensor
    log_prob: Tensor
    entropy: Tensor
    divergence: Tensor
    label_log_prob: Tensor  # log softmax(f)_y at temperature 1


Settings = tuple[int, float, float, float, float, float, float, bool]


def guidance_settings(
    divergence: str,
    alpha: float,
    epsilon: float,
    joint_temperature: float,
    marginal_temperature: float,
    entropy_weight: float,
    adaptive_entropy: bool,
) -> Settings:
    """Check the settings of the score and bring them into the order of the op's schema.

    Raises:
        TypeError: a setting is of the wrong type.
        ValueError: a setting is unknown, not finite or out of range, or D would be infinite.
    """
    # the compiler traces through a cache, and warns of it
    check = _checked_settings if torch.compiler.is_dynamo_compiling() else _cached_settings
    return check(divergence, alpha, epsilon, joint_temperature, marginal_temperature, entropy_weight, adaptive_entropy)


def _checked_settings(
    divergence: str,
    alpha: float,
    epsilon: float,
    joint_temperature: float,
    marginal_temperature: float,
    entropy_weight: float,
    adaptive_entropy: bool,
) -> Settings:
    code, order = parse_divergence(divergence)
    alpha = checks.number("alpha", alpha, low=0.0)
    epsilon = checks.number("epsilon", epsilon, 0.0, 1.0)
    if epsilon == 1.0 and infinite_on_zeros(code, order):
        raise ValueError(
            f"divergence={divergence!r} is infinite at epsilon=1.0 (a one-hot target); choose epsilon below 1"
        )
    if not isinstance(adaptive_entropy, bool):
        raise TypeError(f"adaptive_entropy must be True or False, got {adaptive_entropy!r}")
    return (
        code,
        order,
        alpha,
        epsilon,
        checks.number("joint_temperature", joint_temperature, low=0.0, high=MOST_TEMPERATURE),
        checks.number("marginal_temperature", marginal_temperature, low=0.0, high=MOST_TEMPERATURE),
        checks.number("entropy_weight", entropy_weight),
        adaptive_entropy,
    )


# typed: 1 and True are equal keys, and one of them is an error
_cached_settings = functools.lru_cache(maxsize=256, typed=True)(_checked_settings)


def guidance_gradient(
    logits: Tensor,
    labels: Tensor,
    divergence: str = "js",
    alpha: float = 1.0,
    epsilon: float = 0.9,
    joint_temperature: float = 1.0,
    marginal_temperature: float = 0.5,
    entropy_weight: float = 0.0,
    adaptive_entropy: bool = False,
    out: Tensor | None = None,
) -> GuidanceGradient:
    r"""The gradient of the guidance score with respect to the logits, in closed form and one pass.

    The score of image b, with p = softmax(f), p₂ = softmax(τ₂ f), H(p) the entropy in nats and the smoothed target
    q_i = (1−ε)/C + ε·1[i=y], is

        S = τ₁ f_y − logsumexp(τ₂ f) − α D_φ(q‖p) + λ H(p),      D_φ(q‖p) = Σ_i q_i φ(p_i / q_i),

    and its gradient, with w_i = p_i φ′(p_i / q_i),

        G_i = τ₁ 1[i=y] − τ₂ p₂_i − α (w_i − p_i Σ_j w_j) − λ p_i (log p_i + H).

    Feed ``grad`` to ``torch.autograd.grad(logits, x, grad_outputs=grad)`` for the image gradient.

    Args:
        logits: (B, C), float32, bfloat16, float16 or float64, any strides. A logit of −inf masks its class: the row's
            result is that of the other classes alone. NaN or +inf gives NaN in its own row.
        labels: (B,) integers in 0..C−1. One outside them is an error on a CPU; on a GPU, where a look at the labels
            would wait for the device, its row is NaN.
        divergence: ``"reverse_kl"`` is KL(q‖p), ``"forward_kl"`` KL(p‖q), ``"js"``, ``"jeffreys"``, ``"hellinger"``,
            ``"chi2"``, ``"neyman_chi2"``, ``"alpha:a"`` (Cressie-Read of order a) or ``"none"``.
        alpha: weight α ≥ 0 of the divergence.
        epsilon: weight ε of the label in q, from 0 (uniform) to 1 (one-hot); the reverse of label smoothing's ε.
        joint_temperature: τ₁ in [0, 1e30], multiplies the label's logit.
        marginal_temperature: τ₂ in [0, 1e30], multiplies the logits inside the log-sum-exp; absolute, not relative to
            τ₁.
        entropy_weight: λ, in score per nat.
        adaptive_entropy: use λ_b = λ (1 − H(p_b)/log C) for each image, with no gradient through λ_b: strongest where
            the classifier is surest. This is our reading of the paper's "adaptive" entropy term, for which its
            abstract gives no formula.
        out: (B, C) contiguous, of the logits' dtype and device; ``grad`` is written there.

    Returns:
        ``GuidanceGradient(grad, score, log_prob, entropy, divergence)``: grad (B, C), the others (B,).

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, label or setting, before any work.

    Source: arXiv 2511.05844 (f-divergence and entropy terms); EluCD, arXiv 2310.11311 (the two temperatures).
    The defaults of α and ε are this package's own.
    """
    settings = guidance_settings(
        divergence, alpha, epsilon, joint_temperature, marginal_temperature, entropy_weight, adaptive_entropy
    )
    if (plain := plain_calls(logits)) is not None:
        found = plain.plain_guidance_gradient(torch.get_num_threads(), logits, labels, out, settings)
        if found is not None:
            return GuidanceGradient(*found)
    return GuidanceGradient(*gradient_and_stats(logits, labels, settings, out))


def gradient_and_stats(
    logits: Tensor, labels: Tensor, settings: Settings, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The op itself, for callers that have checked settings: grad (B, C) and the rows of GuidanceStats (5, B)."""
    labels = _check_inputs(logits, labels, out)
    if is_direct(logits, labels, out):
        return backends.choose(logits).guidance_gradient(logits, labels, *settings, out)
    grad, stats = dispatched(torch.ops.calguide_fast.guidance_gradient, logits, labels, *settings)
    return (grad if out is None else out.copy_(grad)), stats


def guidance_score(
    logits: Tensor,
    labels: Tensor,
    divergence: str = "js",
    alpha: float = 1.0,
    epsilon: float = 0.9,
    joint_temperature: float = 1.0,
    marginal_temperature: float = 0.5,
    entropy_weight: float = 0.0,
    adaptive_entropy: bool = False,
) -> Tensor:
    """The guidance score S of each image, differentiable in the logits; its backward is the closed form.

    Arguments and errors are those of :func:`guidance_gradient`. Works under autograd, ``torch.func`` (grad, vjp,
    vmap) and ``torch.compile``, though not where the transform is compiled as well; it can be differentiated once.
    Until the backward pass the logits must not be edited in place.

    Returns:
        (B,) scores, float32 (float64 for float64 logits).

    Raises:
        RuntimeError: in the backward pass, PyTorch's, of logits "modified by an inplace operation" since.
    """
    settings = guidance_settings(
        divergence, alpha, epsilon, joint_temperature, marginal_temperature, entropy_weight, adaptive_entropy
    )
    return applied(_Score, logits, _check_inputs(logits, labels, None), settings)[0]


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, labels: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
        grad, stats = gradient_and_stats(logits, labels, settings)
        return stats[0].clone(), grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        grad = output[1]
        ctx.mark_non_differentiable(grad)
        # the logits, too, so that a second derivative in them is noticed
        ctx.save_for_backward(grad, inputs[0])

    @staticmethod
    def backward(ctx: Any, score_grad: Tensor, _: Any) -> tuple[Tensor, None, None]:
        return once("guidance_score", _times_rows, score_grad, *ctx.saved_tensors), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], logits: Tensor, labels: Tensor, settings: Settings) -> Any:
        # images are independent, so the mapped dimension is just more of them
        n = info.batch_size
        logits = leading(logits, in_dims[0], n)
        labels = leading(labels, in_dims[1], n)
        score, grad = _Score.apply(logits.flatten(0, 1), labels.flatten(0, 1), settings)
        return (score.unflatten(0, (n, -1)), grad.unflatten(0, (n, -1))), (0, 0)


def _times_rows(score_grad: Tensor, grad: Tensor, _: Tensor) -> Tensor:
    return score_grad.to(grad.dtype)[:, None] * grad


def _check_inputs(logits: Tensor, labels: Tensor, out: Tensor | None) -> Tensor:
    labels = checks.logits_and_labels(logits, labels)
    if out is not None:
        checks.shaped("out", out, logits.shape)
        checks.same_device("out", out, "logits", logits)
        if out.dtype != logits.dtype or not out.is_contiguous():
            raise ValueError(f"out must be contiguous and of dtype {logits.dtype}, like the logits")
    return labels


def _stats_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@torch.library.impl(LIBRARY, "guidance_gradient", "CompositeExplicitAutograd")
def _impl(logits: Tensor, labels: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return backends.choose(logits).guidance_gradient(logits, labels, *settings, None)


@torch.library.register_fake("calguide_fast::guidance_gradient", lib=LIBRARY)
def _fake(logits: Tensor, labels: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    grad = logits.new_empty(logits.shape)
    return grad, logits.new_empty((len(GuidanceStats._fields), logits.shape[0]), dtype=_stats_dtype(logits))


@torch.library.register_vmap("calguide_fast::guidance_gradient", lib=LIBRARY)
def _vmap(info: Any, in_dims: tuple[Any, ...], logits: Tensor, labels: Tensor, *settings: Any) -> Any:
    n = info.batch_size
    logits = leading(logits, in_dims[0], n)
    labels = leading(labels, in_dims[1], n)
    grad, stats = torch.ops.calguide_fast.guidance_gradient(logits.flatten(0, 1), labels.flatten(0, 1), *settings)
    return (grad.unflatten(0, (n, -1)), stats.unflatten(1, (n, -1))), (0, 1)
