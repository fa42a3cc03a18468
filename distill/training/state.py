"""The state of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from distill.method import Logs
from distill.networks.ema import EMA
from distill.roles import Nets


@dataclass(eq=False)
class State:
    """The state of a run: everything in a checkpoint, and the logs of the last step (on the device)."""

    nets: Nets
    ema: EMA
    optimizers: dict[str, torch.optim.Optimizer]
    step: int = 0  # number of finished iterations
    skipped: dict[str, int] = field(default_factory=dict)  # by player: consecutive skipped updates up to now
    logs: Logs = field(default_factory=dict)
