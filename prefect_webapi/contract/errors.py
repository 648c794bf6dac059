"""Every exception class of the package.

```
WebApiError
├── ConfigurationError (ValueError)   before anything remote: names field, value, remedy
│   ├── QuotaNotConfigured            a namespace without a quota
│   ├── DuplicatePlugin               an id or a default claimed twice
│   ├── UnknownTaskType               nobody serves it
│   ├── AmbiguousPlugin               several serve it, none is the default
│   ├── PluginDisabled                switched off by id
│   ├── SecretNotFound                no place has the key
│   └── HandleNotStorable             a handle that can't be kept or may hold a secret
├── RemoteError                       plugin authors raise these
│   ├── RemoteSystemError             network, time-out, 5xx: repeated
│   │   └── OutcomeUnknown            sent, no usable answer
│   ├── Throttled                     slow down: repeated, never counted as a failure
│   ├── RemoteUserError               the request is wrong: never repeated
│   │   └── BadTaskSpecification      known before any request was made
│   ├── AuthError                     401, 403: repeated once with fresh credentials
│   ├── NotFound                      no such job
│   └── AlreadyExists                 create met a job under our key
├── LedgerError
│   ├── LedgerConflict                somebody else owns the record now
│   ├── LedgerFormatTooNew            written by a newer version
│   └── LedgerUnavailable             can't be reached, so nothing may be started
├── EngineClosed                      the process is ending: nothing new is admitted
└── JobFailed                         what a task raises: carries the PhaseInfo
```

An error keeps its facts as attributes, builds its text itself, and survives pickling, since Prefect
stores exceptions. No text holds a secret, a header or a request body.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect_webapi.contract.phase import PhaseInfo

__all__ = [
    "AlreadyExists",
    "AmbiguousPlugin",
    "AuthError",
    "BadTaskSpecification",
    "ConfigurationError",
    "DuplicatePlugin",
    "EngineClosed",
    "HandleNotStorable",
    "JobFailed",
    "LedgerConflict",
    "LedgerError",
    "LedgerFormatTooNew",
    "LedgerUnavailable",
    "NoLedger",
    "NotFound",
    "OutcomeUnknown",
    "PluginDisabled",
    "QuotaNotConfigured",
    "RemoteError",
    "RemoteSystemError",
    "RemoteUserError",
    "SecretNotFound",
    "Throttled",
    "UnknownTaskType",
    "WebApiError",
]


class WebApiError(Exception):
    """The root: every error of this package is one."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Classes build their text from their facts, so `args` is not what __init__ takes.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[WebApiError], args: tuple[Any, ...], facts: dict[str, Any]) -> WebApiError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(facts)
    return error


# --- configuration ---------------------------------------------------------------------------


class ConfigurationError(WebApiError, ValueError):
    """Something is set wrongly, found before anything remote happened."""


class QuotaNotConfigured(ConfigurationError):
    """A task asked for a resource namespace that has no quota.

    Attributes:
        namespace: what `resource_requirements` returned.
        configured: the namespaces that `resource_quotas` names.
    """

    def __init__(self, namespace: str, configured: Iterable[str]) -> None:
        self.namespace = namespace
        self.configured = tuple(sorted(configured))
        known = ", ".join(self.configured) or "none"
        super().__init__(
            f"resource_quotas has no entry for namespace {namespace!r} (it has: {known}). "
            f"Add `{namespace}: <number of jobs>` to the block's resource quotas."
        )


class DuplicatePlugin(ConfigurationError):
    """Two plugin entries claim the same id or the same default."""


class UnknownTaskType(ConfigurationError):
    """No plugin serves this task type and there is no default plugin.

    Attributes:
        task_type: what was asked for.
        known: every task type that has a plugin.
    """

    def __init__(self, task_type: str, known: Iterable[str]) -> None:
        self.task_type = task_type
        self.known = tuple(sorted(known))
        super().__init__(
            f"no plugin serves task type {task_type!r} (known: {', '.join(self.known) or 'none'}). "
            "Install the package that serves it, or correct the name."
        )


class AmbiguousPlugin(ConfigurationError):
    """Several plugins serve this task type and none is its default.

    Attributes:
        task_type: what was asked for.
        candidates: ids of the plugins that serve it.
    """

    def __init__(self, task_type: str, candidates: Iterable[str]) -> None:
        self.task_type = task_type
        self.candidates = tuple(sorted(candidates))
        super().__init__(
            f"task type {task_type!r} is served by {', '.join(self.candidates)} and none of them is "
            f"its default. Pass plugin={self.candidates[0]!r} to the task, or let one entry name "
            "it in default_for_task_types."
        )


class PluginDisabled(ConfigurationError):
    """The plugin that serves this task is switched off by its id.

    Attributes:
        plugin: the plugin's id.
    """

    def __init__(self, plugin: str) -> None:
        self.plugin = plugin
        super().__init__(
            f"plugin {plugin!r} is disabled. Remove it from "
            "PREFECT_INTEGRATIONS_WEBAPI_DISABLED_PLUGINS to use it."
        )


