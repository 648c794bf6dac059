"""Every check of the contract, in the order in which they are run and shown."""

from __future__ import annotations

from prefect_webapi.testing.conformance import access, creating, ending, judging
from prefect_webapi.testing.conformance.trial import Check

__all__ = ["CHECKS"]

_MADE = ("one-create",)
_ONCE = ("repeated-create", "find")

CHECKS = (
    Check(
        "handle",
        "create gives a handle that survives a restart, reads the job alone, and holds no secret",
        creating.create_returns_a_handle_that_can_be_kept,
    ),
    Check(
        "status-offline",
        "status asks nobody: it judges with every socket refused",
        judging.status_asks_nobody,
        after=("handle",),
    ),
    Check(
        "states",
        "every documented state has its phase",
        judging.every_documented_state_is_judged,
        after=("status-offline",),
    ),
    Check(
        "unknown-state",
        "a state that the service invents ends no job",
        judging.a_state_that_is_new_ends_no_job,
        after=("status-offline",),
    ),
    Check(
        "result",
        "a job runs to its end, and its result comes back",
        creating.a_job_runs_and_its_result_comes_back,
        after=("handle", "states"),
        of_calls=True,
    ),
    Check(
        "one-create",
        "one call makes one job",
        creating.one_call_makes_one_job,
        after=("result",),
        of_calls=True,
    ),
    Check(
        "failure",
        "a job that fails ends the task in the service's own words",
        ending.a_job_that_fails_fails_in_the_services_words,
        after=("result",),
        of_calls=True,
    ),
    Check(
        "repeated-create",
        "a create that is repeated with its key makes no second job",
        creating.a_repeated_create_makes_no_second_job,
        after=_MADE,
        of_calls=True,
    ),
    Check(
        "find",
        "a job is found by its key, and no other one is",
        creating.find_finds_the_job_by_its_key,
        after=_MADE,
    ),
    Check(
        "lost-answer",
        "a job whose create was never answered is not made twice",
        creating.a_lost_answer_makes_no_second_job,
        after=_ONCE,
        on_the_wire=True,
        of_calls=True,
    ),
    Check(
        "nonsense-answer",
        "nor is one for which a proxy answered in the service's place",
        creating.a_nonsense_answer_makes_no_second_job,
        after=("lost-answer",),
        on_the_wire=True,
        of_calls=True,
    ),
    Check(
        "lost-request",
        "a create that never arrived makes one job, or none where nobody can tell",
        creating.a_lost_request_makes_one_job_or_none,
        after=_ONCE,
        on_the_wire=True,
        of_calls=True,
    ),
    Check(
        "refused-connection",
        "where nobody listens, it is known that nothing was made",
        creating.where_nobody_listens_nothing_was_made,
        after=_MADE,
        on_the_wire=True,
        of_calls=True,
    ),
    Check(
        "adoption",
        "the next process takes the job over",
        creating.the_next_process_takes_the_job_over,
        after=_MADE,
    ),
    Check(
        "cancel-running",
        "a running job that is cancelled is over at the service",
        ending.a_running_job_is_over_after_a_cancel,
        after=_MADE,
    ),
    Check(
        "cancel-queued",
        "so is one that was queued",
        ending.a_queued_job_is_over_after_a_cancel,
        after=("cancel-running",),
    ),
    Check(
        "cancel-creating",
        "and one whose create was not answered yet",
        ending.a_job_cancelled_while_it_is_made_is_over,
        after=("cancel-running",),
        on_the_wire=True,
    ),
    Check(
        "delete-twice",
        "deleting a job that is over is no fault",
        ending.deleting_a_job_that_is_over_is_no_fault,
        after=_MADE,
    ),
    Check(
        "unknown-job",
        "a job that the service does not know is said to be unknown",
        ending.a_job_that_is_unknown_is_said_to_be,
        after=_MADE,
    ),
    Check(
        "vanish",
        "a job that vanishes is told, and not made anew",
        ending.a_job_that_vanishes_is_told_and_not_made_anew,
        after=("unknown-job",),
        on_the_wire=True,
    ),
    Check(
        "throttle-create",
        "a service that asks for less is obeyed, for as long as it says",
        access.a_throttled_create_waits_as_long_as_it_is_told,
        after=_MADE,
        on_the_wire=True,
        of_calls=True,
    ),
    Check(
        "throttle-read",
        "reads that are throttled lose no job",
        access.throttled_reads_lose_no_job,
        after=_MADE,
        on_the_wire=True,
    ),
    Check(
        "nonsense-read",
        "reads that make no sense lose no job",
        access.a_read_without_sense_loses_no_job,
        after=_MADE,
        on_the_wire=True,
    ),
    Check(
        "auth-refresh",
        "a credential that is refused is renewed once",
        access.a_refused_credential_is_renewed_once,
        after=_MADE,
        on_the_wire=True,
        of_calls=True,
    ),
    Check(
        "auth-refused",
        "one that stays refused ends the task and makes no job",
        access.a_credential_that_stays_refused_ends_the_task,
        after=("auth-refresh",),
        on_the_wire=True,
        of_calls=True,
    ),
    Check(
        "redirect",
        "a redirect takes the credentials nowhere",
        access.a_redirect_is_not_followed,
        after=_MADE,
        on_the_wire=True,
        of_calls=True,
    ),
    Check(
        "cleartext",
        "credentials do not travel without TLS",
        access.credentials_do_not_travel_in_the_clear,
        on_the_wire=True,
        of_calls=True,
    ),
    Check(
        "secrets",
        "no secret gets into a log, an error, the ledger or what is shown",
        access.no_secret_gets_out,
        after=_MADE,
        of_calls=True,
    ),
    Check(
        "batch",
        "jobs are read in batches, each to its own end",
        access.many_jobs_each_get_their_own_end,
        after=_MADE,
    ),
)
