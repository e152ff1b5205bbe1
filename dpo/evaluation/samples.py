"""What the policy says on its own: samples, their gold reward, and how far it moved from its reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from dpo.evaluation.measures import Estimate, mean
from dpo.model.base import LanguageModel, Role
from dpo.model.rollout import Sample, sample
from dpo.model.views import score
from dpo.rewards import TextReward, judge


@final
@dataclass(frozen=True)
class Spoken:
    """Samples of one role on the evaluation prompts, and what was measured on them."""

    prompts: tuple[str, ...]
    samples: tuple[tuple[Sample, ...], ...]
    """[prompt][sample]."""
    gold: tuple[float, ...] | None
    """Mean gold reward of each prompt's samples."""
    kl: tuple[float, ...]
    """Mean summed log-ratio log policy - log reference of each prompt's samples, nats a completion (k1)."""
    length: tuple[float, ...]
    """Mean tokens of each prompt's samples."""

    def estimates(self) -> dict[str, Estimate]:
        """Return means with intervals over prompts, by the ledger's names."""
        found = {"kl/policy_reference": mean(self.kl), "eval/length": mean(self.length)}
        if self.gold is not None:
            found["eval/gold_reward"] = mean(self.gold)
        return found


def speak(
    model: LanguageModel,
    prompts: Sequence[tuple[str, tuple[int, ...]]],
    *,
    role: Role,
    gold: TextReward | None,
    per_prompt: int,
    max_new_tokens: int,
    seed: int,
) -> Spoken:
    """Sample `per_prompt` completions for every prompt (text and ids) at temperature 1 and measure them.

    Raises:
        RewardError: where the gold reward fails or is not finite; names the prompt.
    """
    ids = [prompt for _, prompt in prompts for _ in range(per_prompt)]
    spoken = sample(
        model, ids, role=role, max_new_tokens=max_new_tokens, seed=seed, batch_size=128, progress=f"{role} answers"
    )
    ratios = log_ratios(model, spoken) if role == "policy" else [0.0] * len(spoken)
    rows = [spoken[i : i + per_prompt] for i in range(0, len(spoken), per_prompt)]
    return Spoken(
        prompts=tuple(text for text, _ in prompts),
        samples=tuple(map(tuple, rows)),
        gold=None
        if gold is None
        else tuple(
            _average([judge(gold, text, one.text, "evaluation.gold") for one in row])
            for (text, _), row in zip(prompts, rows, strict=True)
        ),
        kl=tuple(_average(ratios[i : i + per_prompt]) for i in range(0, len(ratios), per_prompt)),
        length=tuple(_average([len(one.completion) for one in row]) for row in rows),
    )


def log_ratios(model: LanguageModel, samples: Sequence[Sample], batch_size: int = 16) -> list[float]:
    """Return log policy - log reference of each sample, summed over its tokens, in nats."""
    ratios: list[float] = []
    for start in range(0, len(samples), batch_size):
        keys = [(one.prompt, one.completion) for one in samples[start : start + batch_size]]
        roles: tuple[Role, Role] = ("policy", "reference")
        sums: list[Tensor] = []
        for role in roles:
            with model.reading(role):
                sums.append(score(model, keys, role).sums)
        policy, reference = sums
        ratios += (policy - reference).tolist()
    return ratios


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)
