"""Staying healthy: what is not finite is named, replayed and left out; a step that hangs is reported.

Started by torchrun, this file is a run of two processes of which only the second one meets a NaN.
"""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from processes import TWO, python
from safetensors.torch import load_file, save_file
from test_trainer import METHODS, config, equal, everything, nets_of, roles, vectors

from distill import data
from distill.losses import score_gap_logs
from distill.methods import DMD2, SiD
from distill.networks.discriminator import accuracy
from distill.training import checkpoint, nonfinite, replay
from distill.training.loop import train
from distill.training.samples import describe_samples
from distill.training.watchdog import Watchdog


def ill(*at):
    """`vectors` with a NaN in the real ones at each (step, player, sample)."""

    def batches(draw):
        batch = vectors(draw)
        for step, player, sample in at:
            if (draw.step, draw.player) == (step, player):
                batch["real"][draw.samples == sample] = float("nan")
        return batch

    return batches


def states(out, *at, method=METHODS["dmd2"], nets=None, resume=None, accelerator=None, **change):
    """The states of a run of two micro-batches a process, with NaNs in its data at each of `at`."""
    cfg = config(output_dir=f"{out}", gradient_accumulation_steps=2, **change)
    yield from train(method, nets or nets_of(method), ill(*at), cfg, accelerator or Accelerator(cpu=True), resume)


# ---- signs of dying ----


@pytest.mark.parametrize("share", (0.0, 0.25, 1.0))
def test_the_lag_is_the_way_that_the_student_is_ahead(share):
    """Gaussians of mean 0 (fake) and 2 (teacher): lag / score_gap is where the student's mean is."""
    N, alpha, sigma = 200_000, 0.8, 0.6
    x = 2 * share + torch.randn(N, 1, dtype=torch.float64)
    x_t = alpha * x + sigma * torch.randn_like(x)
    fake, real = (m + alpha / (alpha**2 + sigma**2) * (x_t - alpha * m) for m in (0.0, 2.0))
    logs = score_gap_logs(x, real, fake)
    assert float(logs["lag"] / logs["score_gap"]) == pytest.approx(share, abs=0.01)
    assert logs.keys() - score_gap_logs(x, real, fake, own=False) == {"lag"}


def test_size_and_spread_of_samples():
    """In words: as large as noise, of one mode, of samples that are all one; none of a single sample."""
    z = torch.randn(64, 3, 16, 16)
    found = describe_samples(z)
    assert [float(found[key]) for key in ("x_rms", "x_spread")] == pytest.approx([1, 1], rel=0.01)
    assert float(describe_samples(5 + 0.1 * z)["x_spread"]) == pytest.approx(0.1, rel=0.01)
    assert float(describe_samples(z[:1].expand(7, -1, -1, -1))["x_spread"]) == 0
    assert describe_samples(z[:1]).keys() == {"x_rms"}


