"""The transforms alone: g_a, h_a, h_s and g_s beside those of compressai's mbt2018-mean.

    sightline bench transforms [--short] [--json]

On a picture of the size named, as one batch of one. The peer has random weights and float32; ours the number type that
a service would take, and g_a in bytes, where a service would take that, once more beside it. mbt2018-mean at quality 4
(128 and 192 channels) is the smaller of its two shapes.
"""

import torch
from compressai.zoo import mbt2018_mean

from bench.pictures import FULL_HD, SMALL, VGA, size_name
from bench.report import Report, Say, run
from bench.timing import in_turns
from shared.codec.codec import Codec
from shared.codec.transforms import STRIDE_Y

PEER = "mbt2018-mean"


def measure(short: bool, say: Say) -> Report:
    codec = Codec.load("detection")
    peer = mbt2018_mean(4, pretrained=False).eval()
    sizes = [(128, 192)] if short else [SMALL, VGA, FULL_HD]
    settings = {"dtype": str(codec.dtype), "threads": torch.get_num_threads(), "sizes": [size_name(s) for s in sizes]}
    report = Report("transforms", "g_a, h_a, h_s and g_s, ms a picture", settings)
    for height, width in sizes:
        say(size_name((height, width)))
        rounds = 2 if short else 5 if height < 1000 else 3
        with torch.inference_mode():
            _compare(report, codec, peer, height, width, rounds)
    return report


def _compare(report: Report, codec: Codec, peer: torch.nn.Module, height: int, width: int, rounds: int) -> None:
    arch = codec.bundle.architecture
    hy, wy = -(-height // STRIDE_Y), -(-width // STRIDE_Y)
    hz, wz = -(-hy // 4), -(-wy // 4)
    x = torch.rand(1, 3, hy * STRIDE_Y, wy * STRIDE_Y).to(memory_format=torch.channels_last)
    y = torch.randn(1, arch.m, hy, wy)
    z_hat = torch.randint(-2, 3, (1, arch.z, hz, wz), dtype=torch.int32)
    their_x = torch.rand(1, 3, 64 * -(-height // 64), 64 * -(-width // 64))
    their_y = peer.g_a(their_x)
    their_z = peer.h_a(their_y)
    ours = {
        "g_a": lambda: codec.g_a(x.to(codec.dtype)),
        "h_a": lambda: codec.h_a(y.to(codec.dtype)),
        "h_s": lambda: codec.h_s.prior(z_hat, [4 * 256], (hy, wy)).coding(),
        "g_s": lambda: codec.g_s(y.to(codec.dtype, memory_format=torch.channels_last)),
    }
    theirs = {
        "g_a": lambda: peer.g_a(their_x),
        "h_a": lambda: peer.h_a(their_y),
        "h_s": lambda: peer.h_s(their_z),
        "g_s": lambda: peer.g_s(their_y),
    }
    for name, work in ours.items():
        found = in_turns({"ours": work, PEER: theirs[name]}, rounds)
        report.add(f"{name} {size_name((height, width))}", found["ours"], "ms", peer=(PEER, found[PEER]))
    if codec.g_a_in_bytes is not None:
        rgb = (x * 255).to(torch.uint8)
        found = in_turns({"bytes": lambda: codec.g_a_in_bytes(rgb), "floats": ours["g_a"]}, rounds)
        in_floats = (str(codec.dtype).removeprefix("torch."), found["floats"])
        report.add(f"g_a in bytes {size_name((height, width))}", found["bytes"], "ms", peer=in_floats)
    if codec.h_s.parameters.context:
        prior = codec.h_s.prior(z_hat, [4 * 256], (hy, wy))
        symbols = y.round().to(torch.int32).permute(0, 2, 3, 1).contiguous()
        found = in_turns({"ours": lambda: codec.h_s.given(prior, symbols)}, rounds)
        report.add(f"context model {size_name((height, width))}", found["ours"], "ms")


def main() -> int:
    return run(__doc__, "transforms", measure)


if __name__ == "__main__":
    raise SystemExit(main())
