"""Attention over packed rows: completions branch from a prompt that is stored, and computed, once.

A token attends to what lies before it in the same group, in the prompt or in its own completion; a sliding window
compares positions, not columns. Registered with transformers' attention interface, this replaces the attention of any
model that goes through it; a forward pass without branches (sampling, padded rows) falls through to the ordinary one.
"""

import sys
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dpo.model.forest import Forest

Kernel = Literal["sdpa", "flex_attention"]

NAMES: dict[Kernel, str] = {"sdpa": "prefix_tree", "flex_attention": "prefix_tree_flex"}
"""Under which names transformers knows the two; it refuses names with "sdpa" in them for models with softcaps."""

ARGUMENT = "branches"
"""The keyword under which a `Branches` travels through the model to every attention layer."""


SHORT = 2**17
"""Scores of a block, queries times keys, up to which a CPU takes the two products as they are. Its fused kernel pays
off for long blocks alone: on short ones its backward pass takes several times as long (docs/experiments.md). What is
kept for the backward pass are `heads * SHORT` numbers a layer and block at most."""


@final
class Branches:
    """What attention needs to know of one packed row; masks are made once and serve every layer."""

    def __init__(self, forest: Forest) -> None:
        """Take the layout of a packed row."""
        self.trees = forest.trees
        self._group, self._branch = forest.group[0], forest.branch[0]
        self._position = forest.position_ids[0]
        self._masks: dict[Any, Any] = {}

    def causal(self, queries: int, keys: int, window: int | None) -> Bool[Tensor, "queries keys"]:
        """Return the mask (True attends) of the last `queries` of `keys` consecutive positions."""
        key = (queries, keys, window)
        if key not in self._masks:
            device = self._group.device
            past = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
            self._masks[key] = (past >= 0) if window is None else (past >= 0) & (past < window)
        return self._masks[key]

    def block_mask(self, window: int | None) -> Any:
        """Return the whole row's rule as a BlockMask for FlexAttention."""
        from torch.nn.attention.flex_attention import create_block_mask

        if window not in self._masks:
            group, branch, position = self._group, self._branch, self._position
            time = group.shape[0]
            reach = time if window is None else window
            # A lambda: FlexAttention counts its parameters, which the wrapper of a checked function hides.
            self._masks[window] = create_block_mask(
                lambda _batch, _head, query, key: (
                    (group[key] == group[query])
                    & (key <= query)
                    & ((branch[key] == 0) | (branch[key] == branch[query]))
                    & (position[query] - position[key] < reach)
                ),
                None,
                None,
                time,
                time,
                device=group.device.type,
            )
        return self._masks[window]


def _attend(
    query: Float[Tensor, "1 heads queries width"],
    key: Float[Tensor, "1 kv_heads keys width"],
    value: Float[Tensor, "1 kv_heads keys value_width"],
    branches: Branches,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Float[Tensor, " heads"] | None,
) -> Float[Tensor, "1 heads queries value_width"]:
    """Attend from the last `queries` of `keys` consecutive positions."""
    queries, keys = query.shape[2], key.shape[2]
    if window is not None and keys <= window:
        window = None
    written_out = softcap is not None or sinks is not None or (query.device.type == "cpu" and queries * keys <= SHORT)
    if not written_out:
        grouped = query.shape[1] != key.shape[1]
        if queries == keys and window is None:
            return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
        if query.is_cuda:  # its lean kernels take no mask beside grouped keys
            repeats, grouped = query.shape[1] // key.shape[1], False
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        if window is None and query.is_cuda:
            from torch.nn.attention.bias import causal_lower_right

            mask: Any = causal_lower_right(queries, keys)  # a rule in place of a mask: the flash kernel takes it
        else:
            mask = branches.causal(queries, keys, window)
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    # Heads that share keys lie in one matrix, so that no key is copied.
    shared = (query * scale).reshape(key.shape[1], -1, query.shape[3])
    scores = torch.bmm(shared, key[0].transpose(1, 2)).view(-1, queries, keys)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~branches.causal(queries, keys, window), torch.finfo(scores.dtype).min)
    if sinks is not None:  # a learned logit per head that takes probability and gives no value
        scores = torch.cat([scores, sinks.to(scores.dtype).view(-1, 1, 1).expand(-1, queries, 1)], -1)
    shares = scores.softmax(-1)[..., :keys].reshape(key.shape[1], -1, keys)
    return torch.bmm(shares, value[0]).view(1, -1, queries, value.shape[3])


