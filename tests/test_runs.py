"""Command line, logs, checkpoints, signals and errors of common.Run, on a learner that costs nothing."""

import contextlib
import errno
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch

import common
from common import Metrics, Run, RunArgs, RunError, UserError, parse_args

ROOT = Path(__file__).parents[1]


@dataclass
class Args(RunArgs):
    env: str = "pendulum-demo-medium"
    steps: int = 100
    batch_size: int = 4
    device: str = "cpu"
    eval_every: int = 50
    eval_episodes: int = 0
    log_every: int = 10
    checkpoint_every: int = 20
    # Updates before
    # the first
    head_start: int = 10
    lr: float = 1.0  # Learning rate, 100 % of it
    lr_decay: bool = False  # Whether it decays
    mode: Literal["soft", "hard"] = "soft"
    weights: tuple[float, ...] = (1.0, 2.0)
    bound: float | None = None


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


class Data(SimpleNamespace):
    """What a Run reads of a Dataset."""

    obs_dim, action_dim, max_action, fingerprint = 3, 1, 1.0, "abc"
    episode_returns = np.array([-3.0, -1.0])

    def __len__(self):
        return 9

    def make_env(self, max_episode_steps):
        return common.make_env("pendulum-demo-medium", max_episode_steps=max_episode_steps)


def make_run(tmp_path, data=None, phases=None, **settings):
    """A new run; one before it in this process is over."""
    common.release()
    args = Args(out=str(tmp_path), **settings)
    learners = [Counter(args, None, seed) for seed in args.seed]
    return Run(args, learners, data or Data(), __file__, "", dict(phases or {})), learners


def resumed(monkeypatch, *flags, data=None, phases=None):
    """A run that continues as the command line says."""
    common.release()
    args = parsed(monkeypatch, *flags)
    learners = [Counter(args, None, seed) for seed in args.seed]
    return Run(args, learners, data or Data(), __file__, "", dict(phases or {})), learners


def updates(run, phase, steps, **options):
    run.phases[phase] = steps
    return run.updates(phase, **options)


def train(run, learners, steps=100, phase="update", **options):
    for _ in updates(run, phase, steps, **options):
        for learner in learners:
            learner.update()


@pytest.fixture(autouse=True)
def release():
    """Signal handlers and locks are given back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    common.release()
    assert signal.getsignal(signal.SIGTERM) == before


SETTINGS = {
    "hopper-medium-v2": dict(lr=0.5, steps=1000, head_start=100),
    "hopper-medium-replay-v2": dict(lr=0.25),
    "pendulum-demo-medium": dict(lr=0.125),
}


def parsed(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["x.py", *map(str, flags)])
    return parse_args(Args, SETTINGS, proportional=("head_start",))


def test_lengths_keep_their_proportion_to_steps(monkeypatch):
    assert parsed(monkeypatch, "--env", "hopper-medium-v2").head_start == 100
    args = parsed(monkeypatch, "--env", "hopper-medium-v2", "--steps", "200")
    assert (args.eval_every, args.log_every) == (10, 2)  # as many evaluations and rows as the whole run
    args = parsed(monkeypatch, "--env=hopper-medium-v2", "--steps", "50")
    assert (args.steps, args.head_start, args.lr) == (50, 5, 0.5)
    args = parsed(monkeypatch, "--env", "hopper-medium-v2", "--steps", "50", "--head-start=7")
    assert args.head_start == 7


@pytest.mark.parametrize(
    "env, lr",
    [
        ("Hopper-v4", 0.5),
        ("mujoco/hopper/medium-v0", 0.5),
        ("gymnasium:Hopper-v4", 0.5),
        ("hopper-medium-replay-v1", 0.25),
        ("Pendulum-v1", 0.125),  # built-in data lend theirs only where the paper has none of the family
    ],
)
def test_an_unlisted_env_gets_its_nearest_relative_and_says_so(monkeypatch, capsys, env, lr):
    assert parsed(monkeypatch, "--env", env).lr == lr
    assert "note: no settings for" in capsys.readouterr().out


def test_an_env_without_any_relative_says_so(monkeypatch, capsys):
    assert parsed(monkeypatch, "--env", "zz-v0").lr == 1.0
    assert "using its defaults" in capsys.readouterr().out
    assert parsed(monkeypatch, "--env", "hopper-medium-v2").lr == 0.5 and capsys.readouterr().out == ""


def test_numbers_of_any_form(monkeypatch):
    assert [parsed(monkeypatch, "--lr", text).lr for text in ("-1e-3", "-.5", "1e-3", "-2")] == [-1e-3, -0.5, 1e-3, -2]


def test_a_whole_number_is_the_same_number_when_resumed(tmp_path, monkeypatch):
    run, learners = make_run(tmp_path, lr=1, weights=(1, 2))  # as from a table
    train(run, learners)
    assert parsed(monkeypatch, "--resume", run.place, "--lr", "1", "--weights", "1", "2").lr == 1


def test_a_link_in_place_of_a_run_is_refused(tmp_path):
    """Its lock would be that of the folder it leads to, which a second run does not ask for."""
    run, _ = make_run(tmp_path / "elsewhere")
    place = Path(str(run.place).replace("elsewhere", "here"))
    place.parent.mkdir(parents=True)
    place.symlink_to(run.place)
    with pytest.raises(UserError, match="seed0 is a symbolic link"):
        make_run(tmp_path / "here")
    assert place.is_symlink() and (run.place / "args.json").exists()


def test_the_summary_of_all_seeds_is_said_to_be_of_before(tmp_path, monkeypatch, capsys):
    run, learners = make_run(tmp_path, seed=(0, 1), steps=20)
    train(run, learners, 20)
    run.finish()
    for seed in ("0", "1"):
        run, learners = resumed(monkeypatch, "--resume", run.root, "--seed", seed, "--steps", "40")
        train(run, learners, 40)
        run.finish()
        assert f"summary.json is of several seeds as they were; --resume {run.root} renews" in capsys.readouterr().out
    run, learners = resumed(monkeypatch, "--resume", run.root)
    train(run, learners, 40)
    run.finish()
    assert json.loads((run.root / "summary.json").read_text())["steps"] == 40
    assert "as they were" not in capsys.readouterr().out
    assert parsed(monkeypatch, "--env", "walker2d-medium-v2").lr == 1.0


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--steps 0", "--steps must be at least 1, found 0"),
        ("--batch-size -1", "--batch-size must be at least 1"),
        ("--max-episode-steps 0", "--max-episode-steps must be at least 1"),
        ("--seed 1 1", "different integers from 0 on, found 1 1"),
        ("--seed -1", "from 0 on, found -1"),
        ("--seed 99999999999", "from 0 on"),
        ("--device tpu9", "--device tpu9 cannot be used here"),
        ("--device meta", "--device meta cannot be used here"),
        ("--nonsense 3", "unknown setting --nonsense 3; --help"),
        ("--stesp 3", "unknown setting --stesp 3 (did you mean --steps?)"),
        ("--steps abc", "--steps: invalid int value: 'abc'"),
        ("--bound abc", "--bound: invalid float value: 'abc'"),
        ("--steps", "--steps: expected one argument"),
        ("--env", "--env: expected one argument"),
        ("--data-path=", "--data-path: invalid str value: ''"),
        ("--evaluate=", "--evaluate: invalid str value: ''"),
        ("--resume=", "--resume: invalid str value: ''"),
        ("--video --evaluate", "--evaluate: expected one argument"),
        ("--mode medium", "invalid choice: 'medium'"),
        ("3", "unknown setting 3"),
        ("--lr-decay True", "--lr-decay takes no value: write --lr-decay or --no-lr-decay"),
        ("--no-lr-decay=1", "--no-lr-decay takes no value: write --lr-decay or --no-lr-decay"),
        ("--video", "--video does nothing without --evaluate"),
        ("--out /dev/null/runs", "--out /dev/null/runs cannot be written: /dev/null is no folder"),
        ("--out gone", "--out gone cannot be written: "),
        ("--resume nowhere", "nowhere is not the folder of a run"),
        ("--evaluate nowhere", "nowhere is not the folder of a run"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(monkeypatch, capsys, tmp_path, flags, words):
    monkeypatch.chdir(tmp_path)
    Path("gone").symlink_to("nowhere")
    with pytest.raises(SystemExit) as stopped:
        common.cli(lambda: parsed(monkeypatch, *flags.split()))
    out, error = capsys.readouterr()
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert words in error and out == ""


def test_values_of_every_kind(monkeypatch):
    args = parsed(monkeypatch, *"--lr=2 --lr_decay --mode hard --weights 3 4.5 --bound 1 --seed 3 1 --no-wandb".split())
    assert (args.lr, args.lr_decay, args.mode, args.weights) == (2.0, True, "hard", (3.0, 4.5))
    assert (args.bound, args.seed, args.wandb) == (1.0, (3, 1), False)
    assert parsed(monkeypatch, "--bound", "None", "--no-lr-decay", "--lr", "-0.5").bound is None


@pytest.mark.parametrize("package, flags", [("wandb", "--wandb"), ("moviepy", "--video --evaluate RUN")])
def test_a_missing_package_is_told_first(tmp_path, monkeypatch, package, flags):
    run, _ = make_run(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        parsed(monkeypatch, *flags.replace("RUN", str(run.place)).split())


def test_home_in_a_flag_and_no_docstrings(monkeypatch):
    """Shells leave --out=~/runs as it is; python -OO has no docstrings."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys, "argv", ["x", "--out=~/runs"])
    assert parse_args(Args, {}, doc=None).out == "/home/me/runs"


