"""Build the networks of all roles from their configurations: copies of the teacher, adapters on it, or stored
weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from distill.diffusion.denoiser import Condition, Denoiser
from distill.diffusion.end_time import add_end_time
from distill.diffusion.student import Student, grid_times
from distill.method import FeatureTaps, Method, Requirement
from distill.modules import copy_trainable, freeze_all_but, meta_copy
from distill.networks.adaptive_weight import LogVariance
from distill.networks.discriminator import build_heads
from distill.networks.negative_attention import build_adapter_role
from distill.ranges import validate_ranges
from distill.roles import HEAD_ROLES, CheckpointedDenoiser, Nets
from distill.training import checkpoint
from distill.training.config import FakeConfig, StudentConfig
from distill.training.requirements import check_requirements


def build(
    method: Method,
    teacher: Denoiser,
    shape: tuple[int, ...],
    c: Condition = None,
    student: StudentConfig | None = None,
    fake: FakeConfig | None = None,
) -> Nets:
    """All roles of `method`. Each starts as a copy of the teacher, as an adapter on it, or from weights on disk.

    shape: shape of one sample. c: an example condition of batch 1, to find the size of the discriminator's features.
    """
    student = student or StudentConfig()
    fake = fake or FakeConfig()
    for name, part in (("method", method), ("student", student), ("fake", fake)):
        validate_ranges(part, f"{name}.")
    check_requirements(method, teacher, c, student)
    nets = Nets(teacher, build_student(method, teacher, student), shape)
    if method.degradation_run is not None:
        folders = degradation_checkpoints(method.degradation_run)
        recorded = replace(teacher, net=fake.lora(teacher.net))
        nets.past = CheckpointedDenoiser(recorded, folders, teacher.net, checkpoint.load_initial_weights)
        nets.past(len(folders) - 1).net.requires_grad_(False)
        fake = replace(fake, init=fake.init or f"{folders[-1]}")
    if "fake" in method.roles:
        nets.fake = replace(teacher, net=fake.lora(teacher.net))
        if fake.init is not None:
            checkpoint.load_initial_weights(nets.fake.net, fake.init, "fake", teacher.net)
    if "target" in method.roles:
        nets.target = replace(
            nets.student.denoiser, net=copy_trainable(nets.student.denoiser.net).requires_grad_(False)
        )
    if "weight" in method.roles:
        nets.weight = LogVariance()
    for role in HEAD_ROLES:  # keep this order: the heads' initial weights are random
        if role in method.roles:
            setattr(nets, role, head_network(method.feature_taps[role], teacher, shape, c))
    method.on_build(nets)
    return nets


def build_student(method: Method, teacher: Denoiser, config: StudentConfig) -> Student:
    """The student with its weights, times and experts. ValueError for calls that the method does not train."""
    student = Student(
        replace(teacher, net=student_network(config, teacher.net)),
        config.times or grid_times(config.steps, config.first_time(teacher.schedule)),
        config.scale,
        config.renoise,
        config.phases,
        earlier_experts(config, teacher),
    )
    check_transition(method, student)
    freeze(student.denoiser.net, config.freeze)
    if Requirement.END_TIME in method.requirements:
        student.denoiser = add_end_time(student.denoiser)
        student.jumps = method.jumps
    if config.init is not None:
        checkpoint.load_initial_weights(student.denoiser.net, config.init, "student", teacher.net)
    return student


def check_transition(method: Method, student: Student) -> None:
    """ValueError if the student makes several calls with a transition that the method does not train."""
    noises = method.noises
    if noises is not None and len(student.times) > 1 and student.renoise not in noises:
        remedy = " or ".join(noises) if noises else "fresh --student.steps 1"
        raise ValueError(
            f"{type(method).__name__} does not train a student of {len(student.times)} calls with "
            f"{student.renoise!r} noise between them: pass --student.renoise {remedy}"
        )


def freeze(net: nn.Module, modules: tuple[str, ...]) -> None:
    """Freeze the named submodules. ValueError for an unknown name."""
    for name in modules:
        try:
            net.get_submodule(name).requires_grad_(False)
        except AttributeError as error:
            top = [child for child, _ in net.named_children()]
            raise ValueError(f"no module {name!r} to freeze ({error}); at the top there are {top}") from None


def head_network(taps: FeatureTaps, teacher: Denoiser, shape: tuple[int, ...], c: Condition) -> nn.Module:
    """The heads of a role, in the sizes of the teacher's features."""
    with torch.device("meta"), torch.no_grad():  # only shapes are needed; the network may not fit the device yet
        x = torch.zeros(1, *shape)
        t = torch.full((1,), 0.5, dtype=torch.float64)
        example = None if c is None else {key: torch.empty_like(value, device="meta") for key, value in c.items()}
        features = replace(teacher, net=meta_copy(teacher.net)).features(x, t, example, taps.modules)
    return build_heads(features, taps.places, taps.pixels)


def degradation_checkpoints(run: Path) -> tuple[Path, ...]:
    """The intact checkpoints of a run of Degradation, oldest first. ValueError if there is none."""
    folders = checkpoint.list_intact_checkpoints(run)
    if not folders:
        raise ValueError(f"--method.record is {str(run)!r}, which holds no checkpoint of a Degradation")
    return tuple(folders)


def student_network(config: StudentConfig, backbone: nn.Module) -> nn.Module:
    """The student's network: a copy of the backbone, an adapter on it, or another network of its class with random
    weights.

    If the backbone has a child `control` (a ControlNet adapter, pipelines/inference/controlnet.py), only that child
    trains.
    """
    if hasattr(backbone, "control"):
        return freeze_all_but(backbone, "control")
    if config.network is None:
        return build_adapter_role(backbone, config.negative) if config.negative else config.lora(backbone)
    file = Path(config.network) / "config.json"
    if not file.is_file():
        raise ValueError(f"student.network is {config.network!r}; it must be a folder that holds a config.json")
    made = type(backbone).from_config(json.loads(file.read_text()))  # type: ignore[attr-defined]
    return made.float().requires_grad_(True).eval()


def earlier_experts(config: StudentConfig, teacher: Denoiser) -> tuple[Denoiser, ...]:
    """The frozen experts of the earlier phases, from their weights: copies of the teacher, or adapters on it."""
    nets = [student_network(config, teacher.net) for _ in config.experts]
    for net, path in zip(nets, config.experts, strict=True):
        checkpoint.load_initial_weights(net, path, "student", teacher.net)
    return tuple(replace(teacher, net=net.requires_grad_(False).eval()) for net in nets)
