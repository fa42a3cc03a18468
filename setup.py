"""What setup.cfg cannot say: the layout of the wheel, and links that work outside the repository.

In a checkout pipelines/, eval/ and recipes/ stand beside distill/, and an editable install (`make setup`) leaves them
there. In the wheel they are distill.pipelines, distill.eval and distill.recipes: nothing else lands in site-packages.
"""

import ast
import re
from functools import cache
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

# The public address of this repository, as https://HOST/OWNER/NAME. While it is empty, the long description shows the
# names of files without links and the package has no project URLs.
REPOSITORY = ""

ROOT = Path(__file__).resolve().parent
MOVED = ("pipelines", "eval", "recipes")
ROOM = f"({'|'.join(MOVED)})"
PACKAGES = [*find_packages(f"{ROOT}", include=["distill*", "pipelines*", "eval*"]), "recipes"]
COMMAND = re.compile(rf"python\s+-m(\s+)({ROOM}\.\w+)")
RULES = [  # of the wheel's sources, in this order
    (re.compile(pattern), new)
    for pattern, new in (
        (rf"(?m)^(\s*)from {ROOM}(?=[.\s])", r"\1from distill.\2"),
        (r"accelerate launch(\s+)recipes/(\w+)\.py", r"accelerate launch\1-m distill run \2"),
        (r"python(\s+)recipes/(\w+)\.py", r"distill\1run \2"),
        (r"\brecipes/(\w+)\.py", r"\1"),
        # A name in quotes is no text: distill.layout.module_name or a table reads it.
        (rf"(?<![\w./\"']){ROOM}\.(?=[a-z_])", r"distill.\1."),
    )
]


def wheel_name(package: str) -> str:
    """The name of a package in the wheel."""
    return f"distill.{package}" if package.partition(".")[0] in MOVED else package


def rewrite(source: str, commands: dict[str, str]) -> str:
    """The source of a module in the wheel: what it imports has other names, and so have commands in its texts.

    commands: {module: command of `distill`}. ValueError where an import has no new name, or where code would change.
    """
    text = COMMAND.sub(lambda m: f"distill{m[1]}{commands[m[2]]}" if m[2] in commands else m[0], source)
    for pattern, new in RULES:
        text = pattern.sub(new, text)
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import)]
    imported = [alias.name for node in imports for alias in node.names]
    if old := [name for name in imported if name.partition(".")[0] in MOVED]:
        raise ValueError(f"`import {old[0]}` has no name in the wheel: write `from {old[0]} import ...`")
    if code_of(source) != code_of(text):
        raise ValueError("the wheel's names would change code, not imports and texts alone: rename a variable")
    return text


def code_of(source: str) -> str:
    """A module's syntax tree without its texts and without the modules that it imports from."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            node.module = None
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.dump(tree)


@cache
def read_commands() -> dict[str, str]:
    """{module: command} of distill/__main__.py, read without importing it."""
    tree = ast.parse((ROOT / "distill" / "__main__.py").read_text())
    table = next(node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "COMMANDS")
    groups = ast.literal_eval(table).values()
    return {module.removesuffix(".__main__"): name for group in groups for name, (module, _) in group.items()}


def link_files(text: str, repository: str) -> str:
    """Markdown with links to files of the repository as links to its address; without an address, their text alone."""
    if not repository:
        return re.sub(r"!?\[([^\[\]]*)\]\((?![a-z]+:|#)[^)\s]+\)", r"\1", text)
    text = re.sub(r"(!\[[^\[\]]*\]\()(?![a-z]+:|#)", rf"\1{repository}/raw/main/", text)
    text = re.sub(r'(<img[^>]* src=")(?![a-z]+:)', rf"\1{repository}/raw/main/", text)
    return re.sub(r"(\]\()(?![a-z]+:|#)", rf"\1{repository}/blob/main/", text)


class BuildWheel(build_py):
    """Copies modules with the names of the wheel."""

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        copy = super().build_module(module, module_file, package)
        try:
            text = rewrite(Path(module_file).read_text(), read_commands())
        except ValueError as error:
            raise ValueError(f"{module_file}: {error}") from None
        Path(copy[0]).write_text(text)
        return copy


class LinkCheckout(editable_wheel):
    """An editable install, whose modules have the names of the checkout."""

    def finalize_options(self) -> None:
        self.distribution.packages = PACKAGES
        self.distribution.package_dir = {}
        super().finalize_options()


if __name__ == "__main__":
    setup(
        packages=[wheel_name(package) for package in PACKAGES],
        package_dir={f"distill.{room}": room for room in MOVED},
        cmdclass={"build_py": BuildWheel, "editable_wheel": LinkCheckout},
        long_description=link_files((ROOT / "README.md").read_text(), REPOSITORY),
        long_description_content_type="text/markdown",
        project_urls={"Source": REPOSITORY, "Issues": f"{REPOSITORY}/issues"} if REPOSITORY else {},
    )