def test_help_is_grouped_and_shows_the_values_of_the_env(monkeypatch, capsys):
    def help_of(*flags):
        with pytest.raises(SystemExit) as stopped:
            common.cli(lambda: parsed(monkeypatch, "--help", *flags))
        out, error = capsys.readouterr()
        assert stopped.value.code == 0 and error == "" and all("--" + name in out for name in ("batch-size", "mode"))
        assert "paper" not in out
        return " ".join(out.split())

    text = help_of("--env", "hopper-medium-v2")
    assert "those of hopper-medium-v2;" in text and "100 % of it (default: 0.5)" in text
    assert text.index("Updates before the first (default: 100)") < text.index("--seed")  # the algorithm's own first
    assert "Random seeds; several train side by side on one copy of the data (default: 0)" in text
    assert "those of pendulum-demo-medium;" in help_of() and "(default: 0.125)" in help_of()
    assert "those of hopper-medium-v2;" in help_of("--env", "Hopper-v4")
    assert "Updates between evaluations (default: 10)" in help_of()  # a tenth of the run, as it will be


def test_only_what_is_near_is_suggested():
    for env, words in (
        ("Hopper_medium-v1", "unknown dataset .*: did you mean hopper-medium-v2 or"),
        ("qqq", '^unknown dataset "qqq"; --env help lists all$'),
    ):
        with pytest.raises(UserError, match=words):
            common.load_dataset(env)


