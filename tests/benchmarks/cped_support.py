"""CPED's bandits with and without the density constraint: how far from the data is the action?

    python tests/benchmarks/cped_support.py       # about four minutes on two CPU cores

Expected: a few hundredths with the constraint, 0.5 or more (the corner of the box) without.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import cped  # noqa: E402
from common import load_policy  # noqa: E402

for env in ("bandit-ring", "bandit-wave"):
    data = cped.bandit(env)
    for name, flags in (("constrained", []), ("dual", ["--alpha-mode", "dual"]), ("free", ["--alpha", "0"])):
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, ROOT / "cped.py", "--env", env, "--device", "cpu", "--out", out, *flags]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            act = load_policy(cped.CPED, cped.Args, Path(out) / "cped" / env / "seed0")
        action = torch.as_tensor(act(torch.zeros(1, 1).numpy()))
        distance = torch.cdist(action, data.action).min().item()
        print(f"{env:<12} {name:<12} action {action[0].tolist()}, {distance:.3f} from the nearest action in the data")
