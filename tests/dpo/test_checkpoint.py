"""Checkpoints survive kills, damage and full disks; what they restore goes on bit for bit."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpo import checkpoint
from dpo.checkpoint import Checkpoint, Found
from dpo.errors import CheckpointError


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bit-equality is promised for one number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def some_tensors(step: int) -> dict[str, dict[str, Tensor]]:
    return {
        "adapter": {"a.weight": torch.arange(12.0).reshape(3, 4) + step, "b": torch.full((5,), step).bfloat16()},
        "optimizer": {"state.0.step": torch.tensor(float(step)), "empty": torch.empty(0, 3)},
    }


def save(root: Path, step: int, keep: int = 2, files: Callable[[Path], None] | None = None) -> Path:
    return checkpoint.save(root, step, some_tensors(step), {"examples": 8 * step}, files, keep)


def newest(root: Path) -> Found:
    found = checkpoint.newest(root)
    assert found is not None
    return found


def steps(root: Path) -> list[int]:
    return sorted(int(one.name.removeprefix("step-")) for one in root.glob("step-*"))


def hidden(root: Path) -> list[str]:
    return [one.name for one in root.iterdir() if one.name.startswith(".")]


def assert_holds(found: Checkpoint, step: int) -> None:
    assert (found.step, found.state) == (step, {"examples": 8 * step})
    for name, group in some_tensors(step).items():
        read = found.tensors(name)
        assert read.keys() == group.keys()
        for key, tensor in group.items():
            assert read[key].dtype == tensor.dtype
            assert read[key].shape == tensor.shape
            assert torch.equal(read[key], tensor)


# --- saving and finding ---


def test_what_is_saved_is_found_bit_for_bit_with_the_callers_files(tmp_path: Path) -> None:
    def adapter(folder: Path) -> None:
        (folder / "peft").mkdir()
        (folder / "peft" / "adapter_config.json").write_text("{}")

    path = save(tmp_path / "run" / "checkpoints", 6, files=adapter)
    assert path.name == "step-00000006"
    found = newest(path.parent)
    assert found.skipped == ()
    assert found.checkpoint.path == path
    assert found.checkpoint.names == ("adapter", "optimizer")
    assert_holds(found.checkpoint, 6)
    assert (path / "peft" / "adapter_config.json").read_text() == "{}"
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"]) == (checkpoint.FORMAT, 6)
    listed = manifest["files"]
    assert set(listed) == {"adapter.safetensors", "optimizer.safetensors", "state.json", "peft/adapter_config.json"}
    for name, entry in listed.items():
        assert entry == {"size": (path / name).stat().st_size, "sha256": checkpoint.hash_file(path / name)}
    assert hidden(path.parent) == []


def test_where_nothing_was_ever_saved_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "absent") is None
    assert checkpoint.newest(tmp_path) is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    assert steps(tmp_path) == [6, 8]
    save(tmp_path, 10, keep=1)
    assert steps(tmp_path) == [10]


def test_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 2)
    checkpoint.save(tmp_path, 2, {}, {"examples": 99})
    assert newest(tmp_path).checkpoint.state == {"examples": 99}
    assert (steps(tmp_path), hidden(tmp_path)) == ([2], [])


def test_a_step_before_the_newest_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    save(tmp_path, 8)
    with pytest.raises(CheckpointError, match=r"holds step-00000008, later than step 2 .*Resume from it"):
        save(tmp_path, 2)
    assert (steps(tmp_path), hidden(tmp_path)) == ([8], [])


def test_arguments_out_of_range_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for arguments, message in (
        ({"keep": 0}, "keep=0"),
        ({"step": -1}, "step=-1"),
        ({"tensors": {"../up": {}}}, r"'\.\./up' must match"),
        ({"state": {"x": float("nan")}}, "finite numbers"),
        ({"state": {"x": {1: 2}}}, "would not read back as given"),
        ({"state": {"x": (1, 2)}}, "would not read back as given"),
        ({"state": {"x": Path()}}, "plain JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.save(**({"root": root, "step": 0, "tensors": {}, "state": {}} | arguments))
    assert not root.exists()


# --- damage ---


def cut(file: Path) -> None:
    os.truncate(file, 20)


def flip_one_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "truncated": ("adapter.safetensors", cut, r"adapter\.safetensors has 20 bytes, expected \d+"),
    "bit flipped": ("adapter.safetensors", flip_one_bit, r"adapter\.safetensors has changed: sha256 \w+, expected"),
    "state changed": ("state.json", flip_one_bit, r"state\.json has changed"),
    "optimizer missing": ("optimizer.safetensors", Path.unlink, r"optimizer\.safetensors is missing"),
    "state missing": ("state.json", Path.unlink, r"state\.json is missing"),
    "manifest missing": ("manifest.json", Path.unlink, r"manifest\.json is missing"),
    "manifest truncated": ("manifest.json", cut, r"manifest\.json cannot be read"),
    "manifest empty": ("manifest.json", lambda file: file.write_text("{}"), r"manifest\.json cannot be read"),
}


@pytest.mark.faults
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_costs_one_checkpoint(tmp_path: Path, damage: str) -> None:
    name, spoil, message = DAMAGE[damage]
    save(tmp_path, 2)
    newer = save(tmp_path, 4)
    spoil(newer / name)
    found = newest(tmp_path)
    assert_holds(found.checkpoint, 2)
    (skipped,) = found.skipped
    assert skipped.path == newer
    assert str(newer / name) in skipped.reason
    with pytest.raises(CheckpointError, match=message + r".*Put back a copy"):
        checkpoint.load(newer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"is of format 2, step 2; expected format 1, step 2"),
        ({"step": 3}, r"is of format 1, step 3; expected format 1, step 2"),
        ({"files": {}}, r"state\.json is not listed in manifest\.json"),
        ({"files": {"../outside": {"size": 1, "sha256": ""}}}, "lies outside the checkpoint"),
        ({"files": {"/etc/hostname": {"size": 1, "sha256": ""}}}, "lies outside the checkpoint"),
    ],
)
def test_a_manifest_of_another_format_step_or_place_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    path = save(tmp_path, 2)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(path)


def test_a_link_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "root", 2)
    (path / "state.json").rename(tmp_path / "elsewhere")
    (path / "state.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="lies outside"):
        checkpoint.load(path)


def test_a_file_that_is_not_listed_is_no_damage_and_never_read(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    shutil.copy(path / "adapter.safetensors", path / "planted.safetensors")
    found = newest(tmp_path)
    assert found.skipped == ()
    with pytest.raises(CheckpointError, match=r"no tensors named 'planted', it holds adapter, optimizer\. Resume"):
        found.checkpoint.tensors("planted")


@pytest.mark.faults
def test_all_damaged_is_an_error_that_names_each_never_a_start_from_zero(tmp_path: Path) -> None:
    (save(tmp_path, 2) / "state.json").unlink()
    cut(save(tmp_path, 4) / "adapter.safetensors")
    (tmp_path / "step-00000002").mkdir(exist_ok=True)  # pruned as damaged when step 4 was saved: an empty one
    with pytest.raises(CheckpointError) as caught:
        checkpoint.newest(tmp_path)
    text = str(caught.value)
    assert "all 2 checkpoints are damaged" in text
    assert "step-00000004/adapter.safetensors has 20 bytes" in text
    assert "step-00000002/manifest.json is missing" in text
    assert "to begin again from step 0, move this folder away" in text
    assert caught.value.exit_code == 3


def test_a_folder_that_is_no_checkpoint_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected step- and 8 digits"):
        checkpoint.load(tmp_path)


def test_keep_counts_valid_ones_only_and_a_damaged_newest_gives_way(tmp_path: Path) -> None:
    save(tmp_path, 2)
    flip_one_bit(save(tmp_path, 4) / "state.json")
    save(tmp_path, 6)
    assert steps(tmp_path) == [2, 6]  # 4 is no checkpoint: it does not push 2 out
    flip_one_bit(save(tmp_path, 8) / "state.json")
    assert newest(tmp_path).checkpoint.step == 6
    save(tmp_path, 7, keep=1)  # resumed from 6; the damaged 8 is no later checkpoint
    assert steps(tmp_path) == [7]
    assert_holds(newest(tmp_path).checkpoint, 7)


@pytest.mark.faults
def test_with_keep_1_the_old_one_goes_only_after_the_new_one_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 2, keep=1)
    honest = checkpoint.hash_file

    def disk_that_lies(path: Path) -> str:
        """The bytes are other ones once the folder has its final name."""
        return "0" * 64 if path.parent.name == "step-00000004" else honest(path)

    monkeypatch.setattr(checkpoint, "hash_file", disk_that_lies)
    with pytest.raises(CheckpointError, match=r"step-00000004/adapter\.safetensors has changed"):
        save(tmp_path, 4, keep=1)
    assert (steps(tmp_path), hidden(tmp_path)) == ([2], [])
    assert_holds(newest(tmp_path).checkpoint, 2)


def test_a_replacement_that_does_not_read_back_leaves_the_one_it_should_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "hash_file", lambda path: path.parent.name.ljust(64))
        with pytest.raises(CheckpointError, match="has changed"):
            checkpoint.save(tmp_path, 2, {}, {"examples": 99})
    assert_holds(newest(tmp_path).checkpoint, 2)


def test_a_callers_error_passes_through_and_leaves_nothing_behind(tmp_path: Path) -> None:
    def adapter(folder: Path) -> None:
        raise KeyboardInterrupt

    save(tmp_path, 2)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 4, files=adapter)
    assert (steps(tmp_path), hidden(tmp_path)) == ([2], [])


def test_an_old_one_that_cannot_be_removed_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "not yours")

    save(tmp_path, 2, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        save(tmp_path, 4, keep=1)
    assert "the new checkpoint is safe" in caplog.text
    assert_holds(newest(tmp_path).checkpoint, 4)
    assert (steps(tmp_path), hidden(tmp_path)) == ([4], [])


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_left_alone(tmp_path: Path) -> None:
    save(tmp_path, 2)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getppid()):
        (tmp_path / f".tmp-step-00000004-{pid}").mkdir()
    (tmp_path / ".DS_Store").touch()
    assert newest(tmp_path).checkpoint.step == 2
    assert sorted(hidden(tmp_path)) == [".DS_Store", f".tmp-step-00000004-{os.getppid()}"]


def test_everything_is_forced_to_disk_before_the_rename_and_the_rename_before_the_prune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut may take back is decided by this order, which no killed process can show."""
    save(tmp_path, 2)
    events: list[str | int] = []
    rename = os.rename

    def noted(source: Path, target: Path) -> None:
        events.append(Path(target).name)
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: events.append(os.fstat(descriptor).st_ino))
        patch.setattr(os, "rename", noted)
        path = save(tmp_path, 4, keep=1, files=lambda folder: (folder / "peft").mkdir())
    placed = events.index(path.name)
    members = {one.stat().st_ino for one in path.rglob("*")}
    assert len(members) == 5  # two tensor files, state, manifest and the caller's folder
    assert members == set(events[: placed - 1])
    assert events[placed - 2 : placed] == [(path / "manifest.json").stat().st_ino, path.stat().st_ino]
    assert events[placed + 1] == tmp_path.stat().st_ino
    assert events[placed + 2 :] == [f".tmp-step-00000002-{os.getpid()}"]


