"""What the policy says on its own: samples, what they are worth, and how far it moved from its reference."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, final

from pydantic import Field, with_config
from typing_extensions import TypedDict  # typing's own is refused by pydantic below Python 3.12

from dpo.checkpoint import atomic_write_text
from dpo.estimates import Estimate, mean
from dpo.evaluation.rows import read_rows
from dpo.model.base import LanguageModel, Role
from dpo.model.rollout import Sample, sample
from dpo.model.views import all_sums
from dpo.rewards import Answer as Judged
from dpo.rewards import Reward, TextReward, checked, judge


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
class Proxy:
    """A learned reward that scores answers beside the gold one: what a policy may be optimised too far against."""

    reward: Reward
    identity: str
    """Equal where the scores of two models are on one scale: a hash of the reward models and of how they are added."""
    own: bool
    """Whether it is what the run itself was trained on."""


@final
@with_config({"extra": "forbid"})
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
    proxy: float | None = None
    """What a reward model says of it, or None without one."""


@final
@dataclass(frozen=True)
class Spoken:
    """Samples of one role on the evaluation prompts. Prompts are the independent units: each has its mean."""

    prompts: tuple[str, ...]
    answers: tuple[tuple[Answer, ...], ...]
    """[prompt][sample]."""
    of_group: tuple[str | None, ...] = ()
    """Of each prompt's row of the data: annotator or population. () where no row has one."""
    proxy_by: str = ""
    """The identity of the proxy; empty without one."""
    reference_proxy: tuple[float, ...] = ()
    """The proxy's mean for the reference's answers to each prompt: where the policy's own reward began. () where it was
    not measured."""

    @property
    def gold(self) -> tuple[float, ...] | None:
        """Mean gold reward of each prompt's answers, or None without one."""
        return self._means(lambda one: one.gold)

    @property
    def proxy(self) -> tuple[float, ...] | None:
        """Mean proxy reward of each prompt's answers, or None without one."""
        return self._means(lambda one: one.proxy)

    def _means(self, of: Callable[[Answer], float | None]) -> tuple[float, ...] | None:
        values = [[value for one in row if (value := of(one)) is not None] for row in self.answers]
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
        if self.proxy is not None:
            found["eval/proxy_reward"] = mean(self.proxy)
        return found

    def groups(self) -> dict[str, "Spoken"]:
        """Return the answers to each group's prompts; those without one are in none."""
        found = {}
        for name in dict.fromkeys(group for group in self.of_group if group is not None):
            own = [n for n, group in enumerate(self.of_group) if group == name]
            found[name] = Spoken(
                tuple(self.prompts[n] for n in own),
                tuple(self.answers[n] for n in own),
                proxy_by=self.proxy_by,
                reference_proxy=tuple(self.reference_proxy[n] for n in own if self.reference_proxy),
            )
        return found

    def write(self, file: Path) -> None:
        """Write one JSON row a prompt."""
        rows: list[dict[str, Any]] = [
            {"prompt": prompt, "answers": [asdict(one) for one in answers]}
            for prompt, answers in zip(self.prompts, self.answers, strict=True)
        ]
        scored_by = [self.proxy_by] * len(rows) if self.proxy_by else ()
        told = {"group": self.of_group, "proxy_by": scored_by, "reference_proxy": self.reference_proxy}
        for name, values in told.items():
            for row, value in zip(rows, values, strict=bool(values)):
                row[name] = value
        atomic_write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    @classmethod
    def read(cls, file: Path) -> "Spoken":
        """Return what `write` wrote.

        Raises:
            CheckpointError: a row is damaged; names `file:line`.
        """
        rows = read_rows(file, _Row, "a prompt with its answers")
        return cls(
            prompts=tuple(row["prompt"] for row in rows),
            answers=tuple(row["answers"] for row in rows),
            of_group=tuple(row["group"] for row in rows if "group" in row),
            proxy_by=rows[-1].get("proxy_by", ""),
            reference_proxy=tuple(row["reference_proxy"] for row in rows if "reference_proxy" in row),
        )


@with_config({"extra": "forbid"})
class _Row(TypedDict):
    """A prompt as it stands in the file; every row has the same of the fields that need not be there."""

    prompt: str
    answers: Annotated[tuple[Answer, ...], Field(min_length=1)]
    group: NotRequired[str | None]
    proxy_by: NotRequired[str]
    reference_proxy: NotRequired[float]


def speak(
    model: LanguageModel,
    prompts: Sequence[EvaluationPrompt],
    *,
    role: Role,
    gold: TextReward | None,
    per_prompt: int,
    max_new_tokens: int,
    seed: int,
    proxy: Proxy | None = None,
) -> Spoken:
    """Sample `per_prompt` completions for every prompt at temperature 1 and measure them.

    Raises:
        RewardError: where the gold reward or the proxy fails or is not finite; names the prompt.
    """
    ids = [prompt.ids for prompt in prompts for _ in range(per_prompt)]
    said = sample(
        model, ids, role=role, max_new_tokens=max_new_tokens, seed=seed, batch_size=128, progress=f"{role} answers"
    )
    ratios = (
        log_ratios(model, [(one.prompt, one.completion) for one in said]) if role == "policy" else [0.0] * len(said)
    )
    asked = [prompt.text for prompt in prompts for _ in range(per_prompt)]
    proxies = [None] * len(said) if proxy is None else _scored(proxy, asked, said)
    answers = [
        Answer(
            one.text,
            len(one.completion),
            one.finished,
            ratio,
            None if gold is None else judge(gold, prompt, one.text, "evaluation.gold"),
            score,
        )
        for prompt, one, ratio, score in zip(asked, said, ratios, proxies, strict=True)
    ]
    rows = [tuple(answers[i : i + per_prompt]) for i in range(0, len(answers), per_prompt)]
    grouped = any(prompt.group is not None for prompt in prompts)
    groups = tuple(prompt.group for prompt in prompts) if grouped else ()
    scored_by = "" if proxy is None else proxy.identity
    return Spoken(tuple(prompt.text for prompt in prompts), tuple(rows), groups, scored_by)


def _scored(proxy: Proxy, asked: Sequence[str], said: Sequence[Sample]) -> list[float]:
    """Return what the proxy says of each sample; it reads the tokens of the whole prompt, not its last turn alone."""
    return checked(
        proxy.reward,
        [
            Judged(
                prompt, one.text, len(one.completion), one.finished, None, "evaluation", (one.prompt, one.completion)
            )
            for prompt, one in zip(asked, said, strict=True)
        ],
    )


def log_ratios(model: LanguageModel, keys: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[float]:
    """Return log policy - log reference of each (prompt, completion), summed over its tokens, in nats."""
    policy, reference = all_sums(model, keys, "policy"), all_sums(model, keys, "reference")
    return [p - r for p, r in zip(policy, reference, strict=True)]


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)
