"""The first tables: completions, opinions, batches, promotions."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "completion",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("conversation", sa.String(length=64), nullable=False),
        sa.Column("turn", sa.Integer(), nullable=False),
        sa.Column("parent", sa.String(length=64), nullable=True),
        sa.Column("subject", sa.String(length=64), nullable=False),
        sa.Column("idempotency_key", sa.String(length=255), nullable=True),
        sa.Column("request_sha256", sa.String(length=64), nullable=False),
        sa.Column("request_messages", sa.JSON(), nullable=False),
        sa.Column("sampling", sa.JSON(), nullable=False),
        sa.Column("response", sa.Text(), nullable=False),
        sa.Column("prompt_token_ids", sa.JSON(), nullable=False),
        sa.Column("response_token_ids", sa.JSON(), nullable=False),
        sa.Column("response_logprobs", sa.JSON(), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("finish_reason", sa.String(length=16), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("model_hash", sa.String(length=64), nullable=False),
        sa.Column("model_alias", sa.String(length=64), nullable=False),
        sa.Column("mlflow_run_id", sa.String(length=64), nullable=True),
        sa.Column("data_revision", sa.String(length=64), nullable=True),
        sa.Column("code_revision", sa.String(length=64), nullable=True),
        sa.Column("first_token_ms", sa.Float(), nullable=True),
        sa.Column("total_ms", sa.Float(), nullable=True),
        sa.Column("locale", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "status IN ('streaming', 'complete', 'aborted', 'error')", name=op.f("ck_completion_status")
        ),
        sa.CheckConstraint("turn >= 0", name=op.f("ck_completion_turn")),
        sa.ForeignKeyConstraint(["parent"], ["completion.id"], name=op.f("fk_completion_parent"), ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_completion")),
        sa.UniqueConstraint("subject", "idempotency_key", name=op.f("uq_completion_subject_idempotency_key")),
    )
    op.create_index(op.f("ix_completion_conversation"), "completion", ["conversation"], unique=False)
    op.create_index(op.f("ix_completion_model_hash"), "completion", ["model_hash"], unique=False)
    op.create_table(
        "promotion",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("action", sa.String(length=16), nullable=False),
        sa.Column("from_hash", sa.String(length=64), nullable=True),
        sa.Column("model_hash", sa.String(length=64), nullable=False),
        sa.Column("model_path", sa.Text(), nullable=False),
        sa.Column("figures", sa.JSON(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("action IN ('promote', 'rollback')", name=op.f("ck_promotion_action")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_promotion")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "training_batch",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("first_seq", sa.BigInteger(), nullable=False),
        sa.Column("last_seq", sa.BigInteger(), nullable=False),
        sa.Column("accepted", sa.Integer(), nullable=False),
        sa.Column("excluded", sa.JSON(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("opened_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("consumed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("mlflow_run_id", sa.String(length=64), nullable=True),
        sa.CheckConstraint("accepted >= 0", name=op.f("ck_training_batch_accepted")),
        sa.CheckConstraint("first_seq <= last_seq", name=op.f("ck_training_batch_range")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_training_batch")),
        sa.UniqueConstraint("first_seq", name=op.f("uq_training_batch_first_seq")),
        sa.UniqueConstraint("last_seq", name=op.f("uq_training_batch_last_seq")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "feedback",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("completion_id", sa.String(length=64), nullable=False),
        sa.Column("subject", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("other", sa.String(length=64), nullable=False),
        sa.Column("value", sa.Integer(), nullable=False),
        sa.Column("ranked", sa.JSON(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=True),
        sa.Column("reasons", sa.JSON(), nullable=False),
        sa.Column("comment", sa.Text(), nullable=False),
        sa.Column("correction", sa.Text(), nullable=False),
        sa.Column("source", sa.String(length=16), nullable=False),
        sa.Column("channel", sa.String(length=16), nullable=False),
        sa.Column("locale", sa.String(length=16), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("retracted", sa.Boolean(), nullable=False),
        sa.Column("trust", sa.Float(), nullable=False),
        sa.Column("moderation", sa.String(length=16), nullable=False),
        sa.Column("moderation_reason", sa.Text(), nullable=False),
        sa.Column("last_seq", sa.BigInteger(), nullable=False),
        sa.Column("client_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "kind IN ('thumb', 'comparison', 'ranking', 'edit', 'comment', 'implicit', 'expert')",
            name=op.f("ck_feedback_kind"),
        ),
        sa.CheckConstraint(
            "moderation IN ('pending', 'accepted', 'quarantined', 'rejected')", name=op.f("ck_feedback_moderation")
        ),
        sa.CheckConstraint(
            "source IN ('human_user', 'human_expert', 'simulated', 'llm_judge')", name=op.f("ck_feedback_source")
        ),
        sa.CheckConstraint("revision >= 1", name=op.f("ck_feedback_revision")),
        sa.CheckConstraint("trust >= 0 AND trust <= 1", name=op.f("ck_feedback_trust")),
        sa.CheckConstraint("value IN (-1, 0, 1)", name=op.f("ck_feedback_value")),
        sa.ForeignKeyConstraint(
            ["completion_id"], ["completion.id"], name=op.f("fk_feedback_completion_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_feedback")),
        sa.UniqueConstraint(
            "completion_id", "subject", "kind", "other", name=op.f("uq_feedback_completion_id_subject_kind_other")
        ),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_feedback_last_seq"), "feedback", ["last_seq"], unique=False)
    op.create_table(
        "feedback_event",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("feedback_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("subject", sa.String(length=64), nullable=False),
        sa.Column("op", sa.String(length=16), nullable=False),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.Column("payload_sha256", sa.String(length=64), nullable=False),
        sa.Column("idempotency_key", sa.String(length=255), nullable=True),
        sa.Column("request_sha256", sa.String(length=64), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "op IN ('create', 'revise', 'retract', 'moderate', 'erase')", name=op.f("ck_feedback_event_op")
        ),
        sa.ForeignKeyConstraint(
            ["feedback_id"], ["feedback.id"], name=op.f("fk_feedback_event_feedback_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_feedback_event")),
        sa.UniqueConstraint("subject", "idempotency_key", name=op.f("uq_feedback_event_subject_idempotency_key")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_feedback_event_feedback_id_seq"), "feedback_event", ["feedback_id", "seq"], unique=False)
    op.create_table(
        "training_batch_item",
        sa.Column("batch_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("feedback_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("accepted", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.String(length=32), nullable=False),
        sa.CheckConstraint("accepted = (reason = '')", name=op.f("ck_training_batch_item_reason")),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["training_batch.id"], name=op.f("fk_training_batch_item_batch_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["feedback_id"], ["feedback.id"], name=op.f("fk_training_batch_item_feedback_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("batch_id", "feedback_id", name=op.f("pk_training_batch_item")),
    )
    op.create_index(
        "uq_training_batch_item_accepted",
        "training_batch_item",
        ["feedback_id"],
        unique=True,
        sqlite_where=sa.text("accepted"),
        postgresql_where=sa.text("accepted"),
    )


def downgrade() -> None:
    op.drop_index(
        "uq_training_batch_item_accepted",
        table_name="training_batch_item",
        sqlite_where=sa.text("accepted"),
        postgresql_where=sa.text("accepted"),
    )
    op.drop_table("training_batch_item")
    op.drop_index(op.f("ix_feedback_event_feedback_id_seq"), table_name="feedback_event")
    op.drop_table("feedback_event")
    op.drop_index(op.f("ix_feedback_last_seq"), table_name="feedback")
    op.drop_table("feedback")
    op.drop_table("training_batch")
    op.drop_table("promotion")
    op.drop_index(op.f("ix_completion_model_hash"), table_name="completion")
    op.drop_index(op.f("ix_completion_conversation"), table_name="completion")
    op.drop_table("completion")
