"""Datasets: transition rules, readers, packing, checks, built-in data."""

import json
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import common

HOPPER = "hopper-medium-v2"


def plain_env(name):
    """Just enough of make_env for the data alone."""
    family = name.split("-")[0]
    names = {"hopper": "Hopper-v4", "halfcheetah": "HalfCheetah-v4", "pendulum": "Pendulum-v1"}
    env = gymnasium.make(gymnasium.spec(names.get(family, name if name in gymnasium.registry else "Pendulum-v1")))
    box = env.action_space
    if isinstance(env.observation_space, gymnasium.spaces.Dict):
        env = gymnasium.wrappers.FlattenObservation(env)
    env.original_action_space, env.assumed_limit = box, None
    return env


def arrays(n=500, obs_dim=11, action_dim=3, limit=100, seed=0, terminal_rate=0.02):
    """Random time-ordered data with exclusive flags."""
    rng = np.random.default_rng(seed)
    terminal = rng.random(n) < terminal_rate
    timeout = np.zeros(n, bool)
    timeout[limit - 1 :: limit] = True
    timeout &= ~terminal
    return {
        "observations": rng.standard_normal((n, obs_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, action_dim)).astype(np.float32),
        "rewards": rng.standard_normal(n).astype(np.float32),
        "terminals": terminal,
        "timeouts": timeout,
    }


def write(path, data):
    if path.suffix == ".npz":
        np.savez(path, **data)
    else:
        with h5py.File(path, "w") as file:
            for key, value in data.items():
                file[key] = value
    return str(path)


def by_loop(raw):
    """The published rule, written as a loop over the rows."""
    rows = []
    for i in range(len(raw["rewards"]) - 1):
        if not raw["timeouts"][i]:
            o, a = raw["observations"], raw["actions"]
            rows.append([*o[i], *a[i], raw["rewards"][i], *o[i + 1], *a[i + 1], float(raw["terminals"][i])])
    return np.array(rows, np.float32)


@pytest.mark.parametrize("seed", range(20))
def test_rule_equals_plain_loop(tmp_path, seed):
    rng = np.random.default_rng(seed)
    raw = arrays(n=int(rng.integers(20, 300)), limit=int(rng.integers(2, 20)), seed=seed, terminal_rate=rng.random())
    data = common.load_dataset(HOPPER, write(tmp_path / "hopper_medium-v2.hdf5", raw))
    np.testing.assert_array_equal(data.rows.numpy(), by_loop(raw))


@pytest.mark.parametrize("n, limit, expected", [(10000, 10, 9000), (2020, 10, 1818)])
def test_row_counts(tmp_path, n, limit, expected):
    raw = arrays(n=n, limit=limit, terminal_rate=0.0)
    assert len(common.load_dataset(HOPPER, write(tmp_path / "x.hdf5", raw))) == expected


@pytest.mark.parametrize("name, kept", [("hopper_medium-v2.hdf5", 9), ("mine.hdf5", 10)])
def test_a_last_row_that_is_terminal(tmp_path, name, kept):
    """D4RL's rule drops it; of a user's file it may be the only reward, and it needs no successor."""
    raw = arrays(n=10, limit=100, terminal_rate=0.0)
    raw["terminals"][9] = True
    data = common.load_dataset(HOPPER, write(tmp_path / name, raw))
    assert len(data) == kept and data.terminal.sum() == kept - 9 and len(data.episode_returns) == 1
    np.testing.assert_array_equal(data.reward, raw["rewards"][:kept])
    raw["timeouts"][9] = True  # a time limit as well: the episode was cut
    assert len(common.load_dataset(HOPPER, write(tmp_path / name, raw))) == 9


@pytest.mark.parametrize("env", ["antmaze-umaze-v2", "kitchen-mixed-v0"])
def test_returns_that_are_no_successes_are_not_shown(tmp_path, env):
    """The data of these tasks pay at every step what their environment pays once."""
    width, sizes = (9, (60, 9)) if env.startswith("kitchen") else (8, (29, 8))
    raw = arrays(n=50, limit=10, obs_dim=sizes[0], action_dim=width, terminal_rate=0.0)
    data = common.load_dataset(env, write(tmp_path / "x.hdf5", raw), judge=False)
    assert len(data) == 45 and len(data.episode_returns) == 0


def test_boundaries(tmp_path):
    """Rows 0-3 end in a terminal, 4-6 in a time limit, 7-9 are cut."""
    raw = arrays(n=10, limit=100, terminal_rate=0.0)
    raw["terminals"][3] = raw["timeouts"][6] = True
    data = common.load_dataset(HOPPER, write(tmp_path / "x.hdf5", raw))
    assert data.episode.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert data.terminal.tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    kept = [0, 1, 2, 3, 4, 5, 7, 8]
    np.testing.assert_array_equal(data.next_action, raw["actions"][[i + 1 for i in kept]])
    np.testing.assert_array_equal(data.next_obs, raw["observations"][[i + 1 for i in kept]])
    np.testing.assert_allclose(data.episode_returns, [raw["rewards"][:4].sum(), raw["rewards"][4:7].sum()], rtol=1e-5)


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
def test_odd_types(tmp_path, suffix):
    """float64, column vectors and float flags give the same transitions."""
    raw = arrays(seed=3)
    odd = {key: value.astype(np.float64) for key, value in raw.items()}
    odd = {key: value[:, None] if value.ndim == 1 else value for key, value in odd.items()}
    data = common.load_dataset(HOPPER, write(tmp_path / f"x{suffix}", odd))
    np.testing.assert_array_equal(data.rows.numpy(), by_loop(raw))


def test_arrays_of_other_names_are_left_alone(tmp_path):
    """Also where they are called as in a Batch: a `mask` of ones is not OGBench's `masks`. D4RL's names come first."""
    raw = arrays()
    more = dict(mask=np.ones(len(raw["rewards"])), obs=np.zeros((3, 4)), infos=np.zeros(2))
    more |= dict(terminations=np.zeros(len(raw["rewards"])))
    data = common.load_dataset("Hopper-v4", write(tmp_path / "x.npz", raw | more))
    np.testing.assert_array_equal(data.rows.numpy(), by_loop(raw))
    assert (data.name, data.obs_dim, data.action_dim, data.max_action) == ("Hopper-v4", 11, 3, 1.0)


def test_terminals_that_all_are_time_limits_too(tmp_path, capsys):
    raw = arrays()
    common.load_dataset(HOPPER, write(tmp_path / "x.hdf5", raw))
    assert capsys.readouterr().err == ""
    raw["timeouts"] |= raw["terminals"]
    common.load_dataset(HOPPER, write(tmp_path / "x.hdf5", raw))
    assert "every terminal is marked as a time limit too" in capsys.readouterr().err


