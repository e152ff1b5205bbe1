"""The report says all that a comparison holds, to everyone, and nothing in it can act."""

import csv
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from dpo.errors import CheckpointError
from dpo.estimates import Estimate
from dpo.evaluation.records import Comparison
from dpo.evaluation.report import DIFFERENCES_FILE, PAGE_FILE, RESULTS_FILE, TABLE_FILE, write
from dpo.evaluation.report import text as texts
from dpo.evaluation.report.looks import VARIABLES, looks
from dpo.evaluation.report.page import page
from dpo.evaluation.report.plots import learning, optimised
from dpo.evaluation.report.tables import gaps, matrix, measure_rows

_spec = spec_from_file_location("comparison_example", Path(__file__).with_name("example.py"))
assert _spec is not None
assert _spec.loader is not None
example = module_from_spec(_spec)
_spec.loader.exec_module(example)

VOID = {"meta", "link", "br", "hr", "img", "input", "area", "base", "col", "embed", "source", "wbr"}
SCRIPT = "<script>alert(1)</script>&\"'"
HOSTILE = (SCRIPT, "$x^2$ \\frac{", "\N{GRINNING FACE} \u0639\u0631\u0628\u064a", "n" * 5000, "\ud83d\x00\u202e")
LONG = "ab <img src=x onerror=alert(1)> & " * 160


