"""Text to token ids: the prompt as it will stand at generation, the completion with exactly one end token.

A completion is tokenised together with its prompt, because tokens may depend on what stands before them; the prompt's
ids are nevertheless always those of the prompt alone, which are the ids that sampling starts from.

Some templates write a finished conversation otherwise than the start of the same one: they move the system text, or
leave an answer's thoughts out. The completion is then what the model has to write behind the prompt of generation.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final

from dpo.data.check import BadRow, Drop
from dpo.data.limits import LimitError, bounded
from dpo.data.records import Message, Messages
from dpo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overlong = Literal["drop", "truncate_prompt", "truncate_completion"]

# Private-use characters: a mark stands for a special token's spelling while a template is rendered around it.
_OPEN, _CLOSE, _PROBE = "\ue000", "\ue001", "\ue002"
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")

# Bounds of one rendering, which takes about 0.1 ms: a template may be slow, but not without end.
_SECONDS = 5.0
_MEMORY = 2**30  # bytes; a thread that starts meanwhile takes some as well
_FRAME, _GROWTH = 2**20, 8  # characters: what it may write around the turns, and of each of theirs


@final
@dataclass(frozen=True, slots=True)
class Rendered:
    """One prompt and its completions as token ids."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    """Each ends with one end token, unless it was cut."""
    truncated: bool
    spells_special: bool
    """True where a text spells a special token; it was tokenised as ordinary text."""


@final
@dataclass(frozen=True, slots=True)
class _Frame:
    """What the template writes around an answer."""

    closing: str
    """Between the last turn's text and the place where sampling starts."""
    opening: str | None
    """From there to the answer's text; None where an answer does not follow the prompt of generation."""
    tail: str
    """Behind the answer."""
    end: str
    """The tail up to the first end token, "" where it has none."""


