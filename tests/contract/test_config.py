"""Configurations: what is accepted, what is refused and in which words."""

from __future__ import annotations

import json
import pickle
from datetime import timedelta
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from prefect.blocks.core import Block
from pydantic import BaseModel, Field, SecretStr, ValidationError

from prefect_webapi.contract.config import (
    DEFAULT_PLUGIN_CONFIG,
    CachingConfig,
    EngineSettings,
    PluginConfig,
    RateLimiterConfig,
)
from prefect_webapi.contract.errors import ConfigurationError
from prefect_webapi.contract.faults import InvalidConfiguration, explain, validate
from prefect_webapi.contract.secrecy import looks_secret, mask_url

DEFAULTS = {
    "resourceQuotas": {},
    "readRateLimiter": {"qps": 30, "burst": 300},
    "writeRateLimiter": {"qps": 20, "burst": 200},
    "caching": {"size": 100_000, "resyncInterval": "30s", "workers": 10, "maxSystemFailures": 5},
    "resourceMeta": None,
}
FLYTE_YAML = """
resourceQuotas:
  default: 1000
  "team:batch": 20
readRateLimiter: {qps: 10, burst: 100}
writeRateLimiter: {qps: 11, burst: 101}
caching:
  size: 500000
  resyncInterval: 1m30s
  workers: 12
  maxSystemFailures: 7
resourceMeta: null
"""


class Handle(BaseModel):
    name: str


# --- what is accepted ------------------------------------------------------------------------


def test_the_default_equals_the_table() -> None:
    """REQ-05, CASE-001."""
    assert DEFAULT_PLUGIN_CONFIG.model_dump(by_alias=True) == DEFAULTS
    assert DEFAULT_PLUGIN_CONFIG.model_dump(mode="json", by_alias=True) == DEFAULTS
    assert PluginConfig() == DEFAULT_PLUGIN_CONFIG


def test_what_flyte_wrote_loads_unchanged_and_again_from_its_own_output() -> None:
    """REQ-10, CASE-002."""
    config = PluginConfig.load(FLYTE_YAML)
    assert config == PluginConfig(
        resource_quotas={"default": 1000, "team:batch": 20},
        read_rate_limiter=RateLimiterConfig(qps=10, burst=100),
        write_rate_limiter=RateLimiterConfig(qps=11, burst=101),
        caching=CachingConfig(
            size=500_000,
            resync_interval=timedelta(seconds=90),
            workers=12,
            max_system_failures=7,
        ),
    )
    dumped = config.model_dump(by_alias=True)
    assert PluginConfig.load(dumped) == config
    assert PluginConfig.load(json.dumps(dumped)) == config
    assert PluginConfig.load(yaml.safe_dump(dumped)) == config
    assert PluginConfig.load(config.model_dump()) == config


def test_quotas_may_be_a_map_or_a_list_of_maps() -> None:
    """REQ-09, CASE-003."""
    as_map = PluginConfig.load("resourceQuotas: {a: 1, b: 2}")
    as_list = PluginConfig.load('resourceQuotas:\n- "a": 1\n- "b": 2\n')
    assert as_map == as_list
    assert as_list.resource_quotas == {"a": 1, "b": 2}
    assert PluginConfig.model_validate({"resource_quotas": [{"a": 1}]}).resource_quotas == {"a": 1}


def test_a_partial_configuration_keeps_the_rest_of_the_base() -> None:
    """REQ-10, CASE-273."""
    config = PluginConfig.load({"readRateLimiter": {"qps": 7}})
    expected = {**DEFAULTS, "readRateLimiter": {"qps": 7, "burst": 300}}
    assert config.model_dump(by_alias=True) == expected

    base = PluginConfig.load(FLYTE_YAML)
    config = PluginConfig.load('{"caching": {"workers": 3}, "readRateLimiter": null}', base=base)
    assert config.caching == base.caching.model_copy(update={"workers": 3})
    assert config.read_rate_limiter == base.read_rate_limiter
    assert config.resource_quotas == base.resource_quotas
    assert PluginConfig.load("", base=base) == base


