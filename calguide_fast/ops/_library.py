"""The torch.library namespace that the ops are defined in, and the gate to the direct path past it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from calguide_fast import backends

LIBRARY = torch.library.Library("calguide_fast", "DEF")

# names of this module's own, as a look-up in torch costs as much as some of the checks
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
_STRIDED = torch.strided
_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._is_tracing
_thread_includes = torch._C._dispatch_tls_is_dispatch_key_included
# set while autograd takes a batch of gradients at once, by a vmap that has no functorch level
_BATCHED_GRADIENTS: Any = torch._C._parse_dispatch_key("VmapMode")


def is_watched() -> bool:
    """Whether a compiler, tracer, mode, transform or forward-mode level may want to see the ops that are called."""
    # a compiler other than Dynamo works with a dispatch mode
    return (
        _compiling()
        or _tracing()
        or _dispatch_modes() != 0
        or _function_modes() != 0
        or _functorch_level() is not None
        or forward_ad._current_level >= 0
    )


def is_direct(*tensors: Tensor | None) -> bool:
    """Whether the dispatcher has nothing to add, so that an op may call its backend at once, some 3 µs sooner.

    True for ordinary strided tensors, without lazy negation, when nothing watches and no gradients are batched.
    """
    if is_watched() or _thread_includes(_BATCHED_GRADIENTS):
        return False
    # a plain loop: all() with a generator doubles the cost of a small call
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN_TYPES or tensor.layout is not _STRIDED or tensor.is_neg() or tensor.is_meta:
            return False
    return True


def plain_calls(tensor: Any) -> ModuleType | None:
    """The functions of :func:`calguide_fast.backends.plain`, if this may be a tensor for them and nothing watches."""
    if not isinstance(tensor, Tensor) or not tensor.is_cpu or is_watched():
        return None
    return backends.plain()


def _transforming() -> bool:
    return torch._C._are_functorch_transforms_active()


# Dynamo is to call it, not to trace it; what torch.compiler has for this loads Dynamo, which takes a second
_transforming._dynamo_marked_constant = True  # type: ignore[attr-defined]


def applied(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """The function's outputs; where nothing watches, past ``Function.apply``, some 30 µs sooner.

    That is for transforms, and binds the arguments by inspecting the signature.

    Raises NotImplementedError where a transform is compiled: the compiler then leaves it to Python, or says so where
    it may not.
    """
    if _compiling() and _transforming():
        # within a transform, Dynamo would differentiate what is inside forward, and find a gradient of 0
        raise NotImplementedError(
            f"torch.compile does not follow {function.__module__}.{function.__qualname__} within a transform of "
            "torch.func: leave the transform out of what is compiled"
        )
    if is_direct(*(value for value in inputs if isinstance(value, Tensor))):
        return super(torch.autograd.Function, function).apply(*inputs)  # type: ignore[misc]
    return function.apply(*inputs)


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, gradient: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        return gradient(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(f"{ctx.name} is differentiable once; this is its second derivative")


def once(name: str, gradient: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """``gradient(*inputs)`` in the backward pass of the op called ``name``, refusing to be differentiated itself.

    What PyTorch has for this, ``once_differentiable``, lets a second derivative be 0 under ``torch.func``. Whatever the
    gradient depends on has to be among the inputs.
    """
    # a second derivative cannot be asked for where no graph is recorded, or in a compiled one
    recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return applied(_Once, name, gradient, *inputs) if recorded else gradient(*inputs)


def dispatched(op: Any, *arguments: Any) -> Any:
    """The op's result by way of the dispatcher, cut off from autograd as on the direct path."""
    with torch.no_grad():
        return op(*arguments)


_TRANSFORM = torch._C._functorch.TransformType
_DIFFERENTIATING = (_TRANSFORM.Grad, _TRANSFORM.Jvp, _TRANSFORM.Vmap)


def may_be_differentiated(tensor: Tensor) -> bool:
    """Whether autograd or a transform may ask for a gradient in this tensor."""
    if not torch.is_grad_enabled():
        return False
    if tensor.requires_grad:
        return True
    if torch.compiler.is_compiling():
        return _transforming()
    # vmap hides what autograd or a transform around it requires
    return any(level.key() in _DIFFERENTIATING for level in torch._C._functorch.get_interpreter_stack() or ())


def leading(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """A tensor of a vmap with the mapped dimension first, repeated where there is none."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
