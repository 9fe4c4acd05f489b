#!/usr/bin/env bash
# Every stage on the toy world, on a laptop CPU: about 9 minutes on two quiet cores after installing. Ends with one table and
# pictures in runs/demo. Run it again and only what is missing is done.
set -eu
cd "$(dirname "$0")"
. ./venv.sh
step() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() { echo "+ python $*"; "$python" "$@"; }
trap '[ $? = 0 ] || echo "$0: stopped; run it again and it goes on from there" >&2' EXIT
out=runs/demo
mkdir -p $out

step "1/6  The toy world: videos of shapes that act"
# the masks of a split are written last; toy.py refuses to write over manifests of your own
{ [ -e data/probe.masks.npy ] && [ -e data/val.masks.npy ]; } || run data/toy.py

step "2/6  Captions: a tiny BLIP describes three frames of every video"
for split in train val; do run caption.py --data data/$split.csv --model data/toy/blip --batch-size 64; done

step "3/6  Saliency: a tiny CLIP scores every patch against the captions (three ways on val.csv); the codec says what moves"
clip="--clip local-dir:data/toy/clip --moments 8"
for split in train val; do run saliency.py --data data/$split.csv $clip; done
for dense in last value; do run saliency.py --data data/val.csv $clip --dense $dense --out $out/$dense; done
run saliency.py --data data/train.csv --cue motion --grid 8

step "4/6  Masks: the clip, its saliency, its motion and every mask in one picture, and moving"
run masking.py --row 4 --frames 16 --stride 1 --image-size 64 --patch-size 8 --out $out/masks.png --video $out/masks.gif

step "5/6  Pretraining: a tiny video MAE whose text-guided masks hide what the caption names"
run pretrain.py --mask text --size tiny --repeat 4 --batch-size 32 --epochs 8 --warmup-epochs 1 --blr 2.4e-2 \
    --workers 2 --log-every 31 --picture-every 4 --out $out/text --resume auto

step "6/6  Probes: what the frozen features know of action, object and scene; an untrained encoder's as baseline"
printf '%s\n' circle square triangle cross ring moon > $out/shapes.txt
run saliency.py --data data/val.csv --cue classes --clip local-dir:data/toy/clip --classes $out/shapes.txt \
    --prompt "a red {}" "a green {}" "a blue {}" "a yellow {}" "a purple {}" "a white {}"
for label in label object scene; do
    probe="--data data/probe.csv --label-column $label"
    run linprobe.py $probe --checkpoint $out/text/checkpoint.pt
    run linprobe.py $probe --checkpoint none --size tiny --out $out/untrained
done

step "Results"
run data/toy.py --report $out
