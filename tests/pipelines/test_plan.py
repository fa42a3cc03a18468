"""The plan against real runs: bytes and FLOPs exactly, activations within a factor; what does not fit is refused."""

import dataclasses
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from distill.configuration import Config
from distill.data import Digits
from distill.methods import DMD2, LCD, RCM, SCM, VSD, RewardGuided, SiD
from distill.networks.lora import LoRA
from distill.random import Draw
from distill.training.build import build
from distill.training.config import FakeConfig, StudentConfig, TrainConfig
from distill.training.loop import train
from pipelines import load
from pipelines import run as run_module
from pipelines.families import edm, tiny
from pipelines.families.registry import families
from pipelines.planning import fit, flop_counter, micro_batch, variants
from pipelines.planning.command import Plan, main, resolve_config
from pipelines.planning.hours import PUBLISHED, find_published, gpu_hours
from pipelines.planning.memory_plan import Run, moments
from pipelines.planning.micro_batch import LinearMemory, choose_micro_batch, find_parts, measure_activations
from pipelines.planning.models import MODELS, Meta, find_model
from pipelines.planning.variants import list_variants
from recipes.values import list_recipes

ADAPTER = LoRA(4, 4.0, ("to_q", "to_v", "conv1"))
CASES = {  # method, student, fake, batch
    "dmd2": (DMD2(guidance=8.0, every=2), StudentConfig(steps=3), FakeConfig(), 1),
    "dmd2 shared": (DMD2(guidance=8.0, every=3, share=True, walk=True), StudentConfig(steps=2), FakeConfig(), 1),
    "dmd2-lora": (
        DMD2(guidance=8.0, every=2, gan=0, gan_fake=0),
        StudentConfig(steps=2, lora=ADAPTER),
        FakeConfig(ADAPTER),
        2,
    ),
    "lora student": (DMD2(guidance=1.0, every=1), StudentConfig(lora=ADAPTER), FakeConfig(), 1),
    "sid": (SiD(kappa=(1.5, 1.5, 1.5, 1.5)), StudentConfig(), FakeConfig(), 1),
    "lcd": (LCD(guidance=7.5), StudentConfig(), FakeConfig(), 2),
    "scm": (SCM(), StudentConfig(freeze=("time_embedding",)), FakeConfig(), 1),
}
DEEP = ("dmd2 shared", "dmd2", "dmd2-lora")  # the parts of their FLOPs are in those of the others
SIZES = {  # parameters of the denoising networks
    "sd15": 859_520_964,
    "sd21": 865_910_724,
    "sdxl": 2_567_463_684,
    "sd3": 2_028_328_000,
    "flux": 11_901_408_320,
    "qwen": 20_430_401_088,
    "sana": 1_604_462_752,
    "wan": 1_418_996_800,
    "wan22-5b": 4_999_787_712,
    "sd35-medium": 2_243_171_520,
    "imagenet64": 295_899_267,
    "cifar10": 55_735_171,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    tiny.save("sdxl", folder)
    return folder


def slow_where(slow, *values):
    return pytest.param(*values, marks=pytest.mark.slow if slow else ())


BYTES = [slow_where((i + half) % 2, case, half) for i, case in enumerate(CASES) for half in (False, True)]


def planned(folder, case, half=False, **options):
    method, student, fake, batch = CASES[case]
    settings = TrainConfig(train_batch_size=batch, **options)
    return Run(
        Config(method, Digits(), student=student, fake=fake, train=settings), Meta.from_folder(folder), half=half
    )


def real(folder, run, steps, k=None):
    """The same run with numbers: its state after `steps` steps, and the bytes of each player's gradients, FLOPs."""
    config, teacher, grads = run.config, load(folder), {}
    c = teacher.encode([0] if teacher.family.labels else ["a fox"])
    teacher.null()
    nets = build(config.method, teacher.denoiser, teacher.shape, c, config.student, config.fake)
    if run.half:
        teacher.denoiser.net.to(torch.bfloat16)
    many = {key: value.expand(run.micro, *value.shape[1:]) for key, value in c.items()}
    data = lambda draw: {"c": dict(many), "real": torch.randn(run.micro, *teacher.shape), "real_c": dict(many)}

    class Fixed(Draw):
        def index(self, name, n):
            return k

    def note(optimizer, *_):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads[id(optimizer)] = sum(p.grad.nbytes for p in params if p.grad is not None)

    hook = register_optimizer_step_pre_hook(note)
    settings = dataclasses.replace(config.train, max_train_steps=steps)
    loop = train(config.method, nets, data, settings, Accelerator(cpu=True), draw=Draw if k is None else Fixed)
    flops = FlopCounterMode(display=False, custom_mapping=flop_counter.FLOPS)
    with sdpa_kernel(SDPBackend.MATH), flops:
        *_, state = loop
    hook.remove()
    return state, grads, flops.get_total_flops()


@pytest.mark.parametrize("name", SIZES)
def test_configs_have_the_published_sizes(name):
    net = Meta(MODELS[name]).net
    assert {p.device.type for p in net.parameters()} == {"meta"}
    assert sum(p.numel() for p in net.parameters()) == SIZES[name]


@pytest.mark.parametrize("case, half", BYTES)
def test_bytes_are_those_of_a_real_run(folder, case, half):
    """Weights, average, gradients and optimizer state: every tensor of a run after one step, added up."""
    run = planned(folder, case, half)
    state, grads, _ = real(folder, run, 1)
    size = lambda tensors: sum({id(t): t.nbytes for t in tensors}.values())
    all_of = lambda net: [*net.parameters(), *net.buffers()]
    nets = state.nets
    weights = [t for net in (nets.teacher.net, *nets.modules().values()) for t in all_of(net)]
    found = run.state
    assert found.weights == size(weights)
    assert found.average == size(weights + all_of(state.ema.net)) - size(weights) > 0
    assert found.gradients == max(grads.values())
    moments = [t for o in state.optimizers.values() for s in o.state.values() for t in s.values()]
    assert found.optimizer == sum(t.nbytes for t in moments)


@pytest.mark.parametrize("case", [slow_where(case in DEEP, case) for case in CASES])
def test_flops_are_those_of_a_real_run(folder, case):
    """Counted over one cycle of the loop, averaged over the number of calls that a step draws."""
    run = planned(folder, case)
    _, c, nets = run.networks
    cost = flop_counter.cost(run.config.method, nets, c, run.micro, half=False, fused=False)
    found = [real(folder, run, cost.cycle, k)[2] for k in range(run.config.student.steps)]
    assert cost.flops * cost.cycle == pytest.approx(sum(found) / len(found), rel=1e-12)


SLOW = [slow_where(True, name, {}) for name in families() if name not in ("edm", "sdxl", "pixart")]


@pytest.mark.parametrize("family, depth", (("pixart", {"num_layers": 2}), *SLOW))
def test_every_family_is_counted(family, depth, tmp_path):
    """From configs alone, the FLOPs of a real step."""
    tiny.save(family, tmp_path, **depth)
    method = DMD2(guidance=1.0, gan=0, gan_fake=0)
    run = Run(Config(method, Digits(), train=TrainConfig(train_batch_size=1)), Meta.from_folder(tmp_path), half=False)
    _, c, nets = run.networks
    cost = flop_counter.cost(method, nets, c, half=False, fused=False)
    turn = cost.updates[0]
    assert turn.generation + turn.loss + cost.updates[1].loss == real(tmp_path, run, 1)[2]
    assert run.memory.total > run.memory.weights > 0 and Run(run.config, run.parts, half=True).memory.total > 0


def test_activations_are_near_those_of_a_real_run(folder):
    """What autograd keeps of the student's turn, with numbers, is the plan's peak within a quarter."""
    run = planned(folder, "dmd2")
    method, (_, c, nets) = run.config.method, run.networks
    cost = flop_counter.cost(method, nets, c, run.micro, half=False, fused=False)
    teacher = load(folder)
    c = teacher.encode(["a fox"])
    nets = build(method, teacher.denoiser, teacher.shape, c, run.config.student, run.config.fake)
    weights = {
        t.untyped_storage().data_ptr() for t in flop_counter.distinct(teacher.denoiser.net, *nets.modules().values())
    }
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    draw = Draw(0, 0, "student", torch.zeros(1))
    with sdpa_kernel(SDPBackend.MATH), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        x = nets.generate({"c": c}, draw, 1)
        loss, _ = method.student_loss(x, nets, {"c": c}, draw)
    size = sum(storage.nbytes() for storage in kept.values())
    assert loss.requires_grad and 0.8 < size / cost.updates[0].activations < 1.25


def test_recomputed_blocks_cost_time_and_save_memory(folder):
    plain, recomputed = (planned(folder, "dmd2", gradient_checkpointing=on).cost for on in (False, True))
    assert recomputed.activations < 0.9 * plain.activations
    assert 1.05 < recomputed.flops / plain.flops < 1.4


@pytest.mark.parametrize("groups, transposed", ((1, False), (8, False), (8, True)))
def test_gradients_of_a_convolution_cost_twice_its_pass(groups, transposed):
    """To input and weight, also of a depthwise one, where torch counts the weight's once for each channel."""
    kind = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    net, x = kind(8, 8, 3, 2, groups=groups, device="meta"), torch.empty(2, 8, 9, 9, device="meta", requires_grad=True)
    with flop_counter.Meter() as meter:
        y = net(x)
        forward = meter.flops
        y.sum().backward()
    pixels = 9 * 9 if transposed else 4 * 4
    assert forward == 2 * 2 * pixels * 9 * 8 * 8 // groups and meter.flops == 3 * forward


def test_a_run_is_counted_where_all_its_terms_are_there():
    """When every player has started, however long it waits; a reward or LPIPS that is not at hand costs nothing."""
    teacher = edm.teacher(edm.unet((8, 16)), 0.75, null_class=10)
    teacher.denoiser.net.to("meta")
    c = {name: value.to("meta") for name, value in teacher.encode([0]).items()}

    def count_of(method):
        nets = build(method, teacher.denoiser, teacher.shape, c)
        return flop_counter.cost(method, nets, c, half=False, fused=False).flops

    soon = RCM(guidance=1.0, warmup=0)
    assert count_of(replace(soon, warmup=1000)) == count_of(soon)
    vsd = VSD(guidance=1.0)
    assert count_of(RewardGuided(vsd)) == count_of(vsd)


def test_moments_of_eight_bits():
    """Two bytes a weight and two float32 scales a block of 256; small tensors stay as they are."""
    assert moments(1 << 20, "adamw8bit") == 2 * (1 << 20) + 2 * 4 * (1 << 12)
    assert moments(100, "adamw8bit") == 800
    assert moments(1 << 20, "adamw") == 8 * (1 << 20) + 4


def test_sharding_divides_the_state(folder):
    run = planned(folder, "dmd2", half=True)
    whole, parts = (
        run.state,
        dataclasses.replace(
            run, config=dataclasses.replace(run.config, train=TrainConfig(train_batch_size=4)), gpus=4, shards=4
        ).state,
    )
    for name in ("weights", "average", "gradients", "optimizer"):
        assert getattr(parts, name) == getattr(whole, name) // 4


TRAIN = "recipes/train.py"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Flags of a method on a teacher of the digits."""
    folder = tmp_path_factory.mktemp("edm")
    tiny.save("edm", folder)
    return ["--method", "dmd2", "--teacher", f"{folder}"]


def test_what_fits(digits, capsys):
    main([TRAIN, "--memory", "1", "--reserve", "0", "--", *digits, "--max_train_steps", "7"])
    out = capsys.readouterr().out
    assert "It fits" in out and "(estimated)" in out and "activations are an estimate" in out
    assert "7 steps of 64" in out and "RTX 4090" in out and "checkpoints" in out
    assert "cache of 500,000 images" in out  # its method needs real ones


def test_what_does_not_fit_names_what_does(digits, capsys):
    """Exit 1. The launch line with the least change fits the same GPU, and says so when it is planned."""
    fits = Run(*resolve_config(Plan(Path(TRAIN)), [*digits, "--gradient_accumulation_steps", "64"]))
    machine = [TRAIN, "--memory", str(0.95 * fits.memory.total / 2**30), "--reserve", "0", "--"]
    with pytest.raises(SystemExit) as end:
        main([*machine, *digits])
    out = capsys.readouterr().out
    assert end.value.code == 1 and "It does not fit" in out
    *_, line, hours = out.strip().splitlines()
    start, _, flags = line.strip().partition(f"--teacher {digits[-1]} ")
    assert start == "accelerate launch --config_file recipes/accelerate/gpu1.yaml -m recipes.train --method dmd2 "
    assert "--gradient_accumulation_steps" in flags and hours.strip().startswith("hours at 22% to 3% of the peak: ")
    main([*machine, *digits, *flags.split()])
    assert "It fits" in capsys.readouterr().out


def test_the_least_change_comes_first(folder):
    """What changes numbers by rounding alone, then 8-bit moments, the average, adapters; more GPUs are the last."""
    run = planned(folder, "dmd2")
    found = list(list_variants(run))
    assert [v.flags for v in found[:4]] == [
        (),
        ("--gradient_checkpointing",),
        ("--optimizer adamw8bit",),
        ("--optimizer adamw8bit", "--gradient_checkpointing"),
    ]
    lora = next(v for v in found if any("lora" in flag for flag in v.flags))
    targets = " ".join(run.parts.family.lora_targets)
    assert lora.flags == (f"--fake.lora.rank 64 --fake.lora.alpha 64 --fake.lora.targets {targets}",)
    assert lora.run.config.fake.lora.rank == 64 and lora.run.config.student.lora.rank is None
    many = list(list_variants(dataclasses.replace(run, config=with_batch(run.config, 64), gpus=4)))
    assert many[2].run.shards == 4 and not many[2].flags and many[-1].run.gpus == 64
    assert not any(v.run.shards > 1 and v.run.config.train.optimizer == "adamw8bit" for v in many)


def with_batch(config, batch):
    return replace(config, train=replace(config.train, train_batch_size=batch))


def test_the_micro_batch_is_the_largest_that_fits():
    """It divides a process's part of the global batch, which stays."""
    memory = LinearMemory(fixed=10.0, sample=2.0, limit=30.0)
    assert choose_micro_batch(128, 8, memory) == 8 and choose_micro_batch(48, 1, memory) == 8
    assert choose_micro_batch(7, 1, memory) == 7 and choose_micro_batch(11, 1, memory) == 1
    assert choose_micro_batch(4, 1, LinearMemory(29.0, 2.0, 30.0)) is None
    with pytest.raises(ValueError, match="128 is not divisible by 3 process"):
        choose_micro_batch(128, 3, memory)


@pytest.fixture
def small(digits):
    """A run on a teacher of digits, with a batch of six."""
    config, parts = resolve_config(Plan(Path(TRAIN)), [*digits, "--train_batch_size", "6", "--method.every", "1"])
    return Run(replace(config, teacher=digits[-1]), parts, half=False)


def test_activations_grow_by_the_sample(small):
    """Those of two and of three samples tell those of six."""
    memory = measure_activations(small)
    assert memory.total(6) == pytest.approx(small.cost.activations, rel=0.02)


def test_a_run_chooses_its_micro_batch(small, monkeypatch):
    """By the memory of its GPU. Where a state in float32 does not fit, the message names a launch line that does."""
    accelerator = Accelerator(cpu=True)
    config = small.config
    monkeypatch.setattr(fit, "RESERVE", 0)
    monkeypatch.setattr(fit, "MARGIN", 0)
    for module in (micro_batch, variants):
        monkeypatch.setattr(module, "measure_activations", lambda run: LinearMemory(0.0, 100.0))
    size = small.state.total

    def choose(bytes, config=config, teacher=config.teacher):
        monkeypatch.setattr(run_module, "device_memory", lambda device: bytes)
        return run_module.fit_to_memory(config, accelerator, teacher)

    for samples, micro in ((0.5, 1), (1.5, 1), (2.5, 2), (7.0, 6)):
        chosen = choose(size + samples * 100).train
        assert chosen.micro_batch(1) == micro and chosen.train_batch_size == 6
    with pytest.raises(ValueError, match=r"(?s)weights, gradients and optimizer take .*gpu1.yaml .*--gradient_acc"):
        choose(0.99 * size)
    given = replace(config, train=replace(config.train, gradient_accumulation_steps=2))
    assert choose(size, given) is given and choose(None) is config
    assert choose(size, teacher="somebody/unknown") == config


def test_nothing_fits(digits, capsys):
    with pytest.raises(SystemExit) as end:
        main([TRAIN, "--memory", "1e-6", "--reserve", "0", "--", *digits])
    assert end.value.code == 1 and "Nothing that this command tries does" in capsys.readouterr().out


def test_every_teacher_is_known():
    """All families by name, and the teacher of every recipe that names a published one."""
    for family in families():
        assert find_model(family, "family") in families()[family].models.values()
    for stem, config in list_recipes():
        if not config.teacher.startswith("runs/"):
            assert find_parts(config.teacher or stem.rpartition("_")[2]) is not None, stem


PAGE = Path(__file__).resolve().parents[2] / "docs" / "plan.md"


def test_the_table_of_published_runs():
    """`make tables` writes it. Hours of a plan lie between those at the highest and the lowest share."""
    rows = ["| run | GPUs | hours | steps | batch | FLOP | share of the peak |", "|---|---|---|---|---|---|---|"]
    for run in PUBLISHED:
        name = f"[{run.recipe}](../recipes/{run.recipe}.py)" + (f", {run.variant}" if run.variant else "")
        cells = [f"{run.gpus} {run.chip}", f"{run.hours:g}", f"{run.steps:,}", f"{run.batch:,}", f"{run.flops:.3g}"]
        rows.append(f"| {' | '.join([name, *cells, f'{run.peak_share:.1%}'])} |")
    sources = sorted({run.source for run in PUBLISHED})
    table = "\n".join([*rows, "", f"Sources: {', '.join(sources)}.", ""])
    head, mark, rest = PAGE.read_text().partition(
        "<!-- pipelines/planning/hours.py, by tests/pipelines/test_plan.py -->\n"
    )
    written, end, tail = rest.partition("<!-- end -->")
    if os.environ.get("DISTILL_WRITE"):
        PAGE.write_text(head + mark + table + end + tail)
    else:
        assert written == table, "make tables writes it"
    for run in PUBLISHED:
        hours = gpu_hours(run.flops, run.chip)
        assert hours.low <= run.gpu_hours * 1.001 and run.gpu_hours <= hours.high * 1.001
        assert gpu_hours(run.flops, run.chip, run.peak_share).low == pytest.approx(run.gpu_hours)
    assert [find_published("dmd2_sd15")[0].gpu_hours, find_published("sid_sd15")] == [1600, []]


@pytest.mark.slow
@pytest.mark.parametrize("published", PUBLISHED)
def test_flops_of_published_runs(published):
    """Those of the recipe with the flags of its authors' launch; steps and batch are the recipe's."""
    config, parts = resolve_config(Plan(Path(published.recipe)), published.flags.split())
    train = config.train
    assert (train.max_train_steps, train.train_batch_size) == (published.steps, published.batch)
    flops = micro_batch.with_batch(Run(config, parts), 1).cost.flops * published.batch * published.steps
    assert flops == pytest.approx(published.flops, rel=1e-4)


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "give either a recipe"),
        (["--family", "sdxk"], "no configs of the family 'sdxk'; sdxl, sd, sd3 are the nearest"),
        (["recipes/none.py"], "no recipe at 'recipes/none.py'"),
        (["benchmarks/digits.py"], "has no Config named CONFIG"),
        ([TRAIN, "--", "--method", "dmd3", "--teacher", "digits"], "there is no method 'dmd3'; dmd is the nearest"),
        (
            ["recipes/dmd2_sdxl.py", "--", "--teacher", "somebody/something"],
            "no configs of the teacher 'somebody/something'",
        ),
        (["--family", "sd15", "--gpus", "0"], "gpus is 0; it must be above 0"),
        (
            ["--family", "flux", "--method", "dmd2-prompts", "--preset", "24gb"],
            "22.2 GiB in bfloat16; it would need 4-bit",
        ),
        (["--family", "sd15", "--method", "sid", "--preset", "24gb"], "--preset 24gb is for LCM-LoRA and DMD2"),
    ],
)
def test_mistakes_end_in_one_message(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    (
        ("--student.steps 1000000000", "--student.steps is 1000000000; it must be at least 1 and at most 1000"),
        ("--method.every 1000000000", "a player moves every 1,000,000,000 steps only; counted are at most 500"),
        ("--student.network NARROW", "config.json: layers_per_block is 1000000000; it must be at most 1,000 layers"),
        ("--resolution 1000000000", "resolution is 1000000000; it must be at least 1 and at most 16384"),
    ),
)
def test_what_would_never_be_counted_is_refused(flags, message, tmp_path, capsys):
    """Numbers of calls, steps, layers and pixels: at once, and not after days."""
    tiny.save("sd", tmp_path / "sd")
    config = json.loads((tmp_path / "sd" / "unet" / "config.json").read_text()) | {"layers_per_block": 10**9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = flags.replace("NARROW", f"{tmp_path}").split()
    with pytest.raises(SystemExit) as end:
        main(["recipes/dmd2_sd15.py", "--", "--teacher", f"{tmp_path / 'sd'}", *flags])
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("method", ("lcd", "dmd2-prompts"))
def test_sdxl_on_24_gb(method, capsys):
    main(["--family", "sdxl", "--method", method, "--preset", "24gb"])
    assert "of 22 GiB (estimated)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("family", ("flux", "qwen"))
def test_large_models(family, capsys):
    """Full copies of twelve or twenty billion weights do not fit 80 GiB; adapters on one backbone do."""
    with pytest.raises(SystemExit):
        main(["--family", family, "--method", "dmd2-prompts", "--gpus", "8"])
    assert "--student.lora.rank 64" in capsys.readouterr().out.split("It does not fit")[1]


@pytest.mark.parametrize("name", [name for name in MODELS if not name.endswith(("imagenet64", "cifar10"))])
def test_blocks_that_are_sharded(name):
    """At its public size a family's blocks hold nearly all weights, and none of them more than a twelfth."""
    parts = Meta(MODELS[name])
    size = lambda net: sum(p.numel() for p in net.parameters())
    blocks = [m for m in parts.net.modules() if type(m).__name__ in parts.family.blocks]
    assert {type(m).__name__ for m in flop_counter.units(parts.net)} == {*parts.family.blocks}
    assert sum(map(size, blocks)) > 0.9 * size(parts.net) and max(map(size, blocks)) < size(parts.net) / 12
    assert all(parts.net.get_submodule(tap) for tap in parts.family.taps)
