"""The Python of the README and of the pages beside it runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{block.strip().splitlines()[-1][:40]}")
    for page in PAGES
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
]
# needs published weights of hundreds of megabytes: it is compiled and its imports are run, no more
NEEDS_CHECKPOINTS = "128x128_diffusion.pt"


def test_there_is_something_to_run():
    blocks = [parameters.values[0] for parameters in BLOCKS]
    assert sum(NEEDS_CHECKPOINTS in block for block in blocks) == 1 and len(blocks) >= 8


@pytest.mark.parametrize("block", BLOCKS)
def test_python(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compile(block, "page", "exec")
    if NEEDS_CHECKPOINTS in block:
        block = "\n".join(line for line in block.splitlines() if re.match(r"(from|import) ", line))
    exec(block, {})
    for picture in re.findall(r'"(\w+\.png)"', block):
        assert (tmp_path / picture).stat().st_size > 1000
