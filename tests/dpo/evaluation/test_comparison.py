"""What a comparison says of runs whose truth is known, because they are simulated."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from dpo.evaluation.achieved import Achieved
from dpo.evaluation.comparison import Asked, compare
from dpo.evaluation.judges import Judge, Question, Verdict
from dpo.evaluation.pairs import HeldOut, Pair
from dpo.evaluation.records import START, Comparison, Cost, Trained
from dpo.evaluation.samples import Answer, Spoken
from dpo.evaluation.titles import GOLD, KL, PROXY

PROMPTS = 48


def spoken(golds: Sequence[float], kl: float = 2.0, tokens: Sequence[int] | None = None) -> Spoken:
    lengths = [20] * len(golds) if tokens is None else tokens
    return Spoken(
        tuple(f"prompt {n}" for n in range(len(golds))),
        tuple(
            (Answer(f"answer {n} of {gold:.2f}", length, finished=True, log_ratio=kl, gold=float(gold)),)
            for n, (gold, length) in enumerate(zip(golds, lengths, strict=True))
        ),
    )


def trained(entry: str, seed: int, golds: Sequence[float], **more: object) -> Trained:
    kl = float(more.pop("kl", 2.0))  # pyright: ignore[reportArgumentType]
    settings = {
        "achieved": Achieved(spoken(golds, kl)),
        "cost": Cost(10.0, 2e9, 32, 512, 9000, None),
        "rows": [
            {"step": 8, "kind": "train", "train/loss": 0.6},
            {"step": 8, "kind": "eval", GOLD: 0.4, KL: 1.0},
            {"step": 16, "kind": "train", "train/loss": 0.5},
        ],
        "settings": {"objective.beta": 0.1, "optimiser.learning_rate": 1e-4, "objective.name": entry},
        **more,
    }
    return Trained(entry, seed, f"runs/{entry}-seed{seed}", **settings)  # pyright: ignore[reportArgumentType]


def asked(*entries: str, seeds: int = 1, start: Sequence[float] | None = None) -> Asked:
    at_start = Achieved() if start is None else Achieved(spoken(start, kl=0.0))
    return Asked("test", dict.fromkeys(entries, "a line"), tuple(range(seeds)), at_start, {"model": "none"})


def simulated(rng: np.random.Generator, shifts: Mapping[str, float], seeds: int) -> Comparison:
    """Runs whose gold reward is the prompt's own, plus a shift of the entry, plus noise of seed and of sampling."""
    prompts = rng.normal(0, 0.4, PROMPTS)
    runs = [
        trained(name, seed, np.clip(prompts + shift + rng.normal(0, 0.05) + rng.normal(0, 0.3, PROMPTS), -1, 1))
        for name, shift in shifts.items()
        for seed in range(seeds)
    ]
    start = np.clip(prompts + rng.normal(0, 0.3, PROMPTS), -1, 1)
    return compare(asked(*shifts, seeds=seeds, start=start), runs)


def between(found: Comparison) -> list[tuple[str, str, bool]]:
    return [(d.first, d.second, d.real) for d in found.differences if d.measure == GOLD and d.second != START]


@pytest.mark.slow
def test_an_objective_against_itself_under_other_seeds_is_no_real_difference() -> None:
    rng = np.random.default_rng(0)
    same = {"a": 0.0, "b": 0.0, "c": 0.0}
    clean = sum(not any(real for *_, real in between(simulated(rng, same, seeds=2))) for _ in range(20))
    assert clean >= 18


def test_an_effect_of_known_size_is_found_and_said() -> None:
    rng = np.random.default_rng(1)
    found = simulated(rng, {"weak": 0.0, "strong": 0.5, "twin": 0.5}, seeds=3)
    real = {(first, second): one for first, second, one in between(found)}
    assert real == {("weak", "strong"): True, ("weak", "twin"): True, ("strong", "twin"): False}
    assert (
        found.verdicts[0] == "strong and twin have the higher gold reward than weak; not told apart from one another."
    )
    assert any(line.startswith("strong raised gold reward (+0.") for line in found.verdicts)
    assert any(line.startswith("weak is not told apart from the start in gold reward (") for line in found.verdicts)
    assert found.primary == GOLD
    assert not found.partial