@pytest.mark.parametrize("quotas", [{"default": 5, "x": 1}, [{"default": 5}, {"x": 1}]])
def test_quotas_of_the_base_stay_unless_they_are_named(quotas: Any) -> None:
    """REQ-10."""
    base = PluginConfig(resource_quotas={"default": 1000, "gpu": 2})
    config = PluginConfig.load({"resourceQuotas": quotas}, base=base)
    assert config.resource_quotas == {"default": 5, "gpu": 2, "x": 1}


def test_python_names_and_aliases_are_both_accepted() -> None:
    """REQ-10."""
    snake = PluginConfig.load("caching: {resync_interval: 45s}\nread_rate_limiter: {qps: 3}")
    camel = PluginConfig.load("caching: {resyncInterval: 45s}\nreadRateLimiter: {qps: 3}")
    assert snake == camel


@pytest.mark.parametrize("text", ["1h", "5s", "3600s"])
def test_durations_within_the_range_are_accepted(text: str) -> None:
    """REQ-08, CASE-006."""
    config = PluginConfig.load({"caching": {"resyncInterval": text}})
    assert PluginConfig.load(config.model_dump(by_alias=True)) == config


def test_an_hour_prints_as_go_prints_it() -> None:
    """REQ-08, CASE-005, CASE-006, CASE-008."""
    hour = CachingConfig(resync_interval=timedelta(hours=1))
    assert hour.model_dump(by_alias=True)["resyncInterval"] == "1h0m0s"
    for text in ("1m30s", "90s", "1.5m"):
        loaded = PluginConfig.load({"caching": {"resyncInterval": text}}).caching
        assert loaded.model_dump(by_alias=True)["resyncInterval"] == "1m30s"


def test_the_handle_type_is_a_class_or_its_import_path() -> None:
    """REQ-13."""
    path = f"{RateLimiterConfig.__module__}.RateLimiterConfig"
    config = PluginConfig.load({"resourceMeta": path})
    assert config.resource_meta is RateLimiterConfig
    assert config == PluginConfig(resource_meta=RateLimiterConfig)
    assert config.model_dump(by_alias=True)["resourceMeta"] == path
    assert PluginConfig(resource_meta=None).resource_meta is None


quotas = st.dictionaries(st.text(min_size=1), st.integers(min_value=1), max_size=4)
limiters = st.builds(RateLimiterConfig, qps=st.integers(1, 100_000), burst=st.integers(5, 10_000))
configs = st.builds(
    PluginConfig,
    resource_quotas=quotas,
    read_rate_limiter=limiters,
    write_rate_limiter=limiters,
    caching=st.builds(
        CachingConfig,
        size=st.integers(10, 500_000),
        resync_interval=st.timedeltas(timedelta(seconds=5), timedelta(hours=1)),
        workers=st.integers(1, 10_000),
        max_system_failures=st.integers(0, 1_000_000),
    ),
    resource_meta=st.sampled_from([None, RateLimiterConfig]),
)


@given(configs, configs)
def test_every_configuration_survives_dumping_and_loading(
    config: PluginConfig, other: PluginConfig
) -> None:
    """REQ-10, CASE-002: over any base, since a full dump names every field; quotas are merged."""
    for dumped in (config.model_dump(by_alias=True), config.model_dump(mode="json")):
        assert PluginConfig.model_validate(dumped) == config
        assert PluginConfig.load(dumped) == config
        assert PluginConfig.load(json.dumps(dumped)) == config
    if config.resource_quotas.keys() >= other.resource_quotas.keys():
        assert PluginConfig.load(config.model_dump(by_alias=True), base=other) == config


# --- what is refused -------------------------------------------------------------------------


def fault_of(data: Any, base: type[PluginConfig] | type[EngineSettings] = PluginConfig) -> str:
    with pytest.raises(ConfigurationError) as found:
        base.load(data)
    return str(found.value)


