"""`/metrics` for Prometheus."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .engine import Engine

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class _EngineCollector(Collector):
    """What the engine is doing, read when it is asked for."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> list[Metric]:
        """The values."""
        load = self.engine.load
        gauges: dict[str, tuple[str, float]] = {
            "running": ("requests that run", load.running), "waiting": ("requests that wait", load.waiting),
            "rows": ("most requests that run at a time", load.rows),
        }  # fmt: skip
        counters: dict[str, tuple[str, float]] = {
            "generated_tokens": ("tokens of texts", load.tokens), "generated_images": ("images", load.images),
            "cancelled_requests": ("requests that ended early", load.cancelled),
            "failed_requests": ("requests that failed", load.failed),
        }  # fmt: skip
        found: list[Metric] = [GaugeMetricFamily(f"mmi_{n}", about, value=v) for n, (about, v) in gauges.items()]
        return found + [CounterMetricFamily(f"mmi_{n}", about, value=v) for n, (about, v) in counters.items()]


class Metrics:
    """The measurements of a server."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        self.requests = Counter("mmi_http_requests", "answers", ["path", "status"], registry=self.registry)
        self.closed = Counter("mmi_closed_connections", "connections of clients that were too slow", ["reason"],
                              registry=self.registry)  # fmt: skip
        for reason in ("receipt", "write"):
            self.closed.labels(reason)  # 0 from the start
        self.first = Histogram("mmi_first_byte_seconds", "until the first byte of the body", ["path"],
                               registry=self.registry, buckets=SECONDS)  # fmt: skip
        self.whole = Histogram("mmi_request_seconds", "until the end of the body", ["path"], registry=self.registry,
                               buckets=SECONDS)  # fmt: skip

    def text(self) -> bytes:
        """All values in Prometheus' form."""
        return generate_latest(self.registry)


class Measured:
    """Counts requests and their times by the path of their route.

    Args:
        app: what is measured.
        metrics: where to count.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status, first = time.monotonic(), 500, None

        async def seen(message: Message) -> None:
            nonlocal status, first
            if message["type"] == "http.response.start":
                status = message["status"]
            elif first is None and message.get("body"):
                first = time.monotonic()
            await send(message)

        try:
            await self.app(scope, receive, seen)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")  # never the path that was asked for: there are endless ones
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.whole.labels(path).observe(time.monotonic() - begun)
            if first is not None:
                self.metrics.first.labels(path).observe(first - begun)
