"""How much memory a run takes, told before any weight is loaded.

The real architecture is built on the meta device, where tensors have shapes and no storage; the adapters go in as they
do for training, and one forward and backward pass is carried out on it while every tensor that comes and goes is
counted. What the passes hold grows with the tokens in a straight line, so two of them tell the line. Where completions
are sampled on the way, the passes that write them are counted as well; they and the updates take turns. Nothing of it
needs the weights, the data or the card.
"""

import math
import re
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, final

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo.errors import ConfigError
from dpo.model.base import Base, LanguageModel, ModelConfig, Role, ScalarRole, choose_dtype, from_pretrained
from dpo.model.logprobs import CHUNK, TILE
from dpo.model.tree_attention import SHORT, needs_eager

if TYPE_CHECKING:
    from rich.table import Table

TOKENS = (4096, 8192)
"""Lengths of the two passes that are counted: long enough for the activations to outweigh what does not grow."""

CUDA_CONTEXT = 700 * 2**20
"""Assumed bytes of the driver's context, of the matrix libraries' workspace and of what the allocator rounds up."""

FALLBACK_VECTORS = 48
"""Vectors of the hidden size that a layer is taken to hold for each token where its passes cannot be counted. Fifteen
families of models, with adapters on all linear layers and in bfloat16, were counted to hold 27 to 47."""

BASE_WEIGHTS = "base weights"
"""How the names of a plan's parts begin that are held once the base is loaded."""

SAMPLED_LOGITS = 7
"""Tensors in float32 of one position's logits that drawing a token holds at once: the logits, the same at the sampling
temperature, their exponentials, and in float64 these again and their cumulative sum, each as large as two."""

JUDGED = 16
"""Completions that a learned reward scores side by side (`dpo.model.scalar.LearnedReward`)."""

RANKED = 4
"""Completions that a ranking is taken to have: as many as InstructGPT's have at least."""

ATTENTION = "dpo_counted"
"""Name under which the counted attention is known to transformers."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(GB|GiB)", re.IGNORECASE)


@final
@dataclass(frozen=True)
class Card:
    """The memory a run may take."""

    name: str
    device: str
    """"cuda", "mps" or "cpu"."""
    free: int
    """Bytes left for the run."""
    context: int
    """Bytes set aside beforehand for the CUDA context, an assumption; 0 where it is in place, or none is needed."""
    dtype: torch.dtype
    """What model.dtype=auto becomes on it."""

    @classmethod
    def named(cls, size: str) -> "Card":
        """Return a CUDA card of `size`, such as 24GB (10^9 bytes each, the safe reading) or 80GiB (2^30).

        Raises:
            ConfigError: `size` is no such size, or no more than the CUDA context takes.
        """
        found = _SIZE.fullmatch(size.strip())
        unit = 10**9 if found and found[2].upper() == "GB" else 2**30
        total = int(float(found[1]) * unit) if found else 0
        if total <= CUDA_CONTEXT:
            raise ConfigError(
                f"--gpu: got {size!r}, expected the size of a card, a number and GB or GiB and more than "
                f"{CUDA_CONTEXT / 2**30:.2f}GiB: 12GB, 16GB, 24GB, 80GB."
            )
        return cls(size.strip(), "cuda", total - CUDA_CONTEXT, CUDA_CONTEXT, torch.bfloat16)

    @classmethod
    def here(cls, device: torch.device) -> "Card":
        """Return what this machine has: the free memory of its card, or else all of the system's."""
        dtype = choose_dtype("auto", device)
        if device.type == "cuda":
            return cls(torch.cuda.get_device_name(device), "cuda", torch.cuda.mem_get_info(device)[0], 0, dtype)
        total = psutil.virtual_memory().total
        return cls(f"this machine ({device.type})", device.type, total, 0, dtype)