def test_timeout_rule(tmp_path):
    raw = arrays()

    def every_seven(terminal):
        assert terminal.dtype == bool and terminal.shape == (500,)
        return np.arange(len(terminal)) % 7 == 6

    data = common.load_dataset(HOPPER, write(tmp_path / "x.hdf5", raw), timeout_rule=every_seven)
    raw["timeouts"] = every_seven(raw["terminals"])
    np.testing.assert_array_equal(data.rows.numpy(), by_loop(raw))


@pytest.mark.parametrize("has_next", [True, False])
def test_true_next_obs(tmp_path, has_next):
    raw = arrays()
    expected = by_loop(raw)
    end = (raw["terminals"] | raw["timeouts"])[:, None]
    truth = np.where(end, raw["observations"] + 5, np.roll(raw["observations"], -1, axis=0))
    if has_next:
        raw["next_observations"] = np.where(raw["timeouts"][:, None], np.nan, truth)  # not needed there
    path = write(tmp_path / "x.hdf5", raw)
    data = common.load_dataset(HOPPER, path, true_next_obs=True)
    kept = np.flatnonzero(~raw["timeouts"])
    kept = kept[kept < 499]
    over = raw["terminals"][kept]
    assert over.any()
    expected[over, 15:26] = (truth if has_next else raw["observations"])[kept[over]]
    np.testing.assert_array_equal(data.rows.numpy(), expected)
    raw.pop("next_observations", None)
    np.testing.assert_array_equal(common.load_dataset(HOPPER, path).rows.numpy(), by_loop(raw))


def counter_by_loop(terminal, horizon):
    """The step counter of the published function, row by row."""
    timeout, step = [], 0
    for done in terminal:
        cut = step == horizon - 1
        timeout.append(cut)
        step = 0 if cut else (1 if done else step + 1)
    return timeout


@pytest.mark.parametrize("seed", range(30))
def test_horizon_counter(seed):
    rng = np.random.default_rng(seed)
    terminal = rng.random(200) < rng.choice([0.0, 0.05, 0.3])
    horizon = int(rng.integers(2, 40))
    assert common.count_timeouts(terminal, horizon).tolist() == counter_by_loop(terminal, horizon)


def test_own_data_without_timeouts_end_where_their_episodes_do(tmp_path, monkeypatch):
    """Not one row early after a terminal, as D4RL's counter does."""
    monkeypatch.setattr(common, "make_env", lambda env: plain_env("Hopper-v4"))
    raw, ends = without(arrays(2800), "timeouts"), np.array([300, 1300, 2300, 2800])
    raw |= dict(terminals=np.isin(np.arange(2800), [299, 2799]), rewards=np.ones(2800, np.float32))
    data = common.load_dataset("Hopper-v4", write(tmp_path / "x.npz", raw))
    assert data.episode_returns.tolist() == [300, 1000, 1000, 500]
    assert np.flatnonzero(np.diff(data.episode)).tolist() == [299, 1298, 2297]  # the last rows of cut ones have no next
    assert ends[-1] == 2800


def test_episodes_longer_than_the_time_limit_are_told(tmp_path, capsys):
    raw = arrays(2500, limit=900, terminal_rate=0.0)
    common.load_dataset("Hopper-v4", write(tmp_path / "x.npz", raw))
    assert capsys.readouterr().err == ""
    raw["timeouts"][899] = False
    common.load_dataset("Hopper-v4", write(tmp_path / "x.npz", raw))
    assert "1800 rows without an end of an episode, its time limit is 1000" in capsys.readouterr().err


def test_a_file_is_not_an_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pendulum-demo-medium").write_text("a log, say")
    assert len(common.load_dataset("pendulum-demo-medium")) > 0
    path = write(tmp_path / "x.npz", arrays())
    with pytest.raises(common.UserError, match="is a file: name it by --data-path"):
        common.load_dataset(str(path))


def test_no_timeouts_uses_counter_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "make_env", lambda env: plain_env("Hopper-v4"))
    raw = arrays(n=700, terminal_rate=0.0)
    del raw["timeouts"]
    data = common.load_dataset("kitchen-mixed-v0", write(tmp_path / "x.hdf5", raw))
    assert "every 280 steps (2 complete episodes)" in capsys.readouterr().out
    assert len(data) == 700 - 2 - 1


def test_actions_are_rescaled(tmp_path):
    raw = arrays(obs_dim=3, action_dim=1)
    raw["actions"] *= 2.0005  # a hair outside, as rounding does
    data = common.load_dataset("Pendulum-v1", write(tmp_path / "x.npz", raw))
    np.testing.assert_allclose(data.action, np.clip(by_loop(raw)[:, 3:4] / 2, -1, 1), atol=1e-6)
    assert data.action.abs().max() <= 1


def test_views_and_sample(tmp_path):
    data = common.load_dataset(HOPPER, write(tmp_path / "x.npz", arrays()))
    before = data.reward.clone()
    data.reward.sub_(1)
    torch.testing.assert_close(data.reward, before - 1)
    torch.testing.assert_close(data.rows[:, 14], before - 1)
    batch = data.to("cpu").sample(64, torch.Generator().manual_seed(0))
    index = torch.randint(len(data), (64,), generator=torch.Generator().manual_seed(0))
    for name in common.Batch._fields:
        assert torch.equal(getattr(batch, name), getattr(data, name)[index]), name
    assert batch.obs.shape == (64, 11) and batch.reward.shape == (64,) and batch.terminal.dtype == torch.float32


def test_from_arrays_one_step_episodes():
    rng = np.random.default_rng(0)
    obs, action = np.zeros((50, 1), np.float32), rng.uniform(-2, 2, (50, 2)).astype(np.float32)
    reward, flags = rng.random(50).astype(np.float32), np.ones(50, bool)
    data = common.Dataset.from_arrays("b", obs, action, reward, flags, ~flags, None, next_obs=obs, max_action=2.0)
    assert len(data) == 50 and data.terminal.all() and data.max_action == 2.0
    assert data.episode.tolist() == list(range(50))
    np.testing.assert_array_equal(data.action, action)
    np.testing.assert_allclose(data.episode_returns, reward)


# Rows in any order


def episodes(lengths=(30, 40, 25, 35), terminals=(1,), seed=0):
    """Random walks with their next_observations; episodes in `terminals` end so, the others in a time limit."""
    rng, parts = np.random.default_rng(seed), []
    for k, n in enumerate(lengths):
        walk = np.cumsum(rng.standard_normal((n + 1, 3)), axis=0)
        last = np.arange(n) == n - 1
        flags = dict(terminals=last & (k in terminals), timeouts=last & (k not in terminals))
        action = rng.uniform(-1, 1, (n, 1))  # half of Pendulum's range
        rows = dict(observations=walk[:-1], actions=action, rewards=rng.random(n), next_observations=walk[1:])
        parts.append(rows | flags)
    raw = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return {key: value if value.dtype == bool else value.astype(np.float32) for key, value in raw.items()}


