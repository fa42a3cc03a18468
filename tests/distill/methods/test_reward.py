"""Rewards: off the base to the bit; on, the fixed point moves as a closed form says. CLIP on a tiny network."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from gaussian import F64, SCHEDULES, Gaussian, Line, Whitened, exact, nets_of, problem
from tiny import tiny

from distill.configuration import Config, parse
from distill.data import Digits, Text, digits
from distill.data.prefetch import PrefetchingBatches
from distill.diffusion.schedule import Flow, Trig
from distill.diffusion.student import Student
from distill.diffusion.times import Fixed
from distill.method import Requirement
from distill.methods import DMD2, LADD, LCD, SCM, VSD, DiffInstruct, RewardGuided, SiD, SiDA
from distill.random import Draw
from distill.roles import Nets
from distill.training.build import build
from distill.training.config import TrainConfig
from distill.training.loop import train
from pipelines.judges import reward

N, CLASSES = 8, 3
near = lambda got, want, tol=1e-10: torch.testing.assert_close(got, want, rtol=tol, atol=tol)
GOAL = torch.tensor([3.0, -2.0], dtype=F64)
closeness = lambda x, c: -(x - GOAL.to(x)).square().sum(1)
BASES = {
    "sid": SiD(kappa=(1.5,) * 4),
    "sida": SiDA(taps=("mid",)),
    "dmd2": DMD2(taps=("mid",), every=1),
    "dmd2-walk": DMD2(gan=0, gan_fake=0, every=2, walk=True),
    "vsd": VSD(),
    "diff-instruct": DiffInstruct(),
    "ladd": LADD(taps=("mid",)),
    "lcd": LCD(),
    "scm": SCM(),
}
PATHS = {"scm": (Trig(), "v")}


class Doubles(Draw):
    def normal(self, name, shape):
        return super().normal(name, shape).double()


def labelled(draw):
    label = draw.integers("real", CLASSES)
    c = {"c": {"label": draw.integers("label", CLASSES)}, "real_c": {"label": label}}
    return c | {"real": draw.normal("scan", (len(label), 2)).double() + 0.5}


def after(method, base="sid", steps=3, judge=None, rate=1e-2, data=labelled):
    """(networks, logs) after some steps of training tiny networks in float64."""
    path, kind = PATHS.get(base, (Flow(), "flow"))
    torch.manual_seed(0)
    nets = build(method, tiny(path, kind, 0, classes=CLASSES), (2,), {"label": torch.tensor([0])})
    nets.reward = judge
    nets.disc = nets.disc and nets.disc.double()
    cfg = TrainConfig(max_train_steps=steps, train_batch_size=N, learning_rate=rate, ema_half_life=0)
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
    """Three steps of training: with weight 0 all networks are the base's to the bit; with one the student is not."""
    base = BASES[name]
    want, _ = after(base, name)
    assert same(after(RewardGuided(base, weight=0), name)[0], want)
    found, logs = after(RewardGuided(base, clamp=None), name, judge=closeness)
    assert "student/reward" in logs and not same(found, want)
    off = RewardGuided(base, weight=0)
    assert (off.requirements, off.roles) == (base.requirements, base.roles)
    assert Requirement.REWARD in RewardGuided(base).requirements


@pytest.mark.level(1, "RewardGuided")
@pytest.mark.parametrize("clamp", (None, -0.5))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradient(schedule, clamp):
    """R = a . x on x = A z + b: to b comes -w a / B for every sample below the clamp, to A the same times z."""
    law, line = problem(2)
    a, draw = torch.tensor([0.7, -1.1], dtype=F64), Whitened(16, 2)
    path = SCHEDULES[schedule]
    base = VSD(guidance=1.0, times=Fixed(0.4), reduction="sum")
    nets = nets_of(line, exact(law, path), fake=exact(line.law, path), reward=lambda x, c: x @ a)
    turn = lambda method: method.updates()[0].loss(method.sample(nets, {}, draw), nets, {}, draw)
    grads, logs = [], {}
    for method in (base, RewardGuided(base, weight=0.3, clamp=clamp)):
        loss, logs = turn(method)
        grads.append(torch.autograd.grad(loss, (line.A, line.b)))
    z = draw.normal("z", (16, 2))
    r = line(z, None).detach() @ a
    below = torch.ones(16, dtype=F64) if clamp is None else (r < clamp).double()
    assert clamp is None or 3 < below.sum() < 13
    near(grads[1][1] - grads[0][1], -0.3 * below.mean() * a)
    near(grads[1][0] - grads[0][0], -0.3 * torch.outer(a, (below[:, None] * z).mean(0)))
    near(logs["reward"].detach(), r.mean())


