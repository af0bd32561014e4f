#!/usr/bin/env bash
# The check of the CUDA part on a machine with an NVIDIA GPU (compute capability 8.0 or newer), in less than ten
# minutes: builds in place, runs the kernels' tests on the device, has compute-sanitizer watch the kernels, and
# measures (python -m benchmarks.gpu). A part that fails stops no other; exits with 1 if any did.
#
#   benchmarks/gpu_check.sh [options of python -m benchmarks.gpu]
#
#   PYTHON   interpreter with torch, pybind11, pytest and hypothesis (python3); CMake, Ninja and nvcc are on PATH,
#            beside it, or where CUDA installs itself
#   OUT      folder for the log, check.log, and the figures (build/gpu_check)
#   LIMIT    seconds for all of it (560)
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1
OUT=$(realpath -m "${OUT:-build/gpu_check}")
LIMIT=${LIMIT:-560}
LOG=$OUT/check.log
PATH=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH:/usr/local/cuda/bin
mkdir -p "$OUT"
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
failed=0
summary=()

left() { echo $((LIMIT - SECONDS)); }

# part NAME SECONDS COMMAND...: its output, exit status and duration go to files.
part() {
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  timeout -k 5 "$limit" "$@" >"$parts/$name.log" 2>&1
  echo "$? $((SECONDS - began))" >"$parts/$name.status"
}

say() {
  summary+=("$1")
  echo "$1" | tee -a "$LOG"
}

# told NAME: adds a part's output to the log; sets `status` and `seconds`.
told() {
  read -r status seconds <"$parts/$1.status"
  { echo "==== $1"; cat "$parts/$1.log"; } >>"$LOG"
}

tell() {
  told "$1"
  local last
  last=$(grep -v '^\s*$' "$parts/$1.log" | tail -n 1 | cut -c 1-150)
  case $status in
    0) say "$1: ok, $seconds s; $last" ;;
    124 | 137) say "$1: STOPPED after $seconds s; $last"; failed=1 ;;
    *) say "$1: FAILED, $seconds s; $last"; failed=1
       grep -E '^(FAILED|ERROR)|error:' "$parts/$1.log" | head -n 5 | cut -c 1-180 ;;
  esac
}

# A report counts where it names one of our kernels; initcheck also knows of others'.
tell_sanitizer() {
  told "$1"
  if ((status == 0)) && grep -q 'small: done' "$parts/$1.log"; then
    say "$1: clean, $seconds s"
  elif grep -q 'at .*saek' "$parts/$1.log"; then
    say "$1: FAILED, $seconds s; $(grep -c 'at .*saek' "$parts/$1.log") reports"
    failed=1
    grep -B 1 'at .*saek' "$parts/$1.log" | head -n 6 | cut -c 1-180
  elif ((status == 124 || status == 137)); then
    say "$1: stopped after $seconds s, no report until then"
  elif grep -q 'small: done' "$parts/$1.log"; then
    say "$1: no report of our kernels, some of others', $seconds s"
  else
    say "$1: did not run; $(tail -n 1 "$parts/$1.log" | cut -c 1-150)"
  fi
}

: >"$LOG"
{
  nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv,noheader || echo 'no nvidia-smi'
  "$PYTHON" -c 'import sys, torch; print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}")'
  nvcc --version | tail -n 2 | head -n 1
  nproc
} 2>&1 | tee -a "$LOG"

part build 180 bash -euc '
  generator=$(command -v ninja >/dev/null && echo Ninja || echo "Unix Makefiles")
  cmake -S . -B build/gpu -G "$generator" -DSAEK_CUDA=ON -DCMAKE_BUILD_TYPE=Release \
    -DPython_EXECUTABLE="$(command -v "$PYTHON")" -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)"
  cmake --build build/gpu --parallel "$(nproc)"
  cmake --install build/gpu --prefix .'
tell build

# These do not measure, so they share the device. The simulated kernels are tested where there is no GPU; what
# tests/sae_ext/conftest.py offers needs packages that this machine may lack.
pytest=("$PYTHON" -m pytest -q -p no:cacheprovider -o addopts= -ra)
"$PYTHON" -c 'import xdist' 2>/dev/null && pytest+=(-n 4)
part kernels 150 "${pytest[@]}" tests/csrc/test_kernels.py tests/csrc/test_cuda.py -k 'cuda and not simt' &
part steps 150 "${pytest[@]}" --noconftest tests/sae_ext/test_step_cuda.py -k 'cuda and not simulated' &
tools=(memcheck racecheck initcheck)
for tool in "${tools[@]}"; do
  # initcheck must see who has written what is read, so it watches all kernels.
  ours=(--kernel-regex kns=saek)
  [[ $tool = initcheck ]] && ours=()
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$tool" 50 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    --show-backtrace no --print-limit 20 "${ours[@]}" "$PYTHON" -m benchmarks.gpu.small
done &
wait
tell kernels
tell steps
for tool in "${tools[@]}"; do tell_sanitizer "$tool"; done

# The table comes last: that is what is seen of a long output.
seconds=$(($(left) - 40))
((seconds > 300)) && seconds=300
minutes=$(printf '%d.%02d' $((seconds / 60)) $((seconds % 60 * 100 / 60)))
echo "==== benchmark" >>"$LOG"
timeout -k 5 "$(left)" "$PYTHON" -m benchmarks.gpu --out "$OUT" --minutes "$minutes" "$@" 2>&1 | tee -a "$LOG"
status=${PIPESTATUS[0]}
if ((status != 0)); then
  failed=1
fi
printf '\n'
printf 'part: %s\n' "${summary[@]}" "benchmark: exit status $status; $SECONDS s in all" | tee -a "$LOG"
exit "$failed"
