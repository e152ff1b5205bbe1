"""What a run's evaluation settings ask for, measured: on its own answers, on held-out examples, and by probes.

Beside the gold reward a reward model can score the answers, the proxy. It is that of evaluation.reward_model; without
one, a run that learns from reward models is scored by its own: the weighted sum of the learned terms of
rollout.rewards, each with the weight, the ensemble and the normalisation that it has in training. Rules among the terms
(functions, ROUGE, prices on length and repetition), the price of a missing end and the KL are left out: what they say
is no guess at what people prefer.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dpo.data import Checked, DataConfig, Example, Renderer, check
from dpo.data.records import Messages
from dpo.estimates import Estimate, auc, mean
from dpo.evaluation.achieved import Achieved
from dpo.evaluation.measures import by_agreement, calibration, calibration_error, pair_accuracy
from dpo.evaluation.pairs import hold_out
from dpo.evaluation.probes import probe
from dpo.evaluation.samples import EvaluationPrompt, Proxy, Spoken, speak
from dpo.losses import Objective
from dpo.losses.reduce import comparisons
from dpo.model.base import LanguageModel, Role, ScalarRole, check_scalar
from dpo.model.reference import ReferenceLogps
from dpo.model.scalar import LearnedReward, fingerprint
from dpo.rewards import ModelTerm, RewardTerm, build, find_reward
from dpo.settings import Run
from dpo.types import JudgementLogps, LossInput, LossOutput, PairLogps, RankingScores

REWARD: Role = "reward"
"""Of a reward model; the further members of an ensemble are reward-2, reward-3, ..."""

PROXY: Role = "proxy"
"""Of the reward model that evaluation.reward_model names."""


def check_reward_model(run: Run) -> None:
    """Refuse an evaluation.reward_model that cannot score the run; no weights of the base are loaded.

    Raises:
        ModelError: its folder is absent or damaged, holds no reward model, or one of another base.
    """
    if run.evaluation.reward_model is not None:
        check_scalar(run.evaluation.reward_model, run.model.name, "evaluation.reward_model")


def reward_roles(run: Run) -> dict[Role, str]:
    """Return the folders of all reward models that stand beside the run's policy, by the names of their roles."""
    terms = () if run.rollout is None else (*run.rollout.rewards, *run.rollout.watch)
    return _named(terms) | ({} if run.trains_reward else _given(run))


def proxy_roles(run: Run) -> dict[Role, str]:
    """Return those of them that score the answers in evaluation; empty where none does."""
    return _given(run) or _named(_own_terms(run))


def frozen(roles: Mapping[Role, str]) -> list[ScalarRole]:
    """Return the roles as `LanguageModel.start` takes them."""
    return [ScalarRole(name, folder, trained=False) for name, folder in roles.items()]


def proxy_of(run: Run, model: LanguageModel) -> Proxy | None:
    """Return who scores the answers beside the gold reward; the model holds the roles that `proxy_roles` names."""
    roles, given = proxy_roles(run), _given(run)
    if not roles:
        return None
    terms = (ModelTerm(folders=tuple(given.values())),) if given else _own_terms(run)
    names = iter(roles)

    def learned(term: ModelTerm) -> LearnedReward:
        return LearnedReward(model, [next(names) for _ in term.folders], term.combine, term.variance_weight)

    return Proxy(build(terms, learned), _identity(terms), own=not given)


def _given(run: Run) -> dict[Role, str]:
    return {} if run.evaluation.reward_model is None else {PROXY: run.evaluation.reward_model}


def _own_terms(run: Run) -> tuple[ModelTerm, ...]:
    return () if run.rollout is None else tuple(one for one in run.rollout.rewards if isinstance(one, ModelTerm))


def _named(terms: Sequence[RewardTerm]) -> dict[Role, str]:
    folders = [folder for term in terms if isinstance(term, ModelTerm) for folder in term.folders]
    return {REWARD if n == 1 else f"{REWARD}-{n}": folder for n, folder in enumerate(folders, start=1)}


def _identity(terms: Sequence[ModelTerm]) -> str:
    """Return a hash of the reward models, by their content, and of how they are combined and added."""
    parts = [
        [one.weight, one.combine, one.variance_weight, *(fingerprint(Path(folder)) for folder in one.folders)]
        for one in terms
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def achieved_by(
    run: Run,
    model: LanguageModel,
    checked: Checked,
    pairs: Sequence[Example],
    role: Role = "policy",
    proxy: Proxy | None = None,
) -> Achieved:
    """Measure what `role` says, how far the policy moved on the held-out pairs, and the probes asked for.

    Where the proxy is the run's own, nobody else measures where it began: the reference's answers are scored as well.
    """
    spoken = speak_for(run, model, checked, role, proxy)
    if spoken is not None and proxy is not None and proxy.own:
        before = speak_for(run, model, checked, "reference", proxy)
        assert before is not None, "the prompts are the same"
        spoken = replace(spoken, reference_proxy=before.proxy)
    return Achieved(
        spoken,
        hold_out(model, ReferenceLogps(model), pairs) if pairs else None,
        probe(model, role, run.evaluation.probes) if run.evaluation.probes.any else None,
    )


def rows_of(spoken: Spoken) -> list[tuple[str, str, float | None, int, float]]:
    """Return every answer as trackers show it: prompt, text, gold reward, tokens, log-ratio in nats."""
    return [
        (prompt, one.text, one.gold, one.tokens, one.log_ratio)
        for prompt, answers in zip(spoken.prompts, spoken.answers, strict=True)
        for one in answers
    ]


def speak_for(
    run: Run, model: LanguageModel, checked: Checked, role: Role = "policy", proxy: Proxy | None = None
) -> Spoken | None:
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
        proxy=proxy,
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
