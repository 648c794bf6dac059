"""`prefect-webapi config`: the settings of a process that starts here and now, and where each comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, cast

from cyclopts import App, Parameter

if TYPE_CHECKING:
    from pydantic_settings import PydanticBaseSettingsSource

__all__ = ["app"]

app = App(name="config", help="Look at the settings.")


@app.command
def show(
    *,
    json: Annotated[bool, Parameter(negative="", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show each setting, its value, and where the value comes from. Secrets are masked.

    A connection's block, `with_options` and the call itself may say otherwise for their own jobs.
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
