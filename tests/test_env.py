"""Environments, scores and evaluation of common.py."""

import dataclasses
import json
import random
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from gymnasium import spaces

import common

ROOT = Path(common.__file__).parent


class Counter(gymnasium.Env):
    """Runs `length` steps of reward `reward`; the observation is [name, steps so far]."""

    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def __init__(self, name, length, reward, truncate=False):
        self.name, self.length, self.reward, self.truncate = name, length, reward, truncate
        self.seeds = []

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.count = 0
        return np.array([self.name, 0], np.float32), {}

    def step(self, action):
        assert self.count < self.length, "stepped after the end"
        self.count += 1
        end = self.count == self.length
        return np.array([self.name, self.count], np.float32), self.reward, end and not self.truncate, end, {}


def random_policy(action_dim, seed=0):
    rng = np.random.default_rng(seed)
    return lambda obs: rng.uniform(-1, 1, (len(obs), action_dim)).astype(np.float32)


# make_env


@pytest.mark.parametrize(
    "name, gym_id",
    [
        ("hopper-medium-v2", "Hopper-v4"),
        ("walker2d-medium-expert-v2", "Walker2d-v4"),
        ("halfcheetah-demo-expert", "HalfCheetah-v4"),
        ("pendulum-demo-medium", "Pendulum-v1"),
        ("Hopper-v5", "Hopper-v5"),
    ],
)
def test_environment_and_spaces(name, gym_id):
    env = common.make_env(name)
    raw = gymnasium.spec(gym_id)
    assert env.spec.id == gym_id
    assert env.spec.max_episode_steps == raw.max_episode_steps
    obs, _ = env.reset(seed=0)
    assert obs.dtype == np.float32 and env.observation_space.contains(obs)
    assert np.all(env.action_space.high == 1) and np.all(env.action_space.low == -1)


def test_no_noise(tmp_path):
    """Neither warnings nor output nor MuJoCo's log file, though HalfCheetah's model gives a notice since 3.16."""
    code = (
        "import common, numpy as np\n"
        "for name in ('hopper-medium-v2', 'halfcheetah-medium-v2', 'walker2d-medium-v2', 'antmaze-umaze-v2'):\n"
        "    env = common.make_env(name)\n"
        "    env.reset(seed=0)\n"
        "    env.step(np.zeros(env.action_space.shape))\n"
        "    env.close()\n"
    )
    path = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_other_mujoco_warnings_become_python_warnings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = common.make_env("hopper-medium-v2")
    env.reset(seed=0)
    env.unwrapped.data.qpos[0] = np.nan
    with pytest.warns(UserWarning, match="MuJoCo: Nan"):
        env.step(np.zeros(3))
    assert list(tmp_path.iterdir()) == []


def test_margins_of_contacts_are_those_of_the_recordings():
    env = common.make_env("hopper-medium-v2").unwrapped
    plain = gymnasium.make(gymnasium.registry["Hopper-v4"]).unwrapped
    new = common.MUJOCO_VERSION >= (3, 5)
    np.testing.assert_allclose(env.model.geom_margin, plain.model.geom_margin * (0.5 if new else 1))
    assert np.all(plain.model.geom_margin > 0)
    gap = 0.0
    for seed in range(20):  # the foot is near the floor in a resting pose, where the margin matters
        for one in (env, plain):
            one.reset(seed=seed)
            for _ in range(20):
                one.step(np.zeros(3))
        gap = max(gap, np.abs(env.data.qvel - plain.data.qvel).max())
    assert (gap > 1e-6) == new


def test_gymnasium_ids_are_left_as_they_are():
    model = common.make_env("Hopper-v4").unwrapped.model
    np.testing.assert_allclose(model.geom_margin, 0.001)


def test_mixed_margins_are_left_alone():
    env = gymnasium.make(gymnasium.registry["Hopper-v4"])
    env.unwrapped.model.geom_margin[0] = 0
    before = env.unwrapped.model.geom_margin.copy()
    common.restore_margins(env)
    np.testing.assert_array_equal(env.unwrapped.model.geom_margin, before)


def test_actions_are_stretched_and_clipped():
    env, raw = common.make_env("pendulum-demo-medium"), gymnasium.make("Pendulum-v1")
    assert env.original_action_space == raw.action_space
    env.reset(seed=3)
    raw.reset(seed=3)
    for action, torque in ((0.25, 0.5), (-1.0, -2.0), (7.0, 2.0)):
        obs, reward, *_ = env.step(np.array([action], np.float32))
        raw_obs, raw_reward, *_ = raw.step(np.array([torque], np.float32))
        assert reward == raw_reward
        np.testing.assert_array_equal(obs, raw_obs)


def test_control_cost_sees_the_clipped_action():
    rewards = []
    for action in (1.0, 5.0):
        env = common.make_env("hopper-medium-v2")
        env.reset(seed=0)
        rewards.append(env.step(np.full(3, action))[1])
    assert rewards[0] == rewards[1]


