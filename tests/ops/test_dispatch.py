"""The ops under everything that watches tensors: compiler, tracers, modes, transforms; and the gate past them."""

from __future__ import annotations

import pytest
import torch
from formulas import assert_near
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import calguide_fast.ops.smooth_ece as ece
from calguide_fast import guidance_gradient, guidance_score, guided_step, predict_x0, smooth_ece, tilt_weights
from calguide_fast.ops._library import LIBRARY, is_direct
from calguide_fast.ops.guidance import guidance_settings
from calguide_fast.ops.noise import sampling_noise
from calguide_fast.ops.top_label import _gradient, top_label
from calguide_fast.schedule import Schedule

ROW = Schedule.linear().respaced("25").coefficients()[9]
SETTINGS = guidance_settings("js", 1.0, 0.9, 1.0, 0.5, 0.3, True)


def logits_and_labels(batch: int = 4, num_classes: int = 10):
    return torch.randn(batch, num_classes), torch.randint(num_classes, (batch,))


def step_tensors():
    x_t, row = torch.randn(2, 3, 4, 4), ROW.to(torch.get_default_device(), copy=True)
    return x_t, torch.randn(2, 6, 4, 4), row, torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)


def step_arguments(boosted: bool):
    x_t, output, row, gradient, noise = step_tensors()
    if not boosted:
        return (
            x_t,
            output,
            row,
            gradient,
            None,
            None,
            None,
            torch.tensor([3, -4]),
            1,
            True,
            1.5,
            0.0,
            2.0,
            False,
            0.0,
            True,
        )
    vectors = torch.rand(2), torch.rand(2)
    return x_t, output, row, gradient, *vectors, noise, None, torch.zeros(2), 0, True, 1.5, -0.2, 2.0, False, 0.3, True


def curve_arguments(confidence, correct, weights, bandwidth):
    _, _, curve = torch.ops.calguide_fast.smooth_ece(confidence, correct, weights, bandwidth, True)
    return confidence, correct, weights, curve, torch.tensor(-1.5)


# sample arguments of every op; one that is missing here fails test_every_op_has_samples
SAMPLES = {
    "guidance_gradient": lambda: [
        (*logits_and_labels(), *SETTINGS),
        (torch.randn(10, 4).t().bfloat16(), torch.tensor([0, 3, 9, 5]), *SETTINGS),
    ],
    "tilt_weights": lambda: [(torch.randn(5), 0.4, False, 2.0)],
    "smooth_ece": lambda: [
        (torch.rand(7), torch.rand(7) < 0.5, None, 0.0, True),
        (torch.rand(7).bfloat16(), torch.tensor([0, 1, 1, 0, 1, 0, 1]), torch.rand(7), 0.1, False),
    ],
    "smooth_ece_gradient": lambda: [
        curve_arguments(torch.rand(7), torch.rand(7) < 0.5, None, 0.0),
        curve_arguments(torch.rand(7).bfloat16(), torch.tensor([0, 1, 1, 0, 1, 0, 1]), torch.rand(7), 0.1),
    ],
    "top_label": lambda: [
        logits_and_labels(),
        (torch.randn(10, 4).t().bfloat16(), torch.tensor([0, 3, 9, 5])),
    ],
    "top_label_backward": lambda: [
        (torch.randn(4), logits_and_labels()[0], torch.rand(4), torch.tensor([0, 3, 9, 5])),
        (torch.ones(1).expand(4), torch.randn(10, 4).t().half(), torch.rand(4), torch.tensor([0, 3, 9, 5])),
    ],
    "sampling_noise": lambda: [(torch.tensor([1, -2, 3]), [3, 4, 5], 7, 0)],
    "predict_x0": lambda: [
        (*step_tensors()[:3], True, torch.float32, torch.contiguous_format),
        (*step_tensors()[:3], False, torch.bfloat16, torch.channels_last),
    ],
    "guided_step": lambda: [step_arguments(boosted=False)],
    "guided_step_with_maximum": lambda: [step_arguments(boosted=True)],
}