# --- kills ---

KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
import torch
from dpo import checkpoint

torch.set_num_threads(1)
home, step, keep = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
group = {"adapter": {"w": torch.full((64,), float(step))}, "optimizer": {"m": torch.full((8,), float(step))}}
calls = 0

def fatal(module, name, nth):
    honest = getattr(module, name)
    def counted(*arguments, **options):
        global calls
        calls += 1
        if calls == nth:
            print(json.dumps([nth, name]), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(*arguments, **options)
    setattr(module, name, counted)

for nth in range(1, 1000):
    root = shutil.copytree(home / "before", home / f"killed-{nth}")
    child = os.fork()
    if child == 0:
        for module, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"),
                             (checkpoint, "save_file"), (checkpoint, "load"), (shutil, "rmtree")):
            fatal(module, name, nth)
        checkpoint.save(root, step, group, {"saved": "again"}, lambda folder: (folder / "extra").touch(), keep)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status == 0:
        break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
"""


@pytest.mark.faults
@pytest.mark.parametrize(("step", "keep"), [(6, 2), (6, 1), (4, 1)], ids=["keep 2", "keep 1", "same step again"])
def test_a_kill_at_any_point_of_a_save_never_costs_the_checkpoint_before(tmp_path: Path, step: int, keep: int) -> None:
    for before in (2, 4):
        checkpoint.save(tmp_path / "before", before, {"adapter": {"w": torch.full((64,), float(before))}}, {})
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(step), str(keep)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    points = [json.loads(line) for line in run.stdout.splitlines()]
    # every kind of point was met, among them: model written, optimizer written, manifest, rename, read back, prune
    assert {name for _, name in points} >= {"fsync", "rename", "mkdir", "save_file", "load", "rmtree", "unlink"}
    outcomes = []
    for nth, _ in points:
        root = tmp_path / f"killed-{nth}"
        found = newest(root)
        assert found.skipped == (), f"point {nth}"  # half written or half removed is never taken for damage
        new = found.checkpoint.state == {"saved": "again"}
        assert found.checkpoint.step == (step if new else 4)
        assert torch.equal(found.checkpoint.tensors("adapter")["w"], torch.full((64,), float(found.checkpoint.step)))
        assert hidden(root) == []
        outcomes.append(new)
        checkpoint.save(root, 8, {}, {}, keep=1)  # and saving goes on
        assert (steps(root), hidden(root)) == ([8], [])
    assert outcomes == sorted(outcomes)  # from one point on it is the new one, for good
    assert set(outcomes) == {False, True}


# --- a full disk ---

FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from dpo import checkpoint
from dpo.errors import CheckpointError

root = Path(sys.argv[1])
big = {"adapter": {"w": torch.ones(2**18)}}  # 1 MiB
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit, keyword in ((2**16, {}), (2**16, {"files": lambda folder: (folder / "x").write_bytes(b"0" * 2**17)})):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    try:
        checkpoint.save(root, 4, {} if keyword else big, {}, **keyword)
    except CheckpointError as error:
        print(error)
    else:
        raise SystemExit("the disk was full and nothing was said")
    assert [one.name for one in root.iterdir()] == ["step-00000002"], list(root.iterdir())
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
checkpoint.save(root, 4, big, {})
"""