@final
@dataclass(frozen=True)
class Roles:
    """Who stands on the base: the policy, and beside it or in its place whoever is named here.

    Each is an adapter of the policy's shape; one that says a number has a head of hidden + 1 float32 numbers as well.
    """

    frozen_adapter: bool = False
    """A frozen copy of the adapter is the reference though the model's settings name none: in a stage that goes on from
    the stage before."""
    moving: bool = False
    """A reference that follows the policy."""
    rewards: int = 0
    """Frozen reward roles that judge what is sampled, in rollouts or in evaluation."""
    value: bool = False
    """A value role that is trained with the policy."""
    reward: bool = False
    """A reward role is trained in the policy's place: a run of a reward model."""

    def scalars(self) -> list[ScalarRole]:
        """Return the roles that say a number as `LanguageModel.start` takes them, each of them fresh."""
        frozen = [ScalarRole(f"reward-{n}", None, False) for n in range(1, self.rewards + 1)]
        trained = {"reward": self.reward, "value": self.value}
        return [ScalarRole(name, None, True) for name, there in trained.items() if there] + frozen


POLICY_ALONE = Roles()


@final
@dataclass(frozen=True)
class SamplingSize:
    """What the policy writes on the way: completions side by side, at their longest."""

    rows: int
    """Completions that are written at once."""
    prompt: int
    """Tokens of a prompt."""
    new: int
    """Tokens of a completion."""


