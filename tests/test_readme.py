"""The README's code runs as printed."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SCRIPTS = ("bdm_rebrac_sbc", "cped", "dac", "dtql", "qdq", "srpo")


def block(marker):
    """The Python block of the README that contains `marker`."""
    return next(code for code in re.findall(r"```python\n(.*?)```", README, flags=re.S) if marker in code)


def run(command, folder):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("name", [name for name in SCRIPTS if (ROOT / f"{name}.py").exists()])
def test_a_lifted_script_runs_with_the_twenty_lines(name, tmp_path):
    code = block("def load_dataset")
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("#")]) <= 32
    (tmp_path / "common.py").write_text(code)
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    result = run([f"{name}.py", "--steps", "20", "--batch-size", "16"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / f"{name}.pt").exists()


def test_loading_a_policy(tmp_path, monkeypatch):
    flags = "--env pendulum-demo-medium --steps 10 --eval-episodes 1 --out runs --device cpu"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dtql.py", *flags.split()])
    importlib.import_module("common").cli(importlib.import_module("dtql").main)
    code = block("load_policy").replace("halfcheetah-demo-medium-replay", "pendulum-demo-medium")
    (tmp_path / "act.py").write_text(code)
    result = subprocess.run([sys.executable, "act.py"], env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path,
                            capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert -2000 < float(result.stdout.split()[-1]) < 0


def test_every_command_of_the_readme_parses():
    """Each `python <script>.py ...` line names an existing script and flags that it has."""
    commands = re.findall(r"^(?:\.venv/bin/)?python (\w+)\.py(.*?)(?:\s#.*)?$", README, flags=re.M)
    assert commands
    for name, flags in commands:
        args = vars(importlib.import_module(name).Args())
        for flag in re.findall(r"--([\w-]+)", flags):
            field = flag.replace("-", "_")
            assert field in args or field.removeprefix("no_") in args, f"{name}.py --{flag}"