def test_env_help_lists_the_datasets(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(monkeypatch, "--env", "help")
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and all(f"  {name}\n" in text for name in ("hopper-medium-v2", "bandit-rings"))


def test_metrics_are_means_since_the_last_read():
    metrics = Metrics()
    for value in (1.0, 3.0):
        metrics.add(a=torch.tensor(value), b=torch.tensor(10 * value))
    metrics.add(rare=torch.tensor(7.0))
    assert metrics.read() == dict(a=2.0, b=20.0, rare=7.0)
    assert metrics.read() == {}


def test_csv_grows_by_columns_and_resumes_without_doubles(tmp_path, monkeypatch):
    run, learners = make_run(tmp_path)
    train(run, learners, 30, phase="first")
    for _ in updates(run, "second", 20):
        learners[0].metrics.add(other=torch.tensor(1.0))
    path = run.folders[0] / "metrics.csv"
    rows = common.read_csv(path)
    assert [(row["phase"], row["step"], row["total"]) for row in rows] == [
        ("first", 10, 10),
        ("first", 20, 20),
        ("first", 30, 30),
        ("second", 10, 40),
        ("second", 20, 50),
    ]
    assert "toy_loss" in rows[0] and "other" in rows[3] and "other" not in rows[0]
    again, _ = resumed(monkeypatch, "--resume", run.root)
    assert again.done == dict(first=30, second=20) and common.read_csv(path) == rows


# Processes


def test_a_second_start_is_refused_and_a_killed_run_resumes(tmp_path):
    """Real processes: the folder's lock lives as long as the first, whose end, killed and resumed, is bit for bit
    that of a run which never stopped."""
    flags = "--env pendulum-demo-medium --steps 200 --batch-size 16 --hidden 16 --eval-episodes 0 --checkpoint-every 20"
    command = [sys.executable, str(ROOT / "dtql.py"), *flags.split(), "--device", "cpu", "--out"]
    options = dict(env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, capture_output=True)
    subprocess.run([*command, str(tmp_path / "whole")], check=True, **options)
    place = tmp_path / "killed" / "dtql/pendulum-demo-medium/seed0"
    first = subprocess.Popen([*command, str(tmp_path / "killed")], env=options["env"], stdout=subprocess.DEVNULL)
    while not (place / "checkpoint.pt").exists():
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)  # it lives, but does not end
    second = subprocess.run([*command, str(tmp_path / "killed")], **options)
    since = json.loads((place / "args.json").read_text())["process"]["since"]
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert f"{place} is in use by process {first.pid} on" in second.stderr and f"since {since}" in second.stderr
    first.kill()
    assert first.wait() == -signal.SIGKILL
    subprocess.run([sys.executable, str(ROOT / "dtql.py"), "--resume", str(place)], check=True, **options)
    assert not place.with_name("seed0.old1").exists()
    ends = [common.load_checkpoint(tmp_path / out / place.relative_to(tmp_path / "killed"))["learner"]["actor"]
            for out in ("whole", "killed")]  # fmt: skip
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_common_needs_no_unix(tmp_path):
    """On Windows there is no fcntl, and two of the signals are missing."""
    code = f"""
import signal, sys
sys.modules["fcntl"] = None
del signal.SIGHUP, signal.SIGUSR1
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import common, test_runs
from pathlib import Path
run, learners = test_runs.make_run(Path({str(tmp_path)!r}))
test_runs.train(run, learners, 20)
run.finish()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")
    for number, words in ((37, "has no locks: nothing keeps a second run out"), (28, "")):
        monkeypatch.setattr(fcntl, "flock", lambda *_, number=number: (_ for _ in ()).throw(OSError(number, "x")))
        with contextlib.nullcontext() if words else pytest.raises(OSError):
            make_run(tmp_path)
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("other", ["link", "."])
def test_one_folder_has_one_lock_by_whatever_name(tmp_path, monkeypatch, other):
    run, _ = make_run(tmp_path)
    (tmp_path / "link").symlink_to(run.place, target_is_directory=True)
    monkeypatch.chdir(run.place if other == "." else tmp_path)
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()}.* common.release.. gives back"):
        common.lock(Path(other))


def test_the_code_of_a_run_starts_it_again(tmp_path):
    """The copy of the script goes aside with the earlier run; the new run has its code all the same."""
    first, _ = make_run(tmp_path)
    common.release()
    copy = first.place / Path(__file__).name
    Run(first.args, first.learners, Data(), copy, "", {})
    assert (tmp_path / "test_runs" / first.args.env / "seed0.old1").exists()
    assert copy.read_text() == Path(__file__).read_text() and (first.place / "common.py").exists()


# Signals

SIGNALS = [getattr(signal, name, 0) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]  # Windows lacks two


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path, number, capsys, monkeypatch):
    run, learners = make_run(tmp_path, eval_episodes=1, eval_every=30)
    with pytest.raises(SystemExit) as stopped:
        for count, _ in enumerate(updates(run, "update", 100, evaluate=True)):
            learners[0].update()
            if count == 33:
                os.kill(os.getpid(), number)
    assert stopped.value.code == 128 + number
    assert f"stopped at update 34 of 100; --resume {run.place} continues" in capsys.readouterr().err
    assert (run.place / "curve.png").exists()
    with common.lock(run.place):  # free: a notebook's process lives on
        pass
    run, learners = resumed(monkeypatch, "--resume", run.place)
    assert run.step == 34 and learners[0].weight == 34
    train(run, learners)
    assert learners[0].weight == 100


class Slow(Data):
    """An environment that asks the process to end at its 50th step, as long as `number` is set."""

    number = None

    def make_env(self, max_episode_steps):
        env, data, steps = super().make_env(max_episode_steps), self, itertools.count(1)
        plain = env.step

        def step(action):
            if next(steps) == 50 and data.number:
                os.kill(os.getpid(), data.number)
            return plain(action)

        env.step = step
        return env


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("steps", [60, 100])
def test_a_signal_in_an_evaluation_drops_it_and_the_resumed_run_makes_it(tmp_path, number, steps, monkeypatch):
    """Also where it is the last one of its phase, whose end then comes after the resume."""
    settings = dict(seed=(0, 1), steps=steps, eval_every=60, eval_episodes=1)
    whole, learners = make_run(tmp_path / "whole", **settings)
    train(whole, learners, steps, evaluate=True)
    rows = [common.read_csv(folder / "metrics.csv") for folder in whole.folders]

    run, learners = make_run(tmp_path, data=Slow(number=number), **settings)
    with pytest.raises(SystemExit):
        train(run, learners, steps, evaluate=True, at_end=lambda: pytest.fail("the phase is not over"))
    assert all("return" not in row for row in common.read_csv(run.folders[0] / "metrics.csv"))
    checkpoint = common.load_checkpoint(run.folders[0])
    assert (checkpoint["step"], checkpoint["owed"], checkpoint["done"]) == (60, True, {})

    run, learners = resumed(monkeypatch, "--resume", run.root)
    ends = []
    train(run, learners, steps, evaluate=True, at_end=lambda: ends.append(run.step))
    assert ends == [steps] and common.load_checkpoint(run.folders[1])["done"] == dict(update=steps)
    for before, folder in zip(rows, run.folders):
        after = common.read_csv(folder / "metrics.csv")
        keys = ("phase", "step", "return", "return_std", "toy_loss")
        assert [[row.get(key) for key in keys] for row in after] == [[row.get(key) for key in keys] for row in before]


def test_an_evaluation_that_one_of_two_seeds_still_owes_is_made(tmp_path, monkeypatch, capsys):
    run, learners = make_run(tmp_path, data=Slow(number=15), seed=(0, 1), steps=60, eval_every=60, eval_episodes=1)
    with pytest.raises(SystemExit):
        train(run, learners, 60, evaluate=True)
    for flags in (["--seed", "1"], []):
        run, learners = resumed(monkeypatch, "--resume", run.root, *flags)
        train(run, learners, 60, evaluate=True)
        run.finish()
    assert all("return" in json.loads((folder / "summary.json").read_text()) for folder in run.folders)
    assert "over 2 seeds" in capsys.readouterr().out


@pytest.mark.parametrize("kept", [0, 3])
def test_an_evaluation_that_is_owed_stands_at_its_update_where_rows_were_lost(tmp_path, kept, monkeypatch):
    run, learners = make_run(tmp_path, data=Slow(number=15), steps=60, eval_every=60, eval_episodes=1)
    with pytest.raises(SystemExit):
        train(run, learners, 60, evaluate=True)
    path = run.place / "metrics.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:kept]))
    run, learners = resumed(monkeypatch, "--resume", run.place)
    train(run, learners, 60, evaluate=True)
    assert [row["total"] for row in common.read_csv(path) if "return" in row] == [60]


def test_an_evaluation_that_is_owed_may_be_left_out(tmp_path, monkeypatch):
    run, learners = make_run(tmp_path, data=Slow(number=signal.SIGTERM), eval_episodes=1, eval_every=60)
    with pytest.raises(SystemExit):
        train(run, learners, evaluate=True)
    run, learners = resumed(monkeypatch, "--resume", run.place, "--eval-episodes", "0")
    train(run, learners, evaluate=True)
    assert learners[0].weight == 100


class Failing(Data):
    def make_env(self, max_episode_steps):
        env = super().make_env(max_episode_steps)
        env.env = SimpleNamespace(reset=lambda **_: 1 / 0, close=lambda: None)
        return env


def test_an_environment_that_fails_costs_no_updates(tmp_path, monkeypatch):
    run, learners = make_run(tmp_path, data=Failing(), eval_episodes=1, eval_every=30, checkpoint_every=50)
    words = f"failed in reset: ZeroDivisionError: .*; all updates are saved, --resume {run.place} .*--eval-episodes 0"
    with pytest.raises(RunError, match=words):
        train(run, learners, evaluate=True)
    run, learners = resumed(monkeypatch, "--resume", run.place)
    assert run.step == learners[0].weight == 30
    train(run, learners, evaluate=True)
    assert [row["total"] for row in common.read_csv(run.place / "metrics.csv") if "return" in row] == [30, 60, 90, 100]


def test_a_policy_that_fails_costs_no_checkpoint(tmp_path, monkeypatch):
    run, learners = make_run(tmp_path, eval_episodes=1, eval_every=30)
    learners[0].act = lambda obs, generator: torch.full((len(obs), 1), torch.nan)
    with pytest.raises(RunError, match="the policy gave an action that is not finite"):
        train(run, learners, evaluate=True)
    assert common.load_checkpoint(run.place)["step"] == 20


def test_a_second_ctrl_c_ends_at_once_other_signals_do_not(tmp_path):
    run, _ = make_run(tmp_path)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        os.kill(os.getpid(), number)
    assert run.signal == signal.SIGUSR1
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_nohup_is_respected(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run, _ = make_run(tmp_path)
        os.kill(os.getpid(), signal.SIGHUP)
        assert run.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_in_a_thread(tmp_path):
    """Where Python lets no one set signal handlers."""
    errors = []

    def work():
        try:
            run, learners = make_run(tmp_path, eval_episodes=1)
            train(run, learners, evaluate=True)
            run.finish()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors and next(tmp_path.rglob("summary.json"))


def test_curves_are_drawn_now_and_then(tmp_path):
    run, learners = make_run(tmp_path, eval_episodes=1, eval_every=10, data_path="a$^$.npz")  # no formula
    run.drawn += 1000  # seconds
    there = []
    for count, _ in enumerate(updates(run, "update", 30, evaluate=True)):
        learners[0].update()
        there.append((run.place / "curve.png").exists())
        if count == 15:
            run.drawn -= 2000
    assert there == [False] * 20 + [True] * 10


def test_stride_rounds_a_phase_up(tmp_path):
    run, learners = make_run(tmp_path)
    calls = sum(1 for _ in updates(run, "update", 21, stride=5))
    assert calls == 5 and run.step == 25


def test_at_end_runs_once_and_stands_in_the_checkpoint(tmp_path, monkeypatch):
    run, learners = make_run(tmp_path)
    train(run, learners, 10, phase="first", at_end=lambda: learners[0].weight.fill_(-5))
    run, learners = resumed(monkeypatch, "--resume", run.place)
    assert learners[0].weight == -5
    train(run, learners, 10, phase="first", at_end=lambda: pytest.fail("ran again"))


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    run, learners = make_run(tmp_path)
    train(run, learners, 20)

    def full(data, path):
        Path(path).write_bytes(b"x")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    def quota(file):  # a network disk says so only when it is made to write
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(RunError, match="disk full"):
            run.save()
    monkeypatch.setattr(os, "fsync", quota)
    with pytest.raises(RunError, match="quota exceeded"):
        run.save()
    assert not list(tmp_path.rglob("*.part"))
    assert common.load_checkpoint(run.place)["step"] == 20


def test_a_non_finite_metric_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    run, learners = make_run(tmp_path)
    with pytest.raises(RunError, match="toy_loss became nan by update 50 of phase update, seed 0; the last checkpoint"):
        for count, _ in enumerate(updates(run, "update", 100)):
            learners[0].update()
            if count == 44:
                learners[0].weight.fill_(float("nan"))
    assert common.load_checkpoint(run.place)["step"] == 40
    run, learners = make_run(tmp_path)
    learners[0].weight.fill_(float("nan"))
    with pytest.raises(RunError, match="; no checkpoint yet"):
        train(run, learners)


def test_an_earlier_run_is_moved_aside(tmp_path, capsys):
    run, learners = make_run(tmp_path)
    train(run, learners, 20)
    run, _ = make_run(tmp_path)
    assert common.load_checkpoint(run.root / "seed0.old1")["step"] == 20
    assert "seed0.old1" in capsys.readouterr().out


# Resume


def test_resume_takes_all_settings_from_the_run(tmp_path, monkeypatch, capsys):
    run, learners = make_run(tmp_path, lr=2.0, mode="hard", weights=(5.0,), head_start=3)
    train(run, learners, 20)
    for folder in (run.place, run.root):
        args = parsed(monkeypatch, "--resume", folder)
        assert (args.lr, args.mode, args.weights, args.head_start) == (2.0, "hard", (5.0,), 3)
        assert (args.steps, args.eval_every, args.device, args.seed) == (100, 50, "cpu", (0,))
    args = parsed(monkeypatch, "--resume", run.place, "--log-every", "7", "--eval-episodes", "3", "--lr", "2")
    assert (args.log_every, args.eval_episodes) == (7, 3)
    for flags, words in (
        ("--lr 3", "--lr was 2.0 in .* and cannot be 3.0"),
        ("--batch-size 8", "--batch-size was 4"),
        ("--env hopper-medium-v2", "--env was pendulum-demo-medium"),
        ("--out elsewhere", "--out was"),
        ("--steps 99", "--steps was 100 in .* can grow, not shrink to 99"),
        ("--seed 3", "holds no run of seed 3"),
    ):
        with pytest.raises(UserError, match=words):
            parsed(monkeypatch, "--resume", run.place, *flags.split())


def test_a_moved_run_goes_on_where_it_is(tmp_path, monkeypatch):
    run, learners = make_run(tmp_path / "a")
    train(run, learners, 20)
    run.held.close()
    moved = run.place.rename(tmp_path / "kept")
    run, learners = resumed(monkeypatch, "--resume", moved)
    train(run, learners, 40)
    assert run.place == moved and common.load_checkpoint(moved)["step"] == 40
    assert not list((tmp_path / "a").rglob("args.json"))


def test_resume_without_a_folder(tmp_path, monkeypatch, capsys):
    """The same command starts a run and continues it, as queues of clusters like it."""
    flags = ["--out", tmp_path, "--lr", "0.5", "--seed", "0", "1", "--resume"]
    run, learners = resumed(monkeypatch, *flags)
    assert run.total == 0 and "no checkpoint to resume" in capsys.readouterr().out
    train(run, learners, 20)
    run, learners = resumed(monkeypatch, *flags)
    assert run.total == 20 and learners[1].weight == 20 and run.args.seed == (0, 1) and run.args.lr == 0.5
    with pytest.raises(UserError, match="--lr was 0.5"):
        parsed(monkeypatch, *flags, "--lr", "3")
    with pytest.raises(UserError, match="no run of seed 2"):
        parsed(monkeypatch, *flags, "--seed", "1", "2")
    assert parsed(monkeypatch, "--out", tmp_path, "--lr", "0.5", "--resume").seed == (0,)  # the default, not all there


@dataclass
class Reusing(Args):
    reuse: str | None = None  # Another run


def test_the_path_of_another_run_holds_from_everywhere(tmp_path, monkeypatch):
    def main(*flags):
        common.release()
        monkeypatch.setattr(sys, "argv", ["test_runs.py", *map(str, flags)])
        args = parse_args(Reusing, {}, lambda args, given: args.reuse and common.apart(args, "reuse"))
        run = Run(args, [Counter(args)], Data(), __file__, "", {})
        train(run, run.learners, 40)
        return args, run

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    main("--out", "a", "--steps", 40)
    args, run = main("--out", "b", "--steps", 40, "--reuse", "a/test_runs/pendulum-demo-medium")
    monkeypatch.chdir(tmp_path / "elsewhere")
    place = "../b/test_runs/pendulum-demo-medium/seed0"
    assert main("--resume", place)[0].reuse == args.reuse == str(tmp_path / "a/test_runs/pendulum-demo-medium")
    main("--resume", place, "--reuse", "../a/test_runs/pendulum-demo-medium")
    with pytest.raises(UserError, match="--reuse was .* and cannot be"):
        main("--resume", place, "--reuse", "../c")


def test_resume_before_the_first_checkpoint(tmp_path, monkeypatch, capsys):
    run, learners = make_run(tmp_path, lr=2.0)
    train(run, learners, 15)
    (run.place / "checkpoint.pt").unlink()
    run, learners = resumed(monkeypatch, "--resume", run.place)
    assert run.total == 0 and run.args.lr == 2.0 and "from its beginning" in capsys.readouterr().out
    train(run, learners, 30)
    assert [row["total"] for row in common.read_csv(run.place / "metrics.csv")] == [10, 20, 30]


def test_data_may_move_but_not_change(tmp_path, monkeypatch):
    run, learners = make_run(tmp_path, data_path="here.npz")
    train(run, learners, 20)
    run, _ = resumed(monkeypatch, "--resume", run.place, "--data-path", "there.npz")
    assert run.args.data_path == "there.npz"
    here = Path.cwd()
    monkeypatch.chdir(tmp_path)
    run, _ = resumed(monkeypatch, "--resume", run.place)
    assert run.args.data_path == str(here / "there.npz")
    with pytest.raises(UserError, match="these are not the data that .*seed0 was trained on"):
        resumed(monkeypatch, "--resume", run.place, data=Data(fingerprint="other"))


class Decaying(Counter):
    """Its learning rate falls from 1 to 0 over --steps."""

    def __init__(self, args, data=None, seed=0):
        super().__init__(args, data, seed)
        self.args, self.opt = args, torch.optim.SGD([torch.nn.Parameter(self.weight.clone())], torch.tensor(1.0))
        self.state["opt"] = self.opt

    def update(self):
        super().update()
        self.opt.param_groups[0]["lr"].fill_(1 - float(self.weight) / self.args.steps)


def test_a_finished_run_can_be_lengthened(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(globals(), "Counter", Decaying)
    phases = dict(first=20, second=100)
    run, learners = make_run(tmp_path, phases=phases)
    train(run, learners, 20, phase="first")
    train(run, learners, 80, phase="second")
    run.finish()
    run, learners = resumed(monkeypatch, "--resume", run.place, "--steps", "200")
    train(run, learners, 20, phase="first")
    train(run, learners, 180, phase="second")
    text = capsys.readouterr().out
    assert "note: 200 updates instead of 100" in text
    assert "a rate that had fallen along it rises again" in " ".join(text.split())
    assert learners[0].weight == 200 and common.load_checkpoint(run.place)["done"] == dict(first=20, second=180)
    assert parsed(monkeypatch, "--resume", run.place).steps == 200
    run, learners = resumed(monkeypatch, "--resume", run.place)
    train(run, learners, 180, phase="second")
    assert learners[0].weight == 200 and "instead of" not in capsys.readouterr().out


def test_seeds_that_stand_apart_resume_each_from_its_own(tmp_path, monkeypatch, capsys):
    """Seed 1 is further, seed 2 has ended, seed 3 has no checkpoint: those behind go first, then all together."""

    def main():
        run, learners = resumed(monkeypatch, "--resume", tmp_path / "test_runs" / "pendulum-demo-medium")
        seen.append((run.args.seed, run.total))
        train(run, learners, 20, phase="first", at_end=lambda: [learner.weight.add_(1000) for learner in learners])
        train(run, learners, 80, phase="second")
        run.finish()
        weights.update({seed: int(learner.weight) for seed, learner in zip(run.args.seed, learners)})

    seen, weights = [], {}
    run, learners = make_run(tmp_path, seed=(0, 1, 2, 3))
    train(run, learners, 20, phase="first", at_end=lambda: [learner.weight.add_(1000) for learner in learners])
    (run.folders[3] / "checkpoint.pt").unlink()
    for seed, last in ((1, 33), (2, 80)):
        run, learners = resumed(monkeypatch, "--resume", run.root / f"seed{seed}")
        with contextlib.suppress(SystemExit):
            for _ in updates(run, "second", 80):
                learners[0].update()
                run.signal = 15 if run.step + 1 == last < 80 else None
    common.cli(main)
    assert seen == [((3,), 0), ((0, 3), 20), ((0, 1, 3), 53), ((0, 1, 2, 3), 100)]
    assert weights == {seed: 1100 for seed in range(4)}


def test_a_seed_that_another_process_took_further_is_looked_at_again(tmp_path, monkeypatch):
    """It goes on while this process reads its data, before the folder is this one's."""

    def main():
        args = parsed(monkeypatch, "--resume", root, "--steps", "80")
        if not others:
            others.append(resumed(monkeypatch, "--resume", root / "seed0", "--steps", "60"))
            train(*others[0], 60)
            common.release()
        learners = [Counter(args, None, seed) for seed in args.seed]
        run = Run(args, learners, Data(), __file__, "", {})
        seen.append((args.seed, run.total))
        train(run, learners, 80)
        weights.update({seed: int(learner.weight) for seed, learner in zip(args.seed, learners)})

    others, seen, weights = [], [], {}
    run, learners = make_run(tmp_path, seed=(0, 1), steps=20)
    root = run.root
    train(run, learners, 20)
    common.release()
    common.cli(main)
    assert seen == [((1,), 20), ((0, 1), 60)] and weights == {0: 80, 1: 80}


