"""A recipe's main: configuration -> teacher -> co-training -> a verified pipeline folder."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from distill import history, sharding
from distill.configuration import Config, dump, fail, parse
from distill.files import folder_lock, rank
from distill.method import Requirement
from distill.training import checkpoint, nonfinite, precision
from pipelines import fields
from pipelines.components import ExportError, Network, index, located
from pipelines.families.registry import families
from pipelines.inference import controlnet
from pipelines.judges import perceptual, reward
from pipelines.launch import silence_libraries, start_accelerator
from pipelines.teacher import Teacher, load_teacher

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from distill.roles import Nets
    from distill.training.config import StudentConfig
    from distill.training.state import State


EDM = (
    "\n  accelerate launch recipes/digits_teacher.py\ntrains a small one, of handwritten digits;"
    "\n  python -m pipelines.edm_convert FILE FOLDER\nmakes one of a checkpoint of EDM"
)


def main(default: Config[Any, Any], argv: list[str] | None = None, doc: str | None = None) -> None:
    """Parse the command line and run; every mistake of the user ends in one message before any work."""
    config = parse(default, argv, doc)
    out = Path(config.train.output_dir)
    try:
        with folder_lock(out) if config.replay is None else nullcontext():
            resume = check(config, out)
            config = smoke(config) if config.smoke else config
            run(config, out, resume)
    except (ValueError, FloatingPointError, ExportError) as error:
        fail(str(error))
    except (OSError, SafetensorError, MemoryError, RuntimeError) as error:
        if not (why := checkpoint.refused(error)):
            raise
        fail(f"{why}, then go on with --resume_from_checkpoint latest")
    except KeyboardInterrupt as error:
        sys.stderr.write("\ninterrupted: nothing of this step is saved\n")
        raise SystemExit(128 + (error.args or (signal.SIGINT,))[0]) from None


def smoke(config: Config[Any, Any]) -> Config[Any, Any]:
    """Two steps of the same experiment on a tiny random teacher of its family."""
    out = Path(config.train.output_dir)
    data = config.data.smoke(out / "data") if hasattr(config.data, "smoke") else config.data
    return dataclasses.replace(shorten_run(config), data=data, teacher=f"{out / 'teacher'}", resolution=None)


def shorten_run(config: Config[Any, Any]) -> Config[Any, Any]:
    """The same experiment for two steps of a small batch."""
    short: dict[str, Any] = {"max_train_steps": 2, "train_batch_size": 8, "logging_steps": 1, "validation_steps": 1}
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **short))


def check(config: Config[Any, Any], out: Path) -> Path | None:
    """What can be seen before anything heavy is imported; the checkpoint to resume from."""
    from pipelines.export.export import replaceable

    resume = config.train.resume_from_checkpoint
    if config.family not in families():
        raise ValueError(f"--family is {config.family!r}; it must be one of {sorted(families())}")
    if not re.fullmatch(r"([\w.-]{1,96}/)?[\w.-]{1,96}", config.hub_model_id or "name"):
        raise ValueError(f"--hub_model_id is {config.hub_model_id!r}; it must be user/name or name")
    if config.train.attention is not None:
        from diffusers.models.attention_dispatch import AttentionBackendName

        known = sorted({"xformers", *(backend.value for backend in AttentionBackendName)})
        if config.train.attention not in known:
            raise ValueError(f"attention is {config.train.attention!r}; it must be None or one of {known}")
    replaceable(out / "pipeline")
    if config.student.network is not None:
        fields.read(Path(config.student.network) / "config.json")
    experts = [("student", expert) for expert in config.student.experts]
    for role, init in (("student", config.student.init), ("fake", config.fake.init), *experts):
        if init is not None:
            checkpoint.files(init, role)
    if not config.smoke:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", config.teacher) or Path(config.teacher).exists():
            try:
                index(config.teacher)
            except ValueError as error:
                raise ValueError(f"{error}{EDM * (config.family == 'edm')}") from None
        config.data.validate(config.method.requirements)
        if Requirement.PERCEPTUAL_DISTANCE in config.method.requirements:
            perceptual.check()
    if config.replay is not None:
        nonfinite.read(Path(config.replay))
        return None
    if resume is None:
        if (out / "config.yaml").exists():
            raise ValueError(
                f"{out} already holds a run: pass --resume_from_checkpoint latest to go on with it, "
                "or choose another --output_dir"
            )
        return None
    if resume == "latest":
        found = checkpoint.found(out)
        if not found:
            sys.stderr.write(f"no checkpoint in {out}: starting afresh\n")
        newest = found[-1] if found else None
        if newest and checkpoint.step(newest) >= config.train.max_train_steps:
            sys.stderr.write(f"{newest} is at --max_train_steps already: nothing to train, it is exported\n")
        return check_resume(config, newest) if newest else None
    why = checkpoint.damage(Path(resume))
    if why:
        why = why if (Path(resume) / "state.json").is_file() else f"no checkpoint at {resume!r}"
        raise ValueError(f"{why}; {out} holds {[p.name for p in checkpoint.found(out)] or 'none'}")
    return check_resume(config, Path(resume))


def check_resume(config: Config[Any, Any], resume: Path) -> Path:
    """The checkpoint to resume from; ValueError if its run had another method, seed, batch or other calls."""
    before = history.last_entry(resume.absolute().parent)
    if before is None:
        if rank() == 0:
            sys.stderr.write(f"{resume}: there is no configuration beside it, so nothing is compared\n")
        return resume
    now = history.entry(shorten_run(config) if config.smoke else config)
    history.check_same_run(resume, before, now, config.method.requirements, config.train.resume_allow)
    return resume


def with_method_times(method: Any, teacher: Teacher, student: StudentConfig) -> StudentConfig:
    """The student with its method's own times, if the method has some and no flag gives others."""
    if student.times is not None:
        return student
    schedule = teacher.denoiser.schedule
    return dataclasses.replace(student, times=method.call_times(student.steps, student.first(schedule), schedule))


