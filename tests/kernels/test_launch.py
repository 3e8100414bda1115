"""Starting kernels: several threads, what a second call costs, and what is refused.

Launches as on a GPU go to the stand-in of bench/launches.py.
"""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import builders
import cases
import pytest
import torch

import csulora_kernels as kernels
from csulora_kernels import launch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import launches

KERNELS = {
    "_project": ("project_kernel", "add_splits_kernel"),
    "_solve": ("solve_kernel",),
    "_realign": ("realign_kernel",),
    "_recompose": ("recompose_kernel",),
}


def made(seed=0, modules=((40, 36, 7), (33, 50, 1)), ranks=(3, 5), dtype=cases.B16):
    """A table and its basis."""
    problem = cases.problem(cases.Case(modules, ranks, dtype), "cpu", seed)
    basis = kernels.pack_basis(problem.bases, "cpu")
    return kernels.pack(problem.adapters, basis), basis


@pytest.fixture
def switching():
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def compiling(interpreter, monkeypatch):
    """The kernels as they are in a process without the interpreter, and the launches that arrive."""
    from triton.runtime.jit import JITFunction

    for module, names in KERNELS.items():
        home = __import__(f"csulora_kernels.{module}", fromlist=names)
        for name in names:
            fn = getattr(home, name).fn
            ints = ("n_adapters", "n_modules", "n_entries", "split_length")
            plain = [a for a in ints if a in fn.__code__.co_varnames[: fn.__code__.co_argcount]]
            monkeypatch.setattr(home, name, JITFunction(fn, do_not_specialize=plain))
    seen = []
    with launches.stand_in(lambda launched: seen.append((launched.name, launched.arguments))):
        yield seen


