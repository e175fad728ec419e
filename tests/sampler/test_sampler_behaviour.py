"""What a user of the sampler meets: seeds, batches, noise, diagnostics, callbacks, dtypes and errors."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from literal import ddpm, double, gradient_at
from toys import classifier, unet

from calguide_fast import FDivSampler, Guidance, Samples, as_cond_fn, guidance_gradient, tilt_weights, use_backend
from calguide_fast.models import LoadedClassifier
from calguide_fast.ops.noise import sampling_noise

SEEDS = [5, 2**63, 2**64 - 1, 0, 17, 3, 2**40]
LABELS = torch.tensor([0, 3, 4, 1, 2, 2, 0])


def guided(**settings) -> FDivSampler:
    return FDivSampler(unet(), classifier(), scale=3.0, **settings)


def sample(sampler: FDivSampler, labels=LABELS, seeds=SEEDS, steps=5, **options) -> Samples:
    return sampler.sample(labels, seeds=seeds, steps=steps, progress=False, **options)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


class Recorder:
    """A model that keeps what it is given."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def __call__(self, x, t):
        self.seen.append(x.clone())
        return self.model(x, t)


def start(batch_size, order=slice(None)):
    """x_T of each image, as the model sees it."""
    recorder = Recorder(unet())
    sampler = FDivSampler(recorder, shape=(3, 6, 6), num_classes=5)
    seeds = [SEEDS[i] for i in range(7)[order]]
    samples = sampler.sample(7, seeds=seeds, steps=2, batch_size=batch_size, progress=False)
    return torch.cat(recorder.seen[::2]), samples.labels


def test_noise_and_labels_are_bitwise_the_same_in_any_batch_order_and_backend():
    noise, labels = start(7)
    assert torch.equal(noise, sampling_noise(torch.tensor([5, -(2**63), -1, 0, 17, 3, 2**40]), (3, 6, 6), 0))
    for batch_size in (1, 2, 3, 100, None):
        other, other_labels = start(batch_size)
        assert torch.equal(other, noise) and torch.equal(other_labels, labels)
    reverse, reverse_labels = start(3, slice(None, None, -1))
    assert torch.equal(reverse.flip(0), noise) and torch.equal(reverse_labels.flip(0), labels)
    with use_backend("reference"):
        other, other_labels = start(4)
    assert torch.equal(other, noise) and torch.equal(other_labels, labels)


@pytest.mark.parametrize("method", ["ddpm", "ddim", "heun", "dpmpp"])
def test_images_do_not_depend_on_the_batch_beyond_rounding(method, backend):
    sampler = guided(**{"ddpm": {"sine_boost": 0.3}, "heun": {"churn": 2.0}}.get(method, {}))
    whole = sample(sampler, method=method)
    for batch_size in (1, 2, 3, 100):
        assert close(sample(sampler, method=method, batch_size=batch_size).images, whole.images)
    for b in (1, 6):
        alone = sample(sampler, LABELS[b : b + 1], SEEDS[b : b + 1], method=method)
        assert close(alone.images[0], whole.images[b])


def test_the_same_partition_is_byte_equal(backend):
    sampler = guided(tilt=-0.3)
    first, second = sample(sampler, batch_size=3), sample(sampler, batch_size=3)
    assert torch.equal(first.images, second.images)
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(vars(first.diagnostics).values(), vars(second.diagnostics).values())
    )


def test_backends_agree():
    images = []
    for name in ("cpu", "reference"):
        with use_backend(name):
            images.append(sample(guided(tilt=0.3, sine_boost=0.3)).images)
    assert torch.allclose(*images, atol=1e-4)


def test_returned_seeds_and_labels_reproduce(backend):
    sampler = guided()
    drawn = sampler.sample(6, steps=5, progress=False)
    assert drawn.seeds.shape == drawn.labels.shape == (6,) and drawn.seeds.dtype == torch.int64
    assert len(drawn.seeds.unique()) == 6 and drawn.labels.max() < 5
    assert torch.equal(sampler.sample(6, drawn.seeds, steps=5, progress=False).images, drawn.images)
    assert torch.equal(sampler.sample(drawn.labels, drawn.seeds, steps=5, progress=False).images, drawn.images)
    assert not torch.equal(sampler.sample(6, steps=5, progress=False).images, drawn.images)


def test_seeds_may_be_written_signed_or_unsigned(backend):
    signed = [5, -(2**63), -1, 0, 17, 3, 2**40]
    assert torch.equal(sample(guided(), seeds=signed).images, sample(guided(), seeds=SEEDS).images)
    assert sample(guided(), seeds=SEEDS).seeds.tolist() == signed


