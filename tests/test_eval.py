"""05_eval.py and the statistics of common.py, against exact arithmetic, simulation and responses
written by hand."""

import importlib
import itertools
import json
import math
import random
import re
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

# --------------------------------------------------------------------------------------- statistics

# 97.5 % quantiles of Student's t, from printed tables: (degrees of freedom, quantile).
T_TABLE = [(1, 12.706), (2, 4.303), (4, 2.776), (29, 2.045), (1e5, 1.960)]


def test_pass_at_k_is_the_exact_combinatorial_value():
    rng = random.Random(0)
    cases = [(128, n_correct) for n_correct in (0, 1, 2, 63, 64, 127, 128)]
    for n in rng.choices(range(1, 129), k=100):
        cases.append((n, rng.randint(0, n)))
    for n, n_correct in cases:
        curve = common.pass_curve(n, n_correct)
        for k in range(1, n + 1):
            all_wrong = Fraction(math.comb(n - n_correct, k), math.comb(n, k))
            assert abs(common.pass_at_k(n, n_correct, k) - (1 - all_wrong)) < 1e-12
            assert abs(curve[k - 1] - (1 - all_wrong)) < 1e-12


def test_pass_at_k_is_the_mean_over_all_subsets():
    outcomes = [True, False, False, True, False, False]
    for k in range(1, 7):
        solved = [any(subset) for subset in itertools.combinations(outcomes, k)]
        assert abs(common.pass_at_k(6, 2, k) - sum(solved) / len(solved)) < 1e-15


@pytest.mark.parametrize("k", [0, 5, 8])
def test_pass_at_k_of_too_few_samples_is_an_error(k):
    with pytest.raises(ValueError, match="k must lie in 1..4"):
        common.pass_at_k(4, 2, k)


def test_t_quantile_against_tables():
    for freedom, expected in T_TABLE:
        assert common.t_quantile(0.975, freedom) == pytest.approx(expected, rel=2e-3)


def covered(draw, truth, repeats=1000):
    """Share of the 95 % intervals of `repeats` simulated studies that hold the truth.

    draw(rng): one study of one benchmark, a list over seeds of [P, 1] scores.
    """
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(repeats):
        _, low, high = common.bootstrap([draw(rng)], n_boot=1000)
        hits += low[0] <= truth <= high[0]
    return hits / repeats


def test_bootstrap_over_problems_covers_the_truth():
    """100 problems of very different difficulty, 16 samples each: the shape of a benchmark."""
    def draw(rng):
        solve_rates = rng.beta(0.5, 1.5, 100)
        n_correct = rng.binomial(16, solve_rates)
        return [n_correct[:, None] / 16]

    assert 0.93 <= covered(draw, 0.25) <= 0.97


@pytest.mark.slow
def test_bootstrap_over_problems_and_seeds_covers_the_truth():
    """5 seeds on the same 40 problems, with effects of seed, of problem, and of both together."""
    def draw(rng):
        of_seed = rng.normal(size=(5, 1)) * 0.05
        of_problem = rng.normal(size=(1, 40)) * 0.3
        of_both = rng.normal(size=(5, 40)) * 0.2
        return list((of_seed + of_problem + of_both)[..., None])

    def draw_where_seeds_decide(rng):
        of_seed = rng.normal(size=(5, 1)) * 0.1
        of_both = rng.normal(size=(5, 40)) * 0.01
        return list((of_seed + of_both)[..., None])

    assert 0.93 <= covered(draw, 0.0) <= 0.97
    assert 0.93 <= covered(draw_where_seeds_decide, 0.0, repeats=500) <= 0.97


def test_bootstrap_weighs_benchmarks_alike_and_sees_pairs():
    few = np.full((3, 1), 1.0)                          # 3 problems, mean 1
    many = np.linspace(0, 1, 101)[:, None]              # 101 problems, mean 0.5
    mean, low, high = common.bootstrap([[few], [many]])
    assert mean[0] == pytest.approx(0.75), "each benchmark has half of the weight"
    assert low[0] < 0.75 < high[0]
    _, low_again, high_again = common.bootstrap([[few], [many]])
    assert low_again == low, "repeatable"
    assert high_again == high, "repeatable"

    same_gain_everywhere = many * 0 + 0.1               # which leaves no doubt
    mean, low, high = common.bootstrap([[same_gain_everywhere]])
    assert mean[0] == pytest.approx(0.1)
    assert low[0] == pytest.approx(high[0])


