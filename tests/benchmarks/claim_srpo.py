"""SRPO: a policy from a frozen diffusion model, actions without sampling (Sec. 3, 6.2; Eq. 10, 14, 15; Fig. 1 to 5).

    python tests/benchmarks/claim_srpo.py                          # 4 CPU minutes; writes tests/{figures,results}
    python tests/benchmarks/claim_srpo.py --seeds 0                # other seeds write to runs/claims instead
    python tests/benchmarks/claim_srpo.py --scene bandit-rings     # Fig. 3 on any scene: runs/claims/bandit-rings.png

Extraction holds on the exact score, with three limits; a score learned briefly is off by more than any of them.

The policy phase moves free actions on behaviours whose score is known, N(-0.3, 0.2^2), two modes at +-0.8 and eight
Gaussians: on the exact score, where closed forms and quadrature say where they must end, and on small behaviour models
after 1,500 calls of behavior_update (three seeds; undertrained, so that the error of learning is large).

                                                    predicted             exact score           learned scores
    omega = sigma^2, N(-0.3, 0.2^2): end at beta    -0.225, 0.129, 0.511  -0.226, 0.130, 0.511  -0.29 to -0.07, 0.10
    0.01, 0.1, 1                                                                                to 0.22, 0.51 to 0.53
    modes at +-0.8, no Q, from 0.3: sigma^2         0                     -0.01                 -0.21 to 0.08
    the same, alpha / sigma at t = 0.02 (Eq. 10)    0.80                  0.80                  0.74 to 0.77
    variance of the gradient, sigma^2, std 0.2:     0.641, 0.00017        0.646, 0.0002         0.57 to 0.70, 0.002 to
    without, with the baseline                                                                  0.003
    the same, alpha / sigma, std 0.5                0.268, 2.82           0.266, 2.86           0.26 to 0.39, 2.6 to 3.0

Limits: sigma^2, the paper's choice, leaves actions between modes (eight Gaussians, beta 0.1: 12 of 49 on a mode, with
Eq. 10 all 49); scores learned this briefly do not separate the eight modes, which moves the ends of Eq. 10 by 0.6 to
1.0 on average, those of sigma^2 over all t by 0.1 (as in Fig. 5); and the baseline saves noise with sigma^2 but adds
some with alpha / sigma.

Acting: a pass of SRPO's policy against samples of its own behaviour model, both of the paper's size, one busy CPU
thread. 0.14 MFLOP: 0.87 %, 0.29 % and 0.087 % of 5, 15 and 50 calls of the behaviour model, 0.013 % of 64 candidates by
5 calls; in one state 80, 234, 813 and 336 times faster (256 states: 161, 485, 1,648 times for 5, 15, 50 calls). The
paper's factors, 25 to 1,000 and 0.25 % to 0.01 % of the FLOPs, are against other methods and, for times, on a GPU.

In place of the policy network there are free points, one for each target (Q = -|a - target|^2) and temperature, as in
the paper, which says neither t nor optimiser nor length; its targets are read off its figure.
"""

import argparse
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

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from common import Batch, load_dataset, save_figure  # noqa: E402
from srpo import OMEGA, POLICY_T, SRPO, Args, adam, schedule, score_gradient  # noqa: E402

SEEDS, UPDATES = [0, 1, 2], 1500  # behaviour models, and updates of each with batches of 256
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
GRID = torch.linspace(-4.5, 4.5, 7)
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


class Points(torch.nn.Module):
    """Free points [P, A] in place of an actor; row i of a batch belongs to point i mod P."""

    def __init__(self, start):
        super().__init__()
        self.points = torch.nn.Parameter(start.clone())

    def forward(self, obs):
        return self.points[torch.arange(len(obs)) % len(self.points)]


def learn(learner):
    learner.behavior.freqs.mul_(0.1)  # smoother in t, so that a short training suffices
    for _ in range(UPDATES):
        learner.behavior_update()
    return learner.behavior


def extract(learner, behavior, start, beta, q):
    """The policy phase against a frozen behaviour and a known q(action [B, A]) [B]: where points [P, A] with a beta [P]
    each end."""
    learner.behavior, before = behavior, [p.clone() for p in behavior.parameters()]
    learner.critic_target = lambda obs, action: q(action)[None]
    learner.actor = Points(start)
    learner.actor_opt = adam(learner.actor.parameters(), learner.args.actor_lr)
    learner.args.beta = beta[torch.arange(learner.args.batch_size) % len(beta), None]
    for _ in range(learner.args.steps):
        learner.policy_update()
    assert all(map(torch.equal, before, behavior.parameters()))
    return learner.actor.points.detach()


def line(behavior, seed, rows, settings):
    """Ends [7]: in state 0 one action for each beta under Q = -(a - 0.6)^2, in state 1 one without Q."""
    obs = torch.tensor([[0.0]] * len(BETAS) + [[1.0]]).repeat(rows, 1)
    data = SimpleNamespace(obs_dim=1, action_dim=1, max_action=1.0, sample=lambda *_: Batch(obs, *[None] * 5))
    args = Args(device="cpu", hidden=8, behavior_hidden=8, batch_size=len(obs), steps=300, actor_lr=0.02, **settings)
    start = torch.tensor([[-0.3]] * len(BETAS) + [[0.3]])
    q = lambda action: -((action[:, 0] - 0.6) ** 2)
    return extract(SRPO(args, data, seed), behavior, start, torch.tensor([*BETAS, 0.0]), q)[:, 0]


