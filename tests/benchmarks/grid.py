"""A grid of scripts, datasets and seeds on one machine, on several, or on a SLURM cluster.

    python tests/benchmarks/grid.py --envs locomotion --seeds 5                 # this machine, a worker for each GPU
    python tests/benchmarks/grid.py --envs locomotion --seeds 5 --pool tcp://host:8786
    python tests/benchmarks/grid.py --envs locomotion --seeds 5 --pool slurm:40 --time 24:00:00 --sbatch=--gres=gpu:1
    python tests/benchmarks/grid.py --scripts dtql --envs hopper-medium-v2 --seeds 2 -- --steps 20000 --eval-every 5000

Each job is one run of a script with --resume; what follows `--` goes to the scripts. Jobs wait in a queue until a
worker is free. A job whose worker is lost goes to another and continues from its checkpoint. The same command given
again runs only what is missing. <out>/grid.md and grid.json hold the table; <out>/logs what the scripts printed.

The queue is Dask's: pip install distributed, for SLURM dask-jobqueue too. For a pool of machines that see the same
folders start `dask scheduler` on one and `CUDA_VISIBLE_DEVICES=<k> dask worker tcp://host:8786 --nthreads 1
--memory-limit 0` once for each job that shall run at a time.
"""

import argparse
import fcntl
import glob
import json
import logging
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("bdm_rebrac_sbc", "cped", "dac", "dtql", "qdq", "srpo")
KINDS = ("medium", "medium-replay", "medium-expert")
LOCOMOTION = [f"{robot}-{kind}-v2" for robot in ("halfcheetah", "hopper", "walker2d") for kind in KINDS]
MAZES = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
GROUPS = dict(locomotion=LOCOMOTION, antmaze=[f"antmaze-{maze}-v2" for maze in MAZES])
TRIES = 3  # of a script that was ended by a signal; lost workers are not counted


class Job(NamedTuple):
    """One run of a script."""

    script: str
    env: str
    seeds: tuple[int, ...]
    data: str = ""  # what --data-path adds to the name of the folder

    def __str__(self):
        return f"{self.script} {self.env} seed {' '.join(map(str, self.seeds))}"

    def summaries(self, out):
        """The files that a finished run leaves, one for each seed."""
        folder = Path(out) / self.script / (re.sub("[/:]", "-", self.env) + self.data)
        return [folder / f"seed{seed}" / "summary.json" for seed in self.seeds]

    def done(self, out):
        return all(path.exists() for path in self.summaries(out))

    def log(self, out, kind):
        return Path(out) / "logs" / f"{self}.{kind}".replace("/", "-").replace(" ", "_")


def data_of(flags):
    """What --data-path adds to the names of run folders (`new_folders` in common.py)."""
    words = [word for flag in flags for word in flag.split("=", 1)]
    paths = [path for name, path in zip(words, words[1:]) if name in ("--data-path", "--data_path")]
    return f"@{Path(paths[-1]).stem}" if paths else ""


def all_jobs(scripts, envs, seeds, seeds_per_run, data=""):
    """Every script on every dataset; low seeds first, so that the table fills evenly."""
    envs = [env for name in envs for env in GROUPS.get(name, [name])]
    groups = [tuple(range(first, min(first + seeds_per_run, seeds))) for first in range(0, seeds, seeds_per_run)]
    return [Job(script, env, group, data) for group in groups for env in envs for script in scripts]


def share(slot, workers, cores, gpus):
    """The cores and the GPU of worker number `slot` on this machine, both None where there is nothing to share out."""
    each = len(cores) // workers
    mine = cores[slot * each : (slot + 1) * each] if each else None
    return mine, gpus[slot % len(gpus)] if gpus else None


