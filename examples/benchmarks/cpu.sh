#!/usr/bin/env bash
# Everything that dorafx claims of a CPU, in fp32, each part into a JSON file of its own, and the page of them all:
#
#     examples/benchmarks/cpu.sh [FOLDER] [PART...]      parts: demo norm compose layer model generate memory compile host pass parity
#
# PYTHON (default python). FOLDER is results beside this script by default. All parts but parity take about an hour on two idle
# cores; on busy ones they are worth nothing. A part that fails does not stop the rest.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-$here/results}
shift || true
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(demo norm compose layer model generate memory compile host pass parity)
mkdir -p "$folder"
python=${PYTHON:-python}
status=0

bench() {
    name=$1
    shift
    "$python" -m dorafx bench "$@" --device cpu -o "$folder/cpu-$name.json" || status=1
}

for part in "${parts[@]}"; do
    case $part in
        demo)
            made=$(mktemp -d)
            "$python" -m dorafx demo --out "$made" && cp "$made/results.json" "$folder/cpu-demo.json" || status=1
            rm -r "$made"
            ;;
        norm) bench norm norm --rounds 4 --seconds 0.3 ;;
        compose) bench compose compose --rounds 1 ;;
        layer) bench layer layer --against peft dense chunked lora --rounds 1 ;;
        model)
            bench model model decode --layers 2 --against peft lora --rounds 4 --seconds 2
            "$python" -m dorafx bench --plot "$folder/cpu-model.json" -o "$folder/cpu-model.png" || status=1
            ;;
        generate) bench generate generate --layers 2 --tokens 64 --rounds 3 --seconds 4 ;;
        memory) bench memory memory --layers 2 --against peft lora --rounds 1 --seconds 0.1 ;;
        compile)
            small=(--hidden 256 --rank 16 --tokens 64 --rounds 1 --seconds 0.1)
            bench compile compile --layers 4 --against lora "${small[@]}"
            bench compile-scope-modules compile --scope modules --layers 4 16 64 --against none "${small[@]}"
            bench compile-scope-blocks compile --scope blocks --layers 4 16 64 --against none "${small[@]}"
            ;;
        host) bench host host --rounds 4 --seconds 1 ;;
        pass) bench pass pass --rounds 1 ;;
        parity) "$python" "$here/parity.py" --rate 2e-4 --out "$folder/cpu-parity.json" || status=1 ;;
        *)
            echo "cpu.sh: unknown part $part; parts are demo, norm, compose, layer, model, generate, memory, compile, host, pass, parity" >&2
            exit 2
            ;;
    esac
done
"$python" "$here/page.py" "$folder" || status=1
exit $status
