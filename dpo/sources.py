"""Where the examples of an optimiser step come from: the dataset, or what the policy sampled a moment ago.

An RL loop is no other trainer, but another source of batches. A rollout samples completions, lets rewards judge them
and hands them out in the view that the objective reads: all of them with their advantages (PPO, RLOO, GRPO), the best
against the worst of each prompt (online DPO and every other pair objective), or the best alone (rejection sampling,
with SFT).
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Self, final

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from dpo.batches import Division, Plan, within_memory
from dpo.data import Example
from dpo.errors import TrainingError
from dpo.losses import AdaptsKL, Objective, RolloutObjective
from dpo.model.base import LanguageModel
from dpo.model.episodes import Episode, Item, pack, record, unpack, unpadded
from dpo.model.logprobs import NOTHING, Spread
from dpo.model.rollout import Sample, sample
from dpo.model.scalar import values
from dpo.model.views import Scored, score
from dpo.rewards import Answer, Reward, RewardTerm, checked
from dpo.rewards.repetition import repetition

log = logging.getLogger("dpo")

ON_POLICY = ("pairs", "demonstrations", "rollouts")
"""Views that a rollout can be read in."""


class RolloutConfig(BaseModel):
    """What is sampled from the policy on the way, who judges it, and how often it is learned from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rewards: tuple[RewardTerm, ...]
    """What a completion is worth: the weighted sum of these."""
    watch: tuple[RewardTerm, ...] = ()
    """Further rewards to follow and not to train on, each in the ledger under custom/reward_KIND."""
    value: str | None = None
    """What the value role starts as: the folder of a reward model ("previous" or "stage:NAME" for that of an earlier
    stage), as InstructGPT does; null: a fresh one. For objectives that train one."""
    prompts: str | None = None
    """A file of prompts to sample for (null: those of the training rows)."""
    prompts_per_rollout: Annotated[int, Field(ge=1)] = 32
    """Prompts sampled for between two rounds of updates."""
    completions_per_prompt: Annotated[int, Field(ge=1)] = 1
    """Completions sampled for each of them; objectives that compare completions of one prompt need 2 or more."""
    epochs: Annotated[int, Field(ge=1)] = 1
    """Passes of updates over a rollout. The first update is on-policy, later ones reuse samples of a policy that has
    moved."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """Longest completion, in tokens."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Divides the logits in sampling, and in the log-probs of policy and reference alike."""
    sampling_batch_size: Annotated[int, Field(ge=1)] = 64
    """Completions sampled side by side."""
    missing_end: Literal["keep", "subtract", "replace"] = "subtract"
    """What becomes of the reward of a completion without an end token: nothing; `missing_end_penalty` is subtracted; or
    it takes minus that as its reward."""
    missing_end_penalty: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """In units of reward."""
    kl_limit: Annotated[float, Field(gt=0)] | None = None
    """End the updates on a rollout once the policy is further than this from the one that sampled it, in nats a token
    (policy/approx_kl); null: never."""
    kl_budget: Annotated[float, Field(gt=0)] | None = None
    """End the training once a rollout's mean KL to the reference is above this, in nats a completion: further gains in
    a learned reward are then more likely exploited than real (arXiv:2210.10760). Null: never."""

    @field_validator("rewards")
    @classmethod
    def _some(cls, given: tuple[RewardTerm, ...]) -> tuple[RewardTerm, ...]:
        if not given:
            raise ValueError("got none, expected at least one, for instance [package.module:function]")
        return given

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        if self.missing_end == "keep" and "missing_end_penalty" in self.model_fields_set and self.missing_end_penalty:
            raise ValueError("rollout.missing_end_penalty is not used with missing_end='keep': leave one of them out")
        return self


class Source(ABC):
    """Hands out the examples of each optimiser step."""

    steps: int
    """Optimiser steps of the run."""
    examples: int
    """Training examples (prompts, where completions are sampled)."""

    spent: bool = False
    """Whether training is to end here, before the last step."""

    @abstractmethod
    def batch(self, step: int) -> tuple[Sequence[Item], Mapping[str, float]]:
        """Return the examples of optimiser step `step` (from 0), and metrics of where they come from."""

    @abstractmethod
    def after(self, step: int, kl: float | None) -> int:
        """Return the step that follows `step`, whose update left the policy `kl` nats a token from the sampler."""

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], Any]:
        """Return what a checkpoint must hold to go on in the middle: tensors, and plain JSON."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor], plain: Any) -> None:
        """Take up what `state` returned."""


@final
class Dataset(Source):
    """The dataset's own examples, in the plan's order."""

    def __init__(self, examples: Sequence[Example], plan: Plan) -> None:
        """Hand out `examples` as `plan` says."""
        self._examples, self._plan = examples, plan
        self.steps, self.examples = plan.steps, plan.examples

    def batch(self, step: int) -> tuple[Sequence[Item], Mapping[str, float]]:
        """Return the step's examples; nothing is to be told of them."""
        return [self._examples[i] for i in self._plan.indices(step)], {}

    def after(self, step: int, kl: float | None) -> int:  # noqa: ARG002
        """Return the next step."""
        return step + 1

    def state(self) -> tuple[dict[str, Tensor], Any]:
        """Return nothing: the order is a function of the step."""
        return {}, None

    def restore(self, tensors: Mapping[str, Tensor], plain: Any) -> None:
        """Take up nothing."""


