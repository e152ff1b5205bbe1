"""What a tokenizer makes of the records: lengths in tokens, spelled special tokens, faults of the chat template."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

from dpo.data.check import BadRow
from dpo.data.records import Preference
from dpo.data.render import Rendered, Renderer, own_bos, special_tokens, templated
from dpo.data.statistics import Lengths
from dpo.errors import DataError
from dpo.estimates import Estimate, share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLED = 10_000
"""Most records that are tokenised; of more, a random sample is."""

_UNLIMITED = 1 << 40
_EXAMPLES = 3


@final
@dataclass(frozen=True)
class Finding:
    """Something that is, or may be, wrong with the data."""

    what: str
    """In words: what is wrong."""
    fix: str
    """What to do about it."""


@final
@dataclass(frozen=True)
class Token:
    """One token of a rendered record."""

    id: int
    text: str
    """Decoded by itself: part of a character shows as the replacement character."""
    scored: bool
    """True for tokens of the completion: the loss is taken over these alone."""


@final
@dataclass(frozen=True)
class TokenSurvey:
    """What the records are as tokens."""

    tokenizer: str
    max_length: int
    """Most tokens of prompt and completion together."""
    records: int
    """Records that were tokenised."""
    sampled: bool
    """True where these are a random sample of the training records."""
    prompt: Lengths | None
    """In tokens, as the template renders it; None where nothing could be rendered."""
    completion: Lengths | None
    """In tokens; None where nothing could be rendered, or where there are no completions."""
    over: Estimate | None
    """Records whose prompt and longest completion have more than `max_length` tokens together."""
    refused: int
    """Records that the template, or the tokenizer, makes nothing of."""
    refusal: str
    """The first such record, and why; empty where there is none."""
    special_records: int
    """Training records whose texts spell a special token. All records were searched."""
    special: tuple[tuple[str, int], ...]
    """Special tokens that texts spell, with the training records that do, the most frequent first."""
    special_examples: tuple[str, ...]
    """Sources of the first such records."""
    findings: tuple[Finding, ...]
    """Faults of tokenizer and template."""
    sample: tuple[Token, ...]
    """The first record that could be rendered, with its best completion."""
    sample_source: str


def survey_tokens(
    records: Sequence[Preference], tokenizer: "PreTrainedTokenizerBase", max_length: int, seed: int
) -> TokenSurvey:
    """Return what a tokenizer makes of the records.

    Args:
        records: at least one.
        tokenizer: a fast one.
        max_length: most tokens of prompt and completion together.
        seed: of the sample.
    """
    findings = _template_findings(tokenizer)
    prompts, completions, totals = [], [], []
    refused, refusal, shown, shown_source = 0, "", (), ""
    places = range(len(records))
    if sampled := len(records) > SAMPLED:
        places = np.sort(np.random.default_rng(seed).choice(len(records), SAMPLED, replace=False)).tolist()
    try:
        renderer = Renderer(tokenizer, _UNLIMITED)
        for place in places:
            record = records[place]
            texts = _best_first(record)
            try:
                rendered = renderer.render(record.prompt, texts, record.source)
            except BadRow as bad:
                refused += 1
                refusal = refusal or f"{record.source} ({bad})"
                continue
            lengths = [len(ids) for ids in rendered.completions]
            prompts.append(len(rendered.prompt))
            completions.extend(lengths)
            totals.append(len(rendered.prompt) + max(lengths, default=0))
            if not shown:
                shown, shown_source = _decoded(rendered, tokenizer), record.source
    except DataError as error:
        findings.append(Finding(str(error), "No record can be trained on before this is mended."))
    over = sum(total > max_length for total in totals)
    holding, special, examples = _spelled(records, tokenizer)
    return TokenSurvey(
        tokenizer=str(tokenizer.name_or_path or "tokenizer"),
        max_length=max_length,
        records=len(totals) + refused,
        sampled=sampled,
        prompt=Lengths.of(prompts) if prompts else None,
        completion=Lengths.of(completions) if completions else None,
        over=share(over, len(totals)) if totals else None,
        refused=refused,
        refusal=refusal,
        special_records=holding,
        special=special,
        special_examples=examples,
        findings=tuple(findings),
        sample=shown,
        sample_source=shown_source,
    )


def _best_first(record: Preference) -> tuple[str, ...]:
    ranking = record.ranking()
    return record.completions if ranking is None else ranking.completions


def _decoded(rendered: Rendered, tokenizer: "PreTrainedTokenizerBase") -> tuple[Token, ...]:
    def tokens(ids: Sequence[int], scored: bool) -> tuple[Token, ...]:
        return tuple(Token(one, str(tokenizer.decode([one])), scored) for one in ids)

    return tokens(rendered.prompt, False) + tokens(rendered.completions[0] if rendered.completions else (), True)


def _spelled(
    records: Sequence[Preference], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[int, tuple[tuple[str, int], ...], tuple[str, ...]]:
    """Return how many records spell special tokens, which ones, and the sources of the first few."""
    special = special_tokens(tokenizer)
    if not special:
        return 0, (), ()
    pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
    begins = {spelling[0] for spelling in special}
    holding, counts, examples = 0, Counter[str](), []
    for record in records:
        texts = [*(message.content for message in record.prompt), *record.completions]
        # Looking for a single sign first is many times faster than the pattern.
        suspects = [text for text in texts if any(sign in text for sign in begins)]
        found = {spelling for text in suspects for spelling in pattern.findall(text)}
        counts.update(found)
        holding += bool(found)
        if found and len(examples) < _EXAMPLES:
            examples.append(record.source)
    return holding, tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0]))), tuple(examples)


def _template_findings(tokenizer: "PreTrainedTokenizerBase") -> list[Finding]:
    """Return the faults that a one-turn conversation shows; those that stop the renderer it reports itself."""
    if not tokenizer.chat_template:
        return [
            Finding(
                "The tokenizer has no chat template: prompts are written plainly, without marks of who speaks.",
                "Right for a base model. For a chat model set the template that it was trained with.",
            )
        ]
    chat: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
    try:
        asked = templated(tokenizer, chat, generation=True)
        alone = templated(tokenizer, chat, generation=False)
    except (BadRow, DataError):
        return []  # the renderer says so
    findings = []
    if asked == alone:
        findings.append(
            Finding(
                "The chat template writes nothing where an answer begins (no generation prompt): the model must also"
                " learn to write the mark of the assistant itself.",
                "Set a template that honours add_generation_prompt, unless the model was trained with this one.",
            )
        )
    bos = str(tokenizer.bos_token or "")
    own = bool(own_bos(tokenizer))
    if bos and asked.startswith(bos + bos):
        findings.append(
            Finding(
                f"The chat template begins a conversation with two BOS tokens ({bos}).",
                "Set a template that writes one: the model has never seen two.",
            )
        )
    elif bos and own and asked.startswith(bos):
        findings.append(
            Finding(
                f"Both the chat template and the tokenizer write a BOS token ({bos}). Here a conversation gets one;"
                " a program that tokenises the rendered text with special tokens gives it two.",
                "Where the trained model is served, tokenise rendered chats with add_special_tokens=False.",
            )
        )
    elif own:
        findings.append(
            Finding(
                f"The tokenizer begins texts with BOS ({bos}), its chat template does not: conversations have none.",
                "Right where the model was trained so; else begin the template with the BOS token.",
            )
        )
    return findings
