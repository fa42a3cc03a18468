"""The main function of a recipe: configuration -> teacher -> co-training -> a verified pipeline folder."""

from __future__ import annotations

import dataclasses
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from distill import history, sharding
from distill.configuration import Config, dump, fail, parse
from distill.files import folder_lock, rank
from distill.method import Method, Requirement
from distill.training import checkpoint, precision
from distill.training.memory import MicroBatchError
from distill.training.replay import read_facts, replay_update
from distill.training.watchdog import Agreement, Watchdog
from pipelines import fields
from pipelines.components import ExportError, Scheduler, locate_pipeline, read_index
from pipelines.families.registry import families
from pipelines.inference import controlnet
from pipelines.judges import perceptual, reward
from pipelines.launch import (
    catch_signals,
    choose_precision,
    device_memory,
    launcher_process,
    report_batch,
    silence_libraries,
    start_accelerator,
)
from pipelines.planning.nearest import nearest_name
from pipelines.teacher import Teacher, load

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor, nn

    from distill.random import Draw
    from distill.roles import Nets
    from distill.training.config import StudentConfig, TrainConfig
    from distill.training.log import Log
    from distill.training.state import State
    from pipelines.export.model_card import CardInfo

RunConfig = Config[Any, Any]  # with any method and data
Sampler = Callable[["Tensor", "dict[str, Tensor]", "Draw"], "Tensor"]  # samples of unit noise z under conditions c
TEACHER_STEPS = 25  # of the teacher's row in sample grids


PIXEL_HINT = (
    "\n  accelerate launch recipes/digits_teacher.py\ntrains a small one, of handwritten digits;"
    "\n  accelerate launch recipes/pixel_teacher.py --images FOLDER\none of your own images;"
    "\n  python -m pipelines.edm_convert FILE FOLDER\nmakes one of a checkpoint of EDM"
)


def main(default: RunConfig, argv: list[str] | None = None, doc: str | None = None) -> None:
    """Parse the command line and run. Every mistake of the user ends in one message before any work."""
    config = parse(default, argv, doc)
    out = Path(config.train.output_dir)
    try:
        with folder_lock(out) if config.replay is None else nullcontext():
            resume = validate_run(config, out)
            config = smoke_config(config) if config.smoke else config
            run(config, out, resume)
    except (ValueError, FloatingPointError, ExportError) as error:
        fail(str(error))
    except (OSError, SafetensorError, MemoryError, RuntimeError) as error:
        reason = checkpoint.describe_disk_error(error)
        if reason is None:
            raise
        fail(f"{reason}, then go on with --resume_from_checkpoint latest")
    except KeyboardInterrupt as error:
        sys.stderr.write("\ninterrupted: nothing of this step is saved\n")
        raise SystemExit(128 + (error.args or (signal.SIGINT,))[0]) from None


def smoke_config(config: RunConfig) -> RunConfig:
    """Two steps of the same experiment on a tiny random teacher of its family, as a configuration."""
    out = Path(config.train.output_dir)
    data = config.data.smoke(out / "data") if hasattr(config.data, "smoke") else config.data
    small = dataclasses.replace(shorten_run(config), validation_teacher_steps=2)
    return dataclasses.replace(small, data=data, teacher=f"{out / 'teacher'}", resolution=None)


def shorten_run(config: RunConfig) -> RunConfig:
    """The same experiment with two steps of a small batch, as a configuration."""
    short: dict[str, Any] = {"max_train_steps": 2, "train_batch_size": 8, "logging_steps": 1, "validation_steps": 1}
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **short))


def validate_run(config: RunConfig, out: Path) -> Path | None:
    """The checkpoint to resume from; None for a new run. ValueError for mistakes that are visible before loading."""
    from pipelines.export.folder import check_replaceable

    if config.family not in families():
        near = nearest_name(config.family, families())
        raise ValueError(f"--family is {config.family!r}{near}; it must be one of {sorted(families())}")
    if not re.fullmatch(r"([\w.-]{1,96}/)?[\w.-]{1,96}", config.hub_model_id or "name"):
        raise ValueError(f"--hub_model_id is {config.hub_model_id!r}; it must be user/name or name")
    if config.train.attention is not None:
        validate_attention(config.train.attention)
    check_replaceable(out / "pipeline")
    validate_weights(config)
    if not config.smoke:
        validate_teacher(config)
        config.data.validate(config.method.requirements)
        if Requirement.PERCEPTUAL_DISTANCE in config.method.requirements:
            perceptual.check_lpips()
    if config.replay is not None:
        read_facts(Path(config.replay))
        return None
    return find_checkpoint(config, out)