def run_job(job, out, flags, python, mine=None, gpu=None):
    """Train `job` to its end, from its checkpoint if there is one; returns what went wrong, or None."""
    before = []
    if shutil.which("setpriv"):  # a killed worker takes its script along, which still writes a checkpoint
        before += ["setpriv", "--pdeathsig", "TERM"]
    env = os.environ | dict(PYTHONUNBUFFERED="1")
    if mine:
        before += ["taskset", "-c", ",".join(map(str, mine))] if shutil.which("taskset") else []
        env |= dict(OMP_NUM_THREADS=str(len(mine)))
    if gpu is not None:
        env |= dict(CUDA_VISIBLE_DEVICES=str(gpu))
    command = [python, str(ROOT / f"{job.script}.py"), "--env", job.env, "--seed", *map(str, job.seeds)]
    command += ["--out", str(out), "--resume", *flags]
    job.log(out, "log").parent.mkdir(parents=True, exist_ok=True)
    # the script inherits the lock with its stdout: while one lives that has lost its worker, no second one starts
    with open(job.log(out, "log"), "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with open(job.log(out, "err"), "w") as errors:
            for _ in range(TRIES):
                if job.done(out):
                    return None
                code = subprocess.run(
                    before + command, stdin=subprocess.DEVNULL, stdout=log, stderr=errors, env=env,
                    start_new_session=True,  # Ctrl-C is for the grid; the scripts learn of it by the end of the worker
                ).returncode  # fmt: skip
                if 0 <= code <= 128:
                    break
    if job.done(out):
        return None
    lines = [line.strip(" │") for line in job.log(out, "err").read_text().splitlines()]
    words = [line for line in lines if re.search(r"\w", line)]  # some messages stand in a frame
    return words[-1] if words else f"exit code {code}"


def on_worker(job, out, flags, python, places):
    """`run_job` on a Dask worker; `places` are the shares of this machine, empty in a pool of others."""
    from distributed import get_worker

    return run_job(job, out, flags, python, *(places[get_worker().name] if places else ()))


def open_pool(pool, jobs, slurm):
    """A Dask client, and the shares of its workers: on this machine, at an address, or on SLURM."""
    try:
        import dask
        import distributed

        if pool.startswith("slurm:"):
            import dask_jobqueue
    except ImportError as error:
        sys.exit(f"error: the grid needs Dask: pip install distributed dask-jobqueue ({error})")
    dask.config.set({
        "distributed.scheduler.worker-saturation": 1.0,  # jobs wait in the queue, not behind another on a worker
        "distributed.scheduler.allowed-failures": 20,  # workers that a job may lose
        "distributed.scheduler.unknown-task-duration": "1h",  # so that SLURM is asked for all workers at once
    })  # fmt: skip
    if not pool.isdecimal() and not pool.startswith("slurm:"):
        return distributed.Client(pool, timeout="30s"), []
    if pool.startswith("slurm:"):
        cluster = dask_jobqueue.SLURMCluster(
            cores=1, processes=1, python=sys.executable, worker_extra_args=["--memory-limit", "0"],
            scheduler_options=dict(dashboard_address=None), **slurm,
        )  # fmt: skip
        cluster.adapt(maximum_jobs=min(int(pool[6:]), jobs), wait_count=30)  # replaces lost workers, frees idle ones
        return distributed.Client(cluster), []
    workers = min(int(pool), jobs)
    cluster = distributed.LocalCluster(
        n_workers=workers, threads_per_worker=1, memory_limit=0, dashboard_address=None, silence_logs=logging.ERROR
    )
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return distributed.Client(cluster), [share(slot, workers, cores, local_gpus()) for slot in range(workers)]


def local_gpus():
    """CUDA's numbers of this machine's GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:  # empty: none
        return [name for name in visible.split(",") if name]
    return list(range(len(glob.glob("/dev/nvidia[0-9]*"))))


def run_all(jobs, out, flags, pool, slurm):
    """Run the jobs; returns {job: what went wrong}."""
    client, places = open_pool(pool, len(jobs), slurm)
    from distributed import as_completed

    failed = {}
    with client:
        futures = {
            client.submit(on_worker, job, out, flags, sys.executable, places, key=str(job), pure=False): job
            for job in jobs
        }
        for number, future in enumerate(as_completed(futures), 1):
            job = futures.pop(future)
            error = future.result() if future.status == "finished" else str(future.exception())
            if error:
                failed[job] = error
            print(f"[{number}/{len(jobs)}] {job}: {error or 'done'}", flush=True)
            future.release()
    if client.cluster:
        client.cluster.close()
    return failed


def results(jobs, out):
    """One row for each script and dataset, over the seeds that are finished; `score` is D4RL's or the raw return."""
    rows = []
    for script, env in dict.fromkeys((job.script, job.env) for job in jobs):
        paths = [path for job in jobs if (job.script, job.env) == (script, env) for path in job.summaries(out)]
        found = [json.loads(path.read_text()) for path in paths if path.exists()]
        row = dict(script=script, env=env, seeds=len(found), of=len(paths))
        if found:
            row |= dict(updates=found[0]["steps"], minutes=statistics.mean(one["seconds"] for one in found) / 60)
            row |= dict(paper=found[0]["paper_score"])
        measure = "score" if all("score" in one for one in found) else "return"
        values = [one[measure]["last_five"] for one in found if measure in one]
        if values:
            row |= dict(measure=measure, mean=statistics.mean(values))
            row |= dict(std=statistics.stdev(values) if len(values) > 1 else None)
        rows.append(row)
    return rows


def table(rows):
    """The rows in Markdown."""
    lines = ["| dataset | script | last five | paper | seeds | updates | minutes |", "|---|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["env"]):
        value = "-"
        if "mean" in row:
            value = f"{row['mean']:.1f}" + (f" ± {row['std']:.1f}" if row["std"] is not None else "")
            value += " (return)" if row["measure"] == "return" else ""
        paper = "-" if row.get("paper") is None else row["paper"]
        seeds = str(row["seeds"]) if row["seeds"] == row["of"] else f"{row['seeds']} of {row['of']}"
        updates, minutes = (f"{row['updates']:,}", f"{row['minutes']:.1f}") if row["seeds"] else ("-", "-")
        lines.append(f"| {row['env']} | {row['script']} | {value} | {paper} | {seeds} | {updates} | {minutes} |")
    return "\n".join(lines)


def keep_flags(out, scripts, flags):
    """Note the scripts' flags in <out>/flags.json; refuse others, because finished runs would be taken for new ones."""
    path = Path(out) / "flags.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for script in scripts:
        if known.get(script) != flags and (Path(out) / script).exists():
            earlier = f"the flags {' '.join(known[script]) or '(none)'}" if script in known else "flags of their own"
            sys.exit(f"error: {out} holds runs of {script} with {earlier}: use another --out")
        known[script] = flags
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=2))


