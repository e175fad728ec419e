"""The sampler on a GPU: graphs, streams, devices, waits, launches, memory, and the CPU's images."""

from __future__ import annotations

import gc
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from calguide_fast import FDivSampler, use_backend
from calguide_fast.demo.checkpoints import load_guide, load_unet

pytestmark = pytest.mark.gpu

LABELS = [3, 1, 4, 1, 5, 9, 2, 6]
# of csrc/cuda and of backends/triton
OUR_KERNELS = re.compile(r"guide_(warp|block)_rows|(step|x0|normal|tilt|predict|guidance)_kernel")


@pytest.fixture(params=["cuda", "triton"])
def kernels(request):
    with use_backend(request.param):
        yield request.param


def sampler(device: str = "cuda", **options) -> FDivSampler:
    """Of the demo's digits."""
    settings = {"divergence": "reverse_kl", "alpha": 3.0, "sine_boost": 0.3, "scale": 0.4}
    if "method" in options or "eta" in options:
        settings.pop("sine_boost")
    options.pop("method", None)
    return FDivSampler(load_unet().to(device), load_guide(softplus_beta=3.0).to(device), **settings, **options)


def sample(digits: FDivSampler, steps="12", **options):
    return digits.sample(LABELS, range(len(LABELS)), steps, progress=False, **options)


def replayed(digits: FDivSampler) -> bool:
    rooms = {} if digits._graphs is None else digits._graphs._rooms
    return any(recording.replay is not None for room in rooms.values() for recording in room.recordings.values())


class Elementwise(nn.Module):
    """A model without convolutions or matrix products, whose kernels do the same however they are launched."""

    in_channels, image_size = 3, 16

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.2, 0.9, 3)[:, None, None])

    def forward(self, x, t):
        eps = torch.tanh(self.gain * x) * (0.5 + t.float()[:, None, None, None] / 1000)
        return torch.cat([eps, torch.sin(x)], 1)


class Averages(nn.Module):
    num_classes = 5

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3, 16, 16))

    def forward(self, x):
        return torch.tanh(3 * (x[:, None] * self.weight).mean((2, 3, 4))) * 8


def elementwise(**options) -> FDivSampler:
    torch.manual_seed(0)
    return FDivSampler(Elementwise().cuda().eval(), Averages().cuda().eval(), scale=2.0, **options)


