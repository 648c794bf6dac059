"""What crosses the border: the spec that users write, what the task returns, the handle."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date, datetime
from decimal import Decimal
from typing import Any, Literal, Self, cast
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from prefect_webapi import JobSpec, TaskExecutionMetadata, path
from prefect_webapi_gcp.labels import labels_of

_TABLE = r"^([^.\s`]+\.)?\w+\.[^.\s`]+$"
_TYPES = {  # of query parameters; a datetime is a date, and a bool an int, so the order counts
    bool: "BOOL",
    int: "INT64",
    float: "FLOAT64",
    str: "STRING",
    datetime: "TIMESTAMP",
    date: "DATE",
}


class BigQueryResult(BaseModel):
    """What the task returns.

    Attributes:
        job_id: as BigQuery knows it; None after a dry run, which makes no job.
        table: where the result or the loaded data is: ``bq://project:dataset.table``.
        columns: name to BigQuery's type.
        rows: None where they were not asked for or there are none. Timestamps are ISO 8601 in UTC; numbers that
            JSON can't hold exactly (NUMERIC) and dates are text.
        bytes_processed: after a dry run: what the query would read.
        affected_rows: of INSERT, UPDATE, DELETE and MERGE.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_id: str | None
    location: str
    table: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    rows: list[dict[str, Any]] | None = None
    bytes_processed: int = 0
    affected_rows: int | None = None


