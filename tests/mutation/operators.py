"""Mutations of a method's source by operators on its syntax tree.

    sign        a + b -> a - b, and back; -a -> a              factor      a * b -> a, -> b; a / b -> a
    power       a ** n -> a; a.square() -> a; a.sqrt() -> a    reduction   mean <-> sum
    detach      a.detach() -> a; no_grad() -> no change        roles       fake - real -> real - fake
    guidance    CFG(net, w) -> CFG(net, 1.0)                   condition   drop(c, ...) -> c; if a -> if not a
    check       if a: raise -> if False: raise                 arguments   f(a, b) -> f(b, a), both of one kind
    compare     < <-> <=, > <-> >=, == <-> !=, and <-> or      number      n -> n + 1, True <-> False
    effect      a call whose value nobody uses -> pass

Bodies of functions are mutated. Defaults of fields, annotations, assertions and messages of errors are not: a default
is the paper's number, and a test of it would repeat it.
"""

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

NO_CHANGE = "torch.set_grad_enabled(torch.is_grad_enabled())"
GUIDED = ("CFG",)  # (net, w)
CONDITIONS = ("drop", "with_guidance_key")  # (c, ...) -> c, another condition
ROLES = (("teacher", "fake"), ("real", "fake"), ("teacher", "student"), ("student", "target"), ("student", "fake"))
ROOTS = ("square", "sqrt", "abs")
AXES = ("flatten", "sum", "mean", "squeeze", "unsqueeze", "chunk", "unbind", "cat", "stack", "transpose", "range")
COMMUTATIVE = ("maximum", "minimum", "max", "min", "isinstance", "zip", "replace", "normaliser", "expand")
OBJECTS = (
    "nets",
    "batch",
    "draw",
    "path",
    "schedule",
    "self",
    "method",
    "taps",
    "net",
    "denoiser",
    "told",
    "also",
    "pred",
)
TIMES = ("t", "s", "r", "u", "e", "a", "b", "start", "end", "i", "j", "k")
COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
COMPARE |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
Change = tuple[str, ast.AST, str]  # operator, the node that is replaced, by what


@dataclass(frozen=True)
class Mutant:
    """One change of one file. `lines` are the first and last line of the statement, or None outside of functions."""

    name: str  # file:line:operator, with .2, .3, ... for more of one line
    lines: tuple[int, int]
    before: str
    after: str
    source: str

    @property
    def diff(self) -> str:
        return f"{self.before}  ->  {self.after}"


def source_of(node: ast.AST) -> str:
    """The source of an expression, in parentheses where its neighbours could bind closer."""
    plain = ast.Name | ast.Attribute | ast.Call | ast.Subscript | ast.Constant | ast.Tuple
    source = ast.unparse(node)
    return source if isinstance(node, plain) else f"({source})"


def callee_name(node: ast.AST) -> str:
    """The last name of what a call calls, else nothing."""
    func = node.func if isinstance(node, ast.Call) else None
    return getattr(func, "attr", getattr(func, "id", ""))


def source_with(node: ast.AST, **values: object) -> str:
    """The source of a copy of the node with other fields."""
    twin = copy.deepcopy(node)
    for name, value in values.items():
        setattr(twin, name, value)
    return source_of(twin)


def arithmetic(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield "sign", node, source_of(node.operand)
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add | ast.Sub):
        other = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
        yield "sign", node, ast.unparse(ast.AugAssign(node.target, other, node.value))
    if not isinstance(node, ast.BinOp):
        return
    match node.op:
        case ast.Add() | ast.Sub() if not any(is_sequence(side) for side in (node.left, node.right)):
            yield "sign", node, source_with(node, op=ast.Sub() if isinstance(node.op, ast.Add) else ast.Add())
        case ast.Mult():
            small = [isinstance(side, ast.Constant) or is_own(side) for side in (node.left, node.right)]
            if not small[1] and not isinstance(node.left, ast.List):
                yield "factor", node, source_of(node.right)
            if not small[0]:
                yield "factor", node, source_of(node.left)
        case ast.Div() | ast.FloorDiv():
            yield "factor", node, source_of(node.left)
        case ast.Pow():
            yield "power", node, source_of(node.left)


