"""What a group achieved is what its own pairs and prompts say."""

from dpo.evaluation.achieved import Achieved
from dpo.evaluation.pairs import HeldOut, Pair
from dpo.evaluation.samples import Answer, Spoken

PAIRS = (
    Pair("p", "f:1", 2.0, 1.0, "young"),
    Pair("q", "f:2", 0.0, 1.0, "young"),
    Pair("r", "f:3", 5.0, 1.0, "old"),
    Pair("s", "f:4", 0.0, 1.0),
)


def answer(gold: float) -> tuple[Answer, ...]:
    return (Answer("text", 3, finished=True, log_ratio=0.5, gold=gold),)


def test_each_measure_is_that_of_the_group_alone():
    spoken = Spoken(("p", "q", "r"), (answer(1.0), answer(3.0), answer(9.0)), ("old", "old", None))
    groups = Achieved(spoken=spoken, held_out=HeldOut(PAIRS)).groups()
    found = {name: one.estimates() for name, one in groups.items()}
    assert list(found) == ["old", "young"]
    assert found["young"]["eval/pair/accuracy"].value == 0.5
    assert found["young"]["eval/pair/accuracy"].n == 2
    assert found["old"]["eval/pair/margin"].value == 4.0
    assert found["old"]["eval/gold_reward"].value == 2.0
    assert "eval/gold_reward" not in found["young"]


def test_without_groups_there_is_nothing_apart():
    assert Achieved(held_out=HeldOut(PAIRS[3:])).groups() == {}
    assert Achieved().groups() == {}


def test_groups_survive_the_disk(tmp_path):
    HeldOut(PAIRS).write(tmp_path / "pairs.jsonl")
    assert HeldOut.read(tmp_path / "pairs.jsonl") == HeldOut(PAIRS)
