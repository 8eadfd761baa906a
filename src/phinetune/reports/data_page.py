"""Write what a data file holds and what is wrong with it as one HTML page without scripts, and its data card.

Rows may have been written by anybody: all text is escaped. Knows nothing of how files were checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from phinetune.base.errors import UserError
from phinetune.base.files import write_atomically
from phinetune.data.changing.cleaning import Change
from phinetune.data.checking import CheckReport
from phinetune.data.findings import Finding, counted
from phinetune.data.histogram import histogram, quantiles
from phinetune.data.rules.catalog import RULES
from phinetune.data.rules.clusters import Clusters
from phinetune.reports.bars import bars_svg
from phinetune.reports.templates import filled

NUM_ROWS_SHOWN, NUM_CHANGES_SHOWN = 50, 10
_NOTED = 0.02
NOT_STATED = "not stated"
_MARK = '<meta name="generator" content="phinetune data report">'


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleView:
    """What one rule found: its first places, and how many there are."""

    id: str
    severity: str
    meaning: str
    fix: str
    count: int
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeView:
    """What a cleaning did for one rule: rows left out, or turns repaired; the first of them."""

    rule: str
    is_dropped: bool
    count: int
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A number before and after a cleaning."""

    name: str
    before: str
    after: str


def refuse_foreign(path: Path) -> bool:
    """Whether a page of ours stands there, to be written anew; raises `UserError` for anything else."""
    if not path.exists():
        return False
    if path.is_file() and _MARK in path.read_bytes()[:8000].decode("utf-8", "replace"):
        return True
    raise UserError(
        f"'{path}' is there already, and is no page of a data file",
        where=str(path),
        why="nothing of yours is written over",
        do="choose another name with --to",
    )


def rule_views(report: CheckReport) -> list[RuleView]:
    """The rules that found something, gravest first."""
    grouped: dict[str, list[Finding]] = {}
    for finding in report.findings:
        grouped.setdefault(finding.rule, []).append(finding)
    views = [
        RuleView(
            id=rule,
            severity=found[0].severity,
            meaning=RULES[rule].meaning if rule in RULES else "",
            fix=found[0].fix,
            count=report.counts[rule],
            findings=tuple(found[:NUM_ROWS_SHOWN]),
        )
        for rule, found in grouped.items()
    ]
    order = {"error": 0, "warning": 1, "note": 2}
    return sorted(views, key=lambda view: (order[view.severity], -view.count))


def headline(report: CheckReport) -> tuple[str, str]:
    """One sentence on a file, and its colour: better, worse or even."""
    rows = counted(report.num_examples, "sound row")
    if not report.num_examples:
        return "Nothing here can be trained on as it is", "worse"
    if report.num_errors:
        return f"{counted(report.num_errors, 'row')} cannot be trained on; {rows} can", "worse"
    if report.num_warnings:
        return f"{rows}, {counted(report.num_warnings, 'warning')} to look at", "even"
    return f"{rows}, no warnings", "better"


def facts(report: CheckReport) -> dict[str, str]:
    """What a file holds, name by name."""
    openings = report.openings.items()
    kinds = f"{report.num_conversations:,} chats, {report.num_texts:,} texts"
    found = {
        "form": report.form,
        "size": f"{report.size_bytes / 1e6:,.2f} MB",
        "sound rows": f"{report.num_examples:,}: {kinds}",
        "turns": ", ".join(f"{count:,} {role}" for role, count in report.roles.items()),
        "trained turns": f"{report.num_trained_turns:,}",
        "characters": f"{report.num_characters:,}",
        "languages of answers": _told_languages(report),
        "exact duplicates": f"{report.num_exact_duplicates:,}",
        "near-duplicates": f"{report.num_near_duplicates:,}",
        "different words of answers (distinct-1)": f"{report.distinct_1:.1%}" if not report.classes else "",
        "different pairs of words (distinct-2)": f"{report.distinct_2:.1%}" if not report.classes else "",
        **{
            f"commonest opening of {name}": f"{text!r} {share:.1%}"
            for name, (text, share) in openings
            if share >= _NOTED
        },
        "families of wording": _told_clusters(report.clusters),
        "private data": ", ".join(f"{kind} {count:,}" for kind, count in report.private_kinds.items())
        or "none found",
        "private data not looked for": ", ".join(report.private_not_covered),
    }
    if report.tokens is not None:
        found["tokens"] = f"{report.tokens.num_tokens:,}, {report.tokens.num_trained:,} trained"
    found["length"] = ", ".join(f"{name} {value:,}" for name, value in quantiles(_lengths(report)).items())
    found["length"] += f" {unit(report)}"
    return {name: text for name, text in found.items() if text.strip()}