def carried(teacher: Teacher, student: StudentConfig) -> tuple[Any, StudentConfig]:
    """(scheduler, student): what the exported student will run under, and the student with the times it visits."""
    from pipelines.export.schedule import scheduler

    found, times = scheduler(teacher, student)
    return found, dataclasses.replace(student, times=times)


def run(config: Config[Any, Any], out: Path, resume: Path | None) -> None:
    """Train, with checkpoints, logs and sample grids on the way, and export the averaged student to `out`/pipeline."""
    import torch
    from accelerate.utils import set_seed

    from distill.networks.negative_attention import against
    from distill.random import Draw
    from distill.training.build import build
    from distill.training.log import Log
    from distill.training.loop import train
    from distill.training.prepare import supported
    from pipelines.export import hub
    from pipelines.export.export import Again, export, report, trained
    from pipelines.export.model_card import collect_card_info
    from pipelines.export.rehearsal import rehearse
    from pipelines.export.schedule import finished
    from pipelines.families import tiny
    from pipelines.identity import identity
    from pipelines.inference import pag

    allowed = config.train.resume_allow
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, resume_allow=()))
    cfg, entry = config.train, history.entry(config)
    if cfg.deterministic:
        precision.deterministic()
    accelerator = start_accelerator(log_with=None if cfg.report_to == "none" else cfg.report_to, project_dir=out)
    micro = cfg.micro_batch(accelerator.num_processes)
    supported(cfg, accelerator)
    silence_libraries()
    set_seed(cfg.seed)
    before = history.last_entry(resume.absolute().parent) if resume and accelerator.is_main_process else None
    repository = None
    if config.push_to_hub and accelerator.is_main_process:
        repository = hub.create(config.hub_model_id or out.resolve().name, config.hub_private)
    with accelerator.main_process_first():
        if config.smoke and accelerator.is_main_process:
            tiny.save(config.family, config.teacher)
        size, kind = (config.resolution, config.frames), network_dtype(config, accelerator)
        folder = located(config.teacher, config.revision, config.variant)
        if accelerator.is_main_process:
            entry["teacher"] = identity(folder, config.teacher, config.variant)
        if before and not config.smoke:  # whose teacher is made anew
            history.check_same_teacher(resume, before, entry["teacher"], allowed)
        guidance_embedded = Requirement.GUIDANCE_EMBEDDING in config.method.requirements
        teacher = load_teacher(f"{folder}", config.revision, config.variant, *size, kind, guidance_embedded)
    if Requirement.EXPORTED_TEACHER in config.method.requirements:
        config = dataclasses.replace(config, student=finished(teacher, config.student))
    if Requirement.CONTROL_PICTURE in config.method.requirements:
        controlnet.install(teacher)
    teacher.parts.device = accelerator.device
    sharded = sharding.asked(accelerator)
    if not sharded:
        teacher.denoiser.net.to(accelerator.device)
    data = config.data.open(teacher, config.method.requirements)
    planned = with_method_times(config.method, teacher, config.student)
    scheduler, student = carried(teacher, planned)  # refuse now if it cannot be exported
    entry["times"] = [*student.times]
    if before:
        history.check_same_times(resume, before, entry["times"], allowed)
    prompts, c = data.fixed(config.validation_images)
    c = {key: value.to(accelerator.device) for key, value in c.items()}
    method = type(config.method).__name__.lower()
    card = collect_card_info(
        out.resolve().name, teacher, config.teacher, method, dump(config), config.license, repository
    )
    example = {key: value[:1] for key, value in c.items()}
    nets = build(config.method, teacher.denoiser, teacher.shape, example, student, config.fake)
    if config.student.negative:  # grids are of what is made against the empty prompt
        c = against(c, teacher.null())
    judged(nets, config, teacher, data)
    pag.guide(nets, config.pag_scale, config.pag_layers)
    if accelerator.mixed_precision == "bf16":
        half(teacher.denoiser.net)  # what is trained are float32 copies, or adapters on it
    if config.replay is not None:
        raise SystemExit(replay(Path(config.replay), config, nets, data, accelerator))
    if accelerator.is_main_process:
        rehearse(nets.student, teacher, scheduler, card)
        if before and (changed := history.describe_changes(before, entry)):
            sys.stderr.write(
                f"{resume} is resumed with a changed configuration ({out / history.FILE} keeps both):\n{changed}"
            )
        out.mkdir(parents=True, exist_ok=True)
        history.record(out, entry, dump(config), checkpoint.step(resume) if resume else 0, resume)
    try:
        accelerator.init_trackers("distill", init_kwargs={"wandb": {"dir": f"{out}"}})
    except Exception as error:
        raise ValueError(
            f"report_to is {cfg.report_to!r}, which does not start ({error}): log in to it, set WANDB_MODE=offline, "
            "or pass --report_to none; log.jsonl has every line"
        ) from error
    begun = checkpoint.step(resume) if resume else 0
    log = Log(cfg, accelerator, begun)
    watchdog = nonfinite.Watchdog(cfg.hang_seconds, out, accelerator.process_index, begun)

    @torch.no_grad()
    def preview(state: State) -> None:
        done = []
        for i in torch.arange(len(prompts), device=accelerator.device).split(micro):
            fixed = Draw(cfg.seed, -1, "validation", i)
            z, rows = fixed.normal("z", (len(i), *teacher.shape)), {key: value[i] for key, value in c.items()}
            with accelerator.autocast():  # kernels of attention may know half precision alone
                if nets.control is not None:  # the picture of the sample before it
                    base = dataclasses.replace(nets.student, denoiser=nets.teacher)
                    rows["control"] = nets.control(base.generate(z, rows, fixed)).roll(1, 0)
                x = nets.student.using(state.ema.net).generate(z, rows, fixed)
            if accelerator.is_main_process:
                done += [teacher.decode(one).cpu() for one in x.split(1)]
        if done:
            log.images(torch.cat(done), state.step)

    saver, parent = checkpoint.Saver(out, cfg.checkpoints_total_limit), launcher()
    agree = nonfinite.Agreement(accelerator)
    with closing(log), signals() as caught, saver, watchdog as watch:
        for state in train(config.method, nets, data, cfg, accelerator, resume):
            watch(state.step)
            log(state)
            if not caught and launcher() != parent:  # it was killed alone, and nobody would end this process
                caught.append(signal.SIGTERM)
            stop = agree(caught[0] if caught else 0)
            if accelerator.is_main_process or sharded:
                saver.check()
                if cfg.validation_steps and state.step % cfg.validation_steps == 0:
                    preview(state)
                due = cfg.checkpointing_steps and state.step % cfg.checkpointing_steps == 0
                last = state.step >= cfg.max_train_steps
                if stop or due or last and (sharded or checkpoint.damage(out / f"checkpoint-{state.step}")):
                    saver.save(state)
            if stop:
                break
        saver.wait()
        if (stop or caught) and accelerator.is_main_process:
            name = out / f"checkpoint-{state.step}"
            sys.stderr.write(f"\ninterrupted; saved {name}. Go on with --resume_from_checkpoint latest\n")
            raise SystemExit(128 + (stop or caught[0]))
    if accelerator.is_main_process:
        state.optimizers.clear()
        folder, made, net = out / "pipeline", nets.student, state.ema.net
        if sharded:  # its parts are put together from the disk
            made, teacher, *_ = trained(Again(f"{out}", f"checkpoint-{state.step}", teacher=config.teacher))
            net = made.denoiser.net
        else:
            whole(nets, state, teacher)
        with folder_lock(folder, beside=True):
            report(folder, export(made, teacher, net, scheduler, folder, card), card)
        if repository:
            sys.stderr.write(f"pushed to {hub.push(folder, repository)}\n")


