"""The log-prob engine: log-probs of completion tokens, full logits never materialised.

A vocabulary of 49,152 in float32 makes the logits of one 2 x 1024-token pair 400 MB; only completion positions
need any, and only one number each. `token_logprobs` walks over them in chunks and, where the head is frozen, forms the
gradient with respect to the hidden state at once, so that the backward pass is one multiplication per token.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dpo.errors import ModelError
from dpo.model.forest import Forest, Group

CHUNK = 256
"""Tokens whose logits exist at one time: at 256 the time equals full logits and the memory is a quarter."""


@final
@dataclass(frozen=True)
class Head:
    """The output layer: logits = softcap * tanh(scale * (W h + b) / softcap)."""

    weight: Float[Tensor, "vocabulary hidden"]
    bias: Float[Tensor, " vocabulary"] | None = None
    scale: float = 1.0
    """Multiplies the logits (Cohere's `logit_scale`, one over Granite's `logits_scaling`)."""
    softcap: float | None = None
    """Bound of the logits (Gemma 2's `final_logit_softcapping`)."""

    @classmethod
    def of(cls, network: Any) -> "Head":
        """Read the head of a transformers causal language model.

        Raises:
            ModelError: where the output layer is not a plain linear one.
        """
        layer = network.get_output_embeddings()
        if not isinstance(layer, torch.nn.Linear) or not layer.weight.is_floating_point():
            raise ModelError(
                f"{type(network).__name__}: got an output layer of type {type(layer).__name__}, expected torch's own "
                "Linear. Use a causal language model with an ordinary head, and leave the head out of the adapter."
            )
        config = network.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0
        if divisor := getattr(config, "logits_scaling", None):
            scale = scale / divisor
        return cls(
            weight=layer.weight,
            bias=layer.bias,
            scale=float(scale),
            softcap=getattr(config, "final_logit_softcapping", None),
        )

    def logits(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocabulary"]:
        """Return logits in float32 (float64 for float64 input)."""
        logits = hidden @ self.weight.t()
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.bias is not None:
            logits = logits + self.bias.to(logits.dtype)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


class _FrozenHeadLogprob(torch.autograd.Function):
    """Log-probs through a frozen head; the forward pass also forms d log-prob / d hidden."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, target: Tensor, chunk: int, keep_gradient: bool) -> Tensor:
        # ctx.needs_input_grad is true even under no_grad, hence the explicit flag.
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
        gradient = torch.empty_like(hidden) if keep_gradient else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            label = target[rows].unsqueeze(1)
            logits = head.logits(hidden[rows])
            of_label = logits.gather(1, label)
            top = logits.amax(-1, keepdim=True)
            slope = None
            if gradient is not None and head.softcap is not None:
                slope = 1 - (logits / head.softcap) ** 2  # d softcap * tanh(x / softcap) / dx = 1 - tanh^2
            unnormalised = logits.sub_(top).exp_()
            total = unnormalised.sum(-1, keepdim=True)
            logprobs[rows] = (of_label - top - total.log()).squeeze(1)
            if gradient is None:
                continue
            # d log p(y) / dz = 1[y] - softmax(z), kept unnormalised in the wide type until the last moment
            unnormalised.scatter_add_(1, label, -total)
            if slope is not None:
                unnormalised *= slope
            product = unnormalised.to(head.weight.dtype) @ head.weight
            gradient[rows] = (product.to(wide) * (-head.scale / total)).to(gradient.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].unsqueeze(1).to(gradient.dtype), None, None, None, None


def _recomputed(hidden: Float[Tensor, "tokens hidden"], target: Int[Tensor, " tokens"], head: Head) -> Tensor:
    return head.logits(hidden).log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1)


def token_logprobs(
    hidden: Float[Tensor, "tokens hidden"], target: Int[Tensor, " tokens"], head: Head, chunk: int = CHUNK
) -> Float[Tensor, " tokens"]:
    """Return log p(target | hidden) in nats, float32 (float64 for float64 input), differentiable in `hidden`.

    A head that is itself trained takes the variant that recomputes each chunk's logits in the backward pass.
    """
    hidden = hidden.to(head.weight.dtype)
    if head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad):
        if not torch.is_grad_enabled():
            parts = [_recomputed(h, t, head) for h, t in zip(hidden.split(chunk), target.split(chunk), strict=True)]
        else:
            parts = [
                checkpoint(_recomputed, h, t, head, use_reentrant=False)
                for h, t in zip(hidden.split(chunk), target.split(chunk), strict=True)
            ]
        return torch.cat(parts)
    keep_gradient = torch.is_grad_enabled() and hidden.requires_grad
    return _FrozenHeadLogprob.apply(hidden, head, target, chunk, keep_gradient)  # pyright: ignore[reportReturnType]


@final
@dataclass(frozen=True)
class CompletionLogps:
    """Log-probs of a forest's completions."""

    tokens: Float[Tensor, " tokens"]
    """Per completion token in nats, in the order of `Forest.target`."""
    sums: Float[Tensor, " completions"]
    """Summed over each completion's tokens."""
    lengths: Int[Tensor, " completions"]
    """Completion tokens."""


def completion_logps(network: Any, forest: Forest, chunk: int = CHUNK) -> CompletionLogps:
    """Score a forest with a causal language model in whatever role it stands.

    `network` is a bare transformers model (adapters injected or not) on the device of `forest`.
    """
    backbone = network.base_model  # the model without its head; adapters live inside it
    hidden = backbone(
        input_ids=forest.input_ids,
        attention_mask=forest.attention_mask.long(),
        position_ids=forest.position_ids,
        use_cache=False,
    ).last_hidden_state
    selected = hidden.reshape(-1, hidden.shape[-1]).index_select(0, forest.source)
    tokens = token_logprobs(selected, forest.target, Head.of(network), chunk)
    sums = tokens.new_zeros(forest.completions).index_add(0, forest.sequence, tokens)
    return CompletionLogps(tokens=tokens, sums=sums, lengths=forest.lengths)


def check_head(network: Any, tolerance: float) -> None:
    """Compare the chunked head with the model's own logits on a few tokens.

    Args:
        network: a causal language model.
        tolerance: largest admissible difference of a token's log-prob, in nats.

    Raises:
        ModelError: where they differ: the model does something between hidden state and logits that `Head` does not
            know, and every log-prob would be wrong in silence.
    """
    vocabulary = Head.of(network).weight.shape[0]
    ids = [(7 * n + 5) % vocabulary for n in range(12)]
    forest = Forest.padded([Group(ids[:1], [ids[1:]])], pad_id=0).to(network.device)
    with torch.no_grad():
        ours = completion_logps(network, forest).tokens
        logits = network(input_ids=forest.input_ids, use_cache=False).logits[0, :-1]
        own = logits.to(ours.dtype).log_softmax(-1).gather(1, forest.target.unsqueeze(1)).squeeze(1)
    worst = (own - ours).abs().max().item()
    if not worst <= tolerance:
        raise ModelError(
            f"{type(network).__name__}: the log-probs of the chunked head differ from the model's own by {worst:.3g} "
            f"nats, expected at most {tolerance:g}. The model transforms its logits in a way that is not supported."
        )
