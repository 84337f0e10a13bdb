"""The table of samplers; a new one is a function and a line here.

A sampler is `sampler(seed, pool, budget, **kwargs) -> Selection`. The seed is
an int, not a jax key: random numbers are hashes of (seed, record id), so a
record draws the same number in any order, on any mesh, in any part of a pool.
"""

from jaxalign.select.samplers import basic

SAMPLERS = {
    "random": basic.random,
    "isa": basic.isa,
}
