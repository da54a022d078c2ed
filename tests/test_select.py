"""02 select: every arm against a plain, independent implementation of its rules; what enters no training set; refusals."""

import importlib
import json
import random
import re
import tracemalloc
from collections import Counter, defaultdict
from decimal import Decimal
from statistics import NormalDist

import numpy as np
import pytest

import common


stage = importlib.import_module("02_verify_score")


def scored_rows(n_queries, per_query, seed, source="teacher", spread=0.6, lengths=(20, 60)):
    """Random scored rows. Few lengths and coarse perplexities, so ties are common; some nulls; values on bin edges and at 5."""
    draw, rows = random.Random(seed), []
    for q in range(n_queries):
        for k in range(per_query):
            ppl = round(draw.gauss(2.6, spread), draw.choice([1, 2, 2, 6]))
            ppl = draw.choice([max(ppl, 1.0)] * 12 + [5.0, 1.0, 4.95, 1.15, 1.2, 5.000001, 9.0, 7.5])
            rows.append({"sid": f"p{q}:{source}:{k}", "pid": f"p{q}", "source": source, "k": k, "seed": 1,
                         "response": f"<think> {k} </think> \\boxed{{{q}}}", "n_tokens": draw.randint(*lengths),
                         "finish": draw.choice(["stop"] * 9 + ["length"]), "predicted": str(q),
                         "correct": draw.choice([True] * 6 + [False] * 5 + [None]), "status": "ok", "problem": f"What is {q}?",
                         "nll_sum": 1.0, "n_scored": 10, "ppl": None if draw.random() < 0.02 else ppl,
                         "scorer": "base", "ppl_context": "response"})
    draw.shuffle(rows)
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(tmp_path, arm, teacher, own=None, **flags):
    """`select` as the command line runs it -> (training rows, sidecar)."""
    out = tmp_path / f"{arm}.jsonl"
    argv = ["select", "--arm", arm, "--teacher", str(write(tmp_path / "teacher.jsonl", teacher)), "--out", str(out)]
    if own:
        argv += ["--self", str(write(tmp_path / "self.jsonl", own))]
    for name, value in flags.items():
        values = value if isinstance(value, tuple) else (value,)
        argv += ["--" + name.replace("_", "-"), *map(str, values)]
    stage.main(argv)
    return list(common.read_jsonl(out)), common.read_meta(out)


def ties(tmp_path, rows, seed):
    """The random number of each row, by which 02 orders ties: taken from it, as it could be any other."""
    columns = stage.read_columns(write(tmp_path / "ties.jsonl", rows), seed)
    return dict(zip((row["sid"] for row in rows), columns.tie.tolist()))


def plain_targets(mu, sigma, n, n_bins=80):
    """Target counts by largest remainder, from the textbook density at centres in decimal arithmetic."""
    centres = [Decimal("1.0") + Decimal("0.05") * i + Decimal("0.025") for i in range(n_bins)]
    density = [NormalDist(mu, sigma).pdf(float(c)) for c in centres]
    exact = [round(n * d / sum(density), 9) for d in density]
    counts = [int(x) for x in exact]
    for i in sorted(range(n_bins), key=lambda i: (-round(exact[i] - counts[i], 9), i))[:n - sum(counts)]:
        counts[i] += 1
    return counts


def plain_bin(ppl, n_bins=80):
    place = (Decimal(repr(ppl)) - 1) / Decimal("0.05")
    return n_bins - 1 if ppl == 5.0 else int(place) if 1 <= ppl < 5 else None


def plain_gaussian(rows, tie, mu, sigma, n, cap):
    """PAPER's Gaussian-guided sampling with lists and dictionaries. -> (sids in order of picking, target and count per bin)"""
    target, inside = plain_targets(mu, sigma, n), defaultdict(list)
    for row in rows:
        if row["correct"] is True and row["ppl"] is not None and plain_bin(row["ppl"]) is not None:
            inside[plain_bin(row["ppl"])].append(row)
    picked, per_query, per_bin = [], Counter(), Counter()
    for allowed in range(1, cap + 1):
        for b in range(80):
            for row in sorted(inside[b], key=lambda r: (-r["n_tokens"], tie[r["sid"]])):
                if per_bin[b] < target[b] and per_query[row["pid"]] < allowed and row["sid"] not in picked:
                    picked.append(row["sid"])
                    per_query[row["pid"]] += 1
                    per_bin[b] += 1
    return picked, target, [per_bin[b] for b in range(80)]


