#!/usr/bin/env bash
# Everything behind docs/results.md, from the shipped teacher and its set: about three hours on two cores.
# A stopped call goes on where it was.
set -euo pipefail
out=${1:-results}
distill() {  # NAME RECIPE [OVERRIDES]
  if [ ! -e "$out/$1/student.safetensors" ]; then
    if [ -e "$out/$1/recipe.yaml" ]; then again=--resume; else again=; fi
    scalewise distill "${@:2}" --out "$out/$1" $again
  fi
}
# What `scalewise distill mini` makes ships with the package.
distill mini-mmd mini-mmd train.iterations=120 train.batch=8   # as many iterations as the full loss
distill mini-mmd-long mini-mmd                                 # as much time as the full loss
distill mini-full-scale mini-full-scale
distill mini-full-scale-2 mini-full-scale-2
scalewise evaluate mini \
  teacher teacher:4 undistilled:full undistilled \
  "scale-wise 4=student:mini" "scale-wise 4, MMD=student:$out/mini-mmd" \
  "scale-wise 4, MMD, as long=student:$out/mini-mmd-long" \
  "full-scale 4=student:$out/mini-full-scale" "full-scale 2=student:$out/mini-full-scale-2" \
  --out "$out/comparison"
# The same pictures once more, compared with the scale-wise student.
pictures=$out/comparison/pictures
scalewise evaluate mini "scale-wise 4=folder:$pictures/scale-wise-4" "full-scale 4=folder:$pictures/full-scale-4" \
  "full-scale 2=folder:$pictures/full-scale-2" "scale-wise 4, MMD=folder:$pictures/scale-wise-4--MMD" \
  "scale-wise 4, MMD, as long=folder:$pictures/scale-wise-4--MMD--as-long" --out "$out/among-students"
# The real images: `python scripts/mini/data.py` writes mini-work/data.
python scripts/sheet.py "teacher, 28 steps=$pictures/teacher" "undistilled, 4 steps=$pictures/undistilled" \
  "scale-wise 4, full loss=$pictures/scale-wise-4" "scale-wise 4, MMD=$pictures/scale-wise-4--MMD" \
  "scale-wise 4, MMD, as long=$pictures/scale-wise-4--MMD--as-long" \
  "full-scale 4=$pictures/full-scale-4" "full-scale 2=$pictures/full-scale-2" \
  --real mini-work/data --out docs/images/students.png
scalewise bench mini --training --rounds 3 --out "$out/training"
