"""Which plugin serves a task, and when plugins are loaded, replaced and closed. All loaders are fakes."""

from __future__ import annotations

import dataclasses
import logging
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, TypedDict

import anyio
import anyio.lowlevel
import pytest
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from prefect_webapi.contract.config import (
    CachingConfig,
    EngineSettings,
    PluginConfig,
    RateLimiterConfig,
)
from prefect_webapi.contract.contexts import (
    DeleteContext,
    GetContext,
    MetricsScope,
    PluginSetupContext,
    StatusContext,
    TaskExecutionContextReader,
)
from prefect_webapi.contract.errors import (
    AmbiguousPlugin,
    AuthError,
    ConfigurationError,
    DuplicatePlugin,
    EngineClosed,
    HandleNotStorable,
    PluginDisabled,
    RemoteSystemError,
    UnknownTaskType,
)
from prefect_webapi.contract.phase import PhaseInfo
from prefect_webapi.contract.plugin import AsyncPlugin, Plugin, PluginEntry, SyncPlugin
from prefect_webapi.contract.task import JobSpec
from prefect_webapi.registry import Connection, Loaded, Plugins, Registry, digest

# --- parts -----------------------------------------------------------------------------------


class Spec(JobSpec[None]):
    pass


class Server(BaseModel):
    """A connection."""

    model_config = ConfigDict(frozen=True)

    url: str = "https://host"
    token: SecretStr = SecretStr("canary")
    engine: PluginConfig = PluginConfig()
    settings: EngineSettings = EngineSettings()


class Handle(BaseModel):
    name: str


class Fake(AsyncPlugin[Handle, None]):
    """Knows whether it was closed."""

    def __init__(self, connection: Server) -> None:
        self.connection = connection
        self.closed = 0

    def get_config(self) -> PluginConfig:
        return self.connection.engine

    async def create(self, ctx: TaskExecutionContextReader) -> Handle:
        raise NotImplementedError

    async def get(self, ctx: GetContext[Handle]) -> None:
        raise NotImplementedError

    async def delete(self, ctx: DeleteContext[Handle]) -> None:
        raise NotImplementedError

    def status(self, ctx: StatusContext[Handle, None]) -> PhaseInfo:
        raise NotImplementedError

    async def aclose(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.closed += 1


Setup = PluginSetupContext[Server]


@dataclass
class Loader:
    """Makes fakes, or what it is told to do instead, and remembers them."""

    made: list[Fake] = field(default_factory=list[Fake])
    calls: int = 0
    instead: Callable[[Setup], Plugin | Awaitable[Plugin]] | None = None

    async def __call__(self, setup: Setup) -> Plugin:
        self.calls += 1
        await anyio.sleep(0.001)
        if self.instead is not None:
            plugin = self.instead(setup)
            return plugin if isinstance(plugin, AsyncPlugin | SyncPlugin) else await plugin
        self.made.append(Fake(setup.connection))
        return self.made[-1]


@dataclass
class Blocks:
    """Blocks by name; a block itself is inline."""

    blocks: dict[str, Any]
    looks: int = 0

    async def resolve(
        self, ref: Any, kind: type[Any], /, *, fresh: bool = False
    ) -> Connection[Any]:
        self.looks += 1
        await anyio.lowlevel.checkpoint()
        if isinstance(ref, BaseModel):
            return Connection("inline", digest(ref), ref, inline=True)
        value = self.blocks[ref or "default"]
        if isinstance(value, Exception):
            raise value
        if isinstance(value, dict):  # as a document that somebody broke
            value = kind.model_validate(value)
        return Connection(ref or "default", digest(value), value)


@dataclass
class Counters:
    counts: dict[str, float] = field(default_factory=dict[str, float])

    def scope(self, prefix: str, /) -> MetricsScope:
        return Scope(self, prefix)


@dataclass
class Scope:
    owner: Counters
    prefix: str

    def count(self, name: str, amount: float = 1, /, **labels: str) -> None:
        self.owner.counts[f"{self.prefix}.{name}"] = amount

    def observe(self, name: str, value: float, /, **labels: str) -> None: ...


@dataclass
class HandClock:
    """Stands still unless moved."""

    at: float = 0.0

    def monotonic(self) -> float:
        return self.at

    def real(self, seconds: float, /) -> float:
        return seconds


def entry(id: str, types: Sequence[str] = ("t",), **changes: Any) -> PluginEntry[Any]:
    facts: dict[str, Any] = {
        "id": id,
        "supported_task_types": types,
        "connection": Server,
        "spec": Spec,
        "plugin_loader": Loader(),
    }
    return PluginEntry(**facts | changes)


def registry_of(*entries: PluginEntry[Any]) -> Registry:
    registry = Registry()
    for each in entries:
        registry.register(each)
    return registry


# --- registering -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"id": ""}, "id: is empty. Give the plugin a unique name."),
        ({"id": None}, "id: is empty"),
        ({"supported_task_types": []}, "supported_task_types: is empty. Name at least one"),
        ({"supported_task_types": None}, "supported_task_types: is not a list of task types"),
        ({"supported_task_types": "job"}, "supported_task_types: is not a list of task types"),
        ({"supported_task_types": ["a", ""]}, "supported_task_types: holds an empty task type"),
        ({"supported_task_types": ["a", "a"]}, "supported_task_types: names 'a' twice"),
        ({"plugin_loader": None}, "plugin_loader: is not callable"),
        ({"spec": int}, "spec: is not a JobSpec class"),
        ({"connection": "prod"}, "connection: is not a class"),
    ],
)
def test_a_malformed_entry_is_refused_in_its_own_words(changes: Any, told: str) -> None:
    """REQ-48, REQ-49, CASE-024."""
    registry = Registry()
    with pytest.raises(ConfigurationError) as found:
        registry.register(dataclasses.replace(entry("a"), **changes))
    assert told in str(found.value)
    assert not registry.entries


