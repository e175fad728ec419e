"""A sampler's step as a CUDA graph: run a few times, recorded once, and replayed with one launch from then on.

A graph repeats the same kernels on the same memory. So what a step reads and writes lives in buffers that stay where
they are, into which each step's inputs are copied first; and whatever a recording fixes for good (networks, settings,
the places of parameters) is compared before every run: once it has changed, the recordings are thrown away.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from calguide_fast import backends

# runs of a kind of step before it is recorded: libraries set themselves up, compilers compile, cuDNN makes its choice
WARM_UP = 3

# a NamedTuple of tensors and None
Buffers = TypeVar("Buffers", bound=tuple[Any, ...])
Results = TypeVar("Results")


def obstacle(device: torch.device) -> str | None:
    """Why no graph can be recorded on this device at present, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device and the sampler is on {str(device)!r}"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "torch.distributed is initialised, and its watchdog's queries break a recording off"
    return None


class Graphs:
    """The recordings of one sampler, for one run at a time.

    They stay from run to run, one for each kind of step and shape of batch, and share one pool of memory. What a
    replayed step returns is overwritten by the next step.
    """

    def __init__(self) -> None:
        self._in_use = Lock()
        self._told: set[str] = set()
        self._fixed: _Fixed | None = None
        self._clear()

    def _clear(self) -> None:
        self._recorder: CudaRecorder | None = None
        self._broken = False
        self._buffers: dict[Any, Any] = {}
        self._recordings: dict[Any, _Recording] = {}

    @contextmanager
    def borrowed(self, device: torch.device, settings: Iterable[Any]) -> Iterator[Graphs | None]:
        """The graphs for the length of one run, or None where the run must do without, which a warning explains once.

        Args:
            device: of the run.
            settings: every object that the steps depend on and that a recording would fix.
        """
        reason = obstacle(device)
        if reason is not None:
            self._tell(reason)
            yield None
        elif not self._in_use.acquire(blocking=False):
            # a callback that samples too, or another thread: the buffers hold the first run's images
            yield None
        else:
            try:
                self._renew(device, settings)
                yield None if self._broken else self
            finally:
                self._in_use.release()

    def _renew(self, device: torch.device, settings: Iterable[Any]) -> None:
        if self._recorder is not None:
            # first, as what is thrown away may still be at work
            self._recorder.follow()
        fixed = _Fixed.now(device, settings)
        if self._fixed is None or not fixed.is_same(self._fixed):
            self._clear()
            self._fixed = fixed
        if self._recorder is None:
            self._recorder = CudaRecorder(device)

    def hold(self, values: Buffers) -> Buffers:
        """The same values in buffers that stay: one set of them for each combination of types and shapes."""
        key = type(values), *(None if value is None else (value.shape, value.dtype) for value in values)
        held = self._buffers.get(key)
        if held is None:
            clones = (None if value is None else value.clone(memory_format=torch.contiguous_format) for value in values)
            make: Any = type(values)
            held = self._buffers[key] = make(*clones)
        else:
            for buffer, value in zip(held, values, strict=True):
                if buffer is not None:
                    buffer.copy_(value)
        return held

    def run(self, step: Callable[[Any, Any, Buffers], Results], kind: Any, state: Any, inputs: Buffers) -> Results:
        """``step(kind, state, inputs)``, replayed if it can be.

        Args:
            step: does all that it does to tensors at fixed places: ``state``, and buffers that ``inputs`` is copied to.
            kind: hashable; whatever makes two steps differ in more than the values of tensors.
            state: buffers given by :meth:`hold`.
            inputs: of this step alone.
        """
        inputs = self.hold(inputs)
        if self._broken:
            return step(kind, state, inputs)
        assert self._recorder is not None

        def call() -> Results:
            return step(kind, state, inputs)

        # both tuples are kept for good, so that their identities name the buffers in them
        recording = self._recordings.setdefault((kind, id(state), id(inputs)), _Recording())
        if recording.replay is None:
            if recording.runs < WARM_UP:
                recording.runs += 1
                return self._recorder.aside(call)
            try:
                recording.replay, recording.results = self._recorder.record(call)
            except Exception as error:
                # recording runs no kernel: the state is as it was, and this step is still to be made
                self._give_up(error)
                return call()
        recording.replay()
        return recording.results

    def _give_up(self, error: Exception) -> None:
        # breaking off raises an error of its own, in the course of the one that says why
        cause = error.__context__ if isinstance(error.__context__, Exception) else error
        self._broken = True
        self._recordings.clear()
        # CUDA's advice on debugging follows in further lines
        message = str(cause).partition("\n")[0]
        self._tell(f"a step cannot be recorded: {type(cause).__name__}: {message}")

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(f"cuda_graph=True: sampling without a CUDA graph; {reason}", RuntimeWarning, stacklevel=2)


class _Recording:
    """One kind of step: how often it ran, then how to replay it and where its results are."""

    def __init__(self) -> None:
        self.runs = 0
        self.replay: Callable[[], None] | None = None
        self.results: Any = None


class _Fixed(NamedTuple):
    """What recordings hold for good."""

    objects: tuple[Any, ...]
    places: tuple[int, ...]

    @classmethod
    def now(cls, device: torch.device, settings: Iterable[Any]) -> _Fixed:
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        objects = (*settings, backends._override, autocast)
        return cls(objects, tuple(tensor.data_ptr() for value in objects for tensor in _tensors(value)))

    def is_same(self, other: _Fixed) -> bool:
        # by identity, as equality may compare tensors; the objects are kept, so no other can take their places
        same = len(self.objects) == len(other.objects) and all(map(lambda a, b: a is b, self.objects, other.objects))
        return same and self.places == other.places


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    elif isinstance(value, Tensor):
        yield value


class CudaRecorder:
    """What graphs need of a CUDA device: a stream to warm up on, one to record on, and a pool of memory for all."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # not one stream for both: libraries keep a workspace for each, and a recording's belongs in the pool
        self._warm_up, self._capture = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._last = torch.cuda.current_stream(device)

    def follow(self) -> None:
        """Let the current stream wait for the one that used the buffers last."""
        current = torch.cuda.current_stream(self._device)
        if current != self._last:
            current.wait_stream(self._last)
            self._last = current

    def aside(self, call: Callable[[], Results]) -> Results:
        """Call on a side stream, in turn with the current one."""
        current = torch.cuda.current_stream(self._device)
        self._warm_up.wait_stream(current)
        with torch.cuda.stream(self._warm_up):
            results = call()
        current.wait_stream(self._warm_up)
        return results

    def record(self, call: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        """A function that repeats the call's kernels, and the tensors that they write their results to."""
        graph = torch.cuda.CUDAGraph()
        cached = torch.is_autocast_cache_enabled()
        # a weight that autocast has cast and cached would be freed when its context ends
        torch.set_autocast_cache_enabled(False)
        try:
            # other threads may go on using the device meanwhile. The outer context brings the current stream back
            # where the inner one, whose recording has broken off, fails to
            with (
                torch.cuda.stream(self._capture),
                torch.cuda.graph(graph, self._pool, self._capture, capture_error_mode="thread_local"),
            ):
                results = call()
        except Exception:
            self._end_allocation()
            raise
        finally:
            torch.set_autocast_cache_enabled(cached)
        return graph.replay, results

    def _end_allocation(self) -> None:
        # some versions of PyTorch go on allocating from the pool of a recording that broke off; others object to this
        for name in ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"):
            end = getattr(torch._C, name, None)
            if end is not None:
                with suppress(RuntimeError):
                    end(self._capture.device_index, self._pool)
                return
