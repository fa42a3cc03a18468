"""SiD, SiDA and SiD-LSG: the numbers of the authors' own code, through our objects. See CONTRIBUTING.md, Tests.

Stored files spell the players psi (fake) and g (generator); k is the guidance on all four places, a is alpha.
"""

from functools import partial

import pytest
import torch
from accelerate import Accelerator
from replay import Replay, filled, gradients, load, module, preconditioned, pushed, spy, under, whole

from distill import losses
from distill.diffusion.denoiser import Denoiser
from distill.diffusion.guidance import CFG
from distill.diffusion.schedule import EDM, VP
from distill.diffusion.student import Student
from distill.diffusion.times import Grid, Karras
from distill.methods import SiD, SiDA, sid
from distill.roles import Nets
from distill.training.build import build
from distill.training.config import StudentConfig, TrainConfig
from distill.training.loop import train

# Allowed errors: float32 losses; float32 gradients and weights; the way that weights have moved; the float64 files.
LOSS, GRADIENT, MOVED, DOUBLE = 1e-4, 1e-3, 1e-2, 1e-6
SIGMA_MAX = float(EDM().ratio(torch.tensor(0.8, dtype=torch.float64)))  # 24.408: t is uniform in [0, 0.8)
EDM_TIMES = Karras(0.002, SIGMA_MAX)
STEPS = Grid(1000, 20, 979)  # the law of SiD-LSG
PLAYER = {"fake": "psi", "student": "g"}


def edm(net, weights):
    return Denoiser(filled(net, weights), EDM(), "edm", preconditioned)


def lsg(net, weights, stored, null):
    schedule = VP(tuple(stored["alphas_cumprod"].tolist()))
    call = lambda net, x, t, c: net(x, t, **c).sample
    return Denoiser(filled(net, weights), schedule, "eps", call, {"encoder_hidden_states": null})


# ---- EDM: functions, float64 ----


@pytest.fixture
def edm_functions(golden):
    stored = load(golden("sid/sid_edm_functions_f64.npz"))
    tiny = partial(module(golden("score/tiny_nets.py")).TinyEDM, label_dim=5)
    teacher, fake = (edm(tiny(), under(stored, prefix)) for prefix in ("true", "fake"))
    return stored, Nets(teacher, Student(teacher), (3, 8, 8), fake), {"c": {"class_labels": stored["labels"]}}


def edm_student_draw(stored):
    return Replay(normal={"eps": stored["eps"]}, uniform={"t": stored["rnd_u"]})


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2], ids="alpha {}".format)
def test_edm_student_loss(edm_functions, alpha, close, monkeypatch):
    everything, nets, batch = edm_functions
    stored = under(everything, f"g_alpha{alpha}")
    scores = spy(monkeypatch, CFG, "__call__")
    weights, elements = (spy(monkeypatch, sid, name) for name in ("normaliser", "reduce"))
    method, x, draw = SiD(alpha, times=EDM_TIMES), everything["images"].requires_grad_(), edm_student_draw(stored)
    loss, _ = method.student_loss(x, nets, batch, draw)
    loss.backward()
    assert draw.used_up
    (real, fake), ((_, weight),), ((terms, _),) = (s for _, s in scores), weights, elements
    close("level sigma", real.sigma, stored["sigma"], DOUBLE)
    close("x0 of the teacher", real.x0, stored["y_real"], DOUBLE)
    close("x0 of the fake score", fake.x0, stored["y_fake"], DOUBLE)
    close("weight", weight.flatten(), stored["weight_factor"], DOUBLE)
    close("loss, every element", terms[0], stored["loss_elem"], DOUBLE)
    close("loss", loss, stored["loss_scaled"], DOUBLE)
    close("gradient to the images", x.grad, stored["grad_images"], DOUBLE)
    detached = stored["grad_images_if_scores_detached"]
    assert (x.grad - detached).abs().max() > 0.1 * detached.abs().max(), "no gradient flows through the scores"


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2], ids="alpha {}".format)
def test_edm_beside_a_nan(edm_functions, alpha, close, monkeypatch):
    """The authors drop sample 2, which has a NaN, and divide by 4 nevertheless: the other three of four are ours."""
    everything, nets, _ = edm_functions
    sound = torch.tensor([0, 1, 3])
    stored = under(everything, f"g_alpha{alpha}_nan")
    draw = edm_student_draw({name: stored[name][sound] for name in ("eps", "rnd_u")})
    elements = spy(monkeypatch, sid, "reduce")
    x, c = everything["images"][sound].requires_grad_(), {"class_labels": everything["labels"][sound]}
    loss, _ = SiD(alpha, times=EDM_TIMES).student_loss(x, nets, {"c": c}, draw)
    (loss * 3 / 4).backward()
    close("loss, every element", elements[0][0][0], stored["loss_elem"], DOUBLE)
    close("loss", loss * 3 / 4, stored["loss_scaled"], DOUBLE)
    close("gradient to the images", x.grad, stored["grad_images"][sound], DOUBLE)
    assert stored["grad_images"][2].isnan().any()


