"""Handlers of /v1/export and /v1/subjects/me: opinions as data sets, one's own data, and its erasure.

A file is made first and sent then, so that a slow reader holds no transaction open and an error comes before the first byte.
It has no name on the disk: nothing of it is left, however the process ends.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from typing import IO, Annotated, Any, Literal, cast

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.background import BackgroundTask

from feedback import erasure, export
from feedback.opinions import Refused
from feedback.schemas import Source
from feedback.store import Store
from feedback.votes import User, speaker

router = APIRouter(prefix="/v1", tags=["data"])
TYPES = {"jsonl": "application/jsonl", "parquet": "application/vnd.apache.parquet"}
PIECE = 1 << 16


@router.get("/export", response_class=StreamingResponse)
async def get_export(
    request: Request,
    view: Literal["trl_unpaired", "trl_preference", "sft"],
    form: Annotated[Literal["jsonl", "parquet"], Query(alias="format")] = "jsonl",
    source: Annotated[list[Source], Query()] = ["human_user", "human_expert"],  # noqa: B006
    after_seq: Annotated[int, Query(ge=0, lt=2**63)] = 0,
) -> StreamingResponse:
    """What stands, in a dataset format of TRL; opinions of machines only where `source` names them.

    All of one moment, whose number is X-Thumbwheel-Last-Seq: with it as `after_seq`, only what is new or changed since.
    """
    file, rows, last = await asyncio.to_thread(exported, request.app.state.service.store, view, form, source, after_seq)
    headers = {
        "Content-Disposition": f'attachment; filename="{view}.{form}"',
        "X-Thumbwheel-Last-Seq": str(last),
        "X-Thumbwheel-Rows": str(rows),
    }
    return sent(file, TYPES[form], headers)


def exported(store: Store, view: str, form: str, sources: Sequence[str], after_seq: int) -> tuple[IO[bytes], int, int]:
    """A view as an open file, its number of rows, and the log's last number."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - whoever sends it closes it
    with store.moment() as connection:
        rows, last = export.write(connection, file, view, form, sources, after_seq)
    return file, rows, last


def sent(file: IO[bytes], media_type: str, headers: dict[str, str]) -> StreamingResponse:
    """Send a file from its beginning, and close it."""
    length = file.tell()
    file.seek(0)
    headers = {**headers, "Content-Length": str(length), "Cache-Control": "no-store"}
    pieces = iter(lambda: file.read(PIECE), b"")
    return StreamingResponse(pieces, media_type=media_type, headers=headers, background=BackgroundTask(file.close))


@router.get("/subjects/me", response_class=StreamingResponse)
async def get_me(request: Request, user: User = None) -> StreamingResponse:
    """Everything that is kept of you: {"subject", "completions", "feedback", "events", "assignments"}."""
    subject = speaker(request, user)
    file = await asyncio.to_thread(own_data, request.app.state.service.store, subject)
    return sent(file, "application/json", {"Content-Disposition": 'attachment; filename="my-data.json"'})


def own_data(store: Store, subject: str) -> IO[bytes]:
    """A person's data as an open JSON file."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - whoever sends it closes it
    with store.moment() as connection:
        for piece in own_json(subject, erasure.own(connection, subject)):
            file.write(piece.encode())
    return file


def own_json(subject: str, rows: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    """The document, piece by piece."""
    yield f'{{"subject": {json.dumps(subject)}'
    row = next(rows, None)
    for name in ("completions", "feedback", "events", "assignments"):
        yield f',\n"{name}": ['
        comma = ""
        while row is not None and row[0] == name:
            yield f"{comma}\n{json.dumps(row[1], ensure_ascii=False)}"
            comma, row = ",", next(rows, None)
        yield "]"
    yield "}\n"


@router.delete("/subjects/me")
async def delete_me(request: Request, user: User = None) -> JSONResponse:
    """Erase everything that is kept of you, for good. A repetition finds nothing."""
    caller = request.state.caller
    if user is None and caller.session is None:
        raise Refused(422, "user_required", "user: say whose data to erase; a key or this machine speaks for many")
    done = await erase(request.app.state.service, speaker(request, user))
    counts = {"completions": done.completions, "opinions": done.opinions} if done else {"completions": 0, "opinions": 0}
    batches = done.batches if done else []
    return JSONResponse({"object": "erasure", "id": done.id if done else None, **counts, "batches": batches})


async def erase(service: Any, subject: str) -> erasure.Erasure | None:
    """Erase a person, to the last byte; None when there was nothing of theirs."""
    done = await service.writer.put(partial(erasure.erase, subject=subject))
    await asyncio.to_thread(service.store.scrub)
    return cast(erasure.Erasure | None, done)
