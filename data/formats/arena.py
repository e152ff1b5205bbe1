"""Chatbot Arena and MT-Bench: two models' conversations, and which one a person or a model preferred.

Sources: the cards of lmsys/chatbot_arena_conversations, lmsys/mt_bench_human_judgments and
lmarena-ai/arena-human-preference-55k, -100k and -140k.
"""

from dpo.data.check import BadRow, Drop
from dpo.data.format import Format
from dpo.data.parts import as_index, as_list, as_messages, as_number, as_text, from_json, record
from dpo.data.read import Row
from dpo.data.records import Message, Messages, Preference

_WINNERS = {
    "model_a": (1.0, 0.0),
    "model_b": (0.0, 1.0),
    "tie": (0.0, 0.0),
    "tie (bothbad)": (0.0, 0.0),
    "both_bad": (0.0, 0.0),
}


def _battle(row: Row, a: Messages, b: Messages, scores: tuple[float, float], group: object = None) -> Preference:
    prompts, completions = zip(*(_last(conversation) for conversation in (a, b)), strict=True)
    if prompts[0] != prompts[1]:
        asked = [[turn for turn in prompt if turn.role != "assistant"] for prompt in prompts]
        raise BadRow(Drop.HISTORIES if asked[0] == asked[1] else Drop.PROMPTS_DIFFER)
    return record(row, prompts[0], completions, scores, group=group)


def _last(conversation: Messages) -> tuple[Messages, str]:
    if not conversation or conversation[-1].role != "assistant":
        raise BadRow(Drop.WRONG_ROLE, "a conversation does not end with a turn of the assistant")
    return conversation[:-1], conversation[-1].content


def _conversations(row: Row) -> Preference:
    values = row.values
    winner = values.get("winner")
    if not isinstance(winner, str) or winner not in _WINNERS:
        raise BadRow(Drop.WRONG_VALUE, f"winner is {winner!r}, not one of {', '.join(_WINNERS)}")
    a, b = (as_messages(from_json(values.get(name), name), name) for name in ("conversation_a", "conversation_b"))
    if values.get("turn") is not None:
        turn = as_number(values["turn"], "turn")
        a, b = _upto(a, turn), _upto(b, turn)
    judge = values.get("judge")
    return _battle(row, a, b, _WINNERS[winner], values.get("judge_hash") if judge is None else judge)


def _upto(conversation: Messages, turn: float) -> Messages:
    """Return a conversation up to the reply that was judged: MT-Bench keeps the turns behind it as well."""
    replies = [place for place, message in enumerate(conversation) if message.role == "assistant"]
    if not 1 <= turn <= len(replies) or turn % 1:
        raise BadRow(Drop.WRONG_VALUE, f"turn is {turn:g} in a conversation of {len(replies)} replies")
    return conversation[: replies[int(turn) - 1] + 1]


def _one_hot(row: Row) -> Preference:
    won = [as_index(row.values.get(name), name) for name in ("winner_model_a", "winner_model_b", "winner_tie")]
    if sum(won) != 1:
        raise BadRow(Drop.WRONG_VALUE, f"{sum(won)} of winner_model_a, winner_model_b and winner_tie are 1, expected 1")
    asked, *answered = (
        [as_text(text, name) for text in as_list(from_json(row.values.get(name), name), name)]
        for name in ("prompt", "response_a", "response_b")
    )
    if any(len(texts) != len(asked) for texts in answered):
        raise BadRow(
            Drop.WRONG_VALUE, f"{len(asked)} prompts have {' and '.join(str(len(t)) for t in answered)} answers"
        )
    a, b = (
        tuple(m for turn in zip(asked, texts, strict=True) for m in map(Message, ("user", "assistant"), turn))
        for texts in answered
    )
    return _battle(row, a, b, (float(won[0]), float(won[1])))


ARENA = Format(
    "arena",
    "winner is model_a or model_b; of several turns the one in the column turn was judged, or else the last",
    (("conversation_a",), ("conversation_b",), ("winner",)),
    _conversations,
    optional=("turn", "judge", "judge_hash"),
)
ARENA_55K = Format(
    "arena in columns",
    "winner_model_a is 1 where response_a is preferred, winner_model_b where response_b is; winner_tie is a tie",
    (("prompt",), ("response_a",), ("response_b",), ("winner_model_a",), ("winner_model_b",), ("winner_tie",)),
    _one_hot,
)