def without(raw, *keys):
    return {key: value for key, value in raw.items() if key not in keys}


def load(path, raw, **options):
    return common.load_dataset("Pendulum-v1", write(path / "x.npz", raw), **options)


def check_transitions(data, raw, decimals=4):
    """Every transition of `data` is one of `raw`, also the actions that follow, where they are known."""
    true = {}
    for i in range(len(raw["rewards"])):
        key = tuple(np.round(raw["observations"][i].astype(float), decimals))
        true[key] = (raw["actions"][i] / 2, raw["rewards"][i], raw["next_observations"][i], raw["terminals"][i])
    for obs, *row in zip(data.obs, data.action, data.reward, data.next_obs, data.terminal):
        expected = true[tuple(np.round(obs.numpy().astype(float), decimals))]
        for name, value, truth in zip(("action", "reward", "next_obs", "terminal"), row, expected):
            if name != "next_obs" or not row[3]:  # after a terminal it is masked
                np.testing.assert_allclose(value, truth, atol=1e-3, err_msg=name)


def interleave(value, parts=4):
    return value.reshape(parts, -1, *value.shape[1:]).swapaxes(0, 1).reshape(value.shape)


ORDERS = {
    "shuffled": lambda n, rng: rng.permutation(n),
    "interleaved": lambda n, rng: interleave(np.arange(n)),
    "two swapped": lambda n, rng: np.r_[:10, 11, 10, 12:n],
    "every second": lambda n, rng: np.arange(0, n, 2),
    "backwards": lambda n, rng: np.arange(n)[::-1],
    "cut and glued": lambda n, rng: np.r_[:10, 50:90, 10:50, 90:n],
}


@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_rows_out_of_order(tmp_path, capsys, order, marks):
    raw = episodes((40,) * 4)
    rows = ORDERS[order](160, np.random.default_rng(0))
    data = load(tmp_path, {key: value[rows] for key, value in raw.items() if marks or key != "timeouts"})
    assert len(data) == len(rows) and "not in time order" in capsys.readouterr().out
    check_transitions(data, raw)
    assert data.episode is None and len(data.episode_returns) == 0
    assert data.sample(5, torch.Generator()).next_action.isnan().all() and len(data.to("cpu").fingerprint) == 16
    with pytest.raises(common.UserError, match="Pendulum-v1: this method needs next actions, unknown here: .* order"):
        data.next_action  # noqa: B018
    with pytest.raises(common.UserError, match="needs returns, unknown"):
        data.need_order("returns")


def test_ends_may_lack_next_observations(tmp_path):
    """Time-limit rows without a successor go; terminal rows stay, since nothing follows them."""
    raw = episodes()
    end = raw["terminals"] | raw["timeouts"]
    holes = raw | dict(next_observations=np.where(end[:, None], np.nan, raw["next_observations"]))
    shuffle = np.random.default_rng(0).permutation(len(end))
    data = load(tmp_path, {key: value[shuffle] for key, value in holes.items()})
    assert len(data) == len(end) - raw["timeouts"].sum() and data.terminal.sum() == 1
    assert data.rows[:, :-2].isfinite().all()
    check_transitions(data, raw)
    data = load(tmp_path, holes, true_next_obs=True)
    assert torch.equal(data.next_obs[data.terminal == 1], data.obs[data.terminal == 1])
    data = load(tmp_path, without(holes, "timeouts"))  # in order: the holes show the ends
    assert data.episode.max() == 3
    check_transitions(data, raw)


@pytest.mark.parametrize("marks", ["all", "none", "all but one", "zeros"])
def test_next_observations_show_the_ends(tmp_path, capsys, marks):
    raw = episodes()
    given = without(raw, "timeouts") if marks == "none" else dict(raw, timeouts=raw["timeouts"].copy())
    if marks == "all but one":
        given["timeouts"][29] = False
    if marks == "zeros":
        given["timeouts"][:] = False
    data = load(tmp_path, given)
    assert ("without a mark" in capsys.readouterr().out) == (marks != "all")
    assert len(data) == 130 - 2 - 1 and data.episode.max() == 3  # two time limits and the last row
    check_transitions(data, raw)
    ends = np.split(raw["rewards"].astype(float), [30, 70, 95])[: 4 if marks in ("all", "all but one") else 3]
    np.testing.assert_allclose(data.episode_returns, [part.sum() for part in ends])
    np.testing.assert_allclose(data.next_action[:29], raw["actions"][1:30] / 2, rtol=1e-5)


def far_from_zero(raw):
    """Such as temperatures in kelvin, which hardly change beside their size."""
    return {key: (300 + value / 1000 if "obs" in key else value).astype(value.dtype) for key, value in raw.items()}


def test_small_changes_of_large_numbers(tmp_path, capsys):
    raw = far_from_zero(episodes())
    data = load(tmp_path, without(raw, "timeouts"))
    assert data.episode.max() == 3 and "2 episodes end without a mark" in capsys.readouterr().out  # and a terminal
    shuffle = np.random.default_rng(0).permutation(130)
    data = load(tmp_path, {key: value[shuffle] for key, value in raw.items()})
    assert data.episode is None and "not in time order" in capsys.readouterr().out
    assert load(tmp_path, raw).episode is not None
    raw["observations"][77] = raw["next_observations"][76] = 1e6  # a broken row
    assert load(tmp_path, {key: value[shuffle] for key, value in raw.items()}).episode is None


@pytest.mark.parametrize("scale", [lambda obs, after: after / 7, lambda obs, after: after - obs, None])
def test_next_observations_of_another_scale(tmp_path, capsys, scale):
    raw = episodes()
    if scale:
        raw["next_observations"] = scale(raw["observations"], raw["next_observations"])
    else:
        raw = {key: value[::-1] for key, value in raw.items()}
    load(tmp_path, raw)
    assert ("are both scaled alike?" in capsys.readouterr().err) == (scale is not None)


@pytest.mark.parametrize("odd", ["float16", "float16 with holes", "noise", "no mark at all", "blocks", "12,000 rows"])
def test_time_order_is_recognised(tmp_path, capsys, odd):
    raw = episodes(terminals=(1, 3))
    given = dict(raw)
    if odd == "float16":
        given["observations"] = raw["observations"].astype(np.float16)
    if odd == "float16 with holes":
        end = (raw["terminals"] | raw["timeouts"])[:, None]
        given["next_observations"] = np.where(end, np.nan, raw["next_observations"].astype(np.float16))
    if odd == "12,000 rows":  # of which a part is enough to judge by
        raw = given = {key: np.concatenate([value] * 93)[:12_000] for key, value in raw.items()}
    if odd == "noise":
        given["next_observations"] = raw["next_observations"] + np.float32(1e-6)
    if odd == "blocks":
        order = np.r_[70:95, :30, 95:130, 30:70]
        given = {key: value[order] for key, value in raw.items()}
    if odd == "no mark at all":
        given = {key: value[:30] * (key not in ("terminals", "timeouts")) for key, value in raw.items()}
        given |= {key: given[key].astype(bool) for key in ("terminals", "timeouts")}
    data = load(tmp_path, given)
    assert capsys.readouterr().out == "" and data.episode is not None
    if not odd.startswith("float16"):
        check_transitions(data, raw)


