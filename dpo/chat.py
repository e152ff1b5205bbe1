"""Talk to a trained model beside its start: the same question to both, each with a history of its own."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO, final

from dpo.data import BadRow, Message, Renderer
from dpo.errors import ConfigError, ModelError
from dpo.evaluation.samples import log_ratios
from dpo.model.base import LanguageModel, Role, load_base
from dpo.model.rollout import sample
from dpo.run import ADAPTER, RUN_FILE, read_last_stage
from dpo.settings import read_run

SIDES: Final[Mapping[Role, str]] = {"reference": "start", "policy": "trained"}
"""Who answers, and what they are called."""

HELP: Final = "/reset begins anew, /system TEXT sets the system message (and begins anew), /quit ends."


@final
@dataclass(frozen=True)
class Said:
    """One answer."""

    side: str
    """"start" or "trained"."""
    text: str
    """Without special tokens."""
    tokens: int
    """The end token included where the model wrote it."""
    finished: bool
    """Whether the model ended by itself."""
    log_ratio: float
    """log trained - log start of this answer, summed over its tokens, nats; of the trained one's a sample of the KL."""

    @property
    def account(self) -> str:
        """Return what was measured, in words."""
        cut = "" if self.finished else ", cut"
        return f"{self.tokens} tokens{cut}, log-ratio {self.log_ratio:+.2f} nats"


