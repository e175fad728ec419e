"""The pages' commands are ones that the command line takes, and their links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from calguide_fast.cli import _parser
from calguide_fast.generation import options

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# what a page leaves out, the variable of one of its blocks, and what stands for a command of the command line
LEFT_OUT = {"…": "", "...": ""}
PROGRAM = re.compile(r"^(?:torchrun .*?-m calguide_fast|calguide-fast) (.*)$")
NEEDED = {"sample": ["--preset", "digits", "--out", "o"], "reproduce": ["--weights", "w", "--reference", "r"]}


def commands(text: str, languages: str) -> list[list[str]]:
    """The arguments of each command in a text's blocks, or, without languages, in all its lines."""
    blocks = re.findall(rf"```(?:{languages})\n(.*?)```", text, flags=re.DOTALL) if languages else [text]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    variables = dict(match.groups() for line in lines if (match := re.match(r'(\w+)="(.*)"$', line)))
    found = []
    for line in lines:
        if match := PROGRAM.match(line.strip()):
            arguments = match[1]
            for name, value in {**{f"${name}": value for name, value in variables.items()}, **LEFT_OUT}.items():
                arguments = arguments.replace(name, value)
            found.append(shlex.split(arguments, comments=True))
    return found


COMMANDS = [arguments for page in PAGES for arguments in commands(page.read_text(encoding="utf-8"), "console")]
COMMANDS += commands(options.EPILOG, "")


def test_there_are_commands():
    assert {"sample", "sweep", "reproduce", "evaluate"} <= {arguments[0] for arguments in COMMANDS}
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_commands_are_taken(arguments):
    needed = [] if "--preset" in arguments and "--out" in arguments else NEEDED.get(arguments[0], [])
    # options that are given come last, and count
    assert _parser().parse_args([arguments[0], *needed, *arguments[1:]]).run


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings], (
                target
            )
