"""BigQuery's jobs over its REST API: `jobs.insert` with an id of ours, `get`, `list`, `cancel`, `getQueryResults`."""

import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, cast
from urllib.parse import quote

from pydantic_core import to_json

from prefect_webapi import (
    Answer,
    AsyncPlugin,
    AuthError,
    CreateResult,
    DeleteContext,
    GetContext,
    NotFound,
    PhaseInfo,
    PluginConfig,
    RemoteClient,
    RemoteError,
    RemoteSystemError,
    RemoteUserError,
    StatusContext,
    TaskExecutionContextReader,
    TaskInfo,
    TaskLog,
    Throttled,
    error_of_status,
    path,
)
from prefect_webapi.auth import TokenAuth
from prefect_webapi_gcp.auth import GoogleToken
from prefect_webapi_gcp.blocks import BigQuery
from prefect_webapi_gcp.models import (
    FIELDS,
    BigQueryJob,
    BigQueryResult,
    JobHandle,
    JobView,
)
from prefect_webapi_gcp.rows import columns_of, record

LISTED = 1000
"""Jobs in one page of `jobs.list`; a batch reads one page, and alone what is not on it."""
LABELS = 64
THROTTLES = {  # reason: how long to wait, where BigQuery's own backing off is not enough
    "rateLimitExceeded": None,
    "jobRateLimitExceeded": None,
    "quotaExceeded": timedelta(minutes=10),  # of a day, mostly
}
USER_REASONS = (
    *("accessDenied", "billingNotEnabled", "billingTierLimitExceeded", "blocked", "duplicate"),
    *("invalid", "invalidQuery", "invalidUser", "notFound", "notImplemented", "policyViolation"),
    *("resourcesExceeded", "responseTooLarge"),
)
SYSTEM_REASONS = (
    *("backendError", "internalError", "jobBackendError", "jobInternalError"),
    *("resourceInUse", "tableUnavailable"),
)
PHASES = {
    "PENDING": PhaseInfo.queued,
    "RUNNING": PhaseInfo.running,
    "DONE": PhaseInfo.success,  # without a final error: `errors` are warnings then
}
ENDS = {  # of a job that is DONE, by the reason of its error
    **{reason: partial(PhaseInfo.failure, reason) for reason in USER_REASONS},
    **{reason: partial(PhaseInfo.system_retryable_failure, reason) for reason in SYSTEM_REASONS},
    **{reason: partial(PhaseInfo.retryable_failure, reason) for reason in THROTTLES},
    "stopped": PhaseInfo.aborted,
    "timeout": partial(PhaseInfo.failure, "Timeout"),
}


