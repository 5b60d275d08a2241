#!/usr/bin/env bash
# The GPU results of record, on a machine that has PyTorch, Triton and timm and no network. See README.md here.
#   benchmarks/gpu.sh [ops|model|train|compiled|all] [folder]
# PEERS=folder adds a folder of unpacked packages (mamba_ssm, fla, einops) to the import path.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-all}
out=${2:-benchmarks/results/gpu}
export PYTHONPATH="$PWD/src${PEERS:+:$PEERS}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
bench() { # name, then the command's words
    local folder=$out/$1
    shift
    "${PYTHON:-python3}" -m patchscale.bench "$@" --device cuda --dtype bfloat16 --out "$folder" | tee "$folder.txt"
}
case $what in ops | model | train | compiled | all) ;; *) echo "usage: $0 [ops|model|train|compiled|all] [folder]" >&2; exit 2 ;; esac
mkdir -p "$out"

if [[ $what == ops || $what == all ]]; then
    bench ops ops --tokens 196,784,3136,12544,50176 --heads 8,24 --decay fresh,mild --batch 8
fi
if [[ $what == model || $what == all ]]; then
    bench model model --tokens 196,784,3136,12544,50176 --width 256,768 --batch 8 --peers vit,mamba-ssm
fi
# The same number of tokens, 50,176, in every step.
names=$(printf ',adventurer_base_patch%s_224' 16 8 4 2 1)
if [[ $what == train || $what == all ]]; then
    bench train train --model "${names#,}" --batch 256,64,16,4,1 --peers vit,mamba-ssm,products-kept
fi
# What torch.compile, CUDA graphs and float8 add; compiling takes minutes. Who is not installed is left out.
if [[ $what == compiled || $what == all ]]; then
    bench compiled train --model adventurer_base_patch16_224,adventurer_base_patch1_224 --batch 256,1 \
        --peers compiled,float8
    bench graphed model --model adventurer_tiny_patch16_224,adventurer_base_patch16_224 --batch 1 --peers compiled,graphed
fi