@pytest.mark.parametrize("method", ["ddpm", "ddim", "heun", "dpmpp"])
def test_seeds_are_the_noise_they_stand_for(method, backend):
    sampler = guided(tilt=0.2, churn=2.0 if method == "heun" else 0.0)
    seeds = torch.tensor([5, -(2**63), -1, 0, 17, 3, 2**40])
    noise = torch.stack([sampling_noise(seeds, (3, 6, 6), draw) for draw in range(6)])
    assert torch.equal(sample(sampler, method=method).images, sample(sampler, method=method, noise=noise).images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["ddpm", "ddim", "heun", "dpmpp"])
def test_noise_by_tensor_and_by_callable(method, dtype, backend):
    noise = torch.randn(6, 7, 3, 6, 6, dtype=dtype)
    by_tensor = sample(guided(), method=method, noise=noise, batch_size=4)
    draws = iter([*noise[:, :4], *noise[:, 4:]])
    by_callable = sample(guided(), method=method, noise=lambda: next(draws), batch_size=4)
    assert torch.equal(by_tensor.images, by_callable.images)
    assert next(draws, None) is None, "x_T and one for each step, no more and no fewer"


def test_given_noise_is_left_alone(backend):
    noise = torch.randn(6, 7, 3, 6, 6)
    before = noise.clone()
    sample(guided(), noise=noise)
    assert torch.equal(noise, before)


def test_running_maximum_is_each_images_own(backend):
    """An image's boost does not change with its neighbours, nor carry over from the batch before."""
    sampler = guided(sine_boost=2.0)
    assert close(sample(sampler, batch_size=2).images, sample(sampler).images)


def test_tilt_groups_are_the_batches(backend):
    sampler = guided(tilt=-1.0)
    grouped = sample(sampler, batch_size=3)
    assert grouped.batch_size == 3
    for group in (slice(0, 3), slice(3, 6), slice(6, 7)):
        alone = sample(sampler, LABELS[group], SEEDS[group])
        assert torch.equal(alone.images, grouped.images[group])
        assert alone.diagnostics.tilt_weight.mean(1).cpu() == pytest.approx(1.0, abs=1e-5)
    assert not close(sample(sampler).images, grouped.images)


def test_diagnostics_are_what_happened(backend):
    guide, noise = classifier(), torch.randn(6, 7, 3, 6, 6)
    settings = {"divergence": "reverse_kl", "entropy_weight": 0.3}
    sampler = FDivSampler(unet(), guide, tilt=-0.7, tilt_max=1.3, interval=(0.05, 60.0), scale=2.0, **settings)
    seen = []

    def look(step):
        seen.append((step.index, step.timestep, step.sigma, None if step.x0 is None else step.x0.clone()))

    found = sample(sampler, noise=noise, callback=look).diagnostics
    assert found.timesteps.tolist() == [999, 749, 500, 250, 0] == [timestep for _, timestep, _, _ in seen]
    assert found.sigmas.tolist() == [sigma for _, _, sigma, _ in seen]
    assert (found.sigmas.diff() < 0).all()
    tables = (found.gradient_norm, found.entropy, found.label_log_prob, found.tilt_weight)
    assert all(table.shape == (5, 7) for table in tables)
    inside = [0.05 < sigma <= 60.0 for _, _, sigma, _ in seen]
    assert inside == [False, True, True, True, False]
    for index, _, _, x0 in seen:
        if not inside[index]:
            assert x0 is None and all(table[index].isnan().all() for table in tables)
            continue
        logits = guide(x0).detach()
        expected = guidance_gradient(logits, LABELS.to(logits.device), **settings)
        gradient = gradient_at(lambda x0, pull=expected.grad: (guide(x0) * pull).sum(1), x0)
        weights = tilt_weights(expected.log_prob, -0.7, max_weight=1.3)
        assert torch.allclose(found.gradient_norm[index], gradient.flatten(1).norm(dim=1), rtol=1e-4)
        assert torch.allclose(found.entropy[index], expected.entropy, rtol=1e-5)
        assert torch.allclose(found.label_log_prob[index], logits.log_softmax(1)[range(7), LABELS], rtol=1e-5)
        assert torch.allclose(found.tilt_weight[index], weights, rtol=1e-5)


