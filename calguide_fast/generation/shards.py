"""Shards: each batch's pixels in a file of its own, and manifests that say which are whole."""

from __future__ import annotations

import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from calguide_fast.generation.atomic import append_line, write_bytes


class DamagedShard(ValueError):
    """A shard's file is not what was written."""


class Shards:
    """The batches that are done, ``shards/000012.npy``: (B, H, W, C) uint8.

    Each process keeps a manifest of its own, ``shards/manifest-0.jsonl`` of rank 0, whose lines give a batch, the
    SHA-256 of its file and of the run's settings, and the seconds that it took. A batch counts once its line is there,
    which is written last; a line that is cut off, or of other settings, counts for nothing. A batch that was redone has
    several lines.

    Args:
        folder: of the run.
        settings_hash: what the lines must agree with.
        rank: whose manifest is written.
    """

    def __init__(self, folder: Path, settings_hash: str, rank: int = 0) -> None:
        self.folder = folder / "shards"
        self.settings_hash = settings_hash
        self.manifest = self.folder / f"manifest-{rank}.jsonl"

    def path(self, batch: int) -> Path:
        return self.folder / f"{batch:06d}.npy"

    def write(self, batch: int, pixels: np.ndarray, seconds: float | None = None) -> None:
        """Write a batch, so that it is there whole, and recorded, or not at all. Raises OSError naming the file.

        `seconds` is how long it took to sample, where that is known.
        """
        buffer = io.BytesIO()
        np.save(buffer, pixels)
        content = buffer.getvalue()
        write_bytes(self.path(batch), content)
        line = {"batch": batch, "sha256": _sha256(content), "settings": self.settings_hash, "seconds": seconds}
        append_line(self.manifest, json.dumps(line))

    def recorded(self) -> dict[int, set[str]]:
        """The checksums on record for each batch."""
        found: dict[int, set[str]] = defaultdict(set)
        for line in self._lines():
            found[line["batch"]].add(line["sha256"])
        return dict(found)

    def seconds(self) -> dict[int, float]:
        """How long each batch took to sample, of those on record where that is known; the slowest time, if redone."""
        found: dict[int, float] = {}
        for line in self._lines():
            # older manifests do not say
            if (seconds := line.get("seconds")) is not None:
                found[line["batch"]] = max(seconds, found.get(line["batch"], 0.0))
        return found

    def read(self, batch: int, checksums: set[str]) -> np.ndarray:
        """A batch's pixels. Raises DamagedShard, naming the file, if they are not what a checksum on record says."""
        path = self.path(batch)
        if not path.exists():
            raise DamagedShard(f"{path} is missing, though it was written")
        content = path.read_bytes()
        if _sha256(content) not in checksums:
            raise DamagedShard(f"{path} is damaged: it has {len(content)} bytes, and not the checksum on record")
        return np.load(io.BytesIO(content))

    def missing(self, num_batches: int, say: Callable[[str], None]) -> list[int]:
        """The batches still to be sampled; those whose files are damaged are among them, and named to `say`."""
        recorded = self.recorded()
        missing = []
        for batch in range(num_batches):
            try:
                if batch in recorded:
                    self.read(batch, recorded[batch])
                    continue
            except DamagedShard as damage:
                say(f"{damage}; its images are sampled again")
            missing.append(batch)
        return missing

    def _lines(self) -> Iterator[dict[str, Any]]:
        """What the manifests say of these settings."""
        for manifest in sorted(self.folder.glob("manifest-*.jsonl")):
            for text in manifest.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:
                    continue  # cut off by a crash, and so is its batch to be redone
                if line["settings"] == self.settings_hash:
                    yield line


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
