"""How a kernel walks over images of any number of spatial dimensions: by three strides."""

from __future__ import annotations

from torch import Tensor


def steppable(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where no one stride steps through its pixels."""
    return tensor.contiguous() if _pixel_stride(tensor) is None else tensor


def image_strides(tensor: Tensor | None) -> tuple[int, int, int]:
    """(image, channel, pixel) strides of a steppable tensor; zeros for an absent one."""
    return (0, 0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1), _pixel_stride(tensor) or 0)


def _pixel_stride(tensor: Tensor) -> int | None:
    pixel = following = None
    for size, stride in zip(tensor.shape[:1:-1], tensor.stride()[:1:-1], strict=True):
        if size == 1:
            continue
        if pixel is None:
            pixel = stride
        elif stride != following:
            return None
        following = size * stride
    return 1 if pixel is None else pixel
