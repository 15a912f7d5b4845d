"""Settings and starting weights against text copies of the papers' tables (tests/tables), through the command line."""

import ast
import fnmatch
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common
from common import BUILT_IN, DATASETS, SCENES

TABLES = Path(__file__).parent / "tables"
LEARNERS = dict(dtql="DTQL", srpo="SRPO", dac="DAC", qdq="QDQ", cped="CPED", bdm_rebrac_sbc="BDM")


class Stop(Exception):
    pass


def settings(script, flags, monkeypatch):
    """The settings with which `script flags` would read its data."""
    module, found = importlib.import_module(script), []
    real = module.parse_args

    def parse_args(*args, **more):
        found.append(real(*args, **more))
        raise Stop

    monkeypatch.setattr(module, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--device", "cpu", *flags.split()])
    with pytest.raises(Stop):
        module.main()
    return found[0]


def rows(path):
    """The rows of a table: dataset and {field: value}; `-` is not read there, `a=b` stands for both."""
    _, head, *lines = path.read_text().splitlines()
    for line in lines:
        env, *values = line.split()
        yield (
            env,
            {
                name: value
                for names, value in zip(head.split()[1:], values)
                for name in names.split("=")
                if value != "-"
            },
        )


def value_of(text):
    try:
        value = ast.literal_eval(text)
    except ValueError:
        return text
    return tuple(map(float, value)) if isinstance(value, tuple) else value


CASES = [(path.stem, env, row) for path in sorted(TABLES.glob("*.txt")) for env, row in rows(path)]


@pytest.mark.parametrize(("table", "env", "row"), CASES, ids=[f"{table}-{env}" for table, env, _ in CASES])
def test_a_row_of_the_papers_tables_is_what_the_script_runs(table, env, row, monkeypatch, capsys):
    script, _, mode = table.partition("--")
    args = settings(script, f"--env {env} {mode and '--' + mode}", monkeypatch)
    for name, text in row.items():
        value = value_of(text)
        assert getattr(args, name) == (value if isinstance(value, (str, bool)) else pytest.approx(value)), name
    assert "using those of" not in capsys.readouterr().out


@pytest.mark.parametrize("script", LEARNERS)
def test_no_row_of_a_script_is_without_its_paper(script):
    known = {env for path in TABLES.glob(f"{script}*.txt") for env, _ in rows(path)}
    module = importlib.import_module(script)
    tables = [module.PAPER, getattr(module, "REBRAC", {})]
    assert set().union(*tables) == known <= set(DATASETS)


@pytest.mark.parametrize("script", LEARNERS)
def test_built_in_data_get_settings_for_a_cpu(script, monkeypatch, capsys):
    for env in (*BUILT_IN, *SCENES):
        with monkeypatch.context() as patch:
            args = settings(script, f"--env {env}", patch)
        assert args.hidden <= 256 and args.batch_size <= 512 and args.steps <= 20_000, env
        assert args.paper_score is None
        assert args.env == env
    assert "using those of" not in capsys.readouterr().out


@pytest.mark.parametrize("script", LEARNERS)
@pytest.mark.parametrize("robot", ["Hopper", "HalfCheetah"])  # of which there are built-in data too
def test_a_relative_lends_its_settings_but_not_its_score(script, robot, monkeypatch, capsys):
    args = settings(script, f"--env {robot}-v4 --data-path mine.hdf5", monkeypatch)
    assert args.paper_score is None and args.steps >= 1_000_000
    assert f"using those of {robot.lower()}-" in capsys.readouterr().out


LENGTHS = {  # what follows --steps
    "bdm_rebrac_sbc": [], "cped": ["behavior_steps", "critic_start", "q_start"], "dac": ["actor_ema_start"],
    "dtql": ["pretrain_steps"], "qdq": ["score_steps", "consistency_steps"], "srpo": ["critic_steps", "behavior_steps"],
}  # fmt: skip


@pytest.mark.parametrize("script", LEARNERS)
def test_other_phases_follow_the_length_of_the_run(script, monkeypatch):
    with monkeypatch.context() as patch:
        args = settings(script, "--env hopper-medium-v2", patch)
    short = settings(script, f"--env hopper-medium-v2 --steps {args.steps // 10}", monkeypatch)
    assert [10 * getattr(short, name) for name in LENGTHS[script]] == [getattr(args, name) for name in LENGTHS[script]]


@pytest.mark.parametrize("script", LEARNERS)
def test_defaults(script):
    """The settings that no table of a paper holds."""
    lines = [line.split(maxsplit=2) for line in (TABLES / "defaults.tsv").read_text().splitlines()[1:]]
    table = {field: value for name, field, value in lines if name == script}
    own, shared = importlib.import_module(script).Args, common.RunArgs
    text = lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    found = {name: text(getattr(own, name)) for name in own.__dataclass_fields__}
    assert table == {name: value for name, value in found.items() if value != text(getattr(shared, name, own))}


@pytest.mark.parametrize("env, score", [("halfcheetah", 24.1), ("hopper", 15.0), ("walker2d", 3.4)])
def test_scores_of_dtqls_ablation(env, score, monkeypatch):
    """Table 5."""
    assert settings("dtql", f"--env {env}-medium-v2 --behavior-reg kl", monkeypatch).paper_score == score


@pytest.mark.parametrize("script", LEARNERS)
def test_help_explains_every_setting(script):
    Args = importlib.import_module(script).Args
    texts = common.help_texts(Args)
    assert [name for name in Args.__dataclass_fields__ if len(texts.get(name, "")) < 8] == []


# Starting weights. First matching line of a script counts; biases named fan_in take that of their layer's weights.

START = """
dtql  critic*.net.[0369].*       fan_in
dtql  critic*.net.[147].weight   value 1
dtql  critic*.net.[147].bias     value 0
dtql  value.net.*                fan_in
dtql  actor.net.*.weight         orthogonal 1
dtql  actor.net.*.bias           value 0
dtql  behavior.freqs             frequencies
dtql  behavior.*                 fan_in
srpo  critic*.net.*              fan_in
srpo  value.net.*                fan_in
srpo  actor.net.*                fan_in
srpo  behavior.freqs             normal 30
srpo  behavior.blocks.*.net.0.weight  value 1
srpo  behavior.blocks.*.net.0.bias    value 0
srpo  behavior.*                 fan_in
dac   *.freqs                    frequencies
dac   *.weight                   xavier
dac   *.bias                     value 0
qdq   *.freqs                    normal 16
qdq   actor*.net.6.weight        orthogonal 1.41421356
qdq   *.net.[147].weight         group
qdq   *.weight                   xavier
qdq   *.log_std                  value 0
qdq   *.bias                     value 0
cped  critic*                    fan_in
cped  actor*                     fan_in
cped  behavior.sigma             value 0
cped  behavior.*.weight          uniform 0.01
cped  behavior.*.bias            value 0
cped  discriminator.net.[03].weight  fan_out
cped  discriminator.net.[03].bias    value 0.1
cped  discriminator.*.offset     value 0
cped  discriminator.net.6.*      uniform 0.003
bdm_rebrac_sbc  critic*.net.[258].weight  value 1
bdm_rebrac_sbc  critic*.net.[258].bias    value 0
bdm_rebrac_sbc  bdm*.net.[25].weight      value 1
bdm_rebrac_sbc  bdm*.net.[25].bias        value 0
bdm_rebrac_sbc  *                         fan_in
bdm_rebrac_sbc--rebrac  critic*.net.[258].weight  value 1
bdm_rebrac_sbc--rebrac  critic*.net.[258].bias    value 0
bdm_rebrac_sbc--rebrac  critic*.net.9.*           uniform 0.003
bdm_rebrac_sbc--rebrac  critic*.net.[036].bias    value 0.1
bdm_rebrac_sbc--rebrac  actor*.net.6.*            uniform 0.001
bdm_rebrac_sbc--rebrac  actor*.net.[024].bias     value 0.1
bdm_rebrac_sbc--rebrac  bdm*.net.[25].weight      value 1
bdm_rebrac_sbc--rebrac  bdm*.net.[25].bias        value 0
bdm_rebrac_sbc--rebrac  *                         fan_in
"""


def make(case, seed, **settings):
    script, _, mode = case.partition("--")
    module = importlib.import_module(script)
    args = module.Args(device="cpu", **({mode: True, "w_s": 0.0} if mode else {}), **settings)
    name = LEARNERS[script] + ("KL" if getattr(args, "behavior_reg", "") == "kl" else "")
    return getattr(module, name)(args, SimpleNamespace(obs_dim=17, action_dim=6, max_action=1.0), seed)


def tensors(learner):
    modules = {key: part for key, part in learner.state.items() if isinstance(part, torch.nn.Module)}
    return {
        f"{key}.{name}": value.detach()
        for key, part in modules.items()
        for name, value in [*part.named_parameters(), *part.named_buffers()]
    }


def check_start(name, value, rule, weight):
    """`weight`: the weights of the layer, [out, in], or [n, in, out] of an ensemble."""
    kind, *number = rule.split()
    number = float(number[0]) if number else None
    d_in, d_out = weight.shape[-2:] if weight.dim() == 3 else (weight.shape[-1], weight.shape[0])
    if kind == "value" or (kind == "group" and value.dim() == 1):  # group: the gain of a normalisation, if it is one
        assert (value == (1 if kind == "group" else torch.tensor(number))).all()
    elif kind == "orthogonal":
        small = value if d_in >= d_out else value.T
        torch.testing.assert_close(small @ small.T, number**2 * torch.eye(len(small)), atol=1e-4, rtol=0)
    elif kind == "frequencies":
        torch.testing.assert_close(value, 10_000.0 ** -torch.linspace(0, 1, len(value)))
    elif kind == "normal":
        assert number / 3 < value.std() < 3 * number and (value < 0).any()
    else:
        bounds = dict(fan_in=d_in**-0.5, fan_out=d_out**-0.5, uniform=number, xavier=(6 / (d_in + d_out)) ** 0.5)
        bounds |= dict(group=bounds["xavier"])
        largest = value.abs().max()
        assert largest <= bounds[kind] * 1.0001
        if value.numel() > 30:
            assert largest > 0.9 * bounds[kind]
            assert value.std() == pytest.approx(bounds[kind] / 3**0.5, rel=0.25 if value.numel() < 500 else 0.1)
        if value.dim() == 3:
            assert not torch.equal(value[0], value[1])  # members of an ensemble differ


@pytest.mark.parametrize("case", dict.fromkeys(line.split()[0] for line in START.split("\n") if line))
def test_starting_weights(case):
    rules = [line.split(maxsplit=2)[1:] for line in START.split("\n") if line.split()[:1] == [case]]
    first, second = tensors(make(case, 0)), tensors(make(case, 1))
    for name, value in first.items():
        rule = next(rule for pattern, rule in rules if fnmatch.fnmatch(name, pattern))
        weight = first.get(name.rsplit(".", 1)[0] + ".weight", value)
        check_start(name, value, rule, weight if weight.dim() > 1 else torch.empty(1, 1))
        if not rule.startswith(("value", "frequencies")) and not (rule == "group" and value.dim() == 1):
            assert not torch.equal(value, second[name]), f"{name} is the same for two seeds"
        online = name.replace("_target.", ".")
        assert torch.equal(value, first[online]), f"{name} does not start as a copy"


@pytest.mark.parametrize("script", LEARNERS)
def test_each_seed_has_random_numbers_of_its_own(script):
    draws = [torch.rand(4, generator=make(script, seed).generator) for seed in (0, 1, 1)]
    assert not torch.equal(draws[0], draws[1]) and torch.equal(draws[1], draws[2])


RATES = {  # learning rate of each network
    "bdm_rebrac_sbc": dict(actor="actor_lr", critic="critic_lr", bdm="bdm_lr"),
    "cped": dict(behavior="behavior_lr", discriminator="behavior_lr", critic="critic_lr", actor="actor_lr"),
    "dac": dict(actor="actor_lr", critic="critic_lr"),
    "dtql": dict(critic="critic_lr", value="critic_lr", behavior="behavior_lr", actor="actor_lr", fake="behavior_lr"),
    "qdq": dict(score="score_lr", consistency="consistency_lr", critic="critic_lr", actor="actor_lr"),
    "srpo": dict(critic="critic_lr", value="critic_lr", behavior="behavior_lr", actor="actor_lr"),
}


@pytest.mark.parametrize("script", LEARNERS)
def test_learning_rates_of_the_networks(script):
    values = {rate: 0.1 + 0.1 * i for i, rate in enumerate(sorted({*RATES[script].values()}))}
    learner = make(script, 0, **values, **(dict(behavior_reg="kl") if script == "dtql" else {}))
    opts = [part for part in learner.state.values() if isinstance(part, torch.optim.Optimizer)]
    for network, rate in RATES[script].items():
        groups = [group for opt in opts for group in opt.param_groups]
        for parameter in getattr(learner, network).parameters():
            (group,) = (group for group in groups if any(parameter is other for other in group["params"]))
            assert group["lr"].item() == pytest.approx(values[rate]), network
    assert sum(len(group["params"]) for group in groups) == sum(
        len(list(getattr(learner, network).parameters())) for network in RATES[script]
    )
    if hasattr(learner, "rates"):  # where cosines begin
        assert [opt.param_groups[0]["lr"].item() for opt, _ in learner.rates] == pytest.approx(
            [rate for _, rate in learner.rates]
        )
        assert len(learner.rates) == len(opts)
