"""Whole segmentation networks of several packages, as their users run them: the list, and random weights."""

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from segfast.commands._load_model import import_torchvision
from segfast.ops._case import Case

FAMILY = "networks"
CLASSES = 21
SIDES = (256, 512)
THREADS = ("1", "all")
TINY = 64  # the side of the images where only values are compared


class NetworkCase(Case):
    """Images for a whole network, whose FLOPs are not counted."""

    family = op = FAMILY

    def count_flops(self, useful: bool) -> float:
        return math.nan


@dataclasses.dataclass(frozen=True)
class Network:
    """A network by the name of its rows; `title` says whose it is.

    Of one that is not `steady` a rounding moves whole values to other places.
    """

    name: str
    title: str
    build: Callable[[], nn.Module]
    steady: bool = True


def _torchvision(function: str) -> Network:
    def build() -> nn.Module:
        models = import_torchvision("torchvision.models.segmentation")
        return getattr(models, function)(weights=None, weights_backbone=None, num_classes=CLASSES)

    return Network(f"torchvision_{function}", f"torchvision {function}", build)


def _smp(architecture: str, encoder: str) -> Network:
    def build() -> nn.Module:
        smp = import_torchvision("segmentation_models_pytorch")
        return getattr(smp, architecture)(encoder, encoder_weights=None, classes=CLASSES)

    short = encoder.removeprefix("tu-")
    return Network(f"smp_{architecture.lower()}_{short}", f"smp {architecture}, {encoder}", build)


def _segfast(name: str, num_classes: int = CLASSES, steady: bool = True) -> Network:
    def build() -> nn.Module:
        from segfast.models import create

        return create(name, in_channels=3, num_classes=num_classes)

    return Network(f"segfast_{name}", f"segfast {name}", build, steady)


NETWORKS = {
    network.name: network
    for network in (
        _torchvision("deeplabv3_resnet50"),
        _torchvision("fcn_resnet50"),
        _torchvision("lraspp_mobilenet_v3_large"),
        _smp("Unet", "resnet34"),
        _smp("Linknet", "resnet34"),
        _smp("DeepLabV3Plus", "mobilenet_v2"),
        _smp("DeepLabV3Plus", "tu-xception65"),
        _smp("PAN", "resnet34"),
        _segfast("unet"),
        _segfast("fcn8s"),
        _segfast("fcn8s_alexnet"),
        _segfast("fcn8s_googlenet"),
        _segfast("deeplabv1_vgg16"),
        _segfast("deeplabv2_resnet101"),
        _segfast("deeplabv3_mobilenet_v3_large"),
        _segfast("lraspp_mobilenet_v3_large"),
        _segfast("deeplabv3plus_mobilenet_v2"),
        _segfast("deeplabv3plus_resnet50"),
        _segfast("hypercolumns_vgg16"),
        _segfast("segnet_vgg16", steady=False),  # by the places of maxima
        _segfast("selfie_segmenter", num_classes=1),  # as published
    )
}


def network_cases(cores: int, on_gpu: bool = False) -> Iterator[NetworkCase]:
    """Every network at both sizes: on a CPU with one thread and with one on each core, on a GPU once."""
    threads = ("1",) if on_gpu or cores == 1 else THREADS
    for side in SIDES:
        for count in threads:
            for network in NETWORKS.values():
                yield network_case(network.name, side, "" if on_gpu else count)


def network_case(name: str, side: int, threads: str = "1") -> NetworkCase:
    """One image of `side` by `side`; `threads` is "1", "all" or, on a GPU, empty."""
    network = NETWORKS[name]
    params = {"n": 1, "model": name, "h": side, "w": side, "threads": threads}
    words = {"1": ", one thread", "all": ", a thread on each core", "": ""}[threads]
    title = f"{network.title}, {side}x{side}{words}"
    ending = f"_{threads}t" if threads else ""
    size = "full" if side in SIDES else "tiny"
    return NetworkCase(f"{name}_{side}{ending}", title, params, dtype="float32", size=size)


def draw_images(count: int, side: int, seed: int = 0) -> torch.Tensor:
    """Random images `[count, 3, side, side]` of objects of every size, as photographs are.

    Of white noise the deep layers would see hardly more than its mean.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(count, 3, side, side)
    for cells in (2, 4, 8, 16, side):
        noise = torch.randn(count, 3, cells, cells, generator=generator)
        images += F.interpolate(noise, (side, side), mode="bilinear", align_corners=False)
    return images / images.std()


def build_network(name: str, seed: int = 0) -> nn.Module:
    """The network in eval mode on the CPU, its weights and statistics drawn from `seed`.

    Raises LookupError if the package it is from is not installed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network = NETWORKS[name].build()
        except ImportError as error:
            raise LookupError(f"{NETWORKS[name].title} cannot be built here: {error}") from error
        _draw_zeros(network)
        _settle_norms(network)
    return network.eval()


@torch.no_grad()
def _draw_zeros(network: nn.Module) -> None:
    """Random values for what begins as zeros: scores, biases, the last norm of a residual branch."""
    for parameter in network.parameters():
        if not parameter.any():
            std = 0.1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            parameter.normal_(std=std)


@torch.no_grad()
def _settle_norms(network: nn.Module) -> None:
    """Random affine weights for the batch norms, and the statistics of random images.

    With the statistics of a new norm, 0 and 1, the signal of tens of layers vanishes or overflows; and with
    biases around 0, tens of ReLUs make of it a chaos that doubles every rounding error.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    network.eval()
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.0)
        nn.init.normal_(norm.bias, 0.5, 0.2)
        norm.train()
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    network(draw_images(4, 128))
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
        # Means of whole images hardly differ: divided by so small a deviation, rounding errors would be all.
        norm.running_var.copy_(torch.maximum(norm.running_var, 0.1 * norm.running_mean**2 + 1e-3))
    network.eval()