def validate_attention(name: str) -> None:
    """ValueError if diffusers has no attention backend of this name."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = sorted({"xformers", *(backend.value for backend in AttentionBackendName)})
    if name not in known:
        raise ValueError(f"attention is {name!r}; it must be None or one of {known}")


def validate_weights(config: RunConfig) -> None:
    """ValueError if a file of initial weights, or the config of the student's own network, is missing or damaged."""
    if config.student.network is not None:
        fields.read(Path(config.student.network) / "config.json")
    experts = [("student", expert) for expert in config.student.experts]
    for role, init in (("student", config.student.init), ("fake", config.fake.init), *experts):
        if init is not None:
            checkpoint.weight_files(init, role)


def validate_teacher(config: RunConfig) -> None:
    """ValueError if the teacher is neither a pipeline folder nor a name on the Hub."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", config.teacher) and not Path(config.teacher).exists():
        return
    try:
        read_index(config.teacher)
    except ValueError as error:
        hint = PIXEL_HINT if families()[config.family].labels else ""
        raise ValueError(f"{error}{hint}") from None


def find_checkpoint(config: RunConfig, out: Path) -> Path | None:
    """The checkpoint that --resume_from_checkpoint names; None for a new run. ValueError if it cannot be resumed."""
    resume = config.train.resume_from_checkpoint
    if resume is None:
        if (out / "config.yaml").exists():
            raise ValueError(
                f"{out} already holds a run: pass --resume_from_checkpoint latest to go on with it, "
                "or choose another --output_dir"
            )
        return None
    if resume != "latest":
        return check_resume(config, intact_checkpoint(Path(resume), out))
    checkpoints = checkpoint.list_intact_checkpoints(out)
    if not checkpoints:
        sys.stderr.write(f"no checkpoint in {out}: starting afresh\n")
        return None
    newest = checkpoints[-1]
    if checkpoint.read_step(newest) >= config.train.max_train_steps:
        sys.stderr.write(f"{newest} is at --max_train_steps already: nothing to train, it is exported\n")
    return check_resume(config, newest)


def intact_checkpoint(folder: Path, out: Path) -> Path:
    """`folder` if it is an intact checkpoint. Else a ValueError that lists those of the run in `out`."""
    problem = checkpoint.find_corruption(folder)
    if problem is None:
        return folder
    if not (folder / "state.json").is_file():
        problem = f"no checkpoint at {str(folder)!r}"
    raise ValueError(f"{problem}; {out} holds {[p.name for p in checkpoint.list_intact_checkpoints(out)] or 'none'}")


def check_resume(config: RunConfig, resume: Path) -> Path:
    """The checkpoint to resume from. ValueError if its run had another method, seed, batch or other call times."""
    before = history.last_entry(resume.absolute().parent)
    if before is None:
        if rank() == 0:
            sys.stderr.write(f"{resume}: there is no configuration beside it, so nothing is compared\n")
        return resume
    now = history.entry(shorten_run(config) if config.smoke else config)
    history.check_same_run(resume, before, now, config.method.requirements, config.train.resume_allow)
    return resume


def with_method_times(method: Method, teacher: Teacher, student: StudentConfig) -> StudentConfig:
    """The student with the times of its method, if the method has some and no flag gives others."""
    if student.times is not None:
        return student
    schedule = teacher.denoiser.schedule
    return dataclasses.replace(student, times=method.call_times(student.steps, student.first_time(schedule), schedule))


def resolve_student_schedule(teacher: Teacher, student: StudentConfig) -> tuple[Scheduler, StudentConfig]:
    """(scheduler, student): the scheduler of the exported student, and the student with the times of that scheduler."""
    from pipelines.export.schedule import find_student_scheduler

    found, times = find_student_scheduler(teacher, student)
    return found, dataclasses.replace(student, times=times)


@dataclasses.dataclass(eq=False)
class Resumption:
    """The history entry of this run, and the one of the run that it resumes.

    before: None for a new run, and on all processes but the main one, which alone compares.
    allowed: the differences that --resume_allow names.
    """

    entry: dict[str, Any]
    checkpoint: Path | None
    before: dict[str, Any] | None
    allowed: Sequence[str]

    def check_teacher(self) -> None:
        """ValueError if the teacher in `entry` differs from that of the resumed run."""
        if self.checkpoint is not None and self.before is not None:
            history.check_same_teacher(self.checkpoint, self.before, self.entry["teacher"], self.allowed)

    def check_times(self) -> None:
        """ValueError if the student's times in `entry` differ from those of the resumed run."""
        if self.checkpoint is not None and self.before is not None:
            history.check_same_times(self.checkpoint, self.before, self.entry["times"], self.allowed)

    @property
    def first_step(self) -> int:
        return checkpoint.read_step(self.checkpoint) if self.checkpoint is not None else 0

    def record(self, out: Path, config: RunConfig) -> None:
        """Write the history and config.yaml, and print the changes since the resumed run."""
        changes = history.describe_changes(self.before, self.entry) if self.before is not None else ""
        if changes:
            sys.stderr.write(
                f"{self.checkpoint} is resumed with a changed configuration "
                f"({out / history.FILE} keeps both):\n{changes}"
            )
        out.mkdir(parents=True, exist_ok=True)
        history.record(out, self.entry, dump(config), self.first_step, self.checkpoint)


