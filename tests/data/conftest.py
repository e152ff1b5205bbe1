"""Tokenizers of a few hundred tokens, and files, made on the spot."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = ["the sea is wide and blue", "hello there, what a good day", "a bad answer", "User: Assistant: hi"] * 4

MakeTokenizer = Callable[..., PreTrainedTokenizerBase]
WriteRows = Callable[..., str]


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """A byte-level BPE tokenizer: every text survives encoding and decoding."""

    def make(
        template: str | None = None, *, adds_bos: bool = False, eos: str | None = "</s>"
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
            additional_special_tokens=["</s>", "<|im_start|>", "<|im_end|>"],
        )
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def chatml(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerBase:
    return make_tokenizer(CHATML)


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Write rows as JSON Lines and return the file's path."""

    def write(rows: list[dict], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
