"""Roles as adapters on one shared frozen backbone, against roles with weights of their own."""

import copy
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from gaussian import F64
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from tiny import Tiny, filled
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.checkpoint import CheckpointError, checkpoint

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import EDM, VP, Flow
from distill.methods import DMD2, VSD, SiD
from distill.modules import shallow_module_copy
from distill.networks.ema import EMA
from distill.networks.lora import LoRA, merge_adapters
from distill.random import Draw
from distill.roles import Nets
from distill.training.build import build
from distill.training.config import FakeConfig, StudentConfig, TrainConfig
from distill.training.loop import train
from distill.training.precision import recompute
from distill.training.step import set_trainable

RANK4 = LoRA(rank=4, alpha=8.0, targets=("mid", "last"))
near = lambda got, want, tol=1e-12: torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def denoiser():
    return Denoiser(filled(Tiny(), dtype=F64), EDM(), "edm")


def adapters(net):
    return {name: p for name, p in net.named_parameters() if "lora_" in name}


def stir(net, seed=1):
    """Move the trainable weights away from where they started."""
    for i, p in enumerate(q for q in net.parameters() if q.requires_grad):
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + i)).to(p)


class TestShared:
    def test_the_same_tensors_in_another_tree(self):
        net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 2)))
        twin = shallow_module_copy(net)
        for (name, a), (other, b) in zip(
            net.state_dict(keep_vars=True).items(), twin.state_dict(keep_vars=True).items()
        ):
            assert name == other and a is b
        assert all(a is not b for a, b in zip(net.modules(), twin.modules()))

    def test_replacing_a_module_leaves_the_other_tree_alone(self):
        net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        twin = shallow_module_copy(net)
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
        with pytest.raises(ValueError, match=f"lora.rank is {rank}; it must be at least 1 .*, or None"):
            LoRA(rank=rank)(denoiser().net)

    @pytest.mark.parametrize("wrong", ({"alpha": 0.0}, {"alpha": float("nan")}, {"targets": ()}), ids=str)
    def test_adapters_that_do_nothing(self, wrong):
        with pytest.raises(ValueError, match="lora.alpha is .*; it must be above 0|lora.targets is empty"):
            LoRA(rank=4, **wrong)(denoiser().net)
        with pytest.raises(ValueError, match="no_such_layer"):
            LoRA(rank=4, targets=("no_such_layer",))(denoiser().net)


# ---- three roles of one backbone ----


class Vectors(Tiny):
    """Recomputes its inside in the backward pass, once told to."""

    recomputes = False

    def enable_gradient_checkpointing(self):
        self.recomputes = True

    def forward(self, x, t, label=None, guidance=None):
        if not self.recomputes:
            return super().forward(x, t, label, guidance)
        return checkpoint(super().forward, x, t, label, guidance, use_reentrant=False)


def vectors():
    return Denoiser(filled(Vectors(), dtype=F64), EDM(), "edm"), (2,), ("mid", "last"), "mid"


def unet():
    """Convolutions and cross-attention; the tap lies inside a recomputed block."""
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    call = lambda net, x, t, c: net(x, t, c["text"]).sample
    return Denoiser(net.double(), VP.scaled_linear(), "eps", call), (2, 8, 8), ("to_q", "to_v"), "mid_block.resnets.1"


def transformer():
    """Joint attention; its blocks return (text, image), and the tap is such a block, recomputed whole."""
    from diffusers import SD3Transformer2DModel

    net = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=2,
        out_channels=2,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    )
    call = lambda net, x, t, c: net(x, c["text"], c["text"].mean(1), t).sample
    call.feature = lambda output: output[1]
    return Denoiser(net.double(), Flow(), "flow", call), (2, 8, 8), ("to_q", "add_k_proj"), "transformer_blocks.0"


NETS = {"vectors": vectors, "unet": unet, "transformer": transformer}
METHODS = {"sid": SiD(), "vsd": VSD(guidance=1.0), "dmd2": DMD2(gan=0.1, gan_fake=0.1)}
B = 3