def test_two_entries_are_told_as_a_pair() -> None:
    rng = np.random.default_rng(1)
    found = simulated(rng, {"weak": 0.0, "strong": 0.5}, seeds=3)
    assert found.verdicts[0] == "strong has the higher gold reward than weak."
    assert any(line.startswith("strong is ahead of weak: weak minus strong is -0.") for line in found.verdicts)
    same = simulated(rng, {"one": 0.0, "other": 0.0}, seeds=3)
    assert same.verdicts[0].startswith("No entry is told apart from another in gold reward")
    assert any(line.startswith("one and other are not told apart: one minus other is ") for line in same.verdicts)


def test_the_table_is_that_of_the_runs() -> None:
    a, b = np.linspace(-0.5, 0.5, PROMPTS), np.linspace(-0.2, 0.8, PROMPTS)
    runs = [trained("a", 0, a), trained("a", 1, a + 0.1), trained("b", 0, b, kl=3.0), trained("b", 1, b)]
    found = compare(asked("a", "b", seeds=2, start=a - 0.1), runs)
    first, second = found.entries
    assert first.by_seed[GOLD] == {0: pytest.approx(0.0), 1: pytest.approx(0.1)}
    assert first.measures[GOLD].value == pytest.approx(0.05)
    assert second.measures[KL].value == pytest.approx(2.5)
    assert found.start.measures[GOLD].value == pytest.approx(-0.1)
    assert KL not in found.start.measures
    assert [(p.step, p.kl, p.reward) for p in first.frontier[0]] == [
        (0, 0.0, pytest.approx(-0.1)),
        (8, 1.0, 0.4),
        (16, 2.0, pytest.approx(0.0)),
    ]
    assert found.settings == {"objective.beta": 0.1, "optimiser.learning_rate": 1e-4}
    assert second.settings == {"objective.name": "b"}
    assert found.samples[0].answers.keys() == {START, "a", "b"}


