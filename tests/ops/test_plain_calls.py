"""The calls that C++ reads plain tensors of: the results are those of the way by Python, to which the rest is left."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_flatten

from calguide_fast import guidance_gradient, guided_step, predict_x0, tilt_weights, use_backend
from calguide_fast.backends import cpu
from calguide_fast.schedule import Schedule

if cpu.plain is None:
    pytest.skip("this torch has no table of functions to read its tensors with", allow_module_level=True)

ROW = Schedule.linear().respaced("25").coefficients()[9]
CALLS = ["plain_guidance_gradient", "plain_guided_step", "plain_predict_x0", "plain_tilt_weights"]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LOGITS, LABELS = normal(4, 10), torch.tensor([3, 0, 9, 4])
X_T, OUTPUT, GRADIENT, NOISE = normal(4, 3, 5, 6), normal(4, 6, 5, 6, seed=1), normal(4, 3, 5, 6), normal(4, 3, 5, 6)
VECTOR, SEEDS = normal(4).sigmoid(), torch.arange(4)


def guide(logits=LOGITS, labels=LABELS, **options):
    found = guidance_gradient(logits, labels, entropy_weight=0.3, adaptive_entropy=True, **options)
    return found.grad, *found


def step(x_t=X_T, output=OUTPUT, gradient=GRADIENT, **options):
    if "seeds" not in options:
        options.setdefault("noise", NOISE)
    return guided_step(x_t, output, ROW, gradient, scale=1.5, tilt=-0.3, **options)


def step_with_maximum(**options):
    running = options.setdefault("variance_max", torch.full((4,), 1e-3))
    return step(sine_boost=0.4, **options), running.clone()


def in_place():
    x_t = X_T.clone()
    assert step(x_t, out=x_t) is x_t
    return x_t


def spatial(*sizes):
    x_t, output = normal(2, 3, *sizes), normal(2, 6, *sizes, seed=1)
    return step(x_t, output, None, seeds=SEEDS[:2]), predict_x0(x_t, output, ROW)


def strided(tensor):
    return torch.stack([tensor, tensor], -1)[..., 0]


def negated(tensor):
    return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag


TAKEN = {
    "guidance": guide,
    "guidance-bfloat16": lambda: guide(LOGITS.bfloat16()),
    "guidance-float16": lambda: guide(LOGITS.half()),
    "guidance-one-class": lambda: guide(LOGITS[:, :1].contiguous(), torch.zeros(4, dtype=torch.int64)),
    "guidance-out": lambda: guide(out=torch.empty_like(LOGITS)),
    "guidance-parameter": lambda: guide(torch.nn.Parameter(LOGITS)),
    "step": step,
    "step-unguided": lambda: step(gradient=None),
    "step-fixed-variance": lambda: step(output=X_T),
    "step-weights": lambda: step(weights=VECTOR, scores=VECTOR, max_weight=1.1, normalize="sum"),
    "step-ddim": lambda: step(method="ddim", clip=False),
    "step-seeds": lambda: step(seeds=SEEDS),
    "step-bfloat16": lambda: step(output=OUTPUT.bfloat16(), gradient=GRADIENT.half()),
    "step-maximum": step_with_maximum,
    "step-in-place": in_place,
    "step-no-pixels": spatial,
    "step-3d": lambda: spatial(2, 3, 4),
    "x0": lambda: predict_x0(X_T, OUTPUT, ROW),
    "x0-eps-alone": lambda: predict_x0(X_T, X_T.half(), ROW, clip=False),
    "x0-out": lambda: predict_x0(X_T, OUTPUT, ROW, out=torch.empty_like(X_T, dtype=torch.bfloat16)),
    "tilt": lambda: tilt_weights(VECTOR, -0.4, normalize="sum", max_weight=0.26),
}

LEFT = {
    "guidance-strided": lambda: guide(strided(LOGITS)),
    "guidance-negated": lambda: guide(negated(LOGITS)),
    "guidance-float64": lambda: guide(LOGITS.double()),
    "guidance-labels-int32": lambda: guide(labels=LABELS.int()),
    "guidance-labels-strided": lambda: guide(labels=strided(LABELS)),
    "guidance-empty": lambda: guide(LOGITS[:0], LABELS[:0]),
    "step-strided": lambda: step(strided(X_T)),
    "step-output-channels-last": lambda: step(output=OUTPUT.to(memory_format=torch.channels_last)),
    "step-gradient-negated": lambda: step(gradient=negated(GRADIENT)),
    "step-weights-strided": lambda: step(weights=strided(VECTOR)),
    "step-maximum-strided": lambda: step_with_maximum(variance_max=strided(torch.full((4,), 1e-3))),
    "step-empty": lambda: step(X_T[:0], OUTPUT[:0], None, seeds=SEEDS[:0]),
    "x0-channels-last": lambda: predict_x0(X_T, OUTPUT, ROW, out=X_T.to(memory_format=torch.channels_last)),
    "tilt-float16": lambda: tilt_weights(VECTOR.half(), -0.4),
    "tilt-strided": lambda: tilt_weights(strided(VECTOR), -0.4),
}


@pytest.fixture
def answers(monkeypatch):
    """For each call of a function that reads plain tensors, whether it served the call."""
    seen = []

    def telling(function):
        def call(*arguments):
            result = function(*arguments)
            seen.append(result is not None)
            return result

        return call

    telling_all = {name: telling(getattr(cpu.plain, name)) for name in CALLS}
    monkeypatch.setattr(cpu, "plain", SimpleNamespace(**telling_all))
    # the backend is loaded by its first call
    tilt_weights(strided(VECTOR), 0.1)
    seen.clear()
    return seen


@pytest.mark.parametrize("name", [*TAKEN, *LEFT])
def test_result_is_that_of_the_way_by_python(name, answers, monkeypatch):
    call = TAKEN.get(name) or LEFT[name]
    found = tree_flatten(call())[0]
    assert answers and all(served == (name in TAKEN) for served in answers), answers
    monkeypatch.setattr(cpu, "plain", None)
    expected = tree_flatten(call())[0]
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert type(a) is torch.Tensor and not a.requires_grad
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()) and torch.equal(a, b)


def test_statistics_are_one_memory_however_often_they_are_asked_for(answers):
    found = guidance_gradient(LOGITS, LABELS)
    assert answers == [True]
    score = found.score
    score += 1
    assert torch.equal(found.score, score) and found.score.data_ptr() == score.data_ptr()
    assert torch.equal(tuple(found)[1], score) and all(
        isinstance(leaf, torch.Tensor) for leaf in tree_flatten(found)[0]
    )


@pytest.mark.parametrize("override", ["reference", "cpu"])
def test_an_override_of_the_backend_is_heeded(override, answers):
    with use_backend(override):
        guidance_gradient(LOGITS, LABELS)
    assert answers == [True] * (override == "cpu")


def test_a_torch_without_the_table_is_not_read():
    older = ModuleType("torch")
    older.Tensor, older.nn = type("Tensor", (), {}), SimpleNamespace(Parameter=type("Parameter", (), {}))
    assert cpu.plain.know_plain_tensors(older) is False
    assert cpu.plain.plain_tilt_weights(VECTOR, 0.1, False, 2.0) is not None, "and what is known already stays"


def test_a_tensor_whose_storage_is_gone_is_not_read():
    scores = VECTOR.clone()
    scores.untyped_storage().resize_(0)
    assert cpu.plain.plain_tilt_weights(scores, 0.1, False, 2.0) is None


def test_result_enters_a_compiled_function():
    torch._dynamo.reset()
    found = guidance_gradient(LOGITS, LABELS)
    compiled = torch.compile(lambda given: given.score + given.grad.sum(), fullgraph=True, backend="eager")
    assert torch.equal(compiled(found), found.score + found.grad.sum())
