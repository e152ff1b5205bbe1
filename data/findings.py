"""What is wrong with surveyed data, in words, and what to do about it."""

from collections.abc import Iterator

from dpo.data.render import Overlong
from dpo.data.surveyed import Leaks, Side, Survey, Twins
from dpo.data.tokens import Finding, TokenSurvey

DROPPED = 0.1
"""Shares of dropped rows above this are worth a word."""
ALIKE = 0.01
"""Shares of nearly repeated prompts above this are worth a word."""
BY_LENGTH = 0.55
"""Length tells the label where the interval of what a rule by length gets right begins above this."""
UNEVEN = 0.2
"""Labels are uneven where the rarer one has less than this share."""
OVER = 0.05
"""Shares of over-long records above this are worth a word."""
FEW = 100
"""Fewer evaluation records than this give wide intervals."""

_FATES = {"drop": "dropped", "truncate_prompt": "cut at the prompt's start", "truncate_completion": "cut at the end"}


def findings(survey: Survey, overlong: Overlong = "drop") -> tuple[Finding, ...]:
    """Return what to look at before training, the gravest first; nothing where all is well.

    Args:
        survey: of the data.
        overlong: what becomes of over-long records.
    """
    found = list(survey.tokens.findings) if survey.tokens else []
    found += _dropped(survey)
    if survey.leaks:
        found += _leaked(survey.leaks)
    found += _of_side(survey.train)
    if survey.tokens:
        found += _of_tokens(survey.tokens, overlong)
    if survey.eval is None:
        found.append(Finding("No record evaluates.", "Set eval_share above 0, or name a held-out file in eval."))
    elif survey.eval.records < FEW:
        found.append(
            Finding(
                f"The evaluation rests on {survey.eval.records:,} records: its intervals will be wide.",
                f"Raise eval_share, or name a file in eval that gives {FEW} or more.",
            )
        )
    return tuple(found)


def _dropped(survey: Survey) -> Iterator[Finding]:
    if survey.report.evaluation_only:
        yield Finding(
            f"{survey.source} is for evaluation only: {survey.report.evaluation_only}",
            "Train on another set, and name this one in eval.",
        )
    for report in (survey.report, survey.eval_report):
        if report is not None and report.faulty > DROPPED * report.read:
            counts = {reason: dropped for reason, dropped in report.dropped.items() if not reason.asked}
            worst = max(counts, key=counts.__getitem__)
            yield Finding(
                f"{report.faulty:,} of {report.read:,} rows of {report.source} cannot be used"
                f" ({report.faulty / report.read:.0%}), most of them for: {worst.label}.",
                worst.fix,
            )


def _leaked(leaks: Leaks) -> Iterator[Finding]:
    known = leaks.repeated + leaks.near + leaks.similar
    if known:
        yield Finding(
            f"{known:,} of {leaks.records:,} evaluation records have a prompt that training knows as well, or nearly:"
            f" {leaks.repeated:,} the same, {leaks.near:,} but for punctuation, {leaks.similar:,} similar."
            f"{_such_as(leaks.examples)} The evaluation will look better than it is.",
            "Remove these prompts from one side, or name an evaluation file of another origin in eval.",
        )


def _of_side(side: Side) -> Iterator[Finding]:
    if (pairs := side.pairs) is not None:
        if pairs.contradictions:
            yield Finding(
                f"Pairs that are stated both ways round, and so pull against each other: {pairs.contradictions:,}."
                f"{_such_as(pairs.examples)}",
                "Put such rows together into one, with the share of votes for the better completion as agreement.",
            )
        if pairs.by_length.low > BY_LENGTH:
            rule = "longer" if pairs.longer else "shorter"
            yield Finding(
                f"Choosing the {rule} completion without reading gets {pairs.by_length.value:.0%} of the pairs right:"
                f" a model can learn {rule!r} in place of 'better'.",
                "Prefer pairs of about equal length, or an objective that divides by length (simpo, dponorm, lddpo);"
                " compare answers at equal length.",
            )
    if (thumbs := side.thumbs) is not None:
        rarer = min(thumbs.desirable.value, 1 - thumbs.desirable.value)
        if rarer < UNEVEN:
            yield Finding(
                f"{thumbs.desirable.value:.0%} of the judged completions are desirable.",
                "Balance them with objective.desirable_weight and objective.undesirable_weight, or judge more of the"
                " rarer kind."
                if rarer
                else "Add completions with the other label: judgements of one kind alone teach nothing.",
            )
        if (auc := thumbs.by_length) is not None and (auc.low > BY_LENGTH or auc.high < 1 - BY_LENGTH):
            rule = "longer" if auc.value > 0.5 else "shorter"
            yield Finding(
                f"A desirable completion is {rule} than an undesirable one in {max(auc.value, 1 - auc.value):.0%} of"
                f" the cases: a model can learn {rule!r} in place of 'better'.",
                "Judge completions of both kinds at about equal length.",
            )
    repeats = side.repeats
    if repeats.near + repeats.similar > ALIKE * side.records:
        yield Finding(
            f"{repeats.near + repeats.similar:,} of {side.records:,} training records have nearly the prompt of an"
            f" earlier one ({repeats.near:,} equal but for punctuation, {repeats.similar:,} similar)."
            f"{_such_as(repeats.examples)} What is said often weighs more.",
            "Keep one of each kind, unless the repetition is meant.",
        )
    if side.weightless:
        yield Finding(
            f"Records of weight 0, which teach nothing: {side.weightless:,}.", "Remove them, or raise weight."
        )
    if side.votes is not None and side.votes.undecided:
        yield Finding(
            f"Records with an agreement of 0.5, whose voters did not decide: {side.votes.undecided:,}.",
            "Remove them, or leave them out with filter.min_agreement.",
        )


def _of_tokens(tokens: TokenSurvey, overlong: Overlong) -> Iterator[Finding]:
    if tokens.refused:
        yield Finding(
            f"{tokens.refused:,} of {tokens.records:,} records cannot be rendered, first {tokens.refusal}.",
            "Change the turns to those that the chat template takes, or set another template.",
        )
    if tokens.over is not None and tokens.over.value > OVER:
        yield Finding(
            f"{tokens.over.value:.0%} of the records have more than max_length={tokens.max_length:,} tokens and would"
            f" be {_FATES[overlong]} (overlong={overlong}).",
            "Raise max_length as far as memory allows (dpo train ... --plan says how far), or choose overlong.",
        )
    if tokens.special:
        named = ", ".join(spelling for spelling, _ in tokens.special[:5])
        yield Finding(
            f"Training records whose texts spell special tokens ({named}): {tokens.special_records:,}, first in"
            f" {tokens.special_examples[0]}. They are trained as ordinary text.",
            "Harmless here; check that they do not come from a template that was rendered into the data.",
        )


def _such_as(examples: Twins) -> str:
    return f" For instance {examples[0][0]} and {examples[0][1]}." if examples else ""
