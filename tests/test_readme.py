"""The README's code runs as printed."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LEARNERS = dict(bdm_rebrac_sbc="BDM", cped="CPED", dac="DAC", dtql="DTQL", qdq="QDQ", srpo="SRPO")
LEARNERS = {name: learner for name, learner in LEARNERS.items() if (ROOT / f"{name}.py").exists()}


def block(marker):
    """The Python block of the README that contains `marker`."""
    return next(code for code in re.findall(r"```python\n(.*?)```", README, flags=re.S) if marker in code)


def run(command, folder):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)


def test_a_lifted_script_runs_with_the_twenty_lines(tmp_path):
    code = (ROOT / "tests/lifted/common.py").read_text().split('"""', 2)[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    for file in ("tests/lifted/common.py", "tests/lifted/my_training.py", "dtql.py"):
        shutil.copy(ROOT / file, tmp_path)
    result = run(["my_training.py"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "tensor([[" in result.stdout and "actor_loss" in result.stdout


def test_every_script_lifts(tmp_path):
    """Each script imports and builds its learner on the twenty lines, and nothing else of this project."""
    shutil.copy(ROOT / "tests/lifted/common.py", tmp_path)
    for name in LEARNERS:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    code = f"""
import importlib, torch, common
columns = dict(obs=(9, 3), action=(9, 2), reward=(9,), next_obs=(9, 3), next_action=(9, 2), terminal=(9,))
data = common.Data(**{{key: torch.rand(shape) for key, shape in columns.items()}})
for name, learner in {LEARNERS}.items():
    module = importlib.import_module(name)
    learner = getattr(module, learner)(module.Args(device="cpu"), data, 0)
    with torch.no_grad():
        print(name, learner.act(torch.zeros(1, 3), learner.generator).shape)
"""
    result = run(["-c", code], tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("[1, 2]") == len(LEARNERS), result.stdout


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
        for flag in set(re.findall(r"--([\w-]+)", flags)) - {"help"}:
            field = flag.replace("-", "_")
            assert field in args or field.removeprefix("no_") in args, f"{name}.py --{flag}"


def test_the_table_of_the_papers_is_that_of_the_scripts():
    """Each row of the published table holds what the scripts print beside their own scores."""
    rows = re.findall(r"^\| ([\w-]+-v\d) \|(.*)\|$", (ROOT / "tests/results/README.md").read_text(), flags=re.M)
    table = {env: [cell.strip() for cell in cells.split("|")] for env, cells in rows}
    modules = [importlib.import_module(name) for name in ("dtql", "srpo", "dac", "qdq", "cped", "bdm_rebrac_sbc")]
    tables = [module.PAPER for module in modules] + [modules[-1].SBC]
    assert set(table) == set().union(*tables)
    for env, cells in table.items():
        assert cells == [str(rows[env]["paper_score"]) if env in rows else "" for rows in tables], env
