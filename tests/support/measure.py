"""Counts of what makes code hard to read, by room: import circles, wrong arrows, long functions, packed lines, names.

python tests/support/measure.py [--where] [--root CHECKOUT]

The table has one row for each count; the last column is the aim. --where also lists the file and line of each case.
`tests/test_house.py` holds the counts below stored bounds.
"""

import argparse
import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

ROOMS = ("distill", "pipelines", "eval", "recipes")
FORBIDDEN = {  # room: what it must not import
    "distill": ("diffusers", "pipelines", "eval", "recipes"),
    "pipelines": ("eval", "recipes"),
    "eval": ("distill.methods", "recipes"),
    "recipes": (),
}
# A module may import modules of its own line and of the lines above it. A name stands for all modules below it; the
# longest name that fits a module counts.
ORDER = {
    "distill": (
        "random ranges files layout modules sharding progress terminal",
        "diffusion",
        "losses",
        "networks",
        "roles",
        "method",
        "data",
        "methods",
        "training.state training.config training.precision",
        "configuration",
        "training.pictures",
        "training.checkpoint training.log history",
        "training.trackers",
        "training.requirements training.prepare",
        "training.build",
        "training.step training.samples training.memory",
        "training.findings training.watchdog",
        "training.replay",
        "training.nonfinite",
        "training.loop training",
        "__main__",
    ),
    "pipelines": (
        "fields markdown launch protocols",
        "components",
        "edm_nets",
        "identity families",
        "teacher",
        "inference judges",
        "cache export planning",
        "run",
        "control edm_convert experts pairs plan sana scaling",  # the commands of three lines
    ),
    "eval": (
        "cli files markup protocol",
        "images",
        "features",
        "metrics",
        "protocol_files world",
        "protocols",
        "sampling",
        "inputs",
        "figures",
        "leaderboard",
        "score verify",
        "generate hallucination layouts watch",  # the commands of three lines
    ),
}
MOST_LINES, MOST_COMPLEX, MOST_ANY = 60, 15, 15.0  # of a function; `Any` for 1,000 statements
# Names of functions and classes that leave the subject to be guessed: participles, pronouns, adverbs, prepositions; and
# words that had several meanings in the tree.
BANNED = frozenset(
    """about above adapted after again against alone along another apart around aside asked at away back bare
    before began begin begun belongs below best both broken built carried changed check checked choice chosen
    closing combined commit configured coupled damage described doubling drawn each end ended ending entered
    evaluated exported failed falling far feed fill finding finished first forgetting found frame fresh front
    gathered generated given guided handover heads hear heard hearing heeding height hidden holds inert inside
    into judged jump known lacking late launched law left level like loaded located louder lower made masked
    masters means measured meet merged more moved named near nearer needed nested noised normalised of on once
    opened ordered over overridden overriding own page paired passed past perturbed pinned piped place placed
    present pretty printed projected proxied published push ranks reached real recorded reframed refuse refused
    relay removed renamed renoised repeated replaced rescaled revived rewarded rivals rule ruled said scaled
    scores see seen settled share shared shifted short shown signed singles skipped small staged stored
    supported tapped tapping tell tells then timed told towards trailing trained tuned turn turned turns twin
    unfinished unpacked unset untimed using verdicts verified visible walk watching weaken weighed weightless
    whole wrapped""".split()
)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.With, ast.AsyncWith)


class Case(NamedTuple):
    """One finding: its file below the root, its line, and what is there."""

    file: Path
    line: int
    text: str


@dataclass(frozen=True)
class Module:
    """One file of a room. name: dotted; package: where its relative imports start from."""

    name: str
    file: Path
    package: tuple[str, ...]
    text: str

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(ast.parse(self.text)))


class Import(NamedTuple):
    """What a module imports at a line; target: a dotted name."""

    source: Module
    line: int
    target: str


