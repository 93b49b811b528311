"""What importing groktrace costs, and which way its packages may depend on each other."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import groktrace

ROOT = Path(groktrace.__file__).parent
# A package may import those before it. `run` comes first: recording writes what analysis reads.
ORDER = [
    "errors",
    "records",
    "attention",
    "theory",
    "run",
    "recording",
    "importing",
    "sampling",
    "analysis",
    "reporting",
    "cli",
]
MAY_NOT = {
    "sampling": {"run", "recording", "importing"},
    "analysis": {"recording", "importing"},
    "reporting": {"recording", "importing"},
}


# Results show themselves, by what is built on them: imported where it is called, so that no module needs it.
ON_CALL = {
    ("analysis/follow.py", "reporting"),  # for types
    ("analysis/results/trajectory.py", "reporting"),
    ("analysis/replay.py", "reporting"),
    ("analysis/progress.py", "reporting"),  # how far it is, on standard error
    ("run/store.py", "analysis"),  # Run.trajectory
    ("recording/on_transition.py", "analysis"),  # messages, read as they were written
    ("run/checkpoints.py", "importing"),  # what to do with a folder of checkpoints
}


def imported_parts(path):
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            parts = name.split(".")
            if parts[0] == "groktrace" and len(parts) > 1:
                yield parts[1], id(node) in top


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if part in ("__init__", "__main__"):
        return
    for other, at_once in imported_parts(path):
        if not at_once and (path.relative_to(ROOT).as_posix(), other) in ON_CALL:
            continue
        assert ORDER.index(other) <= ORDER.index(part), f"{path} imports {other}"
        assert other not in MAY_NOT.get(part, ()), f"{path} imports {other}"


@pytest.mark.parametrize("path", sorted((ROOT / "analysis").glob("*/*.py")), ids=lambda path: path.name)
def test_rooms_of_the_analysis_follow_the_path_of_a_run(path):
    rooms = ("measurement", "results", "detection", "running")
    own = rooms.index(path.parent.name)
    for node in ast.parse(path.read_text()).body:  # types are not carried out
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("groktrace.analysis"):
            # What lies beside the rooms opens an analysis, but for two modules.
            room = [*node.module.split("."), *(alias.name for alias in node.names)][2]
            assert room in (*rooms[: own + 1], "tuning", "progress"), f"{path} imports {node.module}"


def test_programs_are_reached_by_their_door():
    house = ROOT / "run" / "program"
    for path in ROOT.rglob("*.py"):
        if not path.is_relative_to(house):
            assert "groktrace.run.program." not in path.read_text(), path


def test_import_is_light():
    heavy = ("tensorboard", "click", "matplotlib", "pandas", "torch._dynamo", "torch.utils.tensorboard", "PIL")
    for code, too in (("import groktrace", ("torch", "numpy")), ("from groktrace import *", ())):
        code = f"import sys; {code}; print([name for name in {heavy + too!r} if name in sys.modules])"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert found.stdout.strip() == "[]"


def test_only_one_module_touches_torch_export():
    users = [path.name for path in ROOT.rglob("*.py") if "torch.export" in path.read_text()]
    assert users == ["tracing.py"]


def test_public_names_are_documented():
    things = [getattr(groktrace, name) for name in groktrace.__all__]
    for thing in things:
        if callable(thing):
            assert thing.__doc__, thing
            assert thing.__module__.startswith("groktrace")


def test_the_base_install_needs_only_what_pyproject_names():
    text = (ROOT.parent / "pyproject.toml").read_text()
    (named,) = re.findall(r"\ndependencies = \[(.*?)\n\]", text, flags=re.DOTALL)
    base = set(re.findall(r'"([a-z]+)', named))
    assert base == {"torch", "tensorboard", "safetensors", "numpy", "click"}
    extras = {
        "figure.py": {"matplotlib"},
        "comparison.py": {"matplotlib"},
        "trajectory.py": {"matplotlib", "pandas"},  # for types, and for what is asked of it
        "lightning.py": {"lightning", "torchmetrics"},
        "transformers.py": {"transformers"},
        "remote.py": {"fsspec"},
        "backends.py": {"distributed"},
        "wandb.py": {"wandb"},
        "draws.py": {"arviz"},
    }
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            # typing_extensions comes with torch, and is read by type checkers alone.
            tops = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"groktrace", "typing_extensions"}
            assert tops <= base | extras.get(path.name, set()), path


def test_public_names_are_found_where_type_checkers_are_told():
    (block,) = (node for node in ast.parse((ROOT / "__init__.py").read_text()).body if isinstance(node, ast.If))
    told = {alias.asname: line.module for line in block.body for alias in line.names}
    assert told.keys() == set(groktrace.__all__) <= set(dir(groktrace))
    for name, module in told.items():
        assert getattr(groktrace, name) is getattr(sys.modules[module], name)
    with pytest.raises(AttributeError, match="module 'groktrace' has no attribute 'anlyze'"):
        groktrace.anlyze  # noqa: B018


def test_packages_are_reached_through_the_name_alone():
    code = "import groktrace; groktrace.errors.SettingsError, groktrace.run.store.Run, groktrace.recording.watch.watch"
    subprocess.run([sys.executable, "-c", code], check=True)
