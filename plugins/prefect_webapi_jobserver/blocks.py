"""The connection: where the job server is, how to get in, how hard to push it."""

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, HttpUrl, SecretStr

from prefect_webapi import EngineSettings, PluginConfig, RateLimiterConfig

_REPOSITORY = "https://github.com/prefect-webapi/prefect-webapi"


class JobServer(Block):
    """A job server and the credentials to use it.

    Example:
        Load the connection that is named like your server:
        ```python
        from prefect_webapi_jobserver.blocks import JobServer

        server = JobServer.load("BLOCK_NAME")
        ```
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
    _block_type_name = "Job Server"
    _block_type_slug = "job-server"
    _logo_url = HttpUrl(f"{_REPOSITORY}/raw/main/docs/img/job-server.png")
    _documentation_url = HttpUrl(f"{_REPOSITORY}#job-server")

    base_url: HttpUrl = Field(description="Root URL, for example `https://jobs.example.com/`.")
    token: SecretStr = Field(description="Bearer token that may create, read and cancel jobs.")
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
