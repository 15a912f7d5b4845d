"""Compare Qmin and Qmax of QDQ's truncated returns with those that the official code saved (Qminmax.txt).

    python tests/benchmarks/qdq_golden_returns.py                     # all 15 datasets
    python tests/benchmarks/qdq_golden_returns.py hopper-medium-v2    # some of them

Needs the D4RL files: those that are not in the cache are downloaded. Exit code 1 if any dataset differs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from common import UserError, cli, load_dataset
from qdq import PAPER, Args, return_dataset

GOLDEN = {  # Qmin, Qmax
    "halfcheetah-medium-v2": (-36.69315, 524.7129),
    "halfcheetah-medium-replay-v2": (-76.832146, 492.48297),
    "halfcheetah-medium-expert-v2": (-50.62466, 1076.0223),
    "hopper-medium-v2": (115.09845, 334.08118),
    "hopper-medium-replay-v2": (-0.6511922, 330.22455),
    "hopper-medium-expert-v2": (138.31244, 396.26437),
    "walker2d-medium-v2": (-16.571163, 474.80557),
    "walker2d-medium-replay-v2": (-31.768223, 434.36954),
    "walker2d-medium-expert-v2": (-16.571163, 478.14096),
} | {env: (-86.602036, 0.0) for env in PAPER if env.startswith("antmaze")}


def main():
    names = sys.argv[1:] or list(GOLDEN)
    unknown = set(names) - set(GOLDEN)
    if unknown:
        raise UserError(f"no golden values for {', '.join(sorted(unknown))}; known: {', '.join(GOLDEN)}")
    wrong = []
    for env in names:
        args = Args(env=env, **PAPER[env])
        data = load_dataset(env)
        data.reward.add_(args.reward_offset)
        rows, found = return_dataset(data, args.gamma, args.window, args.window_stride)
        off = max(abs(value - golden) for value, golden in zip(found.tolist(), GOLDEN[env]))
        wrong += [env] * (off > 1e-3)
        low, high = found.tolist()
        print(f"{env:<30} {len(rows):>7} windows  Qmin {low:.5f}  Qmax {high:.5f}  off by {off:.1e}", flush=True)
    sys.exit(f"differ: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    cli(main)
