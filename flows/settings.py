"""Every setting in one place: params.yaml (what a run is made from, typed) and the environment (where it runs)."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from ruamel.yaml import YAML

from flows.files import write_text

PARAMS_FILE = "params.yaml"
PRESETS = Path(__file__).parent / "presets"


class SettingsError(ValueError):
    """params.yaml, a preset or an override is not what it should be. The message names `params.yaml: section.key`."""


@dataclass(frozen=True)
class BellOptions:
    """When the bell opens a batch: at `opinions` waiting ones, or when the oldest has waited `max_wait_seconds`."""

    opinions: int = 200
    max_wait_seconds: int = 3600

    def __post_init__(self) -> None:
        if self.opinions < 1:
            raise ValueError("opinions must be at least 1: a batch holds something")
        if self.max_wait_seconds < 1:
            raise ValueError("max_wait_seconds must be at least 1")


class Params(BaseModel):
    """The whole of params.yaml. Its defaults are the preset `tiny`; the file states every value."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    seed: int = Field(default=1, ge=0, description="seed of every stage that draws random numbers")
    bell: BellOptions = BellOptions()

    def plain(self) -> dict[str, Any]:
        """The values as they stand in params.yaml: dicts, lists, numbers, strings."""
        return json.loads(self.model_dump_json())


# ---------------------------------------------------------------- reading and checking


def yaml() -> YAML:
    """A YAML 1.2 reader and writer that keeps comments, order and quotes."""
    round_trip = YAML()
    round_trip.preserve_quotes = True
    round_trip.width = 120
    return round_trip


def read_values(root: Path) -> dict[str, Any]:
    """params.yaml as it stands, unchecked. Raises SettingsError when it is absent or is no YAML mapping."""
    return _plain(_read_document(root / PARAMS_FILE))


def load(root: Path) -> Params:
    """params.yaml, checked: no unknown key, no missing key, every type and bound right. Raises SettingsError."""
    values = read_values(root)
    params = check(values)
    missing = [key for key in flatten(params.plain()) if key not in flatten(values)]
    if missing:
        raise SettingsError(
            f"{PARAMS_FILE}: {missing[0]} is missing; add it (the default is {flatten(params.plain())[missing[0]]!r})"
        )
    return params


def check(values: Mapping[str, Any]) -> Params:
    """The typed whole of `values`; missing keys take their defaults. Raises SettingsError naming the first bad keys."""
    try:
        return Params.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(e) for e in error.errors(include_url=False))) from error


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "the file"
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{PARAMS_FILE}: {where} is not known; known are {', '.join(_known_beside(error['loc']))}"
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    shown = f" (it is {given!r})" if given is None or isinstance(given, str | int | float | bool) else ""
    return f"{PARAMS_FILE}: {where}: {message}{shown}"


def _known_beside(location: tuple[int | str, ...]) -> list[str]:
    found: Any = Params().plain()
    for part in location[:-1]:
        found = found.get(part, {}) if isinstance(found, dict) else {}
    return sorted(found)


# ---------------------------------------------------------------- changing


def set_params(root: Path, changes: Mapping[str, Any]) -> Params:
    """Write `changes` into params.yaml and return the new whole.

    `changes`: dotted keys ({"ppo.iterations": 3}) or nested sections. Comments stay; the file is renamed into
    place, and is not touched when a change is refused (SettingsError) or changes nothing.
    """
    document = _read_document(root / PARAMS_FILE)
    before = _plain(document)
    after = merge(before, changes)
    params = check(after)
    if after != before:
        for key, value in flatten(after).items():
            _assign(document, key.split("."), value)
        text = io.StringIO()
        yaml().dump(document, text)
        write_text(root / PARAMS_FILE, text.getvalue())
    return params


def preset(name: str) -> dict[str, Any]:
    """The overlay of a preset: `tiny` is every default, others are files of flows/presets. Raises SettingsError."""
    if name == "tiny":
        return Params().plain()
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(["tiny", *(p.stem for p in PRESETS.glob("*.yaml"))])
        raise SettingsError(f"preset {name} is not known; known are {', '.join(known)}")
    return _plain(_read_document(path))


def merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `changes` (dotted keys or nested sections) laid over them; neither is modified."""
    merged: dict[str, Any] = _plain(values)
    for key, value in flatten(changes).items():
        _assign(merged, key.split("."), value)
    return merged


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"ppo": {"iterations": 3}} -> {"ppo.iterations": 3}. Lists are values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _assign(document: Any, path: list[str], value: Any) -> None:
    for part in path[:-1]:
        if not isinstance(document.get(part), Mapping):
            document[part] = {}
        document = document[part]
    if path[-1] not in document or document[path[-1]] != value:
        document[path[-1]] = value


def _read_document(path: Path) -> Any:
    from ruamel.yaml.error import YAMLError

    try:
        document = yaml().load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SettingsError(
            f"{path.name} is missing in {path.parent}: is this the root of a thumbwheel checkout?"
        ) from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path.name} cannot be read as YAML: {error}") from error
    if not isinstance(document, Mapping):
        raise SettingsError(f"{path.name} must be a mapping of sections")
    return document


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    for kind in (bool, int, float, str):  # ruamel's own number and string classes keep the file's spelling
        if isinstance(value, kind):
            return kind(value)
    return value


# ---------------------------------------------------------------- a form for some of them


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Changes(BaseModel):
    """Changed parameters, all optional: a form in the Prefect UI. An empty field leaves params.yaml as it is."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _nest_dotted_keys(cls, values: Any) -> Any:
        return merge({}, values) if isinstance(values, Mapping) else values

    def plain(self) -> dict[str, Any]:
        """Dotted keys of the fields that were given."""
        return flatten(json.loads(self.model_dump_json(exclude_none=True)))


@cache
def changes_model() -> type[Changes]:
    """`Changes` with one optional field for every section and key of params.yaml."""
    fields: dict[str, Any] = {}
    for name, field in Params.model_fields.items():
        kind: Any = field.annotation
        if hasattr(kind, "__dataclass_fields__"):
            optional: Any = {key: (item | None, None) for key, item in get_type_hints(kind).items()}
            title = (kind.__doc__ or "").strip().splitlines()[0]
            kind = create_model(f"{name.capitalize()}Changes", __base__=_Section, __doc__=title, **optional)
        fields[name] = (kind | None, Field(None, title=name))
    return create_model("ParameterChanges", __base__=Changes, **fields)


# ---------------------------------------------------------------- where it runs


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
