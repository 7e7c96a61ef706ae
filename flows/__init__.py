"""When things run and what is recorded: the Prefect flows, the data gate, MLflow and DVC records, the command line."""
