"""Snowflake's plugin: the suite, and what is particular to Snowflake."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from contextlib import aclosing
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from runpy import run_path
from typing import Any, Literal
from urllib.parse import parse_qs
from uuid import UUID

import pytest
from prefect.blocks.core import Block
from pydantic import HttpUrl, SecretStr, ValidationError

from prefect_webapi import (
    AuthError,
    ConfigurationError,
    EngineSettings,
    NotFound,
    Phase,
    PluginConfig,
    RemoteClient,
)
from prefect_webapi.engine.contexts import DeleteView, GetView
from prefect_webapi_snowflake import Snowflake, SnowflakeJob, auth, entry
from prefect_webapi_snowflake import plugin as plugin_module
from prefect_webapi_snowflake.auth import KeyPair
from prefect_webapi_snowflake.models import Column, StatementHandle, StatementView
from prefect_webapi_snowflake.plugin import SnowflakePlugin
from prefect_webapi_snowflake.rows import records
from tests.plugins.suite import CANARY, WITHIN, BlockSuite, Outcome, OverHttp, Service
from tests.servers.base import Fault, Reply, Seen
from tests.servers.snowflake import SnowflakeServer
from tests.support.engine import Told
from tests.support.waiting import eventually
from tests.support.witness import records as ledger

HANDLE = StatementHandle(statement="01b2c3d4-0000-0000-0000-000000000000")


class TestSnowflakeBlock(BlockSuite):
    @pytest.fixture
    def block(self) -> type[Block]:
        return Snowflake


def view(http: int, code: str = "", state: str = "") -> StatementView:
    return StatementView(
        http=http, statement_handle=HANDLE.statement, code=code, sql_state=state, message="told"
    )


def query_of(seen: Seen) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(seen.query).items()}


class TestSnowflake(OverHttp):
    entry = entry
    plugin_class = SnowflakePlugin
    rows = (
        (view(202), Phase.RUNNING, None),
        (view(200), Phase.SUCCESS, None),
        (view(408, "000630", "57014"), Phase.PERMANENT_FAILURE, "user"),
        (view(422, "000630", "57014"), Phase.PERMANENT_FAILURE, "user"),
        (view(422, "000604", "57014"), Phase.ABORTED, None),
        (view(422, "002003", "42S02"), Phase.PERMANENT_FAILURE, "user"),
        (view(422, "100038", "22018"), Phase.PERMANENT_FAILURE, "user"),
        (view(422, "000603", "XX000"), Phase.RETRYABLE_FAILURE, "system"),
        (view(422, "300002", "58000"), Phase.RETRYABLE_FAILURE, "system"),
        (view(422, "000625", "40001"), Phase.RETRYABLE_FAILURE, "user"),
        (view(422), Phase.PERMANENT_FAILURE, "user"),
    )
    unknown = view(207)
    hints = False

    @pytest.fixture(scope="class")
    @classmethod
    def service(cls) -> Iterator[SnowflakeServer]:
        with SnowflakeServer(token=CANARY) as server:
            yield server

    def connection(
        self, service: SnowflakeServer, engine: PluginConfig, settings: EngineSettings
    ) -> Snowflake:
        return Snowflake(
            account="localorg-local_account",
            token=SecretStr(CANARY),
            endpoint=HttpUrl(service.url),
            warehouse="SMALL",
            database="SHOP",
            schema_name="PUBLIC",
            engine=engine,
            settings=settings,
        )

    def job(self, outcome: Outcome = "succeed", *, result: str = "done") -> SnowflakeJob:
        match outcome:
            case "fail":
                return SnowflakeJob(statement="SELECT * FROM sales_of_2031")
            case "never" | "queued":
                return SnowflakeJob(statement="SELECT 1 /* running 600 */")
            case "succeed":
                return SnowflakeJob(statement="SELECT ? AS told", bindings=[result])

    def throttled(self, hint: float | None) -> Reply:
        return Reply(429, {"code": "390505", "message": "Too many requests"})

    def unauthorized(self) -> Reply:
        return Reply(401, {"code": "390318", "message": "OAuth access token expired."})

    def unknown_handle(self) -> StatementHandle:
        return HANDLE

    def handle_of(self, name: str) -> StatementHandle:
        return StatementHandle(statement=name)

    @pytest.mark.parametrize("phase", ["never"])
    async def test_a_cancelled_job_is_over_at_the_service(
        self, service: Service, tmp_path: Path, phase: Literal["queued", "never"]
    ) -> None:
        """Once: the API does not tell a statement that waits for its warehouse from one that runs."""
        await super().test_a_cancelled_job_is_over_at_the_service(service, tmp_path, phase)

    # --- one statement per request id --------------------------------------------------------

    async def test_only_a_repetition_says_so(
        self, service: SnowflakeServer, tmp_path: Path
    ) -> None:
        """CASE-042: without `retry=true` the server runs it again; a throttle proves that it saw nothing."""
        service.spoil(Fault("create", self.throttled(None)))
        service.spoil(Fault("create", None, carried_out=True))
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, self.job())
        assert outcome.info.phase is Phase.SUCCESS, outcome.info
        asked = [query_of(seen) for seen in service.calls("create")]
        assert [each.get("retry") for each in asked] == [None, None, "true"]
        assert len({UUID(each["requestId"]) for each in asked}) == 1
        assert service.made() == 1

    async def test_the_next_process_knows_that_it_repeats(
        self, service: SnowflakeServer, tmp_path: Path
    ) -> None:
        """KP-07: the first one died after the request left."""
        spec = self.job("never")
        service.spoil(Fault("create", None, carried_out=True, times=100))
        with self.host(tmp_path, service, retryBase="60s", retryCap="60s") as host:
            self.asked(host, spec, execution="one")
            await eventually(lambda: service.calls("create"), within=WITHIN)
        service.faults.clear()
        with self.host(tmp_path, service) as host:
            ticket = self.asked(host, spec, execution="two", reporter=(told := Told()))
            await eventually(lambda: "RUNNING" in told.names, within=WITHIN)
            ticket.cancel("the test is over")
            await ticket.outcome()
        assert query_of(service.calls("create")[-1]).get("retry") == "true"
        assert (service.made(), service.live()) == (1, 0)

    async def test_a_statement_that_failed_meanwhile_is_not_run_again(
        self, service: SnowflakeServer, tmp_path: Path
    ) -> None:
        """A 422 to the repetition is the statement's own end."""
        service.spoil(Fault("create", None, carried_out=True))
        with self.host(tmp_path, service, retryBase="500ms", retryCap="500ms") as host:
            outcome = await self.outcome(host, self.job("fail"))
        assert outcome.info.err is not None
        assert (outcome.info.err.code, outcome.info.err.kind) == ("002003", "user")
        assert service.made() == 1

    # --- what is sent ------------------------------------------------------------------------

    async def test_values_are_bound_and_never_pasted(
        self, service: SnowflakeServer, tmp_path: Path
    ) -> None:
        """CASE-263."""
        nasty = "it's; DROP TABLE x --\n\"☃"
        statement = "SELECT ? AS word, ? AS n, ? AS yes, ? AS price, ? AS day"
        values = [nasty, 2**53 + 1, True, Decimal("0.10"), date(2026, 1, 2)]
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, SnowflakeJob(statement=statement, bindings=values))
        assert outcome.info.phase is Phase.SUCCESS, outcome.info
        (row,) = outcome.value.rows
        assert (row["word"], row["n"], row["day"]) == (nasty, 2**53 + 1, "2026-01-02")
        (sent,) = service.calls("create")
        assert sent.json["statement"] == statement
        kinds = [sent.json["bindings"][str(n)]["type"] for n in range(1, 6)]
        assert kinds == ["TEXT", "FIXED", "BOOLEAN", "FIXED", "TEXT"]

    async def test_a_statement_says_where_it_runs_and_whose_it_is(
        self, service: SnowflakeServer, tmp_path: Path
    ) -> None:
        """CASE-271: the spec's place goes before the connection's; the tag tells the job and its runs."""
        spec = SnowflakeJob(statement="SELECT 1", warehouse="LARGE", timeout_seconds=60)
        with self.host(tmp_path, service) as host:
            await self.outcome(host, spec, task_run="t-1", labels={"team": "ops"})
        (sent,) = service.calls("create")
        body = sent.json
        assert (body["warehouse"], body["database"], body["schema"]) == ("LARGE", "SHOP", "PUBLIC")
        assert "role" not in body
        assert body["timeout"] == 60
        (record,) = await ledger(tmp_path)
        tag = json.loads(body["parameters"]["query_tag"])
        assert (tag["job_key"], tag["task_run_id"], tag["team"]) == (record.key, "t-1", "ops")

    async def test_a_tag_too_long_keeps_the_job_key(
        self, service: SnowflakeServer, tmp_path: Path
    ) -> None:
        with self.host(tmp_path, service) as host:
            await self.outcome(host, self.job(), labels={"note": "x" * 3000})
        (sent,) = service.calls("create")
        assert list(json.loads(sent.json["parameters"]["query_tag"])) == ["job_key"]

    # --- results -----------------------------------------------------------------------------

    @pytest.mark.parametrize("too_large", [False, True])
    async def test_a_result_comes_in_partitions(
        self, service: SnowflakeServer, tmp_path: Path, too_large: bool
    ) -> None:
        """The first one comes with the statement's end, unless the code is 391908."""
        service.too_large = too_large
        statement = "SELECT value AS n, value / 2.0 AS half FROM json_each(?)"
        spec = SnowflakeJob(statement=statement, bindings=["[1, 2, 3, 4, 5]"])
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, spec)
        assert outcome.info.phase is Phase.SUCCESS, outcome.info
        assert outcome.value.rows == [{"n": n, "half": n / 2} for n in range(1, 6)]
        assert outcome.value.results[0].columns == {"n": "fixed", "half": "real"}
        asked = [query_of(seen)["partition"] for seen in service.calls("outputs")]
        assert asked == (["0", "1", "2"] if too_large else ["1", "2"])

    async def test_no_partition_is_read_after_the_one_that_is_too_much(
        self, service: SnowflakeServer, tmp_path: Path
    ) -> None:
        """CASE-235: counted while it is read."""
        rows = json.dumps(["x" * 30] * 100)
        spec = SnowflakeJob(statement="SELECT value FROM json_each(?)", bindings=[rows])
        with self.host(tmp_path, service, maxDatasetSizeBytes=200) as host:
            outcome = await self.outcome(host, spec)
        assert outcome.info.err is not None
        assert outcome.info.err.code == "OutputSizeExceeded"
        assert len(service.calls("outputs")) == 2

    async def test_each_of_several_statements_has_its_result(
        self, service: SnowflakeServer, tmp_path: Path
    ) -> None:
        script = "CREATE TABLE t (a); INSERT INTO t VALUES (1), (2), (3); SELECT a FROM t"
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, SnowflakeJob(statement=script, statement_count=3))
        assert outcome.info.phase is Phase.SUCCESS, outcome.info
        _, inserted, _ = outcome.value.results
        assert inserted.changed == 3
        assert outcome.value.rows == [{"a": 1}, {"a": 2}, {"a": 3}]
        assert len({each.handle for each in outcome.value.results}) == 3

    async def test_a_wrong_count_of_statements_is_the_users_fault(
        self, service: SnowflakeServer, tmp_path: Path
    ) -> None:
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, SnowflakeJob(statement="SELECT 1; SELECT 2"))
        assert (outcome.info.phase, outcome.info.kind) == (Phase.PERMANENT_FAILURE, "user")
        assert outcome.info.err is not None
        assert "did not match" in outcome.info.err.message

    async def test_rows_that_are_not_wanted_are_not_fetched(
        self, service: SnowflakeServer, tmp_path: Path
    ) -> None:
        spec = SnowflakeJob(statement="SELECT value FROM json_each('[1, 2, 3]')", rows=False)
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, spec)
        assert outcome.value.results[0].rows is None
        assert service.calls("outputs") == []

    # --- ends --------------------------------------------------------------------------------

    async def test_a_statements_own_time_out_is_told(
        self, service: SnowflakeServer, tmp_path: Path
    ) -> None:
        """408 about a statement is its end, not the request's."""
        spec = SnowflakeJob(statement="SELECT 1 /* running 600 */", timeout_seconds=1)
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, spec)
        assert (outcome.info.phase, outcome.info.kind) == (Phase.PERMANENT_FAILURE, "user")
        assert outcome.info.err is not None
        assert outcome.info.err.code == "Timeout"
        assert (service.made(), len(service.calls("create"))) == (1, 1)

    async def test_a_408_of_a_gateway_proves_nothing(
        self, service: SnowflakeServer, tmp_path: Path
    ) -> None:
        service.spoil(Fault("create", Reply(408, b"Request Timeout"), carried_out=True))
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, self.job())
        assert outcome.info.phase is Phase.SUCCESS, outcome.info
        assert service.made() == 1

    async def test_a_cancel_that_fails_while_the_statement_runs_is_repeated(
        self, service: SnowflakeServer, tmp_path: Path
    ) -> None:
        """REQ-46: 422 to a cancel is fine only where the statement is over."""
        body = {"code": "000000", "message": "not now", "statementHandle": HANDLE.statement}
        service.spoil(Fault("delete", Reply(422, body), times=2))
        with self.host(tmp_path, service) as host:
            ticket = self.asked(host, self.job("never"), reporter=(told := Told()))
            await eventually(lambda: "RUNNING" in told.names, within=WITHIN)
            ticket.cancel("enough")
            async with asyncio.timeout(WITHIN):
                outcome = await ticket.outcome()
        assert outcome.info.phase is Phase.ABORTED
        assert len(service.calls("delete")) == 3
        assert service.live() == 0

    async def test_a_statement_cancelled_by_somebody_else_is_no_success(
        self, service: SnowflakeServer, plugin: SnowflakePlugin, tmp_path: Path
    ) -> None:
        """CASE-107."""
        with self.host(tmp_path, service) as host:
            ticket = self.asked(host, self.job("never"), reporter=(told := Told()))
            await eventually(lambda: "RUNNING" in told.names, within=WITHIN)
            (handle,) = service.statements
            await plugin.delete(DeleteView(StatementHandle(statement=handle), "an operator"))
            async with asyncio.timeout(WITHIN):
                outcome = await ticket.outcome()
        assert outcome.info.phase is not Phase.SUCCESS
        assert "canceled" in outcome.info.reason

    async def test_the_query_id_is_shown_with_its_page_in_snowsight(
        self, service: SnowflakeServer, tmp_path: Path
    ) -> None:
        told = Told()
        with self.host(tmp_path, service) as host:
            await self.outcome(host, self.job(), reporter=told)
        (handle,) = service.statements
        at = "https://app.snowflake.com/localorg/local_account/#/compute/history/queries"
        links = {(log.name, log.uri) for info in told.infos for log in info.info.logs}
        assert links == {(f"Query {handle}", f"{at}/{handle}/detail")}

    async def test_the_query_id_is_shown_where_the_page_is_not_known(
        self, service: SnowflakeServer
    ) -> None:
        plugin = SnowflakePlugin(Snowflake(account="xy12345", token=SecretStr("t")))
        (part,) = self.judged(plugin, view(202)).info.external_resources
        assert part.external_id == HANDLE.statement
        await plugin.aclose()

    # --- keys --------------------------------------------------------------------------------

    @pytest.mark.parametrize("passphrase", ["", "open sesame"])
    async def test_a_key_pair_gets_in_and_its_token_is_renewed(
        self, service: SnowflakeServer, monkeypatch: pytest.MonkeyPatch, passphrase: str
    ) -> None:
        """The server checks signature, issuer, subject and life."""
        monkeypatch.setattr(auth, "LIVES", timedelta(seconds=2))
        plugin = SnowflakePlugin(key_connection(service, passphrase))
        made = await plugin.create(self.view(self.job("never")))

        async def renewed() -> bool:
            await plugin.get(GetView(made.resource_meta))
            return len({seen.headers["authorization"] for seen in service.seen}) == 2

        await eventually(renewed, within=WITHIN)
        await plugin.aclose()
        assert all(seen.status in (200, 202) for seen in service.seen)

    async def test_an_oauth_token_says_that_it_is_one(self, service: SnowflakeServer) -> None:
        """And names the account's locator, where the block gives it. The server knows no OAuth tokens."""
        block = Snowflake(
            account="localorg-local_account",
            token=SecretStr("from-elsewhere"),
            token_type="OAUTH",
            account_locator="XY12345",
            endpoint=HttpUrl(service.url),
        )
        plugin = SnowflakePlugin(block)
        with pytest.raises(AuthError, match="Invalid OAuth access token"):
            await plugin.get(GetView(HANDLE))
        await plugin.aclose()
        (seen,) = service.seen
        assert seen.headers["x-snowflake-authorization-token-type"] == "OAUTH"
        assert seen.headers["snowflake-account"] == "XY12345"

    async def test_a_signed_token_lives_as_long_as_snowflake_allows(
        self, service: SnowflakeServer
    ) -> None:
        """The server refuses more than an hour, before it looks for the statement."""
        plugin = SnowflakePlugin(key_connection(service))
        with pytest.raises(NotFound):
            await plugin.get(GetView(HANDLE))
        await plugin.aclose()

    async def test_a_key_that_is_not_the_users_does_not_get_in(
        self, service: SnowflakeServer
    ) -> None:
        other = SnowflakeServer()
        block = key_connection(service).model_copy(
            update={"private_key": SecretStr(other.key_file())}
        )
        plugin = SnowflakePlugin(block)
        with pytest.raises(AuthError, match="JWT token is invalid"):
            await plugin.get(GetView(HANDLE))
        await plugin.aclose()


