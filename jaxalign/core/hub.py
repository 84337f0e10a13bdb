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


def _resolve(path: str, patterns: tuple[str, ...]) -> epath.Path:
  return (
    _download(path, patterns)
    if path.startswith("hf:") and not path.startswith("hf://")
    else epath.Path(path)
  )


@functools.lru_cache
def _download(name: str, patterns: tuple[str, ...]) -> epath.Path:
  """The local snapshot of `hf:<repo>[@revision]`, one answer per process."""
  found = re.fullmatch(
    r"hf:([\w.-]+(?:/[\w.-]+)?)(?:@([\w.][\w./-]*))?", name, re.ASCII
  )
  if not found or ".." in name:
    raise ConfigError(
      f"{name!r:.200} names no repository, wanted "
      f"hf:<owner>/<name>[@revision]; {_KNOB}"
    )
  import huggingface_hub  # slow, and needed by few runs
  from huggingface_hub import errors

  repo, revision = found.groups()
  try:
    token = os.environ.get("HF_TOKEN") or False
    folder = epath.Path(
      huggingface_hub.snapshot_download(
        repo,
        revision=revision,
        allow_patterns=list(patterns),
        ignore_patterns=["*/*"],
        token=token,
      )
    )
    if (folder / "modules.json").exists():  # sentence-transformers' pooling
      huggingface_hub.snapshot_download(
        repo,
        revision=folder.name,
        token=token,
        allow_patterns=["*_Pooling/config.json"],
      )
    return folder
  except errors.GatedRepoError as error:
    why = (
      "is gated: accept its terms on the Hub, and set the environment "
      "variable HF_TOKEN to a token that may read it"
    )
    raise ConfigError(f"{name} {why}") from error
  except errors.RepositoryNotFoundError as error:
    raise ConfigError(
      f"{name} is not on the Hub, or is private: {_KNOB}, or the environment "
      "variable HF_TOKEN to a token that may read it"
    ) from error
  except errors.RevisionNotFoundError as error:
    raise ConfigError(
      f"{name}: the repository has no revision {revision!r}; {_KNOB}"
    ) from error
  except errors.LocalEntryNotFoundError as error:
    why = (
      "HF_HUB_OFFLINE is set"
      if huggingface_hub.constants.HF_HUB_OFFLINE
      else "the Hub cannot be reached"
    )
    raise ConfigError(
      f"{name} is not whole in the local cache, and {why}; {_KNOB} to a folder"
    ) from error
  except Exception as error:  # the HTTP client's kinds, full disks, bad names
    raise ConfigError(
      f"{name} cannot be fetched ({type(error).__name__}: "
      f"{str(error).splitlines()[:1]!s:.200}); {_KNOB} to a "
      "folder"
    ) from error
