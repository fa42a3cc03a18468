"""The small networks of the stored cases: ours, smooth (tangents exist everywhere), any precision."""

import torch
from torch import nn


class Mini(nn.Module):
    """F(x [B, C, H, W], t [B], c [B, cdim], g [B, gdim], r [B]) -> [B, C, H, W]. t and r are divided by `scale` first.

    g: a guidance embedding (gdim > 0). r: a second time (second=True).
    """

    def __init__(self, ch=4, width=32, cdim=8, gdim=0, scale=1.0, second=False):
        super().__init__()
        self.scale, self.second = scale, second
        self.inp, self.mid, self.out = (
            nn.Conv2d(ch, width, 3, 1, 1),
            nn.Conv2d(width, width, 3, 1, 1),
            nn.Conv2d(width, ch, 3, 1, 1),
        )
        self.down = nn.Conv2d(width, width, 3, 2, 1)
        self.time, self.text = nn.Linear(16, width), nn.Linear(cdim, width)
        self.told = nn.Linear(gdim, width) if gdim else None
        self.end = nn.Linear(16, width) if second else None

    def waves(self, t):
        f = torch.logspace(0, 1, 8, dtype=t.dtype, device=t.device)
        p = (t / self.scale)[:, None] * f
        return torch.cat([p.sin(), p.cos()], 1)

    def forward(self, x, t, c=None, g=None, r=None, taps=False):
        w = self.inp.weight.dtype
        e = self.time(self.waves(t.to(w)))
        if c is not None:
            e = e + self.text(c.to(w))
        if g is not None and self.told is not None:
            e = e + self.told(g.to(w))
        if r is not None and self.end is not None:
            e = e + self.end(self.waves(r.to(w)))
        h = torch.tanh(self.inp(x) + e[:, :, None, None])
        d = self.down(h)
        m = h + torch.nn.functional.silu(self.mid(h) + e[:, :, None, None])
        if taps:
            return [h, d]
        m = m + nn.functional.interpolate(d, scale_factor=2, mode="nearest")
        return self.out(m)


def mini(seed, gain=1.0, dtype=torch.float32, **kw):
    torch.manual_seed(seed)
    net = Mini(**kw).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(gain)
    return net
