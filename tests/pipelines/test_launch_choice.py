"""The precision of a run where nothing was said, and what a run says about its batch and precision."""

from types import SimpleNamespace

import pytest
import torch

from distill.training.config import TrainConfig
from pipelines import launch
from recipes import train


@pytest.mark.parametrize(
    ("flag", "passed", "line", "gpu", "want"),
    [
        ("no", "bf16", "", True, "no"),  # the flag decides
        ("bf16", None, "", False, "bf16"),
        (None, None, "", True, "bf16"),  # plain python
        (None, None, "", False, "no"),
        (None, "bf16", "", False, None),  # accelerate has it from its line or file
        (None, "no", "accelerate launch --cpu x.py", True, "bf16"),  # accelerate passes "no" where nothing was said
        (None, "no", "accelerate launch --mixed_precision no x.py", True, None),
        (None, "no", "accelerate launch --config_file f.yaml x.py", True, None),
    ],
)
def test_choose_precision(flag, passed, line, gpu, want, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", passed or "")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if passed is None:
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert all(isinstance(word, str) for word in launch.launcher_words() or ())
    monkeypatch.setattr(launch, "launcher_words", line.split)
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", f"{tmp_path / 'none'}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu)
    precision, reason = launch.choose_precision(flag)
    assert precision == want and reason


def test_report_batch(capsys):
    engine = SimpleNamespace(num_processes=2, mixed_precision="bf16", is_main_process=True)
    cfg = TrainConfig(train_batch_size=64, gradient_accumulation_steps=4)
    launch.report_batch(cfg, engine, "--mixed_precision")
    assert capsys.readouterr().err == (
        "8 image(s) in a micro-batch x 4 micro-batch(es) x 2 process(es) = 64 images an update; precision bfloat16 "
        "(--mixed_precision)\n"
    )


def test_no_sample_fits(tmp_path, monkeypatch, capsys):
    """A run whose first iteration has no room for one sample says which launch line needs less memory."""

    def backward(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("distill.training.loop.Trainer.backward", backward)
    with pytest.raises(SystemExit) as stop:
        train.main(["--method", "sid", "--teacher", "digits", "--smoke", "--output_dir", f"{tmp_path / 'run'}"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "8 image(s) in a micro-batch x 1 micro-batch(es) x 1 process(es) = 8 images" in said
    assert "one sample in a micro-batch (CUDA out of memory)" in said and "This fits:\n  accelerate launch" in said
