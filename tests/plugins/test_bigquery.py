"""BigQuery's plugin: the suite, and what is particular to BigQuery."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import aclosing
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
from prefect.blocks.core import Block
from pydantic import HttpUrl, SecretStr, ValidationError

from prefect_webapi import (
    Answer,
    AuthError,
    ConfigurationError,
    EngineSettings,
    Phase,
    PluginConfig,
    RemoteClient,
    RemoteError,
    RemoteSystemError,
    RemoteUserError,
    Throttled,
)
from prefect_webapi.engine.contexts import DeleteView, GetView
from prefect_webapi_gcp import BigQuery, BigQueryJob, BigQueryResult, auth, bigquery, entry
from prefect_webapi_gcp.answers import JobView
from prefect_webapi_gcp.auth import GoogleToken
from prefect_webapi_gcp.bigquery import BigQueryPlugin
from prefect_webapi_gcp.models import JobHandle
from prefect_webapi_gcp.reasons import SYSTEM_REASONS, THROTTLES, USER_REASONS, judge
from prefect_webapi_gcp.rows import record
from tests.plugins.suite import CANARY, WITHIN, BlockSuite, Outcome, OverHttp
from tests.servers.base import Fault, Reply
from tests.servers.bigquery import BigQueryServer
from tests.support.engine import Told
from tests.support.waiting import eventually
from tests.support.witness import records

PROJECT = "local-project"
REGION = "europe-west3"  # neither US nor EU: every call needs the location
HANDLE = JobHandle(project=PROJECT, location=REGION, job_id="nobody")


class TestBigQueryBlock(BlockSuite):
    @pytest.fixture
    def block(self) -> type[Block]:
        return BigQuery


def view(state: str = "DONE", reason: str = "", message: str = "", **more: Any) -> JobView:
    error = {"errorResult": {"reason": reason, "message": message}} if reason else {}
    return JobView.model_validate(
        {
            "jobReference": {"projectId": PROJECT, "location": REGION, "jobId": "x"},
            "status": {"state": state, **error, **more},
        }
    )


def refusal(status: int, reason: str, message: str = "no") -> Reply:
    error = {"message": message, "domain": "global", "reason": reason}
    return Reply(status, {"error": {"code": status, "message": message, "errors": [error]}})


class TestBigQuery(OverHttp):
    entry = entry
    plugin_class = BigQueryPlugin
    rows = (
        (view("PENDING"), Phase.QUEUED, None),
        (view("RUNNING"), Phase.RUNNING, None),
        (view("DONE"), Phase.SUCCESS, None),
        (view("DONE", "stopped"), Phase.ABORTED, None),
        (view("DONE", "timeout"), Phase.PERMANENT_FAILURE, "user"),
        *((view("DONE", reason), Phase.PERMANENT_FAILURE, "user") for reason in USER_REASONS),
        *((view("DONE", reason), Phase.RETRYABLE_FAILURE, "system") for reason in SYSTEM_REASONS),
        *((view("DONE", reason), Phase.RETRYABLE_FAILURE, "user") for reason in THROTTLES),
        (view("DONE", "somethingNew"), Phase.PERMANENT_FAILURE, "system"),
    )
    unknown = view("PAUSED")
    has_tokens = True
    hints = False

    @pytest.fixture(scope="class")
    @classmethod
    def service(cls) -> Iterator[BigQueryServer]:
        with BigQueryServer(access=CANARY) as server:
            yield server

    def connection(
        self, service: BigQueryServer, engine: PluginConfig, settings: EngineSettings
    ) -> BigQuery:
        return BigQuery(
            project=PROJECT,
            location=REGION,
            service_account_info=SecretStr(service.key_file(private_key_id=CANARY)),
            endpoint=HttpUrl(service.url),
            engine=engine,
            settings=settings,
        )

    def job(self, outcome: Outcome = "succeed", *, result: str = "done") -> BigQueryJob:
        match outcome:
            case "fail":
                return BigQueryJob(query="SELECT * FROM sales_of_2031")
            case "never":
                return BigQueryJob(query="SELECT 1 /* running 600 */")
            case "queued":
                return BigQueryJob(query="SELECT 1 /* queued 600 */")
            case "succeed":
                return BigQueryJob(query="SELECT @told AS told", parameters={"told": result})

    def throttled(self, hint: float | None) -> Reply:
        return refusal(403, "rateLimitExceeded", "Exceeded rate limits: too many api requests")

    def unauthorized(self) -> Reply:
        return refusal(401, "authError", "Invalid Credentials")

    def unknown_handle(self) -> JobHandle:
        return HANDLE

    def handle_of(self, name: str) -> JobHandle:
        return HANDLE.model_copy(update={"job_id": name})

    # --- one job under our id ----------------------------------------------------------------

    async def test_a_job_of_ours_that_is_met_is_adopted(
        self, service: BigQueryServer, tmp_path: Path
    ) -> None:
        """CASE-055: 409, the same fingerprint; and a 404 right after it is asked again."""
        service.spoil(Fault("create", None, carried_out=True))
        service.hidden_for = 1.0
        with self.host(tmp_path, service, visibilityDelay="5s") as host:
            outcome = await self.outcome(host, self.job())
        assert outcome.info.phase is Phase.SUCCESS, outcome.info
        assert service.made() == 1
        assert [seen.status for seen in service.calls("create")] == [None, 409]
        assert 404 in [seen.status for seen in service.calls("get")]
        assert all(f"location={REGION}" in seen.query for seen in service.calls("get"))

    async def test_the_label_tells_whether_a_job_under_a_key_of_the_users_is_ours(
        self, service: BigQueryServer, tmp_path: Path
    ) -> None:
        """CASE-056, CASE-061: without a common ledger only BigQuery knows."""
        first = BigQueryJob(query="SELECT 1 /* running 600 */")
        with self.host(tmp_path / "one", service) as host:
            self.asked(host, first, idempotency_key="mine")
            await eventually(lambda: service.made() == 1, within=WITHIN)
        with self.host(tmp_path / "two", service) as host:
            other = BigQueryJob(query="SELECT 2")
            outcome = await self.outcome(host, other, idempotency_key="mine")
        assert outcome.info.err is not None
        assert outcome.info.err.code == "IdempotencyConflict"
        assert (service.made(), service.live(), service.calls("delete")) == (1, 1, [])
        with self.host(tmp_path / "three", service) as host:
            self.asked(host, first, idempotency_key="mine", reporter=(told := Told()))
            await eventually(lambda: "RUNNING" in told.names, within=WITHIN)
        assert service.made() == 1

    async def test_the_location_is_the_jobs_own_in_every_call(
        self, service: BigQueryServer, tmp_path: Path
    ) -> None:
        """The spec's goes before the connection's, and the handle keeps what BigQuery answered."""
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, BigQueryJob(query="SELECT 1", location="US-EAST4"))
        assert outcome.info.phase is Phase.SUCCESS, outcome.info
        assert outcome.value.location == "us-east4"
        (record,) = await records(tmp_path)
        assert record.handle is not None
        assert JobHandle.model_validate_json(record.handle).location == "us-east4"
        asked = [*service.calls("get"), *service.calls("outputs")]
        assert asked
        assert all("location=us-east4" in seen.query for seen in asked)

    async def test_labels_tell_whose_job_it_is_in_bigquerys_alphabet(
        self, service: BigQueryServer, tmp_path: Path
    ) -> None:
        """CASE-271."""
        spec = BigQueryJob(query="SELECT 1", labels={"Team": "Ops & Sales", "1st": "x" * 70})
        with self.host(tmp_path, service) as host:
            await self.outcome(host, spec, task_run="T-1", labels={"a b": "ß"})
        (record,) = await records(tmp_path)
        (job,) = service.jobs.values()
        labels = job.configuration["labels"]
        assert (labels["team"], labels["l1st"], labels["a-b"]) == ("ops---sales", "x" * 63, "-")
        assert (labels["job_key"], labels["task_run_id"]) == (record.key, "t-1")
        assert record.fingerprint.startswith(labels["fingerprint"])

    # --- batches -----------------------------------------------------------------------------

    async def test_a_batch_is_one_page_that_begins_with_the_oldest(
        self, service: BigQueryServer, plugin: BigQueryPlugin
    ) -> None:
        """What is not on it is read alone."""
        spec = BigQueryJob(query="SELECT 1 /* running 600 */")
        made = (await plugin.create(self.view(spec))).resource_meta
        service.jobs[PROJECT, REGION, "other"] = next(iter(service.jobs.values()))
        found, missing = await plugin.get_many(
            [GetView(made), GetView(made.model_copy(update={"job_id": "b"}))]
        )
        assert (found is not None, missing) == (True, None)
        (listed,) = service.calls("get_many")
        assert f"minCreationTime={made.created_ms}" in listed.query
        assert "statistics%28" in listed.query  # not whole jobs, with their queries and plans

    # --- what BigQuery refuses ---------------------------------------------------------------

    async def test_a_403_that_means_less_is_waited_for(
        self, service: BigQueryServer, tmp_path: Path
    ) -> None:
        """Classified by the reason: `quotaExceeded` comes as 403 too, and lasts longer."""
        service.spoil(
            Fault("create", refusal(403, "quotaExceeded", "Quota exceeded: jobs per day"))
        )
        with self.host(tmp_path, service, maxRetryAfter="1s") as host:
            outcome = await self.outcome(host, self.job())
        assert outcome.info.phase is Phase.SUCCESS, outcome.info
        first, second = service.times("create")
        assert second - first >= 1.0

    async def test_a_dataset_that_is_forbidden_ends_the_task(
        self, service: BigQueryServer, tmp_path: Path
    ) -> None:
        service.spoil(
            Fault("create", refusal(403, "accessDenied", "no bigquery.jobs.create"), times=9)
        )
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, self.job())
        assert (outcome.info.phase, outcome.info.kind) == (Phase.PERMANENT_FAILURE, "user")
        assert outcome.info.err is not None
        assert outcome.info.err.code == "Forbidden"
        assert "no bigquery.jobs.create" in outcome.info.err.message
        assert len(service.times("create")) == 2

    # --- results -----------------------------------------------------------------------------

    async def test_rows_come_by_page_and_typed(
        self, service: BigQueryServer, tmp_path: Path
    ) -> None:
        query = "SELECT value AS n, value / 2.0 AS half, 'x' AS word FROM json_each(@ns)"
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(
                host, BigQueryJob(query=query, parameters={"ns": [1, 2, 3]})
            )
        assert outcome.info.phase is Phase.SUCCESS, outcome.info
        assert outcome.value.rows == [{"n": n, "half": n / 2, "word": "x"} for n in (1, 2, 3)]
        assert outcome.value.columns == {"n": "INTEGER", "half": "FLOAT", "word": "STRING"}
        assert re.fullmatch(rf"bq://{PROJECT}:_anon\.anon\d+", outcome.value.table)
        assert len(service.calls("outputs")) == 2

    async def test_no_page_is_read_after_the_one_that_is_too_much(
        self, service: BigQueryServer, tmp_path: Path
    ) -> None:
        """CASE-235: counted while it is read."""
        query = "SELECT 'xxxxxxxxxxxxxxxxxxxxxxxxx' AS x FROM json_each(@ns)"
        spec = BigQueryJob(query=query, parameters={"ns": list(range(100))})
        with self.host(tmp_path, service, maxDatasetSizeBytes=200) as host:
            outcome = await self.outcome(host, spec)
        assert outcome.info.err is not None
        assert outcome.info.err.code == "OutputSizeExceeded"
        assert "100 rows" in outcome.info.err.message
        assert len(service.calls("outputs")) == 3

    async def test_only_the_table_is_told_where_rows_are_not_wanted(
        self, service: BigQueryServer, tmp_path: Path
    ) -> None:
        spec = BigQueryJob(query="SELECT 1 AS a", destination="reports.daily", rows=False)
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, spec)
        assert outcome.value.table == f"bq://{PROJECT}:reports.daily"
        assert outcome.value.rows is None
        assert service.calls("outputs") == []

    async def test_a_statement_that_changes_rows_tells_how_many(
        self, service: BigQueryServer, tmp_path: Path
    ) -> None:
        query = "CREATE TABLE t (a); INSERT INTO t VALUES (1), (2)"
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, BigQueryJob(query=query))
        assert (outcome.value.affected_rows, outcome.value.rows) == (2, [])

    async def test_a_dry_run_makes_no_job(self, service: BigQueryServer, tmp_path: Path) -> None:
        """CASE-051: it is over with create's answer, which has no id to read."""
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, BigQueryJob(query="SELECT 1 AS a", dry_run=True))
            wrong = await self.outcome(host, BigQueryJob(query="SELEC 1", dry_run=True), nth=1)
        assert outcome.info.phase is Phase.SUCCESS, outcome.info
        assert outcome.value == BigQueryResult(
            job_id=None,
            location=REGION,
            table=outcome.value.table,
            columns={"a": "INTEGER"},
            bytes_processed=64,
        )
        assert wrong.info.err is not None
        assert (wrong.info.err.code, wrong.info.err.kind) == ("invalidQuery", "user")
        assert service.made() == 0
        assert service.ops() == ["token", "create", "create"]

    async def test_a_load_is_a_job_like_any_other(
        self, service: BigQueryServer, tmp_path: Path
    ) -> None:
        table = {"projectId": PROJECT, "datasetId": "raw", "tableId": "sales"}
        load = {"sourceUris": ["gs://bucket/sales.csv"], "destinationTable": table}
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, BigQueryJob(configuration={"load": load}))
        assert outcome.info.phase is Phase.SUCCESS, outcome.info
        assert outcome.value.table == f"bq://{PROJECT}:raw.sales"

    def test_warnings_are_told_and_fail_nothing(self, plugin: BigQueryPlugin) -> None:
        """Entries of `errors` are no failure: only `errorResult` is."""
        problem = {"reason": "invalid", "message": "3 bad records were left out"}
        info = self.judged(plugin, view("DONE", errors=[problem]))
        assert (info.phase, info.reason) == (Phase.SUCCESS, "3 bad records were left out")

    # --- the rest ----------------------------------------------------------------------------

    async def test_the_console_is_linked_while_the_job_runs(
        self, service: BigQueryServer, tmp_path: Path
    ) -> None:
        told = Told()
        with self.host(tmp_path, service) as host:
            await self.outcome(host, self.job(), reporter=told)
        (record,) = await records(tmp_path)
        at = f"https://console.cloud.google.com/bigquery?project={PROJECT}&j=bq:{REGION}:{record.key}"
        links = [log.uri for info in told.infos for log in info.info.logs]
        assert set(links) == {f"{at}&page=queryresults"}

    async def test_a_job_keeps_its_project_when_the_block_moves_to_another(
        self, service: BigQueryServer, plugin: BigQueryPlugin
    ) -> None:
        """A handle is enough to end the job."""
        made = (await plugin.create(self.view(self.job("never")))).resource_meta
        elsewhere = BigQueryPlugin(plugin._connection.model_copy(update={"project": "another"}))  # pyright: ignore[reportPrivateUsage] - a block edited
        await elsewhere.delete(DeleteView(made, "enough"))
        await eventually(lambda: service.live() == 0, within=10)
        await elsewhere.aclose()

    async def test_a_token_is_renewed_before_it_ends(
        self, service: BigQueryServer, plugin: BigQueryPlugin
    ) -> None:
        service.token_lives = 2
        made = (await plugin.create(self.view(self.job("never")))).resource_meta

        async def renewed() -> bool:
            await plugin.get(GetView(made))
            return len(service.calls("token")) == 2

        await eventually(renewed, within=WITHIN)
        assert all(seen.status == 200 for seen in service.seen)

    async def test_the_machines_own_credentials_are_used_where_no_key_is_given(
        self, service: BigQueryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "key.json").write_text(service.key_file())
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
        token = await GoogleToken(None)()
        assert token.value.get_secret_value() in service.issued
        assert token.lives is not None
        assert timedelta(minutes=55) < token.lives < timedelta(hours=1)

    async def test_a_key_that_google_refuses_is_the_users_fault(
        self, service: BigQueryServer
    ) -> None:
        """google-auth really signs: another service's key file does not get in here."""
        with BigQueryServer() as other:
            stolen = other.key_file(token_uri=f"{service.url}/token")
        with pytest.raises(AuthError, match="invalid_grant"):
            await GoogleToken(SecretStr(stolen))()
        with pytest.raises(RemoteSystemError, match="no token"):
            await GoogleToken(SecretStr(service.key_file(token_uri="http://127.0.0.1:9/token")))()


