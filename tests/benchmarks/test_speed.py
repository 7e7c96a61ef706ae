"""The races' own arithmetic, by hand: operations, medians, bars, limits; and that ours runs and counts what it did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peers, speed, speed_page
from benchmarks.races import work

CHECKOUT = Path(__file__).resolve().parents[2]


def run(work_done: float, seconds: float, mb: float = 100.0, **facts: Any) -> dict[str, Any]:
    return {"work": work_done, "cpu_seconds": seconds, "peak_mb": mb, **facts}


def record(row: str = "sft", size: str = "1m", **changes: Any) -> dict[str, Any]:
    machine = {"processor": "A", "cores": 2, "vectors": ["avx2"], "gflops": 80.0, "gbs": 10.0}
    fixed = {"row": row, "size": size, "date": "2026-01-02", "unit": "tokens", "machine": machine, "pairs": 3}
    figures = {"ours": 1234.5, "peer": 400.0, "ratio": 3.1, "ratio_low": 3.0, "ratio_high": 3.25, "limit": 5000.0}
    rest = {"ours_mb": 400.0, "peer_mb": 500.0, "memory_ratio": 1.25, "share_of_limit": 0.247, "must": 5.0, "aim": 8.0}
    return fixed | figures | rest | changes


def test_weights_of_the_small_shape_by_hand() -> None:
    shape = work.SHAPES["1m"]
    # q and o 128·128, k and v 128·64 each, three feed-forward matrices 128·384; four layers; 4,096 embeddings
    assert shape.layer_weights == 4 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384)
    assert shape.weights == shape.layer_weights + 4096 * 128


def test_operations_of_a_forward_pass_by_hand() -> None:
    shape = work.Shape(hidden=8, layers=1, heads=2, kv_heads=2, ffn=16, vocabulary=32, context=16)
    layer = 4 * 8 * 8 + 3 * 8 * 16
    # causal attention: scores and weighted sum, 2·8 operations each, over n²/2 pairs
    attention = (3 * 3 + 5 * 5) / 2 * 2 * 2 * 8
    assert shape.forward([3, 5], 2) == 2 * layer * 8 + attention + 2 * 2 * 32 * 8


def test_medians_and_spread_are_of_the_pairs() -> None:
    ours = [run(100, 1.0, 90), run(100, 2.0, 110), run(100, 4.0, 100)]
    theirs = [run(10, 1.0, 300), run(10, 1.0, 200), run(10, 1.0, 250)]
    found = speed.compared(ours, theirs)
    assert (found["ratio"], found["ratio_low"], found["ratio_high"]) == (5.0, 2.5, 10.0)
    assert (found["ours"], found["peer"], found["pairs"]) == (50.0, 10.0, 3)
    assert (found["ours_mb"], found["peer_mb"], found["memory_ratio"]) == (100, 250, 2.5)


def test_bars_are_by_size() -> None:
    row = next(row for row in speed.ROWS if row.name == "generate-one")
    assert speed.asked(row, "135m") == {"must": 1.3, "aim": 2}
    assert speed.asked(row, "10m") == {"must": None, "aim": None}


def test_the_limit_is_operations_over_the_peak_or_bytes_over_the_bandwidth() -> None:
    row = speed.ROWS[0]
    limits = {"gflops": 10.0, "gbs": 2.0}
    found = speed.distance(row, "1m", [run(50, 4.0, flops=20e9)], limits)
    assert found == {"limit": 25.0, "share_of_limit": 0.5}
    found = speed.distance(row, "1m", [run(50, 4.0, bytes=2e9)], limits)
    assert found == {"limit": 50.0, "share_of_limit": 0.25}


def test_names_of_rows_are_unique_and_each_has_an_environment() -> None:
    names = [row.name for row in speed.ROWS]
    assert len(set(names)) == len(names)
    assert {row.environment for row in speed.ROWS} == set(peers.PINS)


def test_an_unknown_row_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["speed", "stf"])
    with pytest.raises(SystemExit):
        speed.main()
    assert "stf: no such row; rows are pretrain, sft" in capsys.readouterr().err


def test_the_page_takes_the_newest_record_and_says_what_was_missed() -> None:
    lines = [
        json.dumps(record(ratio=9.0)),
        json.dumps(record()),
        json.dumps(record("reward-kept", must=None, aim=None)),
    ]
    page = speed_page.page(speed_page.newest(lines))
    assert "**3.10×** (3.00 to 3.25, 3) | 5×, missed | 8× | 25% of 5,000" in page
    assert "9.00" not in page
    assert "| 400 MB | 500 MB | **1.25×** less | 1.5×, missed | 2× |" in page
    assert "`python -m benchmarks.speed reward-kept --pairs 3`" in page


@pytest.mark.slow
def test_generation_counts_the_tokens_it_made(tmp_path: Path) -> None:
    """Both sides' counts start from this file: 8 prompts one at a time, 64 tokens each, none ending early."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}

    def python(*arguments: str | Path) -> None:
        command = [sys.executable, "-m", *map(str, arguments)]
        subprocess.run(command, cwd=CHECKOUT, env=environment, check=True, capture_output=True)

    python("benchmarks.races.prepare", "1m", tmp_path, "0")
    python("benchmarks.races.ours", "generate_one", "1m", tmp_path, tmp_path / "out.json")
    found = work.read_json(tmp_path / "out.json")
    assert found["work"] == 8 * 64
    assert 0 < found["cpu_seconds"] < 600
    assert found["peak_mb"] > 50
