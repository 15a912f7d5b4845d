"""Six methods on 2-D scenes, in one picture: a row for each scene, a column for each method.

    python tests/benchmarks/scenes.py              # writes tests/figures/scenes.png and tests/results/scenes.json
    python tests/benchmarks/scenes.py --seed 1 --scenes moons rings                  # writes to runs/scenes instead

Every panel is `python <script>.py --env bandit-<scene>` with the script's one set of settings for bandits, one to five
minutes each. There is one state: dots are actions of the data, coloured by their reward, red are 1,000 actions of the
policy. A good policy is where the dots are brightest, and nowhere without dots: beyond the data Q is a guess. Runs
that are finished are not run again (runs/scenes).
"""

import argparse
import importlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from common import load_dataset, load_policy  # noqa: E402

LEARNERS = dict(dtql="DTQL", srpo="SRPO", dac="DAC", qdq="QDQ", cped="CPED", bdm_rebrac_sbc="BDM")
TITLES = dict(BDM="ReBRAC")  # one state has no futures to clone
SCENES = ("8gaussians", "3gaussians", "ring")
SEED, OUT = 0, ROOT / "runs" / "scenes"


def train(script, scene, seed):
    """The folder of the script's run on the scene."""
    folder = OUT / script / f"bandit-{scene}" / f"seed{seed}"
    if not (folder / "summary.json").exists():
        command = [sys.executable, ROOT / f"{script}.py", "--env", f"bandit-{scene}", "--seed", str(seed)]
        run = subprocess.run([*command, "--device", "cpu", "--out", OUT], capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"{script} on {scene} failed: {run.stderr}")
        print(script, scene, flush=True)
    return folder


def actions_of(script, folder):
    """1,000 actions of the trained policy."""
    module = importlib.import_module(script)
    act = load_policy(getattr(module, LEARNERS[script]), module.Args, folder)
    return np.concatenate([act(np.zeros((50, 1), np.float32)) for _ in range(20)])


def measure(data, action):
    """Mean reward of the actions, and their mean distance to the nearest action in the data."""
    env = data.make_env()
    env.reset(seed=0)
    distance = torch.cdist(torch.as_tensor(action), data.action).amin(1)
    return dict(reward=float(np.mean([env.step(a)[1] for a in action])), distance=distance.mean().item())


def draw(path, actions, numbers, scenes):
    figure = Figure(figsize=(2.4 * len(LEARNERS), 2.7 * len(scenes) + 0.4), layout="constrained")
    panels = figure.subplots(len(scenes), len(LEARNERS), squeeze=False)
    for row, scene in zip(panels, scenes):
        data = load_dataset(f"bandit-{scene}")
        size = 1.1 * data.max_action
        for panel, (script, name) in zip(row, LEARNERS.items()):
            action = actions[script, scene]
            panel.scatter(*data.action[::4].T, c=data.reward[::4], s=2, cmap="viridis")
            panel.scatter(*action.T, c="red", s=3 if np.std(action, 0).max() > 0.02 * size else 40)  # many dots or one
            panel.set(xlim=(-size, size), ylim=(-size, size), aspect="equal", xticks=[], yticks=[])
            panel.set(
                title=TITLES.get(name, name) if scene == scenes[0] else "",
                xlabel=f"reward {numbers[script, scene]['reward']:.2f}",
            )
        row[0].set_ylabel(f"{scene}\n(data: reward {data.reward.mean():.2f})", fontsize=11)
    figure.savefig(path, dpi=80)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--scenes", nargs="+", default=SCENES, help="names without bandit-")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    jobs = [(script, scene) for scene in args.scenes for script in LEARNERS]
    with ThreadPoolExecutor(args.workers) as pool:
        folders = dict(zip(jobs, pool.map(lambda job: train(*job, args.seed), jobs)))

    actions = {job: actions_of(job[0], folder) for job, folder in folders.items()}
    numbers = {job: measure(load_dataset(f"bandit-{job[1]}"), action) for job, action in actions.items()}
    minutes = sum(json.loads((folder / "summary.json").read_text())["seconds"] for folder in folders.values()) / 60
    rows = [dict(script=script, scene=scene, **numbers[script, scene]) for script, scene in jobs]
    for row in rows:
        print("{script:<15} {scene:<16} reward {reward:8.3f}  distance to the data {distance:.3f}".format(**row))
    print(f"{minutes:.0f} minutes of training")
    figure, results = ROOT / "tests" / "figures", ROOT / "tests" / "results"
    if args.seed != SEED or tuple(args.scenes) != SCENES:  # the committed files stay
        figure = results = OUT
    draw(figure / "scenes.png", actions, numbers, args.scenes)
    text = dict(command="python tests/benchmarks/scenes.py", seed=args.seed, minutes=round(minutes, 1), rows=rows)
    (results / "scenes.json").write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
