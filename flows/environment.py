"""Where a workspace runs: environment variables THUMBWHEEL_*, and the local servers found in servers.json."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Environment(BaseSettings):
    """Settings of the machine, from environment variables THUMBWHEEL_*; what is absent is found or chosen."""

    model_config = SettingsConfigDict(env_prefix="THUMBWHEEL_", extra="ignore", frozen=True)

    root: Path = Field(default_factory=Path.cwd)
    database_url: str = ""
    prefect_api_url: str = ""
    mlflow_tracking_uri: str = ""
    service_url: str = ""
    threads: int | None = Field(default=None, ge=1)
    device: str = ""
    processes: int | None = Field(default=None, ge=1)

    @property
    def state(self) -> Path:
        """The folder of run-time state."""
        return self.root / ".thumbwheel"

    def feedback_url(self) -> str:
        """The SQLAlchemy URL of the feedback database."""
        return self.database_url or f"sqlite:///{self.state / 'feedback.db'}"

    def mlflow_uri(self) -> str:
        """The running MLflow server of this workspace; without one, its database itself."""
        return self.mlflow_tracking_uri or server_url(self.root, "mlflow") or f"sqlite:///{self.state / 'mlflow.db'}"

    def prefect_url(self) -> str | None:
        """The API of this workspace's Prefect server, if one runs."""
        running = server_url(self.root, "prefect")
        return self.prefect_api_url or os.environ.get("PREFECT_API_URL") or (f"{running}/api" if running else None)

    def chat_url(self) -> str | None:
        """The address of this workspace's chat service, if one runs."""
        return self.service_url or server_url(self.root, "service")


def environment(root: Path | None = None) -> Environment:
    """The environment's settings, for workspace `root` if given, with an absolute root."""
    found = Environment() if root is None else Environment(root=root)
    return found.model_copy(update={"root": found.root.resolve()})


def server_url(root: Path, name: str) -> str | None:
    """The address of a local server of this workspace whose process lives, else None."""
    from flows import servers

    server = servers.read(root).get(name)
    return server.url if server is not None and server.alive else None
