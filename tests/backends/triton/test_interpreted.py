"""The tests in ``interpreted/`` pass. They need another process: Triton reads TRITON_INTERPRET at its import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnzoo.backends.triton.tile_sizes import is_interpreted

pytest.importorskip("triton", reason="the package triton is not installed")
FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.slow
@pytest.mark.skipif(is_interpreted(), reason="this process runs the tests itself")
@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_interpreted_kernels(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(FOLDER / file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