class House:
    """The rooms of the checkout at `root`, parsed."""

    def __init__(self, root: Path):
        self.root = root

    @cached_property
    def modules(self) -> dict[str, Module]:
        modules = {}
        for file in sorted(f for room in ROOMS for f in (self.root / room).rglob("*.py")):
            path = file.relative_to(self.root)
            package = path.parts[:-1]
            name = ".".join(package if path.stem == "__init__" else (*package, path.stem))
            modules[name] = Module(name, path, package, file.read_text())
        return modules

    def room(self, room: str) -> list[Module]:
        return [module for module in self.modules.values() if module.file.parts[0] == room]

    def imports(self, module: Module) -> Iterator[Import]:
        """All imports of a module, also those in functions and under TYPE_CHECKING, and relative ones.

        `from a import b` imports the module a.b if there is one, else a. Recipes import their neighbours by bare names.
        """
        for node in module.nodes:
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                package = module.package[: len(module.package) - node.level + 1] if node.level else ()
                base = ".".join([*package, *filter(None, [node.module])])
                names = [f"{base}.{alias.name}" for alias in node.names]
                targets = sorted({name if name in self.modules else base for name in names})
            else:
                continue
            for target in targets:
                neighbour = f"recipes.{target}"
                local = module.file.parts[0] == "recipes" and neighbour in self.modules
                yield Import(module, node.lineno, neighbour if local else target)


def find_circles(house: House, room: str) -> list[Case]:
    """The sets of modules that import each other, directly or through others; one case for each set."""
    edges = {m.name: {i.target for i in house.imports(m)} & house.modules.keys() for m in house.modules.values()}
    reach = {name: _reachable(name, edges) for name in edges}
    circles = {frozenset(b for b in reach[a] if a in reach[b]) for a in edges if a in reach[a]}
    cases = [Case(house.modules[min(circle)].file, 1, " <-> ".join(sorted(circle))) for circle in circles]
    return sorted(case for case in cases if case.file.parts[0] == room)


def _reachable(name: str, edges: dict[str, set[str]]) -> set[str]:
    reached: set[str] = set()
    waiting = list(edges[name])
    while waiting:
        target = waiting.pop()
        if target not in reached:
            reached.add(target)
            waiting += edges[target]
    return reached


def find_wrong_arrows(house: House, room: str) -> list[Case]:
    """Imports that FORBIDDEN excludes between rooms, or that go down in ORDER."""
    cases = []
    for module in house.room(room):
        line = order_in_room(module.name)
        for item in house.imports(module):
            imported = order_in_room(item.target) if item.target.split(".")[0] == room else None
            forbidden = any(f"{item.target}.".startswith(f"{name}.") for name in FORBIDDEN[room])
            if forbidden or (line is not None and imported is not None and imported > line):
                cases.append(Case(module.file, item.line, f"{module.name} imports {item.target}"))
    return cases


def order_in_room(name: str) -> int | None:
    """The line of ORDER that a module stands in, by the longest name that fits; None if none does."""
    room, _, rest = name.partition(".")
    lines = {key: i for i, line in enumerate(ORDER.get(room, ())) for key in line.split()}
    fitting = [key for key in lines if f"{rest}.".startswith(f"{key}.")]
    return lines[max(fitting, key=len)] if fitting else None


def find_unplaced_modules(house: House, room: str) -> list[Case]:
    """Modules that ORDER does not name. A room without an order has none, nor has a room's own __init__.py."""
    modules = [m for m in house.room(room) if room in ORDER and m.name != room]
    return [Case(m.file, 1, f"ORDER lacks {m.name}") for m in modules if order_in_room(m.name) is None]


def find_long_functions(house: House, room: str) -> list[Case]:
    return [
        Case(module.file, node.lineno, f"{node.name}: {lines} lines")
        for module, node in _nodes(house, room, FUNCTIONS)
        if (lines := node.end_lineno - node.lineno + 1) > MOST_LINES
    ]


def find_complex_functions(house: House, room: str) -> list[Case]:
    """Functions of a cyclomatic complexity over MOST_COMPLEX; functions inside count with their outer one."""
    return [
        Case(module.file, node.lineno, f"{node.name}: complexity {number}")
        for module, node in _nodes(house, room, FUNCTIONS)
        if (number := complexity(node)) > MOST_COMPLEX
    ]


