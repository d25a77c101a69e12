"""The folder that a case works in, and the files around it that must stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from fuzz.values import OUTSIDE


@dataclass(frozen=True)
class Place:
    """A folder to work in, three deep, with something to destroy in each folder above it."""

    top: Path

    @property
    def work(self) -> Path:
        """Where the commands are run, and all their files are."""
        return self.top / "a" / "b" / "work"

    def create(self) -> None:
        """Make the folders, and what must not change in them."""
        self.work.mkdir(parents=True)
        for folder in (self.top, self.top / "a", self.top / "a" / "b", self.top / "outside"):
            folder.mkdir(exist_ok=True)
            for name in ("x", "keep.json"):
                (folder / name).write_text("precious")

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file of the case; its paths to the outside are those of this place."""
        data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        path = self.work / name
        path.write_bytes(data.replace(OUTSIDE.encode(), str(self.top / "outside").encode()))
        return path


def snapshot(folder: Path) -> dict[str, str]:
    """Return what lies in a folder: kind and content of everything, by relative path."""
    return {str(path.relative_to(folder)): _state(path) for path in sorted(folder.rglob("*"))}


def _state(path: Path) -> str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    if path.is_file():
        return sha256(path.read_bytes()).hexdigest()
    return "folder" if path.is_dir() else "special"


def changes(before: dict[str, str], after: dict[str, str], allowed: tuple[str, ...]) -> list[str]:
    """Return the paths that changed, but for those that begin with an allowed one."""
    different = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    return [path for path in different if not path.startswith(allowed)]