@pytest.mark.parametrize(
    ("field", "bad_low", "low", "high", "bad_high"),
    [
        ("caching.size", 9, 10, 500_000, 500_001),
        ("caching.workers", 0, 1, 10_000, 10_001),
        ("caching.maxSystemFailures", -1, 0, 1_000_000, 1_000_001),
        ("readRateLimiter.burst", 4, 5, 10_000, 10_001),
        ("writeRateLimiter.burst", 4, 5, 10_000, 10_001),
        ("readRateLimiter.qps", 0, 1, 100_000, 100_001),
        ("writeRateLimiter.qps", 0, 1, 100_000, 100_001),
        ("caching.resyncInterval", "4.999s", "5s", "1h", "1h0m1s"),
    ],
)
def test_ranges_include_their_bounds(
    field: str, bad_low: Any, low: Any, high: Any, bad_high: Any
) -> None:
    """REQ-06, CASE-009, CASE-010, CASE-011, CASE-012, CASE-013."""
    part, name = field.split(".")
    for value in (low, high):
        PluginConfig.load({part: {name: value}})
    shown = "5s … 1h0m0s" if isinstance(low, str) else f"{low} … {high}"
    for value in (bad_low, bad_high):
        told = fault_of({part: {name: value}})
        assert f"{field}: out of range (given {value!r}; allowed {shown})" in told
        whole = {"qps": 10, "burst": 10} if "Limiter" in part else {}
        with pytest.raises(ValidationError):
            PluginConfig.model_validate({part: {**whole, name: value}})


@pytest.mark.parametrize("text", ["250ms", "-5s", ""])
def test_durations_out_of_range_are_refused_as_such(text: str) -> None:
    """REQ-08, CASE-006."""
    told = fault_of({"caching": {"resyncInterval": text}})
    assert "caching.resyncInterval: out of range" in told
    assert "5s … 1h0m0s" in told


@pytest.mark.parametrize("text", ["1d", "5"])
def test_durations_against_the_grammar_are_refused_as_such(text: str) -> None:
    """REQ-08, CASE-006."""
    told = fault_of({"caching": {"resyncInterval": text}})
    assert f"caching.resyncInterval: '{text}' is not a duration" in told


@pytest.mark.parametrize("number", ["30", "30.0"])
def test_a_bare_number_as_duration_is_refused_in_json_and_yaml(number: str) -> None:
    """REQ-08, CASE-007."""
    for text in (
        f'{{"caching": {{"resyncInterval": {number}}}}}',
        f"caching:\n  resyncInterval: {number}",
    ):
        told = fault_of(text)
        assert "nanoseconds" in told
        assert '"30s"' in told


def test_all_faults_come_in_one_error() -> None:
    """REQ-06, CASE-014."""
    with pytest.raises(InvalidConfiguration) as found:
        PluginConfig.load(
            """
            readRateLimiter: {qps: 0, burst: 4}
            writeRateLimiter: {burst: 10001}
            caching: {size: 9, resyncInterval: 4s}
            """
        )
    paths = [fault.path for fault in found.value.faults]
    assert paths == [
        "readRateLimiter.qps",
        "readRateLimiter.burst",
        "writeRateLimiter.burst",
        "caching.size",
        "caching.resyncInterval",
    ]
    assert all(fault.given and fault.allowed and fault.remedy for fault in found.value.faults)
    assert all(path in str(found.value) for path in paths)
    assert found.value.__cause__ is None
    twin = pickle.loads(pickle.dumps(found.value))
    assert (twin.faults, str(twin)) == (found.value.faults, str(found.value))


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        (
            {"caching": {"resyncinterval": "30s"}},
            "caching.resyncinterval: unknown key. Did you mean `resyncInterval`?",
        ),
        ({"read_rate_limitter": {}}, "Did you mean `read_rate_limiter`?"),
        ({"colour": 1}, "colour: unknown key. Known here: resourceQuotas, "),
    ],
)
def test_an_unknown_key_is_refused_with_a_hint(data: Any, hint: str) -> None:
    """REQ-07, CASE-015."""
    assert hint in fault_of(data)


