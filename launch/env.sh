# shellcheck shell=bash
# Environment of a run on H100 nodes with NVLink and InfiniBand. Sourced by local.sh and slurm.sbatch.
# Every value can be overridden: what is already set stays.

# NCCL. It finds GPUs, NVLink and InfiniBand by itself; only what it cannot know is said here.
: "${NCCL_DEBUG:=WARN}"                # INFO shows the rings and which network card each GPU uses
: "${NCCL_IB_HCA:=mlx5}"               # InfiniBand cards by prefix; name them (=mlx5_0,mlx5_3) if some serve storage only
: "${NCCL_SOCKET_IFNAME:=^lo,docker,veth,virbr}" # start-up traffic: any interface but these
: "${NCCL_IB_TIMEOUT:=22}"             # 4.1 us * 2^22 = 17 s a try: a switch that reroutes does not end the run
: "${NCCL_IB_RETRY_CNT:=7}"
: "${NCCL_NVLS_ENABLE:=1}"             # reductions in the NVSwitch; 0 saves about 1 GB per GPU

# torch.distributed. A collective that hangs is written down (flight recorder) before the watchdog ends the process.
: "${TORCH_FR_BUFFER_SIZE:=2000}"        # collectives that each rank remembers; the launcher's watchdog reads them, too
: "${TORCH_NCCL_DUMP_ON_TIMEOUT:=1}"    # TORCH_FR_DUMP_TEMP_FILE says where to

# Memory: buckets of many shapes fragment fixed segments.
: "${PYTORCH_CUDA_ALLOC_CONF:=expandable_segments:True}"

# Threads. The launcher sets OMP_NUM_THREADS to cores / processes; these would otherwise take every core in every data worker.
: "${OPENBLAS_NUM_THREADS:=1}"
: "${TOKENIZERS_PARALLELISM:=false}"

# Caches, under the project. On a large job name a directory on a local disk: every rank compiles into it.
: "${MEGASORA_CACHE:=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.cache}"
: "${TORCH_EXTENSIONS_DIR:=$MEGASORA_CACHE/torch_extensions}"
: "${TORCHINDUCTOR_CACHE_DIR:=$MEGASORA_CACHE/inductor}"
: "${TRITON_CACHE_DIR:=$MEGASORA_CACHE/triton}"
: "${MPLCONFIGDIR:=$MEGASORA_CACHE/matplotlib}"
: "${HF_HOME:=$MEGASORA_CACHE/huggingface}"

export NCCL_DEBUG NCCL_IB_HCA NCCL_SOCKET_IFNAME NCCL_IB_TIMEOUT NCCL_IB_RETRY_CNT NCCL_NVLS_ENABLE
export TORCH_FR_BUFFER_SIZE TORCH_NCCL_DUMP_ON_TIMEOUT PYTORCH_CUDA_ALLOC_CONF OPENBLAS_NUM_THREADS TOKENIZERS_PARALLELISM
export MEGASORA_CACHE TORCH_EXTENSIONS_DIR TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR MPLCONFIGDIR HF_HOME
