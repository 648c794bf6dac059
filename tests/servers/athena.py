"""Amazon Athena: moto keeps the queries and their results; tokens, batches, time, failures and pages are added here.

A query may say how it fares in a comment: `/* {"outcome": "fail" | "never" | "queued", "message": …, "seconds": …,
"error": {…}, "columns": [[name, type], …], "rows": [[…], …], "head": …} */`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from threading import Lock
from typing import Any, ClassVar

from tests.servers.aws import AwsServer, Forward
from tests.servers.base import Reply, serve

__all__ = ["AthenaServer"]

QUEUED_SECONDS = 0.1
PAGE_ROWS = 1000
SYNTAX_ERROR = {"ErrorCategory": 2, "ErrorType": 1000, "Retryable": False}


class _Query:
    """How one query fares. Times are of the monotonic clock."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        told = re.search(r"/\*(.*)\*/", request["QueryString"], re.DOTALL)
        self.plan: dict[str, Any] = json.loads(told[1]) if told else {}
        self.began = time.monotonic()
        self.stopped: str | None = None
        self.is_shown = False

    @property
    def state(self) -> str:
        outcome, age = self.plan.get("outcome"), time.monotonic() - self.began
        if self.stopped is not None:
            return self.stopped
        if outcome == "queued" or age < QUEUED_SECONDS:
            return "QUEUED"
        if outcome == "never" or age < QUEUED_SECONDS + self.plan.get("seconds", 0.1):
            return "RUNNING"
        return "FAILED" if outcome == "fail" else "SUCCEEDED"

    @property
    def is_over(self) -> bool:
        return self.state in ("SUCCEEDED", "FAILED", "CANCELLED")

    @property
    def status(self) -> dict[str, Any]:
        match self.state:
            case "FAILED":
                error = self.plan.get("error", SYNTAX_ERROR)
                told = self.plan.get("message", "")
                more = {"StateChangeReason": told, "AthenaError": {**error, "ErrorMessage": told}}
            case "CANCELLED":
                more = {"StateChangeReason": "Query cancelled by user"}
            case _:
                more = {}
        return {"State": self.state, **more}

    def results(self) -> dict[str, Any]:
        """As moto takes them; the first row of a SELECT is the head of its table."""
        columns = self.plan.get("columns", [["day", "integer"], ["amount", "double"]])
        rows = self.plan.get("rows", [["1", "12.5"], ["2", None]])
        if self.plan.get("head", True):
            rows = [[name for name, _ in columns], *rows]
        return {
            "rows": [
                {"Data": [{} if text is None else {"VarCharValue": text} for text in row]}
                for row in rows
            ],
            "column_info": [{"Name": name, "Type": kind} for name, kind in columns],
        }


