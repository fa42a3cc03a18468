"""benchmarks/gpu.py: its checks see what is wrong, a row that fails stops no other, and what was measured is kept."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks import gpu, sdxl

TINY = gpu.Bench(tiny=True)


@pytest.fixture(autouse=True)
def engine():
    """The script asks accelerate for bfloat16, too; tests after these have the first precision again."""
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    monkeypatch.setattr(gpu, "BATCH", 16)


def test_devices_that_agree_and_devices_that_do_not(monkeypatch):
    """On one device float32 agrees to the bit and bfloat16 nearly; a gradient that is off by a hundredth is seen."""
    row = gpu.compare_gradients("DMD2", "cpu")
    assert row.fault is None and row.figures["gradient, float32"] == "0.0e+00"
    assert 1e-4 < float(row.figures["gradient, bfloat16"]) < 0.1
    exact = gpu.gradients

    def another_device(method, place, precision):
        found = exact(method, "cpu", precision)
        return {player: (loss, 1.01 * g) if place == "cuda" else (loss, g) for player, (loss, g) in found.items()}

    monkeypatch.setattr(gpu, "gradients", another_device)
    assert gpu.compare_gradients("VSD", "cuda").fault == "float32 exceeds the limits (0.0001, 0.001)"


def test_a_nan_is_no_agreement(monkeypatch):
    nan = {"student": (torch.tensor(0.5), torch.tensor([1.0, float("nan")]))}
    fine = {"student": (torch.tensor(0.5), torch.tensor([1.0, 2.0]))}
    monkeypatch.setattr(gpu, "gradients", lambda method, place, *_: fine if place == "cpu" else nan)
    row = gpu.compare_gradients("LCD", "cuda")
    assert row.fault and row.figures["gradient, float32"] == "nan"


@pytest.mark.slow
def test_the_rehearsal(tmp_path, monkeypatch, capsys):
    """Waits and a resumed run; a row that breaks is named and the next ones run; the exit status tells of it."""
    one = [row for row in gpu.rows(TINY, "cpu") if row[:2] in {("waits", "SiD"), ("resume", "DMD2")}]
    broken = ("waits", "LCD", lambda: 1 / 0)
    monkeypatch.setattr(gpu, "rows", lambda cfg, place: [broken, *one])
    assert gpu.main(gpu.Bench(tiny=True, output=tmp_path)) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    verdicts = {(row["section"], row["name"]): row["fault"] for row in found["rows"]}
    assert verdicts.pop(("waits", "LCD")) == "ZeroDivisionError: division by zero"
    assert verdicts == {("waits", "SiD"): None, ("resume", "DMD2"): None}
    assert next(r for r in found["rows"] if r["name"] == "DMD2")["figures"]["differ"] == "0"
    page = (tmp_path / "gpu.md").read_text()
    assert "A rehearsal on narrow networks" in page and "| LCD | - | - | ZeroDivisionError: division by zero |" in page
    assert sdxl.hardware() in page and capsys.readouterr().out == page


@pytest.mark.slow
def test_a_resumed_run_that_differs_is_a_fault(monkeypatch):
    trained = gpu.train_until

    def another(last, method, place, resume=None):
        state = trained(last, method, place, resume)
        if resume is not None:
            next(state.nets.student.denoiser.net.parameters()).data += 1e-6
        return state

    monkeypatch.setattr(gpu, "train_until", another)
    assert gpu.compare_resume("VSD", "cpu").fault.startswith("1 of ")


def test_time_is_kept(tmp_path):
    """The rows that were not reached are named."""
    with pytest.raises(SystemExit, match="no section"):
        gpu.main(gpu.Bench(tiny=True, output=tmp_path, only=("speed",)))
    clock = iter([0.0, 0.0, 1.0, 700.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu.time, "monotonic", lambda: next(clock))
        patch.setattr(gpu, "rows", lambda *_: [("waits", n, lambda n=n: gpu.Row("waits", n)) for n in ("A", "B")])
        assert gpu.main(gpu.Bench(tiny=True, output=tmp_path)) == 0
    assert "Not reached in time: waits of B." in (tmp_path / "gpu.md").read_text()


def test_the_order_and_the_place(monkeypatch):
    """Agreement comes first and SXDL last; without a GPU nothing is written into docs."""
    sections = [section for section, *_ in gpu.rows(gpu.Bench(), "cuda")]
    assert list(dict.fromkeys(sections)) == list(gpu.HEADERS) and sections.count("agreement") == 5
    monkeypatch.setattr(sdxl, "device", lambda: "cpu")
    with pytest.raises(SystemExit, match="--tiny rehearses on the CPU"):
        gpu.main(gpu.Bench())
