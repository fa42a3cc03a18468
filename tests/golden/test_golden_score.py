"""Score distillation and its kin: the numbers of the authors' own code, through our objects. CONTRIBUTING.md, Tests.

Weights of a network lie under its role; stored times are native. Ours are native / 999 on a table of 1000 levels.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from replay import Replay, cases, filled, gradients, load, module, preconditioned, spy, under, whole

from distill import losses
from distill.diffusion.denoiser import Denoiser
from distill.diffusion.guidance import CFG
from distill.diffusion.schedule import EDM, VP, Flow
from distill.diffusion.student import Student
from distill.diffusion.times import Grid, LogNormal, Uniform
from distill.methods import DMD2, LADD, SFD, VSD, DiffInstruct, FDistill, OfflinePSO, PhasedDMD, SiD
from distill.networks.discriminator import Head
from distill.roles import Nets
from pipelines.inference.negative_prompt import NAG

LOSS, GRADIENT = 1e-4, 1e-3  # allowed errors, all files are float32


@pytest.fixture
def opened(golden):
    """opened("vsd/x.npz") -> (stored numbers, the file of networks)."""
    return lambda name: (load(golden(f"score/{name}")), module(golden("score/tiny_nets.py")))


def text(net, x, t, c):
    return net(x, t, **c).sample


def table(stored):
    return VP(tuple(stored["alphas_cumprod"].double().tolist()))


# ---- Diff-Instruct ----


@pytest.fixture
def diff_instruct(opened):
    stored, nets = opened("diff_instruct/functions.npz")
    roles = (
        Denoiser(filled(nets.TinyEDM(label_dim=5), under(stored, role)), EDM(), "edm", preconditioned)
        for role in ("true", "fake")
    )
    teacher, fake = roles
    return stored, Nets(teacher, Student(teacher), (3, 8, 8), fake), {"c": {"class_labels": stored["labels"]}}


@pytest.mark.level(4, "DiffInstruct")
def test_diff_instruct(diff_instruct, close, monkeypatch):
    stored, nets, batch = diff_instruct
    pushes = spy(monkeypatch, losses, "gradient_surrogate")
    monkeypatch.setattr("distill.methods.diff_instruct.gradient_surrogate", losses.gradient_surrogate)
    x = stored["images"].requires_grad_()
    draw = Replay(normal={"t": stored["g/rnd_normal"], "eps": stored["g/eps"]})
    loss, _ = DiffInstruct(times=LogNormal(-1.2, 1.2)).student_loss(x, nets, batch, draw)
    loss.backward()
    assert draw.used_up
    ((_, g), _) = pushes[0]
    close("(D_fake - D_true) x", g * x, stored["g/loss_elem"], LOSS)
    close("gradient to the images", x.grad, stored["g/grad_images"], GRADIENT)
    draw = Replay(normal={"t": stored["psi/rnd_normal"], "eps": stored["psi/eps"]}, player="fake")
    loss, _ = DiffInstruct().fake_loss(x.detach(), nets, batch, draw)
    loss.backward()
    assert draw.used_up
    close("loss of the fake score", loss, stored["psi/loss_scaled"], LOSS)
    close("gradient to the fake score", gradients(nets.fake.net), under(stored, "psi/grad"), GRADIENT)


# ---- VSD ----


@pytest.mark.level(4, "VSD")
@pytest.mark.parametrize("name", cases("vsd", "swiftbrush_kept", "swiftbrush_"))
def test_swiftbrush(opened, close, monkeypatch, name):
    """With their fake weight alpha_t^2; ours, 1, has the same error at each time and the optimum of theirs."""
    stored, nets = opened(f"vsd/{name}.npz")
    abar = stored["alphas_cumprod"].double()
    abar[-1] = 0.0047  # the authors' constant for the student's call; the table's number is .00466
    null, batch = {"encoder_hidden_states": stored["null"]}, {"c": {"encoder_hidden_states": stored["ctx"]}}
    student = Denoiser(filled(nets.TinyCond(), under(stored, "G")), VP(tuple(abar.tolist())), "eps", text, null)
    teacher, fake = (
        Denoiser(filled(nets.TinyCond(), under(stored, role)), table(stored), "eps", text, null)
        for role in ("true", "fake")
    )
    roles = Nets(teacher, Student(student, scale=1.0), (4, 8, 8), fake)
    method = VSD(guidance=float(stored["guidance"]), fake_weight="alpha")
    x = method.sample(roles, batch, Replay({"z": stored["z"]}, samples=torch.arange(4)))
    x.retain_grad()
    close("sample", x, stored["x"], LOSS)
    pushes = spy(monkeypatch, losses, "gradient_surrogate")
    monkeypatch.setattr("distill.methods.vsd.gradient_surrogate", losses.gradient_surrogate)
    draw = Replay({"eps": stored["eps"]}, {"t": whole(method.times, stored["t"])})
    loss, _ = method.student_loss(x, roles, batch, draw)
    loss.backward()
    assert draw.used_up
    close("g", pushes[0][0][1], stored["score_gradient"], GRADIENT)
    close("loss", loss, stored["loss_student"], LOSS)
    close("gradient to the sample", x.grad, stored["grad_x"], GRADIENT)
    close("gradient to the student", gradients(student.net), under(stored, "grad_student"), GRADIENT)
    fakes = {"t": whole(method.fake_times, stored["fake_t"]), "drop": torch.full((4,), float(name.endswith("kept")))}
    draw = Replay({"eps": stored["fake_eps"]}, fakes)
    loss, _ = method.fake_loss(stored["x"], roles, batch, draw)
    loss.backward()
    assert draw.used_up
    close("loss of the fake score", loss, stored["loss_fake"], LOSS)
    close("gradient to the fake score", gradients(fake.net), under(stored, "grad_fake"), GRADIENT)
    ours = []
    for i in range(4):
        one = {"c": {"encoder_hidden_states": stored["ctx"][i : i + 1]}}
        draw = Replay({"eps": stored["fake_eps"][i]}, {name: u[i] for name, u in fakes.items()})
        plain = replace(method, fake_weight="one")
        ours.append(plain.fake_loss(stored["x"][i : i + 1], roles, one, draw)[0])
    weight = stored["alphas_cumprod"][stored["fake_t"]]
    close("ours, weighed as theirs", (torch.stack(ours) * weight).mean(), stored["loss_fake"], LOSS)


# ---- FastGen: DMD2, f-distill, LADD ----

DIVERGENCES = {
    "kl": "forward-kl",
    "js": "js",
    "sf": "softened-kl",
    "sh": "hellinger",
    "jf": "jeffreys",
    "neyman": "neyman",
}
TIMES = Grid(1000, 0, 999)


@dataclass
class FastGen:
    """The stored step: networks, batch and the draws of each turn."""

    stored: dict
    nets: Nets
    batch: dict
    x: torch.Tensor

    def student(self, method, keep=False):
        """The loss, its logs and the gradient to the sample."""
        draw = Replay({"eps": self.stored["eps"]}, {"t": whole(TIMES, self.stored["t"])})
        x = self.x.clone().requires_grad_()
        loss, logs = method.student_loss(x, self.nets, self.batch, draw)
        assert draw.used_up
        return loss, logs, torch.autograd.grad(loss, x, retain_graph=keep)[0]

    def heads(self, method, real=True):
        """The loss of the fake's turn and its logs."""
        normal, uniform = {"eps": self.stored["eps"]}, {"t": whole(TIMES, self.stored["t"])}
        if real:
            normal["gan_real_eps"] = self.stored["eps_real"]
            uniform["gan_real_t"] = whole(TIMES, self.stored["t_real"])
        draw = Replay(normal, uniform, player="fake")
        loss, logs = method.fake_loss(self.x, self.nets, self.batch, draw)
        assert draw.used_up
        return loss, logs


