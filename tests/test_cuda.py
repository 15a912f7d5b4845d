"""The way to a GPU, walked without one: CUDA graphs acted out on the CPU, updates on `meta` tensors, other checkpoints.

Acted out: an update is taped below autograd, what it wrote is undone, its results are overwritten, and from then on
only the tape is played, into the same tensors. So its Python runs once, and the host's numbers are frozen, as on a GPU.
"""

import contextlib
import copy
import importlib
import itertools
import json
import shutil
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import common

TINY = "--env pendulum-demo-medium --device cpu --batch-size 8 --eval-episodes 0"
CASES = {  # script: settings that change the operations
    "bdm_rebrac_sbc": (
        "",
        "--rebrac --reward-scale 2",
        "--sbc-only --eta uniform",
        "--bdm-only data",
        "--corrected --actor-bdm online --eta paper",
    ),
    "cped": (
        "--discriminator-steps 2 --critic-start 2 --q-start 3 --alpha 2 1 --alpha-until 0.0005",
        "--discriminator-steps 2 --critic-start 2 --q-start 3 --alpha-mode dual",
        "--critic-start 0 --q-start 1 --alpha-mode dual --epsilon 1 --density conditional --policy-delay 1",
        "--env bandit-ring",
    ),
    "dac": (
        "--actor-ema-every 2 --actor-ema-start 2",
        "--actor-ema-every 1 --guidance hard --eta-lr 0 --max-q-backup --next-samples 2",
        "--actor-ema-every 1 --guidance denoised --no-clip-denoised --lr-decay-steps 2",
        "--env bandit-2gaussians --actor-ema-every 1 --diffusion-steps 3",
    ),
    "dtql": (
        "",
        "--nll-weight 1 --lr-decay --no-clip-denoised --eval-select argmax",
        "--behavior-reg kl --lr-decay",
        "--env bandit-swissroll-far",
    ),
    "qdq": (
        "",
        "--penalty keep --actor-loss awr --no-target-sample --layer-norm",
        "--penalty mild --no-init-from-teacher",
    ),
    "srpo": (
        "",
        "--weighting alpha/sigma --fixed-t 0.02 --no-subtract-baseline --q-grad-norm l2 --dropout 0 --no-lr-decay",
        "--weighting one --q-grad-norm none --weight-decay 0",
        "--weighting sigma4",
        "--env bandit-8gaussians",
    ),
}
every_case = pytest.mark.parametrize(
    "name, flags", [pytest.param(name, flags, id=f"{name} {flags}") for name in CASES for flags in CASES[name]]
)


# Stand-ins


def all_tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for item in value for x in all_tensors(item)] if isinstance(value, list | tuple) else []


