"""What MkDocs does not do by itself for this site: pages from the code, links out of `docs/`, and checks of the result.

- `reference/commands.md` and `reference/configuration.md` get their sections from `scripts/describe_interface.py`.
  It runs in the environment of the package; `$MMI_PYTHON` names its interpreter (default: `.venv/bin/python`).
- `reference/api/` has a page for each package, with every public name. Docstrings are read, nothing is imported.
- A link of a page to a file outside of `docs/` is right on a code host. On the site the file lies in `repository/`.
- The built pages may not request anything from other hosts. Links to them are listed in `external_links.txt`.
"""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
from functools import cache
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = get_plugin_logger("site")
ROOT = Path(__file__).parents[2]
HOME = "README.md"
OUTSIDE = "repository"  # where files from outside of docs/ lie on the site
GENERATED = {"reference/commands.md": "commands", "reference/configuration.md": "settings"}
API = "reference/api.md"
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)

# The public modules, from what most users need to what few do. A package has the names of its `__all__`; a module
# without one has its public functions and classes.
MODULES = (
    "document", "generation", "pipeline", "pretrained", "processor", "model", "model.cost", "adapters.loading",
    "adapters.settings", "checkpoints.quantization", "data", "data.config", "data.sources", "data.shards",
    "training.run", "training.config", "tasks", "tasks.files", "metrics", "evaluation", "evaluation.scoring",
    "inspection", "planning.plan", "planning.step", "planning.work", "batch.records", "batch.shared", "serving.app",
    "serving.config", "integrations.ray_data", "integrations.ray_serve", "integrations.lmms_eval", "bench", "ops",
    "plugins", "configuration", "validation", "io",
)  # fmt: skip


# ---- files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the Python API, and the files and folders that pages link to and that are no pages."""
    for name in packages():
        files.append(File.generated(config, f"reference/api/{name}.md", content=_api_page(name)))
    waiting = [(f.src_uri, Path(f.abs_src_path).read_text()) for f in files.documentation_pages() if f.abs_src_path]
    while waiting:
        for place in _linked(*waiting.pop()):
            path, name = ROOT / place, _on_site(place)
            if name in files.src_uris:
                continue
            if path.is_dir():
                content = "\n".join([f"# {place}", "", *(f"- [{p}]({p})" for p in _shown(path)), ""])
            else:
                content = path.read_text() if path.suffix == ".md" else None
            if content is None:
                files.append(File.generated(config, name, abs_src_path=str(path)))
            else:
                files.append(File.generated(config, name, content=content))
                waiting.append((name, content))
    return files


def _shown(folder: Path) -> list[Path]:
    """The files of a folder, relative to it."""
    found = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [path for path in found if "__pycache__" not in path.parts]


def _linked(page: str, text: str) -> list[str]:
    """The files and folders that a page links to, from the repository's root."""
    targets = [target for _, target, _ in LINK.findall(FENCE.sub("", text)) if not urlsplit(target).scheme]
    return [place for place in (_target(page, target) for target in targets) if (ROOT / place).exists()]


def _target(page: str, target: str) -> str:
    """Where a link of a page leads, from the repository's root."""
    origin = page.removeprefix(f"{OUTSIDE}/") if page.startswith(f"{OUTSIDE}/") else f"docs/{page}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))


def _on_site(place: str) -> str:
    """Where a file or folder of the repository lies on the site; a folder is a page that lists its files."""
    name = place.removeprefix("docs/") if place.startswith("docs/") else f"{OUTSIDE}/{place}"
    return f"{name}/README.md" if (ROOT / place).is_dir() else name


# ---- pages


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Complete generated pages, and let links to files outside of `docs/` lead to their copies."""
    name = page.file.src_uri
    if name == HOME:
        page.meta.update(template="home.html", hide=["navigation", "toc"])
    if name.endswith("dev/log.md"):
        page.meta["search"] = {"exclude": True}  # it has every word, and would come before the page that answers
    if name in GENERATED:
        markdown += "\n" + _described(GENERATED[name])
    if name == API:
        markdown += "\n" + _api_index()
    return "".join(
        part if part[:3] == "```" else LINK.sub(lambda m: _relinked(m, name), part) for part in FENCE.split(markdown)
    )


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Warn of lists that a code host shows and this site does not."""
    for found in re.findall(r"<p>(?:(?!</p>).)*?\n([-*] [^\n]*)", html, re.DOTALL):
        log.warning("%s: a list needs an empty line before it: %s", page.file.src_uri, found)
    return html


