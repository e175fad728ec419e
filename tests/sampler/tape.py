"""A stand-in for CUDA's recording and replay, on the CPU.

Like a graph it repeats operations on the very tensors they ran on, and runs no Python in between: a number that a step
took from Python, or a tensor that came from outside its buffers, is the same at every replay.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# what makes the host wait for a device
WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class Tape(TorchDispatchMode):
    """Writes operations down; what they overwrite meanwhile is put back at the end, as recording changes nothing."""

    def __init__(self):
        super().__init__()
        self.operations, self.overwritten = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[place] if place < len(args) else kwargs[argument.name]
                self.overwritten.append((value, value.detach().clone()))
        results = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, results))
        return results

    def __exit__(self, *error):
        super().__exit__(*error)
        with torch.no_grad():
            for tensor, before in reversed(self.overwritten):
                tensor.detach().copy_(before)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, results in self.operations:
            aliases = [returned.alias_info for returned in func._schema.returns]
            if any(alias is not None and not alias.is_write for alias in aliases):
                continue  # a view: the memory it shows has been written to
            again = func(*args, **kwargs)
            if len(aliases) == 1:
                results, again = [results], [again]
            for alias, old, new in zip(aliases, results, again):
                if alias is None and isinstance(old, torch.Tensor):
                    old.detach().copy_(new)


class TapeRecorder:
    """In place of ``graphs.CudaRecorder``."""

    def __init__(self, device):
        self.warm_ups, self.attempts, self.replays = 0, 0, 0
        self.recorded = []

    def follow(self):
        pass

    def aside(self, call):
        self.warm_ups += 1
        return call()

    def record(self, call):
        self.attempts += 1
        tape = Tape()
        with tape:
            results = call()
        self.recorded.append(results)

        def replay():
            self.replays += 1
            # recordings share a pool: what one of them returned does not outlive the next replay
            for tensor in (tensor for others in self.recorded for tensor in others if tensor is not None):
                tensor.fill_(torch.nan)
            tape.replay()

        return replay, results