def kept(value):
    """`value` with each tensor as it is now: same memory, but a shape of its own."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    return [kept(item) for item in value] if isinstance(value, list) else value


class Graph(TorchDispatchMode):
    """In place of torch.cuda.CUDAGraph and, as a context, of torch.cuda.graph."""

    capturing = False
    unfit = set()  # generators that a failed recording has left in capture mode

    def __init__(self):
        super().__init__()
        self.tape, self.written, self.generators = [], [], []

    def register_generator_state(self, generator):
        self.generators.append(generator)

    @contextlib.contextmanager
    def record(self):
        states, Graph.capturing = [generator.get_state() for generator in self.generators], True
        try:
            with self:
                yield
        except BaseException:
            Graph.unfit |= {generator._cdata for generator in self.generators}
            raise
        finally:
            Graph.capturing = False
            with torch.no_grad():
                for tensor, before in reversed(self.written):  # a recorded kernel has not run
                    tensor.copy_(before)
                for *_, outputs in self.tape:
                    for output in outputs:
                        output.fill_(float("nan") if output.is_floating_point() else 0)
            for generator, state in zip(self.generators, states):
                generator.set_state(state)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        drawn = kwargs.get("generator")
        if drawn is not None and drawn._cdata not in [generator._cdata for generator in self.generators]:
            raise RuntimeError("Attempt to increase offset for a CUDA generator not in capture mode.")
        names = [spec.name for spec in func._schema.arguments]
        given = dict(zip(names, map(kept, args))) | {name: kept(value) for name, value in kwargs.items()}
        for spec in func._schema.arguments:
            if spec.alias_info and spec.alias_info.is_write:
                self.written += [(x, x.clone()) for x in all_tensors(given[spec.name])]
        results = func(*args, **kwargs)
        places = {x.untyped_storage().data_ptr() for x in all_tensors(list(given.values()))}
        fresh = [x.untyped_storage().data_ptr() not in places for x in all_tensors(results)]
        outputs = [x.detach() for x, new in zip(all_tensors(results), fresh) if new]
        if torch.Tag.inplace_view not in func.tags:  # squeeze_ and the like work on the host
            self.tape.append((func, given, fresh, outputs))
        return results

    @torch.no_grad()
    def replay(self):
        for func, given, fresh, outputs in self.tape:
            again = all_tensors(func(**given))
            for output, result in zip(outputs, [x for x, new in zip(again, fresh) if new]):
                output.copy_(result)


@pytest.fixture
def cuda(monkeypatch):
    """A GPU on the CPU: `cuda(learners)` are as if made with --device cuda."""
    stream = SimpleNamespace(wait_stream=lambda other: None, is_capturing=lambda: Graph.capturing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph.record())
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: stream)

    monkeypatch.setattr(Graph, "unfit", set())

    def pretend(learners):
        for learner in learners:
            learner.args.device = "cuda"
            for part in learner.state.values():
                if isinstance(part, torch.optim.Optimizer):
                    part.param_groups[0]["capturable"] = True

    return pretend


class Loop:
    """In place of common.Run: the first updates of each phase and nothing else."""

    most = 3

    def __init__(self, args, learners, data, script, protocol, phases):
        self.learners, self.phases, self.folders = learners, phases, []

    def updates(self, phase, stride=1, evaluate=False, at_end=None):
        yield from range(min(-(-self.phases[phase] // stride), Loop.most))
        for learner in self.learners:
            learner.rows = [*vars(learner).get("rows", []), learner.metrics.read()]
        if at_end:
            at_end()

    def finish(self):
        pass


@pytest.fixture
def train(monkeypatch):
    """train(name, flags, capture): a script's main() with this in place of common.capture; its learners."""
    data = {}

    def load(module, *args, **kwargs):
        key = repr((args, kwargs))
        if key not in data:
            data[key] = common.load_dataset(*args, **kwargs)
        return copy.deepcopy(data[key])

    def train(name, flags, capture):
        module, found = importlib.import_module(name), []

        def watched(learners, phase):
            found[:] = learners
            return capture(learners, phase)

        monkeypatch.setattr(sys, "argv", [f"{name}.py", *TINY.split(), *flags.split()])
        for attribute, value in dict(Run=Loop, capture=watched).items():
            monkeypatch.setattr(module, attribute, value)
        monkeypatch.setattr(module, "save_figure", lambda *picture, **more: None, raising=False)
        monkeypatch.setattr(module, "load_dataset", lambda *args, **kwargs: load(module, *args, **kwargs))
        module.main()
        return found

    return train


# CUDA graphs


