"""The loop with real networks: who moves, when, on which samples; accumulation, rates, averages, faults, checkpoints.

Two worlds: vectors under a network of a few hundred weights, and the digits under the UNet of a smoke run.
"""

import copy
import json
from dataclasses import dataclass, replace

import pytest
import torch
from accelerate import Accelerator
from replay import gradients, pushed, spy
from safetensors.torch import load_file
from tiny import WORDS, clock, reader, spoken, steered, tiny
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from zoo import CLASSES, example

from distill.data import Digits
from distill.diffusion.schedule import Trig
from distill.method import Requirement
from distill.methods import DMD2, LCD, NCT, RCM, SCM, VSD, SiD
from distill.networks.ema import exponent
from distill.networks.lora import LoRA
from distill.random import Draw
from distill.roles import HEAD_ROLES
from distill.training import checkpoint
from distill.training.build import build
from distill.training.config import FakeConfig, StudentConfig, TrainConfig
from distill.training.loop import train
from distill.training.memory import MicroBatchError, Snapshot
from distill.training.step import count_updates

RANGE = (1.0, 3.0)  # of a random guidance
METHODS = {
    "sid": SiD(),
    "sid-lsg": SiD(1.0, kappa=(1.5,) * 4),
    "dmd2": DMD2(every=2, taps=("mid",)),
    "vsd": VSD(guidance=RANGE),
    "lcd": LCD(guidance=RANGE),
    "scm": SCM(guidance=2.0, warmup=4, adaptive=True, prior=True),
}


def vectors(draw):
    """Conditions, "real" vectors [B, 2] with their own, and pairs of noise and a vector."""
    label = draw.integers("real", 3)
    return {
        "z": draw.normal("pairs", (len(label), 2)),
        "y": draw.normal("pairs", (len(label), 2)).tanh(),
        "c": {"label": draw.integers("label", 3)},
        "real": torch.stack([label - 1.0, 0.3 * draw.normal("pixels", (len(label),))], dim=1),
        "real_c": {"label": label},
    }


def texts(draw):
    """The same of words in place of labels."""
    batch = vectors(draw)
    return batch | {key: spoken(batch[key]["label"]) for key in ("c", "real_c")}


def data_of(method):
    return texts if {Requirement.NEGATIVE_ADAPTER, Requirement.CROSS_ATTENTION} & {*method.requirements} else vectors


def nets_of(method, **change):
    """Two-step students, so that renoising is part of every test; a fake score that is not the teacher."""
    hears, adapter = data_of(method) is texts, Requirement.NEGATIVE_ADAPTER in method.requirements
    makers = {
        Requirement.END_TIME: clock,
        Requirement.NEGATIVE_ADAPTER: reader,
        Requirement.CROSS_ATTENTION: reader,
        Requirement.CONTROL_PICTURE: steered,
    }
    make = next((makers[one] for one in method.requirements if one in makers), tiny)
    teacher = make(Trig(), "v", dtype=torch.float32, classes=3)
    torch.manual_seed(1)  # the head's
    c = spoken(torch.tensor([0])) if hears else {"label": torch.tensor([0])}
    noises = ("fresh",) if method.noises is None else method.noises
    calls = {"times": (1.0, 0.5), "renoise": noises[0]} if noises else {}
    student = StudentConfig(negative=WORDS if adapter else 0, **calls)
    nets = build(method, teacher, (2,), c, **{"student": student} | change)
    nets.perceptual, nets.reward = lambda x, y: (x - y).square().mean(1), lambda x, c: x.mean(1)
    nets.control = lambda x: x[:, :1]
    for p in nets.fake.net.parameters() if nets.fake else ():
        p.data += 0.1 * torch.randn_like(p) if p.requires_grad else 0.0
    return nets


def config(**change):
    return TrainConfig(**{"max_train_steps": 4, "train_batch_size": 8, "learning_rate": 1e-3, "seed": 3} | change)


def run(method, nets=None, data=vectors, **change):
    """Train to the end; the last state."""
    cfg = config(**change)
    *_, state = train(method, nets or nets_of(method), data, cfg, Accelerator(cpu=True))
    return state


