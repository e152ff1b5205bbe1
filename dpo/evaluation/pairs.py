"""Held-out pairs, measured alike whatever the objective: by how far the policy moved towards the chosen completion.

An objective's own reward (SimPO's mean log-prob, KTO's single judgements) cannot be set beside another's. The log-ratio
of policy to reference can: it is the reward under which the policy is optimal (arXiv:2305.18290, eq. 4, beta = 1).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

from pydantic import with_config

from dpo.checkpoint import atomic_write_text
from dpo.data import Example
from dpo.estimates import Estimate, mean
from dpo.evaluation.rows import read_rows
from dpo.model.base import LanguageModel
from dpo.model.reference import Reference
from dpo.model.views import all_sums, keys


@final
@with_config({"extra": "forbid"})
@dataclass(frozen=True)
class Pair:
    """One held-out pair."""

    prompt: str
    """The text of the prompt, all turns: pairs of one prompt are not independent."""
    source: str
    """`file:row`."""
    chosen: float
    """log policy - log reference of the chosen completion, nats."""
    rejected: float
    """Likewise of the rejected one."""
    group: str | None = None
    """Annotator or population, as the data has it."""


@final
@dataclass(frozen=True)
class HeldOut:
    """All held-out pairs of a run."""

    pairs: tuple[Pair, ...]

    def by_prompt(self) -> dict[str, Mapping[str, float]]:
        """Return each measure's value of every prompt (the mean over its pairs): {measure: {prompt: value}}."""
        prompts: dict[str, list[Pair]] = {}
        for one in self.pairs:
            prompts.setdefault(one.prompt, []).append(one)
        return {
            "eval/pair/accuracy": {
                prompt: sum((p.chosen > p.rejected) + 0.5 * (p.chosen == p.rejected) for p in own) / len(own)
                for prompt, own in prompts.items()
            },
            "eval/pair/margin": {
                prompt: sum(p.chosen - p.rejected for p in own) / len(own) for prompt, own in prompts.items()
            },
        }

    def estimates(self) -> dict[str, Estimate]:
        """Return means with intervals over prompts, by the ledger's names."""
        return {name: mean([*values.values()]) for name, values in self.by_prompt().items()} if self.pairs else {}

    def groups(self) -> dict[str, "HeldOut"]:
        """Return the pairs of each group; those without one are in none."""
        names = dict.fromkeys(one.group for one in self.pairs if one.group is not None)
        return {name: HeldOut(tuple(one for one in self.pairs if one.group == name)) for name in names}

    def write(self, file: Path) -> None:
        """Write one JSON row a pair."""
        atomic_write_text(file, "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in self.pairs))

    @classmethod
    def read(cls, file: Path) -> "HeldOut":
        """Return what `write` wrote.

        Raises:
            CheckpointError: a row is damaged; names `file:line`.
        """
        return cls(tuple(read_rows(file, Pair, "a pair with its log-ratios")))


def hold_out(model: LanguageModel, reference: Reference, examples: Sequence[Example]) -> HeldOut:
    """Score pairs in the policy and, from the cache where it knows them, in the reference."""
    wanted = keys(examples)
    reference.prepare(wanted, progress=True)
    policy, base = all_sums(model, wanted, "policy"), reference.sums(wanted).tolist()
    ratios = [p - r for p, r in zip(policy, base, strict=True)]
    return HeldOut(
        tuple(
            Pair("\n".join(turn.content for turn in one.prompt_messages), one.source, chosen, rejected, one.group)
            for one, chosen, rejected in zip(examples, ratios[::2], ratios[1::2], strict=True)
        )
    )
