"""The services that plugins talk to, as servers on this machine: `python -m tests.servers.NAME` starts one.

Those of vendors that publish no server are built from the published API and refuse what the vendor refuses.
"""
