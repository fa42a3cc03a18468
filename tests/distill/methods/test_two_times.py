"""Toy science of the methods of two times: one call of a student, against one call of its trained teacher."""

import pytest
import torch
from accelerate import Accelerator
from tiny import clock

from distill.diffusion.schedule import Flow
from distill.diffusion.times import Uniform
from distill.methods import BOOT, RCGM, Denoise, MeanFlow, TwinFlow
from distill.training.build import build
from distill.training.config import TrainConfig
from distill.training.loop import train

MEAN, ROOT = torch.tensor([1.0, -0.5]), torch.tensor([[0.5, 0.3], [0.0, 0.2]])
# The factor by which one call comes nearer: half of what was measured (51.2, 49.2, 20.7, 5.0), rounded down.
FACTOR = {"twinflow": (TwinFlow(), 25), "rcgm": (RCGM(), 24), "boot": (BOOT(), 10)}
FACTOR["meanflow"] = MeanFlow(velocity="teacher", equal=0.25), 2


def data(draw):
    return {"real": draw.normal("real", (len(draw.samples), 2)) @ ROOT.T + MEAN}


def trained(method, teacher, steps, rate):
    cfg = TrainConfig(max_train_steps=steps, train_batch_size=96, learning_rate=rate, adam_beta1=0.9)
    *_, state = train(method, build(method, teacher, (2,)), data, cfg, Accelerator(cpu=True))
    return state.nets.student.with_network(state.ema.net)


@torch.no_grad()
def distance(student):
    """Squared Wasserstein distance of 4000 samples, as a Gaussian, to the data's."""
    x = student.generate(torch.randn(4000, 2, generator=torch.Generator().manual_seed(1)), None)
    root = lambda M: (lambda w, U: U @ w.clamp(min=0).sqrt().diag() @ U.T)(*torch.linalg.eigh(M))
    S, C = ROOT @ ROOT.T, x.T.cov()
    return float(((x.mean(0) - MEAN) ** 2).sum() + torch.trace(C + S - 2 * root(root(S) @ C @ root(S))))


@pytest.fixture(scope="module")
def teacher():
    untrained = clock(Flow(), "flow", dtype=torch.float32, width=64)
    return trained(Denoise(p_drop=0.0, times=Uniform(0.001, 0.999)), untrained, 800, 3e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", FACTOR)
def test_one_call(name, teacher):
    method, factor = FACTOR[name]
    assert distance(trained(method, teacher.denoiser, 600, 2e-3)) < distance(teacher) / factor
