"""Scores of all methods on MuJoCo data in D4RL's layout: the six scripts, ReBRAC and plain behaviour cloning.

    python tests/benchmarks/scores.py DATA                          # half an hour of one CPU core for each run
    python tests/benchmarks/scores.py DATA --methods bc rebrac --sets hopper-medium-v2 --seeds 1 --jobs 1
    python tests/benchmarks/scores.py DATA --rows medium-expert     # with the papers' rows for another kind of data
    python tests/benchmarks/scores.py DATA --methods qdq --change "--bc-coef 2"   # one thing changed, to find a cause
    python tests/benchmarks/scores.py DATA --full                   # the papers' sizes and lengths, for a GPU
    python tests/benchmarks/scores.py --table                       # no training: tables and picture of what is there

DATA is a folder with the files named in SETS. The protocol was fixed before the first run: every run takes the paper's
settings for the D4RL set of the same robot and kind and changes only what SCALE and LONG say, nothing was tuned; twenty
evaluations. A stopped run is resumed. A finished one leaves its summary, its curve, what its score comes from and the
CPU time it took in tests/results/scores, and is not made again; the tables in tests/results/README.md and the picture
beside them are drawn from that folder alone. An older core, without AVX-512, takes up to three times as long.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from common import REFERENCE, load_dataset, load_policy, processor, read_csv, score, warn  # noqa: E402

KEPT = ROOT / "tests/results/scores"
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
SCALE = "--hidden 128 --batch-size 256 --device cpu"
LONG = {  # lengths that one core does in about half an hour; bc: the paper's own length, which takes less
    "bc": "--steps 1000000",
    "rebrac": "--steps 500000",
    "bdm": "--steps 200000 --bdm-hidden 128",
    "dtql": "--steps 120000 --behavior-hidden 128",
    "srpo": "--steps 75000 --behavior-hidden 128 --behavior-batch-size 256",
    "dac": "--steps 40000 --critics 4 --next-samples 2",
    "qdq": "--steps 30000 --return-hidden 128 --q-samples 10",
    "cped": "--steps 120000 --behavior-hidden 128",
}


def settings_of(env, rows):
    """The D4RL set whose row of the paper's table is taken: that of `env`, or the one of kind `rows`."""
    return env if rows is None else f"{env.split('-')[0]}-{rows}-v2"


def kept(method, env, rows, seed, change=""):
    """The file that holds the result of a run."""
    return KEPT / f"{method}-{Path(SETS[env]).stem}{f'-as-{rows}' if rows else ''}{short(change)}-seed{seed}.json"


def short(change):
    """The flags of --change as part of a file's name."""
    return re.sub(r"[^\w.]+", "-", f" {change}".rstrip())


def train(args, method, env, seed):
    """One run from its start or its last checkpoint, then its result."""
    result = kept(method, env, args.rows, seed, args.change)
    if result.exists() and not args.full:
        return
    script, flags = METHODS[method]
    row, out = settings_of(env, args.rows), args.out / f"{method}{short(args.change)}"
    command = [sys.executable, str(ROOT / f"{script}.py"), "--env", row, "--data-path", str(args.data / SETS[env])]
    command += [*flags.split(), "--seed", str(seed), "--out", str(out), "--resume"]
    if not args.full:
        steps = int(re.findall(r"--steps (\d+)", f"{LONG[method]} {args.change}")[-1])
        command += f"{SCALE} {LONG[method]} --eval-every {steps // 20} --eval-episodes 10".split()
        models = args.out / method / script / f"{env}@{Path(SETS[env]).stem}"  # SRPO's: the rows differ in beta alone
        if method == "srpo" and args.rows and (models / f"seed{seed}").exists():
            command += ["--reuse", str(models)]
    command += args.change.split()
    run = out / script / f"{row}@{Path(SETS[env]).stem}" / f"seed{seed}"
    cost = args.out / f"{out.name}-{row}-{Path(SETS[env]).stem}-{seed}.seconds"  # of CPU time, over all parts of a run
    with open(cost.with_suffix(".log"), "a") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, used = os.wait4(child.pid, 0)
    seconds = used.ru_utime + used.ru_stime + (float(cost.read_text()) if cost.exists() else 0)
    cost.write_text(str(seconds))
    if status:
        return warn(f"{method} {env} seed {seed} failed or was stopped, see {log.name}")
    print(f"{method} {env} seed {seed}: {seconds / 60:.0f} min of CPU time", flush=True)
    if not args.full:
        curve = [(row["total"], row["score"]) for row in read_csv(run / "metrics.csv") if "score" in row]
        data = load_dataset(env, str(args.data / SETS[env]), judge=False)
        behavior = float(score(env, data.episode_returns).mean())
        known = dict(method=method, rows=args.rows, data_score=behavior, curve=curve) | causes(script, run, data)
        known |= dict(cpu_minutes=seconds / 60, processor=processor(), command=" ".join(command[1:]))
        known |= dict(git=json.loads((run / "args.json").read_text())["git"])  # the commit
        known["command"] = known["command"].replace(f"{ROOT}/", "").replace(f"{args.data}/", "DATA/")
        summary = json.loads((run / "summary.json").read_text()) | dict(data_path=SETS[env], env=env)
        KEPT.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps(summary | known, indent=1).replace(f"{args.out}", "runs/scores"))


