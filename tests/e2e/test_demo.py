"""The demo runs from nothing, as a person would start it, and the commands it points at work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.blackbox import CONFIG
from tests.services import JARS

DEMO_SECONDS_MAX = 300


def credits(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line on a stack of its own."""
    environment = os.environ | {"CREDITS_ROOT": str(root), "COLUMNS": "160"}
    command = [sys.executable, "-m", "console.main", *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=DEMO_SECONDS_MAX
    )


@pytest.fixture(scope="module")
def root(scratch: Path) -> Path:
    """A folder with nothing in it but the downloaded Kafka."""
    root = scratch / "demo"
    (root / ".credits").mkdir(parents=True)
    (root / ".credits").chmod(0o711)
    JARS.mkdir(exist_ok=True)
    (root / ".credits" / "jars").symlink_to(JARS)
    return root


def test_the_demo_ends_by_itself_with_everything_answered_once_and_sound_books(root: Path) -> None:
    done = credits(root, "demo")
    assert done.returncode == 0, done.stdout + done.stderr
    for told in (
        "66/66",
        "17638/17638",
        "every one got exactly one result",
        "2 refunds are parked",
        "An order needs attention: invoice-536414",
        "receipt R-",
        "A year of ann's balance",
        "every identity holds",
        "/v1/merchants/demo-llm-1/users/user-001/overview",
        "All is well",
        "The stack is down.",
    ):
        assert told in done.stdout, done.stdout
    assert not (root / ".credits" / "stack.env").exists()


def test_what_the_demo_left_can_be_verified_and_extended_from_the_command_line(root: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    up = credits(root, "up")
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        verified = credits(root, "verify", "--all", "--json")
        assert verified.returncode == 0, verified.stdout + verified.stderr
        reports = json.loads(verified.stdout)
        assert {name.rpartition("-")[0] for name in reports} == {"demo-llm", "demo-shop", "demo-year"}
        assert all(report["ok"] for report in reports.values())
        created = credits(root, "merchants", "create", "new-shop", "--config", str(config), "--simulated")
        assert created.returncode == 0, created.stdout + created.stderr
        assert "new-shop" in credits(root, "merchants", "list").stdout
        advanced = credits(root, "clock", "advance", "new-shop", "86400")
        assert json.loads(advanced.stdout)["effects"]["offset_seconds"] == 86_400
        refused = credits(root, "clock", "advance", "demo-shop-1", "1")
        assert refused.returncode == 1
        assert json.loads(refused.stdout)["error"]["code"] == "immutable"
        unknown = credits(root, "verify", "nobody")
        assert unknown.returncode == 1
    finally:
        credits(root, "down")
