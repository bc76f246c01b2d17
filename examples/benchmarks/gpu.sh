#!/usr/bin/env bash
# Everything that dorafx claims of a CUDA GPU, in bf16, each part into a file of its own:
#
#     examples/benchmarks/gpu.sh [FOLDER] [PART...]
#
# parts: norm quantised compose layer model decode generate memory compile pass tests tune. tests is `pytest -m gpu`; tune
# searches launch configurations of the row norm. LAYERS (default 8) decoder layers of Qwen3-32B's shape; ROUNDS (default 3);
# PYTHON (default python). FOLDER is results beside this script by default. A part that fails does not stop the rest. compose
# and layer run once for each way to compute the composition: fused by Inductor, by a Triton kernel of its own, and (layer) in
# one Triton kernel with both products. The last line is the balance of FLOPs and bytes for dorafx/cost.py.
#
# QUICK=1 takes tiny sizes and DEVICE=cpu another device, which has no kernels and no tune: to see that the parts run.
set -uo pipefail
all=(norm quantised compose layer model decode generate memory compile pass tests tune)
folder=${1:-$(dirname "$0")/results}
shift || true
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=("${all[@]}")
mkdir -p "$folder"
python=$(command -v "${PYTHON:-python}") || { echo "gpu.sh: there is no ${PYTHON:-python}; set PYTHON" >&2; exit 2; }
[[ $python = /* ]] || python=$PWD/$python
device=${DEVICE:-cuda}
status=0
kernels=()
[ "$device" = cpu ] || kernels=(triton triton_linear)
if [ -n "${QUICK:-}" ]; then
    rounds=1 weights=(64x64:4) width=64 many=16 lengths=(1 16) common=(--seconds 0)
    qwen=(--hidden 64 --layers 1 --rank 4)
else
    rounds=${ROUNDS:-3} weights=(8192x8192:384 8192x28672:384 4096x4096:16) width=8192 many=8192 lengths=(1 16 4096) common=()
    qwen=(--shapes qwen3-32b --layers "${LAYERS:-8}" --rank 384)
fi
long=$((many / 2))

bench() {
    suite=$1
    shift
    "$python" -m dorafx bench "$suite" --device "$device" --dtype bfloat16 --rounds "$rounds" ${common[@]+"${common[@]}"} \
        -o "$folder/gpu-$suite${way:+-$way}.json" "$@" || status=1
}

for part in "${parts[@]}"; do
    case $part in
        norm) bench norm --shapes "${weights[@]}" --against peft peft-inductor dense chunked ;;
        quantised) for w in nf4 bnb8 affine; do way=$w bench norm --weights $w --shapes "${weights[0]}" "${weights[-1]}" --against dense chunked; done ;;
        compose)
            bench compose --tokens "$many" --hidden "$width" --against peft peft-inductor lora
            [ ${#kernels[@]} -eq 0 ] || way=triton bench compose --compose triton --tokens "$many" --hidden "$width" --against lora
            way=eager bench compose --codegen eager --tokens "$many" --hidden "$width" --against lora
            ;;
        layer)
            for tokens in "${lengths[@]}"; do
                for compose in auto ${kernels[@]+"${kernels[@]}"}; do
                    way=$compose-$tokens bench layer --compose "$compose" --shapes "${weights[0]}" --tokens "$tokens" --against peft lora merged
                done
            done
            ;;
        model) bench model "${qwen[@]}" --tokens "$long" --checkpointing --micro-batches 8 --against peft dense chunked lora ;;
        # Without CUDA graphs a decode step measures the host's launching, not the device.
        decode) bench decode "${qwen[@]}" --tokens "$long" --mode reduce-overhead --against peft lora merged ;;
        generate) bench generate "${qwen[@]}" --tokens "$long" --against peft lora ;;
        memory) bench memory "${qwen[@]}" --tokens "$long" --checkpointing --against peft lora ;;
        compile) bench compile "${qwen[@]}" --tokens "$long" --against peft-inductor lora ;;
        pass) bench pass ;;
        tests)
            # The checkout's own settings leave these tests out and share them among processes, which one device is not for.
            (cd "$(dirname "$0")/../.." && "$python" -m pytest -m gpu -n 0 -q -rs) | tee "$folder/gpu-tests.txt" || status=1
            ;;
        tune) "$python" -m dorafx bench --tune --device "$device" | tee "$folder/gpu-tune.txt" || status=1 ;;
        *)
            echo "gpu.sh: unknown part $part; parts are $(echo "${all[*]}" | sed 's/ /, /g')" >&2
            exit 2
            ;;
    esac
done

"$python" - "$folder" "$device" <<'END' || status=1
import sys
from pathlib import Path

from dorafx.bench.results import Results

measured = [r.ceilings for r in map(Results.read, sorted(Path(sys.argv[1]).glob("gpu-*.json"))) if r.ceilings]
if measured:
    matmul, copy = (max(max(c[name].samples) for c in measured) for name in ("matmul", "copy"))
    print(f"dorafx/cost.py: BALANCE[{sys.argv[2]!r}] = {matmul / copy:.1f}  # {matmul:.3g} FLOP/s over {copy:.3g} B/s")
END
exit $status
