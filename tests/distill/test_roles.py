"""How the roles start: copies of the teacher, times named by their noise; what a method needs is said before work."""

import copy
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from gaussian import SCHEDULES
from tiny import tiny
from torch import nn

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import EDM, VP, Flow
from distill.method import Requirement
from distill.methods import DMD2, LCD, SCM, VSD, SiD
from distill.networks.lora import LoRA
from distill.random import Draw
from distill.training import checkpoint, requirements
from distill.training.build import build
from distill.training.config import FakeConfig, StudentConfig, TrainConfig
from distill.training.loop import train

METHODS = {
    "sid": (SiD(), {"student", "fake"}),
    "dmd2": (DMD2(taps=("mid",)), {"student", "fake", "disc"}),
    "dmd2-prompts": (DMD2(gan=0, gan_fake=0), {"student", "fake"}),
    "vsd": (VSD(guidance=1.0), {"student", "fake"}),
    "lcd": (LCD(), {"student", "target"}),
    "lcd-itself": (LCD(target_ema=0), {"student"}),
    "scm": (SCM(), {"student"}),
}


@pytest.mark.parametrize("name", METHODS)
def test_roles_start_as_copies_of_the_teacher(name):
    (method, roles), teacher = METHODS[name], tiny(EDM())
    nets = build(method, teacher, (2,))
    assert nets.modules().keys() == roles
    assert nets.teacher is teacher and nets.shape == (2,)
    tensors = {id(p) for p in teacher.net.parameters()}
    for role in roles - {"disc"}:
        net = nets.modules()[role]
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), teacher.net.parameters())), role
        assert not tensors & {id(p) for p in net.parameters()}, role  # nobody shares a weight
        assert all(p.requires_grad == (role != "target") for p in net.parameters()), role
        tensors |= {id(p) for p in net.parameters()}


def test_everything_else_of_the_teacher_is_kept():
    call = lambda net, x, t, c: net(x, t)
    teacher = Denoiser(tiny(Flow()).net, Flow(), "edm", call, {"label": torch.tensor([0])}, sigma_d=0.7)
    nets = build(SiD(), teacher, (2,))
    for role in (nets.student.denoiser, nets.fake):
        assert (role.schedule, role.kind, role.call, role.sigma_d) == (Flow(), "edm", call, 0.7)
        assert role.null is teacher.null


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_first_call_is_named_by_its_noise(schedule):
    """sigma is sigma / alpha, the same level on every schedule."""
    path = SCHEDULES[schedule]
    student = build(SiD(), tiny(path), (2,), student=StudentConfig(sigma=2.5)).student
    assert float(path.ratio(torch.tensor(student.times).double())) == pytest.approx(2.5, rel=1e-6)
    assert student.input_scale == pytest.approx(float(path.coefficients(torch.tensor(student.times).double())[1]))


@pytest.mark.parametrize("n", (1, 399, 625, 999, 17.5))
def test_first_call_is_named_by_its_timestep(n):
    """Exactly n / (N - 1) on a table; a flow counts 1000 sigma. Several steps start at the end."""
    student = StudentConfig(timestep=n)
    vp = VP.scaled_linear()
    times = build(SiD(), tiny(vp), (2,), student=student).student.times
    assert times == (n / 999,) and float(vp.native(torch.tensor(times, dtype=torch.float64))) == n
    assert build(SiD(), tiny(Flow()), (2,), student=student).student.times == (n / 1000,)
    assert build(SiD(), tiny(vp), (2,), student=replace(student, steps=4)).student.times == (1.0, 0.75, 0.5, 0.25)


def test_impossible_timesteps():
    with pytest.raises(ValueError, match="sigma 2.5 and timestep 399 both name the first call; give one of them"):
        StudentConfig(sigma=2.5, timestep=399)
    with pytest.raises(ValueError, match="student.timestep is 0; it must be above 0 and finite, or None"):
        build(SiD(), tiny(EDM()), (2,), student=StudentConfig(timestep=0))
    with pytest.raises(ValueError, match="timestep is 1000; on this schedule it must be above 0 and at most 999"):
        build(SiD(), tiny(VP.scaled_linear()), (2,), student=StudentConfig(timestep=1000))
    with pytest.raises(ValueError, match="timestep is 10, but EDM counts no steps; give sigma"):
        build(SiD(), tiny(EDM()), (2,), student=StudentConfig(timestep=10))


