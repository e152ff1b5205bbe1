"""Which layout a model can be scored in: decided by trying, once, when it is loaded.

Recurrent and convolutional layers mix neighbouring columns, and some attentions cannot be told who may see whom: a
model like that would compute plausible, wrong log-probs from packed rows. No list of names decides that, but a probe.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from dpo.errors import ModelError
from dpo.model.forest import Forest, Group
from dpo.model.logprobs import completion_logps
from dpo.model.tree_attention import NAMES, Kernel, register

log = logging.getLogger("dpo")

Layout = Literal["packed", "padded"]

KNOWN_LAYERS = {"full_attention", "sliding_attention"}
RECURRENT_FIELDS = ("mamba_d_state", "mamba_d_ssm", "conv_L_cache", "linear_num_key_heads", "state_size")
LONGEST_WINDOW = 512
"""A sliding window up to this many tokens is probed with a prompt longer than it; a longer one costs too much."""

LEAK = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest movement of a log-prob outside a branch whose tokens changed, as a share of the movement inside it."""

CLOSE = {torch.float32: 2e-4, torch.bfloat16: 0.15, torch.float16: 0.03}
"""Largest difference of a token's log-prob between the layouts, in nats, and of gradients as a share of their norm."""


def choose_layout(network: Any, wanted: Literal["auto", "packed", "padded"], attention: str, pad_id: int) -> Layout:
    """Try packed rows on the loaded model, set its attention accordingly, and return the layout to score it in.

    Args:
        network: a causal language model in evaluation mode, no adapter on it yet.
        wanted: "auto" tries packed rows and falls back to padded ones, saying why; "packed" fails instead.
        attention: the attention implementation the model was asked to use; packed rows go with sdpa and flex_attention.
        pad_id: fills padded rows.

    Raises:
        ModelError: `wanted` is "packed" and the model cannot be scored so.
    """
    if wanted == "padded":
        return "padded"
    fault = _why_not(network, attention, pad_id)
    if fault is None:
        return "packed"
    if wanted == "packed":
        raise ModelError(
            f"model.layout='packed': {type(network).__name__} cannot be scored in packed rows: {fault}. Use "
            "model.layout=auto."
        )
    log.info("padded rows: %s cannot be scored in packed ones (%s)", type(network).__name__, fault)
    return "padded"


def _why_not(network: Any, attention: str, pad_id: int) -> str | None:
    """Return what keeps the model from packed rows, or None; in that case its attention has been set for them."""
    if attention not in NAMES:
        return f"model.attn_implementation is {attention}"
    if signs := _static_signs(network):
        return signs
    kernel: Kernel = "flex_attention" if attention == "flex_attention" else "sdpa"
    before = network.config._attn_implementation
    register()
    try:
        network.set_attn_implementation(NAMES[kernel])
        found = probe(network, pad_id)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model of unknown make answers to unknown arguments, padded rows remain
        log.debug("packed rows failed", exc_info=True)
        found = None
        fault = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    else:
        fault = found.fault(network.dtype)
    if fault is not None:
        network.set_attn_implementation(before)
    return fault


def _static_signs(network: Any) -> str | None:
    config = network.config.get_text_config()
    if strange := set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS:
        return f"it has layers of type {', '.join(sorted(map(str, strange)))}"
    if getattr(network, "_is_stateful", False) or any(getattr(config, key, None) for key in RECURRENT_FIELDS):
        return "it has recurrent or convolutional layers"
    if not getattr(network, "_supports_attention_backend", False):
        return "its attention is of its own make"
    return None


@final
@dataclass(frozen=True)
class Probe:
    """What a model did with packed rows."""

    leak: float
    """Largest movement of a log-prob where nothing may move, as a share of the movement where tokens changed."""
    difference: float
    """Largest difference of a token's log-prob from its sequence alone, in nats."""
    gradient: float
    """Distance of the embeddings' gradient from that of padded rows, as a share of its norm."""
    floor: float
    """The model's own noise: `difference`, of padded rows."""

    def fault(self, dtype: torch.dtype) -> str | None:
        """Return what is wrong, or None. Written so that NaN is a fault."""
        close = CLOSE[dtype]
        if not self.leak <= LEAK[dtype]:
            return f"changing one completion moves what must not see it, by {self.leak:.1e} of its own movement"
        if not self.difference <= max(8 * self.floor, close):
            return f"log-probs differ by {self.difference:.1e} nats from those of each sequence alone"
        if not self.gradient <= close:
            return f"gradients differ by {self.gradient:.1e} of their norm from those of padded rows"
        return None


def probe(network: Any, pad_id: int) -> Probe:
    """Score a few made groups in packed rows, in padded rows and one by one; the model is left as it was."""
    config = network.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    longest = window + 8 if window <= LONGEST_WINDOW else 24
    draw = torch.Generator().manual_seed(0)

    def made(length: int) -> list[int]:
        return torch.randint(3, config.vocab_size - 1, (length,), generator=draw).tolist()

    groups = [Group(made(max(24, longest)), [made(9), made(13)]), Group(made(11), [made(7), made(7), made(5)])]
    changed = [
        Group(groups[0].prompt, [made(9), groups[0].completions[1]]),
        Group(groups[1].prompt, [groups[1].completions[0], made(7), groups[1].completions[2]]),
    ]
    device = network.device
    with _evaluating(network):
        packed, gradient = _scored(network, Forest.packed(groups).to(device))
        padded, plain_gradient = _scored(network, Forest.padded(groups, pad_id).to(device))
        moved, _ = _scored(network, Forest.packed(changed).to(device))
        alone = torch.cat(
            [
                _scored(network, Forest.padded([Group(group.prompt, [completion])], pad_id).to(device))[0]
                for group in groups
                for completion in group.completions
            ]
        )
    sequence = Forest.packed(groups).sequence.to(device)
    untouched = (sequence != 0) & (sequence != 3)
    movement = (moved - packed).abs()
    return Probe(
        leak=(movement[untouched].max() / movement[~untouched].max()).item(),
        difference=(packed - alone).abs().max().item(),
        gradient=((gradient - plain_gradient).norm() / plain_gradient.norm()).item(),
        floor=(padded - alone).abs().max().item(),
    )


def _scored(network: Any, forest: Forest) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "ids hidden"]]:
    """Return token log-probs, and the gradient of their weighted sum with respect to the embedding of each token id."""
    seen: list[Tensor] = []

    def watch(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    hook = network.get_input_embeddings().register_forward_hook(watch)
    try:
        with torch.enable_grad():
            tokens = completion_logps(network, forest).tokens
            weights = torch.linspace(0.5, 1.5, len(tokens), dtype=tokens.dtype, device=tokens.device)
            (gradient,) = torch.autograd.grad((tokens * weights).sum(), seen[0])
    finally:
        hook.remove()
    wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    real = forest.group.flatten() >= 0
    ids, flat = forest.input_ids.flatten()[real], gradient.flatten(0, -2)[real].to(wide)
    known, place = ids.unique(return_inverse=True)
    return tokens.detach(), flat.new_zeros(len(known), flat.shape[-1]).index_add(0, place, flat)


@contextmanager
def _evaluating(network: Any) -> Iterator[None]:
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