@pytest.mark.parametrize("method", ["heun", "dpmpp"])
def test_diagnostics_in_edms_scaling(method):
    """Of the first evaluation of each step; fractional timesteps, and levels as Karras et al. space them."""
    guide, seen = classifier(), []
    sampler = FDivSampler(unet(), guide, interval=(0.1, 60.0), scale=2.0, sigma_range=(0.05, 70.0))

    def look(step):
        seen.append((step.index, step.timestep, step.sigma, None if step.x0 is None else step.x0.clone()))

    found = sample(sampler, method=method, callback=look).diagnostics
    assert found.timesteps.tolist() == [timestep for _, timestep, _, _ in seen] and found.timesteps[1] % 1 != 0
    assert found.sigmas.tolist() == [sigma for _, _, sigma, _ in seen]
    assert found.sigmas[[0, -1]].tolist() == pytest.approx([70.0, 0.05])
    assert [x0 is None for *_, x0 in seen] == found.entropy.isnan().all(1).tolist() == [True, False, False, False, True]
    for index, _, _, x0 in seen[1:4]:
        gradient = guidance_gradient(guide(x0).detach(), LABELS)
        assert torch.allclose(found.entropy[index], gradient.entropy, rtol=1e-4)
        pull = gradient_at(lambda x0, pull=gradient.grad: (guide(x0) * pull).sum(1), x0)
        assert torch.allclose(found.gradient_norm[index], pull.flatten(1).norm(dim=1), rtol=1e-4)


def test_discrete_methods_pass_whole_timesteps_and_solvers_fractional_ones():
    for method, dtype in (("ddpm", torch.int64), ("ddim", torch.int64), ("heun", torch.float32)):
        seen = set()
        sampler = FDivSampler(lambda x, t, seen=seen: seen.add(t.dtype) or torch.tanh(x), shape=(3, 6, 6))
        sample(sampler, method=method)
        assert seen == {dtype}


def test_diagnostics_without_tilt_off_and_of_a_cond_fn(backend):
    found = sample(guided(), batch_size=3).diagnostics
    assert (found.tilt_weight == 1).all() and not found.gradient_norm.isnan().any()
    assert sample(guided(diagnostics=False)).diagnostics is None
    plain = sample(FDivSampler(unet(), classifier(), None)).diagnostics
    assert plain.gradient_norm.isnan().all()
    by_hand = FDivSampler(unet(), cond_fn=lambda x, t, y: torch.ones_like(x))
    found = sample(by_hand).diagnostics
    assert found.gradient_norm.cpu() == pytest.approx(math.sqrt(108)) and found.entropy.isnan().all()


def test_callback_sees_every_step(backend):
    steps = []

    def look(step):
        assert not torch.is_grad_enabled()
        steps.append((step.index, step.num_steps, step.images, step.x_t.clone(), step.x0.clone()))

    samples = sample(guided(), batch_size=4, callback=look)
    assert [index for index, *_ in steps] == [0, 1, 2, 3, 4] * 2
    assert {num for _, num, *_ in steps} == {5}
    assert [images for _, _, images, *_ in steps] == [slice(0, 4)] * 5 + [slice(4, 7)] * 5
    assert torch.equal(torch.cat([steps[4][3], steps[9][3]]), samples.images)
    assert all(x0.abs().max() <= 1 for *_, x0 in steps)


def test_an_error_in_the_callback_comes_through(backend):
    def stop(step):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        sample(guided(), callback=stop)


def test_progress(capsys):
    sampler = guided()
    sampler.sample(LABELS, seeds=SEEDS, steps=5, batch_size=4, progress=True)
    assert "10/10" in capsys.readouterr().err
    sampler.sample(LABELS, seeds=SEEDS, steps=5, batch_size=4, progress=False)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


@pytest.mark.parametrize("nothing", [0, [], torch.empty(0, dtype=torch.int64)], ids=str)
def test_no_images(nothing, backend):
    samples = guided(tilt=0.3).sample(nothing, steps=5, progress=False)
    assert samples.images.shape == (0, 3, 6, 6) and len(samples) == 0
    assert samples.labels.shape == samples.seeds.shape == (0,)
    assert samples.diagnostics.entropy.shape == (5, 0)
    assert samples.to_uint8().shape == (0, 6, 6, 3)


def test_one_image_one_step(backend):
    samples = guided().sample([3], seeds=[1], steps=1, progress=False)
    assert samples.images.shape == (1, 3, 6, 6) and samples.images.isfinite().all()


@pytest.mark.parametrize(
    "labels", [[0, 3, 4], (0, 3, 4), np.array([0, 3, 4]), torch.tensor([0, 3, 4], dtype=torch.int32)]
)
def test_labels_of_any_kind(labels, backend):
    samples = sample(guided(), labels, SEEDS[:3])
    assert samples.labels.tolist() == [0, 3, 4] and samples.labels.dtype == torch.int64
    assert torch.equal(samples.images, sample(guided(), LABELS[:3], SEEDS[:3]).images)


def test_a_count_of_numpy(backend):
    assert len(guided().sample(np.int64(2), steps=2, progress=False)) == 2