class BigQueryPlugin(AsyncPlugin[JobHandle, JobView]):
    """Exactly once by key: the job key is the job's id, which BigQuery gives away once.

    A label keeps the fingerprint, so that a job met under our id is known to be ours. Dry runs make no job and are
    simply repeated.
    """

    guarantee = "key"
    max_batch = 200

    def __init__(self, connection: BigQuery) -> None:
        self._connection = connection
        self._api = RemoteClient(
            str(connection.endpoint),
            auth=TokenAuth(GoogleToken(connection.service_account_info)),
            judge=judge,
            allow_insecure=connection.settings.allow_insecure,
        )

    def get_config(self) -> PluginConfig:
        return self._connection.engine

    async def create(self, ctx: TaskExecutionContextReader) -> CreateResult[Any, JobView]:
        job, spec, project = (
            ctx.task_execution_metadata,
            ctx.spec(BigQueryJob),
            self._connection.project,
        )
        ours = {**job.labels, "fingerprint": job.fingerprint[:32]}
        body = {
            "jobReference": {
                "projectId": project,
                "jobId": job.generated_name,
                "location": self._location(spec),
            },
            "configuration": spec.as_configuration(project, _labels({**spec.labels, **ours})),
        }
        return _result(
            await self._api.post(_in(project, "jobs"), json=body, params={"fields": FIELDS})
        )

    async def find(self, ctx: TaskExecutionContextReader) -> CreateResult[Any, JobView]:
        handle = JobHandle(
            project=self._connection.project,
            location=self._location(ctx.spec(BigQueryJob)),
            job_id=ctx.task_execution_metadata.generated_name,
        )
        return _result(await self._read(handle))

    async def get(self, ctx: GetContext[JobHandle]) -> JobView:
        return JobView.model_validate(await self._read(ctx.resource_meta))

    async def get_many(self, ctxs: Sequence[GetContext[JobHandle]]) -> Sequence[JobView | None]:
        handles = [ctx.resource_meta for ctx in ctxs]
        params = {
            "projection": "full",
            "minCreationTime": min(handle.created_ms for handle in handles),
            "maxResults": LISTED,
            "fields": f"jobs({FIELDS})",
        }
        page = await self._api.get(_in(self._connection.project, "jobs"), params=params)
        listed = [JobView.model_validate(job) for job in page.get("jobs", ())]
        read = {job.handle: job for job in listed}
        return [read.get(handle) for handle in handles]  # None: not on the page

    async def delete(self, ctx: DeleteContext[JobHandle]) -> None:
        handle = ctx.resource_meta
        where = _in(handle.project, "jobs", handle.job_id, "cancel")
        await self._api.post(where, params={"location": handle.location, "fields": "kind"})

    def status(self, ctx: StatusContext[JobHandle, JobView]) -> PhaseInfo:
        job, told = ctx.resource, ctx.resource.status
        read = job.statistics.total_bytes_processed
        info = TaskInfo(
            logs=_links(job.handle),
            occurred_at=job.changed_at,
            custom_info={"totalBytesProcessed": read} if read else {},
        )
        if told.state == "DONE" and (error := told.error_result) is not None:
            end = ENDS.get(error.reason, partial(PhaseInfo.system_failure, error.reason))
            return end(error.message, info=info)
        if (phase := PHASES.get(told.state)) is None:
            return PhaseInfo.undefined(f"BigQuery says {told.state!r}", info=info)
        warnings = "; ".join(each.message for each in told.errors)
        return phase(warnings, info=info)

    async def outputs(self, ctx: StatusContext[JobHandle, JobView]) -> BigQueryResult:
        job, spec = ctx.resource, ctx.spec(BigQueryJob)
        told = job.statistics
        columns, rows = columns_of(told.query.schema_), None
        if job.handle is not None and spec.query is not None and spec.rows:
            columns, rows = await self._rows(job.handle, ctx.max_dataset_size_bytes)
        return BigQueryResult(
            job_id=job.job_reference.job_id,
            location=job.job_reference.location,
            table=job.table,
            columns=columns,
            rows=rows,
            bytes_processed=told.total_bytes_processed,
            affected_rows=told.query.num_dml_affected_rows,
        )

    async def aclose(self) -> None:
        await self._api.aclose()

    async def _rows(
        self, handle: JobHandle, limit: int
    ) -> tuple[dict[str, str], list[dict[str, Any]]]:
        """All pages. Counted while they are read, so that no more is kept than may be returned."""
        rows: list[dict[str, Any]] = []
        size, token = 0, None
        while True:
            params = {
                "location": handle.location,
                "pageToken": token,
                "formatOptions.useInt64Timestamp": "true",
            }
            where = _in(handle.project, "queries", handle.job_id)
            page = await self._api.get(where, params=params)
            if not page["jobComplete"]:
                raise RemoteSystemError("the job is done, and its rows are not there yet")
            schema, token = page.get("schema", {}), page.get("pageToken")
            more = [record(schema["fields"], row) for row in page.get("rows", ())]
            rows += more
            size += len(to_json(more))
            if 0 <= limit < size:
                raise RemoteUserError(
                    f"the result has {page['totalRows']} rows; {len(rows)} of them are {size} bytes, "
                    f"max_dataset_size_bytes is {limit}. Set rows=False and use the table",
                    code="OutputSizeExceeded",
                )
            if not token:
                return columns_of(schema), rows

    async def _read(self, handle: JobHandle) -> Any:
        params = {"location": handle.location, "fields": FIELDS}
        return await self._api.get(_in(handle.project, "jobs", handle.job_id), params=params)

    def _location(self, spec: BigQueryJob) -> str:
        return spec.location or self._connection.location


def _in(project: str, *segments: str) -> str:
    return "/bigquery/v2" + path("projects", project, *segments)


def _result(answer: Any) -> CreateResult[Any, JobView]:
    """Without a handle for a dry run: it is over, and BigQuery can't be asked about it."""
    job = JobView.model_validate(answer)
    return CreateResult(job.handle, job, job.configuration.labels.get("fingerprint"))


def _labels(wanted: Mapping[str, str]) -> dict[str, str]:
    """In BigQuery's alphabet, a letter first in names. The last ones stay where there are too many."""
    fit = {
        re.sub(r"^(?![a-z])", "l", _plain(name))[:63]: _plain(value)[:63]
        for name, value in wanted.items()
    }
    return dict(list(fit.items())[-LABELS:])


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9_-]", "-", text.lower())


def _links(handle: JobHandle | None) -> tuple[TaskLog, ...]:
    if handle is None:
        return ()
    job = quote(f"bq:{handle.location}:{handle.job_id}", safe=":")
    at = f"https://console.cloud.google.com/bigquery?project={quote(handle.project)}&j={job}"
    return (TaskLog(name="BigQuery job", uri=f"{at}&page=queryresults"),)


def judge(answer: Answer, method: str) -> RemoteError | None:
    """The reason in the body decides, not the status: a 403 may be a throttle."""
    error = error_of_status(answer, method)
    if isinstance(error, NotFound) and not _is_googles(answer):  # nothing is known of the job
        return RemoteSystemError(error.message, code="HTTP404", job_may_exist=False)
    reason = _reason(answer) if error is not None else ""
    if error is None or not reason:
        return error
    if reason in THROTTLES and not isinstance(error, Throttled):
        return Throttled(error.message, retry_after=THROTTLES[reason], code=reason)
    if not isinstance(error, AuthError):
        error.code = reason
    elif reason in USER_REASONS and reason != "accessDenied":  # new credentials would not help
        return RemoteUserError(error.message, code=reason)
    return error


def _is_googles(answer: Answer) -> bool:
    """Whether an error has Google's form, and not that of a proxy or of another server."""
    try:
        return isinstance(answer.json()["error"], dict)
    except (RemoteSystemError, LookupError, TypeError):
        return False


def _reason(answer: Answer) -> str:
    try:
        return cast(str, answer.json()["error"]["errors"][0]["reason"])
    except (RemoteSystemError, LookupError, TypeError):
        return ""
