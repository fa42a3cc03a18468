"""Public architectures as configs, which `plan` and the benchmarks build without weights and network access.

The configs are in the families' files. Tests compare their numbers of parameters with the published sizes.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipelines import fields
from pipelines.components import Network, Parts, Scheduler, read_index
from pipelines.families.base import Family, Model
from pipelines.families.registry import families, find_family_of
from pipelines.planning.nearest import nearest_name

if TYPE_CHECKING:
    import torch

MODELS = {name: model for family in families().values() for name, model in family.models.items()}


def find_model(name: str, kind: str) -> Model:
    """The model of a name, a family (its first) or a Hub repository. kind: what a message calls the name."""
    by_hub = {model.hub: model for model in MODELS.values()}
    by_family = {family.name: next(iter(family.models.values())) for family in families().values() if family.models}
    known = {**by_family, **MODELS, **by_hub}
    if name in known:
        return known[name]
    raise ValueError(
        f"no configs of the {kind} {name!r}{nearest_name(name, known)}. Give the folder of a pipeline, or one of "
        f"{', '.join(MODELS)}, or its Hub name"
    )


class Meta(Parts):
    """A pipeline without files. Its network is built from its config, on the meta device without values.

    On another device its weights are random. It has no text encoder and no autoencoder: loading one is an error.
    """

    def __init__(self, model: Model, folder: Path | None = None, device: str = "meta") -> None:
        component = "unet" if model.network.startswith("UNet") else "transformer"
        self.model = model
        self.folder = folder or Path(model.hub)
        self.place = device
        self.index = {"_class_name": model.pipeline, component: ["diffusers", model.network]}
        self.given = {}

    @classmethod
    def from_folder(cls, folder: Path) -> Meta:
        """The pipeline of a local folder. Its configs are read, its weights are not."""
        names = read_index(folder)
        find_family_of(names, folder)
        read = lambda part: _plain(fields.read(folder / part))
        component = "unet" if "unet" in names else "transformer"
        vae = read("vae/config.json") if "vae" in names else {}
        scheduler = read("scheduler/scheduler_config.json")
        config = read(f"{component}/config.json")
        model = Model(
            str(folder), names["_class_name"], names[component][1], config, (names["scheduler"][1], scheduler), vae
        )
        found = cls(model, folder)
        found.index = names
        return found

    @cached_property
    def net(self) -> Network:
        import diffusers
        import torch

        from pipelines import edm_nets

        library = edm_nets if hasattr(edm_nets, self.model.network) else diffusers
        try:
            with torch.device(self.place):
                found = getattr(library, self.model.network)(**self.model.config)
        except Exception as error:  # classes raise many kinds of errors for a bad config
            raise ValueError(f"{self.folder}: its {self.model.network} cannot be made: {error}") from error
        if self.adapt_network is not None:
            found = self.adapt_network(found)
        return found.requires_grad_(False).eval()

    @property
    def family(self) -> Family:
        return find_family_of(self.index, self.folder)

    def component(self, name: str, dtype: torch.dtype | None = None) -> NoReturn:
        raise ValueError(f"of {self.folder} only the network is built, from its config: there is no {name}")

    def scheduler(self) -> Scheduler:
        import diffusers

        name, config = self.model.scheduler
        return getattr(diffusers, name)(**config)

    def config(self, name: str) -> dict[str, Any]:
        return self.model.vae if name == "vae" else self.model.config

    def condition(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of one sample's condition."""
        return self.family.condition(self.net.config)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A stored config without the names of its class and version."""
    return {key: value for key, value in config.items() if not key.startswith("_")}
