"""The script for AMD processors: what runs behind it computes the same."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastgda.core import ROOT

PRODUCT = """
import os, torch
first, second = (torch.randn(65, 130, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
error = (first @ second.T - (first.double() @ second.double().T)).abs().max().item()
print("preloaded" if "mkl_on_amd" in os.environ.get("LD_PRELOAD", "") else "as it is", error < 1e-4)
"""


@pytest.mark.skipif(platform.system() != "Linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
def test_products_are_the_same_behind_the_script_for_amd() -> None:
    command = f'set -euo pipefail; source scripts/mkl_on_amd.sh; {sys.executable} -c "$0"'
    done = subprocess.run(["bash", "-c", command, PRODUCT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    info = Path("/proc/cpuinfo").read_text()
    amd = "AuthenticAMD" in info and "avx512f" in info
    assert done.stdout.split() == (["preloaded", "True"] if amd else ["as", "it", "is", "True"])
    assert "cannot be preloaded" not in done.stderr
