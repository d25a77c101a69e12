"""The Markdown pages of the repository, and what is in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Their code blocks are executed; those of CONTRIBUTING.md set up and publish, which a test must
# not.
WITH_BLOCKS = ("README.md", *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md"))))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block: the page it is in, its language, and its text."""

    page: str
    language: str
    text: str

    @property
    def lines(self) -> list[str]:
        """The commands of a bash block, those on several lines joined."""
        return self.text.replace("\\\n", " ").splitlines()

    def __str__(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0][:50]}"


def everything() -> list[Path]:
    """All Markdown files that people read, from the root of the repository."""
    folders = (ROOT, ROOT / "docs", ROOT / "docs" / "api", ROOT / "dev")
    return [path for folder in folders for path in sorted(folder.glob("*.md"))]


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(*languages: str) -> list[Block]:
    """The blocks of these languages on all pages with blocks; without any, all blocks."""
    every = [Block(page, *match) for page in WITH_BLOCKS for match in FENCED.findall(text(page))]
    return [block for block in every if not languages or block.language in languages]


def between(page: str, start: str, end: str) -> str:
    """The text of a page between two marks, each of which it has once."""
    _, middle = text(page).split(start)
    return middle.split(end)[0]


def rows(table: str) -> list[list[str]]:
    """The cells of a Markdown table, without its header."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    names: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text("utf-8")), flags=re.M):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        names[name] = names.get(name, 0) + 1
    return {f"{name}-{n}" if n else name for name, count in names.items() for n in range(count)}
