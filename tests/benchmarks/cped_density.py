"""The flow-GAN on hopper-medium-v2 beside the likelihoods that the authors' own log implies.

    python tests/benchmarks/cped_density.py --device cuda     # downloads the dataset; minutes on a GPU

The log is of an earlier version (two couplings, one discriminator update for five of the flow), so each value may
differ by 3. At 100,000 updates of the flow -log p(s, a) should be about 0.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from common import capture, load_dataset, parse_args  # noqa: E402
from cped import CPED, PAPER, Args, row_counter  # noqa: E402

KNOWN = {5_000: 17.3, 10_000: 13.8, 25_000: 7.1, 50_000: 2.7, 75_000: 1.4, 100_000: -0.3}  # updates of the flow: nll

sys.argv += ["--env", "hopper-medium-v2"]
args = parse_args(Args, PAPER)
data = load_dataset(args.env, args.data_path, timeout_rule=row_counter).to(args.device)
learner = CPED(args, data, args.seed[0])
update = capture([learner], "pretrain")
for updates in range(1, max(KNOWN) + 1):
    update()
    if updates % 1_000 == 0:
        nll = learner.metrics.read()["nll"]
        if updates in KNOWN:
            print(f"{updates:>7,} updates of the flow: -log p = {nll:.2f}, known {KNOWN[updates]} ± 3", flush=True)