def test_timeout_rule_keeps_what_the_file_shows(tmp_path):
    """The caller's time limits come instead of the file's marks, but no transition into another episode comes back."""
    raw = without(episodes(terminals=()), "timeouts")
    data = load(tmp_path, raw, timeout_rule=lambda terminal: np.arange(len(terminal)) % 10 == 9)
    assert len(data) == 130 - len({*range(9, 130, 10), 29, 69, 94})
    check_transitions(data, raw)


@pytest.mark.parametrize("kind", [bool, np.float32, np.int64])
def test_masks(tmp_path, capsys, kind):
    """OGBench: terminals end trajectories, masks = 0 ends the task, perhaps before the trajectory's end."""
    raw = episodes(terminals=())
    end, over = raw["timeouts"], np.zeros(130, bool)
    over[[10, 129]] = True
    layout = without(raw, "timeouts") | dict(terminals=end.astype(kind), masks=(~over).astype(kind))
    for given in (layout, without(layout, "next_observations")):
        data = load(tmp_path, given)
        assert "3 of them without an end of the task (masks = 0: 2 rows)" in capsys.readouterr().out
        assert data.terminal.nonzero().flatten().tolist() == [10, 126] and len(data) == 130 - 3
        check_transitions(data, raw | dict(terminals=over))
    shuffle = np.random.default_rng(0).permutation(130)
    data = load(tmp_path, {key: value[shuffle] for key, value in layout.items()})
    assert data.episode is None and data.terminal.sum() == 2
    check_transitions(data, raw | dict(terminals=over))


def test_masks_that_only_repeat_terminals(tmp_path, capsys):
    raw = arrays(terminal_rate=0.05)
    raw["observations"], raw["actions"] = raw["observations"][:, :3], raw["actions"][:, :1]
    load(tmp_path, without(raw, "timeouts") | dict(masks=1 - raw["terminals"]))
    assert "no timeouts, so terminals end the task; a time limit is assumed every 200" in capsys.readouterr().out
    raw = arrays(terminal_rate=0.05)
    data = common.load_dataset(HOPPER, write(tmp_path / "x.npz", raw | dict(masks=1 - raw["terminals"])))
    np.testing.assert_array_equal(data.rows.numpy(), by_loop(raw))


def test_the_words_of_gymnasium(tmp_path):
    raw = arrays()
    words = dict(terminations=raw["terminals"], truncations=raw["timeouts"])
    for given in (without(raw, "terminals", "timeouts") | words, without(raw, "timeouts") | words):
        data = common.load_dataset(HOPPER, write(tmp_path / "x.hdf5", given))
        np.testing.assert_array_equal(data.rows.numpy(), by_loop(raw))


# Actions and their box


@pytest.mark.parametrize("factor, said", [(1.0, None), (1 + 1e-7, None), (1.01, 0.02), (1.049, 0.098)])
def test_actions_a_little_outside(tmp_path, capsys, factor, said):
    raw = episodes()
    raw["actions"][:] = np.linspace(-2, 1, 130)[:, None] * factor
    data = load(tmp_path, raw)
    assert data.action.min() == -1 and data.action.max() < 0.6
    out = capsys.readouterr().out
    if said is None:
        assert out == ""
    else:
        count = np.count_nonzero(raw["actions"] < -2)
        assert f"{count} of 130 actions are outside [-2, 2], by at most {said}" in out and "5% of half" in out
    raw["actions"][0] = -2.11
    with pytest.raises(common.UserError, match=r"must be in \[-2, 2\], found \[-2.11, "):
        load(tmp_path, raw)


def test_actions_that_were_scaled_before(tmp_path, capsys):
    raw = episodes()
    for largest, said in ((1.0, True), (0.9, False), (1.9, False)):
        raw["actions"][:] = np.linspace(-largest, largest, 130)[:, None]
        assert load(tmp_path, raw).action.abs().max() == np.float32(largest / 2)
        assert ("end at 1, their box is [-2, 2]: were they scaled" in capsys.readouterr().err) == said


@pytest.mark.filterwarnings("error")
def test_without_an_environment(tmp_path, capsys):
    raw = episodes()
    path = write(tmp_path / "x.npz", raw)
    with pytest.raises(common.UserError, match="unknown environment 'MyRobot-v0'.*--eval-episodes 0 trains without"):
        common.load_dataset("MyRobot-v0", path)
    data = common.load_dataset("MyRobot-v0", path, judge=False)
    printed = capsys.readouterr().out
    assert "unknown environment 'MyRobot-v0'" in printed and "it is taken to be [-1, 1]" in printed
    np.testing.assert_allclose(data.action, np.delete(raw["actions"], [29, 94, 129], axis=0))  # in [-1, 1] already
    with pytest.raises(common.UserError, match="unknown environment"):
        data.make_env()
    raw["actions"] = np.linspace([-3, 5], [7, 5], 130, dtype=np.float32)  # the second has no choice
    data = common.load_dataset("MyRobot-v0", write(tmp_path / "x.npz", raw), judge=False)
    assert "[-1, 1] stands for what the data span, [-3.  5.] to [7. 5.]" in capsys.readouterr().out
    np.testing.assert_allclose(data.action[[0, -1]], [[-1, 0], [1 - 2 / 129, 0]], rtol=1e-5)
    for key, shape, words in (
        ("next_observations", (130, 12), r"next_observations: expected shape \[N, 3\], found \[130, 12\]$"),
        ("next_observations", (130, 0), r"next_observations hold no numbers"),
        ("observations", (130, 0), r"observations hold no numbers, \[130, 0\]"),
        ("actions", (130, 0), r"actions hold no numbers, \[130, 0\]"),
    ):
        with pytest.raises(common.UserError, match=words):
            path = write(tmp_path / "x.npz", raw | {key: np.zeros(shape)})
            common.load_dataset("MyRobot-v0", path, judge=False)
    with pytest.raises(common.UserError, match="next_observations has NaN, infinite or huge values in 130 rows"):
        path = write(tmp_path / "x.npz", raw | dict(next_observations=np.full((130, 3), np.nan)))
        common.load_dataset("MyRobot-v0", path, judge=False)
    raw["actions"] = np.arange(130) % 3
    with pytest.raises(common.UserError, match="actions are whole numbers; only continuous"):
        common.load_dataset("MyRobot-v0", write(tmp_path / "x.npz", raw), judge=False)
    data = load(tmp_path, episodes(), judge=False)  # an environment that is there still gives its box
    assert data.action.abs().max() <= 0.5


