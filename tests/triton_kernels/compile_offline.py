"""Compiles every kind of Triton kernel for a GPU that is not there, by the calls that would launch it.

Run in a process of its own, without the interpreter: python compile_offline.py CAPABILITY RESULT.json
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from calguide_fast.backends import triton as backend
from calguide_fast.schedule import Schedule

ROW = Schedule.linear().respaced("25").coefficients()[12]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class AbsentDevice:
    """As much of a driver as the compiler asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def guidance(divergence, dtype, classes, batch=3, adaptive=False, transposed=False):
    logits = torch.zeros(batch, classes, dtype=dtype)
    if transposed:
        logits = torch.zeros(classes, 256, dtype=dtype)[:, :batch].t()
    labels = torch.zeros(batch, dtype=torch.int64)
    backend.guidance_gradient(logits, labels, divergence, 1.5, 1.0, 0.9, 1.0, 0.5, 0.2, adaptive, None)


def top_label(dtype, classes, batch=3):
    backend.top_label(torch.zeros(batch, classes, dtype=dtype), torch.zeros(batch, dtype=torch.int64))


def top_label_backward(dtype, classes, batch=3):
    row = torch.zeros(batch)
    backend.top_label_backward(row, torch.zeros(batch, classes, dtype=dtype), row, row.long())


def step(method, learned, dtype, seeded, batch=3, side=32, tilted=False, boosted=False, guided=True, last=False):
    x_t = torch.zeros(batch, 3, side, side)
    output = torch.zeros(batch, 6 if learned else 3, side, side, dtype=dtype)
    if last:
        output = output.contiguous(memory_format=torch.channels_last)
    scores = torch.zeros(batch) if tilted else None
    seeds, noise = (torch.arange(batch), None) if seeded else (None, x_t)
    backend.guided_step(
        x_t, output, ROW, x_t.to(dtype) if guided else None, scores, scores, noise, seeds,
        torch.zeros(batch) if boosted else None, method, learned, 1.5, 0.3, 2.0, False, 0.3, True, x_t,
    )  # fmt: skip


def x0(dtype, last, batch=3):
    x_t = torch.zeros(batch, 3, 32, 32)
    layout = torch.channels_last if last else torch.contiguous_format
    out = torch.empty_like(x_t, dtype=dtype, memory_format=layout)
    backend.predict_x0(x_t, torch.zeros(batch, 6, 32, 32, dtype=dtype), ROW, True, out)


def smooth_ece(kernel, weighted=False, dtype=F32, batch=3):
    """Launches them all; the one named is looked at."""
    confidence = torch.zeros(batch)
    correct, weights = confidence > 0.5, confidence if weighted else None
    value, _, curve = backend.smooth_ece(confidence, correct, weights, 0.0, True)
    backend.smooth_ece_gradient(confidence.to(dtype), correct, weights, curve, value)
    return kernel


# every pair of family (KL, float terms, double terms), dtype and row size (shared tile, one tile, several)
CASES = {
    "guidance none transposed": (guidance, (0, F32, 1000), {"adaptive": True, "transposed": True}),
    "guidance reverse_kl": (guidance, (1, F32, 1000), {}),
    "guidance forward_kl": (guidance, (2, BF16, 21843), {"adaptive": True}),
    "guidance jeffreys": (guidance, (4, F16, 10), {}),
    "guidance js": (guidance, (3, F32, 21843), {}),
    "guidance js half": (guidance, (3, F16, 1000), {"adaptive": True}),
    "guidance hellinger": (guidance, (5, BF16, 10), {}),
    "guidance chi2": (guidance, (6, F32, 10), {}),
    "guidance neyman_chi2": (guidance, (7, BF16, 1000), {"adaptive": True}),
    "guidance alpha": (guidance, (8, F16, 21843), {}),
    "step ddpm": (step, (0, True, F32, True), {"boosted": True}),
    "step ddpm channels last": (step, (0, True, BF16, True), {"tilted": True, "last": True}),
    "step ddpm fixed": (step, (0, False, F16, False), {"tilted": True, "boosted": True}),
    "step ddim": (step, (1, True, BF16, True), {}),
    "step ddim plain": (step, (1, False, F32, False), {"guided": False}),
    "x0": (x0, (F32, False), {}),
    "x0 channels last": (x0, (BF16, True), {}),
    "top_label": (top_label, (F32, 1000), {}),
    "top_label several tiles": (top_label, (BF16, 21843), {}),
    "top_label shared tile": (top_label, (F16, 10), {}),
    "top_label_backward": (top_label_backward, (F32, 1000), {}),
    "top_label_backward several tiles": (top_label_backward, (BF16, 21843), {}),
    "top_label_backward shared tile": (top_label_backward, (F16, 10), {}),
    "tilt": (lambda batch=3: backend.tilt_weights(torch.zeros(batch), 0.3, False, 2.0), (), {}),
    "noise": (lambda batch=3: backend.philox_normal(torch.arange(batch), (3, 32, 32), 5, 0), (), {}),
    "weigh": (smooth_ece, ("_weigh_kernel",), {"weighted": True}),
    "deposit": (smooth_ece, ("_deposit_kernel",), {}),
    "deposit weighted": (smooth_ece, ("_deposit_kernel",), {"weighted": True}),
    "moments": (smooth_ece, ("_moments_kernel",), {}),
    "search": (smooth_ece, ("search_kernel",), {}),
    "curve": (smooth_ece, ("_curve_kernel",), {}),
    "gradient": (smooth_ece, ("_gradient_kernel",), {}),
    "gradient weighted": (smooth_ece, ("_gradient_kernel",), {"weighted": True}),
    "gradient half": (smooth_ece, ("_gradient_kernel",), {"dtype": BF16}),
}


def resources(kernel) -> dict[str, int]:
    """Registers, and bytes of stack, local and shared memory, of the machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", told.stdout)}


def main(capability: int, result: Path) -> None:
    driver.set_active(AbsentDevice(capability))
    compiled = []
    run = JITFunction.run

    def compile_only(self, *arguments, warmup, **options):
        compiled.append(run(self, *arguments, warmup=True, **options))

    JITFunction.run = compile_only
    found = {}

    def called(call, arguments, options):
        """The kernel that a case names, or the only one that it launches."""
        compiled.clear()
        name = call(*arguments, **options)
        return next(kernel for kernel in compiled if not isinstance(name, str) or kernel.name == name)

    for name, (call, arguments, options) in CASES.items():
        kernel = called(call, arguments, options)
        # a multiple of 16, which compilers like to know of
        again = called(call, arguments, {**options, "batch": 64})
        found[name] = {
            **resources(kernel),
            "ptx": kernel.asm["ptx"],
            "fused": kernel.metadata.enable_fp_fusion,
            "for any batch": again is kernel,
        }
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