def flatten(value, path=""):
    """All tensors of a state, by path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {place: x for key, item in items for place, x in flatten(item, f"{path}/{key}").items()}


def everything(learner):
    """All that a learner holds, as one dict of tensors."""
    rows = [*vars(learner).get("rows", []), learner.metrics.read()]
    numbers = {f"{i} {name}": torch.tensor(value) for i, row in enumerate(rows) for name, value in row.items()}
    return flatten(common.get_state(learner.state)) | numbers


def differences(first, second):
    assert first.keys() == second.keys() and first
    return [path for path in first if not torch.equal(first[path], second[path])]


def resumed(capture):
    """`capture`, with a fresh start from the saved state after the first call, as in another process."""

    def capture_twice(learners, phase):
        update, calls = capture(learners, phase), 0

        def step():
            nonlocal update, calls
            if calls == 1:
                for learner in learners:
                    state = copy.deepcopy(common.get_state(learner.state))
                    getattr(learner, phase)()  # whatever is not in the state is another now
                    common.set_state(learner.state, state)
                    learner.metrics.read()
                update = capture(learners, phase)
            calls += 1
            update()

        return step

    return capture_twice


def compare(name, flags, cuda, train, around=lambda capture: capture):
    """A script's main() twice, with graphs and plainly."""

    def capture(learners, phase):
        cuda(learners)
        return common.capture(learners, phase)

    plain, graphs = train(name, flags, around(common.capture)), train(name, flags, around(capture))
    assert graphs[0].args.cuda_graphs
    for ours, theirs in zip(graphs, plain):
        assert not differences(everything(ours), everything(theirs))


@every_case
def test_graphs_equal_plain_updates(name, flags, cuda, train, monkeypatch):
    monkeypatch.setattr(Loop, "most", 2)
    compare(name, flags, cuda, train)


@pytest.mark.parametrize("name", CASES)
def test_graphs_equal_plain_updates_in_company_and_resumed(name, cuda, train):
    """Two seeds side by side, each phase resumed after its first update."""
    compare(name, f"{CASES[name][0]} --seed 0 1", cuda, train, resumed)


def fake_data():
    return common.Dataset.bandit("toy", torch.rand(8, 1), lambda action: action.sum(1))


class Toy:
    """A learner of two numbers; `count` stands on the host."""

    def __init__(self, args, seed):
        self.args, self.data, self.metrics, self.count = args, fake_data(), common.Metrics(), 0
        self.generator = torch.Generator().manual_seed(seed)
        self.net = nn.Linear(1, 1)
        self.opt = torch.optim.Adam(self.net.parameters(), torch.tensor(0.1), fused=True)
        self.state = dict(net=self.net, opt=self.opt, generator=self.generator)

    def step(self, loss):
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        self.metrics.add(loss=loss)

    def draw(self):
        return torch.randn(4, 1, device=self.generator.device, generator=self.generator)

    def update(self):
        self.step((self.net(self.draw()) ** 2).mean())

    def counts(self):
        self.count += 1
        self.step((self.net(self.draw()) ** 2).mean() * self.count)

    def reads(self):
        loss = (self.net(self.draw()) ** 2).mean()
        self.step(loss * (1 if loss.item() > 0 else 2))

    def draws_anew(self):
        x = torch.randn(4, 1, generator=torch.Generator().manual_seed(0))
        self.step((self.net(x) ** 2).mean())

    def act(self, obs, generator):
        return self.net(obs[:, :1])


def toys(n=1, **settings):
    torch.manual_seed(0)
    args = common.RunArgs(device="cpu", seed=tuple(range(n)), **settings)
    return [Toy(args, seed) for seed in args.seed]


def call(learners, phase, times=4):
    update = common.capture(learners, phase)
    for _ in range(times):
        update()
    return [everything(learner) for learner in learners]


def test_a_counter_on_the_host_is_found(cuda):
    """The control: what must not equal the plain run does not."""
    plain, graphs = toys(), toys()
    cuda(graphs)
    (ours,), (theirs,) = call(graphs, "counts"), call(plain, "counts")
    assert graphs[0].args.cuda_graphs and differences(ours, theirs)


