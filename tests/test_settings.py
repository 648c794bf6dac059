"""Settings: read where Prefect reads its own, every fault at once, no password shown."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from prefect_webapi.contract.config import EngineSettings
from prefect_webapi.contract.faults import InvalidConfiguration
from prefect_webapi.settings import PREFIX, WebApiSettings


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory and a Prefect home of the test's own, and Prefect not in its test mode."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "profiles.toml"))
    for variable in ("PREFECT_TEST_MODE", "PREFECT_UNIT_TEST_MODE", "PREFECT_PROFILE"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def test_defaults_hold_where_nothing_is_set() -> None:
    """API, Settings."""
    settings = WebApiSettings.load()
    assert settings.shown_ledger_url.startswith("sqlite+aiosqlite:///")
    assert settings.shown_ledger_url.endswith("/webapi.db")
    assert settings.run_key is None
    assert settings.disabled_plugins == frozenset()
    assert settings.state_events_per_second == 20
    assert settings.watch_cancel_seconds == 1
    assert settings.gc_threshold == 50_000
    assert settings.metrics_port is None
    assert settings.overrides() == {}


def test_the_environment_is_read_by_prefects_convention(monkeypatch: pytest.MonkeyPatch) -> None:
    """API, Settings."""
    for name, value in {
        "LEDGER_URL": "postgresql+asyncpg://me:canary@host/jobs",
        "RUN_KEY": "nightly",
        "DISABLED_PLUGINS": "one, two",
        "STATE_EVENTS_PER_SECOND": "5",
        "WATCH_CANCEL_SECONDS": "0.5",
        "GC_THRESHOLD": "0",
        "METRICS_PORT": "9100",
        "CREATE_TIMEOUT": "1m30s",
        "MAX_CREATE_ATTEMPTS": "3",
        "REUSE_RESULTS": "false",
        "ON_UNKNOWN_CREATE": "retry",
        "DEADLINE": "2h",
    }.items():
        monkeypatch.setenv(PREFIX + name, value)
    settings = WebApiSettings.load()
    assert settings.run_key == "nightly"
    assert settings.disabled_plugins == {"one", "two"}
    assert settings.state_events_per_second == 5
    assert settings.watch_cancel_seconds == 0.5
    assert settings.gc_threshold == 0
    assert settings.metrics_port == 9100
    assert settings.overrides() == {
        "create_timeout": timedelta(seconds=90),
        "max_create_attempts": 3,
        "reuse_results": False,
        "on_unknown_create": "retry",
        "deadline": timedelta(hours=2),
    }
    mixed = EngineSettings().overlaid(settings.overrides())
    assert mixed.create_timeout == timedelta(seconds=90)
    assert mixed.get_timeout == EngineSettings().get_timeout

    assert settings.ledger_url.get_secret_value() == "postgresql+asyncpg://me:canary@host/jobs"
    assert settings.shown_ledger_url == "postgresql+asyncpg://me:***@host/jobs"
    assert "canary" not in repr(settings)
    assert "canary" not in settings.model_dump_json()


def test_prefects_files_are_read_too(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """API, Settings: environment over `.env` over `prefect.toml` over the profile."""
    (nowhere / "profiles.toml").write_text(
        'active = "here"\n[profiles.here]\n'
        f'{PREFIX}CANCEL_GRACE = "1s"\n{PREFIX}GET_TIMEOUT = "1s"\n'
        f'{PREFIX}DELETE_TIMEOUT = "1s"\n{PREFIX}DISABLED_PLUGINS = "one,two"\n'
    )
    (nowhere / "prefect.toml").write_text(
        '[integrations.webapi]\nget_timeout = "2s"\ndelete_timeout = "2s"\ncreate_timeout = "2s"\n'
        'disabled_plugins = ["three"]\n'
    )
    (nowhere / ".env").write_text(f"{PREFIX}DELETE_TIMEOUT=3s\n{PREFIX}CREATE_TIMEOUT=3s\n")
    monkeypatch.setenv(f"{PREFIX}CREATE_TIMEOUT", "4s")
    settings = WebApiSettings.load()
    spans = (
        settings.cancel_grace,
        settings.get_timeout,
        settings.delete_timeout,
        settings.create_timeout,
    )
    assert spans == tuple(timedelta(seconds=seconds) for seconds in (1, 2, 3, 4))
    assert settings.disabled_plugins == {"three"}
    assert len(settings.overrides()) == 4


def test_all_faults_come_in_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fault by the variable's name, with what is allowed; also misspelt variables."""
    for name, value in {
        "LEDGER_URL": "mysql://me:canary@host/jobs",
        "CREATE_TIMEOUT": "60",
        "SLOT_LEASE": "1s",
        "MAX_CREATE_ATTEMPTS": "many",
        "CANCEL_ON_PAUSE": "maybe",
        "ON_UNKNOWN_CREATE": "pray",
        "METRICS_PORT": "0",
        "STATE_EVENTS_PER_SECONDS": "20",
        "XYZ": "1",
    }.items():
        monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(InvalidConfiguration) as found:
        WebApiSettings.load()
    faults = {fault.path.removeprefix(PREFIX): fault for fault in found.value.faults}
    assert faults.keys() == {
        *("LEDGER_URL", "CREATE_TIMEOUT", "SLOT_LEASE", "MAX_CREATE_ATTEMPTS", "CANCEL_ON_PAUSE"),
        *("ON_UNKNOWN_CREATE", "METRICS_PORT", "STATE_EVENTS_PER_SECONDS", "XYZ"),
    }
    assert faults["SLOT_LEASE"].allowed == "1m0s … 24h0m0s"
    assert faults["STATE_EVENTS_PER_SECONDS"].remedy == (
        f"Did you mean `{PREFIX}STATE_EVENTS_PER_SECOND`?"
    )
    assert faults["XYZ"].remedy == "Remove it."
    assert "sqlite+aiosqlite://" in faults["LEDGER_URL"].problem
    assert "canary" not in str(found.value)


@pytest.mark.parametrize("value", ["off", "OFF", ""])
def test_metrics_can_be_switched_off_in_words(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """API, Settings."""
    monkeypatch.setenv(f"{PREFIX}METRICS_PORT", value)
    monkeypatch.setenv(f"{PREFIX}RUN_KEY", "")
    assert WebApiSettings.load().metrics_port is None
    assert WebApiSettings.load().run_key is None


def test_a_setting_that_equals_its_default_still_wins_over_the_form() -> None:
    """Nearest wins: what counts is that somebody set it."""
    settings = WebApiSettings(create_timeout=timedelta(seconds=60))
    assert EngineSettings().origins(settings.overrides())["create_timeout"] == "setting"
