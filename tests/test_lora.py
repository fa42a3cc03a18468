"""Roles as adapters on one shared frozen backbone, against roles with weights of their own."""

import copy

import pytest
import torch
from gaussian import F64
from tiny import Tiny, filled
from torch import nn
from torch.utils.checkpoint import checkpoint

from distill.denoiser import Denoiser
from distill.draw import Draw
from distill.ema import EMA
from distill.lora import LoRA, shared
from distill.methods import DMD2, VSD, SiD
from distill.roles import FakeConfig, Nets, StudentConfig, build
from distill.schedule import EDM
from distill.trainer import own

RANK4 = LoRA(rank=4, alpha=8.0, targets=("mid", "last"))
near = lambda got, want, tol=1e-12: torch.testing.assert_close(got, want, rtol=tol, atol=tol)


class Checkpointed(Tiny):
    """Recomputes its inside in the backward pass."""

    def forward(self, x, t, label=None, guidance=None):
        return checkpoint(super().forward, x, t, label, guidance, use_reentrant=False)


def denoiser(cls=Tiny):
    return Denoiser(filled(cls(), dtype=F64), EDM(), "edm")


def adapters(net):
    return {name: p for name, p in net.named_parameters() if "lora_" in name}


def stir(net, seed=1):
    """Move the trainable weights away from where they started."""
    for i, p in enumerate(q for q in net.parameters() if q.requires_grad):
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + i)).to(p)


class TestShared:
    def test_the_same_tensors_in_another_tree(self):
        net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 2)))
        twin = shared(net)
        for (name, a), (other, b) in zip(
            net.state_dict(keep_vars=True).items(), twin.state_dict(keep_vars=True).items()
        ):
            assert name == other and a is b
        assert all(a is not b for a, b in zip(net.modules(), twin.modules()))

    def test_replacing_a_module_leaves_the_other_tree_alone(self):
        net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        twin = shared(net)
        twin[1] = nn.Identity()
        assert isinstance(net[1], nn.Linear)


class TestAdapter:
    def test_starts_as_the_backbone(self):
        teacher = denoiser()
        role = RANK4(teacher.net)
        x, t = torch.randn(5, 2, dtype=F64), torch.rand(5, dtype=F64)
        assert torch.equal(role(x, t), teacher.net(x, t))

    def test_what_is_shared_and_what_is_trained(self):
        net = denoiser().net
        role, other = RANK4(net), RANK4(net)
        backbone = {id(p) for p in net.parameters()}
        assert {id(p) for p in role.parameters() if not p.requires_grad} == backbone
        assert {name.split(".")[0] for name in adapters(role)} == {"mid", "last"}
        assert all(p.requires_grad for p in adapters(role).values())
        assert not {id(p) for p in adapters(role).values()} & {id(p) for p in adapters(other).values()}
        assert not any(p.requires_grad for p in net.parameters())
        assert not adapters(net)

    def test_rank_and_scale(self):
        """out + alpha / r B A x on the adapted layers."""
        net = nn.Sequential(nn.Linear(3, 5).double())
        role = LoRA(rank=2, alpha=6.0, targets=("0",))(net)
        stir(role)
        a, b = (p.to(F64) for p in adapters(role).values())
        assert a.shape == (2, 3) and b.shape == (5, 2)
        x = torch.randn(7, 3, dtype=F64)
        near(role(x), net(x) + 3.0 * x @ a.T @ b.T, 1e-6)

    def test_full_copy(self):
        net = denoiser().net.requires_grad_(False)
        role = LoRA()(net)
        assert all(p.requires_grad for p in role.parameters())
        assert not {id(p) for p in role.parameters()} & {id(p) for p in net.parameters()}
        assert all(torch.equal(a, b) for a, b in zip(role.parameters(), net.parameters()))

    @pytest.mark.parametrize("rank", (0, -1))
    def test_wrong_rank(self, rank):
        with pytest.raises(ValueError, match=f"LoRA rank is {rank}; it must be at least 1, or None for a full copy"):
            LoRA(rank=rank)


