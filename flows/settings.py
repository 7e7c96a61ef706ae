"""params.yaml, typed: everything a run is made from, in one place. Where it runs stands in flows/environment.py."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic.json_schema import SkipJsonSchema

from feedback.trust_options import TrustOptions
from flows.approval import ApprovalOptions
from flows.curate import CurateOptions
from flows.files import write_text
from flows.gate import GateOptions
from flows.ingest import IngestOptions
from flows.judge import JudgeOptions
from flows.pipeline import Method
from flows.probation import ProbationOptions
from flows.rater import RaterOptions
from flows.snapshot import SnapshotOptions
from flows.tokenize import TokenizeOptions
from flows.validate import ValidateOptions
from flows.values import SettingsError, assign, flatten, merge, plain, read_document, yaml
from models.base import ModelSection, base_hash
from models.compute import ComputeOptions
from models.dpo import DPOOptions
from models.kto import KTOOptions
from models.lora import LoraOptions
from models.ppo_options import PPOOptions
from models.pretrain import PretrainOptions
from models.reward import RewardOptions
from models.sft import SFTOptions

__all__ = [
    "Params",
    "SettingsError",
    "changes_model",
    "check",
    "flatten",
    "load",
    "merge",
    "preset",
    "set_params",
    "yaml",
]

PARAMS_FILE = "params.yaml"
PRESETS = Path(__file__).parent / "presets"


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


@dataclass(frozen=True)
class AlignOptions:
    """How the SFT model learns from opinions: ppo, against a reward model; dpo, from pairs; kto, from lone thumbs."""

    method: Method = "ppo"


class Params(BaseModel):
    """The whole of params.yaml. Its defaults are the preset `tiny`; the file states every value."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    seed: int = Field(default=1, ge=0, description="seed of every stage that draws random numbers")
    data: IngestOptions = IngestOptions()
    curate: CurateOptions = CurateOptions()
    validation: ValidateOptions = Field(default=ValidateOptions(), alias="validate")  # BaseModel.validate exists
    tokenize: TokenizeOptions = TokenizeOptions()
    model: ModelSection = ModelSection()
    pretrain: PretrainOptions = PretrainOptions()
    training: ComputeOptions = ComputeOptions()
    lora: LoraOptions = LoraOptions()
    sft: SFTOptions = SFTOptions()
    rater: RaterOptions = RaterOptions()
    snapshot: SnapshotOptions = SnapshotOptions()
    reward: RewardOptions = RewardOptions()
    align: AlignOptions = AlignOptions()
    ppo: PPOOptions = PPOOptions()
    dpo: DPOOptions = DPOOptions()
    kto: KTOOptions = KTOOptions()
    judge: JudgeOptions = JudgeOptions()
    gate: GateOptions = GateOptions()
    approval: ApprovalOptions = ApprovalOptions()
    bell: BellOptions = BellOptions()
    trust: TrustOptions = TrustOptions()
    probation: ProbationOptions = ProbationOptions()

    @property
    def candidate(self) -> str:
        """The folder of the model that the chosen method makes, relative to the workspace."""
        return f"artifacts/{self.align.method}/model"

    def plain(self) -> dict[str, Any]:
        """The values as they stand in params.yaml: dicts, lists, numbers, strings."""
        return json.loads(self.model_dump_json(by_alias=True))


# ---------------------------------------------------------------- reading and checking


