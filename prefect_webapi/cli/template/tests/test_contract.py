"""Each check of the contract is a test here; the run ends with the certificate."""

from acme_service import AcmeService
from prefect_webapi.testing import PluginConformance
from prefect_webapi_acme import entry


class TestContract(PluginConformance):
    entry = entry
    service = AcmeService
