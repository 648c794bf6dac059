"""Run work on somebody else's compute from a Prefect flow: exactly once, and nothing left behind.

Every public name is imported from here and loaded when it is first used, so that the contract for plugin authors comes
without Prefect.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect_webapi.contract.config import (
        DEFAULT_PLUGIN_CONFIG,
        CachingConfig,
        EngineSettings,
        PluginConfig,
        RateLimiterConfig,
        ResourceQuotas,
        read_mapping,
    )
    from prefect_webapi.contract.contexts import (
        DataStore,
        DeleteContext,
        GetContext,
        InputReader,
        MetricsScope,
        OutputWriter,
        PluginSetupContext,
        SecretManager,
        StatusContext,
        TaskExecutionContext,
        TaskExecutionContextReader,
        TaskReader,
    )
    from prefect_webapi.contract.duration import GoDuration
    from prefect_webapi.contract.errors import (
        AlreadyExists,
        AmbiguousPlugin,
        AuthError,
        BadTaskSpecification,
        ConfigurationError,
        DuplicatePlugin,
        EngineClosed,
        HandleNotStorable,
        JobFailed,
        LedgerConflict,
        LedgerError,
        LedgerFormatTooNew,
        LedgerUnavailable,
        NotFound,
        OutcomeUnknown,
        PluginDisabled,
        QuotaNotConfigured,
        RemoteError,
        RemoteSystemError,
        RemoteUserError,
        SecretNotFound,
        Throttled,
        UnknownTaskType,
        WebApiError,
    )
    from prefect_webapi.contract.faults import InvalidConfiguration
    from prefect_webapi.contract.flags import FlagSet
    from prefect_webapi.contract.phase import (
        ErrorKind,
        ExecutionError,
        ExternalResource,
        Phase,
        PhaseInfo,
        ReasonInfo,
        TaskInfo,
        TaskLog,
    )
    from prefect_webapi.contract.plugin import (
        AsyncPlugin,
        CreateResult,
        Guarantee,
        OptionalMethod,
        Plugin,
        PluginEntry,
        PluginLoader,
        SyncPlugin,
    )
    from prefect_webapi.contract.task import (
        JobSpec,
        ResourceConstraintsSpec,
        ResourceNamespace,
        ResourceRequirements,
        TaskExecutionMetadata,
        TaskTemplate,
    )
    from prefect_webapi.http import (
        Answer,
        Outgoing,
        RemoteClient,
        classify,
        error_of_status,
        path,
        retry_after,
    )
    from prefect_webapi.many import run_many
    from prefect_webapi.registry import Registry, default_registry, register
    from prefect_webapi.tasks import (
        JobOptions,
        RemoteTask,
        TaskOptions,
        run_key,
        sync_task_for,
        task_for,
        webapi_task,
    )

__all__ = [
    "DEFAULT_PLUGIN_CONFIG",
    "AlreadyExists",
    "AmbiguousPlugin",
    "Answer",
    "AsyncPlugin",
    "AuthError",
    "BadTaskSpecification",
    "CachingConfig",
    "ConfigurationError",
    "CreateResult",
    "DataStore",
    "DeleteContext",
    "DuplicatePlugin",
    "EngineClosed",
    "EngineSettings",
    "ErrorKind",
    "ExecutionError",
    "ExternalResource",
    "FlagSet",
    "GetContext",
    "GoDuration",
    "Guarantee",
    "HandleNotStorable",
    "InputReader",
    "InvalidConfiguration",
    "JobFailed",
    "JobOptions",
    "JobSpec",
    "LedgerConflict",
    "LedgerError",
    "LedgerFormatTooNew",
    "LedgerUnavailable",
    "MetricsScope",
    "NotFound",
    "OptionalMethod",
    "OutcomeUnknown",
    "Outgoing",
    "OutputWriter",
    "Phase",
    "PhaseInfo",
    "Plugin",
    "PluginConfig",
    "PluginDisabled",
    "PluginEntry",
    "PluginLoader",
    "PluginSetupContext",
    "QuotaNotConfigured",
    "RateLimiterConfig",
    "ReasonInfo",
    "Registry",
    "RemoteClient",
    "RemoteError",
    "RemoteSystemError",
    "RemoteTask",
    "RemoteUserError",
    "ResourceConstraintsSpec",
    "ResourceNamespace",
    "ResourceQuotas",
    "ResourceRequirements",
    "SecretManager",
    "SecretNotFound",
    "StatusContext",
    "SyncPlugin",
    "TaskExecutionContext",
    "TaskExecutionContextReader",
    "TaskExecutionMetadata",
    "TaskInfo",
    "TaskLog",
    "TaskOptions",
    "TaskReader",
    "TaskTemplate",
    "Throttled",
    "UnknownTaskType",
    "WebApiError",
    "classify",
    "default_registry",
    "error_of_status",
    "path",
    "read_mapping",
    "register",
    "retry_after",
    "run_key",
    "run_many",
    "sync_task_for",
    "task_for",
    "webapi_task",
]

_CONTRACT = "prefect_webapi.contract"
_HOMES = {
    f"{_CONTRACT}.config": (
        "DEFAULT_PLUGIN_CONFIG CachingConfig EngineSettings PluginConfig "
        "RateLimiterConfig ResourceQuotas read_mapping"
    ),
    f"{_CONTRACT}.contexts": (
        "DataStore DeleteContext GetContext InputReader MetricsScope OutputWriter "
        "PluginSetupContext SecretManager StatusContext TaskExecutionContext "
        "TaskExecutionContextReader TaskReader"
    ),
    f"{_CONTRACT}.duration": "GoDuration",
    f"{_CONTRACT}.errors": (
        "AlreadyExists AmbiguousPlugin AuthError BadTaskSpecification ConfigurationError "
        "DuplicatePlugin EngineClosed HandleNotStorable JobFailed LedgerConflict "
        "LedgerError LedgerFormatTooNew LedgerUnavailable NotFound OutcomeUnknown "
        "PluginDisabled QuotaNotConfigured RemoteError RemoteSystemError RemoteUserError "
        "SecretNotFound Throttled UnknownTaskType WebApiError"
    ),
    f"{_CONTRACT}.faults": "InvalidConfiguration",
    f"{_CONTRACT}.flags": "FlagSet",
    f"{_CONTRACT}.phase": (
        "ErrorKind ExecutionError ExternalResource Phase PhaseInfo ReasonInfo TaskInfo TaskLog"
    ),
    f"{_CONTRACT}.plugin": (
        "AsyncPlugin CreateResult Guarantee OptionalMethod Plugin PluginEntry PluginLoader SyncPlugin"
    ),
    f"{_CONTRACT}.task": (
        "JobSpec ResourceConstraintsSpec ResourceNamespace ResourceRequirements "
        "TaskExecutionMetadata TaskTemplate"
    ),
    "prefect_webapi.http": "Answer Outgoing RemoteClient classify error_of_status path retry_after",
    "prefect_webapi.many": "run_many",
    "prefect_webapi.registry": "Registry default_registry register",
    "prefect_webapi.tasks": (
        "JobOptions RemoteTask TaskOptions run_key sync_task_for task_for webapi_task"
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
