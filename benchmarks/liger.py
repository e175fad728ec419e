"""Liger-Kernel's divergences, which are Triton's and for a GPU: the rows that run where it and one are."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from peers import ALPHA, EPSILON, TAU
from torch import Tensor

DIVERGENCES = ("reverse_kl", "js")


def missing(device: torch.device) -> str | None:
    """Why there are no such rows, if there are none."""
    if device.type != "cuda":
        return "Liger-Kernel's JSD and KLDiv (Triton kernels) need a GPU"
    if importlib.util.find_spec("liger_kernel") is None:
        return "Liger-Kernel is not installed (pip install liger-kernel)"
    return None


def gradient(divergence: str) -> Callable[[Tensor, Tensor], Tensor]:
    """G by autograd through Liger's divergence, whose kernel computes its own gradient in log p on the way.

    Its result is the sum over the batch, so that there are no scores of the images.
    """
    from liger_kernel.transformers.jsd import LigerJSD
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    # of the mean over images
    distance = LigerJSD(beta=0.5) if divergence == "js" else LigerKLDIVLoss(reduction="batchmean", log_target=False)

    def run(logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits.detach().requires_grad_()
        log_p = torch.log_softmax(logits, 1)
        q = torch.full_like(logits, (1 - EPSILON) / logits.shape[1])
        q.scatter_add_(1, labels[:, None], torch.full_like(q[:, :1], EPSILON))
        total = len(logits) * distance(log_p, q.log() if divergence == "js" else q)
        log_prob = logits.gather(1, labels[:, None]).squeeze(1) - torch.logsumexp(TAU * logits, 1)
        return torch.autograd.grad(log_prob.sum() - ALPHA * total, logits)[0]

    return run
