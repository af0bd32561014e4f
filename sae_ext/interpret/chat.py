"""One client for any server that speaks the OpenAI chat API.

What can pass (time-outs, 408, 429, 5xx, broken replies) is tried again with growing, jittered
waits; what cannot (a wrong key, model or address) ends the run with one line that says so. A call
that is still unanswered after the last try is one failure of one feature, nothing more.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from sae_ext.errors import UserError
from sae_ext.interpret.cache import ReplyCache, request_key
from sae_ext.interpret.prompts import TEMPLATE_VERSION, Messages

KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable with the key, for servers that want one; it is never stored."""

_PASSING = frozenset({408, 409, 425, 429})
_PROBES = 3


@dataclass(frozen=True)
class Patience:
    """How long to wait for what, in seconds."""

    tries: int = 6
    """Requests per call at most."""
    connect: float = 10.0
    """Making a connection."""
    reply: float = 120.0
    """One request."""
    call: float = 600.0
    """All requests of one call, waits included."""
    first_wait: float = 1.0
    """Upper bound of the first wait; it doubles with every try, and the wait is a random share."""
    longest_wait: float = 60.0
    """No wait is longer, whatever the server asks for."""


@dataclass(frozen=True)
class Reply:
    """What the model said. `key` is the hash of the request, under which the raw body is cached."""

    key: str
    content: str | None
    finish_reason: str | None
    refused: bool
    prompt_tokens: int | None
    completion_tokens: int | None


class ChatFailed(Exception):
    """No usable reply within the tries and the time of one call."""


