"""The model card of an exported student: metadata for the Hub, the exact call, limits, and the training run."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from yaml import YAMLError

from distill.files import read_text, write_atomically
from pipelines.export.license import UNKNOWN, License, hub_name
from pipelines.families.base import Task
from pipelines.markdown import escape_markdown, fenced, link, unescape

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

NEGATIVE = "Negative prompts do nothing: guidance is built in, and the call switches the pipeline's own off."
OTHER = "Other numbers of steps and guidance scales than the call's were neither trained nor verified."
BODY = """# {name}

A {kind} of {base} with {calls}{method}. Plain diffusers runs it:

{code}
{rest}
## What does not work

{limits}

## Licence

The student is derived from {base} and has the same licence{license}.

## Training

The resolved configuration:

{config}
"""


METHODS = {"dmd2": "DMD2", "sid": "SiD", "vsd": "VSD", "lcd": "consistency distillation", "lcm": "LCM", "scm": "sCM"}
METHODS |= {"phaseddmd": "Phased DMD", "disback": "DisBack", "tsm": "teacher score matching", "sun": "SpeedUpNet"}
FILES = {  # end of a file name: description of the file
    "_unet.safetensors": "the network alone, in half precision",
    "_transformer.safetensors": "the network alone, in half precision",
    "_lora.safetensors": "the LoRA, for `pipe.load_lora_weights`",
    "_lora_comfy.safetensors": "the same LoRA in kohya's format, for ComfyUI and A1111",
    "_comfyui.json": "a workflow for ComfyUI; replace BASE.safetensors by your file of the base",
    "negative.safetensors": "the adapter for negative prompts, for `pipelines.inference.negative_prompt.install`",
    "distill.json": "the times and the configuration; diffusers does not read it",
}


class Result(NamedTuple):
    """One figure of an evaluation. protocol: a sentence that names what was compared and the number of images."""

    protocol: str
    metric: str
    value: float


def render_program(
    call: str,
    model: str | Path,
    base: str | Path = "",
    lora: str = "",
    scheduler: str = "",
    absent: Sequence[str] = (),
) -> str:
    """A complete program that loads `model`, a folder or a name on the Hub, as `pipe` and makes the family's `call`.

    absent: components that the folder lacks; from_pretrained needs their names (SD3 without T5).
    lora: load `base` instead, with the file `lora` of `model` and the model's scheduler, of class `scheduler`.
    """
    where = json.dumps(str(model))  # also a valid Python literal for any path
    given = "torch_dtype=torch.float32" + "".join(f", {name}=None" for name in absent)
    head = "import torch\nfrom diffusers import DiffusionPipeline"
    if not lora:
        return f"{head}\n\npipe = DiffusionPipeline.from_pretrained({where}, {given})\n{call.strip()}"
    return (
        f"{head}, {scheduler}\n\n"
        f'scheduler = {scheduler}.from_pretrained({where}, subfolder="scheduler")\n'
        f"pipe = DiffusionPipeline.from_pretrained({json.dumps(str(base))}, scheduler=scheduler, {given})\n"
        f"pipe.load_lora_weights({where}, weight_name={json.dumps(lora)})\n{call.strip()}"
    )


@dataclass(frozen=True)
class Card:
    """README.md of an exported folder.

    base: the teacher, a name on the Hub or a folder. code, lora: programs (see `render_program`) that run the folder
    and its LoRA file; without `code` the folder is an adapter. config: YAML. samples: an image in the folder, of
    `prompt`. limits: what does not work. results: figures for the Hub's model-index. datasets: names on the Hub. files:
    files beside the pipeline; the card explains those in FILES. checked: what was verified, and against what.
    """

    name: str
    base: str | Path
    license: License
    family: str
    method: str
    steps: int
    config: str
    code: str = ""
    lora: str = ""
    task: Task = "text-to-image"
    samples: str = ""
    prompt: str = " "
    limits: Sequence[str] = (NEGATIVE,)
    results: Sequence[Result] = ()
    datasets: Sequence[str] = ()
    files: Sequence[str] = ()
    checked: str = ""

    @property
    def calls(self) -> str:
        return "one-step" if self.steps == 1 else "few-step"

    @property
    def hub(self) -> str | None:
        """The teacher's name on the Hub; None for a folder without one."""
        return hub_name(self.base)

    def render(self) -> str:
        """The text of the card, after the metadata for the Hub."""
        base = f"[{self.hub}](https://huggingface.co/{self.hub})" if self.hub else self._folder
        calls = "one network call" if self.steps == 1 else f"{self.steps} network calls"
        method = f", distilled with {METHODS.get(self.method, self.method)}" if self.method else ""
        body = BODY.format(
            name=escape_markdown(self.name),
            kind=f"{self.calls} {'student' if self.code else 'LoRA'}",
            base=base,
            calls=calls,
            method=method,
            code=fenced(self.code or self.lora, "python"),
            rest=self._sections(),
            limits="\n".join(f"- {limit}" for limit in (*self.limits, OTHER)),
            license=self._license(),
            config=fenced(self.config.strip(), "yaml"),
        )
        return f"---\n{self._metadata().to_yaml()}\n---\n\n{body}"

    def _metadata(self) -> ModelCardData:
        from huggingface_hub import ModelCardData

        relation = "finetune" if self.code else "adapter"
        widget = [{"text": self.prompt, "output": {"url": self.samples}}]
        results = _index(self.results, self.task)
        tags = [self.task, "diffusers", self.calls, self.method, self.family, "lora" if self.lora else ""]
        return ModelCardData(
            license=self.license.id,
            license_name=self.license.name,
            license_link=self.license.link,
            base_model=self.hub,
            library_name="diffusers",
            pipeline_tag=self.task,
            tags=[tag for tag in tags if tag],
            datasets=list(self.datasets) or None,
            model_name=(results and self.name) or None,
            eval_results=results or None,
            base_model_relation=(self.hub and relation) or None,
            widget=(self.samples and widget) or None,
        )

    def _sections(self) -> str:
        """The sections between the first program and the limits."""
        text = f"\n![samples]({self.samples})\n" if self.samples else ""
        if self.lora and self.code:
            text += f"\nThe LoRA on its base:\n\n{fenced(self.lora, 'python')}\n"
        explained = [(file, what) for file in self.files for end, what in FILES.items() if file.endswith(end)]
        if explained:
            lines = "".join(f"- `{file}`: {what}\n" for file, what in explained)
            text += f"\n## Files beside the pipeline\n\n{lines}"
        if self.checked:
            text += f"\n## What was verified\n\n{self.checked}\n"
        if self.results:
            text += f"\n{_table(self.results)}"
        return text

    def _license(self) -> str:
        """The end of the sentence about the license."""
        if self.license == UNKNOWN:
            return ", which was not found: name it with `--license` before you share this"
        title = self.license.name or self.license.id
        return f", {link(title, self.license.link) if self.license.link else escape_markdown(title)}"

    @property
    def _folder(self) -> str:
        return escape_markdown(Path(self.base).name)


