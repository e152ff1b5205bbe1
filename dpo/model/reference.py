"""Reference log-probs: each completion scored once, for every epoch, objective, run and process that reads it.

They lie under `cache_folder()`/references, in a folder named by what they depend on: the content of the weights
(quantised as they are), of the frozen starting adapter where the reference is one, the dtype, and the tokens. The
objective, the learning rate, the seed and any path have no part in it. The folder grows by 4 bytes a completion token
and 40 a completion; delete it, or any folder in it, whenever you like, and what is needed is computed again.
"""

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dpo.cache import cache_folder
from dpo.errors import ModelError
from dpo.model.base import LanguageModel
from dpo.model.forest import Group
from dpo.model.layout import Layout
from dpo.model.logprobs import completion_logps
from dpo.model.store import Store, Values
from dpo.progress import bar

log = logging.getLogger("dpo")

Key = tuple[tuple[int, ...], tuple[int, ...]]
"""Prompt ids and completion ids: what a reference log-prob depends on, for one model."""

VERSION = 1
"""Version of the values: raise it where a change of the engine makes stored ones wrong."""

TOKEN_BUDGET = 4096
"""Positions of a batch that is scored at once; without gradients this is far below what a training step holds."""

SHARD = 2048
"""Completions after which what is scored is written: as much as an interruption can lose."""


class Reference(ABC):
    """Whom the policy is compared with: log-probs by prompt and completion, constants of a training step."""

    @abstractmethod
    def prepare(self, keys: Iterable[Key], progress: bool = False) -> None:
        """Score what can be scored ahead; `progress` says how much and shows a bar."""

    @abstractmethod
    def tokens(self, keys: Sequence[Key]) -> list[Tensor]:
        """Return each completion's log-probs in nats, float32 `(tokens,)`, wherever they are at hand."""

    @final
    def sums(self, keys: Sequence[Key]) -> Float[Tensor, " keys"]:
        """Return each completion's log-prob in nats, float32, likewise."""
        return summed(self.tokens(keys))


def summed(tokens: Sequence[Tensor]) -> Float[Tensor, " completions"]:
    """Return each completion's log-prob from those of its tokens."""
    return torch.stack([one.sum() for one in tokens])


@final
class ReferenceLogps(Reference):
    """Scores completions with the model in its reference role, once, and keeps the log-probs on disk, per token."""

    def __init__(self, model: LanguageModel, folder: Path | None = None) -> None:
        """Score with `model`, adapters off or in the frozen starting adapter.

        Args:
            model: whose reference is meant; its weights are read when the first completion is asked for.
            folder: where all models' values are kept; `cache_folder()`/references where None.
        """
        self._model = model
        self._folder = folder
        self._opened: Store | None = None
        self.computed = 0
        """Completions that went through the model, over the instance's life."""

    def prepare(self, keys: Iterable[Key], progress: bool = False) -> None:
        """Score and store what is not known yet, longest first; `progress` says how much and shows a bar.

        Raises:
            ModelError: a log-prob is not finite; its shard is not written.
        """
        unique = list(dict.fromkeys(keys))
        store = self._store()
        known = store.known([_address(key) for key in unique])
        missing = [key for key, there in zip(unique, known, strict=True) if not there]
        if progress:
            log.info("reference log-probs: %d known, %d to compute", len(unique) - len(missing), len(missing))
        if not missing:
            return
        with (
            bar(total=len(missing), name="reference", unit="completion", shown=progress) as shown,
            self._model.reading("reference") as network,
        ):
            scored: dict[bytes, Values] = {}
            for batch in batches(missing, self._model.base.layout):
                new = self._score(network, batch)
                scored |= new
                self.computed += len(new)
                shown.update(len(new))
                if len(scored) >= SHARD:
                    store.add(scored)
                    scored = {}
            if scored:
                store.add(scored)

    def tokens(self, keys: Sequence[Key]) -> list[Tensor]:
        """Return each completion's log-probs in nats, float32 `(tokens,)`; scores what is not known yet."""
        self.prepare(keys)
        stored = self._store().read([_address(key) for key in keys])
        return [torch.from_numpy(np.array(values)) for values in stored]

    def _store(self) -> Store:
        """Return the store of this model's values, one for all instances that read the same loaded network."""
        if self._opened is None:
            folder, whole = self._folder or cache_folder() / "references", identity(self._model)
            with self._model.role("reference") as network:
                stores = _LOADED[network].stores
            path = folder / whole[:16]
            if path not in stores:
                stores[path] = Store(path, whole)
            self._opened = stores[path]
        return self._opened

    def _score(self, network: Any, groups: Sequence[Group]) -> dict[bytes, Values]:
        """Return every completion's log-probs by its address."""
        scored = completion_logps(network, self._model.forest(groups))
        tokens = scored.tokens.float().cpu()
        keys = [(tuple(group.prompt), tuple(one)) for group in groups for one in group.completions]
        values = dict(zip(keys, tokens.split(scored.lengths.tolist()), strict=True))
        for (_, completion), one in values.items():
            if not one.isfinite().all():
                text, dtype = self._model.tokenizer.decode(list(completion[:16])), str(self._model.dtype)
                raise ModelError(
                    f"reference log-probs: got {one[~one.isfinite()][0].item()} for a token of the completion that "
                    f"begins with {text!r}, expected finite numbers. The weights are damaged, or too large for "
                    f"{dtype.removeprefix('torch.')}: copy the model again, or give a wider model.dtype."
                )
        return {_address(key): one.numpy() for key, one in values.items()}