def test_win_rates_count_prompts_and_mind_the_length() -> None:
    golds = np.zeros(PROMPTS)
    golds[: PROMPTS // 2] = 0.5
    found = compare(asked("a", "b", start=np.zeros(PROMPTS)), [trained("a", 0, golds), trained("b", 0, golds * 0)])
    (wins,) = found.wins
    assert wins.judge == "gold reward"
    rates = {(one.first, one.second): one for one in wins.rates}
    assert rates["a", START].plain.value == pytest.approx(0.75)  # half are won, half are ties
    assert rates["a", "b"].plain.value == pytest.approx(0.75)
    assert rates["b", START].plain.value == pytest.approx(0.5)
    assert rates["a", "b"].judged == PROMPTS
    assert wins.strengths["a"].value == pytest.approx(np.log(3), abs=1e-6)  # 3/4 against both, who are level
    assert next(iter(wins.strengths)) == "a"
    assert wins.position_bias is None


def scored(golds: Sequence[float], proxies: Sequence[float], by: str, before: Sequence[float] = ()) -> Achieved:
    """Return answers that a reward model of the identity `by` has scored."""
    said = spoken(golds)
    answers = tuple((replace(row[0], proxy=float(one)),) for row, one in zip(said.answers, proxies, strict=True))
    return Achieved(replace(said, answers=answers, proxy_by=by, reference_proxy=tuple(map(float, before))))


def test_one_reward_model_of_all_judges_the_answers() -> None:
    flat, half = np.zeros(PROMPTS), np.repeat([1.0, 0.0], PROMPTS // 2)
    of_all = replace(asked("a", "b"), start=scored(flat, flat, "one"))
    runs = [
        trained("a", 0, [], achieved=scored(flat, half, "one")),
        trained("b", 0, [], achieved=scored(flat, flat, "one")),
    ]
    found = compare(of_all, runs)
    assert [one.judge for one in found.wins] == ["gold reward", "reward model"]
    rates = {(one.first, one.second): one.plain.value for one in found.wins[1].rates}
    assert rates == {("a", START): 0.75, ("b", START): 0.5, ("a", "b"): 0.75}
    assert {(one.first, one.second) for one in found.differences if one.measure == PROXY} == {*rates}
    assert found.start.measures[PROXY].value == 0.0
    assert not found.own_proxies
    assert "reward model prefers a to b in 75% of its verdicts." in found.verdicts


@pytest.mark.parametrize("start", ["", "one"])
def test_reward_models_of_their_own_are_compared_in_nothing(start: str) -> None:
    rng = np.random.default_rng(0)
    flat, high, before = np.zeros(PROMPTS), rng.normal(5, 1, PROMPTS), rng.normal(0, 1, PROMPTS)
    own = {"b": "two" if start else "one"}  # one model for both, and none for the start, is no common one either
    runs = [
        trained(name, seed, [], achieved=scored(flat, high, own.get(name, "one"), before))
        for name in "ab"
        for seed in (0, 1)
    ]
    at_start = scored(flat, flat, start) if start else Achieved(spoken(flat, kl=0.0))
    found = compare(replace(asked("a", "b", seeds=2), start=at_start), runs)
    assert found.own_proxies
    (measure,) = [one for one in found.measures if one.name == PROXY]
    assert (measure.title, measure.unit, measure.better) == ("own reward model", "own scale", None)
    assert found.entries[0].measures[PROXY].value == pytest.approx(high.mean())
    assert PROXY not in found.start.measures
    assert [one for one in found.differences if one.measure == PROXY] == []
    assert [one.judge for one in found.wins] == ["gold reward"]
    assert any(line.startswith("Each entry's reward model is its own") for line in found.warnings)
    gained = high.mean() - before.mean()
    assert any(
        line.startswith(f"a may be over-optimised: it raised its reward model's score ({gained:+.2f}, by itself ")
        for line in found.verdicts
    )


def test_the_path_has_the_reward_models_score_beside_the_gold_reward() -> None:
    flat = np.zeros(4)
    rows = [{"step": 8, "kind": "eval", GOLD: 0.4, KL: 1.0, PROXY: 2.5}, {"step": 16, "kind": "train"}]
    start = Achieved(spoken(flat, kl=0.0))
    for before, first in (((), None), (flat - 1, -1.0)):
        one = trained("a", 0, [], achieved=scored(flat, flat + 3, "one", before), rows=rows)
        found = compare(replace(asked("a"), start=start), [one])
        assert [point.proxy for point in found.entries[0].frontier[0]] == [first, 2.5, 3.0]


def test_two_prompts_that_agree_are_no_proof() -> None:
    runs = [trained("a", 0, [0.0, 0.0]), trained("b", 0, [1.0, 1.0])]
    (one,) = [d for d in compare(asked("a", "b"), runs).differences if d.measure == GOLD]
    assert one.p == 0.5
    assert not one.real


def test_what_is_not_finite_is_missing() -> None:
    golds = [float("inf"), *np.linspace(0, 0.5, PROMPTS - 1)]
    found = compare(asked("a", "b"), [trained("a", 0, np.zeros(PROMPTS)), trained("b", 0, golds)])
    (one,) = [d for d in found.differences if d.measure == GOLD]
    assert one.value.n == PROMPTS - 1
    assert any("gold reward: 1 prompts were measured in some entries only" in line for line in found.warnings)


class Silent(Judge):
    """Times out on everything."""

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        return [Verdict(None, "timed out") for _ in questions]


def test_a_judge_that_says_nothing_makes_the_comparison_partial() -> None:
    runs = [trained("a", 0, np.zeros(PROMPTS)), trained("b", 0, np.ones(PROMPTS))]
    found = compare(asked("a", "b"), runs, [Silent("silent")])
    assert found.partial
    assert any(f"no verdict on {PROMPTS} questions" in line for line in found.warnings)


class FirstShown(Judge):
    """Prefers whatever it is shown first."""

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        return [Verdict(0.5, "both orders disagree", (1.0, 0.0)) for _ in questions]


def test_a_judge_that_favours_a_place_is_warned_of() -> None:
    runs = [trained("a", 0, np.zeros(PROMPTS)), trained("b", 0, np.ones(PROMPTS))]
    found = compare(asked("a", "b"), runs, [FirstShown("fickle")])
    assert found.wins[1].position_bias is not None
    assert any(line.startswith("fickle favours a place: 100% of its votes") for line in found.warnings)


def test_one_prompt_that_an_entry_lacks_is_left_out_for_all() -> None:
    short = trained("b", 0, np.full(PROMPTS - 1, 0.5))
    found = compare(asked("a", "b"), [trained("a", 0, np.zeros(PROMPTS)), short])
    (one,) = [d for d in found.differences if d.measure == GOLD]
    assert one.value.n == PROMPTS - 1


def test_what_is_missing_is_said() -> None:
    found = compare(asked("a", "b", seeds=2), [trained("a", 0, np.zeros(PROMPTS)), trained("a", 1, np.ones(PROMPTS))])
    assert found.partial
    assert any("these runs are missing: b, seed 0; b, seed 1" in line for line in found.warnings)
    assert found.entries[1].measures == {}
    nothing = compare(asked("a"), [])
    assert nothing.partial
    assert nothing.measures == ()
    assert nothing.verdicts == (
        "Nothing is said on which is better: there is neither a gold reward nor a held-out pair.",
    )


def test_warnings_tell_what_an_interval_leaves_out() -> None:
    runs = [trained("a", 0, np.zeros(8)), trained("b", 0, np.ones(8) * 0.9)]
    found = compare(asked("a", "b"), runs)
    assert any(line.startswith("One seed: intervals cover the prompts only") for line in found.warnings)
    assert any(line.startswith("Few prompts: gold reward rests on 8") for line in found.warnings)
    two = [trained(name, seed, np.zeros(PROMPTS)) for name in "ab" for seed in (0, 1)]
    (only,) = compare(asked("a", "b", seeds=2, start=np.zeros(PROMPTS)), two).warnings
    assert only.startswith("Few seeds: 2 of each entry tell little")
    three = [trained(name, seed, np.zeros(PROMPTS)) for name in "ab" for seed in (0, 1, 2)]
    assert compare(asked("a", "b", seeds=3, start=np.zeros(PROMPTS)), three).warnings == ()


def test_without_a_gold_reward_the_verdict_rests_on_pairs() -> None:
    def held(accuracy: float) -> Achieved:
        right = int(accuracy * PROMPTS)
        pairs = [Pair(f"prompt {n}", f"file:{n}", 1.0 if n < right else -1.0, 0.0) for n in range(PROMPTS)]
        return Achieved(held_out=HeldOut(tuple(pairs)))

    runs = [trained("a", 0, [], achieved=held(0.9)), trained("b", 0, [], achieved=held(0.4))]
    found = compare(asked("a", "b"), runs)
    assert found.primary == "eval/pair/accuracy"
    assert found.verdicts[0] == "a has the higher pair accuracy than b."
    assert any(line.startswith("No gold reward was given") for line in found.warnings)
    assert found.wins == ()
    assert found.samples == ()


def test_pairs_of_one_prompt_are_one_unit() -> None:
    pairs = [Pair("same", f"file:{n}", float(n), 1.5) for n in range(4)] + [Pair("other", "file:9", 1.0, 0.0)]
    by_prompt = HeldOut(tuple(pairs)).by_prompt()
    assert by_prompt["eval/pair/accuracy"] == {"same": 0.5, "other": 1.0}
    assert by_prompt["eval/pair/margin"] == {"same": 0.0, "other": 1.0}
    assert HeldOut(tuple(pairs)).estimates()["eval/pair/accuracy"].n == 2


def test_each_group_is_measured_on_its_own_prompts_and_pairs() -> None:
    def one(entry: str, young: float, old: float) -> Trained:
        golds = [young, young + 0.2, old, old + 0.2]
        said = replace(spoken(golds), of_group=("young", "young", "old", None))
        pairs = HeldOut((Pair("p", "f:1", 1.0, 0.0, "old"), Pair("q", "f:2", 0.0, 1.0, "young")))
        return trained(entry, 0, golds, achieved=Achieved(said, pairs))

    start = Achieved(replace(spoken([0, 0, 0, 0], kl=0.0), of_group=("young", "young", "old", None)))
    whole = replace(asked("a", "b"), start=start)
    found = compare(whole, [one("a", 0.5, -0.5), one("b", 0.1, 0.3)]).groups
    assert list(found) == ["old", "young"]
    assert {name: own[GOLD].value for name, own in found["young"].items()} == pytest.approx(
        {START: 0.0, "a": 0.6, "b": 0.2}
    )
    assert {name: own[GOLD].value for name, own in found["old"].items()} == pytest.approx(
        {START: 0, "a": -0.5, "b": 0.3}
    )
    assert found["old"]["a"]["eval/pair/accuracy"].value == 1.0
    assert found["young"]["a"]["eval/pair/accuracy"].value == 0.0
    assert compare(asked("a"), [trained("a", 0, [0.0, 1.0])]).groups == {}
