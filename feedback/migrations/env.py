"""Alembic's entry: runs on the connection, and in the transaction, that Store.migrate hands over."""

from alembic import context

from feedback.tables import Table

context.configure(connection=context.config.attributes["connection"], target_metadata=Table.metadata)
context.run_migrations()
