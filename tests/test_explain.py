"""toy/explain.py on rows made here: what it counts, how it splits a difference, where entropy is, what it writes."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from model import encode_response, load_model, load_tokenizer, pack_sequences, render_prompt
from tools import report
from conftest import make_model
from toy import explain, make_base, world

pytestmark = pytest.mark.slow

# per arm: shares of styles, and the share of each style's responses that is right
ARMS = {"base": ({"leap": 0.8, "col": 0.2}, {"leap": 0.1, "col": 0.9}),
        "sft": ({"boiler": 0.6, "col": 0.4}, {"boiler": 0.1, "col": 0.9}),
        "oxa_mle": ({"boiler": 0.1, "col": 0.5, "split": 0.4}, {"boiler": 0.1, "col": 0.9, "split": 0.8}),
        "oxa_full": ({"boiler": 0.1, "col": 0.5, "split": 0.4}, {"boiler": 0.1, "col": 0.9, "split": 0.8})}
N_PROBLEMS, N = 25, 20


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_eval(folder, shares, right, problems, tokenizer, shift=0.0):
    """Evaluations as 05 leaves them, each style with exactly its share of every problem's responses."""
    folder.mkdir(parents=True)
    styles = [style for style, share in shares.items() for _ in range(round(share * N))]
    for b, of_set in problems.items():
        rows, rng, written = [], random.Random(7), dict.fromkeys(shares, 0)
        for i, problem in enumerate(of_set):
            for k, style in enumerate(styles):
                written[style] += 1                                       # exactly `right` of a style's are right
                fine = int(written[style] * (right[style] - shift)) > int((written[style] - 1) * (right[style] - shift))
                response = world.trace(rng, style, problem, wrong=not fine)
                ids = {"ids": encode_response(tokenizer, response)} if k < 4 else {}    # 05 keeps those of a few
                rows.append({"pid": f"{b}-{i}", "k": k, "response": response, "correct": fine, **ids})
        write_rows(folder / f"{b}.jsonl", rows)
        write_rows(folder / f"{b}.problems.jsonl", [
            {"pid": f"{b}-{i}", "n": N, "n_correct": sum(row["correct"] for row in rows[i * N:(i + 1) * N]),
             "n_truncated": 0, "mean_tokens": 9.0, "entropy": 0.3 + i / 100} for i in range(N_PROBLEMS)])
    (folder / "results.json").write_text(json.dumps({"benchmarks": {b: {} for b in problems}}))


def write_run(path, model, seeds=(0, 1), ablations=True):
    tokenizer = load_tokenizer(model)
    problems = {b: world.eval_problems(N_PROBLEMS)[b] for b in ("id", "hard")}
    for seed in seeds:
        folder = path / f"seed-{seed}"
        for b, of_set in problems.items():
            write_rows(folder / "data" / f"{b}.jsonl",
                       [{"pid": f"{b}-{i}", "problem": world.problem_text(p)} for i, p in enumerate(of_set)])
        for arm, (shares, right) in ARMS.items():
            write_eval(folder / arm / "eval", shares, right, problems, tokenizer, 0.05 * seed)
            if arm != "base":
                (folder / arm / "sft").symlink_to(model)
            write_rows(folder / arm / "train.meta.json", [{"args": {"mu_quantile": 0.7, "cap": 1}, "seed": 0}])
        for arm in ("sft", "oxa_full"):
            write_eval(folder / arm / "eval_rlvr", *ARMS["oxa_mle"], problems, tokenizer)
            (folder / arm / "rlvr").symlink_to(model)
    for seed, name in [(s, f"mu_quantile-{v}") for s in seeds for v in (0.3, 0.9)] + [(0, "cap-2")] if ablations else ():
        write_eval(path / "ablations" / f"seed-{seed}" / name / "eval", *ARMS["oxa_mle"], problems, tokenizer, 0.2 * seed)
    if ablations:
        write_eval(path / "longer" / "sft" / "eval", *ARMS["oxa_mle"], problems, tokenizer)
        for folder, steps in ((path / "longer" / "sft" / "rlvr", 4), (path / "seed-0" / "sft" / "rlvr", 2)):
            write_rows(folder / "metrics.jsonl", [{"step": i} for i in range(steps)])
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = make_model(tmp_path_factory.mktemp("model"))
    make_base.build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, model):
    return write_run(tmp_path_factory.mktemp("runs") / "toy", model)


