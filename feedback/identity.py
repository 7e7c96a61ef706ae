"""Who speaks: the secret key, the names under which people stand in the tables, and the token that lets one rate."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
import time
from pathlib import Path

SECRET = "THUMBWHEEL_SECRET"
TOKEN_DAYS = 30


def read_secret(folder: Path) -> bytes:
    """The key of this installation: from the environment, or made once in `folder`/secret, readable by its owner only.

    Raises ValueError for a key that is too short to be one.
    """
    given = os.environ.get(SECRET)
    if given is not None:
        if len(given) < 16:
            raise ValueError(f"{SECRET} has {len(given)} characters; at least 16 are needed")
        return given.encode()
    path = folder / "secret"
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"secret.{os.getpid()}.draft"
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(draft, path)  # fails when somebody made it before: theirs counts
    except FileExistsError:
        pass
    finally:
        draft.unlink()
    found = path.read_text().strip()
    if len(found) < 16:
        raise ValueError(f"{path} holds no key; delete it, and a new one is made")
    return found.encode()


class Identity:
    """Makes and checks signed names with one secret key."""

    def __init__(self, secret: bytes) -> None:
        self.secret = secret

    def sign(self, purpose: str, *parts: str) -> str:
        """Hex HMAC-SHA256 over the parts, none of which can be moved into another."""
        message = b"".join(f"{len(part.encode())}:{part};".encode() for part in (purpose, *parts))
        return hmac.new(self.secret, message, hashlib.sha256).hexdigest()

    def subject(self, kind: str, *names: str) -> str:
        """How a person is called in the tables: nobody can be found from it without the key. kind: "cookie", "user" (on
        this machine), or "key" with the names of an API key and of one of its users."""
        return self.sign("subject", kind, *names)[:32]

    def token(self, completion_id: str, subject: str, now: float | None = None) -> str:
        """Lets its bearer rate one answer as `subject`, for TOKEN_DAYS days."""
        expiry = str(int((time.time() if now is None else now) + TOKEN_DAYS * 86400))
        mac = bytes.fromhex(self.sign("token", completion_id, subject, expiry))
        return f"{expiry}.{subject}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"

    def verify(self, token: str, completion_id: str, now: float | None = None) -> str:
        """The subject that a token speaks for. Raises ValueError when it is not ours, not for this answer, or too old."""
        expiry, _, rest = token.partition(".")
        subject, _, mac = rest.partition(".")
        expected = bytes.fromhex(self.sign("token", completion_id, subject, expiry))
        spelled = base64.urlsafe_b64encode(expected).decode().rstrip("=")
        if not hmac.compare_digest(spelled.encode(), mac.encode()):
            raise ValueError("the feedback token is not valid for this answer")
        if int(expiry) < (time.time() if now is None else now):
            raise ValueError("the feedback token has expired")
        return subject
