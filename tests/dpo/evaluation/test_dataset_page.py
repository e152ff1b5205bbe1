"""The page of a survey says all that the survey holds, to everyone, and nothing in it can act."""

import re
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path

import pytest

from dpo.data import Checked, DataConfig, Drop, Message, Preference, Report
from dpo.data.survey import survey
from dpo.data.surveyed import Survey
from dpo.data.tokens import Token
from dpo.errors import DataError
from dpo.evaluation.report import dataset
from dpo.evaluation.report.dataset import GAP, excerpt, page, write
from dpo.evaluation.report.sections import sections
from dpo.evaluation.report.template import template

_spec = spec_from_file_location("report_tests", Path(__file__).with_name("test_report.py"))
assert _spec is not None
assert _spec.loader is not None
report_tests = module_from_spec(_spec)
_spec.loader.exec_module(report_tests)

SCRIPT = "</style><script>alert(1)</script><img src=x onerror=alert(1)>&\"'\x1b\ud83d"


def surveyed(tokenizer: object, hostile: str = "") -> Survey:
    records = [
        Preference(
            prompt=(Message("user", f"{hostile.replace(chr(0xD83D), '')} the sea {n}"),),
            completions=("a good day " * (n % 5 + 1), "bad <|im_end|>"),
            scores=(1.0, 0.0),
            group=f"{hostile}g{n % 2}",
            source=f"{hostile}a.jsonl:{n}",
        )
        for n in range(40)
    ]
    examples = {Drop.TIE: (f"{hostile}a.jsonl:77",)}
    report = Report(f"{hostile}a.jsonl", "pair", f"a rule{hostile}", 50, 40, {Drop.TIE: 10}, examples)
    return survey(Checked(DataConfig(train="a.jsonl"), records[:30], records[30:], report, None), tokenizer)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["", SCRIPT], ids=["plain", "hostile"])
def found(request, chatml) -> Survey:
    return surveyed(chatml, request.param)


def test_nothing_in_it_can_act(found):
    html = page(found)
    read = report_tests.Page(html)
    assert not {"script", "img", "link", "iframe", "object", "form", "image"} & {tag for tag, _ in read.elements}
    for tag, attributes in read.elements:
        assert not any(name.startswith("on") for name in attributes), tag
        assert (attributes.get("href") or "#").startswith("#")
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policy = {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"}
    assert ("meta", policy) in read.elements
    assert "\x1b" not in html
    html.encode()


def test_it_says_every_fact_and_finding(found):
    text = report_tests.Page(page(found)).text
    facts = [fact for section in sections(found) for fact in section.facts]
    assert len(facts) > 30
    for fact in facts:
        for part in (fact.name, fact.value, fact.note):
            assert dataset_text(part) in text
    for one in dataset.findings(found):
        assert dataset_text(one.what) in text
        assert dataset_text(one.fix) in text
    for section in sections(found):
        for histogram in section.histograms:
            assert dataset_text(f"{histogram.lengths.bins[-1].count:,}") in text


def dataset_text(text: str) -> str:
    """As the page shows it."""
    return " ".join(re.sub("[\x00-\x08\x0b-\x1f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text).split())


def test_the_sample_marks_what_is_scored(chatml):
    found = surveyed(chatml)
    assert found.tokens is not None
    spans = re.findall(r'<span( class="scored")? title="(\d+)">', page(found))
    assert [(bool(scored), int(token)) for scored, token in spans] == [
        (token.scored, token.id) for token in found.tokens.sample
    ]


def test_it_can_be_read_by_everyone(found):
    html = page(found)
    read = report_tests.Page(html)
    assert html.count("<caption") == read.count("table") >= 8
    assert all(attributes.get("scope") for tag, attributes in read.elements if tag == "th")
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch("h[1-6]", tag)]
    assert (levels[0], levels.count(1)) == (1, 1)
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = [value for _, attributes in read.elements if (value := attributes.get("id"))]
    assert len(ids) == len(set(ids))
    named = {(attributes.get("href") or "")[1:] for tag, attributes in read.elements if tag == "a"}
    named |= {word for _, one in read.elements for word in (one.get("aria-labelledby") or "").split()}
    assert named == set(ids)
    assert ("html", {"lang": "en"}) in read.elements
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_both_pages_have_one_look():
    look = template("look.css.jinja").render()
    assert look in page(surveyed(None))
    assert '{% include "look.css.jinja" %}' in (Path(dataset.__file__).parent / "report.html.jinja").read_text()


def test_without_a_tokenizer_there_is_no_sample():
    html = page(surveyed(None))
    assert "One record as tokens" not in html
    assert "Tokens" not in html


def test_a_long_sample_keeps_its_ends():
    tokens = [Token(n, str(n), n >= 10) for n in range(30)]
    shown = excerpt(tokens, most=4)
    assert [token.id for token in shown] == [0, 1, GAP.id, 8, 9, 10, 11, GAP.id, 28, 29]
    assert [token.scored for token in shown] == [False] * 5 + [True] * 5
    assert excerpt(tokens, most=20) == tuple(tokens)


def test_it_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    found = surveyed(None)
    write(found, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page(found)
    with pytest.raises(DataError, match=r"expected '\.html'"):
        write(found, tmp_path / "page.txt")
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(DataError, match="No space left"):
        write(found, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes().decode() == page(found)
    assert [one.name for one in tmp_path.iterdir()] == ["page.html"]
