#!/usr/bin/env bash
# The five verbs at 256 px with real weights: church photos (k = 16) and ten ImageNet classes (k = 10).
#   benchmarks/real256.sh SHARED OUT    SHARED: folder with data/church_224, data/imagenette10_224, weights/taesd and
#   weights/dinov2_small; OUT: where everything goes. STEPS=300 BATCH=16 NAMES="church_224 imagenette10_224" by default.
set -euo pipefail
shared=$1 out=$2
ldm=${LDM_SG:-ldm-sg}
run() { echo "+ $*"; /usr/bin/time -f "%e s, %M KB" "$@"; }
for name in ${NAMES:-church_224 imagenette10_224}; do
  k=16; [ "$name" = imagenette10_224 ] && k=10
  run "$ldm" pack "$shared/data/$name/train" "$out/$name/shards" --size 256
  run "$ldm" annotate configs/annotate/churches256.yaml "shards=$out/$name/shards/*.tar" "out=$out/$name/annotation" \
    "autoencoder=$shared/weights/taesd" features.model=vit_small_patch14_dinov2 features.size=224 features.layer=10 \
    "features.weights=$shared/weights/dinov2_small/model.safetensors" "annotator.k=$k" annotator.restarts=5 flips=false
  run "$ldm" train configs/train/churches256.yaml "annotation=$out/$name/annotation" "out=$out/$name/run" model=s compile=false \
    channels_last=false lr=3e-4 warmup=50 ema=0.99 decay=0.3 objective.kind=v "steps=${STEPS:-300}" "batch_size=${BATCH:-16}" \
    log_every=20 val_every=100 sample_every=0 checkpoint_every=50 workers=0
  run "${PYTHON:-python}" benchmarks/roundtrip_psnr.py "$out/$name/annotation/autoencoder" "$out/$name/shards"
  run "$ldm" sample "$out/$name/run" --cluster 0 --cluster 3 -n 8 --precision auto
  run "$ldm" evaluate "$out/$name/run" --reference "$out/$name/shards" --metrics fd -n 64
done