@pytest.mark.parametrize("jobs", [0, -1])
def test_a_quota_below_one_is_refused(jobs: int) -> None:
    """CASE-021."""
    with pytest.raises(ValidationError):
        PluginConfig(resource_quotas={"default": jobs})
    told = fault_of({"resourceQuotas": {"default": jobs}})
    assert f"resourceQuotas.default: out of range (given {jobs}; allowed at least 1)" in told


@pytest.mark.parametrize("value", [True, "10", 10.0, None])
@pytest.mark.parametrize("field", ["size", "workers", "max_system_failures"])
def test_only_an_int_is_an_int(field: str, value: Any) -> None:
    """CASE-022."""
    with pytest.raises(ValidationError):
        CachingConfig.model_validate({field: value})
    with pytest.raises(ValidationError):
        RateLimiterConfig.model_validate({"qps": value, "burst": 10})
    with pytest.raises(ValidationError):
        PluginConfig.model_validate({"resource_quotas": {"default": value}})


def test_a_number_in_quotes_gets_the_remedy() -> None:
    """CASE-022."""
    assert "Write 10 without quotes." in fault_of({"caching": {"workers": "10"}})


@pytest.mark.parametrize(
    "quotas",
    [
        'resourceQuotas:\n- "test": 1\n- "other": 2\n- "test": 3',
        "resourceQuotas: {test: 1, test: 3}",
        '{"resourceQuotas": {"test": 1, "test": 3}}',
    ],
)
def test_a_repeated_namespace_is_refused_by_name(quotas: str) -> None:
    """REQ-09, CASE-004."""
    told = fault_of(quotas)
    assert "'test'" in told
    assert "twice" in told


@pytest.mark.parametrize("entry", [{}, {"a": 1, "b": 2}, "a", 3])
def test_a_list_of_anything_but_one_key_maps_is_refused(entry: Any) -> None:
    """REQ-09."""
    assert "one namespace with its number of jobs" in fault_of({"resourceQuotas": [entry]})


@pytest.mark.parametrize("path", ["nowhere.Class", "json.nothing", "json.dumps", "", "x", 3])
def test_a_handle_type_that_is_no_model_is_refused(path: Any) -> None:
    """REQ-13."""
    assert "package.module.Class" in fault_of({"resourceMeta": path})


@pytest.mark.parametrize("text", ["- 1", "30", "a: b: c", "{", "\tx", "{]}", "? [a]\n: 1"])
def test_text_that_holds_no_configuration_is_refused(text: str) -> None:
    """REQ-10."""
    assert "PluginConfig has 1 fault" in fault_of(text)


def test_a_rate_limit_alone_needs_both_numbers() -> None:
    """REQ-10."""
    with pytest.raises(ConfigurationError, match="burst: is missing"):
        RateLimiterConfig.load({"qps": 1})


def test_a_configuration_can_not_be_changed() -> None:
    """REQ-05."""
    with pytest.raises(ValidationError):
        setattr(DEFAULT_PLUGIN_CONFIG, "caching", CachingConfig())  # noqa: B010  a type error else


# --- engine settings -------------------------------------------------------------------------


def test_engine_settings_have_the_defaults_of_the_table() -> None:
    """SPEC 1.1, second table."""
    assert EngineSettings().model_dump(by_alias=True) == {
        "createTimeout": "1m0s",
        "getTimeout": "30s",
        "deleteTimeout": "30s",
        "deadline": None,
        "maxCreateAttempts": 10,
        "onUnknownCreate": "fail",
        "retryBase": "1s",
        "retryCap": "1m0s",
        "maxRetryAfter": "1h0m0s",
        "visibilityDelay": "1m0s",
        "cancelGrace": "20s",
        "cancelOnPause": False,
        "systemFailures": "crashed",
        "orphanAfter": "15m0s",
        "reaperHorizon": "168h0m0s",
        "ledgerRetention": "168h0m0s",
        "slotLease": "2m0s",
        "reuseResults": True,
        "maxDatasetSizeBytes": 10 * 1024 * 1024,
        "allowInsecure": False,
        "allowPlainHandle": False,
        "initialInterval": "1s",
        "sharedQps": None,
        "project": None,
        "pool": None,
        "abandonAfter": "24h0m0s",
    }


