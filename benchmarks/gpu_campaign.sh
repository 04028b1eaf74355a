#!/usr/bin/env bash
# Measure and check everything on one GPU, in stages of less than ten minutes that can be repeated.
#
#   benchmarks/gpu_campaign.sh [--device cpu|cuda] OUT [STAGE...]
#
# Stages, in this order if none is named: ceilings, networks, correctness, kernels, tiles, compiled, sanitizer.
# A stage that fails or is cut short does not stop the next. Run it again with the same OUT: what is finished for
# this source is skipped, everything else goes on where it was. Records are in OUT/STAGE/cases.jsonl after every
# case, one line a stage is added to OUT/summary.txt, and everything worth keeping is in EVIDENCE: unpacked into an
# empty OUT it lets another machine with the same GPU go on.
# Without a GPU the same is done in small, as a rehearsal.
#
# PYTHON=python3   the interpreter        LIMIT=540   seconds a stage may take
# WORKERS          processes for the tests: all cores but four, 2 to 12 of them
# TOTAL            seconds that all stages may take together: no limit
# EVIDENCE         a file, kept up to date as long as the script runs: OUT/evidence.tar.gz
set -u

PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-540}
TOTAL=${TOTAL:-}
# The tests wait for compilers, which take a core each; more than a dozen contexts crowd the GPU's memory.
cores=$(($(nproc 2>/dev/null || echo 4) - 4))
WORKERS=${WORKERS:-$((cores < 2 ? 2 : cores > 12 ? 12 : cores))}
# Networks before what takes longest: each of their cases is checked against naive before it is measured.
STAGES=(ceilings networks correctness kernels tiles compiled sanitizer)

usage() {
    sed -n '2,16s/^# \{0,1\}//p' "$0"
    exit 2
}

# All that needs the device; predictions need none. (test_memory is also the name of the file that they are in.)
MEASURED="(test_step or test_memory) and not test_predicted"

# What the networks stage measures, by priority: name | pytest's selection. The last takes all that is left.
CUDA_SELECTIONS=(
    "core 64|test_step and train and densenet121 and bfloat16 and 64x224x224 and not (compiled or graph)"
    "CUDA graphs|test_step and graph"
    "core 256|test_step and train and densenet121 and bfloat16 and 256x224x224"
    "inference|test_step and infer and 64x224x224"
    "small batches|test_step and densenet121 and bfloat16 and (8x224x224 or 1x224x224)"
    "float32|test_step and densenet121 and float32"
    "DenseNet-BC|test_step and densenet_bc"
    "larger networks|test_step and (densenet201 or densenet161 or densenet264)"
    "compiled|test_step and compiled"
    "the rest|$MEASURED"
)
CPU_SELECTIONS=("the rest|$MEASURED")

# run NAME COMMAND...: within what is left of the stage's time, and CAP seconds if that is set; once a source.
# Its output goes to OUT/STAGE/NAME.log.
run() {
    local name=$1 left=$((DEADLINE - SECONDS)) file code began=$SECONDS
    shift
    [ "$left" -gt "${CAP:-$left}" ] && left=$CAP
    file="$FOLDER/${name// /-}"
    if done_before "$name"; then
        note "$name: done before"
        return 0
    fi
    if [ "$left" -lt 15 ]; then
        note "$name: no time left"
        STOPPED=1
        return 0
    fi
    # Interrupted, pytest still writes what it has; after half a minute it is killed.
    timeout --signal=INT --kill-after=30 "$left" "$@" >"$file.log" 2>&1
    code=$?
    case $code in
        0 | 5)  # 5: nothing of that name in this profile
            echo "$SOURCE" >"$file.done"
            note "$name: ok, $((SECONDS - began)) s" ;;
        124 | 137)
            STOPPED=1
            note "$name: cut short after $((SECONDS - began)) s" ;;
        *)
            FAILED=1
            note "$name: failed ($code), see $file.log"
            tail -n 3 "$file.log" | sed 's/^/    /' ;;
    esac
    archive
    return 0
}

