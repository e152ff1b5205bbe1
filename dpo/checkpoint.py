"""Checkpoints that are whole or absent: written aside, verified, renamed into place; tensors and JSON, no pickle.

A checkpoint is a folder `step-00000120` under a root that one run owns:

    NAME.safetensors   one for each entry of `tensors`
    state.json         counters and everything else that is not a tensor
    ...                what the caller's `files` wrote (an adapter in its library's own format)
    manifest.json      size and sha256 of every file above; written last

`save` writes a hidden folder, forces it to disk and renames it, so that a kill, a power cut or a full disk leaves the
checkpoints before it as they were; older ones are removed only after the new one has been read back. `newest` returns
the newest that verifies. The file system must be POSIX: rename is atomic and folders can be forced to disk.
"""

import json
import logging
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias, final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo.cache import hash_file
from dpo.errors import CheckpointError

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

FORMAT = 1
"""Version of the folder's layout; a reader refuses any other."""

_MANIFEST = "manifest.json"
_STATE = "state.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_STEP = re.compile(r"step-(\d{8,})")
# .tmp-: half written or half removed, worth nothing. .old-: a whole checkpoint on its way to being replaced.
_LEFTOVER = re.compile(r"\.(?P<kind>tmp|old)-(?P<name>step-\d{8,})-(?P<pid>\d+)")
_SLACK = 2**20  # bytes beyond the tensors: state, manifest and the file system's own blocks
_log = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every file has been verified."""

    path: Path
    step: int
    """Optimiser steps done when it was saved."""
    state: Mapping[str, JSON]
    names: tuple[str, ...]
    """The tensor sets it holds."""

    def tensors(self, name: str, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """Read one tensor set from disk, with the shapes and dtypes it was saved with.

        Raises:
            CheckpointError: the checkpoint holds no such set, or its file changed since it was verified.
        """
        if name not in self.names:
            raise CheckpointError(
                f"{self.path}: no tensors named {name!r}, it holds {', '.join(self.names) or 'none'}. "
                "Resume with the settings the run was started with."
            )
        with _disk(self.path, "read the checkpoint"):
            return load_file(self.path / f"{name}.safetensors", device=str(device))


@final
@dataclass(frozen=True)
class Skipped:
    """A damaged checkpoint that `newest` passed over."""

    path: Path
    reason: str
    """The file, what was found and what the manifest says."""


@final
@dataclass(frozen=True)
class Found:
    """The newest checkpoint that verifies, and the newer ones that do not (newest first)."""

    checkpoint: Checkpoint
    skipped: tuple[Skipped, ...]


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, JSON],
    files: Callable[[Path], None] | None = None,
    keep: int = 2,
) -> Path:
    """Write the checkpoint of `step`, verify it, and only then remove all but the newest `keep` valid ones.

    A checkpoint of the same step is replaced. When the call fails or is killed at any point, the checkpoints that
    were there before are still there; a failed call removes what it had written.

    Args:
        root: folder of the run's checkpoints, made where absent; one process writes to it at a time.
        step: optimiser steps done (>= 0).
        tensors: named sets of tensors, each a file of its own; none may share memory with another of its set.
        state: plain JSON: string keys, lists not tuples, finite numbers.
        files: writes further files into the folder it is given.
        keep: valid checkpoints to keep, this one included (>= 1).

    Returns:
        The folder `root/step-XXXXXXXX`.

    Raises:
        ValueError: an argument outside what is said above.
        CheckpointError: the disk refused or is too small, the new files do not read back as written, or the folder
            holds a later step, which this save would make unreachable or untrue.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"checkpoint.save needs step >= 0 and keep >= 1, got step={step}, keep={keep}")
    for name in tensors:
        if not _NAME.fullmatch(name):
            raise ValueError(f"checkpoint.save: tensor set {name!r} must match {_NAME.pattern}")
    text = _plain_json(state)
    target = root / f"step-{step:08d}"
    with _disk(root, "save the checkpoint"):
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        _refuse_later_step(root, step)
        _refuse_full_disk(root, tensors)
        try:
            temporary = _hidden(target, "tmp")
            _write(temporary, step, tensors, text, files)
            if target.exists():
                target.rename(_hidden(target, "old"))
            temporary.rename(target)
            _sync(root)
            _read_back(target)
        except BaseException:  # an interrupt too: undo, then let it through
            _sweep(root)
            raise
    _prune(root, target, keep)
    return target


