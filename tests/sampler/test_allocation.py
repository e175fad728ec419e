"""From the second step on, nothing of ours is allocated that grows with the images or the classes."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from calguide_fast import FDivSampler, Guidance
from calguide_fast.scratch import Scratch

IMAGES, SIDE, CLASSES = 4, 24, 500
# of the tables over images, (5, B) and the like; a batch of images takes 27 KiB here, and its logits 4 in bfloat16
SMALL, MARK = 1024, 321


class Canned(torch.nn.Module):
    """A model that allocates nothing: its answer has been there before."""

    in_channels, image_size = 3, SIDE

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.answer = torch.nn.Parameter(torch.randn(2 * IMAGES, 6, SIDE, SIDE).to(dtype), requires_grad=False)

    def forward(self, x, t, y=None):
        assert x.dtype == self.answer.dtype
        return self.answer.detach()[: len(x)]


class CannedClassifier(torch.nn.Module):
    """The same with a gradient."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.randn(IMAGES, CLASSES).to(dtype), requires_grad=False)
        self.pulled = torch.randn(IMAGES, 3, SIDE, SIDE).to(dtype)

    def forward(self, x, t=None):
        assert x.dtype == self.logits.dtype
        return _Given.apply(x, self.logits, self.pulled)


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, logits, pulled):
        ctx.pulled = pulled
        return logits.detach()

    @staticmethod
    def backward(ctx, grad):
        return ctx.pulled.detach(), None, None


def allocated(sampler: FDivSampler, **options) -> list[int]:
    """Bytes of each tensor made after the first step, and before the last is over; a mark of this function's first."""
    recorder = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    marks: list[torch.Tensor] = []

    def look(step):
        if step.index == 0:
            recorder.start()
            marks.append(torch.empty(MARK, dtype=torch.uint8))
        elif step.index == step.num_steps - 2:
            recorder.stop()

    sampler.sample([0] * IMAGES, range(IMAGES), 6, progress=False, callback=look, **options)
    events = [event for event in recorder.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in events if event.nbytes() > 0]


CASES = {
    "ddpm": ({}, {"method": "ddpm"}),
    "given noise": ({}, {"method": "ddpm", "noise": torch.zeros(7, IMAGES, 3, SIDE, SIDE)}),
    "ddim": ({}, {"method": "ddim"}),
    "xt": ({"classifier_input": "xt"}, {"method": "ddim"}),
    "tilted": ({"guidance": Guidance(tilt=-0.2, entropy_scaling=2.0)}, {"method": "ddpm"}),
    "free guidance": ({"cfg_scale": 2.0, "null_class": 0, "class_conditional": True}, {"method": "ddim"}),
    "no guidance": ({"classifier": None, "num_classes": CLASSES}, {"method": "ddpm"}),
    "heun": ({}, {"method": "heun"}),
    "heun, xt": ({"classifier_input": "xt"}, {"method": "heun"}),
    "dpmpp": ({}, {"method": "dpmpp"}),
    "churn": ({"churn": 30.0}, {"method": "heun"}),
    "recurrence": ({}, {"method": "ddpm", "recurrence": 3}),
    "recurrence, heun": ({"churn": 30.0}, {"method": "heun", "recurrence": 2}),
    "edm rule": ({"guidance": Guidance(rule="edm")}, {"method": "heun"}),
    "edm rule, tilted": ({"guidance": Guidance(rule="edm", tilt=0.2)}, {"method": "heun"}),
    "several": ({"classifier_weights": [2, 1, 1]}, {"method": "ddpm"}),
    "several, edm rule": ({"classifier_weights": [1, 2], "guidance": Guidance(rule="edm")}, {"method": "heun"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_steps_allocate_nothing_large(case, dtype):
    settings, options = CASES[case]
    classifiers = [CannedClassifier(dtype).eval() for _ in settings.get("classifier_weights", [1])]
    sampler = FDivSampler(Canned(dtype).eval(), **{"classifier": classifiers, **settings})
    sizes = allocated(sampler, **options)
    assert sizes[0] == MARK, "what is made is seen"
    assert max(sizes) <= SMALL, sorted(sizes)[-5:]


@pytest.mark.parametrize("method, evaluations", [("ddpm", 6), ("dpmpp", 6), ("heun", 11)])
def test_a_narrow_gradient_is_widened_once(method, evaluations, monkeypatch):
    widened, cast = [], Scratch.cast

    def look(self, name, x, *options):
        found = cast(self, name, x, *options)
        if x.dtype == torch.bfloat16 and found is not x and x.shape == (IMAGES, 3, SIDE, SIDE) and name != "eps":
            widened.append(name)
        return found

    monkeypatch.setattr(Scratch, "cast", look)
    sampler = FDivSampler(Canned(torch.bfloat16).eval(), CannedClassifier(torch.bfloat16).eval())
    sampler.sample([0] * IMAGES, range(IMAGES), 6, method, progress=False)
    assert widened == ["gradient"] * evaluations


def test_buffers_are_made_once_and_again_where_another_is_asked_for():
    scratch, x = Scratch(), torch.zeros(4, 3, 6, 6)
    first = scratch.take("x0", x)
    assert scratch.take("x0", x) is first and scratch.part("again").take("x0", x) is not first
    assert scratch.part("again").take("x0", x) is scratch.part("again").take("x0", x)
    for options in ({"like": x[:3]}, {"dtype": torch.bfloat16}, {"layout": torch.channels_last}):
        other = scratch.take("x0", **{"like": x, **options})
        assert other is not first and scratch.take("x0", x) is not first
    assert other.is_contiguous(memory_format=torch.channels_last)
    assert scratch.take("x0", other, layout=torch.preserve_format).stride() == other.stride() != x.stride()
    narrow = other.bfloat16()
    for layout, strides in ((None, x.stride()), (torch.preserve_format, other.stride())):
        assert scratch.cast("cast", narrow, torch.float32, layout).stride() == strides
        assert scratch.cast("cast", other, torch.float32, layout) is other
    fresh = Scratch(kept=False)
    assert fresh.take("x0", x) is not fresh.take("x0", x)
    assert scratch.cast("cast", x, x.dtype) is x
    assert torch.equal(scratch.cast("cast", x + 0.5, torch.bfloat16), (x + 0.5).bfloat16())
