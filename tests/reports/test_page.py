"""The report: one safe file that says what the run's own records say."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from phinetune.base.errors import UserError
from phinetune.reports.page import report_html

from .records import course, write_events
from .runs import ANSWERS, EVALUATION, SHA, make_run

ATTACKS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'; }</style><script>alert(2)</script>",
    "</div></section><iframe src='https://example.com'></iframe>",
    "{{ 7 * 7 }}{% raw %}",
    "<!-- -->&lt;b&gt;",
]


class Collector(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text.append(data)


def read(path) -> Collector:
    collector = Collector()
    collector.feed(path.read_text(encoding="utf-8"))
    return collector


def words(path) -> str:
    return " ".join(" ".join(read(path).text).split())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return report_html(make_run(tmp_path_factory.mktemp("runs") / "20261120-142233-k3f"))


@pytest.mark.parametrize(
    "words_expected",
    [
        "run 20261120-142233-k3f",
        "Adapter better than base: test loss 3.100 → 0.210 (−2.890, 95 % interval −3.020 to −2.760).",
        "token accuracy trained tokens guessed right 41.0 % 94.0 % +53.0 +51.0 to +55.0 better",
        "word overlap (F1) words shared with the reference 12.0 % 11.0 % −1.0 −2.0 to −0.5 worse",
        "valid JSON answers that are one JSON value 2.0 % 3.0 % +1.0 −1.0 to +2.0 no clear difference",
        "field city answers with this field right 1.0 % 61.0 % +60.0 too few examples for one",
        "only 800 examples: a thousand or more are better",
        "Where is the Louvre?",
        "best test loss 0.210 at step 30",
        SHA,
        "train dataset/train.json",
        "800 40,960 9,001",
        "lora_r 16",
        "versions.torch 2.13.0",
        "2 min 31 s (forecast 2 min 40 s)",
        "adapter/ the adapter: a PEFT folder, the result 2 B",
        "from_pretrained('microsoft/Phi-3-mini-4k-instruct')",
    ],
)
def test_page_says(report, words_expected):
    assert words_expected in words(report)


def test_exact_matches_are_marked_once_each(report):
    assert words(report).count("adapter exact match") == 1


def test_page_loads_nothing_and_runs_nothing(report):
    collector = read(report)
    assert not {"script", "link", "img", "iframe", "object", "embed", "form", "base"} & set(collector.tags)
    assert not [name for _, name, _ in collector.attributes if name.startswith("on")]
    targets = [value for _, name, value in collector.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith("#") for value in targets)
    policies = [value for _, name, value in collector.attributes if name == "content"]
    assert any(value.startswith("default-src 'none'") for value in policies)
    assert "url(http" not in report.read_text(encoding="utf-8")


def test_text_of_others_is_shown_and_never_obeyed(tmp_path):
    everything = " ".join(ATTACKS)
    evaluation = json.loads(json.dumps(EVALUATION))
    for part in evaluation.values():
        part[f"field:{ATTACKS[0]}"] = part["exact_match"]
    folder = make_run(
        tmp_path / "run",
        evaluation=evaluation,
        answers=[dict.fromkeys(("prompt", "reference", "base", "adapter"), everything)],
        warnings=(everything,),
        settings={"system_prompt": everything, ATTACKS[1]: 1},
    )
    harmless = make_run(tmp_path / "plain")
    attacked, plain = read(report_html(folder)), read(report_html(harmless))
    assert set(attacked.tags) == set(plain.tags)
    assert "script" not in attacked.tags
    assert {name for _, name, _ in attacked.attributes} == {name for _, name, _ in plain.attributes}
    text = "".join(attacked.text)
    # Four texts of the answer, one warning, one setting: all there, letter by letter.
    assert text.count(everything) == 6


@pytest.mark.parametrize(
    ("difference", "sentence", "reading"),
    [
        ({"value": 0.4, "low": 0.2, "high": 0.6}, "Adapter worse than base", "worse"),
        ({"value": 0.1, "low": -0.2, "high": 0.3}, "No clear difference", "no-clear-difference"),
        ({"value": -1.0, "low": None, "high": None}, "Too few test examples", "too-few-examples"),
    ],
)
def test_the_verdict_is_never_better_without_an_interval_below_zero(tmp_path, difference, sentence, reading):
    evaluation = {**EVALUATION, "difference": {"loss": difference}}
    path = report_html(make_run(tmp_path / "run", evaluation=evaluation))
    assert sentence in words(path)
    assert f'class="verdict {reading}"' in path.read_text(encoding="utf-8")


def test_a_run_that_went_on_from_others_names_them(tmp_path):
    folder = make_run(tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    record["lineage"] = [{"run_id": "first", "path": "runs/first/adapter"}, {"path": "<b>theirs</b>"}]
    (folder / "run.json").write_text(json.dumps(record))
    page = report_html(folder).read_text(encoding="utf-8")
    assert "run first, runs/first/adapter" in page
    assert "run unknown, &lt;b&gt;theirs" in page


def test_a_run_that_has_not_been_compared_says_so(tmp_path):
    write_events(tmp_path / "run" / "events.jsonl", course()[:12])
    (tmp_path / "run" / "run.json").write_text('{"run_id": "run", "status": "running"}', encoding="utf-8")
    page = words(report_html(tmp_path / "run"))
    assert "Base and adapter have not been compared yet (status: running)." in page
    assert "Answers side by side" not in page


def test_figures_that_were_not_finite_show_as_a_dash(tmp_path):
    evaluation = json.loads(json.dumps(EVALUATION))
    evaluation["base"]["perplexity"] = None
    evaluation["difference"]["perplexity"] = {"value": None, "low": None, "high": None}
    assert "perplexity e to the loss; lower is better – 1.230 –" in words(
        report_html(make_run(tmp_path / "run", evaluation=evaluation))
    )


def test_a_lone_surrogate_does_not_cost_the_report(tmp_path):
    folder = make_run(tmp_path / "run", answers=[])
    with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
        answer = {**ANSWERS[0], "adapter": "half \ud83e"}
        compared = {"event": "Compared", "evaluation": EVALUATION, "answers": [answer]}
        file.write(json.dumps(compared, ensure_ascii=True) + "\n")
    assert "half ?" in words(report_html(folder))


def test_no_run_and_damaged_files_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="no run here"):
        report_html(tmp_path)
    folder = make_run(tmp_path / "run")
    (folder / "summary.json").write_text('{"half', encoding="utf-8")
    with pytest.raises(UserError, match="damaged"):
        report_html(folder)


def test_page_of_the_same_run_is_the_same_bytes(report):
    before = report.read_bytes()
    # The report itself is no input of the next one.
    assert report_html(report.parent).read_bytes() == before
