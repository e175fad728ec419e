"""What networks say of themselves, where a sampler's caller says nothing: schedule, shape, classes, noise levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from calguide_fast.ops.checks import is_integer
from calguide_fast.schedule import Schedule


def said(value: Any, network: Any, name: str, default: Any = None) -> Any:
    """``value`` if given, else what the network says of itself."""
    if value is not None:
        return value
    found = getattr(network, name, None)
    return default if found is None else found


def schedule_of(model: Any) -> Schedule:
    found = getattr(model, "schedule", None)
    return found if isinstance(found, Schedule) else Schedule.linear()


def num_classes_of(
    given: int | None,
    classifiers: Sequence[Callable[..., Tensor]],
    model: Any,
    class_conditional: bool,
    null_class: int | None,
) -> int | None:
    """How many classes there are to draw labels from, as far as anybody says.

    Raises:
        ValueError: no positive integer, more than the classifiers have, or networks that disagree.
    """
    if given is not None and (not is_integer(given) or given < 1):
        raise ValueError(f"num_classes={given!r} must be a positive integer")
    numbers = {number for network in classifiers if (number := said(None, network, "num_classes")) is not None}
    if len(numbers) > 1:
        raise ValueError(f"the classifiers must have the same classes; their num_classes are {sorted(numbers)}")
    known = said(None, model, "num_classes")
    if numbers:
        (number,) = numbers
        # the model may know one more, which is its null class
        if class_conditional and known is not None and number not in (known, known - 1):
            raise ValueError(
                f"the classifier has num_classes={number} and the model {known}: they must be the same, or the model's "
                "one more, for a null class"
            )
        if given is not None and given > number:
            raise ValueError(f"num_classes={given} must be at most {number}, which are the classifier's")
        return number if given is None else given
    if given is not None:
        return given
    # a model that was trained with a null class may count it, last, among its own
    return known - 1 if known is not None and null_class == known - 1 else known


def image_shape_of(shape: Sequence[int] | None, model: Any) -> tuple[int, ...]:
    if shape is None:
        channels, size = getattr(model, "in_channels", None), getattr(model, "image_size", None)
        if channels is None or size is None:
            raise ValueError(
                "shape=(C, H, W) must be given: the model has no in_channels and image_size to read it off"
            )
        height, width = size if isinstance(size, Sequence) else (size, size)
        shape = (channels, height, width)
    if not all(is_integer(side) and side > 0 for side in shape) or len(shape) < 2:
        raise ValueError(f"shape={tuple(shape)!r} must be (C, *spatial), positive integers")
    return tuple(map(int, shape))


def denoiser_range_of(model: Any) -> tuple[float, float]:
    """The noise levels, lowest first, between which an EDM denoiser, a model with ``denoise``, can be used.

    Raises:
        TypeError: ``denoise`` is no method, or a noise level is missing or no number.
    """
    if not callable(model.denoise):
        raise TypeError(
            "model.denoise makes a model an EDM denoiser, and must be a method denoise(x, sigma, **model_kwargs); got "
            f"{type(model.denoise).__name__}"
        )
    ends = [getattr(model, name, None) for name in ("sigma_min", "sigma_max")]
    try:
        low, high = map(float, ends)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(
            "model.denoise makes a model an EDM denoiser, and needs the noise levels model.sigma_min and "
            f"model.sigma_max beside it; got {ends[0]!r} and {ends[1]!r}"
        ) from None
    return low, high
