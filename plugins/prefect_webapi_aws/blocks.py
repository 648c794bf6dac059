"""The connections: which region, how to get in, how hard to push it. Their credentials are those of any AWS tool."""

from abc import ABC
from typing import Self

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, HttpUrl, SecretStr, model_validator

from prefect_webapi import EngineSettings, PluginConfig, RateLimiterConfig

_REPOSITORY = "https://github.com/prefect-webapi/prefect-webapi"
_DOCUMENT = HttpUrl(f"{_REPOSITORY}/blob/main/docs/plugins/aws.md")


class AwsConnection(Block, ABC):
    """Where an AWS service is, and the credentials to use it."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    region: str = Field(
        pattern=r"^[a-z]+(-[a-z]+)+-[0-9]+$", description="Region, for example `eu-central-1`."
    )
    access_key_id: str | None = Field(
        default=None, description="Access key; empty: the credentials of the environment."
    )
    secret_access_key: SecretStr | None = Field(
        default=None, description="Secret that belongs to the access key."
    )
    session_token: SecretStr | None = Field(
        default=None, description="Token that belongs to a temporary access key."
    )
    profile: str | None = Field(
        default=None, description="Profile of the AWS configuration files, instead of a key."
    )
    endpoint_url: HttpUrl | None = Field(
        default=None, description="Address to use instead of the region's public one."
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
    def _one_kind_of_credentials(self) -> Self:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise ValueError("give access_key_id and secret_access_key together, or neither")
        if self.session_token is not None and self.access_key_id is None:
            raise ValueError("session_token is of no use without the access_key_id it belongs to")
        if self.profile is not None and self.access_key_id is not None:
            raise ValueError(f"profile {self.profile!r} and access_key_id: give one of them")
        return self

    def address(self, service: str) -> str:
        if self.endpoint_url is not None:
            return str(self.endpoint_url)
        china = ".cn" if self.region.startswith("cn-") else ""
        return f"https://{service}.{self.region}.amazonaws.com{china}"

    def console(self, page: str) -> str:
        """The address of a page of the AWS console."""
        host = "console.aws.amazon.com"
        if self.region.startswith("cn-"):
            host = "console.amazonaws.cn"
        elif self.region.startswith("us-gov-"):
            host = "console.amazonaws-us-gov.com"
        service, _, fragment = page.partition("#")
        return f"https://{self.region}.{host}/{service}/home?region={self.region}#{fragment}"


class StepFunctions(AwsConnection):
    """AWS Step Functions in one region, and the credentials to use it.

    Example:
        Load the connection that is named like your account:
        ```python
        from prefect_webapi_aws.blocks import StepFunctions

        connection = StepFunctions.load("BLOCK_NAME")
        ```
    """

    _block_type_name = "AWS Step Functions"
    _block_type_slug = "aws-step-functions"
    _logo_url = HttpUrl(f"{_REPOSITORY}/raw/main/docs/img/aws-step-functions.png")
    _documentation_url = _DOCUMENT


class Athena(AwsConnection):
    """Amazon Athena in one region, and the credentials to use it.

    Example:
        Load the connection that is named like your account:
        ```python
        from prefect_webapi_aws.blocks import Athena

        connection = Athena.load("BLOCK_NAME")
        ```
    """

    _block_type_name = "Amazon Athena"
    _block_type_slug = "amazon-athena"
    _logo_url = HttpUrl(f"{_REPOSITORY}/raw/main/docs/img/amazon-athena.png")
    _documentation_url = _DOCUMENT

    work_group: str = Field(
        default="primary",
        pattern=r"^[a-zA-Z0-9._-]{1,128}$",
        description="Work group of queries that name none.",
    )
    output_location: str | None = Field(
        default=None,
        pattern=r"^s3://[^/]+(/.*)?$",
        description="Where results go, such as `s3://bucket/folder/`; empty: as the work group says.",
    )
