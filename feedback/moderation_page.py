"""The moderation page: what waits, judged by mouse, by keyboard or without scripts, and taken back; and the log of it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any
from urllib.parse import urlencode

import sqlalchemy as sa
from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import ValidationError

from feedback import audit, cases, moderation
from feedback.cases import Filter, Outcome
from feedback.moderation import Judgement
from feedback.opinions import Refused
from feedback.page import read_form, render
from feedback.tables import KINDS, SOURCES
from feedback.votes import speaker

router = APIRouter(include_in_schema=False)
NUMBER = re.compile(r"[0-9]{1,18}")
RANGE = re.compile(r"([0-9]{1,18})-([0-9]{1,18})")
SEEN = re.compile(r"case-([0-9]{1,18})")
VERDICTS = ("accepted", "quarantined", "rejected")
AUDIT_PAGE = 100


def number(text: str | None) -> int:
    """A number of a query or form; 0 for what is none."""
    return int(text) if text and NUMBER.fullmatch(text) else 0


def chosen(fields: Any) -> Filter:
    """The filter of a query or a form; what does not exist filters nothing."""
    state, kind, source = (fields.get(name, "") for name in ("state", "kind", "source"))
    return Filter(
        state if state in cases.STATES else "waiting",
        kind if kind in KINDS else "",
        source if source in SOURCES else "",
        fields.get("why", "").replace("\0", "")[:1000],
        *(number(fields.get(name)) for name in ("rater", "after", "only")),
    )


def address(wanted: Filter, **more: Any) -> str:
    """The page's address with a filter."""
    fields = {"why" if name == "reason" else name: value for name, value in asdict(wanted).items()} | more
    return "/moderation?" + urlencode({name: value for name, value in fields.items() if value})


def actor(request: Request) -> str:
    """Whoever sits before the page, as the audit log calls them."""
    name: str = request.state.caller.actor(speaker(request, None))
    return name


def pseudonyms(request: Request) -> Callable[[str], str]:
    """A short name for a subject: the same one everywhere, and not to be found from what stands in the tables."""
    identity = request.app.state.service.identity
    return lambda subject: identity.sign("pseudonym", subject)[:8] if subject else ""


def who(request: Request) -> Callable[[str], str]:
    """An actor of the audit log, for people."""
    short = pseudonyms(request)
    return lambda name: short(name.removeprefix("subject:")) if name.startswith("subject:") else name


@router.get("/moderation")
async def moderation_page(request: Request) -> Response:
    """What waits, or what the filter asks for."""
    return await shown(request, chosen(request.query_params))


async def shown(request: Request, wanted: Filter, status: int = 200, **problem: Any) -> Response:
    """The page; problem: what was wrong with a judgement, its reason and its selection."""
    found = RANGE.fullmatch(request.query_params.get("acted", ""))
    done = (int(found[1]), int(found[2])) if found else (0, 0)
    store = request.app.state.service.store
    listed, more, known, acts = await asyncio.to_thread(read, store, wanted, actor(request), done)
    values = {"problem": "", "given": "", "selected": frozenset(), **problem}
    missed = [number(part) for part in request.query_params.get("missed", "").split(",") if number(part)]
    return render(
        request,
        "moderation.html",
        status,
        cases=listed,
        wanted=wanted,
        further=address(replace(wanted, after=listed[-1].opinion.id)) if more else "",
        address=partial(address, wanted),
        choices={"state": cases.STATES, "kind": KINDS, "source": SOURCES},
        reasons=known,
        verdicts=VERDICTS,
        acts=acts,
        acted=f"{done[0]}-{done[1]}",
        missed=missed[: cases.PAGE],
        left="left" in request.query_params,
        pseudonym=pseudonyms(request),
        who=who(request),
        **values,
    )


def read(store: Any, wanted: Filter, by: str, done: tuple[int, int]) -> tuple[Any, ...]:
    """A page of cases, whether there are more, the reasons to choose from, and what was just done by whom asks."""
    with store.moment() as connection:
        acts = cases.acts(connection, by, *done) if done[0] else []
        return *cases.find(connection, wanted), cases.reasons(connection), acts


