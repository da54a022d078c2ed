"""README's numbers are those of the committed run summary. `python tests/test_readme.py` writes the table anew."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
SUMMARY = ROOT / "docs/results/toy/summary.json"
BEGIN, END = "<!-- table: tests/test_readme.py -->", "<!-- end -->"
NAMES = {"C1": "Pass@1 up", "C2": "Pass@8 up", "C3": "initial policy entropy up (nats)", "C4": "Pass@1 and Pass@8 still up after RLVR"}


def estimate(x, signed=False):
    sign = "+" if signed else ""
    return f"{x['value']:{sign}.3f} [{x['low']:{sign}.3f}, {x['high']:{sign}.3f}]"


def tables(summary) -> str:
    """The arms (means over both sets, 95 % intervals) and the claims against `sft` and the controls, as Markdown."""
    lines = ["| arm | Pass@1 | Pass@8 | entropy (nats) | Pass@1 after RLVR |", "|---|---|---|---|---|"]
    for arm, of_arm in summary["arms"].items():
        before, after = of_arm["before"]["average"], of_arm.get("after", {}).get("average")
        lines.append(f"| `{arm}` | {estimate(before['pass_at_1'])} | {estimate(before['pass_at_k'])} | "
                     f"{estimate(before['entropy'])} | {estimate(after['pass_at_1']) if after else '–'} |")
    lines += ["", "| claim | difference | effect [95 %] | seeds | verdict |", "|---|---|---|---|---|"]
    for comparison in summary["claims"]:
        if comparison["arm"] == "oxa_full" and comparison["world"] == summary["run"]:
            for name, claim in comparison["claims"].items():
                parts = claim.get("parts", {name: claim})
                effect = "; ".join(estimate(part, signed=True) for part in parts.values())
                seeds = min(part["seeds"] for part in parts.values())
                lines.append(f"| {name} {NAMES[name]} | `oxa_full` − `{comparison['reference']}` | {effect} | {seeds} | **{claim['verdict']}** |")
    elsewhere = [x for x in summary["claims"] if x["world"] != summary["run"] and x["reference"] == "sft"]
    if elsewhere:
        lines += ["", "| in the contrast world | difference | effect [95 %] | seeds | verdict |", "|---|---|---|---|---|"]
    for comparison in elsewhere:
        for name, claim in comparison["claims"].items():
            lines.append(f"| {name} {NAMES[name]} | `{comparison['arm']}` − `sft` | {estimate(claim, signed=True)} | "
                         f"{claim['seeds']} | {claim['verdict']} |")
    return "\n".join(lines)


def test_readme_shows_the_numbers_of_the_committed_summary():
    assert tables(json.loads(SUMMARY.read_text())) in (ROOT / "README.md").read_text()


if __name__ == "__main__":
    head, rest = (ROOT / "README.md").read_text().split(BEGIN)
    tail = rest.split(END)[1]
    (ROOT / "README.md").write_text(f"{head}{BEGIN}\n{tables(json.loads(SUMMARY.read_text()))}\n{END}{tail}")
