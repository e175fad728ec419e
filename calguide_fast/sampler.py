"""FDivSampler: the guided reverse process, readable from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from calguide_fast.classifiers import Classifier, as_given
from calguide_fast.declared import denoiser_range_of, image_shape_of, num_classes_of, said, schedule_of
from calguide_fast.diffusion_step import DiffusionStep
from calguide_fast.draws import Draws, Noise, check_noise
from calguide_fast.ensemble import shares
from calguide_fast.graphs import Graphs
from calguide_fast.guidance import SETTINGS, Guidance
from calguide_fast.guides import Classifiers, Guide, OwnGradient, as_member
from calguide_fast.karras import Churn, KarrasLevels, as_range, within
from calguide_fast.method_settings import check_batch_size, check_cond_fn_settings, check_method_settings
from calguide_fast.networks import check_callable, denoise_of, device_of, dtype_of, frozen, prepared
from calguide_fast.noise import as_seeds, draw_labels
from calguide_fast.ops.checks import check_labels, is_integer, number
from calguide_fast.ops.coefficients import Coefficient
from calguide_fast.ops.step import METHODS
from calguide_fast.predictor import Predictor
from calguide_fast.samples import Diagnostics, Samples
from calguide_fast.schedule import VARIANCES, Schedule, Timeline
from calguide_fast.scratch import Scratch
from calguide_fast.solver_step import SolverStep
from calguide_fast.solvers import SOLVERS
from calguide_fast.steps import Inputs, Kind, Left, Parts, State
from calguide_fast.trajectory import Trajectory

Model = Callable[..., Tensor]


class Step(NamedTuple):
    """What a callback sees after each step of a batch."""

    index: int  # type: ignore[assignment]  # hides tuple's method; 0 for the first step from x_T
    num_steps: int
    timestep: float  # of the original process; an integer but for the methods in EDM's scaling
    sigma: float  # noise level before the step
    images: slice  # which images of the run these are
    x_t: Tensor  # (B, C, *spatial) after the step; a buffer that is written again, so clone it to keep it. The methods
    # "heun" and "dpmpp" have x = x₀ + σ n in it
    x0: Tensor | None  # the prediction that was classified, or is kept, if any; a buffer, too


class _Missing:
    """Tells "guidance not given" from ``guidance=None``, which asks for none."""


_DEFAULT = _Missing()
# for the numbers that every step takes, guided or not
_UNGUIDED = Guidance("none")


class FDivSampler:
    """Samples from a diffusion model, guided toward labels by a classifier.

    Args:
        model: ``model(x_t, t, **model_kwargs)`` returns ε̂ (B, C, *spatial) or ε̂ and v (B, 2C, *spatial); ``t`` is
            (B,) int64, the original timestep, and float32, fractional, for the methods ``"heun"`` and ``"dpmpp"``. A
            class-conditional model gets ``y=labels`` too. Those two methods use an EDM denoiser as it is: a model with
            ``denoise(x, sigma, **model_kwargs)``, x float32 in EDM's scaling and sigma (B,) float32, that returns the
            denoised images, and with ``sigma_min`` and ``sigma_max``.
        classifier: ``classifier(x0)`` or, for ``classifier_input="xt"``, ``classifier(x_t, t)``; returns logits
            (B, num_classes) and is differentiable. Or what :func:`calguide_fast.models.load_classifier` returns. A
            list of several guides by the mean of their scores. The images it is given are a buffer that the next step
            overwrites: one that keeps them must clone them. Without one, and without a ``cond_fn``, the model alone is
            sampled.
        guidance: a :class:`Guidance`, or None to sample without. Its fields may be given as keywords instead:
            ``FDivSampler(model, classifier, divergence="js", alpha=0.5)``. If neither is given, ``Guidance()`` where
            there is a classifier or a ``cond_fn``, and otherwise None; settings with nothing to guide are an error.
        schedule: ``"linear"``, ``"cosine"``, a :class:`calguide_fast.schedule.Schedule` or a (T,) table of betas; if
            not given, the Schedule that ``model.schedule`` is, as an adapter's is, or the linear one.
        classifier_input: ``"x0"``: an off-the-shelf classifier of clean images sees the clipped x̂₀, and the gradient
            is taken there, with no pass back through the model (EluCD). ``"xt"``: a noise-aware one sees x_t (ADM-G).
            If not given, what a loaded classifier looks at, or ``"x0"``.
        cond_fn: ``cond_fn(x_t, t, y=labels, **model_kwargs)`` returning an image gradient, in place of a classifier
            (guided-diffusion's convention).
        classifier_weights: of the classifiers in a list, in place of equal ones; their sum does not matter, and one
            whose weight is 0 is not run.
        group: of ``torch.distributed``: tilting weighs the images that its ranks sample at the same time against each
            other. All ranks must run the same number of batches and steps.
        cfg_scale: classifier-free guidance ε̂ = ε̂_u + w (ε̂_c − ε̂_u); 1 is the conditional model by itself.
        null_class: the label that makes the model unconditional, for ``cfg_scale``; never drawn.
        class_conditional: whether the model takes ``y``; read off ``model.class_conditional`` if not given.
        num_classes: of the labels; read off the classifier or the model if not given. A classifier and a
            class-conditional model that declare theirs must agree, but for a null class that the model counts last.
        shape: (C, *spatial) of one image; read off ``model.in_channels`` and ``model.image_size`` if not given.
        variance: ``"fixed_small"`` or ``"fixed_large"`` of DDPM's steps, for models that predict no v.
        eta: η of DDIM; as variance, churn and sigma_range, an error with a method that it does nothing for.
        churn, s_tmin, s_tmax, s_noise: EDM's stochasticity of ``"heun"``: see
            :class:`calguide_fast.karras.Churn`.
        sigma_range: (lowest, highest) noise level of ``"heun"`` and ``"dpmpp"``, in EDM's units; EDM's (0.002, 80), as
            far as the schedule or the denoiser goes, if not given, or where an end is None.
        clip_denoised: clip x̂₀ to [−1, 1]: for the classifier; in ``"ddpm"`` and ``"ddim"`` before guidance, as
            guided-diffusion does, in ``"heun"`` and ``"dpmpp"`` after it, which is DPM-Solver++'s thresholding. An EDM
            denoiser's is clipped for the classifier alone, as EDM's own samplers do not clip.
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

    Source: arXiv 2511.05844; Dhariwal & Nichol, arXiv 2105.05233; EluCD, arXiv 2310.11311; EDM, arXiv 2206.00364;
    DPM-Solver++, arXiv 2211.01095.
    """

    def __init__(
        self,
        model: Model,
        classifier: Classifier | Sequence[Classifier] | None = None,
        guidance: Guidance | None | _Missing = _DEFAULT,
        schedule: str | Schedule | Sequence[float] | np.ndarray | Tensor | None = None,
        classifier_input: str | None = None,
        *,
        cond_fn: Callable[..., Tensor] | None = None,
        classifier_weights: Sequence[float] | None = None,
        group: torch.distributed.ProcessGroup | None = None,
        cfg_scale: float = 1.0,
        null_class: int | None = None,
        class_conditional: bool | None = None,
        num_classes: int | None = None,
        shape: Sequence[int] | None = None,
        variance: str = "fixed_small",
        eta: float = 0.0,
        churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        sigma_range: tuple[float | None, float | None] | None = None,
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
        check_callable("model", model)
        for name, function in (("cond_fn", cond_fn), ("classifier_transform", classifier_transform)):
            if function is not None:
                check_callable(name, function)
        given = as_given(classifier, classifier_input)
        self.guidance = _resolve_guidance(guidance, guidance_settings, classifier is not None or cond_fn is not None)
        self.model = model = prepared("model", model, dtype, channels_last, compile)
        self._denoise = denoise_of(model, compile)
        networks = tuple(prepared("classifier", network, dtype, channels_last, compile) for network in given.networks)
        # one of no weight is not asked: 0 times its NaN would be NaN
        shared = zip(networks, shares(len(networks), classifier_weights))
        self._members = tuple(as_member(network, share) for network, share in shared if share)
        self.classifier = networks if given.several else networks[0] if networks else None
        self.cond_fn = cond_fn
        self.group = group
        self.schedule = schedule_of(model) if schedule is None else Schedule.of(schedule)
        self.classifier_input = given.classifier_input
        self.cfg_scale = number("cfg_scale", cfg_scale)
        self.null_class = null_class
        self.class_conditional = said(class_conditional, model, "class_conditional", False)
        self.num_classes = num_classes_of(num_classes, networks, model, self.class_conditional, null_class)
        self.shape = image_shape_of(shape, model)
        self.variance = variance
        self.eta = number("eta", eta, low=0.0)
        self.churn = Churn(churn, s_tmin, s_tmax, s_noise)
        self.sigma_range = as_range(sigma_range)
        self.clip_denoised = clip_denoised
        self.classifier_transform = classifier_transform
        self.model_kwargs = dict(model_kwargs or {})
        self.diagnostics = diagnostics
        self.device = torch.device(device) if device is not None else device_of(model)
        self._model_dtype = dtype_of(model)
        self._graphs = Graphs() if cuda_graph else None
        self._check()

    def _check(self) -> None:
        if self.variance not in VARIANCES:
            raise ValueError(f"variance={self.variance!r} must be one of {', '.join(map(repr, VARIANCES))}")
        if self._members and self.cond_fn is not None:
            raise ValueError("give a classifier or a cond_fn, not both")
        if self.guidance is not None and not self._members and self.cond_fn is None:
            raise ValueError("guidance needs a classifier or a cond_fn; guidance=None samples without")
        if self.cond_fn is not None and self.guidance is not None:
            check_cond_fn_settings(self.guidance)
        if self.classifier_transform is not None and not self._sees_x0:
            raise ValueError("classifier_transform needs a classifier with classifier_input='x0'")
        if self._follows_edm_rule and not self._sees_x0:
            raise ValueError("rule='edm' needs a classifier with classifier_input='x0'")
        if self.null_class is not None and (not is_integer(self.null_class) or self.null_class < 0):
            raise ValueError(f"null_class={self.null_class!r} must be a label: an integer, 0 or more")
        if self.cfg_scale != 1.0 and (self.null_class is None or not self.class_conditional):
            raise ValueError(f"cfg_scale={self.cfg_scale!r} needs a class-conditional model and its null_class")
        networks = [("model", self.model), *(("classifier", member.network) for member in self._members)]
        for name, network in networks:
            if getattr(network, "training", False):
                raise ValueError(f"the {name} is in training mode; call {name}.eval() first")

    def __repr__(self) -> str:
        networks = self.classifier if isinstance(self.classifier, tuple) else (self.classifier,)
        guides = [_name(network) for network in networks]
        parts = [
            _name(self.model),
            f"[{', '.join(guides)}]" if isinstance(self.classifier, tuple) else guides[0],
            repr(self.guidance),
            *([] if self.cond_fn is None else [f"cond_fn={_name(self.cond_fn)}"]),
            *([f"classifier_input={self.classifier_input!r}"] if self._members else []),
            f"shape={self.shape}",
            f"num_classes={self.num_classes}",
            *([] if self.cfg_scale == 1.0 else [f"cfg_scale={self.cfg_scale:g}", f"null_class={self.null_class}"]),
            f"device='{self.device}'",
        ]
        return f"FDivSampler({', '.join(parts)})"

    @property
    def _sees_x0(self) -> bool:
        return bool(self._members) and self.classifier_input == "x0"

    @property
    def _follows_edm_rule(self) -> bool:
        return self.guidance is not None and self.guidance.rule == "edm"

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
        *,
        recurrence: int = 1,
        trajectory: int | bool = False,
        trajectory_of: str = "x",
    ) -> Samples:
        """Sample one image for each label.

        The methods ``"heun"`` (EDM's, two evaluations a step) and ``"dpmpp"`` (DPM-Solver++(2M), one) work in EDM's
        scaling, x = x₀ + σ n, from the highest noise level down to 0. An ε-model of the discrete schedule denoises by
        D = x − σ ε̂(x/√(1+σ²), t(σ)); a variance that it predicts besides is not used. Guidance adds
        σ²/√(1+σ²)·s·w_b·g to D, g the gradient that ``"ddim"`` takes as that of x_t, so that one ``scale`` means the
        same in all three methods, and all follow the same differential equation.

        Args:
            labels: (N,) class labels, or the number N of images, whose labels are then drawn from their seeds.
            seeds: N integers, one 64-bit seed for each image; None draws them (they are returned). An image's noise
                and drawn label depend on its seed alone, bit for bit, whatever the batch size.
            steps: OpenAI's respacing: ``"250"``, 250, ``"10,15,20"``, ``"ddim25"``. For ``"heun"`` and ``"dpmpp"`` an
                integer: how many noise levels to visit, spaced as Karras et al. do.
            method: ``"ddpm"``, ``"ddim"``, ``"heun"`` or ``"dpmpp"``.
            batch_size: images at a time, all at once if None. Tilting weighs the images of a batch against each other,
                and 1 is refused with it.
            noise: every Gaussian draw, in place of the seeds': (steps+1, N, C, *spatial), x_T first, then one for each
                step in order of use (and two more for each repetition), or a callable that returns them for the current
                batch one by one.
            progress: show a progress bar.
            callback: called with a :class:`Step` after each step.
            recurrence: how often each guided step is taken: after all but the last time, the image is brought back to
                the step's noise level with fresh noise, which lets guidance and model agree (Bansal et al.,
                arXiv 2302.07121, algorithm 1; Yu et al., arXiv 2303.09833). Not for ``"dpmpp"``, which builds on the
                step before. The last time uses the step's own noise, so that 1 is plain sampling.
            trajectory: keep this many steps, evenly spaced and the last among them, or all if True, in
                ``Samples.trajectory``; each takes as much memory on the sampler's device as the images do.
            trajectory_of: keep ``"x"``, as it is after the step, or ``"x0"``, the model's prediction before it.

        Returns:
            :class:`calguide_fast.samples.Samples`.
        """
        self._check_method(method, recurrence)
        timeline = self._karras_levels(steps) if method in SOLVERS else self.schedule.respaced(steps)
        wanted = self._wanted(labels)
        count = wanted if isinstance(wanted, int) else len(wanted)
        seeds = as_seeds(seeds, count)
        labels = draw_labels(seeds, self._known_classes()) if isinstance(wanted, int) else wanted
        if batch_size is not None and (not is_integer(batch_size) or batch_size < 1):
            raise ValueError(f"batch_size={batch_size!r} must be an integer, at least 1")
        if batch_size is not None and self.group is None:
            check_batch_size(self.guidance, batch_size)
        batch_size = max(count, 1) if batch_size is None else batch_size
        guided = sum(map(self._guides_at, timeline.evaluated.tolist()))
        check_noise(noise, len(timeline), (recurrence - 1) * guided, count, self.shape)

        images = torch.empty((count, *self.shape), dtype=torch.float32, device=self.device)
        record = Diagnostics.empty(timeline, count, self.device) if self.diagnostics else None
        sigmas = torch.from_numpy(timeline.sigmas[::-1].copy())
        kept = Trajectory.empty(trajectory, trajectory_of, sigmas, count, self.shape, self.device)
        table = timeline.coefficients(self.variance, self.eta) if isinstance(timeline, Timeline) else timeline.table()
        device_labels, device_seeds = labels.to(self.device), seeds.to(self.device)
        starts = range(0, count, batch_size)
        with (
            tqdm(total=len(starts) * len(timeline), disable=not progress, unit="step") as bar,
            self._borrowed_graphs() as graphs,
            frozen(() if graphs is None else [member.network for member in self._members]),
        ):
            plan = _Plan(method, timeline, table.to(self.device), recurrence, kept is not None and kept.of == "x0")
            # a recording's buffers are its own
            parts = self._parts(Scratch(kept=graphs is None))
            take_step = SolverStep(parts) if method in SOLVERS else DiffusionStep(parts)
            for start in starts:
                batch = slice(start, min(start + batch_size, count))
                run = _Batch(batch, device_labels[batch], device_seeds[batch])
                draws = Draws(noise, batch, run.seeds, self.shape, self.device)
                for step in self._reverse(run, draws, plan, take_step, record, graphs):
                    bar.update()
                    if kept is not None:
                        kept.write(step.index, batch, step.x_t, step.x0)
                    if callback is not None:
                        callback(step)
                images[batch] = step.x_t
        return Samples(images, labels, seeds, batch_size, record, kept)

    def _check_method(self, method: str, recurrence: int) -> None:
        allowed = (*METHODS, *SOLVERS)
        if method not in allowed:
            raise ValueError(f"method={method!r} must be one of {', '.join(map(repr, allowed))}")
        check_method_settings(method, self.eta, self.churn, self.sigma_range, self.variance)
        if method != "ddpm" and self.guidance is not None and self.guidance.sine_boost:
            raise ValueError("sine_boost belongs to method='ddpm'")
        if method != "heun" and self._follows_edm_rule:
            raise ValueError("rule='edm' belongs to method='heun'")
        if not is_integer(recurrence) or recurrence < 1:
            raise ValueError(f"recurrence={recurrence!r} must be an integer, at least 1")
        if recurrence > 1 and method == "dpmpp":
            raise ValueError("method='dpmpp' builds on the step before; recurrence needs 'ddpm', 'ddim' or 'heun'")
        if recurrence > 1 and self.guidance is None:
            raise ValueError(f"recurrence={recurrence} repeats guided steps, and guidance=None has none")

    def _karras_levels(self, steps: str | int) -> KarrasLevels:
        """Where a solver goes: as far as the model does, within the range asked for."""
        if self._denoise is None:
            low, high = self.schedule.sigmas[[0, -1]].tolist()
        else:
            low, high = denoiser_range_of(self.model)
        first, last = within(low, high, self.sigma_range)
        return KarrasLevels.karras(steps, first, last, self.schedule, self.churn)

    def _parts(self, scratch: Scratch) -> Parts:
        """What the steps of one run work with, as the settings are at present."""
        guide: Guide | None = None
        if self.cond_fn is not None:
            guide = OwnGradient(self.cond_fn, self.model_kwargs)
        elif self._members:
            guide = Classifiers(self._members, self._sees_x0, self.classifier_transform)
        predictor = Predictor(
            model=self.model,
            denoise=self._denoise,
            dtype=self._model_dtype,
            channels=self.shape[0],
            class_conditional=self.class_conditional,
            cfg_scale=self.cfg_scale,
            null_class=self.null_class,
            model_kwargs=self.model_kwargs,
        )
        guidance = _UNGUIDED if self.guidance is None else self.guidance
        return Parts(predictor, guide, guidance, self.clip_denoised, self.diagnostics, self.group, scratch)

    def _borrowed_graphs(self) -> AbstractContextManager[Graphs | None]:
        if self._graphs is None:
            return nullcontext()
        settings = [value for name, value in vars(self).items() if name != "_graphs"]
        networks = [member.network for member in self._members]
        return self._graphs.borrowed(self.device, [*settings, *networks, *self.model_kwargs.values()])

    def _reverse(
        self,
        run: _Batch,
        draws: Draws,
        plan: _Plan,
        take_step: Callable[[Kind, State, Inputs], Left],
        record: Diagnostics | None,
        graphs: Graphs | None,
    ) -> Iterator[Step]:
        """The loop: from x_T to x_0, one batch."""
        method, timeline = plan.method, plan.timeline
        solving = method in SOLVERS
        x_t = draws.start()
        if solving:
            x_t *= float(timeline.sigmas[-1])
        boosted = self.guidance is not None and self.guidance.sine_boost
        state = State(
            x_t,
            run.labels,
            run.seeds,
            variance_max=x_t.new_zeros(len(x_t)) if boosted else None,
            denoised=torch.zeros_like(x_t) if method == "dpmpp" else None,
        )
        if graphs is not None:
            state = graphs.hold(state)
        times = None if solving else plan.table[:, Coefficient.TIMESTEP].long()[:, None].repeat(1, len(x_t))
        timesteps, sigmas, evaluated = (
            levels.tolist() for levels in (timeline.timesteps, timeline.sigmas, timeline.evaluated)
        )

        for index, k in enumerate(reversed(range(len(timeline)))):
            guided = self._guides_at(evaluated[k])
            corrected = self._corrects_at(sigmas[k - 1]) if method == "heun" and k else None
            # Heun's steps are random where churn moves them, DDIM's at η > 0
            random = {"ddpm": True, "ddim": self.eta > 0, "heun": evaluated[k] > sigmas[k], "dpmpp": False}[method]
            for remaining in reversed(range(plan.recurrence if guided else 1)):
                noise = draws.repeat(random) if remaining else draws.step(random, inside=not solving)
                seeded = not solving and random and noise is None
                kind = Kind(method, guided, seeded, corrected, plan.keep_x0)
                inputs = Inputs(None if times is None else times[k], plan.table[k], noise)
                left = take_step(kind, state, inputs) if graphs is None else graphs.run(take_step, kind, inputs)
                if remaining:
                    signal, deviation = timeline.renoising(k)
                    fresh = draws.repeat()
                    assert fresh is not None
                    state.x_t.mul_(signal).add_(fresh, alpha=deviation)
            if record is not None and left.diagnostics is not None:
                record.values[index, :, run.images] = left.diagnostics
            yield Step(index, len(timeline), timesteps[k], sigmas[k], run.images, state.x_t, left.x0)

    def _guides_at(self, sigma: float) -> bool:
        return self.guidance is not None and self.guidance.guides_at(sigma)

    def _corrects_at(self, sigma: float) -> bool:
        """Whether Heun's correction at this noise level is guided."""
        return self._guides_at(sigma) and not self._follows_edm_rule

    def _wanted(self, labels: int | Sequence[int] | Tensor) -> int | Tensor:
        """How many images to draw labels for, or the labels: (N,) int64 on the CPU."""
        if is_integer(labels):
            if labels < 0:
                raise ValueError(f"labels={labels} must not be negative, as a number of images")
            return int(labels)
        try:
            labels = torch.as_tensor(labels, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"labels={labels!r} must be a number of images, or (N,) integers") from None
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


def _name(network: Any) -> str:
    """A function's own name, and of anything else that of its class."""
    return "None" if network is None else getattr(network, "__name__", type(network).__name__)


class _Batch(NamedTuple):
    images: slice
    labels: Tensor  # (B,) int64 on the sampler's device
    seeds: Tensor  # (B,) int64 on the sampler's device


class _Plan(NamedTuple):
    """How a run samples, the same for all its batches."""

    method: str
    timeline: Timeline | KarrasLevels
    table: Tensor  # (K, 16 or 14) float32, a row of coefficients for each k
    recurrence: int
    keep_x0: bool


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
