"""Whole updates equal the official code's: every variant, phase and `act` of tests/golden/*.json (README there).

Networks, data and random draws are made by the files' recipe; the draws are handed to the code in the order in which it
asks for them. GOLDEN=<folder> takes the files from another folder; `-s` prints the largest difference of each case.
"""

import importlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from common import Dataset

FOLDER = Path(os.environ.get("GOLDEN") or Path(__file__).parent / "golden")
LEARNERS = dict(dtql="DTQL", srpo="SRPO", cped="CPED", dac="DAC", qdq="QDQ", bdm_rebrac_sbc="BDM")
FILES = {script: json.loads((FOLDER / f"{script}.json").read_text()) for script in LEARNERS}
RENAMED = {  # fields of Args that have other names than in the files
    "dtql": {"lr": ("actor_lr", "behavior_lr")},
    "srpo": {"lr": ("critic_lr", "behavior_lr")},
    "dac": {"lr": ("actor_lr",)},
    "qdq": {"lr": ("actor_lr", "critic_lr")},
    "bdm_rebrac_sbc": dict.fromkeys(  # one mode each, see `between_modes`
        ("futures", "sampler", "critic_bc_reduce", "actor_q", "normalize_states", "critic_wd"), ()
    ),
    "cped": {},
}
TOLERANCE = 1e-8


def normal(key, shape):
    return torch.from_numpy(np.random.default_rng(key).standard_normal(shape))


def uniform(key, shape):
    return torch.from_numpy(np.random.default_rng(key).random(shape))


class Draws:
    """Hands prepared draws to torch's random functions, and fails where another kind or number is asked for."""

    def __init__(self, file, monkeypatch):
        self.file, self.patch, self.queue = file, monkeypatch, []

    def connect(self):
        self.patch.setattr(torch, "rand", lambda *shape, **_: self.take("uniform", shape))
        self.patch.setattr(torch, "randn", lambda *shape, **_: self.take("normal", shape))
        self.patch.setattr(torch, "randint", lambda *args, **_: self.take("integers", args[-1:], args[:-1]))
        self.patch.setattr(torch.Tensor, "exponential_", lambda x, **_: x.copy_(self.take("exponential", x.shape)))

    def prepare(self, roles, call):
        """Queue what one call should draw."""
        for name in roles:
            role = self.file["roles"][name]
            kind, shape, key = role["kind"], role["shape"], [self.file["seed"], 100 + call, role["number"]]
            limits = (0, role["rows"]) if kind == "index" else (role.get("low"), role.get("high"))
            value = normal(key, shape) if kind == "normal" else uniform(key, shape)
            if kind == "exponential":
                value = -torch.log1p(-value)
            elif kind in ("index", "integers"):
                kind, value = "integers", (limits[0] + (limits[1] - limits[0]) * value).floor().long()
            self.queue.append((name, kind, limits, value))

    def take(self, kind, shape, limits=()):
        name, expected, between, value = self.queue.pop(0)
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else tuple(shape)
        assert (kind, math.prod(shape)) == (expected, value.numel()), f"{name}: asked for {kind} {shape}"
        if kind == "integers":
            assert ((0, *limits)[-2:]) == between, f"{name}: asked for integers in {limits}"
        return value.reshape(shape)