@pytest.mark.parametrize("inside", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes_outside_do_not_matter(inside, backend):
    def cond_fn(x, t, y):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(classifier()(x).gather(1, y[:, None]).sum(), x)[0]

    samplers = guided(), FDivSampler(unet(), cond_fn=cond_fn)
    expected = [sample(sampler).images for sampler in samplers]
    with inside():
        found = [sample(sampler, LABELS.clone(), noise=None).images for sampler in samplers]
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert not any(images.requires_grad or images.is_inference() for images in found)


def test_parameters_are_left_alone(backend):
    sampler = guided()
    before = [p.clone() for p in sampler.classifier.parameters()]
    sample(sampler)
    for p, old in zip(sampler.classifier.parameters(), before):
        assert torch.equal(p, old) and p.grad is None and p.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("which", ["model", "classifier", "both"])
@pytest.mark.parametrize("classifier_input", ["x0", "xt"])
def test_dtypes_of_the_networks(classifier_input, which, dtype, backend):
    model, guide = unet(), classifier(timed=classifier_input == "xt")
    expected = sample(FDivSampler(model, guide, classifier_input=classifier_input), seeds=SEEDS).images
    if which != "classifier":
        model = model.to(dtype)
    if which != "model":
        guide = guide.to(dtype)
    seen = []
    guide.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    sampler = FDivSampler(model, guide, classifier_input=classifier_input, tilt=0.1)
    if dtype == torch.float64 and which != "model" and backend != "reference":
        # a backend asked for by name is not replaced behind the user's back
        with pytest.raises(ValueError, match=f"'{backend}'.*does not serve torch.float64"):
            sample(sampler)
        return
    samples = sample(sampler)
    assert samples.images.dtype == torch.float32 and samples.images.isfinite().all()
    assert set(seen) == {dtype if which != "model" else torch.float32}
    # the first step multiplies the model's rounding by 160, into the clip
    assert (samples.images - expected).abs().mean() < 0.1


def test_channels_last_classifier(backend):
    guide = classifier().to(memory_format=torch.channels_last)
    seen = []
    guide.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    found = sample(FDivSampler(unet(), guide, scale=3.0)).images
    assert all(seen) and len(seen) == 5
    assert close(found, sample(guided()).images)
    both = FDivSampler(unet().to(memory_format=torch.channels_last), guide, scale=3.0)
    assert close(sample(both).images, found)


def test_images_of_another_dimension(backend):
    class Line(torch.nn.Module):
        def forward(self, x, t):
            return torch.tanh(x)

    samples = sample(FDivSampler(Line().eval(), lambda x: x.mean(2) * 5, shape=(3, 11)), [0, 2], [1, 2])
    assert samples.images.shape == (2, 3, 11) and samples.images.isfinite().all()


def test_shape_and_classes_are_read_off_the_networks():
    sampler = guided()
    assert sampler.shape == (3, 6, 6) and sampler.num_classes == 5 and not sampler.class_conditional
    assert FDivSampler(unet(num_classes=5)).class_conditional
    assert FDivSampler(unet(), shape=(3, 4, 8)).shape == (3, 4, 8)
    assert FDivSampler(unet()).guidance is None
    assert FDivSampler(unet(), classifier()).guidance == Guidance()
    assert FDivSampler(unet(), classifier(), divergence="chi2", alpha=0.5).guidance == Guidance("chi2", alpha=0.5)


def test_guidance_off_is_no_guidance(backend):
    noise = torch.randn(6, 7, 3, 6, 6)
    plain = sample(FDivSampler(unet()), noise=noise).images
    assert torch.equal(sample(FDivSampler(unet(), classifier(), None), noise=noise).images, plain)
    assert torch.equal(sample(FDivSampler(unet(), classifier(), scale=0.0), noise=noise).images, plain)
    expected = ddpm(double(unet()), noise.double(), [0, 250, 500, 749, 999])
    assert torch.allclose(plain.double(), expected, atol=1e-4)


CONSTRUCTION = [
    ({"alpha": -1}, ValueError, "alpha=-1"),
    ({"scale": math.nan}, ValueError, "scale=nan must be finite"),
    ({"sine_boost": -0.1}, ValueError, "sine_boost=-0.1 must be finite and at least 0"),
    ({"tilt": math.inf}, ValueError, "tilt=inf must be finite"),
    ({"tilt_on": "entropy"}, ValueError, "tilt_on='entropy' must be 'log_prob' or 'score'"),
    ({"tilt_max": -1}, ValueError, "tilt_max=-1"),
    ({"entropy_scaling": 0.5}, ValueError, "entropy_scaling=0.5 must be finite and at least 1"),
    ({"interval": (2, 1)}, ValueError, r"interval=\(2, 1\) must be \(lo, hi\) with 0 <= lo < hi"),
    ({"interval": (-1, 1)}, ValueError, "0 <= lo < hi"),
    ({"interval": (math.nan, 1)}, ValueError, "0 <= lo < hi"),
    ({"interval": ("a", "b")}, ValueError, "must be a pair"),
    ({"interval": 3}, ValueError, "interval=3 must be a pair"),
    ({"interval": (1, 2, 3)}, ValueError, "must be a pair"),
    ({"guidence": 1}, TypeError, "unknown keywords guidence"),
    ({"guidance": Guidance(), "alpha": 1.0}, TypeError, r"give guidance= or its fields \(alpha\), not both"),
    ({"guidance": None, "tilt": 1.0}, TypeError, r"give guidance= or its fields \(tilt\), not both"),
    ({"guidance": "js"}, TypeError, "guidance must be a Guidance or None, got str"),
    ({"classifier_input": "x1"}, ValueError, "classifier_input='x1' must be 'x0' or 'xt'"),
    ({"variance": "learned"}, ValueError, "variance='learned' must be one of"),
    ({"schedule": "quadratic"}, ValueError, "schedule='quadratic'"),
    ({"cond_fn": lambda x, t, y: x}, ValueError, "give a classifier or a cond_fn, not both"),
    ({"classifier": None, "alpha": 1.0}, ValueError, "guidance needs a classifier or a cond_fn"),
    (
        {"classifier": None, "cond_fn": lambda x, t, y: x, "tilt": 1.0},
        ValueError,
        "tilt=1.0 has no effect with a cond_fn",
    ),
    (
        {"classifier": None, "cond_fn": lambda x, t, y: x, "entropy_scaling": 2.0},
        ValueError,
        "entropy_scaling=2.0 has no effect with a cond_fn, .* it needs a classifier",
    ),
    (
        {"classifier": None, "cond_fn": lambda x, t, y: x, "guidance": Guidance("forward_kl", alpha=7.0)},
        ValueError,
        "divergence='forward_kl' has no effect with a cond_fn",
    ),
    ({"tilt_max": 3.0}, ValueError, "tilt_max=3.0 has no effect without tilt, which is 0"),
    ({"tilt_on": "score"}, ValueError, "tilt_on='score' has no effect without tilt"),
    ({"adaptive_entropy": True}, ValueError, "adaptive_entropy=True has no effect without entropy_weight, which is 0"),
    ({"classifier": 3}, TypeError, "classifier must be callable, got int"),
    ({"classifier": [abs, "resnet"]}, TypeError, r"classifier\[1\] must be callable, got str"),
    ({"classifier": None, "cond_fn": 3}, TypeError, "cond_fn must be callable, got int"),
    ({"classifier_transform": (0.5, 0.5)}, TypeError, "classifier_transform must be callable, got tuple"),
    ({"num_classes": 6}, ValueError, "num_classes=6 must be at most 5, which are the classifier's"),
    ({"num_classes": "5"}, ValueError, "num_classes='5' must be a positive integer"),
    ({"cfg_scale": 2.0}, ValueError, "cfg_scale=2.0 needs a class-conditional model and its null_class"),
    ({"cfg_scale": math.nan}, ValueError, "cfg_scale=nan must be finite"),
    ({"churn": -1}, ValueError, "churn=-1 must be finite and at least 0"),
    ({"s_tmin": math.inf}, ValueError, "s_tmin=inf must be finite"),
    ({"s_tmax": math.nan}, ValueError, "s_tmax=nan must be finite"),
    ({"s_tmin": 5.0, "s_tmax": 1.0}, ValueError, "s_tmin=5.0 must not be above s_tmax=1.0"),
    ({"sigma_range": 3.0}, ValueError, "sigma_range=3.0 must be a pair of noise levels"),
    ({"s_noise": "1"}, TypeError, "s_noise must be a number"),
    ({"rule": "elucd"}, ValueError, "rule='elucd' must be 'score' or 'edm'"),
    ({"max_guidance": -0.1}, ValueError, "max_guidance=-0.1"),
    ({"add_factor": math.nan}, ValueError, "add_factor=nan"),
    ({"rule": "edm", "classifier_input": "xt"}, ValueError, "rule='edm' needs a classifier with classifier_input='x0'"),
    ({"eta": -0.5}, ValueError, "eta=-0.5 must be finite and at least 0"),
    ({"shape": (3,)}, ValueError, r"shape=\(3,\) must be \(C, \*spatial\)"),
    ({"shape": (3, 0, 6)}, ValueError, "shape="),
    (
        {"classifier_transform": abs, "classifier_input": "xt"},
        ValueError,
        "classifier_transform needs a classifier with classifier_input='x0'",
    ),
    (
        {"classifier": None, "cond_fn": lambda x, t, y: x, "classifier_transform": abs},
        ValueError,
        "classifier_transform needs a classifier with",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), CONSTRUCTION)
def test_wrong_construction(options, error, message):
    with pytest.raises(error, match=message):
        FDivSampler(unet(), **{"classifier": classifier(), **options})


def test_networks_in_training_mode_are_refused():
    with pytest.raises(ValueError, match=r"the model is in training mode; call model.eval\(\) first"):
        FDivSampler(unet().train(), classifier())
    with pytest.raises(ValueError, match="the classifier is in training mode"):
        FDivSampler(unet(), classifier().train())


def test_a_shape_that_nobody_knows():
    with pytest.raises(ValueError, match=r"shape=\(C, H, W\) must be given"):
        FDivSampler(lambda x, t: x)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "euler"}, ValueError, "method='euler' must be one of 'ddpm', 'ddim', 'heun', 'dpmpp'"),
        ({"steps": "many"}, ValueError, "steps='many'"),
        ({"steps": 2000}, ValueError, "asks for 2000 timesteps"),
        ({"batch_size": 0}, ValueError, "batch_size=0 must be an integer, at least 1"),
        ({"batch_size": -2}, ValueError, "batch_size=-2 must be an integer, at least 1"),
        ({"batch_size": 2.5}, ValueError, "batch_size=2.5 must be an integer"),
        ({"noise": [torch.zeros(7, 3, 6, 6)] * 6}, TypeError, "noise must be a tensor, a callable.*got list"),
        ({"seeds": np.int64(3)}, TypeError, "must hold one seed for each image"),
        ({"seeds": [1, 2]}, ValueError, "seeds has 2 entries for 7 images"),
        ({"labels": LABELS.float()}, ValueError, r"labels must be \(N,\) integers, got torch.float32"),
        ({"labels": LABELS > 1}, ValueError, "labels must be"),
        ({"labels": LABELS[:, None]}, ValueError, r"labels must be \(N,\) integers, got torch.int64 of shape \(7, 1\)"),
        ({"labels": LABELS + 1}, ValueError, r"labels\[2\]=5 is out of range: labels must lie in 0\.\.4"),
        ({"labels": -1}, ValueError, "labels=-1"),
        ({"labels": True}, ValueError, "labels must be"),
        ({"labels": "3"}, TypeError, r"labels='3' must be a number of images, or \(N,\) integers"),
        ({"labels": None}, TypeError, "labels=None must be a number of images"),
        ({"noise": torch.zeros(5, 7, 3, 6, 6)}, ValueError, r"noise has shape \(5, 7, 3, 6, 6\).*\(6, 7, 3, 6, 6\)"),
        ({"noise": torch.zeros(6, 7, 3, 6, 5)}, ValueError, r"noise has shape \(6, 7, 3, 6, 5\)"),
        (
            {"noise": lambda: torch.zeros(7, 3, 6, 5)},
            ValueError,
            r"noise\(\) must return a tensor of shape \(7, 3, 6, 6\)",
        ),
        ({"noise": lambda: None}, ValueError, r"noise\(\) must return"),
    ],
)
def test_wrong_calls(options, error, message):
    arguments = {"labels": LABELS, "seeds": SEEDS, "steps": 5, "progress": False, **options}
    if not isinstance(arguments["labels"], torch.Tensor):
        arguments["seeds"] = None
    with pytest.raises(error, match=message):
        guided().sample(**arguments)


