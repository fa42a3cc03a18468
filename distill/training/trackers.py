"""The trackers of a run, TensorBoard and W&B. A resumed run goes on in the same run of W&B."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distill.files import write_atomically
from distill.history import flatten
from distill.training.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

ID = "wandb_id"  # file in the folder of a run


def start_trackers(cfg: TrainConfig, accelerator: Accelerator, config: Mapping[str, object], resumed: bool) -> None:
    """Start the trackers of cfg.report_to, and give them the configuration as flat values. Collective.

    resumed: the run continues one in the same folder.
    """
    out = Path(cfg.output_dir)
    options: dict[str, object] = {"dir": f"{out}", "name": cfg.tracker_run_name or out.resolve().name}
    if accelerator.is_main_process and cfg.report_to in ("wandb", "all"):
        options |= {"id": find_wandb_id(out, resumed), "resume": "allow"}
    values = {
        name: value if isinstance(value, int | float | str) else f"{value}" for name, value in flatten(config).items()
    }
    accelerator.init_trackers(cfg.tracker_project_name, values, {"wandb": options})


def find_wandb_id(out: Path, resumed: bool) -> str:
    """The id of the run in W&B: that of the resumed run, if it had one, else a new one, which the folder keeps."""
    file = out / ID
    if resumed and file.is_file():
        return file.read_text().strip()
    name = secrets.token_hex(4)
    write_atomically(file, name + "\n")
    return name
