"""The local servers of a workspace: Prefect, MLflow, the chat service; beside them the deployment runner, the bell, the keeper.

Each is a session of its own on a free loopback port, with its log in .thumbwheel/logs/. servers.json says which
processes they are (pid and creation time, so that a pid given to somebody else is never mistaken for ours);
ports.json remembers their ports, so that a restart keeps the address while it is free. Importing this module imports
neither Prefect nor MLflow.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

START_SECONDS = 300.0  # an overloaded machine was seen to need more than 150; a server that died is noticed at once
STOP_SECONDS = 15.0
SLOW_SECONDS = 30.0
CORE = ("prefect", "mlflow", "service")
BACKGROUND = ("runner", "bell", "keeper")
ALL = (*CORE, *BACKGROUND)


class ServerError(RuntimeError):
    """A server did not start; the message shows the end of its log."""


@dataclass(frozen=True)
class Server:
    """One entry of servers.json, which ends with the server; owner is the command that wanted it: demo or up."""

    name: str
    port: int
    url: str
    owner: str
    pid: int
    create_time: float

    @property
    def alive(self) -> bool:
        """Whether that very process still lives (not another one with its pid, not a zombie)."""
        return _is(self.pid, self.create_time)


def workspace() -> Path:
    """The root of the workspace: THUMBWHEEL_ROOT, or the current folder."""
    return Path(os.environ.get("THUMBWHEEL_ROOT") or Path.cwd()).resolve()


def state_folder(root: Path) -> Path:
    """Where a workspace keeps what belongs to its runs and not to git."""
    return root / ".thumbwheel"


def log_path(root: Path, name: str) -> Path:
    """The file that takes what the server prints."""
    return state_folder(root) / "logs" / f"{name}.log"


def ready_path(root: Path, name: str) -> Path:
    """Where a background process without a port writes its pid once it is ready."""
    return state_folder(root) / f"{name}.ready"


def database_url(root: Path) -> str:
    """The database of opinions: THUMBWHEEL_DATABASE_URL, or a SQLite file in the workspace."""
    return os.environ.get("THUMBWHEEL_DATABASE_URL") or f"sqlite:///{state_folder(root) / 'feedback.db'}"


# -- what each server is ------------------------------------------------------------------------------------------


def _prefect(root: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]


def _mlflow(root: Path, port: int) -> list[str]:
    state = state_folder(root)
    database, artifacts = f"sqlite:///{state / 'mlflow.db'}", str(state / "mlflow-artifacts")
    return [sys.executable, "-m", "flows.mlflow_server", str(port), database, artifacts]


def _service(root: Path, port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "feedback.service", "--host", "127.0.0.1", "--port", str(port)),
        *("--database-url", database_url(root), "--models-root", str(state_folder(root) / "models"), "--threads", "1"),
    ]


def _runner(root: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "flows.deployments"]


def _bell(root: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "flows.bell"]


def _keeper(root: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "flows.keeper"]


COMMANDS: dict[str, Callable[[Path, int], list[str]]] = {
    "prefect": _prefect,
    "mlflow": _mlflow,
    "service": _service,
    "runner": _runner,
    "bell": _bell,
    "keeper": _keeper,
}
HEALTH = {"prefect": "/api/health", "mlflow": "/health", "service": "/healthz"}


def fixed_environment(root: Path) -> dict[str, str]:
    """What holds for every process of the workspace, whichever servers run."""
    state = state_folder(root)
    proxies = {name: _without_proxy(os.environ.get(name, "")) for name in ("NO_PROXY", "no_proxy")}
    return proxies | {
        "THUMBWHEEL_ROOT": str(root),
        "DO_NOT_TRACK": "true",  # MLflow takes only this very word
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DVC_NO_ANALYTICS": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
        "PREFECT_HOME": str(state / "prefect"),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",  # a forgotten address must fail, not start a server of its own
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",
        "GIT_PYTHON_REFRESH": "quiet",
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "PYTHONSAFEPATH": "1",  # a click.py in the user's folder must not be taken for the library
    }


def _server_environment(root: Path, port: int) -> dict[str, str]:
    """Settings that only the servers read."""
    state = state_folder(root)
    return {
        # Prefect's page would look for the API on its default port
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{state / 'prefect.db'}",
        # a killed flow run must not hold its place for the default five minutes, nor a restart forget who holds one
        "PREFECT_SERVER_CONCURRENCY_INITIAL_DEPLOYMENT_LEASE_DURATION": "60",
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_CONCURRENCY_MAXIMUM_CONCURRENCY_SLOT_WAIT_SECONDS": "5",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    }


def _without_proxy(value: str) -> str:
    return ",".join(dict.fromkeys([*filter(None, value.split(",")), "127.0.0.1", "localhost"]))


def environment(root: Path) -> dict[str, str]:
    """The variables a client of these servers needs, to be set before prefect or mlflow is imported."""
    values = fixed_environment(root)
    running = {server.name: server.url for server in read(root).values() if server.alive}
    if "prefect" in running:
        values["PREFECT_API_URL"] = running["prefect"] + "/api"
    if "mlflow" in running:
        values["MLFLOW_TRACKING_URI"] = running["mlflow"]
    return values


# -- servers.json -------------------------------------------------------------------------------------------------


def read(root: Path) -> dict[str, Server]:
    """What servers.json says, by name; dead ones included (see Server.alive). A damaged file counts as empty."""
    try:
        entries = json.loads((state_folder(root) / "servers.json").read_text())
        return {name: Server(**entry) for name, entry in entries.items()}
    except (FileNotFoundError, json.JSONDecodeError, TypeError, AttributeError):
        return {}


def _write(root: Path, servers: dict[str, Server]) -> None:
    _write_json(state_folder(root) / "servers.json", {name: asdict(server) for name, server in servers.items()})
    ports = _ports(root) | {name: server.port for name, server in servers.items() if server.port}
    _write_json(state_folder(root) / "ports.json", ports)


def _ports(root: Path) -> dict[str, int]:
    try:
        return {name: int(port) for name, port in json.loads((state_folder(root) / "ports.json").read_text()).items()}
    except (FileNotFoundError, json.JSONDecodeError, TypeError, AttributeError):
        return {}


def _write_json(target: Path, value: object) -> None:
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(target)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One command at a time starts or ends servers of a workspace."""
    state_folder(root).mkdir(parents=True, exist_ok=True)
    with (state_folder(root) / "servers.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _is(pid: int, create_time: float) -> bool:
    try:
        process = psutil.Process(pid)
        # two seconds: the kernel's boot time, which this is counted from, moves when the clock is set
        return abs(process.create_time() - create_time) < 2.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# -- start --------------------------------------------------------------------------------------------------------


def healthy(root: Path, server: Server) -> bool:
    """Whether the process lives and answers (or has written its ready file, where it has no port)."""
    if not server.alive:
        return False
    if server.name not in HEALTH:
        path = ready_path(root, server.name)
        return path.exists() and path.read_text().strip() == str(server.pid)
    import httpx

    try:
        return httpx.get(server.url + HEALTH[server.name], timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def start(root: Path, names: Iterable[str] = CORE, owner: str = "up") -> dict[str, Server]:
    """Start those of `names` that do not run, all at once, and return when every one answers.

    A server that another command started is reused; owner "up" takes it over, so that a demo does not end it.
    Raises ServerError with the end of the log when one exits, or does not answer in time; what this call
    started is then ended again.
    """
    wanted = list(names)
    with _locked(root):
        servers = read(root)
        launched = []
        try:
            for name in wanted:
                known = servers.get(name)
                if known and _answers(root, known):
                    servers[name] = replace(known, owner=owner if owner == "up" else known.owner)
                else:
                    if known:
                        _end(root, known)  # it lives and does not answer, or died and left workers behind
                    servers[name] = _launch(root, name, owner)
                    launched.append(name)
                _write(root, servers)
            _wait(root, [servers[name] for name in wanted])
        except BaseException:
            for name in launched:
                _end(root, servers.pop(name))
            _write(root, servers)
            raise
        return {name: servers[name] for name in wanted}


def _launch(root: Path, name: str, owner: str) -> Server:
    port = _free_port(_ports(root).get(name, 0)) if name in HEALTH else 0
    log = log_path(root, name)
    log.parent.mkdir(parents=True, exist_ok=True)
    ready_path(root, name).unlink(missing_ok=True)
    env = os.environ | environment(root)
    if name in CORE:
        env |= _server_environment(root, port)
        for variable in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
            env.pop(variable, None)
    with log.open("ab") as output:
        process = subprocess.Popen(
            COMMANDS[name](root, port),
            cwd=root,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        created = psutil.Process(process.pid).create_time()
    except psutil.NoSuchProcess as error:
        raise ServerError(_explain(root, name, "ended at once")) from error
    url = f"http://127.0.0.1:{port}" if port else ""
    return Server(name=name, port=port, url=url, owner=owner, pid=process.pid, create_time=created)


def _free_port(preferred: int) -> int:
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do: TIME_WAIT is no obstacle
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ServerError("no free port on 127.0.0.1")


def _answers(root: Path, server: Server) -> bool:
    """Whether a server that runs answers; a busy machine makes it slow, so it is asked for a while."""
    deadline = time.monotonic() + SLOW_SECONDS
    while server.alive and time.monotonic() < deadline:
        if healthy(root, server):
            return True
        time.sleep(0.2)
    return False


def _wait(root: Path, servers: list[Server]) -> None:
    deadline = time.monotonic() + START_SECONDS
    waiting = list(servers)
    while waiting:
        for server in list(waiting):
            if healthy(root, server):
                waiting.remove(server)
            elif not server.alive:
                raise ServerError(_explain(root, server.name, "ended before it answered"))
        if waiting and time.monotonic() > deadline:
            raise ServerError(_explain(root, waiting[0].name, f"does not answer after {START_SECONDS:.0f} seconds"))
        if waiting:
            time.sleep(0.2)


def _explain(root: Path, name: str, what: str) -> str:
    path = log_path(root, name)
    lines = path.read_text(errors="replace").splitlines()[-15:] if path.exists() else []
    return f"the server {name} {what}; the end of {path}:\n" + "\n".join(f"    {line}" for line in lines)


# -- stop ---------------------------------------------------------------------------------------------------------


def stop(root: Path, names: Iterable[str] = ALL, owner: str | None = None) -> list[str]:
    """End those of `names` that run (only those of `owner`, when given), last started first. Returns their names.

    Each gets SIGTERM with all of its session, then SIGKILL for what is left after 15 seconds. Ports are remembered.
    """
    ended = []
    with _locked(root):
        servers = read(root)
        chosen = [servers[n] for n in reversed(list(names)) if n in servers and owner in (None, servers[n].owner)]
        for server in chosen:
            if _end(root, server):
                ended.append(server.name)
            del servers[server.name]
            _write(root, servers)
    return ended


def _end(root: Path, server: Server) -> bool:
    """End the server's session. Returns whether anything of it was still there."""
    members = _members(root, server)
    for process in members:
        _signal(process, signal.SIGTERM)
    _, left = psutil.wait_procs(members, timeout=STOP_SECONDS)
    left = [process for process in {*left, *_members(root, server)} if process.is_running()]
    for process in left:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(left, timeout=STOP_SECONDS)
    return bool(members)


def _members(root: Path, server: Server) -> list[psutil.Process]:
    """The server and everything in the session that it leads (its pid is the session's id), orphans included."""
    if psutil.pid_exists(server.pid) and not server.alive and not _zombie(server.pid):
        return []  # somebody else has that pid now
    members = []
    for process in psutil.process_iter():
        try:
            if process.pid == server.pid or os.getsid(process.pid) == server.pid:
                ours = process.pid == server.pid or process.environ().get("THUMBWHEEL_ROOT") == str(root)
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    members.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError, PermissionError):
            continue
    known = {process.pid for process in members}
    for process in list(members):
        try:  # a flow run of the runner may lead a session of its own
            members.extend(child for child in process.children(recursive=True) if child.pid not in known)
        except psutil.NoSuchProcess:
            continue
        known = {member.pid for member in members}
    return members


def _zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def processes(root: Path) -> list[psutil.Process]:
    """Every live process of the workspace's servers."""
    return [process for server in read(root).values() if server.alive for process in _members(root, server)]
