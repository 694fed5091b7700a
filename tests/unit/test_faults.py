"""Faults that tests build into a worker, and a worker that is none of a test."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from workers import faults


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    yield
    faults.enable(None)


@pytest.mark.parametrize("variable", ["CREDITS_FAULT", "CREDITS_PLANT"])
def test_a_worker_with_a_fault_does_not_start_where_nothing_says_that_it_is_a_test(variable: str) -> None:
    value = {"CREDITS_FAULT": "after_commit:die", "CREDITS_PLANT": "no_inbox"}[variable]
    # Nothing listens there: were it to start, it would say that.
    environment = os.environ | {
        variable: value,
        "CREDITS_CONTROL_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
        "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1",
    }
    command = [sys.executable, "-m", "console.main", "worker"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert '"level": "critical"' in line
    assert "CREDITS_TEST_FAULTS=1 is not set" in line
    assert value in line


def test_a_worker_with_a_fault_says_so() -> None:
    with capture_logs() as logged:
        faults.enable_from_env({"CREDITS_PLANT": "no_inbox", "CREDITS_TEST_FAULTS": "1"})

    assert faults.planted("no_inbox")
    assert [(line["log_level"], line["CREDITS_PLANT"]) for line in logged] == [("critical", "no_inbox")]


def test_a_worker_without_faults_says_nothing() -> None:
    with capture_logs() as logged:
        faults.enable_from_env({"CREDITS_FAULT": "", "CREDITS_TEST_FAULTS": "1"})

    assert logged == []
