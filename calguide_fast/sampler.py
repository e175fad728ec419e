"""FDivSampler: the guided reverse process, readable from top to bottom."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from calguide_fast.graphs import Graphs
from calguide_fast.guidance import SETTINGS, Guidance, ImageGradient
from calguide_fast.networks import frozen, prepared
from calguide_fast.noise import as_seeds, draw_labels
from calguide_fast.ops.checks import check_labels, number
from calguide_fast.ops.coefficients import Coefficient
from calguide_fast.ops.guidance import GuidanceStats
from calguide_fast.ops.noise import sampling_noise
from calguide_fast.ops.step import METHODS, guided_step, predict_x0
from calguide_fast.ops.tilt import tilt_weights
from calguide_fast.samples import Diagnostics, Samples
from calguide_fast.schedule import VARIANCES, Schedule, Timeline

Model = Callable[..., Tensor]
Noise = Tensor | Callable[[], Tensor]


class Step(NamedTuple):
    """What a callback sees after each step of a batch."""

    index: int  # type: ignore[assignment]  # hides tuple's method; 0 for the first step from x_T
    num_steps: int
    timestep: int  # of the original process
    sigma: float  # noise level before the step
    images: slice  # which images of the run these are
    x_t: Tensor  # (B, C, *spatial) after the step; a buffer that is written again, so clone it to keep it
    x0: Tensor | None  # the prediction that was classified, if any; with cuda_graph a buffer, too


class _Missing:
    """Tells "guidance not given" from ``guidance=None``, which asks for none."""


_DEFAULT = _Missing()
# for the numbers that every step takes, guided or not
_UNGUIDED = Guidance("none")


class FDivSampler:
    """Samples from a diffusion model, guided toward labels by a classifier.

    Args:
        model: ``model(x_t, t, **model_kwargs)`` returns ε̂ (B, C, *spatial) or ε̂ and v (B, 2C, *spatial); ``t`` is
            (B,) int64, the original timestep. A class-conditional model gets ``y=labels`` too.
        classifier: ``classifier(x0)`` or, for ``classifier_input="xt"``, ``classifier(x_t, t)``; returns logits
            (B, num_classes) and is differentiable.
        guidance: a :class:`Guidance`, or None to sample without. Its fields may be given as keywords instead:
            ``FDivSampler(model, classifier, divergence="js", alpha=0.5)``.
        schedule: ``"linear"``, ``"cosine"``, a :class:`calguide_fast.schedule.Schedule` or a (T,) table of betas.
        classifier_input: ``"x0"``: an off-the-shelf classifier of clean images sees the clipped x̂₀, and the gradient
            is taken there, with no pass back through the model (EluCD). ``"xt"``: a noise-aware one sees x_t (ADM-G).
        cond_fn: ``cond_fn(x_t, t, y=labels, **model_kwargs)`` returning an image gradient, in place of a classifier
            (guided-diffusion's convention).
        cfg_scale: classifier-free guidance ε̂ = ε̂_u + w (ε̂_c − ε̂_u); 1 is the conditional model by itself.
        null_class: the label that makes the model unconditional, for ``cfg_scale``; never drawn.
        class_conditional: whether the model takes ``y``; read off ``model.class_conditional`` if not given.
        num_classes: of the labels; read off the classifier or the model if not given.
        shape: (C, *spatial) of one image; read off ``model.in_channels`` and ``model.image_size`` if not given.
        variance: ``"fixed_small"`` or ``"fixed_large"``, for models that predict no v.
        eta: η of DDIM.
        clip_denoised: clip x̂₀ to [−1, 1].
        classifier_transform: differentiable, applied to x̂₀ before the classifier (normalise, resize).
        model_kwargs: further keywords for the model and the ``cond_fn``.
        diagnostics: record gradient norms and the classifier's confidence at every step.
        device: where to sample; the model's own if not given, or torch's default device for a plain callable.
        cuda_graph: record a whole step (model, classifier, its gradient, guidance) as one CUDA graph and replay it.
            The first three steps of each kind and batch size run as usual, and the host waits for the device while the
            fourth is recorded; recordings of the last eight batch sizes are kept from one run to the next, for as long
            as the settings, the networks and their parameters' places in memory stay. What the networks and a
            ``cond_fn`` decide in Python is decided once: change anything there but the values of tensors, and make a
            new sampler. What they are given are buffers that the next step overwrites: one that keeps its input from
            step to step must clone it. Where no graph can be recorded (no CUDA device, torch.distributed in use, a
            network that waits for the device) a RuntimeWarning says why, and sampling goes on without; so does, with
            no warning, a run that begins while another of the same sampler lasts (in another thread or a callback).
        compile: wrap the model and the classifier in ``torch.compile``.
        dtype: float16, bfloat16 or float32: run copies of the model and the classifier, converted; through their own
            ``convert_dtype`` where they have one. The images stay float32.
        channels_last: run copies of the model and the classifier in that memory format.

    Raises:
        TypeError, ValueError: at construction, for settings that are wrong or contradict each other.

    Source: arXiv 2511.05844; Dhariwal & Nichol, arXiv 2105.05233; EluCD, arXiv 2310.11311.
    """

    def __init__(
        self,
        model: Model,
        classifier: Callable[..., Tensor] | None = None,
        guidance: Guidance | None | _Missing = _DEFAULT,
        schedule: str | Schedule | Sequence[float] | np.ndarray | Tensor = "linear",
        classifier_input: str = "x0",
        *,
        cond_fn: Callable[..., Tensor] | None = None,
        cfg_scale: float = 1.0,
        null_class: int | None = None,
        class_conditional: bool | None = None,
        num_classes: int | None = None,
        shape: Sequence[int] | None = None,
        variance: str = "fixed_small",
        eta: float = 0.0,
        clip_denoised: bool = True,
        classifier_transform: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        diagnostics: bool = True,
        device: torch.device | str | None = None,
        cuda_graph: bool = False,
        compile: bool = False,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        **guidance_settings: Any,
    ) -> None:
        self.guidance = _resolve_guidance(guidance, guidance_settings, classifier is not None or cond_fn is not None)
        self.model = model = prepared("model", model, dtype, channels_last, compile)
        if classifier is not None:
            classifier = prepared("classifier", classifier, dtype, channels_last, compile)
        self.classifier = classifier
        self.cond_fn = cond_fn
        self.schedule = Schedule.of(schedule)
        self.classifier_input = classifier_input
        self.cfg_scale = number("cfg_scale", cfg_scale)
        self.null_class = null_class
        self.class_conditional = _read(class_conditional, model, "class_conditional", False)
        self.num_classes = _num_classes(num_classes, classifier, model, null_class)
        self.shape = _image_shape(shape, model)
        self.variance = variance
        self.eta = number("eta", eta, low=0.0)
        self.clip_denoised = clip_denoised
        self.classifier_transform = classifier_transform
        self.model_kwargs = dict(model_kwargs or {})
        self.diagnostics = diagnostics
        self.device = torch.device(device) if device is not None else _device_of(model)
        self._model_dtype = _dtype_of(model)
        self._classifier_dtype = _dtype_of(classifier)
        self._classifier_layout = _layout_of(classifier)
        self._graphs = Graphs() if cuda_graph else None
        self._check()

    def _check(self) -> None:
        if self.classifier_input not in ("x0", "xt"):
            raise ValueError(f"classifier_input={self.classifier_input!r} must be 'x0' or 'xt'")
        if self.variance not in VARIANCES:
            raise ValueError(f"variance={self.variance!r} must be one of {', '.join(map(repr, VARIANCES))}")
        if self.classifier is not None and self.cond_fn is not None:
            raise ValueError("give a classifier or a cond_fn, not both")
        if self.guidance is not None and self.classifier is None and self.cond_fn is None:
            raise ValueError("guidance needs a classifier or a cond_fn; guidance=None samples without")
        needs_logits = self.guidance is not None and (self.guidance.tilt or self.guidance.entropy_scaling is not None)
        if self.cond_fn is not None and needs_logits:
            raise ValueError("tilt and entropy_scaling need a classifier's logits, which a cond_fn does not show")
        if self.classifier_transform is not None and (self.classifier is None or self.classifier_input != "x0"):
            raise ValueError("classifier_transform needs a classifier with classifier_input='x0'")
        if self.null_class is not None and (not _is_integer(self.null_class) or self.null_class < 0):
            raise ValueError(f"null_class={self.null_class!r} must be a label: an integer, 0 or more")
        if self.cfg_scale != 1.0 and (self.null_class is None or not self.class_conditional):
            raise ValueError(f"cfg_scale={self.cfg_scale!r} needs a class-conditional model and its null_class")
        for name in ("model", "classifier"):
            if getattr(getattr(self, name), "training", False):
                raise ValueError(f"the {name} is in training mode; call {name}.eval() first")

    @torch.inference_mode(False)
    @torch.no_grad()
    def sample(
        self,
        labels: int | Sequence[int] | Tensor,
        seeds: Sequence[int] | Tensor | None = None,
        steps: str | int = "250",
        method: str = "ddpm",
        batch_size: int | None = None,
        noise: Noise | None = None,
        progress: bool = True,
        callback: Callable[[Step], None] | None = None,
    ) -> Samples:
        """Sample one image for each label.

        Args:
            labels: (N,) class labels, or the number N of images, whose labels are then drawn from their seeds.
            seeds: N integers, one 64-bit seed for each image; None draws them (they are returned). An image's noise
                and drawn label depend on its seed alone, bit for bit, whatever the batch size.
            steps: OpenAI's respacing: ``"250"``, 250, ``"10,15,20"``, ``"ddim25"``.
            method: ``"ddpm"`` or ``"ddim"``.
            batch_size: images at a time, all at once if None. Tilting weighs the images of a batch against each other.
            noise: every Gaussian draw, in place of the seeds': (steps+1, N, C, *spatial), x_T first, then one for each
                step in order of use, or a callable that returns them for the current batch one by one.
            progress: show a progress bar.
            callback: called with a :class:`Step` after each step.

        Returns:
            :class:`calguide_fast.samples.Samples`.
        """
        if method not in METHODS:
            raise ValueError(f"method={method!r} must be one of {', '.join(map(repr, METHODS))}")
        if method == "ddim" and self.guidance is not None and self.guidance.sine_boost:
            raise ValueError("sine_boost belongs to method='ddpm'")
        timeline = self.schedule.respaced(steps)
        wanted = self._wanted(labels)
        count = wanted if isinstance(wanted, int) else len(wanted)
        seeds = as_seeds(seeds, count)
        labels = draw_labels(seeds, self._known_classes()) if isinstance(wanted, int) else wanted
        batch_size = max(count, 1) if batch_size is None else batch_size
        if not _is_integer(batch_size) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be an integer, at least 1")
        if noise is not None and not isinstance(noise, Tensor) and not callable(noise):
            raise TypeError(f"noise must be a tensor, a callable that returns one, or None; got {type(noise).__name__}")
        if isinstance(noise, Tensor) and tuple(noise.shape) != (len(timeline) + 1, count, *self.shape):
            expected = (len(timeline) + 1, count, *self.shape)
            raise ValueError(f"noise has shape {tuple(noise.shape)}; it must be (steps+1, N, C, *spatial) = {expected}")

        images = torch.empty((count, *self.shape), dtype=torch.float32, device=self.device)
        record = Diagnostics.empty(timeline, count, self.device) if self.diagnostics else None
        coefficients = timeline.coefficients(self.variance, self.eta).to(self.device)
        device_labels, device_seeds = labels.to(self.device), seeds.to(self.device)
        starts = range(0, count, batch_size)
        with (
            tqdm(total=len(starts) * len(timeline), disable=not progress, unit="step") as bar,
            self._borrowed_graphs() as graphs,
            frozen(None if graphs is None else self.classifier),
        ):
            for start in starts:
                batch = slice(start, min(start + batch_size, count))
                run = _Batch(batch, device_labels[batch], device_seeds[batch])
                draws = self._draws(noise, run)
                for step in self._reverse(run, draws, timeline, coefficients, method, record, graphs):
                    bar.update()
                    if callback is not None:
                        callback(step)
                images[batch] = step.x_t
        return Samples(images, labels, seeds, batch_size, record)

    def _borrowed_graphs(self) -> AbstractContextManager[Graphs | None]:
        if self._graphs is None:
            return nullcontext()
        settings = [value for name, value in vars(self).items() if name != "_graphs"]
        return self._graphs.borrowed(self.device, [*settings, *self.model_kwargs.values()])

    def _reverse(
        self,
        run: _Batch,
        draws: Iterator[Tensor | None],
        timeline: Timeline,
        coefficients: Tensor,
        method: str,
        record: Diagnostics | None,
        graphs: Graphs | None,
    ) -> Iterator[Step]:
        """The loop: from x_T to x_0, one batch."""
        x_t = next(draws)
        if x_t is None:
            x_t = sampling_noise(run.seeds, self.shape, draw=0)
        x_t = x_t.to(self.device, torch.float32, copy=True)
        boosted = self.guidance is not None and self.guidance.sine_boost
        state = _State(x_t, run.labels, run.seeds, x_t.new_zeros(len(x_t)) if boosted else None)
        if graphs is not None:
            state = graphs.hold(state)
        random = method == "ddpm" or self.eta > 0
        times = coefficients[:, Coefficient.TIMESTEP].long()[:, None].repeat(1, len(x_t))

        for index, k in enumerate(reversed(range(len(timeline)))):
            timestep, sigma = int(timeline.timesteps[k]), float(timeline.sigmas[k])
            draw = next(draws)
            guided = self.guidance is not None and self.guidance.guides_at(sigma)
            kind = _Kind(method, guided, seeded=random and draw is None)
            inputs = _Inputs(times[k], coefficients[k], draw if random else None)
            if graphs is None:
                found = self._step(kind, state, inputs)
            else:
                found = graphs.run(self._step, kind, inputs)
            if record is not None and found.diagnostics is not None:
                record.values[index, :, run.images] = found.diagnostics
            yield Step(index, len(timeline), timestep, sigma, run.images, state.x_t, found.x0)

    def _step(self, kind: _Kind, state: _State, inputs: _Inputs) -> _Found:
        """One step of the loop: x_t becomes x_{t−1} in place."""
        x_t, labels, seeds, variance_max = state
        t, coefficients, noise = inputs
        guidance = self.guidance if self.guidance is not None else _UNGUIDED
        model_output = _apart(_at_most_float32(self._predict(x_t, t, labels)), x_t)

        x0 = found = scores = None
        if kind.guided:
            if self.classifier is not None and self.classifier_input == "x0":
                x0 = self._predict_x0(x_t, model_output, coefficients)
            found = self._image_gradient(guidance, x_t if x0 is None else x0, t, labels)
            scores = guidance.tilted(found.stats) if found.stats is not None else None

        guided_step(
            x_t,
            model_output,
            coefficients,
            _apart(found.gradient, x_t) if found is not None else None,
            method=kind.method,
            scale=guidance.scale,
            scores=scores,
            tilt=guidance.tilt,
            max_weight=guidance.tilt_max,
            noise=noise,
            seeds=seeds if kind.seeded else None,
            variance_max=variance_max,
            sine_boost=guidance.sine_boost,
            clip=self.clip_denoised,
            out=x_t,
        )
        if found is None or not self.diagnostics:
            return _Found(x0, None)
        weights = None if scores is None else tilt_weights(scores, guidance.tilt, max_weight=guidance.tilt_max)
        return _Found(x0, Diagnostics.of_step(found, weights))

    def _predict(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        x_t = x_t.to(self._model_dtype)
        if not self.class_conditional:
            return self.model(x_t, t, **self.model_kwargs)
        if self.cfg_scale == 1.0 or self.null_class is None:
            return self.model(x_t, t, y=labels, **self.model_kwargs)
        null = torch.full_like(labels, self.null_class)
        both = self.model(
            x_t.repeat(2, *[1] * len(self.shape)), t.repeat(2), y=torch.cat([labels, null]), **self.model_kwargs
        )
        conditional, unconditional = both.chunk(2)
        channels = self.shape[0]
        eps = torch.lerp(unconditional[:, :channels], conditional[:, :channels], self.cfg_scale)
        return torch.cat([eps, conditional[:, channels:]], 1)

    def _predict_x0(self, x_t: Tensor, model_output: Tensor, coefficients: Tensor) -> Tensor:
        """x̂₀ as the classifier wants it."""
        dtype = torch.float32 if self._classifier_dtype == torch.float64 else self._classifier_dtype
        return predict_x0(x_t, model_output, coefficients, self.clip_denoised, dtype, self._classifier_layout)

    def _image_gradient(self, guidance: Guidance, x: Tensor, t: Tensor, labels: Tensor) -> ImageGradient:
        if self.cond_fn is not None:
            return ImageGradient(_at_most_float32(self.cond_fn(x, t, y=labels, **self.model_kwargs)), None)
        x = x.to(self._classifier_dtype, memory_format=self._classifier_layout)
        gradient, stats = guidance.image_gradient(lambda x: self._classify(x, t), x, labels)
        narrowed = None if stats is None else GuidanceStats(*map(_at_most_float32, stats))
        return ImageGradient(_at_most_float32(gradient), narrowed)

    def _classify(self, x: Tensor, t: Tensor) -> Tensor:
        """The classifier's logits of x̂₀ or x_t."""
        assert self.classifier is not None
        if self.classifier_input == "xt":
            return self.classifier(x, t)
        return self.classifier(x if self.classifier_transform is None else self.classifier_transform(x))

    def _draws(self, noise: Noise | None, run: _Batch) -> Iterator[Tensor | None]:
        """x_T, then each step's noise in order of use; None where the seeds are to be used."""
        if noise is None:
            return itertools.repeat(None)
        if isinstance(noise, Tensor):
            return (_uploaded(draw[run.images], self.device) for draw in noise)
        return (self._checked(noise(), run) for _ in itertools.count())

    def _checked(self, draw: Tensor, run: _Batch) -> Tensor:
        expected = (len(run.labels), *self.shape)
        if not isinstance(draw, Tensor) or tuple(draw.shape) != expected:
            raise ValueError(f"noise() must return a tensor of shape {expected}, got {getattr(draw, 'shape', draw)!r}")
        return _uploaded(draw, self.device)

    def _wanted(self, labels: int | Sequence[int] | Tensor) -> int | Tensor:
        """How many images to draw labels for, or the labels: (N,) int64 on the CPU."""
        if _is_integer(labels):
            if labels < 0:
                raise ValueError(f"labels={labels} must not be negative, as a number of images")
            return int(labels)
        labels = torch.as_tensor(labels, device="cpu")
        if labels.ndim != 1 or (labels.numel() and (labels.is_floating_point() or labels.dtype == torch.bool)):
            raise ValueError(f"labels must be (N,) integers, got {labels.dtype} of shape {tuple(labels.shape)}")
        # a copy: one made in inference mode could not take part in a classifier's backward pass
        labels = labels.to("cpu", torch.int64, copy=True)
        if self.num_classes is not None:
            check_labels(labels, self.num_classes)
        return labels

    def _known_classes(self) -> int:
        if self.num_classes is None:
            raise ValueError("to draw labels the sampler must know num_classes; give it or the labels themselves")
        return self.num_classes


class _Batch(NamedTuple):
    images: slice
    labels: Tensor  # (B,) int64 on the sampler's device
    seeds: Tensor  # (B,) int64 on the sampler's device


class _Kind(NamedTuple):
    """In what, other than the values of tensors, one step differs from another of the same sampler."""

    method: str
    guided: bool
    seeded: bool  # whether its noise is drawn from the seeds


class _State(NamedTuple):
    """What lasts while a batch is sampled; steps write to x_t and variance_max."""

    x_t: Tensor  # (B, C, *spatial) float32
    labels: Tensor  # (B,) int64
    seeds: Tensor  # (B,) int64
    variance_max: Tensor | None  # (B,) float32, with a sine boost


class _Inputs(NamedTuple):
    """What is new at each step."""

    t: Tensor  # (B,) int64
    coefficients: Tensor  # (16,) float32
    noise: Tensor | None  # (B, C, *spatial) float32, where it is given


class _Found(NamedTuple):
    """What a step leaves beside x_t."""

    x0: Tensor | None  # (B, C, *spatial)
    diagnostics: Tensor | None  # (4, B) float32


def _resolve_guidance(guidance: Guidance | None | _Missing, settings: dict[str, Any], guided: bool) -> Guidance | None:
    unknown = sorted(set(settings) - SETTINGS)
    if unknown:
        raise TypeError(f"FDivSampler got unknown keywords {', '.join(unknown)}")
    if isinstance(guidance, _Missing):
        return Guidance(**settings) if guided or settings else None
    if settings:
        raise TypeError(f"give guidance= or its fields ({', '.join(sorted(settings))}), not both")
    if guidance is not None and not isinstance(guidance, Guidance):
        raise TypeError(f"guidance must be a Guidance or None, got {type(guidance).__name__}")
    return guidance


def _at_most_float32(tensor: Tensor) -> Tensor:
    """What a float64 network gives, in the precision of x_t."""
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _apart(tensor: Tensor, x_t: Tensor) -> Tensor:
    """The tensor, copied if it lies in x_t's memory, as where a network gives back a view of its input."""
    return tensor.clone() if 0 <= tensor.data_ptr() - x_t.data_ptr() < x_t.nbytes else tensor


def _uploaded(draw: Tensor, device: torch.device) -> Tensor:
    """The draw on the device as float32; the host does not wait for its copy."""
    draw = draw.to(torch.float32)
    if device.type == "cuda" and draw.device.type == "cpu":
        # a page-locked buffer of its own: the caller may write to the draw again before the copy is made. PyTorch keeps
        # such buffers, and gives one out again once the device has read it
        return torch.empty_like(draw, pin_memory=True).copy_(draw).to(device, non_blocking=True)
    return draw.to(device)


def _read(value: Any, module: Any, name: str, default: Any) -> Any:
    """``value`` if given, else what the module says of itself."""
    if value is not None:
        return value
    said = getattr(module, name, None)
    return default if said is None else said


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _num_classes(given: int | None, classifier: Any, model: Any, null_class: int | None) -> int | None:
    """How many classes there are to draw labels from, as far as anybody says."""
    number = _read(given, classifier, "num_classes", None)
    if number is not None:
        return number
    number = _read(None, model, "num_classes", None)
    # a model that was trained with a null class may count it, last, among its own
    return number - 1 if number is not None and null_class == number - 1 else number


def _image_shape(shape: Sequence[int] | None, model: Any) -> tuple[int, ...]:
    if shape is None:
        channels, size = getattr(model, "in_channels", None), getattr(model, "image_size", None)
        if channels is None or size is None:
            raise ValueError(
                "shape=(C, H, W) must be given: the model has no in_channels and image_size to read it off"
            )
        height, width = size if isinstance(size, Sequence) else (size, size)
        shape = (channels, height, width)
    if not all(_is_integer(side) and side > 0 for side in shape) or len(shape) < 2:
        raise ValueError(f"shape={tuple(shape)!r} must be (C, *spatial), positive integers")
    return tuple(map(int, shape))


def _floating_parameters(module: Any) -> list[Tensor]:
    return [p for p in module.parameters() if p.is_floating_point()] if isinstance(module, nn.Module) else []


def _device_of(module: Any) -> torch.device:
    return next((p.device for p in _floating_parameters(module)), torch.get_default_device())


def _dtype_of(module: Any) -> torch.dtype:
    """The dtype that a module's parameters share; one that mixes dtypes converts its input itself."""
    dtypes = {p.dtype for p in _floating_parameters(module)}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _layout_of(module: Any) -> torch.memory_format:
    for p in _floating_parameters(module):
        if p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format