def test_wrong_calls_of_solvers():
    for steps in ("18", "ddim25", "9,9", 0, 2.5, True):
        with pytest.raises(ValueError, match=r"steps=.* must be an integer, at least 1: how many noise levels"):
            sample(guided(), steps=steps, method="heun")
    for method in ("heun", "dpmpp"):
        with pytest.raises(ValueError, match="sine_boost belongs to method='ddpm'"):
            sample(guided(sine_boost=0.3), method=method)
        with pytest.raises(
            ValueError, match=r"sigma_range=\(0.001, 5.0\) must rise, and lie within the model's range, 0.01"
        ):
            sample(guided(sigma_range=(0.001, 5.0)), method=method)
        with pytest.raises(ValueError, match="the model's eps has shape"):
            sample(FDivSampler(lambda x, t: x[:, :2], shape=(3, 6, 6)), method=method)
        with pytest.raises(ValueError, match="gradient has shape"):
            sample(FDivSampler(unet(), cond_fn=lambda x, t, y: x[:, :1]), method=method)
    for method in ("ddpm", "ddim", "dpmpp"):
        with pytest.raises(ValueError, match="rule='edm' belongs to method='heun'"):
            sample(guided(rule="edm"), method=method)


@pytest.mark.parametrize(
    ("settings", "methods", "message"),
    [
        ({"eta": 0.5}, ("ddpm", "heun", "dpmpp"), "eta=0.5 has no effect with method='{}'"),
        ({"churn": 2.0}, ("ddpm", "ddim", "dpmpp"), "churn=2.0 has no effect with method='{}'"),
        ({"s_noise": 1.1}, ("heun",), "s_noise=1.1 has no effect without churn"),
        ({"sigma_range": (0.1, None)}, ("ddpm", "ddim"), r"sigma_range=\(0.1, None\) has no effect with method='{}'"),
        ({"variance": "fixed_large"}, ("ddim", "heun", "dpmpp"), "variance='fixed_large' .*'{}': it needs 'ddpm'"),
    ],
)
def test_settings_that_the_method_leaves_without_effect(settings, methods, message):
    for method in methods:
        with pytest.raises(ValueError, match=message.format(method)):
            sample(guided(**settings), method=method)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"denoise": True}, r"must be a method denoise\(x, sigma, \*\*model_kwargs\); got bool"),
        ({"denoise": lambda x, sigma: x}, "model.sigma_min and model.sigma_max beside it; got None and None"),
        (
            {"denoise": lambda x, sigma: x, "sigma_min": "0.1", "sigma_max": "all"},
            "beside it; got '0.1' and 'all'",
        ),
    ],
)
def test_what_is_no_edm_denoiser_is_no_model_of_a_solver(attributes, message):
    model = unet()
    for name, value in attributes.items():
        setattr(model, name, value)
    for compiled in (False, True):
        sampler = FDivSampler(model, compile=compiled, num_classes=5)
        with pytest.raises(TypeError, match=f"model.denoise makes a model an EDM denoiser, and .*{message}"):
            sample(sampler, method="heun")
    # nobody else asks for it
    assert sample(FDivSampler(model), method="ddim").images.isfinite().all()


