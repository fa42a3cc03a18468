"""What saves memory or time must change nothing else: half precision, recomputation, kernels, 8-bit moments."""

import copy
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from replay import pushed
from safetensors.torch import load_file
from test_trainer import METHODS, config, equal, nets_of, roles, vectors
from tiny import Tiny, filled, tiny
from torch import nn
from torch.overrides import TorchFunctionMode

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import VP, Flow
from distill.methods import DMD2, LCD, VSD, SiD
from distill.modules import copy_trainable
from distill.networks.lora import LoRA
from distill.random import Draw
from distill.training import checkpoint, precision
from distill.training.build import build
from distill.training.config import FakeConfig, StudentConfig
from distill.training.loop import train
from distill.training.prepare import start

ADAPTERS = LoRA(rank=4, alpha=8.0, targets=("mid", "last"))


@pytest.fixture
def engine():
    """engine(mixed_precision) -> Accelerator; accelerate holds one precision a process."""

    def make(precision="no"):
        AcceleratorState._reset_state(True)
        return Accelerator(cpu=True, mixed_precision=precision)

    yield make
    AcceleratorState._reset_state(True)


def tensors(net):
    return {p.data_ptr() for p in net.parameters()}


# ---- half precision ----


@pytest.mark.parametrize("name", METHODS)
def test_gradients_in_bf16(name, engine):
    """Of every parameter of every player, close to those in float32; the students take two steps."""
    found, said = {}, []
    for mode in ("no", "bf16"):
        nets = nets_of(METHODS[name])
        nets.student.denoiser.net.mid.register_forward_hook(lambda m, args, out: said.append(out.dtype))
        with pushed(nets) as found[mode]:
            *_, state = train(METHODS[name], nets, vectors, config(max_train_steps=1), engine(mode))
        assert (torch.bfloat16 in said) == (mode == "bf16")
        for average in (state.ema.net, *nets.modules().values()):
            assert {p.dtype for p in average.parameters()} == {torch.float32}
    for role, exact in found["no"].items():
        assert exact.keys() == found["bf16"][role].keys()
        for parameter, g in exact.items():
            error = (found["bf16"][role][parameter] - g).norm()
            assert error <= 0.1 * g.norm(), (role, parameter, error / g.norm())  # at most 0.034 were seen


def test_no_cast_outlives_a_call(engine):
    """A cast made by a call without gradient has no graph: the student's last call must make its own."""
    cached = []
    nets = nets_of(SiD())
    nets.student.denoiser.net.mid.register_forward_hook(lambda *_: cached.append(torch.is_autocast_cache_enabled()))
    next(train(SiD(), nets, vectors, config(), engine("bf16")))
    assert cached and not any(cached)


@pytest.mark.parametrize("lora", (LoRA(), ADAPTERS), ids=("full", "lora"))
def test_what_trains_from_a_half_precision_teacher_is_float32(lora, engine):
    """Weights and average in float32, so that small steps are not rounded away; the one backbone stays bfloat16."""
    teacher = tiny(Flow(), "flow", dtype=torch.bfloat16)
    nets = build(SiD(), teacher, (2,), None, StudentConfig(steps=2, lora=lora), FakeConfig(lora=lora))
    before = {role: [p.detach().clone() for p in net.parameters()] for role, net in nets.modules().items()}
    *_, state = train(SiD(), nets, vectors_alone, config(learning_rate=1e-6, max_train_steps=2), engine("bf16"))
    assert {p.dtype for p in teacher.net.parameters()} == {torch.bfloat16}
    for role, net in {**nets.modules(), "average": state.ema.net}.items():
        adapted = lora.rank is not None
        assert (tensors(teacher.net) <= tensors(net)) if adapted else not tensors(teacher.net) & tensors(net), role
        own = [p for p in net.parameters() if p.data_ptr() not in tensors(teacher.net)]
        assert own and {p.dtype for p in own} == {torch.float32}, role
    for role, net in nets.modules().items():  # steps of 1e-6 are below bfloat16's grain
        moved = [not torch.equal(a, b) for a, b in zip(before[role], net.parameters()) if b.requires_grad]
        assert sum(moved) >= len(moved) // 2 > 0, role


def vectors_alone(draw):
    return {}