def test_all_that_is_wrong_with_an_entry_is_told_at_once() -> None:
    """REQ-48, REQ-49, CASE-024."""
    with pytest.raises(ConfigurationError, match="has 3 faults"):
        Registry().register(entry("", [], plugin_loader=None))
    with pytest.raises(ConfigurationError, match="str is no PluginEntry"):
        Registry().register("entry")  # pyright: ignore[reportArgumentType]  what is tested


def test_a_second_entry_with_the_same_id_is_refused() -> None:
    """REQ-48, CASE-025."""
    first = entry("a")
    registry = registry_of(first)
    with pytest.raises(DuplicatePlugin, match="'a'"):
        registry.register(entry("a", ["other"]))
    registry.register(first)
    assert registry.resolve("t") is first
    assert registry.entries == {"a": first}


def test_two_defaults_of_all_are_refused() -> None:
    """REQ-50, CASE-026."""
    registry = registry_of(entry("a", is_default=True))
    with pytest.raises(DuplicatePlugin, match="'a' and 'b' both claim to be the default of all"):
        registry.register(entry("b", is_default=True))
    assert list(registry.entries) == ["a"]


def test_a_default_for_what_is_not_supported_is_refused() -> None:
    """REQ-51, CASE-027."""
    with pytest.raises(ConfigurationError, match=r"'a' has 1 fault.*\n.*does not support: 'u'"):
        Registry().register(entry("a", ["t"], default_for_task_types=["t", "u"]))


def test_two_defaults_for_one_type_are_refused() -> None:
    """REQ-51, CASE-028."""
    registry = registry_of(entry("a", ["t", "u"], default_for_task_types=["t"]))
    with pytest.raises(DuplicatePlugin, match="'a' and 'b' both claim to be the default for 't'"):
        registry.register(entry("b", ["t"], default_for_task_types=["t"]))
    registry.register(entry("c", ["u"], default_for_task_types=["u"]))


# --- resolving -------------------------------------------------------------------------------


def test_several_plugins_without_a_default_are_ambiguous() -> None:
    """REQ-51, CASE-029."""
    registry = registry_of(entry("a"), entry("b"))
    with pytest.raises(AmbiguousPlugin) as found:
        registry.resolve("t")
    assert found.value.candidates == ("a", "b")
    assert "plugin='a'" in str(found.value)


def test_the_default_of_the_type_is_taken() -> None:
    """REQ-51, CASE-030."""
    registry = registry_of(entry("a"), entry("b", default_for_task_types=["t"]))
    assert registry.resolve("t").id == "b"


