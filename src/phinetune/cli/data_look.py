"""`phinetune data stats | report | card | rules`: what a file holds, on screen, page and card."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from phinetune.cli import console
from phinetune.cli.data_options import (
    Columns,
    Keep,
    Model,
    Seqlen,
    Tools,
    base_loss,
    read_options,
    reading_flags,
    token_counter,
    told_check,
    toxic_options,
)

if TYPE_CHECKING:
    from phinetune.data.checking import CheckReport

File = Annotated[Path, typer.Argument(help="Data file.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
_BAR_WIDTH = 40


def stats(
    file: File,
    model: Model = "demo",
    seqlen: Seqlen = 1024,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data, for the cost.")] = 1,
    price: Annotated[
        float | None, typer.Option(help="Your price for a million trained tokens.", show_default=False)
    ] = None,
    svg: Annotated[
        Path | None, typer.Option(help="Write the histogram there too.", show_default=False)
    ] = None,
    columns: Columns = None,
    keep: Keep = None,
    tools: Tools = None,
    json: Json = False,
) -> None:
    """Count tokens, lengths, turns, languages and duplicates; what training on it will take."""
    from phinetune.base.files import write_atomically
    from phinetune.data.changing.writing import refuse_existing
    from phinetune.reports.data_page import length_picture

    if svg is not None:
        refuse_existing(svg)
    report = _checked(file, model, seqlen, columns, keep, tools, toxic="none")
    if svg is not None:
        write_atomically(svg, length_picture(report))
    if json:
        console.print_json(_record(report, epochs, price))
        return
    _show_facts(report)
    _show_histogram(report)
    for line in _costs(report, epochs, price):
        console.say(line)
    if svg is not None:
        console.say(f"histogram written to {svg}")
    console.next_commands(
        f"phinetune data report {shlex.quote(str(file))}{reading_flags(columns, keep, tools)}"
    )


def report(
    file: File,
    to: Annotated[
        Path | None, typer.Option(help="New page; FILE.html if not given.", show_default=False)
    ] = None,
    cleaned: Annotated[
        Path | None, typer.Option(help="The file after a cleaning, to compare with.", show_default=False)
    ] = None,
    model: Model = None,
    seqlen: Seqlen = 1024,
    test: Annotated[
        Path | None, typer.Option(help="A test set: name the rows that leak from it.", show_default=False)
    ] = None,
    toxic: Annotated[
        str, typer.Option(help="some, all or none: how many rows the content filter judges.")
    ] = "some",
    noise: Annotated[
        str | None,
        typer.Option(help="Rank doubtful rows by the loss of this base: demo or a name.", show_default=False),
    ] = None,
    columns: Columns = None,
    keep: Keep = None,
    tools: Tools = None,
) -> None:
    """Write one HTML page: what is in a file, every finding with its rows, before and after a cleaning."""
    from phinetune.data.changing.versions import read_changes
    from phinetune.reports.data_page import headline, refuse_foreign, write_data_page

    page = to or file.with_name(file.name + ".html")
    is_there = refuse_foreign(page)
    found = _checked(file, model, seqlen, columns, keep, tools, toxic=toxic, test=test, noise=noise)
    after = (
        _checked(cleaned, model, seqlen, None, None, None, toxic=toxic, test=test, noise=noise)
        if cleaned
        else None
    )
    write_data_page(page, found, after, read_changes(cleaned) if cleaned else ())
    console.say(headline(found)[0], f"written to {page}{', in place of the older page' if is_there else ''}")


def card(
    file: File,
    to: Annotated[
        Path | None, typer.Option(help="New card; FILE.card.md if not given.", show_default=False)
    ] = None,
    purpose: Annotated[str, typer.Option(help="What the data is for.")] = "",
    source: Annotated[str, typer.Option(help="Where it comes from, and who wrote it.")] = "",
    consent: Annotated[str, typer.Option(help="What the people in it agreed to.")] = "",
    licence: Annotated[str, typer.Option(help="Its licence.")] = "",
    limits: Annotated[str, typer.Option(help="What it should not be used for.")] = "",
    model: Model = None,
    seqlen: Seqlen = 1024,
    columns: Columns = None,
    keep: Keep = None,
    tools: Tools = None,
) -> None:
    """Write the data card: what its owner says of it, what was measured, and what was not."""
    from phinetune.base.files import sha256_file, write_atomically
    from phinetune.data.changing.writing import refuse_existing
    from phinetune.reports.data_page import NOT_STATED, data_card

    path = to or file.with_name(file.name + ".card.md")
    refuse_existing(path)
    found = _checked(file, model, seqlen, columns, keep, tools, toxic="some")
    said = {"purpose": purpose, "source": source, "consent": consent, "licence": licence, "limits": limits}
    write_atomically(path, data_card(found, said, sha256_file(file)))
    console.say(f"written to {path}")
    if missing := [name for name, text in said.items() if not text]:
        console.say(f"{NOT_STATED}: {', '.join(missing)}; say it with --{missing[0]} and so on")


def rules(json: Json = False) -> None:
    """List every rule with its severity, what it means and what cleaning does."""
    from phinetune.data.rules.catalog import RULES

    if json:
        console.print_json([dataclasses.asdict(rule) for rule in RULES.values()])
        return
    table = Table(box=None, pad_edge=False)
    for name in ("rule", "severity", "meaning", "data clean"):
        table.add_column(name, overflow="fold")
    for rule in RULES.values():
        table.add_row(rule.id, rule.severity, rule.meaning, rule.can_clean)
    console.say(table)


def _checked(
    file: Path,
    model: str | None,
    seqlen: int,
    columns: list[str] | None,
    keep: str | None,
    tools: str | None,
    *,
    toxic: str,
    test: Path | None = None,
    noise: str | None = None,
) -> CheckReport:
    from phinetune.data.checking import CheckOptions
    from phinetune.data.reading import require_file

    require_file(file)
    judge, max_judged = toxic_options(toxic)
    options = CheckOptions(
        read=read_options(columns, keep, tools),
        test_file=test,
        count_tokens=token_counter(model, seqlen) if model else None,
        judge=judge,
        max_judged=max_judged,
        loss_of=base_loss(noise, seqlen) if noise else None,
    )
    return told_check(file, options)


def _record(report: CheckReport, epochs: int, price: float | None) -> dict[str, object]:
    from phinetune.cli.data import report_record
    from phinetune.data.histogram import histogram, quantiles

    tokens = report.tokens
    lengths = tokens.lengths if tokens else report.lengths
    trained = tokens.num_trained * epochs if tokens else None
    record = report_record(report)
    del record["findings"]
    return {
        **record,
        "length_quantiles": quantiles(lengths),
        "histogram": [dataclasses.asdict(bin) for bin in histogram(lengths)],
        "epochs": epochs,
        "trained_tokens_in_all_epochs": trained,
        "cost": trained * price / 1e6 if trained is not None and price is not None else None,
    }


def _show_facts(report: CheckReport) -> None:
    from phinetune.reports.data_page import facts

    console.say(Text(report.file, style="bold"))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in facts(report).items():
        table.add_row(f"  {name}", text)
    for label, count in list(report.classes.items())[:12]:
        table.add_row("  class", f"{label}  {count:,}")
    console.say(table)


def _show_histogram(report: CheckReport) -> None:
    from phinetune.data.histogram import histogram
    from phinetune.reports.data_page import unit

    bins = histogram(report.tokens.lengths if report.tokens else report.lengths)
    greatest = max((bin.count for bin in bins), default=1) or 1
    block = "█" if console.is_unicode(console.out().file) else "#"
    console.say("", f"rows by length in {unit(report)}")
    for bin in bins:
        width = round(_BAR_WIDTH * bin.count / greatest)
        console.say(
            Text.assemble(
                f"{bin.label:>16}  ", (block * max(width, bool(bin.count)), "cyan"), f" {bin.count:,}"
            )
        )


def _costs(report: CheckReport, epochs: int, price: float | None) -> Iterator[str]:
    from phinetune.data.findings import counted

    if report.tokens is None:
        return
    trained = report.tokens.num_trained * epochs
    yield ""
    read = report.tokens.num_tokens * epochs
    yield f"{counted(epochs, 'epoch')}: {read:,} tokens read, {trained:,} trained"
    if price is not None:
        yield f"at {price:g} for a million trained tokens: {trained * price / 1e6:,.2f}"


COMMANDS = (stats, report, card, rules)
