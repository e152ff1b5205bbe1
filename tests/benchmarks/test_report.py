"""Ratios are taken round by round, and the tables say what was measured."""

from dataclasses import replace

import pytest

from benchmarks.report import (
    Machine,
    Quartiles,
    Result,
    document,
    markdown,
    ratios,
    step_table,
    tokens_per_second,
    utilisation,
)

MIB = 2**20
OURS = Result(
    variant="ours",
    seconds=(1.0, 10.0, 3.0),
    tokens=(100, 200, 600),
    loss=0.6931,
    parameters=1000,
    rows=13,
    examples=12,
    prepare_seconds=0.5,
    prepare_bytes=3 * MIB,
    step_bytes=100 * MIB,
)
OTHER = replace(OURS, variant="other", seconds=(2.0, 40.0, 4.0), step_bytes=400 * MIB)
MACHINE = Machine(processor="Acme (R) 3000 @ 2 GHz", cores=2, memory_gib=23.5, gpu=None)


def test_a_ratio_is_of_the_same_round_so_that_a_slow_round_cancels():
    # rounds 1/2, 10/40, 3/4; the ratio of the medians would be 3/4
    assert ratios(OURS, OTHER) == Quartiles(low=0.375, middle=0.5, high=0.625)


def test_ratios_of_unequal_rounds_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        ratios(OURS, replace(OTHER, seconds=(1.0,)))


@pytest.mark.parametrize(
    ("values", "expected"),
    [([7.0], Quartiles(7.0, 7.0, 7.0)), ([1.0, 2.0, 3.0, 4.0, 5.0], Quartiles(2.0, 3.0, 4.0))],
)
def test_quartiles(values: list[float], expected: Quartiles):
    assert Quartiles.of(values) == expected


def test_tokens_per_second_belong_to_their_round():
    assert tokens_per_second(OURS) == 100  # 100/1, 200/10, 600/3: median 100, not 200 tokens / 3 s


def test_utilisation_counts_six_operations_a_parameter_and_token():
    # 100 tokens/s x 6 x 1000 parameters = 6e5 operations a second, of 1.2e6
    assert utilisation(OURS, peak_tflops=1.2e-6) == pytest.approx(0.5)


def test_the_table_compares_with_the_first_variant():
    heading, first, second = step_table([OURS, OTHER])
    assert [name for name in heading if name.startswith("ours")] == ["ours / it", "ours / it, MiB"]
    assert first[:4] == ["ours", "3 [2, 6.5]", "1", "100"]
    assert second[2] == "0.5 [0.375, 0.625]"
    assert list(second[4:]) == ["3", "400", "0.25", "0.693"]


def test_utilisation_is_a_column_where_the_peak_is_known():
    heading, first = step_table([OURS], peak_tflops=1.2e-6)
    assert (heading[-1], first[-1]) == ("FLOP utilisation", "50.0%")
    assert len(step_table([OURS])[0]) == len(heading) - 1


def test_markdown_aligns_the_first_column_left_and_the_others_right():
    assert markdown([["name", "value"], ["a", "12345678"], ["longer", "1"]]).splitlines() == [
        "| name   |    value |",
        "| ------ | -------: |",
        "| a      | 12345678 |",
        "| longer |        1 |",
    ]


def test_the_document_holds_machine_command_and_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    text = document("Title", MACHINE, "python -m benchmarks.step", ["## hh", "## k4"])
    assert "Acme (R) 3000 @ 2 GHz, 2 cores, 24 GiB" in text
    assert "the GPU rows are missing" in text
    assert "the GPU rows are missing" not in document("Title", replace(MACHINE, gpu="Acme G1"), "", [])
    assert "`python -m benchmarks.step`" in text
    assert "torch 2." in text
    assert "'MALLOC_ARENA_MAX': '2'" in text  # an allocator that gives memory back earlier changes the peaks
    assert text.endswith("## hh\n\n## k4\n")


def test_the_file_is_named_by_the_device_that_did_the_work():
    assert MACHINE.slug == "acme-r-3000-2-ghz"
    assert replace(MACHINE, gpu="Acme G1 80GB").slug == "acme-g1-80gb"
