"""Command line, logs, checkpoints, signals and errors of common.Run, on a learner that costs nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
from common import Metrics, Run, RunError, UserError, parse_args

ROOT = Path(__file__).parents[1]


@dataclass
class Args:
    env: str = "pendulum-demo-medium"
    seed: tuple[int, ...] = (0,)
    steps: int = 100
    batch_size: int = 4
    device: str = "cpu"
    eval_every: int = 50
    eval_episodes: int = 0
    log_every: int = 10
    checkpoint_every: int = 20
    out: str = "runs"
    resume: bool = False
    data_path: str | None = None
    evaluate: str | None = None
    video: bool = False
    wandb: bool = False
    head_start: int = 10
    lr: float = 1.0


class Counter:
    """A learner whose one parameter counts updates."""

    def __init__(self, args, data=None, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.metrics = Metrics()
        self.weight = torch.zeros(())
        self.state = dict(weight=self.weight, generator=self.generator)
        self.seed = seed

    def update(self):
        self.weight += 1
        self.metrics.add(toy_loss=self.weight.clone())

    def act(self, obs, generator):
        return torch.zeros(len(obs), 1)


def data():
    dims = dict(obs_dim=3, action_dim=1, max_action=1.0)
    return SimpleNamespace(
        **dims, episode_returns=np.array([-3.0, -1.0]), make_env=lambda: common.make_env("pendulum-demo-medium")
    )


def make_run(tmp_path, learners=None, **settings):
    args = Args(out=str(tmp_path), **settings)
    learners = learners or [Counter(args, None, seed) for seed in args.seed]
    return Run(args, learners, data(), __file__), learners


def train(run, learners, steps=100, phase="update", **options):
    for _ in run.updates(phase, steps, **options):
        for learner in learners:
            learner.update()


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


SETTINGS = {
    "hopper-medium-v2": dict(lr=0.5, steps=1000, head_start=100),
    "hopper-medium-replay-v2": dict(lr=0.25),
    "pendulum-demo-medium": dict(lr=0.125),
}


def parsed(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["x.py", "--device", "cpu", *flags])
    return parse_args(Args, SETTINGS, proportional=("head_start",))


def test_lengths_keep_their_proportion_to_steps(monkeypatch):
    assert parsed(monkeypatch, "--env", "hopper-medium-v2").head_start == 100
    args = parsed(monkeypatch, "--env=hopper-medium-v2", "--steps", "50")
    assert (args.steps, args.head_start, args.lr) == (50, 5, 0.5)
    args = parsed(monkeypatch, "--env", "hopper-medium-v2", "--steps", "50", "--head-start=7")
    assert args.head_start == 7


@pytest.mark.parametrize(
    "env, lr", [("Hopper-v4", 0.5), ("mujoco/hopper/medium-v0", 0.5), ("hopper-medium-replay-v1", 0.25)]
)
def test_an_unlisted_env_gets_its_nearest_relative_and_says_so(monkeypatch, capsys, env, lr):
    assert parsed(monkeypatch, "--env", env).lr == lr
    assert "note: no settings for" in capsys.readouterr().out
    assert parsed(monkeypatch, "--env", "walker2d-medium-v2").lr == 1.0


@pytest.mark.parametrize(
    "flags", [["--steps", "0"], ["--batch-size", "-1"], ["--seed", "1", "1"], ["--device", "tpu9"]]
)
def test_bad_settings_are_refused(monkeypatch, flags):
    with pytest.raises(UserError):
        parsed(monkeypatch, *flags)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--nonsense 3", "Unrecognized options: --nonsense"),
        ("--stesp 3", "--stesp, 3 (did you mean --steps?)"),
        ("--steps abc", "--steps: invalid literal for int() with base 10: 'abc'"),
        ("--steps", "Missing value for argument '--steps'"),
        ("--env", "Missing value for argument '--env'"),
        ("--video --evaluate", "Missing value for argument '--evaluate'"),
        ("3", "Unrecognized options: 3"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(monkeypatch, capsys, flags, words):
    with pytest.raises(SystemExit) as stopped:
        common.cli(lambda: parsed(monkeypatch, *flags.split()))
    out, error = capsys.readouterr()
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert words in error and "--help" in error and out == ""


def test_help_explains_every_setting(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        common.cli(lambda: parsed(monkeypatch, "--help"))
    out, error = capsys.readouterr()
    assert stopped.value.code == 0 and error == "" and "--head-start" in out and "--batch-size" in out


def test_env_help_lists_the_datasets(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(monkeypatch, "--env", "help")
    assert stopped.value.code == 0 and "hopper-medium-v2" in capsys.readouterr().out


def test_metrics_are_means_since_the_last_read():
    metrics = Metrics()
    for value in (1.0, 3.0):
        metrics.add(a=torch.tensor(value), b=torch.tensor(10 * value))
    metrics.add(rare=torch.tensor(7.0))
    assert metrics.read() == dict(a=2.0, b=20.0, rare=7.0)
    assert metrics.read() == {}


def test_csv_grows_by_columns_and_resumes_without_doubles(tmp_path):
    run, learners = make_run(tmp_path)
    train(run, learners, 30, phase="first")
    for _ in run.updates("second", 20):
        learners[0].metrics.add(other=torch.tensor(1.0))
    rows = common.read_csv(run.folders[0] / "metrics.csv")
    assert [(row["phase"], row["step"]) for row in rows] == [
        ("first", 10),
        ("first", 20),
        ("first", 30),
        ("second", 10),
        ("second", 20),
    ]
    assert "toy_loss" in rows[0] and "other" in rows[3] and "other" not in rows[0]
    again, _ = make_run(tmp_path, resume=True)
    assert again.done == ["first", "second"] and common.read_csv(again.folders[0] / "metrics.csv") == rows


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path, number, capsys):
    run, learners = make_run(tmp_path, eval_episodes=1, eval_every=30)
    with pytest.raises(SystemExit) as stopped:
        for count, _ in enumerate(run.updates("update", 100, evaluate=True)):
            learners[0].update()
            if count == 33:
                os.kill(os.getpid(), number)
    assert stopped.value.code == 128 + number and "--resume continues" in capsys.readouterr().err
    assert (run.folders[0] / "curve.png").exists()
    run, learners = make_run(tmp_path, resume=True)
    assert run.step == 34 and learners[0].weight == 34
    train(run, learners)
    assert learners[0].weight == 100


def test_curves_are_drawn_now_and_then(tmp_path):
    run, learners = make_run(tmp_path, eval_episodes=1, eval_every=10)
    run.drawn += 1000  # seconds
    there = []
    for count, _ in enumerate(run.updates("update", 30, evaluate=True)):
        learners[0].update()
        there.append((run.folders[0] / "curve.png").exists())
        if count == 15:
            run.drawn -= 2000
    assert there == [False] * 20 + [True] * 10


def test_stride_rounds_a_phase_up(tmp_path):
    run, learners = make_run(tmp_path)
    calls = sum(1 for _ in run.updates("update", 21, stride=5))
    assert calls == 5 and run.step == 25


def test_at_end_runs_once_and_stands_in_the_checkpoint(tmp_path):
    run, learners = make_run(tmp_path)
    train(run, learners, 10, phase="first", at_end=lambda: learners[0].weight.fill_(-5))
    run, learners = make_run(tmp_path, resume=True)
    assert learners[0].weight == -5
    train(run, learners, 10, phase="first", at_end=lambda: pytest.fail("ran again"))


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    run, learners = make_run(tmp_path)
    train(run, learners, 20)

    def full(data, path):
        Path(path).write_bytes(b"x")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match="disk full"):
        run.save()
    assert not list(tmp_path.rglob("*.part"))
    assert common.load_checkpoint(run.folders[0])["step"] == 20


def test_a_non_finite_metric_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    run, learners = make_run(tmp_path)
    with pytest.raises(RunError, match="toy_loss became nan before update update 50"):
        for count, _ in enumerate(run.updates("update", 100)):
            learners[0].update()
            if count == 44:
                learners[0].weight.fill_(float("nan"))
    assert common.load_checkpoint(run.folders[0])["step"] == 40


def test_an_earlier_run_is_moved_aside(tmp_path, capsys):
    run, learners = make_run(tmp_path)
    train(run, learners, 20)
    run, _ = make_run(tmp_path)
    assert common.load_checkpoint(run.root / "seed0.old1")["step"] == 20
    assert "seed0.old1" in capsys.readouterr().out


def test_resume_refuses_other_settings(tmp_path):
    run, learners = make_run(tmp_path)
    train(run, learners, 20)
    with pytest.raises(UserError, match="--lr was 1.0"):
        make_run(tmp_path, resume=True, lr=2.0)
    make_run(tmp_path, resume=True, log_every=5)


def test_resume_without_a_checkpoint_starts_afresh(tmp_path, capsys):
    run, learners = make_run(tmp_path, resume=True)
    assert run.step == 0 and "no checkpoint to resume" in capsys.readouterr().out


def test_resume_of_seeds_that_stand_apart(tmp_path):
    run, learners = make_run(tmp_path, seed=(0, 1))
    train(run, learners, 20, phase="first")
    alone, learners = make_run(tmp_path, seed=(1,), resume=True)
    train(alone, learners, 40, phase="second")
    with pytest.raises(UserError, match="each seed on its own"):
        make_run(tmp_path, seed=(0, 1), resume=True)


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    run, learners = make_run(tmp_path)
    train(run, learners, 20)
    path = run.folders[0] / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-200] if damage is None else damage)
    with pytest.raises(RunError, match="checkpoint.pt cannot be read"):
        make_run(tmp_path, resume=True)


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(UserError, match="no checkpoint.pt"):
        common.load_checkpoint(tmp_path)
    with pytest.raises(UserError, match="args.json"):
        common.saved_args(tmp_path, Args)


def test_several_seeds_write_their_folders_and_a_summary(tmp_path, capsys):
    run, learners = make_run(tmp_path, seed=(0, 1, 2), eval_episodes=1)
    train(run, learners, 100, evaluate=True)
    run.finish()
    for seed in range(3):
        about = json.loads((run.root / f"seed{seed}" / "args.json").read_text())
        assert about["args"]["seed"] == [seed] and about["versions"]["torch"] == torch.__version__
    whole = json.loads((run.root / "summary.json").read_text())["return"]["last_five"]
    assert whole["mean"] == pytest.approx(np.mean(whole["seeds"])) and len(whole["seeds"]) == 3
    assert whole["stderr"] == pytest.approx(np.std(whole["seeds"], ddof=1) / 3**0.5)
    assert whole["iqm_low"] <= whole["iqm"] <= whole["iqm_high"]
    for path in (run.root / "curve.png", run.root / "seed2" / "curve.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_interquartile_mean():
    assert common.interquartile_mean(np.array([0.0, 1.0, 2.0, 3.0, 100.0])) == 2.0
    assert common.interquartile_mean(np.array([4.0])) == 4.0


def test_wandb_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        make_run(tmp_path, wandb=True)
    logged = []
    fake = SimpleNamespace(init=lambda **kw: SimpleNamespace(log=logged.append, finish=lambda: logged.append("end")))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run, learners = make_run(tmp_path, wandb=True)
    train(run, learners, 20)
    run.finish()
    assert logged[0]["update/toy_loss"] == 5.5 and logged[-1] == "end"


def test_cli_turns_errors_into_a_sentence(capsys):
    for error, code in (
        (UserError("bad name"), 2),
        (RunError("broke"), 1),
        (OSError(28, "No space left", "f"), 1),
        (KeyboardInterrupt(), 130),
    ):

        def main(error=error):
            raise error

        with pytest.raises(SystemExit) as stopped:
            common.cli(main)
        message = capsys.readouterr().err
        assert stopped.value.code == code and message.startswith("error: ") and message.count("\n") == 1
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        common.cli(lambda: 1 / 0)


def test_kill_minus_nine(tmp_path):
    """A real process, killed for real, resumed: the same weights as a run that never stopped."""
    flags = (
        "--env pendulum-demo-medium --steps 200 --batch-size 16 --eval-episodes 0 --checkpoint-every 20 --device cpu"
    )
    command = [sys.executable, str(ROOT / "dtql.py"), *flags.split(), "--out"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=env, capture_output=True)
    process = subprocess.Popen([*command, str(tmp_path / "killed")], env=env, stdout=subprocess.DEVNULL)
    where = "dtql/pendulum-demo-medium/seed0"
    while not (tmp_path / "killed" / where / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    subprocess.run([*command, str(tmp_path / "killed"), "--resume"], check=True, env=env, capture_output=True)
    first, second = (common.load_checkpoint(tmp_path / out / where)["learner"]["actor"] for out in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
