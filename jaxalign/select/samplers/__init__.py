"""The table of samplers; a new one is a function and a line here.

A sampler is `sampler(seed, pool, budget, **kwargs) -> Selection`. The seed is
an int, not a jax key: random numbers are hashes of (seed, record id), so a
record draws the same number in any order, on any mesh, in any part of a pool.

It declares what it reads: `needs` always, `optional` where there is such a
column or a keyword names it, `pairs` if it compares two responses. A sampler
that is greedy runs over the rows in id order, with ties by a hash of the id.
What is held does not grow as N x N (facility location keeps at most 512 MiB
of columns), and a method that would take more than a day says so, with the
hours, before it starts (`rows.refuse_long`); `blocks=` runs the greedy ones
inside clusters. `combine` makes samplers
of samplers. What one takes, which the dry run prints, is a line in
`select/costs.py`.
"""

from jaxalign.select.samplers import (
  basic,
  crossfit,
  dedup,
  density,
  geometric,
  likelihood,
  margin,
  submodular,
)

SAMPLERS = {
  # Draws and likelihood.
  "random": basic.random,
  "stratified": basic.stratified,
  "length_matched": basic.length_matched,
  "isa": basic.isa,
  # What a model says of each response.
  "length": likelihood.length,
  "perplexity": likelihood.perplexity,
  "ifd": likelihood.ifd,
  "ask_llm": likelihood.ask_llm,
  "selective_dpo": likelihood.selective_dpo,
  # How far apart the two sides of a pair are.
  "external_margin": margin.external_margin,
  "implicit_margin": margin.implicit_margin,
  "bees": margin.bees,
  "real": geometric.real,
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
