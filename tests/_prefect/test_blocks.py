"""A connection's block on its way through Prefect's server."""

from __future__ import annotations

import json
import urllib.request

from pydantic import HttpUrl, SecretStr

from prefect_webapi import EngineSettings, PluginConfig
from prefect_webapi_jobserver import JobServer
from tests.support.prefect import PrefectServer, Scripts

SECRET = "canary-in-a-block"

LOADS = """
import json
from prefect_webapi_jobserver import JobServer
block = JobServer.load("elsewhere")
print(json.dumps({
    "engine": block.engine.model_dump(mode="json", by_alias=True),
    "settings": block.settings.model_dump(mode="json", by_alias=True),
    "secret": len(block.token.get_secret_value()),
}))
"""


def _stored(api_url: str) -> str:
    """What the API tells of the documents to somebody who doesn't ask for secrets."""
    request = urllib.request.Request(
        f"{api_url}/block_documents/filter",
        data=b"{}",
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.read().decode()


def test_a_saved_configuration_is_equal_in_another_process_and_its_secrets_are_masked(
    prefect_api: PrefectServer, scripts: Scripts
) -> None:
    """CASE-019, REQ-12."""
    config = PluginConfig.load(
        {
            "resourceQuotas": {"default": 3, "gpu:a100": 1},
            "readRateLimiter": {"qps": 7, "burst": 70},
            "caching": {"resyncInterval": "1m30s"},
        }
    )
    settings = EngineSettings.load({"createTimeout": "5s", "deadline": "2h"})
    JobServer(
        base_url=HttpUrl("http://127.0.0.1:9"),
        token=SecretStr(SECRET),
        engine=config,
        settings=settings,
    ).save("elsewhere", overwrite=True)

    lines = scripts.run(scripts.write(LOADS)).splitlines()
    told = json.loads(next(line for line in lines if line.startswith('{"engine"')))

    assert PluginConfig.load(told["engine"]) == config
    assert EngineSettings.load(told["settings"]) == settings
    assert told["secret"] == len(SECRET)
    documents = _stored(prefect_api.api_url)
    assert "elsewhere" in documents
    assert json.loads(documents)
    assert SECRET not in documents
