"""What the six scripts share: datasets, environments, evaluation, and the keeping of runs. No networks, no losses.

Sections: errors, facts, data, environments, evaluation, command line, learners, runs.
"""

import argparse
import ast
import contextlib
import copy
import csv
import difflib
import errno
import functools
import hashlib
import http.client
import importlib
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.request
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import gymnasium
import h5py
import mujoco
import numpy as np
import torch
from filelock import FileLock, Timeout
from gymnasium import spaces
from gymnasium.envs.mujoco.ant_v5 import AntEnv
from gymnasium.envs.mujoco.mujoco_env import MujocoEnv
from gymnasium.envs.registration import EnvSpec
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ---- Errors ----------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Bad use: shown as one sentence, exit code 2."""

    code = 2


class RunError(UserError):
    """Something failed (network, disk, broken file): shown as one sentence, exit code 1."""

    code = 1


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def reason(error):
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# ---- Facts: where the public datasets are, what their files must look like, and how returns become scores ------------

SERVERS = (  # asked in this order; the mirror keeps all files in one folder
    "http://rail.eecs.berkeley.edu/datasets/offline_rl/{path}",
    "https://huggingface.co/datasets/imone/D4RL/resolve/main/{file}",
)

# Dataset, size in bytes, size of the older edition where a file was replaced, SHA-256 of the newer.
# Source: the checksum lists of TensorFlow Datasets.
KNOWN_FILES = """
hopper-random-v2 152525345 139446977 63103ef7059db4c0819bd054f4e83ff339030b50bcdb46bdbe50385f234b5054
hopper-medium-v2 152756557 141484200 5bdf1bc4a713c82941de44633df669b36c89850b652a25985166796d25cf71a0
hopper-medium-replay-v2 75854457 77251678 e121c5f7c9857a307baa9edc6a2c3b48e85fedb9ac316ecddd0f48ca7ef4e39b
hopper-medium-expert-v2 304537315 281841200 9d51ad87f8c905be3880d84c6140bcdb7fbf39a19e046a237f238ba34fec9e26
hopper-expert-v2 152427435 140996499 01aa219a5f8eea5e639eccdc636ec2bf40e317159a95cf4bf6e985f16909941b
halfcheetah-random-v2 237338037 218821181 25407aef85b5d16c0f36b4149341edb4acc6a9e88c1db529b2de19e7464874ba
halfcheetah-medium-v2 237727262 219650767 41324e8487a9556d8cfa4538827f8937f4d63dae3030825ebc9f3a726ed08ca0
halfcheetah-medium-replay-v2 59448533 60486703 48d494a4770c11f48260736dec090b78bdca8375647ed4d24bfa5b6610c7f683
halfcheetah-medium-expert-v2 474567252 438690517 015db75dae5bbe8e94029b71fa0bafc2073365df0c94744e71031189f3f79c06
halfcheetah-expert-v2 237464597 219655978 d9fe53bb994eb1e20a99b4fa3412cd76a1bb7966a7ff55e0fcbdd6081bd2965f
walker2d-random-v2 216109364 204760763 4e863bb6090cf4a461548bd470564b32f1ae5b32ef3085f816b2ede7f092e7fa
walker2d-medium-v2 232254996 216994829 cf00f43add04c17fdfc2958dd581dea0851b2e5bedbe6fda073758a8f841aeda
walker2d-medium-replay-v2 86323963 88471563 e75de96a4f77acf7d4e0d6fdf0d7ccb177c26c44bb4388e4fd99f543ccfa18db
walker2d-medium-expert-v2 462197079 431922429 6b8d7f868c45bbaedf460be797fb7271b46dee6ebe45fe7a64319f2005b59a04
walker2d-expert-v2 230567195 215544301 2985dc3d436a8baa10e8f43f946fe1d7c6337a4e4fbc65def70618093b18c59a
antmaze-umaze-v0 232533093 188838316eab5882fa0e1dc8398b5e79772f64f27f0b78d6aebe838402a720c6
antmaze-umaze-diverse-v0 230854793 4aff7f77b97a8dd62e513cac8f57da7cdb458cfac7ac0cec3081b7765f2da59d
antmaze-medium-play-v0 231110993 527385c14b87892e8c222c43246546d6cd461fa2a5476d0b3b105ae422b7637c
antmaze-medium-diverse-v0 231095454 b77764cac90c23e09905539c49ceb3949b49c5b39eb9d51788cc64b9dd0a2c0d
antmaze-large-play-v0 230880846 e37afef5b80b968b30cad2682f9a93ee1b400e3b58c7a7f45e7d425d03a2b03d
antmaze-large-diverse-v0 231183929 dda7acbdde1a94a14aa7b06a7e5d8141e60a03ccdc4578bff34b0444425bf11d
antmaze-umaze-v2 232532949 5ef15257771c50ef4d23c7de001750e96c8bb5d9b6a5e4a821dcfb3065fbd130
antmaze-umaze-diverse-v2 230854272 c771dd63963cd7d9f55f24a6d809064f6b82250a6aeac4c9d13f9a1d06e8c932
antmaze-medium-play-v2 231110764 c9fec1c1daad97c71d61bd47f4ccc9f74faa855b8a2d2e8107d5378018827e5b
antmaze-medium-diverse-v2 231095166 ad9dcbac05d1f8744a7a216083f513662f43f64f28a4a5eb225e9811902dfae7
antmaze-large-play-v2 230880653 6d353df2457829925d7f9d4b0215587469908bd57478ea76f16417cfa944f471
antmaze-large-diverse-v2 231183710 84f775eb7956ea9cc766704710dc520a8ab357adc7522ade47f556f0e335e284
pen-human-v1 2040573 209e345b2150b633f30a11612612c60f49e941f127ce6c4dc0cd790501c46f9f
pen-cloned-v1 155074191 6d1a982cee1950501bedebbddedbcbb377e6284d379986c83abac8a6c0be0c22
pen-expert-v1 262040663 3791b8ca6a802061770af2977c051ac3ae261488210ce73788760a5b8308f374
"""
UNKNOWN_FILES = [f"{robot}-full-replay-v2" for robot in ("halfcheetah", "hopper", "walker2d")]  # none published
UNKNOWN_FILES += [f"kitchen-{kind}-v0" for kind in ("complete", "partial", "mixed")]
KITCHEN_FILES = {
    "complete": "mini_kitchen_microwave_kettle_light_slider-v0",
    "partial": "kitchen_microwave_kettle_light_slider-v0",
    "mixed": "kitchen_microwave_kettle_bottomburner_light-v0",
}


class Source(NamedTuple):
    """One public file: its path on the server, and its known sizes and SHA-256 (empty where none is published)."""

    path: str
    sizes: tuple[int, ...]
    sha256: str


def server_path(name: str) -> str:
    """Path of a D4RL dataset on its server, e.g. gym_mujoco_v2/hopper_medium_replay-v2.hdf5 (source: D4RL infos.py)."""
    family, kind, version = re.fullmatch(r"(\w+)-(.+)-(v\d)", name).groups()
    if family == "pen":
        return f"hand_dapg_v1/{name}.hdf5"
    if family == "kitchen":
        return f"kitchen/{KITCHEN_FILES[kind]}.hdf5"
    if family == "antmaze":
        size, _, goals = kind.partition("-")
        maze = {"umaze": "u-maze", "medium": "big-maze", "large": "hardest-maze"}[size]
        starts = f"noisy_multistart_{kind != 'umaze'}_multigoal_{goals == 'diverse'}_sparse"
        folder, fixed = ("ant_maze_v2", "_fixed") if version == "v2" else ("ant_maze_new", "")
        return f"{folder}/Ant_maze_{maze}_{starts}{fixed}.hdf5"
    return f"gym_mujoco_v2/{family}_{kind.replace('-', '_')}-{version}.hdf5"


DATASETS = {}
for _name, *_sizes, _sha256 in map(str.split, KNOWN_FILES.strip().split("\n")):
    DATASETS[_name] = Source(server_path(_name), tuple(map(int, _sizes)), _sha256)
DATASETS |= {_name: Source(server_path(_name), (), "") for _name in UNKNOWN_FILES}

# Names of arrays: here, and in the files (where Gymnasium's words are read too); a file must hold those in NEEDED.
KEYS = {
    "obs": "observations",
    "action": "actions",
    "reward": "rewards",
    "terminal": "terminals",
    "timeout": "timeouts",
    "next_obs": "next_observations",
    "mask": "masks",
}
NEEDED = ("obs", "action", "reward", "terminal")
NAMES = {"terminations": "terminal", "truncations": "timeout"} | {name: key for key, name in KEYS.items()}

# Raw returns that D4RL calls score 0 and score 100, by the first word of the dataset's name.
REFERENCE = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "pen": (96.262799, 3076.8331017826877),
    "antmaze": (0.0, 1.0),
    "kitchen": (0.0, 4.0),
}
KITCHEN_HORIZON = 280  # steps; the kitchen's files mark no time limits
ACTION_SLACK = 0.05  # actions may be this far outside their box, in halves of it

# Data made on the spot: the (gain, noise) levels of each variant's controller, one per episode in turn; None: random.
BUILT_IN = {
    "halfcheetah-demo-random": (None,),
    "halfcheetah-demo-medium": ((0.8, 0.3),),
    "halfcheetah-demo-medium-replay": ((0.0, 0.3), (0.4, 0.3), (0.7, 0.3), (1.0, 0.3)),
    "halfcheetah-demo-medium-expert": ((0.8, 0.3), (0.9, 0.1)),
    "halfcheetah-demo-expert": ((0.9, 0.0),),
    "pendulum-demo-random": (None,),
    "pendulum-demo-medium": ((0.4, 1.0),),
    "pendulum-demo-expert": ((1.0, 0.1),),
}
# Where the recordings are judged: v4 and not v5, see make_env.
GYM_IDS = {"halfcheetah": "HalfCheetah-v4", "hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "pendulum": "Pendulum-v1"}

# D4RL's mazes: 1 is wall, a cell is 4 m wide, the ant starts in cell (1, 1); second the goal cell (row, column).
MAZES = {
    "umaze": ("11111 10001 11101 10001 11111".split(), (3, 1)),
    "medium": ("11111111 10011001 10010001 11000111 10010001 10100101 10001001 11111111".split(), (6, 6)),
    "large": (
        "111111111111 100001000001 101101010101 100000010001 101111011101".split()
        + "100101000001 110101010111 100100010001 111111111111".split(),
        (7, 9),
    ),
}

KITCHEN_TASKS = {
    "complete": ("microwave", "kettle", "light switch", "slide cabinet"),
    "partial": ("microwave", "kettle", "light switch", "slide cabinet"),
    "mixed": ("microwave", "kettle", "bottom burner", "light switch"),
}

# Physics and models changed with it: see restore_margins and import_robotics.
MUJOCO_VERSION = tuple(int(part) for part in mujoco.__version__.split(".")[:2])


# ---- Data: find, download, check, read, and pack transitions ---------------------------------------------------------


class Batch(NamedTuple):
    """One minibatch, float32. `terminal` is 1 at a true end of the MDP, never at a time limit."""

    obs: torch.Tensor  # [B, S]
    action: torch.Tensor  # [B, A]
    reward: torch.Tensor  # [B]
    next_obs: torch.Tensor  # [B, S]
    next_action: torch.Tensor  # [B, A], NaN where the data are not in time order
    terminal: torch.Tensor  # [B]


@dataclass
class Dataset:
    """Transitions packed row by row, so that a batch is one gather. Actions are in [-max_action, max_action].

    The columns (`data.obs`, `data.reward`, ...) are views: `data.reward.sub_(1)` edits the data.
    """

    name: str
    rows: torch.Tensor  # [N, 2 S + 2 A + 2] float32
    obs_dim: int
    action_dim: int
    episode: torch.Tensor | None  # [N] int64, episode of each row; None where the rows are not in time order
    episode_returns: np.ndarray  # raw return of each complete episode, time-limit rows included; perhaps empty
    make_env: Callable[[], gymnasium.Env]  # one environment for evaluation
    max_action: float = 1.0
    fingerprint: str = ""  # of the rows as they were loaded

    @classmethod
    def from_arrays(
        cls, name, obs, action, reward, terminal, timeout, make_env, *, next_obs=None, ends=None, in_order=True,
        max_action=1.0,
    ) -> "Dataset":  # fmt: skip
        """Pack time-ordered arrays: obs [N, S], action [N, A], reward, terminal, timeout [N] (the last two bool).

        `next_obs` [N, S] given: all rows are kept but those that lack theirs (NaN) and are no terminals; the last row
        of an episode repeats its own action as next action.
        Not given: D4RL's `qlearning_dataset` rule: the successor is the next row, so all time-limit rows are dropped,
        and the last row if it is no terminal; a terminal points into the next episode (harmless where it masks that).
        `ends` [N, S] replaces next_obs at terminal rows only, for methods that look at the last state itself.
        `in_order` False: rows in any order with their next_obs; nothing is known of next actions and episodes.
        """
        end = terminal | timeout
        if next_obs is None:
            keep = ~timeout
            keep[-1] &= terminal[-1]
            keep = np.flatnonzero(keep)
            after = np.minimum(keep + 1, len(obs) - 1)
        else:
            known = np.isfinite(next_obs)
            keep = np.flatnonzero(known.all(axis=1) | terminal)
            after = np.where(end[keep], keep, np.minimum(keep + 1, len(obs) - 1))
        if len(keep) == 0:
            raise UserError(f"{name}: no transition is left: every row but the last is a time limit")

        following = obs[after] if next_obs is None else np.where(known, next_obs, obs)[keep]
        if ends is not None:
            following = np.where(terminal[keep, None], ends[keep], following)
        next_action = action[after] if in_order else np.full_like(action[keep], np.nan)
        columns = (obs[keep], action[keep], reward[keep, None], following, next_action, terminal[keep, None])
        rows = torch.from_numpy(np.concatenate(columns, axis=1, dtype=np.float32))

        episode, returns = None, np.zeros(0)
        if in_order:
            first = np.flatnonzero(np.concatenate([[True], end[:-1]]))  # first row of each episode
            episode = torch.from_numpy((np.cumsum(end) - end)[keep])
            returns = np.add.reduceat(reward.astype(np.float64), first)
            returns = returns if end[-1] else returns[:-1]
        digest = hashlib.sha256(rows.numpy()).hexdigest()[:16]
        return cls(name, rows, obs.shape[1], action.shape[1], episode, returns, make_env, max_action, digest)

    @classmethod
    def bandit(cls, name, action, reward, terminal=True, noise=0.0) -> "Dataset":
        """One state, actions [N, A], and `reward`, a function of actions [n, A] to [n] (torch).

        terminal False: the state leads back to itself for ever, so that values add up discounted rewards.
        noise [N]: added to the rewards of the data, not to those of the environment.
        """
        state, over = np.zeros((len(action), 1), np.float32), np.ones(len(action), bool)
        largest = float(action.abs().max())
        return cls.from_arrays(
            name, state, action.numpy(), (reward(action) + noise).numpy(), over & terminal, over & (not terminal),
            functools.partial(Bandit, reward, largest, action.shape[1]), next_obs=state, max_action=largest,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device) -> "Dataset":
        """The same data on `device`."""
        episode = None if self.episode is None else self.episode.to(device)
        return replace(self, rows=self.rows.to(device), episode=episode)

    def need_order(self, what: str) -> None:
        """Raise UserError if the rows are not in time order, for a method that needs it for `what`, such as returns."""
        if self.episode is None:
            raise UserError(f"{self.name}: this method needs {what}, unknown here: the rows are not in time order")

    def split(self, rows: torch.Tensor) -> Batch:
        """Name the columns of packed rows [B, 2 S + 2 A + 2]; no copy."""
        s, a = self.obs_dim, self.action_dim
        obs, action, reward, next_obs, next_action, terminal = rows.split([s, a, 1, s, a, 1], dim=1)
        return Batch(obs, action, reward.squeeze(1), next_obs, next_action, terminal.squeeze(1))

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Uniform with replacement; the indices are drawn on the data's device by `generator`."""
        index = torch.randint(len(self.rows), (batch_size,), device=self.rows.device, generator=generator)
        return self.split(self.rows[index])

    obs = property(lambda self: self.split(self.rows).obs)
    action = property(lambda self: self.split(self.rows).action)
    reward = property(lambda self: self.split(self.rows).reward)
    next_obs = property(lambda self: self.split(self.rows).next_obs)
    next_action = property(lambda self: self.need_order("next actions") or self.split(self.rows).next_action)
    terminal = property(lambda self: self.split(self.rows).terminal)


