"""The flags of a configuration."""

from __future__ import annotations

from datetime import timedelta

from prefect_webapi.contract.config import CachingConfig, PluginConfig, RateLimiterConfig

DEFAULTS = {
    "readRateLimiter.qps": 30,
    "readRateLimiter.burst": 300,
    "writeRateLimiter.qps": 20,
    "writeRateLimiter.burst": 200,
    "caching.size": 100_000,
    "caching.resyncInterval": "30s",
    "caching.workers": 10,
    "caching.maxSystemFailures": 5,
}


def test_there_are_eight_flags_with_the_prefix_as_it_was_given() -> None:
    """REQ-11, CASE-016."""
    flags = PluginConfig.flag_set("p.")
    assert {name: flag.default for name, flag in flags.items()} == {
        f"p.{name}": default for name, default in DEFAULTS.items()
    }
    assert all(flag.name == name for name, flag in flags.items())
    kinds = [flag.type for flag in flags.values()]
    assert (kinds.count(int), kinds.count(str), len(kinds)) == (7, 1, 8)
    assert flags["p.caching.resyncInterval"].type is str
    assert all(flag.help.endswith(".") for flag in flags.values())
    assert list(PluginConfig.flag_set("p")) == [f"p{name}" for name in DEFAULTS]


def test_quotas_and_the_handle_type_have_no_flag() -> None:
    """REQ-11, CASE-018."""
    config = PluginConfig(resource_quotas={"default": 3}, resource_meta=PluginConfig)
    assert list(config.flag_set(base=config)) == list(DEFAULTS)


def test_defaults_are_the_packages_unless_a_base_is_given() -> None:
    """REQ-11: also when called on another value, as in Go."""
    config = PluginConfig(
        read_rate_limiter=RateLimiterConfig(qps=7, burst=70),
        caching=CachingConfig(resync_interval=timedelta(seconds=90)),
    )
    assert config.flag_set()["caching.resyncInterval"].default == "30s"
    assert config.flag_set(base=config)["caching.resyncInterval"].default == "1m30s"
    assert config.flag_set(base=config)["readRateLimiter.qps"].default == 7