@pytest.mark.parametrize("player", ["fake", "student"])
def test_a_nan_stops_and_is_named(edm_functions, player, tmp_path):
    """Where the authors lose a step without a word: ours stops, names step and player, and keeps the weights."""
    _, nets, batch = edm_functions
    config = TrainConfig(output_dir=f"{tmp_path}", max_train_steps=3, train_batch_size=4)
    nets = build(SiD(), nets.teacher, nets.shape, student=StudentConfig(sigma=2.5, scale=2.5))
    trained = nets.fake if player == "fake" else nets.student.denoiser

    def data(draw):
        labels = batch["c"]["class_labels"].clone()
        labels[2] += float("nan") if (draw.step, draw.player) == (1, player) else 0.0
        return {"c": {"class_labels": labels}}

    run = train(SiD(), nets, data, config, Accelerator(cpu=True))
    before = {name: p.clone() for name, p in next(run).nets.modules()[player].named_parameters()}
    with pytest.raises(FloatingPointError, match=f"step 1, player '{player}'"):
        next(run)
    assert all(torch.equal(p, before[name]) for name, p in trained.net.named_parameters())


def test_edm_fake_loss(edm_functions, close, monkeypatch):
    everything, nets, batch = edm_functions
    stored = under(everything, "psi")
    scores, elements = spy(monkeypatch, CFG, "__call__"), spy(monkeypatch, losses, "reduce")
    draw = Replay(normal={"eps": stored["eps"], "t": stored["rnd_normal"]})
    loss, _ = SiD().fake_loss(everything["images"], nets, batch, draw)
    loss.backward()
    assert draw.used_up
    close("level sigma", scores[0][1].sigma, stored["sigma"], DOUBLE)
    close("loss, every element", elements[0][0][0], stored["loss_elem"], DOUBLE)
    close("loss", loss, stored["loss_scaled"], DOUBLE)
    close("gradient to the fake score", gradients(nets.fake.net), under(stored, "grad"), DOUBLE)


# ---- SiDA: functions, float64 ----


class Read(torch.nn.Conv2d):
    """The stored networks' last convolution; the pooled map that their classifier is read off is a module of it."""

    def __init__(self):
        super().__init__(8, 3, 3, padding=1)
        self.bottleneck = torch.nn.AvgPool2d(2)

    def forward(self, h):
        self.bottleneck(h)
        return super().forward(h)


@pytest.fixture
def sida_functions(golden):
    stored = load(golden("sid/sida_edm_functions_f64.npz"))

    def tiny(prefix):
        net = module(golden("score/tiny_nets.py")).TinyEDM(label_dim=5)
        net.c3 = Read()
        return edm(net, under(stored, prefix))

    teacher, fake = tiny("true"), tiny("fake")
    c = {"class_labels": stored["labels"]}
    return stored, Nets(teacher, Student(teacher), (3, 8, 8), fake), {"c": c, "real": stored["real_images"]}


def sida(**changes):
    return SiDA(**{"times": EDM_TIMES, "taps": ("c3.bottleneck",)} | changes)


