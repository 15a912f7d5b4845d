"""The parts of the grid that need no engine: its jobs, what is done, one job in a process, the table."""

import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(FOLDER))
import grid  # noqa: E402

import common  # noqa: E402

JOB = grid.Job("script", "D4RL/door/human-v2", (0, 1))
# Stands in for a script: counts its starts, and behaves as its --mode asks.
SCRIPT = """
import os, signal, sys
from pathlib import Path
flags = dict(zip(sys.argv, sys.argv[1:]))
out, starts = Path(flags["--out"]), Path(flags["--out"], "starts")
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
print("start", number, "--resume" in sys.argv, os.environ.get("OMP_NUM_THREADS"))
if flags["--mode"] == "fail":
    sys.exit("first line\\n│ error: the reason │\\n╰───╯\\n")
if flags["--mode"] == "die" or (flags["--mode"] == "die-once" and number == 0):
    os.kill(os.getpid(), signal.SIGKILL)
for seed in (0, 1):
    folder = out / "script" / "D4RL-door-human-v2" / f"seed{seed}"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(mode): the job's answer and how often its script was started."""
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(grid, "ROOT", tmp_path)

    def run(mode, **place):
        error = grid.run_job(JOB, tmp_path, ["--mode", mode], sys.executable, **place)
        starts = tmp_path / "starts"
        return error, len(starts.read_text()) if starts.exists() else 0

    return run


def test_jobs_cover_the_grid_once():
    jobs = grid.all_jobs(["dtql", "srpo"], ["locomotion", "pen-human-v1"], seeds=5, seeds_per_run=2)
    assert len(jobs) == len(set(jobs)) == 2 * 10 * 3
    assert {seed for job in jobs for seed in job.seeds} == set(range(5))
    assert jobs[0].seeds == (0, 1) and jobs[-1].seeds == (4,)
    assert grid.Job("srpo", "walker2d-medium-expert-v2", (2, 3)) in jobs


def test_shares_are_equal_and_disjoint():
    places = [grid.share(slot, 3, list(range(8)), ["4", "5"]) for slot in range(3)]
    assert places == [([0, 1], "4"), ([2, 3], "5"), ([4, 5], "4")]
    assert grid.share(0, 4, [0, 1], []) == (None, None)


def test_a_job_runs_once(run, tmp_path):
    cores = sorted(os.sched_getaffinity(0))[:1]
    assert not JOB.done(tmp_path)
    assert run("good", mine=cores) == (None, 1)
    assert JOB.done(tmp_path)
    assert JOB.log(tmp_path, "log").read_text() == "start 0 True 1\n"
    assert run("good") == (None, 1)
    JOB.summaries(tmp_path)[1].unlink()
    assert not JOB.done(tmp_path)


def test_a_script_ended_by_a_signal_is_resumed_a_failed_one_is_not(run):
    assert run("die-once") == (None, 2)


def test_failures_are_told(run):
    assert run("fail") == ("error: the reason", 1)
    assert run("die") == ("exit code -9", 1 + grid.TRIES)


def test_no_second_script_while_an_orphan_runs(run, tmp_path):
    """A script that has lost its worker holds its log's lock; the job waits, and finds the work done."""
    log = JOB.log(tmp_path, "log")
    log.parent.mkdir()
    with open(log, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        orphan = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=file)
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(run("good")))
    waiting.start()
    waiting.join(0.3)
    assert not answers
    for path in JOB.summaries(tmp_path):
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    orphan.communicate(b"\n")
    waiting.join()
    assert answers == [(None, 0)]


def test_table(tmp_path):
    jobs = grid.all_jobs(["dtql"], ["hopper-medium-v2", "pendulum-demo-medium", "pen-human-v1"], 3, 1)
    for job in jobs:
        if job.env == "pen-human-v1" or job == grid.Job("dtql", "pendulum-demo-medium", (2,)):
            continue
        (path,) = job.summaries(tmp_path)
        path.parent.mkdir(parents=True)
        summary = dict(steps=2000, seconds=90.0, paper_score=None)
        summary["return"] = dict(last_five=-100.0 * job.seeds[0])
        if job.env == "hopper-medium-v2":
            summary |= dict(score=dict(last_five=50.0 + job.seeds[0]), paper_score=99.6)
        path.write_text(json.dumps(summary))
    assert grid.table(grid.results(jobs, tmp_path)).splitlines()[2:] == [
        "| hopper-medium-v2 | dtql | 51.0 ± 1.0 | 99.6 | 3 | 2,000 | 1.5 |",
        "| pen-human-v1 | dtql | - | - | 0 of 3 | - | - |",
        "| pendulum-demo-medium | dtql | -50.0 ± 70.7 (return) | - | 2 of 3 | 2,000 | 1.5 |",
    ]


def test_other_flags_need_another_folder(tmp_path):
    grid.keep_flags(tmp_path, ["dtql"], ["--steps", "10"])
    grid.keep_flags(tmp_path, ["dtql"], ["--steps", "10"])
    grid.keep_flags(tmp_path, ["srpo"], [])
    grid.keep_flags(tmp_path, ["srpo"], ["--tau", "1"])  # nothing was run yet
    (tmp_path / "dtql").mkdir()
    with pytest.raises(SystemExit, match="dtql with the flags --steps 10"):
        grid.keep_flags(tmp_path, ["dtql"], ["--steps", "20"])
    (tmp_path / "dac").mkdir()  # by hand, perhaps with other settings
    with pytest.raises(SystemExit, match="dac with flags of their own"):
        grid.keep_flags(tmp_path, ["dac"], [])


@pytest.mark.parametrize(
    "env, flags",
    [
        ("Hopper-v4", "--tau 1 --data-path a/my.data.hdf5"),
        ("my_module:Env-v0", "--data_path=my.npz"),
        ("D4RL/x/y-v0", ""),
    ],
)
def test_jobs_look_where_the_scripts_write(env, flags):
    flags = flags.split()
    (job,) = grid.all_jobs(["dtql"], [env], 1, 1, grid.data_of(flags))
    path = flags[-1].split("=")[-1] if flags else None
    (folder,) = common.new_folders(common.RunArgs(env=env, data_path=path, out="o"), Path("dtql.py")).values()
    assert job.summaries("o") == [folder / "summary.json"]


@pytest.mark.parametrize("visible, expected", [("", []), ("1,3", ["1", "3"]), ("-1", ["-1"])])
def test_hidden_gpus_stay_hidden(monkeypatch, visible, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(grid.glob, "glob", lambda _: ["/dev/nvidia0", "/dev/nvidia1"])
    assert grid.local_gpus() == expected


def test_without_dask_one_sentence(tmp_path):
    """The command line without its engine: Dask is optional."""
    (tmp_path / "dask.py").write_text("raise ImportError('No module named dask')")
    command = [sys.executable, str(FOLDER / "grid.py"), "--envs", "pendulum-demo-medium", "--out", str(tmp_path)]
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(tmp_path)), timeout=60
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: the grid needs Dask: pip install")
    assert len(result.stderr.splitlines()) == 1
