"""What the tree must not hold: code that runs what others wrote; and whose code it brings."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "benchmarks", "packaging", "docs", "examples")
TREE = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "imp",
    "pty",
    "telnetlib",
}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "system",
    "popen",
    "execv",
    "execve",
    "spawnl",
    "spawnv",
    "load_module",
}
# CIFAR's files are pickles, and are read by an unpickler that knows four names (tests/data/test_containers.py).
ALLOWED = {("src/twinspect/data/containers.py", "pickle")}


def dangers(path: Path) -> list[str]:
    """Lines that could run code out of data, or out of names given by others."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [one for one in [(node.module or "").split(".")[0]] if one in MODULES]
        elif isinstance(node, ast.Call):
            names = list(dangerous_call(node))
        name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
        found += [f"{name}:{node.lineno}: {one}" for one in names if (name, one) not in ALLOWED]  # type: ignore[attr-defined]
    return found


def dangerous_call(node: ast.Call) -> list[str]:
    called = ast.unparse(node.func)
    last = called.rpartition(".")[2]
    given = {one.arg: ast.unparse(one.value) for one in node.keywords}
    found = [last] if called in CALLS or (last in CALLS and called.startswith("os.")) else []
    if called in ("yaml.load", "pickle.load", "pickle.loads") or last in ("unsafe_load", "full_load"):
        found.append(called)
    if given.get("shell", "False") != "False" or given.get("allow_pickle", "False") != "False":
        found.append("shell or allow_pickle")
    if called == "torch.load" and given.get("weights_only") != "True":
        found.append("torch.load without weights_only")
    return found


def test_nothing_in_the_tree_runs_what_others_wrote() -> None:
    assert len(TREE) > 100
    assert [danger for path in TREE for danger in dangers(path)] == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "pickle.loads(x)", "from joblib import load", "import a, dill.b", "eval('1')", "exec(x)",
        "os.system('x')",
        "os.popen(x)",
        "subprocess.run(x, shell=True)", "yaml.load(x)", "yaml.unsafe_load(x)", "np.load(x, allow_pickle=True)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)", "subprocess.Popen(x, shell=chosen)", "__import__(x)",
    ],
)  # fmt: skip
def test_the_test_sees_them(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.py").write_text(line)
    assert dangers(tmp_path / "a.py")


def test_what_is_harmless_is_not_taken_for_them(tmp_path: Path) -> None:
    lines = ("model.eval()", "re.compile('x')", "yaml.safe_load(x)", "subprocess.run([x], shell=False)", "np.load(x)")
    harmless = "\n".join([*lines, "torch.load(x, weights_only=True)"])
    (tmp_path / "a.py").write_text(harmless)
    assert dangers(tmp_path / "a.py") == []


def test_every_licence_is_accepted_or_was_looked_at() -> None:
    script = ROOT / "packaging" / "licences.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"\d+ packages, 0 to look at", lines[-1])
    assert any(line.startswith("torch ") and "BSD" in line for line in lines)