def weights(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def roles(nets):
    return {"teacher": weights(nets.teacher.net)} | {role: weights(net) for role, net in nets.modules().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- who moves, when, on what ----


@dataclass
class Turn:
    """What one optimizer step did: the roles that had a gradient, and those whose every tensor changed, or any."""

    step: int
    player: str
    graded: set
    moved: set
    touched: set
    lr: float


@pytest.fixture
def watched():
    """watched(method, ...) -> (turns, nets): train and look at every optimizer step from outside."""
    handles = []

    def watch(method, **change):
        nets, turns, before = change.pop("nets", None) or nets_of(method), [], {}
        nets.teacher.net.requires_grad_(False)

        def pre(optimizer, args, kwargs):
            before.update(roles(nets))

        def post(optimizer, args, kwargs):
            after, ours = roles(nets), {id(p) for g in optimizer.param_groups for p in g["params"]}
            graded = {role for role, net in nets.modules().items() if gradients(net)}
            changed = {r: [not torch.equal(w, before[r][name]) for name, w in after[r].items()] for r in after}
            moved, touched = ({r for r in after if f(changed[r])} for f in (all, any))
            student = {id(p) for p in nets.student.denoiser.net.parameters()}
            player = "student" if ours & student else "fake"
            turns.append(Turn(step[0], player, graded, moved, touched, optimizer.param_groups[0]["lr"]))

        handles.extend((register_optimizer_step_pre_hook(pre), register_optimizer_step_post_hook(post)))
        step = [0]
        for state in train(method, nets, data_of(method), config(**change), Accelerator(cpu=True)):
            step[0] = state.step
        return turns, nets

    yield watch
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", METHODS)
def test_only_the_player_moves(name, watched):
    """Whose turn it is: those networks alone hold gradients and change, wholly. The teacher never does."""
    teacher = weights(nets_of(METHODS[name]).teacher.net)
    turns, nets = watched(METHODS[name])
    owned = {"student": {"student", "weight"}, "fake": {"fake", "disc"}}
    owned = {player: names & nets.modules().keys() for player, names in owned.items()}
    for turn in turns:
        assert turn.graded == turn.moved == turn.touched == owned[turn.player], turn
    assert {turn.player for turn in turns} == ({"student", "fake"} if nets.fake else {"student"})
    assert equal(weights(nets.teacher.net), teacher)
    assert not any(p.requires_grad or p.grad is not None for p in nets.teacher.net.parameters())


@pytest.mark.parametrize("name", CLASSES)
def test_every_method_moves_its_roles(name, watched):
    """With its defaults: a player's turn touches nobody else, and in a few steps every role has moved."""
    method = example(name, "mid")
    teacher = weights(nets_of(method).teacher.net)
    turns, nets = watched(method)
    roles = nets.modules().keys() - {"target"}
    for turn in turns:
        assert turn.touched <= ({"student"} if turn.player == "student" else {"fake", *HEAD_ROLES}) & roles, turn
        assert turn.graded <= ({"student"} if turn.player == "student" else {"fake", *HEAD_ROLES}) & roles, turn
    moved = roles - {"student"} if name == "TSM" else roles  # a copy of the teacher is what it learns
    assert set().union(*(turn.touched for turn in turns)) >= moved
    assert equal(weights(nets.teacher.net), teacher)


@pytest.mark.parametrize(
    "method, players",
    (
        (DMD2(every=3, taps=("mid",)), "sf f f sf f f"),
        (VSD(guidance=2.0, fake_steps=2), "sf f sf f sf f"),
        (SiD(), "fs fs fs fs fs fs"),
        (LCD(), "s s s s s s"),
    ),
    ids=("dmd2", "vsd", "sid", "lcd"),
)
def test_order_of_turns(method, players, watched):
    """Two time scales: the student every few steps, before the fake score; SiD's fake score first."""
    turns, _ = watched(method, max_train_steps=6)
    by_step = ["".join(turn.player[0] for turn in turns if turn.step == step) for step in range(6)]
    assert " ".join(by_step) == players


@pytest.mark.parametrize("rounds", (1, 2))
@pytest.mark.parametrize("one_step", (True, False), ids=("one step", "two steps"))
def test_calls_of_dmd2(rounds, one_step):
    """The fake score learns on the samples of the student's own turn where there was one: no call is wasted."""
    method, every = DMD2(every=3, taps=("mid",)), 3
    nets = nets_of(method, student=StudentConfig(times=(1.0,) if one_step else (1.0, 0.5)))
    calls = {"teacher": 0, "student": 0, "fake": 0, "disc": 0}

    def count(role):
        return lambda *_: calls.update({role: calls[role] + 1})

    for role, net in {"teacher": nets.teacher.net, **nets.modules()}.items():
        (net[0] if role == "disc" else net.first).register_forward_hook(count(role))
    run(method, nets, max_train_steps=6, gradient_accumulation_steps=rounds)
    steps, turns = 6 * rounds, 6 // every * rounds
    drawn = sum(1 + Draw(3, step, "any", torch.arange(1)).index("steps", 1 if one_step else 2) for step in range(6))
    assert one_step or drawn > 6
    assert calls == {
        "student": drawn * rounds,  # one generation a step, of as many calls as were drawn
        "teacher": turns,
        "fake": 2 * steps + 2 * turns,  # denoising and features; score and features
        "disc": steps + turns,
    }


@pytest.mark.parametrize("rounds", (1, 2))
@pytest.mark.parametrize("method", (METHODS["dmd2"], VSD(guidance=2.0, fake_steps=2)), ids=("dmd2", "vsd"))
def test_samples_are_reused(method, rounds, monkeypatch):
    """The very samples, detached, made before the student moved; fresh ones where the student has no turn."""
    seen = {player: spy(monkeypatch, type(method), f"{player}_loss") for player in ("student", "fake")}
    run(method, max_train_steps=2, gradient_accumulation_steps=rounds)
    (student, fake) = ([args[1] for args, _ in seen[player]] for player in ("student", "fake"))
    assert (len(student), len(fake)) == (rounds, 2 * rounds)
    for x, kept, fresh in zip(student, fake[:rounds], fake[rounds:]):
        assert torch.equal(x, kept) and x.requires_grad and not kept.requires_grad
        assert not torch.equal(x, fresh) and not fresh.requires_grad
    batches = {player: [args[3] for args, _ in seen[player]] for player in seen}
    assert all(a is b for a, b in zip(batches["student"], batches["fake"][:rounds]))


def test_players_of_sid_draw_their_own_samples(monkeypatch):
    seen = spy(monkeypatch, SiD, "sample")
    run(SiD(), max_train_steps=1)
    (fake, student) = (x for _, x in seen)
    assert not torch.equal(fake, student) and student.requires_grad and not fake.requires_grad


@pytest.mark.parametrize("name", METHODS)
def test_accumulation(name):
    """Micro-batches give the gradients, the logs and the weights of the whole batch."""
    found = {}
    for rounds in (1, 2, 4):
        nets = nets_of(METHODS[name])
        with pushed(nets) as grads:
            state = run(METHODS[name], nets, gradient_accumulation_steps=rounds, max_train_steps=1)
        tensors = {f"gradient of {role}.{k}": g for role, net in grads.items() for k, g in net.items()}
        found[rounds] = state.logs | tensors
        # Adam's first step is the sign of the gradient; this epsilon keeps a rounding error a small one
        run(METHODS[name], nets := nets_of(METHODS[name]), gradient_accumulation_steps=rounds, adam_epsilon=1e-2)
        found[rounds] |= {f"{role}.{k}": w for role, net in roles(nets).items() for k, w in net.items()}
    for rounds in (2, 4):
        assert found[rounds].keys() == found[1].keys()
        for what, one in found[1].items():
            assert (one - found[rounds][what]).norm() <= 2e-5 * one.norm() + 1e-7, what


# ---- memory ----


class Scarce:
    """Data of a device that holds `limit` samples of the student at once."""

    def __init__(self, limit):
        self.limit = limit
        self.sizes = []

    def __call__(self, draw):
        self.sizes.append(len(draw.samples))
        if draw.player == "student" and len(draw.samples) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nmore")
        return vectors(draw)


@pytest.mark.parametrize("name", ("sid", "dmd2", "nct"))  # the student moves last; first; a multiplier counts losses
def test_memory_that_runs_out_halves_the_micro_batch(name, capsys):
    """Every bit is that of a run that had the smaller micro-batch from its start. Later steps keep the size."""
    method = {**METHODS, "nct": NCT()}[name]
    data = Scarce(3)
    state = run(method, data=data, gradient_accumulation_steps=None)
    want = run(method, gradient_accumulation_steps=4)
    assert equal(everything(state), everything(want)) and equal(state.logs, want.logs)
    assert {8, 4} < {*data.sizes} and {*data.sizes[-4:]} == {2}
    first, second = capsys.readouterr().err.splitlines()
    assert first == (
        "memory ran out with 8 samples in a micro-batch (CUDA out of memory. Tried 2 GiB.): the run goes "
        "on with 4, 2 times an update; an update still has 8 images"
    )
    assert "with 2, 4 times" in second


@pytest.mark.parametrize("name", ("sid", "dmd2"))
def test_memory_that_runs_out_in_the_second_optimizer(name):
    """The player that has moved already goes back."""
    method, steps = METHODS[name], []

    def fail(optimizer, args, kwargs):
        steps.append(optimizer)
        if len(steps) == 2:
            raise torch.OutOfMemoryError

    hook = register_optimizer_step_pre_hook(fail)
    try:
        state = run(method, gradient_accumulation_steps=None)
    finally:
        hook.remove()
    assert steps[0] is steps[2] is not steps[1]
    want = run(method, gradient_accumulation_steps=2)
    assert equal(everything(state), everything(want)) and equal(state.logs, want.logs)


def test_a_state_goes_back():
    """A resumed run has moments, too."""
    states = train(SiD(), nets_of(SiD()), vectors, config(), Accelerator(cpu=True))
    state = next(states)
    before, snapshot = everything(state), Snapshot(state)
    next(states)
    assert not equal(everything(state), before)
    snapshot.restore()
    assert equal(everything(state), before) and any("exp_avg" in name for name in before)


def test_memory_that_stays_short():
    """One sample cannot be halved; a given accumulation is kept; later steps end in the error itself."""
    with pytest.raises(MicroBatchError, match="in the first iteration with one sample in a micro-batch .CUDA out of"):
        run(SiD(), data=Scarce(0), gradient_accumulation_steps=None)
    with pytest.raises(torch.OutOfMemoryError):
        run(SiD(), data=Scarce(3), gradient_accumulation_steps=1)
    data = Scarce(8)
    states = train(SiD(), nets_of(SiD()), data, config(), Accelerator(cpu=True))
    next(states)
    data.limit = 3
    with pytest.raises(torch.OutOfMemoryError):
        next(states)


def test_a_lora_fake_shares_the_teacher_and_moves():
    method, lora = VSD(guidance=2.0), FakeConfig(LoRA(2, 2.0, ("mid",)))
    nets = nets_of(method, fake=lora)
    shared, before = nets.teacher.net.first.weight, weights(nets.teacher.net)
    state = run(method, nets)
    assert nets.fake.net.first.weight is shared
    assert all(p.abs().max() > 0 for name, p in nets.fake.net.named_parameters() if "lora_B" in name)
    assert equal(weights(nets.teacher.net), before)
    assert float(state.logs["fake/grad_norm"]) > 0


def test_target_of_lcd_is_an_average_of_the_student():
    method = LCD(target_ema=0.7)
    nets = nets_of(method)
    expected = {n: w.double() for n, w in weights(nets.target.net).items()}
    for _ in train(method, nets, vectors, config(), Accelerator(cpu=True)):
        for name, w in weights(nets.student.denoiser.net).items():
            expected[name] = 0.7 * expected[name] + 0.3 * w.double()
    for name, w in weights(nets.target.net).items():
        torch.testing.assert_close(w.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_networks_can_be_trained_again():
    """A second call of train() finds the same players: the first one leaves nothing switched off."""
    method = METHODS["dmd2"]
    nets = nets_of(method)
    run(method, nets, max_train_steps=1)
    before = roles(nets)
    run(method, nets, max_train_steps=1)
    after = roles(nets)
    assert {role for role in after if not equal(after[role], before[role])} == {"student", "fake", "disc"}


# ---- rates, clipping, average ----


@pytest.mark.parametrize(
    "change, factors",
    (
        ({}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ({"lr_warmup_steps": 3}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ({"lr_scheduler": "linear"}, [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        ({"lr_scheduler": "linear", "lr_warmup_steps": 1}, [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
    ),
    ids=("constant", "warm-up", "linear", "both"),
)
def test_learning_rates(change, factors, watched):
    turns, _ = watched(SiD(), max_train_steps=8, learning_rate=1e-3, fake_learning_rate=2e-3, **change)
    for player, rate in (("student", 1e-3), ("fake", 2e-3)):
        got = [turn.lr / rate for turn in turns if turn.player == player]
        assert got == pytest.approx(factors)


def test_fake_learning_rate_defaults_to_the_students(watched):
    turns, _ = watched(SiD(), max_train_steps=1, learning_rate=5e-4)
    assert [turn.lr for turn in turns] == [5e-4, 5e-4]


def test_clipping():
    """The logged norm is that of the gradient as it was; the one applied is no larger than the limit."""
    norms = {}
    for limit in (None, 1e-3):
        nets = nets_of(SiD())
        with pushed(nets) as found:
            state = run(SiD(), nets, max_train_steps=1, max_grad_norm=limit)
        applied = torch.stack([g.norm() for g in found["fake"].values()]).norm()
        norms[limit] = float(applied), float(state.logs["fake/grad_norm"])
    assert norms[None][0] == pytest.approx(norms[None][1], rel=1e-5) and norms[None][0] > 1e-2
    assert norms[1e-3] == pytest.approx((1e-3, norms[None][1]), rel=1e-3)


@pytest.mark.parametrize(
    "change, limits",
    (
        ({"max_grad_norm": 1e-3}, (1e-3, 1e-3)),
        ({"max_grad_norm": 1e-3, "fake_max_grad_norm": 2e-3}, (1e-3, 2e-3)),
        ({"max_grad_norm": 1e-3, "fake_max_grad_norm": 0.0}, (1e-3, None)),  # FastGen: the student alone
        ({"fake_max_grad_norm": 2e-3}, (None, 2e-3)),
    ),
)
def test_each_player_has_its_norm(change, limits):
    nets = nets_of(SiD())
    with pushed(nets) as found:
        state = run(SiD(), nets, max_train_steps=1, **change)
    for player, limit in zip(("student", "fake"), limits, strict=True):
        applied = float(torch.stack([g.norm() for g in found[player].values()]).norm())
        whole = float(state.logs[f"{player}/grad_norm"])
        assert whole > 1e-2 and applied == pytest.approx(limit or whole, rel=1e-3)


@pytest.mark.parametrize("player", ("student", "fake"))
def test_each_player_has_its_value(player):
    """No entry of its gradient is larger, and those that are smaller stay."""
    applied, limit = {}, 1e-3
    for value in (None, limit):
        nets, name = nets_of(SiD()), {"student": "max_grad_value", "fake": "fake_max_grad_value"}[player]
        with pushed(nets) as found:
            run(SiD(), nets, max_train_steps=1, **{name: value})
        applied[value] = {role: torch.cat([g.flatten() for g in found[role].values()]) for role in ("student", "fake")}
    assert float(applied[None][player].abs().max()) > 10 * limit
    assert torch.equal(applied[limit][player], applied[None][player].clamp(-limit, limit))
    if player == "student":  # which moves after the fake score
        assert torch.equal(applied[limit]["fake"], applied[None]["fake"])


def test_radam(tmp_path):
    """Of RAdam's first five steps each is the mean gradient times the rate: its variance is not yet known."""
    cfg = {"optimizer": "radam", "adam_beta1": 0.9, "adam_weight_decay": 0.1, "learning_rate": 1e-2}
    nets = nets_of(LCD())
    before = weights(nets.student.denoiser.net)
    with pushed(nets) as found:
        run(LCD(), nets, max_train_steps=1, **cfg)
    after = weights(nets.student.denoiser.net)
    for name, g in found["student"].items():
        torch.testing.assert_close(after[name], before[name] * (1 - 1e-3) - 1e-2 * g, rtol=1e-5, atol=1e-7)
    *_, half = train(LCD(), nets_of(LCD()), vectors, config(max_train_steps=7, **cfg), Accelerator(cpu=True))
    folder = checkpoint.save(half, tmp_path)
    cfg = config(max_train_steps=9, **cfg)
    *_, whole = train(LCD(), nets_of(LCD()), vectors, cfg, Accelerator(cpu=True))
    *_, resumed = train(LCD(), nets_of(LCD()), vectors, cfg, Accelerator(cpu=True), folder)
    assert all(equal(role, roles(resumed.nets)[name]) for name, role in roles(whole.nets).items())


def test_power_average():
    """Update n of the student, not of the loop: rCM's alone at first, then at every fourth step."""
    method, width = RCM(every=4, warmup=3, guidance=1.0), 0.1
    nets, students, made = nets_of(method), [], []
    cfg = config(ema_width=width, ema_half_life=0.0, max_train_steps=13, adam_beta1=0.9)
    for state in train(method, nets, vectors, cfg, Accelerator(cpu=True)):
        if "student/loss" in state.logs:
            students.append(state.step)
            made.append(weights(nets.student.denoiser.net))
        assert count_updates(method, "student", state.step) == len(students)
    powers = torch.arange(len(made) + 1, dtype=torch.float64) ** (exponent(width) + 1)
    assert students == [1, 2, 3, 5, 9, 13] and count_updates(method, "fake", 13) == 10
    for name, w in weights(state.ema.net).items():
        values = torch.stack([one[name].double() for one in made])
        want = torch.tensordot(powers.diff() / powers[-1], values, 1)
        torch.testing.assert_close(w.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ramp", (None, 0.5))
@pytest.mark.parametrize("half_life", (0.0, 40.0))
def test_average(half_life, ramp):
    """0.5^(images / half-life), the half-life at most `ramp` times the images seen before."""
    method, B = SiD(), 8
    nets = nets_of(method)
    expected = {n: w.double() for n, w in weights(nets.student.denoiser.net).items()}
    cfg = config(ema_half_life=half_life, ema_ramp=ramp, max_train_steps=6)
    for state in train(method, nets, vectors, cfg, Accelerator(cpu=True)):
        horizon = half_life if ramp is None else min(half_life, ramp * (state.step - 1) * B)
        beta = 0.5 ** (B / horizon) if horizon else 0.0
        for name, w in weights(nets.student.denoiser.net).items():
            expected[name] = beta * expected[name] + (1 - beta) * w.double()
        for name, w in weights(state.ema.net).items():
            torch.testing.assert_close(w.double(), expected[name], rtol=1e-5, atol=1e-6)
    differs = not equal(weights(state.ema.net), weights(nets.student.denoiser.net))
    assert differs == (half_life > 0)


# ---- mistakes and faults ----


@pytest.mark.parametrize(
    "change",
    (
        {"max_train_steps": 0},
        {"train_batch_size": 0},
        {"gradient_accumulation_steps": 0},
        {"logging_steps": 0},
        {"lr_warmup_steps": -1},
        {"checkpointing_steps": -1},
        {"checkpoints_total_limit": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"fake_learning_rate": -1.0},
        {"max_grad_norm": 0.0},
        {"adam_beta1": 1.0},
        {"ema_half_life": -1.0},
        {"ema_ramp": -1.0},
        {"ema_width": 0.3},
        {"max_grad_value": 0.0},
        {"fake_max_grad_norm": -1.0},
    ),
    ids=lambda change: " ".join(f"{k} {v}" for k, v in change.items()),
)
def test_impossible_settings_are_named(change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name.removeprefix('fake_').split('_')[0]}.*{value}"):
        config(**change)


def test_a_batch_must_be_divisible():
    assert config(train_batch_size=12, gradient_accumulation_steps=3).micro_batch(2) == 2
    with pytest.raises(ValueError, match="8 is not divisible by 3 process.* x 1 .* multiple of 3"):
        config().micro_batch(3)
    with pytest.raises(ValueError, match="not divisible"):
        run(SiD(), gradient_accumulation_steps=16)


def test_trainable_weights_must_be_float32():
    nets = nets_of(SiD())
    nets.fake.net.mid.bfloat16()
    with pytest.raises(ValueError, match=r"fake .* half precision \(mid.weight"):
        run(SiD(), nets)


class Broken(Draw):
    """One number of one turn is not a number."""

    def __init__(self, *key, at):
        super().__init__(*key)
        self.bad = (self.step, self.player) == at

    def normal(self, name, shape):
        x = super().normal(name, shape)
        if self.bad and name == "eps":
            x.flatten()[3] = float("nan")
        return x


@pytest.mark.parametrize(
    "name, player", (("dmd2", "student"), ("dmd2", "fake"), ("sid", "student"), ("lcd", "student"))
)
def test_a_nan_stops_by_name(name, player, tmp_path):
    """Step, player, rank and tensor are named; nobody's weights, average or moments took it in."""
    method = METHODS[name]
    nets = nets_of(method)
    cfg = config(output_dir=f"{tmp_path}")
    loop = train(method, nets, vectors, cfg, Accelerator(cpu=True), draw=lambda *key: Broken(*key, at=(2, player)))
    _, state = next(loop), next(loop)
    before = weights(nets.modules()[player])
    with pytest.raises(FloatingPointError, match=f"step 2, player '{player}', rank 0: first bad tensor: .*loss nan"):
        next(loop)
    assert equal(weights(nets.modules()[player]), before)
    assert all(w.isfinite().all() for w in everything(state).values())


# ---- checkpoints: the digits under the UNet of a smoke run ----


DIGITS = {
    "sid": (SiD(), {}),
    "dmd2": (DMD2(every=2), {}),
    "vsd": (VSD(guidance=RANGE, fake_steps=2), {"fake": FakeConfig(LoRA(2, 2.0, ("conv1", "conv2")))}),
    "vsd, all adapters": (
        VSD(guidance=RANGE),
        {"fake": FakeConfig(LoRA(2, 2.0, ("conv1",))), "student": StudentConfig(lora=LoRA(2, 2.0, ("conv2",)))},
    ),
    "lcd": (LCD(guidance=RANGE), {}),
    "scm": (SCM(warmup=4), {}),
}


def digits(name, channels=(8, 16)):
    """(method, networks) from the same teacher and head every time."""
    from pipelines.families import edm

    method, change = DIGITS[name]
    torch.manual_seed(0)
    teacher = edm.teacher(edm.unet(channels), 0.5, null_class=10)
    student = replace(change.get("student", StudentConfig()), steps=2, sigma=2.5)
    return method, build(method, teacher.denoiser, teacher.shape, teacher.encode([0]), **{**change, "student": student})


def everything(state):
    """All tensors of a run by name, copied."""
    found = {f"{role}.{k}": v for role, net in state.nets.modules().items() for k, v in net.state_dict().items()}
    found |= {f"ema.{k}": v for k, v in state.ema.net.state_dict().items()}
    for player, optimizer in state.optimizers.items():
        for i, entry in optimizer.state_dict()["state"].items():
            found |= {f"optimizer {player} {i}.{k}": v for k, v in entry.items()}
    return {name: v.clone() for name, v in found.items()}


@pytest.mark.parametrize("name", DIGITS)
def test_resume_equals_the_uninterrupted_run(name, tmp_path):
    """6 steps = 3 steps, a checkpoint, fresh objects in another random state, 3 more: all tensors and losses."""
    cfg = config(max_train_steps=6, lr_scheduler="linear", ema_half_life=50.0)
    method, nets = digits(name)
    start, logs = {role: copy.deepcopy(net) for role, net in roles(nets).items()}, {}
    for state in train(method, nets, Digits(), cfg, Accelerator(cpu=True)):
        logs[state.step] = state.logs
        if state.step == 3:
            folder = checkpoint.save(state, tmp_path)
    expected = everything(state)

    torch.randn(7), torch.manual_seed(99)
    method, nets = digits(name)
    for state in train(method, nets, Digits(), cfg, Accelerator(cpu=True), resume=folder):
        assert equal(state.logs, logs[state.step])
    assert state.step == 6 and equal(everything(state), expected)
    moved = {role for role, net in roles(nets).items() if not equal(net, start[role])}
    assert moved == nets.modules().keys()


@pytest.mark.parametrize("name", [*CLASSES, "learned weight"])
def test_every_method_resumes(name, tmp_path):
    """2 steps, a checkpoint, fresh objects and 2 more are 4 steps, bit for bit."""
    method = METHODS["scm"] if name == "learned weight" else example(name, "mid")
    cfg = config(ema_half_life=50.0)
    data = data_of(method)
    for state in train(method, nets_of(method), data, cfg, Accelerator(cpu=True)):
        if state.step == 2:
            folder = checkpoint.save(state, tmp_path)
    torch.randn(7)
    *_, again = train(method, nets_of(method), data, cfg, Accelerator(cpu=True), resume=folder)
    assert again.step == 4 and equal(again.logs, state.logs) and equal(everything(again), everything(state))
    assert all(torch.isfinite(value).all() for value in again.logs.values())


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of DMD2 with its GAN after one step."""
    method, nets = digits("dmd2")
    return checkpoint.save(next(train(method, nets, Digits(), config(), Accelerator(cpu=True))), tmp_path)


def test_a_checkpoint_is_tensors_and_json(saved):
    """No pickles, nothing of the teacher; every file opens as what it is called."""
    names = {"student", "fake", "disc", "ema", "optimizer_student", "optimizer_fake"}
    assert {p.name for p in saved.iterdir()} == {f"{name}.safetensors" for name in names} | {"state.json"}
    assert json.loads((saved / "state.json").read_text())["step"] == 1
    assert all(load_file(saved / f"{name}.safetensors") for name in names)


def test_adapters_are_saved_without_their_backbone(tmp_path):
    method, nets = digits("vsd, all adapters")
    folder = checkpoint.save(next(train(method, nets, Digits(), config(), Accelerator(cpu=True))), tmp_path)
    for role in ("student", "fake", "ema"):
        assert all("lora" in name for name in load_file(folder / f"{role}.safetensors"))


def test_only_the_newest_are_kept(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()  # the user's own
    (tmp_path / ".checkpoint-9.partial").mkdir()  # of a crash
    for state in train(*digits("lcd"), Digits(), config(max_train_steps=11), Accelerator(cpu=True)):
        if state.step > 7:
            checkpoint.save(state, tmp_path, limit=2)
    assert [p.name for p in checkpoint.list_intact_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-11"]
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-best", "checkpoint-10", "checkpoint-11"}
    checkpoint.save(state, tmp_path, limit=None)
    assert len(checkpoint.list_intact_checkpoints(tmp_path)) == 2


def test_a_crash_while_saving_leaves_the_old_checkpoint(saved, monkeypatch):
    method, nets = digits("dmd2")
    state = next(train(method, nets, Digits(), config(), Accelerator(cpu=True)))
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint.write, "save_file", full)
    with pytest.raises(OSError):
        checkpoint.save(state, saved.parent)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert checkpoint.list_intact_checkpoints(saved.parent) == [saved]


def test_a_wrong_checkpoint_is_refused(saved):
    """Of another method, of another network, with a damaged file: each says what is wrong with which file."""

    def resume(name, **wide):
        method, nets = digits(name, **wide)
        next(train(method, nets, Digits(), config(), Accelerator(cpu=True), resume=saved))

    with pytest.raises(ValueError, match="has no target.safetensors: it is not a checkpoint of this method"):
        resume("lcd")
    with pytest.raises(ValueError, match="student.safetensors holds other tensors than this run's student"):
        resume("dmd2", channels=(8, 24))
    (saved / "optimizer_fake.safetensors").replace(saved / "optimizer_student.safetensors")
    (saved / "state.json").write_text('{"step": 1}')  # as before there were checksums
    with pytest.raises(ValueError, match="optimizer_student.safetensors is not of this run's parameters"):
        resume("dmd2")


@pytest.mark.parametrize(("wrong", "says"), [({"mixed_precision": "fp16"}, "bf16"), ({}, "DeepSpeed")])
def test_engines_that_cannot_train_several_players_are_refused(wrong, says):
    from types import SimpleNamespace

    from accelerate.utils import DistributedType

    kind = DistributedType.NO if wrong else DistributedType.DEEPSPEED
    engine = SimpleNamespace(**{"mixed_precision": "no", "distributed_type": kind, "num_processes": 1} | wrong)
    with pytest.raises(ValueError, match=says):
        next(train(VSD(guidance=1.0), None, None, TrainConfig(), engine))