def _relinked(match: re.Match[str], page: str) -> str:
    before, target, rest = match.groups()
    if urlsplit(target).scheme:
        return match[0]
    place = _target(page, target)
    if not (ROOT / place).exists():  # a generated page, or a mistake, which MkDocs reports
        return match[0]
    return f"{before}{posixpath.relpath(_on_site(place), posixpath.dirname(page) or '.')}{rest}"


@cache
def _described(what: str) -> str:
    python = os.environ.get("MMI_PYTHON", str(ROOT / ".venv/bin/python"))
    command = [python, str(ROOT / "scripts/describe_interface.py"), what]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise PluginError(f"{' '.join(command)} failed; is the package installed there (make demo)?\n{ran.stderr}")
    return ran.stdout


# ---- the Python API


@cache
def _package() -> griffe.Module:
    loader = griffe.GriffeLoader(search_paths=[ROOT / "src"])
    package = loader.load("mm_interleaved")
    loader.resolve_aliases(external=False)
    assert isinstance(package, griffe.Module)
    return package


@cache
def packages() -> tuple[str, ...]:
    """The packages and modules of `MODULES`, one page each."""
    return tuple(dict.fromkeys(name.partition(".")[0] for name in MODULES))


def public_names(module: str) -> list[str]:
    """The public names of a module: its `__all__`, else its functions and classes without an underscore.

    Args:
        module: its name in `mm_interleaved`; "": the package itself.
    """
    found = _package()[module] if module else _package()
    if found.exports is not None:
        return [str(name) for name in found.exports]
    return [
        name for name, member in found.members.items()
        if not name.startswith("_") and not member.is_alias and (member.is_function or member.is_class)
    ]  # fmt: skip


def _api_page(package: str) -> str:
    lines = [f"# mm_interleaved.{package}", "", "[All modules](../api.md)", ""]
    for module in (name for name in MODULES if name.partition(".")[0] == package):
        names = public_names(module)
        if not names:
            raise PluginError(f"{module} has no public name; take it out of MODULES")
        if module != package:
            lines += [f"## mm_interleaved.{module} {{ #{module.replace('.', '-')} }}", ""]
        lines += [
            f"::: mm_interleaved.{module}",
            "    options: {members: false, show_root_heading: false, show_root_toc_entry: false}",
            "",
        ]
        for name in names:
            level = 2 if module == package else 3
            lines += [f"::: mm_interleaved.{module}.{name}", f"    options: {{heading_level: {level}}}", ""]
    return "\n".join(lines)


def _api_index() -> str:
    """The names of the package itself, then its modules."""
    lines = ["## mm_interleaved", "", "| name | |", "|---|---|"]
    for name in public_names(""):
        lines.append(f"| [`{name}`][mm_interleaved.{name}] | {_summary(_package()[name])} |")
    lines += ["", "## Modules", "", "| module | |", "|---|---|"]
    lines += [f"| [`mm_interleaved.{name}`](api/{name}.md) | {_summary(_package()[name])} |" for name in packages()]
    return "\n".join(lines) + "\n"


def _summary(member: griffe.Object | griffe.Alias) -> str:
    doc = member.docstring.value if member.docstring is not None else ""
    return " ".join(doc.partition("\n\n")[0].split()).replace("|", "\\|")


# ---- checks of the result

_HOST = r"""["']?(?:https?:)?//[^"'> )]+"""
_REQUESTS = re.compile(
    rf"<(?:script|img|iframe|source|video)\b[^>]*?\bsrc={_HOST}|<link\b[^>]*?\bhref={_HOST}|url\({_HOST}"
)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse pages that make browsers load something from another host; list the links that lead to others."""
    site = Path(config.site_dir)
    links: dict[str, set[str]] = {}
    for path in sorted([*site.rglob("*.html"), *site.rglob("*.css")]):
        text = path.read_text()
        name = str(PurePosixPath(path.relative_to(site)))
        if found := _REQUESTS.findall(text):
            raise PluginError(f"{name} loads from another host: {found[0]}")
        if 'class="mermaid"' in text:  # the theme would load a script from another host for it
            raise PluginError(f"{name} has a Mermaid diagram; commit an SVG instead")
        for link in re.findall(r'<a\b[^>]*?\bhref="([a-z]+:[^"]*)"', text):
            links.setdefault(link, set()).add(name)
    for link, pages in links.items():
        parts = urlsplit(link)
        here = parts.hostname == "127.0.0.1"  # the reader's own server
        whole = not re.search(r"[\s<>{}|\\^`]", link)
        if not (whole and (here or (parts.scheme == "https" and "." in (parts.hostname or "")))):
            raise PluginError(f"'{link}' in {', '.join(sorted(pages))} is not an https address of another host")
    lines = [f"{link}\t{' '.join(sorted(pages))}\n" for link, pages in sorted(links.items())]
    (site / "external_links.txt").write_text("".join(lines))