def judged(nets: Nets, config: Config[Any, Any], teacher: Teacher, data: Any) -> None:
    """Give the networks what judges or pictures their samples, where the method needs it."""
    if Requirement.PERCEPTUAL_DISTANCE in config.method.requirements:
        nets.perceptual = perceptual.asked(config, teacher)
    if Requirement.REWARD in config.method.requirements:
        nets.reward = reward.asked(config, teacher, data)
    if Requirement.CONTROL_PICTURE in config.method.requirements:
        nets.control = controlnet.asked(config, teacher)
        nets.teacher = teacher.denoiser = controlnet.bare(teacher.denoiser)  # the adapter is the student's alone


def replay(folder: Path, config: Config[Any, Any], nets: Nets, data: Any, accelerator: Accelerator) -> int:
    """Compute an update that was not finite again, say what it gave, and whether (1) or not (0) it still is not."""
    facts = nonfinite.read(folder)
    said = [f"then: {facts['message']}"]
    if accelerator.mixed_precision != facts["mixed_precision"]:
        now = f"--mixed_precision {accelerator.mixed_precision}"
        said.append(f"it ran under --mixed_precision {facts['mixed_precision']}; this is {now}")
    found = nonfinite.replay(folder, config.method, nets, data, config.train, accelerator)
    said += [f"now: rank {rank}, micro-batch {i}: {one}" for rank, ones in found.items() for i, one in enumerate(ones)]
    if accelerator.is_main_process:
        sys.stdout.write("\n".join([*said, ""]))
    return int(any(any(findings) for findings in found.values()))