def test_one_of_several_seeds_is_resumed_by_itself(tmp_path, monkeypatch):
    """With its own settings and length, whatever became of the others."""
    run, learners = make_run(tmp_path, seed=(0, 1))
    train(run, learners, 50)
    with pytest.raises(SystemExit):
        run, learners = resumed(monkeypatch, "--resume", run.root / "seed0", "--steps", "120", "--log-every", "3")
        for _ in updates(run, "update", 120):
            run.signal = 15 if run.step == 60 else None
    (run.root / "seed0" / "checkpoint.pt").write_text("damaged")
    run, learners = resumed(monkeypatch, "--resume", run.root, "--seed", "1")
    assert (run.args.seed, run.args.steps, run.args.log_every, run.total) == ((1,), 100, 10, 50)
    train(run, learners, 100)  # and does not stop where seed 0 stands
    assert run.total == 100


def test_a_script_without_a_docstring_runs(tmp_path, capsys):
    script = tmp_path / "mine.py"
    script.write_text("x = 1")
    Run(Args(out=str(tmp_path)), [Counter(Args())], Data(), script, "", {})
    assert "algorithm   mine" in capsys.readouterr().out


def test_changed_code_is_told_and_kept(tmp_path, monkeypatch, capsys):
    run, learners = make_run(tmp_path)
    train(run, learners, 20)
    copy = run.place / "test_runs.py"
    copy.write_text("of another day")
    run, _ = resumed(monkeypatch, "--resume", run.place)
    assert "note: test_runs.py has changed since" in capsys.readouterr().out
    assert copy.read_text() == Path(__file__).read_text()
    assert (run.place / "test_runs.py.old1").read_text() == "of another day"
    (again,) = json.loads((run.place / "args.json").read_text())["resumed"]
    assert again.keys() == {"resumed", "git", "versions", "processor", "device"}
    resumed(monkeypatch, "--resume", run.place)
    assert "has changed" not in capsys.readouterr().out and not (run.place / "test_runs.py.old2").exists()