def plane(behavior, seed, rows, settings, scene="bandit-8gaussians", betas=(1.0, 0.1)):
    """The paper's 2-D example, from each target: ends [betas, 49, 2], and its behaviour, learned if none is given."""
    start = TARGETS.repeat(len(betas), 1)
    args = dict(weighting="alpha/sigma", fixed_t=0.02, subtract_baseline=False) | settings
    args |= dict(device="cpu", hidden=8, behavior_hidden=64, dropout=0.0, behavior_batch_size=256, behavior_lr=1e-3)
    learner = SRPO(Args(**args, batch_size=rows * len(start), steps=300, actor_lr=0.05), load_dataset(scene), seed)
    target = start.repeat(rows, 1)
    q = lambda action: -((action - target) ** 2).sum(-1)
    behavior = behavior or learn(learner)
    ends = extract(learner, behavior, start, torch.tensor(betas).repeat_interleave(len(TARGETS)), q)
    return ends.view(len(betas), len(TARGETS), 2), behavior


def noise(behavior, state, weighting, n=200_000):
    """Variance of the policy's gradient at the mean of a Gaussian, [2] without and with the baseline."""
    action, obs, variances = POLICIES.means[state, :1].repeat(n, 1), torch.full((n, 1), float(state)), []
    for subtract in (False, True):
        generator = torch.Generator().manual_seed(0)
        pull = score_gradient(behavior, obs, action, generator, weighting, subtract_baseline=subtract)
        variances.append(pull.var())
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


def extraction(seeds):
    """For each experiment: known, found on the exact score, found by each learned model; samples of the first one."""
    small = Args(device="cpu", hidden=8, behavior_hidden=32, behavior_batch_size=256, behavior_lr=1e-3, dropout=0.0)
    models, found = [learn(SRPO(small, POLICIES, seed)) for seed in seeds], {}
    for name, (settings, end) in LINE.items():
        known = [*fixed_points(torch.tensor(BETAS), settings), end]
        learned = [line(model, seed, 64, settings) for model, seed in zip(models, seeds)]
        found[name] = known, line(POLICIES, 0, 192, settings), learned
    for name, (weighting, state) in NOISE.items():
        known = quadrature(POLICIES.std[state].item(), weighting)[1:]
        found[name] = known, noise(POLICIES, state, weighting), [noise(model, state, weighting) for model in models]
    models = [None] * len(seeds)
    for name, (settings, known) in PLANE.items():
        learned, models = zip(*(plane(model, seed, 4, settings) for model, seed in zip(models, seeds)))
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


def draw(found, samples, costs, path):
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
        panel.plot(x, scores, "x", color="C1", label=[(None, "learned scores")[k]] + [None] * (len(scores[0]) - 1))
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
    figure.savefig(path, dpi=72, pil_kwargs=dict(compress_level=9))


def sweep(scene, path, betas=(10.0, 1.0, 0.1)):
    """The paper's figure: the data, then for each temperature lines from the targets to the extracted points."""
    ends, _ = plane(None, 0, 8, {}, scene, betas)
    data = load_dataset(scene).action[::2]

    def panel(axes, k):
        axes.scatter(*data.T, s=1, color="C0", alpha=0.3)
        if k >= 0:
            for target, end in zip(TARGETS, ends[k]):
                axes.plot(*torch.stack([target, end]).T, color="grey", linewidth=0.5)
            axes.scatter(*TARGETS.T, s=6, color="grey")
            axes.scatter(*ends[k].T, s=14, color="C2", zorder=3)
        axes.set(xlim=(-5, 5), ylim=(-5, 5), aspect="equal", title=f"beta = {betas[k]:g}" if k >= 0 else scene)

    save_figure(path, *(lambda axes, k=k: panel(axes, k) for k in range(-1, len(betas))))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--scene", help="draw the paper's figure on this scene, and nothing else")
    args = parser.parse_args()
    runs = ROOT / "runs/claims"
    runs.mkdir(parents=True, exist_ok=True)
    if args.scene:
        return sweep(args.scene, runs / f"{args.scene}.png")
    committed = args.seeds == SEEDS  # any other run leaves the committed files alone
    (found, samples), costs = extraction(args.seeds), {n: acting(n) for n in (1, 256)}
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
    draw(found, samples, costs, (ROOT / "tests/figures" if committed else runs) / "srpo.png")
    about = dict(command=" ".join(["python tests/benchmarks/claim_srpo.py", *sys.argv[1:]]), torch=torch.__version__)
    about |= dict(seeds=args.seeds, updates=UPDATES)
    about |= dict(cpu_seconds=round(time.process_time()), order="known, exact score, learned scores by seed")
    for name, (known, exact, learned) in found.items():
        parts = [torch.as_tensor(part).double() for part in (known, exact, torch.stack(learned))]
        about[name] = [(part * 1e5).round().div(1e5).tolist() for part in parts]
    about |= {f"FLOPs and microseconds per action, {n} states at once": table for n, table in costs.items()}
    text = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in about.items())
    ((ROOT / "tests/results" if committed else runs) / "claim_srpo.json").write_text(f"{{\n{text}\n}}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