@pytest.fixture
def server() -> Iterator[BigQueryServer]:
    with BigQueryServer() as server:
        yield server


def answer(reply: Reply) -> Answer:
    return Answer(reply.status, {}, reply.content)


@pytest.mark.parametrize(
    ("status", "reason", "kind", "wait"),
    [
        (403, "rateLimitExceeded", Throttled, None),
        (429, "rateLimitExceeded", Throttled, None),
        (403, "quotaExceeded", Throttled, timedelta(minutes=10)),
        (403, "accessDenied", AuthError, None),
        (403, "forbidden", AuthError, None),
        (403, "billingNotEnabled", RemoteUserError, None),
        (400, "invalidQuery", RemoteUserError, None),
        (503, "backendError", RemoteSystemError, None),
    ],
)
def test_a_reason_says_what_a_refusal_means(
    status: int, reason: str, kind: type[RemoteError], wait: timedelta | None
) -> None:
    """W-45."""
    judged = judge(answer(refusal(status, reason, "its own words")), "POST")
    assert isinstance(judged, kind)
    assert "its own words" in judged.message
    assert getattr(judged, "retry_after", None) == wait


def test_a_proxys_page_is_judged_by_its_status() -> None:
    assert isinstance(judge(answer(Reply(502, b"<html>")), "GET"), RemoteSystemError)
    assert judge(answer(Reply(200, {})), "GET") is None


