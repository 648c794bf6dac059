"""The connection: where a service is, how its jobs are run, and the secret to get in."""

from typing import Self

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, HttpUrl, SecretStr, model_validator

from prefect_webapi import EngineSettings, PluginConfig, RateLimiterConfig
from prefect_webapi_http.models import JobApi

_REPOSITORY = "https://github.com/prefect-webapi/prefect-webapi"


class HttpJobApi(Block):
    """A service that runs jobs, described as data.

    Example:
        Load the connection that is named like your service:
        ```python
        from prefect_webapi_http.blocks import HttpJobApi

        service = HttpJobApi.load("BLOCK_NAME")
        ```
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
    _block_type_name = "HTTP Job API"
    _block_type_slug = "http-job-api"
    _logo_url = HttpUrl(f"{_REPOSITORY}/raw/main/docs/img/http-job-api.png")
    _documentation_url = HttpUrl(f"{_REPOSITORY}/blob/main/docs/plugins/http.md")

    base_url: HttpUrl = Field(description="Root URL, for example `https://jobs.example.com/v1`.")
    api: JobApi = Field(
        description="How its jobs are run: fields, YAML text, or the `Path` of a YAML file."
    )
    secret: SecretStr = Field(
        default=SecretStr(""),
        description="Token, password, value of the header, or client secret, as `api.auth` says.",
    )
    engine: PluginConfig = Field(
        default=PluginConfig(
            read_rate_limiter=RateLimiterConfig(qps=10, burst=20),
            write_rate_limiter=RateLimiterConfig(qps=10, burst=20),
        ),
        description="Rate limits, polling and quotas.",
    )
    settings: EngineSettings = Field(
        default=EngineSettings(), description="Time-outs, retries and deadlines."
    )

    @model_validator(mode="after")
    def _secret_fits(self) -> Self:
        wanted = self.api.auth.type
        if (wanted == "none") == bool(self.secret.get_secret_value()):
            told = "is given" if wanted == "none" else "is empty"
            raise ValueError(f"secret {told}, and api.auth is {wanted}")
        return self
