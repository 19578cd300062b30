"""What holds for every request before any route: a host, a key, an id, a limit of size, and a deadline."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import math
import re
import secrets
from collections.abc import Callable, Coroutine, Sequence
from email.message import Message as HeaderMessage
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..io import close_name
from .budget import Budget, Share
from .config import MIB, ServeConfig
from .engine import Overloaded
from .errors import ApiError, as_api_error, shorten

REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
OPEN_PATHS = ("/health",)
HOST = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::\d{1,5})?")
PAGE_PATH = re.compile(r"/|/web/.*", re.DOTALL)  # static files; what they show comes from the API
STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)  # never goes back, so its time is linear; the end may lack
BRACKET = re.compile(r"[\[\]{}]")
SHORT = 64 * 1024  # bytes of a body that is parsed at once


class Guard:
    """The outermost layer.

    Args:
        app: what it guards.
        config: keys, limits.
        budget: what all requests together hold in memory.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, budget: Budget) -> None:
        self.app, self.config, self.budget = app, config, budget
        self._names = {name.lower().rstrip(".") for name in config.server_names} | {config.host.lower()}
        self._keys = [hashlib.sha256(key.encode()).digest() for key in config.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        name = given if REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        share = Share(self.budget)
        scope.setdefault("state", {}).update(request_id=name, share=share)
        begun = False

        async def tagged(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                found = MutableHeaders(scope=message)
                found["x-request-id"] = name
                found["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            self._check_host(headers)
            scope["state"]["owner"] = self._check_key(scope, headers)
            counted = self._counted(headers, receive, share)
            await self.app(scope, counted, tagged)
        except ApiError as error:
            if begun:
                raise
            await error.response()(scope, receive, tagged)
        finally:
            if not share.kept:
                share.give_back()

    def _check_host(self, headers: Headers) -> None:
        """Check that a request without a key was sent to a name of this server.

        A web page of another site may let its own name resolve to this server's address (DNS rebinding); then its
        requests are of the same origin for a browser, and only `Host` shows where they come from. Nobody else owns an
        address, `localhost`, or a name without a dot.

        Raises:
            ApiError: it was sent to another name.
        """
        hosts = headers.getlist("host")
        if self._keys or not hosts:  # browsers always send one
            return
        found = HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        name = found["name"].lower().rstrip(".") if found and found["name"] else ""
        own = "." not in name or name.endswith(".localhost") or name in self._names or _is_address(name)
        if found is None or not own:
            raise ApiError(f"This server is not known as '{shorten(hosts[0])}'. Without keys it accepts addresses, "
                           "'localhost', names without a dot, and those of its setting 'server_names'.", status=421,
                           code="invalid_host")  # fmt: skip

    def _check_key(self, scope: Scope, headers: Headers) -> int | None:
        """The number of the key that a request has; None: it needs none."""
        path = scope["path"]
        if not self._keys or path in OPEN_PATHS or scope["method"] == "OPTIONS":
            return None
        if self.config.page and PAGE_PATH.fullmatch(path):
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
        known = [hmac.compare_digest(digest, own) for own in self._keys]  # all of them, whichever fits
        if scheme.lower() != "bearer" or not any(known):
            raise ApiError("Incorrect API key provided.", status=401, type="authentication_error",
                           code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
        return known.index(True)

    def _counted(self, headers: Headers, receive: Receive, share: Share) -> Receive:
        """`receive` that ends with an error when the body is too long, takes too long, or finds no memory."""
        limits = self.config.limits
        most, left = limits.body_mib * MIB, limits.receipt_seconds
        too_large = ApiError(f"the body has more than {limits.body_mib} MiB", status=413, code="request_too_large")
        declared = headers.get("content-length", "0")
        if "content-length" in headers and "transfer-encoding" in headers:  # proxies may see another end of the body
            raise ApiError("send 'content-length' or 'transfer-encoding', not both", code="invalid_request",
                           headers={"Connection": "close"})  # fmt: skip
        if not declared.isdigit() or int(declared) > most:
            raise too_large
        until = asyncio.get_running_loop().time() + left
        size, complete = 0, False

        async def counted() -> Message:
            nonlocal size, complete
            if complete:  # from here on it waits for the client to leave
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise ApiError(f"the request did not arrive within {left:g} s", status=408,
                               code="request_timeout") from None  # fmt: skip
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if size > most:
                    raise too_large
                try:
                    share.take(bytes=len(message.get("body", b"")))
                except Overloaded as error:
                    refused = as_api_error(error)
                    refused.headers["Connection"] = "close"  # the rest of the body is not read
                    raise refused from None
            return message

        return counted


def _is_address(name: str) -> bool:
    """Whether a name is an IPv4 address."""
    try:
        ipaddress.IPv4Address(name)
    except ValueError:
        return False
    return True


class JsonRequest(Request):
    """A request whose JSON is parsed by our rules."""

    async def json(self) -> Any:
        """The body.

        Raises:
            ApiError: it is not JSON, is nested too deeply, has too many values, or has a lone surrogate.
        """
        if not hasattr(self, "_json"):
            body, limits = await self.body(), self.app.state.config.limits
            # a long body in another thread, so that the streams of others go on
            parts = (body, limits.json_depth, limits.json_values)
            self._json = parse(*parts) if len(body) < SHORT else await asyncio.to_thread(parse, *parts)
        return self._json


def parse(body: bytes, depth: int, values: int) -> Any:
    """JSON whose lists and objects are nested at most `depth` times, with about `values` values at most.

    Raises:
        ApiError: it is something else.
    """
    try:
        text = body.decode("utf-8")
        _check_shape(text, depth, values)
        data = json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_without_repeats)
        data_text = json.dumps(data, ensure_ascii=False) if "\\u" in text else ""
        data_text.encode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError):
        raise ApiError("the body is not UTF-8, or has half a character", code="invalid_json") from None
    except (ValueError, RecursionError) as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise ApiError(f"We could not parse the JSON body of your request{where}.", code="invalid_json") from None
    return data


def _check_shape(text: str, depth: int, values: int) -> None:
    """Check nesting and number of values without parsing, since errors about a million values take gigabytes.

    Raises:
        ApiError: there is too much of one of them.
    """
    outside = STRING.sub("", text)
    if sum(map(outside.count, "[{,")) > values:
        raise ApiError(f"the JSON has more than {values} values", code="invalid_json")
    now = 0
    for mark in BRACKET.findall(outside):
        now += 1 if mark in "[{" else -1
        if now > depth:
            raise ApiError(f"the JSON is nested more than {depth} times", code="invalid_json")


def _refuse(name: str) -> Any:
    raise ValueError(name)


def _finite(number: str) -> float:
    """A number that is not too large for JSON's readers, and for our answers."""
    value = float(number)
    return value if math.isfinite(value) else _refuse(number)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are different; of equal ones all but one would be ignored."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        repeated = shorten(next(name for name, _ in pairs if name in seen or seen.add(name)))
        raise ApiError(f"The field '{repeated}' is there twice.", param=repeated, code="invalid_json")
    return found


class JsonRoute(APIRoute):
    """A route whose requests are `JsonRequest`s."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler."""
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            self._check_query(request)
            self._check_headers(request.headers)
            try:
                if self.body_field is None:
                    await _check_no_body(request)
                return await handle(JsonRequest(request.scope, request.receive))
            except RequestValidationError as error:
                raise self._with_known(error) from None
            except HTTPException as error:  # FastAPI's, about an error while the body was read
                raise (error.__cause__ if isinstance(error.__cause__, ApiError) else error) from None

        return handler

    def _check_query(self, request: Request) -> None:
        """Check that the route knows each query parameter, and that each is there once.

        Raises:
            ApiError: there is another one.
        """
        known = [param.alias for param in self.dependant.query_params]
        seen: set[str] = set()
        for name, _ in request.query_params.multi_items():
            short = shorten(name)
            if name not in known:
                hint = close_name(name, known) if known else "This path takes none."
                raise ApiError(f"Unknown query parameter: '{short}'. {hint}".strip(), param=short,
                               code="unknown_parameter")  # fmt: skip
            if name in seen:
                raise ApiError(f"The query parameter '{short}' is there twice.", param=short, code="invalid_value")
            seen.add(name)

    def _check_headers(self, headers: Headers) -> None:
        """Check that the body is JSON in UTF-8 and not compressed.

        Raises:
            ApiError: it is something else.
        """
        message = HeaderMessage()
        message["content-type"] = headers.get("content-type", "")
        charset = str(message.get_param("charset", "utf-8")).lower()
        encoding = headers.get("content-encoding", "identity").strip().lower()
        refused: str | None = None
        if self.body_field is not None and message.get_content_type() != "application/json":
            refused = "send the body as content-type: application/json"
        elif charset not in ("utf-8", "utf8", "us-ascii"):
            refused = f"the charset '{shorten(charset)}' is not accepted; send JSON in UTF-8"
        elif encoding not in ("", "identity"):
            refused = f"the content-encoding '{shorten(encoding)}' is not accepted; send the body as it is"
        if refused is not None:
            raise ApiError(refused, status=415, code="unsupported_media_type")

    def _with_known(self, error: RequestValidationError) -> RequestValidationError:
        """The error, where an unknown field comes with the known ones."""
        known: Sequence[str] = ()
        if self.body_field is not None:
            known = tuple(getattr(self.body_field.field_info.annotation, "model_fields", ()))
        found = [{**e, "ctx": {"known": known}} if e["type"] == "extra_forbidden" else e for e in error.errors()]
        return RequestValidationError(found)


async def _check_no_body(request: Request) -> None:
    """Check that a request without fields has no body but an empty object.

    Raises:
        ApiError: it has one, whose fields would be ignored.
    """
    headers = request.headers
    if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
        return
    if (await request.body()).strip() not in (b"", b"{}"):
        raise ApiError(f"{request.method} takes no body here; leave it out", code="unknown_parameter")