def identity(model: LanguageModel) -> str:
    """Return the sha256 of all that the reference's log-probs depend on beside the tokens.

    The weights are read once for as long as the network is loaded: nothing but full-weight training changes them, and
    there the reference is a frozen copy.
    """
    with model.role("reference") as network:
        if network not in _LOADED:
            _LOADED[network] = _Loaded(_sha256(_settings(network), _weights(network)))
        parts = {
            "version": VERSION,
            "dtype": str(model.dtype),
            "weights": _LOADED[network].weights,
            "adapter": _sha256("", _active_adapter(network)),
        }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@final
@dataclass(frozen=True)
class _Loaded:
    """What is remembered of a network for as long as it is loaded."""

    weights: str
    """sha256 of its architecture and its weights, adapters apart."""
    stores: dict[Path, Store] = field(default_factory=dict)
    """Those opened for it, by folder."""


_LOADED: WeakKeyDictionary[Any, _Loaded] = WeakKeyDictionary()

_ACCIDENTAL = {"transformers_version", "dtype", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"}
"""Settings of a network that its log-probs do not depend on; so are those that begin with an underscore: its path, its
attention kernel."""


def _settings(network: Any) -> str:
    """Return what the weights do not say: activation, norms' epsilon, rotary base, ..."""

    def essential(settings: dict[str, Any]) -> dict[str, Any]:
        return {key: one for key, one in settings.items() if key not in _ACCIDENTAL and not key.startswith("_")}

    settings = json.loads(network.config.to_json_string(use_diff=False), object_hook=essential)
    return json.dumps([type(network).__name__, settings], sort_keys=True)


def _weights(module: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer under the name it has where no adapter is injected, and none of an adapter's."""
    from peft.tuners.lora import LoraLayer

    if isinstance(module, LoraLayer):
        module = module.get_base_layer()
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield prefix + name, tensor
        # 4-bit weights. Read in place: state_dict() would requantise their scales on CPUs that bitsandbytes packs for.
        if (state := getattr(tensor, "quant_state", None)) is not None:
            for part, value in sorted(state.as_dict(packed=True).items()):
                yield f"{prefix}{name}.{part}", value
    for name, child in module.named_children():
        yield from _weights(child, f"{prefix}{name}.")


def _active_adapter(network: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield weights and scale of the adapter that is turned on, whatever role's name it bears; nothing where none is.

    The scale holds what the adapter's settings have to say (rank, alpha, rank stabilisation); DoRA has its own weights.
    """
    from peft.tuners.lora import LoraLayer

    for place, layer in network.named_modules():
        if not isinstance(layer, LoraLayer) or layer.disable_adapters:
            continue
        for adapter in layer.active_adapters:
            yield f"{place}.scale", torch.tensor(layer.scaling[adapter], dtype=torch.float64)
            for name, tensor in network.get_submodule(place).named_parameters():
                kind, _, rest = name.partition(".")
                if kind != "base_layer" and rest.split(".")[0] == adapter:
                    yield f"{place}.{kind}", tensor


def _sha256(text: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash names, dtypes, shapes and bytes."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in tensors:
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        plain = tensor.detach().as_subclass(torch.Tensor).cpu().contiguous()
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _address(key: Key) -> bytes:
    prompt, completion = key
    return hashlib.sha256(np.array([len(prompt), *prompt, *completion], dtype="<i8").tobytes()).digest()


def batches(keys: Iterable[Key], layout: Layout) -> Iterator[list[Group]]:
    """Split keys into batches of TOKEN_BUDGET positions, longest first: memory runs out at once or never."""
    batch: list[Group] = []
    for group in sorted(_groups(keys, layout), key=lambda group: -_positions([group], layout)):
        if batch and _positions([*batch, group], layout) > TOKEN_BUDGET:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _groups(keys: Iterable[Key], layout: Layout) -> Iterator[Group]:
    """Bring the completions of each prompt together, as many as the budget allows."""
    of_prompt: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for prompt, completion in keys:
        of_prompt.setdefault(prompt, []).append(completion)
    for prompt, completions in of_prompt.items():
        taken: list[tuple[int, ...]] = []
        for completion in completions:
            if taken and _positions([Group(prompt, [*taken, completion])], layout) > TOKEN_BUDGET:
                yield Group(prompt, taken)
                taken = []
            taken.append(completion)
        yield Group(prompt, taken)


def _positions(groups: Sequence[Group], layout: Layout) -> int:
    """Count what a batch holds: a packed one each prompt once, a padded one rows of the longest completion's length."""
    if layout == "packed":
        return sum(len(group.prompt) + sum(map(len, group.completions)) for group in groups)
    longest = max(len(group.prompt) + max(map(len, group.completions)) for group in groups)
    return longest * sum(len(group.completions) for group in groups)
