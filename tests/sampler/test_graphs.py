"""Sampling by replay gives the bits of eager sampling, or says why it cannot; and no step waits for the device."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tape import WAITS, TapeRecorder
from torch.utils._python_dispatch import TorchDispatchMode
from toys import ToyUNet, classifier, unet

from calguide_fast import FDivSampler, Guidance, graphs
from calguide_fast.demo.checkpoints import load_guide, load_unet

LABELS, SEEDS = torch.tensor([0, 3, 4, 1, 2, 2, 0]), range(7)
STEPS = 9


@pytest.fixture
def recorders(monkeypatch) -> list[TapeRecorder]:
    """The stand-ins that were made, one for each set of settings."""
    made = []

    def make(device):
        made.append(TapeRecorder(device))
        return made[-1]

    monkeypatch.setattr(graphs, "CudaRecorder", make)
    monkeypatch.setattr(graphs, "obstacle", lambda device: None)
    return made


def run(sampler, labels=LABELS, seeds=SEEDS, steps=STEPS, **options):
    """The samples, and what the callback saw."""
    seen = []

    def look(step):
        seen.append((step.index, step.timestep, step.images, step.x_t.clone()))
        seen[-1] += () if step.x0 is None else (step.x0.clone(),)

    return sampler.sample(labels, seeds, steps, progress=False, callback=look, **options), seen


def assert_same_bits(found, expected):
    samples, seen = found
    other, expected_seen = expected
    assert torch.equal(samples.images, other.images)
    assert len(seen) == len(expected_seen)
    for a, b in zip(seen, expected_seen):
        assert a[:3] == b[:3] and len(a) == len(b)
        assert all(torch.equal(x, y) for x, y in zip(a[3:], b[3:]))
    assert (samples.diagnostics is None) == (other.diagnostics is None)
    if samples.diagnostics is not None:
        torch.testing.assert_close(samples.diagnostics.values, other.diagnostics.values, rtol=0, atol=0, equal_nan=True)


def push(x, t, y, weight=1.0):
    return weight * (y.float()[:, None, None, None] - x) * (t.float() / 1000)[:, None, None, None]


CASES = {
    "unguided": ({"guidance": None}, {}),
    "fixed variance": ({"model": {"learned_variance": False}, "variance": "fixed_large"}, {}),
    "ddim": ({}, {"method": "ddim"}),
    "ddim with noise": ({"eta": 0.7}, {"method": "ddim"}),
    "noise-aware": ({"timed": True, "classifier_input": "xt"}, {}),
    "interval": ({"interval": (0.1, 5.0)}, {}),
    "boosted": ({"sine_boost": 0.4, "interval": (0.1, 5.0)}, {}),
    "tilted": ({"tilt": -0.6, "tilt_max": 1.5, "tilt_on": "score"}, {}),
    "entropy": ({"divergence": "reverse_kl", "entropy_scaling": 3.0, "entropy_weight": 0.4}, {}),
    "conditional": ({"model": {"num_classes": 5}}, {}),
    "classifier-free": ({"model": {"num_classes": 5}, "cfg_scale": 2.5, "null_class": 5}, {}),
    "keywords": ({"model_kwargs": {"shift": torch.full((1, 1, 6, 6), 0.1)}}, {}),
    "transform": ({"classifier_transform": lambda x: torch.nn.functional.avg_pool2d(x, 2)}, {}),
    "cond_fn": ({"cond_fn": push, "diagnostics": True}, {}),
    "half": ({"dtype": torch.bfloat16, "channels_last": True}, {}),
    "no diagnostics": ({"diagnostics": False}, {}),
    "noise given": ({"interval": (0.1, 5.0)}, {"noise": "tensor"}),
    "noise called for": ({}, {"noise": "callable"}),
}


def sampler_of(settings: dict, **options) -> FDivSampler:
    settings = dict(settings) if "guidance" in settings else {"scale": 3.0, **settings}
    model = unet(**settings.pop("model", {}))
    guide = None if "cond_fn" in settings else classifier(timed=settings.pop("timed", False))
    if settings.pop("ensemble", False):
        guide = [guide, classifier(sharpness=9.0)]
    return FDivSampler(model, guide, **settings, **options)


def with_noise(kind: str | None, batch_size: int = 3):
    """Given noise, anew for each run; the callable writes all its draws to one buffer for each size."""
    torch.manual_seed(4)
    noise = torch.randn(STEPS + 1, 7, 3, 6, 6)
    if kind != "callable":
        return noise if kind == "tensor" else None
    draws = iter([draw for batch in noise.split(batch_size, 1) for draw in batch])
    buffer = torch.empty(batch_size, 3, 6, 6)

    def draw():
        value = next(draws)
        return buffer[: len(value)].copy_(value)

    return draw


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_are_eager_steps(case, recorders):
    settings, options = CASES[case]
    kind = options.get("noise")
    expected = run(sampler_of(settings), batch_size=3, **{**options, "noise": with_noise(kind)})
    sampler = sampler_of(settings, cuda_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        first = run(sampler, batch_size=3, **{**options, "noise": with_noise(kind)})
        second = run(sampler, batch_size=3, **{**options, "noise": with_noise(kind)})
    assert_same_bits(first, expected)
    assert_same_bits(second, expected)
    (recorder,) = recorders
    kinds = 2 if "interval" in settings else 1
    # batches of 3 and of 1
    assert len(recorder.recorded) == 2 * kinds and recorder.warm_ups == 2 * kinds * graphs.WARM_UP
    assert recorder.replays == 2 * 3 * STEPS - recorder.warm_ups


SOLVER_CASES = {
    "heun": ({}, {"method": "heun"}),
    "churned": ({"churn": 3.0, "interval": (0.1, 5.0)}, {"method": "heun"}),
    "edm rule": ({"rule": "edm", "max_guidance": 0.02, "add_factor": 0.3}, {"method": "heun"}),
    "dpmpp": ({"tilt": -0.6, "interval": (0.1, 50.0)}, {"method": "dpmpp"}),
    "noise-aware": ({"timed": True, "classifier_input": "xt"}, {"method": "dpmpp"}),
    "recurrence": ({"interval": (0.1, 5.0)}, {"recurrence": 3}),
    "recurrent heun": ({}, {"method": "heun", "recurrence": 2}),
    "predictions kept": ({"interval": (0.1, 5.0)}, {"trajectory": True, "trajectory_of": "x0"}),
    "ensemble": ({"ensemble": True}, {}),
}


@pytest.mark.parametrize("case", SOLVER_CASES)
def test_replayed_steps_of_solvers_and_options_are_eager_steps(case, recorders):
    settings, options = SOLVER_CASES[case]
    expected = run(sampler_of(settings), batch_size=3, **options)
    sampler = sampler_of(settings, cuda_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for _ in range(2):
            found = run(sampler, batch_size=3, **options)
            assert_same_bits(found, expected)
            if "trajectory" in options:
                assert torch.equal(found[0].trajectory.images, expected[0].trajectory.images)
    assert recorders[0].replays > 2 * STEPS


def test_an_ensembles_parameters_are_looked_at(recorders):
    eager, replayed = (sampler_of({"ensemble": True}, **options) for options in ({}, {"cuda_graph": True}))
    assert_same_bits(run(replayed), run(eager))
    for sampler in (eager, replayed):
        for p in sampler.classifier[1].parameters():
            p.data = p.data * 1.1
    assert_same_bits(run(replayed), run(eager))


def test_replayed_steps_of_real_networks(recorders):
    """Attention, normalisation, resampling: the demo's UNet and classifier."""
    settings = {"divergence": "reverse_kl", "alpha": 3.0, "sine_boost": 0.3, "cfg_scale": 1.5, "null_class": 10}
    eager, replayed = (
        FDivSampler(load_unet(), load_guide(softplus_beta=3.0), **settings, **options)
        for options in ({}, {"cuda_graph": True})
    )
    assert_same_bits(run(replayed, LABELS[:3], range(3), 6), run(eager, LABELS[:3], range(3), 6))
    assert recorders[0].replays == 3


