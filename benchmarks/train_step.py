"""A training step beside torchvision's own model: ResNet-50 FPN, equal weights, images, proposals and positive regions.

    python benchmarks/train_step.py --size 512

Both take the preset configs/torchvision_v1.yaml stands for, with the same random weights, 512 regions an image of which
the same number are positive, one thread, variants interleaved in one process, medians of CPU time.
The process keeps freed memory as our workers do (`pipeline.allocator`); the peer gains by it as well.
Ratios are the time of torchvision in fp32 over that of the variant: more than 1 is faster. The roof is a convolution of
256 channels in the type of the variant, timed in the same turns (`benchmarks.roof`).
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from benchmarks import peers, turns
from benchmarks.results import Table, has_bf16, show
from benchmarks.turns import Variant
from pipeline import allocator

BATCH_SIZE = 2


def main() -> None:
    """Build both models once, then time each variant in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="side of the images")
    parser.add_argument("--positives", type=int, default=32, help="positive regions an image, of 512")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each variant")
    parser.add_argument("--quick", action="store_true", help="128 px, two rounds")
    parser.add_argument("--fp32-only", action="store_true", help="for processors that only emulate bf16")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    size, rounds = (128, 2) if options.quick else (options.size, options.rounds)
    allocator.restart_keeping_freed_memory()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    batch = peers.make_batch(BATCH_SIZE, (size, size), device)
    proposals = peers.make_proposals(batch, options.positives)
    theirs = peers.torchvision_model(device)
    ours = peers.our_model(theirs, device)
    half = torch.bfloat16
    variants = {
        turns.PEER_FP32: Variant(peers.their_step(theirs, batch, proposals, None), None),
        "ours fp32": Variant(peers.our_step(ours, batch, proposals, None), None),
    }
    if has_bf16() and not options.fp32_only:
        variants[turns.PEER_BF16] = Variant(peers.their_step(theirs, batch, proposals, half, torch.channels_last), half)
        variants["ours bf16"] = Variant(peers.our_step(ours, batch, proposals, half), half)
    timed, roofs = turns.time_in_turns(variants, rounds)
    if not (peers.all_finite(theirs) and peers.all_finite(ours)):
        raise RuntimeError("weights are not finite; the timing would mean nothing")
    title = (
        f"training step, {size} px, batch {BATCH_SIZE}, ResNet-50, 512 regions an image, {options.positives} positive, "
        f"one thread, CPU time, medians of {rounds}"
    )
    rows = turns.rows_of(variants, timed, roofs, lambda seconds: f"{seconds:.2f}", images=1)
    columns = ["variant", "s", *turns.RATIOS, "GFLOP a step", *turns.SPEEDS]
    show(Table("train_step", title, columns, rows, turns.raw_of(timed, roofs)), options.json)


if __name__ == "__main__":
    main()
