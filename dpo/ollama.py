"""The Modelfile by which Ollama runs a model: its source, its prompt template in Go's language, its end tokens.

A chat template in Jinja cannot be translated in general. The usual ones are a fixed text before and after each turn:
they are known by what they render, not by their source, and the same record writes them in Go.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Final, final

from jinja2.exceptions import TemplateError

MODELFILE: Final = "Modelfile"

ARCHITECTURES: Final = ("Llama", "Mistral", "Mixtral", "Gemma", "Phi3", "Qwen2", "Qwen3")
"""What Ollama reads from safetensors by itself, by the start of transformers' class name."""


@final
@dataclass(frozen=True)
class ChatStyle:
    """A template that writes a fixed text before and after each turn."""

    name: str
    turns: Mapping[str, tuple[str, str]]
    """What stands before and after a turn of each role; a role that is not named is refused by the template."""

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the turns and the opening of the answer."""
        text = "".join(self.turns[one["role"]][0] + one["content"] + self.turns[one["role"]][1] for one in messages)
        return text + self.turns["assistant"][0]

    def go(self) -> str:
        """Return it in Go's template language, as Ollama reads it."""
        parts = [
            f'{{{{ {"if" if n == 0 else "else if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for n, (role, (before, after)) in enumerate(self.turns.items())
        ]
        return f"{{{{- range .Messages }}}}{''.join(parts)}{{{{ end }}}}{{{{ end }}}}{self.turns['assistant'][0]}"


def _alike(before: str, after: str, roles: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    return {role: (before.format(role=name), after) for role, name in roles.items()}


_ALL = {"system": "system", "user": "user", "assistant": "assistant"}

STYLES: Final = (
    ChatStyle("ChatML", _alike("<|im_start|>{role}\n", "<|im_end|>\n", _ALL)),
    ChatStyle("Llama 3", _alike("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", _ALL)),
    ChatStyle("Gemma", _alike("<start_of_turn>{role}\n", "<end_of_turn>\n", {"user": "user", "assistant": "model"})),
    ChatStyle("Phi-3", _alike("<|{role}|>\n", "<|end|>\n", _ALL)),
    ChatStyle("Zephyr", _alike("<|{role}|>\n", "</s>\n", _ALL)),
)
"""Known templates. What a tokenizer puts before the first turn (BOS) is left out: Ollama puts it there itself."""


def known_style(tokenizer: Any) -> tuple[ChatStyle, str] | None:
    """Return the style of a tokenizer's chat template and the system text it puts in by itself, "" where it puts none.

    None stands for a template of another style, and for no template.
    """
    if not tokenizer.chat_template:
        return None
    alone = [{"role": "user", "content": "Hello."}]
    for style, opening in product(STYLES, dict.fromkeys(("", tokenizer.bos_token or ""))):
        talk = [{"role": role, "content": f"Text of {role}."} for role in (*style.turns, "user")]
        if _rendered(tokenizer, talk) != opening + style.render(talk):
            continue
        bare = (_rendered(tokenizer, alone) or "").removeprefix(opening)
        head, plain, _ = bare.partition(style.render(alone))
        before, after = style.turns.get("system", ("", ""))
        if plain and not head:
            return style, ""
        if plain and before and head.startswith(before) and head.endswith(after):
            return style, head[len(before) : len(head) - len(after)]
    return None


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str | None:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError:
        return None


def modelfile(source: str, adapter: str | None, known: tuple[ChatStyle, str] | None, ends: Sequence[str]) -> str:
    """Return a Modelfile.

    Args:
        source: what FROM names: a folder of safetensors relative to the file, or a model of Ollama's library.
        adapter: what ADAPTER names, or None.
        known: the chat template's style and its own system text, or None of one that is not known.
        ends: spellings of the tokens that end an answer.
    """
    lines = [f"FROM {source}", *([] if adapter is None else [f"ADAPTER {adapter}"])]
    if known is not None:
        style, system = known
        lines.append(f"# {style.name}, as in training")
        lines.append(f'TEMPLATE """{style.go()}"""')
        if system and '"""' not in system:
            lines.append(f'SYSTEM """{system}"""')
    else:
        lines.append("# No TEMPLATE: the chat template is none that is known here. Ollama looks for one by itself.")
    lines += [f'PARAMETER stop "{end}"' for end in ends if '"' not in end]
    return "\n".join(lines) + "\n"
