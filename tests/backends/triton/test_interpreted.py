"""The tests in ``interpreted/`` pass. They need another process: Triton reads TRITON_INTERPRET at its import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnzoo.backends.triton.tile_sizes import is_interpreted

pytest.importorskip("triton", reason="the package triton is not installed")
FOLDER = Path(__file__).parent / "interpreted"


DRAWN = FOLDER / "test_drawn.py"  # takes as long as all other files
OTHERS = sorted(path for path in FOLDER.glob("test_*.py") if path != DRAWN)


@pytest.mark.slow
@pytest.mark.skipif(is_interpreted(), reason="this process runs the tests itself")
@pytest.mark.parametrize("files", [[DRAWN], OTHERS], ids=["drawn", "others"])
def test_interpreted_kernels(files):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *map(str, files)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