class AthenaServer(AwsServer):
    service = "athena"
    model = "athena"
    target = "AmazonAthena"
    version = "1.1"
    kinds: ClassVar[Mapping[str, str]] = {
        "StartQueryExecution": "create",
        "GetQueryExecution": "get",
        "BatchGetQueryExecution": "get_many",
        "StopQueryExecution": "delete",
        "GetQueryResults": "outputs",
    }

    def __init__(self, *, port: int = 0) -> None:
        super().__init__(port=port)
        self._queries: dict[str, _Query] = {}
        self._tokens: dict[str, str] = {}
        self._lock = Lock()

    def reset(self) -> None:
        super().reset()
        self._clear()

    def forget(self) -> None:
        super().forget()
        self._clear()

    def _clear(self) -> None:
        self._queries.clear()
        self._tokens.clear()
        # Time is kept here; moto's queries are done as soon as they are looked at.
        immediate = {"model_name": "athena::execution", "transition": {"progression": "immediate"}}
        self.moto.control("state-manager/set-transition", immediate)

    def made(self) -> int:
        return self.lost + len(self.ask("ListQueryExecutions")["QueryExecutionIds"])

    def live(self) -> int:
        return sum(not query.is_over for query in list(self._queries.values()))

    def answered(self, operation: str, data: Any, forward: Forward) -> Reply:
        with self._lock:
            match operation:
                case "StartQueryExecution":
                    return self._started(data, forward)
                case "BatchGetQueryExecution":
                    return self._batch(data["QueryExecutionIds"])
                case _:
                    return self._of_query(operation, data, forward)

    def _started(self, data: Any, forward: Forward) -> Reply:
        token = data.get("ClientRequestToken")
        if token is None:
            return _invalid("INVALID_INPUT", "clientRequestToken is null or empty")
        if not data["QueryString"].lstrip().upper().startswith(("SELECT", "SHOW", "INSERT", "/*")):
            return _invalid(
                "MALFORMED_QUERY", f"line 1:1: mismatched input {data['QueryString']!r}"
            )
        known = self._tokens.get(token)
        if known is not None:
            if _compared(self._queries[known].request) != _compared(data):
                told = "Idempotent parameters do not match"
                return _invalid("IDEMPOTENT_PARAMETER_MISMATCH", told)
            return Reply(200, {"QueryExecutionId": known})
        reply = forward()
        if reply.status == 200:
            made = json.loads(reply.content)["QueryExecutionId"]
            self._tokens[token] = made
            self._queries[made] = _Query(data)
        return reply

    def _of_query(self, operation: str, data: Any, forward: Forward) -> Reply:
        name = data["QueryExecutionId"]
        query = self._queries.get(name)
        if query is None:
            told = f"QueryExecution {name} was not found"
            return _invalid("QUERY_EXECUTION_NOT_FOUND", told)
        match operation:
            case "GetQueryExecution":
                return Reply(200, {"QueryExecution": self._told(name, query)})
            case "StopQueryExecution":
                if query.is_over:
                    return Reply(200, {})
                query.stopped = "CANCELLED"
                return forward()
            case _:
                return self._page(name, query, data)

    def _told(self, name: str, query: _Query) -> dict[str, Any]:
        seen = self.ask("GetQueryExecution", QueryExecutionId=name)["QueryExecution"]
        return seen | {"Status": seen["Status"] | query.status}

    def _batch(self, names: list[str]) -> Reply:
        known = [name for name in names if name in self._queries]
        missing = [
            {"QueryExecutionId": name, "ErrorCode": "INVALID_INPUT", "ErrorMessage": "not found"}
            for name in names
            if name not in known
        ]
        told = [self._told(name, self._queries[name]) for name in reversed(known)]
        return Reply(200, {"QueryExecutions": told, "UnprocessedQueryExecutionIds": missing})

    def _page(self, name: str, query: _Query, data: Any) -> Reply:
        if query.state != "SUCCEEDED":
            told = f"Query has not yet finished. Current state: {query.state}"
            return _invalid("INVALID_QUERY_EXECUTION_STATE", told)
        if not query.is_shown:  # moto gives the oldest of its results to whom it shows any first
            query.is_shown = True
            self.moto.control("static/athena/query-results", {"results": [query.results()]})
        found = self.ask("GetQueryResults", QueryExecutionId=name)["ResultSet"]
        begin = int(data.get("NextToken", "page-0").removeprefix("page-"))
        end = begin + data.get("MaxResults", PAGE_ROWS)
        page: dict[str, Any] = {"ResultSet": found | {"Rows": found["Rows"][begin:end]}}
        if "written" in query.plan:
            page["UpdateCount"] = query.plan["written"]
        if end < len(found["Rows"]):
            page["NextToken"] = f"page-{end}"
        return Reply(200, page)


def _invalid(code: str, message: str) -> Reply:
    """Athena's own code beside that of the protocol."""
    body = {"__type": "InvalidRequestException", "AthenaErrorCode": code, "Message": message}
    return Reply(400, body)


def _compared(request: Mapping[str, Any]) -> Any:
    """What Athena compares under one token; work group and parameters it does not."""
    context, results = request.get("QueryExecutionContext", {}), request.get("ResultConfiguration")
    return request["QueryString"], context.get("Database"), results


if __name__ == "__main__":
    serve(AthenaServer())