@pytest.mark.parametrize("name", common.DATASETS)
def test_every_d4rl_name_has_an_environment_and_a_score(name):
    assert common.score(name, 0.0) is not None
    if name.startswith(("pen", "kitchen")):
        pytest.importorskip("gymnasium_robotics")
        if name.startswith("kitchen") and common.MUJOCO_VERSION >= (3, 12):
            pytest.skip("the kitchen needs mujoco < 3.12")
    common.make_env(name).close()


@pytest.mark.parametrize(
    "name, words",
    [
        ("hoper-medium-v2", "hopper-medium-v2"),
        ("Hopper-medium-v2", "hopper-medium-v2"),
        ("hopper-medium-v0", "hopper-medium-v2"),
        ("Hoper-v4", "Hopper-v4"),
        ("qqqqqqqq", "unknown environment 'qqqqqqqq'"),
        ("CartPole-v1", "only continuous actions"),
        ("Hopper-v2", "cannot be made here"),
    ],
)
def test_wrong_names(name, words):
    with pytest.raises(common.UserError) as caught:
        common.make_env(name)
    assert words in str(caught.value) and "\n" not in str(caught.value) and caught.value.code == 2


class Endless(gymnasium.Env):
    """Never ends by itself."""

    def __init__(self, render_mode=None):
        pass

    action_space = observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 1.0, False, False, {}


def test_a_missing_time_limit_is_added(monkeypatch):
    spec = gymnasium.envs.registration.EnvSpec("Endless-v0", Endless)
    monkeypatch.setitem(gymnasium.registry, "Endless-v0", spec)
    for given, limit in (({}, 1000), ({"max_episode_steps": 30}, 30)):
        env = common.make_env("Endless-v0", **given)
        assert env.assumed_limit == limit
        assert common.evaluate(lambda obs: np.zeros((len(obs), 2)), [env], seed=0) == [limit]
    monkeypatch.setitem(gymnasium.registry, "Endless-v0", dataclasses.replace(spec, max_episode_steps=7))
    env = common.make_env("Endless-v0", max_episode_steps=30)  # its own limit stays
    assert env.assumed_limit is None and env.spec.max_episode_steps == 7


# Environments of the user's own


class Own(gymnasium.Env):
    """Spaces as given; pays minus the sum of the squared action that arrives; never ends."""

    def __init__(self, obs=None, act=None):
        self.observation_space = obs or spaces.Box(-1, 1, (3,))
        self.action_space = act or spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.action = action
        return self.observation_space.sample(), -float(np.sum(np.square(action))), False, False, {}


def own(monkeypatch, entry_point=Own, **kwargs):
    spec = gymnasium.envs.registration.EnvSpec("Own-v0", entry_point, max_episode_steps=5, kwargs=kwargs)
    monkeypatch.setitem(gymnasium.registry, "Own-v0", spec)
    return "Own-v0"


