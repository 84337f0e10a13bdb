"""The decoder against transformers' Llama: logits, gradients, remat, sizes."""

import functools

import jax
import jax.numpy as jnp
from models import draw, make_mesh, put, sized
import numpy as np
import pytest

from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError
from jaxalign.model import decoder, logprob
from jaxalign.model.flops import decoder_flops

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


pytestmark = pytest.mark.usefixtures("quick_compiles")


# Grouped queries of 1, 2 and 4 heads a group, tied and not, odd widths.
SIZES = {
  "mha-tied": sized(
    2, 20, 4, 4, 6, 26, 38, 64, rope_theta=500.0, norm_eps=1e-3
  ),
  "gqa2-untied": sized(1, 28, 4, 2, 10, 18, 46, 64, tied=False, remat="dots"),
  "mqa4-odd": sized(2, 20, 4, 1, 4, 33, 37, 64, remat="full"),
}


def torch_names(m, params):
  """What transformers calls each weight, and its [out, in] matrix."""
  d = m.width
  out = {
    "model.embed_tokens.weight": params["embed"],
    "model.norm.weight": params["norm"],
  }
  if not m.tied:
    out["lm_head.weight"] = params["head"]
  for i in range(m.layers):
    w = {n.split("/")[1]: x[i] for n, x in params.items() if "/" in n}
    out |= {
      f"model.layers.{i}.{n}.weight": x
      for n, x in {
        "input_layernorm": w["attention_norm"],
        # Query head h = g * Q + q reads key head g.
        "self_attn.q_proj": np.moveaxis(w["wq"], 0, -1).reshape(-1, d),
        "self_attn.k_proj": np.moveaxis(w["wk"], 0, -1).reshape(-1, d),
        "self_attn.v_proj": np.moveaxis(w["wv"], 0, -1).reshape(-1, d),
        "self_attn.o_proj": np.moveaxis(w["wo"], -1, 0).reshape(d, -1),
        "post_attention_layernorm": w["ff_norm"],
        "mlp.gate_proj": w["w_gate"].T,
        "mlp.up_proj": w["w_up"].T,
        "mlp.down_proj": w["w_down"].T,
      }.items()
    }
  return out


@functools.lru_cache
def peer(name):
  """Logits, response log-prob and its gradients, by transformers."""
  m = SIZES[name]
  config = transformers.LlamaConfig(
    hidden_size=m.width,
    intermediate_size=m.ff,
    vocab_size=m.vocab,
    num_hidden_layers=m.layers,
    num_attention_heads=m.heads,
    num_key_value_heads=m.kv_heads,
    head_dim=m.head_size,
    rms_norm_eps=m.norm_eps,
    rope_theta=m.rope_theta,
    max_position_embeddings=m.context,
    tie_word_embeddings=m.tied,
    attn_implementation="eager",
  )
  assert config.rope_parameters["rope_theta"] == m.rope_theta
  model = transformers.LlamaForCausalLM(config)
  state = {
    n: torch.tensor(np.ascontiguousarray(w))
    for n, w in torch_names(m, draw(m)).items()
  }
  missing, surplus = model.load_state_dict(state, strict=False)
  assert not surplus and set(missing) <= {"lm_head.weight"}
  tokens, mask = batch_of(m)
  logits = model(torch.tensor(tokens, dtype=torch.long)).logits
  logps = torch.log_softmax(logits[:, :-1].double(), -1).gather(
    -1, torch.tensor(tokens[:, 1:, None], dtype=torch.long)
  )[..., 0]
  (logps * torch.tensor(mask[:, 1:])).sum().backward()
  grads = {n: p.grad.numpy() for n, p in model.named_parameters()}
  return logits.detach().numpy(), grads


def batch_of(m):
  rng = np.random.default_rng(3)
  tokens = rng.integers(0, m.vocab, (4, 24)).astype(np.int32)
  return tokens, (np.arange(24) >= 9)[None, :] & (tokens >= 0)


@functools.lru_cache
def grad_fn(m):
  """(params, tokens, mask) -> (sum of response log-probs, logits), gradient."""

  def total(params, tokens, mask):
    x = decoder.forward(params, tokens, m)
    head = decoder.head(params, m)
    logps = logprob.token_logps(x, head, tokens, chunk=7)
    return jnp.sum(logps * mask), decoder.logits(x, head)

  return jax.jit(jax.value_and_grad(total, has_aux=True))


@pytest.mark.parametrize("name", SIZES)
def test_transformers_agrees_on_logits_and_gradients(name, mesh):
  m = SIZES[name]
  if mesh.size > 1 and m.kv_heads == 1:
    pytest.skip("one key head does not divide over tensor=2")
  tokens, mask = batch_of(m)
  (_, logits), grads = grad_fn(m)(
    put(mesh, m, draw(m)),
    sharding.put(mesh, tokens, "batch"),
    sharding.put(mesh, mask, "batch"),
  )
  wanted, wanted_grads = peer(name)
  np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4)
  grads = torch_names(m, {n: np.asarray(g) for n, g in grads.items()})
  assert set(grads) == set(wanted_grads)
  for n, g in grads.items():
    scale = np.abs(wanted_grads[n]).max()
    np.testing.assert_allclose(
      g, wanted_grads[n], rtol=0, atol=1e-3 * min(scale, 1.0), err_msg=n
    )


