"""The flags of a configuration."""

from __future__ import annotations

from argparse import ArgumentParser
from datetime import timedelta

import pytest

from prefect_webapi.contract.config import CachingConfig, PluginConfig, RateLimiterConfig
from prefect_webapi.contract.faults import InvalidConfiguration

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


def _parsed(*arguments: str, base: PluginConfig, prefix: str = "") -> PluginConfig:
    flags, parser = PluginConfig.flag_set(prefix, base), ArgumentParser()
    flags.add_to(parser)
    return PluginConfig.load(flags.given(parser.parse_args(arguments)), base=base)


@pytest.mark.parametrize("prefix", ["", "webapi."])
def test_flags_change_only_what_they_name(prefix: str) -> None:
    """CASE-017: folded over a base, only the two that were given differ."""
    base = PluginConfig(
        resource_quotas={"default": 3},
        read_rate_limiter=RateLimiterConfig(qps=9, burst=90),
        caching=CachingConfig(workers=4),
    )
    given = (f"--{prefix}caching.resyncInterval=45s", f"--{prefix}readRateLimiter.qps=7")
    found = _parsed(*given, base=base, prefix=prefix)
    assert found == PluginConfig(
        resource_quotas={"default": 3},
        read_rate_limiter=RateLimiterConfig(qps=7, burst=90),
        caching=CachingConfig(workers=4, resync_interval=timedelta(seconds=45)),
    )
    assert _parsed(base=base, prefix=prefix) == base


def test_a_flag_out_of_range_is_named_as_its_field(capsys: pytest.CaptureFixture[str]) -> None:
    """REQ-06: all at once; what is no number at all, argparse itself refuses."""
    with pytest.raises(InvalidConfiguration) as found:
        _parsed("--caching.resyncInterval=1s", "--writeRateLimiter.qps=0", base=PluginConfig())
    assert {fault.path for fault in found.value.faults} == {
        "caching.resyncInterval",
        "writeRateLimiter.qps",
    }
    with pytest.raises(SystemExit):
        _parsed("--caching.size=many", base=PluginConfig())
    assert "--caching.size" in capsys.readouterr().err


def test_the_help_of_the_flags_names_ranges_and_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    parser = ArgumentParser()
    PluginConfig.flag_set().add_to(parser)
    told = parser.format_help()
    assert "--caching.resyncInterval VALUE" in told
    assert "Longest time between two reads of a job, 5s to 1h. Default: 30s." in told
