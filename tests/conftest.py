"""Fixtures for every room: a real PostgreSQL, started once a session, an empty database for each test.

Works as root (the server then runs as an unprivileged user, because PostgreSQL refuses root) and as anybody else.
Where the server's programs are not installed, the tests that need it are skipped and the summary says so.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before numpy and torch are loaded: two test processes on two cores, whose threads would else wait for each other by
# spinning. A small model's stage took 10 s instead of 1 so.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of the maintenance database of a PostgreSQL server of our own, on loopback, without durability."""
    import psycopg

    from benchmarks.drills.databases import program, unprivileged

    try:
        initdb, postgres, (prefix, uid, gid) = program("initdb"), program("postgres"), unprivileged()
    except OSError as error:
        pytest.skip(f"{error}: PostgreSQL's tests do NOT run here")
    root = Path(tempfile.mkdtemp(prefix="thumbwheel-postgres-"))
    os.chown(root, uid, gid)
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "HOME": str(root)}
    make = [initdb, "-D", f"{root}/data", "-U", "tw", "-A", "trust", "-E", "UTF8", "--no-sync", "--no-instructions"]
    subprocess.run([*prefix, *make], check=True, env=env, cwd=root, capture_output=True, text=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"fsync": "off", "full_page_writes": "off", "shared_buffers": "64MB", "max_connections": "60"}
    serve = [postgres, "-D", f"{root}/data", "-k", str(root), "-h", "127.0.0.1", "-p", str(port)]
    for key, value in options.items():
        serve += ["-c", f"{key}={value}"]
    with (root / "log").open("wb") as log:
        process = subprocess.Popen([*prefix, *serve], env=env, cwd=root, stdout=log, stderr=log)
    url = f"postgresql+psycopg://tw@127.0.0.1:{port}/postgres"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(plain(url), connect_timeout=1).close()
                break
            except psycopg.OperationalError:
                assert process.poll() is None and time.monotonic() < deadline, (root / "log").read_text()
                time.sleep(0.05)
        yield url
    finally:
        process.send_signal(signal.SIGINT)  # PostgreSQL's "fast shutdown": do not wait for clients
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(root, ignore_errors=True)


def plain(url: str) -> str:
    """SQLAlchemy's URL as psycopg reads it."""
    return url.replace("+psycopg", "")


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """URL of an empty PostgreSQL database that is dropped after the test."""
    import psycopg

    name = f"test_{uuid.uuid4().hex[:10]}"
    with psycopg.connect(plain(postgres_server), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield postgres_server.rsplit("/", 1)[0] + "/" + name
    with psycopg.connect(plain(postgres_server), autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database, on SQLite and then on PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'feedback.db'}"
    return str(request.getfixturevalue("postgres_url"))
