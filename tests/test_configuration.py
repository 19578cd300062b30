"""Configuration files: reading, overriding, extending, refusing."""

from __future__ import annotations

import re
from dataclasses import field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from mm_interleaved.configuration import load_config, to_yaml
from mm_interleaved.validation import ConfigError, Positive, settings


@settings
class Source:
    type: str = "documents"
    weight: float = 1.0
    files: list[str] = field(default_factory=list)


@settings
class Optimizer:
    lr: float = 1e-3
    steps: Positive = 10
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.steps == 13:
            raise ValueError("13 steps bring bad luck")


@settings
class Schema:
    name: str
    optimizer: Optimizer = field(default_factory=Optimizer)
    sources: list[Source] = field(default_factory=list)
    extra: Optimizer | None = None
    fast: bool = False
    weights: dict[str, float] = field(default_factory=dict)
    mode: Literal["read", "write"] = "read"
    betas: Annotated[list[float], Field(min_length=2, max_length=3)] = field(default_factory=lambda: [0.9, 0.99])
    RENAMED: ClassVar[dict[str, str]] = {"streams": "It is now 'sources'", "scribble": "It is now 'write'"}


@settings
class Weights:
    source: Annotated[str, Field(alias="from")]


@settings
class Model:
    weights: list[Weights]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(
        tmp_path / "a.yaml",
        "name: run\noptimizer: {lr: 1e-4}\nsources:\n- {type: mmc4, files: [a, b]}\n- {weight: 2}\nweights: {x: 1}\n",
    )


def test_a_file_becomes_the_dataclass(file: Path) -> None:
    config = load_config(file, Schema)
    assert config == Schema(
        "run", Optimizer(lr=1e-4), [Source("mmc4", files=["a", "b"]), Source(weight=2.0)], weights={"x": 1.0}
    )
    assert isinstance(config.sources[0], Source)


def test_overrides_win_in_order(file: Path) -> None:
    overrides = ["optimizer.lr=0.5", "optimizer.lr=1e-2", "sources.0.type=pairs", "sources[1].weight=3",
                 "extra.steps=4", "fast=true", "sources.0.files=[c]", "optimizer.clip=1.0", "weights.y=2"]  # fmt: skip
    config = load_config(file, Schema, overrides)
    assert config.optimizer == Optimizer(lr=0.01, clip=1.0)
    assert (config.sources[0].type, config.sources[0].files, config.sources[1].weight) == ("pairs", ["c"], 3.0)
    assert config.extra == Optimizer(steps=4)
    assert config.fast is True
    assert config.weights == {"x": 1.0, "y": 2.0}
    assert load_config(file, Schema, ["optimizer.clip=1", "optimizer.clip="]).optimizer.clip is None


TEXTS = st.text(st.characters(codec="ascii", exclude_characters="$\\", categories=("L", "N", "P", "Zs")), max_size=20)
OPTIMIZERS = st.builds(Optimizer, st.floats(1e-9, 1e9), st.integers(1, 12), st.none() | st.floats(0, 1))
SOURCES = st.builds(Source, files=st.lists(st.sampled_from(["null", "1", "é", "a: b"]), max_size=2))


@given(
    st.builds(
        Schema,
        name=TEXTS.filter(lambda s: s != "???"),
        optimizer=OPTIMIZERS,
        sources=st.lists(SOURCES, max_size=2),
        extra=st.none() | OPTIMIZERS,
        fast=st.booleans(),
        weights=st.dictionaries(st.sampled_from(["a", "b.c"]), st.floats(0, 1)),
    )
)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, config: Schema) -> None:
    path = tmp_path_factory.mktemp("yaml") / "b.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path, Schema) == config


