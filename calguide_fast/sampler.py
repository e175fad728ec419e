"""FDivSampler: the guided reverse process, readable from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from calguide_fast import edm_rule
from calguide_fast.draws import Draws, Noise
from calguide_fast.ensemble import Member, mean_gradient, shares
from calguide_fast.graphs import Graphs
from calguide_fast.guidance import SETTINGS, Guidance, ImageGradient
from calguide_fast.karras import SIGMA_RANGE, Churn, KarrasLevels, Level, Solve
from calguide_fast.networks import device_of, dtype_of, frozen, layout_of, prepared
from calguide_fast.noise import as_seeds, draw_labels
from calguide_fast.ops import checks
from calguide_fast.ops.checks import check_labels, is_integer, number
from calguide_fast.ops.coefficients import Coefficient
from calguide_fast.ops.guidance import GuidanceStats
from calguide_fast.ops.step import METHODS, guided_step, predict_x0
from calguide_fast.ops.tilt import tilt_weights
from calguide_fast.samples import Diagnostics, Samples
from calguide_fast.schedule import VARIANCES, Schedule, Timeline
from calguide_fast.solvers import SOLVERS, dpmpp_, euler_, heun_
from calguide_fast.trajectory import Trajectory

Model = Callable[..., Tensor]
Classifier = Callable[..., Tensor]


class Step(NamedTuple):
    """What a callback sees after each step of a batch."""

    index: int  # type: ignore[assignment]  # hides tuple's method; 0 for the first step from x_T
    num_steps: int
    timestep: float  # of the original process; an integer but for the methods in EDM's scaling
    sigma: float  # noise level before the step
    images: slice  # which images of the run these are
    x_t: Tensor  # (B, C, *spatial) after the step; a buffer that is written again, so clone it to keep it. The methods
    # "heun" and "dpmpp" have x = x₀ + σ n in it
    x0: Tensor | None  # the prediction that was classified, or is kept, if any; with cuda_graph a buffer, too


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
            (B, num_classes) and is differentiable. A list of several guides by the mean of their scores.
        guidance: a :class:`Guidance`, or None to sample without. Its fields may be given as keywords instead:
            ``FDivSampler(model, classifier, divergence="js", alpha=0.5)``.
        schedule: ``"linear"``, ``"cosine"``, a :class:`calguide_fast.schedule.Schedule` or a (T,) table of betas; if
            not given, the Schedule that ``model.schedule`` is, as an adapter's is, or the linear one.
        classifier_input: ``"x0"``: an off-the-shelf classifier of clean images sees the clipped x̂₀, and the gradient
            is taken there, with no pass back through the model (EluCD). ``"xt"``: a noise-aware one sees x_t (ADM-G).
        cond_fn: ``cond_fn(x_t, t, y=labels, **model_kwargs)`` returning an image gradient, in place of a classifier
            (guided-diffusion's convention).
        classifier_weights: of the classifiers in a list, in place of equal ones; their sum does not matter.
        group: of ``torch.distributed``: tilting weighs the images that its ranks sample at the same time against each
            other. All ranks must run the same number of batches and steps.
        cfg_scale: classifier-free guidance ε̂ = ε̂_u + w (ε̂_c − ε̂_u); 1 is the conditional model by itself.
        null_class: the label that makes the model unconditional, for ``cfg_scale``; never drawn.
        class_conditional: whether the model takes ``y``; read off ``model.class_conditional`` if not given.
        num_classes: of the labels; read off the classifier or the model if not given.
        shape: (C, *spatial) of one image; read off ``model.in_channels`` and ``model.image_size`` if not given.
        variance: ``"fixed_small"`` or ``"fixed_large"``, for models that predict no v.
        eta: η of DDIM.
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
        classifier_input: str = "x0",
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
        self.guidance = _resolve_guidance(guidance, guidance_settings, classifier is not None or cond_fn is not None)
        self.model = model = prepared("model", model, dtype, channels_last, compile)
        self._denoise = _denoise_of(model, compile)
        given = _as_tuple(classifier)
        networks = tuple(prepared("classifier", network, dtype, channels_last, compile) for network in given)
        self._members = tuple(
            Member(network, share, dtype_of(network), layout_of(network))
            for network, share in zip(networks, shares(len(networks), classifier_weights))
        )
        self.classifier = networks if isinstance(classifier, _LISTS) else networks[0] if networks else None
        self.cond_fn = cond_fn
        self.group = group
        self.schedule = _schedule_of(model) if schedule is None else Schedule.of(schedule)
        self.classifier_input = classifier_input
        self.cfg_scale = number("cfg_scale", cfg_scale)
        self.null_class = null_class
        self.class_conditional = _read(class_conditional, model, "class_conditional", False)
        self.num_classes = _num_classes(num_classes, networks, model, null_class)
        self.shape = _image_shape(shape, model)
        self.variance = variance
        self.eta = number("eta", eta, low=0.0)
        self.churn = Churn(churn, s_tmin, s_tmax, s_noise)
        self.sigma_range = _as_range(sigma_range)
        self.clip_denoised = clip_denoised
        self.classifier_transform = classifier_transform
        self.model_kwargs = dict(model_kwargs or {})
        self.diagnostics = diagnostics
        self.device = torch.device(device) if device is not None else device_of(model)
        self._model_dtype = dtype_of(model)
        self._graphs = Graphs() if cuda_graph else None
        self._check()

    def _check(self) -> None:
        if self.classifier_input not in ("x0", "xt"):
            raise ValueError(f"classifier_input={self.classifier_input!r} must be 'x0' or 'xt'")
        if self.variance not in VARIANCES:
            raise ValueError(f"variance={self.variance!r} must be one of {', '.join(map(repr, VARIANCES))}")
        if self._members and self.cond_fn is not None:
            raise ValueError("give a classifier or a cond_fn, not both")
        if self.guidance is not None and not self._members and self.cond_fn is None:
            raise ValueError("guidance needs a classifier or a cond_fn; guidance=None samples without")
        needs_logits = self.guidance is not None and (self.guidance.tilt or self.guidance.entropy_scaling is not None)
        if self.cond_fn is not None and needs_logits:
            raise ValueError("tilt and entropy_scaling need a classifier's logits, which a cond_fn does not show")
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
            batch_size: images at a time, all at once if None. Tilting weighs the images of a batch against each other.
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
        timeline = self._karras_levels(steps, method) if method in SOLVERS else self.schedule.respaced(steps)
        wanted = self._wanted(labels)
        count = wanted if isinstance(wanted, int) else len(wanted)
        seeds = as_seeds(seeds, count)
        labels = draw_labels(seeds, self._known_classes()) if isinstance(wanted, int) else wanted
        batch_size = max(count, 1) if batch_size is None else batch_size
        if not is_integer(batch_size) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be an integer, at least 1")
        self._check_noise(noise, count, timeline, recurrence)

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
            for start in starts:
                batch = slice(start, min(start + batch_size, count))
                run = _Batch(batch, device_labels[batch], device_seeds[batch])
                draws = Draws(noise, batch, run.seeds, self.shape, self.device)
                for step in self._reverse(run, draws, plan, record, graphs):
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

    def _check_noise(self, noise: Noise | None, count: int, timeline: Timeline | KarrasLevels, recurrence: int) -> None:
        if noise is not None and not isinstance(noise, Tensor) and not callable(noise):
            raise TypeError(f"noise must be a tensor, a callable that returns one, or None; got {type(noise).__name__}")
        guided = sum(map(self._guides_at, timeline.evaluated.tolist()))
        expected = (1 + len(timeline) + 2 * (recurrence - 1) * guided, count, *self.shape)
        if isinstance(noise, Tensor) and tuple(noise.shape) != expected:
            first = "steps+1" if recurrence == 1 else "steps+1 and two for each repetition of a guided step"
            raise ValueError(f"noise has shape {tuple(noise.shape)}; it must be ({first}, N, C, *spatial) = {expected}")

    def _karras_levels(self, steps: str | int, method: str) -> KarrasLevels:
        """Where a solver goes: as far as the model does, within the range asked for."""
        if self._denoise is None:
            low, high = self.schedule.sigmas[[0, -1]].tolist()
        else:
            denoiser: Any = self.model
            low, high = float(denoiser.sigma_min), float(denoiser.sigma_max)
        first, last = self.sigma_range
        first = max(low, SIGMA_RANGE[0]) if first is None else first
        last = min(high, SIGMA_RANGE[1]) if last is None else last
        if self.sigma_range != (None, None) and not low <= first < last <= high:
            raise ValueError(
                f"sigma_range={(first, last)!r} must rise, and lie within the model's range, {low}..{high}"
            )
        # DPM-Solver++ has no churn: it must not evaluate the model at more noise than there is
        churn = self.churn if method == "heun" else None
        return KarrasLevels.karras(steps, first, last, self.schedule, churn)

    def _borrowed_graphs(self) -> AbstractContextManager[Graphs | None]:
        if self._graphs is None:
            return nullcontext()
        settings = [value for name, value in vars(self).items() if name != "_graphs"]
        networks = [member.network for member in self._members]
        return self._graphs.borrowed(self.device, [*settings, *networks, *self.model_kwargs.values()])

    def _reverse(
        self, run: _Batch, draws: Draws, plan: _Plan, record: Diagnostics | None, graphs: Graphs | None
    ) -> Iterator[Step]:
        """The loop: from x_T to x_0, one batch."""
        method, timeline = plan.method, plan.timeline
        solving = method in SOLVERS
        x_t = draws.start()
        if solving:
            x_t *= float(timeline.sigmas[-1])
        boosted = self.guidance is not None and self.guidance.sine_boost
        state = _State(
            x_t,
            run.labels,
            run.seeds,
            variance_max=x_t.new_zeros(len(x_t)) if boosted else None,
            denoised=torch.zeros_like(x_t) if method == "dpmpp" else None,
        )
        if graphs is not None:
            state = graphs.hold(state)
        times = None if solving else plan.table[:, Coefficient.TIMESTEP].long()[:, None].repeat(1, len(x_t))
        step = self._solver_step if solving else self._step
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
                kind = _Kind(method, guided, seeded, corrected, plan.keep_x0)
                inputs = _Inputs(None if times is None else times[k], plan.table[k], noise)
                found = step(kind, state, inputs) if graphs is None else graphs.run(step, kind, inputs)
                if remaining:
                    signal, deviation = timeline.renoising(k)
                    fresh = draws.repeat()
                    assert fresh is not None
                    state.x_t.mul_(signal).add_(fresh, alpha=deviation)
            if record is not None and found.diagnostics is not None:
                record.values[index, :, run.images] = found.diagnostics
            yield Step(index, len(timeline), timesteps[k], sigmas[k], run.images, state.x_t, found.x0)

    def _guides_at(self, sigma: float) -> bool:
        return self.guidance is not None and self.guidance.guides_at(sigma)

    def _corrects_at(self, sigma: float) -> bool:
        """Whether Heun's correction at this noise level is guided."""
        return self._guides_at(sigma) and not self._follows_edm_rule

    def _step(self, kind: _Kind, state: _State, inputs: _Inputs) -> _Found:
        """One step of DDPM or DDIM: x_t becomes x_{t−1} in place."""
        x_t, labels = state.x_t, state.labels
        t, coefficients, noise = inputs
        assert t is not None
        guidance = self.guidance if self.guidance is not None else _UNGUIDED
        model_output = _apart(_at_most_float32(self._predict(x_t, t, labels)), x_t)

        x0 = found = scores = weights = None
        if kind.keep_x0 or kind.guided and self._sees_x0:
            x0 = self._predict_x0(x_t, model_output, coefficients)
        if kind.guided:
            seen = x0 if self._sees_x0 else x_t
            assert seen is not None
            found = self._image_gradient(guidance, seen, t, labels)
            scores = guidance.tilted(found.stats) if found.stats is not None else None
            if scores is not None and self.group is not None:
                weights, scores = self._tilt_weights(guidance, scores), None

        guided_step(
            x_t,
            model_output,
            coefficients,
            _apart(found.gradient, x_t) if found is not None else None,
            method=kind.method,
            scale=guidance.scale,
            weights=weights,
            scores=scores,
            tilt=guidance.tilt,
            max_weight=guidance.tilt_max,
            noise=noise,
            seeds=state.seeds if kind.seeded else None,
            variance_max=state.variance_max,
            sine_boost=guidance.sine_boost,
            clip=self.clip_denoised,
            out=x_t,
        )
        if self.diagnostics and scores is not None:
            weights = self._tilt_weights(guidance, scores)
        return self._left(x0, found, weights)

    def _solver_step(self, kind: _Kind, state: _State, inputs: _Inputs) -> _Found:
        """One step in EDM's scaling: x becomes that of the next noise level in place."""
        x, labels, row = state.x_t, state.labels, inputs.coefficients
        by_rule = kind.guided and self._follows_edm_rule
        rule = self._edm_rule(x, row, labels) if by_rule else None
        if inputs.noise is not None:
            x.addcmul_(inputs.noise, row[Solve.CHURN])
        if rule is not None:
            x += rule.image
        here = self._denoised(x, row[:4], labels, kind.guided and not by_rule, kind)
        if kind.method == "dpmpp":
            assert state.denoised is not None
            dpmpp_(x, here.image, state.denoised, row)
        elif kind.corrected is None:
            euler_(x, here.image, row)
        else:
            guided, again = kind.corrected, kind._replace(keep_x0=False)
            heun_(x, here.image, row, lambda x: self._denoised(x, row[4:8], labels, guided, again).image)
        guide = here if rule is None else rule
        return self._left(here.x0, guide.found, guide.weights)

    def _denoised(self, x: Tensor, level: Tensor, labels: Tensor, guided: bool, kind: _Kind) -> _Denoised:
        """D(x; σ), moved by guidance."""
        t = level[Level.TIMESTEP].repeat(len(x))
        image = self._denoise_once(x, level, t, labels)
        x0 = found = weights = None
        if kind.keep_x0 or guided and self._sees_x0:
            x0 = image.clamp(-1, 1) if self.clip_denoised else image
        if guided:
            seen = x0 if self._sees_x0 else x * level[Level.SHRINK]
            assert self.guidance is not None and seen is not None
            found, weights = self._weighed_gradient(self.guidance, seen, t, labels)
            push = level[Level.PUSH] * self.guidance.scale
            if weights is not None:
                push = push * _per_image(weights, x)
            image = torch.addcmul(image, found.gradient.to(image.dtype), push)
        if self.clip_denoised and self._denoise is None:
            image.clamp_(-1, 1)
        return _Denoised(image, x0, found, weights)

    def _denoise_once(self, x: Tensor, level: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """D(x; σ) of the model by itself, float32, of the denoiser or from the ε̂ of a discrete process."""
        if self._denoise is not None:
            image = self._conditioned(self._denoise, x, level[Level.SIGMA].repeat(len(x)), labels)
            checks.shaped("model.denoise(x, sigma)", image, x.shape)
            return _apart(image.float(), x)
        eps = self._predict(x * level[Level.SHRINK], t, labels)[:, : self.shape[0]]
        checks.shaped("the model's eps", eps, x.shape)
        return torch.addcmul(x, eps.float(), level[Level.SIGMA], value=-1)

    def _edm_rule(self, x: Tensor, row: Tensor, labels: Tensor) -> _Denoised:
        """What EluCD's rule adds to x."""
        assert self.guidance is not None
        guidance = self.guidance
        found, weights = self._weighed_gradient(guidance, edm_rule.classified_at(x), row[Level.TIMESTEP], labels)
        shift = edm_rule.shift(x, found.gradient, row, guidance.max_guidance, guidance.add_factor)
        # of scale the sign alone: a product with a half-precision gradient might be 0 or infinite
        shift *= float(np.sign(guidance.scale))
        return _Denoised(shift if weights is None else shift * _per_image(weights, x), None, found, weights)

    def _left(self, x0: Tensor | None, found: ImageGradient | None, weights: Tensor | None) -> _Found:
        return _Found(x0, Diagnostics.of_step(found, weights) if found is not None and self.diagnostics else None)

    def _predict(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self._conditioned(self.model, x_t.to(self._model_dtype), t, labels)

    def _conditioned(self, network: Model, x: Tensor, level: Tensor, labels: Tensor) -> Tensor:
        """The network's output at x and (B,) timesteps or noise levels, with classifier-free guidance if there is."""
        if not self.class_conditional:
            return network(x, level, **self.model_kwargs)
        if self.cfg_scale == 1.0 or self.null_class is None:
            return network(x, level, y=labels, **self.model_kwargs)
        null = torch.full_like(labels, self.null_class)
        both = network(
            x.repeat(2, *[1] * len(self.shape)), level.repeat(2), y=torch.cat([labels, null]), **self.model_kwargs
        )
        conditional, unconditional = both.chunk(2)
        channels = self.shape[0]
        mixed = torch.lerp(unconditional[:, :channels], conditional[:, :channels], self.cfg_scale)
        return torch.cat([mixed, conditional[:, channels:]], 1)

    def _predict_x0(self, x_t: Tensor, model_output: Tensor, coefficients: Tensor) -> Tensor:
        """x̂₀ as the classifier wants it; or as it is, for several that differ in that and for none."""
        wanted = {(member.dtype, member.layout) for member in self._members} if self._sees_x0 else set()
        dtype, layout = wanted.pop() if len(wanted) == 1 else (torch.float32, torch.contiguous_format)
        dtype = torch.float32 if dtype == torch.float64 else dtype
        return predict_x0(x_t, model_output, coefficients, self.clip_denoised, dtype, layout)

    def _weighed_gradient(
        self, guidance: Guidance, x: Tensor, t: Tensor, labels: Tensor
    ) -> tuple[ImageGradient, Tensor | None]:
        """The gradient, and the (B,) weights of a tilt if there is one."""
        found = self._image_gradient(guidance, x, t, labels)
        checks.shaped("gradient", found.gradient, x.shape)
        scores = guidance.tilted(found.stats) if found.stats is not None else None
        return found, None if scores is None else self._tilt_weights(guidance, scores)

    def _tilt_weights(self, guidance: Guidance, scores: Tensor) -> Tensor:
        return tilt_weights(scores, guidance.tilt, max_weight=guidance.tilt_max, group=self.group)

    def _image_gradient(self, guidance: Guidance, x: Tensor, t: Tensor, labels: Tensor) -> ImageGradient:
        if self.cond_fn is not None:
            return ImageGradient(_at_most_float32(self.cond_fn(x, t, y=labels, **self.model_kwargs)), None)
        found = [self._gradient_of(member, guidance, x, t, labels) for member in self._members]
        return mean_gradient(found, [member.share for member in self._members])

    def _gradient_of(self, member: Member, guidance: Guidance, x: Tensor, t: Tensor, labels: Tensor) -> ImageGradient:
        x = x.to(member.dtype, memory_format=member.layout)
        gradient, stats = guidance.image_gradient(lambda x: self._classify(member.network, x, t), x, labels)
        narrowed = None if stats is None else GuidanceStats(*map(_at_most_float32, stats))
        return ImageGradient(_at_most_float32(gradient), narrowed)

    def _classify(self, classifier: Classifier, x: Tensor, t: Tensor) -> Tensor:
        """The classifier's logits of x̂₀ or x_t."""
        if self.classifier_input == "xt":
            return classifier(x, t)
        return classifier(x if self.classifier_transform is None else self.classifier_transform(x))

    def _wanted(self, labels: int | Sequence[int] | Tensor) -> int | Tensor:
        """How many images to draw labels for, or the labels: (N,) int64 on the CPU."""
        if is_integer(labels):
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


class _Plan(NamedTuple):
    """How a run samples, the same for all its batches."""

    method: str
    timeline: Timeline | KarrasLevels
    table: Tensor  # (K, 16 or 14) float32, a row of coefficients for each k
    recurrence: int
    keep_x0: bool


class _Kind(NamedTuple):
    """In what, other than the values of tensors, one step differs from another of the same sampler."""

    method: str
    guided: bool
    seeded: bool  # whether its noise is drawn from the seeds, inside
    corrected: bool | None  # by Heun: guided or not; None without a correction
    keep_x0: bool


class _State(NamedTuple):
    """What lasts while a batch is sampled; steps write to all but labels and seeds."""

    x_t: Tensor  # (B, C, *spatial) float32
    labels: Tensor  # (B,) int64
    seeds: Tensor  # (B,) int64
    variance_max: Tensor | None  # (B,) float32, with a sine boost
    denoised: Tensor | None  # (B, C, *spatial) float32, of the step before, for DPM-Solver++


class _Inputs(NamedTuple):
    """What is new at each step."""

    t: Tensor | None  # (B,) int64; a solver finds its own in the coefficients
    coefficients: Tensor  # (16,) float32, or (14,) of a solver
    noise: Tensor | None  # (B, C, *spatial) float32, where it is given


class _Denoised(NamedTuple):
    """A guided denoiser's result."""

    image: Tensor  # (B, C, *spatial) float32
    x0: Tensor | None  # (B, C, *spatial), what was classified or is to be kept
    found: ImageGradient | None
    weights: Tensor | None  # (B,) float32, of a tilt


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


# what several classifiers may be given in
_LISTS = (list, tuple, nn.ModuleList)


def _as_tuple(classifier: Any) -> tuple[Classifier, ...]:
    if isinstance(classifier, _LISTS):
        if not len(classifier):
            raise ValueError("classifier=[] must hold at least one classifier")
        return tuple(classifier)
    return () if classifier is None else (classifier,)


def _as_range(sigma_range: Any) -> tuple[float | None, float | None]:
    """The ends that are asked for; None for what EDM and the model allow."""
    if sigma_range is None:
        return None, None
    try:
        low, high = (None if end is None else float(end) for end in sigma_range)
    except (TypeError, ValueError):
        raise ValueError(f"sigma_range={sigma_range!r} must be a pair of noise levels, the lowest first") from None
    return low, high


def _denoise_of(model: Any, compile: bool) -> Callable[..., Tensor] | None:
    """An EDM denoiser's own method; compiling a module wraps its call, and nothing else."""
    denoise = getattr(model, "denoise", None)
    return torch.compile(denoise) if compile and denoise is not None else denoise


def _at_most_float32(tensor: Tensor) -> Tensor:
    """What a float64 network gives, in the precision of x_t."""
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _per_image(weights: Tensor, x: Tensor) -> Tensor:
    """(B,) weights that multiply images (B, C, *spatial)."""
    return weights.view(-1, *[1] * (x.ndim - 1))


def _apart(tensor: Tensor, x_t: Tensor) -> Tensor:
    """The tensor, copied if it lies in x_t's memory, as where a network gives back a view of its input."""
    return tensor.clone() if 0 <= tensor.data_ptr() - x_t.data_ptr() < x_t.nbytes else tensor


def _read(value: Any, module: Any, name: str, default: Any) -> Any:
    """``value`` if given, else what the module says of itself."""
    if value is not None:
        return value
    said = getattr(module, name, None)
    return default if said is None else said


def _schedule_of(model: Any) -> Schedule:
    said = getattr(model, "schedule", None)
    return said if isinstance(said, Schedule) else Schedule.linear()


def _num_classes(
    given: int | None, classifiers: Sequence[Classifier], model: Any, null_class: int | None
) -> int | None:
    """How many classes there are to draw labels from, as far as anybody says."""
    if given is not None:
        return given
    said = {number for network in classifiers if (number := _read(None, network, "num_classes", None)) is not None}
    if len(said) > 1:
        raise ValueError(f"the classifiers must have the same classes; their num_classes are {sorted(said)}")
    if said:
        return said.pop()
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
    if not all(is_integer(side) and side > 0 for side in shape) or len(shape) < 2:
        raise ValueError(f"shape={tuple(shape)!r} must be (C, *spatial), positive integers")
    return tuple(map(int, shape))
