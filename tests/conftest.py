"""Tokenizers, models and files of a few kilobytes, made on the spot; nothing here reaches a network."""

import json
import os
import shutil
import tempfile

# Read when transformers and its companions are first imported, hence before them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="dpo-lab-tests-")
os.environ["TQDM_DISABLE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["USE_HUB_KERNELS"] = "0"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpo.model.base import LanguageModel, ModelConfig, load_base

torch.set_num_threads(1)  # sums depend on the number of threads; at this size one is also the fastest

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = ["the sea is wide and blue", "hello there, what a good day", "a bad answer", "User: Assistant: hi"] * 4

MakeTokenizer = Callable[..., PreTrainedTokenizerBase]
WriteRows = Callable[..., str]
WritePairs = Callable[..., Path]
Start = Callable[..., LanguageModel]
Perturb = Callable[[LanguageModel], None]
Naive = Callable[..., torch.Tensor]


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test's reference log-probs to itself, and all of them out of the user's cache."""
    monkeypatch.setenv("DPO_LAB_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """A byte-level BPE tokenizer: every text survives encoding and decoding."""

    def make(
        template: str | None = None, *, adds_bos: bool = False, eos: str | None = "</s>", pad: str | None = None
    ) -> PreTrainedTokenizerBase:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=340, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        )
        core.train_from_iterator(CORPUS, trainer)
        if adds_bos:
            core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core,
            bos_token="<s>",
            eos_token=eos,
            pad_token=pad,
            additional_special_tokens=["</s>", "<|im_start|>", "<|im_end|>"],
        )
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def chatml(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerBase:
    return make_tokenizer(CHATML)


@pytest.fixture(scope="session")
def tiny_model_folder(make_tokenizer: MakeTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 55,000 weights in float32, with a ChatML tokenizer; read only."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>", pad="<|im_end|>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                initializer_range=0.1,  # far enough from uniform for tokens to differ by nats
                tie_word_embeddings=False,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_config(tiny_model_folder: Path) -> ModelConfig:
    return ModelConfig(name=str(tiny_model_folder), dtype="float32", device="cpu")


@pytest.fixture
def start(tiny_config: ModelConfig) -> Start:
    """Load the tiny model and put a policy on it; keywords change its `ModelConfig`."""

    def started(seed: int = 0, moving: bool = False, **changes: object) -> LanguageModel:
        config = ModelConfig.model_validate({**tiny_config.model_dump(), **changes})
        return LanguageModel.start(load_base(config), config, seed, moving)

    return started


@pytest.fixture(scope="session")
def perturb() -> Perturb:
    """Move every trained weight, as training would."""

    def moved(model: LanguageModel) -> None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)

    return moved


@pytest.fixture(scope="session")
def naive() -> Naive:
    """Score one completion from full logits, token by token: what every faster way must equal."""

    def logprobs(network: torch.nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
        logits = network(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
        before = len(prompt) - 1  # the prompt's last position predicts the first completion token
        return torch.stack([logits[before + n].log_softmax(-1)[token] for n, token in enumerate(completion)])

    return logprobs


@pytest.fixture(scope="session")
def pairs_file() -> WritePairs:
    """Write preference pairs as JSON Lines, every prompt distinct, and return the path."""

    def write(path: Path, prompts: int = 40) -> Path:
        subjects = ["the sea", "the day", "a book", "this town", "my tea"]
        rows = [
            {
                "prompt": f"What of {subjects[i % len(subjects)]}, number {i}?",
                "chosen": f"It is good and blue, {i} times.",
                "rejected": f"A bad answer {i}.",
            }
            for i in range(prompts)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Write rows as JSON Lines and return the file's path."""

    def write(rows: list[dict], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