@pytest.mark.faults
def test_a_full_disk_costs_only_the_save_that_met_it(tmp_path: Path) -> None:
    root = tmp_path / "root"
    save(root, 2)
    run = subprocess.run([sys.executable, "-c", FULL, str(root)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    messages = run.stdout.strip().splitlines()
    assert len(messages) == 2
    for message in messages:
        assert message.startswith(f"{root}: cannot save the checkpoint: ")
        assert "File too large" in message
        assert "MiB are free there. Free some space" in message
    assert newest(root).checkpoint.step == 4
    assert steps(root) == [2, 4]


@pytest.mark.faults
def test_too_little_space_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3 * 2**20))
    monkeypatch.setattr(checkpoint, "_write", None)
    with pytest.raises(CheckpointError, match=r"it needs 5 MiB and only 3 MiB are free\. 3 MiB are free there\. Free"):
        checkpoint.save(tmp_path, 4, {"adapter": {"w": torch.zeros(2**20)}}, {})


def test_an_atomic_write_leaves_the_old_text_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.yaml"
    checkpoint.atomic_write_text(file, "one: ü\n")
    assert file.read_text(encoding="utf-8") == "one: ü\n"

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"cannot write run\.yaml: .*No space left"):
            checkpoint.atomic_write_text(file, "two\n")
    assert file.read_text(encoding="utf-8") == "one: ü\n"
    assert [one.name for one in tmp_path.iterdir()] == ["run.yaml"]
    checkpoint.atomic_write_text(file, "two\n")
    assert file.read_text() == "two\n"


