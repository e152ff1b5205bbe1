"""The reproductions show the orderings that they claim, at the smallest size; a table and a figure come out."""

import runpy
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from dpo.losses.dpo import DPO
from dpo.losses.dponorm import DPONorm
from dpo.losses.rdpo import RDPO
from dpo.losses.simpo import SimPO
from dpo.recipes import names
from dpo.recipes.reproductions import r1_frontier, r2_bandit, r4_imbalance, r5_length
from dpo.recipes.reproductions.report import Report, interval, main
from dpo.recipes.reproductions.tabular import column, solve

FOLDER = Path(__file__).parents[2] / "recipes" / "reproductions"


def check(report: Report, folder: Path, rows: int) -> None:
    """A table of that many rows, each as wide as its header, and the same valid SVG each time it is written."""
    lines = report.text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == rows + 2
    assert {line.count("|") for line in table} == {len(report.header) + 1}
    assert "seeds" in report.protocol
    assert "95 %" in report.protocol
    for name in ("first.svg", "second.svg"):
        report.save(folder / "figures" / name)
    drawn = (folder / "figures" / "first.svg").read_bytes()
    assert drawn == (folder / "figures" / "second.svg").read_bytes()
    root = ElementTree.fromstring(drawn)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 10
    assert b"<dc:date>" not in drawn


def test_they_are_no_recipes():
    assert "reproductions" not in names()
    assert "dpo" in names()


def test_r1_dpo_equals_its_reward_model_at_every_beta(tmp_path: Path):
    points = r1_frontier.measure(betas=(0.2, 1.0, 5.0), seeds=3)
    for point in points:
        assert point.distance.max() < 1e-5  # nats; gains and KL are printed to 1e-3
        torch.testing.assert_close(point.dpo_reward, point.model_reward, rtol=0, atol=1e-5)
        torch.testing.assert_close(point.dpo_kl, point.model_kl, rtol=0, atol=1e-5)
        assert (point.shortfall > 0).all()  # no policy beats the frontier's in reward - beta KL
    for tight, loose in zip(points[1:], points, strict=False):  # a larger beta stays closer and earns less
        assert (tight.dpo_kl < loose.dpo_kl).all()
        assert (tight.dpo_reward < loose.dpo_reward).all()
    check(r1_frontier.report(points), tmp_path, rows=3)


def test_r2_ipo_stays_where_dpo_goes_on(tmp_path: Path):
    curves = r2_bandit.measure(strengths=(0.5, 2.0), steps=400, seeds=3, looks=3)
    found = {(curve.objective, curve.strength): curve.kl for curve in curves}
    for strength in (0.5, 2.0):
        dpo, ipo = found["DPO", strength], found["IPO", strength]
        assert (dpo[1:] > dpo[:-1]).all()  # at 100, 200 and 400 steps still on its way
        assert (dpo[-1] > 3 * ipo[-1]).all()
        assert ((ipo[-1] - ipo[-2]).abs() < 0.2 * ipo[-1]).all()
    assert (found["IPO", 2.0][-1] < found["IPO", 0.5][-1]).all()
    for curve in curves:
        if curve.objective == "IPO":
            assert interval(curve.kl[-1]).mean == pytest.approx(curve.limit, rel=0.2)
    check(r2_bandit.report(curves), tmp_path, rows=4)


def test_r4_the_weight_rule_beats_no_weights(tmp_path: Path):
    curves = r4_imbalance.measure(steps=150, seeds=3)
    none, *ruled = (curve.quality for curve in curves)
    for quality in ruled:
        assert (quality[-1] > none[-1]).all()  # for every seed
        assert (quality[-1] > quality[0]).all()
    assert none[-1].mean() < none.max(0).values.mean()  # it rises first, and falls as the nonsense takes over
    assert [curve.weights for curve in curves] == [(1, 1), (10, 1), (pytest.approx(40 / 3), 1)]
    check(r4_imbalance.report(curves), tmp_path, rows=3)


def test_r5_dpo_alone_grows_the_length_many_times(tmp_path: Path):
    losses = {
        "DPO": DPO(),
        "plus": RDPO(alpha=0.2),
        "minus": r5_length.minus_sign(RDPO(alpha=0.2)),
        "DPO-norm": DPONorm(),
        "SimPO": SimPO(),
    }
    outcomes = r5_length.measure(losses, steps=100, seeds=3)
    length = {outcome.name: outcome.length for outcome in outcomes}
    start = length["reference"]
    assert start.tolist() == pytest.approx([10.0] * 3)
    assert (length["DPO"] > 2 * start).all()
    assert (length["plus"] < start).all()
    assert (length["minus"] > length["DPO"]).all()
    assert (length["DPO-norm"] < length["DPO"] / 2).all()
    assert (length["SimPO"] < length["DPO-norm"]).all()
    assert all((outcome.quality > 0.5).all() for outcome in outcomes[1:])
    check(r5_length.report(outcomes), tmp_path, rows=6)


def test_r5_compares_the_objectives_it_names():
    kinds = [type(loss) for loss in r5_length.objectives().values()]
    assert {DPO, RDPO, DPONorm, SimPO} < set(kinds)


@pytest.mark.parametrize("name", ["r1_frontier", "r2_bandit", "r4_imbalance", "r5_length"])
def test_a_script_says_what_it_is(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert f"usage: {name}.py" in said
    assert f"{name[:2].upper()}: " in said
    assert "--out FOLDER" in said


def test_a_script_runs_from_any_folder(tmp_path: Path):
    command = [sys.executable, str(FOLDER / "r5_length.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: r5_length.py" in done.stdout


def test_main_prints_the_table_and_draws_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    report = r5_length.report(r5_length.measure({"DPO": DPO()}, steps=1, seeds=2))
    main("r5_length", lambda: report, [])
    assert capsys.readouterr().out == report.text() + "\n"
    assert not list(tmp_path.iterdir())
    main("r5_length", lambda: report, ["--out", str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == ["r5_length.svg"]


def test_interval_is_students():
    # 1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.302653; half-width t / sqrt 3.
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.half) == pytest.approx((2.0, 2.4841377), abs=1e-6)
    assert (found.low, found.high) == pytest.approx((2 - 2.4841377, 2 + 2.4841377), abs=1e-6)
    assert found.text(2) == "2.00 ± 2.48"
    with pytest.raises(ValueError, match=r"^interval: got 1 seed, expected 2 or more"):
        interval([1.0])


def test_a_minimum_that_is_a_kink_is_an_error():
    with pytest.raises(RuntimeError, match=r"^solve: gradient 1 where it stopped, expected < 1e-08"):
        solve(lambda x: (x - 1e-3).abs().sum(), column([0.0, 0.3]))
