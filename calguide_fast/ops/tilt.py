"""tilt_weights: how strongly each image of a batch is guided under tilted sampling."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from calguide_fast import backends
from calguide_fast.ops import checks
from calguide_fast.ops._library import LIBRARY, dispatched, is_direct, plain_calls

LIBRARY.define("tilt_weights(Tensor scores, float tilt, bool normalize_sum, float max_weight) -> Tensor")


def tilt_weights(
    scores: Tensor,
    tilt: float,
    normalize: str = "mean",
    max_weight: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The weights that tilted sampling gives the images of a batch.

    The tilted objective (1/t) log((1/B) Σ_b exp(t s_b)) has the gradient Σ_b softmax_b(t s_b) ∇s_b; image b's guidance
    is multiplied by w_b = B·softmax_b(t s_b), whose mean is 1, so that t → 0 is plain guidance. t < 0 favours images
    the classifier is unsure of (diversity), t > 0 those it is sure of.

    Args:
        scores: (B,), usually log-probabilities in nats.
        tilt: t, per nat.
        normalize: ``"mean"`` (weights average 1) or ``"sum"`` (they sum to 1, the paper's literal weights).
        max_weight: clip the weights here, without renormalising; None for no clip.
        group: of ``torch.distributed``; the images of all its ranks, which all call this with the same settings, are
            then weighed together. They may have different numbers of images. Not for compilers and transforms.

    Returns:
        (B,) weights, float32 (float64 for float64 scores).

    Raises:
        TypeError, ValueError: a wrong dtype, shape or setting.

    Source: arXiv 2511.05844, after Li et al., *Tilted Empirical Risk Minimization*, arXiv 2007.01162.
    """
    arguments = tilt_settings(tilt, normalize, max_weight)
    if group is None and (plain := plain_calls(scores)) is not None:
        weights = plain.plain_tilt_weights(scores, *arguments)
        if weights is not None:
            return weights
    checks.floating("scores", scores)
    if scores.ndim != 1:
        raise ValueError(f"scores has shape {tuple(scores.shape)}; it must be (B,)")
    if group is not None:
        return _over_ranks(scores, *arguments, group)
    if is_direct(scores):
        return _impl(scores, *arguments)
    return dispatched(torch.ops.calguide_fast.tilt_weights, scores, *arguments)


def tilt_settings(tilt: float, normalize: str, max_weight: float | None) -> tuple[float, bool, float]:
    """Check the settings and bring them into the order of the op's schema."""
    tilt = checks.number("tilt", tilt)
    if normalize not in ("mean", "sum"):
        raise ValueError(f"normalize={normalize!r} must be 'mean' or 'sum'")
    limit = math.inf if max_weight is None else checks.number("max_weight", max_weight, low=0.0)
    return tilt, normalize == "sum", limit


@torch.library.impl(LIBRARY, "tilt_weights", "CompositeExplicitAutograd")
def _impl(scores: Tensor, tilt: float, normalize_sum: bool, max_weight: float) -> Tensor:
    if scores.dtype not in (torch.float32, torch.float64):
        scores = scores.float()
    return backends.choose(scores).tilt_weights(scores, tilt, normalize_sum, max_weight)


@torch.no_grad()
def _over_ranks(
    scores: Tensor, tilt: float, normalize_sum: bool, max_weight: float, group: dist.ProcessGroup
) -> Tensor:
    """This rank's weights: the log-sum-exp is taken over all ranks, its maximum first, then the sum."""
    tilted = tilt * scores.double()
    largest = tilted.max() if len(tilted) else tilted.new_tensor(-math.inf)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    # a maximum may lose a NaN on its way between ranks; their sum does not
    parts = (tilted - largest).exp()
    totals = torch.stack([parts.sum(), torch.full_like(largest, len(parts))])
    dist.all_reduce(totals, dist.ReduceOp.SUM, group)
    weights = parts / totals[0] if normalize_sum else parts * (totals[1] / totals[0])
    return weights.clamp(max=max_weight).to(scores.dtype if scores.dtype == torch.float64 else torch.float32)


@torch.library.register_fake("calguide_fast::tilt_weights", lib=LIBRARY)
def _fake(scores: Tensor, tilt: float, normalize_sum: bool, max_weight: float) -> Tensor:
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return scores.new_empty(scores.shape, dtype=dtype)