@pytest.fixture
def fastgen(opened):
    stored, file = opened("fastgen/dmd2_f_distill.npz")
    call = lambda net, x, t, c: net(x, t, c["c"])
    teacher, fake = (
        Denoiser(filled(file.TapCond(), under(stored, role)), table(stored), "eps", call, {"c": stored["null"]})
        for role in ("true", "fake")
    )
    disc = filled(Head(8, 0, groups=1), under(stored, "head"))
    teacher.net.requires_grad_(False)  # as in a run
    c = {"c": stored["ctx"]}
    nets = Nets(teacher, Student(teacher), (4, 8, 8), fake, disc)
    return FastGen(stored, nets, {"c": c, "real": stored["real"], "real_c": c}, stored["x"])


def fields(stored, **more):
    common = {"guidance": float(stored["guidance"]), "gan": float(stored["gan"]), "taps": ("mid",)}
    return common | {"gan_noise": "score", "times": TIMES, "fake_times": TIMES} | more


def test_fastgen_dmd2(fastgen, close):
    stored = fastgen.stored
    loss, logs, grad = fastgen.student(DMD2(**fields(stored)))
    close("loss of the GAN", logs["gan"], stored["dmd2/gan"], LOSS)
    close("distribution matching", loss - float(stored["gan"]) * logs["gan"], stored["dmd2/loss"], LOSS)
    close("total", loss, stored["dmd2/total"], LOSS)
    close("gradient to the sample", grad, stored["dmd2/grad_x"], GRADIENT)