# --------------------------------------------------------------------------------------- a tiny run


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def problems(path, n=5):
    """A problems file of n sums."""
    rows = []
    for i in range(n):
        rows.append({"pid": f"p{i}", "problem": f"{i}+{i}?", "answer": str(2 * i)})
    return write_rows(path, rows)


def flags(model, out, *paths, n=3, **more):
    """The command line that draws n samples a problem. A model of None is left out."""
    settings = {"model": model, "out": out, "n": n, "max_tokens": 12, "engine": "hf",
                "verify_workers": 1, **more}
    argv = ["--problems", *map(str, paths)]
    for name, value in settings.items():
        if value is not None:
            argv += ["--" + name.replace("_", "-"), str(value)]
    return argv


def stored_flags(path, out, *more):
    """The command line that draws nothing: what is stored is graded where needed, and summed up."""
    return ["--problems", str(path), "--out", str(out), "--verify-workers", "1", *more]


def refused(capsys, argv):
    """Run 05_eval.py on what it must refuse as bad input. -> what it says on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate.main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def rows_of(out, bench):
    return list(common.read_jsonl(out / f"{bench}.jsonl"))


def responses_of(out, bench):
    return [(row["pid"], row["k"], row["response"]) for row in rows_of(out, bench)]


def results_of(out):
    return json.loads((out / "results.json").read_text())


def files(out):
    """Every byte that must be a function of the set of responses (times and commits apart)."""
    contents = {path.name: path.read_text() for path in sorted(out.glob("*.jsonl"))}
    return contents, {**results_of(out), "seconds": None}


@pytest.fixture(scope="module")
def finished(tiny_model_dir, tmp_path_factory):
    """An evaluation on 5 and 3 problems, three samples of each: its directory, problems files."""
    folder = tmp_path_factory.mktemp("eval")
    paths = [problems(folder / "a.jsonl"), problems(folder / "b.jsonl", 3)]
    evaluate.main(flags(tiny_model_dir, folder / "out", *paths))
    return folder / "out", paths


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of `finished`, to be changed."""
    out, _ = finished
    shutil.copytree(out, tmp_path / "out")
    return tmp_path / "out"


def test_rows_and_results(finished, tiny_model_dir, tiny_tokenizer):
    out, _ = finished
    rows = rows_of(out, "a")
    expected_keys = list(itertools.product(["p0", "p1", "p2", "p3", "p4"], range(3)))
    assert [(row["pid"], row["k"]) for row in rows] == expected_keys
    for row in rows:
        assert row["seed"] == common.request_seed(42, row["pid"], row["k"])
        assert row["status"] != "ungraded"
    assert len({row["response"] for row in rows}) > 10, "samples of a problem differ"

    benchmarks = results_of(out)["benchmarks"]
    assert sorted(benchmarks) == ["a", "b"]
    assert benchmarks["b"]["n_problems"] == 3
    a = benchmarks["a"]
    assert a["truncation_rate"] == sum(row["finish"] == "length" for row in rows) / 15
    assert a["mean_tokens"] == pytest.approx(sum(row["n_tokens"] for row in rows) / 15)
    assert sum(a["length_histogram"]["counts"]) == 15

    meta = json.loads((out / "a.meta.json").read_text())
    assert meta["rows"] == 15
    assert len(meta["inputs"]) == 2, "the problems and the model"
    assert meta["args"]["temperature"] == 0.6


