"""Text into token ids: where a prompt begins, where a response joins it, and where it ends.

What a tokenizer calls special is a control token where a template writes it. Where a message spells it, it stays text:
an answer about `</s>` would otherwise end there.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any, Literal

from kltune.errors import DataError, ModelError
from kltune.lm.data.chat import CLOCK, ChatTemplate, control_tokens, said, tokenizing, without_template
from kltune.lm.data.forms import CALLS, THOUGHTS, Asked, Message, as_messages, is_learnt
from kltune.lm.data.rows import RowFault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
Ids = tuple[int, ...]
Scored = tuple[Ids, tuple[bool, ...]]       # tokens, and which of them the assistant says
# Tokenizers of the SentencePiece kind put a space before every text; behind a line break they leave it out.
LINE_BREAK = "\n"
LONGEST_CONTROL = 200       # characters of a control token, and of white space behind it
LONG_TEXT, LONG_TOKEN = 1_000_000, 64      # characters of a text, and for each token of it that counts: a part will do
MARK = "\ufdd0"     # stands within a spelling that is to stay text; Unicode keeps this one out of texts


def last_tokens(ids: Ids, limit: int, bos: int | None) -> Ids:
    """The last ``limit`` tokens, the first of them still bos where bos came first (a policy without it is lost)."""
    if len(ids) <= limit:
        return ids
    head = ids[:1] if ids[0] == bos and limit > 1 else ()
    return head + ids[len(ids) - limit + len(head) :]


@dataclass(frozen=True)
class OtherTokenizer:
    """A tokenizer that is not the reference's, and has to make the same of every row.

    source: where it lies, with its owner's name. differences: from the reference's, in words.
    """

    source: str
    tokenizer: "PreTrainedTokenizerBase"
    differences: tuple[str, ...]

    def refuse(self, text: str, what: str) -> ModelError:
        """The error for a text of which the two make something else."""
        return ModelError(
            f"{self.source}: its tokenizer is not that of the reference, and makes other {what} of {text[:60]!r}:\n  "
            + "\n  ".join(self.differences)
        )


class Encoder:
    """Encodes prompts and responses: no end token behind a prompt, no second bos, responses that join exactly.

    template: none (text as it is), chat (the tokenizer's chat template), or auto (chat if rows are messages).
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: str = "none",
        *,
        end_token: int | None = None,
        end_ids: Sequence[int] = (),
        day: date | None = None,
        control: Literal["auto", "text", "tokens"] = "auto",
        others: Sequence[OtherTokenizer] = (),
        limit: int | None = None,
    ):
        """Arguments as in ``RowRules``; limit: tokens of a row beyond which none is read, so that none need be made."""
        self.limit = limit
        self.tokenizer, self.template, self.end_token, self.control = tokenizer, template, end_token, control
        self.ends = frozenset({end_token, *end_ids} - {None})
        self.chat = ChatTemplate(tokenizer, day)
        self._others = [(other, ChatTemplate(other.tokenizer, day)) for other in others]
        self._spelling = control_tokens(tokenizer)
        self.spelled: dict[str, str] = {}       # place of a row: a control token that its plain text spells
        self.where = ""                         # of the row that is being read
        self.head = _head(tokenizer)
        for other in others:
            if _head(other.tokenizer) != self.head:
                raise other.refuse("", "tokens before every text than the begin token")
        with tokenizing(tokenizer, "ab"):
            self.joins_exactly = tokenizer.decode(self.plain("a") + self.plain("b")) == "ab"

    def plain(self, text: str, *, from_end: bool = False) -> Ids:
        """The tokens of the text alone; control tokens that it spells are control tokens."""
        return self._encode(text, literal=False, from_end=from_end)

    def _encode(self, text: str, *, literal: bool, from_end: bool = False) -> Ids:
        """The tokens of a text; of a very long one of its beginning, or its end, as many as there may be and more."""
        most = max(LONG_TEXT, LONG_TOKEN * (self.limit or 0))
        if self.limit is not None and len(text) > most:
            ids = self._encode(text[-most:] if from_end else text[:most], literal=literal)
            if len(ids) > self.limit:
                return ids
        ids = encoded(self.tokenizer, text, literal=literal)
        for other, _ in self._others:
            if encoded(other.tokenizer, text, literal=literal) != ids:
                raise other.refuse(text, "tokens")
        return ids

    def first_ids(self, text: str, *, from_end: bool = False) -> Ids:
        """Tokens of a text at the start: bos if there is one, never two, no end token; RowFault if there are none.

        from_end: of a very long text its end is what counts.
        """
        self._note(text)
        ids = self._encode(text, literal=self.control == "text", from_end=from_end)
        if not ids:
            raise RowFault(f"the tokenizer makes no token of {text[:40]!r}")
        return ids if ids[: len(self.head)] == self.head else self.head + ids

    def following_ids(self, text: str, prompt: str = "") -> Ids:
        """The tokens of a text that continues a prompt, so that both together spell the two texts joined.

        Raises:
            RowFault: the tokenizer makes nothing of the text.
        """
        self._note(text)
        literal = self.control == "text"
        last = None if literal or self._spelling is None else re.search(
            rf"(?:{self._spelling.pattern})\s*\Z", prompt[-LONGEST_CONTROL:])
        return self._following(text, literal=literal, behind=last[0] if last else "")

    def response_ids(self, text: str, prompt: str = "") -> Ids:
        """The tokens of a plain response to a plain prompt and, behind it, its end token.

        Raises:
            RowFault: the tokenizer makes nothing of the text, or it goes on behind an end token.
        """
        ids = self.ended(self.following_ids(text, prompt))
        self._refuse_end_within(ids[:-1], "the response")
        return ids

    def ended(self, ids: Ids) -> Ids:
        """Tokens with an end token behind them: their own, where no more than white space follows it, or another."""
        last = next((place for place in reversed(range(len(ids))) if ids[place] in self.ends), None)
        if last is not None and not self.tokenizer.decode(ids[last + 1 :]).strip():
            return ids[: last + 1]
        if self.end_token is None:
            return ids
        for other, _ in self._others:
            if other.tokenizer.eos_token_id not in (None, self.end_token):
                raise other.refuse("the end of a text", "tokens")
        return (*ids, self.end_token)

    def _following(self, text: str, *, literal: bool, behind: str = "") -> Ids:
        # A tokenizer that puts a space before every text would put one between prompt and response as well, where the
        # sampled responses have none; but behind a control token they may have one.
        ids = self._encode(text, literal=literal)
        if not ids:
            raise RowFault(f"the tokenizer makes no token of the response {text[:40]!r}")
        if self.joins_exactly:
            return ids
        for other in filter(None, (behind, LINE_BREAK, "a")):       # a line break may become one token with the next
            before, both = (self._encode(part, literal=literal) for part in (other, other + text))
            if both[: len(before)] == before:
                return both[len(before) :]
        return ids

    def uses_chat(self, *, messages: bool) -> bool:
        """Whether rows that are messages, or are not, go through the chat template; DataError if there is none."""
        if self.template == "none" and messages:
            raise DataError('data.template: none cannot be used with rows of "messages"; wanted auto or chat.')
        chat = self.template == "chat" or messages
        if chat and not self.chat.source:
            wish = 'rows of "messages" need one' if messages else "data.template: chat needs one"
            raise DataError(f"the model's tokenizer {without_template(self.tokenizer)}, and {wish}; wanted "
                            "data.chat_template: FILE, a model with one, or plain rows and data.template: none.")
        return chat

    def prompt(self, asked: Asked) -> tuple[Ids, str, tuple[Message, ...]]:
        """A prompt's tokens, what was said in it, and its messages if it goes through the chat template, else ()."""
        if not self.uses_chat(messages=not isinstance(asked, str)):
            return self.first_ids(asked, from_end=True), asked, ()
        messages = as_messages(asked)
        return self.chat_ids(messages, to_answer=True), said(messages), tuple(messages)

    def chat_ids(self, messages: Sequence[Message], *, to_answer: bool) -> Ids:
        """The tokens of messages as the chat template writes them; RowFault if it refuses them."""
        text = self._chat_text(messages, to_answer=to_answer)
        return self._ids(text) if MARK in text else self.plain(text, from_end=to_answer)

    def conversation(self, messages: Sequence[Message], turns: str = "all") -> list[Scored]:
        """The tokens of a conversation up to its last answer, and which of them the assistant says.

        A turn is scored from behind what the template writes before an answer to its first end token; without an end
        token, to the end of what the template writes for it. A template that writes earlier turns in another way once
        later ones follow gives several texts: of each answer, with what is really asked before it.

        turns: "all" answers of the assistant are scored, or the "last" alone; but none whose weight is 0.
        """
        places = [place for place, message in enumerate(messages) if is_learnt(message)]
        found: list[Scored] = []
        for place in places if turns == "all" else places[-1:]:
            before, turn = self.answer(messages[: place + 1])
            ids, scored = found.pop() if found and before[: len(found[-1][0])] == found[-1][0] else ((), ())
            scored += (False,) * (len(before) - len(ids)) + (True,) * len(turn)
            found.append((before + turn, scored))
        return found

    def answer(self, messages: Sequence[Message]) -> tuple[Ids, Ids]:
        """What the assistant reads before the last message, and what it says in it.

        The conversation becomes tokens as one text, as templates are meant to be read: behind a control token some
        tokenizers begin an answer with a space. Where that merges the two, they become tokens apart.

        Raises:
            RowFault: the answer spells an end token that cannot be kept as text, or the template writes something else
                before it than before an answer that is still to come.
        """
        place, content = len(messages) - 1, messages[-1]["content"]
        before = self._chat_text(messages[:-1], to_answer=True)
        whole = self._chat_text(messages, to_answer=False)
        said = whole[len(before) :] if whole.startswith(before) else self._goes_on(before, whole, messages[-1], place)
        self._refuse_end_within(self._encode(content, literal=self.control != "tokens"), f"messages[{place}].content")
        asked, turn = self._joined(before, said)
        self._refuse_unwritten(messages, whole)
        end = next((place for place, token in enumerate(turn) if token in self.ends), len(turn))
        rest = readable(self.tokenizer, turn[end + 1 :]).strip()
        if rest and not readable(self.tokenizer, self.plain(self.chat.behind_answer() or "")).strip().endswith(rest):
            self._refuse_end_within(turn[: end + 1], f"messages[{place}]")
        return asked, turn[: end + 1]

    def _joined(self, before: str, said: str) -> tuple[Ids, Ids]:
        """The tokens of what is asked, and those behind them that make both texts one: they are what a policy says."""
        asked = self._ids(before)
        whole = self._ids(before + said) if len(before + said) <= LONG_TEXT else ()     # of a longer one, a part only
        if whole[: len(asked)] == asked and len(whole) > len(asked):
            return asked, whole[len(asked) :]
        return asked, self._ids(said, following=True)

    def _refuse_unwritten(self, messages: Sequence[Message], whole: str) -> None:
        """Raise RowFault if the template writes nothing of the tool calls, or of the thoughts, of the last message."""
        *before, last = messages
        for names in ((CALLS,), THOUGHTS):
            held = [name for name in names if last.get(name)]
            bare = {name: value for name, value in last.items() if name not in held}
            if held and self._chat_text([*before, bare], to_answer=False) == whole:
                raise RowFault(f'field "messages[{len(before)}].{held[0]}": the chat template writes nothing of it, so '
                               "that it would not be learnt; write it into the content, or take the field out")

    def _goes_on(self, before: str, whole: str, message: Message, place: int) -> str:
        """An answer and its end behind what the template writes before one, where it writes that of no answer given.

        Templates of thinking models begin an answer with a tag, and take the thoughts out of answers given: what the
        policy says is then the answer as it stands in the row, from behind that tag.
        """
        letters = enumerate(zip(before, whole, strict=False))
        begun = before[next((at for at, (mine, others) in letters if mine != others), len(whole)) :]
        behind, content = self.chat.behind_answer(), message["content"]
        more = any(message.get(name) for name in (CALLS, *THOUGHTS))
        if begun and not begun.strip() and not content.startswith(begun):
            raise RowFault(f'field "messages[{place}]": the generation prompt of the chat template ends in {begun!r}, '
                           "which it leaves out before an answer that is given; take it out of the template, and give "
                           "that as data.chat_template")
        if not content.startswith(begun) or behind is None or more:
            raise RowFault(
                f'field "messages[{place}]": before this answer the chat template writes something else than before an '
                f"answer that is still to come, which it begins with {begun!r}; an answer that begins so can be learnt"
            )
        return self._marked(content.removeprefix(begun)) + behind

    def _chat_text(self, messages: Sequence[Message], *, to_answer: bool) -> str:
        """What the template writes; a control token that a message spells has a MARK in it."""
        text = self._render(messages, to_answer=to_answer)
        contents = [*_texts([_without_role(message) for message in messages])]
        if self.control == "tokens" or self._spelling is None or not any(map(self._spelling.search, contents)):
            return text
        if any(MARK in content for content in contents):
            raise RowFault(f"found the character U+{ord(MARK):04X}, which is none in any text")
        marked = [message | self._marked(_without_role(message)) for message in messages]
        apart = self._render(marked, to_answer=to_answer)
        return apart if apart.replace(MARK, "") == text else text       # else the template itself looks for the token

    def _marked(self, value: Any) -> Any:
        """A text, or all texts in a value, with a MARK in every control token that is spelled out."""
        if isinstance(value, dict):
            return {name: self._marked(part) for name, part in value.items()}
        if isinstance(value, list):
            return [self._marked(part) for part in value]
        spelling = None if self.control == "tokens" else self._spelling
        if spelling is None or not isinstance(value, str):
            return value
        return spelling.sub(lambda found: found[0][0] + MARK + found[0][1:], value)

    def _render(self, messages: Sequence[Message], *, to_answer: bool) -> str:
        text = self.chat.render(messages, to_answer=to_answer)
        for other, chat in self._others:
            if chat.source and chat.render(messages, to_answer=to_answer) != text:
                raise other.refuse(said(messages), "text by its chat template")
        return text

    def _ids(self, text: str, *, following: bool = False) -> Ids:
        """The tokens of what a template wrote; what has a MARK in it is text."""
        if MARK not in text:
            return self._following(text, literal=False) if following else self.plain(text)
        # Whether parts can be encoded apart is tried on a text that spells no control token, but is cut as this one.
        alike = text.replace(MARK, "a")
        for encode in (self._encode, self._following):
            first = self._following if following else self._encode
            if self._apart(text, "a", first, encode) == self._ids(alike, following=following):
                return self._apart(text, "", first, encode)
        raise RowFault("spells a control token, which this tokenizer cannot keep as text")

    def _apart(self, text: str, mark: str, first: Callable[..., Ids], encode: Callable[..., Ids]) -> Ids:
        """The tokens of a text, part by part between its control tokens; ``mark`` in place of each MARK."""
        ids: Ids = ()
        for number, part in enumerate(re.split(f"({self._spelling.pattern})", text)):
            if number % 2:
                ids += self.plain(part)
            elif part:
                ids += (first if number == 0 else encode)(part.replace(MARK, mark), literal=True)
        return ids

    def _refuse_end_within(self, ids: Ids, where: str) -> None:
        end = next((token for token in ids if token in self.ends), None)
        if end is not None:
            raise RowFault(
                f"{where}: spells {self.tokenizer.convert_ids_to_tokens(end)!r}, which ends a response, before its "
                "end; nothing behind it could ever be said. Take it out, or write data.control_tokens: text"
            )

    def _note(self, text: str) -> None:
        """Keep in mind which row spells a control token elsewhere than bos at its start and an end token at its end."""
        if self.control != "auto" or self._spelling is None:
            return
        for match in self._spelling.finditer(text):
            (token,) = self.tokenizer.convert_tokens_to_ids([match[0]])
            begins, ends = match.start() == 0 and (token,) == self.head, match.end() == len(text) and token in self.ends
            if not begins and not ends:
                self.spelled.setdefault(self.where, match[0])

    def notes(self) -> tuple[str, ...]:
        """What there is to say of the rows that were encoded."""
        found = [
            f"{other.source}: its tokenizer is another than the reference's, and makes the same of these rows ("
            + "; ".join(other.differences) + ")" for other, _ in self._others
        ]
        if self.spelled:
            where, token = next(iter(self.spelled.items()))
            more = f" and {len(self.spelled) - 1} more rows" if len(self.spelled) > 1 else ""
            found.append(f"{where}{more} spell control tokens, as {token}, and they are read as such "
                         "(data.control_tokens: text reads their letters)")
        if self.chat.used and CLOCK in self.chat.source:
            found.append(f"the chat template writes the date, and here it is always {self.chat.day:%Y-%m-%d} "
                         "(data.date, --date)")
        if self.chat.used and self.chat.before_answer().endswith((" ", "\t")):
            found.append("warning: the generation prompt of the chat template ends in a space, behind which an answer "
                         "begins with another token than in texts; take it out of the template (data.chat_template)")
        behind = self.chat.behind_answer() if self.chat.used and self.ends else None
        if behind is not None and not self.ends & set(self.plain(behind)):
            found.append(f"warning: the chat template writes {behind!r} behind an answer, and no token that ends a "
                         "response: a policy that learns or speaks by it goes on to the length limit")
        return tuple(found)


