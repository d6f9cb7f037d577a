"""A tokenizer's chat template: messages become text, at a date that stays, and a turn ends with one of its tokens."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, time
from functools import cache
from typing import TYPE_CHECKING

import jinja2
import jinja2.ext

from kltune.errors import DataError, ModelError, RecipeError
from kltune.lm.data.foreign import memory_limit, read_ordinary, time_limit
from kltune.lm.data.forms import Message
from kltune.lm.data.rows import RowFault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
TEMPLATE_SECONDS, TEMPLATE_BYTES = 2, 1 << 30       # that a chat template may take for one row, beside what is in use
MOST_WRITTEN = 1_000_000    # characters of a template's own
CLOCK = "strftime_now"      # by which templates ask for the time
PROBE = "kltune"            # an answer that no template knows anything of


@contextmanager
def tokenizing(tokenizer: "PreTrainedTokenizerBase", what: str) -> Iterator[None]:
    """Within: whatever a tokenizer raises over a text or over ids ends as one line; its file says what it cannot do.

    Raises:
        ModelError: names the tokenizer, what it was given and its reason.
    """
    try:
        yield
    except BaseException as cause:      # what Rust panics over is no Exception
        if not (isinstance(cause, Exception) or type(cause).__name__ == "PanicException"):
            raise
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path} can make nothing of {what[:40]!r} ({str(cause)[:200]}); is its "
            "tokenizer.json whole?"
        ) from cause


def today() -> date:
    """The day by the clock that transformers gives to templates."""
    return datetime.now().date()


def parsed_day(text: str) -> date:
    """A date as it was typed; RecipeError if it is none."""
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise RecipeError(f"--date: found {text!r}, wanted a day as 2026-01-31.") from None


def read_template(file: str | None) -> str | None:
    """The chat template in a file; None without one. DataError if it cannot be read, is empty, or no Jinja."""
    if file is None:
        return None
    try:
        text = read_ordinary(file).decode("utf-8").replace("\r\n", "\n")
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols", Generation]).parse(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else "") or "not UTF-8"
        raise DataError(f"data.chat_template: {file} cannot be read: {reason}.") from None
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"data.chat_template: {file}:{error.lineno}: not a Jinja template: {error.message}.") from None
    if not text.strip():
        raise DataError(f"data.chat_template: {file} is empty, wanted a Jinja template that writes messages.")
    return text


class Generation(jinja2.ext.Extension):
    """Knows the tag by which templates mark what the assistant says, so that they can be parsed."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The marked part as it is."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def template_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The chat template that transformers takes unless told otherwise, of several the one called default; "": none."""
    template = tokenizer.chat_template
    return (template.get("default", "") if isinstance(template, dict) else template) or ""


def reads_clock(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the chat template asks for the time."""
    return CLOCK in template_of(tokenizer)


def without_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Words for a tokenizer that has no chat template, or several of which none is the default."""
    named = tokenizer.chat_template
    if isinstance(named, dict) and named:
        return f"has chat templates called {', '.join(sorted(named))} and none called default"
    return "has no chat template"


def said(messages: Sequence[Message]) -> str:
    """What was said, without anything of a template: of one message its content, of several also who said it."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