def test_the_task_may_name_another_plugin() -> None:
    """REQ-51, CASE-031."""
    registry = registry_of(entry("a"), entry("b", default_for_task_types=["t"]), entry("c", ["u"]))
    assert registry.resolve("t", "a").id == "a"
    with pytest.raises(ConfigurationError, match="'c' does not serve task type 't'"):
        registry.resolve("t", "c")
    with pytest.raises(ConfigurationError, match=r"no plugin has the id 'd' \(known: a, b, c\)"):
        registry.resolve("t", "d")


def test_the_default_of_all_serves_unknown_types() -> None:
    """REQ-50, CASE-032."""
    registry = registry_of(entry("a"), entry("z", ["zz"], is_default=True))
    assert registry.resolve("unknown").id == "z"
    assert registry.resolve("unknown", "z").id == "z"
    assert registry.resolve("t").id == "a"


def test_an_unknown_type_is_refused_with_what_is_known() -> None:
    """REQ-50, CASE-033."""
    with pytest.raises(UnknownTaskType, match=r"'unknown' \(known: t, u\)"):
        registry_of(entry("a", ["u"]), entry("b", ["t"])).resolve("unknown")


def test_a_disabled_plugin_is_refused_and_others_are_not() -> None:
    """REQ-48, CASE-038."""
    registry = registry_of(
        entry("a"),
        entry("b", ["u"]),
        entry("c", ["u"]),
        entry("d", ["v"], default_for_task_types=["v"]),
        entry("e", ["v"]),
        entry("z", ["z"], is_default=True),
    )
    with pytest.raises(PluginDisabled, match="'a' is disabled"):
        registry.resolve("t", disabled=["a"])
    with pytest.raises(PluginDisabled, match="'a' is disabled"):
        registry.resolve("t", "a", disabled=["a"])
    with pytest.raises(PluginDisabled, match="'d' is disabled"):
        registry.resolve("v", disabled=["d"])
    with pytest.raises(PluginDisabled, match="'z' is disabled"):
        registry.resolve("unknown", disabled=["z"])
    assert registry.resolve("u", disabled=["b"]).id == "c"
    assert registry.resolve("v", "e", disabled=["d"]).id == "e"


# --- entry points ----------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Writes importable modules."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return write


GOOD = """
from tests.test_registry import entry as make
entry = make("good", ["good"])
"""


def points(**values: str) -> Callable[[], list[EntryPoint]]:
    group = "prefect_webapi.plugins"
    return lambda: [EntryPoint(name, value, group) for name, value in values.items()]


def test_installed_plugins_are_loaded_late_and_once(module: Callable[[str, str], None]) -> None:
    """REQ-52, CASE-034."""
    module("good_plugin_a", GOOD)
    looked = 0

    def find() -> list[EntryPoint]:
        nonlocal looked
        looked += 1
        return points(good="good_plugin_a:entry")()

    registry = Registry(find)
    registry.register(entry("own"))
    assert looked == 0
    assert "good_plugin_a" not in sys.modules
    found = registry.resolve("good")
    assert registry.resolve("good") is found
    assert registry.resolve("t").id == "own"
    assert looked == 1
    assert found.plugin_loader.calls == 0  # pyright: ignore[reportFunctionMemberAccess]  a Loader


def test_a_broken_entry_point_is_told_precisely_and_leaves_others_alone(
    module: Callable[[str, str], None], caplog: pytest.LogCaptureFixture
) -> None:
    """REQ-48."""
    module("good_plugin_b", GOOD)
    module("broken_plugin", "import no_such_module_of_ours")
    module("wrong_plugin", "entry = 3")
    module("twin_plugin", "from tests.test_registry import entry as make\nentry = make('good')")
    registry = Registry(
        points(
            broken="broken_plugin:entry",
            wrong="wrong_plugin:entry",
            good="good_plugin_b:entry",
            twin="twin_plugin:entry",
        )
    )
    with caplog.at_level(logging.WARNING):
        assert registry.resolve("good").id == "good"
        assert registry.resolve("good").id == "good"
    assert len(caplog.records) == 3
    assert registry.broken.keys() == {"broken", "wrong", "twin"}
    with pytest.raises(ConfigurationError) as found:
        registry.resolve("broken")
    assert "`broken = broken_plugin:entry` could not be imported" in str(found.value)
    assert "no_such_module_of_ours" in str(found.value)
    assert "int, not a PluginEntry" in str(registry.broken["wrong"])
    assert "id 'good' is taken" in str(registry.broken["twin"])
    with pytest.raises(UnknownTaskType) as unknown:
        registry.resolve("else")
    assert any("broken_plugin" in note for note in unknown.value.__notes__)