@pytest.mark.level(4, "FDistill")
@pytest.mark.parametrize("bins", (False, True), ids=("plain", "bins"))
@pytest.mark.parametrize("theirs", DIVERGENCES)
def test_fastgen_f_distill(fastgen, theirs, bins, close, monkeypatch):
    """Both normalisations; the first alone and the second alone change h by what the batch says, checked below."""
    stored, weights = fastgen.stored, spy(monkeypatch, FDistill, "predict")
    want = under(stored, f"f/{theirs}/{'bins' if bins else 'plain'}")
    ours = {"divergence": DIVERGENCES[theirs], "ratio_bins": 10 * bins, "unit_mean": True}
    loss, logs, grad = fastgen.student(FDistill(**fields(stored, **ours)))
    close("h", weights[0][1][2].flatten(), want["h"], LOSS)
    close("distribution matching", loss - float(stored["gan"]) * logs["gan"], want["loss"], LOSS)
    close("total", loss, want["total"], LOSS)
    close("gradient to the sample", grad, want["grad_x"], GRADIENT)


def test_fastgen_bins_are_shared(fastgen, close):
    """Stored times are alone in their bins. Here three and two share one: r over their mean, from the stored logits."""
    r, n = fastgen.stored["logits"].flatten().double().exp().clamp(0.1, 20), torch.tensor([99, 50, 0, 100, 199, 999])
    method = FDistill(ratio_bins=10)
    mean = method.mean_ratio(r, n / 999, fastgen.nets.teacher.path)
    want = torch.cat([r[:3].mean().expand(3), r[3:5].mean().expand(2), r[5:]]) + 1e-6
    close("the means", mean, want, 1e-12)


def test_fastgen_critic(fastgen, close):
    """The fake score's loss, and the heads' on features without gradient: the weights that a run adds them with."""
    stored, nets = fastgen.stored, fastgen.nets
    loss, _ = fastgen.heads(DMD2(**fields(stored, gan=0.0), gan_fake=0.0), real=False)
    loss.backward()
    close("loss of the fake score", loss, stored["critic/fake_score"], LOSS)
    close("gradient to the fake score", gradients(nets.fake.net), under(stored, "critic/grad"), GRADIENT)
    x0, _ = fastgen.heads(DMD2(**fields(stored, gan=0.0), gan_fake=0.0, fake_space="x0"), real=False)
    n, per_sample = stored["t"], nets.fake.path.ratio(stored["t"].double() / 999) ** 2
    pred = nets.fake(nets.fake.path.diffuse(stored["x"], stored["eps"], n / 999), n / 999, fastgen.batch["c"])
    want = (per_sample * (pred.eps - stored["eps"]).flatten(1).square().mean(1)).mean()
    close("in x0: times (sigma / alpha)^2", x0, want, LOSS)
    _, logs = fastgen.heads(DMD2(**fields(stored), gan_fake=1.0))
    close("loss of the heads", logs["gan"], stored["critic/disc"], LOSS)
    disc = [*nets.disc.parameters()]
    _, student, _ = fastgen.student(DMD2(**fields(stored)), keep=True)
    left = torch.autograd.grad(student["gan"], disc)  # 13 turns of the student left theirs, of weight .001
    ours = torch.autograd.grad(logs["gan"], disc)
    ours = {name: a + 13e-3 * b for (name, _), a, b in zip(nets.disc.named_parameters(), ours, left, strict=True)}
    close("gradient to the heads", ours, under(stored, "critic/grad_head"), GRADIENT)