def key_connection(service: SnowflakeServer, passphrase: str = "") -> Snowflake:
    return Snowflake(
        account="localorg-local_account",
        user="runner",
        private_key=SecretStr(service.key_file(passphrase)),
        private_key_passphrase=SecretStr(passphrase) if passphrase else None,
        endpoint=HttpUrl(service.url),
    )


@pytest.mark.parametrize(
    "pem", ["no key", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
async def test_a_key_that_can_not_be_read_is_told_and_not_shown(pem: str) -> None:
    with pytest.raises(ConfigurationError, match="can't be read") as caught:
        await KeyPair("org-account", "me", SecretStr(pem), None)()
    assert pem not in str(caught.value)


@pytest.mark.parametrize(
    ("account", "url", "page"),
    [
        ("MyOrg-My_Acct", "https://myorg-my-acct.snowflakecomputing.com", "myorg/my_acct"),
        (
            "xy12345.eu-central-1",
            "https://xy12345.eu-central-1.snowflakecomputing.com",
            "eu-central-1/xy12345",
        ),
        ("xy12345", "https://xy12345.snowflakecomputing.com", None),
    ],
)
def test_an_account_has_an_address_and_a_page(account: str, url: str, page: str | None) -> None:
    block = Snowflake(account=account, token=SecretStr("t"))
    assert block.url == url
    shown = page and f"https://app.snowflake.com/{page}/#/compute/history/queries/01b/detail"
    assert block.page_of("01b") == shown


@pytest.mark.parametrize(
    ("credentials", "told"),
    [
        ({}, "either `private_key`"),
        ({"token": "t", "private_key": "k", "user": "u"}, "either `private_key`"),
        ({"private_key": "k"}, "needs the `user`"),
        ({"token": "t", "account": "https://x.snowflakecomputing.com"}, "account"),
    ],
)
def test_a_connection_that_can_not_work_is_refused(credentials: dict[str, Any], told: str) -> None:
    given: dict[str, Any] = {"account": "org-account", **credentials}
    with pytest.raises(ValidationError, match=re.escape(told)):
        Snowflake(**given)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"statement": ""}, "statement"),
        ({"statement": "SELECT ?", "bindings": [None]}, "value 1 is None"),
        ({"statement": "SELECT ?", "bindings": [1, [2]]}, "value 2 is [2]"),
        (
            {"statement": "SELECT ?; SELECT 1", "bindings": [1], "statement_count": 2},
            "one statement only",
        ),
        ({"statement": "SELECT 1", "parameters": {"query_tag": "mine"}}, "which is set for you"),
        ({"statement": "SELECT 1", "timeout_seconds": 604_801}, "timeout_seconds"),
    ],
)
def test_a_spec_that_can_not_work_is_refused_before_any_request(
    spec: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValidationError, match=re.escape(told)):
        SnowflakeJob(**spec)


