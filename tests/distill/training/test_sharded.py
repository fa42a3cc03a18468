"""Sharded runs: their checkpoints, resumed in every other form; export; what is refused. torchrun runs it too."""

import importlib
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from processes import TWO, python
from safetensors.torch import load_file, save_file
from sharded import sharded
from test_trainer import METHODS, config, nets_of, vectors

from distill import sharding
from distill.data import Digits
from distill.networks.lora import LoRA
from distill.training import checkpoint, precision
from distill.training.config import FakeConfig, StudentConfig
from distill.training.loop import train
from distill.training.prepare import validate_launch

CASES = ("sid", "dmd2", "lcd")  # with a head; with a target
MODES = ("whole", "parts")
CUT, END = 3, 6
SMOKE = "--smoke --adam_epsilon 0.01 --train_batch_size 4"


def run(name, accelerator, last, folder=None, resume=None, lora=False):
    """All weights at the end, whole; checkpoints on the way."""
    adapter = LoRA(4, 8.0, ("mid", "last")) if lora else LoRA()
    method = replace(METHODS[name], huber_c=0.1) if name == "lcd" else METHODS[name]
    student = StudentConfig(times=(1.0, 0.5), lora=adapter)
    nets = nets_of(method, student=student, fake=FakeConfig(adapter))
    nets.teacher.blocks = ("Linear",)
    cfg = config(max_train_steps=last, adam_epsilon=1e-2, max_grad_norm=1.0)
    for state in train(method, nets, vectors, cfg, accelerator, resume):
        if folder and state.step == CUT:
            with checkpoint.Saver(folder) as saver:
                saver.save(state)
    moments = {
        f"{player}.{i}.{key}": sharding.gather_full_tensor(value)
        for player, optimizer in state.optimizers.items()
        for i, p in enumerate(optimizer.param_groups[0]["params"])
        for key, value in optimizer.state[p].items()
    }
    roles = {**state.nets.modules(), "ema": state.ema.net}
    named = {
        f"{role}.{key}": sharding.gather_full_tensor(p)
        for role, net in roles.items()
        for key, p in net.named_parameters()
    }
    return {key: value.detach().clone() for key, value in (named | moments).items()}


def recipe(folder, launched, name="dmd2", *flags):
    """A smoke run with its export. Gradients are not divided by their own size: that amplifies rounding."""
    from pipelines import run
    from recipes.digits import TABLE

    run.start_accelerator = launched
    config = TABLE[name].config if name in TABLE else importlib.import_module(f"recipes.{name}").CONFIG
    run.main(config, [*SMOKE.split(), "--output_dir", f"{folder}", *flags])


def launched(**options):
    return sharded(Accelerator(cpu=True, **options))


def interrupted(folder):
    """The same, but the second process is told to end in the first step: both end together."""
    right, rank = Digits.__call__, int(os.environ["RANK"])

    def call(data, draw):
        if (draw.step, draw.player, rank) == (0, "student", 1):
            signal.raise_signal(signal.SIGTERM)
        return right(data, draw)

    Digits.__call__ = call
    try:
        recipe(folder, launched)
        status = 0
    except SystemExit as error:
        status = error.code
    assert status == (0 if rank else 143)  # the first one says why it ends, the launcher ends the others


def saved(folder, name):
    return folder / name / f"checkpoint-{CUT}"


