"""The second time: nothing where it is not told, a change where it is; its networks are copied, trained, exported."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from gaussian import F64, SCHEDULES
from tiny import clock, filled, tiny

from distill.diffusion.end_time import (
    EndTimeEmbedding,
    add_end_time,
    average,
    fold_end_times,
    guide_velocity,
    remove_end_time,
    with_end_key,
)
from distill.diffusion.schedule import Flow
from distill.diffusion.solver import run_calls
from distill.diffusion.student import Student
from distill.methods import LCD, MeanFlow, TwinFlow
from distill.networks.lora import LoRA, merge_adapters
from distill.training.build import build
from distill.training.config import StudentConfig
from pipelines.families.registry import families

N, CLASSES = 8, 3


def told(denoiser, seed=3):
    """`add_end_time`, and its last layer is not zero."""
    found = add_end_time(denoiser)
    found.net.end = filled(found.net.end, seed, next(denoiser.net.parameters()).dtype)
    return found


def point(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, 2, dtype=F64, generator=g), torch.linspace(0.1, 0.9, N, dtype=F64)


def test_end_is_zero_at_zero():
    end, r = filled(EndTimeEmbedding(16), 0, F64), torch.linspace(-1, 1, 9, dtype=F64)
    out = end(r)
    assert torch.equal(out[4], torch.zeros(16, dtype=F64)) and bool(
        (out[[0, 1, 2, 3, 5, 6, 7, 8]].norm(dim=1) > 0.1).all()
    )
    assert (out[0] - out[8]).norm() > 0.1  # the sign is heard
    assert torch.equal(EndTimeEmbedding(16).double()(r), torch.zeros(9, 16, dtype=F64))


def test_told_and_untold():
    x, t = point()
    plain, two = clock(Flow()), told(clock(Flow()))
    assert torch.equal(two(x, t).out, plain(x, t).out)
    assert torch.equal(two(x, t, with_end_key(None, 0 * t)).out, plain(x, t).out)
    assert (two(x, t, with_end_key(None, t / 2)).out - plain(x, t).out).norm() > 0.1
    assert torch.equal(two(x, t).out, plain(x, t).out)  # nothing of an earlier call is left
    fresh = add_end_time(clock(Flow()))
    assert torch.equal(fresh(x, t, with_end_key(None, t / 2)).out, plain(x, t).out)
    one = remove_end_time(two)
    assert torch.equal(one(x, t).out, plain(x, t).out) and not hasattr(one.net, "end") and one.call is plain.call
    assert hasattr(two.net, "end") and remove_end_time(plain) is plain


def test_a_copy_tells_its_own():
    x, t = point()
    two = told(clock(Flow()))
    other, before = two.copy(), two(x, t, with_end_key(None, t)).out
    with torch.no_grad():
        other.net.end.linear_2.weight.mul_(2)
    assert (other(x, t, with_end_key(None, t)).out - before).norm() > 0.1
    assert torch.equal(two(x, t, with_end_key(None, t)).out, before)


def test_guidance_in_itself():
    """omega v + (1 - omega - kappa) F(null) + kappa F(c) at (t, t); 1, 0 is v itself."""
    net, (x, t) = told(clock(Flow(), "flow", classes=CLASSES)), point()
    c, v = {"label": torch.arange(N) % CLASSES}, torch.ones(N, 2, dtype=F64)
    none = {"label": torch.full((N,), CLASSES)}
    want = 0.3 * v + (1 - 0.3 - 0.6) * net(x, t, with_end_key(none, t)).out + 0.6 * net(x, t, with_end_key(c, t)).out
    some = torch.arange(N) < 3
    want = torch.where(some[:, None], want, v)
    torch.testing.assert_close(guide_velocity(v, 0.3, 0.6, net, x, t, c, some), want, rtol=1e-12, atol=1e-12)
    assert guide_velocity(v, 1.0, 0.0, net, x, t, c, some) is v


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_average_is_of_the_flow(schedule):
    """x0 = x_t - t F and eps = x_t + (1 - t) F, of a network on any schedule."""
    path = SCHEDULES[schedule]
    net, (x, t) = told(clock(path, "edm" if schedule == "edm" else "v")), point()
    pred = net.on_schedule(Flow())(x, t, with_end_key(None, t / 3))
    F = average(net.on_schedule(Flow()), x, t, t / 3, None)
    torch.testing.assert_close(x - t[:, None] * F, pred.x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_calls_go_where_they_are_told(schedule):
    """x_r = x_t - (t - r) F(x_t, t, r) from call to call, the last to 0; one that stops before its time goes to 0."""
    path, (z, _) = SCHEDULES[schedule], point()
    net = told(clock(path, "edm" if schedule == "edm" else "v"))
    student = Student(net, (0.9, 0.6, 0.3), renoise="ddim", jumps=True)
    times = torch.tensor(student.times, dtype=F64)
    (alpha, sigma), r = path.coefficients(times), Flow().time(path.ratio(times))

    def by_hand(*ends):
        x = sigma[0] * z / (alpha[0] + sigma[0])
        for t, end in zip(r, ends):
            t, end = t.expand(N), torch.as_tensor(end, dtype=F64).expand(N)
            x = x - (t - end)[:, None] * average(net.on_schedule(Flow()), x, t, end, None)
        return x

    want = by_hand(r[1], r[2], 0.0)
    torch.testing.assert_close(student.generate(z, None), want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(run_calls(student.calls(), z), want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(student.generate(z, None, steps=2), by_hand(r[1], 0.0), rtol=1e-9, atol=1e-9)
    for other in (replace(student, jumps=False), replace(student, renoise="fresh")):
        assert not any(to for _, to in other.legs) and other.denoiser_of_call(1, 0.3) is net
    assert (replace(student, jumps=False).generate(z, None) - want).abs().max() > 0.1


def test_ends_in_the_embedding_of_times():
    """Without its second time the student gives the same at its own times, with adapters merged too."""
    z, _ = point()
    for schedule in SCHEDULES:
        net = told(clock(SCHEDULES[schedule], "edm" if schedule == "edm" else "v"))
        before = {name: p.clone() for name, p in net.net.named_parameters()}
        student = Student(net, (0.9, 0.6, 0.3), renoise="ddim", jumps=True)
        one = fold_end_times(net, student.legs, z[:1], None)
        assert not hasattr(one.net, "end") and one.net.state_dict().keys() == clock(Flow()).net.state_dict().keys()
        plain = Student(one, student.times, renoise="ddim")
        torch.testing.assert_close(plain.generate(z, None), student.generate(z, None), rtol=1e-9, atol=1e-9)
        assert all(torch.equal(p, before[name]) for name, p in net.net.named_parameters())


def test_build():
    """Student and target are told, the teacher is not changed; a network without an embedding of time is refused."""
    teacher = clock(Flow(), "flow", classes=CLASSES)
    assert build(MeanFlow(), teacher, (2,)).student.jumps and not build(LCD(), teacher, (2,)).student.jumps
    names = {n for n, _ in teacher.net.named_parameters()}
    nets = build(TwinFlow(), teacher, (2,), {"label": torch.tensor([0])})
    ends = {"end.linear_1.weight", "end.linear_2.weight"}
    assert {n for n, _ in nets.student.denoiser.net.named_parameters()} == names | ends
    assert {n for n, _ in nets.target.net.named_parameters()} == names | ends
    assert {n for n, _ in nets.teacher.net.named_parameters()} == names
    assert all(p.requires_grad for p in nets.student.denoiser.net.parameters())
    x, t = point()
    c = with_end_key({"label": torch.zeros(N, dtype=torch.long)}, t / 2)
    nets.target.net.end = filled(nets.target.net.end, 1, F64)
    assert not torch.equal(nets.target(x, t, c).out, nets.student.denoiser(x, t, c).out)
    with pytest.raises(ValueError, match="TimestepEmbedding; Tiny has none"):
        build(MeanFlow(), tiny(Flow(), "flow"), (2,))


def test_adapters():
    """Of a LoRA student the second time trains too, and is its own; an export has neither."""
    teacher = clock(Flow(), "flow")
    nets = build(MeanFlow(), teacher, (2,), None, StudentConfig(lora=LoRA(2, 2.0, ("first", "last"))))
    net = nets.student.denoiser.net
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert {"end.linear_1.weight", "end.linear_2.weight"} < trained and len(trained) == 6
    net.end = filled(net.end, 1, F64)
    plain = merge_adapters(remove_end_time(nets.student.denoiser).net)
    assert plain.state_dict().keys() == teacher.net.state_dict().keys()
    x, t = point()
    torch.testing.assert_close(plain(x, 1000 * t), nets.student.denoiser(x, t).out)


def test_export_of_several_calls():
    """Its network has one time and no adapter, and gives the same samples; with fresh noise only the time is gone."""
    from pipelines.export.export import fold_end_times_of

    parts, family = SimpleNamespace(drop_text=lambda: None), SimpleNamespace(examples=lambda teacher: ("a",))
    teacher = SimpleNamespace(family=family, parts=parts, shape=(2,), encode=lambda prompts: None)
    z, _ = point()
    for lora in (LoRA(), LoRA(2, 2.0, ("first", "last"))):
        config = StudentConfig(times=(1.0, 0.5), renoise="ddim", lora=lora)
        student = build(MeanFlow(), clock(Flow(), "flow"), (2,), None, config).student
        for i, p in enumerate(p for p in student.denoiser.net.parameters() if p.requires_grad):
            p.data += 0.1 * (-1) ** i
        one = fold_end_times_of(student, teacher)
        assert one.denoiser.net.state_dict().keys() == clock(Flow()).net.state_dict().keys()
        assert not hasattr(one.denoiser.net, "peft_config")
        torch.testing.assert_close(one.generate(z, None), student.generate(z, None), rtol=1e-6, atol=1e-6)
        assert (replace(student, jumps=False).generate(z, None) - one.generate(z, None)).abs().max() > 1e-3
        fresh = replace(student, renoise="fresh")
        assert hasattr(fold_end_times_of(fresh, teacher).denoiser.net, "peft_config") == (lora.rank is not None)


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_every_family(family, tmp_path):
    """Each family's network is told by its own embedding of time, and unchanged where it is not told."""
    from pipelines import load
    from pipelines.families import tiny as small

    small.save(family, tmp_path)
    teacher = load(tmp_path)
    c = teacher.encode([0, 1] if families()[family].labels else ["a cat", "a dog on the moon"])
    x, t = torch.randn(2, *teacher.shape), torch.full((2,), 0.6, dtype=F64)
    two = copy.copy(teacher.denoiser)
    with torch.no_grad():
        before = two(x, t, c).out
        two = told(two)
        assert torch.equal(two(x, t, c).out, before)
        torch.testing.assert_close(two(x, t, with_end_key(c, 0 * t)).out, before)
        assert (two(x, t, with_end_key(c, t)).out - before).norm() > 1e-3 * before.norm()


@pytest.mark.parametrize("first, second", (("two", "one"), ("one", "two"), ("two", "two")))
def test_a_second_stage(first, second, tmp_path):
    """A student of two times and one of one time start from each other: the plain call is the same."""
    from safetensors.torch import save_file

    teacher, (x, t) = clock(Flow(), "flow", dtype=torch.float32), point()
    student = replace(teacher, net=clock(Flow(), seed=7, dtype=torch.float32).net)
    student = told(student) if first == "two" else student
    save_file(student.net.state_dict(), tmp_path / "a.safetensors")
    method = MeanFlow() if second == "two" else LCD(target_ema=0)
    found = build(method, teacher, (2,), None, StudentConfig(init=str(tmp_path / "a.safetensors"))).student.denoiser
    x = x.float()
    assert torch.equal(found(x, t).out, student(x, t).out)
    if second == "two":
        got, want = (d(x, t, with_end_key(None, t)).out for d in (found, student if first == "two" else found))
        assert torch.equal(got, want)
