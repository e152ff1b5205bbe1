"""Model cards: every figure is the run's own, the hub's library reads them, nothing from outside acts or leaks."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from dpo import recipes
from dpo.card import CARD_FILE, FEEDBACK_FROM, ORIGIN, card, escape, figure, hub_model, write_card
from dpo.cli import app
from dpo.data import FORMATS
from dpo.errors import CheckpointError, ConfigError
from dpo.metrics import read
from dpo.run import Result, execute, read_result, stage_folders
from dpo.settings import plan, read_overrides

Train = Callable[..., list[Result]]
SECRET = "hf_abcdefghijklmnop"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs are kept that several tests look at: each is trained once."""
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture
def train(tmp_path: Path, shelf: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Carry out a recipe on the tiny model and on rows of two groups, with soft labels, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "prompt": f"What of number {i}?",
            "chosen": f"It is good and blue, {i} times.",
            "rejected": f"A bad answer {i}.",
            "group": ["<b>left</b>", "right|side"][i % 2],
            "agreement": [0.75, 1.0][i % 2],
        }
        for i in range(30)
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def go(recipe: str, *given: str) -> list[Result]:
        kept = shelf / re.sub(r"\W", "_", "-".join((recipe, *given)))[-100:]
        shutil.rmtree("run", ignore_errors=True)
        if not kept.exists():
            common = ["data.train=pairs.jsonl", "data.eval_share=0.3", f"model.name={tiny_model_folder}"]
            common += ["model.device=cpu", "model.layout=padded", "loop.max_steps=2", "evaluation.max_prompts=3"]
            common += ["evaluation.max_new_tokens=3", "output.dir=run"]
            execute(plan(recipes.find(recipe), read_overrides([*common, *given])), recipe)
            shutil.copytree("run", kept)
            shutil.rmtree("run")
        shutil.copytree(kept, "run")
        return [read_result(stage) for stage in stage_folders(Path("run"))]

    return go


def text_of(result: Result) -> str:
    return (result.folder / CARD_FILE).read_text(encoding="utf-8")


def tables(text: str) -> dict[str, dict[str, list[str]]]:
    """Return the card's tables by the line above them, each row's cells by its first one."""
    found: dict[str, dict[str, list[str]]] = {}
    heading = ""
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("| ---"):
            first, *cells = [one.strip().replace("\\", "") for one in re.split(r"(?<!\\)\|", line)[1:-1]]
            found.setdefault(heading, {})[first] = cells
        elif line and not line.startswith("|"):
            heading = line
    return found


def test_every_figure_is_that_of_the_summary_and_of_the_ledger(train: Train) -> None:
    (result,) = train("dpo")
    text, summary = text_of(result), json.loads((result.folder / "summary.json").read_text())
    shown = tables(text)
    groups = {f"Group {escape(name)}:": own for name, own in summary["groups"].items()}
    assert len(groups) == 2
    for heading, measures in {"After training, on held-out rows:": summary["measures"], **groups}.items():
        rows = {name: cells for name, cells in shown[heading].items() if name != "measure"}
        assert rows.keys() == measures.keys()
        for name, one in measures.items():
            assert rows[name][:3] == [
                figure(one["value"]),
                f"{figure(one['low'])} to {figure(one['high'])}",
                str(one["n"]),
            ]
    ledger = read(result.folder / "metrics.jsonl")
    last = {name: cells for name, cells in shown["The last rows of the ledger:"].items() if name != "metric"}
    assert {"train/loss", "eval/loss", "grad_norm"} <= last.keys()
    for name, (step, value, _) in last.items():
        (row,) = [row for row in ledger if name in row and str(row["step"]) == step][-1:]
        assert value == figure(float(row[name]))
        assert int(step) == max(int(row["step"]) for row in ledger if name in row)
    kl, own = summary["measures"]["kl/policy_reference"], summary["measures"]["eval/reward/accuracy"]
    assert f"own answers: {figure(kl['value'])} ({figure(kl['low'])} to {figure(kl['high'])}) nats" in text
    assert f"on held-out rows: {figure(own['value'])} ({figure(own['low'])} to" in text
    for key in ("steps", "examples_seen", "tokens_seen", "data_fingerprint"):
        assert re.search(rf"\b{summary[key]}\b", text), key
    assert f"torch {summary['versions']['torch']}" in text
    data = json.loads((result.folder / "data.json").read_text())["train"]
    assert f"{data['read']} rows read, {data['kept']} kept" in text
    agreed = data["summary"]
    assert agreed["soft"] == 15
    assert f"15 rows with a soft label, mean agreement {figure(agreed['agreement'])}" in text