def plain_lowest(rows, tie, key, n, cap):
    """Per query the `cap` lowest, of those the n lowest."""
    queries = defaultdict(list)
    for row in rows:
        queries[row["pid"]].append(row)
    order = lambda r: (key(r), tie[r["sid"]])
    best = [row for group in queries.values() for row in sorted(group, key=order)[:cap]]
    return {row["sid"] for row in sorted(best, key=order)[:n]}


@pytest.mark.parametrize("seed,cap,n,mu,sigma", [(0, 1, 60, 2.5, 0.25), (1, 1, 400, 3.0, 0.4), (2, 2, 150, 2.5, 0.25),
                                                 (3, 4, 700, 2.71, 0.6), (4, 10, 50, 4.9, 0.3), (5, 1, 37, 1.0, 0.25)])
def test_gaussian_sampling_equals_the_plain_rules(tmp_path, seed, cap, n, mu, sigma):
    rows = scored_rows(120, 8, seed)
    expected, target, actual = plain_gaussian(rows, ties(tmp_path, rows, seed), mu, sigma, n, cap)
    picked, meta = run(tmp_path, "oxa_mle", rows, n_ce=n, mu=mu, sigma=sigma, cap=cap, seed=seed)
    assert {r["sid"] for r in picked} == set(expected) and len(picked) == len(expected), "a response enters once"
    assert [b["target"] for b in meta["bins"]] == target and sum(target) == n
    assert [b["actual"] for b in meta["bins"]] == actual
    assert [b["shortage"] for b in meta["bins"]] == [t - a for t, a in zip(target, actual)]
    assert max(Counter(r["pid"] for r in picked).values()) <= cap
    assert meta["ce"]["shortage"] == n - len(expected) and meta["rows"] == len(expected)
    assert [r["sid"] for r in picked] == [r["sid"] for r in rows if r["sid"] in set(expected)], "in the order of their file"


def test_the_random_cases_are_not_trivial(tmp_path):
    """Ties decide, bins run short and the cap binds in the data above: else the comparison would show little."""
    rows = scored_rows(120, 8, 1)
    tie = ties(tmp_path, rows, 1)
    one = plain_gaussian(rows, tie, 3.0, 0.4, 400, 1)
    assert set(one[0]) != set(plain_gaussian(rows, {s: -t for s, t in tie.items()}, 3.0, 0.4, 400, 1)[0])
    assert any(t > a > 0 for t, a in zip(*one[1:]))
    assert len(one[0]) < len(plain_gaussian(rows, tie, 3.0, 0.4, 400, 8)[0])


def test_targets_sum_and_equal_shares_go_to_the_lower_bin():
    edges = stage.bin_edges(1.0, 5.0, 0.05)
    for n in (1, 2, 3, 999, 50_000):
        for mu in (1.0, 2.5, 2.777, 5.0):
            target = stage.gaussian_targets(edges, mu, 0.25, n)
            assert target.sum() == n and target.tolist() == plain_targets(mu, 0.25, n)
    assert stage.gaussian_targets(edges, 2.5, 0.25, 1).argmax() == 29, "[2.45, 2.5) and [2.5, 2.55) tie"


def test_bins_are_half_open_and_the_last_is_closed():
    edges = stage.bin_edges(1.0, 5.0, 0.05)
    values = np.array([1.0, 1.05, 1.15, 4.95, 4.999, 5.0, 5.0000001, 0.999999, np.nan])
    assert len(edges) == 81 and stage.bin_of(values, edges).tolist() == [0, 1, 3, 79, 79, 79, -1, -1, -1]


def test_mu_by_quantile(tmp_path):
    rows = scored_rows(60, 5, 0)
    inside = [r["ppl"] for r in rows if r["correct"] is True and r["ppl"] is not None and 1 <= r["ppl"] <= 5]
    _, meta = run(tmp_path, "oxa_mle", rows, n_ce=40, mu_quantile=0.7)
    assert meta["mu"] == pytest.approx(np.quantile(inside, 0.7), abs=1e-12)


BY_QUANTILES = {"mu_quantile": 0.7, "sigma_share": 0.08, "n_bins": 40}


@pytest.mark.parametrize("scale,shift", [(16, 3), (0.25, 1.5)])
def test_one_setting_by_quantiles_serves_perplexities_of_any_scale(tmp_path, scale, shift):
    """Perplexities stretched and moved by powers of two, so that nothing is rounded: the same responses are picked."""
    rows = [{**r, "ppl": r["ppl"] and round(r["ppl"] * 64) / 64} for r in scored_rows(100, 6, 3)]
    moved = [{**r, "ppl": r["ppl"] and (r["ppl"] - 1) * scale + shift} for r in rows]
    flags = {"n_ce": 50, "range_quantiles": (0.05, 0.95), **BY_QUANTILES}
    (first, meta), (second, moved_meta) = (run(tmp_path, "oxa_mle", x, **flags) for x in (rows, moved))
    assert [r["sid"] for r in first] == [r["sid"] for r in second] and len(first) > 30
    assert moved_meta["mu"] == pytest.approx((meta["mu"] - 1) * scale + shift)
    assert moved_meta["sigma"] == pytest.approx(meta["sigma"] * scale)