def test_more_wrong_calls():
    with pytest.raises(ValueError, match="sine_boost belongs to method='ddpm'"):
        sample(guided(sine_boost=0.3), method="ddim")
    with pytest.raises(ValueError, match="must know num_classes"):
        FDivSampler(unet()).sample(3, steps=2, progress=False)
    with pytest.raises(ValueError, match="model_output has shape"):
        sample(FDivSampler(lambda x, t: x[:, :2], shape=(3, 6, 6)))
    with pytest.raises(TypeError, match="logits must be a torch.Tensor, got tuple"):
        sample(FDivSampler(unet(), lambda x: (x.mean((2, 3)), None)))
    with pytest.raises(ValueError, match="gradient has shape"):
        sample(FDivSampler(unet(), cond_fn=lambda x, t, y: x[:, :1]))
    with pytest.raises(ValueError, match="eta=9.0 is too large"):
        sample(FDivSampler(unet(), eta=9.0), method="ddim")


def test_a_tilt_of_one_image_at_a_time():
    with pytest.raises(ValueError, match="tilt=0.3 has no effect with batch_size=1"):
        sample(guided(tilt=0.3), batch_size=1)
    assert len(sample(guided(tilt=0.3), [1], [1])) == 1


@pytest.mark.parametrize("method", ["ddpm", "heun"])
@pytest.mark.parametrize(
    ("output", "message"),
    [
        (dict(out=1), "the model must return a tensor: eps .*; got dict$"),
        (dict(sample=1), "got dict; calguide_fast.models.from_diffusers takes networks of diffusers"),
        (SimpleNamespace(sample=1), "got SimpleNamespace; calguide_fast.models.from_diffusers"),
        (None, "got NoneType$"),
    ],
)
def test_a_model_that_returns_no_tensor(output, message, method):
    with pytest.raises(TypeError, match=message):
        sample(FDivSampler(lambda x, t: output, shape=(3, 6, 6)), method=method)


