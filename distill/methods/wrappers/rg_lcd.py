"""RG-LCD: reward guided latent consistency distillation. Li et al. 2024, arXiv 2403.11027.

    L_student = L_base + w_n mean_i d( R_L(x_i, c_i) )                        w_n and d as in RewardGuided, R_L for R
    L_proxy   = sum over pairs a, b of KL( P(a, b) || P_L(a, b) )             mean over samples; a, b of one condition
    P(a, b)   = sigmoid( (R(a, c) - R(b, c)) / tau ),   P_L the same of R_L   which of the two is preferred
    R_L(x, c) = mean over heads(features of the frozen teacher at alpha_u x + sigma_u eps, u, c)     the latent proxy

The proxy learns which decoded images R prefers, and the student uses only the proxy. No gradient flows through the
decoder or R, which may have none, so that the student cannot exploit R at high frequencies. Three images are compared:
the rewarded one, a sample of the student from other noise, and the real image if it has the same condition (paper: the
EMA target's prediction for the second). The paper's proxy is a CLIP of latents; the teacher's features know the prompt
and need no other network. It is updated after the student or with the base's fake score. L_proxy trains only the heads.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.diffusion.denoiser import Condition
from distill.diffusion.guidance import repeat_condition
from distill.diffusion.times import Fixed, TimeDistribution
from distill.losses import preference_kl
from distill.method import Batch, FeatureTaps, Logs, Loss, Method, Nets, Taps, Update
from distill.methods.lcd import LCD
from distill.methods.wrappers.reward import RewardGuided, judge
from distill.networks.discriminator import noised_features
from distill.random import Draw
from distill.ranges import Finite, Positive, Weight


@dataclass(frozen=True)
class RGLCD(RewardGuided):
    """A method with a reward through a proxy in latent space, which is trained together with the student."""

    base: Method = LCD()
    weight: Weight = 1.0  # w, weight of the reward (code)
    clamp: Finite | None = None  # None: -R_L
    tau: Positive = 0.01  # temperature of CLIP: rewards are cosines (code: its logit scale, 100)
    proxy_taps: Taps = None  # blocks of the teacher with a head each (ours)
    proxy_times: TimeDistribution = Fixed(0.02)  # distribution of u: almost no noise (ours)

    @property
    def roles(self) -> tuple[str, ...]:
        return (*self.base.roles, "proxy") if self.weight else self.base.roles

    @property
    def feature_taps(self) -> dict[str, FeatureTaps]:
        return self.base.feature_taps | {"proxy": FeatureTaps(self.proxy_taps)}

    def updates(self) -> list[Update]:
        updates = super().updates()
        if not self.weight or any(update.player == "fake" for update in updates):
            return updates
        own = lambda update: replace(update, player="fake", loss=self.proxy_loss, reuse=True)
        return [one for update in updates for one in (update, own(update))]

    def score(self, x: Tensor, c: Condition, nets: Nets, batch: Batch, draw: Draw) -> Tensor:
        batch["rewarded"] = comparison_samples(x.detach(), c, batch)  # for the proxy's update
        return self.proxy([x], c, nets, draw)[0]

    def fake_term(self, loss: Loss, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        total, logs = loss(x, nets, batch, draw)
        more, own = self.proxy_loss(x, nets, batch, draw) if self.weight else (0.0, {})
        return total + more, logs | own

    def proxy(self, xs: list[Tensor], c: Condition, nets: Nets, draw: Draw) -> list[Tensor]:  # R_L of each, [B]
        n = len(xs)
        taps = self.proxy_taps
        times = self.proxy_times
        features = noised_features(
            nets.teacher, taps, times, torch.cat(xs), repeat_condition(c, n), draw, *["proxy"] * n
        )
        return [*nets.reward_proxy(*features).flatten(1).mean(1).chunk(n)]

    def proxy_loss(self, x: Tensor, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        given = batch.get("rewarded") or comparison_samples(x, batch.get("c"), batch)
        c = given.get("c")
        with torch.no_grad():
            other = nets.generate({"c": c}, draw.independent_stream("proxy"))
            xs = [given["x"], other] + [given[key].to(other) for key in given if key == "real"]
            rewards = [judge(nets)(one, c) for one in xs]
        loss, right = preference_kl(rewards, self.proxy(xs, c, nets, draw), self.tau)
        return loss, {"proxy": loss.detach(), "proxy_right": right}


def comparison_samples(x: Tensor, c: Condition, batch: Batch) -> Batch:  # x, and real images where c is their condition
    real = batch.keys() & {"real"} if all((c or {}).get(k) is v for k, v in batch.get("real_c", {}).items()) else ()
    return {"x": x} | ({} if c is None else {"c": c}) | {key: batch[key] for key in real}