def test_fastgen_reads_the_teacher(fastgen, close):
    """FastGen's recipes: heads on the frozen teacher's features, whose loss does not reach the fake score."""
    stored, nets = fastgen.stored, fastgen.nets
    method = FDistill(**fields(stored, gan_features="teacher", gan_fake=1.0, divergence="forward-kl", ratio_bins=0))
    t = stored["t"].double() / 999
    x_t = nets.teacher.path.diffuse(stored["x"], stored["eps"], t)
    logits = nets.disc(*nets.teacher.features(x_t, t, fastgen.batch["c"], ("mid",))).flatten()
    _, logs, _ = fastgen.student(method)
    close("ratio", logs["ratio"], logits.double().exp().clamp(0.1, 20).mean(), LOSS)
    close("loss of the GAN", logs["gan"], torch.nn.functional.softplus(-logits).mean(), LOSS)
    loss, logs = fastgen.heads(method)
    loss.backward()
    close("loss of the fake score", loss - logs["gan"], stored["critic/fake_score"], LOSS)
    close("gradient to the fake score", gradients(nets.fake.net), under(stored, "critic/grad"), GRADIENT)
    assert not gradients(nets.teacher.net)


@pytest.mark.level(4, "LADD")
def test_fastgen_ladd(fastgen, close):
    stored, nets, batch = fastgen.stored, fastgen.nets, fastgen.batch
    method, t = LADD(("mid",), gan_times=TIMES, loss="softplus"), whole(TIMES, stored["t"])
    x = stored["x"].clone().requires_grad_()
    draw = Replay({"gan_eps": stored["eps"]}, {"gan_t": t})
    loss, _ = method.student_loss(x, nets, batch, draw)
    assert draw.used_up
    close("loss of the student", loss, stored["ladd/gen"], LOSS)
    close("gradient to the sample", torch.autograd.grad(loss, x)[0], stored["ladd/gen_grad_x"], GRADIENT)
    normal = {"gan_fake_eps": stored["eps"], "gan_real_eps": stored["eps_real"]}
    draw = Replay(normal, {"gan_fake_t": t, "gan_real_t": whole(TIMES, stored["t_real"])}, player="fake")
    loss, _ = method.fake_loss(stored["x"], nets, batch, draw)
    loss.backward()
    assert draw.used_up
    close("loss of the heads", loss, stored["ladd/disc"], LOSS)
    close("gradient to the heads", gradients(nets.disc), under(stored, "ladd/grad_head"), GRADIENT)


# ---- SFD ----


class Twice(Replay):
    """A Replay whose second batch has numbers of its own."""

    def __init__(self, first, second, player):
        super().__init__(*first, player=player, samples=torch.arange(4))
        self.second = Replay(*second, player=player, samples=torch.arange(4))

    def independent_stream(self, name):
        assert name == "forget"
        return self.second