done_before() {  # NAME
    [ "$(cat "$FOLDER/${1// /-}.done" 2>/dev/null)" = "$SOURCE" ]
}

# Everything worth keeping in one file, the old one until the new one is whole: records, junit, environment, summary,
# what is done, so that nobody who unpacks it does it again, and logs of less than a megabyte.
archive() {
    local files=()
    mapfile -t files < <(cd "$OUT" && find . -type f \( -name '*.jsonl' -o -name '*.json' -o -name '*.xml' \
        -o -name '*.done' -o -name summary.txt -o \( -name '*.log' -size -1024k \) \) | sort)
    [ ${#files[@]} -gt 0 ] || return 0
    tar -czf "$EVIDENCE.part" -C "$OUT" "${files[@]}" && mv "$EVIDENCE.part" "$EVIDENCE"
}

note() {
    echo "  $*"
}

# Records go to the stage's folder. What hangs has not all of the stage's time.
measure() {  # NAME and what pytest is to select
    CAP=$((2 * LIMIT / 3)) go_on "$1" "$PYTHON" -m pytest "${@:2}" --benchmark-only -p no:cacheprovider -q \
        --densebench-profile "$PROFILE" --densebench-device "$DEVICE" --densebench-out "$FOLDER" \
        --densebench-resume
}

# A case that makes the device unusable ends the process; another goes on without it.
go_on() {  # NAME COMMAND...
    local attempt log="$FOLDER/${1// /-}.log"
    for attempt in 1 2 3; do
        run "$@"
        ! done_before "$1" && grep -qs "nothing more can run on it" "$log" || break
        mv "$log" "${log%.log}.$attempt.log"
    done
}

stage_ceilings() {
    run ceilings "$PYTHON" -m densebench.measure.ceilings --device "$DEVICE" --out "$FOLDER/ceilings.json"
}

# Every test that needs a GPU; none may be skipped for want of one. Evidence: junit files and the environment.
stage_correctness() {
    local name pending waiting parallel=() marks=()
    local names=(processes operators "large buffers" memory graphs replays "host time" networks)
    "$PYTHON" -c 'import json, sys; from densebench.measure.environment import environment
print(json.dumps(environment(sys.argv[1]), indent=1))' "$DEVICE" >"$FOLDER/environment.json"
    [ "$DEVICE" = cuda ] && marks=(-m "gpu and not nightly" --require-gpu) && names+=(suite)
    "$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n "$WORKERS" --dist worksteal)
    for name in "${names[@]}"; do
        # Twice its share of what is left, so that none starves the rest, and one that is left alone has it all.
        pending=0
        for waiting in "${names[@]}"; do done_before "$waiting" || pending=$((pending + 1)); done
        CAP=$((2 * (DEADLINE - SECONDS) / (pending + 1)))
        correctness "$name"
    done
    CAP=''
    return 0
}

# What needs the memory, or the cores, to itself runs alone.
correctness() {  # NAME
    case $1 in
        operators) test_files "$1" tests/gpu/test_operators.py -k "not 2_31" "${parallel[@]}" ;;
        "large buffers") test_files "$1" tests/gpu/test_operators.py -k "2_31 or large_buffers" ;;
        replays) test_files "$1" tests/gpu/test_replays.py -k "not host_time" "${parallel[@]}" ;;
        "host time") test_files "$1" tests/gpu/test_replays.py -k host_time ;;
        memory) test_files "$1" tests/gpu/test_memory.py ;;
        suite) test_files "$1" tests --ignore=tests/gpu --continue-on-collection-errors "${parallel[@]}" ;;
        *) test_files "$1" "tests/gpu/test_$1.py" "${parallel[@]}" ;;
    esac
}

test_files() {
    run "$1" "$PYTHON" -m pytest "${@:2}" "${marks[@]}" -q -p no:cacheprovider --junitxml "$FOLDER/${1// /-}.xml" \
        -o faulthandler_timeout=240 -o faulthandler_exit_on_timeout=true  # a kernel that hangs cannot be interrupted
}

# Every operator on every shape, of which few are compiled.
stage_kernels() {
    PROFILE=$KERNEL_PROFILE measure kernels benchmarks/test_kernels.py
}

# What other tiles would take.
stage_tiles() {
    if [ "$DEVICE" != cuda ]; then
        note "not run: tiles are the GPU's"
        SKIPPED=1
        return 0
    fi
    go_on tiles "$PYTHON" -m benchmarks.tile_search "$FOLDER"
}

# Group by group, those that were not.
stage_compiled() {
    FOLDER="$OUT/kernels"
    mkdir -p "$FOLDER"
    if [ "$DEVICE" != cuda ]; then
        note "not run: torch.compile takes minutes on a CPU, and says nothing of a GPU"
        SKIPPED=1
        return 0
    fi
    measure "all compiled" benchmarks/test_kernels.py -k compiled
}

# Kernels, in as many processes as there are cores, into Triton's cache: what is measured compiles one after another,
# with the GPU waiting. For a GPU that is no target, nothing; what fails is compiled again when it is needed.
compile_ahead() {
    local target
    target=sm_$("$PYTHON" -c 'import torch; print(*torch.cuda.get_device_capability(), sep="")')
    CAP=$((LIMIT / 4)) run compiling "$PYTHON" -m densebench.kernels.compile_report --targets "$target" \
        --growth-rates 32,12 --dtypes bfloat16,float32,float32-ieee --jobs "$(nproc 2>/dev/null || echo 4)"
    FAILED='' STOPPED=''
    not_for_others compiling
}

# What fills a cache of this machine: another, where the archive is unpacked, has yet to do it.
not_for_others() {  # NAME
    rm -f "$FOLDER/$1.done"
    archive
}