@final
@dataclass(frozen=True, kw_only=True)
class Manner:
    """How both sides answer."""

    temperature: float = 1.0
    """Divides the logits (>= 0); 0 takes the most likely token."""
    max_new_tokens: int = 256
    """Longest answer, in tokens (>= 1)."""
    seed: int = 0
    """Of the sampling: the same talk with the same seed gives the same answers."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(
                f"--temperature: got {self.temperature}, expected 0 or more. 0 takes the likeliest token."
            )
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens: got {self.max_new_tokens}, expected 1 or more.")


@final
class Conversation:
    """A talk with both sides of a model. Each remembers its own answers."""

    def __init__(self, model: LanguageModel, manner: Manner, system: str | None = None) -> None:
        """Begin to talk, under a system message where there is one."""
        self.model, self.manner = model, manner
        self._renderer = Renderer(model.tokenizer, max_length=2)
        self._histories: dict[Role, tuple[Message, ...]] = {}
        self.reset(system)

    @property
    def start_is(self) -> str:
        """What the start is, in words."""
        return self.model.reference_is

    def reset(self, system: str | None = None) -> None:
        """Forget all turns; `system` replaces the system message, None leaves none."""
        self._system = system
        self._histories = {role: () if system is None else (Message("system", system),) for role in SIDES}

    def again(self) -> None:
        """Forget all turns, keep the system message."""
        self.reset(self._system)

    def say(self, text: str) -> tuple[Said, ...]:
        """Return the answers of start and trained model; both go into their histories.

        Raises:
            ModelError: the chat template refuses the talk, or it has grown too long; the histories are as before.
        """
        asked = {role: (*self._histories[role], Message("user", text)) for role in SIDES}
        prompts = {role: self._prompt(turns) for role, turns in asked.items()}
        said = [self._answer(role, prompts[role]) for role in SIDES]
        self._histories = {
            role: (*asked[role], Message("assistant", one.text)) for role, one in zip(SIDES, said, strict=True)
        }
        return tuple(said)

    def _prompt(self, turns: tuple[Message, ...]) -> tuple[int, ...]:
        try:
            ids = self._renderer.prompt(turns)
        except BadRow as bad:
            raise ModelError(f"The chat template refuses this talk: {bad}. Begin anew with /reset.") from bad
        room = getattr(self.model.network.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and len(ids) + self.manner.max_new_tokens > room:
            raise ModelError(
                f"The talk has {len(ids)} tokens, and {self.manner.max_new_tokens} for the answer, expected at most "
                f"{room} together. Begin anew with /reset, or give a smaller --max-new-tokens."
            )
        return ids

    def _answer(self, role: Role, prompt: tuple[int, ...]) -> Said:
        manner = self.manner
        (one,) = sample(
            self.model,
            [prompt],
            role=role,
            max_new_tokens=manner.max_new_tokens,
            temperature=manner.temperature,
            seed=manner.seed,
        )
        (ratio,) = log_ratios(self.model, [(one.prompt, one.completion)])
        return Said(SIDES[role], one.text, len(one.completion), one.finished, ratio)


def talk_to(
    run: Path | str,
    *,
    manner: Manner = Manner(),
    system: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Conversation:
    """Load a finished run's model and its start, on one base.

    Args:
        run: folder of the run; of several stages the last is taken, a stage's own folder takes that one.
        manner: how both answer.
        system: a system message.
        overrides: nested settings of the model, where it lies elsewhere by now or on another device.

    Raises:
        ConfigError: there is no finished run of a policy.
        ModelError: the model cannot be loaded.
    """
    result = read_last_stage(Path(run))
    if result.run.trains_reward:
        raise ConfigError(f"{result.folder}: got a reward model, which says a number, expected a policy. Name its run.")
    if other := sorted(set(overrides or {}) - {"model"}):
        raise ConfigError(f"{other[0]}: a talk cannot change it; model.* can be given.")
    (settings,) = read_run(result.folder / RUN_FILE, overrides or {})
    model = LanguageModel.start(load_base(settings.model), settings.model, settings.loop.seed)
    model.restore(result.folder / ADAPTER)
    return Conversation(model, manner, system)


def converse(
    conversation: Conversation, lines: Iterable[str], show: Callable[[tuple[Said, ...]], None], tell: Any
) -> None:
    """Carry on a talk until the lines end or one says /quit.

    Args:
        conversation: with whom.
        lines: what the user writes; an empty one is passed over.
        show: shows a turn's answers.
        tell: prints a line.
    """
    for line in lines:
        command, _, rest = line.strip().partition(" ")
        if not command:
            continue
        if command == "/quit":
            return
        if command == "/reset":
            conversation.again()
            tell("begun anew")
        elif command == "/system":
            conversation.reset(rest.strip() or None)
            tell("begun anew under this system message" if rest.strip() else "begun anew without a system message")
        elif command.startswith("/"):
            tell(f"{command}: no such command. {HELP}")
        else:
            _turn(conversation, line.strip(), show, tell)


def _turn(conversation: Conversation, text: str, show: Callable[[tuple[Said, ...]], None], tell: Any) -> None:
    try:
        show(conversation.say(text))
    except ModelError as error:  # the talk goes on: /reset mends it
        tell(f"error: {error}")


def chat(conversation: Conversation, source: TextIO, out: TextIO) -> None:
    """Talk by the terminal: side by side where somebody reads, as plain lines in a pipe.

    Args:
        conversation: with whom.
        source: lines of the user; where it is no terminal they are shown as well.
        out: where to print.
    """
    from rich.console import Console

    console = Console(file=out, highlight=False)
    by_hand = source.isatty() and console.is_terminal

    def tell(text: str) -> None:
        print(_clean(text), file=out, flush=True)

    tell(f"start: {conversation.start_is}")
    if by_hand:
        tell(HELP)
        converse(conversation, _asked(), lambda said: console.print(_side_by_side(said)), tell)
        return

    def plainly(said: tuple[Said, ...]) -> None:
        for one in said:
            tell(f"{one.side} ({one.account}): {one.text}")

    def echoed() -> Iterable[str]:
        for line in source:
            if line.strip():
                tell(f"you: {line.strip()}")
            yield line

    converse(conversation, echoed(), plainly, tell)


def _asked() -> Iterable[str]:
    """Yield what is typed, until the end of the input (Ctrl-D)."""
    while True:
        try:
            yield input("you> ")
        except EOFError:
            return


def _side_by_side(said: tuple[Said, ...]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(*(f"{one.side}: {one.account}" for one in said), expand=True)
    table.add_row(*(Text(_clean(one.text)) for one in said))
    return table


def _clean(text: str) -> str:
    """Return text from a model without characters that could steer the terminal."""
    from dpo.evaluation.report.text import clean

    return clean(text)
