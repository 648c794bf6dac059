"""Settings of this process, read where Prefect reads its own.

By Prefect's convention for integrations: environment variables and `.env` lines named
``PREFECT_INTEGRATIONS_WEBAPI_<FIELD>``, the same names in a profile, table ``[integrations.webapi]`` of
`prefect.toml`, table ``[tool.prefect.integrations.webapi]`` of `pyproject.toml`; the first that names a
field wins.

The fields of `EngineSettings` are here too, as the process's own values: they hold where a connection's
block says nothing. A saved block holds every field, so it counts as saying something where it differs
from what its form was filled with. Whoever leaves a field of the form alone gets the setting; whoever
changes it gets the block. To have the default for one connection while a setting is in force, remove
the setting, or give the value to the call.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, cast
from urllib.parse import urlsplit

import prefect.settings
from prefect.settings.base import PrefectBaseSettings, build_settings_config
from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import NoDecode, SettingsConfigDict, SettingsError

from prefect_webapi.contract.config import EngineFields
from prefect_webapi.contract.errors import ConfigurationError
from prefect_webapi.contract.faults import (
    Fault,
    InvalidConfiguration,
    faults_in,
    near_miss,
)
from prefect_webapi.contract.secrecy import mask_url

__all__ = ["PREFIX", "WebApiSettings"]

PREFIX = "PREFECT_INTEGRATIONS_WEBAPI_"

_LEDGERS = ("sqlite", "sqlite+aiosqlite", "postgresql", "postgresql+asyncpg")


def _ledger_beside_prefect() -> SecretStr:
    home = prefect.settings.get_current_settings().home
    return SecretStr(f"sqlite+aiosqlite:///{home / 'webapi.db'}")


def _parts(value: Any) -> Any:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _off(value: Any) -> Any:
    return None if isinstance(value, str) and value.strip().lower() in ("", "off") else value


class WebApiSettings(EngineFields, PrefectBaseSettings):
    """All settings of this process; a field that nobody set holds its default.

    Build it with `load`, which names every fault at once.
    """

    model_config = cast(
        SettingsConfigDict, build_settings_config(("integrations", "webapi"), frozen=True)
    )

    ledger_url: SecretStr = Field(
        default_factory=_ledger_beside_prefect,
        description="Where jobs are remembered: sqlite:////path/of/file.db or postgresql://user@host/database.",
    )
    run_key: Annotated[str | None, BeforeValidator(_off)] = Field(
        default=None,
        max_length=200,
        description="Key under which a second start of a script finds the jobs of the first.",
    )
    disabled_plugins: Annotated[frozenset[str], NoDecode, BeforeValidator(_parts)] = Field(
        default=frozenset(), description="Ids of plugins that may not run, parted by commas."
    )
    state_events_per_second: int = Field(
        default=20, ge=1, le=10_000, description="Most state events per second, 1 to 10,000."
    )
    watch_cancel_seconds: float = Field(
        default=1.0, ge=0.05, le=60, description="Seconds between two looks for a cancellation."
    )
    gc_threshold: int = Field(
        default=50_000,
        ge=0,
        le=1_000_000,
        description="Objects that are made before Python's garbage collector looks at them; 0 leaves Python's own.",
    )
    metrics_port: Annotated[int | None, BeforeValidator(_off)] = Field(
        default=None, ge=1, le=65_535, description="Port that serves metrics; off serves none."
    )
    metrics_host: str = Field(
        default="127.0.0.1",
        description="Address at which metrics are served; 0.0.0.0 for other machines.",
    )

    @field_validator("ledger_url")
    @classmethod
    def _is_a_ledger(cls, url: SecretStr) -> SecretStr:
        scheme = urlsplit(url.get_secret_value()).scheme
        if scheme not in _LEDGERS:
            raise PydanticCustomError(
                "ledger_url",
                "must begin with one of {schemes}",
                {"schemes": ", ".join(f"{each}://" for each in _LEDGERS)},
            )
        return url

    @classmethod
    def load(cls) -> WebApiSettings:
        """The settings as they are now.

        Raises:
            InvalidConfiguration: every fault, also each unknown variable of our prefix.
        """
        faults = list(_unknown_variables(os.environ))
        try:
            settings = cls()
        except ValidationError as error:
            faults += faults_in(error, cls, name=_variable)
        except SettingsError as error:
            raise ConfigurationError(f"the settings can't be read: {error}") from None
        else:
            if not faults:
                return settings
        raise InvalidConfiguration("The environment of prefect-webapi", faults)

    def overrides(self) -> dict[str, Any]:
        """The fields of `EngineSettings` that somebody set, for `EngineSettings.overlaid`."""
        return {
            name: getattr(self, name)
            for name in EngineFields.model_fields
            if name in self.model_fields_set
        }

    @property
    def names_ledger(self) -> bool:
        """Whether somebody said where the ledger is."""
        return "ledger_url" in self.model_fields_set

    @property
    def shown_ledger_url(self) -> str:
        """`ledger_url` without its password: for people and logs."""
        return mask_url(self.ledger_url.get_secret_value())


def _variable(path: str) -> str:
    return f"{PREFIX}{path.upper()}"


def _unknown_variables(environment: Mapping[str, str]) -> list[Fault]:
    faults: list[Fault] = []
    for variable in sorted(environment):
        name = variable.upper().removeprefix(PREFIX).lower()
        if variable.upper().startswith(PREFIX) and name not in WebApiSettings.model_fields:
            meant = near_miss(name, WebApiSettings.model_fields)
            remedy = f"Did you mean `{_variable(meant)}`?" if meant else "Remove it."
            faults.append(Fault(variable, "unknown setting", remedy=remedy))
    return faults
