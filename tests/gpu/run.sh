#!/usr/bin/env bash
# Everything the tests can only show on a GPU, in stages that write their logs to a folder.
# Usage: tests/gpu/run.sh OUT STAGE...   stages: kernels sanitize times engine engine-v1 fp8 llama
set -uo pipefail
out=$(realpath -m "$1"); shift
mkdir -p "$out"
root=$(cd "$(dirname "$0")/../.." && pwd)
# not from the checkout: an installed package must not be shadowed by its sources
cd "$out"
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 PYTHONUNBUFFERED=1 VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-INFO}
failed=0
stage() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 began=$SECONDS; shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 && status=ok || status="FAILED ($?)"
  [ "$status" = ok ] || failed=1
  printf '%-14s %-12s %4ds  %s\n' "$name" "$status" $((SECONDS - began)) "$(tail -n 1 "$out/$name.log" | cut -c1-160)"
}
for s in "$@"; do
  case $s in
    kernels) stage kernels 500 python3 -m pytest -c "$root/pyproject.toml" --rootdir "$root" "$root"/tests/kernels -q --ignore "$root"/tests/kernels/test_compile.py ;;
    sanitize) stage sanitize 400 compute-sanitizer --tool memcheck --error-exitcode 9 python3 "$root"/tests/kernels/sanitize.py ;;
    times) stage times 300 python3 "$root"/tests/kernels/time_kernels.py ;;
    engine) stage engine-v2 590 python3 -m pytest -c "$root/pyproject.toml" --rootdir "$root" "$root"/tests/engine/test_outputs.py -q -x ;;
    engine-v1) VLLM_USE_V2_MODEL_RUNNER=0 stage engine-v1 590 python3 -m pytest -c "$root/pyproject.toml" --rootdir "$root" "$root"/tests/engine/test_outputs.py -q -x -k "${ENGINE_CASES:-keydiff or default}" ;;
    fp8) stage fp8 590 python3 -m pytest -c "$root/pyproject.toml" --rootdir "$root" "$root"/tests/engine/test_fp8.py -q ;;
    llama) stage llama-dense 290 python3 "$root"/tests/gpu/llama_shape.py dense "$out/llama-dense.json"
           stage llama-sparsek 290 python3 "$root"/tests/gpu/llama_shape.py sparsek "$out/llama-sparsek.json" '{"scorer": "keydiff"}' ;;
    *) echo "unknown stage $s" >&2; exit 2 ;;
  esac
done
exit $failed
