"""NCT: the gradient in closed form on a linear generator, where it ends with and without its constraint, and lambda."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from gaussian import F64, SCHEDULES, white
from tiny import steered
from torch import nn

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import Flow
from distill.diffusion.student import Student
from distill.methods import NCT
from distill.networks.multiplier import Multiplier
from distill.random import Draw
from distill.roles import Nets
from distill.training import checkpoint
from distill.training.build import build
from distill.training.config import StudentConfig, TrainConfig
from distill.training.loop import train

N, K = 16, 2
near = lambda got, want, tol=1e-10: torch.testing.assert_close(got, want, rtol=tol, atol=tol)


class Told(nn.Module):
    """x = A z + b y; without y it is z itself."""

    def __init__(self, A, b):
        super().__init__()
        self.A, self.b = nn.Parameter(A.clone()), nn.Parameter(b.clone())

    def forward(self, z, t, control=None):
        return z if control is None else z @ self.A.T + control * self.b


class Level(Draw):
    """Jointly whitened z and eps, and one k for all samples."""

    def __init__(self, k, step=0):
        super().__init__(0, step, "student", torch.arange(N))
        self.k, self.white = k, dict(zip(("z", "eps"), white(N, 4).chunk(2, dim=1), strict=True))

    def normal(self, name, shape):
        return self.white[name]

    def integers(self, name, n):
        assert n == K
        return torch.full((N,), self.k)


def linear(A, b, schedule="flow", **fields):
    """(method, networks) of f(z) = z with the control y = z_1, f' = A z + b y."""
    path = SCHEDULES[schedule]
    method = NCT(**{"levels": K, "reduction": "sum", "rate": 0.0} | fields)
    on = lambda net: Denoiser(net, path, "x0")
    nets = Nets(on(Told(A, b)), Student(on(Told(A, b)), scale=1.0), (2,), control=lambda x: x[:, :1])
    method.on_build(nets)
    return method, nets


def gradients(method, nets):
    """To A and b, the mean over all levels."""
    net, total = nets.student.denoiser.net, 0
    for k in range(K):
        loss, _ = method.student_loss(method.sample(nets, {}, Level(k)), nets, {}, Level(k))
        total = total + loss / K
    return torch.autograd.grad(total, (net.A, net.b))


def mean_rho():
    """Of corr(z_s, z_u) over adjacent levels."""
    s = torch.arange(K + 1, dtype=F64) / K
    alpha = (1 - s**2).sqrt()
    return float((alpha[1:] * alpha[:-1] + s[1:] * s[:-1]).mean())


POINT = torch.tensor([[0.7, -0.4], [0.3, 1.2]], dtype=F64), torch.tensor([0.5, -0.2], dtype=F64)


@pytest.mark.level(1, "NCT")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dual", (0.0, 0.5))
def test_gradient(schedule, dual):
    """To A: 2 (1 - rho) A + 2 lambda (A - 1 + b e1'); to b: 2 (alpha_u - alpha_s) A e1 + 2 lambda (A e1 - e1 + b)."""
    A, b = POINT
    e1, eye = torch.eye(2, dtype=F64)[0], torch.eye(2, dtype=F64)
    got = gradients(*linear(A, b, schedule, dual=dual))
    near(got[0], 2 * (1 - mean_rho()) * A + 2 * dual * (A - eye + torch.outer(b, e1)))
    near(got[1], -2 / K * A @ e1 + 2 * dual * (A @ e1 - e1 + b))  # the sum of alpha_u - alpha_s is -1


@pytest.mark.level(1, "NCT")
def test_fixed_point():
    """From the base: the first output becomes the control, the second keeps a = lambda / (lambda + 1 - rho) of z_2."""
    dual, eye = 0.5, torch.eye(2, dtype=F64)
    method, nets = linear(eye, torch.zeros(2, dtype=F64), dual=dual)
    net = nets.student.denoiser.net
    for _ in range(40):
        for p, g in zip((net.A, net.b), gradients(method, nets), strict=True):
            p.data -= 0.7 * g
    a = dual / (dual + 1 - mean_rho())
    near(net.A.detach(), torch.diag(torch.tensor([0.0, a], dtype=F64)), 1e-6)
    near(net.b.detach(), eye[0], 1e-6)
    assert 0.6 < a < 0.62


