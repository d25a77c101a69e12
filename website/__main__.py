"""Builds the site, strictly: `python -m website` (or `make docs`) writes it to build/site.

A dead link, an anchor that no heading has, a docstring that cannot be read, and a file that a page
would load from a network are all errors.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

from website import built, layout

NEEDS = (
    "the site needs Zensical: pip install --constraint constraints.txt '.[docs]', "
    "with Python 3.11 or newer (`make docs` does so)"
)
# What Zensical and mkdocstrings say of a page that they build all the same.
COMPLAINTS = ("griffe:", "mkdocs_autorefs:", "Warning:")


def main() -> int:
    """Build the site; return the exit code, 0 where nothing was found."""
    if find_spec("zensical") is None:
        print(NEEDS, file=sys.stderr)
        return 1
    layout.lay_out()
    # As a module: `website` is to be found from the root of the repository.
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(
        command, cwd=layout.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout, end="")
    if done.returncode or any(line.startswith(COMPLAINTS) for line in done.stdout.splitlines()):
        print("the site is not as it should be: see above", file=sys.stderr)
        return 1
    faults = built.faults(layout.SITE)
    print("\n".join(faults) or f"open {layout.SITE.relative_to(layout.ROOT)}/index.html")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
