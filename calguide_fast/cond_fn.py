"""as_cond_fn: this guidance in guided-diffusion's own sampling loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calguide_fast.classifiers import Classifier, as_single
from calguide_fast.guidance import Guidance
from calguide_fast.guides import Classifiers, as_member, per_image, weights_of
from calguide_fast.networks import check_callable
from calguide_fast.ops.step import predict_x0
from calguide_fast.schedule import Schedule


def as_cond_fn(
    classifier: Classifier,
    guidance: Guidance | None = None,
    schedule: str | Schedule | Sequence[float] | np.ndarray | Tensor = "linear",
    classifier_input: str | None = None,
    *,
    model: Callable[..., Tensor] | None = None,
    classifier_transform: Callable[[Tensor], Tensor] | None = None,
    clip_denoised: bool = True,
) -> CondFn:
    """A ``cond_fn(x, t, y=labels)`` for the loops of openai/guided-diffusion, which guides as ``guidance`` says.

    Example::

        cond_fn = as_cond_fn(resnet101, Guidance("js"), schedule="linear")
        diffusion.p_sample_loop(
            model_fn, shape, cond_fn=cond_fn, denoised_fn=cond_fn.denoised_fn, model_kwargs={"y": labels}
        )

    An off-the-shelf classifier (``classifier_input="x0"``) needs x̂₀, which a cond_fn is not given. ``denoised_fn``
    of the result picks it up where the loop has just predicted it, at no cost. A loop that has no such hook can do
    without, if ``model`` is given here: the network is then run a second time in each step.

    Args:
        classifier: ``classifier(x0)`` or, for ``classifier_input="xt"``, ``classifier(x_t, t)``, with t as the loop
            gives it; returns logits (B, num_classes) and is differentiable. Or what
            :func:`calguide_fast.models.load_classifier` returns.
        guidance: a :class:`calguide_fast.Guidance`; its defaults if not given. ``scale`` and ``tilt`` are applied here;
            ``sine_boost`` belongs to a sampler, which knows the variance, and so does ``rule="edm"``.
        schedule: the original process, before respacing. It says which noise level t is, for ``interval`` and
            ``model``; T decides how a rescaled t (``rescale_timesteps=True``: fractional, in 0..1000) is read.
        classifier_input: ``"x0"`` or ``"xt"``; if not given, what a loaded classifier looks at, or ``"x0"``.
        model: ``model(x, t, y=labels)`` returning ε̂ (B, C, *spatial), or ε̂ and v: what the loop itself is given.
        classifier_transform: differentiable, applied to x̂₀ before the classifier.
        clip_denoised: clip x̂₀ to [−1, 1], as the loop does.

    Returns:
        :class:`CondFn`. It returns the gradient (B, C, *spatial) in float32, and reads all of t as one timestep.

    Raises:
        TypeError, ValueError: for settings that are wrong or contradict each other.

    Source: Dhariwal & Nichol, arXiv 2105.05233; the convention is that of openai/guided-diffusion.
    """
    network, seen = as_single(classifier, classifier_input)
    return CondFn(
        network,
        Guidance() if guidance is None else guidance,
        Schedule.of(schedule),
        seen,
        model,
        classifier_transform,
        clip_denoised,
    )


class CondFn:
    """What :func:`as_cond_fn` returns."""

    def __init__(
        self,
        classifier: Callable[..., Tensor],
        guidance: Guidance,
        schedule: Schedule,
        classifier_input: str,
        model: Callable[..., Tensor] | None,
        classifier_transform: Callable[[Tensor], Tensor] | None,
        clip_denoised: bool,
    ) -> None:
        if not isinstance(guidance, Guidance):
            raise TypeError(f"guidance must be a Guidance or None, got {type(guidance).__name__}")
        if model is not None:
            check_callable("model", model)
        if classifier_transform is not None:
            check_callable("classifier_transform", classifier_transform)
        if classifier_input == "xt" and (model is not None or classifier_transform is not None):
            raise ValueError("model and classifier_transform are for classifier_input='x0'")
        if guidance.sine_boost:
            raise ValueError(
                f"sine_boost={guidance.sine_boost!r} adds to the step's variance, which a cond_fn does not know; "
                "FDivSampler does"
            )
        if guidance.rule != "score":
            raise ValueError(f"rule={guidance.rule!r} belongs to FDivSampler's method='heun'; a cond_fn needs 'score'")
        self.classifier, self.guidance, self.schedule, self.model = classifier, guidance, schedule, model
        self.classifier_input, self.classifier_transform = classifier_input, classifier_transform
        self.clip_denoised = clip_denoised
        timeline = schedule.respaced(schedule.num_timesteps)
        self._sigmas, self._coefficients = timeline.sigmas, timeline.coefficients()
        self._x0: Tensor | None = None

    def denoised_fn(self, x0: Tensor) -> Tensor:
        """For the loop's ``denoised_fn``: remembers x̂₀ (B, C, *spatial) for the step's guidance, and returns it."""
        self._x0 = x0
        return x0

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None, **model_kwargs: Any) -> Tensor:
        """The guidance of x (B, C, *spatial) at t (B,) toward labels y (B,): (B, C, *spatial) float32.

        Raises:
            ValueError: y is missing, or not (B,) labels; or the classifier sees x̂₀, and neither ``denoised_fn`` nor
                a model has given it.
        """
        if y is None:
            raise ValueError("cond_fn needs the labels: pass model_kwargs={'y': labels} to the loop")
        # what was remembered belongs to this step alone
        x0, self._x0 = self._x0, None
        if self.guidance.interval is not None and not self.guidance.guides_at(self._sigmas[self._timestep(t)]):
            return torch.zeros_like(x, dtype=torch.float32)
        sees_x0 = self.classifier_input == "x0"
        if sees_x0:
            x = self._predicted(x, t, y, model_kwargs) if x0 is None else self._clipped(x0)
        # looked at in each step, as its owner may convert it
        guide = Classifiers((as_member(self.classifier),), sees_x0, self.classifier_transform)
        found = guide.gradient(self.guidance, x, t, y)
        factor = torch.full_like(y, self.guidance.scale, dtype=torch.float32)
        weights = weights_of(self.guidance, found)
        if weights is not None:
            factor *= weights
        return found.gradient.float() * per_image(factor, x)

    def _predicted(self, x: Tensor, t: Tensor, y: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """x̂₀, by running the model once more."""
        if self.model is None:
            raise ValueError(
                "the classifier sees x0, which a cond_fn is not given: pass denoised_fn=cond_fn.denoised_fn to the "
                "loop, or model= to as_cond_fn"
            )
        output = self.model(x, t, y=y, **model_kwargs)
        coefficients = self._coefficients[self._timestep(t)].to(x.device)
        return predict_x0(x.float(), output.float(), coefficients, self.clip_denoised)

    def _clipped(self, x0: Tensor) -> Tensor:
        return x0.clamp(-1, 1) if self.clip_denoised else x0

    def _timestep(self, t: Tensor) -> int:
        """The original timestep, of the t that a respaced loop gives to its networks."""
        first, count = t.flatten()[0].item(), self.schedule.num_timesteps
        index = round(first * count / 1000) if t.is_floating_point() else int(first)
        if not 0 <= index < count:
            raise ValueError(f"t={first!r} is timestep {index} of the original process; schedule has {count}")
        return index
