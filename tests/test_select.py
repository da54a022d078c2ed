"""02 select: every arm against a plain, independent implementation of its rules; what enters no
training set; refusals."""

import importlib
import json
import random
import re
import tracemalloc
from collections import Counter, defaultdict
from decimal import Decimal
from operator import itemgetter
from statistics import NormalDist

import numpy as np
import pytest

import common

stage = importlib.import_module("02_verify_score")

# The paper's bins: [1, 5] in steps of 0.05.
N_BINS = 80

# Perplexities on edges of bins and of the range, just outside of it, and far out.
ODD_PPL = [5.0, 1.0, 4.95, 1.15, 1.2, 5.000001, 9.0, 7.5]

# Fields that a training row takes over from the scored row.
COPIED = ("sid", "pid", "problem", "response", "ppl", "n_tokens")

# --------------------------------------------------------------------------------------------- rows


def random_row(draw, q, k, source, spread, lengths):
    """Response k to problem q, scored. Few lengths and coarse perplexities, so that ties are
    common; now and then no perplexity, or one of ODD_PPL."""
    ppl = round(draw.gauss(2.6, spread), draw.choice([1, 2, 2, 6]))
    ppl = draw.choice([max(ppl, 1.0)] * 12 + ODD_PPL)
    n_tokens = draw.randint(*lengths)
    finish = draw.choice(["stop"] * 9 + ["length"])
    correct = draw.choice([True] * 6 + [False] * 5 + [None])
    if draw.random() < 0.02:
        ppl = None
    return {"sid": f"p{q}:{source}:{k}",
            "pid": f"p{q}",
            "source": source,
            "k": k,
            "seed": 1,
            "response": f"<think> {k} </think> \\boxed{{{q}}}",
            "n_tokens": n_tokens,
            "finish": finish,
            "predicted": str(q),
            "correct": correct,
            "status": "ok",
            "problem": f"What is {q}?",
            "nll_sum": 1.0,
            "n_scored": 10,
            "ppl": ppl,
            "scorer": "base",
            "ppl_context": "response"}


def scored_rows(n_queries, per_query, seed, source="teacher", spread=0.6, lengths=(20, 60)):
    """Random scored rows, in random order."""
    draw = random.Random(seed)
    rows = []
    for q in range(n_queries):
        for k in range(per_query):
            rows.append(random_row(draw, q, k, source, spread, lengths))
    draw.shuffle(rows)
    return rows


def with_ppl(rows, change):
    """The rows with every perplexity changed; where there is none, there is none."""
    changed = []
    for row in rows:
        ppl = None if row["ppl"] is None else change(row["ppl"])
        changed.append({**row, "ppl": ppl})
    return changed


def judged(rows, verdict):
    """The rows of this verdict that have a perplexity."""
    return [row for row in rows if row["correct"] is verdict and row["ppl"] is not None]


def sids(rows):
    return [row["sid"] for row in rows]


def most_per_query(rows):
    return max(Counter(row["pid"] for row in rows).values())


# -------------------------------------------------------------------------------- running the stage


