"""Every kind of Triton kernel compiled to machine code, without a GPU: what it takes of one, and may not contain.

This says nothing of speed, and nothing of a GPU's rounding.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from compile_offline import CASES
from conftest import HAS_TRITON

pytestmark = pytest.mark.skipif(
    not HAS_TRITON, reason="triton is not installed (it is a part of the dev extra on Linux)"
)

# Registers of a thread: a multiprocessor takes three programs of 128 threads with 160. Float64 terms take two registers
# a number.
REGISTERS = {
    "guidance": 160,
    "top_label": 64,
    "top_label_backward": 64,
    "step": 84,
    "x0": 48,
    "tilt": 48,
    "noise": 48,
}
# of the smooth ECE, whose numbers are all float64: two programs of 256 threads with 128; the one that searches has a
# multiprocessor to itself
REGISTERS |= {"weigh": 48, "deposit": 48, "moments": 128, "search": 255, "curve": 128, "gradient": 48}
IN_DOUBLE = ("guidance chi2", "guidance neyman_chi2", "guidance alpha")
# where the assembler, by version and device, buys one more program with a few bytes of what it needs rarely: class
# terms, and rows in several tiles
MAY_SPILL = {"guidance forward_kl", "guidance js", "guidance js half", "guidance hellinger", *IN_DOUBLE}


@pytest.fixture(scope="module", params=[80, 90, 100], ids="sm_{}".format)
def compiled(request, tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("triton")
    result = folder / "result.json"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_offline.py")
    run = subprocess.run(
        [sys.executable, str(script), str(request.param), str(result)], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    return json.loads(result.read_text())


@pytest.mark.parametrize("case", CASES)
def test_registers_suffice_and_little_memory_is_shared(case, compiled):
    found = compiled[case]
    assert found["STACK"] <= (64 if case in MAY_SPILL else 0) and found["LOCAL"] == 0
    assert found["REG"] <= (200 if case in IN_DOUBLE else REGISTERS[case.split()[0]])
    # of which the system keeps 1024; a tile that changes layout is exchanged through it
    assert found["SHARED"] <= 1024 + 8192


@pytest.mark.parametrize("case", CASES)
def test_one_kernel_for_any_batch(case, compiled):
    assert compiled[case]["for any batch"]


@pytest.mark.parametrize("case", [case for case in CASES if case.split()[0] in ("step", "noise", "x0")])
def test_noise_is_compiled_without_fused_multiply_add(case, compiled):
    assert not compiled[case]["fused"]
    assert re.search(r"\b(fma|mad)[.a-z]*\.f32", compiled[case]["ptx"]) is None


def test_rows_of_a_multiple_of_four_logits_are_read_16_bytes_at_a_time(compiled):
    assert "ld.global.v4" in compiled["guidance reverse_kl"]["ptx"]
    assert "st.global.v4" in compiled["guidance reverse_kl"]["ptx"]
    assert "ld.global.v4" in compiled["step ddpm"]["ptx"]
    assert "ld.global.v4" in compiled["top_label"]["ptx"]
    assert "ld.global.v4" in compiled["top_label_backward"]["ptx"]
    assert "st.global.v4" in compiled["top_label_backward"]["ptx"]


def test_terms_of_a_cosine_series_are_side_by_side_in_one_thread(compiled):
    for case in ("moments", "curve"):
        assert "shfl" not in compiled[case]["ptx"] and "shared" not in compiled[case]["ptx"]


@pytest.mark.parametrize("case", ["deposit", "deposit weighted"])
def test_what_is_added_in_any_order_are_integers(case, compiled):
    added = set(re.findall(r"\b(?:red|atom)\.[a-z.]*add(?:\.noftz)?\.([a-z]\d+)", compiled[case]["ptx"]))
    assert added == {"u64"}
