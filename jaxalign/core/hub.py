"""Folders of the Hugging Face Hub: `hf:<repo>[@revision]` made local."""

import functools
import os
import re
from typing import Any

from etils import epath

from jaxalign.core.errors import ConfigError

# What is fetched; a pickle or a script matches none of these.
SETTINGS = ("*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt")
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
_KNOB = "set config.model.checkpoint"


def resolve(path: Any) -> epath.Path:
  """The folder itself, or a Hub repository with its weights, downloaded.

  The token is the environment variable HF_TOKEN; it is only sent, not stored.

  Raises:
    ConfigError: a repository that cannot be had.
  """
  return _resolve(os.fspath(path), SETTINGS + WEIGHTS)


def resolve_settings(path: Any) -> epath.Path:
  """`resolve` without the weights: configs and tokenizer alone."""
  return _resolve(os.fspath(path), SETTINGS)


@functools.lru_cache
def _resolve(name: str, patterns: tuple[str, ...]) -> epath.Path:
  """The local snapshot of `hf:<repo>[@revision]`, fetched once a process."""
  if not name.startswith("hf:") or name.startswith("hf://"):
    return epath.Path(name)
  rule = r"hf:([\w.-]+(?:/[\w.-]+)?)(?:@([\w.][\w./-]*))?"
  match = re.fullmatch(rule, name, re.ASCII)
  if not match or ".." in name:
    raise ConfigError(
      f"{name!r:.200} names no repository, wanted "
      f"hf:<owner>/<name>[@revision]; {_KNOB}"
    )
  import huggingface_hub  # slow, and needed by few runs

  repo, revision = match.groups()
  token = os.environ.get("HF_TOKEN") or False
  fetch = functools.partial(
    huggingface_hub.snapshot_download, repo, token=token
  )
  want = dict(allow_patterns=list(patterns), ignore_patterns=["*/*"])
  try:
    folder = epath.Path(fetch(revision=revision, **want))
    if (folder / "modules.json").exists():  # sentence-transformers' pooling
      pooling = ["*_Pooling/config.json"]
      fetch(revision=folder.name, allow_patterns=pooling)
    return folder
  except Exception as error:  # the HTTP client's kinds, full disks, bad names
    raise ConfigError(f"{name}{_why(error, revision)}") from error


def _why(error: Exception, revision: str | None) -> str:
  """Why a repository cannot be had, and what helps."""
  from huggingface_hub import constants, errors

  token = "the environment variable HF_TOKEN to a token that may read it"
  if isinstance(error, errors.GatedRepoError):
    return f" is gated: accept its terms on the Hub, and set {token}"
  if isinstance(error, errors.RepositoryNotFoundError):
    return f" is not on the Hub, or is private: {_KNOB}, or {token}"
  if isinstance(error, errors.RevisionNotFoundError):
    return f": the repository has no revision {revision!r}; {_KNOB}"
  if isinstance(error, errors.LocalEntryNotFoundError):
    why = "the Hub cannot be reached"
    if constants.HF_HUB_OFFLINE:
      why = "HF_HUB_OFFLINE is set"
    return f" is not whole in the local cache, and {why}; {_KNOB} to a folder"
  first = f"{type(error).__name__}: {str(error).splitlines()[:1]!s:.200}"
  return f" cannot be fetched ({first}); {_KNOB} to a folder"
