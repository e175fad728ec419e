"""Which of the choices that only a GPU can make are to be made otherwise: candidates timed against today's, and a copy.

    python tools/gpu_tune.py [--out FILE.json] [--seconds 200] [--build-only]

The CUDA kernels are compiled anew for every candidate of csrc/cuda/tuning.h, into build/tune (--build-only does that
and no more, and needs no GPU); Triton's take theirs from their modules. Every candidate computes what today's does, or
is refused. FILE.md, beside the JSON, has the tables and says which constant to change.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.machinery
import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "tune"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

TODAY = "today"
# seconds of each candidate at each size
SECONDS = 0.08
# a gain that is worth a change, beyond what today's differs from itself by; and a loss elsewhere that is not
GAIN, LOSS = 0.02, 0.02
# calls that move less are timed as replays of a graph
SMALL = 1 << 26

Choices = Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """Choices that are tried together, at the sizes that they matter for.

    Attributes:
        name: of the table.
        backend: "cuda" or "triton".
        place: the object file of CUDA's kernels that takes the macros, or the module that has Triton's constants.
        targets: names of benchmarks/gpu_targets.py.
        candidates: each a few constants and their values, beside today's.
    """

    name: str
    backend: str
    place: str
    targets: tuple[str, ...]
    candidates: tuple[Choices, ...]


FEW = ("guidance reverse_kl 256x1000", "guidance js 256x1000")
MANY = ("guidance reverse_kl 65536x1000", "guidance js 65536x1000")
LONG = ("guidance reverse_kl 4096x21841", "guidance js 4096x21841")
STEPS = ("guided_step 64x3x128x128, noise drawn", "guided_step 256x3x256x256, noise drawn")

GROUPS = [
    Group(
        "CUDA guidance, rows of 1000",
        "cuda",
        "guidance_float32",
        (*FEW, *MANY),
        (
            {"GUIDE_WARPS": 1},
            {"GUIDE_WARPS": 2},
            {"GUIDE_WARPS": 8},
            {"GUIDE_WARP_BLOCKS": 4},
            {"GUIDE_WARP_BLOCKS": 5},
            {"GUIDE_WARP_CLASSES": 256, "GUIDE_THREADS": 128},
            {"GUIDE_WARP_CLASSES": 256, "GUIDE_THREADS": 256},
        ),
    ),
    Group(
        "CUDA guidance, rows of 21841",
        "cuda",
        "guidance_float32",
        LONG,
        (
            {"GUIDE_THREADS": 512},
            {"GUIDE_THREADS": 512, "GUIDE_BLOCKS": 2},
            {"GUIDE_SHARED_BYTES": 0},
            {"GUIDE_SHARED_BYTES": 0, "GUIDE_BLOCKS": 4},
            {"GUIDE_SHARED_BYTES": 0, "GUIDE_THREADS": 512, "GUIDE_BLOCKS": 2},
        ),
    ),
    Group(
        "CUDA step",
        "cuda",
        "step",
        STEPS,
        (
            {"STEP_THREADS": 128},
            {"STEP_THREADS": 512},
            {"STEP_QUADS": 1},
            {"STEP_QUADS": 2},
            {"STEP_QUADS": 8},
            {"STEP_BLOCKS": 8},
            {"STEP_BLOCKS": 64},
            {"STEP_BLOCKS": 8, "STEP_QUADS": 16},
        ),
    ),
    Group(
        "CUDA smooth ECE",
        "cuda",
        "smooth_ece",
        ("smooth_ece 100000", "smooth_ece 1000000", "smooth_ece 100000000"),
        (
            {"DEPOSIT_THREADS": 512},
            {"DEPOSIT_SHARED_SAMPLES": 0},
            {"DEPOSIT_SHARED_SAMPLES": 1 << 18},
            {"DEPOSIT_SHARED_SAMPLES": 1 << 30},
        ),
    ),
    Group(
        "Triton guidance, rows of 1000",
        "triton",
        "guidance",
        (*FEW, *MANY),
        ({"LEAST_WARPS": 1}, {"LEAST_WARPS": 2}, {"LEAST_WARPS": 8}),
    ),
    Group(
        "Triton guidance, rows of 21841",
        "triton",
        "guidance",
        LONG,
        (
            {"WIDEST": 1024},
            {"WIDEST": 4096},
            {"WIDEST": 4096, "MOST_WARPS": 16},
            {"WIDEST": 8192, "MOST_WARPS": 16},
            {"MOST_WARPS": 4},
            {"STAGES": 2},
            {"STAGES": 4},
        ),
    ),
    Group(
        "Triton step",
        "triton",
        "step",
        STEPS,
        ({"TILE": 512}, {"TILE": 2048}, {"TILE": 2048, "WARPS": 8}, {"TILE": 512, "WARPS": 2}),
    ),
    Group(
        "Triton smooth ECE",
        "triton",
        "smooth_ece",
        ("smooth_ece 1000000", "smooth_ece 100000000"),
        ({"SHARED_OUT": 256}, {"SHARED_OUT": 512}, {"_PROGRAMS": 1056}, {"_PROGRAMS": 4224}),
    ),
]


def title(choices: Choices) -> str:
    return ", ".join(f"{name} = {value}" for name, value in choices.items()) or TODAY


def in_group(group: Group) -> list[Choices]:
    """Today's, the candidates, and today's again: what these two differ by is noise."""
    return [{}, *group.candidates, {}]


# compiling


def setup_script() -> ModuleType:
    """setup.py as a module, which knows how the kernels are compiled."""
    spec = importlib.util.spec_from_file_location("calguide_fast_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # its dataclass looks its own module up by name
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def sources_digest() -> bytes:
    files = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cpp", ".h"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).digest()


def made(command: Sequence[str], suffix: str, digest: bytes) -> Path:
    """What the command makes, named after the command and the sources; not made again if it is there."""
    target = BUILD / f"{hashlib.sha256(shlex.join(command).encode() + digest).hexdigest()[:24]}{suffix}"
    if not target.exists():
        unfinished = target.with_name(f"{target.name}.{os.getpid()}.unfinished")
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")
        os.replace(unfinished, target)
    return target


def modules(groups: Sequence[Group]) -> dict[tuple[str, str], Path]:
    """(object file, candidate) to the extension module `_cuda` with that candidate's constants."""
    BUILD.mkdir(parents=True, exist_ok=True)
    native = setup_script().cuda_module()
    assert native is not None, "CALGUIDE_FORCE_CUDA makes it an error that there is none"
    digest = sources_digest()
    commands = {name: [*command, "-c", str(source)] for source, name, command in native.objects}
    wanted = {(group.place, title(choices)): choices for group in groups for choices in in_group(group)}
    changed = {
        (place, name): [*commands[f"{place}.o"], *(f"-DCALGUIDE_{macro}={value}" for macro, value in choices.items())]
        for (place, name), choices in wanted.items()
    }
    # the longest first; today's are among all of them once
    every = {shlex.join(command): command for command in (*changed.values(), *commands.values())}
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = dict(zip(every, pool.map(lambda command: made(command, ".o", digest), every.values())))

    def linked(place: str, name: str) -> Path:
        own = {f"{place}.o": changed[place, name]}
        parts = [str(objects[shlex.join(command)]) for command in (commands | own).values()]
        return made([*native.link, *parts], ".so", digest)

    return {key: linked(*key) for key in changed}


