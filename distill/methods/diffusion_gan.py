"""The discriminator of DMD2: heads on features of the fake score or of the teacher at noised samples."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from distill.diffusion.denoiser import Condition, Denoiser
from distill.diffusion.times import Grid, TimeDistribution
from distill.losses import gan_discriminator
from distill.method import FeatureTaps, Method, Nets, Taps
from distill.networks.discriminator import accuracy, noised_features
from distill.random import Draw


@dataclass(frozen=True, kw_only=True)
class DiffusionGAN(Method):
    """Settings of a discriminator with heads on features of a denoiser at noised samples."""

    taps: Taps = None  # modules whose features the discriminator reads; None: the family's (UNet: bottleneck)
    gan_times: TimeDistribution = Grid(1000, 0, 999)  # noise level at which the discriminator reads
    gan_features: Literal["fake", "teacher"] = "fake"  # the network that gives the features
    gan_noise: Literal["own", "score"] = "own"  # noise of the discriminator's input: its own, or the score loss's
    share: bool = False  # read generated images in the pass of the fake score's loss: less work

    def __post_init__(self) -> None:
        if self.gan_features not in ("fake", "teacher") or self.gan_noise not in ("own", "score"):
            raise ValueError(
                f"gan_features is {self.gan_features!r}, gan_noise {self.gan_noise!r}; the first must be 'fake' or "
                "'teacher', the second 'own' or 'score'"
            )

    @property
    def feature_taps(self) -> dict[str, FeatureTaps]:
        return {"disc": FeatureTaps(self.taps)}

    @property
    def at_score_noise(self) -> bool:
        """Whether the discriminator uses the t and eps of the score losses."""
        return self.gan_noise == "score"

    @property
    def shared_taps(self) -> Taps:
        """The features that the fake score's own loss already computes."""
        return self.taps if self.gan_features == "fake" and (self.share or self.at_score_noise) else ()

    def logits(
        self, x: Tensor, c: Condition, nets: Nets, draw: Draw, *names: str, at: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """The heads' logits of samples x with their own noise (see `noised_features`), or at `at`: (x_t, t)."""
        net: Denoiser = getattr(nets, self.gan_features)
        if at is None:
            features = noised_features(net, self.taps, self.gan_times, x, c, draw, *names)
        else:
            features = net.features(*at, c, self.taps)
        return nets.discriminator(*features)


def discriminator_loss(fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """(loss of the heads on logits of samples and of real images, fraction of logits with the right sign)."""
    return gan_discriminator(fake, real), accuracy(fake, real)
