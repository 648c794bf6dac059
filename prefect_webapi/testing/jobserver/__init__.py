"""A small service that runs pretended jobs, with faults on command: for tests, the quickstart and plugin authors.

`python -m prefect_webapi.testing.jobserver --help` starts it as a process of its own; `EmbeddedJobServer` does so from
a test. `jobs.py` is the table of jobs, `api.py` the service, `faults.py` what goes wrong on command.
"""
