#!/usr/bin/env bash
# `make sanitize`: the CPU backend under AddressSanitizer and under ThreadSanitizer, networks edited between and during
# calls among what runs. Some fifteen minutes: each is a build of its own, of the portable path alone, since the
# instrumented vector paths take GCC half an hour. SANITIZERS=undefined is UndefinedBehaviorSanitizer, a longer build.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-.venv/bin/python}")
tests=(tests/test_edits.py tests/test_quick_call.py tests/test_cpu_backend.py)
export OMP_NUM_THREADS=2 QPILOTS_CPU_ISA=portable QPILOTS_NATIVE=1
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:handle_segv=0  # the interpreter leaks; the write watch handles SIGSEGV
export TSAN_OPTIONS=ignore_noninstrumented_modules=1:exitcode=66:report_signal_unsafe=0:handle_segv=0

export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
declare -A runtimes=([address]=libasan [thread]=libtsan [undefined]=libubsan)

for sanitizer in ${SANITIZERS:-address thread}; do
  tree=build/sanitize-$sanitizer
  mkdir -p "$tree"
  git ls-files -z | xargs -0 cp --parents -t "$tree"
  (
    cd "$tree"
    export PYTHONPATH=$PWD
    QPILOTS_CMAKE_ARGS="-DQPILOTS_VECTOR_PATHS=OFF -DCMAKE_CXX_FLAGS=-fsanitize=$sanitizer -DCMAKE_CXX_FLAGS_RELEASE=-O1" \
      "$python" setup.py -q build_ext --inplace > build.log 2>&1 || { tail -20 build.log; exit 1; }
    runtime=$(g++ -print-file-name="${runtimes[$sanitizer]}".so)
    LD_PRELOAD="$runtime $(g++ -print-file-name=libstdc++.so)" "$python" -m pytest -q -s -p no:cacheprovider "${tests[@]}"
  )
  echo "$sanitizer: nothing found"
done