def _tree_sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    branches: Branches | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """Exact attention block by block; no mask of the whole row exists."""
    if branches is None:
        given = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
        return _ordinary(module, query, key, value, attention_mask, **given, **rest)
    _refuse_unknown(rest)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key = query.to(value.dtype), key.to(value.dtype)  # a norm on them may have widened them under autocast
    # One split for the row, whose backward is one concatenation: slices would each pad their gradient to the row.
    # A group's first completion continues its prompt as in an ordinary sequence, so they stay one part, the trunk.
    sizes: list[int] = []
    for tree in branches.trees:
        sizes += [tree.prompt + sum(tree.completions[:1]), *tree.completions[1:]]
    parts: list[Tensor] = []
    pieces = iter(zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True))
    for tree in branches.trees:
        q, k, v = next(pieces)
        parts.append(_attend(q, k, v, branches, sliding_window, scale, softcap, s_aux))
        prompt_k, prompt_v = k[:, :, : tree.prompt], v[:, :, : tree.prompt]
        for _ in tree.completions[1:]:
            q, k, v = next(pieces)
            k, v = torch.cat([prompt_k, k], 2), torch.cat([prompt_v, v], 2)
            parts.append(_attend(q, k, v, branches, sliding_window, scale, softcap, s_aux))
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def _tree_flex(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    sliding_window: int | None = None,
    branches: Branches | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """FlexAttention over the whole row, its empty blocks skipped: the variant for CUDA."""
    from transformers.integrations.flex_attention import flex_attention_forward

    mask = attention_mask if branches is None else branches.block_mask(sliding_window)
    return flex_attention_forward(module, query, key, value, mask, **rest)


def _ordinary(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Any:
    """Attend without branches, as the model would by itself."""
    given = {name: one for name, one in given.items() if one is not None}
    if given.keys() & {"softcap", "s_aux"}:
        return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, mask, **given)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, mask, **given)


def _refuse_unknown(rest: dict[str, Any]) -> None:
    """Refuse what would change the result and is not handled; the self-check at load then takes padded rows.

    Raises:
        NotImplementedError: for such an argument.
    """
    for name in ("position_bias", "cache", "head_mask"):
        if rest.get(name) is not None:
            raise NotImplementedError(f"tree attention: got {name}, which it does not handle")
    if rest.get("dropout"):
        raise NotImplementedError("tree attention: got attention dropout, expected 0: policy and reference differ")


def needs_eager(config: Any) -> bool:
    """Tell whether the model's ordinary attention has a softcap or sinks, which torch's SDPA cannot do."""
    text = config.get_text_config()
    return bool(getattr(text, "attn_logit_softcapping", None)) or text.model_type == "gpt_oss"


def _ordinary_mask(*args: Any, config: Any = None, **kwargs: Any) -> Any:
    from transformers.masking_utils import eager_mask, sdpa_mask

    return (eager_mask if config is not None and needs_eager(config) else sdpa_mask)(*args, config=config, **kwargs)


def register() -> None:
    """Make both attentions known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, flex_attention_mask

    AttentionInterface.register(NAMES["sdpa"], _tree_sdpa)
    AttentionMaskInterface.register(NAMES["sdpa"], _ordinary_mask)
    AttentionInterface.register(NAMES["flex_attention"], _tree_flex)
    AttentionMaskInterface.register(NAMES["flex_attention"], flex_attention_mask)


def inputs(forest: Forest) -> dict[str, Any]:
    """Return the keyword arguments for a model's forward pass over `forest`, in either layout."""
    given = {"input_ids": forest.input_ids, "position_ids": forest.position_ids, "use_cache": False}
    if not forest.trees:
        return {**given, "attention_mask": forest.attention_mask.long()}
    # A mask of four dimensions is taken as it is: transformers then builds none, and infers nothing from positions.
    anything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=forest.input_ids.device)
    return {**given, "attention_mask": anything, ARGUMENT: Branches(forest)}