@pytest.mark.parametrize(
    ("kind", "scale", "text", "value"),
    [
        ("fixed", 0, "9007199254740993", 9007199254740993),
        ("fixed", 2, "0.10", "0.10"),
        ("real", None, "0.5", 0.5),
        ("real", None, "NaN", "NaN"),
        ("boolean", None, "true", True),
        ("text", None, "it's", "it's"),
        ("variant", None, '{"a": [1]}', {"a": [1]}),
        ("date", None, "18262", "2020-01-01"),
        ("date", None, "2020-01-01", "2020-01-01"),  # DATE_OUTPUT_FORMAT was given
        ("time", None, "82919.000000000", "23:01:59"),
        ("timestamp_ntz", None, "1611871777.123456789", "2021-01-28T22:09:37.123456789"),
        ("timestamp_ntz", None, "-0.500000000", "1969-12-31T23:59:59.5"),
        ("timestamp_ltz", None, "1611871777.000000000", "2021-01-28T22:09:37+00:00"),
        ("timestamp_tz", None, "1616173619.000000000 960", "2021-03-19T09:06:59-08:00"),
        ("fixed", 0, None, None),
    ],
)
def test_every_type_of_a_column_becomes_a_value(
    kind: str, scale: int | None, text: str | None, value: Any
) -> None:
    """Texts as the guide "Handling responses" shows them."""
    assert records([Column(name="a", type=kind, scale=scale)], [[text]]) == [{"a": value}]