def write(path, rows):
    """A JSONL file of the rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def select(tmp_path, arm, teacher, own=None, **flags):
    """`select` as the command line runs it -> (training rows, sidecar)."""
    out = tmp_path / f"{arm}.jsonl"
    teacher_path = write(tmp_path / "teacher.jsonl", teacher)
    argv = ["select", "--arm", arm, "--teacher", str(teacher_path), "--out", str(out)]
    if own:
        argv += ["--self", str(write(tmp_path / "self.jsonl", own))]
    for name, value in flags.items():
        argv.append("--" + name.replace("_", "-"))
        values = value if isinstance(value, tuple) else (value,)
        argv += [str(one) for one in values]
    stage.main(argv)
    return list(common.read_jsonl(out)), common.read_meta(out)


def refused(capsys, *argv):
    """Run the stage, which must stop with code 2 -> what it says about that."""
    with pytest.raises(SystemExit) as stop:
        stage.main([str(word) for word in argv])
    assert stop.value.code == 2
    return capsys.readouterr().err


def ties(tmp_path, rows, seed):
    """{sid: the random number by which 02 orders ties}: taken from 02, as any other would do."""
    columns = stage.read_columns(write(tmp_path / "ties.jsonl", rows), seed)
    return dict(zip(sids(rows), columns.tie.tolist()))


# ---------------------------------------------------------------------------------- the plain rules


def plain_targets(mu, sigma, n):
    """[N_BINS] target counts by largest remainder, from the textbook density at the bins' centres,
    which are computed in decimals."""
    density = []
    for b in range(N_BINS):
        centre = Decimal("1.0") + Decimal("0.05") * b + Decimal("0.025")
        density.append(NormalDist(mu, sigma).pdf(float(centre)))
    total = sum(density)
    exact = [round(n * d / total, 9) for d in density]
    counts = [int(x) for x in exact]
    ranked = []
    for b in range(N_BINS):
        remainder = round(exact[b] - counts[b], 9)
        ranked.append((-remainder, b))          # of equal remainders the lower bin first
    ranked.sort()
    for _, b in ranked[:n - sum(counts)]:
        counts[b] += 1
    return counts


def plain_bin(ppl):
    """The bin of a perplexity, in decimals, as its edges read; None outside [1, 5]."""
    if ppl == 5.0:
        return N_BINS - 1                       # the last bin is closed
    if not 1 <= ppl < 5:
        return None
    return int((Decimal(repr(ppl)) - 1) / Decimal("0.05"))


def plain_gaussian(rows, tie, mu, sigma, n, cap):
    """PAPER's Gaussian-guided sampling with lists and dictionaries.

    -> (sids in the order of picking, target of each bin, count of each bin)
    """
    def longest_first(row):
        return -row["n_tokens"], tie[row["sid"]]

    target = plain_targets(mu, sigma, n)
    in_bin = defaultdict(list)
    for row in judged(rows, True):
        in_bin[plain_bin(row["ppl"])].append(row)
    picked = []
    per_query = Counter()
    per_bin = Counter()
    for allowed in range(1, cap + 1):
        for b in range(N_BINS):
            for row in sorted(in_bin[b], key=longest_first):
                has_room = per_bin[b] < target[b]
                may_give = per_query[row["pid"]] < allowed
                if has_room and may_give and row["sid"] not in picked:
                    picked.append(row["sid"])
                    per_query[row["pid"]] += 1
                    per_bin[b] += 1
    return picked, target, [per_bin[b] for b in range(N_BINS)]


def plain_lowest(rows, tie, value, n, cap):
    """Per query the `cap` rows of lowest value, of those the n lowest: their sids."""
    def lowest_first(row):
        return value(row), tie[row["sid"]]

    queries = defaultdict(list)
    for row in rows:
        queries[row["pid"]].append(row)
    best = []
    for group in queries.values():
        best += sorted(group, key=lowest_first)[:cap]
    best.sort(key=lowest_first)
    return set(sids(best[:n]))


def perplexity(row):
    return row["ppl"]


def minus_length(row):
    return -row["n_tokens"]


# ------------------------------------------------------------------------- Gaussian-guided sampling


@pytest.mark.parametrize("seed,cap,n,mu,sigma", [
    (0, 1, 60, 2.5, 0.25),
    (1, 1, 400, 3.0, 0.4),
    (2, 2, 150, 2.5, 0.25),
    (3, 4, 700, 2.71, 0.6),
    (4, 10, 50, 4.9, 0.3),
    (5, 1, 37, 1.0, 0.25)])
def test_gaussian_sampling_equals_the_plain_rules(tmp_path, seed, cap, n, mu, sigma):
    """The paper's own method: what is picked, and the table of bins in the sidecar."""
    rows = scored_rows(120, 8, seed)
    tie = ties(tmp_path, rows, seed)
    expected, target, actual = plain_gaussian(rows, tie, mu, sigma, n, cap)

    picked, meta = select(tmp_path, "oxa_mle", rows, n_ce=n, mu=mu, sigma=sigma, cap=cap, seed=seed)

    assert set(sids(picked)) == set(expected)
    assert len(picked) == len(expected), "a response enters once"
    in_file_order = [sid for sid in sids(rows) if sid in set(expected)]
    assert sids(picked) == in_file_order, "in the order of their file"
    assert most_per_query(picked) <= cap
    assert meta["rows"] == len(expected)
    assert meta["ce"]["shortage"] == n - len(expected)
    bins = meta["bins"]
    assert sum(target) == n
    assert [b["target"] for b in bins] == target
    assert [b["actual"] for b in bins] == actual
    assert [b["shortage"] for b in bins] == [t - a for t, a in zip(target, actual)]


