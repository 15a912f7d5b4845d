"""SRPO: a policy from a frozen diffusion model, actions without sampling (Sec. 3, 6.2; Eq. 10, 14, 15; Fig. 1 to 5).

    python tests/benchmarks/claim_srpo.py     # 5 CPU minutes; tests/figures/srpo.png, tests/results/claim_srpo.json

Extraction: the policy phase moves free actions on behaviours whose score is known, N(-0.3, 0.2^2), two modes at +-0.8
and eight Gaussians. It runs on the exact score, where closed forms and quadrature say where the actions must end, and
on small behaviour models after 1,500 calls of behavior_update; the gap between the two is the error of learning.

On the exact score the actions end where they should, with Eq. 10 all on a mode. Three limits show: omega = sigma^2, the
paper's choice, leaves actions between the modes; scores learned this briefly do not separate the eight modes yet, which
moves the ends of Eq. 10 by 0.8 to 1.8 on average, those of sigma^2 over all t by 0.1 (as in Fig. 5); and the baseline
saves noise with sigma^2 but adds some with alpha / sigma.

Acting: a pass of SRPO's policy against samples of its own behaviour model, both of the paper's size, one CPU thread.
The paper's factors are against other methods, times on a GPU: 25 to 1000 times faster, 0.25 % to 0.01 % of the FLOPs.
"""

import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS.parent))
from common import Batch  # noqa: E402
from srpo import (  # noqa: E402
    BANDIT,
    GRID,
    OMEGA,
    POLICY_T,
    SRPO,
    Args,
    BanditSRPO,
    Points,
    bandit,
    policy_loss,
    schedule,
)

SEEDS, UPDATES = (0, 1, 2), 1500  # behaviour models, and updates of each with batches of 256
BETAS = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
LINE = {  # settings in one dimension, and the end from 0.3 between the two modes when Q is flat (quadrature)
    "σ⁴": (dict(weighting="sigma4"), 0.0), "σ²": (dict(weighting="sigma2"), 0.0),
    "σ², no baseline": (dict(weighting="sigma2", subtract_baseline=False), 0.0), "1": (dict(weighting="one"), 0.536),
    "α/σ": (dict(weighting="alpha/sigma"), 0.752),
    "α/σ at t = 0.02": (dict(weighting="alpha/sigma", fixed_t=0.02), 0.8),
}  # fmt: skip
PLANE = {  # settings on eight Gaussians, and ends from four targets for beta 1 and 0.1 (quadrature)
    "α/σ at t = 0.02, Eq. 10": (dict(), [[(0, 3.176), (0, 2.553), (3.176, 0.312), (2.208, 2.208)],
                                         [(0, 2.872), (0, 2.795), (2.872, 0.038), (2.026, 2.026)]]),
    "σ² over all t": (dict(weighting="sigma2", fixed_t=None, subtract_baseline=True),
                      [[(0, 4.264), (0, 1.474), (4.255, 1.412), (2.848, 2.848)],
                       [(0, 3.111), (0, 1.319), (3.070, 0.999), (2.099, 2.099)]]),
}  # fmt: skip
NOISE = {"σ², std 0.2": ("sigma2", 0), "σ², std 0.5": ("sigma2", 2), "α/σ, std 0.5": ("alpha/sigma", 2)}
TARGETS = torch.cartesian_prod(GRID, GRID)
KNOWN_TARGETS = [27, 25, 46, 40]  # (0, 4.5), (0, 1.5), (4.5, 1.5), (3, 3)


class Mixture(torch.nn.Module):
    """In each state equally likely Gaussians, means [S, K, A] and std [S]: batches of them, and their exact score."""

    obs_dim, max_action = 1, 1.0

    def __init__(self, means, std):
        super().__init__()
        self.means, self.std, self.action_dim = torch.as_tensor(means), torch.tensor(std), len(means[0][0])

    def sample(self, n, generator):
        state, mode = (torch.randint(high, (n,), generator=generator) for high in self.means.shape[:2])
        noise = torch.randn(n, self.action_dim, generator=generator)
        return Batch(state[:, None].float(), self.means[state, mode] + self.std[state, None] * noise, *[None] * 4)

    def forward(self, x, obs, t):
        (alpha, sigma), state = schedule(t), obs[:, 0].long()
        gap, variance = x[:, None] - alpha[:, None] * self.means[state], (alpha * self.std[state, None]) ** 2 + sigma**2
        likely = torch.softmax(-(gap**2).sum(-1) / (2 * variance), 1)
        return sigma * (likely[..., None] * gap).sum(1) / variance


