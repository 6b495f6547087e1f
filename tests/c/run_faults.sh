#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# run_faults.sh -- build and run the programs that die everywhere and whose system calls fail.
#
#   run_faults.sh build DIR            all programs into DIR
#   run_faults.sh build-sanitized DIR  the same with AddressSanitizer and UndefinedBehaviorSanitizer
#   run_faults.sh build-stepped DIR    the one that dies after each instruction: a library as it ships, without crash points
#   run_faults.sh                      build into a fresh directory, run everything once, remove it
#
# CC and CFLAGS are used.  Each program prints one line of JSON with its numbers and exits 0 if the promise held.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
csrc=$here/../../csrc
cc=${CC:-cc}

# Every function that csrc calls and that can fail: tests/c/fail_calls.c has a wrapper for each, and tests/test_failing_calls.py
# compares this list with what the objects import.
wrapped="mmap munmap ftruncate posix_fallocate open fcntl fstat fstatfs getrandom recvmsg sendmsg poll ioctl pthread_create calloc
posix_memalign fopen pread lseek syscall sched_getaffinity madvise fallocate pwrite mprotect mremap sync_file_range posix_fadvise"

objects() { # DIR FLAGS...: csrc/*.c into DIR, two compilers at once
    objects_dir=$1
    shift
    mkdir -p "$objects_dir"
    # shellcheck disable=SC2086
    (cd "$objects_dir" && printf '%s\0' "$csrc"/*.c | xargs -0 -P 2 -n 8 \
        $cc -std=gnu11 -g -pthread -Wall -Wextra -Werror "$@" ${CFLAGS:-} -I"$csrc" -I"$csrc/include" -c)
}

program() { # DIR NAME FLAGS... -- SOURCES...
    dir=$1 name=$2
    shift 2
    flags=
    while [ "$1" != -- ]; do
        flags="$flags $1"
        shift
    done
    shift
    # From the directory of the sources, as the path to it may have spaces.
    # shellcheck disable=SC2086
    (cd "$here" && $cc -std=gnu11 -g -pthread -Wall -Wextra -Werror -DCOLOCACHE_FAULTS $flags ${CFLAGS:-} -I"$csrc" -I"$csrc/include" -I"$here" \
        "$@" "$dir"/csrc/*.o -o "$dir/$name")
}

build() { # DIR FLAGS...
    mkdir -p "$1"
    dir=$(cd "$1" && pwd)
    shift
    objects "$dir/csrc" -DCOLOCACHE_FAULTS "$@"
    program "$dir" crash "$@" -- crash.c crash_world.c crash_memory.c crash_run.c crash_check.c
    program "$dir" crash_damage "$@" -- crash_damage.c crash_world.c crash_memory.c crash_run.c crash_check.c
    program "$dir" crash_blocks "$@" -- crash_blocks.c
    program "$dir" crash_threads "$@" -- crash_threads.c
    program "$dir" crash_failover "$@" -- crash_failover.c
    program "$dir" fail_memory "$@" -- fail_memory.c
    wraps=
    for name in $wrapped; do
        wraps="$wraps -Wl,--wrap=$name"
    done
    # shellcheck disable=SC2086
    program "$dir" fail "$@" $wraps -- fail.c fail_world.c fail_calls.c
}

case ${1:-run} in
build) build "$2" -O2 ;;
build-sanitized) build "$2" -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined ;;
build-stepped)
    mkdir -p "$2"
    dir=$(cd "$2" && pwd)
    objects "$dir/csrc" -O3
    # At fixed addresses, for addr2line; bound at once, or the linker's instructions would be stepped as well.
    program "$dir" step -O2 -no-pie -Wl,-z,now -- step.c step_trace.c crash_world.c crash_memory.c crash_run.c crash_check.c
    ;;
wrapped) echo $wrapped ;;
run)
    dir=$(mktemp -d)
    trap 'rm -rf "$dir"' EXIT
    build "$dir" -O2
    "$dir/crash" --cases 0:2 &
    first=$!
    "$dir/crash" --cases 1:2
    wait "$first"
    "$dir/crash_damage"
    "$dir/crash_blocks" mirror
    "$dir/crash_blocks" bounded
    "$dir/crash_threads"
    "$dir/crash_failover"
    "$dir/fail" mirror
    "$dir/fail" bounded
    "$dir/fail" spill
    "$dir/fail_memory"
    ;;
*)
    echo "usage: run_faults.sh [build DIR | build-sanitized DIR | build-stepped DIR | wrapped]" >&2
    exit 2
    ;;
esac