def test_recomputation_changes_no_gradient():
  m = SIZES["gqa2-untied"]
  mesh = make_mesh(4, 2)
  with jax.set_mesh(mesh):
    tokens, mask = (sharding.put(mesh, x, "batch") for x in batch_of(m))
    params = put(mesh, m, draw(m))
    (value, _), plain = grad_fn(m._replace(remat="none"))(params, tokens, mask)
    for remat in ("dots", "full"):
      (again, _), grads = grad_fn(m._replace(remat=remat))(params, tokens, mask)
      np.testing.assert_allclose(value, again, rtol=1e-6)
      for n in plain:
        np.testing.assert_allclose(
          grads[n], plain[n], rtol=1e-5, atol=1e-5, err_msg=f"{remat} {n}"
        )


def test_remat_really_recomputes():
  """What the backward pass keeps shrinks: none > dots > full."""
  mesh = make_mesh()

  def kept(remat):
    m = SIZES["mha-tied"]._replace(layers=4, remat=remat)

    def pullback(params, tokens):
      return jax.vjp(lambda p: jnp.sum(decoder.forward(p, tokens, m)), params)[
        1
      ]

    shapes = jax.eval_shape(
      pullback,
      decoder.abstract(m, mesh),
      jax.ShapeDtypeStruct((4, 24), jnp.int32),
    )
    return sum(x.size for x in jax.tree.leaves(shapes))

  with jax.set_mesh(mesh):
    none, dots, full = map(kept, ("none", "dots", "full"))
  assert full < dots < none, (full, dots, none)


def test_init_is_the_table_and_is_the_same_on_any_mesh(monkeypatch):
  m = SIZES["gqa2-untied"]
  table = {
    n: p
    for n, p in decoder.table(m).items()  # each draw compiles 1 s
    if n in ("embed", "layers/wk", "layers/wo", "norm")
  }
  monkeypatch.setattr(decoder, "table", lambda m: table)
  drawn = []
  for fsdp, tensor in ((1, 1), (4, 2)):
    mesh = make_mesh(fsdp, tensor)
    with jax.set_mesh(mesh):
      params = decoder.init(jax.random.key(4), m)
    assert set(params) == set(table)
    for n, s in decoder.abstract(m, mesh).items():
      assert (s.shape, s.dtype, s.sharding) == (
        params[n].shape,
        params[n].dtype,
        params[n].sharding,
      )
      assert s.sharding == sharding.named_sharding(mesh, *table[n].axes), n
    drawn.append({n: np.asarray(x) for n, x in params.items()})
  for n, p in table.items():
    x = drawn[0][n]
    np.testing.assert_array_equal(drawn[1][n], x, err_msg=n)
    assert x.shape == p.shape and x.dtype == np.float32, n
    if p.scale == 0:
      assert (x == 1).all(), n
    else:  # four standard errors of a standard deviation
      assert abs(x.std() / p.scale - 1) < 4 / np.sqrt(2 * x.size), n
      assert abs(x.mean()) < 4 * p.scale / np.sqrt(x.size), n
  assert len({x.flat[0] for x in drawn[0].values() if x.flat[0] != 1}) == (
    sum(p.scale != 0 for p in table.values())
  )  # each has its own key
  assert decoder.parameter_count(m) == sum(x.size for x in drawn[0].values())


@pytest.mark.parametrize(
  "change,words",
  [
    (dict(kv_heads=3), "model.heads=4 is no multiple of model.kv_heads=3"),
    (dict(kv_heads=0), "model.kv_heads=0, wanted 1 or more"),
    (dict(layers=-1), "model.layers=-1, wanted 1 or more"),
    (dict(dtype="float99"), "model.dtype='float99' is unknown; known: float32"),
    (dict(head_size=5), "model.head_size=5 has 5 rotated dimensions"),
    (dict(remat="some"), "model.remat='some' is unknown; known: none"),
    (dict(vocab=47), "embed: its axis 'vocab' of 47 does not divide into 2"),
    (dict(width=30), "model.width=30 is no multiple of model.heads=4"),
    (
      dict(width=30, heads=2),
      "its axis 'width' of 30 does not divide into 4 parts",
    ),
  ],
)
def test_sizes_that_cannot_work_are_refused(change, words):
  mesh = make_mesh(4, 2)
  with pytest.raises(ConfigError, match=words):
    decoder.check_model(SIZES["gqa2-untied"]._replace(**change), mesh)


def test_flops_agree_with_the_compiler():
  """Counted multiply-adds within 3 % of XLA's (norms and softmax are not)."""
  m = sized(1, 128, 4, 2, 32, 384, 1024, 64)
  mesh = make_mesh()
  with jax.set_mesh(mesh):

    def fn(params, tokens):
      return decoder.logits(
        decoder.forward(params, tokens, m), decoder.head(params, m)
      )

    cost = (
      jax.jit(fn)
      .lower(
        decoder.abstract(m, mesh),
        jax.ShapeDtypeStruct(
          (1, 64), jnp.int32, sharding=sharding.named_sharding(mesh, "batch")
        ),
      )
      .compile()
      .cost_analysis()
    )
  assert decoder_flops(m, 64) == pytest.approx(cost["flops"], rel=0.03)
  # The head on fewer positions costs exactly that much less.
  assert decoder_flops(m, 64) - decoder_flops(m, 64, 10) == 54 * 2 * 128 * 1024