def loaded(path: Path) -> ModuleType:
    """The extension module `_cuda` from a file, beside others of them."""
    # pybind11 gives out one module for each full name
    name = f"calguide_{path.stem}._cuda"
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


# timing


@contextmanager
def constants(module: Any, choices: Choices) -> Iterator[None]:
    """The module with other values of its constants."""
    before = {name: getattr(module, name) for name in choices}
    for name, value in choices.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def calls_of(group: Group, call: Callable[..., Any], built: Mapping[tuple[str, str], Path]) -> list[Callable[..., Any]]:
    """The op with each candidate of the group in turn."""
    from calguide_fast import use_backend

    if group.backend == "cuda":
        from calguide_fast.backends import cuda

        kernels: Any = cuda._kernels
        changes = [(kernels, {"native": loaded(built[group.place, title(c)])}) for c in in_group(group)]
    else:
        module = importlib.import_module(f"calguide_fast.backends.triton.{group.place}")
        changes = [(module, choices) for choices in in_group(group)]

    def changed(where: Any, choices: Choices) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            with constants(where, choices), use_backend(group.backend):
                return call(*inputs)

        return run

    return [changed(*change) for change in changes]


def same(found: Any, wanted: Any) -> bool:
    """Whether two results of an op are one to rounding; NaN is not."""
    import torch

    pairs = [(found, wanted)] if isinstance(found, torch.Tensor) else list(zip(found, wanted))
    return all(bool(torch.isclose(one, other, rtol=1e-4, atol=1e-5).all()) for one, other in pairs)