@pytest.mark.level(4, "SFD")
@pytest.mark.parametrize("case", ("g_a1.0", "g_a1.2", "psi"))
def test_sfd(opened, case, close):
    everything, file = opened("sfd/functions.npz")
    stored, law = under(everything, case), Grid(1000, 38, 711)
    schedule = VP(tuple((1 - everything["betas"].double()).cumprod(0).tolist()))
    call = lambda net, x, t, c: net(x, t, c["class_label"])
    student, teacher, fake = (
        Denoiser(filled(file.Label(), under(everything, role)), schedule, "eps", call) for role in ("G", "true", "fake")
    )
    nets = Nets(teacher, Student(student, (float(everything["t_init"]) / 999,)), (3, 8, 8), fake)
    player, net = ("fake", fake.net) if case == "psi" else ("student", student.net)
    base = SiD(alpha=1.0 if case == "psi" else float(case[3:]), times=law, fake_times=law, gain=1.0)
    method = SFD(base, forget=(0,), override=(2,), weight=0.01, fake_weight=0.01)
    turn = lambda end: ({"z": stored[f"z{end}"], "eps": stored[f"eps{end}"]}, {"t": whole(law, stored[f"t{end}"])})
    second = turn("f")
    second[1]["class"] = torch.zeros(4)
    draw, batch = Twice(turn(""), second, player), {"c": {"class_label": everything["c"]}}
    with torch.set_grad_enabled(player == "student"):
        x = method.sample(nets, batch, draw)
    (update,) = (u for u in method.updates() if u.player == player)
    loss, logs = update.loss(x, nets, batch, draw)
    loss.backward()
    assert draw.used_up and draw.second.used_up
    close("of the forgotten class", logs["forgetting"], stored["forget"], LOSS)
    close("of the others", loss - 0.01 * logs["forgetting"], stored["remain"], LOSS)
    close(f"gradient to the {player}", gradients(net), under(stored, "grad"), GRADIENT)


# ---- PSO offline ----


@pytest.mark.level(4, "OfflinePSO")
@pytest.mark.parametrize("n", (0.1, 1.0))
@pytest.mark.parametrize("theirs, ours", (("pso", "sigmoid"), ("pso_db", "hinge")))
def test_pso_offline(opened, theirs, ours, n, close):
    everything, file = opened("pso/offline.npz")
    stored = under(everything, f"{theirs}/neg{n}")
    student, teacher = (
        Denoiser(filled(file.TinyCond(), under(everything, role)), table(everything), "eps", text)
        for role in ("G", "true")
    )
    times = tuple((everything["steps"].double() / 999).tolist())
    nets, c = Nets(teacher, Student(student, times), (4, 8, 8)), {"encoder_hidden_states": everything["ctx"]}
    method = OfflinePSO(float(everything["beta"]), ours, float(everything["gamma"]), neg_defactor=n)
    x = torch.stack([everything["x"], everything["y"]], 1)
    u = (everything["index"].double() + 0.5) / len(times)
    draw = Replay({"eps": everything["eps"]}, {"t": u}, samples=torch.arange(3))
    loss, logs = method.student_loss(x, nets, {"real_c": c}, draw)
    loss.backward()
    assert draw.used_up
    close("error of the better", logs["better"], stored["l_w"].mean(), LOSS)
    close("error of the worse", logs["worse"], stored["l_l"].mean(), LOSS)
    close("loss", loss, stored["loss"], LOSS)
    close("gradient to the student", gradients(student.net), under(stored, "grad"), GRADIENT)


# ---- Phased DMD ----


@pytest.fixture
def phased(opened):
    """The stored numbers, roles of a student whose second of four calls ends the first of two phases, and x_s."""
    stored, file = opened("phased/functions.npz")
    null = {"encoder_hidden_states": stored["null"]}
    student, teacher, fake = (
        Denoiser(filled(file.TinyCond(), under(stored, role)), Flow(), "flow", text, null)
        for role in ("G", "true", "fake")
    )
    nets = Nets(teacher, Student(student, (1.0, 0.75, 0.5, 0.25), renoise="ddim", phases=2), (4, 8, 8), fake)
    return stored, nets, {"c": {"encoder_hidden_states": stored["ctx"]}}