class SecretNotFound(ConfigurationError):
    """A secret has no value in any of the places searched.

    Attributes:
        key: the secret's name.
        searched: the places, in the order in which they were searched.
    """

    def __init__(self, key: str, searched: Iterable[str]) -> None:
        self.key = key
        self.searched = tuple(searched)
        super().__init__(
            f"secret {key!r} was not found. Searched: {'; '.join(self.searched)}. "
            "Give it a value in one of them."
        )


class HandleNotStorable(ConfigurationError):
    """A plugin's handle type can't be written down and read back, or may hold a secret."""


# --- remote ----------------------------------------------------------------------------------


class RemoteError(WebApiError):
    """What a call to the remote service came to.

    Attributes:
        message: the service's own words, without secrets.
        code: the service's or HTTP's code, for people and for retry rules.
        job_may_exist: asked after `create` only: can the service have made the job? What surely
            was not sent or was refused is False and may be repeated safely.
    """

    job_may_exist: bool = True

    def __init__(
        self, message: str = "", *, code: str | None = None, job_may_exist: bool | None = None
    ) -> None:
        self.message = message
        self.code = code or type(self).__name__
        if job_may_exist is not None:
            self.job_may_exist = job_may_exist
        super().__init__(message)


class RemoteSystemError(RemoteError):
    """The service or the way to it failed: connection, time-out, 5xx, an unreadable answer.

    `create` and `delete` are repeated; a failed `get` is counted. Set ``job_may_exist=False`` where
    nothing can have reached the service.
    """


class Throttled(RemoteError):
    """The service asks for less.

    Attributes:
        retry_after: how long no call of this kind may leave; None: the service did not say.
    """

    job_may_exist = False

    def __init__(
        self,
        message: str = "",
        *,
        retry_after: timedelta | None = None,
        code: str | None = None,
        job_may_exist: bool | None = None,
    ) -> None:
        super().__init__(message, code=code, job_may_exist=job_may_exist)
        self.retry_after = retry_after


class RemoteUserError(RemoteError):
    """The request is wrong (400, 404 on create, 405, 413, 422 …): the task fails at once."""

    job_may_exist = False


class BadTaskSpecification(RemoteUserError):
    """The spec can't work; found by the plugin before it sent anything."""


class AuthError(RemoteError):
    """401 or 403. The plugin's instance is loaded anew once, then the task fails for good."""

    job_may_exist = False


class NotFound(RemoteError):
    """The service knows no such job. From `delete`: done. From `get`: believed when confirmed."""

    job_may_exist = False


class AlreadyExists(RemoteError):
    """`create` met a job that has our key already.

    Attributes:
        handle: that job's handle; None: the engine asks `find`.
        fingerprint: what the service keeps of the fingerprint the job was made with (16 hexadecimal
            digits or more); None: unknown.
    """

    def __init__(
        self, message: str = "", *, handle: object | None = None, fingerprint: str | None = None
    ) -> None:
        super().__init__(message)
        self.handle = handle
        self.fingerprint = fingerprint


class OutcomeUnknown(RemoteSystemError):
    """The request was sent and no usable answer came: what it did is not known."""


# --- ledger ----------------------------------------------------------------------------------


class LedgerError(WebApiError):
    """The ledger, the engine's only memory, can't do what was asked."""


class LedgerConflict(LedgerError):
    """Another process owns the record now (a newer fencing number)."""


class LedgerFormatTooNew(LedgerError):
    """The ledger was written by a newer version of this package."""


class LedgerUnavailable(LedgerError):
    """The ledger can't be reached, so no job may be started that could not be remembered."""


class NoLedger(LedgerError):
    """There is no ledger at the address: no job was ever started with these settings.

    Args:
        address: where one was looked for, without credentials.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        super().__init__(
            f"there is no ledger at {address}, and none was made: it comes with the first job. If jobs were run, "
            "they used another one: see `prefect-webapi config show`, setting LEDGER_URL."
        )


class EngineClosed(WebApiError):
    """The process is ending; the job stays as it is and the next process takes it up."""


# --- what a task raises ----------------------------------------------------------------------


class JobFailed(WebApiError):
    """A remote job did not succeed. `.result()` and a direct call raise this.

    Attributes:
        info: the last phase with its error.
        job_key: the job's name in the ledger and at the remote service.
        retryable: whether a new attempt may help; Prefect's `retries` follow it.
    """

    def __init__(self, info: PhaseInfo, *, job_key: str, retryable: bool) -> None:
        self.info = info
        self.job_key = job_key
        self.retryable = retryable
        error = info.err
        told = f"{error.code}: {error.message}" if error else info.reason
        super().__init__(f"{told or info.phase.name} (job {job_key})")
