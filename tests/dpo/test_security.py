"""What comes from others is data: it runs no code, leaves no folder, acts in no page. Secrets are written nowhere."""

import json
import pickle  # noqa: TID251  (to plant some)
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import pytest_socket
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from dpo import checkpoint, recipes
from dpo.cli import app
from dpo.data import DataConfig, check, prepare
from dpo.data import render as render_module
from dpo.data.limits import LimitError, bounded
from dpo.data.render import Renderer
from dpo.errors import CheckpointError, ConfigError, DataError, ModelError
from dpo.evaluation.report.template import template
from dpo.model.base import LanguageModel, ModelConfig, check_adapter, load_base, load_tokenizer
from dpo.run import only_process
from dpo.settings import Run, plan, read_overrides, read_run

pytestmark = pytest.mark.faults

Change = Callable[[Path], None]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that exists once planted code has run."""
    return tmp_path / "code-has-run"


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A model's folder to plant things in."""
    return shutil.copytree(tiny_model_folder, tmp_path / "model")


class Planted:
    """Creates a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def plant(file: Path, marker: Path) -> None:
    file.write_bytes(pickle.dumps(Planted(marker)))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def config(folder: Path) -> ModelConfig:
    return ModelConfig(name=str(folder), dtype="float32", device="cpu")


def test_what_is_planted_runs_where_it_is_unpickled(tmp_path: Path, marker: Path) -> None:
    plant(tmp_path / "file", marker)
    pickle.loads((tmp_path / "file").read_bytes())
    assert marker.exists()


class TestRow34Pickle:
    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
    def test_a_model_of_pickled_weights_alone_is_refused(self, folder: Path, marker: Path, name: str) -> None:
        (folder / "model.safetensors").unlink()
        plant(folder / name, marker)
        with pytest.raises(ModelError, match="AutoModelForCausalLM could not load it"):
            load_base(config(folder))
        assert not marker.exists()

    def test_so_are_sound_ones_that_torch_would_load(self, folder: Path) -> None:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")  # noqa: TID251
        (folder / "model.safetensors").unlink()
        with pytest.raises(ModelError, match=r"model\.safetensors"):
            load_base(config(folder))

    def test_pickles_beside_the_weights_are_not_opened(self, folder: Path, marker: Path) -> None:
        for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "scheduler.pt"):
            plant(folder / name, marker)
        load_base(config(folder))
        assert not marker.exists()

    def test_a_pickled_adapter_is_refused(self, tmp_path: Path, marker: Path) -> None:
        plant(tmp_path / "adapter_model.bin", marker)
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        with pytest.raises(ModelError, match=r"pickled \.bin adapters are refused"):
            check_adapter(str(tmp_path))
        plant(tmp_path / "adapter_model.safetensors", marker)
        with pytest.raises(ModelError, match="it is damaged"):
            check_adapter(str(tmp_path))
        assert not marker.exists()

    def test_an_adapter_with_a_pickle_beside_it_loads_its_tensors(
        self, start: Callable[..., LanguageModel], tmp_path: Path, marker: Path
    ) -> None:
        start().save(tmp_path)
        plant(tmp_path / "adapter_model.bin", marker)
        start(adapter=str(tmp_path))
        assert not marker.exists()

    def test_an_adapter_is_no_model(self, folder: Path, tmp_path: Path, start: Callable[..., LanguageModel]) -> None:
        start().save(folder)
        edit(folder / "adapter_config.json", base_model_name_or_path=str(folder))
        with pytest.raises(ModelError, match="got a LoRA adapter, expected a whole model"):
            load_base(config(folder))

    def test_in_a_checkpoint_it_is_not_opened_whatever_the_manifest_says(self, tmp_path: Path, marker: Path) -> None:
        def planted(folder: Path) -> None:
            for name in ("optimizer.pt", "random_states_0.pkl", "custom_checkpoint_0.pkl"):
                plant(folder / name, marker)

        checkpoint.save(tmp_path / "run", 1, {"adapter": {"a": torch.ones(2)}}, {}, planted)
        found = checkpoint.newest(tmp_path / "run")
        assert found is not None
        assert found.checkpoint.names == ("adapter",)
        assert torch.equal(found.checkpoint.tensors("adapter")["a"], torch.ones(2))
        assert not marker.exists()

    def test_a_pickle_under_the_name_of_tensors_is_refused(self, tmp_path: Path, marker: Path) -> None:
        path = checkpoint.save(
            tmp_path, 1, {"a": {"a": torch.ones(2)}}, {}, lambda at: plant(at / "b.safetensors", marker)
        )
        with pytest.raises(CheckpointError, match="cannot read the checkpoint"):
            checkpoint.load(path).tensors("b")
        assert not marker.exists()


class TestRow35RemoteCode:
    @pytest.fixture
    def code(self, folder: Path, marker: Path) -> None:
        """Planted code, in all places where transformers looks for some."""
        text = f"open({str(marker)!r}, 'w').close()\nclass C: pass\ndef generate(*a, **k): pass\n"
        (folder / "custom_generate").mkdir()
        for name in ("evil.py", "custom_generate/generate.py"):
            (folder / name).write_text(text)

    CONFIG: Change = staticmethod(
        lambda at: edit(at / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"})
    )
    TOKENIZER: Change = staticmethod(
        lambda at: edit(at / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.C", "evil.C"]})
    )
    UNKNOWN: Change = staticmethod(lambda at: edit(at / "config.json", model_type="unknown", trust_remote_code=True))
    CLASSLESS: Change = staticmethod(lambda at: edit(at / "tokenizer_config.json", tokenizer_class="C"))
    KERNEL: Change = staticmethod(
        lambda at: edit(
            at / "config.json", _attn_implementation_internal="evil/kernel", attn_implementation="evil/kernel"
        )
    )

    @pytest.mark.parametrize(
        "changes", [(CONFIG, UNKNOWN), (TOKENIZER, CLASSLESS)], ids=["of the model", "of the tokenizer"]
    )
    def test_a_model_that_needs_its_own_code_is_refused(
        self, folder: Path, marker: Path, code: None, changes: tuple[Change, ...]
    ) -> None:
        for change in changes:
            change(folder)
        with pytest.raises(ModelError, match="code of a model is never run here"):
            load_base(config(folder))
        assert not marker.exists()

    @pytest.mark.parametrize("change", [CONFIG, TOKENIZER, KERNEL], ids=["model", "tokenizer", "attention kernel"])
    def test_a_known_one_is_loaded_without_it(self, folder: Path, marker: Path, code: None, change: Change) -> None:
        change(folder)
        base = load_base(config(folder))
        assert type(base.network).__module__.startswith("transformers.models.llama")
        assert base.network.config._attn_implementation != "evil/kernel"
        assert not marker.exists()

    def test_no_setting_allows_it(self) -> None:
        with pytest.raises(ConfigError, match=r"unknown key 'model\.trust_remote_code'"):
            Run.of({"data": {"train": "x"}, "model": {"trust_remote_code": True}}, "run.yaml")

    @pytest.mark.parametrize("content", ["[]", '"x"', "{", ""])
    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
    def test_damaged_files_are_an_error_of_the_model(self, folder: Path, name: str, content: str) -> None:
        (folder / name).write_text(content)
        with pytest.raises(ModelError, match="could not load it"):
            load_base(config(folder))


class TestRow36Paths:
    @pytest.mark.parametrize("name", ["/abs", "../x", "a/b", "", ".", "..", "a\nb", "a" * 65, "-x", "a b", "<b>"])
    def test_names_are_no_paths(self, name: str) -> None:
        with pytest.raises(ConfigError, match="name must match"):
            Run.of({"name": name, "data": {"train": "x"}}, "run.yaml")

    def test_a_link_that_leads_out_of_the_folder_is_refused_and_nothing_written_through_it(
        self, tmp_path: Path
    ) -> None:
        elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
        elsewhere.mkdir()
        (run / "1-sft").mkdir(parents=True)
        for link in (run / "1-sft" / "adapter", run / "metrics.jsonl", run / ".lock"):
            link.symlink_to(elsewhere / link.name)
            with pytest.raises(ConfigError, match=f"{link}: is a link to {elsewhere}"), only_process(run):
                raise AssertionError("held")
            link.unlink()
        assert not any(elsewhere.iterdir())

    def test_links_within_it_and_to_it_are_fine(self, tmp_path: Path) -> None:
        (tmp_path / "disk" / "run").mkdir(parents=True)
        (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")
        (tmp_path / "disk" / "run" / "latest").symlink_to("first")
        with only_process(tmp_path / "run"):
            assert (tmp_path / "disk" / "run" / ".lock").exists()

    @pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd"])
    def test_a_manifest_cannot_name_a_file_elsewhere(self, tmp_path: Path, name: str) -> None:
        path = checkpoint.save(tmp_path, 1, {"a": {"a": torch.ones(2)}}, {})
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][name] = manifest["files"]["a.safetensors"]
        (path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match="lies outside the checkpoint"):
            checkpoint.load(path)


ENDLESS = "{% for a in range(90000) %}" * 3 + "{% endfor %}" * 3


class TestRow37Templates:
    @pytest.mark.parametrize(
        "attack",
        [
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
            "{{ messages.append(1) }}",
        ],
    )
    def test_one_that_leaves_its_sandbox_is_refused(self, make_tokenizer: Callable[..., Any], attack: str) -> None:
        with pytest.raises(DataError, match="the chat template does what no template may"):
            Renderer(make_tokenizer(attack), 64)

    def test_one_without_end_is_stopped(
        self, make_tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(render_module, "_SECONDS", 0.2)
        before = time.monotonic()
        with pytest.raises(DataError, match=r"takes more than 0\.2 s of computing for one conversation"):
            Renderer(make_tokenizer(ENDLESS), 64)
        assert time.monotonic() - before < 30  # the loops would take a century

    def test_so_is_one_that_waits_for_a_row(
        self, write_rows: Callable[..., str], make_tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(render_module, "_SECONDS", 0.2)
        chat = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
        tokenizer = make_tokenizer(chat + "{% if 'now' in messages[0]['content'] %}" + ENDLESS + "{% endif %}")
        rows = [{"prompt": f"prompt {n}", "chosen": "a", "rejected": "b"} for n in range(3)]
        settings = DataConfig(train=write_rows(rows), eval_share=0)
        assert len(prepare(settings, tokenizer, "pairs").train) == 3
        rows[1]["prompt"] = "now"
        with pytest.raises(DataError, match="s of computing"):
            prepare(DataConfig(train=write_rows(rows), eval_share=0), tokenizer, "pairs")

    @pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is bounded on Linux alone")
    @pytest.mark.parametrize("bomb", ["{{ 'a' * 10**11 }}", "{{ 'a' | center(10**11) }}", "{{ '%99999999999d' % 1 }}"])
    def test_one_that_fills_the_memory_is_stopped(self, make_tokenizer: Callable[..., Any], bomb: str) -> None:
        with pytest.raises(DataError, match="takes more than 1024 MiB of memory"):
            Renderer(make_tokenizer(bomb), 64)

    def test_one_that_writes_too_much_is_refused(self, make_tokenizer: Callable[..., Any]) -> None:
        with pytest.raises(DataError, match=r"makes 3,000,000 characters of \d, expected little more"):
            Renderer(make_tokenizer("{{ 'a' * 3000000 }}"), 64)

    def test_bounds_are_taken_off_again_and_hold_in_the_main_thread(self) -> None:
        import resource
        import signal

        before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
        with pytest.raises(LimitError, match=r"more than 0\.05 s"):
            stubborn()
        assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == before
        assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0


def stubborn() -> None:
    """Go on whatever is raised, as code of a template may."""
    with bounded(0.05, 2**30):
        while True:
            with suppress(Exception):
                while True:
                    pass


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


class TestRow38Yaml:
    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("!!python/object/apply:os.system ['touch code-has-run']", "got the tag tag:yaml.org,2002:python/object"),
            ("name: !!python/name:os.system", "got the tag tag:yaml.org,2002:python/name"),
            ("name: !!binary aaaa", "got the tag tag:yaml.org,2002:binary"),
            (LAUGHS, r"got the alias \*a0"),
            ("data: &a [*a]", r"got the alias \*a"),
            ("data: " + "[" * 20_000, "nested too deeply"),
            ("data: " + "9" * 5_000, "Exceeds the limit"),
            ("data: {train: a}\ndata: {train: b}", "got the key data twice"),
            ("1: a\n1.0: b", "got the key 1.0 twice"),
            ("data: " + "a" * 2**20, "more than 1,048,576 characters"),
        ],
        ids=["object", "name", "binary", "laughs", "itself", "deep", "digits", "twice", "equal keys", "long"],
    )
    def test_an_attack_in_a_run_file_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, said: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        file = tmp_path / "run.yaml"
        file.write_text(content)
        with pytest.raises(ConfigError, match=said), bounded(20, 2**29):
            read_run(file, {})
        assert [one.name for one in tmp_path.iterdir()] == ["run.yaml"]

    def test_and_so_is_one_on_the_command_line(self) -> None:
        for value in ("!!python/name:os.system", "&a [*a]", "[" * 20_000):
            with pytest.raises(ConfigError, match="the value is not YAML"):
                read_overrides([f"output.dir={value}"])

    @pytest.mark.parametrize(
        "key",
        [
            *("model.attn_implementation", "model.dtype", "model.quantization", "model.device", "model.layout"),
            *("optimiser.name", "optimiser.lr_scheduler_type", "data.overlong", "data.on_bad_row", "model.lora.init"),
        ],
    )
    def test_a_choice_is_one_of_a_closed_list(self, key: str) -> None:
        with pytest.raises(ConfigError, match=f"{key}: Input should be "):
            plan(recipes.find("dpo"), read_overrides(["data.train=x", f"{key}=evil/kernel"]))

    @pytest.mark.parametrize("name", ["os:system", "..os:system", "no_such_objective", "subprocess:Popen"])
    def test_an_objective_is_one_of_ours_or_a_class_below_ours(self, name: str) -> None:
        with pytest.raises(ConfigError, match="objective"):
            Run.of({"data": {"train": "x"}, "objective": name}, "run.yaml")

    def test_settings_cannot_be_changed_afterwards(self) -> None:
        run = Run(data=DataConfig(train="x"))
        with pytest.raises(ValidationError, match="frozen"):
            run.model.name = "y"  # pyright: ignore[reportAttributeAccessIssue]


# --- a whole comparison ---------------------------------------------------------------------------------------------

SECRETS = {
    "HF_TOKEN": "hf_PlantedAbCdEfGhIjKlMnOpQrStUvWxYz12",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "OPENAI_API_KEY": "sk-planted-0123456789abcdef",
    "MY_JUDGE_API_KEY": "planted.Key-0123456789",  # looks like no vendor's
}
HOSTILE = (
    "</script></style><script>alert(1)</script><img src=x onerror=alert(1)><svg onload=alert(1)>\"'`{{7*7}}\x1b[2J"
)


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


def assert_inert(page: str) -> None:
    elements = Page(page).elements
    head = [tag for tag, _ in elements]
    policy = next(attributes for tag, attributes in elements if tag == "meta" and "http-equiv" in attributes)
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert str(policy["content"]).startswith("default-src 'none'; ")
    assert elements.index(("meta", policy)) < min(head.index(tag) for tag in ("style", "title", "body"))
    assert not {"script", "img", "iframe", "object", "embed", "form", "link", "base"} & set(head)
    for _, attributes in elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert not str(attributes.get("href", "#")).lower().startswith(("javascript", "data", "http"))
    assert "\x1b" not in page


@pytest.fixture
def work(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with hostile rows, and secrets in the environment and on the command line."""
    rows = [
        {"prompt": f"What of {n}? {HOSTILE}", "chosen": f"It is good. {HOSTILE}", "rejected": f"Bad {n}."}
        for n in range(24)
    ]
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "planted_reward.py").write_text(
        "import os\n"
        "def length(prompt, completion): return len(completion)\n"
        "def fails(prompt, completion): raise RuntimeError('no answer to the key ' + os.environ['MY_JUDGE_API_KEY'])\n"
    )
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setattr(sys, "argv", ["dpo", "train", f"--key={SECRETS['HF_TOKEN']}"])
    monkeypatch.chdir(folder)
    return folder