def test_range_by_quantiles_holds_its_ends(tmp_path):
    rows = [{**r, "correct": True, "ppl": 10.0 + i} for i, r in enumerate(scored_rows(101, 1, 0))]
    _, meta = run(tmp_path, "oxa_mle", rows, n_ce=5, mu_quantile=0.5, sigma=20, range_quantiles=(0.1, 0.9))
    bins = meta["bins"]
    assert (len(bins), bins[0]["low"], bins[-1]["high"]) == (80, 20.0, 100.0)
    assert sum(b["available"] for b in bins) == 81 and meta["ce"]["shortage"] == 0
    _, meta = run(tmp_path, "oxa_mle", rows, n_ce=5, mu=40, sigma=20, range_low=20, range_high=99.9, n_bins=7)
    assert len(meta["bins"]) == 7 and sum(b["available"] for b in meta["bins"]) == 80


def test_a_gaussian_that_comes_up_short_says_which_flags_would_hold_it(tmp_path, capsys):
    rows = [{**r, "ppl": r["ppl"] and r["ppl"] * 3 + 1} for r in scored_rows(150, 4, 5)]      # few lie in [1, 5]
    _, meta = run(tmp_path, "oxa_mle", rows, n_ce=60, mu=3.9)
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("SHORT"))
    assert 0 < meta["ce"]["actual"] < 20 and "98 % of the" in printed and "queries x --cap 1" in printed
    offers = re.findall(r"; ((?:--[a-z-]+ [0-9.]+ ?)+)would pick ([0-9]+) of 60", printed)
    assert len(offers) == 2 and int(offers[-1][1]) > 50, printed
    for flags, promised in offers:
        words = flags.split()
        given = {name[2:].replace("-", "_"): value for name, value in zip(words[::2], words[1::2])}
        _, meta = run(tmp_path, "oxa_mle", rows, n_ce=60, **given)
        assert meta["ce"]["actual"] == int(promised)


@pytest.mark.parametrize("cap", [1, 3])
@pytest.mark.parametrize("n", [40, 5000])
def test_lowest_perplexity_and_longest_equal_the_plain_rules(tmp_path, cap, n):
    rows = scored_rows(80, 6, 7)
    usable = [r for r in rows if r["correct"] is True and r["ppl"] is not None]
    tie = ties(tmp_path, rows, 42)
    picked, _ = run(tmp_path, "sft_lp", rows, n_ce=n, cap=cap, min_tokens=30)
    long_enough = [r for r in usable if r["n_tokens"] >= 30]
    assert {r["sid"] for r in picked} == plain_lowest(long_enough, tie, lambda r: r["ppl"], n, cap)
    picked, _ = run(tmp_path, "longest", rows, n_ce=n, cap=cap)
    assert {r["sid"] for r in picked} == plain_lowest(usable, tie, lambda r: -r["n_tokens"], n, cap)


@pytest.mark.parametrize("cap,n,truncated", [(1, 30, "keep"), (1, 5000, "drop"), (3, 90, "keep"), (2, 5000, None)])
def test_high_confidence_errors_equal_the_plain_rules(tmp_path, cap, n, truncated):
    teacher, own = scored_rows(80, 6, 7), scored_rows(80, 6, 8, "self", spread=1.2)
    flags = {"truncated_ul": truncated} if truncated else {}                     # None: the default, which drops them
    picked, meta = run(tmp_path, "oxa_full", teacher, own, n_ce=50, n_ul=n, ul_cap=cap, max_tokens_ul=55, **flags)
    wrong = [r for r in own if r["correct"] is False and r["ppl"] is not None]
    usable = [r for r in wrong if r["ppl"] >= 1.2 and r["n_tokens"] <= 55 and (truncated == "keep" or r["finish"] == "stop")]
    ul = [r for r in picked if r["objective"] == "ul"]
    assert {r["sid"] for r in ul} == plain_lowest(usable, ties(tmp_path, own, 42), lambda r: r["ppl"], n, cap)
    assert len(ul) == meta["ul"]["actual"] and min(r["ppl"] for r in ul) == 1.2, "the floor itself is in"
    assert sum(meta["ul"]["dropped"].values()) == len(wrong) - len(usable) > 0
    mle, _ = run(tmp_path, "oxa_mle", teacher, n_ce=50)
    assert [r for r in picked if r["objective"] == "ce"] == mle, "the same cross-entropy set as oxa_mle"


