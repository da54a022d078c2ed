"""05_eval.py and the statistics of common.py, against exact arithmetic, simulation and hand-made responses."""

import importlib
import json
import math
import random
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from model import load_model, render_prompt

evaluate = importlib.import_module("05_eval")
ROOT = Path(__file__).parent.parent

# ------------------------------------------------------------------------------------------------------ statistics


def test_pass_at_k_is_the_exact_combinatorial_value():
    rng = random.Random(0)
    cases = [(128, x) for x in (0, 1, 2, 63, 64, 127, 128)]
    cases += [(n, rng.randint(0, n)) for n in rng.choices(range(1, 129), k=100)]
    for n, correct in cases:
        curve = common.pass_curve(n, correct)
        for k in range(1, n + 1):
            exact = 1 - Fraction(math.comb(n - correct, k), math.comb(n, k))
            assert abs(common.pass_at_k(n, correct, k) - exact) < 1e-12
            assert abs(curve[k - 1] - exact) < 1e-12


def test_pass_at_k_is_the_mean_over_all_subsets():
    from itertools import combinations
    outcomes = [True, False, False, True, False, False]
    for k in range(1, 7):
        solved = [any(subset) for subset in combinations(outcomes, k)]
        assert abs(common.pass_at_k(6, 2, k) - sum(solved) / len(solved)) < 1e-15


@pytest.mark.parametrize("k", [0, 5, 8])
def test_pass_at_k_of_too_few_samples_is_an_error(k):
    with pytest.raises(ValueError, match="k must lie in 1..4"):
        common.pass_at_k(4, 2, k)


def test_t_quantile_against_tables():
    for freedom, expected in ((1, 12.706), (2, 4.303), (4, 2.776), (29, 2.045), (1e5, 1.960)):
        assert common.t_quantile(0.975, freedom) == pytest.approx(expected, rel=2e-3)