def test_whatever_gymnasium_makes(tmp_path, monkeypatch):
    code = "import gymnasium\ngymnasium.register('lab/Mine-v3', 'gymnasium.envs.classic_control:PendulumEnv', 30)\n"
    (tmp_path / "my_module.py").write_text(code)
    (tmp_path / "bad_module.py").write_text("1 / 0")
    (tmp_path / "no_licence.py").write_text("import sys\nsys.exit(0)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(gymnasium.envs.registration, "registry", registry := dict(gymnasium.registry))
    monkeypatch.setattr(gymnasium, "registry", registry)
    name = "my_module:lab/Mine-v3"
    assert not common.is_minari(name) and common.score(name, 1.0) is None
    raw = dict(observations=np.zeros((9, 3)), actions=np.ones((9, 1)), rewards=np.ones(9), terminals=np.ones(9))
    np.savez(tmp_path / "x.npz", **raw)
    data = common.load_dataset(name, str(tmp_path / "x.npz"))
    assert data.action[0] == 0.5 and data.make_env().spec.id == "lab/Mine-v3"
    with pytest.warns(UserWarning, match="latest versioned"):
        assert common.make_env("Pendulum").spec.id == "Pendulum-v1"
    for env, words in (
        ("no_module:Mine-v0", "cannot be made here: ModuleNotFoundError: No module named 'no_module' .install"),
        ("bad_module:Mine-v0", "bad_module:Mine-v0 cannot be made here: ZeroDivisionError: division by zero"),
        ("no_licence:Mine-v0", "no_licence:Mine-v0 cannot be made here: SystemExit: 0"),
        ("my_module:Other-v0", "unknown environment 'my_module:Other-v0'"),
        ("a:b:c", "a:b:c cannot be made here"),
    ):
        with pytest.raises(common.UserError, match=words):
            common.make_env(env)
        with pytest.raises(common.UserError, match="is an environment, not a dataset"):
            common.load_dataset(env)


@pytest.mark.parametrize(
    "act, low, high",
    [
        (spaces.Box(0, 100, (2,)), [0, 0], [100, 100]),
        (spaces.Box(np.array([-1, 0]), np.array([1, 5]), dtype=np.float64), [-1, 0], [1, 5]),
        (spaces.Box(np.float32([-1, 3]), np.float32([1, 3])), [-1, 3], [1, 3]),  # no choice in the second
        (spaces.Box(-2, 2, (2, 2)), np.full((2, 2), -2), np.full((2, 2), 2)),
        (spaces.Box(-2, 2, ()), -2, 2),
    ],
)
def test_boxes_of_actions(monkeypatch, act, low, high):
    env = common.make_env(own(monkeypatch, act=act))
    env.reset(seed=0)
    for value, expected in ((-1, low), (1, high), (-9, low)):
        env.step(np.full(env.action_space.shape, value, np.float32))
        np.testing.assert_array_equal(env.unwrapped.action, expected)
        assert env.unwrapped.action.shape == act.shape
    assert env.action_space.shape == (act.low.size,)


@pytest.mark.parametrize(
    "obs, size",
    [
        (spaces.Dict(b=spaces.Box(-1, 1, (2,)), a=spaces.Box(-1, 1, (1,))), 3),
        (spaces.Tuple((spaces.Box(-1, 1, (2,)), spaces.Discrete(3))), 5),
        (spaces.Discrete(5), 5),
        (spaces.MultiBinary(4), 4),
        (spaces.Box(-1, 1, ()), 1),
        (spaces.Box(-1, 1, (2, 2), np.float64), 4),
        (spaces.Box(0, 9, (4,), np.int64), 4),
    ],
)
def test_observations_become_vectors(monkeypatch, obs, size):
    env = common.make_env(own(monkeypatch, obs=obs))
    for value in (env.reset(seed=0)[0], env.step(np.zeros(2))[0]):
        assert value.shape == (size,) == env.observation_space.shape and value.dtype == np.float32
    values = [env.unwrapped.observation_space.sample() for _ in range(3)]  # the reader of Minari data agrees
    steps = values if isinstance(obs, spaces.Discrete) else stack(values)
    expected = [spaces.flatten(obs, value) for value in values]
    np.testing.assert_array_equal(common.flatten(obs, steps), np.float32(expected))


@pytest.mark.parametrize(
    "kinds, words",
    [
        (dict(obs=spaces.Box(0, 255, (8, 8, 3), np.uint8)), r"images as observations, \(8, 8, 3\)"),
        (dict(obs=spaces.Dict(a=spaces.Box(0, 255, (8, 8), np.uint8))), r"images as observations, \(8, 8\)"),
        (dict(obs=spaces.Tuple((spaces.Text(5),))), r"observations of the kind Text"),
        (dict(obs=spaces.Sequence(spaces.Discrete(2))), "observations of the kind Sequence"),
        (dict(act=spaces.Discrete(3)), r"action space Discrete\(3\); only continuous"),
        (dict(act=spaces.Box(0, 9, (2,), np.int64)), "action space Box.*int64.; only continuous"),
        (dict(act=spaces.Dict(a=spaces.Box(-1, 1, (2,)))), "action space Dict.*; only continuous"),
        (dict(act=spaces.Box(-np.inf, np.inf, (2,))), "only bounded actions"),
        (dict(act=spaces.Box(-1, np.inf, (2,))), "only bounded actions"),
        (dict(act=spaces.Box(-3e38, 3e38, (2,))), "only bounded actions"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*precision lowered")
def test_spaces_that_do_not_fit(monkeypatch, kinds, words):
    with pytest.raises(common.UserError, match=f"Own-v0 has.*{words}") as caught:
        common.make_env(own(monkeypatch, **kinds))
    assert "\n" not in str(caught.value)
    if "bounded" not in words:  # nor without evaluations
        with pytest.raises(common.UserError, match=words + ".*(take vectors|work here)$"):
            common.judge_spaces("Own-v0", needed=False)


@pytest.mark.parametrize(
    "reward, flag",
    [
        (np.array([1.0]), np.array([False])),
        (torch.tensor(1.0), torch.tensor(False)),
        (torch.ones(1, 1), np.bool_(False)),
        (np.float64(1), 0),
        (1, np.array(False)),
    ],
)
def test_numbers_in_arrays_and_tensors(monkeypatch, reward, flag):
    class Odd(Own):
        def step(self, action):
            return torch.zeros(3), reward, flag, flag, {}

    env = common.make_env(own(monkeypatch, Odd))
    env.reset(seed=0)
    obs, *rest, _ = env.step(np.zeros(2))
    assert obs.dtype == np.float32 and rest == [1.0, False, False] and [type(x) for x in rest] == [float, bool, bool]
    assert common.evaluate(lambda obs: np.zeros((len(obs), 2)), [env], seed=0) == [5]


def method(name, function):
    return type("Odd", (Own,), {name: function})


@pytest.mark.parametrize(
    "cls, words",
    [
        (method("reset", lambda self: (np.zeros(3), {})), "reset: TypeError: .*'seed'"),
        (method("reset", lambda self, seed=None, options=None: np.zeros(3)), "reset: ValueError: too many values"),
        (method("reset", lambda self, seed=None, options=None: (np.zeros(4), {})), "4 numbers in an observation of"),
        (method("step", lambda self, a: (np.zeros(3), 1.0, False, {})), "step: ValueError: not enough values"),
        (method("step", lambda self, a: (np.zeros(3), np.ones(2), False, False, {})), "step: ValueError: can only"),
        (method("step", lambda self, a: (np.zeros(3), None, False, False, {})), "step: TypeError: float"),
        (method("step", lambda self, a: 1 / 0), "step: ZeroDivisionError: division by zero"),
        (method("step", lambda self, a: sys.exit(0)), "step: SystemExit: 0"),
    ],
)
def test_rules_of_gymnasium(monkeypatch, cls, words):
    """Known before the training, and in one sentence."""
    with pytest.raises(common.UserError, match=f"Own-v0 failed in .*{words}") as caught:
        common.judge_spaces(own(monkeypatch, cls))
    text = str(caught.value)
    assert "\n" not in text and "--eval-episodes 0" in text
    assert ("Gymnasium's rules?" in text) == ("Zero" not in text and "Exit" not in text)
    assert common.judge_spaces("Own-v0", needed=False) == (None, None, None)


@pytest.mark.parametrize(
    "constructor, words",
    [
        (lambda self: None, "cannot be made here: AttributeError: 'Odd' object has no attribute 'action_space'"),
        (lambda self: sys.exit("no licence"), "cannot be made here: SystemExit: no licence"),
        (lambda self: Own.__init__(self, {"a": spaces.Box(-1, 1)}), "has a space of builtins.dict, not of gymnasium"),
        (lambda self: Own.__init__(self, act=types.SimpleNamespace()), "has a space of types.SimpleNamespace, not of"),
    ],
)
def test_constructors_that_break_the_rules(monkeypatch, constructor, words):
    with pytest.raises(common.UserError, match=f"Own-v0 {words}.*--eval-episodes 0") as caught:
        common.judge_spaces(own(monkeypatch, method("__init__", constructor)))
    assert "\n" not in str(caught.value)
    assert common.judge_spaces("Own-v0", needed=False) == (None, None, None)


class Difficult(Own):
    """Seeds an old random generator; has a window to close that was never opened."""

    def reset(self, *, seed=None, options=None):
        np.random.RandomState(seed)
        return super().reset(seed=seed)

    def close(self):
        self.window.close()


def test_a_date_as_seed_and_a_close_that_fails(monkeypatch):
    with common.make_env(own(monkeypatch, Difficult)) as env:
        env.reset(seed=common.evaluation_seed(20261130))
    assert common.evaluation_seed(3) == 3100


def test_no_render_mode(monkeypatch):
    name = own(monkeypatch)  # its constructor takes none
    with pytest.raises(common.UserError, match="Own-v0 cannot be made here: TypeError: .*'render_mode'"):
        common.make_env(name, render_mode="rgb_array")


# AntMaze


def test_antmaze_model():
    margins = {}
    for maze, walls in (("umaze", 18), ("medium-play", 38), ("large-diverse", 62)):
        env = common.make_env(f"antmaze-{maze}-v2").unwrapped
        model = env.model
        assert model.opt.timestep == 0.02 and env.frame_skip == 5
        assert np.all(model.actuator_gear[:, 0] == 30)
        boxes = model.geom_type == mujoco.mjtGeom.mjGEOM_BOX
        assert boxes.sum() == walls
        np.testing.assert_allclose(model.geom_friction[boxes], [[1, 0.5, 0.5]] * walls)
        np.testing.assert_allclose(model.geom_solref, [[0.02, 1]] * model.ngeom)
        np.testing.assert_allclose(model.geom_solimp[:, :3], [[0.8, 0.8, 0.01]] * model.ngeom)
        margins[maze] = model.geom_margin.max()
    assert set(margins.values()) == {0.005 if common.MUJOCO_VERSION >= (3, 5) else 0.01}


def test_antmaze_walls_leave_start_and_goal_free():
    for maze, (walls, (row, col)) in common.MAZES.items():
        assert walls[1][1] == "0" and walls[row][col] == "0", maze
        boxes = common.AntMaze(maze).model
        centers = boxes.geom_pos[boxes.geom_type == mujoco.mjtGeom.mjGEOM_BOX][:, :2]
        goal = common.AntMaze(maze).goal_cell
        assert np.abs(centers - goal).max(axis=1).min() == 4  # a wall beside the goal, none on it


def test_maps_are_those_of_gymnasium_robotics():
    pytest.importorskip("gymnasium_robotics")
    from gymnasium_robotics.envs.maze import maps

    for maze, cells in (("umaze", maps.U_MAZE), ("medium", maps.MEDIUM_MAZE), ("large", maps.LARGE_MAZE)):
        assert [[int(cell) for cell in row] for row in common.MAZES[maze][0]] == cells


@pytest.mark.parametrize("name, center", [("umaze", (0, 8)), ("medium-play", (20, 20)), ("large-play", (32, 24))])
def test_antmaze_start_and_goal(name, center):
    env = common.make_env(f"antmaze-{name}-v0")
    goals, starts = [], []
    for seed in range(300):
        obs, _ = env.reset(seed=seed)
        starts.append(obs)
        goals.append(env.unwrapped.goal - center)
    starts, goals = np.array(starts), np.array(goals)
    rest = np.array([0, 0, 0.75, 1] + [0] * 11)
    assert starts.shape == (300, 29)
    assert np.abs(starts[:, :15] - rest).max() <= 0.1 + 1e-6 and np.abs(starts[:, :15] - rest).max() > 0.099
    assert abs(starts[:, 15:].std() - 0.1) < 0.005  # standard error 0.001
    assert goals.min() >= 0 and goals.max() <= 1.5 and goals.max() > 1.3
    assert np.abs(goals.mean(axis=0) - 0.75).max() < 0.1  # standard error 0.019


def test_antmaze_reward_end_and_horizon():
    env = common.make_env("antmaze-umaze-v2")
    env.reset(seed=0)
    inner = env.unwrapped
    for distance, success in ((0.7, False), (0.3, True)):
        inner.data.qpos[:2] = inner.goal - [0, distance]
        inner.data.qvel[:] = 0
        _, reward, terminated, truncated, _ = env.step(np.zeros(8))
        assert (reward, terminated, truncated) == (float(success), success, False)
    env.reset(seed=0)
    for step in range(700):
        _, _, terminated, truncated, _ = env.step(np.zeros(8))
        assert (terminated, truncated) == (False, step == 699)
    assert common.make_env("antmaze-umaze-diverse-v0").spec.max_episode_steps == 700
    assert common.make_env("antmaze-medium-play-v2").spec.max_episode_steps == 1000


# Optional packages


@pytest.mark.parametrize("name", ["pen-human-v1", "kitchen-mixed-v0"])
def test_missing_gymnasium_robotics(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    with pytest.raises(common.UserError, match="pip install gymnasium-robotics"):
        common.make_env(name)


def test_kitchen_on_new_mujoco(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", types.ModuleType("gymnasium_robotics"))
    monkeypatch.setattr(common, "MUJOCO_VERSION", (3, 12))
    with pytest.raises(common.UserError, match="kitchen-mixed-v0 needs mujoco < 3.12"):
        common.make_env("kitchen-mixed-v0")


def test_pen_ends_when_dropped():
    class Falling(gymnasium.Env):
        action_space = observation_space = spaces.Box(-1.0, 1.0, (45,))
        heights = iter([0.2, 0.075, 0.0749])

        def step(self, action):
            obs = np.zeros(45)
            obs[26] = next(self.heights)
            return obs, 0.0, False, False, {}

    env = common.PenDrop(Falling())
    assert [env.step(None)[2] for _ in range(3)] == [False, False, True]


def test_pen():
    pytest.importorskip("gymnasium_robotics")
    env = common.make_env("pen-human-v1")
    obs, _ = env.reset(seed=0)
    assert obs.shape == (45,) and env.action_space.shape == (24,) and env.spec.max_episode_steps == 100
    assert abs(obs[26] - env.unwrapped.data.xpos[env.unwrapped.obj_body_id][2]) < 1e-6


def test_kitchen():
    pytest.importorskip("gymnasium_robotics")
    if common.MUJOCO_VERSION >= (3, 12):
        pytest.skip("the kitchen needs mujoco < 3.12")
    env = common.make_env("kitchen-mixed-v0")
    obs, _ = env.reset(seed=0)
    data = env.unwrapped.data
    assert obs.shape == (60,) and env.action_space.shape == (9,) and env.spec.max_episode_steps == 280
    assert np.abs(obs[:30] - data.qpos[:30]).max() < 0.02  # the noise is at most 0.01
    asked = [11, 12, 17, 18, 22, *range(23, 30)]  # bottom burner, light switch, microwave, kettle
    assert set(np.flatnonzero(obs[30:])) <= set(asked) and obs[30 + 22] == -0.75
    data.qpos[22] = -0.75  # open the microwave
    _, reward, terminated, _, _ = env.step(np.zeros(9))
    _, again, *_ = env.step(np.zeros(9))
    assert (reward, terminated, again) == (1, False, 0)


# Minari


def stack(values):
    """Observations, perhaps nested dicts and tuples of arrays, with time as their first axis."""
    if isinstance(values[0], dict):
        return {key: stack([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], tuple):
        return tuple(stack(value) for value in zip(*values))
    return np.stack(values)


@pytest.fixture
def minari_set(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))

    def create(name, env, eval_env=None, **metadata):
        observations = [env.reset(seed=0)[0]]
        actions = [env.action_space.sample() for _ in range(3)]
        observations += [env.step(action)[0] for action in actions]
        buffer = minari.data_collector.EpisodeBuffer(
            id=0,
            observations=stack(observations),
            actions=np.stack(actions),
            rewards=[0.0] * 3,
            terminations=[False] * 3,
            truncations=[False, False, True],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no author, no licence
            minari.create_dataset_from_buffers(name, [buffer], env=env, eval_env=eval_env, **metadata)

    return create


def test_minari_environment_is_the_stored_one(minari_set):
    judge = gymnasium.make("Pendulum-v1", g=4.0, max_episode_steps=77)
    minari_set("own/pendulum-v0", gymnasium.make("Pendulum-v1"), judge, requirements=["mujoco==0.0.1", "absent==1"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = common.make_env("own/pendulum-v0")
    assert env.unwrapped.g == 4.0 and env.spec.max_episode_steps == 77
    assert env.original_action_space.high[0] == 2
    assert common.score("own/pendulum-v0", [0.0]) is None


def test_minari_reference_scores(minari_set):
    minari_set("own/pendulum-v1", gymnasium.make("Pendulum-v1"), ref_min_score="-1200", ref_max_score=-200.0)
    np.testing.assert_allclose(common.score("own/pendulum-v1", [-1200, -700, -200]), [0, 50, 100])
    minari_set("own/pendulum-v2", gymnasium.make("Pendulum-v1"), ref_min_score=-3.0, ref_max_score=-3.0)
    assert common.score("own/pendulum-v2", -3.0) is None  # no scale
    minari_set("own/pendulum-v3", gymnasium.make("Pendulum-v1"), ref_min_score="low", ref_max_score=1.0)
    with pytest.raises(common.RunError, match="own/pendulum-v3.*'low'"):
        common.score("own/pendulum-v3", 0.0)


def test_minari_absent(tmp_path, monkeypatch):
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(common.UserError, match="'mujoco/hopper/expert-v0' cannot be opened"):
        common.make_env("mujoco/hopper/expert-v0")


def record(env_id="Pendulum-v1", obs=None, act=None, **edits):
    """A set of one episode, without environment if `env_id` is None; `edits` of the recorded environment's spec."""
    minari = pytest.importorskip("minari")
    obs, act = obs or spaces.Box(-8, 8, (3,)), act or spaces.Box(-2, 2, (1,))
    buffer = minari.data_collector.EpisodeBuffer(
        id=0,
        observations=stack([obs.sample() for _ in range(5)]),
        actions=np.stack([act.sample() for _ in range(4)]),
        rewards=[1.0] * 4,
        terminations=[False] * 4,
        truncations=[False, False, False, True],
    )
    env = dict(env=gymnasium.spec(env_id)) if env_id else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers("own/odd-v0", [buffer], observation_space=obs, action_space=act, **env)
    file = common.minari_folder("own/odd-v0") / "data" / "metadata.json"
    metadata = json.loads(file.read_text())
    if edits:
        metadata["env_spec"] = json.dumps(json.loads(metadata["env_spec"]) | edits)
        file.write_text(json.dumps(metadata))
    return file.parent.parent


@pytest.mark.parametrize(
    "edits, words",
    [
        (dict(entry_point="my_lab:Robot"), "Pendulum-v1, cannot be made here .ModuleNotFoundError: .*'my_lab'"),
        (dict(entry_point="gymnasium.envs.classic_control:No"), "cannot be made here .AttributeError: .*'No'"),
        (dict(kwargs=dict(no=3)), "cannot be made here .TypeError: .*'no'"),
        (
            dict(additional_wrappers=[dict(name="Monitor", entry_point="lab.monitor:Monitor", kwargs=None)]),
            "cannot be made here .ValueError: Monitor wrapper",
        ),
        (
            dict(additional_wrappers=[dict(name="Monitor", entry_point="my_lab.monitor:Monitor", kwargs={})]),
            "cannot be made here .ModuleNotFoundError: No module named 'my_lab'",
        ),
        (None, "does not say which environment"),
    ],
)
def test_minari_sets_whose_environment_is_not_here(tmp_path, monkeypatch, edits, words):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    folder = record("Pendulum-v1" if edits else None, **edits or {})
    with pytest.raises(common.UserError, match=f"'own/odd-v0'.*{words}") as caught:
        common.load_dataset("own/odd-v0")
    message = str(caught.value)
    assert f"--env ID --data-path {folder}" in message and "--eval-episodes 0" in message and "\n" not in message
    alone = common.load_dataset("own/odd-v0", judge=False)  # the box of actions is the set's own
    beside = common.load_dataset("Pendulum-v1", str(folder))
    assert torch.equal(alone.rows, beside.rows) and len(alone) == 4
    assert beside.make_env().spec.id == "Pendulum-v1"


def test_minari_sets_of_other_kinds(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    wide = spaces.Box(-20, 20, (1,))
    for kinds, words in (
        (dict(obs=spaces.Box(0, 255, (16, 16, 3), np.uint8)), "own/odd-v0 has images as observations, .16, 16, 3."),
        (dict(act=spaces.Discrete(3)), "own/odd-v0 has the action space Discrete.3."),
        (dict(act=wide), "actions must be in .-2, 2."),
    ):
        folder = record(**kinds)
        with pytest.raises(common.UserError, match=words):
            common.load_dataset("own/odd-v0")
        if kinds.get("act") is not wide:
            with pytest.raises(common.UserError, match=words):
                common.load_dataset("own/odd-v0", judge=False)
        shutil.rmtree(folder)
    record(act=wide)
    data = common.load_dataset("own/odd-v0", judge=False)
    assert data.action.abs().max() <= 1
    shutil.rmtree(folder)
    mixed = spaces.Dict(a=spaces.Tuple((spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (1,)))), mode=spaces.Discrete(3))
    record(None, obs=mixed)
    data = common.load_dataset("own/odd-v0", judge=False)
    assert data.obs_dim == 6 and torch.all(data.obs[:, 3:].sum(1) == 1)
    (folder / "data" / "metadata.json").write_text("{")
    with pytest.raises(common.RunError, match="'own/odd-v0' cannot be opened .JSONDecodeError") as caught:
        common.load_dataset("own/odd-v0")
    assert "force_download" not in str(caught.value)  # which would delete a set that is no download


def test_minari_antmaze_ends_at_the_goal(minari_set):
    robotics = pytest.importorskip("gymnasium_robotics")
    gymnasium.register_envs(robotics)
    spec = gymnasium.registry["AntMaze_UMaze-v4"]
    minari_set("D4RL/antmaze/umaze-v1", gymnasium.make(spec, continuing_task=True, disable_env_checker=True))
    env = common.make_env("D4RL/antmaze/umaze-v1")
    obs, _ = env.reset(seed=0)
    assert obs.shape == (31,)  # achieved goal, desired goal, observation
    inner = env.unwrapped
    np.testing.assert_allclose(obs[2:4], inner.goal, rtol=1e-6)
    inner.data.qpos[:2] = inner.goal
    _, reward, terminated, _, _ = env.step(np.zeros(8))
    assert (reward, terminated) == (1, True)
    assert common.score("D4RL/antmaze/umaze-v1", reward) == 100


def test_minari_pointmaze_has_a_time_limit(minari_set):
    robotics = pytest.importorskip("gymnasium_robotics")
    gymnasium.register_envs(robotics)
    minari_set("D4RL/pointmaze/umaze-v2", gymnasium.make("PointMaze_UMaze-v3", max_episode_steps=1_000_000))
    assert common.make_env("D4RL/pointmaze/umaze-v2").spec.max_episode_steps == 300


def test_minari_kitchen_pays_once_per_subtask(minari_set):
    robotics = pytest.importorskip("gymnasium_robotics")
    if common.MUJOCO_VERSION >= (3, 12):
        pytest.skip("the kitchen needs mujoco < 3.12")
    gymnasium.register_envs(robotics)
    flags = {"remove_task_when_completed": False, "terminate_on_tasks_completed": False, "disable_env_checker": True}
    tasks = ["microwave", "kettle", "bottom burner", "light switch"]
    minari_set("D4RL/kitchen/mixed-v2", gymnasium.make("FrankaKitchen-v1", tasks_to_complete=tasks, **flags))
    env = common.make_env("D4RL/kitchen/mixed-v2")
    env.reset(seed=0)
    env.unwrapped.data.qpos[22] = -0.75  # open the microwave
    assert [env.step(np.zeros(9))[1] for _ in range(2)] == [1, 0]
    assert common.score("D4RL/kitchen/mixed-v2", 1) == 25


# Bandit


def test_bandit():
    env = common.Bandit(lambda action: action[:, 0] + 10 * action[:, 1], max_action=4.0)
    obs, _ = env.reset(seed=0)
    assert obs.shape == (1,) and obs[0] == 0
    assert env.action_space.high.tolist() == [4, 4] and env.original_action_space == env.action_space
    _, reward, terminated, truncated, _ = env.step(np.array([3.0, -2.0]))
    assert (reward, terminated, truncated) == (-17, True, False)
    returns = common.evaluate(lambda obs: np.full((len(obs), 2), 0.5), [env] * 3, seed=0)
    np.testing.assert_allclose(returns, [5.5] * 3)


# score


@pytest.mark.parametrize(
    "name, raw, expected",
    [
        ("halfcheetah-medium-v2", 7392.4, 61.8),
        ("halfcheetah-demo-expert", 7392.4, 61.8),
        ("HalfCheetah-v4", 7392.4, 61.8),
        ("hopper-expert-v2", 3237.6, 100.1),
        ("Hopper-v5", 3237.6, 100.1),
        ("walker2d-medium-v2", 4592.3, 100.0),
        ("pen-human-v1", 96.262799, 0.0),
        ("antmaze-umaze-v2", 0.37, 37.0),
        ("kitchen-mixed-v0", 1.0, 25.0),
    ],
)
def test_score(name, raw, expected):
    assert round(float(common.score(name, raw)), 1) == expected
    np.testing.assert_allclose(common.score(name, [raw, raw]), [common.score(name, raw)] * 2)


@pytest.mark.parametrize("name", ["pendulum-demo-medium", "Pendulum-v1", "Ant-v4", "bandit"])
def test_no_reference(name):
    assert common.score(name, [1.0]) is None


# evaluate


def test_each_environment_counts_once():
    envs = [Counter(0, 3, 1.0), Counter(1, 1, 10.0), Counter(2, 5, 0.5, truncate=True)]
    seen = []

    def act(obs):
        seen.append(obs.copy())
        return np.zeros((len(obs), 2))

    np.testing.assert_allclose(common.evaluate(act, envs, seed=7), [3.0, 10.0, 2.5])
    assert [env.seeds for env in envs] == [[7], [8], [9]]
    assert [obs[:, 0].tolist() for obs in seen] == [[0, 1, 2], [0, 2], [0, 2], [2], [2]]
    assert [obs[:, 1].tolist() for obs in seen] == [[0, 0, 0], [1, 1], [2, 2], [3], [4]]
    assert all(obs.dtype == np.float32 for obs in seen)


def test_signals_are_looked_for_before_every_reset_and_step():
    ticks, envs = [], [Counter(0, 3, 1.0), Counter(1, 1, 10.0)]
    tick = lambda: ticks.append((len(envs[0].seeds) + len(envs[1].seeds), sum(getattr(e, "count", 0) for e in envs)))
    common.evaluate(lambda obs: np.zeros((len(obs), 2)), envs, 0, tick)
    assert ticks == [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (2, 3)]


def test_same_seed_same_returns():
    envs = [common.make_env("pendulum-demo-medium") for _ in range(3)]
    first, again, other = (common.evaluate(random_policy(1), envs, seed) for seed in (0, 0, 100))
    assert np.array_equal(first, again) and not np.any(first == other)
    assert len(set(first)) == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_action_that_is_not_finite(bad):
    def act(obs):
        actions = np.zeros((len(obs), 2))
        actions[obs[:, 0] == 2] = bad if obs[0, 1] == 1 else 0.0
        return actions

    envs = [Counter(0, 9, 1.0), Counter(1, 1, 1.0), Counter(2, 9, 1.0)]
    with pytest.raises(common.RunError, match="not finite at step 1 in environment 2") as caught:
        common.evaluate(act, envs, seed=0)
    assert caught.value.code == 1


def test_observation_that_is_not_finite():
    env = Counter(0, 9, 1.0)
    env.step = lambda action: (np.full(2, np.nan), 0.0, False, False, {})
    with pytest.raises(common.UserError, match="the environment gave an observation that is not finite at step 1"):
        common.evaluate(lambda obs: obs, [env], seed=0)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 2), (3, 2, 1)])
def test_actions_of_wrong_shape(shape):
    envs = [Counter(i, 4, 1.0) for i in range(3)]
    with pytest.raises(common.RunError, match=r"shape .*, not \(3, 2\), at step 0"):
        common.evaluate(lambda obs: np.zeros(shape), envs, seed=0)


def test_return_that_is_not_finite():
    with pytest.raises(common.UserError, match="return of environment 1 is not finite"):
        common.evaluate(lambda obs: np.zeros((len(obs), 2)), [Counter(0, 2, 1.0), Counter(1, 2, np.nan)], seed=0)


def test_global_random_generators_are_untouched():
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for name, dim in (("hopper-medium-v2", 3), ("antmaze-umaze-v2", 8)):
        env = gymnasium.wrappers.TimeLimit(common.make_env(name), 20)
        common.evaluate(random_policy(dim), [env], seed=1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1]) and before[2] == random.getstate()


# record_video


def test_video_that_cannot_be_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(common.FlatEnv, "render", lambda self: 1 / 0)
    with pytest.raises(common.RunError, match="video needs drawing without a screen"):
        common.record_video(random_policy(1), "pendulum-demo-medium", tmp_path / "video.mp4", seed=0)


def test_a_film_has_the_time_limit_of_the_episodes(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(common, "make_env", lambda *args, **more: made.append((args, more)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        common.record_video(None, "some", tmp_path / "video.mp4", 0, 20)
    assert made == [(("some", "rgb_array", 20), {})]


@pytest.mark.parametrize("name", ["halfcheetah-demo-medium", "hopper-medium-v2", "Walker2d-v5"])
def test_the_camera_follows_the_robot(name):
    env = common.make_env(name, render_mode="rgb_array").unwrapped
    assert env.model.camera(env.mujoco_renderer.camera_id).name == "track"


def test_video(tmp_path):
    pytest.importorskip("moviepy")
    pytest.importorskip("pygame")
    result = common.record_video(random_policy(1), "pendulum-demo-medium", tmp_path / "video.mp4", seed=0)
    expected = common.evaluate(random_policy(1), [common.make_env("pendulum-demo-medium")], seed=0)
    assert result == expected[0]
    assert (tmp_path / "video.mp4").stat().st_size > 1000 and len(list(tmp_path.iterdir())) == 1
