"""Nested values with dotted names, and the YAML files that hold them, comments kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML


class SettingsError(ValueError):
    """params.yaml, a preset or an override is not what it should be. The message names `params.yaml: section.key`."""


def yaml() -> YAML:
    """A YAML 1.2 reader and writer that keeps comments, order and quotes."""
    round_trip = YAML()
    round_trip.preserve_quotes = True
    round_trip.width = 120
    return round_trip


def merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `changes` (dotted keys or nested sections) laid over them; neither is modified."""
    merged: dict[str, Any] = plain(values)
    for key, value in flatten(changes).items():
        assign(merged, key.split("."), value)
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


def assign(document: Any, path: list[str], value: Any) -> None:
    for part in path[:-1]:
        if not isinstance(document.get(part), Mapping):
            document[part] = {}
        document = document[part]
    if path[-1] not in document or document[path[-1]] != value:
        document[path[-1]] = value


def read_document(path: Path) -> Any:
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


def plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    for kind in (bool, int, float, str):  # ruamel's own number and string classes keep the file's spelling
        if isinstance(value, kind):
            return kind(value)
    return value