def _without_role(message: Message) -> Message:
    return {name: value for name, value in message.items() if name != "role"}


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def readable(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """The text of the tokens as it is, without special tokens."""
    with tokenizing(tokenizer, f"ids {list(ids[:5])}"):
        return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def encoded(tokenizer: "PreTrainedTokenizerBase", text: str, *, literal: bool = False, special: bool = False) -> Ids:
    """The tokens of a text. literal: control tokens that it spells stay text. special: with what stands around it."""
    more = {"split_special_tokens": True} if literal else {}
    with tokenizing(tokenizer, text):
        return tuple(tokenizer.encode(text, add_special_tokens=special, verbose=False, **more))


def _head(tokenizer: "PreTrainedTokenizerBase") -> Ids:
    """What the tokenizer puts before a text: bos, for most; what follows the text is left out."""
    probe, alone = encoded(tokenizer, "a", special=True), encoded(tokenizer, "a")
    starts = [at for at in range(len(probe)) if probe[at : at + len(alone)] == alone]
    return probe[: starts[0]] if starts else ()


def spelled(encoder: Encoder, prompt: str, response: str, ended: bool, limit: int | None) -> Ids:
    """The tokens of a prompt and a response as in training data, cut from the left to ``limit``; ModelError if none."""
    end = encoder.end_token
    ids = (_tokens(encoder.first_ids, prompt) or encoder.head) + _tokens(encoder.following_ids, response, prompt)
    if ended and end is not None and ids[-1:] != (end,):
        ids += (end,)
    if not ids:
        raise ModelError("a prompt and a response without any token cannot be scored.")
    return ids if limit is None else last_tokens(ids, limit, encoder.tokenizer.bos_token_id)


def _tokens(encode: Callable[..., Ids], *texts: str) -> Ids:
    """The tokens of a text, () where the tokenizer makes none of it: a policy may say nothing at all."""
    try:
        return encode(*texts)
    except RowFault:
        return ()