def dpo(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def small(model: Path) -> list[str]:
    return [
        *("data.train=pairs.jsonl", f"model.name={model}", "model.dtype=float32", "model.device=cpu"),
        *("loop.gradient_accumulation_steps=1", "loop.per_device_train_batch_size=4", "data.eval_share=0.2"),
        *("evaluation.max_prompts=2", "evaluation.max_new_tokens=2", "data.max_length=512"),
    ]


def assert_without_secrets(folder: Path, said: str) -> None:
    """Look for every secret in every byte."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 10
    for name, secret in SECRETS.items():
        assert secret not in said, name
        for file in files:
            assert secret.encode() not in file.read_bytes(), f"{name} in {file}"
            assert secret not in str(file)


@pytest.mark.parametrize(
    ("objectives", "trackers"),
    [("dpo", ""), pytest.param("dpo,kto", "wandb,tensorboard,trackio", marks=pytest.mark.slow)],
)
def test_rows_39_and_40_a_comparison_of_hostile_rows_acts_nowhere_and_tells_no_secret(
    work: Path, tiny_model_folder: Path, objectives: str, trackers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(work / "trackio"))
    settings = [*small(tiny_model_folder), f"output.report_to=[{trackers}]"]
    gold = "evaluation.gold=planted_reward:length"
    told = dpo("compare", "--objectives", objectives, "--completions", "8", "--output", "compared", gold, *settings)
    assert told.exit_code == 0, told.output
    failed = dpo("train", "dpo", "loop.max_steps=1", "evaluation.gold=planted_reward:fails", *settings)
    assert failed.exit_code == 1
    assert "no answer to the key [redacted]" in failed.stderr
    checked = dpo("data", "check", "pairs.jsonl", "--html", "data.html", "--tokenizer", str(tiny_model_folder))
    assert checked.exit_code == 0, checked.output
    for written in ("*.wandb", "events.out.tfevents.*", "trackio/*.db"):
        assert any(work.rglob(written)) == bool(trackers), written
    assert_without_secrets(work, told.output + failed.output + checked.output)
    for page in ("compared/report.html", "data.html"):
        assert_inert((work / page).read_text(encoding="utf-8"))
    assert "alert(1)" in (work / "compared/report.html").read_text(encoding="utf-8")  # it is there, as text


class TestRow39Pages:
    def test_every_page_that_is_written_allows_nothing_from_elsewhere(self) -> None:
        rooms = Path(template("report.html.jinja").filename or "").parent
        whole = [file.name for file in rooms.glob("*.jinja") if "<head>" in file.read_text(encoding="utf-8")]
        assert whole
        for name in whole:
            head = (rooms / name).read_text(encoding="utf-8").partition("</head>")[0]
            assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'; ' in head, name

    def test_values_are_escaped_unless_a_template_says_otherwise(self) -> None:
        made = template("report.html.jinja").environment.from_string("<p title='{{ a }}'>{{ a }}</p>")
        assert "<script" not in made.render(a=HOSTILE)
        assert "'><" not in made.render(a="'><b>")


class TestRow40Secrets:
    @pytest.mark.parametrize(
        "setting",
        [
            f"output.project={SECRETS['HF_TOKEN']}",
            f"data.train=/data/{SECRETS['OPENAI_API_KEY']}/rows.jsonl",
            f"model.name={SECRETS['MY_JUDGE_API_KEY']}",
            f"data.columns={{prompt: {SECRETS['WANDB_API_KEY']}}}",
            f"hf_token={SECRETS['HF_TOKEN']}",
        ],
    )
    def test_a_key_in_a_setting_is_refused_unsaid(self, work: Path, setting: str) -> None:
        said = dpo("train", "dpo", *small(Path("none")), setting)
        assert said.exit_code == 2
        assert "access key" in said.stderr or "unknown key 'hf_token'" in said.stderr
        assert not [name for name, secret in SECRETS.items() if secret in said.output]
        assert not (work / "runs").exists()

    def test_a_commit_and_a_path_that_look_like_one_are_none(self) -> None:
        revision, train = "89abcdef0123456789abcdef0123456789abcdef", "sk-learn-pairs.jsonl"
        run = Run.of({"data": {"train": train}, "model": {"revision": revision}}, "run.yaml")
        assert (run.data.train, run.model.revision) == (train, revision)

    def test_a_password_in_an_address_is_not_shown(self, work: Path) -> None:
        said = dpo("train", "dpo", "data.train=https://user:pass-word-1@host/rows.jsonl")
        assert said.exit_code == 1
        assert "https:/user:[redacted]@host/rows.jsonl" in said.stderr


class TestRow41Network:
    def test_no_test_reaches_one(self) -> None:
        with pytest.raises(pytest_socket.SocketBlockedError):
            socket.socket(socket.AF_INET)

    def test_data_never_name_a_place_to_fetch_from(self) -> None:
        with pytest.raises(DataError, match="no such file"):
            check(DataConfig(train="http://127.0.0.1:9/rows.jsonl"))

    def test_the_hub_is_not_asked_for_a_model_that_lies_here(self, tiny_config: ModelConfig) -> None:
        assert load_tokenizer(tiny_config).eos_token == "<|im_end|>"  # opening a socket would fail the test


# --- our own code ---------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
BANNED = [
    "S102",
    "S103",
    "S108",
    "S301",
    "S302",
    "S306",
    "S307",
    "S310",
    "S506",
    "S602",
    "S604",
    "S605",
    "S606",
    "S701",
]


def test_our_own_code_unpickles_evaluates_and_shells_out_nowhere(tmp_path: Path) -> None:
    """The rules of lint that .ci/run holds the tree to, here with every `noqa` left out."""
    rooms = [str(ROOT / one) for one in ("dpo", "losses", "data", "recipes")]
    lint = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--quiet",
        "--no-cache",
        "--ignore-noqa",
        f"--select={','.join(BANNED)}",
    ]
    found = subprocess.run([*lint, "--select=TID251", *rooms], capture_output=True, text=True, check=False, cwd=ROOT)
    assert found.returncode == 0, found.stdout
    planted = tmp_path / "planted.py"
    planted.write_text("import pickle\npickle.loads(b'')\neval('1')\n")
    config_file = ["--config", str(ROOT / "pyproject.toml")]
    assert subprocess.run([*lint, *config_file, str(planted)], capture_output=True, check=False).returncode == 1
