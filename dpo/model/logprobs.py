"""The log-prob engine: log-probs of completion tokens, full logits never materialised.

A vocabulary of 49,152 in float32 makes the logits of one 2 x 1024-token pair 400 MB; only completion positions need
any, and only one number each. `token_scores` walks over tokens and vocabulary in tiles that stay in the processor's
cache and, where the head is frozen, forms the gradient with respect to the hidden state on the way, so that the
backward pass is one multiplication per token.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dpo.errors import ModelError
from dpo.model.forest import Forest, Group
from dpo.model.tree_attention import inputs

CHUNK = 512
"""Tokens whose logits are in the making at one time."""

TILE = {"cpu": 2**20, "cuda": 2**26}
"""Logits that exist at one time: 4 MiB in float32 on a CPU, to stay in its cache; few large kernels on a GPU."""


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

    def tempered(self, temperature: int | float) -> "Head":
        """Return the head whose final logits are these divided by `temperature` (> 0).

        softcap * tanh(scale x / softcap) / T = (softcap / T) * tanh((scale / T) x / (softcap / T)): the same head
        with both its numbers divided.

        Raises:
            ValueError: `temperature` is not above 0.
        """
        if not temperature > 0:
            raise ValueError(
                f"Head.tempered: got temperature {temperature}, expected a number above 0. What was sampled at 0 has "
                "log-prob 0 under what wrote it; score it at 1."
            )
        softcap = None if self.softcap is None else self.softcap / temperature
        return replace(self, scale=self.scale / temperature, softcap=softcap)

    def logits(
        self, hidden: Float[Tensor, "tokens hidden"], columns: slice = slice(None)
    ) -> Float[Tensor, "tokens columns"]:
        """Return logits in float32 (float64 for float64 input), of all tokens of the vocabulary or of some.

        In half precision they have been rounded on the way, in bfloat16 to steps of 1/8 at 16.
        """
        product = hidden @ self.weight[columns].t()
        return self._shaped(product.to(wide_dtype(product)), None if self.bias is None else self.bias[columns])

    def of_targets(
        self, hidden: Float[Tensor, "tokens hidden"], rows: Float[Tensor, "tokens hidden"], target: Tensor
    ) -> Float[Tensor, "tokens 1"]:
        """Return each token's logit of its target, summed in float32; `rows` are the targets' weights in it."""
        logits = (hidden.to(rows.dtype) * rows).sum(1, keepdim=True)
        return self._shaped(logits, None if self.bias is None else self.bias[target].unsqueeze(1))

    def _shaped(self, logits: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            logits = logits + bias.to(logits.dtype)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that log-probs are summed in: float32, or float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@final
@dataclass(frozen=True)
class Spread:
    """What is to be told of each whole distribution beside the target's log-prob."""

    entropy: bool = False
    """-sum over v of p(v) log p(v), in nats."""
    collision: bool = False
    """log of sum over v of p(v)^2, in nats."""


NOTHING = Spread()


