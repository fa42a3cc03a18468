"""The DDPM++ network by itself; its numbers are held to a second implementation in test_edm_convert.py."""

import pytest
import torch

from pipelines.edm_nets import SongUNet


def tiny(**options):
    small = {"sample_size": 8, "stem": 16, "widths": (16, 32), "layers": 1, "attention": (4,)}
    return SongUNet(**small | options)


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_size_of_the_published_network():
    """What the authors' program prints for FFHQ-64: all weights, a block, the last norm and convolution."""
    with torch.device("meta"):
        net = SongUNet(sample_size=64, widths=(128, 256, 256, 256), augment_dim=9)
    assert count(net) == 61805571
    parts = (net.up["64x64_block1"], net.conv_norm_out, net.conv_out)
    assert [count(part) for part in parts] == [541952, 256, 3459]


def test_diffusers_keeps_it(tmp_path):
    """Saved and loaded as any model of diffusers; called with a number or a level for each sample."""
    net = tiny(num_class_embeds=10, augment_dim=9)
    net.save_pretrained(tmp_path)
    same = SongUNet.from_pretrained(tmp_path)
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([3, 9])
    out = net.eval()(x, 229.0, labels).sample
    torch.testing.assert_close(same(x, torch.tensor([229.0, 229.0]), labels, return_dict=False)[0], out)
    assert not same.training and net.train()(x, 229.0, labels).sample.isfinite().all()


def test_augmentation():
    """No augmentation is a vector of zeros, and its weights have a gradient in any case."""
    net, x = tiny(augment_dim=9).eval(), torch.randn(2, 3, 8, 8)
    plain = net(x, 229.0).sample
    torch.testing.assert_close(net(x, 229.0, augment_labels=torch.zeros(2, 9)).sample, plain)
    assert (net(x, 229.0, augment_labels=torch.ones(2, 9)).sample - plain).abs().max() > 1e-4
    plain.sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None]


def test_gradient_checkpointing():
    net, x = tiny().double(), torch.randn(2, 3, 8, 8).double()
    grads = []
    for checkpointed in (False, True):
        net.zero_grad()
        if checkpointed:
            net.enable_gradient_checkpointing()
        torch.manual_seed(0)  # dropout
        net.train()(x, 229.0).sample.square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    assert net.gradient_checkpointing
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize(("classes", "labels"), [(10, None), (None, torch.zeros(1).long())])
def test_labels_are_given_where_there_are_classes(classes, labels):
    with pytest.raises(ValueError, match="num_class_embeds"):
        tiny(num_class_embeds=classes)(torch.randn(1, 3, 8, 8), 229.0, labels)
