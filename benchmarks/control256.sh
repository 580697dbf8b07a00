#!/usr/bin/env bash
# Do samples follow boxes (Penn-Fudan, LOST) and masks (CamVid, STEGO)? All verbs at 256 px, a 5M network.
#   benchmarks/control256.sh SHARED OUT    SHARED: folder with data/pennfudan_256, data/camvid_256, weights/taesd and
#   weights/dinov2_small; OUT: where everything goes. NAMES="boxes masks" N=128 by default.
set -euo pipefail
shared=$1 out=$2
ldm=${LDM_SG:-ldm-sg}
run() { echo "+ $*"; /usr/bin/time -f "%e s, %M KB" "$@"; }
g="features.model=vit_small_patch14_dinov2 features.weights=$shared/weights/dinov2_small/model.safetensors features.layer=10"
net="channels: 48, multipliers: [1, 2, 4], blocks: 1, attention: [4], heads: 4"
for name in ${NAMES:-boxes masks}; do
  if [ "$name" = boxes ]; then
    data="$shared/data/pennfudan_256/images --annotations $shared/data/pennfudan_256/boxes.json"
    config=voc256-boxes model="{$net}" steps=10000
    f="features.size=448 annotator.k=8 annotator.centre=true annotator.centre_place=0.5 annotator.keys_flips=true"
    f="$f annotator.k_patches=5"
  else
    data="$shared/data/camvid_256/train --masks $shared/data/camvid_256/train_masks --ignore-index 11"
    config=cocostuff256-segments model="{$net, tokens: concepts}" steps=5000
    f="features.size=224 annotator.k=11 annotator.segments.flips=false"
  fi
  set -- $data && src=$1 && shift
  run "$ldm" pack "$src" "$out/$name/shards" "$@" --size 256
  run "$ldm" annotate "configs/annotate/$config.yaml" "shards=$out/$name/shards/*.tar" "out=$out/$name/annotation" \
    "autoencoder=$shared/weights/taesd" flips=true $g $f
  run "$ldm" train "configs/train/$config.yaml" "annotation=$out/$name/annotation" "out=$out/$name/run" "model=$model" \
    "steps=${STEPS:-$steps}" batch_size=8 lr=5e-4 warmup=100 decay=0.3 ema=0.998 objective.kind=v \
    objective.schedule=squaredcos_cap_v2 compile=false channels_last=true workers=0 \
    val_every=1000 sample_every=1000 checkpoint_every=500
  run "$ldm" sample "$out/$name/run" -n 16 --precision auto
  for w in 0 1 2; do
    run "$ldm" evaluate "$out/$name/run" --reference "$out/$name/shards" --metrics fd,layout -n "${N:-128}" --w "$w" --batch-size 16
  done
done
