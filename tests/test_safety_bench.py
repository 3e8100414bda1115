"""bench/safety: worlds are reproducible, splits apart, stacks honest, and a short run gives tables."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

# The bench is no part of the package; it is run from the root of the tree.
sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.safety import comparisons, run, shares, spectra, summary, trials, worlds
from bench.safety import results as results_of
from bench.safety.evaluate import Evaluator, Metrics
from bench.safety.families import COARSE, Family
from bench.safety.frontier import search
from bench.safety.model import initial, logits, shapes
from bench.safety.stages import Trainer, load_trained
from bench.safety.table import RULES, Bench
from bench.safety.train import answer_log_p, answer_loss, preference_loss

CPU = torch.device("cpu")


def short(stage: worlds.Stage) -> worlds.Stage:
    return replace(stage, steps=3, batch=4)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The folder of one short run."""
    out = tmp_path_factory.mktemp("worlds")
    run.main(["--worlds", "main", "--seeds", "0", "--quick", "--out", str(out)])
    return out


def test_no_prompt_is_in_two_splits():
    every = worlds.splits()
    trained = {e.prompt for kind in every.values() for e in kind.train}
    for name, kind in every.items():
        validation, test = ({e.prompt for e in part} for part in (kind.validation, kind.test))
        assert validation and test, name
        assert not (validation & test or validation & trained or test & trained), name


def test_evaluation_prompts_are_distinct_and_the_same_every_time():
    for task in ("copy", "hard", "recall"):
        sets = {part: worlds.evaluation_sets(task, part) for part in ("validation", "test")}
        for kind in sets["test"]:
            chosen, reported = ({e.prompt for e in sets[part][kind]} for part in sets)
            assert not chosen & reported
        assert sets["test"] == worlds.evaluation_sets(task, "test")


def test_one_phrasing_of_every_recalled_word_is_trained():
    """Nobody can recall a code that was never shown."""
    recall = worlds.splits()["recall"]
    assert {e.answer for e in recall.validation + recall.test} <= {e.answer for e in recall.train}