@final
class Renderer:
    """Renders conversations through the tokenizer's chat template, or a plain one where it has none.

    The plain template writes a single user message as it is, and every other prompt as paragraphs
    "System: ...", "User: ...", "Assistant: ..." that end with "Assistant:".

    Args:
        tokenizer: a fast transformers tokenizer.
        max_length: most tokens of prompt and completion together (>= 2).
        overlong: what becomes of longer examples. "drop" drops them. "truncate_prompt" keeps the prompt's END.
            "truncate_completion" keeps the completions' START, without end token where cut. All completions of an
            example share one prompt, so the longest decides.

    Raises:
        ValueError: `max_length` is below 2.
        DataError: neither the template nor the tokenizer ends a completion, or the template cannot render one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", max_length: int, overlong: Overlong = "drop") -> None:
        if max_length < 2:
            raise ValueError(
                f"Renderer.max_length must be >= 2 (one prompt and one completion token), got {max_length}"
            )
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._overlong: Overlong = overlong
        # Longest first, so that "<|end|>x" is not taken for "<|end|>"; the mark's own character is escaped as well.
        self._marked = [*sorted(special_tokens(tokenizer), key=lambda spelling: (-len(spelling), spelling)), _OPEN]
        self._number = {spelling: number for number, spelling in enumerate(self._marked)}
        self._special = re.compile("|".join(map(re.escape, self._marked[:-1])) or "(?!)")
        self._escape = re.compile("|".join(map(re.escape, self._marked)))
        self._eos = _id(tokenizer.eos_token_id)
        self._bos = () if tokenizer.chat_template else own_bos(tokenizer)
        self._frame = self._probe()

    @property
    def end_tokens(self) -> frozenset[int]:
        """Ids at which sampling stops: the one that ends a rendered completion, and the tokenizer's EOS."""
        ends = self._encode(self._frame.end)[-1:] if self._frame.end else ()
        return frozenset(ends if self._eos is None else (*ends, self._eos))

    def prompt(self, messages: Messages) -> tuple[int, ...]:
        """Return the prompt's ids, uncut: those that every completion is scored behind and sampled from.

        Raises:
            BadRow: the template refuses the conversation.
        """
        return self._bos + self._encode(self._text(messages))

    def render(self, messages: Messages, completions: Sequence[str], source: str = "") -> Rendered:
        """Return a prompt and its completions, within `max_length` tokens.

        Args:
            messages: the prompt.
            completions: texts that answer it.
            source: `file:row`, for messages.

        Raises:
            BadRow: they do not fit, hold no token, or the template refuses them.
            DataError: the template does not show where the prompt ends and the completion begins.
        """
        text = self._text(messages)
        prompt = self._bos + self._encode(text)
        answers = [self._completion(messages, text, prompt, completion, source) for completion in completions]
        if not prompt:
            raise BadRow(Drop.EMPTY_PROMPT, "the tokenizer makes no token of it")
        kept_prompt, kept = self._fit(prompt, answers)
        contents = (*(message.content for message in messages), *completions)
        return Rendered(
            prompt=kept_prompt,
            completions=kept,
            truncated=(kept_prompt, kept) != (prompt, tuple(answers)),
            spells_special=any(map(self._special.search, contents)),
        )

    def _fit(
        self, prompt: tuple[int, ...], completions: Sequence[tuple[int, ...]]
    ) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        longest = max(map(len, completions), default=0)
        if len(prompt) + longest <= self._max_length:
            return prompt, tuple(completions)
        lengths = f"{len(prompt)} + {longest} tokens, max_length {self._max_length}"
        if self._overlong == "truncate_prompt":
            room = self._max_length - longest
            if room < 1:
                raise BadRow(Drop.OVERLONG_COMPLETION, lengths)
            return prompt[-room:], tuple(completions)
        room = self._max_length - len(prompt)
        if room < 1:
            raise BadRow(Drop.OVERLONG_PROMPT, lengths)
        if self._overlong == "drop":
            raise BadRow(Drop.OVERLONG_COMPLETION, lengths)
        return prompt, tuple(completion[:room] for completion in completions)

    def _completion(
        self, messages: Messages, prompt_text: str, prompt: tuple[int, ...], completion: str, source: str
    ) -> tuple[int, ...]:
        """Return the completion's ids, its end token last."""
        text = self._behind(messages, prompt_text, completion, source) + self._frame.end
        ids = self._bos + self._encode(prompt_text + text)
        # Where a token reaches across the boundary, the prompt's ids win: they are the ones that sampling sees.
        answer = ids[len(prompt) :] if ids[: len(prompt)] == prompt else self._encode(text)
        if not self._frame.end and self._eos is not None:
            answer = (*answer, self._eos)
        if len(answer) < 2:
            raise BadRow(Drop.EMPTY_COMPLETION, "the tokenizer makes no token of it")
        return answer

    def _behind(self, messages: Messages, prompt_text: str, completion: str, source: str) -> str:
        """Return what the model has to write behind the prompt, up to the end token."""
        frame, answer = self._frame, self._mark(completion)
        full = self._text(messages, completion)
        if not full.endswith(frame.tail):
            raise DataError(self._unstable(prompt_text, full, source))
        body = full.removesuffix(frame.tail)
        whole = _letters(body).endswith(_letters(answer))
        if whole and body.startswith(prompt_text):
            return body[len(prompt_text) :]
        # Nothing of a completion is lost: what the template leaves out stands as sampling would have written it.
        head = self._text(messages, _PROBE).rpartition(_PROBE)[0]
        written = body if whole and body.startswith(head) else head + answer
        if written.startswith(prompt_text):
            return written[len(prompt_text) :]
        if prompt_text.startswith(head):
            raise BadRow(Drop.TEMPLATE, f"at generation answers begin with {prompt_text[len(head) :]!r}, this one not")
        # Earlier turns differ, but both end at the place where sampling starts.
        if frame.opening is None or not (
            prompt_text.endswith(frame.closing) and head.endswith(frame.closing + frame.opening)
        ):
            raise DataError(self._unstable(prompt_text, full, source))
        return written[len(head) - len(frame.opening) :]

    def _probe(self) -> _Frame:
        """Look at a small conversation.

        Raises:
            DataError: the template cannot render one, or nothing ends an answer.
        """
        hello = (Message("user", "Hello"),)
        try:
            prompt, full = self._text(hello), self._text(hello, _PROBE)
        except BadRow as bad:
            raise DataError(
                f"{self._name}: {bad}. Set a chat template that renders a user and an assistant turn."
            ) from bad
        head, probe, tail = full.rpartition(_PROBE)
        if not probe:
            raise DataError(
                f"{self._name}: the chat template leaves the assistant's text out, expected it at the end of"
                f" {full[-80:]!r}. Set a chat template that renders assistant turns."
            )
        space = len(tail) - len(tail.lstrip())
        end = self._special.match(tail, space)
        if end is None and self._eos is None:
            raise DataError(
                f"{self._name}: got no end-of-sequence token, expected one in the chat template behind the assistant's"
                " text or as tokenizer.eos_token: without it a model never learns to stop. Set tokenizer.eos_token."
            )
        return _Frame(
            closing=prompt.rpartition("Hello")[2],
            opening=head.removeprefix(prompt) if head.startswith(prompt) else None,
            tail=tail,
            end=tail[: end.end()] if end else "",
        )

    @property
    def _name(self) -> str:
        return _name_of(self._tokenizer)

    def _text(self, messages: Messages, completion: str | None = None) -> str:
        """Render a prompt ready for generation, or with its completion; special tokens in the texts are marked."""
        turns = [Message(one.role, self._mark(one.content), self._mark(one.extra)) for one in messages]
        answer = None if completion is None else self._mark(completion)
        return self._templated(turns, answer) if self._tokenizer.chat_template else _plain(turns, answer)

    def _templated(self, turns: list[Message], answer: str | None) -> str:
        turns = turns if answer is None else [*turns, Message("assistant", answer)]
        chat = [{"role": turn.role, "content": turn.content, **json.loads(turn.extra or "{}")} for turn in turns]
        return templated(self._tokenizer, chat, generation=answer is None)

    def _mark(self, text: str) -> str:
        return self._escape.sub(lambda found: f"{_OPEN}{self._number[found[0]]}{_CLOSE}", text)

    def _encode(self, text: str) -> tuple[int, ...]:
        """Tokenise a rendered text; marked spellings become ordinary tokens."""
        ids: list[int] = []
        for place, part in enumerate(_MARK.split(text)):  # text and the numbers of marks take turns
            if part:
                spelled = place % 2 == 1
                encoded = self._tokenizer(
                    self._marked[int(part)] if spelled else part,
                    add_special_tokens=False,
                    split_special_tokens=spelled,
                    verbose=False,
                )
                ids.extend(encoded["input_ids"])
        return tuple(ids)

    def _unstable(self, prompt_text: str, full: str, source: str) -> str:
        at = next((i for i, (a, b) in enumerate(zip(prompt_text, full, strict=False)) if a != b), len(prompt_text))
        place = f"{source}: " if source else ""
        return (
            f"{place}the chat template of {self._name} is not prefix-stable at character {at}: the prompt goes on"
            f" {prompt_text[at : at + 40]!r}, the same prompt with its completion {full[at : at + 40]!r}"
            f" (ending {full[-40:]!r}). Expected the first to be the start of the second, and the end"
            f" {self._frame.tail!r}. Set a chat template that renders a turn the same way whatever follows it."
        )


