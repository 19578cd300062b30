"""`mmi bench`: every line runs, what fails is told and the rest goes on, results can be set beside each other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mm_interleaved.bench import LINES, Bench, Row, run
from mm_interleaved.bench.base import SIZES

QUICK = ("bench", "--preset", "debug", "--device", "cpu")


@pytest.mark.slow
def test_lines_files_and_comparison(mmi, tmp_path: Path) -> None:
    file = tmp_path / "a" / "debug.json"
    outcome = mmi(*QUICK, "--only", "decode,session,layer-by-images", "--output", file)
    assert outcome.code == 0, outcome.err
    result = json.loads(file.read_text())
    assert {row["line"] for row in result["rows"]} == {"decode", "session", "layer-by-images"}
    assert {"date", "command", "processor", "versions", "bytes_per_second", "operations_per_second"} <= result.keys()
    for row in result["rows"]:
        assert row["value"] > 0
        assert row["bound"] > 0
        assert row["of_bound"] == pytest.approx(row["bound"] / row["value"])
    assert all(row["note"] == "same document" for row in result["rows"] if row["line"] == "session")
    assert "| decode | 60 tokens, 2 images |" in file.with_suffix(".md").read_text()
    assert {p.name for p in file.parent.glob("*.png")} == {"debug-session.png", "debug-layer-by-images.png"}
    compared = mmi("bench", "--compare", file, file)
    assert "decode" in compared.out
    assert "1.00" in compared.out


@pytest.mark.slow
def test_requests_as_a_server_and_an_evaluation_send_them(mmi, tmp_path: Path) -> None:
    outcome = mmi(*QUICK, "--only", "first-token,two-sessions,evaluation", "--output", tmp_path / "r.json")
    assert outcome.code == 0, outcome.err
    rows = {row["line"]: row for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert rows["first-token"]["case"] == "60 tokens, 2 images"
    assert rows["first-token"]["value"] > rows["first-token"]["bound"] > 0
    assert rows["two-sessions"]["reference"] > 0
    assert rows["evaluation"]["case"] == "batch of 3, 5 beams, 20 tokens"
    assert all(row["reserved_bytes"] is None for row in rows.values())  # measured on a GPU only


@pytest.mark.gpu
def test_the_memory_that_a_row_holds() -> None:
    bench = Bench("debug", torch.device("cuda"), torch.float32, SIZES["debug"])
    (row,) = run.run_lines(bench, ["first-token"])
    weights = sum(p.numel() * p.element_size() for p in bench.model.parameters())
    assert row.reserved_bytes > weights + row.peak_bytes // 2


def test_a_failing_line_does_not_stop_the_others(mmi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(bench: Bench) -> Iterator[Row]:
        yield Row("decode", "before it breaks", "ms", 1.0)
        raise RuntimeError("no kernel for this")

    monkeypatch.setitem(run.LINES, "decode", broken)
    outcome = mmi(*QUICK, "--only", "decode,encode", "--output", tmp_path / "x.json")
    assert outcome.code == 2
    assert "decode: RuntimeError: no kernel for this" in outcome.err
    result = json.loads((tmp_path / "x.json").read_text())
    assert [row["line"] for row in result["rows"]] == ["decode", "encode", "encode"]
    assert result["trouble"][0]["line"] == "decode"


def test_the_time_limit(mmi) -> None:
    outcome = mmi(*QUICK, "--only", "encode,decode", "--time-limit", "0")
    assert outcome.code == 2
    assert "encode: the time limit of 0 s was reached" in outcome.err
    assert "ms/token" not in outcome.out


@pytest.mark.slow
def test_a_session_ends_where_the_context_does() -> None:
    said: list[str] = []
    sizes = replace(SIZES["debug"], rounds=4, round_tokens=200, reference_rounds=0, steps=1)
    bench = Bench("debug", torch.device("cpu"), torch.float32, sizes, say=said.append)
    limit = bench.model.config.text_config.max_position_embeddings
    rows = list(LINES["session"](bench))
    assert 1 <= len(rows) == limit // (200 + 1 + bench.model.config.num_image_tokens) < 4
    assert f"{limit} tokens, all that the model reads, are full after {len(rows)} rounds" in said[-1]


def test_kernel_lines_need_a_gpu(mmi) -> None:
    outcome = mmi(*QUICK, "--only", "products")
    assert "products: ValueError: the kernels are for CUDA devices" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bench", "--only", "decoding"), "there is no line 'decoding'; there are decode, image,"),
        (("bench", "--preset", "huge"), "--preset must be one of release, small, debug, not 'huge'"),
        (("bench", "--dtype", "int8", "--device", "cpu"), "--dtype must be one of"),
        (("bench", "--quantization", "int3", "--device", "cpu"), "--quantization must be one of int8, fp8, int4, nf4"),
        (("bench", "--compare", "nowhere.json", "nowhere.json"), "'nowhere.json' cannot be compared"),
    ],
)
def test_messages(mmi, arguments: tuple[str, ...], words: str) -> None:
    outcome = mmi(*arguments)
    assert outcome.code == 1
    assert words in outcome.err


def test_every_line_says_what_it_measures() -> None:
    assert all(line.__doc__ for line in LINES.values())