@final
@dataclass(frozen=True)
class Sampled:
    """What sampling adds at its highest point: rows * per_row bytes, and never less than judging does."""

    rows: int
    """Completions that are written at once."""
    per_row: int
    judging: int
    """What the learned rewards' passes over the completions add, however few are written at once."""

    @property
    def size(self) -> int:
        """All of it, in bytes."""
        return max(self.rows * self.per_row, self.judging)

    def largest_rows(self, free_bytes: int) -> int:
        """Return the most rows whose `size` is within `free_bytes`; 0 where judging alone is not."""
        return max(0, free_bytes // self.per_row) if self.judging <= free_bytes else 0


NONE_SAMPLED = Sampled(0, 1, 0)


@final
@dataclass(frozen=True)
class Activations:
    """What one micro-batch adds at its highest point: fixed + per_token * tokens bytes."""

    fixed: int
    per_token: int


@final
@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a run, in bytes."""

    model: str
    parts: Mapping[str, int]
    """What is held whatever the micro-batch, by name."""
    plain: Activations
    checkpointed: Activations
    """With gradient checkpointing."""
    notes: tuple[str, ...] = ()
    """What the numbers leave out or take for granted."""
    sampled: Sampled = NONE_SAMPLED
    """Held in turn with the activations of an update, never beside them."""

    @property
    def held(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    def _activations(self, checkpointing: bool) -> Activations:
        return self.checkpointed if checkpointing else self.plain

    def activation_bytes_per_token(self, checkpointing: bool) -> int:
        """Return the bytes that one more token in the micro-batch takes."""
        return self._activations(checkpointing).per_token

    def updating(self, tokens: int, checkpointing: bool) -> int:
        """Return the bytes of an update whose micro-batch holds `tokens`, padding included."""
        grown = self._activations(checkpointing)
        return self.held + grown.fixed + grown.per_token * tokens

    def sampling(self) -> int:
        """Return the bytes of sampling."""
        return self.held + self.sampled.size

    def total(self, tokens: int, checkpointing: bool) -> int:
        """Return the bytes of a run whose micro-batch holds `tokens`: of its updates or its sampling, as is more."""
        return max(self.updating(tokens, checkpointing), self.sampling())

    def largest_tokens(self, card_bytes: int, checkpointing: bool) -> int:
        """Return the most tokens whose `total` is within `card_bytes`; 0 where not one token fits."""
        if self.sampling() > card_bytes:
            return 0
        return max(0, (card_bytes - self.updating(0, checkpointing)) // self.activation_bytes_per_token(checkpointing))

    def table(self, card: Card, examples: int, tokens_each: int, unit: str) -> "Table":
        """Return the plan as a table for printing.

        Args:
            card: to fit the run on.
            examples: in the run's micro-batch.
            tokens_each: the most tokens that one of them can have.
            unit: what the examples are called: "pairs", "completions", ...
        """
        from rich.table import Table
        from rich.text import Text

        rows: list[tuple[str, str]] = [(name, _shown(size)) for name, size in self.parts.items()]
        rows.append(("held whatever the micro-batch", _shown(self.held)))
        if self.sampled.rows:
            rows += [
                ("sampling, in turn with the updates:", ""),
                ("  each completion written", _shown(self.sampled.per_row)),
                *([("  learned rewards reading them", _shown(self.sampled.judging))] if self.sampled.judging else []),
                (f"  this run: {self.sampled.rows} at once", _shown(self.sampling())),
            ]
        tokens = examples * tokens_each
        for checkpointing in (False, True):
            how = "with" if checkpointing else "without"
            most = self.largest_tokens(card.free, checkpointing)
            rows += [
                (f"{how} gradient checkpointing:", ""),
                ("  activations per token", _shown(self.activation_bytes_per_token(checkpointing))),
                (f"  this run: {examples} {unit}, {tokens:,} tokens", _shown(self.total(tokens, checkpointing))),
                ("  largest micro-batch", f"{most:,} tokens = {most // tokens_each:,} {unit}"),
            ]
        if card.context:
            rows.append(("CUDA context (an assumption)", _shown(card.context)))
        rows.append((f"left for the run on {card.name}", _shown(card.free)))
        table = Table("part", "memory", title=Text(f"Memory plan: {self.model}"))
        verdict = self.verdict(card, examples, tokens_each, unit)
        taken = f"Counted with {unit} at their longest, {tokens_each:,} tokens"
        table.caption = Text(". ".join((verdict, taken, *self.notes)) + ".")
        table.columns[1].justify = "right"
        for name, value in rows:
            table.add_row(Text(name), Text(value))
        return table

    def verdict(self, card: Card, examples: int, tokens_each: int, unit: str) -> str:
        """Say whether the run's micro-batch and its sampling fit `card`, and what to do where they do not."""
        tokens = examples * tokens_each
        if self.held <= card.free < self.sampling() and (rows := self.sampled.largest_rows(card.free - self.held)):
            return (
                f"It does not fit {card.name}: sampling {self.sampled.rows} completions at once. Use "
                f"rollout.sampling_batch_size={rows} at most"
            )
        if not needs_checkpointing(self, card.free, tokens):
            return f"It fits {card.name}; gradient checkpointing is not needed"
        most = self.largest_tokens(card.free, checkpointing=True) // tokens_each
        if most >= examples:
            return f"It fits {card.name} with model.gradient_checkpointing=true only"
        if most:
            return (
                f"It does not fit {card.name}. Use loop.per_device_train_batch_size={most} at most, with "
                "model.gradient_checkpointing=true"
            )
        return (
            f"It does not fit {card.name}: not even one of the {unit}, with gradient checkpointing. Lower "
            f"data.max_length{' and rollout.max_new_tokens' if self.sampled.rows else ''}, use "
            "model.quantization=nf4, or a smaller model"
        )


def needs_checkpointing(plan: MemoryPlan, free_bytes: int, tokens: int) -> bool:
    """Tell whether a micro-batch of `tokens` exceeds `free_bytes` unless activations are recomputed.

    `free_bytes` is what is free before the weights are loaded. Sampling takes the same with and without.
    """
    return plan.updating(tokens, checkpointing=False) > free_bytes


def must_checkpoint(base: Base, config: ModelConfig, optimiser: str, tokens: int, roles: Roles = POLICY_ALONE) -> bool:
    """Tell whether a micro-batch of `tokens` exceeds what is free now, `base` being loaded, unless it recomputes.

    The passes are counted only where a rule of thumb on the safe side does not answer.
    """
    cuda = base.device.type == "cuda"
    free = torch.cuda.mem_get_info(base.device)[0] if cuda else psutil.virtual_memory().available
    if cuda:  # what the allocator keeps for itself is free to this process
        free += torch.cuda.memory_reserved(base.device) - torch.cuda.memory_allocated(base.device)
    assumed, _ = _assumed(base.network.config.get_text_config(), torch.float32)
    if config.lora is not None and assumed.per_token * tokens < free / 2:
        return False
    plan = plan_memory(config, optimiser, Card.here(base.device), roles)
    loaded = sum(size for name, size in plan.parts.items() if name.startswith(BASE_WEIGHTS))
    return needs_checkpointing(plan, free + loaded, tokens)


def plan_memory(
    config: ModelConfig,
    optimiser: str,
    card: Card,
    roles: Roles = POLICY_ALONE,
    sampling: SamplingSize | None = None,
) -> MemoryPlan:
    """Plan the memory of training `config` with the optimiser of that name.

    Seeds the random generators, as every start of a policy does.

    Args:
        config: the model, and what is trained on it.
        optimiser: "adamw", "adamw_8bit", "paged_adamw_8bit" or "rmsprop".
        card: what will train; it decides what dtype "auto" is, and the head's tile.
        roles: who stands on the base.
        sampling: what the policy writes on the way, where it learns from its own completions.

    Raises:
        ConfigError: an unknown optimiser.
        ModelError: the model's configuration cannot be found, or a role does not go onto it.
    """
    from transformers import AutoConfig

    settings = from_pretrained(AutoConfig, config)
    dtype = card.dtype if config.dtype == "auto" else choose_dtype(config.dtype, torch.device(card.device))
    plain_config, checkpointed_config = (
        config.model_copy(update={"gradient_checkpointing": switch}) for switch in (False, True)
    )
    model, parts, spare = _start(plain_config, settings, dtype, roles)
    parts |= _parts(model, config.lora is not None, roles)
    trained = model.parameters()
    parts["gradients"] = sum(map(_bytes, trained))
    parts[f"optimiser state ({optimiser})"] = optimiser_bytes(optimiser, trained)
    if not roles.reward:  # which reads hidden states alone
        head = model.network.get_output_embeddings().weight
        is_trained = any(head is parameter for parameter in trained)
        parts["head"] = head_bytes(*head.shape, dtype=dtype, device=card.device, trained=is_trained)
    if spare:
        parts["one layer's weights, dequantised"] = spare
    notes = []
    if config.attn_implementation == "eager" or needs_eager(settings):
        notes.append("Eager attention keeps heads x length x length numbers for every layer and row beside, uncounted")
    if config.activation_offload:
        notes.append("Activations are offloaded: most of what is counted per token lies in the main memory instead")
    text = settings.get_text_config()
    try:
        plain = _activations(model, dtype, text.hidden_size)
        again, _, _ = _start(checkpointed_config, settings, dtype, roles)
        checkpointed = _activations(again, dtype, text.hidden_size)
        if card.device == "cpu":  # its attention keeps the scores of short blocks, see tree_attention
            # Of a token in the longest such block.
            scores = text.num_attention_heads * math.isqrt(SHORT) * dtype.itemsize
            plain = replace(plain, per_token=plain.per_token + text.num_hidden_layers * scores)
            checkpointed = replace(checkpointed, per_token=checkpointed.per_token + scores)
        sampled = NONE_SAMPLED if sampling is None else _sampled(model, sampling, roles, text.vocab_size)
    except Exception as error:  # whatever a family does that tensors without content cannot
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        plain, checkpointed = _assumed(text, dtype)
        sampled = NONE_SAMPLED if sampling is None else _assumed_sampled(text, dtype, sampling, roles)
        notes.append(
            f"Activations by a rule of thumb, {FALLBACK_VECTORS} vectors of the hidden size for each layer and token: "
            f"those of this architecture cannot be counted ({reason})"
        )
    return MemoryPlan(config.name, MappingProxyType(parts), plain, checkpointed, tuple(notes), sampled)


def _parts(model: LanguageModel, adapters: bool, roles: Roles) -> dict[str, int]:
    """Return the bytes of what stands on or beside the base."""
    trained = sum(map(_bytes, model.parameters()))
    if not adapters:
        copies = {"frozen reference copy": True, "moving reference": roles.moving}
        return {name: trained for name, there in copies.items() if there}
    first = _role_bytes(model, model.trained[0])
    parts = {"reward adapter and head" if roles.reward else "adapter weights": first}
    frozen = _role_bytes(model, "reference")
    if frozen or roles.frozen_adapter:
        parts["frozen reference adapter"] = frozen or first
    if roles.moving:
        parts["moving reference"] = first
    if roles.value:
        parts["value adapter and head"] = _role_bytes(model, "value")
    if roles.rewards:
        judges = [name for name in model.heads if name not in model.trained]
        parts[f"reward adapters and heads ({roles.rewards})"] = sum(_role_bytes(model, name) for name in judges)
    return parts


def _role_bytes(model: LanguageModel, role: Role) -> int:
    """Return the bytes of a role's adapter, and of its head where it says a number."""
    own = re.compile(rf"\.lora_\w+\.{re.escape(role)}(\.|$)")
    adapter = [parameter for name, parameter in model.network.named_parameters() if own.search(name)]
    head = model.heads.get(role)
    return sum(map(_bytes, (*adapter, *(() if head is None else head.parameters()))))


def optimiser_bytes(name: str, parameters: Sequence[Tensor]) -> int:
    """Return the bytes of an optimiser's state over `parameters`.

    Raises:
        ConfigError: an unknown optimiser.
    """
    if name in ("adamw", "rmsprop"):  # torch's: states in the parameter's own type, and a float32 step count
        states = 2 if name == "adamw" else 1
        return sum(states * _bytes(parameter) + 4 for parameter in parameters)
    if name in ("adamw_8bit", "paged_adamw_8bit"):
        return sum(_states_8bit(parameter.numel()) for parameter in parameters) + 2 * 256 * 4  # two shared code tables
    raise ConfigError(
        f"optimiser {name!r}: expected adamw, adamw_8bit, paged_adamw_8bit or rmsprop. Use one of these names."
    )


def _states_8bit(numbers: int) -> int:
    """bitsandbytes' two moments: a byte each and a float32 scale per 256; small tensors stay in float32."""
    return 2 * numbers * 4 if numbers < 4096 else 2 * (numbers + 4 * math.ceil(numbers / 256))


def nf4_bytes(numbers: int) -> int:
    """Return the bytes of a 4-bit weight of so many numbers, in bitsandbytes' layout with double quantisation.

    Half a byte a number; a scale of one byte for 64 of them; a float32 scale for 256 such scales; offset and the two
    code tables.
    """
    scales = math.ceil(numbers / 64)
    return math.ceil(numbers / 2) + scales + 4 * math.ceil(scales / 256) + 4 + 4 * (16 + 256)


FROZEN_HIDDEN = 2
"""Chunks of hidden states in float32 that it holds at once."""

TRAINED_LOGITS = 3
"""Tensors of a whole chunk's logits in float32 that a trained head holds at once."""

TRAINED_WEIGHTS = 2
"""Gradients of its weight on their way to the sum of all chunks that it holds at once."""


def head_bytes(vocabulary: int, hidden: int, *, dtype: torch.dtype, device: str, trained: bool) -> int:
    """Return the bytes that the chunked head of `dpo.model.logprobs` works in, whatever the micro-batch.

    Logits are made in `dtype` and cast to float32. What the head keeps for each token is counted with the activations.
    """
    chunk = CHUNK * vocabulary
    if trained:
        return chunk * TRAINED_LOGITS * 4 + TRAINED_WEIGHTS * vocabulary * hidden * dtype.itemsize
    tile = min(TILE.get(device, TILE["cpu"]), chunk)
    narrow = 0 if dtype == torch.float32 else dtype.itemsize
    return tile * (4 + narrow) + CHUNK * hidden * FROZEN_HIDDEN * 4


def _start(
    config: ModelConfig, settings: Any, dtype: torch.dtype, roles: Roles = POLICY_ALONE
) -> tuple[LanguageModel, dict[str, int], int]:
    """Build the model with its roles on the meta device, a moving reference aside.

    Returns:
        the model; the bytes of the base by precision; those of the largest quantised layer when it is dequantised.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(ATTENTION, _counted_attention)
    device = torch.device("meta")
    with device, warnings.catch_warnings():
        # Loading a starting adapter checks that it fits; that its values go nowhere is the point.
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter", category=UserWarning)
        network = AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation=ATTENTION)
        for module in network.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # as `load_base` has it
        network.requires_grad_(False)
        weights, spare = _weights(network, config.quantization == "nf4", dtype)
        base = Base(network, None, device, dtype, config.name)
        model = LanguageModel.start(base, config, seed=0, scalars=roles.scalars(), policy=not roles.reward)
        return model, weights, spare


def _weights(network: Any, quantised: bool, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    small = _quantised_weights(network) if quantised else {}
    found: dict[str, int] = {}
    for tensor in network.parameters():
        precision, size = str(tensor.dtype).removeprefix("torch."), _bytes(tensor)
        if id(tensor) in small:
            precision, size = "nf4", nf4_bytes(tensor.numel())
        key = f"{BASE_WEIGHTS} ({precision})"
        found[key] = found.get(key, 0) + size
    return found, max(small.values(), default=0) * dtype.itemsize


def _quantised_weights(network: Any) -> dict[int, int]:
    """Return identity and size of the weights that transformers' loader gives to bitsandbytes."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    spared = [*get_keys_to_not_convert(network), *(network._keep_in_fp32_modules or ())]
    return {
        id(module.weight): module.weight.numel()
        for name, module in network.named_modules()
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, spared)
    }


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


