"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from sqlalchemy.exc import InterfaceError, OperationalError
from starlette.exceptions import HTTPException

from feedback.engine import EngineError
from feedback.opinions import Refused
from feedback.writer import Overloaded

log = logging.getLogger("thumbwheel")
HTTP_CODE = {404: "not_found", 405: "method_not_allowed", 408: "request_timeout", 413: "request_too_large"}
ENGINE_STATUS = {
    "invalid": 400,
    "context_length_exceeded": 400,
    "engine_failed": 502,
    "engine_refused": 502,
    "engine_timeout": 504,
}


class ErrorDetail(BaseModel):
    """What went wrong. code: for programs; param: the field that is to blame."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """The body of every answer from 400 on, as the OpenAPI schema tells it."""

    error: ErrorDetail


RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "Refused: code says why, and nothing was written"},
    "5XX": {"model": ErrorBody, "description": "Not now; a repetition is harmless"},
}


def error(
    status: int, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """One error response; 503s ask to be tried again."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status, headers=headers or ({"Retry-After": "1"} if status == 503 else None))


def invalid(request: Request, exception: RequestValidationError) -> JSONResponse:
    """400 for a chat request, as OpenAI says it, 422 elsewhere; names the field."""
    first = exception.errors()[0]
    param = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path")) or None
    status = 400 if request.url.path == "/v1/chat/completions" else 422
    return error(status, "invalid_request", f"{param}: {first['msg']}" if param else str(first["msg"]), param)


def engine_error(exception: EngineError) -> JSONResponse:
    """400 when the request is to blame, 502 or 504 when a server behind us is, else 503."""
    return error(ENGINE_STATUS.get(exception.code, 503), exception.code, exception.message)


def http_error(exception: HTTPException) -> JSONResponse:
    """What the framework, or a limit, answers."""
    code = HTTP_CODE.get(exception.status_code, "http")
    return error(exception.status_code, code, exception.detail, headers=exception.headers)


def install(app: FastAPI) -> None:
    """Answer every error in this shape."""

    async def on_invalid(request: Request, exception: Exception) -> Response:
        assert isinstance(exception, RequestValidationError)
        return invalid(request, exception)

    async def on_refused(request: Request, exception: Exception) -> Response:
        assert isinstance(exception, Refused)
        return error(exception.status, exception.code, exception.message)

    async def on_http(request: Request, exception: Exception) -> Response:
        assert isinstance(exception, HTTPException)
        return http_error(exception)

    async def on_engine(request: Request, exception: Exception) -> Response:
        assert isinstance(exception, EngineError)
        return engine_error(exception)

    async def on_database(request: Request, exception: Exception) -> Response:
        log.error("the database failed: %s", exception)
        return error(503, "database_unavailable", "the database does not answer; try again, a repetition is harmless")

    async def on_overload(request: Request, exception: Exception) -> Response:
        return error(503, "overloaded", str(exception))

    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(Refused, on_refused)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(EngineError, on_engine)
    app.add_exception_handler(OperationalError, on_database)
    app.add_exception_handler(InterfaceError, on_database)
    app.add_exception_handler(Overloaded, on_overload)