def test_engine_settings_follow_the_same_rules() -> None:
    """REQ-06, REQ-07, REQ-08."""
    settings = EngineSettings.load("deadline: 2h\nslot_lease: 60s\nonUnknownCreate: retry")
    assert settings.deadline == timedelta(hours=2)
    assert EngineSettings.load({"deadline": None}, base=settings).deadline is None
    assert EngineSettings.load(settings.model_dump(by_alias=True)) == settings
    told = fault_of(
        {
            "slotLease": "59s",
            "createTimeout": 60,
            "onUnknownCreate": "maybe",
            "retryBase": "2m",
            "cancelOnPause": "yes",
            "dead_line": "1h",
        },
        EngineSettings,
    )
    assert "EngineSettings has 6 faults" in told
    assert "slotLease: out of range (given '59s'; allowed 1m0s … 24h0m0s)" in told
    assert "onUnknownCreate: not an allowed word (given 'maybe'; allowed 'fail' or 'retry')" in told
    assert "retryCap: 1m0s is below the first pause, 2m0s" in told
    assert "Write true or false without quotes." in told
    assert "Did you mean `deadline`?" in told


def test_the_longest_pause_is_never_below_the_first() -> None:
    """Also where only the first was given."""
    EngineSettings(retry_base=timedelta(seconds=60))
    with pytest.raises(ValidationError, match="1m0s is below the first pause, 2m0s"):
        EngineSettings(retry_base=timedelta(minutes=2))


def test_every_field_has_a_description_that_ends_with_a_period() -> None:
    """Prefect's block suite wants it."""
    for model in (PluginConfig, CachingConfig, RateLimiterConfig, EngineSettings):
        for name, field in model.model_fields.items():
            assert field.description, name
            assert field.description.endswith("."), name
            assert field.default_factory is None, f"{name}: a form shows literal defaults only"


def test_a_block_says_something_where_it_differs_from_its_form() -> None:
    """Nearest wins: call, with_options, block, setting, default."""
    form = EngineSettings(get_timeout=timedelta(seconds=7))
    block = form.model_copy(update={"create_timeout": timedelta(seconds=90)})
    overrides = {
        "create_timeout": timedelta(seconds=10),
        "get_timeout": timedelta(seconds=11),
        "max_create_attempts": 3,
    }
    mixed = block.overlaid(overrides, default=form)
    assert mixed.create_timeout == timedelta(seconds=90)
    assert mixed.get_timeout == timedelta(seconds=11)
    assert mixed.max_create_attempts == 3
    origins = block.origins(overrides, default=form)
    assert origins["create_timeout"] == "block"
    assert origins["get_timeout"] == "setting"
    assert origins["delete_timeout"] == "default"
    assert block.overlaid({}) == block
    with pytest.raises(ConfigurationError, match="retry_cap"):
        block.overlaid({"retry_cap": timedelta(milliseconds=1)})


# --- inside a block --------------------------------------------------------------------------


class Server(Block):
    """A block as plugin authors write it."""

    token: SecretStr = SecretStr("canary")
    engine: PluginConfig = Field(
        default=PluginConfig(read_rate_limiter=RateLimiterConfig(qps=10, burst=100)),
        description="Limits.",
    )
    settings: EngineSettings = Field(default=EngineSettings(), description="Time-outs.")


