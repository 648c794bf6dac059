"""The connection: where the connector is, how to get in, how to keep its handles secret."""

import re
from typing import Annotated

from prefect.blocks.core import Block
from pydantic import AfterValidator, ConfigDict, Field, HttpUrl, SecretStr

from prefect_webapi import EngineSettings, PluginConfig, RateLimiterConfig

_REPOSITORY = "https://github.com/prefect-webapi/prefect-webapi"


def _target(address: str) -> str:
    if not re.fullmatch(r"(dns:///)?(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):\d{1,5}", address):
        raise ValueError(
            f"{address!r} is no gRPC address. Give `host:port` or `dns:///host:port`; `tls` says how to talk to it."
        )
    return address


class FlyteConnector(Block):
    """A Flyte connector (an agent, in Flyte's older words) and the credentials to use it.

    Example:
        Load the connection that is named like your connector:
        ```python
        from prefect_webapi_flyte.blocks import FlyteConnector

        connector = FlyteConnector.load("BLOCK_NAME")
        ```
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
    _block_type_name = "Flyte Connector"
    _block_type_slug = "flyte-connector"
    _logo_url = HttpUrl(f"{_REPOSITORY}/raw/main/docs/img/flyte-connector.png")
    _documentation_url = HttpUrl(f"{_REPOSITORY}/blob/main/docs/plugins/flyte.md")

    address: Annotated[str, AfterValidator(_target)] = Field(
        description="gRPC address, for example `connector.flyte.svc:8000`."
    )
    tls: bool = Field(default=True, description="Whether the connector is spoken to over TLS.")
    root_certificates: str | None = Field(
        default=None, description="PEM of the authorities to trust; empty: those of gRPC."
    )
    token: SecretStr | None = Field(
        default=None, description="Bearer token, where something in front of the connector asks."
    )
    handle_key: SecretStr | None = Field(
        default=None,
        description=(
            "Fernet key that the connector's handles are encrypted with before they are stored; several keys are "
            "parted by commas: the first one encrypts, each one decrypts."
        ),
    )
    output_prefix: str = Field(
        default="",
        description="Storage that the connector may write to, for example `s3://bucket/flyte`.",
    )
    project: str = Field(
        default="prefect", description="Flyte project that jobs are told to be in."
    )
    domain: str = Field(default="production", description="Flyte domain, likewise.")
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