def test_a_target_shares_the_backbone(tmp_path):
    """The target of consistency distillation is a copy of the adapters alone, in memory and in checkpoints."""
    nets = build(LCD(), tiny(Flow(), "flow"), (2,), student=StudentConfig(lora=ADAPTERS))
    assert tensors(nets.teacher.net) <= tensors(nets.target.net)
    assert tensors(nets.target.net) & tensors(nets.student.denoiser.net) == tensors(nets.teacher.net)
    assert not any(p.requires_grad for p in nets.target.net.parameters())
    assert tensors(copy_trainable(nets.student.denoiser.net)) & tensors(nets.student.denoiser.net) == tensors(
        nets.teacher.net
    )
    before = copy.deepcopy(nets.teacher.net.state_dict())
    data = lambda draw: {"real": draw.normal("real", (len(draw.samples), 2))}
    for state in train(LCD(), nets, data, config(max_train_steps=3), Accelerator(cpu=True)):
        folder = checkpoint.save(state, tmp_path)
    assert equal(nets.teacher.net.state_dict(), before)
    files = {role: load_file(folder / f"{role}.safetensors") for role in ("student", "target")}
    assert (
        files["target"].keys()
        == files["student"].keys()
        == {n for n, _ in nets.target.net.named_parameters() if "lora" in n}
    )


# ---- gradient checkpointing ----


def unet(**change):
    """A UNet of diffusers on maps [2, 8, 8]."""
    from diffusers import UNet2DModel

    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    torch.manual_seed(0)
    net = UNet2DModel(sample_size=8, in_channels=2, out_channels=2, **sizes, **blocks)
    return Denoiser(net, VP.scaled_linear(), "eps", lambda net, x, t, c: net(x, t).sample)


def maps(draw):
    return {"real": draw.normal("real", (len(draw.samples), 2, 8, 8))}


@pytest.mark.parametrize(
    "method",
    (SiD(), DMD2(every=1, taps=("mid_block.resnets.1",), gan=0.1), VSD(guidance=1.0)),
    ids=("sid", "dmd2", "vsd"),
)
@pytest.mark.parametrize("lora", (LoRA(), LoRA(2, 2.0, ("conv1", "to_q"))), ids=("full", "lora"))
def test_gradient_checkpointing(method, lora, engine):
    """Blocks run again in the backward pass, each in its own role, and every gradient stays; taps lie inside them."""
    found, calls = {}, {False: [], True: []}
    for recomputed, ran in calls.items():
        teacher = unet()
        torch.manual_seed(1)
        nets = build(method, teacher, (2, 8, 8), None, StudentConfig(steps=2, lora=lora), FakeConfig(lora=lora))
        for p in nets.fake.net.parameters():
            p.data += 0.05 * torch.randn_like(p) if p.requires_grad else 0.0
        for role, net in {"teacher": teacher.net, "student": nets.student.denoiser.net, "fake": nets.fake.net}.items():
            net.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_, role=role, ran=ran: ran.append(role))
        with pushed(nets) as found[recomputed]:
            next(train(method, nets, maps, config(gradient_checkpointing=recomputed, train_batch_size=2), engine()))
    for player, grads in found[False].items():
        assert grads and grads.keys() == found[True][player].keys()
        for name, g in grads.items():
            assert (found[True][player][name] - g).norm() <= 1e-5 * g.norm() + 1e-8, (player, name)
    through = {"student", "fake", "teacher"} if isinstance(method, SiD) else {"student", "fake"}
    assert {role for role in through if calls[True].count(role) > calls[False].count(role)} == through
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None  # a tap that ended a block left nothing


@pytest.mark.parametrize("make", (copy.deepcopy, LoRA(), LoRA(2, 2.0, ("conv1",))), ids=("copy", "full", "lora"))
def test_a_copy_recomputes_itself(make):
    """Checkpointing that was on before the roles were made: each copy's backward pass runs its own blocks."""
    net, ran = unet().net, []
    net.enable_gradient_checkpointing()
    role = make(net)
    for owner, tree in (("teacher", net), ("role", role)):
        tree.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_, owner=owner: ran.append(owner))
    role(torch.zeros(1, 2, 8, 8), 3).sample.sum().backward()
    assert ran == ["role", "role"]


def test_a_network_without_checkpointing_is_named():
    with pytest.raises(ValueError, match="teacher's network, a Tiny, has no method enable_gradient_checkpointing"):
        next(train(SiD(), nets_of(SiD()), vectors, config(gradient_checkpointing=True), Accelerator(cpu=True)))


# ---- attention ----