class BigQueryJob(JobSpec[BigQueryResult]):
    """A query, or another job by its REST configuration.

    Attributes:
        query: GoogleSQL.
        parameters: values for `@name` in the query, bound by BigQuery: bool, int, float, Decimal (NUMERIC, or
            BIGNUMERIC where it has more digits), str, date, datetime (with a time zone: TIMESTAMP, without:
            DATETIME), or a list of one of these.
        destination: table for the result, ``dataset.table`` or ``project.dataset.table``.
        maximum_bytes_billed: the query fails, unbilled, if it would read more.
        rows: fetch the rows; False: the task returns only the table that holds them.
        dry_run: only ask what the query would read.
        location: None: the connection's.
        configuration: further fields of the REST API's `JobConfiguration`, such as
            ``{"query": {"priority": "BATCH"}}``; without a query it holds one of ``load``, ``copy`` and ``extract``.
    """

    query: str | None = Field(default=None, min_length=1)
    parameters: dict[str, Any] = Field(default_factory=dict)
    destination: str | None = Field(default=None, pattern=_TABLE)
    write_disposition: Literal["WRITE_EMPTY", "WRITE_APPEND", "WRITE_TRUNCATE"] | None = None
    maximum_bytes_billed: int | None = Field(default=None, gt=0)
    rows: bool = True
    dry_run: bool = False
    labels: dict[str, str] = Field(default_factory=dict)
    location: str | None = Field(default=None, min_length=1)
    configuration: dict[str, Any] = Field(default_factory=dict)

    @field_validator("parameters")
    @classmethod
    def _have_types(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        for name, value in parameters.items():
            _parameter(name, value)
        return parameters

    @model_validator(mode="after")
    def _is_one_job(self) -> Self:
        kinds = {"load", "copy", "extract"} & self.configuration.keys()
        if len(kinds) + (self.query is not None) != 1:
            raise ValueError(
                "a job is one of these: give `query`, or one of load, copy and extract in `configuration`"
            )
        if clash := {"labels", "dryRun"} & self.configuration.keys():
            raise ValueError(
                f"configuration holds {', '.join(sorted(clash))}: use `labels` and `dry_run`"
            )
        return self

    def as_request(self, wanted: JobHandle, job: TaskExecutionMetadata) -> dict[str, Any]:
        """The REST API's `Job`: its id, its location, and whose it is."""
        at = {"projectId": wanted.project, "location": wanted.location, "jobId": wanted.job_id}
        ours = {**self.labels, **job.labels, "fingerprint": job.fingerprint[:32]}
        return {
            "jobReference": at,
            "configuration": self.as_configuration(wanted.project, labels_of(ours)),
        }

    def as_configuration(self, project: str, labels: Mapping[str, str]) -> dict[str, Any]:
        """The REST API's `JobConfiguration`."""
        whole: dict[str, Any] = {**self.configuration, "labels": dict(labels)}
        if self.dry_run:
            whole["dryRun"] = True
        if self.query is not None:
            ours = {
                "query": self.query,
                "useLegacySql": False,
                "parameterMode": "NAMED" if self.parameters else None,
                "queryParameters": [_parameter(*each) for each in self.parameters.items()] or None,
                "destinationTable": _reference(project, self.destination),
                "writeDisposition": self.write_disposition,
                "maximumBytesBilled": _text(self.maximum_bytes_billed),
            }
            given = {name: value for name, value in ours.items() if value is not None}
            whole["query"] = {**self.configuration.get("query", {}), **given}
        return whole


def _parameter(name: str, value: Any) -> dict[str, Any]:
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ValueError(f"{name!r} can't be the name of a parameter")
    items = cast(list[Any], value) if isinstance(value, list) else [value]
    kinds = {_type(item) for item in items}
    if kinds == {"NUMERIC", "BIGNUMERIC"}:
        kinds = {"BIGNUMERIC"}
    if len(kinds) != 1 or None in kinds:
        raise ValueError(
            f"parameter {name!r} is {value!r}: BigQuery needs its type. Give a bool, int, float, Decimal, str, date "
            "or datetime, or a list of one of these with an item; write NULL into the query"
        )
    (kind,) = kinds
    if isinstance(value, list):
        wanted = {"type": "ARRAY", "arrayType": {"type": kind}}
        given: dict[str, Any] = {"arrayValues": [{"value": _text(item)} for item in items]}
    else:
        wanted, given = {"type": kind}, {"value": _text(value)}
    return {"name": name, "parameterType": wanted, "parameterValue": given}


def _type(value: Any) -> str | None:
    if isinstance(value, datetime) and value.tzinfo is None:
        return "DATETIME"
    if isinstance(value, Decimal):
        return _exact_type(value)
    return next((name for kind, name in _TYPES.items() if isinstance(value, kind)), None)


def _exact_type(value: Decimal) -> str:
    """The smaller one that holds all digits. Source: BigQuery's reference, "Decimal types"."""
    _, digits, exponent = value.as_tuple()
    if isinstance(exponent, int):  # else it is NaN or infinite
        whole, scale = len(digits) + exponent, -exponent
        for kind, most_whole, most_scale in (("NUMERIC", 29, 9), ("BIGNUMERIC", 38, 38)):
            if whole <= most_whole and scale <= most_scale:
                return kind
    raise ValueError(
        f"{value} is no BIGNUMERIC, which has 38 digits before the point and 38 behind it. Round it, or give it as "
        "text"
    )


def _text(value: Any) -> str | None:
    """As JSON of the API writes values: numbers too are strings."""
    if isinstance(value, bool):
        return str(value).lower()
    return None if value is None else str(value)


def _reference(project: str, table: str | None) -> dict[str, str] | None:
    if table is None:
        return None
    *owner, dataset, name = table.rsplit(".", 2)
    return {"projectId": owner[0] if owner else project, "datasetId": dataset, "tableId": name}


def jobs_in(project: str, *job: str, kind: str = "jobs") -> str:
    """The path of a project's jobs, or of one of them."""
    return "/bigquery/v2" + path("projects", project, kind, *job)


class JobHandle(BaseModel):
    """`created_ms`: where a list of jobs must begin, in ms since 1970."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    project: str
    location: str
    job_id: str
    created_ms: int = 0

    @property
    def url_path(self) -> str:
        return jobs_in(self.project, self.job_id)

    @property
    def results(self) -> str:
        """The path of a query's rows."""
        return jobs_in(self.project, self.job_id, kind="queries")

    @property
    def page(self) -> str:
        """In the console."""
        job = quote(f"bq:{self.location}:{self.job_id}", safe=":")
        at = f"https://console.cloud.google.com/bigquery?project={quote(self.project)}&j={job}"
        return f"{at}&page=queryresults"
