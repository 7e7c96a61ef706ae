"""The databases of the drills: a SQLite file, and a PostgreSQL server of their own that commits durably and can be killed."""

from __future__ import annotations

import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import psutil
import psycopg

KINDS = ("sqlite", "postgresql")
Result = TypeVar("Result")


class Database(Protocol):
    """Where a service keeps its opinions. url: as THUMBWHEEL_DATABASE_URL has it."""

    kind: str
    url: str

    def close(self) -> None:
        """End what was started; files stay."""


class Sqlite:
    """A file in a folder. It has no process of its own: who writes it is killed."""

    kind = "sqlite"

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.url = f"sqlite:///{folder / 'feedback.db'}"

    def close(self) -> None:
        """Nothing runs."""


class Postgres:
    """A PostgreSQL server on loopback with its defaults of durability (fsync, full_page_writes, synchronous_commit on).

    Works as root (the server then runs as an unprivileged user, because PostgreSQL refuses root) and as anybody else.
    """

    kind = "postgresql"

    def __init__(self, folder: Path, **options: str) -> None:
        """folder: made, and given to the user who runs the server. Raises OSError when PostgreSQL is not installed."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port, self.options = folder, free_port(), options
        self.url = f"postgresql+psycopg://tw@127.0.0.1:{self.port}/postgres"
        self.prefix, uid, gid = unprivileged()
        os.chown(folder, uid, gid)
        self.env = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "HOME": str(folder)}
        make = [program("initdb"), "-D", str(folder / "data"), "-U", "tw", "-A", "trust", "-E", "UTF8"]
        done = subprocess.run(
            [*self.prefix, *make, "--no-instructions"], env=self.env, cwd=folder, capture_output=True, text=True
        )
        if done.returncode:
            raise OSError(f"initdb failed: {done.stderr.strip()}")
        self.start()
        self.wait()

    def start(self) -> None:
        """Start the server; `wait` says when it answers."""
        command = [
            program("postgres"),
            "-D",
            str(self.folder / "data"),
            "-k",
            "",
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
        ]
        for key, value in self.options.items():
            command += ["-c", f"{key}={value}"]
        with Path(f"{self.folder}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, *command], env=self.env, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self, seconds: float = 60.0) -> None:
        """Until it answers. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                psycopg.connect(self.url.replace("+psycopg", ""), connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                if self.process.poll() is not None:
                    self.start()
                time.sleep(0.05)
        raise TimeoutError(f"PostgreSQL does not answer: see {self.folder}.log")

    def kill(self, whole: bool, luck: random.Random) -> None:
        """SIGKILL of the server with all its processes, or of one of those that serve connections: the server then throws
        the others out, and recovers from its log."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        if whole:
            self.process.kill()
            self.process.wait()
            for child in children:
                silently(child.kill)
            psutil.wait_procs(children, 10)
            return
        serving = [child for child in children if "127.0.0.1" in " ".join(silently(child.cmdline) or [])]
        if serving:
            silently(luck.choice(serving).kill)

    def close(self) -> None:
        """PostgreSQL's fast shutdown; killed when it takes longer."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def make(kind: str, folder: Path) -> Sqlite | Postgres:
    """A new, empty database of a kind in a folder that does not exist yet."""
    return Sqlite(folder) if kind == "sqlite" else Postgres(folder)


def silently(act: Callable[[], Result]) -> Result | None:
    """What `act` returns; None when its process is gone."""
    try:
        return act()
    except psutil.NoSuchProcess:
        return None


def program(name: str) -> str:
    """Path of one of PostgreSQL's programs. Raises OSError when it is not installed."""
    kept = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    found = shutil.which(name) or (str(kept[-1]) if kept else None)
    if found is None:
        raise OSError(f"PostgreSQL's {name} is not installed (apt-get install postgresql)")
    return found


def unprivileged() -> tuple[list[str], int, int]:
    """(command prefix, user id, group id) to run PostgreSQL as. Raises OSError when root finds nobody to be."""
    if os.geteuid() != 0:
        return [], os.geteuid(), os.getegid()
    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        prefix = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--"]
        return prefix, user.pw_uid, user.pw_gid
    raise OSError("PostgreSQL refuses to run as root, and there is neither a user postgres nor nobody")


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