def test_a_plugin_module_may_use_the_registry_while_it_is_imported(
    module: Callable[[str, str], None],
) -> None:
    """REQ-52."""
    module(
        "asking_plugin",
        "import tests.test_registry as t\nassert t.asked.entries is not None\n"
        "entry = t.entry('asking', ['asking'])\nt.asked.register(entry)\n",
    )
    global asked
    asked = Registry(points(asking="asking_plugin:entry"))
    sys.modules.setdefault("tests.test_registry", sys.modules[__name__])
    assert asked.resolve("asking").id == "asking"
    assert not asked.broken


asked = Registry()


# --- loading ---------------------------------------------------------------------------------


@dataclass
class World:
    """Plugins with one entry `a` for task type `t`, blocks, a clock and counters."""

    loader: Loader = field(default_factory=Loader)
    blocks: Blocks = field(default_factory=lambda: Blocks({"default": Server()}))
    metrics: Counters = field(default_factory=Counters)
    clock: HandClock = field(default_factory=HandClock)
    overrides: Mapping[str, Any] = field(default_factory=dict[str, Any])
    disabled: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.registry = registry_of(entry("a", plugin_loader=self.loader))
        self.plugins = Plugins(
            self.registry,
            self.blocks,
            metrics=self.metrics,
            clock=self.clock,
            disabled=self.disabled,
            overrides=self.overrides,
        )

    async def get(self, ref: Any = None) -> Loaded:
        return await self.plugins.get("t", None, ref)

    def edit(self, name: str = "default", **changes: Any) -> None:
        self.blocks.blocks[name] = Server(**changes)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    await world.plugins.aclose()
    assert all(fake.closed == 1 for fake in world.loader.made)


async def together(count: int, work: Callable[[int], Awaitable[Any]]) -> list[Any]:
    """Results or errors of `count` tasks at once."""
    results: list[Any] = [None] * count

    async def one(nth: int) -> None:
        try:
            results[nth] = await work(nth)
        except Exception as error:  # noqa: BLE001  what is tested
            results[nth] = error

    async with anyio.create_task_group() as group:
        for nth in range(count):
            group.start_soon(one, nth)
    return results


def fake(loaded: Loaded) -> Fake:
    assert isinstance(loaded.plugin, Fake)
    return loaded.plugin


async def test_nothing_is_loaded_before_it_is_needed(world: World) -> None:
    """REQ-52, CASE-034."""
    assert world.registry.resolve("t").id == "a"
    assert world.loader.calls == 0
    assert world.blocks.looks == 0


async def test_many_tasks_at_once_load_each_connection_once(world: World) -> None:
    """REQ-52, CASE-035."""
    world.edit("one", url="https://one")
    world.edit("two", url="https://two")
    results = await together(50, lambda nth: world.get(("one", "two")[nth % 2]))
    assert world.loader.calls == 2
    assert len({id(loaded) for loaded in results}) == 2
    assert {loaded.connection.name for loaded in results} == {"one", "two"}
    assert world.blocks.looks == 2
    inline = Server(url="https://three")
    results = await together(10, lambda _: world.get(inline))
    assert world.loader.calls == 3
    assert len({id(loaded) for loaded in results}) == 1
    assert results[0].connection.inline


async def test_a_loader_error_reaches_all_who_wait_and_is_tried_again(world: World) -> None:
    """REQ-52, CASE-036."""

    def refuse(setup: Setup) -> Plugin:
        raise OSError(f"can't use {setup.connection.token.get_secret_value()}")

    world.loader.instead = refuse
    errors = await together(5, lambda _: world.get())
    assert world.loader.calls == 1
    assert len({id(error) for error in errors}) == 5
    for error in errors:
        assert isinstance(error, RemoteSystemError)
        assert error.code == "PluginLoadFailed"
        assert not error.job_may_exist
        assert "plugin 'a'" in str(error)
        assert "OSError: can't use ***" in str(error)
        assert error.__cause__ is None  # it tells the secret
    world.loader.instead = None
    assert isinstance((await world.get()).plugin, Fake)
    assert world.loader.calls == 2


