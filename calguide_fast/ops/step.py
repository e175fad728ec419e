"""predict_x0 and guided_step: one step of the reverse process, before and after the classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calguide_fast import backends
from calguide_fast.ops import checks
from calguide_fast.ops._library import LIBRARY, dispatched, is_direct, plain_calls
from calguide_fast.ops.coefficients import ROW_LENGTH
from calguide_fast.ops.tilt import tilt_settings

METHODS = {"ddpm": 0, "ddim": 1}

LIBRARY.define(
    "predict_x0(Tensor x_t, Tensor model_output, Tensor coefficients, bool clip, ScalarType dtype, "
    "MemoryFormat memory_format) -> Tensor"
)
_STEP_INPUTS = (
    "Tensor x_t, Tensor model_output, Tensor coefficients, Tensor? gradient, Tensor? weights, Tensor? scores, "
    "Tensor? noise, Tensor? seeds"
)
_STEP_SETTINGS = (
    "int method, bool learned_variance, float scale, float tilt, float max_weight, bool normalize_sum, "
    "float sine_boost, bool clip"
)
LIBRARY.define(f"guided_step({_STEP_INPUTS}, {_STEP_SETTINGS}) -> Tensor")
# an op of its own, as compilers do not follow an optional tensor that is written to where it is None
LIBRARY.define(f"guided_step_with_maximum({_STEP_INPUTS}, Tensor(a!) variance_max, {_STEP_SETTINGS}) -> Tensor")


def predict_x0(
    x_t: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    clip: bool = True,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    out: Tensor | None = None,
) -> Tensor:
    """The clean image that the model sees in x_t: x̂₀ = √(1/ᾱ) x_t − √(1/ᾱ − 1) ε̂, clipped to [−1, 1].

    Not differentiable: the result is cut off from autograd, as guidance at x̂₀ wants it.

    Args:
        x_t: (B, C, *spatial), float32.
        model_output: (B, C or 2C, *spatial), float32, bfloat16 or float16; the first C channels are ε̂.
        coefficients: (16,) float32, a row of :meth:`calguide_fast.schedule.Timeline.coefficients`.
        clip: clip to [−1, 1], as the samplers of Dhariwal & Nichol do.
        dtype: of the result; the classifier's.
        memory_format: of the result; ``torch.channels_last`` for a classifier in that layout.
        out: written and returned if given, in place of ``dtype`` and ``memory_format``; any strides.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device.
    """
    plain_result = out is not None or (dtype is torch.float32 and memory_format is torch.contiguous_format)
    if plain_result and (plain := plain_calls(x_t)) is not None:
        x0 = plain.plain_predict_x0(torch.get_num_threads(), x_t, model_output, coefficients, out, clip)
        if x0 is not None:
            return x0
    _check_images(x_t, model_output, coefficients)
    if out is not None:
        _check_like("out", out, x_t, x_t.shape, _MODEL_DTYPES)
    elif dtype not in _MODEL_DTYPES:
        raise TypeError(f"dtype={dtype} must be torch.float32, torch.bfloat16 or torch.float16")
    if is_direct(x_t, model_output, coefficients, out):
        if out is None:
            out = torch.empty_like(x_t, dtype=dtype, memory_format=memory_format)
        return backends.choose(x_t).predict_x0(x_t, model_output, coefficients, clip, out)
    x0 = dispatched(torch.ops.calguide_fast.predict_x0, x_t, model_output, coefficients, clip, dtype, memory_format)
    return x0 if out is None else out.copy_(x0)


def guided_step(
    x_t: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    gradient: Tensor | None = None,
    *,
    method: str = "ddpm",
    scale: float = 1.0,
    weights: Tensor | None = None,
    scores: Tensor | None = None,
    tilt: float = 0.0,
    normalize: str = "mean",
    max_weight: float | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    variance_max: Tensor | None = None,
    sine_boost: float = 0.0,
    clip: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """One reverse step x_t → x_{t−1}, guided by an image gradient g, in one pass over the image.

    DDPM: mean + (var + boost)·s·w_b·g + 1[k>0]·exp(½ log var)·z, with the posterior of the clipped x̂₀ and, when the
    model predicts v (2C channels), log var = frac·log β + (1−frac)·log β̃, frac = (v+1)/2.
    DDIM: ε̃ = (√(1/ᾱ) x_t − x̂₀)/√(1/ᾱ−1) − √(1−ᾱ)·s·w_b·g, x̂₀ from ε̃, then √ᾱ₋ x̂₀ + √(1−ᾱ₋−σ²) ε̃ + 1[k>0]·σ z.

    Not differentiable: the result is cut off from autograd.

    Args:
        x_t: (B, C, *spatial), float32.
        model_output: (B, C or 2C, *spatial), float32, bfloat16 or float16: ε̂, or ε̂ and v.
        coefficients: (16,) float32, a row of :meth:`calguide_fast.schedule.Timeline.coefficients`.
        gradient: (B, C, *spatial), float32, bfloat16 or float16, of the score with respect to the image; None for an
            unguided step.
        method: ``"ddpm"`` or ``"ddim"``.
        scale: s, multiplies the gradient.
        weights: (B,) float32 multipliers of the images' guidance, or None.
        scores: (B,) float32; with it, the weights of :func:`calguide_fast.tilt_weights` (``tilt``, ``normalize``,
            ``max_weight``) multiply as well, computed inside.
        noise: (B, C, *spatial) float32 standard normals z. Give this or ``seeds``; ``"ddim"`` at η=0 needs neither.
        seeds: (B,) int64; z is drawn inside, as :func:`calguide_fast.ops.noise.sampling_noise` would.
        variance_max: (B,) float32, EluCD's running maximum of the step variance at pixel (0, 0, 0) of each image,
            starting at zero; **updated in place**, whether or not there is a gradient. DDPM only.
        sine_boost: γ of EluCD's boost γ·variance_max·sin(πk/K), added to the variance that guidance is multiplied by.
        clip: clip x̂₀ to [−1, 1].
        out: (B, C, *spatial) float32, contiguous; written and returned if given. It may be ``x_t`` itself.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or setting.

    Source: Ho et al., arXiv 2006.11239; Nichol & Dhariwal, arXiv 2102.09672; Song et al., arXiv 2010.02502;
    Dhariwal & Nichol, arXiv 2105.05233 (guidance); EluCD, arXiv 2310.11311 (sine boost).
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {', '.join(map(repr, METHODS))}")
    _check_combination(method, noise, seeds, variance_max, sine_boost)
    tilt, normalize_sum, limit = tilt_settings(tilt, normalize, max_weight)
    scale = checks.number("scale", scale)
    sine_boost = checks.number("sine_boost", sine_boost, low=0.0)
    inputs = (x_t, model_output, coefficients, gradient, weights, scores, noise, seeds)
    numbers = (scale, tilt, limit, normalize_sum, sine_boost, clip)
    if (plain := plain_calls(x_t)) is not None:
        x_prev = plain.plain_guided_step(torch.get_num_threads(), *inputs, variance_max, out, METHODS[method], *numbers)
        if x_prev is not None:
            return x_prev
    learned = _check_images(x_t, model_output, coefficients)
    _check_step(x_t, gradient, weights, scores, noise, seeds, variance_max, out)
    settings = (METHODS[method], learned, *numbers)
    if is_direct(*inputs, variance_max, out):
        if out is None:
            out = torch.empty_like(x_t, memory_format=torch.contiguous_format)
        return backends.choose(x_t).guided_step(*inputs, variance_max, *settings, out)
    if variance_max is None:
        x_prev = dispatched(torch.ops.calguide_fast.guided_step, *inputs, *settings)
    else:
        x_prev = dispatched(torch.ops.calguide_fast.guided_step_with_maximum, *inputs, variance_max, *settings)
    return x_prev if out is None else out.copy_(x_prev)


