"""toy/explain.py on rows made here: what it counts, how it splits a difference, where entropy is,
what it writes."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from model import encode_response, load_model, load_tokenizer, pack_sequences, render_prompt
from tools import report
from conftest import make_model
from toy import explain, make_base, world

pytestmark = pytest.mark.slow

N_PROBLEMS = 25
N = 20                                                              # responses to each problem
PROBLEMS = world.eval_problems(N_PROBLEMS)

# arm -> style -> (share of the arm's responses, share of these that is right)
CAREFUL = {"boiler": (0.1, 0.1), "col": (0.5, 0.9), "split": (0.4, 0.8)}
ARMS = {"base": {"leap": (0.8, 0.1), "col": (0.2, 0.9)},
        "sft": {"boiler": (0.6, 0.1), "col": (0.4, 0.9)},
        "oxa_mle": CAREFUL,
        "oxa_full": CAREFUL}


# ------------------------------------------------------------------------------------------- a run


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def evaluated_rows(benchmark, styles, tokenizer, shift):
    """Rows of responses as 05 writes them: each style has its share of every problem's, and exactly
    its right share less `shift` is right."""
    style_of = []                                                       # each of a problem's N
    for style, (share, _) in styles.items():
        style_of += [style] * round(share * N)
    rng = random.Random(7)
    written = dict.fromkeys(styles, 0)
    rows = []
    for i, problem in enumerate(PROBLEMS[benchmark]):
        for k, style in enumerate(style_of):
            right_share = styles[style][1] - shift
            n_right_before = int(written[style] * right_share)
            written[style] += 1
            is_right = int(written[style] * right_share) > n_right_before
            response = world.trace(rng, style, problem, wrong=not is_right)
            row = {"pid": f"{benchmark}-{i}", "k": k, "response": response, "correct": is_right}
            if k < 4:                                                   # 05 keeps those of a few
                row["ids"] = encode_response(tokenizer, response)
            rows.append(row)
    return rows


def write_eval(folder, styles, tokenizer, shift=0.0):
    """An evaluation on every benchmark as 05 leaves it; `shift`: see `evaluated_rows`."""
    for benchmark in PROBLEMS:
        rows = evaluated_rows(benchmark, styles, tokenizer, shift)
        write_rows(folder / f"{benchmark}.jsonl", rows)
        of_problems = []
        for i in range(N_PROBLEMS):
            n_correct = sum(row["correct"] for row in rows[i * N:(i + 1) * N])
            of_problems.append({"pid": f"{benchmark}-{i}", "n": N, "n_correct": n_correct,
                                "n_truncated": 0, "mean_tokens": 9.0, "entropy": 0.3 + i / 100})
        write_rows(folder / f"{benchmark}.problems.jsonl", of_problems)
    results = {"benchmarks": {benchmark: {} for benchmark in PROBLEMS}}
    (folder / "results.json").write_text(json.dumps(results))


def write_seed(folder, seed, model):
    """All arms of one seed, two of them with RLVR; every trained model is `model`."""
    tokenizer = load_tokenizer(model)
    for benchmark, problems in PROBLEMS.items():
        rows = []
        for i, problem in enumerate(problems):
            rows.append({"pid": f"{benchmark}-{i}", "problem": world.problem_text(problem)})
        write_rows(folder / "data" / f"{benchmark}.jsonl", rows)
    for arm, styles in ARMS.items():
        write_eval(folder / arm / "eval", styles, tokenizer, shift=0.05 * seed)
        if arm != "base":
            (folder / arm / "sft").symlink_to(model)
        meta = {"args": {"mu_quantile": 0.7, "cap": 1}, "seed": 0}
        write_rows(folder / arm / "train.meta.json", [meta])
    for arm in ("sft", "oxa_full"):
        write_eval(folder / arm / "eval_rlvr", CAREFUL, tokenizer)
        (folder / arm / "rlvr").symlink_to(model)


def write_ablations(run, tokenizer):
    """Two values of mu_quantile on seeds 0 and 1, one of cap on seed 0."""
    for seed in (0, 1):
        for value in (0.3, 0.9):
            arm = run / f"ablations/seed-{seed}/mu_quantile-{value}"
            write_eval(arm / "eval", CAREFUL, tokenizer, shift=0.2 * seed)
    write_eval(run / "ablations/seed-0/cap-2/eval", CAREFUL, tokenizer)


def write_longer(run, tokenizer):
    """RLVR of `sft` for four steps, where the run's own has two."""
    write_eval(run / "longer/sft/eval", CAREFUL, tokenizer)
    write_rows(run / "longer/sft/rlvr/metrics.jsonl", [{"step": i} for i in range(4)])
    write_rows(run / "seed-0/sft/rlvr/metrics.jsonl", [{"step": i} for i in range(2)])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random weights with the toy world's tokenizer."""
    path = make_model(tmp_path_factory.mktemp("model"))
    make_base.build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, model):
    """Two seeds, ablations, and longer RLVR of one arm."""
    path = tmp_path_factory.mktemp("runs") / "toy"
    for seed in (0, 1):
        write_seed(path / f"seed-{seed}", seed, model)
    tokenizer = load_tokenizer(model)
    write_ablations(path, tokenizer)
    write_longer(path, tokenizer)
    return path


