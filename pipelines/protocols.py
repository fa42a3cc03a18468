"""What this project uses of the objects of diffusers, most of whose attributes carry no types."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, KeysView
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn


class Config(Protocol):
    """The config of a component. Each field is a key and an attribute, and has its own type."""

    def __getattr__(self, field: str) -> Any: ...

    def __getitem__(self, field: str) -> Any: ...

    def get(self, field: str, default: object = None) -> Any: ...

    def keys(self) -> KeysView[str]: ...

    def items(self) -> ItemsView[str, Any]: ...


class Network(nn.Module):
    """A UNet or a transformer of diffusers: a module with a config."""

    config: Config
    dtype: torch.dtype
    device: torch.device
    peft_config: dict[str, Any]  # of a network with adapters
    from_pretrained: ClassVar[Callable[..., Any]]
    save_pretrained: Callable[..., None]
    register_to_config: Callable[..., None]
    enable_gradient_checkpointing: Callable[..., None]
    disable_gradient_checkpointing: Callable[[], None]


class Scheduler(Protocol):
    """A scheduler. Its timesteps and, where it has them, its levels are in the order of the calls."""

    config: Config
    timesteps: Tensor
    sigmas: Tensor
    alphas_cumprod: Tensor
    init_noise_sigma: Tensor | float

    def set_timesteps(self, num_inference_steps: int | None = None, **options: object) -> None: ...

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor: ...

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool) -> tuple[Tensor, ...]: ...

    def save_pretrained(self, folder: str | Path) -> None: ...

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Scheduler: ...

    @classmethod
    def from_config(cls, config: Config, **changes: object) -> Scheduler: ...


class Pipeline(Protocol):
    """A pipeline. Its components are attributes; its call returns an object with `images` or `frames`."""

    encode_prompt: Callable[..., Any]
    scheduler: Scheduler
    vae_scale_factor: int

    def __getattr__(self, component: str) -> Any: ...

    def __setattr__(self, component: str, value: object) -> None: ...

    def __call__(self, *args: object, **options: object) -> Any: ...

    def to(self, device: torch.device) -> Pipeline: ...

    def save_pretrained(self, folder: str | Path, **options: object) -> None: ...


def config_of(net: nn.Module) -> Config:
    """The config of a network of diffusers."""
    return cast(Config, net.config)