def _check_images(x_t: Tensor, model_output: Tensor, coefficients: Tensor) -> bool:
    """Whether the model's output holds a variance as well."""
    if not isinstance(x_t, Tensor) or x_t.dtype != torch.float32 or x_t.ndim < 2:
        raise TypeError("x_t must be a float32 tensor of shape (B, C, *spatial)")
    if not isinstance(model_output, Tensor) or model_output.dtype not in _MODEL_DTYPES:
        raise TypeError("model_output must be a float32, bfloat16 or float16 tensor")
    channels = x_t.shape[1]
    if (
        model_output.ndim != x_t.ndim
        or model_output.shape[0] != x_t.shape[0]
        or model_output.shape[2:] != x_t.shape[2:]
        or model_output.shape[1] not in (channels, 2 * channels)
    ):
        raise ValueError(
            f"model_output has shape {tuple(model_output.shape)}; for x_t of shape {tuple(x_t.shape)} it must be the "
            f"same (eps) or have {2 * channels} channels (eps and v)"
        )
    if (
        not isinstance(coefficients, Tensor)
        or coefficients.dtype != torch.float32
        or coefficients.shape != (ROW_LENGTH,)
        or coefficients.stride(0) != 1
    ):
        raise ValueError(f"coefficients must be one row of a schedule's table: ({ROW_LENGTH},) float32, contiguous")
    if model_output.device != x_t.device:
        checks.same_device("model_output", model_output, "x_t", x_t)
    if coefficients.device != x_t.device:
        checks.same_device("coefficients", coefficients, "x_t", x_t)
    return model_output.shape[1] == 2 * channels


_MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check_combination(
    method: str, noise: Tensor | None, seeds: Tensor | None, variance_max: Tensor | None, sine_boost: float
) -> None:
    if noise is not None and seeds is not None:
        raise ValueError("give noise or seeds, not both")
    if method == "ddpm" and noise is None and seeds is None:
        raise ValueError("method='ddpm' needs noise: give noise= or seeds=")
    if method == "ddim" and (variance_max is not None or sine_boost):
        raise ValueError("the sine boost (variance_max, sine_boost) belongs to method='ddpm'")
    if sine_boost and variance_max is None:
        raise ValueError(f"sine_boost={sine_boost!r} needs variance_max, a (B,) tensor that starts at zero")


def _check_step(
    x_t: Tensor,
    gradient: Tensor | None,
    weights: Tensor | None,
    scores: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    variance_max: Tensor | None,
    out: Tensor | None,
) -> None:
    if gradient is not None:
        _check_like("gradient", gradient, x_t, x_t.shape, _MODEL_DTYPES)
    if noise is not None:
        _check_like("noise", noise, x_t, x_t.shape, (torch.float32,))
    if seeds is not None:
        _check_like("seeds", seeds, x_t, x_t.shape[:1], (torch.int64,))
    for name, tensor in (("weights", weights), ("scores", scores), ("variance_max", variance_max)):
        if tensor is not None:
            _check_like(name, tensor, x_t, x_t.shape[:1], (torch.float32,))
    if out is not None:
        _check_like("out", out, x_t, x_t.shape, (torch.float32,))
        if not out.is_contiguous():
            raise ValueError("out must be contiguous")


def _check_like(name: str, tensor: Tensor, x_t: Tensor, shape: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
        found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a tensor of dtype {' or '.join(map(str, dtypes))}, got {found}")
    if tensor.shape != shape:
        checks.shaped(name, tensor, shape)
    if tensor.device != x_t.device:
        checks.same_device(name, tensor, "x_t", x_t)


@torch.library.impl(LIBRARY, "predict_x0", "CompositeExplicitAutograd")
def _predict_x0_impl(
    x_t: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    clip: bool,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    out = torch.empty_like(x_t, dtype=dtype, memory_format=memory_format)
    return backends.choose(x_t).predict_x0(x_t, model_output, coefficients, clip, out)


@torch.library.register_fake("calguide_fast::predict_x0", lib=LIBRARY)
def _predict_x0_fake(
    x_t: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    clip: bool,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    return torch.empty_like(x_t, dtype=dtype, memory_format=memory_format)


@torch.library.impl(LIBRARY, "guided_step", "CompositeExplicitAutograd")
def _guided_step_impl(*arguments: Any) -> Tensor:
    inputs, settings = arguments[:8], arguments[8:]
    return _guided_step_with_maximum_impl(*inputs, None, *settings)


@torch.library.impl(LIBRARY, "guided_step_with_maximum", "CompositeExplicitAutograd")
def _guided_step_with_maximum_impl(x_t: Tensor, *arguments: Any) -> Tensor:
    out = torch.empty_like(x_t, memory_format=torch.contiguous_format)
    return backends.choose(x_t).guided_step(x_t, *arguments, out)


@torch.library.register_fake("calguide_fast::guided_step", lib=LIBRARY)
@torch.library.register_fake("calguide_fast::guided_step_with_maximum", lib=LIBRARY)
def _guided_step_fake(x_t: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(x_t, memory_format=torch.contiguous_format)