# ---------------------------------------------------------------------------- choice and execution


def test_styles_are_counted_with_their_right_answers(run):
    """Wrong if a response is counted in another style than the one that it was written in."""
    counts = explain.load_run(run, "deep-leap").counts
    before = [(arm, "before") for arm in ARMS]
    assert list(counts) == before + [("sft", "after"), ("oxa_full", "after")]
    for arm, styles in ARMS.items():
        expected = {}
        for style, (share, right) in styles.items():
            n = round(share * N_PROBLEMS * N)
            expected[style] = (n, int(n * right))
        for benchmark in ("id", "hard"):
            of_seed_0 = counts[arm, "before"][benchmark][0]
            found = {}
            for style, (n, n_right, n_executed) in zip(explain.STYLES, of_seed_0):
                assert n_executed == n_right, "the teacher's right traces are right in every step"
                if n > 0:
                    found[style] = (n, n_right)
            assert found == expected


def test_a_right_answer_by_wrong_steps_is_not_counted_as_executed():
    text = "47A+25B-13 mod 100"
    good = world.trace(random.Random(0), "col", world.parse_problem(text))
    bad = good.replace("72. ", "73. ", 1)
    rows = [{"pid": "p", "response": good, "correct": True},
            {"pid": "p", "response": bad, "correct": True}]

    counts = explain.count_styles(rows, {"p": text}, "deep-leap")
    assert counts[explain.STYLES.index("col")].tolist() == [2, 2, 1]


def counted(**styles):
    """Counts [K, 3] with these rows, and zeros for other styles."""
    counts = np.zeros((len(explain.STYLES), 3), dtype=int)
    for style, row in styles.items():
        counts[explain.STYLES.index(style)] = row
    return counts


def random_counts(rng, n):
    """Counts [K, 3] of n [K] responses, two fifths of them right."""
    n_right = rng.binomial(n, 0.4)
    return np.stack([n, n_right, np.zeros_like(n)], axis=1)


def accuracy(counts):
    n, n_right, _ = counts.sum(axis=0)
    return n_right / n


def test_a_difference_splits_into_choice_and_execution():
    shallow = counted(boiler=(80, 8, 8), col=(20, 18, 18))
    other_shares = counted(boiler=(20, 2, 2), col=(80, 72, 72))
    other_rates = counted(boiler=(80, 40, 40), col=(20, 20, 20))
    assert explain.split_difference(other_shares, shallow) == pytest.approx((0.48, 0.0))
    assert explain.split_difference(other_rates, shallow) == pytest.approx((0.0, 0.34))

    # a style that the reference never wrote is all choice
    reference = counted(boiler=(100, 10, 10))
    with_split = counted(boiler=(80, 8, 8), split=(20, 10, 10))
    assert explain.split_difference(with_split, reference) == pytest.approx((0.08, 0.0))

    # nothing of the difference is left over
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = rng.integers(0, 50, (2, len(explain.STYLES)))
        a = random_counts(rng, sizes[0])
        b = random_counts(rng, sizes[1])

        choice, execution = explain.split_difference(a, b)
        assert choice + execution == pytest.approx(accuracy(a) - accuracy(b))


# ----------------------------------------------------------------------------------------- entropy


def test_kinds_of_tokens():
    """The choice is the token after <think>, whatever it is; other tokens go by their letters."""
    tokenizer = make_base.build_tokenizer()

    def kinds(text):
        pieces = tokenizer.convert_ids_to_tokens(encode_response(tokenizer, text))
        return [explain.KINDS[i] for i in explain.kinds_of(pieces)]

    opening = world.OPENINGS["col"][0]
    found = kinds(f"<think>{opening}A+25, so 7")
    assert found[:2] == ["arithmetic", "choice"]
    assert found[2:7] == ["arithmetic"] * 5
    assert found[7:] == ["words", "arithmetic", "arithmetic"]
    assert kinds("<think>47")[:2] == ["arithmetic", "choice"], "a leap is chosen with a digit"
    assert kinds("so the 4</think>") == ["words", "words"] + ["arithmetic"] * 3


@torch.no_grad()
def plain_entropy(net, ids):
    """[L] entropy of the next token after each of `ids`, from the softmax of all logits."""
    pack = pack_sequences([(ids, 1)])
    output = net.model(input_ids=pack.input_ids[None], position_ids=pack.position_ids[None],
                       pack=pack, use_cache=False)
    hidden = output.last_hidden_state[0]
    logp = torch.log_softmax(hidden @ net.get_output_embeddings().weight.T, dim=-1)
    return -(logp.exp() * logp).sum(-1)