@router.post("/moderation")
async def act(request: Request) -> Response:
    """Judge what is selected, one opinion, or all of a rater; or undo that. `do` says which."""
    form = await read_form(request)
    wanted, store = chosen(form), request.app.state.service.store
    verdict, _, scope = form.get("do", "").partition(":")
    if verdict == "undo" and (found := RANGE.fullmatch(scope)):
        judged = await asyncio.to_thread(look, store, cases.acts, actor(request), int(found[1]), int(found[2]))
        return seen_to(wanted, await in_parts(request, judged, cases.undo))
    if verdict not in VERDICTS:
        raise Refused(422, "invalid_request", f"do: one of {', '.join(VERDICTS)}, or undo:FIRST-LAST")
    picked, more = selected(form, scope), False
    try:
        judgement = Judgement.model_validate({"state": verdict, "reason": form.get("reason", "").strip()})
        moderation.check_reason(judgement)
        if scope == "rater":
            picked, more = await asyncio.to_thread(look, store, cases.of_rater, wanted)
        elif not picked:
            raise Refused(422, "nothing_selected", "")
    except (Refused, ValidationError) as refusal:
        code = refusal.code if isinstance(refusal, Refused) else "reason_unusable"
        given = form.get("reason", "")[:1000]
        return await shown(request, wanted, 422, problem=code, given=given, selected=frozenset(picked))

    def judge(connection: sa.Connection, part: list[tuple[int, int]], by: str) -> Outcome:
        return cases.judge(connection, dict(part), judgement, by)

    return seen_to(wanted, await in_parts(request, list(picked.items()), judge, more))


async def in_parts(
    request: Request, all: list[Any], do: Callable[[sa.Connection, list[Any], str], Outcome], more: bool = False
) -> Outcome:
    """Do something to many opinions, PART at a time, so that others write in between."""
    writer, by, outcomes = request.app.state.service.writer, actor(request), []
    for start in range(0, len(all), cases.PART):
        part = all[start : start + cases.PART]
        outcomes.append(await writer.put(lambda connection, part=part: do(connection, part, by)))
    return cases.together(outcomes, more)


def look(store: Any, query: Callable[..., Any], *args: Any) -> Any:
    """The answer to a query of a connection."""
    with store.read() as connection:
        return query(connection, *args)


def selected(form: dict[str, str], scope: str) -> dict[int, int]:
    """The opinions that a form judges, with the event at which each was seen: the one of its own button, else the ticked."""
    if found := RANGE.fullmatch(scope):
        return {int(found[1]): int(found[2])}
    ticked = ((SEEN.fullmatch(name), value) for name, value in form.items())
    return {int(match[1]): number(value) for match, value in ticked if match}


def seen_to(wanted: Filter, outcome: Outcome) -> Response:
    """Back to the page, which says what was done."""
    more: dict[str, Any] = {"missed": ",".join(str(id) for id in outcome.changed[: cases.PAGE])}
    if outcome.judged:
        more["acted"] = f"{outcome.first}-{outcome.last}"
    if outcome.more:
        more["left"] = 1
    return RedirectResponse(address(wanted, **more), 303, headers={"Cache-Control": "no-store"})


@router.get("/moderation/audit")
async def audit_page(request: Request) -> Response:
    """Who judged what, the newest first; with the scope admin, all that the log has."""
    everything = "admin" in request.state.caller.scopes
    before = number(request.query_params.get("before"))
    act = "" if everything else moderation.ACT
    store = request.app.state.service.store
    found = await asyncio.to_thread(look, store, audit.latest, AUDIT_PAGE + 1, before, act)
    acts, more = found[:AUDIT_PAGE], len(found) > AUDIT_PAGE
    further = f"/moderation/audit?before={acts[-1].id}" if more else ""
    values: dict[str, Any] = {"acts": acts, "further": further, "everything": everything, "who": who(request)}
    return render(request, "audit.html", vocabulary="moderation", **values)
