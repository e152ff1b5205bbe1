"""Make `pairs.jsonl`: the model answers each prompt several times, the gold reward says which answers are better.

    python data/sentiment/make.py --model PATH

takes minutes on two CPU cores and prints the figures of README.md.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.data.gold import sentiment

FOLDER: Final = Path(__file__).parent
BATCH_SIZE: Final = 128
MAX_NEW_TOKENS: Final = 40
TRAIN_SEED: Final = 0
EVAL_SEED: Final = 1
TRAIN_SAMPLES: Final = 8
"""Completions sampled per training prompt."""
EVAL_SAMPLES: Final = 4
"""Completions sampled per evaluation prompt."""
SMALLEST_GAP: Final = 0.3
"""A pair is kept when its gold scores differ by at least this much: a smaller gap is noise of the lexicon."""
LARGEST_LENGTH_GAP: Final = 6
"""Words by which the two completions of a pair may differ in length."""
PAIRS_PER_PROMPT: Final = 2


@dataclass(frozen=True)
class Sample:
    """One sampled completion."""

    text: str
    """As sampled, special tokens removed."""
    finished: bool
    """The model ended it by itself (EOS) within `MAX_NEW_TOKENS`."""


@dataclass(frozen=True)
class Pair:
    """One row of `pairs.jsonl`; the scores are gold rewards, -1 to 1."""

    prompt: str
    chosen: str
    rejected: str
    score_chosen: float
    score_rejected: float


def sample(model: Any, tokenizer: Any, prompts: Sequence[str], count: int, seed: int) -> list[list[Sample]]:
    """Sample `count` completions of each prompt at temperature 1 from the whole vocabulary."""
    torch.manual_seed(seed)
    repeated = [prompt for prompt in prompts for _ in range(count)]
    samples: list[Sample] = []
    for start in range(0, len(repeated), BATCH_SIZE):
        conversations = [[{"role": "user", "content": prompt}] for prompt in repeated[start : start + BATCH_SIZE]]
        inputs = tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(
            **inputs, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=MAX_NEW_TOKENS
        )
        for tokens in output[:, inputs["input_ids"].shape[1] :].tolist():
            finished = tokenizer.eos_token_id in tokens
            samples.append(Sample(tokenizer.decode(tokens, skip_special_tokens=True), finished))
        print(f"sampled {len(samples)} of {len(repeated)}", flush=True)
    return [samples[start : start + count] for start in range(0, len(samples), count)]


def pairs(prompt: str, samples: Sequence[Sample]) -> Iterator[Pair]:
    """Yield the pairs of one prompt, widest gold gap first; no completion stands in two of them.

    A completion that was cut off is left out: training appends EOS to every completion, and EOS in mid-sentence
    would teach the model to stop there. The two sides of a pair have about the same length: longer answers hold more
    good words, and without this rule the model learns to go on talking.
    """
    texts = dict.fromkeys(sample.text for sample in samples if sample.finished)  # distinct, in sampled order
    scores = {text: sentiment(prompt, text) for text in texts}
    candidates = [
        (chosen, rejected)
        for chosen, rejected in permutations(scores, 2)
        if scores[chosen] - scores[rejected] >= SMALLEST_GAP
        and abs(len(chosen.split()) - len(rejected.split())) <= LARGEST_LENGTH_GAP
    ]
    candidates.sort(key=lambda pair: scores[pair[1]] - scores[pair[0]])
    used: set[str] = set()
    for chosen, rejected in candidates:
        if not used & {chosen, rejected} and len(used) < 2 * PAIRS_PER_PROMPT:
            used |= {chosen, rejected}
            yield Pair(prompt, chosen, rejected, round(scores[chosen], 4), round(scores[rejected], 4))


def interval(means: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean, resampling prompts."""
    values = np.asarray(means)
    draws = np.random.default_rng(seed).choice(values, size=(10_000, len(values))).mean(axis=1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def main() -> None:
    """Sample, pair, write, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, default=FOLDER / "pairs.jsonl", help="where to write the pairs")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)

    prompts = (FOLDER / "prompts.txt").read_text(encoding="utf-8").splitlines()
    sampled = sample(model, tokenizer, prompts, TRAIN_SAMPLES, TRAIN_SEED)
    rows = [row for prompt, samples in zip(prompts, sampled, strict=True) for row in pairs(prompt, samples)]
    with arguments.output.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    finished = np.mean([sample.finished for samples in sampled for sample in samples])
    print(f"{len(prompts)} training prompts, {finished:.1%} of completions ended with EOS")
    print(f"{len(rows)} pairs over {len({row.prompt for row in rows})} prompts")
    print(f"mean gold: chosen {np.mean([row.score_chosen for row in rows]):.3f}", end=", ")
    print(f"rejected {np.mean([row.score_rejected for row in rows]):.3f}")

    prompts = (FOLDER / "eval_prompts.txt").read_text(encoding="utf-8").splitlines()
    sampled = sample(model, tokenizer, prompts, EVAL_SAMPLES, EVAL_SEED)
    means = [
        float(np.mean([sentiment(prompt, sample.text) for sample in samples]))
        for prompt, samples in zip(prompts, sampled, strict=True)
    ]
    finished = np.mean([sample.finished for samples in sampled for sample in samples])
    low, high = interval(means)
    print(f"{len(prompts)} evaluation prompts: mean gold {np.mean(means):.3f} [{low:.3f}, {high:.3f}]", end=", ")
    print(f"{finished:.1%} ended with EOS")


if __name__ == "__main__":
    main()