def covered(draw, truth, same_problems=True, repeats=1000):
    """Share of the 95 % intervals of `repeats` simulated studies that hold the truth."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(repeats):
        _, low, high = common.bootstrap([draw(rng)], same_problems, n_boot=1000)
        hits += low[0] <= truth <= high[0]
    return hits / repeats


def test_bootstrap_over_problems_covers_the_truth():
    """100 problems of very different difficulty, 16 samples each: the shape of a benchmark."""
    draw = lambda rng: [rng.binomial(16, rng.beta(0.5, 1.5, 100))[:, None] / 16]
    assert 0.93 <= covered(draw, 0.25) <= 0.97


@pytest.mark.slow
def test_bootstrap_over_problems_and_seeds_covers_the_truth():
    """5 seeds on the same 40 problems, with effects of seed, of problem, and of both together."""
    def draw(rng):
        seeds, problems = rng.normal(size=(5, 1)) * 0.05, rng.normal(size=(1, 40)) * 0.3
        return list((seeds + problems + rng.normal(size=(5, 40)) * 0.2)[..., None])
    assert 0.93 <= covered(draw, 0.0) <= 0.97
    only_seeds = lambda rng: list((rng.normal(size=(5, 1)) * 0.1 + rng.normal(size=(5, 40)) * 0.01)[..., None])
    assert 0.93 <= covered(only_seeds, 0.0, repeats=500) <= 0.97


def test_bootstrap_weighs_benchmarks_alike_and_sees_pairs():
    few, many = np.full((3, 1), 1.0), np.linspace(0, 1, 101)[:, None]
    mean, low, high = common.bootstrap([[few], [many]])
    assert mean[0] == pytest.approx(0.75) and low[0] < 0.75 < high[0]
    assert [low, high] == list(common.bootstrap([[few], [many]])[1:])             # repeatable
    mean, low, high = common.bootstrap([[many * 0 + 0.1]])                        # the same gain everywhere: no doubt
    assert mean[0] == pytest.approx(0.1) and low[0] == pytest.approx(high[0])


# ------------------------------------------------------------------------------------------------------- a tiny run


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def problems(path, n=5):
    return write_rows(path, [{"pid": f"p{i}", "problem": f"{i}+{i}?", "answer": str(2 * i)} for i in range(n)])


def flags(model, out, *paths, n=3, **more):
    given = {"model": model, "out": out, "n": n, "max_tokens": 12, "engine": "hf", "verify_workers": 1, **more}
    settings = [x for name, value in given.items() for x in (f"--{name.replace('_', '-')}", str(value))]
    return ["--problems", *map(str, paths), *settings]


def files(out):
    """Every byte that must be a function of the set of responses (times and commits apart)."""
    contents = {path.name: path.read_text() for path in sorted(Path(out).glob("*.jsonl"))}
    results = json.loads((Path(out) / "results.json").read_text())
    return contents, {**results, "seconds": None}


@pytest.fixture(scope="module")
def finished(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    paths = [problems(folder / "a.jsonl"), problems(folder / "b.jsonl", 3)]
    evaluate.main(flags(tiny_model_dir, folder / "out", *paths))
    return folder / "out", paths


def test_rows_and_results(finished, tiny_model_dir, tiny_tokenizer):
    out, paths = finished
    rows = list(common.read_jsonl(out / "a.jsonl"))
    assert [(row["pid"], row["k"]) for row in rows] == [(f"p{i}", k) for i in range(5) for k in range(3)]
    assert all(row["seed"] == common.request_seed(42, row["pid"], row["k"]) and row["status"] != "ungraded" for row in rows)
    assert len({row["response"] for row in rows}) > 10
    results = json.loads((out / "results.json").read_text())
    assert sorted(results["benchmarks"]) == ["a", "b"] and results["benchmarks"]["b"]["n_problems"] == 3
    a = results["benchmarks"]["a"]
    assert a["truncation_rate"] == sum(row["finish"] == "length" for row in rows) / 15
    assert a["mean_tokens"] == pytest.approx(sum(row["n_tokens"] for row in rows) / 15)
    assert sum(a["length_histogram"]["counts"]) == 15
    meta = json.loads((out / "a.meta.json").read_text())
    assert meta["rows"] == 15 and len(meta["inputs"]) == 2 and meta["args"]["temperature"] == 0.6


def test_entropy_equals_a_plain_forward(finished, tiny_model_dir, tiny_tokenizer):
    """Sum of -p log p over the vocabulary, at the positions that predict the sampled tokens, one sequence at a time."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    out, paths = finished
    rows = list(common.read_jsonl(out / "a.jsonl"))
    table = {row["pid"]: row for row in common.read_jsonl(out / "a.problems.jsonl")}
    means = []
    for problem in common.read_jsonl(paths[0]):
        prompt = render_prompt(tiny_tokenizer, problem["problem"])
        values = []
        for row in rows:
            if row["pid"] == problem["pid"]:
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + row["ids"]])).logits[0, len(prompt) - 1:-1].double()
                values += (-(logits.softmax(1) * logits.log_softmax(1)).sum(1)).tolist()
        assert table[problem["pid"]]["entropy"] == pytest.approx(np.mean(values), abs=1e-5)
        assert table[problem["pid"]]["n_entropy_tokens"] == len(values)
        means.append(np.mean(values))
    result = json.loads((out / "results.json").read_text())["benchmarks"]["a"]
    assert result["entropy"]["value"] == pytest.approx(np.mean(means))


def test_stopped_anywhere_it_ends_with_the_same_bytes(finished, tiny_model_dir, tmp_path):
    """Left-overs of a kill: half of the rows, ungraded, in a rank's part, the last one cut short; no entropy yet."""
    out, paths = finished
    rows = [dict(row, predicted=None, correct=None, status="ungraded") for row in common.read_jsonl(out / "a.jsonl")]
    random.Random(0).shuffle(rows)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[:8])
    (tmp_path / "a.rank3.jsonl").write_text(lines[:-20])
    evaluate.main(flags(tiny_model_dir, tmp_path, *paths))
    assert files(tmp_path) == files(out)
    assert not list(tmp_path.glob("*.rank*"))


