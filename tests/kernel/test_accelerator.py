"""Runs ``accelerator/checks.py`` in a process of its own.

The other tests would see its device, and torch would prefer it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.skipif(
    not torch.cuda.is_available()
    and not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)
@pytest.mark.slow
def test_on_an_accelerator():
    checks = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(HERE / "accelerator" / "checks.py"),
    ]
    run = subprocess.run(
        checks,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(HERE / "accelerator")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert torch.cuda.is_available() or "skipped" not in run.stdout