class Case:
    """One variant of a file: its learner and data, and the comparison after each call."""

    def __init__(self, script, spec, monkeypatch):
        self.file, self.spec = FILES[script], spec
        self.module = importlib.import_module(script)
        self.seed, self.networks = self.file["seed"], self.file["networks"][spec["networks"]]
        self.draws = Draws(self.file, monkeypatch)
        monkeypatch.setattr(
            torch.nn.utils, "clip_grad_norm_", exact_clip
        )  # torch adds 1e-6 to the norm, optax does not
        if self.file.get("float_is_double", True):
            monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        names = RENAMED[script] | {name: [name] for name in self.module.Args.__dataclass_fields__}
        flags = {new: value for name, value in spec["flags"].items() for new in names[name]}
        self.args = self.module.Args(device="cpu", **flags)
        self.data = self.make_data()
        self.calls, self.worst = 0, 0.0

    def make_data(self):
        dims, seed = self.file["dims"], self.file["seed"]
        n, s, a = dims["rows"], dims["S"], dims["A"]
        action, next_action = (dims["max_action"] * torch.tanh(0.8 * normal([seed, i], (n, a))) for i in (501, 504))
        reward = dims.get("reward_scale", 1.0) * normal([seed, 502], (n, 1))
        terminal = (torch.arange(n) % 4 == 1).double()[:, None]
        obs, next_obs = normal([seed, 500], (n, s)), normal([seed, 503], (n, s))
        episode = (terminal.cumsum(0) - terminal).squeeze(1).long()
        rows = torch.cat([obs, action, reward, next_obs, next_action, terminal], 1)
        max_action = self.spec.get("max_action", dims["max_action"])
        return Dataset("golden", rows, s, a, episode, np.zeros(1), None, max_action)

    def make_learner(self):
        name = LEARNERS[self.module.__name__]
        name += "KL" if getattr(self.args, "behavior_reg", "") == "kl" else ""
        if name == "BDM":
            return between_modes(self)
        return getattr(self.module, name)(self.args, self.data, 0)

    def fill(self, learner):
        """Give the learner the recipe's weights; from here on random draws are the recipe's."""
        self.learner = learner
        if hasattr(learner, "use_returns"):
            x = 2 * uniform([self.seed, 505], (len(self.data), 1)) - 1
            learner.use_returns(torch.cat([self.data.obs, self.data.action, x], 1), torch.zeros(2))
        if hasattr(learner, "use_data"):
            learner.use_data(
                self.module.Futures(self.data, self.args.gamma, corrected=False), torch.zeros(()), torch.ones(())
            )
        tensors = self.tensors()
        for name, i, shape, shift, scale in self.networks:
            assert list(tensors[name].shape) == shape, name
            tensors[name].data.copy_(torch.as_tensor(shift) + scale * normal([self.seed, i], shape))
        for name, value in self.spec.get("set", {}).items():
            getattr(learner, name).copy_(torch.tensor(value))
        self.draws.connect()

    def tensors(self):
        found = {}
        for key, part in self.learner.state.items():
            if isinstance(part, torch.nn.Module):
                found |= {f"{key}.{name}": value for name, value in [*part.named_parameters(), *part.named_buffers()]}
        return found

    def call(self, method):
        """One call of an update, with exactly the draws that it should make."""
        order = self.spec.get("order") or self.file["our_order"].get(f"{method}_{self.spec['networks']}")
        self.draws.prepare(order or self.file["our_order"][method], self.calls)
        getattr(self.learner, method)()
        assert not self.draws.queue, f"not drawn: {self.draws.queue}"
        self.calls += 1
        self.metrics = self.learner.metrics.read()

    def compare(self):
        """Against the official numbers after so many calls, where the file has them."""
        want = self.spec["after"].get(str(self.calls), dict(tensors={}))
        tensors, index = self.tensors(), {name: i for name, i, *_ in self.networks}
        for name, (dot, norm, *first) in want["tensors"].items():
            value = tensors[name].detach()
            key = [self.seed, 1000 + index[name]]
            self.close(name, (value * normal(key, value.shape)).sum(), dot, norm)
            self.close(name, value.norm(), norm, norm)
            for got, entry in zip(value.flatten()[:4].tolist(), first):
                self.close(name, got, entry, norm / 1000)
        for name, value in want.get("metrics", {}).items():
            self.close(name, sum(self.metrics[part] for part in name.split(" + ")), value, 1e-3)
        for name, value in want.get("lr", {}).items():
            self.close(name, getattr(self.learner, name).param_groups[0]["lr"], value, 1e-3)
        for name, value in want.get("values", {}).items():
            self.close(name, getattr(self.learner, name), value, 1e-3)

    def close(self, name, got, want, size):
        difference = abs(float(got) - want) / max(abs(want), size)
        self.worst = max(self.worst, difference)
        assert difference < TOLERANCE, f"{name} after {self.calls} calls: {float(got)}, official {want}"


