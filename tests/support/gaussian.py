"""Closed forms for a Gaussian teacher, and draws that make the expectation of a quadratic loss exact. All float64.

Data x ~ N(mu, Sigma), seen through x_t = alpha x + sigma eps. Everything here is written out anew, so that a mistake in
distill/ is not repeated in the test that should find it.
"""

from dataclasses import dataclass

import torch
from torch import nn

from distill.diffusion.denoiser import Denoiser
from distill.diffusion.schedule import EDM, VP, Flow, Trig
from distill.diffusion.student import Student
from distill.random import Draw
from distill.roles import Nets

F64 = torch.float64
SCHEDULES = {"vp": VP.scaled_linear(), "edm": EDM(), "flow": Flow(), "trig": Trig(), "trig-half": Trig(0.5)}
RATIOS = (0.3, 1.0, 4.0)  # sigma / alpha, inside the range of every schedule


def level(schedule, native):
    """What networks are told -> (alpha, sigma) [B, 1]."""
    n = native[:, None]
    match schedule:
        case VP():
            abar = torch.tensor(schedule.alphas_cumprod, dtype=F64)
            table = ((1 - abar) / abar).log() / 2
            low = n.detach().floor().long().clamp(max=len(table) - 2)
            ratio = (table[low] + (n - low) * (table[low + 1] - table[low])).exp()
            return (1 + ratio**2) ** -0.5, ratio * (1 + ratio**2) ** -0.5
        case EDM():
            return torch.ones_like(n), n
        case Flow():
            return 1 - n / schedule.scale, n / schedule.scale
        case Trig():
            return n.cos(), schedule.sigma_d * n.sin()


def encode(kind, x, x0, alpha, sigma, sigma_d=0.5):
    """The output of a network of this kind whose clean sample at x is x0."""
    eps = (x - alpha * x0) / sigma
    if kind == "edm":  # (x0 - c_skip x / alpha) / c_out at the ratio sigma / alpha, multiplied through by alpha
        norm = sigma**2 + alpha**2 * sigma_d**2
        return (x0 - alpha * sigma_d**2 / norm * x) * norm.sqrt() / (sigma * sigma_d)
    return {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}[kind]


@dataclass
class Gaussian:
    """N(mean [d], cov [d, d])."""

    mean: torch.Tensor
    cov: torch.Tensor

    def __post_init__(self):
        self.var, self.axes = torch.linalg.eigh(self.cov)

    def denoise(self, x, alpha, sigma):
        """E[x0 | x_t = x]."""
        y = (x - alpha * self.mean) @ self.axes
        return self.mean + (alpha * self.var / (alpha**2 * self.var + sigma**2) * y) @ self.axes.T

    def carry(self, x, start, end):
        """x_t -> x_s along the probability-flow ODE; start and end are levels (alpha, sigma)."""
        (a, s), (a1, s1) = start, end
        y = (x - a * self.mean) @ self.axes
        gain = ((a1**2 * self.var + s1**2) / (a**2 * self.var + s**2)).sqrt()
        return a1 * self.mean + (gain * y) @ self.axes.T

    def step(self, denoiser, x, t, s, c=None):
        """A solver (solver.Step) that makes no error."""
        start, end = (tuple(a[:, None] for a in denoiser.path.coefficients(u)) for u in (t, s))
        return self.carry(x, start, end)


class Oracle(nn.Module):
    """The network, of any schedule and kind, whose x0 is what `predict(x, alpha, sigma)` gives."""

    def __init__(self, predict, schedule, kind, sigma_d=0.5):
        super().__init__()
        self.predict, self.schedule, self.kind, self.sigma_d = predict, schedule, kind, sigma_d

    def forward(self, x, native):
        alpha, sigma = level(self.schedule, native)
        return encode(self.kind, x, self.predict(x, alpha, sigma), alpha, sigma, self.sigma_d)


def exact(law, schedule, kind="x0"):
    """The optimal denoiser of a Gaussian."""
    return Denoiser(Oracle(law.denoise, schedule, kind), schedule, kind)


def consistent(law, schedule, kind="x0"):
    """The exact consistency function: every point goes to where its trajectory is at t = 0."""
    end = schedule.coefficients(torch.zeros(1, dtype=F64))
    return Denoiser(Oracle(lambda x, *start: law.carry(x, start, end), schedule, kind), schedule, kind)


class Line(nn.Module):
    """x = A z + b."""

    def __init__(self, A, b):
        super().__init__()
        self.A, self.b = nn.Parameter(A.clone()), nn.Parameter(b.clone())

    def forward(self, z, t):
        return z @ self.A.T + self.b

    @property
    def law(self):
        """The distribution of x, without gradient."""
        A = self.A.detach()
        return Gaussian(self.b.detach(), A @ A.T)


def white(n, d, seed=0):
    """[n, d] with a mean of exactly zero and a covariance of exactly one."""
    x = torch.randn(n, d, dtype=F64, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / n), x.T, upper=False).T


