"""Whatever stands in a run file, on the command line or in a run's folder: a result, or the documented error in time.

200 inputs each by default (of what takes longer 50), 10,000 (2,000) with `pytest -m "faults and slow"`.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo import checkpoint, losses, recipes
from dpo.data import DataConfig
from dpo.data.limits import bounded
from dpo.errors import CheckpointError, ConfigError, DPOError, ModelError
from dpo.evaluation.achieved import PAIRS_FILE, PROBES_FILE, SAMPLES_FILE, Achieved
from dpo.evaluation.pairs import HeldOut, Pair
from dpo.evaluation.probes import Probed
from dpo.evaluation.samples import Answer, Spoken
from dpo.model.base import check_adapter
from dpo.settings import Run, flat, plan, read_overrides, read_run

pytestmark = pytest.mark.faults

EXAMPLES = [200, pytest.param(10_000, marks=pytest.mark.slow)]
FEWER = [50, pytest.param(2_000, marks=pytest.mark.slow)]  # of what takes longer
SECONDS, MEMORY = 5.0, 2**31  # of one input; each is a few thousand bytes


def fuzz(examples: int, inputs: st.SearchStrategy[Any], attempt: Callable[[Any], None]) -> None:
    """Try so many inputs, each within bounds; the same ones every time."""

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(inputs)
    def hold(given: Any) -> None:
        with bounded(SECONDS, MEMORY):
            attempt(given)

    hold()


def refused(call: Callable[[], object], kind: type[DPOError]) -> str:
    """Return the message of the one kind of error that the call may end in, "" where it ends well."""
    try:
        call()
    except kind as error:
        return str(error) or "an error without a word"
    return ""


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Return the content with a few places exchanged, lost, repeated or cut off."""
    found = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(found) or 1)
        match draw.randrange(5):
            case 0:
                found[place : place + 1] = bytes([draw.randrange(256)])
            case 1:
                del found[place : place + draw.randint(1, 30)]
            case 2:
                found[place:place] = found[place : place + draw.randint(1, 30)]
            case 3:
                found[place : place + draw.randint(0, 9)] = draw.choice(
                    [b"null", b"[]", b"{}", b"-1", b"1e999", b"NaN", b'"x"', b"\x00", b"\xff", b": &a", b"*a", b"!!set"]
                )
            case _:
                del found[place:]
    return bytes(found)


# --- settings -------------------------------------------------------------------------------------------------------

START = Run(data=DataConfig(train="pairs.jsonl"))
KEYS = sorted(flat(START.model_dump(mode="json")))
scalar = (
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(
        ["dpo", "mpo", "kto", "previous", "stage:x", "os:system", "..a:b", "cpu", "wandb,", "a\x00b", "../x"]
    )
)
value = st.recursive(
    scalar,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=5,
)
changes = st.dictionaries(st.sampled_from([*KEYS, "rollout", "rollout.rewards", "rollout.value", "a.b", "lora"]), value)