def test_the_random_cases_are_not_trivial(tmp_path):
    """Ties decide, bins run short and the cap binds in the data above: else the comparison would
    show little."""
    rows = scored_rows(120, 8, 1)
    tie = ties(tmp_path, rows, 1)
    opposite_tie = {sid: -number for sid, number in tie.items()}

    picked, target, actual = plain_gaussian(rows, tie, 3.0, 0.4, 400, cap=1)
    with_opposite_tie, _, _ = plain_gaussian(rows, opposite_tie, 3.0, 0.4, 400, cap=1)
    with_more_allowed, _, _ = plain_gaussian(rows, tie, 3.0, 0.4, 400, cap=8)

    assert set(picked) != set(with_opposite_tie)
    assert any(t > a > 0 for t, a in zip(target, actual))
    assert len(picked) < len(with_more_allowed)


def test_targets_sum_and_equal_shares_go_to_the_lower_bin():
    edges = stage.bin_edges(1.0, 5.0, 0.05)
    for n in (1, 2, 3, 999, 50_000):
        for mu in (1.0, 2.5, 2.777, 5.0):
            target = stage.gaussian_targets(edges, mu, 0.25, n)
            assert target.sum() == n
            assert target.tolist() == plain_targets(mu, 0.25, n)
    only_one = stage.gaussian_targets(edges, 2.5, 0.25, 1)
    assert only_one.argmax() == 29, "[2.45, 2.5) and [2.5, 2.55) tie"


def test_bins_are_half_open_and_the_last_is_closed():
    edges = stage.bin_edges(1.0, 5.0, 0.05)
    values = [1.0, 1.05, 1.15, 4.95, 4.999, 5.0, 5.0000001, 0.999999, np.nan]
    assert len(edges) == 81
    bins = stage.bin_of(np.array(values), edges)
    assert bins.tolist() == [0, 1, 3, 79, 79, 79, -1, -1, -1]


def test_mu_by_quantile(tmp_path):
    """--mu-quantile is of the correct responses inside the range, and of no others."""
    rows = scored_rows(60, 5, 0)
    inside = [row["ppl"] for row in judged(rows, True) if 1 <= row["ppl"] <= 5]
    _, meta = select(tmp_path, "oxa_mle", rows, n_ce=40, mu_quantile=0.7)
    assert meta["mu"] == pytest.approx(np.quantile(inside, 0.7), abs=1e-12)


