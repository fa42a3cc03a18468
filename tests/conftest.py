"""One thread, no network, fixed seeds, the golden files. The environment also reaches subprocesses."""

import fcntl
import os
import random
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on two busy cores can be fifty times slower than one
os.environ.setdefault("WANDB_MODE", "offline")

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)


LONGEST = (  # files that start first, by measured seconds, so that all workers end together
    "recipes/test_recipes.py",
    "pipelines/test_plan.py",
    "pipelines/test_families.py",
    "recipes/test_exports.py",
    "distill/training/test_processes.py",
    "test_readme.py",
    "eval/test_generate.py",
    "test_methods.py",
    "distill/training/test_sharded.py",
    "eval/test_metrics.py",
    "test_wheel.py",
    "pipelines/test_scaling.py",
    "recipes/test_cli.py",
    "recipes/test_matrix.py",
)


def pytest_collection_modifyitems(items):
    """Order files by LONGEST: make test hands them out in this order, one at a time."""
    order = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(autouse=True)
def seeds():
    """Every test starts from the same random state, alone or in the suite."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_precision():
    """accelerate holds one precision a process: a test that asks for another one must reset it, for those after it."""
    yield
    if "accelerate.state" in sys.modules:
        held = sys.modules["accelerate.state"].AcceleratorState._shared_state.get("_mixed_precision")
        assert held in (None, "no"), f"accelerate is left in {held!r}: AcceleratorState._reset_state(True)"


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """shared(name, make) -> a folder that make(folder) fills when the first test of all processes asks for it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def folder(name, make):
        path, done = root / name, root / f"{name}.done"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir()
                make(path)
                done.touch()
        return path

    return folder


@pytest.fixture(scope="session")
def digits_network(shared):
    """The digits' feature network, trained once for all processes: later calls of classifier() return it."""
    from eval.features.digits import classifier

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILL_CACHE", str(shared("digits-network", classifier.__wrapped__)))
        return classifier()


@pytest.fixture(scope="session")
def golden():
    """golden("sid/x.npz") -> Path of a stored file: of tests/golden, else of the folder with all of them.

    The test is skipped where neither has it.
    """
    everything = Path(os.environ.get("DISTILL_GOLDEN") or ROOT.parent / "shared" / "golden")

    def find(name):
        for folder in (ROOT / "tests" / "golden", everything):
            if (folder / name).exists():
                return folder / name
        pytest.skip(f"{name} is not in tests/golden: point DISTILL_GOLDEN to the folder of all stored numbers")

    return find


@pytest.fixture
def close(record_property):
    """close(what, ours, stored, tol): max|ours - stored| <= tol max|stored|. Two dicts: for each of their tensors.

    floor: a tensor below it is held against `floor` instead of its own size. `make golden` prints what was compared.
    """
    rows = []
    record_property("golden", rows)

    def check(what, ours, stored, tol, floor=0.0):
        if not isinstance(stored, dict):
            ours, stored = {"": ours}, {"": stored}
        assert ours.keys() == stored.keys(), f"{what}: {sorted(ours.keys() ^ stored.keys())} on one side only"
        worst, where, sizes = -1.0, "", []
        for name, b in stored.items():
            a, b = (torch.as_tensor(v, dtype=torch.float64).detach() for v in (ours[name], b))
            assert a.shape == b.shape, f"{what} {name}: shape {tuple(a.shape)}, stored {tuple(b.shape)}"
            sizes.append(b.abs().max().item())
            error = (a - b).abs().max().item() / max(sizes[-1], floor, 1e-300)
            if not error <= worst:  # a NaN is the worst
                worst, where = error, name
            if worst != worst:
                break
        numbers = sum(torch.as_tensor(b).numel() for b in stored.values())
        rows.append((what, numbers, float(b) if numbers == 1 else max(sizes), worst, tol))
        assert worst <= tol, f"{what} {where}: error {worst:.2e} of the largest entry, allowed {tol:.0e}"

    return check


def pytest_terminal_summary(terminalreporter, config):
    """With -v, what was compared with the authors' numbers, and how close it came."""
    if config.get_verbosity() < 1:
        return
    reports = [r for outcome in ("passed", "failed") for r in terminalreporter.getreports(outcome)]
    tests = [(r.nodeid.split("::")[-1], rows) for r in reports for k, rows in r.user_properties if k == "golden"]
    if tests:
        terminalreporter.section("the authors' numbers")
    for test, rows in tests:
        terminalreporter.write_line(f"{test}\n  {'':38} numbers  largest, or the number    error  allowed")
        for what, numbers, value, error, tol in rows:
            terminalreporter.write_line(f"  {what:38} {numbers:7} {value:23.10g} {error:8.1e} {tol:8.0e}")
