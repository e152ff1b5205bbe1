"""An adapter merged into its base, and the proof that the merged model says what the adapter said.

Weights of 16 bits are rounded: an update smaller than half the distance of two neighbouring numbers is lost. bfloat16
keeps 8 bits of each number, float16 keeps 11. What is lost is therefore measured, on the model as it was written.
"""

import gc
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, final

import psutil
import torch

from dpo.data import check, held_out_pairs, prepare
from dpo.errors import ModelError
from dpo.model.base import (
    LanguageModel,
    LoRA,
    ModelConfig,
    choose_device,
    choose_dtype,
    from_pretrained,
    load_base,
    load_tokenizer,
)
from dpo.model.reference import Key, batches
from dpo.model.rollout import sample
from dpo.model.views import keys, score
from dpo.settings import Run

log = logging.getLogger("dpo")

Precision = Literal["auto", "bfloat16", "float16", "float32"]
Dtype = Literal["bfloat16", "float16", "float32"]

CHECKED_TOKENS: Final = 2048
"""Held-out completion tokens at most that are compared."""

MEAN_TOLERANCE: Final = 0.1
"""Mean |difference| of a token's log-prob, in nats, above which a merged model is refused."""

MAX_TOLERANCE: Final = 2.0
"""The same of the worst token."""

LOST_SHARE: Final = 0.2
"""Share of what training moved from which the loss by rounding is warned of."""

SAMPLED_PROMPTS, SAMPLED_TOKENS = 16, 32
"""Own answers that are compared, and their length, where the data holds no pairs."""


@final
@dataclass(frozen=True)
class Agreement:
    """How two models' log-probs of the same tokens differ, in nats a token."""

    tokens: int
    mean: float
    """Mean |difference|."""
    largest: float
    """Largest |difference|."""

    @property
    def tolerable(self) -> bool:
        """Whether it is within the tolerance; what is not finite never is."""
        return self.mean <= MEAN_TOLERANCE and self.largest <= MAX_TOLERANCE

    def __str__(self) -> str:
        return f"mean {self.mean:.4f}, largest {self.largest:.4f} nats a token ({self.tokens} tokens)"


@final
@dataclass(frozen=True)
class Merge:
    """What became of a model when its adapter was merged into its base."""

    dtype: Dtype
    """Of the merged weights."""
    computed_in: str
    """What the log-probs were computed in, of both models: float32 leaves the difference of the weights alone."""
    agreement: Agreement
    """Of the merged model, as written, and the adapter on weights that are not quantised."""
    moved: Agreement
    """Of the adapter and the base without it: what training did to these tokens."""
    quantised: Agreement | None
    """Of the merged model and the adapter on the 4-bit weights it was trained on; None where it was on others."""

    @property
    def lost(self) -> float:
        """Difference by rounding over what training moved: 0 is a perfect merge, 1 may be none."""
        return self.agreement.mean / self.moved.mean if self.moved.mean else 0.0

    def lines(self) -> list[str]:
        """Return it in words."""
        found = [
            f"merged in {self.dtype}, against the adapter: {self.agreement}, computed in {self.computed_in}",
            f"training had moved these tokens by {self.moved}: {100 * self.lost:.0f} % of that is the difference",
        ]
        if self.quantised is not None:
            found.append(f"against the adapter on the 4-bit weights that it was trained on: {self.quantised}")
        return found


def merge(run: Run, adapter: Path, folder: Path, precision: Precision) -> Merge:
    """Write the run's base with the adapter in its weights into `folder`, read it back and compare.

    Args:
        run: the run.
        adapter: where its adapter lies, or its whole weights where it has trained these.
        folder: where to write; it exists.
        precision: of the weights; auto takes the run's own where that has 16 bits, else bfloat16.

    Raises:
        ModelError: the models differ by more than the tolerance.
        DataError: the held-out rows cannot be read.
    """
    dtype = _dtype(run.model, precision)
    plain = run.model.model_copy(update={"quantization": "none", "dtype": dtype})
    network = _merged(plain, adapter)
    parameters = sum(one.numel() for one in network.parameters())
    network.save_pretrained(folder)
    load_tokenizer(run.model).save_pretrained(folder)
    del network
    gc.collect()
    found = _compared(run, plain, adapter, folder, _computed_in(plain, parameters))
    _judge(found, adapter)
    return found


def _dtype(model: ModelConfig, precision: Precision) -> Dtype:
    if precision != "auto":
        return precision
    own = choose_dtype(model.dtype, choose_device(model.device))
    return "float16" if own == torch.float16 else "bfloat16"


