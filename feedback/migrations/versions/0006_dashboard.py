"""Indexes for what the dashboard counts by day: opinions, and answers without touching their texts."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(op.f("ix_feedback_created_at"), "feedback", ["created_at"])
    columns = ["created_at", "status", "model_hash", "first_token_ms", "total_ms"]
    op.create_index("ix_completion_served", "completion", columns)


def downgrade() -> None:
    op.drop_index("ix_completion_served", "completion")
    op.drop_index(op.f("ix_feedback_created_at"), "feedback")
