"""Denoise, the training of a teacher: its optimum is the posterior mean at every level, for every kind of network."""

import pytest
import torch
from gaussian import F64, RATIOS, SCHEDULES, Oracle, Whitened, exact, problem
from tiny import tiny

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import KINDS, Flow
from distill.diffusion.student import Student
from distill.diffusion.times import Fixed
from distill.method import Requirement
from distill.methods import Denoise
from distill.random import Draw
from distill.roles import Nets

N, CLASSES = 16, 3


@pytest.mark.level(1, "Denoise")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_posterior_mean_is_its_optimum(schedule, kind):
    """No expected gradient to x0 + M x_t + b at M = b = 0; beside it a descent leads there."""
    law, path, draw = problem(2)[0], SCHEDULES[schedule], Whitened(64, 2, ("real", "eps"))
    real = law.mean + draw.columns["real"] @ torch.linalg.cholesky(law.cov).T
    M, b = torch.zeros(2, 2, dtype=F64, requires_grad=True), torch.zeros(2, dtype=F64, requires_grad=True)
    net = Oracle(lambda x, *at: law.denoise(x, *at) + x @ M.T + b, path, kind)
    nets = Nets(exact(law, path, kind), Student(Denoiser(net, path, kind)), (2,))
    for t in path.time(torch.tensor(RATIOS, dtype=F64)):
        method = Denoise(p_drop=0.0, times=Fixed(float(t)), reduction="sum")
        for beside in (0.0, 0.1):
            b.data = torch.full((2,), beside, dtype=F64)
            dM, db = torch.autograd.grad(method.student_loss(real, nets, {}, draw)[0], (M, b))
            assert (db > 1e-3).all() if beside else max(dM.abs().max(), db.abs().max()) < 1e-9
        b.data.zero_()


@pytest.mark.parametrize("p", (0.0, 0.4))
def test_conditions(p):
    """The images' own, a share of them dropped; without that share no null condition is needed."""
    net, heard = tiny(Flow(), "flow", classes=CLASSES), []
    net.net.label.register_forward_hook(lambda m, a, o: heard.append(a[0]))
    draw, label = Draw(0, 0, "student", torch.arange(N)), torch.arange(N) % CLASSES
    batch = {"real": torch.ones(N, 2, dtype=F64), "real_c": {"label": label}, "c": {"label": 0 * label}}
    method, nets = Denoise(p_drop=p), Nets(net, Student(net), (2,))
    method.student_loss(method.sample(nets, batch, draw), nets, batch, draw)
    dropped = draw.uniform("drop", (N,)) < p
    assert bool(dropped.any()) == (p > 0) and not dropped.all()
    assert torch.equal(heard[0], torch.where(dropped, CLASSES, label))
    assert method.requirements == ((Requirement.REAL, Requirement.NULL_CONDITION) if p else (Requirement.REAL,))
