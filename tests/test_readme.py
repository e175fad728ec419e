"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
# needs published weights of hundreds of megabytes: it is compiled and its imports are run, no more
NEEDS_CHECKPOINTS = "128x128_diffusion.pt"


def test_there_is_something_to_run():
    assert sum(NEEDS_CHECKPOINTS in block for block in BLOCKS) == 1 and len(BLOCKS) >= 3


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1][:40])
def test_readme_python(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compile(block, "README.md", "exec")
    if NEEDS_CHECKPOINTS in block:
        block = "\n".join(line for line in block.splitlines() if re.match(r"(from|import) ", line))
    exec(block, {})
    if 'save_grid("digits.png"' in block:
        assert (tmp_path / "digits.png").stat().st_size > 1000