def test_every_type_of_a_column_becomes_a_value() -> None:
    """A row as `jobs.getQueryResults` sends it; what JSON can't hold exactly stays text."""
    fields: list[dict[str, Any]] = [
        {"name": "n", "type": "INTEGER"},
        {"name": "f", "type": "FLOAT"},
        {"name": "inf", "type": "FLOAT"},
        {"name": "yes", "type": "BOOLEAN"},
        {"name": "price", "type": "NUMERIC"},
        {"name": "at", "type": "TIMESTAMP"},
        {"name": "day", "type": "DATE"},
        {"name": "tree", "type": "JSON"},
        {"name": "none", "type": "INTEGER", "mode": "NULLABLE"},
        {"name": "tags", "type": "STRING", "mode": "REPEATED"},
        {
            "name": "lines",
            "type": "RECORD",
            "mode": "REPEATED",
            "fields": [{"name": "id", "type": "INTEGER"}],
        },
    ]
    cells = [
        *("9007199254740993", "0.5", "-Infinity", "true", "0.10", "1767225600000001", "2026-01-01"),
        *('{"a": [1]}', None, [{"v": "x"}, {"v": "y"}], [{"v": {"f": [{"v": "7"}]}}]),
    ]
    assert record(fields, {"f": [{"v": cell} for cell in cells]}) == {
        "n": 9007199254740993,
        "f": 0.5,
        "inf": "-Infinity",
        "yes": True,
        "price": "0.10",
        "at": "2026-01-01T00:00:00.000001+00:00",
        "day": "2026-01-01",
        "tree": {"a": [1]},
        "none": None,
        "tags": ["x", "y"],
        "lines": [{"id": 7}],
    }


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (True, "BOOL", "true"),
        (7, "INT64", "7"),
        (0.5, "FLOAT64", "0.5"),
        (Decimal("0.10"), "NUMERIC", "0.10"),
        (Decimal("9" * 29 + ".123456789"), "NUMERIC", "9" * 29 + ".123456789"),
        (Decimal("0.1234567891"), "BIGNUMERIC", "0.1234567891"),
        (Decimal("1" + "0" * 29), "BIGNUMERIC", "1" + "0" * 29),
        ("it's", "STRING", "it's"),
        (datetime(2026, 1, 2, 3, tzinfo=UTC), "TIMESTAMP", "2026-01-02 03:00:00+00:00"),
        (datetime(2026, 1, 2, 3), "DATETIME", "2026-01-02 03:00:00"),  # noqa: DTZ001 - without a time zone on purpose
        (date(2026, 1, 2), "DATE", "2026-01-02"),
    ],
)
def test_a_value_is_bound_with_its_type(value: Any, kind: str, text: str) -> None:
    """CASE-263."""
    spec = BigQueryJob(query="SELECT @v", parameters={"v": value})
    (sent,) = spec.as_configuration(PROJECT, {})["query"]["queryParameters"]
    assert sent == {
        "name": "v",
        "parameterType": {"type": kind},
        "parameterValue": {"value": text},
    }


