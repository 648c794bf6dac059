"""`prefect-webapi config`: the settings of a process that starts here and now, and files of configurations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from cyclopts import App, Parameter

from prefect_webapi.contract.errors import ConfigurationError

if TYPE_CHECKING:
    from pydantic_settings import PydanticBaseSettingsSource

    from prefect_webapi.cli.configfile import Part

__all__ = ["app"]

app = App(name="config", help="Look at the settings; check a file of limits before it is used.")


@app.command
def show(
    *,
    json: Annotated[bool, Parameter(negative="", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show each setting, its value, and where the value comes from. Secrets are masked.

    A connection's block, `with_options` and the call itself may say otherwise for their own jobs.

    Example: `prefect-webapi config show --json`
    """
    from rich.table import Table
    from rich.text import Text

    from prefect_webapi.cli.screen import console, say_json
    from prefect_webapi.settings import PREFIX, WebApiSettings

    settings = WebApiSettings.load()
    origins = _origins()
    rows = [
        (
            f"{PREFIX}{name.upper()}",
            _shown(settings, name),
            origins.get(name, "default"),
            field.description or "",
        )
        for name, field in WebApiSettings.model_fields.items()
    ]
    rows.sort(key=lambda row: row[2] == "default")  # what somebody set comes first
    if json:
        keys = ("setting", "value", "origin", "description")
        say_json([dict(zip(keys, row, strict=True)) for row in rows])
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("setting", "value", "from"):
        table.add_column(name, overflow="fold", no_wrap=name == "setting")
    for name, value, origin, _ in rows:
        style = "" if origin == "default" else "bold"
        table.add_row(name.removeprefix(PREFIX), Text(_told(value), style), Text(origin))
    out = console()
    out.print(f"Each name is set as {PREFIX}<NAME>.", style="dim", highlight=False)
    out.print(table)


@app.command
def validate(
    file: Annotated[Path, Parameter(help="YAML or JSON.")],
    /,
    *flags: Annotated[
        str, Parameter(allow_leading_hyphen=True, help="Any of the eight flags, as --NAME=VALUE.")
    ],
    json: Annotated[bool, Parameter(negative="", help="Print JSON instead of a table.")] = False,
) -> int:
    """Check a file of rate limits, quotas and settings, and show what would hold; every fault is told at once.

    Takes a plugin's configuration as Flyte writes it, Flyte's whole file (each plugin's `webApi`), or the body of a
    block (`engine` and `settings`). What the file leaves out has its default. The flags say otherwise than the file:
    `--readRateLimiter.qps`, `--readRateLimiter.burst`, `--writeRateLimiter.qps`, `--writeRateLimiter.burst`,
    `--caching.size`, `--caching.resyncInterval`, `--caching.workers`, `--caching.maxSystemFailures`.

    Exit code 0: all is right; 2: something is not.

    Example: `prefect-webapi config validate limits.yaml --caching.resyncInterval=45s`
    """
    from dataclasses import asdict

    from prefect_webapi.cli.configfile import parts_of
    from prefect_webapi.cli.screen import say_json
    from prefect_webapi.contract.faults import InvalidConfiguration

    over = _flags(flags)
    try:
        parts = parts_of(_text(file), str(file), over)
    except InvalidConfiguration as error:
        if not json:
            raise
        say_json({"ok": False, "faults": [asdict(fault) for fault in error.faults]})
        return 2
    if json:
        shown = [
            {"path": part.path, "config": part.config.model_dump(mode="json", by_alias=True)}
            for part in parts
        ]
        say_json({"ok": True, "parts": shown})
    else:
        _say_parts(parts)
    return 0


def _flags(given: tuple[str, ...]) -> Any:
    from argparse import ArgumentParser

    from prefect_webapi.contract.config import PluginConfig

    parser = ArgumentParser("prefect-webapi config validate FILE", allow_abbrev=False)
    flags = PluginConfig.flag_set()
    flags.add_to(parser)
    return flags.given(parser.parse_args(given))


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigurationError(f"{file} can't be read: {why}. Name a YAML or JSON file") from None


def _say_parts(parts: list[Part]) -> None:
    from rich.table import Table
    from rich.text import Text

    from prefect_webapi.cli.screen import console

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("field", "value"):
        table.add_column(name, overflow="fold")
    for part in parts:
        default = type(part.config)().model_dump(mode="json", by_alias=True)
        usual = dict(_leaves(default, part.path))
        for path, value in _leaves(part.config.model_dump(mode="json", by_alias=True), part.path):
            style = "" if usual.get(path) == value else "bold"
            table.add_row(path, Text(_told(value), style))
    out = console()
    out.print(table)
    out.print("All of it is right. Bold: other than the default.", style="dim", highlight=False)


def _leaves(data: dict[str, Any], path: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in data.items():
        place = f"{path}.{name}".strip(".")
        nested = cast(dict[str, Any], value) if isinstance(value, dict) else {}
        found += _leaves(nested, place) if nested else [(place, cast(Any, value))]
    return found


def _shown(settings: Any, name: str) -> Any:
    """A value as JSON data, as one would write it; no secret."""
    from prefect_webapi.contract.secrecy import looks_secret

    if name == "ledger_url":
        return settings.shown_ledger_url
    value = settings.model_dump(mode="json", include={name})[name]
    if value is not None and looks_secret(name):
        return "***"
    return sorted(cast(list[str], value)) if isinstance(value, list) else value


def _told(value: Any) -> str:
    match value:
        case None:
            return "not set"
        case bool():
            return "true" if value else "false"
        case dict():
            return "none"
        case list():
            return ", ".join(cast(list[str], value)) or "none"
        case _:
            return str(value)


def _origins() -> dict[str, str]:
    """Which source gave each field that is not left at its default."""
    from prefect_webapi.settings import WebApiSettings

    found: dict[str, str] = {}

    class Traced(WebApiSettings):
        @classmethod
        def settings_customise_sources(
            cls, *args: Any, **kwargs: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            sources = super().settings_customise_sources(*args, **kwargs)
            for source in sources:  # the first that names a field wins
                for name in source():
                    found.setdefault(name, _name_of(source, name))
            return sources

    Traced()
    return found


def _name_of(source: PydanticBaseSettingsSource, field: str) -> str:
    from prefect.settings import sources as prefects

    from prefect_webapi.settings import PREFIX

    match source:
        case prefects.FilteredDotEnvSettingsSource():
            return "file .env"
        case prefects.EnvFilterSettingsSource():
            return f"environment variable {PREFIX}{field.upper()}"
        case prefects.PrefectTomlConfigSettingsSource():
            return "file prefect.toml"
        case prefects.PyprojectTomlConfigSettingsSource():
            return "file pyproject.toml"
        case prefects.ProfileSettingsTomlLoader():
            return f"profile {_profile()}"
        case _:
            return type(source).__name__


def _profile() -> str:
    from prefect.context import get_settings_context

    return repr(get_settings_context().profile.name)