@dataclasses.dataclass(eq=False)
class Run:
    """One process of a run, ready for its first step."""

    config: RunConfig
    out: Path
    resumption: Resumption
    accelerator: Accelerator
    precision_reason: str  # who or what chose the precision
    adaptive: bool  # halve the micro-batch if memory runs out in the first iteration
    teacher: Teacher
    nets: Nets
    data: Any
    scheduler: Scheduler  # scheduler of the exported student
    card: CardInfo
    prompts: Sequence[str] | Sequence[int]  # prompts of the sample grids
    c: dict[str, Tensor]  # condition of the prompts
    repository: str | None  # Hub repository to which the export is pushed; set on the main process only

    @property
    def sharded(self) -> bool:
        return sharding.is_fsdp_launch(self.accelerator)


def run(config: RunConfig, out: Path, resume: Path | None) -> None:
    """Train with checkpoints, logs and sample grids, then export the averaged student to `out`/pipeline."""
    from pipelines.export.rehearsal import rehearse

    prepared = prepare(config, out, resume)
    if prepared.config.replay is not None:
        raise SystemExit(replay(prepared))
    if prepared.accelerator.is_main_process:
        rehearse(prepared.nets.student, prepared.teacher, prepared.scheduler, prepared.card)
        prepared.resumption.record(out, prepared.config)
    report_batch(prepared.config.train, prepared.accelerator, prepared.precision_reason)
    start_trackers(prepared)
    try:
        state = train_and_save(prepared)
    except MicroBatchError as error:
        raise ValueError(f"{error}.\n{describe_fitting_launch(prepared)}") from None
    if prepared.accelerator.is_main_process:
        export_student(prepared, state)


