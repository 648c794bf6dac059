"""What AWS plugins share: their blocks, the credentials and signatures of requests, the meaning of errors."""

from __future__ import annotations

import asyncio
import json
import logging
import runpy
import sys
from datetime import UTC, datetime, timedelta
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.core import Block
from pydantic import SecretStr, ValidationError

from prefect_webapi import (
    Answer,
    AuthError,
    ConfigurationError,
    Outgoing,
    RemoteError,
    RemoteSystemError,
    RemoteUserError,
    Throttled,
)
from prefect_webapi_aws import (
    Athena,
    StepFunctions,
    athena_entry,
    express_entry,
    sigv4,
    step_functions_entry,
)
from prefect_webapi_aws.sigv4 import Signer, error_of
from tests.plugins.suite import BlockSuite

REQUEST = Outgoing(
    "POST", "https://states.us-east-1.amazonaws.com/", {"X-Amz-Target": "a.b"}, b"{}"
)


@pytest.mark.parametrize("block", [StepFunctions, Athena])
class TestBlocks(BlockSuite):
    @pytest.fixture
    def block(self, request: pytest.FixtureRequest) -> type[Block]:
        return request.param


def test_each_entry_is_announced_under_its_id() -> None:
    """REQ-48, REQ-49."""
    announced = entry_points(group="prefect_webapi.plugins")
    for entry in (step_functions_entry, express_entry, athena_entry):
        assert announced[entry.id].load() is entry
        assert entry.supported_task_types == [entry.id]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"access_key_id": "k"}, "access_key_id and secret_access_key together"),
        ({"secret_access_key": SecretStr("s")}, "access_key_id and secret_access_key together"),
        ({"session_token": SecretStr("t")}, "session_token is of no use"),
        (
            {"access_key_id": "k", "secret_access_key": SecretStr("s"), "profile": "p"},
            "profile 'p' and access_key_id: give one",
        ),
        ({"region": "Frankfurt"}, "region"),
        ({"regions": "us-east-1"}, "Extra inputs"),
    ],
)
def test_a_connection_that_can_not_work_is_refused(given: dict[str, Any], told: str) -> None:
    fields: dict[str, Any] = {"region": "us-east-1", **given}
    with pytest.raises(ValidationError, match=told):
        StepFunctions(**fields)


@pytest.mark.parametrize(
    ("region", "address", "console"),
    [
        ("eu-west-1", "athena.eu-west-1.amazonaws.com", "eu-west-1.console.aws.amazon.com"),
        ("cn-north-1", "athena.cn-north-1.amazonaws.com.cn", "cn-north-1.console.amazonaws.cn"),
        (
            "us-gov-west-1",
            "athena.us-gov-west-1.amazonaws.com",
            "us-gov-west-1.console.amazonaws-us-gov.com",
        ),
    ],
)
def test_regions_have_their_own_addresses(region: str, address: str, console: str) -> None:
    at = Athena(region=region)
    assert at.address("athena") == f"https://{address}"
    assert at.console("athena#/x") == f"https://{console}/athena/home?region={region}#/x"


# --- credentials and signatures --------------------------------------------------------------


async def signed(signer: Signer) -> dict[str, str]:
    given = await signer(REQUEST)
    return {
        name: value.get_secret_value() if isinstance(value, SecretStr) else value
        for name, value in given.items()
    }


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment without any; returns AWS's configuration file, which is empty."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    (config := tmp_path / "config").touch()
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return config


async def test_a_fixed_key_signs_with_its_token(caplog: pytest.LogCaptureFixture) -> None:
    """REQ-62: and botocore, which logs what it signs, is kept from it."""
    caplog.set_level(logging.DEBUG)
    at = StepFunctions(
        region="us-east-1",
        access_key_id="AKID",
        secret_access_key=SecretStr("s"),
        session_token=SecretStr("the-token"),
    )
    headers = await signed(Signer(at, "states"))
    assert set(headers) == {"X-Amz-Date", "X-Amz-Security-Token", "Authorization"}
    assert headers["X-Amz-Security-Token"] == "the-token"
    assert "Credential=AKID/" in headers["Authorization"]
    assert "/us-east-1/states/aws4_request" in headers["Authorization"]
    assert "host;x-amz-date;x-amz-security-token;x-amz-target" in headers["Authorization"]
    assert "the-token" not in caplog.text