def plain_entropies(model, prompt, ids):
    """Sums of -p log p over the vocabulary, at the positions that predict the tokens `ids`."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0]
    logits = logits[len(prompt) - 1:-1].double()
    return (-(logits.softmax(1) * logits.log_softmax(1)).sum(1)).tolist()


def test_entropy_equals_a_plain_forward(finished, tiny_model_dir, tiny_tokenizer):
    """The stock model, one sequence at a time: a mean over the tokens of a problem, and of these
    means over the problems."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    out, paths = finished
    rows = rows_of(out, "a")
    table = {row["pid"]: row for row in rows_of(out, "a.problems")}
    means = []
    for problem in common.read_jsonl(paths[0]):
        pid = problem["pid"]
        prompt = render_prompt(tiny_tokenizer, problem["problem"])
        expected = []
        for row in rows:
            if row["pid"] == pid:
                expected += plain_entropies(model, prompt, row["ids"])
        assert table[pid]["entropy"] == pytest.approx(np.mean(expected), abs=1e-5)
        assert table[pid]["n_entropy_tokens"] == len(expected)
        means.append(np.mean(expected))
    shown = results_of(out)["benchmarks"]["a"]["entropy"]
    assert shown["value"] == pytest.approx(np.mean(means))


def test_stopped_anywhere_it_ends_with_the_same_bytes(finished, tiny_model_dir, tmp_path):
    """What a kill leaves: half of the rows, ungraded, in a rank's part, the last one cut short; no
    entropy yet."""
    out, paths = finished
    rows = rows_of(out, "a")
    random.Random(0).shuffle(rows)
    lines = ""
    for row in rows[:8]:
        ungraded = {**row, "predicted": None, "correct": None, "status": "ungraded"}
        lines += json.dumps(ungraded, ensure_ascii=False) + "\n"
    (tmp_path / "a.rank3.jsonl").write_text(lines[:-20])
    evaluate.main(flags(tiny_model_dir, tmp_path, *paths))
    assert files(tmp_path) == files(out)
    assert not list(tmp_path.glob("*.rank*"))


@pytest.mark.slow
def test_two_ranks_give_the_same_bytes(finished, tiny_model_dir, tmp_path):
    out, paths = finished
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", "--", str(ROOT / "05_eval.py")]
    command += flags(tiny_model_dir, tmp_path, *paths)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path) == files(out)


def test_more_samples_keep_the_old_ones(finished, tiny_model_dir, tmp_path):
    """n 2, then 3: the responses are those of n = 3 at once."""
    out, paths = finished
    evaluate.main(flags(tiny_model_dir, tmp_path, paths[1], n=2, entropy_samples=1))
    evaluate.main(flags(tiny_model_dir, tmp_path, paths[1], n=3, entropy_samples=1))
    assert responses_of(tmp_path, "b") == responses_of(out, "b")


def test_more_samples_with_more_entropy_samples_end_as_if_all_were_drawn_at_once(
        finished, tiny_model_dir, tmp_path):
    """--n 2, then 3, with --entropy-samples 4: entropies of two samples are not those of three."""
    out, paths = finished
    evaluate.main(flags(tiny_model_dir, tmp_path, *paths, n=2))
    evaluate.main(flags(tiny_model_dir, tmp_path, *paths, n=3))
    assert files(tmp_path) == files(out)


def test_removed_responses_leave_no_entropy_behind(finished, tiny_model_dir, tmp_path):
    """BENCH.jsonl is removed, as the refusal of other settings says, and drawn at another
    temperature."""
    out, paths = finished
    removed = tmp_path / "removed"
    fresh = tmp_path / "fresh"
    evaluate.main(flags(tiny_model_dir, removed, paths[0]))
    (removed / "a.jsonl").unlink()
    for folder in (removed, fresh):
        evaluate.main(flags(tiny_model_dir, folder, paths[0], temperature=1.3))
    assert files(removed) == files(fresh)

    def entropies(folder):
        return [row["entropy"] for row in rows_of(folder, "a.problems")]

    assert entropies(removed) != entropies(out)


def test_entropies_of_other_responses_are_not_shown_without_a_model(finished, copied):
    """A response was edited by hand: its problem has no entropy, so the benchmark has none."""
    out, paths = finished
    rows = rows_of(copied, "a")
    rows[4]["ids"] = rows[4]["ids"][:-1]
    write_rows(copied / "a.jsonl", rows)
    evaluate.main(stored_flags(paths[0], copied))
    assert results_of(copied)["benchmarks"]["a"]["entropy"] is None
    assert results_of(out)["benchmarks"]["a"]["entropy"] is not None


