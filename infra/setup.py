"""Run once by compose, and again after an upgrade: MLflow's bucket, the work pools, the deployments of prefect.yaml.

Addresses and keys come from the environment (AWS_*, PREFECT_API_URL). What is there already is left or brought up to date.
"""

from __future__ import annotations

import subprocess
import sys

BUCKET = "mlflow"
POOLS = ("cpu", "gpu")


def make_bucket() -> None:
    """The bucket of MLflow's artifacts. Raises botocore's ClientError when it may neither be seen nor made."""
    import boto3

    store = boto3.client("s3")
    if BUCKET not in {bucket["Name"] for bucket in store.list_buckets()["Buckets"]}:
        store.create_bucket(Bucket=BUCKET)


def commands() -> list[list[str]]:
    """Prefect's part."""
    prefect = [sys.executable, "-m", "prefect", "--no-prompt"]
    pools = [[*prefect, "work-pool", "create", pool, "--type", "process", "--overwrite"] for pool in POOLS]
    return [*pools, [*prefect, "deploy", "--all"]]


def main() -> None:
    """Everything, in order; the first that fails ends it."""
    make_bucket()
    for command in commands():
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