def causes(script, run, data):
    """Where a score comes from: Q over the last tenth of the updates beside what it can be, and the policy's place.

    q: mean Q at the data's rows (DAC: mean |Q|). data_q: the mean discounted return that follows these rows, as far as
    the data go. expert_q: D4RL's expert, for ever. All three in the data's own rewards. distance: mean over 1,000 rows
    of |policy's action - the data's|^2 per dimension.
    """
    module = importlib.import_module(script)
    act = load_policy(getattr(module, "BDM" if script == "bdm_rebrac_sbc" else script.upper()), module.Args, run)
    index = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:1000]
    found = dict(distance=float(np.mean((act(data.obs[index].numpy()) - data.action[index].numpy()) ** 2)))
    rows = [row for row in read_csv(run / "metrics.csv") if "q" in row or "q_scale" in row]
    gamma = json.loads((run / "args.json").read_text())["args"]["gamma"]
    reward, follows = data.reward.numpy().astype(float), np.append(np.diff(data.episode.numpy()) == 0, False)
    value = np.zeros(len(data))
    for i in reversed(range(len(data))):
        value[i] = reward[i] + (gamma * value[i + 1] if follows[i] else 0)
    if rows:
        scaled = data.reward.clone()
        if script == "dac":
            module.prepare(data)
        elif script == "srpo":
            module.scale_rewards(data)
        expert = REFERENCE[data.name.split("-")[0]][1]
        scale = float((data.reward / scaled)[scaled != 0].median())
        last = [row.get("q", row.get("q_scale")) for row in rows[-max(len(rows) // 10, 1) :]]
        found |= dict(q=float(np.mean(last)) / scale, data_q=value.mean(), expert_q=expert / 1000 / (1 - gamma))
    return found


def collect(rows):
    """{dataset: {method: results of all seeds}} of what is kept for these rows of the papers' tables."""
    table = {}
    for env in SETS:
        for method in METHODS:
            files = sorted(KEPT.glob(kept(method, env, rows, "*").name))
            if found := [json.loads(file.read_text()) for file in files]:
                table.setdefault(env, {})[method] = found
    return table


def spread(values):
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f} ({len(values)})" if len(values) > 1 else "")


def markdown(table):
    """Last evaluation / mean of the last five, a row for each method; standard deviation and number of seeds."""
    lines = [
        f"| | {' | '.join(Path(SETS[env]).stem for env in table)} | CPU minutes |",
        "|---" * (len(table) + 2) + "|",
    ]
    data = [next(iter(found.values()))[0]["data_score"] for found in table.values()]
    lines += [f"| the data | {' | '.join(f'{value:.1f}' for value in data)} | |"]
    for method in METHODS:
        cells, minutes = [], []
        for found in table.values():
            runs = found.get(method, [])
            minutes += [run["cpu_minutes"] for run in runs]
            both = [spread([run["score"][when] for run in runs]) for when in ("last", "last_five")] if runs else ["-"]
            cells.append(" / ".join(both))
        if minutes:
            lines.append(f"| {method} | {' | '.join(cells)} | {np.mean(minutes):.0f} |")
    return "\n".join(lines)


def explain(tables):
    """Where the scores come from, a row for each run that was measured: see `causes`."""
    lines = ["| | set | last five | distance | mean Q | the data's | an expert's |", "|---" * 7 + "|"]
    for rows, table in tables.items():
        for runs in [found[method] for method in METHODS for found in table.values() if method in found]:
            for run in [run for run in runs if "distance" in run]:
                name = f"{run['method']}{f' as {rows}' if rows else ''}, seed {run['seed']}"
                q = [f"{run[key]:,.0f}" if key in run else "" for key in ("q", "data_q", "expert_q")]
                place = f"{Path(run['data_path']).stem} | {run['score']['last_five']:.1f} | {run['distance']:.3f}"
                lines.append(f"| {name} | {place} | {' | '.join(q)} |")
    return "\n".join(lines)


def draw(tables, path):
    """A panel for each dataset, a bar for each method with its lowest and highest seed, data and clone as lines."""
    envs = [env for env in SETS if tables.get(None, {}).get(env, {}).keys() - {"bc"}]
    there = {method for table in tables.values() for found in table.values() for method in found}
    names = [method for method in METHODS if method in there - {"bc"}]
    figure = Figure(figsize=(4.5 * len(envs), 4), layout="constrained")
    for axes, env in zip(figure.subplots(1, len(envs), sharey=True, squeeze=False)[0], envs):
        for k, (rows, table) in enumerate(tables.items()):
            runs = {x: table[env][name] for x, name in enumerate(names) if name in table.get(env, {})}
            if not runs:
                continue
            found = [[run["score"]["last_five"] for run in seeds] for seeds in runs.values()]
            mean = np.array([np.mean(values) for values in found])
            spread = [mean - [min(values) for values in found], [max(values) for values in found] - mean]
            label = f"settings for {rows or 'this kind of'} data"
            axes.bar(np.array(list(runs)) + 0.4 * k, mean, 0.38, color=f"C{k}", yerr=spread, label=label)
        found = tables[None][env]
        axes.axhline(next(iter(found.values()))[0]["data_score"], color="black", linestyle="--", label="the data")
        if "bc" in found:
            clone = np.mean([run["score"]["last_five"] for run in found["bc"]])
            axes.axhline(clone, color="black", linestyle=":", label="behaviour cloning")
        for x in [x for x, name in enumerate(names) if name not in found]:
            axes.text(x + 0.2, 1, "not run yet", rotation=90, ha="center", fontsize=8)
        axes.set_xticks(np.arange(len(names)) + 0.2, names, rotation=45)
        axes.set(title=Path(SETS[env]).stem, xlim=(-0.6, len(names)))
    figure.axes[0].set_ylabel("D4RL score, mean of the last five")
    entries = {}  # of all panels, each once
    for axes in figure.axes:
        entries |= dict(zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=2 if len(envs) == 1 else 4, fontsize=8)
    figure.savefig(path, dpi=100)


def write_tables():
    """Put the tables between their marks in tests/results/README.md, and draw the picture."""
    tables = {rows: collect(rows) for rows in (None, "medium-expert")}
    tables = {rows: table for rows, table in tables.items() if table}
    page = ROOT / "tests/results/README.md"
    text = page.read_text()
    parts = {f"scores {rows}": markdown(table) for rows, table in tables.items()} | {"causes": explain(tables)}
    for name, table in parts.items():
        begin, end = f"<!-- {name} -->", "<!-- end -->"
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{table}\n{end}{rest.split(end, 1)[1]}"
        print(f"\n{name}\n{table}")
    page.write_text(text)
    if any(found.keys() - {"bc"} for found in tables.get(None, {}).values()):
        draw(tables, ROOT / "tests/figures/scores.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="folder with the files in SETS")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD", help="(all)")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS, metavar="SET", help="(all)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1 (3)")
    parser.add_argument("--rows", help="kind of data whose rows of the papers' tables are taken: medium-expert")
    parser.add_argument("--change", default="", help="flags put last, in quotes; the result stands in no table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (one per core)")
    parser.add_argument("--full", action="store_true", help="the papers' sizes and lengths")
    parser.add_argument("--table", action="store_true", help="no training")
    parser.add_argument("--out", type=Path, default=Path("runs/scores"), help="folder for the runs")
    args = parser.parse_args()
    if args.table:
        return write_tables()
    if not args.data or (missing := [SETS[env] for env in args.sets if not (args.data / SETS[env]).exists()]):
        parser.error(f"{args.data} has no {', '.join(missing)}" if args.data else "name the folder with the data")
    args.data, args.out = args.data.resolve(), args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    # low seeds first, so that the table fills evenly
    jobs = [(seed, env, method) for seed in range(args.seeds) for env in args.sets for method in args.methods]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: train(args, job[2], job[1], job[0]), jobs))


if __name__ == "__main__":
    main()