def test_verdicts_of_a_discriminator():
    low, high = torch.tensor([-1.0, -2.0, 3.0, -0.1]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert float(accuracy(low, high)) == (0.75 + 0.5) / 2


def test_what_is_logged():
    """Samples of the student alone: consistency methods look at real images. docs/health.md explains all of it."""
    samples, found = {"student/x_rms", "student/x_spread"}, {}
    for name in METHODS:
        nets = nets_of(METHODS[name])
        found[name] = next(train(METHODS[name], nets, vectors, config(), Accelerator(cpu=True))).logs.keys()
    assert {name for name, keys in found.items() if samples <= keys} == {"sid", "sid-lsg", "dmd2", "vsd"}
    assert {name for name, keys in found.items() if "student/lag" in keys} == {"sid", "sid-lsg", "dmd2"}
    assert [name for name, keys in found.items() if "fake/gan_right" in keys] == ["dmd2"]
    explained = (Path(__file__).parents[3] / "docs" / "health.md").read_text()
    assert not {key for keys in found.values() for key in keys if f"`{key}`" not in explained}


# ---- what is not finite is named and can be seen again ----


@pytest.mark.parametrize(
    "method, step, player",
    (
        (METHODS["dmd2"], 1, "fake"),
        (METHODS["dmd2"], 2, "student"),  # the fake reads the student's batch after the student has moved
        (DMD2(every=4, taps=("mid",), walk=True), 2, "fake"),  # on samples that go on from those of the step before
    ),
    ids=("fresh", "reused", "walked"),
)
def test_a_nan_is_named_and_replayed(method, step, player, tmp_path):
    """From the folder alone, on other networks: the same losses to all printed digits, and the same bad tensor."""
    loop = states(tmp_path, (step, player, 5), method=method)
    for _ in range(step):
        state = next(loop)
    before = everything(state)
    with pytest.raises(FloatingPointError) as error:
        next(loop)
    folder = tmp_path / f"replay-{step}-fake"
    assert str(error.value) == (
        f"non-finite loss at step {step}, player 'fake', rank 0: first bad tensor: batch/real (loss nan, samples 4 to "
        f"7). The update was not applied; see it again: --replay {folder}. {nonfinite.ADVICE}"
    )
    after = everything(state)
    assert equal({k: v for k, v in before.items() if "fake" in k}, {k: v for k, v in after.items() if "fake" in k})
    files = {f"{file.relative_to(folder)}" for file in folder.rglob("*") if file.is_file()}
    assert {"replay.json", "rank0.safetensors", f"checkpoint-{step}/fake.safetensors"} <= files
    assert {Path(name).suffix for name in files} == {".json", ".safetensors"}
    assert not checkpoint.list_intact_checkpoints(tmp_path)  # a replay is no checkpoint of the run

    def none(draw):
        raise AssertionError("a replay has its own batch")

    nets, cfg = nets_of(method), config(gradient_accumulation_steps=2)
    (findings,) = replay.replay_update(folder, method, nets, none, cfg, Accelerator(cpu=True)).values()
    assert [(one.samples, one.bad) for one in findings] == [([0, 1, 2, 3], None), ([4, 5, 6, 7], "batch/real")]
    then = json.loads((folder / "replay.json").read_text())["ranks"]["0"]
    assert [one.loss for one in findings] == [one["loss"] for one in then]
    assert findings[1].loss == "nan" and 0 < float(findings[0].loss) < 100
    replayed = roles(nets)
    assert all(equal(net, replayed[role]) for role, net in roles(state.nets).items())


def weight(nets):
    nets.fake.net.mid.weight.data[0, 0] = float("inf")


def late_weight(nets):
    """Overflows in the discriminator alone."""
    nets.disc[0].weight.data.fill_(3e38)


def gradient(nets):
    """Of a forward pass that is as it should be."""

    def spoil(module, x, y):
        if y.requires_grad:
            y.register_hook(lambda g: g / 0)

    nets.fake.net.mid.register_forward_hook(spoil)


@pytest.mark.parametrize(
    "harm, says",
    (
        (weight, "non-finite loss at step 0, player 'student', rank 0: first bad tensor: output of fake.mid (loss"),
        (late_weight, "first bad tensor: output of disc.0 (loss"),
        (gradient, "non-finite gradient at step 0, player 'student', rank 0: first bad tensor: gradient of the output"),
    ),
    ids=("weight", "later weight", "gradient"),
)
def test_the_first_bad_tensor(harm, says, tmp_path):
    nets = nets_of(METHODS["dmd2"])
    harm(nets)
    with pytest.raises(FloatingPointError) as error:
        next(states(tmp_path, nets=nets))
    assert says in str(error.value)


def test_a_loss_that_is_infinite_with_finite_gradients(tmp_path, monkeypatch):
    plain = SiD.fake_loss
    monkeypatch.setattr(SiD, "fake_loss", lambda *a: (plain(*a)[0] + float("inf"), {}))
    with pytest.raises(FloatingPointError, match="non-finite loss .* first bad tensor: the loss itself \\(loss inf"):
        next(states(tmp_path, method=SiD()))


def test_a_fault_that_does_not_come_again(tmp_path):
    """Of a kernel, say: it is told, and what was computed is kept to be seen again."""
    nets, calls = nets_of(SiD()), []

    def once(module, x, y):
        calls.append(y)
        return y * float("nan") if len(calls) == 1 else y

    nets.fake.net.mid.register_forward_hook(once)
    with pytest.raises(FloatingPointError, match="step 0, player 'fake', no rank: computed again it is finite"):
        next(states(tmp_path, nets=nets, method=SiD()))
    assert (tmp_path / "replay-0-fake" / "rank0.safetensors").is_file()


def test_a_full_disk_does_not_hide_it(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(replay, "save_file", full)
    with pytest.raises(FloatingPointError, match="batch/real .* no replay could be written \\(.*No space left"):
        list(states(tmp_path, (1, "fake", 5)))


# ---- an update may be left out ----


def test_updates_are_left_out(tmp_path, capsys):
    """Nobody's weights, average or moments took the NaN in; the other player goes on; a row ends with a good update."""
    at = [(step, player, 5) for step, player in ((1, "fake"), (2, "student"), (4, "student"))]
    seen, logs = {0: {}}, {}
    for state in states(tmp_path, *at, skip_nonfinite=2, max_train_steps=5):
        seen[state.step], logs[state.step] = everything(state), state.logs
    for step in range(1, 5):
        fake = {k: v for k, v in seen[step + 1].items() if "fake" in k or "disc" in k}
        assert equal(fake, {k: v for k, v in seen[step].items() if k in fake}) == (step in (1, 2, 4)), step
        rest = {k: v for k, v in seen[step + 1].items() if k not in fake}
        assert equal(rest, {k: v for k, v in seen[step].items() if k in rest}) == (step % 2 == 1), step
    assert all(v.isfinite().all() for v in seen[5].values())
    assert [float(logs[step]["fake/skipped"]) for step in range(1, 6)] == [0, 1, 1, 0, 1]
    assert [key for key in logs[2]] == ["fake/skipped"]
    assert float(logs[5]["student/skipped"]) == 0 and "fake/loss" not in logs[5]
    said = capsys.readouterr().err.splitlines()
    assert [line.split("; ")[-1] for line in said] == [f"left out, {n} in a row of 2 allowed" for n in (1, 2, 1)]
    assert [folder.name for folder in tmp_path.iterdir()] == ["replay-1-fake"]  # one is enough


def test_a_row_that_is_too_long_is_fatal_also_after_resuming(tmp_path):
    """The count is part of a checkpoint: the resumed run ends where the uninterrupted one does."""
    at = [(1, "fake", 0), (2, "student", 1), (3, "fake", 2)]
    for state in states(tmp_path, *at, skip_nonfinite=2):
        if state.step == 2:
            folder = checkpoint.save(state, tmp_path)
        elif state.step == 3:
            break
    expected = everything(state)
    loop = states(tmp_path / "resumed", *at, skip_nonfinite=2, resume=folder)
    assert equal(everything(next(loop)), expected)
    with pytest.raises(FloatingPointError, match="step 3, player 'fake'"):
        next(loop)
    assert (tmp_path / "resumed" / "replay-3-fake" / "replay.json").is_file()


# ---- on one of two processes ----


def main(folder):
    """Rank 1 alone has a NaN: a run that ends with it, one that leaves it out, and one of sharded networks."""
    from sharded import sharded

    torch.set_num_threads(1)
    accelerator, told = Accelerator(cpu=True), {}
    at = (1, "fake", 5)
    try:
        list(states(folder, at, accelerator=accelerator))
    except FloatingPointError as error:
        told["raised"] = str(error)
    *_, state = states(f"{folder}/skip", at, accelerator=accelerator, skip_nonfinite=1)
    rank = accelerator.process_index
    save_file({k: v.contiguous() for k, v in everything(state).items()}, f"{folder}/rank{rank}.safetensors")
    nets = nets_of(METHODS["dmd2"])
    nets.teacher.blocks = ("Linear", "Embedding")
    try:
        list(states(f"{folder}/sharded", at, nets=nets, accelerator=sharded(accelerator)))
    except FloatingPointError as error:
        told["sharded"] = str(error)
    Path(f"{folder}/rank{rank}.json").write_text(json.dumps(told))
    accelerator.wait_for_everyone()
    sys.stderr.flush()
    os._exit(0)  # threads of gloo whose collectives an error left behind may abort a process that ends by itself


def test_both_ranks_name_the_one(tmp_path):
    """Both raise, or both leave the update out, name rank 1, and stay equal; one process replays it."""
    done = python(*TWO, __file__, tmp_path)
    told = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0] == told[1] and told[0].keys() == {"raised", "sharded"}
    says = "step 1, player 'fake', rank 1: first bad tensor: batch/real (loss nan, samples 4 to 5)"
    assert all(says in message for message in told[0].values())
    assert done.stderr.count("rank 1: first bad tensor") == 1 and "left out, 1 in a row of 1 allowed" in done.stderr
    weights = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1)]
    assert equal(*weights)
    one = everything([*states(tmp_path / "one", (1, "fake", 5), skip_nonfinite=1)][-1])
    assert all((v - weights[0][k]).norm() <= 1e-5 * v.norm() + 1e-9 for k, v in one.items() if "optimizer" not in k)

    method, cfg = METHODS["dmd2"], config(gradient_accumulation_steps=2)
    for folder in (tmp_path, tmp_path / "sharded"):
        found = replay.replay_update(
            folder / "replay-1-fake", method, nets_of(method), None, cfg, Accelerator(cpu=True)
        )
        assert {rank: [one.bad for one in ones] for rank, ones in found.items()} == {1: ["batch/real", None]}


