"""The schedulers of diffusers that a teacher may have, and a student's scheduler with the teacher's betas.

    read as a table (SD, SDXL, PixArt)        TABLES, with prediction_type epsilon, v_prediction or sample
    read as a flow (SD3, FLUX, SANA, ...)     FLOWS; a solver of both kinds by its use_flow_sigmas
    read as EDM (ConsistencyModelPipeline)    CMStochasticIterativeScheduler
    refused                                   every other class: EDM's on an SDXL folder, inverse ones, other families'

A student's scheduler repeats the formula of the teacher's betas, with rescale_betas_zero_snr if the teacher has it. A
table without a formula, or one that is cut before its end, is written out as trained_betas. Spacing, thresholding and
clipping of the teacher's own scheduler matter only to `Teacher.sample`, not to the student.
"""

from __future__ import annotations

import torch

from distill.diffusion.schedule import VP, Kind
from pipelines.protocols import Scheduler

KINDS: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # prediction_type -> kind
SOLVERS = (  # schedulers that sample from a table, or from a flow if use_flow_sigmas is true
    *("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    *("SASolverScheduler", "UniPCMultistepScheduler"),
)
TABLES = (
    *("DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DPMSolverSDEScheduler"),
    *("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler"),
    *("PNDMScheduler", "TCDScheduler"),
    *SOLVERS,
)
FLOWS = (
    *("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", "SCMScheduler"),
    *SOLVERS,
)
EDM = ("CMStochasticIterativeScheduler",)
TERMINAL = 2.0**-24  # alpha_bar of a zero terminal SNR, as in EulerDiscreteScheduler: its sigma stays finite
FORMULAS = ("linear", "scaled_linear")  # beta_schedules whose first n betas follow the same formula


def table(scheduler: Scheduler) -> tuple[VP, Kind]:
    """The noise table and the prediction kind of a teacher's scheduler. A ValueError names the class and the key."""
    check_class(scheduler, TABLES, "a table of betas")
    name = type(scheduler).__name__
    config = scheduler.config
    if config.get("use_flow_sigmas"):
        raise ValueError(f"the teacher's {name} has use_flow_sigmas true, but its pipeline's network predicts no flow")
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(
            f"the teacher's {name} has timestep_type {config.timestep_type!r}: its network's input is a noise level, "
            "not an index of a table; only 'discrete' can be distilled"
        )
    kind = KINDS.get(config.get("prediction_type", "epsilon"))
    if kind is None:
        raise ValueError(
            f"the teacher's {name} has prediction_type {config.prediction_type!r}; it must be one of {sorted(KINDS)}"
        )
    levels = scheduler.alphas_cumprod.double()
    if zero_terminal(scheduler):
        if kind == "eps":
            raise ValueError(
                f"the teacher's {name} has rescale_betas_zero_snr true with prediction_type 'epsilon': the noise of "
                "its last step says nothing of the sample; it must be v_prediction or sample"
            )
        levels = torch.cat([levels[:-1], levels.new_tensor([TERMINAL])])
    try:
        return VP(tuple(levels.tolist())), kind
    except ValueError as error:
        raise ValueError(
            f"the teacher's {name} has no usable table of noise (beta_start, beta_end, beta_schedule, trained_betas, "
            f"num_train_timesteps, rescale_betas_zero_snr): {error}"
        ) from None


def zero_terminal(scheduler: Scheduler) -> bool:
    """Whether the last level of a scheduler's table is pure noise."""
    levels = getattr(scheduler, "alphas_cumprod", None)
    return levels is not None and (bool(scheduler.config.get("rescale_betas_zero_snr")) or float(levels[-1]) == 0)


def flow(scheduler: Scheduler) -> float:
    """num_train_timesteps of a teacher's flow scheduler. A ValueError names the class and the key."""
    check_class(scheduler, FLOWS, "a flow")
    name = type(scheduler).__name__
    config = scheduler.config
    if name in SOLVERS and not config.get("use_flow_sigmas"):
        raise ValueError(f"the teacher's {name} has use_flow_sigmas false, but its pipeline's network predicts a flow")
    if config.get("invert_sigmas"):
        raise ValueError(f"the teacher's {name} has invert_sigmas true: its time runs from data to noise; set it false")
    return float(config.num_train_timesteps)


def check_class(scheduler: Scheduler, classes: tuple[str, ...], what: str) -> None:
    """ValueError unless the scheduler's class is one of `classes`; `what` describes them in the message."""
    name = type(scheduler).__name__
    if name not in classes:
        raise ValueError(
            f"the teacher's scheduler is {name} (_class_name in scheduler/scheduler_config.json), and its pipeline is "
            f"distilled under a scheduler of {what}: {', '.join(sorted(classes))}"
        )


def betas(scheduler: Scheduler, schedule: VP, n: int) -> dict[str, object]:
    """The config keys with which a student's scheduler has the first n + 1 levels of the teacher's table."""
    config = scheduler.config
    last = len(schedule.alphas_cumprod) - 1
    formula = config.get("beta_schedule", "linear")
    plain = config.get("trained_betas") is None
    if plain and n == last and zero_terminal(scheduler) and config.get("rescale_betas_zero_snr"):
        ends = {"beta_start": config.beta_start, "beta_end": config.beta_end}
        return ends | {"beta_schedule": formula, "rescale_betas_zero_snr": True}
    if plain and not zero_terminal(scheduler) and formula in FORMULAS:
        power = 1.0 if formula == "linear" else 0.5
        low = config.beta_start**power
        high = config.beta_end**power
        end = (low + (high - low) * n / last) ** (1 / power)
        return {"beta_start": config.beta_start, "beta_end": end, "beta_schedule": formula}
    levels = torch.tensor([1.0, *schedule.alphas_cumprod[: n + 1]], dtype=torch.float64)
    return {"trained_betas": (1 - levels[1:] / levels[:-1]).tolist()}
