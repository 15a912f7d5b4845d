"""Scores of all methods on MuJoCo data in D4RL's layout: the six scripts, ReBRAC and plain behaviour cloning.

    python tests/benchmarks/scores.py DATA                 # short runs for two CPU cores, hours
    python tests/benchmarks/scores.py DATA --full          # the papers' widths, batch sizes and updates, for a GPU
    python tests/benchmarks/scores.py DATA --methods bc rebrac --seeds 1 --jobs 1
    python tests/benchmarks/scores.py DATA --closer --sets hopper-medium-v2 --out runs/closer

DATA is a folder with the files named in SETS. Every run takes the paper's settings for the D4RL set of the same robot
and kind, is a run of a script like any other, and is resumed if it was stopped; a second start runs what is missing.
Short runs change only what SHORT names: small networks and batches, learning rate 1e-3, faster targets, few updates.
With --closer they also take the settings in CLOSER, which hold the policy nearer to the data than the papers do.
<out>/scores.json holds the table (see --table for a look at an unfinished one), <out>/scores.png the curves.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from common import load_dataset, save_figure, score, warn  # noqa: E402

SETS = {
    "hopper-medium-v2": "Hopper-v4-sac-medium.hdf5",
    "hopper-medium-replay-v2": "Hopper-v4-sac-medium-replay.hdf5",
    "halfcheetah-medium-v2": "HalfCheetah-v4-sac-medium.hdf5",
    "halfcheetah-medium-replay-v2": "HalfCheetah-v4-sac-medium-replay.hdf5",
}
METHODS = {  # script, and the flags that make the method
    "bc": ("bdm_rebrac_sbc", "--sbc-only --w-s 0"),
    "rebrac": ("bdm_rebrac_sbc", "--w-s 0"),
    "bdm": ("bdm_rebrac_sbc", ""),
    "dtql": ("dtql", ""),
    "srpo": ("srpo", ""),
    "dac": ("dac", ""),
    "qdq": ("qdq", ""),
    "cped": ("cped", ""),
}
SMALL = "--steps 5000 --eval-every 1000 --log-every 500 --hidden 64 --batch-size 128 --tau 0.02 --device cpu"
SHORT = {  # the phases before the last are cut to lengths that a slow core does in a minute
    "bc": "--actor-lr 1e-3",
    "rebrac": "--actor-lr 1e-3",
    "bdm": "--actor-lr 1e-3 --bdm-lr 1e-3 --bdm-hidden 64 --num-futures 4",
    "dtql": "--actor-lr 1e-3 --behavior-lr 1e-3 --critic-lr 1e-3 --behavior-hidden 64 --candidates 64",
    "srpo": "--critic-lr 1e-3 --behavior-lr 1e-3 --actor-lr 1e-3 --behavior-hidden 64 --behavior-batch-size 128 "
    "--behavior-steps 5000",
    "dac": "--actor-lr 1e-3 --critic-lr 1e-3 --next-samples 2",
    "qdq": "--critic-lr 1e-3 --actor-lr 1e-3 --return-hidden 64 --q-samples 8 --score-steps 2500 "
    "--consistency-steps 2500",
    "cped": "--critic-lr 1e-3 --actor-lr 1e-3 --behavior-lr 1e-3 --behavior-hidden 64 --behavior-steps 5000",
}
CLOSER = {  # chosen by a run or two of seed 0 on Hopper medium
    "bc": "",
    "rebrac": "--w-a 0.2",
    "bdm": "--w-a 0.2",
    "dtql": "--alpha 50",
    "srpo": "--beta 0.005 --dropout 0 --behavior-steps 20000",
    "dac": "--bc-threshold 0.06 --candidates 1",
    "qdq": "--bc-coef 8",
    "cped": "--alpha 1000 100 75 50 25 15 --behavior-steps 25000",
}


def folder(args, method, env, seed):
    """Where the run leaves its files."""
    return args.out / method / METHODS[method][0] / f"{env}@{Path(SETS[env]).stem}" / f"seed{seed}"


def train(args, method, env, seed):
    """One run from its start or its last checkpoint; afterwards <out>/cpu.json knows its seconds of CPU time."""
    run = folder(args, method, env, seed)
    if (run / "summary.json").exists():
        return
    script, flags = METHODS[method]
    command = [sys.executable, str(ROOT / f"{script}.py"), "--env", env, "--data-path", str(args.data / SETS[env])]
    command += [*flags.split(), "--seed", str(seed), "--out", str(args.out / method), "--resume"]
    if not args.full:
        command += f"{SMALL} {SHORT[method]} {CLOSER[method] if args.closer else ''}".split()
    with open(args.out / f"{method}-{env}-{seed}.log", "a") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, used = os.wait4(child.pid, 0)
    if status:
        return warn(f"{method} {env} seed {seed} failed, see {log.name}")
    (run / "cpu.json").write_text(json.dumps(used.ru_utime + used.ru_stime))
    print(f"{method} {env} seed {seed}: {used.ru_utime + used.ru_stime:.0f} s of CPU time", flush=True)


def curve(run):
    """Updates of the last phase and the score of each evaluation, from metrics.csv."""
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    return [(float(row["step"]), float(row["score"])) for row in rows if row.get("score")]


def collect(args):
    """{dataset: {method: dict}} over finished seeds: scores of the last and of the last five evaluations, and costs."""
    table = {}
    for env in args.sets:
        table[env] = {"data": float(score(env, load_dataset(env, str(args.data / SETS[env])).episode_returns).mean())}
        for method in args.methods:
            runs = [folder(args, method, env, seed) for seed in range(args.seeds)]
            runs = [run for run in runs if (run / "summary.json").exists()]
            if runs:
                found = [json.loads((run / "summary.json").read_text()) for run in runs]
                table[env][method] = dict(
                    last=[one["score"]["last"] for one in found],
                    last_five=[one["score"]["last_five"] for one in found],
                    updates=found[0]["steps"],
                    minutes=[one["seconds"] / 60 for one in found],
                    cpu_minutes=[json.loads(file.read_text()) / 60 for run in runs for file in run.glob("cpu.json")],
                    curves=[curve(run) for run in runs],
                )
    return table


def show(table, methods, key):
    """A table in Markdown: a row for each method, mean and standard deviation over seeds."""
    print(f"\n| {key.replace('_', ' ')} | {' | '.join(table)} |\n{'|---' * (len(table) + 1)}|")
    print("| data | " + " | ".join(f"{row['data']:.1f}" for row in table.values()) + " |")
    for method in methods:
        found = [row.get(method, {}).get(key, []) for row in table.values()]
        cells = [f"{np.mean(v):.1f} ± {np.std(v, ddof=len(v) > 1):.1f} ({len(v)})" if v else "-" for v in found]
        print(f"| {method} | {' | '.join(cells)} |")


def draw(args, table):
    """Score over the fraction of the run, a panel for each dataset, a line for each method."""

    def panel(axes, env):
        axes.axhline(table[env]["data"], color="grey", linestyle="--", label="data")
        for i, method in enumerate(args.methods):
            if method in table[env]:
                curves = np.array(table[env][method]["curves"])  # [seeds, evaluations, 2]
                steps, mean = curves[0, :, 0] / curves[0, -1, 0], curves[..., 1].mean(0)
                axes.plot(steps, mean, ".-", color=f"C{i}", label=method)
                axes.fill_between(steps, curves[..., 1].min(0), curves[..., 1].max(0), color=f"C{i}", alpha=0.1)
        axes.set(title=Path(SETS[env]).stem, xlabel="fraction of the run", ylabel="D4RL score")
        if env == args.sets[0]:
            axes.legend(fontsize=7)

    save_figure(args.out / "scores.png", *(lambda axes, env=env: panel(axes, env) for env in args.sets))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the files in SETS")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD", help="(all)")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS, metavar="SET", help="(all)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1 (3)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (one per core)")
    parser.add_argument("--full", action="store_true", help="the papers' sizes and lengths")
    parser.add_argument("--closer", action="store_true", help="short runs held nearer to the data (CLOSER)")
    parser.add_argument("--table", action="store_true", help="no training: only the table of what is finished")
    parser.add_argument("--out", type=Path, default=Path("runs/scores"), help="folder for runs and results")
    args = parser.parse_args()
    args.data, args.out = args.data.resolve(), args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    missing = [SETS[env] for env in args.sets if not (args.data / SETS[env]).exists()]
    if missing:
        parser.error(f"{args.data} has no {', '.join(missing)}")
    if not args.table:  # low seeds first, so that the table fills evenly
        jobs = [(seed, env, method) for seed in range(args.seeds) for env in args.sets for method in args.methods]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: train(args, job[2], job[1], job[0]), jobs))
    table = collect(args)
    (args.out / "scores.json").write_text(json.dumps(table, indent=1))
    for key in ("last", "last_five", "cpu_minutes"):
        show(table, args.methods, key)
    draw(args, table)


if __name__ == "__main__":
    main()