async def test_a_loaders_own_error_of_ours_passes_as_it_is(world: World) -> None:
    """REQ-52."""

    def refuse(setup: Setup) -> Plugin:
        raise AuthError("no")

    world.loader.instead = refuse
    with pytest.raises(AuthError, match="no"):
        await world.get()


async def test_a_loader_that_hangs_is_given_up(world: World) -> None:
    """REQ-71: every call has a time-out."""
    world.edit(settings=EngineSettings(create_timeout=timedelta(milliseconds=10)))

    async def hang(setup: Setup) -> Plugin:
        await anyio.sleep_forever()
        raise AssertionError

    world.loader.instead = hang
    with pytest.raises(RemoteSystemError, match="it took too long"):
        await world.get()


async def test_if_the_one_who_loads_is_cancelled_another_takes_over(world: World) -> None:
    """REQ-52."""
    results: list[Loaded] = []

    async def get() -> None:
        results.append(await world.get())

    async with anyio.create_task_group() as group, anyio.create_task_group() as first:
        first.start_soon(get)
        await anyio.lowlevel.checkpoint()
        group.start_soon(get)
        group.start_soon(get)
        await anyio.lowlevel.checkpoint()
        first.cancel_scope.cancel()
    assert len(results) == 2
    assert results[0] is results[1]


async def test_a_configuration_out_of_range_fails_the_load_with_every_fault(world: World) -> None:
    """REQ-06, REQ-81, CASE-037."""
    world.blocks.blocks["default"] = {
        "engine": {
            "caching": {"size": 9, "workers": 0, "resyncInterval": "4s"},
            "readRateLimiter": {"qps": 0, "burst": 4},
        }
    }
    with pytest.raises(ConfigurationError) as found:
        await world.get()
    told = str(found.value)
    assert "5 faults" in told
    for path in ("caching.size", "caching.workers", "caching.resyncInterval"):
        assert f"engine.{path}: out of range" in told
    assert world.loader.calls == 0

    broken = PluginConfig().model_copy(update={"caching": CachingConfig.model_construct(size=9)})
    world.edit(engine=PluginConfig())
    world.loader.instead = lambda setup: Fake(
        setup.connection.model_copy(update={"engine": broken})
    )
    with pytest.raises(ConfigurationError, match=r"caching\.size: out of range"):
        await world.get()

    world.loader.instead = lambda setup: Fake(
        Server(engine=PluginConfig(caching=CachingConfig(workers=0)))
    )
    with pytest.raises(ConfigurationError, match=r"workers: out of range .*1 … 10000"):
        await world.get()


async def test_what_is_no_plugin_or_no_configuration_is_refused(world: World) -> None:
    """REQ-52, REQ-81."""
    made: list[Fake] = []

    class Odd(Fake):
        def get_config(self) -> PluginConfig:
            made.append(self)
            return {}  # pyright: ignore[reportReturnType]  what is tested

    world.loader.instead = lambda setup: Odd(setup.connection)
    with pytest.raises(ConfigurationError, match="get_config of plugin 'a' returned dict"):
        await world.get()
    assert made[0].closed == 1

    async def nothing(setup: Setup) -> Plugin:
        return None  # pyright: ignore[reportReturnType]  what is tested

    world.loader.instead = nothing
    with pytest.raises(ConfigurationError, match="the loader of plugin 'a' returned NoneType"):
        await world.get()


async def test_a_plain_function_may_be_the_loader() -> None:
    """API, plugin authors."""

    def load(setup: Setup) -> Plugin:
        return Fake(setup.connection)

    plain = entry("plain", plugin_loader=load)
    plugins = Plugins(
        registry_of(plain), Blocks({"default": Server()}), metrics=Counters(), clock=HandClock()
    )
    loaded = await plugins.get("t", None, None)
    assert isinstance(loaded.plugin, Fake)
    await plugins.aclose()
    assert loaded.plugin.closed == 1