def op_names() -> list[str]:
    return sorted(name.removeprefix("calguide_fast::") for name in LIBRARY._op_defs)


def test_every_op_has_samples():
    assert set(op_names()) == set(SAMPLES), "an op without sample arguments is not tested under opcheck"


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name, backend):
    overload = getattr(torch.ops.calguide_fast, name).default
    for arguments in SAMPLES[name]():
        torch.library.opcheck(overload, arguments)


def use_everything(logits, labels, x_t, output, row, gradient, noise, running, seeds):
    """All the public ops in one function."""
    found = guidance_gradient(logits, labels, "forward_kl", entropy_weight=0.2, adaptive_entropy=True)
    weights = tilt_weights(found.log_prob[:2], -0.2, max_weight=2.0)
    x0 = predict_x0(x_t, output, row)
    boost = {} if running is None else {"variance_max": running, "sine_boost": 0.3}
    x_prev = guided_step(x_t, output, row, gradient, noise=noise, weights=weights, scale=2.0, **boost)
    seeded = guided_step(x_t, output, row, gradient, seeds=seeds, scores=found.score[:2], tilt=0.3, method="ddim")
    predictions = logits.detach().softmax(1).flatten(), (logits > 0).flatten(), None
    calibration = smooth_ece(*predictions[:2]).value
    value, _, curve = ece._measure(*predictions, 0.0, True)
    steepness = ece._gradient(*predictions, curve, value)
    confidence, top, correct = top_label(logits.detach(), labels)
    pulled = _gradient(found.score, logits.detach(), confidence, top)
    noise = sampling_noise(seeds, (3, 4, 4), 0)
    results = (found.grad, found.score, weights, x0, x_prev, seeded, noise, calibration, steepness, confidence, pulled)
    results += (top.double(), correct.double())
    return results if running is None else (*results, running + 0)


def everything():
    x_t, output, row, gradient, noise = step_tensors()
    return *logits_and_labels(), x_t, output, row, gradient, noise, torch.zeros(2), torch.tensor([5, -6])


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b.double(), 1e-6)