class Whitened(Draw):
    """Normal draws `names` [n, d], jointly whitened: the mean of anything quadratic in them is its expectation.

    `blocks` repeats the same draws, to pair them with several times.
    """

    def __init__(self, n, d, names=("z", "eps"), blocks=1, player="student"):
        super().__init__(0, 0, player, torch.arange(n * blocks))
        columns = white(n, d * len(names)).repeat(blocks, 1).chunk(len(names), dim=1)
        self.columns = dict(zip(names, columns))

    def normal(self, name, shape):
        assert self.columns[name].shape == tuple(shape)
        return self.columns[name]


def nets_of(line, teacher, **roles):
    """Roles around the generator x = A z + b: one call on unscaled noise."""
    student = Student(Denoiser(line, teacher.path, "x0"), scale=1.0)
    return Nets(teacher, student, line.b.shape, **roles)


def student_gradient(method, nets, draw, batch=None):
    """(loss, gradient to A, gradient to b) of one student turn, by the method's own sample() and student_loss()."""
    batch, line = batch or {}, nets.student.denoiser.net
    loss, _ = method.student_loss(method.sample(nets, batch, draw), nets, batch, draw)
    return loss.detach(), *torch.autograd.grad(loss, (line.A, line.b))


def problem(d, seed=0):
    """A teacher N(mu, Sigma) and a generator A, b that is not it."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, dtype=F64, generator=g)
    axes = torch.linalg.qr(randn(d, d))[0]
    teacher = Gaussian(randn(d), axes @ torch.diag(torch.linspace(0.3, 2.0, d, dtype=F64)) @ axes.T)
    return teacher, Line(0.6 * torch.eye(d, dtype=F64) + 0.3 * randn(d, d) / d**0.5, randn(d))


def gains(teacher, A, s):
    """P = (Sigma + s^2)^-1, R = (S + s^2)^-1 and the gains of the two posterior means Kp = Sigma P, Kq = S R."""
    noise, S = s**2 * torch.eye(len(A), dtype=F64), A @ A.T
    P, R = torch.linalg.inv(teacher.cov + noise), torch.linalg.inv(S + noise)
    return P, R, teacher.cov @ P, S @ R


def kl_gradient(teacher, A, b, s):
    """Gradient to (A, b) of KL( N(b, A A^T + s^2) || N(mu, Sigma + s^2) )."""
    P, R, _, _ = gains(teacher, A, s)
    return (P - R) @ A, P @ (b - teacher.mean)


def sid_gradient(teacher, A, b, s, alpha):
    """Gradient to (A, b) of E[ delta . (real - x) - alpha |delta|^2 ], delta = real - fake, weights fixed."""
    _, _, Kp, Kq = gains(teacher, A, s)
    eye = torch.eye(len(A), dtype=F64)
    M, c0 = Kp - Kq, (eye - Kp) @ (teacher.mean - b)
    half = M.T @ (Kq - eye)
    return (half + half.T + 2 * (1 - alpha) * M.T @ M) @ A, (Kq - eye).T @ c0 + 2 * (1 - alpha) * M.T @ c0


def kl(teacher, A, b, s=0.0):
    """KL( N(b, A A^T + s^2) || N(mu, Sigma + s^2) )."""
    noise = s**2 * torch.eye(len(A), dtype=F64)
    q, p, gap = A @ A.T + noise, teacher.cov + noise, teacher.mean - b
    inv = torch.linalg.inv(p)
    return (torch.trace(inv @ q) + gap @ inv @ gap - len(A) + torch.logdet(p) - torch.logdet(q)) / 2


def fisher(teacher, A, b, s):
    """E |real - fake|^2 over y = A z + b + s n, the fake being optimal for these A and b."""
    _, _, Kp, Kq = gains(teacher, A, s)
    gap, M = (torch.eye(len(A), dtype=F64) - Kp) @ (teacher.mean - b), Kp - Kq
    return gap @ gap + torch.trace(M @ (A @ A.T + s**2 * torch.eye(len(A), dtype=F64)) @ M.T)


def sid_loss(teacher, A, b, s, alpha, Kq, b_fake):
    """E[ delta . (real - x) - alpha |delta|^2 ] for a fake with gain Kq and mean b_fake, whatever they are."""
    _, _, Kp, _ = gains(teacher, A, s)
    eye, S = torch.eye(len(A), dtype=F64), A @ A.T + torch.outer(b, b)  # E[x x^T] = E[x y^T]
    Y = S + s**2 * eye  # E[y y^T]
    M, k = Kp - Kq, (eye - Kp) @ teacher.mean
    m = k - (eye - Kq) @ b_fake  # delta = M y + m;  real = Kp y + k
    cross = torch.trace(M.T @ (Kp @ Y - S)) + (M @ b) @ k + m @ (Kp @ b - b + k)
    return cross - alpha * (torch.trace(M.T @ M @ Y) + 2 * m @ M @ b + m @ m)
