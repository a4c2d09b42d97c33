#!/usr/bin/env bash
# Everything the tests can only show on a GPU, in stages that write their logs to a folder.
# Usage: tests/gpu/run.sh OUT STAGE...   stages: kernels interop sanitize times step engines bench profile engine engine-v1 tp llama learned
set -uo pipefail
out=$(realpath -m "$1"); shift
mkdir -p "$out"
root=$(cd "$(dirname "$0")/../.." && pwd)
# not from the checkout: an installed package must not be shadowed by its sources
cd "$out"
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 PYTHONUNBUFFERED=1 VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-INFO}
failed=0
files=()
stage() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 began=$SECONDS; shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 && status=ok || status="FAILED ($?)"
  printf '%-14s %-12s %4ds  %s\n' "$name" "$status" $((SECONDS - began)) "$(tail -n 1 "$out/$name.log" | cut -c1-160)"
  [ "$status" = ok ]
}
for s in "$@"; do
  case $s in
    kernels) stage kernels 500 python3 -m pytest -c "$root/pyproject.toml" --rootdir "$root" "$root"/tests/kernels -q --ignore "$root"/tests/kernels/test_compile.py || failed=1 ;;
    interop) stage interop 500 python3 -m pytest -c "$root/pyproject.toml" --rootdir "$root" "$root"/tests/export "$root"/tests/test_xformers.py -q || failed=1 ;;
    sanitize) stage sanitize 400 compute-sanitizer --tool memcheck --error-exitcode 9 python3 "$root"/tests/kernels/sanitize.py || failed=1 ;;
    times) stage times 300 python3 -m vllm_sparsek.cli bench kernels --run micro --output "$out/micro" || failed=1 ;;
    step) stage step 150 python3 "$root"/tests/gpu/decode_step.py "$out/decode-step.json" || failed=1 ;;
    engines) stage engines 300 python3 -m vllm_sparsek.cli bench kernels --config engines --output "$out/engines" || failed=1 ;;
    bench) stage bench 590 python3 -m vllm_sparsek.cli bench kernels --output "$out/bench" || failed=1 ;;
    profile) stage profile 590 python3 -m vllm_sparsek.cli bench kernels --profile --output "$out/bench" || failed=1 ;;
    engine) # files side by side: each engine takes a small part of the GPU
           for f in "$root"/tests/engine/test_*.py "$root"/tests/evaluation/test_eval_engine.py; do
             stage "engine-$(basename "$f" .py)" 1500 python3 -m pytest -c "$root/pyproject.toml" --rootdir "$root" "$f" -q &
             files+=($!)
           done
           for pid in "${files[@]}"; do wait "$pid" || failed=1; done ;;
    engine-v1) VLLM_USE_V2_MODEL_RUNNER=0 stage engine-v1 590 python3 -m pytest -c "$root/pyproject.toml" --rootdir "$root" "$root"/tests/engine/test_outputs.py -q -x -k "${ENGINE_CASES:-keydiff or default}" || failed=1 ;;
    tp) # two GPUs
        stage tp 590 python3 -m pytest -c "$root/pyproject.toml" --rootdir "$root" "$root"/tests/engine/test_tensor_parallel.py -q || failed=1 ;;
    llama) stage llama-dense 290 python3 "$root"/tests/gpu/llama_shape.py dense "$out/llama-dense.json" || failed=1
           stage llama-sparsek 290 python3 "$root"/tests/gpu/llama_shape.py sparsek "$out/llama-sparsek.json" '{"scorer": "knorm", "prefill": "sparse"}' || failed=1 ;;
    learned) stage llama-learned 290 python3 "$root"/tests/gpu/llama_shape.py sparsek "$out/llama-learned.json" '{"scorer": "learned"}' || failed=1 ;;
    *) echo "unknown stage $s" >&2; exit 2 ;;
  esac
done
exit $failed
