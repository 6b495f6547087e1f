#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Fuzz what parses the wire and the control region.
#
#     tests/fuzz/run.sh SECONDS [wire|region]   both at once, or one, with libFuzzer and sanitizers; needs clang
#     tests/fuzz/run.sh replay                  the seeds and what was found once, with any compiler ($CC)
#
# Inputs that break a promise are left in tests/fuzz/found: mend the library, then `git add` the input, so that it is
# replayed from then on. FUZZ_CORPUS=DIR keeps what was learnt for the next run, FUZZ_SEED=N repeats one (0, by default, is
# another each time). CFLAGS is heard.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
cd "$root" # the flags are split at spaces, of which the path to here may have some
work=$(mktemp -d)
running=
finish() {
    status=$?
    for pid in $running; do kill "$pid" 2>/dev/null || true; done
    rm -rf "$work"
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

flags="-std=gnu11 -g -O1 -Wall -Wextra -Werror -pthread -fno-sanitize-recover=undefined ${CFLAGS:-} -Icsrc/include -Icsrc"
ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=1:abort_on_error=1}
UBSAN_OPTIONS=${UBSAN_OPTIONS:-print_stacktrace=1}
export ASAN_OPTIONS UBSAN_OPTIONS
# Sanitizers die at once on some kernels unless addresses are left where they are.
fixed= && command -v setarch >/dev/null 2>&1 && setarch -R true 2>/dev/null && fixed="setarch -R"

build() { # COMPILER SANITIZERS-OF-THE-LIBRARY SANITIZERS-OF-THE-FUZZER MORE-SOURCES...
    cc=$1 library=$2 fuzzer=$3
    shift 3
    (cd csrc && ls *.c | sed 's/\.c$//') |
        xargs -P "$(nproc)" -I{} $cc $flags -fsanitize=$library -c "csrc/{}.c" -o "$work/{}.o"
    for name in wire region; do
        $cc $flags -fsanitize=$fuzzer "tests/fuzz/fuzz_$name.c" "$@" "$work"/*.o -o "$work/fuzz_$name"
    done
}

python3 tests/fuzz/seeds.py "$work/seeds"
found=$here/found
case ${1:-} in
replay)
    build "${CC:-gcc}" address,undefined address,undefined tests/fuzz/replay.c
    for name in wire region; do
        printf '%s: ' "$name"
        find "$work/seeds/$name" "$found" -type f \( -path '*/seeds/*' -o -name "$name-*" \) -print0 2>/dev/null |
            xargs -0 $fixed "$work/fuzz_$name"
    done
    ;;
[1-9]*)
    seconds=$1
    names=${2:-wire region}
    if ! command -v clang >/dev/null 2>&1; then
        echo "skipped: libFuzzer needs clang"
        exit 0
    fi
    if ! echo 'int LLVMFuzzerTestOneInput(void) { return 0; }' |
        clang -fsanitize=fuzzer,address,undefined -x c - -o "$work/probe" 2>/dev/null; then
        echo "skipped: clang's libFuzzer is missing, on Debian: apt install libclang-rt-dev"
        exit 0
    fi
    build clang fuzzer-no-link,address,undefined fuzzer,address,undefined
    mkdir -p "$found"
    for name in $names; do
        corpus=${FUZZ_CORPUS:-$work/corpus}/$name
        mkdir -p "$corpus"
        timeout $((seconds + 120)) $fixed "$work/fuzz_$name" -seed="${FUZZ_SEED:-0}" -max_total_time="$seconds" -max_len=1024 -timeout=10 \
            -rss_limit_mb=1024 -malloc_limit_mb=256 -use_value_profile=1 -print_final_stats=1 -artifact_prefix="$found/$name-" \
            "$corpus" "$work/seeds/$name" >"$work/$name.log" 2>&1 &
        running="$running $!"
    done
    failed=0
    for name in $names; do
        pid=${running# }
        pid=${pid%% *}
        running=${running# }
        running=${running#"$pid"}
        if wait "$pid"; then
            runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$work/$name.log")
            coverage=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$work/$name.log" | tail -1)
            echo "$name: $runs inputs in $seconds s, $coverage branches seen, every promise held"
        else
            failed=1
            echo "$name: BROKEN"
            grep -v '^#[0-9]*	' "$work/$name.log" | tail -60
        fi
    done
    rmdir "$found" 2>/dev/null || true
    [ "$failed" -eq 0 ]
    ;;
*)
    echo "usage: $0 SECONDS [wire|region] | replay" >&2
    exit 2
    ;;
esac
