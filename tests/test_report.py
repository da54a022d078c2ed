"""report.py on a run of the real schemas: its numbers against independent ones, and every part it
may have to miss."""

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

prepare = importlib.import_module("02_verify_score")
evaluate = importlib.import_module("05_eval")

# ------------------------------------------------------------------------------------ a run to read

# Share of right responses of each arm on the benchmark id (half of it on hard), and its entropy.
RATES = {"base": 0.05, "sft": 0.1, "sft_lp": 0.06, "oxa_mle": 0.4, "oxa_full": 0.45,
         "length_matched": 0.12, "longest": 0.3}
N_SAMPLES = 8
N_PROBLEMS = {"id": 40, "hard": 30}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Problems:
    """What 05 knows of a benchmark, without its file."""

    def __init__(self, name):
        self.name = name
        self.pids = [f"{name}-{i}" for i in range(N_PROBLEMS[name])]


def response_rows(bench, rate, rng):
    """Graded responses to problems of very different difficulty."""
    rows = []
    for pid in bench.pids:
        solve_rate = rng.beta(rate * 2, (1 - rate) * 2)
        for k in range(N_SAMPLES):
            rows.append({
                "pid": pid,
                "k": k,
                "response": str(rng.integers(5)),
                "n_tokens": int(rng.lognormal(4, 0.4)) + 1,
                "finish": "length" if rng.random() < 0.05 else "stop",
                "predicted": "1",
                "correct": bool(rng.random() < solve_rate),
                "status": "ok",
            })
    return rows


def write_eval(folder, rate, rng, entropy=True):
    """An evaluation as 05 leaves it, through its own functions."""
    results = {"model": "m", "grader": "verifier.py sha256:0", "seconds": {}, "benchmarks": {}}
    for name in N_PROBLEMS:
        bench = Problems(name)
        rows = response_rows(bench, rate if name == "id" else rate / 2, rng)
        entropies = {}
        for pid in bench.pids:
            value = rate + rng.normal() * 0.05
            entropies[pid] = {"entropy": value, "n_entropy_tokens": 100}
        table = evaluate.problem_table(bench, rows, entropies if entropy else {})
        write_rows(folder / f"{name}.problems.jsonl", table)
        results["benchmarks"][name] = evaluate.summarise(rows, table)
    (folder / "results.json").write_text(json.dumps(results))
    meta = {"schema": "eval", "commit": "abc", "versions": {"torch": "2"},
            "inputs": {"/somewhere/on/a/machine/data/id.jsonl": "f" * 64}}
    (folder / "id.meta.json").write_text(json.dumps(meta))


def scored_rows(rng):
    """1,200 teacher responses as 02 leaves them, of four styles, each with its perplexity."""
    rows = []
    for i, style in enumerate(rng.choice([1.6, 2.4, 3.1, 4.5], size=1200)):
        rows.append({
            "sid": f"q{i // 4}:t:{i % 4}",
            "pid": f"q{i // 4}",
            "source": "t",
            "k": i % 4,
            "seed": None,
            "problem": "p",
            "response": "r",
            "n_tokens": int(rng.integers(20, 90)),
            "finish": "stop",
            "predicted": "1",
            "correct": bool(rng.random() < 0.9),
            "status": "ok",
            "nll_sum": 1.0,
            "n_scored": 9,
            "ppl": float(style * np.exp(rng.normal() * 0.06)),
            "scorer": "base",
            "ppl_context": "none",
        })
    return rows


def sft_metrics(arm, rng):
    rows = []
    for i in range(60):
        decay = 1 / (1 + i / 20)
        rows.append({
            "step": i + 1,
            "ce_loss": 2 * decay + rng.normal() * 0.02,
            "tokens": 1000,
            "ul_loss": 0.3 + rng.normal() * 0.01 if arm == "oxa_full" else None,
            "entropy_ce": RATES[arm] + decay,
            "entropy_ul": None,
        })
    return rows


