"""Models that leave: loaded by plain libraries they say the same; what would not be the same is refused."""

import json
import logging
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from typer.testing import CliRunner

from dpo import merge as merging
from dpo import ollama, recipes
from dpo.cli import app
from dpo.data import check, held_out_pairs
from dpo.errors import ConfigError, DPOError, ModelError
from dpo.export import export
from dpo.merge import MEAN_TOLERANCE, Agreement, agreement
from dpo.model.base import LanguageModel, load_base
from dpo.model.views import all_sums, keys
from dpo.run import Result, execute, read_last_stage
from dpo.settings import plan, read_overrides

Train = Callable[..., Result]
MakeTokenizer = Callable[..., PreTrainedTokenizerBase]

LLAMA3 = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] + "
    "'<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] + "
    "'<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
OWN_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs are kept that several tests look at: each is trained once."""
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture
def train(
    tmp_path: Path,
    shelf: Path,
    tiny_model_folder: Path,
    pairs_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Train:
    monkeypatch.chdir(tmp_path)
    pairs_file(tmp_path / "pairs.jsonl", prompts=24)

    def go(recipe: str, *given: str) -> Result:
        kept = shelf / "-".join(re.sub(r"\W", "_", one) for one in (recipe, *given))[-100:]
        if not kept.exists():
            common = ["data.train=pairs.jsonl", "data.eval_share=0.25", f"model.name={tiny_model_folder}"]
            common += [
                "model.dtype=float32",
                "model.device=cpu",
                "model.layout=padded",
                "loop.max_steps=4",
                "optimiser.learning_rate=2e-2",
            ]
            common += ["evaluation.max_prompts=0", "output.dir=run"]
            execute(plan(recipes.find(recipe), read_overrides([*common, *given])), recipe)
            shutil.copytree("run", kept)
            shutil.rmtree("run")
        shutil.copytree(kept, "run")
        return read_last_stage(Path("run"))

    return go


@pytest.fixture
def wide_model_folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """The tiny model twice as wide: 4-bit weights come in blocks of 64."""
    folder = tmp_path / "wide"
    shutil.copytree(tiny_model_folder, folder)
    settings = LlamaConfig.from_pretrained(tiny_model_folder)
    settings.hidden_size, settings.intermediate_size, settings.head_dim = 64, 128, 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(settings).save_pretrained(folder)
    return folder


def rows_of(result: Result, model: LanguageModel) -> list[Any]:
    return keys(held_out_pairs(check(result.run.data), model.tokenizer))


def plain_sums(network: torch.nn.Module, rows: list[Any]) -> list[float]:
    """Score with full logits, token by token, by nothing of this project."""
    found = []
    for prompt, completion in rows:
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].float()
        ahead = logits[len(prompt) - 1 : -1].log_softmax(-1)
        found.append(ahead.gather(1, torch.tensor(completion)[:, None]).sum().item())
    return found


def policy(result: Result) -> LanguageModel:
    model = LanguageModel.start(load_base(result.run.model), result.run.model, 0)
    model.restore(result.folder / "adapter")
    return model


# --- adapters ---


def test_an_adapter_says_the_same_through_plain_peft(train: Train) -> None:
    from peft import AutoPeftModelForCausalLM

    result = train("sft_dpo")  # it holds what the stage before has trained as well
    ours = policy(result)
    rows = rows_of(result, ours)
    expected = all_sums(ours, rows, "policy")
    done = export("run", "out")
    names = {file.name for file in Path("out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= names
    theirs = AutoPeftModelForCausalLM.from_pretrained("out").eval()
    assert plain_sums(theirs, rows) == pytest.approx(expected, abs=1e-4)
    with theirs.disable_adapter():
        assert plain_sums(theirs, rows) != pytest.approx(expected, abs=0.1)  # the adapter matters
    tokenizer = AutoTokenizer.from_pretrained("out")
    talk = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(talk, tokenize=False) == ours.tokenizer.apply_chat_template(
        talk, tokenize=False
    )
    assert (done.format, done.merge, done.pushed) == ("adapter", None, None)
    assert result.folder == Path("run/2-dpo")
    card = (result.folder / "README.md").read_text(encoding="utf-8")
    exported = (Path("out") / "README.md").read_text(encoding="utf-8")
    assert ModelCard(card).text.strip() in exported
    assert "AutoPeftModelForCausalLM" in exported


def test_a_card_edited_by_hand_leaves_with_the_model(train: Train) -> None:
    train("dpo")
    card = Path("run/README.md")
    card.write_text(card.read_text() + "\nLabelled by our own people.\n")
    export("run", "out")
    assert "Labelled by our own people." in Path("out/README.md").read_text()


def test_a_reward_model_leaves_with_its_head_as_an_adapter_alone(train: Train) -> None:
    train("reward")
    export("run", "out")
    assert load_file("out/head.safetensors")["weight"].equal(load_file("run/adapter/head.safetensors")["weight"])
    for kind in ("merged", "ollama"):
        with pytest.raises(ModelError, match="got a reward model"):
            export("run", "other", kind)


# --- merging ---


def test_a_merged_model_says_what_the_adapter_says_in_plain_transformers(train: Train) -> None:
    result = train("dpo")
    ours = policy(result)
    rows = rows_of(result, ours)
    expected, base = all_sums(ours, rows, "policy"), all_sums(ours, rows, "reference")
    done = export("run", "out", "merged", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32).eval()
    assert plain_sums(theirs, rows) == pytest.approx(expected, abs=1e-3)
    assert done.merge is not None
    assert done.merge.agreement.mean < 1e-4
    tokens = sum(len(completion) for _, completion in rows)
    assert done.merge.moved.tokens == tokens
    assert done.merge.moved.mean >= abs(sum(expected) - sum(base)) / tokens > 0.01
    assert not [file for file in Path("out").iterdir() if file.name.startswith("adapter")]


def test_sixteen_bits_are_the_default_and_the_difference_is_printed_and_kept(
    train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    train("dpo")
    caplog.set_level(logging.INFO, "dpo")
    done = CliRunner().invoke(app, ["export", "run", "--to", "out", "--format", "merged"])
    assert done.exit_code == 0, done.output
    assert load_file("out/model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    card = Path("out/README.md").read_text()
    (told,) = re.findall(r"Merged in bfloat16, against the adapter: (mean .* tokens\))", card)
    assert told in caplog.text
    assert float(told.split()[1].rstrip(",")) > 0
    plain = ModelCard(card).data.to_dict()
    assert (plain["library_name"], plain["base_model_relation"]) == ("transformers", "finetune")
    assert ModelCard(card).data.eval_results


def test_a_wrong_merge_is_refused_and_nothing_is_left(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    train("dpo")
    before = set(Path().iterdir())

    def unmerged(config: Any, adapter: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(config.name, dtype=torch.bfloat16)

    monkeypatch.setattr(merging, "_merged", unmerged)
    with pytest.raises(ModelError, match=rf"expected a mean of at most {MEAN_TOLERANCE:g}.*--dtype float16"):
        export("run", "out", "merged")
    assert set(Path().iterdir()) == before


def test_an_update_that_rounding_swallows_is_warned_of(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    train("dpo", "optimiser.learning_rate=1e-6")
    done = export("run", "out", "merged")
    assert done.merge is not None
    assert done.merge.lost > merging.LOST_SHARE
    assert "of what training moved. Give --dtype float16" in caplog.text


@pytest.mark.slow
def test_an_adapter_of_four_bit_weights_is_merged_only_when_asked_and_told_loudly(
    train: Train, wide_model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train("dpo", "model.quantization=nf4", f"model.name={wide_model_folder}")
    with pytest.raises(ModelError, match=r"trained on nf4 weights.*--dequantise"):
        export("run", "out", "merged")
    assert not Path("out").exists()
    done = export("run", "out", "merged", dequantise=True)
    assert done.merge is not None
    assert done.merge.quantised is not None
    assert done.merge.quantised.mean > done.merge.agreement.mean
    assert "this is not the model that the card measures" in caplog.text
    assert "Against the adapter on the 4-bit weights that it was trained on: mean" in Path("out/README.md").read_text()
    export("run", "adapter")  # needs no asking: it stands on what it was trained on


@pytest.mark.slow
def test_full_weights_leave_merged_alone(train: Train) -> None:
    train("dpo", "model.lora=null")
    with pytest.raises(ModelError, match="got full weights"):
        export("run", "out")
    done = export("run", "out", "merged", dtype="float32")
    assert done.merge is not None
    assert done.merge.agreement.mean < 1e-5
    assert done.merge.moved.mean > 0.01


def test_without_held_out_pairs_its_own_answers_are_compared(train: Train) -> None:
    train("dpo", "data.eval_share=0")
    done = export("run", "out", "merged", dtype="float32")
    assert done.merge is not None
    assert done.merge.agreement.tokens >= 16
    assert done.merge.agreement.mean < 1e-4


def test_numbers_that_are_not_finite_are_never_tolerable() -> None:
    nan = [torch.tensor([0.0, float("nan")])]
    assert not agreement(nan, [torch.zeros(2)]).tolerable
    assert agreement([torch.tensor([0.0, -1.0])], [torch.tensor([0.5, -1.0])]) == Agreement(2, 0.25, 0.5)


# --- Ollama ---


def parse(text: str) -> list[tuple[str, str]]:
    """Read a Modelfile by its grammar: comments, and INSTRUCTION arguments, which triple quotes carry over lines."""
    found, rest = [], text
    while rest:
        if match := re.match(r"\s*#[^\n]*(\n|$)|\s+", rest):
            rest = rest[match.end() :]
            continue
        match = re.match(r'([A-Za-z]+) +(?:"""(.*?)"""|([^\n]*))(\n|$)', rest, re.DOTALL)
        assert match is not None, rest
        found.append((match[1].upper(), match[2] if match[2] is not None else match[3]))
        rest = rest[match.end() :]
    return found


def go_template(template: str, messages: list[dict[str, str]]) -> str:
    """Carry out the part of Go's template language that is used: one range, chains of if eq .Role, .Content."""
    match = re.fullmatch(r"\{\{- range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.DOTALL)
    assert match is not None
    branches = re.split(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', match[1])
    assert branches[0] == ""
    texts = dict(zip(branches[1::2], branches[2::2], strict=True))
    assert all(text.count("{{") == 1 for text in texts.values())
    said = "".join(texts[one["role"]].replace("{{ .Content }}", one["content"]) for one in messages)
    return said + match[2]


TALK = [{"role": role, "content": f"{role} says {n}"} for n, role in enumerate(("user", "assistant", "user"))]


@pytest.mark.parametrize(
    ("template", "name", "system"),
    [
        (CHATML, "ChatML", ""),
        (OWN_SYSTEM + CHATML, "ChatML", "Be kind."),
        (LLAMA3, "Llama 3", ""),
        (GEMMA, "Gemma", ""),
    ],
)
def test_a_known_template_is_written_in_go_and_renders_the_same(
    make_tokenizer: MakeTokenizer, template: str, name: str, system: str
) -> None:
    tokenizer = make_tokenizer(template)
    known = ollama.known_style(tokenizer)
    assert known is not None
    assert (known[0].name, known[1]) == (name, system)
    instructions = parse(ollama.modelfile("./", None, known, ["<|im_end|>", "</s>"]))
    assert instructions[0] == ("FROM", "./")
    assert [one for one in instructions if one[0] == "PARAMETER"] == [
        ("PARAMETER", 'stop "<|im_end|>"'),
        ("PARAMETER", 'stop "</s>"'),
    ]
    (go,) = [text for word, text in instructions if word == "TEMPLATE"]
    assert [text for word, text in instructions if word == "SYSTEM"] == ([system] if system else [])
    talk = [{"role": "system", "content": system}, *TALK] if system else TALK
    told = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert go_template(go, talk) == str(told).removeprefix("<s>")


@pytest.mark.parametrize("template", [None, CHATML.replace("<|im_end|>", " |"), "{{ 'x' }}", "{{ 'Day 1' }}" + GEMMA])
def test_another_template_is_left_to_ollama(make_tokenizer: MakeTokenizer, template: str | None) -> None:
    assert ollama.known_style(make_tokenizer(template)) is None
    instructions = parse(ollama.modelfile("./", None, None, []))
    assert instructions == [("FROM", "./")]


def test_a_folder_for_ollama_is_merged_or_an_adapter_on_what_ollama_has(train: Train) -> None:
    train("dpo")
    export("run", "merged", "ollama")
    assert {"model.safetensors", "config.json", "Modelfile"} <= {file.name for file in Path("merged").iterdir()}
    instructions = parse(Path("merged/Modelfile").read_text())
    assert instructions[0] == ("FROM", "./")
    assert ("PARAMETER", 'stop "<|im_end|>"') in instructions
    export("run", "light", "ollama", base="smollm2:135m")
    assert parse(Path("light/Modelfile").read_text())[:2] == [("FROM", "smollm2:135m"), ("ADAPTER", "./")]
    assert (Path("light") / "adapter_model.safetensors").is_file()
    assert not (Path("light") / "model.safetensors").exists()


def test_a_template_whose_turns_begin_with_the_bos_token_is_known(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(OWN_SYSTEM + CHATML)
    tokenizer.bos_token = "<|im_start|>"  # as SmolLM2's: it is part of the turn, not something before the talk
    known = ollama.known_style(tokenizer)
    assert known is not None
    assert (known[0].name, known[1]) == ("ChatML", "Be kind.")


def test_an_adapter_that_ollama_cannot_express_is_refused(train: Train) -> None:
    train("dpo", "model.lora.rank_stabilised=true")
    with pytest.raises(ModelError, match=r"use_rslora, which Ollama's adapters cannot express"):
        export("run", "out", "ollama", base="smollm2")


# --- refused, and nothing left ---


def test_bad_runs_and_places_are_refused_with_nothing_written(train: Train) -> None:
    train("dpo")
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    shutil.copytree("run", "unfinished")
    Path("unfinished/summary.json").unlink()
    before = {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}
    cases: list[tuple[list[str], str]] = [
        (["run", "--to", "full"], "full is there already and not empty"),
        (["run", "--to", "pairs.jsonl"], "pairs.jsonl is a file"),
        (["unfinished", "--to", "out"], "unfinished: this run is not finished"),
        (["full", "--to", "out"], "full: holds no finished run"),
        (["nowhere", "--to", "out"], "nowhere: holds no finished run"),
        (["run", "--to", "out", "--format", "gguf"], "expected one of adapter, merged, ollama"),
        (["run", "--to", "out", "--format", "merged", "--dtype", "int8"], "expected one of auto, bfloat16"),
        (["run", "--to", "out", "--push", "not a name"], "expected owner/name"),
        (["run", "--to", "out", "--push", "me/x"], "is a folder of this machine"),
        (["run", "--to", "out", "loop.seed=1"], "loop: exporting cannot change it"),
        (["run", "--to", "out", "--format", "merged", "--base", "x/y"], "a merged model has no base"),
        (["run", "--to", "out", "--format", "ollama", "--base", "x\nSYSTEM y"], "expected the name of a model"),
        (["run", "--to", "out", "--format", "merged", "data.train=gone.jsonl"], "gone.jsonl: no such file"),
        (["run", "--to", "pairs.jsonl/below"], "cannot be written"),
    ]
    for arguments, said in cases:
        done = CliRunner().invoke(app, ["export", *arguments])
        assert done.exit_code in (1, 2), arguments
        assert said in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        assert {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()} == before
        assert not Path("out").exists()


def test_an_adapter_that_changed_its_base_is_refused(train: Train) -> None:
    train("dpo")
    file = Path("run/adapter/adapter_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": "pissa"}))
    with pytest.raises(ModelError, match=r"init_lora_weights='pissa', expected a plain LoRA"):
        export("run", "out")


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond a few kilobytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_full_disk_leaves_nothing_behind(train: Train, request: pytest.FixtureRequest, kind: Any) -> None:
    train("dpo")
    before = set(Path().iterdir())
    request.getfixturevalue("full_disk")
    with pytest.raises(ConfigError, match=r"out cannot be written .* Nothing is left of it"):
        export("run", "out", kind)
    assert set(Path().iterdir()) == before


def test_an_empty_folder_that_is_there_is_taken(train: Train) -> None:
    train("dpo")
    Path("deep/out").mkdir(parents=True)
    export("run", "deep/out")
    assert Path("deep/out/adapter_model.safetensors").is_file()
    assert [file.name for file in Path("deep").iterdir()] == ["out"]


# --- the hub ---


class Hub:
    """Stands for the hub's client."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.fault, self.calls = fault, []

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
        self.calls.append(("create", name, private))
        if self.fault is not None:
            raise self.fault

    def upload_folder(self, folder_path: str, repo_id: str) -> None:
        self.calls.append(("upload", repo_id, sorted(file.name for file in Path(folder_path).iterdir())))


def test_a_folder_is_uploaded_only_when_asked_whole_and_private(train: Train) -> None:
    train("dpo")
    hub = Hub()
    export("run", "quiet", hub=lambda: hub)
    assert hub.calls == []
    done = export("run", "out", base="owner/base", push="me/mine", hub=lambda: hub)
    assert done.pushed == "me/mine"
    assert hub.calls == [
        ("create", "me/mine", True),
        ("upload", "me/mine", sorted(file.name for file in Path("out").iterdir())),
    ]
    assert json.loads(Path("out/adapter_config.json").read_text())["base_model_name_or_path"] == "owner/base"
    assert ModelCard(Path("out/README.md").read_text()).data.to_dict()["base_model"] == "owner/base"


def test_a_hub_that_refuses_leaves_the_folder_and_says_how_to_send_it(train: Train) -> None:
    train("dpo")
    with pytest.raises(DPOError, match=r"no token.*is whole: .*`hf upload me/mine out`"):
        export("run", "out", base="owner/base", push="me/mine", hub=lambda: Hub(RuntimeError("no token")))
    assert Path("out/adapter_model.safetensors").is_file()
    with pytest.raises(DPOError, match="could not be written"):  # the real client, without a network
        export("run", "other", base="owner/base", push="me/mine")


def test_an_adapter_on_the_embedded_base_is_not_pushed_as_if_it_were_a_hub_model(
    train: Train, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo.model.base.fetch_embedded", lambda: tiny_model_folder)
    train("dpo", "model.name=embedded")
    with pytest.raises(ConfigError, match=r"the embedded base is no hub model.*--base HuggingFaceTB/"):
        export("run", "out", push="me/mine")