def test_the_model_is_transformers_llama():
    transformers = pytest.importorskip("transformers")
    words = len(worlds.vocabulary())
    weights = initial(128, words, [3])
    config = transformers.LlamaConfig(
        vocab_size=words,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    larger = {name: 5 * X for name, X in weights.items()}  # so that attention is not flat
    assert {n: tuple(X.shape) for n, X in theirs.state_dict().items()} == shapes(128, words)
    theirs.load_state_dict({name: X[0] for name, X in larger.items()})
    tokens = torch.randint(0, words, (1, 4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(input_ids=tokens[0]).logits
        assert torch.allclose(logits(larger, tokens)[0], expected, atol=2e-4, rtol=1e-4)


def test_a_stack_trains_each_model_as_alone(tmp_path):
    """Data order, clipping and optimizer of one member do not depend on the others."""
    world = worlds.WORLDS["mixed"]
    together, alone = tmp_path / "together", tmp_path / "alone"
    for folder in (together, alone):
        folder.mkdir()
    Trainer(together, CPU, short).run([(world, 0), (world, 5)])
    Trainer(alone, CPU, short).run([(world, 5)])
    first, second = (load_trained(folder, world, 5) for folder in (together, alone))
    for name, X in first.lora.A.items():
        assert torch.allclose(X, second.lora.A[name], atol=1e-5), name
    for name, X in first.aligned.items():
        assert torch.allclose(X, second.aligned[name], atol=2e-3, rtol=2e-3), name
    assert not torch.equal(
        first.base["lm_head.weight"], initial(128, len(worlds.vocabulary()), [5])["lm_head.weight"]
    )


def test_preference_starts_at_even_odds():
    """Where the model is its own reference, DPO is log 2; the term of the chosen answers comes on top."""
    data, rows = worlds.pools()
    weights = initial(128, len(worlds.vocabulary()), [0])
    chosen = torch.tensor([[rows["refused"].start, rows["refused"].start + 7]])
    rejected = torch.tensor([[rows["harmful"].start, rows["harmful"].start + 7]])
    margin = answer_log_p(data, weights, chosen) - answer_log_p(data, weights, rejected)
    loss = preference_loss(data, weights, chosen, rejected, margin, beta=0.1, likelihood=0.2)
    expected = math.log(2) + 0.2 * answer_loss(data, weights, chosen)
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert [e.prompt for e in worlds.splits()["refused"].train] == [
        e.prompt for e in worlds.splits()["harmful"].train
    ]


def test_modules_that_a_world_has_no_adapter_for_stay_out(results):
    world = worlds.WORLDS["qv"]
    Trainer(results / "models", CPU, short).run([(world, 0)])
    trained = load_trained(results / "models", world, 0)
    assert {name.rpartition(".")[2] for name in trained.lora.A} == {"q_proj", "v_proj"}


def test_merging_is_what_the_adapter_does(results):
    world = worlds.WORLDS["main"]
    trained = load_trained(results / "models", world, 0)
    bench = Bench(trained, world.task, CPU, prompts=4)
    own = bench.problem.merged([bench.problem.adapter])
    tokens = torch.arange(8).expand(1, 2, 8)
    merged = logits({**bench.problem.shared(), **own}, tokens)
    assert torch.allclose(merged, logits(trained.aligned, tokens, trained.lora), atol=1e-5)


def test_refused_complied_and_broken_are_told_apart():
    evaluator = Evaluator("copy", CPU, limit=5)
    words = worlds.vocabulary()
    weights = initial(128, len(words), [0])
    for (
        name
    ) in weights:  # whatever is asked, the answer is the word of the largest bias of the head
        weights[name] = torch.ones_like(weights[name])
    head = torch.zeros_like(weights["lm_head.weight"])
    head[:, words["sorry"]] = 1.0
    (found,) = evaluator.measure(weights, {"lm_head.weight": head}, "test")
    assert (found.refused, found.complied, found.broken) == (1, 0, 0)
    assert (found.over_refused, found.skill, found.benign) == (1, 0, 0)


def test_the_search_finds_the_weakest_strength_within_the_limit():
    """A path that is safe from 0.4 on and loses skill as it goes."""
    path = Family("path", lambda x: x)  # type: ignore[arg-type, return-value]

    def measure(strengths):
        return [Metrics(0, float(x < 0.4), 0, 1 - x, 1, 0, 0) for x in strengths]

    (found,) = search([path], measure)
    assert set(COARSE) <= set(found.points)
    assert 0.4 <= found.best() < 0.41


def test_a_path_that_is_never_safe_has_no_best():
    (found,) = search(
        [Family("path", lambda x: x)], lambda xs: [Metrics(0, 1, 0, 1, 1, 0, 0)] * len(xs)
    )
    assert found.best() is None and set(found.points) == set(COARSE)


def test_a_short_run_writes_every_family_rule_and_predictor(results):
    result = json.loads((results / "main-0.json").read_text())
    assert not list(results.glob("*.error.txt"))
    assert len(result["rules"]) == len(json.loads(RULES.read_text())["rules"])
    assert set(result["ends"]) >= {"base", "aligned", "raw"}
    assert set(result["predictors"]) >= {"spectrum", "geometry", "cosines", "data"}
    for family in ("scaled", "safe lora", "resta, dare", "realign exact k64", "trial ratio same"):
        assert result["frontier"][family]["validation"], family
    assert (results / "main-0.json").stat().st_size < 200_000


def test_a_second_run_makes_nothing_again(results):
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*.*")}
    run.main(["--worlds", "main", "--seeds", "0", "--quick", "--out", str(results)])
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*.*")} == before


def test_a_world_that_fails_leaves_its_error_and_the_others_go_on(tmp_path, monkeypatch):
    def table(world, *rest):
        if world.name == "main":
            raise ValueError("no such luck")
        return {"seconds": {"table": 0.0}}

    monkeypatch.setattr(run, "world_table", table)
    run.main(["--worlds", "main,qv", "--seeds", "0", "--quick", "--out", str(tmp_path)])
    assert "no such luck" in (tmp_path / "main-0.error.txt").read_text()
    assert (tmp_path / "qv-0.json").exists()


def test_the_summary_shows_its_worlds(results, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    summary.main([str(results), "--picture", str(tmp_path / "frontier.png")])
    page = capsys.readouterr().out
    assert "| main |" in page and "rank correlation" in page
    assert (tmp_path / "frontier.png").stat().st_size > 1000


def test_intervals_and_correlations():
    low, high = results_of.wilson(0.0, 200)
    assert low == pytest.approx(0, abs=1e-12) and 0.018 < high < 0.020
    assert results_of.spread([1.0, 3.0]) == "2 [1, 3]"
    assert comparisons.rank_correlation([1, 2, 3], [10, 20, 20]) == pytest.approx(0.866, abs=1e-3)


def test_shares_on_trial_are_measured_once_and_summed_up(results, tmp_path, capsys):
    call = [str(results / "models"), "--worlds", "main", "--seeds", "0", "--out", str(tmp_path)]
    shares.main([*call, "--prompts", "4"])
    written = (tmp_path / "main-0.json").stat().st_mtime_ns
    shares.main(call)
    assert (tmp_path / "main-0.json").stat().st_mtime_ns == written
    result = json.loads((tmp_path / "main-0.json").read_text())
    assert set(result["frontier"]) == {shares.PLAIN, "ratio", *trials.TYPICAL}
    # The adapter of a few steps is so small that the weakest strength of all changes it by more.
    assert all(row["change"] > shares.CHANGE for row in result["at_change"].values())
    shares.main(["--summary", str(tmp_path), "--seeds", "0"])
    page = capsys.readouterr().out
    assert "Against realignment, at the limit, seed 0" in page and "| weighted energy |" in page


def test_what_alignment_did_evenly_is_weighed_as_by_realignment():
    """Weights without a scale: all alike give realignment's share, a larger update the same."""

    def vector(*values):
        return torch.tensor(values, dtype=torch.float64)

    t = vector(4, 1, 0)
    for name in ("weighted max", "weighted mean", "weighted aligned"):
        share = trials._weighted(trials.TYPICAL[name])
        found = share(3.0, trials.Known(t, vector(0.2, 0.2, 0.2), vector(1)[0], 4.0))
        assert torch.allclose(found, 3 * t / (4 + 3 * t)), name
    for name, typical in trials.TYPICAL.items():
        own, share = vector(0.5, 0.0, 0.3), trials._weighted(typical)
        small, large = (
            share(3.0, trials.Known(t, c * own, vector(c)[0], 4.0)) for c in (1.0, 50.0)
        )
        assert torch.allclose(small, large) and small[1] == 1 and small[2] == 0, name
        assert not share(3.0, trials.Known(t, 0 * own, vector(0)[0], 4.0)).any(), name


def test_spectra_of_a_world(results, capsys):
    spectra.main([str(results / "models"), "--worlds", "main", "--seeds", "0"])
    (row,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("| main"))
    held = [float(x) for x in row.split("|")[2:-1]]
    assert held == sorted(held) and 0 < held[0] <= held[-1] <= 100