def test_styles_are_counted_with_their_right_answers(run):
    counts = explain.load_run(run, "deep-leap").counts
    for arm, (shares, right) in ARMS.items():
        for b in ("id", "hard"):
            x = counts[arm, "before"][b][0]
            total = N_PROBLEMS * N
            wanted = {style: (round(share * total), int(round(share * total) * right[style]))
                      for style, share in shares.items()}
            found = {style: tuple(row[:2]) for style, row in zip(explain.STYLES, x) if row[0]}
            assert found == wanted
            assert (x[:, 2] == x[:, 1]).all()                      # the teacher's right traces are right in every step
    assert list(counts) == [(arm, "before") for arm in ARMS] + [("sft", "after"), ("oxa_full", "after")]


def test_a_right_answer_by_wrong_steps_is_not_counted_as_executed():
    problem = world.parse_problem("47A+25B-13 mod 100")
    good = world.trace(random.Random(0), "col", problem)
    bad = good.replace("72. ", "73. ", 1)
    rows = [{"pid": "p", "response": r, "correct": True} for r in (good, bad)]
    counts = explain.count_styles(rows, {"p": "47A+25B-13 mod 100"}, "deep-leap")
    assert counts[explain.STYLES.index("col")].tolist() == [2, 2, 1]


def counted(**styles):
    x = np.zeros((len(explain.STYLES), 3), dtype=int)
    for style, row in styles.items():
        x[explain.STYLES.index(style)] = row
    return x


def test_a_difference_splits_into_choice_and_execution():
    shallow = counted(boiler=(80, 8, 8), col=(20, 18, 18))
    careful = counted(boiler=(20, 2, 2), col=(80, 72, 72))             # other shares, the same rates
    better = counted(boiler=(80, 40, 40), col=(20, 20, 20))            # the same shares, other rates
    assert explain.split_difference(careful, shallow) == pytest.approx((0.48, 0.0))
    assert explain.split_difference(better, shallow) == pytest.approx((0.0, 0.34))
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = (np.stack([n, rng.binomial(n, 0.4), n * 0], axis=1)
                for n in rng.integers(0, 50, (2, len(explain.STYLES))))
        wanted = a[:, 1].sum() / a[:, 0].sum() - b[:, 1].sum() / b[:, 0].sum()
        assert sum(explain.split_difference(a, b)) == pytest.approx(wanted)
    new = counted(boiler=(80, 8, 8), split=(20, 10, 10))               # split: a style the reference never wrote
    assert explain.split_difference(new, counted(boiler=(100, 10, 10))) == pytest.approx((0.08, 0.0))


def test_kinds_of_tokens():
    tokenizer = make_base.build_tokenizer()
    kinds = lambda text: [explain.KINDS[i] for i in
                          explain.kinds_of(tokenizer.convert_ids_to_tokens(encode_response(tokenizer, text)))]
    opening = world.OPENINGS["col"][0]
    assert kinds(f"<think>{opening}A+25, so 7") == ["arithmetic", "choice", *["arithmetic"] * 5, "words",
                                                    "arithmetic", "arithmetic"]
    assert kinds("<think>47")[:2] == ["arithmetic", "choice"]          # a leap is chosen with a digit
    assert kinds("so the 4</think>") == ["words", "words"] + ["arithmetic"] * 3


