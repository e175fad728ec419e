"""What a table will take before it is begun: operations, disk and, by an estimate, GPU hours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from calguide_fast.generation.presets import PRESETS
from calguide_fast.schedule import Schedule
from calguide_fast.studies.cost import classifier_cost, image_shape, unet_cost
from calguide_fast.studies.gpus import PEAKS, UTILISATION, sustained
from calguide_fast.studies.markdown import markdown_table
from calguide_fast.studies.series import Point

INT64_BYTES = 8  # of a label, and of a seed
MEASURED_ROW = "js"  # whose images per second --images-per-second is


@dataclass(frozen=True)
class RowForecast:
    """Of one row.

    Attributes:
        name: of the row.
        images: how many are sampled.
        evaluations: of each network for each image.
        unet_flops: of one evaluation.
        classifier_flops: of one evaluation and its gradient; 0 without guidance.
        disk_bytes: of the shards and the .npz file.
    """

    name: str
    images: int
    evaluations: int
    unet_flops: int
    classifier_flops: int
    disk_bytes: int

    @property
    def flops_per_image(self) -> int:
        return self.evaluations * (self.unet_flops + self.classifier_flops)

    @property
    def flops(self) -> int:
        return self.images * self.flops_per_image


def forecast(point: Point) -> RowForecast:
    """Count what a point of DDPM or DDIM steps takes; its files are not needed."""
    job = point.job
    preset = job.options.preset
    pixels = prod(image_shape(preset))
    return RowForecast(
        point.name,
        len(job.plan),
        len(Schedule.of(PRESETS[preset].schedule).respaced(job.steps)),
        unet_cost(preset).flops,
        sum(classifier_cost(classifier, preset).flops for classifier in job.sources.architectures),
        len(job.plan) * (2 * pixels + 2 * INT64_BYTES),
    )


def rate_of(
    rows: Sequence[RowForecast],
    dtype: str,
    tflops: float | None = None,
    images_per_second: float | None = None,
    gpu: str | None = None,
    utilisation: float | None = None,
) -> tuple[float, str] | None:
    """TFLOP/s of one GPU, and where they come from; None if nothing is given.

    Args:
        rows: all that are planned.
        dtype: of the networks.
        tflops: what one GPU reaches in sampling.
        images_per_second: what one GPU reaches on the row :data:`MEASURED_ROW`, or else on the costliest.
        gpu: a name of :data:`PEAKS`.
        utilisation: share of that GPU's peak; None for :data:`UTILISATION`.

    Raises:
        ValueError: more than one is given, or a number that is not positive.
    """
    given = {"tflops": tflops, "images-per-second": images_per_second, "gpu": gpu}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)}: give one of them")
    if utilisation is not None and gpu is None:
        raise ValueError(f"utilisation={utilisation} is of a --gpu's peak: name one")
    for name, number in (("tflops", tflops), ("images-per-second", images_per_second)):
        if number is not None and not number > 0:
            raise ValueError(f"{name} must be positive, got {number}")
    if tflops is not None:
        return tflops, f"{tflops:g} TFLOP/s on each GPU, as given"
    if images_per_second is not None:
        row = next((row for row in rows if row.name == MEASURED_ROW), max(rows, key=lambda row: row.flops_per_image))
        rate = images_per_second * row.flops_per_image / 1e12
        return rate, f"{images_per_second:g} images/s on each GPU for {row.name}, as given: {rate:.4g} TFLOP/s"
    if gpu is not None:
        share = UTILISATION if utilisation is None else utilisation
        how = "assumed" if utilisation is None else "given"
        return sustained(gpu, dtype, share), (
            f"{gpu}: {share:.0%} ({how}) of its data sheet's {PEAKS[gpu][dtype]:g} TFLOP/s in {dtype}"
        )
    return None


def gpu_hours(flops: int, tflops: float) -> float:
    """Hours of one GPU at a rate."""
    return flops / (tflops * 1e12) / 3600


def forecast_text(rows: Sequence[RowForecast], dtype: str, rate: tuple[float, str] | None, gpus: int) -> str:
    """The forecast as Markdown; hours are those of the rate, or of every GPU in :data:`PEAKS` by assumption.

    Args:
        rows: all that are planned.
        dtype: of the networks.
        rate: as :func:`rate_of` gives it.
        gpus: among which the hours are divided.
    """
    headings = ["row", "images", "steps", "UNet GFLOP", "classifier GFLOP", "TFLOP/image", "EFLOP", "GB"]
    cells = [
        [
            row.name,
            f"{row.images:,}",
            str(row.evaluations),
            f"{row.unet_flops / 1e9:.1f}",
            f"{row.classifier_flops / 1e9:.1f}",
            f"{row.flops_per_image / 1e12:.1f}",
            f"{row.flops / 1e18:.3f}",
            f"{row.disk_bytes / 1e9:.2f}",
        ]
        for row in rows
    ]
    flops = sum(row.flops for row in rows)
    total = ["all", f"{sum(row.images for row in rows):,}", "", "", "", "", f"{flops / 1e18:.3f}"]
    cells.append([*total, f"{sum(row.disk_bytes for row in rows) / 1e9:.2f}"])
    if rate is not None:
        headings.append("GPU hours")
        for row, line in zip(rows, cells):
            line.append(f"{gpu_hours(row.flops, rate[0]):.1f}")
        cells[-1].append(f"{gpu_hours(flops, rate[0]):.1f}")
    text = markdown_table(headings, cells)
    text += (
        "\nFLOP: two for each multiply-add of convolutions, matrix products and attention, counted on the networks;\n"
        "the classifier's with its gradient. Evaluation adds less than 1 %. GB: shards and .npz, both on the disk.\n"
    )
    if rate is None:
        text += f"\nHours at {UTILISATION:.0%} of data sheets in {dtype}, an assumption (--gpu, --utilisation):\n\n"
        hours = {gpu: gpu_hours(flops, sustained(gpu, dtype, UTILISATION)) for gpu in PEAKS}
        lines = [[gpu, f"{found:.1f}", f"{found / gpus:.1f}"] for gpu, found in hours.items()]
        text += markdown_table(["GPU", "GPU hours", f"hours on {gpus}"], lines)
    else:
        hours_in_all = gpu_hours(flops, rate[0])
        text += f"\n{rate[1]}: {hours_in_all:.1f} GPU hours, {hours_in_all / gpus:.1f} hours on {gpus}.\n"
    return text + "\nThe hours are an estimate, not a measurement.\n"
