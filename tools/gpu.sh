#!/usr/bin/env bash
# Every GPU figure of BENCHMARKS.md, from one command, in under 25 minutes.
#
#   tools/gpu.sh [--out=runs/gpu] [--sections=attention,forward,...] [--toy]
#
# BUDGET=1440   seconds in all; a section gets its own limit or what is left
# PYTHON=python3
# XLA_FLAGS     taken as given; unset, the flags below if this jaxlib has them
#
# A folder tools/wheels of pure wheels, where there is one, is unpacked and
# searched behind what is installed (TRL and what it needs, for `dpo`). Nothing
# is downloaded, and no setting of the card is touched. Each section is a
# process of its own: what one leaves on the card is gone before the next. On
# a machine that ends a command after ten minutes, name the sections in parts;
# results gather in --out, and the summary prints all that lie there.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-1440}
out=runs/gpu
sections=attention,forward,train,mixture,dpo,embed
toy=()
for flag in "$@"; do
  case $flag in
    --out=*) out=${flag#*=} ;;
    --sections=*) sections=${flag#*=} ;;
    --toy) toy=(--toy) ;;
    *) echo "unknown flag $flag" >&2; sed -n '2,17s/^# \{0,1\}//p' "$0" >&2
       exit 2 ;;
  esac
done
mkdir -p "$out"
started=$SECONDS

# jax and torch share the card, so jax must not take three quarters at once.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$scratch/cache}

if compgen -G 'tools/wheels/*.whl' >/dev/null; then
  site=$scratch/site
  for wheel in tools/wheels/*.whl; do
    "$PYTHON" -m zipfile -e "$wheel" "$site"
  done
  # Behind what is installed: they add, they replace nothing.
  export JAXALIGN_WHEELS=$site
fi

# Documented in JAX's "GPU performance tips". An unknown flag ends the process,
# so they are tried first.
if [[ ${#toy[@]} -eq 0 && -z ${XLA_FLAGS+set} ]]; then
  flags='--xla_gpu_triton_gemm_any=true'
  flags+=' --xla_gpu_enable_latency_hiding_scheduler=true'
  if XLA_FLAGS=$flags timeout 120 "$PYTHON" -c \
      'import jax; jax.numpy.ones(8).sum().block_until_ready()' \
      >/dev/null 2>&1; then
    export XLA_FLAGS=$flags
  else
    echo "- this jaxlib refuses $flags; none are set"
  fi
fi

limit_of() {
  case $1 in
    attention) echo 200 ;; forward) echo 210 ;; train) echo 480 ;;
    dpo) echo 180 ;; mixture) echo 200 ;; embed) echo 150 ;; *) echo 60 ;;
  esac
}

failed=()
for section in ${sections//,/ }; do
  left=$((BUDGET - (SECONDS - started) - 10))
  limit=$(limit_of "$section")
  ((limit < left)) || limit=$left
  if ((limit < 30)); then
    echo "- $section: no time left of $BUDGET s"
    failed+=("$section")
    continue
  fi
  # The section stops itself a little before it is stopped.
  timeout --kill-after=10 "$limit" "$PYTHON" tools/gpu.py "${toy[@]}" \
    --sections="$section" --out="$out" --limit=$((limit - 20)) \
    2>>"$out/errors.log" || failed+=("$section")
done

printf '\n# Summary (%d s)\n' $((SECONDS - started))
"$PYTHON" tools/gpu.py "${toy[@]}" --summary --out="$out" 2>>"$out/errors.log"
if ((${#failed[@]})); then
  echo "- not whole: ${failed[*]}; what went wrong is above and in" \
    "$out/errors.log and $out/peer.log"
  exit 1
fi