def prepare(config: RunConfig, out: Path, resume: Path | None) -> Run:
    """Load and build everything for a run. ValueError for a run that cannot be trained or exported."""
    from distill.networks.negative_attention import with_negative_prompt
    from pipelines.export import hub
    from pipelines.export.schedule import student_config_of_export

    allowed = config.train.resume_allow
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, resume_allow=()))
    entry = history.entry(config)
    accelerator, reason = prepare_processes(config.train, out)
    config = fit_to_memory(config, accelerator, config.teacher)
    before = history.last_entry(resume.absolute().parent) if resume and accelerator.is_main_process else None
    resumption = Resumption(entry, resume, before, allowed)
    repository = None
    if config.push_to_hub and accelerator.is_main_process:
        repository = hub.create_repository(config.hub_model_id or out.resolve().name, config.hub_private)
    teacher = load_run_teacher(config, accelerator, resumption)
    config = fit_to_memory(config, accelerator, f"{teacher.parts.folder}")
    if Requirement.EXPORTED_TEACHER in config.method.requirements:
        config = dataclasses.replace(config, student=student_config_of_export(teacher, config.student))
    if Requirement.CONTROL_PICTURE in config.method.requirements:
        controlnet.install_adapter(teacher)
    teacher.parts.device = accelerator.device
    if not sharding.is_fsdp_launch(accelerator):
        teacher.denoiser.net.to(accelerator.device)
    data = config.data.open(teacher, config.method.requirements)
    planned = with_method_times(config.method, teacher, config.student)
    scheduler, student = resolve_student_schedule(teacher, planned)  # refuse now if it cannot be exported
    entry["times"] = [*(student.times or ())]
    resumption.check_times()
    prompts, c = data.fixed(config.validation_images)
    c = {key: value.to(accelerator.device) for key, value in c.items()}
    card = card_of_run(config, teacher, out.resolve().name, repository)
    nets = build_networks(config, teacher, student, c, data)
    if config.student.negative:  # grids show samples with the empty negative prompt
        c = with_negative_prompt(c, teacher.null())
    if accelerator.mixed_precision == "bf16":
        cast_to_bfloat16(teacher.denoiser.net)  # trainable weights are float32 copies, or adapters on it
    return Run(
        config=config,
        out=out,
        resumption=resumption,
        accelerator=accelerator,
        precision_reason=reason,
        adaptive=entry["config"]["gradient_accumulation_steps"] is None,
        teacher=teacher,
        nets=nets,
        data=data,
        scheduler=scheduler,
        card=card,
        prompts=prompts,
        c=c,
        repository=repository,
    )


def card_of_run(config: RunConfig, teacher: Teacher, name: str, repository: str | None) -> CardInfo:
    """The facts of the export's model card. ValueError if the licence does not allow the push to `repository`."""
    from pipelines.export.model_card import collect_card_info

    method = type(config.method).__name__.lower()
    public = repository is not None and not config.hub_private
    return collect_card_info(name, teacher, config.teacher, method, dump(config), config.license, repository, public)


def build_networks(
    config: RunConfig, teacher: Teacher, student: StudentConfig, c: dict[str, Tensor], data: Any
) -> Nets:
    """All roles with the judges that the method requires. c: the condition of the sample grids, as an example."""
    from distill.training.build import build
    from pipelines.inference import pag

    example = {key: value[:1] for key, value in c.items()}
    nets = build(config.method, teacher.denoiser, teacher.shape, example, student, config.fake)
    attach_judges(nets, config, teacher, data)
    pag.attach_pag(nets, config.pag_scale, config.pag_layers)
    return nets


def prepare_processes(cfg: TrainConfig, out: Path) -> tuple[Accelerator, str]:
    """Start the processes of a run and seed them: (accelerator, reason of its precision).

    ValueError for options of `cfg` that cannot run here.
    """
    from accelerate.utils import set_seed

    from distill.training.prepare import validate_launch

    if cfg.deterministic:
        precision.deterministic()
    tracker = None if cfg.report_to == "none" else cfg.report_to
    precision_name, reason = choose_precision(cfg.mixed_precision)
    accelerator = start_accelerator(log_with=tracker, project_dir=out, mixed_precision=precision_name)
    cfg.micro_batch(accelerator.num_processes)
    validate_launch(cfg, accelerator)
    silence_libraries()
    set_seed(cfg.seed)
    return accelerator, reason