ANGLE = torch.arange(8) * torch.pi / 4
EIGHT = Mixture(4 / 1.414 * torch.stack([ANGLE.cos(), ANGLE.sin()], 1)[None], [0.5 / 1.414])
POLICIES = Mixture([[[-0.3], [-0.3]], [[-0.8], [0.8]], [[0.0], [0.0]]], [0.2, 0.05, 0.5])  # states 0, 1, 2


def learn(learner):
    learner.behavior.freqs.mul_(0.1)  # smoother in t, so that a short training suffices
    for _ in range(UPDATES):
        learner.behavior_update()
    return learner.behavior


def extract(learner, behavior):
    """The policy phase against a frozen behaviour: where the free actions end."""
    learner.behavior, before = behavior, [p.clone() for p in behavior.parameters()]
    for _ in range(learner.args.steps):
        learner.policy_update()
    assert all(map(torch.equal, before, behavior.parameters()))
    return learner.actor.points.detach()


def line(behavior, seed, rows, settings):
    """Ends [7]: in state 0 one action for each beta under Q = -(a - 0.6)^2, in state 1 one without Q."""
    obs = torch.tensor([[0.0]] * len(BETAS) + [[1.0]]).repeat(rows, 1)
    data = SimpleNamespace(obs_dim=1, action_dim=1, max_action=1.0, sample=lambda *_: Batch(obs, *[None] * 5))
    learner = SRPO(Args(device="cpu", hidden=8, behavior_hidden=8, steps=300, **settings), data, seed)
    learner.args.actor_lr, learner.beta = 0.02, torch.tensor([*BETAS, 0.0]).repeat(rows)[:, None]
    learner.critic_target = lambda obs, action: -((action - 0.6) ** 2).T
    learner.actor = Points(torch.tensor([[-0.3]] * len(BETAS) + [[0.3]]))
    learner.actor_opt = learner.adam(learner.actor.parameters(), 0.02)
    return extract(learner, behavior)[:, 0]


def plane(behavior, seed, rows, settings):
    """The bandit of the script, ends [2, 49, 2] for beta 1 and 0.1, and its behaviour, learned if none is given."""
    args = BANDIT | dict(env="bandit-8gaussians", device="cpu", hidden=8, behavior_batch_size=256, steps=300)
    learner = BanditSRPO(Args(**args | settings | dict(batch_size=147 * rows)), bandit("bandit-8gaussians"), seed)
    behavior = behavior or learn(learner)
    return extract(learner, behavior).view(3, 49, 2)[1:], behavior


def noise(behavior, state, weighting, n=200_000):
    """Variance of the policy's gradient at the mean of a Gaussian, [2] without and with the baseline."""
    action, obs, variances = POLICIES.means[state, :1].repeat(n, 1), torch.full((n, 1), float(state)), []
    for subtract in (False, True):
        action, generator = action.detach().requires_grad_(), torch.Generator().manual_seed(0)
        loss = policy_loss(behavior, obs, action, 0.0, 1.0, generator, weighting, subtract_baseline=subtract)
        variances.append((n * torch.autograd.grad(loss, action)[0]).var())
    return torch.stack(variances)


def quadrature(std, weighting, fixed_t=None, subtract_baseline=True):
    """Of one Gaussian: c in the score's mean pull c (a - m), and what `noise` should find."""
    t = torch.linspace(*(POLICY_T if fixed_t is None else (fixed_t, fixed_t)), 100_001, dtype=torch.float64)
    alpha, sigma = schedule(t)
    omega, signal = OMEGA[weighting](alpha, sigma), (alpha * std) ** 2
    pull, plain, less = (omega * term / (signal + sigma**2) for term in (alpha * sigma, sigma**2, signal))
    return pull.mean().item(), (plain**2).mean().item(), (less**2).mean().item()


def fixed_points(beta, settings):
    c = quadrature(0.2, **settings)[0]
    return (2 * beta * 0.6 - 0.3 * c) / (2 * beta + c)


def extraction():
    """For each experiment: known, found on the exact score, found by each learned model; samples of the last one."""
    small = Args(device="cpu", hidden=8, behavior_hidden=32, behavior_batch_size=256, lr=1e-3, dropout=0.0)
    models, found = [learn(SRPO(small, POLICIES, seed)) for seed in SEEDS], {}
    for name, (settings, end) in LINE.items():
        known = [*fixed_points(torch.tensor(BETAS), settings), end]
        learned = [line(model, seed, 64, settings) for model, seed in zip(models, SEEDS)]
        found[name] = known, line(POLICIES, 0, 192, settings), learned
    for name, (weighting, state) in NOISE.items():
        known = quadrature(POLICIES.std[state].item(), weighting)[1:]
        found[name] = known, noise(POLICIES, state, weighting), [noise(model, state, weighting) for model in models]
    models = [None] * len(SEEDS)
    for name, (settings, known) in PLANE.items():
        learned, models = zip(*(plane(model, seed, 4, settings) for model, seed in zip(models, SEEDS)))
        found[name] = known, plane(EIGHT, 0, 32, settings)[0], learned
    with torch.no_grad():
        return found, denoise(models[0], torch.zeros(5_000, 1), 50, 2)


