"""The description of the API, with the limits and names of this server."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from .config import ServeConfig
from .engine import Engine


def describe_api(app: FastAPI, config: ServeConfig, engine: Engine) -> None:
    """Let `/openapi.json` state what this server accepts."""
    limits = config.limits
    most = {
        "num_inference_steps": min(limits.steps, engine.limits.steps), "num_candidates": limits.candidates,
        "num_beams": limits.beams, "max_output_tokens": limits.output_tokens, "max_tokens": limits.output_tokens,
        "max_completion_tokens": limits.output_tokens, "max_tool_calls": limits.output_images,
        "max_images": limits.output_images, "n": limits.candidates,
    }  # fmt: skip
    side = engine.limits.image_size

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            for schema in found["components"]["schemas"].values():
                _describe(schema.get("properties", {}), most, [engine.model, *engine.adapters], side)
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = openapi  # FastAPI's documented way to extend the description


def _describe(properties: dict[str, Any], most: dict[str, int], models: list[str], side: int) -> None:
    for name, described in properties.items():
        for kind in described.get("anyOf", [described]):
            if name in most and kind.get("type") == "integer":
                kind["maximum"] = most[name]
            elif name == "model" and kind.get("type") == "string":
                kind["enum"] = models
            elif name == "size" and kind.get("type") == "string":
                kind["enum"] = ["auto", f"{side}x{side}"]
            elif name in ("image_url", "url") and kind.get("type") == "string":
                kind["pattern"] = "^(data:image/(png|jpeg|webp);base64,|https?://)"