def test_a_block_keeps_configurations_the_way_prefect_stores_them() -> None:
    """REQ-12: the server's part is tested with a server."""
    block = Server(
        engine=PluginConfig(
            resource_quotas={"default": 3},
            caching=CachingConfig(resync_interval=timedelta(seconds=90)),
            resource_meta=RateLimiterConfig,
        ),
        settings=EngineSettings(deadline=timedelta(hours=1)),
    )
    for context in ({"include_secrets": True}, None):
        stored = block.model_dump(mode="json", by_alias=True, context=context)
        assert stored["engine"]["caching"]["resyncInterval"] == "1m30s"
        again = Server.model_validate_json(json.dumps(stored))
        assert again.engine == block.engine
        assert again.settings == block.settings


def test_a_block_checks_when_it_is_built() -> None:
    """REQ-06."""
    with pytest.raises(ValidationError) as found:
        Server.model_validate({"engine": {"caching": {"size": 9}}, "settings": {"slotLease": "1s"}})
    told = str(explain(found.value, Server))
    assert "engine.caching.size: out of range (given 9; allowed 10 … 500000)" in told
    assert "settings.slotLease: out of range (given '1s'; allowed 1m0s … 24h0m0s)" in told


def test_the_form_is_filled_with_the_defaults() -> None:
    """REQ-12."""
    schema: dict[str, Any] = Server.model_json_schema()
    engine = schema["properties"]["engine"]["default"]
    assert engine["caching"]["resyncInterval"] == "30s"
    assert engine["readRateLimiter"] == {"qps": 10, "burst": 100}
    caching = schema["definitions"]["CachingConfig"]["properties"]
    assert caching["resyncInterval"]["type"] == "string"
    assert caching["resyncInterval"]["default"] == "30s"
    assert caching["size"]["minimum"] == 10
    settings = schema["definitions"]["EngineSettings"]["properties"]
    assert settings["slotLease"]["default"] == "2m0s"
    assert settings["deadline"]["default"] is None
    assert "PT" not in json.dumps(schema)


# --- telling faults --------------------------------------------------------------------------


class Account(BaseModel):
    token: SecretStr = Field(min_length=20)
    api_key: str = Field(max_length=5)
    url: int
    parts: list[RateLimiterConfig] = Field(default=[])


def test_secrets_are_not_told() -> None:
    """No text of ours holds a secret."""
    with pytest.raises(InvalidConfiguration) as found:
        validate(
            Account,
            {
                "token": "canary-1",
                "api_key": "canary-2",
                "url": "https://me:canary-3@host/?password=canary-4&size=1",
                "parts": [{"qps": 1, "burst": 10}, {"qps": 0, "burst": 10}],
            },
        )
    told = str(found.value)
    assert "canary" not in told
    assert "canary" not in repr(found.value.faults)
    assert "https://me:***@host/?password=***&size=1" in told
    assert "parts[1].qps: out of range (given 0; allowed 1 … 100000)" in told
    assert found.value.__suppress_context__ or found.value.__context__ is None


@pytest.mark.parametrize(
    "name",
    [
        *(
            "token",
            "access_token",
            "sessionToken",
            "password",
            "db_password",
            "dbPassword",
            "APIKey",
        ),
        *(
            "api_key",
            "apiKey",
            "apikey",
            "clientSecret",
            "private_key",
            "credentials",
            "aws_secret",
        ),
    ],
)
def test_names_of_secrets_are_known(name: str) -> None:
    """Hidden in texts, refused in handles."""
    assert looks_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        *("next_token", "clientRequestToken", "page_token", "idempotency_token", "tokens", "key"),
        *("secret_name", "secretArn", "job_id", "monkey", "partition_key", "passage", "name"),
    ],
)
def test_harmless_names_are_not_taken_for_secrets(name: str) -> None:
    """An idempotency token belongs into a handle."""
    assert not looks_secret(name)


def test_urls_are_masked() -> None:
    """Texts may hold addresses."""
    assert mask_url("postgresql+asyncpg://u:p@h/db") == "postgresql+asyncpg://u:***@h/db"
    assert mask_url("sqlite+aiosqlite:////x/y.db") == "sqlite+aiosqlite:////x/y.db"
    assert mask_url("https://h:80/a@b?x=1&api_key=k#f") == "https://h:80/a@b?x=1&api_key=***#f"