def test_pixels_and_flat_shapes(tmp_path):
    raw = episodes()
    plain = load(tmp_path, raw)
    odd = dict(observations=raw["observations"][:, None], actions=raw["actions"][:, 0])  # [N, 1, 3] and [N]
    assert torch.equal(load(tmp_path, raw | odd).rows, plain.rows)
    for shape, text in [((130, 8, 8, 3), r"\[130, 8, 8, 3\]"), ((130, 8, 8), r"\[130, 8, 8\]")]:
        raw["observations"] = np.zeros(shape, np.uint8)
        with pytest.raises(common.UserError, match=f"observations are images, {text}; the networks here take"):
            load(tmp_path, raw)


# Files that cannot be read


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_misnamed_files(tmp_path, suffix):
    raw = arrays()
    path = Path(write(tmp_path / f"right{suffix}", raw))
    for name in ("wrong.npz", "wrong.hdf5", "noname"):
        (tmp_path / name).write_bytes(path.read_bytes())
        data = common.load_dataset(HOPPER, str(tmp_path / name))
        np.testing.assert_array_equal(data.rows.numpy(), by_loop(raw))


@pytest.mark.parametrize(
    "error, words",
    [
        (BlockingIOError(11, "Unable to synchronously open file (unable to lock file, errno = 11)"), "is locked"),
        (OSError(37, "Unable to open file (unable to lock file, errno = 37, 'No locks available')"), "is locked"),
        (PermissionError(13, "Unable to open file (errno = 13)"), "cannot be read: Permission denied"),
        (OSError(5, "Unable to open file (file read failed)"), "cannot be read: Input/output error"),
        (OSError("Unable to open file (truncated file: eof = 3, sblock->base_addr = 0)"), "not a complete"),
    ],
)
def test_files_that_cannot_be_opened(tmp_path, monkeypatch, error, words):
    path = write(tmp_path / "hopper_medium-v2.hdf5", arrays())
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    monkeypatch.setattr(common.h5py, "File", lambda *args: (_ for _ in ()).throw(error))
    for given in (path, None):
        with pytest.raises(common.RunError, match=words) as caught:
            common.load_dataset(HOPPER, given)
        assert ("delete" in str(caught.value)) == (words == "not a complete" and given is None)


def test_locked_file(tmp_path):
    path = write(tmp_path / "x.hdf5", arrays())
    code = f"import h5py; file = h5py.File({path!r}, 'a'); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        with pytest.raises(common.RunError, match="is locked: a program writes it"):
            common.load_dataset(HOPPER, path)
        writer.communicate(b"\n")
    assert len(common.load_dataset(HOPPER, path)) > 400


def test_arrays_that_cannot_be_read(tmp_path):
    raw = arrays()
    path = write(tmp_path / "x.npz", raw | dict(rewards=raw["rewards"].astype(object)))
    with pytest.raises(common.RunError, match="rewards in .*x.npz cannot be read: Object arrays"):
        common.load_dataset(HOPPER, path)
    path = write(tmp_path / "x.hdf5", without(raw, "observations") | {"observations/x": raw["observations"]})
    with pytest.raises(common.RunError, match="observations in .*x.hdf5 cannot be read: it is a group of x"):
        common.load_dataset(HOPPER, path)
    path = write(tmp_path / "y.hdf5", without(raw, "rewards"))
    with h5py.File(path, "a") as file:
        file["rewards"] = h5py.ExternalLink("gone.hdf5", "/rewards")
    with pytest.raises(common.RunError, match="rewards in .*y.hdf5 cannot be read: .*can't open file"):
        common.load_dataset(HOPPER, path)


def test_an_array_in_parts(tmp_path):
    """A virtual dataset: HDF5 would give zeros for a part that is gone."""
    raw = arrays()
    path, part = write(tmp_path / "x.hdf5", without(raw, "rewards")), tmp_path / "part.hdf5"
    layout = h5py.VirtualLayout(shape=(500,), dtype="f4")
    layout[:400] = h5py.VirtualSource("part.hdf5", "rewards", shape=(500,))[:400]
    with h5py.File(path, "a") as file:
        file["last"] = raw["rewards"][400:]
        layout[400:] = h5py.VirtualSource(file["last"])
        file.create_virtual_dataset("rewards", layout)
    write(part, dict(rewards=raw["rewards"]))
    assert np.array_equal(common.read_file(Path(path))["reward"], raw["rewards"])
    part.unlink()
    with pytest.raises(common.RunError, match="rewards in .*x.hdf5 cannot be read: its part part.hdf5 is missing"):
        common.load_dataset(HOPPER, path)


def broken(key, change):
    def apply(raw):
        raw[key] = change(raw[key])

    return apply


