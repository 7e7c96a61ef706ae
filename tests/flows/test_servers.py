"""Local servers: found again, never mistaken for another process, ended without a trace."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from leftovers import leftovers

from flows import keeper, servers

# a real small server that answers /health, and leaves a worker behind in its session when it is killed
TINY = """
import http.server, subprocess, sys
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b'ok')
    def log_message(self, *a): pass
if 'worker' in sys.argv:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    subprocess.Popen([sys.executable, '-c', stubborn])
http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Health).serve_forever()
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace whose "mlflow" is a small server that boots at once."""

    def command(root: Path, port: int) -> list[str]:
        return [sys.executable, "-c", TINY, str(port)]

    monkeypatch.setitem(servers.COMMANDS, "mlflow", command)
    return tmp_path


def test_a_running_server_is_reused_and_keeps_its_port_when_started_again(tiny: Path) -> None:
    first = servers.start(tiny, ["mlflow"])["mlflow"]
    try:
        again = servers.start(tiny, ["mlflow"])["mlflow"]
        assert again.pid == first.pid
        assert servers.environment(tiny)["MLFLOW_TRACKING_URI"] == first.url
        assert servers.stop(tiny) == ["mlflow"]
        assert "MLFLOW_TRACKING_URI" not in servers.environment(tiny)
        third = servers.start(tiny, ["mlflow"])["mlflow"]
        assert (third.port, third.pid != first.pid) == (first.port, True)
    finally:
        servers.stop(tiny)
    assert leftovers(tiny) == []


def test_a_port_that_somebody_else_took_is_replaced(tiny: Path) -> None:
    first = servers.start(tiny, ["mlflow"])["mlflow"]
    servers.stop(tiny)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", first.port))
        other.listen()
        second = servers.start(tiny, ["mlflow"])["mlflow"]
        assert second.port != first.port
        servers.stop(tiny)


def test_a_killed_server_is_started_again(tiny: Path) -> None:
    first = servers.start(tiny, ["mlflow"])["mlflow"]
    psutil.Process(first.pid).kill()
    try:
        second = servers.start(tiny, ["mlflow"])["mlflow"]
        assert second.pid != first.pid
        assert httpx.get(second.url, trust_env=False).status_code == 200
    finally:
        servers.stop(tiny)


def test_the_keeper_starts_again_what_died_and_nothing_that_was_ended(tiny: Path) -> None:
    first = servers.start(tiny, ["mlflow"])["mlflow"]
    try:
        assert keeper.turn(tiny) == []
        psutil.Process(first.pid).kill()
        while first.alive:
            time.sleep(0.05)
        assert keeper.turn(tiny) == ["mlflow"]
        again = servers.read(tiny)["mlflow"]
        assert (again.port, again.owner, again.alive) == (first.port, "up", True)
        servers.stop(tiny)
        assert keeper.turn(tiny) == []
    finally:
        servers.stop(tiny)
    assert leftovers(tiny) == []


def test_a_process_that_took_over_a_dead_servers_pid_is_left_alone(tiny: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        entry = servers.Server("mlflow", 1, "http://127.0.0.1:1", "up", stranger.pid, time.time() - 3600)
        (tiny / ".thumbwheel").mkdir()
        (tiny / ".thumbwheel" / "servers.json").write_text(json.dumps({"mlflow": vars(entry)}))
        assert not entry.alive
        assert servers.stop(tiny) == []
        assert stranger.poll() is None
        assert servers.read(tiny) == {}
    finally:
        stranger.kill()
        stranger.wait()


def test_workers_that_ignore_sigterm_or_outlive_their_server_are_ended(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "STOP_SECONDS", 1.0)
    monkeypatch.setitem(
        servers.COMMANDS, "mlflow", lambda root, port: [sys.executable, "-c", TINY, str(port), "worker"]
    )
    servers.start(tiny, ["mlflow"])
    servers.stop(tiny)
    assert leftovers(tiny) == []
    orphaned = servers.start(tiny, ["mlflow"])["mlflow"]
    psutil.Process(orphaned.pid).kill()
    while orphaned.alive:
        time.sleep(0.05)
    assert len(leftovers(tiny)) == 1
    servers.stop(tiny)
    assert leftovers(tiny) == []


def test_a_server_that_ends_at_once_is_explained_by_its_log(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        servers.COMMANDS, "mlflow", lambda root, port: [sys.executable, "-c", "raise SystemExit('no database here')"]
    )
    with pytest.raises(servers.ServerError, match=r"mlflow ended before it answered(.|\n)*no database here"):
        servers.start(tiny, ["mlflow"])
    assert servers.read(tiny) == {}


def test_a_demo_ends_only_what_a_demo_started(tiny: Path) -> None:
    servers.start(tiny, ["mlflow"], owner="demo")
    try:
        servers.start(tiny, ["mlflow"], owner="up")  # somebody wants to keep it
        servers.start(tiny, ["mlflow"], owner="demo")
        assert servers.stop(tiny, owner="demo") == []
        assert servers.read(tiny)["mlflow"].alive
    finally:
        servers.stop(tiny)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"mlflow": {"pid": 1}}', '{"mlflow": null}'])
def test_a_damaged_file_counts_as_empty(tmp_path: Path, text: str) -> None:
    (tmp_path / ".thumbwheel").mkdir()
    (tmp_path / ".thumbwheel" / "servers.json").write_text(text)
    assert servers.read(tmp_path) == {}


def test_proxies_do_not_stand_between_us_and_our_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "example.org,localhost")
    assert servers.environment(tmp_path)["NO_PROXY"] == "example.org,localhost,127.0.0.1"


@pytest.mark.slow
def test_the_real_servers_answer_on_loopback_alone(wheel: Path) -> None:
    started = servers.read(wheel)
    prefect, mlflow, chat = (started[name].url for name in servers.CORE)
    with httpx.Client(trust_env=False, timeout=30) as client:
        settings = client.get(prefect + "/api/admin/settings").json()
        assert settings["server"]["analytics_enabled"] is False
        assert settings["server"]["concurrency"]["initial_deployment_lease_duration"] == 60
        assert "filesystem" in settings["server"]["concurrency"]["lease_storage"]
        assert client.get(prefect + "/ui-settings").json()["api_url"] == prefect + "/api"
        # FastAPI from 0.151 on answers 422 to the nulls in such a body, and from 0.155 on the server does not start
        assert client.post(prefect + "/api/automations/filter", json={"sort": "CREATED_DESC"}).status_code == 200
        experiments = client.get(mlflow + "/api/2.0/mlflow/experiments/search", params={"max_results": 5}).json()
        assert "Default" in [e["name"] for e in experiments["experiments"]]
        assert client.get(chat + "/readyz").status_code == 503  # no champion yet
    assert (wheel / ".thumbwheel" / "prefect.db").exists()
    assert (wheel / ".thumbwheel" / "mlflow.db").exists()
    addresses = {connection.laddr.ip for p in servers.processes(wheel) for connection in listening(p)}
    assert addresses == {"127.0.0.1"}


def listening(process: psutil.Process) -> list:  # type: ignore[type-arg]
    """The sockets on which it waits for connections."""
    return [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
