"""Low-rank adapters on a shared frozen backbone: three roles, one copy of the weights.

Each role has its own module tree. Its frozen parameters are the *same tensors*; its adapters belong to it alone. So a
role is chosen by the object that is called, never by a global switch. Gradient checkpointing recomputes the role that
ran.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn

from distill.modules import promote_trainable_to_float32, shallow_module_copy
from distill.ranges import Count, Positive, validate_ranges


@dataclass(frozen=True)
class LoRA:
    """Adapters of rank r and scale alpha / r on modules whose names end in one of `targets` (Hu et al. 2021)."""

    rank: Count | None = None  # rank of the adapters (SwiftBrush's fake score: 64); None: train a full copy
    alpha: Positive = 108.0  # the adapters' scale is alpha / rank (SwiftBrush's fake score: 108)
    targets: tuple[str, ...] = ("to_q", "to_v")  # name endings of the modules with adapters (as in SwiftBrush)

    def __call__(self, net: nn.Module) -> nn.Module:
        """A role that starts as the backbone `net`: a trainable copy, or trainable adapters on it that start at zero.

        A role with adapters shares the frozen weights of `net` in their precision. Trainable weights are float32.
        """
        validate_ranges(self, "lora.")
        if self.rank is None:
            return promote_trainable_to_float32(copy.deepcopy(net).requires_grad_(True))
        from peft import LoraConfig, inject_adapter_in_model

        if absent := [t for t in self.targets if not any(f".{n}".endswith(f".{t}") for n, _ in net.named_modules())]:
            layers = {n.rpartition(".")[2] for n, m in net.named_modules() if getattr(m, "weight", None) is not None}
            known = sorted(name for name in layers if not name.isdigit())
            raise ValueError(f"no module's name ends in the LoRA targets {absent}; the layers here end in {known}")
        net.requires_grad_(False)
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=list(self.targets), bias="none")
        return promote_trainable_to_float32(inject_adapter_in_model(config, shallow_module_copy(net)))


def merge_adapters(net: nn.Module) -> nn.Module:
    """`net` without adapters: a copy whose weights include them, with the module names of the backbone."""
    from peft.tuners.lora import LoraLayer

    if not any(isinstance(module, LoraLayer) for module in net.modules()):
        return net
    net = copy.deepcopy(net)
    for name, module in list(net.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, module.get_base_layer())
    return net
