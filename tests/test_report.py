"""report.py on a run of the real schemas: its numbers against independent ones, and every part it may have to miss."""

import importlib
import json
import math
import re
import shutil

import numpy as np
import pytest

import common
from tools import report

pytestmark = pytest.mark.slow

evaluate, prepare = importlib.import_module("05_eval"), importlib.import_module("02_verify_score")

RATES = {"base": .05, "sft": .1, "sft_lp": .06, "oxa_mle": .4, "oxa_full": .45, "length_matched": .12, "longest": .3}
N, N_PROBLEMS = 8, {"id": 40, "hard": 30}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Problems:
    """What 05 knows of a benchmark, without its file."""

    def __init__(self, name):
        self.name, self.pids = name, [f"{name}-{i}" for i in range(N_PROBLEMS[name])]


def write_eval(folder, rate, rng, entropy=True):
    """An evaluation as 05 leaves it, through its own functions: problems of very different difficulty."""
    results = {"model": "m", "grader": "verifier.py sha256:0", "seconds": {}, "benchmarks": {}}
    for bench in map(Problems, N_PROBLEMS):
        level = rate * (1 if bench.name == "id" else 0.5)
        rows = [{"pid": pid, "k": k, "response": str(rng.integers(5)), "n_tokens": int(rng.lognormal(4, 0.4)) + 1,
                 "finish": "length" if rng.random() < 0.05 else "stop", "predicted": "1",
                 "correct": bool(rng.random() < p), "status": "ok"}
                for pid in bench.pids for p in [rng.beta(level * 2, (1 - level) * 2)] for k in range(N)]
        measured = {pid: {"entropy": rate + rng.normal() * 0.05, "n_entropy_tokens": 100} for pid in bench.pids}
        table = evaluate.problem_table(bench, rows, measured if entropy else {})
        write_rows(folder / f"{bench.name}.problems.jsonl", table)
        results["benchmarks"][bench.name] = evaluate.summarise(rows, table)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "id.meta.json").write_text(json.dumps({"schema": "eval", "commit": "abc", "versions": {"torch": "2"},
                                                     "inputs": {"/somewhere/on/a/machine/data/id.jsonl": "f" * 64}}))