def flux():
    """All attention of this network goes through diffusers' dispatcher."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    net = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )

    def call(net, x, t, c):
        text, ids = x.new_ones(len(x), 3, 8), torch.arange(6.0)[:, None].expand(6, 3)
        return net(x, text, text.mean(1), t / 1000, ids, 0 * ids[:3], return_dict=False)[0]

    return Denoiser(net, Flow(), "flow", call), (6, 4)


def attended(denoiser, shape, attention):
    nets = build(SiD(), denoiser, shape)
    settings = config(attention=attention, max_train_steps=1, train_batch_size=2)
    *_, state = train(SiD(), nets, lambda draw: {}, settings, Accelerator(cpu=True))
    return nets, state


@pytest.fixture
def native():
    """diffusers keeps one active backend a process."""
    yield
    flux()[0].net.set_attention_backend("native")


def test_a_backend_reaches_all_roles(native):
    """Another kernel gives the same losses within rounding."""
    (nets, math), (_, plain) = (attended(*flux(), name) for name in ("_native_math", None))
    for net in (nets.teacher.net, nets.student.denoiser.net, nets.fake.net, math.ema.net):
        backends = {str(m.processor._attention_backend) for m in net.modules() if hasattr(m, "processor")}
        assert len(backends) == 1 and "math" in backends.pop().lower()
    for name, value in plain.logs.items():
        torch.testing.assert_close(math.logs[name], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("denoiser", "name", "says"),
    (
        (flux, "flahs", "'flahs' is not to be had: .*must be one of the following: .*xformers"),
        (lambda: (unet(), (2, 8, 8)), "xformers", "'xformers' (is not to be had|was set but fails): "),
        (flux, "flash", "'flash' (is not to be had|was set but fails): "),
        (lambda: (unet(), (2, 8, 8)), "flash", "'flash' is not to be had: a UNet2DModel has native and.* xformers"),
        (lambda: (tiny(Flow(), dtype=torch.float32), (2,)), "xformers", "a Tiny has native"),
    ),
    ids=("no name", "unet without xformers", "no flash", "unet", "no attention"),
)
def test_a_backend_that_is_not_to_be_had(denoiser, name, says, native):
    with pytest.raises(ValueError, match=says):
        attended(*denoiser(), name)


class Attention(nn.Module):
    """A layer with a processor, as those of diffusers."""

    def __init__(self):
        super().__init__()
        self.weight, self.processor = nn.Parameter(torch.eye(16)), SimpleNamespace(_attention_backend=None)

    def forward(self, x):
        match self.processor._attention_backend:
            case "broken":
                raise RuntimeError("no kernel image")
            case "wrong":
                return x
            case "inference":
                return (x @ self.weight).detach()
        return torch.tanh(x @ self.weight)


class Attentive(Tiny):
    def __init__(self):
        super().__init__()
        self.mid = Attention()

    def set_attention_backend(self, name):
        self.mid.processor._attention_backend = name


@pytest.mark.parametrize(
    ("name", "says"),
    (
        ("broken", "'broken' was set but fails: no kernel image"),
        ("wrong", "'wrong' gives a wrong output"),
        ("inference", "'inference' gives a wrong"),
    ),
)
def test_a_broken_backend_is_found_before_training(name, says):
    """It may be installed and accepted, and fail only when called, or only in the backward pass."""
    denoiser = Denoiser(filled(Attentive()), Flow(), "flow")
    with pytest.raises(ValueError, match=says):
        attended(denoiser, (2,), name)


def test_an_export_has_torchs_attention(native):
    """A network that is read later too: kernels for half precision would fail on the pipeline in float32."""
    (trained, shape), (later, _) = flux(), flux()
    trained.net.set_attention_backend("_native_math")
    precision.reset_attention(trained.net)
    for denoiser in (trained, later):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.attention, "sdpa_kernel", None)  # what chooses a kernel
            denoiser(torch.zeros(1, *shape), torch.ones(1))


def test_what_has_torch_attention_has_native():
    assert attended(unet(), (2, 8, 8), "native")[1].step == 1


# ---- 8-bit moments ----


def test_adamw8bit_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="adamw8bit needs bitsandbytes .*pip install bitsandbytes, or take adamw"):
        next(train(SiD(), None, None, config(optimizer="adamw8bit"), Accelerator(cpu=True)))


def test_adamw8bit(tmp_path):
    """Moments of a byte in large tensors; close to AdamW; a resumed run is the uninterrupted one."""
    pytest.importorskip("bitsandbytes")

    def start():
        teacher = Denoiser(filled(Tiny(width=80)), Flow(), "flow")  # bitsandbytes leaves what is below 4096 alone
        return build(VSD(guidance=1.0), teacher, (2,))

    def run(optimizer, resume=None):
        cfg = config(optimizer=optimizer, adam_beta1=0.9, max_train_steps=4)
        yield from train(VSD(guidance=1.0), start(), lambda draw: {}, cfg, Accelerator(cpu=True), resume)

    for state in run("adamw8bit"):
        if state.step == 2:
            folder = checkpoint.save(state, tmp_path)
    found = {p.dtype for player in state.optimizers.values() for e in player.state.values() for p in [e["state1"]]}
    assert found == {torch.uint8, torch.float32}
    *_, resumed = run("adamw8bit", folder)
    for role, net in roles(state.nets).items():
        assert equal(net, roles(resumed.nets)[role]), role
    *_, exact = run("adamw")
    before = start().teacher.net.mid.weight
    moved = exact.nets.student.denoiser.net.mid.weight - before
    assert (state.nets.student.denoiser.net.mid.weight - before - moved).norm() < 0.2 * moved.norm()
    with pytest.raises(ValueError, match="optimizer_student.safetensors is not of this run's parameters"):
        next(run("adamw", folder))


# ---- the device is not waited for ----


class Copies(TorchFunctionMode):
    """Counts tensors that the host sends to the device, here a device without memory: both sides wait for each."""

    sent = 0

    def __torch_function__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        if f is torch.tensor or f is torch.Tensor.to:
            self.sent += out.is_meta and not getattr(args[0], "is_meta", False)
        return out


@pytest.mark.parametrize("name", ("sid", "sid-lsg", "dmd2", "vsd", "lcd"))
def test_a_turn_sends_nothing_to_the_device(name):
    """After the first turn; that nothing is fetched either is seen by what cannot be: a value of the device."""
    method, teacher = METHODS[name], tiny(VP.scaled_linear(), "v", dtype=torch.float32, classes=3)
    steps = {"student": StudentConfig(times=(1.0, 0.5))}
    nets = build(method, teacher, (2,), {"label": torch.tensor([0])}, **steps)
    start(nets, SimpleNamespace(device=torch.device("meta"), distributed_type=None))
    sent = [0, 0]
    for step in range(2):
        for update in method.updates():
            draw = Draw(0, step, update.player, torch.arange(4, device="meta"))
            with Copies() as copies:
                x = method.sample(nets, batch := vectors(draw), draw)
                update.loss(x, nets, batch, draw)[0].backward()
            sent[step] += copies.sent
    assert sent[1] == 0 and (sent[0] or nets.disc)  # a head is sized on that device, before


@pytest.mark.parametrize("calls", (1, 2, 3, 4))
def test_ledger_of_dmd2(calls):
    """Samples that pass each network in a cycle of five fake steps, by what is asked of the pass; batch 8, guidance 2.

    The classifier sees fakes and reals in one pass, and stops at its tap.
    """
    B, method, passes = 8, DMD2(guidance=2.0, every=5, taps=("mid",)), Counter()
    nets = nets_of(method, student=StudentConfig(steps=4))

    class Fixed(Draw):
        def index(self, name, n):
            return calls - 1

    def begun(role):
        return lambda net, args: passes.update({(role, "graded" if torch.is_grad_enabled() else "free"): len(args[0])})

    def ended(role):
        return lambda net, args, out: passes.update({(role, "whole"): len(args[0])})

    for role, net in {"teacher": nets.teacher.net, **nets.modules()}.items():
        net.register_forward_pre_hook(begun(role))
        net.register_forward_hook(ended(role))
    *_, state = train(method, nets, vectors, config(max_train_steps=5), Accelerator(cpu=True), draw=Fixed)
    assert state.step == 5
    assert passes == {
        ("student", "free"): (5 * calls - 1) * B,  # a generation a step; the student's own serves the fake too
        ("student", "graded"): B,
        ("student", "whole"): 5 * calls * B,
        ("teacher", "free"): 2 * B,  # with and without the condition, in one pass
        ("teacher", "whole"): 2 * B,
        ("fake", "free"): B,  # the score in the student's step
        ("fake", "graded"): B + 5 * B + 5 * 2 * B,  # classifier for the student; denoising; classifier, both halves
        ("fake", "whole"): B + 5 * B,
        ("disc", "graded"): B + 5 * 2 * B,
        ("disc", "whole"): B + 5 * 2 * B,
    }