@pytest.mark.parametrize(
    "phase, why",
    [("reads", "operation not permitted when stream is capturing"), ("draws_anew", "not in capture mode")],
)
def test_without_a_graph_the_run_goes_on_plainly(phase, why, cuda, capsys):
    """Recording raises: the warm-up is taken back, one sentence says why, later phases do not try again."""
    plain, graphs = toys(2), toys(2)
    cuda(graphs)
    ours, theirs = call(graphs, phase), call(plain, phase)
    assert not any(differences(*both) for both in zip(ours, theirs))
    said = capsys.readouterr().err
    assert said.startswith("warning: ") and said.count("\n") == 1 and why in said and f"`{phase}`" in said
    assert not graphs[0].args.cuda_graphs
    assert not Graph.unfit & {toy.generator._cdata for toy in graphs}
    call(graphs, "update")
    assert capsys.readouterr().err == ""


def test_an_empty_graph_is_noticed(cuda, capsys, monkeypatch):
    """As where kernels run on another device than the one that records."""
    plain, graphs = toys(), toys()
    cuda(graphs)
    monkeypatch.setattr(Graph, "replay", lambda self: None)
    ours, theirs = call(graphs, "update"), call(plain, "update")
    assert not differences(ours[0], theirs[0]) and "changes nothing" in capsys.readouterr().err


def test_no_cuda_graphs(cuda, monkeypatch):
    plain, graphs = toys(), toys(cuda_graphs=False)
    cuda(graphs)
    monkeypatch.setattr(Graph, "record", None)
    ours, theirs = call(graphs, "update"), call(plain, "update")
    assert not differences(ours[0], theirs[0])


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_optimisers_for_graphs_say_nothing(graphs, loaded, cuda):
    """torch can warn where one steps outside of a graph, as in the warm-up."""
    learners = toys(cuda_graphs=graphs)
    cuda(learners)
    if loaded:
        common.set_state(learners[0].state, common.get_state(learners[0].state))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(learners, "update")


def test_a_phase_without_updates_is_not_recorded(cuda, monkeypatch):
    graphs = toys()
    cuda(graphs)
    monkeypatch.setattr(Graph, "record", None)
    common.capture(graphs, "update")


@pytest.mark.parametrize("flags, graphs", [({}, True), (dict(cuda_graphs=False), False)])
def test_summary_says_whether_graphs_ran(flags, graphs, cuda, tmp_path, monkeypatch):
    learners, data = toys(steps=3, out=str(tmp_path), env="toy", eval_episodes=0, **flags), fake_data()
    run = common.Run(learners[0].args, learners, data, __file__, "", dict(update=3))
    cuda(learners)
    update = common.capture(learners, "update")
    for _ in run.updates("update"):
        update()
    run.finish()
    assert json.loads((run.root / "seed0" / "summary.json").read_text())["cuda_graphs"] is graphs


def test_the_device_is_made_current(monkeypatch):
    """Streams and graphs belong to the current device: --device cuda:1 must be it."""
    zeros, current = torch.zeros, []
    fake = lambda *size, device: SimpleNamespace(device=torch.device(device), item=float)
    monkeypatch.setattr(torch, "zeros", fake)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for device in ("cuda:1", "cpu"):
        common.check_args(common.RunArgs(device=device))
    assert current == [torch.device("cuda:1")]
    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(common.UserError, match="--device cuda:9 cannot be used here"):
        common.check_args(common.RunArgs(device="cuda:9"))


# Devices


class MetaGenerator(torch.Generator):
    device = torch.device("meta")


class OneDevice(TorchDispatchMode):
    """Notes tensors that are not on `meta`. There, asking for a value fails by itself."""

    def __init__(self, faults):
        super().__init__()
        self.faults = faults

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = {name: None if name == "generator" else value for name, value in (kwargs or {}).items()}
        results = None if "_fused_adam" in str(func) else func(*args, **kwargs)  # no such kernel on `meta`
        if any(x.device.type != "meta" for x in all_tensors([*args, *kwargs.values(), results])):
            self.faults.append(f"{func} meets a tensor that was left on the CPU")
        return results


