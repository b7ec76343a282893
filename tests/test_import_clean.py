"""Importing is cheap, changes nothing, and goes downwards only."""

import ast
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

import twinspect

ROOT = Path(twinspect.__file__).parent

DOCS = Path(__file__).parents[1] / "docs" / "architecture.md"


def levels() -> list[list[str]]:
    """The list in docs/architecture.md, lowest first; a name that ends in a dot is a whole folder."""
    block = DOCS.read_text(encoding="utf-8").partition("```levels\n")[2].partition("```")[0]
    return [line.replace("/", ".").split() for line in block.splitlines()]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def modules() -> list[str]:
    """Dotted names below the package, without it: 'models.dual', '' for the package itself."""
    paths = [p.relative_to(ROOT).with_suffix("") for p in ROOT.rglob("*.py")]
    return sorted(".".join(p.parts).removesuffix("__init__").rstrip(".") for p in paths)


# ---------------------------------------------------------------------------------------------- cheap


def test_import_loads_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "PIL", "timm", "scipy", "typer", "rich", "pyarrow")
    assert run(f"import sys, twinspect; print([m for m in {heavy} if m in sys.modules])") == "[]"


@pytest.mark.parametrize("module", ["cli", "types", "errors", "config", "console", "bundle", "data.images"])
def test_light_modules_load_no_torch(module: str) -> None:
    assert run(f"import sys, twinspect.{module}; print('torch' in sys.modules)") == "False"


def test_prediction_room_loads_no_torch() -> None:
    code = "import sys, twinspect.inference.bulk, twinspect.inference.predictor"
    assert run(f"{code}; print('torch' in sys.modules)") == "False"


def median_seconds(command: list[str]) -> float:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def test_help_is_quick() -> None:
    """0.4 s on a quiet machine; measured against a bare interpreter, as CI machines differ in speed."""
    bare = median_seconds([sys.executable, "-c", "pass"])
    assert median_seconds([sys.executable, "-m", "twinspect", "--help"]) < 0.4 + 10 * bare
    code = "import sys; sys.argv = ['twinspect', '--help']\ntry:\n    from twinspect.cli import app; app()\n"
    code += "except SystemExit:\n    print([m for m in ('torch', 'numpy', 'timm') if m in sys.modules])"
    assert run(code).endswith("[]")


def test_import_is_quick() -> None:
    bare = median_seconds([sys.executable, "-c", "pass"])
    assert median_seconds([sys.executable, "-c", "import twinspect"]) < 0.15 + 5 * bare


# ------------------------------------------------------------------------------------ changes nothing


def test_importing_every_module_changes_nothing() -> None:
    names = [f"twinspect.{name}".rstrip(".") for name in modules()]
    code = f"""
import os, sys, warnings, importlib
import numpy, PIL.Image, torch
import twinspect.models.teachers, scipy.ndimage, scipy.stats, pyarrow  # what third parties do is not ours

def state():
    return dict(
        env=dict(os.environ), cwd=os.getcwd(), threads=(torch.get_num_threads(), torch.get_num_interop_threads()),
        dtype=torch.get_default_dtype(), grad=torch.is_grad_enabled(), seed=torch.random.initial_seed(),
        rng=numpy.random.get_state()[1].tolist(), errstate=numpy.geterr(), pixels=PIL.Image.MAX_IMAGE_PIXELS,
        deterministic=torch.are_deterministic_algorithms_enabled(), filters=[str(f) for f in warnings.filters],
        hooks=(sys.excepthook.__name__, len(sys.path)),
    )

before = state()
missing = []
for name in {names!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # an extra that is not installed
        if str(error.name).startswith("twinspect"):
            raise
        missing.append(name)
after = state()
print([key for key in before if before[key] != after[key]])
"""
    assert run(code) == "[]"


def test_importing_leaves_no_files(tmp_path: Path) -> None:
    names = ", ".join(f"twinspect.{name}" for name in modules() if name)
    env = {**os.environ, "HOME": str(tmp_path), "TWINSPECT_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", f"import {names}"], cwd=tmp_path, env=env, check=True, capture_output=True)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------ downwards only


def level(module: str) -> int:
    """Line of a module in the list; a module that is not listed fails the test with its name."""
    folder = f"{module.split('.')[0]}."
    for number, names in enumerate(levels()):
        if module in names or (folder in names and (ROOT / folder[:-1]).is_dir()):
            return number
    raise AssertionError(f"{module} has no level: add it to {DOCS}")


def imported(path: Path) -> set[str]:
    """Own modules a file imports when it is loaded or run; what is for the type checker only does not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "twinspect":
            inner = (node.module or "").partition(".")[2]
            below = {f"{inner}.{alias.name}".strip(".") for alias in node.names}
            found |= {name for name in below if name in ALL} or {inner}
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "twinspect"}
    return found


ALL = set(modules())


@pytest.mark.parametrize("module", sorted(ALL))
def test_imports_go_downwards_only(module: str) -> None:
    path = ROOT.joinpath(*module.split(".")) if module else ROOT
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if module == "":
        return  # the package names its public parts lazily
    for other in imported(path):
        if not other:
            continue
        same_folder = "." in module and module.split(".")[0] == other.split(".")[0]
        same_folder = same_folder or module == other.split(".")[0]
        assert level(other) < level(module) or same_folder, f"{module} imports {other}"


def test_relative_imports_are_not_used() -> None:
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not any(isinstance(n, ast.ImportFrom) and n.level for n in ast.walk(tree)), path


def test_no_two_classes_share_a_name() -> None:
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py"))
    names = [node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    assert sorted({name for name in names if names.count(name) > 1 and not name.startswith("_")}) == []
