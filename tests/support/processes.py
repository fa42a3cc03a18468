"""Commands in processes of their own, which find the checkout and these helpers."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def python(*command, env=None):
    """Run in a process of its own; what it prints is shown where it fails."""
    env = os.environ | {"ACCELERATE_USE_CPU": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests/support"} | (env or {})
    done = subprocess.run([sys.executable, *map(str, command)], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done
