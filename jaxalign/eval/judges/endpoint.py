"""A judge behind any OpenAI-compatible endpoint: every pair in both orders.

The key is read from the environment at the moment of use. It is in no config,
file, message or log: whatever a server says is searched for it first.
"""

from collections.abc import Sequence
import concurrent.futures
import hashlib
import json
import os
import socket
import threading
from typing import Any, NamedTuple
import urllib.parse
import urllib.request

import numpy as np

from jaxalign import progress
from jaxalign.errors import ConfigError, RestartError
from jaxalign.eval import agreement, winrate
from jaxalign.eval.judges import limits, prompt
from jaxalign.eval.judges.cache import Verdicts
from jaxalign.eval.judges.prompt import Pair

_KEPT = 4000  # characters of a reply in the cache, its end


class Endpoint(NamedTuple):
  """Which judge, and how hard it may be asked."""

  model: str
  url: str = "https://api.openai.com/v1"
  key_env: str = "OPENAI_API_KEY"  # where the key is; "": the server wants none
  temperature: float = 0.0
  max_tokens: int = 512  # of one reply
  timeout_s: float = 60.0
  retries: int = 6  # after the first attempt
  backoff_s: float = 1.0  # before the first retry; doubles
  per_minute: float = 120.0  # requests
  workers: int = 4  # requests at a time
  max_requests: int = 2_000  # in all, restarts counted
  max_total_tokens: int = 2_000_000  # in all, prompts and replies


class _Broken(Exception):
  """A reply that is no chat completion."""


def _key(e: Endpoint) -> str:
  return os.environ.get(e.key_env, "") if e.key_env else ""


def check_settings(e: Endpoint) -> None:
  """Refuses settings that can never work, whatever the environment holds.

  Raises:
    ConfigError: no client library, no model, a url or limit that cannot be.
  """
  if not e.model:
    raise ConfigError(
      "no model is named that is to judge; set config.judge.model"
    )
  try:
    import openai  # noqa: F401, the extra
  except ImportError as error:
    raise ConfigError(
      "an endpoint judge needs the openai client; install jaxalign[judge]"
    ) from error
  parts = urllib.parse.urlsplit(e.url)
  if parts.scheme not in ("http", "https") or not parts.hostname:
    raise ConfigError(
      "the judge's url is no http(s) address; set its url, as "
      "https://api.openai.com/v1"
    )
  if parts.username or parts.password or parts.query:
    raise ConfigError(
      "the judge's url holds a user, password or query, which "
      f"would be written down; put the key into {e.key_env}"
    )
  here = parts.hostname in ("localhost", "127.0.0.1", "::1")
  if e.key_env and parts.scheme == "http" and not here:
    raise ConfigError(
      f"the judge's url {e.url} would carry the key in the "
      'clear; use https, or key_env="" for a server that '
      "wants none"
    )
  for name in (
    "max_tokens",
    "timeout_s",
    "per_minute",
    "workers",
    "max_requests",
    "max_total_tokens",
  ):
    if not getattr(e, name) > 0:
      raise ConfigError(f"judge.{name} is {getattr(e, name)}, wanted above 0")
  if e.retries < 0 or e.backoff_s < 0:
    raise ConfigError(
      f"judge.retries {e.retries} and judge.backoff_s "
      f"{e.backoff_s}, wanted at least 0"
    )


def check(e: Endpoint) -> None:
  """Refuses settings that cannot work now, before anything is sent.

  Raises:
    ConfigError: as `check_settings`, or no key in the environment.
  """
  check_settings(e)
  if e.key_env and not _key(e):
    raise ConfigError(
      f"the judge needs a key in the environment variable "
      f"{e.key_env}, found none; set it, or key_env"
    )