def fit_to_memory(config: RunConfig, accelerator: Accelerator, teacher: str) -> RunConfig:
    """The configuration with as few micro-batches as the memory of a GPU allows, by the plan of the run.

    It stays as it is if --gradient_accumulation_steps is given, on other devices, and if the configs of `teacher` are
    not known before its download. ValueError with a launch line that fits if the state alone does not.
    """
    from accelerate.utils import broadcast_object_list

    from pipelines.planning.fit import choose_rounds

    memory = device_memory(accelerator.device)
    if memory is None or config.train.gradient_accumulation_steps is not None:
        return config
    answers: list[int | str | None] = [None]
    if accelerator.is_main_process:
        shards = sharding.count_shards(accelerator) if sharding.is_fsdp_launch(accelerator) else 1
        half = accelerator.mixed_precision == "bf16"
        answers = [choose_rounds(config, teacher, accelerator.num_processes, shards, half, memory)]
    broadcast_object_list(answers)
    if isinstance(answers[0], str):
        raise ValueError(answers[0])
    train = dataclasses.replace(config.train, gradient_accumulation_steps=answers[0])
    return dataclasses.replace(config, train=train)


def describe_fitting_launch(run: Run) -> str:
    """What to do if one sample in a micro-batch does not fit: a launch line of less memory than this run's plan."""
    from pipelines.planning.fit import advise

    accelerator = run.accelerator
    shards = sharding.count_shards(accelerator) if run.sharded else 1
    half = accelerator.mixed_precision == "bf16"
    return advise(run.config, f"{run.teacher.parts.folder}", accelerator.num_processes, shards, half)


def load_run_teacher(config: RunConfig, accelerator: Accelerator, resumption: Resumption) -> Teacher:
    """The teacher, downloaded by one process and compared with that of the resumed run."""
    from pipelines.families import tiny
    from pipelines.identity import identity

    with accelerator.main_process_first():
        if config.smoke and accelerator.is_main_process:
            tiny.save(config.family, config.teacher)
        dtype = teacher_dtype(config, accelerator)
        folder = locate_pipeline(config.teacher, config.revision, config.variant)
        if accelerator.is_main_process:
            resumption.entry["teacher"] = identity(folder, config.teacher, config.variant)
        if not config.smoke:  # a smoke run creates a new teacher
            resumption.check_teacher()
        guidance_embedded = Requirement.GUIDANCE_EMBEDDING in config.method.requirements
        return load(folder, config.resolution, config.frames, config.variant, dtype, guidance_embedded)


def start_trackers(run: Run) -> None:
    """Start the trackers of --report_to. If one fails, the ValueError says how to continue without it."""
    from distill.training import trackers

    try:
        resumed = run.resumption.checkpoint is not None
        trackers.start_trackers(run.config.train, run.accelerator, run.resumption.entry["config"], resumed)
    except Exception as error:
        raise ValueError(
            f"report_to is {run.config.train.report_to!r}, which does not start ({error}): log in to it, set "
            "WANDB_MODE=offline, or pass --report_to none; log.jsonl has every line"
        ) from error


def train_and_save(run: Run) -> State:
    """Train to the last step and return the last state. A signal stops the run with exit status 128 plus its number."""
    from distill.training.log import Log
    from distill.training.loop import train

    cfg = run.config.train
    accelerator = run.accelerator
    first_step = run.resumption.first_step
    log = Log(cfg, accelerator, first_step)
    watchdog = Watchdog(cfg.hang_seconds, run.out, accelerator.process_index, first_step)
    saver = checkpoint.Saver(run.out, cfg.checkpoints_total_limit)
    parent = launcher_process()
    agree = Agreement(accelerator)
    with closing(log), catch_signals() as caught, saver, watchdog as watch:
        log_references(run, log)
        states = train(
            run.config.method, run.nets, run.data, cfg, accelerator, run.resumption.checkpoint, adaptive=run.adaptive
        )
        for state in states:
            watch(state.step)
            log(state)
            if not caught and launcher_process() != parent:  # the launcher died; nothing else would end this process
                caught.append(signal.SIGTERM)
            stop = agree(caught[0] if caught else 0)
            if accelerator.is_main_process or run.sharded:
                save_and_preview(run, state, saver, log, bool(stop))
            if stop:
                break
        saver.wait()
        if (stop or caught) and accelerator.is_main_process:
            name = run.out / f"checkpoint-{state.step}"
            sys.stderr.write(f"\ninterrupted; saved {name}. Go on with --resume_from_checkpoint latest\n")
            raise SystemExit(128 + (stop or caught[0]))
    return state