@pytest.mark.slow
def test_two_ranks_give_the_same_bytes(finished, tiny_model_dir, tmp_path):
    out, paths = finished
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    done = subprocess.run([*launcher, str(ROOT / "05_eval.py"), *flags(tiny_model_dir, tmp_path, *paths)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path) == files(out)


def test_more_samples_keep_the_old_ones(finished, tiny_model_dir, tmp_path):
    out, paths = finished
    evaluate.main(flags(tiny_model_dir, tmp_path, paths[1], n=2, entropy_samples=1))
    evaluate.main(flags(tiny_model_dir, tmp_path, paths[1], n=3, entropy_samples=1))
    text = lambda folder: [(row["pid"], row["k"], row["response"]) for row in common.read_jsonl(folder / "b.jsonl")]
    assert text(tmp_path) == text(out)


def test_more_samples_with_more_entropy_samples_end_as_if_all_were_drawn_at_once(finished, tiny_model_dir, tmp_path):
    """--n 2, then 3, with --entropy-samples 4: the entropies of two samples are not those of three."""
    out, paths = finished
    evaluate.main(flags(tiny_model_dir, tmp_path, *paths, n=2))
    evaluate.main(flags(tiny_model_dir, tmp_path, *paths, n=3))
    assert files(tmp_path) == files(out)


def test_removed_responses_leave_no_entropy_behind(finished, tiny_model_dir, tmp_path):
    """BENCH.jsonl is removed, as the refusal of other settings says, and drawn at another temperature."""
    out, paths = finished
    for folder in (tmp_path / "same", tmp_path / "fresh"):
        if folder.name == "same":
            evaluate.main(flags(tiny_model_dir, folder, paths[0]))
            (folder / "a.jsonl").unlink()
        evaluate.main(flags(tiny_model_dir, folder, paths[0], temperature=1.3))
    assert files(tmp_path / "same") == files(tmp_path / "fresh")
    entropies = lambda folder: [row["entropy"] for row in common.read_jsonl(folder / "a.problems.jsonl")]
    assert entropies(tmp_path / "same") != entropies(out)


def test_entropies_of_other_responses_are_not_shown_without_a_model(finished, tmp_path):
    """A response was edited by hand: its problem has no entropy, so the benchmark has none."""
    out, paths = finished
    shutil.copytree(out, tmp_path / "out")
    rows = list(common.read_jsonl(tmp_path / "out" / "a.jsonl"))
    rows[4]["ids"] = rows[4]["ids"][:-1]
    write_rows(tmp_path / "out" / "a.jsonl", rows)
    evaluate.main(["--problems", str(paths[0]), "--out", str(tmp_path / "out"), "--verify-workers", "1"])
    assert files(tmp_path / "out")[1]["benchmarks"]["a"]["entropy"] is None
    assert files(out)[1]["benchmarks"]["a"]["entropy"] is not None


def test_half_measured_entropy_ends_with_the_same_bytes(finished, tiny_model_dir, tmp_path):
    out, paths = finished
    shutil.copytree(out, tmp_path / "out")
    rows = list(common.read_jsonl(out / "a.entropy.jsonl"))
    write_rows(tmp_path / "out" / "a.entropy.jsonl", rows[:2])
    write_rows(tmp_path / "out" / "a.entropy.rank1.jsonl", rows[4:])
    evaluate.main(flags(tiny_model_dir, tmp_path / "out", *paths))
    assert files(tmp_path / "out") == files(out)


def test_entropy_does_not_depend_on_the_packs(finished, tiny_model_dir, tmp_path):
    assert evaluate.blocks_of([3, 3, 3, 9, 20, 1], 9) == [[0, 1, 2], [3], [4], [5]]
    out, paths = finished
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "a.entropy.jsonl").unlink()
    evaluate.main(flags(tiny_model_dir, tmp_path / "out", *paths, token_budget=100))     # a problem is over 100
    for before, after in zip(*(common.read_jsonl(folder / "a.entropy.jsonl") for folder in (out, tmp_path / "out"))):
        assert after == {**before, "entropy": pytest.approx(before["entropy"], abs=1e-6)}


