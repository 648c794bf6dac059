"""What crosses the border: the spec that users write, the handle, Google's view of a job."""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.alias_generators import to_camel

from prefect_webapi import JobSpec

_TABLE = r"^([^.\s`]+\.)?\w+\.[^.\s`]+$"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TYPES = {  # of query parameters; a datetime is a date, and a bool an int, so the order counts
    bool: "BOOL",
    int: "INT64",
    float: "FLOAT64",
    Decimal: "NUMERIC",
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
        parameters: values for `@name` in the query, bound by BigQuery: bool, int, float, Decimal, str, date,
            datetime (with a time zone: TIMESTAMP, without: DATETIME), or a list of one of these.
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
    return next((name for kind, name in _TYPES.items() if isinstance(value, kind)), None)


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


class JobHandle(BaseModel):
    """`created_ms`: where a list of jobs must begin, in ms since 1970."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    project: str
    location: str
    job_id: str
    created_ms: int = 0


# --- Google's answers: it may add fields, which are ignored ------------------------------------


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, alias_generator=to_camel, populate_by_name=True)


class JobReference(_Answer):
    project_id: str
    location: str
    job_id: str | None = None


class Problem(_Answer):
    reason: str = ""
    message: str = ""


class JobStatus(_Answer):
    state: str
    error_result: Problem | None = None
    errors: Sequence[Problem] = ()


class QueryStatistics(_Answer):
    num_dml_affected_rows: int | None = None
    schema_: Mapping[str, Any] = Field(default_factory=dict[str, Any], alias="schema")


class Statistics(_Answer):
    creation_time: int = 0
    start_time: int | None = None
    end_time: int | None = None
    total_bytes_processed: int = 0
    query: QueryStatistics = QueryStatistics()


class Destination(_Answer):
    destination_table: Mapping[str, str] | None = None


class Configuration(_Answer):
    labels: Mapping[str, str] = Field(default_factory=dict[str, str])
    query: Destination = Destination()
    load: Destination = Destination()
    copy_: Destination = Field(default=Destination(), alias="copy")


class JobView(_Answer):
    job_reference: JobReference
    status: JobStatus
    statistics: Statistics = Statistics()
    configuration: Configuration = Configuration()

    @property
    def handle(self) -> JobHandle | None:
        """None for a dry run: BigQuery made no job."""
        at = self.job_reference
        if at.job_id is None:
            return None
        return JobHandle(
            project=at.project_id,
            location=at.location,
            job_id=at.job_id,
            created_ms=self.statistics.creation_time,
        )

    @property
    def changed_at(self) -> datetime | None:
        told = self.statistics
        ms = told.end_time or told.start_time or told.creation_time
        return _EPOCH + timedelta(milliseconds=ms) if ms else None

    @property
    def table(self) -> str | None:
        parts = self.configuration
        for part in (parts.query, parts.load, parts.copy_):
            if at := part.destination_table:
                return f"bq://{at['projectId']}:{at['datasetId']}.{at['tableId']}"
        return None


FIELDS = (
    "jobReference,status,"
    "statistics(creationTime,startTime,endTime,totalBytesProcessed,query(numDmlAffectedRows,schema)),"
    "configuration(labels,query/destinationTable,load/destinationTable,copy/destinationTable)"
)
"""Of a job, all that `JobView` knows: whole jobs carry their query and its plan."""