def nested(flat_settings: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, one in flat_settings.items():
        room = found
        *path, last = key.split(".")
        for part in path:
            inside = room.get(part)
            room[part] = inside if isinstance(inside, dict) else {}
            room = room[part]
        room[last] = one
    return found


class TestRow38Settings:
    @pytest.mark.parametrize("examples", EXAMPLES)
    def test_any_settings_are_a_run_or_an_error_of_settings(self, examples):
        def attempt(given: dict[str, Any]) -> None:
            def build() -> None:
                run = Run.of({"data": {"train": "pairs.jsonl"}} | nested(given), "file.yaml")
                assert Run.of(run.model_dump(mode="json"), "again") == run

            message = refused(build, ConfigError)
            assert not message or message.startswith("file.yaml: ")

        fuzz(examples, changes, attempt)

    @pytest.mark.parametrize("examples", EXAMPLES)
    def test_a_run_file_with_bytes_exchanged_lost_and_repeated(self, tmp_path, examples):
        content, draw, path = START.to_yaml().encode(), random.Random(38), tmp_path / "run.yaml"
        for _ in range(examples):
            path.write_bytes(mutated(content, draw))
            with bounded(SECONDS, MEMORY):
                message = refused(lambda: read_run(path, {}), ConfigError)
            assert not message or message.startswith(f"{path}: ")

    @pytest.mark.parametrize("examples", FEWER)
    def test_any_text_on_the_command_line(self, examples):
        names = st.sampled_from(["dpo", "sft_dpo"])
        keys = st.sampled_from([*KEYS, "data.train", "reward.loop.seed", "=", ""]) | st.text(max_size=5)
        texts = value.map(lambda one: json.dumps(one)) | st.text(max_size=8) | st.just("&a [*a]")
        arguments = st.lists(st.tuples(keys, texts).map("=".join) | st.text(max_size=9), max_size=4)

        def attempt(given: tuple[str, list[str]]) -> None:
            name, more = given
            refused(lambda: plan(recipes.find(name), read_overrides(["data.train=pairs.jsonl", *more])), ConfigError)

        fuzz(examples, st.tuples(names, arguments), attempt)

    @pytest.mark.parametrize("examples", FEWER)
    def test_any_hyper_parameters_of_any_objective(self, examples):
        names = st.sampled_from(losses.names())
        known = st.sampled_from(["beta", "tau", "label_smoothing", "parts", "gamma_beta_ratio", "x", "clip_range"])

        def attempt(given: tuple[str, dict[str, Any]]) -> None:
            name, parameters = given
            settings = {"data": {"train": "pairs.jsonl"}, "objective": {"name": name, **parameters}}
            message = refused(lambda: Run.of(settings, "file.yaml"), ConfigError)
            assert not message or message.startswith("file.yaml: ")

        fuzz(examples, st.tuples(names, st.dictionaries(known, value, max_size=2)), attempt)


# --- a run's folder -------------------------------------------------------------------------------------------------

ANSWER = Answer("said", 3, True, 0.25, 0.5)


def change_one(folder: Path, draw: random.Random) -> None:
    """Change, empty or remove one file."""
    file = draw.choice(sorted(one for one in folder.rglob("*") if one.is_file()))
    if draw.randrange(10) == 0:
        file.unlink()
    else:
        file.write_bytes(mutated(file.read_bytes(), draw))


@pytest.mark.parametrize("examples", FEWER)
class TestRow3Checkpoints:
    def test_a_damaged_checkpoint_is_told_from_a_whole_one(self, tmp_path, examples):
        tensors = {"adapter": {"a": torch.arange(4.0)}, "optimizer": {"b": torch.zeros(2)}}
        for step in (1, 2):
            checkpoint.save(tmp_path / "kept", step, tensors, {"examples": step}, keep=2)
        draw, root = random.Random(3), tmp_path / "tried"
        for _ in range(examples):
            shutil.copytree(tmp_path / "kept", root)
            for _ in range(draw.randint(1, 3)):
                change_one(root, draw)
            with bounded(SECONDS, MEMORY):
                message = refused(lambda: load_whole(root), CheckpointError)
            assert not message or message.startswith(str(root))
            shutil.rmtree(root)


def load_whole(root: Path) -> None:
    """Load the newest checkpoint and find what was saved."""
    found = checkpoint.newest(root)
    assert found is not None
    assert found.checkpoint.state == {"examples": found.checkpoint.step}
    assert torch.equal(found.checkpoint.tensors("adapter")["a"], torch.arange(4.0))


def measure(folder: Path) -> None:
    """Read what was measured, and compute with it."""
    found = Achieved.read(folder)
    assert all(isinstance(one.value, float) for one in found.estimates().values())
    found.groups()


class TestRow34Results:
    @pytest.mark.parametrize("examples", EXAMPLES)
    def test_a_damaged_result_is_an_error_that_names_the_file(self, tmp_path, examples):
        spoken = Spoken(("hi", "ho"), ((ANSWER,), (ANSWER,)), ("a", None))
        pairs = (Pair("hi", "f:1", 0.5, -0.5, "a"), Pair("ho", "f:2", 0.0, 0.25))
        whole = Achieved(spoken, HeldOut(pairs), Probed({"eval/choices": {"one": 1.0, "two": 0.0}}))
        draw, folder = random.Random(34), tmp_path / "run"
        folder.mkdir()
        whole.write(folder)
        for _ in range(examples):
            file = folder / draw.choice([SAMPLES_FILE, PAIRS_FILE, PROBES_FILE])
            content = file.read_bytes()
            file.write_bytes(mutated(content, draw))
            with bounded(SECONDS, MEMORY):
                message = refused(lambda: measure(folder), CheckpointError)
            assert not message or message.startswith(str(file))
            file.write_bytes(content)

    @pytest.mark.parametrize("examples", FEWER)
    def test_a_damaged_adapter_is_refused_or_whole(self, start, tmp_path, examples):
        kept, folder, draw = tmp_path / "kept", tmp_path / "adapter", random.Random(7)
        kept.mkdir()
        start(lora={"r": 1, "target_modules": ["q_proj"]}).save(kept)
        (kept / "README.md").unlink(missing_ok=True)
        for _ in range(examples):
            shutil.copytree(kept, folder)
            change_one(folder, draw)
            with bounded(SECONDS, MEMORY):
                message = refused(lambda: check_adapter(str(folder)), ModelError)
            assert not message or str(folder) in message
            shutil.rmtree(folder)
