"""Two processes on the CPU: the same run as one process. Started by torchrun, this file is that run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LAUNCH = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]
CPU2 = ["-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu2.yaml"]
STEPS = 5


def python(*command, env=None):
    """Run in a process of its own; what it prints is shown where it fails."""
    env = os.environ | {"ACCELERATE_USE_CPU": "1", "PYTHONPATH": f"{ROOT}"} | (env or {})
    done = subprocess.run([sys.executable, *map(str, command)], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def run(accelerator):
    """Every tensor after some steps of each method, the logs of every step averaged over processes, and shapes seen."""
    from test_trainer import METHODS, config, nets_of, roles, vectors

    from distill.trainer import train

    found = {}
    for name in ("dmd2", "sid"):
        nets, shares = nets_of(METHODS[name]), []
        for p in (p for net in nets.modules().values() for p in net.parameters()):
            p.data += accelerator.process_index  # all start from the weights of the first process

        def data(draw, shares=shares):
            shares.append(draw.samples)
            return vectors(draw)

        cfg = config(max_train_steps=STEPS, gradient_accumulation_steps=2, max_grad_norm=1.0, adam_epsilon=1e-2)
        for state in train(METHODS[name], nets, data, cfg, accelerator):
            for key, value in state.logs.items():
                found[f"{name} step {state.step} {key}"] = accelerator.reduce(value.detach().clone(), "mean")
        found |= {f"{name} {role}.{key}": w for role, net in roles(nets).items() for key, w in net.items()}
        found |= {f"{name} ema.{key}": w for key, w in state.ema.net.named_parameters()}
        found[f"samples {name}"] = torch.cat(shares[:2])
    return {key: value.detach().clone() for key, value in found.items()}


def main(folder):
    from accelerate import Accelerator
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    accelerator = Accelerator()
    assert accelerator.num_processes == 2 and accelerator.device.type == "cpu"
    save_file(run(accelerator), f"{folder}/rank{accelerator.process_index}.safetensors")
    accelerator.end_training()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes ended with."""
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("ranks")
    python(*TWO, __file__, folder)
    return [load_file(folder / f"rank{rank}.safetensors") for rank in (0, 1)]


def test_replicas_are_equal(ranks):
    """Each process makes its own half of the batch; weights, averages and logs of both are the same bits."""
    first, second = ranks
    assert first.keys() == second.keys()
    for key, value in first.items():
        if key.startswith("samples"):
            assert (value.tolist(), second[key].tolist()) == ([0, 1, 2, 3], [4, 5, 6, 7])
        else:
            assert torch.equal(value, second[key]), key


def test_two_processes_equal_one(ranks):
    """All weights after the last step to 1e-6 of their size, float32; the losses of every step to 1e-5.

    A score gap is a small difference: it has fewer digits than the two scores.
    """
    from accelerate import Accelerator

    one = run(Accelerator(cpu=True))
    assert one.keys() == ranks[0].keys()
    for key, value in one.items():
        if not key.startswith("samples"):
            tol = 1e-5 if " step " in key else 1e-6
            assert (value - ranks[0][key]).norm() <= tol * value.norm() + 1e-9, key


def logged(folder):
    """The log of a finished run, without its seconds."""
    assert (folder / "pipeline" / "model_index.json").is_file() and (folder / "config.yaml").is_file()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The log of a recipe's smoke run, by plain python."""
    from recipes import dmd2_digits

    folder = tmp_path_factory.mktemp("plain")
    dmd2_digits.main(dmd2_digits.CONFIG, ["--smoke", "--output_dir", f"{folder}"])
    assert [line["step"] for line in logged(folder)] == [1, 2]
    return logged(folder)


@pytest.mark.parametrize("launcher", (LAUNCH, CPU2), ids=("accelerate launch", "two processes"))
def test_a_recipe_by_every_launcher(plain, launcher, tmp_path):
    """The log is the same; that of two processes is of the whole batch, not of one half."""
    python(*launcher, ROOT / "recipes" / "dmd2_digits.py", "--smoke", "--output_dir", tmp_path)
    for line, other in zip(plain, logged(tmp_path), strict=True):
        assert other == pytest.approx(line, rel=1e-4)


def test_processes_without_a_gpu_know_each_other():
    """Left alone, accelerate would make two whole runs of them, in one folder: a batch of 8 would be 1 x 8."""
    flags = ["--smoke", "--gradient_accumulation_steps", "8"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "0"}
    command = [sys.executable, *CPU2, ROOT / "recipes" / "dmd2_digits.py", *flags]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "train_batch_size 8 is not divisible by 2 process(es) x 8" in done.stderr


if __name__ == "__main__":
    main(sys.argv[1])