# --- optimizer and random states ---

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.01, amsgrad=True),
    "AdamW fused": lambda weights: torch.optim.AdamW(weights, lr=0.01, fused=True),
    "AdamW lr tensor": lambda weights: torch.optim.AdamW(weights, lr=torch.tensor(0.01)),
    "AdamW two groups": lambda weights: torch.optim.AdamW(
        [{"params": weights[:1], "lr": 0.1}, {"params": weights[1:], "weight_decay": 0.0}]
    ),
    "SGD momentum": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda weights: torch.optim.RMSprop(weights, lr=0.01, momentum=0.5, centered=True),
    "LBFGS": lambda weights: torch.optim.LBFGS(weights, lr=0.1, max_iter=3),  # lists of tensors inside its state
}


def toy(seed: int, name: str, dtype: torch.dtype) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 1)).to(dtype)
    return model, OPTIMIZERS[name](list(model.parameters()))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Steps that draw on every random state: Python chooses rows, NumPy makes noise, torch drops units."""
    losses = []
    for _ in range(steps):
        batch = torch.tensor(np.random.normal(size=(4, 8)) + random.gauss(0, 1), dtype=next(model.parameters()).dtype)

        def closure(batch: Tensor = batch) -> Tensor:
            optimizer.zero_grad()
            loss = (model(batch) - 1).square().mean()
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        assert loss is not None
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_the_next_steps_are_bit_equal(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    random.seed(3)
    np.random.seed(3)
    model, optimizer = toy(0, name, dtype)
    train(model, optimizer, 3)
    moments, layout = checkpoint.optimizer_tensors(optimizer)
    sets = {"model": model.state_dict(), "optimizer": moments, "rng": checkpoint.rng_tensors("cpu")}
    checkpoint.save(tmp_path, 3, sets, {"optimizer": layout})
    expected = train(model, optimizer, 5)
    assert len(set(expected)) == 5

    random.seed(99)
    np.random.seed(99)
    other, again = toy(99, name, dtype)
    train(other, again, 1)  # a state of its own, to be replaced
    found = newest(tmp_path).checkpoint
    other.load_state_dict(found.tensors("model"))
    checkpoint.restore_optimizer(again, found.tensors("optimizer"), found.state["optimizer"])
    checkpoint.restore_rng(found.tensors("rng"), "cpu")
    assert train(other, again, 5) == expected
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)
    assert str(again.state_dict()) == str(optimizer.state_dict())  # tuples, ints and floats as they were


def test_every_part_of_the_random_state_is_restored() -> None:
    random.gauss(0, 1)  # Python and NumPy keep the second number of a pair
    np.random.normal()
    state = checkpoint.rng_tensors("cpu")
    assert {tensor.dtype for tensor in state.values()} == {torch.uint8, torch.int64, torch.float64}
    draws = [lambda: random.gauss(0, 1), random.random, np.random.normal, np.random.rand, lambda: torch.rand(1).item()]
    first = [draw() for draw in draws]
    for one in draws:
        one()
    checkpoint.restore_rng(state, "cpu")
    assert [draw() for draw in draws] == first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_random_state_of_the_gpu_is_restored() -> None:
    state = checkpoint.rng_tensors("cuda")
    first = torch.rand(8, device="cuda")
    checkpoint.restore_rng(state, "cuda")
    assert torch.equal(torch.rand(8, device="cuda"), first)


def test_a_random_state_with_a_part_missing_or_of_another_device_is_refused() -> None:
    state = checkpoint.rng_tensors("cpu")
    before = torch.get_rng_state()
    for wrong in ({}, state | {"torch.cuda": state["torch.cpu"]}, {**state, "numpy": state["numpy.words"]}):
        with pytest.raises(CheckpointError, match=r"random state: got .* expected numpy\.gauss.*now cpu"):
            checkpoint.restore_rng(wrong, "cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_an_optimizer_state_with_something_missing_is_never_restored_in_part() -> None:
    model, optimizer = toy(0, "AdamW", torch.float32)
    train(model, optimizer, 2)
    tensors, layout = checkpoint.optimizer_tensors(optimizer)
    name = "optimizer.state.0.exp_avg"
    assert name in tensors
    lacking = {key: tensor for key, tensor in tensors.items() if key != name}
    with pytest.raises(CheckpointError, match=r"\{'tensor': 'optimizer\.state\.0\.exp_avg'\} has no tensor among"):
        checkpoint.restore_optimizer(optimizer, lacking, layout)
    with pytest.raises(CheckpointError, match="tensors stray belong to no entry"):
        checkpoint.restore_optimizer(optimizer, {**tensors, "stray": torch.ones(1)}, layout)
    with pytest.raises(CheckpointError, match="a layout without 'shapes' and 'tree'"):
        checkpoint.restore_optimizer(optimizer, tensors, {"tree": None})
    wider = torch.optim.AdamW([nn.Parameter(torch.zeros(4, 4))])
    with pytest.raises(
        CheckpointError, match=r"shapes \[\[\[16, 8\].* were saved, this optimizer has \[\[\[4, 4\]\]\]"
    ):
        checkpoint.restore_optimizer(wider, tensors, layout)


def test_an_optimizer_that_changes_a_tensor_while_loading_is_refused() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], momentum=0.9)
    optimizer.state[weight]["momentum_buffer"] = torch.full((3,), 0.1)  # float32: torch would round it to bfloat16
    tensors, layout = checkpoint.optimizer_tensors(optimizer)
    fresh = torch.optim.SGD([nn.Parameter(torch.ones(3, dtype=torch.bfloat16))], momentum=0.9)
    with pytest.raises(CheckpointError, match=r"state\.0\.momentum_buffer was not taken over bit for bit"):
        checkpoint.restore_optimizer(fresh, tensors, layout)


def test_state_of_any_form_keeps_it_and_what_is_no_data_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight])
    table = torch.arange(3)
    odd = {"table": table, "same": table, "history": [None, True, 1, 2.5, (float("inf"), "x")], 7: {"nan": torch.nan}}
    optimizer.state[weight].update(odd)
    tensors, layout = checkpoint.optimizer_tensors(optimizer)
    assert list(tensors) == ["optimizer.state.0.table"]  # one tensor held twice stays one
    assert isinstance(layout, dict)
    plain = json.loads(json.dumps(layout["tree"], allow_nan=False))
    decoded = checkpoint._decode(plain, tensors, set())["state"][0]
    assert str(decoded) == str(odd)
    assert decoded["table"] is decoded["same"]
    optimizer.state[weight]["odd"] = object()
    with pytest.raises(CheckpointError, match=r"optimizer\.state\.0\.odd: got a object, expected tensors"):
        checkpoint.optimizer_tensors(optimizer)


def test_the_8_bit_optimizer_with_its_shared_tables_goes_on_bit_for_bit(tmp_path: Path) -> None:
    from bitsandbytes.optim import AdamW8bit

    def run(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            sum((weight - 1).square().sum() for weight in weights).backward()
            optimizer.step()
            optimizer.zero_grad()

    weights = [nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(65, 64))]
    optimizer = AdamW8bit(weights, lr=0.01)
    run(weights, optimizer, 3)
    moments, layout = checkpoint.optimizer_tensors(optimizer)
    assert torch.uint8 in {tensor.dtype for tensor in moments.values()}
    checkpoint.save(tmp_path, 3, {"optimizer": moments}, {"optimizer": layout})
    copies = [nn.Parameter(weight.detach().clone()) for weight in weights]
    again = AdamW8bit(copies, lr=0.5)
    found = newest(tmp_path).checkpoint
    checkpoint.restore_optimizer(again, found.tensors("optimizer"), found.state["optimizer"])
    run(weights, optimizer, 5)
    run(copies, again, 5)
    assert all(torch.equal(left, right) for left, right in zip(weights, copies, strict=True))