def test_a_model_that_cannot_be_called():
    with pytest.raises(TypeError, match="model must be callable, got str"):
        FDivSampler("unet.pt")


def test_classifier_and_model_know_the_same_classes():
    for known in (5, 6):  # without and with a null class of its own
        model = unet(num_classes=known)
        assert FDivSampler(model, classifier()).num_classes == 5
        assert FDivSampler(model, classifier(), num_classes=3).num_classes == 3
    for known in (4, 7):
        with pytest.raises(ValueError, match=f"the classifier has num_classes=5 and the model {known}: they must be"):
            FDivSampler(unet(num_classes=known), classifier())
    # what an unconditional model says of classes is no matter
    assert FDivSampler(unet(num_classes=7), classifier(), class_conditional=False).num_classes == 5


def test_a_loaded_classifier_brings_what_it_looks_at():
    noise = torch.randn(6, 7, 3, 6, 6)
    for timed, seen in ((False, "x0"), (True, "xt")):
        loaded = LoadedClassifier(classifier(timed=timed), seen, None)
        plain = FDivSampler(unet(), loaded.module, classifier_input=seen)
        for given in (loaded, [loaded]):
            sampler = FDivSampler(unet(), given)
            assert sampler.classifier_input == seen
            assert torch.equal(sample(sampler, noise=noise).images, sample(plain, noise=noise).images)
        cond_fn = as_cond_fn(loaded)
        assert (cond_fn.classifier, cond_fn.classifier_input) == (loaded.module, seen)
        assert FDivSampler(unet(), [loaded, classifier(timed=timed)]).classifier_input == seen
        with pytest.raises(ValueError, match=f"does not go with loaded classifiers that look at {seen}"):
            FDivSampler(unet(), loaded, classifier_input={"x0": "xt", "xt": "x0"}[seen])
    clean, noisy = (LoadedClassifier(classifier(), seen, None) for seen in ("x0", "xt"))
    with pytest.raises(ValueError, match="one list does not go with loaded classifiers that look at x0 and xt"):
        FDivSampler(unet(), [clean, noisy])


