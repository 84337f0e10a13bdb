"""The table of samplers; a new one is a function and a line here.

A sampler is `sampler(seed, pool, budget, **kwargs) -> Selection`. The seed is
an int, not a jax key: random numbers are hashes of (seed, record id), so a
record draws the same number in any order, on any mesh, in any part of a pool.
"""

from jaxalign.select.samplers import basic
from jaxalign.select.samplers import dedup
from jaxalign.select.samplers import density
from jaxalign.select.samplers import geometric
from jaxalign.select.samplers import likelihood
from jaxalign.select.samplers import margin
from jaxalign.select.samplers import submodular

SAMPLERS = {
    "random": basic.random,
    "stratified": basic.stratified,
    "length_matched": basic.length_matched,
    "isa": basic.isa,
    "length": likelihood.length,
    "perplexity": likelihood.perplexity,
    "ifd": likelihood.ifd,
    "ask_llm": likelihood.ask_llm,
    "selective_dpo": likelihood.selective_dpo,
    "external_margin": margin.external_margin,
    "implicit_margin": margin.implicit_margin,
    "bees": margin.bees,
    "density": density.density,
    "k_center": geometric.k_center,
    "herding": geometric.herding,
    "real": geometric.real,
    "facility_location": submodular.facility_location,
    "dpp": submodular.dpp,
    "semdedup": dedup.semdedup,
    "deita": dedup.deita,
}