async def test_the_environment_has_credentials(
    no_credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENVKEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    headers = await signed(Signer(StepFunctions(region="us-east-1"), "states"))
    assert "Credential=ENVKEY/" in headers["Authorization"]


async def test_no_credentials_at_all_are_named(no_credentials: Path) -> None:
    """Those of a role may come back: the connection is loaded anew once, as for refused ones."""
    with pytest.raises(AuthError, match="give the block an access key or a profile"):
        await signed(Signer(StepFunctions(region="us-east-1"), "states"))


class Program:
    """A program that gives temporary credentials to profile `batch`, and notes that it was asked."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.notes = folder / "asked"
        self.notes.touch()
        self.file = folder / "program.sh"
        config.write_text(f"[profile batch]\ncredential_process = sh {self.file}\n")

    def give(self, lives: timedelta, *, takes: float = 0.0) -> None:
        until = (datetime.now(UTC) + lives).isoformat()
        told = {"Version": 1, "AccessKeyId": "TMP", "SecretAccessKey": "s", "Expiration": until}
        self.file.write_text(
            f"echo asked >> {self.notes}\nsleep {takes}\necho '{json.dumps(told)}'\n"
        )

    def fail(self) -> None:
        self.file.write_text("echo 'the vault is sealed' >&2\nexit 1\n")

    @property
    def asked(self) -> int:
        return len(self.notes.read_text().splitlines())


@pytest.fixture
def program(no_credentials: Path, tmp_path: Path) -> Program:
    return Program(tmp_path, no_credentials)


@pytest.fixture
def signer() -> Signer:
    return Signer(StepFunctions(region="us-east-1", profile="batch"), "states")


async def test_requests_share_temporary_credentials(program: Program, signer: Signer) -> None:
    """1,000 jobs, one question."""
    program.give(timedelta(hours=1))
    together = await asyncio.gather(*(signed(signer) for _ in range(1000)))
    assert all("Credential=TMP/" in headers["Authorization"] for headers in together)
    assert program.asked == 1


async def test_credentials_are_renewed_before_their_end(program: Program, signer: Signer) -> None:
    """REQ-63."""
    program.give(timedelta(minutes=5))
    await signed(signer)
    program.give(timedelta(hours=1), takes=0.3)
    before, turns = program.asked, 0
    renewal = asyncio.ensure_future(signed(signer))
    while not renewal.done():
        await asyncio.sleep(0.01)
        turns += 1
    assert turns > 5, "the loop stood still meanwhile"
    for _ in range(3):
        await signed(signer)
    assert program.asked == before + 1


async def test_a_place_of_credentials_that_is_away_is_no_fault_of_the_user(
    program: Program, signer: Signer
) -> None:
    """Nothing was sent: create is repeated."""
    program.fail()
    with pytest.raises(RemoteSystemError, match="the vault is sealed") as caught:
        await signed(signer)
    assert not caught.value.job_may_exist


async def test_a_profile_that_does_not_exist_is_named(no_credentials: Path) -> None:
    at = StepFunctions(region="us-east-1", profile="nobody")
    with pytest.raises(ConfigurationError, match="nobody"):
        await signed(Signer(at, "states"))


async def test_without_botocore_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the module that uses it is imported all the same."""
    monkeypatch.setitem(sys.modules, "botocore", None)
    for name in [name for name in sys.modules if name.startswith("botocore.")]:
        monkeypatch.delitem(sys.modules, name)
    fresh = runpy.run_path(str(sigv4.__file__))
    with pytest.raises(ConfigurationError, match=r'pip install "prefect-webapi\[aws\]"'):
        await fresh["Signer"](StepFunctions(region="us-east-1"), "states")(REQUEST)


# --- errors ----------------------------------------------------------------------------------


def answer(status: int, body: str, **headers: str) -> Answer:
    return Answer(status, {k.replace("_", "-"): v for k, v in headers.items()}, body.encode())


_XML = (
    "<ErrorResponse><Error><Code>{}</Code>\n<Message>told</Message></Error><RequestId>1</RequestId>"
    "</ErrorResponse>"
)


@pytest.mark.parametrize(
    ("given", "kind", "code", "message"),
    [
        (
            answer(400, '{"__type": "ThrottlingException", "message": "Rate exceeded"}'),
            Throttled,
            "ThrottlingException",
            "Rate exceeded",
        ),
        (
            answer(400, '{"__type": "com.amazonaws.athena#TooManyRequestsException"}'),
            Throttled,
            "TooManyRequestsException",
            "TooManyRequestsException",
        ),
        (
            answer(400, '{"__type": "KmsThrottlingException"}'),
            Throttled,
            "KmsThrottlingException",
            "KmsThrottlingException",
        ),
        (
            answer(400, '{"message": "m"}', x_amzn_errortype="AccessDeniedException:http://x/#y"),
            AuthError,
            "AccessDeniedException",
            "m",
        ),
        (
            answer(403, _XML.format("SignatureDoesNotMatch")),
            AuthError,
            "SignatureDoesNotMatch",
            "told",
        ),
        (
            answer(403, _XML.format("InvalidClientTokenId")),
            AuthError,
            "InvalidClientTokenId",
            "told",
        ),
        (answer(403, _XML.format("AccessDenied")), AuthError, "AccessDenied", "told"),
        (
            answer(400, '{"__type": "KmsAccessDeniedException", "Message": "m"}'),
            RemoteUserError,
            "KmsAccessDeniedException",
            "m",
        ),
        (
            answer(
                400,
                '{"__type": "a#InvalidRequestException", "AthenaErrorCode": "B", "Message": "m"}',
            ),
            RemoteUserError,
            "B",
            "m",
        ),
        (
            answer(500, '{"__type": "InternalServerException", "Message": "m"}'),
            RemoteSystemError,
            "InternalServerException",
            "m",
        ),
        (answer(502, "<html>Bad Gateway</html>"), RemoteSystemError, "HTTP502", "Bad Gateway"),
        (answer(404, "no such page"), RemoteSystemError, "HTTP404", "no such page"),
        (answer(429, "slow"), Throttled, "HTTP429", "slow"),
        (answer(400, "[]"), RemoteUserError, "HTTP400", ""),
    ],
)
def test_the_code_says_what_an_error_means(
    given: Answer, kind: type[RemoteError], code: str, message: str
) -> None:
    """REQ-39: throttles and refused credentials come as 400 too; signatures are refused in XML."""
    error = error_of(given)
    assert error is not None
    assert type(error) is kind
    assert error.code == code
    assert message in error.message


def test_a_success_is_no_error() -> None:
    assert error_of(answer(200, '{"__type": "x"}')) is None
