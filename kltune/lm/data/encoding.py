"""Text into token ids: where a prompt begins, where a response joins it, and which tokens are scored."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import jinja2

from kltune.errors import DataError, ModelError
from kltune.lm.data.forms import Message
from kltune.lm.data.rows import RowFault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
Ids = tuple[int, ...]
# Tokenizers of the SentencePiece kind put a space before every text; behind a line break they leave it out.
LINE_BREAK = "\n"


def last_tokens(ids: Ids, limit: int, bos: int | None) -> Ids:
    """The last ``limit`` tokens, the first of them still bos where bos came first (a policy without it is lost)."""
    if len(ids) <= limit:
        return ids
    head = ids[:1] if ids[0] == bos and limit > 1 else ()
    return head + ids[len(ids) - limit + len(head) :]


class Encoder:
    """Encodes prompts and responses: no end token behind a prompt, no second bos, responses that join exactly.

    template: none (text as it is), chat (the tokenizer's chat template), or auto (chat if rows are messages).
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str):
        self.tokenizer, self.template = tokenizer, template
        probe, alone = self._encode("a", add_special_tokens=True), self.plain("a")
        starts = [at for at in range(len(probe)) if probe[at : at + len(alone)] == alone]
        self.head = probe[: starts[0]] if starts else ()        # bos, for most; what follows the text is left out
        self.joins_exactly = tokenizer.decode(alone + self.plain("b")) == "ab"

    def _encode(self, text: str, *, add_special_tokens: bool) -> Ids:
        return tuple(self.tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))

    def plain(self, text: str) -> Ids:
        """The tokens of the text alone."""
        return self._encode(text, add_special_tokens=False)

    def readable(self, ids: Ids) -> str:
        """The text of the tokens, without special tokens: what a scorer reads."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def first_ids(self, text: str) -> Ids:
        """Tokens of a text at the start: bos if there is one, never two, no end token; RowFault if there are none."""
        ids = self.plain(text)
        if not ids:
            raise RowFault(f"the tokenizer makes no token of {text[:40]!r}")
        return ids if ids[: len(self.head)] == self.head else self.head + ids

    def following_ids(self, text: str) -> Ids:
        """The tokens of a text that continues another one, so that both together spell the two texts joined.

        A tokenizer that puts a space before every text would put one between prompt and response as well, where the
        sampled responses have none.

        Raises:
            RowFault: the tokenizer makes nothing of the text.
        """
        ids = self.plain(text)
        if not ids:
            raise RowFault(f"the tokenizer makes no token of the response {text[:40]!r}")
        if self.joins_exactly:
            return ids
        before, both = self.plain(LINE_BREAK), self.plain(LINE_BREAK + text)
        return both[len(before) :] if both[: len(before)] == before else ids

    def uses_chat(self, *, messages: bool) -> bool:
        """Whether rows that are messages, or are not, go through the chat template; DataError if there is none."""
        if self.template == "none" and messages:
            raise DataError('data.template: none cannot be used with rows of "messages"; wanted auto or chat.')
        chat = self.template == "chat" or messages
        if chat and not self.tokenizer.chat_template:
            wish = 'rows of "messages" need one' if messages else "data.template: chat needs one"
            raise DataError(f"the model's tokenizer has no chat template, and {wish}; wanted a model with a chat "
                            "template, or plain rows and data.template: none.")
        return chat

    def chat_text(self, messages: list[Message], *, to_answer: bool) -> str:
        """The messages as the chat template writes them, to be answered or not; RowFault if it refuses them."""
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=to_answer)
        except jinja2.TemplateError as error:
            raise RowFault(f"the tokenizer's chat template refuses the messages: {error}") from error

    def conversation(self, messages: list[Message], end_token: int | None) -> tuple[Ids, tuple[bool, ...]]:
        """The tokens of a conversation, and which of them the assistant says.

        A turn is scored from behind what the template writes before an answer to its first end token; without an end
        token, to the end of what the template writes for it. bos is the template's business.

        Raises:
            RowFault: the template writes earlier messages in another way once later ones follow, so that no place
                divides what the policy reads from what it says.
        """
        ids = self.plain(self.chat_text(messages, to_answer=False))
        scored = [False] * len(ids)
        for index in (index for index, message in enumerate(messages) if message["role"] == "assistant"):
            before, turn = self._last_turn(messages[: index + 1])
            if ids[: len(before) + len(turn)] != before + turn:
                raise _ambiguous(index)
            spoken = len(_to_end(turn, end_token))
            scored[len(before) : len(before) + spoken] = [True] * spoken
        return ids, tuple(scored)

    def answer(self, messages: list[Message], end_token: int | None) -> tuple[Ids, Ids]:
        """What the assistant reads before the last message, and what it says in it; raises as `conversation`."""
        before, turn = self._last_turn(messages)
        return before, _to_end(turn, end_token)

    def _last_turn(self, messages: list[Message]) -> tuple[Ids, Ids]:
        before = self.plain(self.chat_text(messages[:-1], to_answer=True))
        after = self.plain(self.chat_text(messages, to_answer=False))
        if after[: len(before)] != before or len(after) == len(before):
            raise _ambiguous(len(messages) - 1)
        return before, after[len(before) :]


def _to_end(turn: Ids, end_token: int | None) -> Ids:
    return turn[: turn.index(end_token) + 1] if end_token in turn else turn


def _ambiguous(index: int) -> RowFault:
    return RowFault(f'field "messages[{index}]": the chat template does not write the messages before it in the same '
                    "way with and without it; its tokens cannot be told from the prompt's")


def spelled(encoder: Encoder, prompt: str, response: str, ended: bool, limit: int | None) -> Ids:
    """The tokens of a prompt and a response as in training data, cut from the left to ``limit``; ModelError if none."""
    end = encoder.tokenizer.eos_token_id
    ids = (_tokens(encoder.first_ids, prompt) or encoder.head) + _tokens(encoder.following_ids, response)
    if ended and end is not None and ids[-1:] != (end,):
        ids += (end,)
    if not ids:
        raise ModelError("a prompt and a response without any token cannot be scored.")
    return ids if limit is None else last_tokens(ids, limit, encoder.tokenizer.bos_token_id)


def _tokens(encode: Callable[[str], Ids], text: str) -> Ids:
    """The tokens of a text, () where the tokenizer makes none of it: a policy may say nothing at all."""
    try:
        return encode(text)
    except RowFault:
        return ()