def test_other_labels_seeds_steps_and_methods_find_their_recordings(recorders):
    eager, replayed = sampler_of({"sine_boost": 0.3}), sampler_of({"sine_boost": 0.3}, cuda_graph=True)
    for labels, seeds, steps in ((LABELS, SEEDS, 9), (LABELS.flip(0), range(50, 57), 9), (LABELS, SEEDS, "ddim25")):
        assert_same_bits(run(replayed, labels, seeds, steps), run(eager, labels, seeds, steps))
    assert len(recorders[0].recorded) == 1, "one for all, as what differs is in the buffers"
    eager, replayed = sampler_of({}), sampler_of({}, cuda_graph=True)
    for method in ("ddpm", "ddim", "ddpm"):
        assert_same_bits(run(replayed, method=method), run(eager, method=method))
    assert len(recorders[1].recorded) == 2


def test_what_a_recording_fixes_is_looked_at_again(recorders):
    eager, replayed = (
        sampler_of({"guidance": Guidance(scale=2.0)}, **options) for options in ({}, {"cuda_graph": True})
    )
    changes = [
        lambda sampler: setattr(sampler, "guidance", Guidance("chi2", scale=1.0)),
        lambda sampler: setattr(sampler, "clip_denoised", False),
        lambda sampler: setattr(sampler, "model", unet(num_classes=4)),
        lambda sampler: setattr(sampler, "class_conditional", True),
        lambda sampler: sampler.model_kwargs.update(shift=0.25),
        lambda sampler: [setattr(p, "data", p.data * 1.1) for p in sampler.classifier.parameters()],
    ]
    assert_same_bits(run(replayed), run(eager))
    for count, change in enumerate(changes, start=2):
        change(eager)
        change(replayed)
        if not eager.class_conditional and eager.model.class_conditional:
            continue  # set together with the model
        assert_same_bits(run(replayed), run(eager))
        assert len(recorders) in (count, count - 1)
    made = len(recorders)
    for sampler in (eager, replayed):
        sampler.model.load_state_dict({name: p * 0.9 for name, p in sampler.model.state_dict().items()})
    assert_same_bits(run(replayed), run(eager))
    assert len(recorders) == made, "new values at the same places are read by the same recording"