@pytest.mark.level(4, "PhasedDMD")
def test_phased_call_and_fake_score(phased, close):
    stored, nets, batch = phased
    x0, _ = nets.student.step(stored["x"], 1, batch["c"], to=0.0)
    x_s, std = nets.student.step(stored["x"], 1, batch["c"])
    assert nets.student.phase_end_time == float(stored["s"][0]) and not std.any()
    close("x0 of the call", x0, stored["x0"], LOSS)
    close("x_s", x_s, stored["anchor"], LOSS)
    method = PhasedDMD(guidance=4.0, fake_times=Uniform(0.0, 1.0), margin=0.0, clamp=1e30)
    path, u = method.on_phase_interval(nets).teacher.path, (stored["sigma_t"].double() - 0.5) / 0.5
    x_t = path.diffuse(stored["anchor"], stored["eps"], u)
    close("x_t", x_t, stored["x_t"], LOSS)
    pred = method.on_phase_interval(nets).fake(x_t, u, batch["c"])
    close("target of the velocity", pred.target(stored["anchor"], stored["eps"]), stored["target"], LOSS)
    draw = Replay({"eps": stored["eps"]}, {"t": u}, player="fake")
    loss, _ = method.fake_loss(stored["anchor"], nets, batch, draw)
    loss.backward()
    assert draw.used_up
    close("loss of the fake score", loss, stored["loss_fake"], LOSS)
    close("gradient to the fake score", gradients(nets.fake.net), under(stored, "grad_fake"), GRADIENT)


def test_phased_push(phased, close):
    """Theirs pushes x0 of the call by scores at x_t, though x_t is made of x_s; ours pushes x_s itself, as the paper.

    Both move the call's velocity the same way in each sample. They differ in its weight, and ours is that of the
    divergence that the phase descends: how x_t depends on the call is how x_s does.
    """
    stored, nets, batch = phased
    s, sigma_t = 0.5, stored["sigma_t"].double()
    real = CFG(nets.teacher, 4.0)(stored["x_t"], sigma_t, batch["c"]).x0.detach()
    fake = nets.fake(stored["x_t"], sigma_t, batch["c"]).x0.detach()
    close("x0 of the teacher", real, stored["real_x0"], LOSS)
    close("x0 of the fake score", fake, stored["fake_x0"], LOSS)
    x0, _ = nets.student.step(stored["x"], 1, batch["c"], to=0.0)
    size = losses.normaliser(x0, real, 1e-4)
    theirs = losses.reduce(losses.gradient_surrogate(x0, (fake - real) / size), "mean")
    theirs.backward(inputs=[x0, *nets.student.denoiser.net.parameters()])
    close("their loss", theirs, stored["loss"], LOSS)
    close("their gradient to x0", x0.grad, stored["grad_x0"], GRADIENT)
    close("their gradient to the student", gradients(nets.student.denoiser.net), under(stored, "grad_G"), GRADIENT)
    x_s = stored["anchor"].clone().requires_grad_()
    draw = Replay({"eps": stored["eps"]}, {"t": (sigma_t - s) / (1 - s)})
    loss, _ = PhasedDMD(guidance=4.0, times=Uniform(0.0, 1.0), margin=0.0).student_loss(x_s, nets, batch, draw)
    loss.backward()
    a = (1 - sigma_t) / (1 - s)
    share = (((1 - s) * (sigma_t**2 - (a * s) ** 2)) / sigma_t**2).float()[:, None, None, None]
    posterior = lambda x0: (
        (a[:, None, None, None].float() * s**2 * stored["x_t"]) / (sigma_t[:, None, None, None].float() ** 2)
        + share * x0
    )
    own = losses.normaliser(stored["anchor"], posterior(real))
    close("ours: the same gap by its weight", x_s.grad * own / share, x0.grad * size, GRADIENT)


# ---- NAG ----


@pytest.mark.parametrize("name", ("5.0_2.5_0.25", "11.0_2.5_0.25", "5.0_1.2_0.5"))
def test_nag(opened, name, close):
    """The authors' FLUX code has the 2-norm; the paper and their other processors have the 1-norm, our default."""
    stored, _ = opened("nag/flux.npz")
    rule = NAG(*map(float, name.split("_")), norm=2)
    close("out", rule(stored["z"], stored["z_neg"]), stored[f"out/{name}"], 1e-5)
    one = replace(rule, norm=1)(stored["z"], stored["z_neg"])
    assert (one - stored[f"out/{name}"]).abs().max() > 1e-3 * stored[f"out/{name}"].abs().max()
