"""The tests' own tools do what the tests rely on."""

from __future__ import annotations

import pytest
import torch
from conftest import CPU_BACKENDS


def test_uninitialised_memory_is_poisoned():
    base = torch.zeros(3)
    fresh = [torch.empty(5), torch.empty_like(base), base.new_empty(4, dtype=torch.bfloat16)]
    assert all(tensor.isnan().all() for tensor in fresh)


def test_the_kernels_and_the_reference_are_both_tested():
    assert {"cpu", "reference"} <= set(CPU_BACKENDS)


def test_one_thread():
    assert torch.get_num_threads() == 1


def test_two_threads_when_asked_for(two_threads):
    assert torch.get_num_threads() == 2


@pytest.mark.full
def test_full_runs_only_when_asked_for(request):
    assert request.config.getoption("full")
