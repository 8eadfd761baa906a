"""How the check of a data file looks in a terminal: what it is, what it holds, findings by rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from phinetune.cli import console
from phinetune.data.findings import counted

if TYPE_CHECKING:
    from phinetune.data.checking import CheckReport
    from phinetune.data.findings import Finding

NUM_PLACES = 3
_STYLES = {"error": "red", "warning": "yellow", "note": "cyan"}


def show_report(report: CheckReport, *, num_places: int = NUM_PLACES) -> None:
    """What a file holds; then each rule that found something, gravest first, with its first places."""
    console.say(Text(report.file, style="bold"))
    for line in _counts(report):
        console.say(f"  {line}")
    for findings in by_rule(report.findings):
        _show_rule(findings, report.counts[findings[0].rule], num_places)
    num_hidden = sum(max(0, count - num_places) for count in report.counts.values())
    if num_hidden:
        console.say(f"  and {num_hidden:,} more places; all of them with --json")
    if not report.findings:
        console.say(Text("  no faults", style="green"))


def by_rule(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Findings of one rule together, errors first, within a severity the most frequent first."""
    grouped: dict[str, list[Finding]] = {}
    for finding in findings:
        grouped.setdefault(finding.rule, []).append(finding)
    order = list(_STYLES)
    return sorted(grouped.values(), key=lambda group: (order.index(group[0].severity), -len(group)))


def _show_rule(findings: list[Finding], count: int, num_places: int) -> None:
    first = findings[0]
    times = f"  {count:,} times" if count > 1 else ""
    console.say(
        Text.assemble("  ", (first.severity, _STYLES[first.severity]), " ", (first.rule, "bold"), times)
    )
    for finding in findings[:num_places]:
        text = Text(f"    {finding.where}: {finding.message}")
        if finding.excerpt:
            text.append(f"\n      here: {finding.excerpt}", "dim")
        console.say(text)
    console.say(Text(f"    fix: {first.fix}", "dim"))


def _counts(report: CheckReport) -> Iterator[str]:
    if report.form:
        yield report.form
    yield f"{counted(report.num_examples, 'sound example')}, {report.num_characters:,} characters"
    if report.num_conversations:
        turns = ", ".join(f"{count:,} {role}" for role, count in report.roles.items())
        yield f"turns: {turns} ({report.num_trained_turns:,} trained)"
    if report.tokens is not None:
        tokens = report.tokens
        lost = f", {tokens.num_lost:,} beyond the sequence length" if tokens.num_lost else ""
        yield f"tokens: {tokens.num_tokens:,}, {tokens.num_trained:,} trained{lost}"
    yield ", ".join(
        counted(count, name)
        for count, name in (
            (report.num_errors, "error"),
            (report.num_warnings, "warning"),
            (report.num_notes, "note"),
        )
    )
    if report.num_judged < report.num_examples and report.num_judged:
        yield f"the content filter judged the first {report.num_judged:,} rows; --toxic all judges all"
