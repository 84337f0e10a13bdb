"""The table of samplers; a new one is a function and a line here.

A sampler is `sampler(seed, pool, budget, **kwargs) -> Selection` of `budget` M
of the pool's N rows, best first, and a score of all. The seed is an int, not a
jax key: random numbers are hashes of (seed, record id), so a record draws the
same number in any order, on any mesh, in any subset of a pool.

It declares what it reads and, if it can, what it takes: `@needs("embedding",
cost=...)`; see `select.pool.needs` and `select.costs`. A sampler that is
greedy runs over the rows in id order, with ties by a hash of the id. What is
held does not grow as N x N (facility location keeps at most 512 MiB of
columns), and a method that would take more than a day is refused, with the
hours, before it starts. `chains` makes samplers of samplers.

Keywords mean the same in all of them: `direction`, which end of a score is
kept (`values.directed`); `side`, which number stands for a pair
(`values.one_side`); `pair` and `metric`, the vector of a row and how two are
compared (`vectors.vectors`); `blocks`, above 0, runs a greedy method inside as
many k-means clusters (`kmeans.run_greedy`).
"""

from jaxalign.select.samplers import (
  crossfit,
  dedup,
  density,
  draws,
  geometric,
  isa,
  scores,
  submodular,
)

SAMPLERS = {
  # Draws and likelihood.
  "random": draws.random,
  "stratified": draws.stratified,
  "length_matched": draws.length_matched,
  "isa": isa.isa,
  # A model's score of each response.
  "length": scores.length,
  "perplexity": scores.perplexity,
  "ifd": scores.ifd,
  "ask_llm": scores.ask_llm,
  "selective_dpo": scores.selective_dpo,
  # How far apart the two sides of a pair are.
  "external_margin": scores.external_margin,
  "implicit_margin": scores.implicit_margin,
  "bees": scores.bees,
  "real": scores.real,
  # Where rows lie.
  "density": density.density,
  "k_center": geometric.k_center,
  "herding": geometric.herding,
  # Sets that cover, and sets without copies.
  "facility_location": submodular.facility_location,
  "dpp": submodular.dpp,
  "semdedup": dedup.semdedup,
  "deita": dedup.deita,
  "crossfit": crossfit.crossfit,
  "crossfit_lite": crossfit.crossfit_lite,
}
