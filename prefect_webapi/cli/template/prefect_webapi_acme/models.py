"""What crosses the border: the spec that users write, the handle, Acme's view of a job."""

from pydantic import BaseModel, ConfigDict

from prefect_webapi import JobSpec


class AcmeResult(BaseModel):
    """What the task returns."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str = ""  # CHANGE: what a job leaves


class AcmeJob(JobSpec[AcmeResult]):
    """A job for Acme. All of it is part of the job's identity; secrets belong into the block."""

    command: str  # CHANGE: what a job is told


class AcmeHandle(BaseModel):
    """Enough to read and delete the job after a restart."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str  # CHANGE: what names the job


class AcmeView(BaseModel):
    """What a read shows; the service may add fields: they are ignored."""

    model_config = ConfigDict(frozen=True)

    status: str  # CHANGE: as in the answer to a read, and so the next ones
    message: str = ""
    output: str = ""