def templated(tokenizer: "PreTrainedTokenizerBase", chat: list[dict[str, Any]], generation: bool) -> str:
    """Return what the chat template, a program by others, writes: in its sandbox, and within bounds.

    Args:
        tokenizer: holds the template.
        chat: the turns, as transformers takes them.
        generation: whether it ends where an answer begins.

    Raises:
        BadRow: it refuses or fails on the conversation.
        DataError: it reaches for what no template may, takes too long or too much memory, or writes too much.
    """
    from jinja2.exceptions import SecurityError, TemplateError

    try:
        with bounded(_SECONDS, _MEMORY):
            text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation))
    except SecurityError as error:
        raise DataError(
            f"{_name_of(tokenizer)}: the chat template does what no template may: {error}. Replace it."
        ) from error
    except LimitError as error:
        raise DataError(
            f"{_name_of(tokenizer)}: the chat template takes {error} for one conversation, expected a thousandth of it."
            " Replace it."
        ) from error
    except (
        TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise BadRow(Drop.TEMPLATE, str(error) or type(error).__name__) from error
    given = sum(len(value) for turn in chat for value in turn.values() if isinstance(value, str))
    if len(text) > _FRAME + _GROWTH * given:
        raise DataError(
            f"{_name_of(tokenizer)}: the chat template makes {len(text):,} characters of {given:,}, expected little"
            " more than it is given. Replace it."
        )
    return text


def _name_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    return str(tokenizer.name_or_path or "tokenizer")


def _plain(turns: list[Message], answer: str | None) -> str:
    """Render without a chat template."""
    if any(turn.extra for turn in turns):
        raise BadRow(Drop.TEMPLATE, "tools are called, and there is no chat template to say how")
    if len(turns) == 1 and turns[0].role == "user":
        return turns[0].content + (answer or "")
    lines = [f"{turn.role.capitalize()}: {turn.content}" for turn in turns]
    text = "\n\n".join([*lines, "Assistant:"])
    return text if answer is None else f"{text} {answer}"


def _letters(text: str) -> str:
    """Return a text without white space and case, which templates change and which say nothing of what is left out."""
    return "".join(text.casefold().split())


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """Return the spellings of the tokens that a text may only name, never be."""
    added = tokenizer.added_tokens_decoder.values()
    return ({token.content for token in added if token.special} | set(tokenizer.all_special_tokens)) - {""}


def own_bos(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Return the BOS id where the tokenizer puts one in front of a text by itself."""
    bos = _id(tokenizer.bos_token_id)
    return (bos,) if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else ()


def _id(value: object) -> int | None:
    return value if isinstance(value, int) else None
