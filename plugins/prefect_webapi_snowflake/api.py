"""Requests of the SQL API, and which of its answers tell of a statement."""

from typing import Any, Literal

from prefect_webapi import RemoteClient, RemoteSystemError, error_of_status, path
from prefect_webapi.auth import TokenAuth
from prefect_webapi_snowflake.auth import KeyPair
from prefect_webapi_snowflake.blocks import Snowflake
from prefect_webapi_snowflake.models import StatementView

TOLD = (200, 202, 408, 422)
"""Answers about a statement, not about the request: they name it."""


class SqlApi:
    """A client of one account."""

    def __init__(self, connection: Snowflake) -> None:
        auth, kind = None, connection.token_type
        if connection.private_key is not None and connection.user is not None:
            key = (connection.private_key, connection.private_key_passphrase)
            auth = TokenAuth(KeyPair(connection.account, connection.user, *key))
            kind = "KEYPAIR_JWT"
        headers = {
            "Accept": "application/json",
            "User-Agent": "prefect-webapi",
            "X-Snowflake-Authorization-Token-Type": kind,
        }
        if connection.account_locator is not None:
            headers["Snowflake-Account"] = connection.account_locator
        self._client = RemoteClient(
            connection.url,
            token=connection.token,
            auth=auth,
            headers=headers,
            allow_insecure=connection.settings.allow_insecure,
        )

    async def ask(
        self, method: Literal["GET", "POST"], *segments: str, **arguments: Any
    ) -> StatementView:
        """What an answer tells of a statement, whatever its status.

        Raises:
            RemoteError: it tells of none.
        """
        answer = await self._client.request(method, _path(*segments), **arguments)
        if answer.status in TOLD:
            body: Any = answer.json()
            if isinstance(body, dict) and "statementHandle" in body:
                return StatementView.model_validate({**body, "http": answer.status})
        raise error_of_status(answer, method) or RemoteSystemError(
            f"the answer (HTTP {answer.status}) names no statement: {answer.beginning!r}",
            code="UnreadableAnswer",
        )

    async def partition(self, handle: str, nth: int) -> list[list[str | None]]:
        """Of a statement's rows."""
        return (await self._client.get(_path(handle), params={"partition": nth}))["data"]

    async def aclose(self) -> None:
        await self._client.aclose()


def _path(*segments: str) -> str:
    return path("api", "v2", "statements", *segments)
