#!/usr/bin/env bash
# Everything to be learnt on a GPU, in one go of some minutes:
#
#     benchmarks/gpu.sh PHOTOS > report.txt
#     benchmarks/gpu.sh PHOTOS --small    # in small, on a CPU: shows that all of it works
#
# PHOTOS is a folder of color photos; ./download_landscapes.sh fetches some. A part that fails, or
# takes too long, says so and does not keep the others from running.
set -uo pipefail

if [ $# = 0 ] || [ ! -d "$1" ]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
photos=$(realpath "$1")
cd "$(dirname "$0")/.." || exit
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
sizes=(224 64 32) epochs=4 batch=32 kinds=('--precision fp32' '--precision fp16' --compile)
if [ "${2:-}" = --small ]; then sizes=(16) epochs=1 batch=4 kinds=('--precision fp32'); fi

failed=0
part() {  # command...: its last lines, on one screen with all others
    local start=$SECONDS code=0
    timeout 300 "$@" > "$home/output" 2>&1 || code=$?
    tail -n 6 "$home/output"
    [ $code = 0 ] && return
    echo "FAILED with exit code $code after $((SECONDS - start)) s: $*"
    failed=$((failed + 1))
}

part python benchmarks/gpu.py device
part python -m pytest -n 0 -q tests/test_gpu.py tests/test_fuzz.py
part python benchmarks/gpu.py empty --image_size "${sizes[0]}"
for size in "${sizes[@]}"; do
    part python benchmarks/gpu.py profile --image_size "$size" --batch_size $batch
    part python benchmarks/speed.py steps --image_size "$size" --batch_size $batch
done
for flags in "${kinds[@]}"; do
    # shellcheck disable=SC2086  # a flag and its value are two words
    part python benchmarks/speed.py steps --image_size "${sizes[0]}" --batch_size $batch $flags
done
part python benchmarks/speed.py training --data_path "$photos" --image_size "${sizes[0]}" \
    --repeat 1 --epochs $epochs --batch_size $batch
part python benchmarks/speed.py start --data_path "$photos" --image_size "${sizes[0]}"
echo "All of it took $SECONDS s; $failed parts failed."
exit $((failed > 0))
