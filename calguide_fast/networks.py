"""Networks as a sampler runs them: converted to another precision or layout, compiled, their parameters frozen; and
what is done to their outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Network = Callable[..., Tensor]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_callable(name: str, network: Any) -> None:
    """Raise a TypeError unless it can be called."""
    if not callable(network):
        module = "; give its .module" if isinstance(getattr(network, "module", None), nn.Module) else ""
        raise TypeError(f"{name} must be callable, got {type(network).__name__}{module}")


def prepared(name: str, network: Network, dtype: torch.dtype | None, channels_last: bool, compile: bool) -> Network:
    """The network to run in place of the caller's, which is left as it is; the same object if nothing is asked for.

    Args:
        name: what errors call it.
        network: a module or, if it is only to be compiled, any callable.
        dtype: of the copy's parameters, through its own ``convert_dtype`` if it has one (the ADM networks then convert
            their torso and keep what needs float32), else through ``to``.
        channels_last: lay the copy's convolutions out that way.
        compile: wrap it in ``torch.compile``.

    Raises:
        TypeError: dtype is no dtype; or what is to be converted is a plain callable or a module that cannot be copied.
        ValueError: another dtype than float16, bfloat16 or float32.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype or None, got {dtype!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} must be torch.float16, torch.bfloat16 or torch.float32")
    if dtype is not None or channels_last:
        if not isinstance(network, nn.Module):
            raise TypeError(
                f"dtype and channels_last convert the parameters of an nn.Module, and the {name} is a plain callable: "
                f"{type(network).__name__}"
            )
        network = _converted(name, network, dtype, channels_last)
    elif compile and isinstance(network, nn.Module):
        network = _twin(network)
    return torch.compile(network) if compile else network


def _converted(name: str, module: nn.Module, dtype: torch.dtype | None, channels_last: bool) -> nn.Module:
    try:
        module = copy.deepcopy(module).requires_grad_(False)
    except Exception as error:
        raise TypeError(
            f"dtype and channels_last convert a copy, and the {name} cannot be copied: {type(module).__name__}: {error}"
        ) from error
    if dtype is not None:
        convert: Callable[[torch.dtype], Any] = getattr(module, "convert_dtype", module.to)
        convert(dtype)
    if channels_last:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


def _twin(module: nn.Module) -> nn.Module:
    """Another module over the same tensors, whose parameters ask for no gradient; or the module itself.

    A compiled backward pass computes the gradient of every parameter that asks for one, whoever needs it.
    """
    memo: dict[int, Any] = {id(buffer): buffer for buffer in module.buffers()}
    memo |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    try:
        return copy.deepcopy(module, memo)
    except Exception:
        # it holds what cannot be copied, as old weight normalisation does: its images are the same, its gradient slower
        return module


def denoise_of(model: Any, compile: bool) -> Callable[..., Tensor] | None:
    """An EDM denoiser's own method; compiling a module wraps its call, and nothing else."""
    denoise = getattr(model, "denoise", None)
    return torch.compile(denoise) if compile and callable(denoise) else denoise


@contextmanager
def frozen(networks: Iterable[Network]) -> Iterator[None]:
    """While it lasts, modules' parameters ask for no gradient, and their forward passes keep nothing for theirs."""
    modules = [network for network in networks if isinstance(network, nn.Module)]
    asking = [p for module in modules for p in module.parameters() if p.requires_grad]
    for p in asking:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asking:
            p.requires_grad_(True)


def device_of(network: Any) -> torch.device:
    return next((p.device for p in _floating_parameters(network)), torch.get_default_device())


def dtype_of(network: Any) -> torch.dtype:
    """The dtype that a module's parameters share; one that mixes dtypes converts its input itself."""
    dtypes = {p.dtype for p in _floating_parameters(network)}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def layout_of(network: Any) -> torch.memory_format:
    for p in _floating_parameters(network):
        if is_channels_last(p):
            return torch.channels_last
    return torch.contiguous_format


def is_channels_last(tensor: Tensor) -> bool:
    """Whether the tensor is in that layout, and in no other."""
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def at_most_float32(tensor: Tensor) -> Tensor:
    """What a float64 network gives, in the precision of x_t."""
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def apart(tensor: Tensor, x_t: Tensor) -> Tensor:
    """The tensor, copied if it lies in x_t's memory, as where a network gives back a view of its input."""
    return tensor.clone() if 0 <= tensor.data_ptr() - x_t.data_ptr() < x_t.nbytes else tensor


def _floating_parameters(network: Any) -> list[Tensor]:
    return [p for p in network.parameters() if p.is_floating_point()] if isinstance(network, nn.Module) else []