def copy(path: Path, root: Path, keep: int = 2) -> Path:
    """Put a copy of a checkpoint under another root, verified by its own manifest, and prune there as `save` does.

    A copy of that step that verifies is left as it is. Nothing is forced to disk: what a power cut tears does not
    verify, and the original is there.

    Raises:
        CheckpointError: the disk refused, or the copy is not what the manifest says; nothing is left of it then.
    """
    target = root / path.name
    with _disk(root, "copy a checkpoint"):
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        if not target.is_dir() or not _valid(target):
            try:
                temporary = _hidden(target, "tmp")
                _copy_files(path, temporary)
                if target.exists():
                    target.rename(_hidden(target, "old"))
                temporary.rename(target)
                _read_back(target)
            except BaseException:  # an interrupt too: undo, then let it through
                _sweep(root)
                raise
    _prune(root, target, keep)
    return target


def load(path: Path) -> Checkpoint:
    """Verify one checkpoint and return it; its tensors are read when asked for.

    Every file in the manifest must be there with its size and sha256. A file the manifest does not list is no damage:
    it is never read, and a file browser's leftover must not cost a run its checkpoint.

    Raises:
        CheckpointError: damage; names the file, what was found and what the manifest says.
    """
    step = _STEP.fullmatch(path.name)
    if step is None:
        raise CheckpointError(
            f"{path}: got a folder named {path.name!r}, expected step- and 8 digits. Name a checkpoint's own folder."
        )
    with _disk(path, "read the checkpoint"):
        try:
            manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
            found, number, listed = manifest["format"], manifest["step"], manifest["files"]
            for name, entry in listed.items():
                _verify(path, name, int(entry["size"]), str(entry["sha256"]))
        except FileNotFoundError as error:
            raise _damaged(path, _MANIFEST, "is missing") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, _MANIFEST, f"cannot be read ({error!r})") from error
        if (found, number) != (FORMAT, int(step[1])):
            wanted = f"format {FORMAT}, step {int(step[1])}"
            raise _damaged(path, _MANIFEST, f"is of format {found}, step {number}; expected {wanted}")
        if _STATE not in listed:
            raise _damaged(path, _STATE, f"is not listed in {_MANIFEST}")
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    names = (name.removesuffix(".safetensors") for name in listed if "/" not in name and name.endswith(".safetensors"))
    return Checkpoint(path=path, step=number, state=state, names=tuple(names))