@pytest.mark.level(1, "RewardGuided")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_fixed_point(schedule):
    """VSD at one level with R = a . x ends at N(mu + w C a / (alpha sigma), Sigma), C = alpha^2 Sigma + sigma^2.

    There the score's gradient sigma alpha C^-1 (b - mu) and the reward's -w a cancel, and the spread is the teacher's.
    """
    law, _ = problem(2)
    path, a, w, eye = SCHEDULES[schedule], torch.tensor([0.7, -1.1], dtype=F64), 0.2, torch.eye(2, dtype=F64)
    method = VSD(guidance=1.0, times=Fixed(0.4), reduction="sum", weight=False)
    t = torch.tensor([0.4], dtype=F64)
    alpha, sigma = path.coefficients(t)
    shift = w * (alpha**2 * law.cov + sigma**2 * eye) @ a / (alpha * sigma)
    at = lambda b: Line(torch.linalg.cholesky(law.cov), b)
    for weight, b, zero in ((w, law.mean + shift, True), (w, law.mean, False), (0.0, law.mean, True)):
        line, draw = at(b), Whitened(16, 2)
        nets = nets_of(line, exact(law, path), fake=exact(Gaussian(b, law.cov), path), reward=lambda x, c: x @ a)
        rewarded = RewardGuided(method, weight=weight, clamp=None)
        loss, _ = rewarded.updates()[0].loss(rewarded.sample(nets, {}, draw), nets, {}, draw)
        grads = torch.autograd.grad(loss, (line.A, line.b))
        assert all(bool((g.abs().max() < 1e-9) == zero) for g in grads[1:]), (weight, grads)
        near(grads[0], torch.zeros(2, 2, dtype=F64), 1e-9)


def test_weight_falls():
    """Linearly to 0 over `until` steps, and then it is the base's loss."""
    line = Line(torch.eye(2, dtype=F64), torch.zeros(2, dtype=F64))
    law = Gaussian(torch.ones(2, dtype=F64), torch.eye(2, dtype=F64))
    nets = nets_of(line, exact(law, Flow()), fake=exact(law, Flow()), reward=closeness)
    base = VSD(guidance=1.0, times=Fixed(0.4))

    def loss(method, step):
        draw = Whitened(16, 2)
        draw.step = step
        return method.updates()[0].loss(method.sample(nets, {}, draw), nets, {}, draw)[0].detach()

    added = [loss(RewardGuided(base, clamp=None, until=4), step) - loss(base, step) for step in range(6)]
    near(torch.stack(added[1:5]), added[0] * torch.tensor([0.75, 0.5, 0.25, 0.0], dtype=F64))
    assert added[0] > 0 and added[5] == 0
    near(loss(RewardGuided(base, clamp=None), 1000) - loss(base, 1000), added[0])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_on_methods_of_data(schedule):
    """LCD's sample is data: rewarded is what the student says at x_t, under the image's own condition."""
    path, kind = SCHEDULES[schedule], "edm" if schedule == "edm" else "v"
    teacher, net, target = (tiny(path, kind, seed, classes=CLASSES) for seed in range(3))
    nets = Nets(teacher, Student(net), (2,), target=target, reward=closeness)
    draw, base, asked = Doubles(0, 0, "student", torch.arange(N)), LCD(N=4), []
    batch, weights = labelled(draw), [*net.net.parameters()]

    class Spy(LCD):
        def f(self, denoiser, x, t, *rest):
            asked.append((x, t, rest[-1]))
            return super().f(denoiser, x, t, *rest)

    grads = []
    for method in (base, RewardGuided(base, weight=0.5, clamp=None), RewardGuided(Spy(N=4), weight=0.5, clamp=None)):
        loss, _ = method.updates()[0].loss(method.sample(nets, batch, draw), nets, batch, draw)
        grads.append(torch.autograd.grad(loss, weights))
    x, t, c = asked[-1]
    assert len(asked) == 2 and c is batch["real_c"]
    want = torch.autograd.grad(-0.5 * closeness(net(x, t, c).x0, c).mean(), weights)
    for with_reward, without, alone in zip(grads[1], grads[0], want, strict=True):
        near(with_reward - without, alone)


