"""README's numbers are those of the committed summaries. `python tests/test_readme.py` renews them.

The first table has five rows. Their first cells are numbers and are made here; the last cell is
what a reader should know beside them: written by hand, and kept.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
LOG = ROOT / "docs/LOG.md"
SUMMARY = ROOT / "docs/results/toy/summary.json"
LAPTOP = ROOT / "docs/results/laptop/summary.json"
REPORTS = (SUMMARY.with_name("REPORT.md"), LAPTOP.with_name("REPORT.md"))


def estimate(effect, form=".3f"):
    """0.992 [0.981, 1.000]"""
    value, low, high = (format(effect[name], form) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def judged(effect, smallest):
    """+0.003 [-0.002, +0.010], **not reproduced**: the rule of the report on any difference."""
    verdict = "undecided"
    if effect["high"] < smallest:
        verdict = "**not reproduced**"
    elif effect["low"] > 0:
        verdict = "reproduced"
    return f"{estimate(effect, '+.3f')}, {verdict}"


def claims_of(summary, world, arm, reference):
    for found in summary["claims"]:
        if (found["world"], found["arm"], found["reference"]) == (world, arm, reference):
            return found["claims"]
    raise KeyError(f"{summary['run']}: the summary compares no {arm} with {reference} in {world}")


def rows(summary):
    """Five rows without their last cell: what, Pass@1, Pass@8, Pass@32, entropy."""
    smallest = summary["smallest_effect"]
    table = []
    for arm in ("sft", "oxa_full"):
        measured = summary["arms"][arm]["before"]["average"]
        cells = [f"`{arm}`"]
        for name in ("pass_at_1", "pass_at_k", "pass_at_n", "entropy"):
            cells.append(estimate(measured[name]))
        table.append(cells)

    claims = claims_of(summary, "toy_easy", "oxa_mle", "sft")
    cells = ["contrast world: `oxa_mle` − `sft`"]
    for effect in (claims["C1"], claims["C2"], claims["C2"]["at_n"], claims["C3"]):
        cells.append(judged(effect, smallest))
    table.append(cells)

    parts = claims_of(summary, "toy", "oxa_full", "sft")["C4"]["parts"]
    cells = ["after RLVR: `oxa_full` − `sft`"]
    for effect in (parts["Pass@1"], parts["Pass@k"], parts["Pass@k"]["at_n"]):
        cells.append(judged(effect, smallest))
    table.append(cells + ["–"])

    laptop = json.loads(LAPTOP.read_text())
    claims = claims_of(laptop, "laptop", "oxa_full", "sft")
    cells = ["**a real model**, SmolLM2-135M: `oxa_full` − `sft`", judged(claims["C1"], smallest),
             f"{laptop['pass_at_k_label']}: {judged(claims['C2'], smallest)}", "–",
             judged(claims["C3"], smallest)]
    table.append(cells)
    return table


def line_of(cells):
    return "| " + " | ".join(cells) + " |"


def test_the_first_table_has_the_numbers_of_the_committed_summary():
    lines = README.read_text().splitlines()
    for cells in rows(json.loads(SUMMARY.read_text())):
        found = [line for line in lines if line.startswith(line_of(cells))]
        assert len(found) == 1, f"not in README: {line_of(cells)}"


def decimals(text):
    """Without a leading zero: the log writes .83 where README writes 0.83."""
    return {number.lstrip("0") for number in re.findall(r"\d*\.\d+", text)}


def test_every_figure_of_the_results_stands_in_the_log_or_in_the_report():
    results = README.read_text().split("**What has been seen so far")[1].split("\n## ")[0]
    shown = LOG.read_text() + "".join(report.read_text() for report in REPORTS)
    invented = decimals(results) - decimals(shown)
    assert not invented, f"README has figures that no result shows: {sorted(invented)}"


def write():
    """Renews the number cells of README's rows, and keeps each row's last cell."""
    lines = README.read_text().splitlines()
    for cells in rows(json.loads(SUMMARY.read_text())):
        starts = [i for i, line in enumerate(lines) if line.startswith(f"| {cells[0]} |")]
        assert len(starts) == 1, f"README.md must have one row for {cells[0]}"
        note = lines[starts[0]].rstrip(" |").split(" | ")[-1]
        lines[starts[0]] = line_of(cells + [note])
    README.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write()
