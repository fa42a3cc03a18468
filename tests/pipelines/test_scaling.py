"""The arithmetic of many GPUs: counted traffic against torch's own sharding, closed forms, and the document's tables.

Started as a program, this file shards tiny networks with fully_shard over eight processes of which it is one (the
others' answers are made up by torch's fake group) and compares the collectives of each update.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distill.configuration import Config
from distill.data import Digits
from distill.methods import DMD2, SiD
from distill.training.config import StudentConfig, TrainConfig
from pipelines.families import tiny
from pipelines.planning import flop_counter
from pipelines.planning.cluster_plan import Layout, Machine, layouts, main
from pipelines.planning.memory_plan import Run
from pipelines.planning.models import Meta

ROOT = Path(__file__).resolve().parents[2]
METHODS = (DMD2(guidance=1.0, every=1, gan=0.0, gan_fake=0.0), SiD(kappa=(1.0, 1.0, 1.0, 1.0)))


def shard(folder):
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from distill.random import Draw
    from distill.training import precision
    from distill.training.build import build
    from distill.training.step import set_trainable
    from pipelines import load

    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    mesh = init_device_mesh("cpu", (8,))
    for recompute, method in [(False, METHODS[0]), (False, METHODS[1]), (True, METHODS[1])]:
        teacher = load(folder)
        c = teacher.encode(["a fox"])
        nets = build(method, teacher.denoiser, teacher.shape, c)
        networks = [nets.teacher.net.requires_grad_(False), *nets.modules().values()]
        if recompute:
            precision.recompute(nets)
        for net in networks:
            for unit in (*flop_counter.units(net), net):
                fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        owners = {role: list(net.parameters()) for role, net in nets.modules().items()}
        for update in method.updates():
            set_trainable(owners, update.player)
            draw, shards = Draw(0, 1, update.player, torch.zeros(1, dtype=torch.long)), flop_counter.Shards(*networks)
            with CommDebugMode() as seen:
                with torch.set_grad_enabled(update.player == "student"):
                    x = method.sample(nets, {"c": dict(c)}, draw)
                loss, _ = update.loss(x, nets, {"c": dict(c)}, draw)
                shards.backward = True
                loss.backward()
            for handle in shards.handles:
                handle.remove()
            for role, params in owners.items():
                assert all((p.grad is not None) == (role == update.player) for p in params), (method, update.player)
                for p in params:
                    p.grad = None
            real = {str(kind): n for kind, n in seen.get_comm_counts().items()}
            assert real.keys() == {"c10d._allgather_base_", "c10d._reduce_scatter_base_"}
            assert sum(real.values()) == shards.traffic.collectives, (method, update.player, real, shards.traffic)
            sizes = sum(p.numel() for p in owners[update.player])
            assert shards.traffic.reduced == sizes
            assert real["c10d._reduce_scatter_base_"] == 1 + len(flop_counter.units(nets.teacher.net))


@pytest.mark.slow
def test_collectives_are_those_of_torch(folder):
    """Every all-gather and reduce-scatter of FSDP2, with and without recomputed blocks; every gradient arrives."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests/support"}
    command = [sys.executable, __file__, f"{folder}"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    tiny.save("sdxl", folder)
    return folder


def one(folder, method=METHODS[0], **student):
    train = TrainConfig(train_batch_size=1, ema_half_life=0)
    return Run(Config(method, Digits(), student=StudentConfig(**student), train=train), Meta.from_folder(folder))


@pytest.fixture(scope="module")
def run(folder):
    return one(folder)


def test_traffic_by_hand(run, folder):
    """With P parameters: three forward and a backward pass of DMD2's student, one and one of its fake score; SiD's
    gradient returns through teacher and fake score too. Four steps take 2.5 calls on average."""
    P, _ = run.parameters["teacher"]
    assert run.cost.traffic[:2] == (6 * P, 2 * P)
    assert one(folder, METHODS[1]).cost.traffic[:2] == (9 * P, 2 * P)
    assert one(folder, steps=4).cost.traffic[:2] == (7.5 * P, 2 * P)


def test_seconds_by_hand(run):
    """Of DDP and of sharded parts, replicated on two nodes."""
    P, _ = run.parameters["teacher"]
    m = Machine(peak=1.0, share=0.5, hbm=1.0, nvlink=4.0, network=0.25, wire=1.0, hop=0.0)
    ddp = Layout(run, m, 32, 16, micro=2)
    assert ddp.global_batch == 32 and ddp.rounds == 1 and ddp.flops == 2 * run.cost.flops
    sent = 2 * 15 / 16 * 4 * 2 * P  # a ring's all-reduce of two players, float32
    assert ddp.communication == pytest.approx(sent / 2e9)  # eight ports of 0.25
    assert ddp.compute == pytest.approx(2 * run.cost.flops / 0.5e12 + 28 * 2 * P / 1e9)
    assert ddp.overlap == 0 and ddp.seconds == pytest.approx(ddp.compute + ddp.communication)

    parts = Layout(run, m, 32, 16, shards=8)
    assert parts.rounds == 2 and parts.mode == "FSDP2 8 x 2"
    inside = 2 * 7 / 8 * (2 * 6 * P + 4 * 2 * P)  # two micro-batches; bfloat16 gathered, float32 reduced
    across = 2 * 2 * (1 / 2) * 4 * 2 * P / 8
    assert parts.communication == pytest.approx(inside / 4e9 + across / 0.25e9)
    assert parts.seconds == pytest.approx(max(parts.compute, parts.communication))
    slow = Layout(run, replace(m, hop=1.0), 32, 16, shards=8)
    assert slow.communication - parts.communication == pytest.approx(2 * run.cost.traffic.collectives * 7)
    assert Layout(run, m, 4, 16).global_batch == 16  # one sample for each GPU at least


def test_layouts_take_what_fits(run):
    """The largest micro-batch that fits, and no more parts than needed."""
    whole = run.unsharded_memory.total / 2**30
    machine = Machine(memory=0.45 * whole, reserve=0.0, node=2)
    ddp, parts = layouts(run, 16, 16, machine)
    assert not ddp.fits and parts.fits and 2 < parts.shards <= 16
    assert not Layout(run, machine, 16, 16, parts.shards // 2).fits
    ddp, parts = layouts(run, 64, 8, Machine())
    assert ddp.micro == parts.micro == 8 and ddp.rounds == 1 and parts.mode == "FSDP2 8"


def test_the_command(folder, capsys):
    main(["recipes/dmd2_sdxl.py", "--gpus", "2", "--", "--teacher", f"{folder}"])
    out = capsys.readouterr().out
    assert "DDP" in out and "FSDP2 2" in out and "GPU hours" in out
    for argv in (["--gpus", "1"], ["recipes/dmd2_sdxl.py", "--gpus", "3", "--", "--teacher", f"{folder}"]):
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == 2
    assert "train_batch_size 128 of dmd2_sdxl is not a multiple of 3 GPUs" in capsys.readouterr().err


@pytest.mark.slow
def test_the_document_shows_the_command_s_output(capsys):
    main([])
    assert f"```\n{capsys.readouterr().out}```" in (ROOT / "docs" / "scaling.md").read_text()


if __name__ == "__main__":
    shard(Path(sys.argv[1]))
