"""AWS Step Functions: moto runs the state machine; what it lets pass is refused here, and causes are kept."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any, ClassVar

from tests.servers.aws import ACCOUNT, REGION, AwsServer, Forward, refused
from tests.servers.base import Reply, serve

__all__ = ["EXPRESS", "MACHINE", "StepFunctionsServer"]

_MACHINES = f"arn:aws:states:{REGION}:{ACCOUNT}:stateMachine"
MACHINE = f"{_MACHINES}:report"
"""Takes `{"outcome": "fail" | "never", "error": …, "message": …, "seconds": …, "result": …}`."""
EXPRESS = f"{_MACHINES}:report-express"


def _is(name: str, value: str) -> list[dict[str, Any]]:
    variable = f"$.{name}"
    return [
        {"Variable": variable, "IsPresent": True},
        {"Variable": variable, "StringEquals": value},
    ]


_DEFINITION = {
    "StartAt": "Which",
    "States": {
        "Which": {
            "Type": "Choice",
            "Choices": [
                {"And": _is("outcome", "fail"), "Next": "Fail"},
                {"And": _is("outcome", "never"), "Next": "Never"},
                {"Variable": "$.seconds", "IsPresent": True, "Next": "Work"},
            ],
            "Default": "Worked",
        },
        "Fail": {"Type": "Fail", "ErrorPath": "$.error", "CausePath": "$.message"},
        "Never": {"Type": "Wait", "Seconds": 3600, "End": True},
        "Work": {"Type": "Wait", "SecondsPath": "$.seconds", "Next": "Worked"},
        "Worked": {"Type": "Pass", "OutputPath": "$.result", "End": True},
    },
}


class StepFunctionsServer(AwsServer):
    service = "states"
    model = "stepfunctions"
    target = "AWSStepFunctions"
    version = "1.0"
    kinds: ClassVar[Mapping[str, str]] = {
        "StartExecution": "create",
        "DescribeExecution": "get",
        "StopExecution": "delete",
        "StartSyncExecution": "do",
    }

    def reset(self) -> None:
        super().reset()
        self._stops: dict[str, dict[str, str]] = {}
        self._build()

    def forget(self) -> None:
        super().forget()
        self._build()

    def _build(self) -> None:
        self.ask(
            "CreateStateMachine",
            name="report",
            definition=json.dumps(_DEFINITION),
            roleArn=f"arn:aws:iam::{ACCOUNT}:role/any",
        )

    def executions(self, **only: str) -> list[dict[str, Any]]:
        return self.ask("ListExecutions", stateMachineArn=MACHINE, **only)["executions"]

    def made(self) -> int:
        return self.lost + len(self.executions())

    def live(self) -> int:
        return len(self.executions(statusFilter="RUNNING"))

    def answered(self, operation: str, data: Any, forward: Forward) -> Reply:
        match operation:
            case "StartExecution":
                return self._started(data, forward)
            case "StopExecution":
                reply = forward()
                if reply.status == 200:
                    self._stops.setdefault(data["executionArn"], data)
                    return Reply(200, {"stopDate": time.time()})
                return reply
            case "StartSyncExecution":
                return self._done(data)
            case _:
                return self._described(data, forward)

    def _started(self, data: Any, forward: Forward) -> Reply:
        name = data.get("name", "")
        if not re.fullmatch(r"[^\s<>{}\[\]?*\"#%\\^|~`$&,;:/\x00-\x1f\x7f-\x9f]{1,80}", name):
            return refused("InvalidName", f"Invalid Name: '{name}'")
        try:
            json.loads(data.get("input", "{}"))
        except ValueError as error:
            return refused(
                "InvalidExecutionInput", f"Invalid State Machine Execution Input: '{error}'"
            )
        if data["stateMachineArn"] == EXPRESS:  # starts again at each call, and can't be looked at
            arn = f"{EXPRESS.replace(':stateMachine:', ':express:')}:{name}:{uuid.uuid4()}"
            return Reply(200, {"executionArn": arn, "startDate": time.time()})
        return forward()

    def _done(self, data: Any) -> Reply:
        """moto lacks it: an execution of the other machine, looked at until it is over."""
        if data["stateMachineArn"] != EXPRESS:
            told = "This operation is not supported by this type of state machine"
            return refused("StateMachineTypeNotSupported", told)
        name = str(uuid.uuid4())
        made = self.ask("StartExecution", stateMachineArn=MACHINE, name=name, input=data["input"])
        seen = {"status": "RUNNING"}
        while seen["status"] == "RUNNING":
            time.sleep(0.02)
            seen = self.ask("DescribeExecution", executionArn=made["executionArn"])
        arn = f"{EXPRESS.replace(':stateMachine:', ':express:')}:{data['name']}:{name}"
        return Reply(200, _as_aws(seen) | {"executionArn": arn, "stateMachineArn": EXPRESS})

    def _described(self, data: Any, forward: Forward) -> Reply:
        reply = forward()
        if reply.status != 200:
            return reply
        told = _as_aws(json.loads(reply.content))
        if told["status"] == "ABORTED":
            stop = self._stops.get(data["executionArn"], {})
            told |= {k: stop[k] for k in ("error", "cause") if k in stop}
        return Reply(200, told)


def _as_aws(told: dict[str, Any]) -> dict[str, Any]:
    """Of a text moto shows the text itself, not its JSON."""
    if told["status"] == "SUCCEEDED":
        told["output"] = json.dumps(json.loads(told["input"])["result"])
    return told


if __name__ == "__main__":
    serve(StepFunctionsServer())
