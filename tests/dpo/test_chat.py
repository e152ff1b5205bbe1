"""Talking to a run beside its start: two histories on one base, commands, and what is measured of each answer."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpo import recipes
from dpo.chat import Conversation, Manner, Said, chat, converse, talk_to
from dpo.cli import app
from dpo.data import Message, Renderer
from dpo.errors import ConfigError, ModelError
from dpo.model.base import LanguageModel
from dpo.model.views import all_sums
from dpo.run import execute
from dpo.settings import plan, read_overrides

Perturb = Callable[[LanguageModel], None]
Start = Callable[..., LanguageModel]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, pairs_file: Callable[..., Path]) -> Path:
    """A finished recipe of two stages; read only."""
    root = tmp_path_factory.mktemp("talk")
    given = [f"data.train={pairs_file(root / 'pairs.jsonl', prompts=20)}", f"model.name={tiny_model_folder}"]
    given += [
        "model.dtype=float32",
        "model.device=cpu",
        "model.layout=padded",
        "loop.max_steps=2",
        "optimiser.learning_rate=3e-2",
    ]
    given += ["evaluation.max_prompts=0", f"output.dir={root / 'run'}"]
    execute(plan(recipes.find("sft_dpo"), read_overrides(given)), "sft_dpo")
    return root / "run"


@pytest.fixture
def conversation(start: Start, perturb: Perturb) -> Conversation:
    model = start()
    perturb(model)
    return Conversation(model, Manner(max_new_tokens=8))


def said(conversation: Conversation, text: str) -> dict[str, Said]:
    return {one.side: one for one in conversation.say(text)}


def test_both_answer_and_the_log_ratio_is_that_of_their_tokens(conversation: Conversation) -> None:
    answers = said(conversation, "What of the sea?")
    assert set(answers) == {"start", "trained"}
    assert answers["start"].text != answers["trained"].text
    model = conversation.model
    prompt = Renderer(model.tokenizer, 2).prompt((Message("user", "What of the sea?"),))
    for one in answers.values():
        ids = tuple(model.tokenizer(one.text, add_special_tokens=False)["input_ids"])
        if not one.finished and len(ids) == one.tokens:
            key = [(prompt, ids)]
            ratio = all_sums(model, key, "policy")[0] - all_sums(model, key, "reference")[0]
            assert one.log_ratio == pytest.approx(ratio, abs=1e-4)
            assert one.log_ratio != 0
        assert one.account.startswith(f"{one.tokens} tokens")


def test_each_side_goes_on_from_its_own_answers(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    first = said(conversation, "What of the sea?")
    asked: list[tuple[Message, ...]] = []
    real = Renderer.prompt

    def heard(self: Renderer, messages: tuple[Message, ...]) -> tuple[int, ...]:
        asked.append(messages)
        return real(self, messages)

    monkeypatch.setattr(Renderer, "prompt", heard)
    said(conversation, "And the day?")
    question = Message("user", "What of the sea?"), Message("user", "And the day?")
    assert asked == [
        (question[0], Message("assistant", first[side].text), question[1]) for side in ("start", "trained")
    ]


def test_begun_anew_the_same_question_gets_the_same_answer(conversation: Conversation) -> None:
    first = said(conversation, "What of the sea?")
    second = said(conversation, "What of the sea?")
    assert {one.text for one in second.values()} != {one.text for one in first.values()}
    conversation.again()
    assert said(conversation, "What of the sea?") == first
    conversation.reset("Be kind.")
    assert said(conversation, "What of the sea?") != first


def test_temperature_0_takes_the_likeliest_token_and_a_seed_draws_another(start: Start, perturb: Perturb) -> None:
    model = start()
    perturb(model)
    talks = [Conversation(model, Manner(max_new_tokens=8, temperature=t, seed=s)) for t in (0, 1) for s in (0, 1)]
    cold, same, warm, other = (one.say("What of the sea?")[1].text for one in talks)
    assert cold == same
    assert len({cold, warm, other}) == 3


def test_a_talk_that_is_too_long_is_refused_and_can_be_begun_anew(conversation: Conversation) -> None:
    before = said(conversation, "hi")
    with pytest.raises(ModelError, match=r"expected at most 512 together.*/reset"):
        conversation.say("the sea " * 300)
    conversation.again()
    assert said(conversation, "hi") == before


def test_commands_steer_the_talk(conversation: Conversation) -> None:
    told: list[str] = []
    shown: list[tuple[Said, ...]] = []
    lines = ["", "hi\n", "/reset", "hi", "/system Be kind.", "hi", "/system", "hi", "/no", "x " * 400, "/quit", "hi"]
    converse(conversation, lines, shown.append, told.append)
    assert len(shown) == 4
    assert shown[0] == shown[1] == shown[3]
    assert shown[2] != shown[0]
    assert told[:3] == ["begun anew", "begun anew under this system message", "begun anew without a system message"]
    assert told[3].startswith("/no: no such command. /reset")
    assert told[4].startswith("error: The talk has")
    assert len(told) == 5


def test_in_a_pipe_lines_are_read_and_answers_are_plain(trained: Path) -> None:
    given = ["chat", str(trained), "--max-new-tokens", "4", "--temperature", "0", "--system", "Be kind."]
    done = CliRunner().invoke(app, given, input="hi\n\n/reset\nhi\n")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("start: the starting adapter ")  # of the stage before
    assert lines[0].endswith("1-sft/adapter, frozen")
    assert lines.count("you: hi") == 2
    assert sum(line.startswith("start (") for line in lines) == 2
    assert sum(line.startswith("trained (") and "log-ratio " in line for line in lines) == 2
    assert "│" not in done.stdout


def test_a_stage_s_own_folder_is_talked_to_beside_its_own_start(trained: Path) -> None:
    first, last = talk_to(trained / "1-sft"), talk_to(trained)
    assert first.start_is.startswith("the base model")
    assert last.start_is.startswith("the starting adapter")


def test_in_a_terminal_both_stand_side_by_side(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    typed = iter(["hi", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    out = Terminal()
    chat(conversation, Terminal(), out)
    (head,) = [line for line in out.getvalue().splitlines() if "start: " in line and "trained: " in line]
    assert head.count("log-ratio") == 2


def test_what_a_model_writes_cannot_steer_the_terminal(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = Said("start", "\x1b[2Jgone", 1, True, 0.0)
    monkeypatch.setattr(Conversation, "say", lambda *_: (evil,))
    out = io.StringIO()
    chat(conversation, io.StringIO("hi\n"), out)
    assert "\x1b" not in out.getvalue()
    assert "gone" in out.getvalue()


@pytest.mark.parametrize(
    ("arguments", "said_then"),
    [
        (["--temperature=-1"], "--temperature: got -1.0, expected 0 or more"),
        (["--max-new-tokens=0"], "--max-new-tokens: got 0, expected 1 or more"),
        (["loop.seed=1"], "loop: a talk cannot change it"),
    ],
)
def test_bad_arguments_are_one_message(trained: Path, arguments: list[str], said_then: str) -> None:
    done = CliRunner().invoke(app, ["chat", str(trained), *arguments], input="hi\n")
    assert done.exit_code == 2
    assert said_then in done.stderr
    assert "Traceback" not in done.stderr


def test_only_finished_policies_are_talked_to(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no finished run"):
        talk_to(tmp_path)
    for name in ("run.yaml", "summary.json"):
        (tmp_path / name).write_bytes((trained / "2-dpo" / name).read_bytes())
    text = (tmp_path / "run.yaml").read_text()
    settings = text.replace("name: dpo\n  beta: 0.1", "name: bradleyterry")
    assert settings != text
    (tmp_path / "run.yaml").write_text(settings)
    with pytest.raises(ConfigError, match="got a reward model"):
        talk_to(tmp_path)
    (tmp_path / "summary.json").unlink()
    with pytest.raises(ConfigError, match=r"not finished\. Let it end first: dpo train .*run\.yaml"):
        talk_to(tmp_path)
    assert json.loads((trained / "2-dpo" / "summary.json").read_text())["reference"]