def test_entropy_by_kind_against_plain_softmax(model):
    """Wrong if packing mixes up samples, or an entropy is counted for its neighbour's kind."""
    tokenizer = load_tokenizer(model)
    net = load_model(model)
    rng = random.Random(3)
    samples = []
    styles = ("col", "boiler", "noisy", "leap", "split", "terse")
    for problem, style in zip(world.eval_problems(6)["id"], styles):
        response = world.trace(rng, style, problem)
        samples.append((world.problem_text(problem), encode_response(tokenizer, response)))

    found = explain.entropy_by_kind(net, tokenizer, samples)

    values = [[], [], []]                                               # of each kind
    for problem, ids in samples:
        prompt = render_prompt(tokenizer, problem)
        entropy = plain_entropy(net, prompt + ids)[len(prompt) - 1:-1].tolist()
        kinds = explain.kinds_of(tokenizer.convert_ids_to_tokens(ids))
        for kind, h in zip(kinds, entropy, strict=True):
            values[kind].append(h)
    assert len(values[0]) == 6, "one choice in each sample"
    n = np.array([len(of_kind) for of_kind in values])
    means = [np.mean(of_kind) for of_kind in values]
    np.testing.assert_allclose(found[:, 0], n / n.sum(), rtol=1e-6)
    np.testing.assert_allclose(found[:, 1], means, rtol=1e-4)


# ----------------------------------------------------------------------------------- explain.jsonl


def cells_of(section, arm, benchmark):
    """A row's cells after arm and set."""
    found = [row[2:] for row in section["rows"] if row[:2] == [arm, benchmark]]
    assert len(found) == 1
    return found[0]


def mean_in(cell):
    """0.9 of the cell "0.90 (0.88 to 0.92)"."""
    return float(cell.split()[0])


def pass1(shift):
    """What `write_eval` makes of CAREFUL."""
    return sum(share * (right - shift) for share, right in CAREFUL.values())


def test_explain_jsonl_is_what_the_report_shows(run, model, capsys):
    """Every table against the shares and rates that `run` was written with, section by section."""
    explain.main([str(run), "--base", str(model), "--contrast", str(run)])
    sections = list(common.read_jsonl(run / "explain.jsonl"))
    by_title = {section["title"]: section for section in sections}

    # the arms' strategies
    title = "Which strategy is chosen, and how often it leads to the right answer"
    cells = cells_of(by_title[title], "oxa_mle", "id")
    assert cells[0] == "0.90 (0.90 to 0.90)"                # col 0.5 + split 0.4, in both seeds
    mean_over_seeds = (pass1(0) + pass1(0.05)) / 2
    assert mean_in(cells[3]) == pytest.approx(mean_over_seeds, abs=0.01)

    # their differences from sft: of choice, not of execution
    cells = cells_of(by_title["Choice or execution"], "oxa_mle", "id")
    assert mean_in(cells[1]) > 0.3
    assert abs(mean_in(cells[2])) < 0.02

    # ablations: two values and the run's own on two seeds; one value on one seed
    ablation = by_title["Ablation: μ, as a quantile of perplexity"]
    assert ablation["columns"][1:4] == ["id: Pass@1", "id: Pass@8", "id: entropy (nats)"]
    assert [row[0] for row in ablation["rows"]] == ["0.3", "0.7", "0.9"]
    mean_over_seeds = (pass1(0) + pass1(0.2)) / 2
    assert float(ablation["rows"][0][1]) == pytest.approx(mean_over_seeds, abs=0.01)
    assert "seeds 0, 1" in ablation["text"]
    cap = by_title["Ablation: cap: most examples of one query"]
    assert [row[0] for row in cap["rows"]] == ["2"]
    assert "seed 0," in cap["text"]
    assert "One seed" in cap["text"]

    # RLVR for longer
    longer = by_title["How the lead closes"]
    assert [row[:2] for row in longer["rows"]] == [["sft", 0], ["sft", 2], ["sft", 4]]
    assert longer["columns"][2] == "id: Pass@1"
    before, after, after_more = [row[2] for row in longer["rows"]]
    assert after == after_more                              # the same evaluation was written
    assert before != after                                  # another one

    # the report's part, with a copy of every figure
    figures = run / "report/figures"
    figures.mkdir(parents=True)
    parts = report.explanation(run, figures)
    assert sum(part.startswith("![") for part in parts) == 5
    names = []
    for section in sections:
        names += [Path(figure).name for figure in section["figures"]]
    assert sorted(names) == ["ablation_cap.png", "ablation_mu_quantile.png", "choice.png",
                             "choice_contrast.png", "entropy.png"]
    for name in names:
        assert (figures / f"explain_{name}").exists()


def test_one_seed_and_no_ablations(tmp_path, model, capsys):
    run = tmp_path / "toy"
    write_seed(run / "seed-3", 3, model)
    with pytest.raises(SystemExit):
        explain.main([str(run), "--base", str(model), "--entropy-samples", "5"])
    assert "lower --entropy-samples" in capsys.readouterr().err

    explain.main([str(run), "--base", str(model)])
    sections = list(common.read_jsonl(run / "explain.jsonl"))
    assert sections[0]["rows"]
    for row in sections[0]["rows"]:
        assert "to" not in row[2], "one seed has no range"
    for section in sections:
        assert not section["title"].startswith("Ablation")


def test_a_run_without_evaluation_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        explain.main([str(tmp_path)])
    assert stop.value.code == 2
    assert "run the pipeline first" in capsys.readouterr().err
