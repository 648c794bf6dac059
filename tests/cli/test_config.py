"""`prefect-webapi config show`: every setting, its value, and who gave it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefect_webapi.settings import PREFIX, WebApiSettings
from tests.cli.command import Command, command_for


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files of Prefect of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "profiles.toml"))
    for variable in ("PREFECT_TEST_MODE", "PREFECT_UNIT_TEST_MODE", "PREFECT_PROFILE"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


@pytest.fixture
def command(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    return command_for(monkeypatch, capsys)


def _by_name(rows: list[dict[str, Any]]) -> dict[str, tuple[Any, str]]:
    return {row["setting"].removeprefix(PREFIX): (row["value"], row["origin"]) for row in rows}


def test_each_setting_is_shown_with_where_it_comes_from(
    here: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nearest wins, and is the one that is named."""
    (here / "profiles.toml").write_text(
        f'active = "mine"\n[profiles.mine]\n{PREFIX}GET_TIMEOUT = "1s"\n{PREFIX}RUN_KEY = "p"\n'
        f'{PREFIX}CANCEL_GRACE = "5s"\n'
    )
    (here / ".env").write_text(f"{PREFIX}GET_TIMEOUT=3s\n")
    (here / "prefect.toml").write_text("[integrations.webapi]\nmax_create_attempts = 3\n")
    (here / "pyproject.toml").write_text(
        '[tool.prefect.integrations.webapi]\ndelete_timeout = "7s"\n'
    )
    monkeypatch.setenv(f"{PREFIX}RUN_KEY", "e")
    monkeypatch.setenv(f"{PREFIX}DISABLED_PLUGINS", "one,two")
    shown = _by_name(command("config", "show", "--json").data)
    assert shown["RUN_KEY"] == ("e", f"environment variable {PREFIX}RUN_KEY")
    assert shown["DISABLED_PLUGINS"][0] == ["one", "two"]
    assert shown["GET_TIMEOUT"] == ("3s", "file .env")
    assert shown["MAX_CREATE_ATTEMPTS"] == (3, "file prefect.toml")
    assert shown["DELETE_TIMEOUT"] == ("7s", "file pyproject.toml")
    assert shown["CANCEL_GRACE"][0] == "5s"
    assert shown["CANCEL_GRACE"][1].startswith("profile")
    assert shown["CREATE_TIMEOUT"] == ("1m0s", "default")
    assert {name.lower() for name in shown} == set(WebApiSettings.model_fields)


def test_the_ledgers_password_is_masked(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}LEDGER_URL", "postgresql+asyncpg://me:canary@host/jobs")
    for arguments in ((), ("--json",)):
        ended = command("config", "show", *arguments)
        assert ended.code == 0
        assert "canary" not in ended.out + ended.err
        assert "postgresql+asyncpg://me:***@host/jobs" in ended.out


def test_the_table_begins_with_what_somebody_set(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{PREFIX}SLOT_LEASE", "90s")
    lines = command("config", "show").out.splitlines()
    assert lines[2].split() == [
        *("SLOT_LEASE", "1m30s"),
        *("environment", "variable", f"{PREFIX}SLOT_LEASE"),
    ]


def test_every_wrong_setting_is_listed_and_the_exit_code_is_2(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{PREFIX}SLOT_LEASE", "1s")
    monkeypatch.setenv(f"{PREFIX}METRICS_PORT", "0")
    ended = command("config", "show")
    assert (ended.code, ended.out) == (2, "")
    assert "SLOT_LEASE" in ended.err
    assert "METRICS_PORT" in ended.err
