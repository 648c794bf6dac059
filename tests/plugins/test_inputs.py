"""What users hand to each plugin: the same job in every process, or a refusal that they can read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from prefect_webapi import BadTaskSpecification, JobSpec
from prefect_webapi.contract.keys import fingerprint_of
from prefect_webapi_aws import AthenaQuery, StateMachineRun
from prefect_webapi_databricks import RunJob, SubmitRun
from prefect_webapi_flyte import ConnectorJob
from prefect_webapi_gcp import BigQueryJob
from prefect_webapi_http import HttpJob
from prefect_webapi_snowflake import SnowflakeJob

MACHINE = "arn:aws:states:eu-central-1:123456789012:stateMachine:nightly"
DAY = datetime(2026, 1, 2, 3, tzinfo=UTC)


class Order(BaseModel):
    day: datetime
    tags: set[str]


@dataclass
class Line:
    day: datetime
    price: Decimal


VALUES: dict[str, Any] = {
    "model": Order(day=DAY, tags={"a", "b", "c"}),
    "dataclass": Line(DAY, Decimal("0.10")),
    "datetime": DAY,
    "date": date(2026, 1, 2),
    "decimal": Decimal("0.10"),
    "bytes": b"text",
    "binary": b"\xff",
    "set": {"a", "b", "c"},
    "object": object(),
}
SPECS: dict[str, tuple[str, Callable[[Any], JobSpec[Any]]]] = {
    "http": ("inputs", lambda value: HttpJob(inputs={"x": value})),
    "step-functions": (
        "input",
        lambda value: StateMachineRun(state_machine_arn=MACHINE, input={"x": value}),
    ),
    "athena": ("parameters", lambda value: AthenaQuery(query="SELECT ?", parameters=(value,))),
    "flyte": ("inputs", lambda value: ConnectorJob[Any](task_type="t", inputs={"x": value})),
    "databricks run": (
        "job_parameters",
        lambda value: RunJob(job_id=1, job_parameters={"x": value}),
    ),
    "databricks submit": ("tasks", lambda value: SubmitRun(tasks=[{"task_key": "a", "x": value}])),
    "snowflake": ("bindings", lambda value: SnowflakeJob(statement="SELECT ?", bindings=[value])),
    "bigquery": (
        "parameters",
        lambda value: BigQueryJob(query="SELECT @x", parameters={"x": value}),
    ),
}
ANY_JSON = {"model", "dataclass", "datetime", "date", "decimal", "bytes", "set"}
TAKES = {
    "http": ANY_JSON,
    "step-functions": set[str](),  # JSON alone, which is compared by its bytes
    "athena": {"decimal"},  # what SQL has literals for
    "flyte": {"datetime"},
    "databricks run": {"bytes"},  # texts
    "databricks submit": ANY_JSON,
    "snowflake": {"datetime", "date", "decimal"},
    "bigquery": {"datetime", "date", "decimal"},
}


def told_of(plugin: str) -> dict[str, str]:
    """``name of a value -> fingerprint``, or the refusal."""
    told: dict[str, str] = {}
    for name, value in VALUES.items():
        try:
            told[name] = fingerprint_of(plugin, "default", SPECS[plugin][1](value))
        except (ValidationError, BadTaskSpecification) as refused:
            told[name] = f"refused: {refused}"
    return told


@pytest.fixture(scope="module")
def elsewhere() -> dict[str, dict[str, str]]:
    """What another process says, whose sets have another order."""
    program = (
        "import json; from tests.plugins.test_inputs import SPECS, told_of; "
        "print(json.dumps({plugin: told_of(plugin) for plugin in SPECS}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "4711"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("plugin", SPECS)
def test_an_input_is_the_same_job_in_every_process_or_is_refused_in_words(
    elsewhere: dict[str, dict[str, str]], plugin: str
) -> None:
    """CASE-267: models, dataclasses, moments, bytes; what has no form on the wire is refused by the spec's field."""
    here, field = told_of(plugin), SPECS[plugin][0]
    taken = {name: told for name, told in here.items() if not told.startswith("refused")}
    assert set(taken) == TAKES[plugin]
    assert {name: elsewhere[plugin][name] for name in taken} == taken
    assert all(field in told for name, told in here.items() if name not in taken)