def newest(root: Path) -> Found | None:
    """Return the newest checkpoint that verifies, or None where there has never been one.

    First removes what processes that no longer run left half written.

    Raises:
        CheckpointError: there are checkpoints and all are damaged; going on from step 0 is the user's decision.
    """
    if not root.is_dir():
        return None
    with _disk(root, "look for checkpoints"):
        _sweep(root)
        folders = _folders(root)
    skipped: list[Skipped] = []
    for folder in folders:
        try:
            return Found(load(folder), tuple(skipped))
        except CheckpointError as error:
            skipped.append(Skipped(folder, str(error)))
    if skipped:
        reasons = "\n".join(f"  {one.reason}" for one in skipped)
        raise CheckpointError(
            f"{root}: all {len(skipped)} checkpoints are damaged:\n{reasons}\n"
            "Put back a copy of one of them; or, to begin again from step 0, move this folder away."
        )
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], JSON]:
    """Split an optimizer's state into tensors (the live ones, not copies) and JSON that says where they go.

    Any nesting of dicts, lists, tuples and scalars is kept, and so are a tensor's sharing and a number's type.

    Raises:
        CheckpointError: the optimizer keeps something that is neither a tensor nor plain data.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode(optimizer.state_dict(), "optimizer", tensors, {})
    return tensors, {"shapes": _shapes(optimizer), "tree": tree}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], layout: JSON) -> None:
    """Give the optimizer back the state of `optimizer_tensors`; each tensor goes to its parameter's device.

    The optimizer must be of the same class over parameters of the same shapes in the same order.

    Raises:
        CheckpointError: an entry is missing or left over, the parameters differ, or the optimizer did not take a
            tensor bit for bit; the optimizer must then not be used.
    """
    fix = "Resume with the model, adapter and optimizer the run was started with, or from an older checkpoint."
    if not isinstance(layout, dict) or not {"shapes", "tree"} <= layout.keys():
        raise CheckpointError(f"optimizer state: got a layout without 'shapes' and 'tree'. {fix}")
    if (shapes := _shapes(optimizer)) != layout["shapes"]:
        raise CheckpointError(
            f"optimizer state: parameters of shapes {layout['shapes']} were saved, this optimizer has {shapes}. {fix}"
        )
    used: set[str] = set()
    tree = _decode(layout["tree"], tensors, used)
    if unused := sorted(tensors.keys() - used):
        raise CheckpointError(f"optimizer state: tensors {', '.join(unused)} belong to no entry. {fix}")
    try:
        optimizer.load_state_dict(tree)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"optimizer state: {type(optimizer).__name__} refused it: {error}. {fix}") from error
    taken, _ = optimizer_tensors(optimizer)
    for name, tensor in tensors.items():
        if name not in taken or not _same_bits(tensor, taken[name]):
            raise CheckpointError(f"optimizer state: {name} was not taken over bit for bit. {fix}")


def rng_tensors(device: str | torch.device) -> dict[str, Tensor]:
    """Return the global random states of torch (CPU, and `device` where it is CUDA), Python and NumPy as tensors.

    Raises:
        CheckpointError: NumPy's global generator is not the MT19937 it is born with.
    """
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    if (version, numpy["bit_generator"]) != (3, "MT19937"):
        raise CheckpointError(
            f"random state: got Python's version {version} and NumPy's {numpy['bit_generator']}, "
            "expected 3 and MT19937. Do not replace the global generators."
        )
    states = {
        "torch.cpu": torch.get_rng_state(),
        "python.words": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy.words": torch.tensor(
            [*numpy["state"]["key"].tolist(), numpy["state"]["pos"], numpy["has_gauss"]], dtype=torch.int64
        ),
        "numpy.gauss": torch.tensor([numpy["gauss"]], dtype=torch.float64),
    }
    if torch.device(device).type == "cuda":
        states["torch.cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_rng(tensors: Mapping[str, Tensor], device: str | torch.device) -> None:
    """Set the random states that `rng_tensors` returned; the next draws are those that would have followed.

    Raises:
        CheckpointError: a state is missing, or there is one for a kind of device that is not `device`'s.
    """
    if (got := sorted(tensors)) != (wanted := sorted(rng_tensors(device))):
        raise CheckpointError(
            f"random state: got {', '.join(got) or 'nothing'}, expected {', '.join(wanted)}. "
            f"Resume on the kind of device the run was started on (now {device}), or from an older checkpoint."
        )
    torch.set_rng_state(tensors["torch.cpu"].cpu())
    gauss = tensors["python.gauss"].tolist()
    random.setstate((3, tuple(tensors["python.words"].tolist()), gauss[0] if gauss else None))
    *keys, position, has_gauss = tensors["numpy.words"].tolist()
    words = np.array(keys, dtype=np.uint32)
    np.random.set_state(("MT19937", words, position, has_gauss, tensors["numpy.gauss"].item()))
    if "torch.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["torch.cuda"].cpu(), device)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file that is afterwards, whatever happens, either the old one or the new one in full.

    Raises:
        CheckpointError: the disk refused; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with _disk(path.parent, f"write {path.name}"):
        try:
            temporary.write_text(text, encoding="utf-8")
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _disk(place: Path, task: str) -> Iterator[None]:
    """Turn the disk's errors into one that names the place, the free space and the fix."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        there = next((folder for folder in (place, *place.parents) if folder.is_dir()), Path.cwd())
        free = shutil.disk_usage(there).free / 2**20
        raise CheckpointError(
            f"{place}: cannot {task}: {error}. {free:.0f} MiB are free there. "
            "Free some space, check the folder's permissions and quota, or choose another output folder."
        ) from error


def _hidden(target: Path, kind: str) -> Path:
    return target.with_name(f".{kind}-{target.name}-{os.getpid()}")


