"""predict_x0 and guided_step: tiles of (images, elements), each element in fp32, the formulas of `csrc/step_math.h`."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from calguide_fast.backends.layout import image_strides, steppable
from calguide_fast.backends.triton.launch import as_double, device_of, doubles, tile_shape
from calguide_fast.backends.triton.noise import TILE, UNFUSED, normals
from calguide_fast.backends.triton.tilt import softmax_sums, tilt_weight

# of a program
WARPS = 4


@triton.jit
def _place(elements, pixels, batch, IMAGES: tl.constexpr, BLOCK: tl.constexpr, FLAT: tl.constexpr, INDEX: tl.constexpr):
    """A program's images [IMAGES, 1], elements, channels, pixels [1, BLOCK], which of them exist, the first element."""
    tiles = tl.cdiv(elements, BLOCK)
    image = (tl.program_id(0) // tiles).to(tl.int64) * IMAGES + tl.arange(0, IMAGES)
    first = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK
    element = first + tl.arange(0, BLOCK)
    mask = (image < batch)[:, None] & (element < elements)[None, :]
    if FLAT:
        channel = tl.zeros([BLOCK], tl.int64)
        pixel = element
    else:
        # one long division for the program, and short ones for its elements
        before = first // pixels
        local = (first - before * pixels).to(INDEX) + tl.arange(0, BLOCK)
        channel = before + local // pixels
        pixel = (local % pixels).to(tl.int64)
    return image[:, None], element[None, :], channel[None, :], pixel[None, :], mask, first


@triton.jit
def _load(tensor, image, channel, pixel, image_stride, channel_stride, pixel_stride, mask):
    offset = image * image_stride + channel * channel_stride + pixel * pixel_stride
    return tl.load(tensor + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _clipped(x0, CLIP: tl.constexpr):
    """x0 within [-1, 1]; a NaN fails both comparisons and stays."""
    if CLIP:
        x0 = tl.where(x0 < -1.0, -1.0, x0)
        x0 = tl.where(x0 > 1.0, 1.0, x0)
    return x0


@triton.jit(do_not_specialize=["batch"])
def _predict_kernel(
    x_t, model_output, out, coefficients, batch, elements, pixels,
    x_image, x_channel, x_pixel, m_image, m_channel, m_pixel, o_image, o_channel, o_pixel,
    CLIP: tl.constexpr, IMAGES: tl.constexpr, BLOCK: tl.constexpr, FLAT: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    image, element, channel, pixel, mask, first = _place(elements, pixels, batch, IMAGES, BLOCK, FLAT, INDEX)
    x = _load(x_t, image, channel, pixel, x_image, x_channel, x_pixel, mask)
    eps = _load(model_output, image, channel, pixel, m_image, m_channel, m_pixel, mask)
    x0 = _clipped(tl.load(coefficients) * x - tl.load(coefficients + 1) * eps, CLIP)
    tl.store(out + image * o_image + channel * o_channel + pixel * o_pixel, x0.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch", "scale", "tilt", "max_weight", "sine_boost"])
def _step_kernel(
    x_t, model_output, gradient, noise, out, coefficients, weights, scores, seeds, variance_max,
    batch, elements, pixels, v_offset,
    x_image, x_channel, x_pixel, m_image, m_channel, m_pixel, g_image, g_channel, g_pixel, z_image, z_channel, z_pixel,
    weight_stride, score_stride, seed_stride, maximum_stride,
    scale, tilt: tl.int64, max_weight: tl.int64, sine_boost,
    DDIM: tl.constexpr, LEARNED: tl.constexpr, MEAN: tl.constexpr, CLIP: tl.constexpr,
    IMAGES: tl.constexpr, BLOCK: tl.constexpr, FLAT: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    image, element, channel, pixel, mask, first = _place(elements, pixels, batch, IMAGES, BLOCK, FLAT, INDEX)
    there = image < batch
    c = coefficients
    x = _load(x_t, image, channel, pixel, x_image, x_channel, x_pixel, mask)
    eps = _load(model_output, image, channel, pixel, m_image, m_channel, m_pixel, mask)
    x0 = _clipped(tl.load(c) * x - tl.load(c + 1) * eps, CLIP)

    # an absent operand is a constant None, and its part is not compiled
    if gradient is not None:
        push = scale * _load(gradient, image, channel, pixel, g_image, g_channel, g_pixel, mask)
        if weights is not None:
            push *= tl.load(weights + image * weight_stride, mask=there, other=0.0)
        if scores is not None:
            top, total = softmax_sums(scores, score_stride, batch, as_double(tilt))
            score = tl.load(scores + image * score_stride, mask=there, other=0.0)
            unit = 1.0
            if MEAN:
                unit = batch.to(tl.float64)
            push *= tilt_weight(score, as_double(tilt), top, total, unit, as_double(max_weight))

    noise_scale = tl.load(c + 13)
    if DDIM:
        noise_scale *= tl.load(c + 10)
    z = tl.zeros([IMAGES, BLOCK], tl.float32)
    # a uniform branch: the last step of DDPM and all of plain DDIM draw nothing
    if noise_scale != 0.0:
        if seeds is not None:
            seed = tl.load(seeds + image * seed_stride, mask=there, other=0)
            z = normals(seed, first, tl.load(c + 14).to(tl.uint32), 0, IMAGES, BLOCK)
        if noise is not None:
            z = _load(noise, image, channel, pixel, z_image, z_channel, z_pixel, mask)

    if DDIM:
        # the noise that belongs to the clipped x0, which is what guidance shifts
        eps = (tl.load(c) * x - x0) * tl.div_rn(1.0, tl.load(c + 1))
        if gradient is not None:
            eps -= tl.load(c + 11) * push
            x0 = tl.load(c) * x - tl.load(c + 1) * eps
        x_prev = tl.load(c + 8) * x0 + tl.load(c + 9) * eps
        sd = noise_scale
    else:
        x_prev = tl.load(c + 2) * x0 + tl.load(c + 3) * x
        log_sd, log_span = 0.25 * (tl.load(c + 4) + tl.load(c + 5)), 0.25 * (tl.load(c + 4) - tl.load(c + 5))
        if LEARNED:
            v = _load(model_output + v_offset, image, channel, pixel, m_image, m_channel, m_pixel, mask)
            sd = tl.exp(log_sd + log_span * v)
            variance = sd * sd
        else:
            sd, variance = tl.load(c + 7), tl.load(c + 6)
        if variance_max is not None:
            # of the image's first pixel. Every program of an image finds the same maximum, before or after it is stored
            at_first = variance + tl.zeros([IMAGES, 1], tl.float32)
            if LEARNED:
                first_v = tl.load(model_output + v_offset + image * m_image, mask=there, other=0.0)
                at_first = tl.exp(log_sd + log_span * first_v.to(tl.float32))
                at_first *= at_first
            before = tl.load(variance_max + image * maximum_stride, mask=there, other=0.0)
            running = tl.where((at_first > before) | (at_first != at_first), at_first, before)
            if first == 0:
                tl.store(variance_max + image * maximum_stride, running, mask=there)
            variance += sine_boost * tl.load(c + 12) * running
        if gradient is not None:
            x_prev += variance * push
        sd *= noise_scale
    if (noise is not None) or (seeds is not None):
        x_prev += sd * z
    tl.store(out + image * elements + element, x_prev, mask=mask)


def _strides(channels: int, pixels: int, *tensors: Tensor | None) -> tuple[bool, list[int]]:
    """Whether one stride steps through all elements of an image in each tensor, and (image, channel, pixel) strides."""
    strides = [image_strides(tensor) for tensor in tensors]
    if pixels == 1:
        strides = [(image, channel, channel) for image, channel, _ in strides]
    flat = channels == 1 or pixels == 1 or all(channel == pixels * pixel for _, channel, pixel in strides)
    return flat, [stride for three in strides for stride in three]


def _tiles(batch: int, elements: int, pixels: int) -> tuple[tuple[int], dict[str, Any]]:
    """The grid over all images, and what a kernel is told of its tile."""
    images, block = tile_shape(elements, TILE, TILE)
    grid = (triton.cdiv(batch, images) * triton.cdiv(elements, block),)
    index = tl.int32 if pixels < 2**30 else tl.int64
    return grid, {"IMAGES": images, "BLOCK": block, "INDEX": index, "num_warps": WARPS, **UNFUSED}


def predict_x0(x_t: Tensor, model_output: Tensor, coefficients: Tensor, clip: bool, out: Tensor) -> Tensor:
    """Prediction of x0 from x_t and eps, written to `out` in its dtype and strides."""
    if not x_t.numel():
        return out
    batch, channels = x_t.shape[:2]
    elements = x_t.numel() // batch
    pixels = elements // channels
    x_t, model_output, target = steppable(x_t), steppable(model_output), steppable(out)
    flat, strides = _strides(channels, pixels, x_t, model_output, target)
    grid, tile = _tiles(batch, elements, pixels)
    with device_of(x_t):
        _predict_kernel[grid](
            x_t, model_output, target, coefficients, batch, elements, pixels, *strides, CLIP=clip, FLAT=flat, **tile
        )
    return out if target is out else out.copy_(target)


def guided_step(
    x_t: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    gradient: Tensor | None,
    weights: Tensor | None,
    scores: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    variance_max: Tensor | None,
    method: int,
    learned_variance: bool,
    scale: float,
    tilt: float,
    max_weight: float,
    normalize_sum: bool,
    sine_boost: float,
    clip: bool,
    out: Tensor,
) -> Tensor:
    """One guided DDPM (method 0) or DDIM (1) step from x_t to x_prev, written to `out`, which may be x_t itself."""
    if not x_t.numel():
        return out
    batch, channels = x_t.shape[:2]
    elements = x_t.numel() // batch
    pixels = elements // channels
    x_t, model_output = steppable(x_t), steppable(model_output)
    gradient = None if gradient is None else steppable(gradient)
    noise = None if noise is None else steppable(noise)
    flat, strides = _strides(channels, pixels, x_t, model_output, gradient, noise)
    vectors = (weights, scores, seeds, variance_max)
    grid, tile = _tiles(batch, elements, pixels)
    with device_of(x_t):
        _step_kernel[grid](
            x_t, model_output, gradient, noise, out, coefficients, *vectors,
            batch, elements, pixels, channels * model_output.stride(1), *strides,
            *(0 if vector is None else vector.stride(0) for vector in vectors),
            scale, *doubles(tilt, max_weight), sine_boost,
            DDIM=method == 1, LEARNED=learned_variance, MEAN=not normalize_sum, CLIP=clip, FLAT=flat, **tile,
        )  # fmt: skip
    return out