def _merged(config: ModelConfig, adapter: Path) -> Any:
    """Return the plain network with the adapter in its weights, as PEFT merges it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    kind, place = getattr(torch, config.dtype), {"": choose_device(config.device).type}
    if config.lora is None:
        own = config.model_copy(update={"name": str(adapter), "revision": None})
        return from_pretrained(AutoModelForCausalLM, own, dtype=kind, device_map=place)
    network = from_pretrained(AutoModelForCausalLM, config, dtype=kind, device_map=place)
    return PeftModel.from_pretrained(network, str(adapter)).merge_and_unload(safe_merge=True)


def _judge(found: Merge, adapter: Path) -> None:
    """Say what was lost.

    Raises:
        ModelError: more than the tolerance.
    """
    for line in found.lines():
        log.info("%s", line)
    if not found.agreement.tolerable:
        raise ModelError(
            f"{adapter}: {found.lines()[0]}; expected a mean of at most {MEAN_TOLERANCE:g} and no token above "
            f"{MAX_TOLERANCE:g}. {_finer(found.dtype)}"
        )
    if found.quantised is not None:
        log.warning("Trained on 4-bit weights, merged into others: this is not the model that the card measures.")
    if found.lost > LOST_SHARE:
        log.warning(
            "Rounding to %s costs %.0f %% of what training moved. %s",
            found.dtype,
            100 * found.lost,
            _finer(found.dtype),
        )


def _finer(dtype: Dtype) -> str:
    finer = {"bfloat16": "Give --dtype float16 (finer steps) or float32", "float16": "Give --dtype float32"}
    return f"{finer.get(dtype, 'The weights or the adapter may be damaged: train again')}, or use --format adapter."


# --- comparing ------------------------------------------------------------------------------------------------------

Logps = Sequence[torch.Tensor]
"""Of completions, each `(tokens,)`, nats."""


def _compared(run: Run, plain: ModelConfig, adapter: Path, folder: Path, computed_in: str) -> Merge:
    exact = plain.model_copy(update={"dtype": computed_in})
    rows, trained, untrained = _scored(run, exact, adapter, None)
    own = exact.model_copy(update={"name": str(folder), "revision": None, "adapter": None, "lora": LoRA()})
    model = LanguageModel.start(load_base(own), own, 0)
    written = _logps(model, rows, "reference")  # adapters off: the merged network itself
    del model
    gc.collect()
    quantised = None
    if run.model.quantization != "none":
        _, as_trained, _ = _scored(run, run.model, adapter, rows)
        quantised = agreement(written, as_trained)
    dtype: Any = plain.dtype
    return Merge(dtype, computed_in, agreement(written, trained), agreement(trained, untrained), quantised)


def _computed_in(config: ModelConfig, parameters: int) -> str:
    """Return float32 where weights twice of that size would still fit, else the dtype of the weights."""
    device = choose_device(config.device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return "float32" if 2 * 4 * parameters <= free else config.dtype


def _scored(run: Run, config: ModelConfig, adapter: Path, rows: Sequence[Key] | None) -> tuple[list[Key], Logps, Logps]:
    """Return held-out completions with their log-probs in the policy and in the base without what was trained."""
    own = config
    if config.lora is not None:  # the saved adapter holds all, the one it began as included
        own = config.model_copy(update={"adapter": str(adapter), "reference": "base"})
    model = LanguageModel.start(load_base(own), own, run.loop.seed)
    if config.lora is None:
        model.restore(adapter)
    wanted = list(rows) if rows is not None else _rows(run, model)
    found = _logps(model, wanted, "policy"), _logps(model, wanted, "reference")
    del model
    gc.collect()
    return wanted, *found


def _rows(run: Run, model: LanguageModel) -> list[Key]:
    """Return held-out completions, both of each pair; where the data has none, the model's own answers to prompts."""
    checked = check(run.data)
    found = keys(held_out_pairs(checked, model.tokenizer))
    if not found:
        prepared = prepare(checked, model.tokenizer, "prompts")
        prompts = [one.prompt for one in (prepared.eval or prepared.train)[:SAMPLED_PROMPTS]]
        said = sample(model, prompts, max_new_tokens=SAMPLED_TOKENS, seed=run.evaluation.seed)
        found = [(one.prompt, one.completion) for one in said]
    kept: list[Key] = []
    tokens = 0
    for one in dict.fromkeys(found):
        tokens += len(one[1])
        if kept and tokens > CHECKED_TOKENS:
            break
        kept.append(one)
    return kept


def _logps(model: LanguageModel, wanted: Sequence[Key], role: str) -> Logps:
    found: dict[Key, torch.Tensor] = {}
    with model.reading(role):
        for batch in batches(wanted, model.base.layout):
            some = [(tuple(group.prompt), tuple(one)) for group in batch for one in group.completions]
            scored = score(model, some, role).tokens
            found.update(zip(some, (one.double().cpu() for one in scored), strict=True))
    return [found[key] for key in wanted]


def agreement(first: Logps, second: Logps) -> Agreement:
    """Compare the log-probs of two models on the same completions, token by token."""
    apart = (torch.cat(list(first)) - torch.cat(list(second))).abs()
    if not apart.isfinite().all():
        return Agreement(len(apart), math.inf, math.inf)
    return Agreement(len(apart), apart.mean().item(), apart.max().item())
