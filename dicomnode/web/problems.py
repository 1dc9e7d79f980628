"""Errors as answers: a page for people, application/problem+json (RFC 9457) for programs. One place translates.

Both hold the sentence and the remedy of the error; neither ever holds a traceback.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from http import HTTPStatus
from json import JSONDecodeError
from typing import Any
from urllib.parse import quote, urlsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from dicomnode.errors import NodeError
from dicomnode.logs import get_logger
from dicomnode.web.access import recognise
from dicomnode.web.site import page
from sop.errors import Refused

__all__ = ["Problem", "answer", "install", "is_program"]

PROBLEM_JSON = "application/problem+json"
PROGRAMS = ("/api/", "/healthz", "/readyz", "/metrics")
LOCKED = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})

log = get_logger(__name__)


class Problem(BaseModel):
    """Why a request was not answered as asked (RFC 9457)."""

    type: str = Field(default="about:blank", description="always about:blank: the status says what kind it is")
    title: str = Field(description="the status in words", examples=["Not Found"])
    status: int = Field(description="the HTTP status", examples=[404])
    detail: str = Field(description="what is wrong", examples=["nothing in the ledger is called '1.2.3'"])
    remedy: str = Field(default="", description="what to do about it; may be empty",
                        examples=["`dicomnode jobs` lists what came."])


def is_program(request: Request) -> bool:
    """Whether the answer is for a program: by what it asks for, or by how it shows who it is."""
    path, headers = request.url.path, request.headers
    return path.startswith(PROGRAMS) or ("Authorization" in headers and "text/html" not in headers.get("Accept", ""))


def answer(request: Request, status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    """The answer of an error; `text` as in NodeError: "what is wrong. Remedy: what to do"."""
    detail, _, remedy = text.partition("Remedy: ")
    title = HTTPStatus(status).phrase
    detail = detail.strip().rstrip(".") or title
    if is_program(request) or not hasattr(request.app.state, "site"):
        return JSONResponse(Problem(title=title, status=status, detail=detail, remedy=remedy).model_dump(), status,
                            headers, PROBLEM_JSON)
    if not hasattr(request.state, "user"):
        recognise(request)
    response = page(request, "error.html", status_code=status, title=title, detail=detail, remedy=remedy,
                    status=status)
    response.headers.update(headers or {})
    return response


def install(app: FastAPI) -> None:
    """Have the application translate every error that its handlers raise."""
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(NodeError, _node)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(sqlite3.Error, _ledger)
    app.add_exception_handler(JSONDecodeError, _row)


def _http(request: Request, error: Any) -> Response:
    if error.status_code == 401 and not is_program(request):
        return _to_login(request, error)
    text = str(error.detail)
    if error.status_code == 404 and text == HTTPStatus.NOT_FOUND.phrase:
        text = f"there is nothing at {request.url.path[:200]}. Remedy: look at the address, or begin at the front page"
    return answer(request, error.status_code, text, error.headers)


def _to_login(request: Request, error: Any) -> Response:
    """A browser is taken to the page that asks for the token, and from there to where it wanted to be."""
    root = request.app.state.site.config.web.root_path
    if request.headers.get("HX-Request"):  # htmx replaces part of a page: the login belongs into the whole window
        try:
            back = urlsplit(request.headers.get("HX-Current-URL", "")).path.removeprefix(root)
        except ValueError:  # no address
            back = "/"
        return Response(status_code=401, headers={"HX-Redirect": _login(root, back)})
    if request.method not in ("GET", "HEAD"):
        return answer(request, 401, "nothing was done: you are not logged in (any more). Remedy: log in and repeat it")
    query = f"?{request.url.query}" if request.url.query else ""
    return RedirectResponse(_login(root, f"{request.url.path}{query}"), status_code=303)


def _login(root: str, back: str) -> str:
    return f"{root}/login" + (f"?next={quote(back, safe='/')}" if back not in ("", "/") else "")


def _invalid(request: Request, error: Any) -> Response:
    wrong = "; ".join(f"{'.'.join(str(part) for part in item['loc'][1:]) or item['loc'][0]}: {item['msg']}"
                      for item in error.errors())
    return answer(request, 422, f"the request is not understood: {wrong}")


def _node(request: Request, error: Any) -> Response:
    if error.http_status >= 500:
        log.error(str(error), action="web_failed", path=request.url.path)
    return answer(request, error.http_status, str(error))


def _refused(request: Request, error: Any) -> Response:
    return answer(request, 422, f"{error.reason}. Remedy: {error.remedy}")


def _ledger(request: Request, error: Any) -> Response:
    """What the ledger does not do now. It is not this process that mends it."""
    log.error("the ledger did not answer", action="ledger_failed", path=request.url.path, error=str(error))
    locked = getattr(error, "sqlite_errorcode", 0) & 0xFF in LOCKED
    text = ("another process keeps the ledger locked. Remedy: try again in a moment; if it stays so, look at what "
            "else has it open" if locked else
            f"the ledger cannot be used: {error}. Remedy: look at the disk and its rights; where the file is damaged, "
            "stop the node, then `dicomnode repair`, which keeps it")
    return answer(request, 503, text, {"Retry-After": "10"})


def _row(request: Request, error: Any) -> Response:
    """What is asked for has a damaged row; it is not read as if nothing stood there."""
    log.error("a row of the ledger cannot be read", action="row_damaged", path=request.url.path, error=str(error))
    return answer(request, 503, f"a row of the ledger that belongs to this cannot be read: {error}. Remedy: stop the "
                                "node, then `dicomnode repair`, which makes the ledger anew and keeps the old file")