def main(folder):
    """On two processes: as replicas and in parts, from the start and from what one process and each form left."""
    torch.set_num_threads(1)
    accelerator, found = Accelerator(), {}
    for mode in MODES:
        if mode == "parts":
            sharded(accelerator)
        for name in CASES:
            main_writes = folder / mode / name if mode == "parts" or accelerator.is_main_process else None
            found[f"{mode} {name}"] = run(name, accelerator, END, main_writes)
            accelerator.wait_for_everyone()
            for other in ("one", *MODES):
                if (saved(folder / other, name) / "state.json").exists():
                    again = run(name, accelerator, END, resume=saved(folder / other, name))
                    found[f"{mode} {name} from {other}"] = again
    tensors = {f"{case}|{key}": value for case, values in found.items() for key, value in values.items()}
    save_file(tensors, f"{folder}/rank{accelerator.process_index}.safetensors")
    recipe(folder / "recipe", launched)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(folder, what two processes ended with, what one did)."""
    folder = tmp_path_factory.mktemp("sharded")
    one = {name: run(name, Accelerator(cpu=True), END, folder / "one" / name) for name in CASES}
    python(*TWO, __file__, folder)
    found = load_file(folder / "rank0.safetensors")
    return folder, lambda case: {k.partition("|")[2]: v for k, v in found.items() if k.partition("|")[0] == case}, one


def close(a, b):
    return a.keys() == b.keys() and all((a[k] - b[k]).norm() <= 1e-6 * b[k].norm() + 3e-7 for k in a)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", MODES)
def test_resumed_is_uninterrupted(two, mode, name):
    """On two processes, bit for bit: weights, averages and moments."""
    _, of, _ = two
    there, again = of(f"{mode} {name}"), of(f"{mode} {name} from {mode}")
    assert there.keys() == again.keys() and len(there) > 10
    assert all(torch.equal(value, again[key]) for key, value in there.items())


@pytest.mark.parametrize("name", CASES)
def test_resumed_in_another_form(two, name):
    """One process, two, and two with parts go on from each other's checkpoints, to 1e-6."""
    folder, of, one = two
    for mode in MODES:
        assert close(of(f"{mode} {name} from one"), one[name])
        assert close(run(name, Accelerator(cpu=True), END, resume=saved(folder / mode, name)), one[name])
    assert close(of(f"parts {name} from whole"), one[name])


def test_what_a_sharded_checkpoint_is(two):
    """Every process has written its parts; torch.distributed.checkpoint reads them; damage of one is seen."""
    from torch.distributed import checkpoint as dcp

    folder, _, _ = two
    parts, whole = saved(folder / "parts", "dmd2"), saved(folder / "one", "dmd2")
    shards = ["shard-00001-of-00002.safetensors", "shard-00002-of-00002.safetensors"]
    assert sorted(file.name for file in (parts / "student").iterdir()) == shards
    assert sorted(p.name for p in parts.iterdir()) == sorted([*(p.stem for p in whole.glob("*.saf*")), "state.json"])
    assert checkpoint.find_corruption(parts) is None and not list(parts.parent.glob(".*"))
    expected = load_file(whole / "student.safetensors")
    found = {key: torch.zeros_like(value) for key, value in expected.items()}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(f"{parts / 'student'}"), no_dist=True)
    assert close(found, expected)
    file = parts / "optimizer_fake" / shards[1]
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    assert "optimizer_fake/shard-00002-of-00002.safetensors is truncated" in checkpoint.find_corruption(parts)
    file.write_bytes(data)


def test_another_run_starts_from_it(two):
    """--student.init with a folder of parts: the average, as it was."""
    folder, _, _ = two
    init = StudentConfig(times=(1.0, 0.5), init=f"{saved(folder / 'parts', 'sid')}")
    net = nets_of(METHODS["sid"], student=init).student.denoiser.net
    assert close(dict(net.named_parameters()), load_file(saved(folder / "one", "sid") / "ema.safetensors"))


