"""Faults planted in a copy of the CUDA sources must be caught by the cases and schedules of the emulation.

All are compiled at once: the copy asks a variable which of them is alive, and each is tried in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulation import build

# name: (file, source with the part in «» that is replaced, its replacement); a part that ends in ; is a statement
MUTATIONS = {
    "no barrier after the warps' sums are written": (
        "group.h",
        "scratch[rank() / warp_size * N + i] = values[i];\n    }\n    «__syncthreads();»",
        ";",
    ),
    "no barrier before sums are written anew": (
        "group.h",
        "// the next use may not overwrite what another warp still reads\n    «__syncthreads();»",
        ";",
    ),
    "no barrier before votes are written anew": ("group.h", "«__syncthreads();»\n    return condition;", ";"),
    "no barrier before maxima are written anew": (
        "group.h",
        "«__syncthreads();»\n    return value;",
        ";",
    ),
    "sums of warps at swapped indices": (
        "group.h",
        "scratch[«rank() / warp_size * N + i»] = values[i];",
        "rank() / warp_size + i * warps",
    ),
    "half of a warp's sum": (
        "group.h",
        "values[i] += __shfl_xor_sync(all_lanes, values[i], «distance»);",
        "distance / 2",
    ),
    "the last warp left out": (
        "group.h",
        "for (int warp = 0; «warp < warps»; ++warp) values[i] += scratch[warp * N + i];",
        "warp < warps - 1",
    ),
    "a maximum that is the first warp's": (
        "group.h",
        "value = «other > value» ? other : value;\n    }\n",
        "false",
    ),
    "no barrier before a scan is written anew": (
        "group.h",
        "lanes_before);\n    «__syncthreads();»\n    return scan;",
        ";",
    ),
    "a prefix that counts a thread itself": (
        "group.h",
        "const int lanes_before = «__shfl_up_sync(all_lanes, value, 1)»;",
        "value",
    ),
    "a prefix without the warps before": (
        "group.h",
        "if («warp == rank() / warp_size») scan.before = scan.all;",
        "warp == 0",
    ),
    "bins not cleared": ("smooth_ece_deposit.h", "node += step) «scratch->nodes[node] = 0;»", ";"),
    "weights of the first blocks only": (
        "smooth_ece_deposit.h",
        "double total[1] = {«group.rank() < parts» ? scratch",
        "group.rank() < parts - 1",
    ),
    "no barrier after a block's bins are cleared": (
        "smooth_ece_deposit.h",
        "low[i] = 0;\n    «__syncthreads();»",
        ";",
    ),
    "no barrier before a block's bins are emptied": (
        "smooth_ece_deposit.h",
        "void finish() const {\n    «__syncthreads();»\n    for",
        ";",
    ),
    "a carry lost": ("smooth_ece_deposit.h", "(«before + added < before» ? 1u : 0u)", "false"),
    "a node beyond 0 dropped": (
        "smooth_ece_deposit.h",
        "if («sums[node] != 0») table.add",
        "sums[node] != 0 && (node > 0 || bin > 0)",
    ),
    "a node beyond 1 dropped": (
        "smooth_ece_deposit.h",
        "if («sums[node] != 0») table.add",
        "sums[node] != 0 && (node < 3 || bin + 2 <= deposit_bins)",
    ),
    "a thread's last samples forgotten": (
        "smooth_ece_deposit.h",
        "  }\n  «run.finish();»\n  if (!allowed)",
        ";",
    ),
    "samples counted again with the next bin": ("smooth_ece_deposit.h", "«sums[node] = 0;»", ";"),
    "the node at 1 left out": (
        "smooth_ece_search.h",
        "column == 0 ? «moment_rows» : moment_rows - 1;",
        "moment_rows - 1",
    ),
    "no conjugate in the second half of a period": (
        "smooth_ece_search.h",
        "row[column][0], «conjugate» ? -row",
        "false",
    ),
    "no barrier before moments are read": (
        "smooth_ece_search.h",
        "known = terms > known ? terms : known;\n    «__syncthreads();»",
        ";",
    ),
    "no barrier before the series is read": (
        "smooth_ece_search.h",
        "* scratch->moments[k];\n    «__syncthreads();»",
        ";",
    ),
    "no barrier before neighbours on the grid are read": (
        "smooth_ece_search.h",
        "cosine_series(series, terms, g * step);\n    }\n    «__syncthreads();»",
        ";",
    ),
    "no barrier before brackets are read": ("smooth_ece_search.h", "++change;\n    });\n    «__syncthreads();»", ";"),
    "no barrier before roots are read": (
        "smooth_ece_search.h",
        "polish(terms, changes.count);\n    «__syncthreads();»",
        ";",
    ),
    "dips through 0 unseen": ("smooth_ece_search.h", "if («g > 0 && g < intervals» && dips(", "false"),
    "a vertex on the wrong side": ("smooth_ece_search.h", "(«from_middle < 0.0» ? 1 : 0)", "from_middle > 0.0"),
    "unpolished roots": ("smooth_ece_search.h", "for (int step = 0; «step < 20» && moved", "false"),
    "the gradient at a fixed bandwidth": (
        "smooth_ece_search.h",
        "slope = «bandwidth == 0.0 && sigma > least_bandwidth» ? at.slope",
        "false",
    ),
    "the last end of a cell left out": ("smooth_ece_gradient.h", "if («node > cells») return;", "node >= cells"),
    "a gradient of the value alone": (
        "smooth_ece_gradient.h",
        "curve[curve_factor] * «*static_cast<const Real*>(a.value_grad)»;",
        "1.0",
    ),
    "cells of one end": ("smooth_ece_gradient.h", "right = scratch->nodes[«cell + 1»];", "cell"),
    "no barrier before an image's scalars are read": (
        "step.cu",
        "share.part() == 0);\n  }\n  «__syncthreads();»",
        ";",
    ),
    "no barrier before a step's row is read": (
        "step.cu",
        "if (threadIdx.x == 0) *step = step_row(a.coefficients);\n  «__syncthreads();»",
        ";",
    ),
    "an element beyond the end of an image": ("step.cu", "if («j < quad.count») body(j,", "j <= quad.count"),
    "an element short at the end of an image": ("step.cu", "if («j < quad.count») body(j,", "j < quad.count - 1"),
    "channels run into each other": (
        "step.cu",
        "quad.together = quad.count == 4 && «quad.pixel + 4 <= a.pixels»",
        "true",
    ),
    "any address taken for aligned": (
        "step.cu",
        "const bool aligned = «reinterpret_cast<uintptr_t>(at) % (4 * sizeof(T)) == 0»;",
        "true",
    ),
    "every image draws the first one's noise": ("step.cu", "static_cast<uint64_t>(«a.seeds[image]»)", "a.seeds[0]"),
    "quads of an image's blocks overlap": (
        "step.cu",
        "const int64_t step = «static_cast<int64_t>(blocks_an_image) * step_threads»;",
        "blocks_an_image * step_threads - 1",
    ),
    "scores counted twice": (
        "tilt_kernels.h",
        "double total[1] = {0.0};\n  for (int64_t b = group.rank(); b < a.count; «b += Group::size»)",
        "b += Group::size - 1",
    ),
    "a logit read beyond the row": (
        "rows.h",
        "if («within<Index>(first + j, classes)») x[j] = probed(",
        "within<Index>(first + j, classes + 1)",
    ),
    "a gradient written beyond the row": (
        "rows.h",
        "if («within<Index>(first + j, classes)») store_float(",
        "within<Index>(first + j, classes + 1)",
    ),
    "the last chunk of a row left out": (
        "rows.h",
        "const Pack<float>* from = own;\n    for (int64_t first = begin; «first < classes»; first += step)",
        "first + chunk<T> < classes",
    ),
    "every thread's chunks in the same place": (
        "rows.h",
        "own(reinterpret_cast<Pack<float>*>(shared) + «group.rank()»)",
        "0",
    ),
    "a NaN logit unseen": ("rows.h", "return «fabsf(probe) < INFINITY»;", "!(fabsf(probe) >= INFINITY)"),
    "a masked logit taken for a tame one": ("rows.h", "return «fabsf(probe) < INFINITY»;", "probe < INFINITY"),
    "the label's gradient like the others'": (
        "guidance_kernels.h",
        "if («row.holds(static_cast<Index>(start.y))») {",
        "false",
    ),
    "two peaks": ("guidance_kernels.h", "return «e > static_cast<Real>(0.5)»;", "e > static_cast<Real>(0.01)"),
    "a NaN logit taken for a masked one": (
        "guidance_kernels.h",
        "census[1] += «x[j] < INFINITY» ? 0.0f : 1.0f;",
        "x[j] != INFINITY",
    ),
    "absent classes in the sum of distances": (
        "guidance_kernels.h",
        "sum_d += d * («present(x[j], d)» ? Real(1) : Real(0));",
        "true",
    ),
    "statistics of the wrong row": (
        "guidance_kernels.h",
        "arguments.stats, arguments.batch, «start.b»);",
        "arguments.batch - 1 - start.b",
    ),
    "the last of a thread's equal largest logits": (
        "top_label.cu",
        "if («!found» && x[j] == seen) own_top",
        "true",
    ),
    "any thread's top class": (
        "top_label.cu",
        "-group.max(«own_max == max ? -static_cast<double>(own_top) : -INFINITY»)",
        "-static_cast<double>(own_top)",
    ),
    "no origin where all is masked": ("top_label.cu", "return «max > absent ? max : 0.0f»;", "max"),
    "a sum left at an earlier largest logit": (
        "top_label.cu",
        "«own_sum *= exp2_product(own_max - seen, log2_e);»",
        ";",
    ),
    "a sum left at a thread's largest logit": (
        "top_label.cu",
        "{«own_sum * exp2_product(own_max - origin(max), log2_e)»}",
        "own_sum",
    ),
    "a masked row taken for a certain one": ("top_label.cu", "valid = «sum[0] > 0.0» &&", "true"),
    "the top class pulled like the others": ("top_label.cu", "g[j] = «j == own» ?", "false"),
    "every row with the first one's gradient": ("top_label.cu", "a.grad_confidence[«b» * a.grad_stride]", "0"),
    "a block's groups all in one row": ("top_label.cu", "* blockDim.y + «threadIdx.y»;", "0"),
}


def planted(text: str, mutations: dict[int, tuple[str, str]]) -> str:
    """The source with every part and its replacements in it, of which mutant `number` brings its own to life."""
    replacements: dict[tuple[int, int], dict[int, str]] = {}
    for number, (snippet, replacement) in mutations.items():
        before, original, after = re.split("[«»]", snippet)
        pattern = before + original + after
        found = text.count(pattern)
        assert found == 1, f"the sources have {found} places, not one, to plant this in; choose it anew: {pattern!r}"
        start = text.index(pattern) + len(before)
        replacements.setdefault((start, start + len(original)), {})[number] = replacement
    for (start, end), choices in sorted(replacements.items(), reverse=True):
        planted = text[start:end]
        for number, replacement in choices.items():
            if planted.endswith(("}", ";")):
                planted = f"if (calguide_mutant == {number}) {{ {replacement} }} else {{ {planted} }}"
            else:
                planted = f"(calguide_mutant == {number} ? ({replacement}) : ({planted}))"
        text = text[:start] + planted + text[end:]
    return text


def plant(csrc: Path) -> None:
    """Plant every mutation in the sources."""
    by_file: dict[str, dict[int, tuple[str, str]]] = {}
    for number, (file, *mutation) in enumerate(MUTATIONS.values(), 1):
        by_file.setdefault(file, {})[number] = tuple(mutation)
    for file, mutations in by_file.items():
        source = csrc / "cuda" / file
        declaration = 'extern "C" __attribute__((visibility("default"))) int calguide_mutant;\n'
        source.write_text(declaration + planted(source.read_text(), mutations))
    definition = 'extern "C" {\n__attribute__((visibility("default"))) int calguide_mutant = 0;\n}\n'
    (csrc / "cuda" / "mutant.cpp").write_text(definition)


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory) -> dict[str, str]:
    csrc = tmp_path_factory.mktemp("mutants") / "csrc"
    shutil.copytree(build.CSRC, csrc)
    plant(csrc)
    tests = Path(build.__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    # a file is named after the op whose cases find its faults the soonest
    first = [file.split(".")[0].removesuffix("_kernels") for file, *_ in MUTATIONS.values()]
    first = ["smooth ECE" if op.startswith("smooth_ece") else op for op in first]
    command = [sys.executable, "-m", "emulation.verdicts", str(build.cuda_module(csrc)), "", *first]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert result.returncode == 0, result.stderr
    return dict(zip(["none", *MUTATIONS], json.loads(result.stdout), strict=True))


def test_without_a_fault_nothing_is_caught(verdicts):
    assert verdicts["none"] == ""


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_is_caught(name, verdicts):
    assert verdicts[name], f"nobody noticed: {name}"
