"""The import rules: who may import whom, held by walking the imports of every module.

Packages stand in ranks; a module imports its own package and lower ranks. Imports under TYPE_CHECKING count as well,
save where a rule is about loading a heavy library.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RANKS = {
    "core": 0,
    "layers": 1,
    "modalities": 2,
    "fusions": 2,
    "objectives": 2,
    "models": 3,
    "config": 4,
    "evaluation": 4,
    "publishing": 4,
    "training": 5,
    "inference": 6,
    "planning": 6,
}
CORE_ALONE = ("launcher", "data_pipeline", "tracking")
SHELL = ("cli", "train", "faulty_train", "finetune", "demo", "gate", "__main__")
JOINS = {
    ("config", "data_pipeline"): "config classes of the data part",
    ("config", "tracking"): "config classes of trackers",
    ("config", "evaluation"): "config classes of evaluation tasks",
    ("training", "data_pipeline"): "the composition root joins data and model",
    ("training", "tracking"): "the composition root joins trackers",
    ("planning", "data_pipeline"): "a plan knows the words of a tokenizer",
    ("inference", "data_pipeline"): "a model at work reads shards, indexes and tables",
}


def modules() -> dict[str, Path]:
    """Dotted name of every module of the three packages."""
    found = {}
    for package in ("mmpretrain", "data_pipeline", "launcher"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path: Path, module_level: bool = False) -> Iterator[str]:
    """Dotted names a file imports; with `module_level`, only what importing the file loads."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the import out from the top"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif module_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        elif module_level and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending += node.orelse
        else:
            pending += ast.iter_child_nodes(node)


def part(name: str) -> str | None:
    """The part of the project a dotted name lies in: "core", "data_pipeline", ...; None for other libraries."""
    top, _, rest = name.partition(".")
    if top in ("data_pipeline", "launcher"):
        return top
    if top != "mmpretrain" or not rest:
        return None
    first = rest.split(".")[0]
    return next((shared for shared in ("cli", "config") if first.startswith(f"{shared}_")), first)


def allowed(importer: str, imported: str) -> bool:
    if importer == imported or importer in SHELL or (importer, imported) in JOINS:
        return True
    if importer in CORE_ALONE:
        return imported == "core"
    return RANKS.get(imported, 9) < RANKS[importer]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_stands_left_of_it(name: str) -> None:
    importer = part(name)
    if importer is None:
        return
    assert importer in RANKS or importer in CORE_ALONE or importer in SHELL, f"{name} has no place in the layout"
    wrong = [found for found in imports(MODULES[name]) if (p := part(found)) and not allowed(importer, p)]
    assert not wrong, f"{name} ({importer}) must not import {wrong}"


@pytest.mark.parametrize(
    ("library", "users"),
    [
        ("deepspeed", {"mmpretrain.training.engine", "mmpretrain.training.checkpoint"}),
        ("wandb", {"mmpretrain.tracking.wandb", "mmpretrain.tracking.wandb_replay"}),
    ],
)
def test_a_library_is_imported_only_by_its_own_modules(library: str, users: set[str]) -> None:
    found = {name for name, path in MODULES.items() if library in {used.split(".")[0] for used in imports(path)}}
    assert found <= users


def test_core_loads_no_torch_but_for_collectives() -> None:
    core = {name: path for name, path in MODULES.items() if part(name) == "core"}
    found = {name for name, path in core.items() if any(i.split(".")[0] == "torch" for i in imports(path, True))}
    assert found == {"mmpretrain.core.collectives"}


def loaded_by(statement: str) -> set[str]:
    """Top-level names of the modules a fresh process has loaded after a statement."""
    script = f"{statement}\nimport sys\nprint(*{{m.split('.')[0] for m in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_the_launcher_never_loads_torch() -> None:
    names = [name for name in MODULES if part(name) == "launcher"]
    assert not {"torch", "transformers", "deepspeed"} & loaded_by("import " + ", ".join(names))


def test_the_command_line_starts_without_heavy_libraries() -> None:
    assert not {"torch", "pydantic", "numpy", "transformers"} & loaded_by("import mmpretrain.cli")
