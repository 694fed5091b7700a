"""Settings of a worker from environment variables."""

from pathlib import Path

import pytest

from workers.settings import SettingsError, WorkerSettings
from workers.web.settings import WebSettings

NEEDED = {"KAFKA_BOOTSTRAP_SERVERS": "k:9092", "CREDITS_CONTROL_DATABASE_URL": "postgresql://u:secret@h/db"}


def test_defaults_are_used_for_what_is_not_set_or_empty() -> None:
    settings = WorkerSettings.from_env({**NEEDED, "CREDITS_WEB_PORT": ""})

    assert settings.kafka_bootstrap_servers == "k:9092"
    assert (settings.web_bind, settings.web_port, settings.group) == ("127.0.0.1", 6066, "credits")
    assert settings.security_kwargs() == {}


def test_a_secret_is_read_from_the_file_its_twin_names_and_is_never_shown(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("hidden\n")
    given = {
        **NEEDED,
        "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "KAFKA_SASL_USERNAME": "worker",
        "KAFKA_SASL_PASSWORD_FILE": str(secret),
    }

    settings = WorkerSettings.from_env(given)

    kwargs = settings.security_kwargs()
    assert kwargs["sasl_plain_password"] == "hidden"
    assert kwargs["ssl_context"] is not None
    assert "hidden" not in repr(settings)
    assert "secret" not in repr(settings)


@pytest.mark.parametrize("missing", sorted(NEEDED))
def test_a_needed_variable_that_is_missing_is_named(missing: str) -> None:
    with pytest.raises(SettingsError, match=missing):
        WorkerSettings.from_env({name: value for name, value in NEEDED.items() if name != missing})


@pytest.mark.parametrize("text", ["many", "-1", "1.5"])
def test_a_number_that_is_none_is_named(text: str) -> None:
    with pytest.raises(SettingsError, match="CREDITS_BATCH_MAX"):
        WorkerSettings.from_env({**NEEDED, "CREDITS_BATCH_MAX": text})


def test_a_number_with_which_a_worker_would_do_nothing_is_named() -> None:
    for variable in ("CONCURRENCY", "MERCHANTS_POLL", "BATCH_MAX", "SESSION_TIMEOUT", "READERS", "JOBS_SECONDS"):
        with pytest.raises(SettingsError, match=f"CREDITS_{variable} is less than 1"):
            WorkerSettings.from_env({**NEEDED, f"CREDITS_{variable}": "0"})

    assert WorkerSettings.from_env({**NEEDED, "CREDITS_LINGER_MS": "0"}).linger_ms == 0


def test_a_secret_that_is_no_text_is_named_and_not_shown(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"caf\xe9")
    with pytest.raises(SettingsError) as told:
        WorkerSettings.from_env({**NEEDED, "KAFKA_SASL_PASSWORD_FILE": str(tmp_path / "secret")})
    assert str(told.value) == "KAFKA_SASL_PASSWORD_FILE is not a text in UTF-8"
    assert told.value.__cause__ is None


def test_a_web_server_that_would_answer_nothing_is_not_started() -> None:
    with pytest.raises(SettingsError, match="CREDITS_WEB_BURST"):
        WebSettings.from_env({"CREDITS_WEB_BURST": "0"})