def with_nan(value):
    value[[7, 9], 1] = np.nan
    return value


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda raw: raw.pop("rewards"), "no rewards; found actions"),
        (broken("actions", lambda a: a[:-1]), "different lengths: observations 500, actions 499"),
        (broken("observations", lambda o: o[:, :9]), r"expected shape .N, 11., found .500, 9.; does --env name"),
        (broken("actions", lambda a: a[:, :2]), r"actions: expected shape \[N, 3\], found \[500, 2\]"),
        (broken("rewards", lambda r: np.stack([r, r], 1)), r"rewards: expected shape \[N\], found \[500, 2\]"),
        (broken("observations", with_nan), "observations has NaN, infinite or huge values in 2 rows, the first is 7"),
        (broken("rewards", lambda r: r / 0.0), "rewards has NaN, infinite or huge values in 500 rows, the first is 0"),
        (broken("actions", lambda a: a * 3), r"actions must be in \[-1, 1\], found \[-[23]\..*another environment"),
        (broken("actions", lambda a: a * [0.5, 1.2, 1]), r"found \[-1.1.*, 1.1.*\] in dimension 1: data scaled for"),
        (lambda raw: raw.pop("timeouts"), "no timeouts"),
        (broken("terminals", lambda t: np.where(t, 1, -1)), "terminals must be 0 or 1 in every row, found -1"),
        (broken("terminals", lambda t: t * 0.5), "terminals must be 0 or 1 in every row, found 0.5"),
        (broken("timeouts", lambda t: np.arange(500) % 100), "timeouts must be 0 or 1 in every row, found 2"),
        (lambda raw: [raw["terminals"].fill(0), raw["timeouts"].fill(0)], "no complete episode"),
        (lambda raw: raw["timeouts"].fill(1), "no transition is left"),
        (lambda raw: raw.update({key: value[:0] for key, value in raw.items()}), "two rows are the least, found 0"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_bad_data(tmp_path, damage, words):
    raw = arrays()
    damage(raw)
    with pytest.raises(common.UserError, match=words) as error:
        common.load_dataset(HOPPER, write(tmp_path / "x.hdf5", raw))
    assert "\n" not in str(error.value) and error.value.code == 2


@pytest.mark.parametrize(
    "name, content, words, code",
    [
        ("x.hdf5", b"", "is empty", 1),
        ("x.npz", b"", "is empty", 1),
        ("x.hdf5", b"<html>sorry</html>", "neither an HDF5 file nor an .npz but a web page", 1),
        ("x.npz", b"PK\3\4 nonsense", "not a complete .npz file .found 13 bytes", 1),
        ("x.hdf5", b"\x89HDF\r\n\x1a\n", "not a complete HDF5 file .found 8 bytes", 1),
        ("x.npz", pickle.dumps({}), "but a pickle", 1),
        ("x.hdf5.gz", b"\x1f\x8b", "but packed by gzip", 1),
        ("x.hdf5", b"version https://git-lfs.github.com/spec/v1", "but a pointer of Git LFS: git lfs pull", 1),
        ("x.hdf5", b"0.1,0.2", "neither an HDF5 file nor an .npz$", 1),
        ("x.hdf5", None, "no such file", 2),
    ],
)
def test_bad_files(tmp_path, name, content, words, code):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(common.UserError, match=words) as error:
        common.load_dataset(HOPPER, str(tmp_path / name))
    assert error.value.code == code


@pytest.mark.parametrize(
    "slip, name",
    [
        ("Hopper-medium-v2", "hopper-medium-v2"),
        ("hopper_medium-v2", "hopper-medium-v2"),
        ("hopper-medium", "hopper-medium-v2"),
        ("hopper-medium-v0", "hopper-medium-v2"),
        ("walker2d-medum-replay-v2", "walker2d-medium-replay-v2"),
        ("antmaze-umaze", "antmaze-umaze-v2 or antmaze-umaze-v0"),
        ("pendulum-medium", "pendulum-demo-medium"),
    ],
)
def test_unknown_name(slip, name):
    with pytest.raises(common.UserError, match=f"(did you mean|or) {name}.*--env help"):
        common.load_dataset(slip)


def test_environment_without_data():
    with pytest.raises(common.UserError, match="is an environment, not a dataset.*--data-path"):
        common.load_dataset("Hopper-v4")


def test_wrong_judge(tmp_path):
    path = write(tmp_path / "hopper_medium-v2.hdf5", arrays())
    with pytest.raises(common.UserError, match="--env hopper-medium-v2"):
        common.load_dataset("Hopper-v5", path)
    assert len(common.load_dataset("Hopper-v4", path)) == len(common.load_dataset(HOPPER, path))


def test_facts():
    assert len(common.DATASETS) == 18 + 12 + 3 + 3
    base = "ant_maze_new/Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse.hdf5"
    assert common.DATASETS["antmaze-medium-play-v0"].path == base
    fixed = "ant_maze_v2/Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5"
    assert common.DATASETS["antmaze-umaze-v2"].path == fixed
    replay = common.DATASETS["hopper-medium-replay-v2"]
    assert replay.path == "gym_mujoco_v2/hopper_medium_replay-v2.hdf5" and replay.sizes == (75854457, 77251678)
    assert common.DATASETS["pen-human-v1"].path == "hand_dapg_v1/pen-human-v1.hdf5"
    assert all(len(source.sha256) in (0, 64) for source in common.DATASETS.values())
    assert all(name in common.list_datasets() for name in [*common.DATASETS, *common.BUILT_IN])


# 2-D scenes


@pytest.mark.parametrize("name", common.SCENES)
def test_scene(name):
    data, env = common.load_dataset(name), common.make_env(name)
    assert len(data) == 10_000 and data.obs_dim == 1 and data.action_dim == 2
    assert data.action.abs().max() == data.max_action == env.action_space.high[0]
    assert torch.equal(data.rows, common.load_dataset(name).rows) and len(data.fingerprint) == 16
    scene, policy = common.SCENES[name], data.action[:200].numpy()
    paid = common.evaluate(lambda obs: policy[: len(obs)], [env] * 200, seed=0)
    noise = data.reward[:200].numpy() - paid
    assert abs(noise.std() - scene.reward_std) < 0.06 and abs(noise.mean()) < 0.12
    assert data.terminal.all() == scene.terminal and data.terminal.any() == scene.terminal
    np.testing.assert_allclose(data.episode_returns, data.reward)


def spread(name):
    """Mean and standard deviation [2, 2] of a scene's actions."""
    action = common.load_dataset(name).action
    return torch.stack([action.mean(0), action.std(0)])


@pytest.mark.parametrize(
    "name, center, std",
    [  # by arithmetic from the definitions in the official codes
        ("25gaussians-far", (0, 0), (50 + 0.09,) * 2),
        ("2gaussians", (-0.1, 0.4), (0.25 + 0.01, 0.04 + 0.01)),
        ("3gaussians", (-0.2, 0.2), (0.56 / 3 + 0.01, 0.56 / 3 + 0.01)),
        ("8gaussians", (0, 0), (4 + 0.125,) * 2),
        ("checkerboard", (0, 0), (16 / 3,) * 2),
        ("rings", (0, 0), (0.5 * 0.5625 * 7.5 + 0.0064,) * 2),
    ],
)
def test_scene_moments(name, center, std):
    expected = torch.tensor([center, [value**0.5 for value in std]])
    torch.testing.assert_close(spread(f"bandit-{name}"), expected, rtol=0.03, atol=0.05)


def test_scene_shapes():
    action = {name: common.load_dataset(name).action for name in common.SCENES}
    x, y = (action["bandit-checkerboard"] / 2).T
    assert torch.all((x.floor() + y.floor()) % 2 == 0)
    for roll, scale, noise in (("swissroll-far", 1, 0.1), ("swissroll", 5, 1.0)):  # the angle tells the radius
        a, b = scale * action[f"bandit-{roll}"].T
        off = torch.remainder((a**2 + b**2).sqrt() - torch.atan2(b, a) + np.pi, 2 * np.pi) - np.pi
        assert 0.8 * noise < off.std() < 1.3 * noise, roll
    a, b = 3 * action["bandit-2spirals"].T  # two arms, half a turn apart
    radius = (a**2 + b**2).sqrt()
    off = torch.remainder(radius + torch.atan2(b, a) + np.pi / 2, np.pi) - np.pi / 2
    assert off[radius > 3].std() < 0.5  # 0.9 if the angle told nothing
    radius = action["bandit-ring"].norm(dim=1)
    assert abs(radius.mean() - 1) < 0.01 and abs(radius.std() - 0.05) < 0.005
    a, b = action["bandit-wave"].T
    assert (b + 0.6 * torch.sin(np.pi * (a + 1))).std() < 0.15
    radius = action["bandit-rings"].norm(dim=1) / 0.75
    assert ((radius - radius.round()).abs() < 0.4).float().mean() > 0.99 and set(radius.round().tolist()) == {
        1,
        2,
        3,
        4,
    }
    for name in ("moons", "circles"):  # the official codes' boxes around them
        a, b = action[f"bandit-{name}"].T
        assert abs(a.min() + 0.9) < 0.15 and a.max() < 0.6 and abs(b.min() + 0.3) < 0.15 and b.max() == 1.0


def test_scene_rewards():
    """At some points, by hand; `largest` is the radius of the outermost action."""
    point = torch.tensor([[-9.0, 12.0], [3.0, 4.0], [0.4, -0.4]])
    largest = common.load_dataset("bandit-25gaussians-far").action.norm(dim=1).max()
    expected = {
        "25gaussians-far": [15, 5, 0.32**0.5],
        "25gaussians-near": [largest - 15, largest - 5, largest - 0.32**0.5],
        "25gaussians-hard": [30, 5, 0.32**0.5],
        "25gaussians-same": [0, 0, 0],
        "moons": [-((9.4**2 + 12.4**2) ** 0.5), -((2.6**2 + 4.4**2) ** 0.5), 0],
        "rings": [-(10.5**2 + 81), -(1.5**2 + 1), -(1.1**2 + 3.4**2)],
        "wave": [3, 7, 0],
    }
    for name, values in expected.items():
        torch.testing.assert_close(
            common.make_env(f"bandit-{name}").reward(point), torch.tensor(values).float(), msg=name
        )


def test_scene_errors(tmp_path):
    with pytest.raises(common.UserError, match='unknown dataset "bandit-8gaussian".*bandit-8gaussians'):
        common.load_dataset("bandit-8gaussian")
    with pytest.raises(common.UserError, match="makes its own data"):
        common.load_dataset("bandit-moons", write(tmp_path / "x.npz", arrays()))
    with pytest.raises(common.UserError, match="nothing to film"):
        common.make_env("bandit-moons", render_mode="rgb_array")


# Minari


class Toy(gymnasium.Env):
    """Only its spaces matter: observations are a nested dictionary."""

    observation_space = gymnasium.spaces.Dict(
        {
            "b": gymnasium.spaces.Box(-9e3, 9e3, (2,), np.float64),
            "a": gymnasium.spaces.Dict({"y": gymnasium.spaces.Box(-9e3, 9e3, (1,), np.float64)}),
        }
    )
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {"b": np.zeros(2), "a": {"y": np.zeros(1)}}, {}

    def step(self, action):
        return *self.reset()[:1], 0.0, False, False, {}


gymnasium.register("DictToy-v0", f"{__name__}:Toy", max_episode_steps=8)


@pytest.fixture
def toy_data(tmp_path, monkeypatch):
    """A local Minari dataset of 4 episodes: 8 steps (time limit), 5 (terminal), 8, 5; episode k counts from 100 k."""
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    rng, buffers = np.random.default_rng(0), []
    for k, steps in enumerate([8, 5, 8, 5]):
        at = 100.0 * k + np.arange(steps + 1)
        last = np.arange(steps) == steps - 1
        buffer = minari.data_collector.EpisodeBuffer(
            id=k,
            observations={"b": np.stack([at, -at], 1), "a": {"y": at[:, None] / 2}},
            actions=rng.uniform(-1, 1, (steps, 2)).astype(np.float32),
            rewards=np.arange(1.0, steps + 1),
            terminations=last & (steps == 5),
            truncations=last & (steps == 8),
        )
        buffers.append(buffer)
    minari.create_dataset_from_buffers("toy/dict-v0", buffers, env="DictToy-v0", algorithm_name="random")
    monkeypatch.setattr(common, "make_env", lambda name: plain_env("DictToy-v0"))
    return tmp_path / "toy" / "dict-v0"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("by_path", [False, True])
def test_minari(toy_data, by_path):
    where = ("DictToy-v0", str(toy_data)) if by_path else ("toy/dict-v0",)
    data = common.load_dataset(*where)
    assert len(data) == 8 + 5 + 8 + 5  # time-limit rows are kept, their successor is known
    assert data.obs_dim == 3 and data.terminal.sum() == 2 and len(data.episode_returns) == 4
    np.testing.assert_array_equal(data.episode_returns, [36, 15, 36, 15])
    at = data.obs[:, 1]
    np.testing.assert_array_equal(data.obs, torch.stack([at / 2, at, -at], 1))  # keys in the order of the space
    np.testing.assert_array_equal(data.next_obs[:, 1], at + 1)  # no successor comes from another episode
    assert data.episode.tolist() == [0] * 8 + [1] * 5 + [2] * 8 + [3] * 5
    last = torch.zeros(26, dtype=bool)
    last[[7, 12, 20, 25]] = True
    assert torch.equal(data.next_action[~last], data.action[torch.where(~last)[0] + 1])
    assert torch.equal(data.next_action[last], data.action[last])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("left", ["nothing", "half"])
def test_minari_partial(toy_data, left):
    file = toy_data / "data" / "main_data.hdf5"
    if left == "nothing":
        for path in (toy_data / "data").iterdir():
            path.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(common.RunError, match="interrupted download.*'toy/dict-v0', force_download=True"):
        common.load_dataset("toy/dict-v0")
    with pytest.raises(common.RunError, match=f"its files are in {toy_data}/data$"):  # perhaps of no download
        common.load_dataset("DictToy-v0", str(toy_data))


def edited(episode, change):
    """`change` of the arrays of an episode in the file, by their names."""
    for name in ("actions", "rewards", "terminations", "truncations", "observations/b", "observations/a/y"):
        value = change(name, episode[name][()])
        del episode[name]
        if value is not None:
            episode[name] = value


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change, found",
    [
        (lambda name, value: value[: name.startswith("o")], 8 + 8 + 5),  # stopped before its first step
        (lambda name, value: np.where(np.arange(len(value)) == 5, np.nan, value.T).T if name[-1] == "b" else value, 26),
        (lambda name, value: np.r_[value.T, value.T].T if name[-1] == "b" else value, "rows of the shape .4., not .2."),
        (lambda name, value: None if name == "rewards" else value, "'rewards' doesn't exist.*its files are in"),
    ],
)
def test_minari_episodes_of_other_shapes(toy_data, change, found):
    with h5py.File(toy_data / "data" / "main_data.hdf5", "a") as file:
        edited(file["episode_1"], change)
    if isinstance(found, int):
        data = common.load_dataset("toy/dict-v0")
        assert len(data) == found and data.rows.isfinite().all()
    else:
        with pytest.raises(common.RunError, match=found):
            common.load_dataset("toy/dict-v0")