def denoise(behavior, obs, calls, action_dim):
    """Actions of the behaviour model in `calls` first-order steps (DDIM) from t = 1 to 0.001."""
    x = torch.randn(len(obs), action_dim)
    for t, after in pairwise(torch.linspace(1, 1e-3, calls + 1)):
        (alpha, sigma), (alpha_after, sigma_after) = schedule(t), schedule(after)
        eps = behavior(x, obs, t.expand(len(x), 1))
        x = alpha_after * (x - sigma * eps) / alpha + sigma_after * eps
    return x


@torch.no_grad()
def acting(n):
    """FLOPs and CPU time to act in n states of HalfCheetah's size: the policy, then the behaviour model."""
    data = SimpleNamespace(obs_dim=17, action_dim=6, max_action=1.0)
    learner, obs, costs = SRPO(Args(device="cpu"), data, 0), torch.randn(n, 17), {}

    def candidates():  # as IDQL acts: five calls for each of 64 candidates, then the best by Q
        many = obs.repeat(64, 1)
        action = denoise(learner.behavior, many, 5, 6)
        return action[learner.critic_target(many, action).amin(0).argmax()]

    ways = {"policy": lambda: learner.act(obs, None)}
    ways |= {f"{calls} calls": lambda calls=calls: denoise(learner.behavior, obs, calls, 6) for calls in (5, 15, 50)}
    ways |= {"5 calls x 64": candidates} if n == 1 else {}
    for name, act in ways.items():
        with FlopCounterMode(display=False) as counter:
            act()
        times, end = [], time.process_time() + 1.5
        while len(times) < 5 or time.process_time() < end:
            start = time.process_time()
            act()
            times.append(time.process_time() - start)
        costs[name] = counter.get_total_flops() / n, 1e6 * median(times) / n
    return costs


def on_modes(ends):
    """How many of the 49 actions for beta 0.1 are within two standard deviations of a mode."""
    return int((torch.cdist(ends[1], EIGHT.means[0]).amin(1) < 2 * EIGHT.std).sum())