def test_numbers_of_one_list_have_one_type() -> None:
    """As many digits as the longest of them needs."""
    spec = BigQueryJob(query="SELECT @v", parameters={"v": [Decimal(1), Decimal("1e-10")]})
    (sent,) = spec.as_configuration(PROJECT, {})["query"]["queryParameters"]
    assert sent["parameterType"] == {"type": "ARRAY", "arrayType": {"type": "BIGNUMERIC"}}


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({}, "give `query`"),
        ({"query": "SELECT @a", "parameters": {"a": Decimal("1e-39")}}, "1E-39 is no BIGNUMERIC"),
        ({"query": "SELECT @a", "parameters": {"a": Decimal("NaN")}}, "NaN is no BIGNUMERIC"),
        ({"query": "SELECT 1", "configuration": {"load": {}}}, "give `query`"),
        ({"query": "SELECT 1", "configuration": {"dryRun": True}}, "use `labels` and `dry_run`"),
        ({"query": "SELECT @a", "parameters": {"a": None}}, "parameter 'a' is None"),
        ({"query": "SELECT @a", "parameters": {"a": []}}, "with an item"),
        ({"query": "SELECT @a", "parameters": {"a b": 1}}, "'a b' can't be the name"),
        ({"query": "SELECT 1", "destination": "table"}, "destination"),
        ({"query": "SELECT 1", "maximum_bytes_billed": 0}, "maximum_bytes_billed"),
    ],
)
def test_a_spec_that_can_not_work_is_refused_before_any_request(
    spec: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValidationError, match=re.escape(told)):
        BigQueryJob(**spec)