@pytest.mark.level(4, "SiDA")
@pytest.mark.parametrize("alpha", [1.0, 1.2], ids="alpha {}".format)
def test_sida_student_loss(sida_functions, alpha, close, monkeypatch):
    everything, nets, batch = sida_functions
    stored, x = under(everything, f"g_alpha{alpha}"), everything["images"].requires_grad_()
    weights = spy(monkeypatch, sid, "normaliser")

    def student(method):
        draw = edm_student_draw(stored)
        loss, logs = method.student_loss(x, nets, batch, draw)
        assert draw.used_up
        return loss, logs, torch.autograd.grad(loss, x)[0]

    alone, _, grad_sid = student(sida(alpha=alpha, gan=0))
    close("loss of SiD", alone, stored["loss_sid_scaled"], DOUBLE)
    close("gradient of SiD to the images", grad_sid, stored["grad_images_sid"], DOUBLE)
    loss, logs, grad = student(sida(alpha=alpha))
    close("loss", loss, stored["loss_total"], DOUBLE)
    close("gradient to the images", grad, stored["grad_images"], DOUBLE)
    close("loss of the GAN", 2 * loss - alone, stored["loss_gan_scaled"], DOUBLE)
    close("  each sample's", logs["gan"] / weights[0][1], stored["loss_gan_elem"], DOUBLE)
    close("gradient of the GAN to the images", 2 * grad - grad_sid, stored["grad_images_gan"], DOUBLE)


def test_sida_fake_loss(sida_functions, close):
    everything, nets, batch = sida_functions
    stored = under(everything, "psi")
    turn = lambda: Replay(normal={"eps": stored["eps"], "t": stored["rnd_normal"]}, player="fake")
    alone, _ = sida(gan_fake=0).fake_loss(everything["images"], nets, batch, turn())
    loss, logs = sida().fake_loss(everything["images"], nets, batch, turn())
    loss.backward()
    weight = 4 + 1 / stored["sigma"] ** 2
    close("denoising loss", alone, stored["loss_fake_scaled"], DOUBLE)
    close("loss of the classifier", loss - alone, stored["loss_D_scaled"], DOUBLE)
    close("  each sample's", logs["gan"] * weight, stored["loss_D_elem"], DOUBLE)
    close("gradient to the fake score", gradients(nets.fake.net), under(stored, "grad"), DOUBLE)


# ---- LSG: functions ----


@pytest.fixture
def lsg_functions(golden):
    stored = load(golden("sid/lsg_functions_cond.npz"))
    tiny = module(golden("score/tiny_nets.py")).TinyCond
    null = stored["uncond_embeds"][:1]
    teacher, fake, student = (lsg(tiny(), under(stored, p), stored, null) for p in ("true", "fake", "G"))
    nets = Nets(teacher, Student(student, (625 / 999,)), (4, 8, 8), fake)
    return stored, nets, {"c": {"encoder_hidden_states": stored["cond_embeds"]}}


def sid_lsg(kappa, alpha=1.0):
    return SiD(alpha, (kappa,) * 4, times=STEPS, fake_times=STEPS, gain=1.0)


def lsg_draw(stored):
    """The draws of one turn; the functions drop no condition."""
    uniform = {"t": whole(STEPS, stored["timesteps"])}
    return Replay({"z": stored["z"], "eps": stored["noise"]}, uniform, samples=torch.arange(4))


@pytest.mark.parametrize("alpha", [1.0, 1.2], ids="alpha {}".format)
@pytest.mark.parametrize("kappa", [1.0, 1.5, 4.5], ids="kappa {}".format)
def test_lsg_student_loss(lsg_functions, kappa, alpha, close, monkeypatch):
    everything, nets, batch = lsg_functions
    stored = under(everything, f"g_k{kappa}_a{alpha}")
    scores = spy(monkeypatch, CFG, "__call__")
    weights, elements = (spy(monkeypatch, sid, name) for name in ("normaliser", "reduce"))
    method, draw = sid_lsg(kappa, alpha), lsg_draw(everything)
    x = method.sample(nets, batch, draw)
    x.retain_grad()
    loss, _ = method.student_loss(x, nets, batch, draw)
    loss.backward()
    assert draw.used_up
    (real, fake), ((_, weight),), ((terms, _),) = (s for _, s in scores), weights, elements
    close("the student's sample", x, stored["images"], LOSS)
    close("x0 of the teacher", real.x0, stored["y_real"], LOSS)
    close("x0 of the fake score", fake.x0, stored["y_fake"], LOSS)
    close("weight", weight, stored["weight_factor"], LOSS)
    close("loss, every element", terms[0], stored["loss_elem"], LOSS)
    close("loss", loss, stored["loss_scaled"], LOSS)
    close("gradient to the sample", x.grad, stored["grad_images"], GRADIENT)
    grads, names = gradients(nets.student.denoiser.net), everything["param_names"]
    close("gradient to the student", grads, under(stored, "grad_G"), GRADIENT)
    close("  its norms", torch.stack([grads[name].norm() for name in names]), stored["grad_G_norms"], GRADIENT)


