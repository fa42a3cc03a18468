"""SFD: without a rule the base to the bit; with one the student of a forgotten class is where the rule sends it."""

import copy
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from gaussian import F64, SCHEDULES, Oracle
from tiny import tiny
from torch import nn

from distill.configuration import Config, parse
from distill.data import Digits
from distill.diffusion.denoiser import Denoiser
from distill.diffusion.guidance import relabel
from distill.diffusion.schedule import Flow
from distill.diffusion.student import Student
from distill.diffusion.times import Fixed, Karras
from distill.methods import DMD2, LCD, SFD, VSD, RewardGuided, SiD
from distill.random import Draw
from distill.roles import Nets
from distill.training.build import build
from distill.training.config import TrainConfig
from distill.training.loop import train

N, CLASSES = 8, 3
near = lambda got, want, tol=1e-10: torch.testing.assert_close(got, want, rtol=tol, atol=tol)
PROMPTS = DMD2(gan=0, gan_fake=0, every=1)
BASES = {"sid": SiD(kappa=(1.5,) * 4), "dmd2": PROMPTS, "vsd": VSD()}


class Doubles(Draw):
    def normal(self, name, shape):
        return super().normal(name, shape).double()


def labelled(draw, kept=(0, 1, 2)):
    return {"c": {"label": torch.tensor(kept)[draw.integers("label", len(kept))]}}


def spoken(draw):
    """As a feed of prompts gives them: with what overrides them beside them; here 0 stands for 2."""
    beside = lambda label: {"label": label, "override.label": torch.where(label == 2, 0, label)}
    c, forgotten = labelled(draw)["c"]["label"], torch.full((len(draw.samples),), 2)
    return {"c": beside(c), "forget_c": beside(forgotten)}


def reader(classes=CLASSES):
    """A teacher that reads of a condition what it knows, as those of texts."""
    none = torch.tensor([classes])
    call = lambda net, x, t, c: net(x, t, label=c["label"])
    null = {"label": none, "override.label": none}
    return replace(tiny(Flow(), "flow", 0, classes=classes), call=call, null=null)


def after(method, data=labelled, steps=3):
    """The networks after some steps of training tiny ones in float64."""
    torch.manual_seed(0)
    teacher = reader() if data is spoken else tiny(Flow(), "flow", 0, classes=CLASSES)
    nets = build(method, teacher, (2,), {"label": torch.tensor([0])})
    nets.reward = lambda x, c: x.sum(1)
    cfg = TrainConfig(max_train_steps=steps, train_batch_size=N, learning_rate=1e-2, ema_half_life=0)
    *_, state = train(method, nets, data, cfg, Accelerator(cpu=True), draw=Doubles)
    return nets, state.logs


def same(a, b):
    return all(
        torch.equal(p, q)
        for role in a.modules()
        for p, q in zip(a.modules()[role].parameters(), b.modules()[role].parameters(), strict=True)
    )


@pytest.mark.parametrize("name", BASES)
def test_off_is_the_base(name):
    """Without a rule; and with one and no second batch, where its classes are not drawn. With both it is another."""
    base, some = BASES[name], lambda draw: labelled(draw, (0, 1))
    assert same(after(SFD(base))[0], after(base)[0])
    want = after(base, some)[0]
    rule = {"forget": (2,), "override": (0,)}
    assert same(after(SFD(base, **rule, weight=0, fake_weight=0), some)[0], want)
    found, logs = after(SFD(base, **rule), some)
    assert {"student/forgetting", "fake/forgetting"} <= logs.keys() and not same(found, want)
    assert same(after(SFD(base, **rule, weight=0, fake_weight=0))[0], after(base)[0]) is False  # 2 is drawn


def test_the_main_batch_has_the_classes_that_are_kept():
    """Each alike, as of data without those to forget; they are asked for in the second batch alone."""
    method, draw = SFD(PROMPTS, (2, 0), (1, 1), keep=(1, 3, 4)), Draw(0, 0, "student", torch.arange(30_000))
    c = {"label": draw.integers("label", 5), "size": torch.arange(30_000)}
    found = relabel(c, method.keep, draw, method.forget)
    share = found["label"].bincount(minlength=5) / 30_000
    torch.testing.assert_close(share, torch.tensor([0, 1, 0, 1, 1]) / 3, rtol=0, atol=0.011)  # four deviations
    stays = (c["label"] != 2) & (c["label"] != 0)
    assert torch.equal(found["label"][stays], c["label"][stays]) and found["size"] is c["size"]
    nets, asked = after(PROMPTS)[0], []
    call = nets.teacher.call
    nets.teacher.call = lambda net, x, t, c: asked.append(c["label"]) or call(net, x, t, c)
    nets.student.denoiser.call, nets.fake.call = nets.teacher.call, nets.teacher.call
    draw = Doubles(0, 0, "student", torch.arange(N))
    batch = labelled(draw)
    method = SFD(PROMPTS, (2,), (0,), keep=(0, 1))
    assert 2 in batch["c"]["label"]
    x = method.sample(nets, batch, draw)
    assert 2 not in batch["c"]["label"] and not any(2 in label for label in asked)
    asked.clear()
    (update, *_) = method.updates()
    update.loss(x, nets, batch, draw)
    assert any((label == 2).all() for label in asked) and not any(2 in label and 0 in label for label in asked)
    for wrong in ({"keep": (2,)}, {"forget": (), "override": (), "keep": (1,)}):
        with pytest.raises(ValueError, match=r"and keep \([12],\): give each class to forget one that is kept"):
            SFD(PROMPTS, **{"forget": (2,), "override": (0,)} | wrong)


