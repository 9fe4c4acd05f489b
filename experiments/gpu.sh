#!/usr/bin/env bash
# All that needs a GPU, in parts of at most nine minutes each. No part needs a network.
#
#   experiments/gpu.sh prepare   on a machine with a network: fills the folder gpu-carry
#   experiments/gpu.sh 1         the tests marked gpu
#   experiments/gpu.sh 2         training steps, captions and saliency, decoding: experiments/gpu.py
#   experiments/gpu.sh 3         profiles of a training step
#   experiments/gpu.sh 4         the study, several cells at once, as many as fit
#   GPU_TINY=1 experiments/gpu.sh N   the same at tiny sizes on a CPU, to try it, into runs/gpu-tiny
#
# To carry: this repository, and the folder gpu-carry beside the README, which holds
#   wheels/    av, open_clip_torch, ftfy, wcwidth: what a machine with torch, torchvision, timm,
#              transformers and pytest may lack. They are installed to a temporary folder
#   clips.csv, clips/   videos for the part that decodes, re-encoded as the README advises
# The toy world is not carried: part 4 makes it, which takes 90 seconds on two cores.
#
# Figures are written as they come, to experiments/results/gpu (GPU_RESULTS: another folder), so
# that a part that is cut off leaves what it has. What is there stays; lines are added.
# gpu-carry is ignored by git: name it to whatever copies the working tree.
#
# GPU_SECONDS (500)           after which parts 1 and 4 are stopped. Part 2 begins no figure after
#                             85 % of it, part 3 after 60 %; each section has 35 seconds' grace
# GPU_PYTHON_VERSION (3.12)   of the machine with the GPU, for the wheels
# GPU_CLIPS                   a manifest or folder of videos to re-encode (default: the first that
#                             experiments/peers.py finds)
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
carry=$root/gpu-carry
results=${GPU_RESULTS:-${GPU_TINY:+runs/gpu-tiny}}
results=${results:-experiments/results/gpu}
[ "${results#/}" != "$results" ] || results=$root/$results
python=python3
[ ! -x .venv/bin/python ] || python=$root/.venv/bin/python
tiny=${GPU_TINY:+--tiny}
limit=${GPU_SECONDS:-500}
cores=$(env -u OMP_NUM_THREADS nproc) # nproc prints OMP_NUM_THREADS where it is set
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

prepare() {
    rm -rf "$carry/wheels" # two versions of one package could not be installed
    mkdir -p "$carry/wheels"
    local name version platforms=()
    for version in 2_28 2_27 2_17; do
        platforms+=(--platform "manylinux_${version}_x86_64")
    done
    for name in av open_clip_torch ftfy wcwidth; do
        version=$("$python" -c "from importlib.metadata import version as v; print(v('$name'))")
        "$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: \
            --python-version "${GPU_PYTHON_VERSION:-3.12}" --implementation cp \
            "${platforms[@]}" --platform manylinux2014_x86_64 \
            -d "$carry/wheels" "$name==$version"
    done
    "$python" experiments/gpu.py clips --out "$carry" ${GPU_CLIPS:+--videos "$GPU_CLIPS"}
    du -sh "$carry"
}

install() { # what is missing here, from the carried wheels
    if [ -z "$tiny" ] && ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"
    then
        echo "no GPU that torch can use; GPU_TINY=1 tries the code on a CPU" >&2
        exit 1
    fi
    mkdir -p "$results"
    if ! "$python" -c "import av, open_clip, ftfy" 2>/dev/null; then
        site=$(mktemp -d)
        "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
            --target "$site" "$carry"/wheels/*.whl
        export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    fi
    "$python" -c "
import platform, torch, torchvision, transformers, av
card = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'
print(card, 'Python', platform.python_version(), 'torch', torch.__version__, 'torchvision',
      torchvision.__version__, 'transformers', transformers.__version__, 'av', av.__version__)
" | tee -a "$results/machine.txt"
    echo "$cores cores" | tee -a "$results/machine.txt"
}

measure() { # measure SECONDS SECTION [FLAG...]: a section of gpu.py, its messages kept
    local seconds=$1 section=$2
    shift 2
    timeout -k 5 "$((seconds + 35))" "$python" experiments/gpu.py "$section" $tiny \
        --seconds "$seconds" --out "$results" "$@" 2>&1 | tee -a "$results/$section.txt" \
        || echo "gpu.py $section: failed, or its time was up" >&2
}

videos=()
[ ! -e "$carry/clips.csv" ] || videos=(--videos "$carry/clips.csv")

case ${1:-} in
prepare) prepare ;;
1)
    install
    beside=(-p no:cacheprovider)
    # side by side: most of a test's time is the start of a process
    processes=$((cores < 16 ? cores / 2 + 1 : 9)) # of ViT-B: nine take less than 80 GB
    [ -n "$tiny" ] || ! "$python" -c "import xdist" 2>/dev/null || beside+=(-n "$processes")
    if [ -n "$tiny" ]; then export TGM_GPU_TESTS=cpu; fi
    # Ctrl-C, after which the failures until then are shown
    timeout -s INT -k 20 "$limit" "$python" -m pytest -v -m gpu tests/test_gpu.py --durations=15 \
        "${beside[@]}" 2>&1 | tee -a "$results/tests.txt"
    ;;
2)
    install
    measure $((limit * 55 / 100)) steps
    measure $((limit * 10 / 100)) stages
    measure $((limit * 20 / 100)) data "${videos[@]}"
    "$python" experiments/gpu.py tables --out "$results"
    ;;
3)
    install
    measure $((limit * 60 / 100)) profile
    "$python" experiments/gpu.py tables --out "$results"
    ;;
4)
    install
    folder=runs/gpu${tiny:+-tiny} # cells of a tiny world must not pass for those of the study
    mkdir -p "$folder"
    cd "$folder"
    jobs=$((cores > 3 ? cores / 3 : 1)) # a cell of the tiny model leaves most of a GPU idle
    workers=$((cores > 3 ? 2 : 0))
    cells=()
    if [ -n "$tiny" ]; then
        [ -e data/val.masks.npy ] || "$python" "$root/data/toy.py" --train 32 --val 24
        cells=(untrained-nce0-seed0 text-0.6-7-epochs-nce1-seed0)
    else
        [ -e data/val.masks.npy ] || "$python" "$root/data/toy.py" --workers "$cores"
        for seed in 0 1 2; do
            cells+=("text-0.6-nce0-seed$seed" "tube-0.6-nce0-seed$seed")
            cells+=("text-0.6-nce1-seed$seed" "tube-0.6-nce1-seed$seed")
        done
    fi
    # SIGTERM stops the study after its step
    left=$((limit > SECONDS ? limit - SECONDS : 1))
    timeout -k 20 "$left" "$python" "$root/experiments/study.py" --jobs "$jobs" --workers "$workers" \
        --results "$results/runs${tiny:+-tiny}.csv" --only "${cells[@]}" 2>&1 \
        | tee -a "$results/study.txt" || true
    for log in runs/study/*/log.jsonl; do # how fast, of cells that were cut off too
        [ ! -e "$log" ] || tail -n 1 "$log" | sed "s|^|$log |" | tee -a "$results/study.txt"
    done
    ;;
*)
    echo "usage: experiments/gpu.sh prepare|1|2|3|4 (its head says what each does)" >&2
    exit 2
    ;;
esac