def test_a_field_has_the_name_of_files(tmp_path: Path) -> None:
    """`from` is no name in Python."""
    path = write(tmp_path / "a.yaml", to_yaml(Model([Weights("x"), Weights(source="y")])))
    assert "from: x" in path.read_text()
    assert load_config(path, Model, ["weights.1.from=z"]) == Model([Weights("x"), Weights("z")])
    with pytest.raises(ConfigError, match=r"unknown key 'form' in weights\[0\] .*Did you mean 'from'"):
        load_config(path, Model, ["weights=[{form: x}]"])
    with pytest.raises(ConfigError, match=r"^weights\[0\]\.from must be given"):
        load_config(path, Model, ["weights=[{}]"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nsorces: []", "unknown key 'sorces' ({file}). Did you mean 'sources'?"),
        ("name: a\nstreams: []", "unknown key 'streams' ({file}). It is now 'sources'"),
        ("name: a\noptimizer: {ler: 1}", "unknown key 'ler' in optimizer ({file}). Did you mean 'lr'?"),
        ("name: a\nsources: [{}, {typ: x}]", "unknown key 'typ' in sources[1] ({file}). Did you mean 'type'?"),
        ("name: a\nextra: {qqqqq: 1}", "unknown key 'qqqqq' in extra ({file}). Known: lr, steps, clip"),
        ("name: a\noptimizer: {steps: soon}", "optimizer.steps must be a whole number, not 'soon' ({file})"),
        ("name: a\noptimizer: {steps: true}", "optimizer.steps must be a whole number, not true ({file})"),
        ("name: a\noptimizer: {steps: null}", "optimizer.steps must be a whole number, not null ({file})"),
        ("name: a\nbetas: []", "betas must have at least 2 items, not 0 ({file})"),
        ("name: a\nbetas: [1, 2, 3, 4]", "betas must have at most 3 items, not 4 ({file})"),
        ("name: a\noptimizer: {steps: 2.5}", "optimizer.steps must be a whole number, not 2.5 ({file})"),
        ("name: a\noptimizer: 3", "optimizer must be a mapping, not 3 ({file})"),
        ("name: a\nsources: [{weight: heavy}]", "sources[0].weight must be a number, not 'heavy' ({file})"),
        ("name: a\nsources: {type: a}", "sources must be a list, not {'type': 'a'} ({file})"),
        ("name: a\nfast: 7.5", "fast must be true or false, not 7.5 ({file})"),
        ("name: a\nmode: wriet", "mode must be 'read' or 'write', not 'wriet' ({file}). Did you mean 'write'?"),
        ("name: a\nmode: scribble", "mode must be 'read' or 'write', not 'scribble' ({file}). It is now 'write'"),
        ("name: a\noptimizer: {steps: 0}", "optimizer.steps must be at least 1, not 0 ({file})"),
        ("name: a\noptimizer: {steps: 13}", "13 steps bring bad luck (optimizer in {file})"),
        ("name: a\noptimizer: {steps: x, stops: 3}", "unknown key 'stops' in optimizer"),
        ("fast: true", "name must be given ({file})"),
        ("name: a\nfast: ???", "fast must be given ({file}). Add fast=VALUE"),
        ("", "the file is empty"),
        ("# nothing\n", "the file is empty"),
        ("- a\n- b\n", "must be a mapping of keys to values"),
        ("hello", "unknown key 'hello'"),
        ("name: a\nfast: [1, 2\nx: 3", "not YAML"),
        ("name: a\nname: b", "line 2, column 1: not YAML: found duplicate key name"),
        ("name: ${nowhere}", "Interpolation key 'nowhere' not found (name in {file})"),
        ("name: a\noptimizer: {lr: '${nowhere}'}", "'nowhere' not found (optimizer.lr in {file})"),
        ("name: ${oc.shell:ls}", "oc.shell"),
        ("name: !!python/object/apply:os.system [ls]", "not YAML"),
    ],
)
def test_bad_files_are_explained(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "bad.yaml", text)
    with pytest.raises(ConfigError, match=re.escape(message.replace("{file}", str(path)))) as raised:
        load_config(path, Schema)
    assert str(path) in str(raised.value)


