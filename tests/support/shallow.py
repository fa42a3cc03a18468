"""Teachers of a few blocks: a tiny transformer is as deep as its published tap, which most tests do not need."""

from torch import nn


def shorten(teacher, first=1):
    """Keep the first ones and the last block of each list of the teacher's network."""
    net = teacher.denoiser.net
    for name, blocks in net.named_children():
        if isinstance(blocks, nn.ModuleList) and name.endswith("blocks") and len(blocks) > first and not is_unet(net):
            setattr(net, name, nn.ModuleList([*blocks[:first], blocks[-1]]))
    return teacher


def is_unet(net):
    """Whether the levels of the network have connections across: each of them counts."""
    return hasattr(net, "mid_block")


def taps_of(teacher):
    """The published tap of the family, on its first block where it lies deeper than the shortened network."""
    taps = teacher.family.taps
    return taps if is_unet(teacher.denoiser.net) else tuple(f"{tap.rpartition('.')[0]}.0" for tap in taps)