def test_a_film_is_as_long_as_the_episodes(tmp_path, monkeypatch):
    run, learners = make_run(tmp_path)
    train(run, learners, 20)
    filmed = []
    monkeypatch.setattr(common, "need", lambda *args: None)
    monkeypatch.setattr(common, "record_video", lambda *args: filmed.append(args[1:]) or 0.0)
    flags = ["--video", "--max-episode-steps", "7", "--eval-episodes", "1"]
    common.evaluate_run(parsed(monkeypatch, "--evaluate", run.place, *flags), Counter)
    assert filmed == [("pendulum-demo-medium", run.place / "video.mp4", common.evaluation_seed(0), 7)]


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_a_run_of_a_machine_with_a_gpu_goes_on_without_one(tmp_path, monkeypatch, capsys, flag):
    run, learners = make_run(tmp_path)
    train(run, learners, 20)
    path = run.place / "args.json"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parsed(monkeypatch, flag, run.place).device == "cpu"
    assert "ran on cuda, which is not here; the CPU takes its place" in capsys.readouterr().out


def test_a_signal_before_any_common_evaluation(tmp_path, monkeypatch):
    """One seed has been evaluated, the other never: there is no common curve to draw yet."""
    for seed in (0, 1):
        run, learners = make_run(tmp_path, seed=(seed,), eval_episodes=1 - seed, steps=20, eval_every=20)
        train(run, learners, 20, evaluate=True)
        run.finish()
    flags = ["--steps", "200", "--eval-every", "200", "--eval-episodes", "1"]
    run, learners = resumed(monkeypatch, "--resume", run.root, *flags)
    with pytest.raises(SystemExit) as stopped:
        for _ in updates(run, "update", 200, evaluate=True):
            run.signal = 15
    assert stopped.value.code == 143 and not (run.root / "curve.png").exists()