def test_a_recording_has_buffers_of_its_own(recorders):
    """Those of a run would be gone, and their memory another's, when the next run replays it."""
    for cuda_graph in (False, True):
        seen = []
        sampler_of({}, cuda_graph=cuda_graph).sample(
            LABELS, SEEDS, graphs.WARM_UP, progress=False, callback=lambda step, seen=seen: seen.append(step.x0)
        )
        assert len({id(x0) for x0 in seen}) == (graphs.WARM_UP if cuda_graph else 1)


def test_a_callback_that_samples_leaves_the_run_alone(recorders):
    expected = run(sampler_of({}))[0]
    sampler, inner = sampler_of({}, cuda_graph=True), []

    def look(step):
        if step.index == 6:
            inner.append(sampler.sample(LABELS, range(10, 17), 4, progress=False))

    for _ in range(2):
        found = sampler.sample(LABELS, SEEDS, STEPS, progress=False, callback=look)
        assert torch.equal(found.images, expected.images)
    assert torch.equal(inner[0].images, sampler_of({}).sample(LABELS, range(10, 17), 4, progress=False).images)


def test_an_error_in_the_callback_leaves_nothing_behind(recorders):
    sampler = sampler_of({"sine_boost": 0.3}, cuda_graph=True)

    def stop(step):
        if step.index == 6:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        sampler.sample(LABELS, SEEDS, STEPS, progress=False, callback=stop)
    assert_same_bits(run(sampler), run(sampler_of({"sine_boost": 0.3})))
    assert recorders[0].replays > 0


class Asks(ToyUNet):
    """A model that looks at a value, as one does who branches on it."""

    def forward(self, x, t):
        scale = 1.0 if t[0].item() > 300 else 0.5
        return scale * super().forward(x, t)


def asking() -> Asks:
    torch.manual_seed(1)
    return Asks().eval()


def test_a_network_that_waits_is_run_eagerly_and_said_so(recorders):
    expected = run(FDivSampler(asking(), classifier(), sine_boost=0.3), batch_size=3)
    sampler = FDivSampler(asking(), classifier(), sine_boost=0.3, cuda_graph=True)
    with pytest.warns(RuntimeWarning) as caught:
        found = [run(sampler, batch_size=3) for _ in range(2)]
    (warning,) = caught
    assert "a step cannot be recorded: RuntimeError: operation not permitted when stream is cap" in str(warning.message)
    for again in found:
        assert_same_bits(again, expected)
    assert recorders[0].replays == 0 and recorders[0].attempts == 1