@pytest.mark.parametrize("text", ["no json", "[]", '{"type": "authorized_user"}'])
def test_a_key_file_that_is_none_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(ValidationError, match="Paste the whole JSON") as caught:
        BigQuery(project="p", location="EU", service_account_info=SecretStr(text))
    assert text not in str(caught.value)


async def test_googles_library_is_asked_for_by_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules load without it."""
    monkeypatch.setitem(sys.modules, "google.auth", None)
    for module in (auth, bigquery):
        run_path(str(module.__file__))
    with pytest.raises(ConfigurationError, match=r"prefect-webapi\[gcp\]"):
        await GoogleToken(None)()


# --- the server that all of this rests on ----------------------------------------------------

QUERY = {"query": {"query": "SELECT 1", "useLegacySql": False}}
JOBS = f"/bigquery/v2/projects/{PROJECT}/jobs"
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"configuration": {**QUERY, "lables": {}}}, {}, "invalid"),
    ({"configuration": {"query": {"query": 5}}}, {}, "invalid"),
    ({"configuration": {}}, {}, "required"),
    ({"configuration": {**QUERY, "labels": {"Upper": "x"}}}, {}, "invalid"),
    ({"configuration": QUERY, "jobReference": {"projectId": "another"}}, {}, "invalid"),
    ({"configuration": QUERY, "jobReference": {"location": "nowhere-1"}}, {}, "notFound"),
    ({"configuration": QUERY}, {"locaton": REGION}, "badRequest"),
]


async def api_of(server: BigQueryServer) -> RemoteClient:
    token = await GoogleToken(SecretStr(server.key_file()))()
    return RemoteClient(server.url, token=token.value)


@pytest.mark.parametrize(("body", "params", "reason"), REFUSED)
async def test_the_server_refuses_what_bigquery_refuses(
    server: BigQueryServer, body: dict[str, Any], params: dict[str, Any], reason: str
) -> None:
    async with aclosing(await api_of(server)) as api:
        refused = await api.request("POST", JOBS, json=body, params=params)
    assert refused.status in (400, 404)
    assert refused.at("error", "errors", 0, "reason") == reason
    assert server.made() == 0


async def test_the_server_knows_who_asks_and_takes_only_json(server: BigQueryServer) -> None:
    async with aclosing(await api_of(server)) as api:
        form = await api.request("POST", JOBS, form={"configuration": "{}"})
    async with aclosing(RemoteClient(server.url, token=SecretStr("stolen"))) as thief:
        stranger = await thief.request("POST", JOBS, json={"configuration": QUERY})
    assert (form.status, stranger.status, server.made()) == (400, 401, 0)