def test_seeds_of_which_one_was_never_evaluated_end_well(tmp_path, monkeypatch, capsys):
    for seed in (0, 1):
        run, learners = make_run(tmp_path, seed=(seed,), eval_episodes=1 - seed, steps=20, eval_every=20)
        train(run, learners, 20, evaluate=True)
        run.finish()
    run, learners = resumed(monkeypatch, "--resume", run.root)
    train(run, learners, 20, evaluate=True)
    run.finish()
    assert "return" not in json.loads((run.root / "summary.json").read_text())
    assert "over 2 seeds" not in capsys.readouterr().out


def test_seeds_that_were_evaluated_apart_share_a_picture(tmp_path, monkeypatch):
    run, learners = make_run(tmp_path, seed=(0, 1), eval_episodes=1, eval_every=50)
    train(run, learners, 100, evaluate=True)
    run.finish()
    for place, steps in (("seed0", 120), ("", 150)):

        def main(place=run.root / place, steps=steps):
            run, learners = resumed(monkeypatch, "--resume", place, "--steps", str(steps))
            train(run, learners, steps, evaluate=True)
            run.finish()

        common.cli(main)
    found = [
        [row["total"] for row in common.read_csv(run.root / f"seed{k}/metrics.csv") if "return" in row] for k in (0, 1)
    ]
    assert found == [[50, 100, 120, 150], [50, 100, 150]]
    assert (run.root / "curve.png").stat().st_mtime >= (run.root / "seed1/curve.png").stat().st_mtime


@pytest.mark.parametrize("damage", ["update,20,3", "\0\0\0,,", "\xff", "\0" * 200_000])
def test_a_damaged_row_of_the_log_is_left_out(tmp_path, monkeypatch, damage):
    run, learners = make_run(tmp_path)
    train(run, learners, 20)
    path = run.place / "metrics.csv"
    rows = common.read_csv(path)
    path.write_text(path.read_text() + damage, encoding="latin-1")
    assert common.read_csv(path) == rows
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as Excel does
    assert common.read_csv(path) == rows
    run, learners = resumed(monkeypatch, "--resume", run.place)
    train(run, learners, 30)
    assert common.read_csv(path)[-1]["total"] == 30


def test_seeds_with_different_settings_are_not_resumed_together(tmp_path, monkeypatch):
    for seed, lr in ((0, 1.0), (1, 2.0)):
        run, learners = make_run(tmp_path, seed=(seed,), lr=lr)
        train(run, learners, 20)
    with pytest.raises(
        UserError, match="--lr was 2.0 in .*seed1 and cannot be 1.0 as for other seeds: resume each on its own"
    ):
        parsed(monkeypatch, "--resume", run.root)


def test_a_run_of_another_script(tmp_path, monkeypatch):
    run, learners = make_run(tmp_path)
    train(run, learners, 20)
    (run.place / "test_runs.py").rename(run.place / "dtql.py")
    for flag in ("--resume", "--evaluate"):
        with pytest.raises(UserError, match="is not a run of test_runs.py"):
            parsed(monkeypatch, flag, run.place)


def test_evaluation_takes_no_flag_that_does_nothing(tmp_path, monkeypatch):
    run, _ = make_run(tmp_path)
    with pytest.raises(UserError, match="--steps does nothing with --evaluate"):
        parsed(monkeypatch, "--evaluate", run.place, "--steps", "5")
    with pytest.raises(UserError, match="--resume does nothing with --evaluate"):
        parsed(monkeypatch, "--evaluate", run.place, "--resume")
    with pytest.raises(UserError, match="--seed takes one integer with --evaluate"):
        parsed(monkeypatch, "--evaluate", run.place, "--seed", "1", "2")


