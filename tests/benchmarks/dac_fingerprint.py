"""The first 20,000 updates of DAC on walker2d-medium-v2, held against eight runs of the official code.

    python tests/benchmarks/dac_fingerprint.py [--seed 0] [--device cuda] [--data-path FILE.hdf5]

Needs the dataset (downloaded once) and should run on a GPU: on one CPU core it takes hours. Compared are the mean |Q|
that scales the guidance (C in Eq. 19) and eta, and for information the spread of the critics, mean |g| and the losses,
at updates 0, 5,000, ..., each averaged over five updates (the official numbers are from one). Exit code 1 when C or eta
leaves its range. Reward scale, discount, target rates, learning rates and target order all show here.
Source of the official numbers: the TensorBoard logs of seeds 0 to 7 in the official repository,
results/walker2d-medium-v2, run 20240510-153803.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from common import RunError, capture, cli, load_dataset  # noqa: E402
from dac import DAC, PAPER, Args, prepare  # noqa: E402

ENV = "walker2d-medium-v2"
OFFICIAL = {  # update: mean C, its range, largest eta; then std over critics, mean |g|, critic loss, behaviour loss
    0: (0.209, (0.15, 0.28), 1.01, 0.247, 0.0372, 0.53, 1.13),
    5_000: (20.25, (18.5, 21.5), 0.02, 0.069, 0.0103, 0.147, 0.97),
    10_000: (45.9, (43.5, 48.9), 0.02, 0.131, 0.0053, 0.195, 0.86),
    15_000: (64.2, (61.5, 67.0), 0.02, 0.205, 0.0041, 0.353, 0.91),
    20_000: (78.2, (75.0, 81.0), 0.02, 0.187, 0.0034, 0.215, 0.93),
}
NAMES = ("q_std", "q_gradient", "critic_loss", "behavior_loss")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--data-path")
    options = parser.parse_args()
    args = replace(Args(), env=ENV, device=options.device, **PAPER[ENV])  # the cosine spans the paper's 2M updates
    data = load_dataset(ENV, options.data_path)
    prepare(data)
    data = data.to(options.device)
    learner = DAC(args, data, options.seed)
    update, failures = capture([learner], "update"), []
    for n in range(0, max(OFFICIAL) + 1, args.actor_ema_every):
        if n in OFFICIAL:
            learner.metrics.read()
        update()
        if n in OFFICIAL:
            now = learner.metrics.read()
            mean, (low, high), eta, *others = OFFICIAL[n]
            good = low <= now["q_scale"] <= high and now["eta"] <= eta
            failures += [] if good else [n]
            print(f"update {n:>6,}  C {now['q_scale']:.2f} (official {mean}, range {low} to {high})  "
                  f"eta {now['eta']:.4f} (at most {eta})  {'ok' if good else 'OUT OF RANGE'}", flush=True)  # fmt: skip
            print("    " + ", ".join(f"{name} {now[name]:.3g} (official {x})" for name, x in zip(NAMES, others)))
    if failures:
        raise RunError(f"C or eta out of range at updates {failures}")


if __name__ == "__main__":
    cli(main)
