"""Why a row is not used."""

from enum import Enum
from typing import Literal, final

from dpo.data.records import Preference

OnBadRow = Literal["drop", "error"]


@final
class Drop(Enum):
    """Every reason for which a row can be dropped: its name, what it means, and what mends it."""

    def __init__(self, label: str, meaning: str, fix: str, harmless: bool = False, asked: bool = False) -> None:
        self.label = label
        self.meaning = meaning
        self.fix = fix
        self.harmless = harmless or asked
        """True where honest data holds such rows: `on_bad_row="error"` does not stop at them."""
        self.asked = asked
        """True where the settings leave sound rows out: `max_dropped_share` does not count them."""

    WRONG_VALUE = (
        "wrong value",
        "a field has a type or value that its column cannot hold",
        "Write texts as strings, scores and weights as finite numbers, labels as true or false.",
    )
    WRONG_ROLE = (
        "wrong role",
        "a turn has an unknown role, or a completion is not spoken by the assistant",
        "Use the roles system, user, assistant and tool, and end completions with an assistant turn.",
    )
    PROMPTS_DIFFER = (
        "prompts differ",
        "the completions answer different prompts",
        "Give all completions of a row the same prompt.",
    )
    CONTRADICTION = (
        "scores contradict",
        "the rejected completion has the higher score",
        "Swap chosen and rejected, or correct the scores.",
    )
    EMPTY_PROMPT = (
        "empty prompt",
        "the prompt, or its last turn, holds no text",
        "Write the prompt, or remove the row.",
    )
    TURNS = (
        "last turn",
        "the prompt does not end with a user or tool turn",
        "End the prompt with the turn that the completion answers.",
    )
    EMPTY_COMPLETION = (
        "empty completion",
        "a completion holds no text",
        "Write the completion, or remove the row.",
    )
    IDENTICAL = (
        "identical completions",
        "all completions are the same text (white space at the ends aside)",
        "Remove the row: it holds no preference.",
    )
    TEMPLATE = (
        "template refuses",
        "the tokenizer's chat template refuses the conversation",
        "Change the turns to those the template takes, or set another chat template.",
    )
    TIE = (
        "tie",
        "all completions have the same score",
        "Nothing to mend: a tie holds no preference.",
        True,
    )
    HISTORIES = (
        "different histories",
        "the completions follow different replies in earlier turns, so no prompt is common to them",
        "Nothing to mend: whole conversations were compared, and only their first replies share a prompt.",
        True,
    )
    ALONE = (
        "nothing to compare with",
        "fewer than two completions of the prompt have a rank, a rating or votes",
        "Nothing to mend: a rank, a rating or votes say something beside another completion's only.",
        True,
    )
    MARKED = (
        "marked as unusable",
        "the makers of the data set say that it should not be used",
        "Nothing to mend: the row is left out, as its makers ask.",
        True,
    )
    DUPLICATE = (
        "duplicate",
        "the same prompt, completions, scores, agreement and group as an earlier row",
        "Nothing to mend: the first copy is kept.",
        True,
    )
    LEAK = (
        "prompt also in evaluation set",
        "the prompt stands in the evaluation file as well (case and white space aside)",
        "Nothing to mend: the row is kept out of training.",
        True,
    )
    NOT_DRAWN = (
        "outside the share",
        "the prompt is not in the share of this source that is used",
        "Nothing to mend: raise share to use more.",
        True,
        True,
    )
    FILTERED = (
        "filtered out",
        "the row is not of the kind that the filter asks for",
        "Nothing to mend: change data.filter to use it.",
        True,
        True,
    )
    CAPPED = (
        "prompt has enough",
        "its prompt has per_prompt training examples already",
        "Nothing to mend: raise per_prompt to use more.",
        True,
        True,
    )
    OVERLONG_PROMPT = (
        "over-long prompt",
        "the prompt leaves no room for a completion within max_length tokens",
        "Raise max_length, or set overlong=truncate_prompt.",
        True,
    )
    OVERLONG_COMPLETION = (
        "over-long completion",
        "prompt and longest completion together exceed max_length tokens",
        "Raise max_length, or set overlong=truncate_completion.",
        True,
    )
    IDENTICAL_TOKENS = (
        "identical after truncation",
        "the completions are the same tokens once rendered and truncated",
        "Raise max_length, or set overlong=drop.",
        True,
    )

    @classmethod
    def labelled(cls, label: str) -> "Drop":
        """Return the reason of that label."""
        return next(reason for reason in cls if reason.label == label)


@final
class BadRow(Exception):  # noqa: N818  # not an error of the program: the caller counts it
    """A row that cannot be used, for `reason`; `detail` says what was got."""

    def __init__(self, reason: Drop, detail: str = "") -> None:
        super().__init__(f"{reason.label}: {detail or reason.meaning}")
        self.reason = reason
        self.detail = detail


def inspect(record: Preference) -> None:
    """Raise `BadRow` where a record holds nothing to learn from.

    Two turns of one role in a row, or a system turn in the middle, are kept: real conversations have them, and a chat
    template that cannot render them says so itself.
    """
    texts = {completion.strip() for completion in record.completions}
    if not record.prompt or not record.prompt[-1].content.strip():
        raise BadRow(Drop.EMPTY_PROMPT)
    if (last := record.prompt[-1].role) not in ("user", "tool"):
        raise BadRow(Drop.TURNS, f"the prompt ends with a turn of the {last}")
    if "" in texts:
        raise BadRow(Drop.EMPTY_COMPLETION)
    if len(record.completions) > 1 and len(texts) == 1:
        raise BadRow(Drop.IDENTICAL)
    if record.scores is not None and len(record.scores) > 1 and len(set(record.scores)) == 1:
        raise BadRow(Drop.TIE)
