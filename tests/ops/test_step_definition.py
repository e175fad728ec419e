"""predict_x0 and guided_step against their formulas, written out in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from formulas import assert_near

from calguide_fast import guided_step, predict_x0, tilt_weights
from calguide_fast.ops.noise import sampling_noise
from calguide_fast.schedule import Schedule

TIMELINE = Schedule.linear().respaced("25")
SHAPES = [(2, 3, 8, 8), (1, 1, 7, 9), (3, 4, 1, 1), (2, 3, 5), (199, 1, 2, 2), (2, 2, 3, 4, 5), (0, 3, 8, 8), (3, 6)]


def coefficients(variance="fixed_small", eta=0.0):
    """The table on the device that the test runs on."""
    return TIMELINE.coefficients(variance, eta).to(torch.get_default_device())


def literal_x0(x_t, eps, k, clip=True):
    bar = float(TIMELINE.alphas_cumprod[k])
    x0 = math.sqrt(1 / bar) * x_t.double() - math.sqrt(1 / bar - 1) * eps.double()
    return x0.clamp(-1, 1) if clip else x0


def x0_terms(x_t, eps, k):
    """The size of what cancels in x̂₀, which rounding errors are relative to."""
    bar = float(TIMELINE.alphas_cumprod[k])
    return math.sqrt(1 / bar) * x_t.double().abs() + math.sqrt(1 / bar - 1) * eps.double().abs()


def literal_step(
    x_t, model_output, k, gradient=None, *, method="ddpm", scale=1.0, weights=None, scores=None, tilt=0.0,
    normalize="mean", max_weight=None, noise=None, variance_max=None, sine_boost=0.0, clip=True, eta=0.0,
    variance="fixed_small",
):  # fmt: skip
    """x_{t−1} and the running maximum, from ᾱ alone."""
    bars = [1.0, *map(float, TIMELINE.alphas_cumprod)]
    bar, bar_prev, steps = bars[k + 1], bars[k], len(TIMELINE)
    beta = 1 - bar / bar_prev
    channels = x_t.shape[1]
    x_t, output = x_t.double(), model_output.double()
    eps = output[:, :channels]
    x0 = literal_x0(x_t, eps, k, clip)
    push = torch.zeros_like(x_t)
    for b in range(len(x_t)):
        if gradient is None:
            continue
        push[b] = scale * gradient[b].double()
        if weights is not None:
            push[b] *= weights[b].double()
        if scores is not None:
            tilted = (tilt * scores.double()).softmax(0)[b] * (len(scores) if normalize == "mean" else 1)
            push[b] *= tilted if max_weight is None else tilted.clamp(max=max_weight)
    z = torch.zeros_like(x_t) if noise is None or k == 0 else noise.double()

    if method == "ddim":
        sigma2 = eta**2 * (1 - bar_prev) / (1 - bar) * beta
        e = (math.sqrt(1 / bar) * x_t - x0) / math.sqrt(1 / bar - 1) - math.sqrt(1 - bar) * push
        x0 = math.sqrt(1 / bar) * x_t - math.sqrt(1 / bar - 1) * e
        return math.sqrt(bar_prev) * x0 + math.sqrt(1 - bar_prev - sigma2) * e + math.sqrt(sigma2) * z, None

    mean = beta * math.sqrt(bar_prev) / (1 - bar) * x0 + (1 - bar_prev) * math.sqrt(1 - beta) / (1 - bar) * x_t
    posterior = beta * (1 - bar_prev) / (1 - bar)
    second = (1 - bars[2] / bars[1]) * (1 - bars[1]) / (1 - bars[2])
    clipped = posterior if k else second
    if output.shape[1] == 2 * channels:
        frac = (output[:, channels:] + 1) / 2
        log_var = frac * math.log(beta) + (1 - frac) * math.log(clipped)
        var, sd = log_var.exp(), (log_var / 2).exp()
    elif variance == "fixed_small":
        var, sd = torch.full_like(x_t, posterior), math.sqrt(clipped)
    else:
        var = torch.full_like(x_t, beta if k else second)
        sd = math.sqrt(beta if k else second)
    boost = torch.zeros_like(x_t)
    if variance_max is not None:
        variance_max = torch.maximum(variance_max.double(), var.flatten(1)[:, 0])
        boost += sine_boost * math.sin(math.pi * k / steps) * variance_max.reshape(-1, *[1] * (x_t.ndim - 1))
    return mean + (var + boost) * push + sd * z, variance_max


def images(shape, learned=True, dtype=torch.float32):
    x_t = torch.randn(shape)
    output = torch.randn(shape[0], shape[1] * (2 if learned else 1), *shape[2:]).clamp(-2, 2).to(dtype)
    return x_t, output


def assert_step(x_t, output, k, gradient=None, eta=0.0, variance="fixed_small", tolerance=2e-6, **options):
    row = coefficients(variance, eta)[k]
    running = options.get("variance_max")
    expected, maximum = literal_step(x_t, output, k, gradient, eta=eta, variance=variance, **options)
    if running is not None:
        options["variance_max"] = running.clone()
    found = guided_step(x_t, output, row, gradient, **options)
    assert found.dtype == torch.float32 and found.is_contiguous()
    size = x0_terms(x_t, output[:, : x_t.shape[1]], k) + expected.abs()
    assert_near(found, expected, tolerance, "x_prev", size)
    if running is not None:
        assert_near(options["variance_max"], maximum, tolerance, "variance_max")
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_predict_x0(shape, clip, dtype, backend):
    for k, learned in itertools.product((24, 7, 0), (False, True)):
        x_t, output = images(shape, learned, dtype)
        expected = literal_x0(x_t, output[:, : shape[1]], k, clip)
        size = x0_terms(x_t, output[:, : shape[1]], k)
        for result in (torch.float32, torch.bfloat16, torch.float16):
            found = predict_x0(x_t, output, coefficients()[k], clip, result)
            assert found.dtype == result and found.is_contiguous()
            assert_near(found, expected, 1e-6, "x0", size)


def test_predict_x0_layouts_and_out(backend):
    x_t, output = images((3, 3, 6, 5))
    row = coefficients()[9]
    plain = predict_x0(x_t, output, row)
    last = predict_x0(x_t, output, row, memory_format=torch.channels_last)
    assert last.is_contiguous(memory_format=torch.channels_last) and torch.equal(last, plain)
    for out in (torch.empty_like(last), torch.empty(3, 5, 6, 3).permute(0, 3, 2, 1), torch.empty(3, 6, 6, 5)[:, ::2]):
        assert predict_x0(x_t, output, row, out=out) is out
        assert torch.equal(out, plain)
    strided = output.contiguous(memory_format=torch.channels_last)
    assert torch.equal(predict_x0(x_t, strided, row), plain)


def test_predict_x0_keeps_nan(backend):
    x_t, output = images((1, 1, 2, 2))
    output[0, 0, 1, 1] = math.nan
    assert predict_x0(x_t, output, coefficients()[9]).isnan().flatten().tolist() == [False, False, False, True]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_plain_and_guided_steps(method, learned, shape, backend):
    for k in (24, 12, 1, 0):
        x_t, output = images(shape, learned)
        noise, gradient = torch.randn(shape), torch.randn(shape)
        assert_step(x_t, output, k, method=method, noise=noise)
        assert_step(x_t, output, k, gradient, method=method, noise=noise, scale=2.5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_fixed_variances(variance, backend):
    for k in (24, 12, 1, 0):
        x_t, output = images((3, 3, 4, 4), learned=False)
        running = torch.tensor([0.0, 1e-4, 10.0])
        assert_step(
            x_t, output, k, torch.randn(3, 3, 4, 4), variance=variance, noise=torch.randn(3, 3, 4, 4),
            variance_max=running, sine_boost=0.3,
        )  # fmt: skip


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_noise(eta, backend):
    for k in (24, 12, 1, 0):
        x_t, output = images((3, 3, 4, 4))
        assert_step(x_t, output, k, torch.randn(3, 3, 4, 4), eta=eta, method="ddim", noise=torch.randn(3, 3, 4, 4))


# every subset of the optional arguments, for both methods
OPTIONS = list(itertools.product(["ddpm", "ddim"], *[[False, True]] * 6))


@pytest.mark.parametrize(
    ("method", "guided", "weighted", "tilted", "clipped_tilt", "boosted", "clip"),
    [row for row in OPTIONS if not (row[0] == "ddim" and row[5]) and not (row[4] and not row[3])],
)
def test_every_optional_argument(method, guided, weighted, tilted, clipped_tilt, boosted, clip, backend):
    shape = (4, 3, 5, 3)
    x_t, output = images(shape)
    options = {"method": method, "noise": torch.randn(shape), "clip": clip, "scale": 1.7}
    if weighted:
        options["weights"] = torch.rand(4)
    if tilted:
        options |= {"scores": -torch.rand(4) * 4, "tilt": -0.8}
    if clipped_tilt:
        options |= {"max_weight": 0.3, "normalize": "sum"}
    if boosted:
        options |= {"variance_max": torch.tensor([0.0, 1e-3, 0.05, 2.0]), "sine_boost": 0.3}
    for k in (20, 0):
        assert_step(x_t, output, k, torch.randn(shape) if guided else None, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "expanded"])
def test_dtypes_and_strides(layout, dtype, backend):
    shape = (3, 3, 6, 5)
    x_t, output = images(shape, dtype=dtype)
    gradient, noise = torch.randn(shape).to(dtype), torch.randn(shape)

    def laid_out(tensor):
        if layout == "channels_last":
            return tensor.contiguous(memory_format=torch.channels_last)
        if layout == "transposed":
            return tensor.transpose(0, 3).contiguous().transpose(0, 3)
        if layout == "sliced":
            return torch.zeros(*tensor.shape[:3], 11, dtype=tensor.dtype)[..., 1::2].copy_(tensor)
        return tensor[:1].expand(tensor.shape)

    vectors = {"weights": torch.rand(3, 2)[:, 1], "scores": torch.rand(3, 2)[:, 0], "tilt": 0.5}
    for method in ("ddpm", "ddim"):
        assert_step(
            laid_out(x_t), laid_out(output), 15, laid_out(gradient), noise=laid_out(noise), method=method, **vectors
        )
    running = torch.zeros(3, 2)[:, 1]
    row = coefficients()[15]
    guided_step(laid_out(x_t), output, row, noise=noise, variance_max=running)
    assert (running > 0).all()


def test_seeds_are_the_noise_they_stand_for(backend):
    seeds = torch.tensor([0, 7, -1, 2**62])
    x_t, output = images((4, 3, 5, 7))
    for k, eta in ((24, 0.0), (3, 0.5), (0, 0.0)):
        row = coefficients("fixed_small", eta)[k]
        noise = sampling_noise(seeds, (3, 5, 7), draw=len(TIMELINE) - k)
        for method in ("ddpm", "ddim"):
            drawn = guided_step(x_t, output, row, method=method, seeds=seeds)
            assert torch.equal(drawn, guided_step(x_t, output, row, method=method, noise=noise))


def test_scores_are_the_weights_they_stand_for(backend):
    x_t, output = images((5, 3, 4, 4))
    gradient, noise, scores = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4), -3 * torch.rand(5)
    row = coefficients()[11]
    inside = guided_step(x_t, output, row, gradient, noise=noise, scores=scores, tilt=-0.4, max_weight=1.2)
    weights = tilt_weights(scores, -0.4, max_weight=1.2)
    assert_near(inside, guided_step(x_t, output, row, gradient, noise=noise, weights=weights).double(), 1e-6)


def test_out_may_be_x_t_itself(backend):
    x_t, output = images((3, 3, 8, 8))
    gradient, noise = torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8)
    row = coefficients()[15]
    for method in ("ddpm", "ddim"):
        expected = guided_step(x_t, output, row, gradient, noise=noise, method=method)
        for out in (torch.empty_like(x_t), x_t.clone()):
            start = out if torch.equal(out, x_t) else x_t
            assert guided_step(start, output, row, gradient, noise=noise, method=method, out=out) is out
            assert torch.equal(out, expected)


def test_inputs_are_left_alone(backend):
    x_t, output = images((2, 3, 4, 4))
    tensors = [x_t, output, torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.rand(2), torch.rand(2)]
    before = [tensor.clone() for tensor in tensors]
    row = coefficients()[9]
    guided_step(x_t, output, row, tensors[2], noise=tensors[3], weights=tensors[4], scores=tensors[5], tilt=1.0)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before))


@pytest.mark.parametrize("spoilt", ["x_t", "model_output", "gradient", "noise"])
@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_nan_stays_in_its_own_image(spoilt, method, backend):
    tensors = dict(zip(("x_t", "model_output"), images((3, 1, 2, 2), learned=False)))
    tensors |= {"gradient": torch.randn(3, 1, 2, 2), "noise": torch.randn(3, 1, 2, 2)}
    tensors[spoilt][1, 0, 1, 0] = math.nan
    row = coefficients(eta=0.5)[9]
    found = guided_step(
        tensors["x_t"], tensors["model_output"], row, tensors["gradient"], noise=tensors["noise"], method=method
    )
    assert found.isnan().nonzero().tolist() == [[1, 0, 1, 0]]


def test_nan_in_the_running_maximum_stays(backend):
    x_t, output = images((2, 1, 2, 2))
    output[0, 1, 0, 0] = math.nan
    running = torch.zeros(2)
    guided_step(x_t, output, coefficients()[9], noise=torch.zeros(2, 1, 2, 2), variance_max=running)
    assert running.isnan().tolist() == [True, False]


def test_step_is_cut_off_from_autograd(backend):
    x_t, output = images((2, 1, 2, 2))
    row = coefficients()[9]
    output.requires_grad_()
    assert not predict_x0(x_t, output, row).requires_grad
    assert not guided_step(x_t, output, row, noise=torch.zeros_like(x_t)).requires_grad
    assert not guided_step(x_t, output, row, noise=torch.zeros_like(x_t), out=torch.empty_like(x_t)).requires_grad


def test_images_do_not_depend_on_their_neighbours(backend):
    x_t, output = images((9, 3, 16, 16))
    gradient, seeds, row = torch.randn(9, 3, 16, 16), torch.arange(9), coefficients()[9]
    together = guided_step(x_t, output, row, gradient, seeds=seeds)
    alone = guided_step(x_t[4:5], output[4:5], row, gradient[4:5], seeds=seeds[4:5])
    assert torch.equal(together[4:5], alone)


def test_threads_change_no_bit(two_threads):
    x_t, output = images((16, 3, 64, 64))
    arguments = (x_t, output, coefficients()[9], torch.randn_like(x_t))
    options = {"seeds": torch.arange(16), "scores": torch.randn(16), "tilt": 0.3}
    two = guided_step(*arguments, **options), predict_x0(*arguments[:3]), tilt_weights(torch.arange(5000.0), 0.001)
    torch.set_num_threads(1)
    one = guided_step(*arguments, **options), predict_x0(*arguments[:3]), tilt_weights(torch.arange(5000.0), 0.001)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


GOOD_X, GOOD_OUTPUT = torch.zeros(2, 3, 4, 4), torch.zeros(2, 6, 4, 4)
ROW = coefficients()[5]
NOISE = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x_t": GOOD_X.double()}, TypeError, "x_t must be a float32 tensor"),
        ({"x_t": torch.zeros(3)}, TypeError, "x_t must be a float32 tensor"),
        ({"model_output": GOOD_OUTPUT.double()}, TypeError, "model_output must be a float32, bfloat16 or float16"),
        ({"model_output": torch.zeros(2, 4, 4, 4)}, ValueError, r"model_output has shape \(2, 4, 4, 4\).*6 channels"),
        ({"model_output": torch.zeros(3, 3, 4, 4)}, ValueError, r"model_output has shape \(3, 3, 4, 4\)"),
        ({"model_output": torch.zeros(2, 3, 4)}, ValueError, r"model_output has shape \(2, 3, 4\)"),
        ({"coefficients": ROW.double()}, ValueError, "coefficients must be one row"),
        ({"coefficients": coefficients()}, ValueError, "coefficients must be one row"),
        ({"coefficients": torch.zeros(16, 2)[:, 0]}, ValueError, "coefficients must be one row"),
        ({"coefficients": [0.0] * 16}, ValueError, "coefficients must be one row"),
        ({"model_output": GOOD_OUTPUT.to("meta")}, ValueError, "model_output is on meta but x_t is on cpu"),
        ({"coefficients": ROW.to("meta")}, ValueError, "coefficients is on meta but x_t is on cpu"),
        ({"gradient": torch.zeros(2, 6, 4, 4)}, ValueError, r"gradient has shape \(2, 6, 4, 4\)"),
        ({"gradient": NOISE.double()}, TypeError, "gradient must be a tensor of dtype"),
        ({"gradient": NOISE.to("meta")}, ValueError, "gradient is on meta"),
        ({"noise": NOISE[:1]}, ValueError, r"noise has shape \(1, 3, 4, 4\); it must be \(2, 3, 4, 4\)"),
        ({"noise": NOISE.half()}, TypeError, "noise must be a tensor of dtype torch.float32"),
        ({"noise": None}, ValueError, "method='ddpm' needs noise"),
        ({"seeds": torch.zeros(2, dtype=torch.int64)}, ValueError, "give noise or seeds, not both"),
        ({"noise": None, "seeds": torch.zeros(2)}, TypeError, "seeds must be a tensor of dtype torch.int64"),
        ({"noise": None, "seeds": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seeds has shape \(3,\)"),
        ({"weights": torch.zeros(3)}, ValueError, r"weights has shape \(3,\)"),
        ({"scores": torch.zeros(2, 1)}, ValueError, r"scores has shape \(2, 1\)"),
        ({"variance_max": torch.zeros(2).double()}, TypeError, "variance_max must be a tensor of dtype torch.float32"),
        ({"method": "heun"}, ValueError, "method='heun' must be one of 'ddpm', 'ddim'"),
        ({"method": "ddim", "sine_boost": 0.3}, ValueError, "sine boost"),
        ({"method": "ddim", "variance_max": torch.zeros(2)}, ValueError, "sine boost"),
        ({"sine_boost": 0.3}, ValueError, "sine_boost=0.3 needs variance_max"),
        ({"sine_boost": -0.3, "variance_max": torch.zeros(2)}, ValueError, "sine_boost=-0.3"),
        ({"scale": math.inf}, ValueError, "scale=inf must be finite"),
        ({"tilt": math.nan}, ValueError, "tilt=nan"),
        ({"normalize": "none"}, ValueError, "normalize='none'"),
        ({"max_weight": -1}, ValueError, "max_weight=-1"),
        ({"out": torch.zeros(2, 3, 4, 8)[..., ::2]}, ValueError, "out must be contiguous"),
        ({"out": torch.zeros(2, 3, 4, 5)}, ValueError, "out has shape"),
        ({"out": NOISE.double()}, TypeError, "out must be a tensor of dtype"),
    ],
)
def test_wrong_arguments_of_guided_step_are_named(changes, error, message):
    arguments = {"x_t": GOOD_X, "model_output": GOOD_OUTPUT, "coefficients": ROW, "noise": NOISE, **changes}
    with pytest.raises(error, match=message):
        guided_step(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x_t": [1.0]}, TypeError, "x_t must be a float32 tensor"),
        ({"dtype": torch.float64}, TypeError, "dtype.*float64 must be torch.float32, torch.bfloat16 or torch.float16"),
        ({"dtype": torch.int64}, TypeError, "dtype.*int64 must be torch.float32, torch.bfloat16 or torch.float16"),
        ({"out": torch.zeros(2, 3, 4, 4).double()}, TypeError, "out.*float64"),
        ({"out": torch.zeros(2, 3, 4, 5)}, ValueError, "out has shape"),
        ({"out": torch.zeros(2, 3, 4, 4, device="meta")}, ValueError, "out is on meta but x_t is on cpu"),
    ],
)
def test_wrong_arguments_of_predict_x0_are_named(changes, error, message):
    arguments = {"x_t": GOOD_X, "model_output": GOOD_OUTPUT, "coefficients": ROW, **changes}
    with pytest.raises(error, match=message):
        predict_x0(**arguments)