def is_pipeline_of_one_process(folder, tmp_path, monkeypatch):
    """Checkpoint, log, sample grid and an exported pipeline, which is that of the run of one process."""
    from pipelines import run

    monkeypatch.setattr(run, "start_accelerator", run.start_accelerator)
    recipe(tmp_path, lambda **options: Accelerator(cpu=True, **options))
    ours, theirs = (at / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors" for at in (folder, tmp_path))
    assert close(load_file(ours), load_file(theirs))
    for name in ("samples/step-000002.png", "checkpoint-2/state.json", "log.jsonl", "pipeline/README.md"):
        assert (folder / name).is_file() and (tmp_path / name).is_file()
    assert (folder / "checkpoint-2" / "ema" / "shard-00002-of-00002.safetensors").is_file()


def test_the_pipeline_of_a_sharded_run(two, tmp_path, monkeypatch):
    is_pipeline_of_one_process(two[0] / "recipe", tmp_path, monkeypatch)


@pytest.mark.slow
def test_a_sharded_run_goes_on_after_a_signal(tmp_path, monkeypatch):
    """The second process was told to end in the first step."""
    folder = tmp_path / "two"
    python(*TWO, __file__, folder, "interrupted")
    assert [f.name for f in checkpoint.list_intact_checkpoints(folder)] == ["checkpoint-1"]
    python(*TWO, __file__, folder, "dmd2", "--resume_from_checkpoint", "latest")
    is_pipeline_of_one_process(folder, tmp_path / "one", monkeypatch)


@pytest.mark.slow
def test_parts_on_every_node_and_copies_across(tmp_path):
    """Four processes, two copies of two parts: the run of one process, and a checkpoint that it goes on from."""
    python(*TWO[:-1], "4", __file__, tmp_path, "hybrid")
    one = run("sid", Accelerator(cpu=True), END)
    assert close(load_file(tmp_path / "weights.safetensors"), one)
    there = saved(tmp_path, "")
    assert len([*(there / "student").iterdir()]) == 2 and checkpoint.find_corruption(there) is None
    assert close(run("sid", Accelerator(cpu=True), END, resume=there), one)


@pytest.mark.slow
def test_a_unet_with_recomputed_blocks(tmp_path, monkeypatch):
    """SDXL's, tiny: recomputation, features of the middle, four steps, and two texts; the pipeline of one process."""
    from pipelines import run

    python(*TWO, __file__, tmp_path / "two", "dmd2_sdxl")
    monkeypatch.setattr(run, "start_accelerator", run.start_accelerator)
    recipe(tmp_path / "one", lambda **options: Accelerator(cpu=True, **options), "dmd2_sdxl")
    ours, theirs = (tmp_path / n / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors" for n in ("two", "one"))
    ours, theirs = load_file(ours), load_file(theirs)
    assert all((ours[key] - theirs[key]).norm() <= 1e-5 * theirs[key].norm() + 1e-7 for key in theirs)


# ---- what is asked for ----


@pytest.fixture
def alone():
    yield Accelerator(cpu=True)
    Accelerator._shared_state = {}
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    assert not PartialState._shared_state


def test_version_one_is_refused(alone):
    with pytest.raises(ValueError, match="fsdp_version is 1; it must be 2: .*--fsdp_version 2"):
        validate_launch(config(), sharded(alone, fsdp_version=1))


def test_offloading_is_refused(alone):
    with pytest.raises(ValueError, match="fsdp_offload_params is on; it must be false"):
        validate_launch(config(), sharded(alone, cpu_offload=True))


def test_a_replicated_teacher_is_for_sharded_runs(alone):
    with pytest.raises(ValueError, match="replicate_teacher is for sharded runs"):
        validate_launch(config(replicate_teacher=True), alone)
    validate_launch(config(replicate_teacher=True), sharded(alone))


def test_8_bit_moments_are_not_sharded(alone):
    with pytest.raises(ValueError, match="adamw8bit cannot be sharded"):
        validate_launch(config(optimizer="adamw8bit"), sharded(alone))


def test_deterministic(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    try:
        precision.deterministic()
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


if __name__ == "__main__":
    if sys.argv[2:]:
        torch.set_num_threads(1)
        if sys.argv[2] == "hybrid":
            found = run("sid", accelerator := sharded(replicas=2), END, Path(sys.argv[1]))
            if accelerator.is_main_process:
                save_file(found, f"{sys.argv[1]}/weights.safetensors")
            sys.exit()
        if sys.argv[2] == "interrupted":
            interrupted(Path(sys.argv[1]))
            sys.exit()
        recipe(Path(sys.argv[1]), launched, *sys.argv[2:])
    else:
        main(Path(sys.argv[1]))