@pytest.mark.parametrize("scale,shift", [(16, 3), (0.25, 1.5)])
def test_one_setting_by_quantiles_serves_perplexities_of_any_scale(tmp_path, scale, shift):
    """Perplexities stretched and moved by powers of two, so that nothing is rounded: the same
    responses are picked."""
    def to_a_64th(ppl):
        return round(ppl * 64) / 64

    def stretched_and_moved(ppl):
        return (ppl - 1) * scale + shift

    rows = with_ppl(scored_rows(100, 6, 3), to_a_64th)
    other_rows = with_ppl(rows, stretched_and_moved)
    flags = {"n_ce": 50, "range_quantiles": (0.05, 0.95), "mu_quantile": 0.7, "sigma_share": 0.08,
             "n_bins": 40}

    picked, meta = select(tmp_path, "oxa_mle", rows, **flags)
    other_picked, other_meta = select(tmp_path, "oxa_mle", other_rows, **flags)

    assert sids(picked) == sids(other_picked)
    assert len(picked) > 30
    assert other_meta["mu"] == pytest.approx(stretched_and_moved(meta["mu"]))
    assert other_meta["sigma"] == pytest.approx(meta["sigma"] * scale)


def test_range_by_quantiles_holds_its_ends(tmp_path):
    """Perplexities 10, 11, .. 110: their quantiles 0.1 and 0.9 are 20 and 100."""
    rows = []
    for i, row in enumerate(scored_rows(101, 1, 0)):
        rows.append({**row, "correct": True, "ppl": 10.0 + i})

    _, meta = select(tmp_path, "oxa_mle", rows, n_ce=5, mu_quantile=0.5, sigma=20,
                     range_quantiles=(0.1, 0.9))
    bins = meta["bins"]
    assert len(bins) == 80
    assert bins[0]["low"] == 20.0
    assert bins[-1]["high"] == 100.0
    assert sum(b["available"] for b in bins) == 81, "both ends are in"
    assert meta["ce"]["shortage"] == 0

    _, meta = select(tmp_path, "oxa_mle", rows, n_ce=5, mu=40, sigma=20,
                     range_low=20, range_high=99.9, n_bins=7)
    assert len(meta["bins"]) == 7
    assert sum(b["available"] for b in meta["bins"]) == 80, "100 is out"


def test_a_gaussian_that_comes_up_short_says_which_flags_would_hold_it(tmp_path, capsys):
    """Two offers are printed, and each keeps its promise when its flags are given."""
    def stretched(ppl):
        return ppl * 3 + 1

    rows = with_ppl(scored_rows(150, 4, 5), stretched)           # few lie in [1, 5]
    _, meta = select(tmp_path, "oxa_mle", rows, n_ce=60, mu=3.9)
    assert 0 < meta["ce"]["actual"] < 20

    lines = capsys.readouterr().out.splitlines()
    printed = next(line for line in lines if line.startswith("SHORT"))
    assert "98 % of the" in printed
    assert "queries x --cap 1" in printed
    offers = re.findall(r"; ((?:--[a-z-]+ [0-9.]+ ?)+)would pick ([0-9]+) of 60", printed)
    assert len(offers) == 2, printed
    assert int(offers[-1][1]) > 50, printed

    for offered, promised in offers:
        words = offered.split()
        flags = {}
        for name, value in zip(words[::2], words[1::2]):
            flags[name.removeprefix("--").replace("-", "_")] = value
        _, meta = select(tmp_path, "oxa_mle", rows, n_ce=60, **flags)
        assert meta["ce"]["actual"] == int(promised)


# ----------------------------------------------------------------------------------- the other arms


@pytest.mark.parametrize("cap", [1, 3])
@pytest.mark.parametrize("n", [40, 5000])
def test_lowest_perplexity_and_longest_equal_the_plain_rules(tmp_path, cap, n):
    rows = scored_rows(80, 6, 7)
    usable = judged(rows, True)
    tie = ties(tmp_path, rows, 42)

    picked, _ = select(tmp_path, "sft_lp", rows, n_ce=n, cap=cap, min_tokens=30)
    long_enough = [row for row in usable if row["n_tokens"] >= 30]
    assert set(sids(picked)) == plain_lowest(long_enough, tie, perplexity, n, cap)

    picked, _ = select(tmp_path, "longest", rows, n_ce=n, cap=cap)
    assert set(sids(picked)) == plain_lowest(usable, tie, minus_length, n, cap)


