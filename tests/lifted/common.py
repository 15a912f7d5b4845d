"""All that a lifted script needs beside it, in place of the project's common.py."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch


@dataclass
class RunArgs:
    steps: int = 1_000_000
    batch_size: int = 256
    device: str = "cpu"


class Data:  # float32 obs [N, S], action [N, A] in [-1, 1], reward [N], next_obs, next_action, terminal (no time limit)
    def __init__(self, **columns):
        self.columns, self.max_action = columns, 1.0
        self.obs_dim, self.action_dim = columns["obs"].shape[1], columns["action"].shape[1]

    def sample(self, size, generator):
        rows = torch.randint(len(self.columns["obs"]), (size,), device=generator.device, generator=generator)
        return SimpleNamespace(**{name: column[rows] for name, column in self.columns.items()})


class Metrics:
    add = lambda self, **values: setattr(self, "latest", values)


__getattr__ = lambda name: None  # whatever else the script imports is used by main() alone