@pytest.mark.parametrize("env, words", [("halfcheetah-demo-medium", "takes 3 numbers and gives 1, there are 17 and 6")])
def test_evaluation_in_another_environment(tmp_path, monkeypatch, env, words):
    run, learners = make_run(tmp_path)
    train(run, learners, 20)
    args = parsed(monkeypatch, "--evaluate", run.place, "--env", env)
    with pytest.raises(UserError, match=words):
        common.evaluate_run(args, Counter)


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None])
def test_a_damaged_checkpoint_is_named(tmp_path, damage, monkeypatch):
    run, learners = make_run(tmp_path)
    train(run, learners, 20)
    path = run.place / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-200] if damage is None else damage)
    with pytest.raises(RunError, match="checkpoint.pt cannot be read"):
        resumed(monkeypatch, "--resume", run.place)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda about: [], "holds no readable args.json"),
        (lambda about: about | dict(args=[]), "holds no readable args.json"),
        (lambda about: about | dict(args=about["args"] | dict(seed=0)), "holds no readable args.json"),
        (lambda about: about | dict(args=about["args"] | dict(steps="100")), "args.json: '100' is no value for steps"),
        (lambda about: about | dict(args=about["args"] | dict(lr=None)), "args.json: None is no value for lr"),
        (lambda about: about | dict(args=about["args"] | dict(mode="x")), "args.json: 'x' is no value for mode"),
        (lambda about: about | dict(args=about["args"] | dict(weights=["x"])), "is no value for weights"),
        (lambda about: about | dict(args=about["args"] | dict(lr=1, bound=2, gone=3, paper_score="88.1")), None),
    ],
)
def test_settings_that_were_edited(tmp_path, monkeypatch, change, words):
    run, learners = make_run(tmp_path)
    train(run, learners, 20)
    file = run.place / "args.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    if words is None:
        assert parsed(monkeypatch, "--resume", run.place).bound == 2
    else:
        with pytest.raises(UserError, match=words):
            parsed(monkeypatch, "--resume", run.place)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda saved: saved.pop("owed"), "cannot be read, .* of another version: KeyError: 'owed'"),
        (lambda saved: saved["learner"].pop("weight"), "checkpoint is of another version, class or size .*: 'weight'"),
        (lambda saved: saved["learner"].update(weight=torch.zeros(3)), "of another version, class or size .*: .*shape"),
    ],
)
def test_a_checkpoint_of_another_version(tmp_path, monkeypatch, change, words):
    run, learners = make_run(tmp_path)
    train(run, learners, 20)
    saved = common.load_checkpoint(run.place)
    change(saved)
    torch.save(saved, run.place / "checkpoint.pt")
    with pytest.raises(UserError, match=words):
        resumed(monkeypatch, "--resume", run.place)
    with pytest.raises(UserError, match=words):
        common.load_policy(Counter, Args, run.place)


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(UserError, match="no checkpoint.pt"):
        common.load_checkpoint(tmp_path)
    with pytest.raises(UserError, match="args.json"):
        common.saved_run(tmp_path, Args)


def test_several_seeds_write_their_folders_and_a_summary(tmp_path, capsys):
    run, learners = make_run(tmp_path, seed=(0, 1, 2), eval_episodes=1)
    train(run, learners, 100, evaluate=True)
    run.finish()
    for seed in range(3):
        about = json.loads((run.root / f"seed{seed}" / "args.json").read_text())
        assert about["args"]["seed"] == [seed] and about["versions"]["torch"] == torch.__version__
    whole = json.loads((run.root / "summary.json").read_text())["return"]["last_five"]
    assert whole["mean"] == pytest.approx(np.mean(whole["seeds"])) and len(whole["seeds"]) == 3
    assert whole["std"] == pytest.approx(np.std(whole["seeds"], ddof=1))
    assert whole["stderr"] == pytest.approx(np.std(whole["seeds"], ddof=1) / 3**0.5)
    for path in (run.root / "curve.png", run.root / "seed2" / "curve.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_last_and_last_five_and_best(tmp_path, capsys, monkeypatch):
    """Of seven evaluations of two seeds, two episodes each: in summary.json, metrics.csv and the closing lines."""
    found = {0: [1, 900, 3, 4, 5, 6, 70], 1: [2, 800, 8, 8, 8, 8, 50]}  # mean of the last five: 17.6, 16.4
    means = iter(value for both in zip(*found.values()) for value in both)
    monkeypatch.setattr(common, "evaluate", lambda *_: next(means) + np.array([-2.0, 2.0]))
    run, learners = make_run(tmp_path, env="hopper-medium-v2", seed=(0, 1), steps=70, eval_every=10, eval_episodes=2)
    run.published, run.protocol = 99.6, "last of 5 seeds"
    train(run, learners, 70, evaluate=True)
    run.finish()
    score = lambda value: pytest.approx(100 * (value + 20.272305) / (3234.3 + 20.272305))  # D4RL's, for Hopper
    five = {0: 17.6, 1: 16.4}
    for seed, folder in enumerate(run.folders):
        summary = json.loads((folder / "summary.json").read_text())
        last, best = found[seed][-1], max(found[seed])
        assert summary["return"] == dict(last=last, last_five=pytest.approx(five[seed]), best=best)
        assert summary["score"] == dict(last=score(last), last_five=score(five[seed]), best=score(best))
        assert (summary["evaluations"], summary["episodes"], summary["seed"]) == (7, 2, seed)
        assert (summary["paper_score"], summary["protocol"], summary["steps"]) == (99.6, "last of 5 seeds", 70)
        assert (summary["script"], summary["env"], summary["data_path"]) == ("test_runs.py", "hopper-medium-v2", None)
        rows = common.read_csv(folder / "metrics.csv")
        assert [row["return"] for row in rows] == found[seed] and rows[0]["return_std"] == 2
        assert rows[1]["score"] == score(found[seed][1])
        assert rows[1]["score_std"] == pytest.approx(200 / (3234.3 + 20.272305))
        seconds = [row["seconds"] for row in rows]
        assert seconds == sorted(seconds) and 0 <= seconds[0] and seconds[-1] <= summary["seconds"] + 0.1
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "last        return 60.0 ± 14.1 over 2 seeds (70.0, 50.0)",
        "last five   return 17.0 ± 0.8 over 2 seeds (17.6, 16.4)",
        "best        return 850.0 ± 70.7 over 2 seeds (900.0, 800.0)",
        "last five   D4RL score 1.1 ± 0.0 over 2 seeds (1.2, 1.1)",
        "data        return -2.0 on average over 2 episodes, best -1.0",
        "paper       score 99.6 (last of 5 seeds)",
    ):
        assert line in lines


def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    """One W&B run per seed over any number of resumes; W&B's own environment variables choose where it goes."""
    started, logged = [], []

    def init(**options):
        started.append(options)
        axes = lambda name, step_metric: logged.append(step_metric)
        return SimpleNamespace(log=logged.append, define_metric=axes, finish=lambda: logged.append("end"))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    run, learners = make_run(tmp_path, wandb=True, seed=(0, 1))
    train(run, learners, 20, phase="first")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_RUN_GROUP", "sweep")
    run, learners = resumed(monkeypatch, "--resume", run.root)
    train(run, learners, 20, phase="first")
    train(run, learners, 10, phase="second")
    run.finish()
    ids = [options["id"] for options in started]
    assert ids[:2] == ids[2:] and ids[0] != ids[1] and all(options["resume"] == "allow" for options in started)
    assert [options["project"] for options in started] == ["offline-rl"] * 2 + ["mine"] * 2
    assert [options["group"] for options in started] == ["test_runs pendulum-demo-medium"] * 2 + ["sweep"] * 2
    assert all("entity" not in options for options in started)
    assert logged[:2] == ["total", "total"] and logged[-2:] == ["end", "end"]
    assert logged[2]["first/toy_loss"] == 5.5 and logged[-3]["second/toy_loss"] == 25.5 and logged[-3]["total"] == 30