def rlvr_metrics(arm, rate):
    rows = []
    for i in range(40):
        rows.append({
            "step": i + 1,
            "reward": rate + i / 200,
            "entropy": RATES[arm] + 0.5 - i / 200,
            "tokens_per_second_rollout": 50,
            "seconds_rollout": 10,
            "response_tokens_mean": 60 + i,
            "truncated": 0.1,
        })
    return rows


def write_run(path, seeds=(0, 1), arms=tuple(RATES), rlvr=("sft", "oxa_full"), entropy=True,
              rates=RATES):
    """What the stages leave of a run. rlvr: the arms that went on to it."""
    rng = np.random.default_rng(7)
    for seed in seeds:
        folder = path / f"seed-{seed}"
        teacher = write_rows(folder / "data" / "teacher.scored.jsonl", scored_rows(rng))
        for arm in arms:
            if arm != "base":
                prepare.main(["select", "--arm", arm, "--teacher", str(teacher),
                              "--self", str(teacher), "--out", str(folder / arm / "train.jsonl"),
                              "--n-ce", "150", "--n-ul", "40", "--mu-quantile", "0.6"])
                write_rows(folder / arm / "sft" / "metrics.jsonl", sft_metrics(arm, rng))
            write_eval(folder / arm / "eval", rates[arm], rng, entropy)
            if arm in rlvr:
                write_eval(folder / arm / "eval_rlvr", rates[arm] + 0.2, rng, entropy)
                metrics = rlvr_metrics(arm, rates[arm])
                write_rows(folder / arm / "rlvr" / "metrics.jsonl", metrics)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two seeds, all arms, RLVR of two of them, and the report of it."""
    path = write_run(tmp_path_factory.mktemp("run"))
    report.main([str(path)])
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One seed, two arms, no RLVR."""
    path = tmp_path_factory.mktemp("small")
    return write_run(path, seeds=(0,), arms=("sft", "oxa_full"), rlvr=())


@pytest.fixture
def run_copy(run, tmp_path):
    """A copy of `run`, to be changed."""
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture
def small_copy(small, tmp_path):
    """A copy of `small`, to be changed."""
    return shutil.copytree(small, tmp_path / "small")


def add_benchmark(path, name, n, n_correct, **of_arm):
    """Put a benchmark of 50 problems into every evaluation of a run, in place of one that has its
    name: n samples a problem, n_correct of them right, of some arms another number."""
    for results in path.rglob("results.json"):
        arm = results.parts[-3]
        rows = []
        for i in range(50):
            rows.append({
                "pid": f"{name}-{i}",
                "n": n,
                "n_correct": of_arm.get(arm, n_correct),
                "n_truncated": 0,
                "mean_tokens": 9.0,
                "entropy": 1.0,
            })
        write_rows(results.with_name(f"{name}.problems.jsonl"), rows)
        content = json.loads(results.read_text())
        content["benchmarks"][name] = {}
        results.write_text(json.dumps(content))


# ----------------------------------------------------------------------------- what the report says


def summary_of(path):
    return json.loads((path / "report" / "summary.json").read_text())


def text_of(path):
    return (path / "report" / "REPORT.md").read_text()


def claims_of(summary, arm, reference):
    """The claims of the first world about these two arms."""
    for comparison in summary["claims"]:
        if (comparison["arm"], comparison["reference"]) == (arm, reference):
            return comparison["claims"]
    raise KeyError(f"no comparison of {arm} with {reference}")


def table_row(text, start, words=""):
    """The first row of a table that begins and goes on like this."""
    for line in text.splitlines():
        if line.startswith(f"| {start}") and words in line:
            return line
    raise KeyError(f"no row of a table begins with {start} and holds {words}")


def cells_of(row):
    """The cells of a row by number, from 1 on."""
    return [cell.strip() for cell in row.split("|")]


