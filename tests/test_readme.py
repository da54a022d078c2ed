"""README's numbers are those of the committed run summary. `python tests/test_readme.py` writes them anew.

The first table has four rows. Their first cells are numbers, made here; the last cell is what a reader should know beside
them, written by hand and kept.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SUMMARY = ROOT / "docs/results/toy/summary.json"


def estimate(effect):
    """0.992 [0.981, 1.000]"""
    return f"{effect['value']:.3f} [{effect['low']:.3f}, {effect['high']:.3f}]"


def judged(effect, smallest):
    """+0.003 [-0.002, +0.010], **not reproduced**: the rule of docs/METRICS.md on any difference."""
    verdict = "undecided"
    if effect["high"] < smallest:
        verdict = "**not reproduced**"
    elif effect["low"] > 0:
        verdict = "reproduced"
    return f"{effect['value']:+.3f} [{effect['low']:+.3f}, {effect['high']:+.3f}], {verdict}"


def comparison(summary, world, arm, reference):
    for found in summary["claims"]:
        if (found["world"], found["arm"], found["reference"]) == (world, arm, reference):
            return found["claims"]
    raise KeyError(f"{SUMMARY} compares no {arm} with {reference} in {world}")


def rows(summary):
    """The cells of the four rows, but for the last: arm or difference, Pass@1, Pass@8, Pass@32, entropy."""
    smallest = summary["smallest_effect"]
    table = []
    for arm in ("sft", "oxa_full"):
        measured = summary["arms"][arm]["before"]["average"]
        names = ("pass_at_1", "pass_at_k", "pass_at_n", "entropy")
        table.append([f"`{arm}`"] + [estimate(measured[name]) for name in names])

    claims = comparison(summary, "toy_easy", "oxa_mle", "sft")
    effects = (claims["C1"], claims["C2"], claims["C2"]["at_n"], claims["C3"])
    table.append(["contrast world: `oxa_mle` − `sft`"] + [judged(effect, smallest) for effect in effects])

    parts = comparison(summary, "toy", "oxa_full", "sft")["C4"]["parts"]
    effects = (parts["Pass@1"], parts["Pass@k"], parts["Pass@k"]["at_n"])
    table.append(["after RLVR: `oxa_full` − `sft`"] + [judged(effect, smallest) for effect in effects] + ["–"])
    return table


def line_of(cells):
    return "| " + " | ".join(cells) + " |"


def test_the_first_table_has_the_numbers_of_the_committed_summary():
    lines = README.read_text().splitlines()
    for cells in rows(json.loads(SUMMARY.read_text())):
        assert [line for line in lines if line.startswith(line_of(cells))], f"not in README: {line_of(cells)}"


def numbers(text):
    """Decimals as text, without a leading zero: the log writes .83 where README writes 0.83."""
    return {number.lstrip("0") for number in re.findall(r"\d*\.\d+", text)}


def test_every_figure_of_the_results_stands_in_the_log_or_in_the_report():
    results = README.read_text().split("**What has been seen so far")[1].split("## ")[0]
    known = numbers((ROOT / "docs/LOG.md").read_text()) | numbers((SUMMARY.parent / "REPORT.md").read_text())
    unknown = {number for number in numbers(results) if number not in known}
    assert not unknown, f"README claims figures that no result shows: {sorted(unknown)}"


def write():
    """Renews the number cells of README's rows, and keeps each row's last cell."""
    lines = README.read_text().splitlines()
    for cells in rows(json.loads(SUMMARY.read_text())):
        for i, line in enumerate(lines):
            if line.startswith(f"| {cells[0]} |"):
                note = line.strip("| ").split(" | ")[-1]
                lines[i] = line_of(cells + [note])
                break
        else:
            raise SystemExit(f"README.md has no row for {cells[0]}")
    README.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write()
