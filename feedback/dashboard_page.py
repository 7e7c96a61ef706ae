"""The dashboard, as a page and as JSON (GET /v1/dashboard)."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.encoders import jsonable_encoder
from fastapi.responses import JSONResponse, Response

from feedback import charts
from feedback.dashboard import DAYS, LATENCIES, MOST, SORTS, SOURCES, View
from feedback.page import render

router = APIRouter()
Days = Annotated[Literal["7", "30", "90"], Query()]
Source = Annotated[Literal["people", "simulated", "all"], Query()]


async def look(request: Request, days: str, source: str) -> View:
    """The figures, counted in a thread."""
    view: View = await asyncio.to_thread(request.app.state.service.dashboard.view, int(days), source)
    return view


@router.get("/v1/dashboard", tags=["dashboard"])
async def get_dashboard(request: Request, days: Days = "30", source: Source = "all") -> JSONResponse:
    """The dashboard's figures: of so many days of UTC, today included, and of opinions of people, simulated ones or all."""
    return JSONResponse(jsonable_encoder(plain(await look(request, days, source))))


def plain(view: View) -> dict[str, Any]:
    """A view as JSON has it: with the shares of up."""
    found: dict[str, Any] = asdict(view)
    for shown, of in ((found, view), *zip(found["daily"], view.daily, strict=True)):
        shown["thumbs"]["share"] = interval(of)
    for shown, version in zip(found["versions"], view.versions, strict=True):
        shown["thumbs"]["share"] = interval(version)
        shown["champion"] = version.champion
    return found


def interval(of: Any) -> dict[str, float] | None:
    """The share of up of what has thumbs."""
    share = of.thumbs.share
    return share.as_dict() if share else None


@router.get("/dashboard", include_in_schema=False)
async def dashboard_page(request: Request) -> Response:
    """The figures as charts and tables. A filter that there is not is the usual one."""
    asked = request.query_params
    days = next((str(days) for days in DAYS if str(days) == asked.get("days")), "30")
    source = asked.get("source", "all")
    view = await look(request, days, source if source in SOURCES else "all")
    opinions = charts.stacked([day.opinions for day in view.daily])
    given = [{"whole": day.answers - day.errors, "failed": day.errors} for day in view.daily]
    return render(
        request,
        "dashboard.html",
        view=view,
        choices={"days": DAYS, "source": tuple(SOURCES)},
        sorts=SORTS,
        opinions=opinions,
        shares=charts.banded([day.thumbs.share for day in view.daily]),
        answers=charts.stacked(given),
        labels=charts.labels([day.day for day in view.daily]),
        most=MOST,
        latencies=LATENCIES,
    )
