"""Google's view of a job. It may add fields, which are ignored."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from prefect_webapi import CreateResult
from prefect_webapi_gcp.models import JobHandle

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


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
    def as_created(self) -> CreateResult[Any, Self]:
        """Without a handle for a dry run: it is over, and BigQuery can't be asked about it."""
        return CreateResult(self.handle, self, self.configuration.labels.get("fingerprint"))

    @property
    def bytes_processed(self) -> int:
        return self.statistics.total_bytes_processed

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