def fresh(arguments):
    return tuple(argument.clone() for argument in arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(compiler, dynamic, backend):
    torch._dynamo.reset()
    arguments = everything()
    compiled = torch.compile(use_everything, fullgraph=True, backend=compiler, dynamic=dynamic)
    again = fresh(arguments)
    assert_same(compiled(*again), use_everything(*fresh(arguments)))
    assert (again[7] > 0).all(), "the running maximum is updated in place under the compiler, too"


def test_compile_score_with_backward(backend):
    torch._dynamo.reset()
    logits, labels = logits_and_labels()

    def pull(logits):
        return torch.autograd.grad(guidance_score(logits, labels, "hellinger").sum(), logits)[0]

    def score(logits):
        return guidance_score(logits, labels, "hellinger")

    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    leaf = logits.clone().requires_grad_()
    value = compiled(leaf)
    assert_near(value, score(logits).double(), 1e-6)
    assert_near(torch.autograd.grad(value.sum(), leaf)[0], pull(logits.clone().requires_grad_()).double(), 1e-6)


def test_compile_writes_out(backend):
    torch._dynamo.reset()
    logits, labels = logits_and_labels()

    def write(logits, out, x_out):
        guidance_gradient(logits, labels, out=out)
        predict_x0(*step, out=x_out)

    step = step_tensors()[:3]
    out, x_out = torch.empty_like(logits), torch.empty_like(step[0])
    torch.compile(write, fullgraph=True, backend="aot_eager")(logits, out, x_out)
    assert torch.equal(out, guidance_gradient(logits, labels).grad)
    assert torch.equal(x_out, predict_x0(*step))


def test_settings_are_checked_under_the_compiler():
    torch._dynamo.reset()

    def wrong(logits, labels):
        return guidance_gradient(logits, labels, "kl").grad

    with pytest.raises((ValueError, torch._dynamo.exc.TorchDynamoException), match="'kl' is not known|kl"):
        torch.compile(wrong, fullgraph=True, backend="eager")(*logits_and_labels())


def test_fake_tensors_have_the_real_shapes(backend):
    real = use_everything(*everything())
    arguments = everything()
    with FakeTensorMode() as mode:
        fake = use_everything(*[mode.from_tensor(argument) for argument in arguments])
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


def test_meta_tensors_have_the_real_shapes():
    meta = use_everything(*[argument.to("meta") for argument in everything()])
    for a, b in zip(meta, use_everything(*everything()), strict=True):
        assert a.is_meta and (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode, backend):
    arguments = everything()
    graph = make_fx(use_everything, tracing_mode=mode)(*fresh(arguments))
    called = {str(node.target) for node in graph.graph.nodes}
    assert {f"calguide_fast.{name}.default" for name in SAMPLES} <= called
    again = everything()
    assert_same(graph(*fresh(again)), use_everything(*fresh(again)))


def test_functionalize(backend):
    # without the running maximum: this transform takes no custom op that writes to an input, whereas torch.compile
    # and export, which are tested above and below, rewrite it
    arguments = everything()

    def without_maximum(*arguments):
        return use_everything(*arguments[:7], None, arguments[8])

    assert_same(torch.func.functionalize(without_maximum)(*arguments), without_maximum(*arguments))


def test_export(backend):
    class Module(torch.nn.Module):
        def forward(self, *arguments):
            return use_everything(*arguments)

    arguments = everything()
    exported = torch.export.export(Module(), fresh(arguments))
    assert_same(exported.module()(*fresh(arguments)), use_everything(*fresh(arguments)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace(backend):
    logits, labels = logits_and_labels()
    traced = torch.jit.trace(lambda logits: guidance_gradient(logits, labels).grad, torch.randn(4, 10))
    assert torch.equal(traced(logits), guidance_gradient(logits, labels).grad)


def test_vmap(backend):
    logits, labels = torch.randn(3, 4, 10), torch.randint(10, (3, 4))
    expected = torch.stack([guidance_gradient(f, y).grad for f, y in zip(logits, labels)])
    scores = torch.stack([guidance_score(f, y) for f, y in zip(logits, labels)])
    assert torch.equal(torch.func.vmap(lambda f, y: guidance_gradient(f, y).grad)(logits, labels), expected)
    assert torch.equal(torch.func.vmap(guidance_score)(logits, labels), scores)
    mapped = torch.func.vmap(guidance_gradient)(logits, labels)
    for name in mapped._fields:
        each = torch.stack([getattr(guidance_gradient(f, y), name) for f, y in zip(logits, labels)])
        assert torch.equal(getattr(mapped, name), each), name
    assert all(torch.equal(a, b) for a, b in zip(mapped, mapped._asdict().values(), strict=True))
    # another dimension mapped, and labels shared by all
    moved = torch.func.vmap(lambda f: guidance_gradient(f, labels[0]).score, in_dims=2)(logits.permute(1, 2, 0))
    assert torch.equal(moved, torch.stack([guidance_gradient(f, labels[0]).score for f in logits]))


def test_grad_vjp_and_their_vmap(backend):
    logits, labels = torch.randn(3, 4, 10), torch.randint(10, (3, 4))
    expected = torch.stack([guidance_gradient(f, y).grad for f, y in zip(logits, labels)])

    def total(f, y):
        return guidance_score(f, y).sum()

    assert torch.equal(torch.func.grad(total)(logits[0], labels[0]), expected[0])
    assert torch.equal(torch.func.vmap(torch.func.grad(total))(logits, labels), expected)
    value, pull = torch.func.vjp(lambda f: guidance_score(f, labels[0]), logits[0])
    assert torch.equal(value, guidance_score(logits[0], labels[0]))
    assert torch.equal(pull(torch.full((4,), 3.0))[0], 3 * expected[0])
    jacobian = torch.func.jacrev(lambda f: guidance_score(f, labels[0]))(logits[0])
    assert torch.equal(jacobian[range(4), range(4)], expected[0])


class Tagged(torch.Tensor):
    """A subclass that changes nothing."""


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Watching(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def negated_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same values behind a lazy negation."""
    view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert view.is_neg() and torch.equal(view, tensor)
    return view


def test_gate_lets_plain_tensors_through():
    plain = torch.randn(4, 5)
    parameter = torch.nn.Parameter(plain)
    assert is_direct(plain, None, parameter, plain.t(), plain[::2], plain.requires_grad_())
    with torch.no_grad():
        assert is_direct(plain)
    with torch.inference_mode():
        assert is_direct(plain, torch.randn(2))


@pytest.mark.parametrize("kind", ["negated", "subclass", "meta", "sparse", "mkldnn", "fake"])
def test_gate_refuses_odd_tensors(kind):
    plain = torch.randn(4, 5)
    if kind == "fake":
        odd = FakeTensorMode().from_tensor(plain)
    else:
        odd = {
            "negated": negated_view,
            "subclass": lambda tensor: tensor.as_subclass(Tagged),
            "meta": lambda tensor: tensor.to("meta"),
            "sparse": torch.Tensor.to_sparse,
            "mkldnn": torch.Tensor.to_mkldnn,
        }[kind](plain)
    assert not is_direct(odd)
    assert not is_direct(plain, None, odd), "one odd tensor among plain ones is enough"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_gate_refuses_watched_calls():
    plain = torch.randn(4, 5)
    answers = {}
    with Counting():
        answers["dispatch mode"] = is_direct(plain)
    with Watching():
        answers["function mode"] = is_direct(plain)
    with forward_ad.dual_level():
        answers["forward AD"] = is_direct(plain)

    def look(name):
        def function(x):
            answers[name] = is_direct(plain)
            return x.sum()

        return function

    torch.func.vmap(look("vmap"))(plain)
    torch.func.grad(look("grad"))(plain)
    torch.func.jvp(look("jvp"), (plain,), (plain,))
    make_fx(look("make_fx"))(plain)
    torch.jit.trace(look("jit"), plain, check_trace=False)
    leaf = torch.zeros(2, requires_grad=True)
    total = leaf.sum()
    total.register_hook(look("batched gradients"))
    torch.autograd.grad(total, leaf, torch.ones(3), is_grads_batched=True)
    assert len(answers) == 9
    assert not any(answers.values()), answers
    assert is_direct(plain), "and nothing of it stays"


def test_odd_tensors_give_the_plain_result(backend):
    logits, labels = logits_and_labels()
    expected = guidance_gradient(logits, labels)
    for odd in (negated_view(logits), logits.as_subclass(Tagged)):
        found = guidance_gradient(odd, labels)
        for a, b in zip(found, expected):
            assert torch.equal(a.as_subclass(torch.Tensor), b)
    x_t, output, row, gradient, noise = step_tensors()
    plain = guided_step(x_t, output, row, gradient, noise=noise)
    for name in ("x_t", "model_output", "gradient", "noise"):
        tensors = {"x_t": x_t, "model_output": output, "gradient": gradient, "noise": noise}
        tensors[name] = negated_view(tensors[name])
        assert torch.equal(guided_step(coefficients=row, **tensors), plain), name
    assert torch.equal(tilt_weights(negated_view(output[:, 0, 0, 0]), 0.3), tilt_weights(output[:, 0, 0, 0], 0.3))


def test_modes_see_the_ops(backend):
    expected = use_everything(*fresh(arguments := everything()))
    for mode, spelling in ((Counting(), "calguide_fast.{}.default"), (Watching(), "calguide_fast.{}")):
        with mode:
            found = use_everything(*fresh(arguments))
        for name in SAMPLES:
            assert spelling.format(name) in mode.seen, (name, sorted(set(mode.seen)))
        assert_same(found, expected)


@pytest.mark.parametrize("watcher", [Counting, Watching, lambda: torch.device("cpu")])
def test_watched_calls_are_cut_off_from_autograd_too(watcher, backend):
    """A default device, for one, is a function mode."""
    arguments = [argument.requires_grad_() if argument.is_floating_point() else argument for argument in everything()]
    # the running maximum is written to
    arguments[7] = arguments[7].detach()
    with watcher():
        assert not any(result.requires_grad for result in use_everything(*arguments))
    compiled = torch.compile(use_everything, fullgraph=True, backend="aot_eager")
    assert not any(result.requires_grad for result in compiled(*arguments))


def test_forward_mode_is_refused_clearly(backend):
    logits, labels = logits_and_labels()
    with pytest.raises((RuntimeError, NotImplementedError), match="jvp|forward"):
        torch.func.jvp(lambda f: guidance_score(f, labels), (logits,), (torch.ones_like(logits),))


def test_inference_mode(backend):
    logits, labels = logits_and_labels()
    expected = guidance_gradient(logits, labels)
    with torch.inference_mode():
        found = guidance_gradient(torch.empty_like(logits).copy_(logits), labels)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def _score(logits, labels):
    return guidance_score(logits, labels).sum()


def _confidence(logits, labels):
    return top_label(logits, labels)[0].sum()


def _calibration(logits, labels):
    return ece.smooth_ece_from_logits(logits, labels).value


OPS = ["guidance_score", "top_label", "smooth_ece"]


@pytest.mark.parametrize("vectorised", ["is_grads_batched", "jacobian"])
@pytest.mark.parametrize("op", [guidance_score, lambda *given: top_label(*given)[0], _calibration], ids=OPS)
def test_batched_gradients(op, vectorised, backend):
    """Autograd's own vmap is older than torch.func's, and has none of its levels."""
    logits, labels = logits_and_labels(batch=5)
    leaf = logits.requires_grad_()
    result = op(leaf, labels)
    pulls = torch.eye(result.numel()).view(-1, *result.shape)
    expected = torch.stack([torch.autograd.grad(result, leaf, pull, retain_graph=True)[0] for pull in pulls])
    if vectorised == "jacobian":
        found = torch.autograd.functional.jacobian(lambda leaf: op(leaf, labels), leaf, vectorize=True)
        found = found.view_as(expected)
    else:
        (found,) = torch.autograd.grad(result, leaf, pulls, is_grads_batched=True)
    assert expected.any() and torch.equal(found, expected)


@pytest.mark.parametrize("op", [guidance_score, lambda *given: top_label(*given)[0]], ids=OPS[:2])
def test_logits_edited_before_the_backward_pass_are_noticed(op, backend):
    logits, labels = logits_and_labels()
    logits = logits.requires_grad_() * 1
    total = op(logits, labels).sum()
    with torch.no_grad():
        logits[0] = 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("op", [_score, _confidence, _calibration], ids=OPS)
def test_a_compiled_transform_is_refused_and_not_0(op):
    torch._dynamo.reset()
    logits, labels = torch.randn(6, 5), torch.arange(6) % 5

    def gradient(logits):
        return torch.func.grad(op)(logits, labels)

    with pytest.raises(torch._dynamo.exc.Unsupported, match="NotImplementedError|Observed exception"):
        torch.compile(gradient, fullgraph=True, backend="eager")(logits)
    if op is _score:
        # what need not be compiled whole is left to Python; Dynamo itself breaks off over the others' backward
        torch._dynamo.reset()
        assert torch.equal(torch.compile(gradient, backend="eager")(logits), gradient(logits))