@pytest.mark.parametrize("name", BASES)
def test_words_are_as_classes(name):
    """Where the data says what is to be forgotten, and by what it is overridden: null conditions stay null."""
    found, logs = after(SFD(BASES[name]), spoken)
    want, told = after(SFD(BASES[name], (2,), (0,)))
    assert same(found, want) and {k: v.item() for k, v in logs.items()} == {k: v.item() for k, v in told.items()}


class Classes(nn.Module):
    """x = m + s z, a mean and a spread for each class."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(mean, dtype=F64)), nn.Parameter(torch.tensor(std, dtype=F64))

    def forward(self, z, t, label):
        return self.mean[label][:, None] + self.std[label][:, None] * z


class Bells(nn.Module):
    """The exact denoiser, of kind x0, of one Gaussian for each class of `law` now."""

    def __init__(self, law, schedule):
        super().__init__()
        self.law, self.schedule = law, schedule

    def forward(self, x, native, label):
        mean, var = self.law.mean[label][:, None], self.law.std[label][:, None] ** 2
        denoise = lambda x, a, s: mean + a * var / (a**2 * var + s**2) * (x - a * mean)
        return Oracle(denoise, self.schedule, "x0")(x, native)


def gaussians(schedule, mean, std):
    """Teacher of the classes N(-3, .25), N(0, 1), N(3, .49); a generator, and a fake score that is exact for it."""
    path, law = SCHEDULES[schedule], Classes([-3.0, 0.0, 3.0], [0.5, 1.0, 0.7])
    line = Classes(mean, std)
    teacher, fake = (Denoiser(Bells(one, path), path, "x0") for one in (law, copy.deepcopy(line)))
    return line, Nets(teacher, Student(Denoiser(line, path, "x0"), scale=1.0), (1,), fake)


class Same(Doubles):
    """Draws of a normal that are symmetric, with variance one: of the first half and of the second, mirrored."""

    def normal(self, name, shape):
        half = super().normal(name, shape)[: shape[0] // 2]
        half = half / half.square().mean().sqrt()
        return torch.cat([half, -half])


def gradient(method, schedule, mean, std, kept=1):
    """(to the means, to the spreads) of the student's loss on a batch of class `kept`."""
    line, nets = gaussians(schedule, mean, std)
    draw = Same(0, 0, "student", torch.arange(512))
    batch = {"c": {"label": torch.full((512,), kept)}}
    loss, _ = method.updates()[[u.player for u in method.updates()].index("student")].loss(
        method.sample(nets, batch, draw), nets, batch, draw
    )
    return torch.autograd.grad(loss, (line.mean, line.std))


SCORES = {
    "sid": SiD(1.0, times=Fixed(0.4), normalise=False),
    "dmd2": DMD2(gan=0, gan_fake=0, times=Fixed(0.4), normalise=False, reduction="sum"),
    "vsd": VSD(guidance=1.0, times=Fixed(0.4), reduction="sum"),
}


