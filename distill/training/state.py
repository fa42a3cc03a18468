"""The state of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from distill.method import Logs
from distill.networks.ema import EMA
from distill.roles import Nets


@dataclass(eq=False)
class State:
    """What a run is: everything that a checkpoint holds, and the logs of the last step (on the device)."""

    nets: Nets
    ema: EMA
    optimizers: dict[str, torch.optim.Optimizer]
    step: int = 0  # iterations done
    skipped: dict[str, int] = field(default_factory=dict)  # by player: updates left out since the last one that was not
    logs: Logs = field(default_factory=dict)
