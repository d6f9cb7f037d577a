"""One question to an OpenAI-compatible server: a judge, or a model that is measured.

No redirect is followed: the key would go along. Nothing that the server says is shown with the key in it.
"""

import contextlib
import http.client
import ipaddress
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from kltune.errors import KltuneError
from kltune.recipe.faults import printable

LONGEST_ANSWER = 1 << 20  # bytes
PASSING = {408, 409, 425, 429}  # statuses that another try may not meet, as all from 500 on


class Unanswered(Exception):
    """A question that may be asked again: why, and after how many seconds at the earliest if the endpoint said so."""

    def __init__(self, reason: str, after: float = 0.0):
        super().__init__(reason)
        self.after = after


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class _Hurried:
    """A connection whose timeout is for the whole head of an answer, not from one byte to the next."""

    def getresponse(self) -> http.client.HTTPResponse:
        late = threading.Event()
        timer = threading.Timer(self.timeout, self._give_up, (late,))
        timer.daemon = True
        timer.start()
        try:
            response = super().getresponse()
        except (OSError, http.client.HTTPException):
            if late.is_set():
                raise TimeoutError from None
            raise
        finally:
            timer.cancel()
        if late.is_set():       # a head that was cut short reads as one that ended
            raise TimeoutError
        return response

    def _give_up(self, late: threading.Event) -> None:
        late.set()
        with contextlib.suppress(OSError, AttributeError):      # it has just been closed
            self.sock.shutdown(socket.SHUT_RDWR)


class _Plain(_Hurried, http.client.HTTPConnection):
    pass


class _Encrypted(_Hurried, http.client.HTTPSConnection):
    pass


class _PlainHandler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Plain, request)


class _EncryptedHandler(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Encrypted, request)


@dataclass(frozen=True)
class Address:
    """Who is asked. key_env: names the environment variable that holds the key; None: there is none.

    who: in messages. error: what is raised where asking again would not help. longest: bytes that an answer may have.
    busy: what else is under way, for the message that there was no answer in time.
    """

    url: str
    who: str
    error: type[KltuneError]
    key_env: str | None = None
    timeout_s: float = 60.0
    longest: int = LONGEST_ANSWER
    busy: str = ""


class Client:
    """Asks one question at a time. Threads may share one."""

    def __init__(self, address: Address):
        """Look the key up; nothing is sent yet.

        Raises:
            address.error: the environment variable is not set, or holds what no header may hold.
        """
        self.address = address
        self._key = None if address.key_env is None else _key_from(address)
        # A proxy would look for itself at a loopback address.
        direct = [urllib.request.ProxyHandler({})] if is_loopback(address.url) else []
        self._opener = urllib.request.build_opener(_NoRedirect(), _PlainHandler(), _EncryptedHandler(), *direct)

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        """What is answered to a question at ``url`` + path; b"" where that is longer than it may be.

        Raises:
            Unanswered: no answer, or one that says to come again.
            address.error: the server refuses the question, and would refuse it again.
        """
        address = self.address
        deadline = time.monotonic() + address.timeout_s
        try:
            with self._opener.open(self._request(path, body), timeout=address.timeout_s) as response:
                return _read(response, deadline, address.longest)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error, deadline) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, TimeoutError):
                raise Unanswered(f"no answer within {address.timeout_s:g} s{address.busy}") from None
            raise Unanswered(self.shown(getattr(reason, "strerror", None) or str(reason) or repr(reason))) from None

    def _request(self, path: str, body: dict[str, Any]) -> urllib.request.Request:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "kltune"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        # JSON in ASCII: a lone surrogate in a response has no UTF-8 form.
        address, data = self.address.url.rstrip("/") + path, json.dumps(body).encode("ascii")
        return urllib.request.Request(address, data, headers, method="POST")

    def _refusal(self, error: urllib.error.HTTPError, deadline: float) -> Exception:
        try:
            said = self.shown(_read(error.fp, deadline, LONGEST_ANSWER).decode("utf-8", "replace"))
        except (OSError, http.client.HTTPException):
            said = ""
        if error.code in PASSING or error.code >= 500:
            # For some servers 500 is also a model that is not there, or one without a chat template.
            why = "; its own log may say why" if error.code == 500 else ""
            reason = f"HTTP {error.code}{why}" + (f" ({said})" if said else "")
            return Unanswered(reason, _seconds(error.headers.get("Retry-After", "")))
        advice = {
            401: "; is the key right that key_env names?", 403: "; is the key right that key_env names?",
            404: "; are url and model right?",
        }.get(error.code, ".")
        return self.address.error(
            f"{self.address.who}: {self.address.url} refuses with HTTP {error.code}{advice} "
            f"It says: {said or 'nothing'}"
        )

    def shown(self, text: str) -> str:
        """What a stranger says, in one line that cannot steer a terminal."""
        text = text if self._key is None else text.replace(self._key, "[redacted]")
        return printable(" ".join(text.split())[:200])


def _key_from(address: Address) -> str:
    name = address.key_env
    key = os.environ.get(name, "")
    if not key:
        raise address.error(f"{address.who}: the environment variable {name}, key_env, is not set.")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise address.error(f"{address.who}: the environment variable {name}, key_env, holds a space or a character "
                            "that no key may have.")
    return key


def is_loopback(url: str) -> bool:
    """Whether an address leads to this machine alone."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read(response: http.client.HTTPResponse, deadline: float, longest: int) -> bytes:
    """The whole body; the socket's own timeout counts from one byte to the next, which is no limit."""
    parts, size = [], 0
    while part := response.read1(1 << 16):
        size += len(part)
        parts.append(part)
        if time.monotonic() > deadline:
            raise TimeoutError
        if size > longest:
            return b""
    return b"".join(parts)


def _seconds(text: str) -> float:
    """Retry-After in seconds; its other form, a date, is left to the waiting times of our own."""
    return float(text) if text.isascii() and text.isdecimal() and len(text) < 9 else 0.0