@pytest.mark.parametrize("kappa", [1.0, 1.5, 4.5], ids="kappa {}".format)
def test_lsg_fake_loss(lsg_functions, kappa, close, monkeypatch):
    everything, nets, batch = lsg_functions
    stored = under(everything, f"psi_k{kappa}")
    scores = spy(monkeypatch, CFG, "__call__")
    method, draw = sid_lsg(kappa), lsg_draw(everything)
    x = method.sample(nets, batch, draw).detach()
    loss, _ = method.fake_loss(x, nets, batch, draw)
    loss.backward()
    assert draw.used_up
    close("guided noise prediction", scores[0][1].out, stored["pred"], LOSS)
    close("loss", loss, stored["loss_scaled"], LOSS)
    grads, names = gradients(nets.fake.net), everything["param_names"]
    close("gradient to the fake score", grads, under(stored, "grad"), GRADIENT)
    close("  its norms", torch.stack([grads[name].norm() for name in names]), stored["grad_norms"], GRADIENT)


@pytest.mark.parametrize("steps", [2, 4], ids="steps {}".format)
def test_lsg_several_steps(lsg_functions, steps, close):
    everything, nets, batch = lsg_functions
    stored = under(everything, f"multistep{steps}")
    student = Student(nets.student.denoiser, tuple((stored["timesteps"] / 999).tolist()))
    draw = Replay({f"renoise{i}": eps for i, eps in enumerate(stored["renoise"])})
    x = student.generate(everything["z"], batch["c"], draw)
    assert draw.used_up
    close(f"sample after {steps} calls", x, stored["images"], LOSS)


# ---- whole training iterations ----


