"""What a run's evaluation settings ask for, measured: on its own answers, on held-out examples, and by probes."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dpo.data import Checked, DataConfig, Example, Renderer, check
from dpo.data.records import Messages
from dpo.estimates import Estimate, auc, mean
from dpo.evaluation.achieved import Achieved
from dpo.evaluation.measures import by_agreement, calibration, calibration_error, pair_accuracy
from dpo.evaluation.pairs import hold_out
from dpo.evaluation.probes import probe
from dpo.evaluation.samples import EvaluationPrompt, Spoken, speak
from dpo.losses import Objective
from dpo.losses.reduce import comparisons
from dpo.model.base import LanguageModel, Role
from dpo.model.reference import ReferenceLogps
from dpo.rewards import find_reward
from dpo.settings import Run
from dpo.types import JudgementLogps, LossInput, LossOutput, PairLogps, RankingScores


def achieved_by(
    run: Run, model: LanguageModel, checked: Checked, pairs: Sequence[Example], role: Role = "policy"
) -> Achieved:
    """Measure what `role` says, how far the policy moved on the held-out pairs, and the probes asked for."""
    asked = {"choices": run.evaluation.choices, "opinions": run.evaluation.sycophancy, "text": run.evaluation.text}
    return Achieved(
        speak_for(run, model, checked, role),
        hold_out(model, ReferenceLogps(model), pairs) if pairs else None,
        probe(model, role, **asked) if any(one is not None for one in asked.values()) else None,
    )


def rows_of(spoken: Spoken) -> list[tuple[str, str, float | None, int, float]]:
    """Return every answer as trackers show it: prompt, text, gold reward, tokens, log-ratio in nats."""
    return [
        (prompt, one.text, one.gold, one.tokens, one.log_ratio)
        for prompt, answers in zip(spoken.prompts, spoken.answers, strict=True)
        for one in answers
    ]


def speak_for(run: Run, model: LanguageModel, checked: Checked, role: Role = "policy") -> Spoken | None:
    """Return the answers of `role` to the evaluation prompts, or to the held-out ones; None where there are none."""
    prompts = _evaluation_prompts(run, model, checked)
    if not prompts:
        return None
    return speak(
        model,
        prompts,
        role=role,
        gold=None if run.evaluation.gold is None else find_reward(run.evaluation.gold),
        per_prompt=run.evaluation.samples_per_prompt,
        max_new_tokens=run.evaluation.max_new_tokens,
        seed=run.evaluation.seed,
    )


def _evaluation_prompts(run: Run, model: LanguageModel, checked: Checked) -> list[EvaluationPrompt]:
    """Return the prompts to sample for; the same whatever is trained on."""
    records = checked.eval
    if run.evaluation.prompts is not None:
        records = check(DataConfig.model_validate({"train": run.evaluation.prompts, "eval_share": 0})).train
    renderer = Renderer(model.tokenizer, run.data.max_length, run.data.overlong)
    found: dict[Messages, EvaluationPrompt] = {}
    for record in records if run.evaluation.max_prompts else ():
        if len(ids := renderer.prompt(record.prompt)) < run.data.max_length:
            found.setdefault(record.prompt, EvaluationPrompt(record.prompt[-1].content, ids, record.group))
        if len(found) == run.evaluation.max_prompts:
            break
    return list(found.values())


def reward_report(record: LossInput | None) -> dict[str, Any]:
    """Return how far a reward model's probabilities can be believed on held-out comparisons."""
    if not isinstance(record, RankingScores):
        return {}
    differences = _differences(record)
    if not differences:
        return {}
    better, _ = comparisons(record)
    bins = calibration(differences)
    found: dict[str, Any] = {"calibration": [asdict(one) for one in bins], "calibration_error": calibration_error(bins)}
    if record.preference is not None and (record.preference != 1).any():
        agreement = record.preference[record.prompt_index[better]].tolist()
        found["accuracy_by_agreement"] = {
            level: asdict(one) for level, one in by_agreement(differences, agreement).items()
        }
    return found


def _differences(record: RankingScores) -> list[float]:
    """Return the score of the better completion minus that of the worse, for every comparison."""
    better, worse = comparisons(record)
    return (record.scores[better] - record.scores[worse]).double().tolist()


def by_own_reward(record: LossInput | None, out: LossOutput | None) -> dict[str, Estimate]:
    """Return the measures on held-out examples that have an interval: pair accuracy by the objective's own reward."""
    if out is None:
        return {}
    if isinstance(record, PairLogps):
        chosen, rejected = out.rewards.double().unbind(1)
        return {"eval/reward/accuracy": pair_accuracy(chosen.tolist(), rejected.tolist())}
    if isinstance(record, RankingScores):
        return {"eval/reward/accuracy": _ranking_accuracy(record)}
    if isinstance(record, JudgementLogps) and "reward/accuracy" in out.metrics:
        value = out.metrics["reward/accuracy"].item()
        return {"eval/reward/accuracy": auc(value, int(record.desirable.sum()), int((~record.desirable).sum()))}
    return {}


def _ranking_accuracy(record: RankingScores) -> Estimate:
    """Return the share of comparisons rightly ordered; comparisons of one prompt are one unit of the interval."""
    better, _ = comparisons(record)
    prompts = record.prompt_index[better].tolist()
    hits: dict[int, list[float]] = {}
    for prompt, difference in zip(prompts, _differences(record), strict=True):
        hits.setdefault(prompt, []).append((difference > 0) + 0.5 * (difference == 0))
    if all(len(one) == 1 for one in hits.values()):
        return pair_accuracy([one[0] for one in hits.values()], [0.5] * len(hits))
    return mean([sum(one) / len(one) for one in hits.values()])


def all_measures(objective: Objective, record: LossInput | None, achieved: Achieved) -> dict[str, dict[str, float]]:
    """Return everything that was measured, with intervals, as summary.json holds it."""
    estimates = by_own_reward(record, None if record is None else objective(record)) | achieved.estimates()
    return {name: asdict(estimate) for name, estimate in estimates.items()}


def group_report(achieved: Achieved) -> dict[str, Any]:
    """Return what was measured on the pairs and prompts of each group apart; nothing where the data names none."""
    groups = achieved.groups()
    plain = {group: {name: asdict(one) for name, one in own.estimates().items()} for group, own in groups.items()}
    return {"groups": plain} if plain else {}
