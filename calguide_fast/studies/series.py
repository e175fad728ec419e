"""Point after point: sampled, measured, and kept; what is finished is not done again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from calguide_fast.generation.atomic import write_bytes
from calguide_fast.generation.commands import sample
from calguide_fast.generation.folder import CONFIG, read_config
from calguide_fast.generation.job import Job
from calguide_fast.generation.settings import Settings, differences, settings_hash
from calguide_fast.generation.team import Team
from calguide_fast.generation.together import say
from calguide_fast.studies.measure import Measure

FIGURES = "figures.json"
HOW_TO_GO_ON = "the same command goes on where this one stopped"


@dataclass(frozen=True)
class Point:
    """One job of a study.

    Attributes:
        name: of its folder, which the hash of its settings follows.
        columns: what is said of it in tables.
        job: what is sampled.
    """

    name: str
    columns: Mapping[str, Any]
    job: Job

    def folder(self, out: Path, settings: Settings) -> Path:
        """Where it lies: another folder for other settings, so that a study can be widened."""
        return out / "points" / f"{self.name}-{settings_hash(settings)[:8]}"


def run_series(
    points: Sequence[Point],
    out: Path,
    make_measure: Callable[[], Measure],
    team: Team,
    report: Callable[[Measure, list[dict[str, Any]]], None],
) -> None:
    """Do this process's share of all points, one after the other.

    Args:
        points: of different names.
        out: folder of the study; each point has one of its own in it, as ``sample`` makes them.
        make_measure: gives what measures; called on rank 0 alone, while the others wait, and load no judge.
        team: the processes that share each point's batches.
        report: called on rank 0 after each point, with what measures, and a row for each one so far: its
            columns, folder and figures.

    Raises:
        Interrupted, TeammateFailed, OSError, ValueError, TypeError, ImportError: as ``sample`` and `Measure`.
    """
    names = [point.name for point in points]
    if names != team.from_first("points", lambda: names):
        raise ValueError("this process has other points than rank 0: give all processes the same options")
    measure = None
    if team.rank == 0:
        measure = make_measure()
        measure.check()
    rows: list[dict[str, Any]] = []
    for number, point in enumerate(points, 1):
        team.check()
        part = team.part(str(number))
        settings = part.from_first("point", point.job.settings)
        folder = point.folder(out, settings)
        if not part.from_first("sampled", partial(_is_sampled, folder, settings)):
            if team.rank == 0:
                say(f"{point.name}, point {number} of {len(points)}")
            sample(point.job, folder, True, part, HOW_TO_GO_ON)
        if measure is not None:
            found = _figures(folder, settings, measure)
            rows.append({**point.columns, "folder": str(folder.relative_to(out)), **found["figures"]})
            report(measure, rows)


def _is_sampled(folder: Path, settings: Settings) -> bool:
    return samples_in(folder, settings) is not None


def samples_in(folder: Path, settings: Settings) -> Path | None:
    """The .npz file of a folder where all is sampled, by these settings; shards are not asked for."""
    found = sorted(folder.glob("samples_*.npz"))
    if not found or not (folder / CONFIG).is_file():
        return None
    return found[0] if read_config(folder)["settings_sha256"] == settings_hash(settings) else None


def _figures(folder: Path, settings: Settings, measure: Measure) -> dict[str, Any]:
    """What was measured of these samples in the same way before; or is now, and is written."""
    path = folder / FIGURES
    asked: dict[str, Any] = {"settings_sha256": settings_hash(settings), "measured_with": dict(measure.settings)}
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if {name: kept[name] for name in asked} == asked:
            return kept
        if changed := differences(kept["measured_with"], asked["measured_with"]):
            say(f"{folder.name} was measured otherwise, and is measured again: {'; '.join(changed)}")
    samples = samples_in(folder, settings)
    assert samples is not None  # written before
    found = {**asked, **measure(samples)}
    for doubt in found.get("warnings", ()):
        say(f"{folder.name}: {doubt}")
    write_bytes(path, json.dumps(found, indent=2).encode() + b"\n")
    return found
