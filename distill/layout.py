"""The places of modules and recipes of this project, in a checkout or in the wheel.

The wheel contains the folders pipelines/, eval/ and recipes/ of a checkout as distill.pipelines, distill.eval and
distill.recipes (setup.py). Modules and the commands that start them therefore have other names in the wheel.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
IS_WHEEL = (PACKAGE / "pipelines" / "__init__.py").is_file()
RECIPES = (PACKAGE if IS_WHEEL else PACKAGE.parent) / "recipes"


def module_name(name: str) -> str:
    """The import name of a module of a checkout: "eval.score" is "distill.eval.score" in the wheel."""
    return f"distill.{name}" if IS_WHEEL else name


def recipe_names() -> list[str]:
    """The names of all recipes: modules with a configuration or a main."""
    texts = {path.stem: path.read_text() for path in RECIPES.glob("*.py")}
    return sorted(name for name, text in texts.items() if "\nCONFIG = Config(" in text or "\ndef main(" in text)


def find_recipe(name: str) -> Path | None:
    """The file of a recipe, from its path or its name; None if there is neither."""
    paths = (Path(name), RECIPES / f"{name}.py")
    return next((path for path in paths if path.suffix == ".py" and path.is_file()), None)


def program_name() -> str:
    """The command as the user typed it: `distill plan`, `python -m eval.score` or the file name of a script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if sys.argv[0].startswith("distill "):
        return sys.argv[0]
    if spec is None:
        return os.path.basename(sys.argv[0])
    return f"python -m {spec.name.removesuffix('.__main__')}"
