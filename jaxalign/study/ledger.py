"""What each stage cost, and what selecting saved once it is counted in.

Operations are floating-point multiply-adds times two, counted from the rows
that ran; padding and recomputation are not counted. An arm's cost is what it
would cost alone: selection (embedding every row and fitting, only where its
sampler needs it, and the sampler's own work), the reference's forward pass
over its rows where no embedding pass has already given it, and the training.
"""

from typing import Any

from jaxalign.core.artifacts import Cost, Record

SELECTION = (
  "embed",
  "logps",
  "answer",
  "residual",
  "alone",
  "ask",
  "rewards",
  "proxy",
  "held_out",
  "mixture",
  "select",
)


def stages(records: dict[tuple[str, str], Record]) -> list[dict[str, Any]]:
  """One line a stage: what ran, for which arm, and what it took.

  With "held" and "device" where `peak_memory` looked.
  """
  return [
    dict(
      stage=stage,
      arm=arm,
      flops=record.cost.flops,
      tokens=record.cost.tokens,
      seconds=record.cost.seconds,
      bytes=record.cost.bytes,
      skipped=record.skipped,
    )
    | {
      name: record.result[name]
      for name in ("held", "device")
      if name in record.result
    }
    for (arm, stage), record in records.items()
  ]


def arm_flops(
  *, stages: dict[str, int], reference: int, ref_logps: int, align: int
) -> dict[str, int]:
  """Operations of one arm on its own.

  Args:
    stages: of every stage over the whole pool that the sampler's columns
      come from, of those that they read, and of the arm's own choice.
    reference: of a reference pass over the arm's own rows; nothing where the
      embedding pass (same weights, same rows) has given these numbers.
    ref_logps: of the mismatched rows (KTO).
    align: of the training.

  Returns:
    {"select", "reference", "align", "total"}.
  """
  select = sum(stages.values())
  reference = ref_logps + (0 if "embed" in stages else reference)
  return dict(
    select=select,
    reference=reference,
    align=align,
    total=select + reference + align,
  )


def saved(arm: int, everything: int, sft: int) -> dict[str, float]:
  """Share of flops saved against aligning on everything.

  Negative where selecting costs more than it saves.

  Args:
    arm: the arm's total, selection counted.
    everything: the total of aligning on the whole pool.
    sft: the supervised training that both share; 0 with a checkpoint.
  """
  return dict(
    without_sft=1 - arm / everything,
    with_sft=1 - (arm + sft) / (everything + sft),
  )


def total(lines: list[dict[str, Any]]) -> Cost:
  """The sum of `stages` lines."""
  return Cost(
    *(
      sum(line[name] for line in lines)
      for name in ("flops", "tokens", "seconds", "bytes")
    )
  )
