"""The operators of the mutation runner do what they say, and survivors.yaml names changes that exist."""

import fnmatch
from pathlib import Path

import pytest
import yaml
from operators import CONDITIONS, GUIDED, mutants

ROOT = Path(__file__).resolve().parent.parent.parent
SURVIVORS = yaml.safe_load(Path(__file__).with_name("survivors.yaml").read_text())

SOURCE = '''class M:
    size: int = 1

    def loss(self, x, eps, t, c, nets):
        """A docstring, 1 + 1."""
        BODY
'''

CASES = {  # a statement: {operator: what it may become}
    "return -x + eps": {"sign": ["return (-x - eps)", "return x + eps"]},
    "x += eps": {"sign": ["x -= eps"]},
    "return x * eps / t": {"factor": ["return (x * eps)", "return eps / t", "return x / t"], "arguments": []},
    "return 3 * self.w": {"factor": [], "number": ["return 4 * self.w"]},
    "return x**2": {"power": ["return x"], "number": []},
    "return x.square().mean()": {"power": ["return x.mean()"], "reduction": ["return x.square().sum()"]},
    "return reduce(x, 'sum')": {"reduction": ["return reduce(x, 'mean')"]},
    "return x.detach()": {"detach": ["return x"]},
    "return fake - real": {"roles": ["return (real - fake)"]},
    "return nets.fake.f(nets.teacher)": {"roles": ["return nets.teacher.f(nets.fake)"]},
    "return CFG(nets.teacher, w)(x, t, c)": {"guidance": ["return CFG(nets.teacher, 1.0)(x, t, c)"]},
    "return drop(c, null, mask)": {"condition": ["return c"]},
    "return x if t else eps": {"condition": ["return x if (not t) else eps"]},
    "return x if t is None else eps": {"condition": [], "compare": ["return x if (t is not None) else eps"]},
    "return f(x, eps, t, c, nets)": {"arguments": ["return f(eps, x, t, c, nets)"]},
    "return R.select(A=x, B=t != 1)": {
        "condition": ["return R.select(A=(not x), B=t != 1)"],
        "compare": ["return R.select(A=x, B=(t == 1))"],
    },
    "return x < eps": {"compare": ["return (x <= eps)"]},
    "return x.uniform('d') < eps": {"compare": ["return (x.uniform('d') > eps)"]},
    "return x and eps": {"compare": ["return (x or eps)"]},
    "return x[0].f(True)": {"number": ["return x[0].f(False)", "return x[1].f(True)"]},
    "return x.flatten(1), x.sum(dim=1)": {"number": []},
    "follow(x)": {"effect": ["pass"]},
    "assert x < 1": {"compare": [], "number": []},
}


@pytest.mark.parametrize("statement", CASES)
def test_operators(statement):
    """One statement at a time, all that each operator makes of it; every change is a source that Python reads."""
    changes = mutants(SOURCE.replace("BODY", statement), "m.py")
    for operator, want in CASES[statement].items():
        got = [m for m in changes if m.name.split(":")[2].split(".")[0] == operator]
        assert sorted(m.after for m in got) == sorted(want)
    for m in changes:
        assert m.before == statement and m.lines == (6, 6) and m.name.startswith("m.py:6:")
        assert m.source == SOURCE.replace("BODY", m.after)
        compile(m.source, "m.py", "exec")  # or a SyntaxError


def test_gradients_are_let_through():
    (change,) = (m for m in mutants("def f(x):\n    with torch.no_grad():\n        return x\n", "m.py"))
    assert change.name == "m.py:2:detach" and change.lines == (2, 2)
    assert change.after == "with torch.set_grad_enabled(torch.is_grad_enabled()): return x"


def test_a_check_is_left_out():
    source = "def f(x):\n    if x == 1:\n        raise ValueError(f'{x + 1}')\n    return x\n"
    assert [(m.name, m.after.split(" raise")[0]) for m in mutants(source, "m.py")] == [
        ("m.py:2:check", "if False:"),
        ("m.py:2:compare", "if (x != 1):"),
        ("m.py:2:number", "if x == 2:"),
    ]


def test_a_statement_of_several_lines():
    source = "def f(x, y):\n    return g(\n        x * 2,\n        y,\n    )\n"
    swap, factor = (m for m in mutants(source, "m.py") if m.name.endswith(("factor", "arguments")))
    assert swap.lines == factor.lines == (2, 5)
    assert swap.after == "return g(y, x * 2)" and factor.after == "x,"


def test_names_are_unique_and_ordered():
    changes = mutants((ROOT / "distill/methods/sid.py").read_text(), "sid.py")
    lines = [int(m.name.split(":")[1]) for m in changes]
    assert len(changes) > 30 and lines == sorted(lines)
    assert len({m.name for m in changes}) == len({m.source for m in changes}) == len(changes)


def test_the_guidance_is_called_as_the_operators_name_it():
    """After a rename the operators would be silent."""
    methods = "".join(file.read_text() for file in (ROOT / "distill/methods").rglob("*.py"))
    assert all(f" {name}(" in methods or f"({name}(" in methods for name in (*GUIDED, *CONDITIONS))


def test_survivors_exist_and_have_reasons():
    files = {entry["mutant"].split(":")[0] for entry in SURVIVORS}
    changes = [m for file in files for m in mutants((ROOT / file).read_text(), file)]
    for entry in SURVIVORS:
        assert entry.keys() <= {"mutant", "becomes", "reason"} and len(entry["reason"]) > 20, entry
        becomes = entry.get("becomes", "")
        assert any(fnmatch.fnmatchcase(m.name, entry["mutant"]) and becomes in m.after for m in changes), entry
