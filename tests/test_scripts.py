"""What every script promises, checked through its real entry point on a tiny run with all its phases."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

import common

ROOT = Path(__file__).parents[1]
LEARNERS = dict(bdm_rebrac_sbc="BDM", cped="CPED", dac="DAC", dtql="DTQL", qdq="QDQ", srpo="SRPO")
SCRIPTS = [name for name in LEARNERS if (ROOT / f"{name}.py").exists()]
ENV = "pendulum-demo-medium"
SCENES = dict(bdm_rebrac_sbc="bandit-ring", cped="bandit-ring", dac="bandit-2gaussians", dtql="bandit-swissroll-far",
              qdq="bandit-ring", srpo="bandit-8gaussians")  # fmt: skip
TINY = f"--env {ENV} --device cpu --steps 20 --batch-size 16 --eval-every 10 --eval-episodes 2 "
TINY = [*TINY.split(), "--log-every", "5", "--checkpoint-every", "2"]

PHASES = dict(  # updates in one call, whether the policy is evaluated
    bdm_rebrac_sbc=dict(update=(2, True)), cped=dict(behavior=(5, False), policy=(2, True)), dac=dict(update=(1, True)),
    dtql=dict(pretrain=(1, False), update=(1, True)),
    qdq=dict(score=(1, False), consistency=(5, False), policy=(2, True)),
    srpo=dict(critic=(1, False), behavior=(1, False), policy=(1, True)),
)  # fmt: skip

every_script = pytest.mark.parametrize("name", SCRIPTS)


class Killed(BaseException):
    """Stands in for a process that is gone: nothing between here and the test handles it."""


@pytest.fixture
def start(monkeypatch, capsys):
    """start(name, *flags): run a script in this process; returns its module."""

    def start(name, *flags):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *TINY, *map(str, flags)])
        module = importlib.import_module(name)
        common.cli(module.main)
        return module

    return start


WHOLE = {}


@pytest.fixture
def whole(name, start, tmp_path_factory):
    """The folder of a tiny run that nothing stops, shared by the tests of a script."""
    if name not in WHOLE:
        WHOLE[name] = tmp_path_factory.mktemp("whole")
        start(name, "--out", WHOLE[name])
    return WHOLE[name]


def folder(out, name, seed=0, env=ENV):
    return Path(out) / name / env / f"seed{seed}"


def learned(out, name, seed=0, env=ENV):
    """All tensors of a checkpoint, by path."""

    def flatten(value, path):
        if isinstance(value, dict):
            for key in value:
                yield from flatten(value[key], f"{path}/{key}")
        elif isinstance(value, list):
            for i, item in enumerate(value):
                yield from flatten(item, f"{path}/{i}")
        elif isinstance(value, torch.Tensor):
            yield path, value

    return dict(flatten(common.load_checkpoint(folder(out, name, seed, env))["learner"], ""))


def assert_same(first, second):
    assert first.keys() == second.keys() and first
    different = [path for path in first if not torch.equal(first[path], second[path])]
    assert not different


@every_script
def test_command_line(name, tmp_path):
    """One command, all phases, from a foreign folder; the run folder holds what it should, stderr stays empty."""
    command = [sys.executable, str(ROOT / f"{name}.py"), *TINY, "--out", "out"]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    run = folder(tmp_path / "out", name)
    files = {path.name for path in run.iterdir()}
    assert {"args.json", f"{name}.py", "common.py", "metrics.csv", "curve.png"} <= files
    assert {"checkpoint.pt", "summary.json"} <= files
    assert any(file.startswith("events.out") for file in files)
    assert not list(run.glob("*.part")) and not (tmp_path / "MUJOCO_LOG.TXT").exists()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["evaluations"] == 2 and math.isfinite(summary["return"]["last"])
    assert summary["protocol"] == importlib.import_module(name).PROTOCOL
    rows = common.read_csv(run / "metrics.csv")
    assert [row["step"] for row in rows if "return" in row] == [10, 20]
    assert len({row["phase"] for row in rows}) == len(summary["updates_per_second"])
    for word in ("last", "best", "data", "speed", "files"):
        assert any(line.startswith(word) for line in result.stdout.splitlines())


@every_script
def test_same_seed_same_run_and_seeds_keep_their_own_draws(name, start, tmp_path):
    """A seed gives the same numbers again, alone or in company, whatever the state of the global generators."""
    start(name, "--out", tmp_path / "alone", "--seed", 1)
    torch.manual_seed(999)
    start(name, "--out", tmp_path / "company", "--seed", 0, 1)
    assert_same(learned(tmp_path / "alone", name, 1), learned(tmp_path / "company", name, 1))
    own = [folder(tmp_path / out, name, 1).glob("*.png") for out in ("alone", "company")]  # the script's, of this seed
    own = [{path.name: path.read_bytes() for path in paths if path.name != "curve.png"} for paths in own]
    assert own[0] == own[1]
    first, second = (learned(tmp_path / "company", name, seed) for seed in (0, 1))
    assert any(not torch.equal(first[path], second[path]) for path in first)
    summary = json.loads((tmp_path / "company" / name / "pendulum-demo-medium" / "summary.json").read_text())
    assert len(summary["return"]["last"]["seeds"]) == 2


@every_script
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_killed_and_resumed(name, part, start, whole, tmp_path, monkeypatch):
    """Killed after some updates, again during a checkpoint, then resumed: bit for bit the run that never stopped."""
    module, done = importlib.import_module(name), common.load_checkpoint(folder(whole, name))["done"]
    plain, left = common.capture, [int(part * sum(done[phase] // PHASES[name][phase][0] for phase in done))]

    def capture_until_killed(learners, phase):
        update = plain(learners, phase)

        def step():
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            update()

        return step

    with monkeypatch.context() as patch:
        patch.setattr(module, "capture", capture_until_killed)
        with pytest.raises(Killed):
            start(name, "--out", tmp_path / "killed")
        left[0] = 10**6

        def half_a_checkpoint(data, path):
            Path(path).write_bytes(b"half")
            raise Killed

        with monkeypatch.context() as inner, pytest.raises(Killed):
            inner.setattr(torch, "save", half_a_checkpoint)
            start(name, "--out", tmp_path / "killed", "--resume")
    start(name, "--out", tmp_path / "killed", "--resume")
    assert_same(learned(whole, name), learned(tmp_path / "killed", name))
    rows = [common.read_csv(folder(out, name) / "metrics.csv") for out in (whole, tmp_path / "killed")]
    evaluated = [[(row["phase"], row["step"], row["return"]) for row in some if "return" in row] for some in rows]
    assert evaluated[0] == evaluated[1]
    _, *lines = (folder(tmp_path / "killed", name) / "metrics.csv").read_text().splitlines()
    assert all(line.split(",")[1].isdigit() for line in lines)  # rows that were read and written again


@every_script
def test_saved_policy_scores_the_same_again(name, whole, capsys, monkeypatch):
    module, run = importlib.import_module(name), folder(whole, name)
    last = json.loads((run / "summary.json").read_text())["return"]["last"]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--evaluate", str(run), "--eval-episodes", "2"])
    monkeypatch.setattr(module, "load_dataset", None)  # no data are needed, nothing is trained
    common.cli(module.main)
    assert f"return {last:.1f}" in capsys.readouterr().out
    act = common.load_policy(getattr(module, LEARNERS[name]), module.Args, run)
    action = act([[1.0, 0.0, 0.0]])
    assert action.shape == (1, 1) and abs(action).max() <= 1


@every_script
def test_command_line_beats_paper_beats_default(name, monkeypatch):
    module = importlib.import_module(name)
    env, table = next((env, table) for env, table in module.PAPER.items() if len(table) > 1)

    def settings(*flags):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--env", env, "--device", "cpu", *flags])
        return common.parse_args(module.Args, module.PAPER | module.OURS)

    args = settings()
    assert all(getattr(args, key) == value for key, value in table.items())
    untouched = [field for field in ("gamma", "batch_size") if field not in table]
    assert all(getattr(args, field) == getattr(module.Args(), field) for field in untouched)
    assert settings("--batch-size", "7", "--steps", "11").batch_size == 7
    number = next(key for key, value in table.items() if type(value) in (int, float) and key != "paper_score")
    assert getattr(settings(common.flag(number), "7"), number) == 7


UNIT = ("gamma", "tau", "consistency_tau", "expectile", "dropout")  # at most 1
ANY = ("paper_score", "reward_offset", "reward_scale", "epsilon")


@every_script
def test_numbers_out_of_range_are_refused(name, monkeypatch):
    module, plain = importlib.import_module(name), f"{name}.py --device cpu".split()
    monkeypatch.setattr(module, "load_dataset", None)  # before anything is read
    for field, hint in get_type_hints(module.Args).items():
        if {int, float} & {hint, *get_args(hint)} and field not in ANY:
            for value in ("-1", "2") if field in UNIT else ("-1",):
                monkeypatch.setattr(sys, "argv", [*plain, common.flag(field), value])
                with pytest.raises(common.UserError, match=f"{common.flag(field)} (must|takes)"):
                    module.main()


@every_script
def test_tables_name_real_fields_and_datasets(name):
    module = importlib.import_module(name)
    names = common.list_datasets()
    for env, table in (module.PAPER | module.OURS).items():
        assert set(table) <= set(vars(module.Args())), env
        assert env.startswith("bandit-") or env in names, env
    assert set(getattr(module, "PUBLISHED", {})) <= set(module.PAPER) and module.PROTOCOL


@every_script
def test_what_main_hands_to_the_run(name, start, monkeypatch):
    module, asked = importlib.import_module(name), {}

    class Run:
        folders = ()

        def __init__(self, args, learners, data, script, protocol, phases):
            assert [learner.generator.initial_seed() for learner in learners] == [3, 5]
            assert all(learner.args is args and learner.data is data for learner in learners)
            assert (Path(script), protocol) == (ROOT / f"{name}.py", module.PROTOCOL)
            assert list(phases) == list(PHASES[name])

        def updates(self, phase, stride=1, evaluate=False, at_end=None):
            asked[phase] = stride, evaluate
            return ()

        def finish(self):
            asked["finished"] = True

    monkeypatch.setattr(module, "Run", Run)
    start(name, "--seed", 3, 5)
    assert list(asked.items()) == [*PHASES[name].items(), ("finished", True)]


@every_script
def test_an_environment_is_needed_only_to_evaluate(name, start, monkeypatch):
    asked = []

    def load_dataset(*_, judge, **more):
        asked.append(judge)
        raise common.UserError("far enough")

    monkeypatch.setattr(importlib.import_module(name), "load_dataset", load_dataset)
    for episodes in (0, 1):
        with pytest.raises(SystemExit):
            start(name, "--eval-episodes", episodes)
    assert asked == [False, True]


@pytest.mark.parametrize("name", ["bdm_rebrac_sbc", "dac", "qdq", "srpo"])
def test_rows_in_no_order_are_refused_where_episodes_count(name, start, monkeypatch, capsys):
    data = common.load_dataset(ENV)
    data.episode = None
    monkeypatch.setattr(importlib.import_module(name), "load_dataset", lambda *_, **more: data)
    with pytest.raises(SystemExit):
        start(name)
    assert "order" in capsys.readouterr().err


@every_script
def test_nan_in_the_data_stops_the_run(name, start, tmp_path, monkeypatch, capsys):
    module = importlib.import_module(name)
    plain = common.load_dataset

    def poisoned(*args, **kwargs):
        data = plain(*args, **kwargs)
        data.obs.fill_(math.nan)
        return data

    monkeypatch.setattr(module, "load_dataset", poisoned)
    with pytest.raises(SystemExit) as stopped:
        start(name, "--out", tmp_path)
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and "became nan" in error and error.count("\n") == 1
    assert not (folder(tmp_path, name) / "checkpoint.pt").exists()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def summary(out, name, env):
    return json.loads((Path(out) / name / env / "seed1" / "summary.json").read_text())


@needs_gpu
@pytest.mark.parametrize("name, env", [(name, env) for name, scene in SCENES.items() for env in (ENV, scene)])
def test_captured_equals_plain_and_alone_equals_company(name, env, start, tmp_path):
    """On CUDA: graphs on two streams give, for each seed, what plain updates give it alone; on the bandits too."""
    start(name, "--env", env, "--device", "cuda", "--out", tmp_path / "captured", "--seed", 0, 1)
    start(name, "--env", env, "--device", "cuda:0", "--no-cuda-graphs", "--out", tmp_path / "plain", "--seed", 1)
    assert_same(*(learned(tmp_path / out, name, 1, env) for out in ("captured", "plain")))
    assert [summary(tmp_path / out, name, env)["cuda_graphs"] for out in ("captured", "plain")] == [True, False]


@needs_gpu
@every_script
@pytest.mark.parametrize("here, there", [("cuda", "cpu"), ("cpu", "cuda")])
def test_captured_run_goes_on_elsewhere(name, here, there, start, tmp_path, monkeypatch, capsys):
    """Trained on CUDA, then scored, loaded and lengthened on the CPU, and the reverse."""
    module, run = start(name, "--device", here, "--out", tmp_path), folder(tmp_path, name)
    act = common.load_policy(getattr(module, LEARNERS[name]), module.Args, run, there)
    assert act([[1.0, 0.0, 0.0]]).shape == (1, 1)
    capsys.readouterr()
    start(name, "--resume", run, "--steps", 30, "--device", there)
    assert "another kind of device" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--evaluate", str(run), "--device", here])
    common.cli(module.main)


@every_script
def test_unknown_env_is_one_sentence(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--env", "nonsense"])
    with pytest.raises(SystemExit) as stopped:
        common.cli(importlib.import_module(name).main)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "nonsense" in error and error.count("\n") == 1


def test_common_holds_no_algorithm_and_scripts_import_only_common():
    assert not re.search(r"torch\.nn|from torch import .*\bnn\b", (ROOT / "common.py").read_text())
    others = rf"^\s*(from|import)\b.*\b({'|'.join(LEARNERS)})\b"
    for name in SCRIPTS:
        assert not re.search(others, (ROOT / f"{name}.py").read_text(), re.MULTILINE)
