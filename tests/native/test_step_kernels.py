"""The CPU step kernels against a float64 restatement of the formulas."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from calguide_fast import _cpu
from calguide_fast.backends import cpu

DDPM, DDIM = 0, 1
SHAPES = [(1, 7, 9), (3, 8, 8), (5, 1, 1), (3, 7, 9), (1, 1, 1), (3, 40, 41), (3,), (2, 33)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (log beta, log of the clipped posterior variance): the range of most steps, and the wide one of a first respaced step
USUAL, WIDE = (-4.2, -4.4), (-3.0, -9.0)


def row(log_variances=USUAL, k_positive=1.0, sigma=0.15, draw=7):
    alphas, alphas_prev = 0.4, 0.5
    c = torch.zeros(16)
    c[0], c[1] = math.sqrt(1 / alphas), math.sqrt(1 / alphas - 1)
    c[2], c[3] = 0.08, 0.91
    c[4], c[5] = log_variances
    c[6], c[7] = 0.013, 0.2
    c[8], c[9], c[10], c[11] = (
        math.sqrt(alphas_prev),
        math.sqrt(1 - alphas_prev - sigma**2),
        sigma,
        math.sqrt(1 - alphas),
    )
    c[12], c[13], c[14], c[15] = 0.6, k_positive, draw, 400
    return c


def inputs(batch=3, shape=(3, 8, 8), learned=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(channels):
        return torch.randn(batch, channels, *shape[1:], generator=generator)

    channels = shape[0]
    return {
        "x_t": normal(channels),
        "model_output": (normal(channels * (2 if learned else 1)) * 0.7).to(dtype),
        "gradient": normal(channels).to(dtype),
        "noise": normal(channels),
    }


def step(
    x_t, model_output, coefficients, gradient=None, weights=None, scores=None, noise=None, seeds=None,
    variance_max=None, method=DDPM, learned=None, scale=1.7, tilt=0.0, max_weight=math.inf, normalize_sum=False,
    sine_boost=0.0, clip=True, out=None,
):  # fmt: skip
    learned = model_output.shape[1] == 2 * x_t.shape[1] if learned is None else learned
    out = torch.full(x_t.shape, math.nan) if out is None else out
    return cpu.guided_step(
        x_t, model_output, coefficients, gradient, weights, scores, noise, seeds, variance_max, method, learned, scale,
        tilt, max_weight, normalize_sum, sine_boost, clip, out,
    )  # fmt: skip


def restatement(
    x_t, model_output, coefficients, gradient=None, weights=None, scores=None, noise=None, variance_max=None,
    method=DDPM, scale=1.7, tilt=0.0, max_weight=math.inf, normalize_sum=False, sine_boost=0.0, clip=True,
):  # fmt: skip
    """The step in float64, and the running maximum of the variance after it."""
    c = coefficients.double()
    x, channels = x_t.double(), x_t.shape[1]
    eps = model_output[:, :channels].double()
    g = torch.zeros_like(x) if gradient is None else gradient.double()
    z = torch.zeros_like(x) if noise is None else noise.double()
    m = torch.full((len(x),), float(scale), dtype=torch.float64)
    if weights is not None:
        m = m * weights.double()
    if scores is not None:
        tilted = (tilt * scores.double()).softmax(0) * (1 if normalize_sum else len(x))
        m = m * tilted.clamp(max=max_weight)
    m = m.view(-1, *(1,) * (x.ndim - 1))

    x0 = c[0] * x - c[1] * eps
    x0 = x0.clamp(-1, 1) if clip else x0
    if method == DDIM:
        e = (c[0] * x - x0) / c[1]
        if gradient is not None:
            e = e - c[11] * m * g
            x0 = c[0] * x - c[1] * e
        return c[8] * x0 + c[9] * e + c[13] * c[10] * z, None

    if model_output.shape[1] == 2 * channels:
        frac = (model_output[:, channels:].double() + 1) / 2
        log_variance = frac * c[4] + (1 - frac) * c[5]
        sd, variance = (0.5 * log_variance).exp(), log_variance.exp()
    else:
        sd, variance = c[7].expand_as(x), c[6].expand_as(x)
    boost = 0.0
    if variance_max is not None:
        variance_max = torch.maximum(variance_max.double(), variance.flatten(1)[:, 0])
        boost = (sine_boost * variance_max * c[12]).view(m.shape)
    return c[2] * x0 + c[3] * x + (variance + boost) * m * g + c[13] * sd * z, variance_max


def assert_close(actual, expected, tolerance=2e-6):
    assert actual.dtype == torch.float32
    # written so that a NaN fails
    assert ((actual.double() - expected).abs() <= tolerance * expected.abs().clamp(min=1)).all()


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("method", [DDPM, DDIM])
@pytest.mark.parametrize("clip", [True, False])
def test_step(shape, learned, method, clip):
    given = inputs(shape=shape, learned=learned)
    expected, _ = restatement(**given, coefficients=row(), method=method, clip=clip)
    assert_close(step(**given, coefficients=row(), method=method, clip=clip), expected)


@pytest.mark.parametrize("method", [DDPM, DDIM])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("log_variances", [USUAL, WIDE])
def test_optional_operands(method, learned, guided, noisy, log_variances):
    given = inputs(shape=(3, 33, 35), learned=learned)
    given["gradient"] = given["gradient"] if guided else None
    given["noise"] = given["noise"] if noisy else None
    coefficients = row(log_variances)
    expected, _ = restatement(**given, coefficients=coefficients, method=method)
    assert_close(step(**given, coefficients=coefficients, method=method), expected)


def test_last_step_and_deterministic_ddim_draw_nothing():
    given = inputs()
    seeds = torch.arange(3)
    without = {**given, "noise": None}
    for coefficients, method in [(row(k_positive=0.0), DDPM), (row(k_positive=0.0), DDIM), (row(sigma=0.0), DDIM)]:
        expected = step(**without, coefficients=coefficients, method=method)
        assert same_bits(step(**given, coefficients=coefficients, method=method), expected)
        assert same_bits(step(**without, seeds=seeds, coefficients=coefficients, method=method), expected)


@pytest.mark.parametrize("normalize_sum", [True, False])
@pytest.mark.parametrize("max_weight", [math.inf, 0.9])
@pytest.mark.parametrize("tilt", [0.0, -0.2, 1.5])
@pytest.mark.parametrize("method", [DDPM, DDIM])
def test_weights_and_tilt(normalize_sum, max_weight, tilt, method):
    settings = {"tilt": tilt, "max_weight": max_weight, "normalize_sum": normalize_sum, "method": method}
    given = inputs(batch=5)
    given |= {"scores": torch.randn(10)[::2], "weights": torch.rand(10)[::2]}
    expected, _ = restatement(**given, **settings, coefficients=row())
    assert_close(step(**given, **settings, coefficients=row()), expected)


def test_tilt_inside_is_tilt_weights():
    given = inputs(batch=5)
    scores = torch.randn(5)
    weights = cpu.tilt_weights(scores, 0.7, False, 1.2)
    inside = step(**given, coefficients=row(), scores=scores, tilt=0.7, max_weight=1.2, scale=1.0)
    assert same_bits(inside, step(**given, coefficients=row(), weights=weights, scale=1.0))


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("gaps", [True, False])
def test_sine_boost_and_running_maximum(learned, guided, gaps):
    given = inputs(batch=4, shape=(3, 30, 41), learned=learned)
    given["gradient"] = given["gradient"] if guided else None
    # below, above, and not yet known
    before = torch.tensor([0.001, 0.5, 0.0, -math.inf])
    expected, expected_max = restatement(**given, coefficients=row(), variance_max=before, sine_boost=0.3)
    running = before.clone()
    if gaps:
        running = torch.stack([before, before], 1)[:, 0]
    assert_close(step(**given, coefficients=row(), variance_max=running, sine_boost=0.3), expected)
    assert_close(running, expected_max, 1e-7)


def test_running_maximum_keeps_nan_and_takes_it():
    given = inputs(batch=3)
    given["model_output"][1, 3, 0, 0] = math.nan
    running = torch.tensor([math.nan, 0.1, 0.1])
    step(**given, coefficients=row(), variance_max=running, sine_boost=0.3)
    assert running.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7, 9), (1, 33, 35), (3, 40, 41)])
@pytest.mark.parametrize("method", [DDPM, DDIM])
def test_half_precision_operands(dtype, shape, method):
    given = inputs(shape=shape, dtype=dtype)
    expected, _ = restatement(**given, coefficients=row(), method=method)
    assert_close(step(**given, coefficients=row(), method=method), expected)
    widened = {name: value.float() for name, value in given.items()}
    assert same_bits(
        step(**given, coefficients=row(), method=method), step(**widened, coefficients=row(), method=method)
    )


def relayouts(x):
    """The same values under other strides."""
    batch, channels = x.shape[:2]
    if x.ndim == 4:
        yield x.contiguous(memory_format=torch.channels_last)
        yield x.transpose(2, 3).contiguous().transpose(2, 3)
    yield torch.stack([x, x], -1)[..., 0]
    yield torch.cat([x, x], 1)[:, :channels]
    yield x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("shape", [(3, 7, 9), (3, 40, 41), (5, 1, 1), (1, 8, 8), (4, 6)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(shape, dtype):
    given = inputs(batch=2, shape=shape, dtype=dtype)
    expected = step(**given, coefficients=row())
    for name in given:
        for other in relayouts(given[name]):
            assert torch.equal(other, given[name])
            assert same_bits(step(**{**given, name: other}, coefficients=row()), expected)
    everything = {name: next(relayouts(value)) for name, value in given.items()}
    assert same_bits(step(**everything, coefficients=row()), expected)
    seeds = torch.arange(2)
    drawn = step(**{**given, "noise": None}, seeds=seeds, coefficients=row())
    assert same_bits(step(**{**everything, "noise": None}, seeds=seeds, coefficients=row()), drawn)


def test_broadcast_operands():
    given = inputs(shape=(3, 8, 8))
    given["gradient"] = torch.tensor([0.5, -1.0, 2.0]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    expected, _ = restatement(**given, coefficients=row())
    assert_close(step(**given, coefficients=row()), expected)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 256, 256)])
@pytest.mark.parametrize("method", [DDPM, DDIM])
def test_in_place(shape, method):
    given = inputs(batch=4, shape=shape)
    expected = step(**given, coefficients=row(), method=method)
    given["x_t"] = given["x_t"].clone()
    result = step(**given, coefficients=row(), method=method, out=given["x_t"])
    assert result is given["x_t"]
    assert same_bits(result, expected)


@pytest.mark.parametrize("offset", [0, 1, 5])
def test_large_outputs_of_any_alignment(offset):
    given = inputs(batch=4, shape=(3, 251, 253))
    given["model_output"][2, 4, 100:, :] = 40.0  # beyond the short series of the deviation, in a few runs only
    expected, _ = restatement(**given, coefficients=row())
    storage = torch.full((given["x_t"].numel() + 64,), math.nan)
    out = storage[offset : offset + given["x_t"].numel()].view_as(given["x_t"])
    assert_close(step(**given, coefficients=row(), out=out), expected, 1e-5)
    assert storage[:offset].isnan().all()
    assert storage[offset + out.numel() :].isnan().all()


@pytest.mark.parametrize("shape", [(1, 7, 9), (3, 8, 8), (3, 40, 41), (5, 1, 1), (1, 3, 3)])
@pytest.mark.parametrize("method", [DDPM, DDIM])
def test_seeds_draw_what_philox_normal_draws(shape, method):
    given = {**inputs(shape=shape), "noise": None}
    seeds = torch.tensor([3, -9, 2**60])
    noise = cpu.philox_normal(seeds, shape, 7, 0)
    drawn = step(**given, seeds=seeds, coefficients=row(draw=7), method=method)
    assert same_bits(drawn, step(**{**given, "noise": noise}, coefficients=row(), method=method))
    spaced = torch.stack([seeds, seeds], 1)[:, 0]
    assert same_bits(step(**given, seeds=spaced, coefficients=row(draw=7), method=method), drawn)
    assert not same_bits(step(**given, seeds=seeds, coefficients=row(draw=8), method=method), drawn)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_independent_of_threads_and_batch(layout):
    given = {**inputs(batch=5, shape=(3, 99, 101)), "noise": None}
    given["model_output"][3, 3:] *= 30  # the wide range of the deviation in one image must not touch the others
    given = {k: v if v is None else v.contiguous(memory_format=layout) for k, v in given.items()}
    seeds = torch.arange(5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [
            step(
                **{k: v if v is None else v[i : i + 1] for k, v in given.items()},
                seeds=seeds[i : i + 1],
                coefficients=row(),
            )
            for i in range(5)
        ]
        torch.set_num_threads(2)
        assert same_bits(step(**given, seeds=seeds, coefficients=row()), torch.cat(alone))
    finally:
        torch.set_num_threads(threads)


def test_an_element_knows_nothing_of_its_neighbours():
    # one wide v sends its whole run down the general path, whose bits must be the same
    given = inputs(batch=1, shape=(1, 32, 32))
    expected = step(**given, coefficients=row())
    given["model_output"][0, 1, 5, 5] = 1e4
    changed = step(**given, coefficients=row())
    differs = changed.view(torch.int32) != expected.view(torch.int32)
    assert differs.nonzero().tolist() == [[0, 0, 5, 5]]


def test_every_instruction_set_gives_the_same_bits(tmp_path):
    program = (
        "import sys, torch; sys.path.insert(0, sys.argv[3]); import test_step_kernels as t; "
        "assert t._cpu.isa() == sys.argv[1]; given = {**t.inputs(shape=(3, 40, 41)), 'noise': None}; "
        "seeds = torch.arange(3); "
        "torch.save([t.step(**given, seeds=seeds, coefficients=t.row(logs), method=method) "
        "for logs in (t.USUAL, t.WIDE) for method in (t.DDPM, t.DDIM)] "
        "+ [t.cpu.tilt_weights(torch.linspace(-9, 3, 1001).exp(), -1.7, False, 9.0)], sys.argv[2])"
    )
    results = []
    for isa in _cpu.isas():
        path = tmp_path / f"{isa}.pt"
        environment = {**os.environ, "CALGUIDE_CPU_ISA": isa}
        command = [sys.executable, "-c", program, isa, str(path), os.path.dirname(__file__)]
        subprocess.run(command, env=environment, check=True)
        results.append(torch.load(path))
    for result in results:
        assert all(same_bits(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("method", [DDPM, DDIM])
@pytest.mark.parametrize("log_variances", [USUAL, WIDE])
def test_nan_stays_where_it_is(method, log_variances):
    for index, name in enumerate(["x_t", "model_output", "gradient", "noise"]):
        given = inputs(shape=(3, 40, 41))
        given[name][1, 0, 2, index] = math.nan
        result = step(**given, coefficients=row(log_variances), method=method)
        assert result.isnan().nonzero().tolist() == [[1, 0, 2, index]]
    given = inputs(shape=(3, 40, 41))
    given["model_output"][1, 4, 2, 3] = math.nan
    result = step(**given, coefficients=row(log_variances), method=method)
    assert result.isnan().nonzero().tolist() == ([[1, 1, 2, 3]] if method == DDPM else [])


def test_nan_in_weights_and_scores():
    given = inputs()
    weights = torch.tensor([1.0, math.nan, 1.0])
    result = step(**given, coefficients=row(), weights=weights)
    assert result.isnan().flatten(1).any(1).tolist() == [False, True, False]
    assert step(**given, coefficients=row(), scores=weights, tilt=1.0).isnan().all()


@pytest.mark.parametrize("v", [300.0, -300.0, 1e30, -1e30])
def test_variance_that_overflows_or_vanishes(v):
    given = {**inputs(), "gradient": None}
    given["model_output"][:, 3:] = v
    expected, _ = restatement(**given, coefficients=row(WIDE))
    result = step(**given, coefficients=row(WIDE))
    if v > 0:
        assert torch.equal(result, given["noise"].sign() * math.inf)
    else:
        assert_close(result, expected)


def test_empty_batches():
    for shape in [(0, 3, 8, 8), (2, 3, 0, 8)]:
        x = torch.empty(shape)
        output = torch.empty(shape[0], 6, *shape[2:])
        assert step(x, output, row(), variance_max=torch.empty(shape[0])).shape == shape
        assert cpu.predict_x0(x, output, row(), True, torch.empty(shape)).shape == shape


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [True, False])
def test_predict_x0(shape, learned, dtype, clip):
    given = inputs(shape=shape, learned=learned, dtype=dtype)
    x_t, output = given["x_t"], given["model_output"]
    c = row().double()
    expected = c[0] * x_t.double() - c[1] * output[:, : shape[0]].double()
    expected = expected.clamp(-1, 1) if clip else expected
    plain = cpu.predict_x0(x_t, output, row(), clip, torch.full_like(x_t, math.nan))
    assert_close(plain, expected)
    for out_dtype in DTYPES:
        for out in relayouts(torch.full_like(x_t, math.nan, dtype=out_dtype)):
            for other in relayouts(output):
                assert cpu.predict_x0(x_t, other, row(), clip, out) is out
                assert torch.equal(out, plain.to(out_dtype))


@pytest.mark.parametrize("offset", [0, 3])
def test_predict_x0_of_large_images(offset):
    given = inputs(batch=4, shape=(3, 251, 253))
    storage = torch.full((given["x_t"].numel() + 64,), math.nan)
    out = storage[offset : offset + given["x_t"].numel()].view_as(given["x_t"])
    cpu.predict_x0(given["x_t"], given["model_output"], row(), True, out)
    c = row().double()
    assert_close(out, (c[0] * given["x_t"].double() - c[1] * given["model_output"][:, :3].double()).clamp(-1, 1))
    assert storage[offset + out.numel() :].isnan().all()


def test_predict_x0_keeps_nan():
    given = inputs()
    given["x_t"][0, 1, 2, 3] = math.nan
    given["model_output"][2, 0, 0, 0] = math.nan
    x0 = cpu.predict_x0(given["x_t"], given["model_output"], row(), True, torch.empty(3, 3, 8, 8))
    assert x0.isnan().nonzero().tolist() == [[0, 1, 2, 3], [2, 0, 0, 0]]
