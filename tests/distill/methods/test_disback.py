"""DisBack: the order of its teachers; with one that is right near its data alone it arrives where DMD2 does not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from gaussian import (
    F64,
    RATIOS,
    SCHEDULES,
    Gaussian,
    Line,
    Whitened,
    exact,
    kl_gradient,
    nets_of,
    problem,
    student_gradient,
)
from tiny import tiny
from torch import nn

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import EDM
from distill.diffusion.student import Student
from distill.diffusion.times import Fixed, Karras
from distill.methods import DMD2, DisBack
from distill.methods.disback import Degradation
from distill.networks.lora import LoRA
from distill.roles import CheckpointedDenoiser, Nets
from distill.training import checkpoint
from distill.training.build import build
from distill.training.config import FakeConfig, StudentConfig, TrainConfig
from distill.training.loop import train
from pipelines import run
from recipes.digits import TABLE


class Laws:
    """A teacher's past whose denoisers are exact for these laws."""

    def __init__(self, *laws):
        self.folders = laws

    def __call__(self, i):
        return self.folders[i]


@pytest.mark.level(1, "DisBack")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradient(schedule):
    """s^2 of the KL's to the law of s'_2, of s'_1, `interval` iterations each, and then of the teacher."""
    (law, line), path = problem(2), SCHEDULES[schedule]
    past = [Gaussian(law.mean + i, (1 + i) * law.cov) for i in (1, 2, 3)]
    nets, draw = nets_of(line, exact(law, path, "v"), fake=exact(line.law, path, "v")), Whitened(64, 2)
    nets.past = Laws(*(exact(one, path, "v") for one in past))
    method = DisBack(gan=0, gan_fake=0, normalise=False, reduction="sum", interval=10)
    for t in path.time(torch.tensor(RATIOS, dtype=F64)):
        s = float(path.ratio(t))
        for draw.step, goal in ((0, past[1]), (9, past[1]), (10, past[0]), (19, past[0]), (20, law), (99, law)):
            _, *got = student_gradient(replace(method, times=Fixed(float(t))), nets, draw)
            for one, want in zip(got, kl_gradient(goal, line.A.detach(), line.b.detach(), s)):
                torch.testing.assert_close(one, s**2 * want, rtol=1e-9, atol=1e-11)


class Belief(nn.Module):
    """The denoiser of N(mean, 1), which knows nothing (a score of 0) beyond `reach` deviations."""

    def __init__(self, mean, reach=float("inf")):
        super().__init__()
        self.mean, self.reach = nn.Parameter(torch.tensor([mean])), reach

    def forward(self, x, sigma):
        noise, gap = sigma[:, None] ** 2, x - self.mean
        return torch.where(gap.abs() < self.reach * (1 + noise).sqrt(), self.mean + gap / (1 + noise), x)


class TestFarAway:
    """Teacher N(4, 1), right within 4 deviations; the student begins as N(-4, 1); levels of noise up to .5."""

    LAW = Karras(0.05, 0.5)
    METHOD = DMD2(every=1, gan=0, gan_fake=0, times=LAW, fake_times=LAW, normalise=False)

    def nets(self, side):
        path = EDM()
        teacher = Denoiser(Belief(4.0 * side, 4.0), path, "x0")
        line = Line(torch.tensor([[1.0]]), torch.tensor([-4.0 * side]))
        line.A.requires_grad_(False)  # it moves, and keeps its width
        student = Student(Denoiser(line, path, "x0"), scale=1.0)
        return Nets(teacher, student, (1,), replace(teacher, net=Belief(4.0 * side)))

    def run(self, method, nets, steps, save=None):
        """The student's mean at the end."""
        cfg = TrainConfig(max_train_steps=steps, train_batch_size=32, learning_rate=0.03, fake_learning_rate=0.1)
        for state in train(method, nets, lambda draw: {}, cfg, Accelerator(cpu=True)):
            if save and state.step % 20 == 0:
                checkpoint.save(state, save)
        return float(nets.student.denoiser.net.b.detach())

    @pytest.mark.level(2, "DisBack")
    def test_the_way_back(self, tmp_path):
        """From either side. Towards the teacher alone, from the same fake score, it flees from that, anywhere."""
        back, alone = [], []
        for side in (1, -1):
            nets, folder = self.nets(side), tmp_path / f"{side}"
            assert self.run(Degradation(self.LAW), nets, 240, folder) == -4 * side  # the student stays
            last = nets.fake.net.state_dict()
            assert side * float(last["mean"]) == pytest.approx(-4, abs=0.3)
            past = replace(nets.teacher, net=Belief(0.0, 4.0))
            nets.past = CheckpointedDenoiser(
                past,
                tuple(checkpoint.list_intact_checkpoints(folder)),
                nets.teacher.net,
                checkpoint.load_initial_weights,
            )
            method = DisBack(**vars(self.METHOD), record=f"{folder}", interval=35)
            bare = self.nets(side)
            bare.fake.net.load_state_dict(last)
            back.append(side * self.run(method, nets, 550))
            alone.append(side * self.run(self.METHOD, bare, 550))
        assert back == pytest.approx([4, 4], abs=0.4)
        assert min(alone) < 2, alone