@pytest.mark.level(1, "NCT")
def test_without_its_constraint_it_collapses():
    """lambda = 0: A goes to 0 and b to e1 / (K (1 - rho)), whatever the control is: all noise gives the same."""
    eye = torch.eye(2, dtype=F64)
    method, nets = linear(eye, torch.zeros(2, dtype=F64), dual=0.0)
    net = nets.student.denoiser.net
    for _ in range(40):
        for p, g in zip((net.A, net.b), gradients(method, nets), strict=True):
            p.data -= g
    near(net.A.detach(), 0 * eye, 1e-6)
    near(net.b.detach(), eye[0] / (K * (1 - mean_rho())), 1e-6)


def test_multiplier():
    """It rises by rate (mean - bound) while the constraint is broken, falls where it is kept, and not below 0."""
    one = Multiplier(0.5)
    for step, losses, want in ((0, (0.3, 0.5), 0.65), (1, (0.0,), 0.6), (2, (0.0,), 0.55)):
        for loss in losses:
            one.record(torch.tensor(loss), step)
        one.step(0.5, 0.1)
        near(one.value, torch.tensor(want), 1e-6)
    one.record(torch.tensor(float("nan")), 3)  # of an update that was left out
    one.record(torch.tensor(0.0), 4)
    one.step(100.0, 0.1)
    assert one.value == 0 and not one.state_dict()


def labelled(draw):
    return {"c": {"label": draw.integers("label", 3)}}


def trained(method, steps, folder=None, resume=None, at=2, rounds=1):
    torch.manual_seed(0)
    nets = build(method, steered(Flow(), "flow", dtype=torch.float32, classes=3), (2,), {"label": torch.tensor([0])})
    nets.control = lambda x: x[:, :1]
    cfg = TrainConfig(
        max_train_steps=steps, train_batch_size=8, learning_rate=1e-2, seed=3, gradient_accumulation_steps=rounds
    )
    for state in train(method, nets, labelled, cfg, Accelerator(cpu=True), resume=resume):
        if folder and state.step == at:
            found = checkpoint.save(state, folder)
    return (state, found) if folder else state


def test_lambda_survives_a_checkpoint(tmp_path):
    """Bit for bit; micro-batches move it as the whole batch does, and with rate 0 it stays."""
    method = NCT(dual=0.3, rate=2.0)
    state, folder = trained(method, 4, tmp_path)
    again = trained(method, 4, resume=folder)
    value = lambda s: s.nets.student.denoiser.net.multiplier.value
    assert torch.equal(value(state), value(again)) and abs(float(value(state)) - 0.3) > 0.01
    near(value(trained(method, 4, rounds=2)), value(state), 1e-4)
    fixed = trained(replace(method, rate=0.0), 4)
    assert float(value(fixed)) == pytest.approx(0.3)


def test_only_the_adapter_is_trained():
    """The base is shared with the frozen teacher and stays; a student of it starts from a checkpoint of one."""
    state = trained(NCT(), 3)
    net, base = state.nets.student.denoiser.net, state.nets.teacher.net
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {"control.weight", "control.bias"}
    for name, p in net.named_parameters():
        assert (p is base.get_parameter(name)) == (not name.startswith("control."))
    assert not torch.equal(net.control.weight, base.control.weight)


def test_a_start_from_a_checkpoint(tmp_path):
    """The adapter is what it was, and lambda begins anew."""
    _, folder = trained(NCT(dual=0.3), 2, tmp_path)
    teacher = steered(Flow(), "flow", dtype=torch.float32, classes=3)
    nets = build(NCT(dual=0.7), teacher, (2,), {"label": torch.tensor([0])}, StudentConfig(init=f"{folder}"))
    assert not torch.equal(nets.student.denoiser.net.control.weight, teacher.net.control.weight)
    assert float(nets.student.denoiser.net.multiplier.value) == pytest.approx(0.7)


def test_it_says_what_it_needs():
    method, nets = linear(*POINT)
    nets.control = None
    with pytest.raises(ValueError, match=r"needs nets.control"):
        method.student_loss(method.sample(nets, {}, Level(0)), nets, {}, Level(0))
