"""05_eval.py and the statistics of common.py, against exact arithmetic, simulation and hand-made responses."""

import importlib
import json
import math
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from model import render_prompt

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
    (["--out", "elsewhere"], "--model is needed"),
    (["--model", "nowhere/here"], "other settings"),
    (["--n", "0"], "at least 1"),
    (["--top-p", "0"], "--top-p must lie in (0, 1], got 0.0"),
    (["--model", "MODEL", "--n-of", "a=some"], "NAME=N"),
])
def test_bad_input_is_one_sentence(finished, tiny_model_dir, capsys, change, sentence):
    out, paths = finished
    before = files(out)
    change = [str(tiny_model_dir) if x == "MODEL" else x for x in change]
    base = [x for x in flags("", out, paths[0])]
    at = base.index("--model")
    del base[at:at + 2]
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*base, *change])
    assert stop.value.code == 2 and sentence in capsys.readouterr().err
    assert files(out) == before
