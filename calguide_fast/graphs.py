"""A sampler's step as a CUDA graph: run a few times, recorded once, and replayed with one launch from then on.

A graph repeats the same kernels on the same memory. So what a step reads and writes lives in buffers that stay where
they are, into which each step's inputs are copied first; and whatever a recording fixes for good (networks, settings,
the places of parameters) is compared before every run: once it has changed, the recordings are thrown away.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock, RLock
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from calguide_fast import backends

# runs of a kind of step before it is recorded: libraries set themselves up, compilers compile, cuDNN makes its choice
WARM_UP = 3
# shapes of batch whose recordings are kept: those used last
KEPT = 8

# a NamedTuple of tensors and None
Buffers = TypeVar("Buffers", bound=tuple[Any, ...])
Results = TypeVar("Results")

# of all samplers: while one thread records, the device's random state is the recording's, and a replay by another
# thread, or a compiler's look at it, is an error
_one_at_a_time = RLock()


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
    replayed step returns is overwritten by the next step. A copy has none: it makes its own.
    """

    def __init__(self) -> None:
        self._in_use = Lock()
        self._told: set[str] = set()
        self._fixed: _Fixed | None = None
        self._clear()

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return Graphs, ()

    def _clear(self) -> None:
        self._recorder: CudaRecorder | None = None
        self._broken = self._may_try_again = False
        self._rooms: dict[Any, _Room] = {}  # the one used last at the end
        self._room: _Room | None = None

    @contextmanager
    def borrowed(self, device: torch.device, settings: Iterable[Any]) -> Iterator[Graphs | None]:
        """The graphs for the length of one run, or None where the run must do without.

        A warning explains that once, unless it is that another run has them: one of another thread, or the one whose
        callback has begun this one.

        Args:
            device: of the run.
            settings: every object that the steps depend on and that a recording would fix.
        """
        reason = obstacle(device)
        fixed = None if reason is not None else _Fixed.now(device, settings)
        if fixed is not None and None in fixed.places:
            reason = "a parameter or buffer does not tell its place in memory, so that it may move unseen"
        if reason is not None or fixed is None:
            self._tell(str(reason))
            yield None
        elif not self._in_use.acquire(blocking=False):
            # the buffers hold the other run's images
            yield None
        else:
            try:
                self._renew(device, fixed)
                yield None if self._broken else self
            finally:
                self._in_use.release()

    def _renew(self, device: torch.device, fixed: _Fixed) -> None:
        if self._recorder is not None:
            # first, as what is thrown away may still be at work
            self._recorder.follow()
        if self._fixed is None or not fixed.is_same(self._fixed) or self._may_try_again:
            self._clear()
            self._fixed = fixed
        if self._recorder is None:
            self._recorder = CudaRecorder(device)

    def hold(self, state: Buffers) -> Buffers:
        """Begin a batch: its state in buffers that stay, one set of them for each combination of types and shapes."""
        key = _shape_of(state)
        room = self._rooms.pop(key, None)
        if room is None:
            while len(self._rooms) >= KEPT:
                del self._rooms[next(iter(self._rooms))]
            room = _Room(_copied(state))
        else:
            _write(room.state, state)
        self._rooms[key] = self._room = room
        return room.state

    def run(self, step: Callable[[Any, Any, Buffers], Results], kind: Any, inputs: Buffers) -> Results:
        """``step(kind, state, inputs)`` with the state of the batch that was begun last, replayed if it can be.

        Args:
            step: does all that it does to tensors at fixed places: the state, and buffers that ``inputs`` is copied to.
            kind: hashable; whatever makes two steps differ in more than the values of tensors.
            inputs: of this step alone.
        """
        room, key = self._room, _shape_of(inputs)
        assert room is not None and self._recorder is not None
        held = room.inputs.get(key)
        if held is None:
            held = room.inputs[key] = _copied(inputs)
        else:
            _write(held, inputs)

        def call() -> Results:
            return step(kind, room.state, held)

        if self._broken:
            return call()
        recording = room.recordings.setdefault((kind, key), _Recording())
        with _one_at_a_time:
            if recording.runs < WARM_UP:
                recording.runs += 1
                return self._recorder.aside(call)
            if recording.replay is not None or self._recorded(recording, call):
                assert recording.replay is not None
                recording.replay()
                return recording.results
        # recording runs no kernel: the state is as it was, and this step is still to be made. By now the error is gone,
        # and with it the tensors that its traceback held
        return call()

    def _recorded(self, recording: _Recording, call: Callable[[], Any]) -> bool:
        """Whether the call could be recorded."""
        assert self._recorder is not None
        first: BaseException | None = None

        def noted() -> Any:
            nonlocal first
            try:
                return call()
            except BaseException as error:
                first = error
                raise

        try:
            recording.replay, recording.results = self._recorder.record(noted)
            return True
        except Exception as error:
            # breaking off raises an error of its own, in the course of the one that says why
            first = error if first is None else first
            if not isinstance(first, Exception):
                # an interruption, which is no reason to go on
                raise first from None
            self._give_up(first)
        finally:
            # or it would hold itself, by its traceback and this frame
            first = None
        return False

    def _give_up(self, error: Exception) -> None:
        self._broken = True
        # another run may find memory free
        self._may_try_again = isinstance(error, torch.OutOfMemoryError)
        for room in self._rooms.values():
            room.recordings.clear()
        # CUDA's advice on debugging follows in further lines
        message = str(error).partition("\n")[0]
        again = "; the next run tries again" if self._may_try_again else ""
        self._tell(f"a step cannot be recorded: {type(error).__name__}: {message}{again}")

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(f"cuda_graph=True: sampling without a CUDA graph; {reason}", RuntimeWarning, stacklevel=2)