def test_half_measured_entropy_ends_with_the_same_bytes(finished, tiny_model_dir, copied):
    out, paths = finished
    rows = rows_of(out, "a.entropy")
    write_rows(copied / "a.entropy.jsonl", rows[:2])
    write_rows(copied / "a.entropy.rank1.jsonl", rows[4:])
    evaluate.main(flags(tiny_model_dir, copied, *paths))
    assert files(copied) == files(out)


def test_entropy_does_not_depend_on_the_packs(finished, tiny_model_dir, copied):
    assert evaluate.blocks_of([3, 3, 3, 9, 20, 1], 9) == [[0, 1, 2], [3], [4], [5]]
    out, paths = finished
    (copied / "a.entropy.jsonl").unlink()
    evaluate.main(flags(tiny_model_dir, copied, *paths, token_budget=100))   # one problem has more
    before = rows_of(out, "a.entropy")
    after = rows_of(copied, "a.entropy")
    for old, new in zip(before, after, strict=True):
        assert new == {**old, "entropy": pytest.approx(old["entropy"], abs=1e-6)}


def test_one_results_file_has_one_setting(tiny_model_dir, copied, tmp_path, capsys):
    more = problems(tmp_path / "c.jsonl", 2)
    before = (copied / "results.json").read_text()
    for name, value in (("temperature", 1.0), ("seed", 1), ("max_tokens", 9)):
        error = refused(capsys, flags(tiny_model_dir, copied, more, **{name: value}))
        assert f"not drawn alike ({name})" in error
        assert not (copied / "c.jsonl").exists()
    assert (copied / "results.json").read_text() == before
    evaluate.main(flags(tiny_model_dir, copied, more))
    assert sorted(results_of(copied)["benchmarks"]) == ["a", "b", "c"]


def test_changed_weights_at_the_same_path_do_not_mix(tiny_model_dir, tmp_path, capsys):
    """Neither within a benchmark nor within a results.json."""
    model = tmp_path / "model"
    out = tmp_path / "out"
    same_benchmark = problems(tmp_path / "a.jsonl", 2)
    another = problems(tmp_path / "b.jsonl", 2)
    shutil.copytree(tiny_model_dir, model)
    evaluate.main(flags(model, out, same_benchmark, n=1))
    changed = load_model(model)
    with torch.no_grad():
        changed.model.norm.weight.mul_(1.5)
    changed.save_pretrained(model)
    error = refused(capsys, flags(model, out, same_benchmark, n=1))
    assert f"other settings (the contents of {model}" in error
    error = refused(capsys, flags(model, out, another, n=1))
    assert "not drawn alike (weights)" in error


def test_names_that_are_parts_of_others(tiny_model_dir, tmp_path, capsys):
    """`id.ranked.jsonl` is no rank's part of `id.jsonl`, and `[1]` is no pattern."""
    out = tmp_path / "out"
    sizes = {"id": 2, "id.ranked": 3, "x[1]": 2, "x1": 3}
    paths = [problems(tmp_path / f"{name}.jsonl", n) for name, n in sizes.items()]
    for path in [*paths, paths[0], paths[2]]:
        evaluate.main(flags(tiny_model_dir, out, path, n=1, entropy_samples=1))
    benchmarks = results_of(out)["benchmarks"]
    assert {name: result["n_problems"] for name, result in benchmarks.items()} == sizes
    for name in ("id.entropy", "id.problems", "id.disagreements", "id.rank0"):
        path = problems(tmp_path / f"{name}.jsonl")
        error = refused(capsys, flags(tiny_model_dir, out, path, n=1))
        assert "another benchmark" in error


def test_problems_are_not_overwritten_by_their_responses(tiny_model_dir, tmp_path, capsys):
    path = problems(tmp_path / "a.jsonl")
    before = path.read_text()
    assert "is an input" in refused(capsys, flags(tiny_model_dir, tmp_path, path))
    assert path.read_text() == before