def test_plain_sft_is_uniform_over_queries_with_equal_numbers_of_responses(tmp_path):
    rows = [{**r, "correct": True, "ppl": 2.0} for r in scored_rows(20, 4, 0)]
    path, times = write(tmp_path / "t.jsonl", rows), Counter()
    for seed in range(100):
        columns = stage.read_columns(path, seed)
        args = stage.parse_args(["select", "--arm", "sft", "--teacher", "t", "--out", "o", "--n-ce", "10"])
        picked, _ = stage.select_ce(columns, args)
        assert len(set(columns.query[picked].tolist())) == 10, "one per query"
        times.update(picked.tolist())
    counts = np.array([times[i] for i in range(80)])        # each of 80 rows: 100 draws at 1/8, so 12.5 with sd 3.3
    assert counts.sum() == 1000 and counts.min() > 0 and counts.max() < 12.5 + 5 * 3.3


def test_length_matched_has_the_lengths_of_oxa_mle_and_not_its_perplexities(tmp_path):
    rows = scored_rows(400, 8, 3, lengths=(50, 400))
    mle, _ = run(tmp_path, "oxa_mle", rows, n_ce=100, mu=3.5)
    control, meta = run(tmp_path, "length_matched", rows, n_ce=100, mu=3.5)
    assert max(Counter(r["pid"] for r in control).values()) == 1 and len(control) == len(mle)
    lengths = [np.sort([r["n_tokens"] for r in chosen]) for chosen in (mle, control)]
    assert np.abs(lengths[1] / lengths[0] - 1).max() < 0.055, "sorted lengths agree within a bin of 5 %"
    middle = [np.median([r["ppl"] for r in chosen]) for chosen in (mle, control)]
    assert middle[0] > 3.3 and middle[1] < 3.0
    assert all(b["shortage"] == 0 for b in meta["length_bins"])


@pytest.mark.parametrize("arm", stage.ARMS)
def test_what_could_not_be_judged_or_scored_enters_no_set(tmp_path, arm):
    teacher, own = scored_rows(60, 6, 1), scored_rows(60, 6, 2, "self")
    by_sid = {r["sid"]: r for r in teacher + own}
    picked, meta = run(tmp_path, arm, teacher, own, n_ce=10_000, n_ul=10_000, cap=6, ul_cap=6, sigma=5)
    for row in picked:
        source = by_sid[row["sid"]]
        assert source["correct"] is (row["objective"] == "ce") and source["ppl"] is not None
        assert row == {name: source.get(name, row["objective"]) for name in
                       ("sid", "pid", "problem", "response", "objective", "ppl", "n_tokens")}
    assert meta["teacher"]["unknown"] == sum(r["correct"] is None for r in teacher) > 0
    assert meta["teacher"]["not_scored"] == sum(r["ppl"] is None for r in teacher) > 0
    assert {r["objective"] for r in picked} == ({"ce", "ul"} if arm == "oxa_full" else {"ce"})


@pytest.mark.parametrize("arm", ["sft", "oxa_mle", "length_matched"])
def test_a_selection_depends_on_the_seed_and_not_on_the_order_of_the_rows(tmp_path, arm):
    rows = [{**r, "n_tokens": 30} for r in scored_rows(100, 6, 1)]
    sids = lambda rows, seed: {r["sid"] for r in run(tmp_path, arm, rows, n_ce=60, seed=seed)[0]}
    first = sids(rows, 42)
    assert sids(rows[::-1], 42) == first and sids(rows, 43) != first