class ChatTemplate:
    """A tokenizer's chat template; for it, it is always the same day."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", day: date | None = None):
        """day: what a template is told that asks for the time; None: today."""
        self._tokenizer, self.day = tokenizer, day or today()
        self.source = template_of(tokenizer)
        self.used = False

    def render(self, messages: Sequence[Message], *, to_answer: bool) -> str:
        """The messages as the template writes them, to be answered or not; RowFault if it refuses them."""
        self.used = True
        slow = ModelError(
            f"{self._tokenizer.name_or_path}: its chat template takes more than {TEMPLATE_SECONDS} s over one row."
        )
        try:
            with time_limit(TEMPLATE_SECONDS, slow), memory_limit(TEMPLATE_BYTES):
                more = {"chat_template": with_date(self.source, self.day)} if CLOCK in self.source else {}
                text = self._tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=to_answer, **more
                )
            if len(text) > MOST_WRITTEN + 100 * sum(len(str(message)) for message in messages):
                raise ModelError(f"{self._tokenizer.name_or_path}: its chat template writes {len(text):,} characters.")
            return text
        except ModelError:      # a ValueError too, which is no fault of a row
            raise
        except (MemoryError, OverflowError) as error:
            raise ModelError(
                f"{self._tokenizer.name_or_path}: its chat template wants more than {TEMPLATE_BYTES >> 20} MiB."
            ) from error
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, RecursionError) as error:
            raise RowFault(f"the tokenizer's chat template refuses the messages: {error}") from error

    def before_answer(self) -> str:
        """What the template writes up to an answer that is still to come; "" if it writes no such conversation."""
        try:
            return self.render([{"role": "user", "content": PROBE}], to_answer=True)
        except RowFault:
            return ""

    def behind_answer(self) -> str | None:
        """What the template writes behind the last answer of a conversation; None if it writes no such conversation."""
        try:
            text = self.render([{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}],
                               to_answer=False)
        except RowFault:
            return None
        _, found, behind = text.rpartition(PROBE)
        return behind if found else None

@cache
def with_date(source: str, day: date) -> str:
    """A chat template for which it is always the same day, at midnight.

    transformers gives templates the clock, and lets nothing but text be given in its place: so the template gets a
    macro of the clock's name, which knows the forms that are written out in it.
    """
    forms = {text[1:-1] for _, kind, text in jinja2.Environment().lex(source) if kind == "string" and "%" in text}
    known = json.dumps({form: datetime.combine(day, time()).strftime(form) for form in sorted(forms)})
    unknown = "raise_exception('asks for the time in a form that is not written out in the template')"
    macro = (
        f"{{%- macro {CLOCK}(format) %}}{{{{ {known}[format] if format in {known} else {unknown} }}}}{{% endmacro %}}"
    )
    return macro + ("\n" if source.startswith("\n") else "") + source      # the first one behind a macro is left out


@dataclass(frozen=True)
class EndTokens:
    """What ends a response, for sampling, training, reading and evaluation alike.

    ids: each of these ends one. appended: the one that is put behind plain texts and responses. turn: the one that the
    chat template writes behind an answer, None where it writes none. unreachable: ids that the model has no logit for.
    """

    ids: tuple[int, ...]
    appended: int | None
    turn: int | None = None
    unreachable: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, tokenizer: "PreTrainedTokenizerBase", listed: Iterable[int | None] = (), vocabulary: int | None = None
    ) -> "EndTokens":
        """Those that a model's configuration lists, the tokenizer's own, and the one that ends a turn of its template.

        vocabulary: how many tokens the model has logits for.
        """
        turn = turn_end(tokenizer)
        named = [*dict.fromkeys(i for i in (tokenizer.eos_token_id, *listed, turn) if i is not None and i >= 0)]
        ids = [i for i in named if vocabulary is None or i < vocabulary]
        return cls(
            tuple(sorted(ids)), next((i for i in named if i in ids), None), turn,
            tuple(sorted(set(named) - set(ids))),
        )

    @property
    def note(self) -> str:
        """A line for the start of a run if no response can ever end; "" otherwise."""
        if self.ids:
            return ""
        return (
            f"warning: the model has no logit for the tokens that end a response (ids {self.unreachable}), so every "
            "response goes on to the length limit; is this the model's own tokenizer?"
        )


def turn_end(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The control token that the chat template writes first behind an answer; None without a template, or one.

    White space that was added to a tokenizer as ordinary text, as a line break, is said within answers too.
    """
    if not template_of(tokenizer):
        return None
    behind = ChatTemplate(tokenizer).behind_answer()
    if not behind:
        return None
    added = tokenizer.added_tokens_decoder.items()
    control = {*tokenizer.all_special_ids, *(i for i, token in added if token.special or token.content.strip())}
    with tokenizing(tokenizer, behind):
        return next((i for i in tokenizer.encode(behind, add_special_tokens=False) if i in control), None)


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str] | None:
    """Matches the spelling of every token that is special to the tokenizer; None if there is none."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    spellings = sorted({*special, *tokenizer.all_special_tokens} - {""}, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, spellings))) if spellings else None
