"""`prefect-webapi config`: every setting, its value, and who gave it; what is wrong with a file, all at once."""

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


# --- validate ----------------------------------------------------------------------------------

FLYTES = """
plugins:
  athena:
    webApi:
      readRateLimiter: {qps: 4, burst: 5}
      resourceQuotas: [{default: 7}]
  spark:
    sparkConfig: {}
  snowflake:
    webApi:
      caching: {resyncInterval: 5s}
"""


def test_flytes_file_is_taken_and_what_would_hold_is_shown(here: Path, command: Command) -> None:
    (here / "flyte.yaml").write_text(FLYTES)
    ended = command("config", "validate", "flyte.yaml", "--json")
    assert ended.code == 0
    found = {part["path"]: part["config"] for part in ended.data["parts"]}
    assert found.keys() == {"plugins.athena.webApi", "plugins.snowflake.webApi"}
    assert found["plugins.athena.webApi"]["resourceQuotas"] == {"default": 7}
    assert found["plugins.athena.webApi"]["writeRateLimiter"]["qps"] == 20
    assert found["plugins.snowflake.webApi"]["caching"]["resyncInterval"] == "5s"
    assert (
        "plugins.athena.webApi.readRateLimiter.qps"
        in command("config", "validate", "flyte.yaml").out
    )


@pytest.mark.parametrize("name", ["engine", "webApi", ""])
def test_flags_say_otherwise_than_the_file(here: Path, command: Command, name: str) -> None:
    """CASE-017: as argparse takes them."""
    body = "caching: {workers: 3, resyncInterval: 1m}"
    (here / "limits.yaml").write_text(f"{name}: {{{body}}}" if name else body)
    flags = ("--caching.resyncInterval=45s", "--readRateLimiter.qps", "7")
    (part,) = command("config", "validate", "limits.yaml", *flags, "--json").data["parts"]
    assert part["path"] == name
    assert part["config"]["caching"]["resyncInterval"] == "45s"
    assert part["config"]["caching"]["workers"] == 3
    assert part["config"]["readRateLimiter"] == {"qps": 7, "burst": 300}


def test_every_fault_of_a_file_is_told_at_once_with_its_place(here: Path, command: Command) -> None:
    """REQ-06: also of the parts of one file, and for programs."""
    (here / "block.yaml").write_text(
        "engine:\n  readRateLimiter: {qps: 0, burst: 5}\n  caching: {resyncinterval: 5s}\n"
        "settings:\n  deadline: soon\n"
    )
    ended = command("config", "validate", "block.yaml")
    assert (ended.code, ended.out) == (2, "")
    assert "block.yaml has 3 faults" in ended.err
    assert "engine.caching.resyncinterval: unknown key. Did you mean `resyncInterval`?" in ended.err
    told = command("config", "validate", "block.yaml", "--json")
    assert told.code == 2
    assert [fault["path"] for fault in told.data["faults"]] == [
        "engine.readRateLimiter.qps",
        "engine.caching.resyncinterval",
        "settings.deadline",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- 1", "holds list where keys with values are expected"),
        ("plugins: {spark: {}}", "none of them has a configuration"),
        ("webApi: 7", "webApi: holds int where keys with values are expected"),
        (None, "can't be read: No such file or directory"),
    ],
)
def test_what_is_no_configuration_is_refused(
    here: Path, command: Command, text: str | None, told: str
) -> None:
    if text is not None:
        (here / "odd.yaml").write_text(text)
    ended = command("config", "validate", "odd.yaml")
    assert ended.code == 2
    assert told in ended.err