def _index(results: Sequence[Result], task: str) -> list[EvalResult]:
    """Figures in the format of the Hub's model-index."""
    from huggingface_hub import EvalResult

    slug = lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return [EvalResult(task, slug(p), p, slug(m), v, metric_name=m) for p, m, v in results]


def _table(results: Sequence[Result]) -> str:
    rows = "".join(f"| {escape_markdown(m)} | {v:.4g} | {escape_markdown(p)} |\n" for p, m, v in results)
    return f"## Evaluation\n\n| metric | value | protocol |\n|---|---:|---|\n{rows}"


def add_results(folder: str | Path, results: Sequence[Result]) -> None:
    """Write figures into the card of an exported folder: its model-index and its table.

    They replace figures of the same protocol and metric. ValueError if the folder has no card.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = Path(folder) / "README.md"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no README.md: it is not an exported model; make one with python -m pipelines.export"
        )
    try:
        found = ModelCard(read_text(path))
    except (ValueError, TypeError, KeyError, AttributeError, YAMLError) as error:
        raise ValueError(f"{path} is not a model card with metadata ({error}); export the model again") from None
    assert isinstance(found.data, ModelCardData)
    old = [
        Result(r.dataset_name, r.metric_name or r.metric_type, r.metric_value) for r in found.data.eval_results or []
    ]
    merged = {(r.protocol, r.metric): r for r in (*old, *results)}
    title = re.search(r"^# (.+)$", found.text, re.MULTILINE)
    found.data.model_name = found.data.model_name or (unescape(title[1]) if title else Path(folder).name)
    found.data.eval_results = _index(list(merged.values()), found.data.pipeline_tag or "text-to-image")
    before, head, after = found.text.partition("## What does not work")
    bare = re.sub(r"^## Evaluation\n.*?(?=^## |\Z)", "", before, flags=re.MULTILINE | re.DOTALL)
    table = _table(list(merged.values()))
    write_atomically(path, f"---\n{found.data.to_yaml()}\n---\n{bare.rstrip()}\n\n{table}\n{head}{after}")


def python_block(text: str, n: int = 0) -> str:
    """The n-th Python block of a card."""
    return re.findall(r"^(`{3,})python\n(.*?)\n\1$", text, re.DOTALL | re.MULTILINE)[n][1]