def test_repeated_problems_are_refused_with_their_line(tiny_model_dir, tmp_path, capsys):
    rows = [{"pid": "p1", "problem": "1+1?", "answer": "2"},
            {"pid": "p1", "problem": "1+2?", "answer": "3"}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    error = refused(capsys, flags(tiny_model_dir, tmp_path / "out", path))
    assert "a.jsonl:2: 'p1' occurs twice" in error


def test_answers_that_cannot_be_judged_are_shown_before_anything_is_drawn(
        tiny_model_dir, tmp_path, capsys, monkeypatch):
    class Drawing(Exception):
        pass

    shown = []

    def draw(*args, **options):
        shown.append(capsys.readouterr().out)
        raise Drawing

    monkeypatch.setattr(evaluate, "generate", draw)
    rows = [{"pid": "p0", "problem": "?", "answer": "2"},
            {"pid": "p1", "problem": "?", "answer": "\\undefinedmacro{{{"},
            {"pid": "p2", "problem": "?", "answer": "3"}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(Drawing):
        evaluate.main(flags(tiny_model_dir, tmp_path / "out", path, n=1))
    expected = r"a: 1 of 3 answers cannot be judged(.|\n)*p1: .*undefinedmacro"
    assert re.search(expected, shown[0]), shown


def test_bfloat16_weights_draw_and_measure(finished, tiny_model_dir, tmp_path, capsys):
    """Recorded, close to float32 but not the same, and not mixed with it."""
    out, paths = finished
    evaluate.main(flags(tiny_model_dir, tmp_path, paths[1], dtype="bfloat16", max_tokens=12))
    of_bfloat16 = results_of(tmp_path)
    of_float32 = results_of(out)
    assert of_bfloat16["dtype"] == "bfloat16"
    assert of_float32["dtype"] == "float32"
    here = of_bfloat16["benchmarks"]["b"]["entropy"]["value"]
    there = of_float32["benchmarks"]["b"]["entropy"]["value"]
    assert here != there
    assert here == pytest.approx(there, rel=0.05)
    error = refused(capsys, flags(tiny_model_dir, tmp_path, paths[1]))
    assert "other settings (dtype)" in error


def test_a_benchmark_with_its_own_number_of_samples(finished, tiny_model_dir, tmp_path):
    _, paths = finished
    argv = flags(tiny_model_dir, tmp_path, *paths, n=1, entropy_samples=0)
    evaluate.main([*argv, "--n-of", "b=2"])
    benchmarks = results_of(tmp_path)["benchmarks"]
    assert benchmarks["a"]["n_samples"] == 1
    assert benchmarks["b"]["n_samples"] == 2
    assert benchmarks["a"]["entropy"] is None


def test_equal_pids_in_two_benchmarks_are_two_problems(tiny_model_dir, tmp_path):
    """The second benchmark's responses are those that it has when it is evaluated alone."""
    long_problem = "what is the fourth root of 256, please?"
    a = write_rows(tmp_path / "a.jsonl", [{"pid": "1", "problem": "2+2?", "answer": "4"}])
    b = write_rows(tmp_path / "b.jsonl", [{"pid": "1", "problem": long_problem, "answer": "4"}])
    evaluate.main(flags(tiny_model_dir, tmp_path / "both", a, b, n=2))
    evaluate.main(flags(tiny_model_dir, tmp_path / "alone", b, n=2))
    assert responses_of(tmp_path / "both", "b") == responses_of(tmp_path / "alone", "b")


# ------------------------------------------------------------------------------------------ grading

RESPONSES = {
    "right": "<think>a</think>\\boxed{4}",
    "other": "<think>b</think>so \\boxed{4}.",
    "wrong": "<think>c</think>\\boxed{5}",
    "open": "<think>still thinking, \\boxed{4}",
    "no_box": "<think>d</think>it is 4",
}

# Three problems with the answer 4, and four responses to each.
HAND = {
    "x": ["right", "wrong", "other", "open"],
    "y": ["no_box", "wrong", "wrong", "wrong"],
    "z": ["right", "right", "right", "right"],
}

# The answer to y is 5 after all, which makes its three wrong responses right.
MENDED = {"x": "4", "y": "5", "z": "4"}
MENDED_PASS_AT_1 = (0.5 + 0.75 + 1) / 3


def write_answers(path, answers):
    """A problems file. answers: pid -> answer."""
    rows = [{"pid": pid, "problem": "2+2?", "answer": answer} for pid, answer in answers.items()]
    return write_rows(path, rows)


def stored(folder, names_of, answer="4"):
    """A finished evaluation made by hand: its problems file, its directory.

    names_of: pid -> names of its responses in RESPONSES.
    """
    out = folder / "out"
    rows = []
    for pid, names in names_of.items():
        for k, name in enumerate(names):
            rows.append({
                "pid": pid,
                "k": k,
                "seed": 0,
                "response": RESPONSES[name],
                "n_tokens": 10 + k,
                "finish": "length" if name == "open" else "stop",
                "predicted": None,
                "correct": None,
                "status": "ungraded",
            })
    write_rows(out / "hand.jsonl", rows)
    settings = {"model": "gone", "temperature": 0.6, "top_p": 0.95, "max_tokens": 99, "seed": 1,
                "engine": "hf"}
    (out / "hand.meta.json").write_text(json.dumps({"args": settings, "inputs": {}}))
    return write_answers(folder / "hand.jsonl", dict.fromkeys(names_of, answer)), out


def regrade(path, out, *more):
    evaluate.main(stored_flags(path, out, "--regrade", *more))
    return results_of(out)["benchmarks"]["hand"]


def test_unfinished_responses_are_not_summarised(tmp_path, capsys):
    path, out = stored(tmp_path, {**HAND, "x": ["right"]})
    error = refused(capsys, stored_flags(path, out, "--regrade"))
    assert "lacks responses to problem x" in error


def test_grading_without_a_model_counts_by_hand(tmp_path, capsys):
    """x has 2 of 4 right, y none, z all; one response was cut, y's first has no answer."""
    result = regrade(*stored(tmp_path, HAND))
    assert result["pass_at_1"]["value"] == pytest.approx((2 / 4 + 0 + 1) / 3)
    curve = [(1 / 2 + 1) / 3, (1 - 1 / 6 + 1) / 3, 2 / 3, 2 / 3]
    assert result["pass_at_k"]["value"] == pytest.approx(curve)
    assert result["pass_at_n"]["value"] == pytest.approx(2 / 3)
    assert result["truncation_rate"] == 1 / 12
    assert result["no_answer_rate"] == 2 / 12
    assert result["unknown_rate"] == 0
    assert result["statuses"]["truncated"] == 1
    n_distinct = 4 + 2 + 1
    assert result["duplicate_rate"] == pytest.approx(1 - n_distinct / 12)
    printed = capsys.readouterr().out
    assert "0.500" in printed
    assert "0 of 12 verdicts changed" in printed


def test_unknown_is_counted_apart_and_not_as_correct(tmp_path):
    result = regrade(*stored(tmp_path, HAND, answer="\\undefinedmacro{{{"))
    assert result["unknown_rate"] > 0
    assert result["pass_at_1"]["value"] == 0


def test_regrade_lists_what_changed(tmp_path, capsys):
    path, out = stored(tmp_path, HAND)
    regrade(path, out)
    before = responses_of(out, "hand")
    write_answers(path, MENDED)
    capsys.readouterr()
    result = regrade(path, out)
    printed = capsys.readouterr().out
    assert "3 of 12 verdicts changed" in printed
    assert "y k=1: False" in printed
    assert result["pass_at_1"]["value"] == pytest.approx(MENDED_PASS_AT_1)
    assert responses_of(out, "hand") == before


def test_an_edited_answer_is_graded_with_even_without_being_told(tmp_path, capsys):
    """Old verdicts under the new file's hash would be silently wrong."""
    path, out = stored(tmp_path, HAND)
    regrade(path, out)
    write_answers(path, MENDED)
    capsys.readouterr()
    evaluate.main(stored_flags(path, out))
    assert "3 of 12 verdicts changed" in capsys.readouterr().out
    result = results_of(out)["benchmarks"]["hand"]
    assert result["pass_at_1"]["value"] == pytest.approx(MENDED_PASS_AT_1)
    meta = json.loads((out / "hand.meta.json").read_text())
    assert meta["inputs"] == {str(path): common.sha256_file(path)}


def test_verdicts_of_another_grader_are_given_anew(tmp_path, monkeypatch):
    path, out = stored(tmp_path, HAND)
    regrade(path, out)
    n_graded = []
    verify_many = evaluate.verifier.verify_many

    def counted(pairs, **options):
        n_graded.append(len(pairs))
        return verify_many(pairs, **options)

    monkeypatch.setattr(evaluate.verifier, "verify_many", counted)
    evaluate.main(stored_flags(path, out))
    assert n_graded == [], "the same grader, the same answers: nothing to do"

    monkeypatch.setattr(evaluate.verifier, "grader_name", lambda: "another")
    evaluate.main(stored_flags(path, out))
    evaluate.main(stored_flags(path, out))
    assert n_graded == [12], "all of them, once"
    assert results_of(out)["grader"] == "another"


def test_regrading_keeps_what_drew_the_responses(finished, copied):
    """The model may be gone or changed by then: its hash stays that of the weights that drew
    them."""
    _, paths = finished
    sidecar = copied / "a.meta.json"
    meta = json.loads(sidecar.read_text())
    meta["commit"] = "of then"
    meta["args"]["model"] = "gone"
    meta["inputs"] = {str(paths[0]): "0" * 64, "gone/final": "1" * 64}
    sidecar.write_text(json.dumps(meta))
    (copied / "results.json").unlink()
    evaluate.main(stored_flags(paths[0], copied, "--regrade"))
    after = json.loads(sidecar.read_text())
    hash_of_problems = common.sha256_file(paths[0])
    assert after["inputs"] == {str(paths[0]): hash_of_problems, "gone/final": "1" * 64}
    assert after["commit"] == "of then"
    assert after["regraded"] is True
    assert results_of(copied)["weights"] == "1" * 64


def test_ids_cannot_drive_the_terminal(tmp_path, capsys):
    """Wherever a problem's id is printed, its control characters are made visible."""
    bad = "x\x1b[2J"
    path, out = stored(tmp_path, {bad: ["right", "wrong"], "y": ["right", "right"]})
    regrade(path, out)
    write_answers(path, {bad: "5", "y": "5"})
    regrade(path, out, "--show", "4")                   # what changed, and the responses
    bench = evaluate.Benchmark(path, out)
    evaluate.second_opinion(bench, bench.stored_rows(), lambda response, answer: True, out)
    write_answers(path, {bad: "5", "y": "5", bad + "z": "5"})
    with pytest.raises(SystemExit):                     # no responses to a problem
        regrade(path, out)
    write_answers(path, {"y": "5"})
    with pytest.raises(SystemExit):                     # responses to a problem that is not there
        regrade(path, out)
    printed = "".join(capsys.readouterr())
    assert printed.count("x\\x1b[2J") >= 5
    assert "\x1b" not in printed


def test_show_makes_control_characters_visible(tmp_path, capsys):
    path, out = stored(tmp_path, {"x": ["right"]})
    (row,) = rows_of(out, "hand")
    row["response"] = "<think>\x1b[2J\u202e</think>\\boxed{4}"
    write_rows(out / "hand.jsonl", [row])
    regrade(path, out, "--show", "1")
    printed = capsys.readouterr().out
    assert "\\x1b[2J" in printed
    assert "\x1b" not in printed
    assert "\u202e" not in printed, "text from right to left"
    assert "2+2?" in printed


def has_math_verify():
    try:
        import math_verify  # noqa: F401
    except ImportError:
        return False
    return True


def test_second_grader_disagreements(tmp_path, capsys):
    path, out = stored(tmp_path, HAND)
    if not has_math_verify():
        argv = stored_flags(path, out, "--regrade", "--second-grader", "math-verify")
        assert "pip install" in refused(capsys, argv)
    bench = evaluate.Benchmark(path, out)
    rows, _ = evaluate.grade(bench, evaluate.parse_args(stored_flags(path, out, "--regrade")))

    def holds_a_4(response, answer):                    # so it accepts "open" and "no_box", too
        return "4" in response

    assert evaluate.second_opinion(bench, rows, holds_a_4, out) == 2
    assert {row["pid"] for row in rows_of(out, "hand.disagreements")} == {"x", "y"}


# ---------------------------------------------------------------------------------------- bad input


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
    change = [places.get(word, word) for word in change]
    assert sentence in refused(capsys, [*flags(None, out, paths[0]), *change])
    assert files(out) == before
