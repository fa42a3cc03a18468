"""benchmarks/sdxl.py runs on a narrow network: same loop, no text encoder, no autoencoder, one read of the device."""

import json

import pytest
import torch

from benchmarks import sdxl
from pipelines.families import tiny


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """(folder, its JSON) of a run over two cases."""
    folder = tmp_path_factory.mktemp("bench")
    chosen = ("DMD2 LoRA, prompts alone", "SiD full")
    sdxl.main(sdxl.Bench(tiny=True, output=folder, only=chosen, cycles=1, rank=2))
    return folder, json.loads((folder / "sdxl.json").read_text())


def test_what_is_measured(bench):
    _, found = bench
    assert [r["name"] for r in found["results"]] == ["DMD2 LoRA, prompts alone", "SiD full"] and not found["failed"]
    for result in found["results"]:
        assert result["student_step"] > 0 and result["tflops"] > 0
        assert result["share"] == pytest.approx(result["tflops"] / found["peak"])
    assert [r["fake_step"] is None for r in found["results"]] == [False, True]  # SiD moves both in every step


def test_the_page_names_the_hardware(bench):
    folder, found = bench
    page = (folder / "sdxl.md").read_text()
    assert found["hardware"] == sdxl.hardware() and found["hardware"] in page
    assert "no figure of SDXL" in page  # of a narrow network


def test_only_the_unet_runs(bench):
    parts = {"Transformer2DModel"}  # of it
    for result in bench[1]["results"]:
        assert set(result["modules"]) - parts == {"UNet2DConditionModel"}


def test_the_loop_reads_few_numbers(bench):
    """An update looks whether its gradient is finite, a generation at its input's scale; nothing else."""
    dmd2, sid = (r["host_reads"] for r in bench[1]["results"])
    assert dmd2 <= 6 / 5 + 1  # six updates in five steps
    assert sid <= 2 + 2


@pytest.mark.parametrize("part", (tiny.clip, tiny.vae))
def test_an_encoder_in_the_loop_is_an_error(part):
    inputs = {tiny.clip: torch.zeros(1, 3, dtype=torch.long), tiny.vae: torch.zeros(1, 3, 16, 16)}
    with sdxl.ran(), pytest.raises(AssertionError, match="runs in the loop: text and latents are to be cached"):
        part()(inputs[part])


@pytest.mark.parametrize("part", ("vae", "text_encoder"))
def test_there_is_none_to_call(part):
    teacher, _, _ = sdxl.roles(sdxl.cases()["SiD full"], sdxl.Bench(tiny=True), "meta")
    with pytest.raises(ValueError, match=f"there is no {part}"):
        teacher.parts.component(part)


def test_cases_take_one_saving_away():
    """The cases that differ in one saving from the best."""
    cases = sdxl.cases()
    best = cases["DMD2 LoRA"]
    assert best.lora and best.half and best.checkpointing and best.method.share and best.method.walk
    for name in ("float32", "blocks kept", "two fake passes", "new samples each step"):
        assert cases[f"DMD2 LoRA, {name}"] != best


def test_full_size_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(sdxl, "device", lambda: "cpu")
    with pytest.raises(SystemExit, match="--tiny runs a narrow network"):
        sdxl.main(sdxl.Bench())
    with pytest.raises(SystemExit, match="no case"):
        sdxl.main(sdxl.Bench(tiny=True, only=("DMD3",)))