def test_one_results_file_has_one_setting(finished, tiny_model_dir, tmp_path, capsys):
    out, paths = finished
    shutil.copytree(out, tmp_path / "out")
    more = problems(tmp_path / "c.jsonl", 2)
    before = (tmp_path / "out" / "results.json").read_text()
    for change, name in ((dict(temperature=1.0), "temperature"), (dict(seed=1), "seed"), (dict(max_tokens=9), "max_tokens")):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(flags(tiny_model_dir, tmp_path / "out", more, **change))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and f"not drawn alike ({name})" in error
        assert not (tmp_path / "out" / "c.jsonl").exists()
    assert (tmp_path / "out" / "results.json").read_text() == before
    evaluate.main(flags(tiny_model_dir, tmp_path / "out", more))
    assert sorted(files(tmp_path / "out")[1]["benchmarks"]) == ["a", "b", "c"]


def test_changed_weights_at_the_same_path_do_not_mix(tiny_model_dir, tmp_path, capsys):
    model, paths = tmp_path / "model", [problems(tmp_path / f"{name}.jsonl", 2) for name in "ab"]
    shutil.copytree(tiny_model_dir, model)
    evaluate.main(flags(model, tmp_path / "out", paths[0], n=1))
    changed = load_model(model)
    with torch.no_grad():
        changed.model.norm.weight.mul_(1.5)
    changed.save_pretrained(model)
    for path in paths:
        with pytest.raises(SystemExit) as stop:
            evaluate.main(flags(model, tmp_path / "out", path, n=1))
        assert stop.value.code == 2 and ("weights" in (error := capsys.readouterr().err) or str(model) in error)


def test_names_that_are_parts_of_others(tiny_model_dir, tmp_path, capsys):
    """`id.ranked.jsonl` is no rank's part of `id.jsonl`, and `[1]` is no pattern."""
    paths = [problems(tmp_path / f"{name}.jsonl", n) for name, n in (("id", 2), ("id.ranked", 3), ("x[1]", 2), ("x1", 3))]
    for path in [*paths, paths[0], paths[2]]:
        evaluate.main(flags(tiny_model_dir, tmp_path / "out", path, n=1, entropy_samples=1))
    found = {name: b["n_problems"] for name, b in files(tmp_path / "out")[1]["benchmarks"].items()}
    assert found == {"id": 2, "id.ranked": 3, "x[1]": 2, "x1": 3}
    for name in ("id.entropy", "id.problems", "id.disagreements", "id.rank0"):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(flags(tiny_model_dir, tmp_path / "out", problems(tmp_path / f"{name}.jsonl"), n=1))
        assert stop.value.code == 2 and "another benchmark" in capsys.readouterr().err


def test_problems_are_not_overwritten_by_their_responses(tiny_model_dir, tmp_path, capsys):
    path = problems(tmp_path / "a.jsonl")
    before = path.read_text()
    with pytest.raises(SystemExit) as stop:
        evaluate.main(flags(tiny_model_dir, tmp_path, path))
    assert stop.value.code == 2 and "is an input" in capsys.readouterr().err and path.read_text() == before


def test_repeated_problems_are_refused_with_their_line(tiny_model_dir, tmp_path, capsys):
    rows = [{"pid": "p1", "problem": "1+1?", "answer": "2"}, {"pid": "p1", "problem": "1+2?", "answer": "3"}]
    with pytest.raises(SystemExit) as stop:
        evaluate.main(flags(tiny_model_dir, tmp_path / "out", write_rows(tmp_path / "a.jsonl", rows)))
    assert stop.value.code == 2 and "a.jsonl:2: 'p1' occurs twice" in capsys.readouterr().err


def test_answers_that_cannot_be_judged_are_shown_before_anything_is_drawn(tiny_model_dir, tmp_path, capsys, monkeypatch):
    rows = [{"pid": f"p{i}", "problem": "?", "answer": answer} for i, answer in enumerate(["2", "\\undefinedmacro{{{", "3"])]
    path = write_rows(tmp_path / "a.jsonl", rows)

    def drawn(*args, **options):
        raise AssertionError("drawn before " + capsys.readouterr().out)

    monkeypatch.setattr(evaluate, "generate", drawn)
    with pytest.raises(AssertionError, match=r"a: 1 of 3 answers cannot be judged(.|\n)*p1: .*undefinedmacro"):
        evaluate.main(flags(tiny_model_dir, tmp_path / "out", path, n=1))


