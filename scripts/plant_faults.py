"""Plant small faults one at a time and tell whether the tests that should catch them do.

python scripts/plant_faults.py                        # all of tests/faults.toml; some minutes
python scripts/plant_faults.py --only mask-sign       # some of them
python scripts/plant_faults.py --core                 # those in the code that is rewritten most

A fault is planted in a copy of the tree, never in place. The exit status is 0 if all are caught. It is 1 if one is
missed, if a patch no longer applies, or if its tests cannot run.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAULTS = ROOT / "tests" / "faults.toml"
TREE = ("src", "tests", "configs", "examples", "scripts", "benchmarks", "docs", "README.md", "pyproject.toml")
FAILED = 1  # pytest's exit status when tests ran and failed; others mean that they could not run


@dataclass(frozen=True)
class Fault:
    """One entry of `tests/faults.toml`, which says what the fields mean."""

    name: str
    file: str
    old: str
    new: str
    why: str
    tests: list[str]
    core: bool = False

    def planted(self, content: str) -> str:
        """The content of its file with the fault in it.

        Raises:
            ValueError: the old text does not occur exactly once.
        """
        found = content.count(self.old)
        if found != 1:
            raise ValueError(f"{self.name}: its text occurs {found} times in {self.file}; mend it in tests/faults.toml")
        return content.replace(self.old, self.new)


def load_faults(path: Path = FAULTS) -> list[Fault]:
    """All faults of the table."""
    return [Fault(**entry) for entry in tomllib.loads(path.read_text(encoding="utf-8"))["fault"]]


def run_tests(tree: Path, tests: list[str], before: list[str]) -> tuple[int, str]:
    """Pytest's exit status, and the first test that failed or the last line that was printed."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*before, sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
        cwd=tree, env=environment, text=True, capture_output=True, check=False,
    )  # fmt: skip
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    lines = (done.stdout + done.stderr).strip().splitlines() or ["nothing was printed"]
    return done.returncode, failed[1] if failed else lines[-1]


def plant(tree: Path, fault: Fault, before: list[str]) -> tuple[str, str]:
    """What came of a fault: `caught`, `missed` or `broken`; and by which test, or why."""
    path = tree / "src" / "mm_interleaved" / fault.file
    content = path.read_text(encoding="utf-8")
    try:
        path.write_text(fault.planted(content), encoding="utf-8")
        status, words = run_tests(tree, fault.tests, before)
    except ValueError as error:
        return "broken", str(error)
    finally:
        path.write_text(content, encoding="utf-8")
    return {0: "missed", FAILED: "caught"}.get(status, "broken"), words


def main() -> int:
    """Plant, report, and tell by the exit status whether all were caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--core", action="store_true", help="only those marked core")
    parser.add_argument("--before", default="", help="command that each test run is started by, as 'nice'")
    parser.add_argument("--without-baseline", action="store_true", help="do not run the tests without a fault first")
    options = parser.parse_args()
    faults = load_faults()
    if unknown := set(options.only) - {fault.name for fault in faults}:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    chosen = [f for f in faults if (not options.only or f.name in options.only) and (f.core or not options.core)]
    before, found = shlex.split(options.before), []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in TREE:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, tree / name)
        if not options.without_baseline:
            tests = sorted({test for fault in chosen for test in fault.tests})
            status, words = run_tests(tree, tests, before)
            if status:
                print(f"the tests fail without a fault: {words}")
                return 1
        for fault in chosen:
            begin = time.perf_counter()
            result, words = plant(tree, fault, before)
            found.append(result)
            print(f"{result:7} {fault.name:36} {time.perf_counter() - begin:5.0f} s  {words}", flush=True)
    print(f"{found.count('caught')} of {len(found)} caught")
    return 0 if set(found) <= {"caught"} else 1


if __name__ == "__main__":
    sys.exit(main())
