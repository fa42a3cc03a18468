"""A recipe's main: configuration -> teacher -> co-training -> a verified pipeline folder."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from distill import checkpoint
from distill.config import Config, dump, fail, parse
from pipelines import ExportError, index, load, tiny


def main(default: Config[Any], argv: list[str] | None = None, doc: str | None = None) -> None:
    """Parse the command line and run; every mistake of the user ends in one message before any work."""
    config = parse(default, argv, doc)
    if config.smoke:
        config = smoke(config)
    out = Path(config.train.output_dir)
    try:
        resume = check(config, out)
        run(config, out, resume)
    except (ValueError, FloatingPointError, ExportError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted: nothing of this step is saved\n")
        raise SystemExit(130) from None


def smoke(config: Config[Any]) -> Config[Any]:
    """Two steps of the same experiment on a tiny random teacher."""
    short: dict[str, Any] = {"max_train_steps": 2, "train_batch_size": 8, "logging_steps": 1, "validation_steps": 1}
    train = dataclasses.replace(config.train, **short)
    return dataclasses.replace(config, train=train, teacher="")


def check(config: Config[Any], out: Path) -> Path | None:
    """What can be seen before anything heavy is imported; the checkpoint to resume from."""
    resume = config.train.resume_from_checkpoint
    if not config.smoke:
        index(config.teacher)
    if resume is None:
        if (out / "config.yaml").exists():
            raise ValueError(
                f"{out} already holds a run: pass --resume_from_checkpoint latest to go on with it, "
                "or choose another --output_dir"
            )
        return None
    found = checkpoint.found(out)
    if resume == "latest":
        if not found:
            sys.stderr.write(f"no checkpoint in {out}: starting afresh\n")
        return found[-1] if found else None
    if not (Path(resume) / "state.json").is_file():
        raise ValueError(f"no checkpoint at {resume!r}; {out} holds {[p.name for p in found] or 'none'}")
    return Path(resume)


def run(config: Config[Any], out: Path, resume: Path | None) -> None:
    """Train, with checkpoints, logs and sample grids on the way, and export the averaged student to `out`/pipeline."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from distill.draw import Draw
    from distill.log import Log
    from distill.roles import build
    from distill.trainer import State, train
    from pipelines.export import export, family

    cfg = config.train
    accelerator = Accelerator(log_with=None if cfg.report_to == "none" else cfg.report_to, project_dir=out)
    cfg.micro_batch(accelerator.num_processes)
    quiet()
    set_seed(cfg.seed)
    teacher = tiny() if config.smoke else load(config.teacher)
    student = config.student
    if student.times is None:
        student = dataclasses.replace(student, times=teacher.times(student.steps, student.sigma))
    example = teacher.encode([0])
    nets = build(config.method, teacher.denoiser, teacher.shape, example, student, config.fake)
    family(teacher).export(nets.student, teacher, teacher.denoiser.net)  # what can't be exported is refused now
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(dump(config))
    accelerator.init_trackers("distill", init_kwargs={"wandb": {"dir": f"{out}"}})
    labels = torch.arange(40, device=accelerator.device) % 10
    fixed = Draw(cfg.seed, -1, "validation", torch.arange(40, device=accelerator.device))
    log = Log(cfg, accelerator, checkpoint.step(resume) if resume else 0)

    @torch.no_grad()
    def preview(state: State) -> None:
        z = fixed.normal("z", (40, *teacher.shape))
        x = nets.student.using(state.ema.net).generate(z, teacher.encode(labels), fixed)
        log.images(teacher.decode(x), state.step)

    with closing(log), ctrl_c() as pressed:
        for state in train(config.method, nets, config.data, cfg, accelerator, resume):
            log(state)
            stop = bool(pressed)
            if accelerator.is_main_process:
                if cfg.validation_steps and state.step % cfg.validation_steps == 0:
                    preview(state)
                if stop or (cfg.checkpointing_steps and state.step % cfg.checkpointing_steps == 0):
                    folder = checkpoint.save(state, out, cfg.checkpoints_total_limit)
                if stop:
                    sys.stderr.write(f"\ninterrupted; saved {folder}. Go on with --resume_from_checkpoint latest\n")
            if stop:
                raise SystemExit(130)
    if accelerator.is_main_process:
        gap = export(nets.student, teacher, state.ema.net, out / "pipeline", dump(config))
        sys.stderr.write(f"exported {out / 'pipeline'}; reloaded by plain diffusers it differs by {gap:.1e}\n")


@contextmanager
def ctrl_c() -> Iterator[list[int]]:
    """A list that the first Ctrl-C fills, so that a run can end between two steps; the second one interrupts."""
    pressed: list[int] = []

    def handle(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def quiet() -> None:
    """Libraries' chatter at loading and saving is not about this run."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
