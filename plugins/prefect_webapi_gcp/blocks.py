"""The connection: which project pays, where its data is, how to get in, how hard to push it."""

import json
from typing import Any

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, HttpUrl, SecretStr, field_validator

from prefect_webapi import EngineSettings, PluginConfig, RateLimiterConfig

_REPOSITORY = "https://github.com/prefect-webapi/prefect-webapi"
_KEY_FIELDS = ("client_email", "private_key", "token_uri")


class BigQuery(Block):
    """A Google Cloud project whose BigQuery runs the jobs, and the credentials to use it.

    Example:
        Load the connection that is named like your project:
        ```python
        from prefect_webapi_gcp.blocks import BigQuery

        warehouse = BigQuery.load("BLOCK_NAME")
        ```
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
    _block_type_name = "BigQuery"
    _block_type_slug = "bigquery"
    _logo_url = HttpUrl(f"{_REPOSITORY}/raw/main/docs/img/bigquery.png")
    _documentation_url = HttpUrl(f"{_REPOSITORY}/blob/main/docs/plugins/gcp.md")

    project: str = Field(min_length=1, description="Id of the project that runs and pays for jobs.")
    location: str = Field(
        min_length=1, description="Where the data is: `EU`, `US`, or a region such as `us-east4`."
    )
    service_account_info: SecretStr | None = Field(
        default=None,
        description="JSON of a service account's key file. Without it: application default "
        "credentials of the machine that runs the flow.",
    )
    endpoint: HttpUrl = Field(
        default=HttpUrl("https://bigquery.googleapis.com"), description="Root URL of the API."
    )
    engine: PluginConfig = Field(
        default=PluginConfig(
            read_rate_limiter=RateLimiterConfig(qps=10, burst=100),
            write_rate_limiter=RateLimiterConfig(qps=10, burst=100),
        ),
        description="Rate limits, polling and quotas.",
    )
    settings: EngineSettings = Field(
        default=EngineSettings(), description="Time-outs, retries and deadlines."
    )

    @field_validator("service_account_info")
    @classmethod
    def _is_a_key_file(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        try:
            info: Any = json.loads(value.get_secret_value())
        except ValueError:
            info = None
        missing = [name for name in _KEY_FIELDS if not isinstance(info, dict) or name not in info]
        if missing:
            raise ValueError(
                f"this is no key file of a service account: it has no {', '.join(missing)}. "
                "Paste the whole JSON text that Google gave you"
            ) from None
        return value