class TestTraining:
    C = torch.arange(8) % 3

    def run(self, method, steps=5, save=None, **roles):
        teacher = tiny(EDM(), "edm", dtype=torch.float32, classes=3)
        nets = build(method, teacher, (2,), {"label": self.C[:1]}, StudentConfig(sigma=2.5), **roles)
        cfg = TrainConfig(max_train_steps=steps, train_batch_size=8, learning_rate=3e-3)
        for state in train(method, nets, lambda draw: {"c": {"label": self.C}}, cfg, Accelerator(cpu=True)):
            if save:
                checkpoint.save(state, save)
        return state

    BASE = {"guidance": 1.5, "every": 1, "gan": 0.0, "gan_fake": 0.0}

    @pytest.mark.parametrize("rank", (None, 2))
    def test_teachers(self, rank, tmp_path):
        """Of N = 3 recorded: s'_2, s'_1, then the teacher; the fake score starts as s'_3; nothing shared is written."""
        fake = FakeConfig(lora=LoRA(rank=rank, alpha=2, targets=("mid",)))
        record = self.run(Degradation(), 3, tmp_path, fake=fake)
        method = DisBack(**self.BASE, record=f"{tmp_path}", interval=2)
        state = self.run(method, 1, fake=fake)
        nets, before = state.nets, {k: v.clone() for k, v in state.nets.teacher.net.state_dict().items()}
        started = build(method, nets.teacher, (2,), None, None, fake).fake.net
        assert all(torch.equal(a, b) for a, b in zip(started.parameters(), record.nets.fake.net.parameters()))
        assert not {id(p) for p in nets.past.denoiser.net.parameters()} & {
            id(p) for p in nets.fake.net.parameters() if p.requires_grad
        }
        for step, number in ((0, 2), (1, 2), (2, 1), (3, 1)):
            found = method.with_stage_teacher(nets, step).teacher
            assert found.null is not None and found is nets.past.denoiser
            want = nets.fake.copy().net
            checkpoint.load_initial_weights(want, tmp_path / f"checkpoint-{number}", "fake", nets.teacher.net)
            assert all(torch.equal(a, b) for a, b in zip(found.net.parameters(), want.parameters()))
        assert method.with_stage_teacher(nets, 4).teacher is nets.teacher
        assert all(torch.equal(before[k], v) for k, v in nets.teacher.net.state_dict().items())
        assert all(not p.requires_grad for p in nets.past.denoiser.net.parameters())

    def test_off_it_is_dmd2(self, tmp_path):
        """Without a record, and where there is but one checkpoint: bit for bit, from the same fake score."""
        self.run(Degradation(), 1, tmp_path)
        last = FakeConfig(init=f"{tmp_path / 'checkpoint-1'}")
        for record, fake in ((None, FakeConfig()), (f"{tmp_path}", last)):
            ours = self.run(DisBack(**self.BASE, record=record))
            base = self.run(DMD2(**self.BASE), fake=fake)
            assert (
                all(torch.equal(ours.logs[k], base.logs[k]) for k in base.logs) and ours.logs.keys() == base.logs.keys()
            )
            for role, net in ours.nets.modules().items():
                assert all(torch.equal(a, b) for a, b in zip(net.parameters(), base.nets.modules()[role].parameters()))

    def test_nothing_recorded(self, tmp_path):
        with pytest.raises(ValueError, match="holds no checkpoint"):
            self.run(DisBack(**self.BASE, record=f"{Path(tmp_path) / 'none'}"))


def test_the_recipes(tmp_path):
    """The first records, though it trains no student; the second goes back along it and is exported."""
    smoke = ["--smoke", "--validation_steps", "0", "--output_dir"]
    run.main(TABLE["degradation"].config, [*smoke, f"{tmp_path / 'record'}", "--checkpointing_steps", "1"])
    assert (tmp_path / "record" / "checkpoint-1").is_dir() and (tmp_path / "record" / "checkpoint-2").is_dir()
    run.main(TABLE["disback"].config, [*smoke, f"{tmp_path / 'run'}", "--method.record", f"{tmp_path / 'record'}"])
    assert (tmp_path / "run" / "pipeline" / "unet").is_dir()