class Fails(ToyUNet):
    """A model whose fourth call fails, which is the one that is recorded; ``meanwhile`` is called before."""

    def __init__(self, error=None, meanwhile=lambda: None):
        super().__init__()
        self.error, self.meanwhile, self.calls, self.seen = error, meanwhile, 0, []

    def forward(self, x, t):
        self.calls += 1
        made = super().forward(x, t)
        self.seen.append(weakref.ref(made))
        if self.calls == graphs.WARM_UP + 1:
            self.meanwhile()
            if self.error is not None:
                raise self.error()
        return made


def failing(*arguments) -> Fails:
    torch.manual_seed(1)
    return Fails(*arguments).eval()


def breaks_off_with_an_error_of_its_own(record):
    def recording(self, call):
        try:
            return record(self, call)
        except BaseException:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904

    return recording


def test_a_recording_that_breaks_off_names_the_first_error(recorders, monkeypatch):
    monkeypatch.setattr(TapeRecorder, "record", breaks_off_with_an_error_of_its_own(TapeRecorder.record))
    sampler = FDivSampler(failing(lambda: RuntimeError("not permitted\nfor debugging")), classifier(), cuda_graph=True)
    with pytest.warns(RuntimeWarning, match="recorded: RuntimeError: not permitted$"):
        try:
            raise KeyError("of the caller, who is in the middle of something")
        except KeyError:
            found = run(sampler)
    assert_same_bits(found, run(FDivSampler(unet(), classifier())))


def test_an_interruption_is_not_swallowed(recorders, monkeypatch):
    monkeypatch.setattr(TapeRecorder, "record", breaks_off_with_an_error_of_its_own(TapeRecorder.record))
    sampler = FDivSampler(failing(KeyboardInterrupt), classifier(), sine_boost=0.3, cuda_graph=True)
    with pytest.raises(KeyboardInterrupt):
        run(sampler)
    assert_same_bits(run(sampler), run(FDivSampler(unet(), classifier(), sine_boost=0.3)))
    assert recorders[0].replays == STEPS


def test_nothing_of_a_broken_recording_is_held_while_the_step_is_made(recorders):
    model = failing(lambda: RuntimeError("not permitted"))
    alive = []
    model.register_forward_pre_hook(lambda *_: alive.append([made() is not None for made in model.seen]))
    gc.disable()
    try:
        with pytest.warns(RuntimeWarning, match="not permitted"):
            run(FDivSampler(model, classifier(), cuda_graph=True))
    finally:
        gc.enable()
    # the retry is the call after the one that failed
    assert alive[graphs.WARM_UP + 1] == [False] * (graphs.WARM_UP + 1)