@pytest.mark.level(1, "SFD")
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_fixed_point(schedule, name):
    """It rests where class 0 is the teacher's class 2, and not where it is its own; weight b scales that pull alone."""
    base, law = SCORES[name], ([-3.0, 0.0, 3.0], [0.5, 1.0, 0.7])
    method = SFD(base, (0,), (2,), weight=0.5)
    there, here = gradient(method, schedule, [3.0, 0.0, 3.0], [0.7, 1.0, 0.7]), gradient(method, schedule, *law)
    near(torch.stack(there), torch.zeros(2, 3, dtype=F64), 1e-9)
    assert here[0][0] < -1e-3 and bool((here[0][1:].abs() < 1e-9).all())  # up, towards 3
    near(gradient(SFD(base, (0,), (2,), weight=1.0), schedule, *law)[0], 2 * here[0], 1e-9)
    kept = gradient(method, schedule, law[0], law[1], kept=0)  # drawn among the others, it is ruled, too
    near(kept[0][0], 3 * here[0][0], 0.2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_random_overrides_meet_between(schedule):
    """The hazard: of -3 and +3 in turn, N(+-3, .25) alike, the scores' mean is that of N(0, .25): it lies between."""

    class Either(SFD):
        def replace_label(self, label):
            return torch.where(label == 1, 2 * (torch.arange(len(label)) % 2), label)

    base = SCORES["dmd2"]
    either = Either(base, (1,), (2,), weight=1.0)
    law = Classes([-3.0, 9.0, 3.0], [0.5, 1.0, 0.5])

    def pull(method, mean):
        line, nets = gaussians(schedule, [-3.0, mean, 3.0], [0.5, 0.5, 0.5])
        nets.teacher.net.law = law
        draw = Same(0, 0, "student", torch.arange(512))
        batch = {"c": {"label": torch.zeros(512, dtype=torch.long)}}
        loss, _ = method.updates()[0].loss(method.sample(nets, batch, draw), nets, batch, draw)
        return torch.autograd.grad(loss, line.mean)[0][1]

    assert abs(pull(either, 0.0)) < 1e-9 and abs(pull(SFD(base, (1,), (2,), weight=1.0), 3.0)) < 1e-9
    assert abs(pull(either, 3.0)) > 1e-2 and abs(pull(SFD(base, (1,), (2,), weight=1.0), 0.0)) > 1e-2


def test_who_is_told_what():
    """In the second batch student and fake score hear the class itself, the teacher what the rule makes of it."""
    make = lambda seed: tiny(Flow(), "flow", seed, classes=CLASSES)
    teacher, fake, student = map(make, range(3))
    nets, heard = Nets(teacher, Student(student), (2,), fake), []
    for role, net in (("teacher", teacher), ("fake", fake), ("student", student)):
        net.net.label.register_forward_hook(lambda m, a, o, role=role: heard.append((role, {*a[0].tolist()})))
    method = SFD(SiD(kappa=(2.0,) * 4, p_drop=0.0), (2,), (1,))
    batch, draw = {"c": {"label": torch.zeros(N, dtype=torch.long)}}, Doubles(0, 0, "student", torch.arange(N))
    for update in method.updates():
        draw.player = update.player
        with torch.set_grad_enabled(update.player == "student"):
            x = method.sample(nets, batch, draw)
        update.loss(x, nets, batch, draw)
    at = lambda role: [labels - {CLASSES} for who, labels in heard if who == role]
    assert at("teacher") == [{0}, {1}] and at("fake") == [{0}, {2}] * 2 and at("student") == [{0}, {2}] * 2


def test_composition():
    """Around a reward and inside one, through the trainer."""
    rule = ((2,), (0,))
    _, logs = after(RewardGuided(SFD(BASES["sid"], *rule), clamp=None))
    assert {"student/reward", "student/forgetting"} <= logs.keys()
    assert "student/reward" in after(SFD(RewardGuided(BASES["sid"]), *rule))[1]


@pytest.mark.level(2, "SFD")
def test_dmd2_forgets():
    """SFD on DMD2, from the teacher's own laws: class 0 becomes class 2 in mean and spread, the others stay."""
    line, nets = gaussians("edm", [-3.0, 0.0, 3.0], [0.5, 1.0, 0.7])
    nets.fake.net.law = line  # a fake score that is never late
    method = SFD(replace(SCORES["dmd2"], times=Karras(0.3, 10.0)), (0,), (2,), weight=1.0)
    adam = torch.optim.Adam(line.parameters(), 0.3, (0.0, 0.99))
    for step in range(150):
        adam.param_groups[0]["lr"] = 0.3 * (1 - step / 150)
        draw = Same(0, step, "student", torch.arange(64))
        batch = {"c": {"label": 1 + torch.arange(64) % 32 % 2}}
        adam.zero_grad()
        method.updates()[0].loss(method.sample(nets, batch, draw), nets, batch, draw)[0].backward()
        adam.step()
    near(line.mean.detach(), torch.tensor([3.0, 0.0, 3.0], dtype=F64), 0.05)
    near(line.std.detach(), torch.tensor([0.7, 1.0, 0.7], dtype=F64), 0.05)


def test_mistakes():
    with pytest.raises(ValueError, match="give each class to forget one that is kept"):
        SFD(SiD(), (1, 2), (3,))
    with pytest.raises(ValueError, match="one that is kept"):
        SFD(SiD(), (1, 2), (3, 1))
    for base in (DMD2(), LCD()):
        with pytest.raises(ValueError, match="show what is to be forgotten"):
            SFD(base, (1,), (2,))
    flags = "--method.forget 3 5 --method.override 8 6 --method.base.alpha 1".split()
    assert parse(Config(SFD(SiD(), (1,), (2,)), Digits()), flags).method == SFD(SiD(1.0), (3, 5), (8, 6))