def test_numbers_are_shown_to_four_digits_and_counts_in_full() -> None:
    assert [figure(one) for one in (123456, 0.123456, 1234.5, 1e-7)] == ["123456", "0.1235", "1234", "1e-07"]


def test_the_hub_s_library_reads_the_front_matter(train: Train) -> None:
    (result,) = train("dpo")
    parsed = ModelCard(text_of(result)).data
    plain = parsed.to_dict()
    assert (plain["library_name"], plain["pipeline_tag"]) == ("peft", "text-generation")
    assert {"dpo-lab", "dpo", "lora"} <= set(plain["tags"])
    assert "base_model" not in plain  # a folder of this machine is no hub model
    assert "datasets" not in plain
    assert parsed.eval_results is not None
    values = {one.metric_type: (one.metric_value, one.metric_args) for one in parsed.eval_results}
    assert values == {
        name: (one["value"], {"low": one["low"], "high": one["high"], "n": one["n"], "level": 0.95})
        for name, one in result.summary["measures"].items()
    }


@pytest.mark.parametrize(
    ("name", "known"), [("embedded", ORIGIN), ("owner/model", "owner/model"), ("a b", None), ("/x/y", None)]
)
def test_only_what_the_hub_has_is_named_as_a_base(name: str, known: str | None) -> None:
    assert hub_model(name) == known


def test_hub_data_sets_are_named_and_files_are_not(train: Train) -> None:
    (result,) = train("dpo")
    run = result.run.override({"data": {"train": "owner/prefs:train", "mix": [{"train": "deep/more.jsonl"}]}})
    text = card(run, result.folder, result.summary)
    assert ModelCard(text).data.to_dict()["datasets"] == ["owner/prefs"]
    assert "| data.mix |" in text


