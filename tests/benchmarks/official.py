"""Ours on official: mean Q over the updates, this project's learning curves on those of the authors' code.

    python tests/benchmarks/official.py DATA        # DATA: a folder with Hopper-v4-sac-medium.hdf5; writes tests/
    python tests/benchmarks/official.py DATA --methods rebrac --seeds 0 1    # writes to runs/official instead

Same data, same settings, small networks; only random draws and initial seeds differ. OFFICIAL was measured by running
the authors' code on these data (seeds 0 and 1; QDQ: mean and standard deviation of five seeds). DAC: mean |Q| of the
target critics at the data's actions; ReBRAC and QDQ: mean Q of both critics at the data's actions.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
ENV, FILE, SEEDS = "hopper-medium-v2", "Hopper-v4-sac-medium.hdf5", (0,)
METHODS = {  # script, flags, the column of metrics.csv
    "dac": ("dac", "--hidden 64 --critics 4 --batch-size 128 --rho 1.5 --bc-threshold 1 --steps 8000 --lr-decay-steps "
            "2000000 --actor-ema-start 1000 --log-every 50", "q_scale"),
    "rebrac": ("bdm_rebrac_sbc", "--rebrac --hidden 64 --batch-size 256 --steps 12000 --log-every 50", "q"),
    "qdq": ("qdq", "--hidden 64 --batch-size 64 --q-samples 10 --score-steps 4000 --consistency-steps 4000 "
            "--return-hidden 64 --steps 6000 --log-every 50", "q"),
}  # fmt: skip
OFFICIAL = {  # updates: seeds 0 and 1, or mean and standard deviation of five seeds
    "dac": {250: (0.66, 0.60), 1000: (4.41, 4.25), 2000: (10.2, 9.6), 4000: (24.9, 22.3), 6000: (38.2, 35.2),
            8000: (49.9, 47.9)},
    "rebrac": {250: (4.52, 4.48), 1000: (10.0, 9.9), 3000: (25.9, 26.1), 6000: (51.8, 52.3), 9000: (74.5, 76.4),
               12000: (94.3, 96.0)},
    "qdq": {250: (3.05, 0.27), 1000: (7.76, 0.28), 2000: (14.5, 0.4), 3000: (21.7, 0.5), 4500: (32.9, 0.7),
            6000: (44.1, 1.0)},
}  # fmt: skip


def train(method, seed, data, out):
    """Updates -> mean Q of a run of ours, over the fifty updates that end there."""
    script, flags, column = METHODS[method]
    folder = out / method / script / f"{ENV}@{Path(FILE).stem}" / f"seed{seed}"
    if not (folder / "summary.json").exists():
        command = [sys.executable, ROOT / f"{script}.py", "--env", ENV, "--data-path", data / FILE, "--seed", str(seed)]
        command += [*flags.split(), "--eval-episodes", "0", "--device", "cpu", "--out", out / method]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = csv.DictReader((folder / "metrics.csv").open())
    return {int(row["step"]): float(row[column]) for row in rows if row["phase"] in ("update", "policy")}


def draw(path, ours):
    figure = Figure(figsize=(4.2 * len(ours), 3.6), layout="constrained")
    for axes, method in zip(figure.subplots(1, len(ours), squeeze=False)[0], ours):
        for seed, curve in ours[method].items():
            axes.plot(curve.keys(), curve.values(), color="C0", label=None if seed else "this project")
        updates, values = OFFICIAL[method].keys(), list(OFFICIAL[method].values())
        if method == "qdq":
            style = dict(fmt="o", color="black", markersize=4, capsize=3, label="official code, 5 seeds")
            axes.errorbar(updates, *zip(*values), **style)
        else:
            for i, official in enumerate(zip(*values)):
                label = None if i else "official code, 2 seeds"
                axes.plot(updates, official, "ox"[i], color="black", markersize=5, label=label)
        axes.set(title=method, xlabel="updates", ylabel="mean |Q|" if method == "dac" else "mean Q")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=90)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    args = parser.parse_args()
    out = ROOT / "runs" / "official"
    ours = {m: {seed: train(m, seed, args.data.resolve(), out) for seed in args.seeds} for m in args.methods}
    rows = [
        dict(method=method, updates=n, official=OFFICIAL[method][n], ours=[curve[n] for curve in ours[method].values()])
        for method in ours
        for n in OFFICIAL[method]
    ]
    for row in rows:
        print("{method:<7} {updates:>6,}  official {official}  ours {ours}".format(**row))
    committed = tuple(args.seeds) == SEEDS and args.methods == list(METHODS)  # any other run leaves the files alone
    draw((ROOT / "tests/figures" if committed else out) / "official.png", ours)
    text = dict(command="python tests/benchmarks/official.py DATA", seeds=args.seeds, rows=rows)
    ((ROOT / "tests/results" if committed else out) / "official.json").write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