def test_memory_that_runs_out_is_asked_for_again_at_the_next_run(recorders):
    model = failing(lambda: torch.OutOfMemoryError("CUDA out of memory."))
    sampler, expected = FDivSampler(model, classifier(), cuda_graph=True), run(FDivSampler(unet(), classifier()))
    with pytest.warns(RuntimeWarning, match="OutOfMemoryError: CUDA out of memory.; the next run tries again"):
        assert_same_bits(run(sampler), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert_same_bits(run(sampler), expected)
    assert recorders[0].replays == 0 and recorders[1].replays == STEPS - graphs.WARM_UP


def test_no_thread_replays_while_another_records(recorders):
    """Two samplers: the one is ready to replay when the other records."""
    ready, begun, events = sampler_of({}, cuda_graph=True), threading.Event(), []
    expected = run(ready)
    results = []

    def replays():
        begun.wait(60)
        results.append(run(ready))

    thread = threading.Thread(target=replays)
    thread.start()

    def meanwhile():
        begun.set()
        before = recorders[0].replays
        # long enough for a whole run, were it not held up
        thread.join(1)
        events.append((recorders[0].replays - before, thread.is_alive()))

    run(FDivSampler(failing(None, meanwhile), classifier(), cuda_graph=True))
    thread.join(60)
    assert events == [(0, True)] and not thread.is_alive()
    assert_same_bits(results[0], expected)


def test_the_shapes_used_last_are_kept(recorders):
    sampler, eager = sampler_of({}, cuda_graph=True), sampler_of({})
    sizes = [*range(1, graphs.KEPT + 2), 2, 1]
    for size in sizes:
        images = [one.sample([1] * size, range(size), 5, progress=False).images for one in (sampler, eager)]
        assert torch.equal(*images)
        assert len(sampler._graphs._rooms) <= graphs.KEPT
    # the smallest was dropped for the largest, and is recorded again; the next was still there
    assert len(recorders[0].recorded) == graphs.KEPT + 2


class Around(torch.Tensor):
    """A subclass without data of its own, around another tensor."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args = [value.inner if isinstance(value, Around) else value for value in args]
        return func(*args, **(kwargs or {}))


class Flat(Around):
    def __tensor_flatten__(self):
        return ["inner"], None


@pytest.mark.parametrize("make", [Around, torch.Tensor.to_sparse], ids=["subclass", "sparse"])
def test_a_tensor_that_does_not_tell_its_place_is_no_error(make, recorders):
    sampler = sampler_of({"model_kwargs": {"shift": make(torch.zeros(1, 1, 6, 6))}}, cuda_graph=True)
    with pytest.warns(RuntimeWarning, match="does not tell its place in memory"), sampler._borrowed_graphs() as found:
        assert found is None
    assert recorders == []


def test_a_subclass_has_the_places_of_the_tensors_in_it():
    inner = torch.ones(3)
    shift = Flat(inner)

    def fixed():
        return graphs._Fixed.now(torch.device("cpu"), [shift])

    before = fixed()
    assert None not in before.places and fixed().is_same(before)
    shift.inner = torch.ones(3)
    assert not fixed().is_same(before)


@pytest.mark.parametrize(
    "change", [lambda w: w.t(), lambda w: w.view(torch.int32), lambda w: w.view(2, 8), lambda w: w.clone()]
)
def test_a_parameter_that_is_read_otherwise_has_moved(change):
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.ones(4, 4), requires_grad=False)
    before = graphs._Fixed.now(torch.device("cpu"), [module])
    assert graphs._Fixed.now(torch.device("cpu"), [module]).is_same(before)
    module.weight.data = change(module.weight.data)
    assert not graphs._Fixed.now(torch.device("cpu"), [module]).is_same(before)


def test_other_settings_are_tried_again(recorders):
    sampler = FDivSampler(asking(), classifier(), cuda_graph=True)
    with pytest.warns(RuntimeWarning, match="cannot be recorded"):
        run(sampler)
    sampler.model = unet()
    assert_same_bits(run(sampler), run(FDivSampler(unet(), classifier())))
    assert recorders[1].replays > 0


@pytest.mark.parametrize("distributed", [False, True])
def test_where_there_is_no_graph(distributed, monkeypatch):
    device, reason = torch.device("cpu"), "it needs a CUDA device and the sampler is on 'cpu'"
    if distributed:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        device, reason = torch.device("cuda", 0), "torch.distributed is initialised"
    assert reason in graphs.obstacle(device)
    monkeypatch.setattr(graphs, "obstacle", lambda device: reason)
    sampler = sampler_of({}, cuda_graph=True)
    with pytest.warns(RuntimeWarning, match=f"cuda_graph=True: sampling without a CUDA graph; {reason}") as caught:
        found = [run(sampler) for _ in range(2)]
    assert len(caught) == 1
    assert_same_bits(found[1], run(sampler_of({})))


def test_a_cuda_device_is_no_obstacle():
    assert graphs.obstacle(torch.device("cuda", 1)) is None


class Stream:
    """In place of ``torch.cuda.Stream``: its name, and for whom it waited."""

    device_index = 0

    def __init__(self, name):
        self.name, self.waited = str(name), []

    def wait_stream(self, other):
        self.waited.append(other.name)


@pytest.fixture
def streams(monkeypatch):
    """The stack of current streams, as torch.cuda keeps it; and what was asked of graphs and of the allocator."""
    stack, asked = [Stream("current")], []

    class Recording:
        def __init__(self, graph, pool, stream, capture_error_mode):
            self.stream = stream
            asked.append((pool, capture_error_mode))

        def __enter__(self):
            stack.append(self.stream)

        def __exit__(self, *error):
            if error[0] is RuntimeError:
                # of CUDA; and the stream stays, as with PyTorch
                raise RuntimeError("operation failed due to a previous error during capture")
            stack.pop()

    @contextmanager
    def stream(entered):
        before = list(stack)
        stack.append(entered)
        try:
            yield
        finally:
            stack[:] = before

    count = iter(range(9))
    fakes = {"Stream": lambda device: Stream(next(count)), "stream": stream, "graph": Recording}
    fakes |= {"CUDAGraph": lambda: SimpleNamespace(replay=None), "graph_pool_handle": lambda: "pool"}
    fakes["current_stream"] = lambda device: stack[-1]
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *given, name=name: asked.append((name, *given)), raising=False)
    zeros = torch.zeros
    monkeypatch.setattr(
        torch, "zeros", lambda *size, device=None: asked.append((str(device), stack[-1])) or zeros(size)
    )
    return stack, asked


def test_streams_are_taken_in_turn_and_given_back(streams):
    stack, asked = streams
    recorder = graphs.CudaRecorder(torch.device("cuda", 0))
    aside, recorded = [], []
    recorder.aside(lambda: aside.append(stack[-1]))
    assert aside[0].waited == ["current"] and stack[0].waited == [aside[0].name]
    recorder.record(lambda: recorded.append((stack[-1], torch.is_autocast_cache_enabled())))
    assert recorded[0][0] not in (aside[0], stack[0]) and recorded[0][1] is False
    assert len(stack) == 1 and asked == [("pool", "thread_local")] and torch.is_autocast_cache_enabled()

    for error, raised in ((RuntimeError("not permitted"), "previous error"), (KeyboardInterrupt("enough"), "enough")):

        def breaks_off(error=error):
            raise error

        asked.clear()
        with pytest.raises(type(error), match=raised):
            recorder.record(breaks_off)
        assert len(stack) == 1 and torch.is_autocast_cache_enabled()
        # the pool is given back; and something trivial is recorded, apart from it, to bring the random state back
        ended = ("_cuda_endAllocateToPool", 0, "pool"), ("_cuda_releasePool", 0, "pool")
        kernel = ("cuda:0", recorded[0][0])
        assert asked == [("pool", "thread_local"), *ended, (None, "thread_local"), kernel]
    stack[0] = other = Stream("other")
    recorder.follow()
    recorder.follow()
    assert other.waited == ["current"], "once, for the stream that used the buffers last"


def test_what_is_compiled_is_not_compiled_again_while_it_is_recorded(streams):
    """Dynamo compiles for a setting of autocast's cache, which a recording turns off; and may not compile under one."""
    torch._dynamo.reset()
    compiled = []

    def count(module, inputs):
        compiled.append(module)
        return module

    recorder = graphs.CudaRecorder(torch.device("cuda", 0))
    x, step = torch.ones(3), torch.compile(lambda x: torch.tanh(2 * x), backend=count)
    for _ in range(graphs.WARM_UP):
        recorder.aside(lambda: step(x))
    assert len(compiled) == 1 and torch.is_autocast_cache_enabled()
    recorder.record(lambda: step(x))
    assert len(compiled) == 1


def test_recordings_end_with_their_sampler(recorders):
    sampler = sampler_of({}, cuda_graph=True)
    run(sampler)
    results = weakref.ref(recorders.pop().recorded[0][0])
    assert results() is not None
    del sampler
    gc.collect()
    assert results() is None


def test_parameters_ask_for_no_gradient_while_recording_and_do_afterwards(recorders):
    model, guide, asked = unet(), classifier(), []
    guide.head.bias.requires_grad_(False)
    guide.register_forward_pre_hook(lambda *_: asked.append(any(p.requires_grad for p in guide.parameters())))
    sampler = FDivSampler(model, guide, cuda_graph=True)
    run(sampler)
    assert asked and not any(asked)
    assert all(p.requires_grad == (p is not guide.head.bias) and p.grad is None for p in guide.parameters())


def first_channel(x, *_, **__):
    """A view of x whose channels lie on one another."""
    return x[:, :1].expand_as(x)


@pytest.mark.parametrize("returned", ["by the model", "by the cond_fn"])
def test_a_network_may_return_a_view_of_its_input(returned):
    """The step is written over x_t, one channel after another."""
    noise, images = torch.randn(5, 7, 3, 6, 6), []
    for view in (first_channel, lambda x, *_, **__: first_channel(x.clone())):
        if returned == "by the model":
            sampler = FDivSampler(view, shape=(3, 6, 6))
        else:
            sampler = FDivSampler(lambda x, t: torch.tanh(x), cond_fn=view, shape=(3, 6, 6))
        images.append(sampler.sample(LABELS, SEEDS, 4, noise=noise, progress=False).images)
    assert torch.equal(*images)


class Watch(TorchDispatchMode):
    """Notes, while it is on, what waits for the device or brings data to it."""

    def __init__(self):
        super().__init__()
        self.on, self.seen, self.bad = False, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        if self.on:
            self.seen += 1
            tensors = [value for value in (*args, *kwargs.values(), results) if isinstance(value, torch.Tensor)]
            hosted = any(tensor.device.type == "cpu" for tensor in tensors)
            if hosted or func in WAITS or "lift_fresh" in str(func):
                self.bad.append(str(func))
        return results


def watched_steps(sampler, **options) -> Watch:
    """What happens from the first callback to the last, through all of the loop."""
    watch = Watch()

    def look(step):
        watch.on = step.index < step.num_steps - 1

    with watch:
        sampler.sample(4, range(4), steps=6, progress=False, callback=look, **options)
    assert watch.seen > 30
    return watch


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
@pytest.mark.parametrize("with_cond_fn", [False, True])
def test_no_step_waits_for_the_device(with_cond_fn, method):
    """On tensors without data, apart from the host's: a step's operations must be on their device alone."""
    options = {"cfg_scale": 2.0, "null_class": 5, "device": "meta"}
    options |= {"sine_boost": 0.3} if method == "ddpm" else {"eta": 0.5}
    if with_cond_fn:
        options["cond_fn"] = push
    else:
        options |= {"classifier": classifier().to("meta"), "tilt": 0.3, "entropy_scaling": 3.0, "interval": (0.05, 50)}
    watch = watched_steps(FDivSampler(unet(num_classes=5).to("meta"), num_classes=5, **options), method=method)
    assert watch.bad == []


NO_WAITS = {
    "churned": ({"churn": 3.0, "tilt": 0.3}, {"method": "heun"}),
    "dpmpp": ({"entropy_scaling": 3.0}, {"method": "dpmpp"}),
    "edm rule": ({"rule": "edm", "max_guidance": 0.1}, {"method": "heun"}),
    "recurrence": ({"interval": (0.05, 50)}, {"recurrence": 2}),
    "ensemble": ({"classifier": [classifier(), classifier()]}, {}),
    "trajectory": ({}, {"trajectory": 3, "trajectory_of": "x0"}),
}


@pytest.mark.parametrize("case", NO_WAITS)
def test_no_step_of_solvers_and_options_waits(case):
    settings, options = NO_WAITS[case]
    guides = settings.get("classifier", [classifier()])
    settings = {**settings, "classifier": [guide.to("meta") for guide in guides]}
    assert watched_steps(FDivSampler(unet().to("meta"), device="meta", **settings), **options).bad == []


def test_the_watch_sees_a_wait():
    def asks(x, t):
        x.sum().item()
        return x + torch.tensor(1.0)

    watch = watched_steps(FDivSampler(asks, shape=(3, 6, 6), num_classes=5))
    assert "aten._local_scalar_dense.default" in watch.bad and "aten.lift_fresh.default" in watch.bad


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_copy_of_the_sampler_is_its_own(cuda_graph, duplicate, recorders):
    sampler = sampler_of({}, cuda_graph=cuda_graph)
    expected = run(sampler)
    assert_same_bits(run(duplicate(sampler)), expected)
    assert len(recorders) == 2 * cuda_graph and all(recorder.replays > 0 for recorder in recorders)
