"""f-distill: one-step diffusion models with f-divergence distribution matching. Xu et al. 2025, arXiv 2502.15681.

    D_f       = E_student f(r),   r = p_t(x_t) / q_t(x_t)        densities of real and of student's samples at level t
    h(r)      = r^2 f''(r) / f''(1)                              its gradient is -h (score_real - score_fake)
    r         = exp(l(x_t)) within [low, high]                   l: logit of DMD2's discriminator at the same x_t
    r        <- r / its mean over the samples in the same of `ratio_bins` bins of t        E_student r is 1 at every t
    g         = h(r) (fake - real) / mean| x - real |            per sample, without gradient; the rest is DMD2

    reverse-kl   f = -log r                                   h = 1             DMD2 itself
    forward-kl   f = r log r                                  h = r
    js           f = r log r - (1 + r) log( (1 + r) / 2 )     h = 2 r / (1 + r)
    softened-kl  f = (1 + r) log( (1 + r) / (2 r) )           h = 2 / (1 + r)
    hellinger    f = (1 - sqrt r)^2                           h = sqrt r
    jeffreys     f = (r - 1) log r                            h = (1 + r) / 2
    neyman       f = (1 - r)^2 / r                            h = 1 / r

An h that grows with r has large weight where the student has too few samples: it covers modes. f''(1) makes h 1 where
the student is the teacher. `unit_mean` also divides h by its mean over the batch (the authors' second normalisation).
Both means are over the micro-batches of all processes. A single sample in its bin has r = 1: with few samples per bin
this is DMD2. FastGen's ImageNet recipe also averages the bins over steps, which is left out. If every r is at a bound,
h carries no information: the logs have its range. The method adds no network call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distill.diffusion.guidance import CFG
from distill.diffusion.schedule import Schedule, expand
from distill.losses import sum_over_processes
from distill.method import Logs, Nets, Taps
from distill.methods.dmd2 import DMD2
from distill.ranges import Natural, Positive

H: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse-kl": torch.ones_like,
    "forward-kl": lambda r: r,
    "js": lambda r: 2 * r / (1 + r),
    "softened-kl": lambda r: 2 / (1 + r),
    "hellinger": torch.sqrt,
    "jeffreys": lambda r: (1 + r) / 2,
    "neyman": lambda r: 1 / r,
}


@dataclass(frozen=True)
class FDistill(DMD2):
    """DMD2 with another divergence: the density ratio of its discriminator weights the gradient."""

    divergence: Literal["reverse-kl", "forward-kl", "js", "softened-kl", "hellinger", "jeffreys", "neyman"] = "js"
    gan_fake: Positive = 1e-2  # lambda_d, weight of the heads' loss (DMD2); it trains the ratio, too
    low: Positive = 0.1  # lower bound of r (FastGen)
    high: Positive = 20.0  # upper bound of r (FastGen)
    ratio_bins: Natural = 10  # equal bins of native t in which the mean of r is set to 1 (FastGen); 0: r is unchanged
    unit_mean: bool = False  # divide h by its mean over the batch (FastGen); False: h(1) = 1

    communicates = True  # means over the samples of all processes

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence not in H:
            raise ValueError(f"divergence is {self.divergence!r}; it must be one of {', '.join(H)}")
        if not 0 < self.low <= self.high:
            raise ValueError(f"the ratio is kept from low = {self.low} to high = {self.high}; 0 < low <= high")
        if not self.gan_fake > 0:
            raise ValueError(f"gan_fake is {self.gan_fake}; the ratio is the discriminator's, which learns if above 0")

    def predict(self, x_t: Tensor, t: Tensor, c, nets: Nets) -> tuple[Tensor, Tensor, Tensor | float, Logs]:
        taps: dict[str, Taps] = {"fake": (), "teacher": ()} | {self.gan_features: self.taps}
        real, theirs = CFG(nets.teacher, self.guidance).predict_with_features(x_t, t, c, taps["teacher"])
        fake, own = nets.fake_score.predict_with_features(x_t, t, c, taps["fake"])
        logit = nets.discriminator(*own, *theirs).flatten(1).mean(1).double()  # mean over several heads
        r = logit.exp().clamp(self.low, self.high)
        h = H[self.divergence](r / self.mean_ratio(r, t, nets.teacher.path) if self.ratio_bins else r)
        if self.unit_mean:
            size, count = sum_over_processes(torch.stack([h.sum(), torch.ones_like(h).sum()]))
            h = h / (size / count + 1e-6)
        logs = {"ratio": r.mean(), "h": h.mean(), "h_low": h.min(), "h_high": h.max()}
        return real.x0, fake.x0, expand(h, x_t), logs

    def mean_ratio(self, r: Tensor, t: Tensor, path: Schedule) -> Tensor:
        """The mean of r in the bin of each sample [B]."""
        low, high = path.native(torch.arange(2.0, dtype=torch.float64, device=t.device))
        bins = ((path.native(t) - low) / (high - low) * self.ratio_bins).floor().clamp(0, self.ratio_bins - 1)
        member = (bins[:, None] == torch.arange(self.ratio_bins, device=t.device)).to(r)
        count, total = sum_over_processes(torch.stack([member.sum(0), r @ member]))
        return member @ (total / count.clamp(min=1)) + 1e-6