def main():
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    own, flags = sys.argv[1:split], sys.argv[split + 1 :]
    there = [name for name in SCRIPTS if (ROOT / f"{name}.py").exists()]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--scripts", nargs="+", default=there, choices=there, metavar="SCRIPT", help="(all)")
    parser.add_argument("--envs", nargs="+", default=["locomotion"], help="datasets, or: " + " ".join(GROUPS))
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N - 1 (5)")
    parser.add_argument("--seeds-per-run", type=int, default=1, help="seeds side by side in one process (1)")
    parser.add_argument("--pool", default=str(max(len(local_gpus()), 1)),
                        help="workers on this machine (one per GPU), tcp://scheduler:port, or slurm:N")  # fmt: skip
    parser.add_argument("--sbatch", action="append", default=[], help="slurm: one more flag of sbatch")
    parser.add_argument("--time", default="24:00:00", help="slurm: time limit of a worker, not of a run (24:00:00)")
    parser.add_argument("--memory", default="16GB", help="slurm: memory of a worker (16GB)")
    parser.add_argument("--out", default="runs/grid", help="folder for run folders (runs/grid)")
    args = parser.parse_args(own)
    if not re.fullmatch(r"[1-9]\d*|slurm:[1-9]\d*|\w+://.+:\d+", args.pool):
        parser.error(f"--pool takes a number, slurm:N or tcp://host:port, found {args.pool}")
    if min(args.seeds, args.seeds_per_run) < 1:
        parser.error("--seeds and --seeds-per-run must be at least 1")

    out = Path(args.out).resolve()
    keep_flags(out, args.scripts, flags)
    jobs = all_jobs(args.scripts, args.envs, args.seeds, args.seeds_per_run, data_of(flags))
    missing = [job for job in jobs if not job.done(out)]
    print(f"{len(jobs)} jobs, {len(jobs) - len(missing)} of them done before", flush=True)
    failed = {}
    try:
        if missing:
            slurm = dict(walltime=args.time, memory=args.memory, job_extra_directives=args.sbatch)
            failed = run_all(missing, out, flags, args.pool, slurm)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")
    except (OSError, ValueError) as error:
        sys.exit(f"error: the pool {args.pool} cannot be used: {error}")

    rows = results(jobs, out)
    (out / "grid.json").write_text(json.dumps(rows, indent=2))
    (out / "grid.md").write_text(table(rows) + "\n")
    print(table(rows))
    for job, error in failed.items():
        print(f"failed: {job}: {error}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