class _FlashLike(torch.autograd.Function):
    """Attention by what it holds: queries, keys, values, output and one float32 a query and head; computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        out = query.new_zeros(batch, length, heads, value.shape[-1])
        normaliser = query.new_zeros(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, normaliser)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
        query, key, value, _, _ = ctx.saved_tensors
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


def _counted_attention(
    module: torch.nn.Module,  # noqa: ARG001 (transformers calls every attention so)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001
    **others: Any,  # noqa: ARG001
) -> tuple[Tensor, None]:
    return _FlashLike.apply(query, key, value), None  # pyright: ignore[reportReturnType]


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that are alive and were made inside it; views count with their storage."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._before = list(before)  # keeps their storages, and so their identities
        self._known: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in self._before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._hold(leaf.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_: Any) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


@final
@dataclass(frozen=True)
class Counted:
    """What one forward and backward pass held, in bytes, parameters and their gradients aside."""

    kept: int
    """After the forward pass: what the backward pass waits for."""
    peak: int
    """At the highest point of both."""


def count_pass(model: LanguageModel, tokens: int) -> Counted:
    """Count a forward and backward pass of the policy over one row of `tokens`, on whatever device it stands.

    In a reward run it is the pass of the role that is trained in the policy's place.
    """
    model.training(True)
    trained = model.parameters()
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)  # gradients are a part of their own
    with model.role(model.trained[0]) as network:
        ids, positions = _row(network, tokens)
        own = [*network.parameters(), *network.buffers(), *(p.grad for p in trained if p.grad is not None)]
        with _Live(own) as live:
            hidden = network.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
            kept = live.now
            hidden.backward(torch.zeros_like(hidden))
    for parameter in trained:
        parameter.grad = None
    return Counted(kept, live.peak)


def _row(network: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """Return ids and positions of one row."""
    device = next(network.parameters()).device
    return torch.zeros(1, tokens, dtype=torch.long, device=device), torch.arange(tokens, device=device).unsqueeze(0)


@final
@dataclass(frozen=True)
class Read:
    """What one forward pass without gradients held, in bytes, parameters aside."""

    peak: int
    """At its highest point."""
    cache: int
    """Keys and values of all layers, afterwards."""


def count_reading(model: LanguageModel, tokens: int) -> Read:
    """Count a forward pass over one row of `tokens` that nothing goes back through, as the pass over a prompt is.

    It is a pass of the role that is trained first: adapters of one shape hold the same.
    """
    with model.reading(model.trained[0]) as network:
        ids, positions = _row(network, tokens)
        with _Live([*network.parameters(), *network.buffers(), ids, positions]) as live:
            out = network.base_model(input_ids=ids, position_ids=positions, use_cache=True)
            layers = [_bytes(layer.keys) + _bytes(layer.values) for layer in out.past_key_values.layers]
    return Read(live.peak, sum(layers))


def _sampled(model: LanguageModel, sampling: SamplingSize, roles: Roles, vocabulary: int) -> Sampled:
    """Count what one row of sampling and the judgement of what was written hold.

    There is room for all keys and values from the start (`dpo.model.kv_cache`). Beside it a row is at its highest in
    the pass over the prompt, or where the logits of one position become a token. Judging keeps no keys and values.
    """
    longest = sampling.prompt + sampling.new
    read = count_reading(model, longest)
    passing = read.peak - read.cache  # which grows with the tokens in a straight line
    prompt = math.ceil(passing * sampling.prompt / longest)
    row = read.cache + max(prompt, _logits(vocabulary, model.dtype))
    return Sampled(sampling.rows, row, JUDGED * passing if roles.rewards else 0)


def _activations(model: LanguageModel, dtype: torch.dtype, hidden: int) -> Activations:
    """Fit a line through two passes.

    A value role beside the policy takes its turn: an update holds the pass of one role at a time.

    Raises:
        NotImplementedError: the model's attention is its own, or it has a state: a pass would not grow in a line.
    """
    network = model.network
    if network._is_stateful or not network._supports_attention_backend:
        raise NotImplementedError(f"{type(network).__name__} does not take transformers' exchangeable attention")
    _cast_adapters(model)
    short, long = TOKENS
    first, second = (count_pass(model, tokens).peak for tokens in TOKENS)
    per_token = math.ceil((second - first) / (long - short))
    fixed = max(0, second - per_token * long)
    # A head takes a copy of the hidden states and keeps their gradient; one that says a number does so in float32.
    widths = [torch.float32.itemsize if role in model.heads else dtype.itemsize for role in model.trained]
    return Activations(fixed, per_token + 2 * hidden * max(widths))


def _cast_adapters(model: LanguageModel) -> None:
    """Put the adapters' weights into what autocast, which knows no meta tensors, would cast them to."""
    if model.mixed:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(model.dtype)


def _assumed(text: Any, dtype: torch.dtype) -> tuple[Activations, Activations]:
    vector = text.hidden_size * dtype.itemsize
    layers, one = text.num_hidden_layers, FALLBACK_VECTORS * vector
    return Activations(0, layers * one), Activations(0, layers * vector + one)


def _assumed_sampled(text: Any, dtype: torch.dtype, sampling: SamplingSize, roles: Roles) -> Sampled:
    """Take keys and values for as wide as the hidden state, and what a layer works in for what training keeps of it."""
    vector, longest = text.hidden_size * dtype.itemsize, sampling.prompt + sampling.new
    cache, passing = 2 * text.num_hidden_layers * vector, FALLBACK_VECTORS * vector
    row = longest * cache + max(sampling.prompt * passing, _logits(text.vocab_size, dtype))
    return Sampled(sampling.rows, row, JUDGED * longest * passing if roles.rewards else 0)


def _logits(vocabulary: int, dtype: torch.dtype) -> int:
    """Return the bytes in which the token after one position is drawn."""
    return vocabulary * (SAMPLED_LOGITS * torch.float32.itemsize + dtype.itemsize)


def _shown(size: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size} B"
