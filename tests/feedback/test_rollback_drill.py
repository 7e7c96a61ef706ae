"""Drill: a worse model is promoted by force; people's thumbs, the bell's process and the chat service take it back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from flows import settings


def test_a_worse_model_promoted_by_force_is_rolled_back_by_itself(
    serve: Any, database_url: str, two_models: tuple[Path, str, str], tmp_path: Path
) -> None:
    models, good, bad = two_models
    (tmp_path / ".thumbwheel").mkdir()
    (tmp_path / "params.yaml").write_text(json.dumps(settings.Params().plain()))
    settings.set_params(tmp_path, {"bell.opinions": 10_000, "probation.min_thumbs": 20})
    env = {**os.environ, "THUMBWHEEL_ROOT": str(tmp_path), "THUMBWHEEL_DATABASE_URL": database_url}
    server = serve(database_url, models)
    bell = None
    try:
        server.crown(good)
        rate(server, good, 1)
        server.crown(bad)
        bell = subprocess.Popen([sys.executable, "-m", "flows.bell"], env=env, stderr=subprocess.DEVNULL)
        rate(server, bad, -1)
        rated = time.monotonic()
        server.wait_for("/readyz", good)
        assert time.monotonic() - rated < 60  # half of it is the process's start on a busy machine
        assert server.chat(max_tokens=2).headers["X-Thumbwheel-Model"] == good
        row = server.store.promotions()[-1]
        assert (row.action, row.from_hash, row.model_hash) == ("rollback", bad, good)
        assert "0.0% of 24 thumbs are up, 100.0% of 24 were before" in row.reason
        assert row.figures["probation"]["evidence"]["against"] == 24
    finally:
        server.close()
        if bell is not None:
            bell.kill()  # it may be making MLflow's tables, for the aliases
            bell.wait(20)


def rate(server: Any, model: str, value: int) -> None:
    """Twelve answers each to two people, who all say the same of them."""
    for person in ("ann", "ben"):
        for seed in range(12):
            answer = server.chat(seed=seed, max_tokens=2, user=person)
            assert answer.headers["X-Thumbwheel-Model"] == model
            vote = server.client.put(f"/v1/feedback/{answer.json()['id']}/thumb", json={"value": value, "user": person})
            assert vote.status_code == 201