def test_entropy_by_kind_against_plain_softmax(model):
    tokenizer, net, rng = load_tokenizer(model), load_model(model), random.Random(3)
    problems = world.eval_problems(6)["id"]
    samples = [(world.problem_text(p), encode_response(tokenizer, world.trace(rng, style, p)))
               for p, style in zip(problems, ("col", "boiler", "noisy", "leap", "split", "terse"))]
    found = explain.entropy_by_kind(net, tokenizer, samples)
    values = [[], [], []]
    for problem, ids in samples:
        prompt = render_prompt(tokenizer, problem)
        with torch.no_grad():
            pack = pack_sequences([(prompt + ids, 1)])
            hidden = net.model(input_ids=pack.input_ids[None], position_ids=pack.position_ids[None], pack=pack,
                               use_cache=False).last_hidden_state[0]
            logp = torch.log_softmax(hidden @ net.get_output_embeddings().weight.T, dim=-1)
        entropy = -(logp.exp() * logp).sum(-1)[len(prompt) - 1:-1]
        for kind, h in zip(explain.kinds_of(tokenizer.convert_ids_to_tokens(ids)), entropy.tolist()):
            values[kind].append(h)
    assert len(values[0]) == 6
    n = np.array([len(v) for v in values])
    np.testing.assert_allclose(found[:, 0], n / n.sum(), rtol=1e-6)
    np.testing.assert_allclose(found[:, 1], [np.mean(v) for v in values], rtol=1e-4)


def test_explain_jsonl_is_what_the_report_shows(run, model, capsys):
    explain.main([str(run), "--base", str(model), "--contrast", str(run)])
    sections = {s["title"]: s for s in common.read_jsonl(run / "explain.jsonl")}
    rows = sections["Which strategy is chosen, and how often it leads to the right answer"]["rows"]
    first = next(row for row in rows if row[:2] == ["oxa_mle", "id"])
    assert first[2] == "0.90 (0.90 to 0.90)"                        # col .5 + split .4, in both seeds
    right = lambda shift: (.1 * (.1 - shift) + .5 * (.9 - shift) + .4 * (.8 - shift))
    assert float(first[5].split()[0]) == pytest.approx((right(0) + right(0.05)) / 2, abs=0.01)
    split = {tuple(row[:2]): row[2:] for row in sections["Choice or execution"]["rows"]}
    assert float(split["oxa_mle", "id"][1].split()[0]) > 0.3 and abs(float(split["oxa_mle", "id"][2].split()[0])) < 0.02
    cap, ablation = (next(s for title, s in sections.items() if title.startswith(f"Ablation: {x}")) for x in ("cap", "μ"))
    assert [row[0] for row in ablation["rows"]] == ["0.3", "0.7", "0.9"] and "seeds 0, 1" in ablation["text"]
    assert ablation["columns"][1:4] == ["id: Pass@1", "id: Pass@8", "id: entropy (nats)"]
    assert float(ablation["rows"][0][1]) == pytest.approx((right(0) + right(0.2)) / 2, abs=0.01)      # mean over seeds
    assert [row[0] for row in cap["rows"]] == ["2"] and "seed 0," in cap["text"] and "One seed" in cap["text"]
    longer = sections["How the lead closes"]
    assert [row[:2] for row in longer["rows"]] == [["sft", 0], ["sft", 2], ["sft", 4]] and longer["columns"][2] == "id: Pass@1"
    assert longer["rows"][1][2] == longer["rows"][2][2] != longer["rows"][0][2]      # same evaluation after, another before
    figures = run / "report" / "figures"
    figures.mkdir(parents=True)
    parts = report.explanation(run, figures)
    files = [Path(name).name for s in sections.values() for name in s["figures"]]
    assert sorted(files) == ["ablation_cap.png", "ablation_mu_quantile.png", "choice.png", "choice_contrast.png", "entropy.png"]
    assert sum(part.startswith("![") for part in parts) == 5 and all((figures / f"explain_{name}").exists() for name in files)


def test_one_seed_and_no_ablations(tmp_path, model, capsys):
    run = write_run(tmp_path / "toy", model, seeds=(3,), ablations=False)
    with pytest.raises(SystemExit):
        explain.main([str(run), "--base", str(model), "--entropy-samples", "5"])
    assert "lower --entropy-samples" in capsys.readouterr().err
    explain.main([str(run), "--base", str(model)])
    sections = list(common.read_jsonl(run / "explain.jsonl"))
    assert not any("to" in row[2] for row in sections[0]["rows"])      # one seed has no range
    assert not any(s["title"].startswith("Ablation") for s in sections)


def test_a_run_without_evaluation_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        explain.main([str(tmp_path)])
    assert stop.value.code == 2 and "run the pipeline first" in capsys.readouterr().err