def test_bfloat16_weights_draw_and_measure(finished, tiny_model_dir, tmp_path, capsys):
    out, paths = finished
    evaluate.main(flags(tiny_model_dir, tmp_path, paths[1], dtype="bfloat16", max_tokens=12))
    found = files(tmp_path)[1]
    assert found["dtype"] == "bfloat16" and files(out)[1]["dtype"] == "float32"
    here, there = (f["benchmarks"]["b"]["entropy"]["value"] for f in (found, files(out)[1]))
    assert here != there and here == pytest.approx(there, rel=0.05)
    with pytest.raises(SystemExit):
        evaluate.main(flags(tiny_model_dir, tmp_path, paths[1]))
    assert "other settings (dtype)" in capsys.readouterr().err


def test_a_benchmark_with_its_own_number_of_samples(finished, tiny_model_dir, tmp_path):
    out, paths = finished
    evaluate.main([*flags(tiny_model_dir, tmp_path, *paths, n=1, entropy_samples=0), "--n-of", "b=2"])
    results = json.loads((tmp_path / "results.json").read_text())["benchmarks"]
    assert [results[b]["n_samples"] for b in "ab"] == [1, 2] and results["a"]["entropy"] is None


# --------------------------------------------------------------------------------------------------------- grading

ANSWERS = {"right": "<think>a</think>\\boxed{4}", "other": "<think>b</think>so \\boxed{4}.",
           "wrong": "<think>c</think>\\boxed{5}", "open": "<think>still thinking, \\boxed{4}",
           "no_box": "<think>d</think>it is 4"}


def stored(folder, counts, answer="4"):
    """A finished evaluation made by hand. counts: pid -> list of names in ANSWERS."""
    paths = write_rows(folder / "hand.jsonl", [{"pid": pid, "problem": "2+2?", "answer": answer} for pid in counts])
    rows = [{"pid": pid, "k": k, "seed": 0, "response": ANSWERS[name], "n_tokens": 10 + k,
             "finish": "length" if name == "open" else "stop", "predicted": None, "correct": None, "status": "ungraded"}
            for pid, names in counts.items() for k, name in enumerate(names)]
    write_rows(folder / "out" / "hand.jsonl", rows)
    settings = {"model": "gone", "temperature": 0.6, "top_p": 0.95, "max_tokens": 99, "seed": 1, "engine": "hf"}
    (folder / "out" / "hand.meta.json").write_text(json.dumps({"args": settings, "inputs": {}}))
    return paths, folder / "out"


def test_equal_pids_in_two_benchmarks_are_two_problems(tiny_model_dir, tmp_path):
    paths = [write_rows(tmp_path / f"{name}.jsonl", [{"pid": "1", "problem": text, "answer": "4"}])
             for name, text in (("a", "2+2?"), ("b", "what is the fourth root of 256, please?"))]
    evaluate.main(flags(tiny_model_dir, tmp_path / "out", *paths, n=2))
    evaluate.main(flags(tiny_model_dir, tmp_path / "alone", paths[1], n=2))
    responses = lambda folder: [row["response"] for row in common.read_jsonl(tmp_path / folder / "b.jsonl")]
    assert responses("out") == responses("alone")


def test_unfinished_responses_are_not_summarised(tmp_path, capsys):
    path, out = stored(tmp_path, {**COUNTS, "x": ["right"]})
    with pytest.raises(SystemExit) as stop:
        regrade(path, out)
    assert stop.value.code == 2 and "lacks responses to problem x" in capsys.readouterr().err


COUNTS = {"x": ["right", "wrong", "other", "open"], "y": ["no_box", "wrong", "wrong", "wrong"], "z": ["right"] * 4}


def regrade(path, out, *more):
    evaluate.main(["--regrade", "--problems", str(path), "--out", str(out), "--verify-workers", "1", *more])
    return json.loads((out / "results.json").read_text())["benchmarks"]["hand"]