def test_text_from_outside_neither_acts_nor_leaks_nor_tells_where_it_lay(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / f"deep {SECRET}"
    folder.mkdir()
    name = "a|b `x` [y](z) <img src=x onerror=1>.jsonl"
    Path("pairs.jsonl").rename(folder / name)
    (result,) = train("dpo", f"data.train={json.dumps(str(folder / name))}", "name=safe")
    text = text_of(result)
    assert SECRET not in text
    assert str(tmp_path) not in text
    body = ModelCard(text).text
    html = MarkdownIt("gfm-like", {"linkify": False}).render(body)
    assert "<img" not in html
    assert "<b>left" not in html
    assert "<code>x</code>" not in html
    assert '<a href="z"' not in html
    assert "a|b `x` [y](z) &lt;img src=x onerror=1&gt;.jsonl" in html  # shown as it is
    assert "Group &lt;b&gt;left&lt;/b&gt;:" in html


def test_escaping_keeps_the_text_on_one_line_without_control_characters() -> None:
    assert escape("a\nb\x1b[2J |c| *d* <e>") == "a b\ufffd\\[2J \\|c\\| \\*d\\* &lt;e&gt;"
    assert escape(f"token {SECRET} x") == "token \\[redacted\\] x"


def test_what_nobody_looked_at_is_derived_from_the_run(train: Train) -> None:
    (result,) = train("dpo")
    text = text_of(result)
    unlooked = ["evaluation.gold", "evaluation.choices", "evaluation.sycophancy", "evaluation.text"]
    assert all(f"({key}" in text for key in unlooked)
    assert "Few units stand behind" in text
    assert "longer completion wins 100 % of the pairs" in text
    assert "One training with one seed" in text
    (looked,) = train("dpo", "evaluation.gold=dpo.data.gold:sentiment", "evaluation.sycophancy=built-in")
    text = text_of(looked)
    assert "(evaluation.gold)" not in text
    assert "(evaluation.sycophancy)" not in text
    assert "(evaluation.choices)" in text
    assert "eval/sycophancy/flips" in text


def test_a_policy_s_card_tells_the_held_out_accuracy_of_its_reward_model(train: Train) -> None:
    small = ["ppo.rollout.max_new_tokens=3", "ppo.rollout.prompts_per_rollout=8"]
    reward, policy = train("reward_ppo", *small)
    accuracy = reward.summary["measures"]["eval/reward/accuracy"]
    told = f"accuracy {figure(accuracy['value'])} ({figure(accuracy['low'])} to {figure(accuracy['high'])})"
    assert f"  - 1-reward/adapter: bradleyterry, {told}" in text_of(policy)
    assert f"calibration error: {figure(reward.summary['calibration_error'])}" in text_of(policy)
    assert "How the policy was optimised" not in text_of(reward)
    assert ModelCard(text_of(reward)).data.to_dict()["pipeline_tag"] == "text-classification"


def test_an_exploited_reward_model_is_said_so(train: Train) -> None:
    small = ["ppo.rollout.max_new_tokens=3", "ppo.rollout.prompts_per_rollout=8"]
    _, policy = train("reward_ppo", *small)
    file = policy.folder / "metrics.jsonl"
    path = [(0.5, 0.25), (2.0, -0.75)]
    rows = [{"step": n, "kind": "train", "rollout/score": s, "rollout/gold_reward": g} for n, (s, g) in enumerate(path)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = "rose from 0.5 to 2 while the gold reward fell from 0.25 to -0.75: the reward model was exploited"
    assert said in card(policy.run, policy.folder, policy.summary)
    file.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    assert "exploited" not in card(policy.run, policy.folder, policy.summary)


def test_the_known_sets_are_those_of_the_recogniser() -> None:
    assert set(FEEDBACK_FROM) <= {one.name for one in FORMATS}


def test_the_embedded_task_s_labels_are_said_to_be_nobody_s(train: Train) -> None:
    (result,) = train("dpo")
    shipped = Path(__file__).parents[2] / "data" / "sentiment" / "pairs.jsonl"
    run = result.run.override({"data": {"train": str(shipped)}})
    assert "Who gave it: nobody: a lexicon of sentiment" in card(run, result.folder, result.summary)
    assert "Who gave it: not recorded" in text_of(result)


# --- the command ---


def test_a_card_is_written_again_and_one_that_was_edited_is_kept(train: Train) -> None:
    (result,) = train("dpo")
    first = text_of(result)
    file = result.folder / CARD_FILE
    file.unlink()
    done = CliRunner().invoke(app, ["card", "run"])
    assert (done.exit_code, done.stdout.strip()) == (0, "run/README.md")
    assert text_of(result) == first
    file.write_text(first + "\nWho gave it: our own annotators.\n")
    done = CliRunner().invoke(app, ["card", "run"])
    assert done.exit_code == 2
    assert "run/README.md: is another card than the program writes" in done.stderr
    assert "our own annotators" in text_of(result)
    assert CliRunner().invoke(app, ["card", "run", "--force"]).exit_code == 0
    assert text_of(result) == first


def test_later_measurements_are_told_beside_the_first(train: Train) -> None:
    (result,) = train("dpo")
    (result.folder / "evaluation").mkdir()
    again = {"measures": {"eval/gold_reward": {"value": 0.4321, "low": 0.1, "high": 0.9, "n": 200}}}
    (result.folder / "evaluation" / "evaluation.json").write_text(json.dumps(again))
    write_card(result.folder, force=True)
    shown = tables(text_of(result))["Measured again later, by dpo evaluate:"]
    assert shown["eval/gold_reward"][:3] == ["0.4321", "0.1 to 0.9", "200"]
    assert "(evaluation.gold)" not in text_of(result)


def test_no_card_without_a_finished_run(train: Train, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no finished run"):
        write_card(tmp_path)
    (result,) = train("dpo")
    (result.folder / "data.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"data\.json: cannot be read"):
        write_card(result.folder, force=True)


def test_a_run_without_held_out_rows_says_that_nothing_was_measured(train: Train) -> None:
    (result,) = train("dpo", "data.eval_share=0")
    text: Any = text_of(read_result(result.folder))
    assert "nothing was measured" in text
    assert "Nothing was held out" in text
    assert "Its own answers were not sampled" in text