class _FrozenHead(torch.autograd.Function):
    """Log-probs, and what `Spread` names, through a frozen head; the forward pass also forms d log-prob / d hidden.

    One pass over the vocabulary in tiles, with a running maximum m (Milakov and Gimelshein, arXiv:1805.02867). With
    rest = sum over v != y of exp(z_v - m) and total = rest + exp(z_y - m),

        d log p(y) / d h = scale * (rest / total * s_y W_y - 1 / total * sum over v != y of exp(z_v - m) s_v W_v),

    where s = 1 - (z / softcap)^2, or 1. The label stays out of the sum, so that nothing cancels where p(y) is near
    1; its own logit is summed in float32, which takes some of bfloat16's noise out of the log-prob.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, target: Tensor, chunk: int, keep_gradient: bool, spread: Spread
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        # ctx.needs_input_grad is true even under no_grad, hence the explicit flag.
        wide = wide_dtype(hidden)
        logprobs = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
        entropies = torch.empty_like(logprobs) if spread.entropy else None
        collisions = torch.empty_like(logprobs) if spread.collision else None
        gradient = torch.empty_like(hidden) if keep_gradient else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            part = _frozen_chunk(hidden[rows], head, target[rows], keep_gradient, spread, wide)
            for whole, piece in zip((logprobs, gradient, entropies, collisions), part, strict=True):
                if whole is not None:
                    whole[rows] = piece
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(*(one for one in (entropies, collisions) if one is not None))
        return logprobs, entropies, collisions

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        weight = cast("Tensor", upstream[0])
        return gradient * weight.unsqueeze(1).to(gradient.dtype), None, None, None, None, None


def _frozen_chunk(
    hidden: Tensor, head: Head, target: Tensor, keep_gradient: bool, spread: Spread, wide: torch.dtype
) -> tuple[Tensor, Any, Any, Any]:
    """Return log-probs, their gradient with respect to `hidden`, entropies and collisions; the last three if asked."""
    tokens, vocabulary = hidden.shape[0], head.weight.shape[0]
    tile = max(1, TILE.get(hidden.device.type, TILE["cpu"]) // tokens)
    lowest = torch.finfo(wide).min  # finite, so that no difference of two of them is NaN
    top = hidden.new_full((tokens, 1), lowest, dtype=wide)
    rest, moment, twice = (top.new_zeros(tokens, 1) for _ in range(3))
    rows = head.weight[target].to(wide)
    of_label = head.of_targets(hidden, rows, target)
    pull = hidden.new_zeros(hidden.shape, dtype=wide) if keep_gradient else None
    for start in range(0, vocabulary, tile):
        columns = slice(start, min(start + tile, vocabulary))
        logits = head.logits(hidden, columns)
        here = ((target >= columns.start) & (target < columns.stop)).unsqueeze(1)
        place = (target - columns.start).clamp(0, logits.shape[1] - 1).unsqueeze(1)
        slope = None
        if keep_gradient and head.softcap is not None:  # d softcap * tanh(x / softcap) / dx = 1 - tanh^2
            slope = 1 - (logits / head.softcap).square()
        logits.scatter_(1, place, torch.where(here, lowest / 2, logits.gather(1, place)))
        higher = torch.maximum(top, logits.amax(1, keepdim=True))
        rise, top = top - higher, higher
        mass = logits.sub_(top)
        if spread.entropy:  # sum of exp(u) u over u = z - m, moved to the new maximum
            moment = rise.exp() * (moment + rise * rest) + (mass.exp() * mass).sum(1, keepdim=True)
        mass = mass.exp_()
        if spread.collision:
            twice = (2 * rise).exp() * twice + mass.square().sum(1, keepdim=True)
        rest = rise.exp() * rest + mass.sum(1, keepdim=True)
        if pull is not None:
            mass = mass if slope is None else mass * slope
            pull.mul_(rise.exp()).add_(mass.to(head.weight.dtype) @ head.weight[columns])
        del logits, mass  # before the next tile is made
    higher = torch.maximum(top, of_label)
    shrink, of_top = (top - higher).exp(), (of_label - higher).exp()
    total = shrink * rest + of_top
    logprobs = (of_label - higher - total.log()).squeeze(1)
    gradient = entropies = collisions = None
    if pull is not None:
        slope = 1.0 if head.softcap is None else 1 - (of_label / head.softcap).square()
        gradient = ((rows * (rest * slope) - pull) * (head.scale * shrink / total)).to(hidden.dtype)
    if spread.entropy:
        rise, of_own = top - higher, of_label - higher
        moment = shrink * (moment + rise * rest) + of_top * of_own
        entropies = (total.log() - moment / total).squeeze(1)
    if spread.collision:
        collisions = ((shrink.square() * twice + of_top.square()).log() - 2 * total.log()).squeeze(1)
    return logprobs, gradient, entropies, collisions


def _recomputed(
    hidden: Float[Tensor, "tokens hidden"], target: Int[Tensor, " tokens"], head: Head, spread: Spread
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = head.logits(hidden).log_softmax(-1)
    known = logprobs.detach()
    unasked = known.new_zeros(len(known))
    entropies = -(known.exp() * known).sum(-1) if spread.entropy else unasked
    collisions = (2 * known).logsumexp(-1) if spread.collision else unasked
    return logprobs.gather(1, target.unsqueeze(1)).squeeze(1), entropies, collisions


@final
@dataclass(frozen=True)
class TokenScores:
    """What the head says of each completion token."""

    logprobs: Float[Tensor, " tokens"]
    """log p(target) in nats, float32 (float64 for float64 input), differentiable in the hidden states."""
    entropies: Float[Tensor, " tokens"] | None
    """Entropy of the whole distribution there, in nats, without gradient; None where not asked for."""
    collisions: Float[Tensor, " tokens"] | None
    """log of the sum of its squared probabilities, in nats, likewise."""


def token_scores(
    hidden: Float[Tensor, "tokens hidden"],
    target: Int[Tensor, " tokens"],
    head: Head,
    chunk: int = CHUNK,
    spread: Spread = NOTHING,
) -> TokenScores:
    """Score target tokens from the hidden states that predict them.

    A head that is itself trained takes the variant that recomputes each chunk's logits in the backward pass.
    """
    hidden = hidden.to(head.weight.dtype)
    if head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad):
        pieces = zip(hidden.split(chunk), target.split(chunk), strict=True)
        if torch.is_grad_enabled():
            parts = [checkpoint(_recomputed, h, t, head, spread, use_reentrant=False) for h, t in pieces]
        else:
            parts = [_recomputed(h, t, head, spread) for h, t in pieces]
        logprobs, entropies, collisions = (torch.cat(column) for column in zip(*parts, strict=True))
        return TokenScores(logprobs, entropies if spread.entropy else None, collisions if spread.collision else None)
    keep_gradient = torch.is_grad_enabled() and hidden.requires_grad
    return TokenScores(*_FrozenHead.apply(hidden, head, target, chunk, keep_gradient, spread))  # pyright: ignore[reportGeneralTypeIssues]


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
    entropies: Float[Tensor, " tokens"] | None = None
    """Entropy in nats where each token is predicted, without gradient; None where not asked for."""
    collisions: Float[Tensor, " tokens"] | None = None
    """log of the sum of squared probabilities there, in nats, likewise."""


def completion_logps(
    network: Any, forest: Forest, chunk: int = CHUNK, spread: Spread = NOTHING, temperature: int | float = 1.0
) -> CompletionLogps:
    """Score a forest with a causal language model in whatever role it stands.

    Args:
        network: a bare transformers model (adapters injected or not) on the device of `forest`; a packed forest needs
            one whose attention `dpo.model.layout` has set.
        forest: what to score.
        chunk: tokens whose logits are in the making at one time.
        spread: what else to tell of each distribution.
        temperature: divides the final logits (> 0); all that is told is of the distribution they then make.
    """
    selected = _hidden(network, forest).index_select(0, forest.source)
    scored = token_scores(selected, forest.target, Head.of(network).tempered(temperature), chunk, spread)
    sums = scored.logprobs.new_zeros(forest.completions).index_add(0, forest.sequence, scored.logprobs)
    return CompletionLogps(scored.logprobs, sums, forest.lengths, scored.entropies, scored.collisions)


class CompletionHidden(NamedTuple):
    """What the backbone knows of a forest's completions: its last hidden states, in its own dtype, with gradients."""

    at_source: Float[Tensor, "tokens hidden"]
    """Before each completion token, where it is predicted, in the order of `Forest.target`."""
    at_last: Float[Tensor, "completions hidden"]
    """After each whole completion, at its own last token."""


def completion_hidden(network: Any, forest: Forest) -> CompletionHidden:
    """Return the hidden states that a scalar head reads: per token for values, per completion for rewards.

    `network` as in `completion_logps`.
    """
    hidden = _hidden(network, forest)
    return CompletionHidden(hidden.index_select(0, forest.source), hidden.index_select(0, forest.last))


def _hidden(network: Any, forest: Forest) -> Float[Tensor, "positions hidden"]:
    backbone = network.base_model  # the model without its head; adapters live inside it
    return backbone(**inputs(forest)).last_hidden_state.flatten(0, 1)


def check_head(network: Any, tolerance: float) -> None:
    """Compare the chunked head with the model's own logits on a few tokens.

    Args:
        network: a causal language model.
        tolerance: largest admissible difference of a token's log-prob, in nats, rounding of the logits aside.

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
    tolerance += torch.finfo(network.dtype).eps * logits.abs().max().item()  # the model's own are rounded
    worst = (own - ours).abs().max().item()
    if not worst <= tolerance:
        raise ModelError(
            f"{type(network).__name__}: the log-probs of the chunked head differ from the model's own by {worst:.3g} "
            f"nats, expected at most {tolerance:g}. The model transforms its logits in a way that is not supported."
        )
