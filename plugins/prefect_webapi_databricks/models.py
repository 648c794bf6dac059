"""What crosses the border: the specs that users write, the handle, the workspace's view of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self, cast

from pydantic import (
    AliasChoices,
    AliasPath,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    field_validator,
    model_validator,
)

from prefect_webapi import BadTaskSpecification, JobSpec, TaskExecutionMetadata


class TaskOutput(BaseModel):
    """What one task of a run gave back.

    Attributes:
        result: what a notebook passed to `dbutils.notebook.exit`; of other kinds of tasks, their output as a dict.
        logs: what a script wrote.
        truncated: Databricks gives the first 5 MB of a result, and the last 5 MB of logs.
        error: why the task failed, or has no output.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str
    result: Any = None
    logs: str | None = None
    truncated: bool = False
    error: str | None = None


class RunResult(BaseModel):
    """What the task returns: the run, its page, and the outputs of its tasks by task key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str
    url: str
    outputs: dict[str, TaskOutput]


class DatabricksRun(JobSpec[RunResult]):
    """What `RunJob` and `SubmitRun` have in common.

    Attributes:
        more: further fields of the request, as in Databricks' reference of the Jobs API, such as `queue`.
        outputs_of: keys of the tasks whose outputs are fetched; None: of all.
        quota: the quota of the connection's block that the run counts against.
    """

    path: ClassVar[str]

    more: dict[str, Any] = Field(default_factory=dict)
    outputs_of: list[str] | None = None
    quota: str = "default"

    @model_validator(mode="wrap")
    @classmethod
    def _of_its_kind(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Read a spec that was kept as the class that it was."""
        if cls is DatabricksRun and isinstance(data, Mapping):
            for kind, field in ((RunJob, "job_id"), (SubmitRun, "tasks")):
                if field in data:
                    return cast(Self, kind.model_validate(data))
        return handler(data)

    @field_validator("more")
    @classmethod
    def _only_more(cls, more: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(more.keys() & {*cls.model_fields, "idempotency_token"}):
            raise ValueError(
                f"leave out {', '.join(taken)}: fields of the spec have their own arguments, the token is the job key"
            )
        return more

    def request(self, job: TaskExecutionMetadata) -> dict[str, Any]:
        """The body that makes the run."""
        raise BadTaskSpecification("a DatabricksRun names nothing to run: use RunJob or SubmitRun")

    def has_made(self, run: Run, job: TaskExecutionMetadata) -> bool:
        """Whether a run that has our token was made from this spec, as far as the run tells."""
        return True


class RunJob(DatabricksRun):
    """A run of a job that is there already.

    Attributes:
        job_parameters: values that override the job's own.
    """

    path: ClassVar[str] = "/run-now"

    job_id: int = Field(gt=0, lt=2**63)
    job_parameters: dict[str, str] = Field(default_factory=dict)

    def request(self, job: TaskExecutionMetadata) -> dict[str, Any]:
        ours = {"job_id": self.job_id, "job_parameters": self.job_parameters}
        return {**self.more, **ours, "idempotency_token": job.generated_name}

    def has_made(self, run: Run, job: TaskExecutionMetadata) -> bool:
        """Such a run has no room for a fingerprint; it shows its job, and its parameters with references resolved."""
        ours = {k: v for k, v in self.job_parameters.items() if "{{" not in v}
        return run.job_id == self.job_id and all(
            each.value == ours[each.name] for each in run.job_parameters if each.name in ours
        )


class SubmitRun(DatabricksRun):
    """A one-time run of tasks that are described here.

    Attributes:
        tasks: as in Databricks' reference of `jobs/runs/submit`, for example
            ``[{"task_key": "main", "notebook_task": {"notebook_path": "/Shared/sales"}}]``.
        run_name: shown in the workspace, followed by the job key and the beginning of the fingerprint.
        tags: for the run's compute and its bill; flow run, task run and job key are added.
    """

    path: ClassVar[str] = "/runs/submit"

    tasks: list[dict[str, Any]] = Field(min_length=1)
    run_name: str = Field(default="prefect", max_length=1000)
    tags: dict[str, str] = Field(default_factory=dict, max_length=22)

    @field_validator("tasks")
    @classmethod
    def _have_keys(cls, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        keys = Counter(str(task.get("task_key", "")) for task in tasks)
        if wrong := [key for key, times in keys.items() if not key or times > 1]:
            raise ValueError(f"each task needs a task_key of its own (wrong: {wrong})")
        return tasks

    def request(self, job: TaskExecutionMetadata) -> dict[str, Any]:
        labels = {k: v for k, v in job.labels.items() if k in _LABELS}
        return {
            **self.more,
            "tasks": self.tasks,
            "run_name": f"{self.run_name} [{job.generated_name} {job.fingerprint[:16]}]",
            "tags": self.tags | labels,
            "idempotency_token": job.generated_name,
        }

    def has_made(self, run: Run, job: TaskExecutionMetadata) -> bool:
        return not run.run_name or run.run_name.endswith(f" {job.fingerprint[:16]}]")


_LABELS = ("job_key", "flow_run_id", "task_run_id")  # a task's tags may hold what clouds refuse


class RunHandle(BaseModel):
    """`run_id` is a 64-bit number: as text it stays exact wherever the handle is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str = Field(pattern=r"^[0-9]+$")


# --- the workspace's answers: what it adds is ignored, and its words are judged elsewhere -------------


def _at(*paths: str) -> Any:
    """A text that stands at the first of these places that is there."""
    places = [AliasPath(*path.split(".")) for path in paths]
    return Field(default="", validation_alias=AliasChoices(*places))


Text = Annotated[str, BeforeValidator(lambda value: value or "")]


class TaskRun(BaseModel):
    """What a run and each of its tasks tell: `status` of API 2.2, and the `state` of 2.1 that stands beside it."""

    model_config = ConfigDict(frozen=True)

    run_id: int
    task_key: str = ""
    attempt_number: int = 0
    life: Text = _at("status.state", "state.life_cycle_state")
    result: Text = _at("state.result_state")
    code: Text = _at("status.termination_details.code", "status.queue_details.code")
    blame: Text = _at("status.termination_details.type")
    told: Text = _at(
        *("status.termination_details.message", "status.queue_details.message"),
        *("state.state_message", "state.queue_reason"),
    )

    @property
    def is_over(self) -> bool:
        return self.life in ("TERMINATED", "SKIPPED", "INTERNAL_ERROR")

    @property
    def has_failed(self) -> bool:
        """By itself, not because another task did."""
        return self.result == "FAILED" or self.code == "RUN_EXECUTION_ERROR"

    @property
    def words(self) -> tuple[str, ...]:
        """What tells the phase, the most telling first.

        A run is INTERNAL_ERROR to API 2.1 when its task has merely failed: `blame` says whose fault it is.
        """
        if not self.is_over:
            return (self.life,)
        if self.result == "FAILED":
            return (self.code, self.blame, self.result)
        return (self.result, self.code, self.blame, self.life)


class Parameter(BaseModel):
    name: str
    value: str | None = Field(default=None, validation_alias=AliasChoices("value", "default"))


class Run(TaskRun):
    """A run, or a page of its tasks. `error` is ours: what the first task that failed said."""

    job_id: int | None = None
    run_name: Text = ""
    run_page_url: Text = ""
    job_parameters: tuple[Parameter, ...] = ()
    tasks: tuple[TaskRun, ...] = ()
    next_page_token: str | None = None
    error: str = ""
