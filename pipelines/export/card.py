"""The model card of an exported student: metadata for the Hub, the exact call, limits, and the training run."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from yaml import YAMLError

from distill.files import read_text, write_atomically
from pipelines.export.configuration import changed_values, training_facts
from pipelines.export.license import UNKNOWN, License, hub_name
from pipelines.families.base import Task
from pipelines.markdown import escape_markdown, fenced, link, unescape

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

NEGATIVE = "Negative prompts do nothing: guidance is built in, and the call switches the pipeline's own off."
OTHER = "Other numbers of steps and guidance scales than the call's were neither trained nor verified."
BODY = """# {name}

{lead}
{samples}
## diffusers

{code}

{hint}
{rest}
## What does not work

{limits}

## Licence

{license}

## Training

{training}
"""
PLACEHOLDER = "your-name"  # owner of a repository that does not exist yet


METHODS = {"dmd2": "DMD2", "sid": "SiD", "vsd": "VSD", "lcd": "consistency distillation", "lcm": "LCM", "scm": "sCM"}
METHODS |= {"phaseddmd": "Phased DMD", "disback": "DisBack", "tsm": "teacher score matching", "sun": "SpeedUpNet"}
FILES = {  # end of a file name: description of the file
    "step_unet.safetensors": "the network alone, in half precision",
    "step_transformer.safetensors": "the network alone, in half precision",
    "_checkpoint.safetensors": "network, text encoders and VAE in half precision, in the original names",
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
    dtype: str = "torch.bfloat16",
) -> str:
    """A complete program that loads `model`, a folder or a name on the Hub, as `pipe` on the GPU, and makes the `call`.

    absent: components that the folder lacks; from_pretrained needs their names (SD3 without T5). dtype: an expression.
    lora: load `base` instead, with the file `lora` of `model` and the model's scheduler, of class `scheduler`.
    """
    where = json.dumps(str(model))  # also a valid Python literal for any path
    given = f"torch_dtype={dtype}" + "".join(f", {name}=None" for name in absent)
    names = ["DiffusionPipeline", scheduler] if lora else ["DiffusionPipeline"]
    lines = ["import torch", f"from diffusers import {', '.join(names)}"]
    if "export_to_video(" in call:
        lines += ["from diffusers.utils import export_to_video"]
    lines += [""]
    if lora:
        lines += [
            f"pipe = DiffusionPipeline.from_pretrained({json.dumps(str(base))}, {given})",
            f'pipe.scheduler = {scheduler}.from_pretrained({where}, subfolder="scheduler")',
            f"pipe.load_lora_weights({where}, weight_name={json.dumps(lora)})",
        ]
    else:
        lines += [f"pipe = DiffusionPipeline.from_pretrained({where}, {given})"]
    return "\n".join([*lines, 'pipe.to("cuda")', call.strip()])


def method_title(method: str) -> str:
    """The name of a method, given in lower case, with a link to its paper."""
    from distill import methods

    classes = {name.lower(): getattr(methods, name) for name in methods.__all__}
    title = METHODS.get(method, classes[method].__name__ if method in classes else method)
    doc = sys.modules[classes[method].__module__].__doc__ if method in classes else None
    paper = re.search(r"\b\d{4}\.\d{5}\b", doc or "")
    return link(title, f"https://arxiv.org/abs/{paper[0]}") if paper else escape_markdown(title)


@dataclass(frozen=True)
class Card:
    """README.md of an exported folder.

    base: the teacher, a name on the Hub or a folder. code, lora: programs (see `render_program`) that run the folder
    and its LoRA file; without `code` the folder is an adapter. config: YAML. samples: an image in the folder, of
    `prompt`. limits: what does not work. results: figures for the Hub's model-index. datasets: names on the Hub. files:
    files beside the pipeline; the card explains those in FILES. checked: what was verified, and against what. usage:
    sections about ComfyUI and A1111. sampling: what the student is called with. terms: the teacher's licence files in
    the folder. model: the student's name on the Hub; "": it has none yet, and the programs name a placeholder.
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
    usage: str = ""
    sampling: str = ""
    terms: Sequence[str] = ()
    model: str = ""

    @property
    def calls(self) -> str:
        return "one-step" if self.steps == 1 else "few-step"

    @property
    def hub(self) -> str | None:
        """The teacher's name on the Hub; None for a folder without one."""
        return hub_name(self.base)

    def render(self) -> str:
        """The text of the card, after the metadata for the Hub."""
        body = BODY.format(
            name=escape_markdown(self.name),
            lead=self._lead(),
            samples=f"\n![samples]({self.samples})\n" if self.samples else "",
            code=fenced(self.code or self.lora, "python"),
            hint=self._hint(),
            rest=self._sections(),
            limits="\n".join(f"- {limit}" for limit in (*self.limits, OTHER)),
            license=self._license(),
            training=self._training(),
        )
        return f"---\n{self._metadata().to_yaml()}\n---\n\n{body}"

    def _lead(self) -> str:
        """What the model is."""
        kind = f"{self.calls} {'student' if self.code else 'LoRA'}"
        calls = "one network call" if self.steps == 1 else f"{self.steps} network calls"
        method = f", distilled with {method_title(self.method)}" if self.method else ""
        what = "A video" if self.task == "text-to-video" else "An image"
        return f"A {kind} of {self.base_link}{method}. {what} takes {calls}, without classifier-free guidance."

    def _hint(self) -> str:
        """What to change in the program."""
        memory = (
            'If the GPU has too little memory, write `pipe.enable_model_cpu_offload()` instead of `pipe.to("cuda")`.'
        )
        if self.task == "unconditional-image-generation":
            memory = 'Without a GPU, leave out `pipe.to("cuda")`.'
        if self.model:
            return memory
        replace = f"`{PLACEHOLDER}/...` stands for a repository: replace it by yours, or by the folder with this file."
        return f"{replace} {memory}"

    def _training(self) -> str:
        """The training in numbers, and the values that differ from the defaults."""
        lines = [f"- {title}: {escape_markdown(value)}" for title, value in training_facts(self.config).items()]
        lines = [f"- teacher: {self.base_link}", *([f"- {self.sampling}"] if self.sampling else []), *lines]
        text = "\n".join(lines)
        if not (changed := changed_values(self.config).strip()):
            return text
        return (
            f"{text}\n\n<details>\n<summary>Values of the configuration that differ from the defaults of "
            f"distill-one-step</summary>\n\n{fenced(changed, 'yaml')}\n\n</details>"
        )

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
        text = ""
        if self.lora and self.code:
            text += f"\nThe LoRA on its base:\n\n{fenced(self.lora, 'python')}\n"
        if self.usage:
            text += f"\n{self.usage}"
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
        """The licence and its files."""
        text = f"The student is derived from {self.base_link} and has the same licence"
        if self.license == UNKNOWN:
            return f"{text}, which was not found: name it with `--license` before you share this."
        title = self.license.name or self.license.id
        named = link(title, self.license.link) if self.license.link else escape_markdown(title)
        if not self.terms:
            return f"{text}, {named}."
        return (
            f"{text}, {named}. Its files are part of this folder: {', '.join(link(name, name) for name in self.terms)}."
        )

    @property
    def base_link(self) -> str:
        """The teacher's name, with a link if it is on the Hub."""
        return (
            link(self.hub, f"https://huggingface.co/{self.hub}") if self.hub else escape_markdown(Path(self.base).name)
        )


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
