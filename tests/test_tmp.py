import os, subprocess, sys
def test_x(prefect_server):
    p=subprocess.run([sys.executable, os.environ["SCRIPT"]], env=prefect_server.environment(PYTHONPATH="/tmp/t:/work/main"), capture_output=True, text=True, timeout=100)
    print(p.stdout[-8000:], p.stderr[-12000:]); print(p.returncode)
    import json, urllib.request
    for what in ("task_runs","artifacts"):
        r=urllib.request.Request(prefect_server.api_url+f"/{what}/filter", data=b"{}", headers={"content-type":"application/json"}, method="POST")
        for t in json.load(urllib.request.urlopen(r)):
            if what=="task_runs":
                r2=json.load(urllib.request.urlopen(prefect_server.api_url+f"/task_run_states/?task_run_id={t['id']}"))
                print(t["name"], t["run_count"], [(s["type"],s["name"],s["message"]) for s in sorted(r2,key=lambda s:s["timestamp"])])
            else: print(t["key"], t["data"], t["task_run_id"])