class NothingFromTheHost(TorchFunctionMode):
    """Notes tensors made of the host's numbers, a copy that cannot be recorded."""

    def __init__(self, faults):
        super().__init__()
        self.faults = faults

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            self.faults.append(f"{func} copies from the host")
        return func(*args, **(kwargs or {}))


def on_meta(learner, monkeypatch):
    """A copy of `learner` all of whose tensors are on `meta`."""

    def move(self, memo):
        moved = torch.empty_like(self, device="meta", requires_grad=self.requires_grad)
        memo[id(self)] = nn.Parameter(moved, self.requires_grad) if isinstance(self, nn.Parameter) else moved
        return memo[id(self)]

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__deepcopy__", move)
        patch.setattr(nn.Parameter, "__deepcopy__", move)
        moved = copy.deepcopy(learner, {id(learner.generator): MetaGenerator()})
    moved.args.device = "meta"
    return moved


def walk(learner, phase, monkeypatch):
    """One update and one action on `meta`."""
    moved, faults = on_meta(learner, monkeypatch), []
    with NothingFromTheHost(faults), OneDevice(faults):
        getattr(moved, phase)()
        if faults:  # tables of constants may come from the host once, in the warm-up
            faults.clear()
            getattr(moved, phase)()
        with torch.no_grad():
            moved.act(torch.zeros(3, learner.data.obs_dim, device="meta"), moved.generator)
    assert not faults


@every_case
def test_updates_and_acting_stay_on_one_device(name, flags, train, monkeypatch):
    def capture(learners, phase):
        def step():
            before = torch.get_rng_state()
            getattr(learners[0], phase)()
            assert torch.equal(before, torch.get_rng_state()), f"{phase} draws from torch's global generator"
            walk(learners[0], phase, monkeypatch)

        return step

    monkeypatch.setattr(Loop, "most", 1)
    train(name, flags, capture)


LEFT_BEHIND = torch.ones(())
FAULTS = {
    "not on the expected device|left on the CPU": (
        lambda toy: toy.net(torch.zeros(4, 1)),
        lambda toy: toy.net(toy.draw() * torch.ones(1).to(toy.generator.device)),
        lambda toy: toy.net(toy.draw() * LEFT_BEHIND),
    ),
    "cannot be called on meta": (
        lambda toy: toy.net(toy.draw()) if toy.net.bias > 0 else None,
        lambda toy: toy.net(toy.draw() * toy.net.weight.item()),
    ),
    "nonzero": (
        lambda toy: toy.net(toy.draw()[toy.draw()[:, 0] > 0]),
        lambda toy: toy.net(toy.draw())[toy.draw().nonzero()[:, 0]],
    ),
    "copies from the host": (lambda toy: toy.net(toy.draw() * torch.tensor([2.0], device=toy.generator.device)),),
    None: (lambda toy: toy.net(toy.draw()) * len(toy.draw()),),
}


@pytest.mark.parametrize("message, fault", [(why, fault) for why, faults in FAULTS.items() for fault in faults])
def test_what_a_walk_finds(message, fault, monkeypatch):
    """The control: all but the last would fail on a GPU or stop a recording."""
    monkeypatch.setattr(Toy, "faulty", lambda toy: toy.step(fault(toy).mean()), raising=False)
    (toy,) = toys()
    toy.update()
    finds = pytest.raises((AssertionError, RuntimeError), match=message) if message else contextlib.nullcontext()
    with finds:
        walk(toy, "faulty", monkeypatch)


# Runs of another kind of device


@pytest.mark.parametrize("kind", ["CPU's on CUDA", "CUDA's on the CPU"])
def test_optimisers_keep_what_belongs_to_this_process(kind, cuda, capsys):
    (theirs,), (ours,) = toys(), toys()
    cuda([ours] if kind == "CPU's on CUDA" else [theirs])
    theirs.update()
    assert common.set_state(ours.state, copy.deepcopy(common.get_state(theirs.state)))
    group = ours.opt.param_groups[0]
    assert group["capturable"] is (kind == "CPU's on CUDA") and group["fused"]
    theirs.metrics.read()
    assert not differences(*(call([toy], "update")[0] for toy in (ours, theirs)))
    assert capsys.readouterr().err == ""