@pytest.mark.filterwarnings("ignore")
def test_minari_without_episodes(toy_data):
    with h5py.File(toy_data / "data" / "main_data.hdf5", "a") as file:
        file.clear()
    about = toy_data / "data" / "metadata.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | dict(total_episodes=0, total_steps=0)))
    with pytest.raises(common.UserError, match="'toy/dict-v0' holds no episodes"):
        common.load_dataset("toy/dict-v0")


def test_minari_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(common.UserError, match='end in a version.*"mujoco/hopper/medium-v0"'):
        common.load_dataset("mujoco/hopper/medium")
    minari = pytest.importorskip("minari")

    def offline(name):
        raise TimeoutError("no route\nto host")

    monkeypatch.setattr(minari, "download_dataset", offline)
    with pytest.raises(common.RunError, match="'mujoco/hopper/medium-v0' cannot be opened .*no route.*network"):
        common.load_dataset("mujoco/hopper/medium-v0")
    for text in ("pyarrow is not installed. Please", "no route\nto host"):
        monkeypatch.setattr(minari, "MinariDataset", lambda *args, text=text: (_ for _ in ()).throw(ImportError(text)))
        with pytest.raises(common.UserError, match=f"^Minari data need {text.splitlines()[0]}[^\n]*$"):
            common.make_env("ALE/Pong-v5")
    monkeypatch.undo()
    with pytest.raises(common.RunError, match="there is no .*; for an environment write my_module:ALE/Pong-v5"):
        common.make_env("ALE/Pong-v5")
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(common.UserError, match=r'need the package minari: pip install "minari\[hdf5,hf\]"'):
        common.load_dataset("mujoco/hopper/medium-v0")


