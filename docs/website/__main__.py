"""Builds the site, strictly: `make docs` writes it to build/site.

A dead link, an anchor that no heading has, a docstring that cannot be read, and a file that a page
would load from a network are all errors.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec

from website import built, layout

NEEDS = (
    "the site needs Zensical: pip install --constraint constraints.txt '.[docs]', "
    "with Python 3.11 or newer (`make docs` does so)"
)
# What Zensical and mkdocstrings say of a page that they build all the same.
COMPLAINTS = ("griffe:", "mkdocs_autorefs:", "mkdocstrings:", "Warning:")


def main() -> int:
    """Build the site; return the exit code, 0 where nothing was found."""
    if find_spec("zensical") is None:
        print(NEEDS, file=sys.stderr)
        return 1
    try:
        layout.lay_out()
    except layout.DeadLinkError as error:
        print(error, file=sys.stderr)
        return 1
    said, failed = build()
    print(said)
    faults = [] if failed else built.faults(layout.SITE)
    if failed or faults:
        print("\n".join(faults))
        print("the site is not as it should be: see above", file=sys.stderr)
        return 1
    print(f"open {layout.SITE.relative_to(layout.ROOT)}/index.html")
    return 0


def build() -> tuple[str, bool]:
    """Run Zensical; return what it says, and whether it complains."""
    paths = [str(layout.ROOT / "docs"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean"],
        cwd=layout.ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    # It colours each letter, into files, too; after a warning, strict mode ends in a traceback.
    said = re.sub(r"\x1b\[[\d;]*m", "", done.stdout).partition("Traceback")[0].strip()
    complains = any(line.startswith(COMPLAINTS) for line in said.splitlines())
    return said or done.stdout, complains or done.returncode != 0


if __name__ == "__main__":
    sys.exit(main())