def draw(found, samples, costs):
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    known, exact, learned = ({name: row[k] for name, row in found.items()} for k in range(3))
    hollow = dict(linestyle="", marker="o", markerfacecolor="none")

    for panel, name in zip(axes, PLANE):
        panel.hist2d(*samples.T.numpy(), bins=40, range=[[-4.7, 4.7]] * 2, cmap="Blues", vmax=50)
        for target, end in zip(TARGETS, learned[name][0][1]):
            panel.plot(*torch.stack([target, end]).T, color="grey", linewidth=0.4)
        panel.plot(*TARGETS.T, ".", color="grey", markersize=3, label="target: argmax Q")
        panel.plot(*exact[name][1].T, color="black", label="action, exact score", **hollow)
        panel.plot(*learned[name][0][1].T, ".", color="C1", label="action, learned score")
        counts = sorted(map(on_modes, learned[name]))
        panel.set(aspect="equal", xticks=[], yticks=[], title=f"8 Gaussians, {name}")
        panel.set_xlabel(f"on a mode: exact {on_modes(exact[name])} of 49, learned {counts[0]} to {counts[-1]}")
    axes[0].legend(loc="lower left", fontsize=8, framealpha=0.9)

    panel, beta = axes[2], torch.logspace(-2, 0, 50)
    for i, name in enumerate(name for name in LINE if "baseline" not in name):
        panel.plot(beta, fixed_points(beta, LINE[name][0]), color=f"C{i}", label=f"ω = {name}")
        panel.plot(BETAS, exact[name][:-1], color=f"C{i}", **hollow)
        panel.plot(BETAS, torch.stack(learned[name]).T[:-1], "x", color=f"C{i}", markersize=5)
    panel.set(xscale="log", title="N(-0.3, 0.2²), Q = -(a - 0.6)²")
    panel.set_xlabel("beta (line predicted, o exact, x learned)")
    panel.legend(fontsize=8)

    panel, row = axes[3], range(len(LINE))
    panel.axvspan(0.7, 0.9, color="C0", alpha=0.15, label="the mode, ± 2 std")
    panel.plot([known[name][-1] for name in LINE], row, "|", markersize=22, markeredgewidth=3, label="predicted")
    panel.plot([exact[name][-1] for name in LINE], row, color="black", label="exact score", **hollow)
    ends = torch.stack([torch.stack(learned[name])[:, -1] for name in LINE], 1)
    panel.plot(ends.T, row, "x", color="C1", label=["learned scores"] + [None] * (len(ends) - 1))
    panel.set(yticks=row, yticklabels=LINE, xlim=(-0.6, 1), title="Modes at ±0.8, no Q, start at 0.3")
    panel.set_xlabel("action in the end")
    panel.legend(loc="lower right", bbox_to_anchor=(1, 0.03), fontsize=8)

    panel = axes[4]
    for k, kind in enumerate(("without baseline", "with (Eq. 15)")):
        x, pick = torch.arange(len(NOISE)) + 0.4 * k - 0.2, lambda part, k=k: [part[name][k] for name in NOISE]
        panel.bar(x, pick(exact), 0.36, color=("C7", "C2")[k], label=kind)
        panel.plot(x, pick(known), "_", color="black", markersize=28, label=(None, "predicted")[k])
        scores = [[row[k] for row in learned[name]] for name in NOISE]
        panel.plot(x, scores, "x", color="C1", label=[(None, "learned scores")[k]] + [None] * (len(SEEDS) - 1))
    panel.set(yscale="log", ylim=(5e-5, 100), xticks=range(len(NOISE)), xticklabels=NOISE)
    panel.set_title("Variance of the gradient, one sample")
    panel.legend(fontsize=8, ncols=2)

    panel = axes[5]
    for k, (n, table) in enumerate(costs.items()):
        times = [micro for _, micro in table.values()]
        bars = panel.barh([-i - 0.4 * k for i in range(len(times))], times, 0.38, label=f"{n} state{'s' * k} at once")
        panel.bar_label(bars, [f"{micro / times[0]:,.0f} x" for micro in times], padding=3, fontsize=8)
    panel.set(
        xscale="log",
        xlim=(None, 1e7),
        yticks=[-i - 0.2 for i in range(len(costs[1]))],
        title="Time to act, factor beside the policy",
    )
    panel.set_yticklabels([f"{name}\n{flops / 1e6:,.1f} MFLOP" for name, (flops, _) in costs[1].items()])
    panel.set_xlabel("microseconds per action, one CPU thread")
    panel.legend(fontsize=8)
    figure.savefig(TESTS / "figures" / "srpo.png", dpi=72, pil_kwargs=dict(compress_level=9))


def main():
    (found, samples), costs = extraction(), {n: acting(n) for n in (1, 256)}
    text = lambda ends: " ".join(f"{x:7.4f}" for x in torch.as_tensor(ends).flatten().tolist())
    for name, (known, exact, learned) in found.items():
        print(name)
        if name in PLANE:
            print(f"    on a mode at beta 0.1: exact {on_modes(exact)} of 49, learned", *map(on_modes, learned))
            far = [(ends - exact).norm(dim=-1).mean().item() for ends in learned]
            print("    distance of learned from exact, mean of 98 ends:", *(f"{x:.3f}" for x in far))
            exact, learned = exact[:, KNOWN_TARGETS], [ends[:, KNOWN_TARGETS] for ends in learned]
        print("    known  ", text(known))
        for kind, ends in zip(("exact  ", *["learned"] * len(learned)), (exact, *learned)):
            print("   ", kind, text(ends), f"  largest error {(ends - torch.tensor(known)).abs().max():.4f}")
    for n, table in costs.items():
        flops, micro = table["policy"]
        for name, (f, m) in table.items():
            print(f"{n:3} states, {name:22} {f:13,.0f} FLOP, policy {flops / f:8.4%} {m:9.1f} us, {m / micro:6.1f} x")
    draw(found, samples, costs)
    about = dict(command="python tests/benchmarks/claim_srpo.py", torch=torch.__version__, seeds=SEEDS, updates=UPDATES)
    about |= dict(cpu_seconds=round(time.process_time()), order="known, exact score, learned scores by seed")
    for name, (known, exact, learned) in found.items():
        parts = [torch.as_tensor(part).double() for part in (known, exact, torch.stack(learned))]
        about[name] = [(part * 1e5).round().div(1e5).tolist() for part in parts]
    about |= {f"FLOPs and microseconds per action, {n} states at once": table for n, table in costs.items()}
    text = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in about.items())
    (TESTS / "results" / "claim_srpo.json").write_text(f"{{\n{text}\n}}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
