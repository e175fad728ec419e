"""Calls of every function of a backend that between them take every path of its kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from measured import value_and_gradient
from torch import Tensor

from calguide_fast.backends import reference
from calguide_fast.schedule import Schedule

Call = Callable[[ModuleType], list[Tensor]]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# errors that are allowed, relative to the larger of 1 and the size
UNITS = {torch.float64: 2e-7, torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# one of every kind of sum: two exponentials, a log in floats, powers in doubles
DIVERGENCES = {"none": (0, 0.0), "reverse_kl": (1, 0.0), "js": (3, 0.0), "chi2": (6, 0.0), "alpha": (8, -0.5)}
# squares the ratios of tiny probabilities, whose exponents must be exact
EXPLOSIVE = {"inverse": (8, -1.0)}
MARGINAL_TEMPERATURES = [0.7, 0.5, 1.0, 0.0]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def guidance(
    batch: int,
    classes: int,
    divergence: str,
    dtype: torch.dtype,
    layout: str = "contiguous",
    marginal_temperature: float = 0.5,
    in_place: bool = False,
    entropy_weight: float = 0.4,
) -> Call:
    logits = torch.randn(batch, classes, generator=_generator()) * 3
    labels = torch.randint(classes, (batch,), generator=_generator(1))
    if layout == "masked" and classes > 3:
        # also the label's own class in one row, a NaN in another, a tie of the largest in a third
        logits[:, 1::3] = -math.inf
        labels[0] = 1
        logits[-1, 0] = math.nan
        logits[batch // 2, ::2] = 7.0
    if layout == "far":
        # finite, as masks often are
        logits[0, ::3] = torch.finfo(torch.float32).min
        logits[0, labels[0]] = 0.0
        logits[-1, (labels[-1] + 1) % classes] = math.nan
    if layout == "peaked":
        logits[torch.arange(batch), labels - 1] += 30
    if layout == "saturated":
        logits[torch.arange(batch), labels] += 30
    logits = logits.to(dtype)
    if layout == "transposed":
        logits = logits.t().contiguous().t()
    elif layout == "shifted":
        # no row of it starts on a boundary of sixteen bytes
        logits = torch.zeros(batch, classes + 1, dtype=dtype)[:, 1:].copy_(logits)
    code, order = {**DIVERGENCES, **EXPLOSIVE}[divergence]

    def call(backend: ModuleType) -> list[Tensor]:
        given = logits.clone() if in_place else logits
        out = given if in_place else torch.full((batch, classes), math.nan, dtype=dtype)
        settings = (code, order, 0.8, 0.9, 1.0, marginal_temperature, entropy_weight, True)
        return list(backend.guidance_gradient(given, labels, *settings, out))

    return call


def top_label(batch: int, classes: int, dtype: torch.dtype, layout: str = "contiguous") -> Call:
    logits = torch.randn(batch, classes, generator=_generator()) * 3
    labels = torch.randint(classes, (batch,), generator=_generator(1))
    labels[::2] = logits[::2].argmax(1)
    if layout == "masked" and classes > 3:
        # of equal largest logits the first; a NaN; none but masked
        logits[0, 1::2] = 7.0
        logits[1, : classes // 2] = -math.inf
        logits[2, classes // 2] = math.nan
        logits[3] = -math.inf
    logits = logits.to(dtype)
    if layout == "transposed":
        logits = logits.t().contiguous().t()
    elif layout == "shifted":
        logits = torch.zeros(batch, classes + 1, dtype=dtype)[:, 1:].copy_(logits)
    return lambda backend: list(backend.top_label(logits, labels))


def top_label_backward(batch: int, classes: int, dtype: torch.dtype, layout: str = "contiguous") -> Call:
    logits = (torch.randn(batch, classes, generator=_generator()) * 3).to(dtype)
    confidence, top, _ = reference.top_label(logits, torch.zeros(batch, dtype=torch.int64))
    confidence[batch // 2] = math.nan
    grad = torch.randn(2 * batch, generator=_generator(2))[::2]
    if layout == "transposed":
        logits = logits.t().contiguous().t()
    elif layout == "shifted":
        logits = torch.zeros(batch, classes + 1, dtype=dtype)[:, 1:].copy_(logits)
    return lambda backend: [backend.top_label_backward(grad, logits, confidence, top)]


def tilt(count: int, sum_to_one: bool = False, max_weight: float = math.inf, spoilt: bool = False) -> Call:
    scores = torch.randn(2 * count, generator=_generator())[::2] * 3
    scores[count // 2] = math.nan if spoilt else 0.0
    return lambda backend: [backend.tilt_weights(scores, -0.7, sum_to_one, max_weight)]


def x0(shape: tuple[int, ...], dtype: torch.dtype, out_dtype: torch.dtype, layout: str = "contiguous") -> Call:
    x_t, model_output = _step_tensors(shape, dtype, layout)[:2]

    def call(backend: ModuleType) -> list[Tensor]:
        out = _laid_out(torch.full(shape, math.nan, dtype=out_dtype), layout)
        return [backend.predict_x0(x_t, model_output, coefficients(), True, out).contiguous()]

    return call


def step(
    shape: tuple[int, ...],
    method: int = 0,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    noise: str = "seeds",
    guided: bool = True,
    tilted: bool = True,
    boosted: bool = False,
    learned: bool = True,
    in_place: bool = False,
) -> Call:
    x_t, model_output, gradient, draws = _step_tensors(shape, dtype, layout)
    batch = shape[0]
    model_output = model_output if learned else model_output[:, : shape[1]]
    scores, weights = (torch.randn(batch, generator=_generator(2)), torch.rand(batch, generator=_generator(3)))
    seeds = torch.arange(batch) * 0x123456789 - 5

    def call(backend: ModuleType) -> list[Tensor]:
        out = x_t.clone() if in_place else torch.full(shape, math.nan)
        running = torch.rand(batch, generator=_generator(4)) * 0.01 if boosted else None
        backend.guided_step(
            out if in_place else x_t,
            model_output,
            coefficients(),
            gradient if guided else None,
            weights,
            scores if tilted else None,
            draws if noise == "given" else None,
            seeds if noise == "seeds" else None,
            running,
            method,
            learned,
            1.3,
            0.6,
            1.5,
            False,
            0.3,
            True,
            out,
        )
        return [out] if running is None else [out, running]

    return call


def normals(batch: int, shape: tuple[int, ...]) -> Call:
    seeds = torch.arange(batch) * -0x123456789ABCDEF
    return lambda backend: [backend.philox_normal(seeds, shape, 7, 0)]


def calibration(
    kind: str, count: int, dtype: torch.dtype = torch.float64, weighted: bool = False, bandwidth: float = 0.0
) -> Call:
    confidence = torch.rand(count, generator=_generator(), dtype=torch.float64)
    correct = torch.rand(count, generator=_generator(1), dtype=torch.float64) < confidence
    wide = torch.promote_types(dtype, torch.float32)
    weights = torch.rand(count, generator=_generator(2), dtype=wide) if weighted else None
    if kind == "sure":
        # at the ends, and so near them that a node beyond has a share
        confidence[::3], confidence[1::6], confidence[2::6] = 1.0, 1 - 2e-5 * confidence[1::6], 2e-5 * confidence[2::6]
    elif kind == "dipping":
        # R dips through 0 between two points of the grid
        confidence[:3] = torch.tensor([0.2062, 0.4562, 0.7062])
        correct[:3], weights[:3] = torch.tensor([False, True, False]), torch.tensor([1.0, 0.06183, 1.0])
    elif kind == "spoilt":
        confidence[count // 2] = math.nan
    confidence = confidence.to(dtype)

    def call(backend: ModuleType) -> list[Tensor]:
        if kind == "spoilt" and backend is reference:
            # what it makes an error of where it need not wait
            return [torch.full((2,), math.nan, dtype=wide), torch.full((count,), math.nan, dtype=dtype)]
        stats, grad = value_and_gradient(backend, confidence, correct, weights, bandwidth)
        # allowed two thousand times the error of the value, as it is 1 to 20 times 1 / count
        return [stats, grad * (count / 2000)]

    return call


def coefficients() -> Tensor:
    return Schedule.linear().respaced("25").coefficients()[9].clone()


def _step_tensors(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> list[Tensor]:
    batch, channels, *pixels = shape
    doubled = (batch, 2 * channels, *pixels)
    made = [torch.randn(s, generator=_generator(i)) for i, s in enumerate([shape, doubled, shape, shape])]
    dtypes = [torch.float32, dtype, dtype, torch.float32]
    return [_laid_out(tensor.to(kind), layout) for tensor, kind in zip(made, dtypes)]


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "shifted":
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    if layout == "padded":
        # channels that do not follow one another
        return torch.cat([tensor, tensor[:, :, :1]], 2)[:, :, :-1]
    return tensor


# rows that a warp holds in few and in many registers, and rows for a block, whose shared memory LITTLE_SHARED exhausts
CLASSES = {"short": 10, "registers": 300, "many registers": 1000, "block": 1501}
LITTLE_SHARED = 4096


def all_cases() -> Iterator[tuple[str, Call, dict[str, int]]]:
    """(name, call, settings of the emulator) of each, the quick ones first."""
    for count in (1, 5, 199, 1025):
        yield f"tilt {count}", tilt(count), {}
    yield "tilt clipped", tilt(33, True, 0.02), {}
    yield "tilt of a NaN", tilt(300, spoilt=True), {}
    for shape in [(3, 3, 8, 8), (2, 1, 7, 9), (5, 3, 1, 1), (2, 3, 40, 41)]:
        for method in (0, 1):
            yield f"step {shape} {method}", step(shape, method), {}
        yield f"x0 {shape}", x0(shape, torch.float32, torch.float16), {}
        yield f"normals {shape}", normals(shape[0], shape[1:]), {}
    yield "smooth ECE of one sample", calibration("even", 1), {}
    yield "smooth ECE of a few samples", calibration("dipping", 3, weighted=True, bandwidth=0.1), {}
    yield "smooth ECE of blocks", calibration("even", 1500), {}
    yield "smooth ECE of weights", calibration("even", 5000, torch.float32, weighted=True, bandwidth=0.02), {}
    yield "smooth ECE in halves", calibration("even", 300, torch.float16, weighted=True), {}
    yield "smooth ECE of a sure classifier", calibration("sure", 700, weighted=True, bandwidth=0.005), {}
    yield "smooth ECE of a wide kernel", calibration("even", 300, torch.float32, bandwidth=3.0), {}
    yield "smooth ECE of a NaN", calibration("spoilt", 300), {}
    # in tables of shared memory, and where there is none for them
    many = calibration("sure", (1 << 16) + 7, bandwidth=0.1)
    yield "smooth ECE of many samples", many, {}
    yield "smooth ECE of many samples in little memory", many, {"shared_limit": LITTLE_SHARED}
    odd = (3, 3, 7, 9)
    for layout in ("channels_last", "shifted", "padded"):
        for dtype in DTYPES:
            yield f"step {layout} {dtype}", step(odd, 0, dtype, layout, "given", boosted=True), {}
            yield f"x0 {layout} {dtype}", x0(odd, dtype, dtype, layout), {}
    yield "step unguided", step(odd, guided=False, boosted=True), {}
    yield "step without noise", step(odd, 1, noise="none"), {}
    yield "step of fixed variance", step(odd, learned=False, boosted=True), {}
    for number, (size, classes) in enumerate(CLASSES.items()):
        for layout, dtype in zip(["contiguous", "masked", "transposed", "shifted"], [*DTYPES[number % 3 :], *DTYPES]):
            yield f"top_label {size} {layout}", top_label(5, classes, dtype, layout), {}
            yield f"top_label_backward {size} {layout}", top_label_backward(5, classes, dtype, layout), {}
    # several rows in a block
    yield "top_label of many rows", top_label(4099, 33, torch.bfloat16), {}
    for number, divergence in enumerate(DIVERGENCES):
        for size, classes in CLASSES.items():
            layout = ["contiguous", "masked", "transposed", "shifted"][(number + classes) % 4]
            dtype = DTYPES[(number + classes) % 3]
            temperature = MARGINAL_TEMPERATURES[(number + len(size)) % 4]
            call = guidance(3, classes, divergence, dtype, layout, temperature)
            yield f"guidance {divergence} {size} {layout}", call, {}
            if size == "block":
                yield f"guidance {divergence} beyond {layout}", call, {"shared_limit": LITTLE_SHARED}
        in_place = guidance(3, CLASSES["block"], divergence, torch.bfloat16, in_place=True)
        yield f"guidance {divergence} in place", in_place, {"shared_limit": LITTLE_SHARED}
    # no term in e d, two exponentials or one, and a class that outweighs the label's
    for divergence, layout in [("none", "peaked"), ("reverse_kl", "shifted"), ("js", "contiguous"), ("js", "peaked")]:
        for size, classes in CLASSES.items():
            temperature = 1.0 if layout == "shifted" else 0.5
            call = guidance(3, classes, divergence, torch.float32, layout, temperature, entropy_weight=0.0)
            yield f"guidance {divergence} {size} {layout} without entropy", call, {}
    yield "guidance far apart", guidance(3, CLASSES["registers"], "js", torch.float32, "far"), {}
    for size, classes in CLASSES.items():
        call = guidance(3, classes, "inverse", torch.float32, "saturated", 0.0)
        yield f"guidance inverse {size} saturated", call, {}
    yield "step of many images", step((70, 1, 2, 3)), {}
    # a thread goes over its image several times
    yield "step of large images in place", step((20, 1, 63, 65), in_place=True), {"multiprocessors": 1}
    # several rows in a block
    yield "guidance of many rows", guidance(2051, 5, "js", torch.float32, "masked"), {}


CASES = {name: (call, settings) for name, call, settings in all_cases()}


def results(backend: ModuleType, name: str, seed: int = 0) -> list[Tensor]:
    """What an emulated backend computes in a case, under the schedule of a seed."""
    call, settings = CASES[name]
    before = {setting: backend.emulator[setting] for setting in settings}
    try:
        for setting, value in {**settings, "seed": seed}.items():
            backend.emulator[setting] = value
        return call(backend)
    finally:
        for setting, value in {**before, "seed": 0}.items():
            backend.emulator[setting] = value


@functools.cache
def expected_results(name: str) -> list[Tensor]:
    return CASES[name][0](reference)


def wrong(name: str, found: list[Tensor]) -> str:
    """What is wrong with the results of a case, or nothing: NaN for NaN, and near the reference elsewhere."""
    for number, (actual, expected) in enumerate(zip(found, expected_results(name), strict=True)):
        unit = UNITS.get(actual.dtype, 0.0)  # integers exactly
        actual, expected = actual.double(), expected.double()
        allowed = 1.01 * unit * expected.abs().clamp(min=1)
        good = ((actual - expected).abs() <= allowed) | (actual == expected) | (actual.isnan() & expected.isnan())
        if not good.all():
            place = tuple((~good).nonzero()[0].tolist())
            return f"{name}: result {number} at {place} is {actual[place]}, not {expected[place]}"
    return ""


def bits(found: list[Tensor]) -> list[bytes]:
    return [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in found]
