"""The connection: which account, how to get in, where statements run, how hard to push it."""

from typing import Literal, Self

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, HttpUrl, SecretStr, model_validator

from prefect_webapi import EngineSettings, PluginConfig, RateLimiterConfig

_REPOSITORY = "https://github.com/prefect-webapi/prefect-webapi"


class Snowflake(Block):
    """A Snowflake account, the credentials to use it, and where statements run unless they say otherwise.

    Example:
        Load the connection that is named like your account:
        ```python
        from prefect_webapi_snowflake.blocks import Snowflake

        warehouse = Snowflake.load("BLOCK_NAME")
        ```
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
    _block_type_name = "Snowflake"
    _block_type_slug = "snowflake"
    _logo_url = HttpUrl(f"{_REPOSITORY}/raw/main/docs/img/snowflake.png")
    _documentation_url = HttpUrl(f"{_REPOSITORY}/blob/main/docs/plugins/snowflake.md")

    account: str = Field(
        pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$",
        description="Account identifier: `organization-account`, or a locator such as "
        "`xy12345.eu-central-1`.",
    )
    user: str | None = Field(default=None, description="Who signs in with `private_key`.")
    private_key: SecretStr | None = Field(
        default=None, description="The user's private key (PEM), for key-pair authentication."
    )
    private_key_passphrase: SecretStr | None = Field(
        default=None, description="Passphrase of an encrypted `private_key`."
    )
    token: SecretStr | None = Field(default=None, description="A token, in place of a key.")
    token_type: Literal["OAUTH", "PROGRAMMATIC_ACCESS_TOKEN"] = Field(
        default="PROGRAMMATIC_ACCESS_TOKEN", description="What kind of token `token` is."
    )
    account_locator: str | None = Field(
        default=None,
        description="The account's locator; OAuth needs it with an `organization-account` name.",
    )
    warehouse: str | None = Field(default=None, description="Case counts, here and below.")
    database: str | None = Field(default=None, description="Of names that give none.")
    schema_name: str | None = Field(default=None, description="Of names that give none.")
    role: str | None = Field(default=None, description="Instead of the user's default role.")
    endpoint: HttpUrl | None = Field(
        default=None, description="Root URL, for private links; absent: made from `account`."
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
    def _has_one_credential(self) -> Self:
        if (self.private_key is None) == (self.token is None):
            raise ValueError("give either `private_key` (with `user`) or `token`")
        if self.private_key is not None and not self.user:
            raise ValueError("`private_key` needs the `user` whose key it is")
        return self

    @property
    def url(self) -> str:
        """Host names have no underscores; account names may."""
        host = self.account.lower().replace("_", "-")
        return str(self.endpoint or f"https://{host}.snowflakecomputing.com")

    def page_of(self, statement: str) -> str | None:
        """Where Snowsight shows a statement; None: the account's name does not tell."""
        locator, dot, region = self.account.lower().partition(".")
        organization, dash, name = self.account.lower().partition("-")
        if not dot and not dash:
            return None
        at = f"{region}/{locator}" if dot else f"{organization}/{name}"
        return f"https://app.snowflake.com/{at}/#/compute/history/queries/{statement}/detail"
