#!/bin/sh
# The image runs this once, on an empty volume: a user and a database each for Prefect, MLflow and the feedback service.
set -eu
make() {
    psql -v ON_ERROR_STOP=1 -v name="$1" -v password="$2" --username "${POSTGRES_USER:-postgres}" --dbname postgres <<'SQL'
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE CONNECT ON DATABASE :"name" FROM PUBLIC;
SQL
}
make prefect "${PREFECT_DB_PASSWORD:?}"
make mlflow "${MLFLOW_DB_PASSWORD:?}"
make feedback "${FEEDBACK_DB_PASSWORD:?}"
