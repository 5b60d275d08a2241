#!/usr/bin/env bash
# The CPU results of record: operators, mixers and blocks, whole models, training steps. See README.md here.
#   benchmarks/cpu.sh [threads] [folder]
set -euo pipefail
cd "$(dirname "$0")/.."
threads=${1:-1}
out=${2:-benchmarks/results/cpu-$threads}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="$threads"
bench() { "${PYTHON:-python3}" -m patchscale.bench "$@" --device cpu --threads "$threads" | tee "$folder.txt"; }
mkdir -p "$out"

folder=$out/ops && bench ops --tokens 196,3136,16384 --peers transformers,native --out "$folder"
folder=$out/model && bench model --tokens 196,784,4096,16384 --width 256,768 --peers transformers,vit,native --out "$folder"
flat() { "${PYTHON:-python3}" benchmarks/flat.py "$@" | tee "$folder.txt"; }
folder=$out/flat && flat --out "$folder"
folder=$out/flat-processes && flat --tokens 784 3136 12544 50176 --processes 5 --out "$folder"
folder=$out/flat-batch && flat --at-once 12544 --out "$folder"
folder=$out/flat-wide && flat --width 768 --tokens 784 3136 12544 50176 --out "$folder"
# A call at 200,704 tokens takes a minute at width 768.
folder=$out/flat-wide-long && flat --width 768 --tokens 784 12544 200704 --processes 1 --rounds 2 --out "$folder"
folder=$out/tiny && bench model --model adventurer_tiny_patch16_224,adventurer_tiny_patch1_224 --peers native,products-kept \
    --repeats 3 --out "$folder"
folder=$out/linear && bench model --tokens 4096 --width 256,768 --peers default-linear --out "$folder"
folder=$out/compiled && bench model --tokens 784,4096 --width 256,768 --peers compiled --out "$folder"
# Attention takes a minute for a call here.
long="--tokens 50176 --width 256 --peers vit,native --repeats 1 --min-seconds 0"
folder=$out/long && bench model $long --out "$folder"
# Where the processor multiplies bfloat16
if grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then
    folder=$out/bfloat16 && bench model --dtype bfloat16 --tokens 784,4096,16384 --width 256,768 \
        --peers transformers,vit,native --out "$folder"
    folder=$out/bfloat16-long && bench model --dtype bfloat16 $long --out "$folder"
fi
