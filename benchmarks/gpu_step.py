"""A training step on a GPU beside torchvision's own model at its best: images/s, memory, share of the matrix peak.

    python benchmarks/gpu_step.py --part steps      # benchmarks/gpu.py runs every part, each with its own time limit

Both models have equal weights, images (800 x 1344), proposals, positive regions and frozen layers (stem and first
stage, as recipes have it); steps are timed in turns, between two waits for the device, medians of the turns. The parts:
ceilings (what the card can do), steps (precisions, batch sizes, CUDA graph), phases (where our time goes), compiled.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from benchmarks import peers
from benchmarks.roof import gigaflops_of

HALF = torch.bfloat16
TURNS = 3
LARGE_BATCH = 16  # from here on launches do not matter, and a graph's memory comes on top of the others
WARM_UP = 5  # the first three are eager and the fourth captures, where there is a graph

Row = dict[str, Any]


def seconds_of(run: Callable[[], object], repeats: int) -> float:
    """Mean time of a call, the device waited for before and after."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def ceilings() -> list[Row]:
    """bf16 matrix product and copy of a large buffer."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=HALF) for _ in range(2))
    product = torch.empty_like(a)
    seconds_of(lambda: torch.mm(a, b, out=product), 5)
    flops = 2 * 8192**3 / statistics.median(seconds_of(lambda: torch.mm(a, b, out=product), 10) for _ in range(3))
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds_of(lambda: target.copy_(source), 3)
    copied = 2 * 2**31 / statistics.median(seconds_of(lambda: target.copy_(source), 10) for _ in range(3))
    return [{"bf16_tflops": flops / 1e12, "copy_terabytes_per_second": copied / 1e12}]


def time_in_turns(batch_size: int, makers: dict[str, Callable[[], peers.Step]], report: Callable[[Row], None]) -> None:
    """Warm each variant up, then time them in turns; one that fails is reported and left out."""
    steps: dict[str, peers.Step] = {}
    rows: dict[str, Row] = {}
    repeats: dict[str, int] = {}
    for name, make in makers.items():
        rows[name] = {"variant": name, "batch_size": batch_size}
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        try:
            step = make()
            seconds_of(step, WARM_UP)
            repeats[name] = max(3, round(1.0 / seconds_of(step, 2)))
        except Exception as error:
            rows[name]["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            report(rows[name])
            continue
        rows[name]["warm_up_seconds"] = time.perf_counter() - started
        rows[name]["peak_gigabytes"] = (torch.cuda.max_memory_allocated() - before) / 1e9
        steps[name] = step
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(TURNS):
        for name, step in steps.items():
            try:
                seconds[name].append(seconds_of(step, repeats[name]))
            except torch.OutOfMemoryError as error:  # what the other variants hold adds up
                rows[name]["error"] = str(error)[:200]
                torch.cuda.empty_cache()
    for name, values in seconds.items():
        if not values:
            report(rows[name])
            continue
        median = statistics.median(values)
        rows[name] |= {"seconds": values, "images_per_second": batch_size / median}
        report(rows[name])


class Models:
    """Both models, and makers of their steps for a batch size."""

    def __init__(self, canvas: peers.Canvas, positives: int) -> None:
        self.canvas, self.positives, self.device = canvas, positives, torch.device("cuda")
        self.theirs = peers.torchvision_model(self.device, trained_stages=3)
        self.ours = peers.our_model(self.theirs, self.device)

    def makers(self, batch_size: int, dtype: torch.dtype | None, suffix: str) -> dict[str, Callable[[], peers.Step]]:
        """torchvision, ours, and ours as a CUDA graph."""
        batch = peers.make_batch(batch_size, self.canvas, self.device)
        proposals = peers.make_proposals(batch, self.positives)
        form = torch.contiguous_format if dtype is None else torch.channels_last
        makers: dict[str, Callable[[], peers.Step]] = {
            f"torchvision {suffix}": lambda: peers.their_step(self.theirs, batch, proposals, dtype, form),
            f"ours {suffix}": lambda: peers.our_step(self.ours, batch, proposals, dtype),
        }
        if batch_size < LARGE_BATCH:
            makers[f"ours {suffix}, CUDA graph"] = lambda: peers.our_graphed_step(self.ours, batch, proposals, dtype)
        return makers

    def teraflops(self, batch_size: int) -> float:
        """Floating-point operations of our step, convolutions and matrix products, forward and backward."""
        batch = peers.make_batch(batch_size, self.canvas, self.device)
        step = peers.our_step(self.ours, batch, peers.make_proposals(batch, self.positives), HALF)
        return gigaflops_of(step) / 1000

    def finite(self) -> Row:
        """Whether the timed steps meant something."""
        return {"finite": {"torchvision": peers.all_finite(self.theirs), "ours": peers.all_finite(self.ours)}}


def steps(options: argparse.Namespace, report: Callable[[Row], None]) -> None:
    """Batch sizes in bf16, fewer positives, then the other precisions."""
    models = Models(options.canvas, options.positives)
    for batch_size in options.batch_sizes:
        time_in_turns(batch_size, models.makers(batch_size, HALF, "bf16, channels last"), report)
    report({"teraflops_per_image": models.teraflops(2) / 2})
    report(models.finite())
    models.positives = 32
    time_in_turns(8, models.makers(8, HALF, "bf16, channels last, 32 positive"), report)
    models.positives = options.positives
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    time_in_turns(2, models.makers(2, None, "TF32"), report)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    time_in_turns(2, models.makers(2, None, "fp32"), report)


def compiled(options: argparse.Namespace, report: Callable[[Row], None]) -> None:
    """One of the two models with its networks compiled, at one batch size."""
    models = Models(options.canvas, options.positives)
    batch_size = options.batch_sizes[0]
    makers = models.makers(batch_size, HALF, "bf16, channels last, compiled")
    if options.model == "torchvision":
        heads = models.theirs.roi_heads
        parts = (heads.box_head, heads.box_predictor, heads.mask_head, heads.mask_predictor)
        for part in (models.theirs.backbone, models.theirs.rpn.head, *parts):
            part.compile(dynamic=False)
        time_in_turns(batch_size, {name: make for name, make in makers.items() if "torchvision" in name}, report)
    else:
        from model.compiled import compile_parts

        compile_parts(models.ours)
        matching = torch.compile(_original("match_anchors"), dynamic=False)
        mock.patch("model.mask_rcnn.match_anchors", matching).start()
        time_in_turns(batch_size, {name: make for name, make in makers.items() if "ours" in name}, report)


PHASES = ("features", "rpn", "_rpn_losses", "propose", "_box_losses", "_mask_loss")


def phases(options: argparse.Namespace, report: Callable[[Row], None]) -> None:
    """Where our time goes: parts of the forward pass, backward, update, and the longest kernels."""
    models = Models(options.canvas, options.positives)
    batch_size = options.batch_sizes[0]
    batch = peers.make_batch(batch_size, options.canvas, models.device)
    proposals = peers.make_proposals(batch, options.positives)
    step = peers.our_step(models.ours, batch, proposals, HALF)
    seconds_of(step, WARM_UP)
    marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def timed(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            result = run(*arguments, **options)
            end.record()
            marks.append((name, start, end))
            return result

        return call

    ours = models.ours
    wrapped = [mock.patch.object(ours, name, timed(name, getattr(ours, name))) for name in PHASES if name != "rpn"]
    wrapped.append(mock.patch.object(ours.rpn, "forward", timed("rpn", ours.rpn.forward)))
    wrapped.append(mock.patch.object(torch.Tensor, "backward", timed("backward", torch.Tensor.backward)))
    wrapped.append(mock.patch.object(peers.Optimizer, "update", timed("update", peers.Optimizer.update)))
    wrapped.append(mock.patch("model.mask_rcnn.match_anchors", timed("match", _original("match_anchors"))))
    wrapped.append(mock.patch("model.mask_rcnn.sample_regions", timed("sample", _original("sample_regions"))))
    wrapped.append(mock.patch("model.mask_rcnn.crop_mask_targets", timed("targets", _original("crop_mask_targets"))))
    wrapped.append(mock.patch("model.mask_rcnn.pyramid_roi_align", timed("roi_align", _original("pyramid_roi_align"))))
    for patch in wrapped:
        patch.start()
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    for patch in wrapped:
        patch.stop()
    milliseconds: dict[str, float] = {}
    for name, start, end in marks:
        milliseconds[name] = milliseconds.get(name, 0.0) + start.elapsed_time(end) / 5
    report({"batch_size": batch_size, "milliseconds": milliseconds})
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for name, run in (("ours", step), ("torchvision", models.makers(batch_size, HALF, "x")["torchvision x"]())):
        seconds_of(run, 2)
        with torch.profiler.profile(activities=activities) as profile:
            run()
            torch.cuda.synchronize()
        on_device = [event for event in profile.key_averages() if str(event.device_type).endswith("CUDA")]
        kernels = [event for event in on_device if not getattr(event, "is_user_annotation", False)]
        kernels.sort(key=lambda event: -event.self_device_time_total)
        report(
            {
                "model": name,
                "batch_size": batch_size,
                "kernel_milliseconds": sum(event.self_device_time_total for event in kernels) / 1000,
                "launches": sum(event.count for event in kernels),
                "kernels": [
                    {"name": event.key[:110], "ms": event.self_device_time_total / 1000, "count": event.count}
                    for event in kernels[:45]
                ],
            }
        )


def _original(name: str) -> Callable[..., Any]:
    import model.mask_rcnn

    found: Callable[..., Any] = getattr(model.mask_rcnn, name)
    return found


def main() -> None:
    """Run one part and print each result as a line of JSON as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["ceilings", "steps", "compiled", "phases"], required=True)
    parser.add_argument("--canvas", type=int, nargs=2, default=(800, 1344), help="rows and columns")
    parser.add_argument("--positives", type=int, default=128, help="positive regions an image, of 512")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 2, 4, 16])
    parser.add_argument("--model", choices=["ours", "torchvision"], default="ours", help="which one is compiled")
    parser.add_argument("--json", type=Path, help="where to append the results, a line each")
    options = parser.parse_args()
    options.canvas = tuple(options.canvas)
    torch.backends.cudnn.benchmark = True

    def report(row: Row) -> None:
        line = json.dumps({"part": options.part, **row})
        print(line if len(line) < 600 else line[:600] + " ...", flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(line + "\n")

    if options.part == "ceilings":
        for row in ceilings():
            report({"device": torch.cuda.get_device_name(), "torch": torch.__version__, **row})
    else:
        {"steps": steps, "compiled": compiled, "phases": phases}[options.part](options, report)


if __name__ == "__main__":
    main()