class _Room:
    """The buffers of one shape of batch, and the recordings of the steps over them."""

    def __init__(self, state: Any) -> None:
        self.state = state
        self.inputs: dict[Any, Any] = {}
        self.recordings: dict[Any, _Recording] = {}


class _Recording:
    """One kind of step: how often it ran, then how to replay it and where its results are."""

    def __init__(self) -> None:
        self.runs = 0
        self.replay: Callable[[], None] | None = None
        self.results: Any = None


def _shape_of(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return type(values), *(None if value is None else (value.shape, value.dtype) for value in values)


def _copied(values: Buffers) -> Buffers:
    make: Any = type(values)
    return make(*(None if value is None else value.clone(memory_format=torch.contiguous_format) for value in values))


def _write(buffers: tuple[Any, ...], values: tuple[Any, ...]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        if buffer is not None:
            buffer.copy_(value)


class _Fixed(NamedTuple):
    """What recordings hold for good."""

    objects: tuple[Any, ...]
    places: tuple[Any, ...]  # of the tensors, None for one that does not tell

    @classmethod
    def now(cls, device: torch.device, settings: Iterable[Any]) -> _Fixed:
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        objects = (*settings, backends._override, autocast)
        return cls(objects, tuple(_place(tensor) for value in objects for tensor in _tensors(value)))

    def is_same(self, other: _Fixed) -> bool:
        # by identity, as equality may compare tensors; the objects are kept, so no other can take their places
        same = len(self.objects) == len(other.objects) and all(map(lambda a, b: a is b, self.objects, other.objects))
        return same and self.places == other.places


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, nn.Module):
        for tensor in itertools.chain(value.parameters(), value.buffers()):
            yield from _tensors(tensor)
    elif hasattr(value, "__tensor_flatten__"):
        # a subclass around other tensors, such as a quantised one
        for name in value.__tensor_flatten__()[0]:
            yield from _tensors(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value


def _place(tensor: Tensor) -> tuple[Any, ...] | None:
    """Where the tensor's elements lie and how they are read; None if it does not tell."""
    try:
        place = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
    except (RuntimeError, ValueError):
        # without storage, such as a sparse one; or of a lazy module, before it is called for the first time
        return None
    return place if place[0] or not tensor.numel() else None


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
        with torch.cuda.stream(self._warm_up), _no_autocast_cache():
            results = call()
        current.wait_stream(self._warm_up)
        return results

    def record(self, call: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        """A function that repeats the call's kernels, and the tensors that they write their results to."""
        graph = torch.cuda.CUDAGraph()
        try:
            # the outermost context brings the current stream back where the innermost, whose recording has broken off,
            # fails to
            with _no_autocast_cache(), torch.cuda.stream(self._capture), self._recording(graph, self._pool):
                results = call()
        except BaseException:
            self._clean_up()
            raise
        return graph.replay, results

    def _recording(self, graph: torch.cuda.CUDAGraph, pool: Any = None) -> torch.cuda.graph:
        # other threads may go on using the device meanwhile
        return torch.cuda.graph(graph, pool, self._capture, capture_error_mode="thread_local")

    def _clean_up(self) -> None:
        """What some versions of PyTorch leave undone when a recording breaks off."""
        # they go on allocating from its pool, and count it as one that uses the pool; others object to this
        for name in ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"):
            end = getattr(torch._C, name, None)
            if end is not None:
                with suppress(RuntimeError):
                    end(self._capture.device_index, self._pool)
                    torch._C._cuda_releasePool(self._capture.device_index, self._pool)
                break
        # the random state stays the broken recording's, and every draw or replay an error, until another one ends well
        with self._recording(torch.cuda.CUDAGraph()):
            torch.zeros(1, device=self._device)


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """While a step is recorded: a weight that autocast has cast and cached is freed when autocast's context ends.

    And while it is warmed up: a compiler compiles for this setting, and must not do so again while it is recorded.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