def network_dtype(config: Config[Any, Any], accelerator: Accelerator) -> torch.dtype:
    """Of the teacher's network as it is read: half where nothing but adapters is trained on it."""
    import torch

    frozen = config.student.negative or config.student.lora.rank is not None
    if "fake" in config.method.roles:
        frozen = frozen and config.fake.lora.rank is not None
    half = accelerator.mixed_precision == "bf16" and frozen
    return torch.bfloat16 if half else torch.float32


def half(net: Network) -> None:
    """The network in bfloat16, but for what its class keeps in float32: the rotations of Wan's positions, say."""
    import torch

    kept = set(getattr(net, "_keep_in_fp32_modules", None) or ())
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if tensor.is_floating_point() and not kept & set(name.split(".")):
            tensor.data = tensor.data.to(torch.bfloat16)


def whole(nets: Nets, state: State, teacher: Teacher) -> None:
    """Off the device, and the backbone in its stored precision again: an export must not keep what training rounded."""
    import torch

    roles = (*nets.frozen().values(), state.ema.net, *nets.modules().values())
    for module in roles:
        module.to("cpu")
        precision.unset(module)
    net = teacher.denoiser.net
    if all(p.dtype == torch.float32 for p in net.parameters()):
        return
    fresh = teacher.parts.component(teacher.parts.network, torch.float32)
    buffers = dict(fresh.named_buffers())
    net.float().load_state_dict(fresh.state_dict())
    for module in roles:
        for name, buffer in module.named_buffers():
            if name in buffers:
                buffer.data = buffers[name]


def launcher() -> int | None:
    """The process of `accelerate launch` or torchrun above this one; None: a shell, which may end before its jobs."""
    return os.getppid() if os.environ.keys() & {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} else None


@contextmanager
def signals() -> Iterator[list[int]]:
    """A list that the first Ctrl-C, SIGTERM or SIGUSR1 fills, so that a run can end between two steps.

    The second one interrupts. The status of a process that ended so is 128 + the signal: 130, 143, 138.
    """
    caught: list[int] = []

    def handle(number: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt(number)
        caught.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