def roles(net, method, recomputed=False):
    """Three roles of one backbone, none of them like another: (method, roles)."""
    torch.manual_seed(0)
    teacher, shape, targets, tap = NETS[net]()
    for p in teacher.net.parameters():  # some of diffusers' layers start at zero
        p.data += 0.1 * torch.randn_like(p)
    method, lora = METHODS[method], LoRA(4, 8.0, targets)
    method = replace(method, taps=(tap,)) if "disc" in method.roles else method
    c = None if net == "vectors" else {"text": torch.zeros(1, 3, 8, dtype=F64)}
    nets = build(method, teacher, shape, c, StudentConfig(sigma=2.5, lora=lora), FakeConfig(lora=lora))
    nets.disc = nets.disc and nets.disc.double()
    stir(nets.student.denoiser.net, 1)
    stir(nets.fake.net, 2)
    if recomputed:
        recompute(nets)
    return method, nets


def apart(nets, net_of):
    """The same roles around other networks: net_of(role, net)."""
    student = nets.student.with_network(net_of("student", nets.student.denoiser.net))
    fake = replace(nets.fake, net=net_of("fake", nets.fake.net))
    return Nets(replace(nets.teacher, net=net_of("teacher", nets.teacher.net)), student, nets.shape, fake, nets.disc)


def turn(method, nets, player, params, others=()):
    """The loss of one turn and its gradients to `params`, which alone, but for `others`, require any."""
    players = {role: list(net.parameters()) for role, net in nets.modules().items()} | {"player": [*params, *others]}
    set_trainable(players, "player")
    draw = Draw(0, 0, player, torch.arange(B))
    normal = lambda name, *shape: draw.normal(name, (B, *shape)).double()
    batch = {"real": normal("real", *nets.shape)}
    if len(nets.shape) > 1:
        batch |= {"c": {"text": normal("text", 3, 8)}, "real_c": {"text": normal("other", 3, 8)}}
    x = method.sample(nets, batch, draw).double()
    x, loss = (x, method.student_loss) if player == "student" else (x.detach(), method.fake_loss)
    loss = loss(x, nets, batch, draw)[0]
    grads = torch.autograd.grad(loss, params)
    set_trainable(players)
    return [loss.detach(), *grads]


def ours(nets, player):
    """{layer: (A, B)} of the player's adapters."""
    net = nets.student.denoiser.net if player == "student" else nets.fake.net
    layers = {name: m for name, m in net.named_modules() if isinstance(m, LoraLayer)}
    return {name: (m.lora_A["default"].weight, m.lora_B["default"].weight) for name, m in layers.items()}


def head_of(nets, player):
    return [*nets.disc.parameters()] if nets.disc and player == "fake" else []


def adapter_turn(method, nets, player):
    """Loss, {layer: gradients to its A and B}, gradients to the discriminator."""
    layers, disc = ours(nets, player), head_of(nets, player)
    loss, *grads = turn(method, nets, player, [*(p for pair in layers.values() for p in pair), *disc])
    n = 2 * len(layers)
    return loss, dict(zip(layers, zip(grads[:n:2], grads[1:n:2]))), grads[n:]


def reference(method, nets, player):
    """The same from three plain networks: W + s B A in the place of W, and the chain rule from W to A and B."""
    layers, disc, s = ours(nets, player), head_of(nets, player), 2.0
    plain = apart(nets, lambda role, net: copy.deepcopy(merge_adapters(net)))
    tensors = [{p.data_ptr() for p in d.net.parameters()} for d in (plain.teacher, plain.student.denoiser, plain.fake)]
    assert not (tensors[0] & tensors[1] or tensors[0] & tensors[2] or tensors[1] & tensors[2])
    net = plain.student.denoiser.net if player == "student" else plain.fake.net
    loss, *grads = turn(method, plain, player, [*(net.get_submodule(name).weight for name in layers), *disc])
    chain = {name: (s * b.T @ g, s * g @ a.T) for (name, (a, b)), g in zip(layers.items(), grads)}
    return loss, chain, grads[len(layers) :]


