"""MLflow's server in one process: `python -m flows.mlflow_server PORT DATABASE-URI ARTIFACTS-FOLDER`.

`mlflow server` imports MLflow, spawns uvicorn, which imports it once more, and waits beside it: twice the processor time and
the memory. This does what it does for one worker, without the job executor.
"""

from __future__ import annotations

import os
import sys

import uvicorn  # before mlflow.server, which refuses other hosts' names only where a web server is loaded


def main() -> None:
    """Serve on 127.0.0.1 until a signal."""
    port, database, artifacts = sys.argv[1:]
    from mlflow import environment_variables as variables
    from mlflow.server import constants, handlers

    os.environ |= {
        constants.BACKEND_STORE_URI_ENV_VAR: database,
        constants.SERVE_ARTIFACTS_ENV_VAR: "true",
        constants.ARTIFACTS_DESTINATION_ENV_VAR: artifacts,
        constants.ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/",
        variables._MLFLOW_SGI_NAME.name: "uvicorn",
        variables._MLFLOW_IN_JOB_EXECUTOR.name: "false",
        variables.MLFLOW_SERVER_ENABLE_JOB_EXECUTION.name: "false",
    }
    handlers.initialize_backend_stores(database, None, "mlflow-artifacts:/")
    from mlflow.server.fastapi_app import app

    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning")


if __name__ == "__main__":
    main()