def read_values(root: Path) -> dict[str, Any]:
    """params.yaml as it stands, unchecked. Raises SettingsError when it is absent or is no YAML mapping."""
    return plain(read_document(root / PARAMS_FILE))


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
    place, and is not touched when a change is refused (SettingsError) or changes nothing. model.base_hash follows what
    stands at model.base.
    """
    document = read_document(root / PARAMS_FILE)
    before = plain(document)
    after = merge(before, changes)
    if base := check(after).model.base:
        after = merge(after, {"model.base_hash": _hash(root / base)})
    params = check(after)
    if after != before:
        for key, value in flatten(after).items():
            assign(document, key.split("."), value)
        text = io.StringIO()
        yaml().dump(document, text)
        write_text(root / PARAMS_FILE, text.getvalue())
    return params


def _hash(base: Path) -> str:
    try:
        return base_hash(base)
    except FileNotFoundError as error:
        raise SettingsError(str(error)) from error


def preset(name: str) -> dict[str, Any]:
    """The overlay of a preset: `tiny` is every default, others are files of flows/presets. Raises SettingsError."""
    if name == "tiny":
        return Params().plain()
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(["tiny", *(p.stem for p in PRESETS.glob("*.yaml"))])
        raise SettingsError(f"preset {name} is not known; known are {', '.join(known)}")
    return plain(read_document(path))


# ---------------------------------------------------------------- a form for some of them


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Changes(BaseModel):
    """Changed parameters, all optional: a form in the Prefect UI. An empty field leaves params.yaml as it is."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _check_against_params(cls, values: Any) -> Any:
        """Dotted keys become sections; a refusal names the key as it stands in params.yaml."""
        if not isinstance(values, Mapping):
            return values
        given = {key: value for key, value in flatten(values).items() if value is not None}
        check(merge(Params().plain(), given))
        return merge({}, given)

    def plain(self) -> dict[str, Any]:
        """Dotted keys of the fields that were given."""
        return flatten(json.loads(self.model_dump_json(exclude_none=True, by_alias=True)))


@cache
def changes_model() -> type[Changes]:
    """`Changes` with one optional field for every section and key of params.yaml."""
    fields: dict[str, Any] = {}
    for name, field in Params.model_fields.items():
        kind: Any = field.annotation
        if hasattr(kind, "__dataclass_fields__"):
            default = field.get_default()
            optional: Any = {
                key: _left_empty(item, key, getattr(default, key), bounds(default, key))
                for key, item in get_type_hints(kind).items()
            }
            title = (kind.__doc__ or "").strip().splitlines()[0]
            kind = create_model(f"{name.capitalize()}Changes", __base__=_Section, __doc__=title, **optional)
            fields[name] = _left_empty(kind, field.alias or name, alias=field.alias)
        else:
            fields[name] = _left_empty(kind, name, field.default, {"minimum": 0} if kind is int else {})
    return create_model("ParameterChanges", __base__=Changes, **fields)


def bounds(options: Any, key: str) -> dict[str, float]:
    """What a number of `options`, a section's dataclass, may be, as JSON schema says it.

    Found by asking the section's own checks, which stay the only place where limits are written down.
    """
    default = getattr(options, key)
    if isinstance(default, bool) or not isinstance(default, (int, float)):
        return {}
    whole = isinstance(default, int)
    step = 1 if whole else 1e-6

    def taken(value: float) -> bool:
        try:
            replace(options, **{key: int(value) if whole else float(value)})
        except (ValueError, ArithmeticError):
            return False
        return True

    found: dict[str, float] = {}
    for low in (1, 0):
        if taken(low) and not taken(low - step) and not taken(low - 1):
            found["minimum"] = low
        elif not whole and low == 0 and not taken(0.0) and not taken(-1.0) and taken(step):
            found["exclusiveMinimum"] = 0
    for high in (1, 2, 100):
        if taken(high) and not any(taken(more) for more in (high + step, high + 1, 2 * high, 4 * high)):
            found["maximum"] = high
    return found


def _left_empty(
    kind: Any, title: str, default: Any = None, limits: Mapping[str, float] | None = None, **options: Any
) -> tuple[Any, Any]:
    """An optional field whose schema does not mention null: Prefect's form then shows it as a field to be left empty.

    Not so a yes-or-no: its box cannot be left empty, and the form would send "no". default: as the preset tiny has it.
    """
    if default is not None and not isinstance(default, (list, tuple, dict)):
        said = {True: "yes", False: "no"}.get(default, default) if isinstance(default, bool) else default
        options["description"] = f"tiny: {said}" if said != "" else "tiny: nothing"
    if kind is bool:
        return bool | None, Field(None, title=title, **options)

    def without_default(schema: dict[str, Any]) -> None:
        schema.pop("default", None)
        schema.update(limits or {})

    hidden: Any = SkipJsonSchema
    return kind | hidden[None], Field(None, title=title, json_schema_extra=without_default, **options)


def main() -> None:
    """`python -m flows.settings`: put every default into the params.yaml of the current folder, comments kept."""
    set_params(Path.cwd(), Params().plain())


if __name__ == "__main__":
    main()
