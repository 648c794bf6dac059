"""What the vendors' plugins must stand that needs no server: refused credentials, odd answers, edited connections."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError  # pyright: ignore[reportMissingTypeStubs]
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from prefect.blocks.core import Block
from pydantic import SecretStr, ValidationError

from prefect_webapi import (
    Answer,
    AuthError,
    ConfigurationError,
    Outgoing,
    RemoteClient,
    RemoteError,
    RemoteSystemError,
)
from prefect_webapi.engine.contexts import StatusView
from prefect_webapi.http import Judge
from prefect_webapi_aws import Athena, AthenaQuery, StepFunctions
from prefect_webapi_aws.athena import AthenaPlugin
from prefect_webapi_aws.sigv4 import Signer, error_of
from prefect_webapi_databricks import Databricks
from prefect_webapi_databricks import errors as databricks
from prefect_webapi_flyte import FlyteConnector
from prefect_webapi_gcp import BigQuery, reasons
from prefect_webapi_http import HttpJobApi
from prefect_webapi_jobserver import JobServer
from prefect_webapi_snowflake import Snowflake, SnowflakeJob
from prefect_webapi_snowflake.auth import KeyPair
from prefect_webapi_snowflake.models import StatementHandle, StatementView
from prefect_webapi_snowflake.plugin import SnowflakePlugin
from tests.plugins.suite import view_of

CANARY = "c4n4ry-w0rd"
HANDLE = "01b2c3d4-0000-0000-0000-000000000000"
REQUEST = Outgoing("POST", "https://states.us-east-1.amazonaws.com/", {}, b"{}")


def aws_judge(answer: Answer, _: str) -> RemoteError | None:
    return error_of(answer)


@pytest.mark.parametrize(
    ("block", "given"),
    [
        (Athena, {"region": "us-east-1", "secret_access_key": CANARY}),
        (StepFunctions, {"region": "us-east-1", "session_token": CANARY}),
        (Databricks, {"host": "https://dbc.test", "client_id": "x", "token": CANARY}),
        (BigQuery, {"project": "p", "location": "EU", "service_account_info": CANARY}),
        (Snowflake, {"account": "a-b", "private_key": "k", "token": CANARY}),
        (FlyteConnector, {"token": CANARY}),
        (HttpJobApi, {"secret": CANARY}),
        (JobServer, {"token": CANARY}),
    ],
)
def test_a_block_that_is_refused_does_not_show_its_secret(
    block: type[Block], given: dict[str, Any]
) -> None:
    """REQ-62: as plain texts they come from a stored block too, and its error is in the run's log."""
    with pytest.raises(ValidationError) as caught:
        block(**given)
    assert CANARY not in str(caught.value)


async def test_credentials_that_can_not_be_renewed_yet_are_used_meanwhile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They are good for some minutes more; a try at each request, or on the loop, would hold up all jobs."""
    notes, file, config = (tmp_path / name for name in ("asked", "program.sh", "config"))
    until = (datetime.now(UTC) + timedelta(minutes=13)).isoformat()
    told = {"Version": 1, "AccessKeyId": "TMP", "SecretAccessKey": "s", "Expiration": until}
    file.write_text(f"echo '{json.dumps(told)}'\n")
    config.write_text(f"[profile batch]\ncredential_process = sh {file}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    signer = Signer(StepFunctions(region="us-east-1", profile="batch"), "states")
    await signer(REQUEST)
    file.write_text(f"echo asked >> {notes}\nexit 1\n")
    for _ in range(3):
        assert "Authorization" in await signer(REQUEST)
    assert notes.read_text().splitlines() == ["asked"]


@pytest.mark.parametrize(
    ("code", "kind"), [("AccessDenied", AuthError), ("InternalFailure", RemoteSystemError)]
)
async def test_a_role_that_is_refused_is_the_users_fault(
    monkeypatch: pytest.MonkeyPatch, code: str, kind: type[RemoteError]
) -> None:
    """REQ-63: STS answers with an error of its own kind."""

    def refuse(*_: object) -> None:
        raise ClientError({"Error": {"Code": code, "Message": "not you"}}, "AssumeRole")

    monkeypatch.setattr("botocore.session.Session.get_credentials", refuse)
    with pytest.raises(kind, match="not you") as caught:
        await Signer(StepFunctions(region="us-east-1"), "states")(REQUEST)
    assert caught.value.code == code
    assert not caught.value.job_may_exist


async def test_a_key_that_is_not_rsa_is_refused() -> None:
    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    with pytest.raises(ConfigurationError, match="no RSA key"):
        await KeyPair("a-b", "u", SecretStr(pem.decode()), None)()


# --- answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("judge", [aws_judge, databricks.judge, reasons.judge])
@pytest.mark.parametrize("body", [b"<html>Not Found</html>", b"[]", b""])
def test_a_page_that_is_missing_is_no_job_that_vanished(judge: Judge, body: bytes) -> None:
    """REQ-58: what a proxy or a wrong address answers tells nothing of the job, which would be made anew."""
    error = judge(Answer(404, {}, body), "GET")
    assert type(error) is RemoteSystemError
    assert not error.job_may_exist


async def test_an_edit_of_the_block_between_two_creates_makes_no_second_query(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """REQ-31: the answer to the first was lost; the engine takes the edited block for the next."""
    tokens: list[str] = []

    async def take(_: RemoteClient, *__: object, json: dict[str, str], **___: object) -> Answer:
        tokens.append(json["ClientRequestToken"])
        return Answer(200, {}, b'{"QueryExecutionId": "q"}')

    monkeypatch.setattr(RemoteClient, "request", take)
    for work_group in ("primary", "nightly"):
        plugin = AthenaPlugin(Athena(region="us-east-1", work_group=work_group))
        await plugin.create(view_of(AthenaQuery(query="SELECT 1"), "athena"))
    assert len(set(tokens)) == 1


@pytest.mark.parametrize("status", [202, 422])
async def test_the_rows_of_a_part_that_do_not_come_are_not_taken_for_none(
    monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """The answer tells of the statement, and brings no rows."""

    async def tell(*_: object, **__: object) -> Answer:
        return Answer(status, {}, f'{{"statementHandle": "{HANDLE}"}}'.encode())

    monkeypatch.setattr(RemoteClient, "request", tell)
    plugin = SnowflakePlugin(Snowflake(account="a-b", token=SecretStr(CANARY)))
    whole = StatementView(http=200, statement_handle="all", statement_handles=[HANDLE])
    task = view_of(SnowflakeJob(statement="SELECT 1; SELECT 2", statement_count=2), "snowflake")
    with pytest.raises(RemoteSystemError, match=f"HTTP {status}"):
        await plugin.outputs(StatusView(task, StatementHandle(statement="all"), whole))
