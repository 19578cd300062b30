"""Rules of the house that a machine can check."""

from __future__ import annotations

import ast
import re
import tokenize
from collections import Counter
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "mm_interleaved"
ROOMS = [
    "io", "launch", "validation", "plugins", "configuration", "document", "ops", "model", "processor", "checkpoints",
    "adapters", "generation", "metrics", "tasks", "data", "pretrained", "pipeline", "batch", "evaluation", "training",
    "planning", "inspection", "serving", "bench", "integrations", "cli", "auto", "__main__",
]  # fmt: skip
FILES = sorted(SOURCE.rglob("*.py"))
FSTRING = [getattr(tokenize, name) for name in ("FSTRING_MIDDLE",) if hasattr(tokenize, name)]  # Python 3.12


def room(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def imported(path: Path) -> list[tuple[str, ...]]:
    """Modules of this package that a file imports, without the package's name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.relative_to(SOURCE).parts[: -node.level]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(*base, *name.split(".")) for name in names]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            found += [tuple(n.split(".")[1:]) for n in names if n.split(".")[0] == "mm_interleaved"]
    return found


def test_every_file_is_in_a_room() -> None:
    assert {room(p.relative_to(SOURCE).parts) for p in FILES} == {*ROOMS, "__init__"}


def test_imports_point_down() -> None:
    offenders = [
        f"{path.relative_to(SOURCE)} imports {'.'.join(module)}"
        for path in FILES
        if path != SOURCE / "__init__.py"
        for module in imported(path)
        if module
        and module != ("__version__",)
        and ROOMS.index(room(module)) > ROOMS.index(room(path.relative_to(SOURCE).parts))
    ]
    assert not offenders


def test_there_is_one_kv_cache_and_one_decoder_layer() -> None:
    """Queries of the language model are projected in one place, and generation makes no cache of the library."""
    layer = (SOURCE / "model" / "decoder_layer.py").read_text()
    assert layer.count("self.q_proj") == 2  # where it is taken over from the library, and where it is called
    calls = [p for p in FILES if "q_proj" in p.read_text() and room(p.relative_to(SOURCE).parts) != "bench"]
    assert [p.name for p in calls] == ["decoder_layer.py", "resampler.py"]  # the latter's is another attention's
    assert not [p for p in FILES if p.parent.name == "generation" and re.search(r"Dynamic(Cache|Layer)", p.read_text())]


# Where every request of a server gets an answer whatever happened; the error is logged.
BOUNDARIES = {"serving/model.py": 2, "serving/responses.py": 1, "serving/streaming.py": 1}


def test_nothing_catches_everything() -> None:
    offenders = [
        str(path.relative_to(SOURCE))
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException"))
    ]
    assert Counter(offenders) == BOUNDARIES


def test_documents_know_no_torch() -> None:
    for path in (SOURCE / "document").glob("*.py"):
        assert not re.search(r"^(import|from) torch", path.read_text(), re.MULTILINE)


def pins(lock: Path) -> dict[str, str]:
    """The versions of a lock file by name."""
    lines = [line.partition(";")[0].strip() for line in lock.read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", line)], lock.name
    return {re.split("==", line)[0].lower().replace("_", "-"): re.split("==", line)[1] for line in lines}


def test_the_lock_files_pin_versions_and_nothing_else() -> None:
    locks = {path.name: pins(path) for path in ROOT.glob("requirements*.lock")}
    assert locks.keys() >= {
        f"requirements{kind}.lock" for kind in ("", "-test", "-tools", "-lowest", "-browser", "-docs")
    }
    names = locks["requirements.lock"].keys()
    project = (ROOT / "pyproject.toml").read_text()
    wanted = re.findall(r'^    "([a-z0-9_-]+)>=', project, re.MULTILINE)
    assert wanted
    assert {w.replace("_", "-") for w in wanted} <= names


def test_the_lowest_versions_are_the_bounds() -> None:
    """Of everything that is imported; torch 2.11 runs on GPUs, where there is no 2.13 yet."""
    lowest = pins(ROOT / "requirements-lowest.lock")
    project = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[0]
    bounds = dict(re.findall(r'^    "([a-z0-9_-]+)>=([0-9.]+)', project, re.MULTILINE))
    apart = {
        name: (bound, lowest.get(name.replace("_", "-")))
        for name, bound in bounds.items()
        if not re.match(rf"{re.escape(bound)}(\.|$)", lowest.get(name.replace("_", "-"), ""))
    }
    assert apart == {"torch": ("2.11", "2.13.0")}


def test_hooks_run_the_tools_of_the_lock_files() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    programs = {hook["entry"].split()[0] for hook in repository["hooks"] if hook["language"] == "system"}
    assert programs == {f".venv/bin/{name}" for name in ("ruff", "basedpyright", "check-added-large-files")}


def test_the_toy_world_is_a_plugin() -> None:
    """It imports this package, which imports it nowhere and names none of its modules, in strings neither."""
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
            found += [f"{path.relative_to(SOURCE)}:{node.lineno}" for name in names if "toyworld" in name]
    assert not found


def test_the_page_of_the_code_has_every_package_and_no_file_that_is_gone() -> None:
    """And every module of the packages whose files it describes one by one."""
    page = (ROOT / "docs" / "internals" / "code.md").read_text()
    packages = [path.parent.name for path in SOURCE.glob("*/__init__.py")]
    assert [name for name in packages if f"`{name}/`" not in page] == []
    known = {path.name for folder in ("src", "tests", "scripts") for path in (ROOT / folder).rglob("*.py")}
    assert [name for name in re.findall(r"`(?:[\w/]+/)?(\w+\.py)`", page) if name not in known] == []
    described = [path for name in ("model", "generation", "serving", "checkpoints", "batch")
                 for path in (SOURCE / name).glob("*.py") if path.name != "__init__.py"]  # fmt: skip
    assert [str(path.relative_to(SOURCE)) for path in described if f"{path.name}`" not in page] == []


# Words that this package used in senses of its own, and the plain ones (docs/internals/code.md, "Language"). A pattern
# is here only if a regular expression can tell the sense. The toy world is not checked.
FORMER = {
    r"\b[Pp]ictures?\b|_pictures?\b|\bpictures?_": "image",
    r"\beyes\b|\beyes_of\b|\bStaticEyes\b": "image encoder, encode_images",
    r"\bStaticDecoder\b|\brecorded (graph|step)s?\b": "CUDA graph, captured",
    r"\b_look\b|\b_say\b": "encode_images, compute_logits",
    r"\bremember\w*\b": "image features, MMFS values",
    r"\b[Tt]wins?\b": "reference implementation",
    r"\b[Tt]old\b": "conditioning tokens, or the subject of the sentence",
    r"\bdrawings?\b|\b[Dd]rawn (images?|slots?)\b": "generated image",
    r"\bKeptConditions\b|\bForceTogether\b": "ConditionDistillation, ForceAllBranches",
    r"\b(Feed|Served|Housekeeping|DataKeeper)\b": "BatchPipeline, BatchStats, TrainingLoopCallback, DataReportCallback",
    r"\b_?folded\w*|\bFoldOnce\b|\bfolding\.py\b": "cached derived weights",
    r"\btakes? leave\b": "destroy the process group",
    r"\b(Scored|Made|Ready|Prepared|Together)\b(?=[\[(:])": "name the record by what it holds",
    r"\b(can|to|would) mend\b": "correct, fix",
}
FORMER_EXCEPT = {
    ("training/config.py", "pictures"),  # former settings, which error messages name
    ("data/config.py", "_pictures"),
}


def words_of(path: Path) -> list[tuple[int, str]]:
    """(line, text) of the names, comments and docstrings of a file, and of its messages."""
    with path.open("rb") as stream:
        kinds = (tokenize.NAME, tokenize.COMMENT, tokenize.STRING, *FSTRING)
        return [(token.start[0], token.string) for token in tokenize.tokenize(stream.readline) if token.type in kinds]


def test_no_word_of_the_former_dialect_is_left() -> None:
    found = [
        f"{path.relative_to(SOURCE)}:{line}: '{match[0]}' (say: {instead})"
        for path in FILES
        for line, text in words_of(path)
        for pattern, instead in FORMER.items()
        for match in re.finditer(pattern, text)
        if (str(path.relative_to(SOURCE)), match[0]) not in FORMER_EXCEPT
    ]
    assert not found, "\n".join(found)


def test_modules_of_tensors_name_their_axes() -> None:
    """One letter for an axis, with a legend at the top of each module whose docstrings have shapes."""
    shape = re.compile(r"\[[A-Z], [A-Za-z0-9, ]+\]")
    lacking = [
        str(path.relative_to(SOURCE))
        for package in ("model", "ops", "generation")
        for path in sorted((SOURCE / package).glob("*.py"))
        if shape.search(text := path.read_text()) and "Axes:" not in (ast.get_docstring(ast.parse(text)) or "")
    ]
    assert not lacking
