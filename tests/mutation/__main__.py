"""Break a method on purpose, one change at a time, and see which of its tests fails.

    python tests/mutation sid              at most 40 of the changes of distill/methods/sid.py, a seeded sample
    python tests/mutation sid vsd --all    all changes of two methods
    python tests/mutation sid --only 79    the changes whose name ends with :79:... (or holds the text)
    python tests/mutation sid --list       the changes alone

operators.py makes the changes. A change is in memory: each runs in a process that is forked from one that has imported
the libraries, and nothing of the project, so that its modules import the changed one. The tests are those that name a
class of the file and execute the changed statement, up to BUDGET seconds of them, without the slow ones: first those
that have found another change, then the quickest. They are known from one run with sys.settrace, which is kept in
.pytest_cache until the method or the test changes.

A change that fails a test, cannot be imported or takes over LIMIT seconds of CPU is killed. One that survives must be
in survivors.yaml with its reason; else the exit status is 1.
"""

import argparse
import ast
import contextlib
import fnmatch
import hashlib
import importlib.abc
import importlib.util
import json
import os
import random
import re
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch, which the tests import in forked processes
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import yaml
from operators import Mutant, mutants

ROOT = Path(__file__).resolve().parent.parent.parent
METHODS = ROOT / "distill" / "methods"
CACHE = ROOT / ".pytest_cache" / "mutation"
BUDGET, LIMIT, WALL = 12.0, 20, 240.0  # seconds: of tests, of CPU, of the clock (other processes may slow it down)
SAMPLE = 40
LIBRARIES = "site-packages"
Report = Callable[[object], object]  # sends what a forked process has found


# --- tests ---


def method_files() -> dict[str, Path]:
    """{name: file} of every file of distill/methods that defines something."""
    files = sorted(METHODS.rglob("*.py"))
    return {file.stem: file for file in files if file.name != "__init__.py"}


def class_names(file: Path) -> list[str]:
    return [node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]


def candidate_tests(file: Path) -> list[Path]:
    """The test file of a method, by its name or its class's, and the shared ones that name a class of the file.

    Where there are neither, those of tests/distill/methods that are no other method's, or else all; and where no test
    names a base class, those that name a class of a file that imports it.
    """
    module = module_name(file)
    users = [other for other in method_files().values() if f"from {module} import" in other.read_text()]
    classes_of_users = [name for user in users for name in class_names(user)]
    return tests_with_names(file, class_names(file)) or tests_with_names(file, classes_of_users)


def tests_with_names(file: Path, classes: list[str]) -> list[Path]:
    """`candidate_tests` for these names of classes; none where there are none."""
    module = module_name(file)
    word = re.compile(rf"\b({'|'.join([*classes, re.escape(module)])})\b|methods import .*\b{file.stem}\b")
    methods, *shared = (
        [test for test in sorted((ROOT / room).glob("test_*.py")) if word.search(test.read_text())]
        for room in ("tests/distill/methods", "tests/distill", "tests/golden")
    )
    named = method_files() | {name.lower(): other for other in method_files().values() for name in class_names(other)}
    owner = {test: named.get(test.stem.removeprefix("test_")) for test in methods}
    mine = [test for test in methods if owner[test] == file]
    free = [test for test in methods if owner[test] is None]
    return mine + sum(shared, []) or free or methods


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


