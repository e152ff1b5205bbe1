"""A trained model as others load it: a LoRA adapter, a merged model in 16 bits, or a folder for Ollama.

A folder is written beside its place under a hidden name and renamed once it is whole. A merged model is read back from
it and compared with the adapter token by token before that.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, final

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from dpo import ollama
from dpo.card import CARD_FILE, card, escape, hub_model
from dpo.data import Renderer
from dpo.errors import ConfigError, ModelError
from dpo.merge import Merge, Precision, merge
from dpo.model.base import HEAD_FILE, check_adapter, load_tokenizer
from dpo.model.embedded import EMBEDDED, fetch_embedded
from dpo.run import ADAPTER, RUN_FILE, Result, read_last_stage
from dpo.settings import Run, read_run

log = logging.getLogger("dpo")

Format = Literal["adapter", "merged", "ollama"]

ADAPTER_FILES: Final = ("adapter_config.json", "adapter_model.safetensors")


@final
@dataclass(frozen=True)
class Exported:
    """A folder that was written."""

    folder: Path
    format: Format
    merge: Merge | None
    pushed: str | None
    """Where to, or None."""


def export(
    run: Path | str,
    to: Path | str,
    format: Format = "adapter",
    *,
    base: str | None = None,
    dtype: Precision = "auto",
    dequantise: bool = False,
    push: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    hub: Callable[[], Any] = HfApi,
) -> Exported:
    """Write a finished run's model into a folder of its own.

    Args:
        run: folder of the run; of several stages the last is taken.
        to: the new folder.
        format: what to write.
        base: what an adapter names as its base in place of the run's own: a hub id, or with ollama a model that Ollama
            has, on which the adapter is put instead of being merged.
        dtype: of a merged model; auto takes what the run computed in where that has 16 bits, else what the device can.
        dequantise: merge an adapter that was trained on 4-bit weights into the 16-bit ones all the same.
        push: hub repository (owner/name) to upload the folder to, made as a private one where it is absent.
        overrides: nested settings of model and data, where these lie elsewhere by now.
        hub: makes the client of the hub.

    Raises:
        ConfigError: the run is not finished, or the place or an argument is wrong.
        ModelError: the model cannot leave in this format, or the merged one differs from the adapter.
        DataError: the held-out rows that a merged model is compared on cannot be read.
    """
    result, target = _with(read_last_stage(Path(run)), overrides or {}), Path(to)
    _refuse_place(target)
    if push is not None:
        _refuse_repository(push)
    _refuse_format(result, format, base, dequantise, push)
    done = None
    with _whole(target) as folder:
        if format == "adapter" or (format == "ollama" and base is not None):
            _write_adapter(result, folder, base)
        else:
            done = merge(result.run, result.folder / ADAPTER, folder, dtype)
        if format == "ollama":
            _write_modelfile(result, folder, base)
        (folder / CARD_FILE).write_text(_card(result, format, base, done), encoding="utf-8")
    if push is not None:
        _push(target, push, hub)
    return Exported(target, format, done, push)


def _with(result: Result, overrides: Mapping[str, Any]) -> Result:
    """Return the result with model and data where they are now."""
    if other := sorted(set(overrides) - {"model", "data"}):
        raise ConfigError(f"{other[0]}: exporting cannot change it; model.* and data.* can be given.")
    (run,) = read_run(result.folder / RUN_FILE, overrides)
    return Result(run, result.folder, result.summary, result.achieved)


# --- what is refused before anything is loaded ----------------------------------------------------------------------


def _refuse_place(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ConfigError(f"--to: {target} is a file, expected a new folder. Name another.")
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"--to: {target} is there already and not empty, expected a new folder. Name another.")


def _refuse_repository(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--push: got {name!r} ({error}), expected owner/name of a repository.") from error


def _refuse_format(result: Result, format: Format, base: str | None, dequantise: bool, push: str | None) -> None:
    run, place = result.run, result.folder / ADAPTER
    if base is not None and (not base or any(map(str.isspace, base))):
        raise ConfigError(f"--base: got {base!r}, expected the name of a model, without spaces.")
    merges = format == "merged" or (format == "ollama" and base is None)
    if run.model.lora is None:
        if not merges:
            raise ModelError(
                f"{result.folder}: got full weights (model.lora is null), expected an adapter for this format. Use "
                "--format merged."
            )
        return
    check_adapter(str(place))
    if run.trains_reward and format != "adapter":
        raise ModelError(
            f"{result.folder}: got a reward model, which says a number instead of text: it leaves as an adapter with "
            "its head alone. Use --format adapter."
        )
    if format == "merged" and base is not None:
        raise ConfigError(f"--base: got {base!r}: a merged model has no base beside it. Leave it out.")
    if merges and run.model.quantization != "none" and not dequantise:
        raise ModelError(
            f"{result.folder}: the adapter was trained on {run.model.quantization} weights; merged into the 16-bit "
            "ones the model is another than the one that was trained and measured. Use --format adapter and load the "
            "base in 4 bits, or accept the difference with --dequantise: it is measured and kept in the card."
        )
    if format == "ollama" and not merges and run.model.lora is not None:
        settings = json.loads((place / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
        if kind := next((name for name in ("use_dora", "use_rslora") if settings.get(name)), None):
            raise ModelError(
                f"{place}: got an adapter with {kind}, which Ollama's adapters cannot express. Leave --base out: the "
                "adapter is merged then."
            )
    if push is not None and not merges and hub_model(base or run.model.name) is None:
        raise ConfigError(
            f"--push: the base {base or run.model.name} is a folder of this machine, which others cannot load. Name it "
            "as a hub id with --base, or push --format merged."
        )
    if push is not None and run.model.name == EMBEDDED and not merges and base is None:
        raise ConfigError(
            "--push: the embedded base is no hub model, but one of 4 bits unpacked again. Push --format merged, or "
            f"name the hub model it was made from with --base {hub_model(EMBEDDED)}: its weights differ a little."
        )


# --- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """Give a hidden folder beside `target`, which takes its place when all went well and goes otherwise.

    Raises:
        ConfigError: the disk refuses; nothing is left.
    """
    scratch = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch.mkdir()
            yield scratch
            scratch.rename(target)  # onto nothing, or an empty folder
        except (OSError, SafetensorError) as error:
            there = next(one for one in (target.parent, *target.parent.parents) if one.is_dir())
            free = shutil.disk_usage(there).free / 2**20
            raise ConfigError(
                f"--to: {target} cannot be written ({error}); {free:.0f} MiB are free there. Nothing is left of it. "
                "Free some space, or name a folder elsewhere."
            ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def base_name(run: Run) -> str:
    """Return what others load the run's base by: a hub id, or the whole path of a local folder."""
    if run.model.name == EMBEDDED:
        return str(fetch_embedded())
    return str(Path(run.model.name).resolve()) if Path(run.model.name).exists() else run.model.name