def is_sequence(node: ast.AST) -> bool:
    """Whether the expression is a list, a tuple or a string, as far as its form says."""
    if isinstance(node, ast.IfExp):
        return is_sequence(node.body)
    if isinstance(node, ast.Call):
        return callee_name(node) in ("updates", "select", "list", "tuple")
    return isinstance(node, ast.Tuple | ast.List | ast.JoinedStr | ast.ListComp) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def is_own(node: ast.AST) -> bool:
    """Whether it is a field of the method: `self.x`."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def calls(node: ast.AST) -> Iterator[Change]:
    if not isinstance(node, ast.Call):
        return
    name, args = callee_name(node), node.args
    method = isinstance(node.func, ast.Attribute)
    if name == "detach" and method:
        yield "detach", node, source_of(node.func.value)
    if name in ("no_grad", "enable_grad"):
        yield "detach", node, NO_CHANGE
    if name == "set_grad_enabled":
        yield "detach", node, NO_CHANGE
    if name in ROOTS and method and not args:
        yield "power", node, source_of(node.func.value)
    if name in ("mean", "sum") and method:
        func = ast.Attribute(node.func.value, "sum" if name == "mean" else "mean", ast.Load())
        yield "reduction", node, source_with(node, func=func)
    if name in GUIDED and len(args) > 1:
        yield "guidance", node, source_with(node, args=[args[0], ast.Constant(1.0), *args[2:]])
    if name in CONDITIONS and args:
        yield "condition", node, source_of(args[0])
    for i, (first, second) in enumerate(zip(args, args[1:])):
        of_one_kind = argument_kind(first) and argument_kind(first) == argument_kind(second)
        if name not in COMMUTATIVE and of_one_kind and not equal_trees(first, second):
            yield "arguments", node, source_with(node, args=[*args[:i], second, first, *args[i + 2 :]])


def equal_trees(a: ast.AST, b: ast.AST) -> bool:
    return ast.dump(a) == ast.dump(b)


def argument_kind(node: ast.AST) -> str:
    """What an argument is, by its form: a time, a network, a tensor; nothing for all that cannot be exchanged."""
    match node:
        case ast.Name(id=name) if name in OBJECTS or name == "c" or name.endswith("_c"):
            return ""
        case ast.Name(id=name) if name in TIMES:
            return "time"
        case ast.Attribute(value=ast.Name(id="nets")):
            return "network"
        case ast.Name() | ast.BinOp() | ast.Attribute(attr="x0" | "eps" | "out"):
            return "tensor"
        case ast.Call() if callee_name(node) in ("square", "detach", "to", "chunk", "normal", "features", "logits"):
            return "tensor"
    return ""


def branches(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.If) and all(isinstance(line, ast.Raise) for line in node.body):
        yield "check", node.test, "False"
    elif isinstance(node, ast.If | ast.IfExp):
        yield "condition", node.test, negate(node.test)
    if callee_name(node) == "select":  # Requirement.select(NAME=condition)
        for keyword in node.keywords:
            yield "condition", keyword.value, negate(keyword.value)
    if isinstance(node, ast.comprehension):
        for test in node.ifs:
            yield "condition", test, negate(test)
    if isinstance(node, ast.BoolOp):
        yield "compare", node, source_with(node, op=ast.And() if isinstance(node.op, ast.Or) else ast.Or())
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        op = type(node.ops[0])
        if callee_name(node.left) == "uniform":  # to be equal has no probability
            yield "compare", node, source_with(node, ops=[ast.Gt()])
        elif op in COMPARE:
            yield "compare", node, source_with(node, ops=[COMPARE[op]()])


def negate(test: ast.expr) -> str:
    """The negated condition; of a single comparison with `is`, `==` or `in` the other comparison."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return source_of(test.operand)
    if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Eq | ast.NotEq | ast.Is | ast.IsNot | ast.In):
        return source_with(test, ops=[COMPARE[type(test.ops[0])]()])
    return source_of(ast.UnaryOp(ast.Not(), test))


def constants(node: ast.AST) -> Iterator[Change]:
    if not isinstance(node, ast.Constant):
        return
    if isinstance(node.value, bool):
        yield "number", node, str(not node.value)
    elif isinstance(node.value, int | float) and float(node.value).is_integer():
        yield "number", node, str(node.value + 1)
    elif node.value in ("mean", "sum"):
        yield "reduction", node, repr({"mean": "sum", "sum": "mean"}[node.value])


