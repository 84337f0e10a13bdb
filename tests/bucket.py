"""gs:// without a network: a folder that behaves as an object store does.

Files are objects: there are no folders but those that an object's name
implies, a rename is a copy, and no path of it can be opened by `open`.
"""

from collections.abc import Callable
import io
import pathlib
import shutil
from typing import Any

from etils.epath import backend
import fsspec

from jaxalign.core import checkpoints
from jaxalign.train import loop


class Bucket(fsspec.AbstractFileSystem):
  """Objects of gs://<bucket>/<name> as files <root>/<bucket>/<name>."""

  protocol = ("gs", "gcs")
  root_marker = ""
  cachable = False
  root = pathlib.Path()  # set by `mount`

  @classmethod
  def _strip_protocol(cls, path: Any) -> str:
    return str(path).removeprefix("gs://").removeprefix("gcs://").strip("/")

  def _at(self, path: str) -> pathlib.Path:
    return self.root / self._strip_protocol(path)

  def _entry(self, at: pathlib.Path) -> dict[str, Any]:
    name = at.relative_to(self.root).as_posix()
    if at.is_file():
      return dict(name=name, size=at.stat().st_size, type="file")
    if not any(p.is_file() for p in at.rglob("*")):
      raise FileNotFoundError(f"gs://{name}")
    return dict(name=name, size=0, type="directory")

  def info(self, path, **_):
    return self._entry(self._at(path))

  def ls(self, path, detail=True, **_):
    at = self._at(path)
    found = [self._entry(at)]
    if found[0]["type"] == "directory":
      found = []
      for child in sorted(at.iterdir()):
        try:
          found.append(self._entry(child))
        except FileNotFoundError:  # an empty folder is none
          pass
    return found if detail else [x["name"] for x in found]

  def _open(self, path, mode="rb", **_):
    at = self._at(path)
    if "r" in mode:
      return io.BytesIO(at.read_bytes())
    at.parent.mkdir(parents=True, exist_ok=True)
    return at.open(mode)

  def rm_file(self, path):
    if not self._at(path).is_dir():  # a folder is no object
      self._at(path).unlink()

  def cp_file(self, path1, path2, **_):
    if self._at(path1).is_file():
      self._at(path2).parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(self._at(path1), self._at(path2))

  def mkdir(self, path, create_parents=True, **_):
    pass

  def makedirs(self, path, exist_ok=False):
    pass

  def rmdir(self, path):
    raise FileNotFoundError(path)


def mount(root: Any, replace: Callable[..., None] = setattr) -> None:
  """Serves gs:// from a folder, in this process.

  Orbax's arrays alone are read and written in a local copy, since its
  tensorstore has a driver for gs:// that speaks to the network and cannot be
  turned aside; what it has written is copied into the bucket, with our digests.

  Args:
    root: the folder, one folder a bucket in it.
    replace: how an attribute is set; a monkeypatch's undoes it.
  """
  replace(Bucket, "root", pathlib.Path(root))
  for name in Bucket.protocol:
    fsspec.register_implementation(name, Bucket, clobber=True)
  backend.fsspec_backend._get_filesystem.cache_clear()
  Bucket.clear_instance_cache()
  for module in (checkpoints, loop):
    replace(module, "Checkpoints", Mirrored)


class Mirrored(checkpoints.Checkpoints):
  """Checkpoints of a bucket's folder, through a local copy of it."""

  def __init__(self, remote: Any, *args: Any):
    name = str(remote).removeprefix("gs://")
    assert str(remote) == f"gs://{name}", remote
    self.remote = Bucket.root / name
    local = Bucket.root.parent / "arrays" / name
    shutil.rmtree(local, ignore_errors=True)
    if self.remote.exists():
      shutil.copytree(self.remote, local)
    super().__init__(local, *args)

  def _upload(self):
    shutil.rmtree(self.remote, ignore_errors=True)
    shutil.copytree(self.folder, self.remote)

  def save(self, *args):
    super().save(*args)
    self._upload()

  def latest(self):
    found = super().latest()
    self._upload()
    return found