async def test_a_disabled_plugin_is_not_loaded() -> None:
    """REQ-48, CASE-038."""
    world = World(disabled=["a"])
    with pytest.raises(PluginDisabled):
        await world.get()
    assert world.loader.calls == 0


async def test_the_loader_gets_a_metrics_scope_under_the_plugins_id(world: World) -> None:
    """REQ-52, REQ-77, CASE-039."""

    def load(setup: Setup) -> Plugin:
        setup.metrics_scope.count("loads", 3)
        return Fake(setup.connection)

    world.loader.instead = load
    await world.get()
    assert world.metrics.counts == {"a.loads": 3}


async def test_settings_of_the_process_hold_where_the_block_says_nothing() -> None:
    """Nearest wins: call, with_options, block, setting, default."""
    world = World(
        overrides={"create_timeout": timedelta(seconds=5), "get_timeout": timedelta(seconds=6)}
    )
    world.edit(settings=EngineSettings(get_timeout=timedelta(seconds=7)))
    settings = (await world.get()).settings
    assert settings.create_timeout == timedelta(seconds=5)
    assert settings.get_timeout == timedelta(seconds=7)
    assert settings.delete_timeout == EngineSettings().delete_timeout
    await world.plugins.aclose()


async def test_blocks_of_one_address_and_credential_share_an_endpoint(world: World) -> None:
    """REQ-14: what a rate limit is kept for."""
    world.edit("one", engine=PluginConfig(resource_quotas={"default": 3}))
    world.edit("two", settings=EngineSettings(reuse_results=False))
    world.edit("other-url", url="https://other")
    world.edit("other-token", token="canary-2")
    names = ("one", "two", "other-url", "other-token")
    endpoints = [(await world.get(name)).endpoint for name in names]
    assert endpoints[0] == endpoints[1]
    assert len(set(endpoints)) == 3
    assert "canary" not in "".join(endpoints)


# --- replacing and closing -------------------------------------------------------------------


async def test_an_unchanged_block_keeps_its_instance(world: World) -> None:
    """REQ-52."""
    loaded = await world.get()
    assert await world.plugins.refresh(loaded) is loaded
    assert await world.get() is loaded
    assert (world.loader.calls, world.blocks.looks) == (1, 2)


async def test_a_changed_block_gets_a_new_instance_and_the_old_one_is_closed(world: World) -> None:
    """REQ-52, REQ-81."""
    old = await world.get()
    limits = RateLimiterConfig(qps=1, burst=5)
    world.edit(token="canary-2", engine=PluginConfig(read_rate_limiter=limits))
    new = await world.plugins.refresh(old)
    assert new is not old
    assert new.config.read_rate_limiter == limits
    assert fake(new).connection.token.get_secret_value() == "canary-2"
    assert (fake(old).closed, fake(new).closed) == (1, 0)
    assert world.plugins.current(old) is new
    assert await world.plugins.refresh(old) is new
    assert await world.get() is new
    assert world.loader.calls == 2
    assert world.blocks.looks == 2


async def test_the_old_instance_is_closed_when_its_last_call_has_ended(world: World) -> None:
    """REQ-52."""
    old = await world.get()
    async with world.plugins.use(old) as outer:
        assert outer is old
        async with world.plugins.use(old):
            world.edit(url="https://new")
            new = await world.plugins.refresh(old)
            async with world.plugins.use(old) as later:
                assert later is new
            assert fake(old).closed == 0
        assert fake(old).closed == 0
    assert fake(old).closed == 1
    assert fake(new).closed == 0


async def test_a_call_that_fails_or_is_cancelled_ends_too(world: World) -> None:
    """REQ-52."""
    old = await world.get()
    with anyio.CancelScope() as scope:
        async with world.plugins.use(old):
            world.edit(url="https://new")
            await world.plugins.refresh(old)
            scope.cancel()
            await anyio.sleep(1)
    assert fake(old).closed == 1
    new = await world.get()

    async def fail() -> None:
        async with world.plugins.use(new):
            await world.plugins.refresh(new, force=True)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert fake(new).closed == 1


