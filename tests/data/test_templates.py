"""The boundary of prompt and completion is exact under the chat templates that models are published with.

The templates are written from the published formats, without their parts for tools and pictures.
"""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dpo.data import BadRow, DataConfig, Drop, Message, Renderer, prepare
from dpo.errors import DataError
from dpo.model.forest import Forest, Group


@dataclass(frozen=True)
class Style:
    """A published chat format."""

    template: str
    specials: tuple[str, ...]
    end: str
    """The token that ends an answer."""
    bos: str | None = None
    eos: str | None = None
    """The tokenizer's own, where it is not `end`."""
    system: bool = True
    """Whether the format takes a system turn that stays where it is."""


GENERATION = "{% if add_generation_prompt %}"
LOOP, END_LOOP, END_IF = "{% for m in messages %}", "{% endfor %}", "{% endif %}"
SYSTEM_APART = (  # the system text is no turn of its own
    "{% if messages[0]['role'] == 'system' %}{% set system, turns = messages[0]['content'], messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}"
)
CHATML = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
CHATML_SPECIALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
THINKS = "'</think>' in m['content']"

STYLES = {
    "ChatML with a system text of its own": Style(
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
        + (LOOP + CHATML + END_LOOP + GENERATION + "{{ '<|im_start|>assistant\\n' }}" + END_IF),
        CHATML_SPECIALS,
        "<|im_end|>",
        eos="<|endoftext|>",
    ),
    "Llama 2": Style(
        SYSTEM_APART + "{% for m in turns %}"
        "{% set text = m['content'] %}{% if loop.first and system is defined %}"
        "{% set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + text %}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        (),
        "</s>",
        bos="<s>",
    ),
    "Llama 3": Style(
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}" + GENERATION
        + ("{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}" + END_IF),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
    ),
    "Mistral": Style(  # the system text stands in the last user turn, but only as long as no answer follows it
        SYSTEM_APART + "{{ bos_token }}{% for m in turns %}{% if m['role'] == 'user' %}"
        "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\\n\\n' + m['content'] + '[/INST]' }}"
        "{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
        ("[INST]", "[/INST]"),
        "</s>",
        bos="<s>",
        system=False,
    ),
    "Gemma": Style(
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' }}"
        "{{ m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        + (GENERATION + "{{ '<start_of_turn>model\\n' }}" + END_IF),
        ("<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        bos="<bos>",
        eos="<eos>",
        system=False,
    ),
    "Zephyr": Style(
        LOOP + "{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}" + END_LOOP
        + (GENERATION + "{{ '<|assistant|>\\n' }}" + END_IF),
        (),
        "</s>",
        bos="<s>",
    ),
    "Phi-3": Style(
        LOOP + "{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}" + END_LOOP
        + (GENERATION + "{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}" + END_IF),
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|end|>",
        bos="<s>",
        eos="<|endoftext|>",
    ),
    "Harmony": Style(  # the last answer ends otherwise than earlier ones
        "{% for m in messages %}{{ '<|start|>' + m['role'] }}"
        "{{ '<|channel|>final' if m['role'] == 'assistant' else '' }}{{ '<|message|>' + m['content'] }}"
        "{{ '<|return|>' if loop.last and m['role'] == 'assistant' else '<|end|>' }}{% endfor %}"
        + (GENERATION + "{{ '<|start|>assistant' }}" + END_IF),
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
        "<|return|>",
    ),
    "Qwen 3": Style(  # thoughts stand in the answer to the last question only, and there even where there are none
        "{% set seen = namespace(asked=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{% set seen.asked = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m['role'] != 'assistant' %}" + CHATML + "{% else %}"
        "{% set thought, text = '', m['content'] %}{% if " + THINKS + " %}"
        "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
        "{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}{{ '<|im_start|>assistant\\n' }}"
        "{% if loop.index0 > seen.asked %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' + text.lstrip('\\n') }}"
        "{% else %}{{ text }}{% endif %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        + (GENERATION + "{{ '<|im_start|>assistant\\n' }}" + END_IF),
        CHATML_SPECIALS,
        "<|im_end|>",
        eos="<|endoftext|>",
    ),
}  # fmt: skip

