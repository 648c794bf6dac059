"""What crosses the border: the spec that users write, the handle, the server's view of a job."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from prefect_webapi import JobSpec


class Report(BaseModel):
    """What the task returns: where the report is, and what it says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uri: str
    data: Any = None


class ReportJob(JobSpec[Report]):
    """A report to be made. Spans are in seconds.

    Attributes:
        outcome: ``fail-first``: the first of equal jobs fails, the next one succeeds; ``vanish``: the server forgets
            the job at its end; ``never``: it runs until it is cancelled.
        result: what the report shall say.
        quota: the quota of the connection's block that the job counts against.
        dies_in: how long a cancelled job goes on.
        hidden_for: how long a new job can't be read.
    """

    kind: str = "report"
    day: int = 0
    seconds: float = Field(default=1.0, ge=0)
    queued_seconds: float = Field(default=0.0, ge=0)
    initializing_seconds: float = Field(default=0.0, ge=0)
    outcome: Literal["succeed", "fail", "fail-first", "vanish", "never"] = "succeed"
    message: str = ""
    result: Any = None
    quota: str = "default"
    dies_in: float = Field(default=0.0, ge=0)
    hidden_for: float = Field(default=0.0, ge=0)


class JobHandle(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str


class JobView(BaseModel):  # the server may add fields: they are ignored
    model_config = ConfigDict(frozen=True)

    name: str
    state: str
    message: str = ""
    result: Any = None
    fingerprint: str = ""
    link: str = ""