def save_and_preview(run: Run, state: State, saver: checkpoint.Saver, log: Log, stop: bool) -> None:
    """Write the sample grid and the checkpoint of a step if they are due. stop: the run ends after this step."""
    cfg = run.config.train
    saver.raise_pending_error()
    if cfg.validation_steps and state.step % cfg.validation_steps == 0:
        preview(run, state, log)
    if stop or must_save(run, state.step):
        saver.save(state)


def must_save(run: Run, step: int) -> bool:
    """Whether a checkpoint is due: every --checkpointing_steps, and at the last step unless it exists already."""
    cfg = run.config.train
    if cfg.checkpointing_steps and step % cfg.checkpointing_steps == 0:
        return True
    if step < cfg.max_train_steps:
        return False
    return run.sharded or checkpoint.find_corruption(run.out / f"checkpoint-{step}") is not None


def preview(run: Run, state: State, log: Log) -> None:
    """Log a grid of the averaged student's samples, always from the same noise."""
    student = run.nets.student.with_network(state.ema.net)
    images = sample_prompts(run, student.generate)
    if images is not None:
        log.images(images, state.step, [*map(str, run.prompts)])


def log_references(run: Run, log: Log) -> None:
    """In a new run, add rows of the teacher and of the untrained student to all grids, and log the grid of step 0."""
    new = run.config.train.validation_steps and not run.resumption.first_step
    if not new or run.sharded or not run.accelerator.is_main_process:  # shards exist from the first iteration on
        return
    sample = teacher_sampler(run)
    rows = None if sample is None else sample_prompts(run, sample)
    if rows is not None:
        log.add_reference("teacher", rows)
    untrained = sample_prompts(run, run.nets.student.generate)
    if untrained is not None:
        log.images(untrained, 0, [*map(str, run.prompts)])
        log.add_reference("step 0", untrained)


def teacher_sampler(run: Run) -> Sampler | None:
    """The sampling of the teacher's row; None: no row, as for teachers that need a control image."""
    from distill.diffusion import solver
    from distill.diffusion.guidance import CFG
    from distill.networks.negative_attention import TEXT

    teacher = run.teacher
    requirements = run.config.method.requirements
    steps = run.config.validation_teacher_steps
    if steps is None:
        steps = 0 if len(teacher.shape) == 4 else TEACHER_STEPS  # videos take minutes
    if not steps or {Requirement.CONTROL_PICTURE, Requirement.NEGATIVE_ADAPTER} & {*requirements}:
        return None
    if Requirement.EXPORTED_TEACHER in requirements:
        return run.nets.reference_student.generate
    w = teacher_guidance(run.config.method)
    if TEXT[0] in run.c:
        return lambda z, c, draw: teacher.sample(z, c, steps, w)
    return lambda z, c, draw: solver.sample(CFG(teacher.denoiser, w), z, c, steps)  # a scheduler of students


def teacher_guidance(method: Method) -> float:
    """The guidance that a method gives its teacher; the mean of a range."""
    w = getattr(method, "guidance", None)
    if w is None:
        kappa = getattr(method, "kappa", 1.0)  # SiD's fourth
        w = kappa[3] if isinstance(kappa, tuple) else 1.0
    return sum(w) / len(w) if isinstance(w, tuple) else float(w)


def sample_prompts(run: Run, sample: Sampler) -> Tensor | None:
    """Decoded samples of the grids' prompts, on the CPU; None on all processes but the main one."""
    import torch

    from distill.random import Draw

    nets = run.nets
    accelerator = run.accelerator
    micro = run.config.train.micro_batch(accelerator.num_processes)
    images = []
    with torch.no_grad():
        for i in torch.arange(len(run.prompts), device=accelerator.device).split(micro):
            draw = Draw(run.config.train.seed, -1, "validation", i)
            z = draw.normal("z", (len(i), *run.teacher.shape))
            c = {key: value[i] for key, value in run.c.items()}
            with accelerator.autocast():  # attention kernels may support only half precision
                if nets.control is not None:  # the control image of the previous sample
                    base = dataclasses.replace(nets.student, denoiser=nets.teacher)
                    c["control"] = nets.control(base.generate(z, c, draw)).roll(1, 0)
                x = sample(z, c, draw)
            if accelerator.is_main_process:
                images += [run.teacher.decode(one).cpu() for one in x.split(1)]
    return torch.cat(images) if images else None