@pytest.mark.parametrize("player", ("student", "fake"))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("net", NETS)
class TestThreeRolesOfOneBackbone:
    def check(self, net, method, player, recomputed):
        method, nets = roles(net, method, recomputed)
        loss, grads, disc = adapter_turn(method, nets, player)
        want, wanted, head = reference(method, nets, player)
        torch.testing.assert_close(loss, want, rtol=1e-10, atol=0)
        for got, exact in zip(
            [*disc, *(g for pair in grads.values() for g in pair)],
            [*head, *(g for pair in wanted.values() for g in pair)],
            strict=True,
        ):
            assert (got - exact).norm() <= 1e-10 * exact.norm() and exact.norm() > 0

    def test_equals_three_networks(self, net, method, player):
        """Loss and gradients are those of three networks that hold their adapters in their weights."""
        self.check(net, method, player, recomputed=False)

    def test_gradient_checkpointing(self, net, method, player):
        """Recomputation runs the role that ran."""
        self.check(net, method, player, recomputed=True)


class Switch(nn.Module):
    """The wrong way: one network for all, told before every call which adapter to use from now on."""

    def __init__(self, net, role):
        super().__init__()
        self.net, self.role = net, role

    def forward(self, *args, **kwargs):
        for layer in self.net.modules():
            if isinstance(layer, LoraLayer):
                layer._disable_adapters, layer._active_adapter = self.role == "teacher", [self.role]
        return self.net(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("method", ("sid", "vsd"))
@pytest.mark.parametrize("net", ("unet", "transformer"))
def test_a_switch_on_one_network_recomputes_the_wrong_role(net, method):
    """Why a role is an object: with a global switch every recomputation runs whichever role was called last.

    VSD's student, called before the fake, gets a wrong gradient without a word; in SiD the teacher, without adapters,
    saves fewer tensors than the fake in its place, which torch notices.
    """

    def error(recomputed):
        algorithm, nets = roles(net, method)
        loss, right, _ = adapter_turn(algorithm, nets, "student")
        one = copy.deepcopy(nets.teacher.net)
        for role in ("student", "fake"):
            layers = ours(nets, role)
            one = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8.0, target_modules=[*layers]), one, role)
            for name, pair in layers.items():
                layer = one.get_submodule(name)
                layer.lora_A[role].weight.data, layer.lora_B[role].weight.data = (p.detach().clone() for p in pair)
        if recomputed:
            one.enable_gradient_checkpointing()
        params, others = (
            [getattr(one.get_submodule(name), matrix)[role].weight for name in right for matrix in ("lora_A", "lora_B")]
            for role in ("student", "fake")
        )
        got, *grads = turn(algorithm, apart(nets, lambda role, _: Switch(one, role)), "student", params, others)
        near(got, loss, 1e-10)  # the forward pass is right: nothing warns
        right = [g for pair in right.values() for g in pair]
        return max((a - b).norm() / b.norm() for a, b in zip(grads, right, strict=True))

    assert error(recomputed=False) < 1e-10
    if method == "sid":
        with pytest.raises(CheckpointError):
            error(recomputed=True)
    else:
        assert error(recomputed=True) > 0.1


# ---- training ----


