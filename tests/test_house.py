"""The house rules of CONTRIBUTING.md: arrows and no circles, short plain code, a quiet library, no pickles, ASCII."""

import ast
from pathlib import Path

import pytest
from measure import FORBIDDEN, MEASURES, ROOMS, House, count

ROOT = Path(__file__).resolve().parent.parent
HOUSE = House(ROOT)
BOUNDS = {  # where none is given the bound is 0, which is the aim of all but `Any` (15)
    "Any per 1,000 statements": dict.fromkeys(ROOMS, 10),
}
HEAVY = ("diffusers", "transformers", "peft")  # they take seconds: --help and errors must not wait for them
FILES = {f.relative_to(ROOT): ast.parse(f.read_text()) for room in FORBIDDEN for f in (ROOT / room).rglob("*.py")}
LIBRARY = {f: tree for f, tree in FILES.items() if f.parts[0] != "recipes"}


def nodes(tree, skip=lambda node: False):
    """Every node below `tree`, without those that `skip` names and what they hold."""
    for child in ast.iter_child_nodes(tree):
        if not skip(child):
            yield child
            yield from nodes(child, skip)


def imported(file, skip=lambda node: False):
    """The dotted names that a file imports; `from a import b` gives a and a.b, for b may be a module."""
    for node in nodes(FILES[file], skip):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = file.parts[: len(file.parts) - node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def inside(name, roots):
    return any(name == root or name.startswith(root + ".") for root in roots)


def deferred(node):
    """What does not run at import: the body of a function, and `if TYPE_CHECKING:`."""
    typing = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    return typing or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def command(node):
    """A command line may print: main(), and `if __name__ == "__main__":`."""
    return getattr(node, "name", "") == "main" or (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))


def calls(skip=lambda node: False):
    for file, tree in LIBRARY.items():
        yield from ((file, n.lineno, n) for n in nodes(tree, skip) if isinstance(n, ast.Call))


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("name", MEASURES)
def test_counts_only_fall(name, room):
    """Lower a bound of BOUNDS once its count has fallen. `python tests/support/measure.py --where` lists the cases."""
    assert HOUSE.room(room), "the room is empty"
    bound = BOUNDS.get(name, {}).get(room, 0)
    cases = [f"{case.file}:{case.line}: {case.text}" for case in MEASURES[name].find(HOUSE, room)]
    assert count(HOUSE, room, name) <= bound, f"{name} in {room}: at most {bound}\n" + "\n".join(cases)


def test_eval_is_not_shadowed():
    plain = [
        (str(f), n.lineno, a) for f, t in FILES.items() for n in nodes(t) if isinstance(n, ast.Import) for a in n.names
    ]
    assert not [(f, line) for f, line, a in plain if (a.asname or a.name.split(".")[0]) == "eval"], (
        "from eval.x import y"
    )


def test_nothing_heavy_at_import():
    """Follows through all rooms what runs when distill/ or a recipe is imported."""
    ours = {".".join(f.parts[:-1] if f.stem == "__init__" else (*f.parts[:-1], f.stem)): f for f in FILES}
    ours |= {f.stem: f for f in FILES if f.parts[0] == "recipes"}  # a script finds its neighbours by their bare names
    todo = [(name, name) for name in ours if inside(name, ("distill", "recipes"))]
    seen, found = set(), []
    while todo:
        name, path = todo.pop()
        found += [path] if inside(name, HEAVY) else []
        parents = {name.rsplit(".", i)[0] for i in range(name.count(".") + 1)}  # importing a.b.c runs a and a.b too
        for m in (parents & ours.keys()) - seen:
            seen.add(m)
            todo += [(new, f"{path} > {new}") for new in imported(ours[m], deferred)]
    assert not found


def test_a_method_fits_on_a_screen():
    long = {f.name: len(f.read_text().splitlines()) for f in (ROOT / "distill" / "methods").rglob("*.py")}
    assert not {name: lines for name, lines in long.items() if lines > 90}


def test_the_library_is_quiet():
    assert not [(str(f), line) for f, line, n in calls(skip=command) if ast.unparse(n.func) == "print"]


def test_no_pickle():
    """Published .bin files and EDM checkpoints are read as plain tensors, by one file each; nothing else is read."""
    published, edm = Path("pipelines/export/published.py"), Path("pipelines/export/edm_convert.py")
    pickles = ("pickle", "cloudpickle", "dill", "joblib")
    assert {f for f in LIBRARY for n in imported(f) if inside(n, pickles)} <= {edm}
    assert not [c for c in calls() if c[0] == edm and ast.unparse(c[2].func).startswith("pickle.")], (
        "not through its Reader"
    )
    unsafe = [(f, line, ast.unparse(n)) for f, line, n in calls() if isinstance(n.func, ast.Attribute | ast.Name)]
    unsafe = [c for c in unsafe if c[2].startswith(("torch.load(", "torch.save(")) or "allow_pickle=True" in c[2]]
    assert not [c for c in unsafe if c[0] not in (published, edm) or not c[2].endswith("weights_only=True)")]


def test_code_is_ascii():
    tests = [f for room in ("tests", "benchmarks") for f in (ROOT / room).rglob("*.py")]
    assert not [str(f) for f in (*(ROOT / f for f in FILES), *tests) if not f.read_bytes().isascii()]


def test_the_counts_find_their_cases(tmp_path):
    """A room with one case of each kind, and beside each what is allowed."""
    branch = "    x = 1 if x else 2\n"
    types = "if TYPE_CHECKING:\n    from . import times\n"
    files = {
        "distill/random.py": "from .diffusion import schedule\n",  # against the order
        "distill/diffusion/schedule.py": f"from typing import TYPE_CHECKING\n{types}",
        "distill/diffusion/times.py": "def f():\n    import distill.diffusion.schedule\n",
        "distill/losses.py": "import eval.score\nfrom distill.random import Draw\n",  # another room
        "distill/new.py": "def told(x: Any):\n    pass\n\n\ndef told_twice(x):\n    pass\n",
        "distill/files.py": "a, b = 1, 2\na, b = b, a\na, b = f()\nc = 1 if a else 2\nd = 1 if a else 2 if b else 3\n",
        "distill/modules.py": "def f(x):\n" + branch * 15 + "def g():\n" + "    x = 1\n" * 60,
        "distill/sharding.py": "def f(x):\n" + branch * 14 + "def g():\n" + "    x = 1\n" * 59,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    cases = {name: measure.find(House(tmp_path), "distill") for name, measure in MEASURES.items()}
    assert {name: [(str(c.file), c.line) for c in found] for name, found in cases.items()} == {
        "import circles": [("distill/diffusion/schedule.py", 1)],
        "wrong arrows": [("distill/losses.py", 1), ("distill/random.py", 1)],
        "modules without a place in ORDER": [("distill/new.py", 1)],
        "functions over 60 lines": [("distill/modules.py", 17)],
        "functions of complexity over 15": [("distill/modules.py", 1)],
        "packed assignments": [("distill/files.py", 1)],
        "statements with two if-expressions": [("distill/files.py", 5)],
        "banned names": [("distill/new.py", 1)],
        "Any per 1,000 statements": [("distill/new.py", 1)],
    }