R1_TURNS = (  # every answer loses its thoughts
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% else %}{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
)
R1 = Style(
    R1_TURNS + GENERATION + "{{ '<|Assistant|><think>\\n' }}" + END_IF,
    ("<|User|>", "<|Assistant|>"),
    "<|eos|>",
    bos="<|bos|>",
)
EARLY_R1 = Style(R1_TURNS + GENERATION + "{{ '<|Assistant|>' }}" + END_IF, R1.specials, R1.end, R1.bos)
TWO_WAYS = Style(  # what stands before an answer depends on the system text, but not once the answer is there
    SYSTEM_APART + "{% for m in turns %}{{ m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"
    + (GENERATION + "{{ 'kindly:' if system is defined else 'assistant:' }}" + END_IF),
    (),
    "</s>",
)  # fmt: skip
UNSTABLE = Style("{{ messages | length }}" + LOOP + CHATML + END_LOOP, CHATML_SPECIALS, "<|im_end|>")

TALK = (("user", "hi"), ("assistant", " yo\n"), ("user", "what a day?"))
SPELLED = ("<|im_end|>", "</s>", "<eos>", "<|eot_id|>", "<|return|>", "[INST]", "\ue000", "\ue0001\ue001")

plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ue000\ue001\ue002<["), max_size=12)
spaced = st.tuples(st.sampled_from(["", " ", "\n", "\t\n ", "\u2028"]), plain, st.sampled_from(["", "  ", "\n\n"]))
clean = spaced.map("".join).filter(str.strip)
texts = st.lists(st.one_of(clean, st.sampled_from(SPELLED)), min_size=1, max_size=4).map("".join)
few = settings(max_examples=15, deadline=None)
every_style = pytest.mark.parametrize("name", STYLES)


def tokenizer_of(style: Style) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    own = [token for token in (style.bos, style.eos, style.end) if token]
    specials = [*dict.fromkeys([*own, *style.specials])]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=specials, initial_alphabet=alphabet)
    core.train_from_iterator(["user assistant model\n\n what a good day think\n"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=style.bos,
        eos_token=style.eos or style.end,
        additional_special_tokens=specials,
        chat_template=style.template,
    )


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {name: tokenizer_of(style) for name, style in STYLES.items()}


def chat(turns) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def messages(turns) -> tuple[Message, ...]:
    return tuple(Message(role, content) for role, content in turns)


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def shown(style: Style, turns, completion: str) -> tuple[str, str]:
    """Return prompt and completion as they decode."""
    tokenizer = tokenizer_of(style)
    rendered = Renderer(tokenizer, 4096).render(messages(turns), [completion], "f:7")
    return decode(tokenizer, rendered.prompt), decode(tokenizer, rendered.completions[0])


class TestEveryStyle:
    @every_style
    @few
    @given(first=clean, last=clean)
    def test_the_prompt_is_what_the_template_gives_for_generation(self, tokenizers, name, first, last):
        tokenizer, renderer = tokenizers[name], Renderer(tokenizers[name], 4096)
        head = (("system", "be kind"),) if STYLES[name].system else ()
        for turns in (
            (("user", last),),
            (*head, ("user", first), ("assistant", "yo"), ("user", last)),
        ):
            expected = tokenizer.apply_chat_template(chat(turns), add_generation_prompt=True)["input_ids"]
            assert list(renderer.prompt(messages(turns))) == expected
            assert list(renderer.render(messages(turns), ["good"]).prompt) == expected

    @every_style
    @few
    @given(first=texts, last=texts, completion=texts)
    def test_prompt_and_completion_are_the_templates_text_up_to_the_end_token(
        self, tokenizers, name, first, last, completion
    ):
        tokenizer, style = tokenizers[name], STYLES[name]
        turns = (("user", first), *TALK[1:2], ("user", last))
        full = tokenizer.apply_chat_template(chat((*turns, ("assistant", completion))), tokenize=False)
        before = tokenizer.apply_chat_template(chat(turns), tokenize=False, add_generation_prompt=True)
        rendered = Renderer(tokenizer, 4096).render(messages(turns), [completion])
        assert decode(tokenizer, rendered.prompt) == before
        assert before + decode(tokenizer, rendered.completions[0]) == full.rpartition(style.end)[0] + style.end

    @every_style
    @few
    @given(last=texts, completion=texts)
    def test_a_completion_ends_once_and_no_text_becomes_a_special_token(self, tokenizers, name, last, completion):
        tokenizer, style = tokenizers[name], STYLES[name]
        renderer, special = Renderer(tokenizer, 4096), set(tokenizer.all_special_ids)
        end = tokenizer.convert_tokens_to_ids(style.end)
        rendered, innocent = (
            renderer.render(messages((*TALK[:2], ("user", asked))), [answered])
            for asked, answered in ((last, completion), ("x", "x"))
        )
        (answer,) = rendered.completions
        assert (answer.count(end), answer[-1]) == (1, end)
        assert end in renderer.end_tokens
        for found, expected in ((rendered.prompt, innocent.prompt), (answer, innocent.completions[0])):
            assert [i for i in found if i in special] == [i for i in expected if i in special]

    @every_style
    @few
    @given(last=texts, completions=st.lists(texts, min_size=2, max_size=3))
    def test_the_scored_tokens_are_the_completions_and_nothing_else(self, tokenizers, name, last, completions):
        rendered = Renderer(tokenizers[name], 4096).render(messages((("user", last),)), completions)
        forest = Forest.padded([Group(rendered.prompt, rendered.completions)], pad_id=0)
        scored = [forest.target[forest.sequence == n].tolist() for n in range(len(completions))]
        assert scored == [list(ids) for ids in rendered.completions]
        assert all(len(ids) >= 2 for ids in scored)  # a token of the text, and the end
        mask = forest.branch > 0
        assert [row[own].tolist() for row, own in zip(forest.input_ids, mask, strict=True)] == scored
        for row, own, ids in zip(forest.input_ids, mask, scored, strict=True):
            assert tuple(row[~own][: len(rendered.prompt)].tolist()) == rendered.prompt
            assert own[len(rendered.prompt) : len(rendered.prompt) + len(ids)].all()


class TestByHand:
    """What a few of the formats look like, so that the templates above are those that they are named after."""

    @pytest.mark.parametrize(
        ("name", "prompt", "completion"),
        [
            ("Llama 2", "<s>[INST] hi [/INST] yo </s><s>[INST] what a day? [/INST]", " good </s>"),
            (
                "Llama 3",
                "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\nyo<|eot_id|>"
                "<|start_header_id|>user<|end_header_id|>\n\nwhat a day?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
                "good<|eot_id|>",
            ),
            (
                "Gemma",
                "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nyo<end_of_turn>\n"
                "<start_of_turn>user\nwhat a day?<end_of_turn>\n<start_of_turn>model\n",
                "good<end_of_turn>",
            ),
            (
                "Phi-3",
                "<|user|>\nhi<|end|>\n<|assistant|>\n yo\n<|end|>\n<|user|>\nwhat a day?<|end|>\n<|assistant|>\n",
                "good<|end|>",
            ),
            (
                "Qwen 3",
                "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n yo\n<|im_end|>\n"
                "<|im_start|>user\nwhat a day?<|im_end|>\n<|im_start|>assistant\n",
                "<think>\n\n</think>\n\ngood<|im_end|>",
            ),
            ("Mistral", "<s>[INST] hi[/INST]  yo\n</s>[INST] what a day?[/INST]", " good</s>"),
        ],
    )
    def test_a_conversation(self, name, prompt, completion):
        assert shown(STYLES[name], TALK, "good") == (prompt, completion)

    def test_a_format_without_system_turns_drops_the_row(self):
        with pytest.raises(BadRow, match="System role not supported") as raised:
            shown(STYLES["Gemma"], (("system", "be kind"), ("user", "hi")), "good")
        assert raised.value.reason is Drop.TEMPLATE


class TestTurnsThatChange:
    """Templates that write a finished conversation otherwise than its start."""

    def test_a_system_text_that_an_answer_drives_out_is_in_the_prompt(self):
        turns = (("system", "be kind"), *TALK)
        tokenizer = tokenizer_of(STYLES["Mistral"])
        full = tokenizer.apply_chat_template([*chat(turns), *chat([("assistant", "good")])], tokenize=False)
        assert "be kind" not in full  # whoever cuts the prompt from the whole rendering trains without it
        prompt = "<s>[INST] hi[/INST]  yo\n</s>[INST] be kind\n\nwhat a day?[/INST]"
        assert shown(STYLES["Mistral"], turns, "good") == (prompt, " good</s>")

    @few
    @given(system=texts, asked=texts, completion=texts)
    def test_and_the_completion_is_that_of_the_same_row_without_it(self, tokenizers, system, asked, completion):
        renderer = Renderer(tokenizers["Mistral"], 4096)
        turns = messages((("system", system), ("user", asked)))
        with_system, without = (renderer.render(prompt, [completion]) for prompt in (turns, turns[1:]))
        assert with_system.completions == without.completions
        assert with_system.prompt == renderer.prompt(turns) != without.prompt

    @pytest.mark.parametrize("thought", ["<think>\nso\n</think>\n\n", "<think>so</think>"])
    def test_thoughts_are_written_as_the_template_writes_them(self, thought):
        asked, answered = shown(STYLES["Qwen 3"], TALK[:1], f"{thought}good")
        assert asked == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert answered == "<think>\nso\n</think>\n\ngood<|im_end|>"

    def test_thoughts_go_on_where_the_prompt_opens_them(self):
        asked, answered = shown(R1, TALK[:1], "<think>\nso\n</think>\n\ngood")
        assert asked == "<|bos|><|User|>hi<|Assistant|><think>\n"
        assert answered == "so\n</think>\n\ngood<|eos|>"

    def test_thoughts_that_the_template_leaves_out_are_kept(self):
        asked, answered = shown(EARLY_R1, TALK[:1], "<think>\nso\n</think>\n\ngood")
        assert asked == "<|bos|><|User|>hi<|Assistant|>"
        assert answered == "<think>\nso\n</think>\n\ngood<|eos|>"
        assert shown(EARLY_R1, TALK[:1], "good") == (asked, "good<|eos|>")

    @few
    @given(completion=texts)
    def test_no_text_of_a_completion_is_lost(self, completion):
        for style in (R1, EARLY_R1, STYLES["Qwen 3"]):
            for thought in ("<think>\nso\n</think>\n\n", "<think>\na\n</think>b</think>"):
                asked, answered = shown(style, TALK[:1], thought + completion)
                assert "".join(f"{thought}{completion}{style.end}".split()) in "".join((asked + answered).split())

    def test_a_completion_that_cannot_stand_behind_the_prompt_is_no_row(self, write_rows):
        with pytest.raises(BadRow, match=r"at generation answers begin with '<think>\\n', this one not") as raised:
            shown(R1, TALK[:1], "good")
        assert raised.value.reason is Drop.TEMPLATE
        thought = "<think>\nso\n</think>\n"
        rows = [{"prompt": f"p{n}", "chosen": f"{thought}good", "rejected": f"{thought}bad"} for n in range(3)]
        rows.append({"prompt": "p3", "chosen": "good", "rejected": f"{thought}bad"})
        report = prepare(DataConfig(train=write_rows(rows), eval_share=0), tokenizer_of(R1), "pairs").report
        assert (report.kept, report.dropped) == (3, {Drop.TEMPLATE: 1})

    def test_a_boundary_that_cannot_be_told_is_an_error(self):
        with pytest.raises(DataError, match=r"f:7: the chat template .* is not prefix-stable at character 0"):
            shown(UNSTABLE, TALK[:1], "good")
        assert shown(TWO_WAYS, TALK[:1], "good") == ("user:hi</s>assistant:", "good</s>")
        with pytest.raises(DataError, match=r"f:7: the chat template .* is not prefix-stable at character 11"):
            shown(TWO_WAYS, (("system", "be kind"), *TALK[:1]), "good")
