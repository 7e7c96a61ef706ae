"""Labelling: tasks of several answers to rank, and who has or had which of them."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

OPEN = sa.text("closed_at IS NULL")


def upgrade() -> None:
    op.create_table(
        "labelling_task",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("origin", sa.String(length=16), nullable=False),
        sa.Column("gold", sa.Boolean(), nullable=False),
        sa.Column("expected", sa.JSON(), nullable=True),
        sa.Column("gold_by", sa.String(length=64), nullable=True),
        sa.Column("raters", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("origin IN ('given', 'asked', 'traffic')", name=op.f("ck_labelling_task_origin")),
        sa.CheckConstraint("raters >= 1", name=op.f("ck_labelling_task_raters")),
        sa.CheckConstraint("gold = (expected IS NOT NULL)", name=op.f("ck_labelling_task_gold")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_labelling_task")),
        sa.UniqueConstraint("name", name=op.f("uq_labelling_task_name")),
    )
    op.create_index(
        "ix_labelling_task_open",
        "labelling_task",
        ["created_at", "id"],
        sqlite_where=OPEN,
        postgresql_where=OPEN,
    )
    op.create_table(
        "labelling_answer",
        sa.Column("task_id", sa.String(length=32), nullable=False),
        sa.Column("place", sa.Integer(), nullable=False),
        sa.Column("completion_id", sa.String(length=64), nullable=False),
        sa.CheckConstraint("place >= 0 AND place < 9", name=op.f("ck_labelling_answer_place")),
        sa.ForeignKeyConstraint(
            ["task_id"], ["labelling_task.id"], name=op.f("fk_labelling_answer_task_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["completion_id"], ["completion.id"], name=op.f("fk_labelling_answer_completion_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("task_id", "place", name=op.f("pk_labelling_answer")),
        sa.UniqueConstraint("task_id", "completion_id", name=op.f("uq_labelling_answer_task_id_completion_id")),
    )
    op.create_index(op.f("ix_labelling_answer_completion_id"), "labelling_answer", ["completion_id"])
    op.create_table(
        "labelling_assignment",
        sa.Column("task_id", sa.String(length=32), nullable=False),
        sa.Column("subject", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("shown", sa.JSON(), nullable=False),
        sa.Column("given_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("feedback_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.CheckConstraint("state IN ('open', 'ranked', 'skipped')", name=op.f("ck_labelling_assignment_state")),
        sa.CheckConstraint(
            "(state = 'ranked') = (feedback_id IS NOT NULL)", name=op.f("ck_labelling_assignment_ranked")
        ),
        sa.CheckConstraint("(state = 'open') = (finished_at IS NULL)", name=op.f("ck_labelling_assignment_finished")),
        sa.ForeignKeyConstraint(
            ["task_id"], ["labelling_task.id"], name=op.f("fk_labelling_assignment_task_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["feedback_id"], ["feedback.id"], name=op.f("fk_labelling_assignment_feedback_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("task_id", "subject", name=op.f("pk_labelling_assignment")),
    )
    op.create_index(
        op.f("ix_labelling_assignment_subject_state"), "labelling_assignment", ["subject", "state"], unique=False
    )
    op.create_index(op.f("ix_labelling_assignment_feedback_id"), "labelling_assignment", ["feedback_id"])


def downgrade() -> None:
    for table in ("labelling_assignment", "labelling_answer", "labelling_task"):
        op.drop_table(table)
