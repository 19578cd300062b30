"""`/v1/responses/{id}/inspection`: where MMFS looked while a response was generated that asked for `inspect`."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..inspection.page import page_of
from ..io import InputError
from . import schema
from .app_state import services
from .errors import ApiError
from .middleware import JsonRoute

router = APIRouter(prefix="/v1/responses", route_class=JsonRoute, tags=["responses"])
# The page runs its own script, and can reach neither the network nor what else this server serves.
POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
)
FORMS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The page, or its data", "content": {"text/html": {}, "application/json": {}}}
}


@router.get("/{response_id}/inspection", responses=FORMS, response_model=None)
async def inspection(response_id: schema.Id, request: Request, format: Literal["html", "json"] = "html") -> Response:
    """The inspection of a stored response: an interactive page, or its data."""
    stored = services(request).store.get(response_id, request.state.owner)
    data, status = stored.inspection, stored.response["status"]
    if data is None and status in ("queued", "in_progress"):
        raise ApiError(f"Response '{response_id}' is not finished.", status=409, code="response_not_finished")
    if data is None:
        raise ApiError(f"Response '{response_id}' has no inspection; create it with 'inspect': true.", status=404,
                       code="inspection_not_found")  # fmt: skip
    if format == "json":
        return Response(data, media_type="application/json")
    try:
        page = await asyncio.to_thread(page_of, data)
    except InputError as error:
        raise ApiError(f"{error.problem}. Ask for format=json, or inspect a shorter response.", param="format",
                       code="above_limit") from None  # fmt: skip
    return Response(page, media_type="text/html", headers={"Content-Security-Policy": POLICY})