def check_reachable(e: Endpoint, timeout_s: float = 5.0) -> None:
  """Opens a connection and closes it: nothing is asked, nothing is paid.

  Behind a proxy, which alone knows what it reaches, nothing is tried.

  Raises:
    ConfigError: nobody listens there.
  """
  parts = urllib.parse.urlsplit(e.url)
  if parts.scheme in urllib.request.getproxies() and not (
    urllib.request.proxy_bypass(parts.hostname)
  ):
    return
  port = parts.port or (443 if parts.scheme == "https" else 80)
  try:
    socket.create_connection((parts.hostname, port), timeout_s).close()
  except OSError as error:
    raise ConfigError(
      f"the judge's url {e.url} cannot be reached ({error}); "
      "start its server, or set config.judge.endpoint"
    ) from error


def digest(e: Endpoint, pair: Pair) -> str:
  """What a verdict depends on, hashed: judge, wording, question, answers."""
  what = [prompt.VERSION, e.url, e.model, e.temperature, e.max_tokens, *pair]
  return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _without(key: str, text: Any) -> str:
  text = str(text)
  return text.replace(key, "[key]") if key else text


def _send(
  client: Any, e: Endpoint, messages: list[dict[str, str]]
) -> tuple[str | None, str | None, int | None]:
  """The reply, why it ended, and the tokens billed (None: not said)."""
  out = client.chat.completions.create(
    model=e.model,
    messages=messages,
    temperature=e.temperature,
    max_tokens=e.max_tokens,
  )
  choices = getattr(out, "choices", None)
  if not isinstance(choices, list) or not choices:
    raise _Broken("a reply without choices")
  text = getattr(getattr(choices[0], "message", None), "content", None)
  if text is not None and not isinstance(text, str):
    raise _Broken("a reply whose content is no text")
  used = getattr(getattr(out, "usage", None), "total_tokens", None)
  used = used if isinstance(used, int) and used > 0 else None
  return text, getattr(choices[0], "finish_reason", None), used


def _ask(
  client: Any,
  e: Endpoint,
  pair: Pair,
  kept: Verdicts,
  budget: limits.Budget,
  stop: threading.Event,
) -> None:
  """Asks until there is a verdict, and keeps it; or until `stop` is set.

  Raises:
    ConfigError: a refusal that asking again does not change, or a cap.
    RestartError: still failing after all retries.
  """
  import openai

  key = _key(e)
  for attempt in range(e.retries + 1):
    if stop.is_set():
      return
    messages = prompt.messages(pair)
    # No tokenizer makes more tokens than bytes, and a few for each message.
    most = (
      e.max_tokens
      + 32
      + sum(len(m["content"].encode("utf-8", "replace")) for m in messages)
    )
    budget.take(most)
    cost, asked = 0, None
    try:
      text, ended, used = _send(client, e, messages)
      cost = most if used is None else used
      budget.give_back(most - cost)
      said = prompt.parse(text) if ended != "content_filter" else None
      kept.add(
        key=digest(e, pair),
        said=said,
        requests=1,
        tokens=cost,
        model=e.model,
        ended=ended if isinstance(ended, str) else None,
        reply=_without(key, text or "")[-_KEPT:],
      )
      return
    except openai.APIStatusError as error:
      status, code = error.status_code, getattr(error, "code", None)
      why = f"{status} {_without(key, error.message)[:200]}"
      if status == 400 and code == "context_length_exceeded":
        budget.give_back(most)
        kept.add(
          key=digest(e, pair),
          said=None,
          requests=1,
          tokens=0,
          model=e.model,
          ended=code,
          reply="",
        )
        return
      final = code == "insufficient_quota" or not (
        status in (408, 409, 429) or status >= 500
      )
      asked = error.response.headers.get("retry-after")
    except openai.APITimeoutError:
      # It may have been answered, and billed, after we left.
      why, final, cost = f"no reply in {e.timeout_s:g} s", False, most
    except openai.APIConnectionError as error:
      why, final = _without(key, error.__cause__ or error)[:200], False
    except (_Broken, openai.APIError, ValueError) as error:
      why, final = f"broken reply: {_without(key, error)[:200]}", False
      cost = most  # answered, so perhaps billed
    budget.give_back(most - cost)
    kept.add(requests=1, tokens=cost, failed=why)
    if final:
      raise ConfigError(
        f"the judge {e.model} at {e.url} refuses: {why}; check "
        f"its model, its url and the key in {e.key_env}"
      )
    if attempt < e.retries:
      stop.wait(limits.pause(attempt, e.backoff_s, asked))
  raise RestartError(
    f"the judge {e.model} at {e.url} still fails after "
    f"{e.retries + 1} attempts ({why}); the verdicts so far "
    "are kept: start the same command again"
  )