def test_columns_of_equal_names_are_all_there() -> None:
    columns = [Column(name="A", type="text"), Column(name="A", type="text")]
    assert records(columns, [["1", "2"]]) == [{"A": "1", "A_2": "2"}]


def test_a_moment_is_bound_in_iso_8601() -> None:
    spec = SnowflakeJob(statement="SELECT ?", bindings=[datetime(2026, 1, 2, 3, tzinfo=UTC)])
    assert spec.as_bindings() == {"1": {"type": "TEXT", "value": "2026-01-02T03:00:00+00:00"}}


async def test_the_library_for_tokens_is_asked_for_by_its_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The modules load without it."""
    monkeypatch.setitem(sys.modules, "jwt", None)
    for module in (auth, plugin_module):
        run_path(str(module.__file__))
    with pytest.raises(ConfigurationError, match=r"prefect-webapi\[snowflake\]"):
        await KeyPair("org-account", "me", SecretStr("any"), None)()


# --- the server that all of this rests on ----------------------------------------------------

STATEMENTS, ASYNC = "/api/v2/statements", {"async": "true"}
ONE: dict[str, Any] = {"statement": "SELECT 1"}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({**ONE, "bindngs": {}}, ASYNC, "391917"),
    ({**ONE, "timeout": "60"}, ASYNC, "391917"),
    ({**ONE, "bindings": {"1": {"type": "NUMBER", "value": "1"}}}, ASYNC, "391917"),
    ({**ONE, "bindings": {"2": {"type": "TEXT", "value": "x"}}}, ASYNC, "391910"),
    ({**ONE, "parameters": {"colour": "red"}}, ASYNC, "391918"),
    (ONE, {**ASYNC, "requestID": "x"}, "391901"),
    (ONE, {**ASYNC, "requestId": "no uuid"}, "391904"),
    (ONE, {"async": "yes"}, "391901"),
]


def api_of(server: SnowflakeServer, token: str = CANARY, **headers: str) -> RemoteClient:
    kind = {"X-Snowflake-Authorization-Token-Type": "PROGRAMMATIC_ACCESS_TOKEN"}
    return RemoteClient(server.url, token=SecretStr(token), headers=kind | headers)


@pytest.fixture
def server() -> Iterator[SnowflakeServer]:
    with SnowflakeServer(token=CANARY) as server:
        yield server


@pytest.mark.parametrize(("body", "params", "code"), REFUSED)
async def test_the_server_refuses_what_snowflake_refuses(
    server: SnowflakeServer, body: dict[str, Any], params: dict[str, Any], code: str
) -> None:
    async with aclosing(api_of(server)) as api:
        refused = await api.request("POST", STATEMENTS, json=body, params=params)
    assert (refused.status, refused.at("code"), server.made()) == (400, code, 0)


async def test_the_server_knows_who_asks_and_for_what(server: SnowflakeServer) -> None:
    asked = {
        401: api_of(server, "stolen"),
        400: api_of(server, **{"User-Agent": ""}),
        415: api_of(server, **{"Content-Type": "text/plain"}),
    }
    for status, api in asked.items():
        async with aclosing(api):
            answer = await api.request("POST", STATEMENTS, json=ONE, params=ASYNC)
        assert answer.status == status, answer.text
    assert server.made() == 0
