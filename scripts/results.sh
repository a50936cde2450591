#!/usr/bin/env bash
# Everything behind docs/results.md, from the shipped teacher and its set: about three hours on two cores.
# A stopped call goes on where it was.
set -euo pipefail
out=${1:-results}
for recipe in mini mini-mmd mini-full-scale mini-full-scale-2; do
  if [ ! -e "$out/$recipe/student.safetensors" ]; then
    if [ -e "$out/$recipe/recipe.yaml" ]; then again=--resume; else again=; fi
    scalewise distill "$recipe" --out "$out/$recipe" $again
  fi
done
scalewise evaluate mini \
  teacher teacher:4 undistilled:full undistilled \
  "scale-wise 4=student:$out/mini" "scale-wise 4 MMD=student:$out/mini-mmd" \
  "full-scale 4=student:$out/mini-full-scale" "full-scale 2=student:$out/mini-full-scale-2" \
  --out "$out/comparison"
python scripts/iteration_times.py --out "$out/iterations.json"