def roles(cls, method, lora):
    """The three roles: student and fake are adapters on the teacher, or networks of their own."""
    torch.manual_seed(0)  # adapters start at random
    nets = build(method, denoiser(cls), (2,), None, StudentConfig(sigma=2.5, lora=lora), FakeConfig(lora=lora))
    nets.disc = nets.disc and nets.disc.double()
    stir(nets.student.denoiser.net, 1)
    stir(nets.fake.net, 2)
    return nets


def separate(nets):
    """The same three networks without a common tensor."""
    student = copy.copy(nets.student)
    student.denoiser = student.denoiser.copy()
    return Nets(nets.teacher.copy(), student, nets.shape, nets.fake.copy(), copy.deepcopy(nets.disc))


def turn(method, nets, player):
    """Loss and gradients of one turn, every role's call in one graph where the method has it so."""
    players = {
        "student": [*adapters(nets.student.denoiser.net).values()],
        "fake": [*adapters(nets.fake.net).values(), *(nets.disc.parameters() if nets.disc else ())],
    }
    own(players, player)
    draw = Draw(0, 0, player, torch.arange(8))
    batch = {"real": draw.normal("real", (8, 2)).double()}
    x = method.sample(nets, batch, draw).to(F64)
    loss = getattr(method, f"{player}_loss")(x if player == "student" else x.detach(), nets, batch, draw)[0]
    grads = torch.autograd.grad(loss, players[player])
    own(players, "nobody")
    return [loss.detach(), *grads]


METHODS = {
    "sid": SiD(),
    "vsd": VSD(guidance=1.0),
    "dmd2": DMD2(taps=("mid",), gan=0.1, gan_fake=0.1),
}


@pytest.mark.parametrize("player", ("student", "fake"))
@pytest.mark.parametrize("name", METHODS)
class TestThreeRolesOfOneBackbone:
    def test_equals_three_networks(self, name, player):
        """Gradients to the adapters, with the teacher, fake and student in one graph, as with three separate copies."""
        nets = roles(Tiny, METHODS[name], RANK4)
        apart = separate(nets)
        for got, want in zip(turn(METHODS[name], nets, player), turn(METHODS[name], apart, player)):
            near(got, want)
        assert any(g.abs().max() > 0 for g in turn(METHODS[name], nets, player)[1:])

    def test_gradient_checkpointing(self, name, player):
        """Recomputation runs the role that ran: the same gradients as without."""
        plain, recomputed = (roles(cls, METHODS[name], RANK4) for cls in (Tiny, Checkpointed))
        for got, want in zip(turn(METHODS[name], recomputed, player), turn(METHODS[name], plain, player)):
            near(got, want)


def test_the_teacher_is_bit_identical_after_training():
    method, nets = METHODS["dmd2"], roles(Tiny, METHODS["dmd2"], RANK4)
    before = copy.deepcopy(nets.teacher.net.state_dict())
    x, t = torch.randn(5, 2, dtype=F64), torch.rand(5, dtype=F64)
    said = nets.teacher(x, t).out
    students = adapters(nets.student.denoiser.net).values()
    fakes = [*adapters(nets.fake.net).values(), *nets.disc.parameters()]
    moved = [p.detach().clone() for p in (*students, *fakes)]
    for player, params in (("student", students), ("fake", fakes)):
        optimizer = torch.optim.Adam(params, 1e-2)
        for _ in range(3):
            for p, g in zip(params, turn(method, nets, player)[1:]):
                p.grad = g
            optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(moved, (*students, *fakes)))
    after = nets.teacher.net.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert torch.equal(nets.teacher(x, t).out, said)


def test_average_of_an_adapter_shares_the_backbone():
    """Only the adapters are averaged; the frozen weights stay the one copy."""
    net = denoiser().net
    role = RANK4(net)
    ema = EMA(role, half_life=10.0)
    frozen = {id(p) for p in net.parameters()}
    assert {id(p) for p in ema.net.parameters()} & {id(p) for p in role.parameters()} == frozen
    before = [p.clone() for p in adapters(ema.net).values()]
    stir(role)
    ema.update(role, 10, 0)
    for mean, old, new in zip(adapters(ema.net).values(), before, adapters(role).values()):
        near(mean, (old + new) / 2, 1e-6)
