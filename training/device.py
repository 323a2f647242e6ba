"""Device and processes of a run, messages if memory runs out, name and speed of the hardware."""

import os
import platform
import resource
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed import (
    DistBackendError,
    all_gather_object,
    all_reduce,
    broadcast,
    destroy_process_group,
    init_process_group,
    is_initialized,
)

from common.cli import fail
from common.versions import build_of_torch

# Dense half-precision peaks with float32 accumulation, in TFLOP/s, from the vendors' data sheets.
PEAKS = {"RTX 3090": 71, "RTX 4090": 165, "A100": 312, "H100 80GB HBM3": 989, "H200": 989}
LOST = ("by peer", "Broken pipe", "Timed out waiting")  # messages of gloo if another process has ended


def start_processes(args):
    """Join the processes of torchrun, if any. Returns (rank, number of processes, device of this process)."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.gradient_accumulation_steps % world_size:
        fail(
            f"--gradient_accumulation_steps {args.gradient_accumulation_steps} is not divisible by the {world_size} processes: "
            "give a multiple"
        )
    device = args.device
    if device == "mps" and not torch.backends.mps.is_available():
        fail("--device mps, but this machine has none: give --device cpu")
    if device.startswith("cuda"):
        device = pick_card(device, world_size)
    if world_size > 1:
        init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return rank, world_size, device


def end_processes():
    """Wait for every process, then disconnect. torchrun ends all processes if one leaves early."""
    all_reduce(torch.zeros(()))
    destroy_process_group()


def pick_card(device, world_size):
    if not torch.cuda.is_available():
        why = f"torch {build_of_torch()}, sees no CUDA device here"
        fail(f"--device {device}, but {why}: give --preset laptop, or --device cpu --dtype float32")
    if device == "cuda" or world_size > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if int(device.split(":")[1]) >= torch.cuda.device_count():
        fail(f"--device {device}, but {torch.cuda.device_count()} CUDA devices are visible: give a lower number")
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # TF32 for products in float32
    return device


@contextmanager
def ends_in_one_line(args, device, then="--init_from resume continues from last.pt"):
    """Turn Ctrl-C, too little memory or the end of another process into a one-line message. then: how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted: {then}", file=sys.stderr)
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:  # torch has a special class only for CUDA
        if is_initialized() and (isinstance(error, DistBackendError) or any(w in str(error) for w in LOST)):
            print(f"another process of this run ended, see above: {then}", file=sys.stderr)
            sys.exit(1)
        if not out_of_memory(error):
            raise
        fail(f"out of memory on {hardware(device)}: lower --batch_size {args.batch_size} or --block_size {args.block_size}")


def out_of_memory(error):
    words = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(w in str(error) for w in words)


def hardware(device):
    """The name of the GPU, or of the processor with its cores and threads."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def wait_for(device):
    """Wait until the device has finished its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


def matrix_rate(rows, d, device, dtype):
    """
    Measure FLOP/s: the fastest of several products (rows, d) x (d, 4 d), as in an MLP. On a CPU at most 1,024 rows, to save
    time. On a GPU several products between two waits, because a wait takes as long as a product.
    """
    rows, products = (rows, 16) if device.startswith("cuda") else (min(rows, 1024), 1)
    a, b = (torch.randn(shape, device=device).to(getattr(torch, dtype)) for shape in ((rows, d), (d, 4 * d)))
    seconds, end = [], time.perf_counter() + 0.5
    while len(seconds) < 4 or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(products):
            torch.mm(a, b)
        wait_for(device)
        seconds.append((time.perf_counter() - start) / products)
    return 2 * rows * d * 4 * d / min(seconds[1:])  # the first is a warm-up


def settle_dtype(args, device, world_size):
    """Returns (dtype, reason or None). --dtype auto becomes the fastest dtype that the first process measures."""
    if args.dtype != "auto":
        return args.dtype, None
    if device.startswith("cuda"):
        dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        return dtype, f"dtype {dtype}: fast on this GPU"
    if device == "mps":
        return "float32", "dtype float32: auto does not try other dtypes on mps"
    rows = args.batch_size * args.block_size
    rates = torch.tensor([matrix_rate(rows, args.n_embd, device, dtype) for dtype in ("float32", "bfloat16")])
    if world_size > 1:
        broadcast(rates, 0)
    plain, half = (rates / 1e9).tolist()
    dtype = "bfloat16" if half > plain else "float32"
    return dtype, f"dtype {dtype}: products run at {plain:.0f} GFLOP/s in float32, {half:.0f} in bfloat16"


def peak_flops(device, dtype):
    """Peak FLOP/s of the GPU in half precision. None if unknown."""
    name = hardware(device)
    return next((1e12 * peak for known, peak in PEAKS.items() if known in name and dtype != "float32"), None)


def peak_memory(device):
    """Peak memory in bytes: of the GPU, or of the process if it computes on the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def random_state(device, world_size=1):
    """The random states of all processes, for a checkpoint. Every process must call this."""
    own = dict(rng=torch.get_rng_state(), cuda_rng=torch.cuda.get_rng_state(device) if device.startswith("cuda") else None)
    if world_size == 1:
        return own
    states = [None] * world_size
    all_gather_object(states, own)
    return own | dict(other_rngs=states[1:])


def set_random_state(state, device, rank=0):
    """Restore the random states of a checkpoint. A process that the earlier run did not have keeps its own state."""
    states = [state, *state.get("other_rngs", [])]
    if rank < len(states):
        torch.set_rng_state(states[rank]["rng"])
        if device.startswith("cuda") and states[rank]["cuda_rng"] is not None:
            torch.cuda.set_rng_state(states[rank]["cuda_rng"], device)
