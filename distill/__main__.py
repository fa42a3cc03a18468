"""The command `distill`: a subcommand for the command of each module. A module is imported when it is called."""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from distill import __version__
from distill.layout import RECIPES, find_recipe, module_name, recipe_names

COMMANDS = {  # title: {subcommand: (module with a function main, description)}
    "Before training": {
        "plan": ("pipelines.plan", "GPU memory, time and cost of a recipe, before it runs"),
        "scaling": ("pipelines.scaling", "time, communication and memory of a recipe on 1 to 64 GPUs"),
        "cache": ("pipelines.cache.__main__", "encode prompts and images once"),
        "pairs": ("pipelines.pairs", "sample pairs of noise and image from a teacher"),
        "convert": ("pipelines.edm_convert", "a checkpoint of EDM to a pipeline folder"),
        "sana": ("pipelines.sana", "a SANA teacher to the form that SANA-Sprint needs"),
    },
    "Training": {
        "train": ("recipes.train", "any method on any teacher, with the values of both"),
        "run": ("", "train with a published recipe, by its name"),
        "recipes": ("", "list the published recipes"),
    },
    "With a finished student": {
        "export": ("pipelines.export.__main__", "a run, or a published student, to a diffusers pipeline"),
        "experts": ("pipelines.experts", "the students of several parts to one pipeline"),
        "control": ("pipelines.control", "how well a student with a ControlNet keeps to given pictures"),
    },
    "Evaluation": {
        "generate": ("eval.generate", "images of a pipeline, in a folder"),
        "features": ("eval.features.__main__", "features of a folder of images"),
        "score": ("eval.score", "figures of folders of images"),
        "verify": ("eval.verify", "the figures against those of other libraries"),
        "hallucination": ("eval.hallucination", "the share of images far from all real and teacher images"),
        "world": ("eval.world.__main__", "the captioned world: data to train on, and what images show"),
        "layouts": ("eval.layouts", "images in the folders that GenEval and other benchmarks read"),
        "protocols": ("eval.protocols", "list the protocols, and what each lacks here"),
        "watch": ("eval.watch", "choose a checkpoint of a run"),
        "leaderboard": ("eval.leaderboard.__main__", "many models scored as one job, and their page"),
    },
}
MODULES = {command: module for group in COMMANDS.values() for command, (module, _) in group.items()}
USAGE = "usage: distill COMMAND ...          distill COMMAND --help shows the flags of a command\n"


def main(argv: list[str] | None = None) -> None:
    """Run the subcommand named by the first word with the remaining words as arguments."""
    command, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(format_help(), end="")
    elif command == "--version":
        print(f"distill {__version__}")
    elif command in HERE:
        HERE[command](words)
    elif command in MODULES:
        sys.argv = [f"distill {command}", *words]
        import_module(module_name(MODULES[command])).main()
    else:
        fail_unknown("command", command, MODULES, "distill --help")


def format_help() -> str:
    """The text of `distill --help`, with a line for each subcommand."""
    text = f"{USAGE}\nOne-step diffusion distillation {__version__}\n"
    for title, group in COMMANDS.items():
        text += f"\n{title}\n" + "".join(f"  {name:14} {line}\n" for name, (_, line) in group.items())
    return f"{text}\nOn several GPUs: accelerate launch -m distill COMMAND ...\n"


def fail_unknown(kind: str, name: str, known: Iterable[str], listing: str) -> NoReturn:
    """Exit with status 2 and a message that names the closest of the known names."""
    from distill.configuration import fail

    nearest = difflib.get_close_matches(name, known, 1, 0.4)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    fail(f"distill has no {kind} {name!r}: {hint}`{listing}` lists them")


def list_recipes(words: list[str]) -> None:
    """Print a line for each recipe, and the folder that holds them."""
    if words:
        sys.stdout.write("usage: distill recipes\n\nlists the published recipes; it has no flags\n")
        raise SystemExit(0 if words[0] in ("-h", "--help") else 2)
    titles = {name: title_of(RECIPES / f"{name}.py") for name in recipe_names()}
    width = max(map(len, titles))
    lines = [f"{name:{width}}  {title}\n" for name, title in titles.items()]
    sys.stdout.write(
        "".join(lines) + f"\nThe files are in {RECIPES}, files for `accelerate launch` in its accelerate/\n"
    )


def title_of(script: Path) -> str:
    """The first line of a script's docstring."""
    return (ast.get_docstring(ast.parse(script.read_text())) or "").partition("\n")[0]


def run_recipe(words: list[str]) -> None:
    """Run a recipe like `python recipes/NAME.py`, with the program name `distill run NAME`."""
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(
            "usage: distill run RECIPE ...          a name that `distill recipes` lists, or a file of your own\n\n"
            "distill run RECIPE --help shows its flags. On several GPUs: accelerate launch -m distill run RECIPE ...\n"
        )
        raise SystemExit(0 if words else 2)
    name, *flags = words
    script = find_recipe(name)
    if script is None:
        fail_unknown("recipe", name, recipe_names(), "distill recipes")
    sys.argv = [f"distill run {name}", *flags]
    run_script(script)


def run_script(script: Path) -> None:
    """Execute a file as the main module. Unlike runpy.run_path, keep sys.argv[0], the program name."""
    main_module = ModuleType("__main__")
    main_module.__file__ = f"{script}"  # spawned processes find the main module by it
    sys.modules["__main__"] = main_module
    sys.path.insert(0, f"{script.resolve().parent}")
    exec(compile(script.read_text(), f"{script}", "exec"), vars(main_module))


HERE = {"run": run_recipe, "recipes": list_recipes}  # subcommands of this file

if __name__ == "__main__":
    main()
