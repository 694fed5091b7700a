"""The short form of `make chaos`."""

import json
import subprocess
import sys
from pathlib import Path

from tests.services import JARS

FAULTS = 7
KINDS = (
    "worker killed",
    "cut after COMMIT",
    "PostgreSQL killed",
    "broker killed",
    "worker joins or leaves",
    "freeze at a point",
)


def test_nothing_is_lost_or_doubled_whatever_breaks_under_load(scratch: Path) -> None:
    out = scratch / "chaos.json"
    command = [sys.executable, "-m", "tests.chaos", f"--faults={FAULTS}", "--seed=7", "--minutes=2.5", "--points=0"]
    command += [f"--root={scratch / 'chaos'}", f"--jars={JARS}", f"--out={out}", "--kinds", *KINDS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(out.read_text())
    assert (figures["lost"], figures["applied_twice"]) == (0, 0)
    assert figures["kinds"] == len(KINDS), figures
    assert figures["commands"] > 500, figures
