"""Skip-Tuning: which skip is scaled by what, off to the bit, and on the way from the command line to the images."""

import json

import pytest
import torch

from eval.sampling.image_set import generate
from pipelines import load
from pipelines.families import edm, sd, tiny
from pipelines.inference import skip_tuning


@pytest.fixture(scope="module", params=("sd", "edm"))
def net(request):
    torch.manual_seed(0)
    return (sd.unet(layers_per_block=2) if request.param == "sd" else edm.unet((8, 16), layers=2)).eval()


@torch.no_grad()
def output(net):
    x = torch.randn(2, net.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    if hasattr(net, "mid_block") and net.config.get("cross_attention_dim"):
        return net(x, torch.tensor([3, 900]), torch.ones(2, 5, 32)).sample
    return net(x, torch.tensor([3, 900]), class_labels=torch.tensor([0, 1])).sample


def read(net):
    """What the layers of the decoder are given, in the order in which they read it, and the output."""
    found = []
    keep = lambda module, args, *_: found.append(args[0])
    handles = [layer.register_forward_pre_hook(keep) for block in net.up_blocks for layer in block.resnets]
    out = output(net)
    for handle in handles:
        handle.remove()
    return found, out


def test_off(net):
    """Factors of one are the network to the bit; so is it after a block that was left, by an error too."""
    _, plain = read(net)
    with skip_tuning.scale_skips(net, 1.0):
        assert torch.equal(output(net), plain)
    with pytest.raises(RuntimeError), skip_tuning.scale_skips(net, 0.7):
        assert (output(net) - plain).abs().max() > 1e-4
        raise RuntimeError
    assert torch.equal(output(net), plain)


def test_every_skip_has_its_own_factor(net):
    """Layer i reads rho_i times what it read, the deepest first; one factor alone leaves the others as they were."""
    plain, _ = read(net)
    n, deepest = len(plain), plain[0].shape[-1]
    assert n == 6 and all(deepest < x.shape[-1] for x in plain[3:])
    widths = [down.shape[1] for down in encoder(net)]  # of the skips
    factors = [0.3 + 0.1 * i for i in range(n)]
    for rho in (factors, [0.5] + [1.0] * (n - 1)):
        handles = skip_tuning.install_factors(net, rho)
        tuned, _ = read(net)
        for handle in handles:
            handle.remove()
        for one, share, width, was in zip(tuned, rho, widths, plain, strict=True):
            torch.testing.assert_close(one[:, -width:], share * was[:, -width:], rtol=1e-6, atol=1e-6)
    assert torch.equal(tuned[0][:, : -widths[0]], plain[0][:, : -widths[0]])  # what comes from below is not scaled


def encoder(net):
    """The encoder's outputs that are kept for the decoder, the deepest first."""
    found, keep = [], lambda module, args, out: found.append(out[0] if isinstance(out, tuple) else out)
    layers = [net.conv_in]
    for block in net.down_blocks:
        layers += [*(getattr(block, "attentions", None) or block.resnets), *(block.downsamplers or ())]
    handles = [layer.register_forward_hook(keep) for layer in layers]
    output(net)
    for handle in handles:
        handle.remove()
    return found[::-1]


def test_line(net):
    """From the bottom to the top, both reached; the number of factors has to be right."""
    assert skip_tuning.skip_factors(net, 0.5) == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert skip_tuning.skip_factors(net, 0.8, 0.3) == pytest.approx([0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    with pytest.raises(ValueError, match="5 factors of skips, and this UNet2D.*Model has 6"):
        skip_tuning.install_factors(net, [1.0] * 5)


def test_generate(tmp_path):
    """A student's images by a flag: the manifest and the request say so, 1 makes the same ones, a folder has one."""
    torch.manual_seed(0)
    model = tmp_path / "student"
    edm.pipeline(edm.unet((8, 16)), 0.5, 2.5, 2).save_pretrained(model)
    (model / "distill.json").write_text(json.dumps({"student": True, "steps": 2}))
    plain, one, less = (generate(model, tmp_path / f"{r}", 4, rows=4, skip_tuning=r) for r in (None, 1.0, 0.8))
    assert plain["hash"] == one["hash"] != less["hash"]
    assert less["skip_tuning"] == less["request"]["skip_tuning"] == 0.8 and "skip_tuning" not in plain["request"]
    with pytest.raises(ValueError, match=r"another run \(skip_tuning 0.8, not None\)"):
        generate(model, tmp_path / "0.8", 4, rows=4)
    with pytest.raises(ValueError, match="skip_tuning is -1.0; it must be at least 0"):
        generate(model, tmp_path / "x", 4, skip_tuning=-1.0)


def test_refused(tmp_path):
    tiny.save("pixart", tmp_path)
    with (
        pytest.raises(ValueError, match="a PixArtTransformer2DModel has no decoder with skips"),
        skip_tuning.scale_skips(load(tmp_path).denoiser.net, 0.8),
    ):
        pass