@pytest.mark.parametrize("cap,n,truncated", [
    (1, 30, "keep"),
    (1, 5000, "drop"),
    (3, 90, "keep"),
    (2, 5000, None)])                           # None: the default, which drops them
def test_high_confidence_errors_equal_the_plain_rules(tmp_path, cap, n, truncated):
    """The unlikelihood set, and that it leaves the cross-entropy set as it is in oxa_mle."""
    teacher = scored_rows(80, 6, 7)
    own = scored_rows(80, 6, 8, "self", spread=1.2)
    wrong = judged(own, False)
    usable = [row for row in wrong if row["ppl"] >= 1.2 and row["n_tokens"] <= 55]
    if truncated != "keep":
        usable = [row for row in usable if row["finish"] == "stop"]
    expected = plain_lowest(usable, ties(tmp_path, own, 42), perplexity, n, cap)

    flags = {"n_ul": n, "ul_cap": cap, "max_tokens_ul": 55}
    if truncated:
        flags["truncated_ul"] = truncated
    picked, meta = select(tmp_path, "oxa_full", teacher, own, n_ce=50, **flags)

    ul = [row for row in picked if row["objective"] == "ul"]
    assert set(sids(ul)) == expected
    assert len(ul) == meta["ul"]["actual"]
    assert min(row["ppl"] for row in ul) == 1.2, "the floor itself is in"
    n_dropped = len(wrong) - len(usable)
    assert n_dropped > 0
    assert sum(meta["ul"]["dropped"].values()) == n_dropped

    ce = [row for row in picked if row["objective"] == "ce"]
    mle, _ = select(tmp_path, "oxa_mle", teacher, n_ce=50)
    assert ce == mle, "the same cross-entropy set as oxa_mle"


def test_plain_sft_is_uniform_over_queries_with_equal_numbers_of_responses(tmp_path):
    """100 draws of 10 out of 80 rows take each row 12.5 times in the mean, with a standard
    deviation of 3.3."""
    rows = [{**row, "correct": True, "ppl": 2.0} for row in scored_rows(20, 4, 0)]
    path = write(tmp_path / "t.jsonl", rows)
    args = stage.parse_args(["select", "--arm", "sft", "--teacher", "t", "--out", "o",
                             "--n-ce", "10"])
    times = Counter()
    for seed in range(100):
        columns = stage.read_columns(path, seed)
        picked, _ = stage.select_ce(columns, args)
        assert len(np.unique(columns.query[picked])) == 10, "one per query"
        times.update(picked.tolist())
    counts = np.array([times[i] for i in range(80)])
    assert counts.sum() == 1000
    assert counts.min() > 0
    assert counts.max() < 12.5 + 5 * 3.3


def test_length_matched_has_the_lengths_of_oxa_mle_and_not_its_perplexities(tmp_path):
    rows = scored_rows(400, 8, 3, lengths=(50, 400))

    mle, _ = select(tmp_path, "oxa_mle", rows, n_ce=100, mu=3.5)
    control, meta = select(tmp_path, "length_matched", rows, n_ce=100, mu=3.5)

    assert most_per_query(control) == 1
    assert len(control) == len(mle)
    mle_lengths = np.sort([row["n_tokens"] for row in mle])
    control_lengths = np.sort([row["n_tokens"] for row in control])
    difference = np.abs(control_lengths / mle_lengths - 1)
    assert difference.max() < 0.055, "sorted lengths agree within a bin of 5 %"
    assert np.median([row["ppl"] for row in mle]) > 3.3
    assert np.median([row["ppl"] for row in control]) < 3.0
    assert all(b["shortage"] == 0 for b in meta["length_bins"])


# ------------------------------------------------------------------------------------- of every arm