def test_calls():
    of = lambda **change: build(SiD(), tiny(EDM()), (2,), student=StudentConfig(**change)).student
    assert of().times == (1.0,)
    assert of(steps=4).times == (1.0, 0.75, 0.5, 0.25)
    assert of(times=(0.9, 0.3), renoise="ddim").renoise == "ddim" and of(times=(0.9, 0.3)).times == (0.9, 0.3)
    assert of(scale=1.0).input_scale == 1.0
    first = float(EDM().time(torch.tensor(2.5).double()))
    assert of(steps=2, sigma=2.5).times == pytest.approx((first, first / 2))
    with pytest.raises(ValueError, match="steps is 0; it must be at least 1"):
        of(steps=0)


def test_the_head_fits_the_tapped_features():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Conv2d(1, 12, 3, 2, 1), nn.ConvTranspose2d(12, 1, 2, 2)

        def forward(self, x, t):
            return self.up(self.down(x))

    nets = build(DMD2(taps=("down",)), Denoiser(Net(), Flow(), "flow"), (1, 16, 16))
    feature = nets.fake.features(torch.zeros(2, 1, 16, 16), torch.full((2,), 0.5), None, ("down",))[0]
    assert nets.disc(feature).shape == (2, 1, 1, 1)


def test_a_head_for_each_tap():
    """In the order of the taps; of two of the same kind each its own."""
    teacher = tiny(Flow(), "flow", dtype=torch.float32)
    nets = build(DMD2(taps=("first", "mid")), teacher, (2,))
    features = nets.fake.features(torch.randn(5, 2), torch.full((5,), 0.5), None, ("first", "mid"))
    logits = nets.disc(*features)
    assert logits.shape == (5, 2) and len(nets.disc) == 2
    assert torch.equal(logits, torch.cat([one(f) for one, f in zip(nets.disc, features)], dim=1))
    one = build(DMD2(taps=("mid",)), teacher, (2,)).disc
    assert [*one.state_dict()] == ["0.weight", "0.bias", "2.weight", "2.bias"]  # as checkpoints have them


# ---- starting from an earlier run ----

ADAPTERS = LoRA(2, 4.0, ("mid", "last"))


def stage(lora=ADAPTERS, **change):
    both = {"student": StudentConfig(lora=lora, **change), "fake": FakeConfig(lora)}
    return build(DMD2(taps=("mid",), every=1), tiny(Flow(), "flow", dtype=torch.float32), (2,), **both)


def trained(lora, folder, **change):
    """A run of two steps, and its checkpoint."""
    cfg = TrainConfig(max_train_steps=2, train_batch_size=4, learning_rate=1e-2)
    data = lambda draw: {"real": draw.normal("real", (4, 2))}
    method = DMD2(taps=("mid",), every=1)
    *_, state = train(method, stage(lora, **change), data, cfg, Accelerator(cpu=True))
    return state, checkpoint.save(state, folder)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("lora", (LoRA(), ADAPTERS), ids=("full", "lora"))
@pytest.mark.parametrize("freeze", ((), ("first",)), ids=("free", "frozen"))
def test_a_second_stage_starts_where_the_first_ended(lora, freeze, tmp_path):
    """The student at its average, or at its last weights by the file's name, and the fake; the teacher is untouched."""
    state, folder = trained(lora, tmp_path, freeze=freeze)
    where = {
        "student": StudentConfig(lora=lora, init=f"{folder}", freeze=freeze),
        "fake": FakeConfig(lora, f"{folder}"),
    }
    teacher = tiny(Flow(), "flow", dtype=torch.float32)
    before = copy.deepcopy(teacher.net)
    nets = build(DMD2(taps=("mid",)), teacher, (2,), **where)
    assert same(nets.student.denoiser.net, state.ema.net) and same(nets.fake.net, state.nets.fake.net)
    assert same(teacher.net, before) and not same(state.ema.net, state.nets.student.denoiser.net)
    raw = stage(lora, init=f"{folder / 'student.safetensors'}", freeze=freeze)
    assert same(raw.student.denoiser.net, state.nets.student.denoiser.net)
    target = build(LCD(), teacher, (2,), student=where["student"]).target
    assert same(target.net, state.ema.net)


