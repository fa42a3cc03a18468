"""What the loop asks of bare networks to save memory or time, by the names that diffusers gave it.

A role is a module tree of its own (lora.py), and a recomputed block is a module of that tree: it recomputes its role.
"""

from __future__ import annotations

from typing import Any

from distill.roles import Nets


def recompute(nets: Nets) -> None:
    """Gradient checkpointing in the student, the fake score and the teacher (SiD differentiates through all three).

    ValueError for a network that has no enable_gradient_checkpointing(), as those of diffusers have.
    """
    players: dict[str, Any] = {"teacher": nets.teacher.net, **nets.modules()}
    for role in players.keys() & {"teacher", "student", "fake"}:
        net = players[role]
        if not hasattr(net, "enable_gradient_checkpointing"):
            raise ValueError(
                f"gradient_checkpointing: the {role}'s network, a {type(net).__name__}, has no method "
                "enable_gradient_checkpointing(); networks of diffusers do. Leave gradient_checkpointing off"
            )
        net.enable_gradient_checkpointing()
