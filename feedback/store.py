"""The store: one database of completions, opinions, batches and promotions, on SQLite or PostgreSQL.

    store = Store("sqlite:////path/feedback.db"); store.migrate()
    with store.write() as connection: opinions.vote(connection, ...)

What is done to each noun stands in its own file (completions, opinions, batches, promotions), as functions of a
connection, so that many of them can share one transaction; the methods here open the transaction for them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import make_url

from feedback import batches, completions, erasure, opinions, promotions, trust
from feedback.batches import Batch, Opinion, Pending
from feedback.erasure import Erasure
from feedback.lessons import Answer
from feedback.opinions import Event, Vote
from feedback.promotions import Promotion, StaleChampion
from feedback.trust import Review
from feedback.trust_options import UNTESTED, TrustOptions

__all__ = ["Batch", "Erasure", "Event", "Opinion", "Pending", "Promotion", "StaleChampion", "Store", "Vote"]

MIGRATIONS = Path(__file__).parent / "migrations"
# any number that no other program on the database uses
WRITE_LOCK = 0x7477_0001


class Store:
    """The database behind one URL. Safe to share between threads; close it with close()."""

    def __init__(self, url: str) -> None:
        """url: sqlite:///relative.db, sqlite:////absolute.db, or postgresql+psycopg://user@host/database.

        Raises ValueError for another database, or for SQLite in memory (each connection would see its own).
        """
        parsed = make_url(url)
        self.dialect = parsed.get_backend_name()
        # SQLite's waiting writers poll, and one may starve; the threads of a process queue here instead
        self._turn = threading.Lock() if self.dialect == "sqlite" else contextlib.nullcontext()
        if self.dialect == "sqlite":
            if not parsed.database or parsed.database == ":memory:":
                raise ValueError(f"the feedback database needs a file: {url}; use sqlite:///path/to/feedback.db")
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            # kept open: opening one in the middle of others' writes is slow, and may find the file locked
            self.engine = sa.create_engine(parsed, pool_size=16, max_overflow=16)
            sa.event.listen(self.engine, "connect", prepare_sqlite)
            sa.event.listen(self.engine, "begin", begin_sqlite)
        elif self.dialect == "postgresql":
            if parsed.drivername == "postgresql":
                parsed = parsed.set(drivername="postgresql+psycopg")
            self.engine = sa.create_engine(parsed, pool_pre_ping=True, isolation_level="READ COMMITTED")
        else:
            raise ValueError(f"the feedback database must be SQLite or PostgreSQL, not {self.dialect} ({url})")

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that commits when the block ends, one at a time per database.

        The log's cursor must never pass a number that is still uncommitted. Numbers are drawn inside the transaction,
        so two writers at once could commit 8 before 7, and a reader in between would skip 7 for ever. Here a writer
        takes the one write lock before it draws a number (PostgreSQL: an advisory lock that is released only after
        the commit is visible; SQLite: BEGIN IMMEDIATE), so numbers become visible in the order they were drawn: who
        sees n sees all below n. Writers wait for each other; the service commits many requests in one transaction
        (writer.py), so that costs little.
        """
        connected = self.engine.connect().execution_options(thumbwheel_write=True)
        with connected as connection, self._turn, connection.begin():
            if self.dialect == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(WRITE_LOCK)))
            yield connection

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction for reading; each statement sees what was committed when it began."""
        with self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def moment(self) -> Iterator[sa.Connection]:
        """A transaction for reading in which all statements see the same moment (as any of SQLite's does)."""
        options = {"isolation_level": "REPEATABLE READ"} if self.dialect == "postgresql" else {}
        with self.engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection

    def scrub(self) -> None:
        """After an erasure: see that SQLite's log of writes holds none of the old bytes. Waits for those who read.

        PostgreSQL gives the old rows' space to new ones by itself (autovacuum), its own log in time too.
        """
        if self.dialect == "sqlite":
            self._alone("PRAGMA wal_checkpoint(TRUNCATE)")

    def _alone(self, statement: str) -> None:
        """Run what SQLite refuses inside a transaction. Raises sqlalchemy.exc.OperationalError when others stay in the way."""
        with self._turn, contextlib.closing(self.engine.raw_connection()) as connection:
            row = connection.cursor().execute(statement).fetchone()
            if row and row[0]:
                raise sa.exc.OperationalError(statement, None, RuntimeError("the database is being read all the time"))

    def migrate(self, revision: str = "head") -> None:
        """Bring the tables to `revision`: up to "head" or a revision above, down to one below ("base" drops them all).

        Several callers may race.
        """
        from alembic import command  # imported here: it takes longer than all the rest of this room's storage
        from alembic.config import Config
        from alembic.script import ScriptDirectory

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        config.set_main_option("path_separator", "os")
        scripts = ScriptDirectory.from_config(config)
        with self._migrating() as connection:
            config.attributes["connection"] = connection
            known = sa.inspect(connection).has_table("alembic_version")
            current = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() if known else None
            wanted = scripts.get_current_head() if revision == "head" else None if revision == "base" else revision
            if current == wanted:
                return
            above = {script.revision for script in scripts.iterate_revisions(current, "base")} if current else set()
            if wanted is None or wanted in above:
                command.downgrade(config, revision)
            else:
                command.upgrade(config, revision)
            if self.dialect == "sqlite" and connection.exec_driver_sql("PRAGMA foreign_key_check").first():
                raise RuntimeError(
                    f"the migration to {revision} would leave rows that point nowhere; nothing was changed"
                )

    @contextmanager
    def _migrating(self) -> Iterator[sa.Connection]:
        """A write transaction that may rebuild tables.

        SQLite changes a table by copying it and dropping the old one, which with foreign keys on would delete every row
        that points to it; they can be turned off outside of a transaction only, so on a connection of its own.
        """
        if self.dialect == "postgresql":
            with self.write() as connection:
                yield connection
            return
        engine = sa.create_engine(self.engine.url, poolclass=sa.NullPool)
        sa.event.listen(engine, "connect", prepare_sqlite)
        sa.event.listen(engine, "connect", lambda connection, record: connection.execute("PRAGMA foreign_keys = OFF"))
        sa.event.listen(engine, "begin", begin_sqlite)
        with engine.connect().execution_options(thumbwheel_write=True) as connection, self._turn, connection.begin():
            yield connection

    def ping(self) -> None:
        """Raises sqlalchemy.exc.SQLAlchemyError when the database does not answer."""
        with self.read() as connection:
            connection.execute(sa.text("SELECT 1 FROM promotion WHERE 1 = 0"))

    # champions

    def champion(self) -> Promotion | None:
        """The model that reigns, or None before the first promotion."""
        with self.read() as connection:
            return promotions.champion(connection)

    def promote(
        self,
        *,
        model_hash: str,
        model_path: str,
        figures: dict[str, Any],
        reason: str,
        expected_champion: str | None,
    ) -> Promotion:
        """Make `model_hash` the champion. A repetition for the reigning model changes nothing and returns its row.

        Raises StaleChampion when the reigning model is not `expected_champion`: the figures were against another one.
        """
        with self.write() as connection:
            return promotions.promote(connection, model_hash, model_path, figures, reason, expected_champion)

    def rollback(
        self, reason: str, *, expected_champion: str | None = None, figures: dict[str, Any] | None = None
    ) -> Promotion:
        """Give the crown back to the champion before the reigning one. Raises ValueError when there is none.

        expected_champion: whom to take it from; StaleChampion when another reigns. figures: what decided, for the row.
        """
        with self.write() as connection:
            return promotions.rollback(connection, reason, expected_champion, figures)

    def promotions(self) -> list[Promotion]:
        """All rows, oldest first."""
        with self.read() as connection:
            return promotions.history(connection)

    # opinions

    def vote(self, vote: Vote) -> tuple[Event, str]:
        """One opinion, created or revised; see opinions.vote."""
        with self.write() as connection:
            return opinions.vote(connection, vote)

    def moderate(self, feedback_id: int, state: str, reason: str) -> Event:
        """Set an opinion's moderation (pending, accepted, quarantined, rejected); see opinions.moderate."""
        with self.write() as connection:
            return opinions.moderate(connection, feedback_id, state, reason)

    def events(self, after_seq: int = 0, limit: int = 1000) -> list[Event]:
        """The log after `after_seq`, in order; nothing that commits later will have a number below the last one."""
        with self.read() as connection:
            return opinions.events(connection, after_seq, limit)

    def count_opinions(
        self, *, model_hash: str | None = None, source: str | None = None, pending_only: bool = False
    ) -> int:
        """Opinions that stand (neither retracted nor 0, moderation accepted), of one model or source if given.

        pending_only: only those that the next batch would accept.
        """
        with self.read() as connection:
            return batches.count(connection, model_hash=model_hash, source=source, pending_only=pending_only)

    # batches

    def pending(self, limits: TrustOptions = UNTESTED) -> Pending:
        """How many opinions the next batch would accept under the caps of `limits`, and since when the oldest waits."""
        with self.read() as connection:
            return batches.pending(connection, limits)

    def open_batch(self, minimum: int = 1, limits: TrustOptions = UNTESTED) -> Batch | None:
        """Close the log's open range as a batch, with an item for each opinion in it, in one transaction.

        Raters are reviewed first (trust.review): what those who were found out said goes into quarantine. None, and
        nothing else changed, when it would accept fewer than `minimum` opinions.
        """
        with self.write() as connection:
            return batches.open_batch(connection, minimum, limits)

    def review(self, limits: TrustOptions, *, act: bool = True) -> Review:
        """What is known of each rater, and quarantine for what those who were found out said; see trust.review."""
        with self.write() if act else self.read() as connection:
            return trust.review(connection, limits, act=act)

    def open_batches(self) -> list[Batch]:
        """Batches that no training has consumed, oldest first."""
        with self.read() as connection:
            return batches.listed(connection, only_open=True)

    def consume_batch(self, batch_id: int, mlflow_run_id: str | None, snapshot_sha256: str | None = None) -> Batch:
        """Mark a batch as learned from: by which run, and from which files (snapshot.digest of them).

        A repetition keeps the first mark. Raises KeyError when there is no such batch.
        """
        with self.write() as connection:
            return batches.consume(connection, batch_id, mlflow_run_id, snapshot_sha256)

    def manifest(self) -> dict[str, Any]:
        """{"batches": [{"id", "first_seq", "last_seq", "accepted", "sha256"}]}, oldest first."""
        with self.read() as connection:
            return batches.manifest(connection)

    def written_manifest(self) -> dict[str, Any]:
        """The manifest of only those batches that hold an answer which a person wrote, or a change of one."""
        with self.read() as connection:
            return batches.written_manifest(connection)

    def opinions(
        self, manifest: dict[str, Any], retell: Callable[[Answer], Answer] = lambda answer: answer
    ) -> Iterator[Opinion]:
        """The opinions that the manifest's batches accepted, each in its newest state up to the manifest's end.

        retell: gives token ids to answers that have none that serve (retelling.py). Those that no longer stand by then
        (retracted, 0, quarantined) are left out. Raises ValueError when a batch of the manifest is not in this database,
        or differs from it.
        """
        with self.read() as connection:
            yield from batches.opinions(connection, manifest, retell)

    # erasure

    def erase(self, subject: str, actor: str = erasure.PERSON) -> Erasure | None:
        """Erase everything of a person, the bytes in the database's file too; see erasure.erase."""
        with self.write() as connection:
            done = erasure.erase(connection, subject, actor)
        self.scrub()
        return done

    def unflagged_erasures(self) -> list[Erasure]:
        """Erasures whose runs and snapshots nobody has seen to yet, oldest first."""
        with self.read() as connection:
            return erasure.unflagged(connection)

    def erasure_flagged(self, erasure_id: int) -> None:
        """Note that an erasure's runs are flagged and its snapshots deleted."""
        with self.write() as connection:
            erasure.flagged(connection, erasure_id)

    def completion(self, completion_id: str) -> completions.Completion | None:
        """One answer, or None."""
        with self.read() as connection:
            return completions.get(connection, completion_id)


def prepare_sqlite(connection: Any, record: object) -> None:
    """Settings of each new SQLite connection: durable commits, checked foreign keys, patience."""
    connection.isolation_level = None  # begin_sqlite says BEGIN, so that a write transaction locks at its start
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout = 30000")
    # it stays with the file; saying it again would ask for a lock that nobody waits for
    if cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA secure_delete = ON")  # what is deleted or replaced is overwritten, not just forgotten
    cursor.close()


def begin_sqlite(connection: sa.Connection) -> None:
    """Start a transaction; a writer takes the write lock at once, so that what it reads stays true until it writes."""
    write = connection.get_execution_options().get("thumbwheel_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