@final
@dataclass(frozen=True)
class Judges:
    """Who judges a rollout."""

    reward: Reward
    """What the policy is trained on."""
    gold: Reward | None = None
    """A known true reward, watched and never trained on."""
    watched: Mapping[str, Reward] = field(default_factory=dict)
    """Further rewards that are watched, by the name of their metric."""
    disagreement: Callable[[], Sequence[float]] = list
    """The spread of a reward ensemble over the answers judged last; empty without one."""


@final
class Rollouts(Source):
    """Completions that the policy samples anew every so many optimiser steps.

    Rollout r samples with the policy as it is after the updates on rollout r - 1, for prompts and with random numbers
    that follow from the seed and r alone. In between, its completions are part of a checkpoint.
    """

    def __init__(
        self,
        model: LanguageModel,
        objective: Objective,
        config: RolloutConfig,
        prompts: Sequence[Example],
        demonstrations: Sequence[Example],
        judges: Judges,
        *,
        batch: int,
        epochs: int,
        max_steps: int | None,
        seed: int,
        division: Division,
    ) -> None:
        """Sample for `prompts`; `batch` completions (or pairs) make an optimiser step, `epochs` passes the run."""
        self.model, self.objective, self.config = model, objective, config
        self._prompts, self._demonstrations, self._judges = prompts, demonstrations, judges
        self._seed, self._division = seed, division
        all_sampled = objective.view == "rollouts"
        handed_out = config.prompts_per_rollout * (config.completions_per_prompt if all_sampled else 1)
        self._updates = Plan.of(handed_out, batch, config.epochs, None, seed)
        """The steps on one rollout; the order is drawn anew for each."""
        rollouts = math.ceil(len(prompts) * epochs / config.prompts_per_rollout)
        steps = rollouts * self._updates.steps
        self.steps, self.examples = min(steps, max_steps or steps), len(prompts)
        self.kl_coefficient = float(objective.kl_coefficient) if isinstance(objective, RolloutObjective) else 0.0
        """Of the next rollout; kept in checkpoints."""
        self._items: list[Item] = []
        self._current: int | None = None
        """The rollout that `_items` is."""
        self._used = 0

    def batch(self, step: int) -> tuple[Sequence[Item], Mapping[str, float]]:
        """Return the step's completions; where it is the first on a rollout, sample it and tell what it is like."""
        rollout, within = divmod(step, self._updates.steps)
        told: Mapping[str, float] = {}
        if rollout != self._current:
            told = self._collect(rollout)
        order = replace(self._updates, seed=self._seed * 7_919 + rollout)
        self._used += 1
        return [self._items[i] for i in order.indices(within)], told

    def after(self, step: int, kl: float | None) -> int:
        """Return the next step, or the first of the next rollout where the policy has moved too far on this one."""
        limit = self.config.kl_limit
        if limit is None or kl is None or kl <= limit:
            return step + 1
        return min(self.steps, (step // self._updates.steps + 1) * self._updates.steps)

    def state(self) -> tuple[dict[str, Tensor], Any]:
        """Return the rollout that is being learned from, and the KL coefficient."""
        tensors, plain = pack(self._items)
        counts = {"rollout": self._current, "used": self._used, "kl_coefficient": self.kl_coefficient}
        return tensors, {**counts, "items": plain}

    def restore(self, tensors: Mapping[str, Tensor], plain: Any) -> None:
        """Take up what `state` returned."""
        self._items = list(unpack(tensors, plain["items"], self.model.device))
        self._current, self._used = plain["rollout"], plain["used"]
        self.kl_coefficient = plain["kl_coefficient"]

    def _collect(self, rollout: int) -> dict[str, float]:
        """Sample, judge and credit rollout number `rollout`; return its metrics."""
        per_prompt = self.config.completions_per_prompt
        self.model.training(False)
        prompts = [self._prompts[i] for i in self._drawn(rollout) for _ in range(per_prompt)]
        samples = sample(
            self.model,
            [one.prompt for one in prompts],
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            seed=self._seed * 1_000_003 + rollout,
            batch_size=self.config.sampling_batch_size,
            progress=f"rollout {rollout + 1}",
        )
        examples = [
            replace(prompt, completions=(one.completion,), texts=(one.text,))
            for prompt, one in zip(prompts, samples, strict=True)
        ]
        answers = [_answer(prompt, one) for prompt, one in zip(prompts, samples, strict=True)]
        rewards = checked(self._judges.reward, answers)
        told = self._watched(answers, rewards)
        scores = [self._ended(score, one) for score, one in zip(rewards, samples, strict=True)]
        episodes, more = self._episodes(rollout, examples, scores)
        told |= more
        self._items = self._handed_out(episodes, prompts)
        if rollout > 0:
            told["rollout/updates"] = self._used
        self._current, self._used = rollout, 0
        return told

    def _drawn(self, rollout: int) -> list[int]:
        """Return the rollout's prompts: the next ones in a seeded order, drawn anew for every pass."""
        size = self.config.prompts_per_rollout
        return _stream(len(self._prompts), self._seed, range(rollout * size, (rollout + 1) * size))

    def _ended(self, reward: float, one: Sample) -> float:
        if one.finished or self.config.missing_end == "keep":
            return reward
        penalty = self.config.missing_end_penalty
        return reward - penalty if self.config.missing_end == "subtract" else -penalty

    def _watched(self, answers: Sequence[Answer], rewards: Sequence[float]) -> dict[str, float]:
        told = {
            "rollout/length": _mean([one.tokens for one in answers]),
            "rollout/finished": _mean([float(one.finished) for one in answers]),
            "rollout/repetition": _mean([repetition(one.completion) for one in answers]),
        }
        for name, reward in self._judges.watched.items():
            told[name] = _mean(checked(reward, answers))
        if spread := self._judges.disagreement():
            told["rollout/disagreement"] = _mean(spread)
        if self._judges.gold is not None:
            told["rollout/gold_reward"] = _mean(checked(self._judges.gold, answers))
        return told | {"rollout/score": _mean(rewards), "rollout/score_std": _deviation(rewards)}

    def _episodes(
        self, rollout: int, examples: Sequence[Example], scores: Sequence[float]
    ) -> tuple[list[Episode], dict[str, float]]:
        """Let every role speak of the samples, and credit them."""
        needs = self.objective
        policy = self._score(examples, "policy", Spread(entropy=True))
        reference = self._score(examples, "reference")
        value = self._values(examples) if needs.needs_values else None
        assert policy.entropies is not None
        entropy = torch.cat(list(policy.entropies)).mean().item()
        told = {"rollout/entropy": entropy}
        log_ratio = policy.sums - reference.sums
        kl = told["kl/policy_reference"] = log_ratio.mean().item()
        self.spent = self.config.kl_budget is not None and kl > self.config.kl_budget
        if rollout == 0 and self.model.starts_at_reference:
            refuse_drift(self.model, (log_ratio.abs().sum() / policy.lengths.sum()).item())
        demonstrations = self._paired(rollout, len(examples)) if needs.needs_demonstrations else None
        episodes = [
            Episode(
                example=example,
                score=scores[n],
                prompt_index=n // self.config.completions_per_prompt,
                sampler=policy.tokens[n],
                reference=reference.tokens[n] if needs.needs_reference else None,
                sampler_value=None if value is None else value[n],
                temperature=self.config.temperature,
                demonstration=None if demonstrations is None else demonstrations[n],
            )
            for n, example in enumerate(examples)
        ]
        if not isinstance(needs, RolloutObjective):
            return episodes, told
        told["rollout/kl_coefficient"] = self.kl_coefficient
        credited = needs.credit(record(episodes, policy.tokens), self.kl_coefficient)
        assert credited.advantage is not None
        advantage = unpadded(credited.advantage, credited.completion_mask)
        target = credited.value_target
        targets = None if target is None else unpadded(target, credited.completion_mask)
        if isinstance(needs, AdaptsKL):
            self.kl_coefficient = needs.next_kl_coefficient(self.kl_coefficient, kl, len(episodes))
        return [
            replace(one, advantage=advantage[n], value_target=None if targets is None else targets[n])
            for n, one in enumerate(episodes)
        ], told

    def _handed_out(self, episodes: list[Episode], prompts: Sequence[Example]) -> list[Item]:
        """Return the rollout in the objective's view."""
        if self.objective.view == "rollouts":
            return list(episodes)
        size = self.config.completions_per_prompt
        found: list[Item] = []
        for start in range(0, len(episodes), size):
            group = sorted(episodes[start : start + size], key=lambda one: one.score, reverse=True)
            best, worst = group[0], group[-1]
            kept = (best,) if self.objective.view == "demonstrations" else (best, worst)
            tied = len(kept) > 1 and (best.score == worst.score or best.completions == worst.completions)
            found.append(
                replace(
                    prompts[start],
                    completions=tuple(one.completions[0] for one in kept),
                    texts=tuple(one.example.texts[0] for one in kept),
                    weight=0.0 if tied else prompts[start].weight,  # a tie says nothing
                )
            )
        return found

    def _paired(self, rollout: int, count: int) -> list[Example]:
        places = range(rollout * count, (rollout + 1) * count)
        return [self._demonstrations[i] for i in _stream(len(self._demonstrations), self._seed + 1, places)]

    def _score(self, examples: Sequence[Example], role: str, spread: Spread = NOTHING) -> Scored:
        def work(batches: list[list[int]]) -> Scored:
            with self.model.reading(role):
                parts = [
                    score(
                        self.model,
                        [(examples[n].prompt, examples[n].completions[0]) for n in batch],
                        role,
                        spread,
                        temperature=self.config.temperature,
                    )
                    for batch in batches
                ]
            return _joined(parts, batches)

        return within_memory(work, examples, self._division)[0]

    def _values(self, examples: Sequence[Example]) -> list[Tensor]:
        def work(batches: list[list[int]]) -> list[Tensor]:
            found: dict[int, Tensor] = {}
            with self.model.reading("value"):
                for batch in batches:
                    wanted = [(examples[n].prompt, examples[n].completions[0]) for n in batch]
                    found |= dict(zip(batch, values(self.model, wanted), strict=True))
            return [found[n] for n in range(len(examples))]

        return within_memory(work, examples, self._division)[0]


START_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Most that policy and reference may differ at step 0, in nats a token: the rounding of different batch shapes."""


def refuse_drift(model: LanguageModel, moved: float) -> None:
    """Refuse a policy that is not its reference before the first update: every objective would start wrong.

    Args:
        model: policy and reference.
        moved: mean |policy - reference| of the completions, in nats a token.

    Raises:
        TrainingError: they differ by more than rounding.
    """
    tolerance = START_TOLERANCE[model.dtype]
    log.info("reference: %s; at step 0 within %.1e nats a token", model.reference_is, moved)
    if not moved <= tolerance:
        raise TrainingError(
            f"At step 0 the policy differs from its reference by {moved:.3g} nats a token, expected at most "
            f"{tolerance:g}. The reference is {model.reference_is}. Something makes them different models: an "
            "adapter that does not start at zero, dropout in the base, or weights changed after loading."
        )


def _stream(count: int, seed: int, places: range) -> list[int]:
    """Return what stands at `places` of an endless order of 0 ... count - 1, drawn anew for every pass."""
    order = Plan(count, count, len(places), seed)
    passes = {n: order.indices(n) for n in range(places.start // count, (places.stop - 1) // count + 1)}
    return [passes[place // count][place % count] for place in places]


def _answer(prompt: Example, one: Sample) -> Answer:
    return Answer(
        prompt=prompt.prompt_messages[-1].content,
        completion=one.text,
        tokens=len(one.completion),
        finished=one.finished,
        reference=prompt.texts[0] if prompt.texts else None,
        source=prompt.source,
        key=(one.prompt, one.completion),
    )


def _joined(parts: Sequence[Scored], batches: Sequence[Sequence[int]]) -> Scored:
    """Put what was scored in batches back into the order of the examples."""
    order = torch.tensor([n for batch in batches for n in batch]).argsort()

    def whole(name: str) -> Tensor:
        together = torch.cat([getattr(part, name) for part in parts])
        return together[order.to(together.device)]

    def each(name: str) -> list[Tensor] | None:
        if getattr(parts[0], name) is None:
            return None
        flat = [one for part in parts for one in getattr(part, name)]
        return [flat[n] for n in order.tolist()]

    return Scored(whole("sums"), whole("lengths"), each("tokens") or [], each("collisions"), each("entropies"))


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _deviation(numbers: Sequence[float]) -> float:
    mean = _mean(numbers)
    return math.sqrt(_mean([(one - mean) ** 2 for one in numbers]))
