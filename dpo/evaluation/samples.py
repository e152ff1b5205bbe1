"""What the policy says on its own: samples, their gold reward, and how far it moved from its reference."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

from dpo.checkpoint import atomic_write_text
from dpo.errors import CheckpointError
from dpo.estimates import Estimate, mean
from dpo.evaluation.measures import REMEDY
from dpo.model.base import LanguageModel, Role
from dpo.model.rollout import sample
from dpo.model.views import all_sums
from dpo.rewards import TextReward, judge


@final
@dataclass(frozen=True)
class EvaluationPrompt:
    """An evaluation prompt."""

    text: str
    """Of its last turn."""
    ids: tuple[int, ...]
    group: str | None = None
    """Annotator or population, as the data has it."""


@final
@dataclass(frozen=True)
class Answer:
    """One sampled completion, and what was measured on it."""

    text: str
    """Without special tokens."""
    tokens: int
    """The end token included where the model wrote it."""
    finished: bool
    """Whether the model ended by itself."""
    log_ratio: float
    """log policy - log reference, summed over its tokens, nats: one sample of the KL (k1)."""
    gold: float | None
    """The known true reward, or None without one."""


@final
@dataclass(frozen=True)
class Spoken:
    """Samples of one role on the evaluation prompts. Prompts are the independent units: each has its mean."""

    prompts: tuple[str, ...]
    answers: tuple[tuple[Answer, ...], ...]
    """[prompt][sample]."""
    of_group: tuple[str | None, ...] = ()
    """Of each prompt's row of the data: annotator or population. () where no row has one."""

    @property
    def gold(self) -> tuple[float, ...] | None:
        """Mean gold reward of each prompt's answers, or None without one."""
        values = [[one.gold for one in row if one.gold is not None] for row in self.answers]
        return tuple(map(_average, values)) if all(values) else None

    @property
    def kl(self) -> tuple[float, ...]:
        """Mean summed log-ratio of policy to reference of each prompt's answers, nats a completion (k1)."""
        return tuple(_average([one.log_ratio for one in row]) for row in self.answers)

    @property
    def length(self) -> tuple[float, ...]:
        """Mean tokens of each prompt's answers."""
        return tuple(_average([one.tokens for one in row]) for row in self.answers)

    def estimates(self) -> dict[str, Estimate]:
        """Return means with intervals over prompts, by the ledger's names."""
        found = {"kl/policy_reference": mean(self.kl), "eval/length": mean(self.length)}
        if self.gold is not None:
            found["eval/gold_reward"] = mean(self.gold)
        return found

    def groups(self) -> dict[str, "Spoken"]:
        """Return the answers to each group's prompts; those without one are in none."""
        rows = list(zip(self.of_group or [None] * len(self.prompts), self.prompts, self.answers, strict=True))
        found = {}
        for name in dict.fromkeys(group for group, _, _ in rows if group is not None):
            own = [(prompt, answers) for group, prompt, answers in rows if group == name]
            found[name] = Spoken(tuple(prompt for prompt, _ in own), tuple(answers for _, answers in own))
        return found

    def write(self, file: Path) -> None:
        """Write one JSON row a prompt."""
        groups = [{"group": group} for group in self.of_group] or [{} for _ in self.prompts]
        rows = [
            {"prompt": prompt, "answers": [asdict(one) for one in answers], **group}
            for prompt, answers, group in zip(self.prompts, self.answers, groups, strict=True)
        ]
        atomic_write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    @classmethod
    def read(cls, file: Path) -> "Spoken":
        """Return what `write` wrote.

        Raises:
            CheckpointError: a row is damaged; names `file:line`.
        """
        prompts, answers, groups = [], [], []
        for number, line in enumerate(file.read_text(encoding="utf-8").rstrip("\n").split("\n"), start=1):
            try:
                row = json.loads(line)
                prompts.append(str(row["prompt"]))
                answers.append(tuple(Answer(**one) for one in row["answers"]))
                groups += [row["group"]] if "group" in row else []
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{file}:{number}: is damaged ({error!r}), expected a prompt with its answers. {REMEDY}"
                ) from error
        return cls(tuple(prompts), tuple(answers), tuple(groups))


def speak(
    model: LanguageModel,
    prompts: Sequence[EvaluationPrompt],
    *,
    role: Role,
    gold: TextReward | None,
    per_prompt: int,
    max_new_tokens: int,
    seed: int,
) -> Spoken:
    """Sample `per_prompt` completions for every prompt at temperature 1 and measure them.

    Raises:
        RewardError: where the gold reward fails or is not finite; names the prompt.
    """
    ids = [prompt.ids for prompt in prompts for _ in range(per_prompt)]
    said = sample(
        model, ids, role=role, max_new_tokens=max_new_tokens, seed=seed, batch_size=128, progress=f"{role} answers"
    )
    ratios = (
        log_ratios(model, [(one.prompt, one.completion) for one in said]) if role == "policy" else [0.0] * len(said)
    )
    answers = [
        Answer(
            one.text,
            len(one.completion),
            one.finished,
            ratio,
            None if gold is None else judge(gold, prompts[n // per_prompt].text, one.text, "evaluation.gold"),
        )
        for n, (one, ratio) in enumerate(zip(said, ratios, strict=True))
    ]
    rows = [tuple(answers[i : i + per_prompt]) for i in range(0, len(answers), per_prompt)]
    grouped = any(prompt.group is not None for prompt in prompts)
    groups = tuple(prompt.group for prompt in prompts) if grouped else ()
    return Spoken(tuple(prompt.text for prompt in prompts), tuple(rows), groups)


def log_ratios(model: LanguageModel, keys: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[float]:
    """Return log policy - log reference of each (prompt, completion), summed over its tokens, in nats."""
    policy, reference = all_sums(model, keys, "policy"), all_sums(model, keys, "reference")
    return [p - r for p, r in zip(policy, reference, strict=True)]


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)