def _write_adapter(result: Result, folder: Path, base: str | None) -> None:
    source = result.folder / ADAPTER
    for name in (*ADAPTER_FILES, *([HEAD_FILE] if result.run.trains_reward else [])):
        shutil.copyfile(source / name, folder / name)
    settings = json.loads((folder / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    settings |= {"base_model_name_or_path": base or base_name(result.run), "revision": result.run.model.revision}
    (folder / ADAPTER_FILES[0]).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    load_tokenizer(result.run.model).save_pretrained(folder)


def _write_modelfile(result: Result, folder: Path, base: str | None) -> None:
    tokenizer = load_tokenizer(result.run.model)
    ends = sorted(Renderer(tokenizer, max_length=2).end_tokens)
    spelled = [str(one) for one in tokenizer.convert_ids_to_tokens(ends)]
    style = ollama.known_style(tokenizer)
    text = ollama.modelfile(base or "./", None if base is None else "./", style, spelled)
    (folder / ollama.MODELFILE).write_text(text, encoding="utf-8")
    if style is None:
        log.warning(
            "The chat template is none that is known here: the Modelfile has none, Ollama looks for one itself."
        )
    if base is None:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        if not kind.startswith(ollama.ARCHITECTURES):
            log.warning("%s: Ollama may not read it from safetensors; convert it with llama.cpp to GGUF first.", kind)


# --- the card and the hub -------------------------------------------------------------------------------------------


def _card(result: Result, format: Format, base: str | None, done: Merge | None) -> str:
    """Return the run's card, as it may have been edited, with what is to be known of this folder."""
    own = result.folder / CARD_FILE
    text = own.read_text(encoding="utf-8") if own.is_file() else card(result.run, result.folder, result.summary)
    lines = ["", "## This folder", "", *_use(format, base), ""]
    if done is not None:
        lines += [f"- {line[0].upper()}{line[1:]}." for line in done.lines()]
    parsed = ModelCard(text)
    about: Any = parsed.data
    if done is not None:
        about.library_name, about.base_model_relation = "transformers", "finetune"
    elif base is not None and format == "adapter":
        about.base_model = hub_model(base)
    parsed.text = parsed.text.rstrip() + "\n" + "\n".join(lines) + "\n"
    return str(ModelCard(f"---\n{about.to_yaml()}\n---\n{parsed.text}"))


def _use(format: Format, base: str | None) -> list[str]:
    if format == "ollama":
        told = "" if base is None else f" The adapter stands on {escape(base)}, as Ollama has it."
        return [f"For Ollama.{told}", "", "```sh", "ollama create my-model -f Modelfile", "ollama run my-model", "```"]
    loader = "AutoModelForCausalLM" if format == "merged" else "AutoPeftModelForCausalLM"
    library = "transformers" if format == "merged" else "peft"
    return [
        "```python",
        f"from {library} import {loader}",
        "from transformers import AutoTokenizer",
        "",
        'folder = "path/to/this/folder"',
        f"model, tokenizer = {loader}.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)",
        "```",
    ]


def _push(folder: Path, name: str, hub: Callable[[], Any]) -> None:
    """Upload a folder.

    Raises:
        ModelError: the hub refuses or cannot be reached; the folder stays.
    """
    try:
        client = hub()
        client.create_repo(name, private=True, exist_ok=True)
        client.upload_folder(folder_path=str(folder), repo_id=name)
    except Exception as error:  # network and hub errors share no base class
        raise ModelError(
            f"--push: {name} could not be written ({' '.join(str(error).split())[:300]}). The folder {folder} is "
            f"whole: log in with `hf auth login` and send it with `hf upload {name} {folder}`."
        ) from error