@dataclass(eq=False)  # pytest hashes its plugins
class Recorder:
    """Which lines of distill/methods each test executes, and the CPU seconds it takes."""

    tests: dict = field(default_factory=dict)  # id: {"seconds", "passed", "lines": {file: [line]}}
    lines: set = field(default_factory=set)  # of the test, or the fixture, that runs
    fixtures: dict = field(default_factory=dict)  # lines of those that several tests share

    def trace(self, frame, event, arg):
        name = frame.f_code.co_filename
        return self.local if name.startswith(str(METHODS)) else None

    def local(self, frame, event, arg):
        self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self.local

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.lines, self.passed, start = set(), True, time.process_time()
        sys.settrace(self.trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            lines = self.lines.union(*(self.fixtures.get(name, ()) for name in item.fixturenames))
            files = {}
            for name, line in sorted(lines):
                files.setdefault(str(Path(name).relative_to(ROOT)), []).append(line)
            seconds = round(time.process_time() - start, 3)
            self.tests[item.nodeid] = {"seconds": seconds, "passed": self.passed, "lines": files}

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        if fixturedef.scope == "function":
            return (yield)
        outer, self.lines = self.lines, set()
        try:
            return (yield)
        finally:
            self.fixtures[fixturedef.argname], self.lines = self.lines, outer | self.lines

    def pytest_runtest_logreport(self, report):
        self.passed &= report.outcome == "passed"


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def trace_tests(file: Path, tests: list[Path]) -> dict[str, dict]:
    """{id: seconds and lines} of the tests that execute the file, the quickest first. Imports their libraries here."""
    CACHE.mkdir(parents=True, exist_ok=True)
    found, relative = {}, str(file.relative_to(ROOT))
    for test in tests:
        store = CACHE / f"{'.'.join(test.relative_to(ROOT / 'tests').with_suffix('').parts)}.json"
        known = json.loads(store.read_text()) if store.exists() else {}
        key = digest(test)
        if known.get("key") != key or known["files"].get(relative) != digest(file):
            print(f"  tracing {test.relative_to(ROOT)}", flush=True)
            start = time.time()
            known = run_in_fork(partial(record_lines, test), 3600)[0]
            known |= {"key": key, "files": {str(f.relative_to(ROOT)): digest(f) for f in method_files().values()}}
            store.write_text(json.dumps(known))
            print(f"    {len(known['tests'])} tests, {time.time() - start:.0f} s", flush=True)
        import_libraries(known["libraries"])
        found |= {name: row for name, row in known["tests"].items() if relative in row["lines"]}
    if failing := [name for name, row in found.items() if not row["passed"]]:
        print(f"  {len(failing)} tests are left out, for they fail or are skipped without any change: {failing[:3]}")
    rows = sorted(found.items(), key=lambda item: item[1]["seconds"])
    return {name: row | {"lines": row["lines"][relative]} for name, row in rows if row["passed"]}


def record_lines(test: Path, report: Report) -> None:
    recorder = Recorder()
    run_pytest([str(test), "-m", "not slow"], recorder)
    libraries = [name for name, module in sys.modules.items() if LIBRARIES in (getattr(module, "__file__", "") or "")]
    report({"tests": recorder.tests, "libraries": libraries})


def run_pytest(args: list[str], plugin: object) -> int:
    flags = ["-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:terminalreporter"]
    return int(pytest.main([*flags, "-o", "addopts=--strict-markers", f"--rootdir={ROOT}", *args], plugins=[plugin]))


# --- changes ---


class MutantImporter(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports one module from a source in memory, and leaves all others to those behind it."""

    def __init__(self, file: Path, source: str):
        self.name, self.file, self.source = module_name(file), str(file), source

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, self.file, loader=self) if name == self.name else None

    def get_filename(self, name):
        return self.file

    def get_data(self, path):
        return self.source.encode()

    def get_code(self, name):
        return compile(self.source, self.file, "exec")


@dataclass(eq=False)  # pytest hashes its plugins
class SelectedTests:
    """Runs the chosen tests in their order, and reports the first that fails."""

    order: dict[str, int]
    report: Report

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda item: self.order[item.nodeid])

    def pytest_collectreport(self, report):
        if report.failed:
            self.report(["import", ""])
            os._exit(0)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.report(["test", report.nodeid])
            os._exit(0)


def run_in_fork(work: Callable[[Report], None], wall: float) -> tuple[object, float]:
    """(what `work(report)` reports in a process of its own, or why there is nothing; seconds of CPU)."""
    read, write = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(read)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        try:
            work(lambda found: os.write(write, (json.dumps(found) + "\n").encode()))
        finally:
            os._exit(0)
    os.close(write)
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(pid, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, wall)
    with open(read) as said:
        lines = said.read().splitlines()
    _, status, usage = os.wait4(pid, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = usage.ru_utime + usage.ru_stime
    if lines:
        return json.loads(lines[0]), seconds
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU):
        return ["timeout", ""], seconds
    return ["crash", ""], seconds


def run_mutant(file: Path, source: str, tests: list[str], killers: tuple[str, ...] = ()) -> tuple[list[str], float]:
    """(["test", id], ["import", ""], ["timeout", ""], ["crash", ""] or ["survived", ""]; seconds) of a source.

    Of `killers`, the tests that have found another change, those in the file of the last one run before the others.
    """
    last = next((name.split("::")[0] for name in reversed(killers) if name in tests), None)
    first = [name for name in tests if name in killers and name.split("::")[0] == last]
    rest = [name for name in tests if name not in first]

    def work(report):
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 2))
        sys.meta_path.insert(0, MutantImporter(file, source))
        for part in filter(None, (first, rest)):
            files = list(dict.fromkeys(str(ROOT / name.split("::")[0]) for name in part))
            if run_pytest(files, SelectedTests({name: i for i, name in enumerate(part)}, report)):
                return report(["import", ""])
        report(["survived", ""])

    return run_in_fork(work, WALL)


def select_tests(mutant: Mutant, rows: dict[str, dict]) -> list[str]:
    """The tests that execute the changed statement, the quickest first, up to BUDGET seconds."""
    first, last = mutant.lines
    total, names = 0.0, []
    for name, row in rows.items():
        if any(first <= line <= last for line in row["lines"]):
            total += row["seconds"]
            if total > BUDGET and names:
                break
            names.append(name)
    return names


def load_survivors() -> list[dict[str, str]]:
    """survivors.yaml: what is known to survive, with its reason."""
    return yaml.safe_load(Path(__file__).with_name("survivors.yaml").read_text()) or []


def find_reason(mutant: Mutant, entries: list[dict[str, str]]) -> str:
    """Why the mutant may survive, else nothing: an entry names it and, with `becomes`, holds the changed text."""
    for entry in entries:
        if fnmatch.fnmatchcase(mutant.name, entry["mutant"]) and entry.get("becomes", "") in mutant.after:
            return entry["reason"]
    return ""


def import_libraries(libraries: list[str]) -> None:
    """Import the libraries, once for all changes; nothing of the project is among them."""
    for name in libraries:
        with warnings.catch_warnings(), contextlib.suppress(Exception):  # of a part that only its library can import
            warnings.simplefilter("ignore")
            importlib.import_module(name)


def mutate(name: str, file: Path, args: argparse.Namespace) -> bool:
    """Whether no change of the file survives without a reason."""
    relative, source = str(file.relative_to(ROOT)), file.read_text()
    changes = [m for m in mutants(source, relative) if not args.only or args.only in m.name]
    if args.list:
        print("\n".join(f"{m.name}\n    {m.diff}" for m in changes))
        return True
    print(f"{name}: {len(changes)} changes of {relative}", flush=True)
    rows = trace_tests(file, candidate_tests(file))
    if len(changes) > SAMPLE and not args.all:
        kept = set(random.Random(0).sample(range(len(changes)), SAMPLE))
        changes = [m for i, m in enumerate(changes) if i in kept]
    control = select_tests(Mutant("", (1, 10**6), "", "", source), rows)
    outcome, _ = run_mutant(file, source, control)
    if outcome[0] != "survived":
        raise SystemExit(f"{name}: the unchanged file fails: {outcome}. Repair {outcome[1] or 'its import'} first")
    entries, counts, spent, killers = load_survivors(), {"killed": 0, "accepted": 0, "survived": 0}, 0.0, ()
    for mutant in changes:
        tests = select_tests(mutant, rows)
        outcome, seconds = run_mutant(file, mutant.source, tests, killers) if tests else (["survived", ""], 0.0)
        spent += seconds
        why = find_reason(mutant, entries)
        if outcome[0] != "survived":
            counts["killed"] += 1
            killers = (*(name for name in killers if name != outcome[1]), outcome[1])
            how = {"test": outcome[1], "import": "(cannot be imported)", "timeout": "(timeout)", "crash": "(crash)"}
            print(f"  killed    {seconds:4.1f} s  {mutant.name}  by {how[outcome[0]]}", flush=True)
            if why:
                print(f"            but survivors.yaml says: {why}")
            continue
        counts["accepted" if why else "survived"] += 1
        print(f"  {'accepted' if why else 'SURVIVED'}  {seconds:4.1f} s  {mutant.name}  ({len(tests)} tests)")
        print(f"            {why or mutant.diff}", flush=True)
    total = counts["killed"] + counts["survived"]
    print(
        f"{name}: {counts['killed']} of {total} killed ({100 * counts['killed'] / max(total, 1):.0f} %), "
        f"{counts['accepted']} accepted, {spent / max(len(changes), 1):.1f} s a change",
        flush=True,
    )
    return not counts["survived"]


def main() -> None:
    files = method_files()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(files)}; none: all of them")
    parser.add_argument("--all", action="store_true", help=f"all changes, not a sample of {SAMPLE}")
    parser.add_argument("--only", default="", help="only changes whose name holds this text")
    parser.add_argument("--list", action="store_true", help="print the changes and run nothing")
    args = parser.parse_args()
    if unknown := [name for name in args.methods if name not in files]:
        parser.error(f"{', '.join(unknown)}: no file of distill/methods; there are {', '.join(files)}")
    passed = [mutate(name, files[name], args) for name in args.methods or files]
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