@pytest.mark.level(2, "RewardGuided")
def test_sid_and_a_reward():
    """Through the trainer: after 40 steps SiD's samples are nearer to the goal with the reward than without."""
    mean = {}
    for weight in (0.0, 5.0):
        method = RewardGuided(SiD(gain=1.0, times=Fixed(0.5), fake_times=Fixed(0.5)), weight=weight, clamp=-1.0)
        nets, _ = after(method, steps=40, judge=closeness)
        draw = Doubles(1, 0, "student", torch.arange(256))
        with torch.no_grad():
            mean[weight] = closeness(nets.generate(labelled(draw), draw), None).mean()
    assert mean[5.0] > mean[0.0] + 1, mean


def test_nested():
    """A wrapper of a wrapper is one; a method without a reward at hand says so; fields are flags."""
    method = RewardGuided(RewardGuided(SiD(), weight=0.2, clamp=None), weight=0.3, clamp=None)
    got, _ = after(method, judge=closeness)
    want, _ = after(RewardGuided(SiD(), weight=0.5, clamp=None), judge=closeness)
    for p, q in zip(got.student.denoiser.net.parameters(), want.student.denoiser.net.parameters(), strict=True):
        near(p, q, 1e-6)
    with pytest.raises(ValueError, match="nets.reward.*weight to 0"):
        after(RewardGuided(SiD()))
    flags = ["--method.weight", "2", "--method.base.alpha", "1.1", "--method.clamp", "None"]
    assert parse(Config(RewardGuided(SiD()), Digits()), flags).method == RewardGuided(SiD(1.1), 2.0, None)


# ---- rewards themselves ----


class TestLabels:
    @pytest.fixture
    def judge(self):
        return reward.label_reward(Digits())

    def test_knows_the_digits(self, judge):
        """Of held-out scans it prefers the right one of ten labels for more than nine of ten."""
        x, y = digits("heldout")
        r = torch.stack([judge(x, {"class_labels": torch.full_like(y, k)}) for k in range(10)], 1)
        near(r.exp().sum(1), torch.ones(len(x)), 1e-4)
        assert (r.argmax(1) == y).float().mean() > 0.9

    def test_gradient_raises_it(self, judge):
        x = torch.zeros(10, 1, 8, 8, requires_grad=True)
        c = {"class_labels": torch.arange(10)}
        (g,) = torch.autograd.grad(judge(x, c).sum(), x)
        assert bool((judge(x + 0.1 * g, c) > judge(x, c)).all())

    def test_needs_labels(self):
        with pytest.raises(ValueError, match="real samples with class labels"):
            reward.label_reward(lambda draw: {"c": {}})


