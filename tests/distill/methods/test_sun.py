"""SUN and NASA-T: off to the bit, one pass that is guidance exactly, steps by hand; the adapter in other pipelines.

Conditions are words of one length: an attention to one word is that word, the mean of a Gaussian. So guidance w is the
mean n + w (c - n), and the adapter that hears c and n through the network's own values says it with alpha = w - 1.
"""

import copy
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from gaussian import F64, SCHEDULES, encode, level
from tiny import WORDS, reader, spoken
from tiny import tiny as small
from torch import nn

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import Flow
from distill.diffusion.student import Student
from distill.diffusion.times import Fixed, Uniform
from distill.methods import NASAT, SUN, VSD
from distill.networks.negative_attention import (
    TEXT,
    adapt,
    adapters,
    build_adapter_role,
    layers,
    shuffled_conditions,
    strip,
    with_negative_prompt,
)
from distill.random import Draw
from distill.roles import Nets
from distill.training import precision
from distill.training.build import build
from distill.training.config import StudentConfig, TrainConfig
from distill.training.loop import train
from pipelines import load, run
from pipelines.export import export, verify
from pipelines.export.schedule import find_student_scheduler
from pipelines.families import tiny
from pipelines.inference.negative_prompt import FILE, install, write
from recipes import sun_sd15

