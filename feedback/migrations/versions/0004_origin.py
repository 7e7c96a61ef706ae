"""Where an answer comes from: our decoder, a server by URL, or an imported log."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # in the column's own words, which SQLite can add and drop without copying the table
    op.execute(
        "ALTER TABLE completion ADD COLUMN origin VARCHAR(16) DEFAULT 'decoder' NOT NULL "
        "CONSTRAINT ck_completion_origin CHECK (origin IN ('decoder', 'remote', 'import'))"
    )


def downgrade() -> None:
    op.drop_column("completion", "origin")