class _Passing(Exception):
    """A failure worth another try; `wait` is what the server asked for."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class _Unreachable(_Passing):
    """Nothing listens at the address."""


class ChatClient:
    """Asks one model on one server; may be used from many threads.

    Args:
        base_url: address up to and including the version, such as http://127.0.0.1:8000/v1.
        model: the name the server knows the model by.
        cache: database file of replies; without one every call is made.
        patience: time-outs and tries.
        seed: sent with every request, for servers that sample.

    Raises:
        UserError: the address is not an http(s) URL, or the cache cannot be opened.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        cache: Path | None = None,
        patience: Patience | None = None,
        seed: int = 0,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise UserError(
                f"base_url {base_url!r} is not an http address: write it like http://HOST:PORT/v1"
            )
        self.base_url, self.model = base_url.rstrip("/"), model
        self._patience, self._seed = patience or Patience(), seed
        self._cache = ReplyCache(cache) if cache is not None else None
        key = os.environ.get(KEY_VARIABLE)
        self._http = httpx.Client(headers={"Authorization": f"Bearer {key}"} if key else {})
        self._lock = threading.Lock()
        self.requests = 0
        """HTTP requests sent so far, tries included."""

    def __enter__(self) -> ChatClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close connections and cache."""
        self._http.close()
        if self._cache is not None:
            self._cache.close()

    def probe(self) -> None:
        """Make sure that the server answers for this model, by one short uncached question.

        A server's list of models is not trusted either way: some list what they cannot load, some
        load what they do not list.

        Raises:
            UserError: no server, a wrong model or key, or no answer.
        """
        request = self._request([{"role": "user", "content": "Reply with the word: yes"}], 8)
        try:
            self._send_patiently(request, insist=False)
        except ChatFailed as error:
            raise UserError(
                f"base_url {self.base_url}: the server gives no answer for model {self.model!r} "
                f"({error}): check the server's log, or choose another base_url or model"
            ) from error

    def ask(self, messages: Messages, *, max_tokens: int) -> Reply:
        """The model's reply, from the cache when the same was asked before.

        Args:
            messages: the conversation, as the chat API spells it.
            max_tokens: longest reply.

        Raises:
            ChatFailed: no reply within the tries and the time allowed.
            UserError: the server is gone, or refuses address, key, model or request for good.
        """
        request = self._request(messages, max_tokens)
        identity = {"endpoint": self.base_url, "template": TEMPLATE_VERSION, **request}
        key = request_key(identity)
        body = self._cache.get(key) if self._cache is not None else None
        if body is None:
            began = time.monotonic()
            body = self._send_patiently(request)
            if self._cache is not None:
                body = self._cache.put(identity, body, time.monotonic() - began)
        return _read(key, json.loads(body))

    def _request(self, messages: Messages, max_tokens: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "seed": self._seed,
            "stream": False,
        }

    def _send_patiently(self, request: Mapping[str, Any], *, insist: bool = True) -> str:
        """Send until answered; `insist` waits out a server that restarts, a probe need not."""
        patience = self._patience
        tries = patience.tries if insist else min(patience.tries, _PROBES)
        deadline = time.monotonic() + patience.call
        for number in range(tries):
            try:
                return self._send(request, min(deadline, time.monotonic() + patience.reply))
            except _Passing as error:
                failure = error
            if isinstance(failure, _Unreachable) and not insist:
                break
            # The jitter keeps many clients from coming back at the same moment; it decides nothing.
            wait = random.uniform(0, patience.first_wait * 2**number)
            wait = min(max(wait, failure.wait or 0.0), patience.longest_wait)
            if number + 1 == tries or time.monotonic() + wait >= deadline:
                break
            time.sleep(wait)
        if isinstance(failure, _Unreachable):
            raise UserError(
                f"base_url {self.base_url}: no server answers there ({failure}): start it or "
                "correct base_url, then run the same command again; answers given so far are kept"
            ) from failure
        raise ChatFailed(str(failure)) from failure

    def _send(self, request: Mapping[str, Any], deadline: float) -> str:
        """One request. The deadline holds for the whole body: a server may drip it."""
        with self._lock:
            self.requests += 1
        limit = max(0.001, deadline - time.monotonic())
        chunks = []
        try:
            url = f"{self.base_url}/chat/completions"
            timeout = httpx.Timeout(limit, connect=min(limit, self._patience.connect))
            with self._http.stream("POST", url, json=request, timeout=timeout) as response:
                for chunk in response.iter_bytes():
                    chunks.append(chunk)
                    if time.monotonic() > deadline:
                        raise _Passing("timed out")
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _Unreachable(str(error) or "timed out") from error
        except httpx.TimeoutException as error:
            raise _Passing("timed out") from error
        except httpx.HTTPError as error:
            raise _Passing(f"connection broke: {error}") from error
        except httpx.InvalidURL as error:
            raise UserError(f"base_url {self.base_url!r} is not an address: {error}") from error
        body = b"".join(chunks).decode("utf-8", "replace")
        if response.status_code != 200:
            raise self._rejection(response, body)
        if not _is_completion(body):
            raise _Passing("the reply is not a chat completion")
        return body

    def _rejection(self, response: httpx.Response, body: str) -> Exception:
        status, said = response.status_code, _message(body)
        if (status in _PASSING or status >= 500) and "insufficient_quota" not in body:
            return _Passing(f"HTTP {status}: {said}", _retry_after(response))
        remedy = {
            401: f"set {KEY_VARIABLE} to a valid key",
            403: f"use a key in {KEY_VARIABLE} that may use this model",
            404: "check base_url (most end in /v1) and model",
            429: "raise the quota of the account",
        }.get(status, "check model, and that the server takes OpenAI chat requests")
        return UserError(
            f"base_url {self.base_url}, model {self.model!r}: HTTP {status} ({said}): {remedy}"
        )


def _read(key: str, body: Mapping[str, Any]) -> Reply:
    choice = body["choices"][0]
    message = choice.get("message") or {}
    content = message.get("content")
    usage = body.get("usage") or {}
    return Reply(
        key=key,
        content=content if isinstance(content, str) else None,
        finish_reason=choice.get("finish_reason"),
        refused=bool(message.get("refusal")),
        prompt_tokens=usage.get("prompt_tokens"),
        completion_tokens=usage.get("completion_tokens"),
    )


def _is_completion(body: str) -> bool:
    try:
        choices = json.loads(body)["choices"]
        return isinstance(choices[0], dict)
    except (ValueError, KeyError, IndexError, TypeError):
        return False


def _message(body: str) -> str:
    """The server's own words in one short line."""
    try:
        found = json.loads(body)
        error = found.get("error", found.get("detail", found))
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = body
    return " ".join(str(text).split())[:200] or "no message"


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds the server asks to wait, given as a number or as a date."""
    value = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
