"""Tiny networks written for the golden-value driver (no upstream code in here).

TinyEDM      : EDM-preconditioned denoiser, called net(x, sigma, class_labels, augment_labels=..., return_flag=...)
TinyCond     : DDPM/flow style network, called net(x, t, encoder_hidden_states=ctx).sample
They are deliberately small so that a second implementation can rebuild them from the
weights stored in the .npz files:  every parameter is stored under "<prefix>/<state_dict name>".
"""

import types

import torch
import torch.nn as nn
import torch.nn.functional as F


class Counter:
    """class-level log of network calls: (name, batch, grad_enabled, params_require_grad)"""

    log = []


class TinyEDM(nn.Module):
    def __init__(
        self, img_resolution=8, img_channels=3, label_dim=0, width=8, sigma_data=0.5, dropout=0.0, name="net", **_
    ):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.sigma_data = sigma_data
        self.emb = nn.Linear(1, width)  # on c_noise = log(sigma)/4
        self.lab = nn.Linear(label_dim, width, bias=False) if label_dim else None
        self.c1 = nn.Conv2d(img_channels, width, 3, padding=1)
        self.c2 = nn.Conv2d(width, width, 3, padding=1)  # "encoder" output is avg_pool2(silu(c2))
        self.c3 = nn.Conv2d(width, img_channels, 3, padding=1)
        self.drop = nn.Dropout(dropout)
        self.name = name

    def forward(self, x, sigma, class_labels=None, force_fp32=False, augment_labels=None, return_flag="decoder", **_):
        Counter.log.append(
            (
                self.name,
                int(x.shape[0]),
                torch.is_grad_enabled(),
                any(p.requires_grad for p in self.parameters()),
                return_flag,
            )
        )
        sigma = sigma.to(x.dtype).reshape(-1, 1, 1, 1)
        sd = self.sigma_data
        c_skip = sd**2 / (sigma**2 + sd**2)
        c_out = sigma * sd / (sigma**2 + sd**2).sqrt()
        c_in = 1 / (sd**2 + sigma**2).sqrt()
        c_noise = sigma.log() / 4
        e = torch.tanh(self.emb(c_noise.reshape(-1, 1)))
        if self.lab is not None and class_labels is not None:
            e = e + self.lab(class_labels.to(x.dtype))
        h = F.silu(self.c1(c_in * x) + e[:, :, None, None])
        h = F.silu(self.c2(self.drop(h)))
        logits = F.avg_pool2d(h, 2).mean(dim=1, keepdim=True)  # channel mean of a downsampled encoder map
        if return_flag == "encoder":
            return logits
        D = c_skip * x + c_out * self.c3(h)
        return D if return_flag == "decoder" else (D, logits)


class TinyCond(nn.Module):
    """epsilon / velocity network with text context: ctx [B, L, D] is mean-pooled through a linear layer."""

    def __init__(self, in_channels=4, width=8, ctx_dim=16, t_scale=1000.0, name="net"):
        super().__init__()
        self.emb = nn.Linear(2, width)
        self.ctx = nn.Linear(ctx_dim, width)
        self.c1 = nn.Conv2d(in_channels, width, 3, padding=1)
        self.c2 = nn.Conv2d(width, width, 3, padding=1)
        self.c3 = nn.Conv2d(width, in_channels, 3, padding=1)
        self.t_scale = t_scale
        self.name = name

    def forward(self, x, timesteps, encoder_hidden_states=None, **_):
        Counter.log.append(
            (
                self.name,
                int(x.shape[0]),
                torch.is_grad_enabled(),
                any(p.requires_grad for p in self.parameters()),
                "decoder",
            )
        )
        t = timesteps.to(x.dtype).reshape(-1) / self.t_scale
        if t.numel() == 1 and x.shape[0] > 1:
            t = t.expand(x.shape[0])
        f = torch.stack([torch.sin(3.0 * t), torch.cos(3.0 * t)], dim=1)
        e = torch.tanh(self.emb(f)) + torch.tanh(self.ctx(encoder_hidden_states.to(x.dtype)).mean(dim=1))
        h = F.silu(self.c1(x) + e[:, :, None, None])
        h = F.silu(self.c2(h))
        return types.SimpleNamespace(sample=x * 0.3 + self.c3(h))


class TinyTokenizer:
    """character tokenizer: id = 1 + ord(c) % 61, padded with 0 to model_max_length."""

    model_max_length = 8

    def __call__(self, prompts, padding=None, max_length=None, truncation=None, return_tensors=None):
        L = max_length or self.model_max_length
        rows = []
        for p in prompts:
            r = [1 + ord(c) % 61 for c in p][:L]
            rows.append(r + [0] * (L - len(r)))
        return types.SimpleNamespace(input_ids=torch.tensor(rows, dtype=torch.long))


class TinyTextEncoder(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.e = nn.Embedding(64, dim)
        self.n = 0

    def forward(self, ids, attention_mask=None):
        self.n += 1
        Counter.log.append(("text", int(ids.shape[0]), torch.is_grad_enabled(), False, "text"))
        return (self.e(ids),)


class TinyVAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(block_out_channels=[1, 1, 1, 1], scaling_factor=0.18215, force_upcast=False)
        self.dtype = torch.float32
        self.c = nn.Conv2d(4, 3, 1)

    def decode(self, z, return_dict=False):
        return (F.interpolate(torch.tanh(self.c(z)), scale_factor=8),)


def build(cls, seed, **kw):
    g = torch.random.get_rng_state()
    torch.manual_seed(seed)
    m = cls(**kw)
    torch.random.set_rng_state(g)
    return m


def pack(prefix, module):
    return {f"{prefix}/{k}": v.detach().cpu().numpy().copy() for k, v in module.state_dict().items()}


class TapCond(nn.Module):
    """TinyCond on (x, t, c) without its text encoder's sequence; its child "mid" is tapped (FastGen cases)."""

    def __init__(self):
        super().__init__()
        self.net, self.mid = TinyCond(), nn.AvgPool2d(2)

    def forward(self, x, t, c):
        n = self.net
        f = torch.stack([torch.sin(3 * t / 1000), torch.cos(3 * t / 1000)], 1).to(x)
        e = torch.tanh(n.emb(f)) + torch.tanh(n.ctx(c).mean(1))
        h = F.silu(n.c2(F.silu(n.c1(x) + e[:, :, None, None])))
        self.mid(h)
        return x * 0.3 + n.c3(h)


class Label(nn.Module):
    """TinyCond told one of ten labels (SFD cases)."""

    def __init__(self):
        super().__init__()
        self.net, self.e = TinyCond(in_channels=3), nn.Embedding(10, 16)

    def forward(self, x, t, c):
        return self.net(x, t, encoder_hidden_states=self.e(c)[:, None]).sample