def test_wandb_that_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: 1 / 0))
    with pytest.raises(RunError, match="--wandb cannot be used here: ZeroDivisionError.*WANDB_MODE=offline"):
        make_run(tmp_path, wandb=True)


def tensorboard(folder):
    """Curve -> its steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [event.step for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_keeps_all_phases_after_a_kill(tmp_path, monkeypatch):
    run, learners = make_run(tmp_path, eval_episodes=1, eval_every=20)
    train(run, learners, 30, phase="first")
    with pytest.raises(ZeroDivisionError):
        for count, _ in enumerate(updates(run, "second", 60, evaluate=True)):
            learners[0].update()
            1 / (count - 33)  # the last checkpoint is at 20, the last row at 30
    run, learners = resumed(monkeypatch, "--resume", run.place)
    train(run, learners, 30, phase="first")
    train(run, learners, 60, phase="second", evaluate=True)
    run.held.close()
    curves = tensorboard(run.place)
    assert curves["first/toy_loss"] == [10, 20, 30]
    assert curves["second/toy_loss"] == [40, 50, 60, 70, 80, 90]
    assert curves["eval/return"] == [50, 70, 90]


def test_tensorboard_after_a_kill_before_the_first_checkpoint(tmp_path, monkeypatch):
    run, learners = make_run(tmp_path, checkpoint_every=100)
    with pytest.raises(ZeroDivisionError):
        for count, _ in enumerate(updates(run, "update", 60)):
            learners[0].update()
            1 / (count - 45)
    run, learners = resumed(monkeypatch, "--resume", run.place)
    train(run, learners, 60)
    run.held.close()
    assert tensorboard(run.place)["update/toy_loss"] == [10, 20, 30, 40, 50, 60]


def test_cli_turns_errors_into_a_sentence(capsys):
    for error, code in (
        (UserError("bad name"), 2),
        (RunError("broke"), 1),
        (OSError(28, "No space left", "f"), 1),
        (KeyboardInterrupt(), 130),
        (RuntimeError("Could not determine home directory."), 2),  # pathlib's
    ):

        def main(error=error):
            raise error

        with pytest.raises(SystemExit) as stopped:
            common.cli(main)
        message = capsys.readouterr().err
        assert stopped.value.code == code and message.startswith("error: ") and message.count("\n") == 1
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        common.cli(lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="must match"):
        common.cli(lambda: torch.zeros(2) + torch.zeros(3))
    for allocate in (torch.zeros, np.zeros):
        with pytest.raises(SystemExit):
            common.cli(lambda allocate=allocate: allocate(2**55))
        assert "error: out of memory" in capsys.readouterr().err


# Terminal and files


def test_a_run_says_what_it_is_and_what_it_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "make_env", lambda *args, plain=common.make_env, **more: limited(plain(*args, **more)))
    limited = lambda env: setattr(env, "assumed_limit", 70) or env
    run, learners = make_run(tmp_path, eval_episodes=1, phases=dict(first=20, second=30), max_episode_steps=70)
    train(run, learners, 20, phase="first")
    train(run, learners, 30, phase="second", evaluate=True)
    run.finish()
    lines = capsys.readouterr().out.splitlines()
    for words in (
        "algorithm   Command line, logs, checkpoints",
        "data        pendulum-demo-medium: 9 rows, 2 episodes, mean return -2.0",
        "episodes    at most 70 steps (--max-episode-steps), as pendulum-demo-medium has no time limit",
        "device      cpu, ",
        "phases      first 20 updates, second 30 updates",
        f"files       {run.place}",
        "pictures    curve.png",
    ):
        assert any(line.startswith(words) for line in lines), words
    about = json.loads((run.place / "args.json").read_text())
    assert about.keys() >= {"args", "versions", "device", "processor", "started", "process", "git"}
    assert about["git"] is None or about["git"].keys() == {"commit", "dirty"}
    assert {"test_runs.py", "common.py"} <= {path.name for path in run.place.iterdir()}


@pytest.mark.parametrize("env, name", [("hopper-medium-v2", "D4RL score"), ("Hopper-v4", "score")])
def test_only_d4rl_data_have_a_d4rl_score(tmp_path, capsys, env, name):
    run, learners = make_run(tmp_path, env=env, eval_episodes=1)
    train(run, learners, evaluate=True)
    run.finish()
    assert any(line.startswith(f"last        {name} ") for line in capsys.readouterr().out.splitlines())


def test_a_paper_size_run_on_a_cpu_is_told_its_days(tmp_path, capsys):
    run, learners = make_run(tmp_path, phases=dict(first=10**11, second=10**11), log_every=1000)
    for _ in itertools.islice(run.updates("first"), 150):
        learners[0].update()
    out, error = capsys.readouterr()
    assert re.search(r"^time +about [\d.]+ days,", out, re.M)
    assert re.search(r"warning: this takes about [\d.]+ days on a CPU; --steps N", error)


@pytest.mark.parametrize(
    "seconds, text", [(40, "40 s"), (600, "10 min"), (3 * 3600, "3.0 h"), (30 * 3600, "30.0 h"), (9e5, "10.4 days")]
)
def test_durations(seconds, text):
    assert common.duration(seconds) == text and common.duration(np.nan) == "?"


def test_on_a_terminal_a_bar_goes_on_and_evaluations_leave_a_line(tmp_path, capsys, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(common.time, "monotonic", itertools.count().__next__)  # every look at the clock is a second
    run, learners = make_run(tmp_path, eval_episodes=1, eval_every=10, phases=dict(empty=0, first=20, second=20))
    train(run, learners, 0, phase="empty")
    train(run, learners, 20, phase="first")
    for _ in updates(run, "second", 20, evaluate=True):
        learners[0].update()
    shown = screen.getvalue()
    assert "first (1 of 2)" in shown and "left | return -" in shown
    assert len(set(re.findall(r"second \(2 of 2\), evaluating for (\d+ s)", shown))) > 20
    lines = [line for line in capsys.readouterr().out.splitlines() if "| return -" in line]
    assert [line.split()[1] for line in lines] == ["10/20", "20/20"]


def test_a_locale_without_the_sign(tmp_path):
    code = "import common; common.cli(lambda: print('1 ± 2'))"
    options = dict(env=os.environ | {"PYTHONIOENCODING": "ascii"}, cwd=ROOT, capture_output=True, text=True)
    assert subprocess.run([sys.executable, "-c", code], **options).stdout == "1 ? 2\n"


def test_a_closed_pipe_is_one_sentence(tmp_path):
    code = "import common, sys; common.cli(lambda: [print('x' * 9999, flush=True) for _ in range(99)])"
    command = f'{sys.executable} -c "{code}" | head -c 5'
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert result.stderr == "error: whoever read the output has gone; --resume continues from the last checkpoint\n"