@pytest.mark.parametrize("method", METHODS)
def test_the_teacher_is_bit_identical_during_training(method):
    """Before, after every step and at the end; only the adapters of whose turn it is have gradients, and move."""
    algorithm, nets = roles("vectors", method)
    backbone = {id(p) for p in nets.teacher.net.parameters()}
    x, t = torch.randn(5, 2, dtype=F64), torch.rand(5, dtype=F64)
    said, turns = nets.teacher(x, t).out, []
    weights = {name: p.clone() for name, p in nets.teacher.net.state_dict().items()}
    before = {role: [p.detach().clone() for p in net.parameters()] for role, net in nets.modules().items()}

    def look(optimizer, args, kwargs):
        graded = {r: [p for p in net.parameters() if p.grad is not None] for r, net in nets.modules().items()}
        assert not any(id(p) in backbone for params in graded.values() for p in params)
        turns.append({role for role, params in graded.items() if params})

    handle = register_optimizer_step_pre_hook(look)
    data = lambda draw: {"real": draw.normal("real", (len(draw.samples), 2)).double()}
    cfg = TrainConfig(max_train_steps=5, train_batch_size=4, learning_rate=1e-2)
    for _ in train(algorithm, nets, data, cfg, Accelerator(cpu=True)):
        assert torch.equal(nets.teacher(x, t).out, said)
    handle.remove()
    after = nets.teacher.net.state_dict()
    assert after.keys() == weights.keys() and all(torch.equal(after[name], weights[name]) for name in after)
    assert {frozenset(turn) for turn in turns} == {frozenset({"student"}), frozenset(before.keys() - {"student"})}
    for role, net in nets.modules().items():
        moved = [not torch.equal(a, b) for a, b in zip(before[role], net.parameters()) if id(b) not in backbone]
        assert moved and all(moved), role


class Line(nn.Module):
    """Linear, without a bias: out = W2 W1 x."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 5, bias=False), nn.Linear(5, 2, bias=False)

    def forward(self, x, t):
        return self.last(self.first(x))


class TestFullRank:
    """W + B A at full rank, scale 1, A = 1 and B = 0: the gradient to B is the gradient to W."""

    def nets(self, lora):
        teacher = Denoiser(filled(Line(), dtype=F64), Flow(), "flow")
        both = {}
        if lora:  # one rank for all layers: that of the wider
            both = {"student": StudentConfig(lora=LoRA(5, 5.0, ("first", "last")))}
            both["fake"] = FakeConfig(both["student"].lora)
        nets = build(VSD(guidance=1.0), teacher, (2,), **both)
        for net in (nets.student.denoiser.net, nets.fake.net) if lora else ():
            for layer in (net.first, net.last):
                layer.lora_A["default"].weight.data = torch.eye(5, dtype=F64)[:, : layer.in_features]
        return nets

    def test_a_run_equals_the_full_one(self):
        """Ten steps of both players with Adam, A held: the weights of a full fine-tune, and its average."""
        found = []
        for lora in (False, True):
            nets = self.nets(lora)
            for net in (nets.student.denoiser.net, nets.fake.net):
                for name, p in net.named_parameters():
                    p.requires_grad_("lora_A" not in name and p.requires_grad)
            cfg = TrainConfig(max_train_steps=10, train_batch_size=8, learning_rate=1e-2, ema_half_life=20.0)
            *_, state = train(VSD(guidance=1.0), nets, lambda draw: {}, cfg, Accelerator(cpu=True))
            trained = (nets.student.denoiser.net, nets.fake.net, state.ema.net)
            found.append([p.detach() for net in trained for p in merge_adapters(net).parameters()])
        start = [*self.nets(False).teacher.net.parameters()] * 3
        for full, adapted, before in zip(*found, start, strict=True):
            near(adapted, full, 1e-10)
            assert (full - before).norm() > 0.01

    def test_one_step_of_gradient_descent_with_everything_free(self):
        """B is zero, so A's first gradient is too: one step is that of a full fine-tune, later ones are not."""
        found = []
        for lora in (False, True):
            nets = self.nets(lora)
            for _ in range(2):
                params = [p for name, p in nets.fake.net.named_parameters() if lora <= ("lora" in name)]
                for p, g in zip(params, turn(VSD(guidance=1.0), nets, "fake", params)[1:], strict=True):
                    p.data -= 0.1 * g
                found.append([p.detach().clone() for p in merge_adapters(nets.fake.net).parameters()])
        (full, full2, adapted, adapted2), before = found, [*self.nets(False).teacher.net.parameters()]
        near(adapted, full)
        assert all((a - b).norm() > 1e-4 for a, b in zip(full, before, strict=True))
        assert any((a - b).norm() > 1e-6 for a, b in zip(full2, adapted2, strict=True))


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
