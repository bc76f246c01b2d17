#!/usr/bin/env bash
# Everything that dorafx claims of a CUDA GPU, in bf16, each part into a JSON file of its own:
#
#     examples/benchmarks/gpu.sh [FOLDER] [PART...]      parts: norm quantised compose layer model decode memory compile
#
# LAYERS (default 8) decoder layers of Qwen3-32B's shape; ROUNDS (default 3); PYTHON (default python). FOLDER is results
# beside this script by default. A part that fails does not stop the rest. compose and layer run once for each way to compute
# the composition: fused by Inductor, by a Triton kernel of its own, and (layer) in one Triton kernel with both products.
set -uo pipefail
folder=${1:-$(dirname "$0")/results}
shift || true
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(norm quantised compose layer model decode memory compile)
mkdir -p "$folder"
status=0

bench() {
    suite=$1
    shift
    "${PYTHON:-python}" -m dorafx bench "$suite" --device cuda --dtype bfloat16 --rounds "${ROUNDS:-3}" -o "$folder/gpu-$suite${way:+-$way}.json" "$@" || status=1
}

qwen=(--shapes qwen3-32b --layers "${LAYERS:-8}" --rank 384 --tokens 4096)
for part in "${parts[@]}"; do
    case $part in
        norm) bench norm --shapes 8192x8192:384 8192x28672:384 4096x4096:16 --against peft peft-inductor dense chunked ;;
        quantised) for w in nf4 bnb8 affine; do way=$w bench norm --weights $w --shapes 8192x8192:384 4096x4096:16 --against dense chunked; done ;;
        compose)
            bench compose --tokens 8192 --hidden 8192 --against peft peft-inductor lora
            way=triton bench compose --compose triton --tokens 8192 --hidden 8192 --against lora
            way=eager bench compose --codegen eager --tokens 8192 --hidden 8192 --against lora
            ;;
        layer)
            for tokens in 1 16 4096; do
                for compose in auto triton triton_linear; do
                    way=$compose-$tokens bench layer --compose "$compose" --shapes 8192x8192:384 --tokens "$tokens" --against peft lora merged
                done
            done
            ;;
        model) bench model "${qwen[@]}" --checkpointing --micro-batches 8 --against peft dense chunked lora ;;
        # Without CUDA graphs a decode step measures the host's launching, not the device.
        decode) bench decode "${qwen[@]}" --mode reduce-overhead --against peft lora merged ;;
        memory) bench memory "${qwen[@]}" --checkpointing --against peft lora ;;
        compile) bench compile "${qwen[@]}" --against peft-inductor lora ;;
        *)
            echo "gpu.sh: unknown part $part; parts are norm, quantised, compose, layer, model, decode, memory, compile" >&2
            exit 2
            ;;
    esac
done
exit $status
