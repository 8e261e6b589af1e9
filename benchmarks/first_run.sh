#!/usr/bin/env bash
# All that a quarter of an hour on a GPU is to show, what is worth most first:
#   benchmarks/first_run.sh FOLDER [--rehearse]
# FOLDER gets a log of each step, JSON, and summary.txt. Each step has its own limit, and the next
# one runs whatever became of it. The package is built before, with its CUDA kernels, for the
# PYTHON that is used (python3); tune.py's libraries too (benchmarks/tune.py --build-only). What is
# missing on the machine is named and left out. --rehearse takes shapes and times for a simulated
# GPU.
set -u
cd "$(dirname "$0")/.."
folder=${1:?where do the results go?}
rehearse=${2:-}
python=${PYTHON:-python3}
mkdir -p "$folder"
summary=$folder/summary.txt
: > "$summary"

# step NAME SECONDS COMMAND...
step() {
  local name=$1 seconds=$2 code=0 began=$SECONDS
  shift 2
  if ! command -v "$1" > /dev/null; then
    echo "$name: left out, $1 was not found" | tee -a "$summary"
    return
  fi
  timeout "$seconds" "$@" > "$folder/$name.log" 2>&1 || code=$?
  echo "$name: status $code after $((SECONDS - began)) of $seconds s" | tee -a "$summary"
  tail -n 3 "$folder/$name.log" | sed 's/^/    /' | tee -a "$summary"
}

check=(--lib build/libcuda_check.so --quick)
tune=(--minutes 4)
bench=(--minutes 3 --compile F.rms_norm)
if [ "$rehearse" ]; then
  check+=(--only rows)
  tune=(--dry-run --shapes 4x512,2x9000 --variants "usual,backward of 96")
  bench=(--shapes 4x512 --calls 2 --no-compile)
fi

step machine 20 nvidia-smi -q -d CLOCK,POWER,MEMORY
step self_check 40 "$python" -m rmsnorm_cuda
step roofs 40 "$python" benchmarks/gpu.py --roofs
[ -e build/libcuda_check.so ] ||
  step build_check 300 "$python" tests/native/cuda_check.py --build build/libcuda_check.so
step cuda_check 90 "$python" tests/native/cuda_check.py "${check[@]}"
for pdl in 0 1; do
  step "pytest_pdl$pdl" 90 env RMSNORM_CUDA_PDL=$pdl "$python" -m pytest -q -m cuda tests
done
for tool in synccheck racecheck; do  # clusters and their barriers
  step "$tool" 60 compute-sanitizer --tool $tool --error-exitcode 1 "$python" \
    tests/native/cuda_check.py --lib build/libcuda_check.so --quick --only shared_rows
done
step tune 270 "$python" benchmarks/tune.py "${tune[@]}" --json "$folder/tune.json"
step benchmark 240 "$python" benchmarks/gpu.py "${bench[@]}" --json "$folder/benchmark.json"
# Issue slots in use, what warps wait for, and DRAM: of the first eight kernels of a benchmark.
step ncu 90 ncu --launch-count 8 --kernel-name 'regex:_rows' \
  --section SpeedOfLight --section WarpStateStats --section SchedulerStats \
  "$python" benchmarks/gpu.py --shapes 8192x4096,32768x128 --calls 1 --no-compile --only ours