async def test_get_looks_at_the_block_again_after_the_resync_interval(world: World) -> None:
    """REQ-12, REQ-52."""
    old = await world.get()
    world.edit(url="https://new")
    world.clock.at = 29.9
    assert await world.get() is old
    world.clock.at = 30
    new = await world.get()
    assert new is not old
    assert fake(old).closed == 1
    assert await world.get() is new


async def test_many_who_met_a_refused_credential_load_anew_once(world: World) -> None:
    """REQ-52: at once on 401 and 403."""
    old = await world.get()
    results = await together(20, lambda _: world.plugins.refresh(old, force=True))
    assert world.loader.calls == 2
    assert {id(loaded) for loaded in results} == {id(world.plugins.current(old))}
    assert fake(old).closed == 1
    assert await world.plugins.refresh(old, force=True) is results[0]
    inline = await world.get(Server())
    assert await world.plugins.refresh(inline) is inline
    assert await world.plugins.refresh(inline, force=True) is not inline


@pytest.mark.parametrize(
    "broken",
    [
        {"engine": {"caching": {"size": 9}}, "token": "canary-2"},
        {"settings": {"slotLease": "1s"}},
        {"url": 3, "token": "canary-2"},
        KeyError("no block of that name"),
        OSError("no way to Prefect"),
    ],
)
async def test_a_value_that_is_not_valid_leaves_the_old_instance_with_one_warning(
    broken: Any, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """REQ-52, REQ-81, CASE-275."""
    old = await world.get()
    world.blocks.blocks["default"] = broken
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert await world.plugins.refresh(old) is old
            world.clock.at += 60
            assert await world.get() is old
        assert await world.plugins.refresh(old, force=True) is old
    assert len(caplog.records) == 1
    assert "stays in use" in caplog.text
    assert "canary" not in caplog.text
    assert fake(old).closed == 0
    world.edit(url="https://new")
    assert await world.plugins.refresh(old) is not old


@pytest.mark.parametrize("how", ["wrong type", "out of range", "raises", "secret handle"])
async def test_a_get_config_that_turns_invalid_leaves_the_old_instance_with_one_warning(
    how: str, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """REQ-81, CASE-275."""
    old = await world.get()
    refused: list[Fake] = []

    class Turned(Fake):
        def get_config(self) -> PluginConfig:
            refused.append(self)
            match how:
                case "wrong type":
                    return 3  # pyright: ignore[reportReturnType]  what is tested
                case "out of range":
                    caching = CachingConfig().model_copy(update={"size": 9})
                    return PluginConfig().model_copy(update={"caching": caching})
                case "raises":
                    raise ValueError("no")
                case _:
                    return PluginConfig(resource_meta=WithToken)

    world.edit(url="https://new")
    world.loader.instead = lambda setup: Turned(setup.connection)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert await world.plugins.refresh(old) is old
    assert len(caplog.records) == 1
    assert [each.closed for each in refused] == [1, 1, 1]
    assert fake(old).closed == 0
    world.loader.instead = None
    assert await world.plugins.refresh(old) is not old


async def test_closing_closes_everything_and_refuses_more(world: World) -> None:
    """REQ-52: no instance outlives its engine."""
    idle, busy = await world.get(Server(url="https://idle")), await world.get()
    async with world.plugins.use(busy):
        await world.plugins.aclose()
        assert (fake(idle).closed, fake(busy).closed) == (1, 0)
    assert fake(busy).closed == 1
    await world.plugins.aclose()
    with pytest.raises(EngineClosed):
        await world.get()
    with pytest.raises(EngineClosed):
        await world.plugins.refresh(busy)
    with pytest.raises(EngineClosed):
        async with world.plugins.use(busy):
            pass


async def test_what_is_loaded_while_closing_is_closed_too(world: World) -> None:
    """REQ-52."""
    results: list[Any] = []

    async def get() -> None:
        results.extend(await together(2, lambda _: world.get()))

    async with anyio.create_task_group() as group:
        group.start_soon(get)
        await anyio.sleep(0.0005)
        await world.plugins.aclose()
    assert [type(each) for each in results] == [EngineClosed, EngineClosed]


async def test_a_failure_to_close_is_logged_and_harms_nobody(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """REQ-52."""

    class Stuck(Fake):
        async def aclose(self) -> None:
            raise OSError("stuck")

    world.loader.instead = lambda setup: Stuck(setup.connection)
    loaded = await world.get()
    with caplog.at_level(logging.WARNING):
        assert await world.plugins.refresh(loaded, force=True) is not loaded
    assert "failed to close" in caplog.text


# --- handles ---------------------------------------------------------------------------------


class WithToken(BaseModel):
    token: str


class WithSecret(BaseModel):
    parts: list[SecretStr] = Field(default=[])


class Nested(BaseModel):
    inner: dict[str, WithToken | None]


class WithSocket(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    connection: socket.socket


class TypedHandle(TypedDict):
    api_key: str


@dataclass
class DataHandle:
    name: str
    when: timedelta
    next_token: str | None = None


class Tree(BaseModel):
    name: str
    parts: list[Tree] = Field(default=[])


def plugin_with(handle: Any) -> Any:
    """A plugin whose handle type is `handle`, as its generic argument."""

    class Odd(AsyncPlugin[handle, None]):
        def get_config(self) -> PluginConfig:
            return PluginConfig()

        async def create(self, ctx: Any) -> Any: ...

        async def get(self, ctx: Any) -> Any: ...

        async def delete(self, ctx: Any) -> None: ...

        def status(self, ctx: Any) -> Any: ...

    return Odd()


@pytest.mark.parametrize(
    ("handle", "told"),
    [
        (WithSocket, "can't be written as JSON and read back"),
        (socket.socket, "can't be written as JSON and read back"),
        (Callable[[], None], "can't be written as JSON and read back"),
        (WithSecret, "holds a secret in WithSecret.parts"),
        (SecretStr, "holds a secret in SecretStr"),
        (WithToken, "looks like a secret: WithToken.token"),
        (Nested, "looks like a secret: Nested.inner.token"),
        (TypedHandle, "looks like a secret: TypedHandle.api_key"),
    ],
)
async def test_a_handle_that_can_not_be_kept_fails_the_load(
    handle: Any, told: str, world: World
) -> None:
    """REQ-13, CASE-023 at the level of types: nothing was sent yet."""
    world.loader.instead = lambda setup: plugin_with(handle)
    with pytest.raises(HandleNotStorable) as found:
        await world.get()
    assert told in str(found.value)


@pytest.mark.parametrize("handle", [Handle, str, int, dict[str, Any], Any, DataHandle, Tree])
async def test_plain_handles_are_accepted(handle: Any, world: World) -> None:
    """REQ-13."""
    world.loader.instead = lambda setup: plugin_with(handle)
    await world.get()


async def test_a_plain_field_with_a_suspicious_name_can_be_allowed(world: World) -> None:
    """REQ-13: `allow_plain_handle` is for names, never for secret types."""
    world.edit(settings=EngineSettings(allow_plain_handle=True))
    world.loader.instead = lambda setup: plugin_with(WithToken)
    await world.get()
    world.edit("other", settings=EngineSettings(allow_plain_handle=True))
    world.loader.instead = lambda setup: plugin_with(WithSecret)
    with pytest.raises(HandleNotStorable):
        await world.get("other")


async def test_a_plugin_of_one_call_has_no_handle(world: World) -> None:
    """REQ-72."""

    class Once(SyncPlugin):
        def get_config(self) -> PluginConfig:
            return PluginConfig()

        async def do(self, ctx: Any) -> PhaseInfo:
            raise NotImplementedError

    world.loader.instead = lambda setup: Once()
    assert isinstance((await world.get()).plugin, Once)


# --- fingerprints of values ------------------------------------------------------------------


def test_a_digest_sees_secrets_and_shows_none() -> None:
    """REQ-52: a revision of an inline block."""
    assert digest(Server()) == digest(Server())
    assert digest(Server()) != digest(Server(token=SecretStr("canary-2")))
    assert digest(Server()) != digest(Server(settings=EngineSettings(reuse_results=False)))
    assert digest({"a": 1, "b": [1, "2"]}) == digest({"b": [1, "2"], "a": 1})
    assert digest(["ab", "c"]) != digest(["a", "bc"])
    assert digest(1) != digest("1")
    assert digest({3, 1}) == digest({1, 3})
