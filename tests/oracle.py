"""A Llama in NumPy float64, from its equations; imports nothing of jaxalign."""

import numpy as np


def norm(x, scale, eps):
  """x / rms(x) * scale (Zhang and Sennrich 2019)."""
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def rotate(x, theta):
  """Rotary embedding of [L, heads, C], halves as in Hugging Face's Llama."""
  length, _, size = x.shape
  half = size // 2
  angle = np.outer(np.arange(length), theta ** (-np.arange(half) / half))
  turn = np.exp(1j * angle)[:, None, :]
  z = (x[..., :half] + 1j * x[..., half:]) * turn
  return np.concatenate([z.real, z.imag], -1)


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def hidden_states(params, tokens, *, kv_heads, rope_theta, norm_eps):
  """[L, D] after the final norm, for one row of L token ids.

  Args:
    params: name -> array, stacked over layers, as the parameter table says:
      wq [T, D, G, Q, C], wk and wv [T, D, G, C], wo [T, G, Q, C, D].
    tokens: [L] ids.
    kv_heads: G.
    rope_theta: base of the rotary frequencies.
    norm_eps: added to the mean square.
  """
  p = {n: np.asarray(w, np.float64) for n, w in params.items()}
  x = p["embed"][np.asarray(tokens)]
  length = len(x)
  look = np.tril(np.ones((length, length), bool))
  for t in range(len(p["layers/wq"])):
    w = {n.split("/")[1]: v[t] for n, v in p.items() if "/" in n}
    y = norm(x, w["attention_norm"], norm_eps)
    k = rotate(np.einsum("ld,dgc->lgc", y, w["wk"]), rope_theta)
    v = np.einsum("ld,dgc->lgc", y, w["wv"])
    added = np.zeros_like(x)
    for g in range(kv_heads):
      q = rotate(np.einsum("ld,dqc->lqc", y, w["wq"][:, g]), rope_theta)
      for h in range(q.shape[1]):
        score = q[:, h] @ k[:, g].T / np.sqrt(q.shape[-1])
        weight = softmax(np.where(look, score, -np.inf))
        added += weight @ v[:, g] @ w["wo"][g, h]
    x = x + added
    y = norm(x, w["ff_norm"], norm_eps)
    gate = y @ w["w_gate"]
    x = x + (gate / (1 + np.exp(-gate)) * (y @ w["w_up"])) @ w["w_down"]
  return norm(x, p["norm"], norm_eps)


def token_logps(params, tokens, **sizes):
  """[L] log p(token t | before) of one row; entry 0 is 0."""
  x = hidden_states(params, tokens, **sizes)
  p = softmax(x @ np.asarray(params.get("head", params["embed"]), np.float64).T)
  at = np.arange(1, len(tokens))
  return np.concatenate([[0.0], np.log(p[at - 1, np.asarray(tokens)[1:]])])