def load_dataset(env, data_path=None, *, timeout_rule=None, true_next_obs=False, judge=True) -> Dataset:
    """Transitions for `env`, on the CPU, actions in [-1, 1].

    env: a D4RL name, a Minari id, a built-in name, or a 2-D scene, whose actions keep their scale (`max_action`); with
        `data_path` (D4RL-style .hdf5, .npz, or a Minari dataset's folder) also a Gymnasium id, because then it only
        names the environment.
    timeout_rule: terminal [N] bool -> timeout [N] bool, instead of the data's own time limits.
    true_next_obs: at terminal rows take next_obs from the file's next_observations, or else the row's own obs, in place
        of the next episode's first state.
    judge: False if nothing will be evaluated: then data may be read without their environment. The box of actions is
        then the Minari set's own, or [-1, 1] if that holds them, or what they span.
    Minari data hold every true successor, so that the first two are not needed and time-limit rows are kept. Other rows
    are expected in time order, unless they bring next_observations (see `find_ends`).
    Raises UserError or RunError with one sentence that says what to do.
    """
    if env in SCENES:
        if data_path:
            raise UserError(f"{env} makes its own data, so --data-path cannot be used with it")
        return load_scene(env)
    path = Path(data_path).expanduser() if data_path else None
    if not (path or env in BUILT_IN or env in DATASETS) and Path(env).is_file():
        raise UserError(f"{env} is a file: name it by --data-path, and its environment by --env")
    official = next((name for name in DATASETS if path and Path(DATASETS[name].path).name == path.name), None)
    original = official or env
    family = original.split("-")[0]
    if env.split("-")[0] != family and env != GYM_IDS.get(family):
        raise UserError(f"{path.name} cannot be evaluated in {env}, whose physics differ: use --env {original}")
    if path.is_dir() if path else is_minari(env):
        raw, box = read_minari(path.name if path else env, path)
        dim, box, _ = judge_spaces(env) if judge else (None, box, None)
        check_arrays(raw, env, dim, box)
        return forget_returns(Dataset.from_arrays(env, **raw, make_env=functools.partial(make_env, env)))
    if not (path or env in BUILT_IN or env in DATASETS):
        if ":" in env or env in gymnasium.registry:
            raise UserError(
                f'"{env}" is an environment, not a dataset: give its data by --data-path, or see --env help'
            )
        near = nearest(env, [*DATASETS, *BUILT_IN, *SCENES]) or ";"
        raise UserError(f'unknown dataset "{env}"{near} --env help lists all')

    dim, box, horizon = judge_spaces(env, needed=judge)  # a package that it lacks is known before a long download
    raw = load_built_in(env) if env in BUILT_IN and not path else read_file(path or download(env))
    check_arrays(raw, env, dim, box)
    horizon = KITCHEN_HORIZON if env.startswith("kitchen-") else horizon
    in_order, sure = find_ends(raw, env, horizon, timeout_rule), "next_obs" in raw
    if in_order:
        if official or not path:  # D4RL drops its last row even where that is a terminal
            raw["timeout"][-1] |= raw["terminal"][-1]
        ends = raw.pop("next_obs", raw["obs"])
        if true_next_obs:
            raw["ends"] = np.where(np.isfinite(ends), ends, raw["obs"])
        del ends  # as large as the observations
    data = Dataset.from_arrays(env, **raw, in_order=in_order, make_env=functools.partial(make_env, env))
    if len(data.episode_returns) == 0 and not sure:
        raise UserError(f"{env}: the data hold no complete episode: no row is marked as terminal or as a time limit")
    return forget_returns(data)


def forget_returns(data):
    """Forget the returns of AntMaze's and the kitchen's data, which pay at every step what `make_env` pays once."""
    if data.name.removeprefix("D4RL/").startswith(("antmaze", "kitchen")):
        data.episode_returns = np.zeros(0)
    return data


def offset_rewards(data, offset):
    """Add `offset` to every reward. AntMaze's is -1, which files with rewards of 0 and -1, such as OGBench's, have."""
    if offset == -1 and data.reward.unique().tolist() in ([-1, 0], [-1]):
        print("note: the rewards are 0 and -1 already, so --reward-offset -1 is left out")
    else:
        data.reward.add_(offset)


def judge_spaces(env, needed=True):
    """Size of observations, box of actions and time limit in the environment of `env`; None, None, None without one.

    One step is made, because an environment that breaks Gymnasium's rules is better known before the training.
    """
    try:
        with make_env(env) as judge:
            judge.reset(seed=0)
            judge.step(np.zeros(judge.action_space.shape, np.float32))
            limit = None if judge.assumed_limit else judge.spec.max_episode_steps
            return judge.observation_space.shape[0], judge.original_action_space, limit
    except Unfit:
        raise
    except UserError as error:
        if needed:
            raise UserError(f"{error} (--eval-episodes 0 trains without an environment)") from error
        print(f"note: {error}; without evaluations it is not needed")
        return None, None, None


def nearest(name: str, known) -> str:
    """A question that names up to three known names much like `name`, or nothing."""
    near = difflib.get_close_matches(name.lower().replace("_", "-"), known)
    return f": did you mean {' or '.join(near)}?" if near else ""


# Downloads


def download(name: str) -> Path:
    """Path of a D4RL file in D4RL's own cache folder (~/.d4rl/datasets or $D4RL_DATASET_DIR), downloaded if needed."""
    source = DATASETS[name]
    folder = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()
    path = folder / Path(source.path).name
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):  # the lock of a killed process vanishes with it
                if not path.exists():
                    fetch(name, path)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error}") from error
    hint = ": delete it and run again, or set D4RL_DATASET_DIR to another folder"
    open_arrays(path, source.sizes, hint).close()
    if source.sizes and path.stat().st_size not in source.sizes:
        warn(f"{path} is not one of the known versions of {name} (other size); continuing")
    return path


def fetch(name: str, path: Path) -> None:
    """Try each server in turn until `path` is a whole, readable file."""
    source, part, failures = DATASETS[name], Path(f"{path}.part"), []
    for server in SERVERS:
        url = server.format(path=source.path, file=path.name)
        try:
            with urllib.request.urlopen(url, timeout=30) as response, open(part, "w+b") as file:
                size = int(response.headers.get("Content-Length") or 0)
                print(f"downloading {url} ({size / 1e6:.0f} MB)", flush=True)
                with tqdm.wrapattr(response, "read", total=size or None, leave=False, disable=None) as body:
                    shutil.copyfileobj(body, file, 1 << 20)
                if (got := file.tell()) < size:
                    raise RunError(f"cut off: got {got} of {size} bytes")
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            open_arrays(part, source.sizes).close()
            if source.sizes and got == source.sizes[0] and digest != source.sha256:
                warn(f"{url} is not the known version of {name} (SHA-256 {digest}); continuing")
            os.replace(part, path)
            return
        except (UserError, http.client.HTTPException, OSError) as error:
            failures.append(f"{url}: {error}")
        finally:
            part.unlink(missing_ok=True)
    raise RunError(
        f"could not download {name} ({'; '.join(failures)}): nothing was kept; the first server is known for long"
        f" outages, so run again later, put the file at {path} by hand, or use data that need no network,"
        " such as --env halfcheetah-demo-medium-replay"
    )


# Readers: each gives a dict of arrays named as in KEYS


def open_arrays(path: Path, sizes: tuple[int, ...] = (), hint: str = ""):
    """An open HDF5 file or .npz, told apart by its first bytes, that has all arrays in NEEDED.

    sizes, hint: what a file that was cut off should have been, and what to do about it.
    """
    kind = "HDF5"
    try:
        with open(path, "rb") as file:
            start = file.read(8)
        if start.startswith((b"PK\3\4", b"PK\5\6")):
            kind = ".npz"
            arrays = np.load(path)
        elif start.startswith(b"\x89HDF") or h5py.is_hdf5(path):
            arrays = h5py.File(path, "r")
        else:
            kinds = {b"\x80": " but a pickle", b"<": " but a web page", b"\x93NUMPY": " but a single .npy array"}
            kinds |= {b"\x1f\x8b": " but packed by gzip", b"version ": " but a pointer of Git LFS: git lfs pull"}
            kind = next((kind for first, kind in kinds.items() if start.startswith(first)), "")
            raise RunError(f"{path} is neither an HDF5 file nor an .npz{kind}" if start else f"{path} is empty{hint}")
    except (OSError, zipfile.BadZipFile) as error:
        if "unable to lock" in str(error):
            why = "a program writes it, or its file system has no locks (HDF5_USE_FILE_LOCKING=FALSE does without)"
            raise RunError(f"{path} is locked: {why}") from error
        if getattr(error, "errno", None):
            raise RunError(f"{path} cannot be read: {os.strerror(error.errno)}") from error
        found = f"found {path.stat().st_size} bytes" + (f", expected {' or '.join(map(str, sizes))}" if sizes else "")
        raise RunError(f"{path} is not a complete {kind} file ({found}){hint}") from error
    if missing := [KEYS[key] for key in NEEDED if key not in map(NAMES.get, arrays)]:
        found = ", ".join(sorted(map(str, arrays)))[:200]
        arrays.close()
        raise UserError(f"{path} has no {', '.join(missing)}; found {found}")
    return arrays


def read_file(path: Path) -> dict[str, np.ndarray]:
    """Arrays of a D4RL-style HDF5 file or an .npz; keys as in KEYS, floats as float32."""
    if not path.is_file():
        raise UserError(f"--data-path {path}: no such file or Minari dataset folder")
    arrays = {}
    with open_arrays(path) as file:
        for short, name in {key: name for name, key in NAMES.items() if name in file}.items():
            try:
                value = file[name]
                if isinstance(value, h5py.Group):
                    raise TypeError(f"it is a group of {', '.join(value)}")
                for part in value.virtual_sources() if getattr(value, "is_virtual", False) else ():
                    if not (path if part.file_name == "." else path.parent / part.file_name).exists():
                        raise FileNotFoundError(f"its part {part.file_name} is missing")  # HDF5 would give zeros
                floats = isinstance(value, h5py.Dataset) and value.dtype.kind == "f"
                # h5py converts in small pieces, so float64 files need no second copy
                arrays[short] = value.astype(np.float32)[()] if floats else np.asarray(value)
            except Exception as error:  # each library has its own
                raise RunError(f"{name} in {path} cannot be read: {reason(error)}") from error
    return arrays


# Minari


def is_minari(env: str) -> bool:
    if ":" in env or env in gymnasium.registry:
        return False
    return "/" in env or (minari_folder(env) / "data").is_dir()


