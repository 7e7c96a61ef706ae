"""align.method chooses what dvc.yaml's group `policy` is, and nothing else of the pipeline changes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from dvc.repo import Repo

from flows import pipeline, settings
from flows.settings import AlignOptions
from flows.stage import STAGES

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty workspace with the repository's dvc.yaml and params.yaml."""
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    Repo.init(str(tmp_path), no_scm=True).close()
    return tmp_path


def stages(root: Path) -> dict[str, dict[str, Any]]:
    """What DVC makes of dvc.yaml: of every stage its command, deps, params and outs."""
    with Repo(str(root)) as repo:
        return {
            stage.name: {
                "cmd": stage.cmd,
                "deps": {dep.def_path for dep in stage.deps},
                "params": {key for dep in stage.deps if hasattr(dep, "params") for key in dep.params},
                "outs": {out.def_path for out in stage.outs},
            }
            for stage in repo.index.stages
        }


@pytest.mark.parametrize("method", pipeline.METHODS)
def test_one_parameter_chooses_what_follows_the_snapshot(root: Path, method: str) -> None:
    plain = stages(root)
    params = settings.set_params(root, {"align.method": method})
    found = stages(root)
    chosen = found.pop(pipeline.entry(method))
    assert chosen["cmd"] == f"thumbwheel stage {method}"
    assert chosen["outs"] == {f"artifacts/{method}/{name}" for name in ("model", "metrics.json", "curves.csv")}
    assert chosen["params"] == {"seed", "training", "lora", method}
    assert {f"models/{name}.py" for name in pipeline.METHODS} & chosen["deps"] == {f"models/{method}.py"}
    assert params.candidate in found["judge"]["deps"] and "align.method" in found["judge"]["params"]
    others = {name for name in plain if name not in ("judge", "policy@ppo")}
    assert {name: found[name] for name in others} == {name: plain[name] for name in others}
    assert found.keys() == {*others, "judge"}


def test_a_method_that_was_not_chosen_says_how_to_choose_it(root: Path) -> None:
    expected = "stage dpo is not what align.method in params.yaml chooses: `thumbwheel config --set align.method=dpo"
    with pytest.raises(pipeline.PipelineError, match=expected):
        pipeline.look(root, "dpo")
    with pytest.raises(pipeline.PipelineError, match="stage ppo needs artifacts/sft/model, which is missing"):
        pipeline.look(root, "ppo")


def test_methods_are_what_the_form_offers_and_what_runs() -> None:
    assert get_args(get_type_hints(AlignOptions)["method"]) == pipeline.METHODS
    assert set(pipeline.METHODS) < set(STAGES)
    form = settings.changes_model().model_json_schema()
    section = form["$defs"]["AlignChanges"]["properties"]["method"]
    assert section["enum"] == ["ppo", "dpo", "kto"]
    with pytest.raises(settings.SettingsError, match=r"params.yaml: align.method: .*'ppo', 'dpo' or 'kto'"):
        settings.check({"align": {"method": "grpo"}})
