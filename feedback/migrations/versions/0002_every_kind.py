"""Opinions of every kind, erasure, token counts, an index for each query of the page and the trainer."""

from contextlib import AbstractContextManager

import sqlalchemy as sa
from alembic import op
from alembic.operations.base import BatchOperations

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

STATUSES = ["status IN ('streaming', 'complete', 'aborted', 'error')"]
STATUSES.append(STATUSES[0].replace(")", ", 'erased')"))
MODERATION = ["moderation IN ('pending', 'accepted', 'quarantined', 'rejected')"]
MODERATION.append(MODERATION[0].replace(")", ", 'erased')"))
NEW_FEEDBACK = {
    "strength": "strength > 0",
    "position": "position >= 0",
    "other": "(kind IN ('comparison', 'ranking')) = (other <> '')",
    "itself": "other <> completion_id",
    "edit": "kind <> 'edit' OR correction <> '' OR moderation = 'erased'",
}
TOKENS = "prompt_tokens >= 0 AND completion_tokens >= 0"
ERASED = "erased >= 0 AND erased <= accepted"
COUNT = (
    "UPDATE completion SET prompt_tokens = json_array_length(prompt_token_ids), "
    "completion_tokens = json_array_length(response_token_ids)"
)


def rebuilt(table: str, counted: bool) -> AbstractContextManager[BatchOperations]:
    """A change of a table, which SQLite makes by copying it into a new one."""
    return op.batch_alter_table(table, table_kwargs={"sqlite_autoincrement": True} if counted else {})


def check(batch: BatchOperations, table: str, name: str, text: str) -> None:
    batch.create_check_constraint(op.f(f"ck_{table}_{name}"), sa.text(text))


def unchecked(batch: BatchOperations, table: str, name: str) -> None:
    batch.drop_constraint(op.f(f"ck_{table}_{name}"), type_="check")


def partial(name: str, table: str, columns: list[str], where: str) -> None:
    op.create_index(name, table, columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where))


def upgrade() -> None:
    with rebuilt("completion", False) as batch:
        batch.add_column(sa.Column("prompt_tokens", sa.Integer(), nullable=False, server_default="0"))
        batch.add_column(sa.Column("completion_tokens", sa.Integer(), nullable=False, server_default="0"))
        unchecked(batch, "completion", "status")
        check(batch, "completion", "status", STATUSES[1])
        check(batch, "completion", "tokens", TOKENS)
    op.execute(COUNT)
    op.create_index(op.f("ix_completion_parent"), "completion", ["parent"])
    with rebuilt("feedback", True) as batch:
        batch.add_column(sa.Column("strength", sa.Float(), nullable=False, server_default="1"))
        unchecked(batch, "feedback", "moderation")
        check(batch, "feedback", "moderation", MODERATION[1])
        for name, text in NEW_FEEDBACK.items():
            check(batch, "feedback", name, text)
    op.create_index(op.f("ix_feedback_subject"), "feedback", ["subject"])
    partial("ix_feedback_other", "feedback", ["other"], "other <> ''")
    partial("ix_feedback_moderation", "feedback", ["moderation", "id"], "moderation <> 'accepted'")
    with rebuilt("training_batch", True) as batch:
        batch.add_column(sa.Column("erased", sa.Integer(), nullable=False, server_default="0"))
        batch.add_column(sa.Column("snapshot_sha256", sa.String(length=64), nullable=True))
        check(batch, "training_batch", "erased", ERASED)
    op.create_index(op.f("ix_training_batch_item_feedback_id"), "training_batch_item", ["feedback_id"])
    op.create_table(
        "erasure",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("completions", sa.Integer(), nullable=False),
        sa.Column("opinions", sa.Integer(), nullable=False),
        sa.Column("batches", sa.JSON(), nullable=False),
        sa.Column("mlflow_runs", sa.JSON(), nullable=False),
        sa.Column("erased_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("flagged_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("completions >= 0 AND opinions >= 0", name=op.f("ck_erasure_counts")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_erasure")),
        sqlite_autoincrement=True,
    )
    partial("ix_erasure_open", "erasure", ["id"], "flagged_at IS NULL")


def downgrade() -> None:
    # what the older tables have no word for
    op.execute("UPDATE completion SET status = 'error' WHERE status = 'erased'")
    op.execute("UPDATE feedback SET correction = '-' WHERE moderation = 'erased' AND kind = 'edit'")
    op.execute("UPDATE feedback SET moderation = 'rejected' WHERE moderation = 'erased'")
    op.drop_table("erasure")
    op.drop_index(op.f("ix_training_batch_item_feedback_id"), table_name="training_batch_item")
    with rebuilt("training_batch", True) as batch:
        unchecked(batch, "training_batch", "erased")
        batch.drop_column("snapshot_sha256")
        batch.drop_column("erased")
    for name in ("moderation", "other", "subject"):
        op.drop_index(f"ix_feedback_{name}", table_name="feedback")
    with rebuilt("feedback", True) as batch:
        for name in (*NEW_FEEDBACK, "moderation"):
            unchecked(batch, "feedback", name)
        check(batch, "feedback", "moderation", MODERATION[0])
        batch.drop_column("strength")
    op.drop_index(op.f("ix_completion_parent"), table_name="completion")
    with rebuilt("completion", False) as batch:
        for name in ("tokens", "status"):
            unchecked(batch, "completion", name)
        check(batch, "completion", "status", STATUSES[0])
        batch.drop_column("completion_tokens")
        batch.drop_column("prompt_tokens")