B, D, VAR, W = 12, 3, 0.3, 4.0
FAMILIES = ("sd", "pixart", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl", "sana")))


class Told(nn.Module):
    """The optimal denoiser of N(word, VAR) of a condition's one word."""

    def __init__(self, schedule, kind):
        from diffusers.models.attention_processor import Attention

        super().__init__()
        self.schedule, self.kind = schedule, kind
        self.attn2 = Attention(D, D, heads=1, dim_head=D, out_bias=False).to(F64)
        for p in self.attn2.parameters():
            p.data = torch.eye(D, dtype=F64)

    def forward(self, x, native, prompt_embeds):
        alpha, sigma = level(self.schedule, native)
        mean = self.attn2(x[:, None], encoder_hidden_states=prompt_embeds)[:, 0]
        return encode(self.kind, x, posterior(x, mean, alpha, sigma), alpha, sigma)


def posterior(x, mean, alpha, sigma):
    return mean + alpha * VAR / (alpha**2 * VAR + sigma**2) * (x - alpha * mean)


def words(n, seed=0):
    """n words of length 2."""
    word = torch.randn(n, 1, D, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return 2 * word / word.norm(dim=2, keepdim=True)


def kind_of(schedule):
    return {"edm": "edm", "vp": "eps"}.get(schedule, "v")


def world(schedule, times=(0.9, 0.4), alpha=0.0):
    """(roles, a batch): alpha of both branches, their keys and values the network's own."""
    path, kind = SCHEDULES[schedule], kind_of(schedule)
    teacher = Denoiser(Told(path, kind), path, kind, null={TEXT[0]: words(1, 7)})
    nets = Nets(teacher, Student(replace(teacher, net=build_adapter_role(teacher.net, 1)), times, renoise="ddim"), (D,))
    turned(nets.student.denoiser.net, alpha)
    real = torch.randn(B, D, dtype=F64, generator=torch.Generator().manual_seed(1))
    return nets, {"real": real, "real_c": {TEXT[0]: words(B)}}


def turned(net, plus, minus=None):
    for layer in layers(net).values():
        layer.negative.plus.alpha.data.fill_(plus)
        layer.negative.minus.alpha.data.fill_(plus if minus is None else minus)


def turn(n=B):
    return Draw(0, 0, "student", torch.arange(n))


def loss_of(method, nets, batch):
    return method.student_loss(batch["real"], nets, batch, turn(len(batch["real"])))


# ---- exact ----


@pytest.mark.level(1, "SUN")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_pass_is_guidance(schedule):
    """L_cfg is (1 - alpha / (w - 1))^2 of that at alpha = 0, and nothing at w - 1: also against null conditions."""
    method = SUN(guidance=W, msc=0.0, p_null=0.3, times=Fixed(0.6))
    at = lambda alpha: float(loss_of(method, *world(schedule, alpha=alpha))[0].detach())
    assert at(0.0) > 1e-2 and at(W - 1) < 1e-20 * at(0.0)
    for alpha in (-1.0, 1.0, 5.0):
        assert at(alpha) == pytest.approx((1 - alpha / (W - 1)) ** 2 * at(0.0), rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradient_at_the_start(schedule):
    """Of the adapter alone, and by hand: d L / d alpha = -2 L / (w - 1), half of it from each branch."""
    nets, batch = world(schedule)
    loss, _ = loss_of(SUN(guidance=W, msc=0.0, times=Fixed(0.6)), nets, batch)
    loss.backward()
    net = nets.student.denoiser.net
    graded = {name for name, p in net.named_parameters() if p.grad is not None}
    assert graded == adapters(net).keys() == {name for name, p in net.named_parameters() if p.requires_grad}
    slope = sum(branch.alpha.grad.sum() for branch in (net.attn2.negative.plus, net.attn2.negative.minus))
    assert float(slope) == pytest.approx(float(-2 * loss.detach() / (W - 1)), rel=1e-9)


def test_no_offset_from_itself():
    """A prompt against itself is the teacher where both branches weigh alike, and is not where they differ."""
    nets, batch = world("vp", alpha=2.5)
    x, t, c = batch["real"], torch.full((B,), 0.5, dtype=F64), batch["real_c"]
    student, plain = nets.student.denoiser, nets.teacher(x, t, c).out
    torch.testing.assert_close(student(x, t, with_negative_prompt(c, c)).out, plain, rtol=1e-12, atol=1e-12)
    turned(student.net, 2.5, 1.0)
    assert (student(x, t, with_negative_prompt(c, c)).out - plain).norm() > 0.1


def test_the_offset_by_hand():
    """Words of any length: the negative one and the branches' own are rescaled to the prompt's, sample by sample."""
    nets, _ = world("flow")
    c, n = (
        scale * words(B, seed) for scale, seed in ((torch.linspace(0.5, 3, B).double()[:, None, None], 0), (5.0, 1))
    )
    branch, x = nets.student.denoiser.net.attn2.negative, torch.ones(B, D, dtype=F64)
    with torch.no_grad():
        for seed, one in enumerate((branch.minus, branch.plus)):
            own = torch.randn(3, D, D, dtype=F64, generator=torch.Generator().manual_seed(seed))
            one.alpha.copy_(own[0, 0]), one.beta.copy_(own[0, 1]), one.to_v.weight.copy_(own[1])
        told = with_negative_prompt({TEXT[0]: c}, {TEXT[0]: n})
        got = nets.student.denoiser(x, torch.full((B,), 0.5, dtype=F64), told).x0
        minus, plus = (
            one.alpha * c.norm(dim=2, keepdim=True) * torch.nn.functional.normalize(one.to_v(word), dim=2) + one.beta
            for one, word in ((branch.minus, n), (branch.plus, c))
        )
        want = posterior(x, (c - minus + plus)[:, 0], 0.5, 0.5)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def by_hand(x, mean, path, t, s, steps):
    """DDIM towards N(mean, VAR) in `steps` equal steps, the last one to x0 where s = 0."""
    grid = [t + (s - t) * j / steps for j in range(steps + 1)]
    for u, v in zip(grid, grid[1:]):
        (a, b), (a1, b1) = (path.coefficients(torch.tensor([w], dtype=F64)) for w in (u, v))
        x0 = posterior(x, mean, a, b)
        x = a1 * x0 + b1 * (x - a * x0) / b if v > 0 else x0
    return x


@pytest.mark.level(1, "SUN")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_by_hand(schedule):
    """Both terms of L_msc of the exact student: its one step, the teacher's k, its own two."""
    nets, batch = world(schedule, times=(0.9, 0.4), alpha=W - 1)
    method, draw, path = SUN(guidance=W, k=3, p_null=0.0), turn(), SCHEDULES[schedule]
    _, logs = loss_of(method, nets, batch)
    c, n = batch["real_c"][TEXT[0]][:, 0], shuffled_conditions(batch["real_c"], draw)[TEXT[0]][:, 0]
    steps, eps, gaps = draw.integers("step", 2), draw.normal("eps_msc", (B, D)).double(), {2: [], 3: []}
    assert set(steps.tolist()) == {0, 1}
    for i in range(B):
        t, s = ((0.9, 0.4), (0.4, 0.0))[int(steps[i])]
        x_t = path.diffuse(batch["real"][i : i + 1], eps[i : i + 1], torch.tensor([t], dtype=F64))
        one, *more = (by_hand(x_t, n[i] + W * (c[i] - n[i]), path, t, s, k) for k in (1, 2, 3))
        for k, far in zip((2, 3), more):
            gaps[k].append((one - far).square().mean())
    assert float(logs["many"].detach()) == pytest.approx(float(torch.stack(gaps[3]).mean()), rel=1e-6)
    assert float(logs["two"].detach()) == pytest.approx(float(torch.stack(gaps[2]).mean()), rel=1e-6)
    assert loss_of(replace(method, k=1), nets, batch)[1]["many"] < 1e-20


@pytest.mark.parametrize("msc", (0.0, 0.5))
def test_the_loss_is_its_terms(msc):
    """Without MSC it is L_cfg to the bit; with it the gradient is of the one step alone, what it should be is fixed."""
    nets, batch = world("flow", alpha=1.0)
    loss, logs = loss_of(SUN(guidance=W, msc=msc, p_null=0.0), nets, batch)
    assert torch.equal(loss, logs["cfg"] + (msc * (logs["many"] + logs["two"]) if msc else 0))
    assert ("many" in logs) == bool(msc)
    if msc:
        params = [p for p in nets.student.denoiser.net.parameters() if p.requires_grad]
        near = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        want = torch.autograd.grad(two_steps(nets, batch), params, allow_unused=True)
        for got, slope in zip(torch.autograd.grad(logs["two"], params, allow_unused=True), want):
            assert (got is None) == (slope is None)
            near(got, slope) if got is not None else None


def two_steps(nets, batch):
    """|one step - sg two steps|^2 of the student."""
    draw, path, times = turn(), nets.teacher.path, torch.tensor([0.9, 0.4, 0.0], dtype=F64)
    i = draw.integers("step", 2)
    t, s, c = times[i], times[i + 1], batch["real_c"]
    x_t = path.diffuse(batch["real"], draw.normal("eps_msc", (B, D)).double(), t)
    told = with_negative_prompt(c, shuffled_conditions(c, draw))

    def stepped(x, t, s):
        pred = nets.student.denoiser(x, t, told)
        return torch.where(s[:, None] > 0, path.diffuse(pred.x0, pred.eps, s), pred.x0)

    two = stepped(stepped(x_t, t, (t + s) / 2), (t + s) / 2, s).detach()
    return (stepped(x_t, t, s) - two).square().mean()


def test_another():
    """Every other sample alike, never the sample itself; a batch of one has none."""
    c = {"n": torch.arange(5)}
    seen = torch.zeros(5, 5)
    for step in range(400):
        i = shuffled_conditions(c, Draw(0, step, "student", torch.arange(5)))["n"]
        seen[torch.arange(5), i] += 1
    assert (seen.diagonal() == 0).all() and seen[~torch.eye(5, dtype=bool)].min() > 60
    with pytest.raises(ValueError, match="it has one: make it larger"):
        shuffled_conditions({"n": torch.arange(1)}, turn(1))


# ---- NASA-T ----


def distilled(schedule="vp"):
    """(roles, a batch): teacher, fake and student tell N(word, VAR) each, the last with the fake's words moved."""
    nets, batch = world(schedule, times=(0.8,))
    net = copy.deepcopy(nets.teacher.net).requires_grad_(True)
    student = Student(replace(nets.teacher, net=net), (0.8,), 1.0)
    null = {TEXT[0]: words(1, 9)}
    return replace(nets, student=student, fake=replace(nets.teacher, null=null)), batch | {"c": batch["real_c"]}


class Doubles(Draw):
    def normal(self, name, shape):
        return super().normal(name, shape).double()


def turns(method, nets, batch, player="student"):
    draw = Doubles(0, 0, player, torch.arange(B))
    x = method.sample(nets, batch, draw)
    (update,) = (one for one in method.updates() if one.player == player)
    return x, update.loss(x, nets, batch, draw)[0], draw


def test_without_nasa_it_is_the_base():
    for player in ("student", "fake"):
        got, want = (turns(method, *distilled(), player) for method in (NASAT(VSD(W), alpha=0.0), VSD(W)))
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert NASAT(VSD(W), alpha=0.0).requirements == VSD(W).requirements


@pytest.mark.level(1, "NASAT")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nasa_by_hand(schedule):
    """The student's mean is c - a n, the teacher's n + k (c - n), the fake's that of its own null condition."""
    nets, batch = distilled(schedule)
    path, method = SCHEDULES[schedule], NASAT(VSD(W, times=Fixed(0.5), reduction="sum", weight=False), alpha=0.7)
    x, loss, draw = turns(method, nets, batch)
    c, n = batch["c"][TEXT[0]][:, 0], shuffled_conditions(batch["c"], draw)[TEXT[0]][:, 0]
    a = 0.7 * draw.index("nasa", 1 << 20) / (1 << 20)
    at = lambda t: (level.reshape(1, 1) for level in path.coefficients(torch.tensor([t], dtype=F64)))
    near = lambda got, want: torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    near(x, posterior(draw.normal("z", (B, D)), c - a * n, *at(0.8)))
    (got,) = torch.autograd.grad(loss, x)
    (alpha, sigma), null = at(0.5), nets.fake.null[TEXT[0]][:, 0]
    x_t = (alpha * x + sigma * draw.normal("eps", (B, D))).detach()
    real, fake = (posterior(x_t, m + W * (c - m), alpha, sigma) for m in (n, null))
    near(got, alpha / sigma * (fake - real) / B)
    assert 0.01 < a < 0.7


def test_nasa_changes_with_the_step_alone():
    """One a for all samples of a step, from 0 to alpha."""
    nets, batch = distilled()
    seen = []
    for step in range(40):
        NASAT(VSD(W), alpha=0.5).sample(nets, batch, Doubles(0, step, "student", torch.arange(B)))
        seen.append(nets.student.denoiser.net.attn2.processor.rule.alpha)
    assert 0 <= min(seen) < 0.1 and 0.4 < max(seen) < 0.5 and len({*seen}) == 40
    x, t = batch["real"], torch.full((B,), 0.5, dtype=F64)
    assert torch.equal(nets.student.denoiser(x, t, batch["c"]).out, nets.teacher(x, t, batch["c"]).out)


def test_nasa_needs_cross_attention():
    with pytest.raises(ValueError, match="Tiny has no cross-attention"):
        build(NASAT(), small(Flow(), "flow", classes=3), (2,), {"label": torch.tensor([0])})


# ---- what is learned ----


def trained(nets, data, steps, method, lr=0.05):
    cfg = TrainConfig(max_train_steps=steps, train_batch_size=B, learning_rate=lr, adam_beta1=0.9, ema_half_life=0)
    for _ in train(method, nets, data, cfg, Accelerator(cpu=True)):
        pass


@pytest.mark.level(2, "SUN")
def test_learns_guidance():
    """From the teacher itself to its guidance: L_cfg falls more than a hundredfold."""
    nets, _ = world("flow")
    table, method = words(3), SUN(guidance=W, msc=0.0, p_null=0.2, times=Uniform())

    def data(draw):
        label = draw.integers("label", 3)
        c = {TEXT[0]: table[label]}
        return {"c": c, "real_c": c, "real": table[label][:, 0] + VAR**0.5 * draw.normal("x", (len(label), D)).double()}

    at = lambda: float(method.student_loss((b := data(turn()))["real"], nets, b, turn())[0].detach())
    before, plain = at(), copy.deepcopy(nets.teacher.net.state_dict())
    trained(nets, data, 150, method)
    assert at() < before / 100
    assert all(torch.equal(p, plain[name]) for name, p in nets.teacher.net.state_dict().items())


@pytest.mark.level(2, "SUN")
def test_msc_brings_one_step_to_many():
    """With L_msc one step is nearer to the guided teacher's many, and to its own two, than with L_cfg alone."""
    gaps = {}
    for msc in (0.0, 3.0):
        teacher = reader(Flow(), "flow", dtype=torch.float32, classes=3)
        teacher.net.last.weight.data.mul_(2)
        config = StudentConfig(times=(1.0,), renoise="ddim", negative=WORDS)
        nets = build(SUN(), teacher, (2,), spoken(torch.tensor([0])), config)

        def data(draw):
            c = spoken(draw.integers("label", 3))
            return {"c": c, "real_c": c, "real": draw.normal("x", (len(draw.samples), 2))}

        trained(nets, data, 100, SUN(guidance=3.0, msc=msc, p_null=0.0), 0.02)
        logs = [SUN(guidance=3.0).student_loss(b["real"], nets, b, d)[1] for d, b in seen(data)]
        gaps[msc] = {key: float(torch.stack([log[key].detach() for log in logs]).mean()) for key in ("many", "two")}
    assert all(gaps[3.0][key] < 0.7 * gaps[0.0][key] for key in ("many", "two")), gaps


def seen(data):
    draws = [Draw(9, step, "student", torch.arange(64)) for step in range(2)]
    return [(draw, data(draw)) for draw in draws]


# ---- networks and pipelines ----


@pytest.fixture(scope="module", params=FAMILIES)
def teacher(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "teacher"
    tiny.save(request.param, folder)
    return load(folder)


def length(teacher):
    return teacher.encode(["x"])[TEXT[0]].shape[1]


def louder(net, seed=0):
    """Adapters that do something."""
    g = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        if ".negative." in name:
            p.data += 0.3 * torch.randn(p.shape, generator=g)
    return net


@torch.no_grad()
def output(teacher, net, c):
    x = torch.randn(len(c[TEXT[0]]), *teacher.shape, generator=torch.Generator().manual_seed(0))
    return replace(teacher.denoiser, net=net)(x, torch.full((len(x),), 0.9, dtype=F64), c).out


def test_off_is_the_teacher(teacher):
    """Bit for bit without a negative prompt, and with one at the start; then another prompt says something else."""
    net, c = build_adapter_role(teacher.denoiser.net, length(teacher)), teacher.encode(["a red fox", "a tree"])
    plain, told = output(teacher, teacher.denoiser.net, c), with_negative_prompt(c, teacher.negative(["blurry"]))
    assert torch.equal(output(teacher, net, c), plain) and torch.equal(output(teacher, net, told), plain)
    assert torch.equal(output(teacher, louder(net), c), plain)
    heard = output(teacher, net, told)
    assert (heard - plain).abs().max() > 1e-3
    assert (heard - output(teacher, net, with_negative_prompt(c, teacher.negative(["grey"])))).abs().max() > 1e-4
    alone = {key: value[:1] for key, value in told.items()}
    torch.testing.assert_close(output(teacher, net, alone)[0], heard[0], rtol=1e-4, atol=1e-5)
    again = strip(copy.deepcopy(net))
    assert not adapters(again) and torch.equal(output(teacher, again, c), plain)


def test_padding_is_not_heard(teacher):
    c = with_negative_prompt(teacher.encode(["a red fox"]), teacher.negative(["blurry"]))
    if "mask" not in c:
        return
    net, (text, mask) = louder(build_adapter_role(teacher.denoiser.net, length(teacher))), (c[key] for key in TEXT)
    other = c | {TEXT[0]: torch.where(mask[:, :, None] > 0, text, torch.randn(text.shape))}
    heard, first = output(teacher, net, c), int(mask[:, : length(teacher)].sum())
    torch.testing.assert_close(output(teacher, net, other), heard)
    assert (mask == 0).any() and 0 < first < length(teacher)
    silent = c | {"mask": torch.cat([mask[:, : length(teacher)], mask[:, : length(teacher)].flip(1)], dim=1)}
    assert (output(teacher, net, silent) - heard).abs().max() > 1e-5


def test_recomputed_blocks_hear_the_same(tmp_path):
    """Gradient checkpointing changes no gradient of the adapter."""
    tiny.save("sd", tmp_path / "sd")
    teacher, found = load(tmp_path / "sd"), []
    c = with_negative_prompt(teacher.encode(["a fox", "a tree"]), teacher.encode(["blurry", "grey"]))
    for recompute in (False, True):
        net = louder(build_adapter_role(teacher.denoiser.net, 77)).train()
        if recompute:
            net.enable_gradient_checkpointing()
        x = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(0))
        out = replace(teacher.denoiser, net=net)(x, torch.full((2,), 0.5, dtype=F64), c).out
        params = [p for p in net.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(out.square().sum(), params))
        teacher.denoiser.net.disable_gradient_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(*found)) and all(g.abs().max() > 0 for g in found[0])


def pipeline(teacher, net, steps=2):
    config = StudentConfig(steps=steps, renoise="ddim")
    carried, times = find_student_scheduler(teacher, config)
    parts = teacher.parts
    pipe = parts.pipe(**{parts.network: copy.deepcopy(net), "scheduler": carried})
    return pipe, Student(replace(teacher.denoiser, net=net), times, renoise="ddim")


def test_in_a_plain_pipeline(teacher, tmp_path):
    """`install` on the base and on another network of its class: the trainer's own samples; else it is as it was."""
    n, base = length(teacher), teacher.denoiser.net
    write(louder(build_adapter_role(base, n)), tmp_path / "a.safetensors")
    tuned = copy.deepcopy(base)
    for i, p in enumerate(tuned.parameters()):
        p.data *= 1 + 0.1 * (-1) ** i
    for net in (base, tuned):
        plain, _ = pipeline(teacher, net)
        pipe, student = pipeline(teacher, louder(build_adapter_role(net, n)) if net is base else carried(net, base, n))
        strip(pipe.unet if hasattr(pipe, "unet") else pipe.transformer)
        install(pipe, tmp_path / "a.safetensors")
        expected = verify.sample_reference(student, teacher, student.denoiser.net)
        assert expected.negative and verify.compare(pipe, teacher, expected, 2).largest < 1e-4
        other = replace(expected, negative="a red fox")
        assert verify.compare(pipe, teacher, other, 2).largest > 10 * verify.TOLERANCE  # and another one is heard
        family, z = teacher.family, expected.z[:1]
        guided = [family.sample(one, ["a tree"], z, 2, 4.0, "blurry") for one in (plain, pipe)]
        assert torch.equal(*guided)  # under guidance it is the pipeline that it was
        install(pipe, tmp_path / "a.safetensors")  # again, in the place of the first
        assert verify.compare(pipe, teacher, expected, 2).largest < 1e-4


def carried(net, base, n):
    """The adapters of the base on another network."""
    made = adapt(copy.deepcopy(net), n)
    made.load_state_dict(adapters(louder(build_adapter_role(base, n))), strict=False)
    return made


def test_what_does_not_fit(tmp_path):
    """Another network's file, no adapter at all; networks without cross-attention; a wrong number of words."""
    for name in ("sd", "sdxl", "flux"):
        tiny.save(name, tmp_path / name)
    sd, sdxl, flux = (load(tmp_path / name) for name in ("sd", "sdxl", "flux"))
    write(build_adapter_role(sdxl.denoiser.net, 77), tmp_path / "sdxl.safetensors")
    pipe = sd.parts.pipe()
    with pytest.raises(ValueError, match="is not an adapter for negative prompts of this UNet2DConditionModel"):
        install(pipe, tmp_path / "sdxl.safetensors")
    assert not adapters(pipe.unet)
    with pytest.raises(ValueError, match="is not an adapter"):
        install(pipe, tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="xformers replaces the processors of the adapter"):
        precision._set(build_adapter_role(sd.denoiser.net, 77), "xformers")
    with pytest.raises(ValueError, match="has no cross-attention"):
        build_adapter_role(flux.denoiser.net, 77)
    sd.null()
    for given in (0, 50):
        with pytest.raises(ValueError, match=f"student.negative is {given}: pass --student.negative 77"):
            build(SUN(), sd.denoiser, sd.shape, sd.encode(["x"]), StudentConfig(negative=given))
    with pytest.raises(ValueError, match="give one"):
        StudentConfig(negative=77, network="x")


def test_the_recipe(tmp_path):
    """It trains, and exports the base and the adapter, read back and compared; again from its checkpoint, the same."""
    from diffusers import DiffusionPipeline
    from safetensors.torch import load_file

    flags = ["--smoke", "--learning_rate", "1e-2", "--output_dir", f"{tmp_path / 'run'}"]
    run.main(sun_sd15.CONFIG, flags)
    export.main(export.ExportArguments(f"{tmp_path / 'run'}", output_dir=f"{tmp_path / 'again'}"))
    folder, base = tmp_path / "run" / "pipeline", load(tmp_path / "run" / "teacher")
    unet, found, again = (
        load_file(f) for f in (*(folder / "unet").glob("*.safetensors"), folder / FILE, tmp_path / "again" / FILE)
    )
    assert unet.keys() == base.denoiser.net.state_dict().keys()
    assert found.keys() == again.keys() and all(torch.equal(found[name], again[name]) for name in found)
    assert all(t.abs().max() > 0 for name, t in found.items()) and len(found) == 8 * len(layers(base.denoiser.net))
    card = (folder / "README.md").read_text()
    assert "pipelines.inference.negative_prompt.install" in card and "Negative prompts do nothing" not in card
    pipe = install(DiffusionPipeline.from_pretrained(folder, local_files_only=True), folder / FILE)
    made = [pipe("a fox", negative_prompt=text, guidance_scale=0, num_inference_steps=4, output_type="pt",
                 generator=torch.Generator().manual_seed(0)).images for text in ("", None, "blurry")]  # fmt: skip
    assert torch.equal(made[0], made[1]) and (made[2] - made[0]).abs().max() > 1e-4