@pytest.mark.parametrize("shard", ("10GB", "2KB"), ids=("one file", "shards"))
@pytest.mark.parametrize("of", ("unet", "."), ids=("network", "pipeline"))
def test_a_student_starts_from_a_folder_of_diffusers(shard, of, tmp_path):
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = lambda: UNet2DModel(8, 2, 2, **blocks, layers_per_block=1, norm_num_groups=4, add_attention=False)
    teacher, stored = Denoiser(unet(), Flow(), "flow", lambda net, x, t, c: net(x, t).sample), unet()
    stored.half().save_pretrained(tmp_path / "unet", max_shard_size=shard)
    assert (len([*(tmp_path / "unet").glob("*.safetensors")]) == 1) == (shard == "10GB")
    nets = build(SiD(), teacher, (2, 8, 8), student=StudentConfig(init=f"{tmp_path / of}"))
    assert same(nets.student.denoiser.net, stored.float()) and not same(nets.fake.net, stored)


@pytest.mark.parametrize(
    ("lora", "init", "says"),
    (
        (LoRA(), "nowhere", "student.init is .*nowhere', which holds no weights; it may be a checkpoint-N folder"),
        (LoRA(), "checkpoint-2/none.safetensors", "has no none.safetensors; it may be"),
        (LoRA(), "checkpoint-2/disc.safetensors", "does not fit: it has no first.weight"),
        (LoRA(4, 4.0, ("mid", "last")), "lora/checkpoint-2", r"its mid.lora_A.default.weight is \(2, 16\).* \(4, 16\)"),
        (LoRA(2, 4.0, ("mid",)), "lora/checkpoint-2", "it has last.lora_A.default.weight, which this student does not"),
        (LoRA(2, 4.0, ("first", "mid", "last")), "lora/checkpoint-2", "it has no first.lora_A.default.weight"),
        (LoRA(), "lora/checkpoint-2", "it has no first.weight .*see student.lora"),
        (ADAPTERS, "checkpoint-2", "it has no mid.lora_A.default.weight .*see student.lora"),
    ),
    ids=("nowhere", "no file", "head", "rank", "fewer", "more", "adapters to full", "full to adapters"),
)
def test_weights_that_do_not_fit(lora, init, says, tmp_path):
    """The first tensor at fault is named."""
    trained(LoRA(), tmp_path), trained(ADAPTERS, tmp_path / "lora")
    with pytest.raises(ValueError, match=says):
        stage(lora, init=f"{tmp_path / init}")


def test_generate():
    """A sample for each index of the draw, from its noise "z" and the batch's condition."""
    nets = build(SiD(), tiny(EDM(), classes=3, dtype=torch.float32), (2,))
    draw, c = Draw(0, 0, "student", torch.arange(5)), {"label": torch.arange(5) % 3}
    want = nets.student.generate(draw.normal("z", (5, 2)), c)
    assert torch.equal(nets.generate({"c": c}, draw), want)


@pytest.mark.parametrize(
    "method",
    (
        SiD(kappa=(1.0, 1.0, 1.0, 1.5)),
        SiD(kappa=(0.0, 0.0, 0.0, 1.0)),
        DMD2(guidance=2.0, taps=("mid",)),
        VSD(),
        VSD(guidance=(0.5, 4.0)),
        VSD(guidance=1.0, fake_guidance=0.5),
        LCD(guidance=7.5),
        LCD(guidance=(6.0, 16.0)),
        SCM(guidance=1.5),
        SCM(guidance=(4.0, 5.0)),
    ),
    ids=repr,
)
def test_guidance_needs_a_null_condition(method):
    with pytest.raises(ValueError, match=f"{type(method).__name__} with these guidance values needs a null condition"):
        build(method, tiny(EDM()), (2,))
    build(method, tiny(EDM(), classes=3), (2,), {"label": torch.tensor([0])})


class Misspelt(SCM):
    requirements = ("reel",)


def test_requirements_are_members_of_the_enum():
    with pytest.raises(ValueError, match="Misspelt.requirements holds 'reel'; it may hold members of .*Requirement"):
        build(Misspelt(), tiny(EDM()), (2,))
    with pytest.raises(KeyError, match="REEL"):
        Requirement.select(REEL=True)
    groups = (requirements.CHECKS.keys(), requirements.FROM_DATA, requirements.FROM_RECIPE)
    assert sum(map(len, groups)) == len(Requirement) and set().union(*groups) == set(Requirement)


def test_a_role_that_the_method_lacks():
    nets = build(SCM(), tiny(EDM()), (2,))
    for name, role in (("fake_score", "fake"), ("discriminator", "disc"), ("reward_proxy", "proxy")):
        with pytest.raises(ValueError, match=f"no role '{role}': name it in the method's `roles`"):
            getattr(nets, name)
