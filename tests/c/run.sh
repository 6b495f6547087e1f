#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Build csrc/*.c with each tests/c/test_*.c (one program a file) and run them.
#
#     tests/c/run.sh plain|asan|tsan [test_name...]
#
#     plain   -O1 -g
#     asan    with AddressSanitizer and UndefinedBehaviorSanitizer
#     tsan    with ThreadSanitizer
#
# CC and CFLAGS are heard.  Warnings are errors.  Ends with "N passed, N failed"; exit status 0 only if none failed.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
mode=${1:-plain}
[ $# -gt 0 ] && shift
case $mode in
plain) sanitize= ;;
asan) sanitize="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer" ;;
tsan) sanitize="-fsanitize=thread" ;;
*) echo "usage: $0 plain|asan|tsan [test_name...]" >&2; exit 2 ;;
esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

CC=${CC:-gcc}
flags="-std=gnu11 -O1 -g -Wall -Wextra -Werror -pthread $sanitize ${CFLAGS:-} -Icsrc/include -Icsrc"
jobs=$(nproc)
cd "$root" # the flags are split at spaces, of which the path to here may have some

# The library once, as a static archive, so that tests of single rooms reach what the shared one hides.
(cd csrc && ls *.c | sed 's/\.c$//') | xargs -P "$jobs" -I{} $CC $flags -c "csrc/{}.c" -o "$work/{}.o"
ar rcs "$work/libcolocache.a" "$work"/*.o

if [ $# -eq 0 ]; then
    set -- $(cd "$here" && ls test_*.c | sed 's/\.c$//')
fi
for test in "$@"; do echo "$test"; done |
    xargs -P "$jobs" -I{} $CC $flags "$here/{}.c" "$work/libcolocache.a" -o "$work/{}"

ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=1:abort_on_error=0}
UBSAN_OPTIONS=${UBSAN_OPTIONS:-print_stacktrace=1}
TSAN_OPTIONS=${TSAN_OPTIONS:-"halt_on_error=0:exitcode=66:suppressions='$here/tsan.supp'"} # the path may have spaces
export ASAN_OPTIONS UBSAN_OPTIONS TSAN_OPTIONS

passed=0 failed=0 skipped=0
for test in "$@"; do
    echo "$test ($mode)"
    status=0
    timeout 110 "$work/$test" >"$work/out" 2>&1 || status=$?
    cat "$work/out"
    counts=$(sed -n 's/^= \([0-9]*\) passed, \([0-9]*\) failed, \([0-9]*\) skipped$/\1 \2 \3/p' "$work/out")
    set_counts() { p=$1 f=$2 s=$3; }
    # shellcheck disable=SC2086 three words are meant
    set_counts ${counts:-0 0 0}
    # A crash, a sanitizer's report or a time limit is a failure of its own, whatever was counted before it.
    if [ "$status" -ne 0 ] && [ "$f" -eq 0 ]; then
        echo "  FAIL $test ended with status $status"
        f=1
    fi
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
done
[ "$skipped" -eq 0 ] || echo "$skipped skipped"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