def write_run(path, seeds=(0, 1), arms=tuple(RATES), rlvr=("sft", "oxa_full"), entropy=True, rates=RATES):
    rng = np.random.default_rng(7)
    for seed in seeds:
        folder = path / f"seed-{seed}"
        styles = rng.choice([1.6, 2.4, 3.1, 4.5], size=1200)
        scored = [{"sid": f"q{i // 4}:t:{i % 4}", "pid": f"q{i // 4}", "source": "t", "k": i % 4, "seed": None,
                   "problem": "p", "response": "r", "n_tokens": int(rng.integers(20, 90)), "finish": "stop",
                   "predicted": "1", "correct": bool(rng.random() < 0.9), "status": "ok", "nll_sum": 1.0, "n_scored": 9,
                   "ppl": float(s * np.exp(rng.normal() * 0.06)), "scorer": "base", "ppl_context": "none"}
                  for i, s in enumerate(styles)]
        teacher = write_rows(folder / "data" / "teacher.scored.jsonl", scored)
        for arm in arms:
            if arm != "base":
                out = str(folder / arm / "train.jsonl")
                prepare.main(["select", "--arm", arm, "--teacher", str(teacher), "--self", str(teacher), "--out", out,
                              "--n-ce", "150", "--n-ul", "40", "--mu-quantile", "0.6"])
                write_rows(folder / arm / "sft" / "metrics.jsonl", [
                    {"step": i + 1, "ce_loss": 2 / (1 + i / 20) + rng.normal() * 0.02, "tokens": 1000,
                     "ul_loss": 0.3 + rng.normal() * 0.01 if arm == "oxa_full" else None,
                     "entropy_ce": RATES[arm] + 1 / (1 + i / 20), "entropy_ul": None} for i in range(60)])
            write_eval(folder / arm / "eval", rates[arm], rng, entropy)
            if arm in rlvr:
                write_eval(folder / arm / "eval_rlvr", rates[arm] + 0.2, rng, entropy)
                write_rows(folder / arm / "rlvr" / "metrics.jsonl", [
                    {"step": i + 1, "reward": rates[arm] + i / 200, "entropy": RATES[arm] + 0.5 - i / 200,
                     "tokens_per_second_rollout": 50, "seconds_rollout": 10,
                     "response_tokens_mean": 60 + i, "truncated": 0.1} for i in range(40)])
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = write_run(tmp_path_factory.mktemp("run"))
    report.main([str(path)])
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One seed, two arms, no RLVR: what tests copy and then change."""
    return write_run(tmp_path_factory.mktemp("small"), (0,), ("sft", "oxa_full"), ())


def summary_of(path):
    return json.loads((path / "report" / "summary.json").read_text())


def text_of(path):
    return (path / "report" / "REPORT.md").read_text()


def independent(path, arm, when, measure, benchmark, seeds=(0, 1)):
    """Mean over seeds and problems, from the problem tables alone."""
    total = []
    for seed in seeds:
        for line in (path / f"seed-{seed}" / arm / when / f"{benchmark}.problems.jsonl").read_text().splitlines():
            row = json.loads(line)
            n, wrong = row["n"], row["n"] - row["n_correct"]
            pass_at = lambda k: 1 - math.comb(wrong, k) / math.comb(n, k)
            total.append(row["entropy"] if measure == "entropy" else pass_at(measure))
    return sum(total) / len(total)


def test_numbers_equal_independent_ones(run):
    found = summary_of(run)
    assert (found["benchmarks"], found["seeds"]) == ({"id": 40, "hard": 30}, [0, 1])
    assert found["pass_at_k_label"] == "Pass@8"
    for arm in RATES:
        for name, measure in (("pass_at_1", 1), ("pass_at_k", N), ("entropy", "entropy")):
            each = [independent(run, arm, "eval", measure, b) for b in ("id", "hard")]
            shown = found["arms"][arm]["before"]
            assert shown["id"][name]["value"] == pytest.approx(each[0], abs=1e-12)
            assert shown["average"][name]["value"] == pytest.approx(sum(each) / 2, abs=1e-12)
    main = next(x for x in found["claims"] if (x["arm"], x["reference"]) == ("oxa_full", "sft"))["claims"]
    main |= {f"C4 {part}": effect for part, effect in main["C4"]["parts"].items()}
    for claim, when, measure in (("C1", "eval", 1), ("C2", "eval", N), ("C3", "eval", "entropy"),
                                 ("C4 Pass@1", "eval_rlvr", 1), ("C4 Pass@k", "eval_rlvr", N)):
        gain = np.mean([independent(run, "oxa_full", when, measure, b) - independent(run, "sft", when, measure, b)
                        for b in ("id", "hard")])
        assert main[claim]["value"] == pytest.approx(gain, abs=1e-12)
        assert main[claim]["low"] < gain < main[claim]["high"]
        assert f"{gain:+.3f} [{main[claim]['low']:+.3f}, {main[claim]['high']:+.3f}]" in text_of(run)


def test_text_shows_the_summary(run):
    text, found = text_of(run), summary_of(run)
    value = found["arms"]["oxa_full"]["before"]["average"]["pass_at_1"]
    arms = text.split("### Average over id, hard")[1].split("###")[0]
    assert f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]" in arms
    main = next(x for x in found["claims"] if (x["arm"], x["reference"]) == ("oxa_full", "sft"))["claims"]
    n_good = sum(main[name]["verdict"] == "reproduced" for name in ("C1", "C2", "C3", "C4"))
    assert n_good >= 3 and f"**{n_good} of 4 claims reproduced**" in text
    row = next(line for line in text.splitlines() if line.startswith("| C1") and "oxa_full − sft" in line)
    assert [cell.strip() for cell in row.split("|")][6] == "2", "seeds"
    assert "### id (40 problems, 8 samples each)" in text and "### hard (30 problems, 8 samples each)" in text


def test_everything_the_text_shows_is_there(run):
    images = re.findall(r"\]\((figures/[^)]+)\)", text_of(run))
    assert len(images) == 5
    for image in images:
        assert (run / "report" / image).stat().st_size > 5000
    assert "/somewhere" not in text_of(run) + (run / "report" / "summary.json").read_text()


def test_interval_of_a_difference_is_paired(tmp_path):
    """Two arms that differ by one solved sample on every problem: how hard the problems are is no doubt about that."""
    write_run(tmp_path, arms=("sft",), rlvr=())
    for seed in (0, 1):
        shutil.copytree(tmp_path / f"seed-{seed}" / "sft", tmp_path / f"seed-{seed}" / "oxa_full")
        for b in N_PROBLEMS:
            for arm, gain in (("sft", 0), ("oxa_full", 1)):
                path = tmp_path / f"seed-{seed}" / arm / "eval" / f"{b}.problems.jsonl"
                rows = [dict(row, n_correct=min(row["n_correct"], N - 1) + gain) for row in common.read_jsonl(path)]
                write_rows(path, rows)
    e = report.estimate(report.load_run(tmp_path, 0, ()), 1, ["oxa_full", "sft"])
    assert (e["value"], e["low"], e["high"]) == pytest.approx((1 / N,) * 3)


@pytest.mark.parametrize("low, high, expected", [
    (0.02, 0.1, "reproduced"), (-0.01, 0.1, "undecided"), (-0.1, 0.005, "not reproduced"),
    (0.001, 0.005, "not reproduced"), (0.0, 0.02, "undecided")])
def test_verdict_rule(low, high, expected):
    assert report.verdict({"low": low, "high": high}) == expected


@pytest.mark.parametrize("first, second, expected", [
    ("reproduced", "reproduced", "reproduced"), ("reproduced", "undecided", "undecided"),
    ("undecided", "not reproduced", "not reproduced"), ("not reproduced", "reproduced", "not reproduced")])
def test_verdict_of_two_parts(first, second, expected):
    found = {"C1": {"verdict": "undecided"}, "C4 Pass@1": {"verdict": first}, "C4 Pass@k": {"verdict": second}}
    joined = report.join_parts(found)
    assert joined["C4"] == {"verdict": expected, "parts": {"Pass@1": {"verdict": first}, "Pass@k": {"verdict": second}}}
    assert joined["C1"] == {"verdict": "undecided"}


@pytest.mark.parametrize("arms, rlvr, seeds, entropy, sentence", [
    (("sft", "oxa_full"), (), (0,), True, "Not measured in this run: C4"),
    (("base", "sft", "oxa_full"), (), (0,), True,
     "Not run, or not evaluated: `sft_lp`, `oxa_mle`, `length_matched`, `longest`, RLVR."),
    (("base", "sft", "oxa_mle"), (), (3,), True, "One seed"),
    (("sft", "oxa_full"), ("oxa_full",), (0,), False, "Not measured in this run: C3, C4"),
    (("base",), (), (0,), True, "No claim can be judged"),
    (("oxa_mle", "longest"), (), (0,), True, "for `oxa_mle` over `longest`"),
])
def test_missing_parts(tmp_path, arms, rlvr, seeds, entropy, sentence):
    write_run(tmp_path, seeds, arms, rlvr, entropy)
    report.main([str(tmp_path)])
    assert sentence in text_of(tmp_path) and "nan" not in text_of(tmp_path)


def test_missing_logs_and_training_sets(tmp_path):
    write_run(tmp_path, (0,), ("sft", "oxa_full"))
    for path in [*tmp_path.rglob("train*"), *tmp_path.rglob("metrics.jsonl")]:
        path.unlink()
    report.main([str(tmp_path)])
    assert not {"perplexity.png", "sft.png", "rlvr.png"} & set(re.findall(r"\w+\.png", text_of(tmp_path)))


def test_contrast_and_explanation(run, tmp_path):
    reversed_rates = {**RATES, "sft": .6, "oxa_full": .3, "oxa_mle": .3}
    write_run(tmp_path / "easy", (0,), ("sft", "oxa_mle"), (), rates=reversed_rates)
    shutil.copytree(run, tmp_path / "hard")
    write_rows(tmp_path / "hard" / "explain.jsonl", [
        {"title": "Which strategies", "text": "Chosen and executed.", "columns": ["arm", "chosen"],
         "rows": [["sft", 0.25]], "figures": {"pictures/styles.png": "Again."}}])
    picture = tmp_path / "hard" / "pictures" / "styles.png"
    picture.parent.mkdir()
    picture.write_bytes(b"a picture")
    report.main([str(tmp_path / "hard"), "--contrast", str(tmp_path / "easy"), "--k", "4"])
    text = text_of(tmp_path / "hard")
    assert "### Which strategies" in text and "| sft | 0.25 |" in text and "(figures/explain_styles.png)" in text
    assert (tmp_path / "hard" / "report" / "figures" / "explain_styles.png").read_bytes() == b"a picture"
    contrast = text.split("## The contrast: easy")[1].split("## Arms")[0]
    row = next(line for line in contrast.splitlines() if line.startswith("| C1"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3] == "oxa_mle − sft" and "oxa_full" not in contrast and "Pass@4" in contrast
    assert (cells[7], cells[11]) == ("reproduced", "not reproduced"), "the two worlds side by side"
    found = summary_of(tmp_path / "hard")
    assert {x["world"] for x in found["claims"]} == {"hard", "easy"}
    assert (found["pass_at_k_label"], found["pass_at_n_label"]) == ("Pass@4", "Pass@8") and "Pass@8: " in text
    shown = found["arms"]["sft"]["before"]["id"]
    assert shown["pass_at_k"]["value"] == pytest.approx(independent(run, "sft", "eval", 4, "id"), abs=1e-12)
    assert shown["pass_at_n"]["value"] == pytest.approx(independent(run, "sft", "eval", 8, "id"), abs=1e-12)


def add_benchmark(path, name, n, correct_of):
    """A benchmark more in every evaluation of a run: `n` samples a problem, correct_of(arm) of them right."""
    for results in path.rglob("results.json"):
        arm = results.parts[-3]
        write_rows(results.with_name(f"{name}.problems.jsonl"), [
            {"pid": f"{name}-{i}", "n": n, "n_correct": correct_of(arm), "n_truncated": 0, "mean_tokens": 9.0, "entropy": 1.0}
            for i in range(50)])
        found = json.loads(results.read_text())
        found["benchmarks"][name] = {}
        results.write_text(json.dumps(found))


def test_math500_stands_beside_claims_and_average(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    add_benchmark(tmp_path / "run", "math500", 4, lambda arm: 4 if arm == "sft" else 0)
    report.main([str(tmp_path / "run")])
    before, now = summary_of(run), summary_of(tmp_path / "run")
    claims = lambda summary: [comparison["claims"] for comparison in summary["claims"]]
    assert claims(now) == claims(before) and now["averaged_over"] == ["id", "hard"]
    assert now["arms"]["sft"]["before"]["average"] == before["arms"]["sft"]["before"]["average"]
    assert now["arms"]["sft"]["before"]["math500"]["pass_at_1"]["value"] == 1
    assert "### math500 (50 problems, 4 samples each; in no claim and no average)" in text_of(tmp_path / "run")
    report.main([str(tmp_path / "run"), "--k", "8"])            # more than math500 has, so it has no Pass@8
    shown = summary_of(tmp_path / "run")["arms"]["sft"]["before"]
    assert shown["math500"]["pass_at_k"] is None and shown["average"]["pass_at_k"] == before["arms"]["sft"]["before"]["average"]["pass_at_n"]
    report.main([str(tmp_path / "run"), "--beside"])
    now = summary_of(tmp_path / "run")
    assert now["averaged_over"] == ["id", "hard", "math500"] and claims(now) != claims(before)


@pytest.mark.parametrize("name, value, cure", [("grader", "another", "--regrade"), ("temperature", 1.0, "evaluate one of")])
def test_evaluations_that_were_not_made_alike_are_refused(small, tmp_path, capsys, name, value, cure):
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "seed-0" / "sft" / "eval" / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"differ in {name}" in error and cure in error and error.count("\n") == 1


def test_controls_are_explained_where_there_are_some(run, small, tmp_path):
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    report.main([str(tmp_path)])
    assert "are\ncontrols, not in the paper" in text_of(run) and "controls, not in the paper" not in text_of(tmp_path)


def test_k_above_the_samples_drawn_is_refused(run, tmp_path, capsys):
    for k, flags in ((9, []), (5, ["--beside", "hard"])):
        shutil.copytree(run, tmp_path / str(k))
        if k == 5:
            add_benchmark(tmp_path / str(k), "id", 4, lambda arm: 0)
        with pytest.raises(SystemExit) as stop:
            report.main([str(tmp_path / str(k)), "--k", str(k), *flags])           # before anything is drawn
        assert stop.value.code == 2 and f"too few for --k {k}" in capsys.readouterr().err


def test_arms_with_unlike_numbers_of_samples_are_compared_at_the_fewest(small, tmp_path, capsys):
    """4 samples of sft where oxa_full has 8: both at Pass@4 there, and a k that sft has not is refused."""
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "seed-0" / "sft" / "eval" / "hard.problems.jsonl"
    write_rows(path, [dict(row, n=4, n_correct=min(row["n_correct"], 4)) for row in common.read_jsonl(path)])
    report.main([str(tmp_path)])
    found, text = summary_of(tmp_path), text_of(tmp_path)
    assert found["pass_at_k_label"] == "Pass@n" and "### hard (30 problems, 4 samples each)" in text
    at_n = lambda arm: [independent(tmp_path, arm, "eval", n, b, (0,)) for b, n in (("id", 8), ("hard", 4))]
    c2 = found["claims"][0]["claims"]["C2"]
    assert c2["value"] == pytest.approx((sum(at_n("oxa_full")) - sum(at_n("sft"))) / 2, abs=1e-12)
    report.main([str(tmp_path), "--k", "4"])
    c2 = summary_of(tmp_path)["claims"][0]["claims"]["C2"]
    assert c2["benchmarks"] == ["id", "hard"] and summary_of(tmp_path)["pass_at_k_label"] == "Pass@4"
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path), "--k", "5"])
    assert stop.value.code == 2 and "4 samples a problem on hard, too few for --k 5" in capsys.readouterr().err


def test_a_benchmark_that_not_all_have_is_left_out(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    add_benchmark(tmp_path / "run", "aime", 8, lambda arm: 1)
    lacking = tmp_path / "run" / "seed-1" / "sft" / "eval" / "results.json"
    found = json.loads(lacking.read_text())
    del found["benchmarks"]["aime"]
    lacking.write_text(json.dumps(found))
    report.main([str(tmp_path / "run")])
    assert summary_of(tmp_path / "run")["arms"] == summary_of(run)["arms"]
    assert "Left out, because not every evaluation has it: aime." in text_of(tmp_path / "run")


def test_entropy_of_the_trainers_first_step_stands_beside_c3(run):
    shown = next(x for x in summary_of(run)["claims"] if (x["arm"], x["reference"]) == ("oxa_full", "sft"))
    assert shown["claims"]["C3"]["at_rl_step_1"] == {"value": pytest.approx(RATES["oxa_full"] - RATES["sft"]), "seeds": 2}
    row = next(line for line in text_of(run).splitlines() if line.startswith("| C3") and "oxa_full − sft" in line)
    assert "at step 1 of RLVR: +0.350" in row
    other = next(x for x in summary_of(run)["claims"] if (x["arm"], x["reference"]) == ("oxa_mle", "sft"))
    assert other["claims"]["C3"]["at_rl_step_1"] is None, "no RLVR of oxa_mle, so nothing beside"


SECTION = {"title": "t", "text": "", "columns": [], "rows": [], "figures": {}}
HOSTILE = "<img src=x onerror=alert(1)> [a](http://b) | c `d` \n# e \x1b[31m ~~f~~ **g**"


def test_names_and_captions_are_shown_as_text(small, tmp_path):
    arm = "x<b>[y](z)|$q$"                                # a directory may have such a name
    shutil.copytree(small, tmp_path / "<i>run")
    shutil.copytree(tmp_path / "<i>run/seed-0/sft", tmp_path / "<i>run/seed-0" / arm)
    (tmp_path / "<i>run" / "a.png").write_bytes(b"1")
    write_rows(tmp_path / "<i>run" / "explain.jsonl", [
        {"title": HOSTILE, "text": HOSTILE, "columns": [HOSTILE], "rows": [[HOSTILE]], "figures": {"a.png": HOSTILE}}])
    report.main([str(tmp_path / "<i>run")])
    text = text_of(tmp_path / "<i>run")
    assert not re.search(r"(?<!\\)<(?!think)", text), "no tag"
    assert not re.search(r"(?<!\\)\]\(http", text) and "\x1b" not in text and "\n# e" not in text
    assert not re.search(r"(?<!\\)\*\*g", text) and "`d`" in text, "code stays code"
    cells = next(line for line in text.splitlines() if line.startswith("| x"))
    assert len(re.findall(r"(?<!\\)\|", cells)) == 8, "seven cells: k is n"


@pytest.mark.parametrize("name", ["../outside.png", "/etc/hostname", "link.png", "train.jsonl", "missing.png", "."])
def test_explain_jsonl_names_no_file_outside_its_folder(tmp_path, capsys, name):
    (tmp_path / "run" / "figures").mkdir(parents=True)
    (tmp_path / "run" / "train.jsonl").write_text("{}")
    (tmp_path / "outside.png").write_bytes(b"1")
    (tmp_path / "run" / "link.png").symlink_to(tmp_path / "outside.png")
    write_rows(tmp_path / "run" / "explain.jsonl", [{**SECTION, "figures": {name: "c"}}])
    with pytest.raises(SystemExit) as stop:
        report.explanation(tmp_path / "run", tmp_path / "run" / "figures")
    assert stop.value.code == 2 and "explain.jsonl names the figure" in capsys.readouterr().err
    assert not list((tmp_path / "run" / "figures").iterdir())


@pytest.mark.parametrize("content", [
    b"{", b"3", b"[3]", b"{}", b"\xff", b"", {"title": 1}, {"text": None}, {"columns": ["a"], "rows": [[1, 2]]}, {"rows": [3]},
    {"figures": ["a.png"]}])
def test_explain_jsonl_of_another_form_is_refused(tmp_path, capsys, content):
    if isinstance(content, dict):
        content = json.dumps({**SECTION, **content}).encode()
    (tmp_path / "explain.jsonl").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        report.explanation(tmp_path, tmp_path)
    assert stop.value.code == 2 and "explain.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("change, sentence", [
    ({"n": 0}, "0 samples are right"), ({"n_correct": 9}, "9 of 8 samples are right"), ({"n_correct": -1}, "-1 of 8"),
    ({"n_correct": "3"}, "field 'n_correct' is str"), ({"pid": ""}, "field 'pid'"), ({"entropy": "x"}, "field 'entropy'"),
    ({"pid": "id-1"}, "occurs twice"), ({"entropy": float("nan")}, "not valid JSON")])
def test_bad_problem_tables_are_refused_by_file_and_line(small, tmp_path, capsys, change, sentence):
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "seed-0" / "sft" / "eval" / "id.problems.jsonl"
    rows = list(common.read_jsonl(path))
    write_rows(path, rows[:2] + [{**rows[2], **change}])
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path)])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "id.problems.jsonl:3: " in message and sentence in message


def test_bad_input_is_one_sentence(small, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path)])
    assert stop.value.code == 2 and "holds no evaluation" in capsys.readouterr().err
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "seed-0" / "sft" / "eval" / "id.problems.jsonl"
    write_rows(path, list(common.read_jsonl(path))[1:])
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path)])
    assert stop.value.code == 2 and "different problems" in capsys.readouterr().err
    for text in ("{", "[]", '{"grader": "g"}'):
        (tmp_path / "seed-0" / "sft" / "eval" / "results.json").write_text(text)
        with pytest.raises(SystemExit) as stop:
            report.main([str(tmp_path)])
        assert stop.value.code == 2 and "results.json: " in capsys.readouterr().err