def test_invalid_yaml_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.yaml", "name: a\noptimizer:\n  lr: 1\n steps: 2\n")
    with pytest.raises(ConfigError, match="line 4"):
        load_config(path, Schema)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'none.yaml'}: No such file")):
        load_config(tmp_path / "none.yaml", Schema)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fast", "must have the form key=value"),
        ("=3", "must have the form key=value"),
        ("a b=3", "must have the form key=value"),
        ("optimizer.lr=[1", "not YAML"),
        ("optimizer.lrr=1", "unknown key 'lrr' in optimizer ({o}). Did you mean 'lr'?"),
        ("sources.0.wieght=1", "unknown key 'wieght' in sources[0] ({o}). Did you mean 'weight'?"),
        ("sources.7.weight=1", "there is no such list item"),
        ("sources.first.weight=1", "there is no such list item"),
        (".name=3", "must have the form key=value"),
        ("optimizer..lr=3", "must have the form key=value"),
        ("optimizer=[1]", "gives a list in place of a mapping"),
        ("name.first=3", "name must be a string, not {'first': 3} ({file} with {o})"),
        ("optimizer.steps=13", "13 steps bring bad luck (optimizer in {o})"),
        ("name=${nowhere}", "'nowhere' not found (name in {o})"),
        ("optimizer.lr=fast", "optimizer.lr must be a number, not 'fast' ({o})"),
        ("optimizer={lr: 1, stops: 2}", "unknown key 'stops' in optimizer ({o}). Did you mean 'steps'?"),
    ],
)
def test_bad_overrides_are_explained(file: Path, override: str, message: str) -> None:
    message = message.replace("{o}", f"override '{override}'").replace("{file}", str(file))
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        load_config(file, Schema, [override])
    assert f"override '{override}'" in str(raised.value)


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_numbers_are_finite(file: Path, tmp_path: Path, value: str) -> None:
    override = f"optimizer.lr={value}"
    with pytest.raises(ConfigError, match=r"optimizer.lr must be a finite number, not .* \(override 'optimizer.lr="):
        load_config(file, Schema, [override])
    other = tmp_path / "other.yaml"
    other.write_text(f"name: x\nsources:\n- {{type: documents, weight: {value}}}\n")
    with pytest.raises(ConfigError, match=r"sources\[0\]\.weight must be a finite number, not .*other\.yaml"):
        load_config(other, Schema)


def test_extends_merges_mappings_and_replaces_lists(file: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    child = write(tmp_path / "sub" / "b.yaml", "extends: ../a.yaml\noptimizer: {steps: 5}\nsources: [{type: pairs}]\n")
    config = load_config(child, Schema)
    assert config.optimizer == Optimizer(1e-4, 5)
    assert [s.type for s in config.sources] == ["pairs"]
    assert config.name == "run"
    several = write(tmp_path / "c.yaml", "extends: [a.yaml, sub/b.yaml]\nname: c\n")
    assert load_config(several, Schema) == Schema("c", config.optimizer, config.sources, weights={"x": 1.0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: a.yaml\noptimizer: [1, 2]", "optimizer must be a mapping, not [1, 2] ({file})"),
        ("extends: a.yaml\nsources: {a: 1}", "sources must be a list, not {'a': 1} ({file})"),
        ("extends: 3", "extends must be the path of a file or a list of them, not 3 ({file})"),
        ("extends: {a: b}", "extends must be the path of a file or a list of them, not {'a': 'b'} ({file})"),
        ("extends: [a.yaml, 3]", "extends must be the path of a file or a list of them, not ['a.yaml', 3] ({file})"),
    ],
)
def test_files_that_cannot_extend_others(file: Path, text: str, message: str) -> None:
    path = write(file.with_name("b.yaml"), text)
    with pytest.raises(ConfigError, match=re.escape(message.replace("{file}", str(path)))):
        load_config(path, Schema)


def test_a_part_of_a_larger_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "name: a\nother: {x: 1}\n")
    assert load_config(path, Schema, ["other.x=2", "another[0]=3", "fast=true"], partial=True) == Schema("a", fast=True)
    with pytest.raises(ConfigError, match="unknown key 'rl' in optimizer"):
        load_config(path, Schema, ["optimizer.rl=2"], partial=True)


def test_extending_oneself_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "extends: b.yaml\nname: a\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_config(tmp_path / "a.yaml", Schema)


def test_the_environment_is_read_but_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_NAME", "$(touch pwned) ${oc.env:HOME}")
    path = write(
        tmp_path / "a.yaml", "name: ${oc.env:RUN_NAME}\noptimizer: {lr: 2.0}\nextra: {lr: '${optimizer.lr}'}\n"
    )
    config = load_config(path, Schema)
    assert config.name == "$(touch pwned) ${oc.env:HOME}"
    assert config.extra == Optimizer(lr=2.0)
