"""A training process in miniature: a chain of numbers with checkpoints, told over a pipe what models.run is told."""

import argparse
import json
import os
import signal
import time
from pathlib import Path


def main() -> None:
    """Run the spec: `steps` numbers, each made from the one before, the last in weights.txt."""
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("--metrics-fd", type=int)
    arguments = parser.parse_args()
    spec = json.loads(arguments.spec.read_text())
    options, work, output = spec["params"]["train"], Path(spec["work"]), Path(spec["output"])

    def emit(event: dict) -> None:
        os.write(arguments.metrics_fd, (json.dumps(event) + "\n").encode())

    checkpoint, history = work / "checkpoint.json", []
    if checkpoint.exists():
        history = json.loads(checkpoint.read_text())
        curve = [{"step": step, "loss": value} for step, value in enumerate(history, start=1)]
        emit({"event": "resumed", "step": len(history), "curve": curve})
    value = history[-1] if history else len((Path(spec["root"]) / "artifacts/grind/flour.txt").read_text())
    for step in range(len(history) + 1, options["steps"] + 1):
        value = (value * 31 + step) % 1009
        history.append(value)
        emit({"event": "metrics", "step": step, "total": options["steps"], "metrics": {"loss": value}})
        if step % 5 == 0:
            checkpoint.with_suffix(".tmp").write_text(json.dumps(history))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
        if step == options["kill_at"] and not (work / "killed").exists():
            (work / "killed").touch()
            os.kill(os.getppid(), signal.SIGKILL)
        if step == options["fail_at"]:
            emit({"event": "error", "message": "the loss is not a number"})
            raise SystemExit(3)
        time.sleep(options["sleep"])
    (output / "model").mkdir()
    (output / "model" / "weights.txt").write_text(str(value))
    (output / "metrics.json").write_text(json.dumps({"loss": value}))
    rows = "".join(f"{step},{loss}\n" for step, loss in enumerate(history, start=1))
    (output / "curves.csv").write_text("step,loss\n" + rows)
    emit({"event": "done", "summary": {"loss": value}})


if __name__ == "__main__":
    main()
