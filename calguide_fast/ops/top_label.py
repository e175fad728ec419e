"""top_label: a classifier's confidence in its likeliest class, and whether it is right, in one pass over the logits."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from calguide_fast import backends
from calguide_fast.backends import reference
from calguide_fast.ops import checks
from calguide_fast.ops._library import LIBRARY, applied, dispatched, is_direct, leading, may_be_differentiated, once

LIBRARY.define("top_label(Tensor logits, Tensor labels) -> (Tensor confidence, Tensor top, Tensor correct)")
LIBRARY.define("top_label_backward(Tensor grad_confidence, Tensor logits, Tensor confidence, Tensor top) -> Tensor")


def top_label(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""The largest probability of each row of logits f, its class, and whether that is the label.

    With p = softmax(f) and top = argmax f, the first of equal ones,

        confidence = p_top = 1 / Σ_i exp(f_i − f_top),      ∂ confidence / ∂ f_i = p_top (1[i = top] − p_i).

    Differentiable once in ``logits``; works under ``torch.func`` (grad, vjp, vmap) and ``torch.compile``. Each
    direction reads the logits once, which must not be edited in place in between; the backward writes their gradient
    once.

    Args:
        logits: (n, C), float32, bfloat16, float16 or float64, any strides; C at least 1. A logit of −inf masks its
            class. A row with NaN or +inf, or of −inf alone, has confidence NaN, and so is its gradient.
        labels: (n,) integers in 0..C−1. One outside them is an error on a CPU; on a GPU, where a look at the labels
            would wait for the device, its row has confidence NaN.

    Returns:
        confidence (n,), float32 (float64 for float64); top (n,), int64, which is some class where the confidence is
        NaN; correct (n,), bool, which is false there.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or label.
    """
    labels = checks.logits_and_labels(logits, labels)
    if may_be_differentiated(logits):
        return applied(_Differentiable, logits, labels)
    return _label(logits, labels)


class _Differentiable(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _label(logits, labels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        confidence, top, correct = output
        ctx.mark_non_differentiable(top, correct)
        ctx.save_for_backward(inputs[0], confidence, top)

    @staticmethod
    def backward(ctx: Any, grad_confidence: Tensor, *_: Any) -> tuple[Tensor, None]:
        return once("top_label", _gradient, grad_confidence, *ctx.saved_tensors), None


def _label(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The op itself."""
    if is_direct(logits, labels):
        return _backend(logits).top_label(logits, labels)
    return dispatched(torch.ops.calguide_fast.top_label, logits, labels)


def _gradient(grad_confidence: Tensor, logits: Tensor, confidence: Tensor, top: Tensor) -> Tensor:
    """The backward op itself."""
    arguments = (grad_confidence, logits, confidence, top)
    if is_direct(*arguments):
        return _backend(logits).top_label_backward(*arguments)
    return dispatched(torch.ops.calguide_fast.top_label_backward, *arguments)


def _backend(logits: Tensor) -> ModuleType:
    # the kernels are in float32, whichever backend is asked for
    return reference if logits.dtype is torch.float64 else backends.choose(logits)


@torch.library.impl(LIBRARY, "top_label", "CompositeExplicitAutograd")
def _impl(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _backend(logits).top_label(logits, labels)


@torch.library.impl(LIBRARY, "top_label_backward", "CompositeExplicitAutograd")
def _backward_impl(grad_confidence: Tensor, logits: Tensor, confidence: Tensor, top: Tensor) -> Tensor:
    return _backend(logits).top_label_backward(grad_confidence, logits, confidence, top)


@torch.library.register_fake("calguide_fast::top_label", lib=LIBRARY)
def _fake(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = logits.shape[0]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(n, dtype=dtype), labels.new_empty(n), labels.new_empty(n, dtype=torch.bool)


@torch.library.register_fake("calguide_fast::top_label_backward", lib=LIBRARY)
def _backward_fake(grad_confidence: Tensor, logits: Tensor, confidence: Tensor, top: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_vmap("calguide_fast::top_label", lib=LIBRARY)
def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Tensor) -> Any:
    # rows are independent, so the mapped dimension is just more of them
    rows = _rows(info.batch_size, in_dims, arguments)
    found = torch.ops.calguide_fast.top_label(*rows)
    return tuple(part.unflatten(0, (info.batch_size, -1)) for part in found), (0, 0, 0)


@torch.library.register_vmap("calguide_fast::top_label_backward", lib=LIBRARY)
def _backward_vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Tensor) -> Any:
    rows = _rows(info.batch_size, in_dims, arguments)
    return torch.ops.calguide_fast.top_label_backward(*rows).unflatten(0, (info.batch_size, -1)), 0


def _rows(size: int, in_dims: tuple[Any, ...], arguments: tuple[Tensor, ...]) -> list[Tensor]:
    return [leading(argument, dim, size).flatten(0, 1) for argument, dim in zip(arguments, in_dims, strict=True)]