# --- threads --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("interpreter", "switching")
def test_several_threads_may_run_the_interpreter():
    """It has one grid for the whole process: a launch beside another one would take its place in it."""
    known = [made(seed, ((24, 20, 3),) * (1 + seed), (3,)) for seed in range(3)]

    def run(pair):
        return kernels.correct(*pair, kernels.Penalties()).table.data

    wanted = [run(pair) for pair in known]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(run, known))
    for one, two in zip(wanted, found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.usefixtures("interpreter", "switching")
def test_several_threads_may_multiply_by_a_difference():
    weights = [torch.randn(70, 35, generator=torch.Generator().manual_seed(i)) for i in range(4)]

    def run(W):
        return kernels.displacement_product(torch.zeros(70, 35), W, torch.eye(35)[:, :5].clone())

    with ThreadPoolExecutor(4) as pool:
        for W, Y in zip(weights, pool.map(run, weights), strict=True):
            torch.testing.assert_close(Y, W[:, :5])


@pytest.mark.usefixtures("interpreter", "switching")
def test_the_command_corrects_several_adapters_at_once(tmp_path, subspace, capsys):
    """And the files have the same bytes whichever of them share launches."""
    folders = [
        builders.write_adapter(tmp_path / "in" / f"lora{i}", rank=r, seed=i)
        for i, r in enumerate((2, 6, 3))
    ]
    whole = []
    for jobs in ("1", "2"):
        out = tmp_path / jobs
        result = builders.run(
            capsys, "correct", *folders, "--subspace", subspace, "--out-dir", out,
            "--backend", "triton", "--device", "cpu", "--jobs", jobs,
        )  # fmt: skip
        assert result.code == 0, result.err
        written = (builders.WEIGHTS, builders.CONFIG, builders.REPORT)
        whole.append([(out / f.name / name).read_bytes() for f in folders for name in written])
    assert whole[0] == whole[1]


@pytest.mark.parametrize("stage", ["project", "solve", "recompose", "correct"])
def test_a_workspace_that_another_thread_is_inside_with_is_refused(compiling, stage, monkeypatch):
    """Its buffers are one: the second would overwrite what the first has not read yet."""
    table, basis = made()
    penalties = kernels.Penalties()
    ws = kernels.workspace(table, basis, penalties)
    result = kernels.correct(table, basis, penalties, workspace=ws)
    calls = {
        "project": lambda: kernels.project(table, basis, workspace=ws),
        "solve": lambda: kernels.solve(result.projection, penalties, workspace=ws),
        "recompose": lambda: kernels.recompose(table, basis, *result[1:], workspace=ws),
        "correct": lambda: kernels.correct(table, basis, penalties, workspace=ws),
    }
    inside, leave = threading.Event(), threading.Event()

    def wait(*given):
        inside.set()
        assert leave.wait(60)

    monkeypatch.setattr(launch.Launcher, "_launch", wait)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(calls[stage])
        assert inside.wait(60)
        try:
            for call in calls.values():
                with pytest.raises(RuntimeError, match="workspace is in use by another thread"):
                    call()
        finally:
            leave.set()
        first.result()
    monkeypatch.undo()
    assert ws.turn.__enter__() is None  # free again


def test_threads_with_workspaces_of_their_own_launch_side_by_side(compiling, switching):
    """And each launch is given the buffers of one call alone."""
    table, basis = made()
    penalties = kernels.Penalties()
    spaces = [kernels.workspace(table, basis, penalties) for _ in range(4)]
    results = [kernels.empty_like(table, penalties) for _ in spaces]

    def run(i):
        for _ in range(20):
            kernels.correct(table, basis, penalties, out=results[i], workspace=spaces[i])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    assert len(compiling) == 4 * 20 * 3
    owners = {id(ws.projection.P.untyped_storage()): i for i, ws in enumerate(spaces)}
    starts = {ws.projection.P.data_ptr(): i for i, ws in enumerate(spaces)}
    assert len(owners) == 4
    for name, arguments in compiling:
        if name == "solve_kernel":
            i = starts[arguments[0].data_ptr()]
            assert any(X is spaces[i].scratch for X in arguments)


# --- a second call --------------------------------------------------------------------------------


SETTINGS = {
    "exact": kernels.Penalties(),
    "same": kernels.Penalties(form="same"),
    "realign same": kernels.Shares(),
    "realign exact": kernels.Shares(form="exact"),
}


def spectrum_of(ws):
    N, M = ws.found.energy.shape
    sizes = ((M, ws.tiles.K), (M,), (N, M))
    return kernels.Spectrum(*(torch.ones(size, dtype=torch.float64) for size in sizes))


@pytest.mark.parametrize("form", SETTINGS)
def test_later_calls_launch_the_same_without_binding_and_looking_up_again(compiling, form):
    from triton.runtime.jit import JITFunction

    table, basis = made(modules=((1100, 600, 7), (40, 530, 3)))
    tiles = kernels.choose(table.shapes, 2, 5, table.data.dtype, 90, 132)
    tiles = replace(tiles, project=replace(tiles.project, split_length=512))
    ws = kernels.workspace(table, basis, SETTINGS[form], tiles)
    out = kernels.empty_like(table, SETTINGS[form])
    spectrum = spectrum_of(ws)

    def call():
        compiling.clear()
        kernels.correct(table, basis, SETTINGS[form], spectrum, out=out, workspace=ws)
        return list(compiling)

    first = call()
    assert [name.partition("_")[0] for name, _ in first] == [
        "project", "add", "realign" if "realign" in form else "solve", "recompose",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(JITFunction, "run")
        second = call()
    for (name, given), (again, later) in zip(first, second, strict=True):
        assert name == again and len(given) == len(later)
        for X, Y in zip(given, later, strict=True):
            assert X is Y or (not isinstance(X, torch.Tensor) and X == Y), name


@pytest.mark.parametrize("form", SETTINGS)
def test_a_call_is_few_steps_of_python(compiling, form):
    """Processor time is what bench/launches.py measures; here the calls that make it up are counted."""
    table, basis = made()
    ws = kernels.workspace(table, basis, SETTINGS[form])
    out = kernels.empty_like(table, SETTINGS[form])
    out = out if out.kept is None else out.beside(table)
    spectrum = spectrum_of(ws)
    steps = []

    def call():
        kernels.correct(table, basis, SETTINGS[form], spectrum, out=out, workspace=ws)

    call()
    sys.setprofile(lambda frame, event, argument: steps.append(event))
    try:
        call()
    finally:
        sys.setprofile(None)
    # Binding arguments and looking the kernel up, as Triton does for every launch, would be 200.
    assert sum(event in ("call", "c_call") for event in steps) <= 150


def test_other_types_vectors_and_choices_get_kernels_of_their_own(compiling):
    """One workspace serves tables of one layout whose ranks and types differ."""
    penalties = kernels.Penalties()
    table, basis = made(ranks=(4, 8))
    ws = kernels.workspace(table, basis, penalties)
    odd = kernels.pack(
        cases.problem(cases.Case(((40, 36, 7), (33, 50, 1)), (3, 5), cases.B16), "cpu").adapters,
        basis,
    )
    wide = replace(odd, data=odd.data.float())
    component = kernels.Penalties(granularity="component")
    for one, settings in (
        (table, penalties),
        (odd, penalties),
        (wide, penalties),
        (odd, component),
    ):
        kernels.correct(one, basis, settings, workspace=ws)
    known = compiling
    constants = [tuple(X for X in given if isinstance(X, (int, str))) for _, given in known]
    project, solve = (
        [c for (name, _), c in zip(known, constants, strict=True) if name == f"{stage}_kernel"]
        for stage in ("project", "solve")
    )
    assert project[0] != project[1] and len(ws.launchers) == 2 + 3 + 3
    assert "direction" in solve[0] and "component" in solve[3]


# --- refusals -------------------------------------------------------------------------------------


def test_what_is_not_where_the_compiled_kernels_expect_it_is_refused(compiling):
    """They were compiled for pointers to multiples of 16 bytes."""
    table, basis = made()
    penalties, shares = kernels.Penalties(), kernels.Shares()
    ws, other = (kernels.workspace(table, basis, s) for s in (penalties, shares))
    out = kernels.empty_like(table, penalties)

    def moved(X):
        return X.new_empty(X.numel() + 1)[1:].view(X.shape)

    def run(table=table, basis=basis, out=out):
        kernels.correct(table, basis, penalties, out=out, workspace=ws)

    run()
    for given in (
        {"table": replace(table, data=moved(table.data))},
        {"basis": replace(basis, data=moved(basis.data))},
        {"out": replace(out, data=moved(out.data))},
    ):
        with pytest.raises(ValueError, match="not 16-byte aligned"):
            run(**given)
    spectrum = spectrum_of(other)
    with pytest.raises(ValueError, match="not 16-byte aligned"):
        wrong = spectrum._replace(S=moved(spectrum.S))
        kernels.correct(table, basis, shares, wrong, workspace=other)


def test_stages_take_what_the_others_made_with_the_same_workspace(compiling):
    table, basis = made()
    penalties = kernels.Penalties()
    one, two = (kernels.workspace(table, basis, penalties) for _ in range(2))
    projection = kernels.project(table, basis, workspace=one)
    cores = kernels.solve(projection, penalties, workspace=one)
    with pytest.raises(ValueError, match="another workspace"):
        kernels.solve(projection, penalties, workspace=two)
    with pytest.raises(ValueError, match="another workspace"):
        kernels.recompose(table, basis, projection, two.found, workspace=one)
    kernels.recompose(table, basis, projection, cores, workspace=one)