def refused(capsys, path, *flags):
    """Report on a run that must be refused as bad input. -> what is said on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        report.main([str(path), *flags])
    assert stop.value.code == 2
    return capsys.readouterr().err


def independent(path, arm, when, measure, benchmark, seeds=(0, 1)):
    """Mean over seeds and problems, from the problem tables alone. measure: "entropy", or the k of
    Pass@k."""
    values = []
    for seed in seeds:
        table = path / f"seed-{seed}" / arm / when / f"{benchmark}.problems.jsonl"
        for line in table.read_text().splitlines():
            row = json.loads(line)
            if measure == "entropy":
                values.append(row["entropy"])
            else:
                n_wrong = row["n"] - row["n_correct"]
                all_wrong = math.comb(n_wrong, measure) / math.comb(row["n"], measure)
                values.append(1 - all_wrong)
    return sum(values) / len(values)


def independent_gain(path, when, measure):
    """Of oxa_full over sft, the two benchmarks alike."""
    gains = []
    for benchmark in N_PROBLEMS:
        ours = independent(path, "oxa_full", when, measure, benchmark)
        theirs = independent(path, "sft", when, measure, benchmark)
        gains.append(ours - theirs)
    return np.mean(gains)


def test_numbers_equal_independent_ones(run):
    summary = summary_of(run)
    text = text_of(run)
    assert summary["benchmarks"] == {"id": 40, "hard": 30}
    assert summary["seeds"] == [0, 1]
    assert summary["pass_at_k_label"] == "Pass@8"
    for arm in RATES:
        shown = summary["arms"][arm]["before"]
        for name, measure in (("pass_at_1", 1), ("pass_at_k", 8), ("entropy", "entropy")):
            on_id = independent(run, arm, "eval", measure, "id")
            on_hard = independent(run, arm, "eval", measure, "hard")
            average = (on_id + on_hard) / 2
            assert shown["id"][name]["value"] == pytest.approx(on_id, abs=1e-12)
            assert shown["average"][name]["value"] == pytest.approx(average, abs=1e-12)

    claims = claims_of(summary, "oxa_full", "sft")
    effects = [
        (claims["C1"], "eval", 1),
        (claims["C2"], "eval", 8),
        (claims["C3"], "eval", "entropy"),
        (claims["C4"]["parts"]["Pass@1"], "eval_rlvr", 1),
        (claims["C4"]["parts"]["Pass@k"], "eval_rlvr", 8),
    ]
    for effect, when, measure in effects:
        gain = independent_gain(run, when, measure)
        assert effect["value"] == pytest.approx(gain, abs=1e-12)
        assert effect["low"] < gain < effect["high"]
        assert f"{gain:+.3f} [{effect['low']:+.3f}, {effect['high']:+.3f}]" in text


def test_text_shows_the_summary(run):
    text = text_of(run)
    summary = summary_of(run)
    pass_at_1 = summary["arms"]["oxa_full"]["before"]["average"]["pass_at_1"]
    averages = text.split("### Average over id, hard")[1].split("###")[0]
    assert "{value:.3f} [{low:.3f}, {high:.3f}]".format_map(pass_at_1) in averages

    claims = claims_of(summary, "oxa_full", "sft")
    verdicts = [claims[name]["verdict"] for name in ("C1", "C2", "C3", "C4")]
    n_good = verdicts.count("reproduced")
    assert n_good >= 3
    assert f"**{n_good} of 4 claims reproduced**" in text
    assert cells_of(table_row(text, "C1", "oxa_full − sft"))[6] == "2", "seeds"
    assert "### id (40 problems, 8 samples each)" in text
    assert "### hard (30 problems, 8 samples each)" in text


def test_everything_the_text_shows_is_there(run):
    images = re.findall(r"\]\((figures/[^)]+)\)", text_of(run))
    assert len(images) == 5
    for image in images:
        assert (run / "report" / image).stat().st_size > 5000
    assert "/somewhere" not in text_of(run), "paths of a machine"
    assert "/somewhere" not in (run / "report" / "summary.json").read_text()


# ----------------------------------------------------------------------------- effects and verdicts


def test_interval_of_a_difference_is_paired(tmp_path):
    """Two arms that differ by one solved sample on every problem: how hard the problems are is no
    doubt about that."""
    write_run(tmp_path, arms=("sft",), rlvr=())
    for seed in (0, 1):
        folder = tmp_path / f"seed-{seed}"
        shutil.copytree(folder / "sft", folder / "oxa_full")
        for name in N_PROBLEMS:
            for arm, gain in (("sft", 0), ("oxa_full", 1)):
                path = folder / arm / "eval" / f"{name}.problems.jsonl"
                rows = list(common.read_jsonl(path))
                for row in rows:
                    row["n_correct"] = min(row["n_correct"], N_SAMPLES - 1) + gain
                write_rows(path, rows)
    effect = report.estimate(report.load_run(tmp_path, 0, ()), 1, ["oxa_full", "sft"])
    assert effect["value"] == pytest.approx(1 / N_SAMPLES)
    assert effect["low"] == pytest.approx(1 / N_SAMPLES)
    assert effect["high"] == pytest.approx(1 / N_SAMPLES)


@pytest.mark.parametrize("low, high, expected", [
    (0.02, 0.1, "reproduced"),
    (-0.01, 0.1, "undecided"),
    (-0.1, 0.005, "not reproduced"),
    (0.001, 0.005, "not reproduced"),
    (0.0, 0.02, "undecided"),
])
def test_verdict_rule(low, high, expected):
    assert report.verdict({"low": low, "high": high}) == expected


@pytest.mark.parametrize("first, second, expected", [
    ("reproduced", "reproduced", "reproduced"),
    ("reproduced", "undecided", "undecided"),
    ("undecided", "not reproduced", "not reproduced"),
    ("not reproduced", "reproduced", "not reproduced"),
])
def test_verdict_of_two_parts(first, second, expected):
    """C4 has the worse of them, and a claim of one part is left as it is."""
    joined = report.join_parts({
        "C1": {"verdict": "undecided"},
        "C4 Pass@1": {"verdict": first},
        "C4 Pass@k": {"verdict": second},
    })
    parts = {"Pass@1": {"verdict": first}, "Pass@k": {"verdict": second}}
    assert joined["C4"] == {"verdict": expected, "parts": parts}
    assert joined["C1"] == {"verdict": "undecided"}


# ------------------------------------------------------------------------------------ missing parts


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
    text = text_of(tmp_path)
    assert sentence in text
    assert "nan" not in text


def test_missing_logs_and_training_sets(tmp_path):
    """The report is made without the figures that they would have given."""
    write_run(tmp_path, seeds=(0,), arms=("sft", "oxa_full"))
    for path in [*tmp_path.rglob("train*"), *tmp_path.rglob("metrics.jsonl")]:
        path.unlink()
    report.main([str(tmp_path)])
    shown = re.findall(r"\w+\.png", text_of(tmp_path))
    for figure in ("perplexity.png", "sft.png", "rlvr.png"):
        assert figure not in shown


# --------------------------------------------------------- what is compared, and what stands beside


def test_contrast_and_explanation(run, tmp_path):
    hard = shutil.copytree(run, tmp_path / "hard")
    rates_of_easy = {**RATES, "sft": 0.6, "oxa_full": 0.3, "oxa_mle": 0.3}
    easy = write_run(tmp_path / "easy", seeds=(0,), arms=("sft", "oxa_mle"), rlvr=(),
                     rates=rates_of_easy)
    write_rows(hard / "explain.jsonl", [{
        "title": "Which strategies",
        "text": "Chosen and executed.",
        "columns": ["arm", "chosen"],
        "rows": [["sft", 0.25]],
        "figures": {"pictures/styles.png": "Again."},
    }])
    (hard / "pictures").mkdir()
    (hard / "pictures" / "styles.png").write_bytes(b"a picture")
    report.main([str(hard), "--contrast", str(easy), "--k", "4"])
    text = text_of(hard)
    summary = summary_of(hard)

    # the explanation
    assert "### Which strategies" in text
    assert "| sft | 0.25 |" in text
    assert "(figures/explain_styles.png)" in text
    copied = hard / "report" / "figures" / "explain_styles.png"
    assert copied.read_bytes() == b"a picture"

    # the contrast: only what the second world has
    contrast = text.split("## The contrast: easy")[1].split("## Arms")[0]
    cells = cells_of(table_row(contrast, "C1"))
    assert cells[3] == "oxa_mle − sft"
    assert "oxa_full" not in contrast
    assert "Pass@4" in contrast
    assert cells[7] == "reproduced", "in the first world"
    assert cells[11] == "not reproduced", "in the second, beside it"
    assert {comparison["world"] for comparison in summary["claims"]} == {"hard", "easy"}

    # --k: Pass@4, with Pass@8 of all samples beside it
    assert summary["pass_at_k_label"] == "Pass@4"
    assert summary["pass_at_n_label"] == "Pass@8"
    assert "Pass@8: " in text
    shown = summary["arms"]["sft"]["before"]["id"]
    pass_at_4 = independent(run, "sft", "eval", 4, "id")
    pass_at_8 = independent(run, "sft", "eval", 8, "id")
    assert shown["pass_at_k"]["value"] == pytest.approx(pass_at_4, abs=1e-12)
    assert shown["pass_at_n"]["value"] == pytest.approx(pass_at_8, abs=1e-12)


def test_math500_stands_beside_claims_and_average(run, run_copy):
    def all_claims(summary):
        return [comparison["claims"] for comparison in summary["claims"]]

    without = summary_of(run)
    average_without = without["arms"]["sft"]["before"]["average"]
    add_benchmark(run_copy, "math500", n=4, n_correct=0, sft=4)
    report.main([str(run_copy)])
    summary = summary_of(run_copy)
    shown = summary["arms"]["sft"]["before"]
    assert all_claims(summary) == all_claims(without)
    assert summary["averaged_over"] == ["id", "hard"]
    assert shown["average"] == average_without
    assert shown["math500"]["pass_at_1"]["value"] == 1
    heading = "### math500 (50 problems, 4 samples each; in no claim and no average)"
    assert heading in text_of(run_copy)

    report.main([str(run_copy), "--k", "8"])       # more than math500 has, so it has no Pass@8
    shown = summary_of(run_copy)["arms"]["sft"]["before"]
    assert shown["math500"]["pass_at_k"] is None
    assert shown["average"]["pass_at_k"] == average_without["pass_at_n"]

    report.main([str(run_copy), "--beside"])       # nothing stands beside
    summary = summary_of(run_copy)
    assert summary["averaged_over"] == ["id", "hard", "math500"]
    assert all_claims(summary) != all_claims(without)


@pytest.mark.parametrize("name, value, cure", [
    ("grader", "another", "--regrade"),
    ("temperature", 1.0, "evaluate one of"),
])
def test_evaluations_that_were_not_made_alike_are_refused(small_copy, capsys, name, value, cure):
    path = small_copy / "seed-0" / "sft" / "eval" / "results.json"
    results = json.loads(path.read_text())
    path.write_text(json.dumps({**results, name: value}))
    error = refused(capsys, small_copy)
    assert f"differ in {name}" in error
    assert cure in error
    assert error.count("\n") == 1


def test_controls_are_explained_where_there_are_some(run, small_copy):
    report.main([str(small_copy)])
    assert "are\ncontrols, not in the paper" in text_of(run)
    assert "controls, not in the paper" not in text_of(small_copy)


def test_k_above_the_samples_drawn_is_refused(run_copy, capsys):
    """On any benchmark that counts."""
    assert "too few for --k 9" in refused(capsys, run_copy, "--k", "9")
    add_benchmark(run_copy, "id", n=4, n_correct=0)
    error = refused(capsys, run_copy, "--k", "5", "--beside", "hard")
    assert "too few for --k 5" in error


def test_arms_with_unlike_numbers_of_samples_are_compared_at_the_fewest(small_copy, capsys):
    """4 samples of sft where oxa_full has 8: both at Pass@4 there, and a k that sft has not is
    refused."""
    path = small_copy / "seed-0" / "sft" / "eval" / "hard.problems.jsonl"
    rows = list(common.read_jsonl(path))
    for row in rows:
        row["n"] = 4
        row["n_correct"] = min(row["n_correct"], 4)
    write_rows(path, rows)

    report.main([str(small_copy)])
    summary = summary_of(small_copy)
    assert summary["pass_at_k_label"] == "Pass@n"
    assert "### hard (30 problems, 4 samples each)" in text_of(small_copy)
    average = {}
    for arm in ("oxa_full", "sft"):
        on_id = independent(small_copy, arm, "eval", 8, "id", seeds=(0,))
        on_hard = independent(small_copy, arm, "eval", 4, "hard", seeds=(0,))
        average[arm] = (on_id + on_hard) / 2
    effect = summary["claims"][0]["claims"]["C2"]
    assert effect["value"] == pytest.approx(average["oxa_full"] - average["sft"], abs=1e-12)

    report.main([str(small_copy), "--k", "4"])
    summary = summary_of(small_copy)
    assert summary["claims"][0]["claims"]["C2"]["benchmarks"] == ["id", "hard"]
    assert summary["pass_at_k_label"] == "Pass@4"

    error = refused(capsys, small_copy, "--k", "5")
    assert "4 samples a problem on hard, too few for --k 5" in error


def test_a_benchmark_that_not_all_have_is_left_out(run, run_copy):
    add_benchmark(run_copy, "aime", n=8, n_correct=1)
    path = run_copy / "seed-1" / "sft" / "eval" / "results.json"
    results = json.loads(path.read_text())
    del results["benchmarks"]["aime"]
    path.write_text(json.dumps(results))
    report.main([str(run_copy)])
    assert summary_of(run_copy)["arms"] == summary_of(run)["arms"]
    assert "Left out, because not every evaluation has it: aime." in text_of(run_copy)


def test_entropy_of_the_trainers_first_step_stands_beside_c3(run):
    summary = summary_of(run)
    effect = claims_of(summary, "oxa_full", "sft")["C3"]
    expected = pytest.approx(RATES["oxa_full"] - RATES["sft"])
    assert effect["at_rl_step_1"] == {"value": expected, "seeds": 2}
    row = table_row(text_of(run), "C3", "oxa_full − sft")
    assert "at step 1 of RLVR: +0.350" in row
    effect = claims_of(summary, "oxa_mle", "sft")["C3"]
    assert effect["at_rl_step_1"] is None, "no RLVR of oxa_mle, so nothing beside"


# ---------------------------------------------------------------------------- hostile and bad files

SECTION = {"title": "t", "text": "", "columns": [], "rows": [], "figures": {}}
HOSTILE = "<img src=x onerror=alert(1)> [a](http://b) | c `d` \n# e \x1b[31m ~~f~~ **g**"


def test_names_and_captions_are_shown_as_text(small, tmp_path):
    """Nothing that comes from a file is a tag, a link, a heading, bold, or a cell more."""
    path = shutil.copytree(small, tmp_path / "<i>run")
    arm = "x<b>[y](z)|$q$"                            # a directory may have such a name
    shutil.copytree(path / "seed-0" / "sft", path / "seed-0" / arm)
    (path / "a.png").write_bytes(b"1")
    write_rows(path / "explain.jsonl", [{
        "title": HOSTILE,
        "text": HOSTILE,
        "columns": [HOSTILE],
        "rows": [[HOSTILE]],
        "figures": {"a.png": HOSTILE},
    }])
    report.main([str(path)])
    text = text_of(path)
    unescaped = r"(?<!\\)"
    assert not re.search(unescaped + r"<(?!think)", text), "no tag"
    assert not re.search(unescaped + r"\]\(http", text), "no link"
    assert "\x1b" not in text
    assert "\n# e" not in text, "no heading"
    assert not re.search(unescaped + r"\*\*g", text), "nothing bold"
    assert "`d`" in text, "code stays code"
    bars = re.findall(unescaped + r"\|", table_row(text, "x"))
    assert len(bars) == 8, "seven cells: k is n"


@pytest.mark.parametrize("name", [
    "../outside.png", "/etc/hostname", "link.png", "train.jsonl", "missing.png", "."])
def test_explain_jsonl_names_no_file_outside_its_folder(tmp_path, capsys, name):
    """Nor one that is no PNG; and nothing is copied."""
    run = tmp_path / "run"
    figures = run / "figures"
    figures.mkdir(parents=True)
    (run / "train.jsonl").write_text("{}")
    (tmp_path / "outside.png").write_bytes(b"1")
    (run / "link.png").symlink_to(tmp_path / "outside.png")
    write_rows(run / "explain.jsonl", [{**SECTION, "figures": {name: "c"}}])
    with pytest.raises(SystemExit) as stop:
        report.explanation(run, figures)
    assert stop.value.code == 2
    assert "explain.jsonl names the figure" in capsys.readouterr().err
    assert not list(figures.iterdir())


@pytest.mark.parametrize("content", [
    b"{",
    b"3",
    b"[3]",
    b"{}",
    b"\xff",
    b"",
    {"title": 1},
    {"text": None},
    {"columns": ["a"], "rows": [[1, 2]]},
    {"rows": [3]},
    {"figures": ["a.png"]},
])
def test_explain_jsonl_of_another_form_is_refused(tmp_path, capsys, content):
    """content: the bytes of the file, or what is changed in a sound section."""
    if isinstance(content, dict):
        content = json.dumps({**SECTION, **content}).encode()
    (tmp_path / "explain.jsonl").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        report.explanation(tmp_path, tmp_path)
    assert stop.value.code == 2
    assert "explain.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("change, sentence", [
    ({"n": 0}, "0 samples are right"),
    ({"n_correct": 9}, "9 of 8 samples are right"),
    ({"n_correct": -1}, "-1 of 8"),
    ({"n_correct": "3"}, "field 'n_correct' is str"),
    ({"pid": ""}, "field 'pid'"),
    ({"entropy": "x"}, "field 'entropy'"),
    ({"pid": "id-1"}, "occurs twice"),
    ({"entropy": float("nan")}, "not valid JSON"),
])
def test_bad_problem_tables_are_refused_by_file_and_line(small_copy, capsys, change, sentence):
    path = small_copy / "seed-0" / "sft" / "eval" / "id.problems.jsonl"
    first, second, third, *_ = common.read_jsonl(path)
    write_rows(path, [first, second, {**third, **change}])
    error = refused(capsys, small_copy)
    assert "id.problems.jsonl:3: " in error
    assert sentence in error


def test_bad_input_is_one_sentence(small_copy, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no evaluation" in refused(capsys, empty)

    folder = small_copy / "seed-0" / "sft" / "eval"
    _, *others = common.read_jsonl(folder / "id.problems.jsonl")
    write_rows(folder / "id.problems.jsonl", others)
    assert "different problems" in refused(capsys, small_copy)

    for content in ("{", "[]", '{"grader": "g"}'):
        (folder / "results.json").write_text(content)
        assert "results.json: " in refused(capsys, small_copy)