OPTIONS = [
    {},
    {"tilt": -0.5, "tilt_max": 2.0},
    {"sine_boost": 0.3, "interval": (0.1, 20.0)},
    {"divergence": "reverse_kl", "entropy_scaling": 5.0},
    {"diagnostics": False},
]


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_replays_have_the_bits_of_eager_steps(options, noise, kernels):
    labels, seeds = [0, 1, 2, 3, 4, 0, 1], range(7)
    arguments = {"steps": 12, "batch_size": 3, "progress": False}
    if noise:
        # from the host: page-locked on the way, as no step may wait
        arguments["noise"] = torch.randn(13, 7, 3, 16, 16)
    expected = elementwise(**options).sample(labels, seeds, **arguments)
    recorded = elementwise(**options, cuda_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = [recorded.sample(labels, seeds, **arguments) for _ in range(2)]
    assert replayed(recorded)
    for samples in found:
        assert torch.equal(samples.images, expected.images)
        if expected.diagnostics is not None:
            values = samples.diagnostics.values, expected.diagnostics.values
            torch.testing.assert_close(*values, rtol=0, atol=0, equal_nan=True)


SOLVERS = {
    "heun": ({"churn": 3.0, "interval": (0.1, 20.0)}, {"method": "heun"}),
    "edm rule": ({"rule": "edm", "max_guidance": 0.05}, {"method": "heun"}),
    "dpmpp": ({"tilt": -0.5}, {"method": "dpmpp"}),
    "recurrence": ({"interval": (0.1, 20.0)}, {"recurrence": 2}),
}


@pytest.mark.parametrize("case", SOLVERS)
def test_replays_of_solvers_have_the_bits_of_eager_steps_and_do_not_wait(case, kernels):
    options, arguments = SOLVERS[case]
    arguments = {"labels": [0, 1, 2, 3], "seeds": range(4), "steps": 12, "progress": False, **arguments}

    def look(step):
        last = step.index == step.num_steps - 1
        torch.cuda.set_sync_debug_mode("default" if last else "error")

    recorded = elementwise(**options, cuda_graph=True)
    try:
        expected = elementwise(**options).sample(callback=look, **arguments)
        # recording itself may wait; the later runs replay
        recorded.sample(**arguments)
        recorded.sample(**arguments)
        found = recorded.sample(callback=look, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert replayed(recorded)
    assert torch.equal(found.images, expected.images)


@pytest.mark.parametrize(
    "options",
    [{}, {"eta": 0.5}, {"dtype": torch.bfloat16, "channels_last": True}, {"cfg_scale": 2.0, "null_class": 10}],
    ids=str,
)
def test_replays_are_eager_steps_to_rounding(options, kernels):
    """With real networks: a library may choose another algorithm while a graph is recorded."""
    method = "ddim" if "eta" in options else "ddpm"
    expected = sample(sampler(**options), method=method)
    recorded = sampler(**options, cuda_graph=True)
    found = sample(recorded, method=method)
    assert replayed(recorded)
    assert (found.images - expected.images).abs().mean() < (1e-2 if "dtype" in options else 1e-4)


def test_images_are_the_cpus_to_rounding(kernels):
    found = sample(sampler(), "25")
    with use_backend("cpu"):
        expected = sample(sampler("cpu"), "25")
    assert torch.equal(found.seeds, expected.seeds) and torch.equal(found.labels, expected.labels)
    difference = (found.images.cpu() - expected.images).abs()
    assert difference.mean() < 1e-4 and difference.max() < 0.02


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_no_step_waits_for_the_device(cuda_graph, kernels):
    digits = sampler(tilt=0.1, cuda_graph=cuda_graph)

    def look(step):
        last = step.index == step.num_steps - 1
        torch.cuda.set_sync_debug_mode("default" if last else "error")

    noise = torch.randn(13, len(LABELS), *digits.shape)
    try:
        # recording itself may wait; the second run replays
        for options in ({}, {"callback": look}, {"noise": noise}, {"noise": noise, "callback": look}):
            sample(digits, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert replayed(digits) == cuda_graph


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_guided_step_is_three_launches_of_ours(cuda_graph, kernels):
    digits = sampler(cuda_graph=cuda_graph)
    sample(digits)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watched:
        sample(digits)
        torch.cuda.synchronize()
    on_device = [event.name for event in watched.events() if event.device_type == DeviceType.CUDA]
    launches = [name for name in on_device if OUR_KERNELS.search(name)]
    # x_T's noise is one more
    assert 0 < len(launches) <= 3 * 12 + 1, launches


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_another_stream(cuda_graph, kernels):
    digits = elementwise(cuda_graph=cuda_graph)
    arguments = {"labels": [0, 1, 2], "seeds": range(3), "steps": 9, "progress": False}
    expected = elementwise().sample(**arguments).images
    for _ in range(2):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            images = digits.sample(**arguments).images
            assert torch.cuda.current_stream() == side
        side.synchronize()
        assert torch.equal(images, expected)
    assert torch.equal(digits.sample(**arguments).images, expected)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_another_device(cuda_graph, kernels):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU is present, and the test takes two")
    found = sample(sampler("cuda:1", cuda_graph=cuda_graph))
    assert found.images.device.index == 1 and torch.cuda.current_device() == 0
    assert (found.images.cpu() - sample(sampler("cuda:0")).images.cpu()).abs().mean() < 1e-4


class Asks(Elementwise):
    def forward(self, x, t):
        return super().forward(x, t) * (1.0 if t[0].item() > 300 else 0.5)


def test_a_network_that_waits_is_run_eagerly_and_the_device_goes_on(kernels):
    torch.manual_seed(0)
    model, guide = Asks().cuda().eval(), Averages().cuda().eval()
    arguments = {"labels": [0, 1, 2], "seeds": range(3), "steps": 9, "progress": False}
    expected = FDivSampler(model, guide, sine_boost=0.3).sample(**arguments).images
    digits = FDivSampler(model, guide, sine_boost=0.3, cuda_graph=True)
    earlier = elementwise(cuda_graph=True)
    earlier_images = earlier.sample(**arguments).images
    stream = torch.cuda.current_stream()
    with pytest.warns(RuntimeWarning, match="a step cannot be recorded") as caught:
        found = [digits.sample(**arguments).images for _ in range(2)]
    assert len([warning for warning in caught if "cuda_graph" in str(warning.message)]) == 1
    assert all(torch.equal(images, expected) for images in found)
    # nothing of the broken recording stays: random state, stream, allocator, further recordings
    assert torch.randn(1, device="cuda").isfinite().all()
    assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.equal(earlier.sample(**arguments).images, earlier_images), "recorded before, replayed after"
    other = elementwise(cuda_graph=True)
    assert torch.equal(other.sample(**arguments).images, elementwise().sample(**arguments).images)
    assert replayed(other)


class Interrupted(Elementwise):
    """Ctrl-C while a step is recorded."""

    calls = 0

    def forward(self, x, t):
        self.calls += 1
        made = super().forward(x, t)
        if self.calls == 4:
            raise KeyboardInterrupt
        return made


def test_an_interrupted_recording_leaves_the_device_in_order(kernels):
    digits, guide = Interrupted().cuda().eval(), Averages().cuda().eval()
    arguments = {"labels": [0, 1, 2], "seeds": range(3), "steps": 9, "progress": False}
    recorded = FDivSampler(digits, guide, cuda_graph=True)
    with pytest.raises(KeyboardInterrupt):
        recorded.sample(**arguments)
    assert torch.randn(1, device="cuda").isfinite().all() and not torch.cuda.is_current_stream_capturing()
    expected = FDivSampler(Elementwise().cuda().eval(), guide).sample(**arguments).images
    assert torch.equal(recorded.sample(**arguments).images, expected)
    assert replayed(recorded)


def test_threads_record_and_replay_in_turn(kernels):
    arguments = {"labels": [0, 1, 2], "seeds": range(3), "steps": 20, "progress": False}
    expected = elementwise().sample(**arguments).images
    samplers = [elementwise(cuda_graph=True) for _ in range(4)]
    torch.cuda.synchronize()

    def runs(digits):
        # each on a stream of its own; the first run of one records while the second of another replays
        with torch.cuda.stream(torch.cuda.Stream()):
            images = [digits.sample(**arguments).images for _ in range(3)]
            torch.cuda.current_stream().synchronize()
        return images

    with ThreadPoolExecutor(len(samplers)) as pool:
        found = [images for several in pool.map(runs, samplers) for images in several]
    assert all(replayed(digits) for digits in samplers)
    assert len(found) == 12 and all(torch.equal(images, expected) for images in found)


def test_parameters_that_move_are_recorded_anew(kernels):
    digits, arguments = elementwise(cuda_graph=True), {"labels": [0, 1], "seeds": range(2), "steps": 9}
    digits.sample(**arguments, progress=False)
    with torch.no_grad():
        digits.classifier.weight.data = digits.classifier.weight * 2
    found = digits.sample(**arguments, progress=False).images
    eager = FDivSampler(digits.model, digits.classifier, scale=2.0)
    assert torch.equal(found, eager.sample(**arguments, progress=False).images)


def test_memory_is_freed_with_the_sampler(kernels):
    digits = elementwise()
    model, guide = digits.model, digits.classifier
    arguments = {"labels": [0] * 64, "seeds": range(64), "steps": 6, "progress": False}
    digits.sample(**arguments)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        recorded = FDivSampler(model, guide, scale=2.0, cuda_graph=True)
        recorded.sample(**arguments)
        assert replayed(recorded)
        del recorded
        gc.collect()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() <= before + (8 << 20)


def test_compiled_networks_are_recorded(kernels):
    torch._dynamo.reset()
    recorded = elementwise(compile=True, cuda_graph=True)
    arguments = {"labels": [0, 1, 2], "seeds": range(3), "steps": 9, "progress": False}
    found = recorded.sample(**arguments).images
    assert replayed(recorded)
    assert (found - elementwise().sample(**arguments).images).abs().mean() < 1e-4
