"""Amazon Athena: what every plugin must do, and tokens, batches, parameters, results and kinds of errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pydantic import HttpUrl, SecretStr, ValidationError

from prefect_webapi import AlreadyExists, EngineSettings, NotFound, Phase, PluginConfig
from prefect_webapi.engine.contexts import DeleteView, GetView
from prefect_webapi_aws import Athena, AthenaQuery, QueryResult, athena_entry
from prefect_webapi_aws.athena import AthenaPlugin
from prefect_webapi_aws.athena_models import AthenaError, Query, QueryHandle
from tests.plugins.suite import CANARY, MESSAGE, Outcome, OverHttp
from tests.servers.athena import AthenaServer
from tests.servers.aws import REGION, refused
from tests.servers.base import Fault, Reply


@pytest.fixture(scope="module")
def server() -> Iterator[AthenaServer]:
    with AthenaServer() as server:
        yield server


def sql(**plan: Any) -> str:
    return f"SELECT * FROM figures /* {json.dumps(plan)} */"


def failed(category: int, *, retryable: bool = False) -> Query:
    return Query(state="FAILED", error=AthenaError(category=category, retryable=retryable))


class TestAthena(OverHttp):
    entry = athena_entry
    plugin_class = AthenaPlugin
    rows = (
        (Query(state="QUEUED"), Phase.QUEUED, None),
        (Query(state="RUNNING"), Phase.RUNNING, None),
        (Query(state="SUCCEEDED"), Phase.SUCCESS, None),
        (Query(state="CANCELLED", reason="by a person"), Phase.ABORTED, None),
        (Query(state="FAILED"), Phase.PERMANENT_FAILURE, "user"),
        (failed(1), Phase.PERMANENT_FAILURE, "system"),
        (failed(1, retryable=True), Phase.RETRYABLE_FAILURE, "system"),
        (failed(2), Phase.PERMANENT_FAILURE, "user"),
        (failed(2, retryable=True), Phase.RETRYABLE_FAILURE, "user"),
        (failed(3), Phase.PERMANENT_FAILURE, "user"),
        (failed(3, retryable=True), Phase.RETRYABLE_FAILURE, "user"),
    )
    unknown = Query(state="PONDERING")
    hints = False

    @pytest.fixture(scope="class")
    @classmethod
    def service(cls, server: AthenaServer) -> AthenaServer:
        return server

    def connection(
        self, service: AthenaServer, engine: PluginConfig, settings: EngineSettings
    ) -> Athena:
        return Athena(
            region=REGION,
            access_key_id="test",
            secret_access_key=SecretStr(CANARY),
            session_token=SecretStr(CANARY),
            endpoint_url=HttpUrl(service.url),
            output_location="s3://results/here/",
            engine=engine,
            settings=settings,
        )

    def job(self, outcome: Outcome = "succeed", *, result: str = "done") -> AthenaQuery:
        match outcome:
            case "succeed":
                return AthenaQuery(query=sql(columns=[["a", "varchar"]], rows=[[result]]))
            case "fail":
                return AthenaQuery(query=sql(outcome="fail", message=MESSAGE))
            case "never" | "queued":
                return AthenaQuery(query=sql(outcome=outcome))

    def throttled(self, hint: float | None) -> Reply:
        return refused(
            "TooManyRequestsException", "slow down", Reason="CONCURRENT_QUERY_LIMIT_EXCEEDED"
        )

    def unauthorized(self) -> Reply:
        return refused("UnrecognizedClientException", "The security token is invalid")

    def unknown_handle(self) -> QueryHandle:
        return QueryHandle(id="00000000-0000-4000-8000-000000000000")

    def handle_of(self, name: str) -> QueryHandle:
        return QueryHandle(id=name)

    # --- tokens ------------------------------------------------------------------------------

    async def test_one_token_is_one_query(
        self, service: AthenaServer, plugin: AthenaPlugin
    ) -> None:
        """REQ-24: it is made of the job key, and long enough for Athena."""
        first = await plugin.create(self.view(self.job("never")))
        again = await plugin.create(self.view(self.job("never")))
        assert first.resource_meta == again.resource_meta
        assert service.made() == 1
        token = service.calls("create")[0].json["ClientRequestToken"]
        assert token.startswith("jkey" + "0" * 22 + "-")
        assert 32 <= len(token) <= 128

    async def test_another_query_under_our_token_is_left_alone(
        self, service: AthenaServer, tmp_path: Path, plugin: AthenaPlugin
    ) -> None:
        """REQ-34."""
        await plugin.create(self.view(self.job(result="mine")))
        with pytest.raises(AlreadyExists):
            await plugin.create(self.view(self.job(result="yours")))
        assert service.made() == 1

    @pytest.mark.parametrize("other", [{"parameters": [2]}, {"work_group": "b"}, {"catalog": "c"}])
    async def test_what_athena_does_not_compare_makes_another_query(
        self, service: AthenaServer, plugin: AthenaPlugin, other: dict[str, Any]
    ) -> None:
        """Under one token it would hand out the result of the first."""
        spec = AthenaQuery(query="SELECT ?", parameters=(1,), work_group="primary")
        first = await plugin.create(self.view(spec))
        given = spec.model_dump() | other
        tokens = [call.json["ClientRequestToken"] for call in service.calls("create")]
        if other.get("work_group") == "b":
            service.spoil(Fault("create", Reply(200, {"QueryExecutionId": "moto-has-no-b"})))
        second = await plugin.create(self.view(AthenaQuery(**given)))
        assert service.calls("create")[1].json["ClientRequestToken"] not in tokens
        assert first.resource_meta != second.resource_meta

    # --- what is sent ------------------------------------------------------------------------

    async def test_a_value_with_a_quote_arrives_as_a_bind_value(
        self, service: AthenaServer, plugin: AthenaPlugin
    ) -> None:
        """CASE-263: Athena takes a parameter for an expression where it can, `1 OR 1=1` for one."""
        values = ("it's", "1 OR 1=1", 7, -2.5, 1e30, True, None, "")
        await plugin.create(self.view(AthenaQuery(query="SELECT ?", parameters=values)))
        (sent,) = (call.json for call in service.calls("create"))
        assert sent["QueryString"] == "SELECT ?"
        assert sent["ExecutionParameters"] == [
            *("'it''s'", "'1 OR 1=1'", "7", "-2.5", "1E+30", "TRUE", "NULL", "''")
        ]

    async def test_the_spec_goes_before_the_connection(
        self, service: AthenaServer, plugin: AthenaPlugin
    ) -> None:
        spec = AthenaQuery(query="SELECT 1", database="d", catalog="c", output_location="s3://mine")
        await plugin.create(self.view(AthenaQuery(query="SELECT 1")))
        await plugin.create(self.view(spec))
        plain, full = (call.json for call in service.calls("create"))
        assert plain["WorkGroup"] == full["WorkGroup"] == "primary"
        assert plain["ResultConfiguration"] == {"OutputLocation": "s3://results/here/"}
        assert full["ResultConfiguration"] == {"OutputLocation": "s3://mine"}
        assert full["QueryExecutionContext"] == {"Database": "d", "Catalog": "c"}
        assert "QueryExecutionContext" not in plain
        assert "ExecutionParameters" not in plain

    # --- batches -----------------------------------------------------------------------------

    async def test_fifty_queries_are_read_by_one_call(
        self, service: AthenaServer, plugin: AthenaPlugin
    ) -> None:
        """REQ-37: in the order asked for, whatever the order told."""
        assert plugin.max_batch == 50
        done = GetView((await plugin.create(self.view(self.job()))).resource_meta)
        await self.over(plugin, done)
        other = AthenaQuery(query=sql(outcome="never"), parameters=(1,))
        runs = GetView((await plugin.create(self.view(other))).resource_meta)
        before = len(service.times("get"))
        states = [query and query.state for query in await plugin.get_many([done, runs])]
        assert states[0] == "SUCCEEDED"
        assert states[1] in ("QUEUED", "RUNNING")
        assert len(service.times("get_many")) == 1
        assert len(service.times("get")) == before

    @pytest.mark.parametrize("code", ["UnknownOperationException", "AccessDeniedException"])
    async def test_without_batches_each_query_is_read_alone(
        self, service: AthenaServer, plugin: AthenaPlugin, tmp_path: Path, code: str
    ) -> None:
        """Servers that imitate Athena lack the call, and a policy may not allow it; it is asked for once."""
        service.spoil(Fault("get_many", refused(f"com.amazonaws#{code}", "no"), times=100))
        two = [GetView(self.unknown_handle())] * 2
        for _ in range(3):
            assert await plugin.get_many(two) == [None, None]
        assert len(service.times("get_many")) == 1
        with self.host(tmp_path, service) as host:
            tickets = [
                self.asked(host, self.job(result=f"{nth};"), nth=nth, task_run=f"t{nth}")
                for nth in range(3)
            ]
            outcomes = [await ticket.outcome() for ticket in tickets]
        assert all(outcome.info.phase is Phase.SUCCESS for outcome in outcomes)

    # --- ends --------------------------------------------------------------------------------

    async def test_a_stop_leaves_a_query_that_is_over_as_it_is(
        self, service: AthenaServer, plugin: AthenaPlugin
    ) -> None:
        """REQ-43."""
        done = GetView((await plugin.create(self.view(self.job()))).resource_meta)
        await self.over(plugin, done)
        await plugin.delete(DeleteView(done.resource_meta, "late"))
        assert (await plugin.get(done)).state == "SUCCEEDED"

    async def over(self, plugin: AthenaPlugin, query: GetView) -> None:
        while (await plugin.get(query)).state in ("QUEUED", "RUNNING"):
            pass

    async def test_what_never_was_is_not_found(self, plugin: AthenaPlugin) -> None:
        """REQ-43, REQ-58: so that a delete is done, and a read is not merely a failed one."""
        with pytest.raises(NotFound):
            await plugin.get(GetView(self.unknown_handle()))
        with pytest.raises(NotFound):
            await plugin.delete(DeleteView(self.unknown_handle(), "x"))

    async def test_a_query_that_athena_can_not_read_is_the_users_fault(
        self, service: AthenaServer, tmp_path: Path
    ) -> None:
        """REQ-32: told by the first answer, in Athena's words, and never repeated."""
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, AthenaQuery(query="SELEC 1"))
        assert outcome.info.phase is Phase.PERMANENT_FAILURE
        assert outcome.info.err is not None
        assert outcome.info.err.code == "MALFORMED_QUERY"
        assert "mismatched input" in outcome.info.err.message
        assert len(service.times("create")) == 1

    @pytest.mark.parametrize(
        ("message", "code"),
        [
            ("TABLE_NOT_FOUND: line 1:15: Table 'a.b' does not exist", "TABLE_NOT_FOUND"),
            ("Query exhausted resources at this scale factor", "AthenaError233"),
        ],
    )
    async def test_a_failure_is_named_as_athena_names_it(
        self, service: AthenaServer, tmp_path: Path, message: str, code: str
    ) -> None:
        error = {"ErrorCategory": 2, "ErrorType": 233, "Retryable": False}
        with self.host(tmp_path, service) as host:
            spec = AthenaQuery(query=sql(outcome="fail", message=message, error=error))
            outcome = await self.outcome(host, spec)
        assert outcome.info.err is not None
        assert (outcome.info.err.code, outcome.info.err.message) == (code, message)
        assert outcome.info.err.kind == "user"

    async def test_the_page_is_that_of_the_console(self, plugin: AthenaPlugin) -> None:
        info = self.judged(plugin, Query(state="RUNNING")).info
        name = self.unknown_handle().id
        assert info.logs[0].uri == (
            f"https://{REGION}.console.aws.amazon.com/athena/home?region={REGION}#/query-editor/history/{name}"
        )
        assert info.logs[0].name == f"Query {name}"

    # --- results -----------------------------------------------------------------------------

    async def result(self, service: AthenaServer, folder: Path, **spec: Any) -> QueryResult:
        with self.host(folder, service) as host:
            outcome = await self.outcome(host, AthenaQuery(**spec))
        assert outcome.info.phase is Phase.SUCCESS, outcome.info
        return outcome.value

    async def test_values_have_their_columns_types(
        self, service: AthenaServer, tmp_path: Path
    ) -> None:
        kinds = {
            "integer": ("12", 12),
            "bigint": ("9223372036854775807", 9223372036854775807),
            "double": ("1.0E20", 1e20),
            "float": ("NaN", "NaN"),
            "boolean": ("false", False),
            "decimal": ("0.10", "0.10"),
            "varchar": ("12", "12"),
            "array": ("[1, 2]", "[1, 2]"),
        }
        columns = [[kind, kind] for kind in kinds]
        texts = [text for text, _ in kinds.values()]
        query = sql(columns=columns, rows=[texts, [None] * len(kinds)])
        got = await self.result(service, tmp_path, query=query)
        assert got.rows == [[value for _, value in kinds.values()], [None] * len(kinds)]
        assert got.records()[0]["bigint"] == 9223372036854775807
        assert got.location == f"s3://results/here/{got.query_execution_id}.csv"

    async def test_a_first_row_that_is_no_head_is_kept(
        self, service: AthenaServer, tmp_path: Path
    ) -> None:
        """SHOW has none; and only the first of two equal rows is the head of a SELECT's table."""
        columns, rows = [["a", "varchar"]], [["a"]]
        shown = sql(columns=columns, rows=rows, head=False).replace("SELECT * FROM", "SHOW")
        got = await self.result(service, tmp_path, query=shown)
        assert got.rows == [["a"]]
        got = await self.result(service, tmp_path, query=sql(columns=columns, rows=rows))
        assert got.rows == [["a"]]

    async def test_all_pages_are_read(self, service: AthenaServer, tmp_path: Path) -> None:
        rows = [[str(nth)] for nth in range(2500)]
        query = sql(columns=[["n", "integer"]], rows=rows)
        got = await self.result(service, tmp_path, query=query)
        assert got.rows == [[nth] for nth in range(2500)]
        pages = [call.json.get("NextToken") for call in service.calls("outputs")]
        assert pages == [None, "page-1000", "page-2000"]

    async def test_reading_ends_at_the_limit(self, service: AthenaServer, tmp_path: Path) -> None:
        """REQ-69: counted while it is read; the rest is not fetched."""
        query = sql(columns=[["n", "integer"]], rows=[[str(nth)] for nth in range(5000)])
        with self.host(tmp_path, service, maxDatasetSizeBytes=3000) as host:
            outcome = await self.outcome(host, AthenaQuery(query=query))
        assert outcome.info.phase is Phase.PERMANENT_FAILURE
        assert outcome.info.err is not None
        assert outcome.info.err.code == "OutputSizeExceeded"
        assert 'result="location"' in outcome.info.err.message
        assert len(service.times("outputs")) == 1

    async def test_a_result_that_just_fits_comes(
        self, service: AthenaServer, tmp_path: Path
    ) -> None:
        """CASE-235: counted as it is kept, in bytes of UTF-8."""
        query = sql(columns=[["n", "varchar"]], rows=[["ü" * 1000]])
        with self.host(tmp_path, service, maxDatasetSizeBytes=2300) as host:
            outcome = await self.outcome(host, AthenaQuery(query=query))
        assert outcome.info.phase is Phase.SUCCESS

    async def test_who_wants_only_the_location_reads_no_rows(
        self, service: AthenaServer, tmp_path: Path
    ) -> None:
        got = await self.result(service, tmp_path, query=sql(), result="location")
        assert got.location == f"s3://results/here/{got.query_execution_id}.csv"
        assert got.rows == []
        assert service.times("outputs") == []

    async def test_a_statement_that_writes_tells_how_much(
        self, service: AthenaServer, tmp_path: Path
    ) -> None:
        plan = sql(columns=[["rows", "bigint"]], rows=[], head=False, written=42)
        query = plan.replace("SELECT * FROM", "INSERT INTO")
        got = await self.result(service, tmp_path, query=query)
        assert (got.rows, got.update_count) == ([], 42)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"query": ""}, "at least 1 character"),
        ({"query": "x" * 262_145}, "it has 262145 bytes, Athena takes 262144"),
        ({"query": "SELECT ?", "parameters": ["'" * 600]}, "number 0 has 1202 characters"),
        ({"query": "SELECT ?", "parameters": [1, float("inf")]}, "number 1 is inf"),
        ({"query": "SELECT ?", "parameters": [Decimal("NaN")]}, "number 0 is nan"),
        ({"query": "SELECT 1", "output_location": "bucket"}, "output_location"),
        ({"query": "SELECT 1", "work_group": "my group"}, "work_group"),
    ],
)
def test_a_spec_that_can_not_work_is_refused(given: dict[str, Any], told: str) -> None:
    """CASE-267: field, value and remedy, before any request."""
    with pytest.raises(ValidationError, match=told):
        AthenaQuery(**given)


def test_exact_numbers_keep_their_digits() -> None:
    numbers = (Decimal("12345678901234567.89"), Decimal("0.10"), Decimal("1E-10"))
    spec = AthenaQuery(query="SELECT ?", parameters=numbers)
    assert spec.literals == ["12345678901234567.89", "0.10", "0.0000000001"]


def test_the_parameters_survive_their_way_through_json() -> None:
    spec = AthenaQuery(query="SELECT ?", parameters=("1", 1, 1.0, True, None))
    again = AthenaQuery.model_validate(json.loads(spec.model_dump_json()))
    assert again.literals == spec.literals == ["'1'", "1", "1.0", "TRUE", "NULL"]