# ---- the command ----


def test_the_command_that_replays(tmp_path, monkeypatch, capsys):
    """A recipe that ends with a NaN names the flag; with it, status 1 while the NaN is there and 0 once it is not."""
    from pipelines.run import main
    from recipes.digits import TABLE

    plain = data.Digits.__call__

    def sick(self, draw):
        return plain(self, draw) | {"real": torch.full((len(draw.samples), 1, 8, 8), float("nan"))}

    def status(*flags):
        with pytest.raises(SystemExit) as end:
            main(TABLE["dmd2"].config, list(flags))
        return end.value.code

    folder = tmp_path / "replay-0-fake"
    with monkeypatch.context() as patch:
        patch.setattr(data.Digits, "__call__", sick)
        assert status("--smoke", "--output_dir", f"{tmp_path}", "--hang_seconds", "0.001") == 2
    assert (tmp_path / "hang-rank0.txt").read_text().startswith("rank 0: step 0 has taken more than 0.001 s")
    assert f"--replay {folder}" in capsys.readouterr().err
    assert status("--replay", f"{folder}") == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("then: non-finite loss at step 0, player 'fake', rank 0: first bad tensor: batch/real")
    assert said[1:] == ["now: rank 0, micro-batch 0: first bad tensor: batch/real (loss nan, samples 0 to 7)"]
    tensors = load_file(folder / "rank0.safetensors")
    save_file({k: t.nan_to_num() for k, t in tensors.items()}, folder / "rank0.safetensors")
    assert status("--replay", f"{folder}") == 0
    assert "micro-batch 0: nothing bad (loss 0." in capsys.readouterr().out
    assert status("--replay", f"{tmp_path}") == 2
    assert "is no replay-STEP-PLAYER folder" in capsys.readouterr().err


# ---- a step that hangs ----


def stuck(seconds):
    time.sleep(seconds)


def test_a_hang_is_reported_with_its_stack(tmp_path, capsys):
    """Once, with rank and step, in the run's folder and on stderr; steps that come in time are not."""
    with Watchdog(0.4, tmp_path, 3, 7) as watch:
        for step in range(7, 12):
            watch(step)
            time.sleep(0.1)
        stuck(0.9)
        watch(12)
        time.sleep(0.2)
    said = (tmp_path / "hang-rank3.txt").read_text()
    assert said.startswith("rank 3: step 11 has taken more than 0.4 s (hang_seconds); the stacks of its threads:\n")
    assert "in stuck\n" in said and said.count("rank 3") == 1
    assert capsys.readouterr().err == said


def test_no_watchdog(tmp_path):
    with Watchdog(0, tmp_path, 0):
        stuck(0.1)
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    main(sys.argv[1])