def minari_folder(env: str) -> Path:
    return Path(os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets").expanduser() / env


@contextlib.contextmanager
def open_minari(env: str, folder: Path | None = None, download: bool = False):
    """A Minari dataset by its id, or by its folder. What goes wrong while it is in use becomes one sentence."""
    own, folder = folder is not None, folder or minari_folder(env)
    folder = folder if folder.name == "data" else folder / "data"
    try:
        import minari

        if download and not folder.is_dir():
            if not re.search(r"-v\d+$", env):
                raise UserError(f'Minari ids end in a version such as -v0: did you mean "{env}-v0" by "{env}"?')
            print(f"downloading the Minari dataset {env}", flush=True)
            minari.download_dataset(env)
        yield minari.MinariDataset(folder)
    except UserError:
        raise
    except ImportError as error:
        need = f'the package {error.name}: pip install "minari[hdf5,hf]" pillow' if error.name else reason(error)
        raise UserError(f"Minari data need {need}") from error
    except Exception as error:  # the package lets through many kinds
        text = f"Minari dataset '{env}' cannot be opened ({type(error).__name__}: {reason(error)[:200]})"
        if not folder.is_dir():
            hint = "; check the id and the network" if download else f"; for an environment write my_module:{env}"
            text += f": there is no {folder}" + hint * (not own)
        elif own or not ("truncated" in text or "No data found" in text):
            text += f"; its files are in {folder}"
        else:
            text += (
                f"; an interrupted download in {folder} is repaired by"
                f" python -c \"import minari; minari.download_dataset('{env}', force_download=True)\""
            )
        raise RunError(text) from error


def read_minari(env: str, folder: Path | None):
    """Flat arrays of a Minari dataset, with the true next_obs of every row, and its space of actions."""
    episodes = []
    with open_minari(env, folder, download=folder is None) as dataset:
        check_spaces(dataset.observation_space, dataset.action_space, env)
        for episode in dataset.iterate_episodes():
            if len(episode.rewards) == 0:  # it was stopped before its first step
                continue
            obs = flatten(dataset.observation_space, episode.observations)  # [T + 1, S]
            action = flatten(dataset.action_space, episode.actions)
            terminal = np.asarray(episode.terminations, bool)
            timeout = np.zeros_like(terminal)
            timeout[-1] = not terminal[-1]  # also where a recording just stops
            episodes.append((obs[:-1], action, np.float32(episode.rewards), terminal, timeout, obs[1:]))
        if not episodes:
            raise UserError(f"Minari dataset '{env}' holds no episodes")
        return {key: np.concatenate(parts) for key, parts in zip(KEYS, zip(*episodes))}, dataset.action_space


def flatten(space: gymnasium.Space, value) -> np.ndarray:
    """Steps of a nested observation [T, ...] as [T, S], in the order of gymnasium.spaces.flatten."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        names = space.spaces if isinstance(space, spaces.Dict) else range(len(space))
        return np.concatenate([flatten(space[name], value[name]) for name in names], axis=1)
    if isinstance(space, spaces.Box):
        value, size = np.asarray(value, np.float32), math.prod(space.shape)
        if value.size != len(value) * size:
            raise ValueError(f"an episode has rows of the shape {list(value.shape[1:])}, not {list(space.shape)}")
        return value.reshape(len(value), size)
    return np.stack([spaces.flatten(space, one) for one in value])  # one-hot


class Unfit(UserError):
    """Data or an environment of a kind that is not for these methods."""


def check_spaces(obs: gymnasium.Space, action: gymnasium.Space, name: str) -> None:
    """Refuse observations that are no vector of numbers, and actions that are not continuous."""
    for space in (obs, action):
        if not isinstance(space, gymnasium.Space):
            raise UserError(f"{name} has a space of {type(space).__module__}.{type(space).__name__}, not of gymnasium")
    if isinstance(obs, spaces.Dict | spaces.Tuple):
        for part in obs.spaces.values() if isinstance(obs, spaces.Dict) else obs.spaces:
            check_spaces(part, action, name)
    elif isinstance(obs, spaces.Box) and len(obs.shape) > (1 if obs.dtype == np.uint8 else 2):
        raise Unfit(f"{name} has images as observations, {obs.shape}; the networks here take vectors")
    elif isinstance(obs, spaces.Text) or not obs.is_np_flattenable:
        raise Unfit(f"{name} has observations of the kind {obs}; the networks here take vectors")
    if not isinstance(action, spaces.Box) or action.dtype.kind != "f":
        raise Unfit(f"{name} has the action space {action}; only continuous actions work here")


# Checks


def check_arrays(raw: dict[str, np.ndarray], env: str, dim: int | None, box: spaces.Box | None) -> None:
    """Plain types, rows as vectors and actions in [-1, 1]; or one sentence that says which array is wrong and how.

    dim, box: size of observations and box of actions, None where unknown.
    """
    lengths = {KEYS[key]: len(value) if np.ndim(value) else 0 for key, value in raw.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UserError(f"{env}: the arrays have different lengths: {found}")
    if lengths["observations"] < 2:
        raise UserError(f"{env}: two rows are the least, found {lengths['observations']}")
    width = np.size(raw["obs"][0])
    sizes = {"obs": dim, "next_obs": width, "action": box and math.prod(box.shape)}  # numbers per row; None: any
    for key, value in raw.items():
        name, size = f"{env}: {KEYS[key]}", sizes.get(key, 1)
        if value.dtype.kind not in "biuf":
            raise UserError(f"{name} must hold numbers, found {value.dtype}")
        if key == "action" and value.dtype.kind != "f" and box is None:
            raise UserError(f"{name} are whole numbers; only continuous actions work here")
        if value.ndim > (2 if value.dtype == np.uint8 else 3):
            raise UserError(f"{name} are images, {list(value.shape)}; the networks here take vectors")
        with np.errstate(over="ignore"):
            flat = value.reshape(len(value), -1).astype(np.float32, copy=False)
        if not flat.size:
            raise UserError(f"{name} hold no numbers, {list(value.shape)}")
        if flat.shape[1] != size and size is not None:
            expected = f"[N, {size}]" if key in sizes else "[N]"
            hint = "; does --env name the environment of these data, flattened?" if key in ("obs", "action") else ""
            raise UserError(f"{name}: expected shape {expected}, found {list(value.shape)}{hint}")
        bad = np.flatnonzero(~np.isfinite(flat).all(axis=1))
        if len(bad) and (key != "next_obs" or len(bad) == len(flat)):  # they may be missing where an episode ends
            raise UserError(f"{name} has NaN, infinite or huge values in {len(bad)} rows, the first is {bad[0]}")
        flag = key in ("terminal", "timeout", "mask")
        if flag and len(odd := flat[(flat != 0) & (flat != 1)]):
            raise UserError(f"{name} must be 0 or 1 in every row, found {odd[0]:g}")
        raw[key] = flat if key in sizes else flat[:, 0].astype(bool if flag else np.float32)
    raw["action"] = scale_actions(raw["action"], env, box)


def scale_actions(action: np.ndarray, env: str, box: spaces.Box | None) -> np.ndarray:
    """Actions [N, A] from their box to [-1, 1]; those a little outside are clipped, as published sets have some."""
    if box is not None and np.isfinite(box.high - box.low).all():
        low, high = box.low.ravel(), box.high.ravel()
    elif np.abs(action).max() <= 1 + ACTION_SLACK:
        low, high = -np.ones_like(action[0]), np.ones_like(action[0])
        print(f"{env}: the box of actions is unknown; it is taken to be [-1, 1]")
    else:
        low, high = action.min(axis=0), action.max(axis=0)
        print(f"{env}: the box of actions is unknown; [-1, 1] stands for what the data span, {low} to {high}")
    over, half = np.maximum(low - action, action - high), (high - low) / 2
    beyond = (over - ACTION_SLACK * half).max(axis=0)
    k = np.argmax(beyond)  # the dimension that is furthest outside
    bounds = f"[{low[k]:g}, {high[k]:g}]"
    if beyond[k] > 1e-6:
        found = f"[{action[:, k].min():g}, {action[:, k].max():g}]" + f" in dimension {k}" * (len(low) > 1)
        raise UserError(f"{env}: actions must be in {bounds}, found {found}: data scaled for another environment")
    if count := np.count_nonzero(np.any(over > 1e-6 * half, axis=1)):
        print(
            f"{env}: {count} of {len(action)} actions are outside {bounds}, by at most {over.max():.2g}, and clipped"
            f" (up to {ACTION_SLACK:.0%} of half the range is accepted)"
        )
    if np.any(low != -1) or np.any(high != 1):
        if 0.99 < np.abs(action).max() < 1.01 < high.min():
            warn(f"{env}: the actions end at 1, their box is {bounds}: were they scaled before? Then scale them back")
        width = np.where(high > low, high - low, np.inf)  # where there is no choice: 0 below
        action = np.where(high > low, 2 * (action - low) / width - 1, 0)
    return np.clip(action, -1, 1).astype(np.float32, copy=False)


def find_ends(raw: dict[str, np.ndarray], env: str, horizon: int | None, rule: Callable | None) -> bool:
    """Fill in raw["timeout"], the ends of episodes that are no terminals; whether the rows are in time order.

    masks (OGBench): 0 is a terminal; then `terminals` only mark ends of trajectories.
    next_observations: an episode also ends where a row's are not the next row and no end is marked. But if another row
    goes on from there, or if most rows are like that, the rows stand in no order. Then nothing but next_observations
    tells what follows, and rows without them go.
    rule: terminal [N] -> timeout [N] of the caller, instead of the data's own.
    """
    if "mask" in raw:
        ends, raw["terminal"] = raw["terminal"], ~raw.pop("mask")
        ends &= ~raw["terminal"]
        if ends.any():
            raw["timeout"] = raw.get("timeout", False) | ends
        print(
            f"{env}: the file has masks, so its terminals are read as ends of trajectories, {np.count_nonzero(ends)} of"
            f" them without an end of the task (masks = 0: {np.count_nonzero(raw['terminal'])} rows)"
        )
    obs, terminal, next_obs = raw["obs"], raw["terminal"], raw.get("next_obs")
    jump = np.zeros_like(terminal)  # rows not followed by their own next_obs
    if next_obs is not None:
        some = [x[:: len(obs) // 10_000 + 1] for x in (obs, next_obs)]  # rows enough to judge by
        with np.errstate(over="ignore"):  # the precision of what was stored, and what is little beside a usual step
            half = any(np.array_equal(x, x.astype(np.float16), equal_nan=True) for x in some)
        near = (5e-4 if half else 1e-6) * np.abs(obs[1:]) + 1e-3 * np.nanmedian(np.abs(some[1] - some[0]), axis=0)
        jump[:-1] = ~np.all(np.abs(next_obs[:-1] - obs[1:]) <= near, axis=1)
        jump &= ~(end := terminal | raw.get("timeout", False))
    if jump.any():
        first = np.concatenate([[True], (jump | end)[:-1]])  # where a piece of an episode may begin
        states = {row.tobytes() for row in obs[first]}
        meet = any(row.tobytes() in states for row in next_obs[jump])
        if meet or 2 * np.count_nonzero(jump) > len(obs):
            print(f"{env}: the rows are not in time order; what follows each is taken from its next_observations")
            if not meet:
                warn(f"{env}: no row starts where another's next_observations end; are both scaled alike?")
            raw["timeout"] = np.zeros_like(terminal)
            return False
        print(f"{env}: {np.count_nonzero(jump)} episodes end without a mark, as their next_observations show")
    if rule is not None:
        raw["timeout"] = np.asarray(rule(terminal), bool)
    elif "timeout" not in raw and not jump.any():
        if env in DATASETS and env.split("-")[0] in GYM_IDS:
            raise UserError(f"{env}: the file has no timeouts, but every original has: else episodes run together")
        raw["timeout"] = count_timeouts(terminal, horizon, int(env in DATASETS)) if horizon else jump
        guess = f"a time limit is assumed every {horizon} steps" if horizon else "no time limits are assumed"
        episodes = np.count_nonzero(terminal | raw["timeout"])
        print(f"{env}: the file has no timeouts, so terminals end the task; {guess} ({episodes} complete episodes)")
    raw["timeout"] = raw.get("timeout", False) | jump
    longest = np.diff(np.flatnonzero(terminal | raw["timeout"]), prepend=-1, append=len(obs) - 1).max()
    if horizon and longest > horizon and env not in DATASETS:
        warn(f"{env}: {longest} rows without an end of an episode, its time limit is {horizon}: are ends not marked?")
    if terminal.any() and not (terminal & ~raw["timeout"]).any():
        warn(f"{env}: every terminal is marked as a time limit too, and counts as one: no end of the task is left")
    return True


def count_timeouts(terminal: np.ndarray, horizon: int, late: int = 1) -> np.ndarray:
    """Every `horizon`-th row of an episode, for files without timeouts. D4RL counts `late`: from 1 after a terminal."""
    timeout = np.zeros_like(terminal)
    start, counter = 0, 0
    for end in [*np.flatnonzero(terminal), len(terminal) - 1]:
        timeout[start + horizon - 1 - counter : end + 1 : horizon] = True
        start, counter = end + 1, 0 if timeout[end] else late
    return timeout


# Built-in data


DEMO_EPISODES = {"halfcheetah": 50, "pendulum": 100}
# A linear HalfCheetah-v4 controller found by random search (augmented random search), rounded; it runs at return 4570.
CHEETAH_W = """
-6.64 -0.05 -0.03  1.02 -0.42 -0.07 -0.65  0.29  0.18 -0.37 -0.01 -0.05 -0.04 -0.04 -0.03  0.00 -0.02
 0.13 -0.12  0.18  0.08 -0.23  0.28  0.09 -1.13  0.14  0.34 -0.11 -0.07  0.00 -0.01  0.04  0.03  0.00
-0.29  0.73 -0.23  0.84 -0.74 -0.34 -1.69 -0.52  0.02  0.11 -0.05  0.05 -0.02 -0.03 -0.02  0.03 -0.01
-4.41  0.34  0.72 -0.64  0.63 -0.72  1.55 -0.49 -0.17 -0.30 -0.06  0.03  0.00  0.00 -0.03  0.00  0.00
-2.80  0.33  0.22 -0.37  0.08 -0.76  1.54 -0.63 -0.02 -0.46  0.28  0.02 -0.01  0.01  0.00 -0.03 -0.03
-0.47 -0.10  0.44  0.10 -0.22  0.17  0.70 -0.20  0.20  0.58 -0.07 -0.05  0.02  0.01  0.07  0.05 -0.03
"""
CHEETAH_B = [-1.17, -0.23, -0.35, -0.41, -0.51, -0.44]


def load_built_in(name: str) -> dict[str, np.ndarray]:
    """Arrays of a built-in dataset; the slow ones are cached in ~/.cache/offline-rl (or $XDG_CACHE_HOME)."""
    robot = name.split("-")[0]
    if robot == "pendulum":
        return make_pendulum_demo(name, DEMO_EPISODES[robot])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "offline-rl"
    cache = folder / f"{name}-{DEMO_EPISODES[robot]}x1000-seed0-v1.npz"  # another version for another recipe
    try:
        with np.load(cache) as file:
            return {key: file[key] for key in (*NEEDED, "timeout")}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):  # missing or damaged
        print(f"making {name} (a few seconds, once)", flush=True)
    raw = make_cheetah_demo(name, DEMO_EPISODES[robot])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, **raw)
        os.replace(part, cache)  # whole or not at all, also with several writers
    except OSError as error:
        warn(f"cannot cache {cache} ({error}); continuing")
    return raw


def make_cheetah_demo(name: str, episodes: int) -> dict[str, np.ndarray]:
    """Roll the linear controller, clip(gain (W obs + b) + noise N(0, I)), for `episodes` x 1000 steps."""
    weights = np.array(CHEETAH_W.split(), float).reshape(6, 17)
    env = make_env(name).unwrapped  # without wrappers: several times faster
    rng, levels = np.random.default_rng(0), BUILT_IN[name]
    raw = {"obs": [], "action": [], "reward": []}
    for episode in range(episodes):
        level = levels[episode % len(levels)]
        noise = rng.uniform(-1, 1, (1000, 6)) if level is None else level[1] * rng.standard_normal((1000, 6))
        gain = 0.0 if level is None else level[0]
        obs, _ = env.reset(seed=episode)
        for step in range(1000):
            action = np.clip(gain * (weights @ obs + CHEETAH_B) + noise[step], -1, 1)
            raw["obs"].append(obs)
            raw["action"].append(action)
            obs, reward, *_ = env.step(action)
            raw["reward"].append(reward)
    env.close()
    return demo_arrays(raw, 1000)


def make_pendulum_demo(name: str, episodes: int) -> dict[str, np.ndarray]:
    """Pump energy until the pole is high, then catch it by a linear rule; all episodes (200 steps) at once."""
    rng, level = np.random.default_rng(0), BUILT_IN[name][0]
    env = gymnasium.make("Pendulum-v1").unwrapped  # its formulas work for arrays too
    env.state = np.stack([rng.uniform(-np.pi, np.pi, episodes), rng.uniform(-1, 1, episodes)])
    raw = {"obs": [], "action": [], "reward": []}
    for _ in range(200):
        angle, speed = env.state
        if level is None:
            torque = rng.uniform(-2, 2, episodes)
        else:
            gain, noise = level
            wrapped = (angle + np.pi) % (2 * np.pi) - np.pi
            energy = speed**2 / 6 + 5 * np.cos(angle)  # 5 at rest upright
            torque = gain * np.where(np.cos(angle) > 0.8, -12 * wrapped - 3 * speed, 2 * np.sign(speed * (5 - energy)))
            torque = np.clip(torque + noise * rng.standard_normal(episodes), -2, 2)
        raw["obs"].append(np.stack([np.cos(angle), np.sin(angle), speed], axis=1))
        raw["action"].append(torque[:, None])
        raw["reward"].append(env.step(torque[None])[1])
    return demo_arrays({key: np.stack(value, axis=1) for key, value in raw.items()}, 200)


def demo_arrays(raw, steps: int) -> dict[str, np.ndarray]:
    """Rows of float32, episode after episode. No demo terminates; the last of its `steps` is a time limit."""
    count = np.size(raw["reward"])
    flat = {key: np.asarray(value, np.float32).reshape(count, -1) for key, value in raw.items()}
    return flat | {"terminal": np.zeros(count, bool), "timeout": np.arange(count) % steps == steps - 1}


# 2-D scenes of the papers: one state, 10,000 actions, a reward that depends on the action alone


uniform = lambda g: torch.rand(10_000, generator=g)
pick = lambda centers, g: centers[torch.randint(len(centers), (10_000,), generator=g)]
polar = lambda radius, angle: torch.stack([radius * angle.cos(), radius * angle.sin()], 1)

grid25 = lambda g: torch.cartesian_prod(*[torch.linspace(-10, 10, 5)] * 2).repeat_interleave(400, 0)
two = lambda g: pick(torch.tensor([[-0.6, 0.6], [0.4, 0.2]]), g)
three = lambda g: pick(torch.tensor([[-0.6, 0.6], [0.4, 0.4], [-0.4, -0.4]]), g)
eight = lambda g: polar(4 / 1.414, math.pi / 4 * (8 * uniform(g)).floor())
rings = lambda g: polar(0.75 * (1 + (4 * uniform(g)).floor()), 2 * math.pi * uniform(g))
ring = lambda g: polar(1, 1.5 * math.pi * uniform(g))
small_roll = lambda g: roll(g) / 5


def roll(g):
    t = 1.5 * math.pi * (1 + 2 * uniform(g))
    return polar(t, t)


def moons(g):
    upper = polar(1, torch.linspace(0, math.pi, 20))
    return pick(in_dac_box(torch.cat([upper, torch.tensor([1.0, 0.5]) - upper])), g)


def circles(g):
    circle = polar(1, torch.linspace(0, 2 * math.pi, 21)[:20])
    return pick(in_dac_box(torch.cat([circle, 0.8 * circle])), g)


def in_dac_box(shape):
    low, high = shape.amin(0), shape.amax(0)
    return 1.1 * (shape - low) / (high - low) + torch.tensor([-0.8, -0.2])


def checkerboard(g):
    x, half = 4 * uniform(g) - 2, uniform(g) < 0.5
    return 2 * torch.stack([x, uniform(g) - 2 * half + x.floor() % 2], 1)


def spirals(g):
    t, arm = 3 * math.pi * uniform(g).sqrt(), (uniform(g) < 0.5)[:, None]
    point = polar(t, math.pi - t) + torch.stack([uniform(g), uniform(g)], 1) / 2
    return torch.where(arm, point, -point) / 3


def wave(g):
    t = math.pi * uniform(g)
    return torch.stack([2 * t / math.pi - 1, -0.6 * (2 * t).sin()], 1)


far = lambda action, data: action.norm(dim=1)
near = lambda action, data: data.norm(dim=1).max() - action.norm(dim=1)
hard = lambda action, data: torch.where((action[:, 0] < -7.5) & (action[:, 1] > 7.5), 2, 1) * action.norm(dim=1)
same = lambda action, data: 0 * action[:, 0]
cone = lambda action, data: -(action - torch.tensor([0.4, -0.4])).norm(dim=1)
bowl = lambda action, data: -((action - torch.tensor([1.5, 3.0])) ** 2).sum(1)
corner = lambda action, data: action.sum(1)


class Scene(NamedTuple):
    points: Callable  # generator -> [10000, 2]
    std: float  # of the Gaussian noise that makes points actions
    reward: Callable  # actions [n, 2], the actions of the data -> [n]
    reward_std: float = 0.0  # of the noise on the rewards in the data
    limit: float = math.inf  # actions are clipped to [-limit, limit]
    terminal: bool = True  # False: the state leads back to itself for ever, so that values add up discounted rewards


SCENES = {
    # DTQL, Sec. 3 and App. F.1: the reward depends on the radius
    "bandit-25gaussians-far": Scene(grid25, 0.3, far, terminal=False),
    "bandit-25gaussians-near": Scene(grid25, 0.3, near, terminal=False),
    "bandit-25gaussians-hard": Scene(grid25, 0.3, hard, terminal=False),  # pays double in one corner
    "bandit-25gaussians-same": Scene(grid25, 0.3, same, terminal=False),
    "bandit-swissroll-far": Scene(roll, 0.1, far, terminal=False),
    "bandit-swissroll-near": Scene(roll, 0.1, near, terminal=False),
    "bandit-swissroll-same": Scene(roll, 0.1, same, terminal=False),
    # DAC, official code: a noisy reward, best at (0.4, -0.4); the name moons is SRPO's too, for wider ones
    "bandit-2gaussians": Scene(two, 0.1, cone, 0.5, 1.0),
    "bandit-3gaussians": Scene(three, 0.1, cone, 0.5, 1.0),
    "bandit-moons": Scene(moons, 0.05, cone, 0.5, 1.0),
    "bandit-circles": Scene(circles, 0.05, cone, 0.5, 1.0),
    # SRPO, Sec. 3 and App. A: densities without a reward; here its -|a - target|^2 with one target, (1.5, 3)
    "bandit-8gaussians": Scene(eight, 0.5 / 1.414, bowl),
    "bandit-checkerboard": Scene(checkerboard, 0.0, bowl),
    "bandit-swissroll": Scene(small_roll, 0.2, bowl),
    "bandit-rings": Scene(rings, 0.08, bowl),
    "bandit-2spirals": Scene(spirals, 0.1, bowl),
    # CPED: the reward is greatest in a corner far from the data
    "bandit-ring": Scene(ring, 0.05, corner),
    "bandit-wave": Scene(wave, 0.05, corner),
}


def load_scene(name: str) -> Dataset:
    scene, g = SCENES[name], torch.Generator().manual_seed(0)
    action = scene.points(g)
    action = (action + scene.std * torch.randn(action.shape, generator=g)).clamp(-scene.limit, scene.limit)
    noise = scene.reward_std * torch.randn(len(action), generator=g)
    return Dataset.bandit(name, action, functools.partial(scene.reward, data=action), scene.terminal, noise)


# ---- Environments ----------------------------------------------------------------------------------------------------


def make_env(env, render_mode=None, max_episode_steps=1000):
    """One evaluation environment: observations are flat float32 [S], actions are [A] in [-1, 1].

    env: a D4RL name (with D4RL's time limits and rules of ending), the name of a built-in dataset or 2-D scene (whose
    actions keep their scale), the id of a Minari dataset stored here (the environment that it names), or whatever
    gymnasium.make takes, also "module:Id-v0".
    max_episode_steps: the time limit where the environment has none; `assumed_limit` then holds it, else None.

    D4RL's v2 data were recorded in MuJoCo 2.0's -v2 environments. Here they are judged in Gymnasium's -v4, not -v5,
    which pays no healthy reward on the last step and gives Walker2d other feet. MuJoCo 3.5 changed how contact margins
    add; the older contacts are restored. One difference remains that nobody corrects: since MuJoCo 2.1.1 capsules weigh
    what they should, which makes Hopper 3.6 % and Walker2d 4.3 % heavier than the robots in the data. AntMaze is
    rebuilt from Gymnasium's own ant; pen and kitchen need gymnasium-robotics (kitchen also mujoco < 3.12).
    """
    if env in SCENES:
        if render_mode:
            raise UserError(f"{env} has one state and nothing to film; see its bandit.png")
        return load_scene(env).make_env()
    mujoco.set_mju_user_warning(on_mujoco_warning)
    options = {"disable_env_checker": True} | ({"render_mode": render_mode} if render_mode else {})
    original = env in DATASETS or env in BUILT_IN
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* is out of date", DeprecationWarning)  # v4 is meant
            warnings.filterwarnings("ignore", "(Installed|Package) .*")  # published sets name older versions
            make = make_d4rl if original else make_minari if is_minari(env) else gymnasium.make
            raw = make(env, **options)
            if original or (is_minari(env) and env.startswith(("mujoco/", "D4RL/"))):  # recorded before mujoco 3.5
                restore_margins(raw)
            if render_mode and isinstance(raw.unwrapped, MujocoEnv) and not isinstance(raw.unwrapped, AntMaze):
                camera = mujoco.mj_name2id(raw.unwrapped.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
                if camera >= 0:  # Gymnasium's own choice lets robots walk out of the picture
                    raw.unwrapped.mujoco_renderer.camera_id = camera
            limit = None if raw.spec and raw.spec.max_episode_steps else max_episode_steps
            return FlatEnv(gymnasium.wrappers.TimeLimit(raw, limit) if limit else raw, env, assumed_limit=limit)
    except UserError:
        raise
    except gymnasium.error.UnregisteredEnv:
        near = nearest(env, [*DATASETS, *BUILT_IN, *SCENES, *gymnasium.registry])
        raise UserError(f"unknown environment '{env}'{near}") from None
    except (Exception, SystemExit) as error:  # whatever its module and constructor raise
        hint = " (install it, or add its folder to PYTHONPATH)" if isinstance(error, ModuleNotFoundError) else ""
        why = reason(error).split(". ")[0]
        raise UserError(f"{env} cannot be made here: {type(error).__name__}: {why}{hint}") from error


class FlatEnv(gymnasium.Wrapper):
    """Flat float32 observations, actions clipped to [-1, 1] and then stretched to `original_action_space`."""

    def __init__(self, env, name, assumed_limit=None):
        super().__init__(env)
        self.name, self.assumed_limit = name, assumed_limit
        self.original_action_space = box = env.action_space
        check_spaces(env.observation_space, box, name)
        with np.errstate(over="ignore", invalid="ignore"):
            self._center, self._half = (box.high + box.low) / 2, (box.high - box.low) / 2
        if not np.isfinite(self._half).all():
            raise UserError(f"{name} has the action space {box}; only bounded actions work here")
        self.action_space = spaces.Box(-1.0, 1.0, (box.high.size,), np.float32)
        self.observation_space = spaces.Box(-np.inf, np.inf, (spaces.flatdim(env.observation_space),), np.float32)

    def reset(self, **kwargs):
        try:
            obs, info = self.env.reset(**kwargs)
            return self._flat(obs), info
        except (Exception, SystemExit) as error:  # whatever its code raises
            raise self._failed("reset", error) from error

    def step(self, action):
        # Clipping comes first: MuJoCo clips the torque, but the control cost would see the larger action.
        action = self._center + self._half * np.clip(action, -1, 1).reshape(self._half.shape)
        try:
            obs, *rest, info = self.env.step(action)
            reward, terminated, truncated = (x.item() if hasattr(x, "item") else x for x in rest)  # arrays or tensors
            return self._flat(obs), float(reward), bool(terminated), bool(truncated), info
        except (Exception, SystemExit) as error:
            raise self._failed("step", error) from error

    def close(self):
        with contextlib.suppress(Exception):  # a window that was never opened, say: nothing depends on it any more
            self.env.close()

    def _flat(self, obs):
        flat = spaces.flatten(self.env.observation_space, obs).astype(np.float32)
        if flat.shape != self.observation_space.shape:
            raise ValueError(f"{flat.size} numbers in an observation of the space {self.env.observation_space}")
        return flat

    def _failed(self, method, error):
        hint = " (Gymnasium's rules?)" if isinstance(error, TypeError | ValueError) else ""
        return UserError(f"{self.name} failed in {method}: {type(error).__name__}: {reason(error)}{hint}")


def on_mujoco_warning(text):
    """MuJoCo's C code would print `text` and write MUJOCO_LOG.TXT; with this hook it is a Python warning instead.

    The notice that Gymnasium's HalfCheetah uses an old attribute is dropped: nobody here can act on it.
    """
    if "settotalmass" not in text:
        warnings.warn(f"MuJoCo: {text}", stacklevel=2)


def restore_margins(env):
    """Undo a change of contacts: since 3.5 MuJoCo adds the margins of two touching geoms, before it took the larger.

    Halving all margins gives the physics that the data were recorded with, exactly so if all geoms share one margin
    (Hopper, Ant, Adroit). Models that mix margins (the kitchen) are left alone.
    """
    model = getattr(env.unwrapped, "model", None)
    if model is not None and MUJOCO_VERSION >= (3, 5) and np.ptp(model.geom_margin) == 0:
        model.geom_margin *= 0.5


def make_d4rl(env, **options):
    """The environment of an original D4RL dataset or of built-in data, rebuilt on today's packages."""
    family, kind = env.split("-")[:2]
    if family == "antmaze":
        horizon = 700 if kind == "umaze" else 1000
        spec = EnvSpec(env, AntMaze, max_episode_steps=horizon, kwargs={"maze": kind})
        return gymnasium.make(spec, **options)
    if family == "pen":
        import_robotics(env)
        return PenDrop(gymnasium.make("AdroitHandPen-v1", max_episode_steps=100, **options))
    if family == "kitchen":
        import_robotics(env, kitchen=True)
        noise = {"robot_noise_ratio": 0.1, "object_noise_ratio": 0.1}  # D4RL's values
        tasks = list(KITCHEN_TASKS[kind])
        return flat_kitchen(gymnasium.make("FrankaKitchen-v1", tasks_to_complete=tasks, **noise, **options))
    return gymnasium.make(GYM_IDS[family], **options)


def import_robotics(env, kitchen=False):
    """Register the environments of gymnasium-robotics, an optional package, or say what `env` lacks."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # it prints a notice about other Adroit tasks
            import gymnasium_robotics
    except ImportError:
        raise UserError(f"{env} needs gymnasium-robotics: pip install gymnasium-robotics 'mujoco<3.12'") from None
    if kitchen and MUJOCO_VERSION >= (3, 12):
        raise UserError(f"{env} needs mujoco < 3.12 (found {mujoco.__version__}): pip install 'mujoco<3.12'")
    gymnasium.register_envs(gymnasium_robotics)


class AntMaze(MujocoEnv):
    """D4RL's antmaze (v0 and v2), rebuilt from Gymnasium's ant.xml.

    The AntMaze of gymnasium-robotics cannot stand in: it has another gear, time step, frame and observation.
    Observation [29]: position [15], of which the first two are x and y, then velocity [14]; the goal is not in it.
    Reward 1 and end of the episode within 0.5 m of the goal, else 0. A new goal near the goal cell is drawn at every
    reset. This is v2's rule; v0 drew one goal per environment object, which only makes its scores noisier.
    """

    metadata = AntEnv.metadata | {"render_fps": 10}

    def __init__(self, maze, render_mode=None):
        self.walls, (row, col) = MAZES[maze]
        self.goal_cell = np.array([4.0 * (col - 1), 4.0 * (row - 1)])
        rows, cols = len(self.walls), len(self.walls[0])
        above = {"lookat": np.array([2 * cols - 6, 2 * rows - 6, 0]), "distance": 5 * max(rows, cols), "elevation": -60}
        space = spaces.Box(-np.inf, np.inf, (29,), np.float64)
        super().__init__("ant.xml", 5, space, render_mode, default_camera_config=above)

    def _initialize_simulation(self):
        contact = {"solref": [0.02, 1], "solimp": [0.8, 0.8, 0.01, 0.5, 2]}
        wall = {"type": mujoco.mjtGeom.mjGEOM_BOX, "size": [2, 2, 1], "contype": 1, "conaffinity": 1, "condim": 3}
        wall |= {"margin": 0.01, "friction": [1, 0.5, 0.5], **contact}
        spec = mujoco.MjSpec.from_file(self.fullpath)
        spec.option.timestep = 0.02
        for geom in spec.geoms:
            geom.solref, geom.solimp = contact["solref"], contact["solimp"]
        for actuator in spec.actuators:
            actuator.gear[0] = 30
        for row, cells in enumerate(self.walls):
            for col, cell in enumerate(cells):
                if cell == "1":
                    spec.worldbody.add_geom(pos=[4 * (col - 1), 4 * (row - 1), 1], **wall)
        model = spec.compile()
        return model, mujoco.MjData(model)

    def reset_model(self):
        noise = self.np_random.uniform(-0.1, 0.1, self.model.nq), 0.1 * self.np_random.standard_normal(self.model.nv)
        self.set_state(self.init_qpos + noise[0], self.init_qvel + noise[1])
        self.goal = self.goal_cell + self.np_random.uniform(0, 1, 2) + self.np_random.uniform(0, 0.5, 2)
        return self.state_vector()

    def step(self, action):
        self.do_simulation(action, self.frame_skip)
        success = bool(np.linalg.norm(self.data.qpos[:2] - self.goal) <= 0.5)
        return self.state_vector(), float(success), success, False, {"success": success}


class PenDrop(gymnasium.Wrapper):
    """D4RL's pen ends when the pen is dropped: when obs[26], its height, is below 0.075 m."""

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, bool(terminated or obs[26] < 0.075), truncated, info


def flat_kitchen(env):
    """With D4RL's observation [60]: robot position [9], object position [21], goal [30], zero where not asked for.

    The reward is 1 for every subtask when it is first completed, so the return counts subtasks.
    """
    from gymnasium_robotics.envs.franka_kitchen.kitchen_env import OBS_ELEMENT_INDICES

    goal = np.zeros(30)
    for task, target in env.unwrapped.goal.items():
        goal[OBS_ELEMENT_INDICES[task]] = target
    # obs["observation"] [59]: robot position 9 and velocity 9, object position 21 and velocity 20
    flat = lambda obs: np.concatenate([obs["observation"][:9], obs["observation"][18:39], goal])
    return gymnasium.wrappers.TransformObservation(env, flat, spaces.Box(-np.inf, np.inf, (60,), np.float64))


def make_minari(env, **options):
    """The evaluation environment stored with a Minari dataset.

    Two tasks were recorded with rewards that go on after success. They are judged by the flags below: AntMaze ends
    with reward 1 at the goal, the kitchen pays once per subtask, so that returns are successes and subtasks.
    """
    with open_minari(env) as dataset:
        spec = dataset.env_spec
    hint = f"name one by --env ID --data-path {minari_folder(env)}"
    if spec is None:
        raise UserError(f"Minari dataset '{env}' does not say which environment it was recorded in: {hint}")
    if str(spec.entry_point).startswith("gymnasium_robotics"):
        import_robotics(env, kitchen=spec.id.startswith("FrankaKitchen"))
    if spec.id.startswith("AntMaze"):
        options |= {"continuing_task": False}
    if spec.id.startswith("FrankaKitchen"):
        options |= {"remove_task_when_completed": True, "terminate_on_tasks_completed": True}
    if spec.id.startswith("PointMaze"):  # recorded as one episode of a million steps
        options |= {"max_episode_steps": gymnasium.registry[spec.id].max_episode_steps}
    try:
        return dataset.recover_environment(eval_env=True, **options)
    except Exception as error:  # whatever its wrappers and modules raise
        why = f"{type(error).__name__}: {reason(error)}"
        raise UserError(f"the environment of '{env}', {spec.id}, cannot be made here ({why}): {hint}") from error


class Bandit(gymnasium.Env):
    """One state, one step: observation [1] of zero, then the reward of the action, and the end.

    `reward` maps actions [n, dim] to rewards [n], torch tensors both. Actions live in [-max_action, max_action] and are
    not rescaled.
    """

    assumed_limit = None

    def __init__(self, reward, max_action=1.0, dim=2, max_episode_steps=1):
        self.reward = reward
        self.observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = spaces.Box(-max_action, max_action, (dim,), np.float32)
        self.original_action_space = self.action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        reward = self.reward(torch.as_tensor(action, dtype=torch.float32)[None])
        return np.zeros(1, np.float32), float(reward[0]), True, False, {}


# ---- Evaluation ------------------------------------------------------------------------------------------------------


def score(env, returns):
    """Normalised score(s), 0 for D4RL's random and 100 for its expert return; None where no reference exists.

    `env` is a name that make_env takes, `returns` a raw return or an array of them. AntMaze: success x 100, kitchen:
    25 per subtask. Minari: the references stored with the data, if any. For the built-in halfcheetah data and for
    Gymnasium's own HalfCheetah, Hopper and Walker2d (any version) D4RL's numbers serve only as a familiar scale.
    """
    low, high = REFERENCE.get(env.split("-")[0].lower(), (None, None))
    if env.startswith(("D4RL/antmaze/", "D4RL/kitchen/")):  # make_env gives them rewards of its own
        low, high = REFERENCE[env.split("/")[1]]
    elif is_minari(env):
        with open_minari(env) as dataset:
            known = [dataset.storage.metadata.get(key) for key in ("ref_min_score", "ref_max_score")]
            low, high = (None if value is None else float(value) for value in known)
    if low is None or high is None or low == high:
        return None
    return 100 * (np.asarray(returns, np.float64) - low) / (high - low)


def score_name(env):
    return "D4RL score" if env in DATASETS else "score"


def evaluation_seed(seed):
    """Episode i of every evaluation of a run starts from seed `1000 * seed + 100 + i`."""
    return (1000 * seed + 100) % 2**31  # more is refused by many an environment, and a seed may be a date


def evaluate(act, envs, seed, tick=lambda: None):
    """Raw undiscounted return [n] of exactly one episode in each of the n environments.

    All episodes advance together, with one call of `act` per time step for those that still run: float32
    observations [m, S] to actions [m, A], m <= n. Environment i is reset with seed + i. No global random generator is
    touched. `tick` is called before every reset and step of each. Raises RunError when `act` gives a wrong shape or a
    value that is not finite, or a return is not finite.
    """
    obs = np.stack([tick() or env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])  # [n, S]
    returns, running = np.zeros(len(envs)), np.ones(len(envs), bool)
    for step in itertools.count():
        live = np.flatnonzero(running)
        if len(live) == 0:
            break
        action = np.asarray(act(obs[live]), np.float32)
        expected = (len(live), *envs[0].action_space.shape)
        if action.shape != expected:
            raise RunError(f"the policy gave actions of shape {action.shape}, not {expected}, at step {step}")
        finite = np.isfinite(action).all(axis=1)
        if not finite.all():
            bad = live[~finite][0]
            if not np.isfinite(obs[bad]).all():
                raise UserError(f"the environment gave an observation that is not finite at step {step}")
            raise RunError(f"the policy gave an action that is not finite at step {step} in environment {bad}")
        for i, a in zip(live, action):
            tick()
            obs[i], reward, terminated, truncated, _ = envs[i].step(a)
            returns[i] += reward
            running[i] = not (terminated or truncated)
    broken = np.flatnonzero(~np.isfinite(returns))
    if len(broken):
        raise UserError(f"the simulation broke down: the return of environment {broken[0]} is not finite")
    return returns


def evaluate_run(args, Learner):
    """`--evaluate RUN`: score a saved policy once more, with as many episodes as asked and, with --video, a film."""
    folder, seed = Path(args.evaluate), evaluation_seed(args.seed[0])
    act = load_policy(Learner, type(args), folder, args.device)
    envs = [make_env(args.env, max_episode_steps=args.max_episode_steps) for _ in range(max(args.eval_episodes, 1))]
    sizes, dims = (*envs[0].observation_space.shape, *envs[0].action_space.shape), load_checkpoint(folder)["dims"]
    if sizes != (dims["obs_dim"], dims["action_dim"]):
        raise UserError(
            f"{folder} cannot act in {args.env}: it takes {dims['obs_dim']} numbers and gives {dims['action_dim']}, "
            f"there are {sizes[0]} and {sizes[1]}"
        )
    if args.video:  # first: what it lacks is better known before the episodes
        film = folder / "video.mp4"
        value = record_video(act, args.env, film, seed, args.max_episode_steps)
        print(f"video of one episode (return {value:.1f}): {film}")
    returns = evaluate(act, envs, seed)
    text = f"{folder}: return {np.mean(returns):.1f} ± {np.std(returns):.1f} over {len(returns)} episodes"
    scores = score(args.env, returns)
    print(text if scores is None else f"{text} | {score_name(args.env)} {np.mean(scores):.1f} ± {np.std(scores):.1f}")


def record_video(act, env, path, seed, max_episode_steps=1000):
    """Film one episode of the environment named `env` into the file `path` (.mp4) and return its raw return."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # draw without a screen
    film = make_env(env, "rgb_array", max_episode_steps)
    try:
        film.reset(seed=seed)
        film.render()
    except Exception as error:  # noqa: BLE001  every graphics library raises its own
        raise RunError(
            "video needs drawing without a screen (EGL, or OSMesa with MUJOCO_GL=osmesa; pygame for Pendulum), "
            f"which failed: {error}"
        ) from None
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        film = gymnasium.wrappers.RecordVideo(film, f"{folder}/video", episode_trigger=lambda episode: True)
        returns = evaluate(act, [film], seed)
        film.close()  # writes the file
        os.replace(next(Path(folder).glob("video/*.mp4")), path)
    return returns[0]


def need(package, flag):
    try:
        importlib.import_module(package)
    except ImportError:
        raise UserError(f"{flag} needs the package {package}: pip install {package}") from None


# ---- Command line ----------------------------------------------------------------------------------------------------


@dataclass
class RunArgs:
    """The settings of a run that all scripts share; each script's `Args` extends them."""

    # Dataset: a D4RL or Minari id, a built-in set or a bandit; `--env help` lists them
    env: str = "halfcheetah-demo-medium-replay"
    seed: tuple[int, ...] = (0,)  # Random seeds; several train side by side on one copy of the data
    # Updates of the last phase; what else is counted in updates keeps its proportion to it unless given
    steps: int = 1_000_000
    batch_size: int = 256  # Transitions per update
    device: str = "auto"  # auto, cpu, cuda or cuda:<k>
    cuda_graphs: bool = True  # On CUDA: replay each update as one recorded graph
    eval_every: int = 50_000  # Updates between evaluations
    eval_episodes: int = 10  # Episodes per evaluation; 0 for none
    max_episode_steps: int = 1_000  # Time limit of an evaluation episode where the environment has none
    log_every: int = 1_000  # Updates between rows of metrics.csv
    checkpoint_every: int = 10_000  # Updates between checkpoints
    out: str = "runs"  # Folder for run folders: <out>/<script>/<env>/seed<k>
    # Continue the run in this folder (or all its seeds) with its own settings; a larger --steps lengthens it. Without a
    # folder: the run that the other flags name, if it has a checkpoint, or else a new one
    resume: str | None = None
    # A local D4RL-style .hdf5, an .npz or a Minari folder; --env then names the environment
    data_path: str | None = None
    evaluate: str | None = None  # Folder of a run: score its policy again instead of training
    video: bool = False  # With --evaluate: film one episode
    # Log to Weights & Biases too, as its environment variables WANDB_PROJECT, WANDB_ENTITY, WANDB_RUN_GROUP say
    wandb: bool = False
    paper_score: float | None = None  # On this dataset, from the script's table; no flag
    start = goal = None  # updates of the seeds that are resumed first, and where they meet others; no settings


# What may change when a run is resumed, and what may stand beside --evaluate.
FREE = {"resume", "seed", "device", "cuda_graphs", "data_path", "wandb"}
FREE |= {"eval_every", "eval_episodes", "max_episode_steps", "log_every", "checkpoint_every"}
WITH_EVALUATE = {"evaluate", "video", "env", "seed", "device", "eval_episodes", "max_episode_steps"}
HERE = False  # --resume without a folder


def parse_args(Args, settings, check=None, proportional=(), doc=""):
    """The settings of a run: command line, then `settings` (the paper's table), then the defaults of `Args`.

    With --resume or --evaluate: command line, then the settings of that run.
    settings: exact dataset id -> its settings, or a family of built-in data, such as "bandit" or "pendulum-demo"; or
    what gives that for a command line.
    check(args, given): the script's own; raises UserError for settings that cannot go together, before anything is
    read. `given` names the fields that stood on the command line.
    proportional: the fields counted in updates that keep their proportion to `steps` when it is given and they are not.
    """
    parser = make_parser(Args, doc)
    given = read_flags(parser, sys.argv[1:])
    wants_help, env = given.pop("help", False), given.get("env", Args.env)
    if env == "help":
        print(list_datasets())
        sys.exit(0)
    if given.get("resume") == HERE and "evaluate" not in given:
        resume_here(Args, given)
    if folder := given.get("evaluate") or given.get("resume"):
        folders = run_folders(folder)  # of them the first that is asked for
        first = folders.get(given.get("seed", (None,))[0], next(iter(folders.values())))
        default, source = saved_run(first, Args, script_of(Args)), f"the run in {folder}"
        if "device" not in given and default.device.startswith("cuda") and not torch.cuda.is_available():
            print(f"note: {first} ran on {default.device}, which is not here; the CPU takes its place")
            default.device = "cpu"
    else:
        table, relative = find_settings(env, settings(given) if callable(settings) else settings)
        default, source = replace(Args(), **table | dict(env=env)), relative or (env if table else "this script")
        for field in ("eval_every", "log_every"):
            setattr(default, field, max(1, min(getattr(default, field), default.steps // 10)))  # ten points at least
        if source != env and not wants_help:
            using = f"those of {relative}" if relative else "its defaults"
            print(f"note: no settings for {env} in this script; using {using}")
    if wants_help:
        parser.epilog = f"The defaults shown are those of {source}; each --env has its own."
        text = lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else value
        shown = {name: text(value) for name, value in vars(default).items()}
        parser.set_defaults(**shown)
        parser.print_help()
        sys.exit(0)

    args = replace(default, **given)
    if args.evaluate:
        useless(given, sorted(given.keys() - WITH_EVALUATE), "with --evaluate")
        if len(args.seed) > 1:
            raise UserError("--seed takes one integer with --evaluate: that of its episodes")
    elif args.resume:
        check_resume(args, given)
    else:
        for field in ("eval_every", "log_every", *proportional):
            if field not in given:
                length = round(getattr(default, field) * args.steps / default.steps)
                often = max(1, min(length, args.steps // 10))
                setattr(args, field, length if field in proportional else often)
    check_args(args)
    if check:
        check(args, set(given))
    if args.device == "cpu" and built_in(args.env):
        torch.set_num_threads(1)  # networks this small gain nothing from more, and lose much on a busy machine
    return args


def make_parser(Args, doc):
    """One flag for each field of `Args`, those of the algorithm first. It yields only what is given."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [settings]", description=(doc or "").strip().split("\n\n")[0], add_help=False,
        allow_abbrev=False, argument_default=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.error = refuse
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # else -1e-3 is read as a flag, before Python 3.14
    own, shared = parser.add_argument_group("algorithm"), parser.add_argument_group("run")
    texts, types = help_texts(Args), get_type_hints(Args)
    for field in fields(Args):
        if field.name != "paper_score":
            options = flag_type(types[field.name]) | dict(help=texts.get(field.name, " "))
            options |= dict(nargs="?", const=HERE) if field.name == "resume" else {}
            (shared if hasattr(RunArgs, field.name) else own).add_argument(flag(field.name), **options)
    shared.add_argument("-h", "--help", action="store_true", help="show this")
    return parser


def refuse(message):
    raise UserError(f"{message}; --help lists all settings")


def flag(name):
    return "--" + name.replace("_", "-")


def flag_type(hint):
    """How argparse reads a field of this type."""
    kind, *rest = get_args(hint) or (hint,)
    if kind is bool:
        return dict(action=argparse.BooleanOptionalAction)
    if get_origin(hint) is Literal:
        return dict(choices=[kind, *rest])

    def read(text):
        if not text:  # of a variable of the shell that is not set
            raise ValueError
        return None if text == "None" and type(None) in rest else kind(os.path.expanduser(text))  # --out=~/runs

    read.__name__ = kind.__name__  # for argparse's complaints
    return dict(type=read, metavar=kind.__name__.upper()) | (dict(nargs="+") if ... in rest else {})


def help_texts(Args):
    """The comment behind each field or on the lines above it, in the source of `Args` and of what it extends."""
    texts, above = {}, ""
    for line in itertools.chain(*(inspect.getsource(cls).splitlines() for cls in Args.__mro__[-2::-1])):
        code, _, comment = line.strip().partition("# ")
        if field := re.match(r"(\w+):", code):
            texts[field[1]] = (comment or above or texts.get(field[1], " ")).replace("%", "%%")
        above = "" if code else f"{above} {comment}"
    return texts


def read_flags(parser, argv):
    """Field -> value of what stands on the command line; what is wrong there becomes one sentence."""
    argv = [re.sub("^--[^=]+", lambda name: name[0].replace("_", "-"), token) for token in argv]
    flags = {flag: action for action in parser._actions for flag in action.option_strings}
    for token, after in zip(argv, [*argv[1:], ""]):
        name, _, value = token.partition("=")
        if name in flags and flags[name].nargs == 0 and (value or after.lower() in ("true", "false")):
            raise UserError(f"{name} takes no value: write {' or '.join(flags[name].option_strings)}")
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1, 0.7)
        refuse(f"unknown setting {' '.join(unknown)}" + (f" (did you mean {near[0]}?)" if near else ""))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(given).items()}


def find_settings(env, settings):
    """The settings of `env`, and the name of its nearest relative if they are that one's (then without its score).

    The nearest is the key that shares most words with `env`, of built-in data last; none where even the task differs.
    """
    families = [key for key in settings if env == key or env.startswith(key + "-") and built_in(env)]
    if families:
        return settings[max(families, key=len)], None
    words = lambda name: set(re.split(r"[-/_:]", name.lower()))
    likeness = lambda key: (key in DATASETS, len(words(key) & words(env)) - 0.1 * len(words(key) - words(env)))
    relative = max([key for key in settings if key.split("-")[0] in words(env)], key=likeness, default=None)
    return {key: value for key, value in settings.get(relative, {}).items() if key != "paper_score"}, relative


def built_in(env):
    """Whether `env` names data made on the spot."""
    return env in BUILT_IN or env.startswith("bandit-")


def at_least(args, low, *names):
    """Refuse settings below `low`."""
    for name in names:
        if not getattr(args, name) >= low:
            raise UserError(f"{flag(name)} must be at least {low}, found {getattr(args, name)}")


def at_most(args, high, *names):
    """Refuse settings above `high`."""
    for name in names:
        if not getattr(args, name) <= high:
            raise UserError(f"{flag(name)} must be at most {high}, found {getattr(args, name)}")


def useless(given, names, where):
    """Refuse flags on the command line that would do nothing there: `where` completes the sentence."""
    for name in names:
        if name in given:
            raise UserError(f"{flag(name)} does nothing {where}")


def apart(args, name):
    """Refuse a setting that names another run if this one would move it aside; make it absolute, for --resume."""
    source, new = Path(getattr(args, name)), new_folders(args, script_of(type(args)))
    setattr(args, name, os.path.abspath(source))
    starts = not (args.resume or args.evaluate)
    if starts and any(folder.resolve().is_relative_to(source.resolve()) for folder in new.values()):
        raise UserError(f"{flag(name)} {source} is where this run would be written: choose another --out")


def check_args(args):
    at_least(args, 1, "steps", "batch_size", "eval_every", "log_every", "checkpoint_every", "max_episode_steps")
    at_least(args, 0, "eval_episodes")
    if not args.seed or len(set(args.seed)) < len(args.seed) or not all(0 <= seed < 2**32 for seed in args.seed):
        raise UserError(f"--seed takes one or more different integers from 0 on, found {' '.join(map(str, args.seed))}")
    if args.video:
        if not args.evaluate:
            raise UserError("--video does nothing without --evaluate RUN")
        need("moviepy", "--video")
    if args.wandb and not args.evaluate:
        need("wandb", "--wandb")
    if not (args.evaluate or args.resume):
        out = Path(args.out).absolute()
        there = next(path for path in (out, *out.parents) if os.path.lexists(path))
        if not there.is_dir() or not os.access(there, os.W_OK):
            why = "read-only" if there.is_dir() else "no folder"
            raise UserError(f"--out {args.out} cannot be written: {there} is {why}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        trial = torch.zeros(1, device=args.device)
        trial.item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device} cannot be used here: {reason(error).split('. ')[0]}") from None
    if trial.device.type == "cuda":
        torch.cuda.set_device(trial.device)  # streams and graphs belong to the current device


def check_resume(args, given):
    """What the seeds of a resumed run must keep and share, and which of them go first."""
    folders = run_folders(args.resume)
    seeds = given.get("seed") or tuple(folders)
    for seed in seeds:
        if seed not in folders:
            raise UserError(f"{args.resume} holds no run of seed {seed}")
        saved = saved_run(folders[seed], type(args), script_of(type(args)))
        if "steps" in given and args.steps < saved.steps:
            raise UserError(f"--steps was {saved.steps} in {folders[seed]}; it can grow, not shrink to {args.steps}")
        args.steps = max(args.steps, saved.steps)
        for name in vars(saved).keys() - FREE - {"steps", "" if "out" in given else "out"}:
            was, now = getattr(saved, name), getattr(args, name)
            if was and now and name in ("out", "reuse", "bdm_only"):
                was, now = os.path.abspath(was), os.path.abspath(now)
            if was != now:
                rest = "when it is resumed" if name in given else "as for other seeds: resume each on its own"
                raise UserError(f"{flag(name)} was {was} in {folders[seed]} and cannot be {now} {rest}")
    there = lambda seed: (folders[seed] / "checkpoint.pt").exists()
    counts = {seed: count_updates(load_checkpoint(folders[seed])) if there(seed) else 0 for seed in seeds}
    least, *ahead = sorted(set(counts.values()))
    args.seed = tuple(seed for seed in seeds if counts[seed] == least)
    args.start, args.goal = least, ahead[0] if ahead else None
    if len(args.seed) < len(seeds):
        print(f"note: the seeds stand apart; seed {' '.join(map(str, args.seed))} first, until it meets the next")


def resume_here(Args, given):
    """--resume without a folder: put in the folder where these flags would start a run, if a checkpoint is there."""
    given.pop("resume")
    args = replace(Args(), **given)
    folders = list(new_folders(args, script_of(Args)).values())
    if any((folder / "checkpoint.pt").exists() for folder in folders):
        given |= dict(resume=str(folders[0].parent), seed=args.seed)
        given.pop("out", None)
    else:
        print(f"note: no checkpoint to resume in {folders[0].parent}; starting from the beginning")


def script_of(Args):
    """The file that `Args` stands in."""
    return Path(getattr(sys.modules[Args.__module__], "__file__", None) or "notebook.py")


def list_datasets() -> str:
    """The text of `--env help`."""
    names = "\n".join(f"  {name}" for name in (*BUILT_IN, "", *SCENES, "", *DATASETS))
    return f"""Built-in data and 2-D toy problems, made here in seconds, then D4RL's, downloaded once:
{names}

Minari: any id with its version, such as mujoco/hopper/medium-v0 (stored here, or downloaded once).
Your own file: --data-path FILE (D4RL-style .hdf5, .npz, or a Minari dataset's folder), and --env naming
  a dataset above or a Gymnasium environment such as Hopper-v4."""


def release():
    """Give back what the runs of this process hold."""
    while HELD:
        HELD.pop().close()


def cli(main):
    """Run `main`. What a user can mend is one sentence on stderr and an exit code; a bug keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not a notebook's
            stream.reconfigure(errors="replace")  # where the locale has no ±
    try:
        while True:
            try:
                return main()
            except CaughtUp:  # resumed seeds that were behind now stand where the others do
                release()
    except UserError as error:
        message, code = str(error), error.code
    except KeyboardInterrupt:
        message, code = "stopped by Ctrl-C", 130
    except (MemoryError, RuntimeError) as error:
        if "home directory" in str(error):  # pathlib's
            message, code = "a path with ~ is needed, but no home folder is known: set HOME", 2
        elif isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            message, code = f"out of memory, try a smaller --batch-size or fewer seeds: {reason(error)}", 1
        else:
            raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        message, code = "whoever read the output has gone; --resume continues from the last checkpoint", 1
    except OSError as error:
        message, code = f"{error.strerror or error}: {error.filename or 'while reading or writing files'}", 1
    finally:
        release()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


# ---- Learners: metrics, state, saved policies, CUDA graphs -----------------------------------------------------------


class Metrics:
    """Running means of scalar tensors, kept on the device so that an update never waits for it."""

    def __init__(self):
        self.sums = {}  # names of one `add` -> their sums and, last, how often it was called

    @torch.no_grad()
    def add(self, **values):
        names, row = tuple(values), torch.stack(list(values.values()))
        if names not in self.sums:
            self.sums[names] = row.new_zeros(len(names) + 1)
        self.sums[names][:-1].add_(row)
        self.sums[names][-1].add_(1)

    def read(self):
        """The means since the last call, as a dict of floats; on CUDA the device must be at rest."""
        means = {}
        for names, sums in self.sums.items():
            *totals, count = sums.tolist()
            if count:
                means.update({name: total / count for name, total in zip(names, totals)})
            sums.zero_()
        return means


def get_state(parts):
    """What a checkpoint keeps of a learner's parts: modules, optimisers, generators, tensors."""
    state = {}
    for name, part in parts.items():
        if isinstance(part, torch.Generator):
            state[name] = part.get_state()
        else:
            state[name] = part.detach().clone() if isinstance(part, torch.Tensor) else part.state_dict()
    return state


def set_state(parts, state):
    """The inverse of `get_state`, in place, because a CUDA graph knows tensors by their address.

    False if the state is from another kind of device, whose generators are unlike these, which stay as they are.
    """
    try:
        return all([set_part(part, state[name]) for name, part in parts.items()])
    except torch.OutOfMemoryError:
        raise
    except (KeyError, RuntimeError) as error:  # parts or shapes that are not there
        why = " ".join(str(error).split())
        raise UserError(f"this checkpoint is of another version, class or size of the script: {why[:200]}") from error


def set_part(part, saved):
    """One part for `set_state`; False for a generator of another kind of device."""
    if isinstance(part, torch.Generator):
        if saved.shape != part.get_state().shape:
            return False
        part.set_state(saved.cpu())
    elif isinstance(part, torch.optim.Optimizer):  # what belongs to this process (capturable, fused) stays
        for index, p in enumerate(p for group in part.param_groups for p in group["params"]):
            slots, old = part.state[p], saved["state"].get(index, {})
            for key in old.keys() - slots.keys():
                slots[key] = torch.empty_like(old[key], device=p.device)
            for key, slot in slots.items():
                slot.copy_(old.get(key, torch.zeros_like(slot)))
        for group, old in zip(part.param_groups, saved["param_groups"]):
            tensor = isinstance(group["lr"], torch.Tensor)
            group["lr"] = group["lr"].copy_(old["lr"]) if tensor else old["lr"]
    elif isinstance(part, torch.Tensor):
        part.data.copy_(saved)
    else:
        part.load_state_dict(saved)
    return True


def load_checkpoint(folder, device="cpu"):
    """The checkpoint of the run in `folder`, a dict with `learner`, `phase`, `step`, `dims` and the run's books."""
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        raise UserError(f"{folder} holds no checkpoint.pt; name the folder of a run, such as runs/dtql/<env>/seed0")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        return {name: checkpoint[name] for name in (*BOOKS, "dims", "learner")}
    except Exception as error:
        why = f"{type(error).__name__}: {reason(error)}"
        raise RunError(f"{path} cannot be read, it may be damaged or of another version: {why}") from None


def saved_run(folder, Args, script=None):
    """The settings, an `Args`, of the run in `folder`, which must be one of `script` if that is given."""
    saved, types = read_about(folder)["args"], get_type_hints(Args)
    if script and not (Path(folder) / Path(script).name).exists():
        raise UserError(f"{folder} is not a run of {Path(script).name}")
    saved = {name: value for name, value in saved.items() if name in types}
    for name, value in saved.items():
        if not fits(value, types[name]) and name != "paper_score":
            raise UserError(f"{folder}/args.json: {value!r} is no value for {name}")
    return replace(Args(), **saved)


def fits(value, hint):
    """Whether a value from args.json, which may have been edited, is of a field's type."""
    kinds = get_args(hint) or (hint,)
    if get_origin(hint) is Literal:
        return value in kinds
    if ... in kinds:
        return isinstance(value, tuple) and all(fits(one, kinds[0]) for one in value)
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))


def load_run(script, folder, Args, seed=None, device="cpu"):
    """Settings (an `Args`) and checkpoint of another run of `script`.

    folder: of the run, or of a run with several seeds, of which `seed` is then taken.
    """
    folder = Path(folder)
    if seed is not None and (folder / f"seed{seed}").is_dir():
        folder = folder / f"seed{seed}"
    checkpoint = load_checkpoint(folder, device)
    return replace(saved_run(folder, Args, script), device=str(device)), checkpoint


def same_settings(folder, theirs, ours, names):
    """Refuse the run in `folder` if it was made with other settings than ours: `theirs` and `ours` are dicts.

    names: fields of `Args`, and "fingerprint" for the data.
    """
    text = lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else value
    changed = [
        "other data" if name == "fingerprint" else f"{flag(name)} {text(theirs.get(name))}"
        for name in names
        if theirs.get(name) != ours[name]
    ]
    if changed:
        raise UserError(f"{folder} was made with {', '.join(changed)}, unlike this run")


def load_policy(Learner, Args, folder, device="cpu"):
    """A trained policy: a function from observations [n, S] to actions [n, A] in [-1, 1], numpy arrays both."""
    checkpoint = load_checkpoint(folder, device)
    args = replace(saved_run(folder, Args), device=device)
    learner = Learner(args, SimpleNamespace(**checkpoint["dims"]), args.seed[0])
    if unknown := checkpoint["learner"].keys() - learner.state.keys():
        raise UserError(f"{folder} holds no {Learner.__name__}, which has no {', '.join(sorted(unknown))}")
    set_state(learner.state, checkpoint["learner"])
    return policy_of(learner)


def policy_of(learner):
    """`learner.act` from numpy to numpy; its random draws are its own, so that acting leaves training alone."""
    device = learner.generator.device
    generator = torch.Generator(device).manual_seed(0)

    def act(obs):
        with torch.no_grad():
            return learner.act(torch.as_tensor(obs, dtype=torch.float32, device=device), generator).cpu().numpy()

    return act


def capture(learners, phase):
    """A function that performs `learner.<phase>()` for every learner.

    On CUDA each learner's update is recorded as a CUDA graph at the first call, and replayed on a stream of its own.
    With --no-cuda-graphs, or where recording fails, the same operations are launched one by one.
    """
    args, updates = learners[0].args, [getattr(learner, phase) for learner in learners]
    if not args.device.startswith("cuda"):
        return lambda: [update() for update in updates]
    replays = []

    def step():
        if args.cuda_graphs and not replays:
            try:
                replays.extend([record(learner, update) for learner, update in zip(learners, updates)])
            except RuntimeError as error:
                args.cuda_graphs = False  # nor in the phases to come
                why = reason(error.__context__ or error)
                warn(f"no CUDA graph of `{phase}` could be recorded, so updates are slower: {why}")
        for run in replays or updates:
            run()

    return step


def record(learner, update):
    """A function that replays one update, recorded as a CUDA graph; RuntimeError where that cannot be done.

    Recording needs three warm-up updates and, to see that it worked, a first replay. All are taken back.
    """
    before = copy.deepcopy(get_state(learner.state))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def replay():
        with torch.cuda.stream(stream):
            graph.replay()

    try:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                update()
        torch.cuda.current_stream().wait_stream(stream)
        graph.register_generator_state(learner.generator)
        with torch.cuda.graph(graph, stream=stream):
            update()
        old = [tensor.clone() for tensor in tensors(get_state(learner.state))]
        torch.cuda.synchronize()
        replay()
        torch.cuda.synchronize()
        if all(map(torch.equal, old, tensors(get_state(learner.state)))):
            raise RuntimeError("the recorded update changes nothing")
    except RuntimeError:  # which can leave the generator unfit for use outside of a graph
        learner.generator = learner.state["generator"] = torch.Generator(learner.generator.device)
        raise
    finally:
        set_state(learner.state, before)
        learner.metrics.read()
        torch.cuda.synchronize()
    return replay


def tensors(state):
    """All that an update writes in the state of a learner; the place of a generator is kept by the host."""
    for name, value in state.items():
        if isinstance(value, dict):
            yield from tensors(value)
        elif isinstance(value, torch.Tensor) and name != "generator":
            yield value


# ---- Runs: the loop, then its parts: folder, log, terminal, summary, pictures ----------------------------------------

BOOKS = ("phase", "step", "done", "owed", "speed", "seconds")  # what a checkpoint holds of a Run
HELD = []  # for each run of this process an ExitStack: its locks, files and signal handlers


class Stopped(Exception):
    """A signal came during an evaluation."""


class CaughtUp(Exception):
    """Resumed seeds that were behind stand where the next ones do; all go on together."""


class Run:
    """Keeps the books of one training run with one or more seeds.

    learners: one per seed, each with `state` (name -> module, optimiser, generator or tensor: all that a checkpoint
    holds), `generator`, `metrics` (a Metrics) and `act(obs [n, S], generator) -> action [n, A]`.
    protocol: how the paper's score, `args.paper_score`, was measured.
    phases: name -> updates, for all phases in their order.
    """

    def __init__(self, args, learners, data, script, protocol, phases):
        self.args, self.learners, self.data, self.script = args, learners, data, Path(script)
        self.code = {file.name: file.read_bytes() for file in (self.script, Path(__file__))}
        self.protocol, self.phases = protocol, phases
        self.published = None if args.data_path else args.paper_score
        self.phase, self.step, self.done = "", 0, {}  # where the run is; finished phases and their updates
        self.owed = False  # an evaluation that a signal cut short
        self.speed, self.seconds = {}, 0.0  # phase -> [updates, seconds spent on them]; seconds in all
        self.held, self.signal = contextlib.ExitStack(), None
        HELD.append(self.held)
        places = run_folders(args.resume) if args.resume else new_folders(args, self.script)
        self.folders = [places[seed] for seed in args.seed]
        self.root = self.folders[0].parent
        for folder in self.folders:
            self.held.enter_context(lock(folder))
        self.hear_signals()
        self.envs = [data.make_env(max_episode_steps=args.max_episode_steps) for _ in range(args.eval_episodes)]
        if args.resume:
            self.restore()
        else:
            for folder, seed in zip(self.folders, args.seed):
                begin_folder(folder, self, seed)
        self.logs = [Log(*place, self) for place in zip(self.folders, args.seed)]
        self.start, self.drawn = time.monotonic() - self.seconds, time.monotonic()
        self.terminal = Terminal(self)

    def updates(self, phase, stride=1, evaluate=False, at_end=None):
        """Yield once for every `stride` updates of a phase; in between log, evaluate, save and watch for signals.

        What a resumed run has finished yields nothing. `at_end` is called once, when the phase is complete.
        """
        args, steps = self.args, -(-self.phases[phase] // stride) * stride
        self.phases[phase] = steps
        if self.done.get(phase, -1) >= steps:
            return
        self.step = self.step if phase == self.phase else 0
        self.phase = phase
        self.done.pop(phase, None)  # a finished run can be lengthened
        if steps:
            self.terminal.open(steps)
        self.restart_clock()
        while self.owed or self.step < steps:
            saving = self.owed
            if not self.owed:  # else first of all the evaluation that a signal cut short
                yield
                before, self.step = self.step, self.step + stride
                self.terminal.count(stride)
                due = lambda every, before=before: self.step == steps or self.step // every > before // every
                self.owed = evaluate and bool(self.envs) and due(args.eval_every)
                saving = self.owed or due(args.checkpoint_every) or self.stopping()
                if not (saving or due(args.log_every)):
                    continue
                self.record()
            evaluated = self.owed and self.evaluate()
            if self.step == steps and not self.owed:
                self.complete(at_end)
            self.terminal.show(evaluated)
            if saving:
                self.save()
            if self.stopping():
                self.leave()
            self.restart_clock()
        self.terminal.close()
        if phase not in self.done:  # no updates at all
            self.complete(at_end)

    def complete(self, at_end):
        self.done[self.phase] = self.step
        if at_end:
            at_end()

    @property
    def total(self):
        """Updates so far, over all phases."""
        return count_updates(vars(self))

    @property
    def place(self):
        """Where the files are."""
        return self.root if len(self.folders) > 1 else self.folders[0]

    def wait(self):
        """Let the streams of all learners come to rest before anything reads or resets what they write."""
        if self.args.device.startswith("cuda"):
            torch.cuda.synchronize(self.args.device)

    def restart_clock(self):
        self.wait()
        self.clock, self.clock_step = time.monotonic(), self.step

    def record(self):
        """One row of the log per seed: the means of its metrics since the last one."""
        self.wait()
        count, spent = self.step - self.clock_step, max(time.monotonic() - self.clock, 1e-9)
        updates, seconds = self.speed.get(self.phase, (0, 0.0))
        self.speed[self.phase] = [updates + count, seconds + spent]
        metrics = [learner.metrics.read() for learner in self.learners]
        for seed, values in zip(self.args.seed, metrics):
            for name, value in values.items():
                if not math.isfinite(value):
                    saved = (self.folders[0] / "checkpoint.pt").exists()
                    rest = f"the last checkpoint in {self.place} is from before that" if saved else "no checkpoint yet"
                    where = f"update {self.step:,} of phase {self.phase}, seed {seed}"
                    raise RunError(f"{name} became {value} by {where}; {rest}")
        row = dict(phase=self.phase, step=self.step, total=self.total, seconds=round(time.monotonic() - self.start, 1))
        for log, values in zip(self.logs, metrics):
            log.add(row | dict(updates_per_second=count / spent) | values)

    def evaluate(self):
        """Put an evaluation into the last row of every seed's log; a signal drops it. Whether it was made."""

        def tick():
            if self.signal:
                raise Stopped
            self.terminal.evaluating(time.monotonic() - begin)

        begin, found = time.monotonic(), []
        try:
            for learner, seed in zip(self.learners, self.args.seed):
                found.append(evaluate(policy_of(learner), self.envs, evaluation_seed(seed), tick))
        except Stopped:
            return False
        except RunError:  # of the policy: the last checkpoint may be better
            raise
        except UserError as error:  # of an environment
            self.save()
            rest = f"all updates are saved, --resume {self.place} tries again, or does without by --eval-episodes 0"
            raise RunError(f"{error}; {rest}") from error
        self.owed, self.terminal.evaluation_seconds = False, time.monotonic() - begin
        for log, returns in zip(self.logs, found):
            values = {"return": float(np.mean(returns)), "return_std": float(np.std(returns))}
            if (scores := score(self.args.env, returns)) is not None:
                values |= dict(score=float(np.mean(scores)), score_std=float(np.std(scores)))
            log.add_evaluation(dict(phase=self.phase, step=self.step, total=self.total), values)
        if time.monotonic() - self.drawn > 10:  # seconds: a picture takes about one
            self.draw()
        return True

    def save(self):
        """Checkpoints of all seeds: written beside the old ones first, then renamed, so that a kill costs nothing."""
        self.seconds = time.monotonic() - self.start
        dims = {name: getattr(self.data, name) for name in ("obs_dim", "action_dim", "max_action", "fingerprint")}
        books = {name: getattr(self, name) for name in BOOKS} | dict(dims=dims)
        parts = [folder / "checkpoint.pt.part" for folder in self.folders]
        try:
            for part, learner in zip(parts, self.learners):
                torch.save(books | dict(learner=get_state(learner.state)), part)
                with open(part, "rb+") as file:
                    os.fsync(file.fileno())  # else a full network disk, or a power cut, could leave half a file
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            for part in parts:
                part.unlink(missing_ok=True)
            raise RunError(f"no checkpoint could be written in {self.root} (disk full?): {reason(error)}") from None
        for log, part in zip(self.logs, parts):
            log.board.flush()
            part.replace(part.with_suffix(""))

    def restore(self):
        """Continue each seed from its checkpoint; from the beginning where there is none yet."""
        elsewhere = False
        for folder, learner, seed in zip(self.folders, self.learners, self.args.seed):
            about = read_about(folder)
            if (folder / "checkpoint.pt").exists():
                checkpoint = load_checkpoint(folder, self.args.device)
                if self.args.start not in (None, count_updates(checkpoint)):
                    raise CaughtUp  # another process went on with it before the lock was ours: look again
                if checkpoint["dims"]["fingerprint"] != self.data.fingerprint:
                    why = "other rows, or actions scaled in another way, where the environment was or is not known"
                    raise UserError(f"these are not the data that {folder} was trained on: {why}")
                if not set_state(learner.state, checkpoint["learner"]):  # else the first draws would come once more
                    learner.generator.manual_seed(hash((seed, checkpoint["step"])))
                    elsewhere = True
                if not self.owed:  # else the books of a seed that still owes an evaluation stay: all make it then
                    for name in BOOKS:
                        setattr(self, name, checkpoint[name])
            keep_code(folder, self)
            again = dict(resumed=now(), **circumstances(self))
            write_about(folder, self, seed, about | dict(resumed=[*about.get("resumed", []), again]))
        self.owed &= bool(self.envs)
        print(f"resuming {self.place} {f'at {self.phase} {self.step:,}' if self.phase else 'from its beginning'}")
        if elsewhere:
            print("note: its checkpoint is from another kind of device: the run goes on, but not bit for bit")
        steps, old = self.args.steps, about["args"]["steps"]
        if steps > old:
            print(f"note: {steps:,} updates instead of {old:,}: any schedule over --steps stretches to the new end,")
            print("      and a rate that had fallen along it rises again")

    def hear_signals(self):
        """Of a user or a cluster (SIGUSR1: SLURM's warning). Windows lacks two; only the main thread may hear any."""
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")):
                if number and (number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN):  # nohup
                    self.held.callback(signal.signal, number, signal.signal(number, self.on_signal))

    def on_signal(self, number, frame):
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def stopping(self):
        return self.signal or self.total == self.args.goal

    def leave(self):
        self.terminal.close()
        if not self.signal:
            raise CaughtUp
        self.draw()
        where = f"{self.phase} {self.step:,} of {self.phases[self.phase]:,}"
        print(f"stopped at {where}; --resume {shlex.quote(str(self.place))} continues", file=sys.stderr)
        self.held.close()  # in a notebook the process lives on
        sys.exit(128 + self.signal)

    def draw(self):
        """From the first evaluation on: curve.png of each seed and, with several, one with their mean and band."""
        self.drawn = time.monotonic()
        if any("return" in row for row in self.logs[0].rows):
            for log, seed in zip(self.logs, self.args.seed):
                draw_curve(log.folder / "curve.png", [log.rows], self, f"seed {seed}")
            if len(self.logs) > 1:
                draw_curve(self.root / "curve.png", [log.rows for log in self.logs], self, f"{len(self.logs)} seeds")

    def finish(self):
        """summary.json of each seed (and of all), the last pictures, and the closing lines."""
        self.seconds = time.monotonic() - self.start
        summaries = [summarise(self, log.rows, seed) for log, seed in zip(self.logs, self.args.seed)]
        for folder, summary in zip(self.folders, summaries):
            write_whole(folder / "summary.json", json.dumps(summary, indent=2))
        if len(summaries) > 1:
            write_whole(self.root / "summary.json", json.dumps(across_seeds(summaries), indent=2))
        elif self.args.resume and (self.root / "summary.json").exists():
            print(f"note: {self.root}/summary.json is of several seeds as they were; --resume {self.root} renews it")
        self.draw()
        if self.args.env.startswith("bandit-"):
            for folder, learner, seed in zip(self.folders, self.learners, self.args.seed):
                draw_bandit(folder / "bandit.png", learner, self, seed)
        print_summary(self, summaries)
        self.held.close()

    def rates(self):
        """Updates per second of each phase."""
        return {phase: updates / max(seconds, 1e-9) for phase, (updates, seconds) in self.speed.items()}


def count_updates(books):
    """Updates over all phases, of a Run or of a checkpoint."""
    return sum(books["done"].values()) + (0 if books["phase"] in books["done"] else books["step"])


# Folders


def new_folders(args, script):
    """Seed -> the folder of a new run."""
    name = re.sub("[/:]", "-", args.env) + (f"@{Path(args.data_path).stem}" if args.data_path else "")
    return {seed: Path(args.out) / script.stem / name / f"seed{seed}" for seed in args.seed}


def run_folders(folder):
    """Seed -> folder: of one run, or of all seeds in `folder`."""
    paths = [path for path in Path(folder).glob("seed*") if path.name[4:].isdigit() and (path / "args.json").exists()]
    return dict(sorted((read_about(path)["args"]["seed"][0], path) for path in paths or [Path(folder)]))


def lock(folder):
    """Keeps a folder for this process as long as it is held; the lock of a killed process vanishes with it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(f"{folder.resolve()}.lock", timeout=0, thread_local=False).acquire()
    except Timeout:
        try:
            holder = "process {pid} on {host} since {since}".format(**read_about(folder)["process"])
        except (UserError, KeyError):
            holder = "another process"
        own = f"process {os.getpid()} on {platform.node()}" in holder  # of a notebook
        end = "common.release() gives back what an error left of it" if own else "wait for its end"
        raise UserError(f"{folder} is in use by {holder}: {end}, or choose another --out") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        warn(f"the file system of {folder} has no locks: nothing keeps a second run out of it")
        return contextlib.nullcontext()


def begin_folder(folder, run, seed):
    """A new folder; an earlier run in the same place is moved aside, never overwritten."""
    if folder.is_symlink():  # what it points to is locked, and would stay
        raise UserError(f"{folder} is a symbolic link: remove it or choose another --out (--resume goes on there)")
    if folder.exists():
        folder.rename(aside := unused(folder))
        print(f"note: the earlier run in {folder} is now {aside}; --resume continues either")
    folder.mkdir()
    keep_code(folder, run)
    write_about(folder, run, seed, dict(started=now(), **circumstances(run)))


def keep_code(folder, run):
    """The script and common.py as they run, beside what ran before where that was another version."""
    for name, code in run.code.items():  # read before: the script may be the copy in a folder that was moved
        path = folder / name
        if path.exists() and (old := path.read_bytes()) != code:
            (aside := unused(path)).write_bytes(old)
            print(f"note: {name} has changed since the run in {folder} began; the older one there is now {aside.name}")
        write_whole(path, code)


def unused(path):
    """The first of <path>.old1, .old2, ... that does not exist."""
    return next(old for n in itertools.count(1) if not (old := Path(f"{path}.old{n}")).exists())


def circumstances(run):
    """By what code, versions and machine a run goes on."""
    versions = {module.__name__: module.__version__ for module in (torch, np, gymnasium, mujoco)}
    versions |= dict(python=platform.python_version())
    device = device_name(run.args.device)
    return dict(git=git_state(run.script), versions=versions, processor=processor(), device=device)


def write_about(folder, run, seed, about):
    """args.json: settings, versions, machine, and the process that holds the folder."""
    process = dict(pid=os.getpid(), host=platform.node(), since=now())
    data_path = run.args.data_path and os.path.abspath(run.args.data_path)  # --resume may come from another folder
    about |= dict(process=process, args=asdict(run.args) | dict(seed=[seed], resume=None, data_path=data_path))
    write_whole(folder / "args.json", json.dumps(about, indent=2))


def read_about(folder):
    """What `write_about` wrote."""
    try:
        about = json.loads((Path(folder) / "args.json").read_text())
        saved = {name: tuple(value) if isinstance(value, list) else value for name, value in about["args"].items()}
        saved["seed"][0], saved["steps"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{folder} is not the folder of a run: it holds no readable args.json") from None
    return about | dict(args=saved)


def now():
    return time.strftime("%Y-%m-%d %H:%M:%S")


def processor():
    """Name of the CPU."""
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # not Linux, or not said there
        return platform.processor()


def device_name(device):
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()


def git_state(script):
    """The commit that `script` stands in and whether files differ from it; None outside a repository."""
    command = ["git", "-C", str(script.resolve().parent)]
    command += "describe --always --dirty --abbrev=40 --exclude=*".split()
    try:
        text = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        return None
    return dict(commit=text.removesuffix("-dirty"), dirty=text.endswith("-dirty")) if text else None


def write_whole(path, content):
    """Write a whole file or nothing: bytes, or a text as it is."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content if isinstance(content, bytes) else content.encode())
    part.replace(path)


# Log


class Log:
    """What one seed writes on its way: metrics.csv, TensorBoard and, if asked, W&B, over the updates of all phases."""

    def __init__(self, folder, seed, run):
        self.folder, self.path, self.columns, total = folder, folder / "metrics.csv", {}, run.total
        self.rows = [row for row in read_csv(self.path) if row["total"] <= total]  # what was logged after is left out
        self.board = SummaryWriter(str(folder), purge_step=total + 1)
        self.wandb = start_wandb(folder, seed, run) if run.args.wandb else None
        run.held.callback(self.close)

    def add(self, row):
        self.rows.append(row)
        if row.keys() <= self.columns.keys():
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        else:
            self.write()
        self.send(row["phase"], row)

    def add_evaluation(self, place, values):
        """Complete the last row, which a resumed run may have lost."""
        if not self.rows or self.rows[-1]["total"] < place["total"]:
            self.rows.append(place)
        self.rows[-1] |= values
        self.write()
        self.send("eval", values)

    def write(self):
        """All rows again, below a header with all columns."""
        self.columns = dict.fromkeys(name for row in self.rows for name in row)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.path, text.getvalue())

    def send(self, group, values):
        total = self.rows[-1]["total"]
        values = {f"{group}/{name}": value for name, value in values.items() if name not in ("phase", "step", "total")}
        for name, value in values.items():
            self.board.add_scalar(name, value, total)
        if self.wandb:
            self.wandb.log(values | dict(total=total))

    def close(self):
        with contextlib.suppress(OSError):  # a full disk has been told
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def read_csv(path):
    """Rows of a metrics.csv: phase as text, counts as ints, else floats; empty cells and damaged rows are left out."""
    rows, kinds = [], dict(phase=str, step=int, total=int)
    if path.exists():
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file, contextlib.suppress(csv.Error):
            for row in csv.DictReader(file):
                with contextlib.suppress(ValueError, TypeError):
                    rows.append({name: kinds.get(name, float)(text) for name, text in row.items() if text})
    return [row for row in rows if row.keys() > kinds.keys()]


def start_wandb(folder, seed, run):
    """A run of Weights & Biases, the same one after every resume; its own environment variables choose the rest."""
    import wandb

    name = f"{run.script.stem} {run.args.env}"
    try:
        board = wandb.init(
            id=hashlib.sha256(f"{folder.resolve()} {read_about(folder).get('started')}".encode()).hexdigest()[:16],
            resume="allow", name=f"{name} seed {seed}", config=asdict(run.args) | dict(seed=seed), dir=folder,
            project=os.environ.get("WANDB_PROJECT", "offline-rl"), group=os.environ.get("WANDB_RUN_GROUP", name),
            reinit="create_new",
        )  # fmt: skip
    except Exception as error:  # no login, no network
        why = f"{type(error).__name__}: {reason(error)}"
        raise RunError(f"--wandb cannot be used here: {why} (WANDB_MODE=offline needs no network)") from error
    board.define_metric("*", step_metric="total")
    return board


# Terminal


class Terminal:
    """What a run says: a block at its start, then a progress bar or, without a terminal, a line now and then."""

    def __init__(self, run):
        self.run, self.bar, self.latest = run, None, ""
        self.counted, self.rate = 0, math.nan  # updates; how many a second in the first hundred
        self.evaluation_seconds = self.printed = self.refreshed = 0.0
        args, data = run.args, run.data
        returns = data.episode_returns
        mean = f", {len(returns):,} episodes, mean return {np.mean(returns):.1f}" if len(returns) else ""
        limit = run.envs and run.envs[0].assumed_limit
        for name, text in dict(
            algorithm=(ast.get_docstring(ast.parse(run.code[run.script.name])) or run.script.stem).split("\n")[0],
            data=f"{args.env}: {len(data):,} rows{mean}",
            episodes=limit and f"at most {limit:,} steps (--max-episode-steps), as {args.env} has no time limit",
            device=f"{args.device}, {device_name(args.device)}",
            phases=", ".join(f"{phase} {steps:,} updates" for phase, steps in run.phases.items() if steps),
            files=run.place,
        ).items():
            if text:
                print(f"{name:<11} {text}", flush=True)

    def open(self, steps):
        self.bar = tqdm(
            total=steps, initial=self.run.step, unit=" updates", disable=not sys.stderr.isatty(), dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {rate_fmt}{postfix}",
        )  # fmt: skip
        self.name()

    def name(self, note=""):
        names = [name for name, length in self.run.phases.items() if length]
        phase = self.run.phase
        self.bar.set_description_str(f"{phase} ({names.index(phase) + 1} of {len(names)}){note}")

    def evaluating(self, seconds):
        """The bar goes on while an evaluation lasts, twice a second at most."""
        if not self.bar.disable and time.monotonic() - self.refreshed > 0.5:
            self.refreshed = time.monotonic()
            self.name(f", evaluating for {duration(seconds)}")

    def count(self, stride):
        """After an update. The first, which is slow on a GPU, and a hundred more give the estimate of the time."""
        self.bar.update(stride)
        self.counted += stride
        if self.counted == stride:
            self.run.wait()
            self.began = time.monotonic()
        elif math.isnan(self.rate) and self.counted > 100:
            self.run.wait()
            self.rate = (self.counted - stride) / (time.monotonic() - self.began)
            left = self.seconds_left()
            self.bar.set_postfix_str(f"{duration(left)} left", refresh=False)
            self.line(f"time        about {duration(left)}, evaluations not counted")
            if self.run.args.device == "cpu" and left > 3 * 3600:
                warn(f"this takes about {duration(left)} on a CPU; --steps N is a whole run of a smaller size")

    def seconds_left(self):
        """Of the whole run; a phase that is still to come is taken to be as fast as this one."""
        run, rates, seconds, steps = self.run, self.run.rates(), 0.0, 0
        for phase in [phase for phase in run.phases if phase not in run.done]:
            steps = run.phases[phase] - (run.step if phase == run.phase else 0)
            seconds += steps / rates.get(phase, rates.get(run.phase, self.rate))
        return seconds + steps // run.args.eval_every * self.evaluation_seconds  # the last phase has evaluations

    def show(self, evaluated):
        """After a row of the log: a line if there was an evaluation; without a terminal every ten seconds too."""
        run, rows = self.run, [log.rows[-1] for log in self.run.logs]
        if evaluated:
            mean = lambda key: f"{key} {np.mean([row[key] for row in rows]):.1f}"
            self.latest = " | " + mean("return") + (f", {mean('score')}" if "score" in rows[0] else "")
        rate, left = run.rates()[run.phase], duration(self.seconds_left())
        self.bar.set_postfix_str(f"{left} left{self.latest}", refresh=False)
        self.name()
        steps, finished = run.phases[run.phase], run.phase in run.done
        if evaluated or (self.bar.disable and (finished or time.monotonic() - self.printed > 10)):
            self.printed = time.monotonic()
            losses = [f"{name} {value:.3g}" for name, value in rows[0].items() if name.endswith("_loss")]
            line = f"{run.phase} {run.step:,}/{steps:,} | {rate:.0f} updates/s, {left} left | {', '.join(losses[:4])}"
            self.line(line + self.latest)

    def line(self, text):
        """Above the bar."""
        with tqdm.external_write_mode(sys.stdout):
            print(text, flush=True)

    def close(self):
        if self.bar:
            self.bar.close()


def duration(seconds):
    """Rounded, in its natural unit: 40 s, 12 min, 5.2 h, 3.1 days."""
    if math.isnan(seconds):
        return "?"
    for unit, name in ((86400, "days"), (3600, "h")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


# Summary


def summarise(run, rows, seed):
    args, evaluated = run.args, [row for row in rows if "return" in row]
    summary = dict(script=run.script.name, env=args.env, data_path=args.data_path, seed=seed, steps=args.steps)
    for key in ("return", "score"):
        values = [row[key] for row in evaluated if key in row]
        if values:
            summary[key] = dict(last=values[-1], last_five=float(np.mean(values[-5:])), best=max(values))
    summary |= dict(evaluations=len(evaluated), episodes=args.eval_episodes, paper_score=run.published)
    summary |= dict(protocol=run.protocol, updates_per_second=run.rates())
    graphs = args.device.startswith("cuda") and args.cuda_graphs
    return summary | dict(seconds=run.seconds, device=args.device, cuda_graphs=graphs)


def print_summary(run, summaries):
    """The closing lines: last evaluation, mean of the last five, best; data and paper; speed, pictures, files."""
    for when in ("last", "last_five", "best"):
        for key, name in (("return", "return"), ("score", score_name(run.args.env))):
            values = [summary[key][when] for summary in summaries if key in summary]
            if values:
                text = f"{when.replace('_', ' '):<11} {name} {np.mean(values):.1f}"
                if len(values) > 1:
                    each = ", ".join(f"{value:.1f}" for value in values)
                    text += f" ± {np.std(values, ddof=1):.1f} over {len(values)} seeds ({each})"
                print(text)
    behavior = run.data.episode_returns
    if len(behavior):
        mean, best = np.mean(behavior), np.max(behavior)
        print(f"data        return {mean:.1f} on average over {len(behavior)} episodes, best {best:.1f}")
    if run.published is not None:
        print(f"paper       score {run.published} ({run.protocol})")
    rates = ", ".join(f"{phase} {rate:.0f}" for phase, rate in run.rates().items())
    print(f"speed       {rates} updates/s; {duration(run.seconds)} in all")
    pictures = sorted({path.name for folder in run.folders for path in folder.glob("*.png")})
    if pictures:
        print(f"pictures    {', '.join(pictures)}")
    print(f"files       {run.place}")


def across_seeds(summaries):
    """The summary of a run with several seeds: mean, standard deviation and standard error over them."""
    result = dict(summaries[0], seed=[summary["seed"] for summary in summaries])
    for key in ("return", "score"):
        found = [summary[key] for summary in summaries if key in summary]
        result.pop(key, None)
        if len(found) < len(summaries):
            continue  # not all seeds were evaluated
        result[key] = {}
        for when in found[0]:
            values = [each[when] for each in found]
            std = float(np.std(values, ddof=1))
            result[key][when] = dict(mean=np.mean(values), std=std, stderr=std / len(values) ** 0.5, seeds=values)
    return result


# Pictures


def draw_curve(path, rows_of_seeds, run, who):
    """Score over updates, with the data's and the paper's level, beside the losses; all phases on one axis."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(f"{run.script.stem} on {run.root.resolve().name}, {who}", parse_math=False)
    left, right = figure.subplots(1, 2)
    key = "score" if any("score" in row for row in rows_of_seeds[0]) else "return"
    curves = [{row["total"]: (row[key], row[f"{key}_std"]) for row in rows if key in row} for rows in rows_of_seeds]
    total = sorted(set.intersection(*map(set, curves)))  # seeds may have gone on alone for a while
    if not total:
        return
    values, spread = np.array([[curve[at] for at in total] for curve in curves]).reshape(-1, len(total), 2).T
    mean, band, over = values.mean(1), spread[:, 0], "episodes"
    if len(curves) > 1:
        band, over = values.std(1, ddof=1), "seeds"
        left.plot(total, values, color="C0", alpha=0.3)
    left.plot(total, mean, ".-", color="C0", label="mean of the seeds" if len(curves) > 1 else "policy")
    left.fill_between(total, mean - band, mean + band, color="C0", alpha=0.2, label=f"± one deviation over {over}")
    if len(run.data.episode_returns):
        behavior = run.data.episode_returns if key == "return" else score(run.args.env, run.data.episode_returns)
        left.axhline(np.mean(behavior), color="grey", linestyle="--", label="mean of the data")
    if run.published is not None and key == "score":
        left.axhline(float(str(run.published).split()[0]), color="C3", linestyle=":", label="paper")
    left.set(title=score_name(run.args.env) if key == "score" else key)
    for name in dict.fromkeys(name for row in rows_of_seeds[0] for name in row if name.endswith("_loss")):
        right.plot(*zip(*[(row["total"], row[name]) for row in rows_of_seeds[0] if name in row]), label=name)
    right.set(title="losses", yscale="symlog")
    ends = np.cumsum([run.phases[phase] for phase in run.phases])
    for axes in (left, right):
        axes.set(xlabel=f"updates ({', then '.join(run.phases)})", xlim=(0, run.total))
        axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))
        for end in ends[:-1]:
            axes.axvline(end, color="black", linewidth=0.5)
    figure.savefig(path, dpi=100)


def draw_bandit(path, learner, run, seed):
    """The data of a 2-D scene, coloured by reward, and 1,000 actions of the policy."""
    act, obs = policy_of(learner), np.zeros((50, run.data.obs_dim), np.float32)
    action = np.concatenate([act(obs) for _ in range(20)])
    own = {name: value for name, value in vars(run.args).items() if not hasattr(RunArgs, name)}
    changed = ", ".join(f"{name} {value}" for name, value in own.items() if value != getattr(type(run.args), name))
    title = f"{run.script.stem} on {run.args.env}, seed {seed}\n{textwrap.fill(changed, 70)}"

    def draw(axes):
        points = axes.scatter(*run.data.action.cpu().T, c=run.data.reward.cpu(), s=2, cmap="viridis")
        axes.figure.colorbar(points, label="reward", shrink=0.7)
        axes.scatter(*action.T, c="red", s=2)
        axes.set(aspect="equal", xlabel="actions of the data, coloured; of the policy, red")
        axes.set_title(title, fontsize=8)

    save_figure(path, draw, size=6)


def save_figure(path, *draw, size=4.5):
    """A PNG with one square panel for each function in `draw`, which is given its axes."""
    figure = Figure(figsize=(size * len(draw), size), layout="constrained")
    axes = figure.subplots(1, len(draw), squeeze=False)
    for panel, function in zip(axes[0], draw):
        function(panel)
    figure.savefig(path, dpi=100, bbox_inches="tight")  # equal axes would else lose their titles