def test_representations_are_short():
    sampler = guided(tilt=0.3, cfg_scale=1.0)
    assert repr(sampler) == (
        "FDivSampler(ToyUNet, ToyClassifier, Guidance('js', tilt=0.3, scale=3.0), classifier_input='x0', "
        "shape=(3, 6, 6), num_classes=5, device='cpu')"
    )
    assert repr(FDivSampler(unet(), [classifier()])).startswith("FDivSampler(ToyUNet, [ToyClassifier], Guidance('js'),")
    by_hand = FDivSampler(unet(num_classes=5), cond_fn=abs, cfg_scale=2.0, null_class=5)
    assert "Guidance('js'), cond_fn=abs, " in repr(by_hand) and "cfg_scale=2, null_class=5" in repr(by_hand)
    assert repr(FDivSampler(unet())).startswith("FDivSampler(ToyUNet, None, None, ")
    assert repr(sample(sampler, trajectory=2)) == (
        "Samples(images=(7, 3, 6, 6), labels=(7,), seeds=(7,), batch_size=7, "
        "diagnostics=Diagnostics(timesteps=(5,), sigmas=(5,), values=(5, 4, 7)), "
        "trajectory=Trajectory(of='x', steps=(2,), sigmas=(2,), images=(2, 7, 3, 6, 6)))"
    )


def test_guidance_reads_back_and_hashes():
    guidance = Guidance("alpha:1.5", epsilon=0.5, interval=[1, 5])
    assert repr(guidance) == "Guidance('alpha:1.5', epsilon=0.5, interval=(1.0, 5.0))"
    assert eval(repr(guidance)) == guidance == Guidance("alpha:1.5", epsilon=0.5, interval=np.array([1.0, 5.0]))
    assert len({guidance, Guidance("alpha:1.5", epsilon=0.5, interval=(1, 5))}) == 1


def test_the_null_class_is_not_drawn():
    """A model trained for classifier-free guidance may count its null class among its classes."""
    model = unet(num_classes=5)
    model.num_classes = 6
    sampler = FDivSampler(model, guidance=None, cfg_scale=2.0, null_class=5)
    assert sampler.num_classes == 5
    drawn = sampler.sample(200, seeds=range(200), steps=1, progress=False).labels
    assert drawn.max() == 4 and drawn.min() == 0
    assert FDivSampler(model, guidance=None).num_classes == 6
    assert FDivSampler(model, guidance=None, null_class=5, num_classes=6).num_classes == 6
    for wrong in ("x", -1, 1.5):
        with pytest.raises(ValueError, match="null_class=.* must be a label"):
            FDivSampler(model, guidance=None, cfg_scale=2.0, null_class=wrong)


def test_a_classifier_that_hides_its_gradient():
    guide = classifier()
    with pytest.raises(ValueError, match="do not depend differentiably"):
        sample(FDivSampler(unet(), torch.no_grad()(guide.forward), num_classes=5))


def test_results_are_float32_whatever_the_default_dtype():
    sampler = guided()
    torch.set_default_dtype(torch.float64)
    try:
        found = sample(sampler)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.images.dtype == torch.float32 and found.diagnostics.gradient_norm.dtype == torch.float32
    assert torch.equal(found.images, sample(sampler).images)


def test_the_default_device_does_not_matter_to_a_model_that_has_one(backend):
    sampler = guided(tilt=0.3)
    torch.manual_seed(5)
    expected = sampler.sample(LABELS, steps=3, progress=False)
    torch.manual_seed(5)
    with torch.device("meta"):
        found = sampler.sample(LABELS, steps=3, progress=False)
    assert torch.equal(found.images, expected.images) and torch.equal(found.seeds, expected.seeds)
    assert torch.equal(found.diagnostics.timesteps, expected.diagnostics.timesteps)


def test_a_plain_callable_is_run_on_the_default_device():
    def model(x, t):
        return x

    assert FDivSampler(model, shape=(3, 6, 6)).device.type == "cpu"
    with torch.device("meta"):
        assert FDivSampler(model, shape=(3, 6, 6)).device.type == "meta"
        assert FDivSampler(model, shape=(3, 6, 6), device="cpu").device.type == "cpu"