def timed(group: Group, target: Any, built: Mapping[tuple[str, str], Path], device: Any) -> list[dict[str, Any]]:
    """A row for each candidate: its microseconds, its share of a copy's bandwidth, or why it has none."""
    import torch
    from ceiling import bandwidth
    from timing import clock_of, interleaved

    clock = clock_of(device)
    inputs = target.inputs(device)
    copies = clock.copies(inputs)
    small = target.traffic < SMALL
    rows: list[dict[str, Any]] = []
    going, calls = [], []
    wanted: Any = None
    for choices, call in zip(in_group(group), calls_of(group, target.call, built)):
        row: dict[str, Any] = {"candidate": title(choices)}
        rows.append(row)
        try:
            found = call(*inputs)
            # what the op returns may be a buffer of the inputs
            found = tuple(each.clone() for each in ((found,) if isinstance(found, torch.Tensor) else found))
            wanted = found if wanted is None else wanted
            if not same(found, wanted):
                row["reason"] = "another result than today's"
                continue
            calls.append(clock.replay(call, copies) if small else call)
            going.append(row)
        except Exception as error:
            # a candidate may be beyond what the device has, which is an answer
            row["reason"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    del wanted
    if not calls:
        return rows
    inputs_of = [[()] if small else copies] * len(calls)
    calls_in_one = len(copies) if small else 1
    copying = bandwidth(target.traffic, device)
    for row, seconds in zip(going, interleaved(clock, calls, inputs_of, SECONDS)):
        each = seconds / calls_in_one
        row |= {"us": each * 1e6, "share": target.traffic / each / copying if copying else None}
    return rows


# judging


def judged(group: Group, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The group's candidates, best first, and what to do.

    Args:
        group: whose.
        found: target to the rows of `timed`, in the order of `in_group`.
    """
    names = [title(choices) for choices in in_group(group)]
    noise = max((abs(math.log(rows[0]["us"] / rows[-1]["us"])) for rows in found.values()), default=0.0)
    ranked = []
    for index, name in enumerate(names[:-1]):
        rows = {target: rows[index] for target, rows in found.items()}
        entry: dict[str, Any] = {"candidate": name, "targets": rows}
        if all("us" in row for row in rows.values()) and rows:
            # against the mean of today's two runs
            gains = [
                math.log(math.sqrt(found[target][0]["us"] * found[target][-1]["us"]) / row["us"])
                for target, row in rows.items()
            ]
            entry |= {"gain": math.exp(sum(gains) / len(gains)) - 1, "worst": math.exp(min(gains)) - 1}
        ranked.append(entry)
    ranked.sort(key=lambda entry: entry.get("gain", -math.inf), reverse=True)
    return {
        "group": group.name,
        "backend": group.backend,
        "noise": noise,
        "ranked": ranked,
        "advice": advice(group, ranked, noise),
    }


def where(group: Group) -> str:
    return "csrc/cuda/tuning.h" if group.backend == "cuda" else f"calguide_fast/backends/triton/{group.place}.py"


def advice(group: Group, ranked: Sequence[Mapping[str, Any]], noise: float) -> str:
    """One sentence: which constants to change where, or that none is."""
    good = [e for e in ranked if e["candidate"] != TODAY and e.get("gain", -1.0) > GAIN + noise]
    if not good:
        return f"Keep today's: nothing gains more than {GAIN + noise:.1%}."
    best = next((e for e in good if e["worst"] > -LOSS - noise), None)
    if best is None:
        first = good[0]
        return (
            f"{first['candidate']} gains {first['gain']:+.1%}, but {first['worst']:+.1%} at one size: choose by size."
        )
    gains = f"{best['gain']:+.1%} on average, {best['worst']:+.1%} at least"
    return f"In {where(group)}, set {best['candidate']}: {gains}."


def page(results: Mapping[str, Any]) -> str:
    """The tables and the advice as Markdown."""
    lines = ["# Tuning", "", f"{results['device']}, torch {results['torch']}. µs a call, and share of a copy.", ""]
    lines += [f"- {entry['group']}: {entry['advice']}" for entry in results["groups"]]
    lines += [f"- {name}: not measured, no time was left." for name in results["left_out"]]
    for entry in results["groups"]:
        targets = list(entry["ranked"][0]["targets"])
        lines += ["", f"## {entry['group']}", "", f"Today's differs from itself by {entry['noise']:.1%} at most.", ""]
        lines += ["| | gain | " + " | ".join(targets) + " |", "|---|---|" + "---|" * len(targets)]
        for each in entry["ranked"]:
            gain = f"{each['gain']:+.1%}" if "gain" in each else "–"
            lines.append(f"| {each['candidate']} | {gain} | " + " | ".join(map(cell, each["targets"].values())) + " |")
    return "\n".join(lines) + "\n"


def cell(row: Mapping[str, Any]) -> str:
    if "us" not in row:
        return row["reason"].replace("|", "/")
    return f"{row['us']:.4g}" + (f" ({row['share']:.0%})" if row["share"] else "")


def write(path: Path, results: Mapping[str, Any]) -> None:
    for target, text in (
        (path, json.dumps(results, indent=1, ensure_ascii=False) + "\n"),
        (path.with_suffix(".md"), page(results)),
    ):
        unfinished = target.with_name(f"{target.name}.unfinished")
        unfinished.write_text(text)
        os.replace(unfinished, target)


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu-tune.json", help="default: out/gpu-tune.json")
    parser.add_argument(
        "--seconds", type=float, default=200, help="begin no group later than this (default: %(default)s)"
    )
    parser.add_argument("--build-only", action="store_true", help="compile the candidates for sm_90, and no more")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    start = time.monotonic()
    import torch

    if not options.build_only and not torch.cuda.is_available():
        print("gpu-tune: no CUDA device is present, and all that is timed here needs one", file=sys.stderr)
        return 2
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    os.environ.setdefault("CALGUIDE_CUDA_ARCHS", "".join(map(str, capability)))
    os.environ["CALGUIDE_FORCE_CUDA"] = "1"
    built = modules([group for group in GROUPS if group.backend == "cuda"])
    print(f"gpu-tune: {len(built)} modules are built, {time.monotonic() - start:.0f} s", flush=True)
    if options.build_only:
        return 0

    from gpu_targets import TARGETS

    targets = {target.name: target for target in TARGETS}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    results |= {"groups": [], "left_out": [group.name for group in GROUPS]}
    for group in GROUPS:
        if time.monotonic() - start > options.seconds:
            break
        found = {}
        for name in group.targets:
            rows = timed(group, targets[name], built, torch.device("cuda", 0))
            # without today's there is nothing to compare with
            if "us" in rows[0] and "us" in rows[-1]:
                found[name] = rows
            else:
                print(f"gpu-tune: {group.name}: {name}: {rows[0].get('reason', rows[-1].get('reason'))}", flush=True)
            torch.cuda.empty_cache()
        results["left_out"].remove(group.name)
        if found:
            results["groups"].append(judged(group, found))
            print(
                f"gpu-tune: {group.name}: {results['groups'][-1]['advice']} {time.monotonic() - start:.0f} s",
                flush=True,
            )
        write(options.out, results)
    print(f"gpu-tune: written to {options.out} and {options.out.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
