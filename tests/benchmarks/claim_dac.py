"""DAC's claims where the answer is known: what the noise regression samples, and soft against hard guidance.

    python tests/benchmarks/claim_dac.py              # 3 to 6 minutes of a core; writes tests/{figures,results}
    python tests/benchmarks/claim_dac.py --seeds 0    # a third of it; writes to runs/claims instead

Part A, Theorems 1 and 2: noise regression with the target eps - w_t grad Q(x_t) / eta gives a diffusion model of
pi* ~ mu exp(Q / eta). Here mu is a mixture of two Gaussians and Q is linear, so pi* is again such a mixture. Compared
with it, in total variation (TV) and in the mass of the right mode:
  - "right score": the exact predictor of noised pi*, sampled by `denoise`. Its error is that of T steps alone.
  - "Eq. 15": the exact fixed point of the regression, data score + grad Q(x_t) / eta. The theorem takes this for the
    score of noised pi*, which is data score + grad_x log E[exp(Q(a) / eta) | x_t]. They agree at t = 0 only.
  - "learnt": the script's Actor trained by its actor_step with --guidance-scale 2 (that is Eq. 15) and a fixed eta.
For Gaussian data and linear Q both means are known: pi* moves by std^2 / eta, the fixed point by K times that.
Result: K = 4.5 (std 0.2) even for T = 1,000, and 10.2 for T = 5: the regression moves and reweighs the modes as pi* of
a far smaller eta would. The learnt actor has the mode masses of Eq. 15, not of pi*. Its shape is blurred after 1,000
updates, and under strong guidance without a cut of x_0 its chain runs off to x_t that noised data hardly visit.

    mass of the right mode; TV to pi*   pi*     right score   fixed point of Eq. 15   learnt, 3 seeds
    eta = 2, T = 50                     0.417   0.419; 0.03   0.619; 0.21             0.60 to 0.62; 0.25 to 0.30
    eta = 0.5, T = 50                   0.763   0.757; 0.03   0.997; 0.58             0.99 to 1.00; 0.75 to 0.90
    eta = 2, T = 5                      0.417   0.432; 0.17   0.688; 0.34             0.69 to 0.70; 0.41 to 0.42
    eta = 0.5, T = 5                    0.763   0.762; 0.18   0.968; 0.61             0.98; 0.50 to 0.52

With T = 50 the fixed point at eta = 2 is nearly the pi* of eta = 0.75: eta is a knob, not the theorem's temperature.

Part B, the bandit with three Gaussians, Q its true mean reward: soft guidance stays on the data, hard and denoised
guidance leave it. All share seeds and the dual ascent's b = 1.3; "none" is the same actor without guidance. Beside them
the exact fixed points for all strengths, because a comparison at one b also compares strengths.
Result: as the paper says at equal b: on data 76 to 78 % without guidance, soft 64 to 66 %, hard 17 to 19 %, denoised 0.
With equal parts on data the exact ones earn nearly the same (90 %: -0.65 and -0.69): mostly, hard is the stronger one.
Rewards: soft -0.68, hard -0.41, denoised -0.01.
Smaller than the script's bandits: T = 20, 1,500 updates of 512 (denoised: 300), learning rate 3e-3.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))
import dac  # noqa: E402
from common import Batch, load_dataset  # noqa: E402
from dac import BANDIT, DAC, Args, denoise, noise_schedule  # noqa: E402

dac.update_target = lambda target, net, tau: None  # Q is known

ROOT, SEEDS = Path(__file__).parents[2], (0, 1, 2)
OPTIMUM = (0.4, -0.4)  # best action of the bandit
ETAS, MEANS, WEIGHTS, STD = (2.0, 0.5), torch.tensor([[-0.5], [0.5]]), torch.tensor([0.7, 0.3]), 0.2
SAMPLERS = {5: 1.0, 50: None}  # T, and the cut of x_0: the paper's and the bandits'
EDGES = torch.linspace(-1.6, 1.6, 41)
CENTERS, GUIDANCE, BANDIT_T = (
    torch.tensor([[-0.6, 0.6], [0.4, 0.4], [-0.4, -0.4]]),
    ("none", "soft", "hard", "denoised"),
    20,
)


def mixture_noise(means, weights, std, steps, guide=lambda x, w: 0.0):
    """The exact noise predictor of a mixture of Gaussians, less `guide(x_t, w_t)`."""

    def net(x, obs, t):
        alpha_bar = noise_schedule(steps)[1][int(t)]
        var, w = alpha_bar * std**2 + 1 - alpha_bar, math.sqrt(1 - alpha_bar)
        pull = math.sqrt(alpha_bar) * means - x[:, None]  # [n, modes, A]
        mode = (weights.log() - pull.square().sum(-1) / (2 * var)).softmax(-1)
        return -w * (mode[..., None] * pull).sum(1) / var - guide(x, w)

    return net


def draw(net, n, dim, steps, clip):
    with torch.no_grad():
        return denoise(net, torch.zeros(n, 1), dim, steps, torch.Generator().manual_seed(0), clip)


def tilted(eta):
    """Means and weights of pi*: each mode moves by std^2 / eta and gains a factor exp(mean / eta)."""
    weights = WEIGHTS * torch.exp(MEANS[:, 0] / eta)
    return MEANS + STD**2 / eta, weights / weights.sum()


def masses(eta):
    """Mass of pi* in each bin."""
    means, weights = tilted(eta)
    return (weights @ torch.distributions.Normal(means, STD).cdf(EDGES)).diff()


def histogram(action):
    inside = action.flatten().clamp(EDGES[0] + 1e-4, EDGES[-1] - 1e-4)
    return torch.histogram(inside, EDGES).hist / len(inside)


def describe(action, eta):
    tv = 0.5 * (histogram(action) - masses(eta)).abs().sum()
    return dict(mean=action.mean().item(), std=action.std().item(), right=(action > 0).float().mean().item(),
                tv=tv.item())  # fmt: skip


def effective_eta(action):
    """The eta whose pi* is nearest to the samples, and how near: total variation."""
    etas = torch.logspace(-1.5, 1, 101)
    tv = torch.stack([0.5 * (histogram(action) - masses(eta)).abs().sum() for eta in etas])
    return etas[tv.argmin()].item(), tv.min().item()


def fixed_point(eta, steps, n=50_000):
    net = mixture_noise(MEANS, WEIGHTS, STD, steps, lambda x, w: w / eta)
    return draw(net, n, 1, steps, SAMPLERS[steps])


def shift_factor(std, steps):
    """K: how far the fixed point moves the mean of N(0, std^2), over the std^2 / eta of pi*; the sampler is linear."""
    net = mixture_noise(torch.zeros(1, 1), torch.ones(1), std, steps)
    guided = mixture_noise(torch.zeros(1, 1), torch.ones(1), std, steps, lambda x, w: w)
    return (draw(guided, 1, 1, steps, None) - draw(net, 1, 1, steps, None)).item() / std**2


def sample_mixture(n, generator):
    mode = torch.multinomial(WEIGHTS, n, replacement=True, generator=generator)
    action, zeros = MEANS[mode] + STD * torch.randn(n, 1, generator=generator), torch.zeros(n, 1)
    return Batch(zeros, action, zeros[:, 0], zeros, action, zeros[:, 0])


def train_on_mixture(eta, steps, seed, updates=1_000):
    """The script's actor on its own path; Q(a) = 1.2 + a has E |Q| = 1, so that Eq. 19's scale is 1."""
    args = Args(device="cpu", eta=eta, eta_lr=0.0, guidance_scale=2.0, diffusion_steps=steps, batch_size=512,
                clip_denoised=SAMPLERS[steps] is not None, hidden=64, actor_lr=3e-3, steps=updates)  # fmt: skip
    data = SimpleNamespace(obs_dim=1, action_dim=1, max_action=1.0, sample=sample_mixture)
    learner = DAC(args, data, seed)
    learner.critic_target = lambda obs, action: 1.2 + action.T
    learner.critic_step = lambda batch: None
    for _ in range(updates // args.actor_ema_every):
        learner.update()
    with torch.no_grad():
        return learner.sample_actions(learner.actor, torch.zeros(20_000, 1), learner.generator)


def part_a(seeds):
    print("A  data 0.7 N(-.5, .2^2) + 0.3 N(.5, .2^2), Q(a) = a; right: mass of the right mode; TV: distance to pi*")
    table, samples = [], {}
    for steps in SAMPLERS:
        for eta in ETAS:
            means, weights = tilted(eta)
            mean = (weights @ means).item()
            right = 1 - torch.distributions.Normal(means, STD).cdf(torch.zeros(1))
            std = (STD**2 + weights @ (means - mean) ** 2).sqrt()
            exact = dict(mean=mean, std=std.item(), tv=0.0, right=(weights @ right).item())
            right_score = draw(mixture_noise(means, weights, STD, steps), 50_000, 1, steps, SAMPLERS[steps])
            point = fixed_point(eta, steps)
            learnt = [train_on_mixture(eta, steps, seed) for seed in seeds]
            samples[steps, eta] = point, learnt
            row = dict(T=steps, eta=eta, pi_star=exact, right_score=describe(right_score, eta),
                       fixed_point=describe(point, eta), learnt=[describe(action, eta) for action in learnt],
                       learnt_to_fixed_point=[0.5 * (histogram(action) - histogram(point)).abs().sum().item()
                                              for action in learnt],
                       effective_eta=effective_eta(point))  # fmt: skip
            table.append(row)
            print(f"T {steps}, eta {eta}")
            names = ["pi*, closed form", "right score", "Eq. 15, exact", *(f"learnt, seed {seed}" for seed in seeds)]
            values = [exact, row["right_score"], row["fixed_point"], *row["learnt"]]
            for name, value in zip(names, values):
                print(f"   {name:<17}" + "".join(f"  {key} {value[key]:6.3f}" for key in exact))
            close = ", ".join(f"{tv:.3f}" for tv in row["learnt_to_fixed_point"])
            print(f"   TV of learnt to Eq. 15: {close}", end="; ")
            print("Eq. 15 is nearest to pi* of eta {:.2f} (TV {:.3f})".format(*row["effective_eta"]), flush=True)
    factors = {std: {steps: shift_factor(std, steps) for steps in (5, 50, 1_000)} for std in (0.1, 0.2, 0.5, 1.0)}
    print("K: shift of the mean of Gaussian data under Eq. 15 over that of pi* (1 if the theorem were exact)")
    for std, row in factors.items():
        print(f"   std {std}: " + ", ".join(f"T {steps} {factor:.2f}" for steps, factor in row.items()))
    return dict(table=table, shift_factors=factors), samples


def score_bandit(action):
    distance = (action - torch.tensor(OPTIMUM)).norm(dim=1).mean().item()
    nearest = (action[:, None] - CENTERS).norm(dim=2).amin(1)
    return dict(reward=-distance, inside=(nearest < 0.3).float().mean().item())  # 3 standard deviations


def exact_bandit(strength, guidance):
    def guide(x, w):
        away = torch.tensor(OPTIMUM) - x  # the true reward's gradient is this, of length 1
        return strength * (w if guidance == "soft" else 1) * away / away.norm(dim=1, keepdim=True)

    return draw(mixture_noise(CENTERS, torch.ones(3) / 3, 0.1, BANDIT_T, guide), 4_000, 2, BANDIT_T, None)


def part_b(seeds, updates=1_500):
    print("B  bandit-3gaussians; inside: within 3 standard deviations of a centre (the data: 0.989)")
    data, runs, samples = load_dataset("bandit-3gaussians"), {name: [] for name in GUIDANCE}, {}
    for seed in seeds:
        for name in GUIDANCE:
            steps = updates // 5 if name == "denoised" else updates  # the chain makes it ten times as dear
            settings = dict(diffusion_steps=BANDIT_T, batch_size=512, actor_lr=3e-3, steps=steps, guidance=name)
            if name == "none":
                settings |= dict(guidance="soft", guidance_scale=0.0, eta_lr=0.0)
            learner = DAC(Args(env=data.name, device="cpu", **BANDIT | settings), data, seed)
            learner.critic_target = lambda obs, action: -(action - torch.tensor(OPTIMUM)).norm(dim=1)[None]
            learner.critic_step = lambda batch: None
            for _ in range(steps // learner.args.actor_ema_every):
                learner.update()
            with torch.no_grad():
                action = learner.sample_actions(learner.actor, torch.zeros(2_000, 1), learner.generator)
            runs[name].append(score_bandit(action) | dict(eta=learner.eta.item()))
            samples.setdefault(name, action)
            result = ", ".join(f"{key} {value:.3f}" for key, value in runs[name][-1].items())
            print(f"   seed {seed}, {name:<8}  {result}", flush=True)
    strengths = torch.logspace(-1, 1, 17).tolist()
    exact = {name: [score_bandit(exact_bandit(k, name)) for k in strengths] for name in ("soft", "hard")}
    unguided = score_bandit(exact_bandit(0.0, "soft"))
    print("   exact fixed points, true gradient: unguided reward {reward:.3f}, inside {inside:.3f}".format(**unguided))
    at = {}
    for level in (0.95, 0.9, 0.75, 0.5):  # interpolated along each curve
        at[level] = {
            name: float(np.interp(-level, [-row["inside"] for row in rows], [row["reward"] for row in rows]))
            for name, rows in exact.items()
        }
        print("   reward with {:.0%} inside: soft {soft:.3f}, hard {hard:.3f}".format(level, **at[level]))
    return dict(runs=runs, strengths=strengths, exact=exact, unguided=unguided, reward_at_inside=at), samples, data


def plot(a, mixtures, b, bandits, data, path):
    figure = Figure(figsize=(13, 6.8), layout="constrained")
    axes, middle, width = figure.subplots(2, 4), (EDGES[1:] + EDGES[:-1]) / 2, EDGES.diff()
    for panel, (steps, eta) in zip(axes[0], ((50, 2.0), (50, 0.5), (5, 2.0))):
        point, learnt = mixtures[steps, eta]
        panel.fill_between(middle, masses(math.inf) / width, color="0.85", label="data")
        panel.plot(middle, masses(eta) / width, "k--", label="pi*, claimed")
        panel.plot(middle, histogram(point) / width, "C0", lw=2, label="Eq. 15, exact")
        for i, action in enumerate(learnt):
            panel.plot(middle, histogram(action) / width, "C3", lw=0.8, label=None if i else "learnt, 3 seeds")
        top = 1.5 * (masses(eta) / width).max().item()
        panel.set(
            title=f"density: eta = {eta:g}, T = {steps}", xlabel="action", xlim=(-1.3, 1.6), ylim=(0, top), yticks=[]
        )
    axes[0, 0].legend(loc="upper right", ncols=2, fontsize=8)
    panel, etas = axes[0, 3], torch.logspace(1, -0.6, 17).tolist()
    panel.plot([1 / eta for eta in etas], [tilted(eta)[1][1] for eta in etas], "k--", label="pi*, claimed")
    for steps, style in zip(SAMPLERS, ("C0:", "C0-")):
        right = [describe(fixed_point(eta, steps, 10_000), eta)["right"] for eta in etas]
        panel.plot([1 / eta for eta in etas], right, style, label=f"Eq. 15, T = {steps}")
    for steps, marker in zip(SAMPLERS, "xo"):
        runs = [(1 / row["eta"], run["right"]) for row in a["table"] if row["T"] == steps for run in row["learnt"]]
        panel.scatter(*zip(*runs), marker=marker, s=25, color="C3", zorder=3, label=f"learnt, T = {steps}")
    panel.set(title="mass of the right mode", xlabel="1 / eta", xscale="log", ylim=(0.05, 1.03))
    panel.legend(loc="lower right", fontsize=9)
    for panel, name in zip(axes[1], GUIDANCE[1:]):
        panel.scatter(*data.action[:1_500].T, s=2, color="0.75")
        panel.scatter(*bandits[name][:500].T, s=3, color="C3")
        panel.plot(*OPTIMUM, "k*", markersize=11)
        inside = ", ".join(f"{run['inside']:.0%}" for run in b["runs"][name])
        panel.set(title=f"{name}: {inside} on data", aspect="equal", xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
    panel = axes[1, 3]
    for name, color in zip(GUIDANCE, ("0.5", "C0", "C1", "C2")):
        for kind, rows in (("exact", b["exact"].get(name, [])), ("learnt", b["runs"][name])):
            style = dict(color=color, linestyle="-" if kind == "exact" else "", marker="o" if kind == "learnt" else "")
            if rows:
                panel.plot(*zip(*((row["reward"], row["inside"]) for row in rows)), **style, label=f"{name}, {kind}")
    panel.set(title="on data against reward", xlabel="reward (0: the star)", xlim=(-1.05, 0.05), ylim=(-0.03, 1.03))
    panel.legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=75)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    seeds = tuple(parser.parse_args().seeds)
    torch.set_num_threads(1)
    a, mixtures = part_a(seeds)
    b, bandits, data = part_b(seeds)
    seconds = round(time.process_time())
    about = dict(
        command="python tests/benchmarks/claim_dac.py", seeds=seeds, cpu_seconds=seconds, torch=torch.__version__
    )
    committed = seeds == SEEDS  # any other run leaves the committed files alone
    figures, results = (ROOT / ("tests" if committed else "runs/claims") / name for name in ("figures", "results"))
    for folder in (figures, results):
        folder.mkdir(parents=True, exist_ok=True)
    (results / "claim_dac.json").write_text(json.dumps(about | dict(a=a, b=b), indent=1))
    print(f"{seconds} CPU-seconds")
    plot(a, mixtures, b, bandits, data, figures / "dac.png")


if __name__ == "__main__":
    main()
