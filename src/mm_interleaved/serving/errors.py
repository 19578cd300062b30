"""Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`, for every path and every failure."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..io import InputError, close_name
from .engine import DeadlineExceeded, EngineError, Overloaded, Unavailable

log = logging.getLogger(__name__)


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: HTTP status.
        message, type, param, code: as in OpenAI's envelope.
        headers: further headers.
    """

    def __init__(
        self, message: str, *, status: int = 400, type: str = "invalid_request_error", param: str | None = None,
        code: str | None = None, headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.message, self.status, self.type, self.param, self.code = message, status, type, param, code
        self.headers = dict(headers or {})

    @property
    def envelope(self) -> dict[str, Any]:
        """The error as JSON."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}

    def response(self) -> JSONResponse:
        """The answer."""
        rest_unread = {"Connection": "close"} if self.status in (408, 413) else {}
        return JSONResponse({"error": self.envelope}, self.status, {**self.headers, **rest_unread})


def as_api_error(error: Exception) -> ApiError:
    """Any error of a request; those that nobody expects say nothing about the server, and the caller logs them."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        headers = {"Retry-After": str(max(1, min(error.retry_after, 120)))}
        return ApiError(str(error), status=429, type="rate_limit_error", code="rate_limit_exceeded", headers=headers)
    if isinstance(error, DeadlineExceeded):
        return ApiError(str(error), status=504, type="server_error", code="timeout")
    if isinstance(error, Unavailable):
        return ApiError(str(error), status=503, type="server_error", code="unavailable", headers={"Retry-After": "30"})
    if isinstance(error, EngineError):
        return ApiError(str(error), status=500, type="server_error", code="server_error")
    if isinstance(error, InputError):
        long = "of the model's context" in error.problem
        return ApiError(str(error), param="input", code="context_length_exceeded" if long else "invalid_value")
    return ApiError(
        "an unexpected error; the server's log has it", status=500, type="server_error", code="server_error"
    )


def shorten(text: str, most: int = 100) -> str:
    """A text of at most `most` characters, for messages."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _validation(error: RequestValidationError) -> ApiError:
    """The first problem of a request's fields, with the name of the field."""
    first = error.errors()[0]
    # names and values in it are the client's and may be long
    where = [shorten(str(part)) for part in first["loc"] if part not in ("body", "query", "path")]
    param, kind = ".".join(where) or None, first["type"]
    if param is None and kind == "missing":
        return ApiError("the body is empty; send a JSON object", code="invalid_json")
    if kind == "extra_forbidden":
        known = first.get("ctx", {}).get("known", ())
        hint = close_name(where[-1], known)
        return ApiError(f"Unknown parameter: '{param}'. {hint}".strip(), param=param, code="unknown_parameter")
    if kind == "missing":
        return ApiError(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    message = shorten(str(first["msg"]).removeprefix("Value error, "), 400)
    return ApiError(f"Invalid value for '{param}': {message}" if param else message, param=param, code="invalid_value")


def add_handlers(app: FastAPI) -> None:
    """Answer every error in the one form."""

    async def unknown(request: Request, error: Exception) -> JSONResponse:
        log.error("an unexpected error", exc_info=error)
        return as_api_error(error).response()

    async def known(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _validation(error).response()

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        names = {404: "not_found", 405: "method_not_allowed"}
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        found = ApiError(message, status=error.status_code, code=names.get(error.status_code), headers=error.headers)
        return found.response()

    for kind in (ApiError, InputError, Overloaded, EngineError):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unknown)
