"""Saves in the background: what is sealed is what was there at the call."""

import errno
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core import checkpoints, disk, sharding
from jaxalign.core.errors import WriteError

SIZES = dict(w=(64, 32), b=(32,))


def state(mesh, value):
  rng = np.random.default_rng(value)
  draw = lambda shape: np.float32(rng.normal(size=shape))
  return {n: sharding.put(mesh, draw(s)) for n, s in SIZES.items()}


def same(found, wanted):
  for n in SIZES:
    np.testing.assert_array_equal(found[n], wanted[n])


@pytest.mark.parametrize("background", [False, True])
def test_what_is_donated_at_once_was_saved_as_it_was(
  mesh, tmp_path, background
):
  wanted = {k: jax.device_get(state(mesh, k)) for k in (1, 2, 3)}
  sevens = lambda x: jax.tree.map(lambda v: v * 0 - 7.0, x)
  spoil = jax.jit(sevens, donate_argnums=0)
  with checkpoints.Checkpoints(tmp_path, 2, background) as found:
    for k in wanted:
      params = state(mesh, k)
      found.save(k, dict(params=params))
      for _ in range(3):  # the loop goes on, in the same buffers
        params = spoil(params)
      jax.block_until_ready(params)
    assert found.latest() == 3
    assert sorted(found.manager.all_steps()) == [2, 3]
    for k in (2, 3):
      assert found.verified(k)
      same(found.restore(k, dict(params=state(mesh, 0)))["params"], wanted[k])
  names = sorted(p.name for p in tmp_path.glob("*.json"))
  assert names == ["2.digests.json", "3.digests.json"]
  same(checkpoints.restore_params(tmp_path, state(mesh, 0)), wanted[3])


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_are_kept(mesh, tmp_path, keep):
  with checkpoints.Checkpoints(tmp_path, keep, True) as found:
    for k in range(5):
      found.save(k, dict(params=state(mesh, k)))
    found.finish()
    assert sorted(found.manager.all_steps()) == list(range(5))[-keep:]
    assert len(list(tmp_path.glob("*.digests.json"))) == keep


def test_training_goes_on_while_a_step_is_written(mesh, tmp_path, monkeypatch):
  gate, real = threading.Event(), disk.digest_tree

  def slowly(folder):
    assert gate.wait(30)
    return real(folder)

  monkeypatch.setattr(disk, "digest_tree", slowly)
  with checkpoints.Checkpoints(tmp_path, 2, True) as found:
    found.save(1, dict(params=state(mesh, 1)))  # returns with the gate shut
    assert not (tmp_path / "1.digests.json").exists()
    assert not found.verified(1)
    gate.set()
    found.finish()
    assert found.verified(1)


def test_what_was_never_sealed_is_not_used(mesh, tmp_path, monkeypatch, capsys):
  """A process that ends between the arrays and their digests."""
  with checkpoints.Checkpoints(tmp_path, 2, True) as found:
    found.save(1, dict(params=state(mesh, 1)))
    found.finish()
    unsealed = lambda self, step: self.manager.wait_until_finished()
    monkeypatch.setattr(checkpoints.Checkpoints, "_seal", unsealed)
    found.save(2, dict(params=state(mesh, 2)))
  with checkpoints.Checkpoints(tmp_path, 2, True) as found:
    assert sorted(found.manager.all_steps()) == [1, 2]
    assert found.latest() == 1
    assert sorted(found.manager.all_steps()) == [1]
  assert "checkpoint 2 in" in capsys.readouterr().out


@pytest.mark.parametrize("ends_with", ["next", "leaving"])
def test_a_full_disk_in_the_background_is_raised(
  mesh, tmp_path, monkeypatch, ends_with
):
  def full(folder):
    raise OSError(errno.ENOSPC, "No space left on device")

  with pytest.raises(WriteError, match="cannot save step 1 to .*No space"):
    with checkpoints.Checkpoints(tmp_path, 2, True) as found:
      with monkeypatch.context() as patch:
        patch.setattr(disk, "digest_tree", full)
        found.save(1, dict(params=state(mesh, 1)))
        found._sealing.join()
      if ends_with == "next":
        found.save(2, dict(params=state(mesh, 2)))
        pytest.fail("the error was lost")


def test_trees_are_restored_apart(mesh, tmp_path):
  one, two = state(mesh, 1), state(mesh, 2)
  with checkpoints.Checkpoints(tmp_path) as found:
    found.save(4, dict(params=one, ema=two, rest=[jnp.zeros(())]))
  same(checkpoints.restore_params(tmp_path, one, "ema"), jax.device_get(two))
  same(checkpoints.restore_params(tmp_path, one), jax.device_get(one))
