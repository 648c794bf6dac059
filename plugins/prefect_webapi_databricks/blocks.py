"""The connection: which workspace, how to get in, how hard to push it."""

from typing import Self

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, HttpUrl, SecretStr, model_validator

from prefect_webapi import EngineSettings, PluginConfig, RateLimiterConfig

_REPOSITORY = "https://github.com/prefect-webapi/prefect-webapi"


class Databricks(Block):
    """A Databricks workspace and the credentials to run jobs in it: a token, or a service principal's OAuth secret.

    Example:
        Load the connection that is named like your workspace:
        ```python
        from prefect_webapi_databricks.blocks import Databricks

        workspace = Databricks.load("BLOCK_NAME")
        ```
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
    _block_type_name = "Databricks"
    _block_type_slug = "databricks"
    _logo_url = HttpUrl(f"{_REPOSITORY}/raw/main/docs/img/databricks.png")
    _documentation_url = HttpUrl(f"{_REPOSITORY}/blob/main/docs/plugins/databricks.md")

    host: HttpUrl = Field(
        description="The workspace, for example `https://dbc-a1b2c3d4-e5f6.cloud.databricks.com`."
    )
    token: SecretStr | None = Field(default=None, description="A personal access token.")
    client_id: str | None = Field(
        default=None, description="Instead of a token: the application id of a service principal."
    )
    client_secret: SecretStr | None = Field(
        default=None, description="The OAuth secret of the service principal."
    )
    partial_success_fails: bool = Field(
        default=False,
        description="Whether a run that ends as SUCCESS_WITH_FAILURES counts as failed.",
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

    @model_validator(mode="after")
    def _is_usable(self) -> Self:
        if self.host.path not in (None, "/") or self.host.query or self.host.fragment:
            raise ValueError("host: leave out what follows the workspace's name in its address")
        given = [self.token is not None, bool(self.client_id), self.client_secret is not None]
        if given not in ([True, False, False], [False, True, True]):
            raise ValueError("credentials: give either token, or client_id and client_secret")
        return self
