"""The CPU kernels of top_label where their paths meet, with any number of threads, on every instruction set."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from formulas import assert_near

from calguide_fast.backends import cpu, reference


# around a vector of rows; the longest narrow row; whole vectors of classes; the longest search and row on the stack
@pytest.mark.parametrize(
    "shape",
    [(15, 3), (16, 3), (17, 47), (33, 48), (3, 49), (3, 64), (3, 255), (3, 257), (3, 4096), (3, 4097), (1, 9999)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_the_reference(shape, dtype):
    rows, classes = shape
    logits = (3 * torch.randn(shape)).to(dtype)
    # the largest first and last, equal ones, and none but masked
    logits[0, -1] = 20.0
    if rows > 2:
        logits[1, 0] = 20.0
        logits[2] = logits[2].round()
        logits[-1, classes // 2 :] = -math.inf
    labels = logits.argmax(1)
    labels[0] = 0
    for strided in (logits, logits.t().contiguous().t()):
        found, expected = cpu.top_label(strided, labels), reference.top_label(strided, labels)
        assert_near(found[0], expected[0].double(), 1e-6)
        assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])
        arguments = (torch.randn(2 * rows)[::2], strided, *expected[:2])
        grad = cpu.top_label_backward(*arguments)
        assert_near(grad, reference.top_label_backward(*arguments).double(), 1e-6)


def test_result_does_not_depend_on_threads(two_threads):
    for shape in ((30_000, 10), (200, 3000)):
        logits, labels = torch.randn(shape), torch.randint(shape[1], shape[:1])
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            confidence, top, correct = cpu.top_label(logits, labels)
            results.append((confidence, top, correct, cpu.top_label_backward(confidence, logits, confidence, top)))
        assert all(torch.equal(a, b) for a, b in zip(*results))
        assert torch.equal(results[0][1], logits.argmax(1))


@pytest.mark.skipif("CALGUIDE_CPU_ISA" in os.environ, reason="already a run for one instruction set")
@pytest.mark.parametrize("isa", [isa for isa in cpu._cpu.isas() if isa != cpu._cpu.isa()])
def test_other_instruction_sets(isa):
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__]
    done = subprocess.run(command, env=os.environ | {"CALGUIDE_CPU_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