class Page(HTMLParser):
    """Read a page strictly: every element is closed in its turn."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"<{tag}> has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[Comparison, Path]:
    folder = tmp_path_factory.mktemp("full") / "report"
    comparison = example.comparison(names=("dpo", "kto", "reward_ppo"))
    write(comparison, folder)
    return comparison, folder


@pytest.fixture(scope="module")
def html(full) -> str:
    return (full[1] / PAGE_FILE).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def small() -> Comparison:
    """One seed, no gold reward, no judge, one measure without interval; nothing was recorded while training."""
    made = example.comparison(names=("dpo",), seeds=1, gold=False, wins=False)
    only = replace(made.entries[0], rows={}, measures={example.KL: Estimate(3.25, 3.25, 3.25, 1)})
    return replace(made, entries=(only,), differences=(), samples=(), verdicts=())


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("hostile")
    made = example.comparison(
        names=HOSTILE,
        seeds=2,
        failed={SCRIPT: {1: LONG}},
        prompts=(LONG, SCRIPT),
        answer=LONG,
        title=SCRIPT,
        groups=(SCRIPT, LONG),
    )
    texts = {"facts": {SCRIPT: SCRIPT}, "verdicts": (SCRIPT,), "warnings": (SCRIPT,), "settings": {SCRIPT: {LONG: 1}}}
    measures = tuple(replace(one, title=SCRIPT, unit=SCRIPT, text=SCRIPT) for one in made.measures)
    wins = tuple(replace(one, judge=SCRIPT) for one in made.wins)
    bad = replace(made.entries[0], summary=SCRIPT, settings={SCRIPT: SCRIPT}, folders={0: SCRIPT})
    write(replace(made, measures=measures, wins=wins, entries=(bad, *made.entries[1:]), **texts), folder)
    csv_rows = list(csv.DictReader((folder / TABLE_FILE).read_text(encoding="utf-8").splitlines()))
    assert SCRIPT in {row["entry"] for row in csv_rows}
    return (folder / PAGE_FILE).read_text(encoding="utf-8")


def luminance(colour: str) -> float:
    channels = (int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def mixed(one: str, other: str, part: float) -> str:
    pairs = ((int(one[n : n + 2], 16), int(other[n : n + 2], 16)) for n in (1, 3, 5))
    return "#" + "".join(f"{round(part * a + (1 - part) * b):02x}" for a, b in pairs)


def proxy_charts(source: str) -> list[str]:
    section = source.partition('<h2 id="proxy">')[2].partition("</section>")[0]
    return re.findall(r"<figcaption><b>(.*?)</b>", section)


class TestStructure:
    @pytest.mark.parametrize("kind", ["html", "hostile"])
    def test_a_page_is_balanced_and_asks_for_nothing(self, kind, request):
        source = request.getfixturevalue(kind)
        found = Page(source)
        assert not {"script", "img", "link", "iframe", "object", "form", "image", "a:href"} & {
            tag for tag, _ in found.elements
        }
        for tag, attributes in found.elements:
            assert not any(name.startswith("on") for name in attributes), tag
            for name in ("href", "src", "action", "xlink:href"):
                assert (attributes.get(name) or "#").startswith("#")
            assert all("url(" not in (value or "").replace("url(#", "") for value in attributes.values()), tag
        style = source[source.index("<style>") : source.index("</style>")]
        assert "url(" not in style
        assert "@import" not in style
        assert source.count("default-src &#39;none&#39;") + source.count("default-src 'none'") == 1

    @pytest.mark.parametrize("kind", ["html", "hostile"])
    def test_ids_are_unique_and_links_lead_somewhere(self, kind, request):
        found = Page(request.getfixturevalue(kind))
        ids = Counter(value for _, attributes in found.elements if (value := attributes.get("id")))
        assert set(ids.values()) == {1}
        named = [attributes.get("href") or "" for _, attributes in found.elements if attributes.get("href")]
        named += [f"#{word}" for _, one in found.elements for word in (one.get("aria-labelledby") or "").split()]
        used = re.findall(r"url\(#([^)]+)\)", request.getfixturevalue(kind))
        assert len(used) > 10
        assert {name[1:] for name in named} | set(used) <= set(ids)

    def test_it_can_be_read_by_everyone(self, html):
        found = Page(html)
        assert len(re.findall(r"<table[^>]*>\s*<caption><span>\S", html)) == found.count("table") > 5
        assert all(attributes.get("scope") for tag, attributes in found.elements if tag == "th")
        levels = [int(tag[1]) for tag, _ in found.elements if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
        assert found.count("figure") == found.count("figcaption") > 5
        for tag, attributes in found.elements:
            if tag == "svg":
                assert attributes.get("aria-hidden") == "true" or attributes.get("aria-label")
        assert ("html", {"lang": "en"}) in found.elements
        assert any(attributes.get("name") == "viewport" for tag, attributes in found.elements if tag == "meta")

    def test_colours_have_contrast_in_both_themes(self, html):
        light, dark = re.findall(r":root \{(.*?)\n *\}", html, re.DOTALL)[:2]
        for theme in (light, dark):
            colours = dict(re.findall(r"(--[a-z0-9-]+): (#[0-9a-f]{6})", theme))
            paper = colours["--paper"]
            for name in ("--ink", "--muted", "--link"):
                assert contrast(colours[name], paper) >= 4.5
            assert contrast(colours["--warn"], colours["--warn-paper"]) >= 4.5
            shades = (int(part) for part in re.findall(r"--part: (\d+)", html))
            assert contrast(colours["--muted"], mixed(colours["--series-0"], paper, max(shades) / 100)) >= 4.5
            series = [value for name, value in colours.items() if name.startswith("--series")]
            assert len(series) == 6
            assert all(contrast(one, paper) >= 3 for one in series)
        assert {name: value for value, name in VARIABLES.items()}.items() <= dict(
            re.findall(r"(--[a-z0-9-]+): (#[0-9a-f]{6})", light)
        ).items()

    def test_figures_have_no_colour_of_their_own(self, html):
        for figure in re.findall(r'<svg class="plot".*?</svg>', html, re.DOTALL):
            assert not re.search(r"#[0-9a-f]{6}\b(?!-)", figure)
            assert "font-family" not in figure

    def test_lines_differ_in_more_than_colour(self, html):
        swatches = re.findall(r'<svg class="swatch".*?</svg>', html, re.DOTALL)
        entries = [one for one in swatches if "<circle" not in one]
        assert len(entries) < len(swatches)  # the start is a ring
        for part in ('dasharray="([^"]*)"', '<path d="([^"]+)" stroke="none"'):
            assert len({re.findall(part, one)[0] for one in entries}) == 3


class TestContent:
    def test_all_is_said_in_order(self, full, html):
        comparison, _ = full
        text = Page(html).text
        places = [
            text.index(part)
            for part in (
                comparison.title,
                "SmolLM2-135M-Instruct",
                comparison.verdicts[0],
                comparison.warnings[0],
                "All entries in all measures",
                "Differences in Gold reward",
                "What each step away from the reference buys",
                "By examples",
                "Training, all stages",
                "prefers the row to the column",
                "Answers to the same prompts",
                "Shared by all runs",
                comparison.measures[0].text,
            )
        ]
        assert places == sorted(places)
        assert "Partial" not in text
        assert "One seed:" not in text
        for one in (*comparison.verdicts, *comparison.warnings, *(measure.text for measure in comparison.measures)):
            assert one in text
        for one in comparison.samples:
            assert one.prompt in text
            assert all(answer in text for answer in one.answers.values())

    def test_groups_have_tables_of_their_own(self, html):
        assert "By group" not in Page(html).text
        found = example.comparison(names=("dpo", "ipo"), groups=("experts", "<b>crowd</b>"))
        only_accuracy = {
            name: {example.ACCURACY: own[example.ACCURACY]} for name, own in found.groups["experts"].items()
        }
        text = Page(page(replace(found, groups={**found.groups, "experts": only_accuracy}))).text
        text = text.partition("By group")[2].partition("Differences")[0]
        assert "Measures of the group experts" in text
        assert "Measures of the group <b>crowd</b>" in text
        experts = text.partition("Group <b>crowd</b>")[0]
        assert "Accuracy" in experts
        assert "Gold reward" not in experts

    def test_the_frontier_is_drawn_for_wide_and_narrow_screens(self, html):
        widths = re.findall(r'<div class="(wide|narrow)"><svg class="plot" viewBox="0 0 (\d+)', html)
        assert [kind for kind, _ in widths] == ["wide", "narrow"]
        assert int(widths[1][1]) <= 340 < int(widths[0][1])

    def test_gold_and_proxy_are_drawn_side_by_side(self, html, tmp_path):
        assert "Gold against proxy" not in Page(html).text
        made = example.comparison(names=("dpo", "ipo", "reward_ppo"), proxies="one")
        write(made, tmp_path)
        source = (tmp_path / PAGE_FILE).read_text(encoding="utf-8")
        text = Page(source).text
        assert (
            text.index("What each step away")
            < text.index("the proxy is what a reward model says")
            < text.index("By exam")
        )
        assert proxy_charts(source) == ["Gold: the true reward", "Proxy: the reward model"]
        assert "scale of its own" not in text
        plain = json.loads((tmp_path / RESULTS_FILE).read_text())
        assert plain["entries"][0]["frontier"]["0"][-1]["proxy"] == made.entries[0].frontier[0][-1].proxy > 0
        drawn = {one.name: one for one in optimised(made, looks(made), "proxy")}
        assert drawn["dpo"].mean.y[-1] == pytest.approx(
            sum(points[-1].proxy for points in made.entries[0].frontier.values()) / 3
        )

    def test_reward_models_of_their_own_share_no_chart(self):
        made = example.comparison(names=("dpo", "ipo", "reward_ppo"), proxies="own", wins=False)
        source = page(made)
        own = [f"Proxy of {name}: its own reward model" for name in ("ipo", "reward_ppo")]
        assert proxy_charts(source) == ["Gold: the true reward", *own]
        text = Page(source).text.replace(" .", ".")
        assert "Each reward model has a scale of its own" in text
        assert "Not recorded: dpo." in text.partition("Gold: the true reward")[2].partition("Learning curves")[0]
        figures = re.findall(r'<svg class="plot"[^>]*aria-label="Proxy of.*?</svg>', source, re.DOTALL)
        assert [("ipo<" in one, "reward_ppo<" in one) for one in figures] == [(True, False), (False, True)]

    def test_a_path_without_its_start_has_no_ring(self):
        made = example.comparison(names=("dpo",), seeds=1, wins=False)
        later = replace(made.entries[0], frontier={0: made.entries[0].frontier[0][1:]})
        assert [">start</text>" in page(one) for one in (made, replace(made, entries=(later,)))] == [True, False]

    def test_a_measure_that_an_entry_lacks_is_said(self, full, html):
        by_name = {row.entry.name: row.cells for row in measure_rows(full[0])}
        assert [cell is None for cell in by_name["reward_ppo"]] == [False, False, True, False, False]
        assert "not measured" in html
        assert "Not recorded: reward_ppo." in Page(html).text.replace(" .", ".")

    def test_cells_hold_sensible_digits_and_what_is_real(self, full):
        cells = {row.entry.name: row.cells for row in measure_rows(full[0])}
        gold, kl, *_, perplexity = cells["dpo"]
        assert (gold.value, gold.half, gold.mark) == ("0.71", "± 0.04", "▲")
        assert (kl.value, kl.mark) == ("9.8", "◆")
        assert (perplexity.value, perplexity.mark) == ("3.12", "")
        assert {cell.mark for cell in cells["start"]} == {""}

    def test_differences_say_their_direction_in_words(self, full):
        primary, *others = gaps(full[0])
        assert primary.measure.name == example.GOLD
        verdicts = {(row.first, row.second): row.verdict for row in (*primary.against_start, *primary.between)}
        assert verdicts["dpo", "start"] == "real, better"
        assert verdicts["reward_ppo", "dpo"] == "real, worse"
        assert verdicts["kto", "dpo"] == "not told apart"
        assert others[0].against_start[0].verdict == "real, higher"
        for row in primary.between:
            assert 0 <= row.left <= row.middle <= row.right <= 100

    def test_fewer_is_better_where_the_measure_says_so(self, full):
        less = {one.measure.name: one for one in gaps(full[0])}["eval/perplexity"]
        rows = {(row.first, row.second): row for row in less.against_start}
        assert rows["reward_ppo", "start"].value == "+0.05"
        assert rows["reward_ppo", "start"].verdict == "real, worse"

    def test_each_direction_of_a_win_rate_is_one_minus_the_other(self, full):
        made = matrix(full[0].wins[0], full[0])
        cells = {(row, column): cell for row, own in made.rows for column, cell in zip(made.names, own, strict=True)}
        assert cells["dpo", "start"].plain == "56 ± 5"
        assert cells["start", "dpo"].plain == "44 ± 5"
        assert cells["start", "dpo"].controlled == "47 ± 6"
        assert cells["dpo", "dpo"] is None

    def test_curves_join_the_ledger_and_the_frontier(self, full):
        comparison, _ = full
        known = looks(comparison)
        drawn = {one.name: one for one in learning(comparison, known, example.KL, "train/examples_seen")}
        assert set(drawn) == {"dpo", "kto", "reward_ppo"}
        assert drawn["dpo"].mean.x == (0.0, 192.0, 384.0, 576.0, 768.0)
        assert drawn["dpo"].mean.y[-1] == pytest.approx(
            sum(points[-1].kl for points in comparison.entries[0].frontier.values()) / 3
        )
        assert len(drawn["dpo"].runs) == 3
        assert [one.name for one in learning(comparison, known, example.ACCURACY, "time/seconds")] == ["dpo", "kto"]
        assert learning(comparison, known, "eval/win_rate", "time/seconds") == []


class TestMissing:
    def test_what_is_not_there_is_said(self, small):
        text = Page(page(small)).text
        for part in (
            "No verdict: no difference could be tested.",
            "the intervals cover the models that were trained",
            "3.25 no interval",
            "not measured",
            "No differences: nothing was measured on two entries.",
            "Not drawn: it needs a gold reward",
            "Not drawn: no run was evaluated while it trained.",
            "None: no judge compared the answers.",
            "None were kept.",
            "no GPU",
        ):
            assert part in text

    def test_a_partial_comparison_says_so_before_its_verdict(self, hostile):
        text = Page(hostile).text
        assert text.index("Partial result") < text.index("Verdict")
        assert "seed 1 , failed" in text.replace("seed 1,", "seed 1 ,")
        assert "1 of 2 seeds, 1 failed" in text
        assert "verdicts of the judges are missing" in text

    def test_an_entry_without_a_finished_run(self, small):
        failed = replace(small.entries[0], seeds=(), failed={0: "the loss is nan"}, measures={}, cost=None)
        text = Page(page(replace(small, entries=(failed,), partial=True))).text
        assert "0 of 1 seed, 1 failed" in text
        assert "the loss is nan" in text
        assert "not known: no run finished" in text

    def test_numbers_that_are_not_finite(self, small, tmp_path):
        broken = Estimate(float("nan"), float("-inf"), float("inf"), 5)
        bad = replace(small.entries[0], measures={example.KL: broken})
        write(replace(small, entries=(bad,)), tmp_path)
        assert "not finite no interval" in Page((tmp_path / PAGE_FILE).read_text(encoding="utf-8")).text
        plain = json.loads((tmp_path / RESULTS_FILE).read_text(), parse_constant=pytest.fail)
        assert plain["entries"][0]["measures"][example.KL] == {"value": "nan", "low": "-inf", "high": "inf", "n": 5}


class TestHostile:
    def test_markup_is_shown_and_not_obeyed(self, hostile):
        found = Page(hostile)
        assert found.text.count(SCRIPT) > 10
        assert LONG.strip() in found.text
        assert "<script" not in hostile
        assert "<img" not in hostile

    def test_names_in_figures_are_text(self, hostile):
        figures = re.findall(r'<svg class="plot".*?</svg>', hostile, re.DOTALL)
        drawn = re.sub(r'aria-label="[^"]*"', "", " ".join(figures))
        assert "&lt;script&gt;" in drawn
        assert "$x^2$" in drawn  # no formula
        assert "\N{GRINNING FACE}" in drawn
        assert "n" * 11 + "…" in drawn
        assert "n" * 12 not in drawn

    def test_what_no_page_can_hold_is_replaced(self, hostile):
        assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]", hostile)
        assert "\N{REPLACEMENT CHARACTER}" in hostile


class TestFiles:
    def test_equal_input_gives_equal_bytes(self, full, tmp_path):
        write(example.comparison(names=("dpo", "kto", "reward_ppo")), tmp_path)
        for name in (PAGE_FILE, RESULTS_FILE, TABLE_FILE, DIFFERENCES_FILE):
            assert (tmp_path / name).read_bytes() == (full[1] / name).read_bytes()
        assert len(list(tmp_path.iterdir())) == 4

    def test_json_holds_the_whole_comparison(self, full):
        comparison, folder = full
        text = (folder / RESULTS_FILE).read_text(encoding="utf-8")
        json.loads(text, parse_constant=pytest.fail)
        assert TypeAdapter(Comparison).validate_json(text) == comparison

    def test_csv_holds_every_measure_in_full(self, full):
        comparison, folder = full
        rows = list(csv.DictReader((folder / TABLE_FILE).read_text(encoding="utf-8").splitlines()))
        everyone = (comparison.start, *comparison.entries)
        assert len(rows) == sum(len(one.measures) for one in everyone)
        for row in rows:
            entry = next(one for one in everyone if one.name == row["entry"])
            numbers = Estimate(float(row["value"]), float(row["low"]), float(row["high"]), int(row["n"]))
            assert numbers == entry.measures[row["measure"]]
            assert int(row["seeds"]) == len(entry.seeds)
            assert row["unit"] == next(one.unit for one in comparison.measures if one.name == row["measure"])

    def test_csv_holds_every_difference(self, full):
        comparison, folder = full
        rows = list(csv.DictReader((folder / DIFFERENCES_FILE).read_text(encoding="utf-8").splitlines()))
        assert len(rows) == len(comparison.differences)
        for row, one in zip(rows, comparison.differences, strict=True):
            assert (row["measure"], row["first"], row["second"]) == (one.measure, one.first, one.second)
            assert (float(row["difference"]), float(row["p_adjusted"])) == (one.value.value, one.p_adjusted)
            assert row["real"] == str(one.real)

    def test_a_folder_that_cannot_be_made(self, small, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(CheckpointError, match="cannot make the report's folder"):
            write(small, tmp_path / "file" / "report")


class TestText:
    @pytest.mark.parametrize(
        ("halves", "expected"), [([0.034], 2), ([0.13, 3.0], 2), ([2.5], 0), ([0.0021, 0.4], 3), ([350.0], 0)]
    )
    def test_decimals_follow_the_narrowest_interval(self, halves, expected):
        assert texts.decimals(Estimate(1.0, 1.0 - half, 1.0 + half, 9) for half in halves) == expected

    @pytest.mark.parametrize(("value", "expected"), [(0.84999999, 3), (21.34, 1), (1e-5, 7), (12345.0, 0), (0.0, 0)])
    def test_without_intervals_three_digits(self, value, expected):
        assert texts.decimals([Estimate(value, value, value, 1)]) == expected

    @pytest.mark.parametrize(
        ("value", "places", "signed", "expected"),
        [
            (0.84999999, 2, False, "0.85"),
            (-0.5, 1, False, "−0.5"),
            (-0.001, 2, True, "0.00"),
            (0.5, 1, True, "+0.5"),
            (151204.0, 0, False, "151,204"),
            (float("nan"), 2, False, "not finite"),
        ],
    )
    def test_numbers(self, value, places, signed, expected):
        assert texts.number(value, places, signed) == expected

    @pytest.mark.parametrize(
        ("seconds", "expected"),
        [(3.21, "3.2 s"), (59.7, "60 s"), (395.2, "6 min 35 s"), (3599.9, "1 h 00 min"), (7260.0, "2 h 01 min")],
    )
    def test_durations(self, seconds, expected):
        assert texts.duration(seconds) == expected

    @pytest.mark.parametrize(
        ("p", "expected"), [(0.0002, "< 0.001"), (0.0124, "0.012"), (0.4142, "0.41"), (1.0, "1.00")]
    )
    def test_chances(self, p, expected):
        assert texts.chance(p) == expected

    def test_shortening_keeps_what_fits(self):
        assert texts.shorten("a  b\nc", 5) == "a b c"
        assert texts.shorten("abcdef", 5) == "abcd…"
        assert texts.shorten(" " * 30 + "tail", 5) == "…"