@pytest.mark.parametrize("arm", stage.ARMS)
def test_what_could_not_be_judged_or_scored_enters_no_set(tmp_path, arm):
    """With wide limits: cross-entropy examples are correct and scored, unlikelihood examples wrong
    and scored, and each is a copy of its row."""
    teacher = scored_rows(60, 6, 1)
    own = scored_rows(60, 6, 2, "self")
    by_sid = {row["sid"]: row for row in teacher + own}

    picked, meta = select(tmp_path, arm, teacher, own, n_ce=10_000, n_ul=10_000, cap=6, ul_cap=6,
                          sigma=5)

    for row in picked:
        source = by_sid[row["sid"]]
        assert source["correct"] is (row["objective"] == "ce")
        assert source["ppl"] is not None
        copy = {name: source[name] for name in COPIED}
        assert row == {**copy, "objective": row["objective"]}
    unknown = [row for row in teacher if row["correct"] is None]
    not_scored = [row for row in teacher if row["ppl"] is None]
    assert len(unknown) > 0
    assert len(not_scored) > 0
    assert meta["teacher"]["unknown"] == len(unknown)
    assert meta["teacher"]["not_scored"] == len(not_scored)
    objectives = {"ce", "ul"} if arm == "oxa_full" else {"ce"}
    assert {row["objective"] for row in picked} == objectives


@pytest.mark.parametrize("arm", ["sft", "oxa_mle", "length_matched"])
def test_a_selection_depends_on_the_seed_and_not_on_the_order_of_the_rows(tmp_path, arm):
    def picked_of(rows, seed):
        picked, _ = select(tmp_path, arm, rows, n_ce=60, seed=seed)
        return set(sids(picked))

    rows = [{**row, "n_tokens": 30} for row in scored_rows(100, 6, 1)]
    first = picked_of(rows, 42)
    assert picked_of(rows[::-1], 42) == first
    assert picked_of(rows, 43) != first


def test_memory_does_not_grow_with_the_text(tmp_path):
    """A file of 35 MB is read with less than 5 MB of Python's memory."""
    text = "a long chain of thought, " * 10_000
    rows = [{**row, "response": text} for row in scored_rows(25, 6, 1)]
    path = write(tmp_path / "long.jsonl", rows)
    assert path.stat().st_size > 35e6

    tracemalloc.start()
    stage.main(["select", "--arm", "oxa_mle", "--teacher", str(path), "--n-ce", "30",
                "--out", str(tmp_path / "o.jsonl")])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


# ----------------------------------------------------------------------------------------- refusals

