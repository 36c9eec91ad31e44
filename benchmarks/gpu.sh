#!/usr/bin/env bash
# Everything to be learnt on a GPU, in one go of some minutes, as a report in Markdown:
#
#     benchmarks/gpu.sh PHOTOS > report.md
#     benchmarks/gpu.sh PHOTOS --small > report.md    # in small, on a CPU: shows that all of it works
#
# PHOTOS is a folder of color photos; ./download_landscapes.sh fetches some. A part that fails, or
# takes too long, says so and does not keep the others from running.
set -uo pipefail

if [ $# = 0 ] || [ "$1" = --help ] || [ "$1" = -h ] || [ ! -d "$1" ]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    [ $# = 0 ] || [ "${1#-}" != "$1" ] || echo "no such folder: $1" >&2
    case "${1:-}" in --help | -h) exit 0 ;; *) exit 2 ;; esac
fi
photos=$(realpath "$1")
cd "$(dirname "$0")/.." || exit
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT

seconds=180 limit=1000 epochs=3 size=224 half=64 modes=(eager compiled CUDA-graphs)
one=32 two=256 few=(32 128) many=(16 32 64 128 256)
if [ "${2:-}" = --small ]; then
    seconds=900 limit=16 epochs=1 size=32 half=16 modes=(eager compiled)
    one=4 two=8 few=(4) many=(4 8)
fi

failed=0
part() {  # title, command...
    echo "$1 ..." >&2
    echo
    echo "## $1"
    shift
    echo
    echo "    $*"
    echo
    local start=$SECONDS code=0
    timeout $seconds "$@" > "$home/output" 2>&1 || code=$?
    if grep -q '^|' "$home/output"; then cat "$home/output"; else sed 's/^/    /' "$home/output"; fi
    echo
    case $code in
        0) echo "($((SECONDS - start)) s)" ;;
        124) echo "**stopped after $((SECONDS - start)) s**" ;;
        *) echo "**failed with exit code $code, after $((SECONDS - start)) s**" ;;
    esac
    [ $code = 0 ] || failed=$((failed + 1))
}
speed() { part "$1" python benchmarks/speed.py "${@:2}"; }
gpu() { part "$1" python benchmarks/gpu.py "${@:2}"; }
colorize() {  # title, name of the run, flags...
    part "$1" env -C "$home" python "$PWD/colorize.py" --name "$2" --data_path data/train \
        --image_size $size --small_steps 0 --batch_size $one --val_fraction 0.2 "${@:3}"
}

echo "# benchmarks/gpu.sh $*"
echo
command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total \
    --format=csv
python benchmarks/gpu.py device
python benchmarks/gpu.py split --data_path "$photos" --output "$home/data" || exit

part 'The tests that need a GPU' python -m pytest -n 0 -q -rs tests/test_gpu.py
gpu 'A process that has no photo of a batch' empty --image_size $size
gpu 'The upsampling' upsampling --image_size $size --batch_size $one
gpu "A step at $size" profile --image_size $size --batch_size $one
gpu "A step at $half" profile --image_size $half --batch_size $one
gpu "A step at $half, a large batch" profile --image_size $half --batch_size $two
speed "The network at $size" network --image_size $size --modes eager --batch_sizes "${many[@]}"
speed "The network at $size, by mode" network --image_size $size --modes "${modes[@]}" \
    --batch_sizes "${few[@]}"
speed "The network at $half" network --image_size $half --modes "${modes[@]}" --batch_sizes $one
speed 'The network with upsampling by matrix products' network --image_size $size --modes eager \
    --batch_sizes "${few[@]}" --upsample matmul
for precision in bf16 fp16 fp32; do
    speed "The network in $precision" network --image_size $size --modes eager \
        --batch_sizes $one --precision $precision
done
data=(--data_path "$home/data/train" --limit $limit --image_size $size --batch_size $one)
speed 'Training, against the plain script' training "${data[@]}" --repeat 1
speed 'Time to the plain script'\''s PSNR' quality "${data[@]}" --val_path "$home/data/val" \
    --epochs $epochs
gpu 'The parts of an epoch' epoch --data_path "$home/data/train" --image_size $size \
    --batch_size $one
colorize 'Photos in memory' memory --epochs 2
colorize 'Photos streamed' streamed --epochs 2 --stream
colorize 'A run in float16' resumed --epochs 1 --precision fp16
colorize 'goes on in bfloat16' resumed --epochs 2 --precision bf16 --resume
echo
echo "All of it took $SECONDS s; $failed parts failed."
exit $((failed > 0))