def between_modes(case):
    """A learner of the file's BDM variants, whose official side was patched, so that they lie between two modes.

    rebrac: --rebrac, but LayerNorm's eps is 1e-5 and the target actor follows the actor after its step. The others:
    --corrected, but futures (see `fill`), reverse chain and the critics' penalty are those of the author's code.
    """
    module, patch, flags = case.module, case.draws.patch, case.spec["flags"]
    patch.setattr(module, "CRITIC_DECAY", flags["critic_wd"])
    case.args.rebrac = flags.get("actor_q") == "min"
    case.args.corrected = not case.args.rebrac
    learner = module.BDM(case.args, case.data, 0)
    if case.args.rebrac:
        learner.target_first = False
        for layer in [*learner.critic.modules(), *learner.critic_target.modules()]:
            layer.eps = 1e-5
    else:
        chain, targets = module.reverse_chain, module.rebrac_target
        patch.setattr(module, "reverse_chain", lambda *inputs: chain(*inputs[:-1], False))
        patch.setattr(module, "rebrac_target", lambda *inputs: targets(*inputs[:-1], False))
    return learner


def exact_clip(parameters, max_norm):
    gradients = [parameter.grad for parameter in parameters]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    for gradient in gradients:
        gradient.mul_((max_norm / norm).clamp(max=1))


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def cases(kind, through_main=False):
    found = [
        (s, n) for s in FILES for n in FILES[s].get(kind, {}) if n != "soft_updated_actor"
    ]  # not the official code
    return [(s, n) for s, n in found if ("expected_updates" in FILES[s][kind][n]) == through_main]


@pytest.mark.parametrize(("script", "name"), cases("variants"))
def test_updates(script, name, monkeypatch):
    case = Case(script, FILES[script]["variants"][name], monkeypatch)
    case.data.reward.add_(getattr(case.args, "reward_offset", 0.0))
    case.fill(case.make_learner())
    for method, count in case.spec["phases"]:
        for _ in range(count):
            case.call(method)
            case.compare()
    assert case.worst > 0  # something was compared
    print(f"{case.worst:.1e}")


@pytest.mark.parametrize(("script", "name"), cases("variants", through_main=True))
def test_updates_through_main(script, name, monkeypatch):
    """What main() does around the updates: rewards, lengths of the phases, what happens between them."""
    case = Case(script, FILES[script]["variants"][name], monkeypatch)
    counts = [count for method, count in case.spec["phases"] if method != "start_from_behavior"]

    class Run:
        folders, asked = [], []

        def __init__(self, args, learners, data, script, protocol, phases):
            self.phases = phases
            case.fill(learners[0])

        def updates(self, phase, stride=1, evaluate=False, at_end=None):
            count = counts[len(self.asked)]
            self.asked.append([phase, self.phases[phase], stride])
            for i in range(count):
                yield
                if i < count - 1:
                    case.compare()
            if at_end:
                at_end()
            case.compare()

        def finish(self):
            assert self.asked == case.spec["expected_updates"]

    replaced = dict(Run=Run, load_dataset=lambda *_, **__: case.data, parse_args=lambda *_, **__: case.args)
    replaced |= dict(capture=lambda learners, method: lambda: case.call(method))
    for attribute, value in replaced.items():
        monkeypatch.setattr(case.module, attribute, value)
    case.module.main()
    assert case.worst > 0
    print(f"{case.worst:.1e}")


@pytest.mark.parametrize(("script", "name"), cases("act"))
def test_act(script, name, monkeypatch):
    case = Case(script, FILES[script]["act"][name], monkeypatch)
    case.fill(case.make_learner())
    for k, want in enumerate(case.spec["actions"]):
        case.draws.prepare(case.spec["order"], k)
        with torch.no_grad():
            got = case.learner.act(case.data.obs[: len(want)], None)
        assert not case.draws.queue
        torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("script", "name"), cases("functions"))
def test_functions(script, name, monkeypatch):
    case = Case(script, FILES[script]["functions"][name], monkeypatch)
    case.fill(case.make_learner())
    case.draws.prepare(case.spec["order"], 0)
    rows = slice(len(case.spec["values"]))
    with torch.no_grad():
        got = getattr(case.learner, name)(case.data.obs[rows], case.data.action[rows], None)
    torch.testing.assert_close(got, torch.tensor(case.spec["values"]), rtol=1e-9, atol=1e-9)