def test_grading_without_a_model_counts_by_hand(tmp_path, capsys):
    result = regrade(*stored(tmp_path, COUNTS))
    assert result["pass_at_1"]["value"] == pytest.approx((2 / 4 + 0 + 1) / 3)
    assert result["pass_at_k"]["value"] == pytest.approx([(1 / 2 + 1) / 3, (1 - 1 / 6 + 1) / 3, 2 / 3, 2 / 3])
    assert result["pass_at_n"]["value"] == pytest.approx(2 / 3)
    assert (result["truncation_rate"], result["no_answer_rate"], result["unknown_rate"]) == (1 / 12, 2 / 12, 0)
    assert result["statuses"]["truncated"] == 1
    assert result["duplicate_rate"] == pytest.approx(1 - (4 + 2 + 1) / 12)
    printed = capsys.readouterr().out
    assert "0.500" in printed and "0 of 12 verdicts changed" in printed


def test_unknown_is_counted_apart_and_not_as_correct(tmp_path):
    result = regrade(*stored(tmp_path, COUNTS, answer="\\undefinedmacro{{{"))
    assert result["unknown_rate"] > 0 and result["pass_at_1"]["value"] == 0


def test_regrade_lists_what_changed(tmp_path, capsys):
    path, out = stored(tmp_path, COUNTS)
    regrade(path, out)
    before = [row["response"] for row in common.read_jsonl(out / "hand.jsonl")]
    mended = [{"pid": pid, "problem": "2+2?", "answer": "5" if pid == "y" else "4"} for pid in COUNTS]
    write_rows(path, mended)
    capsys.readouterr()
    result = regrade(path, out)
    printed = capsys.readouterr().out
    assert "3 of 12 verdicts changed" in printed and "y k=1: False" in printed
    assert result["pass_at_1"]["value"] == pytest.approx((0.5 + 0.75 + 1) / 3)
    assert [row["response"] for row in common.read_jsonl(out / "hand.jsonl")] == before


def test_an_edited_answer_is_graded_with_even_without_being_told(tmp_path, capsys):
    """Old verdicts under the new file's hash would be silently wrong."""
    path, out = stored(tmp_path, COUNTS)
    regrade(path, out)
    write_rows(path, [{"pid": pid, "problem": "2+2?", "answer": "5" if pid == "y" else "4"} for pid in COUNTS])
    capsys.readouterr()
    evaluate.main(["--problems", str(path), "--out", str(out), "--verify-workers", "1"])
    assert "3 of 12 verdicts changed" in capsys.readouterr().out
    result = json.loads((out / "results.json").read_text())["benchmarks"]["hand"]
    assert result["pass_at_1"]["value"] == pytest.approx((0.5 + 0.75 + 1) / 3)
    assert json.loads((out / "hand.meta.json").read_text())["inputs"] == {str(path): common.sha256_file(path)}


def test_verdicts_of_another_grader_are_given_anew(tmp_path, capsys, monkeypatch):
    path, out = stored(tmp_path, COUNTS)
    regrade(path, out)
    graded = []
    real = evaluate.verifier.verify_many
    monkeypatch.setattr(evaluate.verifier, "verify_many", lambda pairs, **options: graded.append(len(pairs)) or real(pairs, **options))
    again = ["--problems", str(path), "--out", str(out), "--verify-workers", "1"]
    evaluate.main(again)
    assert graded == []                                       # the same grader, the same answers: nothing to do
    monkeypatch.setattr(evaluate.verifier, "grader_name", lambda: "another")
    evaluate.main(again)
    evaluate.main(again)
    assert graded == [12] and json.loads((out / "results.json").read_text())["grader"] == "another"


def test_regrading_keeps_what_drew_the_responses(finished, tmp_path):
    """The model may be gone or changed by then: its hash stays that of the weights that drew them."""
    out, paths = finished
    shutil.copytree(out, tmp_path / "out")
    before = json.loads((out / "a.meta.json").read_text())
    meta = dict(before, commit="of then", args={**before["args"], "model": "gone"},
                inputs={str(paths[0]): "0" * 64, "gone/final": "1" * 64})
    (tmp_path / "out" / "a.meta.json").write_text(json.dumps(meta))
    (tmp_path / "out" / "results.json").unlink()
    evaluate.main(["--regrade", "--problems", str(paths[0]), "--out", str(tmp_path / "out"), "--verify-workers", "1"])
    after = json.loads((tmp_path / "out" / "a.meta.json").read_text())
    assert after["inputs"] == {str(paths[0]): common.sha256_file(paths[0]), "gone/final": "1" * 64}
    assert after["commit"] == "of then" and after["regraded"] is True
    assert json.loads((tmp_path / "out" / "results.json").read_text())["weights"] == "1" * 64


