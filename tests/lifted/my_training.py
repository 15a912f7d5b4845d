"""A training loop of your own: `python my_training.py` beside dtql.py and this folder's common.py."""

import torch

from common import Data
from dtql import DTQL, Args

n = 10_000  # your data here
noise = lambda *shape: torch.rand(*shape) * 2 - 1
data = Data(
    obs=noise(n, 11),
    action=noise(n, 3),
    reward=noise(n),
    next_obs=noise(n, 11),
    next_action=noise(n, 3),
    terminal=torch.zeros(n),
)

learner = DTQL(Args(device="cpu"), data, seed=0)
for phase, steps in ((learner.pretrain, 5), (learner.update, 20)):
    for _ in range(steps):
        phase()
with torch.no_grad():
    print(learner.act(noise(1, 11), learner.generator), learner.metrics.latest)
