"""A data stage in miniature: repeats the grain, and notes outside of its output how often it ran."""

from models.job import Job


def run(job: Job) -> dict:
    """Write artifacts/grind/flour.txt."""
    grain = job.input("data").joinpath("grain.txt").read_text()
    (job.output / "flour.txt").write_text(grain * job.params["grind"]["times"])
    job.log(1, 1, {"length": len(grain)})
    with (job.root / "runs.log").open("a") as file:
        file.write("x")
    return {"length": len(grain), "kind": "rye"}