def effects(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "effect", node, "pass"


def identifiers(node: ast.AST, form: type) -> set[str]:
    """The variables (form Name) or the attributes (form Attribute) of an expression."""
    return {getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(node) if isinstance(n, form)}


def roles(node: ast.AST) -> Iterator[Change]:
    """Exchange two roles in the smallest expression that holds both."""
    if not isinstance(node, ast.expr) or isinstance(getattr(node, "ctx", None), ast.Store):
        return
    for pair, form in product(ROLES, (ast.Name, ast.Attribute)):
        inner = (identifiers(child, form) for child in ast.iter_child_nodes(node))
        if not {*pair} <= identifiers(node, form) or any({*pair} <= found for found in inner):
            continue
        twin, other = copy.deepcopy(node), {pair[0]: pair[1], pair[1]: pair[0]}
        field = "id" if form is ast.Name else "attr"
        for n in ast.walk(twin):
            if isinstance(n, form):
                setattr(n, field, other.get(getattr(n, field), getattr(n, field)))
        yield "roles", node, source_of(twin)


OPERATORS = (arithmetic, calls, branches, constants, effects, roles)


def walk_bodies(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.stmt]]:
    """Every node of the bodies of functions with its statement, less what is not computed with."""

    def visit(node: ast.AST, statement: ast.stmt) -> Iterator[tuple[ast.AST, ast.stmt]]:
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr):
            return
        yield node, statement
        for name, value in ast.iter_fields(node):
            children = value if isinstance(value, list) else [value]
            if name in ("annotation", "returns", "args", "decorator_list") and not isinstance(node, ast.Call):
                continue
            for child in children:
                if isinstance(child, ast.AST) and not is_exponent(node, child) and not is_axis(node, child):
                    yield from visit(child, child if isinstance(child, ast.stmt) else statement)

    def functions(node: ast.AST) -> Iterator[ast.FunctionDef]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                yield child
            elif isinstance(child, ast.ClassDef):
                yield from functions(child)

    for function in functions(tree):
        for decorator in function.decorator_list:
            yield from ((n, function) for n in ast.walk(decorator) if callee_name(n) in ("no_grad", "enable_grad"))
        for statement in function.body:
            yield from visit(statement, statement)


def is_exponent(node: ast.AST, child: ast.AST) -> bool:
    """Constant exponents belong to `power`, and the sign of a constant such as -1 is no computation."""
    power = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and child is node.right
    return isinstance(child, ast.Constant) and (power or isinstance(node, ast.UnaryOp))


def is_axis(node: ast.AST, child: ast.AST) -> bool:
    """Axes and shapes: another one is an error, or the same number."""
    if isinstance(node, ast.keyword):
        return node.arg in ("dim", "dtype", "device", "keepdim", "strict")
    if isinstance(node, ast.Attribute) and node.attr in ("numel", "ndim", "shape", "device", "dtype"):
        return True
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and node.value.attr == "shape":
        return True
    return callee_name(node) in AXES and isinstance(child, ast.Constant)


def offset(lines: list[str], line: int, column: int) -> int:
    return sum(len(text) for text in lines[: line - 1]) + column


def one_line(lines: list[str]) -> str:
    return " ".join(line.strip() for line in lines)


def mutants(source: str, file: str) -> list[Mutant]:
    """All mutants of a source (ASCII), by line, column and operator; a source that arises twice is one mutant."""
    lines, found, numbers, seen = source.splitlines(keepends=True), [], Counter(), {ast.dump(ast.parse(source))}
    for node, statement in walk_bodies(ast.parse(source)):
        for operator in OPERATORS:
            for name, target, new in operator(node):
                start = offset(lines, target.lineno, target.col_offset)
                stop = offset(lines, target.end_lineno, target.end_col_offset)
                changes = (target.lineno, target.col_offset, stop, name, new)
                found.append((changes, start, header(statement), source[:start] + new + source[stop:]))
    result = []
    for (line, _, _, name, new), start, span, mutated in sorted(found):
        tree = ast.dump(ast.parse(mutated))
        if tree in seen:
            continue
        seen.add(tree)
        numbers[line, name] += 1
        number = f".{numbers[line, name]}" if numbers[line, name] > 1 else ""
        after = mutated.splitlines(keepends=True)
        last = line + mutated[start : start + len(new)].count("\n")
        grown = len(after) - len(lines)
        upto = max(last, next(i for i in range(len(lines), 0, -1) if lines[i - 1 :] != after[i - 1 + grown :]))
        upto += lines[upto - 1].rstrip().endswith(":")  # of `with` and `if` the first line of the body, too
        before, after = one_line(lines[line - 1 : upto]), one_line(after[line - 1 : upto + grown])
        result.append(Mutant(f"{file}:{line}:{name}{number}", span, before, after, mutated))
    return result


def header(statement: ast.stmt) -> tuple[int, int]:
    """The lines of a statement, of a compound one without its body."""
    body = getattr(statement, "body", None)
    return statement.lineno, max(statement.lineno, body[0].lineno - 1) if body else statement.end_lineno