def judge(
  e: Endpoint, pairs: Sequence[Pair], path: Any
) -> tuple[list[str | None], dict[str, Any]]:
  """One verdict for each pair, in the order given; asks only for new ones.

  Args:
    e: the judge.
    pairs: what to compare.
    path: the file of verdicts, made if missing.

  Returns:
    "first", "second", "tie" or None (could not be read) for each pair, and
    {"verdicts", "asked", "unparsable", "requests", "tokens"}, the last two of
    all runs on this file.

  Raises:
    ConfigError, RestartError: as `check` and the endpoint have it; every
      verdict got before is kept.
  """
  check_settings(e)
  import openai

  kept = Verdicts(path)
  keys = [digest(e, pair) for pair in pairs]
  new = {k: p for k, p in zip(keys, pairs) if k not in kept.said}
  if new:
    check(e)
  budget = limits.Budget(
    max_requests=e.max_requests,
    max_total_tokens=e.max_total_tokens,
    per_minute=e.per_minute,
    requests=kept.requests,
    tokens=kept.tokens,
  )
  if new:
    stop, failed = threading.Event(), []

    def ask(pair: Pair) -> None:
      try:
        _ask(client, e, pair, kept, budget, stop)
      except BaseException as error:
        # One refusal stops the others; those under way are let finish, they
        # are paid for.
        failed.append(error)
        stop.set()

    with (
      openai.OpenAI(
        api_key=_key(e) or "none",
        base_url=e.url,
        timeout=e.timeout_s,
        max_retries=0,
      ) as client,
      progress.bar(f"judge {e.model}", len(new), "pairs") as tick,
      concurrent.futures.ThreadPoolExecutor(e.workers) as pool,
    ):
      try:
        for done in concurrent.futures.as_completed(
          [pool.submit(ask, pair) for pair in new.values()]
        ):
          done.result()
          tick()
      finally:
        stop.set()  # an interrupt, too, waits for no retry
    if failed:
      raise failed[0]
  said = [kept.said[k] for k in keys]
  return said, dict(
    verdicts=len(said),
    asked=len(new),
    unparsable=sum(s is None for s in said),
    requests=kept.requests,
    tokens=kept.tokens,
  )


def both_orders(
  e: Endpoint, pairs: Sequence[Pair], path: Any
) -> dict[str, Any]:
  """Outcomes of the first answers, each pair shown in both orders.

  Returns:
    As `winrate.both_orders` ("won" [n] for the answer given first, "rate",
    "bias", "consistent", "unparsable"), with "said", the verdicts in the two
    orders, "replies", the start of what was written in each, and "cost" as
    from `judge`.
  """
  turned = [Pair(p.question, p.second, p.first) for p in pairs]
  said, cost = judge(e, [*pairs, *turned], path)
  kept = Verdicts(path)
  won = {"first": 1.0, "tie": 0.5, "second": 0.0, None: np.nan}
  n = len(pairs)
  as_is = np.array([won[s] for s in said[:n]])
  after = 1 - np.array([won[s] for s in said[n:]])
  return winrate.both_orders(as_is, after) | dict(
    said=list(zip(said[:n], said[n:])),
    cost=cost,
    replies=[
      (kept.replies[digest(e, a)], kept.replies[digest(e, b)])
      for a, b in zip(pairs, turned)
    ],
  )


def as_verdicts(
  out: dict[str, Any], items: Sequence[Any], ours: str, theirs: str, rater: str
) -> list[agreement.Verdict]:
  """The verdicts of `both_orders` as rows of a table of agreement."""
  rows = []
  for item, (as_is, turned) in zip(items, out["said"], strict=True):
    rows += [
      agreement.Verdict(item, ours, theirs, rater, as_is),
      agreement.Verdict(item, theirs, ours, rater, turned),
    ]
  return rows
