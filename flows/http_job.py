"""Let a message queue count words: a service without a plugin of its own, whose API is described as data below.

`python flows/http_job.py --local` uses a server on this machine; without `--local` it uses your block `default`.
"""

import asyncio

from prefect import flow
from pydantic import HttpUrl, SecretStr

from prefect_webapi_http import HttpJobApi, JobApi, run_http_job

QUEUE = """
auth: {type: header, name: X-Api-Key}
create:
  path: /messages
  honoursKey: true  # in the header Idempotency-Key
  body: {queue: words, work: "{{ .inputs }}", tags: "{{ .labels }}"}
  handle: {number: /message/id}
  snapshotInAnswer: true
get: {path: "/messages/{{ .handle.number }}", item: /message}
delete: {method: POST, path: "/messages/{{ .handle.number }}/cancel", body: {why: "{{ .reason }}"}}
status:
  pointer: /state
  map: {WAITING: queued, BUSY: running, DONE: success, CANCELLED: aborted}
  success: {pointer: /exit, equals: 0}
  message: /says
  links: {Message: /links/page}
outputs: {request: {path: "/messages/{{ .handle.number }}/rows"}, pointer: /rows, paging: {next: /next}}
errors:  # told with HTTP 200
  - {pointer: /error/kind, pattern: ^(absent|over)$, means: notFound}
  - {pointer: /ok, pattern: ^false$, means: user, message: /error/text}
"""
BOOKS = {"Emma": ["I", "II", "III"], "Persuasion": ["I", "II"], "Sanditon": ["I"]}


@flow(log_prints=True)
async def count_words() -> None:
    work = {"waits": 0, "takes": 0.5, "exit": 0, "says": ""}
    job = run_http_job.with_options(retries=2)
    volumes = await asyncio.gather(*(job(inputs={**work, "rows": rows}) for rows in BOOKS.values()))
    for book, rows in zip(BOOKS, volumes, strict=True):
        print(f"{book}: {len(rows)} volumes counted")


if __name__ == "__main__":
    import local

    local.run(
        count_words,
        "message_queue",
        lambda url: HttpJobApi(
            base_url=HttpUrl(f"{url}/v1"),
            api=JobApi.model_validate(QUEUE),
            secret=SecretStr("local"),
        ),
    )