stage_networks() {
    local selection selections=("${CPU_SELECTIONS[@]}")
    if [ "$DEVICE" = cuda ]; then
        selections=("${CUDA_SELECTIONS[@]}")
        compile_ahead
    fi
    for selection in "${selections[@]}"; do
        measure "${selection%%|*}" benchmarks/ -k "${selection#*|}"
    done
}

# Out-of-bounds accesses and races, on the smallest cases that have tails and several tiles.
stage_sanitizer() {
    local tool checked chosen parallel=()
    if [ "$DEVICE" != cuda ] || ! command -v compute-sanitizer >/dev/null; then
        note "not run: needs a CUDA device and compute-sanitizer"
        SKIPPED=1
        return 0
    fi
    chosen="test_values and (not many_tiles and (tiles or odd or float16) or many_tiles and rows and bfloat16)"
    "$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n "$WORKERS")
    CAP=$((LIMIT / 3)) run unwatched "$PYTHON" -m pytest tests/gpu/test_operators.py -q -p no:cacheprovider \
        --require-gpu -m gpu -k "$chosen" "${parallel[@]}"  # compiles: under a tool that is one after another
    not_for_others unwatched
    for tool in memcheck racecheck synccheck; do
        checked=(compute-sanitizer --tool "$tool" --error-exitcode 86)
        # Without PyTorch's cache every tensor is an allocation of its own, whose bounds can be checked; it costs a
        # wait each, which the other tools need not pay. (Whatever the variable's value: it must not be set.)
        [ "$tool" = memcheck ] && checked=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${checked[@]}")
        # Of this process alone: those that it starts are compilers.
        CAP=$((LIMIT / 3)) run "$tool" "${checked[@]}" --target-processes application-only \
            "$PYTHON" -m pytest tests/gpu/test_operators.py -q -p no:cacheprovider --require-gpu -m gpu \
            -k "$chosen"
    done
}

perform() {
    local began=$SECONDS verdict=ok
    FOLDER="$OUT/$1" FAILED='' STOPPED='' SKIPPED=''
    DEADLINE=$((SECONDS + LIMIT))
    [ -n "$TOTAL" ] && [ "$DEADLINE" -gt "$TOTAL" ] && DEADLINE=$TOTAL
    mkdir -p "$FOLDER"
    echo "$1"
    case $1 in
        ceilings) stage_ceilings ;;
        correctness) stage_correctness ;;
        kernels) stage_kernels ;;
        tiles) stage_tiles ;;
        compiled) stage_compiled ;;
        networks) stage_networks ;;
        sanitizer) stage_sanitizer ;;
    esac
    [ -n "$SKIPPED" ] && verdict="not run"
    [ -n "$STOPPED" ] && verdict="unfinished, run it again"
    [ -n "$FAILED" ] && verdict="FAILED"
    echo "$1: $verdict, $((SECONDS - began)) s, $SOURCE" | tee -a "$OUT/summary.txt"
    archive
    [ -z "$FAILED" ]
}

DEVICE=''
if [ "${1:-}" = --device ]; then
    DEVICE=${2:-}
    shift 2 || usage
fi
case ${1:-} in '' | -*) usage ;; esac
case $DEVICE in '' | cpu | cuda) ;; *) usage ;; esac
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd) || exit 2
EVIDENCE=$(realpath -m "${EVIDENCE:-$OUT/evidence.tar.gz}") && mkdir -p "$(dirname "$EVIDENCE")" || exit 2
shift
[ $# -gt 0 ] || set -- "${STAGES[@]}"
for stage in "$@"; do
    case " ${STAGES[*]} " in
        *" $stage "*) ;;
        *) echo "unknown stage '$stage'; known: ${STAGES[*]}" >&2; exit 2 ;;
    esac
done

cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if ! "$PYTHON" -c 'from importlib.metadata import version; version("densebench")' 2>/dev/null; then
    "$PYTHON" -m pip install --quiet --no-deps --no-build-isolation -e . || echo "not installed; run from the source"
fi
if [ -z "$DEVICE" ]; then
    DEVICE=$("$PYTHON" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")') || exit 2
fi
PROFILE=full KERNEL_PROFILE=default
[ "$DEVICE" = cpu ] && PROFILE=tiny KERNEL_PROFILE=quick
# A hash of all that measures, is measured or tests: what was done for another source or device is done again.
SOURCE=$(find densebench kernels benchmarks tests \( -name '*.py' -o -name '*.[ch]' \) -print0 | sort -z | xargs -0 cat |
    cksum | cut -d' ' -f1)
SOURCE="source $SOURCE on $("$PYTHON" -c 'import sys, torch; from densebench.measure.environment import device_name
print(device_name(torch.device(sys.argv[1])))' "$DEVICE")"
trap archive EXIT  # also when it is interrupted
trap 'exit 130' INT
trap 'exit 143' TERM

status=0
for stage in "$@"; do
    perform "$stage" || status=1
done
echo "page: $PYTHON -m densebench.report $OUT/networks $OUT/kernels --out $OUT/report"
exit $status
