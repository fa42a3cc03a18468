"""Two processes on the CPU: the same run as one process. Started by torchrun, this file is that run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from processes import ROOT, TWO, python

LAUNCH = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]
CPU2 = ["-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu2.yaml"]
DMD2 = ["--method", "dmd2", "--teacher", "digits"]  # flags of recipes/train.py
STEPS = 12
CASES = {  # name: method, adapters, accumulation
    f"{method} {'lora' if lora else 'full'} x{rounds}": (method, lora, rounds)
    for method in ("sid", "dmd2", "vsd", "lcd", "scm")
    for lora in (False, True)
    for rounds in (1, 2)
} | {f"{method} full x1": (method, False, 1) for method in ("nct", "f-distill")}
QUICK = (  # every method once, and every pair of adapters, rounds and kind of process group
    *("sid full x1", "dmd2 lora x2", "vsd full x2", "lcd lora x1", "scm full x1"),
    *("nct full x1", "f-distill full x1"),
)
CHOSEN = [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


def run(accelerator, case):
    """Every tensor after the last step, and the logs of every step averaged over processes; the samples seen."""
    from test_trainer import METHODS, config, nets_of, vectors

    from distill.methods import NCT, FDistill
    from distill.networks.lora import LoRA
    from distill.sharding import gather_full_tensor
    from distill.training.config import FakeConfig, StudentConfig
    from distill.training.loop import train

    name, lora, rounds = CASES[case]
    adapter = LoRA(4, 8.0, ("mid", "last")) if lora else LoRA()
    student = StudentConfig(times=(1.0, 0.5), lora=adapter)
    more = {"nct": NCT(), "f-distill": FDistill(every=1, taps=("mid",), unit_mean=True)}
    method = (METHODS | more)[name]
    method = replace(method, huber_c=0.1) if name == "lcd" else method  # |delta| amplifies rounding
    nets, shares, found, logs = nets_of(method, student=student, fake=FakeConfig(adapter)), [], {}, {}
    nets.teacher.blocks = ("Linear", "Embedding")
    for p in (p for net in nets.modules().values() for p in net.parameters() if p.requires_grad):
        p.data += accelerator.process_index  # all start from the weights of the first process

    def data(draw):
        shares.append(draw.samples)
        return vectors(draw)

    cfg = config(max_train_steps=STEPS, gradient_accumulation_steps=rounds, max_grad_norm=1.0, adam_epsilon=1e-2)
    for state in train(method, nets, data, cfg, accelerator):
        for key, value in state.logs.items():
            logs.setdefault(key, []).append(accelerator.reduce(value.detach().clone(), "mean"))
    found |= {key: torch.stack(values) for key, values in logs.items()}
    for role, net in {**nets.modules(), "ema": state.ema.net}.items():
        found |= {f"{role}.{key}": gather_full_tensor(p) for key, p in net.named_parameters()}
    found["samples"] = torch.cat(shares[:rounds])
    return {f"{case} {key}": value.detach().clone() for key, value in found.items()}


@cache
def alone(case):
    from accelerate import Accelerator

    return {key.removeprefix(case): value for key, value in run(Accelerator(cpu=True), case).items()}


def equal_after_shortage(accelerator):
    """Memory runs out on one process alone: both go on with half the micro-batch, as if they had begun with it."""
    from test_trainer import METHODS, config, everything, nets_of, vectors

    from distill.training.loop import train

    def scarce(draw):
        if accelerator.process_index == 1 and draw.player == "student" and len(draw.samples) > 2:
            raise torch.OutOfMemoryError
        return vectors(draw)

    ends = []
    for data, rounds in ((scarce, None), (vectors, 2)):
        cfg = config(gradient_accumulation_steps=rounds)
        *_, state = train(METHODS["sid"], nets_of(METHODS["sid"]), data, cfg, accelerator)
        ends.append(everything(state))
    return all(torch.equal(ends[0][key], value) for key, value in ends[1].items())


def main(folder, cases):
    from accelerate import Accelerator
    from safetensors.torch import save_file
    from sharded import sharded

    from distill.training.watchdog import Agreement

    torch.set_num_threads(1)
    accelerator = Accelerator()
    assert accelerator.num_processes == 2 and accelerator.device.type == "cpu"
    agree = Agreement(accelerator)
    assert [agree(number if accelerator.process_index else 0) for number in (0, 15, 0)] == [0, 15, 0]
    assert equal_after_shortage(accelerator)
    for mode in ("ddp", "fsdp"):
        tensors = {key: value for case in cases for key, value in run(accelerator, case).items()}
        save_file(tensors, f"{folder}/{mode}{accelerator.process_index}.safetensors")
        sharded(accelerator)
    accelerator.end_training()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """two(case, mode) -> what each of two processes ended with, replicated or sharded."""
    from safetensors.torch import load_file

    @cache
    def group(quick):
        folder = tmp_path_factory.mktemp("ranks")
        python(*TWO, __file__, folder, *(case for case in CASES if (case in QUICK) == quick))
        return {mode: [load_file(folder / f"{mode}{rank}.safetensors") for rank in (0, 1)] for mode in ("ddp", "fsdp")}

    def get(case, mode):
        ranks = group(case in QUICK)[mode]
        return [{k.removeprefix(case): v for k, v in rank.items() if k.startswith(case)} for rank in ranks]

    return get


@pytest.mark.parametrize("mode", ("ddp", "fsdp"))
@pytest.mark.parametrize("case", CHOSEN)
def test_two_processes_equal_one(two, case, mode):
    """All weights after the last step to 1e-6 of their size, float32, and so the losses of all steps.

    Those of a student are small differences, divided by small numbers: 3e-6. Each process makes its
    own half of the batch; weights, averages and logs of both are the same bits.
    """
    (first, second), one = two(case, mode), alone(case)
    assert one.keys() == first.keys() == second.keys()
    assert (first.pop(" samples").tolist(), second.pop(" samples").tolist()) == ([0, 1, 2, 3], [4, 5, 6, 7])
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
        if key in (" student/h_low", " student/h_high"):  # the extremes of each half
            continue
        tol = 3e-6 if key.startswith(" student/") else 1e-6
        assert (value - one[key]).norm() <= tol * one[key].norm() + 1e-7, key


def logged(folder):
    """The log of a finished run, without its seconds."""
    assert (folder / "pipeline" / "model_index.json").is_file() and (folder / "config.yaml").is_file()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The log of a smoke run, by plain python."""
    from recipes import train

    folder = tmp_path_factory.mktemp("plain")
    train.main([*DMD2, "--smoke", "--output_dir", f"{folder}"])
    assert [line["step"] for line in logged(folder)] == [1, 2]
    return logged(folder)


@pytest.mark.parametrize(
    "launcher",
    (pytest.param(LAUNCH, id="accelerate launch", marks=pytest.mark.slow), pytest.param(CPU2, id="two processes")),
)
def test_a_recipe_by_every_launcher(plain, launcher, tmp_path):
    """The log is the same; that of two processes is of the whole batch, not of one half."""
    python(*launcher, ROOT / "recipes" / "train.py", *DMD2, "--smoke", "--output_dir", tmp_path)
    for line, other in zip(plain, logged(tmp_path), strict=True):
        assert other == pytest.approx(line, rel=1e-4)


def test_processes_without_a_gpu_know_each_other():
    """Left alone, accelerate would make two whole runs of them, in one folder: a batch of 8 would be 1 x 8."""
    flags = ["--smoke", "--gradient_accumulation_steps", "8"]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT}/tests/support",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "0",
    }
    command = [sys.executable, *CPU2, ROOT / "recipes" / "train.py", *DMD2, *flags]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "train_batch_size 8 is not divisible by 2 process(es) x 8" in done.stderr


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