def _told_languages(report: CheckReport) -> str:
    known = {name: f"{name} {count:,}" for name, count in report.languages.items()}
    num_unknown = report.num_examples - sum(report.languages.values())
    unknown = [f"too short or unknown {num_unknown:,}"] if num_unknown else []
    return ", ".join([*known.values(), *unknown])


def _told_clusters(clusters: Clusters) -> str:
    if not clusters.num_rows:
        return ""
    rows = counted(clusters.num_rows, "row")
    return f"{clusters.num_clusters:,} in a sample of {rows}; the largest holds {clusters.largest_share:.1%}"


def unit(report: CheckReport) -> str:
    return "tokens" if report.tokens is not None else "characters"


def _lengths(report: CheckReport) -> list[int]:
    return list(report.tokens.lengths if report.tokens is not None else report.lengths)


def length_picture(report: CheckReport) -> str:
    """The histogram of lengths as SVG."""
    return bars_svg(histogram(_lengths(report)), f"Rows by length in {unit(report)}")


def comparisons(before: CheckReport, after: CheckReport) -> list[Comparison]:
    """What a cleaning changed: rows, severities, then every rule."""
    pairs = [
        ("sound rows", before.num_examples, after.num_examples),
        ("errors", before.num_errors, after.num_errors),
        ("warnings", before.num_warnings, after.num_warnings),
        ("notes", before.num_notes, after.num_notes),
    ]
    pairs += [
        (rule, before.counts.get(rule, 0), after.counts.get(rule, 0))
        for rule in {**before.counts, **after.counts}
    ]
    return [
        Comparison(name=name, before=f"{one:,}", after=f"{two:,}") for name, one, two in pairs if one or two
    ]


def change_views(changes: Sequence[Change]) -> list[ChangeView]:
    """The changes of a cleaning by rule, the most frequent first."""
    grouped: dict[tuple[str, bool], list[Change]] = {}
    for change in changes:
        grouped.setdefault((change.rule, change.is_dropped), []).append(change)
    views = [
        ChangeView(rule=rule, is_dropped=is_dropped, count=len(made), changes=tuple(made[:NUM_CHANGES_SHOWN]))
        for (rule, is_dropped), made in grouped.items()
    ]
    return sorted(views, key=lambda view: (not view.is_dropped, -view.count))


def write_data_page(
    path: Path, report: CheckReport, cleaned: CheckReport | None = None, changes: Sequence[Change] = ()
) -> None:
    """Write the page; `cleaned` is the check of the file after a cleaning, `changes` what that did."""
    text, colour = headline(report)
    page = filled(
        "data.html.jinja",
        name=Path(report.file).name,
        headline=text,
        colour=colour,
        facts=facts(report),
        # Safe: drawn from numbers.
        picture=Markup(length_picture(report)) if report.num_examples else "",
        classes=report.classes,
        num_classed=sum(report.classes.values()),
        turns=report.num_turns,
        rules=rule_views(report),
        comparisons=comparisons(report, cleaned) if cleaned else [],
        changes=change_views(changes),
    )
    write_atomically(path, page)


def data_card(report: CheckReport, said: Mapping[str, str], sha256: str) -> str:
    """A card in Markdown, after "Datasheets for Datasets" and "Data Cards": what is said and measured."""
    asked = {
        "purpose": "What it is for",
        "source": "Where it comes from, and who wrote it",
        "consent": "What the people in it agreed to",
        "licence": "Licence",
        "limits": "What it should not be used for",
    }
    out = [f"# Data card: {Path(report.file).name}", "", "## Said by its owner", ""]
    out += [f"- **{title}**: {said.get(name) or NOT_STATED}" for name, title in asked.items()]
    out += ["", "## Measured", ""]
    out += [f"- **{name}**: {text}" for name, text in facts(report).items()]
    if report.classes:
        out.append(
            f"- **classes**: {', '.join(f'{name} {count:,}' for name, count in report.classes.items())}"
        )
    out += [f"- **sha256**: `{sha256}`", "", "## Known faults", ""]
    out += [f"- {view.severity} **{view.id}**, {view.count:,}: {view.meaning}" for view in rule_views(report)]
    if not report.counts:
        out.append("- none found by the rules")
    judged = f"{report.num_judged:,} rows" if report.num_judged else "no row"
    out += [
        "",
        "## Not measured",
        "",
        f"- {judged} judged by the content filter, which is weak and English only.",
    ]
    out += [f"- Private data not looked for: {', '.join(report.private_not_covered)}."]
    out += ["- Whether what it says is true."]
    return "\n".join(out) + "\n"
