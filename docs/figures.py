"""Draws the pictures of the pages into docs/figures/: python docs/figures.py [FOLDER]

What stands in them is computed here or read from the committed rows of the benchmarks. tests/test_docs.py
draws them again and compares.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

import segfast
from benchmarks.network_report import network_tables
from benchmarks.networks import FAMILY
from benchmarks.rows import read_rows
from segfast.commands.segment import load_segmenter, overlay, person_mask, refined_mask
from segfast.data import astronaut

ROOT = Path(__file__).resolve().parent.parent
COLORS = ["#4c72b0", "#dd8452", "#55a868", "#c44e52"]
# Text stays text, and equal figures are equal files.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "segfast", "font.size": 9, "axes.titlesize": 10}


def conv2d() -> Figure:
    """Taps of a dilated kernel that meet the image, by zone; and the share that is left of all taps."""
    size, rates = 33, (6, 12, 18)
    figure = Figure((8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    places, dilation = np.arange(size), 18
    along = sum((places + tap >= 0) & (places + tap < size) for tap in (-dilation, 0, dilation))
    taps = np.outer(along, along)
    left.imshow(taps, cmap="Blues", vmin=0, vmax=9)
    for y, x in ((7, 7), (7, 16), (7, 25), (16, 7), (16, 16), (16, 25), (25, 7), (25, 16), (25, 25)):
        left.text(x, y, str(taps[y, x]), ha="center", va="center", fontsize=8)
    left.set_title(f"taps of a 3x3 kernel, dilated by {dilation},\nthat meet an image of {size}x{size}")
    shares = [((size + 2 * (size - rate)) / (3 * size)) ** 2 for rate in rates]
    bars = right.barh(
        [f"dilation {rate}" for rate in rates], [100 * share for share in shares], color=COLORS[0]
    )
    right.bar_label(bars, [f"{share:.0%}" for share in shares], padding=3)
    right.set(xlim=(0, 100), xlabel=f"% of all taps, 3x3 on {size}x{size}", title="taps that are not padding")
    right.invert_yaxis()
    return figure


def conv_transpose2d() -> Figure:
    """The four phases of a 4x4 kernel at stride 2: which taps an output pixel meets."""
    figure = Figure((8, 3.2), layout="constrained")
    kernel, output = figure.subplots(1, 2, width_ratios=(1, 1.6))
    palette = matplotlib.colors.ListedColormap(COLORS)
    for axes, rows, columns, offset in ((kernel, 4, 4, 1), (output, 6, 10, 0)):
        y, x = np.mgrid[:rows, :columns]
        phase = 2 * ((y + offset) % 2) + (x + offset) % 2
        axes.imshow(phase, cmap=palette, vmin=0, vmax=3)
        axes.set(xticks=np.arange(columns + 1) - 0.5, yticks=np.arange(rows + 1) - 0.5)
        axes.grid(color="white", linewidth=2)
        axes.tick_params(length=0, labelbottom=False, labelleft=False)
    for y in range(4):
        for x in range(4):
            kernel.text(x, y, f"w{y}{x}", ha="center", va="center", color="white")
    kernel.set_title("the kernel, 4x4")
    output.set_title("the output at stride 2, padding 1:\na pixel meets the 4 taps of its color, of 16")
    return figure


def separable_conv2d() -> Figure:
    """Multiply-adds and bytes a pixel: dense, as a pair of calls, as one."""
    channels, outputs, width = 256, 256, 2
    figure = Figure((8, 2.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    pair = 9 * channels + channels * outputs
    bars = left.barh(["dense 3x3", "depthwise + 1x1"], [9 * channels * outputs, pair], color=COLORS[:2])
    left.bar_label(bars, [f"{9 * channels * outputs:,}", f"{pair:,}"], padding=3)
    left.set(title=f"multiply-adds a pixel, {channels} to {outputs} channels", xlim=(0, 8e5), xticks=[])
    moved = [width * (channels + channels + channels + outputs), width * (channels + outputs)]
    bars = right.barh(["two calls", "one call"], moved, color=COLORS[1:3])
    right.bar_label(bars, [f"{some:,}" for some in moved], padding=3)
    right.set(title="bytes a pixel read and written, float16", xlim=(0, 2600), xticks=[])
    for axes in (left, right):
        axes.invert_yaxis()
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    return figure


def packed_pool2d() -> Figure:
    """A 4x4 image, the largest of its windows with 2 bits each, and these back in their places."""
    image = torch.tensor([[[[3, 7, 1, 0], [2, 5, 4, 9], [8, 6, 2, 3], [1, 4, 5, 0]]]]).float()
    values, indices = segfast.functional.packed_max_pool2d(image)
    enlarged = segfast.functional.packed_max_unpool2d(values, indices)
    figure = Figure((8, 3.2), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=(1, 0.8, 1))
    titles = ("the image", "largest pixels, and\n2 row + column in 2 bits", "unpooled")
    for axes, pixels, title in zip(panels, (image, values, enlarged), titles, strict=True):
        axes.imshow(
            enlarged[0, 0].numpy() > 0 if pixels is not values else np.ones((2, 2)),
            cmap="Blues",
            vmin=0,
            vmax=2,
        )
        for (y, x), value in np.ndenumerate(pixels[0, 0].numpy()):
            bits = f"\n{int(indices[0, 0, y, x]):02b}" if pixels is values else ""
            axes.text(x, y, f"{value:.0f}{bits}", ha="center", va="center")
        middle = pixels.shape[-1] / 2 - 0.5
        axes.axhline(middle, color="black", linewidth=1)
        axes.axvline(middle, color="black", linewidth=1)
        axes.set(title=title, xticks=[], yticks=[])
    return figure


def segmentation_head() -> Figure:
    """MiB of full-size logits beside those at stride 4."""
    cases = {
        "8 of 512x512, 21 classes": (8, 21, 512, 512),
        "4 of 1024x2048, 19 classes": (4, 19, 1024, 2048),
        "8 of 512x512, 150 classes": (8, 150, 512, 512),
    }
    full = [4 * n * c * h * w / 2**20 for n, c, h, w in cases.values()]
    figure = Figure((8, 2.6), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(cases))
    for shift, values, label, color in (
        (-0.2, full, "logits in full size", COLORS[1]),
        (0.2, [some / 16 for some in full], "logits at stride 4, all that the head reads", COLORS[2]),
    ):
        bars = axes.barh(places + shift, values, 0.38, label=label, color=color)
        axes.bar_label(bars, [f"{some:,.0f}" for some in values], padding=3)
    axes.set(
        yticks=places,
        yticklabels=cases,
        xlim=(0, 1450),
        xlabel="MiB in float32; their gradient takes as much",
    )
    axes.invert_yaxis()
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.42), frameon=False)
    return figure


def networks() -> Figure:
    """The committed rows: how many times as fast as the faster eager layout."""
    files = sorted((ROOT / "benchmarks" / "results").glob(f"*/{FAMILY}.csv"))
    ((title, headers, lines),) = network_tables([row for file in files for row in read_rows(file)])
    lines = [line for line in lines if line[1:3] == ["512x512", "2"] and line[0] != "geometric mean"]
    figure = Figure((8, 0.5 * len(lines)), layout="constrained")
    axes = figure.subplots()
    places, ways = np.arange(len(lines)), ("compile + freezing", "segfast", "eager bf16", "segfast bf16")
    for i, way in enumerate(ways):
        cells = [line[headers.index(way)] for line in lines]
        times = [float(cell) if cell[:1].isdigit() else 0 for cell in cells]
        bars = axes.barh(places + 0.2 * (i - 1.5), times, 0.19, label=way, color=COLORS[i])
        axes.bar_label(bars, cells, padding=2, fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(y=0.01)
    axes.set(yticks=places, yticklabels=[line[0] for line in lines], xlim=(0, 3.2))
    axes.set(xlabel="times as fast as eager fp32 in the faster layout; 512x512, batch 1, two threads")
    axes.set_title(title.partition(":")[0].replace("Whole networks", "Networks"))
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="lower right")
    return figure


def portrait() -> np.ndarray:
    """The astronaut, the person that the network sees, and the mask refined by a dense CRF."""
    photo = astronaut()
    mask = person_mask(load_segmenter(), photo)
    shown = [photo, overlay(photo, mask), overlay(photo, refined_mask(mask, photo))]
    return _beside([F.interpolate(image[None].float(), (300, 300), mode="area")[0] for image in shown])


def dense_crf() -> np.ndarray:
    """A crop, labels with noise, and what 1, 3 and 10 iterations of mean field make of them."""
    crop = astronaut()[:, 40:200, 150:310]
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        gray = F.avg_pool2d(crop.float().mean(0)[None, None], 7, 1, 3)[0, 0]
        labels = torch.bucketize(gray, torch.tensor([70.0, 140.0]))
        logits = 2 * F.one_hot(labels, 3).movedim(-1, 0) + 1.5 * torch.randn(3, 160, 160, generator=generator)
        results = [
            segfast.functional.mean_field(
                -logits,
                crop,
                iterations=n,
                theta_alpha=30,
                theta_beta=20,
                bilateral_weight=4,
                method="lattice",
            ).argmax(0)
            for n in (0, 1, 3, 10)
        ]
    palette = torch.tensor([[40.0, 60, 110], [221, 132, 82], [240, 235, 215]])
    return _beside([crop.float(), *(palette[result].movedim(-1, 0) for result in results)])


def _beside(images: list[torch.Tensor]) -> np.ndarray:
    """Images [3, H, W] in a row, white between them: uint8 [H, W, 3]."""
    padded = [F.pad(image, (0, 8), value=255) for image in images]
    return torch.cat(padded, 2)[..., :-8].clamp(0, 255).round().byte().movedim(0, -1).numpy()


DRAWINGS = {
    f"{draw.__name__}.svg": draw
    for draw in (conv2d, conv_transpose2d, separable_conv2d, packed_pool2d, segmentation_head, networks)
}
PICTURES = {f"{paint.__name__}.jpg": paint for paint in (portrait, dense_crf)}


def main(folder: Path) -> None:
    """Write all of them into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWINGS.items():
        with matplotlib.rc_context(STYLE):
            draw().savefig(folder / name, metadata={"Date": None})
    for name, paint in PICTURES.items():
        Image.fromarray(paint()).save(folder / name, quality=88)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "figures")
