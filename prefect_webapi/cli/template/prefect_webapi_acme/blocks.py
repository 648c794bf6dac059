"""The connection: where Acme is, how to get in, how hard to push it."""

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, HttpUrl, SecretStr

from prefect_webapi import EngineSettings, PluginConfig, RateLimiterConfig


class Acme(Block):
    """An account at Acme.

    Example:
        Load the connection that is named like your account:
        ```python
        from prefect_webapi_acme.blocks import Acme

        account = Acme.load("BLOCK_NAME")
        ```
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
    _block_type_name = "Acme"
    _block_type_slug = "acme"

    # CHANGE: what the service needs to let you in; every secret is a SecretStr.
    base_url: HttpUrl = Field(description="Root URL, for example `https://acme.example.com/`.")
    token: SecretStr = Field(description="Token that may create, read and cancel jobs.")
    engine: PluginConfig = Field(
        default=PluginConfig(
            read_rate_limiter=RateLimiterConfig(qps=10, burst=100),  # CHANGE: documented limits
            write_rate_limiter=RateLimiterConfig(qps=10, burst=100),  # CHANGE: documented limits
        ),
        description="Rate limits, polling and quotas.",
    )
    settings: EngineSettings = Field(
        default=EngineSettings(), description="Time-outs, retries and deadlines."
    )
