"""The list of `make mutate` fits the code as it is; that its mistakes are noticed takes minutes."""

import pytest
from mutate import MUTATIONS, ROOT, applied


@pytest.mark.parametrize("group", MUTATIONS)
def test_mutations(group):
    """Each snippet is there once, what becomes of it compiles, and the tests that should notice exist."""
    assert len({mutation.name for mutation in MUTATIONS[group]}) == len(MUTATIONS[group]) >= 3
    for mutation in MUTATIONS[group]:
        for file, text in applied(mutation).items():
            compile(text, file, "exec")
            assert text != (ROOT / file).read_text()
        for test in mutation.tests:
            file, *names = test.partition("[")[0].split("::")
            text = (ROOT / file).read_text()
            assert all(f"class {name}" in text or f"def {name}(" in text for name in names), test
