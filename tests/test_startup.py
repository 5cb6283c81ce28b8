"""What is imported when: a command says its help and its first line before torch, timm and Lightning are there.

Looked at in processes of their own, by what was imported: no clock, so nothing here depends on how busy a machine is.
"""

import ast
import importlib.util
import os
import subprocess
import sys

import pytest
from conftest import LIMIT, ROOT

import repmlp
from repmlp import imports
from repmlp.runs import outcome

HEAVY = "{'torch', 'timm', 'lightning', 'torchmetrics', 'torchvision', 'numpy', 'pandas', 'onnx'}"


def python(code: str, *arguments: str, **environment: str) -> list[str]:
    """Run code in a fresh process at the repository; returns the lines that it printed."""
    kept = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, cwd=ROOT, timeout=LIMIT, env={**kept, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "command", ["ablate", "train", "segment", "evaluate", "predict", "export", "borders", "benchmark"]
)
def test_help_needs_no_torch(command):
    code = (
        "import runpy, sys\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print(sorted({HEAVY} & set(sys.modules)))\n"
    )
    lines = python(f"import sys; sys.argv = sys.argv[1:]\n{code}", f"experiments/{command}.py", "--help")
    assert lines[-1] == "[]"
    assert "sweep: " in "\n".join(lines) or command != "ablate"
    if command in ("ablate", "train", "segment"):
        assert any(line.startswith("recipe: ") for line in lines), "the groups of settings are listed"