def export_student(run: Run, state: State) -> None:
    """Write the averaged student as a verified pipeline folder, and push it to the Hub with --push_to_hub."""
    from pipelines.export import hub
    from pipelines.export.export import ExportArguments, export, load_student_of_run, report_export

    state.optimizers.clear()
    folder = run.out / "pipeline"
    student = run.nets.student
    teacher = run.teacher
    net = state.ema.net
    if run.sharded:  # its shards are combined from the disk
        again = ExportArguments(f"{run.out}", f"checkpoint-{state.step}", teacher=run.config.teacher)
        student, teacher, *_ = load_student_of_run(again)
        net = student.denoiser.net
    else:
        restore_full_precision(run.nets, state, teacher)
    with folder_lock(folder, beside=True):
        report_export(folder, export(student, teacher, net, run.scheduler, folder, run.card), run.card)
    if run.repository:
        sys.stderr.write(f"pushed to {hub.push_folder(folder, run.repository)}\n")


def attach_judges(nets: Nets, config: RunConfig, teacher: Teacher, data: Any) -> None:
    """Attach perceptual distance, reward or control images to the networks, if the method requires them."""
    if Requirement.PERCEPTUAL_DISTANCE in config.method.requirements:
        nets.perceptual = perceptual.build_perceptual_distance(config, teacher)
    if Requirement.REWARD in config.method.requirements:
        nets.reward = reward.build_reward(config, teacher, data)
    if Requirement.CONTROL_PICTURE in config.method.requirements:
        nets.control = controlnet.build_control_extractor(config, teacher)
        nets.teacher = teacher.denoiser = controlnet.without_controlnet(
            teacher.denoiser
        )  # only the student has the adapter


def replay(run: Run) -> int:
    """Compute a non-finite update again and print the results. Returns 1 if it is still non-finite, else 0."""
    accelerator = run.accelerator
    assert run.config.replay is not None
    folder = Path(run.config.replay)
    facts = read_facts(folder)
    lines = [f"then: {facts['message']}"]
    if accelerator.mixed_precision != facts["mixed_precision"]:
        now = f"--mixed_precision {accelerator.mixed_precision}"
        lines.append(f"it ran under --mixed_precision {facts['mixed_precision']}; this is {now}")
    ranks = replay_update(folder, run.config.method, run.nets, run.data, run.config.train, accelerator)
    for process, micro_batches in ranks.items():
        lines += [f"now: rank {process}, micro-batch {i}: {found}" for i, found in enumerate(micro_batches)]
    if accelerator.is_main_process:
        sys.stdout.write("\n".join([*lines, ""]))
    return int(any(any(findings) for findings in ranks.values()))


def teacher_dtype(config: RunConfig, accelerator: Accelerator) -> torch.dtype:
    """Precision in which the teacher's network is loaded: half precision if only adapters are trained on it."""
    import torch

    frozen = config.student.negative or config.student.lora.rank is not None
    if "fake" in config.method.roles:
        frozen = frozen and config.fake.lora.rank is not None
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" and frozen else torch.float32


def cast_to_bfloat16(net: nn.Module) -> None:
    """Cast to bfloat16 except modules in `_keep_in_fp32_modules` (for example Wan's rotary embeddings)."""
    import torch

    kept = set(getattr(net, "_keep_in_fp32_modules", None) or ())
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if tensor.is_floating_point() and not kept & set(name.split(".")):
            tensor.data = tensor.data.to(torch.bfloat16)


def restore_full_precision(nets: Nets, state: State, teacher: Teacher) -> None:
    """Move all networks to the CPU and reload the backbone in its original precision, before the export."""
    import torch

    roles = (*nets.frozen().values(), state.ema.net, *nets.modules().values())
    for module in roles:
        module.to("cpu")
        precision.reset_attention(module)
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
