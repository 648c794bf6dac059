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
    )
    from prefect_webapi.contract.contexts import (
        DeleteContext,
        GetContext,
        MetricsScope,
        PluginSetupContext,
        StatusContext,
        TaskExecutionContext,
        TaskExecutionContextReader,
    )
    from prefect_webapi.contract.duration import GoDuration
    from prefect_webapi.contract.errors import (
        AlreadyExists,
        AuthError,
        BadTaskSpecification,
        ConfigurationError,
        JobFailed,
        LedgerError,
        NotFound,
        OutcomeUnknown,
        RemoteError,
        RemoteSystemError,
        RemoteUserError,
        Throttled,
        WebApiError,
    )
    from prefect_webapi.contract.flags import FlagSet
    from prefect_webapi.contract.phase import (
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
        PluginEntry,
        SyncPlugin,
    )
    from prefect_webapi.contract.task import (
        JobSpec,
        ResourceConstraintsSpec,
        ResourceRequirements,
        TaskExecutionMetadata,
        TaskTemplate,
    )
    from prefect_webapi.http import Answer, RemoteClient, classify, path
    from prefect_webapi.registry import register
    from prefect_webapi.tasks import RemoteTask, run_key, sync_task_for, task_for, webapi_task

__all__ = [
    "DEFAULT_PLUGIN_CONFIG",
    "AlreadyExists",
    "Answer",
    "AsyncPlugin",
    "AuthError",
    "BadTaskSpecification",
    "CachingConfig",
    "ConfigurationError",
    "CreateResult",
    "DeleteContext",
    "EngineSettings",
    "ExecutionError",
    "ExternalResource",
    "FlagSet",
    "GetContext",
    "GoDuration",
    "JobFailed",
    "JobSpec",
    "LedgerError",
    "MetricsScope",
    "NotFound",
    "OutcomeUnknown",
    "Phase",
    "PhaseInfo",
    "PluginConfig",
    "PluginEntry",
    "PluginSetupContext",
    "RateLimiterConfig",
    "ReasonInfo",
    "RemoteClient",
    "RemoteError",
    "RemoteSystemError",
    "RemoteTask",
    "RemoteUserError",
    "ResourceConstraintsSpec",
    "ResourceQuotas",
    "ResourceRequirements",
    "StatusContext",
    "SyncPlugin",
    "TaskExecutionContext",
    "TaskExecutionContextReader",
    "TaskExecutionMetadata",
    "TaskInfo",
    "TaskLog",
    "TaskTemplate",
    "Throttled",
    "WebApiError",
    "classify",
    "path",
    "register",
    "run_key",
    "sync_task_for",
    "task_for",
    "webapi_task",
]

_CONTRACT = "prefect_webapi.contract"
_HOMES = {
    f"{_CONTRACT}.config": (
        "DEFAULT_PLUGIN_CONFIG CachingConfig EngineSettings PluginConfig RateLimiterConfig ResourceQuotas"
    ),
    f"{_CONTRACT}.contexts": (
        "DeleteContext GetContext MetricsScope PluginSetupContext StatusContext TaskExecutionContext "
        "TaskExecutionContextReader"
    ),
    f"{_CONTRACT}.duration": "GoDuration",
    f"{_CONTRACT}.errors": (
        "AlreadyExists AuthError BadTaskSpecification ConfigurationError JobFailed LedgerError NotFound "
        "OutcomeUnknown RemoteError RemoteSystemError RemoteUserError Throttled WebApiError"
    ),
    f"{_CONTRACT}.flags": "FlagSet",
    f"{_CONTRACT}.phase": (
        "ExecutionError ExternalResource Phase PhaseInfo ReasonInfo TaskInfo TaskLog"
    ),
    f"{_CONTRACT}.plugin": "AsyncPlugin CreateResult PluginEntry SyncPlugin",
    f"{_CONTRACT}.task": (
        "JobSpec ResourceConstraintsSpec ResourceRequirements TaskExecutionMetadata TaskTemplate"
    ),
    "prefect_webapi.http": "Answer RemoteClient classify path",
    "prefect_webapi.registry": "register",
    "prefect_webapi.tasks": "RemoteTask run_key sync_task_for task_for webapi_task",
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