# Built-in data


@pytest.mark.parametrize("level, low, high", [("random", -1350, -1100), ("medium", -700, -400), ("expert", -200, -130)])
def test_pendulum_demo(level, low, high):
    data = common.load_dataset(f"pendulum-demo-{level}")
    assert len(data) == 100 * 199 and len(data.episode_returns) == 100
    assert low < data.episode_returns.mean() < high
    assert 0.9 < data.action.abs().max() <= 1


@pytest.mark.parametrize(
    "level, low, high",
    [("random", -500, -100), ("medium", 1500, 3800), ("medium-expert", 2200, 4400), ("expert", 4300, 4800)],
)
def test_cheetah_demo(level, low, high, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(common.DEMO_EPISODES, "halfcheetah", 4)
    data = common.load_dataset(f"halfcheetah-demo-{level}")
    assert len(data) == 4 * 999 and data.obs_dim == 17 and data.action_dim == 6
    assert low < data.episode_returns.mean() < high


def test_demo_cache(tmp_path, monkeypatch, capsys):
    name = "halfcheetah-demo-medium-replay"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(common.DEMO_EPISODES, "halfcheetah", 4)
    first = common.load_dataset(name)
    assert "making halfcheetah" in capsys.readouterr().out
    assert first.episode_returns[3] > 1500 and first.episode_returns[0] < 500
    assert torch.equal(common.load_dataset(name).rows, first.rows)
    assert "making" not in capsys.readouterr().out
    [file] = (tmp_path / "offline-rl").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    assert torch.equal(common.load_dataset(name).rows, first.rows)
    np.savez(file, obs=np.zeros((9, 17)))
    assert torch.equal(common.load_dataset(name).rows, first.rows)

    (tmp_path / "plain").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "plain"))
    monkeypatch.setitem(common.DEMO_EPISODES, "halfcheetah", 1)
    assert len(common.load_dataset(name)) == 999
    assert "cannot cache" in capsys.readouterr().err


def load_and_compare(name, rows):
    for _ in range(3):
        assert torch.equal(common.load_dataset(name).rows, rows)  # never half a file


def test_cache_race(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(common.DEMO_EPISODES, "halfcheetah", 1)
    name = "halfcheetah-demo-expert"
    rows = common.load_dataset(name).rows
    [file] = (tmp_path / "offline-rl").iterdir()
    file.unlink()
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=load_and_compare, args=(name, rows)) for _ in range(3)]
    [worker.start() for worker in workers]
    [worker.join(60) for worker in workers]
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert list((tmp_path / "offline-rl").iterdir()) == [file]


def test_a_maze_without_a_success_is_shifted_too(tmp_path):
    raw = arrays() | dict(rewards=np.zeros(500, np.float32))
    data = common.load_dataset(HOPPER, write(tmp_path / "x.npz", raw))
    common.offset_rewards(data, -1)
    assert data.reward.unique().tolist() == [-1]


def test_states_that_come_again_by_chance_are_no_disorder(tmp_path, capsys):
    """Whole numbers: an episode may end where some row, but no episode, goes on."""
    obs = np.concatenate([1 + np.arange(30) % 29 + k for k in range(20)]).astype(np.float32)
    obs, ends = np.stack([obs, 0 * obs, 0 * obs], axis=1), np.arange(29, 600, 30)
    obs[::30, 1] = 1  # no other state is a start
    following = np.roll(obs, -1, axis=0)
    following[ends] = obs[ends - 20]
    raw = dict(observations=obs, actions=np.zeros((600, 1), np.float32), rewards=np.ones(600, np.float32))
    raw |= dict(terminals=np.zeros(600, bool), next_observations=following)
    data = common.load_dataset("pendulum-demo-medium", write(tmp_path / "x.npz", raw))
    assert "episodes end without a mark" in capsys.readouterr().out and data.episode is not None


def test_a_file_that_lacks_an_array_is_let_go(tmp_path):
    path = Path(write(tmp_path / "x.hdf5", without(arrays(), "rewards")))
    with pytest.raises(common.UserError, match="has no rewards") as kept:
        common.read_file(path)
    with h5py.File(path, "a") as file:
        file["rewards"] = np.zeros(500)
    assert kept and len(common.read_file(path)["reward"]) == 500


@pytest.mark.parametrize(
    "low, offset, expected", [(0, -1, [-1, 0]), (-1, -1, [-1, 0]), (-1, 1, [0, 1]), (-2, -1, [-3, -2])]
)
def test_mazes_whose_rewards_are_shifted_already_stay(tmp_path, capsys, low, offset, expected):
    raw = arrays()
    raw["rewards"] = (low + raw["terminals"]).astype(np.float32)
    data = common.load_dataset(HOPPER, write(tmp_path / "x.npz", raw))
    common.offset_rewards(data, offset)
    assert data.reward.unique().tolist() == expected
    assert ("left out" in capsys.readouterr().out) == (low == -1 and offset == -1)