def test_a_generator_of_another_kind_is_left_alone():
    (theirs,), (ours,) = toys(), toys()
    state = common.get_state(theirs.state) | dict(generator=torch.zeros(16, dtype=torch.uint8))
    assert not common.set_state(ours.state, state)
    assert torch.equal(ours.draw(), theirs.draw())


class Killed(BaseException):
    """Stands in for a process that is gone."""


def as_from_gpu(folder):
    """Turn the run in `folder` into one from CUDA: its generator has 16 bytes, its optimisers can be recorded."""
    checkpoint = common.load_checkpoint(folder)
    checkpoint["learner"]["generator"] = torch.tensor([7, *[0] * 15], dtype=torch.uint8)
    for part in checkpoint["learner"].values():
        if isinstance(part, dict) and "param_groups" in part:
            part["param_groups"][0]["capturable"] = True
    torch.save(checkpoint, folder / "checkpoint.pt")
    saved = json.loads((folder / "args.json").read_text())
    saved["args"]["device"] = "cuda"
    (folder / "args.json").write_text(json.dumps(saved))


LEARNERS = dict(bdm_rebrac_sbc="BDM", cped="CPED", dac="DAC", dtql="DTQL", qdq="QDQ", srpo="SRPO")
LOADS = dict(bdm_rebrac_sbc="--bdm-only", qdq="--reuse", srpo="--reuse")  # flags that load another run


@pytest.mark.parametrize("name", CASES)
def test_a_run_from_a_gpu_goes_on_here(name, tmp_path, monkeypatch, capsys):
    """Resumed, scored, acted with, and loaded by another run: on the CPU what was trained on CUDA."""
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "save_figure", lambda *picture, **more: None, raising=False)
    folder, flags = tmp_path / name / "pendulum-demo-medium" / "seed0", f"{TINY} --steps 6 --checkpoint-every 1"

    def start(flags):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags.split()])
        common.cli(module.main)
        return capsys.readouterr().out

    def killed(learners, phase):
        update, calls = common.capture(learners, phase), itertools.count()

        def step():
            if next(calls) == 1:
                raise Killed
            update()

        return step

    def noted(learners, phase):
        seeds.append(learners[0].generator.initial_seed())
        return common.capture(learners, phase)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "capture", killed)
        start(f"{flags} --out {tmp_path}")
    as_from_gpu(folder)
    shutil.copytree(folder, tmp_path / "copy")

    note = "another kind of device: the run goes on, but not bit for bit"
    ends, seeds = [], []
    for _ in range(2):  # draws that are neither CUDA's nor those of the start again, but the same each time
        with monkeypatch.context() as patch:
            patch.setattr(module, "capture", noted)
            assert start(f"{flags} --out {tmp_path} --resume --no-cuda-graphs").count(note) == 1
        ends.append(flatten(common.load_checkpoint(folder)["learner"]))
        folder.rename(tmp_path / f"end{len(ends)}")
        shutil.copytree(tmp_path / "copy", folder)
    assert not differences(*ends) and seeds[0] not in (0, 7)

    shutil.rmtree(folder)
    (tmp_path / "end1").rename(folder)
    as_from_gpu(folder)
    assert "return" in start(f"--evaluate {folder} --eval-episodes 1 --device cpu")
    act = common.load_policy(getattr(module, LEARNERS[name]), module.Args, folder)
    assert act([[1.0, 0.0, 0.0]]).shape == (1, 1)
    if name in LOADS:
        start(f"{flags} --out {tmp_path / 'another'} {LOADS[name]} {folder}")
    if name == "bdm_rebrac_sbc":
        assert module.sample_futures(folder, [[1.0, 0.0, 0.0]], [[0.5]], n=2).shape == (1, 2, 3)