# Flags, and what is said of them.
BAD = {
    "--arm nonsense": "invalid choice",
    "--arm oxa_full": "needs --self",
    "--arm sft --cap 0": "--cap must be at least 1",
    "--arm sft --n-ce 0": "--n-ce must be at least 1",
    "--arm oxa_mle --sigma 0": "--sigma must be positive",
    "--arm oxa_mle --mu-quantile 70": "--mu-quantile must lie in [0, 1]",
    "--arm oxa_mle --mu 900": "would pick",
    "--arm oxa_mle --bin-width 0.3": "not a whole number of bins",
    "--arm oxa_mle --range-low 5": "is not below --range-high",
    "--arm sft_lp --min-tokens 100000": "no response is left",
    "--arm sft --teacher missing.jsonl": "missing.jsonl does not exist",
    "--arm oxa_mle --range-low 90 --range-high 91": "correct responses have perplexities from",
    "--arm oxa_mle --bin-width 1e-9": "4,000,000,000 bins",
    "--arm oxa_mle --n-bins 0": "--n-bins must be positive",
    "--arm oxa_mle --bin-width 0": "--bin-width must be positive",
    "--arm oxa_mle --sigma-share -1": "--sigma-share must be",
    "--arm oxa_mle --range-quantiles 0.9 0.1": "the lower one first",
    "--arm oxa_mle --range-quantiles 0.5": "two numbers",
    "--arm oxa_mle --range-quantiles 0 1.5": "two numbers in [0, 1]",
    "--arm sft --recipe missing.toml": "missing.toml does not exist",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_settings_end_with_one_sentence_and_code_2(tmp_path, capsys, flags):
    teacher = write(tmp_path / "teacher.jsonl", scored_rows(10, 4, 0))
    out = tmp_path / "o.jsonl"
    said = refused(capsys, "select", "--teacher", teacher, "--out", out, *flags.split())
    assert BAD[flags] in said
    assert not out.exists()


def file_that_ends(rows, change):
    """Text of a file of the rows. Of the last one these fields are changed, or it is this text;
    None: it has a pid and nothing else. "": the whole file is empty."""
    if change == "":
        return ""
    lines = [json.dumps(row) for row in rows[:-1]]
    if change is None:
        lines.append(json.dumps({"pid": "p"}))
    elif isinstance(change, dict):
        lines.append(json.dumps({**rows[-1], **change}))
    else:
        lines.append(change)
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("change,message", [
    ({"sid": "p0:teacher:0"}, "occurs twice"),
    ({"ppl": "low"}, "field 'ppl'"),
    ({"correct": "yes"}, "field 'correct'"),
    ({"n_tokens": None}, "field 'n_tokens'"),
    ({"problem": None}, "field 'problem'"),
    ({"scorer": "another"}, "are mixed"),
    ({"scorer_dtype": "bfloat16"}, "are mixed"),
    (None, "field 'sid' is missing"),
    ("{broken", "not valid JSON"),
    ("[1]", "must be a JSON object"),
    ("", "is empty")])
def test_bad_rows_end_with_one_sentence_and_code_2(tmp_path, capsys, change, message):
    rows = sorted(scored_rows(3, 1, 0), key=itemgetter("pid"))
    rows = [{**row, "correct": True, "ppl": 2.0} for row in rows]
    path = tmp_path / "teacher.jsonl"
    path.write_text(file_that_ends(rows, change))
    out = tmp_path / "o.jsonl"
    said = refused(capsys, "select", "--arm", "sft", "--teacher", path, "--out", out)
    assert message in said
    assert not out.exists()


def test_an_input_is_not_replaced_by_the_output(tmp_path, capsys):
    path = write(tmp_path / "teacher.jsonl", scored_rows(10, 4, 0))
    before = path.read_bytes()
    said = refused(capsys, "select", "--arm", "sft", "--teacher", path, "--out", path)
    assert "is an input of this command" in said
    assert path.read_bytes() == before


def test_a_recipe_key_that_is_no_flag_is_refused(tmp_path, capsys):
    """`self` is the flag's name on the command line, `self_samples` in a recipe."""
    recipe = tmp_path / "r.toml"
    recipe.write_text("[select]\nself = 1\n")
    said = refused(capsys, "select", "--recipe", recipe, "--arm", "sft", "--teacher", "t",
                   "--out", "o")
    assert "unknown key 'self'" in said


# --------------------------------------------------------------------------------------------- show


def test_show_prints_verdict_perplexity_and_bin(tmp_path, capsys):
    rows = [{**row, "ppl": 2.52} for row in scored_rows(10, 4, 0)]
    path = str(write(tmp_path / "scored.jsonl", rows))

    stage.main(["show", "--samples", path, "--show", "2", "--pid", "p3"])
    printed = capsys.readouterr().out
    assert printed.count("p3:teacher:") == 2
    assert "2.5200, bin 2.5 - 2.55" in printed
    assert "2 of 4 rows" in printed

    row = rows[5]
    verdict = {True: "correct", False: "wrong", None: "unknown"}[row["correct"]]
    stage.main(["show", "--samples", path, "--sid", row["sid"]])
    printed = capsys.readouterr().out
    assert f"{row['sid']} | {verdict} (ok)" in printed
    assert "What is" in printed
    assert "1 of 1 rows" in printed
