"""Guides: what gives the gradients that images are guided by, classifiers or a user's own function of the image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from calguide_fast.ensemble import Member, mean_gradient
from calguide_fast.guidance import Guidance, ImageGradient
from calguide_fast.networks import at_most_float32, dtype_of, layout_of
from calguide_fast.ops.guidance import GuidanceStats
from calguide_fast.ops.tilt import tilt_weights
from calguide_fast.scratch import Scratch


class Guide(Protocol):
    """Gives image gradients."""

    @property
    def sees_x0(self) -> bool:
        """Whether it looks at x̂₀, and not at x_t."""

    def gradient(
        self, guidance: Guidance, x: Tensor, t: Tensor, labels: Tensor, scratch: Scratch | None = None
    ) -> ImageGradient:
        """The gradient at x, (B, C, *spatial), without scale and tilt, at most float32, and each image's scalars."""


@dataclass(frozen=True)
class Classifiers:
    """One classifier, or several that guide by the mean of their scores.

    Attributes:
        members: the classifiers.
        sees_x0: they are ``classifier(x0)``; else ``classifier(x_t, t)``.
        transform: differentiable, applied to x̂₀ before them.
    """

    members: Sequence[Member]
    sees_x0: bool
    transform: Callable[[Tensor], Tensor] | None = None

    def gradient(
        self, guidance: Guidance, x: Tensor, t: Tensor, labels: Tensor, scratch: Scratch | None = None
    ) -> ImageGradient:
        scratch = Scratch(kept=False) if scratch is None else scratch
        found = [
            self._gradient_of(member, guidance, x, t, labels, scratch.part(f"classifier {i}"))
            for i, member in enumerate(self.members)
        ]
        return mean_gradient(found, [member.share for member in self.members], scratch)

    def input_of_all(self) -> tuple[torch.dtype, torch.memory_format] | None:
        """The dtype and layout that all want their input in; None where they differ."""
        wanted = {(member.dtype, member.layout) for member in self.members}
        return wanted.pop() if len(wanted) == 1 else None

    def _gradient_of(
        self, member: Member, guidance: Guidance, x: Tensor, t: Tensor, labels: Tensor, scratch: Scratch
    ) -> ImageGradient:
        x = scratch.cast("input", x, member.dtype, member.layout)
        gradient, stats = guidance.image_gradient(lambda x: self._classify(member.network, x, t), x, labels, scratch)
        narrowed = None if stats is None else GuidanceStats(*map(at_most_float32, stats))
        return ImageGradient(at_most_float32(gradient), narrowed)

    def _classify(self, classifier: Callable[..., Tensor], x: Tensor, t: Tensor) -> Tensor:
        """The classifier's logits of x̂₀ or x_t."""
        if not self.sees_x0:
            return classifier(x, t)
        return classifier(x if self.transform is None else self.transform(x))


@dataclass(frozen=True)
class OwnGradient:
    """A user's ``cond_fn(x_t, t, y=labels, **model_kwargs)``, which gives the gradient itself."""

    cond_fn: Callable[..., Tensor]
    model_kwargs: Mapping[str, Any]
    sees_x0: bool = False

    def gradient(
        self, guidance: Guidance, x: Tensor, t: Tensor, labels: Tensor, scratch: Scratch | None = None
    ) -> ImageGradient:
        return ImageGradient(at_most_float32(self.cond_fn(x, t, y=labels, **self.model_kwargs)), None)


def as_member(network: Callable[..., Tensor], share: float = 1.0) -> Member:
    """A classifier as one of several, or alone."""
    return Member(network, share, dtype_of(network), layout_of(network))


def weights_of(
    guidance: Guidance, found: ImageGradient, group: torch.distributed.ProcessGroup | None = None
) -> Tensor | None:
    """The (B,) weights of a tilt if there is one."""
    scores = None if found.stats is None else guidance.tilted(found.stats)
    if scores is None:
        return None
    return tilt_weights(scores, guidance.tilt, max_weight=guidance.tilt_max, group=group)


def per_image(weights: Tensor, x: Tensor) -> Tensor:
    """(B,) weights that multiply images (B, C, *spatial)."""
    return weights.view(-1, *[1] * (x.ndim - 1))