WORDS = ["a red cat", "a blue house", "a tree", ""]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A tiny random CLIP, as a folder of transformers."""
    from transformers import CLIPConfig, CLIPModel

    from pipelines.families.tiny import clip_tokenizer

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    text = small | ids | {"max_position_embeddings": 16, "projection_dim": 8}
    vision = small | {"image_size": 8, "patch_size": 4, "projection_dim": 8}
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return f"{folder}"


class TestClip:
    rows = {"prompt": torch.tensor([2, 0, 3])}
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def test_is_the_cosine_with_the_prompt(self, weights):
        """As transformers' own processor and model give it for pictures in [0, 1] of the network's size."""
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        net, x = CLIPModel.from_pretrained(weights), self.x.clamp(-1, 1)
        pixels = CLIPImageProcessor(do_resize=False, do_center_crop=False, do_rescale=False)
        words = AutoTokenizer.from_pretrained(weights)
        tokens = words(
            [WORDS[i] for i in self.rows["prompt"]], padding="max_length", max_length=16, return_tensors="pt"
        )
        with torch.no_grad():
            out = net(**tokens, **pixels([*(x / 2 + 0.5)], return_tensors="pt"))
        want = (out.image_embeds * out.text_embeds).sum(1)
        near(reward.clip_reward(weights, WORDS, lambda x: x)(x, self.rows), want, 1e-5)

    @pytest.mark.parametrize("each", (False, True))
    def test_has_a_gradient(self, weights, each):
        """Of every sample, to the sample alone, also beyond [-1, 1]; larger pictures are shrunk with it."""
        judge = reward.clip_reward(weights, WORDS, lambda x: torch.nn.functional.interpolate(x, scale_factor=4), each)
        x = (3 * self.x).requires_grad_()
        r = judge(x, self.rows)
        (g,) = torch.autograd.grad(r.sum(), x)
        assert r.shape == (3,) and bool((g[x.abs() > 1] != 0).all())
        step = 0.02 * g / g.flatten(1).norm(dim=1)[:, None, None, None]
        rise = judge(x.detach() + step, self.rows) - judge(x.detach() - step, self.rows)
        near(rise, 0.04 * g.flatten(1).norm(dim=1), 2e-2)
        assert not torch.equal(judge(x, {"prompt": torch.tensor([0, 1, 2])}), r)

    def test_of_a_video(self, weights):
        """The mean over its frames."""
        frames = lambda x: x.transpose(1, 2).flatten(0, 1)
        one, video = (reward.clip_reward(weights, WORDS, f) for f in (lambda x: x, frames))
        x = torch.stack([self.x, self.x.flip(3)], 2)
        near(video(x, self.rows), (one(x[:, :, 0], self.rows) + one(x[:, :, 1], self.rows)) / 2, 1e-5)

    def test_mistakes(self, weights, tmp_path):
        with pytest.raises(ValueError, match="needs the prompts"):
            reward.clip_reward(weights, [], None)
        with pytest.raises(ValueError, match='condition "prompt"'):
            reward.clip_reward(weights, WORDS, None)(self.x, {})
        with pytest.raises(ValueError, match="no CLIPModel with safetensors at"):
            reward.clip_reward(f"{tmp_path}", WORDS, None)


def encoder():
    """A teacher whose condition is the length of the text."""
    encode = lambda texts: {"n": torch.tensor([len(t) for t in texts])}
    return SimpleNamespace(encode=encode, denoiser=SimpleNamespace(null=None), shape=(3, 8, 8))


@pytest.mark.parametrize("p_empty", (0.0, 0.5))
def test_conditions_say_which_prompt(p_empty, tmp_path):
    """Their rows are those of the texts that were encoded, and there are none without a reward."""
    (tmp_path / "prompts.txt").write_text("\n".join("x" * n for n in range(1, 30)))
    data = Text("online", prompts=f"{tmp_path / 'prompts.txt'}", p_empty=p_empty)
    feed = data.open(encoder(), (Requirement.REWARD,))
    assert isinstance(feed, PrefetchingBatches)
    c = feed(Draw(0, 0, "student", torch.arange(200)))["c"]
    assert [len(feed.texts[i]) for i in c["prompt"].tolist()] == c["n"].tolist()
    assert ("" in {feed.texts[i] for i in c["prompt"].tolist()}) == (p_empty > 0)
    assert set(data.open(encoder(), ())(Draw(0, 0, "student", torch.arange(2)))["c"]) == {"n"}
    assert set(feed.fixed(2)[1]) == {"n"}


def test_of_a_run(weights):
    """The recipe's reward is built of its flags; a smoke run asks nobody."""
    config = Config(RewardGuided(replace(SiD()), reward=weights), Digits(), teacher="t")
    teacher = SimpleNamespace(decode=lambda x: x)
    data = SimpleNamespace(texts=WORDS)
    x, c = TestClip.x, TestClip.rows
    near(reward.build_reward(config, teacher, data)(x, c), reward.clip_reward(weights, WORDS, lambda x: x)(x, c))
    smoke = reward.build_reward(replace(config, smoke=True), teacher, None)
    assert smoke(x, None).shape == (3,) and torch.equal(smoke(x, None), smoke(x, {}))