def _sync(path: Path) -> None:
    """Force a file's bytes, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: str,
    files: Callable[[Path], None] | None,
) -> None:
    folder.mkdir()
    for name, group in tensors.items():
        save_file({key: value.detach().contiguous() for key, value in group.items()}, folder / f"{name}.safetensors")
    (folder / _STATE).write_text(state, encoding="utf-8")
    if files is not None:
        files(folder)
    members = sorted(folder.rglob("*"))
    for member in members:
        _sync(member)
    listed = {
        member.relative_to(folder).as_posix(): {"size": member.stat().st_size, "sha256": hash_file(member)}
        for member in members
        if member.is_file()
    }
    manifest = {"format": FORMAT, "step": step, "files": listed}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(folder / _MANIFEST)
    _sync(folder)


def _copy_files(source: Path, target: Path) -> None:
    """Copy contents alone: file systems of shared drives may refuse permissions and times."""
    for file in sorted(source.rglob("*")):
        if file.is_file():
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


def _verify(folder: Path, name: str, size: int, sha256: str) -> None:
    file = folder / name
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or file.is_symlink():
        raise _damaged(folder, name, "lies outside the checkpoint")
    if not file.is_file():
        raise _damaged(folder, name, "is missing")
    if (got := file.stat().st_size) != size:
        raise _damaged(folder, name, f"has {got} bytes, expected {size}")
    if (digest := hash_file(file)) != sha256:
        raise _damaged(folder, name, f"has changed: sha256 {digest[:12]}, expected {sha256[:12]}")


def _damaged(folder: Path, name: str, what: str) -> CheckpointError:
    return CheckpointError(f"{folder / name} {what}. Put back a copy of the file, or resume from another checkpoint.")


def _read_back(target: Path) -> None:
    try:
        load(target)
    except CheckpointError:
        target.rename(_hidden(target, "tmp"))
        raise


def _folders(root: Path) -> list[Path]:
    """The checkpoints under `root`, newest first, valid or not."""
    named = [folder for folder in root.iterdir() if _STEP.fullmatch(folder.name) and folder.is_dir()]
    return sorted(named, key=lambda folder: int(folder.name.removeprefix("step-")), reverse=True)


def _valid(folder: Path) -> bool:
    try:
        load(folder)
    except CheckpointError as error:
        _log.warning("%s", error)
        return False
    return True


def _sweep(root: Path) -> None:
    """Remove what this process, or one that no longer runs, left behind; bring back a replaced checkpoint."""
    for entry in root.iterdir():
        leftover = _LEFTOVER.fullmatch(entry.name)
        if leftover is None or _runs_elsewhere(int(leftover["pid"])):
            continue
        if leftover["kind"] == "old" and not (root / leftover["name"]).exists():
            entry.rename(root / leftover["name"])
        else:
            shutil.rmtree(entry)


def _runs_elsewhere(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)  # signal 0 asks whether the process exists and sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _prune(root: Path, verified: Path, keep: int) -> None:
    """Keep the newest `keep` valid checkpoints; a folder that cannot be removed must not stop the run."""
    try:
        kept = 0
        for folder in _folders(root):
            if kept < keep and (folder == verified or _valid(folder)):
                kept += 1
            else:
                folder.rename(_hidden(folder, "tmp"))  # first the name: half removed must not look half damaged
        _sweep(root)
    except OSError as error:
        _log.warning("%s: the new checkpoint is safe, an old one could not be removed: %s", root, error)


def _refuse_later_step(root: Path, step: int) -> None:
    for folder in _folders(root):
        if int(folder.name.removeprefix("step-")) > step and _valid(folder):
            raise CheckpointError(
                f"{root}: holds {folder.name}, later than step {step} that is being saved. "
                "Resume from it, or move it away, or choose another output folder."
            )


def _refuse_full_disk(root: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    needed = _SLACK + sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    if (free := shutil.disk_usage(root).free) < needed:
        raise OSError(f"it needs {needed / 2**20:.0f} MiB and only {free / 2**20:.0f} MiB are free")


def _plain_json(state: Mapping[str, JSON]) -> str:
    """Write strict JSON that reads back as exactly `state`."""
    try:
        text = json.dumps(dict(state), allow_nan=False, indent=1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint.save: state must be plain JSON with finite numbers: {error}") from error
    if json.loads(text) != dict(state):
        raise ValueError(
            "checkpoint.save: state would not read back as given. Use string keys, and lists instead of tuples."
        )
    return text


def _shapes(optimizer: torch.optim.Optimizer) -> JSON:
    return [[list(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups]


def _encode(value: object, place: str, tensors: dict[str, Tensor], seen: dict[int, str]) -> JSON:
    """Write `value` as JSON in which every object has one key, its kind; tensors go to `tensors` under `place`."""
    if isinstance(value, Tensor):
        name = seen.setdefault(id(value), place)  # one tensor held twice stays one
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _encode(one, f"{place}.{key}", tensors, seen)] for key, one in value.items()]}
    if isinstance(value, list | tuple):
        items: JSON = [_encode(one, f"{place}.{index}", tensors, seen) for index, one in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f"{place}: got a {type(value).__name__}, expected tensors, dicts, lists, tuples and plain numbers or text. "
        "Choose an optimizer whose state is made of these."
    )


def _decode(tree: Any, tensors: Mapping[str, Tensor], used: set[str]) -> Any:
    """Undo `_encode`, noting the names of the tensors it took."""
    if isinstance(tree, list):
        return [_decode(one, tensors, used) for one in tree]
    if not isinstance(tree, dict):
        return tree
    match tree:
        case {"tensor": str(name)} if name in tensors:
            used.add(name)
            return tensors[name]
        case {"dict": list(pairs)}:
            return {key: _decode(one, tensors, used) for key, one in pairs}
        case {"tuple": list(items)}:
            return tuple(_decode(one, tensors, used) for one in items)
        case {"float": str(text)}:
            return float(text)
        case _:
            raise CheckpointError(
                f"optimizer state: the entry {tree} has no tensor among the {len(tensors)} saved. "
                "Resume from an older checkpoint."
            )


def _same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and every bit (a NaN equals itself), wherever they lie."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    left, right = (one.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for one in (left, right))
    return torch.equal(left, right)