def replayed(method, nets, stored, draws, condition, close, monkeypatch):
    """Run train() on the stored draws; compare gradients, weights, losses and the average with the stored ones.

    draws(turn, player) -> the numbers of one micro-batch; condition(turn, player) -> its c; `turn` is what is stored.
    """
    config = TrainConfig(
        max_train_steps=int(stored["iters"]),
        train_batch_size=int(stored["batch"]),
        gradient_accumulation_steps=int(stored["batch"] // stored["batch_gpu"]),
        learning_rate=float(stored["lr"]),
        ema_half_life=float(stored["ema_halflife_img"]),
        ema_ramp=None,
    )
    micro, rounds, used = config.micro_batch(1), config.gradient_accumulation_steps, []

    def turn(step, samples):
        return under(stored, f"it{step}/r{int(samples[0]) // micro}")

    def draw(seed, step, player, samples):
        used.append(Replay(*draws(turn(step, samples), player), step=step, player=player, samples=samples))
        return used[-1]

    def data(draw):
        return {"c": condition(turn(draw.step, draw.samples), draw.player)}

    start = under(stored, "teacher")
    moved = lambda weights: {name: w - start[name] for name, w in weights.items()}
    values = {player: spy(monkeypatch, type(method), f"{player}_loss") for player in PLAYER}
    with pushed(nets) as grads:
        for state in train(method, nets, data, config, Accelerator(cpu=True), draw=draw):
            for player, prefix in {"fake": f"it{state.step - 1}/psi", "student": f"it{state.step - 1}/G"}.items():
                what, weights = f"step {state.step - 1}, {player}", dict(nets.modules()[player].named_parameters())
                after = under(stored, f"{prefix}_after")
                close(f"{what}: gradient", grads[player], under(stored, f"{prefix}_grad"), GRADIENT)
                close(f"{what}: weights", weights, after, GRADIENT)
                close(f"{what}: weights have moved", moved(weights), moved(after), MOVED)
    assert len(used) == config.max_train_steps * rounds * 2 and all(d.used_up for d in used)
    for player, label in {"fake": "fake_score_Loss", "student": "G_Loss"}.items():
        share = [loss.detach() / rounds for _, (loss, _) in values[player][rounds - 1 :: rounds]]
        close(f"{player}: share of the last round", torch.stack(share), stored[f"loss_last_round/{label}_loss"], LOSS)
    average, final = dict(state.ema.net.named_parameters()), under(stored, "ema_final")
    close("average of the student", average, final, GRADIENT)
    close("average has moved", moved(average), moved(final), MOVED)


@pytest.mark.level(4, "SiD")
def test_edm_loop(golden, close, monkeypatch):
    stored = load(golden("sid/sid_edm_loop_alpha1.0.npz"))
    teacher = edm(module(golden("score/tiny_nets.py")).TinyEDM(label_dim=5), under(stored, "teacher"))
    sigma = float(stored["init_sigma"])
    method = SiD(float(stored["alpha"]), times=EDM_TIMES, gain=float(stored["loss_scaling_G"]))
    nets = build(method, teacher, (3, 8, 8), student=StudentConfig(sigma=sigma, scale=sigma))

    def draws(turn, player):
        p = PLAYER[player]
        normal = {"z": turn[f"{p}_z"], "eps": turn[f"{p}_eps"]}
        if player == "fake":
            return normal | {"t": turn["psi_rnd_normal"]}, {}
        return normal, {"t": turn["g_rnd_u"]}

    condition = lambda turn, player: {"class_labels": turn[f"{PLAYER[player]}_labels"]}
    replayed(method, nets, stored, draws, condition, close, monkeypatch)


def lsg_turn(turn, player):
    p = PLAYER[player]
    normal, uniform = {"z": turn[f"{p}_z"], "eps": turn[f"{p}_noise"]}, {"t": whole(STEPS, turn[f"{p}_t"])}
    return normal, uniform | ({"drop": turn["psi_drop_u"]} if player == "fake" else {})


def test_lsg_loop(golden, close, monkeypatch):
    stored = load(golden("sid/lsg_loop_k1.5.npz"))
    assert (int(stored["tmin"]), int(stored["tmax"])) == (STEPS.low, STEPS.high + 1)
    net = module(golden("score/tiny_nets.py")).TinyCond()
    teacher = lsg(net, under(stored, "teacher"), stored, stored["uncond_ctx"])
    method = sid_lsg(float(stored["kappa"]))
    nets = build(method, teacher, (4, 8, 8), student=StudentConfig(times=(int(stored["t_init"]) / 999,)))
    condition = lambda turn, player: {"encoder_hidden_states": turn[f"{PLAYER[player]}_ctx"]}
    replayed(method, nets, stored, lsg_turn, condition, close, monkeypatch)


def test_lsg_dropped_prompts(golden, monkeypatch):
    """The loop stores contexts after the drop; with any others in their place, our fake step drops the same two."""
    stored = load(golden("sid/lsg_loop_k1.5.npz"))
    net = module(golden("score/tiny_nets.py")).TinyCond()
    fake = lsg(net, under(stored, "teacher"), stored, stored["uncond_ctx"])
    nets, scores = Nets(fake, Student(fake), (4, 8, 8), fake), spy(monkeypatch, CFG, "__call__")
    prompts = []
    for turn in (under(stored, f"it{i}/r{r}") for i in range(3) for r in range(2)):
        normal, uniform = lsg_turn(turn, "fake")
        empty = torch.from_numpy(turn["psi_prompts"] == "")[:, None, None]
        batch = {"c": {"encoder_hidden_states": torch.where(empty, turn["g_ctx"], turn["psi_ctx"])}}
        draw = Replay(normal, uniform, player="fake", samples=torch.arange(2))
        method = sid_lsg(float(stored["kappa"]))
        with torch.no_grad():
            x = method.sample(nets, batch, draw)
        method.fake_loss(x, nets, batch, draw)
        assert torch.equal(scores[-1][0][3]["encoder_hidden_states"], turn["psi_ctx"])
        prompts += turn["psi_prompts"].tolist()
    assert prompts.count("") == 2