def test_ids_cannot_drive_the_terminal(tmp_path, capsys):
    bad = "x\x1b[2J"
    path, out = stored(tmp_path, {bad: ["right", "wrong"], "y": ["right", "right"]})
    regrade(path, out)
    write_rows(path, [{"pid": pid, "problem": "2+2?", "answer": "5"} for pid in (bad, "y")])
    regrade(path, out, "--show", "4")
    bench = evaluate.Benchmark(path, out)
    evaluate.second_opinion(bench, bench.stored_rows(), lambda response, answer: True, out)
    write_rows(path, [{"pid": pid, "problem": "2+2?", "answer": "5"} for pid in (bad, "y", bad + "z")])
    with pytest.raises(SystemExit):
        regrade(path, out)
    write_rows(path, [{"pid": "y", "problem": "2+2?", "answer": "5"}])
    with pytest.raises(SystemExit):
        regrade(path, out)
    printed = "".join(capsys.readouterr())
    assert printed.count("x\\x1b[2J") >= 5 and "\x1b" not in printed


def test_show_makes_control_characters_visible(tmp_path, capsys):
    path, out = stored(tmp_path, {"x": ["right"]})
    rows = [dict(row, response="<think>\x1b[2J\u202e</think>\\boxed{4}") for row in common.read_jsonl(out / "hand.jsonl")]
    write_rows(out / "hand.jsonl", rows)
    regrade(path, out, "--show", "1")
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\\x1b[2J" in printed and "\u202e" not in printed and "2+2?" in printed


def test_second_grader_disagreements(tmp_path, capsys):
    path, out = stored(tmp_path, COUNTS)
    try:
        import math_verify  # noqa: F401
    except ImportError:
        with pytest.raises(SystemExit) as stop:
            regrade(path, out, "--second-grader", "math-verify")
        assert stop.value.code == 2 and "pip install" in capsys.readouterr().err
    bench = evaluate.Benchmark(path, out)
    rows, _ = evaluate.grade(bench, evaluate.parse_args(["--problems", str(path), "--out", str(out), "--regrade"]))
    assert evaluate.second_opinion(bench, rows, lambda response, answer: "4" in response, out) == 2   # open and no_box
    assert {row["pid"] for row in common.read_jsonl(out / "hand.disagreements.jsonl")} == {"x", "y"}


@pytest.mark.parametrize("change, sentence", [
    (["--model", "MODEL", "--temperature", "1.0"], "other settings (temperature)"),
    (["--model", "MODEL", "--n", "2"], "more than --n 2"),
    (["--out", "ELSEWHERE"], "--model is needed"),
    (["--model", "nowhere/here"], "other settings"),
    (["--n", "0"], "at least 1"),
    (["--temperature", "1e-320"], "--temperature must be 0 (greedy) or at least 0.01"),
    (["--top-p", "0"], "--top-p must lie in (0, 1], got 0.0"),
    (["--model", "MODEL", "--n-of", "a=some"], "NAME=N"),
    (["--model", "MODEL", "--n-of", "other=9"], "no --problems file has that name; there is a"),
])
def test_bad_input_is_one_sentence(finished, tiny_model_dir, tmp_path, capsys, change, sentence):
    out, paths = finished
    before = files(out)
    places = {"MODEL": str(tiny_model_dir), "ELSEWHERE": str(tmp_path)}
    change = [places.get(x, x) for x in change]
    base = [x for x in flags("", out, paths[0])]
    at = base.index("--model")
    del base[at:at + 2]
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*base, *change])
    assert stop.value.code == 2 and sentence in capsys.readouterr().err
    assert files(out) == before
