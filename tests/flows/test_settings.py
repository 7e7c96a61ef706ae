"""params.yaml: typed, whole, written back with its comments; errors name the key."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows import code_deps, settings
from flows.settings import Params, SettingsError, changes_model, set_params

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the repository's params.yaml."""
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    return tmp_path


def test_the_shipped_file_is_the_preset_tiny() -> None:
    assert settings.load(REPOSITORY) == Params()
    assert settings.read_values(REPOSITORY) == Params().plain()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ppo.iteration": 3}, r"params.yaml: ppo.iteration is not known; known are .*iterations"),
        ({"pppo": {"iterations": 3}}, r"params.yaml: pppo is not known; known are .*ppo"),
        ({"ppo.iterations": "many"}, r"params.yaml: ppo.iterations: Input should be a valid integer \(it is 'many'\)"),
        ({"ppo.iterations": 2.5}, r"params.yaml: ppo.iterations: "),
        ({"bell.opinions": 0}, r"params.yaml: bell: opinions must be at least 1"),
        ({"seed": -1}, r"params.yaml: seed: .*greater than or equal to 0 \(it is -1\)"),
    ],
)
def test_a_refused_change_names_the_key_and_leaves_the_file(root: Path, changes: dict, message: str) -> None:
    before = (root / "params.yaml").read_bytes()
    with pytest.raises(SettingsError, match=message):
        set_params(root, changes)
    assert (root / "params.yaml").read_bytes() == before


def test_a_change_keeps_comments_and_everything_else(root: Path) -> None:
    before = (root / "params.yaml").read_text(encoding="utf-8").splitlines()
    params = set_params(root, {"ppo.iterations": 3, "sft": {"learning_rate": 0.5}})
    assert (params.ppo.iterations, params.sft.learning_rate) == (3, 0.5)
    after = (root / "params.yaml").read_text(encoding="utf-8").splitlines()
    assert [line.split("#")[-1] for line in before if "#" in line] == [
        line.split("#")[-1] for line in after if "#" in line
    ]
    changed = [new.split("#")[0].strip() for old, new in zip(before, after, strict=True) if old != new]
    assert sorted(changed) == ["iterations: 3", "learning_rate: 0.5"]
    assert settings.load(root) == params


def test_a_change_to_what_it_is_already_does_not_touch_the_file(root: Path) -> None:
    before = (root / "params.yaml").stat().st_mtime_ns
    set_params(root, Params().plain())
    assert (root / "params.yaml").stat().st_mtime_ns == before


def test_a_missing_key_is_named_with_its_default(root: Path) -> None:
    text = (root / "params.yaml").read_text(encoding="utf-8")
    (root / "params.yaml").write_text("".join(li for li in text.splitlines(True) if "gae_lambda" not in li), "utf-8")
    with pytest.raises(SettingsError, match=r"params.yaml: ppo.gae_lambda is missing; add it \(the default is 0.95\)"):
        settings.load(root)


def test_no_file_and_no_yaml_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"params.yaml is missing in .*: is this the root of a thumbwheel checkout"):
        settings.load(tmp_path)
    (tmp_path / "params.yaml").write_text("seed: [1\n")
    with pytest.raises(SettingsError, match=r"params.yaml cannot be read as YAML"):
        settings.load(tmp_path)


def test_presets_are_overlays_that_check(root: Path) -> None:
    assert settings.preset("tiny") == Params().plain()
    micro = set_params(root, settings.preset("micro"))
    assert micro.model.hidden_size < Params().model.hidden_size and micro.seed == Params().seed
    with pytest.raises(SettingsError, match="preset huge is not known; known are micro, tiny"):
        settings.preset("huge")


def test_the_form_takes_sections_and_dotted_keys_and_only_known_ones() -> None:
    form = changes_model()
    assert form.model_validate({"ppo.iterations": 4, "validate": {"max_rejected": 2}}).plain() == {
        "ppo.iterations": 4,
        "validate.max_rejected": 2,
    }
    assert form().plain() == {}
    with pytest.raises(ValueError, match=r"params.yaml: ppo.iteration is not known; known are "):
        form.model_validate({"ppo.iteration": 4})


def test_settings_import_no_orchestration() -> None:
    code = "import sys, flows.settings; print([m for m in ('prefect','mlflow','dvc','great_expectations') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert result.stdout.strip() == "[]"


def test_dvc_yaml_names_exactly_the_files_that_a_stage_imports() -> None:
    assert code_deps.declared(REPOSITORY) == code_deps.expected(REPOSITORY)


def test_import_closure_follows_functions_packages_and_relative_imports(tmp_path: Path) -> None:
    for path, text in {
        "models/__init__.py": '"""Nothing but words."""\n',
        "models/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import models.never\n"
        "def f():\n    from models.sub import leaf\n    import json\n",
        "models/never.py": "",
        "models/b.py": "x = 1\n",
        "models/sub/__init__.py": "from models import b\n",
        "models/sub/leaf.py": "from . import twig\nfrom ..c import thing\n",
        "models/sub/twig.py": "",
        "models/c.py": "thing = 1\nimport models.a\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    names = ["a.py", "b.py", "c.py", "sub/__init__.py", "sub/leaf.py", "sub/twig.py"]
    assert code_deps.import_closure(tmp_path, "models.a") == [f"models/{name}" for name in names]