@pytest.mark.parametrize("policy", ["", "ACTIVE"])
def test_the_first_line_of_a_run_comes_before_torch(tmp_path, policy):
    code = (
        "import sys, types\n"
        "from repmlp.runs.outcome import Outcome\n"
        "def execute(config, label, deadline):\n"
        f"    print('at the run:', sorted({HEAVY} & set(sys.modules)), flush=True)\n"
        "    import os; print('waits:', os.environ['OMP_WAIT_POLICY'])\n"
        "    return Outcome('finished', label, 'key', value=1.0)\n"
        "sys.modules['repmlp.runs.run'] = run = types.ModuleType('run')\n"
        "import repmlp.runs; repmlp.runs.run = run\n"
        "run.execute = execute\n"
        "import runpy; sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    folders = [f"output_dir={tmp_path}", f"results_dir={tmp_path}"]
    own = {"OMP_WAIT_POLICY": policy} if policy else {}
    lines = python(code, "experiments/ablate.py", "recipe.epochs=20", *folders, **own)
    assert "run 1/1: repmlpnet_cifar" in lines[0]
    assert lines[1] == "at the run: []"
    assert lines[2] == f"waits: {policy or 'PASSIVE'}", "the user's own word stands"


@pytest.mark.parametrize(
    "words, said",
    [
        ("ablate recipe.epochs=0", "recipe.epochs=0: use a whole number, at least 1"),
        ("ablate model.kernels=[2]", "its sides have to be odd"),
        ("train seed=-1", "seed=-1: use a whole number"),
        ("evaluate checkpoint=nowhere", "no checkpoint at"),
        ("export checkpoint=nowhere", "no checkpoint at"),
        ("borders checkpoint=nowhere", "no checkpoint at"),
        ("predict checkpoint=nowhere images=.", "no checkpoint at"),
        ("predict checkpoint=README.md images=nowhere", "there is no such folder"),
    ],
)
def test_a_mistake_in_the_settings_needs_no_torch(tmp_path, words, said):
    code = (
        "import contextlib, io, runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: print(end.code)\n"
        f"print(sorted({HEAVY} & set(sys.modules)))\n"
    )
    name, *rest = words.split()
    folders = [f"output_dir={tmp_path}", f"results_dir={tmp_path}"] if name in ("ablate", "train") else []
    *lines, imported = python(f"{code}", f"experiments/{name}.py", *rest, *folders)
    assert said in "\n".join(lines) and imported == "[]"


@pytest.mark.parametrize("name, value, first", [(None, "", True), ("RANK", "1", False), ("LOCAL_RANK", "0", True)])
def test_who_is_first_is_known_before_lightning(monkeypatch, name, value, first):
    monkeypatch.delitem(sys.modules, "lightning.pytorch.utilities.rank_zero", raising=False)
    for rank in outcome.RANKS:
        monkeypatch.delenv(rank, raising=False)
    if name:
        monkeypatch.setenv(name, value)
    assert outcome.first_process() is first
    from lightning.fabric.utilities.rank_zero import _get_rank  # what Lightning itself makes of the variables

    assert ((_get_rank() or 0) == 0) is first


def test_networks_are_registered_with_a_timm_that_comes_later():
    """Also where somebody asked first whether there is a timm, and imports a part of it."""
    code = (
        f"import repmlp, sys, importlib.util; assert not {HEAVY} & set(sys.modules)\n"
        "assert importlib.util.find_spec('timm').name == 'timm' and 'timm' not in sys.modules\n"
        "import timm.models, timm\n"
        "assert timm.is_model('repmlpnet_t224') and timm.is_model('repmlp_faceres_96')\n"
        "assert repmlp.models.build.build_model and repmlp.export.to_onnx\n"
        "print([f for f in sys.meta_path if type(f).__module__ == 'repmlp.imports'])"
    )
    assert python(code) == ["[]"]


def test_networks_are_registered_at_once_with_a_timm_that_is_there(monkeypatch):
    imported, finders = [], list(sys.meta_path)
    monkeypatch.setitem(sys.modules, "timm", sys.modules.get("timm"))
    monkeypatch.setattr(imports.importlib, "import_module", imported.append)
    imports.register_with_timm()
    assert imported == list(imports.NETWORKS) and sys.meta_path == finders


def test_whoever_registers_twice_waits_once(monkeypatch):
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for _ in range(2):
        imports.register_with_timm()
    assert sum(isinstance(finder, imports._AfterTimm) for finder in sys.meta_path) == 1
    assert importlib.util.find_spec("timm").name == "timm"


def test_what_networks_are_made_of_does_not_begin_with_timm():
    """timm imports the networks when it is there: whoever imports it first must not be needed by them then."""
    imports_of = {}
    for path in (ROOT / "repmlp").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        body = ast.parse(path.read_text()).body
        found = [node.module for node in body if isinstance(node, ast.ImportFrom)]
        imports_of[name] = found + [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
    reached, todo = set(), list(imports.NETWORKS)
    while todo:
        name = todo.pop()
        if name in imports_of and name not in reached:
            reached.add(name)
            todo += imports_of[name]
    assert "repmlp.models.mixers" in reached and "repmlp.injection" in reached
    for name in reached:
        inside = name.startswith("repmlp.models.")  # behind `import timm` in repmlp/models/__init__.py
        assert inside or not any(module.split(".")[0] == "timm" for module in imports_of[name]), name


def test_names_of_the_package_agree():
    """What a type checker sees, where the names are, and __all__ are the same; every name is there."""
    tree = ast.parse((ROOT / "repmlp/__init__.py").read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {node.module: tuple(alias.name for alias in node.names) for node in checked.body}
    assert seen == {f"repmlp.{home}": names for home, names in repmlp.HOMES.items()}
    names = [name for home in repmlp.HOMES.values() for name in home]
    assert sorted(names) == sorted(repmlp.__all__) and set(names) <= set(dir(repmlp))
    for home, names in repmlp.HOMES.items():
        module = sys.modules[getattr(repmlp, names[0]).__module__]
        assert all(getattr(repmlp, name) is getattr(module, name) for name in names), home
    with pytest.raises(AttributeError, match="module 'repmlp' has no attribute 'nothing'"):
        repmlp.nothing  # noqa: B018
    with pytest.raises(AttributeError, match=r"module 'repmlp\.models' has no attribute 'nothing'"):
        repmlp.models.nothing  # noqa: B018
