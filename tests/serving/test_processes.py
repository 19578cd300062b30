"""The server as a process: its start, a kill in mid-stream, the end by a signal, and answers under load."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import openai
import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@contextmanager
def serving(port: int, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`mmi serve` of the debug model, once it answers."""
    command = [sys.executable, "-m", "mm_interleaved", "serve", "--port", str(port), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until = time.monotonic() + 90
        while True:
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            assert time.monotonic() < until
            try:
                if httpx2.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                    break
            except httpx2.HTTPError:
                time.sleep(0.2)
        yield process
    finally:
        process.kill()
        process.wait()


def client_of(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


LONG = {"num_inference_steps": 100, "seed": 1, "min_output_tokens": 400}


def test_a_killed_server_is_an_error_of_the_connection_and_starts_again() -> None:
    port = free_port()
    with serving(port, "--model", "debug") as process:
        stream = client_of(port).responses.create(model="debug", input="x", stream=True, extra_body=LONG)
        next(iter(stream))
        process.send_signal(signal.SIGKILL)
        try:
            ends = [event.type for event in stream if event.type in ("response.completed", "response.incomplete")]
        except (openai.APIError, httpx2.HTTPError):
            ends = []
        assert not ends
        process.wait()
        with pytest.raises(openai.APIConnectionError):
            client_of(port).responses.create(model="debug", input="x")
    with serving(port, "--model", "debug"):
        answer = client_of(port).responses.create(model="debug", input="x", tool_choice="none", max_output_tokens=3,
                                                  extra_body={"seed": 1})  # fmt: skip
        assert answer.status in ("completed", "incomplete")


def test_a_signal_lets_running_requests_finish() -> None:
    port = free_port()
    with serving(port, "--model", "debug") as process:
        body = {"input": "x", "tool_choice": "none", "max_output_tokens": 60, "min_output_tokens": 60, "stream": True}
        with httpx2.stream(
            "POST", f"http://127.0.0.1:{port}/v1/responses", json=body, timeout=60, trust_env=False
        ) as got:
            lines = got.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            events = [json.loads(line[6:])["type"] for line in lines if line.startswith("data: ")]
        assert events[-1] in ("response.incomplete", "response.completed")
        assert process.wait(60) in (0, -signal.SIGTERM)


def test_what_cannot_be_served_is_said() -> None:
    for arguments, words in (
        (["--model", "nothing"], "nothing"), (["rows=0"], "rows"), (["rovs=3"], "Did you mean 'rows'"),
        (["--stub", "--port", "70000"], "65535"),
    ):  # fmt: skip
        command = [sys.executable, "-m", "mm_interleaved", "serve", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90)
        assert done.returncode != 0
        assert words in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "mm_interleaved", "serve", "--stub", "--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90)
        assert "cannot listen" in done.stderr


def test_a_minute_of_load(tmp_path: Path) -> None:
    """32 clients, two thirds of their requests draw in 20 steps, some leave: nothing is lost, doubled or mixed up."""
    output = tmp_path / "load.json"
    command = [sys.executable, ROOT / "benchmarks" / "serving.py", "--model", "small", "--device", "cpu", "--clients",
               "32", "--seconds", "60", "--jobs", "6", "--steps", "20", "--tokens", "24", "--port", str(free_port()),
               "--output", output]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())["results"]["load"]
    assert found["wrong"] == 0
    assert found["answers"] >= 20
    assert max(found["memory_mib"]) < 2 * min(found["memory_mib"][1:])