def complexity(function: ast.AST) -> int:
    """1 + branches, loops, handlers, `with`, if-expressions, comprehensions and their ifs, cases, and/or."""
    nodes = list(ast.walk(function))
    branches = sum(isinstance(n, (*BRANCHES, ast.match_case)) for n in nodes)
    operators = sum(len(n.values) - 1 for n in nodes if isinstance(n, ast.BoolOp))
    loops = sum(1 + len(n.ifs) for n in nodes if isinstance(n, ast.comprehension))
    return 1 + branches + operators + loops


def find_packed_assignments(house: House, room: str) -> list[Case]:
    """`a, b = x, y`. Not counted: one value that is unpacked, and a swap, which has the same terms on both sides."""
    cases = []
    for module, node in _nodes(house, room, ast.Assign):
        for target in node.targets:
            sides = (target, node.value)
            terms = [sorted(map(ast.unparse, s.elts)) for s in sides if isinstance(s, ast.Tuple | ast.List)]
            if len(terms) == 2 and terms[0] != terms[1]:
                cases.append(Case(module.file, node.lineno, ast.unparse(node)))
    return cases


def find_nested_choices(house: House, room: str) -> list[Case]:
    """Statements with more than one if-expression. Of a statement with a body, its header counts."""
    return [
        Case(module.file, node.lineno, f"{number} if-expressions")
        for module, node in _nodes(house, room, ast.stmt)
        if (number := sum(isinstance(part, ast.IfExp) for part in _header(node))) > 1
    ]


def _header(statement: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a statement outside the statements in it."""
    for child in ast.iter_child_nodes(statement):
        if not isinstance(child, ast.stmt):
            yield child
            yield from _header(child)


def find_any(house: House, room: str) -> list[Case]:
    names = [(m, node) for m, node in _nodes(house, room, ast.Name) if node.id == "Any"]
    return [Case(module.file, node.lineno, "Any") for module, node in names]


def any_per_thousand(house: House, room: str) -> float:
    """Uses of `Any` for 1,000 statements."""
    statements = sum(1 for _ in _nodes(house, room, ast.stmt))
    return round(1000 * len(find_any(house, room)) / max(statements, 1), 1)


def find_banned_names(house: House, room: str) -> list[Case]:
    return [
        Case(module.file, node.lineno, node.name)
        for module, node in _nodes(house, room, (*FUNCTIONS, ast.ClassDef))
        if node.name.strip("_").lower() in BANNED
    ]


def _nodes(house: House, room: str, kinds: type | tuple[type, ...]) -> Iterator[tuple[Module, ast.AST]]:
    for module in house.room(room):
        for node in module.nodes:
            if isinstance(node, kinds):
                yield module, node


class Measure(NamedTuple):
    """A row of the table: how its cases are found, and the aim for the sum of the rooms."""

    find: Callable[[House, str], list[Case]]
    aim: float = 0


MEASURES = {
    "import circles": Measure(find_circles),
    "wrong arrows": Measure(find_wrong_arrows),
    "modules without a place in ORDER": Measure(find_unplaced_modules),
    f"functions over {MOST_LINES} lines": Measure(find_long_functions),
    f"functions of complexity over {MOST_COMPLEX}": Measure(find_complex_functions),
    "packed assignments": Measure(find_packed_assignments),
    "statements with two if-expressions": Measure(find_nested_choices),
    "banned names": Measure(find_banned_names),
    "Any per 1,000 statements": Measure(find_any, MOST_ANY),
}


def count(house: House, room: str, name: str) -> float:
    return any_per_thousand(house, room) if MEASURES[name].find is find_any else len(MEASURES[name].find(house, room))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--where", action="store_true", help="list the file and line of each case")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[2], help="the checkout to measure")
    args = parser.parse_args()
    house = House(args.root)
    print(f"{'':36}" + "".join(f"{column:>10}" for column in (*ROOMS, "aim")))
    for name, measure in MEASURES.items():
        counts = [count(house, room, name) for room in ROOMS]
        print(f"{name:36}" + "".join(f"{number:>10g}" for number in (*counts, measure.aim)))
    if args.where:
        for name, measure in MEASURES.items():
            print(f"\n{name}")
            for case in (case for room in ROOMS for case in measure.find(house, room)):
                print(f"  {case.file}:{case.line}: {case.text}")


if __name__ == "__main__":
    main()