def test_memory_does_not_grow_with_the_text(tmp_path):
    rows = scored_rows(25, 6, 1)
    path = tmp_path / "long.jsonl"
    with open(path, "w") as file:
        for row in rows:
            file.write(json.dumps({**row, "response": "a long chain of thought, " * 10_000}) + "\n")
    tracemalloc.start()
    stage.main(["select", "--arm", "oxa_mle", "--teacher", str(path), "--out", str(tmp_path / "o.jsonl"), "--n-ce", "30"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 35e6 and peak < 5e6


BAD = {
    "--arm nonsense": "invalid choice", "--arm oxa_full": "needs --self", "--arm sft --cap 0": "--cap must be at least 1",
    "--arm sft --n-ce 0": "--n-ce must be at least 1", "--arm oxa_mle --sigma 0": "--sigma must be positive",
    "--arm oxa_mle --mu-quantile 70": "--mu-quantile must lie in [0, 1]", "--arm oxa_mle --mu 900": "would pick",
    "--arm oxa_mle --bin-width 0.3": "not a whole number of bins", "--arm oxa_mle --range-low 5": "is not below --range-high",
    "--arm sft_lp --min-tokens 100000": "no response is left", "--arm sft --teacher missing.jsonl": "missing.jsonl does not exist",
    "--arm oxa_mle --range-low 90 --range-high 91": "correct responses have perplexities from",
    "--arm oxa_mle --bin-width 1e-9": "4,000,000,000 bins", "--arm oxa_mle --n-bins 0": "--n-bins must be positive",
    "--arm oxa_mle --bin-width 0": "--bin-width must be positive", "--arm oxa_mle --sigma-share -1": "--sigma-share must be",
    "--arm oxa_mle --range-quantiles 0.9 0.1": "the lower one first", "--arm oxa_mle --range-quantiles 0.5": "two numbers",
    "--arm oxa_mle --range-quantiles 0 1.5": "two numbers in [0, 1]",
    "--arm sft --recipe missing.toml": "missing.toml does not exist",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_settings_end_with_one_sentence_and_code_2(tmp_path, capsys, flags):
    path = write(tmp_path / "teacher.jsonl", scored_rows(10, 4, 0))
    with pytest.raises(SystemExit) as stop:
        stage.main(["select", "--teacher", str(path), "--out", str(tmp_path / "o.jsonl"), *flags.split()])
    assert stop.value.code == 2 and BAD[flags] in capsys.readouterr().err and not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize("change,message", [
    ({"sid": "p0:teacher:0"}, "occurs twice"), ({"ppl": "low"}, "field 'ppl'"), ({"correct": "yes"}, "field 'correct'"),
    ({"n_tokens": None}, "field 'n_tokens'"), ({"problem": None}, "field 'problem'"), ({"scorer": "another"}, "are mixed"),
    ({"scorer_dtype": "bfloat16"}, "are mixed"),
    (None, "field 'sid' is missing"), ("{broken", "not valid JSON"), ("[1]", "must be a JSON object"), ("", "is empty")])
def test_bad_rows_end_with_one_sentence_and_code_2(tmp_path, capsys, change, message):
    rows = [{**r, "correct": True, "ppl": 2.0} for r in sorted(scored_rows(3, 1, 0), key=lambda r: r["pid"])]
    lines = [json.dumps(row) for row in rows[:2]]
    lines += [change] if isinstance(change, str) else [json.dumps({**rows[2], **change} if change else {"pid": "p"})]
    path = tmp_path / "teacher.jsonl"
    path.write_text("\n".join(lines) + "\n" if change != "" else "")
    with pytest.raises(SystemExit) as stop:
        stage.main(["select", "--arm", "sft", "--teacher", str(path), "--out", str(tmp_path / "o.jsonl")])
    assert stop.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "o.jsonl").exists()


def test_an_input_is_not_replaced_by_the_output(tmp_path, capsys):
    path = write(tmp_path / "teacher.jsonl", scored_rows(10, 4, 0))
    before = path.read_bytes()
    with pytest.raises(SystemExit) as stop:
        stage.main(["select", "--arm", "sft", "--teacher", str(path), "--out", str(path)])
    assert stop.value.code == 2 and "is an input of this command" in capsys.readouterr().err and path.read_bytes() == before


def test_a_recipe_key_that_is_no_flag_is_refused(tmp_path, capsys):
    (tmp_path / "r.toml").write_text("[select]\nself = 1\n")
    with pytest.raises(SystemExit) as stop:
        stage.main(["select", "--recipe", str(tmp_path / "r.toml"), "--arm", "sft", "--teacher", "t", "--out", "o"])
    assert stop.value.code == 2 and "unknown key 'self'" in capsys.readouterr().err


def test_show_prints_verdict_perplexity_and_bin(tmp_path, capsys):
    rows = [{**r, "ppl": 2.52} for r in scored_rows(10, 4, 0)]
    path = str(write(tmp_path / "scored.jsonl", rows))
    stage.main(["show", "--samples", path, "--show", "2", "--pid", "p3"])
    out = capsys.readouterr().out
    assert out.count("p3:teacher:") == 2 and "2.5200, bin 2.5 - 2.55" in out and "2 of 4 rows" in out
    stage.main(["show", "--samples", path, "--sid", rows[5]["sid"]])
    out = capsys.readouterr().out
    verdict = {True: "correct", False: "wrong", None: "unknown"}[rows[5]["correct"]]
    assert f"{rows[5]['sid']} | {verdict} (ok)" in out and "What is" in out and "1 of 1 rows" in out
